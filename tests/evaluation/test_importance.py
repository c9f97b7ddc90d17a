"""log p(x) by importance sampling: exact where it must be, chunked without error, and honest about its own error."""

import math
import warnings
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_vae as pv
from pyro_vae.evaluation import importance
from pyro_vae.evaluation.marginal import METHODS, make_method
from pyro_vae.programs import log_weights
from tests import oracles
from tests.statistics import assert_mean_close

PLAIN = {"param": oracles.with_params, "module": oracles.with_modules, "loop": oracles.without_broadcasting}


def program(form="nn.Module", shift=0.0, widening=1.0):
    if form == "nn.Module":
        return pv.LinearGaussian(*oracles.example(), guide_shift=shift, guide_widening=widening)
    return pv.Program(*PLAIN[form](shift, widening), vectorize=form != "loop")


def close(left, right, atol=1e-10):
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


# Zero variance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["nn.Module", *PLAIN])
@pytest.mark.parametrize(
    ("num_particles", "batch_size", "max_elements"),
    [(1, 100, 10**6), (7, 100, 10**6), (7, 3, 10**6), (7, 100, 30), (7, 4, 25), (7, 100, 1), (10, 1, 9)],
)
def test_the_exact_posterior_gives_the_evidence(form, num_particles, batch_size, max_elements):
    x = oracles.example_data(10)
    score = pv.log_marginal(
        program(form), x, num_particles=num_particles, batch_size=batch_size, max_elements=max_elements
    )
    close(score.values, oracles.exact_log_marginal(x))
    close(score.diagnostics["ess"], torch.full((10,), float(num_particles)), atol=1e-9)
    assert score.mc_error < 1e-7 if num_particles > 1 else math.isnan(score.mc_error)
    assert score.num_particles == num_particles


def test_a_wrong_guide_gives_another_value_below_the_evidence():
    x = oracles.example_data(10)
    score = pv.log_marginal(program(shift=0.5), x, num_particles=2)
    assert score.mean < oracles.exact_log_marginal(x).mean() - 0.05
    assert (score.diagnostics["ess"] < 2 - 1e-3).all()


# Expectation ----------------------------------------------------------------------------------------------------------

