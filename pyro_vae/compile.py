"""Functions of tensors, recorded once as a graph of tensor operations, and run without the Python that made them.

A function is *captured* by running it once under ``make_fx``, below autograd: what is left is the list of operations of
forward and backward pass together, random draws among them, which draw anew at each run from torch's generators as the
function itself would. Tensors that the function reaches by itself (parameters, buffers, weights of a schedule) are held
by reference: what is written into them later, the graph reads. Everything else is frozen at the value it had, every
Python number and branch. So a function whose result depends on something else must not be captured, and whoever
captures compares the two from time to time (:func:`difference`).

A captured graph is run operation by operation, at the cost of the operations alone, or *compiled* by Inductor into
fused C++ loops around the matrix products, which takes seconds, once: the result is cached on disk. On a CUDA device
either is recorded once more, as a CUDA graph, which is started by one call.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import operator
import re
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, library
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_vae.numerics import forked_rng, seeded

__all__ = [
    "UNRECORDED",
    "CaptureError",
    "Graph",
    "Recorded",
    "Recorder",
    "capture",
    "difference",
    "outcome",
    "unchanged",
]

_LIBRARY = library.Library("pyro_vae", "DEF")
_LARGE = 20_000_000  # multiplications of a matrix product
_SEED = 1_312_6114  # of noise that is not the noise that was recorded
_LARGEST = 3_000  # operations; Inductor's time grows faster than their number, to minutes
_ROUNDING = 1e-4  # relative difference that it may explain
_WARM_UP = 3  # runs before a CUDA graph is recorded, for libraries to choose their algorithms


class CaptureError(RuntimeError):
    """A function cannot be recorded, or its graph not compiled; the message is the reason, in one line."""


@dataclass(frozen=True, eq=False)
class Graph:
    """A recorded function.

    Attributes:
        module: the operations; takes the inputs, then the state.
        state: tensors held by reference, which the graph reads and may write.
        run: what is called in the place of ``module``.
    """

    module: GraphModule
    state: tuple[Tensor, ...]
    run: Callable[..., Sequence[Tensor]]

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The function's results at other inputs of the same shapes."""
        return self.run(*inputs, *self.state)

    def __len__(self) -> int:
        return len(self.module.graph.nodes)

    @property
    def draws(self) -> bool:
        """Whether there are random draws among the operations."""
        return any(map(_draws, self.module.graph.nodes))

    def compiled(self, inputs: Sequence[Tensor]) -> Graph:
        """The same graph, compiled by Inductor.

        Args:
            inputs: of the shapes that it will be called with; the graph is not run.

        Raises:
            CaptureError: there is no C++ compiler, the graph is too large, or Inductor cannot compile it.
        """
        if len(self) > _LARGEST:
            raise CaptureError(f"{len(self):,} operations would take minutes to compile (limit {_LARGEST:,})")
        noise, module = _split(self.module)
        try:
            with torch.no_grad(), forked_rng(), _quiet("torch.utils.cpp_extension"):
                run = torch._inductor.compile(module, [*noise(), *inputs, *self.state])
        except Exception as error:
            raise CaptureError(_reason(error)) from error
        return Graph(self.module, self.state, lambda *tensors: run(*noise(), *tensors)[:-1])

    def on_device(self, inputs: Sequence[Tensor]) -> Graph:
        """The same operations in the fastest form there is for the device of the inputs: on CUDA a CUDA graph."""
        if inputs and inputs[0].is_cuda:
            with contextlib.suppress(CaptureError):
                return self.as_cuda_graph(inputs)
        return self

    def as_cuda_graph(self, inputs: Sequence[Tensor]) -> Graph:
        """The same operations as one CUDA graph, whose inputs are copied to where it was recorded.

        Args:
            inputs: of the shapes that it will be called with, on a CUDA device; the graph is run, and writes its state.

        Raises:
            CaptureError: something in it cannot be recorded so, or a tensor of it lies elsewhere.
        """
        if not all(tensor.is_cuda for tensor in (*inputs, *self.state)):
            raise CaptureError("a tensor outside of the device would be frozen in a CUDA graph")
        places = [tensor.clone() for tensor in inputs]
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    self(*places)
            torch.cuda.current_stream().wait_stream(side)
            recorded = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recorded):
                outputs = self(*places)
        except Exception as error:
            raise CaptureError(_reason(error)) from error

        def replay(*tensors: Tensor) -> Sequence[Tensor]:
            torch._foreach_copy_(places, list(tensors[: len(places)]))
            recorded.replay()
            return outputs

        return Graph(self.module, self.state, replay)


