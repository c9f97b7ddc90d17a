"""Recorded functions: the same results, writes and random numbers, run operation by operation or compiled."""

import doctest
import logging
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import pyro_vae.compile
from pyro_vae.compile import CaptureError, Graph, capture, difference, unchanged


@pytest.fixture(scope="module", autouse=True)
def _few_messages():
    """Inductor's debug records are many, and pytest keeps them all."""
    logging.getLogger("torch.__trace").setLevel(logging.WARNING)


def results(function, inputs, state, num_runs=2, seed=5):
    """What comes of calling a function: results, state, inputs, and where torch's generator stands."""
    kept = [tensor.clone() for tensor in state]
    torch.manual_seed(seed)
    try:
        for _ in range(num_runs):
            given = [tensor.clone() for tensor in inputs]
            outputs = [tensor.clone() for tensor in function(*given)]
        return outputs, [tensor.clone() for tensor in state], given, torch.get_rng_state()
    finally:
        with torch.no_grad():
            for tensor, value in zip(state, kept, strict=True):
                tensor.copy_(value)


def recorded(function, inputs, state=()):
    with torch.random.fork_rng(), unchanged(state):
        return capture(function, [tensor.clone() for tensor in inputs], state)


def assert_equal(ours, theirs, tolerance=0.0):
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert x.dtype == y.dtype
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
    assert torch.equal(ours[3], theirs[3])


def assert_same_function(function, inputs, state=(), compile=True, tolerance=1e-12):
    """Recorded: the same bits. Compiled: the same numbers. Both leave the generator where the function does."""
    expected = results(function, inputs, state)
    graph = recorded(function, inputs, state)
    assert_equal(results(graph, inputs, state), expected)
    if compile:
        assert_equal(results(graph.compiled(inputs), inputs, state), expected, tolerance)


# Recording ------------------------------------------------------------------------------------------------------------


def test_forward_and_backward_are_one_graph():
    weight = torch.randn(3, 2, requires_grad=True)

    def slope(x):
        loss = (x @ weight).sigmoid().square().sum()
        return loss.detach(), *torch.autograd.grad(loss, [weight])

    graph = recorded(slope, [torch.randn(4, 3)], [weight])
    for _ in range(2):
        x = torch.randn(4, 3)
        for ours, theirs in zip(graph(x), slope(x), strict=True):
            assert torch.equal(ours, theirs)
            assert not ours.requires_grad
        with torch.no_grad():
            weight.mul_(1.5)
    assert len(graph) > 5


def test_results_keep_their_order_and_may_be_the_same_tensor():
    def function(x):
        y = x + 1
        return x, y, x.T, y, x[0], torch.ones(2)

    assert_same_function(function, [torch.randn(3, 2)], compile=False)


def test_random_numbers_are_drawn_anew_and_in_order():
    def function(x):
        return x + torch.randn(3), torch.rand(2), torch.bernoulli(torch.full((4,), 0.5)), torch.randperm(5)

    graph = recorded(function, [torch.zeros(3)])
    assert not torch.equal(graph(torch.zeros(3))[0], graph(torch.zeros(3))[0])
    assert_same_function(function, [torch.zeros(3)], compile=False)


def test_recording_runs_the_function_on_the_inputs_themselves_and_puts_them_back():
    x, seen = torch.zeros(2), []
    capture(lambda x: (seen.append(x), x.add_(1))[1:], [x])
    assert seen[0] is x
    assert torch.equal(x, torch.zeros(2))


@pytest.mark.parametrize("given", [True, False], ids=["given as state", "found"])
def test_tensors_reached_by_reference_are_read_and_written_in_place(given):
    mean = torch.zeros(3)

    def function(x):
        before = mean.clone()
        mean.mul_(0.5).add_(x)
        return (before + mean,)

    graph = recorded(function, [torch.ones(3)], [mean] if given else [])
    assert any(tensor is mean for tensor in graph.state)
    mean.fill_(2.0)
    assert torch.equal(graph(torch.ones(3))[0], torch.full((3,), 4.0))
    assert torch.equal(mean, torch.full((3,), 2.0))
    mean.fill_(4.0)
    assert torch.equal(graph(torch.ones(3))[0], torch.full((3,), 7.0))


def test_an_input_that_is_state_too_stays_an_input():
    x = torch.ones(2)
    graph = capture(lambda x: (2 * x,), [x], [x])
    assert graph.state == ()
    assert torch.equal(graph(torch.full((2,), 3.0))[0], torch.full((2,), 6.0))


