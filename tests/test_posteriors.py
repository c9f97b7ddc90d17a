"""Families of posteriors: densities, draws and reparameterised gradients against quadrature; flows against inverses."""

import copy
import itertools
import json
import math
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae.compile import capture, difference
from pyro_vae.distributions import Flow
from pyro_vae.models import posteriors
from pyro_vae.models.posteriors import (
    FAMILIES,
    POSTERIORS,
    FamilyPosterior,
    FlowPosterior,
    FullGaussian,
    Posterior,
    as_posterior,
)
from pyro_vae.networks import GaussianMLP
from pyro_vae.numerics import seeded
from pyro_vae.programs import log_weights
from tests.statistics import assert_mean_close

FLOWS = ("iaf", "spline")
REAL = ("diagonal", "laplace", "logistic", "student-t", "gumbel", "cauchy")
POSITIVE = ("exponential", "log-normal", "gamma")
UNIT = ("kumaraswamy", "beta", "dirichlet")  # a Dirichlet vector of two is one number


def close(left, right, atol=1e-12):
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


def made(name, latent_dim=2):
    """A small family, of arbitrary parameters if it has any."""
    sizes = {"hidden_dims": (6,)} if name in FLOWS else {}
    return POSTERIORS[name](latent_dim, **sizes)


def least_dim(name):
    return 2 if name == "dirichlet" else 1


each = pytest.mark.parametrize("name", POSTERIORS)
each_family = pytest.mark.parametrize("name", FAMILIES)
each_flow = pytest.mark.parametrize("name", FLOWS)


# The catalogue, one number at a time ----------------------------------------------------------------------------------


def test_the_paper_s_catalogue_is_there():
    assert set(REAL + POSITIVE + UNIT) == FAMILIES.keys() == POSTERIORS.keys() - {"full", *FLOWS}


def nodes(name):
    """Values over the support and their weights in the trapezoidal rule, of a change of variable that decays fast."""
    half = 5.0 if name in REAL and name not in ("student-t", "cauchy") else 34.0
    y, step = torch.linspace(-half, half, 40_001), half / 20_000
    if name in REAL:
        z, slope = y.sinh(), y.cosh()
    elif name in POSITIVE:
        z, slope = y.exp(), y.exp()
    else:
        z, slope = y.sigmoid(), y.sigmoid() * (-y).sigmoid()
    return torch.stack([z, 1 - z], -1) if name == "dirichlet" else z[:, None], slope * step


def feature(z):
    """A smooth function of latents (..., J), of the first one."""
    return (0.7 * z[..., 0] - 0.6).tanh()


def expectation(name, law, function):
    z, weights = nodes(name)
    return (law.log_prob(z).exp() * weights * function(z)).sum()


def raw_of(name):
    """Numbers of one datum, far enough from 0 to tell them apart."""
    return torch.tensor([0.6, 0.9, 1.7, -0.4][: POSTERIORS[name](least_dim(name)).num_parameters], requires_grad=True)


def check_total(name, law):
    assert expectation(name, law, lambda z: torch.ones(len(z))).item() == pytest.approx(1.0, abs=1e-5)


def check_gradient(name, n=20_000):
    """E_q[f(z)] and its gradient: of draws, and of the integral."""
    raw, posterior = raw_of(name), POSTERIORS[name](least_dim(name))
    value = expectation(name, posterior(raw), feature)
    (slope,) = torch.autograd.grad(value, raw)
    many = raw.detach().expand(n, -1).clone().requires_grad_()
    drawn = feature(posterior(many).rsample())
    (slopes,) = torch.autograd.grad(drawn.sum(), many)
    assert slope.abs().min() > 0.01
    assert_mean_close(drawn, value, min_effect=0.03)
    assert_mean_close(feature(posterior(raw.detach()).sample((n,))), value, min_effect=0.03)
    assert_mean_close(slopes, slope, min_effect=0.03)


@each_family
def test_density_has_total_one(name):
    posterior = POSTERIORS[name](least_dim(name))
    check_total(name, posterior(raw_of(name)))
    check_total(name, posterior.prior())


@each_family
def test_draws_and_their_gradients_have_the_densitys_means(name):
    check_gradient(name)


class Detached(dist.Laplace):
    def rsample(self, sample_shape=()):
        return self.loc + (super().rsample(sample_shape) - self.loc).detach()


class Wider(dist.Gamma):
    def rsample(self, sample_shape=()):
        return 1.05 * super().rsample(sample_shape)


