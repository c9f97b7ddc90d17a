"""The variational auto-encoder of the paper's Section 3 and Appendix C, as a Pyro model and guide.

p(z) = N(z; 0, I)                                     the prior, z of J dimensions
p(x | z)                                              Bernoulli or Gaussian, by an MLP of z (the decoder)
q(z | x) = N(z; mu(x), diag sigma^2(x))               by an MLP of x (the encoder), eq. (9)

Each of them may be another: the networks convolutional, the prior learned, the posterior a flow.
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
from pyro_vae.models.likelihoods import Likelihood, as_likelihood
from pyro_vae.models.posteriors import Posterior, as_posterior
from pyro_vae.models.priors import Prior, VampPrior, as_prior, require_one_support
from pyro_vae.models.registration import data_plate, register
from pyro_vae.networks import ACTIVATIONS, MLP, ConvDecoder, ConvEncoder, init_paper

__all__ = ["VAE", "positive_ints"]

NETWORKS = ("mlp", "conv", "resnet")
INITS = ("default", "paper")
_NUM_DRAWS = 16  # of Bayesian weights, where a mean over them is taken


class VAE(nn.Module):
    """A variational auto-encoder (Kingma & Welling, arXiv:1312.6114, Sec. 3 and App. C).

    Args:
        data_shape: shape of one datum, for example (784,), (28, 28) or (32, 32, 3).
        latent_dim: J, the dimension of z, at least 1.
        hidden_dims: widths of the encoder's hidden layers; the decoder has them in reverse. With convolutions, the
            width of the one hidden layer between them and z.
        likelihood: "bernoulli" for binary data (eq. (11)), or "gaussian" for data in [0, 1]: mean squashed to (0, 1)
            and variance learned, both functions of z (eq. (12); the paper's Frey Face model). The standard deviation
            is kept within [1/255, 1], the step and the range of 8-bit levels: without a floor the density of a pixel
            that never changes has no bound. Others are in :data:`pyro_vae.models.likelihoods.LIKELIHOODS`; or a
            :class:`~pyro_vae.models.likelihoods.Likelihood` of your own.
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
        network: "mlp"; "conv" or "resnet" for images, data of shape (H, W) or (H, W, C); or two modules of your own:
            an encoder of data (M, *data_shape) to as many numbers for each as the posterior has parameters, and a
            decoder of latents (M, J) to as many as the likelihood has, in the order (P, *data_shape). Beside these,
            hidden_dims, activation and channels are of no use.
        channels: of the convolutions, a level each, which halves the image; the decoder has them in reverse.
        prior: p(z): "standard", "mixture", "vamp" or "flow" (:mod:`pyro_vae.models.priors`), of so many components if
            need be, "vamp:100"; or one of your own.
        posterior: the family of q(z | x): "diagonal", "full", "iaf", "spline", or one of the paper's Sec. 2.4, such as
            "laplace" (:mod:`pyro_vae.models.posteriors`), whose own standard prior is then what "standard" means; or
            one of your own.

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
        likelihood: str | Likelihood = "bernoulli",
        activation: str = "tanh",
        init: str = "default",
        bayesian: bool | Literal["decoder"] = False,
        prior_scale: float = 1.0,
        learn_prior: bool = False,
        local_reparameterization: bool = False,
        num_data: int | None = None,
        network: str | tuple[nn.Module, nn.Module] = "mlp",
        channels: Sequence[int] = (32, 64),
        prior: str | Prior = "standard",
        posterior: str | Posterior = "diagonal",
    ) -> None:
        super().__init__()
        self.data_shape = positive_ints("data_shape", (data_shape,) if isinstance(data_shape, int) else data_shape)
        (self.latent_dim,) = positive_ints("latent_dim", (latent_dim,))
        self.hidden_dims = positive_ints("hidden_dims", hidden_dims, may_be_empty=True)
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
        self.channels = positive_ints("channels", channels)
        self.likelihood = as_likelihood(likelihood, self.data_shape)
        self.posterior = as_posterior(posterior, self.latent_dim)
        self.prior = as_prior(prior, self.latent_dim, self.data_shape, self.data_range, self.posterior)
        if bayesian is True and isinstance(self.prior, VampPrior):
            raise ValueError("prior: expected another than a vamp with bayesian=True: its encoder would be no function")
        self.network = network if isinstance(network, str) else "own"
        encoder, decoder = self._networks(network)
        if init == "paper":
            init_paper(encoder)
            init_paper(decoder)
        self.encoder = self._latent(encoder, "encoder") if bayesian is True else encoder
        self.decoder = self._latent(decoder, "decoder") if bayesian else decoder
        require_one_support(self.prior(self.encode), self.posterior(torch.zeros(1, self.posterior.num_parameters)))

    def _networks(self, network: Any) -> tuple[nn.Module, nn.Module]:
        """Encoder and decoder."""
        sizes = self.posterior.num_parameters, self.likelihood.num_parameters * math.prod(self.data_shape)
        if not isinstance(network, str):
            return _own_networks(network, self.data_shape, self.latent_dim, sizes)
        one_of("network", network, NETWORKS)
        if network == "mlp":
            data_dim = math.prod(self.data_shape)
            encoder = MLP(data_dim, self.hidden_dims, sizes[0], self.activation)
            return encoder, MLP(self.latent_dim, self.hidden_dims[::-1], sizes[1], self.activation)
        if self.init == "paper" or self.bayesian or len(self.hidden_dims) != 1:
            raise ValueError(
                f'network={network!r}: expected one width in hidden_dims, init="default" and bayesian=False, got '
                f"hidden_dims={self.hidden_dims}, init={self.init!r} and bayesian={self.bayesian!r}"
            )
        how = self.hidden_dims[0], self.activation, network == "resnet"
        return (
            ConvEncoder(self.data_shape, sizes[0], self.channels, *how),
            ConvDecoder(self.latent_dim, self.data_shape, self.likelihood.num_parameters, self.channels[::-1], *how),
        )

    def _latent(self, network: nn.Module, name: str) -> BayesianModule:
        scale, local, learn = self.prior_scale, self.local_reparameterization, self.learn_prior
        event_dim = network.event_dim if isinstance(network, _Own) else 1
        return BayesianModule(network, scale, local, learn_prior=learn, event_dim=event_dim, name=name)

    @property
    def data_range(self) -> tuple[float, float] | None:
        """The least and the greatest value that data may have; None for any."""
        return self.likelihood.data_range

    @property
    def config(self) -> dict[str, Any] | None:
        """The arguments that build this architecture again: ``VAE(**vae.config)``; None if parts of it are your own."""
        parts = {name: getattr(getattr(self, name), "name", None) for name in ("likelihood", "prior", "posterior")}
        if self.network == "own" or None in parts.values():
            return None
        names = ["data_shape", "latent_dim", "hidden_dims", "activation", "init", "network", "channels"]
        if self.bayesian:
            names += ["bayesian", "prior_scale", "learn_prior", "local_reparameterization", "num_data"]
        return {name: getattr(self, name) for name in names} | parts

    def model(self, x: Tensor) -> None:
        """p(x, z) of a minibatch x (M, *data_shape): Pyro sites "z" and "x" in the plate "data"."""
        register(self)
        decoder = self.decoder.model() if isinstance(self.decoder, BayesianModule) else self.decoder
        if isinstance(self.encoder, BayesianModule):
            self.encoder.model()  # p(x, z) does not depend on it
        prior = self.prior(self.encode)
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
            pyro.sample("z", self.posterior(encoder(self._seen(x))))

    def encode(self, x: Tensor) -> dist.Distribution:
        """q(z | x): batch shape (...,), event shape (J,).

        With a Bayesian encoder it is the mean over draws of its weights: a mixture.

        Args:
            x: data, (..., *data_shape).
        """
        if isinstance(self.encoder, BayesianModule):
            return _averaged(self.posterior, self.encoder.draw(_NUM_DRAWS)(self._seen(x)))
        return self.posterior(self.encoder(self._seen(x)))

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
        z = self.prior(self.encode).sample((n,))
        if isinstance(self.decoder, BayesianModule) and not mean:
            draw: Tensor = self._likelihood(self.decoder.each(z)).sample()
            return draw
        likelihood = self.decode(z)
        x: Tensor = likelihood.mean if mean else likelihood.sample()
        return x

    def _plate(self, x: Tensor) -> pyro.plate:
        return data_plate(x, self.num_data if self.bayesian else None)

    def _seen(self, x: Tensor) -> Tensor:
        """Data as the encoder takes them: an MLP flat."""
        return x.flatten(x.ndim - len(self.data_shape)) if self.network == "mlp" else x

    def _likelihood(self, decoded: Tensor) -> dist.Distribution:
        shape = self.likelihood.num_parameters, *self.data_shape
        leading = decoded.ndim - (len(shape) if self.network in ("conv", "resnet") else 1)
        return self.likelihood(decoded.reshape(*decoded.shape[:leading], *shape))


