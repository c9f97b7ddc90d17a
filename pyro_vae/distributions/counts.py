"""Distributions over counts."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["WordCounts"]


class _Counts(type(constraints.nonnegative_integer)):  # type: ignore[misc]
    """Whole numbers from 0 on, which say so where they are expected."""

    def __repr__(self) -> str:
        return "counts, whole numbers of at least 0"


class WordCounts(TorchDistribution):  # type: ignore[misc]
    r"""Word counts of a document whose words are drawn one by one, with the density of the words in their order.

        log p(x) = sum_v x_v log p_v,        p = softmax(logits)

    A multinomial's density, of the counts whatever the order, is larger by log n! / prod_v x_v!, which does not depend
    on p. Perplexity is per word, and so without it: exp(-log p(x) / n).

    Args:
        logits: unnormalised log probabilities of the D words, (..., D).
        total_count: n, words of each document, of a shape that broadcasts with (...): what ``sample`` draws. The
            density is that of the words given their number, whatever it is.
        validate_args: refuse values that are no counts.

    Raises:
        ValueError: ``logits`` has no dimension, or (of ``log_prob``) counts are negative or not whole numbers: the
            message names the first such row.

    Example:
        >>> words = WordCounts(torch.tensor([0.5, 0.25, 0.25]).log(), total_count=4)
        >>> float(words.log_prob(torch.tensor([2.0, 1.0, 1.0])).exp())      # 0.5 * 0.5 * 0.25 * 0.25
        0.015625
        >>> float(words.sample().sum())
        4.0
    """

    arg_constraints = {"logits": constraints.real_vector}  # noqa: RUF012 - as torch has it
    support = constraints.independent(_Counts(0), 1)

    def __init__(self, logits: Tensor, total_count: Tensor | int = 1, validate_args: bool | None = None) -> None:
        if logits.ndim == 0:
            raise ValueError("logits: expected a dimension of words, got a number")
        count = torch.as_tensor(total_count, dtype=logits.dtype, device=logits.device)
        batch_shape = torch.broadcast_shapes(logits.shape[:-1], count.shape)
        self.logits = logits.expand(*batch_shape, -1)
        self.total_count = count.expand(batch_shape)
        super().__init__(batch_shape, logits.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> WordCounts:
        """The same for a larger batch."""
        shape = torch.Size(batch_shape)
        return type(self)(
            self.logits.expand(*shape, -1), self.total_count.expand(shape), validate_args=self._validate_args
        )

    @property
    def probs(self) -> Tensor:
        """Probabilities of the words, (..., D)."""
        return self.logits.softmax(-1)

    @property
    def mean(self) -> Tensor:
        """Expected counts, (..., D)."""
        return self.total_count[..., None] * self.probs

    @property
    def variance(self) -> Tensor:
        """Variances of the counts, (..., D)."""
        return self.mean * (1 - self.probs)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of the words of a document in their order, (...), in nats.

        Args:
            value: counts, (..., D).
        """
        if self._validate_args:
            self._validate_sample(value)
        log_density: Tensor = (value * self.logits.log_softmax(-1)).sum(-1)
        return log_density

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw counts that sum to ``total_count``, (*sample_shape, ..., D).

        The words are halved, and the count of a half is binomial given that of the whole: as many draws as there are
        words, in a number of operations that grows with their logarithm, and that no count decides on.
        """
        shape = torch.Size(sample_shape) + self.batch_shape
        sizes = [self.probs.expand(*shape, -1)]  # sums over halves, quarters, ... of the words, from the words up
        while sizes[-1].shape[-1] > 1:
            sizes.append(_pairs(sizes[-1]).sum(-1))
        counts: Tensor = self.total_count.expand(shape)[..., None]
        for level in reversed(sizes[:-1]):
            left, right = _pairs(level).unbind(-1)
            drawn = torch.binomial(counts, _share(left, right))
            counts = torch.stack([drawn, counts - drawn], -1).flatten(-2)[..., : level.shape[-1]]
        return counts

    def _validate_sample(self, value: Tensor) -> None:
        if not isinstance(value, Tensor) or value.shape[-1:] != self.event_shape:
            raise ValueError(f"expected counts of shape (..., {self.event_shape[0]}), got {tuple(value.shape)}")
        torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        bad = ~((value >= 0) & (value == value.floor()))
        if bad.any():
            *row, word = bad.nonzero()[0].tolist()
            place = f" in row {row[-1]}" if row else ""
            raise ValueError(
                f"expected counts, whole numbers of at least 0, got {value[bad][0].item():.4g}{place}, word {word}"
            )


def _pairs(values: Tensor) -> Tensor:
    """Neighbours side by side, (..., D) as (..., D / 2, 2), with a zero for the one that the last may lack."""
    padded = torch.nn.functional.pad(values, (0, values.shape[-1] % 2))
    return padded.reshape(*padded.shape[:-1], -1, 2)


def _share(left: Tensor, right: Tensor) -> Tensor:
    """Of the first of two probabilities in their sum; all of it where there is no second, none where there is no first.

    Where both are zero nothing is there to be shared.
    """
    return torch.where(right > 0, left / (left + right), (left > 0).to(left.dtype)).clamp(0, 1)
