"""The Bayesian mixture of Gaussians against labels enumerated in numpy, and its evidence by exact sums."""

import itertools
import json
import math

import numpy as np
import pyro
import pytest
import torch
from scipy import stats

import pyro_vae as pv
from pyro_vae.programs import check_program, log_guide
from tests import oracles
from tests.statistics import assert_mean_close

POSTERIORS = ("full", "mean-field")
SITES = ("weights", "means", "scales")


def close(left, right, atol=1e-10):
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


def mixture(num_components=3, data_dim=2, **options):
    """With a guide that is not as it begins: every entry of its covariance root is something."""
    model = pv.GaussianMixture(data_dim, num_components, **options)
    with torch.no_grad():
        model.log_scale.add_(0.3 * torch.randn_like(model.log_scale))
        if model.mixing is not None:
            model.mixing.normal_(0, 0.2)
    return model


def planted(num_each=80):
    """Three clusters far apart, (3 num_each, 2), and their labels, by ascending first coordinate."""
    means = torch.tensor([[-1.5, 0.0], [0.3, 1.2], [1.2, -1.2]])
    scales = torch.tensor([[0.2, 0.4], [0.3, 0.1], [0.15, 0.25]])
    x = torch.cat([m + s * torch.randn(num_each, 2) for m, s in zip(means, scales, strict=True)])
    return x, torch.arange(3).repeat_interleave(num_each), means, scales


# Densities ------------------------------------------------------------------------------------------------------------


def test_the_log_density_by_enumeration_of_the_labels():
    model, x = mixture(), torch.randn(7, 2)
    draws = {name: values.unsqueeze(1) for name, values in model.draw(5).items()}
    found = model.decode(**draws).log_prob(x)
    assert found.shape == (5, 7)
    truth = np.empty((5, 7))
    for k, m in itertools.product(range(5), range(7)):
        w, mu, s = (draws[name][k, 0].numpy() for name in SITES)
        terms = [w[c] * stats.norm.pdf(x[m].numpy(), mu[c], s[c]).prod() for c in range(3)]
        truth[k, m] = math.log(sum(terms))
    close(found, torch.from_numpy(truth))


def test_the_priors_are_the_stated_ones():
    model = mixture(concentration=1.7, mean_loc=0.4, mean_scale=1.3, scale_median=0.6, scale_spread=0.8)
    weights = pv.log_weights(model.model, model.guide, (torch.zeros(4, 2),), num_particles=6)
    drawn = {name: values[:, 0].detach().numpy() for name, values in weights.latents.items()}
    truth = {
        "weights": [stats.dirichlet.logpdf(w / w.sum(), [1.7] * 3) for w in drawn["weights"]],
        "means": stats.norm.logpdf(drawn["means"], 0.4, 1.3).sum((1, 2)),
        "scales": stats.lognorm.logpdf(drawn["scales"], 0.8, scale=0.6).sum((1, 2)),
    }
    assert weights.log_prior.keys() == truth.keys()
    for name, expected in truth.items():
        close(weights.log_prior[name].detach(), torch.as_tensor(np.asarray(expected)))


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_the_guide_is_one_gaussian_of_the_unconstrained_globals(posterior):
    """Its density, written for the whole vector u at once, with the Jacobians of the maps by hand."""
    model = mixture(posterior=posterior)
    weights = pv.log_weights(model.model, model.guide, (torch.zeros(4, 2),), num_particles=6)
    w, mu, s = (weights.latents[name][:, 0].detach() for name in SITES)
    rest = 1 - torch.nn.functional.pad(w[:, :-1].cumsum(-1), (1, 0))[:, :-1]  # what is left of the stick
    fraction = w[:, :-1] / rest
    offset = torch.tensor([2.0, 1.0]).log()  # u = 0 is the uniform law
    u = torch.cat([fraction.logit() + offset, mu.flatten(1), s.log().flatten(1)], 1)
    root = model.log_scale.exp().diag()
    if posterior == "full":
        root = root + model.mixing.tril(-1)
    q = oracles.Gaussian(model.loc.detach(), (root @ root.T).detach())
    jacobian = (rest * fraction * (1 - fraction)).log().sum(-1) + s.log().sum((1, 2))
    found = sum(weights.log_guide.values()).detach()
    close(found, q.log_prob(u) - jacobian, atol=1e-8)


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_sites_shapes_and_densities_at_given_values(posterior):
    model, x = mixture(posterior=posterior), torch.randn(5, 2)
    check = check_program(pv.Program(model.model, model.guide), (x,))
    assert (check.batch_size, check.full_size) == (5, 5)
    weights = pv.log_weights(model.model, model.guide, (x,), num_particles=4)
    assert {name: tuple(z.shape) for name, z in weights.latents.items()} == {
        "weights": (4, 1, 3),
        "means": (4, 1, 3, 2),
        "scales": (4, 1, 3, 2),
    }
    assert weights.global_sites == sorted(SITES)
    again = log_guide(model.model, model.guide, (x,), {}, weights.latents)
    for name, term in again.items():
        close(term, weights.log_guide[name], atol=1e-8)


