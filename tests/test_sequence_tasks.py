"""Filtering, smoothing, forecasting and filling of sequences, against exact answers."""

import copy
import itertools
from functools import cache, partial

import pytest
import torch

import pyro_vae as pv
from pyro_vae import smc
from pyro_vae.models import state_space
from pyro_vae.models.switching import SwitchingSequence
from tests import oracles
from tests.statistics import assert_mean_close
from tests.test_linear_gaussian_ssm import D, J, M, T, U, data, dense, model_of, observed_of, plain

H, K = 3, 10_000
KINDS = [(False, False, False), (True, False, True), (False, True, False), (True, True, True)]
WRONG = {"guide_shift": 0.4, "guide_widening": 1.5}


def close(left, right, atol=1e-10):
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


def case(ragged=True, masked=True, inputs=True, **changes):
    """A model, a minibatch of its draws, and the inputs of the steps to come; of what is masked, a whole step is."""
    model, given = (model_of if inputs else plain)(**changes), data(ragged, masked, inputs)
    given["x"] = model.sample(M, T, inputs=given.get("inputs"))
    if masked:
        given["mask"][0, 2] = given["mask"][2, 2] = False  # the latter is the last step of its sequence
        given["x"] = torch.where(given["mask"], given["x"], torch.nan)
    return model, given, torch.randn(M, H, U) if inputs else None


def kalman_forecast(model, given, future, num_steps=H):
    """Means and variances of what is to come, (M, H, D), by a Kalman filter that goes on past the length."""
    means, variances = [], []
    C, d = model.emission.weight, model.emission.bias
    for row, n in enumerate(given.get("lengths", torch.full((M,), T)).tolist()):
        longer = {"lengths": torch.tensor([n])}
        for name in ("x", "mask", "inputs"):
            if name in given:
                value = given[name][row, :n]
                after = future[row] if name == "inputs" else value.new_zeros(num_steps, value.shape[-1])
                longer[name] = torch.cat([value, after])[None]
        mean, covariance = (moment[0, n:] for moment in model.kalman_filter(**longer))
        means.append(mean @ C.T + d)
        variances.append((C @ covariance @ C.T).diagonal(dim1=-2, dim2=-1) + (2 * model.emission.log_scale).exp())
    return torch.stack(means).detach(), torch.stack(variances).detach()


def assert_normal(draws, mean, variance, within=1.0):
    """Draws (S, ...) have these moments, and 90 % of the law lies in their central 90 %.

    The tolerances are 6 to 8 standard errors of 10,000 draws of 10,000 equal particles; ``within`` so many times that.
    """
    scale = variance.sqrt()
    off = ((draws.mean(0) - mean) / scale).abs()
    assert off.max() < 0.1 * within, f"means are off by up to {off.max():.3f} standard deviations"
    ratio = draws.var(0) / variance
    assert (ratio - 1).abs().max() < 0.13 * within, f"variances are off by a factor of {ratio.min()} to {ratio.max()}"
    low, high = draws.quantile(torch.tensor([0.05, 0.95], dtype=draws.dtype), 0)
    covered = torch.special.ndtr((high - mean) / scale) - torch.special.ndtr((low - mean) / scale)
    assert (covered - 0.9).abs().max() < 0.03 * within, f"coverage from {covered.min()} to {covered.max()}"


# Forecasts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ragged", "masked", "inputs", "guide"), [*((*kind, {}) for kind in KINDS), (*KINDS[-1], WRONG)]
)
def test_forecasts_are_those_of_the_kalman_filter(ragged, masked, inputs, guide):
    model, given, future = case(ragged, masked, inputs, **guide)
    draws = model.forecast(num_steps=H, **given, future_inputs=future, num_samples=K, num_particles=K)
    assert draws.shape == (K, M, H, D)
    assert_normal(draws, *kalman_forecast(model, given, future), within=1.5 if guide else 1.0)


def planted(monkeypatch, bug):
    chosen = state_space._chosen
    if bug == "weights of another sequence":
        monkeypatch.setattr(state_space, "_chosen", lambda z, log_w, n: chosen(z, log_w.roll(1, 1), n))
    elif bug == "no weights":
        monkeypatch.setattr(state_space, "_chosen", lambda z, log_w, n: chosen(z, torch.zeros_like(log_w), n))
    elif bug == "a transition too few":
        late = lambda self, z, num_steps, inputs, last: self.decode(z[..., None, :]).sample()  # noqa: E731
        monkeypatch.setattr(pv.LinearGaussianSSM, "_ahead", late)
    elif bug == "the last step of the padding":
        keep = lambda self, x, lengths, inputs, mask: (x, None, inputs, mask)  # noqa: E731
        monkeypatch.setattr(pv.LinearGaussianSSM, "_checked", keep)