@pytest.mark.parametrize(("name", "planted"), [("laplace", Detached), ("gamma", Wider)])
def test_draws_that_are_not_the_densitys_are_rejected(monkeypatch, name, planted):
    family = FAMILIES[name]
    monkeypatch.setitem(FAMILIES, name, posteriors.Family(planted, family.maps, family.standard))
    with pytest.raises(AssertionError, match="mean"):
        check_gradient(name)


def test_a_density_that_lacks_a_factor_is_rejected(monkeypatch):
    class Planted(posteriors._LogNormal):
        def log_prob(self, value):
            return super().log_prob(value) + value.log()

    family = FAMILIES["log-normal"]
    monkeypatch.setitem(FAMILIES, "log-normal", posteriors.Family(Planted, family.maps, family.standard))
    with pytest.raises(AssertionError):
        test_density_has_total_one("log-normal")


def test_the_diagonal_gaussian_is_that_of_the_gaussian_mlp():
    network, x = GaussianMLP(4, (6,), 3), torch.randn(7, 5, 4)
    law = POSTERIORS["diagonal"](3)(network.layers(x))
    loc, scale = network(x)
    close(law.base_dist.loc, loc, 0)
    close(law.base_dist.scale, scale, 0)
    assert type(law.base_dist) is dist.Normal


STANDARD = {
    "laplace": lambda: dist.Laplace(0.0, 1.0),
    "logistic": lambda: dist.Logistic(0.0, 1.0),
    "student-t": lambda: dist.StudentT(5.0, 0.0, 1.0),
    "gumbel": lambda: dist.Gumbel(0.0, 1.0),
    "cauchy": lambda: dist.Cauchy(0.0, 1.0),
    "exponential": lambda: dist.Exponential(1.0),
    "log-normal": lambda: dist.LogNormal(0.0, 1.0),
    "gamma": lambda: dist.Gamma(1.0, 1.0),
    "kumaraswamy": lambda: dist.Uniform(0.0, 1.0),
    "beta": lambda: dist.Uniform(0.0, 1.0),
    **dict.fromkeys(("diagonal", "full", "iaf", "spline"), lambda: dist.Normal(0.0, 1.0)),
}


@pytest.mark.parametrize("name", STANDARD)
def test_standard_priors(name):
    prior, posterior = POSTERIORS[name](3).prior(), made(name, 3)
    z = posterior(torch.randn(9, posterior.num_parameters)).sample()
    assert (prior.batch_shape, prior.event_shape) == ((), (3,))
    close(prior.log_prob(z), STANDARD[name]().log_prob(z).sum(-1))


def test_the_standard_prior_on_the_simplex_is_uniform():
    z = POSTERIORS["dirichlet"](4)(torch.randn(9, 4)).sample()
    close(POSTERIORS["dirichlet"](4).prior().log_prob(z), torch.full((9,), math.log(6)))


CLOSED = ("diagonal", "laplace", "gumbel", "cauchy", "exponential", "log-normal", "gamma", "beta", "dirichlet")


@pytest.mark.parametrize("name", CLOSED)
def test_the_kl_divergence_is_closed_where_torch_has_it(name):
    posterior = POSTERIORS[name](least_dim(name))
    q, p = posterior(raw_of(name)), posterior.prior()
    by_quadrature = expectation(name, q, lambda z: q.log_prob(z) - p.log_prob(z))
    close(kl_divergence(q, p), by_quadrature, atol=1e-5)


@pytest.mark.parametrize("name", sorted(POSTERIORS.keys() - {*CLOSED, "full"}))
def test_it_is_sampled_elsewhere(name):
    posterior = made(name)
    with pytest.raises(NotImplementedError):
        kl_divergence(posterior(torch.randn(5, posterior.num_parameters)), posterior.prior())


def test_kumaraswamy_agrees_with_torch_within_the_interval():
    a, b = torch.rand(50) * 4 + 0.3, torch.rand(50) * 4 + 0.3
    ours, theirs, z = posteriors._Kumaraswamy(a, b), torch.distributions.Kumaraswamy(a, b), torch.rand(50)
    close(ours.log_prob(z), theirs.log_prob(z), atol=1e-9)
    close(ours.expand((3, 50)).mean, theirs.mean.expand(3, 50))


