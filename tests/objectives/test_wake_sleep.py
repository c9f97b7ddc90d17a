"""Wake-sleep and reweighted wake-sleep: each phase in mean, on its own parameters, with the weights of each datum.

Exactness, scale, training and refusals of all per-datum objectives are in test_importance.
"""

import math
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_vae as pv
from pyro_vae.numerics import summarize_weights
from pyro_vae.objectives import importance, wake_sleep
from pyro_vae.programs import log_weights
from tests.oracles import BeliefNetwork, ScalarGaussian, gradients_per_datum
from tests.statistics import assert_mean_close

M = 40_000
SIZE = {BeliefNetwork: (11, 8), ScalarGaussian: (3, 3)}  # of theta and phi


def close(left, right, atol=1e-10):
    torch.testing.assert_close(torch.as_tensor(left), torch.as_tensor(right), rtol=0, atol=atol)


def rejected(samples, truth, min_effect):
    with pytest.raises(AssertionError, match="mean"):
        assert_mean_close(samples, truth, min_effect=min_effect)


# Enumeration ----------------------------------------------------------------------------------------------------------


def bound(log_joint, log_q):
    return log_q.sum(0).exp() * ((log_joint - log_q).logsumexp(0) - math.log(len(log_q)))


def wake(theta=1.0, phi=1.0):
    def surrogate(log_joint, log_q):
        normalized = (log_joint - log_q).detach().softmax(0)
        return log_q.sum(0).exp().detach() * (normalized * (theta * log_joint + phi * log_q)).sum(0)

    return surrogate


@pytest.mark.parametrize("num_particles", [2, 3])
def test_vimco_in_mean_is_the_gradient_of_the_bound_by_enumeration(num_particles):
    toy, objective = BeliefNetwork(M), pv.VIMCO(num_particles)
    value, gradient = toy.expectation(bound, num_particles)
    assert_mean_close(objective.bound(toy.model, toy.guide, *toy.data), value, min_effect=0.05)
    assert_mean_close(gradients_per_datum(objective, toy), gradient, min_effect=0.05)
    assert (gradient[11:].abs() > 0.02).any()  # something to be seen


@pytest.mark.parametrize("num_particles", [2, 3])
@pytest.mark.parametrize("insomnia", [1.0, 0.3])
def test_reweighted_wake_sleep_in_mean_by_enumeration(num_particles, insomnia):
    toy = BeliefNetwork(M)
    _, gradient = toy.expectation(wake(phi=insomnia), num_particles)
    gradient = gradient + (1 - insomnia) * toy.sleep()
    samples = gradients_per_datum(pv.ReweightedWakeSleep(num_particles, insomnia), toy)
    assert_mean_close(samples, gradient, min_effect=0.05)
    rejected(-samples, -gradient * torch.cat([torch.ones(11), -torch.ones(8)]), 0.05)  # descends phi's loss


def test_wake_sleep_in_mean_by_enumeration():
    toy = BeliefNetwork(M)
    value, gradient = toy.expectation(wake(phi=0.0), 1)
    assert (toy.sleep()[:11] == 0).all()
    gradient = gradient + toy.sleep()
    samples = gradients_per_datum(pv.WakeSleep(), toy)
    assert_mean_close(samples, gradient, min_effect=0.05)
    elbo, ascent = toy.expectation(bound, 1)
    assert_mean_close(pv.WakeSleep().bound(toy.model, toy.guide, *toy.data), elbo, min_effect=0.05)
    assert value != elbo
    close(gradient[:11], ascent[:11])  # theta's is the lower bound's
    rejected(samples[:, 11:], ascent[11:], 0.05)  # phi's is not


def test_the_enumerated_bounds_ascend_to_the_evidence():
    values = [BeliefNetwork.expectation(bound, k)[0] for k in (1, 2, 3)]
    assert values[0] < values[1] < values[2] < BeliefNetwork.log_marginal()
    _, log_joint, log_q, _ = BeliefNetwork.tables()
    close(log_joint.exp().sum(), 1.0)
    close(log_q.exp().sum(1), torch.ones(8))


@pytest.mark.parametrize("insomnia", [1.0, 0.4])
def test_reweighted_wake_sleep_in_mean_by_quadrature(insomnia):
    def surrogate(d, noise):
        z = d.draw(noise).detach()
        normalized = (d.log_joint(z) - d.log_q(z)).detach().softmax(0)
        found = (normalized * (d.log_joint(z) + insomnia * d.log_q(z))).sum(0)
        a, b, log_s = d.parameters[:3]
        z, x = noise[0], (a * noise[0] + b + log_s.exp() * noise[1]).detach()  # a dream
        return found + (1 - insomnia) * d.log_q(z, x)

    toy = ScalarGaussian(M)
    samples = gradients_per_datum(pv.ReweightedWakeSleep(2, insomnia), toy)
    assert_mean_close(samples, toy.expectation(surrogate)[1], min_effect=0.15)


