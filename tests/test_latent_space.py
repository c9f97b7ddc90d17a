"""Latents as real vectors: densities with their Jacobians against quadrature and by hand, data that stay apart."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from scipy import integrate, stats
from torch import nn

import pyro_vae as pv
from pyro_vae.programs import (
    LatentSpace,
    as_program,
    check_program,
    draw_prior,
    guide_of,
    log_guide,
    log_weights,
    model_parameters,
)
from tests import oracles

X = torch.tensor([0.7, 2.0, -0.4], dtype=torch.float64)
COUNTS = torch.tensor([0.0, 3.0, 5.0], dtype=torch.float64)


def close(left, right, atol=1e-10):
    torch.testing.assert_close(torch.as_tensor(left), torch.as_tensor(right), rtol=0, atol=atol)


def log_normal(value, loc, scale):
    return -0.5 * ((value - loc) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)


# One dimension: the integral over u is p(x) ---------------------------------------------------------------------------


def one_latent(prior, likelihood):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(torch.zeros(())))
            pyro.sample("x", likelihood(z), obs=x)

    return model


def noisy(z):
    return dist.Normal(z, 0.5)


def expected_evidence(prior, log_likelihood, support, x):
    def one(value):
        return integrate.quad(lambda z: prior.pdf(z) * np.exp(log_likelihood(value, z)), *support, limit=200)[0]

    return torch.tensor([math.log(one(value)) for value in x.tolist()])


def normal_likelihood(x, z):
    return stats.norm(z, 0.5).logpdf(x)


ONE_DIMENSION = {  # prior, likelihood, data; scipy's prior, log likelihood, support
    "log-normal": (
        lambda o: dist.LogNormal(o + 0.2, 0.7), noisy, X,
        stats.lognorm(0.7, scale=math.exp(0.2)), normal_likelihood, (0, np.inf),
    ),
    "gamma": (
        lambda o: dist.Gamma(o + 2.0, 1.5), dist.Poisson, COUNTS,
        stats.gamma(2.0, scale=1 / 1.5), lambda x, z: stats.poisson(z).logpmf(x), (0, np.inf),
    ),
    "beta": (
        lambda o: dist.Beta(o + 2.0, 3.0), lambda z: dist.Binomial(5, z), COUNTS,
        stats.beta(2.0, 3.0), lambda x, z: stats.binom(5, z).logpmf(x), (0, 1),
    ),
    "uniform": (lambda o: dist.Uniform(o - 1.0, 2.0), noisy, X, stats.uniform(-1, 3), normal_likelihood, (-1, 2)),
    "half a line": (lambda o: dist.Pareto(o + 1.0, 3.0), noisy, X, stats.pareto(3.0), normal_likelihood, (1, np.inf)),
    "normal": (lambda o: dist.Normal(o + 0.3, 1.2), noisy, X, stats.norm(0.3, 1.2), normal_likelihood, (-9, 9)),
}  # fmt: skip


def integral(space, u):
    """log of the integral of exp(log_joint) over the grid of points u (K, M, J)."""
    with torch.no_grad():
        spacing = [axis.unique().diff().mean() for axis in u[:, 0].T]
        return space.density(u).log_joint.logsumexp(0) + torch.stack(spacing).log().sum()


def grid(num_data, *axes):
    return torch.cartesian_prod(*axes).reshape(-1, 1, len(axes)).expand(-1, num_data, -1)


@pytest.mark.parametrize("name", ONE_DIMENSION)
def test_the_density_integrates_to_the_evidence(name):
    prior, likelihood, x, law, log_likelihood, support = ONE_DIMENSION[name]
    space = LatentSpace(one_latent(prior, likelihood), None, (x,))
    assert (space.dim, space.sites) == (1, ["z"])
    u, truth = grid(len(x), torch.linspace(-40, 40, 8001)), expected_evidence(law, log_likelihood, support, x)
    close(integral(space, u), truth, atol=1e-6)
    density = space.density(u)
    without = (density.log_likelihood + density.log_prior).logsumexp(0) + math.log(0.01)
    if name != "normal":  # planted: no Jacobian
        assert ((without - truth).abs() > 0.1).any()


def test_programs_that_loop_over_particles_integrate_too():
    prior, likelihood, x, law, log_likelihood, support = ONE_DIMENSION["log-normal"]
    program = pv.Program(one_latent(prior, likelihood), vectorize=False)
    found = integral(LatentSpace(program.model, None, (x,)), grid(3, torch.linspace(-6, 6, 401)))
    close(found, expected_evidence(law, log_likelihood, support, x), atol=1e-6)


def test_a_support_that_depends_on_another_latent():
    """a ~ Gamma(2, 1), b ~ U(0, a), x ~ N(b, 0.5^2)."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Gamma(torch.tensor(2.0), 1.0))
            b = pyro.sample("b", dist.Uniform(torch.zeros_like(a), a))
            pyro.sample("x", dist.Normal(b, 0.5), obs=x)

    def one(x):
        def integrand(a):
            return stats.gamma(2).pdf(a) / a * (stats.norm(0, 0.5).cdf(x) - stats.norm(0, 0.5).cdf(x - a))

        return math.log(integrate.quad(integrand, 0, np.inf)[0])

    space = LatentSpace(model, None, (X,))
    found = integral(space, grid(3, torch.linspace(-15, 6, 211), torch.linspace(-30, 30, 401)))
    close(found, torch.tensor([one(x) for x in X.tolist()]), atol=1e-5)
    assert space.sites == ["a", "b"]


