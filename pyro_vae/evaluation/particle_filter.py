"""The log marginal likelihood of sequences by a particle filter.

    p^(x) = prod_t sum_k W_{t-1,k} w_{t,k},    w_{t,k} = p(z_t^k | z_{t-1}^k) p(x_t | z_t^k) / q(z_t^k | z_{t-1}^k, x)

Particles z^k move step by step (:mod:`pyro_vae.smc`), and are drawn again by their weights W where these have become
uneven. The estimate is unbiased, E[p^(x)] = p(x), for any K, proposal q and rule of resampling; its logarithm is, in
expectation, a lower bound on log p(x) that is exact as K -> infinity. Importance sampling of whole paths
(``method="importance"``) needs a number of particles that grows exponentially with the number of steps; a filter, where
the model forgets, one in proportion to it. The proposal is the guide's law of z_t given z_{t-1}, or the prior's (the
bootstrap filter, Gordon, Salmond & Smith 1993), which needs no guide.

Weights at a step know of x_1, ..., x_t alone. Where the guide is the posterior p(z_t | z_{t-1}, x_t, ..., x_T), which
looks ahead, they are uneven until the last step makes them equal: importance sampling is then exact without variance,
and so is the filter with ``threshold=0``, which is the same; one that resamples is not. Of two such scores of a model
the larger one is the nearer, as far as their errors tell.

One filter's particles are no independent draws, and tell the variance of their own estimate only badly. So R filters
run independently of each other, one after another, and

    log p^(x) = log 1/R sum_r p^_r(x)

is unbiased for p(x) as well, a tighter bound on average, with a variance that the jackknife over the R tells, as over
the particles of importance sampling. With R = 1 it is not known.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_vae import smc
from pyro_vae.arguments import one_of, share, whole_number
from pyro_vae.compile import UNRECORDED, Recorder
from pyro_vae.evaluation.score import Estimate
from pyro_vae.numerics import summarize_weights
from pyro_vae.programs import Program, sequence_laws

__all__ = ["ParticleFilter"]

_MANY = 10  # particles; of fewer, effective sample sizes below two say nothing


@dataclass(frozen=True)
class ParticleFilter:
    """A particle filter (Doucet & Johansen 2009, Sec. 4): unbiased for p(x), a lower bound on log p(x) on average.

    Where all but two of at least ten particles, or all but a hundredth of them, have lost their weight at some step, it
    warns, once.

    Args:
        num_particles: K per sequence, all in memory together.
        proposal: propose z_t by the "guide", or by the "prior", which needs no guide.
        resampling: "systematic" or "multinomial".
        threshold: resample where the effective sample size is below this share of K, from 0 (never) to 1 (always).
        num_repeats: R independent filters, whose estimates of p(x) are averaged; of one alone the Monte Carlo error
            is not known.

    Raises:
        ValueError: an argument is out of its range; or, when used: the program's latents are not one
            :class:`pyro_vae.distributions.MarkovSequence` in the data plate, observed through its
            :class:`pyro_vae.distributions.Emissions` (names the sites).

    Example:
        >>> import pyro_vae as pv
        >>> dmm = pv.DeepMarkovModel(data_dim=3, latent_dim=2, transition_dim=4, emission_dim=4, rnn_dim=5)
        >>> score = pv.log_marginal(dmm, torch.zeros(6, 7, 3), method="smc", num_particles=50, proposal="prior")
        >>> score.values.shape, sorted(score.diagnostics)
        (torch.Size([6]), ['ess', 'resamplings'])
    """

    num_particles: int = 1000
    proposal: Literal["guide", "prior"] = "guide"
    resampling: Literal["systematic", "multinomial"] = "systematic"
    threshold: float = 0.5
    num_repeats: int = 4
    _said: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("num_particles", "num_repeats"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        one_of("proposal", self.proposal, ("guide", "prior"))
        one_of("resampling", self.resampling, smc.RESAMPLING)
        object.__setattr__(self, "threshold", share("threshold", self.threshold))

    @property
    def passes(self) -> int:
        """Once for each filter."""
        return self.num_repeats

    @property
    def at_once(self) -> int:
        """All particles of a sequence."""
        return self.num_particles

    def check(self, program: Program, args: Any, kwargs: Any) -> None:
        """A filter of two particles.

        Raises:
            ValueError: the program is none of a Markov chain's latents and their emissions, or has no guide.
        """
        few = ParticleFilter(2, self.proposal, self.resampling, self.threshold)
        few._filter(program, args, kwargs)

    def __call__(
        self, program: Program, args: Any, kwargs: Any, rows_at_once: int, recorder: Recorder = UNRECORDED
    ) -> Estimate:
        """Estimate log p(x) of a minibatch of sequences.

        Nothing is recorded: that of T steps, one by one, takes longer than it saves.
        """
        runs = [self._filter(program, args, kwargs) for _ in range(self.num_repeats)]
        log_evidence, ess, resamplings = (torch.stack(parts) for parts in zip(*runs, strict=True))  # (R, ...)
        self._warn_of_collapse(ess.amin(0))
        summary = summarize_weights([log_evidence])
        diagnostics = {"ess": ess.amin((0, 1)).double(), "resamplings": resamplings.double().mean(0)}
        return Estimate(summary.log_mean, summary.log_mean_variance, diagnostics)

    def _filter(self, program: Program, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Of one filter log p^(x) (M,), effective sample sizes (T, M), and how often it resampled (M,)."""
        guide = program.guide if self.proposal == "guide" else None
        laws = sequence_laws(program.model, guide, args, kwargs)
        walk = smc.steps(laws, self.num_particles, threshold=self.threshold, resampling=self.resampling)
        infos = [(info.increment.double(), info.ess, info.resampled) for _, info in walk]
        increments, ess, resampled = (torch.stack(parts) for parts in zip(*infos, strict=True))
        return increments.sum(0), ess, resampled.sum(0)

    def _warn_of_collapse(self, ess: Tensor) -> None:
        """Say where the effective sample sizes (T, M) are least, if that is next to nothing."""
        least, place = ess.min().item(), int(ess.argmin())
        if self._said or self.num_particles < _MANY or least >= max(2.0, self.num_particles / 100):
            return
        step, row = divmod(place, ess.shape[1])
        low = (ess < max(2.0, self.num_particles / 100)).any(0)
        self._said.append(
            f"the particle filter degenerates for {int(low.sum())} of {len(low)} sequences of a minibatch, worst at "
            f"step {step + 1} of its row {row}: an effective sample size of {least:.2f} of {self.num_particles}; such "
            "estimates may be far below log p(x). Take more particles, or a better proposal"
        )
        warnings.warn(self._said[0], stacklevel=2)