BUGS = ["none", "weights of another sequence", "no weights", "a transition too few", "the last step of the padding"]


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_of_forecasts_are_seen(monkeypatch, bug):
    model, given, _ = case(masked=False, inputs=False, **WRONG)
    planted(monkeypatch, bug)
    draws = model.forecast(num_steps=1, **given, num_samples=K, num_particles=K)
    check = partial(assert_normal, draws, *kalman_forecast(model, given, None, 1), within=1.5)
    if bug == "none":
        check()
    else:
        with pytest.raises(AssertionError, match="are off by"):
            check()


def test_forecasts_of_inputs_depend_on_those_to_come():
    model, given, future = case()
    draws = model.forecast(num_steps=H, **given, future_inputs=future.flip(1), num_samples=K, num_particles=K)
    with pytest.raises(AssertionError, match="are off by"):
        assert_normal(draws, *kalman_forecast(model, given, future))


# Filtering ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ragged", "masked", "inputs"), KINDS)
def test_filters_are_the_kalman_filter(ragged, masked, inputs):
    model, given, _ = case(ragged, masked, inputs)
    found = model.filter(**given, num_particles=2 * K)
    means, covariances = (moment.detach() for moment in model.kalman_filter(**given))
    spread = (found.particles - found.means.movedim(1, 0)[:, None]).square()
    variances = (found.log_weights.exp()[..., None] * spread).sum(1).movedim(0, 1)
    seen = torch.arange(T) < given.get("lengths", torch.full((M,), T))[:, None]
    close(found.means[seen], means[seen], atol=0.12)
    ratio = variances[seen] / covariances.diagonal(dim1=-2, dim2=-1)[seen]
    assert (ratio - 1).abs().max() < 0.3
    close(found.log_evidence, model.log_marginal(**given).detach(), atol=0.3)


def same_noise(monkeypatch):
    """Steps of a particle filter that draw the same numbers whenever they are the n-th after a start."""
    start, go_on, calls = smc.init, smc.step, []

    def init(*args):
        calls[:] = [0]
        torch.manual_seed(0)
        return start(*args)

    def step(*args, **kwargs):
        calls.append(0)
        torch.manual_seed(len(calls))
        return go_on(*args, **kwargs)

    monkeypatch.setattr(smc, "init", init)
    monkeypatch.setattr(smc, "step", step)


def assert_online_is_filter(monkeypatch, model, x, inputs=None, mask=None, atol=1e-10):
    """Step by step; where a mask of a step is True throughout, the stream is told None, and elsewhere what there is."""
    same_noise(monkeypatch)
    found = model.filter(x, inputs=inputs, mask=mask, num_particles=60, threshold=1.0)
    assert found.resampled.any()
    stream = model.filter_online(len(x), num_particles=60, threshold=1.0)
    for t in range(x.shape[1]):
        seen = None if mask is None or mask[:, t].all() else mask[:, t]
        seen = seen[:, :1] if seen is not None and (seen == seen[:, :1]).all() else seen
        mean = stream.update(x[:, t], None if inputs is None else inputs[:, t], seen)
        close(mean, found.means[:, t], atol)
        close(stream.state.particles, found.particles[t], atol)
        close(stream.state.log_weights, found.log_weights[t], atol)
    close(stream.state.log_evidence, found.log_evidence, atol)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("inputs", [False, True])
def test_a_stream_is_filtered_as_a_whole_is(monkeypatch, masked, inputs):
    model, given, _ = case(False, masked, inputs)
    if masked:
        given["mask"][:, 1], given["mask"][:, 3], given["mask"][0, 4] = True, False, False
        given["x"] = torch.where(given["mask"], given["x"].nan_to_num(), torch.nan)
    assert_online_is_filter(monkeypatch, model, **given)


def test_a_stream_that_is_given_the_inputs_of_the_step_before_is_seen(monkeypatch):
    model, given, _ = case(False, False, True)
    checked = state_space.OnlineFilter._checked

    def late(self, x, inputs, mask):
        self.before = getattr(self, "after", inputs)
        self.after = inputs
        return checked(self, x, self.before, mask)

    monkeypatch.setattr(state_space.OnlineFilter, "_checked", late)
    with pytest.raises(AssertionError, match="not close"):
        assert_online_is_filter(monkeypatch, model, **given)


# Smoothing ------------------------------------------------------------------------------------------------------------


def smoothed(model, given):
    means, covariances = (moment.detach() for moment in model.kalman_smoother(**given))
    seen = torch.arange(T) < given.get("lengths", torch.full((M,), T))[:, None]
    return seen, means[seen], covariances.diagonal(dim1=-2, dim2=-1)[seen]


@pytest.mark.parametrize(("ragged", "masked", "inputs"), KINDS)
def test_smoothing_is_the_kalman_smoother(ragged, masked, inputs):
    model, given, _ = case(ragged, masked, inputs)
    seen, means, variances = smoothed(model, given)
    draws = model.smooth(**given, num_samples=K)
    assert draws.shape == (K, M, T, J)
    assert (draws[:, ~seen] == 0).all()
    assert_mean_close(draws[:, seen], means, min_effect=0.1)
    assert_normal(draws[:, seen], means, variances)


