"""Distributions of sequences: a Markov chain as one value, and what it emits."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import MaskedDistribution, TorchDistribution
from torch import Tensor, nn
from torch.distributions import (
    Independent,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    biject_to,
    constraints,
    kl_divergence,
    register_kl,
)

from pyro_vae.recurrence import scan

__all__ = [
    "Emissions",
    "MarkovSequence",
    "WithMemory",
    "drawn_from",
    "observed_log_prob",
    "steps_within",
]


class MarkovSequence(TorchDistribution):  # type: ignore[misc]
    r"""A Markov chain of vectors, z_1, ..., z_T, as one value of shape (T, J).

        p(z) = p(z_1) prod_{t=2}^{T} p(z_t | z_{t-1}, u_t)

    It is drawn step by step, by an operation that has no Python inside its loop where ``transition`` is a module that
    gives Normal or MultivariateNormal laws, or flows of them; and its density is evaluated for all steps at once. Of a
    sequence of length n < T the steps after n are padding: zero in what is drawn, and without any influence.

    Args:
        initial: law of z_1, of event shape (J,).
        transition: of z_{t-1} (..., J), and of u_t (..., U) if there are inputs, to the law of z_t, of event shape
            (J,). It must broadcast over leading dimensions: it is called with all steps at once, and with one.
        num_steps: T, at least 1.
        inputs: u, (..., T, U), of which the first step is not read; or None.
        lengths: n, whole numbers from 1 to T, (...); None where every sequence is T steps long.

    Raises:
        ValueError: the shapes do not fit; the message says what was expected.

    Example:
        >>> import pyro.distributions as dist
        >>> start = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> walk = MarkovSequence(start, lambda z: dist.Normal(z, 1.0).to_event(1), num_steps=5)
        >>> z = walk.sample((3,))
        >>> z.shape, walk.log_prob(z).shape
        (torch.Size([3, 5, 2]), torch.Size([3]))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        initial: TorchDistribution,
        transition: Callable[..., TorchDistribution],
        num_steps: int,
        inputs: Tensor | None = None,
        lengths: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if len(initial.event_shape) != 1:
            raise ValueError(f"initial: expected a law of event shape (J,), got {tuple(initial.event_shape)}")
        if num_steps < 1:
            raise ValueError(f"num_steps: expected at least 1, got {num_steps!r}")
        self.num_steps = num_steps
        if inputs is not None and (inputs.ndim < 2 or inputs.shape[-2] != num_steps):
            raise ValueError(f"inputs: expected shape (..., {num_steps}, U), got {tuple(inputs.shape)}")
        shapes = {"initial": initial.batch_shape, "inputs": () if inputs is None else inputs.shape[:-2]}
        batch_shape = _batch_shape(shapes | {"lengths": () if lengths is None else lengths.shape})
        self.valid = None if lengths is None else steps_within(lengths, num_steps)
        self.initial, self.transition = initial, transition
        self.inputs = None if inputs is None else _where(self.valid, inputs)
        super().__init__(batch_shape, (num_steps, *initial.event_shape), validate_args=validate_args)
        self._path: _Path | None = None
        self._reparameterized = True

    @property
    def support(self) -> Any:
        """That of z_1, at each step."""
        return constraints.independent(self.initial.support, 1)

    @property
    def has_rsample(self) -> bool:
        """Whether draws are reparameterised: by the law of z_1, and once a path is drawn, by the transition's too."""
        return bool(self.initial.has_rsample) and self._reparameterized

    def expand(self, batch_shape: Any, _instance: Any = None) -> MarkovSequence:
        """The same for a larger batch."""
        new: MarkovSequence = self._get_checked_instance(MarkovSequence, _instance)
        for name in ("initial", "transition", "inputs", "num_steps", "valid"):
            setattr(new, name, getattr(self, name))
        new._path, new._reparameterized = None, self._reparameterized
        super(MarkovSequence, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def step_law(self, z: Tensor, step: int) -> TorchDistribution:
        """The law of z at a step, 1 to T - 1 counted from 0, given the one before it, (..., J)."""
        return self.transition(z) if self.inputs is None else self.transition(z, self.inputs[..., step, :])

    def laws(self, value: Tensor) -> tuple[TorchDistribution, ...]:
        """The laws of z_1 and, if T > 1, of z_2, ..., z_T, (..., T - 1), each given the step before it in a path.

        Args:
            value: path, (..., T, J).
        """
        if self.num_steps == 1:
            return (self.initial,)
        drawn = self._drawn(value)
        if drawn is not None and drawn.laws is not None:
            return self.initial, drawn.laws
        before = self._filled(value)[..., :-1, :]
        if self.inputs is None:
            return self.initial, self.transition(before)
        return self.initial, self.transition(before, self.inputs[..., 1:, :])

    def step_log_prob(self, value: Tensor) -> Tensor:
        """Log density of each step given the one before it, (..., T), in nats; 0 in the padding.

        Args:
            value: path, (..., T, J).
        """
        laws = self.laws(value)
        values = self._step_values(value, laws)  # one after the other: a flow keeps one inverse
        first, *rest = (law.log_prob(part) for law, part in zip(laws, values, strict=False))
        return self._of_steps([first[..., None], *rest])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of a path, (...), in nats.

        Args:
            value: path, (..., T, J).
        """
        if self._validate_args:
            self._validate_sample(self._filled(value))
        return self.step_log_prob(value).sum(-1)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw paths, (*sample_shape, ..., T, J), with gradients where the laws have them."""
        initial = self.initial.expand(torch.Size(sample_shape) + self.batch_shape)
        first, law = drawn_from(initial), None
        if self.num_steps > 1:
            law = self.step_law(first, 1)
            self._reparameterized = law.has_rsample
        if law is None or not (isinstance(self.transition, nn.Module) and _takes_noise(initial, law)):
            return self._step_by_step(first, law)
        size = (self.num_steps, *first.shape[:-1], _noise_dim(initial))
        noise = torch.randn(size, dtype=first.dtype, device=first.device)
        first = _from_noise(initial, noise[0])
        rest, laws = self._by_scan(first, noise[1:], _is_normal(law))
        path = _where(self.valid, torch.cat([first[None], rest]).movedim(0, -2))
        self._path = _Path(path, noise.movedim(0, -2), laws, torch.is_grad_enabled())
        return path

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw paths, (*sample_shape, ..., T, J)."""
        return self.rsample(sample_shape)

    def _by_scan(self, first: Tensor, noise: Tensor, normal: bool) -> tuple[Tensor, TorchDistribution | None]:
        """z_2, ..., z_T as a function of noise, (T - 1, ..., J), and their laws (..., T - 1), if they are normal."""
        given = [noise]
        if self.valid is not None:
            given.append(self.valid.movedim(-1, 0)[1:, ..., None])
        if self.inputs is not None:
            given.append(self.inputs.movedim(-2, 0)[1:])
        assert isinstance(self.transition, nn.Module)
        cell = _noisy_step(self.transition, self.valid is not None, normal)
        with pyro.validation_enabled(False):  # reads values, which cannot be recorded
            if not normal:
                return scan(cell, first, given), None
            states = scan(cell, torch.cat([first, first, first], -1), given)
            path, loc, scale = states.chunk(3, -1)
            return path, dist.Normal(loc.movedim(0, -2), scale.movedim(0, -2)).to_event(1)

    def _step_by_step(self, first: Tensor, law: TorchDistribution | None) -> Tensor:
        steps = [first]
        for step in range(1, self.num_steps):
            z = drawn_from(law if step == 1 else self.step_law(steps[-1], step))
            steps.append(z if self.valid is None else torch.where(self.valid[..., step, None], z, steps[-1]))
        path = _where(self.valid, torch.stack(steps, -2))
        self._path = _Path(path, None, None, torch.is_grad_enabled())
        return path

    def _step_values(self, value: Tensor, laws: Sequence[TorchDistribution]) -> Iterator[Tensor]:
        """z_1, and z_2, ..., z_T; of a path drawn here, as a flow's own output, whose inverse the flow has kept."""
        drawn = self._drawn(value)
        noise = None if drawn is None else drawn.noise
        filled = self._filled(value)
        steps: Any
        for law, steps in zip(laws, (0, slice(1, None)), strict=False):
            if noise is not None and _is_flow(law):
                yield _from_noise(law, noise[..., steps, :])
            else:
                yield filled[..., steps, :]

    def _drawn(self, value: Tensor) -> _Path | None:
        """What is known of a path, if it is the one that was drawn here last, and has the gradients now wanted."""
        path = self._path
        serves = path is not None and path.value is value and (path.graded or not torch.is_grad_enabled())
        return path if serves else None

    def _filled(self, value: Tensor) -> Tensor:
        return value if self.valid is None else _filled(value, self.valid[..., None], self.initial)

    def _of_steps(self, terms: Sequence[Tensor]) -> Tensor:
        shape = torch.broadcast_shapes(self.batch_shape, *(term.shape[:-1] for term in terms))
        steps = torch.cat([term.expand(*shape, term.shape[-1]) for term in terms], -1)
        return steps if self.valid is None else torch.where(self.valid, steps, 0.0)


@dataclass(frozen=True, eq=False)
class _Path:
    """What a Markov sequence drew last.

    Attributes:
        value: the path, (..., T, J).
        noise: that it was made of, (..., T, J).
        laws: of its steps from the second on, which were needed on the way.
        graded: whether they were drawn with gradients, if there are any.
    """

    value: Tensor
    noise: Tensor | None
    laws: TorchDistribution | None
    graded: bool


@register_kl(MarkovSequence, MarkovSequence)  # type: ignore[untyped-decorator]
def _kl_along_a_path(q: MarkovSequence, p: MarkovSequence) -> Tensor:
    """The sum of the steps' KL divergences, each in closed form given the step before it in the path drawn last from q.

    Its mean over paths is the divergence of the sequences (Krishnan et al., arXiv:1609.09869, eq. (6)).
    """
    if q._path is None:
        raise NotImplementedError("no path was drawn from q")
    pairs = zip(q.laws(q._path.value), p.laws(q._path.value), strict=True)
    first, *rest = (kl_divergence(ours, theirs) for ours, theirs in pairs)
    return q._of_steps([first[..., None], *rest]).sum(-1)


class _KnownMemory(constraints.Constraint):
    """Vectors (z, h) in which h is known; no bijection leads to them from real vectors."""

    is_discrete = False
    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        """Whether there is a number everywhere."""
        return (value == value).all(-1)

    def __repr__(self) -> str:
        return "real vectors, a part of which is not random"


class WithMemory(TorchDistribution):  # type: ignore[misc]
    r"""A law of (z, h), in which h is known and z alone is random.

        log p(z, h) = log p(z)

    So a recurrence of which z is a part is a Markov chain whose state is (z, h): see
    :class:`pyro_vae.models.VariationalRNN`. The density does not look at the h of a value.

    Args:
        base_dist: law of z, of event shape (J,).
        memory: h, (..., H), of a batch shape that broadcasts with that of ``base_dist``.

    Example:
        >>> import pyro.distributions as dist
        >>> law = WithMemory(dist.Normal(torch.zeros(2), 1.0).to_event(1), torch.tensor([7.0]))
        >>> law.sample()[-1], law.log_prob(torch.zeros(3)) == law.base_dist.log_prob(torch.zeros(2))
        (tensor(7.), tensor(True))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = _KnownMemory()

    def __init__(self, base_dist: TorchDistribution, memory: Tensor, validate_args: bool | None = None) -> None:
        batch_shape = torch.broadcast_shapes(base_dist.batch_shape, memory.shape[:-1])
        self.base_dist = base_dist if base_dist.batch_shape == batch_shape else base_dist.expand(batch_shape)
        self.memory = memory
        size = base_dist.event_shape[0] + memory.shape[-1]
        super().__init__(batch_shape, (size,), validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        """Whether z has reparameterised draws."""
        return bool(self.base_dist.has_rsample)

    @property
    def mean(self) -> Tensor:
        """E[z] and h, (..., J + H)."""
        return self.beside_memory(self.base_dist.mean)

    def expand(self, batch_shape: Any, _instance: Any = None) -> WithMemory:
        """The same for a larger batch."""
        return type(self)(self.base_dist.expand(torch.Size(batch_shape)), self.memory, self._validate_args)

    def beside_memory(self, z: Tensor) -> Tensor:
        """The vectors (z, h), (..., J + H), of z (..., J)."""
        return torch.cat([z, self.memory.expand(*z.shape[:-1], -1)], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of z, (...), in nats.

        Args:
            value: (z, h), (..., J + H).
        """
        log_density: Tensor = self.base_dist.log_prob(value[..., : self.base_dist.event_shape[0]])
        return log_density

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw z beside h, (*sample_shape, ..., J + H), with gradients where the law of z has them."""
        return self.beside_memory(drawn_from(self.base_dist.expand(torch.Size(sample_shape) + self.batch_shape)))

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw z beside h, (*sample_shape, ..., J + H)."""
        return self.rsample(sample_shape)


@register_kl(WithMemory, WithMemory)  # type: ignore[untyped-decorator]
def _kl_of_what_is_random(q: WithMemory, p: WithMemory) -> Tensor:
    """KL divergence of the laws of z."""
    return kl_divergence(q.base_dist, p.base_dist)


class Emissions(TorchDistribution):  # type: ignore[misc]
    r"""What each step of a sequence of latents emits, as one value of shape (T, D).

        p(x | z) = prod_t p(x_t | z_t, u_t)

    Steps after a sequence's length, and what a mask leaves out, have no density. In what is drawn the former are zero,
    and the latter drawn like all else.

    Args:
        law: of z_t (..., J), and of u_t (..., U) if there are inputs, to the law of x_t, of event shape (D,). It is
            called with all steps at once, and by a particle filter with one.
        z: latents, (..., T, J).
        inputs: u, (..., T, U), or None.
        lengths: n, whole numbers from 1 to T, (...); None where every sequence is T steps long.
        mask: True where x is observed, (..., T, 1), or (..., T, D) if the elements of x_t are independent given z_t.

    Raises:
        ValueError: the shapes do not fit, or a mask of elements meets a law that does not have independent ones.

    Example:
        >>> import pyro.distributions as dist
        >>> coins = lambda z: dist.Bernoulli(logits=z).to_event(1)
        >>> tossed = Emissions(coins, torch.zeros(3, 5, 2), lengths=torch.tensor([5, 1, 2]))
        >>> tossed.log_prob(torch.ones(3, 5, 2)) / torch.tensor(0.5).log()
        tensor([10.,  2.,  4.])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        law: Callable[..., TorchDistribution],
        z: Tensor,
        inputs: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        num_steps = z.shape[-2]
        shapes = {"z": z.shape[:-2], "lengths": () if lengths is None else lengths.shape}
        shapes["mask"] = () if mask is None else mask.shape[:-2]
        _batch_shape(shapes)
        self.valid = None if lengths is None else steps_within(lengths, num_steps)
        self.law, self.z, within = law, z, _where(self.valid, z, z[..., :1, :])  # of z = 0 there may be no law
        self.inputs = None if inputs is None else _where(self.valid, inputs, inputs[..., :1, :])
        self.steps = law(within) if self.inputs is None else law(within, self.inputs)
        if self.steps.batch_shape[-1:] != (num_steps,):
            shape = tuple(self.steps.batch_shape)
            raise ValueError(f"law: expected a batch shape (..., {num_steps}) for z {tuple(z.shape)}, got {shape}")
        parts = [part for part in (mask, None if self.valid is None else self.valid[..., None]) if part is not None]
        self.observed = functools.reduce(operator.and_, parts) if parts else None  # (..., T, 1) or (..., T, D)
        shape = _batch_shape(shapes | {"law": self.steps.batch_shape[:-1]})
        super().__init__(shape, (num_steps, *self.steps.event_shape), validate_args=validate_args)

    @property
    def support(self) -> Any:
        """That of x_t, at each step."""
        return constraints.independent(self.steps.support, 1)

    @property
    def has_rsample(self) -> bool:
        """Whether x_t has reparameterised draws."""
        return bool(self.steps.has_rsample)

    @property
    def mean(self) -> Tensor:
        """E[x_t | z_t], (..., T, D), in the padding too."""
        mean: Tensor = self.steps.mean
        return mean

    def expand(self, batch_shape: Any, _instance: Any = None) -> Emissions:
        """The same for a larger batch."""
        new: Emissions = self._get_checked_instance(Emissions, _instance)
        for name in ("law", "z", "inputs", "valid", "observed"):
            setattr(new, name, getattr(self, name))
        new.steps = self.steps.expand((*batch_shape, self.event_shape[0]))
        super(Emissions, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def step_log_prob(self, value: Tensor) -> Tensor:
        """Log density of each step, (..., T), in nats; 0 where nothing is observed.

        Args:
            value: (..., T, D).
        """
        return observed_log_prob(self.steps, value, self.observed)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of a sequence, (...), in nats.

        Args:
            value: (..., T, D).
        """
        if self._validate_args:
            self._validate_sample(_filled(value, self.observed, self.steps))
        return self.step_log_prob(value).sum(-1)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw sequences, (*sample_shape, ..., T, D), with gradients where the law has them."""
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape[:1]
        return _where(self.valid, drawn_from(self.steps.expand(shape)))

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw sequences, (*sample_shape, ..., T, D)."""
        return self.rsample(sample_shape)


def steps_within(lengths: Tensor, num_steps: int) -> Tensor:
    """True at the steps that a sequence has, (..., T), of lengths (...)."""
    return torch.arange(num_steps, device=lengths.device) < lengths[..., None]


def observed_log_prob(law: TorchDistribution, value: Tensor, mask: Tensor | None) -> Tensor:
    """Log density of what is observed of steps, (...), in nats.

    Args:
        law: of steps, batch shape (...), event shape (D,).
        value: (..., D).
        mask: True where it is observed, (..., 1) or (..., D); None for all.

    Raises:
        ValueError: single elements are masked under a law whose elements are not independent.
    """
    value = _filled(value, mask, law)
    if mask is None:
        return law.log_prob(value)  # type: ignore[no-any-return]
    if mask.shape[-1] == 1:
        return torch.where(mask[..., 0], law.log_prob(value), 0.0)
    if not isinstance(law, Independent) or law.reinterpreted_batch_ndims != 1:
        raise ValueError(
            f"mask: expected one of steps, (..., T, 1), for the elements of {type(law).__name__} are not independent"
        )
    return torch.where(mask, law.base_dist.log_prob(value), 0.0).sum(-1)


def _where(valid: Tensor | None, steps: Tensor, other: Tensor | float = 0.0) -> Tensor:
    """What there is for each step, (..., T, D), another in the padding: whatever is there, 0 * inf would be NaN."""
    return steps if valid is None else torch.where(valid[..., None], steps, other)


def _filled(value: Tensor, seen: Tensor | None, law: TorchDistribution) -> Tensor:
    """Values with others where they are not seen, of which the law has a density with a gradient."""
    if seen is None:
        return value
    support = law.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    other: Any = 0.0
    if support not in (constraints.real, constraints.dependent) and not support.is_discrete and not support.event_dim:
        other = biject_to(support)(torch.zeros_like(value))
    return torch.where(seen, value, other)


def _batch_shape(shapes: Mapping[str, Any]) -> torch.Size:
    """The shape that these shapes broadcast to.

    Raises:
        ValueError: they do not; names them.
    """
    try:
        return torch.Size(torch.broadcast_shapes(*shapes.values()))
    except RuntimeError as error:
        named = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"expected batch shapes that broadcast, got {named}") from error


