"""The bridge from Pyro programs to tensors: every density once, over the right dimensions, parameters of its own."""

import copy
import gc
import math
import re
import weakref
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.optim import Adam
from torch import nn

import pyro_vae as pv
from pyro_vae.programs import as_program, check_program, log_weights
from tests import oracles
from tests.statistics import assert_mean_close


def normal_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def normal_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5 * x, 0.8))


def log_normal(value, loc, scale):
    return -0.5 * ((value - loc) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)


def close(left, right, atol=1e-12):
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


# Terms, site by site --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("vectorize", [True, False])
def test_every_term_by_hand(num_particles, vectorize):
    x = torch.randn(5)
    program = pv.Program(normal_model, normal_guide, vectorize=vectorize)
    weights = log_weights(program.model, program.guide, (x,), num_particles=num_particles)
    z = weights.latents["z"]
    assert z.shape == (num_particles, 5)
    close(weights.log_likelihood["x"], log_normal(x, z, 1.0))
    close(weights.log_prior["z"], log_normal(z, 0.0, 1.0))
    close(weights.log_guide["z"], log_normal(z, 0.5 * x, 0.8))
    close(weights.log_w, log_normal(x, z, 1.0) + log_normal(z, 0.0, 1.0) - log_normal(z, 0.5 * x, 0.8))
    close(weights.kl["z"], log_normal(z, 0.5 * x, 0.8) - log_normal(z, 0.0, 1.0))
    assert weights.log_w_global is None
    assert weights.scale == 1.0


def test_particles_and_data_are_drawn_independently():
    z = log_weights(normal_model, normal_guide, (torch.zeros(5),), num_particles=4).latents["z"]
    assert len(z.unique()) == 20


@pytest.mark.parametrize("dims", [("pixels", "data"), ("data", "pixels")])
def test_an_inner_or_outer_plate_is_summed(dims):
    """Pixels to the right of the data, or to the left: the data plate is found by its name."""
    x = torch.randn(5, 3) if dims == ("data", "pixels") else torch.randn(3, 5)
    data_dim, pixel_dim = (-2, -1) if dims == ("data", "pixels") else (-1, -2)

    def model(x):
        plate, pixels = pyro.plate("data", 5, dim=data_dim), pyro.plate("pixels", 3, dim=pixel_dim)
        with plate:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with pixels:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 5, dim=data_dim):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    weights = log_weights(model, guide, (x,), num_particles=4)
    z, rows = weights.latents["z"].reshape(4, 5), x if data_dim == -2 else x.T
    expected = log_normal(rows, z[..., None], 1.0).sum(-1)
    close(weights.log_likelihood["x"].reshape(4, 5), expected)
    close(weights.log_w.reshape(4, 5), expected)
    assert weights.log_w.shape == (4, 5)


def test_an_observation_that_depends_on_no_latent_counts_for_every_particle():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(torch.zeros(()), 1.0), obs=x)

    x = torch.randn(5)
    weights = log_weights(model, normal_guide, (x,), num_particles=3)
    close(weights.log_likelihood["x"], log_normal(x, 0.0, 1.0).expand(3, 5))


@pytest.mark.parametrize("style", ["poutine", "distribution"])
def test_masked_entries_have_no_influence(style):
    mask = torch.tensor([[True, False, True], [False, False, True], [True, True, True]])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            loc = z[..., None].expand(*z.shape, 3)
            if style == "distribution":
                pyro.sample("x", dist.Normal(loc, 1.0).mask(mask).to_event(1), obs=x)
                return
            with pyro.plate("entries", 3), poutine.mask(mask=mask.T):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    x = torch.randn(3, 3)
    weights = log_weights(model, guide, (x,), num_particles=2)
    z = weights.latents["z"].reshape(2, 3)
    expected = (log_normal(x, z[..., None], 1.0) * mask).sum(-1)
    close(weights.log_likelihood["x"].reshape(2, 3), expected)
    pyro.set_rng_seed(0)
    before = log_weights(model, guide, (x,), num_particles=2).log_w
    pyro.set_rng_seed(0)
    close(log_weights(model, guide, (torch.where(mask, x, 1e6),), num_particles=2).log_w, before, atol=0)