BUGS = {
    "none": lambda w, K: w.log_w.exp().mean(0),
    "K - 1": lambda w, K: w.log_w.exp().sum(0) / (K - 1),
    "log q has the wrong sign": lambda w, K: (w.log_w + 2 * w.log_guide["z"]).exp().mean(0),
    "no log q": lambda w, K: (w.log_w + w.log_guide["z"]).exp().mean(0),
    "no prior": lambda w, K: (w.log_w - w.log_prior["z"]).exp().mean(0),
    "joint weights": lambda w, K: w.log_w.reshape(K, -1, 2).mean(-1, keepdim=True).exp().mean(0).expand(-1, 2),
    "one particle dropped": lambda w, K: w.log_w[1:].exp().sum(0) / K,
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_mean_weight_is_unbiased_for_the_evidence_and_a_planted_bug_is_rejected(bug):
    """E[w] = p(x), with a guide wider than the posterior, so that the weights are bounded."""
    model = program(widening=1.4)
    x, K = torch.tensor([[0.3, -1.0, 0.8], [1.5, 0.4, -0.6]]), 5
    truth = oracles.exact_log_marginal(x)
    with torch.no_grad():
        weights = log_weights(model.model, model.guide, (x.repeat(8000, 1),), num_particles=K)
        weights.log_likelihood["x"] -= truth.repeat(8000)  # relative to p(x): the truth is one
        ratios = BUGS[bug](weights, K).reshape(8000, 2)
    if bug == "none":
        assert_mean_close(ratios, 1.0, min_effect=0.03)
        return
    with pytest.raises(AssertionError, match="mean"):
        assert_mean_close(ratios, 1.0, min_effect=0.5)


@pytest.mark.parametrize("max_elements", [10**6, 3 * 3000], ids=["one chunk", "chunks of 2, 2 and 1"])
def test_log_marginal_itself_is_unbiased_in_the_evidence(max_elements):
    """Repeated data are independent repetitions."""
    x = torch.tensor([[0.3, -1.0, 0.8]])
    score = pv.log_marginal(
        program(widening=1.4), x.repeat(6000, 1), num_particles=5, batch_size=1500, max_elements=max_elements
    )
    ratios = (score.values - oracles.exact_log_marginal(x)).exp()
    assert_mean_close(ratios, 1.0, min_effect=0.05)
    with pytest.raises(AssertionError, match="mean"):
        assert_mean_close(ratios * 5 / 4, 1.0, min_effect=0.05)  # a mean over K - 1


def test_the_value_rises_to_the_evidence_with_more_particles():
    x = oracles.example_data(50)
    means = [pv.log_marginal(program(shift=0.5), x, num_particles=K).mean for K in (1, 10, 10_000)]
    assert means[0] < means[1] < means[2]
    assert means[2] == pytest.approx(oracles.exact_log_marginal(x).mean().item(), abs=0.01)


# Weighting: the reduction of one given matrix -------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
@pytest.mark.parametrize("rows", [1, 4, 9, 25, 10**6])
def test_a_given_matrix_of_weights_is_reduced_exactly(monkeypatch, batch_size, rows):
    """For every chunk of particles and every batch: log (1/K) sum_k w_km of the whole matrix."""
    K, N = 11, 7
    matrix = 3 * torch.randn(K, N) + torch.linspace(-50, 50, N)
    given = [0] * N  # particles of each datum handed out so far

    def handed_out(model, guide, args, kwargs, *, num_particles, latents):
        assert latents is None
        index = args[0].flatten().long()
        start = given[index[0]]
        for i in index:
            given[i] += num_particles
        assert num_particles * len(index) <= max(rows, len(index))
        return SimpleNamespace(log_w=matrix[start : start + num_particles, index], global_sites=[], entangled=())

    model = pv.LinearGaussian(torch.ones(1, 1))
    monkeypatch.setattr(importance, "log_weights", handed_out)
    x = torch.arange(float(N))[:, None]
    score = pv.log_marginal(model, x, num_particles=K, batch_size=batch_size, max_elements=rows, compile=False)
    assert given == [K] * N
    w = (matrix - matrix.max(0).values).exp()
    close(score.values, w.mean(0).log() + matrix.max(0).values, atol=1e-12)
    close(score.diagnostics["ess"], w.sum(0) ** 2 / w.square().sum(0), atol=1e-10)


def test_each_datum_is_independent_of_its_batch():
    """With noise that comes with the data, a batch equals its data one by one."""

    def model(x, noise):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x, noise):
        q = dist.Normal(0.5 * x, 0.8)
        z = q.loc + q.scale * noise
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(z, log_density=q.log_prob(z)))

    p = pv.Program(model, guide)
    x, noise = torch.randn(6), torch.randn(6)
    batch = pv.log_marginal(p, (x, noise), num_particles=1).values
    alone = [pv.log_marginal(p, (x[[m]], noise[[m]]), num_particles=1).values for m in range(6)]
    close(batch, torch.cat(alone), atol=1e-12)


# Errors ---------------------------------------------------------------------------------------------------------------


def test_mc_error_is_what_repetitions_with_other_seeds_vary():
    x, p = oracles.example_data(20), program(widening=1.4, shift=0.2)
    scores = [pv.log_marginal(p, x, num_particles=200, seed=seed) for seed in range(150)]
    means = torch.tensor([s.mean for s in scores])
    claimed = torch.tensor([s.mc_error for s in scores]).square().mean().sqrt()
    assert means.std().item() == pytest.approx(claimed.item(), rel=0.25)  # of 150: sd / sqrt(300) = 6%
    assert len(means.unique()) == 150


def test_std_error_is_over_data():
    x = oracles.example_data(25)
    score = pv.log_marginal(program(), x, num_particles=2)
    truth = oracles.exact_log_marginal(x)
    assert score.mean == pytest.approx(truth.mean().item(), abs=1e-10)
    assert score.std_error == pytest.approx((truth.var(unbiased=True) / 25).sqrt().item(), rel=1e-9)


def test_the_report_says_what_was_done():
    text = repr(pv.log_marginal(program(), oracles.example_data(5), num_particles=3))
    assert all(part in text for part in ("importance", "K=3", "5 data", "ESS 3.0"))


# Nothing changes ------------------------------------------------------------------------------------------------------


class Fragile(nn.Module):
    """A program with everything that an evaluation could change: dropout, batch normalisation, modes that differ."""

    data_shape = (3,)

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.off = nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Dropout(0.5).eval()
        self.mean = nn.Linear(3, 2)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(*z.shape[:-1], 3), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("fragile", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.mean(self.drop(self.norm(x))), 1.0).to_event(1))


