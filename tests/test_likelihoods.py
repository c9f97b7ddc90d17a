"""Likelihoods against scipy's laws, quadrature, sums over all values, and arithmetic of fifty digits."""

import decimal
import json
import math
from decimal import Decimal

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats

from pyro_vae.compile import capture
from pyro_vae.distributions import DiscretizedLogisticMixture
from pyro_vae.models import likelihoods
from pyro_vae.models.likelihoods import LIKELIHOODS, Likelihood, StretchedBeta, bits_per_dim, likelihood_of
from pyro_vae.networks import GaussianMLP
from pyro_vae.programs import Program, check_program
from tests.statistics import assert_mean_close

LEVELS = torch.arange(256, dtype=torch.float64) / 255

each_name = pytest.mark.parametrize("name", LIKELIHOODS)


def close(left, right, rtol=0.0, atol=1e-12):
    torch.testing.assert_close(left, torch.as_tensor(right, dtype=left.dtype), rtol=rtol, atol=atol)


def law_of(name, *raw):
    """The law of one element, given its raw numbers."""
    return likelihood_of(name, ())(torch.tensor(raw))


def data_for(name, *shape):
    if name == "negative-binomial":
        return torch.randint(0, 20, shape).double()
    if name == "bernoulli":
        return torch.randint(0, 2, shape).double()
    return torch.randint(0, 256, shape) / 255  # with both ends among them in most


def raw_for(likelihood, *leading):
    return torch.randn(*leading, likelihood.num_parameters, *likelihood.data_shape)


# Protocol -------------------------------------------------------------------------------------------------------------


@each_name
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
@pytest.mark.parametrize("data_shape", [(4,), (2, 3), ()])
def test_shapes(name, leading, data_shape):
    likelihood, x = likelihood_of(name, data_shape), data_for(name, *data_shape)
    law = likelihood(raw_for(likelihood, *leading))
    assert (law.batch_shape, law.event_shape) == (leading, data_shape)
    assert law.mean.shape == law.variance.shape == (*leading, *data_shape)
    assert law.log_prob(x).shape == leading
    assert law.sample((5,)).shape == (5, *leading, *data_shape)
    wide = law.expand((6, *leading))
    assert wide.sample((5,)).shape == (5, 6, *leading, *data_shape)
    close(wide.log_prob(x), law.log_prob(x).expand(6, *leading))
    close(wide.mean, law.mean.expand(6, *leading, *data_shape))


@each_name
def test_each_element_is_its_own(name):
    """Particles, rows and elements one by one: the numbers of an element are those at its place, in the order of P."""
    likelihood, alone = likelihood_of(name, (2, 3)), likelihood_of(name, ())
    raw, x = raw_for(likelihood, 2, 4), data_for(name, 4, 2, 3)
    log_p = likelihood(raw).log_prob(x)
    for k, m in np.ndindex(2, 4):
        elements = [alone(raw[k, m, :, i, j]).log_prob(x[m, i, j]) for i, j in np.ndindex(2, 3)]
        close(log_p[k, m], sum(elements).item())


@each_name
def test_laws_can_be_mixed(name):
    """As a VAE with Bayesian weights does, over draws of them."""
    likelihood, x = likelihood_of(name, (3,)), data_for(name, 5, 3)
    raw = raw_for(likelihood, 5, 4)
    mixture = dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(5, 4)), likelihood(raw))
    close(mixture.log_prob(x), likelihood(raw.movedim(1, 0)).log_prob(x).logsumexp(0) - math.log(4))
    close(mixture.mean, likelihood(raw).mean.mean(1))
    assert mixture.sample((2,)).shape == (2, 5, 3)


@each_name
def test_config_builds_it_again(name):
    likelihood = likelihood_of(name, (2, 3))
    again = type(likelihood)(**json.loads(json.dumps(likelihood.config)))
    assert (
        again.config
        == likelihood.config
        == {"data_shape": (2, 3)} | ({"num_components": 5} if name == "discretized-logistic" else {})
    )
    assert (likelihood.name, again.name) == (name, None)
    assert again.num_parameters == likelihood.num_parameters
    raw, x = raw_for(likelihood, 4), data_for(name, 4, 2, 3)
    close(again(raw).log_prob(x), likelihood(raw).log_prob(x))
    assert len(likelihood.state_dict()) == (1 if name == "gaussian-shared" else 0)  # older checkpoints have none


