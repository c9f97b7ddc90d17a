"""ProdLDA against formulas written out by hand, a quadrature, and every objective."""

import copy
import json
import math

import numpy as np
import pyro
import pytest
import torch
from scipy import sparse

import pyro_vae as pv
from pyro_vae.models import topic_model
from pyro_vae.models.topic_model import laplace_of_dirichlet
from pyro_vae.programs import as_program, check_program
from pyro_vae.programs.dreams import dream
from tests import oracles

X = torch.from_numpy(np.random.default_rng(0).poisson(0.8, (40, 6))).double()


def close(left, right, atol=1e-10):
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


def lda(num_topics=3, **changes):
    """A model whose running statistics are not the initial ones."""
    model = pv.ProdLDA(6, num_topics, **({"hidden_dims": (5, 4)} | changes))
    with torch.no_grad():
        for name, tensor in model.named_buffers():
            if name.endswith("running_mean"):
                tensor.normal_()
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
        for name, parameter in model.named_parameters():
            if name.endswith(("offset", "bias")):
                parameter.normal_()
    return model.eval()


# The prior ------------------------------------------------------------------------------------------------------------


def laplace_by_hessian(alpha, centre=1.0):
    """Mode and curvature of log Dirichlet(softmax(z); alpha) in z, whose sum over topics is free: by autograd."""

    def log_density(z):
        return (alpha * z.log_softmax(-1)).sum()

    z = alpha.log() - centre * alpha.log().mean()
    gradient = torch.autograd.functional.jacobian(log_density, z)
    covariance = torch.linalg.pinv(-torch.autograd.functional.hessian(log_density, z), hermitian=True, atol=1e-10)
    return z, gradient, covariance.diagonal()


@pytest.mark.parametrize("alpha", [[1.0] * 7, [0.02] * 50, [0.3, 2.0, 5.0], [1.0, 4.0]])
def test_the_prior_is_laplaces_approximation_of_a_dirichlet(alpha):
    alpha = torch.tensor(alpha)
    mode, gradient, variance = laplace_by_hessian(alpha)
    close(gradient, torch.zeros(len(alpha)), atol=1e-12)
    loc, scale = laplace_of_dirichlet(alpha)
    close(loc, mode)
    close(scale**2 / variance, torch.ones(len(alpha)), atol=1e-6)
    assert abs(loc.sum()) < 1e-10


def test_a_prior_made_wrong_is_seen():
    alpha = torch.tensor([0.3, 2.0, 5.0])
    _, _, variance = laplace_by_hessian(alpha)
    planted = alpha.reciprocal() * (1 - 2 / 3) + alpha.reciprocal().sum() / 3  # 1/J for 1/J^2
    assert ((planted - variance).abs() > 0.1).all()


def test_the_prior_of_the_sites():
    model = pv.ProdLDA(6, 4, concentration=[0.5, 1, 2, 3])
    trace = pyro.poutine.trace(model.model).get_trace(X[:5])
    loc, scale = laplace_of_dirichlet(torch.tensor([0.5, 1, 2, 3]))
    prior = trace.nodes["z"]["fn"]
    assert (prior.batch_shape, prior.event_shape) == ((5,), (4,))
    close(prior.mean, loc.expand(5, 4))
    close(prior.stddev, scale.expand(5, 4))
    assert trace.nodes["x"]["is_observed"]


# Densities ------------------------------------------------------------------------------------------------------------


def normalised(values, norm, batch):
    mean, variance = (values.mean(0), values.var(0)) if batch else (norm.running_mean.numpy(), norm.running_var.numpy())
    return (values - mean) / np.sqrt(variance + 1e-3) + norm.offset.detach().numpy()


def by_hand(model, x, batch=False):
    """Mean and log variance of q(z | x), and log p(words | z), in numpy."""
    hidden = x.numpy()
    for layer in model.encoder:
        if isinstance(layer, torch.nn.Linear):
            weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
            hidden = np.logaddexp(0, hidden @ weight.T + bias)  # softplus
    heads = [
        normalised(hidden @ linear.weight.detach().numpy().T, norm, batch)
        for linear, norm in (model.encoder_loc, model.encoder_log_variance)
    ]

    def log_words(z):
        theta = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        logits = normalised(theta @ model.topics.numpy(), model.word_norm, batch)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    return *heads, log_words


@pytest.mark.parametrize("batch", [False, True])
def test_densities_by_hand(batch):
    model = lda(dropout=0.0).train(batch)
    loc, log_variance, log_words = by_hand(model, X, batch)
    q = model.encode(X)
    close(q.mean, torch.from_numpy(loc))
    close(q.variance.log(), torch.from_numpy(log_variance))
    z = torch.randn(40, 3)
    expected = (X.numpy() * log_words(z.numpy())).sum(-1)
    close(model.decode(z, X.sum(-1)).log_prob(X), torch.from_numpy(expected))


