"""IWAE, Renyi, DReG, VIMCO: exact where they must be, unbiased where they say so, and each datum by itself.

Tests of all per-datum objectives, the wake-sleep ones included, are here; what is theirs alone is in test_wake_sleep.
"""

import itertools
import json
import math
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import nn

import pyro_vae as pv
from pyro_vae.numerics import log_mean_exp
from pyro_vae.objectives import OBJECTIVES, importance
from pyro_vae.objectives.base import value_with_gradient_of
from pyro_vae.programs import log_weights
from tests import oracles
from tests.statistics import assert_mean_close

PLAIN = {"param": oracles.with_params, "module": oracles.with_modules, "loop": oracles.without_broadcasting}
INF = math.inf

PATHWISE = {
    "iwae": pv.IWAE,
    "renyi 0.5": lambda k: pv.Renyi(0.5, k),
    "renyi 0": lambda k: pv.Renyi(0.0, k),
    "renyi -1": lambda k: pv.Renyi(-1.0, k),
    "vr-max": lambda k: pv.Renyi(-INF, k),
    "dreg": pv.DReG,
    "stl": lambda k: pv.DReG(k, "stl"),
}
SCORED = {  # draws held fixed: latents may be discrete
    "vimco": pv.VIMCO,
    "rws 1": pv.ReweightedWakeSleep,
    "rws 0.5": lambda k: pv.ReweightedWakeSleep(k, 0.5),
    "rws 0": lambda k: pv.ReweightedWakeSleep(k, 0.0),
    "wake-sleep": lambda k: pv.WakeSleep(),
}
PER_DATUM = PATHWISE | SCORED


def program(form: str, shift: float = 0.0, widening: float = 1.0):
    """The example model with its exact posterior (or a wrong one) as guide, in four forms."""
    if form == "nn.Module":
        return pv.LinearGaussian(*oracles.example(), guide_shift=shift, guide_widening=widening)
    return pv.Program(*PLAIN[form](shift, widening), vectorize=form != "loop")


def counts(name):
    return [k for k in (1, 2, 7) if k > 1 or name not in ("vimco", "rws 1", "rws 0.5")]


def close(left, right, atol=1e-10):
    torch.testing.assert_close(torch.as_tensor(left), torch.as_tensor(right), rtol=0, atol=atol)


def value_and_gradient(objective, p, x, parameters, seed=1):
    objective.loss(p.model, p.guide, x)  # plates are counted, and parameters made, before the seed
    pyro.set_rng_seed(seed)
    loss = objective.differentiable_loss(p.model, p.guide, x)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    flat = [torch.zeros_like(q) if g is None else g for q, g in zip(parameters, grads, strict=True)]
    return loss.detach(), torch.cat([g.flatten() for g in flat])


# Zero variance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PER_DATUM)
@pytest.mark.parametrize("form", ["nn.Module", *PLAIN])
def test_the_exact_posterior_gives_the_evidence_without_variance(form, name):
    x, p = oracles.example_data(), program(form)
    truth = oracles.exact_log_marginal(x)
    for num_particles in counts(name):
        objective = PER_DATUM[name](num_particles)
        close(objective.bound(p.model, p.guide, x), truth)
        close(objective.loss(p.model, p.guide, x), -truth.sum())
        close(objective.differentiable_loss(p.model, p.guide, x).detach(), -truth.sum())


@pytest.mark.parametrize("name", PER_DATUM)
@pytest.mark.parametrize("form", ["nn.Module", *PLAIN])
@pytest.mark.parametrize("wrong", [{"shift": 0.5}, {"widening": 1.5}])
def test_a_wrong_guide_does_not(form, name, wrong):
    x, p = oracles.example_data(), program(form, **wrong)
    truth = oracles.exact_log_marginal(x)
    for num_particles in counts(name):
        objective = PER_DATUM[name](num_particles)
        assert ((objective.bound(p.model, p.guide, x) - truth).abs() > 1e-6).all()
        assert abs(objective.loss(p.model, p.guide, x) + truth.sum()) > 1e-6