def test_python_numbers_are_frozen():
    """What the module says it does, and what comparisons are for."""
    factor = [2.0]
    graph = capture(lambda x: (factor[0] * x,), [torch.ones(1)])
    factor[0] = 5.0
    assert graph(torch.ones(1))[0].item() == 2.0


def decides(x):
    return (x if x.sum() > 0 else -x,)


def converts(x):
    return (x * float(x[0]),)


def counts(x):
    return (torch.ones(int(x[0])),)


def fails(x):
    raise KeyError("first line\nsecond line")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (decides, "a tensor's value decides what is computed"),
        (converts, "a tensor's value decides what is computed"),
        (counts, "a tensor's value decides what is computed"),
        (fails, "KeyError: 'first line"),
        (lambda x: (x @ torch.ones(7),), "RuntimeError: "),
    ],
)
def test_what_cannot_be_recorded_is_refused_in_one_line(function, reason):
    with pytest.raises(CaptureError) as caught:
        capture(function, [torch.ones(3)])
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x.tolist()[0] * x,),
        lambda x: (float(x.numpy()[0]) * x,),
        lambda x: (torch.tensor([x[0].item()]) * x,),
    ],
    ids=["tolist", "numpy", "tensor of items"],
)
def test_values_that_leave_torch_are_refused(function):
    """Or else they would stay those of the first batch."""
    with pytest.raises(CaptureError):
        capture(function, [torch.ones(3)])


def test_a_number_read_but_not_decided_by_stays_a_tensor():
    scale = torch.tensor(2.0)
    graph = capture(lambda x: (x * scale.item() + x.sum().item(),), [torch.ones(2)], [scale])
    scale.fill_(3.0)
    assert torch.equal(graph(torch.full((2,), 2.0))[0], torch.full((2,), 10.0))


@pytest.mark.parametrize("form", ["position", "name", "without"])
def test_one_hot(form):
    calls = {
        "position": lambda x: (functional.one_hot(x, 4) * 2,),
        "name": lambda x: (functional.one_hot(x, num_classes=4) * 2,),
        "without": lambda x: (functional.one_hot(x),),
    }
    if form == "without":  # as many classes as the data have
        with pytest.raises(CaptureError, match="a tensor's value decides"):
            capture(calls[form], [torch.tensor([0, 2])])
        return
    graph = capture(calls[form], [torch.tensor([[0, 2]])])
    for x in (torch.tensor([[3, 1]]), torch.tensor([[2, 2]])):
        assert torch.equal(graph(x)[0], calls[form](x)[0])
        assert graph(x)[0].dtype == torch.int64


# Compiling ------------------------------------------------------------------------------------------------------------


def draws_of_many_kinds(x):
    """Noise that depends on nothing, then draws that depend on tensors, and in-place draws into what others see."""
    noise = torch.randn(4, 3)
    y = x + noise
    coins = torch.bernoulli(y.sigmoid())
    gamma = torch._standard_gamma(y.abs() + 0.5)
    classes = torch.multinomial(y.softmax(-1), 2)
    dropped = functional.dropout(y, 0.5, training=True)
    late = torch.rand(3)
    held = y.clone()
    held[:, 0].normal_()
    held[:, 1].bernoulli_(0.5)
    counts = torch.poisson(y.abs() * 3)
    whole = torch.randint(0, 9, (3,))
    simplex = torch._sample_dirichlet(y.abs() + 0.1)
    normal = torch.normal(x, 1.0)
    return coins * gamma, classes + 0, dropped + late, held * 2, counts + whole, simplex + normal


@pytest.mark.slow
def test_compiled_draws_are_those_of_the_seed():
    assert_same_function(draws_of_many_kinds, [torch.randn(4, 3)])


@pytest.mark.slow
def test_compiled_writes_and_references():
    weight, mean, drawn = torch.randn(3), torch.zeros(3), torch.zeros(3)

    def function(x):
        mean.mul_(0.9).add_(x.mean(0))
        drawn.normal_()
        return (x * weight + mean).sum(0), drawn * 2, x.exp()

    inputs, state = [torch.randn(5, 3)], [mean, drawn]
    assert_same_function(function, inputs, state)
    with torch.random.fork_rng(), unchanged(state):
        graph = capture(function, inputs, state).compiled(inputs)  # weight is found, and must not be taken for granted
    for value in (2.0, -3.0):
        weight.fill_(value)
        assert_equal(results(graph, inputs, state), results(function, inputs, state), 1e-12)


@pytest.mark.slow
def test_draws_into_a_part_of_a_tensor_that_is_read_as_a_whole():
    def function(x):
        noise = torch.zeros(4, 3)
        noise[:, 0].normal_()
        return (x + noise,)

    assert_same_function(function, [torch.randn(4, 3)])


