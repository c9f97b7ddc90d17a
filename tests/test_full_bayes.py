"""Networks whose weights are latent: their draws, the bound of all data, the local trick, and VAEs made of them."""

import copy
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn.auto_reg_nn import MaskedLinear
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.models.full_bayes import BayesianModule
from pyro_vae.networks import MLP, GaussianMLP
from pyro_vae.objectives import OBJECTIVES
from pyro_vae.programs import as_program, check_program
from pyro_vae.training import compiled
from tests import oracles
from tests.statistics import assert_mean_close
from tests.training.test_resume import assert_same, without_seconds

NEVER = 10**9
NOISE = 0.7


def close(left, right, atol=1e-10):
    torch.testing.assert_close(torch.as_tensor(left), torch.as_tensor(right), rtol=0, atol=atol)


def uneven(net, least=-1.5, most=0.0):
    """Posterior standard deviations that differ from weight to weight, so that none can stand for another."""
    with torch.no_grad():
        for scale in net.log_scale.values():
            scale.uniform_(least, most)
    return net


class Regression:
    """y ~ N(f(x), s^2) with f a Bayesian network: N data, all of whose latents are the weights."""

    def __init__(self, net, num_data=6, stated=True):
        self.net, self.num_data, self.stated = net, num_data, stated

    def plate(self, x):
        return pyro.plate("data", self.num_data if self.stated else len(x), subsample=torch.arange(len(x)))

    def model(self, x, y):
        f = self.net.model()
        with self.plate(x):
            pyro.sample("y", dist.Normal(f(x)[..., 0], NOISE), obs=y)

    def guide(self, x, y):
        self.net.guide()

    @property
    def program(self):
        return pv.Program(self.model, self.guide)


def linear(local=False, num_inputs=2, **options):
    return uneven(pv.bayesian(nn.Linear(num_inputs, 1), 0.8, local, **options))


def regression_data(num_data=6, num_inputs=2):
    return torch.randn(num_data, num_inputs), torch.randn(num_data)


# Weights that all data share ------------------------------------------------------------------------------------------

NETWORKS = {
    "linear": (lambda: nn.Linear(3, 2), (3,)),
    "mlp": (lambda: MLP(3, (4,), 2), (3,)),
    "pair": (lambda: GaussianMLP(3, (4,), 2), (3,)),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)), (3,)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)), (2, 4, 4)),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4)), (2, 4, 4)),
}
each_network = pytest.mark.parametrize("network", NETWORKS)


def made(network, **options):
    make, event = NETWORKS[network]
    return uneven(pv.bayesian(make(), event_dim=len(event), **options)), event


def stacked(outputs):
    return (
        tuple(map(torch.stack, zip(*outputs, strict=True))) if isinstance(outputs[0], tuple) else torch.stack(outputs)
    )


def drawn_in_plates(net, batch):
    """The network at draws of its weights in a plate of particles, and those weights (K, *shape) by parameter."""
    with pyro.plate("particles", batch[0], dim=-len(batch)):
        trace = poutine.trace(net.guide).get_trace()
    values = {n: trace.nodes[f"theta.{n}"]["value"] for n, _ in net.module.named_parameters()}
    return trace.nodes["_RETURN"]["value"], {
        n: w.reshape(batch[0], *w.shape[len(batch) :]).detach() for n, w in values.items()
    }


@each_network
@pytest.mark.parametrize("axis", ["none", "one", "own"])
@pytest.mark.parametrize("batch", [(1, 1), (4, 1), (4, 1, 1)], ids=str)
def test_particles_are_the_network_at_one_set_of_weights_after_the_other(network, axis, batch):
    net, event = made(network)
    x = torch.randn({"none": (), "one": (1,), "own": batch[:1]}[axis] + (1,) * (len(batch) - 2) + (5, *event))
    if axis != "none" and len(batch) == 3 and len(event) == 3:
        pytest.skip("a convolution takes one batch dimension")
    if axis == "none":
        x = x.reshape(5, *event)
    f, weights = drawn_in_plates(net, batch)
    one_by_one = [
        functional_call(net.module, {n: w[k] for n, w in weights.items()}, (x[k % len(x)] if axis != "none" else x,))
        for k in range(batch[0])
    ]
    found, expected = f(x), stacked(one_by_one)
    if axis == "none":  # the particles' axis is on the left of all plates'
        dims = [1] * (len(batch) - 2)
        expected = (
            tuple(t.reshape(batch[0], *dims, *t.shape[1:]) for t in expected)
            if isinstance(expected, tuple)
            else expected.reshape(batch[0], *dims, *expected.shape[1:])
        )
    for ours, theirs in zip(*((t if isinstance(t, tuple) else (t,)) for t in (found, expected)), strict=True):
        close(ours.expand(theirs.shape), theirs)
        if batch[0] > 1:
            assert ours.shape == theirs.shape


@each_network
def test_draws_of_predictions_have_the_posterior_law(network):
    """Against draws made one by one; and each row of ``each`` has its own, of the same law."""
    net, event = made(network)
    x, count = torch.randn(2, *event), 4000
    as_one = (lambda out: torch.cat(out, -1)) if network == "pair" else (lambda out: out)
    shared = as_one(net.draw(count)(x)).flatten(1)
    own = as_one(net.each(x.repeat(count, *[1] * len(event)))).reshape(count, 2, -1).flatten(1)
    with torch.no_grad():
        truth = torch.stack(
            [
                as_one(functional_call(net.module, {n: net.posterior(n).sample() for n in net._latent}, (x,))).flatten()
                for _ in range(count)
            ]
        )
    assert shared.shape == own.shape == truth.shape
    for draws in (shared, own):
        assert_mean_close(draws - truth, 0.0, min_effect=2.0)
        close(draws.std(0) / truth.std(0), torch.ones(len(truth[0])), atol=0.25)
    half = truth.shape[1] // 2
    of_shared, of_own = (torch.corrcoef(draws.T)[:half, half:] for draws in (shared, own))
    assert of_own.abs().max() < 0.1
    assert of_shared.abs().max() > 0.2


