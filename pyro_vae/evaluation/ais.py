"""Annealed importance sampling: a sequence of laws from one that can be sampled to the posterior.

    log f_b(z) = (1 - b) log q(z | x) + b log p(x, z),      0 = b_0 < b_1 < ... < b_T = 1          from the guide
    log f_b(z) = log p(z) + b log p(x | z)                                                          from the prior

A chain starts at a draw of f_0; for t = 1 .. T its weight is multiplied by f_{b_t}(z) / f_{b_t-1}(z), and it moves by a
transition of Hamiltonian Monte Carlo that leaves f_{b_t} as it is. Then (Neal, arXiv:physics/9803008, eq. (11))

    E[w] = p(x),      so that log 1/K sum_k w_k is, in expectation, a lower bound on log p(x)

which is exact as the steps or the chains grow without limit; and for any schedule, without variance, where the guide
is the posterior. E[w] = p(x) holds for any transition kernels, *as long as they do not depend on the chains they
move*: step sizes are found in a pilot run with chains of its own, for each datum, step and dimension, and frozen.

Of latents theta that data share each chain is given a draw from the guide, which it keeps. So E[w] =
E_q(theta)[p(x | theta)], what the guide, as a posterior, predicts of each datum by itself.

Run backwards, with the same kernels, from an exact draw of the posterior, 1 / w is an unbiased estimate of 1 / p(x),
and -log 1/K sum_k 1/w_k an upper bound on average. There is such a draw for data simulated from the model: z of the
joint draw (z, x). Bidirectional Monte Carlo (Grosse, Ghahramani & Adams, arXiv:1511.02543) so holds the true value
between two bounds, and says how far off annealed importance sampling is on such data.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_vae import hmc
from pyro_vae.arguments import one_of, probability, whole_number
from pyro_vae.compile import UNRECORDED, Recorder
from pyro_vae.evaluation.bounds import frozen
from pyro_vae.evaluation.importance import chunk_sizes
from pyro_vae.evaluation.score import Estimate
from pyro_vae.inputs import batch_size_of, open_inputs
from pyro_vae.numerics import WeightSummary, mean_and_standard_error, summarize_weights
from pyro_vae.programs import HasModelAndGuide, LatentSpace, Program, as_program, dream, guide_of

__all__ = ["AIS", "Sandwich", "bidirectional"]

_COLLAPSED = 0.2
_MANY, _UNEVEN = 8, 1.5
_TUNING_RATE = 0.3


@dataclass(frozen=True)
class AIS:
    """Annealed importance sampling (Neal, arXiv:physics/9803008): a lower bound on log p(x) on average.

    Args:
        num_particles: K chains per datum.
        num_steps: T, the number of intermediate laws, the posterior among them; with T = 1 it is importance sampling.
        num_leapfrog: leapfrog steps of a transition.
        initial: begin at draws of the "guide", or of the "prior", which needs no guide.
        target_accept: acceptance probability that the pilot run tunes the step sizes to.
        num_pilot: chains per datum of the pilot run, at least 2.

    Raises:
        ValueError: an argument is out of its range; or, when used: a latent is discrete, or all lie outside the plate
            (names the site), or the guide's density at given latents is not known (``initial="prior"`` needs none).
    """

    num_particles: int = 16
    num_steps: int = 200
    num_leapfrog: int = 5
    initial: Literal["guide", "prior"] = "guide"
    target_accept: float = 0.8
    num_pilot: int = 16

    def __post_init__(self) -> None:
        for name, least in (("num_particles", 1), ("num_steps", 1), ("num_leapfrog", 1), ("num_pilot", 2)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        one_of("initial", self.initial, ("guide", "prior"))
        probability("target_accept", self.target_accept)

    @property
    def at_once(self) -> int:
        """The pilot run's chains move together."""
        return self.num_pilot

    @property
    def passes(self) -> int:
        """Each law's leapfrog steps, and the weights."""
        return self.num_steps * (self.num_leapfrog + 1)

    def check(self, program: Program, args: Any, kwargs: Any) -> None:
        """Evaluate the two ends of the path once.

        Raises:
            ValueError: latents are discrete, or the guide has no density to begin at.
        """
        path, draw = self._start(LatentSpace(program.model, guide_of(program), args, kwargs, hold_shared=True))
        path(draw(1))

    def __call__(
        self, program: Program, args: Any, kwargs: Any, rows_at_once: int, recorder: Recorder = UNRECORDED
    ) -> Estimate:
        """Estimate log p(x) of a minibatch."""
        space = LatentSpace(program.model, guide_of(program), args, kwargs, hold_shared=True)
        return self.estimate(
            space, chunk_sizes(self.num_particles, batch_size_of(args, kwargs), rows_at_once), recorder
        )

    def estimate(self, space: LatentSpace, counts: Iterable[int], recorder: Recorder = UNRECORDED) -> Estimate:
        """Estimate the log integral of a space's density by so many chains at a time."""
        annealing = self.prepare(space, recorder)
        runs = [annealing.forward(count) for count in counts]
        summary = summarize_weights([log_w for log_w, _ in runs])
        acceptance = torch.cat([accepted for _, accepted in runs]).mean(0)
        _warn_of_collapse(acceptance)
        _warn_of_uneven_weights(summary)
        diagnostics = {"ess": summary.ess, "acceptance": acceptance.double()}
        joint = summary.sum_variance if space.holds_shared else None
        return Estimate(summary.log_mean, summary.log_mean_variance, diagnostics, joint)

    def prepare(self, space: LatentSpace, recorder: Recorder = UNRECORDED) -> Annealing:
        """The laws between start and posterior, with step sizes from a pilot run."""
        betas = schedule(self.num_steps)
        _, draw = self._start(space)
        law = self._laws(space, recorder)
        return Annealing(law, draw, betas, self._pilot(law, draw(self.num_pilot), betas), self.num_leapfrog)

    def _laws(self, space: LatentSpace, recorder: Recorder) -> _Laws:
        """The law of each beta, recorded for all minibatches of the same shapes together."""

        def density(u: Tensor, beta: Tensor, *tensors: Tensor) -> Tensor:
            path, _ = self._start(space.at(*tensors))
            return _at(path, beta)(u)

        def law(beta: float) -> hmc.LogDensity:
            if beta == 0:
                return _at(self._start(space)[0], 0.0)
            return lambda u: recorded_for(u)(u, u.new_tensor(beta), *space.tensors)

        def recorded_for(u: Tensor) -> Callable[..., Tensor]:
            return recorder.differentiable((u.shape, *(t.shape for t in space.tensors)), density)

        return law

    def _start(self, space: LatentSpace) -> tuple[_Path, Callable[[int], Tensor]]:
        """The path to the posterior, and draws of where it begins."""
        if self.initial == "guide":
            return _from_guide(space), space.draw_guide
        return _from_prior(space), space.draw_prior

    def _pilot(self, law: _Laws, position: Tensor, betas: list[float]) -> list[Tensor]:
        """Step sizes (M, J) for each transition, by one annealing run of chains that are then thrown away.

        A dimension's is in proportion to the spread of the datum's chains; their common factor, the same for all
        dimensions, follows the acceptance.
        """
        factor, step_sizes = torch.full_like(position[0, :, :1], 0.5), []
        for beta in betas[1:-1]:
            step_sizes.append(factor * position.std(0).clamp_min(1e-6))
            target = law(beta)
            state = hmc.init(target, position)
            state, info = hmc.step(target, state, step_size=step_sizes[-1], num_leapfrog=self.num_leapfrog)
            accepted = info.acceptance.mean(0)[:, None]
            factor, position = hmc.tune_step_size(factor, accepted, self.target_accept, _TUNING_RATE), state.position
        return step_sizes


