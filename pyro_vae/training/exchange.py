"""What the processes of a run tell each other after each gradient: one sum over all of them, in one flat buffer.

Each rank r has the gradient g_r of the mean loss over its M_r rows of the minibatch. That of the whole minibatch is

    g = sum_r M_r g_r / sum_r M_r

so with M_r g_r and M_r in one buffer one sum gives all ranks the same bits, from which they take the same step. The
loss goes with it, and so does whatever all must decide after the same step.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.parallel import Ranks

__all__ = ["Asked", "Exchange"]


class Asked(NamedTuple):
    """What a process asks for, or what was agreed because one of them did.

    Attributes:
        interrupted: to stop, for it received SIGINT.
        terminated: to stop, for it received SIGTERM.
        save: a checkpoint, for the last one was long ago.
        eager: eager steps, for its own cannot be recorded.
    """

    interrupted: bool = False
    terminated: bool = False
    save: bool = False
    eager: bool = False

    @property
    def signal(self) -> int | None:
        """The number of the signal that was received."""
        return signal.SIGINT if self.interrupted else signal.SIGTERM if self.terminated else None


class Exchange:
    """Sums of gradients over ranks.

    Buffers that a gradient's computation writes, such as running statistics, become the ranks' mean, weighted by their
    rows; of whole numbers, rank 0's. What is summed are changes: a buffer that nobody wrote keeps its bits.

    Args:
        ranks: who takes part, more than one.
        tensors: the parameters.
        buffers: the program's.

    Attributes:
        asks: what this process asks for.
        agreed: what one of the processes asked for, after the newest exchange.
        rows: of the newest minibatch, over all ranks.
    """

    def __init__(self, ranks: Ranks, tensors: Sequence[Tensor], buffers: Iterable[Tensor]) -> None:
        self.ranks, self._tensors = ranks, list(tensors)
        self.asks: Callable[[], Asked] = Asked
        self.agreed, self.rows = Asked(), 0
        known = [b for b in {id(b): b for b in buffers}.values() if b.numel() and not b.is_complex()]
        averaged = [b for b in known if b.is_floating_point()]
        self._buffers = averaged + [b for b in known if not b.is_floating_point()]
        self._before: list[Tensor] = []
        weighted = [*self._tensors, *averaged]
        dtype = functools.reduce(torch.promote_types, {t.dtype for t in weighted}, torch.float32)
        sizes = [t.numel() for t in (*self._tensors, *self._buffers)]
        self._tail = sum(sizes)
        length = self._tail + 2 + len(Asked._fields) + len(self._tensors)
        self._flat = torch.zeros(length, dtype=dtype, device=self._tensors[0].device)
        self._weighted = self._flat[: sum(t.numel() for t in weighted)]
        views = [
            part.as_strided(t.shape, torch.empty_like(t).stride())  # that of the tensor, if it is dense
            for part, t in zip(self._flat[: self._tail].split(sizes), (*self._tensors, *self._buffers), strict=True)
        ]
        self._gradients, self._changes = views[: len(self._tensors)], views[len(self._tensors) :]

    def begin(self) -> None:
        """Note the buffers, before a gradient's computation writes them."""
        self._before = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def __call__(
        self, loss: Tensor | float, gradients: Sequence[Tensor | None], rows: int
    ) -> tuple[float, list[Tensor | None]]:
        """The mean loss and its gradients over all ranks' rows, from this rank's over its own.

        Args:
            loss: mean over the rank's rows.
            gradients: of it, one for each parameter; None for what it does not depend on.
            rows: how many they are; 0 for a rank that has none, whose loss and gradients then do not count.

        Returns:
            Loss and gradients; None for those that are None on all ranks. They are overwritten by the next exchange.
        """
        self._fill(gradients)
        self._weighted.mul_(rows) if rows else self._weighted.zero_()
        present = [gradient is not None for gradient in gradients]
        told = [float(loss) * rows if rows else 0.0, rows, *self.asks(), *present]
        self._flat[self._tail :] = torch.tensor(told, dtype=self._flat.dtype)
        self.ranks.add(self._flat)
        total, counted, *flags = self._flat[self._tail :].tolist()
        self._weighted.div_(counted)
        self.rows, asked = round(counted), len(Asked._fields)
        self.agreed = Asked(*(flag > 0 for flag in flags[:asked]))
        for buffer, before, change in zip(self._buffers, self._before, self._changes, strict=True):
            buffer.copy_(before + change if buffer.is_floating_point() else before.long() + change.round().long())
        needed = zip(self._gradients, self._tensors, flags[asked:], strict=True)
        return total / counted, [view.to(tensor) if count > 0 else None for view, tensor, count in needed]

    def _fill(self, gradients: Sequence[Tensor | None]) -> None:
        for view, gradient in zip(self._gradients, gradients, strict=True):
            view.zero_() if gradient is None else view.copy_(gradient)
        for view, buffer, before in zip(self._changes, self._buffers, self._before, strict=True):
            if buffer.is_floating_point():
                view.copy_(torch.where(buffer == before, 0.0, buffer - before))  # infinities, too
            else:
                view.copy_(buffer.long() - before.long()) if self.ranks.first else view.zero_()
