"""bfloat16 is for products alone: their factors are rounded, and nothing else is."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn import functional

import pyro_vae as pv
from pyro_vae.training import compiled
from pyro_vae.training.precision import PRECISIONS, products_in
from tests.training.test_resume import assert_same

F32, F64 = torch.float32, torch.float64


def rounded(tensor):
    return tensor.to(torch.bfloat16).to(tensor.dtype)


A, B, V = (
    (lambda d: torch.randn(5, 7, dtype=d)),
    (lambda d: torch.randn(7, 3, dtype=d)),
    (lambda d: torch.randn(3, dtype=d)),
)

PRODUCTS = {
    "@": lambda d: (lambda a, b: a @ b, (A(d), B(d))),
    "matmul": lambda d: (torch.matmul, (A(d), B(d))),
    "batched @": lambda d: (lambda a, b: a @ b, (torch.randn(2, 5, 7, dtype=d), torch.randn(2, 7, 3, dtype=d))),
    "method": lambda d: (lambda a, b: a.mm(b), (A(d), B(d))),
    "mm": lambda d: (torch.mm, (A(d), B(d))),
    "bmm": lambda d: (torch.bmm, (torch.randn(2, 5, 7, dtype=d), torch.randn(2, 7, 3, dtype=d))),
    "addmm": lambda d: (torch.addmm, (V(d), A(d), B(d))),
    "linear": lambda d: (functional.linear, (A(d), B(d).T, V(d))),
    "linear of particles": lambda d: (functional.linear, (torch.randn(4, 5, 7, dtype=d), B(d).T, V(d))),
    "conv1d": lambda d: (functional.conv1d, (torch.randn(2, 3, 8, dtype=d), torch.randn(4, 3, 3, dtype=d))),
    "conv2d": lambda d: (functional.conv2d, (torch.randn(2, 3, 8, 8, dtype=d), torch.randn(4, 3, 3, 3, dtype=d))),
    "conv_transpose2d": lambda d: (
        functional.conv_transpose2d,
        (torch.randn(2, 3, 4, 4, dtype=d), torch.randn(3, 4, 3, 3, dtype=d)),
    ),
}


@pytest.mark.parametrize("dtype", [F32, F64], ids=["single", "double"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_factors_of_products_are_rounded_and_results_are_not_narrow(name, dtype):
    product, factors = PRODUCTS[name](dtype)
    full = product(*factors)
    with products_in("bf16"):
        half = product(*factors)
    assert half.dtype == dtype
    assert not torch.equal(half, full)
    by_hand = product(*map(rounded, factors))  # sums in bfloat16 or wider, and one rounding of the result
    assert (half - by_hand).abs().max() <= 2**-7 * by_hand.abs().max()
    assert 0 < (half - full).norm() <= 0.01 * full.norm()
    assert torch.equal(half, rounded(half))


def test_layers_are_products():
    torch.set_default_dtype(F32)
    for layer, x in ((nn.Linear(6, 4), torch.randn(3, 6)), (nn.Conv2d(2, 3, 3), torch.randn(1, 2, 5, 5))):
        full = layer(x)
        with products_in("bf16"):
            half = layer(x)
        assert not torch.equal(full, half)
        torch.testing.assert_close(full, half, rtol=0.05, atol=0.02)


def test_arguments_by_name_are_rounded_too():
    x, weight = torch.randn(5, 7), torch.randn(3, 7)
    with products_in("bf16"):
        assert torch.equal(functional.linear(input=x, weight=weight), functional.linear(x, weight))
        assert torch.equal(functional.linear(x, weight=weight), functional.linear(x, weight))


def test_a_result_that_is_given_is_filled():
    a, b, out = torch.randn(5, 7), torch.randn(7, 3), torch.zeros(5, 3)
    with products_in("bf16"):
        torch.mm(a, b, out=out)
    torch.testing.assert_close(out, a @ b, rtol=0.05, atol=0.1)


def test_the_backward_pass_is_rounded_and_gradients_are_wide():
    x, weight = torch.randn(6, 5), torch.randn(5, 4, requires_grad=True)
    (full,) = torch.autograd.grad((x @ weight).square().sum(), [weight])
    with products_in("bf16"):
        (half,) = torch.autograd.grad((x @ weight).square().sum(), [weight])
    assert half.dtype == F64
    assert 0 < (half - full).norm() <= 0.02 * full.norm()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum(),
        lambda x: x * x + x,
        lambda x: x.logsumexp(0),
        lambda x: dist.Normal(x, 1.0).log_prob(x + 1).sum(-1),
        lambda x: dist.Bernoulli(logits=x).log_prob(torch.ones_like(x)).sum(),
        lambda x: functional.softplus(x).cumsum(0),
        lambda x: torch.arange(6).reshape(2, 3) @ torch.arange(3),
    ],
)
def test_everything_else_is_left_alone(function):
    x = torch.randn(4, 6)
    with products_in("bf16"):
        half = function(x)
    assert torch.equal(half, function(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_narrow_already_is_left_alone(dtype):
    a, b = torch.randn(5, 7).to(dtype), torch.randn(7, 3).to(dtype)
    with products_in("bf16"):
        half = a @ b
    assert half.dtype == dtype
    assert torch.equal(half, a @ b)


def test_full_precision_is_nothing_and_contexts_end():
    a, b = torch.randn(5, 7), torch.randn(7, 3)
    expected = a @ b
    with products_in("full"):
        assert torch.equal(a @ b, expected)
    with pytest.raises(KeyError), products_in("bf16"):
        raise KeyError
    assert torch.equal(a @ b, expected)
    assert PRECISIONS == ("full", "bf16")


# In a run -------------------------------------------------------------------------------------------------------------

SETTINGS = {"num_samples": 800, "batch_size": 40, "optimizer": "adam", "learning_rate": 0.01, "progress": False}


def trained(x, **settings):
    torch.manual_seed(3)
    vae = pv.VAE((40,), 3, (30,))
    run = pv.fit(vae, x, **SETTINGS | settings)
    return run, {name: tensor.detach().clone() for name, tensor in vae.named_parameters()}


@pytest.fixture
def images():
    torch.set_default_dtype(F32)
    return torch.rand(120, 40).round()


def test_a_run_is_rounded_in_its_products_alone(images):
    full, theirs = trained(images, compile=False)
    half, ours = trained(images, compile=False, precision="bf16")
    assert all(tensor.dtype == F32 for tensor in ours.values())
    assert any(not torch.equal(rounded(tensor), tensor) for tensor in ours.values())  # weights are not kept narrow
    assert any(not torch.equal(ours[name], theirs[name]) for name in theirs)
    assert half.history[-1]["train_bound"] == pytest.approx(full.history[-1]["train_bound"], rel=0.01)


def test_the_bound_itself_has_wide_sums(images):
    """Of 784 pixels bfloat16 would keep two digits; of products alone, a step's loss loses far less."""
    torch.manual_seed(3)
    vae = pv.VAE((40,), 3, (30,))
    seen = {}

    def keep(trace):
        for site in trace.nodes.values():
            if site["type"] == "sample" and site["name"] != "data":
                seen[site["name"]] = site["fn"].log_prob(site["value"])

    losses = []
    for precision in PRECISIONS:
        torch.manual_seed(4)
        with products_in(precision), torch.no_grad():
            losses.append(pv.SGVB(8).loss(vae.model, vae.guide, images) / len(images))
            keep(pyro.poutine.trace(vae.model).get_trace(images))
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert seen["x"].dtype == F32
    assert not torch.equal(seen["x"], rounded(seen["x"]))


