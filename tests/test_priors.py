"""Priors of latents: densities by quadrature, draws against densities, the VampPrior against its mean written out."""

import copy
import json
import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.sparse import coo_array, csc_matrix, csr_array
from torch import nn
from torch.distributions import biject_to, kl_divergence

from pyro_vae.compile import capture, difference
from pyro_vae.distributions import Flow
from pyro_vae.inputs import open_inputs
from pyro_vae.models.posteriors import POSTERIORS, as_posterior
from pyro_vae.models.priors import (
    PRIORS,
    FlowPrior,
    MixtureOfGaussians,
    Prior,
    StandardNormal,
    VampPrior,
    as_prior,
    require_one_support,
)
from pyro_vae.models.vae import VAE
from pyro_vae.numerics import seeded
from pyro_vae.programs import as_program
from tests.statistics import assert_mean_close

DATA = (3,)


def close(left, right, atol=1e-12):
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


class Encoder(nn.Module):
    """q(z | x) of a family, by a linear map of data."""

    def __init__(self, latent_dim, family="diagonal"):
        super().__init__()
        small = {"hidden_dims": (6,)} if family in ("iaf", "spline") else {}
        self.posterior = POSTERIORS[family](latent_dim, **small)
        self.linear = nn.Linear(math.prod(DATA), self.posterior.num_parameters)

    def forward(self, x):
        return self.posterior(self.linear(x))


def made(name, latent_dim=2):
    """A small prior of arbitrary parameters, and the encoder that it is called with."""
    sizes = {
        "standard": {},
        "mixture": {"num_components": 4},
        "vamp": {"data_shape": DATA, "num_components": 4},
        "flow": {"num_transforms": 2, "hidden_dims": (6,)},
    }
    prior = PRIORS[name](latent_dim, **sizes[name])
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_((0.1 if name == "flow" else 0.5) * torch.randn_like(parameter))
    return prior, Encoder(latent_dim)


each = pytest.mark.parametrize("name", PRIORS)


def grid(latent_dim, points):
    """Nodes (n, J) of the trapezoidal rule over a cube, and the weight of each."""
    axis = torch.linspace(-9, 9, points if latent_dim == 2 else 10_001)
    return torch.cartesian_prod(*[axis] * latent_dim).reshape(-1, latent_dim), (axis[1] - axis[0]) ** latent_dim


@torch.no_grad()
def check_total(law, points=241):
    nodes, weight = grid(law.event_shape[0], points)
    assert (law.log_prob(nodes).exp().sum() * weight).item() == pytest.approx(1.0, abs=2e-3)


def features(z):
    """Smooth functions of draws (n, J), of which two laws that differ have other means."""
    return torch.cat([z.tanh(), (-z.square()).exp(), z.sum(-1, keepdim=True).sin()], -1)


@torch.no_grad()
def check_draws(law, n=20_000, min_effect=0.04, points=241):
    nodes, weight = grid(law.event_shape[0], points)
    truth = (law.log_prob(nodes).exp()[:, None] * features(nodes)).sum(0) * weight
    assert_mean_close(features(law.sample((n,))), truth, min_effect=min_effect)


# Density and draws ----------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("latent_dim", [1, 2])
def test_density_has_total_one_and_draws_follow_it(name, latent_dim):
    prior, encode = made(name, latent_dim)
    law = prior(encode)
    assert (law.batch_shape, law.event_shape) == ((), (latent_dim,))
    check_total(law)
    check_draws(law)


@pytest.mark.parametrize("family", ["full", "iaf", "spline"])
def test_the_vamp_prior_of_other_posteriors_has_total_one_and_draws_that_follow_it(family):
    prior, _ = made("vamp")
    law = prior(Encoder(2, family))
    check_total(law, points=121)
    check_draws(law, n=4_000, min_effect=0.08, points=121)


class Planted(Flow):
    """Without the change of volume."""

    def log_prob(self, value):
        return self.base_dist.log_prob(self.transform.inv(value))


def test_a_flow_without_its_log_determinant_is_rejected(monkeypatch):
    monkeypatch.setattr("pyro_vae.models.priors.Flow", Planted)
    with pytest.raises(AssertionError):
        check_total(made("flow")[0]())


