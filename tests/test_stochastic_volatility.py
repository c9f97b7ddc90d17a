"""Stochastic volatility against the likelihood on a grid of log volatilities."""

import math
import warnings

import pytest
import torch

import pyro_vae as pv
from tests import oracles
from tests.statistics import assert_mean_close

MU, PHI, SIGMA = -1.0, 0.8, 0.5


def close(left, right, atol=1e-10):
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


def model_of(**changes):
    options = {"data_dim": 2, "rnn_dim": 6, "mu": MU, "phi": PHI, "sigma": SIGMA}
    return pv.StochasticVolatility(**(options | changes))


def exact(x, seen):
    """log p(x) of independent series (M, T, D): NaN where nothing was seen."""
    values = torch.where(seen, x, math.nan).movedim(-1, 0)  # (D, M, T)
    found = [[oracles.volatility_log_marginal(row.numpy(), MU, PHI, SIGMA) for row in series] for series in values]
    return torch.tensor(found).sum(0)


def test_importance_weights_have_the_grids_evidence_for_their_mean():
    torch.manual_seed(1)
    model = model_of()
    x, lengths, mask = model.sample(3, 7), torch.tensor([7, 1, 4]), torch.rand(3, 7, 2) < 0.8
    mask[:, 0] = True
    evidence = exact(x, mask & (torch.arange(7)[:, None] < lengths[:, None, None]))
    given = {"x": x, "lengths": lengths, "mask": mask}
    with torch.no_grad():
        weights = pv.log_weights(model.model, model.guide, (), given, num_particles=100_000)
    assert_mean_close((weights.log_w - evidence).exp(), 1.0, min_effect=0.25)
    model.emission.forward = lambda h, inputs=None: torch.distributions.Independent(
        torch.distributions.Normal(0.0, h.exp()), 1
    )  # a planted bug: the variance for the standard deviation
    with torch.no_grad():
        weights = pv.log_weights(model.model, model.guide, (), given, num_particles=100_000)
    with pytest.raises(AssertionError, match="truth"):
        assert_mean_close((weights.log_w - evidence).exp(), 1.0, min_effect=math.inf)


def test_the_start_is_stationary():
    model, n = model_of(), 40_000
    h = model.prior(6).expand((n,)).sample()
    for t in (0, 5):
        assert_mean_close(h[:, t], MU, min_effect=0.05)
        assert_mean_close((h[:, t] - MU).square(), SIGMA**2 / (1 - PHI**2), min_effect=0.05)
    assert_mean_close((h[:, 5] - MU) * (h[:, 4] - MU), PHI * SIGMA**2 / (1 - PHI**2), min_effect=0.05)


def test_student_t_returns_have_their_degrees_of_freedom():
    model = model_of(likelihood="student-t")
    law = model.emission(torch.tensor([[0.0, 2.0]]))
    expected = torch.distributions.StudentT(2 + math.exp(2.0), 0.0, torch.tensor([1.0, math.e]))
    x = torch.tensor([[0.3, -4.0]])
    close(law.log_prob(x), expected.log_prob(x).sum(-1))
    close(model.df, torch.full((2,), 2 + math.exp(2.0)))
    assert model_of().df is None
    assert model.sample(3, 5).shape == (3, 5, 2)


def test_the_analytic_and_the_sampled_bound_agree():
    model, x = model_of(), 0.2 * torch.randn(3, 5, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a Kullback-Leibler divergence that is not in closed form
        pv.SGVB(estimator="B").bound(model.model, model.guide, x)
    with torch.no_grad():
        sampled = pv.log_weights(model.model, model.guide, (x,), num_particles=20_000)
        analytic = pv.log_weights(model.model, model.guide, (x,), num_particles=20_000, analytic_kl=True)
    difference = sampled.log_w - (analytic.log_likelihood["x"] - analytic.analytic_kl["z"])
    assert_mean_close(difference, 0.0, min_effect=0.2)


def test_padding_and_gaps_have_no_influence():
    model, lengths, mask = model_of(), torch.tensor([5, 2]), torch.rand(2, 5, 2) < 0.5
    x, h = torch.randn(2, 5, 2), torch.randn(2, 5, 2)
    seen = mask & (torch.arange(5)[:, None] < lengths[:, None, None])
    other = torch.where(seen, x, 1e3)

    def density(values):
        emitted = model.decode(h, lengths, mask=mask).log_prob(values)
        return model.encode(values, lengths, mask=mask).log_prob(h) + emitted + model.prior(5, lengths).log_prob(h)

    close(density(other), density(x))
    assert (model.encode(other).log_prob(h) - model.encode(x).log_prob(h)).abs().max() > 1e-3


def test_fit_finds_the_parameters():
    torch.manual_seed(0)
    truth = pv.StochasticVolatility(mu=-1.0, phi=0.9, sigma=0.4)
    x, lengths = truth.sample(200, 25), torch.randint(15, 26, (200,))
    model = pv.StochasticVolatility(rnn_dim=12, mu=0.0, phi=0.5, sigma=0.8)
    pv.fit(
        model,
        {"x": x, "lengths": lengths},
        objective=pv.IWAE(8),
        optimizer="adam",
        learning_rate=0.03,
        batch_size=50,
        epochs=40,
        progress=False,
    )

    def likelihood(mu, phi, sigma):
        rows = [x[row, : lengths[row], 0].numpy() for row in range(60)]
        return sum(oracles.volatility_log_marginal(row, mu, phi, sigma, points=100) for row in rows) / len(rows)

    best = likelihood(-1.0, 0.9, 0.4)
    found = likelihood(model.mu.item(), model.phi.item(), model.sigma.item())
    assert found > best - 0.15
    assert likelihood(0.0, 0.5, 0.8) < best - 1
    assert abs(model.mu.item() + 1.0) < 0.3
    assert abs(model.phi.item() - 0.9) < 0.12


def test_config_builds_the_same_architecture(tmp_path):
    model, x = model_of(likelihood="student-t"), model_of().sample(6, 4)
    pv.fit(model, x, epochs=1, run_dir=tmp_path, progress=False)
    stored = pv.load_run(tmp_path).program
    h = torch.randn(6, 4, 2)
    close(stored.encode(x).log_prob(h), model.encode(x).log_prob(h))
    close(stored.sigma, model.sigma)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"phi": 1.0}, "phi: expected a number between -1 and 1, got 1.0"),
        ({"sigma": 0.0}, "sigma: expected a positive number"),
        ({"mu": math.inf}, "mu: expected a finite number"),
        ({"data_dim": 0}, "data_dim: expected a whole number"),
        ({"likelihood": "cauchy"}, "likelihood: expected one of"),
        ({"cell": "rnn"}, "cell: expected one of"),
    ],
)
def test_bad_arguments_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        model_of(**changes)


def test_inputs_are_refused():
    with pytest.raises(ValueError, match="inputs: expected None"):
        model_of().encode(torch.zeros(2, 3, 2), inputs=torch.zeros(2, 3, 1))