def test_the_bound_is_that_of_the_authors_loss():
    """0.5 (sum s^2 / t^2 + sum (m - mu)^2 / t^2 - J + sum log t^2 - sum log s^2), and the reconstruction at a draw."""
    model = lda(concentration=[0.5, 1.0, 2.0])
    loc, log_variance, log_words = by_hand(model, X)
    prior_loc, prior_scale = (t.numpy() for t in laplace_of_dirichlet(torch.tensor([0.5, 1.0, 2.0])))
    kl = 0.5 * (
        (np.exp(log_variance) / prior_scale**2).sum(-1)
        + ((prior_loc - loc) ** 2 / prior_scale**2).sum(-1)
        - 3
        + np.log(prior_scale**2).sum()
        - log_variance.sum(-1)
    )
    with torch.no_grad():
        weights = pv.log_weights(model.model, model.guide, (X,), analytic_kl=True, num_particles=2)
    close(weights.analytic_kl["z"], torch.from_numpy(kl).expand(2, 40))
    expected = (X.numpy() * log_words(weights.latents["z"].numpy())).sum(-1)
    close(weights.log_likelihood["x"], torch.from_numpy(expected))


def test_the_evidence_of_two_topics_by_quadrature():
    """theta depends on the difference of the two latents alone, which is Gaussian: no code of the package."""
    model, few = lda(num_topics=2, concentration=0.7), X[:5]
    _, _, log_words = by_hand(model, few)
    spread = math.sqrt(2 / 0.7 * (1 - 1 / 2))  # of z_1 - z_2

    def log_likelihood(unit):
        log_p = log_words(np.stack([spread * unit, 0 * unit], -1))
        return log_p @ few.numpy().T

    truth = torch.from_numpy(oracles.log_marginal_by_quadrature(log_likelihood))
    with torch.no_grad():  # a guide not too far from the posterior
        model.encoder_log_variance[0].weight.mul_(0.01), model.encoder_log_variance[1].offset.fill_(0.5)
        model.encoder_loc[0].weight.mul_(0.01), model.encoder_loc[1].offset.zero_()
    score = pv.log_marginal(model, few, num_particles=20_000)
    assert score.mc_error < 0.01
    close(score.values, truth, atol=0.05)
    ais = pv.log_marginal(model, few, method="ais", num_particles=64, num_steps=60)
    assert ais.mc_error < 0.05
    assert ais.mean == pytest.approx(truth.mean().item(), abs=5 * ais.mc_error)


def test_a_document_without_words_is_scored_by_the_prior_alone():
    model = lda()
    x = torch.cat([torch.zeros(1, 6), X[:3]])
    weights = pv.log_weights(model.model, model.guide, (x,), num_particles=4)
    assert weights.log_likelihood["x"][:, 0].tolist() == [0.0] * 4
    assert pv.log_marginal(model, x, num_particles=5000).values[0].item() == pytest.approx(0.0, abs=0.2)


def test_words_beyond_the_vocabulary_in_use_have_no_influence():
    """Padded: a word that no document holds adds to no density but through its share of the probability."""
    model = lda()
    x = X.clone()
    x[:, 5] = 0
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.encoder[0].weight[:, 5] += 3  # the encoder never sees it
    close(changed.encode(x).mean, model.encode(x).mean, atol=0)
    close(changed.decode(torch.zeros(40, 3)).log_prob(x), model.decode(torch.zeros(40, 3)).log_prob(x), atol=0)


# Batch normalisation --------------------------------------------------------------------------------------------------


def test_batch_normalisation_is_torchs_over_particles_and_batch():
    """Running statistics: the mean over the first ten batches, then torch's moving average."""
    ours, theirs = topic_model._BatchNorm(3), torch.nn.BatchNorm1d(3, eps=1e-3, momentum=None, affine=False)
    for step in range(20):
        theirs.momentum = None if step < 10 else 0.1
        x = torch.randn(4, 5, 3) * 2 + 1
        close(ours(x), theirs(x.reshape(20, 3)).reshape(4, 5, 3))
    close(ours.running_mean, theirs.running_mean)
    close(ours.running_var, theirs.running_var)
    close(ours.eval()(x), theirs.eval()(x.reshape(20, 3)).reshape(4, 5, 3))


def test_one_row_is_normalised_by_the_running_statistics():
    norm = topic_model._BatchNorm(3)
    norm(torch.randn(50, 3))
    mean, x = norm.running_mean.clone(), torch.randn(1, 3)
    close(norm(x), (x - mean) / (norm.running_var + 1e-3).sqrt(), atol=1e-12)
    assert torch.equal(norm.running_mean, mean)
    pv.fit(lda().train(), X[:7], batch_size=3, epochs=1, compile=False)  # the last batch is one document


