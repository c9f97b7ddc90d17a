"""The hierarchical VAE against dense Gaussians where it is linear, and against formulas written out where it is not."""

import copy
import itertools
import json
import math
import warnings
from typing import NamedTuple

import pyro.distributions as dist
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import programs
from pyro_vae.models import hierarchical, priors
from pyro_vae.models.hierarchical import HierarchicalVAE, precision_weighted
from pyro_vae.models.likelihoods import LIKELIHOODS, Likelihood
from pyro_vae.models.priors import PRIORS, FlowPrior, Prior, VampPrior
from pyro_vae.training import compiled
from tests.oracles import Gaussian, elbo
from tests.statistics import assert_mean_close
from tests.training.test_resume import assert_same

GUIDES = hierarchical.GUIDES
D, M = 3, 4

each_guide = pytest.mark.parametrize("guide", GUIDES)
each_depth = pytest.mark.parametrize("num_layers", [1, 2, 3])


def close(left, right, atol=1e-10):
    torch.testing.assert_close(torch.as_tensor(left), torch.as_tensor(right), rtol=0, atol=atol)


# A linear hierarchy is jointly Gaussian -------------------------------------------------------------------------------


class Map(NamedTuple):
    """The law N(weight y + bias, diag(scale)^2) of a vector given another, y."""

    weight: Tensor
    bias: Tensor
    scale: Tensor

    @property
    def cov(self):
        return torch.diag(self.scale**2)


class FixedScale(Likelihood):
    """p(x | z_1) with the standard deviations given."""

    num_parameters, data_range = 1, None

    def __init__(self, scale):
        super().__init__(scale.shape)
        self.register_buffer("scale", scale)

    def _elements(self, raw):
        return dist.Normal(raw[0], self.scale)


def random_map(out_dim, in_dim, diagonal=False):
    weight = torch.diag(0.6 + 0.4 * torch.rand(out_dim)) if diagonal else 0.7 * torch.randn(out_dim, in_dim)
    return Map(weight, 0.5 * torch.randn(out_dim), 0.7 + 0.3 * torch.rand(out_dim))


def markov(links):
    """The joint of a Gaussian Markov chain in its order, of (weight, offset (..., n), covariance) of each link."""
    size, means, roots = sum(len(cov) for _, _, cov in links), [], []
    for weight, offset, cov in links:
        before = sum(map(len, roots))
        own = torch.zeros(len(cov), size)
        own[:, before : before + len(cov)] = torch.linalg.cholesky(cov)
        roots.append(own + weight @ roots[-1] if roots else own)
        means.append(means[-1] @ weight.T + offset if means else offset)
    leading = torch.broadcast_shapes(*(mean.shape[:-1] for mean in means))
    return Gaussian.of_noise(torch.cat([mean.expand(*leading, -1) for mean in means], -1), torch.cat(roots))


class Linear:
    """A HierarchicalVAE without hidden layers whose scales are constant, with its dense joint and its dense guide.

    ``maps`` leads from z_1 to x, from z_2 to z_1 and so on; ``guide_maps`` from x to z_1, and from z_l (bottom-up) or
    from x again (top-down) to the others.
    """

    def __init__(self, num_layers, guide, diagonal=False, prior="standard"):
        dims = (D,) * (num_layers + 1) if diagonal else (D, 2, 4, 2)[: num_layers + 1]
        self.kind, self.dims = guide, dims
        maps = [random_map(low, high, diagonal) for low, high in itertools.pairwise(dims)]
        sources = dims if guide == "bottom-up" else (D,) * num_layers
        guide_maps = [random_map(high, low) for high, low in zip(dims[1:], sources, strict=False)]
        self.model = HierarchicalVAE((D,), dims[1:], (), guide, FixedScale(maps[0].scale), prior=prior)
        put(self.model.decoder[0], maps[0].weight, maps[0].bias)
        for network, wanted in zip(self.model.down, maps[1:], strict=True):
            put_moments(network, wanted)
        self.put_guide(guide_maps)

    def put_guide(self, guide_maps):
        for network, wanted in zip(self.model.moments, guide_maps, strict=True):
            put_moments(network, wanted)

    @property
    def maps(self):
        decoder = self.model.decoder[0]
        first = Map(decoder.weight, decoder.bias, self.model.likelihood.scale)
        return [first, *map(map_of, self.model.down)]

    @property
    def guide_maps(self):
        return [map_of(network) for network in self.model.moments]

    @property
    def top(self):
        """Mean and covariance of each component of p(z_L)."""
        if not isinstance(self.model.prior, VampPrior):
            return [(torch.zeros(self.dims[-1]), torch.eye(self.dims[-1]))]
        last = self.guide_maps[-1]
        return [(u @ last.weight.T + last.bias, last.cov) for u in self.model.prior.pseudo_inputs]

    @property
    def joints(self):
        """Of (z_L, ..., z_1, x), for each component of p(z_L)."""
        links = [(m.weight, m.bias, m.cov) for m in reversed(self.maps)]
        return [markov([(None, *component), *links]) for component in self.top]

    @property
    def joint(self):
        """That of the only one."""
        (joint,) = self.joints
        return joint

    def evidence(self, x):
        """Log p(x), (M,)."""
        terms = torch.stack([joint.last(D).log_prob(x) for joint in self.joints])
        return terms.logsumexp(0) - math.log(len(terms))

    def posterior(self, x):
        """q(z | x), in the guide's order."""
        maps = self.guide_maps
        if self.kind == "bottom-up":
            first = (None, x @ maps[0].weight.T + maps[0].bias, maps[0].cov)
            return markov([first] + [(m.weight, m.bias, m.cov) for m in maps[1:]])
        links = [(None, x @ maps[-1].weight.T + maps[-1].bias, maps[-1].cov)]
        for prior, seen in reversed([*zip(self.maps[1:], maps[:-1], strict=True)]):
            gain, cov = bayes(prior.cov, seen.cov)
            rest = torch.eye(len(gain)) - gain
            message = x @ seen.weight.T + seen.bias
            links.append((rest @ prior.weight, message @ gain.T + prior.bias @ rest.T, cov))
        return markov(links)

    def split(self, z):
        """The latents by site of vectors in the guide's order."""
        sizes = self.dims[1:] if self.kind == "bottom-up" else self.dims[:0:-1]
        return dict(zip(self.order, z.split(sizes, -1), strict=True))

    @property
    def order(self):
        names = [f"z_{number}" for number in range(1, len(self.dims))]
        return names if self.kind == "bottom-up" else names[::-1]

    def set_exact(self):
        """The exact posterior as guide; it factorises where every weight is diagonal."""
        joint = self.joint
        starts = [*itertools.accumulate((0, *self.dims[::-1]))]
        places = [torch.arange(low, high) for low, high in itertools.pairwise(starts)][::-1]  # of x, z_1, ..., z_L
        if self.kind == "bottom-up":
            found = [conditional(joint, above, below) for below, above in itertools.pairwise(places)]
        else:
            found = [inverted(conditional(joint, places[0], place)) for place in places[1:-1]]
            found.append(conditional(joint, places[-1], places[0]))
        self.put_guide(found)
        return self