def test_draws_of_the_wrong_component_are_rejected(monkeypatch):
    law = made("mixture")[0]()
    monkeypatch.setattr(law, "sample", lambda shape: law.component_distribution.sample(shape)[:, 0])
    with pytest.raises(AssertionError, match="mean"):
        check_draws(law)


def test_the_standard_prior_is_a_plain_normal_so_that_its_kl_has_a_closed_form():
    loc, scale = torch.randn(5, 3), torch.rand(5, 3) + 0.1
    prior = StandardNormal(3)()
    assert type(prior.base_dist) is dist.Normal
    kl = kl_divergence(dist.Normal(loc, scale).to_event(1), prior)
    close(kl, 0.5 * (scale**2 + loc**2 - 1 - 2 * scale.log()).sum(-1))  # arXiv:1312.6114, App. B
    assert not list(StandardNormal(3).state_dict())


def test_a_mixture_is_the_sum_of_its_weighted_gaussians():
    prior, _ = made("mixture", 3)
    z, weights = torch.randn(7, 3), prior.logits.softmax(0)
    scale = nn.functional.softplus(prior.raw_scale) + 1e-4
    exponents = -0.5 * ((z[:, None] - prior.loc) / scale).square().sum(-1)
    density = weights * exponents.exp() / (scale.prod(-1) * (2 * math.pi) ** 1.5)
    close(prior().log_prob(z), density.sum(-1).log())


def test_a_new_mixture_has_even_weights_and_unit_scales():
    law = MixtureOfGaussians(3, 7)()
    close(law.mixture_distribution.probs, torch.full((7,), 1 / 7))
    close(law.component_distribution.base_dist.scale, torch.ones(7, 3), atol=2e-4)


# The variational mixture of posteriors --------------------------------------------------------------------------------


def check_vamp(law, prior, encode, z):
    """arXiv:1705.07120, eq. (9), a posterior at a time."""
    densities = [encode(u[None]).log_prob(z[:, None])[:, 0].exp() for u in prior.pseudo_inputs]
    close(law.log_prob(z), (sum(densities) / len(densities)).log(), atol=1e-10)


families = pytest.mark.parametrize("family", ["diagonal", "full", "iaf", "spline", "gamma", "dirichlet"])


@families
def test_the_vamp_prior_is_the_mean_of_the_posteriors_of_its_pseudo_inputs(family):
    prior, encode = made("vamp")[0], Encoder(2, family)
    law = prior(encode)
    z = encode(torch.randn(6, 3)).sample()
    check_vamp(law, prior, encode, z)
    planted = copy.copy(law)
    planted.log_prob = lambda z: law.log_prob(z) + math.log(4)  # a sum, and no mean
    with pytest.raises(AssertionError):
        check_vamp(planted, prior, encode, z)


@families
def test_gradients_reach_pseudo_inputs_and_encoder(family):
    prior, encode = made("vamp")[0], Encoder(2, family)
    z = encode(torch.randn(6, 3)).sample()
    inputs = [prior.raw_pseudo_inputs, encode.linear.weight]
    found = torch.autograd.grad(prior(encode).log_prob(z).sum(), inputs)
    one_by_one = [encode(u[None]).log_prob(z[:, None])[:, 0] for u in prior.pseudo_inputs]
    expected = torch.autograd.grad(torch.stack(one_by_one).logsumexp(0).sum(), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.abs().max() > 1e-3
        close(ours, theirs, atol=1e-10)


def test_a_mixture_of_mixtures():
    prior, encode = made("vamp")

    def averaged(x):
        components = dist.Normal(encode.linear(x)[..., None, :2] + torch.tensor([[0.0], [1.0]]), 1.0).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(len(x), 2)), components)

    check_vamp(prior(averaged), prior, averaged, torch.randn(6, 2))


RANGES = [(0.0, 1.0), (-2.0, 3.0), (0.0, math.inf), None]


