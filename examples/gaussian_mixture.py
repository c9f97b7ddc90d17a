"""A Bayesian mixture of Gaussians, its guide beside a long run of NUTS.

    python examples/gaussian_mixture.py                 some minutes, nearly all of them NUTS
    python examples/gaussian_mixture.py --smoke         a few seconds

The data are the first two principal components of the 13 measurements of 178 Italian wines from three growers
(scikit-learn's wine data), standardised. Weights, means and scales of the three components are global latents, labels
are summed out. Both guides and NUTS begin at the clusters of k-means and so stay in one of the 3! equal modes;
components are in ascending order of their means' first coordinate. Printed are posterior means and standard
deviations, the bound, log p(X) of all data by importance sampling with log 3! added for the modes that the guide does
not cover, and how well the components agree with the growers, of whom the model knows nothing.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_value
from sklearn.datasets import load_wine
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

import pyro_vae as pv

NUM_COMPONENTS = 3
RATES = ((0.02, 0.4), (0.005, 0.3), (0.001, 0.3))  # learning rate, and the share of the epochs


def load() -> tuple[Tensor, Tensor]:
    """Data (178, 2), standardised, and growers (178,)."""
    measurements, growers = load_wine(return_X_y=True)
    standard = (measurements - measurements.mean(0)) / measurements.std(0)
    x = PCA(2, random_state=0).fit_transform(standard)
    return torch.from_numpy(x / x.std(0)), torch.from_numpy(growers)


def flat(draws: dict[str, Tensor]) -> Tensor:
    """Draws side by side, (S, 15): weights, means, scales."""
    return torch.cat([draws[name].reshape(len(draws[name]), -1) for name in ("weights", "means", "scales")], 1)


def names_of(num_components: int) -> list[str]:
    """What the columns of :func:`flat` are."""
    pairs = [f"{c}, {d}" for c in range(1, num_components + 1) for d in (1, 2)]
    return [f"weight {c + 1}" for c in range(num_components)] + [f"{n} {p}" for n in ("mean", "scale") for p in pairs]


def by_nuts(mixture: pv.GaussianMixture, x: Tensor, num_samples: int, seed: int) -> dict[str, Any]:
    """One chain, begun at the guide's medians, after a quarter as many draws of warm-up."""
    pyro.set_rng_seed(seed)
    begin = {name: pair[0] for name, pair in mixture.summary().items()}
    kernel = NUTS(mixture.model, init_strategy=init_to_value(values=begin))
    chain = MCMC(kernel, num_samples=num_samples, warmup_steps=max(10, num_samples // 4), disable_progbar=True)
    started = time.perf_counter()
    chain.run(x)
    draws = flat(chain.get_samples())
    effective = pyro.ops.stats.effective_sample_size(draws.unsqueeze(0), chain_dim=0, sample_dim=1)
    return {
        "mean": draws.mean(0).tolist(),
        "sd": draws.std(0).tolist(),
        "error of the mean": (draws.std(0) / effective.sqrt()).tolist(),
        "r_hat": float(pyro.ops.stats.split_gelman_rubin(draws.unsqueeze(0), chain_dim=0, sample_dim=1).max()),
        "seconds": time.perf_counter() - started,
    }


def train(x: Tensor, posterior: str, epochs: int, seed: int) -> pv.GaussianMixture:
    """AEVB on minibatches from the clusters of k-means, with a learning rate that falls."""
    torch.manual_seed(seed)
    mixture = pv.GaussianMixture(2, NUM_COMPONENTS, posterior=posterior, num_data=len(x))
    mixture.initialize(x)
    for rate, share in RATES:
        pv.fit(
            mixture,
            x,
            objective=pv.SGVB(num_particles=8),
            optimizer="adam",
            learning_rate=rate,
            batch_size=60,
            epochs=max(1, int(share * epochs)),
            evaluate_every=10**9,
            seed=seed,
        )
    return mixture


def main() -> None:
    """Both guides, then NUTS."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nuts-samples", type=int, default=2_000, help="draws after warm-up")
    parser.add_argument("--epochs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the numbers, as JSON")
    parser.add_argument("--smoke", action="store_true", help="a few steps and draws")
    args = parser.parse_args()
    samples, epochs, particles = (20, 4, 100) if args.smoke else (args.nuts_samples, args.epochs, 10_000)
    torch.set_default_dtype(torch.float64)
    x, growers = load()
    table: dict[str, Any] = {}
    for posterior in ("mean-field", "full"):
        mixture = train(x, posterior, epochs, args.seed)
        draws = flat(mixture.draw(20_000))
        bound = pv.evaluate_bound(mixture, x, pv.SGVB(particles // 10), batch_size=len(x)).mean * len(x)
        score = pv.log_marginal(mixture, x, of="dataset", num_particles=particles)
        log_p = score.mean + math.log(math.factorial(NUM_COMPONENTS))
        labels = mixture.responsibilities(x).argmax(1)
        table[posterior] = {
            "mean": draws.mean(0).tolist(),
            "sd": draws.std(0).tolist(),
            "bound": bound,
            "log p": log_p,
            "mc_error": score.mc_error,
            "ess": score.diagnostics["ess"].item(),
            "adjusted Rand index": float(adjusted_rand_score(growers, labels)),
        }
        print(
            f"{posterior}: bound {bound:.2f} nats; log p(X) {log_p:.2f} ± {score.mc_error:.2f}, log 3! included (ESS "
            f"{table[posterior]['ess']:.0f} of {particles}); adjusted Rand index against the growers "
            f"{table[posterior]['adjusted Rand index']:.3f}",
            flush=True,
        )
    table["NUTS"] = found = by_nuts(mixture, x, samples, args.seed)
    print(f"NUTS: {samples} draws in {found['seconds']:.0f} s, largest R-hat {found['r_hat']:.4f}\n")
    print(f"{'posterior mean (sd)':20s} {'mean field':>16s} {'full covariance':>16s} {'NUTS':>16s}   error")
    for i, name in enumerate(names_of(NUM_COMPONENTS)):
        cells = [f"{table[by]['mean'][i]:7.3f} ({table[by]['sd'][i]:.3f})" for by in ("mean-field", "full", "NUTS")]
        print(f"{name:20s} {' '.join(f'{cell:>16s}' for cell in cells)}  {found['error of the mean'][i]:.4f}")
    if args.out is not None:
        args.out.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
