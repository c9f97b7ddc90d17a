"""The sigmoid belief network with its recognition network: a Helmholtz machine of binary units.

    p(z_L) = Bernoulli(sigmoid(b))                       the top layer
    p(z_l | z_l+1) = Bernoulli(sigmoid(W z_l+1 + b))     down to z_1, and so for x given z_1
    q(z_1 | x), q(z_l+1 | z_l)                           likewise, bottom-up

(Neal, 1992; Dayan, Hinton, Neal & Zemel, 1995.) Binary draws have no reparameterised sample: it is trained by
wake-sleep, reweighted wake-sleep or VIMCO, and SGVB refuses it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.models.registration import register
from pyro_vae.models.vae import positive_ints

__all__ = ["SigmoidBeliefNetwork"]


class SigmoidBeliefNetwork(nn.Module):
    """Layers of Bernoulli units with a bottom-up guide (Neal 1992; Bornschein & Bengio, arXiv:1406.2751, Sec. 4).

    Args:
        data_shape: shape of one binary datum.
        latent_dims: units of each layer, from the data upwards: Pyro sites "z_1", "z_2", ...

    Raises:
        ValueError: a size is not a whole number of at least 1.

    Example:
        >>> network = SigmoidBeliefNetwork(data_shape=(28, 28), latent_dims=(200, 50))
        >>> network.sample(3).shape
        torch.Size([3, 28, 28])
    """

    def __init__(self, data_shape: Sequence[int] = (784,), latent_dims: Sequence[int] = (200,)) -> None:
        super().__init__()
        self.data_shape = positive_ints("data_shape", data_shape)
        self.latent_dims = positive_ints("latent_dims", latent_dims)
        dims = (math.prod(self.data_shape), *self.latent_dims)
        self.up = nn.ModuleList(nn.Linear(low, high) for low, high in itertools.pairwise(dims))
        self.down = nn.ModuleList(nn.Linear(high, low) for low, high in itertools.pairwise(dims))
        self.top_logits = nn.Parameter(torch.zeros(dims[-1]))

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build this architecture again."""
        return {"data_shape": self.data_shape, "latent_dims": self.latent_dims}

    def model(self, x: Tensor) -> None:
        """p(x, z) of a minibatch x (M, *data_shape): sites "z_L", ..., "z_1" and "x" in the plate "data"."""
        register(self)
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.decode(self._descend()), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x) of a minibatch x (M, *data_shape): sites "z_1", ..., "z_L" in the plate "data"."""
        register(self)
        units = x.flatten(1)
        with pyro.plate("data", len(x)):
            for number, layer in enumerate(self.up, 1):
                units = pyro.sample(f"z_{number}", _bernoulli(layer(units)))

    def decode(self, z: Tensor) -> dist.Distribution:
        """p(x | z_1) of units z_1 (..., latent_dims[0]): event shape ``data_shape``."""
        logits = self.down[0](z)
        logits = logits.reshape(*logits.shape[:-1], *self.data_shape)
        return dist.Bernoulli(logits=logits).to_event(len(self.data_shape))

    def _descend(self) -> Tensor:
        """Sample the layers from the top to z_1."""
        units = pyro.sample(f"z_{len(self.down)}", _bernoulli(self.top_logits))
        for number in range(len(self.down) - 1, 0, -1):
            units = pyro.sample(f"z_{number}", _bernoulli(self.down[number](units)))
        drawn: Tensor = units
        return drawn

    @torch.no_grad()
    def sample(self, n: int, *, mean: bool = False) -> Tensor:
        """Draw n data from the model, or the means of p(x | z_1): (n, *data_shape)."""
        with pyro.plate("data", n):
            likelihood = self.decode(self._descend())
        x: Tensor = likelihood.mean if mean else likelihood.sample()
        return x


def _bernoulli(logits: Tensor) -> dist.Distribution:
    return dist.Bernoulli(logits=logits).to_event(1)
