"""Priors p(z) of a variational auto-encoder's latents z of J dimensions.

standard    N(z; 0, I)                                           (arXiv:1312.6114, App. B)
mixture     sum_k w_k N(z; mu_k, diag sigma_k^2)                 all learned
vamp        1/K sum_k q(z | u_k)                                 of learned pseudo-inputs u_k (arXiv:1705.07120)
flow        N(f(z); 0, I) |det df/dz|                            of a learned invertible f (arXiv:1906.04032)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Transform, biject_to, constraints

from pyro_vae.arguments import one_of, whole_number
from pyro_vae.distributions import Flow, neural_spline
from pyro_vae.networks import softplus_scale

__all__ = [
    "PRIORS",
    "FlowPrior",
    "MixtureOfGaussians",
    "Prior",
    "StandardNormal",
    "VampPrior",
    "as_prior",
    "require_latent_dim",
    "require_one_support",
]

_DRAWN_IN = 0.01  # from an end of the range of data, where pseudo-inputs would have no gradient
_SPREAD = 0.1  # of random pseudo-inputs, before they are mapped to that range
_UNIT_RAW_SCALE = math.log(math.expm1(1.0))  # whose softplus is 1
_COUNTED = ("mixture", "vamp")  # whose number of components may stand behind their name


class Prior(nn.Module):
    """A prior of latents: a module that gives a distribution.

    Args:
        latent_dim: J, at least 1.
        **options: the other arguments that build it again.

    Attributes:
        name: what :func:`as_prior` made it by, if it did, which is then enough to make it again.
        latent_dim: J.
        config: the arguments that build this architecture again, ``type(prior)(**prior.config)``; of a family's
            standard prior, of which the posterior is an argument too, the others.
    """

    name: str | None = None

    def __init__(self, latent_dim: int, **options: Any) -> None:
        super().__init__()
        self.latent_dim = whole_number("latent_dim", latent_dim)
        self.config: dict[str, Any] = {"latent_dim": self.latent_dim, **options}

    def forward(self, encode: Callable[[Tensor], dist.Distribution] | None = None) -> dist.Distribution:
        """p(z), of batch shape () and event shape (J,).

        Args:
            encode: of data (K, *data_shape) to q(z | x), of batch shape (K,). A VampPrior needs it, others do not.
        """
        raise NotImplementedError


class StandardNormal(Prior):
    """N(0, I): its KL divergence from a diagonal Gaussian has a closed form (arXiv:1312.6114, App. B).

    Args:
        latent_dim: J, at least 1.

    Example:
        >>> StandardNormal(3)().log_prob(torch.zeros(3)) / math.log(2 * math.pi)
        tensor(-1.5000)
    """

    loc: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim)
        self.register_buffer("loc", torch.zeros(self.latent_dim), persistent=False)

    def forward(self, encode: Callable[[Tensor], dist.Distribution] | None = None) -> dist.Distribution:
        """N(0, I), of batch shape () and event shape (J,)."""
        return dist.Normal(self.loc, torch.ones_like(self.loc)).to_event(1)


class MixtureOfGaussians(Prior):
    """A mixture of diagonal Gaussians, whose weights, means and scales are learned.

    Args:
        latent_dim: J, at least 1.
        num_components: how many, at least 1. All begin with scale 1, and with means drawn from N(0, I).

    Example:
        >>> prior = MixtureOfGaussians(2, num_components=5)
        >>> prior().sample((7,)).shape
        torch.Size([7, 2])
    """

    def __init__(self, latent_dim: int, num_components: int = 100) -> None:
        count = whole_number("num_components", num_components)
        super().__init__(latent_dim, num_components=count)
        self.elements_per_row = count * self.latent_dim
        self.logits = nn.Parameter(torch.zeros(count))
        self.loc = nn.Parameter(torch.randn(count, self.latent_dim))
        self.raw_scale = nn.Parameter(torch.full((count, self.latent_dim), _UNIT_RAW_SCALE))

    def forward(self, encode: Callable[[Tensor], dist.Distribution] | None = None) -> dist.Distribution:
        """The mixture, of batch shape () and event shape (J,)."""
        components = dist.Normal(self.loc, softplus_scale(self.raw_scale)).to_event(1)
        return _Mixture(dist.Categorical(logits=self.logits), components)


class VampPrior(Prior):
    r"""The variational mixture of posteriors (Tomczak & Welling, arXiv:1705.07120, eq. (9)).

        p(z) = 1/K sum_k q(z | u_k)

    The best prior for the bound is the mean of the posteriors of all data (the same, eq. (8)); K pseudo-inputs u_k,
    which are learned with the rest, stand in for the data. So p(z) depends on the encoder's parameters, and
    none are the guide's alone (``fit(trained="guide")``). Each draw takes memory for one of every component.
    :meth:`begin_at` lets the pseudo-inputs begin at data.

    Args:
        latent_dim: J, at least 1.
        data_shape: shape of one datum.
        num_components: K, at least 1.
        pseudo_inputs: data to begin with, (K, *data_shape), a little drawn in from the ends of ``data_range``; None for
            random ones close to its middle. Their later values are parameters, and not part of ``config``.
        data_range: the least and the greatest value of data, between which pseudo-inputs are kept, the greatest
            infinite if there is none; None for any.

    Raises:
        ValueError: an argument is out of its range or of another shape; the message says what was expected.

    Example:
        >>> prior = VampPrior(2, data_shape=(4,), num_components=5)
        >>> encode = lambda x: dist.Normal(x[..., :2], 1.0).to_event(1)
        >>> prior(encode).sample((7,)).shape, prior.pseudo_inputs.shape
        (torch.Size([7, 2]), torch.Size([5, 4]))
    """

    def __init__(
        self,
        latent_dim: int,
        data_shape: Sequence[int],
        num_components: int = 500,
        pseudo_inputs: Tensor | None = None,
        data_range: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        shape = tuple(whole_number("data_shape", size) for size in data_shape)
        count = whole_number("num_components", num_components)
        if data_range is not None and not -math.inf < data_range[0] < data_range[1]:
            raise ValueError(
                f"data_range: expected a finite least value and a greater one, or None, got {data_range!r}"
            )
        super().__init__(latent_dim, data_shape=shape, num_components=count, data_range=data_range)
        self.elements_per_row = count * self.latent_dim
        self.raw_pseudo_inputs = nn.Parameter(_SPREAD * torch.randn(count, *shape))
        if pseudo_inputs is not None:
            self._set("pseudo_inputs", torch.as_tensor(pseudo_inputs))

    @property
    def pseudo_inputs(self) -> Tensor:
        """u, (K, *data_shape), within ``data_range``."""
        return _onto(self.config["data_range"])(self.raw_pseudo_inputs)  # type: ignore[no-any-return]

    def begin_at(self, data: Any) -> None:
        """Set the pseudo-inputs, in place, to K data that torch's generator draws without replacement.

        They are drawn in a little from the ends of ``data_range``. As in training, data of type uint8 are levels and
        divided by 255, unless none is above 1, or the range ends above 1: then they are binary, or counts.

        Args:
            data: at least K, (N, *data_shape) or as many elements for each: a tensor, an array, or a matrix of
                scipy.sparse.

        Raises:
            ValueError: there are fewer, or of another shape; or a value of those that were drawn lies beyond the range.

        Example:
            >>> prior = VampPrior(2, data_shape=(4,), num_components=3)
            >>> prior.begin_at(255 * torch.eye(4, dtype=torch.uint8))
            >>> prior.pseudo_inputs.detach().sum(-1)
            tensor([1.0200, 1.0200, 1.0200])
        """
        if not hasattr(data, "shape"):
            raise ValueError(f"data: expected a tensor, an array or a sparse matrix, got {type(data).__name__}")
        count, shape, data_range = (self.config[name] for name in ("num_components", "data_shape", "data_range"))
        if math.prod(data.shape[1:]) != math.prod(shape):
            expected = ", ".join(map(str, ("N", *shape)))
            raise ValueError(f"data: expected shape ({expected}) or as many elements, got {tuple(data.shape)}")
        if data.shape[0] < count:
            raise ValueError(f"data: expected at least {count}, one for each pseudo-input, got {data.shape[0]}")
        data = data.tocsr() if hasattr(data, "tocsr") else data  # which has rows; other sparse formats have not
        rows = _rows(data, torch.randperm(data.shape[0])[:count])
        above_one = data_range is not None and data_range[1] > 1
        levels = rows.dtype == torch.uint8 and not above_one and data.max() > 1
        inputs = rows.reshape(count, *shape).to(self.raw_pseudo_inputs)
        self._set("data", inputs / 255 if levels else inputs)

    @torch.no_grad()
    def _set(self, name: str, data: Tensor) -> None:
        """Let u be data, a little drawn in; ``name`` is what messages call them."""
        data, data_range = data.to(self.raw_pseudo_inputs), self.config["data_range"]
        _require_data(name, data, self.raw_pseudo_inputs.shape, data_range)
        self.raw_pseudo_inputs.copy_(_onto(data_range).inv(_drawn_in(data, data_range)))

    def forward(self, encode: Callable[[Tensor], dist.Distribution] | None = None) -> dist.Distribution:
        """The mixture of q(z | u_k), of batch shape () and event shape (J,).

        Args:
            encode: of data (K, *data_shape) to q(z | x), any distribution of batch shape (K,) and event shape (J,) that
                has a density and can be drawn from.

        Raises:
            ValueError: there is no ``encode``, or it gives other shapes.
        """
        if encode is None:
            raise ValueError("encode: expected the encoder, of whose posteriors the prior is a mixture, got None")
        components = encode(self.pseudo_inputs)
        expected = (self.config["num_components"], self.latent_dim)
        if (shape := (*components.batch_shape, *components.event_shape)) != expected:
            raise ValueError(f"encode: expected a posterior of shape {expected} of the pseudo-inputs, got {shape}")
        even = dist.Categorical(logits=self.raw_pseudo_inputs.new_zeros(len(self.raw_pseudo_inputs)))
        return _Mixture(even, components)


class FlowPrior(Prior):
    """A neural spline flow (Durkan et al., arXiv:1906.04032) to standard normal noise.

    It is autoregressive. A density is computed in one pass, and training asks for densities alone; a draw takes as many
    passes as there are dimensions.

    Args:
        latent_dim: J, at least 1.
        num_transforms: how many, at least 1.
        hidden_dims: widths of the hidden layers of each transform's network.

    Example:
        >>> prior = FlowPrior(2, num_transforms=2, hidden_dims=(8,))
        >>> prior().log_prob(prior().sample((7,))).shape
        torch.Size([7])
    """

    loc: Tensor

    def __init__(self, latent_dim: int, num_transforms: int = 4, hidden_dims: Sequence[int] = (64, 64)) -> None:
        count = whole_number("num_transforms", num_transforms)
        widths = tuple(whole_number("hidden_dims", width) for width in hidden_dims)
        super().__init__(latent_dim, num_transforms=count, hidden_dims=widths)
        self.register_buffer("loc", torch.zeros(self.latent_dim), persistent=False)
        self.to_noise = neural_spline(self.latent_dim, 0, count, widths, coupling=False)

    def forward(self, encode: Callable[[Tensor], dist.Distribution] | None = None) -> dist.Distribution:
        """The flow, of batch shape () and event shape (J,)."""
        noise = dist.Normal(self.loc, torch.ones_like(self.loc)).to_event(1)
        return Flow(noise, [self.to_noise().inv])


class _Mixture(dist.MixtureSameFamily):  # type: ignore[misc]
    """A mixture that says where it lives: torch has no bijection from real space to its own word for the same place."""

    @property
    def support(self) -> Any:
        return self.component_distribution.support


class _StandardOf(Prior):
    """The standard prior of a family of posteriors, on the same support."""

    def __init__(self, posterior: Any) -> None:
        super().__init__(posterior.latent_dim)
        self._posterior = (posterior,)  # which is not a part of this

    def forward(self, encode: Callable[[Tensor], dist.Distribution] | None = None) -> dist.Distribution:
        return self._posterior[0].prior()


def _onto(data_range: tuple[float, float] | None) -> Transform:
    """The smooth map of real numbers to the range of data."""
    support: constraints.Constraint = constraints.real
    if data_range is not None:
        low, high = data_range
        support = constraints.greater_than(low) if math.isinf(high) else constraints.interval(low, high)
    onto: Transform = biject_to(support)
    return onto


def _drawn_in(data: Tensor, data_range: tuple[float, float] | None) -> Tensor:
    """Data away from the ends of their range: by a share of it, or where it has no end, of 1."""
    if data_range is None:
        return data
    low, high = data_range
    margin = _DRAWN_IN * (1.0 if math.isinf(high) else high - low)
    return data.clamp(low + margin, high - margin)


def _rows(data: Any, index: Tensor) -> Tensor:
    """Rows of a tensor, an array or a sparse matrix as a dense tensor, of the stored type."""
    if isinstance(data, Tensor):
        return data[index.to(data.device)]
    rows = data[index.cpu().numpy()]
    return torch.as_tensor(rows.toarray() if hasattr(rows, "toarray") else rows)


def _require_data(name: str, data: Tensor, shape: torch.Size, data_range: tuple[float, float] | None) -> None:
    low, high = (-math.inf, math.inf) if data_range is None else data_range
    if data.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(data.shape)}")
    if not ((data >= low) & (data <= high)).all():
        found = f"{data.min().item():g} to {data.max().item():g}"
        raise ValueError(f"{name}: expected values from {low:g} to {high:g}, got {found}")


PRIORS: dict[str, type[Prior]] = {
    "standard": StandardNormal,
    "mixture": MixtureOfGaussians,
    "vamp": VampPrior,
    "flow": FlowPrior,
}


def as_prior(
    prior: str | nn.Module,
    latent_dim: int,
    data_shape: Sequence[int],
    data_range: tuple[float, float] | None = (0.0, 1.0),
    posterior: nn.Module | None = None,
) -> Prior:
    """A prior of latents of so many dimensions, by its name or as it is.

    Args:
        prior: a name in ``PRIORS``, of a mixture or a vamp with its number of components if need be, "vamp:100"; or a
            module that has a ``latent_dim`` and is called as a :class:`Prior` is.
        latent_dim: J.
        data_shape: shape of one datum, which a VampPrior's pseudo-inputs have;
        data_range: and the least and the greatest value of data; None for any.
        posterior: the family of q(z | x), whose own standard prior is what "standard" means; None for a Gaussian one.

    Raises:
        ValueError: there is no such name, or the prior is of another number of dimensions.

    Example:
        >>> as_prior("mixture", 2, data_shape=(784,)).config
        {'latent_dim': 2, 'num_components': 100}
        >>> as_prior("vamp:30", 2, data_shape=(784,)).pseudo_inputs.shape
        torch.Size([30, 784])
    """
    if not isinstance(prior, str):
        return cast(Prior, require_latent_dim("prior", prior, latent_dim, PRIORS))
    name, sizes = _name_and_sizes(prior)
    made: Prior
    if name == "standard" and posterior is not None:
        made = _StandardOf(posterior)
    elif name == "vamp":
        made = VampPrior(latent_dim, data_shape, data_range=data_range, **sizes)
    else:
        made = PRIORS[name](latent_dim, **sizes)
    made.name = prior
    return made


def _name_and_sizes(prior: str) -> tuple[str, dict[str, Any]]:
    """A prior's name in ``PRIORS``, and the number of components behind it."""
    name, colon, count = prior.partition(":")
    one_of("prior", name, PRIORS)
    if not colon:
        return name, {}
    if name not in _COUNTED or not count.isdecimal():
        raise ValueError(f'prior: expected a number of components of a mixture or a vamp, "vamp:100", got {prior!r}')
    return name, {"num_components": int(count)}