def test_masked_nan_gives_no_nan():
    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with poutine.mask(mask=mask):
                pyro.sample("x", dist.Normal(z, 1.0, validate_args=False), obs=x)

    x, mask = torch.tensor([0.5, math.nan]), torch.tensor([True, False])
    weights = log_weights(model, lambda x, mask: normal_guide(torch.zeros(2)), (x, mask), num_particles=2)
    assert weights.log_likelihood["x"].isfinite().all()
    assert (weights.log_likelihood["x"][:, 1] == 0).all()


def test_a_scale_of_the_programs_own_is_kept_and_the_minibatch_scale_is_not_in_the_terms():
    def model(x):
        with pyro.plate("data", 20, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with poutine.scale(scale=0.25):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 20, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, 0.8))

    x = torch.randn(5)
    weights = log_weights(model, guide, (x,), num_particles=3)
    close(weights.log_likelihood["x"], 0.25 * log_normal(x, weights.latents["z"], 1.0))
    close(weights.log_guide["z"], log_normal(weights.latents["z"], 0.5 * x, 0.8))
    assert weights.scale == 4.0


def test_an_inner_subsampled_plate_keeps_its_scale():
    def model(x):
        with pyro.plate("data", 20, subsample_size=len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("pixels", 9, subsample_size=3, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 20, subsample_size=len(x), dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    x = torch.randn(5, 3)
    weights = log_weights(model, guide, (x,), num_particles=2)
    z = weights.latents["z"].reshape(2, 5, 1)
    close(weights.log_likelihood["x"], 3.0 * log_normal(x, z, 1.0).sum(-1))


def test_a_subsample_by_index_gives_its_scale():
    index = torch.tensor([3, 0, 7])

    def model(x):
        with pyro.plate("data", 12, subsample=index):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        with pyro.plate("data", 12, subsample=index):
            pyro.sample("z", dist.Normal(0.5 * x[index], 0.8))

    x = torch.randn(12)
    weights = log_weights(model, guide, (x,), num_particles=2)
    assert weights.scale == 4.0
    close(weights.log_likelihood["x"], log_normal(x[index], weights.latents["z"], 1.0))


def test_a_plate_that_draws_its_own_minibatch_draws_one_for_guide_and_model():
    """Pyro's idiom ``with pyro.plate("data", N, subsample_size=M) as index``: datum and latent must belong together."""

    def model(x):
        with pyro.plate("data", len(x), subsample_size=10) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=10) as index:
            pyro.sample("z", dist.Normal(x[index] / 2, 0.5**0.5))  # the exact posterior

    x = 5.0 * torch.randn(40)
    weights = log_weights(model, guide, (x,), num_particles=2)
    evidence = log_normal(x, 0.0, 2**0.5)
    assert weights.log_w.shape == (2, 10)
    assert (weights.log_w[..., None] - evidence).abs().min(-1).values.max() < 1e-12  # each is log p of some datum


def test_factor_and_deterministic_sites():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.factor("tilt", -z.square())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(4)
    weights = log_weights(model, normal_guide, (x,), num_particles=3)
    z = weights.latents["z"]
    close(weights.log_w, log_normal(x, z, 1) + log_normal(z, 0, 1) - z.square() - log_normal(z, 0.5 * x, 0.8))
    check_program(pv.Program(model, normal_guide), (x,))


def test_a_global_latent_has_a_term_per_particle():
    toy, x = oracles.SharedMean(20), torch.randn(5)
    weights = log_weights(toy.model, toy.guide, (x,), num_particles=3)
    mu, z = weights.latents["mu"].reshape(3), weights.latents["z"]
    close(weights.log_prior["mu"], log_normal(mu, 0, 1))
    close(weights.log_w_global, log_normal(mu, 0, 1) - log_normal(mu, 0.2, 0.4))
    close(weights.log_prior["z"], log_normal(z, mu[:, None], 1))
    assert weights.global_sites == ["mu"]
    assert weights.scale == 4.0


def test_analytic_terms_replace_sampled_ones_and_forbid_log_weights():
    weights = log_weights(normal_model, normal_guide, (torch.randn(4),), num_particles=3, analytic_kl=True)
    assert weights.log_prior == weights.log_guide == {}
    assert weights.analytic_kl["z"].shape == (3, 4)
    with pytest.raises(ValueError, match=r"analytic KL"):
        _ = weights.log_w


def test_gradients_reach_the_latents_unless_asked_not_to():
    x = torch.randn(3, requires_grad=True)
    log_weights(normal_model, normal_guide, (x,), num_particles=2).log_guide["z"].sum().backward()
    assert x.grad.abs().max() < 1e-12  # log q at a reparameterised draw depends on its noise only
    x.grad = None
    log_weights(normal_model, normal_guide, (x,), num_particles=2).log_prior["z"].sum().backward()
    assert (x.grad != 0).all()


def test_no_data_plate_is_named_in_the_error():
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, 0.8))

    with pytest.raises(ValueError, match=r'plate named "data".*\[\'rows\'\]'):
        log_weights(model, guide, (torch.zeros(3),))


