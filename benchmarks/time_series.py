"""A training step of the deep Markov model, beside the same model as a plain Pyro loop, and how it grows with T.

    python benchmarks/time_series.py --output docs/time-series.json

The sizes of the model's paper (z 100, transition 200, emission 100, recurrent network 600) on 20 sequences of 88 binary
values, estimator A and Adam. The loop has the same modules and parameters: a site for z_t and one for x_t at each step
of ``pyro.markov``, ``nn.RNN``, ``Trace_ELBO`` and ``pyro.optim.Adam``, with Pyro's validation off, as in this package's
training. The floor is the matrix products of the step alone: recurrent network, combiner, transition and emission,
forwards and twice backwards, those that need no loop at once. One process, turns, medians; to be run on a machine that
does nothing else.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import torch
from particles import medians
from performance import package_step
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.training.step import Batch

NUM_SEQUENCES, DATA_DIM = 20, 88


class Loop(nn.Module):
    """A deep Markov model as sites step by step, with another one's modules."""

    def __init__(self, dmm: pv.DeepMarkovModel) -> None:
        super().__init__()
        self.dmm = dmm
        self.rnn = nn.RNN(dmm.data_dim, dmm.rnn_dim, batch_first=True)
        self.h_0 = nn.Parameter(torch.zeros(1, 1, dmm.rnn_dim))

    def model(self, x: Tensor) -> None:
        """p(x, z)."""
        pyro.module("loop", self)
        with pyro.plate("data", len(x)):
            z = self.dmm.z_0
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", self.dmm.transition(z))
                pyro.sample(f"x_{t}", self.dmm.emission(z), obs=x[:, t])

    def guide(self, x: Tensor) -> None:
        """q(z | x), structured, from the future."""
        pyro.module("loop", self)
        states, _ = self.rnn(x.flip(1), self.h_0.expand(1, len(x), -1).contiguous())
        states = states.flip(1)
        with pyro.plate("data", len(x)):
            z = self.dmm.z_q_0
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", self.dmm.combiner(z, states[:, t]))


def loop_step(x: Tensor) -> Callable[[], None]:
    """A step of Pyro's SVI on the loop."""
    loop = Loop(pv.DeepMarkovModel(DATA_DIM))
    svi = pyro.infer.SVI(loop.model, loop.guide, pyro.optim.Adam({"lr": 1e-4}), pyro.infer.Trace_ELBO())
    return lambda: svi.step(x) and None


def package(x: Tensor, path: str) -> Callable[[], None]:
    """A step of this package, as ``fit`` takes it."""
    step = package_step(pv.DeepMarkovModel(DATA_DIM), pv.SGVB(), x, path)
    return lambda: step(Batch((x,), {}, len(x))) and None


def products(x: Tensor) -> Callable[[], None]:
    """The matrix products of a step, forwards and backwards."""
    dmm, num_steps = pv.DeepMarkovModel(DATA_DIM), x.shape[1]
    in_turn = [(dmm.rnn_dim, dmm.rnn_dim), (dmm.latent_dim, dmm.rnn_dim), (dmm.rnn_dim, 2 * dmm.latent_dim)]
    modules = [dmm.rnns[0].inputs, dmm.combiner, dmm.transition, dmm.emission]
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear)]
    at_once = [(layer.in_features, layer.out_features) for layer in layers]
    at_once += in_turn  # gradients of the weights, of all steps together
    rows = len(x)
    small = [(torch.randn(rows, a), torch.randn(a, b), torch.randn(rows, b)) for a, b in in_turn]
    large = [
        (torch.randn(rows * num_steps, a), torch.randn(a, b), torch.randn(rows * num_steps, b)) for a, b in at_once
    ]

    def run() -> None:
        for _ in range(num_steps):
            for value, weight, slope in small:
                torch.mm(value, weight)
                torch.mm(slope, weight.t())
        for place, (value, weight, slope) in enumerate(large):
            torch.mm(value.t(), slope)
            if place < len(large) - len(in_turn):
                torch.mm(value, weight)
                torch.mm(slope, weight.t())

    return run


def first_step(x: Tensor, path: str) -> float:
    """Seconds of making the model and of its first step."""
    begin = time.perf_counter()
    package(x, path)()
    return time.perf_counter() - begin


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--num-steps", type=int, default=129, help="T of the comparison")
    parser.add_argument("--growth", type=int, nargs="*", default=[125, 250, 500, 1000, 2000], help="other T")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    pyro.enable_validation(False)
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {machine}")
    x = torch.bernoulli(torch.full((NUM_SEQUENCES, args.num_steps, DATA_DIM), 0.05))
    first = {path: first_step(x, path) for path in ("eager", "captured", "compiled")}
    tasks = {"plain Pyro loop": loop_step(x), "matrix products alone": products(x)}
    tasks |= {f"pyro_vae {path}": package(x, path) for path in ("eager", "captured", "compiled")}
    seconds = medians(tasks, args.rounds)
    for name, value in seconds.items():
        print(
            f"{name}: {1e3 * value:.0f} ms a step, {seconds['plain Pyro loop'] / value:.2f} times as fast as the loop"
        )
    print("first step: " + ", ".join(f"{path} {value:.1f} s" for path, value in first.items()))
    growth: dict[int, float] = {}
    for num_steps in args.growth:
        longer = torch.bernoulli(torch.full((NUM_SEQUENCES, num_steps, DATA_DIM), 0.05))
        growth[num_steps] = medians({"step": package(longer, "captured")}, 3)["step"]
        print(f"T = {num_steps}: {1e3 * growth[num_steps]:.0f} ms a step, captured")
    if args.output is not None:
        found = {"torch": torch.__version__, "machine": machine, "seconds": seconds, "first": first, "growth": growth}
        args.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