class _Own(nn.Module):
    """A network of the user's, which is given any number of leading dimensions as one."""

    def __init__(self, network: nn.Module, event_dim: int, out_shape: Sequence[int]) -> None:
        super().__init__()
        self.network, self.event_dim, self.out_shape = network, event_dim, tuple(out_shape)

    def forward(self, x: Tensor) -> Tensor:
        leading = x.shape[: x.ndim - self.event_dim]
        found: Tensor = self.network(x.reshape(-1, *x.shape[len(leading) :]))
        return found.reshape(*leading, *self.out_shape)


def _own_networks(
    network: Any, data_shape: tuple[int, ...], latent_dim: int, sizes: tuple[int, int]
) -> tuple[nn.Module, nn.Module]:
    """Two modules of the user's as encoder and decoder, after a call of each.

    Raises:
        ValueError: they are none, or give other numbers of values than posterior and likelihood take.
    """
    pair = tuple(network) if isinstance(network, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(part, nn.Module) for part in pair):
        raise ValueError(f"network: expected one of {', '.join(NETWORKS)}, or two modules, got {network!r}")
    made, kinds = [], (("an encoder", data_shape), ("a decoder", (latent_dim,)))
    for part, (what, seen), size in zip(pair, kinds, sizes, strict=True):
        parameter, training = next(part.parameters(), torch.empty(0)), part.training
        with torch.no_grad():
            found = part.eval()(parameter.new_zeros(2, *seen))
        part.train(training)
        if found.shape[:1] != (2,) or found[0].numel() != size:
            raise ValueError(
                f"network: expected {what} of {(2, *seen)} to {size} values for each, got {tuple(found.shape)}"
            )
        made.append(_Own(part, len(seen), (size,)))
    return made[0], made[1]


def _averaged(law: Callable[[Tensor], dist.Distribution], outputs: Tensor) -> dist.Distribution:
    """The even mixture of the laws of a network's outputs (K, ..., D) over K draws."""
    components = law(outputs.movedim(0, -2))
    return dist.MixtureSameFamily(dist.Categorical(logits=outputs.new_zeros(components.batch_shape)), components)


def positive_ints(name: str, values: Sequence[int], *, may_be_empty: bool = False) -> tuple[int, ...]:
    """The sizes as a tuple, if they are whole numbers of at least 1."""
    numbers = tuple(whole_number(name, value) for value in values)
    if not (numbers or may_be_empty):
        raise ValueError(f"{name}: expected at least one whole number, got {values!r}")
    return numbers