def test_number_of_components_is_kept():
    likelihood = likelihoods.DiscretizedLogisticLikelihood((3,), num_components=2)
    assert likelihood.num_parameters == 6
    assert type(likelihood)(**likelihood.config).num_parameters == 6


def test_facts_that_others_read():
    facts = {name: (made := likelihood_of(name, (1,)), made.num_parameters, made.data_range) for name in LIKELIHOODS}
    assert {name: fact[1:] for name, fact in facts.items()} == {
        "bernoulli": (1, (0, 1)),
        "gaussian": (2, (0, 1)),
        "gaussian-shared": (1, None),
        "continuous-bernoulli": (1, (0, 1)),
        "beta": (2, (0, 1)),
        "discretized-logistic": (15, (0, 1)),
        "negative-binomial": (2, (0, math.inf)),
    }
    assert [name for name, fact in facts.items() if fact[0].num_levels is not None] == ["discretized-logistic"]
    assert facts["discretized-logistic"][0].num_levels == 256


def test_what_is_no_likelihood_is_refused():
    with pytest.raises(ValueError, match=r"likelihood: expected one of bernoulli, .*did you mean 'gaussian-shared'"):
        likelihood_of("gausian-shared", (3,))
    with pytest.raises(ValueError, match="data_shape: expected a whole number of at least 1, got 0"):
        likelihood_of("beta", (3, 0))
    with pytest.raises(ValueError, match="num_components: expected a whole number of at least 1"):
        likelihoods.DiscretizedLogisticLikelihood((3,), num_components=0)
    with pytest.raises(ValueError, match=r"raw: expected shape \(..., 2, 3, 4\), got \(5, 3, 4\)"):
        likelihood_of("beta", (3, 4))(torch.zeros(5, 3, 4))
    own = Likelihood(())
    own.num_parameters = 1
    with pytest.raises(NotImplementedError):
        own(torch.zeros(1))


@each_name
def test_recorded_as_a_graph(name):
    """Density and gradient at other inputs than those it was recorded at; a draw stays a draw."""
    likelihood = likelihood_of(name, (3,))
    raws, xs = (
        [make(i) for i in range(2)] for make in (lambda _: raw_for(likelihood, 2, 4), lambda _: data_for(name, 4, 3))
    )

    def density(raw, x):
        raw = raw.detach().requires_grad_()
        log_p = likelihood(raw).log_prob(x)
        return log_p.detach(), *torch.autograd.grad(log_p.sum(), raw), likelihood(raw.detach()).sample()

    with pyro.validation_enabled(False):
        graph = capture(density, [raws[0], xs[0]], list(likelihood.parameters()))
        for raw, x in zip(raws, xs, strict=True):
            found, expected = graph(raw, x), density(raw, x)
            for a, b in zip(found[:2], expected[:2], strict=True):
                close(a, b)
            assert found[2].shape == (2, 4, 3)
        assert graph.draws
        assert not torch.equal(graph(raws[0], xs[0])[2], graph(raws[0], xs[0])[2])


@each_name
def test_gradients_are_those_of_finite_differences(name):
    likelihood = likelihood_of(name, (3,))
    raw, x = raw_for(likelihood, 2).requires_grad_(), data_for(name, 2, 3)
    if name == "discretized-logistic":
        raw.data[:, 10:] -= 3  # scales of a few steps, too
    own = tuple(likelihood.parameters())

    def log_prob(raw, *_):
        return likelihood(raw).log_prob(x)

    assert torch.autograd.gradcheck(log_prob, (raw, *own))


EXTREMES = (0.0, 1e-3, 1.0, 10.0, 100.0, 1e4)