# Auxiliary sites: Pyro's automatic guides -----------------------------------------------------------------------------


def positive_model(x):
    """z is LogNormal, so that an automatic guide's map to it has a Jacobian."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("auto", [AutoNormal, AutoDiagonalNormal])
@pytest.mark.parametrize("estimator", ["A", "B"])
@pytest.mark.filterwarnings("ignore:estimator B")
def test_an_automatic_guide_counts_its_auxiliary_density(auto, estimator):
    x = torch.tensor([0.5, 1.5, 2.5])
    guide = auto(positive_model)
    guide(x)
    reference = Trace_ELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=1)
    ours = pv.SGVB(100, estimator=estimator)
    truth = reference.loss(positive_model, guide, x)  # its own error: about 0.01
    losses = torch.tensor([ours.loss(positive_model, guide, x) for _ in range(200)])
    assert_mean_close(losses - truth, 0.0, z=10, min_effect=0.3)


def test_a_global_auxiliary_site_is_no_per_datum_weight():
    guide = AutoDiagonalNormal(normal_model)
    guide(torch.zeros(3))
    with pytest.raises(ValueError, match=r"draws \('z',\) together with those of other data"):
        pv.log_marginal(pv.Program(normal_model, guide), torch.zeros(3), num_particles=2)


# Parameters -----------------------------------------------------------------------------------------------------------


def trainable(name="weight"):
    """A program with one pyro.param in each function."""

    def model(x):
        w = pyro.param(name, torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(w * z, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.5))
        scale = pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc * x, scale))

    return pv.Program(model, guide)


def values(program):
    return {name: tensor.detach().clone() for name, tensor in program.named_parameters().items()}


def step(program, x, objective=None):
    return SVI(program.model, program.guide, Adam({"lr": 0.05}), loss=objective or pv.SGVB()).step(x)


def test_a_program_owns_its_parameters():
    x, one, other = torch.randn(20), trainable(), trainable()
    for program in (one, other):
        program.model(x), program.guide(x)
    start = values(one)
    assert start.keys() == {"weight", "loc", "scale"}
    assert start["scale"].item() == pytest.approx(math.log(0.7))  # unconstrained
    step(one, x)
    assert all(not torch.equal(values(one)[name], start[name]) for name in start)
    assert all(torch.equal(values(other)[name], start[name]) for name in start)
    step(other, x)
    assert all(not torch.equal(values(other)[name], start[name]) for name in start)
    assert len(pyro.get_param_store()) == 0


def test_clear_param_store_does_not_reach_into_a_program():
    x, program = torch.randn(20), trainable()
    step(program, x)
    kept = values(program)
    pyro.clear_param_store()
    program.model(x), program.guide(x)
    assert all(torch.equal(values(program)[name], kept[name]) for name in kept)


def test_two_programs_with_modules_of_one_name():
    x, programs, networks = torch.randn(20), [], []
    for _ in range(2):
        network = nn.Linear(1, 1)

        def model(x, network=network):
            pyro.module("network", network)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
                pyro.sample("x", dist.Normal(network(z[..., None])[..., 0], 1.0), obs=x)

        programs.append(pv.Program(model, normal_guide))
        networks.append(network)
    before = [copy.deepcopy(n.state_dict()) for n in networks]
    step(programs[0], x)
    assert not torch.equal(networks[0].weight, before[0]["weight"])
    assert torch.equal(networks[1].weight, before[1]["weight"])
    step(programs[1], x)
    assert not torch.equal(networks[1].weight, before[1]["weight"])


def test_a_pyro_module_program_trains():
    class Rows(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.weight = pyro.nn.PyroParam(torch.tensor(1.0))
            self.network = pyro.nn.PyroModule[nn.Linear](1, 1)

        def model(self, x):
            pyro.module("rows", self)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
                pyro.sample("x", dist.Normal(self.weight * z, 1.0), obs=x)

        def guide(self, x):
            pyro.module("rows", self)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.network(x[:, None])[:, 0], 0.8))

    rows, x = Rows(), torch.randn(20)
    program = as_program(rows)
    program.model(x), program.guide(x)
    before = values(program)
    assert {"weight_unconstrained", "network.weight", "network.bias"} <= {n.removeprefix("rows$$$") for n in before}
    step(program, x)
    assert all(not torch.equal(values(program)[name], before[name]) for name in before)


class Half(nn.Module):
    """One function of a program, with a parameter and a mode of its own."""

    def __init__(self, function):
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.ones(())), function

    def run(self, x):
        return self.function(self.weight * x)


def test_two_modules_of_one_class_are_both_trained_and_both_evaluated():
    model, guide = Half(normal_model), Half(normal_guide)
    program = pv.Program(model.run, guide.run)
    assert {id(p) for p in program.named_parameters().values()} == {id(model.weight), id(guide.weight)}
    with program.evaluation_mode():
        assert not model.training
        assert not guide.training


def test_two_modules_of_one_variable_name_are_both_found():
    def function(network):
        return lambda x: network(x)

    networks = [nn.BatchNorm1d(1), nn.BatchNorm1d(1)]
    program = pv.Program(*map(function, networks))
    assert {id(m) for m in program.modules().values()} == {id(m) for m in networks}
    assert len(program.named_buffers()) == 6


@pytest.mark.parametrize("used_before", [True, False])
def test_automatic_guides_of_two_programs_are_apart(used_before):
    """PyroModule writes to the global store's dictionaries directly, not by pyro.param."""
    x, guides = torch.randn(20), [AutoNormal(normal_model), AutoNormal(normal_model)]
    for guide in guides if used_before else ():
        pyro.clear_param_store()
        guide(x)
    one, other = (pv.Program(normal_model, guide) for guide in guides)
    for program in (one, other):
        program.model(x), program.guide(x)
    start, start_of_other = values(one), values(other)
    assert len(start) == 2
    step(one, x)
    assert all(not torch.equal(values(one)[name], start[name]) for name in start)
    assert all(torch.equal(values(other)[name], start_of_other[name]) for name in start)
    step(other, x)
    assert all(not torch.equal(values(other)[name], start_of_other[name]) for name in start)


