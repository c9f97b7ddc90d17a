"""A recurrence as one operation against the loop that it is: values, gradients, and what it must not remember."""

import contextlib
import copy
import gc
import itertools
import logging
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.func import functional_call

from pyro_vae import recurrence
from pyro_vae.compile import capture
from pyro_vae.networks import CELLS
from pyro_vae.recurrence import scan
from pyro_vae.training.precision import products_in


@pytest.fixture(scope="module", autouse=True)
def _few_messages():
    """Inductor's debug records are many, and pytest keeps them all."""
    logging.getLogger("torch.__trace").setLevel(logging.WARNING)


def close(left, right, atol=1e-12):
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


class Cell(nn.Module):
    """A function of itself, a state and inputs; with the modules and tensors that it is given."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, h, *u):
        return self.function(self, h, *u)


def loop(cell, state, inputs):
    """The definition."""
    states = []
    for t in range(len(inputs[0])):
        state = cell(state, *(u[t] for u in inputs))
        states.append(state)
    return torch.stack(states)


def outcome(run, cell, state, inputs, wanted=None):
    """States, and the slopes of a function of them in all that has a gradient: state, inputs, parameters."""
    leaves = [state, *inputs, *cell.parameters()]
    wanted = [True] * len(leaves) if wanted is None else wanted
    fresh = [t.detach().clone(memory_format=torch.preserve_format) for t in (state, *inputs)]
    for tensor, want in zip(fresh, wanted, strict=False):
        tensor.requires_grad_(want and tensor.is_floating_point())
    for parameter, want in zip(cell.parameters(), wanted[len(fresh) :], strict=True):
        parameter.requires_grad_(want)
    states = run(cell, fresh[0], fresh[1:])
    asked = [t for t in (*fresh, *cell.parameters()) if t.requires_grad]
    weights = torch.linspace(0.5, 1.5, states.numel()).reshape(states.shape)
    if not (asked and states.requires_grad):
        return states.detach(), [torch.zeros_like(t) for t in asked]
    slopes = torch.autograd.grad((weights * states.sin()).sum(), asked, allow_unused=True)
    return states.detach(), [torch.zeros_like(t) if g is None else g for t, g in zip(asked, slopes, strict=True)]


def assert_same(cell, state, inputs, wanted=None, atol=1e-12):
    ours, slopes = outcome(scan, cell, state, inputs, wanted)
    theirs, expected = outcome(loop, cell, state, inputs, wanted)
    close(ours, theirs, atol)
    assert len(slopes) == len(expected)
    for a, b in zip(slopes, expected, strict=True):
        close(a, b, atol)
    return expected


def is_recorded(cell):
    """Whether a cell's last call ran as one operation."""
    return list(recurrence._by_cell[cell].values())[-1] is not None


def gated(kind="gru", hidden=3):
    """A cell and the width of its inputs."""
    cell, gates = CELLS[kind](hidden)
    return cell, hidden * gates, hidden * (2 if kind == "lstm" else 1)


def data(kind="gru", steps=4, batch=(5,), hidden=3):
    cell, width, state = gated(kind, hidden)
    return cell, torch.randn(*batch, state), [torch.randn(steps, *batch, width)]


def product(**parts):
    """A cell with a weight and an input that multiplies: no derivative is a constant."""
    return Cell(lambda s, h, u: torch.tanh(s.linear(h) * u) + 0.1 * h, linear=nn.Linear(2, 2), **parts)


# Values and gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize(("steps", "batch"), [(1, (5,)), (2, ()), (7, (4, 5))], ids=str)
def test_it_is_the_loop(kind, steps, batch):
    cell, state, inputs = data(kind, steps, batch)
    expected = assert_same(cell, state, inputs)
    assert is_recorded(cell)
    assert all(slope.abs().max() > 1e-3 for slope in expected[1:])


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3)), ids=str)
def test_gradients_are_of_what_asks_for_them(wanted):
    cell, state, inputs = data()
    count = len(list(cell.parameters()))
    assert_same(cell, state, inputs, [*wanted[:2], *[wanted[2]] * count])
    assert is_recorded(cell)