@each_name
def test_single_precision_is_finite_at_extremes(name):
    likelihood = likelihood_of(name, ())
    numbers = torch.tensor([sign * size for size in EXTREMES for sign in (-1, 1)], dtype=torch.float32)
    few = numbers if likelihood.num_parameters <= 2 else numbers[[0, 4, 6, 7, 10, 11]]
    grid = torch.cartesian_prod(*[few] * min(3, likelihood.num_parameters)).reshape(
        -1, min(3, likelihood.num_parameters)
    )
    raw = grid.repeat_interleave(likelihood.num_parameters // grid.shape[1], 1).requires_grad_()
    top = 1e6 if name == "negative-binomial" else 1.0
    inner = () if name == "bernoulli" else (1e3,) if name == "negative-binomial" else (128 / 255,)
    for x in (0.0, top, *inner):
        log_p = likelihood(raw).log_prob(torch.tensor(x, dtype=torch.float32))
        assert log_p.isfinite().all()
        (gradient,) = torch.autograd.grad(log_p.sum(), raw)
        assert gradient.isfinite().all()
    draws = likelihood(raw[grid[:, 0] < 50]).sample((3,))
    assert draws.dtype == torch.float32
    assert draws.isfinite().all()


# Draws, means and variances -------------------------------------------------------------------------------------------

RAW = {
    "bernoulli": [-1.0],
    "gaussian": [0.5, -2.0],
    "gaussian-shared": [3.0],
    "continuous-bernoulli": [2.0],
    "beta": [-1.0, 0.5],
    "discretized-logistic": [0.5, 0.0, -1.0, 0.2, 0.0, -0.9, -0.3, 0.5, 2.0, 0.3, -2.0, -3.0, -6.0, -1.0, 1.0],
    "negative-binomial": [1.5, 0.7],
}


def require_moments(name):
    law = law_of(name, *RAW[name])
    x, spread = law.sample((20_000,)), law.variance.sqrt().item()
    assert_mean_close(x, law.mean, min_effect=0.05 * spread)
    assert_mean_close((x - law.mean).square(), law.variance, min_effect=0.2 * spread**2)


@each_name
def test_mean_and_variance_are_those_of_draws(name):
    require_moments(name)


@each_name
def test_mean_and_variance_are_those_of_the_density(name):
    """By the density alone, so that draws and density are of one law."""
    law = law_of(name, *RAW[name])
    mean, variance = (moment(law, name, power) for power in (1, 2))
    assert mean == pytest.approx(law.mean.item(), abs=1e-6)
    assert variance - mean**2 == pytest.approx(law.variance.item(), abs=1e-6)


def moment(law, name, power):
    if name in VALUES:
        return (law.log_prob(VALUES[name]).exp() * VALUES[name] ** power).sum().item()
    return quadrature(law, lambda x: x**power)


VALUES = {
    "bernoulli": torch.tensor([0.0, 1.0], dtype=torch.float64),
    "discretized-logistic": LEVELS,
    "negative-binomial": torch.arange(4000, dtype=torch.float64),
}


def quadrature(law, function=lambda _: 1.0, limits=None):
    """The integral of a function times a density: over limits, or the support within twelve standard deviations."""
    support, spread = law.support, 12 * law.variance.sqrt().item()
    low, high = limits or (
        max(getattr(support, "lower_bound", -math.inf), law.mean.item() - spread),
        min(getattr(support, "upper_bound", math.inf), law.mean.item() + spread),
    )

    def integrand(x):
        return law.log_prob(torch.tensor(x)).exp().item() * function(x)

    return integrate.quad(integrand, low, high, points=[law.mean.item()], limit=500, epsabs=1e-10)[0]


# Densities integrate, or sum, to one ----------------------------------------------------------------------------------

DENSITIES = [
    ("gaussian", [0.0, 0.0]),
    ("gaussian", [-30.0, -100.0]),
    ("gaussian", [3.0, 100.0]),
    ("gaussian-shared", [-1e4]),
    ("continuous-bernoulli", [0.0]),
    ("continuous-bernoulli", [1e-9]),
    ("continuous-bernoulli", [0.0401]),
    ("continuous-bernoulli", [-11.0]),
    ("continuous-bernoulli", [40.0]),
    ("continuous-bernoulli", [-1e4]),
    ("beta", [1.0, 2.0]),
    ("beta", [0.5, 0.5]),
    ("beta", [1e5, 1.0]),
    ("beta", [1e5, 1e5]),
    ("beta", [3.0, 500.0]),
]


@pytest.mark.parametrize(("name", "raw"), DENSITIES)
def test_densities_integrate_to_one(name, raw):
    assert quadrature(law_of(name, *raw)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", VALUES)
def test_probabilities_sum_to_one(name):
    likelihood = likelihood_of(name, ())
    raw = 3 * raw_for(likelihood, 50)
    if name == "negative-binomial":
        raw = raw.clamp(-2, 2)  # else values beyond those that are summed
    total = likelihood(raw).log_prob(VALUES[name][:, None]).exp().sum(0)
    close(total, torch.ones(50), atol=1e-7)


def test_a_bernoulli_formula_for_grey_levels_is_rejected(monkeypatch):
    """The error that the continuous Bernoulli is there to mend: no constant, and no density."""
    planted = lambda logits, lims: dist.Bernoulli(logits=logits, validate_args=False)  # noqa: E731
    monkeypatch.setattr("pyro.distributions.ContinuousBernoulli", planted)
    law = law_of("continuous-bernoulli", 0.5)
    total = integrate.quad(lambda x: law.log_prob(torch.tensor(x)).exp().item(), 0, 1)[0]
    assert total < 0.6


def test_unbounded_logits_are_rejected(monkeypatch):
    monkeypatch.setattr(likelihoods, "_LARGEST_LOGIT", math.inf)
    with pytest.raises(AssertionError):
        test_densities_integrate_to_one("continuous-bernoulli", [-1e4])


# Each against another form --------------------------------------------------------------------------------------------


def test_bernoulli_is_pyros():
    raw, x = torch.randn(2, 4, 1, 3), data_for("bernoulli", 4, 3)
    expected = dist.Bernoulli(logits=raw.squeeze(2)).to_event(1)
    assert torch.equal(likelihood_of("bernoulli", (3,))(raw).log_prob(x), expected.log_prob(x))


def test_gaussian_is_that_of_a_gaussian_mlp():
    network, z, x = GaussianMLP(2, (4,), 6, scale_bounds=(1 / 255, 1.0)), 9 * torch.randn(50, 2), torch.rand(50, 2, 3)
    with torch.no_grad():
        network.layers[-1].weight *= 30  # so that both bounds are met
    loc, scale = network(z)
    assert (scale.min(), scale.max()) == (1 / 255, 1.0)
    expected = dist.Normal(loc.sigmoid(), scale).to_event(1).log_prob(x.flatten(1))
    found = likelihood_of("gaussian", (2, 3))(network.layers(z).reshape(50, 2, 2, 3)).log_prob(x)
    close(found, expected, rtol=1e-14)


def test_a_shared_scale_is_learned_to_be_the_root_mean_squared_error():
    """The maximum of the likelihood (arXiv:2006.13202), but for the floor, which is added."""
    likelihood, raw, x = likelihood_of("gaussian-shared", (3,)), torch.randn(50, 1, 3), 7 * torch.randn(50, 3)
    root = (raw[:, 0] - x).square().mean().sqrt()
    for factor, sign in ((1.0, 0), (1.3, -1), (0.8, 1)):
        likelihood.log_scale.data = (factor * root - 1e-4).log()
        (slope,) = torch.autograd.grad(likelihood(raw).log_prob(x).mean(), likelihood.log_scale)
        assert sign * slope > 0.1 or (sign == 0 and abs(slope) < 1e-12)
    likelihood.log_scale.data = torch.tensor(-200.0)
    assert likelihood.scale.item() == 1e-4


def langevin(t):
    """coth t - 1 / t, in fifty digits."""
    with decimal.localcontext(prec=50):
        t = Decimal(t)
        up, down = t.exp(), (-t).exp()
        return float((up + down) / (up - down) - 1 / t)


def require_continuous_bernoulli(dtype, atol, grad_atol):
    """log p = eta x - log((exp(eta) - 1) / eta), and its derivative, x less the mean (1 + langevin(eta / 2)) / 2."""
    etas = [1e-12, -1e-6, 0.003, -0.0041, 0.00399, 0.03, -0.039, 0.041, 0.3, -2.0, 6.0, 11.0, -11.9]
    raw = torch.tensor(etas, dtype=dtype)
    etas = [float(eta) for eta in raw]
    with decimal.localcontext(prec=50):
        constants = [float((((Decimal(eta)).exp() - 1) / Decimal(eta)).ln()) for eta in etas]
    means = torch.tensor([(1 + langevin(eta / 2)) / 2 for eta in etas])
    close(likelihood_of("continuous-bernoulli", ())(raw[:, None]).mean.double(), means, atol=grad_atol)
    for x in (0.0, 0.25, 1.0):
        given = raw.clone().requires_grad_()
        log_p = likelihood_of("continuous-bernoulli", ())(given[:, None]).log_prob(torch.tensor(x, dtype=dtype))
        (slope,) = torch.autograd.grad(log_p.sum(), given)
        close(log_p.detach().double(), torch.tensor(etas) * x - torch.tensor(constants), atol=atol)
        close(slope.double(), x - means, atol=grad_atol)


@pytest.mark.parametrize(("dtype", "atol", "grad_atol"), [(torch.float64, 1e-10, 1e-8), (torch.float32, 1e-3, 1e-4)])
def test_continuous_bernoulli_by_its_natural_parameter(dtype, atol, grad_atol):
    require_continuous_bernoulli(dtype, atol, grad_atol)


def test_gradients_near_a_half_by_torchs_own_cut_are_rejected(monkeypatch):
    monkeypatch.setattr(likelihoods, "_NEAR_HALF", (0.499, 0.501))
    with pytest.raises(AssertionError):
        require_continuous_bernoulli(torch.float32, 1e-3, 1e-4)


def softplus(raw):
    return math.log1p(math.exp(-abs(raw))) + max(raw, 0)


def require_beta():
    """scipy's beta law of four parameters: log densities, and shares of any stretch of [0, 1]."""
    for raw in ([0.0, 0.0], [-50.0, -50.0], [-2.0, 5.0], [700.0, 30.0], [1e6, 2e4]):
        a, b = (min(softplus(r) + 0.01, 255**2 / 8) for r in raw)
        truth = stats.beta(a, b, loc=-1 / 510, scale=256 / 255)
        law = law_of("beta", *raw)
        close(law.log_prob(LEVELS), truth.logpdf(LEVELS.numpy()), rtol=1e-9)
        for limits in ((0.0, 1.0), (0.0, 0.1), (0.7, 1.0)):
            share = truth.cdf(limits[1]) - truth.cdf(limits[0])
            if share > 1e-3:
                assert quadrature(law, limits=limits) == pytest.approx(share, abs=1e-7)


def test_beta_is_scipys_stretched():
    require_beta()


@pytest.mark.parametrize(
    ("place", "planted"),
    [
        ("softplus", torch.exp),
        ("softplus", lambda raw: raw.relu()),
        ("_CONCENTRATION_BOUNDS", (0.02, 255**2 / 8)),
        ("_HALF_STEP", 1 / 255),
        ("AffineTransform", lambda loc, scale: torch.distributions.AffineTransform(loc, 1.0)),
    ],
)
def test_another_link_or_stretch_is_rejected(monkeypatch, place, planted):
    monkeypatch.setattr(likelihoods, place, planted)
    with pytest.raises((AssertionError, ValueError)):
        require_beta()


def test_a_density_without_its_jacobian_is_rejected(monkeypatch):
    monkeypatch.setattr(StretchedBeta, "log_prob", lambda self, x: self.base_dist.log_prob(self.transforms[0].inv(x)))
    with pytest.raises(AssertionError):
        test_densities_integrate_to_one("beta", [1.0, 2.0])


def test_draws_of_a_stretched_beta_have_a_density():
    """At the ends too, where small concentrations put draws that single precision cannot tell from the end."""
    law = StretchedBeta(*torch.full((2, 2000), 0.01, dtype=torch.float32))
    x = law.sample()
    assert law.log_prob(x).isfinite().all()
    assert (x < 0).any()
    assert (x > 1).any()


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan])
def test_what_lies_outside_of_a_stretched_beta_is_refused(value):
    with pytest.raises(ValueError, match="support"):
        law_of("beta", 0.0, 0.0).log_prob(torch.tensor(value))


