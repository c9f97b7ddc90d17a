"""Diagnostics: equal to closed forms where there are any, with planted bugs rejected, and no trace left behind."""

import math
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from scipy.stats import chisquare
from torch import nn
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae import programs
from pyro_vae.evaluation import diagnostics
from pyro_vae.evaluation.diagnostics import (
    ActiveUnits,
    Calibration,
    active_units,
    amortization_gap,
    gradient_snr,
    kl_per_dimension,
    pareto_k,
    simulation_based_calibration,
)
from pyro_vae.programs import log_weights
from tests import oracles
from tests.statistics import assert_mean_close

SMALL_GAP = {"num_steps": 3, "num_particles": 2, "log_marginal_particles": 5}


def close(left, right, atol=1e-10):
    torch.testing.assert_close(torch.as_tensor(left), torch.as_tensor(right), rtol=0, atol=atol, check_dtype=False)


def looped(shift=0.0, widening=1.0):
    return pv.Program(*oracles.without_broadcasting(shift, widening), vectorize=False)


def orthogonal(**wrong):
    """Columns of the weight at right angles: the posterior is a diagonal Gaussian of precisions (1 + 5, 1 + 10)."""
    return pv.LinearGaussian(torch.tensor([[2.0, 1.0], [-1.0, 2.0], [0.0, 5.0**0.5]]), noise_scale=1.0, **wrong)


# Pareto k -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [0.3, 0.8, 1.5])
def test_recovers_the_shape_of_pareto_weights(shape):
    log_w = shape * torch.distributions.Exponential(1.0).sample((20_000, 5))  # w = U^-k has tail index k
    assert pareto_k(log_w).mean().item() == pytest.approx(shape, abs=0.1)


def test_shift_of_the_log_weights_does_not_matter():
    log_w = torch.randn(500, 3)
    torch.testing.assert_close(pareto_k(log_w), pareto_k(log_w - 1000.0), rtol=1e-6, atol=1e-6)


def test_order_of_data_is_kept_and_hopeless_ones_are_nan():
    log_w = torch.randn(200, 4) * torch.tensor([0.1, 0.0, 3.0, 1.0])
    log_w[5, 3] = -math.inf
    k = pareto_k(log_w)
    assert k[0] < 0.7 < k[2]
    assert k[[1, 3]].isnan().all()


def test_too_few_particles_is_nan():
    assert pareto_k(torch.randn(49, 2)).isnan().all()


# Active units ---------------------------------------------------------------------------------------------------------


def test_variance_of_the_posterior_mean_is_unbiased_for_two_particles():
    """Conditional on the data the truth is the sample variance of the known posterior means."""
    x = oracles.example_data(20)
    model = pv.LinearGaussian(*oracles.example(), guide_widening=2.0)
    posterior = oracles.exact_posterior(x)
    truth, noise = posterior.mean.var(0), 4 * posterior.cov.diagonal() / 2
    found = [active_units(model, x, num_particles=2, seed=seed).variance["z"] for seed in range(150)]
    assert_mean_close(torch.stack(found), truth, min_effect=noise.min().item() / 2)
    with pytest.raises(AssertionError, match="mean"):  # the naive variance of the means
        assert_mean_close(torch.stack(found) + noise, truth, min_effect=noise.min().item() / 2)


def test_batches_are_put_together_and_particles_bring_the_estimate_home():
    x, (model, guide) = oracles.example_data(50), oracles.with_params()
    found = active_units(pv.Program(model, guide), x, num_particles=20_000, batch_size=7).variance["z"]
    close(found, oracles.exact_posterior(x).mean.var(0), atol=0.01)


def test_a_dimension_that_ignores_the_data_is_not_active():
    model = pv.LinearGaussian(torch.tensor([[1.0, 0.0, 0.5], [1.0, 0.0, -0.5]]))
    units = active_units(model, torch.randn(200, 2))
    assert units.active["z"].tolist() == [True, False, True]
    assert units.count == 2
    assert repr(units) == "ActiveUnits(Var > 0.01: z 2 of 3)"
    assert active_units(model, torch.randn(200, 2), threshold=100.0).count == 0


