"""Optimisers by name, and their state as tensors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from pyro_vae.arguments import one_of, positive_number

__all__ = ["OptimizerLike", "is_name", "load_state", "make_optimizer", "optimizer_name", "state_tensors"]

OptimizerLike = str | type[Optimizer] | Callable[[Sequence[Tensor]], Optimizer]

_BY_NAME: dict[str, type[Optimizer]] = {
    name.lower(): cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
}
_LEARNING_RATES = {"adagrad": 0.02}  # of the paper's grid {0.01, 0.02, 0.1}; elsewhere torch's own defaults
_NOT_PLAIN = object()
_REFUSED = {
    "lbfgs": "it evaluates the loss several times a step, on noise that must stay the same",
    "sparseadam": "it takes sparse gradients only",
}


def optimizer_name(optimizer: OptimizerLike) -> str:
    """The name under which a run records an optimiser, or what makes one, with the numbers that a partial fixes.

    Example:
        >>> optimizer_name(functools.partial(torch.optim.Adam, lr=0.1))
        'adam(lr=0.1)'
    """
    options: dict[str, Any] = {}
    while isinstance(optimizer, functools.partial):
        options = optimizer.keywords | options
        optimizer = optimizer.func  # its repr holds an address, which the next process does not share
    if isinstance(optimizer, str):
        return optimizer.lower()
    name = str(getattr(optimizer, "__name__", type(optimizer).__name__)).lower()
    plain = {key: plainly for key, value in options.items() if (plainly := _plain(value)) is not _NOT_PLAIN}
    return name + (f"({', '.join(f'{key}={plain[key]!r}' for key in sorted(plain))})" if plain else "")


def is_name(text: str) -> bool:
    """Whether there is an optimiser of that name in torch."""
    return text.lower() in _BY_NAME


def _plain(value: Any) -> Any:
    """A value as what has the same text in the next process, if it is a number, a text, or a list of them."""
    if isinstance(value, (Tensor, np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, (tuple, list, range)):
        parts = tuple(map(_plain, value))
        return _NOT_PLAIN if _NOT_PLAIN in parts else parts
    return value if value is None or isinstance(value, (bool, int, float, str)) else _NOT_PLAIN


def make_optimizer(
    optimizer: OptimizerLike, parameters: Sequence[Tensor], learning_rate: float | None = None
) -> Optimizer:
    """An optimiser of ``torch.optim`` over all parameters at once, in its fused form where torch has one.

    Args:
        optimizer: a name such as "adagrad" or "adam"; a class of ``torch.optim``; or a function of the parameters that
            returns an optimiser, which then knows its own learning rate.
        parameters: leaf tensors.
        learning_rate: None for 0.02 with Adagrad (the paper's grid: 0.01, 0.02, 0.1) and torch's default elsewhere.

    Returns:
        The optimiser.

    Raises:
        ValueError: an unknown name (the nearest is suggested), an optimiser that can't do stochastic steps, a learning
            rate that is not positive, or one given beside a function.
    """
    if learning_rate is not None:
        positive_number("learning_rate", learning_rate)
    name = optimizer_name(optimizer).partition("(")[0]
    if name in _REFUSED:
        raise ValueError(f"optimizer {name!r} cannot train by stochastic gradients: {_REFUSED[name]}")
    if isinstance(optimizer, str):
        one_of("optimizer", name, sorted(_BY_NAME))
        optimizer = _BY_NAME[name]
    expected = "optimizer: expected a name or class of torch.optim, or a function of the parameters that returns one"
    if not (issubclass(optimizer, Optimizer) if isinstance(optimizer, type) else callable(optimizer)):
        raise ValueError(f"{expected}, got {optimizer!r}")
    if not isinstance(optimizer, type):
        if learning_rate is not None:
            raise ValueError("learning_rate: expected None beside a function that makes the optimiser")
        made = optimizer(parameters)
        if not isinstance(made, Optimizer):
            raise ValueError(f"{expected}, got {optimizer!r}, which returned {made!r}")
        return made
    rate = learning_rate or _LEARNING_RATES.get(name)
    return _fused(optimizer, parameters, {} if rate is None else {"lr": rate})


def _fused(cls: type[Optimizer], parameters: Sequence[Tensor], options: dict[str, Any]) -> Optimizer:
    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)  # elsewhere a refusal may wait for a step
    with contextlib.suppress(TypeError, RuntimeError):  # not every optimiser has a fused form
        if on_cpu:
            return cls(parameters, **options, fused=True)  # type: ignore[call-arg]
    return cls(parameters, **options)


def state_tensors(optimizer: Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """The optimiser's state as tensors by parameter and name; plain numbers become scalar tensors.

    Args:
        optimizer: over parameters in the order of ``names``.
        names: names of its parameters.
    """
    return {
        f"{names[index]}/{key}": torch.as_tensor(value).clone()
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
        if value is not None
    }


def load_state(optimizer: Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`state_tensors` gave; groups (rates, momenta) stay as the optimiser was made."""
    state: dict[int, dict[str, Any]] = {}
    for index, name in enumerate(names):
        prefix = f"{name}/"
        own = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        if own:
            state[index] = own
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, own in state.items():  # torch has cast all of it to the parameter's type
        loaded = optimizer.state[parameters[index]]
        for key, value in own.items():
            loaded[key] = value.to(loaded[key].device, copy=True)
