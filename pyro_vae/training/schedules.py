"""What changes along a run beside the parameters: the learning rate, and an average of the weights."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler, ReduceLROnPlateau

from pyro_vae.training.optimizers import optimizer_name

__all__ = ["Average", "Schedule", "ScheduleLike", "schedule_name"]

ScheduleLike = float | Callable[[Optimizer], LRScheduler]
_EXPECTED = "learning_rate_schedule: expected a factor above 0, or a function of the optimiser that returns a scheduler"


def schedule_name(schedule: ScheduleLike | None) -> float | str | None:
    """What a run records of a schedule: its factor, or its name.

    Raises:
        ValueError: it is neither a positive number nor a function.
    """
    if schedule is None or isinstance(schedule, (int, float)):
        if schedule is not None and not (0 < schedule < math.inf and not isinstance(schedule, bool)):
            raise ValueError(f"{_EXPECTED}, got {schedule!r}")
        return schedule
    if not callable(schedule):
        raise ValueError(f"{_EXPECTED}, got {schedule!r}")
    return optimizer_name(schedule)  # type: ignore[arg-type]


class Schedule:
    """A scheduler of torch over an optimiser, which can be brought to where a run stood.

    Args:
        make: of the optimiser, gives a scheduler of ``torch.optim.lr_scheduler``; or by what to multiply the rates.
        optimizer: whose rates it changes.

    Attributes:
        by_bound: whether it waits for a bound that no longer gets better (``ReduceLROnPlateau``).

    Raises:
        ValueError: what is made is no scheduler, or one that waits for smaller values.
    """

    def __init__(self, make: ScheduleLike, optimizer: Optimizer) -> None:
        if not callable(make):
            make = functools.partial(ExponentialLR, gamma=make)
        self.scheduler = make(optimizer)
        if not isinstance(self.scheduler, LRScheduler):
            raise ValueError(f"{_EXPECTED}, got {make!r}, which returned {self.scheduler!r}")
        self.by_bound = isinstance(self.scheduler, ReduceLROnPlateau)
        if isinstance(self.scheduler, ReduceLROnPlateau):
            found = self.scheduler.mode, self.scheduler.threshold_mode
            if found != ("max", "abs"):
                raise ValueError(
                    "learning_rate_schedule: expected ReduceLROnPlateau with mode='max' and threshold_mode='abs', for "
                    f"bounds grow, and relative to a negative one a better one is a worse one; got {found}"
                )

    def step(self) -> None:
        """A step, or an epoch, is over."""
        if not self.by_bound:
            self.scheduler.step()

    def see(self, bound: float) -> None:
        """The bound was evaluated."""
        assert isinstance(self.scheduler, ReduceLROnPlateau)
        self.scheduler.step(bound)

    def replay(self, turns: int, bounds: Sequence[float]) -> None:
        """Go where a run stood: its state may hold functions, which no checkpoint keeps, but it follows from these.

        Args:
            turns: steps or epochs that are over.
            bounds: that were seen.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step\(\)` before")
            for _ in range(turns):
                self.step()
        for bound in bounds:
            self.see(bound)


class Average:
    """An exponential moving average of tensors (Polyak & Juditsky 1992), the plain mean as long as that is shorter.

        a_n = d_n a_{n-1} + (1 - d_n) w_n,        d_n = min(decay, (n - 1) / n)

    Args:
        tensors: w, by name.
        decay: of the average, from 0 to below 1; it looks back about 1 / (1 - decay) steps.

    Attributes:
        values: a, by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor], decay: float) -> None:
        self.tensors, self.decay = tensors, decay
        self.values = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take the tensors in, of a number of steps n, from 1 on."""
        weight = 1 - min(self.decay, (steps - 1) / steps)
        for value, tensor in zip(self.values.values(), self.tensors.values(), strict=True):
            value.lerp_(tensor, weight)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The averages are where the tensors were, as long as it lasts."""
        kept = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        self._put(self.values)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(values[name])