def test_a_dirichlet_has_one_dimension_less():
    """z ~ Dirichlet(a), x ~ Categorical(z): p(x = k) = a_k / sum a."""
    alpha = torch.tensor([1.5, 2.0, 0.8])

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Categorical(pyro.sample("z", dist.Dirichlet(alpha))), obs=x)

    space = LatentSpace(model, None, (torch.tensor([0, 1, 2, 1]),))
    assert space.dim == 2
    axis = torch.linspace(-40, 40, 801)
    close(integral(space, grid(4, axis, axis)), (alpha / alpha.sum())[[0, 1, 2, 1]].log(), atol=1e-5)


# Any layout, by hand --------------------------------------------------------------------------------------------------


def inner_plate(x):
    """Data (M, 2) at dimension -2, two latents each in a plate to the right."""
    with pyro.plate("data", len(x), dim=-2), pyro.plate("time", 2, dim=-1):
        z = pyro.sample("z", dist.LogNormal(torch.zeros(()), 0.7))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def outer_plate(x):
    """Data at dimension -1, the other plate to the left."""
    with pyro.plate("data", len(x), dim=-1), pyro.plate("time", 2, dim=-2):
        z = pyro.sample("z", dist.LogNormal(torch.zeros(()), 0.7))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x.T)


def one_event(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(torch.zeros(2), 0.7).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def beside_a_plate(x):
    """The latent's plate of the data is at -2, with nothing at -1."""
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.LogNormal(torch.zeros(1, 2), 0.7).to_event(1))
        with pyro.plate("time", 2, dim=-1):
            pyro.sample("x", dist.Normal(z[..., 0, :], 0.5), obs=x)


def subsampled(x):
    with pyro.plate("data", 100, subsample_size=len(x)):
        z = pyro.sample("z", dist.LogNormal(torch.zeros(2), 0.7).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def with_a_deterministic(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(torch.zeros(2), 0.7).to_event(1))
        loc = pyro.deterministic("loc", z, event_dim=1)
        pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)


def several(x):
    """A scalar, an event and a plate to the left; the order is the model's."""
    with pyro.plate("data", len(x), dim=-1):
        a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
        b = pyro.sample("b", dist.LogNormal(torch.zeros(2), 0.7).to_event(1))
        with pyro.plate("time", 2, dim=-2):
            c = pyro.sample("c", dist.Normal(a, 0.9))
            loc = c + torch.stack([b[..., 0], b[..., 1]], -2).reshape(*c.shape[:-2], 2, len(x))
            pyro.sample("x", dist.Normal(loc, 0.5), obs=x.T)


MASK = torch.tensor([[True, True], [True, False], [False, False]])


def masked(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(torch.zeros(2), 0.7).mask(MASK).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).mask(MASK).to_event(1), obs=x)


