"""The multi-layer perceptrons of the paper's Appendix C.

``MLP`` with D outputs gives the logits of the Bernoulli MLP (C.1, eq. (11)); ``GaussianMLP`` gives the mean and the
standard deviation of the Gaussian MLP (C.2, eq. (12)). Both act on the last dimension and leave the others alone, so
that particles and batch, (K, M, ...), pass through unchanged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

__all__ = ["ACTIVATIONS", "LEAST_SCALE", "MLP", "GaussianMLP", "init_paper", "softplus_scale"]

LEAST_SCALE = 1e-4
ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "softplus": nn.Softplus}


class MLP(nn.Sequential):
    """Fully connected layers with an activation between them (arXiv:1312.6114, eq. (11) before its sigmoid).

    Args:
        in_dim: size of the last dimension of the input.
        hidden_dims: width of each hidden layer; empty for a linear map.
        out_dim: size of the last dimension of the output.
        activation: "tanh" (the paper's), "relu" or "softplus".

    Example:
        >>> MLP(784, (500,), 20)(torch.zeros(5, 100, 784)).shape
        torch.Size([5, 100, 20])
    """

    def __init__(self, in_dim: int, hidden_dims: Sequence[int], out_dim: int, activation: str = "tanh") -> None:
        layers: list[nn.Module] = []
        for wide, narrow in itertools.pairwise((in_dim, *hidden_dims)):
            layers += [nn.Linear(wide, narrow), ACTIVATIONS[activation]()]
        super().__init__(*layers, nn.Linear((in_dim, *hidden_dims)[-1], out_dim))


class GaussianMLP(nn.Module):
    """Mean and standard deviation of a diagonal Gaussian (arXiv:1312.6114, eq. (12)).

    Mean and log variance are two linear maps of one hidden layer, computed as one matrix product.

    Args:
        in_dim: size of the last dimension of the input.
        hidden_dims: width of each hidden layer.
        out_dim: dimension of the Gaussian.
        activation: "tanh" (the paper's), "relu" or "softplus".
        scale_bounds: the standard deviation is kept between these two.

    Example:
        >>> loc, scale = GaussianMLP(784, (500,), 20)(torch.zeros(100, 784))
        >>> loc.shape, bool((scale > 0).all())
        (torch.Size([100, 20]), True)
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dims: Sequence[int],
        out_dim: int,
        activation: str = "tanh",
        scale_bounds: tuple[float, float] = (0.0, math.inf),
    ) -> None:
        super().__init__()
        self.scale_bounds = scale_bounds
        self.layers = MLP(in_dim, hidden_dims, 2 * out_dim, activation)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (mean, standard deviation), each (..., out_dim), of x (..., in_dim)."""
        loc, log_variance = self.layers(x).chunk(2, -1)
        return loc, (0.5 * log_variance).exp().clamp(*self.scale_bounds)


def softplus_scale(raw: Tensor) -> Tensor:
    """A standard deviation above 0 of any number: a softplus alone underflows to 0 in single precision."""
    return softplus(raw) + LEAST_SCALE


@torch.no_grad()
def init_paper(module: nn.Module) -> None:
    """Draw every parameter, in place, from N(0, 0.01): a standard deviation of 0.1 (arXiv:1312.6114, Sec. 5).

    Args:
        module: any module; all its parameters are drawn anew from torch's global generator.
    """
    for parameter in module.parameters():
        parameter.normal_(0.0, 0.1)
