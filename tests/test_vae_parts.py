"""A VAE of other parts: each network, prior, posterior and likelihood, in everything that is done with a VAE."""

import json
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.models.likelihoods import LIKELIHOODS, DiscretizedLogisticLikelihood
from pyro_vae.models.posteriors import POSTERIORS, FullGaussian
from pyro_vae.models.priors import PRIORS, MixtureOfGaussians, VampPrior
from tests.statistics import assert_mean_close

SHAPE = (5, 4)
SMALL = {"data_shape": SHAPE, "latent_dim": 2, "hidden_dims": (6,), "channels": (3, 4)}
PARTS = [
    *({"network": name} for name in ("mlp", "conv", "resnet")),
    *({"prior": name} for name in PRIORS),
    *({"posterior": name} for name in POSTERIORS),
    *({"likelihood": name} for name in LIKELIHOODS),
    {"network": "conv", "prior": "mixture", "posterior": "iaf", "likelihood": "discretized-logistic"},
    {"network": "resnet", "prior": "flow", "posterior": "spline", "likelihood": "gaussian"},
]


def named(parts):
    return "-".join(parts.values())


def vae(**parts):
    torch.manual_seed(1)
    return pv.VAE(**(SMALL | parts))


def data(likelihood="bernoulli", n=12):
    levels = torch.randint(0, 256, (n, *SHAPE)).to(torch.get_default_dtype())
    if likelihood == "negative-binomial":
        return levels.floor() % 7
    return (levels > 127).to(levels) if likelihood == "bernoulli" else levels / 255


@pytest.mark.parametrize("parts", PARTS, ids=named)
def test_every_part_is_trained_scored_drawn_and_stored(parts, tmp_path):
    model, x = vae(**parts), data(parts.get("likelihood", "bernoulli"))
    q, p = model.encode(x), model.decode(torch.rand(3, 12, model.latent_dim))
    assert (q.batch_shape, q.event_shape) == ((12,), (2,))
    assert (p.batch_shape, p.event_shape) == ((3, 12), SHAPE)
    before = [tensor.detach().clone() for tensor in model.parameters()]
    run = pv.fit(model, x, optimizer="adam", epochs=4, batch_size=4, run_dir=tmp_path / "r")
    assert run.path == "captured"
    for old, (name, new) in zip(before, model.named_parameters(), strict=True):
        assert not torch.equal(old, new), f"{name} was not trained"
    assert math.isfinite(pv.log_marginal(model, x, num_particles=3).mean)
    drawn = model.sample(5)
    assert drawn.shape == (5, *SHAPE)
    assert p.support.check(drawn).all()
    stored = pv.load_run(tmp_path / "r").program
    assert json.loads(json.dumps(model.config)) == json.loads(json.dumps(stored.config))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), stored.parameters(), strict=True))


@pytest.mark.parametrize("parts", PARTS, ids=named)
def test_importance_weights_have_the_evidence_as_their_mean(parts):
    """By importance sampling from the prior, against the guide as proposal: whatever p(z) and q(z | x) are."""
    model, x = vae(**parts), data(parts.get("likelihood", "bernoulli"), 2)
    with torch.no_grad():
        weights = pv.log_weights(model.model, model.guide, (x,), num_particles=4000).log_w
        z = model.prior(model.encode).sample((4000, 2))
        plain = model.decode(z).log_prob(x)
        shift = plain.amax(0)
        assert_mean_close((weights - shift).exp(), (plain - shift).exp().mean(0), min_effect=1.0)


def test_a_vamp_prior_is_the_mean_of_the_guides_laws():
    model = vae(prior=VampPrior(2, SHAPE, num_components=7))
    z = torch.randn(4, 2)
    expected = model.encode(model.prior.pseudo_inputs).log_prob(z[:, None]).logsumexp(-1) - torch.tensor(7.0).log()
    torch.testing.assert_close(model.prior(model.encode).log_prob(z), expected)


def test_parts_may_be_objects():
    likelihood = DiscretizedLogisticLikelihood(SHAPE, num_components=2)
    model = vae(likelihood=likelihood, posterior=FullGaussian(2), prior=VampPrior(2, SHAPE, 3))
    assert model.likelihood is likelihood
    assert model.config is None  # what options they were made with is theirs to know
    assert model.decode(torch.zeros(2)).log_prob(data("grey", 1)).isfinite().all()


class Pixels(nn.Module):
    """Images of one channel by a convolution, which takes one leading dimension."""

    def __init__(self, out_dim):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 3 * 2, out_dim))

    def forward(self, x):
        return self.layers(x[:, None])