@pytest.mark.parametrize("name", PER_DATUM)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_is_minus_the_sum_of_the_bounds_to_the_last_digit(name, dtype):
    torch.set_default_dtype(dtype)
    x, p = 30 * torch.randn(500, 3), program("nn.Module", shift=3.0)
    objective, found = PER_DATUM[name](2), []
    for value in (objective.bound, objective.differentiable_loss):
        pyro.set_rng_seed(1)
        found.append(value(p.model, p.guide, x).detach())
    torch.testing.assert_close(-found[0].sum(), found[1], rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_a_large_surrogate_costs_the_value_no_digits():
    value, surrogate = torch.tensor(1.2345, dtype=torch.float32), torch.tensor(1e7, dtype=torch.float32)
    found = value_with_gradient_of(value, 3 * surrogate.requires_grad_())
    assert found.item() == value.item()
    assert torch.autograd.grad(found, surrogate)[0] == 3


# The same number by two ways ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_particles", [1, 5])
def test_renyi_at_zero_is_iwae_in_value_and_gradient(num_particles):
    toy, x = oracles.Amortized(), oracles.example_data()
    parameters = [*toy.theta, *toy.phi]
    left, right = (
        value_and_gradient(o, toy, x, parameters) for o in (pv.Renyi(0.0, num_particles), pv.IWAE(num_particles))
    )
    close(left[0], right[0], atol=1e-12)
    close(left[1], right[1], atol=1e-12)
    other = value_and_gradient(pv.Renyi(0.5, 5), toy, x, parameters)
    assert abs(other[0] - value_and_gradient(pv.IWAE(5), toy, x, parameters)[0]) > 1e-3


@pytest.mark.parametrize("objective", [pv.IWAE(1), pv.Renyi(0.5, 1), pv.Renyi(-INF, 1), pv.Renyi(-3.0, 1)])
def test_one_particle_is_sgvb(objective):
    toy, x = oracles.Amortized(), oracles.example_data()
    parameters = [*toy.theta, *toy.phi]
    left, right = (value_and_gradient(o, toy, x, parameters) for o in (objective, pv.SGVB(1)))
    close(left[0], right[0], atol=1e-12)
    close(left[1], right[1], atol=1e-12)


def test_renyi_towards_one_is_sgvb():
    toy, x = oracles.Amortized(), oracles.example_data()
    parameters = [*toy.theta, *toy.phi]
    left, right = (value_and_gradient(o, toy, x, parameters) for o in (pv.Renyi(1 - 1e-6, 5), pv.SGVB(5)))
    close(left[0], right[0], atol=1e-3)
    close(left[1], right[1], atol=1e-2)


@pytest.mark.parametrize("name", ["dreg", "stl", "vimco", "rws 1", "rws 0.5", "rws 0"])
def test_value_and_theta_gradient_are_iwaes_for_the_same_draws(name):
    toy, x = oracles.Amortized(), oracles.example_data()
    left, right = (value_and_gradient(o, toy, x, toy.theta) for o in (PER_DATUM[name](5), pv.IWAE(5)))
    close(left[0], right[0], atol=1e-12)
    close(left[1], right[1], atol=1e-10)


@pytest.mark.parametrize("name", PER_DATUM)
def test_a_batch_is_its_data_one_by_one(name, monkeypatch):
    """Weights are a datum's own: for given draws, the gradient of a batch is the sum of the gradients of its data."""
    toy, x = oracles.Amortized(), oracles.example_data(3)
    parameters, noise = [*toy.theta, *toy.phi], torch.randn(4, 3, 2)
    rows = [slice(0, 3)]

    def rsample(self, shape=()):  # noise of the datum, not of its place in the batch
        full = self._extended_shape(torch.Size(shape))
        return self.loc + self.scale * noise[: full[0] if len(full) == 3 else 1, rows[-1], : full[-1]].reshape(full)

    if name in ("rws 0.5", "rws 0", "wake-sleep"):
        monkeypatch.setattr(pv.objectives.wake_sleep, "_sleep", lambda *a: torch.zeros(()))
    monkeypatch.setattr(torch.distributions.Normal, "rsample", rsample)
    monkeypatch.setattr(torch.distributions.Normal, "sample", lambda self, shape=(): rsample(self, shape).detach())
    whole = value_and_gradient(PER_DATUM[name](4), toy, x, parameters)
    parts = []
    for m in range(3):
        rows.append(slice(m, m + 1))
        parts.append(value_and_gradient(PER_DATUM[name](4), toy, x[m : m + 1], parameters))
    close(whole[0], sum(part[0] for part in parts), atol=1e-12)
    close(whole[1], sum(part[1] for part in parts), atol=1e-10)


# Order ----------------------------------------------------------------------------------------------------------------


def bound_of(matrix, objective, monkeypatch):
    weights = SimpleNamespace(log_w=matrix, global_sites=[], scale=1.0)
    monkeypatch.setattr(importance, "log_weights", lambda *a, **k: weights)
    return objective.bound(None, None)


def test_the_bound_of_given_weights_by_hand(monkeypatch):
    matrix = 2 * torch.randn(6, 3)
    w = matrix.exp()
    close(bound_of(matrix, pv.IWAE(6), monkeypatch), w.mean(0).log(), atol=1e-12)
    close(bound_of(matrix, pv.VIMCO(6), monkeypatch), w.mean(0).log(), atol=1e-12)
    close(bound_of(matrix, pv.Renyi(0.5, 6), monkeypatch), w.sqrt().mean(0).log() * 2, atol=1e-12)
    close(bound_of(matrix, pv.Renyi(-1.0, 6), monkeypatch), w.square().mean(0).log() / 2, atol=1e-12)
    close(bound_of(matrix, pv.Renyi(-INF, 6), monkeypatch), matrix.amax(0), atol=0)
    for shift in (-1e4, 1e4):
        close(bound_of(matrix + shift, pv.Renyi(0.5, 6), monkeypatch) - shift, w.sqrt().mean(0).log() * 2, atol=1e-9)


def test_more_particles_never_lower_the_bound_on_nested_draws(monkeypatch):
    """Jensen: for any matrix, the mean over its blocks of 1, of 5 and the whole of 50 ascend."""
    matrix = 2 * torch.randn(50, 20)
    found = [
        torch.stack([bound_of(block, pv.IWAE(k), monkeypatch) for block in matrix.split(k)]).mean(0) for k in (1, 5, 50)
    ]
    close(found[0], matrix.mean(0), atol=1e-12)
    assert (found[0] < found[1]).all()
    assert (found[1] < found[2]).all()


def test_the_bound_falls_with_alpha(monkeypatch):
    matrix = 2 * torch.randn(7, 20)
    values = [bound_of(matrix, pv.Renyi(a, 7), monkeypatch) for a in (0.99, 0.5, 0.0, -1.0, -10.0, -INF)]
    assert all((left < right).all() for left, right in itertools.pairwise(values))


def test_iwae_stays_below_the_evidence_in_mean_and_closes_on_it():
    x, p = oracles.example_data(1), program("nn.Module", shift=0.6, widening=1.3)
    truth, gaps = oracles.exact_log_marginal(x), []
    for K in (1, 5, 50):
        samples = pv.IWAE(K).bound(p.model, p.guide, x.repeat(4000, 1)).detach()
        gaps.append((truth - samples.mean()).item())
        assert gaps[-1] > 5 * samples.std().item() / 4000**0.5
        assert_mean_close((samples - truth).exp(), 1.0, min_effect=0.2)  # w is unbiased
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]
    samples = pv.IWAE(5).bound(p.model, p.guide, x.repeat(4000, 1))
    with pytest.raises(AssertionError, match="mean"):  # the bug: log (K - 1), K = 5
        assert_mean_close((samples - truth).exp() * 5 / 4, 1.0, min_effect=0.2)


