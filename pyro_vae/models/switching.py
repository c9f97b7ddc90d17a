r"""Switching linear dynamics: a Markov chain of S regimes moves the latents, and is summed out exactly.

    p(s, z) = p(s_1) N(z_1; m_{s_1}, P_{s_1}) prod_t p(s_t | s_{t-1}) N(z_t; A_{s_t} z_{t-1} + b_{s_t}, Q_{s_t})
    p(z) = sum_s p(s, z),      p(x_t | z_t) linear-Gaussian, or by an MLP

(Ackerson & Fu 1970; Ghahramani & Hinton 2000). The posterior of (s, z) is a mixture of S^T Gaussians; but of s given
z it is that of a hidden Markov model that "emits" the moves of z. So the sum over S^T paths costs T S^2, by the
forward algorithm (Baum & Petrie 1966), and has gradients; what is left for a guide is the continuous z alone (Dong et
al., arXiv:2010.10770, who call it collapsed). Discrete draws, which have no gradient, are no part of the learning.

z alone is no Markov chain; but (z_t, r_t) is one, of r_t = p(s_t | z_1, ..., z_t), which follows from z_t and the pair
before it. So a particle filter draws no regimes either, and carries their probabilities (as Doucet et al. 2000 do, who
call it Rao-Blackwellised).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.arguments import one_of, probability, whole_number
from pyro_vae.distributions import Emissions, MarkovSequence, steps_within
from pyro_vae.models.combiner import LinearCombiner
from pyro_vae.models.deep_markov import EMISSIONS, Emission
from pyro_vae.models.linear_gaussian_ssm import LinearEmission
from pyro_vae.models.state_space import StateSpaceModel
from pyro_vae.networks import CELLS, Recurrent
from pyro_vae.programs import SequenceLaws
from pyro_vae.recurrence import scan

__all__ = ["SwitchingLDS", "SwitchingSequence"]


class SwitchingSequence(TorchDistribution):  # type: ignore[misc]
    r"""A sequence of vectors z_1, ..., z_T moved by regimes s_1, ..., s_T that are summed out, as one value (T, J).

        p(z) = sum_s p(s_1) p(z_1 | s_1) prod_t p(s_t | s_{t-1}) N(z_t; A_{s_t} z_{t-1} + b_{s_t}, L_{s_t} L_{s_t}')

    Of a sequence of length n < T the steps after n are padding: zero in what is drawn, and without any influence.

    Args:
        initial: law of z_1 in each regime, of batch shape (S,) and event shape (J,).
        initial_logits: unnormalised log p(s_1), (S,).
        transition_logits: unnormalised log p(s_t | s_{t-1}), (S, S), the earlier regime first.
        weight: A, (S, J, J).
        bias: b, (S, J).
        scale_tril: L, (S, J, J).
        num_steps: T, at least 1.
        lengths: n, whole numbers from 1 to T, (...); None where every sequence is T steps long.

    Raises:
        ValueError: the shapes do not fit; the message says what was expected.

    Example:
        >>> S, J = 3, 2
        >>> start = dist.Normal(torch.zeros(S, J), 1.0).to_event(1)
        >>> eye = torch.eye(J).expand(S, J, J)
        >>> logits = torch.zeros(S), torch.zeros(S, S)
        >>> walk = SwitchingSequence(start, *logits, eye, torch.zeros(S, J), eye, num_steps=5)
        >>> z = walk.sample((4,))
        >>> z.shape, walk.log_prob(z).shape, walk.switch_posterior(z).shape
        (torch.Size([4, 5, 2]), torch.Size([4]), torch.Size([4, 5, 3]))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(
        self,
        initial: TorchDistribution,
        initial_logits: Tensor,
        transition_logits: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale_tril: Tensor,
        num_steps: int,
        lengths: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if initial_logits.ndim != 1:
            raise ValueError(f"initial_logits: expected shape (S,), got {tuple(initial_logits.shape)}")
        S = len(initial_logits)
        if initial.batch_shape != (S,) or len(initial.event_shape) != 1:
            shapes = tuple(initial.batch_shape), tuple(initial.event_shape)
            raise ValueError(f"initial: expected batch shape ({S},) and event shape (J,), got {shapes[0]}, {shapes[1]}")
        (J,) = initial.event_shape
        wanted = {"transition_logits": (S, S), "weight": (S, J, J), "bias": (S, J), "scale_tril": (S, J, J)}
        given = {"transition_logits": transition_logits, "weight": weight, "bias": bias, "scale_tril": scale_tril}
        for name, shape in wanted.items():
            if given[name].shape != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(given[name].shape)}")
        self.initial, self.weight, self.bias, self.scale_tril = initial, weight, bias, scale_tril
        self.log_initial, self.log_transition = initial_logits.log_softmax(-1), transition_logits.log_softmax(-1)
        self.num_steps = whole_number("num_steps", num_steps)
        self.valid = None if lengths is None else steps_within(lengths, num_steps)
        batch_shape = torch.Size() if lengths is None else lengths.shape
        super().__init__(batch_shape, (num_steps, J), validate_args=validate_args)

    @property
    def support(self) -> Any:
        """Real vectors, one for each step."""
        return constraints.independent(constraints.real_vector, 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> SwitchingSequence:
        """The same for a larger batch."""
        new: SwitchingSequence = self._get_checked_instance(SwitchingSequence, _instance)
        names = ("initial", "weight", "bias", "scale_tril", "log_initial", "log_transition", "num_steps", "valid")
        for name in names:
            setattr(new, name, getattr(self, name))
        super(SwitchingSequence, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def step_log_prob(self, value: Tensor) -> Tensor:
        """Log density of each step given those before it, log p(z_t | z_1, ..., z_{t-1}), (..., T), in nats.

        Args:
            value: path, (..., T, J).

        Returns:
            (..., T), 0 in the padding.
        """
        density = self._densities(value)
        predicted = self._predicted(self._filtered(density))
        steps = (predicted + density).logsumexp(-1)
        return steps if self.valid is None else torch.where(self.valid, steps, 0.0)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of a path, (...), in nats.

        Args:
            value: path, (..., T, J).
        """
        if self._validate_args:
            self._validate_sample(value)
        return self.step_log_prob(value).sum(-1)

    def switch_posterior(self, value: Tensor) -> Tensor:
        """Probabilities of the regimes given a whole path, p(s_t | z_1, ..., z_n), (..., T, S); 0 in the padding.

        Args:
            value: path, (..., T, J).
        """
        density = self._densities(value)
        after = torch.zeros_like(density[..., -1:, :])
        if self.num_steps > 1:
            later = density[..., 1:, :].movedim(-2, 0).flip(0)
            before = scan(_BACKWARD, after[..., 0, :], [later, self._moves()]).flip(0).movedim(0, -2)
            after = torch.cat([before, after], -2)
        posterior = (self._filtered(density) + after).softmax(-1)
        return posterior if self.valid is None else torch.where(self.valid[..., None], posterior, 0.0)

    @torch.no_grad()
    def draw(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Draw paths and their regimes.

        Returns:
            z, (*sample_shape, ..., T, J), zero in the padding; and s, int64 (*sample_shape, ..., T).
        """
        shape = torch.Size(sample_shape) + self.batch_shape
        (T, J), S = self.event_shape, len(self.log_initial)
        noise = torch.rand(T, *shape, S, dtype=self.weight.dtype, device=self.weight.device).clamp(1e-30)
        gumbel = -(-noise.log()).log()  # the largest of logits and such noise is a categorical draw
        switches = _largest(self.log_initial + gumbel[0])[None]
        if T > 1:
            switches = torch.cat([switches, scan(_SWITCH, switches[0], [gumbel[1:], self._moves()])])
        chosen = switches.argmax(-1)  # (T, ...)
        first = self.initial.expand((*shape, S)).sample()
        path = first.gather(-2, chosen[0][..., None, None].expand(*shape, 1, J)).movedim(-2, 0)
        if T > 1:
            white = torch.randn(T - 1, *shape, J, dtype=path.dtype, device=path.device)
            s = chosen[1:]
            offset = self.bias[s] + (self.scale_tril[s] @ white[..., None]).squeeze(-1)
            path = torch.cat([path, scan(_MOVE, path[0], [self.weight[s].flatten(-2), offset])])
        z = path.movedim(0, -2)
        return z if self.valid is None else torch.where(self.valid[..., None], z, 0.0), chosen.movedim(0, -1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw paths, (*sample_shape, ..., T, J)."""
        return self.draw(sample_shape)[0]

    def chain(self) -> MarkovSequence:
        """The law of pairs of z_t and r_t = p(s_t | z_1, ..., z_t), a Markov chain of event shape (T, J + S)."""
        return self.proposed_by(None)

    def proposed_by(self, proposal: MarkovSequence | None) -> MarkovSequence:
        """As :meth:`chain`, but with z from a law of its own, of event shape (T, J)."""
        J, lengths = self.event_shape[1], None if self.valid is None else self.valid.sum(-1)
        if proposal is None:
            first = _WithRegimes(self.log_initial, self.initial)
            return MarkovSequence(first, self._following, self.num_steps, lengths=lengths)
        move, given = proposal.transition, proposal.inputs

        def following(state: Tensor, *inputs: Tensor) -> TorchDistribution:
            return self._following(state, move(state[..., :J], *inputs))

        first = _WithRegimes(self.log_initial, self.initial, proposal.initial)
        return MarkovSequence(first, following, self.num_steps, given, lengths)

    def _following(self, state: Tensor, proposal: TorchDistribution | None = None) -> TorchDistribution:
        """The law of (z_t, r_t), of (z_{t-1}, r_{t-1}) (..., J + S), or of a z_t that is proposed."""
        z, regimes = state.split([self.event_shape[1], len(self.log_initial)], -1)
        return _WithRegimes((regimes @ self.log_transition.exp()).log(), self._moved_to(z), proposal)

    def _moved_to(self, z: Tensor) -> TorchDistribution:
        """The laws of z_t in each regime, (..., S), of z_{t-1} (..., J)."""
        moved = (self.weight @ z[..., None, :, None]).squeeze(-1) + self.bias
        return dist.MultivariateNormal(moved, scale_tril=self.scale_tril, validate_args=False)

    def _densities(self, value: Tensor) -> Tensor:
        """Log density of each step in each regime given the step before, (..., T, S); 0 in the padding."""
        densities = [self.initial.log_prob(value[..., :1, None, :])]
        if self.num_steps > 1:
            densities.append(self._moved_to(value[..., :-1, :]).log_prob(value[..., 1:, None, :]))  # (..., T - 1, S)
        found = torch.cat(densities, -2)
        return found if self.valid is None else torch.where(self.valid[..., None], found, 0.0)

    def _filtered(self, density: Tensor) -> Tensor:
        """Log p(s_t | z_1, ..., z_t), (..., T, S)."""
        first = (self.log_initial + density[..., 0, :]).log_softmax(-1)
        if self.num_steps == 1:
            return first[..., None, :]
        later = scan(_FORWARD, first, [density[..., 1:, :].movedim(-2, 0), self._moves()])
        return torch.cat([first[None], later]).movedim(0, -2)

    def _predicted(self, filtered: Tensor) -> Tensor:
        """Log p(s_t | z_1, ..., z_{t-1}), (..., T, S)."""
        later = (filtered[..., :-1, :, None] + self.log_transition).logsumexp(-2)
        first = self.log_initial.expand(*filtered.shape[:-2], 1, -1)
        return torch.cat([first, later], -2)

    def _moves(self) -> Tensor:
        """Log p(s_t | s_{t-1}) for each of t = 2, ..., T, (T - 1, S^2)."""
        return self.log_transition.flatten().expand(self.num_steps - 1, -1)


class _WithRegimes(TorchDistribution):  # type: ignore[misc]
    """The law of (z_t, r_t), r_t = p(s_t | z_1, ..., z_t), which is a function of z_t; the density is that of z_t.

    Args:
        predicted: log p(s_t | z_1, ..., z_{t-1}), (..., S).
        laws: of z_t in each regime, batch shape (..., S), event shape (J,).
        proposal: the law of z_t, if not the mixture of these, batch shape (...).
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector

    def __init__(self, predicted: Tensor, laws: TorchDistribution, proposal: TorchDistribution | None = None) -> None:
        self.predicted, self.laws, self.proposal = predicted, laws, proposal
        batch_shape = torch.broadcast_shapes(
            predicted.shape[:-1], laws.batch_shape[:-1], () if proposal is None else proposal.batch_shape
        )
        size = laws.event_shape[0] + predicted.shape[-1]
        super().__init__(batch_shape, (size,), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _WithRegimes:
        """The same for a larger batch."""
        S = self.predicted.shape[-1]
        proposal = None if self.proposal is None else self.proposal.expand(torch.Size(batch_shape))
        return _WithRegimes(self.predicted.expand(*batch_shape, S), self.laws.expand((*batch_shape, S)), proposal)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw pairs, (*sample_shape, ..., J + S)."""
        if self.proposal is None:
            S = self.predicted.shape[-1]
            shape = torch.Size(sample_shape) + self.batch_shape
            chosen = torch.distributions.Categorical(logits=self.predicted.expand(*shape, S)).sample()
            each = self.laws.expand((*shape, S)).sample()  # (..., S, J)
            z = each.gather(-2, chosen[..., None, None].expand(*shape, 1, each.shape[-1])).squeeze(-2)
        else:
            z = self.proposal.expand(self.batch_shape).sample(sample_shape)
        return torch.cat([z, self._joint(z).softmax(-1)], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of z_t, (...), in nats.

        Args:
            value: (z_t, r_t), (..., J + S); r_t is not read.
        """
        z = value[..., : self.laws.event_shape[0]]
        log_density: Tensor = self._joint(z).logsumexp(-1) if self.proposal is None else self.proposal.log_prob(z)
        return log_density

    def _joint(self, z: Tensor) -> Tensor:
        """Log p(s_t, z_t | z_1, ..., z_{t-1}), (..., S)."""
        joint: Tensor = self.predicted + self.laws.log_prob(z[..., None, :])
        return joint


class _Forward(nn.Module):
    """log p(s_t | z_1, ..., z_t) of that of the step before (Rabiner 1989, eqs. (20), (91))."""

    def forward(self, before: Tensor, density: Tensor, moves: Tensor) -> Tensor:
        """The next state, (..., S)."""
        return (_moved(before, moves) + density).log_softmax(-1)


class _Backward(nn.Module):
    """log p(z_{t+1}, ... | s_t), up to a constant, of that of the step after (Rabiner 1989, eq. (25))."""

    def forward(self, after: Tensor, density: Tensor, moves: Tensor) -> Tensor:
        """The next state, (..., S)."""
        S = after.shape[-1]
        found: Tensor = (moves.unflatten(-1, (S, S)) + (density + after)[..., None, :]).logsumexp(-1).log_softmax(-1)
        return found


class _Switch(nn.Module):
    """s_t as one of S, of s_{t-1} and Gumbel noise."""

    def forward(self, before: Tensor, noise: Tensor, moves: Tensor) -> Tensor:
        """The next state, (..., S)."""
        S = before.shape[-1]
        return _largest((moves.unflatten(-1, (S, S)) * before[..., None]).sum(-2) + noise)


class _Move(nn.Module):
    """A z + b."""

    def forward(self, z: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
        """The next state, (..., J)."""
        J = z.shape[-1]
        moved: Tensor = (weight.unflatten(-1, (J, J)) @ z[..., None]).squeeze(-1)
        return moved + offset


# One of each, for what is recorded of a cell is kept as long as the cell is.
_FORWARD, _BACKWARD, _SWITCH, _MOVE = _Forward(), _Backward(), _Switch(), _Move()


def _moved(log_probs: Tensor, moves: Tensor) -> Tensor:
    S = log_probs.shape[-1]
    moved: Tensor = (log_probs[..., None] + moves.unflatten(-1, (S, S))).logsumexp(-2)
    return moved


def _largest(values: Tensor) -> Tensor:
    """One where a row is largest, zero elsewhere."""
    return (values == values.max(-1, keepdim=True).values).to(values)


class SwitchingLDS(StateSpaceModel):
    """A switching linear dynamical system whose regimes are summed out (Ghahramani & Hinton 2000; arXiv:2010.10770).

    The guide q(z_t | z_{t-1}, x) is linear in z_{t-1}, with coefficients from a recurrent network of x_t, ..., x_T.

    The particles and means of ``filter`` and ``filter_online`` hold z_t and, behind it, the probabilities of the
    regimes: means are E[z_t | x_1, ..., x_t] and p(s_t | x_1, ..., x_t). ``pv.FIVO`` and ``log_marginal(method="smc")``
    take Markov chains of z alone, and refuse the model.

    Args:
        data_dim: D.
        latent_dim: J.
        num_states: S, regimes.
        emission: "linear" (Gaussian, C z_t + d), or by an MLP: "bernoulli", "gaussian", "student-t" or "poisson".
        emission_dim: width of that MLP's hidden layers.
        rnn_dim: H, width of the guide's recurrent network.
        cell: of that network: "tanh", "relu", "gru" or "lstm".
        stickiness: probability of staying in a regime to begin at, between 0 and 1.

    Raises:
        ValueError: an argument is out of its range; the message says what was expected.

    Example:
        >>> model = SwitchingLDS(data_dim=4, latent_dim=2, num_states=3, rnn_dim=8)
        >>> x, lengths = model.sample(5, num_steps=12), torch.tensor([12, 3, 9, 1, 12])
        >>> z = model.encode(x, lengths).sample()
        >>> model.switch_posterior(z, lengths).shape
        torch.Size([5, 12, 3])
    """

    data_dim: int
    latent_dim: int
    num_states: int
    emission_dim: int
    rnn_dim: int

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        num_states: int,
        *,
        emission: str = "linear",
        emission_dim: int = 32,
        rnn_dim: int = 32,
        cell: str = "gru",
        stickiness: float = 0.9,
    ) -> None:
        super().__init__()
        sizes = {"data_dim": data_dim, "latent_dim": latent_dim, "num_states": num_states}
        for name, value in (sizes | {"emission_dim": emission_dim, "rnn_dim": rnn_dim}).items():
            setattr(self, name, whole_number(name, value))
        self.likelihood = one_of("emission", emission, ("linear", *EMISSIONS))
        self.cell, self.stickiness = one_of("cell", cell, CELLS), probability("stickiness", stickiness)
        D, J, S = data_dim, latent_dim, num_states
        self.initial_logits = nn.Parameter(torch.zeros(S))
        stay = math.log(stickiness / (1 - stickiness)) + math.log(max(1, S - 1))
        self.transition_logits = nn.Parameter(stay * torch.eye(S))
        self.weight = nn.Parameter(0.9 * torch.eye(J) + 0.1 * torch.randn(S, J, J))  # regimes must differ to part
        self.bias = nn.Parameter(0.1 * torch.randn(S, J))
        self.log_scale = nn.Parameter(torch.full((S, J), -1.0))
        self.below = nn.Parameter(torch.zeros(S, J, J))
        self.initial_loc = nn.Parameter(torch.zeros(S, J))
        self.initial_log_scale = nn.Parameter(torch.zeros(S, J))
        self.emission = (
            LinearEmission(torch.eye(D, J) + 0.1 * torch.randn(D, J), torch.zeros(D), torch.full((D,), 0.5))
            if emission == "linear"
            else Emission(J, emission_dim, D, emission)
        )
        self.rnn = Recurrent(2 * D, rnn_dim, cell, backwards=True)
        self.combiner = LinearCombiner(J, rnn_dim)
        self.z_q_0 = nn.Parameter(torch.zeros(J))

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build this architecture again."""
        names = ("data_dim", "latent_dim", "num_states", "emission_dim", "rnn_dim", "cell", "stickiness")
        return {name: getattr(self, name) for name in names} | {"emission": self.likelihood}

    def prior(self, num_steps: int, lengths: Tensor | None = None, inputs: Tensor | None = None) -> SwitchingSequence:
        """p(z), of event shape (T, J), the regimes summed out.

        Args:
            num_steps: T.
            lengths: (...), from 1 to T; None for T.
            inputs: None: the model has none.
        """
        _refuse(inputs)
        scale = torch.diag_embed(self.log_scale.exp()) + self.below.tril(-1)
        first = dist.Normal(self.initial_loc, self.initial_log_scale.exp()).to_event(1)
        moves = self.initial_logits, self.transition_logits, self.weight, self.bias, scale
        return SwitchingSequence(first, *moves, num_steps=num_steps, lengths=lengths)

    def encode(
        self, x: Tensor, lengths: Tensor | None = None, inputs: Tensor | None = None, mask: Tensor | None = None
    ) -> MarkovSequence:
        """q(z | x), of event shape (T, J).

        Args:
            x: observations, (M, T, D).
            lengths: (M,), from 1 to T; None for T.
            inputs: None: the model has none.
            mask: True where x was observed, (M, T, D) or (M, T, 1).
        """
        _refuse(inputs)
        observed = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand(x.shape)
        states = self.rnn(torch.cat([torch.where(observed, x, 0.0), observed.to(x)], -1), lengths)
        first = self.combiner(self.z_q_0, states[..., 0, :])
        return MarkovSequence(first, self.combiner, x.shape[-2], states, lengths)

    def switch_posterior(self, z: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Probabilities of the regimes given latents, p(s_t | z), (..., T, S); 0 in the padding.

        Args:
            z: (..., T, J), such as draws of ``encode(x, lengths)``.
            lengths: (...), from 1 to T; None for T.
        """
        return self.prior(z.shape[-2], lengths).switch_posterior(z)

    def smooth(self, *args: Any, **kwargs: Any) -> Tensor:
        """Paths of latents given all of x, (S, M, T, J): as :meth:`StateSpaceModel.smooth`."""
        return super().smooth(*args, **kwargs)[..., : self.latent_dim]  # of particles, which hold regimes too

    def _laws(self, x: Any, lengths: Any, inputs: Any, mask: Any, *, guided: bool) -> SequenceLaws:
        prior = self.prior(x.shape[1], lengths, inputs)
        chain = prior.chain()
        proposal = prior.proposed_by(self.encode(x, lengths, inputs, mask)) if guided else chain
        somewhere = self.bias.new_zeros(len(x), *chain.event_shape)
        emissions = Emissions(self._emitted, somewhere, None, lengths, mask)
        return SequenceLaws(proposal, chain, emissions, x)

    def _ahead(self, z: Tensor, num_steps: int, inputs: Tensor | None, last: Tensor) -> Tensor:
        """Draws of x_{n+1}, ..., x_{n+H}, (S, M, H, D), of (z_n, r_n) (S, M, J + S)."""
        transition = self.prior(num_steps, inputs=inputs).chain().transition
        path = MarkovSequence(transition(z), transition, num_steps).sample()
        return self.decode(path[..., : self.latent_dim]).sample()

    def _emitted(self, state: Tensor) -> TorchDistribution:
        law: TorchDistribution = self.emission(state[..., : self.latent_dim])
        return law


def _refuse(inputs: Tensor | None) -> None:
    if inputs is not None:
        raise ValueError(f"inputs: expected None, for the model has none, got shape {tuple(inputs.shape)}")