def test_several_sites_are_counted_together():
    units = ActiveUnits({"a": torch.tensor([1.0, 0.0]), "b": torch.tensor(0.5)}, 0.2)
    assert units.count == 2
    assert active_units(oracles.TwoLayers(bottom_up=True), torch.randn(30)).variance.keys() == {"z1", "z2"}


def test_a_program_that_loops_over_particles_and_discrete_latents():
    x = oracles.example_data(30)
    assert active_units(looped(), x, num_particles=4).variance["z"].shape == (2,)
    belief = oracles.BeliefNetwork(40)
    found = active_units(belief, torch.bernoulli(torch.full((40, 3), 0.5)), num_particles=500).variance["z"]
    assert found.shape == (2,)


# Shapes of latents: one event, plates on either side of the data's, masks ---------------------------------------------

SCALES = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
MASK = torch.tensor([True, True, False])


class Layout:
    """z_t ~ N(0, 1), x_t ~ N(z_t, 1) and q(z_t | x) = N(x_t, s_t^2), t = 1..3, written down in several ways."""

    def __init__(self, form):
        self.form = form

    def latents(self, x, loc, scale):
        """The values (..., M, 3), with the plate of the data."""
        beside = self.form in ("data, time", "handler", "beside a plate")
        data = pyro.plate("data", len(x), dim=-2 if beside else -1)
        if self.form == "time, data":
            with data, pyro.plate("time", 3, dim=-2):
                return data, pyro.sample("z", dist.Normal(loc.T, scale.expand(len(x), 3).T)).transpose(-1, -2)
        with data:
            if self.form == "data, time":
                with pyro.plate("time", 3, dim=-1):
                    return data, pyro.sample("z", dist.Normal(loc, scale))
            if self.form == "handler":
                with pyro.plate("time", 3, dim=-1), pyro.poutine.mask(mask=MASK):
                    return data, pyro.sample("z", dist.Normal(loc, scale))
            if self.form == "beside a plate":
                return data, pyro.sample("z", dist.Normal(loc[:, None], scale).to_event(1))[..., 0, :]
            fn = dist.Normal(loc, scale)
            fn = fn.mask(MASK.expand(len(x), 3)) if self.form == "mask inside" else fn
            return data, pyro.sample("z", fn.to_event(1))

    def model(self, x):
        data, z = self.latents(x, torch.zeros(len(x), 3), torch.ones(3))
        if data.dim == -2:
            with data, pyro.plate("pixels", 3, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        else:
            with data:
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x):
        self.latents(x, x, SCALES)


FORMS = ["event", "data, time", "time, data", "beside a plate"]


def kl_of_layout(form, x):
    truth = 0.5 * (x.square().mean(0) + SCALES**2 - 1) - SCALES.log()
    return truth * MASK if form in ("mask inside", "handler") else truth


@pytest.mark.parametrize("form", [*FORMS, "mask inside", "handler"])
def test_kl_is_split_over_events_and_plates_and_masked_dimensions_count_nothing(form):
    x = torch.randn(4, 3)
    close(kl_per_dimension(Layout(form), x, num_particles=2, batch_size=3)["z"], kl_of_layout(form, x))


@pytest.mark.parametrize("form", [*FORMS, "mask inside", "handler"])
def test_sampled_kl_is_split_in_the_same_way(form, monkeypatch):
    monkeypatch.setattr(programs.dimensions, "known_when_drawn", lambda latent, drawn: [])
    x = torch.randn(4, 3)
    found = [kl_per_dimension(Layout(form), x, num_particles=100, seed=seed)["z"] for seed in range(40)]
    assert_mean_close(torch.stack(found), kl_of_layout(form, x), min_effect=0.2)


@pytest.mark.parametrize("form", FORMS)
def test_draws_are_laid_out_by_datum(form):
    x = torch.randn(40, 3)
    close(active_units(Layout(form), x, num_particles=5000).variance["z"], x.var(0), atol=0.15)
    calibration = simulation_based_calibration(Layout(form), x[:5], num_simulations=12, num_draws=3, bins=2)
    assert calibration.ranks["z"].shape == (12, 3)


# KL per dimension -----------------------------------------------------------------------------------------------------


