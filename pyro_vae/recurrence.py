"""A recurrence as one differentiable operation, whose cell alone is recorded, whatever the number of steps.

    h_t = f(h_{t-1}, u_t),        t = 1, ..., T

A loop in Python leaves T copies of the cell's operations behind, in the graph of autograd and in a recorded step: what
takes minutes to compile for some hundreds of steps, and runs at the speed of Python. Here the loop is inside of an
operation. Its gradient comes in two parts (Werbos 1990; "back-propagation through time"): the adjoints, with the slopes
g_t of what is to be differentiated in h_t itself,

    a_t = g_t + (df(h_t, u_{t+1}) / dh_t)^T a_{t+1},        t = T, ..., 1,

are a loop too, and need of the cell the derivative in h alone. The gradients of parameters and inputs are those of one
call of the cell for all steps at once, with a_t in the place of its results' slopes: a few large matrix products in the
place of T small ones.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, library, nn
from torch.func import functional_call, functionalize
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from pyro_vae.compile import CaptureError, capture, difference
from pyro_vae.numerics import forked_rng

__all__ = ["scan"]

Step = Callable[..., Sequence[Tensor]]

_ROUNDING = 1e-3  # relative difference that it may explain, of sums over all steps


def scan(cell: nn.Module, state: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """The states that a cell goes through, h_t = cell(h_{t-1}, *inputs_t), t = 1, ..., T.

    The cell is a function of its arguments, parameters and buffers. It must broadcast over leading dimensions, for its
    gradient is taken at all steps at once, and keep the shape of the state. A cell that cannot be recorded, for it
    draws, or decides by a tensor's value, is run in a loop of Python.

    Args:
        cell: maps a state (..., H) and the inputs of a step to the next state.
        state: h_0, (..., H).
        inputs: tensors (T, ...), T at least 1; where they have fewer dimensions than (T, ..., H), they get dimensions
            of size 1 after the first.

    Returns:
        h_1, ..., h_T, (T, ..., H). Gradients reach ``state``, the inputs and the cell's parameters, and have no
        derivatives of their own.

    Raises:
        ValueError: there are no inputs, of unequal length or without a step; or the state's shape changes.

    Example:
        >>> class Decay(nn.Module):
        ...     def forward(self, h, u):
        ...         return 0.5 * h + u
        >>> scan(Decay(), torch.tensor([8.0]), [torch.tensor([[0.0], [1.0], [0.0]])]).squeeze(-1)
        tensor([4.0000, 3.0000, 1.5000])
    """
    if len({len(tensor) for tensor in inputs}) != 1 or len(inputs[0]) == 0:
        raise ValueError(f"expected inputs of T > 0 steps each, got {[len(tensor) for tensor in inputs]} steps")
    inputs = [_aligned(tensor, state.ndim + 1).contiguous() for tensor in inputs]  # a recording is of one layout
    state, named = state.contiguous(), {name: tensor.contiguous() for name, tensor in _named_tensors(cell)}
    shared = list(named.values())
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (state, *inputs, *shared)]
    recorded = _recorded_forms(cell, wanted, state, inputs, named)
    if recorded is None:
        return _loop(cell, state, inputs)
    states: Tensor = torch.ops.pyro_vae.scan(recorded.number, wanted, state, inputs, shared)[0]
    return states


def _aligned(tensor: Tensor, ndim: int) -> Tensor:
    return tensor[(slice(None), *(None,) * (ndim - tensor.ndim))]


def _named_tensors(cell: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, of each module once: put in their places by two names, torch would leave others there."""
    for prefix, module in cell.named_modules():
        own = *module.named_parameters(recurse=False), *module.named_buffers(recurse=False)
        yield from ((f"{prefix}.{name}".lstrip("."), tensor) for name, tensor in own)


