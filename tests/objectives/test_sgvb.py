"""SGVB: exact where it must be, unbiased in value and gradient, scaled, and the same number as Pyro's own ELBOs."""

import copy
import itertools
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch.distributions import Independent, MultivariateNormal, kl, kl_divergence

import pyro_vae as pv
from pyro_vae import programs
from pyro_vae.objectives import OBJECTIVES, sgvb
from pyro_vae.programs import log_weights
from tests import oracles
from tests.statistics import assert_mean_close

PLAIN = {"param": oracles.with_params, "module": oracles.with_modules, "loop": oracles.without_broadcasting}


def program(form: str, shift: float = 0.0, widening: float = 1.0):
    """The example model with its exact posterior (or a wrong one) as guide, in four forms."""
    if form == "nn.Module":
        return pv.LinearGaussian(*oracles.example(), guide_shift=shift, guide_widening=widening)
    return pv.Program(*PLAIN[form](shift, widening), vectorize=form != "loop")


def bounds(objective, model, guide, x, repetitions=500):
    """Independent values (repetitions, M) of each datum's bound, in one batch of repeated data."""
    with torch.no_grad():
        return objective.bound(model, guide, x.repeat(repetitions, *[1] * (x.ndim - 1))).reshape(repetitions, len(x))


def close(left, right, atol=1e-10):
    torch.testing.assert_close(torch.as_tensor(left), torch.as_tensor(right), rtol=0, atol=atol)


# Zero variance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_particles", [1, 3, 10])
@pytest.mark.parametrize("form", ["nn.Module", *PLAIN])
def test_the_exact_posterior_gives_the_evidence_without_variance(form, num_particles):
    x, p = oracles.example_data(), program(form)
    truth = oracles.exact_log_marginal(x)
    objective = pv.SGVB(num_particles)
    close(log_weights(p.model, p.guide, (x,), num_particles=num_particles).log_w, truth.expand(num_particles, 4))
    close(objective.bound(p.model, p.guide, x), truth)
    close(objective.loss(p.model, p.guide, x), -truth.sum())


def test_estimator_b_without_a_registered_kl_is_estimator_a(monkeypatch):
    """Where none is registered between a multivariate normal and independent normals, B says so, and samples."""
    monkeypatch.delitem(kl._KL_REGISTRY, (MultivariateNormal, Independent))
    monkeypatch.setattr(kl, "_KL_MEMOIZE", {})
    x, (model, guide) = oracles.example_data(), oracles.with_params()
    objective = pv.SGVB(3, estimator="B")
    with pytest.warns(UserWarning, match=r"no analytic KL at sites \['z'\]"):
        value = objective.bound(model, guide, x)
    close(value, oracles.exact_log_marginal(x))
    close(objective.bound(model, guide, x), oracles.exact_log_marginal(x))  # warned once


@pytest.mark.parametrize("form", ["nn.Module", *PLAIN])
@pytest.mark.parametrize("wrong", [{"shift": 0.5}, {"widening": 1.5}])
def test_a_wrong_guide_gives_the_analytic_bound_and_not_the_evidence(form, wrong):
    x, p = oracles.example_data(2), program(form, **wrong)
    posterior = oracles.exact_posterior(x)
    q = oracles.Gaussian(posterior.mean + wrong.get("shift", 0), posterior.cov * wrong.get("widening", 1) ** 2)
    truth = oracles.elbo(oracles.linear_gaussian(*oracles.example()), q, x)
    samples = bounds(pv.SGVB(2), p.model, p.guide, x, 5000)
    assert (truth < oracles.exact_log_marginal(x) - 0.2).all()
    assert_mean_close(samples, truth, min_effect=0.2)
    with pytest.raises(AssertionError, match="mean"):
        assert_mean_close(samples, oracles.exact_log_marginal(x), min_effect=0.2)


# Expectations of value and gradient -----------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["A", "B"])
@pytest.mark.parametrize("num_particles", [1, 40])
def test_the_value_is_unbiased_for_the_bound(estimator, num_particles):
    toy, x = oracles.Amortized(), oracles.example_data(2)
    samples = bounds(pv.SGVB(num_particles, estimator), toy.model, toy.guide, x, 40_000 // num_particles)
    assert_mean_close(samples, toy.elbo(x), min_effect=0.1)


def gradients(objective, toy, x, repetitions=300):
    parameters = [*toy.theta, *toy.phi]
    rows = []
    for _ in range(repetitions):
        loss = objective.differentiable_loss(toy.model, toy.guide, x)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)