def test_kl_of_factorised_gaussians_is_the_closed_form_of_each_dimension():
    toy, x = oracles.Amortized(), oracles.example_data(9)
    gain, offset, log_scale = toy.phi
    truth = (0.5 * ((x @ gain.T + offset) ** 2 + (2 * log_scale).exp() - 1) - log_scale).mean(0)
    found = kl_per_dimension(toy, x, num_particles=1, batch_size=4)["z"]
    close(found, truth.detach())
    assert not found.requires_grad
    with pytest.raises(AssertionError):  # a sum over data, or one per nat of two dimensions
        close(2 * found, truth.detach())


@pytest.mark.parametrize("prior", ["full", "diagonal"])
def test_a_site_that_does_not_factorise_is_one_number(prior):
    """Between two multivariate normals in closed form; against independent normals by Monte Carlo."""
    x = oracles.example_data(5)
    posterior = oracles.exact_posterior(x)
    q = dist.MultivariateNormal(posterior.mean, posterior.cov.expand(5, 2, 2))
    truth = kl_divergence(q, dist.MultivariateNormal(torch.zeros(5, 2), torch.eye(2))).mean()
    if prior == "full":
        return close(kl_per_dimension(pv.LinearGaussian(*oracles.example()), x)["z"], truth)
    program = pv.Program(*oracles.with_params())
    found = torch.stack([kl_per_dimension(program, x, num_particles=200, seed=seed)["z"] for seed in range(40)])
    assert_mean_close(found, truth, min_effect=0.1)
    assert kl_per_dimension(looped(), x, num_particles=3)["z"].shape == ()
    return None


def test_independent_normals_against_a_multivariate_prior():
    root = torch.tensor([[1.0, 0.0], [0.8, 0.6]])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), scale_tril=root))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.5).to_event(1))

    x = torch.randn(6, 2)
    q = dist.MultivariateNormal(x, 0.25 * torch.eye(2).expand(6, 2, 2))
    truth = kl_divergence(q, dist.MultivariateNormal(torch.zeros(6, 2), scale_tril=root)).mean()
    close(kl_per_dimension(pv.Program(model, guide), x, num_particles=1)["z"], truth)


@pytest.mark.parametrize("bottom_up", [True, False])
def test_kl_of_a_hierarchy_adds_up_to_that_of_all_its_latents(bottom_up):
    toy, x = oracles.TwoLayers(bottom_up), torch.tensor([0.5, -1.5])
    mean, variance = (0.6 * x, 0.25) if bottom_up else (0.56 * x, 0.25 + 0.18**2)
    likelihood = -0.5 * ((x - mean) ** 2 + variance) / toy.s**2 - math.log(toy.s) - 0.5 * math.log(2 * math.pi)
    truth = (likelihood - toy.elbo(x)).mean()
    found = [kl_per_dimension(toy, x, num_particles=300, seed=seed) for seed in range(40)]
    assert_mean_close(torch.stack([kl["z1"] + kl["z2"] for kl in found]), truth, min_effect=0.1)
    if not bottom_up:  # fixed when it is drawn: no noise
        truth = (0.5 * ((0.3 * x) ** 2 + 0.81 - 1) - math.log(0.9)).mean()
        close(torch.stack([kl["z2"] for kl in found]), truth.expand(40))


def test_the_sum_is_the_kl_that_the_bound_has():
    vae, x = pv.VAE(data_shape=(6,), latent_dim=3, hidden_dims=(5,)), torch.bernoulli(torch.full((10, 6), 0.5))
    kl = log_weights(vae.model, vae.guide, (x,), analytic_kl=True).kl["z"]
    close(kl_per_dimension(vae, x)["z"].sum(), kl.mean().detach())


# Gaps of inference ----------------------------------------------------------------------------------------------------


def test_no_gap_where_the_guide_is_a_diagonal_posterior():
    model, x = orthogonal(), torch.randn(5, 3)
    gap = amortization_gap(model, x, num_steps=300, log_marginal_particles=200, batch_size=3)
    truth = model.log_marginal(x).detach()
    close(gap.bound, truth)
    close(gap.optimized_bound, truth, atol=1e-3)
    close(gap.log_marginal, truth, atol=1e-3)
    for name in ("amortization", "approximation", "total"):
        close(getattr(gap, name), torch.zeros(5), atol=1e-3)


