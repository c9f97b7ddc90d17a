"""Several processes that work as one: torch's process group, and what its members tell each other.

``torchrun`` starts the processes and says so in their environment; whoever asks for :func:`ranks` first joins them to a
group. What speaks to the others must be called by all of them, in the same order. A process alone is a group of size 1,
in which nothing is sent.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.data import DistributedSampler

__all__ = ["Ranks", "is_sharded", "ranks", "require_alone", "restarted"]

T = TypeVar("T")

_TIMEOUT = timedelta(minutes=30)  # one rank may compile, or write a large checkpoint, while the others wait
_SECONDS_TO_LEAVE = 0.2
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among those that work as one.

    Attributes:
        rank: its number, from 0; rank 0 speaks and writes for all.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Which of so many rows are this rank's: consecutive ones, and as many as any other's, or one more or less.

        Example:
            >>> [Ranks(rank, 3).part(8) for rank in range(3)]
            [slice(0, 3, None), slice(3, 6, None), slice(6, 8, None)]
        """
        share, extra = divmod(count, self.size)
        start = self.rank * share + min(self.rank, extra)
        return slice(start, start + share + (self.rank < extra))

    def seed(self, seed: int, *more: int) -> int:
        """The seed of this rank's own random numbers. Rank 0's is the seed itself: that of a process alone.

        Args:
            seed: of the whole.
            *more: what else tells the numbers apart, such as a position.
        """
        if self.first and not more:
            return seed
        return int(np.random.SeedSequence([seed, self.rank, *more]).generate_state(1)[0])

    def add(self, buffer: Tensor) -> None:
        """Make a buffer the sum of all ranks' buffers, in place; the same bits on all of them."""
        if self.size > 1:
            distributed.all_reduce(buffer)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order; tensors in them should be on the CPU."""
        found: list[Any] = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(found, value)
        return found

    def from_first(self, function: Callable[[], T]) -> T:
        """What a function gives on rank 0, where alone it is run; what it raises there is raised on all."""
        if self.size == 1:
            return function()
        found: list[Any] = [None, None]
        if self.first:
            try:
                found[0] = function()
            except Exception as error:
                found[1] = error
        distributed.broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        return found[0]  # type: ignore[no-any-return]

    @torch.no_grad()
    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors the values that they have on rank 0, in place."""
        if self.size == 1:
            return
        for tensor in tensors:
            value = tensor.detach().clone(memory_format=torch.contiguous_format)
            distributed.broadcast(value, 0)
            tensor.copy_(value)

    @contextlib.contextmanager
    def one_warning(self) -> Iterator[None]:
        """Warnings of rank 0 alone, for the others would say the same."""
        with contextlib.nullcontext() if self.first else warnings.catch_warnings():
            if not self.first:
                warnings.simplefilter("ignore")
            yield


def ranks() -> Ranks:
    """This process among the others: those of torch's process group, or those that torchrun started with it."""
    if not distributed.is_available():
        return Ranks()
    if not distributed.is_initialized():
        if not _is_launched():
            return Ranks()
        _join()
    return Ranks(distributed.get_rank(), distributed.get_world_size())


def _is_launched() -> bool:
    return all(name in os.environ for name in _LAUNCHED) and int(os.environ["WORLD_SIZE"]) > 1


def _join() -> None:
    """Join the group until this process ends: with NCCL if there is a GPU for each, which is made the current one."""
    store, rank, size = next(distributed.rendezvous("env://", timeout=_TIMEOUT))  # type: ignore[attr-defined]
    store, backend = _of_this_start(store, rank, size), "gloo"
    gpus = torch.cuda.device_count()
    if 0 < int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])) <= gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    atexit.register(_leave)


def _of_this_start(store: Any, rank: int, size: int) -> Any:
    """A part of torchrun's store that is new.

    After a failure torchrun starts all processes again, on a store that still holds where the dead ones were to be
    found, and on several machines nothing in the environment numbers the starts. So rank 0 names a part of the store.
    It answers whoever says hello, also those who are no more, until everyone has called it by this name.
    """
    name = uuid.uuid4().hex
    if rank:
        store.set(f"hello/{rank}", name)
        name = store.get(f"answer/{name}").decode()  # waits for it
        store.set(f"{name}/{rank}", "here")
    deadline, missing = time.monotonic() + _TIMEOUT.total_seconds(), set() if rank else set(range(1, size))
    while missing:
        for other in [other for other in missing if store.check([f"hello/{other}"])]:
            store.set(f"answer/{store.get(f'hello/{other}').decode()}", name)
        missing = {other for other in missing if not store.check([f"{name}/{other}"])}
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {sorted(missing)} of {size} did not come")
        time.sleep(0.01)
    return distributed.PrefixStore(name, store)  # type: ignore[attr-defined]


def _leave() -> None:
    """Leave the group.

    The threads that worked for it drop the tensors of the last exchange, for which they need the interpreter's lock: a
    thread that still waits for it when the interpreter ends takes the process down. So it is theirs for a moment.
    """
    if distributed.is_initialized():
        time.sleep(_SECONDS_TO_LEAVE)
        distributed.destroy_process_group()


def restarted() -> bool:
    """Whether torchrun started this process in the place of one that failed."""
    return _is_launched() and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def require_alone(what: str, instead: str) -> None:
    """Refuse to do in several processes what is meant for one.

    Raises:
        ValueError: torchrun started several; says what to do instead.
    """
    if (size := ranks().size) > 1:
        raise ValueError(f"{what}: expected one process, got {size} of torchrun; {instead}")


def is_sharded(batches: Any) -> bool:
    """Whether an iterable gives each rank batches of its own: a DataLoader with torch's DistributedSampler does."""
    sampler = getattr(batches, "sampler", None)
    return isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1
