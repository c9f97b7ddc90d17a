"""The VampPrior against the standard prior, by the settings of Tomczak & Welling (arXiv:1705.07120, Sec. 5.2).

    python examples/vamp_prior.py --prior vamp --out runs/vamp
    python examples/vamp_prior.py --prior standard --out runs/standard

Encoder and decoder have two hidden layers of 300 gated units each, modules of this script; z has 40 dimensions and the
VampPrior 500 pseudo-inputs. Adam at 0.0005 on batches of 100, the KL term's weight raised from 0 to 1 over 100 passes,
and an end where the bound of validation images has not grown for 50. Then log p(x) of test images by importance
sampling. --beginning data has the pseudo-inputs begin at training images ("VampPrior data" is where they stay there).
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.models.priors import VampPrior, as_prior


class Gated(nn.Module):
    """A layer with a gate on each unit: (A x + a) * sigmoid(B x + b)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, 2 * out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Of (..., in_dim), (..., out_dim)."""
        return nn.functional.glu(self.linear(x))


def gated(in_dim: int, hidden: int, out_dim: int) -> nn.Module:
    """A network of two gated layers, linear at its end."""
    return nn.Sequential(Gated(in_dim, hidden), Gated(hidden, hidden), nn.Linear(hidden, out_dim))


def main() -> None:
    """Train, score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="binarized-mnist")
    parser.add_argument("--prior", choices=("standard", "mixture", "vamp", "flow"), default="vamp")
    parser.add_argument("--num-components", type=int, default=500, help="pseudo-inputs, or components of the mixture")
    parser.add_argument("--beginning", choices=("random", "data"), default="random", help="of the pseudo-inputs")
    parser.add_argument("--latent-dim", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=300)
    parser.add_argument("--warmup", type=int, default=100, help="passes until the KL term has its full weight")
    parser.add_argument("--patience", type=int, default=50, help="passes without a better validation bound")
    parser.add_argument("--epochs", type=int, default=2000, help="at most")
    parser.add_argument("--num-test", type=int, default=10_000, help="test images that are scored")
    parser.add_argument("--num-particles", type=int, default=5000, help="K of the score")
    parser.add_argument("--out", type=Path, default=Path("runs/vamp-prior"), help="folder of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="8 x 8 digits, two passes")
    args = parser.parse_args()
    if args.smoke:
        args.dataset, args.num_components, args.latent_dim, args.hidden = "digits", 5, 2, 8
        args.warmup, args.epochs, args.num_test, args.num_particles = 1, 2, 20, 10
    data = pv.load_dataset(args.dataset)
    shape, num_pixels = tuple(data.train.shape[1:]), data.train[0].numel()
    torch.manual_seed(args.seed)
    encoder = nn.Sequential(nn.Flatten(), gated(num_pixels, args.hidden, 2 * args.latent_dim))
    decoder = gated(args.latent_dim, args.hidden, num_pixels)
    name = f"{args.prior}:{args.num_components}" if args.prior in ("mixture", "vamp") else args.prior
    prior = as_prior(name, args.latent_dim, shape)
    if isinstance(prior, VampPrior) and args.beginning == "data":
        prior.begin_at(data.train)
    vae = pv.VAE(shape, args.latent_dim, network=(encoder, decoder), prior=prior)
    run = pv.fit(
        vae,
        data,
        optimizer="adam",
        learning_rate=5e-4,
        batch_size=100,
        epochs=args.epochs,
        kl_warmup=args.warmup * len(data.train) or None,
        valid=data.valid,
        patience=args.patience,
        evaluate_every=len(data.train),
        seed=args.seed,
        run_dir=args.out,
        resume=True,
    )
    test = data.with_test("test", args.num_test)
    bound = pv.evaluate_bound(vae, test)
    log_p = pv.log_marginal(vae, test, num_particles=args.num_particles)
    active = int(pv.evaluation.active_units(vae, test).active["z"].sum())
    passes = run.kept["samples"] / len(data.train)
    found = {"passes": passes, "bound": bound.mean, "bound_se": bound.std_error, "active": active}
    found |= {"log_p": log_p.mean, "log_p_se": log_p.std_error, "log_p_mc_error": log_p.mc_error}
    (args.out / "scores.json").write_text(json.dumps(vars(args) | found, default=str, indent=1))
    print(f"{args.prior} prior, the weights after {passes:.0f} passes, {len(log_p.values)} test images:")
    print(f"  log p(x) {log_p.mean:.2f} nats (standard error {log_p.std_error:.2f}), bound {bound.mean:.2f}")
    print(f"  active latents: {active} of {args.latent_dim}")


if __name__ == "__main__":
    main()
