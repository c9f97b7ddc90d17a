"""Closed forms that know nothing of the package, and small Pyro programs that have them.

A linear-Gaussian model is one dense joint Gaussian of all its variables; evidence, posterior and evidence lower bound
follow from that joint by Cholesky factors, never from the formulas the package uses.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

# Gaussians ------------------------------------------------------------------------------------------------------------


@dataclass
class Gaussian:
    """N(mean, cov): mean (..., n), cov (n, n)."""

    mean: Tensor
    cov: Tensor

    @classmethod
    def of_noise(cls, offset: Tensor, root: Tensor) -> "Gaussian":
        """The law of offset + root @ e, e standard normal."""
        return cls(offset, root @ root.T)

    def log_prob(self, x: Tensor) -> Tensor:
        root = torch.linalg.cholesky(self.cov)
        white = torch.linalg.solve_triangular(root, (x - self.mean).unsqueeze(-1), upper=False).squeeze(-1)
        return -0.5 * (white.square().sum(-1) + len(root) * math.log(2 * math.pi)) - root.diagonal().log().sum()

    def last(self, n: int) -> "Gaussian":
        """The marginal of the last n variables."""
        return Gaussian(self.mean[..., -n:], self.cov[-n:, -n:])

    def given_last(self, x: Tensor) -> "Gaussian":
        """The law of the others given that the last variables are x (..., n)."""
        n = x.shape[-1]
        root = torch.linalg.cholesky(self.cov[-n:, -n:])
        gain = torch.cholesky_solve(self.cov[-n:, :-n], root).T
        mean = self.mean[..., :-n] + (x - self.mean[..., -n:]) @ gain.T
        return Gaussian(mean, self.cov[:-n, :-n] - gain @ self.cov[-n:, :-n])

    def entropy(self) -> Tensor:
        root = torch.linalg.cholesky(self.cov)
        return root.diagonal().log().sum() + 0.5 * len(root) * (1 + math.log(2 * math.pi))


def elbo(joint: Gaussian, q: Gaussian, x: Tensor) -> Tensor:
    """E_q[log p(z, x)] + H[q] for a joint of (z, x): shape (...) of q's means."""
    z_and_x = torch.cat([q.mean, x.expand(*q.mean.shape[:-1], x.shape[-1])], -1)
    J = q.mean.shape[-1]
    precision = torch.cholesky_inverse(torch.linalg.cholesky(joint.cov))[:J, :J]
    return joint.log_prob(z_and_x) - 0.5 * (precision * q.cov).sum() + q.entropy()


def linear_gaussian(weight: Tensor, bias: Tensor, noise_scale: Tensor | float) -> Gaussian:
    """The joint of (z, x): z ~ N(0, I), x ~ N(weight z + bias, noise_scale^2 I)."""
    D, J = weight.shape
    eye = torch.eye(J)
    root = torch.cat([torch.cat([eye, torch.zeros(J, D)], 1), torch.cat([weight, noise_scale * torch.eye(D)], 1)])
    return Gaussian.of_noise(torch.cat([torch.zeros(J), bias]), root)


# Linear-Gaussian state-space models -----------------------------------------------------------------------------------


