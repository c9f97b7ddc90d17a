"""State-space models and the deep Markov model: shapes, what sees what, padding, gaps, objectives, and whole runs."""

import copy
import json
import logging
import warnings

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.distributions import MarkovSequence, steps_within
from pyro_vae.distributions import sequences as distributions
from pyro_vae.models.deep_markov import EMISSIONS, GUIDES, GatedTransition
from pyro_vae.models.state_space import StateSpaceModel
from pyro_vae.networks import recurrent
from pyro_vae.objectives import OBJECTIVES
from pyro_vae.programs import dream, log_weights, model_parameters
from pyro_vae.programs.program import as_program
from pyro_vae.training import compiled
from tests.statistics import assert_mean_close
from tests.training.test_compiled import WatchedCompiled, WatchedEager, assert_same_step, trail
from tests.training.test_resume import assert_same, without_seconds

NEVER = 10**9
D, J, T, U, M = 3, 2, 5, 2, 4
LENGTHS = torch.tensor([5, 1, 3, 4])


@pytest.fixture(scope="module", autouse=True)
def _few_messages():
    """Inductor's debug records are many, and pytest keeps them all."""
    logging.getLogger("torch.__trace").setLevel(logging.WARNING)


def close(left, right, atol=1e-10):
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


def dmm(**changes):
    sizes = {"data_dim": D, "latent_dim": J, "transition_dim": 12, "emission_dim": 12, "rnn_dim": 5, "flow_dim": 4}
    model = pv.DeepMarkovModel(**(sizes | changes))
    with torch.no_grad():  # away from zeros, at which a missing term would not be seen
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def data(emission="bernoulli", num=M, lengths=LENGTHS, inputs=False, mask=False):
    """Sequences as a program takes them, by name."""
    x = torch.rand(num, T, D).round() if emission in ("bernoulli", "poisson") else torch.randn(num, T, D)
    found = {"x": x}
    if lengths is not None:
        found["lengths"] = lengths
        found["x"] = torch.where(steps_within(lengths, T)[..., None], x, 0.0)
    if inputs:
        found["inputs"] = torch.randn(num, T, U)
    if mask:
        found["mask"] = torch.rand(num, T, D) > 0.3
    return found


SETTINGS = {
    "guide st-l": {"guide": "st-l"},
    "guide st-lr, flows": {"guide": "st-lr", "num_flows": 2},
    "guide mf-lr, gru": {"guide": "mf-lr", "cell": "gru"},
    "guide mf-r, flows": {"guide": "mf-r", "num_flows": 1},
    "lstm, inputs": {"cell": "lstm", "input_dim": U, "emission": "gaussian"},
    "missing": {"missing": True, "emission": "student-t"},
    "missing, inputs": {"missing": True, "emission": "poisson", "input_dim": U, "guide": "st-lr", "cell": "relu"},
}
each_setting = pytest.mark.parametrize("setting", SETTINGS)


def case(setting, num=M, lengths=LENGTHS):
    options = SETTINGS[setting]
    given = data(options.get("emission", "bernoulli"), num, lengths, "input_dim" in options, "missing" in options)
    return dmm(**options), given


def rows(given, index):
    return {name: tensor[index] for name, tensor in given.items()}


LEARNING = {
    "sgvb": lambda: pv.SGVB(2),
    "sgvb B": lambda: pv.SGVB(2, "B"),
    "iwae": lambda: pv.IWAE(3),
    "dreg": lambda: pv.DReG(3),
    "renyi": lambda: pv.Renyi(0.5, 3),
    "vimco": lambda: pv.VIMCO(3),
    "wake-sleep": pv.WakeSleep,
    "reweighted-wake-sleep": lambda: pv.ReweightedWakeSleep(3, 0.5),
    "mcem": lambda: pv.MCEM(3, num_updates=2),
}
each_objective = pytest.mark.parametrize("objective", LEARNING)


def is_guides(name):
    return name.startswith(("rnns", "combiner", "z_q_0"))


