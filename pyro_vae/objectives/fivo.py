"""The filtering variational objective: the bound that a particle filter's estimate of p(x) makes, for sequences.

A particle filter with the guide as proposal (:mod:`pyro_vae.smc`) gives p^(x) with E[p^(x)] = p(x), whatever the number
K of particles and the rule of resampling. So by Jensen's inequality

    L_K = E log p^(x) <= log p(x),      log p^(x) = sum_t log sum_k W_{t-1,k} w_{t,k}

is a lower bound for each sequence, exact as K -> infinity (Maddison et al., arXiv:1705.09279, Sec. 3). Without
resampling, ``threshold=0``, it *is* IWAE's bound, and with K = 1 SGVB's. Where a model forgets what lies far behind,
the gap is about in proportion to T / K, where the K that IWAE needs, whose weights are those of whole paths, grows
exponentially with T. At T = 50, with the prior as guide of the linear-Gaussian model of ``tests/sequences.py``, whose
log p(x) is -203.0 nats on average over 20 draws of it (``python -m tests.sequences``; +- 0.1 to 0.7 and 0.8 to 1.8):

    K            4         16         64
    FIVO    -249.2     -211.3     -204.9
    IWAE    -416.9     -357.0     -324.9

At the exact posterior q(z_t | z_{t-1}, x_t, ..., x_T) it is exact for any K as long as nothing is resampled, and *not*
beyond: the weights at a step are those of x_1, ..., x_t alone,

    prod_{s<=t} w_s = p(x_1, ..., x_T) / p(x_{t+1}, ..., x_T | z_t),

which become equal at the last step only. A filter that resamples by them throws away particles that were right. So of
guides that look ahead, IWAE's bound may be the better one; FIVO is for guides of z_{t-1} and x_1, ..., x_t, and for
those that are far off.

The gradient is that of log p^(x) through the reparameterised draws, with the ancestors held fixed:

    grad L_K = E[ grad log p^(x)  +  sum_t log p^(x_t, ... | x_1, ..., x_{t-1}) grad log Pr(ancestors at t) ]

of which the second term, whose variance swamps the first, is dropped (Maddison et al., Sec. 4; Naesseth et al.,
arXiv:1705.11140; Le et al., arXiv:1705.10306). So the gradient is *biased*, for model and guide, wherever something is
resampled; the value is not.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from pyro_vae import smc
from pyro_vae.arguments import one_of, share
from pyro_vae.objectives.base import Objective
from pyro_vae.programs import SequenceLaws, sequence_laws

__all__ = ["FIVO"]

_RECORDED = 40  # steps, of which each takes half a second to record: of a deep Markov model, some 360 operations


class FIVO(Objective):
    """The filtering variational objective of sequences (Maddison et al., arXiv:1705.09279, Algorithm 1).

        L_K = E log p^(x) <= log p(x),      p^(x) by a particle filter that proposes by the guide

    The value is unbiased for L_K. The gradient is biased: the term of the resampling probabilities is dropped.
    :func:`pyro_vae.fit` records its step where sequences are at most 40 steps long, and runs it eagerly beyond.

    Args:
        num_particles: K, at least 1; K = 1 is SGVB's estimator A.
        threshold: resample a sequence's particles where their effective sample size is below this share of K, from 0
            (never: IWAE) to 1 (always, unless all weights are equal).
        resampling: "systematic" or "multinomial".

    Raises:
        ValueError: an argument is out of its range; or, when used: the program's latents are not one
            :class:`pyro_vae.distributions.MarkovSequence` in the data plate, observed through its
            :class:`pyro_vae.distributions.Emissions` (names the sites), or the guide has no reparameterised draws.

    Example:
        >>> import torch, pyro_vae as pv
        >>> dmm = pv.DeepMarkovModel(data_dim=3, latent_dim=2, transition_dim=4, emission_dim=4, rnn_dim=5)
        >>> x, lengths = torch.ones(6, 7, 3), torch.tensor([7, 3, 1, 2, 7, 5])
        >>> pv.FIVO(num_particles=8).bound(dmm.model, dmm.guide, x, lengths).shape
        torch.Size([6])
    """

    def __init__(
        self,
        num_particles: int = 4,
        threshold: float = 0.5,
        resampling: Literal["systematic", "multinomial"] = "systematic",
    ) -> None:
        super().__init__(num_particles)
        self.threshold = share("threshold", threshold)
        self.resampling = one_of("resampling", resampling, smc.RESAMPLING)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build this objective again."""
        return super().config | {"threshold": self.threshold, "resampling": self.resampling}

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the bound, summed over the minibatch and scaled by N / M, in nats; its gradient is biased."""
        laws = sequence_laws(model, guide, args, kwargs)
        return -laws.scale * self._log_evidence(laws).sum()

    def bound(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The bound of each sequence, shape (M,), in nats."""
        return self._log_evidence(sequence_laws(model, guide, args, kwargs))

    def _log_evidence(self, laws: SequenceLaws) -> Tensor:
        if not laws.proposal.has_rsample:
            raise ValueError(
                "the guide's sequence is drawn from laws without reparameterised samples, so that the draws have no "
                "gradient: expected laws such as Normal, or ReweightedWakeSleep, which needs none"
            )
        num_steps = laws.prior.num_steps
        if num_steps > _RECORDED and get_proxy_mode() is not None:
            raise ValueError(f"a filter of {num_steps} steps would take minutes to record (limit {_RECORDED})")
        walk = smc.steps(laws, self.num_particles, threshold=self.threshold, resampling=self.resampling)
        for state, _ in walk:  # arXiv:1705.09279, Algorithm 1
            log_evidence = state.log_evidence
        return log_evidence