@dataclass
class StateSpace:
    """z_1 = initial e_1, z_t = transition z_{t-1} + process e_t, x_t = emission z_t + noise f_t; e, f standard normal.

    ``transition``, ``process`` and ``initial`` are (J, J), ``emission`` (D, J), ``noise`` (D,). Everything follows from
    one dense joint Gaussian of all steps.
    """

    transition: Tensor
    process: Tensor
    emission: Tensor
    noise: Tensor
    initial: Tensor

    def joint(self, num_steps: int) -> Gaussian:
        """The law of (z_1, ..., z_T, x_1, ..., x_T), flat."""
        J, D, T = len(self.transition), len(self.emission), num_steps
        rows = [torch.zeros(J, T * J + T * D)]
        for t in range(T):
            row = self.transition @ rows[-1]
            row[:, t * J : (t + 1) * J] += self.initial if t == 0 else self.process
            rows.append(row)
        emitted = [self.emission @ row for row in rows[1:]]
        for t, row in enumerate(emitted):
            row[:, T * J + t * D : T * J + (t + 1) * D] += self.noise.diag()
        root = torch.cat([*rows[1:], *emitted])
        return Gaussian.of_noise(torch.zeros(len(root)), root)

    def _of_observed(self, x: Tensor, seen: Tensor) -> tuple[Gaussian, Tensor]:
        """The law of the latents and of what is observed of x (T, D), and its values."""
        joint, latent = self.joint(len(x)), len(x) * len(self.transition)
        kept = torch.cat([torch.arange(latent), latent + seen.flatten().nonzero()[:, 0]])
        return Gaussian(joint.mean[kept], joint.cov[kept][:, kept]), x.flatten()[seen.flatten()]

    def log_marginal(self, x: Tensor, lengths: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        """log p(x) of sequences (M, T, D), (M,), of which only the first steps count, and what was seen (M, T, D)."""
        lengths = torch.full(x.shape[:1], x.shape[1]) if lengths is None else lengths
        seen = torch.ones_like(x, dtype=torch.bool) if seen is None else seen
        found = []
        for row, n, mask in zip(x, lengths.tolist(), seen, strict=True):
            law, values = self._of_observed(row[:n], mask[:n])
            found.append(law.last(len(values)).log_prob(values))
        return torch.stack(found)

    def smoothed(self, x: Tensor) -> Gaussian:
        """p(z | x) of one sequence (T, D), flat."""
        law, values = self._of_observed(x, torch.ones_like(x, dtype=torch.bool))
        return law.given_last(values)

    def filter_means(self, x: Tensor) -> Tensor:
        """E[z_t | x_1, ..., x_t] of one sequence (T, D): (T, J)."""
        J = len(self.transition)
        return torch.stack([self.smoothed(x[: t + 1]).mean[-J:] for t in range(len(x))])


def hidden_markov_log_marginal(start: Tensor, transition: Tensor, log_likelihood: Tensor) -> Tensor:
    """log p(x) by a sum over all C^T paths of a chain on C states.

    Args:
        start: (C,).
        transition: rows of probabilities, (C, C).
        log_likelihood: of x_t in each state, (T, C).
    """
    total = torch.zeros(())
    for path in torch.cartesian_prod(*[torch.arange(len(start))] * len(log_likelihood)):
        moves = transition[path[:-1], path[1:]].prod()
        total = total + start[path[0]] * moves * log_likelihood[torch.arange(len(path)), path].sum().exp()
    return total.log()


# Quadrature -----------------------------------------------------------------------------------------------------------


def log_marginal_by_quadrature(log_likelihood: Callable[[np.ndarray], np.ndarray], points: int = 2001) -> np.ndarray:
    """log of the integral of p(x | z) N(z; 0, 1) dz over [-12, 12], by the trapezoid rule: shape (M,).

    Args:
        log_likelihood: from z (points,) to (points, M).
        points: of the grid.
    """
    z = np.linspace(-12.0, 12.0, points)
    log_terms = log_likelihood(z) - 0.5 * z[:, None] ** 2 - 0.5 * math.log(2 * math.pi) + math.log(z[1] - z[0])
    top = log_terms.max(0)
    return top + np.log(np.exp(log_terms - top).sum(0))


# Programs with exact answers ------------------------------------------------------------------------------------------

WEIGHT = ((1.0, -0.5), (0.3, 0.8), (-0.7, 0.2))
BIAS = (0.1, -0.2, 0.3)
NOISE = 0.6


def example() -> tuple[Tensor, Tensor, float]:
    """Weight (3, 2), bias (3,) and noise of the linear-Gaussian model that most tests use."""
    return torch.tensor(WEIGHT), torch.tensor(BIAS), NOISE


def example_data(num_data: int = 4) -> Tensor:
    """Draws (num_data, 3) about as wide as the model's own."""
    return 1.2 * torch.randn(num_data, 3)


def exact_posterior(x: Tensor) -> Gaussian:
    """p(z | x) of the example."""
    return linear_gaussian(*example()).given_last(x)


def exact_log_marginal(x: Tensor) -> Tensor:
    """log p(x) of the example, (M,)."""
    return linear_gaussian(*example()).last(3).log_prob(x)


def _posterior_guide(x: Tensor, shift: float, widening: float) -> None:
    posterior = exact_posterior(x)
    with pyro.plate("data", len(x)):
        root = torch.linalg.cholesky(posterior.cov) * widening
        pyro.sample("z", dist.MultivariateNormal(posterior.mean + shift, scale_tril=root))


def with_params(shift: float = 0.0, widening: float = 1.0) -> tuple[Callable, Callable]:
    """The example as plain functions whose parameters are ``pyro.param``s."""
    weight, bias, noise = example()

    def model(x):
        w, b = pyro.param("weight", weight), pyro.param("bias", bias)
        s = pyro.param("noise", torch.tensor(noise), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ w.T + b, s).to_event(1), obs=x)

    return model, lambda x: _posterior_guide(x, shift, widening)


