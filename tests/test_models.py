"""The VAE against formulas written out by hand, and the linear-Gaussian model against the dense joint Gaussian."""

import copy
import itertools
import json
import math

import numpy as np
import pyro
import pytest
import torch

import pyro_vae as pv
from pyro_vae.networks import ACTIVATIONS
from tests import oracles


def close(left, right, atol=1e-10):
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


def vae(**changes):
    return pv.VAE(**({"data_shape": (4,), "latent_dim": 2, "hidden_dims": (5,)} | changes))


# VAE ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("data_shape", [(1,), (6,), (2, 3), (3, 2, 2)])
@pytest.mark.parametrize("leading", [(), (5,), (3, 5)])
def test_shapes_of_its_distributions(likelihood, data_shape, leading):
    model = vae(data_shape=data_shape, likelihood=likelihood)
    q, p = model.encode(torch.rand(*leading, *data_shape)), model.decode(torch.randn(*leading, 2))
    assert (q.batch_shape, q.event_shape) == (leading, (2,))
    assert (p.batch_shape, p.event_shape) == (leading, data_shape)


@pytest.mark.parametrize("hidden", [(), (7,), (7, 6), (8, 7, 6)])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_the_decoder_has_the_hidden_layers_in_reverse(hidden, likelihood):
    model = vae(hidden_dims=hidden, likelihood=likelihood)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    half = len(hidden) + 1
    outputs = 4 if likelihood == "bernoulli" else 8
    assert [m.out_features for m in layers[:half]] == [*hidden, 4]
    assert [m.out_features for m in layers[half:]] == [*hidden[::-1], outputs]


def test_bernoulli_likelihood_by_hand():
    """C.1, eq. (11): sum_d x log y + (1 - x) log(1 - y)."""
    model, z, x = vae(), torch.randn(7, 2), torch.randint(0, 2, (7, 4)).double()
    y = torch.sigmoid(model.decoder(z))
    close(model.decode(z).log_prob(x), (x * y.log() + (1 - x) * (1 - y).log()).sum(-1))


def test_bernoulli_likelihood_stays_finite_where_the_probability_rounds_to_one():
    model = vae()
    with torch.no_grad():
        model.decoder[-1].bias.fill_(200.0)
    close(model.decode(torch.zeros(1, 2)).log_prob(torch.zeros(1, 4)), torch.tensor([-800.0]), atol=5.0)


def test_gaussian_likelihood_by_hand():
    """C.2, eq. (12), with the mean squashed to (0, 1)."""
    model, z, x = vae(likelihood="gaussian"), torch.randn(7, 2), torch.rand(7, 4)
    loc, log_variance = model.decoder(z).chunk(2, -1)
    mean, variance = 1 / (1 + (-loc).exp()), log_variance.exp().clamp(1 / 255**2, 1.0)
    expected = -0.5 * ((x - mean) ** 2 / variance + variance.log() + math.log(2 * math.pi)).sum(-1)
    close(model.decode(z).log_prob(x), expected)
    far = model.decode(100 * z).mean
    assert ((far >= 0) & (far <= 1)).all()


def test_model_and_guide_have_the_documented_sites():
    model, x = vae(data_shape=(2, 2)), torch.ones(5, 2, 2)
    trace = pyro.poutine.trace(model.model).get_trace(x)
    z, seen = trace.nodes["z"], trace.nodes["x"]
    assert (z["fn"].batch_shape, z["fn"].event_shape) == ((5,), (2,))
    assert seen["is_observed"]
    close(z["fn"].log_prob(z["value"]), -0.5 * (z["value"] ** 2).sum(-1) - math.log(2 * math.pi))
    drawn = pyro.poutine.trace(model.guide).get_trace(x).nodes["z"]["fn"]
    close(drawn.mean, model.encode(x).mean)
    close(drawn.stddev, model.encode(x).stddev)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_samples(likelihood):
    model = vae(data_shape=(2, 3), likelihood=likelihood)
    draws, means = model.sample(50), model.sample(50, mean=True)
    assert draws.shape == means.shape == (50, 2, 3)
    assert draws.dtype == torch.float64
    assert not draws.requires_grad
    assert ((means > 0) & (means < 1)).all()
    assert bool(((draws == 0) | (draws == 1)).all()) == (likelihood == "bernoulli")
    assert len(means.unique(dim=0)) == 50  # each from its own z