def test_particles_mend_a_wrong_guide():
    model, given, _ = case(**WRONG)
    seen, means, variances = smoothed(model, given)
    with pytest.raises(AssertionError, match="are off by"):
        assert_normal(model.smooth(**given, num_samples=K)[:, seen], means, variances, within=2.0)
    draws = model.smooth(**given, num_samples=K, num_particles=2 * K)
    assert draws.shape == (K, M, T, J)
    assert (draws[:, ~seen] == 0).all()
    assert_normal(draws[:, seen], means, variances, within=2.0)


def test_the_prior_proposes_where_the_guide_is_wrong():
    model, given, _ = case(**WRONG)
    seen, means, variances = smoothed(model, given)
    draws = model.smooth(**given, num_samples=K, num_particles=2 * K, proposal="prior")
    assert_normal(draws[:, seen], means, variances, within=3.0)
    assert_kept(model.fill(**given, num_samples=5, proposal="prior"), given)
    with pytest.raises(ValueError, match="proposal: expected one of guide, prior, got 'posterior'"):
        model.fill(**given, proposal="posterior")


@pytest.mark.parametrize(
    ("missing", "gaps", "expected"),
    [(False, True, "prior"), (False, False, "guide"), (True, True, "guide"), (True, False, "guide")],
)
@pytest.mark.parametrize("task", ["smooth", "fill"])
def test_by_default_a_guide_that_is_not_told_of_gaps_proposes_none(task, missing, gaps, expected):
    dmm = pv.DeepMarkovModel(D, J, 4, 4, 5, emission="gaussian", missing=missing)
    assert dmm.sees_gaps == missing
    x, mask = torch.randn(M, T, D), torch.ones(M, T, D, dtype=torch.bool)
    mask[1, 2:4] = not gaps
    found = []
    for options in ({}, {"proposal": expected}):
        torch.manual_seed(0)
        found.append(getattr(dmm, task)(x, mask=mask, num_samples=3, **options))
    assert torch.equal(*found)


# Filling --------------------------------------------------------------------------------------------------------------


def missing_law(given, row):
    """What was not observed of a sequence, flat, and its law given what was."""
    joint = dense(given["inputs"][row] if "inputs" in given else None)
    observed = observed_of(given, row)
    within = (torch.arange(T)[:, None] < given.get("lengths", torch.full((M,), T))[row]).expand(T, D).flatten()
    missing = within & ~observed
    order = T * J + torch.cat([missing.nonzero()[:, 0], observed.nonzero()[:, 0]])
    part = oracles.Gaussian(joint.mean[order], joint.cov[order][:, order])
    return missing, part.given_last(given["x"][row].flatten()[observed]) if observed.any() else part


@pytest.mark.parametrize(("ragged", "masked", "inputs"), [kind for kind in KINDS if kind[1]])
def test_what_is_missing_is_drawn_from_its_law(ragged, masked, inputs):
    model, given, _ = case(ragged, masked, inputs)
    filled = model.fill(**given, num_samples=K)
    assert filled.shape == (K, M, T, D)
    for row in range(M):
        missing, law = missing_law(given, row)
        draws = filled[:, row].flatten(1)[:, missing]
        if not missing.any():
            continue
        assert_mean_close(draws, law.mean, min_effect=0.15)
        centred = draws - law.mean
        assert_mean_close(centred[:, :, None] * centred[:, None], law.cov, min_effect=0.5)
        with pytest.raises(AssertionError, match="truth"):
            assert_mean_close(draws, law.mean + 0.15, min_effect=0.15)
    assert_kept(filled, given)


def assert_kept(filled, given):
    seen = torch.stack([observed_of(given, row).reshape(T, D) for row in range(M)])
    assert (filled[:, seen] == given["x"][seen]).all()
    assert filled.isfinite().all()
    if "lengths" in given:
        assert (filled[:, torch.arange(T) >= given["lengths"][:, None]] == 0).all()


def test_particles_mend_what_a_wrong_guide_fills():
    model, given, _ = case(**WRONG)
    filled = model.fill(**given, num_samples=K, num_particles=2 * K)
    assert_kept(filled, given)
    wrong, errors = model.fill(**given, num_samples=K), []
    for row in range(M):
        missing, law = missing_law(given, row)
        if missing.any():
            variance = law.cov.diagonal()
            assert_normal(filled[:, row].flatten(1)[:, missing], law.mean, variance, within=2.0)
            off = wrong[:, row].flatten(1)[:, missing].mean(0) - law.mean
            errors.append((off / variance.sqrt()).abs().max())
    assert max(errors) > 0.2