def test_concentrations_at_their_floor_leave_few_draws_at_the_ends_in_single_precision():
    """Draws are clamped to what float32 has between the ends; the mean of log q shows whether that matters."""
    for name in ("gamma", "kumaraswamy", "beta", "dirichlet"):
        posterior = POSTERIORS[name](2).float()
        law = posterior(torch.full((50_000, posterior.num_parameters), -20.0, dtype=torch.float32))
        exact = law.entropy()
        found = -law.log_prob(law.sample()).double()
        error = found.std() / len(found) ** 0.5
        assert abs(found.mean() - exact.double().mean()) < 5 * error + 0.1, name


# Full covariance ------------------------------------------------------------------------------------------------------


def test_the_full_gaussian_by_its_dense_formula():
    raw = torch.randn(5, 9)
    law = FullGaussian(3)(raw)
    lower = torch.zeros(5, 3, 3)
    for place, (i, j) in enumerate([(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]):
        number = raw[:, 3 + place]
        lower[:, i, j] = number if i > j else number.exp().log1p() + 1e-4
    close(law.loc, raw[:, :3], 0)
    close(law.covariance_matrix, lower @ lower.mT)
    z = law.rsample((4,))
    covariance, gap = lower @ lower.mT, z - raw[:, :3]
    squares = (gap[..., None, :] @ covariance.inverse() @ gap[..., None]).squeeze(-1).squeeze(-1)
    close(law.log_prob(z), -0.5 * (squares + covariance.logdet() + 3 * math.log(2 * math.pi)), atol=1e-7)


def check_full_kl(found, q, prior):
    """Of two Gaussians, by dense matrices."""
    p = dist.MultivariateNormal(prior.base_dist.loc, prior.base_dist.variance.diag_embed())
    precision, gap = p.covariance_matrix.inverse(), p.loc - q.loc
    trace = (precision @ q.covariance_matrix).diagonal(dim1=-2, dim2=-1).sum(-1)
    squares = (gap[..., None, :] @ precision @ gap[..., None]).squeeze(-1).squeeze(-1)
    close(found, 0.5 * (trace + squares - 3 + p.covariance_matrix.logdet() - q.covariance_matrix.logdet()), atol=1e-9)
    close(found, torch.distributions.kl_divergence(q, p), atol=1e-9)


def test_kl_of_full_from_diagonal_gaussians():
    q = FullGaussian(3)(torch.randn(5, 9))
    for prior in (FullGaussian(3).prior(), dist.Normal(torch.randn(5, 3), torch.rand(5, 3) + 0.1).to_event(1)):
        kl = kl_divergence(q, prior)
        check_full_kl(kl, q, prior)
        close(kl_divergence(q.expand((2, 5)), prior.expand((2, 5))), kl.expand(2, 5))
        with pytest.raises(AssertionError):
            check_full_kl(kl + 2 * q.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1), q, prior)
    with pytest.raises(NotImplementedError):
        kl_divergence(q, dist.Laplace(torch.zeros(3), 1.0).to_event(1))


# Flows ----------------------------------------------------------------------------------------------------------------


def grid(half=9.0, points=321):
    axis = torch.linspace(-half, half, points)
    return torch.cartesian_prod(axis, axis), (axis[1] - axis[0]) ** 2


@torch.no_grad()
def check_flow(law, n=20_000):
    """Of two latents: the integral of the density, and draws against it."""
    z, weight = grid()
    density = law.log_prob(z).exp() * weight
    assert density.sum().item() == pytest.approx(1.0, abs=2e-3)
    parts = [lambda z: z.tanh(), lambda z: (-z.square()).exp(), lambda z: z.prod(-1, keepdim=True).tanh()]
    for part in parts:
        assert_mean_close(part(law.sample((n,))), (density[:, None] * part(z)).sum(0), min_effect=0.04)


def flow_law(name, latent_dim=2, batch=()):
    posterior = made(name, latent_dim)
    raw = torch.tensor([0.4, -0.3, 0.2, -0.5, 0.9, -1.1])[: 3 * latent_dim]
    return posterior(raw + 0.3 * torch.randn(*batch, 3 * latent_dim) if batch else raw)


@each_flow
def test_a_flow_has_total_one_and_draws_that_follow_its_density(name):
    check_flow(flow_law(name))


@each_flow
def test_a_flow_is_not_gaussian(name):
    z = flow_law(name).sample((20_000,))
    z = (z - z.mean(0)) / z.std(0)
    moments = torch.cat([z**3, z**4 - 3, z[:, :1] ** 2 * z[:, 1:]], -1)
    assert ((moments.mean(0) / (moments.std(0) / 20_000**0.5)).abs() > 6).any()