@pytest.mark.parametrize("data_range", RANGES)
def test_pseudo_inputs_stay_in_range_however_far_they_are_pushed(data_range):
    prior = VampPrior(2, DATA, 5, data_range=data_range)
    with torch.no_grad():
        prior.raw_pseudo_inputs[:2] *= -1
    low, high = data_range or (-math.inf, math.inf)
    step = torch.optim.Adam(prior.parameters(), lr=3.0)
    away = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])[:, None]
    for _ in range(50):
        step.zero_grad()
        (away * prior.pseudo_inputs).sum().backward()
        step.step()
        assert ((prior.pseudo_inputs >= low) & (prior.pseudo_inputs <= high)).all()
        assert prior.pseudo_inputs.isfinite().all()
    assert prior.pseudo_inputs.std() > 0.4


@pytest.mark.parametrize("data_range", RANGES)
def test_pseudo_inputs_begin_at_data(data_range):
    low, high = data_range or (-4.0, 4.0)
    data = low + (min(high, 9.0) - low) * torch.tensor([[0.0, 1.0, 0.5], [0.3, 0.2, 1.0]])
    prior = VampPrior(2, DATA, 2, data, data_range)
    margin = 0.01 * (1.0 if data_range is None or math.isinf(high) else high - low)
    close(prior.pseudo_inputs, data, atol=margin + 1e-12)
    (slope,) = torch.autograd.grad(prior.pseudo_inputs.sum(), prior.raw_pseudo_inputs)
    assert (slope > 0.009).all()  # binary data lie at the ends


def test_random_pseudo_inputs_begin_close_to_the_middle():
    u = VampPrior(2, (40,), 50, data_range=(2.0, 6.0)).pseudo_inputs
    assert abs(u.mean() - 4) < 0.02
    assert 0.05 < u.std() < 0.2


# Pseudo-inputs that begin at data -------------------------------------------------------------------------------------

STORED = {
    "gaussian": torch.tensor([[0, 255, 7], [90, 0, 1], [9, 12, 200], [0, 0, 0], [30, 1, 255]], dtype=torch.uint8),
    "bernoulli": torch.tensor([[0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 0], [0, 0, 1]], dtype=torch.uint8),
    "negative-binomial": torch.tensor([[0, 1, 9], [1, 0, 1], [3, 1, 0], [0, 0, 0], [0, 250, 1]], dtype=torch.uint8),
}


def vae_of(likelihood, count):
    return VAE(DATA, 2, (3,), likelihood, prior=f"vamp:{count}")


def as_read(model, data):
    """Data as training reads them."""
    return next(iter(open_inputs(as_program(model), data).tensors().rows(slice(None)).values()))


def sources(prior, x):
    """The row of x (N, ...) that each pseudo-input began at."""
    apart = (prior.pseudo_inputs[:, None] - x).abs().flatten(2).amax(-1)  # (K, N)
    nearest = apart.min(1)
    assert (nearest.values < 0.0101).all(), "some pseudo-inputs are no data"
    return nearest.indices.tolist()


def check_permutation(likelihood):
    """With as many pseudo-inputs as data, each datum is there once, away from the ends."""
    model = vae_of(likelihood, 5)
    x, end = as_read(model, STORED[likelihood]), 0.99 if model.data_range == (0.0, 1.0) else None
    for _ in range(5):
        model.prior.begin_at(STORED[likelihood])
        found = sources(model.prior, x)
        assert sorted(found) == [0, 1, 2, 3, 4]
        close(model.prior.pseudo_inputs, x[found].clamp(0.01, end))


@pytest.mark.parametrize("likelihood", STORED)
def test_pseudo_inputs_begin_at_data_as_they_are_read_in_training(likelihood):
    check_permutation(likelihood)