def test_particles_are_the_sum_of_one_by_one():
    model, x = mixture(), torch.randn(5, 2)
    together = pv.log_weights(model.model, model.guide, (x,), num_particles=3)
    for k in range(3):
        latents = {name: z[k : k + 1] for name, z in together.latents.items()}
        alone = pv.log_weights(model.model, model.guide, (x,), latents=latents)
        close(alone.log_w[0], together.log_w[k])
        close(alone.log_w_global[0], together.log_w_global[k])


def test_num_data_scales_the_minibatch_and_not_the_globals():
    model, x = mixture(num_data=50), torch.randn(5, 2)
    found = []
    for N in (None, 50):
        model.num_data = N
        pyro.set_rng_seed(0)
        found.append(pv.SGVB(3).loss(model.model, model.guide, x))
    weights = pv.log_weights(model.model, model.guide, (x,), num_particles=3)
    assert weights.scale == 10
    pyro.set_rng_seed(0)
    weights = pv.log_weights(model.model, model.guide, (x,), num_particles=3)
    assert found[0] - found[1] == pytest.approx((9 * weights.log_w.mean(0).sum()).item(), rel=1e-10)


def test_estimator_b_is_the_same_bound():
    model, x = mixture(posterior="mean-field"), torch.randn(5, 2)
    sampling, analytic = pv.SGVB(20), pv.SGVB(20, "B")
    with pytest.warns(UserWarning, match="no analytic KL at sites"):
        analytic.bound(model.model, model.guide, x)
    with torch.no_grad():
        sampled, analytic = (
            torch.stack([objective.bound(model.model, model.guide, x).sum() for _ in range(200)])
            for objective in (sampling, analytic)
        )
    assert_mean_close(sampled - analytic, 0.0, min_effect=3.0)


# Posterior queries ----------------------------------------------------------------------------------------------------


def test_responsibilities_by_hand():
    model, x = mixture(), torch.randn(6, 2)
    with torch.no_grad():
        model.log_scale.fill_(-20.0)  # a point
        model.mixing.zero_()
    w, mu, s = (values[0].numpy() for values in model.draw(1).values())
    joint = w * stats.norm.pdf(x.numpy()[:, None], mu, s).prod(-1)
    close(model.responsibilities(x), torch.from_numpy(joint / joint.sum(1, keepdims=True)), atol=1e-6)
    close(model.responsibilities(x, num_draws=3).sum(1), torch.ones(6))


def test_samples_have_the_moments_of_the_predictive_law():
    model = mixture()
    draws = model.draw(40_000)
    weights = draws["weights"][..., None]
    first = (weights * draws["means"]).sum(1)
    second = (weights * (draws["means"] ** 2 + draws["scales"] ** 2)).sum(1)
    x = model.sample(40_000)
    assert x.shape == (40_000, 2)
    assert_mean_close(x, first.mean(0), min_effect=0.2)
    assert_mean_close(x.square(), second.mean(0), min_effect=0.5)
    assert_mean_close(model.sample(40_000, mean=True), first.mean(0), min_effect=0.2)