# Shapes and densities -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guide", "emission"), [*((g, "bernoulli") for g in GUIDES), *(("st-r", e) for e in EMISSIONS[1:])]
)
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "ragged"])
def test_shapes(guide, emission, lengths):
    model, given = dmm(guide=guide, emission=emission), data(emission, lengths=lengths)
    q = model.encode(**given)
    assert (q.batch_shape, q.event_shape) == ((M,), (T, J))
    z = q.rsample((6,))
    assert z.shape == (6, M, T, J)
    p = model.decode(z, lengths)
    assert (p.batch_shape, p.event_shape) == ((6, M), (T, D))
    assert model.prior(T, lengths).log_prob(z).shape == p.log_prob(given["x"]).shape == (6, M)
    assert model.sample(7, num_steps=9).shape == model.sample(7, num_steps=9, mean=True).shape == (7, 9, D)
    assert len(model.sample(7, num_steps=9, mean=True).unique(dim=0)) == 7


def test_samples_with_inputs():
    model, u = dmm(input_dim=U, emission="gaussian"), torch.randn(6, T, U)
    assert model.sample(6, T, inputs=u).shape == model.sample(6, T, inputs=u[0]).shape == (6, T, D)
    with pytest.raises(ValueError, match=r"expected 2 values for each step \(input_dim\), got 0"):
        model.sample(6, T)


@each_setting
def test_log_weights_are_the_sums_over_steps(setting):
    """Of each sequence by itself, each law called for one step."""
    model, given = case(setting)
    weights = log_weights(model.model, model.guide, (), given, num_particles=2)
    z, u, mask = weights.latents["z"], given.get("inputs"), given.get("mask")
    for m, length in enumerate(LENGTHS.tolist()):
        seen = given["x"][m, :length]
        if mask is not None:
            seen = torch.cat([torch.where(mask[m, :length], seen, 0.0), mask[m, :length].double()], -1)
        seen = seen if u is None else torch.cat([seen, u[m, :length]], -1)
        states = torch.cat([rnn(seen) for rnn in model.rnns], -1)
        before_p, before_q = model.z_0.expand(2, J), model.z_q_0.expand(2, J)
        prior = likelihood = log_q = 0.0
        for t in range(length):
            now, given_u = z[:, m, t], () if u is None else (u[m, t].expand(2, U),)
            prior = prior + model.transition(before_p, *given_u).log_prob(now)
            log_q = log_q + model.combiner(before_q, states[t].expand(2, -1)).log_prob(now)
            elements = model.emission(now, *given_u).base_dist.log_prob(given["x"][m, t])
            likelihood = likelihood + (elements if mask is None else elements * mask[m, t]).sum(-1)
            before_p = before_q = now
        close(weights.log_prior["z"][:, m], prior, 1e-8)
        close(weights.log_guide["z"][:, m], log_q, 1e-8)
        close(weights.log_likelihood["x"][:, m], likelihood)


def test_a_transition_between_linear_and_not():
    """Krishnan et al., arXiv:1609.09869, Sec. 5, by hand."""
    module, z = GatedTransition(J, 4), torch.randn(6, J)
    g = torch.sigmoid(module.gate(z))
    h = module.proposed(z)
    law = module(z).base_dist
    close(law.loc, (1 - g) * (z @ module.linear.weight.T + module.linear.bias) + g * h)
    close(law.scale, torch.log1p((h.clamp_min(0) @ module.scale.weight.T + module.scale.bias).exp()) + 1e-4)


@pytest.mark.parametrize("emission", ["gaussian", "student-t"])
def test_scales_of_emissions_are_learnt(emission):
    model, given = dmm(emission=emission), data(emission)
    pv.SGVB().differentiable_loss(model.model, model.guide, **given).backward()
    assert model.emission.log_scale.grad.abs().min() > 0
    law = model.emission(torch.zeros(J)).base_dist
    close(law.scale, model.emission.log_scale.exp() + 1e-4)
    assert emission == "gaussian" or (law.df > 2).all()


