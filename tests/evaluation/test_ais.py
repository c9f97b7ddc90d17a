"""Annealed importance sampling: exact at the exact guide, unbiased from afar, and a sandwich with its own reverse."""

import itertools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from scipy import stats

import pyro_vae as pv
from pyro_vae import hmc
from pyro_vae.evaluation import ais
from pyro_vae.evaluation.ais import AIS, Annealing, Sandwich, bidirectional, schedule
from pyro_vae.programs import LatentSpace, guide_of
from tests import oracles
from tests.oracles import gamma_poisson
from tests.statistics import assert_mean_close

PLAIN = {"param": oracles.with_params, "module": oracles.with_modules, "loop": oracles.without_broadcasting}


def close(left, right, atol=1e-10):
    torch.testing.assert_close(torch.as_tensor(left), torch.as_tensor(right), rtol=0, atol=atol)


def rejected(samples, truth=1.0, min_effect=0.5):
    with pytest.raises(AssertionError, match="mean"):
        assert_mean_close(samples, truth, min_effect=min_effect)


def program(form="nn.Module", shift=0.0, widening=1.0):
    if form == "nn.Module":
        return pv.LinearGaussian(*oracles.example(), guide_shift=shift, guide_widening=widening)
    return pv.Program(*PLAIN[form](shift, widening), vectorize=form != "loop")


def score(p, x, **options):
    return pv.log_marginal(p, x, method="ais", **options)


# Zero variance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["nn.Module", *PLAIN])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_the_exact_guide_gives_the_evidence(form, num_steps):
    x = oracles.example_data(4)
    found = score(program(form), x, num_particles=3, num_steps=num_steps)
    close(found.values, oracles.exact_log_marginal(x))
    close(found.diagnostics["ess"], torch.full((4,), 3.0), atol=1e-9)
    assert (found.diagnostics["acceptance"] > 0.2).all()
    if num_steps == 1:
        assert (found.diagnostics["acceptance"] == 1).all()  # nothing was refused
    assert found.mc_error < 1e-9


@pytest.mark.parametrize(
    ("num_particles", "batch_size", "max_elements"), [(1, 100, 10**6), (7, 3, 10**6), (7, 100, 30), (5, 4, 1)]
)
def test_chunks_and_batches_of_the_exact_guide(num_particles, batch_size, max_elements):
    x = oracles.example_data(10)
    found = score(
        program(), x, num_particles=num_particles, num_steps=3, batch_size=batch_size, max_elements=max_elements
    )
    close(found.values, oracles.exact_log_marginal(x))
    assert math.isnan(found.mc_error) == (num_particles == 1)


def test_a_wrong_guide_gives_another_value():
    x = oracles.example_data(10)
    found = score(program(shift=0.5), x, num_particles=2, num_steps=3)
    assert (found.values - oracles.exact_log_marginal(x)).abs().max() > 0.01


# Expectation ----------------------------------------------------------------------------------------------------------

CHAINS = 1500
DATUM = ((0.3, -1.0, 0.8),)
START = {"prior": {}, "guide": {"shift": 0.3, "widening": 1.5}}


def prepared(initial, num_steps=4, x=None):
    """The annealing of repeated data, which are independent repetitions; and their exact log p(x)."""
    model = pv.programs.as_program(program(**START[initial]))
    x = torch.tensor(DATUM).expand(CHAINS, 3) if x is None else x
    space = LatentSpace(model.model, guide_of(model), (x,))
    sampler = AIS(num_steps=num_steps, initial=initial, num_leapfrog=3)
    return sampler.prepare(space), oracles.exact_log_marginal(x), space


def ratios(initial, num_particles=3, num_steps=4):
    annealing, truth, _ = prepared(initial, num_steps)
    log_w, acceptance = annealing.forward(num_particles)
    assert log_w.shape == acceptance.shape == (num_particles, CHAINS)
    return (log_w - truth).exp().mean(0)


@pytest.mark.parametrize("initial", START)
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_the_mean_weight_is_unbiased_for_the_evidence(initial, num_steps):
    assert_mean_close(ratios(initial, num_steps=num_steps), 1.0, min_effect=0.45 if num_steps == 1 else 0.2)