# Expectations: two particles, by quadrature ---------------------------------------------------------------------------

M = 40_000


def frozen(densities):
    return oracles._ScalarDensities([p.detach() for p in densities.parameters], densities.x)


def renyi(alpha):
    def surrogate(d, noise):
        z = d.draw(noise)
        log_w = d.log_joint(z) - d.log_q(z)
        return (((1 - alpha) * log_w).logsumexp(0) - math.log(2)) / (1 - alpha)

    return surrogate


def stl(d, noise):
    z = d.draw(noise)
    log_w = d.log_joint(z) - frozen(d).log_q(z)
    return (log_w.detach().softmax(0) * log_w).sum(0)


EXPECTATIONS = {
    "iwae": (pv.IWAE(2), renyi(0)),
    "dreg": (pv.DReG(2), renyi(0)),
    "vimco": (pv.VIMCO(2), renyi(0)),
    "renyi 0.5": (pv.Renyi(0.5, 2), renyi(0.5)),
    "renyi -1": (pv.Renyi(-1.0, 2), renyi(-1)),
}


def bounds(objective, toy):
    return objective.bound(toy.model, toy.guide, *toy.data).detach()


@pytest.mark.parametrize("name", EXPECTATIONS)
def test_value_and_gradient_in_mean(name):
    objective, surrogate = EXPECTATIONS[name]
    toy = oracles.ScalarGaussian(M)
    value, gradient = toy.expectation(surrogate)
    assert_mean_close(bounds(objective, toy), value, min_effect=0.03)
    assert_mean_close(oracles.gradients_per_datum(objective, toy), gradient, min_effect=0.1)