def capture(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], state: Sequence[Tensor] = ()) -> Graph:
    """Record a function as a graph.

    Args:
        function: of the inputs; returns tensors. It is run once, on the inputs themselves; tensors that it writes are
            put back, random generators are not.
        inputs: tensors that differ from call to call, by value and not by shape.
        state: tensors that the function reaches by itself, whose values must not be read as Python numbers. Others that
            it reaches are found, and held by reference too.

    Returns:
        The graph.

    Raises:
        CaptureError: the function decides by a tensor's value, or fails otherwise.

    Example:
        >>> weight = torch.tensor(2.0)
        >>> graph = capture(lambda x: (weight * x,), [torch.ones(3)], [weight])
        >>> _ = weight.fill_(5.0)
        >>> graph(torch.ones(3))[0]
        tensor([5., 5., 5.])
    """
    given = {id(tensor) for tensor in inputs}
    state = list({id(tensor): tensor for tensor in state if id(tensor) not in given}.values())
    try:
        with _put_back_what_is_written(), _NumbersStayTensors():
            module = make_fx(lambda *tensors: tuple(function(*tensors[: len(inputs)])))(*inputs, *state)
    except Exception as error:  # whatever a user's function may raise: it runs as Python, then
        raise CaptureError(_reason(error)) from error
    state += _lift_constants(module)
    _tidy(module)
    return Graph(module, tuple(state), module)


def _split(module: GraphModule) -> tuple[GraphModule, GraphModule]:
    """The first draws, as long as they depend on no tensor, and the rest, which takes them as its first inputs.

    Inductor would draw by algorithms of its own, and move draws about; then a seed would give other numbers compiled
    than not. So the noise of reparameterised draws is made before, and later draws are tied together in their order.
    """
    draws = [node for node in module.graph.nodes if _draws(node)]
    noise, copies = torch.fx.Graph(), dict[Node, Node]()
    for node in module.graph.nodes:
        if node.op == "call_function" and all(source in copies for source in node.all_input_nodes):
            copies[node] = noise.node_copy(node, copies.__getitem__)
    before = list(itertools.takewhile(lambda node: node in copies and _is_fresh(node), draws))
    noise.output(tuple(copies[node] for node in before))
    for node in reversed(noise.nodes):  # a draw that is made elsewhere must not be made here too
        if not node.users and node.op != "output":
            noise.erase_node(node)
    rest = torch.fx.Graph()
    given = {node: rest.placeholder(f"noise_{place}") for place, node in enumerate(before)}
    output = rest.output(rest.graph_copy(module.graph, given))
    last = _tie(rest)
    output.args = ((*output.args[0], last),)  # lest a last draw that nobody reads be dropped
    _by_onednn(rest)
    return GraphModule(module, noise), GraphModule(module, rest)


def _is_fresh(draw: Node) -> bool:
    """Whether it makes a tensor of its own, or fills one that was made for it and that nothing else refers to."""
    schema: Any = draw.target._schema  # type: ignore[union-attr]
    filled = draw.all_input_nodes
    return not schema.is_mutable or (len(filled[0].users) == 1 and not filled[0].all_input_nodes)


