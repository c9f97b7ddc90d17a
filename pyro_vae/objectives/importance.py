"""Importance-weighted objectives: tighter bounds from K particles per datum, and better gradients of them.

With log w_k = log p(x, z_k) - log q(z_k | x), z_k ~ q, and normalised weights w~_k = w_k / sum_j w_j, per datum:

    IWAE    L_K   = E log 1/K sum_k w_k                          L_1 <= L_5 <= L_50 <= log p(x), exact as K -> infinity
    Renyi   L_a   = E 1/(1 - a) log 1/K sum_k w_k^(1 - a)        a = 0 is IWAE; a -> -infinity is max_k log w_k (VR-max)

Both are exact, without variance, when the guide is the posterior. For K < infinity the Renyi value with a < 0 may lie
above log p(x); between 0 and 1 it lies between the lower bound and IWAE's. The gradient of either through
reparameterised draws is that of the value: unbiased for the expectation above. Its signal-to-noise ratio for phi falls
with K (Rainforth et al., arXiv:1802.04537), for

    grad_phi log 1/K sum_k w_k = sum_k w~_k d(log w_k)/dphi

contains the score of q, whose mean is not zero under the weights. DReG removes that term: reparameterising it once more
(Tucker et al., arXiv:1810.04152, eq. (8)) leaves

    grad_phi = sum_k w~_k^2  d(log w_k)/dz_k  dz_k/dphi,        unbiased for the same expectation, zero at the posterior

and STL (Roeder et al., arXiv:1703.09194), w~_k in the place of w~_k^2, is biased for K > 1. theta's gradient is IWAE's.

VIMCO (Mnih & Rezende, arXiv:1602.06725) is for draws without reparameterisation:

    grad L_K = sum_k (L - L_-k) grad log q(z_k | x)  +  sum_k w~_k grad log w_k,

where L_-k has the geometric mean of the other weights in the place of w_k: a baseline that needs no learning. Unbiased.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_vae.numerics import log_mean_exp
from pyro_vae.objectives.base import Objective, value_with_gradient_of
from pyro_vae.programs import LogWeights, log_weights, same_minibatch

__all__ = ["IWAE", "VIMCO", "DReG", "Renyi"]


class IWAE(Objective):
    """The importance-weighted bound (Burda, Grosse & Salakhutdinov, arXiv:1509.00519, eqs. (8) and (13)).

    Args:
        num_particles: K, at least 1; K = 1 is SGVB's estimator A.

    Raises:
        ValueError: ``num_particles`` is out of range; or, when used: the program has global latents, whose weights are
            the data set's and not a datum's, or the guide draws a site that has no reparameterised sample.

    Example:
        >>> import torch, pyro_vae as pv
        >>> model = pv.LinearGaussian(torch.ones(3, 1), guide_widening=2.0)
        >>> x = torch.zeros(1000, 3)
        >>> a, b = (pv.IWAE(k).bound(model.model, model.guide, x).mean() for k in (1, 50))
        >>> bool(a < b)
        True
    """

    reparameterized = True

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the bound, summed over the minibatch and scaled by N / M, in nats."""
        weights = self._weights(model, guide, args, kwargs)
        return -weights.scale * self._reduce(weights.log_w).sum()

    def bound(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The bound of each datum, shape (M,), in nats."""
        return self._reduce(self._weights(model, guide, args, kwargs).log_w)

    def _weights(self, model: Any, guide: Any, args: Any, kwargs: Any) -> LogWeights:
        weights = log_weights(
            model, guide, args, kwargs, num_particles=self.num_particles, reparameterized=self.reparameterized
        )
        require_local(self, weights)
        return weights

    def _reduce(self, log_w: Tensor) -> Tensor:
        return log_mean_exp(log_w)  # arXiv:1509.00519, eq. (8)


class Renyi(IWAE):
    """The variational Renyi bound (Li & Turner, arXiv:1602.02311, eq. (8)).

    Args:
        alpha: below 1. 0 is IWAE; towards 1 it becomes the lower bound (SGVB); -infinity is VR-max, the largest weight.
        num_particles: K, at least 1.

    Raises:
        ValueError: alpha is not below 1, or as for :class:`IWAE`.
    """

    def __init__(self, alpha: float = 0.5, num_particles: int = 10) -> None:
        super().__init__(num_particles)
        if not alpha < 1:
            raise ValueError(f"alpha: expected a number below 1 (at 1 the bound is SGVB's), got {alpha!r}")
        self.alpha = float(alpha)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build this objective again."""
        return {"alpha": self.alpha} | super().config

    def _reduce(self, log_w: Tensor) -> Tensor:
        if self.alpha == -math.inf:
            return log_w.max(0).values
        return log_mean_exp((1 - self.alpha) * log_w) / (1 - self.alpha)  # arXiv:1602.02311, eq. (8)


class DReG(IWAE):
    """IWAE's bound with the doubly reparameterised gradient for phi (Tucker et al., arXiv:1810.04152, eq. (8)).

    Args:
        num_particles: K, at least 1.
        gradient: "dreg", or "stl" to weigh the path derivatives by w~ instead of w~^2 (arXiv:1703.09194): less
            variance, and for K > 1 a bias.

    Raises:
        ValueError: ``gradient`` is neither, or as for :class:`IWAE`.
    """

    def __init__(self, num_particles: int = 10, gradient: Literal["dreg", "stl"] = "dreg") -> None:
        super().__init__(num_particles)
        if gradient not in ("dreg", "stl"):
            raise ValueError(f'gradient: expected "dreg" or "stl", got {gradient!r}')
        self.gradient = gradient

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build this objective again."""
        return super().config | {"gradient": self.gradient}

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Minus IWAE's bound with the gradient of DReG, summed over the minibatch and scaled by N / M, in nats."""
        with same_minibatch(), torch.enable_grad():
            draws = self._weights(model, guide, args, kwargs).latents
            leaves = {name: z.detach().requires_grad_() for name, z in draws.items()}
            weights = log_weights(model, guide, args, kwargs, num_particles=self.num_particles, latents=leaves)
            log_w = weights.log_w
            normalized = log_w.detach().softmax(0)
            squared = normalized**2 if self.gradient == "dreg" else normalized
            # phi fixed; a datum's log weight depends on its own draws alone, whatever the order of their plates
            slopes = torch.autograd.grad((squared * log_w).sum(), list(leaves.values()), retain_graph=True)
        theta = (normalized * weights.log_joint).sum()
        phi = sum((slope * z).sum() for slope, z in zip(slopes, draws.values(), strict=True))
        return -weights.scale * value_with_gradient_of(self._reduce(log_w).sum(), theta + phi)


class VIMCO(IWAE):
    """IWAE's bound for draws without reparameterisation, such as discrete ones (Mnih & Rezende, arXiv:1602.06725).

    Args:
        num_particles: K, at least 2: the baseline of a particle is made of the others.

    Raises:
        ValueError: ``num_particles`` is below 2, or the program has global latents.
    """

    reparameterized = False

    def __init__(self, num_particles: int = 5) -> None:
        super().__init__(num_particles)
        if num_particles < 2:
            raise ValueError(f"num_particles: VIMCO expects at least 2, got {num_particles!r}")

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Minus IWAE's bound with the gradient of VIMCO, summed over the minibatch and scaled by N / M, in nats."""
        weights = fixed_draws(self, model, guide, args, kwargs)
        log_w = weights.log_w
        bound = self._reduce(log_w)
        advantage = (bound - _leave_one_out(log_w)).detach()  # arXiv:1602.06725, eq. (6)
        score = (advantage * weights.log_q).sum()
        return -weights.scale * value_with_gradient_of(bound.sum(), score + bound.sum())


def _leave_one_out(log_w: Tensor) -> Tensor:
    """The bound with each log weight replaced by the mean of the others, (K, M)."""
    count = len(log_w)
    own = torch.eye(count, dtype=torch.bool, device=log_w.device)[..., None]
    others = log_w[None].masked_fill(own, 0.0).sum(1) / (count - 1)  # not a difference of sums: a weight may be 0
    replaced = torch.where(own, others, log_w[None])
    return log_mean_exp(replaced, 1)  # axes: left out, particle, datum


def fixed_draws(objective: Objective, model: Any, guide: Any, args: Any, kwargs: Any) -> LogWeights:
    """Log weights of draws that are held fixed: gradients are those of the densities at them."""
    weights = log_weights(model, guide, args, kwargs, num_particles=objective.num_particles, fixed=True)
    require_local(objective, weights)
    return weights


def require_local(objective: Objective, weights: LogWeights) -> None:
    """Refuse global latents: a datum's weights are not defined where another datum's draw is shared.

    Raises:
        ValueError: there are sites outside the data plate; names them.
    """
    if weights.global_sites:
        raise ValueError(
            f"{type(objective).__name__} weighs each datum's particles by themselves, but sites {weights.global_sites} "
            "lie outside the data plate, shared by all data: use SGVB, whose bound is a sum over data and globals"
        )