def test_config_builds_the_same_model():
    for options in (SETTINGS["missing, inputs"], SETTINGS["guide st-lr, flows"]):
        first = dmm(**options)
        second = pv.DeepMarkovModel(**json.loads(json.dumps(first.config)))
        assert second.config == first.config
        second.load_state_dict(first.state_dict())
        x, u = torch.ones(M, T, D), torch.randn(M, T, U) if "input_dim" in options else None
        draws = []
        for model in (first, second):
            torch.manual_seed(2)
            draws.append(model.encode(x, LENGTHS, u).sample())
        close(*draws, 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"guide": "st-x"}, "guide: expected one of st-r, st-l"),
        ({"emission": "normal"}, "emission: expected one of bernoulli, gaussian, student-t, poisson, got 'normal'"),
        ({"cell": "rnn"}, "cell: expected one of tanh, relu, gru, lstm, got 'rnn'"),
        ({"latent_dim": 0}, "latent_dim: expected a whole number of at least 1, got 0"),
        ({"rnn_dim": 2.5}, "rnn_dim: expected a whole number of at least 1, got 2.5"),
        ({"num_flows": -1}, "num_flows: expected a whole number of at least 0, got -1"),
        ({"input_dim": True}, "input_dim: expected a whole number of at least 0, got True"),
    ],
)
def test_bad_arguments_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        pv.DeepMarkovModel(**options)


@pytest.mark.parametrize("input_dim", [0, 3])
def test_inputs_of_another_width_are_refused(input_dim):
    with pytest.raises(ValueError, match=f"expected {input_dim} values for each step .input_dim., got 2"):
        dmm(input_dim=input_dim).encode(**data(inputs=True))


# Who sees what --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize(("cell", "ragged"), [("tanh", False), ("lstm", True)])
def test_what_the_guide_of_a_step_depends_on(guide, cell, ragged):
    """ "l" on the past and the present, "r" on the present and the future; z_{t-1} where it is structured."""
    model = dmm(guide=guide, cell=cell, emission="gaussian")
    length = 4 if ragged else T
    x = torch.randn(1, T, D, requires_grad=True)
    z = torch.randn(1, T, J, requires_grad=True)
    q = model.encode(x, torch.tensor([length]) if ragged else None)
    first, rest = q.laws(z)
    moments = torch.cat([first.base_dist.loc[:, None], rest.base_dist.loc.expand(1, T - 1, J)], 1)
    for t in range(length):
        of_x, of_z = torch.autograd.grad(moments[0, t].sum(), [x, z], retain_graph=True, allow_unused=True)
        seen = of_x[0].abs().sum(-1) > 0
        expected = [(s <= t and "l" in guide[3:]) or (t <= s < length and "r" in guide[3:]) for s in range(T)]
        assert seen.tolist() == expected
        seen_z = [False] * T if of_z is None else (of_z[0].abs().sum(-1) > 0).tolist()
        assert seen_z == [guide.startswith("st") and s == t - 1 for s in range(T)]


def test_a_reversal_that_ignores_lengths_is_noticed(monkeypatch):
    monkeypatch.setattr(recurrent, "reversed_within", lambda x, lengths: x.flip(-2))
    with pytest.raises(AssertionError):
        test_a_ragged_batch_is_each_sequence_by_itself("guide st-lr, flows")


def test_inputs_reach_transition_emission_and_guide():
    model, given = dmm(input_dim=U, emission="gaussian"), data("gaussian", inputs=True, lengths=None)
    u = given["inputs"].requires_grad_()
    z = torch.randn(M, T, J)
    for density, first in (
        (model.prior(T, inputs=u).log_prob(z), 0),
        (model.decode(z, inputs=u).log_prob(given["x"]), 0),
        (model.encode(**given).log_prob(z), 0),
    ):
        (slope,) = torch.autograd.grad(density.sum(), u)
        assert (slope[:, first:].abs().sum(-1) > 0).all()


# Each sequence by itself ----------------------------------------------------------------------------------------------


