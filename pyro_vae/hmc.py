"""Hamiltonian Monte Carlo, batched: one chain per element of any batch shape, all moved at once.

A chain at z with momentum v ~ N(0, I) follows the Hamiltonian H = -log p(z) + |v|^2 / 2 by L leapfrog steps of size e,

    v += e/2 grad log p(z);   z += e v;   v += e/2 grad log p(z)

and accepts the end with probability min(1, exp(H_start - H_end)) (Duane et al., 1987; Neal, arXiv:1206.1901, Fig. 2).
The leapfrog map is reversible and preserves volume, so the law p is left invariant for any e and L, as long as e does
not depend on the chain's own state: step sizes are adapted in a pilot run (:func:`adapt_step_size`) and then left
alone. A step size per dimension is a diagonal mass matrix: e_j = e / sqrt(mass_j) with unit masses is the same map as e
with those masses (Neal, arXiv:1206.1901, Sec. 4.1).

Positions are real vectors: :class:`pyro_vae.programs.LatentSpace` maps the latents of any program to them, constrained
ones by Pyro's transforms, with the Jacobians in the density.

``init`` and ``step`` are pure: a state goes in, a state and what happened come out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pyro.ops.dual_averaging import DualAveraging
from pyro.ops.welford import WelfordCovariance
from torch import Tensor

__all__ = [
    "JITTER",
    "HMCInfo",
    "HMCState",
    "LogDensity",
    "adapt_step_size",
    "init",
    "leapfrog",
    "step",
    "tune_step_size",
]

JITTER = 0.5
"""A jitter that breaks orbits which close on themselves, for chains that must not come back to where they were."""

LogDensity = Callable[[Tensor], Tensor]
"""Positions (*batch, J) -> log densities (*batch), each of its own position only; need not be normalised."""


@dataclass(frozen=True, eq=False)
class HMCState:
    """Where the chains are.

    Attributes:
        position: z, (*batch, J).
        log_density: log p(z), (*batch).
        gradient: grad log p(z), (*batch, J).
    """

    position: Tensor
    log_density: Tensor
    gradient: Tensor


@dataclass(frozen=True, eq=False)
class HMCInfo:
    """What a step did.

    Attributes:
        accepted: whether the chain moved, (*batch), bool.
        acceptance: the probability with which it would, (*batch); 0 where the trajectory diverged.
        energy_error: H_end - H_start, (*batch), nats.
    """

    accepted: Tensor
    acceptance: Tensor
    energy_error: Tensor


def init(log_density: LogDensity, position: Tensor) -> HMCState:
    """Start chains at given positions.

    Args:
        log_density: of the target.
        position: (*batch, J).

    Returns:
        The state, without gradient history.

    Raises:
        ValueError: the log density has another shape than the batch, or torch is in inference mode.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("Hamiltonian Monte Carlo follows gradients, which torch.inference_mode() takes away: leave it")
    position = position.detach().requires_grad_()
    with torch.enable_grad():
        value = log_density(position)
        if value.shape != position.shape[:-1]:
            raise ValueError(
                f"log_density: expected one value per chain, shape {tuple(position.shape[:-1])} for positions "
                f"{tuple(position.shape)}; got {tuple(value.shape)}"
            )
        (gradient,) = torch.autograd.grad(value.sum(), position)
    return HMCState(position.detach(), value.detach(), gradient)


def leapfrog(
    log_density: LogDensity, state: HMCState, momentum: Tensor, step_size: Tensor | float, num_leapfrog: int
) -> tuple[HMCState, Tensor]:
    """Follow the Hamiltonian for L steps: reversible (negate the momentum), volume preserving.

    Args:
        log_density: of the target.
        state: where the chains are.
        momentum: (*batch, J).
        step_size: e > 0, a number or a tensor that broadcasts to (*batch, J).
        num_leapfrog: L, at least 1.

    Returns:
        The state and the momentum at the end.
    """
    for _ in range(num_leapfrog):
        momentum = momentum + 0.5 * step_size * state.gradient
        state = init(log_density, state.position + step_size * momentum)
        momentum = momentum + 0.5 * step_size * state.gradient
    return state, momentum


def step(
    log_density: LogDensity,
    state: HMCState,
    *,
    step_size: Tensor | float,
    num_leapfrog: int = 10,
    jitter: float = 0.0,
) -> tuple[HMCState, HMCInfo]:
    """One transition that leaves the target invariant (Neal, arXiv:1206.1901, Fig. 2).

    Args:
        log_density: of the target.
        state: from :func:`init`, or the step before.
        step_size: e > 0, a number or a tensor that broadcasts to (*batch, J), such as (*batch, 1).
        num_leapfrog: L, at least 1.
        jitter: j, in [0, 1): each chain's step size is multiplied by a draw from (1 - j, 1), anew at each step, so that
            no chain keeps coming back to where it was (Neal, arXiv:1206.1901, Sec. 3.2).

    Returns:
        The new state, and what happened.

    Example:
        >>> state = init(lambda z: -0.5 * z.square().sum(-1), torch.zeros(100, 2))
        >>> state, info = step(lambda z: -0.5 * z.square().sum(-1), state, step_size=0.3)
        >>> state.position.shape, info.accepted.shape
        (torch.Size([100, 2]), torch.Size([100]))
    """
    momentum = torch.randn_like(state.position)
    if jitter:
        step_size = step_size * (1 - jitter * torch.rand_like(state.log_density))[..., None]
    proposal, end = leapfrog(log_density, state, momentum, step_size, num_leapfrog)
    kinetic = 0.5 * (end.square() - momentum.square()).sum(-1)
    error = state.log_density - proposal.log_density + kinetic  # H_end - H_start
    acceptance = torch.nan_to_num((-error).exp().clamp(max=1.0), nan=0.0)
    accepted = torch.rand_like(acceptance) < acceptance
    return _where(accepted, proposal, state), HMCInfo(accepted, acceptance, error)


def _where(accepted: Tensor, new: HMCState, old: HMCState) -> HMCState:
    each = accepted[..., None]
    return HMCState(
        torch.where(each, new.position, old.position),
        torch.where(accepted, new.log_density, old.log_density),
        torch.where(each, new.gradient, old.gradient),
    )


def tune_step_size(step_size: Tensor, acceptance: Tensor, target_accept: float = 0.9, rate: float = 0.1) -> Tensor:
    """A step size moved towards the one that accepts at the wanted rate: log e += rate (acceptance - target).

    The paper's "automatically tuned stepsize such that the acceptance rate was 90%" (arXiv:1312.6114, Sec. 5): for
    chains whose target moves, as in Monte Carlo EM, where no pilot run stays true.

    Args:
        step_size: e > 0, any shape.
        acceptance: probabilities of acceptance, of the same shape, or their mean.
        target_accept: the wanted one, between 0 and 1.
        rate: how fast.

    Returns:
        The new step size.
    """
    return step_size * (rate * (acceptance - target_accept)).exp()


def adapt_step_size(
    log_density: LogDensity,
    state: HMCState,
    *,
    initial: float = 0.1,
    num_steps: int = 100,
    num_leapfrog: int = 10,
    target_accept: float = 0.9,
    diagonal: bool = False,
) -> tuple[Tensor, HMCState]:
    """A step size per chain at which it accepts at the wanted rate, by a pilot run.

    Dual averaging on log e (Nesterov 2009; Hoffman & Gelman, arXiv:1111.4246, eq. (6)), by Pyro. The run's positions
    are *not* draws of the target, for their step sizes depended on them.

    Args:
        log_density: of the target.
        state: where to begin.
        initial: step size to begin with.
        num_steps: transitions of the pilot run, at least 2; with ``diagonal``, of each of its two halves.
        num_leapfrog: L.
        target_accept: the wanted mean acceptance probability, between 0 and 1 (the paper's: 0.9).
        diagonal: give every dimension a step size of its own, in proportion to the standard deviation of the positions
            in a first run (a diagonal mass matrix), and adapt their common factor in a second one.

    Returns:
        Step sizes (*batch, 1), or (*batch, J) if ``diagonal``, and the state after the run.

    Raises:
        ValueError: an argument is out of its range.
    """
    if not (0 < target_accept < 1 and initial > 0 and num_steps >= 2 and num_leapfrog >= 1):
        raise ValueError(
            "expected 0 < target_accept < 1, initial > 0, num_steps >= 2 and num_leapfrog >= 1, "
            f"got {target_accept}, {initial}, {num_steps} and {num_leapfrog}"
        )
    run = functools.partial(_dual_averaging, log_density, num_steps, num_leapfrog, target_accept)
    common, spread, state = run(state, torch.ones_like(state.position[..., :1]), initial)
    if not diagonal:
        return common, state
    scale = spread / spread.log().mean(-1, keepdim=True).exp()
    common, _, state = run(state, scale, common.mean().item())
    return common * scale, state


def _dual_averaging(
    log_density: LogDensity,
    num_steps: int,
    num_leapfrog: int,
    target_accept: float,
    state: HMCState,
    scale: Tensor,
    initial: float,
) -> tuple[Tensor, Tensor, HMCState]:
    """The common factor (*batch, 1) of the step sizes, the spread of the positions (*batch, J), and the state."""
    # Pyro's averages are plain arithmetic, so that one object serves every chain.
    averaging, spread = DualAveraging(prox_center=math.log(10 * initial)), WelfordCovariance(diagonal=True)
    log_step = torch.full_like(state.log_density, math.log(initial))
    for turn in range(num_steps):
        step_size = log_step.exp()[..., None] * scale
        state, info = step(log_density, state, step_size=step_size, num_leapfrog=num_leapfrog)
        averaging.step(target_accept - info.acceptance)
        log_step, average = averaging.get_state()
        if turn >= min(num_steps // 2, num_steps - 2):  # the way to the target is no part of its spread
            spread.update(state.position)
    return average.exp()[..., None], spread.get_covariance().sqrt(), state