def bayes(prior_cov, noise_cov):
    """Gain and covariance of the posterior of z ~ N(., prior_cov) given z + noise: from their dense joint."""
    n = len(prior_cov)
    links = [(None, torch.zeros(n), prior_cov), (torch.eye(n), torch.zeros(n), noise_cov)]
    law = markov(links).given_last(torch.eye(n))
    return law.mean.T, law.cov


def conditional(joint, places, given):
    index = torch.cat([places, given])
    part = Gaussian(joint.mean[index], joint.cov[index][:, index])
    law = part.given_last(torch.cat([torch.zeros(1, len(given)), torch.eye(len(given))]))
    close(law.cov, law.cov.diagonal().diag())  # or else no diagonal guide is exact
    return Map((law.mean[1:] - law.mean[0]).T, law.mean[0], law.cov.diagonal().sqrt())


def inverted(given):
    """A diagonal likelihood of z, N(y; weight z + bias, scale^2), as moments that are linear in y."""
    gain = given.weight.diagonal()
    return Map(torch.diag(1 / gain), -given.bias / gain, given.scale / gain)


@torch.no_grad()
def put(linear, weight, bias):
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)


def put_moments(network, wanted):
    put(
        network.layers[-1],
        torch.cat([wanted.weight, torch.zeros_like(wanted.weight)]),
        torch.cat([wanted.bias, 2 * wanted.scale.log()]),
    )


def map_of(network):
    weight, bias = network.layers[-1].weight, network.layers[-1].bias
    half = len(bias) // 2
    return Map(weight[:half], bias[:half], (0.5 * bias[half:]).exp())


def data(num_data=M):
    return 1.5 * torch.randn(num_data, D)


# Densities ------------------------------------------------------------------------------------------------------------


@each_guide
@each_depth
def test_densities_are_those_of_the_dense_gaussians(num_layers, guide):
    toy, x = Linear(num_layers, guide), data()
    z = torch.randn(2, M, sum(toy.dims[1:]))
    latents = toy.split(z)
    weights = pv.log_weights(toy.model.model, toy.model.guide, (x,), num_particles=2, latents=latents)
    assert list(weights.latents) == toy.order
    downwards = [latents[f"z_{number}"] for number in range(num_layers, 0, -1)]
    close(weights.log_joint, toy.joint.log_prob(torch.cat([*downwards, x.expand(2, M, D)], -1)))
    close(weights.log_q, toy.posterior(x).log_prob(z))


def test_the_merge_is_the_normalised_product_of_two_densities():
    one, other, z = (torch.randn(5), torch.rand(5)), (torch.randn(5), torch.rand(5)), torch.randn(100, 5)
    merged = dist.Normal(*precision_weighted(one, other))
    ratio = dist.Normal(*one).log_prob(z) + dist.Normal(*other).log_prob(z) - merged.log_prob(z)
    close(ratio, ratio[:1].expand_as(ratio))
    close(precision_weighted(other, one)[0], merged.loc)


@pytest.mark.parametrize("scales", [(1e-25, 1e-25), (1e-25, 1.0), (1.0, 1e-25), (1e25, 1e25), (1e25, 1.0)])
def test_the_merge_in_single_precision(scales):
    """Precisions of these scales lie beyond its range."""
    moments = [(torch.tensor(loc), torch.tensor(scale)) for loc, scale in zip((0.3, -0.8), scales, strict=True)]
    single = [tuple(part.float().requires_grad_() for part in pair) for pair in moments]
    found, expected = precision_weighted(*single), precision_weighted(*moments)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)
    slopes = torch.autograd.grad(sum(found), [part for pair in single for part in pair])
    assert all(slope.isfinite() for slope in slopes)


# The exact posterior --------------------------------------------------------------------------------------------------

