"""Variational auto-encoders of several stochastic layers, z_1 next to the data up to z_L.

    p(z_L) = N(0, I)                                or another prior, as of a VAE of one layer
    p(z_l | z_l+1) = N(mu_l, diag sigma_l^2)        by a Gaussian MLP of z_l+1, down to z_1
    p(x | z_1)                                      by a network of z_1

(Burda, Grosse & Salakhutdinov, arXiv:1509.00519, eq. (1) and Sec. 5.) There are two guides:

    bottom-up    q(z_1 | x) prod_l q(z_l+1 | z_l)           each by a Gaussian MLP (the same, eq. (2))
    top-down     q(z_L | x) prod_l q(z_l | z_l+1, x)        the ladder (Sønderby et al., arXiv:1602.02282)

The ladder's deterministic pass upwards, d_l = MLP(d_l-1) from d_0 = x, gives moments m_l and s_l of each layer. On the
way down they meet what the model says of the layer, as a Gaussian likelihood meets a prior: precisions add.

    1 / sigma_q^2 = 1 / s_l^2 + 1 / sigma_l^2       mu_q = sigma_q^2 (m_l / s_l^2 + mu_l / sigma_l^2)

So model and guide share mu_l and sigma_l, which are trained in both places. The paper's batch normalisation is left
out: the bound of a datum would depend on the other data of its minibatch.

The ladder's q(z_L | x) has a density of its own. Its mean over pseudo-inputs, 1/K sum_k q(z_L | u_k), can be the prior:
the VampPrior of several layers (Tomczak & Welling, arXiv:1705.07120, Sec. 3), whose p(x | z_1) here is of z_1 alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.arguments import one_of, whole_number
from pyro_vae.models.likelihoods import Likelihood, as_likelihood
from pyro_vae.models.priors import Prior, StandardNormal, VampPrior, as_prior, require_one_support
from pyro_vae.models.registration import data_plate, register
from pyro_vae.models.vae import positive_ints
from pyro_vae.networks import ACTIVATIONS, ConvDecoder, ConvEncoder, GaussianMLP

__all__ = ["HierarchicalVAE", "precision_weighted"]

GUIDES = ("bottom-up", "top-down")
NETWORKS = ("mlp", "conv", "resnet")

Moments: TypeAlias = tuple[Tensor, Tensor]  # mean and standard deviation


class HierarchicalVAE(nn.Module):
    """A VAE of several stochastic layers (arXiv:1509.00519) with a bottom-up guide or a ladder (arXiv:1602.02282).

    ``pv.SGVB(estimator="B")`` takes the KL divergence of every layer of a top-down guide in closed form. Of a bottom-up
    guide it takes that of z_L alone: below, p(z_l | z_l+1) depends on a draw that depends on z_l. With another prior
    than the standard one, that of z_L is sampled.

    Args:
        data_shape: shape of one datum, for example (784,), (28, 28) or (32, 32, 3).
        latent_dims: J_1, ..., J_L, sizes of the layers from the data upwards: Pyro sites "z_1", "z_2", ...
        hidden_dims: for each of them the widths of the deterministic layers between it and what is below, from below;
            the model has them in reverse. Or one list of widths for all; () makes every network linear.
        guide: "bottom-up" (arXiv:1509.00519, eq. (2)) or "top-down" (arXiv:1602.02282, eqs. (11)-(19)).
        likelihood: p(x | z_1): a name in :data:`pyro_vae.models.likelihoods.LIKELIHOODS`, or a
            :class:`~pyro_vae.models.likelihoods.Likelihood` of your own.
        activation: "tanh" (Burda et al.'s), "relu" or "softplus".
        network: between the data and z_1: "mlp"; or "conv" or "resnet", where convolutions, plain or residual, take the
            place of the linear map to the first width of hidden_dims[0], and on the way down of that from it.
        channels: of the convolutions, from the data upwards.
        prior: p(z_L): "standard", "mixture", "vamp" or "flow" (:mod:`pyro_vae.models.priors`), or one of your own. A
            vamp takes a guide that draws z_L from x directly: top-down, or of one layer.

    Attributes:
        guide_kind: the argument ``guide``.

    Raises:
        ValueError: an argument is out of its range; the message says what was expected.

    Example:
        >>> vae = HierarchicalVAE((28, 28), latent_dims=(8, 4), hidden_dims=((16,), (12,)), guide="top-down")
        >>> vae.encode(torch.zeros(5, 28, 28)).event_shape, vae.decode(torch.zeros(7, 5, 8)).event_shape
        (torch.Size([4]), torch.Size([28, 28]))
        >>> vae.sample(3).shape
        torch.Size([3, 28, 28])
    """

    def __init__(
        self,
        data_shape: Sequence[int] = (784,),
        latent_dims: Sequence[int] = (100, 50),
        hidden_dims: Sequence[Sequence[int]] | Sequence[int] = ((200, 200), (100, 100)),
        guide: str = "bottom-up",
        likelihood: str | Likelihood = "bernoulli",
        activation: str = "tanh",
        network: str = "mlp",
        channels: Sequence[int] = (32, 64),
        prior: str | Prior = "standard",
    ) -> None:
        super().__init__()
        self.data_shape = positive_ints("data_shape", (data_shape,) if isinstance(data_shape, int) else data_shape)
        for name, sizes in (("latent_dims", latent_dims), ("hidden_dims", hidden_dims)):
            if not isinstance(sizes, Sequence):
                raise ValueError(f"{name}: expected a list of whole numbers, got {sizes!r}")
        self.latent_dims = positive_ints("latent_dims", latent_dims)
        self.hidden_dims = _for_each_layer(hidden_dims, len(self.latent_dims))
        self.guide_kind = one_of("guide", guide, GUIDES)
        self.activation = one_of("activation", activation, tuple(ACTIVATIONS))
        self.network = one_of("network", network, NETWORKS)
        self.channels = positive_ints("channels", channels)
        if network != "mlp" and not self.hidden_dims[0]:
            raise ValueError(f'hidden_dims: expected a width next to the data for network="{network}", got ()')
        self.likelihood = as_likelihood(likelihood, self.data_shape)
        self.prior = as_prior(prior, self.latent_dims[-1], self.data_shape, self.data_range)
        if isinstance(self.prior, VampPrior) and not self._encodes_top:
            raise ValueError(
                'prior: expected guide="top-down" or one layer with a vamp, got guide="bottom-up", whose q(z_L | u) is '
                "a mixture over the layers below, without a density in closed form"
            )
        self._build_guide()
        between = zip(itertools.pairwise(self.latent_dims), self.hidden_dims[1:], strict=True)
        self.down = nn.ModuleList(GaussianMLP(high, w[::-1], low, activation) for (low, high), w in between)
        self.decoder = nn.Sequential(*self._to_data(self.hidden_dims[0][::-1]))
        require_one_support(self._prior(), StandardNormal(self.latent_dims[-1])())

    def _build_guide(self) -> None:
        """Each layer's deterministic features, and its moments, which are linear in them."""
        self.features, self.moments = nn.ModuleList(), nn.ModuleList()
        below = math.prod(self.data_shape)
        for dim, widths in zip(self.latent_dims, self.hidden_dims, strict=True):
            parts = self._hidden(below, widths) if self.features else self._from_data(widths)
            width = (below, *widths)[-1]
            self.features.append(nn.Sequential(*parts))
            self.moments.append(GaussianMLP(width, (), dim))
            below = dim if self.guide_kind == "bottom-up" else width

    def _hidden(self, in_dim: int, widths: Sequence[int]) -> list[nn.Module]:
        """Fully connected layers of these widths, each with its activation behind it."""
        layers: list[nn.Module] = []
        for wide, narrow in itertools.pairwise((in_dim, *widths)):
            layers += [nn.Linear(wide, narrow), ACTIVATIONS[self.activation]()]
        return layers

    def _from_data(self, widths: tuple[int, ...]) -> list[nn.Module]:
        if self.network == "mlp":
            return [nn.Flatten(-len(self.data_shape)), *self._hidden(math.prod(self.data_shape), widths)]
        first = ConvEncoder(self.data_shape, widths[0], self.channels, widths[0], self.activation, self._residual)
        return [first, ACTIVATIONS[self.activation](), *self._hidden(widths[0], widths[1:])]

    def _to_data(self, widths: tuple[int, ...]) -> list[nn.Module]:
        hidden, width = self._hidden(self.latent_dims[0], widths), (self.latent_dims[0], *widths)[-1]
        shape = (self.likelihood.num_parameters, *self.data_shape)
        if self.network == "mlp":
            return [*hidden, nn.Linear(width, math.prod(shape)), nn.Unflatten(-1, shape)]
        channels = self.channels[::-1]
        last = ConvDecoder(width, self.data_shape, shape[0], channels, width, self.activation, self._residual)
        return [*hidden, last]

    @property
    def _residual(self) -> bool:
        return self.network == "resnet"

    @property
    def data_range(self) -> tuple[float, float] | None:
        """The least and the greatest value that data may have; None for any."""
        return self.likelihood.data_range

    @property
    def config(self) -> dict[str, Any] | None:
        """The arguments that build this architecture again; None if the likelihood or the prior is your own."""
        parts = {name: getattr(getattr(self, name), "name", None) for name in ("likelihood", "prior")}
        if None in parts.values():
            return None
        names = ("data_shape", "latent_dims", "hidden_dims", "activation", "network", "channels")
        return {name: getattr(self, name) for name in names} | {"guide": self.guide_kind} | parts

    def model(self, x: Tensor) -> None:
        """p(x, z) of a minibatch x (M, *data_shape): sites "z_L", ..., "z_1" and "x" in the plate "data"."""
        register(self)
        prior = self._prior()
        with data_plate(x):
            z_1 = self._draw_downwards(prior)
            pyro.sample("x", self.decode(z_1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x) of a minibatch x (M, *data_shape): sites "z_1", ..., "z_L" in the plate "data", in its order."""
        register(self)
        with data_plate(x):
            if self.guide_kind == "bottom-up":
                self._draw_upwards(x)
            else:
                *seen, top = self._moments_upwards(x)
                self._draw_downwards(_normal(*top), seen)

    def encode(self, x: Tensor) -> dist.Distribution:
        """The guide's law of the layer that it draws first: z_1 bottom-up, z_L top-down; batch shape (...,).

        Args:
            x: data, (..., *data_shape).
        """
        if self.guide_kind == "bottom-up":
            return _normal(*self.moments[0](self.features[0](x)))
        return _normal(*self._moments_upwards(x)[-1])

    def decode(self, z: Tensor) -> dist.Distribution:
        """p(x | z_1): batch shape (...,), event shape ``data_shape``.

        Args:
            z: the latents next to the data, z_1, (..., J_1); :meth:`descend` leads to them.
        """
        likelihood: dist.Distribution = self.likelihood(self.decoder(z))
        return likelihood

    def descend(self, z: Tensor, layer: int | None = None, *, mean: bool = False) -> Tensor:
        """Draw z_1, (..., J_1), from the model, given a layer above it.

        Args:
            z: latents of that layer, (..., J_l).
            layer: its number l, from 1 to L; None for L.
            mean: go through the means of p(z_l | z_l+1) instead of draws.

        Raises:
            ValueError: there is no such layer.
        """
        layer = len(self.latent_dims) if layer is None else whole_number("layer", layer, 1, len(self.latent_dims))
        for moments in reversed(self.down[: layer - 1]):
            law = _normal(*moments(z))
            z = law.mean if mean else law.rsample()
        return z

    @torch.no_grad()
    def sample(self, n: int, *, mean: bool = False) -> Tensor:
        """Draw n data from the model: z_L from the prior, each layer given the one above, then x from p(x | z_1).

        Args:
            n: how many.
            mean: give E[x | z_1] instead of a draw of x (grey levels for a Bernoulli likelihood).

        Returns:
            Tensor (n, *data_shape).
        """
        likelihood = self.decode(self.descend(self._prior().sample((n,))))
        x: Tensor = likelihood.mean if mean else likelihood.sample()
        return x

    @property
    def _encodes_top(self) -> bool:
        """Whether the layer that the guide draws first, given x alone, is z_L."""
        return self.guide_kind == "top-down" or len(self.latent_dims) == 1

    def _prior(self) -> dist.Distribution:
        """p(z_L), of batch shape ()."""
        return self.prior(self.encode if self._encodes_top else None)

    def _draw_upwards(self, x: Tensor) -> None:
        below = x
        for number, (features, moments) in enumerate(zip(self.features, self.moments, strict=True), 1):
            below = pyro.sample(f"z_{number}", _normal(*moments(features(below))))

    def _moments_upwards(self, x: Tensor) -> list[Moments]:
        """What the data say of each layer by themselves (the deterministic pass of arXiv:1602.02282)."""
        found, below = [], x
        for features, moments in zip(self.features, self.moments, strict=True):
            below = features(below)
            found.append(moments(below))
        return found

    def _draw_downwards(self, top: dist.Distribution, seen: Sequence[Moments] | None = None) -> Tensor:
        """Sample the layers from the top to z_1: of the model, or corrected by what is seen of those below the top."""
        z: Tensor = pyro.sample(f"z_{len(self.latent_dims)}", top)
        for number in range(len(self.down), 0, -1):
            moments = self.down[number - 1](z)
            if seen is not None:
                moments = precision_weighted(seen[number - 1], moments)
            z = pyro.sample(f"z_{number}", _normal(*moments))
        return z


def precision_weighted(one: Moments, other: Moments) -> Moments:
    """Moments of the normalised product of two Gaussian densities (the merge of arXiv:1602.02282).

    Args:
        one: mean and standard deviation, (...).
        other: those of the other, of a shape that broadcasts.

    Returns:
        The mean, weighted by precisions, and the standard deviation, whose precision is the sum of theirs.

    Example:
        >>> seen, prior = torch.tensor([0.0, 3.0]).unbind(), torch.tensor([5.0, 4.0]).unbind()
        >>> precision_weighted(seen, prior)
        (tensor(1.8000), tensor(2.4000))
    """
    (loc, scale), (other_loc, other_scale) = one, other
    share = scale / scale.hypot(other_scale)  # without a square of a scale, which may underflow
    return loc + share.square() * (other_loc - loc), share * other_scale


def _normal(loc: Tensor, scale: Tensor) -> dist.Distribution:
    return dist.Normal(loc, scale).to_event(1)


def _for_each_layer(
    hidden_dims: Sequence[Sequence[int]] | Sequence[int], num_layers: int
) -> tuple[tuple[int, ...], ...]:
    """A list of widths for each layer: as many lists, or one for all of them."""
    lists = [widths for widths in hidden_dims if isinstance(widths, Sequence)]
    if 0 < len(lists) < len(hidden_dims):
        raise ValueError(f"hidden_dims: expected a list of widths for each layer, or one for all, got {hidden_dims!r}")
    per_layer: Sequence[Any] = lists or [hidden_dims] * num_layers
    if len(per_layer) != num_layers:
        raise ValueError(f"hidden_dims: expected {num_layers} lists, one for each latent layer, got {len(per_layer)}")
    return tuple(positive_ints("hidden_dims", widths, may_be_empty=True) for widths in per_layer)