class Planted(Flow):
    """Without the change of volume."""

    def log_prob(self, value):
        return self.base_dist.log_prob(self.transform.inv(value))


@each_flow
def test_a_flow_without_its_log_determinant_is_rejected(monkeypatch, name):
    monkeypatch.setattr(posteriors, "Flow", Planted)
    with pytest.raises(AssertionError):
        check_flow(flow_law(name))


@each_flow
def test_the_density_of_a_flow_of_one_latent(name):
    law = flow_law(name, 1)
    z = torch.linspace(-12, 12, 20_001)[:, None]
    assert (law.log_prob(z).exp().sum() * 24 / 20_000).item() == pytest.approx(1.0, abs=1e-6)
    draws = law.rsample((5,))
    close(law.log_prob(draws), law.log_prob(draws.clone()), atol=1e-8)


def total(log_prob, z):
    return log_prob.sum() + z.sin().sum()


@each_flow
@pytest.mark.parametrize("latent_dim", [1, 2, 4])
def test_a_draws_own_density_is_that_of_the_inverse_in_value_and_gradient(name, latent_dim):
    posterior = made(name, latent_dim)
    raw = torch.randn(5, posterior.num_parameters, requires_grad=True)
    inputs = [raw, *posterior.parameters()]

    def both(clone):
        with seeded(3):
            law = posterior(raw)
            z = law.rsample((6,))
        log_prob = law.log_prob(z.clone() if clone else z)
        return log_prob, *torch.autograd.grad(total(log_prob, z), inputs)

    for ours, theirs in zip(both(clone=False), both(clone=True), strict=True):
        close(ours, theirs, atol=1e-8)


def inverses(law, monkeypatch):
    """How often a law's transform is inverted from now on."""
    counted = []
    inv = type(law.transform).inv
    monkeypatch.setattr(type(law.transform), "inv", property(lambda self: counted.append(1) or inv.fget(self)))
    return counted


@each_flow
def test_a_draws_own_density_needs_no_inverse(monkeypatch, name):
    law = flow_law(name, 2, (5,))
    counted = inverses(law, monkeypatch)
    z = law.rsample()
    law.log_prob(z)
    with torch.no_grad():
        assert not law.log_prob(z).requires_grad
        law.log_prob(law.sample((3,)))
    assert not counted
    law.log_prob(z)
    assert counted  # it is not the last draw


@each_flow
def test_a_draw_without_gradients_has_a_density_with_them(name):
    posterior = made(name)
    raw = torch.randn(5, posterior.num_parameters, requires_grad=True)
    inputs = [raw, *posterior.parameters()]
    law = posterior(raw)
    z = law.sample()
    log_prob = law.log_prob(z)
    slopes = torch.autograd.grad(log_prob.sum(), inputs)
    expected = posterior(raw).log_prob(z.clone())
    close(log_prob, expected)
    for ours, theirs in zip(slopes, torch.autograd.grad(expected.sum(), inputs), strict=True):
        close(ours, theirs)
        assert ours.abs().max() > 0
    with torch.no_grad():
        known = law.log_prob(law.sample())
    assert not known.requires_grad


@each_flow
def test_a_density_kept_without_gradients_is_noticed(name, monkeypatch):
    drawn = Flow.rsample

    def planted(self, sample_shape=()):
        value = drawn(self, sample_shape)
        object.__setattr__(self._drawn, "graded", True)
        return value

    monkeypatch.setattr(Flow, "rsample", planted)
    with pytest.raises(RuntimeError, match="does not require grad"):
        test_a_draw_without_gradients_has_a_density_with_them(name)


@each_flow
def test_the_density_of_fewer_dimensions_than_the_batch_has(name):
    law, z = flow_law(name, 2, (5,)), torch.randn(2)
    close(law.log_prob(z), law.log_prob(z.expand(5, 2)))
    one = flow_law(name, 1, (5,))
    close(one.log_prob(z[:1]), one.log_prob(z[:1].expand(5, 1)))


