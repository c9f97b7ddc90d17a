"""One training step of a variational auto-encoder, as other software takes it.

Every peer is built from the same model, a Bernoulli :class:`pyro_vae.VAE`, whose parameters it copies, and trains it by
Adam (rate 0.001, the other settings at their defaults, which agree everywhere) on one minibatch x with fresh noise at
each step. What a peer computes can be checked: ``bound(x, eps)`` is its own bound, by its own code, at noise that is
given. With z = mu(x) + sigma(x) eps and log w = log p(x, z) - log q(z | x), averaged over the data, it is

    "A"             mean_k log w_k                                        arXiv:1312.6114, eq. (6)
    "B"             mean_k log p(x | z_k) - KL(q(z | x) || p(z))          arXiv:1312.6114, eq. (7)
    "IWAE"          log 1/K sum_k w_k                                     arXiv:1509.00519, eq. (8)
    "weighted"      sum_k w~_k log w_k,  w~_k = w_k / sum_j w_j           no bound, but its gradient is IWAE's with w~
                                                                          held fixed

Pyro, PyTorch by hand (eager, with a compiled loss, compiled whole), NumPyro and pythae. The last two are imported when
they are used: ``pip install -c constraints.txt -e .[bench]``.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import pyro
import torch
import torch.nn.functional as F
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

import pyro_vae as pv

__all__ = [
    "LEARNING_RATE",
    "ByHand",
    "ByHandCompiledLoss",
    "ByHandCompiledStep",
    "ByHandScore",
    "GivenNoise",
    "NumPyro",
    "NumPyroScore",
    "Peer",
    "PlainPyro",
    "PyroScore",
    "Pythae",
    "PythaeScore",
    "clone",
]

LEARNING_RATE = 1e-3
SCAN_LENGTH = 10  # steps of NumPyro in one call
ROWS_AT_ONCE = 2000  # particles times data that a hand-written score decodes at once


class Peer(ABC):
    """One contestant: a model with parameters of its own, and its training step.

    Attributes:
        name: what it is called in tables.
        estimator: which of the expressions above ``bound`` is; None for what computes no bound.
        steps: training steps (or data scored) in one call of ``step``.
    """

    name = ""
    estimator: str | None = "A"
    steps = 1

    @abstractmethod
    def step(self) -> None:
        """Loss, gradients and update on the peer's own minibatch, with fresh noise."""

    @abstractmethod
    def bound(self, x: Tensor, eps: Tensor) -> float:
        """The peer's own bound, in nats per datum.

        Args:
            x: data, (M, 784).
            eps: standard normal noise, (K, M, J).
        """

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """What surrounds the steps, and is not timed."""
        return contextlib.nullcontext()


def clone(vae: pv.VAE) -> pv.VAE:
    """The same model with parameters of its own."""
    copy = pv.VAE(**vae.config)
    copy.load_state_dict(vae.state_dict())
    return copy


class GivenNoise(Messenger):
    """Draws of the latent site are mu + sigma eps with eps given; K particles that come in parts take it in turn.

    Args:
        eps: noise, (K, M, J).
    """

    def __init__(self, eps: Tensor) -> None:
        super().__init__()
        self.eps, self.used = eps, 0

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == "z" and not msg["done"]:  # the model's is done: replayed
            normal = msg["fn"].base_dist
            msg["value"], msg["done"] = normal.loc + normal.scale * self._next(msg["fn"].shape()), True

    def _next(self, shape: torch.Size) -> Tensor:
        if len(shape) == 2:  # one particle, without a dimension for it
            return self.eps[0]
        self.used += shape[0]
        return self.eps[self.used - shape[0] : self.used]


# Pyro -----------------------------------------------------------------------------------------------------------------