# Programs and objectives ----------------------------------------------------------------------------------------------


def test_check_program_finds_nothing():
    check = check_program(as_program(lda()), (X,))
    assert check.batch_size == 40
    assert check.binary_arguments == frozenset()


OBJECTIVES = [
    pv.SGVB(),
    pv.SGVB(num_particles=2, estimator="B"),
    pv.IWAE(3),
    pv.DReG(3),
    pv.Renyi(0.5, 3),
    pv.WakeSleep(),
    pv.ReweightedWakeSleep(3),
    pv.VIMCO(3),
    pv.MCEM(num_leapfrog=2, num_updates=1),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_every_objective_trains_it(objective):
    model = lda().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    guide = [name for name in before if name.startswith("encoder")]
    run = pv.fit(model, X, objective=objective, optimizer="adam", batch_size=4, epochs=2, progress=False)
    assert run.path == "captured"
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before) - (set(guide) if isinstance(objective, pv.MCEM) else set())
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    if run.history[-1]["train_bound"] is not None:
        assert math.isfinite(run.history[-1]["train_bound"])


def test_a_captured_step_is_the_eager_one():
    first, second = lda().train(), None
    second = copy.deepcopy(first)
    options = {"optimizer": "adam", "batch_size": 5, "epochs": 5, "progress": False}
    runs = [pv.fit(model, X, compile=way, **options) for model, way in ((first, True), (second, False))]
    assert [run.path for run in runs] == ["captured", "eager"]
    for ours, theirs in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        close(ours, theirs, atol=0)


def test_a_dream_has_the_documents_numbers_of_words():
    found = dream(lda().model, (X,))
    (dreamt,) = found.args
    assert torch.equal(dreamt.sum(-1), X.sum(-1))
    assert not torch.equal(dreamt, X)
    assert found.latents["z"].shape == (1, 40, 3)


def test_documents_are_scored_apart():
    model = lda()
    latents = {"z": torch.randn(3, 40, 3)}
    whole = pv.log_weights(model.model, model.guide, (X,), num_particles=3, latents=latents).log_w
    alone = pv.log_weights(
        model.model, model.guide, (X[7:8],), num_particles=3, latents={"z": latents["z"][:, 7:8]}
    ).log_w
    close(alone, whole[:, 7:8], atol=1e-12)


