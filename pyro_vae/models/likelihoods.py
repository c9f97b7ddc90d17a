"""Likelihoods p(x | z) of a variational auto-encoder: what makes a law of x of the numbers that a decoder gives.

    name                     P    data                   element of x given z
    "bernoulli"              1    0 or 1                 Bernoulli, by its logit
    "gaussian"               2    in [0, 1]              normal, mean and standard deviation of z
    "gaussian-shared"        1    any                    normal, one learned standard deviation for all
    "continuous-bernoulli"   1    in [0, 1]              continuous Bernoulli, by its logit
    "beta"                   2    in [0, 1]              beta law, stretched by half an 8-bit level at both ends
    "discretized-logistic"   15   k / 255                mixture of five discretised logistic laws
    "negative-binomial"      2    0, 1, 2, ...           negative binomial, by mean and inverse dispersion

P is how many numbers a decoder gives for each element of a datum. The elements are independent given z.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import AffineTransform, constraints
from torch.nn.functional import softplus

from pyro_vae.arguments import one_of, whole_number
from pyro_vae.distributions import DiscretizedLogisticMixture
from pyro_vae.networks import LEAST_SCALE

__all__ = [
    "LIKELIHOODS",
    "BernoulliLikelihood",
    "BetaLikelihood",
    "ContinuousBernoulliLikelihood",
    "DiscretizedLogisticLikelihood",
    "GaussianLikelihood",
    "Likelihood",
    "NegativeBinomialLikelihood",
    "SharedGaussianLikelihood",
    "StretchedBeta",
    "as_likelihood",
    "bits_per_dim",
    "likelihood_of",
]

T = TypeVar("T", float, Tensor)

_SCALE_BOUNDS = (1 / 255, 1.0)
_LARGEST_LOGIT = 12.0  # beyond, single precision has too few digits of 1 - lambda for the normalising constant
_NEAR_HALF = (0.49, 0.51)  # where torch takes a series: cut closer, single precision's gradients are off by 0.003
_CONCENTRATION_BOUNDS = (0.01, 255**2 / 8)
_LOG_SCALE_BOUNDS = (-7.0, 7.0)
_LARGEST_LOG_DISPERSION = math.log(1e4)
_HALF_STEP = 0.5 / 255


class Likelihood(nn.Module):
    """What every likelihood is: a module from a decoder's raw output to the law of a datum.

    A likelihood of one's own derives from this, states the attributes, and gives ``_elements``.

    Args:
        data_shape: shape of one datum.

    Attributes:
        name: its name in ``LIKELIHOODS`` if :func:`likelihood_of` made it, which is then enough to make it again.
        num_parameters: P, how many numbers the decoder gives for each element of a datum.
        data_range: the least and the greatest value that data may have; None for any.
        num_levels: how many values an element has, where data are levels of a grid; else None. Only then are
            :func:`bits_per_dim` meaningful.

    Raises:
        ValueError: ``data_shape`` has sizes that are no whole numbers of at least 1; or, when called, the raw output
            has another shape than (..., P, *data_shape).

    Example:
        >>> likelihood = likelihood_of("gaussian", (28, 28))
        >>> law = likelihood(torch.zeros(7, 5, 2, 28, 28))
        >>> law.batch_shape, law.event_shape
        (torch.Size([7, 5]), torch.Size([28, 28]))
        >>> type(likelihood)(**likelihood.config)
        GaussianLikelihood()
    """

    name: str | None = None
    num_parameters: int
    data_range: tuple[float, float] | None
    num_levels: int | None = None

    def __init__(self, data_shape: Sequence[int]) -> None:
        super().__init__()
        self.data_shape = tuple(whole_number("data_shape", size) for size in data_shape)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build it again: ``type(likelihood)(**likelihood.config)``."""
        return {"data_shape": self.data_shape}

    def forward(self, raw: Tensor) -> dist.Distribution:
        """p(x | z): batch shape (...,), event shape ``data_shape``.

        Args:
            raw: the decoder's output, (..., P, *data_shape).
        """
        ndim, shape = len(self.data_shape), (self.num_parameters, *self.data_shape)
        if raw.shape[-len(shape) :] != shape:
            raise ValueError(f"raw: expected shape (..., {', '.join(map(str, shape))}), got {tuple(raw.shape)}")
        return self._elements(raw.movedim(-1 - ndim, 0)).to_event(ndim)

    def _elements(self, raw: Tensor) -> dist.Distribution:
        """The laws of the elements, of batch shape (..., *data_shape), of raw output (P, ..., *data_shape)."""
        raise NotImplementedError