@pytest.mark.parametrize("wrong", [{"guide_shift": 0.4}, {"guide_widening": 1.6}])
def test_a_wrong_guide_has_the_amortization_gap_of_its_kl(wrong):
    x, precision = torch.randn(40, 3), torch.tensor([6.0, 11.0])
    gap = amortization_gap(orthogonal(**wrong), x, num_steps=300, log_marginal_particles=500)
    shift, widening = wrong.get("guide_shift", 0.0), wrong.get("guide_widening", 1.0)
    truth = (0.5 * (shift**2 * precision + widening**2 - 1) - math.log(widening)).sum()
    assert_mean_close(gap.amortization, truth, min_effect=0.1)
    assert_mean_close(gap.total, truth, min_effect=0.1)
    assert_mean_close(gap.approximation, 0.0, min_effect=0.05)


def test_a_correlated_posterior_has_the_approximation_gap_of_the_best_diagonal_gaussian():
    """The best has the posterior's mean and the diagonal of its precision (Bishop 2006, eq. (10.13))."""
    weight, bias, _ = oracles.example()
    model, x = pv.LinearGaussian(2 * weight, bias, 0.6), oracles.example_data(40)
    precision = torch.linalg.inv(oracles.linear_gaussian(2 * weight, bias, 0.6).given_last(x).cov)
    truth = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    gap = amortization_gap(model, x, num_steps=300, log_marginal_particles=500)
    assert truth > 0.03
    assert_mean_close(gap.approximation, truth, min_effect=0.5 * truth.item())
    assert_mean_close(gap.amortization, -truth, min_effect=0.5 * truth.item())  # its own guide is full, and exact
    close(gap.log_marginal, model.log_marginal(x).detach(), atol=0.05)


