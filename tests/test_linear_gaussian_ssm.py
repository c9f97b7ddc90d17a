"""The linear-Gaussian state-space model against one dense Gaussian of all latents and observations."""

import warnings

import pytest
import torch

import pyro_vae as pv
from pyro_vae.objectives import OBJECTIVES
from tests import oracles
from tests.statistics import assert_mean_close

T, M, J, D, U = 6, 4, 2, 3, 1
A = ((0.9, 0.2), (-0.3, 0.7))
C = ((1.0, -0.5), (0.3, 0.8), (-0.7, 0.2))
Q = ((0.5, 0.2), (0.2, 0.4))
P = ((1.5, -0.3), (-0.3, 0.8))
NOISE, LOC, DRIFT, BIAS, B = (0.3, 0.5, 0.7), (1.0, -1.0), (0.1, 0.2), (0.3, 0.0, -0.3), ((0.8,), (-0.5,))
LENGTHS = (6, 1, 3, 5)


def close(left, right, atol=1e-10):
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


def model_of(**changes):
    options = {
        "process_covariance": Q,
        "noise_scale": NOISE,
        "initial_loc": LOC,
        "initial_covariance": P,
        "transition_bias": DRIFT,
        "emission_bias": BIAS,
        "input_weight": B,
    }
    return pv.LinearGaussianSSM(A, C, **(options | changes))


def plain(**changes):
    return model_of(input_weight=None, **changes)


def data(ragged=True, masked=True, inputs=True):
    """Arguments by name of a minibatch, of what a program reads."""
    given = {"x": torch.randn(M, T, D)}
    if ragged:
        given["lengths"] = torch.tensor(LENGTHS)
    if inputs:
        given["inputs"] = torch.randn(M, T, U)
    if masked:
        given["mask"] = torch.rand(M, T, D) < 0.6
    return given


def dense(inputs=None):
    """The joint of a sequence's latents and observations."""
    drift = torch.tensor(DRIFT).expand(T, J) if inputs is None else torch.tensor(DRIFT) + inputs @ torch.tensor(B).T
    first = oracles.Gaussian(torch.tensor(LOC), torch.tensor(P))
    matrices = (torch.tensor(value) for value in (C, BIAS, NOISE))
    return oracles.linear_dynamics(torch.tensor(A), drift, torch.tensor(Q), first, *matrices)


def observed_of(given, row):
    steps = torch.arange(T)[:, None] < given.get("lengths", torch.full((M,), T))[row]
    seen = given.get("mask", torch.ones(M, T, D, dtype=torch.bool))
    return (steps & seen[row]).flatten()


def conditioned(given, row, until=T):
    """Evidence and posterior of one sequence's latents, from what is observed until a step."""
    joint = dense(given["inputs"][row] if "inputs" in given else None)
    seen = observed_of(given, row) & (torch.arange(T * D) < until * D)
    kept = torch.cat([torch.ones(T * J, dtype=torch.bool), seen])
    part = oracles.Gaussian(joint.mean[kept], joint.cov[kept][:, kept])
    x = given["x"][row].flatten()[seen]
    if not len(x):
        return torch.zeros(()), part
    return part.last(len(x)).log_prob(x), part.given_last(x)


def blocks(covariance):
    return torch.stack([covariance[t * J : (t + 1) * J, t * J : (t + 1) * J] for t in range(T)])


KINDS = [(False, False, False), (True, False, True), (False, True, False), (True, True, True)]


# Exact answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ragged", "masked", "inputs"), KINDS)
def test_evidence_filter_and_smoother_are_those_of_the_dense_joint(ragged, masked, inputs):
    model, given = model_of() if inputs else plain(), data(ragged, masked, inputs)
    evidence = torch.stack([conditioned(given, row)[0] for row in range(M)])
    close(model.log_marginal(**given), evidence)
    means, covariances = model.kalman_smoother(**given)
    for row in range(M):
        posterior = conditioned(given, row)[1]
        close(means[row], posterior.mean.reshape(T, J))
        close(covariances[row], blocks(posterior.cov))
    means, covariances = model.kalman_filter(**given)
    for row in range(M):
        for t in range(T):
            posterior = conditioned(given, row, t + 1)[1]
            close(means[row, t], posterior.mean.reshape(T, J)[t])
            close(covariances[row, t], blocks(posterior.cov)[t])


