"""The figures of docs/results.md and of the README, from run directories.

    python docs/make_figures.py --runs runs [--reference aevb_figures.csv]

Needs the runs mnist, mnist2d and frey, made by the commands in docs/results.md. The reference is a table of the paper's
curves (columns figure, panel, method, split, training_samples, value; digitised from arXiv:1312.6114) and may be left
out.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import pyro_vae as pv
from pyro_vae import plots

FIGURES = Path(__file__).parent / "figures"
PANELS = {"mnist": ("MNIST Nz=20", (-160, -90)), "frey": ("Frey Nz=10", (0, 1500))}


def reference_curve(file: Path | None, panel: str) -> dict[str, tuple[np.ndarray, np.ndarray]] | None:
    """The paper's AEVB test curve of a panel of its Figure 2."""
    if file is None:
        return None
    with file.open() as stream:
        rows = [
            (float(row["training_samples"]), float(row["value"]))
            for row in csv.DictReader(stream)
            if (row["figure"], row["panel"], row["method"], row["split"]) == ("fig2", panel, "AEVB", "test")
        ]
    samples, values = np.array(sorted(rows)).T
    return {"paper, AEVB (test)": (samples, values)}


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
        for budget in (1e6, 1e7):
            row = min(run.history, key=lambda row: abs(row["samples"] - budget))
            theirs = "" if curve is None else f", paper {np.interp(budget, *curve['paper, AEVB (test)']):.1f}"
            print(f"{panel} at {row['samples']:,}: {row['test_bound']:.2f} ± {row['test_bound_se']:.2f}{theirs}")
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