# Planted bugs ---------------------------------------------------------------------------------------------------------


def with_parts(change, original=importance.fixed_draws):
    """Fixed draws whose parts are changed: what the losses then make of them is the bug."""

    def fixed_draws(*args):
        w = original(*args)
        parts = {"log_w": w.log_w, "log_joint": w.log_joint, "log_q": w.log_q, "scale": w.scale}
        return SimpleNamespace(**parts | change(w))

    return fixed_draws


WEIGHTS = {
    "of the minibatch": lambda w: {"log_w": w.log_w.sum(1, keepdim=True).expand_as(w.log_w)},
    "equal": lambda w: {"log_w": torch.zeros_like(w.log_w)},
    "without q": lambda w: {"log_w": w.log_joint},
    "upside down": lambda w: {"log_w": -w.log_w},
    "squared": lambda w: {"log_w": 2 * w.log_w},
}


@pytest.mark.parametrize("bug", WEIGHTS)
@pytest.mark.parametrize("toy", [BeliefNetwork, ScalarGaussian])
def test_wrong_weights_in_reweighted_wake_sleep_are_rejected(bug, toy, monkeypatch):
    n = SIZE[toy][0]
    if toy is BeliefNetwork:
        _, truth = toy.expectation(wake(), 2)
    else:

        def surrogate(d, noise):
            z = d.draw(noise).detach()
            log_p, log_q = d.log_joint(z), d.log_q(z)
            return ((log_p - log_q).detach().softmax(0) * (log_p + log_q)).sum(0)

        _, truth = toy.expectation(surrogate)
    monkeypatch.setattr(wake_sleep, "fixed_draws", with_parts(WEIGHTS[bug]))
    samples = gradients_per_datum(pv.ReweightedWakeSleep(2), toy(M))
    rejected(samples[:, :n], truth[:n], 0.2)
    rejected(samples[:, n:], truth[n:], 0.2)


def mean_of_all(log_w):
    replaced = torch.where(torch.eye(len(log_w), dtype=torch.bool)[..., None], log_w.mean(0), log_w[None])
    return replaced.logsumexp(1) - math.log(len(log_w))


BASELINES = {
    "nothing left out": lambda log_w: log_w.logsumexp(0) - math.log(len(log_w)),
    "the mean of all, its own too": mean_of_all,
}


@pytest.mark.parametrize("bug", BASELINES)
def test_a_wrong_baseline_in_vimco_is_rejected(bug, monkeypatch):
    toy, (_, truth) = BeliefNetwork(M), BeliefNetwork.expectation(bound, 3)
    samples = gradients_per_datum(pv.VIMCO(3), toy)
    assert_mean_close(samples, truth, min_effect=0.05)
    monkeypatch.setattr(importance, "_leave_one_out", BASELINES[bug])
    rejected(gradients_per_datum(pv.VIMCO(3), toy)[:, 11:], truth[11:], 0.1)


def in_pairs(w):
    """Minibatches of two data, weighed together."""
    return {"log_w": w.log_w.unflatten(1, (-1, 2)).sum(-1), "log_q": w.log_q.unflatten(1, (-1, 2)).sum(-1)}


@pytest.mark.parametrize("change", [in_pairs, WEIGHTS["without q"], WEIGHTS["upside down"]])
def test_wrong_weights_in_vimco_are_rejected(change, monkeypatch):
    toy, (_, truth) = BeliefNetwork(M), BeliefNetwork.expectation(bound, 2)
    monkeypatch.setattr(importance, "fixed_draws", with_parts(change, importance.fixed_draws))
    rejected(gradients_per_datum(pv.VIMCO(2), toy)[:, 11:], truth[11:], 0.15)


SLEEPS = {
    "of the data": lambda model, guide, args, kwargs: log_weights(
        model, guide, args, kwargs, latents=wake_sleep.dream(model, args, kwargs).latents
    ).log_q.sum(),
    "of the guide's draws": lambda model, guide, args, kwargs: log_weights(
        model, guide, wake_sleep.dream(model, args, kwargs).args
    ).log_q.sum(),
    "of other dreams": lambda model, guide, args, kwargs: log_weights(
        model, guide, wake_sleep.dream(model, args).args, latents=wake_sleep.dream(model, args).latents
    ).log_q.sum(),
}