def exact_gradient(toy, x):
    grads = torch.autograd.grad(-toy.elbo(x).sum(), [*toy.theta, *toy.phi])
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("estimator", ["A", "B"])
def test_the_gradient_is_unbiased_for_the_gradient_of_the_bound(estimator):
    toy, x = oracles.Amortized(), oracles.example_data(2)
    truth = exact_gradient(toy, x)
    assert len(truth) == 9 + 1 + 6 + 4  # weight, bias; noise; gain; offset, scale
    samples = gradients(pv.SGVB(400, estimator), toy, x)
    assert_mean_close(samples, truth, min_effect=0.2)


BUGS = {
    "log q has the wrong sign": lambda w, toy: replace(
        w,
        log_guide={n: -q for n, q in w.log_guide.items()},
        analytic_kl={n: -kl for n, kl in w.analytic_kl.items()},
    ),
    "no KL": lambda w, toy: replace(
        w,
        log_guide={},
        log_prior={},
        analytic_kl={},
    ),
    "no log-determinant": lambda w, toy: replace(
        w,
        log_guide={n: q + toy.phi[2].sum() for n, q in w.log_guide.items()},
        analytic_kl={n: kl + toy.phi[2].sum() for n, kl in w.analytic_kl.items()},
    ),
    "KL twice": lambda w, toy: replace(
        w,
        log_guide={n: 2 * q for n, q in w.log_guide.items()},
        log_prior={n: 2 * p for n, p in w.log_prior.items()},
        analytic_kl={n: 2 * kl for n, kl in w.analytic_kl.items()},
    ),
}


@pytest.mark.parametrize("estimator", ["A", "B"])
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_rejected(monkeypatch, bug, estimator):
    toy, x = oracles.Amortized(), oracles.example_data(2)
    monkeypatch.setattr(sgvb, "log_weights", lambda *a, **k: BUGS[bug](log_weights(*a, **k), toy))
    objective = pv.SGVB(400, estimator)
    with pytest.raises(AssertionError, match="mean"):
        assert_mean_close(bounds(objective, toy.model, toy.guide, x), toy.elbo(x), min_effect=0.1)
    with pytest.raises(AssertionError, match="mean"):
        assert_mean_close(gradients(objective, toy, x, 100), exact_gradient(toy, x), min_effect=0.4)


def test_more_particles_leave_the_mean_and_divide_the_variance():
    toy, x = oracles.Amortized(), oracles.example_data(1)
    one, ten = (bounds(pv.SGVB(K), toy.model, toy.guide, x, 5000) for K in (1, 10))
    assert (one.var() / ten.var()).item() == pytest.approx(10, rel=0.3)


# Estimator B: where the KL may be analytic ----------------------------------------------------------------------------


def test_a_bottom_up_guide_is_sampled_at_the_lower_layer_with_a_warning():
    toy, x = oracles.TwoLayers(bottom_up=True), torch.tensor([0.7, -1.4])
    objective = pv.SGVB(100, "B")
    with pytest.warns(UserWarning, match=r"\['z1'\]"):
        objective.bound(toy.model, toy.guide, x)
    weights = log_weights(toy.model, toy.guide, (x,), analytic_kl=True)
    assert weights.analytic_kl.keys() == {"z2"}
    assert weights.log_guide.keys() == weights.log_prior.keys() == {"z1"}
    assert_mean_close(bounds(objective, toy.model, toy.guide, x), toy.elbo(x), min_effect=0.1)


def test_a_top_down_guide_is_analytic_at_both_layers():
    toy, x = oracles.TwoLayers(bottom_up=False), torch.tensor([0.7, -1.4])
    weights = log_weights(toy.model, toy.guide, (x,), analytic_kl=True)
    assert weights.analytic_kl.keys() == {"z1", "z2"}
    assert_mean_close(bounds(pv.SGVB(100, "B"), toy.model, toy.guide, x), toy.elbo(x), min_effect=0.1)


@pytest.mark.parametrize("bottom_up", [True, False])
def test_estimator_a_of_two_layers(bottom_up):
    toy, x = oracles.TwoLayers(bottom_up), torch.tensor([0.7, -1.4])
    assert_mean_close(bounds(pv.SGVB(100), toy.model, toy.guide, x), toy.elbo(x), min_effect=0.1)