def test_stl_is_biased_just_as_derived():
    toy, objective = oracles.ScalarGaussian(M), pv.DReG(2, "stl")
    samples = oracles.gradients_per_datum(objective, toy)
    assert_mean_close(samples, toy.expectation(stl)[1], min_effect=0.05)
    with pytest.raises(AssertionError, match="mean"):  # w~ in the place of w~^2: a bug in DReG
        assert_mean_close(samples, toy.expectation(renyi(0))[1], min_effect=0.05)


def test_the_oracle_by_other_means():
    """Quadrature of one particle's bound is the closed-form ELBO; K = 2 lies between it and the evidence."""
    toy = oracles.ScalarGaussian(1)
    value, _ = toy.expectation(lambda d, noise: (d.log_joint(d.draw(noise)) - d.log_q(d.draw(noise)))[0])
    a, b, log_s = map(torch.tensor, toy.theta_values)
    gain, offset, log_scale = map(torch.tensor, toy.phi_values)
    joint = oracles.linear_gaussian(a.reshape(1, 1), b.reshape(1), log_s.exp())
    q = oracles.Gaussian((gain * toy.x + offset).reshape(1), (2 * log_scale).exp().reshape(1, 1))
    close(value, oracles.elbo(joint, q, torch.tensor([toy.x])))
    close(toy.log_marginal(), joint.last(1).log_prob(torch.tensor([toy.x])))
    assert value + 0.05 < toy.expectation(renyi(0))[0] < toy.log_marginal() - 0.02
    close(toy.expectation(renyi(0), 60)[1], toy.expectation(renyi(0), 120)[1], atol=1e-6)


class OneTooFew(pv.IWAE):
    def _reduce(self, log_w):
        return log_w.logsumexp(0) - math.log(len(log_w) - 1)


class Joint(pv.IWAE):
    """Weighs whole minibatches."""

    def _reduce(self, log_w):
        return (log_mean_exp(log_w.sum(1)) / log_w.shape[1]).expand(log_w.shape[1])


class SurrogateAsBound(pv.IWAE):
    def _reduce(self, log_w):
        return (log_w.softmax(0) * log_w).sum(0)


def joint_softmax(self, dim):
    return torch.softmax(self, dim) if self.ndim < 2 else torch.softmax(self.sum(1, keepdim=True), 0).expand_as(self)


@pytest.mark.parametrize(("bug", "of_value"), [(OneTooFew, True), (Joint, False), (SurrogateAsBound, True)])
def test_a_planted_bug_in_iwae_is_rejected(bug, of_value):
    toy = oracles.ScalarGaussian(M)
    value, gradient = toy.expectation(renyi(0))
    if of_value:
        with pytest.raises(AssertionError, match="mean"):
            assert_mean_close(bounds(bug(2), toy), value, min_effect=0.03)
    if bug is not OneTooFew:  # a constant has no gradient
        with pytest.raises(AssertionError, match="mean"):
            assert_mean_close(oracles.gradients_per_datum(bug(2), toy), gradient, min_effect=0.1)