def _tie(graph: torch.fx.Graph) -> Node:
    """Make of each draw an operation that a compiler does not know, which hands an empty tensor on to the next one."""
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        order = graph.call_function(torch.ops.aten.empty.memory_format, ([0],))
    for node in [node for node in graph.nodes if _draws(node)]:
        schema: Any = node.target._schema
        count = len(schema.returns)
        with graph.inserting_before(node):
            options = {_renamed(name): value for name, value in node.kwargs.items()}
            drawn = graph.call_function(_ordered(node.target), (order, *node.args), options)
            *parts, order = [graph.call_function(operator.getitem, (drawn, place)) for place in range(count + 1)]
            if schema.is_mutable:
                parts = [graph.call_function(torch.ops.aten.copy_.default, (node.args[0], parts[0]))]
        if count == 1:
            node.replace_all_uses_with(parts[0])
        for user in list(node.users):
            user.replace_all_uses_with(parts[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
    return order


def _by_onednn(graph: torch.fx.Graph) -> None:
    """Give oneDNN the large matrix products of single precision on a CPU, which torch gives to MKL."""
    if not torch.backends.mkldnn.is_available():
        return
    for node in list(graph.nodes):
        if node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and not node.kwargs:
            *bias, a, b = node.args
            plain = node.meta["val"].device.type == "cpu" and node.meta["val"].dtype == torch.float32
            large = _shape(a).numel() * _shape(b)[1] > _LARGE
            if plain and large and all(len(_shape(row)) == 1 for row in bias):
                with graph.inserting_before(node):
                    product = graph.call_function(torch.ops.pyro_vae.product.default, (a, b, *bias))
                node.replace_all_uses_with(product)
                graph.erase_node(node)


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return product


_LIBRARY.define("product(Tensor a, Tensor b, Tensor? bias=None) -> Tensor")
_LIBRARY.impl("product", _product, "CPU")
library.register_fake("pyro_vae::product", lambda a, b, bias=None: a.new_empty(a.shape[0], b.shape[1]), lib=_LIBRARY)


def _draws(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _renamed(name: str) -> str:
    return "from_" if name == "from" else name  # a word of Python's, which a new operation may not use


@functools.cache
def _ordered(function: Any) -> Any:
    """The operation with an empty tensor before its arguments and another one after its results."""
    schema = function._schema
    arguments = re.sub(r"\([a-z]!\)", "", str(schema).partition("(")[2].rpartition(" -> ")[0])
    arguments = re.sub(r"\bfrom\b", _renamed("from"), arguments)
    returns = ", ".join(["Tensor"] * (len(schema.returns) + 1))
    name = re.sub(r"\W", "_", f"{schema.name}_{schema.overload_name}")

    def draw(order: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        own = (args[0].clone(), *args[1:]) if schema.is_mutable else args
        results = function(*own, **{name.rstrip("_"): value for name, value in kwargs.items()})
        return (*(results if isinstance(results, tuple) else (results,)), torch.empty(0))

    _LIBRARY.define(f"{name}(Tensor order, {arguments} -> ({returns})", tags=(torch.Tag.nondeterministic_seeded,))
    _LIBRARY.impl(name, draw, "CompositeExplicitAutograd")
    library.register_fake(f"pyro_vae::{name}", draw, lib=_LIBRARY)
    return getattr(torch.ops.pyro_vae, name).default


class _put_back_what_is_written(TorchDispatchMode):
    """Whatever is written in place inside has its values back afterwards."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
            named |= kwargs or {}
            for argument in func._schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._keep(named.get(argument.name))
        return func(*args, **(kwargs or {}))

    def _keep(self, written: Any) -> None:
        for tensor in tree_leaves(written):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self._kept:
                with disable_proxy_modes_tracing():
                    self._kept[storage._cdata] = storage, storage.clone()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for storage, values in self._kept.values():
            storage.copy_(values)


class _NumbersStayTensors(TorchFunctionMode):
    """What torch reads from a tensor as a number, where no Python decides by it, stays part of the graph.

    ``tensor.item()`` gives the tensor, which can be added up and logged; ``one_hot`` compares, and does not look
    whether the classes are in range.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.item:
            return args[0].detach()
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__) or (
            func is torch.tensor and _holds_tensors(args[0])
        ):
            raise CaptureError("a tensor's values leave torch")
        if func is functional.one_hot:
            return _one_hot(*args, **kwargs)
        return func(*args, **kwargs)


def _holds_tensors(data: Any) -> bool:
    return not isinstance(data, Tensor) and any(isinstance(value, Tensor) for value in tree_leaves(data))


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 1:
        return functional.one_hot(tensor, num_classes)
    return (tensor[..., None] == torch.arange(num_classes, device=tensor.device)).long()


def _lift_constants(module: GraphModule) -> list[Tensor]:
    """Make inputs of the tensors that were found on the way: a compiler may take a constant's value for granted."""
    lifted: dict[str, Tensor] = {}
    places: dict[str, Any] = {}
    body = next(node for node in module.graph.nodes if node.op not in ("placeholder", "get_attr"))
    for node in module.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name not in lifted:
            lifted[name] = getattr(module, name)
            with module.graph.inserting_before(body):
                places[name] = module.graph.placeholder(f"constant_{len(places)}")
            places[name].meta["tensor_meta"] = _extract_tensor_metadata(lifted[name])
        node.replace_all_uses_with(places[name])
        module.graph.erase_node(node)
    module.recompile()
    return list(lifted.values())


def _tidy(module: GraphModule) -> None:
    """Drop what does nothing: views of a tensor's own shape, and results that nobody asks for."""
    aten = torch.ops.aten
    for target in (aten.alias.default, aten.expand.default, aten.view.default):
        for node in module.graph.find_nodes(op="call_function", target=target):
            if _shape(node) == _shape(node.args[0]):
                node.replace_all_uses_with(node.args[0])
    module.graph.eliminate_dead_code()
    module.recompile()


def _shape(node: Any) -> torch.Size:
    return node.meta["tensor_meta"].shape  # type: ignore[no-any-return]


def _reason(error: BaseException) -> str:
    if isinstance(error, CaptureError):
        return str(error)
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if "trying to get value out of a tracing tensor" in text or "data-dependent" in text:
        return "a tensor's value decides what is computed"
    return f"{type(error).__name__}: {text[:200]}"


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep to itself what torch says of its own parts: a logger's warnings, and Python's."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def unchanged(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put tensors back to the values they had."""
    kept = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)


def outcome(
    function: Callable[[], Sequence[Tensor | None]], state: Sequence[Tensor], seed: int
) -> tuple[list[Tensor | None], list[Tensor]]:
    """What a function gives, and what it makes of its state, for the noise of a seed; nothing is left behind."""
    with seeded(seed), unchanged(state):
        results = [None if result is None else result.clone() for result in function()]
        return results, [tensor.detach().clone() for tensor in state]


def difference(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None], floor: float = 0.0) -> float:
    """Euclidean norm of a difference, relative to that of the second; infinite where one has a tensor and one has none.

    Args:
        ours: tensors.
        theirs: as many, of the same shapes.
        floor: the least norm that counts: below it, the difference is taken as a share of this.

    Example:
        >>> difference([torch.tensor([1.0, 1.0])], [torch.tensor([1.0, 0.0])])
        1.0
    """
    if [a is None for a in ours] != [b is None for b in theirs]:
        return torch.inf
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    gaps = [torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b) for a, b in pairs]  # infinities, too
    gap = sum(g.square().sum().item() for g in gaps) ** 0.5
    size = max(floor, sum(b[b.isfinite()].square().sum().item() for _, b in pairs) ** 0.5)
    return gap if gap == 0 else gap / size if size else torch.inf


