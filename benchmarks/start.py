"""How long the first steps of a run take: recording the step, and compiling it, with an empty cache and a full one.

    python benchmarks/start.py

Each turn is a process of its own, with the paper's MNIST model, 784-500-20 and 100 data; medians of the turns.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch

ROUNDS = 5


def one_process() -> None:
    """Print the seconds of each kind of first step."""
    started = time.perf_counter()
    import pyro

    import pyro_vae as pv
    from pyro_vae.programs import as_program
    from pyro_vae.training.compiled import CompiledStep
    from pyro_vae.training.optimizers import make_optimizer
    from pyro_vae.training.step import Batch

    pyro.enable_validation(False)
    vae, x = pv.VAE(), torch.rand(100, 784).round()
    program = as_program(vae)
    parameters = program.named_parameters()
    optimizer = make_optimizer("adam", list(parameters.values()))
    step = CompiledStep(program, pv.SGVB(), optimizer, parameters, shapes=[x.shape])
    step.capture_after, step.compile_after = 1, 2
    seconds = [time.perf_counter() - started]
    for _ in range(4):
        started = time.perf_counter()
        step(Batch((x,), {}, len(x)))
        seconds.append(time.perf_counter() - started)
    print(*seconds)


def turn(cache: str) -> list[float]:
    """The seconds of one process that keeps compiled code in a folder."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
    command = [sys.executable, __file__, "--child"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [float(value) for value in done.stdout.split()]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        one_process()
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians of {args.rounds}, in seconds")
    found: dict[str, list[list[float]]] = {"cold": [], "cached": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as cache:
            found["cold"].append(turn(cache))
            found["cached"].append(turn(cache))
    for name, turns in found.items():
        imported, eager, recorded, compiled, later = (statistics.median(part) for part in zip(*turns, strict=True))
        print(
            f"{name}: import {imported:.1f}, first eager step {eager:.2f}, the step that records {recorded:.2f}, the "
            f"step that compiles {compiled:.1f}, the next one {later:.4f}"
        )


if __name__ == "__main__":
    main()
