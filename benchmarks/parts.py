"""A training step of VAEs of other parts, and of several layers, beside the same by hand in PyTorch.

    python benchmarks/parts.py --output docs/parts.json

Each model is trained by estimator A and Adam on 100 images of 28 x 28: by this package's step, compiled as ``fit`` does
after 1,000 steps, and eagerly; and by code that anybody would write for this one model, with the same modules, no Pyro
and no distributions: draws, log densities as formulas, ``backward`` and a fused Adam. Before they are timed the two
losses are compared, as means over draws. One process, turns, medians; to be run on a machine that does nothing else.
"""

import argparse
import copy
import json
import math
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from particles import medians
from performance import package_step
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

import pyro_vae as pv
from pyro_vae.training.step import Batch

NUM_DATA, LATENT_DIM, LEARNING_RATE = 100, 20, 1e-3
CONV: dict[str, Any] = {"hidden_dims": (128,), "activation": "relu", "channels": (16, 32)}
LAYERS: dict[str, Any] = {"latent_dims": (50, 20), "hidden_dims": ((200, 200), (100, 100))}
Loss = Callable[[Any, Tensor], Tensor]


def log_normal(z: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """Log density of a diagonal Gaussian, without its last axis."""
    return (-0.5 * ((z - loc) * (-log_scale).exp()).square() - log_scale - 0.5 * math.log(2 * math.pi)).sum(-1)


def log_standard(z: Tensor) -> Tensor:
    """Log density of N(0, I)."""
    return (-0.5 * z.square() - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian(vae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log scale of the encoder of x."""
    loc, log_variance = vae.encoder(vae._seen(x)).chunk(2, -1)
    return loc, 0.5 * log_variance


def drawn(vae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """A draw of the diagonal posterior, and its log density."""
    loc, log_scale = gaussian(vae, x)
    z = loc + log_scale.exp() * torch.randn_like(loc)
    return z, log_normal(z, loc, log_scale)


def log_bernoulli(logits: Tensor, x: Tensor) -> Tensor:
    """Log probability of binary images, (M,)."""
    logits = logits.reshape(x.shape)
    return -binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)


def diagonal(vae: Any, x: Tensor) -> Tensor:
    """Bound of the plain VAE."""
    z, log_q = drawn(vae, x)
    return log_bernoulli(vae.decoder(z), x) + log_standard(z) - log_q


def full(vae: Any, x: Tensor) -> Tensor:
    """Bound with a posterior of full covariance."""
    raw, J = vae.encoder(vae._seen(x)), LATENT_DIM
    rows, columns = torch.tril_indices(J, J)
    root = raw.new_zeros(len(x), J, J)
    root[:, rows, columns] = raw[:, J:]
    scales = softplus(root.diagonal(dim1=1, dim2=2)) + 1e-4
    root = root.tril(-1) + scales.diag_embed()
    noise = torch.randn(len(x), J)
    z = raw[:, :J] + (root @ noise[..., None]).squeeze(-1)
    return log_bernoulli(vae.decoder(z), x) + log_standard(z) - log_standard(noise) + scales.log().sum(-1)


def flow(vae: Any, x: Tensor) -> Tensor:
    """Bound with a flow as the posterior."""
    loc, log_variance, context = vae.encoder(vae._seen(x)).tensor_split((LATENT_DIM, 2 * LATENT_DIM), -1)
    noise, log_scale = torch.randn_like(loc), 0.5 * log_variance
    transform = vae.posterior.transform(context)
    if vae.posterior.is_inverse_autoregressive:
        z, log_det = transform.call_and_ladj(loc + log_scale.exp() * noise)
    else:
        z, log_det = transform.call_and_ladj(noise)
        z = loc + log_scale.exp() * z
    log_q = log_standard(noise) - log_scale.sum(-1) - log_det
    return log_bernoulli(vae.decoder(z), x) + log_standard(z) - log_q


def vamp(vae: Any, x: Tensor) -> Tensor:
    """Bound with a VampPrior."""
    z, log_q = drawn(vae, x)
    loc, log_scale = gaussian(vae, vae.prior.raw_pseudo_inputs.sigmoid())
    log_p = log_normal(z[:, None], loc, log_scale).logsumexp(1) - math.log(len(loc))
    return log_bernoulli(vae.decoder(z), x) + log_p - log_q


def mixture(vae: Any, x: Tensor) -> Tensor:
    """Bound with a mixture as the prior."""
    z, log_q = drawn(vae, x)
    prior = vae.prior
    log_scale = (softplus(prior.raw_scale) + 1e-4).log()
    log_p = (log_normal(z[:, None], prior.loc, log_scale) + prior.logits.log_softmax(-1)).logsumexp(1)
    return log_bernoulli(vae.decoder(z), x) + log_p - log_q


def logistics(vae: Any, x: Tensor) -> Tensor:
    """Bound with a mixture of discretised logistics (arXiv:1701.05517, Sec. 2.1)."""
    z, log_q = drawn(vae, x)
    logits, loc, log_scale = vae.decoder(z).reshape(len(x), 3, 5, *x.shape[1:]).unbind(1)
    inverse = (-log_scale.clamp(-7, 7)).exp()
    centred, half = (2 * x - 1)[:, None] - loc, 1 / 255
    above, below = inverse * (centred + half), inverse * (centred - half)
    inside = (above.sigmoid() - below.sigmoid()).clamp(min=1e-12).log()
    level = (255 * x).round()[:, None]
    log_p = torch.where(level == 0, -softplus(-above), torch.where(level == 255, -softplus(below), inside))
    return (log_p + logits.log_softmax(1)).logsumexp(1).flatten(1).sum(1) + log_standard(z) - log_q


def moments(network: Any, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log scale by a Gaussian MLP."""
    loc, scale = network(seen)
    return loc, scale.log()


def bottom_up(vae: Any, x: Tensor) -> Tensor:
    """Bound of two layers with the guide of arXiv:1509.00519."""
    total, below, draws = x.new_zeros(len(x)), x, []
    for features, head in zip(vae.features, vae.moments, strict=True):
        loc, log_scale = moments(head, features(below))
        below = loc + log_scale.exp() * torch.randn_like(loc)
        draws.append(below)
        total = total - log_normal(below, loc, log_scale)
    low, high = draws
    total = total + log_standard(high) + log_normal(low, *moments(vae.down[0], high))
    return total + log_bernoulli(vae.decoder(low), x)


def ladder(vae: Any, x: Tensor) -> Tensor:
    """Bound of two layers with the guide of arXiv:1602.02282."""
    first = vae.features[0](x)
    seen, seen_log_scale = moments(vae.moments[0], first)
    loc, log_scale = moments(vae.moments[1], vae.features[1](first))
    high = loc + log_scale.exp() * torch.randn_like(loc)
    total = log_standard(high) - log_normal(high, loc, log_scale)
    prior, prior_log_scale = moments(vae.down[0], high)
    precision = (-2 * seen_log_scale).exp() + (-2 * prior_log_scale).exp()
    merged = ((-2 * seen_log_scale).exp() * seen + (-2 * prior_log_scale).exp() * prior) / precision
    low = merged + precision.rsqrt() * torch.randn_like(merged)
    total = total + log_normal(low, prior, prior_log_scale) - log_normal(low, merged, -0.5 * precision.log())
    return total + log_bernoulli(vae.decoder(low), x)


MODELS: dict[str, tuple[Callable[[], Any], Loss]] = {
    "MLP, as in the paper": (lambda: pv.VAE((28, 28), LATENT_DIM), diagonal),
    "convolutional": (lambda: pv.VAE((28, 28), LATENT_DIM, network="conv", **CONV), diagonal),
    "residual": (lambda: pv.VAE((28, 28), LATENT_DIM, network="resnet", **CONV), diagonal),
    "full covariance": (lambda: pv.VAE((28, 28), LATENT_DIM, posterior="full"), full),
    "inverse autoregressive flow": (lambda: pv.VAE((28, 28), LATENT_DIM, posterior="iaf"), flow),
    "spline flow": (lambda: pv.VAE((28, 28), LATENT_DIM, posterior="spline"), flow),
    "VampPrior of 500": (lambda: pv.VAE((28, 28), LATENT_DIM, prior="vamp"), vamp),
    "mixture of 100 as prior": (lambda: pv.VAE((28, 28), LATENT_DIM, prior="mixture"), mixture),
    "discretised logistics": (lambda: pv.VAE((28, 28), LATENT_DIM, likelihood="discretized-logistic"), logistics),
    "two layers, bottom-up": (lambda: pv.HierarchicalVAE((28, 28), **LAYERS), bottom_up),
    "two layers, ladder": (lambda: pv.HierarchicalVAE((28, 28), **LAYERS, guide="top-down"), ladder),
}


def by_hand(vae: Any, loss: Loss, x: Tensor) -> Callable[[], None]:
    """A step as one writes it."""
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        (-loss(vae, x).mean()).backward()
        optimizer.step()

    return step


@torch.no_grad()
def require_equal(vae: Any, loss: Loss, x: Tensor, draws: int = 30) -> None:
    """That the two bounds are one, as far as the noise of their means lets see."""
    ours = [-float(pv.SGVB().differentiable_loss(vae.model, vae.guide, x)) / len(x) for _ in range(draws)]
    theirs = [float(loss(vae, x).mean()) for _ in range(draws)]
    difference = abs(statistics.mean(ours) - statistics.mean(theirs))
    error = math.sqrt((statistics.variance(ours) + statistics.variance(theirs)) / draws)
    assert difference < 5 * error + 1e-5 * abs(ours[0]), (ours[0], theirs[0], error)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="models whose name contains this")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    pyro.enable_validation(False)  # as in fit
    x = torch.rand(NUM_DATA, 28, 28).mul(255).round().div(255)
    found: dict[str, dict[str, float]] = {}
    machine = f"{platform.processor() or platform.machine()}, {args.threads} threads"
    print(f"torch {torch.__version__}, {machine}; milliseconds a step")
    for name, (make, loss) in MODELS.items():
        if args.only and args.only not in name:
            continue
        vae, data = make(), x if loss is logistics else x.round()
        require_equal(vae, loss, data)
        batch = Batch((data,), {}, NUM_DATA)
        tasks = {"by hand": by_hand(copy.deepcopy(vae), loss, data)}
        for path in ("eager", "compiled"):
            step = package_step(copy.deepcopy(vae), pv.SGVB(), data, path)
            tasks[path] = lambda step=step, batch=batch: step(batch) and None
        found[name] = {task: 1000 * seconds for task, seconds in medians(tasks, args.rounds).items()}
        hand = found[name]["by hand"]
        print(f"{name}: " + ", ".join(f"{task} {ms:.2f} ({hand / ms:.2f} x)" for task, ms in found[name].items()))
    if args.output is not None:
        args.output.write_text(json.dumps({"torch": torch.__version__, "machine": machine, "ms": found}, indent=1))


if __name__ == "__main__":
    main()
