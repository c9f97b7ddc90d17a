r"""Stochastic volatility: a classical model of returns, learned by maximum likelihood through a learned guide.

    h_1 ~ N(mu, sigma^2 / (1 - phi^2)),    h_t = mu + phi (h_{t-1} - mu) + sigma eta_t,    x_t = exp(h_t / 2) e_t

h_t is the log variance of a return x_t, and follows a stationary autoregression (Taylor 1982; Kim, Shephard & Chib
1998, eq. (1)); e_t is normal, or Student's t for heavier tails. The likelihood of mu, phi and sigma is an integral over
h that has no closed form. The guide q(h_t | h_{t-1}, x) is linear in h_{t-1}, with coefficients from a network of
x_t, ..., x_T.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.arguments import one_of, positive_number, whole_number
from pyro_vae.distributions import MarkovSequence
from pyro_vae.models.combiner import LinearCombiner
from pyro_vae.models.state_space import StateSpaceModel
from pyro_vae.networks import CELLS, Recurrent

__all__ = ["StochasticVolatility"]

LIKELIHOODS = ("gaussian", "student-t")
_FLOOR = 1e-4  # of a squared return whose expectation is about 1, before its logarithm


class _Autoregression(nn.Module):
    """p(h_t | h_{t-1}) of D series, each with its own mu, phi and sigma."""

    def __init__(self, data_dim: int, mu: float, phi: float, sigma: float) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.full((data_dim,), mu))
        self.raw_phi = nn.Parameter(torch.full((data_dim,), math.atanh(phi)))
        self.log_sigma = nn.Parameter(torch.full((data_dim,), math.log(sigma)))

    def stationary(self) -> dist.Distribution:
        """The law of h_1, event shape (D,)."""
        # 1 - tanh(a)^2 = 1 / cosh(a)^2, whose root loses no digits where phi is close to 1
        return dist.Normal(self.mu, self.log_sigma.exp() * self.raw_phi.cosh()).to_event(1)

    def forward(self, h: Tensor) -> dist.Distribution:
        """The law of h_t, event shape (D,), of h_{t-1} (..., D)."""
        return dist.Normal(self.mu + self.raw_phi.tanh() * (h - self.mu), self.log_sigma.exp()).to_event(1)


class _Returns(nn.Module):
    """p(x_t | h_t)."""

    def __init__(self, data_dim: int, likelihood: str) -> None:
        super().__init__()
        self.log_df = nn.Parameter(torch.full((data_dim,), 2.0)) if likelihood == "student-t" else None

    def forward(self, h: Tensor, inputs: Tensor | None = None) -> dist.Distribution:
        """The law of x_t, event shape (D,), of h_t (..., D)."""
        scale = (0.5 * h).exp()
        if self.log_df is None:
            return dist.Normal(torch.zeros_like(scale), scale).to_event(1)
        return dist.StudentT(2 + self.log_df.exp(), torch.zeros_like(scale), scale).to_event(1)


class StochasticVolatility(StateSpaceModel):
    """Returns whose log variance is a latent autoregression (Taylor 1982; Kim, Shephard & Chib 1998).

    D series side by side, such as D assets, each independent of the others, with parameters of its own. These are
    learned by ``fit``; what they are is read from the attributes.

    Args:
        data_dim: D.
        likelihood: of returns given their variance: "gaussian", or "student-t" with degrees of freedom above 2 that
            are learned; exp(h_t / 2) is its scale, then.
        rnn_dim: H, width of the guide's recurrent network.
        cell: of that network: "tanh", "relu", "gru" or "lstm".
        mu: level of h to begin at: the log variance of the returns, if it is known.
        phi: its persistence to begin at, in (-1, 1).
        sigma: its innovations' standard deviation to begin at.

    Attributes:
        mu: (D,).
        phi: (D,), in (-1, 1).
        sigma: (D,), positive.
        df: degrees of freedom, (D,); None for a Gaussian likelihood.

    Raises:
        ValueError: an argument is out of its range; the message says what was expected.

    Example:
        >>> model = StochasticVolatility(data_dim=2, rnn_dim=4)
        >>> returns = model.sample(3, num_steps=50)
        >>> model.encode(returns, lengths=torch.tensor([50, 7, 20])).sample().shape
        torch.Size([3, 50, 2])
    """

    emission: _Returns

    def __init__(
        self,
        data_dim: int = 1,
        likelihood: str = "gaussian",
        *,
        rnn_dim: int = 32,
        cell: str = "gru",
        mu: float = 0.0,
        phi: float = 0.9,
        sigma: float = 0.3,
    ) -> None:
        super().__init__()
        self.data_dim, self.rnn_dim = whole_number("data_dim", data_dim), whole_number("rnn_dim", rnn_dim)
        self.likelihood, self.cell = one_of("likelihood", likelihood, LIKELIHOODS), one_of("cell", cell, CELLS)
        if not math.isfinite(mu):
            raise ValueError(f"mu: expected a finite number, got {mu!r}")
        if not -1 < phi < 1:
            raise ValueError(f"phi: expected a number between -1 and 1, got {phi!r}")
        positive_number("sigma", sigma)
        self._started_at = {"mu": float(mu), "phi": float(phi), "sigma": float(sigma)}
        self.dynamics = _Autoregression(data_dim, **self._started_at)
        self.emission = _Returns(data_dim, likelihood)
        self.level = nn.Parameter(torch.full((data_dim,), float(mu)))  # that the guide sees returns against
        self.rnn = Recurrent(2 * data_dim, rnn_dim, cell, backwards=True)
        self.combiner = LinearCombiner(data_dim, rnn_dim, diagonal=True, loc=float(mu))
        self.h_q_0 = nn.Parameter(torch.full((data_dim,), float(mu)))

    @property
    def mu(self) -> Tensor:
        """Level of the log variance, (D,)."""
        return self.dynamics.mu.detach()

    @property
    def phi(self) -> Tensor:
        """Its persistence, (D,)."""
        return self.dynamics.raw_phi.detach().tanh()

    @property
    def sigma(self) -> Tensor:
        """Standard deviation of its innovations, (D,)."""
        return self.dynamics.log_sigma.detach().exp()

    @property
    def df(self) -> Tensor | None:
        """Degrees of freedom of returns given their variance, (D,); None if they are Gaussian."""
        return None if self.emission.log_df is None else 2 + self.emission.log_df.detach().exp()

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build this architecture again."""
        names = ("data_dim", "likelihood", "rnn_dim", "cell")
        return {name: getattr(self, name) for name in names} | self._started_at

    def prior(self, num_steps: int, lengths: Tensor | None = None, inputs: Tensor | None = None) -> MarkovSequence:
        """p(h), of event shape (T, D).

        Args:
            num_steps: T.
            lengths: (...), from 1 to T; None for T.
            inputs: None: the model has none.
        """
        _refuse(inputs)
        return MarkovSequence(self.dynamics.stationary(), self.dynamics, num_steps, lengths=lengths)

    def encode(
        self, x: Tensor, lengths: Tensor | None = None, inputs: Tensor | None = None, mask: Tensor | None = None
    ) -> MarkovSequence:
        """q(h | x), of event shape (T, D).

        Args:
            x: returns, (M, T, D).
            lengths: (M,), from 1 to T; None for T.
            inputs: None: the model has none.
            mask: True where x was observed, (M, T, D) or (M, T, 1).
        """
        _refuse(inputs)
        states = self.rnn(self._seen(x, mask), lengths)
        first = self.combiner(self.h_q_0, states[..., 0, :])
        return MarkovSequence(first, self.combiner, x.shape[-2], states, lengths)

    def _seen(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The logarithm of squared returns, in which h_t is a level beside noise; and which were observed."""
        observed = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand(x.shape)
        standardised = torch.where(observed, x, 0.0) * (-0.5 * self.level).exp()
        logs = torch.where(observed, (standardised.square() + _FLOOR).log(), 0.0)
        return torch.cat([0.5 * logs, observed.to(x)], -1)


def _refuse(inputs: Tensor | None) -> None:
    if inputs is not None:
        raise ValueError(f"inputs: expected None, for the model has none, got shape {tuple(inputs.shape)}")