def always_accepted(log_density, state, *, step_size, num_leapfrog):
    moved, _ = hmc.leapfrog(log_density, state, torch.randn_like(state.position), 2.5 * step_size, num_leapfrog)
    return moved, hmc.HMCInfo(torch.ones_like(moved.log_density), torch.ones_like(moved.log_density), None)


def drifting(log_density, state, *, step_size, num_leapfrog):
    moved = hmc.init(log_density, state.position + 0.2)
    return moved, hmc.HMCInfo(torch.ones_like(moved.log_density), torch.ones_like(moved.log_density), None)


def uphill(log_density, state, *, step_size, num_leapfrog):
    """The best of several transitions."""
    moved = hmc.leapfrog(log_density, state, torch.randn_like(state.position), step_size, num_leapfrog)[0]
    for _ in range(6):
        other = hmc.leapfrog(log_density, state, torch.randn_like(state.position), step_size, num_leapfrog)[0]
        moved = hmc._where(other.log_density > moved.log_density, other, moved)
    return moved, hmc.HMCInfo(torch.ones_like(moved.log_density), torch.ones_like(moved.log_density), None)


@pytest.mark.parametrize("initial", START)
@pytest.mark.parametrize("planted", [always_accepted, drifting, uphill])
def test_kernels_that_do_not_leave_the_laws_are_rejected(planted, initial, monkeypatch):
    annealing, truth, _ = prepared(initial, 5)
    monkeypatch.setattr(ais.hmc, "step", planted)
    rejected((annealing.forward(3)[0] - truth).exp().mean(0))


def doubled_likelihood(space, original=ais._from_prior):
    path = original(space)
    return lambda u: (path(u)[0], 2 * path(u)[1])


def not_normalised(space, original=ais._from_guide):
    path = original(space)
    return lambda u: (path(u)[0] + 0.3, path(u)[1] - 0.3)


PATHS = {
    "doubled likelihood": ("prior", "_from_prior", doubled_likelihood),
    "a start that is not normalised": ("guide", "_from_guide", not_normalised),
}


@pytest.mark.parametrize("bug", PATHS)
def test_wrong_paths_are_rejected(bug, monkeypatch):
    initial, name, path = PATHS[bug]
    monkeypatch.setattr(ais, name, path)
    rejected(ratios(initial))


@pytest.mark.parametrize(
    "betas",
    [lambda b: [*b[:-1], 0.8], lambda b: [0.0, *b[1:-1], b[-2]], lambda b: [*b, 1.1]],
    ids=["ends before the posterior", "last law left out", "goes too far"],
)
@pytest.mark.parametrize("initial", START)
def test_wrong_schedules_are_rejected(betas, initial, monkeypatch):
    monkeypatch.setattr(ais, "schedule", lambda n, original=schedule: betas(original(n)))
    rejected(ratios(initial))


def test_weights_of_the_wrong_sign_are_rejected():
    annealing, truth, _ = prepared("prior")
    rejected((-annealing.forward(3)[0] - truth).exp().mean(0).clamp(max=1e3), min_effect=1e3)


def from_its_own_chains(target, state, *, step_size, num_leapfrog, original=hmc.step):
    """Step sizes that follow the chain's own acceptance."""
    trial, info = original(target, state, step_size=step_size, num_leapfrog=num_leapfrog)
    small, _ = original(target, state, step_size=0.02 * step_size, num_leapfrog=num_leapfrog)
    return hmc._where(info.acceptance > 0.9, trial, small), info


def test_step_sizes_adapted_to_the_chains_themselves_are_rejected(monkeypatch):
    annealing, truth, _ = prepared("prior", num_steps=12)
    wide = [3 * size for size in annealing.step_sizes]
    chains = Annealing(annealing.law, annealing.draw, annealing.betas, wide, 1)
    honest, _ = chains.forward(12)
    monkeypatch.setattr(ais.hmc, "step", from_its_own_chains)
    own, _ = chains.forward(12)
    assert_mean_close((honest - truth).exp().mean(0), 1.0, min_effect=0.2)
    rejected((own - truth).exp().mean(0))