OBJECTIVES = {
    "sgvb": pv.SGVB,
    "iwae": pv.IWAE,
    "dreg": pv.DReG,
    "stl": lambda k: pv.DReG(k, "stl"),
}


def check_exact(num_layers, guide):
    toy, x = Linear(num_layers, guide, diagonal=True).set_exact(), data()
    truth = toy.joint.last(D).log_prob(x)
    weights = pv.log_weights(toy.model.model, toy.model.guide, (x,), num_particles=7)
    close(weights.log_w, truth.expand(7, M))
    for make in OBJECTIVES.values():
        close(make(3).bound(toy.model.model, toy.model.guide, x), truth)


@each_guide
@each_depth
def test_the_exact_posterior_gives_the_evidence_without_variance(num_layers, guide):
    check_exact(num_layers, guide)


@each_guide
@each_depth
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_at_the_exact_posterior_is_minus_the_evidence(num_layers, guide, objective):
    """Of a bottom-up guide the mean of log q - log p of a layer below the top is no divergence: it may be negative."""
    toy, x = Linear(num_layers, guide, diagonal=True).set_exact(), data()
    truth = toy.joint.last(D).log_prob(x).sum()
    for _ in range(10):
        close(OBJECTIVES[objective](1).differentiable_loss(toy.model.model, toy.model.guide, x), -truth)


def merged_by_variances(one, other):
    """The bug: variances in the place of precisions."""
    (loc, scale), (other_loc, other_scale) = one, other
    total = scale**2 + other_scale**2
    return (loc * scale**2 + other_loc * other_scale**2) / total, precision_weighted(one, other)[1]


def test_a_merge_by_variances_is_noticed(monkeypatch):
    monkeypatch.setattr(hierarchical, "precision_weighted", merged_by_variances)
    with pytest.raises(AssertionError):
        check_exact(2, "top-down")
    check_exact(1, "top-down")  # one layer has no merge


@pytest.mark.parametrize("kept", [0, 1])
def test_a_guide_that_does_not_merge_is_noticed(monkeypatch, kept):
    monkeypatch.setattr(hierarchical, "precision_weighted", lambda *moments: moments[kept])
    with pytest.raises(AssertionError):
        check_exact(2, "top-down")


@each_guide
@pytest.mark.parametrize("networks", ["down", "moments"])
def test_layers_in_the_wrong_order_are_noticed(monkeypatch, guide, networks):
    built = Linear.set_exact

    def reversed_order(self):
        built(self)
        setattr(self.model, networks, nn.ModuleList(reversed(getattr(self.model, networks))))
        return self

    joint = Linear(3, guide, diagonal=True).set_exact().joint  # what is right is not read from the model that is not
    monkeypatch.setattr(Linear, "set_exact", reversed_order)
    monkeypatch.setattr(Linear, "joint", joint)
    with pytest.raises(AssertionError):
        check_exact(3, guide)


# Expectations ---------------------------------------------------------------------------------------------------------


def near_exact(num_layers, guide):
    """A guide that is wrong, but whose weights have little variance."""
    toy = Linear(num_layers, guide, diagonal=True).set_exact()
    maps = [Map(*(part.detach() for part in found)) for found in toy.guide_maps]
    toy.put_guide([Map(m.weight + 0.05 * torch.randn(D, D), m.bias + 0.1, 1.2 * m.scale) for m in maps])
    return toy


def repeated(objective, toy, x, repetitions=10_000):
    """Independent bounds, (repetitions, M), of each datum."""
    with torch.no_grad():
        copies = x.repeat(repetitions, 1)
        return objective.bound(toy.model.model, toy.model.guide, copies).reshape(repetitions, len(x))


def exact_bound(toy, x):
    """The evidence lower bound of each datum, (M,), differentiable in all parameters."""
    law = toy.posterior(x)
    if toy.kind == "top-down":
        return elbo(toy.joint, law, x)
    parts = torch.arange(sum(toy.dims[1:])).split(toy.dims[1:])
    index = torch.cat(parts[::-1])  # as the joint has them
    return elbo(toy.joint, Gaussian(law.mean[:, index], law.cov[index][:, index]), x)