def with_modules(shift: float = 0.0, widening: float = 1.0) -> tuple[Callable, Callable]:
    """The example as plain functions whose parameters are a module's."""
    decoder = nn.Linear(2, 3)
    with torch.no_grad():
        decoder.weight.copy_(torch.tensor(WEIGHT))
        decoder.bias.copy_(torch.tensor(BIAS))

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), NOISE).to_event(1), obs=x)

    return model, lambda x: _posterior_guide(x, shift, widening)


def without_broadcasting(shift: float = 0.0, widening: float = 1.0) -> tuple[Callable, Callable]:
    """The example in code that cannot take particles on the left: it indexes z[:, 0]."""
    weight, bias, noise = example()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = torch.stack([z[:, 0] * row[0] + z[:, 1] * row[1] for row in weight], 1) + bias
            pyro.sample("x", dist.Normal(loc, noise).to_event(1), obs=x)

    return model, lambda x: _posterior_guide(x, shift, widening)


class Amortized:
    """The example's model with a free guide q(z | x) = N(gain x + offset, diag(scale)^2), all of them parameters."""

    def __init__(self) -> None:
        weight, bias, noise = example()
        self.theta = [weight.requires_grad_(), bias.requires_grad_(), torch.tensor(noise).log().requires_grad_()]
        gain, offset = torch.tensor([[0.6, 0.1, -0.3], [-0.3, 0.5, 0.2]]), torch.tensor([0.2, -0.1])
        self.phi = [gain.requires_grad_(), offset.requires_grad_(), torch.tensor([-0.7, -0.2]).requires_grad_()]

    def model(self, x):
        w, b, log_s = self.theta
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ w.T + b, log_s.exp()).to_event(1), obs=x)

    def guide(self, x):
        gain, offset, log_scale = self.phi
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ gain.T + offset, log_scale.exp()).to_event(1))

    def elbo(self, x: Tensor) -> Tensor:
        """The evidence lower bound of each datum, (M,), differentiable in all parameters."""
        w, b, log_s = self.theta
        gain, offset, log_scale = self.phi
        q = Gaussian(x @ gain.T + offset, torch.diag((2 * log_scale).exp()))
        return elbo(linear_gaussian(w, b, log_s.exp()), q, x)