def test_samples_have_the_mean_of_the_model():
    model = vae(data_shape=(3,), hidden_dims=(4,))
    draws, means = model.sample(40_000), model.sample(40_000, mean=True)
    close(draws.mean(0), means.mean(0), atol=5 * (0.5 + 0.2) / 40_000**0.5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_config_builds_the_same_architecture(activation, likelihood):
    first = vae(data_shape=[2, 2], hidden_dims=[6, 5], likelihood=likelihood, activation=activation, init="paper")
    second = pv.VAE(**first.config)
    assert second.config == first.config
    second.load_state_dict(first.state_dict())
    x, z = torch.rand(3, 2, 2).round(), torch.randn(3, 2)
    close(second.encode(x).mean, first.encode(x).mean, atol=0)
    close(second.decode(z).log_prob(x), first.decode(z).log_prob(x), atol=0)


def test_config_is_plain_data():
    config = vae(data_shape=(2, 3)).config
    assert pv.VAE(**json.loads(json.dumps(config))).config == config


def test_data_shape_may_be_a_number():
    assert vae(data_shape=9).data_shape == (9,)


def test_init_paper_is_narrower_than_the_default():
    model = vae(data_shape=(400,), hidden_dims=(300,), init="paper")
    values = torch.cat([p.flatten() for p in model.parameters()])
    assert values.std().item() == pytest.approx(0.1, rel=0.02)
    assert model.encoder[0].bias.std().item() == pytest.approx(0.1, rel=0.2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data_shape": ()}, "data_shape"),
        ({"data_shape": (4, 0)}, "data_shape"),
        ({"data_shape": (4.5,)}, "data_shape"),
        ({"latent_dim": 0}, "latent_dim"),
        ({"latent_dim": 1.5}, "latent_dim"),
        ({"hidden_dims": (5, -1)}, "hidden_dims"),
        ({"likelihood": "bernouli"}, "likelihood.*did you mean 'bernoulli'"),
        ({"likelihood": None}, "likelihood"),
        ({"activation": "sigmoid"}, "activation.*tanh"),
        ({"init": "xavier"}, "init.*paper"),
    ],
)
def test_bad_arguments_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        vae(**changes)


def test_the_evidence_of_a_small_vae_by_quadrature():
    """The network written out in numpy, z integrated by the trapezoid rule: no code of the package."""
    model = vae(data_shape=(3,), latent_dim=1, hidden_dims=(4,))
    x = torch.tensor([[0.0, 0, 0], [1, 0, 1], [1, 1, 1]])
    w1, b1, w2, b2 = (p.detach().numpy() for p in model.decoder.parameters())

    def log_likelihood(z):
        logits = np.tanh(z[:, None] @ w1.T + b1) @ w2.T + b2
        return (x.numpy() * logits[:, None] - np.log1p(np.exp(logits))[:, None]).sum(-1)

    truth = torch.from_numpy(oracles.log_marginal_by_quadrature(log_likelihood))
    score = pv.log_marginal(model, x, num_particles=20_000)
    assert score.mc_error < 0.01
    assert score.mean == pytest.approx(truth.mean().item(), abs=5 * score.mc_error)
    close(score.values, truth, atol=0.05)


# Registration ---------------------------------------------------------------------------------------------------------


def names_of(model):
    pyro.clear_param_store()
    model.model(torch.ones(1, 4))
    return {name.split("$$$")[0] for name in pyro.get_param_store()}


def test_every_instance_has_a_name_of_its_own():
    first, second = vae(), vae()
    names = [names_of(first), names_of(second), names_of(copy.deepcopy(first)), names_of(first)]
    assert all(len(n) == 1 for n in names)
    assert names[0] == names[3]
    assert len(set.union(*names[:3])) == 3


# LinearGaussian -------------------------------------------------------------------------------------------------------


