"""Bayesian matrix factorisation of digits of which half the pixels are hidden, beside a Gibbs sampler.

    python examples/matrix_factorization.py                 a few minutes
    python examples/matrix_factorization.py --smoke         a few seconds

Rows are 1,797 images of 8 x 8 digits (scikit-learn's), columns their 64 pixels, standardised by one mean and one
standard deviation. A rating is one entry, given by its row and its column (Salakhutdinov & Mnih, *Bayesian
probabilistic matrix factorization using Markov chain Monte Carlo*, 2008, with fixed hyperparameters):

    u_i ~ N(0, I),  v_j ~ N(0, t^2 I),  b_j ~ N(0, 1),      x_ij ~ N(u_i . v_j + b_j, s^2)

Rows and columns are global latents with a Gaussian guide that factorises over all of them, and the entries are what is
in the data plate: half of them, chosen at random, are observed, in minibatches; the others are predicted. t and s are
learned by the same bound. The Gibbs sampler, given this t and s, draws from the exact posterior. Predictions are
posterior means; beside them stand each column's mean and the maximum a posteriori, found by alternating least squares.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from sklearn.datasets import load_digits
from torch import Tensor

import pyro_vae as pv

RATES = ((0.02, 0.5), (0.005, 0.3), (0.001, 0.2))  # learning rate, and the share of the epochs

Entries = tuple[Tensor, Tensor, Tensor]


def load(num_rows: int | None, seed: int) -> tuple[Entries, Entries]:
    """Observed and hidden entries: values (N,), rows (N,) and columns (N,)."""
    x = torch.from_numpy(load_digits().data[:num_rows])
    x = (x - x.mean()) / x.std()
    observed = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return entries_of(x, observed), entries_of(x, ~observed)


def entries_of(x: Tensor, chosen: Tensor) -> Entries:
    """The chosen entries of a matrix: values, rows and columns."""
    row, column = chosen.nonzero().unbind(1)
    return x[chosen], row, column


def make_program(num_data: int, num_rows: int, num_columns: int, rank: int) -> pv.Program:
    """P(u, v, b) p(x | u, v, b, row, column), and a guide that factorises."""

    def model(x: Tensor, row: Tensor, column: Tensor) -> None:
        scale = pyro.param("column_scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        noise = pyro.param("noise", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("rows", num_rows):
            u = pyro.sample("u", dist.Normal(torch.zeros(rank), 1.0).to_event(1))
        with pyro.plate("columns", num_columns):
            v = pyro.sample("v", dist.Normal(torch.zeros(rank), scale).to_event(1))
            b = pyro.sample("b", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("data", num_data, subsample=torch.arange(len(x))):
            mean = (u[..., row, :] * v[..., column, :]).sum(-1) + b[..., column]
            pyro.sample("x", dist.Normal(mean, noise), obs=x)

    # Near zero, where predictions begin at the offsets, but not at it, where no gradient tells one factor from another.
    begin = {"u": 0.3 * torch.randn(num_rows, rank), "v": 0.3 * torch.randn(num_columns, rank)}
    guide = AutoNormal(model, init_loc_fn=init_to_value(values=begin), init_scale=0.1)
    return pv.Program(model, guide)


def predict(u: Tensor, v: Tensor, b: Tensor, entries: Entries) -> Tensor:
    """U_i . v_j + b_j at the entries, (N,)."""
    _, row, column = entries
    return (u[row] * v[column]).sum(-1) + b[column]


def rmse(prediction: Tensor, entries: Entries) -> float:
    """Root mean squared error."""
    return float((prediction - entries[0]).square().mean().sqrt())


class Alternating:
    """The Gaussian conditionals of rows given columns, and of columns with their offsets given rows."""

    def __init__(self, entries: Entries, shape: tuple[int, int], column_scale: float, noise: float) -> None:
        x, row, column = entries
        self.mask, self.values = torch.zeros(shape), torch.zeros(shape)
        self.mask[row, column], self.values[row, column] = 1.0, x
        self.column_scale, self.noise = column_scale, noise

    def rows(self, v: Tensor, b: Tensor, draw: bool) -> Tensor:
        """U (n, r) given v (m, r) and b (m,): a draw, or the mean."""
        centred = self.mask * (self.values - b)
        return self._solve(v, self.mask, centred, torch.ones(v.shape[1]), draw)

    def columns(self, u: Tensor, draw: bool) -> tuple[Tensor, Tensor]:
        """V (m, r) and b (m,) given u (n, r): the offset is the weight of one more factor that is always 1."""
        factors = torch.cat([u, torch.ones(len(u), 1)], 1)
        precision = torch.cat([torch.full((u.shape[1],), self.column_scale**-2), torch.ones(1)])
        both = self._solve(factors, self.mask.T, self.values.T, precision, draw)
        return both[:, :-1], both[:, -1]

    def _solve(self, factors: Tensor, mask: Tensor, values: Tensor, prior_precision: Tensor, draw: bool) -> Tensor:
        r = factors.shape[1]
        outer = (factors.unsqueeze(2) * factors.unsqueeze(1)).flatten(1)
        precision = (mask @ outer).reshape(-1, r, r) / self.noise**2 + prior_precision.diag()
        root = torch.linalg.cholesky(precision)
        mean = torch.cholesky_solve((values @ factors / self.noise**2).unsqueeze(-1), root)
        if draw:
            mean = mean + torch.linalg.solve_triangular(root.mT, torch.randn_like(mean), upper=True)
        return mean.squeeze(-1)


def by_gibbs(steps: Alternating, begin: Tensor, hidden: Entries, num_sweeps: int) -> tuple[Tensor, float]:
    """Posterior mean of the hidden entries, and their mean log predictive density in nats, after a fifth of warm-up."""
    u, total, density, kept = begin, torch.zeros(len(hidden[0])), [], 0
    for sweep in range(num_sweeps):
        v, b = steps.columns(u, draw=True)
        u = steps.rows(v, b, draw=True)
        if sweep >= num_sweeps // 5:
            prediction = predict(u, v, b, hidden)
            total, kept = total + prediction, kept + 1
            density.append(dist.Normal(prediction, steps.noise).log_prob(hidden[0]))
    return total / kept, float((torch.stack(density).logsumexp(0) - math.log(kept)).mean())


def by_maximum(steps: Alternating, begin: Tensor, num_sweeps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Alternating least squares: the maximum a posteriori that it reaches."""
    u = begin
    for _ in range(num_sweeps):
        v, b = steps.columns(u, draw=False)
        u = steps.rows(v, b, draw=False)
    return u, v, b


