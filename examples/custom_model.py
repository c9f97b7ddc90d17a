"""A model and a guide of your own, trained twice: by pyro_vae.fit, and by Pyro's own SVI.

An 8 x 8 digit and its label share one latent z: two observed sites, two heads of one decoder, and a guide that sees
both.

    python examples/custom_model.py             about a minute
    python examples/custom_model.py --smoke     a few seconds
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_vae as pv

NUM_CLASSES = 10


def make_program(latent_dim: int, hidden_dim: int) -> pv.Program:
    """p(z) p(x | z) p(y | z) and q(z | x, y), as plain functions that close over their networks."""
    encoder = nn.Sequential(nn.Linear(64 + NUM_CLASSES, hidden_dim), nn.Tanh(), nn.Linear(hidden_dim, 2 * latent_dim))
    decoder = nn.Sequential(nn.Linear(latent_dim, hidden_dim), nn.Tanh(), nn.Linear(hidden_dim, 64 + NUM_CLASSES))

    def model(x: Tensor, y: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent_dim), 1.0).to_event(1))
            pixels, classes = decoder(z).split([64, NUM_CLASSES], -1)
            pyro.sample("x", dist.Bernoulli(logits=pixels).to_event(1), obs=x)
            pyro.sample("y", dist.Categorical(logits=classes), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(torch.cat([x, nn.functional.one_hot(y, NUM_CLASSES)], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return pv.Program(model, guide, data_shape=(64,))


def train_by_fit(data: pv.Dataset, epochs: int) -> pv.Program:
    """The short way: batches, binarisation, evaluation, checkpoints and resumption are taken care of."""
    program = make_program(latent_dim=8, hidden_dim=200)
    run = pv.fit(
        program,
        (data.train, data.train_labels),
        test=(data.test, data.test_labels),
        optimizer="adam",
        learning_rate=1e-3,
        epochs=epochs,
    )
    print(f"pyro_vae.fit       test bound {run.history[-1]['test_bound']:.2f} nats per datum")
    return program


def train_by_svi(data: pv.Dataset, epochs: int) -> pv.Program:
    """Pyro's own loop, with this package's objective in the place of Trace_ELBO."""
    program = make_program(latent_dim=8, hidden_dim=200)
    svi = pyro.infer.SVI(program.model, program.guide, pyro.optim.Adam({"lr": 1e-3}), loss=pv.SGVB())
    assert data.train_labels is not None
    for _ in range(epochs):
        for index in torch.randperm(len(data.train)).split(100):
            x = torch.bernoulli(data.train[index].flatten(1) / 255)
            svi.step(x, data.train_labels[index])
    return program


def main() -> None:
    """Train both ways and score both by the same estimator."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps only")
    epochs, num_particles = (2, 10) if parser.parse_args().smoke else (150, 1000)
    torch.manual_seed(0)
    data = pv.load_dataset("digits")
    held_out = (data.test, data.test_labels)
    for name, train in (("pyro_vae.fit", train_by_fit), ("pyro.infer.SVI", train_by_svi)):
        score = pv.log_marginal(train(data, epochs), held_out, num_particles=num_particles)
        print(f"{name:18s} log p(x, y) {score.mean:.2f} ± {score.std_error:.2f} nats per datum (K = {num_particles})")


if __name__ == "__main__":
    main()