def test_of_two_parameters_one_may_be_fixed():
    cell, state, inputs = data("gru")
    assert_same(cell, state, inputs, [False, False, True, False])
    assert_same(cell, state, inputs, [False, True, False, True])


def test_gradients_by_finite_differences():
    cell, state, inputs = data("lstm", 3, (2,), 2)
    tensors = [t.requires_grad_() for t in (state, *inputs)]
    assert torch.autograd.gradcheck(lambda h, u: scan(cell, h, [u]), tensors)
    weight = cell.hidden.weight

    def of_weight(w):
        return functional_call(Scanning(cell), {"cell.hidden.weight": w}, (state.detach(), inputs[0].detach()))

    assert torch.autograd.gradcheck(of_weight, [weight])


class Scanning(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, h, u):
        return scan(self.cell, h, [u])


def test_a_state_of_particles_and_inputs_without():
    cell, state, _ = data(batch=(4, 5))
    assert_same(cell, state, [torch.randn(6, 5, 9)])
    assert_same(cell, state, [torch.randn(6, 1, 9)])
    assert_same(cell, state, [torch.randn(6, 9)])
    assert is_recorded(cell)


@pytest.mark.parametrize("steps", [1, 5])
def test_numbers_truths_and_several_inputs(steps):
    def step(self, h, scale, kept, u):
        return torch.where(kept, torch.tanh(self.linear(h) * u * scale), h)

    cell = Cell(step, linear=nn.Linear(2, 2))
    inputs = [torch.arange(1, steps + 1), torch.rand(steps, 3, 1) > 0.4, torch.randn(steps, 4, 3, 2)]
    assert_same(cell, torch.randn(4, 3, 2), inputs)
    assert is_recorded(cell)


def test_a_state_that_is_a_number():
    assert_same(Cell(lambda s, h, u: h * u), torch.randn(()), [torch.randn(4)])


@pytest.mark.parametrize(
    "function",
    [
        lambda s, h, u, v: h + u + v,
        lambda s, h, u, v: torch.cat([u[..., :1], v[..., 1:]], -1) + 0.5 * h,
        lambda s, h, u, v: u + v,
        lambda s, h, u, v: u,
        lambda s, h, u, v: h,
        lambda s, h, u, v: h * u[..., [1, 0]] + v.detach(),
        lambda s, h, u, v: (h.transpose(-1, -2) * u.transpose(-1, -2).exp()).transpose(-1, -2).sin() + v,
        lambda s, h, u, v: torch.ones_like(h),
    ],
)
def test_gradients_that_share_memory_or_are_none(function):
    """What an operation gives back must not be one tensor twice."""
    cell = Cell(function)
    assert_same(cell, torch.randn(3, 2), [torch.randn(4, 3, 2), torch.randn(4, 3, 2)])
    assert is_recorded(cell)


def test_gradients_add_up_over_two_backward_passes():
    cell, (u, v) = Cell(lambda s, h, u, v: h + u + v), (torch.zeros(3, 2, requires_grad=True) for _ in range(2))
    for _ in range(2):
        scan(cell, torch.zeros(2), [u, v]).sum().backward()
    assert u.grad.tolist() == v.grad.tolist() == [[6.0, 6.0], [4.0, 4.0], [2.0, 2.0]]


@pytest.mark.parametrize("order", [["plain", "expanded", "moved"], ["moved", "plain"], ["expanded", "plain"]], ids=str)
def test_layouts_of_memory_do_not_matter_whichever_came_first(order):
    """A recording made in one layout must not be run in another."""
    cell = product()
    state, inputs = torch.randn(4, 3, 2), torch.randn(5, 4, 3, 2)
    layouts = {
        "plain": (state, inputs),
        "expanded": (torch.randn(2).expand(4, 3, 2), torch.randn(5, 1, 3, 2).expand(5, 4, 3, 2)),
        "moved": (torch.randn(3, 4, 2).transpose(0, 1), torch.randn(2, 3, 4, 5).permute(3, 2, 1, 0)),
    }
    for name in order:
        assert_same(cell, layouts[name][0], [layouts[name][1]])
        assert is_recorded(cell)


