"""Families of posteriors q(z | x): what the numbers that an encoder gives for x say of its latents z.

The paper's Section 2.4 (arXiv:1312.6114) names three ways to a differentiable draw z = g(e, x) of noise e: the inverse
of a distribution function, a location and a scale, and compositions of such. Beside its diagonal Gaussian there are

elementwise      laplace, logistic, student-t, gumbel, cauchy       on the real line
                 exponential, log-normal, gamma                     above 0
                 kumaraswamy, beta                                  between 0 and 1
on the simplex   dirichlet
full             N(z; mu, L L^T), L lower triangular
flows            iaf (arXiv:1606.04934), spline (arXiv:1906.04032)

Each comes with a prior on the same support.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal, register_kl
from torch.distributions.transforms import AffineTransform
from torch.distributions.utils import clamp_probs
from torch.nn.functional import softplus

from pyro_vae.arguments import one_of, whole_number
from pyro_vae.distributions import Flow, autoregressive_affine, neural_spline
from pyro_vae.models.priors import require_latent_dim
from pyro_vae.networks import softplus_scale

__all__ = [
    "FAMILIES",
    "POSTERIORS",
    "Family",
    "FamilyPosterior",
    "FlowPosterior",
    "FullGaussian",
    "Posterior",
    "as_posterior",
]

_DEGREES_OF_FREEDOM = 5.0
_FLOWS = ("iaf", "spline")


class Posterior(nn.Module):
    """A family of posteriors: a module from an encoder's numbers to a distribution whose draws are reparameterised.

    Args:
        latent_dim: J, at least 1.
        num_parameters: P, how many numbers it takes for one datum.
        **options: the other arguments that build it again.

    Attributes:
        name: its name in ``POSTERIORS`` if :func:`as_posterior` made it, which is then enough to make it again.
        latent_dim: J.
        num_parameters: P.
        config: the arguments that build this architecture again, ``type(posterior)(**posterior.config)``.
    """

    name: str | None = None
    zeros: Tensor

    def __init__(self, latent_dim: int, num_parameters: int, **options: Any) -> None:
        super().__init__()
        self.latent_dim, self.num_parameters = latent_dim, num_parameters
        self.config: dict[str, Any] = {"latent_dim": latent_dim, **options}
        self.register_buffer("zeros", torch.zeros(latent_dim), persistent=False)

    def forward(self, raw: Tensor) -> dist.Distribution:
        """q(z | x), of batch shape (...) and event shape (J,).

        Args:
            raw: any real numbers, (..., P).

        Raises:
            ValueError: there are not P of them.
        """
        if raw.shape[-1:] != (self.num_parameters,):
            raise ValueError(f"raw: expected shape (..., {self.num_parameters}), got {tuple(raw.shape)}")
        return self._law(raw)

    def prior(self) -> dist.Distribution:
        """A standard prior on the same support, of batch shape () and event shape (J,); here N(0, I)."""
        return dist.Normal(self.zeros, torch.ones_like(self.zeros)).to_event(1)

    def _law(self, raw: Tensor) -> dist.Distribution:
        raise NotImplementedError


# Families of the paper's Section 2.4 ----------------------------------------------------------------------------------


class _Logistic(dist.Logistic):  # type: ignore[misc]
    """Without the infinite draws that a uniform number of 0 makes."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        uniform = self.loc.new_empty(self._extended_shape(torch.Size(sample_shape))).uniform_()
        return self.icdf(clamp_probs(uniform))  # type: ignore[no-any-return]


class _LogNormal(dist.LogNormal):  # type: ignore[misc]
    """With draws that neither overflow nor vanish."""

    sample = Distribution.sample  # by rsample: a transformed distribution has another one

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        limit = -math.log(torch.finfo(self.loc.dtype).tiny)
        return self.base_dist.rsample(torch.Size(sample_shape)).clamp(-limit, limit).exp()  # type: ignore[no-any-return]