@pytest.mark.slow
def test_draws_that_nobody_reads_are_drawn():
    def function(x):
        y = x + torch.randn(3)
        torch.bernoulli(y.sigmoid())
        return (y * 2,)

    assert_same_function(function, [torch.randn(3)])


@pytest.mark.slow
def test_late_uniform_draws_in_place():
    def function(x):
        y = torch.bernoulli(x.sigmoid())
        return (y + torch.empty_like(x).uniform_(-1.0, 1.0),)

    assert_same_function(function, [torch.randn(3)])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["layer", "factors", "matrix"])
def test_large_layers_in_single_precision(form):
    """Whatever library takes the product: the same numbers but for rounding, and every factor of an addmm."""
    torch.set_default_dtype(torch.float32)
    layer = nn.Linear(350, 320)

    def function(x):
        if form == "layer":
            return (layer(x).detach(),)
        if form == "factors":
            return (torch.addmm(layer.bias, x, layer.weight.T, beta=0.5, alpha=2.0).detach(),)
        return (torch.addmm(x[:, :320], x, layer.weight.T).detach(),)

    assert_same_function(function, [torch.randn(6, 350)], list(layer.parameters()), tolerance=1e-5)


def test_compiling_runs_nothing_and_draws_nothing(monkeypatch):
    total = torch.zeros(2)
    graph = recorded(lambda x: (total.add_(x) + torch.randn(2),), [torch.ones(2)], [total])
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    calls = []
    monkeypatch.setattr(torch._inductor, "compile", lambda module, inputs: calls.append(len(inputs)) or module)
    graph.compiled([torch.ones(2)])
    assert len(calls) == 1
    assert torch.equal(total, torch.zeros(2))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002


def test_what_is_split_for_the_compiler_is_still_the_function(monkeypatch):
    """The order of draws and writes, without a compiler around it."""
    monkeypatch.setattr(torch._inductor, "compile", lambda module, inputs: module)
    x, state = torch.randn(4, 3), torch.zeros(3)

    def function(x):
        y = draws_of_many_kinds(x)
        state.bernoulli_(0.5)
        torch.rand(2)
        return *y, state + 1, torch.randn(3)

    assert_same_function(function, [x], [state])


def test_compilers_failures_are_refused_in_one_line(monkeypatch):
    def compile(*_):
        raise NotImplementedError("no such\nthing")

    graph = capture(lambda x: (x + 1,), [torch.ones(2)])
    monkeypatch.setattr(torch._inductor, "compile", compile)
    with pytest.raises(CaptureError, match=r"^NotImplementedError: no such$"):
        graph.compiled([torch.ones(2)])
    monkeypatch.setattr(pyro_vae.compile, "_LARGEST", 1)
    with pytest.raises(CaptureError, match=r"operations would take minutes to compile \(limit 1\)"):
        graph.compiled([torch.ones(2)])


# The small ones -------------------------------------------------------------------------------------------------------


def test_unchanged_puts_back_also_after_an_error():
    kept, other = torch.ones(2, requires_grad=True), torch.tensor([1, 2])

    def spoil():
        with unchanged([kept, other]), torch.no_grad():
            kept.add_(1)
            other.zero_()
            raise KeyError

    with pytest.raises(KeyError):
        spoil()
    assert torch.equal(kept, torch.ones(2))
    assert torch.equal(other, torch.tensor([1, 2]))


def test_difference():
    one, two = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert difference([one], [one]) == 0.0
    assert difference([two], [one]) == pytest.approx(0.1)
    assert difference([two, one], [one, one]) == pytest.approx(0.5 / 50**0.5)
    assert difference([two], [one], floor=50.0) == pytest.approx(0.01)
    assert difference([one * 0], [one * 0]) == 0.0
    assert difference([one], [one * 0]) == torch.inf
    assert difference([None, one], [None, one]) == 0.0
    assert difference([None], [one]) == difference([one], [None]) == torch.inf
    assert difference([torch.tensor([1, 2])], [torch.tensor([1, 2])]) == 0.0
    assert not difference([one * torch.nan], [one]) <= 1.0  # not a number is no agreement
    assert not difference([one], [one * torch.nan]) <= 1.0


def test_the_examples_run():
    found = doctest.DocTestFinder().find(pyro_vae.compile)
    assert {test.name.rpartition(".")[2] for test in found if test.examples} >= {"capture", "difference"}


def test_nothing_is_said(recwarn):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graph = capture(lambda x: (x + torch.randn(2),), [torch.ones(2)])
    assert isinstance(graph, Graph)
    assert not recwarn