def require_one_support(prior: dist.Distribution, posterior: dist.Distribution) -> None:
    """Refuse a prior with mass where the posterior can have none, or none where it can: bounds would be wrong or NaN.

    Raises:
        ValueError: their supports differ, by more than an end of an interval.
    """
    if _ends(prior.support) != _ends(posterior.support):
        raise ValueError(
            f'prior: expected one on the support of the posterior, {posterior.support}, such as "standard" or "vamp", '
            f"got one on {prior.support}"
        )


def _ends(support: Any) -> Any:
    """Of an interval its ends, of another support what it is."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support in (constraints.real, constraints.real_vector):
        return -math.inf, math.inf
    if not hasattr(support, "lower_bound"):
        return str(support)
    return float(support.lower_bound), float(getattr(support, "upper_bound", math.inf))


def require_latent_dim(name: str, module: Any, latent_dim: int, known: Iterable[str]) -> nn.Module:
    """A module of latents, if it is one of this number of dimensions.

    Raises:
        ValueError: it is not; says what was expected of ``name``, whose names are ``known``.
    """
    if not (isinstance(module, nn.Module) and hasattr(module, "latent_dim")):
        raise ValueError(f"{name}: expected one of {', '.join(known)}, or a module with a latent_dim, got {module!r}")
    if module.latent_dim != latent_dim:
        raise ValueError(f"{name}: expected one of {latent_dim} latent dimensions, got {module.latent_dim}")
    return module