def test_masks_of_steps_are_masks_of_all_their_elements():
    model, given, _ = case(masked=False)
    steps = torch.rand(M, T) < 0.6

    def results(mask):
        torch.manual_seed(0)
        options = given | {"mask": mask}
        found = model.filter(**options, num_particles=20).log_evidence, model.smooth(**options, num_samples=2)
        ahead = model.forecast(num_steps=2, **options, future_inputs=torch.ones(M, 2, U), num_particles=5)
        return *found, ahead, model.fill(**options, num_samples=2)

    for other in (steps[..., None], steps[..., None].expand(M, T, D)):
        for left, right in zip(results(steps), results(other), strict=True):
            close(left, right)


# Every model ----------------------------------------------------------------------------------------------------------

MODELS = {
    "linear": lambda: plain(),
    "deep": lambda: pv.DeepMarkovModel(D, J, 4, 4, 5, emission="gaussian"),
    "flow": lambda: pv.DeepMarkovModel(D, J, 4, 4, 5, guide="st-lr", emission="student-t", num_flows=1, flow_dim=4),
    "recurrent": lambda: pv.VariationalRNN(D, J, 4, emission="gaussian"),
    "switching": lambda: pv.SwitchingLDS(D, J, 2, rnn_dim=4),
    "volatility": lambda: pv.StochasticVolatility(D, rnn_dim=4),
}


@cache
def made(name):
    """One of each, for what is recorded of a model is kept as long as it is."""
    return MODELS[name]()


def all_tasks(model, given, mask, num_steps, **options):
    """What each method gives, by name; every one of few particles."""
    few = {"num_samples": 3, "num_particles": 4}
    stream = model.filter_online(len(given["x"]), num_particles=4)
    stepwise = [stream.update(given["x"][:, t], mask=mask[:, t]) for t in range(given["x"].shape[1])]
    return {
        "filter": model.filter(**given, mask=mask, num_particles=4).means,
        "online": torch.stack(stepwise, 1),
        "smooth": model.smooth(**given, mask=mask, num_samples=3),
        "particles": model.smooth(**given, mask=mask, **few),
        "forecast": model.forecast(num_steps=num_steps, **given, mask=mask, **few),
        "fill": model.fill(**given, mask=mask, num_samples=3),
        "filled": model.fill(**given, mask=mask, **few),
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("num", "steps", "ahead"), [(1, 1, 1), (2, 1, 2), (2, 4, 3)])
def test_shapes(name, num, steps, ahead):
    model, x = made(name), torch.randn(num, steps, D)
    given = {"x": x, "lengths": torch.tensor([1, steps][-num:])}
    found = all_tasks(model, given, torch.rand(num, steps, D) < 0.7, ahead)
    assert found["forecast"].shape == (3, num, ahead, D)
    assert found["fill"].shape == found["filled"].shape == (3, num, steps, D)
    width = model.encode(x).event_shape[-1]
    assert found["smooth"].shape == found["particles"].shape == (3, num, steps, width)
    state = J + 2 if name == "switching" else width
    assert found["filter"].shape == found["online"].shape == (num, steps, state)
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("name", MODELS)
def test_single_precision(name):
    model, x = copy.deepcopy(made(name)).float(), torch.randn(2, 4, D).float()
    torch.set_default_dtype(torch.float32)
    found = all_tasks(model, {"x": x, "lengths": torch.tensor([4, 2])}, torch.rand(2, 4, 1) < 0.7, 3)
    for value in found.values():
        assert value.dtype == torch.float32
        assert value.isfinite().all()


def test_forecasts_in_single_precision_are_right():
    model, given, future = case(masked=False)
    single = model_of().float()
    rounded = {name: value if name == "lengths" else value.float() for name, value in given.items()}
    options = {"future_inputs": future.float(), "num_samples": K, "num_particles": K}
    draws = single.forecast(num_steps=H, **rounded, **options)
    assert draws.dtype == torch.float32
    assert_normal(draws.double(), *kalman_forecast(model, given, future))


@pytest.mark.parametrize("name", MODELS)
def test_noise_is_torchs_and_modes_are_left_alone(name):
    model, x = copy.deepcopy(made(name)), torch.randn(2, 4, D)
    model.train()
    model.emission.eval()
    modes = [part.training for part in model.modules()]
    given, mask = {"x": x, "lengths": torch.tensor([4, 2])}, torch.rand(2, 4, D) < 0.7
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(all_tasks(model, given, mask, 2))
    assert [part.training for part in model.modules()] == modes
    for task, value in found[0].items():
        assert torch.equal(value, found[1][task]), task
        assert not torch.equal(value, found[2][task]), task
        assert not value.requires_grad


# Arguments ------------------------------------------------------------------------------------------------------------