@pytest.mark.parametrize(("ragged", "masked", "inputs"), KINDS)
def test_the_guide_is_the_posterior(ragged, masked, inputs):
    model, given = model_of() if inputs else plain(), data(ragged, masked, inputs)
    weights = pv.log_weights(model.model, model.guide, (), given, num_particles=3)
    close(weights.log_w, torch.stack([conditioned(given, row)[0] for row in range(M)]).expand(3, M))
    guide = model.encode(**given)
    for row, length in enumerate(given.get("lengths", torch.full((M,), T))):
        posterior = conditioned(given, row)[1]
        n = int(length) * J
        kept = oracles.Gaussian(posterior.mean[:n], posterior.cov[:n, :n])
        close(guide.log_prob(weights.latents["z"])[1, row], kept.log_prob(weights.latents["z"][1, row].flatten()[:n]))


def test_a_single_step_and_a_diagonal_process():
    model = plain(process_covariance=None, process_scale=0.4)
    x = torch.randn(M, 1, D)
    joint = oracles.linear_gaussian(torch.tensor(C) @ torch.linalg.cholesky(torch.tensor(P)), torch.zeros(D), 0.0)
    bias, noise = torch.tensor(C) @ torch.tensor(LOC) + torch.tensor(BIAS), torch.diag(torch.tensor(NOISE) ** 2)
    evidence = oracles.Gaussian(bias, joint.cov[J:, J:] + noise)
    close(model.log_marginal(x), evidence.log_prob(x[:, 0]))
    close(pv.log_weights(model.model, model.guide, (x,)).log_w[0], evidence.log_prob(x[:, 0]))


def test_what_is_padding_or_missing_has_no_influence():
    model, given = model_of(), data()
    value = model.log_marginal(**given)
    seen = torch.stack([observed_of(given, row).reshape(T, D) for row in range(M)])
    other = given | {"x": torch.where(seen, given["x"], 1e6)}
    close(model.log_marginal(**other), value)
    close(model.kalman_smoother(**other)[0], model.kalman_smoother(**given)[0])
    z = model.encode(**given).sample()
    close(model.encode(**other).log_prob(z), model.encode(**given).log_prob(z))


@pytest.mark.parametrize("plant", ["no mask", "wrong lengths", "inputs a step late"])
def test_planted_bugs_are_seen(plant):
    model, given = model_of(), data()
    wrong = {
        "no mask": {name: value for name, value in given.items() if name != "mask"},
        "wrong lengths": given | {"lengths": given["lengths"].clamp(max=T - 1)},
        "inputs a step late": given | {"inputs": given["inputs"].roll(1, 1)},
    }[plant]
    evidence = torch.stack([conditioned(given, row)[0] for row in range(M)])
    assert (model.log_marginal(**wrong) - evidence).abs().max() > 1e-2
    assert (pv.log_weights(model.model, model.guide, (), wrong).log_w[0] - evidence).abs().max() > 1e-2


# Every objective and scorer -------------------------------------------------------------------------------------------

BOUNDS = [pv.SGVB(), pv.SGVB(3), pv.IWAE(1), pv.IWAE(4), pv.DReG(3), pv.Renyi(0.5, 3), pv.Renyi(-2.0, 1), pv.VIMCO(2)]
BOUNDS += [pv.WakeSleep(), pv.ReweightedWakeSleep(3)]


def test_every_objective_that_has_a_bound_is_here():
    assert {name for name, cls in OBJECTIVES.items() if cls.has_bound} - {"fivo"} <= {
        name for name, cls in OBJECTIVES.items() if any(type(bound) is cls for bound in BOUNDS)
    }


@pytest.mark.parametrize("objective", BOUNDS, ids=repr)
def test_bounds_are_the_evidence_at_the_exact_guide_and_below_it_at_a_wrong_one(objective):
    given = data()
    exact, wrong = model_of(), model_of(guide_shift=0.4, guide_widening=1.5)
    evidence = exact.log_marginal(**given)
    close(objective.bound(exact.model, exact.guide, **given), evidence)
    close(wrong.log_marginal(**given), evidence)
    assert (objective.bound(wrong.model, wrong.guide, **given) - evidence).abs().min() > 1e-3
    loss = objective.differentiable_loss(exact.model, exact.guide, **given)
    if not isinstance(objective, (pv.WakeSleep, pv.ReweightedWakeSleep)):
        close(loss, -evidence.sum())