class TwoLayers:
    """z2 ~ N(0, 1), z1 ~ N(a z2, s1^2), x ~ N(z1, s^2): with a guide from the bottom up or from the top down."""

    a, s1, s = 0.9, 0.7, 0.5

    def __init__(self, bottom_up: bool) -> None:
        self.bottom_up = bottom_up

    def model(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(()), 1.0))
            z1 = pyro.sample("z1", dist.Normal(self.a * z2, self.s1))
            pyro.sample("x", dist.Normal(z1, self.s), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            if self.bottom_up:
                z1 = pyro.sample("z1", dist.Normal(0.6 * x, 0.5))
                pyro.sample("z2", dist.Normal(0.4 * z1 + 0.1, 0.8))
            else:
                z2 = pyro.sample("z2", dist.Normal(0.3 * x, 0.9))
                pyro.sample("z1", dist.Normal(0.5 * x + 0.2 * z2, 0.5))

    def elbo(self, x: Tensor) -> Tensor:
        """The evidence lower bound of each datum, (M,)."""
        a, s1, s = self.a, self.s1, self.s
        root = torch.tensor([[1.0, 0.0, 0.0], [a, s1, 0.0], [a, s1, s]])  # of (z2, z1, x)
        joint = Gaussian.of_noise(torch.zeros(3), root)
        if self.bottom_up:
            mean = torch.stack([0.24 * x + 0.1, 0.6 * x], -1)
            q = Gaussian.of_noise(mean, torch.tensor([[0.8, 0.2], [0.0, 0.5]]))
        else:
            q = Gaussian.of_noise(torch.stack([0.3 * x, 0.56 * x], -1), torch.tensor([[0.9, 0.0], [0.18, 0.5]]))
        return elbo(joint, q, x.unsqueeze(-1))


class SharedMean:
    """A global latent: mu ~ N(0, 1), z_i ~ N(mu, 1), x_i ~ N(z_i, 1), with a guide that factorises and is not exact."""

    def __init__(self, num_data: int) -> None:
        self.num_data = num_data

    def model(self, x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", self.num_data, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x):
        pyro.sample("mu", dist.Normal(torch.tensor(0.2), 0.4))
        with pyro.plate("data", self.num_data, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, 0.8))

    def elbo(self, x: Tensor) -> Tensor:
        """The evidence lower bound of the whole data set x (N,), a scalar."""
        N = self.num_data
        one, eye, zero = torch.ones(N, 1), torch.eye(N), torch.zeros(N, N)
        root = torch.cat(
            [
                torch.cat([torch.ones(1, 1), torch.zeros(1, 2 * N)], 1),
                torch.cat([one, eye, zero], 1),
                torch.cat([one, eye, eye], 1),
            ]
        )
        q = Gaussian(torch.cat([torch.tensor([0.2]), 0.5 * x]), torch.diag(torch.tensor([0.16, *[0.64] * N])))
        return elbo(Gaussian.of_noise(torch.zeros(2 * N + 1), root), q, x)


# Parameters per datum: one backward pass gives M independent gradients ------------------------------------------------


class ScalarGaussian:
    """z ~ N(0, 1), x ~ N(a z + b, s^2), q(z | x) = N(gain x + offset, scale^2): M copies of one datum and parameters.

    ``theta`` (a, b, log s) and ``phi`` (gain, offset, log scale) are leaves (M,).
    """

    theta_values, phi_values = (0.9, 0.2, math.log(0.7)), (0.5, -0.3, math.log(0.9))
    x = 1.1

    def __init__(self, num_data: int) -> None:
        self.data = (torch.full((num_data,), self.x),)
        self.theta, self.phi = (
            [torch.full((num_data,), value).requires_grad_() for value in values]
            for values in (self.theta_values, self.phi_values)
        )

    def model(self, x):
        a, b, log_s = self.theta
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(a * z + b, log_s.exp()), obs=x)

    def guide(self, x, observations=None):  # the second argument is for pyro.infer.ReweightedWakeSleep
        gain, offset, log_scale = self.phi
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(gain * x + offset, log_scale.exp()))

    @classmethod
    def expectation(cls, surrogate: Callable, num_nodes: int = 80) -> tuple[Tensor, Tensor]:
        """The mean over two draws z = (z_1, z_2) of q, by Gauss-Hermite quadrature, and its gradient, (6,).

        Args:
            surrogate: of the densities and of standard normal noise (2, n, n), to terms (n, n); it detaches what its
                estimator holds fixed.
            num_nodes: of the quadrature, in each dimension.
        """
        parameters = [torch.tensor(value).requires_grad_() for value in (*cls.theta_values, *cls.phi_values)]
        nodes, weights = (torch.as_tensor(part) for part in np.polynomial.hermite_e.hermegauss(num_nodes))
        noise = torch.stack(torch.meshgrid(nodes, nodes, indexing="ij"))
        weights = weights[:, None] * weights / (2 * math.pi)
        value = (weights * surrogate(_ScalarDensities(parameters, cls.x), noise)).sum()
        gradient = torch.autograd.grad(value, parameters, allow_unused=True)
        return value.detach(), torch.stack([torch.zeros(()) if g is None else g for g in gradient])

    @classmethod
    def log_marginal(cls) -> float:
        a, b, log_s = cls.theta_values
        variance = a**2 + math.exp(2 * log_s)
        return -0.5 * ((cls.x - b) ** 2 / variance + math.log(2 * math.pi * variance))