@each_setting
def test_a_ragged_batch_is_each_sequence_by_itself(setting):
    """Given the same latents: log weights and their gradients."""
    model, given = case(setting)
    z = model.encode(**given).sample((2,))
    whole = log_weights(model.model, model.guide, (), given, num_particles=2, latents={"z": z})
    slopes = torch.autograd.grad(whole.log_w.sum(), list(model.parameters()), allow_unused=True)
    total = [None if s is None else torch.zeros_like(s) for s in slopes]
    for m, length in enumerate(LENGTHS.tolist()):
        alone = {n: v[m : m + 1, :length] for n, v in given.items() if n != "lengths"}
        latents = {"z": z[:, m : m + 1, :length]}
        one = log_weights(model.model, model.guide, (), alone, num_particles=2, latents=latents)
        close(whole.log_w[:, m], one.log_w[:, 0], 1e-8)
        own = torch.autograd.grad(one.log_w.sum(), list(model.parameters()), allow_unused=True)
        total = [a if b is None else a + b for a, b in zip(total, own, strict=True)]
    for a, b in zip(slopes, total, strict=True):
        assert a is None or (a - b).abs().max() < 1e-7


def padded_with(model, given, garbage):
    """Bound and gradients with this in the padding of x and inputs, and where x is masked."""
    valid = steps_within(LENGTHS, T)[..., None]
    changed = dict(given)
    for name in {"x", "inputs"} & given.keys():
        changed[name] = torch.where(valid, given[name], garbage)
    if "mask" in given:
        changed["x"] = torch.where(given["mask"], changed["x"], garbage)
    torch.manual_seed(5)
    loss = pv.SGVB(2).differentiable_loss(model.model, model.guide, **changed)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]


@each_setting
@pytest.mark.parametrize("garbage", [torch.nan])
def test_padding_and_gaps_have_no_influence(setting, garbage):
    model, given = case(setting)
    for a, b in zip(padded_with(model, given, garbage), padded_with(model, given, 0.0), strict=True):
        assert (a is None) == (b is None)
        assert a is None or (b.isfinite().all() and torch.equal(a, b))


def test_padding_that_leaks_is_noticed(monkeypatch):
    monkeypatch.setattr(distributions, "steps_within", lambda n, num_steps: torch.ones(*n.shape, num_steps) > 0)
    with pytest.raises((AssertionError, ValueError)):
        test_padding_and_gaps_have_no_influence("guide st-l", 1e30)
    with pytest.raises((AssertionError, RuntimeError)):
        test_a_ragged_batch_is_each_sequence_by_itself("guide st-l")


def test_masks_of_steps_are_masks_of_all_their_elements():
    """(M, T) as (M, T, 1), also where M, T and D are one number."""
    for size in ((M, T, D), (3, 3, 3)):
        model = pv.DeepMarkovModel(size[2], J, 4, 4, 5, emission="gaussian", missing=True)
        x, mask = torch.randn(size), torch.rand(size[:2]) > 0.4
        losses = []
        for one in (mask, mask[..., None], mask[..., None].expand(size)):
            torch.manual_seed(1)
            losses.append(pv.SGVB().differentiable_loss(model.model, model.guide, x, mask=one).item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-10) == pytest.approx(losses[2], abs=1e-10)


def test_a_guide_that_is_not_told_of_gaps_sees_zeros():
    model = dmm(emission="gaussian")
    given = data("gaussian", mask=True)
    zeroed = given | {"x": torch.where(given["mask"], given["x"], 0.0)}
    z = torch.randn(M, T, J)
    close(model.encode(**given).log_prob(z), model.encode(zeroed["x"], LENGTHS).log_prob(z), 0)


# Objectives -----------------------------------------------------------------------------------------------------------


def test_every_objective_is_here():
    missing = set(OBJECTIVES.values()) - {type(make()) for make in LEARNING.values()}
    assert {kind.__name__ for kind in missing} <= {"FIVO"}  # of sequences alone, with tests of its own


def loss_of(objective, model, given, seed=1):
    torch.manual_seed(seed)
    if isinstance(objective, pv.MCEM):
        for _ in objective.updates(model.model, (), given, torch.arange(M)):
            break
    return objective.differentiable_loss(model.model, model.guide, **given)


