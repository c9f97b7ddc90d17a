"""log p(x) from draws of the posterior: exact where the density is the posterior, above on average where it is not."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch.distributions import MultivariateNormal

import pyro_vae as pv
from pyro_vae.evaluation.posterior_density import PosteriorDensity, fit_gaussian
from pyro_vae.programs import LatentSpace, as_program
from tests import oracles
from tests.oracles import gamma_poisson
from tests.statistics import assert_mean_close

SHORT = {"num_particles": 40, "num_chains": 4, "num_warmup": 10, "num_leapfrog": 5}


def close(left, right, atol=1e-10):
    torch.testing.assert_close(torch.as_tensor(left), torch.as_tensor(right), rtol=0, atol=atol)


def rejected(samples, truth=1.0, min_effect=0.5):
    with pytest.raises(AssertionError, match="mean"):
        assert_mean_close(samples, truth, min_effect=min_effect)


def model(**wrong):
    return pv.LinearGaussian(*oracles.example(), **wrong)


def score(p, x, **options):
    return pv.log_marginal(p, x, method="posterior-density", **options)


def posterior_of(x):
    exact = oracles.exact_posterior(x)
    return MultivariateNormal(exact.mean, exact.cov.expand(len(x), 2, 2))


# Zero variance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["nn.Module", "param", "loop", "without a guide"])
@pytest.mark.parametrize("batch_size", [100, 3])
def test_with_the_posterior_as_density_it_is_the_evidence(form, batch_size):
    x = oracles.example_data(4)
    if form == "loop":
        p = pv.Program(*oracles.without_broadcasting(), vectorize=False)
    else:
        p = {
            "nn.Module": model(guide_shift=0.3),
            "param": pv.Program(*oracles.with_params()),
            "without a guide": pv.Program(model().model),
        }[form]
    rows = iter([x[start : start + batch_size] for start in range(0, 4, batch_size)])

    def density(draws):
        return posterior_of(next(rows)).log_prob

    options = SHORT | ({"num_particles": 20, "num_chains": 2, "num_warmup": 3} if form == "loop" else {})
    found = score(p, x, density=density, batch_size=batch_size, **options)
    close(found.values, oracles.exact_log_marginal(x))
    close(found.diagnostics["ess"], torch.full((4,), float(options["num_chains"])), atol=1e-9)
    assert found.mc_error < 1e-9


def test_a_density_that_is_not_the_posterior_gives_another_value():
    x = oracles.example_data(4)
    other = MultivariateNormal(torch.zeros(4, 2), 0.3 * torch.eye(2))
    found = score(model(), x, density=lambda draws: other.log_prob, **SHORT)
    assert (found.values - oracles.exact_log_marginal(x)).abs().min() > 1e-3


# Its own draws and fit ------------------------------------------------------------------------------------------------


def test_the_fitted_gaussian_comes_close():
    x = oracles.example_data(8)
    found = score(model(guide_shift=0.5, guide_widening=1.5), x)
    truth = oracles.exact_log_marginal(x)
    close(found.values, truth, atol=0.05)
    assert found.mc_error < 0.02
    assert (found.diagnostics["r_hat"] < 1.05).all()
    assert (found.diagnostics["acceptance"] > 0.7).all()
    assert (found.diagnostics["ess"] > 8).all()  # of 10 chains
    assert "R-hat" in repr(found)


def test_constrained_latents_are_fitted_without_constraints():
    """A Poisson of a Gamma is negative binomial; the posterior of log z, z ~ Gamma(2 + x, 2.5), is known exactly."""
    x = torch.tensor([0.0, 2.0, 7.0])
    truth = torch.tensor(stats.nbinom(2, 1.5 / 2.5).logpmf(x.numpy()))
    close(score(pv.Program(gamma_poisson), x).values, truth, atol=0.15)

    def density(draws):
        posterior = torch.distributions.Gamma(2 + x, 2.5)
        return lambda u: posterior.log_prob(u[..., 0].exp()) + u[..., 0]

    close(score(pv.Program(gamma_poisson), x, density=density, **SHORT).values, truth)


def test_chains_that_do_not_agree_are_told_by_r_hat():
    """Two far modes: each chain stays in its own."""

    def two_modes(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 10.0))
            pyro.sample("x", dist.Normal(z.abs(), 0.1), obs=x)

    with pytest.warns(UserWarning, match="the chains of 2 of 2 data do not agree, with R-hat"):
        found = score(pv.Program(two_modes), torch.tensor([10.0, 12.0]), **SHORT)
    assert (found.diagnostics["r_hat"] > 2).all()


# Expectation ----------------------------------------------------------------------------------------------------------

ROWS = 3000
DATUM = ((0.3, -1.0, 0.8),)


def exact_draws(monkeypatch, wrong=lambda draws, mean: draws):
    """Chains of independent exact draws of the posterior."""

    def posterior(self, space, start, recorder):
        law = posterior_of(space._args[0])
        draws = wrong(law.sample((self.num_particles // self.num_chains, 2 * self.num_chains)), law.mean)
        log_joint = torch.stack([space.density(part).log_joint for part in draws])
        return draws, log_joint, torch.ones(draws.shape[2])

    monkeypatch.setattr(PosteriorDensity, "_posterior", posterior)


def inverse_ratios(density, **options):
    """p(x) times the estimate of 1 / p(x), over repetitions of a datum."""
    x = torch.tensor(DATUM).expand(ROWS, 3)
    found = PosteriorDensity(num_particles=20, num_chains=5, density=density, **options)
    with torch.no_grad():
        values = found(as_program(model()), (x,), {}, 10**6).values
    return (oracles.exact_log_marginal(x) - values).exp()


def off(shift, narrowing):
    """The posterior moved, and made narrower."""

    def density(draws):
        law = posterior_of(torch.tensor(DATUM).expand(ROWS, 3))
        return MultivariateNormal(law.mean + shift, narrowing**2 * law.covariance_matrix).log_prob

    return density


def unnormalised(draws):
    return lambda u: off(0.0, 0.8)(draws)(u) + 0.2


DENSITIES = {"fitted": fit_gaussian, "shifted": off(0.2, 1.0), "narrow": off(0.0, 0.5), "both": off(0.1, 0.6)}


@pytest.mark.parametrize("name", DENSITIES)
def test_from_exact_draws_the_inverse_is_unbiased_and_the_value_above(name, monkeypatch):
    exact_draws(monkeypatch)
    ratios = inverse_ratios(DENSITIES[name])
    assert_mean_close(ratios, 1.0, min_effect=0.1)
    above = -ratios.log()
    assert above.mean() > 3 * above.std() / ROWS**0.5


BUGS = {
    "draws of a wider law": (off(0.1, 0.7), lambda draws, mean: mean + 1.4 * (draws - mean)),
    "draws of a moved law": (off(0.1, 0.7), lambda draws, mean: draws - 0.2),
    "a density without its constant": (unnormalised, lambda draws, mean: draws),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_rejected(bug, monkeypatch):
    density, wrong = BUGS[bug]
    exact_draws(monkeypatch, wrong)
    rejected(inverse_ratios(density), min_effect=0.3)


def test_a_log_joint_without_its_prior_is_rejected(monkeypatch):
    exact_draws(monkeypatch)

    def posterior(self, space, start, recorder, original=PosteriorDensity._posterior):
        draws, _, acceptance = original(self, space, start, recorder)
        return draws, torch.stack([space.density(part).log_likelihood for part in draws]), acceptance

    monkeypatch.setattr(PosteriorDensity, "_posterior", posterior)
    rejected(inverse_ratios(off(0.0, 0.7)), min_effect=0.5)


def test_one_half_is_fitted_to_and_the_other_averaged(monkeypatch):
    """The same half for both would fit its own noise: q too high at its points, the value too low."""
    exact_draws(monkeypatch)
    seen = {}

    def density(draws):
        seen["fitted"] = draws
        fitted = fit_gaussian(draws)

        def log_prob(u):
            seen["averaged"] = u
            return fitted(u)

        return log_prob

    assert_mean_close(inverse_ratios(density), 1.0, min_effect=0.1)
    assert seen["fitted"].shape == seen["averaged"].shape == (20, ROWS, 2)
    assert not set(seen["fitted"].flatten().tolist()) & set(seen["averaged"].flatten().tolist())

    def same_half(draws):
        fitted = fit_gaussian(draws)
        return lambda u: fitted(draws)  # of the points it was fitted to

    def posterior(self, space, start, recorder, original=PosteriorDensity._posterior):
        draws, log_joint, acceptance = original(self, space, start, recorder)
        half = self.num_chains
        return torch.cat([draws[:, :half]] * 2, 1), torch.cat([log_joint[:, :half]] * 2, 1), acceptance

    monkeypatch.setattr(PosteriorDensity, "_posterior", posterior)
    biased = inverse_ratios(same_half)
    rejected(biased, min_effect=0.2)
    assert biased.mean() > 1


def test_the_inverse_is_unbiased_with_its_own_chains():
    x = torch.tensor(DATUM).expand(150, 3)
    found = score(
        model(),
        x,
        density=lambda draws: off_rows(x, 0.6),
        num_particles=20,
        num_chains=5,
        num_warmup=20,
        batch_size=150,
    )
    assert_mean_close((oracles.exact_log_marginal(x) - found.values).exp(), 1.0, min_effect=0.2)


def off_rows(x, narrowing):
    law = posterior_of(x)
    return MultivariateNormal(law.mean, narrowing**2 * law.covariance_matrix).log_prob


# The fit --------------------------------------------------------------------------------------------------------------


def test_the_gaussian_has_the_mean_and_the_covariance_of_the_draws():
    draws = torch.randn(50, 3, 2) @ torch.tensor([[1.0, 0.4], [0.0, 0.3]]) + torch.arange(3.0)[:, None]
    points = torch.randn(4, 3, 2)
    found = fit_gaussian(draws)(points)
    assert found.shape == (4, 3)
    for m in range(3):
        law = stats.multivariate_normal(draws[:, m].mean(0), torch.cov(draws[:, m].T))
        close(found[:, m], torch.tensor(law.logpdf(points[:, m])), atol=1e-3)  # but for a jitter of 1e-6


def test_the_draws_come_chain_by_chain_from_the_two_halves(monkeypatch):
    """Points and log densities belong together, whatever the order in which they are laid out."""
    x = oracles.example_data(3)
    space = LatentSpace(model().model, None, (x,))
    method = PosteriorDensity(num_particles=20, num_chains=2, num_warmup=3)
    draws, log_joint, acceptance = method._posterior(space, space.draw_prior(4))
    assert draws.shape == (10, 4, 3, 2)
    assert acceptance.shape == (3,)
    close(log_joint, torch.stack([space.density(part).log_joint for part in draws]))
    assert len(draws[:, :, 0, 0].unique()) > 20  # chains move


# Refusals -------------------------------------------------------------------------------------------------------------


def test_more_than_five_dimensions_are_refused():
    p = pv.LinearGaussian(torch.ones(3, 6))
    with pytest.raises(ValueError, match=r"at most 5 latent dimensions.*got 6"):
        score(p, torch.zeros(2, 3))
    five = pv.LinearGaussian(0.3 * torch.randn(3, 5))
    x = torch.zeros(2, 3)
    close(score(five, x, num_warmup=20).values, five.log_marginal(x).detach(), atol=0.3)


def test_discrete_and_global_latents_are_refused_by_name():
    with pytest.raises(ValueError, match="site 'z_1' is drawn from Bernoulli"):
        score(pv.SigmoidBeliefNetwork((4,), (2,)), torch.ones(3, 4))
    toy = oracles.SharedMean(4)
    with pytest.raises(ValueError, match="site 'mu' is outside the data plate"):
        score(pv.Program(toy.model, toy.guide), torch.randn(4))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_particles": 19}, "num_particles: expected a whole number of at least 20, got 19"),
        ({"num_particles": 25}, "a multiple of num_chains.* got 25 with 10 chains"),
        ({"num_particles": 30}, "four times it or more; got 30 with 10 chains"),
        ({"num_chains": 1}, "num_chains: expected a whole number of at least 2, got 1"),
        ({"num_warmup": 1}, "num_warmup: expected"),
        ({"num_leapfrog": 0}, "num_leapfrog: expected"),
        ({"target_accept": 1.0}, "target_accept: expected a number between 0 and 1, got 1.0"),
        ({"target_accept": math.nan}, "target_accept: expected a number between 0 and 1, got nan"),
    ],
)
def test_bad_arguments(options, said):
    with pytest.raises(ValueError, match=said):
        PosteriorDensity(**options)


def test_the_shortest_warmup_works():
    x = oracles.example_data(3)
    assert score(model(), x, **SHORT | {"num_warmup": 2}).values.isfinite().all()


def test_a_fitted_gaussian_is_as_narrow_as_each_dimension():
    scales = torch.tensor([1.0, 1e-5])
    draws = scales * torch.randn(4000, 1, 2)
    exact = torch.distributions.Normal(0.0, scales).log_prob(draws).sum(-1)
    assert (fit_gaussian(draws)(draws) - exact).abs().median() < 0.1


def test_padded_sequences_are_refused():
    made, x = pv.LinearGaussianSSM(torch.tensor([[0.5]]), torch.ones(1, 1)), torch.randn(3, 3, 1)
    with pytest.raises(ValueError, match="expected sequences without padding, got some"):
        pv.log_marginal(made, (x, torch.tensor([3, 2, 3])), method="posterior-density", **SHORT)
    whole = (x, torch.full((3,), 3))
    found = pv.log_marginal(made, whole, method="posterior-density", num_particles=400, num_chains=4).values
    close(found, made.log_marginal(*whole), atol=0.2)
