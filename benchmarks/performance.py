"""Training steps per second, beside other software and beside the matrix products alone.

    python benchmarks/performance.py --output docs/performance.json --figure docs/figures/performance.png

(needs ``pip install -c constraints.txt -e .[bench]``; who is not installed is left out, and named). One process;
everyone has the same parameters, minibatch, optimiser and number of threads; a peer whose bound is wrong is not timed;
turns are taken in an order that changes from round to round; medians and quartiles. To be run on a machine that does
nothing else. ``--only`` measures some rows and leaves the others in the output file as they are; ``--rounds 0`` only
draws.

Rows: ``vae-100`` and ``vae-1000``, the paper's model, 784-500-20, with minibatches of 100 and 1000, the lower bound;
``iwae``, 784-200-200-50 with 20 data and K = 50, the importance-weighted bound; ``score``, log p(x) at K = 5000 of the
paper's model (its time does not depend on which data: they are random); ``batch``, ``particles``, ``width`` and
``data``, how the cost of a step grows, and the throughput of :func:`pyro_vae.fit`. Data and parameters are on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import peers
import pyro
import torch
from contest import Entry, Maker, admit, measure, quartiles, summaries
from floors import Floor, ScoreFloor, bytes_moved, operations
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits
from torch import Tensor

import pyro_vae as pv
from pyro_vae.compile import Recorder
from pyro_vae.evaluation import ImportanceSampling
from pyro_vae.plots import LINE_COLOURS, STYLE
from pyro_vae.programs import as_program
from pyro_vae.training.compiled import CompiledStep
from pyro_vae.training.optimizers import make_optimizer
from pyro_vae.training.step import Batch, EagerStep

SEED = 0
PAPER = {"data_shape": (784,), "latent_dim": 20, "hidden_dims": (500,)}
TWO_LAYERS = {"data_shape": (784,), "latent_dim": 50, "hidden_dims": (200, 200)}
SCORED, SCORE_PARTICLES = 10, 5000
PACKAGES = ("torch", "pyro-ppl", "jax", "jaxlib", "numpyro", "pythae", "numpy")
FIT_SAMPLES = 110_000  # half a run of fit: more than the 1,000 steps after which it compiles


# The package's own contestants ----------------------------------------------------------------------------------------


def package_step(vae: pv.VAE, objective: Any, x: Tensor, path: str) -> EagerStep:
    """The training step of this package, as :func:`pyro_vae.fit` takes it.

    Args:
        vae: trained in place.
        objective: what is maximised.
        x: a minibatch, (M, 784).
        path: "eager"; "captured", as ``fit`` goes on after 10 steps; or "compiled", as it does after 1,000.
    """
    program = as_program(vae)
    parameters = program.named_parameters()
    optimizer = make_optimizer("adam", list(parameters.values()), peers.LEARNING_RATE)
    if path == "eager":
        return EagerStep(program, objective, optimizer, parameters)
    step = CompiledStep(program, objective, optimizer, parameters, shapes=[x.shape])
    step.gradients(Batch((x,), {}, len(x)))  # eagerly, as a run begins
    step.capture_after, step.compile_after = 0, 0 if path == "compiled" else sys.maxsize
    return step


class Package(peers.Peer):
    """This package's training step.

    Args:
        vae: whose parameters are copied.
        x: the minibatch, (M, 784).
        num_particles: K of the importance-weighted bound; None for the lower bound.
        path: "eager", "captured" or "compiled".
    """

    def __init__(self, vae: pv.VAE, x: Tensor, num_particles: int | None, path: str) -> None:
        self.estimator = "A" if num_particles is None else "IWAE"
        self.vae, self.path = peers.clone(vae), path
        self.objective = pv.SGVB() if num_particles is None else pv.IWAE(num_particles)
        self.batch = Batch((x,), {}, len(x))
        self.take_step = package_step(self.vae, self.objective, x, path)

    def step(self) -> None:
        """Loss, gradients and update."""
        self.take_step(self.batch)

    def bound(self, x: Tensor, eps: Tensor) -> float:
        """The bound at given noise; for a graph, whose noise is its own, off by what it is off at that."""
        with self.context(), torch.no_grad(), peers.GivenNoise(eps):
            bound = self.objective.bound(self.vae.model, self.vae.guide, x).mean().item()
        if self.path == "eager":
            return bound
        return bound - (self._loss(self.take_step) - self._loss(super(CompiledStep, self.take_step)))

    def _loss(self, step: Any) -> float:
        with self.context(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return float(step.gradients(self.batch)[0])

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """As in ``fit``, which has checked the program before it trains."""
        return pyro.validation_enabled(False)


class PackageScore(peers.Peer):
    """What :func:`pyro_vae.log_marginal` does for a minibatch, by importance sampling, diagnostics included.

    Args:
        vae: whose parameters are copied.
        x: data, (M, 784).
        num_particles: K.
        compiled: by compiled graphs, as it does where there are many minibatches.
    """

    estimator = "IWAE"

    def __init__(self, vae: pv.VAE, x: Tensor, num_particles: int, compiled: bool) -> None:
        self.program, self.x, self.steps = as_program(peers.clone(vae)), x, len(x)
        self.method, self.recorder = ImportanceSampling(num_particles), Recorder(compiled, compiled=True)

    @torch.no_grad()
    def step(self) -> None:
        """Score every datum."""
        with pyro.validation_enabled(False):
            self.method(self.program, (self.x,), {}, peers.ROWS_AT_ONCE, self.recorder)

    @torch.no_grad()
    def bound(self, x: Tensor, eps: Tensor) -> float:
        """The mean score at given noise, without graphs, whose noise is their own."""
        with peers.GivenNoise(eps):
            return ImportanceSampling(len(eps))(self.program, (x,), {}, peers.ROWS_AT_ONCE).values.mean().item()


# Rows -----------------------------------------------------------------------------------------------------------------


def training_makers(vae: pv.VAE, x: Tensor, num_particles: int | None) -> dict[str, Maker]:
    """Everyone who trains."""
    arguments = vae, x, num_particles
    return {
        **package_makers(*arguments),
        "Pyro": partial(peers.PlainPyro, *arguments),
        "Pyro, validation off": partial(peers.PlainPyro, *arguments, validation=False),
        "PyTorch by hand": partial(peers.ByHand, *arguments),
        "PyTorch by hand, loss compiled": partial(peers.ByHandCompiledLoss, *arguments),
        "PyTorch by hand, step compiled": partial(peers.ByHandCompiledStep, *arguments),
        "NumPyro": partial(peers.NumPyro, *arguments),
        "pythae": partial(peers.Pythae, *arguments),
        "matrix products alone": partial(Floor, *arguments),
    }


def package_makers(vae: pv.VAE, x: Tensor, num_particles: int | None) -> dict[str, Maker]:
    """The package's step, on its three paths."""
    return {
        f"pyro_vae {path}": partial(Package, vae, x, num_particles, path) for path in ("eager", "captured", "compiled")
    }


