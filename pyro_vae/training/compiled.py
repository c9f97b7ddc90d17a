"""The step, recorded as a graph and compiled; what cannot be recorded stays Python.

A run's steps take three paths, by their number alone, so that a run that was stopped and resumed takes the same ones:

    the first 10       eager: a run that short is over before recording would have paid
    up to 1,000        captured: loss and gradients are one graph of tensor operations
    from then on       compiled: that graph by Inductor, whose seconds pay from here on

The first two give the same bits. The third rounds differently, by a few units in the last place. The optimiser's update
is torch's own on all three: recorded, it takes as long (0.52 against 0.49 ms for 800,000 parameters under Adam), and
Inductor's loops are slower than its fused kernels.

A graph is of one shape of batch. Where minibatches of sequences are cut to different lengths there are several, each
captured once it has come often enough. Only the usual shape is compiled: how often the others came is forgotten when a
run stops, and a run that goes on must take the same paths, or paths of the same bits.

The graphs are right as long as nothing changes but tensors. That is not believed: when a graph is made, at the next
minibatch and at every evaluation, it is run beside the program itself, on the same batch with the same noise, and
dropped where they differ.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pyro.util
import torch
from torch import Tensor

from pyro_vae.compile import CaptureError, Graph, capture, difference, outcome, unchanged
from pyro_vae.numerics import forked_rng
from pyro_vae.objectives import Objective
from pyro_vae.training.step import Batch, EagerStep, Gradients

__all__ = ["CAPTURE_AFTER", "COMPILE_AFTER", "CompiledStep"]

CAPTURE_AFTER = 10
COMPILE_AFTER = 1_000
_MOST_SHAPES = 12  # that are recorded; further ones are stepped eagerly
_ATTEMPTS = 3  # a discrete draw at a rounding error's distance from its threshold may fall on the other side
_SMALL_GRADIENT = 0.01  # nats per datum and unit of the parameters: below, what is left may be rounding alone
_BF16_UNIT = 1e-4  # what fused and separate roundings to bfloat16 come to, over a step's sums
_SEED = 20_131_220  # of the comparison's noise, which is not the noise that was recorded


@dataclass(eq=False)
class _Recorded:
    """Steps on batches of one shape.

    Attributes:
        kind: what the graph takes for granted of a batch, beside its shape.
        graph: None as long as steps are eager.
        seen: how many such batches came.
        depends: on which parameters the loss depends.
        num_inputs: tensors that the graph takes.
        compiled: whether Inductor has compiled it.
        newest: the last such batch.
        due: comparisons to be made: one where the graph is made, one at other data.
    """

    kind: tuple[Any, ...]
    graph: Graph | None = None
    seen: int = 0
    depends: list[bool] = field(default_factory=list)
    num_inputs: int = 0
    compiled: bool = False
    newest: Batch | None = None
    due: int = 0

    @property
    def state(self) -> Sequence[Tensor]:
        """What the graph reads and writes beside its inputs."""
        return () if self.graph is None else self.graph.state


class CompiledStep(EagerStep):
    """A step that is eager at first, then captured, then compiled.

    Args:
        *args: as for :class:`EagerStep`.
        shapes: of the tensors of a batch of the usual size. Batches of other sizes, such as a short last one, are
            stepped eagerly; those of as many rows but another shape are recorded once they have come often.
        **kwargs: as for :class:`EagerStep`.

    Attributes:
        capture_after: how many steps are eager first.
        compile_after: how many steps are not compiled.
    """

    def __init__(self, *args: Any, shapes: Sequence[torch.Size], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._usual = tuple(shapes)
        self.capture_after, self.compile_after = CAPTURE_AFTER, COMPILE_AFTER
        self._recorded: dict[tuple[torch.Size, ...], _Recorded] = {}
        self._newest: _Recorded | None = None

    @property
    def path(self) -> str:
        """How steps are taken at present: "eager", "captured" or "compiled"."""
        graphs = [recorded for recorded in self._recorded.values() if recorded.graph is not None]
        return "eager" if not graphs else "compiled" if any(found.compiled for found in graphs) else "captured"

    def gradients(self, batch: Batch) -> tuple[Tensor | float, Gradients]:
        """The mean loss and its gradients, by the graph where there is one for the batch."""
        recorded = self._recording_of(batch)
        if recorded is None:
            return super().gradients(batch)
        if recorded.graph is None:
            self._capture(recorded, batch)
        if self._is_due_for_compilation(recorded, batch):
            self._compile(recorded, batch)
        recorded.newest, self._newest = batch, recorded
        if recorded.due:
            recorded.due -= 1
            self.compare()
        return super().gradients(batch) if recorded.graph is None else self._by_graph_of(recorded, batch)

    def _recording_of(self, batch: Batch) -> _Recorded | None:
        """Where the graph of such batches is, or is to be; None if this one is stepped eagerly."""
        shapes = _shapes_of(batch)
        if self.refused is not None or self.taken < self.capture_after or not self._is_whole(batch, shapes):
            return None
        recorded = self._recorded.setdefault(shapes, _Recorded(_kind(batch)))
        recorded.seen += 1
        if recorded.kind != _kind(batch):
            return None
        if recorded.graph is not None or shapes == self._usual:
            return recorded
        known = sum(found.graph is not None for found in self._recorded.values())
        return recorded if recorded.seen > self.capture_after and known < _MOST_SHAPES else None

    def _is_whole(self, batch: Batch, shapes: tuple[torch.Size, ...]) -> bool:
        rows = [shape[:1] for shape in shapes] == [shape[:1] for shape in self._usual]
        return rows and all(tensor.is_contiguous() for tensor in batch.tensors)

    def _is_due_for_compilation(self, recorded: _Recorded, batch: Batch) -> bool:
        usual = _shapes_of(batch) == self._usual and recorded.graph is not None
        return usual and not recorded.compiled and self.taken >= self.compile_after

    def _inputs(self, batch: Batch) -> list[Tensor]:
        held = self.objective.held() if isinstance(self.objective, Objective) else ()
        return [*batch.tensors, *held]

    def _by_graph_of(self, recorded: _Recorded, batch: Batch) -> tuple[Tensor, Gradients]:
        assert recorded.graph is not None
        loss, *found = recorded.graph(*self._inputs(batch))
        given = iter(found)
        return loss, [next(given) if depends else None for depends in recorded.depends]

    # Making the graphs ------------------------------------------------------------------------------------------------

    def _capture(self, recorded: _Recorded, batch: Batch) -> None:
        def loss_and_gradients(*_: Tensor) -> list[Tensor]:
            loss, gradients = EagerStep.gradients(self, batch)
            recorded.depends = [gradient is not None for gradient in gradients]
            return [torch.as_tensor(loss), *(gradient for gradient in gradients if gradient is not None)]

        inputs, state = self._inputs(batch), [*self.tensors, *self._buffers(), *self._numbers()]
        try:
            # Pyro looks for NaN by values; the step looks at the loss.
            recorded.num_inputs = len(inputs)
            with self._aside(), mock.patch.object(pyro.util, "torch_isnan", return_value=False):
                graph = capture(loss_and_gradients, inputs, state)
                self._require_own_buffers(state)
                recorded.graph = graph.on_device(inputs)
        except CaptureError as error:
            self.refuse(f"the step cannot be recorded: {error}")
        else:
            recorded.due = 2

    def _compile(self, recorded: _Recorded, batch: Batch) -> None:
        assert recorded.graph is not None
        recorded.compiled, inputs = True, self._inputs(batch)
        self.say("compiling the step, which may take half a minute, once ...")
        try:
            with self._aside():
                graph = recorded.graph.compiled(inputs)
                recorded.graph = graph.on_device(inputs)
        except CaptureError as error:
            recorded.compiled, self.compile_after = False, torch.iinfo(torch.int64).max
            warnings.warn(f"the step runs as recorded, but not compiled: {error}", stacklevel=2)
        else:
            recorded.due = 2
        finally:
            self.say("")

    def _require_own_buffers(self, state: Sequence[Tensor]) -> None:
        known = {id(tensor) for tensor in state}
        if replaced := [name for name, buffer in self.program.named_buffers().items() if id(buffer) not in known]:
            raise CaptureError(f"buffer '{replaced[0]}' is replaced at each step; expected it to be written in place")

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Leave no trace: generators, buffers and the objective's numbers are put back."""
        parts = [part for module in self.program.modules().values() for part in module.modules()]
        kept = [dict(part._buffers) for part in parts]
        try:
            with forked_rng(), unchanged([*self._buffers(), *self._numbers()]):
                yield
        finally:
            for part, buffers in zip(parts, kept, strict=True):
                part._buffers.update(buffers)

    def _buffers(self) -> list[Tensor]:
        return list(self.program.named_buffers().values())

    def _numbers(self) -> list[Tensor]:
        """Weights of schedules and the like."""
        return [value for value in vars(self.objective).values() if isinstance(value, Tensor)]

    # Watching them ----------------------------------------------------------------------------------------------------

    def refuse(self, reason: str) -> None:
        """Take eager steps from now on, and say why."""
        self.refused, self._newest = reason, None
        while self._recorded:
            self._recorded.popitem()[1].graph = None
        warnings.warn(f"training goes on eagerly: {reason}", stacklevel=2)

    def compare(self) -> None:
        """Run the graph and the program beside each other, and go on eagerly if they differ by more than rounding."""
        recorded = self._newest
        if recorded is None or recorded.graph is None or recorded.newest is None:
            return
        if len(self._inputs(recorded.newest)) < recorded.num_inputs:
            recorded.due = max(1, recorded.due)  # what the objective held for the batch is gone: at the next one, then
        elif not any(self._agrees(recorded, recorded.newest, _SEED + attempt) for attempt in range(_ATTEMPTS)):
            self.refuse(
                "the recorded step is not the program's own: something other than a tensor changes, such as a Python "
                "number, an attribute or a draw of numpy's. What changes must be a tensor or a buffer, written in place"
            )

    def _agrees(self, recorded: _Recorded, batch: Batch, seed: int) -> bool:
        """Whether graph and program differ by no more than rounding explains.

        In single precision that is 1e-5 of the loss, and 1e-4 of the gradient's norm; more where the loss is large, for
        importance weights exp(log w) turn the absolute error of log w into a relative one.
        """

        def outcome_of(gradients: Callable[[Batch], tuple[Tensor | float, Gradients]]) -> Any:
            def step() -> list[Tensor | None]:
                loss, slopes = gradients(batch)
                return [torch.as_tensor(loss), *slopes]

            with self._aside():
                (loss, *slopes), written = outcome(step, state, seed)
            return loss, slopes, written

        known = [*self._inputs(batch), *self._buffers(), *self._numbers(), *recorded.state]
        state = list({id(tensor): tensor for tensor in known}.values())
        loss, ours, written = outcome_of(functools.partial(self._by_graph_of, recorded))
        expected, theirs, theirs_written = outcome_of(functools.partial(EagerStep.gradients, self))
        unit = _BF16_UNIT if self.precision == "bf16" else torch.finfo(expected.dtype).eps
        size = max(1.0, abs(float(expected)))
        return (
            difference([loss], [expected], floor=1.0) <= 100 * unit
            and difference(ours, theirs, floor=_SMALL_GRADIENT) <= 1000 * unit * (1 + size / 100)
            and all(
                difference([a], [b], floor=1.0) <= 1000 * unit for a, b in zip(written, theirs_written, strict=True)
            )
        )


def _shapes_of(batch: Batch) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for tensor in batch.tensors)


def _kind(batch: Batch) -> tuple[Any, ...]:
    """What a graph takes for granted of a batch, beside its shapes."""
    return batch.num_data, list(batch.kwargs), [tensor.dtype for tensor in batch.tensors]