def test_networks_may_be_the_users_own(tmp_path):
    model = vae(network=(Pixels(4), nn.Sequential(nn.Linear(2, 20), nn.Unflatten(-1, SHAPE))))
    x = data()
    run = pv.fit(model, x, objective=pv.IWAE(num_particles=3), epochs=8, run_dir=tmp_path / "r", optimizer="adam")
    assert run.samples == 96
    assert model.encode(x[None]).batch_shape == (1, 12)
    fresh = vae(network=(Pixels(4), nn.Sequential(nn.Linear(2, 20), nn.Unflatten(-1, SHAPE))))
    pv.load_run(tmp_path / "r", fresh, data=x)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    with pytest.raises(ValueError, match="which only its own code can build"):
        pv.load_run(tmp_path / "r")


def test_a_bayesian_vae_of_own_networks_draws_weights_for_each_particle():
    """As many data as particles: no datum is taken for a particle."""
    layers = nn.Sequential(nn.Flatten(), nn.Linear(20, 4)), nn.Sequential(nn.Linear(2, 20), nn.Unflatten(-1, SHAPE))
    model, x = vae(network=layers, bayesian=True, num_data=12), data()
    for particles in (1, 5, 12):
        weights = pv.log_weights(model.model, model.guide, (x,), num_particles=particles)
        assert weights.log_w.shape == (particles, 12)
    with torch.no_grad():
        for scale in model.encoder.log_scale.values():
            scale.fill_(-30.0)
    z = pv.log_weights(model.model, model.guide, (x,), num_particles=4000).latents["z"]
    assert_mean_close(z, model.encode(x).mean, min_effect=0.5)  # of its own encoder's, not a neighbour's
    assert pv.fit(model, x, epochs=2, batch_size=4).samples == 24


def test_own_networks_are_as_they_were_after_a_look_at_them():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(20, 4), nn.BatchNorm1d(4), nn.Dropout())
    vae_made = pv.VAE(**SMALL, network=(encoder, nn.Linear(2, 20)))
    assert vae_made.encoder.network is encoder
    assert encoder.training
    assert encoder[2].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"network": "cnn"}, "network: expected one of mlp, conv, resnet, got 'cnn'"),
        ({"network": (Pixels(4),)}, "network: expected one of mlp, conv, resnet, or two modules"),
        (
            {"network": (Pixels(5), nn.Linear(2, 20))},
            r"expected an encoder of \(2, 5, 4\) to 4 values for each, got \(2, 5\)",
        ),
        ({"network": (Pixels(4), nn.Linear(2, 21))}, r"expected a decoder of \(2, 2\) to 20 values"),
        ({"network": "conv", "data_shape": (20,)}, "data_shape: expected"),
        ({"network": "conv", "channels": (4,) * 5}, "channels: expected at most"),
        ({"network": "conv", "init": "paper"}, 'expected one width in hidden_dims, init="default"'),
        ({"network": "resnet", "bayesian": "decoder"}, "bayesian=False"),
        ({"network": "conv", "hidden_dims": (4, 4)}, "expected one width in hidden_dims"),
        ({"likelihood": DiscretizedLogisticLikelihood((4, 5))}, r"likelihood: expected one of data of shape \(5, 4\)"),
        ({"prior": "vam"}, "prior: expected one of"),
        ({"posterior": "diag"}, "posterior: expected one of"),
        ({"posterior": FullGaussian(3)}, "posterior: expected one of 2 latent dimensions, got 3"),
        ({"prior": VampPrior(3, SHAPE)}, "prior: expected one of 2 latent dimensions, got 3"),
        ({"prior": "mixture", "posterior": "beta"}, "prior: expected one on the support of the posterior"),
        ({"prior": MixtureOfGaussians(2, 5), "posterior": "beta"}, "prior: expected one on the support"),
        ({"prior": "standard", "posterior": nn.Linear(2, 2)}, "posterior: expected one of"),
        ({"bayesian": True, "prior": "vamp"}, "prior: expected another than a vamp"),
    ],
)
def test_parts_that_do_not_fit(parts, message):
    with pytest.raises(ValueError, match=message):
        vae(**parts)


@pytest.mark.parametrize("kind", ["tensor", "batches"])
def test_data_off_the_grid_are_refused_in_any_row(kind):
    x = data("grey", 300)
    x[250, 3, 2] = 0.1234
    given = x if kind == "tensor" else DataLoader(TensorDataset(x), batch_size=50)
    with pytest.raises(ValueError, match=r"expected levels k / 255, k = 0, \.\.\., 255, got 0.1234 among them"):
        pv.fit(vae(likelihood="discretized-logistic"), given, epochs=1, progress=False)
    x[250, 3, 2] = 13 / 255
    assert pv.fit(vae(likelihood="discretized-logistic"), x, epochs=1).samples == 300
    assert pv.fit(vae(likelihood="discretized-logistic"), (255 * x).to(torch.uint8), epochs=1).samples == 300
