"""Normalising flows: noise that invertible networks carry to where it is likely, and the density it has there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
import zuko  # type: ignore[import-untyped,unused-ignore]
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Transform, constraints

dist.enable_validation(dist.is_validation_enabled())  # zuko, when imported, switches torch's off for everybody

__all__ = ["Flow", "autoregressive_affine", "neural_spline"]


class Flow(TorchDistribution):  # type: ignore[misc]
    r"""The law of f(e) for noise e and an invertible f (Rezende & Mohamed, arXiv:1505.05770, eqs. (5)-(7)).

        log q(f(e)) = log p(e) - log |det df/de|

    A draw's density is computed with it and kept, so that :meth:`log_prob` of the very tensor that was drawn last needs
    no inverse of f, which may be slow. Its gradient is the same, by way of f and by way of the draw. For other values,
    and where gradients are wanted of a draw that was made without them, f is inverted.

    Args:
        base_dist: law of e, of event shape (J,).
        transforms: whose composition is f, the first one first, of event shape (J,) each; their parameters broadcast
            with the batch shape of ``base_dist``.

    Raises:
        ValueError: ``base_dist`` is not a law of vectors.

    Example:
        >>> from torch.distributions.transforms import AffineTransform
        >>> noise = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> flow = Flow(noise, [AffineTransform(3.0, torch.tensor([2.0, 0.5]), event_dim=1)])
        >>> z = flow.rsample((5,))
        >>> torch.allclose(flow.log_prob(z), flow.log_prob(z.clone()))
        True
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector

    def __init__(
        self, base_dist: TorchDistribution, transforms: Sequence[Transform], validate_args: bool | None = None
    ) -> None:
        if len(base_dist.event_shape) != 1:
            raise ValueError(f"base_dist: expected a law of event shape (J,), got {tuple(base_dist.event_shape)}")
        self.base_dist, self.transform = base_dist, zuko.transforms.ComposedTransform(*transforms)
        super().__init__(base_dist.batch_shape, base_dist.event_shape, validate_args=validate_args)
        self._drawn: _Drawn | None = None

    @property
    def has_rsample(self) -> bool:
        """Whether the noise has reparameterised draws."""
        return bool(self.base_dist.has_rsample)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Flow:
        """The same for a larger batch."""
        return type(self)(self.base_dist.expand(torch.Size(batch_shape)), [self.transform], self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, (...), in nats.

        Args:
            value: (..., J).
        """
        drawn = self._drawn
        if drawn is not None and drawn.value is value and (drawn.graded or not torch.is_grad_enabled()):
            return drawn.log_prob if torch.is_grad_enabled() else drawn.log_prob.detach()
        if self._validate_args:
            self._validate_sample(value)
        value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape))
        noise, log_det = self.transform.inv.call_and_ladj(value)
        return self.base_dist.log_prob(noise) + log_det  # type: ignore[no-any-return]

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw vectors, (*sample_shape, ..., J), with gradients."""
        noise = self.base_dist.rsample(torch.Size(sample_shape))
        value, log_det = self.transform.call_and_ladj(noise)
        self._drawn = _Drawn(value, self.base_dist.log_prob(noise) - log_det, torch.is_grad_enabled())
        return value  # type: ignore[no-any-return]

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw vectors, (*sample_shape, ..., J)."""
        return self.rsample(sample_shape)


@dataclass(frozen=True, eq=False)
class _Drawn:
    """What a flow drew last.

    Attributes:
        value: the draw, (..., J).
        log_prob: its log density, (...).
        graded: whether they were made with gradients, if there are any.
    """

    value: Tensor
    log_prob: Tensor
    graded: bool


def autoregressive_affine(dim: int, context_dim: int, num_transforms: int, hidden_dims: Sequence[int]) -> nn.Module:
    r"""Affine transforms, each element's by a masked network of those before it and of a context.

        y_i = m_i(x_<i, c) + s_i(x_<i, c) x_i

    From x to y all elements are computed at once, from y to x one after the other; the order is reversed from one
    transform to the next (Kingma et al., arXiv:1606.04934, eqs. (9)-(11); Papamakarios et al., arXiv:1705.07057).

    Args:
        dim: size of x and y. A single element has nothing before it, and an affine function of the context's.
        context_dim: size of c; 0 for none.
        num_transforms: how many, at least 1.
        hidden_dims: widths of each network's hidden layers.

    Returns:
        Module from c (..., context_dim), or None, to a transform of vectors (..., dim).

    Example:
        >>> transform = autoregressive_affine(3, 2, num_transforms=2, hidden_dims=(8,))(torch.zeros(2))
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(transform.inv(transform(x)), x, atol=1e-5)
        True
    """
    flow: nn.Module = zuko.flows.MAF(dim, context_dim, **_sizes(num_transforms, hidden_dims)).transform
    return flow


def neural_spline(
    dim: int, context_dim: int, num_transforms: int, hidden_dims: Sequence[int], *, coupling: bool
) -> nn.Module:
    """Monotone rational-quadratic splines of each element on [-5, 5] (Durkan et al., arXiv:1906.04032, Sec. 3).

    Beyond, they are the identity. Their knots come from a network of other elements and of a context.

    Args:
        dim: size of what is transformed.
        context_dim: size of the context; 0 for none.
        num_transforms: how many, at least 1.
        hidden_dims: widths of each network's hidden layers.
        coupling: True where one half of the elements goes before the other one, so that both directions are fast;
            False where each element goes after all before it, and the inverse is computed one after the other.

    Returns:
        Module from a context (..., context_dim), or None, to a transform of vectors (..., dim).

    Example:
        >>> transform = neural_spline(3, 0, num_transforms=2, hidden_dims=(8,), coupling=True)()
        >>> transform(torch.full((3,), 7.0)).tolist()
        [7.0, 7.0, 7.0]
    """
    passes = 2 if coupling else None
    flow: nn.Module = zuko.flows.NSF(dim, context_dim, passes=passes, **_sizes(num_transforms, hidden_dims)).transform
    return flow


def _sizes(num_transforms: int, hidden_dims: Sequence[int]) -> dict[str, Any]:
    """Of zuko's networks, which are made smooth here, for samplers that follow a density's gradient."""
    return {"transforms": num_transforms, "hidden_features": tuple(hidden_dims), "activation": nn.ELU}