@pytest.mark.parametrize("initial", START)
def test_log_marginal_itself_is_unbiased_whatever_the_chunks(initial):
    x = torch.tensor(DATUM).repeat(600, 1)
    truth = oracles.exact_log_marginal(x)
    found = [
        score(program(**START[initial]), x, initial=initial, num_particles=4, num_steps=4, batch_size=batch_size,
              max_elements=max_elements, seed=seed).values - truth
        for seed, (batch_size, max_elements) in enumerate([(600, 10**7), (200, 3 * 450)])
    ]  # fmt: skip
    for values in found:
        assert_mean_close(values.exp(), 1.0, min_effect=0.25)
    assert stats.ks_2samp(*found).pvalue > 1e-4


# More is better -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("initial", ["prior", "guide"])
def test_one_step_is_importance_sampling_in_law(initial):
    x = torch.tensor(DATUM).repeat(2000, 1)
    model = program(shift=0.3, widening=1.5)
    if initial == "prior":

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

        model = pv.Program(model.model, guide)
    annealed = score(model, x, num_steps=1, num_particles=2, initial=initial, seed=1).values
    weighed = pv.log_marginal(model, x, num_particles=2).values
    assert stats.ks_2samp(annealed, weighed).pvalue > 1e-4
    assert stats.ks_2samp(annealed + 0.2, weighed).pvalue < 1e-4


def test_more_steps_are_tighter():
    x = torch.tensor(DATUM).repeat(300, 1)
    truth = oracles.exact_log_marginal(x)
    found = [score(program(), x, initial="prior", num_steps=n, num_particles=1).values - truth for n in (1, 5, 30)]
    deviations, means = ([getattr(values, what)().item() for values in found] for what in ("std", "mean"))
    assert deviations[0] > 1.5 * deviations[1] > 1.5**2 * deviations[2]
    assert means[0] < means[1] - 0.1 < means[2] - 0.2
    assert means[2] > -0.3


def test_far_data_are_found_by_small_steps():
    """Where importance sampling from the prior has no chance."""
    x = torch.tensor([[9.0, 9.0, -9.0]])
    guide = pv.LinearGaussian(torch.zeros(3, 2)).guide
    model = pv.Program(program().model, guide)
    truth = oracles.exact_log_marginal(x).item()
    assert pv.log_marginal(model, x, num_particles=1000).mean < truth - 20
    assert score(model, x, num_steps=100, initial="prior").mean == pytest.approx(truth, abs=0.5)


def test_weights_that_one_chain_carries_are_warned_of():
    x = torch.tensor([[90.0, 90.0, -90.0]])
    with pytest.warns(UserWarning, match="single chains carry the weights.* of 16"):
        score(program(), x, num_particles=16, num_steps=3, initial="prior")


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 1000])
def test_the_schedule_rises_from_the_start_to_the_posterior(num_steps):
    betas = schedule(num_steps)
    assert len(betas) == num_steps + 1
    assert betas[0] == 0.0
    assert betas[-1] == 1.0
    assert all(a < b for a, b in itertools.pairwise(betas))
    close(torch.tensor(betas) + torch.tensor(betas).flip(0), torch.ones(num_steps + 1))


def test_there_is_a_kernel_for_each_law_between_and_its_steps_are_the_pilots():
    annealing, _, space = prepared("guide", num_steps=6, x=oracles.example_data(4))
    assert len(annealing.step_sizes) == 5
    assert all(size.shape == (4, 2) and (size > 0).all() for size in annealing.step_sizes)
    kept = [size.clone() for size in annealing.step_sizes]
    annealing.forward(3)
    annealing.backward(space.draw_guide(3))
    assert all(torch.equal(*pair) for pair in zip(kept, annealing.step_sizes, strict=True))


def test_the_pilot_comes_to_the_wanted_acceptance():
    x = oracles.example_data(20)
    for target in (0.6, 0.9):
        found = score(program(), x, initial="prior", num_steps=60, target_accept=target)
        assert found.diagnostics["acceptance"].mean().item() == pytest.approx(target, abs=0.12)


# Other programs -------------------------------------------------------------------------------------------------------


