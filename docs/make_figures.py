"""The figures of docs/results.md and of the README, from run directories.

    python docs/make_figures.py --runs runs [--reference aevb_figures.csv]

Needs the runs mnist, mnist2d, frey, sgvb-3, wake-sleep-3 and wake-sleep-20, made by the commands in docs/results.md.
The reference is a table of the paper's curves (columns figure, panel, method, split, training_samples, value; digitised
from arXiv:1312.6114) and may be left out.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import pyro_vae as pv
from pyro_vae import plots

FIGURES = Path(__file__).parent / "figures"
PANELS = {"mnist": ("MNIST Nz=20", (-160, -90)), "frey": ("Frey Nz=10", (0, 1500))}
AGAINST_WAKE_SLEEP = {
    "MNIST Nz=3": ({"AEVB": "sgvb-3", "wake-sleep": "wake-sleep-3"}, (-175, -130)),
    "MNIST Nz=20": ({"AEVB": "mnist", "wake-sleep": "wake-sleep-20"}, (-160, -95)),
}
BUDGETS = (1e6, 1e7)
Curve = tuple[np.ndarray, np.ndarray]


def reference_curve(file: Path | None, panel: str, method: str = "AEVB") -> dict[str, Curve]:
    """The paper's test curve of a method in a panel of its Figure 2; nothing without the table."""
    if file is None:
        return {}
    with file.open() as stream:
        rows = [
            (float(row["training_samples"]), float(row["value"]))
            for row in csv.DictReader(stream)
            if (row["figure"], row["panel"], row["method"], row["split"]) == ("fig2", panel, method, "test")
        ]
    samples, values = np.array(sorted(rows)).T
    return {f"paper, {method}": (samples, values)}


def report(label: str, history: list[dict[str, Any]], curve: dict[str, Curve]) -> None:
    """Print the test bound at each budget that a run has seen, beside the paper's."""
    for budget in BUDGETS:
        row = min(history, key=lambda row: abs(row["samples"] - budget))
        if abs(row["samples"] - budget) < 0.01 * budget:
            theirs = "".join(f", {name} {np.interp(budget, *points):.1f}" for name, points in curve.items())
            print(f"{label} at {row['samples']:,}: {row['test_bound']:.2f} ± {row['test_bound_se']:.2f}{theirs}")


def draw_against_wake_sleep(runs: Path, reference: Path | None) -> None:
    """AEVB beside wake-sleep, as in the paper's Figure 2, a picture for each number of latent dimensions."""
    for panel, (names, ylim) in AGAINST_WAKE_SLEEP.items():
        histories = {label: pv.load_run(runs / name).history for label, name in names.items()}
        methods = dict(zip(names, ("AEVB", "Wake-Sleep"), strict=True))
        curves = {label: reference_curve(reference, panel, method) for label, method in methods.items()}
        for label, history in histories.items():
            report(f"{panel}, {label}", history, curves[label])
        both = {name: points for curve in curves.values() for name, points in curve.items()}
        tests = {label: [_test_only(row) for row in history] for label, history in histories.items()}
        figure = plots.plot_learning_curves(tests, reference=both, title=panel, ylim=ylim)
        figure.savefig(FIGURES / f"{panel.lower().replace(' ', '_').replace('=', '')}_wake_sleep.png", dpi=150)


def _test_only(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith("train")}


def overview(left: Path, right: Path) -> Image.Image:
    """Two pictures side by side, of equal height."""
    pictures = [Image.open(path).convert("L" if path is right else "RGB") for path in (left, right)]
    height = min(picture.height for picture in pictures)
    pictures = [picture.resize((picture.width * height // picture.height, height)) for picture in pictures]
    both = Image.new("RGB", (sum(picture.width for picture in pictures), height), "white")
    both.paste(pictures[0], (0, 0))
    both.paste(pictures[1].convert("RGB"), (pictures[0].width, 0))
    return both


def main() -> None:
    """Draw every figure, and print the bounds beside the paper's at 1e6 and 1e7 samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run directories")
    parser.add_argument("--reference", type=Path, help="table of the paper's curves")
    args = parser.parse_args()
    FIGURES.mkdir(exist_ok=True)
    for name, (panel, ylim) in PANELS.items():
        run = pv.load_run(args.runs / name)
        curve = reference_curve(args.reference, panel)
        figure = plots.plot_learning_curves({"pyro_vae": run.history}, reference=curve, title=panel, ylim=ylim)
        figure.savefig(FIGURES / f"{name}_curve.png", dpi=150)
        report(panel, run.history, curve)
    draw_against_wake_sleep(args.runs, args.reference)
    torch.manual_seed(0)
    for name in ("mnist", "frey"):
        images = pv.load_run(args.runs / name).program.sample(60, mean=True)
        plots.plot_samples(images.numpy(), columns=12).savefig(FIGURES / f"{name}_samples.png", dpi=150)
    vae = pv.load_run(args.runs / "mnist2d").program
    with torch.no_grad():
        grid = vae.decode(torch.tensor(plots.latent_grid(20), dtype=torch.float32)).mean
    plots.plot_manifold(grid.numpy()).savefig(FIGURES / "mnist_manifold.png", dpi=100)
    overview(FIGURES / "mnist_curve.png", FIGURES / "mnist_manifold.png").save(FIGURES / "overview.png", optimize=True)


if __name__ == "__main__":
    main()