@pytest.mark.parametrize(
    ("setting", "objective"),
    [*((setting, "sgvb") for setting in SETTINGS), *(("missing, inputs", name) for name in list(LEARNING)[1:])],
)
def test_each_group_of_parameters_gets_its_gradient(setting, objective):
    model, given = case(setting)
    learning = LEARNING[objective]()
    loss = loss_of(learning, model, given)
    assert loss.shape == ()
    assert loss.isfinite()
    loss.backward()
    for name, parameter in model.named_parameters():
        if objective == "mcem" and is_guides(name):
            assert parameter.grad is None
            continue
        if SETTINGS[setting].get("guide", "st-r").startswith("mf") and name == "z_q_0":
            continue
        assert parameter.grad.isfinite().all(), name
        assert SETTINGS[setting].get("cell") == "relu" or "flows" in name or parameter.grad.abs().max() > 0, name
    if learning.has_bound:
        bound = learning.bound(model.model, model.guide, **given)
        assert bound.shape == (M,)


def test_the_two_groups_are_told_apart():
    model, given = case("missing, inputs")
    program = as_program(model)
    named = program.named_parameters()
    found = model_parameters(program, named, (), given)
    assert found == {n for n, _ in model.named_parameters() if not is_guides(n)}


@pytest.mark.parametrize("objective", ["sgvb", "sgvb B", "iwae", "renyi", "vimco"])
def test_a_bound_of_a_batch_is_that_of_its_sequences(objective, monkeypatch):
    """Under common noise: a change of one sequence changes no other's bound."""
    model, given = case("lstm, inputs")
    changed = {name: tensor.clone() for name, tensor in given.items()}
    changed["x"][2], changed["inputs"][2] = torch.randn(T, D), torch.randn(T, U)
    bounds = []
    for one in (given, changed):
        torch.manual_seed(3)
        bounds.append(LEARNING[objective]().bound(model.model, model.guide, **one))
    same = bounds[0] == bounds[1]
    assert same.tolist() == [True, True, False, True]


def test_estimator_b_is_analytic_without_flows_and_says_where_it_is_not():
    model, given = dmm(), data()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pv.SGVB(1, "B").differentiable_loss(model.model, model.guide, **given)
        pv.SGVB(1, "B").differentiable_loss(model.model, model.guide, given["x"][:, :1])  # one step
    flowing = dmm(num_flows=1)
    with pytest.warns(UserWarning, match=r"no analytic KL at sites \['z'\]"):
        pv.SGVB(1, "B").differentiable_loss(flowing.model, flowing.guide, **given)


def test_estimators_a_and_b_have_one_mean():
    model, given = dmm(guide="st-lr"), data()
    a, b = (
        torch.stack([pv.SGVB(200, kind).bound(model.model, model.guide, **given) for _ in range(30)]) for kind in "AB"
    )
    assert_mean_close(a - b, 0.0, min_effect=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("num_flows", [0, 2])
def test_dregs_gradient_is_iwaes_in_mean(num_flows):
    """Where a flow keeps its inverse for one of them only."""
    model, given = dmm(guide="st-lr", num_flows=num_flows), data()
    found = []
    for _ in range(60):
        slopes = []
        for objective in (pv.DReG(4), pv.IWAE(4)):
            loss = objective.differentiable_loss(model.model, model.guide, **given)
            slopes.append(torch.autograd.grad(loss, [model.combiner.moments.bias, model.z_q_0]))
        found.append(torch.cat([a - b for a, b in zip(*slopes, strict=True)]))
    assert_mean_close(torch.stack(found), 0.0, min_effect=4.0)


def test_dreams_are_zero_in_the_padding():
    model, given = case("missing, inputs")
    dreamt = dream(model.model, (), given)
    valid = steps_within(LENGTHS, T)
    assert dreamt.kwargs["x"].shape == (M, T, D)
    assert (dreamt.kwargs["x"][~valid] == 0).all()
    assert (dreamt.latents["z"][0][~valid] == 0).all()
    assert (dreamt.latents["z"][0][valid] != 0).all()
    assert dreamt.kwargs["lengths"] is given["lengths"]


# Whole runs -----------------------------------------------------------------------------------------------------------

SMALL = {"num_samples": 200, "batch_size": 10, "optimizer": "adam", "learning_rate": 0.01, "progress": False}


def many(setting="guide st-l", num=40):
    torch.manual_seed(8)
    return case(setting, num, torch.randint(1, T + 1, (num,)))


@pytest.mark.parametrize(
    ("setting", "objective"),
    [*(("missing, inputs", name) for name in LEARNING), ("guide st-lr, flows", "dreg")],
)
def test_a_recorded_step_gives_the_bits_of_the_program(setting, objective):
    given = many(setting, 8)[1]
    runs = [
        trail(lambda: many(setting, 8)[0], given, LEARNING[objective](), kind)
        for kind in (WatchedCompiled, WatchedEager)
    ]
    assert runs[0].step.path == "captured"
    assert runs[0].losses == runs[1].losses
    for a, b in zip(runs[0].seen, runs[1].seen, strict=True):
        assert_same_step(a, b)
    assert_same(runs[0].parameters, runs[1].parameters)


@pytest.mark.slow
def test_a_compiled_step_gives_the_numbers_of_the_program():
    given = many("lstm, inputs", 8)[1]
    ours = trail(lambda: many("lstm, inputs", 8)[0], given, pv.SGVB(2, "B"), WatchedCompiled, 4, compile_after=2)
    theirs = trail(lambda: many("lstm, inputs", 8)[0], given, pv.SGVB(2, "B"), WatchedEager, 4)
    assert ours.step.path == "compiled"
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-10)


