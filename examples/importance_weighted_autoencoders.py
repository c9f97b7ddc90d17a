"""One and two layers of latents by the schedule of Burda, Grosse & Salakhutdinov (arXiv:1509.00519, Sec. 5).

    python examples/importance_weighted_autoencoders.py --layers 1 --objective iwae -k 50 --stages 4 --out runs/iwae-50

Stage i = 0, ..., 7 goes 3^i times through the training images, at a learning rate of 0.001 * 10^(-i / 7): 3,280 passes
in all, by Adam on batches of 20. One layer: x - 200 - 200 - z of 50; two: x - 200 - 200 - z_1 of 100 - 100 - 100 - z_2
of 50, tanh, a bottom-up guide. The output's biases begin at the logits of the mean training image. Fewer stages are the
beginning of the whole schedule, and a run goes on from there: --stages may be raised.

Then log p(x) of test images by importance sampling, and how many latents of each layer are active. Other parts of a VAE
of one layer, and the ladder's top-down guide of two, are scored beside by --prior, --posterior and --guide.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import torch

import pyro_vae as pv

NUM_STAGES = 8


def rate(epoch: int) -> float:
    """The learning rate's factor after so many passes."""
    stage = 0
    while epoch >= (3 ** (stage + 1) - 1) // 2:
        stage += 1
    return 10 ** (-min(stage, NUM_STAGES - 1) / 7)


def build(args: argparse.Namespace, mean: torch.Tensor) -> Any:
    """The model, with the data's mean in its output."""
    shape = tuple(mean.shape)
    if args.layers == 1:
        model: Any = pv.VAE(shape, 50, (200, 200), prior=args.prior, posterior=args.posterior)
    else:
        model = pv.HierarchicalVAE(shape, (100, 50), ((200, 200), (100, 100)), guide=args.guide, prior=args.prior)
    last = [layer for layer in model.decoder.modules() if isinstance(layer, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.bias.copy_(mean.clamp(1e-3, 1 - 1e-3).logit().flatten())
    return model


def scores(model: Any, data: pv.Dataset, args: argparse.Namespace) -> dict[str, Any]:
    """Log p(x) of test images, the bound, and the latents that are used."""
    test = data.with_test("test", args.num_test)
    log_p = pv.log_marginal(model, test, num_particles=args.num_particles)
    bound = pv.evaluate_bound(model, test)
    active = pv.evaluation.active_units(model, test)
    return {
        "log_p": log_p.mean,
        "log_p_se": log_p.std_error,
        "log_p_mc_error": log_p.mc_error,
        "bound": bound.mean,
        "bound_se": bound.std_error,
        "active": {site: int(used.sum()) for site, used in active.active.items()},
        "kl": pv.evaluation.evaluate_kl(model, test),
    }


def main() -> None:
    """Train by the schedule, and score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="binarized-mnist", help="or mnist, whose pixels are drawn anew each time")
    parser.add_argument("--layers", type=int, choices=(1, 2), default=1)
    parser.add_argument("--objective", choices=("vae", "iwae"), default="iwae")
    parser.add_argument("-k", type=int, default=5, help="draws for each image in training")
    parser.add_argument("--stages", type=int, default=NUM_STAGES, help="of the schedule, the first so many of 8")
    parser.add_argument("--beta1", type=float, default=0.9, help="of Adam: 0.9 in the paper, 0.99 in its code")
    parser.add_argument("--prior", default="standard", help="standard, mixture, flow or vamp (two layers: top-down)")
    parser.add_argument("--posterior", default="diagonal", help="one layer: diagonal, full, iaf or spline")
    parser.add_argument("--guide", default="bottom-up", help="two layers: bottom-up or top-down, the ladder's")
    parser.add_argument("--kl-warmup", type=int, help="images until the KL term has its full weight, of a vae")
    parser.add_argument("--free-bits", type=float, help="nats of each layer that cost nothing, of a vae")
    parser.add_argument("--num-test", type=int, default=10_000, help="test images that are scored")
    parser.add_argument("--num-particles", type=int, default=5000, help="K of the score")
    parser.add_argument("--out", type=Path, default=Path("runs/iwae"), help="folder of the run, which is gone on with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="8 x 8 digits, two stages")
    args = parser.parse_args()
    if args.smoke:
        args.dataset, args.stages, args.num_test, args.num_particles = "digits", 2, 50, 20
    data = pv.load_dataset(args.dataset)
    torch.manual_seed(args.seed)
    mean = data.train.float().mean(0)
    model = build(args, mean / 255 if mean.max() > 1 else mean)
    run = pv.fit(
        model,
        data,
        objective=pv.SGVB(num_particles=args.k) if args.objective == "vae" else pv.IWAE(num_particles=args.k),
        optimizer=functools.partial(torch.optim.Adam, lr=1e-3, betas=(args.beta1, 0.999), eps=1e-4, fused=True),
        learning_rate_schedule=functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=rate),
        batch_size=20,
        epochs=(3**args.stages - 1) // 2,
        kl_warmup=args.kl_warmup,
        free_bits=args.free_bits,
        evaluate_every=len(data.train),
        evaluation_size=1000,
        seed=args.seed,
        run_dir=args.out,
        resume=True,
    )
    found = {"passes": run.samples / len(data.train), **scores(model, data, args)}
    (args.out / "scores.json").write_text(json.dumps(vars(args) | found, default=str, indent=1))
    print(f"{found['passes']:.0f} of 3,280 passes, {args.num_test} test images, K = {args.num_particles}:")
    print(f"  log p(x) {found['log_p']:.2f} nats (standard error {found['log_p_se']:.2f}), bound {found['bound']:.2f}")
    print("  active latents: " + ", ".join(f"{site} {count}" for site, count in found["active"].items()))


if __name__ == "__main__":
    main()
