"""How a model that is a module makes itself known to Pyro."""

from __future__ import annotations

import itertools
from weakref import WeakKeyDictionary

import pyro
from torch import nn

__all__ = ["register"]

_names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_numbers = itertools.count()


def register(module: nn.Module) -> None:
    """Call ``pyro.module`` under a name that no other instance has or had, copies included.

    Two modules registered under one name would train the first one's parameters.
    """
    if module not in _names:
        _names[module] = f"{type(module).__name__.lower()}_{next(_numbers)}"
    pyro.module(_names[module], module)