def test_a_failure_inside_leaves_the_global_store_in_place():
    def model(x):
        pyro.param("inside", torch.tensor(1.0))
        raise KeyError

    pyro.param("outside", torch.tensor(2.0))
    with pytest.raises(KeyError):
        pv.Program(model, normal_guide).model(torch.zeros(1))
    assert list(pyro.get_param_store()) == ["outside"]


def test_a_program_inside_a_program():
    """The outer one's model calls the inner one's: each keeps its own parameters."""
    inner = trainable()

    def model(x):
        pyro.param("outer", torch.tensor(1.0))
        inner.model(x)
        pyro.param("later", torch.tensor(1.0))

    outer = pv.Program(model, normal_guide)
    outer.model(torch.zeros(2))
    assert values(outer).keys() == {"outer", "later"}
    assert values(inner).keys() == {"weight"}


def test_as_program_is_the_same_at_each_call_and_dies_with_its_object():
    vae = pv.VAE(data_shape=(4,), latent_dim=1, hidden_dims=(3,))
    program = as_program(vae)
    assert as_program(vae) is program
    assert as_program(program) is program
    seen = weakref.ref(vae)
    log_weights(program.model, program.guide, (torch.zeros(2, 4),))
    del vae, program
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("bad", [None, 3, nn.Linear(1, 1), lambda x: x])
def test_what_is_no_program_is_refused(bad):
    with pytest.raises(ValueError, match=r"\.model and \.guide"):
        as_program(bad)


