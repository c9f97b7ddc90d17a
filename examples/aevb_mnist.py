"""AEVB on MNIST with the settings of the paper's Figure 2 (arXiv:1312.6114): 784-500-20, tanh, Adagrad, M = 100, L = 1.

    python examples/aevb_mnist.py                                 1,000,000 samples: a few minutes on a CPU
    python examples/aevb_mnist.py --num-samples 10000000          the paper's 10^7
    python examples/aevb_mnist.py --smoke                         a few seconds, on the embedded digits

MNIST is downloaded to ~/.cache/pyro_vae unless --root (or PYRO_VAE_DATA) names a folder that has it. Stopped by Ctrl-C
or killed, the same command with --resume goes on.
"""

import argparse
from pathlib import Path

import torch

import pyro_vae as pv
from pyro_vae import plots


def main() -> None:
    """Train, score, and draw the learning curve and samples into the run directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder with the data")
    parser.add_argument("--num-samples", type=int, default=1_000_000, help="training samples to see")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/aevb_mnist"), help="where to store the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir")
    parser.add_argument("--smoke", action="store_true", help="a few steps on the embedded digits")
    args = parser.parse_args()

    data = pv.load_dataset("digits" if args.smoke else "mnist", root=args.root)
    torch.manual_seed(0)
    vae = pv.VAE(data_shape=data.train.shape[1:], latent_dim=20, hidden_dims=(500,), activation="tanh")
    run = pv.fit(
        vae,
        data,
        objective=pv.SGVB(num_particles=1, estimator="A"),
        optimizer="adagrad",
        learning_rate=0.02,
        batch_size=100,
        num_samples=2_000 if args.smoke else args.num_samples,
        run_dir=args.run_dir,
        resume=args.resume,
    )
    last = run.history[-1]
    print(f"test bound after {run.samples:,} samples: {last['test_bound']:.2f} ± {last['test_bound_se']:.2f} nats")
    few = data.test[:: max(1, len(data.test) // 1000)]
    print(pv.log_marginal(vae, few, num_particles=10 if args.smoke else 1000))

    figures = args.run_dir / "figures"
    figures.mkdir(exist_ok=True)
    plots.plot_learning_curves({"AEVB": run.history}).savefig(figures / "curves.png")
    plots.plot_samples(vae.sample(100, mean=True).numpy(), columns=10).savefig(figures / "samples.png")
    print(f"pictures in {figures}")


if __name__ == "__main__":
    main()
