"""A guide's law of z_t that is linear in z_{t-1}, with coefficients from a recurrent network of the data."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.networks import softplus_scale

__all__ = ["LinearCombiner"]


class LinearCombiner(nn.Module):
    """q(z_t | z_{t-1}, h_t) = N(F(h_t) z_{t-1} + c(h_t), diag(s(h_t))^2).

    That is the form of the posterior where z moves linearly and x depends on it linearly, given all that F, c and s
    may depend on; where z_t's elements are independent of each other, F is diagonal.

    Args:
        latent_dim: J.
        rnn_dim: H, size of h_t.
        diagonal: whether F is.
        loc: where q begins: F is half the identity, and c is half of this.

    Example:
        >>> LinearCombiner(2, 5)(torch.zeros(7, 2), torch.zeros(7, 5)).event_shape
        torch.Size([2])
    """

    def __init__(self, latent_dim: int, rnn_dim: int, *, diagonal: bool = False, loc: float = 0.0) -> None:
        super().__init__()
        J, self.diagonal = latent_dim, diagonal
        weight = torch.full((J,), 0.5) if diagonal else 0.5 * torch.eye(J).flatten()
        self.sizes = [len(weight), J, J]
        self.read = nn.Linear(rnn_dim, sum(self.sizes))
        with torch.no_grad():
            self.read.weight.mul_(0.1)
            self.read.bias.copy_(torch.cat([weight, torch.full((J,), 0.5 * loc), torch.zeros(J)]))

    def forward(self, z: Tensor, states: Tensor) -> dist.Distribution:
        """The law of z_t, event shape (J,), of z_{t-1} (..., J) and h_t (..., H)."""
        weight, offset, raw = self.read(states).split(self.sizes, -1)
        J = z.shape[-1]
        moved = weight * z if self.diagonal else (weight.reshape(*weight.shape[:-1], J, J) @ z[..., None]).squeeze(-1)
        return dist.Normal(moved + offset, softplus_scale(raw)).to_event(1)
