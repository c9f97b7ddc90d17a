"""Arithmetic of log weights: means in log space, effective sample sizes, standard errors.

Everything here takes and returns tensors and knows nothing of models. ``log_w`` has its K particles on the leading
axis, as everywhere in the package.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "WeightSummary",
    "forked_rng",
    "log_mean_exp",
    "mean_and_standard_error",
    "ratio_and_standard_error",
    "seeded",
    "summarize_weights",
]


def log_mean_exp(log_w: Tensor, dim: int = 0) -> Tensor:
    """Logarithm of the mean of ``exp(log_w)`` over one dimension, without overflow.

    Args:
        log_w: logarithms, any shape.
        dim: the dimension to average over.

    Returns:
        Tensor of the same shape without ``dim``.

    Example:
        >>> log_mean_exp(torch.tensor([1000.0, 1000.0]))
        tensor(1000.)
    """
    return log_w.logsumexp(dim) - math.log(log_w.shape[dim])


@dataclass(frozen=True, eq=False)
class WeightSummary:
    """What K importance weights per datum say, whatever the chunks they came in.

    Attributes:
        log_mean: log (1/K) sum_k w_k, shape (M,), nats.
        ess: effective sample size (sum w)^2 / sum w^2, shape (M,), between 1 and K.
        log_mean_variance: Monte Carlo variance of ``log_mean`` by the jackknife, shape (M,), nats squared; not a number
            for K = 1. (The delta method's (K / ESS - 1) / K never exceeds 1, however uneven the weights: where one
            weight carries the sum, leaving it out tells how far off the estimate may be.)
        num_particles: K, over all chunks.
        sum_variance: the same of the sum of ``log_mean`` over data whose k-th weights are not independent, a scalar.
    """

    log_mean: Tensor
    ess: Tensor
    log_mean_variance: Tensor
    num_particles: int
    sum_variance: Tensor


def summarize_weights(chunks: Iterable[Tensor]) -> WeightSummary:
    """Reduce log weights that arrive in chunks of particles, exactly as if they had come at once.

    The mean over K particles is one log-sum-exp over *all* chunks minus log K. (A mean of chunk means is another
    number whenever the chunks differ in size.) Sums are taken in double precision.

    Args:
        chunks: tensors of shape (K_i, M); K is the sum of the K_i, which may differ.

    Returns:
        The log mean weight, its variance and the effective sample size per datum.

    Raises:
        ValueError: there is no chunk.

    Example:
        >>> log_w = torch.tensor([[0.0], [1.0], [2.0]])
        >>> whole, parts = summarize_weights([log_w]), summarize_weights([log_w[:2], log_w[2:]])
        >>> bool(torch.isclose(whole.log_mean, parts.log_mean).all())
        True
    """
    wide = [log_w.double() for log_w in chunks]
    if not wide:
        raise ValueError("expected at least one chunk of log weights, got none")
    count = sum(len(log_w) for log_w in wide)
    log_sum = _log_sum(log_w.logsumexp(0) for log_w in wide)
    log_sum_squares = _log_sum((2 * log_w).logsumexp(0) for log_w in wide)
    ess = (2 * log_sum - log_sum_squares).exp().clamp(1.0, count)
    shifts = _shifts(wide, log_sum)
    variance, of_sum = (_jackknife_variance(parts, count) for parts in (shifts, [s.sum(1, True) for s in shifts]))
    return WeightSummary(log_sum - math.log(count), ess, variance, count, of_sum.sum())


def _log_sum(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).logsumexp(0)


def _shifts(chunks: list[Tensor], log_sum: Tensor) -> list[Tensor]:
    """How the log mean changes where a particle is left out, but for a constant: log(1 - w~_k), (K_i, M) each."""
    return [torch.log1p(-(log_w - log_sum).exp().clamp(max=1 - 2**-53)) for log_w in chunks]


def _jackknife_variance(shifts: list[Tensor], count: int) -> Tensor:
    """(K - 1) / K sum_k (t_k - mean t)^2 of the estimates t_k without particle k (Efron & Stein 1981)."""
    if count == 1:
        return torch.full_like(shifts[0][0], math.nan)
    mean = sum(shift.sum(0) for shift in shifts) / count
    squares = sum(((shift - mean) ** 2).sum(0) for shift in shifts)
    return torch.as_tensor((count - 1) / count * squares)


def mean_and_standard_error(values: Tensor) -> tuple[float, float]:
    """Mean of independent values and its standard error, s / sqrt(N) with the unbiased s.

    Args:
        values: shape (N,).

    Returns:
        The mean and its standard error (not a number when N = 1), in the unit of ``values``.

    Example:
        >>> mean_and_standard_error(torch.tensor([1.0, 3.0]))
        (2.0, 1.0)
    """
    values = values.double()
    spread = values.std().item() if len(values) > 1 else math.nan
    return values.mean().item(), spread / math.sqrt(len(values))


def ratio_and_standard_error(values: Tensor, counts: Tensor) -> tuple[float, float]:
    """Sum of values over sum of counts, of independent pairs (v_n, c_n), and its standard error by the delta method.

        R = sum_n v_n / sum_n c_n,    se^2 = 1 / (N mean(c)^2)  sum_n (v_n - R c_n)^2 / (N - 1)

    Args:
        values: shape (N,).
        counts: shape (N,), above 0: how much each value is the sum of. Where all are c, it is the mean over c.

    Returns:
        The ratio and its standard error (not a number when N = 1), in the unit of ``values`` per count.

    Example:
        >>> ratio_and_standard_error(torch.tensor([-2.0, -10.0]), torch.tensor([1, 3]))
        (-3.0, 0.5)
    """
    values, counts = values.double(), counts.to(values.device).double()
    ratio = values.sum() / counts.sum()
    spread = (values - ratio * counts).square().sum().sqrt().item() if len(values) > 1 else math.nan
    error = spread / math.sqrt(max(1, len(values) - 1) * len(values)) / counts.mean().item()
    return ratio.item(), error


@contextlib.contextmanager
def forked_rng() -> Iterator[None]:
    """Put the global generators back on leaving: numpy's, Python's, torch's of the CPU and of a CUDA device in use."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 - the global generator is meant
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators (torch's, numpy's and Python's), and put them back as they were on leaving."""
    with forked_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the global generator is meant
        random.seed(seed)
        yield