def scaling_makers(vae: pv.VAE, x: Tensor, num_particles: int | None) -> dict[str, Maker]:
    """Those whose growth is drawn: they need no long compilation at each point."""
    makers = training_makers(vae, x, num_particles)
    drawn = "pyro_vae captured", "pyro_vae compiled", "PyTorch by hand", "NumPyro", "matrix products alone"
    return {name: makers[name] for name in drawn}


def score_makers(vae: pv.VAE, x: Tensor, num_particles: int) -> dict[str, Maker]:
    """Everyone who estimates log p(x)."""
    arguments = vae, x, num_particles
    return {
        "pyro_vae eager": partial(PackageScore, *arguments, compiled=False),
        "pyro_vae compiled": partial(PackageScore, *arguments, compiled=True),
        "Pyro, validation off": partial(peers.PyroScore, *arguments),
        "PyTorch by hand": partial(peers.ByHandScore, *arguments),
        "PyTorch by hand, compiled": partial(peers.ByHandScore, *arguments, compiled=True),
        "NumPyro": partial(peers.NumPyroScore, *arguments),
        "pythae": partial(peers.PythaeScore, *arguments),
        "decoder's matrix products alone": partial(ScoreFloor, *arguments),
    }


def problem(settings: Mapping[str, Any], num_data: int) -> tuple[pv.VAE, Tensor]:
    """A model and data, the same for everyone."""
    torch.manual_seed(SEED)
    return pv.VAE(**settings), torch.rand(num_data, 784).round()


def training_row(
    settings: Mapping[str, Any],
    num_data: int,
    num_particles: int | None,
    rounds: int,
    makers: Callable[[pv.VAE, Tensor, int | None], dict[str, Maker]] = training_makers,
) -> dict[str, Any]:
    """Times of a training step."""
    vae, x = problem(settings, num_data)
    entries = admit(makers(vae, x, num_particles), vae, x, num_particles or 1)
    measure(entries, rounds, SEED)
    work = {f.__name__: f(vae, num_data, num_particles or 1) for f in (operations, bytes_moved)}
    about = {**settings, "num_data": num_data, "num_particles": num_particles}
    return {"unit": "training step", "settings": about, **work, **_found(entries)}