def test_the_kl_of_every_weight():
    net = linear()
    mean, scale = net.module.weight, net.log_scale["weight"].exp()
    truth = (0.8 / scale).log() + (scale**2 + mean**2) / (2 * 0.8**2) - 0.5
    close(net.kl()["weight"], truth.detach())
    assert not net.kl()["bias"].requires_grad


@pytest.mark.filterwarnings("ignore:.*requires_grad=False")  # Pyro's
def test_frozen_parameters_stay_as_they_are():
    module = MLP(2, (3,), 1)
    module[0].requires_grad_(False)
    net, data = pv.bayesian(module), regression_data()
    assert net.log_scale.keys() == {"2/weight", "2/bias"}
    kept = module[0].weight.clone()
    pv.fit(Regression(net).program, data, epochs=3, progress=False)
    assert torch.equal(module[0].weight, kept)
    with pytest.raises(ValueError, match="local_reparameterization"):
        pv.bayesian(module, local_reparameterization=True)


def test_tied_parameters_are_drawn_once():
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh(), nn.Linear(2, 2, bias=False))
    module[2].weight = module[0].weight
    net = uneven(pv.bayesian(module))
    f, weights = drawn_in_plates(net, (3, 1))
    x = torch.randn(4, 2)
    close(f(x), torch.stack([(x @ w.T).tanh() @ w.T for w in weights["0.weight"]]))
    with pytest.raises(ValueError, match="each of one layer"):
        pv.bayesian(module, local_reparameterization=True)


def test_dropout_acts_in_training_alone():
    net = pv.bayesian(nn.Sequential(nn.Linear(2, 50), nn.Dropout(0.5)), posterior_scale=1e-9)
    x = torch.randn(3, 2)
    for f in (net.draw(2), net.each, drawn_in_plates(net.train(), (2, 1))[0]):
        assert (f(x) == 0).any()
    net.eval()
    for f in (net.draw(2), net.each, drawn_in_plates(net, (2, 1))[0]):
        assert not (f(x) == 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_type_is_the_modules(dtype):
    net = pv.bayesian(nn.Linear(2, 1).to(dtype), learn_prior=True)
    x = torch.randn(3, 2, dtype=dtype)
    assert {p.dtype for p in net.parameters()} == {net.draw(2)(x).dtype} == {net.each(x).dtype} == {dtype}
    assert net.double().draw(2)(x.double()).dtype == torch.float64


def test_a_copy_has_weights_of_its_own():
    net, data = linear(), regression_data()
    net.kl()  # whatever is remembered
    other, kept = copy.deepcopy(net), copy.deepcopy(net.state_dict())
    pv.fit(Regression(other).program, data, epochs=2, progress=False)
    assert_same(net.state_dict(), kept)
    assert not torch.equal(other.posterior("weight").mean, net.posterior("weight").mean)
    assert torch.equal(other.posterior("weight").mean, other.module.weight)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_comes_back(assign):
    net, other = linear(learn_prior=True), linear(learn_prior=True)
    other.kl()
    other.load_state_dict(copy.deepcopy(net.state_dict()), assign=assign)
    for name in ("weight", "bias"):
        assert torch.equal(net.posterior(name).mean, other.posterior(name).mean)
        assert torch.equal(net.posterior(name).scale, other.posterior(name).scale)
        assert torch.equal(net.prior_scale(name), other.prior_scale(name))


def test_two_networks_of_one_program_have_two_names():
    a, b = linear(), linear(name="other")

    def model(x, y):
        f, g = a.model(), b.model()
        with pyro.plate("data", 6, subsample=torch.arange(len(x))):
            pyro.sample("y", dist.Normal((f(x) * g(x))[..., 0], 1.0), obs=y)

    def guide(x, y):
        a.guide(), b.guide()

    program = pv.Program(model, guide)
    sites = check_program(program, regression_data()).global_sites
    assert set(sites) == {"theta.weight", "theta.bias", "other.weight", "other.bias"}
    assert len(program.named_parameters()) == 8
    b.name = "theta"
    with pytest.raises(ValueError, match=r"theta\.weight"):
        check_program(program, regression_data())


@pytest.mark.parametrize("where", ["model", "guide", "both"])
def test_weights_inside_the_data_plate_are_refused_by_name(where):
    net = linear()

    def weights(side, draw, x):
        if where not in (side, "both"):
            return draw()
        with pyro.plate("data", 6, subsample=torch.arange(len(x))):
            return draw()

    def model(x, y):
        f = weights("model", net.model, x)
        with pyro.plate("data", 6, subsample=torch.arange(len(x))):
            pyro.sample("y", dist.Normal(f(x)[..., 0], 1.0), obs=y)

    program = pv.Program(model, lambda x, y: weights("guide", net.guide, x))
    with pytest.raises(ValueError, match=r"theta\.weight.*outside every plate"):
        check_program(program, regression_data())


# The bound of all data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_particles", [1, 5])
def test_the_bound_is_the_evidence_where_the_posterior_is_exact(num_particles):
    """For orthogonal inputs it factorises, as the network's own does; without variance."""
    x = 2 * torch.linalg.qr(torch.randn(6, 3)).Q
    y = x @ torch.tensor([0.7, -1.0, 0.4]) + NOISE * torch.randn(6)
    joint = oracles.regression(x, 0.8, NOISE)
    posterior, truth = joint.given_last(y), joint.last(6).log_prob(y)
    net = pv.bayesian(nn.Linear(3, 1, bias=False), 0.8)
    with torch.no_grad():
        net.module.weight.copy_(posterior.mean)
        net.log_scale["weight"].copy_(posterior.cov.diagonal().log() / 2)
    program, sgvb = Regression(net).program, pv.SGVB(num_particles)
    close(sgvb.bound(program.model, program.guide, x, y).sum(), truth)
    close(-sgvb.differentiable_loss(program.model, program.guide, x, y), truth)
    close(pv.evaluate_bound(program, (x, y), sgvb).mean * 6, truth.item())
    with torch.no_grad():
        net.module.weight.add_(0.5)
    assert sgvb.bound(program.model, program.guide, x, y).sum() < truth - 0.5


class Factors:
    """A VAE with a Bayesian decoder whose local noise is given with the data: what is drawn is theta alone."""

    def __init__(self, decoder, num_data, stated=True):
        self.decoder, self.encoder, self.num_data, self.stated = decoder, nn.Linear(3, 4), num_data, stated

    def plate(self, x):
        return pyro.plate("data", self.num_data if self.stated else len(x), subsample=torch.arange(len(x)))

    def model(self, x, noise):
        f = self.decoder.model()
        with self.plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(f(z), NOISE).to_event(1), obs=x)

    def guide(self, x, noise):
        self.decoder.guide()
        loc, log_scale = self.encoder(x).chunk(2, -1)
        q = dist.Normal(loc, log_scale.exp()).to_event(1)
        z = loc + log_scale.exp() * noise
        with self.plate(x):
            pyro.sample("z", dist.Delta(z, log_density=q.log_prob(z), event_dim=1))

    @property
    def parameters(self):
        return [*self.decoder.parameters(), *self.encoder.parameters()]


