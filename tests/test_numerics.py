"""Log-mean-exp, weight summaries in chunks, standard errors; and that the tests' own assertion and oracles can fail."""

import math

import numpy as np
import pytest
import torch

from pyro_vae.numerics import log_mean_exp, mean_and_standard_error, summarize_weights
from tests import oracles
from tests.statistics import assert_mean_close

K = 11


def uneven(num_data: int = 5) -> torch.Tensor:
    return 3.0 * torch.randn(K, num_data) + torch.linspace(-900.0, 900.0, num_data)


# log_mean_exp ---------------------------------------------------------------------------------------------------------


def test_log_mean_exp_is_the_log_of_the_mean():
    log_w = torch.randn(K, 4)
    torch.testing.assert_close(log_mean_exp(log_w), log_w.exp().mean(0).log(), rtol=0, atol=1e-13)
    torch.testing.assert_close(log_mean_exp(log_w, dim=1), log_w.exp().mean(1).log(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("level", [-1e4, 0.0, 1e4])
def test_log_mean_exp_of_equal_values_is_that_value(level):
    assert log_mean_exp(torch.full((7,), level)).item() == pytest.approx(level, abs=1e-11)


def test_log_mean_exp_of_impossible_particles():
    log_w = torch.tensor([[0.0, -math.inf], [-math.inf, -math.inf]])
    assert log_mean_exp(log_w).tolist() == pytest.approx([-math.log(2), -math.inf])


# summarize_weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[11], [1] * 11, [3, 3, 3, 2], [4, 4, 3], [10, 1], [1, 10]])
def test_chunks_equal_the_whole(sizes):
    log_w = uneven()
    whole, parts = summarize_weights([log_w]), summarize_weights(log_w.split(sizes))
    torch.testing.assert_close(parts.log_mean, whole.log_mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.ess, whole.ess, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.log_mean_variance, whole.log_mean_variance, rtol=1e-11, atol=1e-14)
    assert parts.num_particles == K


def test_a_batch_equals_its_data_one_by_one():
    log_w = uneven()
    batch = summarize_weights([log_w])
    alone = [summarize_weights([log_w[:, [m]]]) for m in range(log_w.shape[1])]
    torch.testing.assert_close(torch.cat([s.log_mean for s in alone]), batch.log_mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([s.ess for s in alone]), batch.ess, rtol=1e-12, atol=0)


def test_summary_against_plain_formulas():
    log_w = torch.randn(K, 6)
    w = log_w.exp().numpy()
    summary = summarize_weights([log_w])
    np.testing.assert_allclose(summary.log_mean, np.log(w.mean(0)), rtol=0, atol=1e-13)
    np.testing.assert_allclose(summary.ess, w.sum(0) ** 2 / (w**2).sum(0), rtol=1e-12)
    without = np.log(np.stack([np.delete(w, k, axis=0).mean(0) for k in range(K)]))  # jackknife
    np.testing.assert_allclose(summary.log_mean_variance, (K - 1) * without.var(0), rtol=1e-9)


def test_variance_of_even_weights_is_the_delta_methods():
    log_w = 0.01 * torch.randn(5000, 3)
    summary = summarize_weights([log_w])
    delta = log_w.exp().var(0, correction=0) / log_w.exp().mean(0) ** 2 / 5000
    torch.testing.assert_close(summary.log_mean_variance, delta, rtol=1e-3, atol=0)


def test_variance_tells_of_one_weight_that_carries_the_sum():
    """Ten nats above the others: left out, the estimate falls by about as much."""
    log_w = torch.zeros(1000, 1)
    log_w[7] = 10.0 + math.log(1000)
    assert 9.5 < summarize_weights([log_w]).log_mean_variance.sqrt().item() < 10.5
    assert summarize_weights([log_w.float() * 100]).log_mean_variance.isfinite().all()


def test_no_variance_from_one_weight():
    assert summarize_weights([torch.zeros(1, 2)]).log_mean_variance.isnan().all()


def test_effective_sample_size_at_its_ends():
    even, one = torch.zeros(K, 1), torch.full((K, 1), -math.inf)
    one[3] = 0.0
    assert summarize_weights([even]).ess.item() == pytest.approx(K, rel=1e-14)
    assert summarize_weights([one]).ess.item() == 1.0
    assert summarize_weights([even]).log_mean_variance.item() == pytest.approx(0.0, abs=1e-15)


def test_sums_are_taken_in_double_precision():
    log_w = torch.randn(100_000, 1, dtype=torch.float32)
    summary = summarize_weights(log_w.split(1000))
    exact = log_w.double().exp().mean().log()
    assert summary.log_mean.item() == pytest.approx(exact.item(), abs=1e-12)


def test_log_mean_variance_is_what_repetitions_vary():
    log_w = 0.5 * torch.randn(400, 5000)  # 5000 repetitions
    summary = summarize_weights([log_w])
    measured = summary.log_mean.var().item()
    assert summary.log_mean_variance.mean().item() == pytest.approx(measured, rel=0.1)


def test_no_chunk_is_refused():
    with pytest.raises(ValueError, match="at least one chunk"):
        summarize_weights([])


def test_mean_and_standard_error():
    values = torch.tensor([1.0, 4.0, 4.0, 7.0], dtype=torch.float32)
    assert mean_and_standard_error(values) == (4.0, pytest.approx(math.sqrt(6.0) / 2))
    mean, error = mean_and_standard_error(torch.tensor([3.0]))
    assert mean == 3.0
    assert math.isnan(error)


# The tests' own tools -------------------------------------------------------------------------------------------------


def test_assert_mean_close_accepts_the_mean_and_rejects_another():
    samples = torch.randn(10_000, 2) + torch.tensor([1.0, -1.0])
    assert_mean_close(samples, torch.tensor([1.0, -1.0]), min_effect=0.06)
    with pytest.raises(AssertionError, match="mean"):
        assert_mean_close(samples, torch.tensor([1.0, -0.9]), min_effect=0.06)


def test_assert_mean_close_rejects_samples_that_see_too_little():
    with pytest.raises(AssertionError, match="blind"):
        assert_mean_close(torch.randn(100), 0.0, min_effect=0.06)


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.full((100,), math.nan)])
def test_assert_mean_close_rejects_few_or_bad_samples(bad):
    with pytest.raises(AssertionError):
        assert_mean_close(bad, 0.0, min_effect=1.0)


