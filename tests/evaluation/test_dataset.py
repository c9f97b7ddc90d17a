"""log p(X) of data that share latents, and the density their posterior predicts: exact where conjugate."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions.transforms import ReshapeTransform

import pyro_vae as pv
from pyro_vae.evaluation import ais, dataset, importance
from pyro_vae.programs import LatentSpace, LogWeights, draw_guide, log_guide
from tests import oracles
from tests.statistics import assert_mean_close

PRIOR_SCALE, NOISE = 0.8, 0.6
N, D = 6, 3


def close(left, right, atol=1e-9):
    torch.testing.assert_close(torch.as_tensor(left), torch.as_tensor(right), rtol=0, atol=atol)


# Conjugate regression: the weights of a linear layer ------------------------------------------------------------------


class Regression:
    """y_n ~ N(w . x_n, s^2), w ~ N(0, a^2 I) those of a Bayesian linear layer.

    The guide is the exact posterior, moved and widened: a dense Gaussian for any inputs, or the layer's own, which
    factorises as the posterior does for orthogonal inputs.
    """

    def __init__(self, own=False, local=False, shift=0.0, widening=1.0):
        inputs = torch.randn(N, D)
        self.inputs = 2 * torch.linalg.qr(inputs).Q if own else inputs
        self.y = self.inputs @ torch.tensor([0.7, -1.0, 0.4]) + NOISE * torch.randn(N)
        self.joint = oracles.regression(self.inputs, PRIOR_SCALE, NOISE)
        self.posterior = self.joint.given_last(self.y)
        self.mean, self.cov = self.posterior.mean + shift, widening**2 * self.posterior.cov
        self.net = pv.bayesian(nn.Linear(D, 1, bias=False), PRIOR_SCALE, local)
        with torch.no_grad():
            self.net.module.weight.copy_(self.mean)
            self.net.log_scale["weight"].copy_(self.cov.diagonal().sqrt().log())
        self.own = own

    @property
    def data(self):
        return self.inputs, self.y

    @property
    def program(self):
        return pv.Program(self.model, self.guide)

    def model(self, x, y):
        predict = self.net.model()
        with pyro.plate("data", N, subsample=torch.arange(len(x))):
            pyro.sample("y", dist.Normal(predict(x)[..., 0], NOISE), obs=y)

    def guide(self, x, y):
        if self.own:
            return self.net.guide()
        flat = dist.MultivariateNormal(self.mean, self.cov)
        return pyro.sample("theta.weight", dist.TransformedDistribution(flat, ReshapeTransform((D,), (1, D))))

    @property
    def log_evidence(self):
        return self.joint.last(N).log_prob(self.y)


GUIDES = {"dense": {}, "its own": {"own": True}, "its own, local": {"own": True, "local": True}}
each_guide = pytest.mark.parametrize("guide", GUIDES)


@each_guide
@pytest.mark.parametrize(
    ("num_particles", "batch_size", "max_elements", "num_local"),
    [(1, 100, 10**6, 1), (7, 6, 10**6, 1), (7, 2, 10**6, 3), (7, 4, 30, 2), (7, 1, 1, 1), (5, 5, 25, 1)],
)
def test_the_exact_posterior_gives_the_evidence(guide, num_particles, batch_size, max_elements, num_local):
    toy = Regression(**GUIDES[guide])
    score = pv.log_marginal(
        toy.program,
        toy.data,
        of="dataset",
        num_particles=num_particles,
        batch_size=batch_size,
        max_elements=max_elements,
        num_local=num_local,
    )
    close(score.values, toy.log_evidence[None])
    close(score.diagnostics["ess"], torch.tensor([float(num_particles)]), atol=1e-7)
    assert score.num_data == N
    assert "whole of 6 data" in repr(score)


@each_guide
@pytest.mark.parametrize("num_steps", [1, 4])
def test_annealing_from_the_exact_posterior_gives_the_evidence(guide, num_steps):
    toy = Regression(**GUIDES[guide])
    score = pv.log_marginal(toy.program, toy.data, of="dataset", method="ais", num_particles=3, num_steps=num_steps)
    close(score.values, toy.log_evidence[None], atol=1e-8)


@pytest.mark.parametrize("has_guide", [True, False])
def test_annealing_from_the_prior_gives_the_evidence_up_to_its_error(has_guide):
    toy = Regression()
    program = toy.program if has_guide else pv.Program(toy.model)
    options = {"method": "ais", "initial": "prior", "num_steps": 60, "num_particles": 300}
    score = pv.log_marginal(program, toy.data, of="dataset", **options)
    assert score.mc_error < 0.1
    assert score.mean == pytest.approx(toy.log_evidence.item(), abs=5 * score.mc_error)


def test_a_wrong_guide_gives_another_value_below_the_evidence():
    toy = Regression(shift=0.5)
    score = pv.log_marginal(toy.program, toy.data, of="dataset", num_particles=2)
    assert score.mean < toy.log_evidence.item() - 0.1


@pytest.mark.parametrize("rows", [slice(0, 2), slice(1, 6)])
@pytest.mark.parametrize("options", [{}, {"method": "ais", "num_steps": 2}])
def test_the_evidence_is_of_the_data_given_however_many_the_plate_states(rows, options):
    toy = Regression(own=True)
    x, y = (column[rows] for column in toy.data)
    some = oracles.regression(x, PRIOR_SCALE, NOISE)
    posterior = some.given_last(y)
    toy.own, toy.mean, toy.cov = False, posterior.mean, posterior.cov
    score = pv.log_marginal(toy.program, (x, y), of="dataset", num_particles=3, **options)
    close(score.values, some.last(len(y)).log_prob(y)[None], atol=1e-8)
    assert score.num_data == len(y)


@pytest.mark.parametrize("options", [{}, {"method": "ais", "num_steps": 3}])
def test_nothing_changes_and_seeds_decide(options):
    toy = Regression(widening=1.3)
    generator = torch.get_rng_state()
    first, again, other = (
        pv.log_marginal(toy.program, toy.data, of="dataset", num_particles=4, seed=seed, **options).mean
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), generator)
    assert toy.net.module.weight.grad is None


# Weights of the data set are unbiased ---------------------------------------------------------------------------------


class Shared:
    """mu ~ N(0, 1), z_n ~ N(mu, 1), x_n ~ N(z_n, s^2); q(mu) and q(z | x, mu) are wider than the posterior."""

    s = 0.7
    q_mean, q_scale = 0.4, 0.9

    def __init__(self, x):
        self.x = x
        one, eye, n = torch.ones(len(x), 1), torch.eye(len(x)), len(x)
        of_mu = torch.cat([torch.ones(1, 1), torch.zeros(1, 2 * n)], 1)
        of_z, of_x = torch.cat([one, eye, 0 * eye], 1), torch.cat([one, eye, self.s * eye], 1)
        joint = oracles.Gaussian.of_noise(torch.zeros(2 * n + 1), torch.cat([of_mu, of_z, of_x]))
        self.log_evidence = joint.last(n).log_prob(x)

    def plate(self, x):
        return pyro.plate("data", len(self.x), subsample=torch.arange(len(x)))

    def model(self, x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
        with self.plate(x):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, self.s), obs=x)

    def guide(self, x):
        mu = pyro.sample("mu", dist.Normal(torch.tensor(self.q_mean), self.q_scale))
        with self.plate(x):
            pyro.sample("z", dist.Normal(0.5 * x + 0.3 * mu, 0.9))

    @property
    def program(self):
        return pv.Program(self.model, self.guide)

    def log_predictive(self, x):
        """Of each datum by itself, mu from the guide."""
        return dist.Normal(self.q_mean, (self.q_scale**2 + 1 + self.s**2) ** 0.5).log_prob(x)


def kept(monkeypatch, module):
    """The log weights that a module reduces."""
    seen = []

    def summarize(parts, original=module.summarize_weights):
        seen.extend(parts)
        return original(parts)

    monkeypatch.setattr(module, "summarize_weights", summarize)
    return seen


def mean_of_logs(monkeypatch):
    monkeypatch.setattr(dataset, "log_mean_exp", lambda log_w: log_w.mean(0))


def new_for_each_minibatch(monkeypatch):
    original = dataset.log_weights

    def drawn_anew(*args, latents, **options):
        return original(*args, **options)

    monkeypatch.setattr(dataset, "log_weights", drawn_anew)


def without_the_globals(monkeypatch):
    monkeypatch.setattr(LogWeights, "log_w_global", property(lambda w: torch.zeros(len(w.log_w))))


PLANTED = {
    "mean of logs": mean_of_logs,
    "globals drawn for each minibatch": new_for_each_minibatch,
    "no weight of the globals": without_the_globals,
}


def ratios_of(toy, monkeypatch, **options):
    seen = kept(monkeypatch, dataset)
    score = pv.log_marginal(toy.program, toy.x, of="dataset", **options)
    log_w = torch.cat(seen).flatten()
    close(score.values, log_w.logsumexp(0)[None] - math.log(len(log_w)), atol=1e-10)
    return (log_w - toy.log_evidence).exp()


@pytest.mark.parametrize("batch_size", [3, 2])
@pytest.mark.parametrize("num_local", [1, 5])
def test_weights_of_a_data_set_with_locals_are_unbiased(num_local, batch_size, monkeypatch):
    toy = Shared(torch.tensor([0.8, -0.3, 1.5]))
    options = {"num_particles": 20_000, "num_local": num_local, "batch_size": batch_size, "max_elements": 30_000}
    assert_mean_close(ratios_of(toy, monkeypatch, **options), 1.0, min_effect=0.06)


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_in_the_weights_of_a_data_set_are_rejected(bug, monkeypatch):
    toy = Shared(torch.tensor([0.8, -0.3, 1.5]))
    PLANTED[bug](monkeypatch)
    ratios = ratios_of(toy, monkeypatch, num_particles=20_000, num_local=5, batch_size=2)
    with pytest.raises(AssertionError, match="mean"):
        assert_mean_close(ratios, 1.0, min_effect=0.3)


def test_more_local_draws_make_the_weights_more_even():
    toy = Shared(torch.randn(8))
    few, many = (
        pv.log_marginal(toy.program, toy.x, of="dataset", num_particles=500, num_local=L).diagnostics["ess"]
        for L in (1, 20)
    )
    assert many > 2 * few


@pytest.mark.parametrize("initial", ["guide", "prior"])
def test_annealing_globals_and_locals_gives_the_evidence_up_to_its_error(initial):
    toy = Shared(torch.tensor([0.8, -0.3, 1.5]))
    options = {"method": "ais", "initial": initial, "num_steps": 40, "num_particles": 200}
    score = pv.log_marginal(toy.program, toy.x, of="dataset", **options)
    assert score.mc_error < 0.06
    assert score.mean == pytest.approx(toy.log_evidence.item(), abs=5 * score.mc_error)


@pytest.mark.parametrize("options", [{"num_particles": 4000}, {"method": "ais", "num_particles": 200, "num_steps": 40}])
def test_a_positive_global_against_quadrature(options):
    """x_n ~ N(0, tau), tau log-normal: the map's Jacobian counts once, whatever the minibatch."""
    x = torch.tensor([0.4, -1.3, 0.9, 2.2])

    def model(x):
        tau = pyro.sample("tau", dist.LogNormal(torch.tensor(0.0), 1.0))
        with pyro.plate("data", 4, subsample=torch.arange(len(x))):
            pyro.sample("x", dist.Normal(0.0, tau), obs=x)

    def guide(x):
        pyro.sample("tau", dist.LogNormal(torch.tensor(0.3), 0.6))

    def log_likelihood(u):
        tau = np.exp(u)[:, None, None]
        terms = -0.5 * (x.numpy() / tau) ** 2 - np.log(tau) - 0.5 * math.log(2 * math.pi)
        return terms.sum(-1)

    truth = oracles.log_marginal_by_quadrature(log_likelihood).item()
    score = pv.log_marginal(pv.Program(model, guide), x, of="dataset", batch_size=3, **options)
    assert score.mc_error < 0.05
    assert score.mean == pytest.approx(truth, abs=5 * score.mc_error)