def test_log_marginal_changes_nothing_and_is_repeatable():
    p, x = Fragile(), oracles.example_data(8)
    state = {n: t.clone() for n, t in p.state_dict().items()}
    generator = torch.get_rng_state()
    scores = [pv.log_marginal(p, x, num_particles=4, batch_size=3) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(t, state[n]) for n, t in p.state_dict().items())
    assert p.training
    assert p.norm.training
    assert p.drop.training
    assert not p.off.training
    assert all(parameter.grad is None for parameter in p.parameters())
    assert torch.equal(scores[0].values, scores[1].values)
    assert not scores[0].values.requires_grad
    other = pv.log_marginal(p, x, num_particles=4, batch_size=3, seed=1)
    assert not torch.equal(other.values, scores[0].values)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "bridge"}, "method.*importance"),
        ({"num_particles": 0}, "num_particles"),
        ({"num_particles": 2.5}, "num_particles"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_elements": 0}, "max_elements"),
        ({"binarize": "sometimes"}, "binarize"),
    ],
)
def test_bad_arguments_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        pv.log_marginal(program(), oracles.example_data(), **options)


def test_a_global_latent_gives_the_density_that_its_guide_predicts():
    """With q(mu) = N(0.2, 0.4^2), z ~ N(mu, 1) and x ~ N(z, 1)."""
    toy, x = oracles.SharedMean(4), torch.tensor([0.3, -1.0, 0.8, 1.5])
    score = pv.log_marginal(pv.Program(toy.model, toy.guide), x, num_particles=50_000)
    close(score.values, dist.Normal(0.2, (2 + 0.4**2) ** 0.5).log_prob(x), atol=0.05)
    assert score.num_data is None


def test_batches_of_an_iterable_are_refused():
    with pytest.raises(ValueError, match="iterable"):
        pv.log_marginal(program(), torch.utils.data.DataLoader(oracles.example_data(), batch_size=2))


def tilted(tilt):
    """Weights times exp(tilt(x)), so that data choose what goes wrong."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.factor("tilt", tilt(x))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    return pv.Program(model, guide)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused_naming_the_rows(bad):
    p = tilted(lambda x: torch.where(x > 0, bad, 0.0))
    with pytest.raises(ValueError, match=r"2 of 5 data, rows \[2, 4\]"):
        pv.log_marginal(p, torch.tensor([-1.0, -2.0, 1.0, -3.0, 2.0]), num_particles=3, batch_size=2)


def test_a_datum_that_the_model_gives_no_density_has_minus_infinity_and_leaves_the_others():
    score = pv.log_marginal(tilted(lambda x: torch.where(x > 0, -math.inf, 0.25)), torch.tensor([-1.0, 1.0]))
    assert score.values.tolist() == pytest.approx([0.25, -math.inf])
    assert score.mean == -math.inf


SETTINGS = ((1, 50, 0), (3, 7, 0), (1, 50, 1))  # particles, batch, seed


def test_grey_levels_are_drawn_once_whatever_the_particles_and_the_batches():
    """Two scores with one seed are of the same binary images: here p(x) depends on nothing else."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(0.2).expand([6]).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    program, grey = pv.Program(model, guide), torch.rand(50, 6)
    scores = [pv.log_marginal(program, grey, num_particles=k, batch_size=m, seed=s).values for k, m, s in SETTINGS]
    bounds = [pv.evaluate_bound(program, grey, pv.SGVB(k), batch_size=m, seed=s).mean for k, m, s in SETTINGS]
    close(scores[0], scores[1])
    assert bounds[0] == pytest.approx(bounds[1], abs=1e-12)
    assert bounds[0] == pytest.approx(scores[0].mean().item(), abs=1e-12)
    assert (scores[0] - scores[2]).abs().max() > 1  # another seed, other images


# A defensive share of the prior ---------------------------------------------------------------------------------------


def narrow():
    return program(shift=0.3, widening=0.4)


SHARES = {"half": (10, 0.5), "a tenth": (10, 0.1), "at least one": (10, 0.001), "all but one": (10, 0.999)}
COUNTS = {"half": 5, "a tenth": 1, "at least one": 1, "all but one": 9}


@pytest.mark.parametrize("name", SHARES)
def test_the_share_of_the_prior_in_particles(name, monkeypatch):
    drawn = []

    def prior(*args, original=importance.draw_prior):
        drawn.append(args[4])
        return original(*args)

    monkeypatch.setattr(importance, "draw_prior", prior)
    num_particles, share = SHARES[name]
    options = {"num_particles": num_particles, "defensive": share, "max_elements": 3 * 9 * 2}  # three numbers a row
    score = pv.log_marginal(narrow(), oracles.example_data(2), **options)
    assert sum(drawn) == COUNTS[name]
    assert score.num_particles == 10
    assert (score.diagnostics["ess"] <= 10).all()