def drawn_from(law: TorchDistribution) -> Tensor:
    """A draw, with gradients where the law has them."""
    drawn: Tensor = law.rsample() if law.has_rsample else law.sample()
    return drawn


def _takes_noise(*laws: Any) -> bool:
    """Whether laws are functions of standard normal noise of the shape of what they give."""
    bases = list(laws)
    for place, law in enumerate(bases):
        while isinstance(law, (Independent, MaskedDistribution, TransformedDistribution, WithMemory)):
            law = law.base_dist
        bases[place] = law
    return all(isinstance(law, (Normal, MultivariateNormal)) for law in bases)


def _noise_dim(law: Any) -> int:
    """How many numbers of noise a law makes a vector of."""
    law = law.base_dist if isinstance(law, WithMemory) else law
    return int(law.event_shape[0])


def _from_noise(law: Any, noise: Tensor) -> Tensor:
    """The draw that a law makes of noise."""
    if isinstance(law, WithMemory):
        return law.beside_memory(_from_noise(law.base_dist, noise))
    if isinstance(law, (Independent, MaskedDistribution)):
        return _from_noise(law.base_dist, noise)
    if isinstance(law, TransformedDistribution):
        drawn = _from_noise(law.base_dist, noise)
        for transform in law.transforms:
            drawn = transform(drawn)
        return drawn
    if isinstance(law, MultivariateNormal):
        return law.loc + (law.scale_tril @ noise[..., None]).squeeze(-1)
    return law.loc + law.scale * noise  # type: ignore[no-any-return]


