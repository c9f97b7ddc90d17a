"""State-space models: sequences of observations that a Markov chain of latents emits.

    p(x, z) = p(z_1) p(x_1 | z_1) prod_{t=2}^{T} p(z_t | z_{t-1}) p(x_t | z_t)
    q(z | x) = q(z_1 | x) prod_{t=2}^{T} q(z_t | z_{t-1}, x)                the posterior has this form too

Each of the two is one Pyro site: "z", a :class:`pyro_vae.distributions.MarkovSequence` of shape (T, J), and "x", its
:class:`pyro_vae.distributions.Emissions` of shape (T, D). A datum is a sequence.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_vae import smc
from pyro_vae.arguments import one_of, share, whole_number
from pyro_vae.distributions import Emissions, MarkovSequence, steps_within
from pyro_vae.models.registration import data_plate, register
from pyro_vae.programs import SequenceLaws, sequence_laws

__all__ = ["StateSpaceModel"]

_PARTICLES = 1000  # of a filter that proposes by the prior, if nobody says how many


class StateSpaceModel(nn.Module):
    """What every state-space model is: a law of z_1, ..., z_T, one of x_t given z_t, and q(z | x).

    A subclass gives :meth:`prior`, ``emission`` and :meth:`encode`; model, guide and draws follow.

    Attributes:
        emission: p(x_t | z_t), a module: of latents of any steps (..., J), and of the inputs u of those steps (..., U)
            if there are any, to a law of batch shape (...), event shape (D,).
    """

    emission: nn.Module

    @property
    def sees_gaps(self) -> bool:
        """Whether the guide is told which values were observed."""
        return getattr(self, "missing", True) is True

    @abstractmethod
    def prior(self, num_steps: int, lengths: Tensor | None = None, inputs: Tensor | None = None) -> MarkovSequence:
        """p(z), of event shape (T, J).

        Args:
            num_steps: T.
            lengths: steps of each sequence, (...), from 1 to T; None for T.
            inputs: exogenous inputs u, (..., T, U), of a model that has them.
        """

    @abstractmethod
    def encode(
        self, x: Tensor, lengths: Tensor | None = None, inputs: Tensor | None = None, mask: Tensor | None = None
    ) -> MarkovSequence:
        """q(z | x), of event shape (T, J).

        Args:
            x: observations, (M, T, D); zero where nothing was observed.
            lengths: steps of each sequence, (M,), from 1 to T; None for T.
            inputs: exogenous inputs u, (M, T, U).
            mask: True where x was observed, (M, T, D) or (M, T, 1); None where all was.
        """

    def model(
        self, x: Tensor, lengths: Tensor | None = None, inputs: Tensor | None = None, mask: Tensor | None = None
    ) -> None:
        """p(x, z) of a minibatch of sequences: Pyro sites "z" and "x" in the plate "data".

        Args:
            x: observations, (M, T, D).
            lengths: (M,); None for T.
            inputs: (M, T, U).
            mask: True where x was observed, (M, T, D), (M, T, 1) or (M, T).
        """
        register(self)
        with data_plate(x):
            z = pyro.sample("z", self.prior(x.shape[-2], lengths, inputs))
            pyro.sample("x", self.decode(z, lengths, inputs, of_elements(mask, x)), obs=x)

    def guide(
        self, x: Tensor, lengths: Tensor | None = None, inputs: Tensor | None = None, mask: Tensor | None = None
    ) -> None:
        """q(z | x) of a minibatch of sequences: Pyro site "z" in the plate "data".

        Args:
            x: observations, (M, T, D).
            lengths: (M,); None for T.
            inputs: (M, T, U).
            mask: True where x was observed, (M, T, D), (M, T, 1) or (M, T).
        """
        register(self)
        with data_plate(x):
            pyro.sample("z", self.encode(x, lengths, inputs, of_elements(mask, x)))

    def decode(
        self, z: Tensor, lengths: Tensor | None = None, inputs: Tensor | None = None, mask: Tensor | None = None
    ) -> Emissions:
        """p(x | z), of event shape (T, D).

        Args:
            z: latents, (..., T, J).
            lengths: (...); None for T.
            inputs: (..., T, U).
            mask: True where x is observed, (..., T, D) or (..., T, 1).
        """
        return Emissions(self.emission, z, inputs, lengths, mask)

    @torch.no_grad()
    def sample(self, n: int, num_steps: int, *, inputs: Tensor | None = None, mean: bool = False) -> Tensor:
        """Simulate the model: z from the prior, then x.

        Args:
            n: how many sequences.
            num_steps: T.
            inputs: exogenous inputs, (n, T, U) or (T, U).
            mean: give E[x | z] instead of a draw of x.

        Returns:
            Tensor (n, T, D).
        """
        z = self.prior(num_steps, inputs=inputs).expand((n,)).sample()
        emitted = self.decode(z, inputs=inputs)
        x: Tensor = emitted.mean if mean else emitted.sample()
        return x

    # What people do with it -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def filter(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        inputs: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        num_particles: int = 1000,
        threshold: float = 0.5,
    ) -> smc.Filtered:
        """Where z_t is, given x_1, ..., x_t, by a particle filter that proposes by the prior.

        Args:
            x: observations, (M, T, D).
            lengths: (M,); None for T.
            inputs: (M, T, U).
            mask: True where x was observed, (M, T, D), (M, T, 1) or (M, T).
            num_particles: K, at least 1.
            threshold: resample where the effective sample size is below this share of K.

        Returns:
            Particles and weights of every step, with ``means`` (M, T, J) and the log evidence, in nats.

        Raises:
            ValueError: an argument is out of its range, or of another shape.
        """
        num_particles, threshold = whole_number("num_particles", num_particles), share("threshold", threshold)
        laws = self._laws(*self._checked(x, lengths, inputs, mask), guided=False)
        return smc.run(laws, num_particles, threshold=threshold)

    def filter_online(
        self, num_sequences: int = 1, *, num_particles: int = 1000, threshold: float = 0.5
    ) -> OnlineFilter:
        """A particle filter of a stream, one observation at a time.

        Args:
            num_sequences: M, streams side by side.
            num_particles: K for each, at least 1.
            threshold: resample where the effective sample size is below this share of K.
        """
        return OnlineFilter(self, num_sequences, num_particles, threshold)

    @torch.no_grad()
    def smooth(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        inputs: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        num_samples: int = 100,
        num_particles: int | None = None,
        proposal: str | None = None,
    ) -> Tensor:
        """Paths of latents given all of x.

        Args:
            x: observations, (M, T, D).
            lengths: (M,); None for T.
            inputs: (M, T, U).
            mask: True where x was observed, (M, T, D), (M, T, 1) or (M, T).
            num_samples: S, at least 1.
            num_particles: None draws from the guide. A number K draws from the paths of a particle filter that proposes
                by ``proposal``: right in the limit of many whatever that is, but of few different early steps.
            proposal: "guide", or "prior", which needs no guide that was trained on such data, gaps among them; then
                ``num_particles`` is 1,000 if None. None: the guide, but the prior where x has gaps of which the guide
                is not told (``missing=False``).

        Returns:
            Draws (S, M, T, J), zero in the padding.

        Raises:
            ValueError: an argument is out of its range, or of another shape.
        """
        num_samples = whole_number("num_samples", num_samples)
        num_particles = None if num_particles is None else whole_number("num_particles", num_particles)
        given = x, lengths, inputs, mask = self._checked(x, lengths, inputs, mask)
        blind = mask is not None and not self.sees_gaps and not bool(mask.all())
        guided = one_of("proposal", proposal or ("prior" if blind else "guide"), ("guide", "prior")) == "guide"
        if guided and num_particles is None:
            q = self.encode(*given)
            return q.expand((num_samples, *q.batch_shape)).sample()
        found = smc.run(self._laws(*given, guided=guided), num_particles or _PARTICLES)
        return _chosen(found.trajectories(), found.log_weights[-1], num_samples)

    @torch.no_grad()
    def forecast(
        self,
        x: Tensor,
        num_steps: int,
        lengths: Tensor | None = None,
        inputs: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        future_inputs: Tensor | None = None,
        num_samples: int = 1000,
        num_particles: int = 1000,
    ) -> Tensor:
        """Observations to come: draws of x_{n+1}, ..., x_{n+H} given x_1, ..., x_n.

        z_n is drawn from the particles of a filter that proposes by the guide, and the model goes on from there.
        Quantiles over the draws are intervals: ``draws.quantile(torch.tensor([0.05, 0.95]), 0)``.

        Args:
            x: observations, (M, T, D).
            num_steps: H, at least 1.
            lengths: n of each sequence, (M,); None for T.
            inputs: (M, T, U).
            mask: True where x was observed, (M, T, D), (M, T, 1) or (M, T).
            future_inputs: of the steps to come, (M, H, U), of a model that has inputs.
            num_samples: S, at least 1.
            num_particles: K of the filter, at least 1.

        Returns:
            Draws (S, M, H, D).

        Raises:
            ValueError: an argument is out of its range, or of another shape.
        """
        num_steps, num_samples = whole_number("num_steps", num_steps), whole_number("num_samples", num_samples)
        num_particles = whole_number("num_particles", num_particles)
        given = x, lengths, inputs, _ = self._checked(x, lengths, inputs, mask)
        _require_future(inputs, future_inputs, len(x), num_steps)
        for state, _ in smc.steps(self._laws(*given, guided=True), num_particles):
            found = state
        z = _chosen(found.particles, found.log_weights, num_samples)
        return self._ahead(z, num_steps, future_inputs, _last_of(x, lengths))

    @torch.no_grad()
    def fill(
        self,
        x: Tensor,
        mask: Tensor,
        lengths: Tensor | None = None,
        inputs: Tensor | None = None,
        *,
        num_samples: int = 100,
        num_particles: int | None = None,
        proposal: str | None = None,
    ) -> Tensor:
        """Draws of what was not observed, given what was.

        Args:
            x: observations, (M, T, D); whatever is where the mask is False.
            mask: True where x was observed, (M, T, D), (M, T, 1) or (M, T).
            lengths: (M,); None for T.
            inputs: (M, T, U).
            num_samples: S, at least 1.
            num_particles: as of :meth:`smooth`.
            proposal: as of :meth:`smooth`.

        Returns:
            (S, M, T, D): x where it was observed, draws elsewhere, zero in the padding.

        Raises:
            ValueError: an argument is out of its range, or of another shape.
        """
        if mask is None:
            raise ValueError("mask: expected where x was observed, got None")
        how: dict[str, Any] = {"num_samples": num_samples, "num_particles": num_particles, "proposal": proposal}
        z = self.smooth(x, lengths, inputs, mask, **how)
        x, lengths, inputs, mask = self._checked(x, lengths, inputs, mask)
        filled = torch.where(mask, x, self.decode(z, lengths, inputs).sample())
        return filled if lengths is None else torch.where(steps_within(lengths, x.shape[1])[..., None], filled, 0.0)

    def _laws(self, x: Any, lengths: Any, inputs: Any, mask: Any, *, guided: bool) -> SequenceLaws:
        """What a particle filter walks along, proposing by the guide or by the prior."""
        return sequence_laws(self.model, self.guide if guided else None, (x, lengths, inputs, mask))

    def _ahead(self, z: Tensor, num_steps: int, inputs: Tensor | None, last: Tensor) -> Tensor:
        """Draws of x_{n+1}, ..., x_{n+H}, (S, M, H, D).

        Args:
            z: draws of z_n, (S, M, J).
            num_steps: H.
            inputs: u_{n+1}, ..., u_{n+H}, (M, H, U).
            last: x_n, (M, D), zero where it was not observed; given z_n, a Markov model does not read it.
        """
        transition = self.prior(num_steps, inputs=inputs).transition
        first = transition(z) if inputs is None else transition(z, inputs[:, 0])
        path = MarkovSequence(first, transition, num_steps, inputs).sample()
        return self.decode(path, inputs=inputs).sample()

    def _checked(self, x: Tensor, lengths: Any, inputs: Any, mask: Any) -> tuple[Tensor, Any, Any, Any]:
        """Arguments of shapes that fit: x with zeros where nothing was observed, and the mask as one of elements.

        Raises:
            ValueError: they do not.
        """
        D = getattr(self, "data_dim", None)
        if x.ndim != 3 or not x.numel() or D not in (None, x.shape[-1]):
            raise ValueError(f"x: expected shape (M, T, {D or 'D'}), got {tuple(x.shape)}")
        M, T, D = x.shape
        if lengths is not None and (lengths.shape != (M,) or bool(((lengths < 1) | (lengths > T)).any())):
            raise ValueError(f"lengths: expected shape ({M},), of steps from 1 to {T}, got {_described(lengths)}")
        if inputs is not None and (inputs.ndim != 3 or inputs.shape[:2] != (M, T)):
            raise ValueError(f"inputs: expected shape ({M}, {T}, U), got {tuple(inputs.shape)}")
        if mask is None:
            return x, lengths, inputs, mask
        if mask.dtype != torch.bool or mask.shape not in ((M, T), (M, T, 1), (M, T, D)):
            expected = f"({M}, {T}), ({M}, {T}, 1) or ({M}, {T}, {D})"
            raise ValueError(f"mask: expected booleans of shape {expected}, got {mask.dtype} of {tuple(mask.shape)}")
        mask = of_elements(mask, x)
        return torch.where(mask, x, 0.0), lengths, inputs, mask


class OnlineFilter:
    """A particle filter that is given observations as they come, and proposes by the prior.

    Args:
        model: a state-space model.
        num_sequences: M, streams side by side.
        num_particles: K for each.
        threshold: resample where the effective sample size is below this share of K.

    Attributes:
        state: particles (K, M, J), their log weights (K, M) and the log evidence so far (M,); None before the first
            observation.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.DeepMarkovModel(data_dim=3, latent_dim=2, transition_dim=4, emission_dim=4, rnn_dim=5)
        >>> stream = model.filter_online(num_particles=50)
        >>> for x_t in torch.zeros(4, 1, 3):
        ...     mean = stream.update(x_t)
        >>> mean.shape
        torch.Size([1, 2])
    """

    def __init__(
        self, model: StateSpaceModel, num_sequences: int = 1, num_particles: int = 1000, threshold: float = 0.5
    ) -> None:
        self.model, self.threshold = model, share("threshold", threshold)
        self.num_sequences = whole_number("num_sequences", num_sequences)
        self.num_particles = whole_number("num_particles", num_particles)
        self.state: smc.FilterState | None = None
        self._last: tuple[Tensor, Tensor | None, Tensor | None] | None = None

    @torch.no_grad()
    def update(self, x: Tensor, inputs: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Take the next observation.

        Args:
            x: x_t, (M, D).
            inputs: u_t, (M, U), of a model that has inputs.
            mask: True where it was observed, (M, D), or (M, 1); None where all of it was.

        Returns:
            E[z_t | x_1, ..., x_t], (M, J).

        Raises:
            ValueError: an argument is of another shape, or there are inputs at some steps and none at others.
        """
        seen = self._checked(x, inputs, mask)
        given = [_paired(*values) for values in zip(self._last or seen, seen, strict=True)]  # of the last step and this
        laws = self.model._laws(given[0], None, *given[1:], guided=False)
        if self.state is None:
            self.state, _ = smc.init(laws, self.num_particles)
        else:
            self.state, _ = smc.step(laws, self.state, 1, threshold=self.threshold)
        self._last = seen
        return (self.state.log_weights.exp()[..., None] * self.state.particles).sum(0)

    def _checked(
        self, x: Tensor, inputs: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        M, D = self.num_sequences, getattr(self.model, "data_dim", "D")
        if x.ndim != 2 or len(x) != M or D not in ("D", x.shape[1]):
            raise ValueError(f"x: expected shape ({M}, {D}), got {tuple(x.shape)}")
        if self._last is not None and _shape(inputs) != _shape(self._last[1]):
            raise ValueError(f"inputs: expected shape {_shape(self._last[1])}, as before, got {_shape(inputs)}")
        if inputs is not None and (inputs.ndim != 2 or len(inputs) != M):
            raise ValueError(f"inputs: expected shape ({M}, U), got {tuple(inputs.shape)}")
        if mask is None:
            return x, inputs, None
        if mask.dtype != torch.bool or mask.shape not in ((M, 1), tuple(x.shape)):
            expected = f"({M}, 1) or {tuple(x.shape)}"
            raise ValueError(f"mask: expected booleans of shape {expected}, got {mask.dtype} of {tuple(mask.shape)}")
        return torch.where(mask, x, 0.0), inputs, mask


def of_elements(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A mask of steps, (M, T), as one of all their elements, (M, T, 1)."""
    return mask if mask is None or mask.ndim == x.ndim else mask[..., None]


def _paired(before: Tensor | None, now: Tensor | None) -> Tensor | None:
    """Values (M, ·) of two steps, (M, 2, ·); where one is None, it is a mask of what was observed wholly."""
    known = now if before is None else before
    if known is None:
        return None
    whole = torch.ones_like(known, dtype=torch.bool)
    pair = torch.broadcast_tensors(whole if before is None else before, whole if now is None else now)
    return torch.stack(pair, 1)


def _chosen(values: Tensor, log_weights: Tensor, num_samples: int) -> Tensor:
    """Draws (S, M, ...) of values (K, M, ...), each with its weight."""
    drawn = torch.distributions.Categorical(logits=log_weights.T).sample((num_samples,))  # (S, M)
    return values[drawn, torch.arange(values.shape[1], device=values.device)]


def _last_of(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x_n of each sequence, (M, D)."""
    return x[:, -1] if lengths is None else x[torch.arange(len(x), device=x.device), lengths.long() - 1]


def _require_future(inputs: Tensor | None, future: Tensor | None, num_sequences: int, num_steps: int) -> None:
    if inputs is None:
        if future is not None:
            raise ValueError(f"future_inputs: expected None beside no inputs, got shape {tuple(future.shape)}")
        return
    expected = num_sequences, num_steps, inputs.shape[-1]
    if _shape(future) != expected:
        raise ValueError(f"future_inputs: expected shape {expected}, beside inputs, got {_shape(future)}")


def _shape(value: Tensor | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value.shape)


def _described(lengths: Tensor) -> str:
    return f"shape {tuple(lengths.shape)}, from {lengths.min().item()} to {lengths.max().item()}"
