"""How a model that is a module makes itself and its data known to Pyro."""

from __future__ import annotations

import itertools
import warnings
from weakref import WeakKeyDictionary

import pyro
import torch
from torch import Tensor, nn

__all__ = ["data_plate", "register"]

_names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_numbers = itertools.count()


def register(module: nn.Module) -> None:
    """Call ``pyro.module`` under a name that no other instance has or had, copies included.

    Two modules registered under one name would train the first one's parameters.
    """
    if module not in _names:
        _names[module] = f"{type(module).__name__.lower()}_{next(_numbers)}"
    with warnings.catch_warnings():
        if not all(parameter.requires_grad for parameter in module.parameters()):  # as is meant
            warnings.filterwarnings("ignore", message=".* was not registered in the param store because requires_")
        pyro.module(_names[module], module)


def data_plate(x: Tensor, num_data: int | None = None) -> pyro.plate:
    """The plate "data" of a minibatch x (M, ...) of so many data; of M, if their number is not known."""
    if num_data is None:
        return pyro.plate("data", len(x))
    return pyro.plate("data", num_data, subsample=torch.arange(len(x), device=x.device))