class _Kumaraswamy(dist.Kumaraswamy):  # type: ignore[misc]
    """With draws strictly between 0 and 1, and accurate densities close to them: torch's are 0, and NaN, in float32."""

    sample = Distribution.sample

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        finfo = torch.finfo(self.concentration0.dtype)
        shape = self._extended_shape(torch.Size(sample_shape))
        exponential = self.concentration0.new_empty(shape).exponential_().clamp_min(finfo.tiny)  # -log(1 - uniform)
        power = (-exponential / self.concentration0).expm1().neg().clamp_min(finfo.tiny)  # z^a
        return power.pow(1 / self.concentration1).clamp(finfo.tiny, 1 - finfo.eps / 2)  # type: ignore[no-any-return]

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        a, b = self.concentration1, self.concentration0
        rest = -(a * value.log()).expm1()  # 1 - z^a
        return a.log() + b.log() + torch.xlogy(a - 1, value) + torch.xlogy(b - 1, rest)  # type: ignore[no-any-return]


@register_kl(_Kumaraswamy, _Kumaraswamy)  # type: ignore[untyped-decorator]
def _no_kl(q: _Kumaraswamy, p: _Kumaraswamy) -> Tensor:
    """None in closed form; torch would compare the two distributions' parameters to see whether they are one."""
    raise NotImplementedError


@dataclass(frozen=True)
class Family:
    """A family of distributions of one number, or of a vector on the simplex.

    Attributes:
        law: of parameters, (..., J) each, to the distribution.
        maps: of any real number to a parameter in its range, for each parameter.
        standard: the prior's parameters.
    """

    law: Callable[..., dist.Distribution]
    maps: tuple[Callable[[Tensor], Tensor], ...]
    standard: tuple[float, ...]


def _as_it_is(raw: Tensor) -> Tensor:
    return raw


def _half_exp(raw: Tensor) -> Tensor:
    return (0.5 * raw).exp()  # raw is a log variance


def _at_least(least: float) -> Callable[[Tensor], Tensor]:
    return lambda raw: softplus(raw) + least


# Of a lesser concentration too many draws are closer to the end of the support than float32 can tell: to 0, which has
# 1e-38 beside it, or to 1, which has 1 - 6e-8.
_towards_0, _towards_1 = _at_least(0.1), _at_least(0.3)

FAMILIES: dict[str, Family] = {
    "diagonal": Family(dist.Normal, (_as_it_is, _half_exp), (0.0, 1.0)),
    "laplace": Family(dist.Laplace, (_as_it_is, softplus_scale), (0.0, 1.0)),
    "logistic": Family(_Logistic, (_as_it_is, softplus_scale), (0.0, 1.0)),
    "student-t": Family(functools.partial(dist.StudentT, _DEGREES_OF_FREEDOM), (_as_it_is, softplus_scale), (0.0, 1.0)),
    "gumbel": Family(dist.Gumbel, (_as_it_is, softplus_scale), (0.0, 1.0)),
    "cauchy": Family(dist.Cauchy, (_as_it_is, softplus_scale), (0.0, 1.0)),
    "exponential": Family(dist.Exponential, (softplus_scale,), (1.0,)),
    "log-normal": Family(_LogNormal, (_as_it_is, softplus_scale), (0.0, 1.0)),
    "gamma": Family(dist.Gamma, (_towards_0, softplus_scale), (1.0, 1.0)),
    "kumaraswamy": Family(_Kumaraswamy, (_towards_1, _towards_1), (1.0, 1.0)),
    "beta": Family(dist.Beta, (_towards_1, _towards_1), (1.0, 1.0)),
    "dirichlet": Family(dist.Dirichlet, (_towards_0,), (1.0,)),
}