def test_constrained_latents_are_fitted_on_the_real_line():
    """log z ~ N(0, 1), x ~ N(log z, 1): the posterior of log z is N(x / 2, 1 / 2)."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.LogNormal(0.0, 1.0)).log(), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(x / 2 + 0.6, 0.5**0.5))

    x = torch.randn(40)
    gap = amortization_gap(pv.Program(model, guide), x, num_steps=300, log_marginal_particles=500)
    close(gap.optimized_bound, dist.Normal(0.0, 2**0.5).log_prob(x), atol=1e-3)
    assert_mean_close(gap.amortization, 0.6**2, min_effect=0.1)


def test_gaps_of_two_layers():
    toy, x = oracles.TwoLayers(bottom_up=True), torch.randn(40)
    gap = amortization_gap(toy, x, num_steps=300, log_marginal_particles=500)
    truth = dist.Normal(0.0, (toy.a**2 + toy.s1**2 + toy.s**2) ** 0.5).log_prob(x)
    assert_mean_close(gap.log_marginal - truth, 0.0, min_effect=0.05)
    assert_mean_close(gap.bound - toy.elbo(x), 0.0, min_effect=0.1)
    assert "amortization" in repr(gap)
    assert "40 data" in repr(gap)


def test_a_program_that_loops_over_particles_has_gaps():
    gap = amortization_gap(looped(), x := oracles.example_data(3), **SMALL_GAP)
    close(gap.bound, oracles.exact_log_marginal(x))


def test_the_gap_tells_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"continuous latents, got discrete sites \['z'\]"):
        amortization_gap(oracles.BeliefNetwork(4), torch.ones(4, 3))
    with pytest.raises(ValueError, match="learning_rate: expected a positive number, got 0"):
        amortization_gap(orthogonal(), torch.zeros(2, 3), learning_rate=0)
    with pytest.raises(ValueError, match="log_marginal_particles"):
        amortization_gap(orthogonal(), torch.zeros(2, 3), log_marginal_particles=0)
    toy = oracles.ScalarGaussian(4)
    automatic = pv.Program(lambda x: toy.model(x), AutoNormal(lambda x: toy.model(x)))
    for diagnose in (amortization_gap, kl_per_dimension):
        with pytest.raises(ValueError, match=r"auxiliary sites \['z_unconstrained'\]"):
            diagnose(automatic, torch.ones(4))
    assert active_units(automatic, torch.ones(4), num_particles=3).variance.keys() == {"z"}


# Signal-to-noise ratio ------------------------------------------------------------------------------------------------


class Scalar(nn.Module):
    """z ~ N(0, 1), x ~ N(z, 1), q = N(m, s^2): one datum, two parameters and three without a gradient."""

    def __init__(self, mean=1.5, scale=0.6):
        super().__init__()
        self.mean, self.log_scale = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(scale).log())
        self.unused, self.times_zero = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        self.gain = nn.Parameter(torch.ones(2))

    def model(self, x):
        pyro.module("scalar", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            loc = z + 0 * self.times_zero.sum() + self.gain @ torch.tensor([1.0, 0.0]) - 1
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(self, x):
        pyro.module("scalar", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.mean, self.log_scale.exp()))


@pytest.mark.parametrize("objective", [pv.SGVB(1), pv.SGVB(4), Trace_ELBO(num_particles=4, vectorize_particles=True)])
def test_snr_of_the_reparameterised_gradient_is_the_closed_form(objective):
    """With z = m + s e the gradient of log w is x - 2 z in m, and (x - 2 z) s e + 1 in log s."""
    x, m, s, K, n = 1.0, 1.5, 0.6, objective.num_particles, 600
    snr = gradient_snr(Scalar(m, s), torch.tensor([x]), objective, num_draws=n)
    assert snr.keys() == {"mean", "log_scale", "gain"}
    mean = K**0.5 * abs(x - 2 * m) / (2 * s)
    log_scale = K**0.5 * abs(1 - 2 * s**2) / ((x - 2 * m) ** 2 * s**2 + 8 * s**4) ** 0.5
    for found, truth in ((snr["mean"], mean), (snr["log_scale"], log_scale)):
        assert found.item() == pytest.approx(truth, abs=5 * ((1 + truth**2 / 2) / n) ** 0.5 * 1.5)
    assert snr["gain"].isnan().tolist() == [False, True]


class Scripted:
    """Gives the gradients of a script, one after the other."""

    def __init__(self, gradients):
        self.left = list(gradients)

    def loss_and_grads(self, model, guide, x):
        model.__self__.functions["model"].__self__.mean.grad = self.left.pop(0)


def test_snr_is_mean_over_standard_deviation_and_none_counts_as_zero():
    script = [torch.tensor(v) for v in (1e6 + 1.0, 1e6 + 2.0, 1e6 + 4.0)]  # squares would lose the deviations
    snr = gradient_snr(Scalar(), torch.ones(1), Scripted(script), num_draws=3)
    close(snr["mean"] * (7 / 3) ** 0.5, 1e6 + 7 / 3, atol=1e-4)
    snr = gradient_snr(Scalar(), torch.ones(1), Scripted([torch.tensor(3.0), None, None, None]), num_draws=4)
    close(snr["mean"], 0.75 / 1.5)
    assert gradient_snr(Scalar(), torch.ones(1), Scripted([torch.tensor(2.0)] * 2), num_draws=2)["mean"] == math.inf
    assert gradient_snr(Scalar(), torch.ones(1), Scripted([torch.tensor(0.0)] * 2), num_draws=2) == {}


def test_more_particles_drown_the_guides_gradient_in_iwae_and_not_in_dreg():
    """Rainforth et al., Theorem 1, and the doubly reparameterised gradient that repairs it."""
    model, x = Scalar(0.9, 0.9), torch.tensor([1.0])
    snr = {
        (objective, K): gradient_snr(model, x, objective(num_particles=K), num_draws=400)["log_scale"].item()
        for objective in (pv.IWAE, pv.DReG)
        for K in (2, 128)
    }
    assert snr[pv.IWAE, 128] < 0.5 * snr[pv.IWAE, 2]
    assert snr[pv.DReG, 128] > 2 * snr[pv.DReG, 2]


def test_gradients_of_the_parameters_are_what_they_were():
    model = Scalar()
    model.mean.grad = kept = torch.tensor(7.0)
    gradient_snr(model, torch.ones(1), pv.SGVB(), num_draws=3)
    assert model.mean.grad is kept
    assert kept == 7
    assert model.log_scale.grad is None
    with pytest.raises(ValueError, match="num_draws: expected a whole number of at least 2"):
        gradient_snr(model, torch.ones(1), pv.SGVB(), num_draws=1)


# Calibration ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{}, {"guide_shift": 0.25}, {"guide_widening": 1.5}, {"guide_widening": 0.7}])
def test_ranks_are_uniform_if_and_only_if_the_guide_is_the_posterior(wrong):
    model = pv.LinearGaussian(*oracles.example(), **wrong)
    calibration = simulation_based_calibration(model, torch.zeros(30, 3))
    assert calibration.ranks["z"].shape == (1000, 2)
    assert (calibration.ranks["z"] >= 0).all()
    assert (calibration.ranks["z"] <= 99).all()
    for bins in (10, 20):
        p = calibration.p_values(bins)["z"]
        assert (p < 1e-6).all() if wrong else (p > 1e-3).all()
    close(calibration.p_values()["z"], calibration.p_values(20)["z"])
    close(calibration.ranks["z"].double().mean(0), torch.full((2,), 49.5), atol=4 if "guide_shift" not in wrong else 50)
    assert "1000 simulations, 99 draws; least p-value: z" in repr(calibration)


def test_a_guide_that_is_too_high_gives_low_ranks_and_one_too_narrow_gives_extreme_ones():
    def ranks(**wrong):
        model = pv.LinearGaussian(*oracles.example(), **wrong)
        return simulation_based_calibration(model, torch.zeros(9, 3), num_simulations=300).ranks["z"].double()

    assert (ranks(guide_shift=0.5).mean(0) < 40).all()
    assert (ranks(guide_widening=0.5).std(0) > 32).all()  # 28.9 of uniform ones
    assert (ranks(guide_widening=2.0).std(0) < 25).all()


def test_covariates_stay_with_their_simulations():
    def model(x, c):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(c * pyro.sample("z", dist.Normal(torch.zeros(()), 1.0)), 1.0), obs=x)

    def guide(x, c):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(c * x / (1 + c**2), (1 + c**2) ** -0.5))

    data = {"x": torch.zeros(7), "c": torch.linspace(-3.0, 3.0, 7)}
    program = pv.Program(model, guide)
    batches = diagnostics._open(program, data, 4, None, 0).repeated(9)
    close(torch.cat([kwargs["c"] for _, kwargs in batches]), data["c"].repeat(2)[:9])
    calibration = simulation_based_calibration(program, data, num_simulations=500, batch_size=30)
    assert len(calibration.ranks["z"]) == 500
    assert calibration.p_values()["z"] > 1e-3
    assert calibration.ranks["z"].unique().numel() > 60  # repetitions of the data dream anew


@pytest.mark.parametrize("sign", [1, -1])
def test_ties_of_discrete_latents_are_broken_at_random(sign, monkeypatch):
    """z ~ Bernoulli(1/2), x ~ N(z, 1): the posterior's logit is x - 1/2."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Bernoulli(torch.tensor(0.5))), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=sign * (x - 0.5)))

    def p_value():
        return simulation_based_calibration(pv.Program(model, guide), torch.zeros(50)).p_values()["z"]

    assert p_value() > 1e-3 if sign == 1 else p_value() < 1e-6
    monkeypatch.setattr(diagnostics, "_rank", lambda truth, draws: (draws < truth).sum(0))
    assert p_value() < 1e-6