@dataclass
class _ScalarDensities:
    parameters: list[Tensor]
    x: float

    def draw(self, noise: Tensor, x: Tensor | float | None = None) -> Tensor:
        gain, offset, log_scale = self.parameters[3:]
        return gain * (self.x if x is None else x) + offset + log_scale.exp() * noise

    def log_joint(self, z: Tensor) -> Tensor:
        a, b, log_s = self.parameters[:3]
        return _log_normal(z, 0.0, torch.zeros(())) + _log_normal(self.x, a * z + b, log_s)

    def log_q(self, z: Tensor, x: Tensor | float | None = None) -> Tensor:
        gain, offset, log_scale = self.parameters[3:]
        return _log_normal(z, gain * (self.x if x is None else x) + offset, log_scale)


def _log_normal(x, mean, log_scale):
    return -0.5 * ((x - mean) / log_scale.exp()) ** 2 - log_scale - 0.5 * math.log(2 * math.pi)


class BeliefNetwork:
    """A sigmoid belief network of 2 binary latents and 3 binary observations: M copies of one datum and parameters.

    ``theta`` (prior logits; weight, bias) and ``phi`` (weight, offset of the guide's logits) are leaves (M, ...).
    """

    theta_values = (
        ((0.4, -0.6),),
        ((1.5, -0.8), (-1.1, 0.9), (0.5, 1.2)),
        ((-0.3, 0.2, 0.1),),
    )
    phi_values = (((0.6, -0.4, 0.3), (-0.2, 0.5, 0.8)), ((0.3, -0.5),))
    x = (1.0, 0.0, 1.0)

    def __init__(self, num_data: int) -> None:
        self.data = (torch.tensor(self.x).expand(num_data, 3),)
        self.theta, self.phi = (
            [torch.tensor(value).expand(num_data, -1, -1).clone().requires_grad_() for value in values]
            for values in (self.theta_values, self.phi_values)
        )

    def model(self, x):
        prior, weight, bias = self.theta
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=prior[:, 0]).to_event(1))
            logits = (weight * z[..., None, :]).sum(-1) + bias[:, 0]
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x):
        weight, offset = self.phi
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=(weight * x[..., None, :]).sum(-1) + offset[:, 0]).to_event(1))

    @classmethod
    def tables(cls) -> tuple[list[Tensor], Tensor, Tensor, int]:
        """Parameters; log p(x, z) and log q(z | x) of every x and z, (8, 4) each; and which of the x the datum is."""
        parameters = [torch.tensor(v).requires_grad_() for v in (*cls.theta_values, *cls.phi_values)]
        prior, weight, bias, gain, offset = parameters
        x, z = _binary(3), _binary(2)
        log_joint = _log_bernoulli(z, prior).sum(-1) + _log_bernoulli(x[:, None], z @ weight.T + bias).sum(-1)
        log_q = _log_bernoulli(z, (x @ gain.T + offset)[:, None]).sum(-1)
        return parameters, log_joint, log_q, int((x == torch.tensor(cls.x)).all(-1).nonzero())

    @classmethod
    def expectation(cls, surrogate: Callable, num_particles: int) -> tuple[Tensor, Tensor]:
        """The mean over K draws of q by enumeration of all 4^K, and its gradient, flat.

        Args:
            surrogate: of log p(x, z) and log q(z | x), each (K, 4^K), to (4^K,) terms to be summed with the draws'
                probability already in them.
            num_particles: K.
        """
        parameters, log_joint, log_q, datum = cls.tables()
        tuples = torch.cartesian_prod(*[torch.arange(4)] * num_particles).reshape(-1, num_particles).T
        value = surrogate(log_joint[datum, tuples], log_q[datum, tuples]).sum()
        return value.detach(), _flat_gradient(value, parameters)

    @classmethod
    def sleep(cls) -> Tensor:
        """Gradient of E_{(x, z) ~ p} log q(z | x) with p held fixed, flat."""
        parameters, log_joint, log_q, _ = cls.tables()
        return _flat_gradient((log_joint.detach().exp() * log_q).sum(), parameters)

    @classmethod
    def log_marginal(cls) -> Tensor:
        _, log_joint, _, datum = cls.tables()
        return log_joint[datum].logsumexp(0).detach()


