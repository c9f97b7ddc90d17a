"""Posterior collapse in a VAE of five layers, seen and cured: which latents are used after four ways of training.

    python examples/posterior_collapse.py --out runs/collapse

The layers of Sønderby et al. (arXiv:1602.02282) on binarised MNIST: 64, 32, 16, 8 and 4 latents, with two deterministic
layers of 512, 256, 128, 64 and 32 units below each, at --scale of those widths. Trained as it is, the top layers'
posteriors fall onto the prior, and the model is one of fewer layers. Against it: the KL term's weight raised from 0
(warm-up), nats of each layer that cost nothing (free bits, arXiv:1606.04934), and the ladder's top-down guide, which
corrects what the model says of a layer; this one with warm-up too, as in its paper. A latent is active whose posterior
mean varies over data by more than 0.01 (arXiv:1509.00519, Sec. 5.2).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import pyro_vae as pv

LATENT_DIMS = (64, 32, 16, 8, 4)
WIDTHS = (512, 256, 128, 64, 32)
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "warm-up": {"kl_warmup": 1},
    "free bits": {"free_bits": 1.0},
    "ladder, warm-up": {"kl_warmup": 1, "guide": "top-down"},
}


def train(way: str, data: pv.Dataset, args: argparse.Namespace) -> Any:
    """A run by one of the ways."""
    options = dict(WAYS[way])
    torch.manual_seed(args.seed)
    widths = [(max(4, int(args.scale * width)),) * 2 for width in WIDTHS]
    guide = options.pop("guide", "bottom-up")
    vae = pv.HierarchicalVAE(data.train.shape[1:], LATENT_DIMS, widths, guide=guide, activation=args.activation)
    if "kl_warmup" in options:
        options["kl_warmup"] = int(args.warmup * args.epochs * len(data.train)) or None
    return pv.fit(
        vae,
        data,
        optimizer="adam",
        learning_rate=1e-3,
        batch_size=args.batch_size,
        epochs=args.epochs,
        kl_by_site=True,
        evaluate_every=len(data.train),
        evaluation_size=1000,
        seed=args.seed,
        run_dir=args.out / way.replace(", ", "-").replace(" ", "-"),
        resume=True,
        **options,
    )


def score(run: Any, data: pv.Dataset, args: argparse.Namespace) -> dict[str, Any]:
    """Log p(x), and of each layer the active latents and what it costs."""
    test = data.with_test("test", args.num_test)
    log_p = pv.log_marginal(run.program, test, num_particles=args.num_particles)
    active = pv.evaluation.active_units(run.program, test).active
    sites = [f"z_{number}" for number in range(1, len(LATENT_DIMS) + 1)]
    return {
        "log_p": log_p.mean,
        "log_p_se": log_p.std_error,
        "bound": run.history[-1]["test_bound"],
        "active": [int(active[site].sum()) for site in sites],
        "kl": [run.history[-1][f"test_kl_{site}"] for site in sites],
    }


def draw(found: dict[str, dict[str, Any]]) -> Figure:
    """Active latents of each layer, side by side, and each layer's cost."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    places = np.arange(len(LATENT_DIMS))
    width = 0.8 / len(found)
    axes[0].bar(places, LATENT_DIMS, 0.9, color="0.92", label="latents")
    for number, (way, scores) in enumerate(found.items()):
        shift = (number - (len(found) - 1) / 2) * width
        bars = axes[0].bar(places + shift, scores["active"], width, label=way)
        axes[0].bar_label(bars, fontsize=7)
        axes[1].bar(places + shift, np.maximum(scores["kl"], 0.0), width)
    for panel, title in zip(axes, ("active latents", "nats per image: log q - log p"), strict=True):
        panel.set_xticks(places, [f"$z_{number + 1}$" for number in places])
        panel.set_title(title, fontsize=10)
    axes[0].legend(fontsize=8)
    axes[1].set_yscale("symlog", linthresh=0.1)
    return figure


def main() -> None:
    """Train four times, score and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--scale", type=float, default=0.5, help="of the deterministic layers' widths")
    parser.add_argument("--activation", default="relu")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument(
        "--warmup", type=float, default=0.5, help="share of the passes until the KL term has its weight"
    )
    parser.add_argument("--num-test", type=int, default=1000, help="test images that are scored")
    parser.add_argument("--num-particles", type=int, default=1000, help="K of the score")
    parser.add_argument("--out", type=Path, default=Path("runs/collapse"), help="folder of the runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="8 x 8 digits, two passes, narrow layers")
    args = parser.parse_args()
    if args.smoke:
        args.dataset, args.scale, args.epochs, args.num_test, args.num_particles = "digits", 0.05, 2, 20, 10
    data = pv.load_dataset(args.dataset)
    args.out.mkdir(parents=True, exist_ok=True)
    found = {}
    for way in WAYS:
        found[way] = score(train(way, data, args), data, args)
        nats = ", ".join(f"{kl:.2f}" for kl in found[way]["kl"])
        print(
            way + ": log p(x) {log_p:.2f} nats ({log_p_se:.2f}), active {active}".format(**found[way]), f"KL [{nats}]"
        )
    (args.out / "scores.json").write_text(json.dumps(vars(args) | {"ways": found}, default=str, indent=1))
    draw(found).savefig(args.out / "collapse.png", dpi=120)


if __name__ == "__main__":
    main()
