"""Mixed precision: matrix products and convolutions in bfloat16, everything else as it is."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["PRECISIONS", "products_in"]

PRECISIONS = ("full", "bf16")

_PRODUCTS = {
    functional.linear,
    functional.bilinear,
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
    torch.addmm,
    torch.bmm,
    torch.baddbmm,
    torch.matmul,
    torch.mm,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
    Tensor.bmm,
    Tensor.mm,
}


def products_in(precision: str) -> contextlib.AbstractContextManager[Any]:
    """A context in which matrix products are taken in a precision.

    "bf16" rounds the factors of every matrix product and convolution to bfloat16 (8 bits of mantissa), in the forward
    and the backward pass, and returns the result in the factors' own type. Weights, gradients, optimiser state,
    densities and their sums stay as they are: a log density is a sum over hundreds of pixels, of which bfloat16 would
    keep two digits.

    Args:
        precision: "full" or "bf16".
    """
    return _HalfProducts() if precision == "bf16" else contextlib.nullcontext()


class _HalfProducts(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS:
            return func(*args, **kwargs)
        dtype = next((value.dtype for value in args if isinstance(value, Tensor)), None)
        if dtype not in (torch.float32, torch.float64):
            return func(*args, **kwargs)
        return func(*map(_half, args), **{name: _half(value) for name, value in kwargs.items()}).to(dtype)


def _half(value: Any) -> Any:
    return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value