def test_oracle_of_evidence_by_quadrature():
    """1-D: the dense Gaussian and the trapezoid rule know nothing of each other."""
    x = torch.tensor([-1.3, 0.2, 2.0])
    joint = oracles.linear_gaussian(torch.tensor([[0.8]]), torch.tensor([0.3]), 0.5)

    def log_likelihood(z):
        return -0.5 * ((x.numpy() - 0.8 * z[:, None] - 0.3) / 0.5) ** 2 - math.log(0.5 * math.sqrt(2 * math.pi))

    by_quadrature = oracles.log_marginal_by_quadrature(log_likelihood)
    np.testing.assert_allclose(joint.last(1).log_prob(x[:, None]), by_quadrature, rtol=0, atol=1e-12)


def test_oracle_of_the_bound_is_the_evidence_at_the_posterior_and_below_it_elsewhere():
    x, joint = oracles.example_data(), oracles.linear_gaussian(*oracles.example())
    posterior, evidence = joint.given_last(x), joint.last(3).log_prob(x)
    torch.testing.assert_close(oracles.elbo(joint, posterior, x), evidence, rtol=0, atol=1e-12)
    wide = oracles.Gaussian(posterior.mean, 4.0 * posterior.cov)
    kl = 2 * (0.5 * (4.0 - 1.0) - math.log(2.0))  # of J = 2 dimensions, each sd doubled
    torch.testing.assert_close(oracles.elbo(joint, wide, x), evidence - kl, rtol=0, atol=1e-12)


def test_oracle_of_the_posterior_by_bayes_rule():
    x, joint = oracles.example_data(), oracles.linear_gaussian(*oracles.example())
    z = torch.randn(4, 2)
    left = joint.log_prob(torch.cat([z, x], 1))
    right = joint.last(3).log_prob(x) + joint.given_last(x).log_prob(z)
    torch.testing.assert_close(left, right, rtol=0, atol=1e-12)
