"""Stochastic gradient variational Bayes: the paper's two estimators of the evidence lower bound.

From log p(x) >= L(x) = E_q[log p(x, z) - log q(z | x)], with z = g(eps, x) a differentiable map of noise (eq. (4)) and
K draws of it (the paper's L):

    A, eq. (6):  1/K sum_k [ log p(x, z_k) - log q(z_k | x) ]
    B, eq. (7):  1/K sum_k   log p(x | z_k)   -   KL(q(z | x) || p(z))         the KL in closed form

Over a minibatch of M of N data both are scaled by N / M (eq. (8)), which Pyro's plate states. The value of either is an
unbiased estimate of the *lower bound*, for any K, and so low on average as an estimate of log p(x); it is exact, with
no variance (A), when the guide is the posterior. Gradients are those of the value: reparameterised ("pathwise"),
unbiased. Neither estimator has less variance than the other in general. A KL weight other than 1 (annealing) multiplies
log q - log p(z), or the KL, and gives up the bound. So do lambda free bits, in nats, of each latent site
(Kingma et al., arXiv:1606.04934, eq. (15)): the mean of its KL over the minibatch counts as lambda where it
is less, so that a layer of latents is not switched off before it can be of use.
"""

from __future__ import annotations

import functools
import operator
import warnings
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_vae.objectives.base import Objective
from pyro_vae.programs import LogWeights, log_weights

__all__ = ["SGVB"]


class SGVB(Objective):
    """The SGVB estimators of the evidence lower bound (Kingma & Welling, arXiv:1312.6114, eqs. (6) and (7)).

    With :func:`pyro_vae.fit` or ``pyro.infer.SVI`` it performs AEVB (Algorithm 1).

    Args:
        num_particles: K draws per datum (the paper's L), at least 1.
        estimator: "A" samples the KL term, eq. (6); "B" takes it in closed form, eq. (7), at the latent sites that
            admit it, and warns once of those that do not, which it samples.

    Attributes:
        kl_weight: scalar tensor, 1 by default; ``fit(kl_warmup=...)`` raises it from 0 to 1.
        free_bits: scalar tensor, 0 by default; ``fit(free_bits=...)`` sets it. Bounds that are evaluated have none.

    Raises:
        ValueError: an argument is out of range, or the guide draws a site that has no reparameterised sample.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.VAE(data_shape=(4,), latent_dim=1, hidden_dims=(3,))
        >>> pv.SGVB(num_particles=2, estimator="B").bound(vae.model, vae.guide, torch.ones(5, 4)).shape
        torch.Size([5])
    """

    def __init__(self, num_particles: int = 1, estimator: Literal["A", "B"] = "A") -> None:
        super().__init__(num_particles)
        if estimator not in ("A", "B"):
            raise ValueError(
                f'estimator: expected "A" (sampled KL, eq. (6)) or "B" (analytic, eq. (7)), got {estimator!r}'
            )
        self.estimator = estimator
        self.kl_weight, self.free_bits = torch.ones(()), torch.zeros(())
        self._told: set[str] = set()

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build this objective again."""
        return super().config | {"estimator": self.estimator}

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the bound, summed over the minibatch and scaled by N / M, in nats (eq. (8)).

        Args:
            model: Pyro function.
            guide: Pyro function of the same arguments.
            *args: the minibatch.
            **kwargs: the minibatch by name.

        Returns:
            Scalar, with gradients.
        """
        weights = self._log_weights(model, guide, args, kwargs, reparameterized=True)
        per_datum, shared = self._bounds(weights)
        lacking = sum((self.free_bits - kl.mean()).relu() for kl in weights.kl.values() if kl.ndim == 2)
        free = torch.where(
            self.free_bits > 0, self.kl_weight * len(per_datum) * lacking, 0.0
        )  # a sample may be below 0
        return -(weights.scale * (per_datum.sum() - free) + shared)

    def bound(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The lower bound of each datum, shape (M,), in nats; terms of global latents are shared out evenly over N.

        Its value needs no reparameterised draw, so that it can be evaluated for discrete latents too.
        """
        weights = self._log_weights(model, guide, args, kwargs, reparameterized=False)
        per_datum, shared = self._bounds(weights)
        return per_datum + shared / (weights.scale * len(per_datum))

    def predictive_bound(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """A lower bound on log E_q(theta)[p(x | theta)] of each datum, shape (M,), in nats, theta being what is global.

        Without global latents it is :meth:`bound`.
        """
        weights = self._log_weights(model, guide, args, kwargs, reparameterized=False)
        return self._bounds(weights)[0]

    def _log_weights(self, model: Any, guide: Any, args: Any, kwargs: Any, reparameterized: bool) -> LogWeights:
        analytic = self.estimator == "B"
        weights = log_weights(
            model,
            guide,
            args,
            kwargs,
            num_particles=self.num_particles,
            analytic_kl=analytic,
            reparameterized=reparameterized,
            per_datum=True,  # a bound is a sum over data
        )
        if analytic and (sampled := weights.log_guide.keys() - self._told):
            self._told |= sampled
            warnings.warn(f"estimator B: no analytic KL at sites {sorted(sampled)}, sampled there (A)", stacklevel=4)
        return weights

    def _bounds(self, weights: LogWeights) -> tuple[Tensor, Tensor | float]:
        """Mean over particles of the bound's terms: of each datum, (M,), and of the global latents, a scalar."""
        terms = [
            *weights.log_likelihood.values(),
            *(-self.kl_weight * kl for kl in weights.kl.values()),
        ]  # eqs. (6), (7)
        local = functools.reduce(operator.add, (term for term in terms if term.ndim == 2))
        shared = [term.mean(0) for term in terms if term.ndim == 1]
        return local.mean(0), functools.reduce(operator.add, shared) if shared else 0.0