def test_an_analytic_kl_against_the_ancestral_order_would_be_rejected(monkeypatch):
    """The planted bug: the KL of z1 in closed form although z2 was drawn from it."""
    toy, x = oracles.TwoLayers(bottom_up=True), torch.tensor([0.7, -1.4])

    def everywhere(latent, drawn):
        return {n: programs.sites.sum_per_datum(s, kl_divergence(drawn[n]["fn"], s["fn"])) for n, s in latent.items()}

    monkeypatch.setattr(programs.weights, "_analytic_kl", everywhere)
    with pytest.raises(AssertionError, match="mean"):
        assert_mean_close(bounds(pv.SGVB(100, "B"), toy.model, toy.guide, x), toy.elbo(x), min_effect=0.1)


def test_the_analytic_kl_of_a_vae_by_hand():
    """Appendix B: -KL = 1/2 sum (1 + log sigma^2 - mu^2 - sigma^2)."""
    vae, x = pv.VAE((4,), latent_dim=3, hidden_dims=(5,)), torch.ones(6, 4)
    q = vae.encode(x).base_dist
    kl = -0.5 * (1 + q.scale.square().log() - q.loc.square() - q.scale.square()).sum(-1)
    weights = log_weights(vae.model, vae.guide, (x,), num_particles=2, analytic_kl=True)
    close(weights.analytic_kl["z"], kl.expand(2, 6))


# The minibatch scale --------------------------------------------------------------------------------------------------


def exact_with_plate(num_data, by_index=False):
    """x ~ N(0, 2) with the exact posterior, in a plate of num_data: every loss is exact."""

    def plate(x, index):
        if by_index:
            return pyro.plate("data", num_data, subsample=index)
        return pyro.plate("data", num_data, subsample_size=len(x))

    def model(x, index=None):
        with plate(x, index):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, index=None):
        with plate(x, index):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    return model, guide


@pytest.mark.parametrize("by_index", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_loss_of_all_data_is_the_mean_over_all_minibatches(size, by_index):
    x, (model, guide) = torch.randn(6), exact_with_plate(6, by_index)
    objective = pv.SGVB(2)
    evidence = dist.Normal(0.0, 2**0.5).log_prob(x)
    losses = []
    for rows in itertools.combinations(range(6), size):
        index = torch.tensor(rows)
        losses.append(objective.loss(model, guide, x[index], *((index,) if by_index else ())))
        close(losses[-1], -6 / size * evidence[index].sum())
        close(objective.bound(model, guide, x[index], *((index,) if by_index else ())), evidence[index])
    close(sum(losses) / len(losses), -evidence.sum())


@pytest.mark.parametrize("estimator", ["A", "B"])
def test_a_global_latent_is_counted_once_for_the_data_set(estimator):
    """The mean over the three minibatches of two is the bound of all six data, with KL(q(mu) || p(mu)) once."""
    x, toy = torch.tensor([0.3, -1.2, 2.0, 0.5, 1.1, -0.4]), oracles.SharedMean(6)
    objective = pv.SGVB(50, estimator)
    with torch.no_grad():
        samples = [
            sum(objective.differentiable_loss(toy.model, toy.guide, x[2 * i : 2 * i + 2]) for i in range(3)) / 3
            for _ in range(100)
        ]
        per_datum = [objective.bound(toy.model, toy.guide, x).sum() for _ in range(100)]
    assert_mean_close(torch.stack(samples), -toy.elbo(x), min_effect=0.5)
    assert_mean_close(torch.stack(per_datum), toy.elbo(x), min_effect=0.5)
    global_kl = kl_divergence(dist.Normal(0.2, 0.4), dist.Normal(0.0, 1.0))
    with pytest.raises(AssertionError, match="mean"):  # the bug: the global term scaled by N / M as well
        assert_mean_close(torch.stack(samples) + 2 * global_kl, -toy.elbo(x), min_effect=0.5)


def test_the_bounds_of_a_minibatch_share_the_global_term_evenly():
    """N / M times their sum is minus the loss, for the same noise."""
    x, toy = torch.randn(5), oracles.SharedMean(20)
    found = []
    for value in (pv.SGVB(3).bound, pv.SGVB(3).differentiable_loss):
        pyro.set_rng_seed(5)
        found.append(value(toy.model, toy.guide, x))
    close(4 * found[0].sum(), -found[1])


# Agreement with Pyro --------------------------------------------------------------------------------------------------

MODELS = {
    "vae": lambda: pv.VAE((4,), latent_dim=2, hidden_dims=(5,)),
    "gaussian vae": lambda: pv.VAE((4,), latent_dim=2, hidden_dims=(), likelihood="gaussian"),
    "amortized": oracles.Amortized,
    "global": lambda: oracles.SharedMean(20),
    "top down": lambda: oracles.TwoLayers(bottom_up=False),
    "bottom up": lambda: oracles.TwoLayers(bottom_up=True),
}
DATA = {
    "vae": lambda: torch.randint(0, 2, (5, 4)).double(),
    "gaussian vae": lambda: torch.rand(5, 4),
    "amortized": oracles.example_data,
}


def both(name, ours, theirs):
    p, x = MODELS[name](), DATA.get(name, lambda: torch.randn(5))()
    found = []
    for objective in (ours, theirs):
        objective.loss(p.model, p.guide, x)  # Pyro counts the plates at the first call, with draws of its own
        pyro.set_rng_seed(1)
        found.append(objective.loss(p.model, p.guide, x))
    return found


@pytest.mark.parametrize("num_particles", [1, 7])
@pytest.mark.parametrize("name", MODELS)
def test_estimator_a_is_trace_elbo_draw_by_draw(name, num_particles):
    theirs = Trace_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
    left, right = both(name, pv.SGVB(num_particles), theirs)
    assert left == pytest.approx(right, rel=1e-12)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"bottom up"}))