def gradient(toy, objective, data, seed=4):
    """With the noise of the weights that a seed gives."""
    pyro.set_rng_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="estimator B: no analytic KL")
        loss = objective.differentiable_loss(toy.model, toy.guide, *data)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, toy.parameters)])


class CountsTheKLPerDatum(pv.SGVB):
    def _bounds(self, weights):
        local, shared = super()._bounds(weights)
        return local, shared * weights.scale


GRADIENT_BUGS = {
    "none": ({}, pv.SGVB),
    "N / M missing": ({"stated": False}, pv.SGVB),
    "KL of theta per datum": ({}, CountsTheKLPerDatum),
}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("estimator", ["A", "B"])
@pytest.mark.parametrize("bug", GRADIENT_BUGS)
def test_the_gradient_of_all_data_is_the_mean_over_minibatches(bug, estimator, size):
    data = torch.randn(4, 3), torch.randn(4, 2)
    net = uneven(pv.bayesian(MLP(2, (3,), 3), learn_prior=True))
    options, objective = GRADIENT_BUGS[bug]
    right, toy = Factors(net, 4), Factors(net, 4, **options)
    toy.encoder = right.encoder
    whole = gradient(right, pv.SGVB(3, estimator), data)
    rows = torch.combinations(torch.arange(4), size)
    parts = [gradient(toy, objective(3, estimator), [c[r] for c in data]) for r in rows]
    mean = sum(parts) / len(parts)
    if bug == "none":
        close(mean, whole)
        assert (parts[0] - whole).abs().max() > 0.1
    else:
        assert (mean - whole).abs().max() > 0.1


@pytest.mark.parametrize("learn_prior", [True, False])
def test_the_best_prior_scale_is_the_root_mean_square_of_its_tensor(learn_prior):
    """d/ds of KL(q || N(0, s^2)) vanishes at s^2 = mean of mu^2 + sigma^2, tensor by tensor."""
    net, data = linear(learn_prior=learn_prior), regression_data()
    with torch.no_grad():
        for place, name in enumerate(("weight", "bias")):
            q = net.posterior(name)
            net.log_prior_scale[place] = (q.mean**2 + q.variance).mean().log() / 2
    toy = Regression(net)
    loss = pv.SGVB(2, "B").differentiable_loss(toy.model, toy.guide, *data)
    if learn_prior:
        close(*torch.autograd.grad(loss, net.log_prior_scale), torch.zeros(2))
    assert net.log_prior_scale.requires_grad == learn_prior


def test_learning_reaches_the_best_prior_scale():
    x, y = regression_data(20, 3)
    net = pv.bayesian(nn.Linear(3, 1), 3.0, learn_prior=True, posterior_scale=0.1)
    for rate in (0.05, 0.01):
        options = {"optimizer": "adam", "learning_rate": rate, "epochs": 300, "batch_size": 20, "progress": False}
        pv.fit(Regression(net, 20).program, (x, y), objective=pv.SGVB(8, "B"), evaluate_every=NEVER, **options)
    for name in ("weight", "bias"):
        q = net.posterior(name)
        assert net.prior_scale(name).item() == pytest.approx((q.mean**2 + q.variance).mean().sqrt().item(), rel=0.1)


# The local reparameterisation trick -----------------------------------------------------------------------------------


def variance_not_squared(self, layer, inputs):
    return nn.functional.linear(inputs.abs(), *self_variances(self, layer))


def no_bias_variance(self, layer, inputs):
    return nn.functional.linear(inputs.square(), self_variances(self, layer)[0])


def scale_for_variance(self, layer, inputs):
    return nn.functional.linear(inputs.square(), *(v.sqrt() for v in self_variances(self, layer)))


def self_variances(net, layer):
    return [(2 * net.log_scale[f"{layer}{n}".replace(".", "/")]).exp() for n in ("weight", "bias")]


VARIANCES = {"input not squared": variance_not_squared, "no bias": no_bias_variance, "not squared": scale_for_variance}
each_bug = pytest.mark.parametrize("bug", [None, *VARIANCES])


def plant(bug, monkeypatch):
    def drawn(self, layer, _, inputs, mean):
        return mean + VARIANCES[bug](self, layer, inputs[0]).sqrt() * torch.randn_like(mean)

    if bug is not None:
        monkeypatch.setattr(BayesianModule, "_drawn_output", drawn)


def holds(bug, check):
    if bug is None:
        check()
    else:
        with pytest.raises(AssertionError, match="mean"):
            check()


