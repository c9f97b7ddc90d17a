r"""The variational recurrent network: latents z_t, and a recurrence h_t that remembers them and the data.

    p(x, z) = prod_t p(z_t | h_{t-1}) p(x_t | z_t, h_{t-1})             arXiv:1506.02216, eqs. (5), (6), (8)
    h_t     = f(h_{t-1}, phi_x(x_t), phi_z(z_t))                        eq. (7): a gated recurrent unit
    q(z | x) = prod_t q(z_t | x_t, h_{t-1})                             eqs. (9), (10)

(Chung et al., arXiv:1506.02216.) The laws of z are Normal, with networks of h_{t-1} (and of phi_x(x_t), in q) for
their moments; phi_x and phi_z are networks too. Recurrence and features are shared by model and guide.

Given x, the pair s_t = (z_t, h_{t-1}) is a Markov chain, of whose state z_t alone is random: h_{t-1} follows from
s_{t-1} and x_{t-1}. So the Pyro site "z" is a :class:`pyro_vae.distributions.MarkovSequence` of shape (T, J + H), and
x_t's law is one of s_t. A path's density computes its h anew from its z, whatever it holds: then it is a function
of z and of parameters, whose gradient goes through all steps, for draws that are held fixed too.

The prior of z_t depends on the x before it ("teacher forcing"). What draws z and x jointly from the *program* is
therefore refused, the sleep phase among them: :meth:`VariationalRNN.sample` feeds its own x back, and so does
:meth:`VariationalRNN.forecast`.

What was not observed is zero to phi_x, and has no density. So a mask is part of the model's definition: h never sees
the values that :meth:`VariationalRNN.fill` draws, and what it draws at different steps depends on each other through
z alone.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import pad

from pyro_vae.arguments import one_of, whole_number
from pyro_vae.distributions import Emissions, MarkovSequence, WithMemory
from pyro_vae.models.deep_markov import EMISSIONS, Emission
from pyro_vae.models.registration import data_plate, register
from pyro_vae.models.state_space import StateSpaceModel, of_elements
from pyro_vae.networks import CELLS, MLP, softplus_scale
from pyro_vae.recurrence import scan

__all__ = ["RecallingSequence", "VariationalRNN"]


class _Memory(nn.Module):
    """h_t of s_t = (z_t, h_{t-1}) and phi_x(x_t) (arXiv:1506.02216, eq. (7))."""

    def __init__(self, latent_dim: int, hidden_dim: int, feature_dim: int) -> None:
        super().__init__()
        self.latent_dim, self.feature_dim = latent_dim, feature_dim
        self.features = MLP(latent_dim, (feature_dim,), feature_dim, "relu")  # phi_z
        self.cell, gates = CELLS["gru"](hidden_dim)
        self.into = nn.Linear(2 * feature_dim, gates * hidden_dim)
        self.start = nn.Parameter(torch.zeros(hidden_dim))

    def given(self, z: Tensor, seen: Tensor) -> Tensor:
        """What the cell is given of z_t (..., J) and phi_x(x_t) (..., F)."""
        found = self.features(z).relu()
        shape = torch.broadcast_shapes(found.shape, seen.shape)
        given: Tensor = self.into(torch.cat([seen.expand(shape), found.expand(shape)], -1))
        return given

    def forward(self, state: Tensor, seen: Tensor) -> Tensor:
        """h_t, (..., H)."""
        z, h = state[..., : self.latent_dim], state[..., self.latent_dim :]
        following: Tensor = self.cell(h, self.given(z, seen))
        return following

    def along(self, z: Tensor, seen: Tensor) -> Tensor:
        """h_0, ..., h_{T-1}, (..., T, H), of z_1, ..., z_T (..., T, J) and phi_x(x_0), ..., phi_x(x_{T-1})."""
        first = self.start.expand(*z.shape[:-2], -1)
        if z.shape[-2] == 1:
            return first[..., None, :]
        given = self.given(z[..., :-1, :], seen[..., 1:, :]).movedim(-2, 0)
        return torch.cat([first[None], scan(self.cell, first, [given])]).movedim(0, -2)


class _Step(nn.Module):
    """The law of s_t = (z_t, h_{t-1}), of s_{t-1}, of phi_x(x_{t-1}), and in a guide of phi_x(x_t) too."""

    def __init__(self, memory: _Memory, hidden_dim: int, feature_dim: int, sees_now: bool) -> None:
        super().__init__()
        self.memory, self.feature_dim = memory, feature_dim
        width = hidden_dim + (feature_dim if sees_now else 0)
        self.moments = MLP(width, (feature_dim,), 2 * memory.latent_dim, "relu")

    def law(self, h: Tensor, now: Tensor) -> TorchDistribution:
        """The law of s_t of h_{t-1} (..., H), and of phi_x(x_t) (..., F) or nothing (..., 0)."""
        shape = torch.broadcast_shapes(h.shape[:-1], now.shape[:-1])
        h = h.expand(*shape, -1)
        loc, raw = self.moments(torch.cat([h, now.expand(*shape, -1)], -1)).chunk(2, -1)
        return WithMemory(dist.Normal(loc, softplus_scale(raw)).to_event(1), h)

    def forward(self, state: Tensor, given: Tensor) -> TorchDistribution:
        """The law of s_t, event shape (J + H,), of s_{t-1} (..., J + H) and what is given (..., F) or (..., 2 F)."""
        h = self.memory(state, given[..., : self.feature_dim])
        return self.law(h, given[..., self.feature_dim :])


class RecallingSequence(MarkovSequence):
    """A Markov chain of states (z_t, h_{t-1}), whose h is computed anew from z wherever a density is taken.

    Its ``transition`` is a step of a :class:`VariationalRNN`.
    """

    follows_data = True
    """Whether the law depends on the data that are modelled: then it cannot be drawn from before they are."""

    def expand(self, batch_shape: Any, _instance: Any = None) -> RecallingSequence:
        """The same for a larger batch."""
        new: RecallingSequence = super().expand(batch_shape, _instance)
        new._kept = self._recollections
        return new

    @property
    def _recollections(self) -> list[tuple[Tensor, bool, Tensor]]:
        """The last path recalled, whether with gradients, and what was found; shared with what is expanded."""
        kept: list[tuple[Tensor, bool, Tensor]] = self.__dict__.setdefault("_kept", [])
        return kept

    def recalled(self, value: Tensor) -> Tensor:
        """A path (..., T, J + H) with the h that follow from its z; of a path that was drawn here, itself."""
        if self._drawn(value) is not None:
            return value
        kept, graded = self._recollections, torch.is_grad_enabled()
        if not (kept and kept[0][0] is value and kept[0][1] == graded):
            assert isinstance(self.transition, _Step)
            assert self.inputs is not None
            memory = self.transition.memory
            z = self._filled(value)[..., : memory.latent_dim]
            found = torch.cat([z, memory.along(z, self.inputs[..., : memory.feature_dim])], -1)
            kept[:] = [(value, graded, found)]
        return kept[0][2]

    def laws(self, value: Tensor) -> tuple[TorchDistribution, ...]:
        """The laws of s_1 and, if T > 1, of s_2, ..., s_T, (..., T - 1), each given the z before it in a path.

        Args:
            value: path, (..., T, J + H).
        """
        found: tuple[TorchDistribution, ...] = super().laws(self.recalled(value))
        return found


class _RecurrentEmission(nn.Module):
    """p(x_t | z_t, h_{t-1}) of s_t (arXiv:1506.02216, eq. (6))."""

    def __init__(self, memory: _Memory, emission: Emission) -> None:
        super().__init__()
        self.memory, self.emission = memory, emission

    def forward(self, state: Tensor, inputs: Tensor | None = None) -> dist.Distribution:
        """The law of x_t, event shape (D,), of s_t (..., J + H)."""
        z, h = state[..., : self.memory.latent_dim], state[..., self.memory.latent_dim :]
        law: dist.Distribution = self.emission(torch.cat([self.memory.features(z).relu(), h], -1))
        return law


class VariationalRNN(StateSpaceModel):
    """The variational recurrent network (Chung et al., arXiv:1506.02216).

    A path of the site "z" holds z_t and, behind it, h_{t-1}: z is ``path[..., :latent_dim]``; so do the particles and
    means of ``filter`` and ``filter_online``, and what ``smooth`` draws. Objectives and scorers
    that weigh draws of the guide take it, particle filters too; what moves latents (MCEM, annealed importance
    sampling) or dreams (wake-sleep) refuses it.

    Args:
        data_dim: D, size of an observation x_t.
        latent_dim: J, size of a latent z_t.
        hidden_dim: H, size of h_t.
        feature_dim: width of phi_x, phi_z and of the hidden layers of the laws' networks; H if None.
        emission: "bernoulli", "gaussian", "student-t" or "poisson".

    Raises:
        ValueError: an argument is out of its range; the message says what was expected.

    Example:
        >>> rnn = VariationalRNN(data_dim=5, latent_dim=2, hidden_dim=6)
        >>> x, lengths = torch.zeros(3, 7, 5), torch.tensor([7, 2, 4])
        >>> rnn.encode(x, lengths).sample().shape, rnn.sample(4, num_steps=9).shape
        (torch.Size([3, 7, 8]), torch.Size([4, 9, 5]))
    """

    data_dim: int
    latent_dim: int
    hidden_dim: int
    feature_dim: int

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        hidden_dim: int,
        *,
        feature_dim: int | None = None,
        emission: str = "bernoulli",
    ) -> None:
        super().__init__()
        sizes = {"data_dim": data_dim, "latent_dim": latent_dim, "hidden_dim": hidden_dim}
        for name, value in (sizes | {"feature_dim": hidden_dim if feature_dim is None else feature_dim}).items():
            setattr(self, name, whole_number(name, value))
        self.likelihood = one_of("emission", emission, EMISSIONS)
        J, H, F = self.latent_dim, self.hidden_dim, self.feature_dim
        self.features = MLP(data_dim, (F,), F, "relu")  # phi_x
        self.memory = _Memory(J, H, F)
        self.prior_step, self.guide_step = _Step(self.memory, H, F, False), _Step(self.memory, H, F, True)
        self.emission = _RecurrentEmission(self.memory, Emission(F + H, F, data_dim, emission))

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build this architecture again."""
        names = ("data_dim", "latent_dim", "hidden_dim", "feature_dim")
        return {name: getattr(self, name) for name in names} | {"emission": self.likelihood}

    def prior(
        self,
        num_steps: int,
        lengths: Tensor | None = None,
        inputs: Tensor | None = None,
        x: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> RecallingSequence:
        """prod_t p(z_t | h_{t-1}), of event shape (T, J + H), given the x that h has seen before.

        Args:
            num_steps: T.
            lengths: (...), from 1 to T; None for T.
            inputs: None: the model has none.
            x: observations, (..., T, D).
            mask: True where x was observed, (..., T, D) or (..., T, 1).

        Raises:
            ValueError: there is no x, or one of other steps.
        """
        if x is None or x.shape[-2:] != (num_steps, self.data_dim):
            got = None if x is None else tuple(x.shape)
            raise ValueError(f"x: expected observations (..., {num_steps}, {self.data_dim}), got {got}")
        before, _ = self._seen(x, inputs, mask)
        return _sequence(self.prior_step, before, before[..., :0], lengths)

    def encode(
        self, x: Tensor, lengths: Tensor | None = None, inputs: Tensor | None = None, mask: Tensor | None = None
    ) -> RecallingSequence:
        """prod_t q(z_t | x_t, h_{t-1}), of event shape (T, J + H).

        Args:
            x: observations, (M, T, D).
            lengths: (M,), from 1 to T; None for T.
            inputs: None: the model has none.
            mask: True where x was observed, (M, T, D) or (M, T, 1).
        """
        return _sequence(self.guide_step, *self._seen(x, inputs, mask), lengths)

    def model(
        self, x: Tensor, lengths: Tensor | None = None, inputs: Tensor | None = None, mask: Tensor | None = None
    ) -> None:
        """p(x, z) of a minibatch of sequences: Pyro sites "z" and "x" in the plate "data".

        Args:
            x: observations, (M, T, D).
            lengths: (M,); None for T.
            inputs: None: the model has none.
            mask: True where x was observed, (M, T, D), (M, T, 1) or (M, T).
        """
        register(self)
        mask = of_elements(mask, x)
        with data_plate(x):
            prior = self.prior(x.shape[-2], lengths, inputs, x, mask)
            path = pyro.sample("z", prior)
            states = prior.recalled(path)
            # Of all steps at once by what their z recall; of one step, which a particle filter asks for, by its state.
            emitted = Emissions(lambda _: self.emission(states), path, lengths=lengths, mask=mask)
            emitted.law = self.emission
            pyro.sample("x", emitted, obs=x)

    @torch.no_grad()
    def sample(self, n: int, num_steps: int, *, inputs: Tensor | None = None, mean: bool = False) -> Tensor:
        """Simulate the model, whose h sees the x that it has drawn.

        Args:
            n: how many sequences.
            num_steps: T.
            inputs: None: the model has none.
            mean: give E[x_t | z_t, h_{t-1}] instead of a draw of x_t; h sees the draws.

        Returns:
            Tensor (n, T, D).
        """
        _refuse(inputs)
        return self._fed_back(self.memory.start.expand(n, -1), whole_number("num_steps", num_steps), mean)

    def _fed_back(self, h: Tensor, num_steps: int, mean: bool = False) -> Tensor:
        """Draws of x_{n+1}, ..., x_{n+H} (..., H, D), or their means, of h_n (..., H), which goes on with the draws."""
        steps = []
        for _ in range(num_steps):
            state = self.prior_step.law(h, h[..., :0]).sample()
            law = self.emission(state)
            x = law.sample()
            steps.append(law.mean if mean else x)
            h = self.memory(state, self._features(x))
        return torch.stack(steps, -2)

    def _ahead(self, z: Tensor, num_steps: int, inputs: Tensor | None, last: Tensor) -> Tensor:
        """Draws of x_{n+1}, ..., x_{n+H}, (S, M, H, D), of s_n (S, M, J + H) and of x_n (M, D), which h_n has seen."""
        return self._fed_back(self.memory(z, self._features(last)), num_steps)

    def _features(self, x: Tensor) -> Tensor:
        found: Tensor = self.features(x).relu()
        return found

    def _seen(self, x: Tensor, inputs: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """phi_x of the steps before and of the steps, each (..., T, F); zero before the first."""
        _refuse(inputs)
        now = self._features(x if mask is None else torch.where(mask, x, 0.0))
        return pad(now[..., :-1, :], (0, 0, 1, 0)), now


def _sequence(step: _Step, before: Tensor, now: Tensor, lengths: Tensor | None) -> RecallingSequence:
    first = step.law(step.memory.start, now[..., 0, :])
    return RecallingSequence(first, step, before.shape[-2], torch.cat([before, now], -1), lengths)


def _refuse(inputs: Tensor | None) -> None:
    if inputs is not None:
        raise ValueError(f"inputs: expected None, for the model has none, got shape {tuple(inputs.shape)}")