class FamilyPosterior(Posterior):
    """Independent latents of a family of ``FAMILIES``; or, of a Dirichlet distribution, shares of a whole.

    Of n numbers for each dimension, the first J are the first parameters, and so on. Scales and concentrations are
    softplus of them, plus a floor; the Gaussian's standard deviation is the exponential of half of them, which are log
    variances (arXiv:1312.6114, eq. (9)). A Student-t distribution has 5 degrees of freedom.

    Args:
        latent_dim: J, at least 1; at least 2 on the simplex.
        family: a name in ``FAMILIES``.

    Raises:
        ValueError: an argument is out of its range; the message says what was expected.

    Example:
        >>> posterior = FamilyPosterior(3, "gamma")
        >>> posterior.num_parameters, posterior(torch.zeros(5, 6)).rsample((7,)).shape
        (6, torch.Size([7, 5, 3]))
    """

    def __init__(self, latent_dim: int, family: str = "diagonal") -> None:
        one_of("family", family, FAMILIES)
        latent_dim = whole_number("latent_dim", latent_dim, 2 if family == "dirichlet" else 1)
        super().__init__(latent_dim, latent_dim * len(FAMILIES[family].maps), family=family)
        self.family = family

    def prior(self) -> dist.Distribution:
        """The family's standard member, of batch shape () and event shape (J,)."""
        return self._member([self.zeros + parameter for parameter in FAMILIES[self.family].standard])

    def _law(self, raw: Tensor) -> dist.Distribution:
        maps = FAMILIES[self.family].maps
        return self._member([to_range(part) for to_range, part in zip(maps, raw.chunk(len(maps), -1), strict=True)])

    def _member(self, parameters: Sequence[Tensor]) -> dist.Distribution:
        law: Any = FAMILIES[self.family].law(*parameters)
        return law if law.event_shape else law.to_event(1)


# Gaussians and flows --------------------------------------------------------------------------------------------------


