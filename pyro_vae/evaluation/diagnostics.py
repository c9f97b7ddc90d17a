"""Whether importance weights can be trusted.

The Pareto shape k of the largest weights (Vehtari, Simpson, Gelman, Yao & Gabry, arXiv:1507.02646): an estimate is
reliable below 0.7, has infinite variance from 0.5 on, and no mean from 1 on. Computed by ArviZ.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["MIN_PARTICLES", "pareto_k"]

MIN_PARTICLES = 50


def pareto_k(log_w: Tensor) -> Tensor:
    """Shape k of the generalised Pareto distribution fitted to each datum's largest importance weights.

    Args:
        log_w: log weights, (K, M).

    Returns:
        Tensor (M,); NaN where there is no tail to fit: K < 50, weights that are all alike, or not finite ones.

    Example:
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> bool(pareto_k(torch.randn(1000, 1)) < 0.7)
        True
    """
    k = torch.full((log_w.shape[1],), math.nan, dtype=torch.float64)
    if len(log_w) < MIN_PARTICLES:
        return k
    wide = log_w.detach().double().cpu()
    tail = wide.topk(math.ceil(min(len(wide) / 5, 3 * math.sqrt(len(wide)))) + 1, dim=0).values
    fits = wide.isfinite().all(0) & (tail[0] - tail[-1] > 1e-9)
    if fits.any():
        with np.errstate(over="ignore"):  # in ArviZ's profile of the fit, where infinity is the right limit
            k[fits] = torch.from_numpy(_arviz_k()(wide[:, fits].T.contiguous().numpy()))
    return k


def _arviz_k() -> Callable[[Any], Any]:
    """ArviZ's fit for rows of log weights: 1.x has it in arviz-stats, for log *likelihoods*; 0.x for log weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # 0.23 announces 1.0 on import
        try:
            from arviz_stats.base import array_stats
        except ImportError:
            from arviz import psislw

            return lambda rows: np.atleast_1d(psislw(rows)[1])
    return lambda rows: np.atleast_1d(array_stats.psislw(-rows, axis=-1)[1])