def score_row(rounds: int) -> dict[str, Any]:
    """Times of an estimate of log p(x), per datum."""
    vae, x = problem(PAPER, SCORED)
    entries = admit(score_makers(vae, x, SCORE_PARTICLES), vae, x, SCORE_PARTICLES, trains=False)
    measure(entries, rounds, SEED)
    about = {**PAPER, "num_data": SCORED, "num_particles": SCORE_PARTICLES}
    chunk = {e.name: e.peer.rows_at_once for e in entries if isinstance(e.peer, ScoreFloor)}
    return {"unit": "datum", "settings": about, "rows_at_once": chunk, **_found(entries)}


def _found(entries: Sequence[Entry]) -> dict[str, Any]:
    return {"contestants": summaries(entries)}


def scaling_row(points: Mapping[int, tuple[Mapping[str, Any], int, int | None]], rounds: int) -> dict[str, Any]:
    """Times of a training step at several sizes: settings, data and particles by the number that grows."""
    found = {size: training_row(*point, rounds, scaling_makers) for size, point in points.items()}
    return {"unit": "training step", "points": found}


def data_row(rounds: int) -> dict[str, Any]:
    """Samples per second of a whole ``fit``, its evaluations apart, by the size of the data set."""
    return {"unit": "sample", "points": {size: _fit_point(size, rounds) for size in (1_000, 10_000, 60_000)}}