def test_the_analytic_bound_has_the_evidence_for_its_mean():
    exact, wrong, given = model_of(), model_of(guide_shift=0.3), data()
    evidence = exact.log_marginal(**given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a Kullback-Leibler divergence that is not in closed form
        objective = pv.SGVB(1, estimator="B")
        terms = pv.log_weights(exact.model, exact.guide, (), given, num_particles=20_000, analytic_kl=True)
        planted = pv.log_weights(wrong.model, wrong.guide, (), given, num_particles=20_000, analytic_kl=True)
        objective.bound(exact.model, exact.guide, **given)
    samples = terms.log_likelihood["x"] - terms.analytic_kl["z"]
    assert_mean_close(samples, evidence, min_effect=0.15)
    with pytest.raises(AssertionError, match="truth"):
        assert_mean_close(planted.log_likelihood["x"] - planted.analytic_kl["z"], evidence, min_effect=0.2)


@pytest.mark.parametrize("method", ["importance", "ais"])
def test_scorers(method):
    given, exact = data(inputs=False), plain()
    options = {"importance": {"num_particles": 7}, "ais": {"num_particles": 2, "num_steps": 3, "num_pilot": 2}}[method]
    for batch_size in (M, 3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few particles
            score = pv.log_marginal(exact, given, method=method, batch_size=batch_size, **options)
        close(score.values, exact.log_marginal(**given))


def test_importance_sampling_is_unbiased_at_a_wrong_guide():
    given, wrong = data(inputs=False), plain(guide_widening=1.3, guide_shift=0.1)
    weights = pv.log_weights(wrong.model, wrong.guide, (), given, num_particles=40_000)
    ratio = (weights.log_w - wrong.log_marginal(**given)).exp()
    assert_mean_close(ratio, 1.0, min_effect=0.1)
    with pytest.raises(AssertionError, match="truth"):
        assert_mean_close(weights.log_w, wrong.log_marginal(**given), min_effect=0.1)  # the mean of the logarithm


# Gradients ------------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_dense_joint():
    given, model = data(inputs=False), plain()
    model.log_marginal(**given).sum().backward()
    weight, emission = torch.tensor(A, requires_grad=True), torch.tensor(C, requires_grad=True)
    first = oracles.Gaussian(torch.tensor(LOC), torch.tensor(P))
    drift = torch.tensor(DRIFT).expand(T, J)
    joint = oracles.linear_dynamics(
        weight, drift, torch.tensor(Q), first, emission, torch.tensor(BIAS), torch.tensor(NOISE)
    )
    total = torch.zeros(())
    for row in range(M):
        seen = observed_of(given, row)
        x = given["x"][row].flatten()[seen]
        part = oracles.Gaussian(joint.mean[T * J :][seen], joint.cov[T * J :, T * J :][seen][:, seen])
        total = total + (part.log_prob(x) if len(x) else 0.0)
    total.backward()
    close(model.dynamics.weight.grad, weight.grad)
    close(model.emission.weight.grad, emission.grad)


def test_the_bounds_gradient_is_the_evidences_for_every_draw():
    given, model = data(), model_of()
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(model.log_marginal(**given).sum(), parameters)
    found = torch.autograd.grad(-pv.SGVB().differentiable_loss(model.model, model.guide, **given), parameters)
    for name, ours, theirs in zip(names, found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9, msg=name)


def test_the_model_parts_gradient_is_the_evidences_in_expectation():
    given, model = data(), model_of()
    parameters = [model.dynamics.weight, model.emission.log_scale]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(model.log_marginal(**given).sum(), parameters)])

    def gradient(density):
        return torch.cat([g.flatten() for g in torch.autograd.grad(density, parameters)])

    found, planted = [], []
    for _ in range(60):
        weights = pv.log_weights(model.model, model.guide, (), given, num_particles=200, fixed=True)
        found.append(gradient(weights.log_joint.mean(0).sum()))
        weights = pv.log_weights(model.model, model.guide, (), given, num_particles=200)
        planted.append(gradient(weights.log_joint.mean(0).sum()))  # and through the draws
    assert_mean_close(torch.stack(found), expected, min_effect=1.0)
    with pytest.raises(AssertionError, match="truth"):
        assert_mean_close(torch.stack(planted), expected, min_effect=1.0)


# Long sequences -------------------------------------------------------------------------------------------------------