def discrete_global(x):
    """A coin that all data share; its exact posterior by enumeration."""
    locs = torch.tensor([-0.5, 0.8])
    log_joint = torch.stack([dist.Normal(loc, 1.0).log_prob(x).sum() for loc in locs])
    log_joint = log_joint + torch.tensor([0.7, 0.3]).log()

    def model(x):
        c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.3)))
        with pyro.plate("data", 5, subsample=torch.arange(len(x))):
            pyro.sample("x", dist.Normal(locs[c.long()], 1.0), obs=x)

    def guide(x):
        pyro.sample("c", dist.Bernoulli(logits=log_joint[1] - log_joint[0]))

    return pv.Program(model, guide), log_joint.logsumexp(0)


def test_a_discrete_global_against_enumeration():
    x = torch.randn(5)
    program, truth = discrete_global(x)
    score = pv.log_marginal(program, x, of="dataset", num_particles=9, batch_size=2)
    close(score.values, truth[None])
    with pytest.raises(ValueError, match="site 'c'"):
        pv.log_marginal(program, x, of="dataset", method="ais")


@pytest.mark.parametrize("batch_size", [4, 2, 1])
def test_an_observation_outside_the_plate_counts_once(batch_size):
    def model(x):
        pyro.sample("seen", dist.Normal(0.0, 1.0), obs=torch.tensor(0.3))
        with pyro.plate("data", 4, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 4, subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = torch.randn(4)
    truth = dist.Normal(0.0, 2**0.5).log_prob(x).sum() + dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.3))
    score = pv.log_marginal(pv.Program(model, guide), x, of="dataset", num_particles=2, batch_size=batch_size)
    close(score.values, truth[None])