TASKS = {
    "filter": lambda model, given: model.filter(**given),
    "smooth": lambda model, given: model.smooth(**given),
    "forecast": lambda model, given: model.forecast(**({"num_steps": 2} | given)),
    "fill": lambda model, given: model.fill(**({"mask": torch.ones(M, T, dtype=torch.bool)} | given)),
}
DATA = {
    "x narrow": ({"x": torch.zeros(M, T, 1)}, r"x: expected shape \(M, T, 3\), got \(4, 6, 1\)"),
    "x flat": ({"x": torch.zeros(M, T)}, r"x: expected shape \(M, T, 3\), got \(4, 6\)"),
    "x empty": ({"x": torch.zeros(M, 0, D)}, r"x: expected shape \(M, T, 3\), got \(4, 0, 3\)"),
    "mask": ({"mask": torch.ones(M, D, dtype=torch.bool)}, r"mask: expected .*\(4, 6\), .* got torch.bool of \(4, 3\)"),
    "mask floats": ({"mask": torch.ones(M, T)}, r"mask: expected booleans .* got torch.float.* of"),
    "lengths": ({"lengths": torch.tensor([6, 2])}, r"lengths: expected shape \(4,\), .* got shape \(2,\)"),
    "length 0": ({"lengths": torch.tensor([6, 2, 0, 1])}, r"lengths: expected .* from 1 to 6, got .* from 0 to 6"),
    "inputs": ({"inputs": torch.zeros(M, 2, 1)}, r"inputs: expected shape \(4, 6, U\), got \(4, 2, 1\)"),
    "no inputs": ({"inputs": torch.zeros(M, T, 1)}, r"inputs: expected 0 values .* got 1|future_inputs: expected"),
    "particles": ({"num_particles": 0}, "num_particles: expected a whole number of at least 1, got 0"),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", DATA)
def test_bad_data_are_refused(task, name):
    changes, said = DATA[name]
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=said):
        TASKS[task](plain(), {"x": torch.zeros(M, T, D)} | changes)
    if name != "no inputs":
        assert torch.equal(torch.get_rng_state()[:50], state[:50])  # nothing was begun


@pytest.mark.parametrize(
    ("task", "changes", "said"),
    [
        ("smooth", {"num_samples": 0}, "num_samples: expected a whole number of at least 1, got 0"),
        ("smooth", {"num_samples": 2.5}, "num_samples: expected a whole number of at least 1, got 2.5"),
        ("forecast", {"num_samples": 0}, "num_samples: expected a whole number"),
        ("fill", {"num_samples": -1}, "num_samples: expected a whole number"),
        ("fill", {"mask": None}, "mask: expected .* got None"),
        ("forecast", {"num_steps": 0}, "num_steps: expected a whole number of at least 1, got 0"),
        ("forecast", {"future_inputs": torch.zeros(M, 2, 1)}, r"future_inputs: expected None .* got shape \(4, 2, 1\)"),
        ("filter", {"threshold": 2.0}, "threshold: expected a share"),
    ],
)
def test_bad_arguments_are_refused(task, changes, said):
    with pytest.raises(ValueError, match=said):
        TASKS[task](plain(), {"x": torch.zeros(M, T, D)} | changes)


@pytest.mark.parametrize("future", [None, torch.zeros(M, 3, U), torch.zeros(M, 2, 2), torch.zeros(2, U)])
def test_inputs_to_come_that_do_not_fit_are_refused(future):
    model, given, _ = case()
    with pytest.raises(ValueError, match=r"future_inputs: expected shape \(4, 2, 1\), beside inputs, got"):
        model.forecast(num_steps=2, **given, future_inputs=future)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x": torch.zeros(3, D)}, r"x: expected shape \(2, 3\), got \(3, 3\)"),
        ({"x": torch.zeros(2, 1)}, r"x: expected shape \(2, 3\), got \(2, 1\)"),
        ({"inputs": None}, r"inputs: expected shape \(2, 1\), as before, got None"),
        ({"inputs": torch.zeros(2, 2)}, r"inputs: expected shape \(2, 1\), as before, got \(2, 2\)"),
        ({"mask": torch.ones(2, 2, dtype=torch.bool)}, r"mask: expected booleans of shape \(2, 1\) or \(2, 3\), got"),
        ({"mask": torch.ones(2, 1)}, r"mask: expected booleans of shape .* got torch.float"),
    ],
)
def test_a_stream_that_changes_is_refused_and_goes_on(changes, said):
    stream = model_of().filter_online(2, num_particles=5)
    given = {"x": torch.zeros(2, D), "inputs": torch.zeros(2, U)}
    stream.update(**given)
    before = stream.state
    with pytest.raises(ValueError, match=said):
        stream.update(**(given | changes))
    assert stream.state is before
    assert stream.update(**given).shape == (2, J)