@pytest.mark.parametrize("bug", SLEEPS)
def test_a_wrong_sleep_phase_is_rejected(bug, monkeypatch):
    toy, truth = BeliefNetwork(M), BeliefNetwork.sleep()
    monkeypatch.setattr(wake_sleep, "_sleep", SLEEPS[bug])
    rejected(gradients_per_datum(pv.WakeSleep(), toy)[:, 11:], truth[11:], 0.05)


# Pyro's, which weighs whole minibatches -------------------------------------------------------------------------------


def test_weights_of_a_minibatch_leave_one_particle_of_ten():
    toy = ScalarGaussian(256)
    with torch.no_grad():
        log_w = torch.stack([log_weights(toy.model, toy.guide, toy.data, num_particles=10).log_w for _ in range(20)])
    each = torch.stack([summarize_weights([w]).ess.mean() for w in log_w])
    joint = torch.stack([summarize_weights([w.sum(1, keepdim=True)]).ess.mean() for w in log_w])
    assert each.mean() > 6
    assert joint.mean() < 1.5


def test_ours_is_right_where_pyros_is_wrong():
    """Two particles, 256 data: Pyro sums log weights over the minibatch, so its weights are nearly those of a coin."""

    def surrogate(d, noise):
        z = d.draw(noise).detach()
        return ((d.log_joint(z) - d.log_q(z)).detach().softmax(0) * (d.log_joint(z) + d.log_q(z))).sum(0)

    toy = ScalarGaussian(256)
    truth, theirs, ours = toy.expectation(surrogate)[1], [], []
    pyros = pyro.infer.ReweightedWakeSleep(
        num_particles=2, insomnia=1.0, model_has_params=False, vectorize_particles=True, max_plate_nesting=1
    )
    parameters = [*toy.theta, *toy.phi]
    for _ in range(40):
        ours.append(gradients_per_datum(pv.ReweightedWakeSleep(2), toy).mean(0))
        wake_theta, wake_phi = pyros._loss(toy.model, toy.guide, toy.data, {})
        gradient = torch.autograd.grad(-(wake_theta + wake_phi), parameters, allow_unused=True)
        theirs.append(torch.stack([g.mean() for g in gradient]))
    assert_mean_close(torch.stack(ours), truth, min_effect=0.15)
    rejected(torch.stack(theirs)[:, 3:], truth[3:], 0.15)


# Each phase and its own parameters ------------------------------------------------------------------------------------


def gradient(toy, loss, parameters):
    return torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)


RWS = {"wake-sleep": pv.WakeSleep(), "0": pv.ReweightedWakeSleep(4, 0.0), "0.5": pv.ReweightedWakeSleep(4, 0.5)}


@pytest.mark.parametrize("name", RWS)
def test_without_its_sleep_phase_theta_learns_the_same(name, monkeypatch):
    toy, found = BeliefNetwork(20), []
    for sleeping in (True, False):
        if not sleeping:
            monkeypatch.setattr(wake_sleep, "_sleep", lambda *a: torch.zeros(()))
        RWS[name].loss(toy.model, toy.guide, *toy.data)
        pyro.set_rng_seed(1)
        found.append(RWS[name].differentiable_loss(toy.model, toy.guide, *toy.data))
    left, right = (gradient(toy, loss, toy.theta) for loss in found)
    for one, other in zip(left, right, strict=True):
        assert (one != 0).any()
        close(one, other, atol=0)
    close(found[0].detach(), found[1].detach(), atol=0)  # nor does the dream enter the value
    phi = gradient(toy, found[1], toy.phi)
    if name == "0.5":
        assert all((g != 0).any() for g in phi)
    else:
        assert phi == (None, None)  # no gradient of the wake phase


def test_the_sleep_phase_leaves_the_model_alone():
    toy = BeliefNetwork(20)
    loss = wake_sleep._sleep(toy.model, toy.guide, toy.data, {})
    assert gradient(toy, loss, toy.theta) == (None, None, None)
    assert all((g != 0).any() for g in gradient(toy, loss, toy.phi))


def test_insomnia_mixes_the_phases_linearly():
    toy, found = BeliefNetwork(20), {}
    toy_parameters = [*toy.theta, *toy.phi]
    pv.WakeSleep().loss(toy.model, toy.guide, *toy.data)
    for insomnia in (0.0, 0.3, 1.0):
        pyro.set_rng_seed(2)
        loss = pv.ReweightedWakeSleep(4, insomnia).differentiable_loss(toy.model, toy.guide, *toy.data)
        found[insomnia] = torch.cat([g.flatten() for g in gradient(toy, loss, toy_parameters)])
    close(found[0.3], 0.3 * found[1.0] + 0.7 * found[0.0], atol=1e-12)
    assert (found[1.0] - found[0.0]).abs().max() > 0.1