def require_negative_binomial():
    for log_mean, log_inverse in ([0.0, 0.0], [3.0, -2.0], [-8.0, 1.0], [6.0, 6.0], [2.0, 30.0], [2.0, -30.0]):
        theta, mean = min(max(math.exp(log_inverse), 1e-4), 1e4), math.exp(log_mean)
        x = torch.tensor([0.0, 1.0, 2.0, 17.0, 300.0])
        law = law_of("negative-binomial", log_mean, log_inverse)
        close(law.log_prob(x), stats.nbinom(theta, theta / (theta + mean)).logpmf(x.numpy()), rtol=1e-9, atol=1e-9)
        close(law.mean, mean, rtol=1e-12)
        close(law.variance, mean + mean**2 / theta, rtol=1e-12)


def test_negative_binomial_is_scipys():
    require_negative_binomial()


@pytest.mark.parametrize(
    "planted",
    [
        lambda theta, logits, real=dist.NegativeBinomial: real(theta, logits=-logits),
        lambda theta, logits, real=dist.NegativeBinomial: real(1 / theta, logits=logits),
        lambda theta, logits: dist.Poisson((logits + theta.log()).exp()),
    ],
)
def test_another_parametrisation_is_rejected(monkeypatch, planted):
    monkeypatch.setattr("pyro.distributions.NegativeBinomial", planted)
    with pytest.raises(AssertionError):
        require_negative_binomial()


