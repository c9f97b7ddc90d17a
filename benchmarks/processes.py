"""Training samples per second of ``fit`` in one process and in several, each with one thread.

    python benchmarks/processes.py --processes 2

The minibatch grows with the processes (weak scaling: ``--rows`` data for each), and stays the same (strong scaling).
Turns are taken; medians. The model is the paper's, 784-500-20, under Adam; the second half of each run is timed, in
which the step is compiled.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

STEPS_OF_WARMUP = 30


def one_process(batch_size: int, num_steps: int, output: str) -> None:
    """Train, and write the samples per second of the second half."""
    import pyro_vae as pv
    from pyro_vae.parallel import ranks
    from pyro_vae.training import compiled

    compiled.COMPILE_AFTER = STEPS_OF_WARMUP - 10  # as after the first 1,000 steps of a long run
    torch.manual_seed(0)
    x = torch.rand(10_000, 784).round()
    first, last = STEPS_OF_WARMUP * batch_size, (STEPS_OF_WARMUP + num_steps) * batch_size
    run = pv.fit(
        pv.VAE(),
        x,
        optimizer="adam",
        batch_size=batch_size,
        num_samples=last,
        evaluate_every=first,
        evaluation_size=100,
        binarize="none",
        progress=False,
    )
    rows = [row for row in run.history if row["samples"] >= first]
    rate = (rows[-1]["samples"] - rows[0]["samples"]) / (rows[-1]["seconds"] - rows[0]["seconds"])
    if ranks().first:
        Path(output).write_text(json.dumps({"rate": rate, "path": run.path}))


def turn(processes: int, batch_size: int, num_steps: int) -> float:
    """Samples per second of one run."""
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder, "rate.json"))
        child = [__file__, "--child", str(batch_size), str(num_steps), output]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), *child]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
        found = json.loads(Path(output).read_text())
        assert found["path"] == "compiled", found
        return float(found["rate"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1000, help="data of a minibatch, for each process")
    parser.add_argument("--steps", type=int, default=60, help="that are timed")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        one_process(int(args.child[0]), int(args.child[1]), args.child[2])
        return
    runs = {
        "one process": (1, args.rows),
        f"{args.processes} processes, {args.rows} data each": (args.processes, args.processes * args.rows),
        f"{args.processes} processes, {args.rows} data together": (args.processes, args.rows),
    }
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, (processes, batch_size) in runs.items():
            found[name].append(turn(processes, batch_size, args.steps))
    one = statistics.median(found["one process"])
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, one thread each; medians of {args.rounds}")
    for name, rates in found.items():
        rate = statistics.median(rates)
        print(f"{name}: {rate:,.0f} samples per s, {rate / one:.2f} times one process")


if __name__ == "__main__":
    main()
