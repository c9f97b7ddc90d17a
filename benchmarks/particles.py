"""Particles per second: the importance-weighted step, and Hamiltonian Monte Carlo in batches.

    OMP_NUM_THREADS=1 python benchmarks/particles.py

One process, turns taken, medians; to be run on a machine that does nothing else. The model is the paper's MNIST one,
784-500-20, 100 data. Peers: Pyro's RenyiELBO (alpha = 0, vectorised particles) for the step; the same HMC transition in
a loop over data, and Pyro's own HMC kernel for one datum, for the chains.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import pyro
import torch
from pyro.infer import RenyiELBO
from pyro.infer.mcmc import HMC
from torch import Tensor

import pyro_vae as pv
from pyro_vae import hmc
from pyro_vae.programs import LatentSpace

NUM_DATA, LEAPFROG, STEP_SIZE = 100, 10, 0.05


def medians(tasks: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each task, taking turns."""
    for task in tasks.values():
        task()
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def step_of(vae: pv.VAE, x: Tensor, objective: object) -> Callable[[], None]:
    """Loss, gradients and the optimiser's update."""
    optimizer = torch.optim.Adagrad(vae.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        objective.differentiable_loss(vae.model, vae.guide, x).backward()
        optimizer.step()

    return step


def batched_chains(vae: pv.VAE, x: Tensor) -> Callable[[], None]:
    """One transition of a chain for every datum at once."""
    space = LatentSpace(vae.model, vae.guide, (x,))

    def log_density(u: Tensor) -> Tensor:
        return space.density(u).log_joint

    state = hmc.init(log_density, space.draw_guide(1))
    return lambda: hmc.step(log_density, state, step_size=STEP_SIZE, num_leapfrog=LEAPFROG) and None


def looped_chains(vae: pv.VAE, x: Tensor) -> Callable[[], None]:
    """The same, one datum after another."""
    tasks = [batched_chains(vae, row[None]) for row in x]
    return lambda: [task() for task in tasks] and None


def pyro_chain(vae: pv.VAE, x: Tensor) -> Callable[[], None]:
    """One transition of Pyro's kernel for the first datum."""
    kernel = HMC(vae.model, step_size=STEP_SIZE, num_steps=LEAPFROG, adapt_step_size=False, adapt_mass_matrix=False)
    kernel.setup(0, x[:1])
    position = {name: value.detach() for name, value in kernel.initial_params.items()}
    return lambda: kernel.sample(position) and None


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--num-particles", type=int, default=50)
    args = parser.parse_args()
    torch.manual_seed(0)
    pyro.enable_validation(False)
    vae, x = pv.VAE((784,), 20, (500,)), torch.rand(NUM_DATA, 784).round()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    k = args.num_particles
    steps = {
        "pyro_vae IWAE": step_of(vae, x, pv.IWAE(k)),
        "pyro_vae DReG": step_of(vae, x, pv.DReG(k)),
        "Pyro RenyiELBO": step_of(vae, x, _Renyi(k)),
    }
    for name, seconds in medians(steps, args.rounds).items():
        print(f"{name}, K = {k}, M = {NUM_DATA}: {1e3 * seconds:.1f} ms, {k * NUM_DATA / seconds:,.0f} particles per s")
    chains = {"batched HMC": (batched_chains(vae, x), NUM_DATA), "a loop over data": (looped_chains(vae, x), NUM_DATA)}
    chains["Pyro's HMC, one datum"] = (pyro_chain(vae, x), 1)
    found = medians({name: task for name, (task, _) in chains.items()}, max(3, args.rounds // 3))
    for name, seconds in found.items():
        print(f"{name}, L = {LEAPFROG}: {1e3 * seconds:.1f} ms, {chains[name][1] / seconds:,.1f} transitions per s")


class _Renyi:
    """Pyro's importance-weighted bound with the interface of a differentiable loss."""

    def __init__(self, num_particles: int) -> None:
        self.elbo = RenyiELBO(alpha=0, num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)

    def differentiable_loss(self, model: object, guide: object, x: Tensor) -> "_Backward":
        return _Backward(self.elbo, model, guide, x)


class _Backward:
    """RenyiELBO computes value and gradients in one call."""

    def __init__(self, elbo: RenyiELBO, *args: object) -> None:
        self.elbo, self.args = elbo, args

    def backward(self) -> None:
        self.elbo.loss_and_grads(*self.args)


if __name__ == "__main__":
    main()