def test_the_summary_is_that_of_the_guide():
    model = mixture(posterior="mean-field")
    mean, sd = model.summary(20_000)["means"]
    close(mean, model.loc[2:8].detach().reshape(3, 2), atol=0.02)
    close(sd, model.log_scale[2:8].detach().exp().reshape(3, 2), atol=0.02)
    assert {name: tuple(pair[0].shape) for name, pair in model.summary(5).items()} == {
        "weights": (3,),
        "means": (3, 2),
        "scales": (3, 2),
    }


def test_config_builds_the_same_model():
    first = mixture(posterior="mean-field", concentration=2, mean_scale=3, num_data=40)
    assert type(first)(**json.loads(json.dumps(first.config))).config == first.config
    second = pv.GaussianMixture(**first.config)
    second.load_state_dict(first.state_dict())
    x = torch.randn(4, 2)
    found = []
    for model in (first, second):
        pyro.set_rng_seed(0)
        found.append(model.responsibilities(x))
    close(*found, atol=0)
    assert second.data_shape == (2,)


def test_one_component_has_no_weights_to_learn():
    model = mixture(num_components=1, data_dim=1)
    assert torch.equal(model.draw(3)["weights"], torch.ones(3, 1))
    pv.fit(model, torch.randn(20, 1), epochs=1, progress=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data_dim": 0}, "data_dim: expected"),
        ({"num_components": 1.5}, "num_components: expected"),
        ({"posterior": "fulll"}, "posterior: expected.*did you mean 'full'"),
        ({"concentration": 0.0}, "concentration: expected a positive"),
        ({"mean_scale": -1.0}, "mean_scale: expected a positive"),
        ({"scale_median": math.nan}, "scale_median: expected a positive"),
        ({"scale_spread": math.inf}, "scale_spread: expected a positive"),
        ({"num_data": 0}, "num_data: expected"),
    ],
)
def test_bad_arguments_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        pv.GaussianMixture(**({"data_dim": 2, "num_components": 3} | options))


@pytest.mark.parametrize("shape", [(10, 3), (10,), (2, 2)])
def test_initialize_refuses(shape):
    with pytest.raises(ValueError, match=r"expected data \(N, 2\), N at least 3, got"):
        mixture().initialize(torch.zeros(shape))


# Learning -------------------------------------------------------------------------------------------------------------


def test_initialize_begins_at_the_clusters():
    x, _, means, scales = planted()
    model = mixture()
    model.initialize(x[torch.randperm(len(x))])
    found = {name: pair[0] for name, pair in model.summary(4000).items()}
    close(found["weights"], torch.full((3,), 1 / 3), atol=0.02)
    close(found["means"], means, atol=0.15)
    close(found["scales"], scales, atol=0.1)


def test_a_cluster_of_one_datum_does_not_spoil_it():
    model = mixture(num_components=2)
    model.initialize(torch.tensor([[0.0, 0.0], [0.1, 0.1], [9.0, 9.0]]))
    assert all(values.isfinite().all() for values in model.draw(5).values())


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_fit_recovers_planted_clusters(posterior):
    x, labels, means, scales = planted()
    model = pv.GaussianMixture(2, 3, posterior=posterior, num_data=len(x))
    model.initialize(x)
    options = {"optimizer": "adam", "batch_size": 60, "epochs": 40, "progress": False}
    for rate in (0.02, 0.002):
        pv.fit(model, x, objective=pv.SGVB(4), learning_rate=rate, **options)
    found = model.summary()
    for name, truth in {"weights": torch.full((3,), 1 / 3), "means": means, "scales": scales}.items():
        mean, sd = found[name]
        assert ((mean - truth).abs() < 5 * sd).all(), name
        assert (sd < 0.1).all(), name
    # The posterior of a mean given its own cluster's data is about N(average, s^2 / n).
    close(found["means"][1], scales / 80**0.5, atol=0.02)
    assert (model.responsibilities(x).argmax(1) == labels).double().mean() > 0.99


def test_a_stored_run_comes_back_with_the_size_of_its_data(tmp_path):
    x, *_ = planted(20)
    model = pv.GaussianMixture(2, 3, posterior="mean-field", concentration=2.0)
    model.initialize(x)
    pv.fit(model, x, epochs=2, run_dir=tmp_path / "run", progress=False)
    assert model.num_data == 60
    again = pv.load_run(tmp_path / "run").program
    assert again.config == model.config
    pyro.set_rng_seed(0)
    first = model.sample(5)
    pyro.set_rng_seed(0)
    close(again.sample(5), first, atol=0)