# One draw for all data ------------------------------------------------------------------------------------------------


def small_vae(**options):
    torch.manual_seed(1)
    vae = pv.VAE((4,), 1, (3,), num_data=5, **options)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if "log_scale" in name:
                parameter.fill_(-0.5)
    return vae


@pytest.mark.parametrize("bayesian", ["decoder", True])
@pytest.mark.parametrize("options", [{}, {"method": "ais", "num_steps": 3}])
def test_the_evidence_never_draws_for_each_datum(bayesian, options):
    x = torch.rand(5, 4).round()
    values = [
        pv.log_marginal(
            small_vae(bayesian=bayesian, local_reparameterization=local),
            x,
            of="dataset",
            num_particles=4,
            batch_size=5,
            **options,
        ).values
        for local in (False, True)
    ]
    close(values[0], values[1])


def test_densities_at_given_latents_are_not_drawn():
    vae, x = small_vae(bayesian=True, local_reparameterization=True), torch.rand(5, 4).round()
    drawn = draw_guide(vae.model, vae.guide, (x,), {}, 3)
    with torch.no_grad():
        twice = [log_guide(vae.model, vae.guide, (x,), {}, drawn)["z"] for _ in range(2)]
        weights = [pv.log_weights(vae.model, vae.guide, (x,), num_particles=3, latents=drawn).log_w for _ in range(2)]
    close(*twice)
    close(*weights)


