"""log p(x) of sequences by particle filters: values, errors and diagnostics, and who is told what."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import pyro_vae as pv
from pyro_vae import cli, smc
from pyro_vae.evaluation import METHODS, ParticleFilter
from pyro_vae.numerics import log_mean_exp
from pyro_vae.programs import as_program, sequence_laws
from tests.sequences import LinearStateSpace, draws, example, vague
from tests.statistics import assert_mean_close


def data(num_data=5, num_steps=6):
    """Sequences, their lengths, and log p(x) of each."""
    x, lengths = draws(vague(), num_data, num_steps), torch.arange(num_data) * 5 % num_steps + 1
    return (x, lengths), vague().log_marginal(x, lengths)


def score_of(guide, args, **options):
    return pv.log_marginal(LinearStateSpace(vague(), guide), args, method="smc", **options)


# Values and errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"num_particles": 1}, {"num_particles": 7, "batch_size": 2}, {"num_repeats": 2}])
def test_the_exact_smoother_without_resampling_gives_the_kalman_likelihood(options):
    args, exact = data()
    score = score_of("smoother", args, threshold=0.0, **options)
    torch.testing.assert_close(score.values, exact, rtol=0, atol=1e-10)
    assert score.mc_error == pytest.approx(0, abs=1e-10)
    assert not score.diagnostics["resamplings"].any()
    assert score.num_steps.tolist() == args[1].tolist()
    assert (score.values - score_of("amortized", args, num_particles=7).values).abs().min() > 1e-4


def test_many_particles_come_near():
    args, exact = data()
    for guide, options in (("amortized", {}), ("smoother", {"proposal": "prior"}), ("prior", {"threshold": 1.0})):
        score = score_of(guide, args, num_particles=4000, **options)
        torch.testing.assert_close(score.values, exact, rtol=0, atol=0.15)
        assert score.mean == pytest.approx(exact.mean().item(), abs=6 * score.mc_error + 0.01)


def test_the_mean_over_repeats_is_unbiased_and_knows_its_error():
    """Of copies of one sequence: the mean of the estimates of p(x), and their variance, against the jackknife's."""
    x = 1.5 * torch.sin(torch.arange(12.0)).reshape(1, 4, 3)
    exact, program = vague().log_marginal(x), LinearStateSpace(vague(), "prior")
    with torch.no_grad():
        found = ParticleFilter(20, num_repeats=8)(as_program(program), (x.expand(2000, -1, -1),), {}, 10**9)
    assert_mean_close((found.values - exact).exp(), 1.0, min_effect=0.1)
    assert found.variance.mean() == pytest.approx(found.values.var().item(), rel=0.15)


def test_one_filter_does_not_know_its_error():
    args, _ = data()
    score = score_of("prior", args, num_particles=50, num_repeats=1)
    assert math.isnan(score.mc_error)
    assert score.values.isfinite().all()


def test_repeats_are_averaged_as_estimates_of_the_likelihood():
    args, _ = data()
    program = as_program(LinearStateSpace(vague(), "prior"))
    torch.manual_seed(2)
    with torch.no_grad():
        estimate = ParticleFilter(6, num_repeats=3)(program, args, {}, 10**9)
        torch.manual_seed(2)
        runs = [smc.run(sequence_laws(program.model, program.guide, args), 6) for _ in range(3)]
    expected = log_mean_exp(torch.stack([run.log_evidence for run in runs]))
    torch.testing.assert_close(estimate.values, expected)
    torch.testing.assert_close(estimate.diagnostics["ess"], torch.stack([run.ess for run in runs]).amin((0, 1)))
    counts = torch.stack([run.num_resamplings for run in runs]).double().mean(0)
    torch.testing.assert_close(estimate.diagnostics["resamplings"], counts)