def test_an_inverse_autoregressive_flow_reverses_its_order():
    """z_1 of the first transform is a function of e_1 and the context; the second goes the other way round."""
    posterior = FlowPosterior(3, "iaf", num_transforms=1, hidden_dims=(12,))
    noise = torch.randn(3)
    transform = posterior.transform(torch.randn(3))
    jacobian = torch.autograd.functional.jacobian(transform, noise)
    close(jacobian.triu(1), torch.zeros(3, 3), 0)
    assert jacobian.tril(-1).abs().sum() > 0
    assert posterior.num_parameters == 9
    both = FlowPosterior(3, "iaf", num_transforms=2, hidden_dims=(12,)).transform(torch.randn(3))
    assert torch.autograd.functional.jacobian(both, noise).triu(1).abs().sum() > 0


@each_flow
def test_the_context_matters(name):
    posterior = FlowPosterior(2, name, hidden_dims=(6,), context_dim=5)
    raw = torch.randn(9, requires_grad=True)
    (slope,) = torch.autograd.grad(posterior(raw).log_prob(torch.zeros(2)), raw)
    assert posterior.num_parameters == 9
    assert (slope.abs() > 0).all()


def test_importing_the_package_leaves_validation_on():
    """zuko switches torch's off for the whole process."""
    code = "import torch, pyro_vae.distributions as d; assert torch.distributions.Distribution._validate_args"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# All of them ----------------------------------------------------------------------------------------------------------


@each
def test_shapes_and_particles(name):
    posterior = made(name, 3)
    raw = torch.randn(5, posterior.num_parameters)
    law = posterior(raw)
    assert isinstance(posterior, Posterior)
    assert law.has_rsample
    assert (law.batch_shape, law.event_shape) == ((5,), (3,))
    assert posterior(raw[0]).rsample((2,)).shape == (2, 3)
    wide = law.expand((4, 5))
    z = wide.rsample()
    assert (wide.batch_shape, z.shape) == ((4, 5), (4, 5, 3))
    assert (z[0] != z[1]).all()
    rows = torch.stack([posterior(raw[m]).log_prob(z[:, m]) for m in range(5)], 1)
    close(wide.log_prob(z), rows, atol=1e-9)
    assert posterior(raw.expand(2, 4, 5, -1)).rsample().shape == (2, 4, 5, 3)
    assert (law.support.check(z)).all()