@each_bug
def test_a_layers_outputs_have_the_law_of_drawn_weights(bug, monkeypatch):
    """Mean and variance of x W' + c, and no covariance between outputs or between data."""
    plant(bug, monkeypatch)
    net = uneven(pv.bayesian(nn.Linear(3, 2), local_reparameterization=True), -0.5, 0.5)
    nn.init.ones_(net.log_scale["bias"])
    x, count = torch.tensor([[0.5, -1.5, 2.0], [0.4, -1.3, 2.2]]), 20_000
    with torch.no_grad():
        b = net.guide()(x.expand(count, 2, 3))
        mean = net.module(x)
        variance = (
            torch.stack([net.posterior("weight").variance @ row**2 for row in x]) + net.posterior("bias").variance
        )
    centred = (b - mean).flatten(1)
    truth = variance.flatten().diag()
    holds(bug, lambda: assert_mean_close(centred[:, :, None] * centred[:, None], truth, min_effect=1.5))
    assert_mean_close(b, mean, min_effect=0.3)
    brute = net.draw(count)(x)
    assert_mean_close((brute - mean).square(), variance, min_effect=1.5)
    assert ((brute - mean)[:, 0] * (brute - mean)[:, 1]).mean(0).min() > 1.0  # shared weights: the data move together


def exact_bound(net, x, y):
    """E_q of a linear network's log likelihood, in closed form: minus its variance over 2 s^2."""
    mean = net.module(x)[:, 0]
    variance = x**2 @ (2 * net.log_scale["weight"][0]).exp() + (2 * net.log_scale["bias"]).exp()
    return dist.Normal(mean, NOISE).log_prob(y) - variance / (2 * NOISE**2)


@pytest.mark.parametrize("estimator", ["A", "B"])
@pytest.mark.parametrize("local", [False, True])
@each_bug
def test_bound_and_gradient_are_unbiased(bug, local, estimator, monkeypatch):
    if bug is not None and not (local and estimator == "B"):
        pytest.skip("nothing to plant")
    plant(bug, monkeypatch)
    net = uneven(pv.bayesian(nn.Linear(2, 1), 0.8, local), -1.0, -0.5)
    (x, y), toy = regression_data(3), Regression(net, 6)
    parameters = list(net.parameters())
    kl = sum(
        torch.distributions.kl_divergence(net.posterior(n), dist.Normal(0.0, 0.8)).sum() for n in ("weight", "bias")
    )
    exact = 2 * exact_bound(net, x, y).sum() - kl
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(exact, parameters)])
    sgvb, values, gradients = pv.SGVB(100, estimator), [], []
    for _ in range(200):
        bound = -sgvb.differentiable_loss(toy.model, toy.guide, x, y)
        values.append(bound.detach())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(bound, parameters)]))

    def check():
        assert_mean_close(torch.stack(values), exact.detach(), min_effect=0.5)
        assert_mean_close(torch.stack(gradients), truth, min_effect=0.8)

    holds(bug, check)


def test_a_deep_network_has_the_same_mean_bound_and_gradients_of_less_variance():
    nets = [pv.bayesian(MLP(2, (4,), 1), 1.0, local, posterior_scale=0.3) for local in (False, True)]
    nets[1].load_state_dict(nets[0].state_dict())
    x, y = torch.randn(60, 2), torch.randn(60)
    found = []
    for net in nets:
        toy, sgvb, rows = Regression(net, 60), pv.SGVB(10, "B"), []
        for _ in range(150):
            bound = -sgvb.differentiable_loss(toy.model, toy.guide, x, y) / 60
            rows.append(
                torch.cat([bound.detach()[None], *map(torch.flatten, torch.autograd.grad(bound, [*net.parameters()]))])
            )
        found.append(torch.stack(rows))
    shared, local = found
    assert_mean_close(local - shared, 0.0, min_effect=0.15)
    assert local.var(0).sum() < shared.var(0).sum() / 5


def with_plates(net, nesting):
    """Data in the plate on the right; further plates, or none, on its left, within the particles'."""

    def model(x, y):
        f = net.model()
        with pyro.plate("data", 6, subsample=torch.arange(x.shape[-2]), dim=-1):
            if nesting == 1:
                return pyro.sample("y", dist.Normal(f(x)[..., 0], 1.0), obs=y)
            with pyro.plate("times", 3, dim=-2):
                return pyro.sample("y", dist.Normal(f(x)[..., 0], 1.0), obs=y.expand(3, -1))

    return pv.Program(model, lambda x, y: net.guide() and None)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("num_particles", [1, 4])
@pytest.mark.parametrize("nesting", [1, 2])
@pytest.mark.parametrize("per_datum", [True, False])
def test_data_draw_for_themselves_only_where_they_may(per_datum, nesting, num_particles, local):
    """Equal data have equal likelihoods where they share weights, and all different ones where they do not."""
    program, x = with_plates(linear(local), nesting), torch.ones(4, 2)
    options = {} if per_datum is False else {"per_datum": per_datum}  # False is what the public function does
    with torch.no_grad():
        weights = pv.log_weights(
            program.model, program.guide, (x, torch.ones(4)), num_particles=num_particles, **options
        )
    found = weights.log_likelihood["y"]
    assert found.shape == (num_particles, 4)
    assert weights.log_w_global.shape == (num_particles,)
    assert len(found.flatten().unique()) == (4 * num_particles if local and per_datum else num_particles)


def test_inputs_with_particles_draw_for_each_of_them():
    net = uneven(pv.bayesian(nn.Linear(2, 3), local_reparameterization=True))
    for shape in [(5, 2), (1, 5, 2), (4, 5, 2)]:
        with pyro.plate("particles", 4, dim=-2):
            out = net.guide()(torch.ones(shape))
        assert out.shape == (4, 5, 3)
        assert len(out.flatten().unique()) == 60
    with pyro.plate("particles", 4, dim=-3):
        assert net.guide()(torch.ones(5, 2)).shape == (4, 1, 5, 3)
        assert net.guide()(torch.ones(4, 6, 5, 2)).shape == (4, 6, 5, 3)