def test_a_model_that_cannot_be_called_is_refused():
    with pytest.raises(ValueError, match="model"):
        pv.Program(3, normal_guide)
    with pytest.raises(ValueError, match="guide"):
        pv.Program(normal_model, 3)


def test_evaluation_mode_is_put_back():
    dropout, frozen = nn.Dropout(), nn.Dropout().eval()
    program = pv.Program(lambda x: dropout(x), lambda x: frozen(x))
    seen = []

    def fail():
        with program.evaluation_mode():
            seen.append(dropout.training)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [False]
    assert dropout.training
    assert not frozen.training


# The dry run ----------------------------------------------------------------------------------------------------------

OK_MODEL, OK_GUIDE = normal_model, normal_guide


def plate(x, dim=None):
    return pyro.plate("data", len(x), dim=dim)


def two_latents(x):
    with plate(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("u", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def extra_site(x):
    with plate(x):
        pyro.sample("z", dist.Normal(0.5 * x, 0.8))
        pyro.sample("v", dist.Normal(torch.zeros(()), 1.0))


def wide_event(x):
    with plate(x):
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def outside_the_plate(x):
    pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))


def other_plate(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(0.5 * x, 0.8))


def smaller_plate(x):
    with pyro.plate("data", len(x) - 1):
        pyro.sample("z", dist.Normal(torch.zeros(()), 0.8))


def undeclared(x):
    with plate(x, dim=-2):
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))


def undeclared_model(x):
    with plate(x, dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=x[:, None])


def no_plate_model(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
    pyro.sample("x", dist.Normal(z, 1.0).expand(x.shape).to_event(1), obs=x)


def positive_observation(x):
    with plate(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.LogNormal(z, 1.0), obs=x)


def indexing_model(x):
    with plate(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[:, 0], 1.0), obs=x)


def indexing_guide(x):
    with plate(x):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def grey_observation(x):
    with plate(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Bernoulli(logits=z), obs=x)


def misshapen_observation(x):
    with plate(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 2), 1.0).to_event(1), obs=x[:, None].expand(-1, 3))