class Recorded:
    """A function that is called many times with tensors of the same shapes; it runs as a graph from the second call on.

    The graph is run beside the function once, on other noise, and dropped if the two differ. What has other shapes than
    the first call runs as Python, and everything does if the function cannot be recorded; a warning says why.

    Args:
        function: of tensors, to tensors.
        state: tensors that it reaches by itself.
        compiled: compile the graph too, which pays where all the calls together take a minute.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        state: Sequence[Tensor] = (),
        *,
        compiled: bool = False,
    ) -> None:
        self._function, self._state, self._compiled = function, list(state), compiled
        self._shapes: list[torch.Size] | None = None
        self._run: Callable[..., Sequence[Tensor]] = function

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The function's results."""
        inputs = tuple(tensor.contiguous() for tensor in inputs)  # a graph holds for one layout
        shapes = [tensor.shape for tensor in inputs]
        if self._shapes is None:
            self._shapes = shapes
        elif self._run is self._function and shapes == self._shapes:
            self._run = self._recorded(inputs)
        return self._run(*inputs) if shapes == self._shapes else self._function(*inputs)

    def _recorded(self, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
        run: Callable[..., Sequence[Tensor]] = functools.partial(self._function)  # another object: asked for once
        try:
            with forked_rng(), unchanged(self._state):
                graph = capture(self._function, inputs, self._state)
            found = [outcome(functools.partial(one, *inputs), self._state, _SEED)[0] for one in (graph, self._function)]
            if difference(found[0], found[1]) > _ROUNDING:
                raise CaptureError("recorded, it gives other results, for something other than a tensor changes")
            run = graph
            if self._compiled:
                run = graph.compiled(inputs)
            return run.on_device(inputs)
        except CaptureError as error:
            warnings.warn(f"running {'as recorded' if isinstance(run, Graph) else 'eagerly'}: {error}", stacklevel=4)
            return run


class Recorder:
    """Keeps the recorded form of functions that are made anew at each use, by a key.

    Args:
        enabled: False leaves every function as it is.
        compiled: compile what is recorded.
    """

    def __init__(self, enabled: bool = True, compiled: bool = False) -> None:
        self._enabled, self._compiled = enabled, compiled
        self._known: dict[Hashable, Recorded] = {}

    def __call__(
        self, key: Hashable, function: Callable[..., Sequence[Tensor]], state: Sequence[Tensor] = ()
    ) -> Callable[..., Sequence[Tensor]]:
        """The function, recorded under this key before or from now on.

        Args:
            key: functions of the same key must do the same with the same tensors.
            function: of tensors, to tensors; only the first one of a key is kept.
            state: tensors that it reaches by itself.
        """
        if not self._enabled:
            return function
        if key not in self._known:
            self._known[key] = Recorded(function, state, compiled=self._compiled)
        return self._known[key]

    def differentiable(
        self, key: Hashable, function: Callable[..., Tensor], state: Sequence[Tensor] = ()
    ) -> Callable[..., Tensor]:
        """A function of positions, recorded with its gradient: one value for each, which depends on that alone.

        Args:
            key: as above.
            function: of positions (*batch, J) and other tensors, to values (*batch).
            state: as above.

        Returns:
            The function; its gradient reaches the positions, and nothing else.
        """
        if not self._enabled:
            return function
        recorded = self(key, functools.partial(_value_and_gradient, function), state)
        return lambda position, *others: _Differentiable.apply(recorded, position, *others)


def _value_and_gradient(function: Callable[..., Tensor], position: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        position = position.detach().requires_grad_()
        value = function(position, *others)
        (gradient,) = torch.autograd.grad(value.sum(), position)
    return value.detach(), gradient


class _Differentiable(torch.autograd.Function):
    """A value whose gradient was computed with it."""

    @staticmethod
    def forward(ctx: Any, recorded: Callable[..., Sequence[Tensor]], position: Tensor, *others: Tensor) -> Tensor:
        value, gradient = recorded(position.detach(), *others)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return None, upstream[..., None] * gradient, *(None for _ in ctx.needs_input_grad[2:])


UNRECORDED = Recorder(enabled=False)