def test_estimator_b_is_trace_mean_field_elbo_draw_by_draw(name):
    theirs = TraceMeanField_ELBO(num_particles=7, vectorize_particles=True, max_plate_nesting=1)
    left, right = both(name, pv.SGVB(7, "B"), theirs)
    assert left == pytest.approx(right, rel=1e-12)


def test_gradients_equal_pyros():
    toy, x = oracles.Amortized(), oracles.example_data()
    grads = []
    for objective in (pv.SGVB(3), Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)):
        pyro.set_rng_seed(2)
        loss = objective.differentiable_loss(toy.model, toy.guide, x)
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*toy.theta, *toy.phi])]))
    close(*grads)


def test_loss_and_grads_adds_the_gradient_and_gives_the_value():
    toy, x = oracles.Amortized(), oracles.example_data()
    pyro.set_rng_seed(3)
    loss = pv.SGVB(2).differentiable_loss(toy.model, toy.guide, x)
    expected = torch.autograd.grad(loss, toy.phi)
    pyro.set_rng_seed(3)
    value = pv.SGVB(2).loss_and_grads(toy.model, toy.guide, x)
    assert value == loss.item()
    for parameter, gradient in zip(toy.phi, expected, strict=True):
        close(parameter.grad, gradient, atol=0)


# In Pyro's own loop ---------------------------------------------------------------------------------------------------


def moved(module, before):
    return {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}


def snapshot(module):
    return {n: p.detach().clone() for n, p in module.named_parameters()}


@pytest.mark.parametrize("estimator", ["A", "B"])
def test_two_vaes_and_a_copy_train_apart_in_svi(estimator):
    first = pv.VAE((4,), latent_dim=2, hidden_dims=(5,))
    x = torch.randint(0, 2, (10, 4)).double()
    first.model(x), first.guide(x)  # registered before it is copied
    vaes = [first, pv.VAE((4,), latent_dim=2, hidden_dims=(5,)), copy.deepcopy(first)]
    for turn, vae in enumerate(vaes):
        before = [snapshot(v) for v in vaes]
        SVI(vae.model, vae.guide, Adam({"lr": 0.01}), loss=pv.SGVB(estimator=estimator)).step(x)
        for other, v in enumerate(vaes):
            assert moved(v, before[other]) == (set(before[other]) if other == turn else set())


def test_svi_raises_the_bound():
    vae = pv.VAE((6,), latent_dim=1, hidden_dims=(8,))
    x = torch.tensor([[1.0, 1, 1, 0, 0, 0], [0.0, 0, 0, 1, 1, 1]]).repeat(10, 1)
    svi = SVI(vae.model, vae.guide, Adam({"lr": 0.05}), loss=pv.SGVB())
    losses = [svi.step(x) / 20 for _ in range(150)]
    assert sum(losses[:5]) / 5 > 2.5  # 6 log 2 = 4.2 before it has learnt anything
    assert sum(losses[-20:]) / 20 < 1.6  # log 2 = 0.69 is the entropy of the data


# Arguments and refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, -1, 1.5, "3"])
def test_num_particles_out_of_range(number):
    with pytest.raises(ValueError, match="num_particles"):
        pv.SGVB(number)


