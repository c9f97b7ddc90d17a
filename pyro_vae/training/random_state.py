"""The state of every random generator a training step may draw from, as tensors."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pyro_vae.numerics import seeded

__all__ = ["Stream", "capture", "restore"]

_PYTHON_WORDS = 625


def capture() -> dict[str, Tensor]:
    """State of torch's (CPU and CUDA), numpy's and Python's global generators."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - the global generator is meant
    state["numpy"] = torch.tensor([*map(int, keys), position, has_gauss], dtype=torch.int64)
    state["numpy_cached"] = torch.tensor([cached], dtype=torch.float64)
    version, words, gauss = random.getstate()
    state["python"] = torch.tensor([version, *words], dtype=torch.int64)
    state["python_gauss"] = torch.tensor([] if gauss is None else [gauss], dtype=torch.float64)
    return state


def restore(state: dict[str, Tensor]) -> None:
    """Put the generators back to a captured state."""
    torch.set_rng_state(state["torch"])
    for name, value in state.items():
        if name.startswith("cuda") and torch.cuda.is_available() and int(name[4:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(value, int(name[4:]))
    *keys, position, has_gauss = state["numpy"].tolist()
    cached = state["numpy_cached"].item()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))


class Stream:
    """Random numbers of its own, apart from those of the surrounding code: a state that is swapped in and out.

    Args:
        seed: where the stream starts.
    """

    def __init__(self, seed: int) -> None:
        with seeded(seed):
            self._state = capture()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Draw from this stream inside."""
        outside = capture()
        restore(self._state)
        try:
            yield
        finally:
            self._state = capture()
            restore(outside)