@pytest.mark.parametrize("objective", ["sgvb B", "wake-sleep", "mcem"])
def test_fit_learns_on_the_recorded_path_without_a_warning(objective, monkeypatch):
    monkeypatch.setattr(compiled, "CAPTURE_AFTER", 3)
    monkeypatch.setattr(compiled, "COMPILE_AFTER", NEVER)
    seen = []
    original = compiled.CompiledStep._by_graph_of
    monkeypatch.setattr(
        compiled.CompiledStep, "_by_graph_of", lambda self, *args: seen.append(1) or original(self, *args)
    )
    model, given = many()
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = pv.fit(model, given, objective=LEARNING[objective](), seed=1, **SMALL)
    assert len(seen) >= 10
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    expected = {n for n, _ in model.named_parameters() if objective != "mcem" or not is_guides(n)}
    assert moved == expected
    assert objective == "mcem" or run.history[-1]["train_bound_per_step"] > -10


def test_fit_raises_the_bound():
    model, given = many(num=60)
    given["x"] = torch.where(steps_within(given["lengths"], T)[..., None], 1.0, 0.0).expand(60, T, D).contiguous()
    before = pv.evaluate_bound(model, given).per_step
    run = pv.fit(model, given, objective=pv.SGVB(1, "B"), **(SMALL | {"num_samples": 1200, "learning_rate": 0.05}))
    assert run.history[-1]["train_bound_per_step"] > -0.5 > before


def test_a_run_is_loaded_and_goes_on_bit_for_bit(tmp_path):
    given = many("guide st-lr, flows")[1]
    options = SMALL | {"objective": pv.IWAE(2), "seed": 3}
    straight = pv.fit(many("guide st-lr, flows")[0], given, run_dir=tmp_path / "straight", **options)
    half = options | {"num_samples": 100}
    pv.fit(many("guide st-lr, flows")[0], given, run_dir=tmp_path / "parts", **half)
    pv.fit(many("guide st-lr, flows")[0], given, run_dir=tmp_path / "parts", resume=True, **options)
    loaded = [pv.load_run(tmp_path / name).program for name in ("straight", "parts")]
    assert_same(loaded[0].state_dict(), loaded[1].state_dict())
    assert_same(loaded[0].state_dict(), straight.program.state_dict())
    assert loaded[0].config == straight.program.config
    rows_of = [without_seconds(pv.load_run(tmp_path / name).history) for name in ("straight", "parts")]
    assert rows_of[0][-1] == rows_of[1][-1]