@each
@pytest.mark.parametrize("latent_dim", [2, 3])
def test_in_single_precision_everything_is_finite_at_extreme_numbers(name, latent_dim):
    posterior = made(name, latent_dim).float()
    signs = itertools.product([-20.0, 20.0], repeat=min(posterior.num_parameters, 6))
    corners = torch.tensor(list(signs), dtype=torch.float32)
    rest = torch.full((len(corners), posterior.num_parameters - corners.shape[1]), 20.0, dtype=torch.float32)
    raw = torch.cat([corners, rest], -1).requires_grad_()
    law = posterior(raw)
    z = law.rsample((200_000 // len(raw) // (10 if name in FLOWS else 1),))
    log_prob = law.log_prob(z)
    (slope,) = torch.autograd.grad(log_prob.sum() + (z / 1e30).sum(), raw)
    assert z.dtype == log_prob.dtype == torch.float32
    again = law.sample((200,))
    assert all(part.isfinite().all() for part in (z, log_prob, slope, again, law.log_prob(again)))
    assert law.support.check(z).all()
    for draws in (z, again):
        assert name not in POSITIVE + UNIT or (draws > 0).all()
        assert name not in UNIT or (draws < 1).all()


def test_torchs_own_kumaraswamy_would_not_be_finite():
    a = torch.full((2_000_000,), 20.0, dtype=torch.float32, requires_grad=True)
    z = dist.Kumaraswamy(a, a, validate_args=False).rsample()
    (slope,) = torch.autograd.grad(z.sum(), a)
    assert not slope.isfinite().all()


@each
def test_a_posterior_can_be_recorded(name):
    posterior = made(name)
    parameters = list(posterior.parameters())

    def results(raw):
        law = posterior(raw).expand((2, 5))
        z = law.rsample()
        log_prob = law.log_prob(z)
        return z, log_prob, *torch.autograd.grad(total(log_prob, z), [raw, *parameters])

    raw, other = (torch.randn(5, posterior.num_parameters, requires_grad=True) for _ in range(2))
    with dist.validation_enabled(False):
        graph = capture(results, [raw])
        with seeded(1):
            expected = results(other)
        with seeded(1):
            assert difference(graph(other), expected) < 1e-10


class Toy(nn.Module):
    """A program of a posterior, whose latents make the mean of two numbers."""

    def __init__(self, name):
        super().__init__()
        self.posterior = made(name)
        self.encoder = nn.Linear(2, self.posterior.num_parameters)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.posterior.prior())
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("toy", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(self.encoder(x)))


@each
def test_log_weights_of_particles(name):
    toy, x = Toy(name), torch.randn(5, 2)
    weights = log_weights(toy.model, toy.guide, (x,), num_particles=3, reparameterized=True)
    z = weights.latents["z"]
    law = toy.posterior(toy.encoder(x))
    close(weights.log_guide["z"], law.log_prob(z), atol=1e-9)
    close(weights.log_prior["z"], toy.posterior.prior().log_prob(z))
    again = log_weights(toy.model, toy.guide, (x,), num_particles=3, latents={"z": z.detach()})
    close(again.log_w, weights.log_w, atol=1e-9)


@each_flow
@pytest.mark.parametrize("objective", [pv.SGVB(3), pv.IWAE(3), pv.DReG(3), pv.ReweightedWakeSleep(3)])
def test_a_flow_is_trained_by_every_objective(name, objective):
    toy, x = Toy(name), torch.randn(20, 2)
    before = objective.bound(toy.model, toy.guide, x).mean()
    svi = SVI(toy.model, toy.guide, pyro.optim.Adam({"lr": 0.02}), objective)
    for _ in range(40):
        svi.step(x)
    assert objective.bound(toy.model, toy.guide, x).mean() > before


@pytest.mark.parametrize("name", ["full", "diagonal"])
def test_estimator_b_takes_the_kl_of_a_full_gaussian(name):
    toy, x = Toy(name), torch.randn(5, 2)
    weights = log_weights(toy.model, toy.guide, (x,), num_particles=3, analytic_kl=True)
    assert weights.analytic_kl["z"].shape == (3, 5)
    assert not weights.log_guide


# Arguments ------------------------------------------------------------------------------------------------------------


@each
def test_config_and_state_build_it_again(name):
    posterior = made(name)
    config = json.loads(json.dumps(posterior.config))
    raw = torch.randn(4, posterior.num_parameters)
    z = posterior(raw).sample()
    for again in (type(posterior)(**config), POSTERIORS[name](**config), copy.deepcopy(posterior)):
        again.load_state_dict(posterior.state_dict())
        close(again(raw).log_prob(z), posterior(raw).log_prob(z), 0)
        assert again.config == posterior.config


@each
def test_by_name_or_as_it_is(name):
    posterior = as_posterior(name, 3)
    assert (posterior.latent_dim, posterior.name) == (3, name)
    own = made(name)
    assert as_posterior(own, 2) is own
    assert own.name is None


def test_a_posterior_moves_to_another_precision_with_its_prior():
    posterior = POSTERIORS["gumbel"](3).float()
    assert posterior.prior().sample().dtype == torch.float32
    assert not list(posterior.state_dict())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: as_posterior("lapalce", 2), "posterior: expected one of diagonal, .*, spline, got .* mean 'laplace'"),
        (lambda: as_posterior(FullGaussian(2), 3), "posterior: expected one of 3 latent dimensions, got 2"),
        (lambda: as_posterior(nn.Linear(2, 2), 2), "posterior: .* or a module with a latent_dim, got Linear"),
        (lambda: FamilyPosterior(2, "normal"), "family: expected one of diagonal, laplace"),
        (lambda: FamilyPosterior(0), "latent_dim: expected a whole number of at least 1, got 0"),
        (lambda: FamilyPosterior(1, "dirichlet"), "latent_dim: expected a whole number of at least 2, got 1"),
        (lambda: FullGaussian(0.5), "latent_dim: expected a whole number"),
        (lambda: FlowPosterior(2, "maf"), "flow: expected one of iaf, spline, got 'maf'"),
        (lambda: FlowPosterior(2, num_transforms=0), "num_transforms: expected a whole number"),
        (lambda: FlowPosterior(2, hidden_dims=(0,)), "hidden_dims: expected a whole number"),
        (lambda: FlowPosterior(2, context_dim=0), "context_dim: expected a whole number of at least 1, got 0"),
        (lambda: FullGaussian(2)(torch.zeros(5, 4)), r"raw: expected shape \(..., 5\), got \(5, 4\)"),
        (lambda: Flow(dist.Normal(0.0, 1.0), []), r"base_dist: expected a law of event shape \(J,\), got \(\)"),
    ],
)
def test_errors(make, said):
    with pytest.raises(ValueError, match=said):
        make()