class PlainPyro(Peer):
    """Pyro as its tutorials have it: ``SVI.step`` with ``Trace_ELBO``, or ``RenyiELBO`` of vectorised particles.

    Args:
        vae: whose parameters are copied.
        x: the minibatch, (M, 784).
        num_particles: K of the importance-weighted bound; None for the lower bound.
        validation: check distributions and traces at each step, as Pyro does by default.
    """

    def __init__(self, vae: pv.VAE, x: Tensor, num_particles: int | None = None, validation: bool = True) -> None:
        self.name = "Pyro" if validation else "Pyro, validation off"
        self.estimator = "A" if num_particles is None else "IWAE"
        self.x, self.validation, self.own = x, validation, clone(vae)
        optimizer = pyro.optim.Adam({"lr": LEARNING_RATE})
        self.svi = SVI(self.own.model, self.own.guide, optimizer, _pyro_elbo(num_particles))

    def step(self) -> None:
        """Loss, gradients and update."""
        self.svi.step(self.x)

    def bound(self, x: Tensor, eps: Tensor) -> float:
        """Minus the loss at given noise."""
        with self.context(), GivenNoise(eps):
            return -self.svi.evaluate_loss(x) / len(x)

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Validation as asked for."""
        with pyro.validation_enabled(self.validation):
            yield


def _pyro_elbo(num_particles: int | None) -> Trace_ELBO | RenyiELBO:
    if num_particles is None:
        return Trace_ELBO()
    return RenyiELBO(alpha=0, num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)


class PyroScore(PlainPyro):
    """log p(x) as the importance-weighted bound of Pyro's ``RenyiELBO``, one datum after another to bound memory."""

    def __init__(self, vae: pv.VAE, x: Tensor, num_particles: int) -> None:
        super().__init__(vae, x, num_particles, validation=False)
        self.steps = len(x)

    def step(self) -> None:
        """Score every datum."""
        for datum in self.x.split(1):
            self.svi.evaluate_loss(datum)

    def bound(self, x: Tensor, eps: Tensor) -> float:
        """The mean score at given noise."""
        scores = (super(PyroScore, self).bound(x[i : i + 1], eps[:, i : i + 1]) for i in range(len(x)))
        return sum(scores) / len(x)


# PyTorch, by hand -----------------------------------------------------------------------------------------------------