PLANTED = {
    "with replacement": ("torch.randperm", lambda n: torch.arange(n) // 2),
    "not drawn in": ("pyro_vae.models.priors._drawn_in", lambda data, data_range: data),
    "no levels": ("pyro_vae.models.priors._rows", lambda data, index: data[index].float()),
}


@pytest.mark.parametrize("plant", PLANTED)
def test_pseudo_inputs_that_begin_elsewhere_are_noticed(monkeypatch, plant):
    monkeypatch.setattr(*PLANTED[plant])
    with pytest.raises((AssertionError, ValueError)):
        check_permutation("gaussian")


def test_which_data_is_chance_and_torchs_generator_decides():
    data, counts = torch.rand(5, 3), torch.zeros(1500, 5)
    prior = VampPrior(2, DATA, 2)
    for drawn in counts:
        prior.begin_at(data)
        drawn[sources(prior, data)] = 1.0
    assert (counts.sum(1) == 2).all()
    assert_mean_close(counts, 2 / 5, min_effect=0.1)
    begun = []
    for _ in range(2):
        torch.manual_seed(5)
        prior.begin_at(data)
        begun.append(prior.pseudo_inputs.detach().clone())
    close(*begun, atol=0)


def test_levels_are_those_of_all_data_and_not_of_what_is_drawn():
    prior = VampPrior(2, DATA, 1)
    data = torch.ones(50, 3, dtype=torch.uint8)
    data[-1] = 200
    torch.manual_seed(0)
    prior.begin_at(data)  # most likely at a row of ones
    close(prior.pseudo_inputs, torch.full((1, 3), 0.01), atol=1e-12)  # 1 / 255, drawn in
    close(VampPrior(2, DATA, 1, torch.full((1, 3), 1 / 255)).pseudo_inputs, prior.pseudo_inputs)


FORMS = {
    "flat": lambda x: x.flatten(1),
    "array": lambda x: x.numpy(),
    "integers": lambda x: x.int(),
    "sparse array": lambda x: csr_array(x.flatten(1).numpy()),
    "sparse columns": lambda x: csc_matrix(x.flatten(1).numpy()),
    "sparse coordinates": lambda x: coo_array(x.flatten(1).numpy()),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_data_may_be_flat_or_sparse(form, dtype):
    x = torch.randint(0, 9, (6, 2, 3)).to(dtype)
    prior = VampPrior(2, (2, 3), 6, data_range=(0.0, math.inf))
    prior.begin_at(FORMS[form](x))
    assert sorted(sources(prior, x)) == list(range(6))


def test_arrays_may_be_mapped_from_files(tmp_path):
    np.save(tmp_path / "x.npy", STORED["gaussian"].numpy())
    prior = VampPrior(2, DATA, 5)
    prior.begin_at(np.load(tmp_path / "x.npy", mmap_mode="r"))
    assert sorted(sources(prior, STORED["gaussian"] / 255)) == list(range(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("data_range", RANGES)
def test_pseudo_inputs_are_set_in_place(dtype, data_range):
    prior = VampPrior(2, DATA, 4, data_range=data_range).to(dtype)
    parameter, config = prior.raw_pseudo_inputs, dict(prior.config)
    low, high = data_range or (-4.0, 4.0)
    data = low + (min(high, 9.0) - low) * torch.rand(4, 3)
    prior.begin_at(data)
    assert prior.raw_pseudo_inputs is parameter
    assert (parameter.requires_grad, parameter.dtype, parameter.grad) == (True, dtype, None)
    assert prior.config == config
    torch.manual_seed(0)
    prior.begin_at(data)
    torch.manual_seed(0)
    close(prior.pseudo_inputs, VampPrior(2, DATA, 4, data[torch.randperm(4)], data_range).to(dtype).pseudo_inputs, 1e-5)


# Shapes, precision, recording -----------------------------------------------------------------------------------------


@each
def test_a_prior_expands_to_particles_and_data(name):
    prior, encode = made(name)
    law = prior(encode)
    wide, z = law.expand((3, 5)), torch.randn(3, 5, 2)
    assert (wide.batch_shape, wide.sample().shape, wide.sample((4,)).shape) == ((3, 5), (3, 5, 2), (4, 3, 5, 2))
    assert len(wide.sample().unique(dim=1)[0]) == 5
    close(wide.log_prob(z), torch.stack([law.log_prob(row) for row in z]))


@each
def test_its_support_is_one_that_samplers_can_move_in(name):
    prior, encode = made(name)
    z = torch.randn(5, 2)
    close(biject_to(prior(encode).support)(z), z)


@each
@pytest.mark.parametrize("latent_dim", [1, 3])
def test_in_single_precision_densities_and_gradients_are_finite(name, latent_dim):
    prior, encode = (module.float() for module in made(name, latent_dim))
    z = 30 * torch.randn(2_000, latent_dim, dtype=torch.float32)
    z.requires_grad_()
    law = prior(encode)
    density = law.log_prob(z)
    slopes = torch.autograd.grad(density.sum(), [z, *prior.parameters()])
    assert density.dtype == law.sample().dtype == torch.float32
    assert all(part.isfinite().all() for part in (density, law.sample((2_000,)), *slopes))


@each
def test_a_prior_can_be_recorded(name):
    prior, encode = made(name)

    def densities(z):
        law = prior(encode).expand(z.shape[:1])
        value = law.log_prob(z)
        return value, law.sample(), *torch.autograd.grad(value.sum(), [z, *prior.parameters()])

    z = torch.randn(6, 2, requires_grad=True)
    with dist.validation_enabled(False):
        graph = capture(densities, [z])
        other = torch.randn(6, 2, requires_grad=True)
        with seeded(1):
            expected = densities(other)
        with seeded(1):
            assert difference(graph(other), expected) < 1e-10


# Arguments ------------------------------------------------------------------------------------------------------------


@each
def test_config_and_state_build_it_again(name):
    prior, encode = made(name)
    again = type(prior)(**json.loads(json.dumps(prior.config)))
    again.load_state_dict(prior.state_dict())
    z = torch.randn(4, 2)
    for other in (again, copy.deepcopy(prior)):
        close(other(encode).log_prob(z), prior(encode).log_prob(z), 0)
        assert other.config.keys() == prior.config.keys()


@each
def test_by_name_or_as_it_is(name):
    prior = as_prior(name, 2, DATA)
    assert (type(prior), prior.latent_dim, prior.name) == (PRIORS[name], 2, name)
    own = made(name)[0]
    assert as_prior(own, 2, DATA) is own
    assert own.name is None


@pytest.mark.parametrize(("name", "count"), [("mixture:3", 3), ("vamp:7", 7), ("vamp:1", 1)])
def test_a_number_of_components_behind_the_name(name, count):
    prior = as_prior(name, 2, DATA)
    assert (type(prior), prior.name) == (PRIORS[name.split(":")[0]], name)
    assert prior.config["num_components"] == count
    model = VAE(DATA, 2, (3,), prior=name)
    again = VAE(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    assert again.config == model.config


def test_the_vamp_prior_by_name_knows_the_data():
    prior = as_prior("vamp", 2, DATA, (0.0, 255.0))
    assert prior.pseudo_inputs.shape == (500, 3)
    assert prior.config["data_range"] == (0.0, 255.0)
    assert as_prior("vamp", 2, DATA, None).pseudo_inputs.std() < 0.2


@pytest.mark.parametrize("family", ["diagonal", "full", "spline", "student-t", "gamma", "dirichlet"])
def test_standard_means_the_posteriors_own_standard_prior(family):
    posterior = POSTERIORS[family](2)
    prior = as_prior("standard", 2, DATA, posterior=posterior)
    z = posterior(torch.randn(5, posterior.num_parameters)).sample()
    close(prior().log_prob(z), posterior.prior().log_prob(z))
    assert prior.name == "standard"
    assert not list(prior.state_dict())
    assert not list(prior.children())  # the posterior's parameters are not there twice


@pytest.mark.parametrize("name", ["mixture", "flow"])
@pytest.mark.parametrize("family", ["gamma", "beta", "dirichlet", "laplace", "full", "iaf"])
def test_a_prior_and_a_posterior_have_one_support(name, family):
    prior, posterior = as_prior(name, 2, (4,))(), as_posterior(family, 2)
    law = posterior(torch.zeros(1, posterior.num_parameters))
    if family in ("laplace", "full", "iaf"):
        require_one_support(prior, law)
    else:
        with pytest.raises(ValueError, match="prior: expected one on the support of the posterior"):
            require_one_support(prior, law)
    require_one_support(posterior.prior(), law)


def test_an_end_of_an_interval_more_or_less_is_one_support():
    positive, nonnegative = dist.LogNormal(torch.zeros(2), 1.0).to_event(1), dist.Gamma(torch.ones(2), 1.0).to_event(1)
    require_one_support(nonnegative, positive)
    with pytest.raises(ValueError, match="prior: expected one on the support"):
        require_one_support(dist.Beta(torch.ones(2), 1.0).to_event(1), positive)


def test_a_module_that_follows_the_protocol_will_do():
    class Own(nn.Module):
        latent_dim = 3

        def forward(self, encode=None):
            return dist.Laplace(torch.zeros(3), 1.0).to_event(1)

    own = Own()
    assert as_prior(own, 3, DATA) is own


U = torch.full((5, 3), 0.5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: as_prior("vamo", 2, DATA),
            "prior: expected one of standard, mixture, vamp, flow, got 'vamo'; .* 'vamp'",
        ),
        (lambda: as_prior("vamo:3", 2, DATA), "prior: expected one of standard, mixture, vamp, flow, got 'vamo'"),
        (
            lambda: as_prior("flow:3", 2, DATA),
            'prior: expected a number of components of a mixture or a vamp, "vamp:100"',
        ),
        (lambda: as_prior("standard:3", 2, DATA), "prior: expected a number of components of .*, got 'standard:3'"),
        (lambda: as_prior("vamp:", 2, DATA), "prior: expected a number of components of .*, got 'vamp:'"),
        (lambda: as_prior("vamp:3:4", 2, DATA), "prior: expected a number of components of .*, got 'vamp:3:4'"),
        (lambda: as_prior("vamp:0", 2, DATA), "num_components: expected a whole number of at least 1, got 0"),
        (lambda: as_prior(StandardNormal(2), 3, DATA), "prior: expected one of 3 latent dimensions, got 2"),
        (lambda: as_prior(7, 3, DATA), "prior: expected one of standard, .*, or a module with a latent_dim, got 7"),
        (lambda: as_prior(nn.Linear(2, 2), 2, DATA), "or a module with a latent_dim, got Linear"),
        (lambda: StandardNormal(0), "latent_dim: expected a whole number of at least 1, got 0"),
        (lambda: MixtureOfGaussians(2, 0), "num_components: expected a whole number of at least 1, got 0"),
        (lambda: FlowPrior(2, 0), "num_transforms: expected a whole number"),
        (lambda: FlowPrior(2, hidden_dims=(3, 1.5)), "hidden_dims: expected a whole number"),
        (lambda: VampPrior(2, (3, 0)), "data_shape: expected a whole number"),
        (lambda: VampPrior(2, DATA, 5, U[:4]), r"pseudo_inputs: expected shape \(5, 3\), got \(4, 3\)"),
        (lambda: VampPrior(2, DATA, 5, U + 1), "pseudo_inputs: expected values from 0 to 1, got 1.5 to 1.5"),
        (lambda: VampPrior(2, DATA, 5, U * math.nan), "pseudo_inputs: expected values from 0 to 1, got nan"),
        (lambda: VampPrior(2, DATA, 5, data_range=(1, 0)), r"data_range: expected a finite least .*, got \(1, 0\)"),
        (lambda: VampPrior(2, DATA, 5, data_range=(-math.inf, 0)), "data_range: expected a finite least value"),
        (lambda: VampPrior(2, DATA, 5).begin_at(U[:4]), "data: expected at least 5, one for each pseudo-input, got 4"),
        (
            lambda: VampPrior(2, DATA, 5).begin_at(U[:, :2]),
            r"data: expected shape \(N, 3\) or as many .*, got \(5, 2\)",
        ),
        (lambda: VampPrior(2, DATA, 5).begin_at(csr_array((5, 4))), r"data: expected shape .*, got \(5, 4\)"),
        (lambda: VampPrior(2, DATA, 5).begin_at(U - 1), "data: expected values from 0 to 1, got -0.5 to -0.5"),
        (lambda: VampPrior(2, DATA, 5).begin_at(U * math.nan), "data: expected values from 0 to 1, got nan"),
        (lambda: VampPrior(2, DATA, 5)(), "encode: expected the encoder, .*, got None"),
        (lambda: VampPrior(2, DATA, 5)(Encoder(3)), r"encode: expected a posterior of shape \(5, 2\) .*, got \(5, 3\)"),
        (lambda: Prior(2)(), None),
    ],
)
def test_errors(make, said):
    with pytest.raises(NotImplementedError if said is None else ValueError, match=said):
        make()