LAYERS = {
    "a convolution": lambda: nn.Conv2d(1, 1, 3),
    "layer norm": lambda: nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)),
    "a bare parameter": lambda: nn.ParameterList([nn.Parameter(torch.ones(2))]),
    "a masked layer": lambda: MaskedLinear(2, 2, torch.eye(2)),
    "a layer whose weight is made": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_what_is_not_plainly_linear_cannot_be_local(layer):
    with pytest.raises(ValueError, match=r"local_reparameterization.*nn\.Linear"):
        pv.bayesian(LAYERS[layer](), local_reparameterization=True)


@pytest.mark.parametrize("layer", ["a masked layer", "a layer whose weight is made"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_a_draw_for_each_row_has_the_law_of_such_layers_too(layer):
    net = pv.bayesian(LAYERS[layer](), posterior_scale=0.1)
    x = torch.tensor([[1.0, 5.0]])
    ours, truth = net.each(x.repeat(4000, 1)), net.draw(4000)(x)[:, 0]
    close(ours.std(0) / truth.std(0), torch.ones(2), atol=0.1)


# What is predicted of a datum -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("local", [False, True])
def test_predictive_density_and_its_bound_in_closed_form(local):
    net, (x, y) = linear(local), regression_data()
    program = Regression(net).program
    with torch.no_grad():
        variance = x**2 @ net.posterior("weight").variance[0] + net.posterior("bias").variance
        density = dist.Normal(net.module(x)[:, 0], (variance + NOISE**2).sqrt()).log_prob(y)
        bound = exact_bound(net, x, y)
        found = pv.SGVB(50_000).predictive_bound(program.model, program.guide, x, y)
    score = pv.log_marginal(program, (x, y), num_particles=50_000)
    close(score.values, density, atol=0.05)
    close(found, bound, atol=0.1)
    assert (bound < density).all()
    few = pv.evaluate_bound(program, (x, y), pv.SGVB(2000), predictive=True)
    assert few.mean == pytest.approx(bound.mean().item(), abs=0.1)
    assert pv.evaluate_bound(program, (x, y), pv.SGVB(2000)).mean < few.mean - 0.2  # the KL of theta is part of it


@pytest.mark.parametrize("local", [False, True])
def test_rows_of_one_datum_share_its_weights(local):
    """Several rows of a datum: jointly Gaussian, with the covariance that one draw of the weights gives them."""
    net = pv.bayesian(nn.Linear(2, 1, bias=False), local_reparameterization=local, posterior_scale=1.0)
    x, y = torch.randn(3, 4, 2), torch.randn(3, 4)

    def model(x, y):
        f = net.model()
        with pyro.plate("data", 3, subsample=torch.arange(len(x)), dim=-2), pyro.plate("row", 4, dim=-1):
            pyro.sample("y", dist.Normal(f(x)[..., 0], NOISE), obs=y)

    mean = net.module.weight.detach()[0]
    truth = [
        dist.MultivariateNormal(a @ mean, a @ a.T + NOISE**2 * torch.eye(4)).log_prob(b)
        for a, b in zip(x, y, strict=True)
    ]
    score = pv.log_marginal(pv.Program(model, lambda x, y: net.guide() and None), (x, y), num_particles=50_000)
    close(score.values, torch.stack(truth), atol=0.15)


def test_two_calls_for_one_datum_share_its_weights():
    """y ~ N(f(a) - f(b), s^2): what the two have in common cancels."""
    net = pv.bayesian(nn.Linear(2, 1), posterior_scale=1.0)
    a = torch.randn(3, 2)
    b, y = a + 0.3 * torch.randn(3, 2), torch.randn(3)

    def model(a, b, y):
        f = net.model()
        with pyro.plate("data", 3, subsample=torch.arange(len(a))):
            pyro.sample("y", dist.Normal((f(a) - f(b))[..., 0], NOISE), obs=y)

    program = pv.Program(model, lambda a, b, y: net.guide() and None)
    with torch.no_grad():
        mean, variance = (net.module(a) - net.module(b))[:, 0], (a - b).square().sum(1)
        truth = dist.Normal(mean, (variance + NOISE**2).sqrt()).log_prob(y)
    close(pv.log_marginal(program, (a, b, y), num_particles=50_000).values, truth, atol=0.05)


@pytest.mark.parametrize("defensive", [0.0, 0.5])
def test_a_prior_by_a_network_is_that_of_the_draws(defensive):
    """z ~ N(w c, 0.3^2), x ~ N(z, 0.5^2): half of the draws of z from the prior, weighed by the one that drew them."""
    net = pv.bayesian(nn.Linear(1, 1, bias=False), posterior_scale=1.0)
    with torch.no_grad():
        net.module.weight.zero_()
    x, c = torch.tensor([0.5, 3.0, -1.0]), torch.tensor([[1.0], [2.0], [0.5]])

    def model(x, c):
        f = net.model()
        with pyro.plate("data", 3, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(f(c)[..., 0], 0.3))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x, c):
        net.guide()
        with pyro.plate("data", 3, subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(0.7 * x, 1.0))

    truth = dist.Normal(0.0, (c[:, 0] ** 2 + 0.3**2 + 0.5**2).sqrt()).log_prob(x)
    score = pv.log_marginal(pv.Program(model, guide), (x, c), num_particles=50_000, defensive=defensive)
    close(score.values, truth, atol=0.1)


# Variational auto-encoders --------------------------------------------------------------------------------------------

VAES = {
    "decoder": {"bayesian": "decoder"},
    "decoder, local": {"bayesian": "decoder", "local_reparameterization": True},
    "all": {"bayesian": True, "prior_scale": 0.5},
    "all, local, learned prior": {"bayesian": True, "local_reparameterization": True, "learn_prior": True},
}
each_vae = pytest.mark.parametrize("kind", VAES)
SMALL = {"optimizer": "adam", "learning_rate": 0.01, "batch_size": 15, "progress": False}


def small_vae(kind="decoder", scale=None, **options):
    torch.manual_seed(2)
    vae = pv.VAE((2, 2), 2, (3,), **VAES[kind] | options)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if scale is not None and "log_scale" in name:
                parameter.fill_(math.log(scale))
    return vae


def binary(num_data=40):
    torch.manual_seed(7)
    return torch.rand(num_data, 2, 2).round()


@pytest.fixture
def soon(monkeypatch):
    """Recorded after three steps, never compiled."""
    monkeypatch.setattr(compiled, "CAPTURE_AFTER", 3)
    monkeypatch.setattr(compiled, "COMPILE_AFTER", NEVER)


@each_vae
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_a_vae_is_a_program(kind, likelihood):
    vae = small_vae(kind, likelihood=likelihood, num_data=40)
    check = check_program(as_program(vae), (binary(15),))
    assert (check.batch_size, check.full_size) == (15, 40)
    parts = {"decoder"} if "decoder" in kind else {"decoder", "encoder"}
    assert {site.partition(".")[0] for site in check.global_sites} == parts
    assert vae.encode(binary(5)).sample().shape == (5, 2)
    assert vae.encode(binary(6).reshape(3, 2, 2, 2)).batch_shape == (3, 2)
    assert vae.decode(torch.zeros(7, 5, 2)).sample().shape == (7, 5, 2, 2)
    assert vae.sample(3).shape == vae.sample(3, mean=True).shape == (3, 2, 2)


@pytest.mark.parametrize(("kind", "estimator"), list(zip(VAES, "ABBA", strict=True)))
def test_recorded_steps_are_the_eager_ones(soon, kind, estimator):
    found = []
    for compile in (True, False):
        vae = small_vae(kind)
        run = pv.fit(vae, binary(), objective=pv.SGVB(2, estimator), epochs=4, test=binary(7), compile=compile, **SMALL)
        found.append((run.path, vae.state_dict(), without_seconds(run.history)))
    assert [path for path, *_ in found] == ["captured", "eager"]
    assert_same(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]
    begun = small_vae(kind).state_dict()
    still = [n for n, p in vae.named_parameters() if torch.equal(p, begun[n])]
    assert still == []
    row = run.history[-1]
    assert row["dataset_bound"] == pytest.approx(40 * row["train_bound"])
    assert vae.num_data == 40


@each_vae
def test_a_vae_comes_back_from_its_configuration_and_its_run(kind, tmp_path):
    vae, x = small_vae(kind), binary()
    pv.fit(vae, x, epochs=2, run_dir=tmp_path / "run", **SMALL)
    again = pv.VAE(**vae.config)
    assert again.config == vae.config
    assert again.num_data == 40
    again.load_state_dict(vae.state_dict())
    loaded = pv.load_run(tmp_path / "run").program
    assert_same(loaded.state_dict(), vae.state_dict())
    bounds = {pv.evaluate_bound(program, x).mean for program in (vae, again, loaded)}
    assert len(bounds) == 1


@pytest.mark.parametrize(("kind", "stop"), [("decoder", 55), ("all, local, learned prior", 15)])
def test_a_run_in_two_parts_is_the_run_in_one(kind, stop, tmp_path):
    straight = small_vae(kind)
    settings = {"objective": pv.SGVB(1, "B"), "evaluate_every": 40, **SMALL}
    whole = pv.fit(straight, binary(), num_samples=150, **settings)
    pv.fit(small_vae(kind), binary(), num_samples=stop, run_dir=tmp_path / "run", **settings)
    resumed = small_vae(kind)
    run = pv.fit(resumed, binary(), num_samples=150, run_dir=tmp_path / "run", resume=True, **settings)
    assert_same(straight.state_dict(), resumed.state_dict())
    assert without_seconds(run.history)[-1] == without_seconds(whole.history)[-1]


def components(network, inputs):
    """What the next mixture is made of, for the same seed: (K, ..., D)."""
    torch.manual_seed(0)
    out = network.draw(16)(inputs)
    torch.manual_seed(0)
    return out


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_decoding_is_the_mixture_over_draws_of_the_weights(likelihood):
    vae, z = small_vae(scale=0.5, likelihood=likelihood), torch.randn(5, 2)
    out = components(vae.decoder, z)
    decoded, x = vae.decode(z), torch.rand(5, 2, 2).round()
    first, *log_variance = out.unflatten(-1, (-1, 2, 2)).unbind(-3)
    each = (
        dist.Normal(first.sigmoid(), (0.5 * log_variance[0]).exp().clamp(1 / 255, 1.0))
        if log_variance
        else dist.Bernoulli(logits=first)
    )
    close(decoded.mean, each.mean.mean(0))
    close(decoded.log_prob(x), each.log_prob(x).sum((-1, -2)).logsumexp(0) - math.log(16))
    if likelihood == "bernoulli":  # it adds up to one
        images = torch.cartesian_prod(*[torch.arange(2.0)] * 4).reshape(16, 1, 2, 2)
        close(decoded.log_prob(images.expand(16, 5, 2, 2)).exp().sum(0), torch.ones(5))


def test_encoding_is_the_mixture_over_draws_of_the_weights():
    vae, x, z = small_vae("all", scale=0.5), binary(5), torch.randn(5, 2)
    loc, log_variance = components(vae.encoder, x.flatten(1)).chunk(2, -1)
    encoded = vae.encode(x)
    close(encoded.mean, loc.mean(0))
    close(
        encoded.log_prob(z),
        dist.Normal(loc, (0.5 * log_variance).exp()).log_prob(z).sum(-1).logsumexp(0) - math.log(16),
    )


@pytest.mark.parametrize("local", [False, True])
def test_samples_have_weights_of_their_own(local):
    """Means and products of pixels, against draws of weights and latents made together."""
    vae = small_vae(scale=1.0, local_reparameterization=local)
    x = vae.sample(20_000).flatten(1)
    z = torch.randn(1000, 2)
    p = vae.decoder.draw(1000)(z).sigmoid().flatten(0, 1)  # every weight with every latent
    for i in range(4):
        assert_mean_close(x[:, i], p[:, i].mean(), min_effect=0.1)
        assert_mean_close(x[:, i] * x[:, i - 1], (p[:, i] * p[:, i - 1]).mean(), min_effect=0.1)
    assert x.reshape(-1, 2, 4).mean(0).sub(x.mean(0)).abs().max() < 0.05


@each_vae
def test_a_predictive_bound_is_below_the_log_predictive_density(kind):
    vae, x = small_vae(kind, scale=0.5, num_data=40), binary()
    bound = pv.evaluate_bound(vae, x, pv.SGVB(50), predictive=True)
    score = pv.log_marginal(vae, x, num_particles=2000)
    defended = pv.log_marginal(vae, x, num_particles=2000, defensive=0.5)
    assert bound.mean < score.mean
    if "decoder" in kind:  # else the guide's own spread makes uneven weights
        assert defended.mean == pytest.approx(score.mean, abs=0.05)
    assert score.mean < defended.mean + 0.05
    assert pv.evaluate_bound(vae, x, pv.SGVB(50)).mean < bound.mean


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", sorted(OBJECTIVES.keys() - {"sgvb"}))
def test_objectives_that_weigh_data_by_themselves_refuse_by_name(objective):
    with pytest.raises(ValueError, match=r"decoder\.0\.weight"):
        pv.fit(small_vae(), binary(), objective=OBJECTIVES[objective](), epochs=1, progress=False)


@pytest.mark.parametrize("objective", sorted(OBJECTIVES.keys() - {"sgvb"}))
def test_objectives_that_refuse_say_what_holds(objective):
    with pytest.raises(ValueError, match="SGVB"):
        pv.fit(small_vae(), binary(), objective=OBJECTIVES[objective](), epochs=1, progress=False)


def test_a_method_that_cannot_hold_what_is_shared_refuses_by_name():
    with pytest.raises(ValueError, match=r"site 'decoder\.0\.weight' is outside the data plate"):
        pv.log_marginal(small_vae(num_data=40), binary(), method="posterior-density")


def test_annealing_and_importance_sampling_agree_on_what_is_predicted():
    vae, x = small_vae(num_data=40), binary()[:5]
    scores = [
        pv.log_marginal(vae, x, num_particles=20_000, defensive=0.3),
        pv.log_marginal(vae, x, method="ais", num_particles=3000, num_steps=8, initial="prior"),
    ]
    error = sum(score.mc_error**2 for score in scores) ** 0.5
    assert abs(scores[0].mean - scores[1].mean) < 5 * error < 0.25


def unstated(x, y):
    return Regression(linear(), stated=False).program, (x, y)


def of_another_size(x, y):
    return Regression(linear(), 50).program, (x, y)


def as_list(x, y):
    return small_vae(), [binary()[:20], binary()[20:]]


SIZES = {
    "not stated": (unstated, {"batch_size": 3}, r'theta\.weight.*state its 6 data.*pyro\.plate\("data", 6'),
    "another": (of_another_size, {}, "state its 6 data.*it states 50"),
    "of batches that do not say": (as_list, {}, r"decoder\.0\.weight.*it states 20"),
    "too small": (lambda x, y: (small_vae(num_data=10), binary()), {"batch_size": 20}, "40 data.*it states 10"),
    "smaller than the minibatch": (
        lambda x, y: (pv.Program(*subsampled(4)), (x, y)),
        {},
        "states fewer data than the batch holds.*6 vs 4",
    ),
    "a prior twice": (lambda x, y: (small_vae(), binary()), {"prior_scale": 1.0}, r"prior_scale.*decoder\.0\.weight"),
}


def subsampled(num_data, numbered=False):
    """Its plate states N, and takes batches up to it, or of any size if they are numbered."""
    net = linear()

    def model(x, y):
        f = net.model()
        part = {"subsample": torch.arange(len(x))} if numbered else {"subsample_size": len(x)}
        with pyro.plate("data", num_data, **part):
            pyro.sample("y", dist.Normal(f(x)[..., 0], NOISE), obs=y)

    return model, lambda x, y: net.guide() and None


@pytest.mark.parametrize("size", SIZES)
def test_a_size_that_is_not_the_datas_is_refused(size):
    make, options, said = SIZES[size]
    program, data = make(*regression_data())
    with pytest.raises(ValueError, match=said):
        pv.fit(program, data, epochs=1, progress=False, **options)


def test_a_loader_says_how_many_data_there_are():
    vae = small_vae()
    run = pv.fit(vae, DataLoader(TensorDataset(binary()), batch_size=15), epochs=1, progress=False)
    assert vae.num_data == 40
    assert run.samples == 40
    listed = pv.fit(small_vae(num_data=40), [binary()[:20], binary()[20:]], epochs=1, progress=False)
    assert listed.samples == 40


def test_a_vae_that_shares_nothing_is_not_told_how_many_data_there_are():
    vae = pv.VAE((2, 2), 2, (3,))
    pv.fit(vae, binary(), epochs=1, progress=False)
    assert vae.num_data is None


def test_more_held_out_data_than_the_plate_states_can_be_scored_if_they_are_numbered():
    data, more = regression_data(), regression_data(10)
    program = pv.Program(*subsampled(6, numbered=True))
    run = pv.fit(program, data, test=more, epochs=1, progress=False)
    assert math.isfinite(run.history[-1]["test_bound"])
    assert len(pv.log_marginal(program, more, num_particles=3).values) == 10
    with pytest.raises(ValueError, match=r"states fewer data.*subsample=torch.arange"):
        pv.fit(pv.Program(*subsampled(6)), data, test=more, epochs=1, progress=False)


def test_a_bound_of_all_data_counts_the_globals_once_however_it_is_evaluated():
    """The plate states no N, for the minibatch is all data; evaluation takes them in parts."""
    net, (x, y) = linear(posterior_scale=1e-4), regression_data(700)
    program, sgvb = Regression(net, stated=False).program, pv.SGVB(20, "B")
    with torch.no_grad():
        for scale in net.log_scale.values():
            scale.fill_(-10.0)
    row = pv.fit(
        program, (x, y), objective=sgvb, batch_size=700, epochs=1, learning_rate=1e-12, progress=False
    ).history[-1]
    truth = pv.evaluate_bound(program, (x, y), sgvb, batch_size=700).mean * 700
    assert row["dataset_bound"] == pytest.approx(truth, abs=0.1)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: pv.VAE((4,), 2, bayesian="encoder"), "bayesian: expected"),
        (lambda: pv.VAE((4,), 2, bayesian=1), "bayesian: expected"),
        (lambda: pv.VAE((4,), 2, bayesian=None), "bayesian: expected"),
        (lambda: pv.VAE((4,), 2, bayesian=True, prior_scale=0.0), "prior_scale"),
        (lambda: pv.VAE((4,), 2, bayesian=True, num_data=0), "num_data"),
        (lambda: pv.VAE((4,), 2, prior_scale=-1.0), "prior_scale"),
        (lambda: pv.VAE((4,), 2, local_reparameterization=True), "local_reparameterization"),
        (lambda: pv.VAE((4,), 2, learn_prior=True), "learn_prior"),
        (lambda: pv.bayesian(nn.Linear(2, 1), 0.0), "prior_scale"),
        (lambda: pv.bayesian(nn.Linear(2, 1), math.nan), "prior_scale"),
        (lambda: pv.bayesian(nn.Linear(2, 1), posterior_scale=-1.0), "posterior_scale"),
        (lambda: pv.bayesian(nn.Linear(2, 1), event_dim=-1), "event_dim"),
        (lambda: pv.bayesian(nn.Tanh()), "parameters to train"),
        (lambda: pv.bayesian(nn.Linear(2, 1).requires_grad_(False)), "parameters to train"),
        (lambda: pv.bayesian(torch.tanh), "parameters to train"),
        (lambda: pv.bayesian(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))), r"batch normalisation at \['1'\]"),
        (lambda: pv.bayesian(nn.BatchNorm1d(2, track_running_stats=False)), "batch normalisation"),
    ],
)
def test_bad_arguments_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_guide_that_misses_the_weights_is_refused_by_name():
    toy = Regression(linear())
    with pytest.raises(ValueError, match=r"theta\.weight"):
        check_program(pv.Program(toy.model, lambda x, y: None), regression_data())


