"""Wake-sleep and reweighted wake-sleep: theta and phi each follow a loss of their own.

    wake, theta      max  E_{z ~ q(z|x)} log p(x, z)             draws of q at the data, held fixed
    sleep, phi       max  E_{(x, z) ~ p} log q(z | x)            dreams: joint draws of the model, held fixed

That is wake-sleep (Hinton, Dayan, Frey & Neal, 1995). The wake phase ascends the lower bound in theta; the sleep
phase descends KL(p(z|x) || q(z|x)) under the *model's* x, the divergence's other direction: the two ascend no common
bound.

Reweighted wake-sleep (Bornschein & Bengio, arXiv:1406.2751; Le et al., arXiv:1805.10469) draws K particles per datum
and weighs them by w~_k = w_k / sum_j w_j, with w_k = p(x, z_k) / q(z_k | x), *of each datum by itself*:

    wake, theta      max  sum_k w~_k log p(x, z_k)               the gradient of IWAE's bound in theta
    wake, phi        max  sum_k w~_k log q(z_k | x)              descends KL(p(z|x) || q(z|x)) at the data
    sleep, phi       as above; ``insomnia`` a mixes the two: a wake + (1 - a) sleep

Wake-phi's gradient is self-normalised importance sampling: biased, consistent as K -> infinity. No draw needs a
reparameterised sample, so latents may be discrete. The two losses touch disjoint parameters, since what the other phase
would touch is held fixed; one backward pass serves both. Parameters that model and guide share (those of the model in a
ladder's top-down guide, those of the encoder in a VampPrior) are moved by both phases. What is logged is the bound at
the same draws: the lower bound for K = 1, IWAE's for K particles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_vae.objectives.base import value_with_gradient_of
from pyro_vae.objectives.importance import IWAE, fixed_draws
from pyro_vae.programs import dream, log_guide

__all__ = ["ReweightedWakeSleep", "WakeSleep"]


class ReweightedWakeSleep(IWAE):
    """Reweighted wake-sleep (Bornschein & Bengio, arXiv:1406.2751; Le et al., arXiv:1805.10469, Sec. 3).

    Args:
        num_particles: K per datum; at least 2 where the wake phase trains phi.
        insomnia: share of the wake phase in phi's loss, from 0 (sleep only) to 1 (wake only).

    Raises:
        ValueError: an argument is out of range; or, when used, an observed site has no argument of its name to hand a
            dream to the guide by, or the program has global latents.
    """

    reparameterized = False

    def __init__(self, num_particles: int = 10, insomnia: float = 1.0) -> None:
        super().__init__(num_particles)
        if not 0 <= insomnia <= 1:
            raise ValueError(f"insomnia: expected a number from 0 (sleep) to 1 (wake), got {insomnia!r}")
        if insomnia > 0 and num_particles < 2:
            raise ValueError(
                "num_particles: expected at least 2 where the wake phase trains the guide (insomnia > 0), for one "
                f"particle has weight 1 whatever it is; got {num_particles!r}"
            )
        self.insomnia = float(insomnia)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build this objective again."""
        return super().config | {"insomnia": self.insomnia}

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the bound with both phases' gradients, summed over the minibatch and scaled by N / M, in nats."""
        weights = fixed_draws(self, model, guide, args, kwargs)
        log_w = weights.log_w
        normalized = log_w.detach().softmax(0)  # per datum
        surrogate = (normalized * weights.log_joint).sum()
        if self.insomnia > 0:
            surrogate = surrogate + self.insomnia * (normalized * weights.log_q).sum()
        if self.insomnia < 1:
            surrogate = surrogate + (1 - self.insomnia) * _sleep(model, guide, args, kwargs)
        return -weights.scale * value_with_gradient_of(self._reduce(log_w).sum(), surrogate)


class WakeSleep(ReweightedWakeSleep):
    """Wake-sleep with one draw per datum (Hinton, Dayan, Frey & Neal, Science 268, 1995).

    Raises:
        ValueError: when used: as for :class:`ReweightedWakeSleep`.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.VAE((4,), 1, (3,))
        >>> loss = pv.WakeSleep().differentiable_loss(vae.model, vae.guide, torch.ones(5, 4))
    """

    def __init__(self) -> None:
        super().__init__(num_particles=1, insomnia=0.0)

    @property
    def config(self) -> dict[str, Any]:
        """No arguments."""
        return {}


def _sleep(model: Any, guide: Any, args: Any, kwargs: Any) -> Tensor:
    """Log density of a dream's latents under the guide at the dream's data, summed over the M data."""
    dreamt = dream(model, args, kwargs)
    densities = log_guide(model, guide, dreamt.args, dreamt.kwargs, dreamt.latents)
    return torch.stack([density.sum() for density in densities.values()]).sum()