@pytest.mark.parametrize("moved", [True, False])
def test_a_weight_in_another_layout(moved):
    cell = product()
    with torch.no_grad():
        cell.linear.weight = nn.Parameter(torch.randn(2, 2).T if moved else torch.randn(2, 2))
    assert_same(cell, torch.randn(4, 3, 2), [torch.randn(5, 4, 3, 2)])


def test_two_shapes_of_one_cell():
    cell = product()
    for batch, steps in [((3,), 4), ((5,), 4), ((3,), 2), ((2, 3), 4), ((3,), 4)]:
        assert_same(cell, torch.randn(*batch, 2), [torch.randn(steps, *batch, 2)])


def test_parameters_that_a_cell_does_not_use():
    cell = product(other=nn.Linear(3, 3))
    slopes = assert_same(cell, torch.randn(3, 2), [torch.randn(4, 3, 2)])
    assert slopes[-1].abs().max() == slopes[-2].abs().max() == 0


@pytest.mark.parametrize("whole", [True, False])
def test_tied_parameters_have_one_gradient(whole):
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    if whole:
        two = one
    else:
        two.weight = one.weight
    cell = Cell(lambda s, h, u: torch.tanh(s.one(h) + s.two(h.sin())) + u, one=one, two=two)
    before = [id(parameter) for parameter in cell.parameters()]
    assert len(assert_same(cell, torch.randn(3, 2), [torch.randn(4, 3, 2)])) == (4 if whole else 5)
    assert is_recorded(cell)
    assert [id(parameter) for parameter in cell.parameters()] == before