# Discretised logistic laws --------------------------------------------------------------------------------------------

LOCS = (-1000.0, -0.3, 0.0, 100.5 / 255, 0.3, 1.0, 7.0, 10_000.0)
SCALES = (-20.0, -7.0, -3.0, 0.0, 5.0, 20.0)
SETTINGS = [(loc, log_scale) for loc in LOCS for log_scale in SCALES]


def one_component(loc, log_scale, dtype=torch.float64, num_levels=256):
    return DiscretizedLogisticMixture(*torch.tensor([[0.0], [loc], [log_scale]], dtype=dtype), num_levels)


def reference(loc, log_scale, levels=range(0, 256, 5)):
    """log [sigma(b) - sigma(a)] of levels, in digits enough for what cancels."""
    found = []
    with decimal.localcontext(prec=60, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN):
        scale = Decimal(float(torch.tensor(log_scale).exp())) * 255
        for k in levels:
            a, b = ((Decimal(k) + shift - Decimal(loc) * 255) / scale for shift in (Decimal("-0.5"), Decimal("0.5")))
            if a > 0:  # from the other side, where the terms are small
                lower, upper = (Decimal(0) if k == 255 else 1 / (1 + b.exp())), 1 / (1 + a.exp())
            else:
                lower = Decimal(0) if k == 0 else 1 / (1 + (-a).exp())
                upper = Decimal(1) if k == 255 else 1 / (1 + (-b).exp())
            if k == 0:
                lower, upper = Decimal(0), 1 / (1 + (-b).exp())
            found.append(float((upper - lower).ln()))
    return torch.tensor(found)