@pytest.mark.parametrize("max_elements", [1, 300, 10**7])
def test_memory_bounds_the_batches_and_nothing_else(max_elements, monkeypatch):
    args, exact = data(7)
    seen, original = [], smc.init

    def watched(laws, num_particles):
        seen.append(num_particles * len(laws.x))
        return original(laws, num_particles)

    monkeypatch.setattr(smc, "init", watched)
    score = score_of("smoother", args, threshold=0.0, num_particles=10, num_repeats=1, max_elements=max_elements)
    torch.testing.assert_close(score.values, exact, rtol=0, atol=1e-10)
    assert max(seen) == {1: 10, 300: 10, 10**7: 70}[max_elements]


# Contracts ------------------------------------------------------------------------------------------------------------


def test_a_score_in_shape_and_in_words():
    args, _ = data(7)
    score = score_of("prior", args, num_particles=30, batch_size=3, threshold=0.6)
    assert score.values.shape == (7,)
    assert {name: value.shape for name, value in score.diagnostics.items()} == {"ess": (7,), "resamplings": (7,)}
    assert ((score.diagnostics["ess"] >= 1) & (score.diagnostics["ess"] <= 30)).all()
    assert repr(score).startswith("Score(smc, threshold=0.6, K=30: ")
    assert "median ESS" in repr(score)
    assert "nats per step" in repr(score)


def test_a_seed_decides_and_nothing_is_touched():
    args, _ = data()
    program = LinearStateSpace(vague(), "prior")
    before, generator = {n: t.clone() for n, t in program.state_dict().items()}, torch.get_rng_state()
    first, same, other = (
        pv.log_marginal(program, args, method="smc", num_particles=20, seed=seed).values for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(t, before[n]) for n, t in program.state_dict().items())
    assert not first.requires_grad


def test_data_by_name_and_padding():
    (x, lengths), _ = data()
    plain = score_of("prior", (x, lengths), num_particles=20).values
    assert torch.equal(score_of("prior", {"x": x, "lengths": lengths}, num_particles=20).values, plain)
    filled = torch.where((torch.arange(6) >= lengths[:, None])[..., None], 1e3, x)
    assert torch.equal(score_of("prior", (filled, lengths), num_particles=20).values, plain)


def test_single_precision():
    torch.set_default_dtype(torch.float32)
    args, exact = data()
    score = score_of("smoother", args, threshold=0.0, num_particles=4)
    assert score.values.dtype == torch.float32
    torch.testing.assert_close(score.values, exact, rtol=0, atol=1e-3)


def test_the_prior_needs_no_guide():
    args, exact = data()
    program = pv.Program(LinearStateSpace(vague()).model)
    score = pv.log_marginal(program, args, method="smc", proposal="prior", num_particles=3000)
    torch.testing.assert_close(score.values, exact, rtol=0, atol=0.2)
    with pytest.raises(ValueError, match="this program has no guide"):
        pv.log_marginal(program, args, method="smc", num_particles=30)


def test_check_is_a_short_run():
    args, _ = data()
    ParticleFilter(10**9).check(as_program(LinearStateSpace(vague())), args, {})
    vae = as_program(pv.VAE((3,), 2, (4,)))
    with pytest.raises(ValueError, match="a particle filter expects sequences"):
        ParticleFilter().check(vae, (torch.zeros(5, 3),), {})


def test_programs_without_sequences_are_refused():
    said = r"a particle filter expects sequences: .* 'z' \(Normal\).*'x' \(Bernoulli\).*method=\"importance\""
    with pytest.raises(ValueError, match=said):
        pv.log_marginal(pv.VAE((3,), 2, (4,)), torch.zeros(6, 3), method="smc")
    with pytest.raises(ValueError, match='of="dataset": expected method "importance"'):
        pv.log_marginal(LinearStateSpace(vague()), data()[0], method="smc", of="dataset")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"proposal": "posterior"}, "proposal: expected one of guide, prior"),
        ({"resampling": "residual"}, "resampling: expected one of systematic, multinomial"),
        ({"threshold": 2.0}, "threshold: expected a share from 0 to 1, got 2.0"),
        ({"num_repeats": 0}, "num_repeats: expected a whole number of at least 1"),
        ({"num_particles": 0}, "num_particles: expected a whole number of at least 1"),
        ({"defensive": 0.1}, "'smc': expected options among num_particles, proposal, .*num_repeats; got 'defensive'"),
    ],
)
def test_bad_arguments_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        score_of("prior", data()[0], **options)


