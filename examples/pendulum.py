"""A pendulum's angle from noisy observations of its position, and forecasts of where it will be.

    python examples/pendulum.py --out runs/pendulum

Simulated pendulums are let go at up to 135 degrees to either side and kicked at random; sine and cosine of the angle
are observed with noise of standard deviation 0.1, ten times a second. A deep Markov model is trained on them that knows
nothing of pendulums.
On test sequences: how far the angle is off, read off a single observation and off the smoothed latents; and how often
forecasts' 90 % intervals hold what was observed later.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import pyro_vae as pv


def angle_errors(dmm: pv.DeepMarkovModel, x: Tensor, angle: Tensor, num_samples: int) -> dict[str, float]:
    """Root mean square errors of the angle, in degrees."""
    smoothed = dmm.decode(dmm.smooth(x, num_samples=num_samples)).mean.mean(0)
    found = {"of an observation": x, "of the smoothed latents": smoothed}
    return {f"angle_error {name}": _degrees(_angle(value) - angle) for name, value in found.items()}


def _angle(x: Tensor) -> Tensor:
    return torch.atan2(x[..., 0], x[..., 1])


def _degrees(difference: Tensor) -> float:
    turned = torch.atan2(difference.sin(), difference.cos())  # the shorter way round
    return torch.rad2deg(turned.square().mean().sqrt()).item()


def coverage(draws: Tensor, x: Tensor) -> dict[str, Any]:
    """How often 90 % intervals hold what was observed, in all, by half of the horizon, and their mean width."""
    low, high = draws.quantile(torch.tensor([0.05, 0.95]).to(draws), 0)
    inside = ((x >= low) & (x <= high)).double()
    per_sequence, half = inside.mean((1, 2)), x.shape[1] // 2
    return {
        "coverage": inside.mean().item(),
        "coverage_se": (per_sequence.std() / len(x) ** 0.5).item(),
        "coverage_first_half": inside[:, :half].mean().item(),
        "coverage_second_half": inside[:, half:].mean().item(),
        "width": (high - low).mean().item(),
    }


def draw(x: Tensor, draws: Tensor, start: int, rows: int = 3) -> Figure:
    """Fan charts of some sequences' first value, the sine of the angle."""
    figure = Figure(figsize=(8, 2 * rows), layout="constrained")
    for row, axes in enumerate(figure.subplots(rows, sharex=True)):
        steps = torch.arange(x.shape[1])
        axes.plot(steps, x[row, :, 0], "k.", ms=3, label="observed")
        for low, high, shade in ((0.05, 0.95, 0.2), (0.25, 0.75, 0.4)):
            edges = draws[:, row, :, 0].quantile(torch.tensor([low, high]).to(draws), 0)
            axes.fill_between(steps[start:], *edges, alpha=shade, color="C0", lw=0, label=f"{high - low:.0%} interval")
        axes.plot(steps[start:], draws[:, row, :, 0].median(0).values, color="C0", label="median")
        axes.set_ylabel("sin(angle)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=4)
    figure.axes[-1].set_xlabel("step, a tenth of a second")
    return figure


def main() -> None:
    """Train, smooth, forecast and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pendulum"), help="folder of the run and the figure")
    parser.add_argument("--num-sequences", type=int, default=5000, help="a tenth of them to test")
    parser.add_argument("--process-noise", type=float, default=0.5, help="of what kicks the velocity, in 1 / s^(3/2)")
    parser.add_argument("--iwae", type=int, default=0, metavar="K", help="train by the bound of K draws, not by SGVB")
    parser.add_argument("--start", type=int, default=30, help="step from which to forecast, of 50")
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of Adam")
    parser.add_argument("--num-particles", type=int, default=1000, help="of the filter before the forecast")
    parser.add_argument("--num-samples", type=int, default=500, help="draws")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="few sequences, two epochs")
    args = parser.parse_args()
    if args.smoke:
        args.num_sequences, args.epochs, args.num_particles, args.num_samples = 40, 2, 20, 20
    data = pv.pendulum(args.num_sequences, process_noise=args.process_noise)
    torch.manual_seed(args.seed)
    dmm = pv.DeepMarkovModel(
        2, latent_dim=4, transition_dim=64, emission_dim=32, rnn_dim=64, emission="gaussian", cell="gru"
    )
    run = pv.fit(
        dmm,
        data,
        objective=pv.IWAE(num_particles=args.iwae) if args.iwae else pv.SGVB(estimator="B"),
        optimizer=functools.partial(torch.optim.Adam, lr=args.learning_rate, fused=True),
        batch_size=50,
        epochs=args.epochs,
        kl_warmup=None if args.iwae else 5 * len(data.train),
        max_grad_norm=100.0,
        evaluate_every=5 * len(data.train),
        seed=args.seed,
        run_dir=args.out,
        resume=True,
    )
    x, states = data.test, data.test_states
    assert states is not None
    found: dict[str, Any] = dict(angle_errors(dmm, x, states[..., 0], args.num_samples))
    horizon = x.shape[1] - args.start
    options = {"num_samples": args.num_samples, "num_particles": args.num_particles}
    draws = dmm.forecast(x[:, : args.start], horizon, **options)
    found |= coverage(draws, x[:, args.start :])
    print(f"bound on log p(x) of the test sequences: {run.history[-1]['test_bound_per_step']:.3f} nats per step")
    print("\n".join(f"{name}: {value:.3f}" for name, value in found.items()))
    draw(x, draws, args.start).savefig(args.out / "forecast.png", dpi=120)
    (args.out / "pendulum.json").write_text(json.dumps(vars(args) | found, default=str, indent=1))


if __name__ == "__main__":
    main()
