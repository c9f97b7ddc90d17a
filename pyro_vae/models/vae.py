"""The variational auto-encoder of the paper's Section 3 and Appendix C, as a Pyro model and guide.

p(z) = N(z; 0, I)                                     the prior, z of J dimensions
p(x | z)                                              Bernoulli or Gaussian, by an MLP of z (the decoder)
q(z | x) = N(z; mu(x), diag sigma^2(x))               by a Gaussian MLP of x (the encoder), eq. (9)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.arguments import one_of, whole_number
from pyro_vae.models.registration import register
from pyro_vae.networks import ACTIVATIONS, MLP, GaussianMLP, init_paper

__all__ = ["VAE", "positive_ints"]

LIKELIHOODS = ("bernoulli", "gaussian")
INITS = ("default", "paper")
_SCALE_BOUNDS = (1 / 255, 1.0)


class VAE(nn.Module):
    """A variational auto-encoder (Kingma & Welling, arXiv:1312.6114, Sec. 3 and App. C).

    Args:
        data_shape: shape of one datum, for example (784,), (28, 28) or (32, 32, 3).
        latent_dim: J, the dimension of z, at least 1.
        hidden_dims: widths of the encoder's hidden layers; the decoder has them in reverse.
        likelihood: "bernoulli" for binary data (eq. (11)), or "gaussian" for data in [0, 1]: mean squashed to (0, 1)
            and variance learned, both functions of z (eq. (12); the paper's Frey Face model). The standard deviation
            is kept within [1/255, 1], the step and the range of 8-bit levels: without a floor the density of a pixel
            that never changes has no bound.
        activation: "tanh" (the paper's), "relu" or "softplus".
        init: "default" (torch's) or "paper": every parameter from N(0, 0.01).

    Raises:
        ValueError: an argument is out of its range; the message says what was expected.

    Example:
        >>> vae = VAE(data_shape=(28, 28), latent_dim=2, hidden_dims=(16,))
        >>> x = torch.zeros(5, 28, 28)
        >>> vae.encode(x).sample().shape, vae.decode(torch.zeros(7, 5, 2)).sample().shape
        (torch.Size([5, 2]), torch.Size([7, 5, 28, 28]))
        >>> vae.sample(3).shape
        torch.Size([3, 28, 28])
    """

    def __init__(
        self,
        data_shape: Sequence[int] = (784,),
        latent_dim: int = 20,
        hidden_dims: Sequence[int] = (500,),
        likelihood: str = "bernoulli",
        activation: str = "tanh",
        init: str = "default",
    ) -> None:
        super().__init__()
        self.data_shape = positive_ints("data_shape", (data_shape,) if isinstance(data_shape, int) else data_shape)
        (self.latent_dim,) = positive_ints("latent_dim", (latent_dim,))
        self.hidden_dims = positive_ints("hidden_dims", hidden_dims, may_be_empty=True)
        self.likelihood = one_of("likelihood", likelihood, LIKELIHOODS)
        self.activation = one_of("activation", activation, tuple(ACTIVATIONS))
        self.init = one_of("init", init, INITS)
        data_dim = math.prod(self.data_shape)
        self.encoder = GaussianMLP(data_dim, self.hidden_dims, self.latent_dim, activation)
        decoder_dims = self.latent_dim, self.hidden_dims[::-1], data_dim, activation
        self.decoder = (
            MLP(*decoder_dims) if likelihood == "bernoulli" else GaussianMLP(*decoder_dims, scale_bounds=_SCALE_BOUNDS)
        )
        if init == "paper":
            init_paper(self)

    @property
    def data_range(self) -> tuple[float, float]:
        """The least and the greatest value that data may have: both likelihoods' means lie between them."""
        return 0.0, 1.0

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build this architecture again: ``VAE(**vae.config)``."""
        names = ("data_shape", "latent_dim", "hidden_dims", "likelihood", "activation", "init")
        return {name: getattr(self, name) for name in names}

    def model(self, x: Tensor) -> None:
        """p(x, z) of a minibatch x (M, *data_shape): Pyro sites "z" and "x" in the plate "data"."""
        register(self)
        prior = dist.Normal(x.new_zeros(self.latent_dim), x.new_ones(self.latent_dim)).to_event(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", self.decode(z), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x) of a minibatch x (M, *data_shape): Pyro site "z" in the plate "data"."""
        register(self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encode(x))

    def encode(self, x: Tensor) -> dist.Distribution:
        """q(z | x): batch shape (...,), event shape (J,).

        Args:
            x: data, (..., *data_shape).
        """
        loc, scale = self.encoder(x.flatten(x.ndim - len(self.data_shape)))
        return dist.Normal(loc, scale).to_event(1)

    def decode(self, z: Tensor) -> dist.Distribution:
        """p(x | z): batch shape (...,), event shape ``data_shape``.

        Args:
            z: latents, (..., J).
        """
        if self.likelihood == "bernoulli":
            likelihood = dist.Bernoulli(logits=self._as_datum(self.decoder(z)))
        else:
            loc, scale = map(self._as_datum, self.decoder(z))
            likelihood = dist.Normal(loc.sigmoid(), scale)
        return likelihood.to_event(len(self.data_shape))

    @torch.no_grad()
    def sample(self, n: int, *, mean: bool = False) -> Tensor:
        """Draw n data from the model: z from the prior, then x from p(x | z).

        Args:
            n: how many.
            mean: give E[x | z] instead of a draw of x (grey levels for a Bernoulli likelihood).

        Returns:
            Tensor (n, *data_shape).
        """
        parameter = next(self.parameters())
        likelihood = self.decode(torch.randn(n, self.latent_dim, device=parameter.device, dtype=parameter.dtype))
        x: Tensor = likelihood.mean if mean else likelihood.sample()
        return x

    def _as_datum(self, flat: Tensor) -> Tensor:
        return flat.reshape(*flat.shape[:-1], *self.data_shape)


def positive_ints(name: str, values: Sequence[int], *, may_be_empty: bool = False) -> tuple[int, ...]:
    """The sizes as a tuple, if they are whole numbers of at least 1."""
    numbers = tuple(whole_number(name, value) for value in values)
    if not (numbers or may_be_empty):
        raise ValueError(f"{name}: expected at least one whole number, got {values!r}")
    return numbers
