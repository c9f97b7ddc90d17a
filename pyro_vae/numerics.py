"""Arithmetic of log weights: means in log space, effective sample sizes, standard errors.

Everything here takes and returns tensors and knows nothing of models. ``log_w`` has its K particles on the leading
axis, as everywhere in the package.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["WeightSummary", "forked_rng", "log_mean_exp", "mean_and_standard_error", "summarize_weights"]


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
        num_particles: K, over all chunks.
    """

    log_mean: Tensor
    ess: Tensor
    num_particles: int

    @property
    def log_mean_variance(self) -> Tensor:
        """Monte Carlo variance of ``log_mean`` by the delta method, (K / ESS - 1) / K, shape (M,), nats squared.

        Not a number for K = 1, from which no variance can be told.
        """
        if self.num_particles == 1:
            return torch.full_like(self.ess, math.nan)
        return (1.0 / self.ess - 1.0 / self.num_particles).clamp_min(0.0)


def summarize_weights(chunks: Iterable[Tensor]) -> WeightSummary:
    """Reduce log weights that arrive in chunks of particles, exactly as if they had come at once.

    The mean over K particles is one log-sum-exp over *all* chunks minus log K. (A mean of chunk means is another
    number whenever the chunks differ in size.) Sums are taken in double precision.

    Args:
        chunks: tensors of shape (K_i, M); K is the sum of the K_i, which may differ.

    Returns:
        The log mean weight and the effective sample size per datum.

    Raises:
        ValueError: there is no chunk.

    Example:
        >>> log_w = torch.tensor([[0.0], [1.0], [2.0]])
        >>> whole, parts = summarize_weights([log_w]), summarize_weights([log_w[:2], log_w[2:]])
        >>> bool(torch.isclose(whole.log_mean, parts.log_mean).all())
        True
    """
    log_sums: list[tuple[Tensor, Tensor]] = []
    num_particles = 0
    for log_w in chunks:
        wide = log_w.double()
        log_sums.append((wide.logsumexp(0), (2 * wide).logsumexp(0)))
        num_particles += log_w.shape[0]
    if not log_sums:
        raise ValueError("expected at least one chunk of log weights, got none")
    log_sum, log_sum_squares = (torch.stack(part).logsumexp(0) for part in zip(*log_sums, strict=True))
    ess = (2 * log_sum - log_sum_squares).exp().clamp(1.0, num_particles)
    return WeightSummary(log_sum - math.log(num_particles), ess, num_particles)


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


@contextlib.contextmanager
def forked_rng() -> Iterator[None]:
    """Put torch's generators (of the CPU and of the current CUDA device, if in use) back on leaving."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield
