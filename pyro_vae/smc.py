"""Particle filters, batched: K particles for each of M sequences, all moved at once.

A filter walks along p(x, z) = prod_t p(z_t | z_{t-1}) p(x_t | z_t). At a step t it moves particles z^k, and weights W_k
that sum to one over the K particles of a sequence, by

    resample, if 1 / sum_k W_k^2 < threshold K:    z_{t-1}^k <- z_{t-1}^{a_k},  a ~ W;   W <- 1 / K
    propose                                        z_t^k ~ q(z_t | z_{t-1}^k, x)
    weigh                                          w_k = p(z_t^k | z_{t-1}^k) p(x_t | z_t^k) / q(z_t^k | z_{t-1}^k, x)
    estimate                                       log p^(x) += log sum_k W_k w_k;    W_k <- W_k w_k / sum_j W_j w_j

(Gordon, Salmond & Smith 1993; Liu & Chen 1995; Doucet & Johansen 2009, Sec. 3.) Each sequence resamples when its own
effective sample size is low, and keeps its particles and the weights that they carry otherwise. Then E[p^(x)] = p(x)
for any K, proposal and threshold (Del Moral 2004, Thm. 7.4.2, of one that resamples at each step), as long as a
particle's expected number of copies is K W_k, which both schemes of resampling keep to. So log p^(x) is a lower bound
on log p(x) on average. Without resampling it is importance sampling, log 1/K sum_k w_k of whole paths.

Systematic resampling takes the quantiles (u + 0, ..., u + K - 1) / K of the weights with one uniform u; multinomial
resampling draws K times independently, with more variance (Douc, Cappe & Moulines, arXiv:cs/0507025, Sec. 2).

``init`` and ``step`` are pure: a state goes in, a state and what happened come out. No Python decides by a tensor's
value, so a filter can be recorded as a graph. Steps after the end of a sequence leave its particles, weights and
estimate as they are. Gradients flow through reparameterised draws, along the ancestry, and through the weights; that of
the probabilities of which ancestors were chosen is not part of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.arguments import one_of, share, whole_number
from pyro_vae.distributions import drawn_from, observed_log_prob
from pyro_vae.programs import SequenceLaws

__all__ = ["RESAMPLING", "FilterInfo", "FilterState", "Filtered", "init", "resample", "run", "step", "steps"]

RESAMPLING = ("systematic", "multinomial")

_FEW = 64  # particles


@dataclass(frozen=True, eq=False)
class FilterState:
    """Where the particles are.

    Attributes:
        particles: z_t, (K, M, J); at the end of a sequence its last ones.
        log_weights: log W of them, (K, M); W sums to one over K.
        log_evidence: log p^(x_1, ..., x_t), (M,), nats.
    """

    particles: Tensor
    log_weights: Tensor
    log_evidence: Tensor


@dataclass(frozen=True, eq=False)
class FilterInfo:
    """What a step did.

    Attributes:
        increment: what it added to ``log_evidence``, (M,), nats; 0 in the padding.
        ess: effective sample size 1 / sum_k W_k^2 after it, (M,), from 1 to K.
        resampled: whether a sequence's particles were resampled before they moved, (M,), bool.
        ancestors: which particle of the step before each came from, int64 (K, M); 0, ..., K - 1 without resampling.
    """

    increment: Tensor
    ess: Tensor
    resampled: Tensor
    ancestors: Tensor


def init(laws: SequenceLaws, num_particles: int) -> tuple[FilterState, FilterInfo]:
    """Draw z_1 and weigh it.

    Args:
        laws: of proposal, prior and emissions, and what is observed.
        num_particles: K, at least 1.

    Returns:
        The state and what happened.
    """
    shape = torch.Size((num_particles, *laws.x.shape[:-2]))
    proposal = _expanded(laws.proposal.initial, shape)
    z = drawn_from(proposal)
    log_w = _emitted(laws, z, 0) + _ratio(laws, laws.prior.initial, proposal, z)
    uniform = torch.full_like(log_w, -math.log(num_particles))
    start = FilterState(z, uniform, torch.zeros_like(log_w[0]))
    state, increment = _weighed(start, z, log_w)
    unmoved = torch.zeros(shape[1:], dtype=torch.bool, device=z.device)
    return state, FilterInfo(increment, _ess(state.log_weights), unmoved, _each(shape, z.device))


def step(
    laws: SequenceLaws,
    state: FilterState,
    t: int,
    *,
    threshold: float = 0.5,
    resampling: str = "systematic",
) -> tuple[FilterState, FilterInfo]:
    """Resample where it is due, draw z_t and weigh it.

    Args:
        laws: of proposal, prior and emissions, and what is observed.
        state: after the step before.
        t: the step, from 1 to T - 1, counted from 0.
        threshold: resample a sequence whose effective sample size is below this share of K, from 0 (never) to 1
            (always, unless its weights are equal).
        resampling: "systematic" or "multinomial".

    Returns:
        The new state and what happened.

    Example:
        >>> import pyro_vae as pv
        >>> from pyro_vae.programs import sequence_laws
        >>> dmm = pv.DeepMarkovModel(data_dim=3, latent_dim=2, transition_dim=4, emission_dim=4, rnn_dim=5)
        >>> laws = sequence_laws(dmm.model, dmm.guide, (torch.zeros(6, 7, 3),))
        >>> state, info = init(laws, num_particles=10)
        >>> state, info = step(laws, state, 1)
        >>> state.particles.shape, info.ess.shape
        (torch.Size([10, 6, 2]), torch.Size([6]))
    """
    shape, device = state.log_weights.shape, state.log_weights.device
    valid = None if laws.prior.valid is None else laws.prior.valid[..., t]
    before, log_weights = state.particles, state.log_weights
    resampled, ancestors = torch.zeros(shape[1:], dtype=torch.bool, device=device), _each(shape, device)
    if threshold > 0:
        resampled = _ess(log_weights.detach()) < threshold * len(log_weights)
        resampled = resampled if valid is None else resampled & valid
        ancestors = torch.where(resampled, resample(log_weights.detach(), resampling), ancestors)
        before = _taken(before, ancestors)
        log_weights = _made_equal(log_weights, resampled)
    proposal = _expanded(laws.proposal.step_law(before, t), shape)
    z = drawn_from(proposal)
    prior = proposal if _is_bootstrap(laws) else laws.prior.step_law(before, t)
    log_w = _emitted(laws, z, t) + _ratio(laws, prior, proposal, z)
    new, increment = _weighed(FilterState(before, log_weights, state.log_evidence), z, log_w)
    if valid is not None:
        new, increment = _where(valid, new, state), torch.where(valid, increment, 0.0)
    return new, FilterInfo(increment, _ess(new.log_weights), resampled, ancestors)


def steps(
    laws: SequenceLaws, num_particles: int, *, threshold: float = 0.5, resampling: str = "systematic"
) -> Iterator[tuple[FilterState, FilterInfo]]:
    """States and what happened, step by step, for t = 1, ..., T.

    Args:
        laws: of proposal, prior and emissions, and what is observed.
        num_particles: K, at least 1.
        threshold: as of :func:`step`.
        resampling: "systematic" or "multinomial".
    """
    state, info = init(laws, num_particles)
    yield state, info
    for t in range(1, laws.prior.num_steps):
        state, info = step(laws, state, t, threshold=threshold, resampling=resampling)
        yield state, info


@dataclass(frozen=True, eq=False)
class Filtered:
    """A filter's whole walk.

    Attributes:
        log_evidence: log p^(x), (M,), nats.
        particles: z_t, (T, K, M, J); in the padding the last ones.
        log_weights: log W of them, (T, K, M).
        ancestors: which particle of the step before each came from, int64 (T, K, M).
        ess: effective sample sizes, (T, M).
        resampled: which sequences were resampled before step t, bool (T, M).
        valid: which steps the sequences have, bool (M, T); None where they have all.
    """

    log_evidence: Tensor
    particles: Tensor
    log_weights: Tensor
    ancestors: Tensor
    ess: Tensor
    resampled: Tensor
    valid: Tensor | None = None

    @property
    def means(self) -> Tensor:
        """Estimates of E[z_t | x_1, ..., x_t], (M, T, J), if the proposal sees no later x; in the padding the last."""
        return (self.log_weights.exp()[..., None] * self.particles).sum(1).movedim(0, -2)

    @property
    def num_resamplings(self) -> Tensor:
        """How often each sequence was resampled, int64 (M,)."""
        return self.resampled.sum(0)

    def trajectories(self) -> Tensor:
        """The paths that lead to the last particles, (K, M, T, J), traced along their ancestors; 0 in the padding.

        With the last of ``log_weights`` they estimate the smoothing law p(z | x); after many resamplings few of them
        differ at early steps.
        """
        lineage, path = _each(self.ancestors.shape[1:], self.ancestors.device), []
        for particles, ancestors in zip(self.particles.flip(0), self.ancestors.flip(0), strict=True):
            path.append(_taken(particles, lineage))
            lineage = ancestors.gather(0, lineage)
        paths = torch.stack(path[::-1], -2)
        return paths if self.valid is None else torch.where(self.valid[..., None], paths, 0.0)


def run(laws: SequenceLaws, num_particles: int, *, threshold: float = 0.5, resampling: str = "systematic") -> Filtered:
    """Filter sequences, and keep everything.

    Args:
        laws: of proposal, prior and emissions, and what is observed.
        num_particles: K, at least 1.
        threshold: resample a sequence whose effective sample size is below this share of K, from 0 (never) to 1.
        resampling: "systematic" or "multinomial".

    Returns:
        Estimates of log p(x), particles, weights and ancestry.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import pyro_vae as pv
        >>> from pyro_vae.programs import sequence_laws
        >>> dmm = pv.DeepMarkovModel(data_dim=3, latent_dim=2, transition_dim=4, emission_dim=4, rnn_dim=5)
        >>> found = run(sequence_laws(dmm.model, None, (torch.zeros(6, 7, 3),)), num_particles=10)
        >>> found.log_evidence.shape, found.means.shape, found.trajectories().shape
        (torch.Size([6]), torch.Size([6, 7, 2]), torch.Size([10, 6, 7, 2]))
    """
    num_particles, threshold = whole_number("num_particles", num_particles), share("threshold", threshold)
    one_of("resampling", resampling, RESAMPLING)
    walk = list(steps(laws, num_particles, threshold=threshold, resampling=resampling))
    states, infos = [state for state, _ in walk], [info for _, info in walk]
    return Filtered(
        states[-1].log_evidence,
        torch.stack([state.particles for state in states]),
        torch.stack([state.log_weights for state in states]),
        torch.stack([info.ancestors for info in infos]),
        torch.stack([info.ess for info in infos]),
        torch.stack([info.resampled for info in infos]),
        laws.prior.valid,
    )


def resample(log_weights: Tensor, resampling: str = "systematic") -> Tensor:
    """Draw ancestors, of which particle k is expected K W_k times.

    Args:
        log_weights: log W, (K, M), of which W sums to one over K.
        resampling: "systematic" or "multinomial".

    Returns:
        Indices of particles, int64 (K, M); in ascending order if systematic.

    Example:
        >>> resample(torch.tensor([[0.5], [0.0], [0.25], [0.25]]).log()).flatten()
        tensor([0, 0, 2, 3])
    """
    K, M = log_weights.shape
    cumulative = log_weights.double().exp().cumsum(0)
    cumulative = cumulative / cumulative[-1]  # up to 1 exactly
    if resampling == "systematic":
        uniform = (torch.arange(K, device=cumulative.device)[:, None] + _uniform(1, M, cumulative)) / K
    else:
        uniform = _uniform(K, M, cumulative)
    return _first_above(cumulative, uniform.clamp(max=1 - 2**-53))


def _first_above(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """The first k with u < W_1 + ... + W_k, (K, M) of (K, M) each: one of weight 0 is never it."""
    if len(cumulative) <= _FEW:
        return (cumulative <= uniform[:, None]).sum(1)  # a search would be slower, and is not compiled
    return torch.searchsorted(cumulative.T.contiguous(), uniform.T.contiguous(), right=True).T


def _weighed(state: FilterState, z: Tensor, log_w: Tensor) -> tuple[FilterState, Tensor]:
    """The state with new particles and their incremental weights (K, M), and log sum_k W_k w_k, (M,)."""
    joint = state.log_weights + log_w
    increment = joint.logsumexp(0)
    possible = increment > -math.inf  # else every particle has density 0
    log_weights = torch.where(possible, joint - increment, -math.log(len(joint)))
    return FilterState(z, log_weights, state.log_evidence + increment), increment


def _made_equal(log_weights: Tensor, resampled: Tensor) -> Tensor:
    return torch.where(resampled, -math.log(len(log_weights)), log_weights)


def _where(valid: Tensor, new: FilterState, old: FilterState) -> FilterState:
    return FilterState(
        torch.where(valid[..., None], new.particles, old.particles),
        torch.where(valid, new.log_weights, old.log_weights),
        torch.where(valid, new.log_evidence, old.log_evidence),
    )


def _ratio(laws: SequenceLaws, prior: Any, proposal: Any, z: Tensor) -> Tensor | float:
    """Log p(z_t | z_{t-1}) - log q(z_t | z_{t-1}, x), (K, M)."""
    if _is_bootstrap(laws):
        return 0.0
    log_q = proposal.log_prob(z)  # at the very tensor that it drew: a flow keeps its inverse
    return prior.log_prob(z) - log_q  # type: ignore[no-any-return]


def _is_bootstrap(laws: SequenceLaws) -> bool:
    return laws.proposal is laws.prior


def _emitted(laws: SequenceLaws, z: Tensor, t: int) -> Tensor:
    """Log p(x_t | z_t), (K, M)."""
    emissions = laws.emissions
    law = emissions.law(z) if emissions.inputs is None else emissions.law(z, emissions.inputs[..., t, :])
    observed = None if emissions.observed is None else emissions.observed[..., t, :]
    return observed_log_prob(law, laws.x[..., t, :], observed)


def _expanded(law: Any, shape: torch.Size) -> Any:
    return law if law.batch_shape == shape else law.expand(shape)


def _uniform(K: int, M: int, like: Tensor) -> Tensor:
    return torch.rand(K, M, dtype=like.dtype, device=like.device)


def _each(shape: torch.Size, device: torch.device) -> Tensor:
    """0, ..., K - 1 for each sequence, (K, M)."""
    return torch.arange(shape[0], device=device)[:, None].expand(shape)


def _taken(particles: Tensor, ancestors: Tensor) -> Tensor:
    return particles.gather(0, ancestors[..., None].expand(particles.shape))


def _ess(log_weights: Tensor) -> Tensor:
    """1 / sum_k W_k^2, (M,), of weights that sum to one."""
    return (-(2 * log_weights).logsumexp(0)).exp()