@pytest.mark.parametrize("estimator", ["C", "a", None])
def test_unknown_estimator(estimator):
    with pytest.raises(ValueError, match="estimator"):
        pv.SGVB(estimator=estimator)


@pytest.mark.parametrize("estimator", ["A", "B"])
def test_a_site_without_reparameterised_draws_is_refused_by_name(estimator):
    def model(x):
        with pyro.plate("data", len(x)):
            on = pyro.sample("on", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(on, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("on", dist.Bernoulli(logits=x))

    with pytest.raises(ValueError, match=r"site 'on'.*Bernoulli"):
        pv.SGVB(estimator=estimator).loss(model, guide, torch.zeros(3))
    assert log_weights(model, guide, (torch.zeros(3),)).log_w.shape == (1, 3)  # its log weights are well defined


@pytest.mark.parametrize("estimator", ["A", "B"])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_kl_weight_multiplies_the_kl_only(estimator, weight):
    toy, x = oracles.Amortized(), oracles.example_data()
    objective = pv.SGVB(3, estimator)
    objective.kl_weight.fill_(weight)
    pyro.set_rng_seed(4)
    value = objective.bound(toy.model, toy.guide, x)
    pyro.set_rng_seed(4)
    terms = log_weights(toy.model, toy.guide, (x,), num_particles=3, analytic_kl=estimator == "B")
    close(value, (terms.log_likelihood["x"] - weight * terms.kl["z"]).mean(0), atol=1e-7)


@pytest.mark.parametrize("estimator", ["A", "B"])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_free_bits_fill_up_what_each_site_costs(estimator, weight):
    """Sum of log p(x | z) - w M sum_l max(lambda, mean KL_l), and nothing of it in a bound that is evaluated."""
    toy, x = oracles.TwoLayers(bottom_up=False), torch.tensor([0.7, -1.4])
    model, guide = toy.model, toy.guide
    torch.manual_seed(0)
    terms = log_weights(model, guide, (x,), num_particles=3, analytic_kl=estimator == "B")
    costs = {site: kl.mean().item() for site, kl in terms.kl.items()}
    assert len(costs) == 2
    between = sum(costs.values()) / 2  # one of the sites costs more, the other less
    for free in (0.0, between, 100.0):
        objective = pv.SGVB(3, estimator)
        objective.kl_weight.fill_(weight)
        objective.free_bits.fill_(free)
        torch.manual_seed(0)
        loss = objective.differentiable_loss(model, guide, x)
        paid = sum(max(free, cost) for cost in costs.values())
        close(loss, -(terms.log_likelihood["x"].mean(0).sum() - weight * len(x) * paid), atol=1e-9)
        torch.manual_seed(0)
        close(objective.bound(model, guide, x), (terms.log_likelihood["x"] - weight * sum(terms.kl.values())).mean(0))


def test_without_free_bits_a_draw_may_cost_less_than_nothing():
    """At the exact posterior, log q - log p(z) of a draw is below 0 where the draw is."""
    toy, x = oracles.TwoLayers(bottom_up=True), torch.tensor([0.7, -1.4])
    below = 0
    for seed in range(20):
        torch.manual_seed(seed)
        terms = log_weights(toy.model, toy.guide, (x,))
        torch.manual_seed(seed)
        loss = pv.SGVB().differentiable_loss(toy.model, toy.guide, x)
        close(loss, -terms.log_w.sum())
        below += any(kl.mean() < 0 for kl in terms.kl.values())
    assert below


def test_free_bits_leave_no_slope_in_a_cost_below_them():
    vae, x = pv.VAE((6,), 2, (3,)), (torch.rand(10, 6) < 0.5).double()
    vae.decoder[0].weight.data.zero_()  # z says nothing, and all that moves q is what it costs
    for free, moves in ((0.0, True), (1e-6, True), (100.0, False)):
        objective = pv.SGVB(estimator="B")
        objective.free_bits.fill_(free)
        loss = objective.differentiable_loss(vae.model, vae.guide, x)
        slopes = torch.autograd.grad(loss, list(vae.encoder.parameters()))
        assert any(bool((slope.abs() > 1e-12).any()) for slope in slopes) == moves


def test_the_registry_names_it():
    assert OBJECTIVES["sgvb"] is pv.SGVB
    assert repr(pv.SGVB(3, "B")) == "SGVB(num_particles=3, estimator='B')"