@pytest.fixture
def untold():
    """Without the warning that estimator B has no closed form somewhere."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="estimator B: no analytic KL")
        yield


@each_guide
@each_depth
@pytest.mark.parametrize("estimator", ["A", "B"])
def test_both_estimators_are_unbiased_for_the_bound(untold, num_layers, guide, estimator):
    toy, x = near_exact(num_layers, guide), data(2)
    truth = exact_bound(toy, x)
    assert (truth < toy.joint.last(D).log_prob(x) - 0.1).all()
    assert_mean_close(repeated(pv.SGVB(4, estimator), toy, x), truth, min_effect=0.1)


@each_guide
@each_depth
def test_where_the_divergence_is_taken_in_closed_form(num_layers, guide):
    toy, x = Linear(num_layers, guide), data()
    weights = pv.log_weights(toy.model.model, toy.model.guide, (x,), analytic_kl=True)
    assert weights.analytic_kl.keys() == ({f"z_{num_layers}"} if guide == "bottom-up" else set(toy.order))


def test_a_closed_form_below_the_top_of_a_bottom_up_guide_would_be_a_bias(monkeypatch):
    """z_2 is drawn from q(z_2 | z_1): given it, z_1 no longer has the law q(z_1 | x)."""
    toy, x = near_exact(2, "bottom-up"), data(2)
    monkeypatch.setattr(programs.weights, "known_when_drawn", lambda latent, drawn: list(latent))
    with pytest.raises(AssertionError, match="mean"):
        assert_mean_close(repeated(pv.SGVB(4, "B"), toy, x), exact_bound(toy, x), min_effect=0.1)


@each_guide
@each_depth
def test_the_mean_of_the_weights_is_the_evidence(num_layers, guide):
    toy, x = near_exact(num_layers, guide), data(2)
    truth = toy.joint.last(D).log_prob(x)
    with torch.no_grad():
        weights = pv.log_weights(toy.model.model, toy.model.guide, (x,), num_particles=20_000)
    assert weights.log_w.std(0).min() > 0.1
    assert_mean_close((weights.log_w - truth).exp(), 1.0, min_effect=0.2)


# Gradients, through what model and guide share too --------------------------------------------------------------------


def check_gradients(objective, toy, repetitions=40, copies=2000):
    x = data(2)
    networks = [toy.model.decoder[0], *(network.layers[-1] for network in (*toy.model.down, *toy.model.moments))]
    parameters = [parameter for network in networks for parameter in (network.weight, network.bias)]
    parameters += toy.model.prior.parameters()

    def of_scales_that_are_constant(gradients):
        """Without those of the weights that lead to log variances: the dense Gaussians have none."""
        rows = [D if gradient.ndim == 2 else len(gradient) for gradient in gradients]
        return torch.cat([gradient[:row].flatten() for gradient, row in zip(gradients, rows, strict=True)])

    truth = of_scales_that_are_constant(torch.autograd.grad(-exact_bound(toy, x).sum(), parameters))
    samples = []
    for _ in range(repetitions):
        loss = objective.differentiable_loss(toy.model.model, toy.model.guide, x.repeat(copies, 1)) / copies
        samples.append(of_scales_that_are_constant(torch.autograd.grad(loss, parameters)))
    assert_mean_close(torch.stack(samples), truth, min_effect=0.2)


@each_guide
@pytest.mark.parametrize("objective", [pv.SGVB(), pv.SGVB(1, "B"), pv.DReG(1)], ids=repr)
def test_gradients_are_those_of_the_exact_bound(untold, guide, objective):
    check_gradients(objective, near_exact(2, guide))


def test_a_guide_without_gradients_to_what_it_shares_is_noticed(monkeypatch):
    def held(seen, prior):
        return precision_weighted(seen, tuple(moment.detach() for moment in prior))

    monkeypatch.setattr(hierarchical, "precision_weighted", held)
    with pytest.raises(AssertionError, match="mean"):
        check_gradients(pv.SGVB(), near_exact(2, "top-down"))


@each_guide
@pytest.mark.parametrize("network", hierarchical.NETWORKS)
@pytest.mark.parametrize("num_layers", [1, 3])
def test_gradients_reach_every_parameter(num_layers, guide, network):
    model, x = small(num_layers, guide, network=network), binary()
    pv.IWAE(3).differentiable_loss(model.model, model.guide, x).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


# Networks -------------------------------------------------------------------------------------------------------------

SHAPE, LATENTS, WIDTHS = (4, 4), (3, 2, 2), ((6, 5), (4,), ())


def small(num_layers=2, guide="bottom-up", **changes):
    settings = {"latent_dims": LATENTS[:num_layers], "hidden_dims": WIDTHS[:num_layers], "channels": (2, 3)}
    return HierarchicalVAE(**({"data_shape": SHAPE, "guide": guide} | settings | changes))


def binary(*leading):
    return torch.randint(0, 2, (*(leading or (5,)), *SHAPE)).double()


def linear_layers(module):
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def widths_of(module):
    return [(layer.in_features, layer.out_features) for layer in linear_layers(module)]


@pytest.mark.parametrize(("guide", "second"), [("bottom-up", 3), ("top-down", 5)])
def test_widths(guide, second):
    model = small(3, guide)
    assert [widths_of(network) for network in model.features] == [[(16, 6), (6, 5)], [(second, 4)], []]
    third = 2 if guide == "bottom-up" else 4
    assert [widths_of(network) for network in model.moments] == [[(5, 6)], [(4, 4)], [(third, 4)]]
    assert [widths_of(network) for network in model.down] == [[(2, 4), (4, 6)], [(2, 4)]]
    assert widths_of(model.decoder) == [(3, 5), (5, 6), (6, 16)]


def by_hand(network, x):
    """A network written out: linear maps with tanh between them."""
    *hidden, last = linear_layers(network)
    for layer in hidden:
        x = (x @ layer.weight.T + layer.bias).tanh()
    return x @ last.weight.T + last.bias


def normal_by_hand(out):
    loc, log_variance = out.chunk(2, -1)
    return loc, log_variance.exp()


def log_normal(z, loc, variance):
    return (-0.5 * ((z - loc) ** 2 / variance + variance.log() + math.log(2 * math.pi))).sum(-1)


@each_guide
def test_densities_of_two_nonlinear_layers_by_hand(guide):
    model, x = small(2, guide), binary()
    weights = pv.log_weights(model.model, model.guide, (x,), num_particles=2)
    z_1, z_2 = weights.latents["z_1"], weights.latents["z_2"]
    prior = normal_by_hand(by_hand(model.down[0], z_2))
    logits = by_hand(model.decoder, z_1).reshape(2, 5, 4, 4)
    likelihood = (x * logits - (1 + logits.exp()).log()).sum((-2, -1))
    log_p = likelihood + log_normal(z_1, *prior) + log_normal(z_2, torch.zeros(2), torch.ones(2))
    up = nn.ModuleList([model.features[0], model.moments[0]])
    loc, variance = normal_by_hand(by_hand(up, x.flatten(1)))
    if guide == "bottom-up":
        up = nn.ModuleList([model.features[1], model.moments[1]])
        log_q = log_normal(z_1, loc, variance) + log_normal(z_2, *normal_by_hand(by_hand(up, z_1)))
    else:
        d_1 = by_hand(model.features[0], x.flatten(1)).tanh()
        d_2 = by_hand(model.features[1], d_1).tanh()
        top = normal_by_hand(by_hand(model.moments[1], d_2))
        precision = 1 / variance + 1 / prior[1]
        merged = (loc / variance + prior[0] / prior[1]) / precision, 1 / precision
        log_q = log_normal(z_2, *top) + log_normal(z_1, *merged)
    close(weights.log_joint, log_p)
    close(weights.log_q, log_q)


@each_guide
@pytest.mark.parametrize("network", hierarchical.NETWORKS)
def test_leading_dimensions_and_sites(guide, network):
    model, x = small(3, guide, network=network), binary(2, 5)
    law = model.encode(x)
    assert (law.batch_shape, law.event_shape) == ((2, 5), (3 if guide == "bottom-up" else 2,))
    z = torch.randn(2, 5, 3)
    assert (model.decode(z).batch_shape, model.decode(z).event_shape) == ((2, 5), SHAPE)
    one_by_one = [[model.decode(z[k, m]).mean for m in range(5)] for k in range(2)]
    close(model.decode(z).mean, torch.stack([torch.stack(row) for row in one_by_one]))
    close(law.mean, torch.stack([model.encode(part).mean for part in x]))
    weights = pv.log_weights(model.model, model.guide, (x[0],), num_particles=4)
    shapes = {name: tuple(z.shape) for name, z in weights.latents.items()}
    assert shapes == {"z_1": (4, 5, 3), "z_2": (4, 5, 2), "z_3": (4, 5, 2)}
    assert model.sample(7).shape == model.sample(7, mean=True).shape == (7, *SHAPE)


@each_guide
@pytest.mark.parametrize("network", hierarchical.NETWORKS)
def test_particles_one_by_one_have_the_same_weights(guide, network):
    model, x = small(3, guide, network=network), binary()
    together = pv.log_weights(model.model, model.guide, (x,), num_particles=3)
    alone = pv.Program(model.model, model.guide, vectorize=False)
    again = pv.log_weights(alone.model, alone.guide, (x,), num_particles=3, latents=together.latents)
    close(again.log_w, together.log_w)


@each_guide
def test_a_datum_does_not_depend_on_the_others(guide):
    model, x = small(3, guide, network="resnet"), binary()
    latents = pv.log_weights(model.model, model.guide, (x,)).latents
    log_w = pv.log_weights(model.model, model.guide, (x,), latents=latents).log_w
    first = {name: z[:, :1] for name, z in latents.items()}
    close(pv.log_weights(model.model, model.guide, (x[:1],), latents=first).log_w, log_w[:, :1])


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_every_likelihood(likelihood, network):
    model = small(2, "top-down", likelihood=likelihood, network=network)
    x = model.sample(5)
    lowest, highest = model.data_range or (-math.inf, math.inf)
    assert model.data_range == LIKELIHOODS[likelihood](SHAPE).data_range
    if likelihood not in ("gaussian", "beta"):  # whose draws may lie beyond what data are
        assert ((x >= lowest) & (x <= highest)).all()
    raw = model.decoder(torch.randn(5, 3))
    assert raw.shape == (5, model.likelihood.num_parameters, *SHAPE)
    assert model.decode(torch.randn(5, 3)).log_prob(x.clamp(lowest, highest)).isfinite().all()


# The generative model -------------------------------------------------------------------------------------------------


@each_depth
def test_samples_have_the_law_of_the_dense_gaussian(num_layers):
    toy = Linear(num_layers, "bottom-up")
    x, law = toy.model.sample(40_000), toy.joint.last(D)
    assert not x.requires_grad
    assert_mean_close(x, law.mean, min_effect=0.3)
    centred = x - law.mean.detach()
    assert_mean_close(centred[:, :, None] * centred[:, None], law.cov, min_effect=1.5)


def test_layers_can_be_entered_from_above():
    toy = Linear(3, "top-down")
    lowest, middle = toy.maps[1:]
    z = torch.randn(7, toy.dims[3])
    means = z @ middle.weight.T + middle.bias
    close(toy.model.descend(z, mean=True), means @ lowest.weight.T + lowest.bias)
    close(toy.model.descend(means, 2, mean=True), means @ lowest.weight.T + lowest.bias)
    lowest_latents = torch.randn(7, toy.dims[1])
    close(toy.model.descend(lowest_latents, 1), lowest_latents, atol=0)
    draws = toy.model.descend(z[:1].expand(20_000, -1))
    truth = toy.model.descend(z[0], mean=True)
    assert_mean_close(draws, truth, min_effect=0.2)
    cov = lowest.cov + lowest.weight @ middle.cov @ lowest.weight.T
    centred = (draws - truth).detach()
    assert_mean_close(centred[:, :, None] * centred[:, None], cov, min_effect=0.5)
    with pytest.raises(ValueError, match="layer: expected a whole number from 1 to 3, got 4"):
        toy.model.descend(z, 4)


@pytest.mark.parametrize(
    ("guide", "method", "options"),
    [
        ("bottom-up", "importance", {"num_particles": 2000}),
        ("top-down", "importance", {"num_particles": 2000}),
        ("top-down", "ais", {"num_particles": 30, "num_steps": 20}),
    ],
)
def test_scores_are_the_evidence(guide, method, options):
    toy, x = near_exact(2, guide), data(10)
    truth = toy.joint.last(D).log_prob(x).mean().item()
    score = pv.log_marginal(toy.model, x, method=method, **options)
    assert score.mc_error < 0.05
    assert score.mean == pytest.approx(truth, abs=5 * score.mc_error)


# Priors of the top layer ----------------------------------------------------------------------------------------------

ENCODES_TOP = [(1, "bottom-up"), (1, "top-down"), (2, "top-down"), (3, "top-down")]
each_that_encodes_top = pytest.mark.parametrize(("num_layers", "guide"), ENCODES_TOP)


def with_vamp(num_components, num_layers=2, guide="top-down"):
    """A linear hierarchy with a VampPrior, whose guide is wide enough for weights of little variance."""
    prior = VampPrior(D, (D,), num_components, 0.7 * torch.randn(num_components, D), data_range=None)
    toy = Linear(num_layers, guide, diagonal=True, prior=prior)
    toy.model.load_state_dict(near_exact(num_layers, guide).model.state_dict(), strict=False)
    return toy


@torch.no_grad()
def check_vamp_density(toy):
    """arXiv:1705.07120, eq. (9), of what the guide draws first, given a pseudo-input in the place of a datum."""
    top, x = f"z_{len(toy.dims) - 1}", data()
    weights = pv.log_weights(toy.model.model, toy.model.guide, (x,), num_particles=5)
    parts = [multivariate_normal(mean, cov).logpdf(weights.latents[top]) for mean, cov in toy.top]
    assert weights.log_prior[top].shape == (5, M)
    close(weights.log_prior[top], logsumexp(parts, 0) - math.log(len(parts)))


@torch.no_grad()
def check_mean_of_weights(toy):
    x = data(2)
    weights = pv.log_weights(toy.model.model, toy.model.guide, (x,), num_particles=20_000)
    assert weights.log_w.std(0).min() > 0.1
    assert_mean_close((weights.log_w - toy.evidence(x)).exp(), 1.0, min_effect=0.3)


@each_that_encodes_top
@pytest.mark.parametrize("num_components", [1, 3])
def test_the_vamp_prior_is_the_mean_of_the_guides_laws_of_the_top(num_layers, guide, num_components):
    check_vamp_density(with_vamp(num_components, num_layers, guide))


@each_that_encodes_top
@pytest.mark.parametrize("num_components", [1, 3])
def test_with_a_vamp_prior_the_mean_of_the_weights_is_the_evidence(num_layers, guide, num_components):
    check_mean_of_weights(with_vamp(num_components, num_layers, guide))


class Summed(priors._Mixture):
    """The bug: a sum of the posteriors, and no mean."""

    def log_prob(self, value):
        return super().log_prob(value) + math.log(self._num_component)


@pytest.mark.parametrize("check", [check_vamp_density, check_mean_of_weights])
def test_a_vamp_prior_that_has_no_total_of_one_is_noticed(monkeypatch, check):
    monkeypatch.setattr(priors, "_Mixture", Summed)
    check(with_vamp(1))  # of one component it is the same
    with pytest.raises(AssertionError):
        check(with_vamp(3))


def test_with_a_vamp_prior_scores_by_chains_from_the_prior_are_the_evidence():
    toy, x = with_vamp(3), data(10)
    score = pv.log_marginal(toy.model, x, method="ais", initial="prior", num_particles=30, num_steps=20)
    assert score.mc_error < 0.1
    assert score.mean == pytest.approx(toy.evidence(x).mean().item(), abs=5 * score.mc_error)


def test_with_a_vamp_prior_draws_have_the_law_of_the_dense_gaussians():
    toy = with_vamp(3)
    x, laws = toy.model.sample(40_000), [joint.last(D) for joint in toy.joints]
    mean = torch.stack([law.mean for law in laws]).mean(0)
    assert_mean_close(x, mean, min_effect=0.3)
    square = torch.stack([law.cov + law.mean[:, None] * law.mean for law in laws]).mean(0)
    assert_mean_close(x[:, :, None] * x[:, None], square, min_effect=1.5)


@each_that_encodes_top
def test_estimator_b_samples_the_divergence_of_another_prior_alone(num_layers, guide):
    toy, x = with_vamp(2, num_layers, guide), data()
    weights = pv.log_weights(toy.model.model, toy.model.guide, (x,), analytic_kl=True)
    assert weights.analytic_kl.keys() == {f"z_{number}" for number in range(1, num_layers)}
    with pytest.warns(UserWarning, match=rf"no analytic KL at sites \['z_{num_layers}'\]"):
        pv.SGVB(estimator="B").bound(toy.model.model, toy.model.guide, x)


@pytest.mark.parametrize("estimator", ["A", "B"])
def test_with_a_vamp_prior_both_estimators_are_unbiased_for_the_bound(untold, estimator):
    toy, x = with_vamp(1), data(2)
    truth = exact_bound(toy, x)
    assert (truth < toy.evidence(x) - 0.05).all()
    assert_mean_close(repeated(pv.SGVB(4, estimator), toy, x), truth, min_effect=0.1)


@pytest.mark.parametrize("objective", [pv.SGVB(), pv.SGVB(1, "B"), pv.DReG(1)], ids=repr)
def test_gradients_to_pseudo_inputs_and_encoder_are_those_of_the_exact_bound(untold, objective):
    check_gradients(objective, with_vamp(1))


def test_a_vamp_prior_without_gradients_to_the_encoder_is_noticed(monkeypatch):
    monkeypatch.setattr(HierarchicalVAE, "_prior", lambda self: self.prior(copy.deepcopy(self).encode))
    with pytest.raises(AssertionError, match="mean"):
        check_gradients(pv.SGVB(), with_vamp(1))


TOPS = ["mixture:3", "vamp:4", "flow"]


@pytest.mark.parametrize("prior", TOPS)
def test_gradients_reach_every_parameter_of_a_prior(prior):
    model, x = small(2, "top-down", prior=prior), binary()
    pv.IWAE(3).differentiable_loss(model.model, model.guide, x).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


@pytest.mark.parametrize("prior", TOPS)
@each_guide
def test_the_density_of_the_top_is_that_of_the_prior_whatever_it_is(prior, guide):
    num_layers = 1 if (prior, guide) == ("vamp:4", "bottom-up") else 3
    model, x = small(num_layers, guide, prior=prior), binary()
    together = pv.log_weights(model.model, model.guide, (x,), num_particles=6)
    z = together.latents[f"z_{num_layers}"]
    found = together.log_prior[f"z_{num_layers}"]
    close(found, model.prior(model.encode).log_prob(z))
    alone = pv.Program(model.model, model.guide, vectorize=False)
    again = pv.log_weights(alone.model, alone.guide, (x,), num_particles=6, latents=together.latents)
    close(again.log_w, together.log_w)
    assert model.sample(7).shape == model.sample(7, mean=True).shape == (7, *SHAPE)


@pytest.mark.parametrize("prior", TOPS)
def test_every_prior_is_trained_scored_drawn_and_stored(soon, prior, tmp_path):
    torch.set_default_dtype(torch.float32)
    model, x = small(2, "top-down", prior=prior), binary(12).float()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    run = pv.fit(model, x, optimizer="adam", epochs=3, batch_size=4, run_dir=tmp_path / "r", progress=False)
    assert run.path == "captured"
    for old, (name, new) in zip(before, model.named_parameters(), strict=True):
        assert not torch.equal(old, new), f"{name} was not trained"
    assert math.isfinite(pv.log_marginal(model, x, num_particles=3).mean)
    stored = pv.load_run(tmp_path / "r").program
    assert stored.config["prior"] == model.config["prior"] == stored.prior.name == prior
    assert_same(model.state_dict(), stored.state_dict())


def test_recorded_steps_with_a_vamp_prior_are_the_eager_ones(soon, untold):
    torch.set_default_dtype(torch.float32)
    found = []
    for compile in (True, False):
        torch.manual_seed(0)
        model = small(2, "top-down", data_shape=(8, 8), prior="vamp:4")
        run = trained(model, digits(100), objective=pv.SGVB(estimator="B"), compile=compile, epochs=4)
        found.append(model.state_dict())
        assert run.path == ("captured" if compile else "eager")
    assert_same(*found)


@pytest.mark.parametrize("prior", [*PRIORS, *TOPS[:2]])
def test_config_builds_the_same_prior(prior):
    first = small(2, "top-down", prior=prior)
    second = HierarchicalVAE(**json.loads(json.dumps(first.config)))
    assert first.config["prior"] == second.config["prior"] == second.prior.name == prior
    second.load_state_dict(first.state_dict())
    z = torch.randn(5, 2)
    close(*(model.prior(model.encode).log_prob(z) for model in (first, second)), atol=0)


@each_guide
def test_the_standard_prior_is_the_default_and_changes_nothing(guide):
    """Runs that were stored before there were others, are read."""
    model = small(2, guide)
    assert not [name for name in model.state_dict() if name.startswith("prior")]
    older = {name: value for name, value in model.config.items() if name != "prior"}
    HierarchicalVAE(**older).load_state_dict(model.state_dict())
    torch.manual_seed(3)
    found = model.sample(5, mean=True)
    torch.manual_seed(3)
    close(found, model.decode(model.descend(torch.randn(5, 2))).mean, atol=0)


def test_a_prior_of_ones_own():
    model = small(2, "bottom-up", prior=FlowPrior(2, 1, (3,)))
    assert model.config is None
    assert pv.log_weights(model.model, model.guide, (binary(),)).log_w.isfinite().all()
    with pytest.raises(ValueError, match="encode: expected the encoder"):  # where q(z_L | x) has no density
        small(2, "bottom-up", prior=Wrapped(2))
    vamp = Wrapped(2)
    assert small(2, "top-down", prior=vamp).prior is vamp


class Wrapped(Prior):
    """A prior that makes use of the encoder, and is no VampPrior."""

    def __init__(self, latent_dim):
        super().__init__(latent_dim)
        self.inner = VampPrior(latent_dim, SHAPE, 3)

    def forward(self, encode=None):
        return self.inner(encode)


class Positive(Prior):
    def forward(self, encode=None):
        return dist.LogNormal(torch.zeros(self.latent_dim), 1.0).to_event(1)


# Training -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def soon(monkeypatch):
    """Recorded after three steps, never compiled."""
    monkeypatch.setattr(compiled, "CAPTURE_AFTER", 3)
    monkeypatch.setattr(compiled, "COMPILE_AFTER", 10**9)


def digits(num_data=400):
    return (pv.load_dataset("digits").train[:num_data] > 127).float()


def trained(model, x, **changes):
    settings = {"optimizer": "adam", "learning_rate": 3e-3, "batch_size": 50, "progress": False}
    return pv.fit(model, x, **settings | changes)


@pytest.mark.parametrize(("guide", "objective"), [("bottom-up", pv.SGVB()), ("top-down", pv.DReG(3))])
def test_recorded_steps_are_the_eager_ones(soon, guide, objective):
    torch.set_default_dtype(torch.float32)
    found = []
    for compile in (True, False):
        torch.manual_seed(0)
        model = small(3, guide, data_shape=(8, 8))
        run = trained(model, digits(100), objective=objective, compile=compile, epochs=5)
        found.append(dict(model.named_parameters()))
        assert run.path == ("captured" if compile else "eager")
    assert_same(*({name: p.detach() for name, p in parameters.items()} for parameters in found))


@pytest.mark.parametrize(("guide", "network"), [("bottom-up", "conv"), ("top-down", "resnet")])
def test_steps_of_convolutions_are_recorded(soon, guide, network):
    torch.set_default_dtype(torch.float32)
    model = small(2, guide, data_shape=(8, 8), network=network)
    assert trained(model, digits(200), epochs=2).path == "captured"


@each_guide
def test_it_learns(soon, untold, guide):
    torch.set_default_dtype(torch.float32)
    model = HierarchicalVAE((8, 8), (10, 5), ((40,), (20,)), guide)
    x = digits(300)
    before = pv.evaluate_bound(model, x).mean
    run = trained(model, x, objective=pv.SGVB(estimator="B"), learning_rate=1e-2, epochs=20)
    bound, score = pv.evaluate_bound(model, x, pv.SGVB(50)).mean, pv.log_marginal(model, x, num_particles=200)
    assert run.path == "captured"
    assert bound > before + 10
    assert score.mean > bound - 0.05


# Arguments ------------------------------------------------------------------------------------------------------------


@each_guide
@pytest.mark.parametrize("network", hierarchical.NETWORKS)
def test_config_builds_the_same_architecture(guide, network):
    first = small(3, guide, network=network, likelihood="gaussian", activation="softplus", latent_dims=[3, 2, 2])
    config = json.loads(json.dumps(first.config))
    torch.manual_seed(1)
    second = HierarchicalVAE(**config)
    assert second.config == first.config
    x, z = torch.rand(5, *SHAPE), torch.randn(5, 3)
    assert (second.encode(x).mean - first.encode(x).mean).abs().max() > 1e-3
    second.load_state_dict(first.state_dict())
    close(second.encode(x).mean, first.encode(x).mean, atol=0)
    close(second.decode(z).log_prob(x), first.decode(z).log_prob(x), atol=0)
    latents = pv.log_weights(first.model, first.guide, (x,)).latents
    found = [pv.log_weights(m.model, m.guide, (x,), latents=latents).log_w for m in (first, second)]
    close(*found, atol=0)


def test_a_likelihood_of_ones_own_has_no_config():
    toy = Linear(2, "top-down")
    assert toy.model.config is None
    assert toy.model.data_range is None


def test_one_list_of_widths_is_for_every_layer():
    assert small(3, hidden_dims=(6, 5)).hidden_dims == ((6, 5),) * 3
    assert small(3, hidden_dims=()).hidden_dims == ((),) * 3
    assert small(1, hidden_dims=[[6]]).hidden_dims == ((6,),)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_dims": ((5,),) * 3}, "hidden_dims: expected 2 lists, one for each latent layer, got 3"),
        ({"hidden_dims": ((5,), 4)}, "hidden_dims: expected a list of widths for each layer, or one for all, got"),
        ({"hidden_dims": ((5,), (0,))}, "hidden_dims: expected a whole number of at least 1, got 0"),
        ({"hidden_dims": ((), (5,)), "network": "conv"}, "hidden_dims: expected a width next to the data"),
        ({"latent_dims": ()}, "latent_dims: expected at least one"),
        ({"latent_dims": (3, 0)}, "latent_dims: expected a whole number of at least 1, got 0"),
        ({"data_shape": (4, -1)}, "data_shape"),
        ({"data_shape": (4,), "network": "conv"}, r"data_shape: expected \(H, W\)"),
        (
            {"guide": "bottom up"},
            "guide: expected one of bottom-up, top-down, got 'bottom up'; did you mean",
        ),
        ({"likelihood": None}, "likelihood: expected one of"),
        ({"likelihood": "bernouli"}, "likelihood.*did you mean 'bernoulli'"),
        ({"activation": "sigmoid"}, "activation.*tanh"),
        ({"network": "cnn"}, "network: expected one of mlp, conv, resnet"),
        ({"channels": (0,)}, "channels: expected"),
        ({"prior": "vamo"}, "prior: expected one of standard, mixture, vamp, flow, got 'vamo'"),
        ({"prior": "flow:3"}, "prior: expected a number of components of a mixture or a vamp"),
        ({"prior": VampPrior(3, SHAPE, 2), "guide": "top-down"}, "prior: expected one of 2 latent dimensions, got 3"),
        ({"prior": Positive(2)}, "prior: expected one on the support of the posterior"),
        ({"prior": "vamp"}, 'prior: expected guide="top-down" or one layer with a vamp, got guide="bottom-up"'),
        ({"prior": "vamp:3"}, 'prior: expected guide="top-down" or one layer'),
        ({"prior": VampPrior(2, SHAPE, 2)}, 'prior: expected guide="top-down" or one layer'),
    ],
)
def test_bad_arguments_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        small(2, **changes)
