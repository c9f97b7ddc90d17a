"""Bayesian linear regression, where everything is known: the evidence, the posterior, and the best hyperparameters.

    python examples/bayesian_linear_regression.py                 a minute, on the yacht data
    python examples/bayesian_linear_regression.py --smoke         a few seconds, on simulated data

The weights are a global latent, w ~ N(0, a^2 I), and y_i ~ N(w . x_i, s^2). Then y ~ N(0, s^2 I + a^2 X X'), and the
posterior of w is Gaussian (Bishop 2006, Sec. 3.3): a guide that is a full-covariance Gaussian can be it, and the bound
then is the log evidence. Trained on minibatches; the exact numbers are printed beside those found. In the second part a
and s are parameters that the same bound learns (empirical Bayes), beside the maximum of the exact evidence.

The data are uci/yacht.npz in --root (or PYRO_VAE_DATA): "X" (308, 6) and "y". Without it they are simulated.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from scipy.optimize import minimize
from torch import Tensor

import pyro_vae as pv

PRIOR_SCALE, NOISE = 1.0, 0.5
# Learning rate, batch size and share of the epochs. Minibatches first; their noise would hide the last tenths of a nat.
STAGES = ((0.05, 100, 0.1), (0.01, None, 0.2), (0.002, None, 0.3), (0.0005, None, 0.4))


def load(root: str | None, smoke: bool) -> tuple[Tensor, Tensor]:
    """Targets (N,) and inputs (N, J), standardised, the last column ones."""
    path = Path(root or os.environ.get("PYRO_VAE_DATA", ".")) / "uci" / "yacht.npz"
    if smoke or not path.exists():
        generator = np.random.default_rng(0)
        x = generator.normal(size=(100, 3))
        y = x @ [1.0, -0.5, 0.2] + 0.5 * generator.normal(size=100)
    else:
        with np.load(path) as file:
            x, y = file["X"], file["y"].ravel()
    x, y = ((a - a.mean(0)) / a.std(0) for a in (x, y))
    return torch.from_numpy(y), torch.from_numpy(np.column_stack([x, np.ones(len(x))]))


def make_program(num_data: int, num_weights: int, learn: bool) -> pv.Program:
    """p(w) p(y | w, inputs), and a Gaussian of full covariance; ``learn`` makes a and s parameters."""

    def model(y: Tensor, inputs: Tensor) -> None:
        prior_scale, noise = torch.tensor(PRIOR_SCALE), torch.tensor(NOISE)
        if learn:
            prior_scale = pyro.param("prior_scale", prior_scale, constraint=dist.constraints.positive)
            noise = pyro.param("noise", noise, constraint=dist.constraints.positive)
        w = pyro.sample("w", dist.Normal(torch.zeros(num_weights), prior_scale).to_event(1))
        with pyro.plate("data", num_data, subsample=torch.arange(len(y))):
            pyro.sample("y", dist.Normal((w * inputs).sum(-1), noise), obs=y)

    return pv.Program(model, AutoMultivariateNormal(model, init_scale=0.1))


def log_evidence(y: Tensor, inputs: Tensor, prior_scale: float, noise: float) -> float:
    """The exact log p(y), in nats."""
    covariance = noise**2 * torch.eye(len(y)) + prior_scale**2 * inputs @ inputs.T
    return float(dist.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y))


def posterior(y: Tensor, inputs: Tensor, prior_scale: float, noise: float) -> tuple[Tensor, Tensor]:
    """The exact mean (J,) and covariance (J, J) of w."""
    covariance = torch.linalg.inv(torch.eye(inputs.shape[1]) / prior_scale**2 + inputs.T @ inputs / noise**2)
    return covariance @ inputs.T @ y / noise**2, covariance


def best_evidence(y: Tensor, inputs: Tensor) -> tuple[float, float, float]:
    """The greatest exact log evidence, and the (a, s) that has it."""

    def objective(logs: np.ndarray) -> float:
        prior_scale, noise = np.exp(logs)
        return -log_evidence(y, inputs, float(prior_scale), float(noise))

    found = minimize(objective, np.log([PRIOR_SCALE, NOISE]), method="Nelder-Mead", options={"xatol": 1e-8})
    prior_scale, noise = np.exp(found.x)
    return -float(found.fun), float(prior_scale), float(noise)


def train(program: pv.Program, data: tuple[Tensor, Tensor], epochs: int, seed: int) -> None:
    """AEVB on minibatches and then on all data, with a learning rate that falls."""
    for rate, batch_size, share in STAGES:
        pv.fit(
            program,
            data,
            objective=pv.SGVB(num_particles=16),
            optimizer="adam",
            learning_rate=rate,
            batch_size=batch_size or len(data[0]),
            epochs=max(1, int(share * epochs)),
            evaluate_every=10**9,
            seed=seed,
        )


def report(program: pv.Program, data: tuple[Tensor, Tensor], prior_scale: float, noise: float) -> dict[str, float]:
    """What was found beside what is exact, at given hyperparameters."""
    mean, covariance = posterior(*data, prior_scale, noise)
    bound = pv.evaluate_bound(program, data, pv.SGVB(1000), batch_size=len(data[0])).mean * len(data[0])
    score = pv.log_marginal(program, data, of="dataset", num_particles=20_000)
    with torch.no_grad():
        row = tuple(column[:1] for column in data)  # globals need no more
        w = pv.log_weights(program.model, program.guide, row, num_particles=100_000).latents["w"].flatten(0, -2)
    scale = covariance.diagonal().sqrt()
    return {
        "exact log evidence": log_evidence(*data, prior_scale, noise),
        "bound": bound,
        "importance sampling": score.mean,
        "its Monte Carlo error": score.mc_error,
        "its Pareto k": score.diagnostics["pareto_k"].item(),
        "largest error of a posterior mean, in standard deviations": float(((w.mean(0) - mean) / scale).abs().max()),
        "largest relative error of a standard deviation": float((w.std(0) / scale - 1).abs().max()),
        "largest error of a correlation": float((torch.corrcoef(w.T) - covariance / scale.outer(scale)).abs().max()),
    }


def main() -> None:
    """Both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder with uci/yacht.npz")
    parser.add_argument("--epochs", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the numbers, as JSON")
    parser.add_argument("--smoke", action="store_true", help="a few steps on simulated data")
    args = parser.parse_args()
    epochs = 50 if args.smoke else args.epochs
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(args.seed)
    data = load(args.root, args.smoke)
    num_data, num_weights = data[1].shape
    print(f"{num_data} data, {num_weights} weights; log p of all of them, in nats")
    table = {}

    fixed = make_program(num_data, num_weights, learn=False)
    train(fixed, data, epochs, args.seed)
    table["fixed"] = report(fixed, data, PRIOR_SCALE, NOISE)

    learned = make_program(num_data, num_weights, learn=True)
    train(learned, data, epochs, args.seed)
    prior_scale, noise = (float(learned.param(name)) for name in ("prior_scale", "noise"))
    best, best_scale, best_noise = best_evidence(*data)
    table["empirical Bayes"] = report(learned, data, prior_scale, noise) | {
        "prior scale": prior_scale,
        "noise": noise,
        "greatest exact log evidence": best,
        "its prior scale": best_scale,
        "its noise": best_noise,
    }
    for title, rows in table.items():
        print(f"\n{title}")
        for name, value in rows.items():
            print(f"  {name:58s} {value:12.4f}")
    if args.out is not None:
        args.out.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
