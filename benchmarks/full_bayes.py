"""Full variational Bayes: what a posterior over the weights costs a step, and what the local trick does to gradients.

    python benchmarks/full_bayes.py --output docs/full-bayes.json

The paper's MNIST model, 784-500-20, with 100 data and estimator B, on the compiled step of :func:`pyro_vae.fit`: the
plain VAE, and a posterior over the decoder's weights, drawn once for a minibatch or by the local reparameterisation
trick (arXiv:1506.02557). One process, turns, medians; to be run on a machine that does nothing else. Then the variance
of the gradient of the mean loss with respect to the posterior over the weights, summed over its parameters, from draws
of the noise alone, for minibatches of several sizes, after some training.
"""

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import pyro
import torch
from particles import medians
from performance import package_step
from torch import Tensor

import pyro_vae as pv
from pyro_vae.training.step import Batch

PAPER = {"data_shape": (784,), "latent_dim": 20, "hidden_dims": (500,)}
MODELS = {
    "VAE": {},
    "full VB, weights drawn": {"bayesian": "decoder"},
    "full VB, local trick": {"bayesian": "decoder", "local_reparameterization": True},
}
NUM_DATA = 10_000


def step_times(rounds: int) -> dict[str, float]:
    """Median seconds of a compiled step of each model."""
    x = torch.rand(100, 784).round()
    tasks: dict[str, Callable[[], None]] = {}
    for name, options in MODELS.items():
        size = {"num_data": NUM_DATA} if options else {}
        step = package_step(pv.VAE(**PAPER, **options, **size), pv.SGVB(estimator="B"), x, "compiled")
        tasks[name] = lambda step=step: [step(Batch((x,), {}, len(x))) for _ in range(20)] and None
    return {name: seconds / 20 for name, seconds in medians(tasks, rounds).items()}


def gradient_variances(sizes: list[int], num_draws: int, num_samples: int) -> dict[str, dict[int, float]]:
    """Total variance of the gradient, by model and size of the minibatch, at the same trained parameters."""
    data = pv.load_dataset("mnist")
    torch.manual_seed(0)
    vae = pv.VAE(**PAPER, bayesian="decoder", local_reparameterization=True)
    pv.fit(
        vae,
        data.train[:NUM_DATA],
        objective=pv.SGVB(estimator="B"),
        optimizer="adam",
        learning_rate=1e-3,
        num_samples=num_samples,
    )
    found: dict[str, dict[int, float]] = {}
    for name in list(MODELS)[1:]:
        vae.decoder.local_reparameterization = MODELS[name].get("local_reparameterization", False)
        found[name] = {}
        for size in sizes:
            x = torch.bernoulli(data.train[:size].flatten(1) / 255)
            found[name][size] = sum(_variance(vae, x, num_draws)).item()
    return found


def _variance(vae: pv.VAE, x: Tensor, num_draws: int) -> list[Tensor]:
    """Of each parameter of the decoder's posterior, summed over its elements (Welford's recursion)."""
    parameters = list(vae.decoder.parameters())
    mean = [torch.zeros_like(p) for p in parameters]
    squares = [torch.zeros_like(p) for p in parameters]
    objective = pv.SGVB(estimator="B")
    for count in range(1, num_draws + 1):
        loss = objective.differentiable_loss(vae.model, vae.guide, x) / NUM_DATA
        for m, s, g in zip(mean, squares, torch.autograd.grad(loss, parameters), strict=True):
            change = g - m
            m += change / count
            s += change * (g - m)
    return [s.sum() / (num_draws - 1) for s in squares]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--num-draws", type=int, default=100, help="of the noise, for the variance")
    parser.add_argument("--num-samples", type=int, default=500_000, help="of the training before it")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000], help="of minibatches")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    pyro.enable_validation(False)  # as fit has it after its dry run
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {machine}")
    seconds = step_times(args.rounds)
    for name, value in seconds.items():
        print(f"{name}: {1e3 * value:.2f} ms a step, {value / seconds['VAE']:.2f} times the plain VAE's")
    variances = gradient_variances(args.sizes, args.num_draws, args.num_samples)
    shared, local = variances.values()
    for size in args.sizes:
        print(
            f"M = {size}: variance {shared[size]:.3g} drawn, {local[size]:.3g} local, {shared[size] / local[size]:.1f}x"
        )
    if args.output is not None:
        found = {"torch": torch.__version__, "machine": machine, "seconds": seconds, "variances": variances}
        args.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