@pytest.mark.slow
def test_fit_learns_minibatches_as_it_learns_all_data():
    """Without num_data given: fit states it, and the history has the bound of the data set."""
    x, *_ = planted(40)
    found = []
    for size in (30, 120):
        torch.manual_seed(0)
        model = pv.GaussianMixture(2, 3, posterior="mean-field")
        model.initialize(x)
        options = {"optimizer": "adam", "batch_size": size, "num_samples": 120 * 150, "progress": False}
        for rate in (0.02, 0.002):
            run = pv.fit(model, x, objective=pv.SGVB(4), learning_rate=rate, **options)
        found.append(pv.evaluate_bound(model, x, pv.SGVB(500)).mean * 120)
        assert run.history[-1]["dataset_bound"] == pytest.approx(found[-1], abs=10)
    assert found[0] == pytest.approx(found[1], abs=1.0)


def test_the_predictive_density_is_the_mean_over_draws():
    model, x = mixture(), torch.randn(4, 2)
    score = pv.log_marginal(model, x, num_particles=40_000)
    draws = {name: values.unsqueeze(1) for name, values in model.draw(40_000).items()}
    density = model.decode(**draws).log_prob(x).exp()
    assert_mean_close(density, score.values.exp(), min_effect=0.05)


def test_single_precision():
    x, *_ = planted(40)
    torch.set_default_dtype(torch.float32)
    model = pv.GaussianMixture(2, 3)
    model.initialize(x)
    untrained = pv.evaluate_bound(model, x.float(), pv.SGVB(200)).mean
    pv.fit(model, x.float(), optimizer="adam", learning_rate=0.01, batch_size=120, epochs=100, progress=False)
    assert model.draw(2)["means"].dtype == torch.float32
    assert pv.evaluate_bound(model, x.float(), pv.SGVB(200)).mean > untrained


def three_points():
    """Three data, two components, and priors under which the two modes overlap."""
    options = {"concentration": 2.0, "mean_loc": 0.2, "mean_scale": 1.2, "scale_median": 0.7, "scale_spread": 0.5}
    x = torch.tensor([[-0.4], [0.3], [0.9]])
    return pv.GaussianMixture(1, 2, num_data=3, **options), x, options


def test_the_enumerated_evidence_is_the_prior_mean_of_the_likelihood():
    """The oracle against plain Monte Carlo, which shares nothing with it."""
    model, x, options = three_points()
    truth = oracles.mixture_log_evidence(x.numpy(), 2, **options)
    draws = {name: prior.sample((200_000,)).unsqueeze(1) for name, prior in model.priors(x).items()}
    likelihood = model.decode(**draws).log_prob(x).sum(1).exp()
    assert_mean_close(likelihood, math.exp(truth), min_effect=0.05 * math.exp(truth))
    wrong = oracles.mixture_log_evidence(x.numpy(), 2, **(options | {"mean_scale": 1.4}))
    with pytest.raises(AssertionError, match="mean"):
        assert_mean_close(likelihood, math.exp(wrong), min_effect=0.05 * math.exp(truth))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["importance", "ais"])
def test_the_evidence_of_a_data_set_by_enumeration(method):
    model, x, options = three_points()
    with torch.no_grad():
        model.log_scale.fill_(math.log(0.8))
        model.loc.zero_()
        model.loc[1:3].fill_(0.2)
        model.loc[3:5].fill_(math.log(0.7))  # about the prior: both orders of the labels are covered
    truth = oracles.mixture_log_evidence(x.numpy(), 2, **options)
    few = {"num_particles": 50_000} if method == "importance" else {"num_particles": 100, "num_steps": 100}
    score = pv.log_marginal(model, x, of="dataset", method=method, **few)
    assert score.values.shape == (1,)
    assert score.mc_error < 0.05
    assert score.mean == pytest.approx(truth, abs=5 * score.mc_error)
