"""The paper's Appendix D: log p(x) from draws of the posterior and a density fitted to them.

    1 / p(x) = int q(z) dz / p(x) = int q(z) p(z | x) / p(x, z) dz = E_{z ~ p(z|x)} [ q(z) / p(x, z) ]

for any normalised density q whose support lies in the posterior's. So, in three steps: draw from the posterior by
Hamiltonian Monte Carlo; fit q to one half of the draws; average q(z) / p(x, z) over the other half.

Given exact draws the average is unbiased for 1 / p(x), and minus its logarithm above log p(x) on average; exact,
without variance, where q is the posterior. The variance is finite where q's tails are lighter than the posterior's.
The fit gets worse quickly with the dimension: the paper takes this estimator for "less than about 5 dimensions", and
more are refused here. One half of the *chains* goes to the fit and the other to the average, so that they are
independent; errors are the jackknife's over the chains.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.ops.stats import split_gelman_rubin
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_vae import hmc
from pyro_vae.arguments import probability, whole_number
from pyro_vae.compile import UNRECORDED, Recorder
from pyro_vae.evaluation.score import Estimate
from pyro_vae.numerics import log_mean_exp, summarize_weights
from pyro_vae.programs import LatentSpace, Program, guide_of

__all__ = ["DensityFit", "PosteriorDensity", "fit_gaussian"]

_MAX_DIM = 5
_APART = 3.0  # plainly; of thousands of data whose few draws do agree some reach 2.4 by chance

DensityFit = Callable[[Tensor], Callable[[Tensor], Tensor]]
"""Draws (L, M, J) of M posteriors -> a function of points (L, M, J) that gives M normalised log densities, (L, M)."""


def fit_gaussian(draws: Tensor) -> Callable[[Tensor], Tensor]:
    """A Gaussian of full covariance for each of M posteriors, by moments.

    Args:
        draws: (L, M, J), with L > J.

    Returns:
        Its log density: points (L, M, J) -> (L, M).
    """
    centred = draws - draws.mean(0)
    covariance = torch.einsum("lmi,lmj->mij", centred, centred) / (len(draws) - 1)
    jitter = torch.diag_embed(1e-6 * covariance.diagonal(dim1=-2, dim2=-1))  # of each dimension's own size
    return MultivariateNormal(draws.mean(0), covariance + jitter).log_prob


@dataclass(frozen=True)
class PosteriorDensity:
    """The marginal likelihood estimator of Kingma & Welling, arXiv:1312.6114, App. D: an upper bound on average.

    Args:
        num_particles: draws of the posterior that are averaged, per datum; as many more are fitted to.
        num_chains: chains for each of the two halves, at least 2.
        num_warmup: transitions of each of three phases that are thrown away: two adapt step sizes (a common one, and
            one per dimension), the last lets the chains forget that.
        num_leapfrog: leapfrog steps of a transition.
        target_accept: acceptance probability that step sizes are adapted to.
        density: what is fitted: a :data:`DensityFit`, :func:`fit_gaussian` by default. It is fitted in the space of
            unconstrained latents (:class:`pyro_vae.programs.LatentSpace`).

    Raises:
        ValueError: an argument is out of its range; or, when used: more than five latent dimensions, or a latent is
            discrete or outside the data plate (names the site).
    """

    num_particles: int = 1000
    num_chains: int = 10
    num_warmup: int = 50
    num_leapfrog: int = 10
    target_accept: float = 0.9
    density: DensityFit = fit_gaussian

    def __post_init__(self) -> None:
        for name, least in (("num_particles", 20), ("num_chains", 2), ("num_warmup", 2), ("num_leapfrog", 1)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        if self.num_particles % self.num_chains or self.num_particles < 4 * self.num_chains:
            raise ValueError(
                "num_particles: expected a multiple of num_chains, four times it or more; "
                f"got {self.num_particles} with {self.num_chains} chains"
            )
        probability("target_accept", self.target_accept)

    @property
    def at_once(self) -> int:
        """The chains of both halves move together."""
        return 2 * self.num_chains

    @property
    def passes(self) -> int:
        """The leapfrog steps of both halves' chains, and their warm-up's."""
        return (1 + 3 * self.num_warmup * self.num_chains // self.num_particles) * 2 * self.num_leapfrog

    def check(self, program: Program, args: Any, kwargs: Any) -> LatentSpace:
        """The latents to move in.

        Raises:
            ValueError: they are not what this estimator can work on.
        """
        space = LatentSpace(program.model, guide_of(program), args, kwargs)
        if space.dim > _MAX_DIM:
            raise ValueError(
                f'method "posterior-density" expects at most {_MAX_DIM} latent dimensions, for a density fitted in '
                f'more is no match for the posterior (arXiv:1312.6114, App. D); got {space.dim}: use method="ais"'
            )
        space.require_unmasked('method "posterior-density"')
        return space

    def __call__(
        self, program: Program, args: Any, kwargs: Any, rows_at_once: int, recorder: Recorder = UNRECORDED
    ) -> Estimate:
        """Estimate log p(x) of a minibatch."""
        space = self.check(program, args, kwargs)
        draw = space.draw_guide if program.has_guide else space.draw_prior
        draws, log_joint, acceptance = self._posterior(space, draw(2 * self.num_chains), recorder)
        _warn_of_disagreement(r_hat := split_gelman_rubin(draws, chain_dim=1, sample_dim=0).amax(-1))
        fitted = self.density(draws[:, : self.num_chains].flatten(0, 1))
        half = draws[:, self.num_chains :]
        log_q = fitted(half.flatten(0, 1)).reshape(half.shape[:-1])
        per_chain = log_mean_exp((log_q - log_joint[:, self.num_chains :]).double())  # log q - log p(x, z): (C, M)
        summary = summarize_weights([per_chain])
        diagnostics = {"ess": summary.ess, "acceptance": acceptance.double(), "r_hat": r_hat.double()}
        return Estimate(-summary.log_mean, summary.log_mean_variance, diagnostics)

    def _posterior(
        self, space: LatentSpace, start: Tensor, recorder: Recorder = UNRECORDED
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draws (S, 2 C, M, J), their log p(x, z), and the acceptance of each datum's chains, (M,)."""

        def density(u: Tensor, *tensors: Tensor) -> Tensor:
            return space.at(*tensors).log_density(u)

        recorded = recorder.differentiable((start.shape, *(t.shape for t in space.tensors)), density)

        def log_density(u: Tensor) -> Tensor:
            return recorded(u, *space.tensors)

        step_size, state = hmc.adapt_step_size(
            log_density,
            hmc.init(log_density, start),
            num_steps=self.num_warmup,
            num_leapfrog=self.num_leapfrog,
            target_accept=self.target_accept,
            diagonal=True,
        )
        visited = []
        for _ in range(self.num_warmup + self.num_particles // self.num_chains):
            state, info = hmc.step(
                log_density, state, step_size=step_size, num_leapfrog=self.num_leapfrog, jitter=hmc.JITTER
            )
            visited.append((state.position, state.log_density, info.acceptance))
        positions, log_joint, acceptance = (torch.stack(part[self.num_warmup :]) for part in zip(*visited, strict=True))
        return positions, log_joint, acceptance.mean((0, 1))


def _warn_of_disagreement(r_hat: Tensor) -> None:
    apart = ~(r_hat < _APART)  # not a number where chains never moved
    if apart.any():
        warnings.warn(
            f"Appendix D: the chains of {int(apart.sum())} of {len(r_hat)} data do not agree, with R-hat up to "
            f"{r_hat.max().item():.2f}; their estimates are not to be trusted. Take more num_warmup or num_particles",
            stacklevel=2,
        )
