"""Mixed precision: matrix products and convolutions in bfloat16, everything else as it is."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

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
    torch.baddbmm,
    torch.bmm,
    torch.einsum,
    torch.matmul,
    torch.mm,
    torch.mv,
    torch.tensordot,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
    Tensor.addmm,
    Tensor.baddbmm,
    Tensor.bmm,
    Tensor.matmul,
    Tensor.mm,
    Tensor.mv,
}


def products_in(precision: str) -> contextlib.AbstractContextManager[Any]:
    """A context in which matrix products are taken in a precision.

    "bf16" rounds the factors of matrix products and convolutions (not those inside recurrent layers, which are one
    operation of torch's) to bfloat16 (8 bits of mantissa), in the forward
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
        if func not in _PRODUCTS or "out" in kwargs:
            return func(*args, **kwargs)
        dtypes = {value.dtype for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
            return func(*args, **kwargs)
        args, kwargs = tree_map(_half, (args, kwargs))
        return func(*args, **kwargs).to(dtypes.pop())


def _half(value: Any) -> Any:
    return value.to(torch.bfloat16) if isinstance(value, Tensor) else value
