"""A linear-Gaussian state-space model as a program of the package, with guides from exact to blind."""

import dataclasses

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.distributions import Emissions, MarkovSequence
from tests.oracles import StateSpace


def example(J: int = 2, D: int = 3) -> StateSpace:
    """A stable model with J = 2 and D = 3, or the first so many of them."""
    return StateSpace(
        transition=torch.tensor([[0.8, 0.3], [-0.2, 0.7]])[:J, :J],
        process=torch.tensor([[0.7, 0.0], [0.2, 0.5]])[:J, :J],
        emission=torch.tensor([[1.0, -0.5], [0.3, 0.8], [-0.7, 0.2]])[:D, :J],
        noise=torch.tensor([0.6, 0.9, 0.7])[:D],
        initial=torch.tensor([[1.2, 0.0], [-0.3, 0.9]])[:J, :J],
    )


def vague() -> StateSpace:
    """The example, of which so little is observed that estimates by few particles have a small variance."""
    law = example()
    return dataclasses.replace(law, noise=3 * law.noise)


class Moving(nn.Module):
    """N(weight z, scale)."""

    def __init__(self, weight: Tensor, scale_tril: Tensor) -> None:
        super().__init__()
        self.weight, self.scale_tril = nn.Parameter(weight), nn.Parameter(scale_tril)

    def forward(self, z: Tensor) -> dist.Distribution:
        return dist.MultivariateNormal(z @ self.weight.T, scale_tril=self.scale_tril)


class Emitting(nn.Module):
    """N(weight z, noise)."""

    def __init__(self, weight: Tensor, noise: Tensor) -> None:
        super().__init__()
        self.weight, self.noise = nn.Parameter(weight), nn.Parameter(noise)

    def forward(self, z: Tensor) -> dist.Distribution:
        return dist.Normal(z @ self.weight.T, self.noise).to_event(1)


class Conditioned(nn.Module):
    """N(gain z + offset, scale), all three of them inputs; the scale less I, so that the padding's zeros are a law."""

    def forward(self, z: Tensor, u: Tensor) -> dist.Distribution:
        J = z.shape[-1]
        gain, offset, root = u.split([J * J, J, J * J], -1)
        loc = (gain.unflatten(-1, (J, J)) @ z[..., None]).squeeze(-1) + offset
        return dist.MultivariateNormal(loc, scale_tril=torch.eye(J) + root.unflatten(-1, (J, J)))


class Amortized(nn.Module):
    """N(gain z + slope x_t, scale), diagonal."""

    def __init__(self, J: int, D: int) -> None:
        super().__init__()
        self.gain, self.slope = nn.Parameter(0.7 * torch.eye(J)), nn.Parameter(0.1 * torch.ones(J, D))
        self.log_scale = nn.Parameter(torch.full((J,), 0.3))

    def forward(self, z: Tensor, x: Tensor) -> dist.Distribution:
        return dist.Normal(z @ self.gain.T + x @ self.slope.T, self.log_scale.exp()).to_event(1)


class LinearStateSpace(nn.Module):
    """The program of a :class:`tests.oracles.StateSpace`.

    Args:
        law: the parameters.
        guide: "smoother", the exact posterior; "prior"; or "amortized", some parametric one that sees x_t.
    """

    def __init__(self, law: StateSpace, guide: str = "smoother") -> None:
        super().__init__()
        self.kind = guide
        self.transition, self.emission = Moving(law.transition, law.process), Emitting(law.emission, law.noise)
        self.initial = nn.Parameter(law.initial)
        self.conditioned, self.amortized = Conditioned(), Amortized(*law.emission.shape[::-1])

    def prior(self, num_steps: int, lengths: Tensor | None = None) -> MarkovSequence:
        first = dist.MultivariateNormal(torch.zeros(len(self.initial)), scale_tril=self.initial)
        return MarkovSequence(first, self.transition, num_steps, lengths=lengths)

    def model(self, x: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None) -> None:
        pyro.module(f"model{id(self)}", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(x.shape[1], lengths))
            pyro.sample("x", Emissions(self.emission, z, lengths=lengths, mask=mask), obs=x)

    def guide(self, x: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None) -> None:
        pyro.module(f"model{id(self)}", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encode(x, lengths, mask))

    def encode(self, x: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None) -> MarkovSequence:
        if self.kind == "prior":
            return self.prior(x.shape[1], lengths)
        if self.kind == "amortized":
            first = self.amortized(torch.zeros(len(self.initial)), x[:, 0])
            return MarkovSequence(first, self.amortized, x.shape[1], x, lengths)
        seen = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand(x.shape)
        if lengths is not None:
            seen = seen & (torch.arange(x.shape[1]) < lengths[:, None])[..., None]
        first, u = self._backward(x, seen)
        return MarkovSequence(first, self.conditioned, x.shape[1], u, lengths)

    def _backward(self, x: Tensor, seen: Tensor) -> tuple[dist.Distribution, Tensor]:
        """q(z_1 | x), and of q(z_t | z_{t-1}, x) gain, offset and scale, by a backward recursion of information."""
        A, C, eye = self.transition.weight, self.emission.weight, torch.eye(len(self.initial))
        precision = torch.linalg.inv(self.transition.scale_tril @ self.transition.scale_tril.T)
        information, shift, found = torch.zeros(len(x), *A.shape), torch.zeros(len(x), len(A)), []
        for t in reversed(range(x.shape[1])):
            weights = seen[:, t] / self.emission.noise**2  # (M, D)
            information = information + C.T @ (weights[..., None] * C)
            shift = shift + (weights * torch.where(seen[:, t], x[:, t], 0.0)) @ C
            if t == 0:
                break
            cov = torch.linalg.inv(precision + information)
            offset = (cov @ shift[..., None]).squeeze(-1)
            root = torch.linalg.cholesky(cov) - eye
            found.append(torch.cat([(cov @ precision @ A).flatten(1), offset, root.flatten(1)], -1))
            information = A.T @ (precision @ (eye - cov @ precision)) @ A
            shift = offset @ precision @ A
        cov = torch.linalg.inv(torch.linalg.inv(self.initial @ self.initial.T) + information)
        first = dist.MultivariateNormal((cov @ shift[..., None]).squeeze(-1), scale_tril=torch.linalg.cholesky(cov))
        unread = torch.zeros(len(x), 2 * len(A) ** 2 + len(A))
        return first, torch.stack([unread, *found[::-1]], 1)


def draws(law: StateSpace, num_data: int, num_steps: int) -> Tensor:
    """Observations (M, T, D) of the model itself."""
    joint = law.joint(num_steps)
    D = len(law.emission)
    flat = torch.randn(num_data, len(joint.cov)) @ torch.linalg.cholesky(joint.cov).T
    return flat[:, -num_steps * D :].reshape(num_data, num_steps, D)


def main() -> None:
    """Print the bounds that the docstring of ``objectives/fivo.py`` tells."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    law = example()
    x, program = draws(law, 20, 50), LinearStateSpace(law, "prior")
    print(f"log p(x): {law.log_marginal(x).mean():.1f}")
    for objective in (kind(count) for kind in (pv.FIVO, pv.IWAE) for count in (4, 16, 64)):
        with torch.no_grad(), pyro.validation_enabled(False):
            bound = objective.bound(program.model, program.guide, x.repeat_interleave(50, 0))
        means = bound.unflatten(0, (20, 50)).mean(0)
        print(f"{objective}: {means.mean():.1f} +- {means.std() / 50**0.5:.1f}")


if __name__ == "__main__":
    main()
