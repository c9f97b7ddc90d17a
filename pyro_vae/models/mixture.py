"""A Bayesian mixture of Gaussians: weights, means and scales are global latents, and the labels are summed out.

    w ~ Dirichlet(a, ..., a)                                  weights, on the simplex of C components
    mu_cd ~ N(m, t^2)                                         means
    s_cd ~ LogNormal(log r, v^2)                              standard deviations, diagonal
    p(x | w, mu, s) = sum_c w_c prod_d N(x_d; mu_cd, s_cd^2)  labels summed out exactly

(Bishop, *Pattern Recognition and Machine Learning*, 2006, Sec. 10.2, with priors that are not tied to conjugacy.) The
guide is the paper's Appendix F with no latents per datum: a Gaussian q(u) of all globals in unconstrained space,

    u = loc + L e,  e ~ N(0, I),      w = stick-breaking(u_w),   mu = u_mu,   s = exp(u_s)

with L diagonal (mean field) or lower triangular (full covariance). It is drawn site by site, each from its conditional
given those before it, so that its density is known at any values of the globals and no site is auxiliary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import transforms

from pyro_vae.arguments import one_of, positive_number, whole_number
from pyro_vae.models.registration import data_plate, register

__all__ = ["GaussianMixture"]

POSTERIORS = ("full", "mean-field")
_INITIAL_SCALE = 0.1
_SMALLEST_SHARE = 1e-3


class GaussianMixture(nn.Module):
    """A mixture of C diagonal Gaussians with a Gaussian posterior over its parameters (arXiv:1312.6114, App. F).

    The default priors expect data of about unit scale: standardise each column (mean 0, standard deviation 1), or
    give the priors in the units of the data. Scales have a log-normal prior, which vanishes at zero faster than any
    power: the posterior density is then bounded, where a component that shrinks onto one datum would otherwise make
    it infinite.

    Labels can be permuted without a change of prior or likelihood, so the posterior has C! equal modes. The guide
    describes one of them. Which one, the means that it begins with decide: draws of the prior, from torch's generator
    as the model is built, or the centres that :meth:`initialize` finds in data by k-means, which is better. Where the
    modes are well apart, log p(X) by importance sampling from the guide is low by log C!: it covers one of C!.

    Args:
        data_dim: D, the dimension of x, at least 1.
        num_components: C, at least 1.
        posterior: "full" covariance of the guide over all C (2 D + 1) - 1 unconstrained globals, or "mean-field".
        concentration: a > 0 of the Dirichlet prior on the weights; 1 is uniform.
        mean_loc: m, the centre of the prior on means.
        mean_scale: t > 0, its standard deviation.
        scale_median: r > 0, the median of the prior on scales.
        scale_spread: v > 0, the standard deviation of its logarithm.
        num_data: N, the size of the data set; None to be told by :func:`pyro_vae.fit`; until then, that of the
            batch.

    Raises:
        ValueError: an argument is out of its range; the message says what was expected.

    Example:
        >>> mixture = GaussianMixture(data_dim=2, num_components=3)
        >>> mixture.responsibilities(torch.zeros(5, 2)).shape, mixture.sample(4).shape
        (torch.Size([5, 3]), torch.Size([4, 2]))
        >>> {name: tuple(draws.shape) for name, draws in mixture.draw(10).items()}
        {'weights': (10, 3), 'means': (10, 3, 2), 'scales': (10, 3, 2)}
    """

    def __init__(
        self,
        data_dim: int,
        num_components: int,
        posterior: str = "full",
        concentration: float = 1.0,
        mean_loc: float = 0.0,
        mean_scale: float = 2.0,
        scale_median: float = 0.5,
        scale_spread: float = 1.0,
        num_data: int | None = None,
    ) -> None:
        super().__init__()
        self.data_dim = whole_number("data_dim", data_dim)
        self.num_components = whole_number("num_components", num_components)
        self.posterior = one_of("posterior", posterior, POSTERIORS)
        self.concentration = positive_number("concentration", concentration)
        self.mean_loc = float(mean_loc)
        self.mean_scale = positive_number("mean_scale", mean_scale)
        self.scale_median = positive_number("scale_median", scale_median)
        self.scale_spread = positive_number("scale_spread", scale_spread)
        self.num_data = None if num_data is None else whole_number("num_data", num_data)
        C, D = self.num_components, self.data_dim
        self._sizes = {"weights": C - 1, "means": C * D, "scales": C * D}
        self.loc = nn.Parameter(torch.zeros(sum(self._sizes.values())))
        self.log_scale = nn.Parameter(torch.full_like(self.loc, math.log(_INITIAL_SCALE)))
        self.mixing = nn.Parameter(torch.zeros(len(self.loc), len(self.loc))) if posterior == "full" else None
        with torch.no_grad():
            means = self.mean_loc + self.mean_scale * torch.randn(C, D)
            self._set(torch.full((C,), 1 / C), means, torch.full((C, D), self.scale_median))

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of one datum, (D,)."""
        return (self.data_dim,)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build this model again: ``GaussianMixture(**mixture.config)``."""
        sizes, prior = ("data_dim", "num_components", "posterior"), ("concentration", "mean_loc", "mean_scale")
        return {name: getattr(self, name) for name in (*sizes, *prior, "scale_median", "scale_spread", "num_data")}

    # The program ------------------------------------------------------------------------------------------------------

    def model(self, x: Tensor) -> None:
        """p(x, w, mu, s) of a minibatch x (M, D): globals "weights", "means", "scales"; "x" in the plate "data"."""
        register(self)
        priors = self.priors(x)
        drawn = {name: pyro.sample(name, prior) for name, prior in priors.items()}
        with data_plate(x, self.num_data):
            pyro.sample("x", self.decode(**drawn), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(w, mu, s): each global from its conditional law given those before it; x (M, D) has no part in it."""
        register(self)
        self._draw_sites(pyro.sample)

    def priors(self, like: Tensor) -> dict[str, dist.Distribution]:
        """The prior of each global, by site.

        Args:
            like: tensor whose type and device they take.

        Returns:
            Distributions of event shapes (C,), (C, D) and (C, D).
        """
        each = like.new_ones(self.num_components, self.data_dim)
        return {
            "weights": dist.Dirichlet(self.concentration * like.new_ones(self.num_components)),
            "means": dist.Normal(self.mean_loc * each, self.mean_scale).to_event(2),
            "scales": dist.LogNormal(math.log(self.scale_median) * each, self.scale_spread).to_event(2),
        }

    def decode(self, weights: Tensor, means: Tensor, scales: Tensor) -> dist.Distribution:
        """p(x | w, mu, s), the labels summed out: batch shape (...,), event shape (D,).

        Args:
            weights: (..., C), on the simplex.
            means: (..., C, D).
            scales: (..., C, D), positive.
        """
        return dist.MixtureSameFamily(dist.Categorical(probs=weights), dist.Normal(means, scales).to_event(1))

    # The posterior ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialize(self, x: Tensor, *, seed: int = 0) -> None:
        """Begin at the clusters that k-means (ten starts of k-means++) finds in data; do it before training.

        Means, scales and weights of the clusters become the guide's medians, its spread that of a new model. Components
        are put in ascending order of their means' first coordinate.

        Args:
            x: data, (N, D), at least C of them.
            seed: of k-means.

        Raises:
            ValueError: the data have another shape or are fewer than the components.
        """
        from sklearn.cluster import KMeans

        if x.ndim != 2 or x.shape[1] != self.data_dim or len(x) < self.num_components:
            raise ValueError(
                f"expected data (N, {self.data_dim}), N at least {self.num_components}, got {tuple(x.shape)}"
            )
        found = KMeans(self.num_components, n_init=10, random_state=seed).fit(x.detach().cpu().double().numpy())
        centres = torch.from_numpy(found.cluster_centers_)
        order = centres[:, 0].argsort()
        member = torch.from_numpy(found.labels_).long()[:, None] == order  # (N, C)
        data, share = x.detach().cpu().double(), member.double().mean(0)
        squares = member.double().T @ data**2 / member.sum(0)[:, None] - centres[order] ** 2
        floor = 0.1 * data.std(0, correction=0).clamp_min(1e-6)  # a cluster of one datum has no scale of its own
        share = share.clamp_min(_SMALLEST_SHARE)
        self._set(share / share.sum(), centres[order], squares.clamp_min(0).sqrt().maximum(floor))
        self.log_scale.fill_(math.log(_INITIAL_SCALE))
        if self.mixing is not None:
            self.mixing.zero_()

    @torch.no_grad()
    def draw(self, num_draws: int) -> dict[str, Tensor]:
        """Draws of the globals from the guide.

        Args:
            num_draws: K, at least 1.

        Returns:
            "weights" (K, C), "means" (K, C, D) and "scales" (K, C, D).
        """
        count = [whole_number("num_draws", num_draws)]
        return self._draw_sites(lambda _, q: q.expand(count).sample())

    def summary(self, num_draws: int = 10_000) -> dict[str, tuple[Tensor, Tensor]]:
        """Posterior means and standard deviations of the globals, under the guide, from its draws.

        Args:
            num_draws: how many, at least 2.

        Returns:
            By site, a pair of tensors: (C,) of "weights", (C, D) of "means" and "scales".
        """
        draws = self.draw(whole_number("num_draws", num_draws, least=2))
        return {name: (values.mean(0), values.std(0)) for name, values in draws.items()}

    @torch.no_grad()
    def responsibilities(self, x: Tensor, *, num_draws: int = 100) -> Tensor:
        """p(label | x, X): the mean over draws of the globals of w_c N(x; mu_c, s_c^2) / sum over c.

        Args:
            x: data, (M, D).
            num_draws: of the guide, at least 1.

        Returns:
            Probabilities (M, C), each row of sum 1.
        """
        drawn = {name: values.unsqueeze(1) for name, values in self.draw(num_draws).items()}  # (K, 1, C, ...)
        mixture = self.decode(**drawn)
        log_joint = mixture.component_distribution.log_prob(x.unsqueeze(1)) + drawn["weights"].log()  # (K, M, C)
        mean: Tensor = log_joint.softmax(-1).mean(0)
        return mean

    @torch.no_grad()
    def sample(self, n: int, *, mean: bool = False) -> Tensor:
        """Draw n new data from the posterior predictive law, each with globals of its own from the guide.

        Args:
            n: how many.
            mean: give the mean of the mixture instead, one for each draw of the globals.

        Returns:
            Tensor (n, D).
        """
        mixture = self.decode(**self.draw(n))
        x: Tensor = mixture.mean if mean else mixture.sample()
        return x

    def _draw_sites(self, sample: Callable[[str, dist.Distribution], Tensor]) -> dict[str, Tensor]:
        """Draw the globals: u_i = loc_i + L_i,<i e_<i + L_ii e_i, with the e of the sites before it known."""
        drawn, noises, start = {}, [self.loc[:0]], 0
        for name, size in self._sizes.items():
            block, before = slice(start, start + size), torch.cat(noises, -1)
            loc, scale, to_support = self.loc[block], self.log_scale[block].exp(), self._transform(name)
            if self.mixing is None or size == 0:  # the weights of one component have no freedom
                drawn[name] = sample(name, _mapped(dist.Normal(loc, scale).to_event(1), to_support))
            else:
                loc = loc + before @ self.mixing[block, :start].T
                root = scale.diag() + self.mixing[block, block].tril(-1)
                drawn[name] = sample(name, _mapped(dist.MultivariateNormal(loc, scale_tril=root), to_support))
                residual = (to_support.inv(drawn[name]) - loc).unsqueeze(-1)
                white = torch.linalg.solve_triangular(root, residual, upper=False).squeeze(-1)
                noises = [before.expand(*white.shape[:-1], -1), white]
            start += size
        return drawn

    def _transform(self, name: str) -> transforms.Transform:
        """From a site's unconstrained vector to its support; it remembers its last argument."""
        if name == "weights":
            return transforms.StickBreakingTransform(cache_size=1)
        C, D = self.num_components, self.data_dim
        shape = transforms.ReshapeTransform(torch.Size([C * D]), torch.Size([C, D]))
        parts: list[transforms.Transform] = [shape] if name == "means" else [transforms.ExpTransform(), shape]
        return transforms.ComposeTransform(parts, cache_size=1)

    def _set(self, weights: Tensor, means: Tensor, scales: Tensor) -> None:
        """Put the guide's medians there."""
        parts = [self._transform("weights").inv(weights), means.flatten(), scales.log().flatten()]
        self.loc.copy_(torch.cat([part.to(self.loc) for part in parts]))


def _mapped(base: dist.Distribution, to_support: transforms.Transform) -> dist.Distribution:
    return dist.TransformedDistribution(base, to_support)
