"""The deep Markov model on polyphonic music, at the sizes of its paper (Krishnan, Shalit & Sontag, arXiv:1609.09869).

    python examples/deep_markov_model.py --out runs/dmm

A piano roll of 88 keys is a sequence, z_t of 100 dimensions, transition 200, emission 100, recurrent network 600. It is
trained by estimator B, whose KL divergences are in closed form step by step, with the KL term's weight raised from 0,
Adam with clipped gradients and decaying weights, and kept where the bound of the validation sequences was best. Then
the test sequences are scored: the bound, importance sampling with K draws from the guide, and a particle filter with
the guide as proposal; in nats per time step, that is summed over all sequences and divided by the number of all steps.
A run that was stopped goes on where it was; --start begins another one, with other settings, where one has ended.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import torch

import pyro_vae as pv


def score(run: pv.Run, data: pv.Dataset, num_particles: int) -> dict[str, Any]:
    """Nats per time step of the test sequences, by each scorer."""
    bound = pv.evaluate_bound(run.program, data, pv.SGVB(num_particles=10, estimator="B"), trim_padding=True)
    found: dict[str, Any] = {"test_bound": bound.per_step}
    for method in ("importance", "smc"):
        result = pv.log_marginal(run.program, data, method=method, num_particles=num_particles, trim_padding=True)
        assert result.per_step is not None
        found[method], found[f"{method}_se"] = result.per_step
        found[f"{method}_ess"] = result.diagnostics["ess"].median().item()
    return found


def main() -> None:
    """Train, score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="jsb-chorales", help="or nottingham, piano-midi, musedata")
    parser.add_argument("--out", type=Path, default=Path("runs/deep-markov-model"), help="folder of the run")
    parser.add_argument("--guide", default="st-r", help="st-r, st-l, st-lr, mf-lr or mf-r")
    parser.add_argument("--cell", default="tanh", help="of the recurrent network: tanh, relu, gru or lstm")
    parser.add_argument("--epochs", type=int, default=1500)
    parser.add_argument("--patience", type=int, default=40, help="evaluations without a better validation bound")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=8e-4, help="of Adam")
    parser.add_argument("--decay", type=float, default=1.0, help="by what the rate is multiplied after each epoch")
    parser.add_argument("--ema", type=float, default=0.99, help="decay of the average of the weights that is kept")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="added to the gradient, times the weights")
    parser.add_argument("--max-grad-norm", type=float, default=200.0, help="clip the gradient to this")
    parser.add_argument("--warmup", type=int, default=100, help="epochs until the KL term has its full weight")
    parser.add_argument("--num-particles", type=int, default=500, help="K of the scorers")
    parser.add_argument("--start", type=Path, help="a run of the same model, with whose weights to begin")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a small model, two epochs")
    args = parser.parse_args()
    sizes: dict[str, int] = {}
    if args.smoke:
        sizes = {"latent_dim": 4, "transition_dim": 8, "emission_dim": 8, "rnn_dim": 16}
        args.epochs, args.warmup, args.num_particles, args.dataset = 2, 1, 5, "bouncing-balls"
    data = pv.load_dataset(args.dataset)
    torch.manual_seed(args.seed)
    dmm = pv.DeepMarkovModel(data.train.shape[-1], guide=args.guide, cell=args.cell, **sizes)
    if args.start is not None:
        pv.load_run(args.start, dmm)
    run = pv.fit(
        dmm,
        data,
        objective=pv.SGVB(estimator="B"),
        optimizer=functools.partial(
            torch.optim.Adam, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
        ),
        learning_rate_schedule=args.decay,
        ema_decay=args.ema,
        batch_size=args.batch_size,
        epochs=args.epochs,
        kl_warmup=args.warmup * len(data.train) or None,
        max_grad_norm=args.max_grad_norm,
        trim_padding=True,
        evaluate_every=10 * len(data.train),
        valid=(data.valid, data.valid_lengths),
        patience=args.patience,
        seed=args.seed,
        run_dir=args.out,
        resume=True,
    )
    found = score(run, data, args.num_particles)
    print(f"{run.samples // len(data.train)} epochs; nats per time step of {args.dataset}'s test sequences:")
    print("  " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    (args.out / "score.json").write_text(json.dumps(vars(args) | found, default=str, indent=1))


if __name__ == "__main__":
    main()
