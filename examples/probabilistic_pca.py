"""Five learning algorithms on one model whose maximum likelihood is known: probabilistic PCA.

    python examples/probabilistic_pca.py

The model is a linear decoder with isotropic noise, z of three dimensions, x of ten; the guide is linear too. Tipping &
Bishop (1999) give the maximum of its likelihood in closed form, from the eigenvalues of the sample covariance. What is
reported is how far below it each algorithm ends, in nats per datum, by the exact log p(x) of what it learned.
"""

import argparse
import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_vae as pv

DATA_DIM, LATENT_DIM, NUM_DATA = 10, 3, 1000
RATES = ((0.02, 2), (0.004, 4), (0.001, 4))  # learning rate, and one part in so many of the updates

OBJECTIVES: dict[str, pv.Objective] = {
    "AEVB": pv.SGVB(),
    "IWAE, K = 10": pv.IWAE(num_particles=10),
    "reweighted wake-sleep, K = 10": pv.ReweightedWakeSleep(num_particles=10),
    "Monte Carlo EM": pv.MCEM(),
    "wake-sleep": pv.WakeSleep(),
}


class LinearVAE(nn.Module):
    """p(x | z) = N(W z + b, s^2 I), and a guide N(A x + c, diag t^2)."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.encoder = nn.Linear(LATENT_DIM, DATA_DIM), nn.Linear(DATA_DIM, LATENT_DIM)
        self.log_noise, self.log_scale = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(LATENT_DIM))

    def model(self, x: Tensor) -> None:
        """p(x, z) of a minibatch x (M, 10)."""
        pyro.module("linear_vae", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT_DIM), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.log_noise.exp()).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x) of a minibatch x (M, 10)."""
        pyro.module("linear_vae", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), self.log_scale.exp()).to_event(1))

    @torch.no_grad()
    def exact_log_marginal(self, x: Tensor) -> float:
        """Mean of log p(x) over data, in nats."""
        twin = pv.LinearGaussian(self.decoder.weight, self.decoder.bias, self.log_noise.exp().item())
        return float(twin.log_marginal(x).mean())


def maximum_log_likelihood(x: Tensor) -> float:
    """Tipping & Bishop (1999), eqs. (4), (7) and (8): the mean log p(x) at the best W, b and s."""
    spectrum = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    noise = spectrum[LATENT_DIM:].mean()
    log_det = spectrum[:LATENT_DIM].log().sum() + (DATA_DIM - LATENT_DIM) * noise.log()
    return float(-0.5 * (DATA_DIM * math.log(2 * math.pi) + log_det + DATA_DIM))


def main() -> None:
    """Train by each objective with as many updates, and print its gap."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-updates", type=int, default=2000, help="of the parameters, on all data at once")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a few updates")
    args = parser.parse_args()
    updates, seeds = (40, 1) if args.smoke else (args.num_updates, args.seeds)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    weight, bias = torch.randn(DATA_DIM, LATENT_DIM), torch.randn(DATA_DIM)
    x = torch.randn(NUM_DATA, LATENT_DIM) @ weight.T + bias + 0.5 * torch.randn(NUM_DATA, DATA_DIM)
    best = maximum_log_likelihood(x)
    print(f"maximum log likelihood: {best:.4f} nats per datum")
    for name, objective in OBJECTIVES.items():
        gaps = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            vae = LinearVAE()
            per_pass = objective.num_updates if isinstance(objective, pv.MCEM) else 1
            for rate, share in RATES:
                epochs = updates // (share * per_pass)
                pv.fit(
                    vae,
                    x,
                    objective=objective,
                    optimizer="adam",
                    learning_rate=rate,
                    batch_size=NUM_DATA,
                    epochs=epochs,
                    evaluate_every=10**9,
                    seed=seed,
                )
            gaps.append(best - vae.exact_log_marginal(x))
        print(f"{name}: {', '.join(f'{gap:.4f}' for gap in gaps)} nats below the maximum", flush=True)


if __name__ == "__main__":
    main()