def test_a_stream_of_bad_options_is_refused():
    for options in ({"num_sequences": 0}, {"num_particles": 0}, {"threshold": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
            plain().filter_online(**options)
    with pytest.raises(ValueError, match="inputs: expected 1 values"):
        model_of().filter_online().update(torch.zeros(1, D))


# The variational recurrent network ------------------------------------------------------------------------------------


def recalling(data_dim=1):
    """A network of binary x: of data_dim 1, P(x_2 = 1 | x_1) differs by 0.3 from one x_1 to the other."""
    torch.manual_seed(39)
    model = pv.VariationalRNN(data_dim, J, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        model.emission.emission.network[-1].weight.mul_(8.0)
        model.emission.emission.network[-1].bias.zero_()
        model.features[-1].weight.mul_(10.0)
        model.memory.into.weight.mul_(3.0)
        for moments, raw in ((model.prior_step.moments, 0.0), (model.guide_step.moments, 1.0)):
            moments[-1].weight.mul_(0.2)
            moments[-1].bias[J:].fill_(raw)  # a guide that is wider than the prior: few weights are large
    return model


def evidence(model, x, mask):
    """p(x), by draws from the prior: no weight is large, for x is binary."""
    return model.filter(x, mask=mask, num_particles=20_000, threshold=0.0).log_evidence.exp()


def test_a_recurrent_networks_forecasts_are_ratios_of_evidence(monkeypatch):
    model, lengths = recalling(), torch.tensor([3, 1, 2])
    x = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])[..., None]
    mask = torch.tensor([[True, False, True], [True, True, True], [True, True, True]])[..., None]
    outcomes = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2)))[..., None]  # (4, 2, 1)
    expected = []
    for row, n in enumerate(lengths.tolist()):
        longer = torch.cat([x[row, :n].expand(4, n, 1), outcomes], 1)
        seen = torch.cat([mask[row, :n].expand(4, n, 1), torch.ones(4, 2, 1, dtype=torch.bool)], 1)
        expected.append(evidence(model, longer, seen) / evidence(model, x[row : row + 1, :n], mask[row : row + 1, :n]))
    expected = torch.stack(expected)
    close(expected.sum(-1), torch.ones(3), atol=0.03)  # else there are too few particles

    def off():
        draws = model.forecast(x, 2, lengths, mask=mask, num_samples=K, num_particles=2 * K)
        return ((draws[:, :, None] == outcomes).all(-1).all(-1).double().mean(0) - expected).abs().max()

    assert off() < 0.03
    with monkeypatch.context() as patched:  # planted: the last x of the padding
        patched.setattr(state_space, "_last_of", lambda x, lengths: x[:, -1])
        assert off() > 0.1
    features = model._features
    with monkeypatch.context() as patched:  # planted: draws that are not fed back
        unread = lambda x: features(torch.zeros_like(x) if len(x) == K else x)  # noqa: E731
        patched.setattr(model, "_features", unread)
        assert off() > 0.06


@pytest.mark.parametrize("masked", [False, True])
def test_a_recurrent_networks_stream_is_filtered_as_a_whole_is(monkeypatch, masked):
    model, x = recalling(2), (torch.rand(3, 6, 2) < 0.5).double()
    mask = torch.rand(3, 6, 2) < 0.6
    mask[:, 2], mask[:, 4] = True, False
    assert_online_is_filter(monkeypatch, model, x, mask=mask if masked else None)


def test_a_recurrent_networks_particles_are_importance_samples_paths():
    """What is smoothed and filled, by self-normalised weights of whole paths."""
    model, x, lengths = recalling(2), (torch.rand(3, 3, 2) < 0.5).double(), torch.tensor([3, 1, 2])
    mask = torch.rand(3, 3, 2) < 0.5
    with torch.no_grad():
        weights = pv.log_weights(model.model, model.guide, (x, lengths), {"mask": mask}, num_particles=40_000)
        paths = weights.latents["z"]
        share = weights.log_w.softmax(0)[..., None, None]
        expected = (share * paths).sum(0)
        probabilities = (share * model.decode(paths, lengths).mean).sum(0)
    found = model.smooth(x, lengths, mask=mask, num_samples=K, num_particles=2 * K)
    close(found.mean(0), expected, atol=0.06)
    assert (model.smooth(x, lengths, mask=mask, num_samples=K).mean(0) - expected).abs().max() > 0.1
    filled = model.fill(torch.where(mask, x, torch.nan), mask, lengths, num_samples=K, num_particles=2 * K)
    valid = (torch.arange(3) < lengths[:, None])[..., None]
    close(filled.mean(0)[valid & ~mask], probabilities[valid & ~mask], atol=0.04)
    assert (filled[:, valid & mask] == x[valid & mask]).all()


# Switching dynamics ---------------------------------------------------------------------------------------------------


def switching():
    """Two regimes in one dimension, which drift apart."""
    model = pv.SwitchingLDS(1, 1, 2, rnn_dim=4, stickiness=0.85)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[[0.9]], [[0.4]]]))
        model.bias.copy_(torch.tensor([[1.0], [-1.0]]))
        model.initial_loc.copy_(torch.tensor([[0.5], [-0.5]]))
        model.initial_logits.copy_(torch.tensor([0.3, -0.3]))
        model.emission.log_scale.fill_(-0.3)
        model.combiner.read.bias[-1] = 1.2  # a wide guide, whose weights have few large ones
    return model


