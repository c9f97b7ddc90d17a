"""Dreams: joint draws from the model, handed over under the arguments' own names."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.programs import dream, log_weights
from tests import oracles
from tests.statistics import assert_mean_close


def model(x, shift=0.0, *, scale=1.0):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1) + shift, scale), obs=x)


def test_shapes_and_no_gradients():
    toy, x = oracles.Amortized(), oracles.example_data(5)
    dreamt = dream(toy.model, (x,))
    assert dreamt.latents.keys() == {"z"}
    assert dreamt.latents["z"].shape == (1, 5, 2)
    assert dreamt.args[0].shape == x.shape
    assert not (dreamt.args[0] == x).any()
    assert dreamt.kwargs == {}
    assert not dreamt.latents["z"].requires_grad
    assert not dreamt.args[0].requires_grad


def test_covariates_are_kept_and_used():
    x, shift = torch.zeros(1000), torch.linspace(-1e4, 1e4, 1000)
    for args, kwargs in (((x, shift), {"scale": 1e-3}), ((x,), {"shift": shift, "scale": 1e-3})):
        dreamt = dream(model, args, kwargs)
        value = dreamt.args[0]
        assert dreamt.args[1:] == args[1:]
        assert {k: v for k, v in dreamt.kwargs.items() if k != "shift"} == {"scale": 1e-3}
        assert (value - shift - dreamt.latents["z"][0].sum(-1)).abs().max() < 0.01  # x belongs to its z and its shift
        assert (x == 0).all()  # the batch itself is left alone


def test_what_came_by_name_goes_by_name():
    """Model and guide may order their arguments in two ways when they are called by name."""
    x, shift = torch.zeros(3), torch.full((3,), 1e3)
    dreamt = dream(model, (), {"shift": shift, "x": x})
    assert dreamt.args == ()
    assert list(dreamt.kwargs) == ["shift", "x"]
    assert dreamt.kwargs["shift"] is shift
    assert (dreamt.kwargs["x"] > 900).all()


def test_more_than_one_observed_site_and_arguments_without_a_name():
    def two(x, y, *rest, **more):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z + 100, 1e-3), obs=y)
            pyro.sample("x", dist.Normal(z - 100, 1e-3), obs=x)
            pyro.sample("w", dist.Normal(z, 1e-3), obs=more["w"])

    zero = torch.zeros(4)
    dreamt = dream(two, (zero, zero, "a", "b"), {"w": zero, "flag": True})
    z = dreamt.latents["z"][0]
    assert dreamt.args[2:] == ("a", "b")
    assert dreamt.kwargs["flag"] is True
    for value, mean in zip((*dreamt.args[:2], dreamt.kwargs["w"]), (z - 100, z + 100, z), strict=True):
        assert (value - mean).abs().max() < 0.01


@pytest.mark.parametrize("form", ["function", "program", "method", "loop"])
def test_the_moments_are_the_models_own(form):
    x = oracles.example_data(40_000)
    law = oracles.linear_gaussian(*oracles.example())
    functions = {
        "function": lambda: oracles.with_params()[0],
        "program": lambda: pv.Program(*oracles.with_modules()).model,
        "method": lambda: pv.LinearGaussian(*oracles.example()).model,
        "loop": lambda: pv.Program(*oracles.without_broadcasting(), vectorize=False).model,
    }
    dreamt = dream(functions[form](), (x,))
    joint = torch.cat([dreamt.latents["z"][0], dreamt.args[0]], 1)
    assert_mean_close(joint, law.mean, min_effect=0.05)
    centred = joint - law.mean
    assert_mean_close(centred[:, :, None] * centred[:, None], law.cov, min_effect=0.1)
    shuffled = torch.cat([dreamt.latents["z"][0].roll(1, 0), dreamt.args[0]], 1) - law.mean
    with pytest.raises(AssertionError, match="mean"):  # the bug: latents of other dreams
        assert_mean_close(shuffled[:, :, None] * shuffled[:, None], law.cov, min_effect=0.1)


def test_discrete_data_and_latents():
    toy = oracles.BeliefNetwork(20_000)
    dreamt = dream(toy.model, toy.data)
    _, log_joint, _, _ = toy.tables()
    cell = (dreamt.args[0] @ torch.tensor([4.0, 2.0, 1.0])) * 4 + dreamt.latents["z"][0] @ torch.tensor([2.0, 1.0])
    frequencies = nn.functional.one_hot(cell.long(), 32).double()
    assert_mean_close(frequencies, log_joint.exp().flatten(), min_effect=0.02)


def test_a_module_whose_forward_is_the_model():
    class Model(pyro.nn.PyroModule):
        def forward(self, x):
            model(x)

    assert dream(Model(), (torch.zeros(3),)).latents["z"].shape == (1, 3, 2)


def test_a_method_and_a_positional_argument_of_the_model():
    class Holder:
        def model(self, shift, x):
            model(x, shift)

    dreamt = dream(Holder().model, (torch.full((3,), 1e3), torch.zeros(3)))
    assert (dreamt.args[0] == 1e3).all()
    assert (dreamt.args[1] > 900).all()


def test_several_layers_and_plates():
    def layered(x):
        with pyro.plate("data", len(x), dim=-2):
            a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("pixels", 3, dim=-1):
                b = pyro.sample("b", dist.Normal(a, 1e-3))
                pyro.sample("x", dist.Normal(b, 1e-3), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            a = pyro.sample("a", dist.Normal(x.mean(-1, keepdim=True), 1.0))
            with pyro.plate("pixels", 3, dim=-1):
                pyro.sample("b", dist.Normal(a, 1.0))

    dreamt = dream(layered, (torch.zeros(5, 3),))
    assert {n: tuple(z.shape) for n, z in dreamt.latents.items()} == {"a": (1, 5, 1), "b": (1, 5, 3)}
    weights = log_weights(layered, guide, dreamt.args, latents=dreamt.latents)
    assert weights.log_q.shape == (1, 5)
    a, b = dreamt.latents["a"][0], dreamt.latents["b"][0]
    q = dist.Normal(dreamt.args[0].mean(-1), 1.0).log_prob(a[:, 0]) + dist.Normal(a, 1.0).log_prob(b).sum(-1)
    torch.testing.assert_close(weights.log_q[0], q, rtol=0, atol=1e-12)
    p = dist.Normal(0.0, 1.0).log_prob(a[:, 0]) + dist.Normal(a, 1e-3).log_prob(b).sum(-1)
    p = p + dist.Normal(b, 1e-3).log_prob(dreamt.args[0]).sum(-1)
    torch.testing.assert_close(weights.log_joint[0], p, rtol=1e-12, atol=0)


def test_a_deterministic_site_is_neither_data_nor_latent():
    def deterministic(x):
        pyro.deterministic("one", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            mean = pyro.deterministic("mean", z + 100)
            pyro.sample("x", dist.Normal(mean, 1e-3), obs=x)

    dreamt = dream(deterministic, (torch.zeros(4),))
    assert dreamt.latents.keys() == {"z"}
    assert (dreamt.args[0] - dreamt.latents["z"][0] - 100).abs().max() < 0.01


def test_an_info_dict_that_two_sites_share_is_left_alone():
    info = {"note": 1}

    def sharing(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0), infer=info)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, infer=info)

    for _ in range(2):
        assert dream(sharing, (torch.zeros(4),)).latents.keys() == {"z"}
    assert info == {"note": 1}


# Refusals -------------------------------------------------------------------------------------------------------------


def test_an_observed_site_without_an_argument_of_its_name():
    def unnamed(data):
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    with pytest.raises(ValueError, match=r"observed site 'x' has no argument of its name.*'x', got \['data'\]"):
        dream(unnamed, (torch.zeros(3),))


def test_a_global_latent():
    with pytest.raises(ValueError, match="site 'mu' is not in the data plate"):
        dream(oracles.SharedMean(20).model, (torch.randn(5),))


def test_a_site_that_observes_its_argument_in_another_shape():
    def flattening(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 6), 1.0).to_event(1), obs=x.flatten(1))

    with pytest.raises(ValueError, match=r"'x' has shape \(5, 6\).*shape \(5, 2, 3\)"):
        dream(flattening, (torch.zeros(5, 2, 3),))


def test_a_plate_that_draws_its_own_minibatch():
    def subsampling(x):
        with pyro.plate("data", len(x), subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    with pytest.raises(ValueError, match=r"'x' has shape \(3,\).*shape \(9,\)"):
        dream(subsampling, (torch.zeros(9),))