def _binary(width: int) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(2.0)] * width)


def _log_bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    return x * logits - torch.log1p(logits.exp())


def _flat_gradient(value: Tensor, parameters: list[Tensor]) -> Tensor:
    gradient = torch.autograd.grad(value, parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, gradient, strict=True)]
    )


def gradients_per_datum(objective, toy) -> Tensor:
    """Independent samples (M, n) of the gradient of minus the loss, theta's and then phi's."""
    loss = objective.differentiable_loss(toy.model, toy.guide, *toy.data)
    parameters = [*toy.theta, *toy.phi]
    found = torch.autograd.grad(-loss, parameters, allow_unused=True)
    rows = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return torch.cat([row.reshape(len(row), -1) for row in rows], 1)


def gamma_poisson(x: Tensor) -> None:
    """Counts x ~ Poisson(z), z ~ Gamma(2, 1.5): negative binomial, with posterior Gamma(2 + x, 2.5)."""
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Poisson(pyro.sample("z", dist.Gamma(torch.tensor(2.0), 1.5))), obs=x)


# Evidence of whole data sets ------------------------------------------------------------------------------------------


def mixture_log_evidence(
    x: np.ndarray,
    num_components: int,
    *,
    concentration: float,
    mean_loc: float,
    mean_scale: float,
    scale_median: float,
    scale_spread: float,
    points: int = 801,
) -> float:
    """log p(X) of a Bayesian mixture of diagonal Gaussians: a sum over all C^N labellings.

    A labelling's probability is Dirichlet-multinomial; the data of one component in one dimension are jointly Gaussian
    given the component's scale, its mean integrated out, and the scale is integrated by the trapezoid rule over eight
    standard deviations of its logarithm either way.

    Args:
        x: data, (N, D), few.
        num_components: C.
        concentration: of the Dirichlet prior.
        mean_loc: mean, and
        mean_scale: standard deviation of the normal prior on means.
        scale_median: median, and
        scale_spread: standard deviation of the logarithm, of the log-normal prior on scales.
        points: of the grid.
    """
    t = np.linspace(-8.0, 8.0, points)
    scales = scale_median * np.exp(scale_spread * t)
    log_step = -0.5 * t**2 - 0.5 * math.log(2 * math.pi) + math.log(t[1] - t[0])

    def log_sum_exp(terms: np.ndarray) -> float:
        return float(terms.max() + np.log(np.exp(terms - terms.max()).sum()))

    def of_one(values: np.ndarray) -> float:
        """Of the values (n,) of one component in one dimension."""
        n, residual = len(values), values - mean_loc
        total = scales**2 + n * mean_scale**2  # the determinant of s^2 I + t^2 11' is s^(2n - 2) times this
        quadratic = (residual @ residual - mean_scale**2 * residual.sum() ** 2 / total) / scales**2
        log_det = 2 * (n - 1) * np.log(scales) + np.log(total)
        return log_sum_exp(log_step - 0.5 * (quadratic + log_det + n * math.log(2 * math.pi)))

    terms = []
    for labels in np.ndindex(*[num_components] * len(x)):
        groups = [x[np.array(labels) == c] for c in range(num_components)]
        log_labels = math.lgamma(num_components * concentration) - math.lgamma(num_components * concentration + len(x))
        log_labels += sum(math.lgamma(concentration + len(g)) - math.lgamma(concentration) for g in groups)
        terms.append(log_labels + sum(of_one(column) for g in groups if len(g) for column in g.T))
    return log_sum_exp(np.array(terms))