def require_masses(settings=SETTINGS):
    levels = torch.arange(0, 256, 5) / 255
    for loc, log_scale in settings:
        found = one_component(loc, log_scale).log_prob(levels)
        close(found, reference(loc, log_scale), rtol=1e-8, atol=1e-8)


def test_masses_are_exact_at_all_scales():
    require_masses()


def test_masses_sum_to_one_at_all_scales():
    for dtype, atol in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        for loc, log_scale in SETTINGS:
            total = one_component(loc, log_scale, dtype).log_prob(LEVELS.to(dtype)).exp().sum()
            close(total, 1.0, atol=atol)


def test_masses_are_scipys_logistic_law_summed_up():
    """A mixture of three, by distribution functions."""
    logits, loc, log_scale = torch.randn(3), torch.tensor([0.1, 0.6, 1.1]), torch.tensor([-2.0, -4.0, -1.0])
    edges = np.concatenate([[-np.inf], (np.arange(255) + 0.5) / 255, [np.inf]])
    masses = np.diff(stats.logistic.cdf(edges[:, None], loc.numpy(), log_scale.exp().numpy()), axis=0)
    expected = torch.from_numpy(masses) @ logits.softmax(-1)
    close(DiscretizedLogisticMixture(logits, loc, log_scale).log_prob(LEVELS).exp(), expected, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_at_all_scales(dtype):
    for loc, log_scale in SETTINGS:
        given = [
            torch.tensor([0.0, 0.5], dtype=dtype),
            torch.tensor([loc, 0.5], dtype=dtype),
            torch.tensor([log_scale, -20.0], dtype=dtype),
        ]
        given = [tensor.requires_grad_() for tensor in given]
        log_p = DiscretizedLogisticMixture(*given).log_prob(LEVELS.to(dtype))
        assert log_p.isfinite().all()
        assert all(slope.isfinite().all() for slope in torch.autograd.grad(log_p.sum(), given))


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_mean_and_variance_are_sums_over_levels_at_all_scales(dtype, atol):
    for loc, log_scale in SETTINGS:
        masses = one_component(loc, log_scale).log_prob(LEVELS).exp()
        mean = (masses * LEVELS).sum()
        law = one_component(loc, log_scale, dtype)
        close(law.mean, mean.item(), atol=atol)
        assert law.variance >= 0
        close(law.variance, (masses * (LEVELS - mean).square()).sum().item(), atol=atol)


def planted_mass(*, shift=0.5, tails=True):
    """The law by plain differences; with edges elsewhere, or without tails."""

    def log_mass(self, level):
        k, top = level[..., None], self.num_levels - 1
        edges = [(k + shift - 1 - self.loc * top), (k + shift - self.loc * top)]
        lower, upper = (torch.sigmoid(edge / (self.log_scale.exp() * top)) for edge in edges)
        if tails:
            lower, upper = lower.masked_fill(k == 0, 0.0), upper.masked_fill(k == top, 1.0)
        return (self.logits.log_softmax(-1) + (upper - lower).log()).logsumexp(-1)

    return log_mass


def test_planted_masses_are_rejected(monkeypatch):
    moderate = [(0.3, -2.0), (1.1, -1.0)]

    def plant(**how):
        monkeypatch.setattr(DiscretizedLogisticMixture, "_log_mass", planted_mass(**how))

    plant()
    require_masses(moderate)  # where plain differences will do
    with pytest.raises(AssertionError):
        require_masses()
    with pytest.raises(AssertionError):
        test_gradients_are_finite_at_all_scales(torch.float64)
    plant(shift=1.0)
    with pytest.raises(AssertionError):
        require_masses(moderate)
    with pytest.raises(AssertionError, match="mean"):
        require_frequencies()
    plant(tails=False)
    with pytest.raises(AssertionError):
        test_probabilities_sum_to_one("discretized-logistic")


def require_frequencies():
    """Draws of five levels against their masses."""
    logits, loc, log_scale = torch.tensor([[0.4, -0.5], [0.1, 1.1], [-1.5, -1.0]])
    law = DiscretizedLogisticMixture(logits, loc, log_scale, num_levels=5)
    levels = torch.arange(5) / 4
    drawn = law.sample((20_000,))
    assert_mean_close((drawn[:, None] == levels).double(), law.log_prob(levels).exp(), min_effect=0.02)


def test_draws_are_levels_with_their_masses():
    require_frequencies()


def test_parameters_are_of_levels_from_minus_one_to_one():
    """As in PixelCNN++: raw numbers are logits, then means, then log scales, of 2 x - 1."""
    raw = torch.randn(3 * 5)
    logits, loc, log_scale = raw.split(5)
    expected = DiscretizedLogisticMixture(logits, 0.5 + loc / 2, (log_scale.exp() / 2).log())
    found = likelihood_of("discretized-logistic", ())(raw)
    close(found.log_prob(LEVELS), expected.log_prob(LEVELS))


def test_parameters_of_a_mixture_broadcast():
    law = DiscretizedLogisticMixture(torch.zeros(4), torch.rand(3, 1, 4), torch.zeros(2, 1))
    assert (law.batch_shape, law.event_shape) == ((3, 2), ())
    assert law.log_prob(LEVELS[:, None, None]).shape == (256, 3, 2)
    close(law.expand((5, 3, 2)).variance[4], law.variance)


@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_support_is_the_levels(num_levels):
    law = one_component(0.2, -1.0, num_levels=num_levels)
    top = num_levels - 1
    levels = torch.arange(num_levels) / top
    assert repr(law.support) == f"levels k / {top}, k = 0, ..., {top}"
    assert law.support.is_discrete
    for dtype in (torch.float32, torch.float64):
        assert law.support.check(levels.to(dtype)).all()
    outside = torch.tensor([-1 / top, 1 + 1 / top, 0.5 / top, math.nan, math.inf])
    assert not law.support.check(outside).any()
    close(law.log_prob(levels).exp().sum(), 1.0)
    assert law.support.check(law.sample((100,))).all()


def test_levels_divided_by_256_are_refused():
    assert not one_component(0.0, 0.0).support.check(torch.arange(1, 256) / 256).any()


@pytest.mark.parametrize(
    ("value", "place"),
    [(0.1234, ""), ([0.2, 0.1234], " in row 1"), ([[[0.0, 1.0]], [[1.0, 0.1234]]], r" in row 1, element \[0, 1\]")],
)
def test_what_is_no_level_is_refused(value, place):
    said = rf"expected levels k / 255, k = 0, ..., 255, got 0.1234{place}; images of 256 levels are divided by 255"
    with pytest.raises(ValueError, match=said):
        one_component(0.0, 0.0).log_prob(torch.tensor(value))
    DiscretizedLogisticMixture(*torch.zeros(3, 1), validate_args=False).log_prob(torch.tensor(value))


def test_a_mixture_of_nothing_is_refused():
    with pytest.raises(ValueError, match="loc: expected a dimension of components"):
        DiscretizedLogisticMixture(torch.zeros(1), torch.tensor(0.0), torch.zeros(1))
    with pytest.raises(ValueError, match="num_levels: expected at least 2, got 1"):
        one_component(0.0, 0.0, num_levels=1)


# As a site of a program, and bits per dimension -----------------------------------------------------------------------


def program_of(name):
    likelihood = likelihood_of(name, (3,))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", likelihood(z[..., None].expand(*z.shape[:-1], likelihood.num_parameters, 3)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    return Program(model, guide)


@each_name
def test_a_program_observes_it(name):
    check = check_program(program_of(name), [data_for(name, 4, 3)])
    assert check.binary_arguments == ({"x"} if name == "bernoulli" else set())
    assert check.count_arguments == ({"x"} if name == "negative-binomial" else set())


@pytest.mark.parametrize(
    ("name", "said"), [("discretized-logistic", "levels k / 255"), ("negative-binomial", "lower_bound=0")]
)
def test_a_program_that_observes_other_data_says_so(name, said):
    with pytest.raises(ValueError, match=said):
        check_program(program_of(name), [torch.full((4, 3), 0.1234)])


def test_bits_per_dimension():
    uniform = (
        DiscretizedLogisticMixture(torch.zeros(1), torch.tensor([0.5]), torch.tensor([-1.2])).expand((3,)).to_event(1)
    )
    x = uniform.sample((10,))
    masses = uniform.base_dist.log_prob(x).exp()
    close(bits_per_dim(uniform.log_prob(x), 3), -masses.log2().mean(-1))
    assert bits_per_dim(-100 * math.log(256), 100) == pytest.approx(8.0)
    with pytest.raises(ValueError, match="num_dims: expected a whole number of at least 1, got 0"):
        bits_per_dim(-1.0, 0)