class FullGaussian(Posterior):
    """A Gaussian of any covariance L L^T, by its Cholesky factor.

    Its KL divergence from a Gaussian prior has a closed form. Of an encoder's J + J (J + 1) / 2 numbers the first J are
    the mean, the others L by rows; softplus makes its diagonal positive.

    Args:
        latent_dim: J, at least 1.

    Example:
        >>> posterior = FullGaussian(3)
        >>> posterior.num_parameters, posterior(torch.zeros(5, 9)).covariance_matrix.shape
        (9, torch.Size([5, 3, 3]))
    """

    def __init__(self, latent_dim: int) -> None:
        latent_dim = whole_number("latent_dim", latent_dim)
        super().__init__(latent_dim, latent_dim + latent_dim * (latent_dim + 1) // 2)

    def _law(self, raw: Tensor) -> dist.Distribution:
        loc, numbers = raw[..., : self.latent_dim], raw[..., self.latent_dim :]
        rows, columns = torch.tril_indices(self.latent_dim, self.latent_dim, device=raw.device)
        lower = raw.new_zeros(*raw.shape[:-1], self.latent_dim, self.latent_dim)
        lower[..., rows, columns] = numbers
        diagonal = softplus_scale(lower.diagonal(dim1=-2, dim2=-1))
        return dist.MultivariateNormal(loc, scale_tril=lower.tril(-1) + diagonal.diag_embed())


@register_kl(MultivariateNormal, Independent)  # type: ignore[untyped-decorator]
def _kl_from_independent_normal(q: MultivariateNormal, p: Independent[Any]) -> Tensor:
    """KL divergence of a full Gaussian from a diagonal one.

    1/2 sum_j [ (Sigma_jj + (mu_j - m_j)^2) / s_j^2 - 1 + log s_j^2 ] - sum_j log L_jj
    """
    if not (isinstance(p.base_dist, Normal) and p.reinterpreted_batch_ndims == 1):
        raise NotImplementedError
    loc, variance = p.base_dist.loc, p.base_dist.variance
    expected = (q.variance + (q.loc - loc).square()) / variance
    log_det = q.scale_tril.diagonal(dim1=-2, dim2=-1).log()
    return (0.5 * (expected - 1 + variance.log()) - log_det).sum(-1)


class FlowPosterior(Posterior):
    r"""A normalising flow of a diagonal Gaussian, conditioned on a context that the encoder gives beside its moments.

        iaf       z = f(mu + sigma e, c)        f inverse autoregressive (Kingma et al., arXiv:1606.04934, Sec. 3)
        spline    z = mu + sigma f(e, c)        f neural splines by coupling (Durkan et al., arXiv:1906.04032)

    A draw takes one pass, and brings its density with it. The density of other values takes the inverse: of "iaf" one
    pass for each dimension, of "spline" two in all. Of one latent, z is an affine function of e in "iaf", Gaussian.

    Args:
        latent_dim: J, at least 1.
        flow: "iaf" or "spline".
        num_transforms: how many f is composed of, at least 1.
        hidden_dims: widths of the hidden layers of each transform's network.
        context_dim: size of c, at least 1; None for J.

    Raises:
        ValueError: an argument is out of its range; the message says what was expected.

    Example:
        >>> posterior = FlowPosterior(3, "iaf", hidden_dims=(8,), context_dim=4)
        >>> posterior.num_parameters, posterior(torch.zeros(5, 10)).rsample((7,)).shape
        (10, torch.Size([7, 5, 3]))
    """

    def __init__(
        self,
        latent_dim: int,
        flow: str = "iaf",
        num_transforms: int = 2,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int | None = None,
    ) -> None:
        one_of("flow", flow, _FLOWS)
        latent_dim = whole_number("latent_dim", latent_dim)
        context_dim = latent_dim if context_dim is None else whole_number("context_dim", context_dim)
        sizes: dict[str, Any] = {
            "num_transforms": whole_number("num_transforms", num_transforms),
            "hidden_dims": tuple(whole_number("hidden_dims", width) for width in hidden_dims),
        }
        super().__init__(latent_dim, 2 * latent_dim + context_dim, flow=flow, context_dim=context_dim, **sizes)
        self.is_inverse_autoregressive = flow == "iaf"
        build = autoregressive_affine if flow == "iaf" else functools.partial(neural_spline, coupling=True)
        self.transform = build(latent_dim, context_dim, **sizes)

    def _law(self, raw: Tensor) -> dist.Distribution:
        loc, log_variance, context = raw.tensor_split((self.latent_dim, 2 * self.latent_dim), -1)
        affine = AffineTransform(loc, _half_exp(log_variance), event_dim=1)
        transform = self.transform(context)
        noise = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        return Flow(noise, [affine, transform] if self.is_inverse_autoregressive else [transform, affine])


POSTERIORS: dict[str, Callable[..., Posterior]] = {
    **{name: functools.partial(FamilyPosterior, family=name) for name in FAMILIES},
    "full": FullGaussian,
    **{name: functools.partial(FlowPosterior, flow=name) for name in _FLOWS},
}


def as_posterior(posterior: str | nn.Module, latent_dim: int) -> Posterior:
    """A family of posteriors of latents of so many dimensions, by its name or as it is.

    Args:
        posterior: a name in ``POSTERIORS``, or a module that has ``latent_dim``, ``num_parameters`` and ``prior()``,
            and is called, as a :class:`Posterior`.
        latent_dim: J.

    Raises:
        ValueError: there is no such name, or the family is of another number of dimensions.

    Example:
        >>> as_posterior("full", 2).num_parameters
        5
    """
    if not isinstance(posterior, str):
        own = require_latent_dim("posterior", posterior, latent_dim, POSTERIORS)
        if not isinstance(getattr(own, "num_parameters", None), int) or not hasattr(own, "prior"):
            raise ValueError(f"posterior: expected a module with num_parameters and prior(), got {own!r}")
        return cast(Posterior, own)
    made = POSTERIORS[one_of("posterior", posterior, POSTERIORS)](latent_dim)
    made.name = posterior
    return made