@pytest.mark.parametrize("max_elements", [10**7, 3 * 4500], ids=["one chunk", "chunks"])
def test_a_guide_that_is_too_narrow_is_made_unbiased_by_the_prior(max_elements):
    x = torch.tensor([[0.3, -1.0, 0.8]]).repeat(3000, 1)
    truth = oracles.exact_log_marginal(x)
    options = {"num_particles": 6, "batch_size": 1500, "max_elements": max_elements}
    ratios = (pv.log_marginal(narrow(), x, defensive=0.5, **options).values - truth).exp()
    assert_mean_close(ratios, 1.0, min_effect=0.15)
    most = dist.Normal(0.0, oracles.NOISE).log_prob(torch.tensor(0.0)) * 3  # of the likelihood
    assert (ratios <= (most - truth).exp() / 0.5 + 1e-9).all()
    alone = (pv.log_marginal(narrow(), x, **options).values - truth).exp()
    assert alone.mean() < 0.9  # most of it in weights that are never seen


MIXTURES = {
    "each by its own proposal": lambda w, share: w.log_w,
    "shares the wrong way round": lambda w, share: (
        w.log_joint - torch.logaddexp(math.log(share) + w.log_q, math.log1p(-share) + w.log_prior["z"])
    ),
    "shares left out": lambda w, share: w.log_joint - torch.logaddexp(w.log_q, w.log_prior["z"]),
}


@pytest.mark.parametrize("bug", MIXTURES)
def test_wrong_mixtures_are_rejected(bug, monkeypatch):
    monkeypatch.setattr(importance, "_defended", MIXTURES[bug])
    x = torch.tensor([[0.3, -1.0, 0.8]]).repeat(3000, 1)
    score = pv.log_marginal(program(shift=0.3), x, num_particles=8, defensive=0.25)
    with pytest.raises(AssertionError, match="mean"):
        assert_mean_close((score.values - oracles.exact_log_marginal(x)).exp(), 1.0, min_effect=0.4)


@pytest.mark.parametrize("max_elements", [10**7, 900])
def test_defended_chunks_are_reduced_exactly(max_elements, monkeypatch):
    """With the mixture's weights of given draws: whatever the chunks, one mean over all particles."""
    seen = []

    def defended(weights, share, original=importance._defended):
        seen.append(original(weights, share))
        return seen[-1]

    monkeypatch.setattr(importance, "_defended", defended)
    x = oracles.example_data(20)
    score = pv.log_marginal(narrow(), x, num_particles=40, defensive=0.3, max_elements=max_elements, batch_size=20)
    close(score.values, torch.cat(seen).logsumexp(0) - math.log(40), atol=1e-12)
    assert (len(seen) == 2) == (max_elements == 10**7)
    assert torch.cat(seen).shape == (40, 20)


def test_a_defensive_share_with_discrete_latents_against_enumeration():
    toy = oracles.BeliefNetwork(4000)
    found = pv.log_marginal(toy, toy.data[0], num_particles=4, defensive=0.5, batch_size=4000)
    assert_mean_close((found.values - toy.log_marginal()).exp(), 1.0, min_effect=0.05)
    network = pv.SigmoidBeliefNetwork((3,), (2, 2))
    x = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    sure = [pv.log_marginal(network, x, num_particles=20_000, defensive=share).values for share in (0.0, 0.5)]
    close(*sure, atol=0.05)


def test_an_automatic_guide_cannot_be_defended():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x, guide = torch.ones(3), AutoNormal(model)
    guide(x)
    assert pv.log_marginal(pv.Program(model, guide), x, num_particles=4).values.isfinite().all()
    with pytest.raises(ValueError, match=r"auxiliary sites \['z_unconstrained'\]"):
        pv.log_marginal(pv.Program(model, guide), x, num_particles=4, defensive=0.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_particles": 1, "defensive": 0.1}, "num_particles: expected at least 2 with a defensive share, got 1"),
        ({"defensive": 1.0}, "defensive: expected a share from 0 to below 1, got 1.0"),
        ({"defensive": -0.1}, "defensive: expected a share"),
        ({"defensive": math.nan}, "defensive: expected a share"),
    ],
)
def test_bad_shares_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        pv.log_marginal(program(), oracles.example_data(), **options)


# What every method keeps to -------------------------------------------------------------------------------------------

SMALL = {
    "importance": {"num_particles": 5},
    "ais": {"num_particles": 3, "num_steps": 3},
    "posterior-density": {"num_particles": 20, "num_chains": 2, "num_warmup": 3, "num_leapfrog": 3},
}
each_method = pytest.mark.parametrize("method", SMALL)