def test_a_global_in_the_plate_of_the_guide_is_refused_by_its_plates():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", 4, subsample=torch.arange(len(x))):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 4, subsample=torch.arange(len(x))):
            pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))

    with pytest.raises(ValueError, match=r"site 'mu'.*plates \[\].*plates \['data'\]"):
        check_program(pv.Program(model, guide), (torch.randn(4),))


# Pyro's own inference -------------------------------------------------------------------------------------------------


@each_vae
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_pyros_bounds_have_the_same_mean(kind, elbo):
    vae, x = small_vae(kind, scale=0.3, num_data=40), binary(10)
    pyros = elbo(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    pairs = [(pyros.loss(vae.model, vae.guide, x), pv.SGVB(50, "B").loss(vae.model, vae.guide, x)) for _ in range(60)]
    theirs, ours = torch.tensor(pairs).T
    assert_mean_close(theirs - ours, 0.0, min_effect=4.0)  # of about 130 nats, some 10 of them theta's


@each_vae
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_pyros_inference_trains_every_parameter(kind, elbo):
    vae, x = small_vae(kind, num_data=40), binary()
    begun = copy.deepcopy(vae.state_dict())
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), elbo())
    losses = [svi.step(x[rows]) for _ in range(3) for rows in torch.randperm(40).split(15)]
    assert all(map(math.isfinite, losses))
    assert [n for n, p in vae.named_parameters() if torch.equal(p, begun[n])] == []