def by_paths(model, x, seen, more=0):
    """Of one sequence x (n,), of which some is seen, and of some steps more: weights of all paths of regimes (P,),
    the paths (P, n + more), and moments of z and of x given each, mean (P, 2 (n + more)) and variance.
    """
    n, found = len(x), []
    paths = torch.tensor(list(itertools.product(range(2), repeat=n + more)))
    moves, first = model.transition_logits.log_softmax(-1), model.initial_logits.log_softmax(-1)
    d, noise = model.emission.bias[0], model.emission.log_scale.exp()[0]
    order = torch.cat([torch.arange(n + more), n + more + torch.arange(n + more)])
    observed = torch.cat([seen, torch.zeros(more, dtype=torch.bool)])
    for s in paths:
        size, means, roots = 2 * (n + more), [], []
        for t, regime in enumerate(s.tolist()):
            a, b = model.weight[regime, 0, 0], model.bias[regime, 0]
            start = t == 0
            means.append(model.initial_loc[regime, 0] if start else a * means[-1] + b)
            roots.append(torch.zeros(size) if start else a * roots[-1])
            scale = model.initial_log_scale[regime, 0] if start else model.log_scale[regime, 0]
            roots[-1] = roots[-1] + scale.exp() * torch.eye(size)[t]
        C = model.emission.weight[0, 0]
        emitted = [C * root + noise * torch.eye(size)[n + more + t] for t, root in enumerate(roots)]
        joint = oracles.Gaussian.of_noise(
            torch.stack([*means, *(C * mean + d for mean in means)]), torch.stack(roots + emitted)
        )
        kept = torch.cat([order, (n + more + observed.nonzero()[:, 0])])
        # what is observed stands twice, with a grain of noise, so that its own moments are known too
        doubled = joint.cov[kept][:, kept] + 1e-12 * torch.diag((torch.arange(len(kept)) >= size).double())
        both = oracles.Gaussian(joint.mean[kept], doubled)
        count = int(observed.sum())
        log_p = first[s[0]] + moves[s[:-1], s[1:]].sum()
        if count:
            values = x[seen]
            log_p, both = log_p + both.last(count).log_prob(values), both.given_last(values)
        found.append((log_p, both.mean, both.cov.diagonal()))
    log_p, mean, variance = (torch.stack(parts).detach() for parts in zip(*found, strict=True))
    return log_p, paths, mean, variance


def mixed(log_p, mean, variance):
    """Mean and variance of a mixture."""
    share = log_p.softmax(0)[:, None]
    centre = (share * mean).sum(0)
    return centre, (share * (variance + (mean - centre).square())).sum(0)


def switching_case():
    model, lengths = switching(), torch.tensor([4, 1, 3])
    mask = torch.tensor([[True, False, True, True], [True] * 4, [True, True, False, True]])
    return model, model.sample(3, 4), lengths, mask[..., None]


def test_a_switching_filter_is_that_of_all_paths():
    model, x, lengths, mask = switching_case()
    found = model.filter(x, lengths, mask=mask, num_particles=K)
    for row, n in enumerate(lengths.tolist()):
        for t in range(n):
            log_p, paths, mean, variance = by_paths(model, x[row, : t + 1, 0], mask[row, : t + 1, 0])
            centre, _ = mixed(log_p, mean, variance)
            close(found.means[row, t, 0], centre[t], atol=0.1)
            second = (log_p.softmax(0) * (paths[:, t] == 1)).sum()
            close(found.means[row, t, 2], second, atol=0.04)
            close(found.means[row, t, 1:].sum(), torch.ones(()), atol=1e-10)
        close(found.log_evidence[row], log_p.logsumexp(0), atol=0.1)


@pytest.mark.parametrize("bug", ["none", "regimes forgotten", "no weights"])
def test_switching_forecasts_are_those_of_all_paths(monkeypatch, bug):
    model, x, lengths, mask = switching_case()
    ahead, chosen = pv.SwitchingLDS._ahead, state_space._chosen
    if bug == "regimes forgotten":
        forgotten = lambda self, z, *rest: ahead(self, torch.cat([z[..., :1], 0 * z[..., 1:] + 0.5], -1), *rest)  # noqa: E731
        monkeypatch.setattr(pv.SwitchingLDS, "_ahead", forgotten)
    if bug == "no weights":
        monkeypatch.setattr(state_space, "_chosen", lambda z, log_w, n: chosen(z, 0 * log_w, n))
    draws = model.forecast(x, 2, lengths, mask=mask, num_samples=K, num_particles=2 * K)[..., 0]
    off = []
    for row, n in enumerate(lengths.tolist()):
        log_p, _, mean, variance = by_paths(model, x[row, :n, 0], mask[row, :n, 0], more=2)
        centre, spread = (moment[-2:] for moment in mixed(log_p, mean, variance))
        off.append(((draws[:, row].mean(0) - centre) / spread.sqrt()).abs())
        off.append((draws[:, row].var(0) / spread - 1).abs())
    worst = torch.stack(off).max()
    assert worst < 0.15 if bug == "none" else worst > 0.3