_Path = Callable[[Tensor], tuple[Tensor, Tensor]]
"""u (K, M, J) -> log f_0(u) and log f_1(u) - log f_0(u), each (K, M)."""


_Laws = Callable[[float], hmc.LogDensity]
"""beta -> log f_beta."""


def _from_guide(space: LatentSpace) -> _Path:
    def path(u: Tensor) -> tuple[Tensor, Tensor]:
        density = space.density(u)
        log_q = space.log_guide(density)
        return log_q, density.log_joint - log_q

    return path


def _from_prior(space: LatentSpace) -> _Path:
    def path(u: Tensor) -> tuple[Tensor, Tensor]:
        density = space.density(u)
        return density.log_prior + density.log_det, density.log_likelihood

    return path


def _at(path: _Path, beta: float | Tensor) -> hmc.LogDensity:
    def log_density(u: Tensor) -> Tensor:
        start, difference = path(u)
        if isinstance(beta, float) and beta == 0:
            return start  # 0 times an infinite difference is not a number
        return start + beta * difference

    return log_density


def schedule(num_steps: int) -> list[float]:
    """0 = b_0 < ... < b_T = 1, closer together at both ends: a sigmoid from -4 to 4 (Wu et al., arXiv:1611.04273)."""
    sigmoid = torch.linspace(-4, 4, num_steps + 1, dtype=torch.float64).sigmoid()
    betas: list[float] = ((sigmoid - sigmoid[0]) / (sigmoid[-1] - sigmoid[0])).tolist()
    return [*betas[:-1], 1.0]


