"""A convolutional VAE of 8-bit images, grey or in colour, scored in bits per dimension.

    python examples/convolutional_vae.py --dataset fashion-mnist --out runs/fashion
    python examples/convolutional_vae.py --dataset pictures/ --out runs/pictures

A folder of images is read as they are: all of one size, whatever it is. Residual convolutions down to z and back, a
mixture of discretised logistics for each pixel, that is a probability for each of its 256 levels, Adam, and the average
of the weights. Then the bound and log p(x) of test images, by importance sampling, as bits for each number of an
image: what a lossless code by this model would take. Pictures are written beside the run.
"""

import argparse
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import pyro_vae as pv
from pyro_vae.gallery import as_images
from pyro_vae.models.likelihoods import bits_per_dim
from pyro_vae.plots import plot_reconstructions, plot_samples


def blobs(folder: Path, count: int = 60, size: int = 10) -> Path:
    """Small colour pictures of blobs in a folder, to try the script on."""
    noise = np.random.default_rng(0)
    places = np.arange(size)
    for number in range(count):
        y, x, *colour = noise.uniform(0.2, 0.8, 5)
        distance = (places[:, None] / size - y) ** 2 + (places / size - x) ** 2
        pixels = 255 * np.exp(-20 * distance)[..., None] * np.array(colour)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03d}.png")
    return folder


def main() -> None:
    """Train, score and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="fashion-mnist", help="a data set of images, or a folder of them")
    parser.add_argument("--latent-dim", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=256, help="width of the layer between convolutions and z")
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64], help="of the levels, from the image on")
    parser.add_argument("--network", choices=("conv", "resnet"), default="resnet")
    parser.add_argument("--posterior", default="diagonal", help="diagonal, full, iaf or spline")
    parser.add_argument("--prior", default="standard", help="standard, mixture, vamp or flow")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--num-test", type=int, default=1000, help="test images that are scored")
    parser.add_argument("--num-particles", type=int, default=200, help="K of the score")
    parser.add_argument("--out", type=Path, default=Path("runs/convolutional-vae"), help="folder of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a folder of small colour pictures, two passes")
    args = parser.parse_args()
    if args.smoke:
        args.dataset = blobs(Path(tempfile.mkdtemp()))
        args.latent_dim, args.hidden, args.channels, args.epochs, args.batch_size = 4, 16, [4, 8], 2, 20
        args.num_test, args.num_particles = 5, 10
    data = pv.load_dataset(args.dataset)
    shape = tuple(data.train.shape[1:])
    torch.manual_seed(args.seed)
    vae = pv.VAE(
        shape,
        args.latent_dim,
        (args.hidden,),
        likelihood="discretized-logistic",
        activation="relu",
        network=args.network,
        channels=args.channels,
        posterior=args.posterior,
        prior=args.prior,
    )
    run = pv.fit(
        vae,
        data,
        optimizer="adam",
        learning_rate=args.learning_rate,
        ema_decay=0.999,
        max_grad_norm=1000.0,
        batch_size=args.batch_size,
        epochs=args.epochs,
        evaluation_size=1000,
        seed=args.seed,
        run_dir=args.out,
        resume=True,
    )
    test, size = data.with_test("test", args.num_test), math.prod(shape)
    bound = pv.evaluate_bound(vae, test)
    log_p = pv.log_marginal(vae, test, num_particles=args.num_particles)
    print(f"{args.out}: {run.samples / len(data.train):.0f} passes of {data.name}, {len(log_p.values)} test images")
    for name, value, error in (("bound", bound.mean, bound.std_error), ("log p(x)", log_p.mean, log_p.std_error)):
        print(f"  {name}: {value:.1f} nats, {bits_per_dim(value, size):.3f} bits per dimension", end="")
        print(f" (standard error {-bits_per_dim(error, size):.3f})")
    with torch.no_grad():
        seen = test.test[:12].float() / 255
        again = vae.decode(vae.encode(seen).sample((100,)).mean(0)).mean  # of a flow no mean is known
    plot_samples(as_images(vae.sample(100, mean=True)), columns=10).savefig(args.out / "samples.png")
    plot_reconstructions(as_images(seen), as_images(again)).savefig(args.out / "reconstructions.png")


if __name__ == "__main__":
    main()