def _fit_point(num_data: int, rounds: int) -> dict[str, Any]:
    vae, x = problem(PAPER, num_data)
    entries = {name: Entry(name) for name in ("pyro_vae fit, eager", "pyro_vae fit")}
    for _ in range(max(1, rounds // 10)):
        for name, entry in entries.items():
            entry.seconds.append(_seconds_a_sample(vae, x, compile=not name.endswith("eager")))
    return {"contestants": {name: {"seconds": quartiles(entry.seconds)} for name, entry in entries.items()}}


def _seconds_a_sample(vae: pv.VAE, x: Tensor, compile: bool) -> float:
    """Seconds per training sample in the second half of a run: what is recorded or compiled is so in the first."""
    rhythm: dict[str, Any] = {"num_samples": 2 * FIT_SAMPLES, "evaluate_every": FIT_SAMPLES, "evaluation_size": 100}
    own = peers.clone(vae)
    run = pv.fit(own, x, optimizer="adam", binarize="none", progress=False, compile=compile, **rhythm)
    first, last = run.history[-2:]
    return float(last["seconds"] - first["seconds"]) / (last["samples"] - first["samples"])


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "vae-100": lambda rounds: training_row(PAPER, 100, None, rounds),
    "vae-1000": lambda rounds: training_row(PAPER, 1000, None, rounds),
    "iwae": lambda rounds: training_row(TWO_LAYERS, 20, 50, rounds),
    "score": lambda rounds: score_row(max(1, rounds // 5)),
    "batch": lambda rounds: scaling_row({m: (PAPER, m, None) for m in (10, 30, 100, 300, 1000)}, rounds),
    "particles": lambda rounds: scaling_row({k: (TWO_LAYERS, 20, k) for k in (1, 5, 15, 50, 150)}, rounds),
    "width": lambda rounds: scaling_row(
        {h: (PAPER | {"hidden_dims": (h,)}, 100, None) for h in (125, 250, 500, 1000, 2000)}, rounds
    ),
    "data": data_row,
}
TITLES = {
    "vae-100": "VAE 784-500-20, M = 100",
    "vae-1000": "VAE 784-500-20, M = 1000",
    "iwae": "IWAE 784-200-200-50, M = 20, K = 50",
    "score": "log p(x), VAE 784-500-20, K = 5000",
    "batch": "batch size M",
    "particles": "particles K (784-200-200-50, M = 20)",
    "width": "hidden units (M = 100)",
    "data": "data set size N (fit)",
}


# Reports --------------------------------------------------------------------------------------------------------------


def environment(threads: int, rounds: int) -> dict[str, Any]:
    """What the numbers depend on, beside the code."""
    return {
        "machine": _processor(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "threads": threads,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "seed": SEED,
        "rounds": rounds,
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def print_row(title: str, row: Mapping[str, Any], console: Console) -> None:
    """The table of a row."""
    table = _growth(row) if "points" in row else _table(row["unit"], row["contestants"])
    table.title = title
    console.print(table)


def _growth(row: Mapping[str, Any]) -> Table:
    """Medians by contestant and size."""
    points = row["points"]
    table = Table(f"ms per {row['unit']}", *points)
    for name in next(iter(points.values()))["contestants"]:
        entries = [point["contestants"][name] for point in points.values()]
        table.add_row(name, *(f"{1e3 * e['seconds']['median']:.3g}" if "seconds" in e else "" for e in entries))
    return table


def _table(unit: str, contestants: Mapping[str, dict[str, Any]]) -> Table:
    table = Table(
        "", f"ms per {unit}", "quartiles", "per s", "x pyro_vae", "x floor", "threads at work", "bound off by"
    )
    for name, entry in contestants.items():
        table.add_row(name, *(_cells(entry) if "seconds" in entry else [f"not timed: {entry['absent']}"]))
    return table


def _cells(entry: Mapping[str, Any]) -> list[str]:
    seconds = entry["seconds"]
    median, low, high = (seconds[key] for key in ("median", "lower_quartile", "upper_quartile"))
    ratios = [f"{entry[key]['median']:.2f}" if key in entry else "" for key in ("times_pyro_vae", "times_floor")]
    threads = f"{entry.get('threads_at_work', float('nan')):.2f}"
    off = f"{entry['difference']:.0e} ({entry['estimator']})" if "difference" in entry else ""
    return [f"{1e3 * median:.3g}", f"{1e3 * low:.3g} to {1e3 * high:.3g}", f"{1 / median:,.0f}", *ratios, threads, off]


def draw(rows: Mapping[str, Any]) -> Figure:
    """Bars of steps (or data) per second for each row, and lines of the cost's growth.

    Args:
        rows: as in the output file.
    """
    bars = [name for name in ROWS if name in rows and "points" not in rows[name]]
    lines = [name for name in ROWS if name in rows and "points" in rows[name]]
    columns = max(len(bars), len(lines), 1)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * columns, 6.4), layout="constrained")
        axes = figure.subplots(2, columns, squeeze=False)
        for row_axes, names, painter in ((axes[0], bars, _bars), (axes[1], lines, _lines)):
            for ax, name in zip(row_axes, names, strict=False):
                painter(ax, rows[name])
                ax.set_title(TITLES[name])
            for ax in row_axes[len(names) :]:
                ax.set_axis_off()
    return figure


def _bars(ax: Axes, row: Mapping[str, Any]) -> None:
    timed = {name: entry["seconds"] for name, entry in row["contestants"].items() if "seconds" in entry}
    names = sorted(timed, key=lambda name: timed[name]["median"], reverse=True)
    rates = [1 / timed[name]["median"] for name in names]
    ax.barh(names, rates, color=[_colour(name) for name in names])
    ax.bar_label(ax.containers[0], [f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}" for rate in rates], padding=2)
    ax.set_xlabel(f"{'training steps' if row['unit'] == 'training step' else 'data'} per second")
    ax.margins(x=0.18)


def _lines(ax: Axes, row: Mapping[str, Any]) -> None:
    names = dict.fromkeys(name for point in row["points"].values() for name in point["contestants"])
    for colour, name in zip(LINE_COLOURS, names, strict=False):
        points = {int(size): point["contestants"][name] for size, point in row["points"].items()}
        times = {size: 1e3 * entry["seconds"]["median"] for size, entry in points.items() if "seconds" in entry}
        if times:
            ax.plot(list(times), list(times.values()), marker="o", markersize=3, color=colour, label=name)
    ax.set(xscale="log", yscale="log", ylabel=f"ms per {row['unit']}")
    ax.set_xticks([int(size) for size in row["points"]], list(row["points"]), minor=False)
    ax.set_xticks([], minor=True)
    low, high = ax.get_ylim()
    ax.set_ylim(low / 2, high * 2)
    ax.legend(frameon=False, loc="upper left")


def _colour(name: str) -> str:
    if name.startswith("pyro_vae"):
        return LINE_COLOURS[1]
    return "0.6" if name.endswith("alone") else LINE_COLOURS[0]


# The command ----------------------------------------------------------------------------------------------------------


def set_threads(threads: int) -> None:
    """The same number for torch, numpy and XLA, which reads it when first used; the table says what was at work."""
    torch.set_num_threads(threads)
    threadpool_limits(threads, user_api="blas")
    os.environ["PJRT_NPROC"] = str(threads)
    os.environ["JAX_PLATFORMS"] = "cpu"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=list(ROWS), action="append", metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--output", type=Path, help="JSON file, such as docs/performance.json")
    parser.add_argument("--figure", type=Path, help="picture, such as docs/figures/performance.png")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write and draw."""
    args = parse()
    set_threads(args.threads)
    rows = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    for name in (args.only or ROWS) if args.rounds else ():
        around = environment(args.threads, args.rounds)
        rows[name] = json.loads(json.dumps({"environment": around, **ROWS[name](args.rounds)}))
        print_row(f"{TITLES[name]}; load before: {around['load_before']:.1f}", rows[name], Console(width=140))
        if args.output:
            args.output.write_text(json.dumps(rows, indent=1) + "\n")
    if args.figure:
        draw(rows).savefig(args.figure)


if __name__ == "__main__":
    main()