def test_p_values_are_those_of_the_chi_squared_test():
    ranks = torch.stack([torch.arange(200) % 20, torch.arange(200) % 7], 1)
    p = Calibration({"z": ranks}, num_draws=19, bins=10).p_values(5)["z"]
    counts = np.bincount(ranks[:, 1].numpy() // 4, minlength=5)
    close(p, [1.0, chisquare(counts).pvalue])


def test_bins_must_divide_the_ranks():
    with pytest.raises(ValueError, match=r"bins: expected a divisor of num_draws \+ 1 = 100, got 30"):
        simulation_based_calibration(orthogonal(), torch.zeros(2, 3), bins=30)
    with pytest.raises(ValueError, match="divisor"):
        Calibration({"z": torch.zeros(5)}, 99, 20).p_values(7)


def test_calibration_of_a_program_that_loops_over_particles():
    calibration = simulation_based_calibration(
        looped(shift=2.0), torch.zeros(4, 3), num_simulations=60, num_draws=9, bins=5
    )
    assert (calibration.p_values()["z"] < 1e-6).all()


# All of them ----------------------------------------------------------------------------------------------------------

DIAGNOSES = {
    "active_units": lambda program, x: active_units(program, x, num_particles=3).variance,
    "kl_per_dimension": lambda program, x: kl_per_dimension(program, x, num_particles=3),
    "amortization_gap": lambda program, x: vars(amortization_gap(program, x, **SMALL_GAP)),
    "simulation_based_calibration": lambda program, x: (
        simulation_based_calibration(program, x, num_simulations=12, num_draws=3, bins=2).ranks
    ),
    "gradient_snr": lambda program, x: gradient_snr(program, x, pv.SGVB(), num_draws=3),
}


@pytest.mark.parametrize("diagnosis", DIAGNOSES)
def test_nothing_moves_and_the_seed_decides(diagnosis):
    vae = pv.VAE(data_shape=(6,), latent_dim=2, hidden_dims=(5,)).train()
    x = torch.rand(7, 6)  # grey levels, drawn once
    pyro.param("own", torch.ones(3))

    def state():
        tensors = [torch.get_rng_state(), *vae.state_dict().values()]
        numpy_state = str(np.random.get_state())  # noqa: NPY002 - the global generator is meant
        others = [vae.training, numpy_state, random.getstate(), dict(pyro.get_param_store()).keys()]
        return [t.clone() for t in tensors], others

    tensors, others = state()
    first = DIAGNOSES[diagnosis](vae, x)
    torch.rand(5)
    torch.set_rng_state(tensors[0])
    again = DIAGNOSES[diagnosis](vae, x)
    for name, value in first.items():
        torch.testing.assert_close(value, again[name], rtol=0, atol=0, equal_nan=True)
        assert not value.requires_grad
    after, others_after = state()
    assert all(torch.equal(a, b) for a, b in zip(tensors, after, strict=True))
    assert others == others_after
    assert all(parameter.grad is None for parameter in vae.parameters())


@pytest.mark.parametrize("diagnosis", sorted(DIAGNOSES.keys() - {"gradient_snr", "active_units", "kl_per_dimension"}))
def test_global_latents_are_refused_by_name(diagnosis):
    with pytest.raises(ValueError, match=r"inside the data plate; sites outside it: \['mu'\]"):
        DIAGNOSES[diagnosis](oracles.SharedMean(5), torch.randn(5))


def test_dimensions_that_a_bayesian_decoder_ignores_are_inactive():
    vae, x = pv.VAE((6,), 2, (4,), bayesian="decoder", num_data=30), torch.rand(30, 6)
    with torch.no_grad():
        last = vae.encoder[-1]
        last.weight[0] = 3.0
        last.weight[[1, 3]] = 0.0
        last.bias[[1, 3]] = 0.0  # q(z_2 | x) = p(z_2)
    assert active_units(vae, x).active["z"].tolist() == [True, False]
    kl = kl_per_dimension(vae, x)
    assert kl.keys() == {"z"}
    assert kl["z"][1].abs() < 1e-12 < kl["z"][0]


def test_inputs_that_the_posterior_switched_off_carry_no_information():
    net = pv.bayesian(torch.nn.Linear(3, 2), prior_scale=0.7, posterior_scale=0.7)
    with torch.no_grad():
        net.module.weight[:, 1] = 0.0
    found = net.input_kl()
    assert found[1].abs() < 1e-12
    torch.testing.assert_close(found, net.module.weight.square().sum(0) / (2 * 0.7**2))
    with pytest.raises(ValueError, match="begins with a linear layer"):
        pv.bayesian(torch.nn.Conv2d(1, 1, 3)).input_kl()


def test_a_variance_needs_two_data_and_two_particles():
    with pytest.raises(ValueError, match="expected at least 2 data, got 1"):
        active_units(orthogonal(), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="num_particles: expected a whole number of at least 2, got 1"):
        active_units(orthogonal(), torch.zeros(2, 3), num_particles=1)


def test_masked_latents_have_no_gap():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(x > 0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0).mask(x > 0))

    with pytest.raises(ValueError, match=r"mask hides values of the latent sites \['z'\]"):
        amortization_gap(pv.Program(model, guide), torch.tensor([1.0, -1.0]), num_steps=2)