def test_a_trained_model_can_be_copied():
    model, given = many("guide st-lr, flows")
    pv.fit(model, given, objective=pv.SGVB(), **(SMALL | {"num_samples": 20}))
    other = copy.deepcopy(model)
    assert_same(other.state_dict(), model.state_dict())
    with torch.no_grad():
        other.combiner.moments.bias.add_(1.0)
    torch.manual_seed(1)
    a = model.encode(**given).rsample()
    torch.manual_seed(1)
    assert (other.encode(**given).rsample() - a).abs().max() > 0.1
    pv.fit(other, given, objective=pv.SGVB(), **(SMALL | {"num_samples": 20}))


def near_its_prior(model):
    """Observations that tell little of z, and a guide that is wide: weights that vary little."""
    with torch.no_grad():
        for part in (model.emission, model.transition.gate, model.transition.proposed, model.combiner.moments):
            for parameter in part.parameters():
                parameter.mul_(0.2)
        model.combiner.moments.bias[J:] = 0.6


def test_evaluation_of_a_ragged_batch_is_that_of_each_sequence():
    """By importance sampling with so many particles that both are exact to a hundredth."""
    model, given = case("missing, inputs")
    near_its_prior(model)
    whole = pv.log_marginal(model, given, num_particles=2000, seed=1)
    assert whole.num_steps.tolist() == LENGTHS.tolist()
    for m, length in enumerate(LENGTHS.tolist()):
        alone = {n: v[m : m + 1, :length] for n, v in given.items() if n != "lengths"}
        one = pv.log_marginal(model, alone, num_particles=2000, seed=2)
        assert whole.values[m].item() == pytest.approx(one.mean, abs=0.1)


def test_annealed_importance_sampling_agrees():
    model, given = dmm(emission="gaussian"), data("gaussian")
    near_its_prior(model)
    importance = pv.log_marginal(model, given, num_particles=2000, seed=1)
    annealed = pv.log_marginal(model, given, method="ais", num_particles=16, num_steps=30, seed=1)
    close(annealed.values, importance.values, 0.4)
    alone = pv.log_marginal(model, rows(given, slice(1, 2)), method="ais", num_particles=16, num_steps=30, seed=1)
    assert alone.mean == pytest.approx(importance.values[1].item(), abs=0.3)


# Models of a user -----------------------------------------------------------------------------------------------------


class Counts(StateSpaceModel):
    """A positive level, seen through a Gamma law: zeros in the padding lie in neither support."""

    def __init__(self):
        super().__init__()
        self.drift, self.shape = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(2.0))
        self.slope = nn.Parameter(torch.tensor(0.3))
        self.emission = self._emit

    def _emit(self, z):
        return dist.Gamma(self.shape, self.shape / z).to_event(1)

    def prior(self, num_steps, lengths=None, inputs=None):
        start = dist.LogNormal(torch.zeros(1), 0.5).to_event(1)
        return MarkovSequence(
            start, lambda z: dist.LogNormal(z.log() + self.drift, 0.3).to_event(1), num_steps, None, lengths
        )

    def encode(self, x, lengths=None, inputs=None, mask=None):
        start = dist.LogNormal(self.slope * x[:, 0].log(), 0.4).to_event(1)

        def following(z, x):
            return dist.LogNormal(0.5 * z.log() + self.slope * (x + 1e-3).log(), 0.4).to_event(1)

        return MarkovSequence(start, following, x.shape[1], x, lengths)


def test_a_model_of_positive_numbers_with_padding():
    model, x = Counts(), torch.rand(M, T, 1) + 0.5
    x = torch.where(steps_within(LENGTHS, T)[..., None], x, 0.0)
    loss = pv.SGVB(3).differentiable_loss(model.model, model.guide, x, LENGTHS)
    slopes = torch.autograd.grad(loss, list(model.parameters()))
    assert loss.isfinite()
    assert all(slope.isfinite() and slope != 0 for slope in slopes)
    weights = log_weights(model.model, model.guide, (x, LENGTHS), num_particles=2)
    z = weights.latents["z"]
    alone = log_weights(model.model, model.guide, (x[1:2, :1],), num_particles=2, latents={"z": z[:, 1:2, :1]})
    close(weights.log_w[:, 1], alone.log_w[:, 0])
