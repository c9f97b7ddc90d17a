"""HMC: reversible, volume preserving, and it leaves an asymmetric law as it is."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_vae import hmc
from pyro_vae.programs import LatentSpace
from tests.oracles import gamma_poisson
from tests.statistics import assert_mean_close

SHAPE = 3.0


def skewed(z):
    """Independent log-gamma coordinates: asymmetric, so that an error of sign shows."""
    return (SHAPE * z - z.exp()).sum(-1)


def exact_draws(*shape):
    return torch.distributions.Gamma(SHAPE, 1.0).sample(shape).log()


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_leapfrog_is_reversible(batch):
    start, momentum = hmc.init(skewed, exact_draws(*batch, 4)), torch.randn(*batch, 4)
    there, end = hmc.leapfrog(skewed, start, momentum, 0.2, 15)
    back, returned = hmc.leapfrog(skewed, there, -end, 0.2, 15)
    assert (there.position - start.position).abs().max() > 0.1
    torch.testing.assert_close(back.position, start.position, atol=1e-10, rtol=0)
    torch.testing.assert_close(-returned, momentum, atol=1e-10, rtol=0)


def test_leapfrog_preserves_volume():
    def flow(both):
        state, momentum = hmc.leapfrog(skewed, hmc.init(skewed, both[:2]), both[2:], 0.3, 4)
        return torch.cat([state.position, momentum])

    start, step = torch.cat([exact_draws(2), torch.randn(2)]), 1e-5
    columns = [(flow(start + step * e) - flow(start - step * e)) / (2 * step) for e in torch.eye(4)]
    assert torch.stack(columns).det().item() == pytest.approx(1.0, abs=1e-8)


def ks(draws):
    return stats.kstest(draws.exp().numpy(), stats.gamma(SHAPE).cdf).pvalue


def transitions(draws, step, count=5):
    state = hmc.init(skewed, draws)
    for _ in range(count):
        state, _ = step(state)
    return state.position[:, 0]


def test_the_law_is_left_as_it_is():
    draws = exact_draws(20_000, 1)
    moved = transitions(draws, lambda s: hmc.step(skewed, s, step_size=0.6, num_leapfrog=5))
    assert (moved - draws[:, 0]).abs().mean() > 0.3
    assert ks(moved) > 1e-4


def always_accept(state):
    return hmc.leapfrog(skewed, state, torch.randn_like(state.position), 0.9, 5)


def wrong_sign(state):
    moved, _ = hmc.leapfrog(lambda z: skewed(-z), hmc.init(lambda z: skewed(-z), state.position), torch.randn_like(state.position), 0.3, 3)  # fmt: skip # noqa: E501
    return moved, None


@pytest.mark.parametrize("planted", [always_accept, wrong_sign])
def test_planted_bugs_are_seen(planted):
    assert ks(transitions(exact_draws(20_000, 1), planted)) < 1e-4


def test_chains_find_the_law_from_afar_and_do_not_touch_each_other():
    start = torch.full((4000, 1), 4.0)
    state = hmc.init(skewed, start)
    for _ in range(60):
        state, _ = hmc.step(skewed, state, step_size=0.4, num_leapfrog=5)
    assert ks(state.position[:, 0]) > 1e-4
    truth = torch.digamma(torch.tensor(SHAPE)).item()
    assert_mean_close(state.position[:, 0], truth, min_effect=0.1)
    torch.manual_seed(0)
    _, end = hmc.leapfrog(skewed, hmc.init(skewed, start), torch.randn_like(start), 0.4, 5)
    torch.manual_seed(0)
    changed = start.clone()
    changed[1:] += 1.0
    _, other = hmc.leapfrog(skewed, hmc.init(skewed, changed), torch.randn_like(start), 0.4, 5)
    assert end[0] == other[0]


def test_divergent_trajectories_are_refused():
    state = hmc.init(skewed, exact_draws(50, 1))
    moved, info = hmc.step(skewed, state, step_size=1e3, num_leapfrog=10)
    assert not info.accepted.any()
    assert (info.acceptance == 0).all()
    assert torch.equal(moved.position, state.position)


def test_adapted_step_sizes_accept_at_the_wanted_rate():
    """Chains of different scales get different step sizes."""
    scale = torch.tensor([0.1, 1.0, 10.0]).repeat_interleave(200)

    def scaled(z):
        return skewed(z / scale[:, None])

    state = hmc.init(scaled, exact_draws(600, 2) * scale[:, None])
    step_size, state = hmc.adapt_step_size(scaled, state, initial=0.3, num_steps=300, target_accept=0.9)
    rates = []
    for _ in range(30):
        state, info = hmc.step(scaled, state, step_size=step_size)
        rates.append(info.acceptance)
    assert torch.stack(rates).mean().item() == pytest.approx(0.9, abs=0.07)
    by_scale = step_size[:, 0].reshape(3, 200).log().mean(1).exp()
    torch.testing.assert_close(by_scale / by_scale[1], torch.tensor([0.1, 1.0, 10.0]), rtol=0.3, atol=0)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"one value per chain, shape \(3,\)"):
        hmc.init(lambda z: z.sum(), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="0 < target_accept < 1"):
        hmc.adapt_step_size(skewed, hmc.init(skewed, torch.zeros(1)), target_accept=1.5)


# Jitter, and step sizes by dimension ----------------------------------------------------------------------------------

SIZES = torch.tensor([0.25, 0.8], dtype=torch.float64)


@pytest.mark.parametrize("jitter", [0.0, 0.5])
@pytest.mark.parametrize("step_size", [0.6, SIZES], ids=["one", "by dimension"])
def test_the_law_is_left_with_jitter_and_step_sizes_by_dimension(jitter, step_size):
    draws = exact_draws(20_000, 2)
    state = hmc.init(skewed, draws)
    for _ in range(5):
        state, info = hmc.step(skewed, state, step_size=step_size, num_leapfrog=5, jitter=jitter)
        assert 0.5 < info.acceptance.mean() < 1
    moved = state.position
    assert ((moved - draws).abs().mean(0) > 0.3).all()
    for j in range(2):
        assert ks(moved[:, j]) > 1e-4
    assert stats.spearmanr(moved[:, 0], moved[:, 1]).pvalue > 1e-4


def by_the_state(state):
    """Smaller steps to the left: taken after the state was seen."""
    step_size = 0.9 * torch.sigmoid(2 * (state.position - 1))
    return hmc.step(skewed, state, step_size=step_size, num_leapfrog=5)


def by_the_proposal(state):
    """Two jitters, of which the one with the greater acceptance is taken."""
    first, second = (hmc.step(skewed, state, step_size=0.9, num_leapfrog=3, jitter=0.9) for _ in range(2))
    better = first[1].acceptance >= second[1].acceptance
    return hmc._where(better, first[0], second[0]), None


def wide_momenta(state):
    """Momenta of twice the width, with the kinetic energy of unit masses."""
    momentum = 2 * torch.randn_like(state.position)
    proposal, end = hmc.leapfrog(skewed, state, momentum, 0.3, 5)
    error = state.log_density - proposal.log_density + 0.5 * (end.square() - momentum.square()).sum(-1)
    return hmc._where(torch.rand_like(error) < (-error).exp(), proposal, state), None


def scaled_kinetic_energy(state):
    """Step sizes by dimension that enter the kinetic energy a second time."""
    momentum = torch.randn_like(state.position)
    proposal, end = hmc.leapfrog(skewed, state, momentum, SIZES, 5)
    kinetic = 0.5 * ((end.square() - momentum.square()) * SIZES**2).sum(-1)
    error = state.log_density - proposal.log_density + kinetic
    return hmc._where(torch.rand_like(error) < (-error).exp(), proposal, state), None


@pytest.mark.parametrize("planted", [by_the_state, by_the_proposal, wide_momenta, scaled_kinetic_energy])
def test_planted_bugs_of_step_sizes_are_seen(planted):
    state = hmc.init(skewed, exact_draws(20_000, 2))
    for _ in range(5):
        state, _ = planted(state)
    assert min(ks(state.position[:, j]) for j in range(2)) < 1e-4


def test_jitter_is_each_chains_own_and_anew_at_each_step(monkeypatch):
    seen = []

    def spy(log_density, state, momentum, step_size, num_leapfrog, original=hmc.leapfrog):
        seen.append(torch.as_tensor(step_size))
        return original(log_density, state, momentum, step_size, num_leapfrog)

    monkeypatch.setattr(hmc, "leapfrog", spy)
    state = hmc.init(skewed, exact_draws(3000, 2))
    for _ in range(2):
        state, _ = hmc.step(skewed, state, step_size=SIZES, jitter=0.4)
    hmc.step(skewed, state, step_size=SIZES)
    factors = seen[0] / SIZES
    assert factors.shape == (3000, 2)
    torch.testing.assert_close(factors[:, 0], factors[:, 1])
    assert stats.kstest(factors[:, 0], stats.uniform(0.6, 0.4).cdf).pvalue > 1e-4
    assert (seen[0] != seen[1]).all()
    assert seen[2] is SIZES


def test_step_sizes_by_dimension_are_unit_masses_in_another_unit():
    """A diagonal mass matrix: the same trajectory as one step size on coordinates divided by the sizes."""

    def in_units(w):
        return skewed(w * SIZES)

    start, momentum = exact_draws(4, 2), torch.randn(4, 2)
    end, left = hmc.leapfrog(skewed, hmc.init(skewed, start), momentum, SIZES, 7)
    same, right = hmc.leapfrog(in_units, hmc.init(in_units, start / SIZES), momentum, 1.0, 7)
    torch.testing.assert_close(end.position, same.position * SIZES)
    torch.testing.assert_close(left, right)


@pytest.mark.parametrize("scales", [(0.3, 1.0, 3.0), (1.0, 1.0, 1.0)])
def test_diagonal_adaptation_finds_the_scales_and_the_wanted_rate(scales):
    scale = torch.tensor(scales)

    def scaled(z):
        return skewed(z / scale)

    state = hmc.init(scaled, exact_draws(60, 3) * scale)
    step_size, state = hmc.adapt_step_size(scaled, state, num_steps=300, target_accept=0.9, diagonal=True)
    assert step_size.shape == (60, 3)
    found = step_size.log().mean(0).exp()
    torch.testing.assert_close(found / found[1], scale / scale[1], rtol=0.4, atol=0)
    rates = []
    for _ in range(50):
        state, info = hmc.step(scaled, state, step_size=step_size)
        rates.append(info.acceptance)
    assert torch.stack(rates).mean().item() == pytest.approx(0.9, abs=0.07)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("num_steps", [2, 3])
def test_the_shortest_pilot_runs_give_step_sizes(num_steps, diagonal):
    step_size, state = hmc.adapt_step_size(
        skewed, hmc.init(skewed, exact_draws(5, 2)), num_steps=num_steps, diagonal=diagonal
    )
    assert step_size.isfinite().all()
    assert (step_size > 0).all()
    assert state.position.isfinite().all()


def test_chains_that_never_move_get_finite_step_sizes():
    state = hmc.init(skewed, exact_draws(5, 2))
    step_size, _ = hmc.adapt_step_size(skewed, state, initial=1e6, num_steps=4, diagonal=True)
    assert step_size.isfinite().all()


@pytest.mark.parametrize("first", [0.2, 3.0])
@pytest.mark.parametrize("target", [0.6, 0.9])
def test_tuning_follows_the_acceptance(target, first):
    state, step_size = hmc.init(skewed, exact_draws(500, 2)), torch.tensor(first)
    rates = []
    for _ in range(250):
        state, info = hmc.step(skewed, state, step_size=step_size, num_leapfrog=5)
        rates.append(info.acceptance.mean())
        step_size = hmc.tune_step_size(step_size, info.acceptance.mean(), target)
    assert torch.stack(rates[-50:]).mean().item() == pytest.approx(target, abs=0.03)
    each = hmc.tune_step_size(torch.full((3,), 0.2), torch.tensor([0.0, 0.9, 1.0]), 0.9)
    assert each[0] < each[1] < each[2]
    assert each[1].item() == pytest.approx(0.2)


# Constrained posteriors -----------------------------------------------------------------------------------------------


def beta_bernoulli(x):
    """Rows of four coins, one bias each."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Beta(torch.tensor(2.0), 3.0))
        pyro.sample("x", dist.Bernoulli(z[..., None]).expand([*z.shape, 4]).to_event(1), obs=x)