def _loop(cell: nn.Module, state: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    states = []
    for step in zip(*inputs, strict=True):
        state = _of_shape(state, cell(state, *step))
        states.append(state)
    return torch.stack(states)


def _of_shape(state: Tensor, found: Tensor) -> Tensor:
    if found.shape != state.shape:
        shapes = tuple(state.shape), tuple(found.shape)
        raise ValueError(f"expected a cell that keeps the shape of its state, {shapes[0]}; got {shapes[1]}")
    return found


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A cell's recorded forms for tensors of certain shapes.

    Attributes:
        step: (h, *u, *shared) to the next h, and to what slopes are computed from, the residuals r.
        adjoint: (a, h, *u, *shared, *r) to the slope in h of a . cell(h, *u).
        slopes: (a, h, *u, *shared, *r), of all steps at once, to the slopes in those of (*u, *shared) that are wanted.
        shapes: of the residuals.
        number: by which the operations find it, as long as its cell lives.
    """

    step: Step
    adjoint: Step | None = None
    slopes: Step | None = None
    shapes: tuple[tuple[torch.Size, torch.dtype], ...] = ()
    number: int = field(default_factory=itertools.count().__next__)

    def __post_init__(self) -> None:
        _by_number[self.number] = self


def _recorded_forms(
    cell: nn.Module, wanted: Sequence[bool], state: Tensor, inputs: Sequence[Tensor], shared: Mapping[str, Tensor]
) -> _Recorded | None:
    """A cell's recorded forms for such tensors, made where there are none yet; None if it cannot be recorded."""
    if torch.is_autocast_enabled(state.device.type):
        return None
    known = _by_cell.setdefault(cell, {})
    modes = tuple(map(type, torch.overrides._get_current_function_mode_stack()))  # may change what torch computes
    training = tuple(module.training for module in cell.modules())
    kinds = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in (state, *inputs, *shared.values()))
    key = modes, training, tuple(shared), tuple(wanted), kinds
    if key not in known:
        with disable_proxy_modes_tracing(), forked_rng(), torch.no_grad():
            known[key] = _record(cell, wanted, state, inputs, shared)
    return known[key]


def _record(
    cell: nn.Module, wanted: Sequence[bool], state: Tensor, inputs: Sequence[Tensor], shared: Mapping[str, Tensor]
) -> _Recorded | None:
    count, names = len(inputs), list(shared)
    own = [tensor.detach().clone() for tensor in shared.values()]  # a cell may write into them, and some do not say so
    one = [state, *(tensor[0] for tensor in inputs), *own]
    whole = [state.expand(len(inputs[0]), *state.shape).contiguous(), *inputs, *own]

    @functionalize  # what a cell writes in place, it writes once, and not again where its gradient is taken
    def call(state: Tensor, *rest: Tensor) -> Tensor:
        tensors = dict(zip(names, rest[count:], strict=True))
        found: Tensor = functional_call(cell, tensors, (state, *rest[:count]), tie_weights=False)
        if found.dtype != state.dtype:
            raise CaptureError("the cell changes the type of its state")
        return _of_shape(state, found)

    def step(*tensors: Tensor) -> Sequence[Tensor]:
        return (call(*tensors),)

    def with_slopes(slope: Tensor, *tensors: Tensor) -> Sequence[Tensor]:
        return _with_slopes(call, slope, tensors, [True, *wanted[1:]])

    try:
        only_step = _recorded(step, one)
        if any(map(_writes, only_step.graph.nodes)) or not all(map(torch.equal, own, shared.values())):
            raise CaptureError("the cell writes into a tensor, such as a buffer")
        if not any(wanted):
            return _Recorded(only_step)
        of_one, of_all = _recorded(with_slopes, [state, *one]), _recorded(with_slopes, [whole[0], *whole])
        kept, kept_of_all = _residuals(of_one, count), _residuals(of_all, count)
        first, slopes = _before(of_one, kept), _after(of_all, slice(2, None), kept, [])
        if _alike(kept, kept_of_all, len(inputs[0])):
            by_residuals = _after(of_all, slice(2, None), kept, kept_of_all)
            if _agree(slopes, by_residuals, first, count, whole):
                slopes = by_residuals
        kinds = tuple((_value(node).shape, _value(node).dtype) for node in kept)
        return _Recorded(first, _after(of_one, slice(1, 2), kept, kept), slopes, kinds)
    except CaptureError:
        return None


