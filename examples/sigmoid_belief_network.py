"""A sigmoid belief network on binary digits: latents that SGVB cannot train, by objectives that can.

    python examples/sigmoid_belief_network.py --objective reweighted-wake-sleep --run-dir runs/sbn-rws

Trains by the chosen objective and scores log p(x) by importance sampling. The data are the fixed binarisation of MNIST
of Larochelle & Murray (found by PYRO_VAE_DATA or downloaded). ``--resume`` goes on with an interrupted run.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import pyro_vae as pv

OBJECTIVES: dict[str, Callable[[int], pv.Objective]] = {
    "wake-sleep": lambda _: pv.WakeSleep(),
    "reweighted-wake-sleep": lambda k: pv.ReweightedWakeSleep(num_particles=k),
    "vimco": lambda k: pv.VIMCO(num_particles=k),
}


def main() -> None:
    """Train, and score the test set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=OBJECTIVES, default="reweighted-wake-sleep")
    parser.add_argument("--num-particles", type=int, default=10, help="K of the objective")
    parser.add_argument("--latent-dims", type=int, nargs="+", default=[200], help="units of each layer, upwards")
    parser.add_argument("--num-samples", type=int, default=5_000_000, help="training samples to see")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of Adam")
    parser.add_argument("--score-particles", type=int, default=1000, help="importance samples per datum")
    parser.add_argument("--score-data", type=int, default=None, help="test data to score; all by default")
    parser.add_argument("--run-dir", type=Path, help="directory of the run")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a minute's version on embedded digits")
    args = parser.parse_args()

    data = pv.load_dataset("digits" if args.smoke else "binarized-mnist")
    if args.smoke:
        args.num_samples, args.latent_dims, args.score_particles = 5_000, [16], 100
    torch.manual_seed(args.seed)
    network = pv.SigmoidBeliefNetwork(tuple(data.train.shape[1:]), args.latent_dims)
    run = pv.fit(
        network,
        data,
        objective=OBJECTIVES[args.objective](args.num_particles),
        evaluate_with=pv.SGVB(),  # the lower bound, for all of them
        optimizer="adam",
        learning_rate=args.learning_rate,
        num_samples=args.num_samples,
        seed=args.seed,
        run_dir=args.run_dir,
        resume=args.resume,
    )
    print(run)
    scored = replace(data, test=data.test[: args.score_data])
    print(pv.log_marginal(network, scored, num_particles=args.score_particles))


if __name__ == "__main__":
    main()