MISTAKES = {
    "a latent site is missing": (two_latents, OK_GUIDE, ["'u'", "'z'"]),
    "a site too many": (OK_MODEL, extra_site, ["'v'", "'z'"]),
    "another event shape": (OK_MODEL, wide_event, ["'z'", r"event \(\)", r"event \(3,\)"]),
    "not in the plate": (OK_MODEL, outside_the_plate, ["'z'", r"batch \(4,\)", r"batch \(\)", "'data'"]),
    "in another plate": (OK_MODEL, other_plate, ["'z'", "'data'", "'rows'"]),
    "a plate of another size": (OK_MODEL, smaller_plate, ["'z'", r"\(4,\)", r"\(3,\)"]),
    "a dimension of no plate": (undeclared_model, undeclared, ["'z'", r"\(4, 3\)", r"to_event\(1\)"]),
    "no data plate": (no_plate_model, outside_the_plate, ['plate named "data"']),
    "outside the support": (positive_observation, OK_GUIDE, ["'x'", "LogNormal", "-1"]),
    "no probability of ink": (grey_observation, OK_GUIDE, ["'x'", "Bernoulli", "-1 to 2"]),
    "another number of entries": (misshapen_observation, OK_GUIDE, ["'x'", r"\(4, 3\)", r"\(4, 2\)"]),
    "code that cannot broadcast": (indexing_model, indexing_guide, ["vectorize=False", "site x", "4 vs 2"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake):
    model, guide, said = MISTAKES[mistake]
    with pytest.raises(ValueError) as caught:
        check_program(pv.Program(model, guide), (torch.tensor([-1.0, 0.5, 1.0, 2.0]),))
    for pattern in said:
        assert re.search(pattern, str(caught.value)), str(caught.value)


def test_vectorize_false_rescues_code_that_cannot_broadcast():
    x = torch.randn(4)
    program = pv.Program(indexing_model, indexing_guide, vectorize=False)
    assert check_program(program, (x,)).batch_size == 4
    weights = log_weights(program.model, program.guide, (x,), num_particles=3)
    close(weights.log_w, log_normal(x, weights.latents["z"][..., 0], 1.0))


@pytest.mark.parametrize(("args", "kwargs"), [((1, 2), {}), ((), {}), ((), {"y": 1})])
def test_wrong_arguments_are_refused(args, kwargs):
    with pytest.raises(ValueError, match=r"arguments \(x\)"):
        check_program(pv.Program(OK_MODEL, OK_GUIDE), args, kwargs)


def test_what_a_dry_run_finds():
    vae = as_program(pv.VAE(data_shape=(4,), latent_dim=1, hidden_dims=(3,)))
    found = check_program(vae, (torch.ones(6, 4),))
    assert (found.batch_size, found.full_size, found.binary_arguments) == (6, 6, {"x"})
    assert found.data_of(5) == 5
    toy = oracles.SharedMean(20)
    found = check_program(pv.Program(toy.model, toy.guide), (torch.randn(5),))
    assert (found.batch_size, found.full_size, found.binary_arguments) == (5, 20, set())
    assert found.data_of(3) == 20


def test_a_dry_run_leaves_generators_and_running_statistics_alone():
    norm = nn.BatchNorm1d(2)

    def guide(x):
        pyro.module("norm", norm)
        with plate(x):
            pyro.sample("z", dist.Normal(norm(x)[:, 0], 0.8))

    def model(x):
        with plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).expand([*z.shape, 2]).to_event(1), obs=x)

    state = torch.get_rng_state()
    check_program(pv.Program(model, guide), (5 + torch.arange(8.0).reshape(4, 2),))
    assert torch.equal(torch.get_rng_state(), state)
    assert norm.running_mean.tolist() == [0.0, 0.0]
    assert norm.training


def test_auxiliary_sites_of_a_guide_are_allowed():
    check_program(pv.Program(normal_model, AutoNormal(normal_model)), (torch.zeros(3),))


def test_log_weights_of_an_object_without_an_owner():
    """A SimpleNamespace of two functions is a program too."""
    program = as_program(SimpleNamespace(model=normal_model, guide=normal_guide))
    assert log_weights(program.model, program.guide, (torch.zeros(3),)).log_w.shape == (1, 3)