def test_it_has_no_second_derivatives_and_says_so():
    cell, state, inputs = data()
    inputs[0].requires_grad_()
    (slope,) = torch.autograd.grad(scan(cell, state, inputs).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(slope.sum(), inputs)


# Cells that write, and numbers in them --------------------------------------------------------------------------------


def doubled(self, h, u):
    x = self.linear(h)
    x[..., :1].mul_(2.0)
    return (x * h).sin() + u


def filled(self, h, u):
    x = torch.zeros(u.shape)
    x[..., 0], x[..., 1] = h[..., 1] * u[..., 0], self.linear(h)[..., 0].exp()
    return x.tanh()


@pytest.mark.parametrize(
    "function", [doubled, filled, lambda s, h, u: torch.relu_(s.linear(h) + u), lambda s, h, u: s.linear(h).mul_(u)]
)
def test_what_a_cell_writes_in_place_it_writes_once(function):
    assert_same(Cell(function, linear=nn.Linear(2, 2)), torch.randn(3, 2), [torch.randn(4, 3, 2)])


def test_a_cell_that_keeps_a_count_runs_as_it_is():
    def counting(self, h, u):
        self.calls.add_(1)
        return self.linear(h) * u

    cell = Cell(counting, linear=nn.Linear(2, 2))
    cell.register_buffer("calls", torch.zeros(()))
    state, inputs = torch.randn(3, 2), [torch.randn(4, 3, 2).requires_grad_()]
    scan(cell, state, inputs).sum().backward()
    assert not is_recorded(cell)
    assert cell.calls == 4


def test_batch_norm_keeps_its_statistics():
    """Which it writes without saying so."""
    cells = [Cell(lambda s, h, u: s.norm(h) * u, norm=nn.BatchNorm1d(2)) for _ in range(2)]
    state, inputs = torch.randn(5, 2), [torch.randn(4, 5, 2)]
    for run, cell in zip((scan, loop), cells, strict=True):
        run(cell, state, inputs).sum().backward()
    for a, b in zip(cells[0].buffers(), cells[1].buffers(), strict=True):
        close(a, b)


def test_numbers_in_a_cell_do_not_stand_in_the_way():
    def step(self, h, u):
        law = dist.Normal(torch.tanh(self.linear(h)), 0.5)
        return law.loc + law.scale * torch.tensor([1.0, 2.0]) * u

    cell = Cell(step, linear=nn.Linear(2, 2))
    with pyro.validation_enabled(False):
        assert_same(cell, torch.randn(3, 2), [torch.randn(4, 3, 2)])
    assert is_recorded(cell)


# What cannot be recorded ----------------------------------------------------------------------------------------------


def branching(self, h, u):
    return self.linear(h) + u if h.sum() > 0 else self.linear(h) * u


def by_item(self, h, u):
    return self.linear(h) + u if h.sum().item() > 0 else self.linear(h) * u


OUTSIDE = torch.tensor([0.5, 2.0])


@pytest.mark.parametrize("function", [branching, by_item, lambda s, h, u: s.linear(h) * u + OUTSIDE])
def test_what_cannot_be_recorded_is_run_as_it_is(function):
    cell = Cell(function, linear=nn.Linear(2, 2))
    assert_same(cell, torch.randn(3, 2), [torch.randn(6, 3, 2)])
    assert not is_recorded(cell)


def test_a_cell_that_draws_draws_at_each_step():
    cell = Cell(lambda s, h, u: s.dropout(torch.ones_like(h)) + u, dropout=nn.Dropout(0.5))
    state, inputs = torch.zeros(40), [torch.zeros(3, 40)]
    torch.manual_seed(1)
    ours = scan(cell, state, inputs)
    torch.manual_seed(1)
    close(ours, loop(cell, state, inputs))
    assert len(ours.unique(dim=0)) == 3


def test_a_draw_of_another_call_is_left_alone():
    """Recording must not move the generators."""
    torch.manual_seed(1)
    scan(Cell(lambda s, h, u: h + torch.randn_like(h) * 0 + u), torch.zeros(2), [torch.zeros(1, 2)])
    after = torch.randn(1)
    torch.manual_seed(1)
    torch.randn(2)
    close(after, torch.randn(1))


@pytest.mark.parametrize("draws", [True, False])
@pytest.mark.parametrize(
    "function", [lambda h, u: torch.cat([h, u], -1), lambda h, u: h[..., :1], lambda h, u: u.sum(-1), lambda h, u: h[0]]
)
def test_a_cell_that_changes_the_shape_is_refused(function, draws):
    cell = Cell(lambda s, h, u: s.dropout(function(h, u)), dropout=nn.Dropout(0.5).train(draws))
    with pytest.raises(ValueError, match=r"keeps the shape of its state, \(3, 2\); got"):
        scan(cell, torch.randn(3, 2), [torch.randn(4, 3, 2)])


def test_inputs_with_more_dimensions_than_the_state_are_refused():
    with pytest.raises(ValueError, match=r"keeps the shape of its state, \(3, 2\); got \(5, 3, 2\)"):
        scan(Cell(lambda s, h, u: h + u), torch.randn(3, 2), [torch.randn(4, 5, 3, 2)])


@pytest.mark.parametrize("lengths", [(), (0,), (3, 4), (0, 0)])
def test_inputs_that_are_not_of_one_length_are_refused(lengths):
    with pytest.raises(ValueError, match=r"T > 0 steps each, got \["):
        scan(Cell(lambda s, h, *u: h), torch.zeros(2), [torch.zeros(n, 2) for n in lengths])


def test_a_cell_of_another_type_is_the_loop():
    cell = Cell(lambda s, h, u: (h * u).double())
    state, inputs = torch.randn(2, dtype=torch.float32), [torch.randn(3, 2, dtype=torch.float32)]
    assert scan(cell, state, inputs).dtype == torch.float64
    close(scan(cell, state, inputs), loop(cell, state, inputs))


# What it must not remember --------------------------------------------------------------------------------------------


def changed(change):
    """A cell that was used, then changed."""
    cell = product()
    given = torch.randn(3, 2), [torch.randn(4, 3, 2)]
    before = outcome(scan, cell, *given)[0]
    found = change(cell)
    return cell if found is None else found, given, before


def in_place(cell):
    with torch.no_grad():
        cell.linear.weight.mul_(-2)


def replaced(cell):
    cell.linear.weight = nn.Parameter(torch.randn(2, 2))


def another_module(cell):
    cell.linear = nn.Linear(2, 2)


def without_bias(cell):
    cell.linear = nn.Linear(2, 2, bias=False)


def loaded(cell):
    cell.load_state_dict({name: torch.randn_like(t) for name, t in cell.state_dict().items()}, assign=True)


def copied(cell):
    other = copy.deepcopy(cell)
    in_place(cell)
    in_place(other)
    in_place(other)
    return other


def normed(cell):
    nn.utils.parametrizations.weight_norm(cell.linear)
    with torch.no_grad():
        cell.linear.parametrizations.weight.original0.mul_(3)


@pytest.mark.parametrize("change", [in_place, replaced, another_module, without_bias, loaded, copied, normed])
def test_parameters_are_those_of_the_call(change):
    cell, given, before = changed(change)
    assert_same(cell, *given)
    assert (scan(cell, *given) - before).abs().max() > 1e-3
    assert is_recorded(cell)


@pytest.mark.parametrize("first", [torch.float32, torch.float64])
def test_types_are_those_of_the_call(first):
    cell, state, inputs = data()
    for dtype in (first, torch.float32, torch.float64):
        cell.to(dtype)
        ours = outcome(scan, cell, state.to(dtype), [u.to(dtype) for u in inputs])
        assert ours[0].dtype == dtype
        assert all(slope.dtype == dtype for slope in ours[1])
    assert_same(cell, state, inputs)


@pytest.mark.parametrize("part", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_training_and_evaluation_of_any_part(first, part):
    """Dropout inside of a cell, switched by the cell or by itself."""
    cell = Cell(lambda s, h, u: s.dropout(torch.ones_like(h)) + u, dropout=nn.Dropout(0.5))
    state, inputs = torch.zeros(50), [torch.zeros(2, 50)]
    for mode in (first, not first, first):
        (cell.dropout if part else cell).train(mode)
        assert set(scan(cell, state, inputs).unique().tolist()) == ({0.0, 2.0} if mode else {1.0})


@pytest.mark.parametrize("first", ["bf16", "full"])
def test_precision_is_that_of_the_call(first):
    cell, state, inputs = data(batch=(5,))
    exact = loop(cell, state, inputs)
    for precision in (first, "bf16", "full", "bf16"):
        with products_in(precision):
            found, expected = scan(cell, state, inputs), loop(cell, state, inputs)
        close(found, expected)
        assert bool((found - exact).abs().max() > 1e-5) == (precision == "bf16")


def test_autocast_is_that_of_the_call():
    cell, state, inputs = data(batch=(5,))
    exact = scan(cell, state, inputs)
    cell.float()
    single = state.float(), [u.float() for u in inputs]
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = scan(cell, *single)
            close(low, loop(cell, *single), 0)
        assert 1e-4 < (low - exact).abs().max() < 0.1
        close(scan(cell, *single).double(), exact, 1e-5)


def test_without_gradients_and_then_with_them():
    cell, state, inputs = data()
    for enabled in (False, True, False, True):
        with contextlib.nullcontext() if enabled else torch.no_grad():
            states = scan(cell, state, inputs)
        assert states.requires_grad == enabled
        close(states.detach(), loop(cell, state, inputs).detach())
        if enabled:
            assert_same(cell, state, inputs)


def test_in_inference_mode():
    cell, state, inputs = data()
    with torch.inference_mode():
        close(scan(cell, state, inputs), loop(cell, state, inputs))
    assert_same(cell, state, inputs)


def test_weights_that_a_function_is_called_with():
    """By ``torch.func.functional_call``, as a network whose weights are latent calls its parts."""
    cell, state, inputs = data()
    weight = torch.randn(9, 3, requires_grad=True)
    assert_same(cell, state, inputs)

    def slopes(run):
        made = {"cell.hidden.weight": 2 * weight}
        module = Scanning(cell)
        module.forward = lambda h, u: run(cell, h, [u])
        states = functional_call(module, made, (state, inputs[0]))
        return states, *torch.autograd.grad(states.sin().sum(), [weight, cell.hidden.bias])

    for a, b in zip(slopes(scan), slopes(loop), strict=True):
        close(a, b)
    assert_same(cell, state, inputs)


def test_recordings_go_with_their_cell():
    cell, state, inputs = data()
    scan(cell, state, inputs).sum().backward()
    kept = list(recurrence._by_number.valuerefs())
    gone = [weakref.ref(cell), *(weakref.ref(found) for found in recurrence._by_cell[cell].values())]
    assert len(gone) > 1
    assert len(kept) >= len(gone) - 1
    del cell
    gc.collect()
    assert [one() for one in gone] == [None] * len(gone)


def test_a_transition_and_its_step_are_collected():
    from pyro_vae.distributions import MarkovSequence

    transition = Moving()
    walk = MarkovSequence(dist.Normal(torch.zeros(2), 1.0).to_event(1), transition, 5)
    walk.rsample((3,)).sum().backward()
    (step,) = transition._pyro_vae_steps.values()
    gone = [weakref.ref(transition), weakref.ref(step)]
    del transition, walk, step
    gc.collect()
    assert [one() for one in gone] == [None, None]


class Moving(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, z):
        return dist.Normal(self.linear(z).tanh(), 0.5).to_event(1)


# Recorded and compiled with what is around it -------------------------------------------------------------------------


def loss_and_slopes(cell, state, inputs):
    with torch.enable_grad():
        h, u = state.detach().requires_grad_(), inputs.detach().requires_grad_()
        moved = u.movedim(0, -2).sin().movedim(-2, 0)  # in another layout
        states = scan(cell, 2 * h, [moved])
        loss = (states * torch.linspace(0, 1, states.numel()).reshape(states.shape)).sum()
        return [loss.detach(), *torch.autograd.grad(loss, [h, u, *cell.parameters()])]


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("batch", [(5,), (4, 5)], ids=str)
def test_a_recorded_function_has_it_as_one_operation(kind, batch):
    cell, state, (inputs,) = data(kind, 6, batch)
    graph = capture(lambda h, u: loss_and_slopes(cell, h, u), [state, inputs])
    names = [node.name for node in graph.module.graph.nodes]
    assert sum(name.startswith("scan_backward") for name in names) == 1
    assert len(names) < 60
    with torch.no_grad():
        next(cell.parameters()).mul_(0.5)
    other = torch.randn_like(state), torch.randn_like(inputs)
    for a, b in zip(graph(*other), loss_and_slopes(cell, *other), strict=True):
        assert torch.equal(a, b)


def test_a_recorded_function_runs_whatever_the_mode():
    """Of the recording, not of the moment: a graph is of the mode that it was recorded in."""
    cell, state, (inputs,) = data()
    graph = capture(lambda h, u: loss_and_slopes(cell, h, u), [state, inputs])
    expected = loss_and_slopes(cell, state, inputs)
    cell.eval()
    for a, b in zip(graph(state, inputs), expected, strict=True):
        close(a, b)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_compiled_function_gives_the_same(kind):
    cell, state, (inputs,) = data(kind, 5, (4, 3))
    graph = capture(lambda h, u: loss_and_slopes(cell, h, u), [state, inputs])
    compiled = graph.compiled([state, inputs])
    for _ in range(2):
        given = torch.randn_like(state), torch.randn_like(inputs)
        for a, b in zip(compiled(*given), loss_and_slopes(cell, *given), strict=True):
            close(a, b, 1e-10)


# Planted bugs ---------------------------------------------------------------------------------------------------------


def a_step_late(recorded):
    def slopes(adjoints, before, *rest):
        return recorded.slopes(adjoints, before.roll(1, 0), *rest)

    return slopes


def without_the_adjoint(recorded):
    def adjoint(slope, *rest):
        return (torch.zeros_like(slope),)

    return adjoint


@pytest.mark.parametrize(("part", "planted"), [("slopes", a_step_late), ("adjoint", without_the_adjoint)])
def test_wrong_gradients_are_noticed(part, planted):
    cell, state, inputs = data()
    assert_same(cell, state, inputs)
    for recorded in recurrence._by_cell[cell].values():
        object.__setattr__(recorded, part, planted(copy.copy(recorded)))
    with pytest.raises(AssertionError):
        assert_same(cell, state, inputs)