def test_dreg_with_joint_weights_is_rejected(monkeypatch):
    toy = oracles.ScalarGaussian(M)
    monkeypatch.setattr(torch.Tensor, "softmax", joint_softmax)
    with pytest.raises(AssertionError, match="mean"):
        assert_mean_close(oracles.gradients_per_datum(pv.DReG(2), toy), toy.expectation(renyi(0))[1], min_effect=0.1)


# DReG at the exact posterior ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["dreg", "stl"])
@pytest.mark.parametrize("num_particles", [1, 5])
def test_the_phi_gradient_of_dreg_vanishes_at_the_exact_posterior(gradient, num_particles):
    toy, (a, b, log_s) = oracles.ScalarGaussian(50), oracles.ScalarGaussian.theta_values
    precision = 1 + a**2 * math.exp(-2 * log_s)
    gain = a * math.exp(-2 * log_s) / precision
    with torch.no_grad():
        for parameter, exact in zip(toy.phi, (gain, -gain * b, -0.5 * math.log(precision)), strict=True):
            parameter.fill_(exact)
    close(bounds(pv.IWAE(3), toy), torch.full((50,), toy.log_marginal()))
    assert oracles.gradients_per_datum(pv.DReG(num_particles, gradient), toy)[:, 3:].abs().max() < 1e-12
    assert oracles.gradients_per_datum(pv.IWAE(num_particles), toy)[:, 3:].abs().max() > 0.1
    assert oracles.gradients_per_datum(pv.DReG(num_particles, gradient), toy)[:, :3].abs().max() > 0.1


# Several layers and several plates ------------------------------------------------------------------------------------


class Layers:
    """Two layers whose guide has parameters (M,) of its own: either factorises either way."""

    def __init__(self, num_data, bottom_up):
        self.toy = oracles.TwoLayers(bottom_up)
        self.theta = [torch.full((num_data,), 0.9).requires_grad_()]
        self.phi = [torch.full((num_data,), v).requires_grad_() for v in (0.6, 0.4, 0.2)]
        self.data = (torch.full((num_data,), 0.7),)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(()), 1.0))
            z1 = pyro.sample("z1", dist.Normal(self.theta[0] * z2, 0.7))
            pyro.sample("x", dist.Normal(z1, 0.5), obs=x)

    def guide(self, x):
        u, v, w = self.phi
        with pyro.plate("data", len(x)):
            if self.toy.bottom_up:
                z1 = pyro.sample("z1", dist.Normal(u * x, 0.6))
                pyro.sample("z2", dist.Normal(v * z1 + w, 0.8))
            else:
                z2 = pyro.sample("z2", dist.Normal(v * x, 0.9))
                pyro.sample("z1", dist.Normal(u * x + w * z2, 0.5))


