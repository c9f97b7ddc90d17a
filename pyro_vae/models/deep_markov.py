"""The deep Markov model: a state-space model whose transition, emission and posterior are networks.

    p(z_t | z_{t-1}) = N(mu(z_{t-1}), diag sigma^2(z_{t-1}))          by a gated network
    p(x_t | z_t)                                                      by an MLP
    q(z_t | z_{t-1}, x) = N(mu(c_t), diag sigma^2(c_t))               c_t combines z_{t-1} with recurrent networks of x

The true posterior of z_t depends on z_{t-1} and on x_t, ..., x_T alone; "st-r" has this form. The other guides are the
paper's Table 1: "st-l" sees the past, "st-lr" both; "mf-lr" and "mf-r" see no z_{t-1}, and are mean-field.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import AffineAutoregressive
from pyro.nn import AutoRegressiveNN
from torch import Tensor, nn

from pyro_vae.arguments import one_of, whole_number
from pyro_vae.distributions import MarkovSequence
from pyro_vae.models.state_space import StateSpaceModel
from pyro_vae.networks import CELLS, LEAST_SCALE, MLP, Recurrent, softplus_scale

__all__ = ["DeepMarkovModel", "Emission", "GatedTransition"]

GUIDES = ("st-r", "st-l", "st-lr", "mf-lr", "mf-r")
EMISSIONS = ("bernoulli", "gaussian", "student-t", "poisson")


class GatedTransition(nn.Module):
    """p(z_t | z_{t-1}) by a gate between a linear and a non-linear mean (Krishnan et al., arXiv:1609.09869, Sec. 5).

    Args:
        latent_dim: J.
        hidden_dim: width of the hidden layers.
        input_dim: U, of exogenous inputs that it sees beside z_{t-1}; 0 for none.

    Example:
        >>> GatedTransition(3, 8)(torch.zeros(5, 3)).event_shape
        torch.Size([3])
    """

    def __init__(self, latent_dim: int, hidden_dim: int, input_dim: int = 0) -> None:
        super().__init__()
        seen = latent_dim + input_dim
        self.gate = MLP(seen, (hidden_dim,), latent_dim, "relu")
        self.proposed = MLP(seen, (hidden_dim,), latent_dim, "relu")
        self.linear = nn.Linear(latent_dim, latent_dim)
        self.scale = nn.Linear(latent_dim, latent_dim)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, z: Tensor, inputs: Tensor | None = None) -> dist.Distribution:
        """The law of z_t, event shape (J,), of z_{t-1} (..., J) and u_t (..., U)."""
        seen = _beside(z, inputs)
        gate, proposed = self.gate(seen).sigmoid(), self.proposed(seen)
        loc = (1 - gate) * self.linear(z) + gate * proposed
        return dist.Normal(loc, softplus_scale(self.scale(proposed.relu()))).to_event(1)


class Emission(nn.Module):
    """p(x_t | z_t) by an MLP with two hidden layers (Krishnan et al., arXiv:1609.09869, Sec. 5).

    Args:
        latent_dim: J.
        hidden_dim: width of the hidden layers.
        data_dim: D.
        likelihood: "bernoulli"; "gaussian" or "student-t" with scales (and degrees of freedom above 2) that are
            parameters; or "poisson" with a log link.
        input_dim: U, of exogenous inputs that it sees beside z_t; 0 for none.
    """

    def __init__(
        self, latent_dim: int, hidden_dim: int, data_dim: int, likelihood: str = "bernoulli", input_dim: int = 0
    ) -> None:
        super().__init__()
        self.likelihood = one_of("emission", likelihood, EMISSIONS)
        self.network = MLP(latent_dim + input_dim, (hidden_dim, hidden_dim), data_dim, "relu")
        if likelihood in ("gaussian", "student-t"):
            self.log_scale = nn.Parameter(torch.zeros(data_dim))
        if likelihood == "student-t":
            self.log_df = nn.Parameter(torch.full((data_dim,), 2.0))

    def forward(self, z: Tensor, inputs: Tensor | None = None) -> dist.Distribution:
        """The law of x_t, event shape (D,), of z_t (..., J) and u_t (..., U)."""
        found = self.network(_beside(z, inputs))
        if self.likelihood == "bernoulli":
            return dist.Bernoulli(logits=found).to_event(1)
        if self.likelihood == "poisson":
            return dist.Poisson(found.exp()).to_event(1)
        scale = self.log_scale.exp() + LEAST_SCALE
        if self.likelihood == "gaussian":
            return dist.Normal(found, scale).to_event(1)
        return dist.StudentT(2 + self.log_df.exp(), found, scale).to_event(1)


class _Flow(AffineAutoregressive):  # type: ignore[misc]
    """An inverse autoregressive flow whose inverse can be recorded, and that can be copied.

    Pyro's reads the order of the elements from a tensor, and keeps tensors of its last draw that no copy may have.
    """

    def __init__(self, latent_dim: int, hidden_dim: int, number: int) -> None:
        order = list(range(latent_dim))[:: -1 if number % 2 else 1]  # the other way round from flow to flow
        super().__init__(AutoRegressiveNN(latent_dim, [hidden_dim], permutation=torch.tensor(order)), stable=True)
        self.order = order
        self._inverse = self._inverse_in_order

    def _inverse_in_order(self, y: Tensor) -> Tensor:
        x = list(torch.zeros_like(y).unbind(-1))
        for place in self.order:
            mean, logit = self.arn(torch.stack(x, -1))
            inverse_scale = 1 + torch.exp(-logit[..., place] - self.sigmoid_bias)
            x[place] = inverse_scale * y[..., place] + (1 - inverse_scale) * mean[..., place]
        self._cached_log_scale = self.logsigmoid(logit + self.sigmoid_bias)
        return torch.stack(x, -1)

    def __getstate__(self) -> dict[str, Any]:
        kept: dict[str, Any] = super().__getstate__()
        return kept | {"_cached_x_y": (None, None), "_cached_log_scale": None}


class _Combiner(nn.Module):
    """q(z_t | z_{t-1}, h_t) (Krishnan et al., arXiv:1609.09869, Sec. 4 and Table 1).

    Args:
        latent_dim: J.
        rnn_dim: H.
        num_directions: recurrent networks whose states it is given, one after the other.
        structured: whether it sees z_{t-1}.
        num_flows: layers of an inverse autoregressive flow on top.
        flow_dim: width of the flow's hidden layer.
    """

    def __init__(
        self, latent_dim: int, rnn_dim: int, num_directions: int, structured: bool, num_flows: int, flow_dim: int
    ) -> None:
        super().__init__()
        self.num_directions = num_directions
        self.before = nn.Linear(latent_dim, rnn_dim) if structured else None
        self.moments = nn.Linear(rnn_dim, 2 * latent_dim)
        self.flows = nn.ModuleList(_Flow(latent_dim, flow_dim, number) for number in range(num_flows))

    def forward(self, z: Tensor, states: Tensor) -> dist.Distribution:
        """The law of z_t, event shape (J,), of z_{t-1} (..., J) and the networks' states (..., num_directions H)."""
        parts = list(states.chunk(self.num_directions, -1))
        if self.before is not None:
            parts.append(self.before(z).tanh())
        combined = torch.stack(torch.broadcast_tensors(*parts)).mean(0)
        loc, raw = self.moments(combined).chunk(2, -1)
        base = dist.Normal(loc, softplus_scale(raw))
        if not self.flows:
            return base.to_event(1)
        return dist.TransformedDistribution(base.to_event(1), list(self.flows))


