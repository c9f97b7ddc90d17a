"""The log marginal likelihood by importance sampling, with the guide as proposal.

    p(x) = E_q[w],  w = p(x, z) / q(z | x);      log p(x) ~ log 1/K sum_k w_k,   z_k ~ q(z | x)

The mean weight is an unbiased estimate of p(x); its logarithm is, in expectation, a lower bound on log p(x) that rises
with K and is exact in the limit K -> infinity, or for any K, without variance, when the guide is the posterior (Burda
et al., arXiv:1509.00519, Thm. 1; Rezende et al., arXiv:1401.4082, App. E). It is trusted only where the weights are
even: hence the effective sample size beside every value, and Pareto k.

A guide that is narrower than the posterior gives weights without a bound. A *defensive* share a of the particles is
drawn from the prior instead, and all are weighed by the mixture (Hesterberg 1995; Owen & Zhou 2000),

    w = p(x, z) / ((1 - a) q(z | x) + a p(z))  <=  p(x | z) / a

which is unbiased too, and has finite variance wherever the likelihood is bounded.

Latents theta that data share are drawn from the guide with every particle, and not weighed. What is estimated is then
log E_q(theta)[p(x | theta)], the log density that the guide, as a posterior, predicts of each datum by itself.

Particles come in chunks of bounded memory, and are reduced as if they had come at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.arguments import whole_number
from pyro_vae.compile import UNRECORDED, Recorder
from pyro_vae.evaluation.diagnostics import pareto_k
from pyro_vae.evaluation.score import Estimate
from pyro_vae.inputs import batch_size_of
from pyro_vae.numerics import summarize_weights
from pyro_vae.programs import LogWeights, Program, draw_guide, draw_prior, latent_sites, log_weights

__all__ = ["ImportanceSampling"]


@dataclass(frozen=True)
class ImportanceSampling:
    """Importance sampling from the guide (Rezende et al., arXiv:1401.4082, App. E): a lower bound on average.

    Args:
        num_particles: K per datum.
        defensive: share of the particles that is drawn from the prior, in [0, 1); a share above 0 is at least one
            particle, and leaves the guide at least one.

    Raises:
        ValueError: an argument is out of its range.
    """

    num_particles: int = 5000
    defensive: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_particles", whole_number("num_particles", self.num_particles))
        if not 0 <= self.defensive < 1:
            raise ValueError(f"defensive: expected a share from 0 to below 1, got {self.defensive!r}")
        if self.defensive and self.num_particles < 2:
            raise ValueError(f"num_particles: expected at least 2 with a defensive share, got {self.num_particles}")

    @property
    def passes(self) -> int:
        """Once."""
        return 1

    def check(self, program: Program, args: Any, kwargs: Any) -> None:
        """A few draws, as they will be made.

        Raises:
            ValueError: the program has no guide.
        """
        few = ImportanceSampling(2, self.defensive)
        list(few._chunks(program, _shared(program, args, kwargs), args, kwargs, 2, UNRECORDED))

    @property
    def at_once(self) -> int:
        """Particles come one by one if need be."""
        return 1

    def __call__(
        self, program: Program, args: Any, kwargs: Any, rows_at_once: int, recorder: Recorder = UNRECORDED
    ) -> Estimate:
        """Estimate log p(x) of a minibatch."""
        shared = _shared(program, args, kwargs)
        log_w = list(self._chunks(program, shared, args, kwargs, rows_at_once, recorder))
        summary = summarize_weights(log_w)
        diagnostics = {"ess": summary.ess, "pareto_k": pareto_k(torch.cat(log_w)).to(summary.ess.device)}
        joint = summary.sum_variance if shared else None
        return Estimate(summary.log_mean, summary.log_mean_variance, diagnostics, joint)

    def _from_prior(self) -> int:
        """How many particles the prior draws."""
        share = round(self.num_particles * self.defensive)
        return min(max(share, 1), self.num_particles - 1) if self.defensive else 0

    def _chunks(
        self, program: Program, shared: frozenset[str], args: Any, kwargs: Any, rows: int, recorder: Recorder
    ) -> Iterator[Tensor]:
        """Log weights (K_i, M), so many particles at a time that K_i M stays within ``rows``."""
        size, names = batch_size_of(args, kwargs), tuple(kwargs)
        from_prior = self._from_prior()
        state = [*program.named_parameters().values(), *program.named_buffers().values()]
        for total, prior in ((self.num_particles - from_prior, False), (from_prior, True)):
            for count in chunk_sizes(total, size, rows):
                log_w = functools.partial(self._log_w, program, shared, names, count, prior)
                (chunk,) = recorder((names, count, prior), log_w, state)(*args, *kwargs.values())
                yield chunk

    def _log_w(
        self,
        program: Program,
        shared: frozenset[str],
        names: tuple[str, ...],
        count: int,
        prior: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor]:
        """Log weights (K_i, M) of draws of the prior or the guide, for the arguments whose last ones have names."""
        args = tensors[: len(tensors) - len(names)]
        kwargs = dict(zip(names, tensors[len(args) :], strict=True))
        draws = _prior_given_shared(program, shared, args, kwargs, count) if prior else None
        weights = log_weights(program.model, program.guide, args, kwargs, num_particles=count, latents=draws)
        if weights.entangled:
            raise ValueError(
                f"log p(x) per datum needs the guide's density of each datum's latents, but it draws "
                f"{weights.entangled} together with those of other data, as an automatic guide of all latents does: "
                "let it draw those outside the data plate alone (poutine.block), beside a guide of the others"
            )
        from_prior = self._from_prior()
        return (_defended(weights, from_prior / self.num_particles) if from_prior else weights.log_w,)


def chunk_sizes(num_particles: int, size: int, rows_at_once: int) -> Iterator[int]:
    """Numbers of particles that add up to K, each times ``size`` data within ``rows_at_once``, if one is."""
    most = max(1, rows_at_once // size)
    for start in range(0, num_particles, most):
        yield min(most, num_particles - start)


def _defended(weights: LogWeights, share: float) -> Tensor:
    log_prior = torch.stack([term for term in weights.log_prior.values() if term.ndim == 2]).sum(0)
    proposal = torch.logaddexp(math.log1p(-share) + weights.log_q, math.log(share) + log_prior)
    return weights.log_joint - proposal


def _prior_given_shared(
    program: Program, shared: frozenset[str], args: Any, kwargs: Any, count: int
) -> dict[str, Tensor]:
    """Draws of the data's latents from their prior, given draws from the guide of those that they share."""
    drawn = draw_guide(program.model, program.guide, args, kwargs, count) if shared else {}
    given = {name: value for name, value in drawn.items() if name in shared}
    return draw_prior(program.model, program.guide, args, kwargs, count, given)


def _shared(program: Program, args: Any, kwargs: Any) -> frozenset[str]:
    """Names of the latents outside the data plate."""
    sites = latent_sites(program.model, args, kwargs)
    return frozenset(name for name, site in sites.items() if site.axes is None)