# What the posterior predicts of a datum -------------------------------------------------------------------------------


def predictive_ratios(toy, monkeypatch, **options):
    seen = kept(monkeypatch, importance)
    score = pv.log_marginal(toy.program, toy.x, num_particles=20_000, **options)
    log_w = torch.cat(seen)
    close(score.values, log_w.logsumexp(0) - math.log(len(log_w)), atol=1e-10)
    return (log_w - toy.log_predictive(toy.x)).exp()


@pytest.mark.parametrize("options", [{}, {"defensive": 0.5}, {"defensive": 0.2}], ids=str)
def test_the_predictive_density_is_unbiased(options, monkeypatch):
    toy = Shared(torch.tensor([0.8, -0.3, 1.5]))
    assert_mean_close(predictive_ratios(toy, monkeypatch, **options), 1.0, min_effect=0.06)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("initial", ["prior", "guide"])
def test_annealed_predictive_densities_are_unbiased(initial, vectorize, monkeypatch):
    toy, count = Shared(torch.tensor([0.8, -0.3, 1.5])), 4000 if vectorize else 60
    seen = kept(monkeypatch, ais)
    program = pv.Program(toy.model, toy.guide, vectorize=vectorize)
    options = {"method": "ais", "initial": initial, "num_steps": 6, "num_leapfrog": 2, "num_pilot": 8}
    score = pv.log_marginal(program, toy.x, num_particles=count, batch_size=2, **options)
    assert score.diagnostics["ess"].shape == (3,)
    ratios = [log_w.exp() for log_w in seen]
    truth = toy.log_predictive(toy.x).exp().split(2)
    for found, exact in zip(ratios, truth, strict=True):
        assert_mean_close(found / exact, 1.0, min_effect=0.1 if vectorize else 1.0)


