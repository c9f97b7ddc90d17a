"""Distributions over the levels of digital images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Categorical, constraints
from torch.nn.functional import logsigmoid

__all__ = ["DiscretizedLogisticMixture"]

_TOLERANCE = 1e-3  # of a step: well above single precision's rounding, and below what k / 256 is off, from k = 1 on


class _Levels(constraints.Constraint):
    """The numbers k / (L - 1), which say so where they are expected."""

    is_discrete = True

    def __init__(self, num_levels: int) -> None:
        self.highest = num_levels - 1

    def check(self, value: Tensor) -> Tensor:
        level = value * self.highest
        nearest = level.round().clamp(0, self.highest)
        return (level - nearest).abs() <= _TOLERANCE

    def __repr__(self) -> str:
        return f"levels k / {self.highest}, k = 0, ..., {self.highest}"


class DiscretizedLogisticMixture(TorchDistribution):  # type: ignore[misc]
    r"""A mixture of logistic laws on the levels 0, 1 / (L - 1), ..., 1, each level with the mass of what is nearest.

        p(x) = sum_k pi_k [ sigma((x + h - m_k) / s_k) - sigma((x - h - m_k) / s_k) ],    h = 1 / (2 (L - 1))

    At x = 0 the second term is 0, and at x = 1 the first is 1: the ends have the tails (Salimans et al.,
    arXiv:1701.05517, eq. (2), there in steps). The difference is taken as

        log [sigma(b) - sigma(a)] = log sigma(b) + log sigma(-a) + log(1 - exp(a - b)),

    in which nothing cancels: whatever the means, and for log scales from -20 to 20 and beyond, a log mass is exact but
    for rounding and its gradients are finite.

    Args:
        logits: unnormalised log weights of the K components, (..., K).
        loc: m, their means before rounding, (..., K), in the unit of x, which need not lie in [0, 1].
        log_scale: log s, of the same unit, (..., K). The three broadcast.
        num_levels: L, at least 2: 256 for images of 8 bits, which are divided by 255.
        validate_args: refuse values that are no levels.

    Raises:
        ValueError: ``logits``, ``loc`` or ``log_scale`` has no dimension of components, or ``num_levels`` is below 2;
            or (of ``log_prob``) values are not on the grid: the message names the first, its row (along the first
            dimension) and its place in it.

    Example:
        >>> pixel = DiscretizedLogisticMixture(torch.zeros(2), torch.tensor([0.2, 0.9]), torch.tensor([-3.0, -20.0]))
        >>> levels = torch.arange(256) / 255
        >>> round(float(pixel.log_prob(levels).exp().sum()), 5)
        1.0
        >>> pixel.support
        levels k / 255, k = 0, ..., 255
    """

    arg_constraints = {  # noqa: RUF012 - as torch has it
        "logits": constraints.real_vector,
        "loc": constraints.real_vector,
        "log_scale": constraints.real_vector,
    }

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        log_scale: Tensor,
        num_levels: int = 256,
        validate_args: bool | None = None,
    ) -> None:
        for name, parameter in {"logits": logits, "loc": loc, "log_scale": log_scale}.items():
            if parameter.ndim == 0:
                raise ValueError(f"{name}: expected a dimension of components, got a number")
        if num_levels < 2:
            raise ValueError(f"num_levels: expected at least 2, got {num_levels!r}")
        self.num_levels = num_levels
        self.logits, self.loc, self.log_scale = torch.broadcast_tensors(logits, loc, log_scale)
        super().__init__(self.logits.shape[:-1], validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The levels k / (L - 1)."""
        return _Levels(self.num_levels)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiscretizedLogisticMixture:
        """The same for a larger batch."""
        logits, loc, log_scale = (p.expand(*batch_shape, -1) for p in (self.logits, self.loc, self.log_scale))
        return type(self)(logits, loc, log_scale, self.num_levels, validate_args=self._validate_args)

    @property
    def mean(self) -> Tensor:
        """Expected value, (...): the sum over the edges between levels of the probability to be above."""
        above = self.logits.new_ones(())
        return self._sum_over_edges(lambda edge: (above, above)) / (self.num_levels - 1)

    @property
    def variance(self) -> Tensor:
        """Variance, (...): what the square of the distance to the mean grows by at each edge, if x is beyond it."""
        centre = self.mean * (self.num_levels - 1)
        nearest = centre.round()
        growth = self._sum_over_edges(lambda edge: ((edge - nearest).sign(), 2 * (edge - centre).abs()))
        return ((nearest - centre).square() + growth) / (self.num_levels - 1) ** 2

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass of levels, (...), in nats.

        Args:
            value: levels k / (L - 1), (...).
        """
        if self._validate_args:
            self._validate_sample(value)
        return self._log_mass((value * (self.num_levels - 1)).round())

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw levels, (*sample_shape, ...): from the logistic law of a component, to the nearest level."""
        highest, shape = self.num_levels - 1, torch.Size(sample_shape) + self.batch_shape
        component = Categorical(logits=self.logits, validate_args=False).sample(torch.Size(sample_shape))[..., None]
        loc, log_scale = (p.expand(*shape, -1).gather(-1, component)[..., 0] for p in (self.loc, self.log_scale))
        noise = torch.rand(shape, dtype=loc.dtype, device=loc.device).logit()
        drawn: Tensor = loc + log_scale.exp() * noise
        return (drawn * highest).round().clamp(0, highest) / highest

    def _log_mass(self, level: Tensor) -> Tensor:
        """Log mass of levels 0, ..., L - 1: counted in steps, in which their edges are the same number from both sides.

        At a scale far below a step, the rounding of x + h would leave gaps between neighbours that hold all the mass.
        """
        highest, k = self.num_levels - 1, level[..., None]
        loc, sharpness = self._in_steps()
        is_first, is_last = k <= 0, k >= highest
        below_upper_edge = logsigmoid((k + 0.5 - loc) * sharpness).masked_fill(is_last, 0.0)
        above_lower_edge = logsigmoid((loc - (k - 0.5)) * sharpness).masked_fill(is_first, 0.0)
        within = (-torch.expm1(-sharpness)).log().masked_fill(is_first | is_last, 0.0)
        log_mass = below_upper_edge + above_lower_edge + within
        mixed: Tensor = (self.logits.log_softmax(-1) + log_mass).logsumexp(-1)
        return mixed

    def _in_steps(self) -> tuple[Tensor, Tensor]:
        """Means, and the inverses of scales, counted in steps."""
        highest = self.num_levels - 1
        return self.loc * highest, (-self.log_scale).exp() / highest

    def _sum_over_edges(self, side_and_weight: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        """The sum over edges 1/2, 3/2, ... of a weight times the probability of one side (1 is above, -1 below).

        One edge after the other: all at once would be 255 times the image.
        """
        probs, (loc, sharpness) = self.logits.softmax(-1), self._in_steps()
        total = torch.zeros_like(loc[..., 0])
        for edge in 0.5 + torch.arange(self.num_levels - 1, dtype=loc.dtype, device=loc.device):
            side, weight = side_and_weight(edge)
            share = (side[..., None] * (loc - edge) * sharpness).sigmoid()
            total = total + weight * (probs * share).sum(-1)
        return total

    def _validate_sample(self, value: Tensor) -> None:
        bad = ~self.support.check(value)
        if bad.any():
            row, element = (index := bad.nonzero()[0].tolist())[:1], index[1:]
            place = (f" in row {row[0]}" if row else "") + (f", element {element}" if element else "")
            raise ValueError(
                f"expected {self.support}, got {value[bad][0].item():.4g}{place}; images of {self.num_levels} levels "
                f"are divided by {self.num_levels - 1}"
            )