def masked_by_a_handler(x):
    with pyro.plate("data", len(x), dim=-2), pyro.plate("time", 2, dim=-1), poutine.mask(mask=MASK):
        z = pyro.sample("z", dist.LogNormal(torch.zeros(()), 0.7))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def scaled(x):
    with pyro.plate("data", len(x)):
        with poutine.scale(scale=0.3):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(2), 0.7).to_event(1))
        with poutine.scale(scale=2.0):
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def two_by_hand(u, x):
    """log z = u is normal: the density of u needs no Jacobian."""
    return log_normal(u, 0.0, 0.7), log_normal(x, u.exp(), 0.5)


def several_by_hand(u, x):
    a, b, c = u[..., :1], u[..., 1:3], u[..., 3:]
    prior = log_normal(a, 0.0, 1.0).sum(-1) + log_normal(b, 0.0, 0.7).sum(-1) + log_normal(c, a, 0.9).sum(-1)
    return prior + log_normal(x, c + b.exp(), 0.5).sum(-1)


def scaled_by_hand(u, x):
    """The scale is the density's; the map's Jacobian is not scaled."""
    prior, likelihood = two_by_hand(u, x)
    return (0.3 * (prior - u) + u + 2.0 * likelihood).sum(-1)


PLAIN = [inner_plate, outer_plate, one_event, beside_a_plate, subsampled, with_a_deterministic]
BY_HAND = {model: lambda u, x: sum(two_by_hand(u, x)).sum(-1) for model in PLAIN} | {
    several: several_by_hand,
    masked: lambda u, x: (sum(two_by_hand(u, x)) * MASK).sum(-1),
    masked_by_a_handler: lambda u, x: (sum(two_by_hand(u, x)) * MASK).sum(-1),
    scaled: scaled_by_hand,
}
ROWS = torch.tensor([[0.5, 1.5], [2.0, -0.3], [1.0, 0.2]], dtype=torch.float64)
each_layout = pytest.mark.parametrize("model", BY_HAND, ids=lambda model: model.__name__)


def deeper_guide(x):
    """Its plates reach one dimension further to the left than any model's here."""
    with pyro.plate("further", 4, dim=-3):
        pyro.sample("noise", dist.Normal(torch.zeros(()), 1.0), infer={"is_auxiliary": True})


def space_of(model, how="plain"):
    if how == "loop":
        return LatentSpace(pv.Program(model, vectorize=False).model, None, (ROWS,))
    return LatentSpace(model, deeper_guide if how == "deeper guide" else None, (ROWS,))


def vectors(space, num_particles=4):
    return 0.8 * torch.randn(num_particles, 3, space.dim)


@each_layout
@pytest.mark.parametrize("how", ["plain", "loop", "deeper guide"])
def test_densities_by_hand(model, how):
    space = space_of(model, how)
    u = vectors(space)
    close(space.density(u).log_joint, BY_HAND[model](u, ROWS))
    assert space.density(u).log_joint.shape == (4, 3)


@each_layout
@pytest.mark.parametrize("how", ["plain", "loop", "deeper guide"])
def test_there_and_back(model, how):
    space = space_of(model, how)
    u = vectors(space)
    close(space.from_latents(space.density(u).latents), u)
    if model is scaled:
        with pytest.raises(ValueError, match="site 'z' has its prior scaled"):
            space.draw_prior(5)
        return
    drawn = space.draw_prior(5)
    assert drawn.shape == (5, 3, space.dim)
    assert len(drawn.unique()) == drawn.numel()
    assert not drawn.requires_grad


@each_layout
def test_particles_come_out_one_by_one_as_together(model):
    space = space_of(model)
    u = vectors(space)
    together, alone = space.density(u), [space.density(u[k : k + 1]) for k in range(4)]
    for name in ("log_joint", "log_likelihood", "log_prior", "log_det"):
        close(torch.cat([getattr(d, name) for d in alone]), getattr(together, name), atol=1e-13)


@each_layout
def test_a_datum_has_its_own_vector_and_no_other(model):
    space = space_of(model)
    u = vectors(space).requires_grad_()
    log_joint = space.density(u).log_joint
    (gradient,) = torch.autograd.grad(log_joint[:, 1].sum(), u)
    assert (gradient[:, [0, 2]] == 0).all()
    assert (gradient[:, 1] != 0).any()
    changed = u.detach().clone()
    changed[:, 1] += 1.0
    difference = space.density(changed).log_joint - log_joint
    assert (difference[:, [0, 2]] == 0).all()
    assert (difference[:, 1] != 0).all()