def test_a_stored_run_comes_back(tmp_path):
    model = lda(concentration=(0.5, 1, 2), dropout=0.1).train()
    pv.fit(model, X, batch_size=10, epochs=2, run_dir=tmp_path / "run", progress=False)
    stored = pv.load_run(tmp_path / "run").program
    assert type(stored) is pv.ProdLDA
    assert stored.config == model.config
    for ours, theirs in zip(stored.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    close(pv.log_marginal(stored, X, num_particles=5).values, pv.log_marginal(model, X, num_particles=5).values, atol=0)


# Topics ---------------------------------------------------------------------------------------------------------------


def test_it_finds_the_topics_of_made_up_documents():
    """Each document has one of four topics, each topic ten words of its own."""
    torch.set_default_dtype(torch.float32)
    rng = np.random.default_rng(0)
    topics = np.kron(np.eye(4), np.full(10, 0.09)) + 0.1 / 40
    counts = torch.from_numpy(rng.multinomial(40, topics[np.arange(1000) % 4]))
    model = pv.ProdLDA(40, 4, (50,), dropout=0.0)
    pv.fit(model, counts, objective=pv.SGVB(estimator="B"), optimizer="adam", learning_rate=0.01, epochs=25)
    found = {tuple(sorted({word // 10 for word in topic})) for topic in model.top_words(range(40), 5)}
    assert found == {(0,), (1,), (2,), (3,)}
    proportions = model.eval().encode(counts.float()).mean.softmax(-1)
    assert all(len(set(proportions[k::4].argmax(-1).tolist())) == 1 for k in range(4))


def test_top_words_are_those_of_greatest_weight():
    model = pv.ProdLDA(4, 2)
    with torch.no_grad():
        model.topic_words.weight.copy_(torch.tensor([[1.0, -2], [3, 0], [2, 5], [-1, 4]]))
    assert model.top_words("abcd", 3) == [["b", "c", "a"], ["c", "d", "b"]]
    assert model.topics.tolist() == [[1, 3, 2, -1], [-2, 0, 5, 4]]
    with pytest.raises(ValueError, match="expected 4 words, got 3"):
        model.top_words("abc")
    with pytest.raises(ValueError, match="n: expected a whole number from 1 to 4, got 5"):
        model.top_words("abcd", 5)


def test_samples():
    model = lda(dropout=0.5).train()
    x = model.sample(2000, num_words=30)
    assert model.training
    assert x.shape == (2000, 6)
    assert torch.equal(x.sum(-1), torch.full((2000,), 30.0))
    means = model.sample(2000, num_words=30, mean=True)
    close(means.sum(-1), torch.full((2000,), 30.0))
    close(x.mean(0), means.mean(0), atol=1.0)
    again = pv.ProdLDA(6, 3).sample(4, num_words=0)
    assert again.tolist() == [[0.0] * 6] * 4


def test_config_builds_the_same_architecture():
    for given in ({}, {"concentration": [1, 2, 3], "dropout": 0, "hidden_dims": [4]}):
        first = pv.ProdLDA(6, 3, **given)
        second = pv.ProdLDA(**json.loads(json.dumps(first.config)))
        assert second.config == first.config
        second.load_state_dict(first.state_dict())
        close(second.eval().encode(X).mean, first.eval().encode(X).mean, atol=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_topics": 1}, "num_topics: expected a whole number of at least 2"),
        ({"hidden_dims": ()}, "hidden_dims"),
        ({"dropout": 1.0}, "dropout: expected a number from 0 to below 1, got 1.0"),
        ({"dropout": "much"}, "dropout"),
        ({"concentration": 0}, "concentration: expected a positive number"),
        ({"concentration": [1.0, 2.0]}, "one for each of 3 topics"),
        ({"concentration": [1.0, 2.0, math.inf]}, "concentration"),
    ],
)
def test_bad_arguments_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        pv.ProdLDA(**({"vocab_size": 6, "num_topics": 3} | changes))


@pytest.mark.parametrize("wrong", [-1.0, 0.5])
def test_what_are_no_counts_is_refused(wrong):
    x = X.clone()
    x[7, 2] = wrong
    with pytest.raises(ValueError, match="expected counts, whole numbers of at least 0, got values from"):
        pv.fit(lda(), x, epochs=1)
    with pytest.raises(ValueError, match=rf"got {wrong:g} in row 7, word 2"):
        pyro.infer.SVI(lda().model, lda().guide, pyro.optim.Adam({}), pyro.infer.Trace_ELBO()).step(x)


@pytest.mark.parametrize("form", ["dense", "sparse", "batches"])
@pytest.mark.parametrize("wrong", [-1.0, 0.5])
def test_what_are_no_counts_is_refused_in_any_row(wrong, form):
    x = X.repeat(40, 1)
    x[-1, 2] = wrong
    data = {"dense": x, "sparse": sparse.csr_array(x.numpy()), "batches": [*x.split(100)]}[form]
    with pytest.raises(ValueError, match=f"data 'x': expected counts, whole numbers of at least 0, got {wrong:g}"):
        pv.fit(lda(), data, epochs=1)


# Latent topics --------------------------------------------------------------------------------------------------------


def test_latent_topics_are_drawn_once_for_all_documents():
    model = lda(bayesian=True, num_data=100)
    check = check_program(model, (X,))
    assert check.global_latents == ("topics.weight",)
    assert check.full_size == 100
    with torch.no_grad():
        weights = pv.log_weights(model.model, model.guide, (X,), num_particles=3)
    assert weights.latents["topics.weight"].shape == (3, 1, 6, 3)
    assert weights.scale == 100 / 40


def test_the_density_of_words_is_that_of_the_topics_drawn():
    model, z = lda(bayesian=True), torch.randn(2, 40, 3)
    topics = torch.randn(2, 1, 6, 3)
    given = {"z": z, "topics.weight": topics}
    with torch.no_grad():
        found = pv.log_weights(model.model, model.guide, (X,), num_particles=2, latents=given).log_likelihood["x"]
        for k in range(2):
            model.topic_words.module.weight.copy_(topics[k, 0])
            close(found[k], model.decode(z[k]).log_prob(X))
        assert (found[0] - model.decode(z[0]).log_prob(X)).abs().min() > 1e-3  # the other draw's topics


def test_latent_topics_train_and_come_back(tmp_path):
    model = pv.ProdLDA(6, 3, (5,), bayesian=True)
    before = model.topics.clone()
    run = pv.fit(model, X, objective=pv.SGVB(estimator="B"), epochs=6, batch_size=10, run_dir=tmp_path)
    assert run.path == "captured"
    assert model.num_data == 40
    assert run.history[-1]["dataset_bound"] == pytest.approx(40 * run.history[-1]["train_bound"])
    assert not torch.equal(before, model.topics)
    stored = pv.load_run(tmp_path).program
    close(stored.topics, model.topics)
    assert stored.config == model.config
    assert model.sample(3).shape == (3, 6)