def regression(inputs: Tensor, prior_scale: Tensor | float, noise: Tensor | float) -> Gaussian:
    """The joint of (w, y) of all data: w ~ N(0, prior_scale^2 I), y_i ~ N(w . inputs_i, noise^2), inputs (N, J)."""
    N, J = inputs.shape
    root = torch.cat(
        [
            torch.cat([prior_scale * torch.eye(J), torch.zeros(J, N)], 1),
            torch.cat([prior_scale * inputs, noise * torch.eye(N)], 1),
        ]
    )
    return Gaussian.of_noise(torch.zeros(J + N), root)


# Sequences ------------------------------------------------------------------------------------------------------------


def linear_dynamics(
    A: Tensor, drift: Tensor, Q: Tensor, first: Gaussian, C: Tensor, d: Tensor, noise_scale: Tensor
) -> Gaussian:
    """The joint of (z_1, ..., z_T, x_1, ..., x_T) of one sequence: each a matrix of all noise there is.

    z_1 ~ first, z_t = A z_{t-1} + drift_t + N(0, Q), x_t = C z_t + d + N(0, noise_scale^2); drift (T, J), its first
    row is not read.
    """
    (D, J), T = C.shape, len(drift)
    size = T * (J + D)
    means, roots = [first.mean], [torch.zeros(J, size)]
    roots[0][:, :J] = torch.linalg.cholesky(first.cov)
    for t in range(1, T):
        means.append(A @ means[-1] + drift[t])
        roots.append(A @ roots[-1])
        roots[-1][:, t * J : (t + 1) * J] += torch.linalg.cholesky(Q)
    for t in range(T):
        means.append(C @ means[t] + d)
        roots.append(C @ roots[t])
        roots[-1][:, T * J + t * D : T * J + (t + 1) * D] += torch.diag(noise_scale)
    return Gaussian.of_noise(torch.cat(means), torch.cat(roots))


def switching_paths(
    z: Tensor, first: Tensor, moves: Tensor, means: Tensor, scales: Tensor, A: Tensor, b: Tensor, Q: Tensor
) -> Tensor:
    """log p(s, z) of one path z (T, J) with every path s of regimes, (S,) * T.

    p(s_1) = first, p(s_t | s_{t-1}) = moves, z_1 ~ N(means_s, diag(scales_s)^2), z_t ~ N(A_s z_{t-1} + b_s, Q_s).
    """
    S, T = len(first), len(z)
    found = torch.zeros((S,) * T)
    for s in np.ndindex(*found.shape):
        term = first[s[0]].log() + Gaussian(means[s[0]], torch.diag(scales[s[0]] ** 2)).log_prob(z[0])
        for t in range(1, T):
            law = Gaussian(A[s[t]] @ z[t - 1] + b[s[t]], Q[s[t]])
            term = term + moves[s[t - 1], s[t]].log() + law.log_prob(z[t])
        here = torch.zeros_like(found)
        here[s] = 1.0
        found = found + here * term
    return found


def volatility_log_marginal(x: np.ndarray, mu: float, phi: float, sigma: float, points: int = 400) -> float:
    """log p(x) of returns (T,) with h_t = mu + phi (h_{t-1} - mu) + sigma e_t and x_t ~ N(0, exp(h_t)), on a grid of h.

    NaN is a return that was not observed.
    """
    spread = sigma / math.sqrt(1 - phi**2)
    h = np.linspace(mu - 9 * spread, mu + 9 * spread, points)
    step = h[1] - h[0]

    def log_normal(value, mean, scale):
        return -0.5 * ((value - mean) / scale) ** 2 - np.log(scale) - 0.5 * math.log(2 * math.pi)

    log_p = log_normal(h, mu, spread)  # density of h_t and x_1, ..., x_{t-1}
    move = log_normal(h[None, :], mu + phi * (h[:, None] - mu), sigma)
    for t, value in enumerate(x):
        if t:
            log_p = log_sum_exp_of(log_p[:, None] + move) + math.log(step)
        if not np.isnan(value):
            log_p = log_p + log_normal(value, 0.0, np.exp(h / 2))
    return float(log_sum_exp_of(log_p) + math.log(step))


def log_sum_exp_of(terms: np.ndarray) -> np.ndarray:
    """Over the first axis."""
    top = terms.max(0)
    return top + np.log(np.exp(terms - top).sum(0))