class DeepMarkovModel(StateSpaceModel):
    """The deep Markov model (Krishnan, Shalit & Sontag, arXiv:1609.09869), with its structured inference networks.

    Train it with ``pv.SGVB(estimator="B")``, whose KL divergences are in closed form step by step, and
    ``fit(..., kl_warmup=...)``, as the paper does.

    Args:
        data_dim: D, size of an observation x_t.
        latent_dim: J, size of a latent z_t.
        transition_dim: width of the transition's hidden layers.
        emission_dim: width of the emission's.
        rnn_dim: H, width of the guide's recurrent networks.
        guide: "st-r" (z_{t-1} and the future), "st-l" (z_{t-1} and the past), "st-lr" (all three), "mf-lr" or "mf-r"
            (without z_{t-1}: mean-field).
        emission: "bernoulli", "gaussian", "student-t" or "poisson".
        cell: of the recurrent networks: "tanh", "relu", "gru" or "lstm" (the paper's).
        num_flows: layers of an inverse autoregressive flow on q(z_t | z_{t-1}, x) (arXiv:1606.04934).
        flow_dim: width of their hidden layer.
        input_dim: U, of exogenous inputs u_t that transition, emission and guide see; 0 for none.
        missing: tell the guide which values were observed, for data with gaps.

    Raises:
        ValueError: an argument is out of its range; the message says what was expected.

    Example:
        >>> dmm = DeepMarkovModel(data_dim=5, latent_dim=2, transition_dim=4, emission_dim=4, rnn_dim=6)
        >>> x, lengths = torch.zeros(3, 7, 5), torch.tensor([7, 2, 4])
        >>> dmm.encode(x, lengths).sample().shape, dmm.sample(4, num_steps=9).shape
        (torch.Size([3, 7, 2]), torch.Size([4, 9, 5]))
    """

    def __init__(
        self,
        data_dim: int = 88,
        latent_dim: int = 100,
        transition_dim: int = 200,
        emission_dim: int = 100,
        rnn_dim: int = 600,
        guide: str = "st-r",
        emission: str = "bernoulli",
        cell: str = "tanh",
        num_flows: int = 0,
        flow_dim: int = 100,
        input_dim: int = 0,
        missing: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"data_dim": data_dim, "latent_dim": latent_dim, "transition_dim": transition_dim}
        sizes |= {"emission_dim": emission_dim, "rnn_dim": rnn_dim, "flow_dim": flow_dim}
        for name, value in sizes.items():
            setattr(self, name, whole_number(name, value))
        self.num_flows = whole_number("num_flows", num_flows, least=0)
        self.input_dim = whole_number("input_dim", input_dim, least=0)
        self.guide_kind = one_of("guide", guide, GUIDES)
        self.cell, self.missing = one_of("cell", cell, CELLS), bool(missing)
        self.transition = GatedTransition(latent_dim, transition_dim, input_dim)
        self.likelihood = emission
        self.emission = Emission(latent_dim, emission_dim, data_dim, emission, input_dim)
        structured, _, sides = guide.partition("-")
        seen = data_dim * (2 if missing else 1) + input_dim
        self.rnns = nn.ModuleList(Recurrent(seen, rnn_dim, cell, backwards=side == "r") for side in sides)
        self.combiner = _Combiner(latent_dim, rnn_dim, len(sides), structured == "st", num_flows, flow_dim)
        self.z_0 = nn.Parameter(torch.zeros(latent_dim))
        self.z_q_0 = nn.Parameter(torch.zeros(latent_dim))

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build this architecture again: ``DeepMarkovModel(**dmm.config)``."""
        names = ["data_dim", "latent_dim", "transition_dim", "emission_dim", "rnn_dim", "cell", "num_flows", "flow_dim"]
        found = {name: getattr(self, name) for name in (*names, "input_dim", "missing")}
        return found | {"guide": self.guide_kind, "emission": self.likelihood}

    def prior(self, num_steps: int, lengths: Tensor | None = None, inputs: Tensor | None = None) -> MarkovSequence:
        """p(z), of event shape (T, J): z_1 follows a z_0 that is a parameter.

        Args:
            num_steps: T.
            lengths: (...), from 1 to T; None for T.
            inputs: exogenous inputs, (..., T, U).
        """
        given = self._given(inputs)
        first = self.transition(self.z_0, None if given is None else given[..., 0, :])
        return MarkovSequence(first, self.transition, num_steps, given, lengths)

    def encode(
        self, x: Tensor, lengths: Tensor | None = None, inputs: Tensor | None = None, mask: Tensor | None = None
    ) -> MarkovSequence:
        """q(z | x), of event shape (T, J).

        Args:
            x: observations, (M, T, D).
            lengths: (M,), from 1 to T; None for T.
            inputs: exogenous inputs, (M, T, U).
            mask: True where x was observed, (M, T, D) or (M, T, 1).
        """
        seen = _beside(self._observed(x, mask), self._given(inputs))
        states = torch.cat([rnn(seen, lengths) for rnn in self.rnns], -1)
        first = self.combiner(self.z_q_0, states[..., 0, :])
        return MarkovSequence(first, self.combiner, x.shape[-2], states, lengths)

    def _observed(self, x: Tensor, mask: Tensor | None) -> Tensor:
        mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand(x.shape)
        x = torch.where(mask, x, 0.0)
        return torch.cat([x, mask.to(x)], -1) if self.missing else x

    def _given(self, inputs: Tensor | None) -> Tensor | None:
        width = 0 if inputs is None else inputs.shape[-1]
        if width != self.input_dim:
            raise ValueError(f"inputs: expected {self.input_dim} values for each step (input_dim), got {width}")
        return inputs


def _beside(z: Tensor, inputs: Tensor | None) -> Tensor:
    if inputs is None:
        return z
    shape = torch.broadcast_shapes(z.shape[:-1], inputs.shape[:-1])
    return torch.cat([z.expand(*shape, -1), inputs.expand(*shape, -1)], -1)
