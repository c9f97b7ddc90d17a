"""Log p(x) of one trained model by every estimator: two that are low on average, one that is high, and a sandwich.

    python examples/trusted_scores.py runs/mnist-3 --num-data 100

Importance sampling and annealed importance sampling underestimate log p(x) on average, the estimator of the paper's
Appendix D (at most five latent dimensions) overestimates it: where they meet, they can be trusted. Bidirectional Monte
Carlo holds the true value of data simulated from the model between two bounds. ``--smoke`` trains a small model first.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import pyro_vae as pv


def scores_of(program: pv.VAE, data: pv.Dataset, smoke: bool) -> dict[str, pv.Score]:
    """Every estimator on the same test data."""
    few: dict[str, Any] = {"num_steps": 20, "num_particles": 4} if smoke else {}
    options: dict[str, dict[str, Any]] = {
        "importance": {"num_particles": 1000 if smoke else 5000},
        "ais": few,
        "posterior-density": {"num_particles": 200, "num_warmup": 20} if smoke else {},
    }
    scores = {}
    for method, settings in options.items():
        scores[method] = pv.log_marginal(program, data, method=method, **settings)
        print(scores[method], flush=True)
    return scores


def report_gaps(scores: dict[str, pv.Score]) -> None:
    """Differences on the same data, which vary less than the values."""
    low = scores["importance"]
    for method in ("ais", "posterior-density"):
        score = scores[method]
        gap = (score.values - low.values).double()
        error = (score.mc_error**2 + low.mc_error**2) ** 0.5
        print(f"{method} - importance: {gap.mean():+.4f} nats, Monte Carlo error {error:.4f}")


def main() -> None:
    """Score, and say how far apart the estimators are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="directory of a run of a VAE")
    parser.add_argument("--num-data", type=int, default=100, help="the first so many test data")
    parser.add_argument("--root", help="folder with the data")
    parser.add_argument("--smoke", action="store_true", help="a small model, trained for a moment on embedded digits")
    args = parser.parse_args()
    if args.smoke:
        torch.manual_seed(0)
        program, data = pv.VAE((8, 8), latent_dim=2, hidden_dims=(16,)), pv.load_dataset("digits")
        pv.fit(program, data, epochs=5)
        args.num_data = 10
    elif args.run is None:
        parser.error("expected the directory of a run, or --smoke")
    else:
        stored = pv.load_run(args.run)
        program, data = stored.program, stored.dataset(args.root)
    data = replace(data, test=data.test[: args.num_data])
    report_gaps(scores_of(program, data, args.smoke))
    for initial in ("guide", "prior"):
        settings: dict[str, Any] = {"num_steps": 20} if args.smoke else {}
        print(f"from the {initial}: {pv.bidirectional(program, data, initial=initial, **settings)}", flush=True)


if __name__ == "__main__":
    main()