class _Network(nn.Module):
    """Encoder and decoder of a VAE as two stacks of linear layers and tanh, with its parameters."""

    def __init__(self, vae: pv.VAE) -> None:
        super().__init__()
        data, hidden, latent = vae.data_shape[0], vae.hidden_dims, vae.latent_dim
        self.encoder = _stack(data, *hidden, 2 * latent)
        self.decoder = _stack(latent, *hidden[::-1], data)
        with torch.no_grad():
            for mine, theirs in zip(self.parameters(), vae.parameters(), strict=True):
                mine.copy_(theirs)

    def encode(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Draws z of q(z | x) and its log variance."""
        loc, log_variance = self.encoder(x).chunk(2, -1)
        return loc + (0.5 * log_variance).exp() * eps, log_variance

    def log_weights(self, x: Tensor, eps: Tensor) -> Tensor:
        """Log p(x, z) - log q(z | x), (K, M); the constants of the two Gaussians cancel."""
        z, log_variance = self.encode(x, eps)
        logits = self.decoder(z)
        log_likelihood = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
        return log_likelihood + 0.5 * (log_variance + eps.square() - z.square()).sum(-1)


def _stack(*widths: int) -> nn.Sequential:
    layers = [(nn.Linear(wide, narrow), nn.Tanh()) for wide, narrow in itertools.pairwise(widths)]
    return nn.Sequential(*[layer for pair in layers for layer in pair][:-1])


class _Loss(nn.Module):
    """Minus the bound per datum: the lower bound of one particle, or the importance-weighted one of several."""

    def __init__(self, vae: pv.VAE, weighted: bool) -> None:
        super().__init__()
        self.network, self.weighted = _Network(vae), weighted

    def forward(self, x: Tensor, eps: Tensor) -> Tensor:
        """The loss on data (M, 784) at noise (K, M, J)."""
        return self._importance_weighted(x, eps) if self.weighted else self._lower_bound(x, eps[0])

    def _importance_weighted(self, x: Tensor, eps: Tensor) -> Tensor:
        return math.log(len(eps)) - self.network.log_weights(x, eps).logsumexp(0).mean()

    def _lower_bound(self, x: Tensor, eps: Tensor) -> Tensor:
        z, log_variance = self.network.encode(x, eps)
        reconstruction = F.binary_cross_entropy_with_logits(self.network.decoder(z), x, reduction="sum")
        return (reconstruction + 0.5 * (z.square() - eps.square() - log_variance).sum()) / len(x)


class ByHand(Peer):
    """A training step written out in PyTorch for this model alone, with the fused Adam.

    Args:
        vae: whose parameters are copied.
        x: the minibatch, (M, 784).
        num_particles: K of the importance-weighted bound; None for the lower bound.
    """

    name = "PyTorch by hand"

    def __init__(self, vae: pv.VAE, x: Tensor, num_particles: int | None = None) -> None:
        self.estimator = "A" if num_particles is None else "IWAE"
        self.x, self.noise_shape = x, (num_particles or 1, len(x), vae.latent_dim)
        self.module = _Loss(vae, weighted=num_particles is not None)
        self.loss: Callable[[Tensor, Tensor], Tensor] = self.module
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=LEARNING_RATE, fused=True)

    def step(self) -> None:
        """Loss, gradients and update."""
        self.optimizer.zero_grad()
        self.loss(self.x, torch.randn(self.noise_shape)).backward()
        self.optimizer.step()

    def bound(self, x: Tensor, eps: Tensor) -> float:
        """Minus the loss at given noise."""
        return -self.loss(x, eps).item()


class ByHandCompiledLoss(ByHand):
    """The same with the loss, and so its gradients, compiled by ``torch.compile``; the fused Adam runs eagerly."""

    name = "PyTorch by hand, loss compiled"

    def __init__(self, vae: pv.VAE, x: Tensor, num_particles: int | None = None) -> None:
        super().__init__(vae, x, num_particles)
        self.loss = torch.compile(self.module, dynamic=False)


class ByHandCompiledStep(ByHand):
    """The same as one compiled function of parameters, Adam's state and noise: loss, gradients and update."""

    name = "PyTorch by hand, step compiled"

    def __init__(self, vae: pv.VAE, x: Tensor, num_particles: int | None = None) -> None:
        super().__init__(vae, x, num_particles)
        self.parameters = {name: tensor.detach() for name, tensor in self.module.named_parameters()}
        self.means, self.squares = (_zeros_like(self.parameters) for _ in range(2))
        self.count = torch.zeros(())
        self.compiled = torch.compile(functools.partial(_adam_step, self.module), dynamic=False)

    def step(self) -> None:
        """Loss, gradients and update."""
        noise = torch.randn(self.noise_shape)
        self.compiled(self.parameters, self.means, self.squares, self.count, self.x, noise)

    def bound(self, x: Tensor, eps: Tensor) -> float:
        """Minus the loss at given noise, of a step that is taken on copies."""
        state = (self.parameters, self.means, self.squares)
        copies = [{name: tensor.clone() for name, tensor in part.items()} for part in state]
        return -self.compiled(*copies, self.count.clone(), x, eps).item()


def _zeros_like(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def _adam_step(
    module: nn.Module,
    parameters: dict[str, Tensor],
    means: dict[str, Tensor],
    squares: dict[str, Tensor],
    count: Tensor,
    x: Tensor,
    eps: Tensor,
) -> Tensor:
    """One step of Adam (arXiv:1412.6980, Algorithm 1), in place; the loss before it."""

    def loss_of(tensors: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, tensors, (x, eps))

    gradients, loss = torch.func.grad_and_value(loss_of)(parameters)
    count.add_(1)
    for name, gradient in gradients.items():
        mean = means[name].lerp_(gradient, 0.1)
        square = squares[name].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        deviation = (square / (1 - 0.999**count)).sqrt() + 1e-8
        parameters[name].sub_(LEARNING_RATE * mean / (1 - 0.9**count) / deviation)
    return loss


class ByHandScore(Peer):
    """log p(x) by importance sampling, written out in PyTorch, in chunks of particles.

    Args:
        vae: whose parameters are copied.
        x: data, (M, 784).
        num_particles: K.
        compiled: compile the log weights of a chunk by ``torch.compile``.
    """

    estimator = "IWAE"

    def __init__(self, vae: pv.VAE, x: Tensor, num_particles: int, compiled: bool = False) -> None:
        self.name = "PyTorch by hand, compiled" if compiled else "PyTorch by hand"
        self.x, self.steps, self.num_particles, self.latent_dim = x, len(x), num_particles, vae.latent_dim
        network = _Network(vae)
        self.log_weights = torch.compile(network.log_weights, dynamic=False) if compiled else network.log_weights
        self.at_once = max(1, ROWS_AT_ONCE // len(x))

    def step(self) -> None:
        """Score every datum."""
        full, rest = divmod(self.num_particles, self.at_once)
        sizes = [self.at_once] * full + [rest] * (rest > 0)
        self._score(self.x, (torch.randn(size, len(self.x), self.latent_dim) for size in sizes))

    def bound(self, x: Tensor, eps: Tensor) -> float:
        """The mean score at given noise."""
        return self._score(x, eps.split(self.at_once)).mean().item()

    @torch.no_grad()
    def _score(self, x: Tensor, chunks: Any) -> Tensor:
        log_w = torch.cat([self.log_weights(x, eps) for eps in chunks])
        return log_w.logsumexp(0) - math.log(len(log_w))


# NumPyro --------------------------------------------------------------------------------------------------------------


class _NumPyroModel:
    """The model and the guide as NumPyro functions of x, with the parameters of a VAE."""

    def __init__(self, vae: pv.VAE, num_particles: int | None) -> None:
        from numpyro.infer import RenyiELBO, Trace_ELBO

        self.encoder = _arrays("encoder", vae.encoder)
        self.decoder = _arrays("decoder", vae.decoder)
        self.latent_dim = vae.latent_dim
        self.elbo = Trace_ELBO() if num_particles is None else RenyiELBO(alpha=0, num_particles=num_particles)

    def model(self, x: Any) -> None:
        """p(x, z)."""
        import numpyro
        import numpyro.distributions as dist

        with numpyro.plate("data", x.shape[0]):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([self.latent_dim]).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=_jax_layers(self.decoder, z)).to_event(1), obs=x)

    def guide(self, x: Any) -> None:
        """q(z | x)."""
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as dist

        loc, log_variance = jnp.split(_jax_layers(self.encoder, x), 2, -1)
        with numpyro.plate("data", x.shape[0]):
            numpyro.sample("z", dist.Normal(loc, jnp.exp(0.5 * log_variance)).to_event(1))

    def bound(self, parameters: Any, x: Tensor, eps: Tensor) -> float:
        """Minus the loss at given noise, per datum, compiled."""
        import jax

        run = jax.jit(functools.partial(self._loss_at, parameters))
        return -float(run(_jax_array(x), _jax_array(eps))) / len(x)

    def _loss_at(self, parameters: Any, x: Any, eps: Any) -> Any:
        """The loss, with noise that is given to each particle in the place of a draw."""
        import jax
        from numpyro.handlers import substitute

        given = [eps[0]]

        def draw(site: Any) -> Any:
            return site["fn"].base_dist.loc + site["fn"].base_dist.scale * given[-1] if site["name"] == "z" else None

        def each_particle(single: Callable[[Any], Any], keys: Any) -> Any:
            return jax.vmap(lambda key, noise: given.append(noise) or single(key))(keys, eps)

        guide = substitute(self.guide, substitute_fn=draw)
        with mock.patch.object(self.elbo, "vectorize_particles_fn", each_particle):
            return self.elbo.loss(jax.random.PRNGKey(0), parameters, self.model, guide, x)


def _arrays(prefix: str, module: nn.Module) -> list[tuple[str, Any]]:
    """Names and values of a stack's parameters, weights laid out (in, out) as is usual in JAX."""
    return [(f"{prefix}.{name}", _jax_array(tensor.t())) for name, tensor in module.named_parameters()]


def _jax_array(tensor: Tensor) -> Any:
    import jax.numpy as jnp

    return jnp.array(tensor.detach().contiguous().numpy())


def _jax_layers(arrays: list[tuple[str, Any]], h: Any) -> Any:
    import jax.numpy as jnp
    import numpyro

    pairs = list(zip(arrays[::2], arrays[1::2], strict=True))
    for i, ((weight_name, weight), (bias_name, bias)) in enumerate(pairs):
        h = h @ numpyro.param(weight_name, weight) + numpyro.param(bias_name, bias)
        h = jnp.tanh(h) if i + 1 < len(pairs) else h
    return h


class NumPyro(Peer):
    """NumPyro's ``SVI.update`` in a ``lax.scan`` inside ``jit``, so that Python is left once in many steps.

    Args:
        vae: whose parameters are copied.
        x: the minibatch, (M, 784).
        num_particles: K of the importance-weighted bound; None for the lower bound.
    """

    name = "NumPyro"
    steps = SCAN_LENGTH

    def __init__(self, vae: pv.VAE, x: Tensor, num_particles: int | None = None) -> None:
        import jax
        import numpyro

        self.estimator = "A" if num_particles is None else "IWAE"
        self.program, self.x = _NumPyroModel(vae, num_particles), _jax_array(x)
        optimizer = numpyro.optim.Adam(LEARNING_RATE)
        self.svi = numpyro.infer.SVI(self.program.model, self.program.guide, optimizer, self.program.elbo)
        self.state = self.svi.init(jax.random.PRNGKey(0), self.x)
        self.run = jax.jit(self._scan, donate_argnums=0)

    def _scan(self, state: Any, x: Any) -> Any:
        from jax import lax

        return lax.scan(lambda state, _: self.svi.update(state, x), state, length=SCAN_LENGTH)

    def step(self) -> None:
        """Many steps of loss, gradients and update."""
        self.state, losses = self.run(self.state, self.x)
        losses.block_until_ready()

    def bound(self, x: Tensor, eps: Tensor) -> float:
        """Minus the loss at given noise."""
        return self.program.bound(self.svi.get_params(self.state), x, eps)


class NumPyroScore(Peer):
    """log p(x) as the importance-weighted bound of NumPyro's ``RenyiELBO``, compiled, one datum after another."""

    name = "NumPyro"
    estimator = "IWAE"

    def __init__(self, vae: pv.VAE, x: Tensor, num_particles: int) -> None:
        import jax

        self.program, self.x, self.steps = _NumPyroModel(vae, num_particles), _jax_array(x), len(x)
        self.parameters = dict(self.program.encoder + self.program.decoder)
        self.run, self.key = jax.jit(self._losses), jax.random.PRNGKey(0)

    def _losses(self, key: Any, parameters: Any, x: Any) -> Any:
        from jax import lax, random

        def loss_of(one: Any) -> Any:
            key, datum = one
            return self.program.elbo.loss(key, parameters, self.program.model, self.program.guide, datum[None])

        return lax.map(loss_of, (random.split(key, len(x)), x))

    def step(self) -> None:
        """Score every datum."""
        import jax

        self.key, key = jax.random.split(self.key)
        self.run(key, self.parameters, self.x).block_until_ready()

    def bound(self, x: Tensor, eps: Tensor) -> float:
        """The mean score at given noise."""
        scores = (self.program.bound(self.parameters, x[i : i + 1], eps[:, i : i + 1]) for i in range(len(x)))
        return sum(scores) / len(x)


# pythae ---------------------------------------------------------------------------------------------------------------


class Pythae(Peer):
    """pythae's ``VAE`` (estimator B) or ``IWAE``, by the calls that its trainer makes for a batch.

    The value that its ``IWAE`` reports as the loss is minus sum_k w~_k log w_k, which is above IWAE's bound on average;
    the gradient, with w~ held fixed, is IWAE's.

    Args:
        vae: whose parameters are copied.
        x: the minibatch, (M, 784).
        num_particles: K of the importance-weighted bound; None for the lower bound.
    """

    name = "pythae"

    def __init__(self, vae: pv.VAE, x: Tensor, num_particles: int | None = None) -> None:
        self.estimator = "B" if num_particles is None else "weighted"
        self.x, self.model = x, _pythae_model(vae, num_particles)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)

    def step(self) -> None:
        """Loss, gradients and update, as ``BaseTrainer.train_step`` orders them."""
        loss = self._loss(self.x)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()

    def bound(self, x: Tensor, eps: Tensor) -> float:
        """Minus the loss at given noise."""
        noise = eps[0] if self.estimator == "B" else eps.transpose(0, 1)
        with mock.patch("torch.randn_like", lambda like: noise.reshape(like.shape)):
            return -self._loss(x).item()

    def _loss(self, x: Tensor) -> Tensor:
        return self.model({"data": x}, epoch=1, dataset_size=len(x), uses_ddp=False).loss