@dataclass(frozen=True, eq=False)
class Annealing:
    """The laws f_b of a minibatch and the kernels that move between them.

    Attributes:
        law: the log density f_b of each b.
        draw: draws of f_0, (K, M, J).
        betas: b_0 .. b_T.
        step_sizes: (M, J) for each of b_1 .. b_T-1; the last law needs no transition, for nothing follows it.
        num_leapfrog: leapfrog steps of a transition.
    """

    law: _Laws
    draw: Callable[[int], Tensor]
    betas: list[float]
    step_sizes: list[Tensor]
    num_leapfrog: int

    def forward(self, num_particles: int) -> tuple[Tensor, Tensor]:
        """Log weights of K chains per datum, and their mean acceptance, each (K, M)."""
        return self._anneal(self.draw(num_particles), self.betas, self.step_sizes)

    def backward(self, posterior: Tensor) -> tuple[Tensor, Tensor]:
        """Log weights of chains from draws of the posterior (K, M, J) to the start, and their mean acceptance."""
        log_ratio, acceptance = self._anneal(posterior, self.betas[::-1], self.step_sizes[::-1])
        return -log_ratio, acceptance

    def _anneal(self, position: Tensor, betas: list[float], step_sizes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Sum over the laws, in this order, of log f_new(z) - log f_old(z), and the mean acceptance, each (K, M)."""
        state = hmc.init(self.law(betas[0]), position)
        log_ratio = torch.zeros_like(state.log_density, dtype=torch.float64)
        accepted = torch.zeros_like(state.log_density)
        for beta, step_size in zip(betas[1:], [*step_sizes, None], strict=True):
            target = self.law(beta)
            moved = hmc.init(target, state.position)
            log_ratio += _difference(moved, state)
            if step_size is not None:
                state, info = hmc.step(target, moved, step_size=step_size, num_leapfrog=self.num_leapfrog)
                accepted += info.acceptance
        return log_ratio, accepted / len(step_sizes) if step_sizes else torch.ones_like(accepted)


def _difference(new: hmc.HMCState, old: hmc.HMCState) -> Tensor:
    """The logarithm of a ratio of densities; 0 for 0 / 0, where the chain's weight is 0 already."""
    nowhere = (new.log_density == -math.inf) & (old.log_density == -math.inf)
    return torch.where(nowhere, 0.0, new.log_density - old.log_density)


def _warn_of_collapse(acceptance: Tensor) -> None:
    low = acceptance < _COLLAPSED
    if low.any():
        warnings.warn(
            f"annealed importance sampling: the chains of {int(low.sum())} of {len(acceptance)} data hardly move, with "
            f"a mean acceptance down to {acceptance.min().item():.3f}; their estimates are far below log p(x). Take "
            "more steps (num_steps) or a higher target_accept",
            stacklevel=2,
        )


def _warn_of_uneven_weights(summary: WeightSummary) -> None:
    if summary.num_particles >= _MANY and summary.ess.median() < _UNEVEN:
        warnings.warn(
            "annealed importance sampling: single chains carry the weights, with a median effective sample size of "
            f"{summary.ess.median().item():.2f} of {summary.num_particles}; such estimates are far below log p(x). "
            "Take more steps (num_steps)",
            stacklevel=2,
        )


@dataclass(frozen=True, eq=False)
class Sandwich:
    """Bidirectional Monte Carlo on simulated data: log p(x) between two bounds, each (N,), in nats.

    Attributes:
        lower: by annealed importance sampling, below log p(x) on average.
        upper: by its reverse, above log p(x) on average.
        lower_mc_error: Monte Carlo error of the mean of ``lower``, by the jackknife over chains.
        upper_mc_error: of ``upper``; its chains begin at one and the same exact draw, whose chance it does not hold.
        acceptance: mean acceptance of each datum's chains, forwards and backwards.
    """

    lower: Tensor
    upper: Tensor
    lower_mc_error: float
    upper_mc_error: float
    acceptance: Tensor

    @property
    def gap(self) -> float:
        """Mean over data of upper - lower, nats: at least what annealed importance sampling is off, on average."""
        return (self.upper - self.lower).mean().item()

    @property
    def gap_std_error(self) -> float:
        """Standard error of the gap over data, nats."""
        return mean_and_standard_error(self.upper - self.lower)[1]

    def __repr__(self) -> str:
        return (
            f"Sandwich({self.lower.mean().item():.3f} <= log p(x) <= {self.upper.mean().item():.3f} over "
            f"{len(self.lower)} simulated data: gap {self.gap:.3f} ± {self.gap_std_error:.3f} nats)"
        )


def bidirectional(
    program: HasModelAndGuide, x: Any, *, batch_size: int = 100, seed: int = 0, **options: Any
) -> Sandwich:
    """Hold log p(x) of data simulated from the model between two bounds (Grosse et al., arXiv:1511.02543).

    Args:
        program: an object with ``.model`` and ``.guide``, its latents continuous and in the data plate, whose observed
            sites have arguments of their names.
        x: as for :func:`pyro_vae.log_marginal`: their number, shapes and covariates are those of the simulated data;
            observed values are not looked at.
        batch_size: data at a time.
        seed: of the simulation and of the chains.
        **options: of :class:`AIS`.

    Returns:
        The two bounds of each simulated datum.

    Raises:
        ValueError: as for :class:`AIS`, or an observed site has no argument of its name.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.LinearGaussian(torch.ones(3, 1))
        >>> abs(bidirectional(model, torch.zeros(5, 3), num_steps=20, initial="prior").gap) < 1
        True
    """
    sampler, bridged = AIS(**options), as_program(program)
    inputs = open_inputs(bridged, x, split="test", batch_size=batch_size)
    with frozen(bridged, seed):
        parts = [
            _sandwich(sampler, bridged, *inputs.call(columns))
            for columns in inputs.tensors().in_order(whole_number("batch_size", batch_size))
        ]
    lower, lower_variance, upper, upper_variance, acceptance = (torch.cat(part) for part in zip(*parts, strict=True))
    _warn_of_collapse(acceptance)
    lower_error, upper_error = (math.sqrt(v.sum().item()) / len(lower) for v in (lower_variance, upper_variance))
    return Sandwich(lower, upper, lower_error, upper_error, acceptance)


def _sandwich(sampler: AIS, program: Program, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
    simulated = dream(program.model, args, kwargs)
    space = LatentSpace(program.model, guide_of(program), simulated.args, simulated.kwargs)
    annealing = sampler.prepare(space)
    exact = space.from_latents(simulated.latents).expand(sampler.num_particles, -1, -1)
    up, accepted = annealing.forward(sampler.num_particles)
    down, accepted_back = annealing.backward(exact)
    lower, upper = summarize_weights([up]), summarize_weights([-down])
    acceptance = torch.stack([accepted, accepted_back]).mean((0, 1))
    return lower.log_mean, lower.log_mean_variance, -upper.log_mean, upper.log_mean_variance, acceptance