def test_switching_particles_are_smoothed_and_filled_by_all_paths():
    model, x, lengths, mask = switching_case()
    z = model.smooth(x, lengths, mask=mask, num_samples=K, num_particles=2 * K)
    filled = model.fill(x, mask, lengths, num_samples=K, num_particles=2 * K)
    guided = model.smooth(x, lengths, mask=mask, num_samples=K)
    assert z.shape == guided.shape == (K, 3, 4, 1)
    wrong = []
    for row, n in enumerate(lengths.tolist()):
        log_p, _, mean, variance = by_paths(model, x[row, :n, 0], mask[row, :n, 0])
        centre, spread = mixed(log_p, mean, variance)
        close(z[:, row, :n, 0].mean(0), centre[:n], atol=0.1)
        assert (z[:, row, :n, 0].var(0) / spread[:n] - 1).abs().max() < 0.2
        missing = ~mask[row, :n, 0]
        close(filled[:, row, :n, 0].mean(0)[missing], centre[n:][missing], atol=0.12)
        assert (filled[:, row, :n][:, ~missing] == x[row, :n][~missing]).all()
        wrong.append((guided[:, row, :n, 0].mean(0) - centre[:n]).abs().max())
    assert max(wrong) > 0.3


def test_a_switching_stream_is_filtered_as_a_whole_is(monkeypatch):
    model = switching()
    x, mask = model.sample(3, 6), torch.rand(3, 6, 1) < 0.7
    mask[:, 2] = True
    assert_online_is_filter(monkeypatch, model, x, mask=mask)


def test_pairs_with_regimes_have_the_sequences_density():
    model = pv.SwitchingLDS(3, J, 2, rnn_dim=4)
    prior = model.prior(5, torch.tensor([5, 2]))
    assert isinstance(prior, SwitchingSequence)
    pairs = prior.chain().sample((4,))
    z = pairs[..., :J]
    close(prior.chain().log_prob(pairs), prior.log_prob(z))
    close(prior.chain().step_log_prob(pairs), prior.step_log_prob(z))
    valid = torch.arange(5) < torch.tensor([5, 2])[:, None]
    close(pairs[..., J:][:, valid], prior._filtered(prior._densities(z)).exp()[:, valid].detach())
    posterior = prior.switch_posterior(z)[:, torch.arange(2), torch.tensor([4, 1])]
    close(pairs[:, torch.arange(2), torch.tensor([4, 1]), J:], posterior.detach())


def test_what_filters_chains_of_latents_alone_refuses_switching_dynamics():
    model, x = switching(), torch.zeros(3, 4, 1)
    said = r"latent sites 'z' \(SwitchingSequence\), drawn as 'z' \(MarkovSequence\).* SGVB and IWAE"
    with pytest.raises(ValueError, match=said):
        pv.log_marginal(model, x, method="smc", num_particles=10)
    with pytest.raises(ValueError, match=said):
        pv.FIVO(4).differentiable_loss(model.model, model.guide, x)


@pytest.mark.parametrize("name", ["recurrent", "switching", "volatility"])
def test_models_without_inputs_refuse_them(name):
    model, x, u = made(name), torch.zeros(2, 4, D), torch.zeros(2, 4, 1)
    for task in (model.filter, model.smooth, partial(model.smooth, num_particles=3)):
        with pytest.raises(ValueError, match="inputs: expected None"):
            task(x, inputs=u)
    with pytest.raises(ValueError, match="inputs: expected None"):
        model.forecast(x, 2, inputs=u, future_inputs=u[:, :2])
    with pytest.raises(ValueError, match="inputs: expected None"):
        model.filter_online(2).update(x[:, 0], u[:, 0])


# Stochastic volatility ------------------------------------------------------------------------------------------------


def test_intervals_of_returns_to_come_cover_what_comes():
    """By guides that were never trained; and intervals of another variance do not."""
    model = pv.StochasticVolatility(1, rnn_dim=4, mu=-1.0, phi=0.95, sigma=0.4)
    x, ahead = model.sample(1500, 35), 5
    now, then = x[:, :-ahead], x[:, -ahead:]
    lengths = torch.randint(20, 31, (1500,))
    then = torch.stack([row[n : n + ahead] for row, n in zip(x, lengths.tolist(), strict=True)])
    options = {"num_samples": 400, "num_particles": 200}
    low, high = model.forecast(now, ahead, lengths, **options).quantile(torch.tensor([0.05, 0.95]), 0)
    covered = ((low < then) & (then < high)).double().mean((1, 2))
    assert_mean_close(covered, 0.9, min_effect=0.03)
    assert abs(covered.mean() - 0.9) < 0.03
    width = (high - low).log().squeeze(-1)[:, 0]
    assert width.std() > 0.2  # they follow the volatility
    ignorant = model.sample(1, 20_000).quantile(torch.tensor([0.05, 0.95]))
    calm = width < width.quantile(0.25)
    assert ((ignorant[0] < then) & (then < ignorant[1])).double()[calm].mean() > 0.95
    assert abs(covered[calm].mean() - 0.9) < 0.03
