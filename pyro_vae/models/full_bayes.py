"""Full variational Bayes: a posterior over a network's weights beside that of the latents (arXiv:1312.6114, App. F).

With weights theta that all data share, a prior p(theta) = N(0, s^2) on each of them and a factorised Gaussian
q(theta) = N(mu, sigma^2), the bound on the evidence of the whole data set, in nats, is (eqs. (13) to (21))

    log p(X) >= E_q(theta)[ sum_n L(x_n; theta) + log p(theta) - log q(theta) ]
             ~  N / M sum_m [ log p(x_m, z_m | theta) - log q(z_m | x_m) ]  +  log p(theta) - log q(theta)

at theta = mu + sigma eps, z_m = g(eps_m, x_m) and a minibatch of M: Algorithm 2's estimator. N / M is the data plate's
scale, and theta lies outside that plate, so that its terms count once. :class:`pyro_vae.SGVB` takes the terms of theta
as drawn (estimator A) or in closed form (B, eq. (24)), which has far less variance where there are many weights.

The local reparameterisation trick (Kingma, Salimans & Welling, arXiv:1506.02557, eq. (6)). One draw of theta for a
minibatch makes its data's terms move together, so that the gradient's variance does not fall with M. A linear layer's
outputs for one datum are Gaussian under q(theta), independent of each other,

    b = x W' + c ~ N( x mu_W' + mu_c, x^2 (sigma_W^2)' + sigma_c^2 ),

so they can be drawn for each datum by itself: the same expectation of every datum's term, and no covariance between
data. It holds for sums of log densities, and so for the bound, but not for weights, in which densities of one theta are
multiplied: :func:`pyro_vae.log_marginal` draws theta itself. A datum must meet each weight once, for it would meet
others the second time: a second pass is refused.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.func import functional_call

from pyro_vae.arguments import positive_number, whole_number
from pyro_vae.models.registration import register
from pyro_vae.programs import draws_per_datum

__all__ = ["BayesianModule", "bayesian"]

Network = Callable[[Tensor], Any]

_ELEMENTS_AT_ONCE = 2**24  # weights that are drawn together, where each row has its own


class BayesianModule(nn.Module):
    """A network whose weights have a prior and a factorised Gaussian posterior each (arXiv:1312.6114, App. F).

    Its two Pyro functions are part of a program's: ``net.model()`` draws the weights from their prior and gives the
    network with them, ``net.guide()`` draws them from the posterior. Both belong outside the data plate.

    Args:
        module: any module with parameters; those with ``requires_grad=False`` stay as they are. Its present parameters
            become the posterior's first means.
        prior_scale: s of the prior N(0, s^2) on every weight.
        local_reparameterization: draw a linear layer's outputs for each datum rather than its weights for all
            (arXiv:1506.02557): gradients of less variance, for networks whose weights are all nn.Linear's.
        learn_prior: empirical Bayes: one s for each parameter tensor, trained by the same bound.
        posterior_scale: the posterior's first standard deviation, of every weight.
        event_dim: dimensions of one datum's input: 1 for a vector, 3 for an image (C, H, W).
        name: what the sites' names begin with; two such networks in one program need two.

    Attributes:
        module: the network, whose parameters are the posterior means.
        log_scale: logarithms of the posterior standard deviations, by parameter ("/" in its name stands for ".").
        log_prior_scale: logarithms of the prior standard deviations, one for each parameter tensor, in their order.

    Raises:
        ValueError: an argument is out of its range; the module has nothing to train, or layers that keep running
            statistics of batches; or it cannot be locally reparameterised.

    Example:
        >>> import pyro_vae as pv
        >>> net = pv.bayesian(nn.Linear(3, 1))
        >>> def model(x, y):
        ...     predict = net.model()
        ...     with pyro.plate("data", 20, subsample=torch.arange(len(x))):
        ...         pyro.sample("y", dist.Normal(predict(x)[..., 0], 0.1), obs=y)
        >>> def guide(x, y):
        ...     net.guide()
        >>> x = torch.randn(20, 3)
        >>> run = pv.fit(pv.Program(model, guide), (x, x.sum(1)), objective=pv.SGVB(estimator="B"), epochs=2)
        >>> net.draw(5)(x).shape                                    # predictions at five draws of the weights
        torch.Size([5, 20, 1])
    """

    log_prior_scale: Tensor

    def __init__(
        self,
        module: nn.Module,
        prior_scale: float = 1.0,
        local_reparameterization: bool = False,
        *,
        learn_prior: bool = False,
        posterior_scale: float = 0.01,
        event_dim: int = 1,
        name: str = "theta",
    ) -> None:
        super().__init__()
        for argument, value in (("prior_scale", prior_scale), ("posterior_scale", posterior_scale)):
            positive_number(argument, value)
        if not (isinstance(module, nn.Module) and any(p.requires_grad for p in module.parameters())):
            raise ValueError(f"expected a module with parameters to train, got {module!r}")
        _require_no_batch_statistics(module)
        latent = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.module, self.name = module, name
        self.event_dim = whole_number("event_dim", event_dim, 0)
        self.log_scale = nn.ParameterDict(
            {_key(n): torch.full_like(p, math.log(posterior_scale)) for n, p in latent.items()}
        )
        log_prior_scale = next(iter(latent.values())).new_full((len(latent),), math.log(prior_scale))
        if learn_prior:
            self.log_prior_scale = nn.Parameter(log_prior_scale)
        else:
            self.register_buffer("log_prior_scale", log_prior_scale)
        self.local_reparameterization = local_reparameterization
        if local_reparameterization and not self._is_linear:
            raise ValueError(
                "local_reparameterization: expected a network whose weights are all those of nn.Linear layers, each of "
                f"one layer, for their outputs are Gaussian given their inputs; got weights {sorted(latent)}"
            )

    def model(self) -> Network:
        """Draw the weights from the prior: sites named after the parameters, such as "theta.0.weight".

        Returns:
            The network with these weights, a function of its input (..., *event). Under a plate of K particles its
            output has them on its left, or broadcasts with them.
        """
        register(self)
        return self._drawn({n: dist.Normal(0.0, self.prior_scale(n)).expand(p.shape) for n, p in self._latent.items()})

    def guide(self) -> Network:
        """Draw the weights from the posterior.

        Returns:
            The network with them, as :meth:`model` does.
        """
        register(self)
        return self._drawn({n: self.posterior(n) for n in self._latent}, self.local_reparameterization)

    def posterior(self, parameter: str) -> dist.Distribution:
        """The posterior of a parameter, by its name in the module: Normal, of the parameter's shape."""
        return dist.Normal(self._latent[parameter], self.log_scale[_key(parameter)].exp())

    def prior_scale(self, parameter: str) -> Tensor:
        """Standard deviation of the prior of a parameter, a scalar."""
        return self.log_prior_scale[list(self._latent).index(parameter)].exp()

    @torch.no_grad()
    def kl(self) -> dict[str, Tensor]:
        """KL(q || p) of every weight, by parameter and in its shape, in nats: near 0 where the data say nothing."""
        return {n: kl_divergence(self.posterior(n), dist.Normal(0.0, self.prior_scale(n))) for n in self._latent}

    def input_kl(self) -> Tensor:
        """KL(q || p) of the first linear layer's weights, summed by input, (in_features,), in nats.

        An input at which it is near 0 was switched off: what the network makes of it, the prior alone decides.

        Raises:
            ValueError: the first weight is not that of a linear layer.
        """
        name, kl = next(iter(self.kl().items()))
        if kl.ndim != 2:
            raise ValueError(
                f"expected a network that begins with a linear layer, got {name} of shape {tuple(kl.shape)}"
            )
        return kl.sum(0)

    @torch.no_grad()
    def draw(self, num_draws: int) -> Network:
        """The network at draws of its weights from the posterior, which its output has on its left."""
        drawn = {n: self.posterior(n).sample((num_draws,)) for n in self._latent}
        return torch.no_grad()(functools.partial(self._at_each, drawn, None))

    @torch.no_grad()
    def each(self, x: Tensor) -> Any:
        """The network of every datum of an input (n, *event) at a draw of the weights of its own."""
        if self.local_reparameterization:
            return self._per_datum((), x)
        count = sum(p.numel() for p in self._latent.values())
        parts = []
        for rows in x.split(max(1, _ELEMENTS_AT_ONCE // count)):
            drawn = {n: self.posterior(n).sample((len(rows),)) for n in self._latent}
            outputs = self._at_each(drawn, 0, rows[:, None])  # a batch of one row for each draw
            parts.append(_each_of(outputs, lambda output: output.squeeze(1)))
        return tuple(map(torch.cat, zip(*parts, strict=True))) if isinstance(parts[0], tuple) else torch.cat(parts)

    @property
    def _latent(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.module.named_parameters() if _key(n) in self.log_scale}

    @property
    def _linear_layers(self) -> dict[str, nn.Module]:
        return {n: m for n, m in self.module.named_modules() if type(m) is nn.Linear}

    @property
    def _is_linear(self) -> bool:
        """Whether every weight is a linear layer's, and of one only."""
        names = {
            f"{layer}.{n}".lstrip(".") for layer, m in self._linear_layers.items() for n, _ in m.named_parameters()
        }
        return self._latent.keys() == names

    def _drawn(self, laws: Mapping[str, Any], per_datum: bool = False) -> Network:
        """The network at weights from these laws, or at those that Pyro gives in their place."""
        drawn = {n: pyro.sample(f"{self.name}.{n}", law.to_event(len(law.batch_shape))) for n, law in laws.items()}
        name, first = next(iter(drawn.items()))
        batch = tuple(first.shape[: first.ndim - self._latent[name].ndim])
        if batch and (batch[-1] > 1 or any(size > 1 for size in batch[1:])):
            raise ValueError(
                f"expected the weights '{self.name}.{name}' to be drawn outside every plate of the program, for all "
                f"data share them; got batch shape {batch}"
            )
        if per_datum and draws_per_datum():  # the model that is replayed with this very tensor draws likewise
            first._pyro_vae_calls = []
        if draws_per_datum() and hasattr(first, "_pyro_vae_calls"):
            return functools.partial(self._once, first._pyro_vae_calls, batch)
        return functools.partial(self._shared, drawn, batch)

    def _once(self, calls: list[str], batch: tuple[int, ...], x: Tensor) -> Any:
        """The network with outputs drawn for each datum: a second pass of a datum would see other weights."""
        if calls:
            raise ValueError(
                f"local_reparameterization: expected data to pass the network '{self.name}' once for each draw of its "
                "weights, got a second call: draw the weights themselves, with local_reparameterization=False"
            )
        calls.append(self.name)
        return self._per_datum(batch, x)

    def _shared(self, weights: Mapping[str, Tensor], batch: tuple[int, ...], x: Tensor) -> Any:
        """The network at weights (*batch, *shape), batch being (K, 1, ..., 1) or empty."""
        if not batch:
            return functional_call(self.module, dict(weights), (x,))
        own = {n: w.reshape(batch[0], *self._latent[n].shape) for n, w in weights.items()}
        has_axis = x.ndim - self.event_dim >= len(batch)
        if has_axis and len(x) == 1:
            x, has_axis = x[0], False
        if batch[0] == 1:  # broadcasts with one particle
            return functional_call(self.module, {n: w[0] for n, w in own.items()}, (x,))
        missing = 0 if has_axis else len(batch) - 1 - (x.ndim - self.event_dim)
        outputs = self._at_each(own, 0 if has_axis else None, x)
        return _each_of(outputs, lambda output: output[(slice(None), *(None,) * missing)])

    def _at_each(self, weights: dict[str, Tensor], axis: int | None, x: Tensor) -> Any:
        """The network at each of K sets of weights (K, *shape): for an input that has as many, or for one input."""

        def one(weights: dict[str, Tensor], x: Tensor) -> Any:
            return functional_call(self.module, weights, (x,))

        return torch.vmap(one, in_dims=(0, axis), randomness="different")(weights, x)

    def _per_datum(self, batch: tuple[int, ...], x: Tensor) -> Any:
        """The network with the outputs of its linear layers drawn for each datum and particle."""
        missing = len(batch) - (x.ndim - self.event_dim)
        if batch and missing > 0:
            x = x[(None,) * missing]
        if batch and len(x) < batch[0]:
            x = x.expand(batch[0], *x.shape[1:])
        seen: list[str] = []
        with contextlib.ExitStack() as stack:
            for name, layer in self._linear_layers.items():
                stack.callback(layer.register_forward_hook(lambda *_, name=name: seen.append(name)).remove)
                hook = functools.partial(self._drawn_output, f"{name}.".lstrip("."))
                stack.callback(layer.register_forward_hook(hook).remove)
            outputs = self.module(x)
        if sorted(seen) != sorted(self._linear_layers):
            raise ValueError(
                f"local_reparameterization: expected each linear layer of '{self.name}' to act once, as a module, got "
                f"calls of {seen}: draw the weights themselves, with local_reparameterization=False"
            )
        return outputs

    def _drawn_output(self, layer: str, _: nn.Module, inputs: tuple[Tensor], mean: Tensor) -> Tensor:
        """A linear layer's output, drawn; the mean is what it gave (arXiv:1506.02557, eq. (6))."""
        keys = [_key(f"{layer}{n}") for n in ("weight", "bias")]
        weight, bias = ((2 * self.log_scale[key]).exp() if key in self.log_scale else None for key in keys)
        assert weight is not None
        variance = nn.functional.linear(inputs[0].square(), weight, bias)
        return mean + variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt() * torch.randn_like(mean)


bayesian = BayesianModule


def _key(parameter: str) -> str:
    return parameter.replace(".", "/")  # torch allows no dots there


def _require_no_batch_statistics(module: nn.Module) -> None:
    if found := [n for n, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]:
        raise ValueError(
            f"expected a network of which each datum is computed by itself, got batch normalisation at {found}: its "
            "statistics are of one set of weights; use GroupNorm or LayerNorm"
        )


def _each_of(outputs: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A function of a network's output, or of each of several."""
    return tuple(map(function, outputs)) if isinstance(outputs, tuple) else function(outputs)