def test_wake_sleep_is_reweighted_wake_sleep_of_one_particle_that_only_sleeps():
    toy, found = BeliefNetwork(20), []
    pv.WakeSleep().loss(toy.model, toy.guide, *toy.data)
    for objective in (pv.WakeSleep(), pv.ReweightedWakeSleep(1, 0.0)):
        pyro.set_rng_seed(2)
        found.append(gradients_per_datum(objective, toy))
    close(*found, atol=0)


def test_the_sleep_phase_of_the_exact_posterior_has_no_gradient_in_mean():
    """The score of p(z | x) has mean zero under p(x, z)."""
    toy, (a, b, log_s) = ScalarGaussian(M), ScalarGaussian.theta_values
    precision = 1 + a**2 * math.exp(-2 * log_s)
    gain = a * math.exp(-2 * log_s) / precision
    with torch.no_grad():
        for parameter, exact in zip(toy.phi, (gain, -gain * b, -0.5 * math.log(precision)), strict=True):
            parameter.fill_(exact)
    samples = gradients_per_datum(pv.WakeSleep(), toy)[:, 3:]
    assert_mean_close(samples, torch.zeros(3), min_effect=0.1)
    with torch.no_grad():
        toy.phi[1].add_(0.3)
    rejected(gradients_per_datum(pv.WakeSleep(), toy)[:, 3:], torch.zeros(3), 0.1)


# Arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fit", "loss"])
def test_covariates_and_keyword_arguments_reach_the_sleeping_guide(method):
    """The guide orders its arguments in another way than the model: by name, as a dict of data is given, both fit."""
    gain = torch.zeros(()).requires_grad_()

    def model(x, shift):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)

    def guide(shift, x):
        weight = pyro.param("gain", gain.detach().clone())
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(weight * (x - shift), 1.0))

    shift = torch.full((400,), 50.0)
    x, p = shift + 2**0.5 * torch.randn(400), pv.Program(model, guide)
    if method == "fit":
        options = {"optimizer": "adam", "learning_rate": 0.05, "progress": False, "compile": False}
        pv.fit(p, {"x": x, "shift": shift}, objective=pv.WakeSleep(), epochs=20, **options)
        assert p.named_parameters()["gain"].item() == pytest.approx(0.5, abs=0.1)  # E[z | x] = (x - shift) / 2
    else:
        pv.WakeSleep().loss_and_grads(p.model, p.guide, x=x, shift=shift)
        # d/dg E -1/2 (z - g (z + e))^2 at g = 0 is E z (z + e) = 1 per datum
        assert p.named_parameters()["gain"].grad.item() == pytest.approx(-400, rel=0.3)


@pytest.mark.parametrize("insomnia", [-0.1, 1.1, math.nan, math.inf])
def test_insomnia_out_of_range(insomnia):
    with pytest.raises(ValueError, match="insomnia"):
        pv.ReweightedWakeSleep(5, insomnia)


@pytest.mark.parametrize("insomnia", [1.0, 0.01])
def test_one_particle_cannot_train_the_guide_awake(insomnia):
    with pytest.raises(ValueError, match="num_particles: expected at least 2"):
        pv.ReweightedWakeSleep(1, insomnia)
    assert pv.ReweightedWakeSleep(1, 0.0).num_particles == 1


@pytest.mark.parametrize("objective", [pv.WakeSleep(), pv.ReweightedWakeSleep(3, 0.5)])
def test_a_dream_that_cannot_be_handed_over_is_refused_by_name(objective):
    def model(data):
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    def guide(data):
        with pyro.plate("data", len(data)):
            pyro.sample("z", dist.Normal(data, 1.0))

    with pytest.raises(ValueError, match=r"site 'x' has no argument of its name.*\['data'\]"):
        objective.loss(model, guide, torch.zeros(3))
    assert math.isfinite(pv.ReweightedWakeSleep(3).loss(model, guide, torch.zeros(3)))  # awake it needs no dream


def test_an_automatic_guide_cannot_sleep():
    """Its density at given latents is not known: a map of an auxiliary draw."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x, guide = torch.ones(3), AutoNormal(model)
    guide(x)
    with pytest.raises(ValueError, match=r"auxiliary sites \['z_unconstrained'\]"):
        pv.WakeSleep().loss(model, guide, x)