class BernoulliLikelihood(Likelihood):
    """Of binary data, by logits (Kingma & Welling, arXiv:1312.6114, eq. (11))."""

    num_parameters = 1
    data_range = (0.0, 1.0)

    def _elements(self, raw: Tensor) -> dist.Distribution:
        return dist.Bernoulli(logits=raw[0])


class GaussianLikelihood(Likelihood):
    """Of data in [0, 1], by mean and standard deviation (Kingma & Welling, arXiv:1312.6114, eq. (12)).

    The mean is sigma(r_0), and the standard deviation exp(r_1 / 2), kept within [1/255, 1], the step and the range of
    8-bit levels: without a floor the density of a pixel that never changes has no bound.
    """

    num_parameters = 2
    data_range = (0.0, 1.0)

    def _elements(self, raw: Tensor) -> dist.Distribution:
        loc, log_variance = raw
        log_scale = (0.5 * log_variance).clamp(max=1.0)  # no overflow: infinity, cut, has the gradient inf * 0
        return dist.Normal(loc.sigmoid(), log_scale.exp().clamp(*_SCALE_BOUNDS))


class SharedGaussianLikelihood(Likelihood):
    """Of real data, with one learned standard deviation for all elements (Rybkin et al., arXiv:2006.13202).

    The mean is r_0 itself; the standard deviation is a parameter beside the decoder's, exp(log_scale) + 0.0001. It
    weighs the squared error against the divergence of q(z | x), and so is learned, where a fixed one is tuned. The
    floor is for data that the means can meet exactly (few of them, or a latent of as many dimensions as x): there
    the density has no bound as the standard deviation goes to 0. Data should be of the order of one, as standardised
    data are. The floor is added, and does not cut: a parameter of its own that is cut would have no gradient back.
    """

    num_parameters = 1
    data_range = None

    def __init__(self, data_shape: Sequence[int]) -> None:
        super().__init__(data_shape)
        self.log_scale = nn.Parameter(torch.zeros(()))

    @property
    def scale(self) -> Tensor:
        """The standard deviation, a scalar."""
        return self.log_scale.exp() + LEAST_SCALE

    def _elements(self, raw: Tensor) -> dist.Distribution:
        return dist.Normal(raw[0], self.scale)


class ContinuousBernoulliLikelihood(Likelihood):
    """Of data in [0, 1], both ends included (Loaiza-Ganem & Cunningham, arXiv:1907.06845).

        p(x) = C(lambda) lambda^x (1 - lambda)^(1 - x),        lambda = sigma(r_0)

    It is the Bernoulli formula with the constant that makes it a density on [0, 1]. The logit r_0 is kept within
    [-12, 12]: torch's constant needs the digits of 1 - lambda, of which single precision has fewer and fewer, until at
    16 the density no longer integrates to one; and without a bound on the logit there is none on the density of a pixel
    that never changes. For lambda within [0.49, 0.51] torch draws uniformly, where the density is level up to 2 %.
    """

    num_parameters = 1
    data_range = (0.0, 1.0)

    def _elements(self, raw: Tensor) -> dist.Distribution:
        return dist.ContinuousBernoulli(logits=raw[0].clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT), lims=_NEAR_HALF)


