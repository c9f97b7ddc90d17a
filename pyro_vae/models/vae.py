"""The variational auto-encoder of the paper's Section 3 and Appendix C, as a Pyro model and guide.

p(z) = N(z; 0, I)                                     the prior, z of J dimensions
p(x | z)                                              Bernoulli or Gaussian, by an MLP of z (the decoder)
q(z | x) = N(z; mu(x), diag sigma^2(x))               by a Gaussian MLP of x (the encoder), eq. (9)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.arguments import one_of, whole_number
from pyro_vae.models.full_bayes import BayesianModule
from pyro_vae.models.registration import data_plate, register
from pyro_vae.networks import ACTIVATIONS, MLP, GaussianMLP, init_paper

__all__ = ["VAE", "positive_ints"]

LIKELIHOODS = ("bernoulli", "gaussian")
INITS = ("default", "paper")
_SCALE_BOUNDS = (1 / 255, 1.0)
_NUM_DRAWS = 16  # of Bayesian weights, where a mean over them is taken


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
        bayesian: "decoder" gives the generative weights theta a prior and a posterior (full variational Bayes, App. F;
            see :func:`pyro_vae.bayesian`); True the encoder's as well, which the data then depend on through q(z | x)
            alone: a looser bound, and weights for log p(x) with a heavy tail (score it with a ``defensive`` share).
            False, neither.
        prior_scale: of the Bayesian weights' prior N(0, s^2);
        learn_prior: whether s is learned, for each layer's weight and bias by itself (empirical Bayes);
        local_reparameterization: whether gradients are those of the local trick (arXiv:1506.02557).
        num_data: N, how many data a Bayesian VAE's bound is of; None for :func:`pyro_vae.fit` to fill in.

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
        bayesian: bool | Literal["decoder"] = False,
        prior_scale: float = 1.0,
        learn_prior: bool = False,
        local_reparameterization: bool = False,
        num_data: int | None = None,
    ) -> None:
        super().__init__()
        self.data_shape = positive_ints("data_shape", (data_shape,) if isinstance(data_shape, int) else data_shape)
        (self.latent_dim,) = positive_ints("latent_dim", (latent_dim,))
        self.hidden_dims = positive_ints("hidden_dims", hidden_dims, may_be_empty=True)
        self.likelihood = one_of("likelihood", likelihood, LIKELIHOODS)
        self.activation = one_of("activation", activation, tuple(ACTIVATIONS))
        self.init = one_of("init", init, INITS)
        if not (isinstance(bayesian, bool) or bayesian == "decoder"):
            raise ValueError(f'bayesian: expected True, "decoder" or False, got {bayesian!r}')
        if not bayesian and (prior_scale != 1.0 or learn_prior or local_reparameterization):
            raise ValueError(
                "prior_scale, learn_prior and local_reparameterization are of Bayesian weights: expected bayesian=True "
                'or "decoder" with them (fit(..., prior_scale=...) is maximum a posteriori)'
            )
        self.bayesian = bayesian
        self.prior_scale, self.learn_prior = prior_scale, learn_prior
        self.local_reparameterization = local_reparameterization
        self.num_data = None if num_data is None else whole_number("num_data", num_data)
        data_dim = math.prod(self.data_shape)
        encoder = GaussianMLP(data_dim, self.hidden_dims, self.latent_dim, activation)
        decoder_dims = self.latent_dim, self.hidden_dims[::-1], data_dim, activation
        decoder = (
            MLP(*decoder_dims) if likelihood == "bernoulli" else GaussianMLP(*decoder_dims, scale_bounds=_SCALE_BOUNDS)
        )
        if init == "paper":
            init_paper(encoder)
            init_paper(decoder)
        self.encoder = self._latent(encoder, "encoder") if bayesian is True else encoder
        self.decoder = self._latent(decoder, "decoder") if bayesian else decoder

    def _latent(self, network: nn.Module, name: str) -> BayesianModule:
        scale, local, learn = self.prior_scale, self.local_reparameterization, self.learn_prior
        return BayesianModule(network, scale, local, learn_prior=learn, name=name)

    @property
    def data_range(self) -> tuple[float, float]:
        """The least and the greatest value that data may have: both likelihoods' means lie between them."""
        return 0.0, 1.0

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build this architecture again: ``VAE(**vae.config)``."""
        names = ["data_shape", "latent_dim", "hidden_dims", "likelihood", "activation", "init"]
        if self.bayesian:
            names += ["bayesian", "prior_scale", "learn_prior", "local_reparameterization", "num_data"]
        return {name: getattr(self, name) for name in names}

    def model(self, x: Tensor) -> None:
        """p(x, z) of a minibatch x (M, *data_shape): Pyro sites "z" and "x" in the plate "data"."""
        register(self)
        decoder = self.decoder.model() if isinstance(self.decoder, BayesianModule) else self.decoder
        if isinstance(self.encoder, BayesianModule):
            self.encoder.model()  # p(x, z) does not depend on it
        prior = dist.Normal(x.new_zeros(self.latent_dim), x.new_ones(self.latent_dim)).to_event(1)
        with self._plate(x):
            z = pyro.sample("z", prior)
            pyro.sample("x", self._likelihood(decoder(z)), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x) of a minibatch x (M, *data_shape): Pyro site "z" in the plate "data", after Bayesian weights."""
        register(self)
        if isinstance(self.decoder, BayesianModule):
            self.decoder.guide()
        encoder = self.encoder.guide() if isinstance(self.encoder, BayesianModule) else self.encoder
        with self._plate(x):
            pyro.sample("z", self._posterior(encoder(self._flat(x))))

    def encode(self, x: Tensor) -> dist.Distribution:
        """q(z | x): batch shape (...,), event shape (J,).

        With a Bayesian encoder it is the mean over draws of its weights: a mixture.

        Args:
            x: data, (..., *data_shape).
        """
        if isinstance(self.encoder, BayesianModule):
            return _averaged(self._posterior, self.encoder.draw(_NUM_DRAWS)(self._flat(x)))
        return self._posterior(self.encoder(self._flat(x)))

    def decode(self, z: Tensor) -> dist.Distribution:
        """p(x | z): batch shape (...,), event shape ``data_shape``.

        With Bayesian weights it is the mean over draws of them: a mixture.

        Args:
            z: latents, (..., J).
        """
        if isinstance(self.decoder, BayesianModule):
            return _averaged(self._likelihood, self.decoder.draw(_NUM_DRAWS)(z))
        return self._likelihood(self.decoder(z))

    @torch.no_grad()
    def sample(self, n: int, *, mean: bool = False) -> Tensor:
        """Draw n data from the model: z from the prior, then x from p(x | z), each with weights of its own if Bayesian.

        Args:
            n: how many.
            mean: give E[x | z] instead of a draw of x (grey levels for a Bernoulli likelihood).

        Returns:
            Tensor (n, *data_shape).
        """
        parameter = next(self.parameters())
        z = torch.randn(n, self.latent_dim, device=parameter.device, dtype=parameter.dtype)
        if isinstance(self.decoder, BayesianModule) and not mean:
            draw: Tensor = self._likelihood(self.decoder.each(z)).sample()
            return draw
        likelihood = self.decode(z)
        x: Tensor = likelihood.mean if mean else likelihood.sample()
        return x

    def _plate(self, x: Tensor) -> pyro.plate:
        return data_plate(x, self.num_data if self.bayesian else None)

    def _flat(self, x: Tensor) -> Tensor:
        return x.flatten(x.ndim - len(self.data_shape))

    def _posterior(self, moments: tuple[Tensor, Tensor]) -> dist.Distribution:
        return dist.Normal(*moments).to_event(1)

    def _likelihood(self, decoded: Any) -> dist.Distribution:
        if self.likelihood == "bernoulli":
            return dist.Bernoulli(logits=self._as_datum(decoded)).to_event(len(self.data_shape))
        loc, scale = map(self._as_datum, decoded)
        return dist.Normal(loc.sigmoid(), scale).to_event(len(self.data_shape))

    def _as_datum(self, flat: Tensor) -> Tensor:
        return flat.reshape(*flat.shape[:-1], *self.data_shape)


def _averaged(law: Callable[[Any], dist.Distribution], outputs: Any) -> dist.Distribution:
    """The even mixture of the laws of a network's outputs (K, ..., D), or of a pair of them, over K draws."""
    several = isinstance(outputs, tuple)
    moved = tuple(output.movedim(0, -2) for output in (outputs if several else (outputs,)))
    components = law(moved if several else moved[0])
    return dist.MixtureSameFamily(dist.Categorical(logits=moved[0].new_zeros(components.batch_shape)), components)


def positive_ints(name: str, values: Sequence[int], *, may_be_empty: bool = False) -> tuple[int, ...]:
    """The sizes as a tuple, if they are whole numbers of at least 1."""
    numbers = tuple(whole_number(name, value) for value in values)
    if not (numbers or may_be_empty):
        raise ValueError(f"{name}: expected at least one whole number, got {values!r}")
    return numbers
