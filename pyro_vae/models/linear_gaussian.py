"""A linear-Gaussian model whose evidence and posterior are exact: what every estimator is proved on.

p(z) = N(z; 0, I),   p(x | z) = N(x; W z + b, s^2 I)          probabilistic PCA (Tipping & Bishop, 1999)
p(x) = N(x; b, W W' + s^2 I)
p(z | x) = N(z; V W' (x - b) / s^2, V),   V = (I + W' W / s^2)^-1
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.models.registration import register

__all__ = ["LinearGaussian"]


class LinearGaussian(nn.Module):
    """Probabilistic PCA with its exact posterior as guide (Tipping & Bishop 1999, eqs. (3)-(9)).

    Args:
        weight: W, (D, J).
        bias: b, (D,); zeros if None.
        noise_scale: s > 0, standard deviation of the observation noise.
        guide_shift: added to the guide's mean, and
        guide_widening: factor on the guide's covariance root; both only to make a guide that is wrong on purpose.

    Raises:
        ValueError: a shape or the noise is not as stated.

    Example:
        >>> model = LinearGaussian(torch.ones(3, 1))
        >>> model.log_marginal(torch.zeros(2, 3)).shape
        torch.Size([2])
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        noise_scale: float = 1.0,
        *,
        guide_shift: float = 0.0,
        guide_widening: float = 1.0,
    ) -> None:
        super().__init__()
        bias = weight.new_zeros(weight.shape[:1]) if bias is None else bias
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"expected a weight (D, J) and a bias (D,), got {tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        if not (noise_scale > 0 and guide_widening > 0):
            raise ValueError(f"expected positive scales, got noise {noise_scale} and widening {guide_widening}")
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        self.log_noise_scale = nn.Parameter(weight.new_tensor(noise_scale).log())
        self.guide_shift, self.guide_widening = guide_shift, guide_widening

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of one datum, (D,)."""
        return tuple(self.bias.shape)

    def model(self, x: Tensor) -> None:
        """p(x, z) of a minibatch x (M, D): Pyro sites "z" and "x" in the plate "data"."""
        register(self)
        prior = dist.MultivariateNormal(x.new_zeros(self.weight.shape[1]), torch.eye(self.weight.shape[1]).to(x))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", self.decode(z), obs=x)

    def guide(self, x: Tensor) -> None:
        """The exact posterior (or one made wrong on purpose) of a minibatch x (M, D)."""
        register(self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encode(x))

    def decode(self, z: Tensor) -> dist.Distribution:
        """p(x | z) of latents z (..., J): event shape (D,)."""
        return dist.Normal(z @ self.weight.T + self.bias, self.log_noise_scale.exp()).to_event(1)

    def encode(self, x: Tensor) -> dist.Distribution:
        """The guide's q(z | x) of data x (..., D): event shape (J,); the posterior unless made wrong."""
        posterior = self.posterior(x)
        return dist.MultivariateNormal(
            posterior.loc + self.guide_shift, scale_tril=posterior.scale_tril * self.guide_widening
        )

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """The exact p(z | x) of data x (..., D): event shape (J,)."""
        noise_variance = (2 * self.log_noise_scale).exp()
        precision = torch.eye(self.weight.shape[1]).to(x) + self.weight.T @ self.weight / noise_variance
        covariance = torch.linalg.inv(precision)
        loc = (x - self.bias) @ self.weight @ covariance / noise_variance
        return dist.MultivariateNormal(loc, covariance_matrix=covariance)

    def log_marginal(self, x: Tensor) -> Tensor:
        """The exact log p(x), in nats, of data x (M, D): shape (M,)."""
        noise = (2 * self.log_noise_scale).exp() * torch.eye(len(self.bias)).to(x)
        evidence = dist.MultivariateNormal(self.bias, self.weight @ self.weight.T + noise)
        log_prob: Tensor = evidence.log_prob(x)
        return log_prob