@pytest.mark.parametrize("bottom_up", [True, False])
@pytest.mark.parametrize("objective", [pv.DReG(3), pv.VIMCO(3)])
def test_two_layers_have_iwaes_gradient_in_mean(bottom_up, objective):
    """A draw of the lower layer moves with the upper one's: path derivatives must go through both, once."""
    toy = Layers(M, bottom_up)
    difference = oracles.gradients_per_datum(objective, toy) - oracles.gradients_per_datum(pv.IWAE(3), toy)
    assert_mean_close(difference, torch.zeros(4), min_effect=0.15)


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("objective", [pv.DReG(2), pv.DReG(2, "stl")])
def test_dreg_finds_the_data_plate_by_name(size, objective):
    """Another plate stands left of the data's, of the same size or not: the same program with events in its place."""
    phi, x = torch.linspace(-0.5, 0.5, 4).requires_grad_(), torch.randn(4)

    def plates(x, events):
        def model(x):
            with pyro.plate("data", len(x), dim=-1):
                if events:
                    z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1)).sum(-1)
                else:
                    with pyro.plate("parts", size, dim=-2):
                        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
                    z = z.sum(-2, keepdim=z.ndim > 2)
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", len(x), dim=-1):
                if events:
                    pyro.sample("z", dist.Normal((phi * x)[:, None], torch.ones(size)).to_event(1))
                else:
                    with pyro.plate("parts", size, dim=-2):
                        pyro.sample("z", dist.Normal(phi * x, 1.0))

        return model, guide

    draws = torch.randn(2, 4, size)

    def fixed(events):
        def rsample(self, shape=()):
            full = self._extended_shape(torch.Size(shape))
            if full.numel() != draws.numel():  # the run that counts the plates
                return self.loc.expand(full)
            return (self.loc + self.scale * (draws if events else draws.mT)).reshape(full)

        return rsample

    found = []
    for events in (True, False):
        model, guide = plates(x, events)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributions.Normal, "rsample", fixed(events))
            loss = objective.differentiable_loss(model, guide, x)
            found.append((loss.detach(), torch.autograd.grad(loss, phi)[0]))
    close(found[0][0], found[1][0])
    close(found[0][1], found[1][1])


# What a program may do ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", ["iwae", "dreg", "vimco", "rws 1"])
def test_a_plate_that_draws_its_own_minibatch_draws_it_once(name, vectorize):
    """Draws and the densities at them must be of the same data, in every particle."""

    def model(x):
        with pyro.plate("data", len(x), subsample_size=10) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=10) as index:
            pyro.sample("z", dist.Normal(x[index] / 2, 0.5**0.5))  # the exact posterior

    x, p = 5 * torch.randn(40), pv.Program(model, guide, vectorize=vectorize)
    objective, evidence = PER_DATUM[name](3), dist.Normal(0.0, 2**0.5).log_prob(x)
    bound = objective.bound(p.model, p.guide, x)
    assert (bound[:, None] - evidence).abs().min(1).values.max() < 1e-10
    pyro.set_rng_seed(3)
    bound = objective.bound(p.model, p.guide, x)
    pyro.set_rng_seed(3)
    close(objective.differentiable_loss(p.model, p.guide, x).detach(), -4 * bound.detach().sum())


@pytest.mark.parametrize("name", ["dreg", "stl", "vimco", "rws 1"])
def test_an_automatic_guide_is_weighed_with_its_auxiliary_draw(name):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x, guide = torch.tensor([0.5, 1.5, 2.5]), AutoNormal(model)
    guide(x)
    p, parameters = SimpleNamespace(model=model, guide=guide), list(guide.parameters())
    ours = value_and_gradient(PER_DATUM[name](4), p, x, parameters)
    iwae = value_and_gradient(pv.IWAE(4), p, x, parameters)
    close(ours[0], iwae[0])
    assert ours[1].isfinite().all()
    assert (ours[1] != 0).all()


def test_dreg_of_an_automatic_guide_has_iwaes_gradient_in_mean():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x, guide = torch.full((M,), 1.5), AutoNormal(model)  # its parameters are a datum's own
    guide(x)
    p = SimpleNamespace(model=model, guide=guide, theta=[], phi=list(guide.parameters()), data=(x,))
    dreg, iwae = (oracles.gradients_per_datum(o, p) for o in (pv.DReG(2), pv.IWAE(2)))
    assert_mean_close(dreg - iwae, torch.zeros(2), min_effect=0.25)


@pytest.mark.parametrize("name", PER_DATUM)
def test_deterministic_sites_count_nowhere(name):
    def model(x):
        scale = pyro.deterministic("scale", torch.tensor(1.0))  # outside the data plate
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), scale))
            mean = pyro.deterministic("mean", 2 * z)
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.4 * x, 0.2**0.5))

    x = torch.randn(4)
    close(-PER_DATUM[name](3).loss(model, guide, x), dist.Normal(0.0, 5**0.5).log_prob(x).sum())