def test_linear_gaussian_against_the_dense_joint():
    model, x = pv.LinearGaussian(*oracles.example()), oracles.example_data()
    joint = oracles.linear_gaussian(*oracles.example())
    posterior = joint.given_last(x)
    close(model.log_marginal(x), joint.last(3).log_prob(x))
    close(model.posterior(x).mean, posterior.mean)
    close(model.posterior(x).covariance_matrix, posterior.cov.expand(4, 2, 2))
    close(model.encode(x).mean, posterior.mean)
    z = torch.randn(4, 2)
    prior = -0.5 * (z**2).sum(-1) - math.log(2 * math.pi)
    close(model.decode(z).log_prob(x) + prior, joint.log_prob(torch.cat([z, x], 1)))


def test_linear_gaussian_made_wrong_on_purpose():
    right = pv.LinearGaussian(*oracles.example())
    wrong = pv.LinearGaussian(*oracles.example(), guide_shift=0.3, guide_widening=2.0)
    x = oracles.example_data()
    close(wrong.encode(x).mean, right.encode(x).mean + 0.3)
    close(wrong.encode(x).covariance_matrix, 4 * right.encode(x).covariance_matrix)
    close(wrong.posterior(x).mean, right.posterior(x).mean)
    close(wrong.log_marginal(x), right.log_marginal(x))


def test_linear_gaussian_follows_its_parameters():
    model, x = pv.LinearGaussian(torch.zeros(3, 2)), oracles.example_data()
    weight, bias, noise = oracles.example()
    with torch.no_grad():
        model.weight.copy_(weight), model.bias.copy_(bias), model.log_noise_scale.fill_(math.log(noise))
    close(model.log_marginal(x), oracles.exact_log_marginal(x))


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((torch.ones(3),), {}),
        ((torch.ones(3, 1), torch.ones(2)), {}),
        ((torch.ones(3, 1), None, 0.0), {}),
        ((torch.ones(3, 1), None, -1.0), {}),
        ((torch.ones(3, 1),), {"guide_widening": 0.0}),
    ],
)
def test_linear_gaussian_refuses(args, options):
    with pytest.raises(ValueError, match="expected"):
        pv.LinearGaussian(*args, **options)


# The sigmoid belief network -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent_dims", [(3,), (4, 2), (3, 2, 2)])
def test_belief_network_scores_what_it_samples(latent_dims):
    """Importance sampling of every binary datum sums to one, and to the frequencies of its own samples."""
    network = pv.SigmoidBeliefNetwork((2, 2), latent_dims)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
        for parameter in network.up.parameters():
            parameter.zero_()  # a uniform guide: even weights
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4))).reshape(16, 2, 2)
    probability = pv.log_marginal(network, every, num_particles=20_000).values.exp()
    assert probability.sum().item() == pytest.approx(1.0, abs=0.02)
    samples = network.sample(20_000)
    frequency = (samples[:, None] == every).all(-1).all(-1).double().mean(0)
    torch.testing.assert_close(probability, frequency, atol=0.02, rtol=0)


def test_belief_network_sites_and_refusals():
    network = pv.SigmoidBeliefNetwork((6,), (4, 2))
    x = torch.ones(5, 6)
    weights = pv.log_weights(network.model, network.guide, (x,), num_particles=3)
    assert {name: tuple(z.shape) for name, z in weights.latents.items()} == {"z_1": (3, 5, 4), "z_2": (3, 5, 2)}
    assert type(network)(**network.config).config == network.config
    assert network.sample(2, mean=True).shape == (2, 6)
    with pytest.raises(ValueError, match=r"'z_1'.*VIMCO, ReweightedWakeSleep or WakeSleep"):
        pv.fit(network, x, epochs=1)
    with pytest.raises(ValueError, match="latent_dims: expected"):
        pv.SigmoidBeliefNetwork((6,), (4, 0))


@pytest.mark.parametrize("objective", [pv.WakeSleep(), pv.ReweightedWakeSleep(5), pv.VIMCO(5)], ids=repr)
def test_belief_network_learns(objective):
    torch.set_default_dtype(torch.float32)
    data = pv.load_dataset("digits")
    network = pv.SigmoidBeliefNetwork((8, 8), (20,))
    untrained = pv.log_marginal(network, data, num_particles=50).mean
    pv.fit(network, data, objective=objective, optimizer="adam", learning_rate=5e-3, epochs=10)
    assert pv.log_marginal(network, data, num_particles=50).mean > untrained + 10