def test_gradients_reach_theta():
    model = pv.LinearGaussian(*oracles.example())
    x, u = oracles.example_data(3), torch.randn(5, 3, 2)
    LatentSpace(model.model, model.guide, (x,)).density(u).log_joint.sum().backward()
    residual = x - (u @ model.weight.T + model.bias)
    close(model.bias.grad, (residual / oracles.NOISE**2).sum((0, 1)).detach())


@pytest.mark.parametrize("as_dict", [False, True])
def test_covariates_by_position_and_by_name(as_dict):
    def model(x, shift):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)

    shift = torch.tensor([1.0, -2.0, 0.0])
    args, kwargs = ((), {"shift": shift, "x": X}) if as_dict else ((X, shift), {})
    u = torch.randn(4, 3, 1)
    found = LatentSpace(model, None, args, kwargs).density(u).log_joint
    close(found, log_normal(u[..., 0], 0, 1) + log_normal(X, u[..., 0] + shift, 1))


def test_building_a_space_draws_nothing():
    state = torch.get_rng_state()
    space_of(several)
    assert torch.equal(torch.get_rng_state(), state)


# The guide in the same space ------------------------------------------------------------------------------------------


def log_normal_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.LogNormal(0.2 * x, 0.4).to_event(1))


@pytest.mark.parametrize("vectorize", [True, False])
def test_the_guides_density_is_that_of_the_log_weights_and_the_map(vectorize):
    program = pv.Program(one_event, log_normal_guide, vectorize=vectorize)
    space = LatentSpace(program.model, program.guide, (ROWS,))
    weights = log_weights(program.model, program.guide, (ROWS,), num_particles=6)
    u = space.from_latents(weights.latents)
    close(u, weights.latents["z"].log().reshape(6, 3, 2))
    density = space.density(u)
    close(space.log_guide(density), weights.log_q.reshape(6, 3) + u.sum(-1))
    close(space.log_guide(density), log_normal(u, 0.2 * ROWS, 0.4).sum(-1))
    close(density.log_joint - space.log_guide(density), weights.log_w.reshape(6, 3))
    terms = log_guide(program.model, program.guide, (ROWS,), None, weights.latents)
    close(terms["z"], weights.log_guide["z"])


def test_draws_of_the_guide_are_the_guides():
    space = LatentSpace(one_event, log_normal_guide, (ROWS,))
    drawn = space.draw_guide(4000)
    for m in range(3):
        assert stats.kstest(drawn[:, m, 0], stats.norm(0.2 * ROWS[m, 0].item(), 0.4).cdf).pvalue > 1e-4


def test_the_density_of_an_automatic_guide_is_not_known_but_its_draws_are():
    guide = AutoNormal(one_event)
    guide(ROWS)
    space = LatentSpace(one_event, guide, (ROWS,))
    drawn = space.draw_guide(7)
    assert drawn.shape == (7, 3, 2)
    with pytest.raises(ValueError, match=r"auxiliary sites \['z_unconstrained'\]"):
        space.log_guide(space.density(drawn))


def test_without_a_guide():
    space = LatentSpace(one_event, None, (ROWS,))
    for ask in (lambda: space.draw_guide(2), lambda: space.log_guide(space.density(vectors(space)))):
        with pytest.raises(ValueError, match="program with a guide"):
            ask()
    program = pv.Program(one_event)
    assert not program.has_guide
    assert guide_of(program) is None
    assert repr(program) == "Program(model=one_event)"
    with pytest.raises(ValueError, match="this program has no guide"):
        program.guide(ROWS)
    assert check_program(program, (ROWS,)).batch_size == 3
    full = as_program(pv.LinearGaussian(torch.ones(3, 1)))
    assert guide_of(full) == full.guide


def test_a_program_without_guide_that_cannot_broadcast_is_told_so():
    model, _ = oracles.without_broadcasting()
    with pytest.raises(ValueError, match="not with a plate of particles"):
        check_program(pv.Program(model), (oracles.example_data(),))
    check_program(pv.Program(model, vectorize=False), (oracles.example_data(),))