def test_constrained_latents_without_a_guide():
    """A Poisson of a Gamma is negative binomial."""
    x = torch.tensor([0.0, 2.0, 7.0])
    truth = torch.tensor(stats.nbinom(2, 1.5 / 2.5).logpmf(x.numpy()))
    found = score(pv.Program(gamma_poisson), x, initial="prior", num_steps=40, num_particles=50)
    close(found.values, truth, atol=0.15)
    many = score(pv.Program(gamma_poisson), x.repeat(300), initial="prior", num_steps=5, num_particles=5)
    assert_mean_close((many.values - truth.repeat(300)).exp(), 1.0, min_effect=0.1)


@pytest.mark.filterwarnings("ignore:annealed importance sampling")
def test_a_constraint_that_gives_no_density_makes_weights_of_zero_not_of_nan():
    """z ~ N(0, 1) of which only z > 0 may be: half of the chains begin where the density is zero."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.factor("allowed", torch.where(z > 0, 0.0, -math.inf))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([0.0, 1.0]).repeat(300)
    truth = torch.tensor(stats.norm(0, 2**0.5).logpdf(x) + stats.norm(0, 0.5**0.5).logcdf(x / 2))
    found = score(pv.Program(model), x, initial="prior", num_steps=4, num_particles=8)
    assert_mean_close((found.values - truth).exp(), 1.0, min_effect=0.2)


def test_a_datum_without_density_leaves_the_others():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.factor("tilt", torch.where(x > 0, -math.inf, 0.25))

    with pytest.warns(UserWarning, match="1 of 2 data"):
        found = score(pv.Program(model), torch.tensor([-1.0, 1.0]), initial="prior", num_steps=5)
    assert found.values.tolist() == pytest.approx([0.25, -math.inf])


@pytest.mark.parametrize("form", ["prior masked by the distribution", "prior masked by a handler"])
def test_masked_latents_do_not_matter(form):
    keep = torch.tensor([[True, True], [True, False]])

    def model(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("time", 2, dim=-1):
            prior = dist.Gamma(torch.full((2, 2), 2.0), 1.5)
            if "handler" in form:
                with pyro.poutine.mask(mask=keep):
                    z = pyro.sample("z", prior)
            else:
                z = pyro.sample("z", prior.mask(keep))
            with pyro.poutine.mask(mask=keep):
                pyro.sample("x", dist.Poisson(z), obs=x)

    x = torch.tensor([[0.0, 3.0], [2.0, 1.0]])
    truth = (torch.tensor(stats.nbinom(2, 0.6).logpmf(x.numpy())) * keep).sum(-1)
    found = score(pv.Program(model), x, initial="prior", num_steps=60, num_particles=50)
    close(found.values, truth, atol=0.15)
    with pytest.raises(ValueError, match=r"a mask hides values of the latent sites \['z'\]"):
        pv.log_marginal(pv.Program(model), x, method="posterior-density")


def test_an_automatic_guide_can_only_be_gone_around():
    guide = AutoNormal(gamma_poisson)
    x = torch.tensor([1.0, 4.0])
    guide(x)
    p = pv.Program(gamma_poisson, guide)
    with pytest.raises(ValueError, match=r"auxiliary sites \['z_unconstrained'\]"):
        score(p, x, num_steps=3)
    found = score(p, x, num_steps=40, num_particles=50, initial="prior").values
    close(found, torch.tensor(stats.nbinom(2, 0.6).logpmf(x.numpy())), atol=0.15)


def test_without_a_guide_only_the_prior_will_do():
    p, x = pv.Program(program().model), oracles.example_data(3)
    with pytest.raises(ValueError, match="expected a program with a guide"):
        score(p, x, num_steps=3)
    assert score(p, x, num_steps=3, initial="prior").values.isfinite().all()


def test_discrete_latents_are_refused_by_name():
    with pytest.raises(ValueError, match="site 'z_1' is drawn from Bernoulli"):
        score(pv.SigmoidBeliefNetwork((4,), (2,)), torch.ones(3, 4))


def test_a_collapse_is_told_with_its_figure(monkeypatch):
    def huge(self, path, position, betas):
        sizes = torch.full_like(position[0], 1.0)
        sizes[:2] = 1e3
        return [sizes for _ in betas[1:-1]]

    monkeypatch.setattr(AIS, "_pilot", huge)
    x = oracles.example_data(5)
    with pytest.warns(UserWarning, match=r"the chains of 2 of 5 data hardly move, .* down to 0\.000") as told:
        found = score(program(), x, num_steps=4, initial="prior", num_leapfrog=1)
    assert len(told) == 1
    assert (found.diagnostics["acceptance"][:2] < 0.01).all()
    with pytest.warns(UserWarning, match="the chains of 2 of 5 data"):
        bidirectional(program(), x, num_steps=4, initial="prior", num_leapfrog=1)
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(program(), x, num_steps=4, initial="prior")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_particles": 0}, "num_particles: expected a whole number"),
        ({"num_steps": 0}, "num_steps: expected a whole number"),
        ({"num_leapfrog": 1.5}, "num_leapfrog: expected a whole number"),
        ({"num_pilot": 1}, "num_pilot: expected a whole number of at least 2, got 1"),
        ({"initial": "posterior"}, "initial: expected one of guide, prior, got 'posterior'"),
        ({"target_accept": 0.0}, "target_accept: expected a number between 0 and 1, got 0.0"),
    ],
)
def test_bad_arguments(options, said):
    with pytest.raises(ValueError, match=said):
        AIS(**options)
    with pytest.raises(ValueError, match=said):
        bidirectional(program(), oracles.example_data(), **options)


# Bidirectional --------------------------------------------------------------------------------------------------------


def simulated(monkeypatch):
    """The data that the sandwiches are made of."""
    seen = []

    def dream(*args, original=ais.dream):
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(ais, "dream", dream)
    return seen


def test_the_exact_guide_leaves_no_gap(monkeypatch):
    seen = simulated(monkeypatch)
    sandwich = bidirectional(program(), oracles.example_data(7), num_steps=3, num_particles=2, batch_size=3)
    truth = oracles.exact_log_marginal(torch.cat([dreamt.args[0] for dreamt in seen]))
    close(sandwich.lower, truth)
    close(sandwich.upper, truth)
    assert abs(sandwich.gap) < 1e-9
    assert sandwich.lower_mc_error < 1e-9
    assert sandwich.acceptance.shape == (7,)


@pytest.mark.parametrize("initial", START)
def test_the_truth_lies_between(initial, monkeypatch):
    seen = simulated(monkeypatch)
    model, x = program(**START[initial]), torch.zeros(600, 3)
    options = {"num_steps": 4, "num_particles": 3, "initial": initial}
    sandwich = bidirectional(model, x, batch_size=600, **options)
    truth = oracles.exact_log_marginal(seen[0].args[0])
    assert_mean_close((sandwich.lower - truth).exp(), 1.0, min_effect=0.5)
    assert_mean_close((truth - sandwich.upper).exp(), 1.0, min_effect=0.5)
    assert sandwich.lower.mean() < truth.mean() - 0.03
    assert sandwich.upper.mean() > truth.mean() + 0.03
    assert 0 < sandwich.gap_std_error < sandwich.gap
    finer = bidirectional(model, x, batch_size=600, **options | {"num_steps": 25})
    assert finer.gap < 0.6 * sandwich.gap


def exact_draws(num_particles=3):
    posterior = oracles.exact_posterior(torch.tensor(DATUM))
    return posterior.mean + torch.randn(num_particles, CHAINS, 2) @ torch.linalg.cholesky(posterior.cov).T


def inverse(annealing, truth, draws, **changes):
    """p(x) times the mean inverse weight of chains from given draws back to the start."""
    names = ("law", "draw", "betas", "step_sizes", "num_leapfrog")
    log_w, acceptance = Annealing(**{name: getattr(annealing, name) for name in names} | changes).backward(draws)
    assert log_w.shape == acceptance.shape == draws.shape[:2]
    return (truth - log_w).exp().mean(0)


@pytest.mark.parametrize(("initial", "num_steps"), [("prior", 8), ("guide", 1), ("guide", 2), ("guide", 8)])
def test_backwards_from_exact_draws_the_mean_of_the_inverse_weight_is_the_inverse_evidence(initial, num_steps):
    """Whatever the step sizes: those of the way there make it tight, but any that do not look at the chains will do."""
    annealing, truth, _ = prepared(initial, num_steps)
    assert_mean_close(inverse(annealing, truth, exact_draws()), 1.0, min_effect=0.4)
    reverse = inverse(annealing, truth, exact_draws(), step_sizes=annealing.step_sizes[::-1])
    assert_mean_close(reverse, 1.0, min_effect=0.4)


@pytest.mark.parametrize("initial", START)
def test_backwards_along_a_wrong_way_is_rejected(initial):
    """What is above one on average after large values were cut off was above one."""
    annealing, truth, space = prepared(initial, 2)
    rejected(inverse(annealing, truth, space.draw_prior(3)).clamp(max=10.0), min_effect=2.0)
    annealing, truth, _ = prepared(initial, 8)
    upside_down = inverse(annealing, truth, exact_draws(), betas=[1 - beta for beta in annealing.betas])
    rejected(upside_down.clamp(max=10.0), min_effect=2.0)
    short = inverse(annealing, truth, exact_draws(), betas=annealing.betas[2:], step_sizes=annealing.step_sizes[2:])
    rejected(short, min_effect=2.0)


@pytest.mark.parametrize("planted", [always_accepted, drifting, uphill])
def test_a_reverse_that_moves_by_kernels_of_other_laws_is_rejected(planted, monkeypatch):
    annealing, truth, _ = prepared("guide", 5)
    monkeypatch.setattr(ais.hmc, "step", planted)
    rejected(inverse(annealing, truth, exact_draws()).clamp(max=10.0), min_effect=2.0)


def test_constrained_latents_between_bounds(monkeypatch):
    seen = simulated(monkeypatch)
    sandwich = bidirectional(
        pv.Program(gamma_poisson), torch.zeros(300), initial="prior", num_steps=8, num_particles=3, batch_size=300
    )
    truth = torch.tensor(stats.nbinom(2, 0.6).logpmf(seen[0].args[0].numpy()))
    assert_mean_close((sandwich.lower - truth).exp(), 1.0, min_effect=0.1)
    assert_mean_close((truth - sandwich.upper).exp(), 1.0, min_effect=0.1)
    assert sandwich.lower.mean() < truth.mean() < sandwich.upper.mean()


def test_what_is_observed_is_not_looked_at_but_covariates_are(monkeypatch):
    def model(x, shift):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + shift, 0.5), obs=x)

    seen, shift = simulated(monkeypatch), torch.arange(6.0) * 100
    options = {"initial": "prior", "num_steps": 3, "num_particles": 2, "batch_size": 4}
    found = [
        bidirectional(pv.Program(model), {"shift": shift, "x": torch.full((6,), level)}, **options)
        for level in (0.0, 5.0)
    ]
    assert torch.equal(found[0].lower, found[1].lower)
    assert torch.equal(found[0].upper, found[1].upper)
    dreamt = torch.cat([part.kwargs["x"] for part in seen[:2]])
    assert (dreamt - shift).abs().max() < 6


def test_a_site_that_no_argument_hands_over_is_refused_by_name():
    def model(data):
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    with pytest.raises(ValueError, match="site 'x' has no argument of its name"):
        bidirectional(pv.Program(model), torch.zeros(3), initial="prior")


def test_a_sandwich_in_words():
    sandwich = Sandwich(torch.tensor([-2.0, -1.0]), torch.tensor([-1.5, -0.9]), 0.1, 0.2, torch.ones(2))
    assert repr(sandwich) == "Sandwich(-1.500 <= log p(x) <= -1.200 over 2 simulated data: gap 0.300 ± 0.200 nats)"


def test_a_seed_decides_and_nothing_else_changes():
    model, x = program(shift=0.3), torch.zeros(4, 3)
    state, before = torch.get_rng_state(), {n: t.clone() for n, t in model.state_dict().items()}
    options = {"num_steps": 3, "num_particles": 2}
    first, same, other = (bidirectional(model, x, seed=seed, **options) for seed in (0, 0, 1))
    assert torch.equal(first.lower, same.lower)
    assert torch.equal(first.upper, same.upper)
    assert not torch.equal(first.lower, other.lower)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not first.lower.requires_grad