def test_it_is_registered():
    assert METHODS["smc"] is ParticleFilter
    assert ParticleFilter() == ParticleFilter()
    assert len({ParticleFilter(), ParticleFilter(1000)}) == 1


# Collapse -------------------------------------------------------------------------------------------------------------


def surprised():
    """Sequences of which the second one jumps, at its third step, where nobody expects it."""
    x = 0.3 * torch.randn(4, 5, 3)
    x[1, 2] = 12.0
    return x


def surprise(x, num_particles=40, **options):
    program = LinearStateSpace(example(), "prior")
    return pv.log_marginal(program, x, method="smc", num_particles=num_particles, **options)


def test_a_filter_that_degenerates_says_where_once():
    x = surprised()
    said = r"degenerates for 1 of 4 sequences of a minibatch, worst at step 3 of its row 1: .* of 1\.\d+ of 40"
    with pytest.warns(UserWarning, match=said) as caught:
        score = surprise(x)
    assert len(caught) == 1
    assert score.diagnostics["ess"].argmin() == 1
    with pytest.warns(UserWarning, match="degenerates") as caught:
        surprise(torch.cat([x, x]), batch_size=2)
    assert len(caught) == 1


@pytest.mark.parametrize("num_particles", [4, 300])
def test_few_particles_and_even_weights_say_nothing(num_particles):
    x = surprised() if num_particles == 4 else 0.3 * torch.randn(4, 5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        surprise(x, num_particles)


def test_a_hundredth_of_many_particles_is_little():
    found = ParticleFilter(1000)
    found._warn_of_collapse(torch.tensor([[1000.0, 10.0], [500.0, 10.0]]))
    with pytest.warns(UserWarning, match=r"for 1 of 2 sequences .* step 2 of its row 0: .* 9\.00 of 1000"):
        found._warn_of_collapse(torch.tensor([[1000.0, 10.0], [9.0, 10.0]]))


# The command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = (torch.rand(30, 4, 3) < 0.4).float()
    data = pv.Dataset("coins", x[:20], x[20:25], x[25:])
    dmm = pv.DeepMarkovModel(3, 2, 4, 4, 5).float()
    pv.fit(dmm, data, epochs=1, batch_size=10, learning_rate=0.01, progress=False, run_dir="r")
    monkeypatch.setattr("pyro_vae.runs.StoredRun.dataset", lambda *_: data)


def test_evaluate(stored):
    torch.set_default_dtype(torch.float32)
    options = ["--method", "smc", "--num-particles", "30", "--json", "s.json"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the particle filter degenerates")
        result = CliRunner().invoke(cli.app, ["evaluate", "r", *options])
    assert result.exit_code == 0, result.output
    assert "Monte Carlo error" in result.output
    written = json.loads(Path("s.json").read_text())
    assert (written["method"], written["num_particles"], written["options"]) == ("smc", 30, {})
    more = ["--proposal", "prior", "--threshold", "0.7", "--resampling", "multinomial", "--num-repeats", "1"]
    result = CliRunner().invoke(cli.app, ["evaluate", "r", *options[:4], *more])
    assert result.exit_code == 0, result.output
    assert "Monte Carlo error" not in result.output


def test_evaluate_refuses_options_of_others(stored):
    result = CliRunner().invoke(cli.app, ["evaluate", "r", "--method", "ais", "--num-repeats", "2"])
    assert result.exit_code == 2
    assert "--num-repeats is not for --method ais" in result.output