# Draws of the prior ---------------------------------------------------------------------------------------------------


def hierarchy(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Gamma(torch.tensor(2.0), 1.5))
        b = pyro.sample("b", dist.Uniform(torch.zeros_like(a), a))
        pyro.sample("x", dist.Normal(b, 0.01), obs=x)


@pytest.mark.parametrize("vectorize", [True, False])
def test_draws_of_the_prior_have_its_law_whatever_is_observed(vectorize):
    count = 4000 if vectorize else 400
    program = pv.Program(hierarchy, vectorize=vectorize)
    drawn = draw_prior(program.model, None, (X,), num_particles=count)
    a, ratio = drawn["a"].flatten(), (drawn["b"] / drawn["a"]).flatten()
    assert drawn["a"].shape == (count, 3)
    assert stats.kstest(a, stats.gamma(2, scale=1 / 1.5).cdf).pvalue > 1e-4
    assert stats.kstest(ratio, stats.uniform.cdf).pvalue > 1e-4
    assert stats.kstest(a, stats.gamma(2, scale=1.0).cdf).pvalue < 1e-4  # planted: a rate left out
    assert stats.spearmanr(a, ratio).pvalue > 1e-4


# Refusals -------------------------------------------------------------------------------------------------------------


def coin(x):
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(pyro.sample("heads", dist.Bernoulli(torch.tensor(0.5))), 1.0), obs=x)


def fixed(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.sample("point", dist.Delta(torch.ones(2)).to_event(1)).sum(-1), 1.0), obs=x)


def shared(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def on_a_sphere(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.sample("arrow", dist.ProjectedNormal(torch.ones(3))).sum(-1), 1.0), obs=x)


def nothing_hidden(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(torch.zeros(()), 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (coin, "continuous latents, but site 'heads' is drawn from Bernoulli"),
        (fixed, "site 'point' is drawn from Delta"),
        (shared, "site 'mu' is outside the data plate"),
        (on_a_sphere, "ProjectedNormal, the distribution of site 'arrow'"),
        (nothing_hidden, "latent sites, got one that only observes"),
    ],
)
def test_what_has_no_vector_per_datum_is_refused_by_name(model, said):
    with pytest.raises(ValueError, match=said):
        LatentSpace(model, None, (X,))


def test_an_observation_outside_the_data_plate_is_refused_by_name():
    def model(x):
        pyro.sample("weather", dist.Normal(torch.zeros(()), 1.0), obs=torch.ones(()))
        normal = one_latent(lambda o: dist.Normal(o, 1.0), noisy)
        normal(x)

    space = LatentSpace(model, None, (X,))
    with pytest.raises(ValueError, match=r"outside it: \['weather'\]"):
        space.density(torch.zeros(1, 3, 1))


# Whose a parameter is -------------------------------------------------------------------------------------------------


def test_the_models_parameters_are_those_its_density_depends_on():
    vae = pv.VAE((6,), 2, (5,))
    program = as_program(vae)
    x = torch.bernoulli(torch.full((4, 6), 0.5))
    program.model(x)
    program.guide(x)
    named = program.named_parameters()
    state = torch.get_rng_state()
    found = model_parameters(program, named, (x,))
    assert torch.equal(torch.get_rng_state(), state)
    assert found == {name for name in named if name.startswith("decoder")}
    assert all(tensor.grad is None for tensor in named.values())


def test_shared_parameters_are_the_models_and_auxiliary_guides_have_their_own():
    both, own = nn.Linear(1, 1), nn.Linear(1, 1)

    def model(x):
        pyro.module("both", both)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(both(z[..., None])[..., 0], 1.0), obs=x)

    def guide(x):
        pyro.module("both", both)
        pyro.module("own", own)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(own(both(x[:, None]))[:, 0], 1.0))

    program = pv.Program(model, guide)
    program.guide(X)
    program.model(X)
    named = program.named_parameters()
    assert model_parameters(program, named, (X,)) == {name for name in named if name.startswith("both")}

    automatic = pv.Program(model, AutoNormal(model))
    automatic.guide(X)
    automatic.model(X)
    named = automatic.named_parameters()
    assert len(named) == 4
    assert model_parameters(automatic, named, (X,)) == {name for name in named if "both" in name}