CONJUGATE = {
    gamma_poisson: (torch.tensor([0.0, 3.0, 9.0]), lambda x: stats.gamma(2 + x.item(), scale=1 / 2.5)),
    beta_bernoulli: (
        torch.tensor([[0.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]),
        lambda x: stats.beta(2 + x.sum().item(), 7 - x.sum().item()),
    ),
}


def latent_chains(model, log_joint, count=40):
    x = CONJUGATE[model][0].double()
    space = LatentSpace(model, None, (x,))

    def log_density(u):
        return log_joint(space.density(u))

    state = hmc.init(log_density, space.draw_prior(1500))
    for _ in range(count):
        state, _ = hmc.step(log_density, state, step_size=0.3, num_leapfrog=5, jitter=0.5)
    z = space.density(state.position).latents["z"].reshape(1500, 3)
    return [stats.kstest(z[:, m], CONJUGATE[model][1](x[m]).cdf).pvalue for m in range(3)], z


@pytest.mark.parametrize("model", CONJUGATE)
def test_each_datums_conjugate_posterior_is_found_from_the_prior(model):
    pvalues, z = latent_chains(model, lambda density: density.log_joint)
    assert min(pvalues) > 1e-4
    truth = torch.tensor([CONJUGATE[model][1](x).mean() for x in CONJUGATE[model][0]])
    assert_mean_close(z, truth, min_effect=0.3)
    without_map, _ = latent_chains(model, lambda density: density.log_likelihood + density.log_prior)
    assert min(without_map) < 1e-4
