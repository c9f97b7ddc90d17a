"""The Pareto shape: known for exactly Pareto weights, not a number where there is no tail."""

import math

import pytest
import torch

from pyro_vae.evaluation.diagnostics import pareto_k


@pytest.mark.parametrize("shape", [0.3, 0.8, 1.5])
def test_recovers_the_shape_of_pareto_weights(shape):
    log_w = shape * torch.distributions.Exponential(1.0).sample((20_000, 5))  # w = U^-k has tail index k
    assert pareto_k(log_w).mean().item() == pytest.approx(shape, abs=0.1)


def test_shift_of_the_log_weights_does_not_matter():
    log_w = torch.randn(500, 3)
    torch.testing.assert_close(pareto_k(log_w), pareto_k(log_w - 1000.0), rtol=1e-6, atol=1e-6)


def test_order_of_data_is_kept_and_hopeless_ones_are_nan():
    log_w = torch.randn(200, 4) * torch.tensor([0.1, 0.0, 3.0, 1.0])
    log_w[5, 3] = -math.inf
    k = pareto_k(log_w)
    assert k[0] < 0.7 < k[2]
    assert k[[1, 3]].isnan().all()


def test_too_few_particles_is_nan():
    assert pareto_k(torch.randn(49, 2)).isnan().all()