class PythaeScore(Pythae):
    """log p(x) by pythae's ``get_nll``, which takes one datum after another, at its default batch of 100 particles."""

    batch_size = 100

    def __init__(self, vae: pv.VAE, x: Tensor, num_particles: int) -> None:
        super().__init__(vae, x)
        self.estimator, self.steps, self.num_particles = "IWAE", len(x), num_particles

    @torch.no_grad()
    def step(self) -> None:
        """Score every datum."""
        self.model.get_nll(self.x, self.num_particles, self.batch_size)

    @torch.no_grad()
    def bound(self, x: Tensor, eps: Tensor) -> float:
        """The mean score at given noise."""
        chunks = itertools.chain.from_iterable(eps[:, i].split(self.batch_size) for i in range(len(x)))
        with mock.patch("torch.randn_like", side_effect=chunks):
            return float(self.model.get_nll(x, len(eps), self.batch_size))


def _pythae_model(vae: pv.VAE, num_particles: int | None) -> nn.Module:
    from pythae.models import IWAE, VAE, IWAEConfig, VAEConfig

    options = {"input_dim": vae.data_shape, "latent_dim": vae.latent_dim, "reconstruction_loss": "bce"}
    parts = _pythae_parts(_Network(vae))
    if num_particles is None:
        return VAE(VAEConfig(**options), *parts)
    return IWAE(IWAEConfig(**options, number_samples=num_particles), *parts)


def _pythae_parts(network: _Network) -> tuple[nn.Module, nn.Module]:
    """The encoder and the decoder as pythae wants them."""
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network.encoder

        def forward(self, x: Tensor) -> ModelOutput:
            loc, log_variance = self.layers(x).chunk(2, -1)
            return ModelOutput(embedding=loc, log_covariance=log_variance)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network.decoder

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.layers(z).sigmoid())

    return Encoder(), Decoder()