def test_chains_keep_their_own_draws_of_what_is_shared():
    toy = Shared(torch.tensor([0.8, -0.3, 1.5]))
    space = LatentSpace(toy.model, toy.guide, (toy.x,), hold_shared=True)
    u = space.draw_prior(50)
    assert u.shape == (50, 3, 1)
    assert space.sites == ["z"]
    mu, z = space.tensors[-1].reshape(50, 1), u[..., 0]
    found = space.density(u)
    close(found.log_prior, dist.Normal(mu, 1.0).log_prob(z))
    close(found.log_likelihood, dist.Normal(z, toy.s).log_prob(toy.x))
    close(space.log_guide(found), dist.Normal(0.5 * toy.x + 0.3 * mu, 0.9).log_prob(z))
    assert len(mu.unique()) == 50
    assert (mu - toy.q_mean).mean().abs() < 5 * toy.q_scale / 50**0.5  # of the guide, not of the prior
    again = space.at(toy.x, torch.zeros(50, 1))
    close(again.density(u).log_prior, dist.Normal(0.0, 1.0).log_prob(z))


def test_chains_of_one_draw_for_all_are_seen(monkeypatch):
    """A planted bug: every chain is given the first one's draw."""

    def hold(self, drawn):
        self._held = {name: drawn[name][:1].expand_as(drawn[name]) for name in self._held}

    monkeypatch.setattr(LatentSpace, "_hold", hold)
    with pytest.raises(AssertionError, match="mean"):
        test_annealed_predictive_densities_are_unbiased("prior", True, monkeypatch)


def test_latents_that_are_all_shared_cannot_be_annealed_for_a_datum():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", 4, subsample=torch.arange(len(x))):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    program = pv.Program(model, lambda x: pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0)))
    with pytest.raises(ValueError, match=r"expected latents that belong to a datum each, got \['mu'\]"):
        pv.log_marginal(program, torch.randn(4), method="ais")


def weighed_globals(weights, share):
    return weights.log_w + weights.log_w_global[:, None]


def no_prior(weights, share):
    return weights.log_w - weights.log_prior["z"]


def globals_in_the_mixture(weights, share):
    log_prior = weights.log_prior["z"] + weights.log_prior["mu"][:, None]
    return weights.log_joint - torch.logaddexp(math.log1p(-share) + weights.log_q, math.log(share) + log_prior)


@pytest.mark.parametrize("bug", [weighed_globals, no_prior, globals_in_the_mixture])
def test_planted_bugs_in_the_predictive_density_are_rejected(bug, monkeypatch):
    monkeypatch.setattr(importance, "_defended", bug)
    ratios = predictive_ratios(Shared(torch.tensor([0.8, -0.3, 1.5])), monkeypatch, defensive=0.5)
    with pytest.raises(AssertionError, match="mean"):
        assert_mean_close(ratios, 1.0, min_effect=0.3)


def test_mc_error_of_predictive_densities_knows_that_data_share_draws():
    toy = Shared(torch.full((30,), 0.8))
    scores = [pv.log_marginal(toy.program, toy.x, num_particles=100, seed=seed) for seed in range(60)]
    means = torch.tensor([score.mean for score in scores])
    claimed = torch.tensor([score.mc_error for score in scores]).square().mean().sqrt()
    assert means.std().item() == pytest.approx(claimed.item(), rel=0.4)  # of 60: sd / sqrt(120) = 9%


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"of": "nonsense"}, "of: expected"),
        ({"of": "dataset", "defensive": 0.5}, "defensive"),
        ({"of": "dataset", "method": "posterior-density"}, 'of="dataset".*"ais"'),
        ({"of": "dataset", "num_local": 0}, "num_local"),
        ({"of": "dataset", "num_local": 1.5}, "num_local"),
        ({"of": "datum", "num_local": 2}, "num_local"),
        ({"method": "posterior-density"}, "site 'mu' is outside the data plate"),
    ],
)
def test_bad_arguments_are_refused(options, said):
    toy = Shared(torch.randn(4))
    with pytest.raises(ValueError, match=said):
        pv.log_marginal(toy.program, toy.x, **options)


@pytest.mark.parametrize("method", ["importance", "ais"])
def test_a_program_whose_data_share_nothing_is_refused(method):
    with pytest.raises(ValueError, match="outside the data plate; without them"):
        pv.log_marginal(pv.LinearGaussian(torch.ones(3, 1)), torch.zeros(5, 3), of="dataset", method=method)


def test_num_local_is_among_the_options_of_a_score():
    toy = Shared(torch.randn(4))
    assert pv.log_marginal(toy.program, toy.x, of="dataset", num_particles=5, num_local=3).options == {"num_local": 3}