class StretchedBeta(dist.TransformedDistribution):  # type: ignore[misc]
    """A beta law stretched from [0, 1] to [-1/510, 1 + 1/510]: by half an 8-bit level at both ends.

        x = (256 y - 1/2) / 255,        y ~ Beta(alpha, beta)

    So the levels 0 and 1 lie inside, where the density is finite. It is the density of x, which integrates to one over
    the stretched interval; draws may lie outside of [0, 1], by half a level at most.

    Args:
        alpha: first concentration, above 0, (...).
        beta: second concentration, above 0, (...).
        validate_args: refuse values outside of the stretched interval.

    Example:
        >>> law = StretchedBeta(torch.tensor(0.5), torch.tensor(2.0))
        >>> bool(law.log_prob(torch.tensor([0.0, 1.0])).isfinite().all()), law.mean
        (True, tensor(0.1988))
    """

    support = constraints.interval(-_HALF_STEP, 1 + _HALF_STEP)

    def __init__(self, alpha: Tensor, beta: Tensor, validate_args: bool | None = None) -> None:
        stretch = AffineTransform(loc=-_HALF_STEP, scale=1 + 2 * _HALF_STEP)
        super().__init__(dist.Beta(alpha, beta, validate_args=validate_args), stretch, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> StretchedBeta:
        """The same for a larger batch."""
        beta = self.base_dist.expand(torch.Size(batch_shape))
        return type(self)(beta.concentration1, beta.concentration0, validate_args=self._validate_args)

    @property
    def mean(self) -> Tensor:
        """Expected value, (...)."""
        mean: Tensor = self.transforms[0](self.base_dist.mean)
        return mean

    @property
    def variance(self) -> Tensor:
        """Variance, (...)."""
        variance: Tensor = self.base_dist.variance * self.transforms[0].scale ** 2
        return variance

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of x, (...), in nats; of a draw that was rounded to an end, that of a point just inside."""
        if self._validate_args:
            self._validate_sample(value)
        margin = _HALF_STEP - 2 * torch.finfo(value.dtype).eps
        log_density: Tensor = super().log_prob(value.clamp(-margin, 1 + margin))
        return log_density


class BetaLikelihood(Likelihood):
    """Of data in [0, 1], both ends included, by the two concentrations of a beta law: :class:`StretchedBeta`.

    alpha = softplus(r_0) + 0.01 and beta = softplus(r_1) + 0.01, up to 255^2 / 8, where the standard deviation of a
    symmetric law is one 8-bit level: without a ceiling the density of a pixel that never changes has no bound.
    """

    num_parameters = 2
    data_range = (0.0, 1.0)

    def _elements(self, raw: Tensor) -> dist.Distribution:
        least, most = _CONCENTRATION_BOUNDS
        alpha, beta = (softplus(raw) + least).clamp(max=most)
        return StretchedBeta(alpha, beta)


class DiscretizedLogisticLikelihood(Likelihood):
    """Of 8-bit images k / 255, by a mixture of K discretised logistic laws.

    That is PixelCNN++'s likelihood (Salimans et al., arXiv:1701.05517, Sec. 2.1): :class:`DiscretizedLogisticMixture`.
    It gives the levels themselves probabilities, and so bits per dimension. Of the 3 K numbers of an element the first
    K are logits of the weights, then come means and log scales, both of levels that are mapped to [-1, 1], the log
    scales kept within [-7, 7]. Channels are elements like others: the paper's autoregression over them is left out.

    Args:
        data_shape: shape of one datum.
        num_components: K, at least 1.
    """

    data_range = (0.0, 1.0)
    num_levels = 256

    def __init__(self, data_shape: Sequence[int], num_components: int = 5) -> None:
        super().__init__(data_shape)
        self.num_components = whole_number("num_components", num_components)
        self.num_parameters = 3 * self.num_components

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build it again."""
        return super().config | {"num_components": self.num_components}

    def _elements(self, raw: Tensor) -> dist.Distribution:
        logits, loc, log_scale = raw.unflatten(0, (3, self.num_components)).movedim(1, -1)
        log_scale = log_scale.clamp(*_LOG_SCALE_BOUNDS) - math.log(2)  # half as wide is [0, 1] as [-1, 1]
        return DiscretizedLogisticMixture(logits, (loc + 1) / 2, log_scale, self.num_levels)


class NegativeBinomialLikelihood(Likelihood):
    """Of counts with more variance than a Poisson law's (scVI: Lopez et al., Nature Methods 15, 2018).

        mean mu = exp(r_0),    inverse dispersion theta = exp(r_1),    variance mu + mu^2 / theta

    Without scVI's inflation of zeros. theta is kept within [1e-4, 1e4]: beyond, the variance is a Poisson law's but for
    a factor of 1 + mu / 10,000, and the gamma functions of single precision have no digits left to tell. The density
    takes log mu, and does not overflow; means and draws do, where log mu is above 88 in single precision.
    """

    num_parameters = 2
    data_range = (0.0, math.inf)

    def _elements(self, raw: Tensor) -> dist.Distribution:
        log_mean, log_inverse = raw[0], raw[1].clamp(-_LARGEST_LOG_DISPERSION, _LARGEST_LOG_DISPERSION)
        return dist.NegativeBinomial(log_inverse.exp(), logits=log_mean - log_inverse)


LIKELIHOODS: dict[str, Callable[[Sequence[int]], Likelihood]] = {
    "bernoulli": BernoulliLikelihood,
    "gaussian": GaussianLikelihood,
    "gaussian-shared": SharedGaussianLikelihood,
    "continuous-bernoulli": ContinuousBernoulliLikelihood,
    "beta": BetaLikelihood,
    "discretized-logistic": DiscretizedLogisticLikelihood,
    "negative-binomial": NegativeBinomialLikelihood,
}


def likelihood_of(name: str, data_shape: Sequence[int]) -> Likelihood:
    """A likelihood by its name.

    Args:
        name: one of ``LIKELIHOODS``; the module's head says what each is of.
        data_shape: shape of one datum.

    Raises:
        ValueError: there is no likelihood of that name (the nearest is suggested), or ``data_shape`` is none.

    Example:
        >>> likelihood_of("discretized-logistic", (32, 32, 3)).num_parameters
        15
    """
    likelihood = LIKELIHOODS[one_of("likelihood", name, LIKELIHOODS)](data_shape)
    likelihood.name = name
    return likelihood


def as_likelihood(likelihood: str | Likelihood, data_shape: Sequence[int]) -> Likelihood:
    """A likelihood of data of a shape, by its name or as it is.

    Args:
        likelihood: a name in ``LIKELIHOODS``, or a likelihood.
        data_shape: shape of one datum.

    Raises:
        ValueError: there is no such name, or the likelihood is of data of another shape.

    Example:
        >>> as_likelihood("bernoulli", (28, 28))
        BernoulliLikelihood()
    """
    made = likelihood if isinstance(likelihood, Likelihood) else likelihood_of(likelihood, data_shape)
    if made.data_shape != tuple(data_shape):
        raise ValueError(f"likelihood: expected one of data of shape {tuple(data_shape)}, got {made.data_shape}")
    return made


def bits_per_dim(log_prob_nats: T, num_dims: int) -> T:
    """Bits per dimension, -log p(x) / (D ln 2): how many bits a lossless code takes for each element of a datum.

    They are meaningful where p(x) is a probability, and so of likelihoods with ``num_levels`` L alone, of which a
    uniform law has log2 L. Of a density ("gaussian", "beta", ...) the number depends on the unit of x, and can be
    negative.

    Args:
        log_prob_nats: log p(x), or a bound of it, in nats.
        num_dims: D, elements of a datum.

    Returns:
        Of the type and shape of ``log_prob_nats``, in bits.

    Raises:
        ValueError: ``num_dims`` is no whole number of at least 1.

    Example:
        >>> round(bits_per_dim(784 * math.log(1 / 256), 784), 6)
        8.0
    """
    return -log_prob_nats / (whole_number("num_dims", num_dims) * math.log(2))