def test_the_baseline_of_vimco_by_hand_and_with_a_weight_of_zero():
    log_w = torch.tensor([[0.3], [-1.2], [2.0]])
    w, expected = log_w.exp().flatten(), []
    for k in range(3):
        others = torch.cat([w[:k], w[k + 1 :]])
        expected.append(((others.sum() + others.prod() ** 0.5) / 3).log())
    close(importance._leave_one_out(log_w), torch.stack(expected)[:, None], atol=1e-12)
    log_w[1] = -INF
    found = importance._leave_one_out(log_w)
    close(found[1], ((w[0] + w[2] + (w[0] * w[2]).sqrt()) / 3).log()[None], atol=1e-12)
    close(found[0], (w[2] / 3).log()[None], atol=1e-12)


# The minibatch scale --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PER_DATUM)
def test_value_and_gradient_of_a_minibatch_are_scaled_to_the_data_set(name):
    class Scaled(oracles.Amortized):
        size = 4

        def plate(self, x):
            return pyro.plate("data", self.size, subsample=torch.arange(len(x)))

        def model(self, x):
            w, b, log_s = self.theta
            with self.plate(x):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z @ w.T + b, log_s.exp()).to_event(1), obs=x)

        def guide(self, x):
            gain, offset, log_scale = self.phi
            with self.plate(x):
                pyro.sample("z", dist.Normal(x @ gain.T + offset, log_scale.exp()).to_event(1))

    toy, x = Scaled(), oracles.example_data()
    parameters, found = [*toy.theta, *toy.phi], []
    for toy.size in (4, 10):
        found.append(value_and_gradient(PER_DATUM[name](3), toy, x, parameters))
    close(found[1][0], 2.5 * found[0][0])
    close(found[1][1], 2.5 * found[0][1])
    assert (found[0][1].abs() > 1e-6).all()
    pyro.set_rng_seed(1)
    bound = PER_DATUM[name](3).bound(toy.model, toy.guide, x)
    close(-2.5 * bound.sum().detach(), found[1][0])  # the bound of a datum is not scaled


# In Pyro's loop and in fit --------------------------------------------------------------------------------------------


