"""HMC: reversible, volume preserving, and it leaves an asymmetric law as it is."""

import pytest
import torch
from scipy import stats

from pyro_vae import hmc
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