def train(program: pv.Program, data: Entries, epochs: int, seed: int) -> float:
    """AEVB on minibatches of entries, with a learning rate that falls; the bound, in nats per observed entry."""
    for rate, share in RATES:
        run = pv.fit(
            program,
            data,
            objective=pv.SGVB(),
            optimizer="adam",
            learning_rate=rate,
            batch_size=1000,
            epochs=max(1, int(share * epochs)),
            evaluate_every=10**9,
            seed=seed,
        )
    return float(run.history[-1]["train_bound"])


def main() -> None:
    """AEVB, then the baselines at its hyperparameters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--sweeps", type=int, default=300, help="of the Gibbs sampler and of least squares")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the numbers, as JSON")
    parser.add_argument("--smoke", action="store_true", help="few images, a few steps")
    args = parser.parse_args()
    epochs, sweeps, num_rows = (5, 20, 100) if args.smoke else (args.epochs, args.sweeps, None)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(args.seed)
    seen, hidden = load(num_rows, args.seed)
    shape = (int(seen[1].max()) + 1, 64)
    print(f"{len(seen[0]):,} entries observed and {len(hidden[0]):,} hidden of a {shape[0]} x {shape[1]} matrix")

    program = make_program(len(seen[0]), *shape, args.rank)
    started = time.perf_counter()
    bound = train(program, seen, epochs, args.seed)
    seconds = time.perf_counter() - started
    guide: Any = program.functions["guide"]
    with torch.no_grad():
        u, v, b = (guide.median(*seen)[name] for name in ("u", "v", "b"))  # Gaussian: also the means
        score = pv.log_marginal(program, hidden, num_particles=100)
    scale, noise = float(program.param("column_scale")), float(program.param("noise"))

    steps = Alternating(seen, shape, scale, noise)
    mean, density = by_gibbs(steps, u, hidden, sweeps)
    sums, counts = torch.zeros(64).index_add(0, seen[2], seen[0]), torch.bincount(seen[2], minlength=64)
    table = {
        "column means": {"rmse": rmse((sums / counts)[hidden[2]], hidden)},
        "maximum a posteriori": {"rmse": rmse(predict(*by_maximum(steps, u, sweeps), hidden), hidden)},
        "AEVB": {"rmse": rmse(predict(u, v, b, hidden), hidden), "log predictive": score.mean},
        "Gibbs": {"rmse": rmse(mean, hidden), "log predictive": density},
    }
    print(f"AEVB: {seconds:.0f} s, bound {bound:.4f} nats per observed entry, t = {scale:.3f}, s = {noise:.3f}\n")
    for name, row in table.items():
        more = f"  log predictive density {row['log predictive']:.4f} nats" if "log predictive" in row else ""
        print(f"{name:22s} error of hidden entries {row['rmse']:.4f}{more}")
    if args.out is not None:
        found = table | {"settings": {"bound": bound, "column scale": scale, "noise": noise, "seconds": seconds}}
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