def score_by(method, p, x, **options):
    return pv.log_marginal(p, x, method=method, **SMALL[method] | options)


def test_every_method_is_tried_here():
    assert SMALL.keys() == METHODS.keys() - {"smc"}  # of sequences alone: test_particle_filter.py


@each_method
def test_a_score_in_shape_and_in_words(method):
    x = oracles.example_data(7)
    score = score_by(method, program(), x, batch_size=3)
    assert score.values.shape == (7,)
    assert (score.method, score.num_particles) == (method, SMALL[method]["num_particles"])
    assert all(values.shape == (7,) for values in score.diagnostics.values())
    assert score.std_error == pytest.approx((score.values.var() / 7).sqrt().item())
    assert repr(score).startswith(f"Score({method}, ")
    assert f"K={score.num_particles}: " in repr(score)
    assert all(f"{name}={value}" in repr(score) for name, value in score.options.items())
    assert all(remark in repr(score) for remark in score.remarks())
    assert score.remarks()[0].startswith("acceptance" if method == "posterior-density" else "median ESS")
    assert math.isfinite(score.mc_error)


@each_method
def test_a_seed_decides_and_nothing_is_touched(method):
    p, x = Fragile(), oracles.example_data(5)
    before, generator = {n: t.clone() for n, t in p.state_dict().items()}, torch.get_rng_state()
    first, same, other = (score_by(method, p, x, seed=seed).values for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(t, before[n]) for n, t in p.state_dict().items())
    assert p.norm.training
    assert not p.off.training
    assert all(parameter.grad is None for parameter in p.parameters())
    assert not first.requires_grad


@each_method
def test_data_as_a_dict_and_as_a_data_set(method):
    p, x = program(), oracles.example_data(6)
    plain = score_by(method, p, x).values
    assert torch.equal(score_by(method, p, {"x": x}).values, plain)
    assert torch.equal(score_by(method, p, x.numpy()).values, plain)
    data = pv.Dataset("few", x[:2], x[:3], x, binarize="none")
    assert torch.equal(score_by(method, p, data).values, plain)  # its test split


@each_method
def test_single_precision_programs(method):
    torch.set_default_dtype(torch.float32)
    x = oracles.example_data(4)
    score = score_by(method, pv.LinearGaussian(*oracles.example()), x)
    assert score.values.dtype == torch.float32
    if method != "posterior-density":  # exact at any K
        torch.testing.assert_close(score.values, oracles.exact_log_marginal(x), rtol=0, atol=1e-3)


@each_method
def test_densities_that_are_no_numbers_are_refused_naming_the_rows(method):
    p = tilted(lambda x: torch.where(x > 0, math.nan, 0.0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="annealed importance sampling|Appendix D")
        with pytest.raises(ValueError, match=r"2 of 5 data, rows \[2, 4\]"):
            score_by(method, p, torch.tensor([-1.0, -2.0, 1.0, -3.0, 2.0]), batch_size=2)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("importance", {"num_steps": 3}, r"'importance': expected .* num_particles, defensive; got 'num_steps'"),
        ("ais", {"defensive": 0.1}, r"'ais': expected options among num_particles, num_steps, .*; got 'defensive'"),
        ("posterior-density", {"initial": "prior"}, r"expected options among num_particles, num_chains.*got 'initial'"),
        ("bridge", {}, "method: expected one of importance, ais, posterior-density, smc, got 'bridge'"),
        ("aiss", {}, "did you mean 'ais'"),
    ],
)  # fmt: skip
def test_what_a_method_takes(method, options, said):
    with pytest.raises(ValueError, match=said):
        make_method(method, **options)
    with pytest.raises(ValueError, match=said):
        pv.log_marginal(program(), oracles.example_data(), method=method, **options)


@each_method
def test_methods_are_made_by_name(method):
    made = make_method(method, **SMALL[method])
    assert isinstance(made, METHODS[method])
    assert made.num_particles == SMALL[method]["num_particles"]
    assert make_method(method).num_particles == {"importance": 5000, "ais": 16, "posterior-density": 1000}[method]
    assert make_method(method, 40).num_particles == 40


def test_an_unknown_pareto_k_is_not_a_small_one():
    model = pv.LinearGaussian(torch.ones(3, 1), guide_widening=0.1)
    few, many = (pv.log_marginal(model, torch.randn(20, 3), num_particles=k) for k in (40, 400))
    assert few.num_heavy is None
    assert "Pareto" not in repr(few)
    assert many.num_heavy > 10