def _with_slopes(
    call: Callable[..., Tensor], slope: Tensor, tensors: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    """cell(h, *u), and slopes of a . cell(h, *u) in those of (h, *u, *shared) that are wanted."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_(want) for tensor, want in zip(tensors, wanted, strict=True)]
        asked = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
        found = call(*leaves)
        if not (asked and found.requires_grad):
            return [found.detach(), *map(torch.zeros_like, asked)]
        own = torch.autograd.grad(found, asked, slope, allow_unused=True)
    return [found.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(asked, own, strict=True))]


def _recorded(function: Step, tensors: Sequence[Tensor]) -> GraphModule:
    graph = capture(function, [tensor.detach() for tensor in tensors])
    module, fresh = graph.module, torch.ops.aten.lift_fresh_copy.default
    given = list(module.graph.find_nodes(op="placeholder"))[len(tensors) :]
    if graph.draws or any(user.target is not fresh for node in given for user in node.users):
        raise CaptureError("the cell draws, or reaches tensors that are neither its parameters nor its buffers")
    for number, (node, value) in enumerate(zip(given, graph.state, strict=True)):  # made of numbers in the cell
        name = f"constant_{number}"
        module.register_buffer(name, value)
        for user in list(node.users):
            with module.graph.inserting_before(user):
                user.replace_all_uses_with(module.graph.get_attr(name))
            module.graph.erase_node(user)
        module.graph.erase_node(node)
    module.recompile()
    return module


def _writes(node: Node) -> bool:
    target: Any = node.target
    is_operation = isinstance(target, torch._ops.OpOverload)
    return is_operation and target._schema.is_mutable and torch.Tag.inplace_view not in target.tags


_aten = torch.ops.aten
_VIEWS = {
    operator.getitem,
    *(_aten.view.default, _aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.expand.default),
    *(_aten.unsqueeze.default, _aten.squeeze.dim, _aten.select.int, _aten.slice.Tensor, _aten.detach.default),
    *(_aten.split.Tensor, _aten.split_with_sizes.default, _aten.unbind.int, _aten.alias.default),
    *(_aten._unsafe_view.default, _aten.reshape.default),
}


def _residuals(joint: GraphModule, num_inputs: int) -> list[Node]:
    """Of (a, h, *u, *shared) to (next h, *slopes) what is computed of h and u alone, and read from a on."""
    given = joint.graph.find_nodes(op="placeholder")
    moving = _reached_from(given[1 : num_inputs + 2])  # what differs from step to step
    after = _reached_from(given[:1])
    asked = {*_results(joint)[1:]}.union(*(node.all_input_nodes for node in after if node.op != "output"))
    sources = {_source(node) for node in asked - after}
    return [node for node in joint.graph.nodes if node in sources and node in moving]


def _source(node: Node) -> Node:
    """The tensor that a node is a view of."""
    found = node
    while node.target in _VIEWS:
        node = node.all_input_nodes[0]
        if isinstance(node.meta["val"], Tensor):
            found = node
    return found


def _alike(kept: Sequence[Node], kept_of_all: Sequence[Node], num_steps: int) -> bool:
    """Whether what is kept of all steps may be what is kept of single ones, one after another, by its shapes."""
    if len(kept) != len(kept_of_all):
        return False
    pairs = zip(map(_value, kept), map(_value, kept_of_all), strict=True)
    return all(num_steps * a.numel() == b.numel() and a.shape[-1:] == b.shape[-1:] for a, b in pairs)


def _agree(slopes: Step, by_residuals: Step, step: Step, num_inputs: int, tensors: Sequence[Tensor]) -> bool:
    """Whether the slopes of all steps come out the same from the residuals of single ones, at these very states."""
    state, inputs, shared = tensors[0][0], tensors[1 : num_inputs + 1], tensors[num_inputs + 1 :]
    before, kept = [], []
    for given in zip(*inputs, strict=True):
        before.append(state)
        state, *residuals = step(state, *given, *shared)
        kept.append(residuals)
    states, residuals = torch.stack(before), [torch.stack(parts) for parts in zip(*kept, strict=True)]
    adjoint = torch.randn_like(states)
    ours, theirs = (f(adjoint, states, *inputs, *shared, *residuals) for f in (by_residuals, slopes))
    return difference(ours, theirs) < _ROUNDING


def _value(node: Node) -> Tensor:
    value: Tensor = node.meta["val"]
    return value


def _results(joint: GraphModule) -> Any:
    return joint.graph.output_node().args[0]


def _before(joint: GraphModule, kept: Sequence[Node]) -> GraphModule:
    """(h, *u, *shared) to (next h, *r)."""
    graph, copies = FxGraph(), {}
    for node in joint.graph.find_nodes(op="placeholder")[1:]:
        copies[node] = graph.placeholder(node.name)
    _copy(joint, graph, copies)
    graph.output((copies[_results(joint)[0]], *(copies[node] for node in kept)))
    return _module(joint, graph)


def _after(joint: GraphModule, wanted: slice, kept: Sequence[Node], used: Sequence[Node]) -> GraphModule:
    """(a, h, *u, *shared, *r) to slopes; what of r is not used is computed anew."""
    graph, given = FxGraph(), joint.graph.find_nodes(op="placeholder")
    copies = {node: graph.placeholder(node.name) for node in given}
    places = [graph.placeholder(f"kept_{number}") for number in range(len(kept))]
    for node, place in zip(used, places, strict=False):
        copies[node] = graph.call_function(_aten.view.default, (place, list(_value(node).shape)))
    _copy(joint, graph, copies)
    graph.output(tuple(copies[node] for node in _results(joint)[wanted]))
    return _module(joint, graph)


def _copy(joint: GraphModule, graph: FxGraph, copies: dict[Node, Node]) -> None:
    """Add what follows from the nodes that are there already."""
    for node in joint.graph.nodes:
        computed = node.op in ("call_function", "get_attr") and all(n in copies for n in node.all_input_nodes)
        if computed and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)


def _reached_from(nodes: Sequence[Node]) -> set[Node]:
    """The nodes whose value depends on some of these."""
    found = set(nodes)
    for node in nodes[0].graph.nodes:
        if found.intersection(node.all_input_nodes):
            found.add(node)
    return found - set(nodes)


def _module(joint: GraphModule, graph: FxGraph) -> GraphModule:
    graph.eliminate_dead_code()
    return GraphModule(joint, graph)


_by_cell: WeakKeyDictionary[nn.Module, dict[Any, _Recorded | None]] = WeakKeyDictionary()
_by_number: WeakValueDictionary[int, _Recorded] = WeakValueDictionary()


@library.custom_op("pyro_vae::scan", mutates_args=())
def _scan(
    number: int, wanted: Sequence[bool], state: Tensor, inputs: Sequence[Tensor], shared: Sequence[Tensor]
) -> list[Tensor]:
    recorded, kept = _by_number[number], []
    for given in _steps(inputs):
        kept.append(recorded.step(state, *given, *shared))
        state = kept[-1][0]
    return [torch.stack(values) for values in zip(*kept, strict=True)]


def _steps(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """What tensors (T, ...) hold at each step."""
    return zip(*(tensor.unbind() for tensor in tensors), strict=True)


def _places(recorded: _Recorded, state: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Room for the states and the residuals of all steps."""
    kinds = [(state.shape, state.dtype), *recorded.shapes]
    return [state.new_empty(len(inputs[0]), *shape, dtype=dtype) for shape, dtype in kinds]


@library.custom_op("pyro_vae::scan_backward", mutates_args=())
def _scan_backward(
    number: int,
    wanted: Sequence[bool],
    slope: Tensor,
    kept: Sequence[Tensor],
    state: Tensor,
    inputs: Sequence[Tensor],
    shared: Sequence[Tensor],
) -> list[Tensor]:
    recorded = _by_number[number]
    assert recorded.adjoint is not None
    assert recorded.slopes is not None
    states, *residuals = kept
    before = torch.cat([state[None], states[:-1]])
    given, own = list(_steps([before, *inputs])), torch.zeros_like(state)
    adjoints, rest = [*slope.unbind()], [*_steps(residuals)] if residuals else [()] * len(states)
    for t in range(len(states) - 1, -1, -1):
        adjoints[t] = adjoints[t] + own
        if t or wanted[0]:
            (own,) = recorded.adjoint(adjoints[t], *given[t], *shared, *rest[t])
    first = [own] if wanted[0] else []
    found = recorded.slopes(torch.stack(adjoints), before, *inputs, *shared, *residuals)
    return _apart([*first, *found], [*kept, *inputs, *shared])


def _apart(results: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Results that share no memory with each other or with other tensors, in one layout: a compiler relies on it."""
    taken = {tensor.untyped_storage().data_ptr() for tensor in others}
    found = []
    for result in results:
        place = result.untyped_storage().data_ptr()
        found.append(result.clone(memory_format=torch.contiguous_format) if place in taken else result.contiguous())
        taken.add(place)
    return found


@_scan.register_fake
def _(number: int, wanted: Any, state: Tensor, inputs: Sequence[Tensor], shared: Any) -> list[Tensor]:
    return _places(_by_number[number], state, inputs)


@_scan_backward.register_fake
def _(number: int, wanted: Any, slope: Any, kept: Any, state: Tensor, inputs: Any, shared: Any) -> list[Tensor]:
    tensors = (state, *inputs, *shared)
    return [tensor.new_empty(tensor.shape) for tensor, want in zip(tensors, wanted, strict=True) if want]


def _keep(ctx: Any, inputs: Any, output: Sequence[Tensor]) -> None:
    ctx.number, ctx.wanted, state, given, shared = inputs
    ctx.counts = len(output), len(given)
    ctx.save_for_backward(*output, state, *given, *shared)


def _differentiate(ctx: Any, slopes_of_outputs: Sequence[Tensor | None]) -> Any:
    num_kept, num_inputs = ctx.counts
    kept, (state, *rest) = ctx.saved_tensors[:num_kept], ctx.saved_tensors[num_kept:]
    slope = slopes_of_outputs[0]
    slope = torch.zeros_like(kept[0]) if slope is None else slope
    given, shared = rest[:num_inputs], rest[num_inputs:]
    found = iter(torch.ops.pyro_vae.scan_backward(ctx.number, ctx.wanted, slope, list(kept), state, given, shared))
    slopes = [next(found) if want else None for want in ctx.wanted]
    return None, None, slopes[0], slopes[1 : num_inputs + 1], slopes[num_inputs + 1 :]


_scan.register_autograd(_differentiate, setup_context=_keep)