def test_recorded_steps_are_rounded_as_eager_ones(monkeypatch, images):
    monkeypatch.setattr(compiled, "CAPTURE_AFTER", 3)
    monkeypatch.setattr(compiled, "COMPILE_AFTER", 10**9)
    run, ours = trained(images, precision="bf16")
    other, theirs = trained(images, precision="bf16", compile=False)
    assert (run.path, other.path) == ("captured", "eager")
    assert_same(ours, theirs)


def test_pyros_elbos_are_rounded_too(images):
    elbo = pyro.infer.Trace_ELBO()
    full, half = (trained(images, objective=elbo, precision=precision)[1] for precision in PRECISIONS)
    assert any(not torch.equal(full[name], half[name]) for name in full)


def test_evaluations_are_not_rounded(images):
    """A bound in the history is that of the weights, whatever the precision they were trained in."""
    run, _ = trained(images, precision="bf16", num_samples=40)
    torch.manual_seed(3)
    vae = pv.VAE((40,), 3, (30,))
    pv.fit(vae, images, **SETTINGS | {"num_samples": 40}, precision="bf16")
    bound = pv.evaluate_bound(vae, images, pv.SGVB(), num_data=10_000, seed=0).mean
    assert bound == run.history[-1]["train_bound"]
    assert math.isfinite(bound)


@pytest.mark.parametrize("precision", ["tf9", "fp16", None, ""])
def test_other_precisions_are_refused(images, precision):
    with pytest.raises(ValueError, match=r"precision: expected .*bf16"):
        pv.fit(pv.VAE((40,), 3, (30,)), images, **SETTINGS, precision=precision)