def _is_flow(law: Any) -> bool:
    """Whether there is a transformation whose inverse its output keeps."""
    while isinstance(law, (Independent, MaskedDistribution)):
        law = law.base_dist
    return isinstance(law, TransformedDistribution)


class _NoisyStep(nn.Module):
    """z_t as a function of z_{t-1}, noise, whether the step is one of the sequence's, and inputs.

    Args:
        transition: gives the law of z_t.
        masked: whether it is told which steps are the sequence's.
        normal: whether the law is normal, and its mean and scale stand beside z_t in the state, (..., 3 J): its density
            will be asked for, and they need not be computed twice.
    """

    def __init__(self, transition: nn.Module, masked: bool, normal: bool) -> None:
        super().__init__()
        self.transition, self.masked, self.normal = transition, masked, normal

    def forward(self, state: Tensor, noise: Tensor, *given: Tensor) -> Tensor:
        """The next state."""
        z = state[..., : noise.shape[-1]] if self.normal else state
        law = self.transition(z, *given[self.masked :])
        drawn = _from_noise(law, noise)
        if self.masked:
            drawn = torch.where(given[0], drawn, z)  # where it ends it stays: a law's own value
        if not self.normal:
            return drawn
        return torch.cat([drawn, *(moment.expand_as(drawn) for moment in (law.mean, law.base_dist.scale))], -1)


def _noisy_step(transition: nn.Module, *kind: bool) -> _NoisyStep:
    """The step, kept with the transition, beside its modules and not among them."""
    kept = transition.__dict__.setdefault("_pyro_vae_steps", {})
    return kept.setdefault(kind, _NoisyStep(transition, *kind))  # type: ignore[no-any-return]


def _is_normal(law: Any) -> bool:
    """Whether a vector's elements are independent and normal."""
    is_vector = isinstance(law, Independent) and law.reinterpreted_batch_ndims == 1
    return is_vector and type(law.base_dist) in (Normal, dist.Normal)