@pytest.mark.parametrize("objective", [lambda: pv.SGVB(2), Trace_ELBO], ids=["SGVB", "Trace_ELBO"])
def test_an_automatic_guide_of_the_weights_beside_an_amortised_one(objective):
    decoder, encoder = pv.bayesian(MLP(2, (3,), 3)), nn.Linear(3, 2)
    toy = Factors(decoder, 40)

    def model(x):
        toy.model(x, None)

    automatic = AutoNormal(poutine.block(model, hide=["z", "x"]), init_scale=0.1)

    def guide(x):
        pyro.module("encoder", encoder)
        automatic(x)
        with toy.plate(x):
            pyro.sample("z", dist.Normal(encoder(x), 0.5).to_event(1))

    program, x = pv.Program(model, guide), torch.randn(40, 3)
    run = pv.fit(program, x, objective=objective(), epochs=15, **SMALL)
    assert run.history[-1]["train_bound"] > run.history[0]["train_bound"]
    score = pv.log_marginal(program, x, of="dataset", num_particles=20, num_local=2)
    assert math.isfinite(score.mean)


class Twice(nn.Module):
    """A layer that acts twice on a datum, or whose weights are read without it."""

    def __init__(self, reads):
        super().__init__()
        self.layer, self.reads = nn.Linear(2, 2), reads

    def forward(self, x):
        return x @ self.layer.weight.T if self.reads else self.layer(self.layer(x))


@pytest.mark.parametrize("reads", [False, True])
def test_layers_that_do_not_act_once_are_refused_by_the_local_trick(reads):
    local = pv.bayesian(Twice(reads), local_reparameterization=True)
    with pytest.raises(ValueError, match="each linear layer of 'theta' to act once"):
        local.guide()(torch.ones(3, 2))
    assert pv.bayesian(Twice(reads)).guide()(torch.ones(3, 2)).shape == (3, 2)
    shared = pv.bayesian(Twice(reads), posterior_scale=1e-12)
    x = torch.randn(5, 2)
    torch.testing.assert_close(shared.each(x), shared.module(x), rtol=0, atol=1e-9)
