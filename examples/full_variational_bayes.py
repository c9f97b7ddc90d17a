"""Full variational Bayes against overfitting: the paper's Appendix F on a thousand images of MNIST.

    python examples/full_variational_bayes.py --out runs/full-bayes [--reference aevb_figures.csv]

The setting of the paper's Figure 3, left: N = 1,000 training images, 100 hidden units, N_z = 3, where AEVB overfits.
Maximum likelihood, maximum a posteriori (a prior N(0, 1) on every parameter) and full variational Bayes are trained for
the same number of samples, without early stopping. Of each, log p(x) of training and test images is estimated on the
way by annealed importance sampling from the prior, so that an encoder that overfits does no harm: a lower bound on
average. Under full variational Bayes it is the log of the mean density over draws of theta, one for each chain. What is
trained and scored already is not done again; ``--score-data 0`` trains and does not score.
"""

import argparse
import csv
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import pyro_vae as pv

LOCAL = {"local_reparameterization": True}
ARMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # arguments of VAE, and of fit
    "maximum likelihood": ({}, {}),
    "maximum a posteriori": ({}, {"prior_scale": 1.0}),
    "full variational Bayes": ({"bayesian": "decoder", **LOCAL}, {}),
    "full variational Bayes, learned prior": ({"bayesian": "decoder", "learn_prior": True, **LOCAL}, {}),
    "full variational Bayes, encoder too": ({"bayesian": True, **LOCAL}, {}),
}
STAGES: tuple[int, ...] = (100_000, 200_000, 500_000, 1_000_000, 2_000_000, 5_000_000, 10_000_000, 20_000_000)


def curve(label: str, data: pv.Dataset, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One arm, trained in stages that are kept, and scored after each."""
    folder = args.out / f"{label.replace(' ', '-').replace(',', '')}-{args.seed}"
    file = folder.with_suffix(".json")
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    for budget in (stage for stage in STAGES if stage <= args.num_samples):
        stage = folder / f"{budget}"
        if not stage.exists():
            train(label, folder / "run", budget, data, args)
            shutil.copytree(folder / "run", stage)
        if args.score_data and all(row["samples"] != budget for row in rows):
            rows.append({"label": label, "seed": args.seed, "samples": budget} | score(stage, data, args))
            print(f"{label}, {budget:,} samples: " + ", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
            file.write_text(json.dumps(rows, indent=1))
    return rows


def train(label: str, run_dir: Path, budget: int, data: pv.Dataset, args: argparse.Namespace) -> None:
    """Train an arm up to a number of samples."""
    of_model, of_fit = ARMS[label]
    torch.manual_seed(args.seed)
    run = pv.fit(
        pv.VAE(tuple(data.train.shape[1:]), 3, (100,), **of_model),
        data.train[: args.num_data],
        objective=pv.SGVB(estimator="B"),
        optimizer="adam",
        learning_rate=args.learning_rate,
        num_samples=budget,
        evaluate_every=100_000,
        seed=args.seed,
        run_dir=run_dir,
        resume=True,
        **of_fit,
    )
    print(f"{label}: {run}", flush=True)


def score(stage: Path, data: pv.Dataset, args: argparse.Namespace) -> dict[str, Any]:
    """Log p(x) of the first images of either split."""
    stored = pv.load_run(stage)
    images = {"train": data.train[: args.num_data], "test": data.test}
    options: dict[str, Any] = {"method": "ais", "initial": "prior", "num_steps": args.num_steps}
    found: dict[str, Any] = {"dataset_bound": stored.history[-1].get("dataset_bound")}
    for split, x in images.items():
        result = pv.log_marginal(
            stored.program, x[: args.score_data], num_particles=args.num_chains, binarize=data.binarize, **options
        )
        ess = result.diagnostics["ess"].median().item()
        found |= {split: result.mean, f"{split}_se": result.std_error}
        found |= {f"{split}_mc_error": result.mc_error, f"{split}_ess": ess}
    return found


def paper(file: Path | None) -> dict[str, list[tuple[float, float]]]:
    """The paper's own curves by split; nothing without the table."""
    if file is None:
        return {}
    with file.open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["panel"] == "Ntrain=1000" and row["method"] == "AEVB"]
    splits = {row["split"] for row in rows}
    return {s: [(float(r["training_samples"]), float(r["value"])) for r in rows if r["split"] == s] for s in splits}


def draw(curves: dict[str, list[dict[str, Any]]], reference: Path | None) -> Figure:
    """Test values solid, training values dashed, the paper's grey."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for color, (label, rows) in enumerate(curves.items()):
        samples = [row["samples"] for row in rows]
        axes.plot(samples, [row["test"] for row in rows], color=f"C{color}", label=label)
        axes.plot(samples, [row["train"] for row in rows], color=f"C{color}", dashes=(4, 2))
    for split, points in paper(reference).items():
        style = "--" if split == "train" else "-"
        seen, values = zip(*points, strict=True)
        axes.plot(seen, values, color="grey", lw=1, linestyle=style, label=f"paper's AEVB, {split}")
    axes.set(xscale="log", xlabel="training samples seen", ylabel="log p(x), nats per datum", ylim=(-175, -100))
    axes.set_title("MNIST, N = 1,000, N_z = 3: test (solid) and training images (dashed)", fontsize=10)
    axes.legend(fontsize=8)
    return figure


def main() -> None:
    """Every arm, one after the other, and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/full-bayes"), help="folder of the runs and the figure")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--num-data", type=int, default=1000, help="training images")
    parser.add_argument("--num-samples", type=int, default=10_000_000, help="training samples to see")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of Adam")
    parser.add_argument("--score-data", type=int, default=200, help="images of each split to score")
    parser.add_argument("--num-chains", type=int, default=64, help="of annealed importance sampling, per image")
    parser.add_argument("--num-steps", type=int, default=100, help="of annealed importance sampling")
    parser.add_argument("--reference", type=Path, help="table of the paper's curves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a minute's version on embedded digits")
    args = parser.parse_args()
    data = pv.load_dataset("digits" if args.smoke else "mnist")
    if args.smoke:
        global STAGES
        STAGES, args.num_data, args.score_data, args.num_chains, args.num_steps = (1_000, 3_000), 200, 20, 4, 10
        args.arms = args.arms[:3]
    args.out.mkdir(parents=True, exist_ok=True)
    curves = {label: curve(label, data, args) for label in args.arms}
    if not args.score_data:
        return
    draw(curves, args.reference).savefig(args.out / "full_bayes.png", dpi=120)
    print(f"log p(x) in nats per datum: {args.out / 'full_bayes.png'}")


if __name__ == "__main__":
    main()