class Trainable(nn.Module):
    """The example's model and an amortised guide that can reach its posterior's mean, from elsewhere."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 2), nn.Linear(2, 3)
        self.log_s, self.log_scale = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.zeros(2))

    def model(self, x):
        pyro.module("trainable", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.log_s.exp()).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("trainable", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), self.log_scale.exp()).to_event(1))

    @torch.no_grad()
    def elbo(self, x):
        joint = oracles.linear_gaussian(self.decoder.weight, self.decoder.bias, self.log_s.exp())
        q = oracles.Gaussian(self.encoder(x), torch.diag((2 * self.log_scale).exp()))
        return oracles.elbo(joint, q, x).mean().item()


def draws_of_the_example(n):
    return (
        oracles.linear_gaussian(*oracles.example()).last(3).mean
        + torch.randn(n, 3) @ torch.linalg.cholesky(oracles.linear_gaussian(*oracles.example()).last(3).cov).T
    )


@pytest.mark.parametrize("name", PER_DATUM)
def test_svi_raises_the_exact_lower_bound(name):
    program, x = Trainable(), draws_of_the_example(200)
    before = program.elbo(x)
    start = {n: p.detach().clone() for n, p in program.named_parameters()}
    svi = SVI(program.model, program.guide, Adam({"lr": 0.05}), loss=PER_DATUM[name](3))
    for _ in range(50):
        svi.step(x)
    assert program.elbo(x) > before + 0.3
    assert all(not torch.equal(p, start[n]) for n, p in program.named_parameters())


@pytest.mark.parametrize("name", PER_DATUM)
def test_fit_raises_the_bound_it_reports(name):
    program, x = Trainable(), draws_of_the_example(200)
    before = program.elbo(x)
    run = pv.fit(
        program,
        x,
        objective=PER_DATUM[name](3),
        optimizer="adam",
        learning_rate=0.03,
        batch_size=60,  # the last one is short
        epochs=20,
        evaluate_every=2000,
        progress=False,
        compile=False,
    )
    assert program.elbo(x) > before + 0.3
    assert run.history[-1]["train_bound"] > run.history[0]["train_bound"] - 0.05
    assert -6 < run.history[-1]["train_bound"] < -2


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bound", "loss", "differentiable_loss"])
@pytest.mark.parametrize("name", PER_DATUM)
def test_a_global_latent_is_refused_by_name(name, method):
    toy = oracles.SharedMean(20)
    with pytest.raises(ValueError, match=r"\['mu'\].*outside the data plate.*SGVB"):
        getattr(PER_DATUM[name](3), method)(toy.model, toy.guide, torch.randn(5))


def on_off_model(x):
    with pyro.plate("data", len(x)):
        on = pyro.sample("on", dist.Bernoulli(torch.tensor(0.3)))
        pyro.sample("x", dist.Normal(on, 1.0), obs=x)


def on_off_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("on", dist.Bernoulli(logits=x))


@pytest.mark.parametrize("name", PER_DATUM)
def test_discrete_draws_are_for_objectives_that_need_no_path_through_them(name):
    objective, x = PER_DATUM[name](3), torch.zeros(3)
    if name in SCORED:
        assert math.isfinite(objective.loss(on_off_model, on_off_guide, x))
    else:
        with pytest.raises(ValueError, match=r"site 'on'.*Bernoulli"):
            objective.loss(on_off_model, on_off_guide, x)
        with pytest.raises(ValueError, match=r"site 'on'.*Bernoulli"):
            objective.bound(on_off_model, on_off_guide, x)


@pytest.mark.parametrize("cls", [pv.IWAE, pv.DReG, pv.VIMCO, pv.ReweightedWakeSleep, lambda k: pv.Renyi(0.5, k)])
@pytest.mark.parametrize("number", [0, -1, 1.5, "3"])
def test_num_particles_out_of_range(cls, number):
    with pytest.raises(ValueError, match="num_particles"):
        cls(number)


def test_one_particle_is_too_few_for_vimco():
    with pytest.raises(ValueError, match="num_particles: VIMCO expects at least 2, got 1"):
        pv.VIMCO(1)


@pytest.mark.parametrize("alpha", [1, 1.0, 2, INF, math.nan])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match="alpha"):
        pv.Renyi(alpha)


@pytest.mark.parametrize("gradient", ["path", "DREG", None])
def test_unknown_gradient(gradient):
    with pytest.raises(ValueError, match="gradient"):
        pv.DReG(3, gradient)


# Configuration --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PER_DATUM)
def test_the_config_builds_the_objective_again(name):
    objective = PER_DATUM[name](3)
    config = json.loads(json.dumps(objective.config))
    again = type(objective)(**config)
    assert repr(again) == repr(objective)
    assert again.config == objective.config
    state = {k: v for k, v in vars(objective).items() if isinstance(v, (int, float, str, bool))}
    assert {k: vars(again)[k] for k in state} == state


def test_the_registry_names_them():
    assert OBJECTIVES["iwae"] is pv.IWAE
    assert OBJECTIVES["dreg"] is pv.DReG
    assert OBJECTIVES["renyi"] is pv.Renyi
    assert OBJECTIVES["vimco"] is pv.VIMCO
    assert OBJECTIVES["wake-sleep"] is pv.WakeSleep
    assert OBJECTIVES["reweighted-wake-sleep"] is pv.ReweightedWakeSleep
    assert repr(pv.DReG(3, "stl")) == "DReG(num_particles=3, gradient='stl')"
    assert repr(pv.WakeSleep()) == "WakeSleep()"


def test_draws_are_scored_where_they_were_drawn():
    """Given back what it drew, the bridge gives the same densities; gradients flow to what is given."""
    toy, x = oracles.Amortized(), oracles.example_data()
    weights = log_weights(toy.model, toy.guide, (x,), num_particles=3)
    z = weights.latents["z"].detach().requires_grad_()
    again = log_weights(toy.model, toy.guide, (x,), num_particles=3, latents={"z": z})
    close(again.log_w, weights.log_w, atol=0)
    close(again.log_joint - again.log_q, again.log_w, atol=1e-12)
    assert again.latents["z"] is z
    assert (torch.autograd.grad(again.log_w.sum(), z)[0] != 0).all()
