"""Semi-amortised inference: the encoder's numbers are only where a few steps of each datum's own inference begin.

Amortised inference computes the parameters of q(z | x) by one network for all data, lambda_0 = f(x), and loses what no
network can know of a single datum: the amortisation gap (Cremer et al., arXiv:1801.03558). Kim et al.
(arXiv:1802.02550, Sec. 3) go on from there by S steps of stochastic variational inference, for each datum by itself,

    lambda_s+1 = lambda_s + a clip(grad_lambda L(lambda_s; x)),        q(z | x) = q(z; lambda_S)

with L an estimate of the datum's evidence lower bound at L draws z = g(e, lambda) of noise e:

    L(lambda; x) = mean_l [ log p(x | z_l) ] - KL(q(z; lambda) || p(z))

the KL in closed form where there is one, else log q - log p at the draws. Training differentiates the bound at lambda_S
through the steps, to the encoder and the decoder (the same, Alg. 1): by second derivatives. Marino et al.
(arXiv:1807.09356) learn the steps too.

The noise of each step is drawn once, when the program is made, and is the same for all data. So q(z | x) is a function
of x: asked for twice it is the same law, as whatever draws first and takes the density later relies on (DReG,
annealed importance sampling from the guide, defensive importance sampling). Bounds stay bounds, whatever lambda_S is,
for their own draws have nothing to do with that noise. It is a randomised quasi-Monte Carlo sequence
(arXiv:1807.01604), which fills the steps more evenly than independent draws do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, kl_divergence
from torch.quasirandom import SobolEngine

from pyro_vae.arguments import positive_number, whole_number
from pyro_vae.distributions import Flow
from pyro_vae.models.registration import data_plate, register
from pyro_vae.models.vae import VAE

__all__ = ["SemiAmortized"]

_LEAST_UNIFORM = torch.finfo(torch.float32).eps  # closer to 0 or 1, single precision has infinite quantiles


class SemiAmortized(nn.Module):
    """A VAE whose q(z | x) is refined by gradient ascent on each datum's bound (Kim et al., arXiv:1802.02550).

    Everything that trains or scores a VAE takes it. A pass costs the decoder ``num_steps`` times more, forwards and
    backwards. The networks run in the mode, training or evaluation, that they are in. The components of a vamp prior
    are the encoder's posteriors of the pseudo-inputs, without refinement. A KL weight or free bits of the objective are
    no part of the refinement's bound. It takes gradients, which ``torch.inference_mode`` forbids and ``torch.no_grad``
    does not. Objectives that train the guide by a loss of its own (wake-sleep) take ``through=False``: else the decoder
    is trained by it as well.

    Args:
        vae: the VAE, whose parameters are trained; or the arguments that build one, as in ``vae.config``. Draws of its
            posterior are a function of noise that does not depend on lambda: any of
            :data:`pyro_vae.models.posteriors.POSTERIORS` but student-t, gamma, beta and dirichlet.
        num_steps: S, at least 1.
        step_size: a, above 0.
        num_particles: draws of each step's bound, at least 1.
        max_grad_norm: each datum's gradient with respect to lambda is rescaled to at most this Euclidean norm; None for
            any.
        through: whether training differentiates through the steps, so that the decoder's parameters are the guide's as
            well. Without, lambda_S - lambda_0 counts as a constant: about half of the cost or less, for a gradient
            that is not the bound's.

    Attributes:
        noise: uniform numbers that make the draws of each step, (num_steps, num_particles, J).

    Raises:
        ValueError: an argument is out of its range, or the VAE has Bayesian weights, or a posterior whose draws are no
            function of fixed noise; the message says what was expected.

    Example:
        >>> vae = VAE(data_shape=(28, 28), latent_dim=2, hidden_dims=(16,))
        >>> refined, x = SemiAmortized(vae, num_steps=20), torch.zeros(5, 28, 28)
        >>> refined.encode(x).batch_shape, refined.config["num_steps"]
        (torch.Size([5]), 20)
        >>> import pyro_vae as pv
        >>> bound = pv.SGVB(num_particles=100, estimator="B").bound
        >>> bool((bound(refined.model, refined.guide, x) > bound(vae.model, vae.guide, x)).all())
        True
    """

    noise: Tensor

    def __init__(
        self,
        vae: VAE | Mapping[str, Any],
        num_steps: int = 10,
        step_size: float = 0.1,
        num_particles: int = 1,
        max_grad_norm: float | None = 1.0,
        through: bool = True,
    ) -> None:
        super().__init__()
        self.num_steps = whole_number("num_steps", num_steps)
        self.num_particles = whole_number("num_particles", num_particles)
        self.step_size = positive_number("step_size", step_size)
        self.max_grad_norm = None if max_grad_norm is None else positive_number("max_grad_norm", max_grad_norm)
        self.through = through
        self.vae = VAE(**vae) if isinstance(vae, Mapping) else vae
        if not isinstance(self.vae, VAE):
            raise ValueError(f"vae: expected a VAE, or the arguments of one, got {type(vae).__name__}")
        if self.vae.bayesian:
            raise ValueError(f"vae: expected one without Bayesian weights, got bayesian={self.vae.bayesian!r}")
        like = next(self.vae.parameters())
        sequence = SobolEngine(self.vae.latent_dim, scramble=True, seed=int(torch.randint(2**31, ())))
        uniform = sequence.draw(self.num_steps * self.num_particles).clamp(_LEAST_UNIFORM, 1 - _LEAST_UNIFORM)
        self.register_buffer("noise", uniform.unflatten(0, (self.num_steps, self.num_particles)).to(like))
        law = self.vae.posterior(like.new_zeros(self.vae.posterior.num_parameters))
        try:
            _drawn(law, self.noise[0])
        except NotImplementedError as error:
            raise ValueError(
                "vae: expected a posterior whose draws are a function of fixed noise and of its parameters, such as "
                f'"diagonal", "full" or "iaf", got {law}'
            ) from error

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of one datum."""
        return self.vae.data_shape

    @property
    def latent_dim(self) -> int:
        """J, the dimension of z."""
        return self.vae.latent_dim

    @property
    def data_range(self) -> tuple[float, float] | None:
        """The least and the greatest value that data may have; None for any."""
        return self.vae.data_range

    @property
    def config(self) -> dict[str, Any] | None:
        """The arguments that build this program again; None if parts of the VAE are your own."""
        if self.vae.config is None:
            return None
        names = ("num_steps", "step_size", "num_particles", "max_grad_norm", "through")
        return {"vae": self.vae.config} | {name: getattr(self, name) for name in names}

    def model(self, x: Tensor) -> None:
        """p(x, z) of a minibatch x (M, *data_shape): the VAE's."""
        self.vae.model(x)

    def guide(self, x: Tensor) -> None:
        """q(z | x) of a minibatch x (M, *data_shape), refined once for all particles: site "z" in the plate "data"."""
        register(self.vae)
        with data_plate(x):
            pyro.sample("z", self.encode(x))

    def encode(self, x: Tensor) -> dist.Distribution:
        """q(z | x), refined: batch shape (...,), event shape (J,).

        Args:
            x: data, (..., *data_shape).
        """
        return self.vae.posterior(self._refined(x))

    def decode(self, z: Tensor) -> dist.Distribution:
        """p(x | z): batch shape (...,), event shape ``data_shape``.

        Args:
            z: latents, (..., J).
        """
        return self.vae.decode(z)

    def prior(self, encode: Callable[[Tensor], dist.Distribution] | None = None) -> dist.Distribution:
        """p(z), of batch shape () and event shape (J,).

        Args:
            encode: taken as a VAE's prior takes it, and not used: a vamp prior is one of the VAE's own encoder.
        """
        law: dist.Distribution = self.vae.prior(self.vae.encode)
        return law

    def sample(self, n: int, *, mean: bool = False) -> Tensor:
        """Draw n data from the model, (n, *data_shape), as the VAE does.

        Args:
            n: how many.
            mean: give E[x | z] instead of a draw of x.
        """
        return self.vae.sample(n, mean=mean)

    def _refined(self, x: Tensor) -> Tensor:
        """lambda_S, (..., P)."""
        raw: Tensor = self.vae.encoder(self.vae._seen(x))
        through = self.through and torch.is_grad_enabled()
        with torch.enable_grad(), pyro.validation_enabled(False):  # whether x is in the support, the model says
            prior = self.prior()
            for uniform in self.noise:
                at = raw if through and raw.requires_grad else raw.detach().requires_grad_()
                (slope,) = torch.autograd.grad(self._bound(at, x, prior, uniform).sum(), at, create_graph=through)
                raw = raw + self.step_size * self._clipped(slope)
        return raw

    def _bound(self, raw: Tensor, x: Tensor, prior: dist.Distribution, uniform: Tensor) -> Tensor:
        """L(lambda; x) of each datum, (...), at the draws that uniform numbers (L, J) make."""
        q = self.vae.posterior(raw)
        z, log_q = _drawn(q, uniform.reshape(len(uniform), *(1,) * (raw.ndim - 1), -1))
        log_likelihood: Tensor = self.decode(z).log_prob(x)
        with contextlib.suppress(NotImplementedError):
            return log_likelihood.mean(0) - kl_divergence(q, prior)
        log_prior: Tensor = prior.log_prob(z)
        return (log_likelihood + log_prior - log_q).mean(0)

    def _clipped(self, slope: Tensor) -> Tensor:
        if self.max_grad_norm is None:
            return slope
        norm: Tensor = torch.linalg.vector_norm(slope, dim=-1, keepdim=True)
        return slope * (self.max_grad_norm / norm.clamp_min(self.max_grad_norm))


def _drawn(law: Any, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The draw of a law of vectors that uniform numbers (L, ..., J) make, and its log density.

    Raises:
        NotImplementedError: the law has no inverse distribution function.
    """
    if isinstance(law, Flow):
        noise, log_density = _drawn(law.base_dist, uniform)
        z, log_det = law.transform.call_and_ladj(noise)
        return z, log_density - log_det
    base = law.base_dist if isinstance(law, Independent) else law
    if isinstance(base, MultivariateNormal):
        z = base.loc + (base.scale_tril @ torch.special.ndtri(uniform)[..., None]).squeeze(-1)
    else:
        z = base.icdf(uniform)
    return z, law.log_prob(z)
