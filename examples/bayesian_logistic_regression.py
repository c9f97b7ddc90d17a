"""Bayesian logistic regression: three automatic guides beside a long run of NUTS.

    python examples/bayesian_logistic_regression.py               some minutes, nearly all of them NUTS
    python examples/bayesian_logistic_regression.py --smoke       a few seconds

The weights are a global latent, w ~ N(0, I), and y_i ~ Bernoulli(sigmoid(w . x_i)): the Wisconsin breast cancer data of
scikit-learn, 569 tumours and 30 standardised measurements, many of them nearly collinear, and an intercept. Each guide
is trained on minibatches. Printed are its posterior means and standard deviations beside those of NUTS, with the Monte
Carlo error of NUTS, the bound, and log p of all data by importance sampling from the guide.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from sklearn.datasets import load_breast_cancer
from torch import Tensor

import pyro_vae as pv

RATES = ((0.02, 0.4), (0.005, 0.3), (0.001, 0.3))  # learning rate, and the share of the epochs

# A guide of the model, and a factor on the learning rate: flows do not bear 0.02 for long.
GUIDES: dict[str, tuple[Callable[[Any], Any], float]] = {
    "AutoNormal": (lambda model: AutoNormal(model, init_scale=0.1), 1.0),
    "AutoMultivariateNormal": (lambda model: AutoMultivariateNormal(model, init_scale=0.1), 1.0),
    "AutoIAFNormal": (lambda model: AutoIAFNormal(model, hidden_dim=[128], num_transforms=2), 0.25),
}


def load(num_features: int) -> tuple[Tensor, Tensor]:
    """Labels (N,) and inputs (N, J), standardised, the last column ones."""
    x, y = load_breast_cancer(return_X_y=True)
    inputs = torch.from_numpy((x - x.mean(0)) / x.std(0))[:, :num_features]
    return torch.from_numpy(y).double(), torch.cat([inputs, torch.ones(len(inputs), 1)], 1)


def make_model(num_data: int, num_weights: int) -> Callable[[Tensor, Tensor], None]:
    """p(w) p(y | w, inputs)."""

    def model(y: Tensor, inputs: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(num_weights), 1.0).to_event(1))
        with pyro.plate("data", num_data, subsample=torch.arange(len(y))):
            pyro.sample("y", dist.Bernoulli(logits=(w * inputs).sum(-1)), obs=y)

    return model


def by_nuts(model: Any, data: tuple[Tensor, Tensor], num_samples: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Draws of w (S, J) by one chain, after a fifth as many of warm-up; effective sample sizes and split R-hat."""
    pyro.set_rng_seed(seed)
    chain = MCMC(NUTS(model), num_samples=num_samples, warmup_steps=max(10, num_samples // 5), disable_progbar=True)
    chain.run(*data)
    return chain.get_samples()["w"], chain.diagnostics()["w"]


def train(program: pv.Program, data: tuple[Tensor, Tensor], epochs: int, seed: int, factor: float) -> None:
    """AEVB on minibatches, with a learning rate that falls."""
    for rate, share in RATES:
        pv.fit(
            program,
            data,
            objective=pv.SGVB(num_particles=8),
            optimizer="adam",
            learning_rate=factor * rate,
            batch_size=100,
            epochs=max(1, int(share * epochs)),
            evaluate_every=10**9,
            seed=seed,
        )


@torch.no_grad()
def draws_of(program: pv.Program, data: tuple[Tensor, Tensor], num_draws: int) -> Tensor:
    """Draws of w from the guide, (K, J): one row of the data is enough for globals."""
    row = tuple(column[:1] for column in data)
    return pv.log_weights(program.model, program.guide, row, num_particles=num_draws).latents["w"].flatten(0, -2)


def main() -> None:
    """NUTS, then each guide beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nuts-samples", type=int, default=10_000, help="draws after warm-up")
    parser.add_argument("--epochs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the numbers, as JSON")
    parser.add_argument("--smoke", action="store_true", help="four measurements, a few steps")
    args = parser.parse_args()
    samples, epochs, features, particles = (
        (50, 4, 4, 100) if args.smoke else (args.nuts_samples, args.epochs, 30, 10_000)
    )
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(args.seed)
    data = load(features)
    model = make_model(*data[1].shape)

    started = time.perf_counter()
    draws, diagnostics = by_nuts(model, data, samples, args.seed)
    mean, sd, effective = draws.mean(0), draws.std(0), diagnostics["n_eff"]
    seconds = time.perf_counter() - started
    print(f"NUTS: {samples} draws in {seconds:.0f} s, least effective sample size {effective.min():.0f}, ", end="")
    print(f"largest R-hat {diagnostics['r_hat'].max():.4f}", flush=True)
    table: dict[str, Any] = {
        "NUTS": {
            "mean": mean.tolist(),
            "sd": sd.tolist(),
            "error of the mean": (sd / effective.sqrt()).tolist(),
            "r_hat": diagnostics["r_hat"].tolist(),
            "seconds": seconds,
        }
    }
    for name, (make, factor) in GUIDES.items():
        torch.manual_seed(args.seed)
        started = time.perf_counter()
        program = pv.Program(model, make(model))
        train(program, data, epochs, args.seed, factor)
        seconds = time.perf_counter() - started
        w = draws_of(program, data, 20_000)
        bound = pv.evaluate_bound(program, data, pv.SGVB(particles // 10), batch_size=len(data[0])).mean * len(data[0])
        score = pv.log_marginal(program, data, of="dataset", num_particles=particles)
        off, ratio = (w.mean(0) - mean) / sd, w.std(0) / sd
        print(
            f"{name}: bound {bound:.2f} nats; log p(y) {score.mean:.2f} ± {score.mc_error:.2f} (ESS "
            f"{score.diagnostics['ess'].item():.0f} of {particles}); means off by {off.abs().max():.2f} posterior "
            f"sds at most, {off.square().mean().sqrt():.2f} rms; sds {ratio.min():.2f} to {ratio.max():.2f} of NUTS's; "
            f"{seconds:.0f} s",
            flush=True,
        )
        table[name] = {
            "mean": w.mean(0).tolist(),
            "sd": w.std(0).tolist(),
            "bound": bound,
            "log p": score.mean,
            "mc_error": score.mc_error,
            "ess": score.diagnostics["ess"].item(),
            "seconds": seconds,
        }
    if args.out is not None:
        args.out.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
