"""Full variational Bayes against overfitting: the paper's Appendix F on a thousand images of MNIST.

    python examples/full_variational_bayes.py --out runs/full-bayes [--reference aevb_figures.csv]

The setting of the paper's Figure 3, left: N = 1,000 training images, 100 hidden units, N_z = 3, where AEVB overfits.
Maximum likelihood, maximum a posteriori (a prior N(0, 1) on every parameter) and full variational Bayes are trained for
the same number of samples, without early stopping. Of each, log p(x) of training and test images is found on the way.
With three latent dimensions that needs no encoder, which may itself overfit: p(x) is the mean of p(x | z) over points
that fill the prior, the same for all images, by quasi-Monte Carlo. Each of S draws takes other points and, under full
variational Bayes, another theta, so that the mean over all is the predictive density. ``--check`` compares some of it
with annealed importance sampling. What is trained or scored already is not done again; ``--score-data 0`` trains only.
"""

import argparse
import csv
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import pyro_vae as pv
from pyro_vae.numerics import log_mean_exp

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


@torch.no_grad()
def score(stage: Path, data: pv.Dataset, args: argparse.Namespace) -> dict[str, Any]:
    """Log p(x) of the first images of either split, in nats per datum."""
    stored = pv.load_run(stage)
    images = binary_images(data, args)
    x = torch.cat(list(images.values()))
    at_draws = torch.stack([log_density(stored.program, x, args.num_points, seed) for seed in range(args.num_draws)])
    log_p = log_mean_exp(at_draws, dim=0)
    relative = (at_draws - log_p).exp()  # (S, N): p(x) at a draw over its mean
    found: dict[str, Any] = {"dataset_bound": stored.history[-1].get("dataset_bound")}
    for split, index in zip(images, torch.arange(len(x)).split([len(x) for x in images.values()]), strict=True):
        values, deviations = log_p[index], relative[:, index].mean(1)
        found |= {split: values.mean().item(), f"{split}_se": (values.std() / len(index) ** 0.5).item()}
        found[f"{split}_mc_error"] = (deviations.std() / args.num_draws**0.5).item()
    if args.check:
        found |= check(stored.program, images["test"][: args.check], log_p[-len(images["test"]) :][: args.check])
    return found


def binary_images(data: pv.Dataset, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """The first images of either split, drawn binary once, (N, H W)."""
    generator = torch.Generator().manual_seed(0)
    first = {"train": data.train[: args.num_data], "test": data.test}
    grey = {split: x[: args.score_data].flatten(1) / 255 for split, x in first.items()}
    return {split: torch.bernoulli(x, generator=generator) for split, x in grey.items()}


def log_density(vae: pv.VAE, x: torch.Tensor, num_points: int, seed: int) -> torch.Tensor:
    """Log of the mean of p(x | z) over points that fill the prior, at one draw of theta if it is latent, (N,)."""
    torch.manual_seed(seed)
    uniform = torch.quasirandom.SobolEngine(vae.latent_dim, scramble=True, seed=seed).draw(num_points)
    z = torch.special.ndtri(uniform.double().clamp(1e-9, 1 - 1e-9)).float()
    logits = vae.decoder.draw(1)(z)[0] if isinstance(vae.decoder, pv.bayesian) else vae.decoder(z)  # (num_points, D)
    # log Bernoulli(x; logits) of all pairs by one matrix product
    return log_mean_exp(logits @ x.T - F.softplus(logits).sum(-1, keepdim=True), dim=0)


def check(vae: pv.VAE, x: torch.Tensor, log_p: torch.Tensor) -> dict[str, float]:
    """The same by annealed importance sampling from the prior, which is low on average."""
    result = pv.log_marginal(vae, x, method="ais", initial="prior", num_particles=64, num_steps=100)
    return {"check": log_p.mean().item(), "check_ais": result.mean, "check_ais_mc_error": result.mc_error}


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
    axes.set(xscale="log", xlabel="training samples seen", ylabel="log p(x), nats per datum", ylim=(-192, -100))
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
    parser.add_argument("--score-data", type=int, default=1000, help="images of each split to score")
    parser.add_argument("--num-draws", type=int, default=128, help="S, draws of theta and of the points' places")
    parser.add_argument("--num-points", type=int, default=8192, help="points of the prior in each draw")
    parser.add_argument("--check", type=int, default=0, help="test images to score by annealed importance sampling")
    parser.add_argument("--reference", type=Path, help="table of the paper's curves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a minute's version on embedded digits")
    args = parser.parse_args()
    data = pv.load_dataset("digits" if args.smoke else "mnist")
    if args.smoke:
        global STAGES
        STAGES, args.num_data, args.score_data, args.num_draws, args.check = (1_000, 3_000), 200, 20, 16, 4
        args.arms = args.arms[:3]
    args.out.mkdir(parents=True, exist_ok=True)
    curves = {label: curve(label, data, args) for label in args.arms}
    if not args.score_data:
        return
    draw(curves, args.reference).savefig(args.out / "full_bayes.png", dpi=120)
    print(f"log p(x) in nats per datum: {args.out / 'full_bayes.png'}")


if __name__ == "__main__":
    main()