def test_long_sequences_are_accurate():
    model = plain(noise_scale=0.01)
    x = model.sample(1, 2000)
    value = model.log_marginal(x)
    assert value.isfinite().all()
    weights = pv.log_weights(model.model, model.guide, (x,))
    close(weights.log_w[0], value, atol=1e-6)
    single = plain(noise_scale=0.01).float()
    rounded = single.log_marginal(x.float())
    torch.testing.assert_close(rounded.double(), value, rtol=2e-4, atol=0)
    weights = pv.log_weights(single.model, single.guide, (x.float(),))
    torch.testing.assert_close(weights.log_w[0].double(), value, rtol=2e-3, atol=0)
    torch.testing.assert_close(
        single.kalman_smoother(x[:, :300].float())[0].double(), model.kalman_smoother(x[:, :300])[0], rtol=0, atol=1e-2
    )


# A program ------------------------------------------------------------------------------------------------------------


def test_it_learns_its_parameters_by_compiled_steps_over_ragged_sequences():
    truth = plain()
    x, lengths = truth.sample(64, 10), torch.randint(2, 11, (64,))
    given = {"x": x, "lengths": lengths, "mask": torch.rand(64, 10, D) < 0.8}
    start = plain(learned=("transition", "noise"), noise_scale=1.0)
    before = start.log_marginal(**given).mean()
    run = pv.fit(start, given, optimizer="adam", learning_rate=0.1, batch_size=16, epochs=10, progress=False)
    after = run.program.log_marginal(**given).mean()
    assert after > before + 1.0
    assert after > truth.log_marginal(**given).mean() - 0.3
    assert dict(start.named_parameters()).keys() == {
        "dynamics.weight",
        "dynamics.bias",
        "emission.log_scale",
    }
    close(start.emission.weight, torch.tensor(C))


def test_config_builds_the_same_model(tmp_path):
    model, given = model_of(learned=["noise"], guide_shift=0.1), data()
    again = pv.LinearGaussianSSM(**model.config)
    close(again.log_marginal(**given), model.log_marginal(**given))
    pv.fit(model, given, epochs=1, run_dir=tmp_path, progress=False)
    stored = pv.load_run(tmp_path).program
    close(stored.log_marginal(**given), model.log_marginal(**given))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"transition": [[1.0, 2.0]]}, "transition: expected shape"),
        ({"transition": [[float("nan")]]}, "transition: expected finite"),
        ({"emission": [[1.0]]}, r"emission: expected shape \(D, 2\), got \(1, 1\)"),
        ({"noise_scale": [0.1, -1.0, 2.0]}, "noise_scale: expected positive"),
        ({"noise_scale": [0.1, 1.0]}, r"noise_scale: expected shape \(3,\)"),
        ({"process_covariance": [[1.0, 2.0], [2.0, 1.0]]}, "process_covariance: expected a symmetric positive"),
        ({"initial_covariance": [[1.0, 0.0], [0.5, 1.0]]}, "initial_covariance: expected a symmetric positive"),
        ({"process_scale": 1.0}, "process_scale: expected None"),
        ({"initial_loc": [1.0]}, r"initial_loc: expected shape \(2,\)"),
        ({"input_weight": [1.0]}, "input_weight: expected shape"),
        ({"learned": ["noisy"]}, "learned: expected one of"),
        ({"learned": "noise"}, "learned: expected a list"),
        ({"guide_widening": 0.0}, "guide_widening: expected a positive"),
    ],
)
def test_bad_arguments_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        pv.LinearGaussianSSM(**(model_of().config | changes))


def test_bad_data_are_refused():
    with pytest.raises(ValueError, match="inputs: expected 1 values"):
        model_of().log_marginal(torch.zeros(M, T, D))
    with pytest.raises(ValueError, match=r"x: expected shape \(M, T, 3\)"):
        plain().encode(torch.zeros(M, T, 5))


def test_a_particle_filter_without_resampling_has_no_variance_at_the_exact_guide():
    given, exact, wrong = data(inputs=False), plain(), plain(guide_shift=0.3)
    never = pv.FIVO(3, threshold=0.0)
    close(never.bound(exact.model, exact.guide, **given), exact.log_marginal(**given))
    assert (never.bound(wrong.model, wrong.guide, **given) - exact.log_marginal(**given)).abs().min() > 1e-3
