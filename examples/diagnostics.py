"""What a trained VAE uses of its latents, and how far its guide is from the posterior.

    python examples/diagnostics.py runs/mnist --num-data 100

Prints the active units, the KL divergence that each latent dimension carries, the amortisation and the approximation
gap, and a test of the guide's calibration on data simulated from the model, whose rank histograms it draws: a guide
that is too narrow gives valleys, one that is too wide gives hills. ``--smoke`` trains a small model first.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

import pyro_vae as pv
from pyro_vae import plots
from pyro_vae.evaluation import active_units, amortization_gap, kl_per_dimension, simulation_based_calibration


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="directory of a run of a VAE")
    parser.add_argument("--num-data", type=int, default=100, help="test data for the gaps")
    parser.add_argument("--root", help="folder with the data")
    parser.add_argument("--output", type=Path, default=Path("ranks.png"), help="picture of the rank histograms")
    parser.add_argument("--smoke", action="store_true", help="a small model, trained for a moment on embedded digits")
    args = parser.parse_args()
    if args.smoke:
        torch.manual_seed(0)
        program, data = pv.VAE((8, 8), latent_dim=3, hidden_dims=(16,)), pv.load_dataset("digits")
        pv.fit(program, data, epochs=5)
        args.num_data = 5
    elif args.run is None:
        parser.error("expected the directory of a run, or --smoke")
    else:
        stored = pv.load_run(args.run)
        program, data = stored.program, stored.dataset(args.root)
    some = replace(data, test=data.test[:1000])
    units = active_units(program, some)
    carried = kl_per_dimension(program, some)["z"]
    print(f"active units: {units.count} of {program.latent_dim}")
    print(f"KL per dimension, nats: {', '.join(f'{kl:.2f}' for kl in carried.sort(descending=True).values.tolist())}")
    print(amortization_gap(program, replace(data, test=data.test[: args.num_data])))
    calibration = simulation_based_calibration(program, some)
    smallest = calibration.p_values()["z"].min().item()
    print(f"calibration: smallest p-value of {program.latent_dim} dimensions {smallest:.2g} (small: q is not p(z | x))")
    ranks = {name: values.numpy() for name, values in calibration.ranks.items()}
    plots.plot_rank_histograms(ranks, num_draws=calibration.num_draws).savefig(args.output, dpi=150)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
