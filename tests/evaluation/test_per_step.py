"""Sequences of unequal length: bounds and scores per sequence and per step, which padding must not touch."""

import json
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import pyro_vae as pv
from pyro_vae import cli, models
from pyro_vae.numerics import mean_and_standard_error, ratio_and_standard_error


class Level(nn.Module):
    """z ~ N(0, 1) of a sequence, x_t ~ N(z + shift, 1) for each of its steps; the guide is the posterior at shift 0.

    Args:
        leaky: take padding for data.
    """

    def __init__(self, leaky=False):
        super().__init__()
        self.shift, self.leaky = nn.Parameter(torch.zeros(())), leaky

    @property
    def config(self):
        return {"leaky": self.leaky}

    def _steps(self, x, lengths):
        return torch.arange(x.shape[1]) < (lengths[:, None] if not self.leaky else x.shape[1])

    def model(self, x, lengths):
        pyro.module(f"level{id(self)}", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.shift), 1.0))
            law = dist.Normal((z + self.shift)[..., None].expand(*z.shape, x.shape[1]), 1.0)
            pyro.sample("x", law.mask(self._steps(x, lengths)).to_event(1), obs=x)

    def guide(self, x, lengths):
        steps = self._steps(x, lengths).to(x)
        count = steps.sum(-1).expand(len(x)) + 1
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x * steps).sum(-1) / count, count.rsqrt()))


def example(num_data=7, num_steps=5):
    """Sequences padded with zeros, their lengths, and log p(x) of each by a dense Gaussian of its own steps."""
    lengths = torch.arange(num_data) * 3 % num_steps + 1
    x = torch.randn(num_data, num_steps) * (torch.arange(num_steps) < lengths[:, None])
    laws = [dist.MultivariateNormal(torch.zeros(n), torch.eye(n) + 1) for n in lengths.tolist()]
    return (
        x,
        lengths,
        torch.stack([law.log_prob(row[:n]) for law, row, n in zip(laws, x, lengths.tolist(), strict=True)]),
    )


def filled(x, lengths, value=1e3):
    """The same sequences with something else for padding."""
    return x.where(torch.arange(x.shape[1]) < lengths[:, None], torch.as_tensor(value))


def dataset(seed=0):
    torch.manual_seed(seed)
    parts = {}
    for split, size, steps in (("train", 40, 5), ("valid", 9, 3), ("test", 12, 7)):
        parts[split], parts[f"{split}_lengths"], _ = example(size, steps)
    return pv.Dataset("levels", **parts)


# ---- The ratio


def test_the_ratio_is_the_sum_over_the_sum():
    values, counts = torch.tensor([-3.0, -8.0, -1.0]), torch.tensor([2, 4, 1])
    ratio, error = ratio_and_standard_error(values, counts)
    assert ratio == pytest.approx(-12 / 7)
    left = [-3 + 24 / 7, -8 + 48 / 7, -1 + 12 / 7]
    assert error == pytest.approx(math.sqrt(sum(e * e for e in left) / 2 / 3) / (7 / 3))
    assert ratio != pytest.approx((values / counts).mean().item())


def test_with_equal_counts_the_ratio_is_the_mean():
    values = torch.randn(50)
    expected = tuple(number / 4 for number in mean_and_standard_error(values))
    assert ratio_and_standard_error(values, torch.full((50,), 4)) == pytest.approx(expected)
    assert math.isnan(ratio_and_standard_error(values[:1], torch.tensor([4]))[1])


def test_the_ratios_error_is_the_spread_of_repetitions():
    """Of 4,000 sets of 60 pairs; the error of the values' mean over the mean count would be far off."""
    counts = torch.randint(1, 20, (4000, 60))
    values = -2.0 * counts + torch.randn(4000, 60) * counts.double().sqrt()
    found = [ratio_and_standard_error(v, c) for v, c in zip(values, counts, strict=True)]
    spread = torch.tensor([ratio for ratio, _ in found]).std().item()
    assert sum(error for _, error in found) / 4000 == pytest.approx(spread, rel=0.05)
    naive = values[0].std().item() / 60**0.5 / counts[0].double().mean().item()
    assert naive > 2 * spread


# ---- Bounds and scores


@pytest.mark.parametrize("batch_size", [1, 3, 500])
def test_a_bound_per_step_is_the_evidence_over_the_steps(batch_size):
    x, lengths, evidence = example()
    bound = pv.evaluate_bound(Level(), (x, lengths), batch_size=batch_size)
    assert bound.mean == pytest.approx(evidence.mean().item(), abs=1e-10)
    assert bound.per_step == pytest.approx(evidence.sum().item() / lengths.sum().item(), abs=1e-10)
    assert bound.per_step_std_error == pytest.approx(ratio_and_standard_error(evidence, lengths)[1], abs=1e-10)


def test_a_bound_of_batches_and_one_of_pyros():
    x, lengths, evidence = example(8)
    whole = pv.evaluate_bound(Level(), (x, lengths))
    loader = DataLoader(TensorDataset(x, lengths), batch_size=3)
    batches = pv.evaluate_bound(Level(), loader)
    pyros = pv.evaluate_bound(
        Level(), (x, lengths), Trace_ELBO(num_particles=2, vectorize_particles=True), batch_size=3
    )
    per_step = evidence.sum().item() / lengths.sum().item()
    for bound in (whole, batches, pyros):
        assert bound.per_step == pytest.approx(per_step, abs=1e-10)
    assert batches.per_step_std_error == pytest.approx(whole.per_step_std_error)
    sums = [torch.stack([part.sum() for part in column.split(3)]) for column in (evidence, lengths)]
    assert pyros.per_step_std_error == pytest.approx(ratio_and_standard_error(*sums)[1])  # over batches


@pytest.mark.parametrize("options", [{"num_particles": 4}, {"method": "ais", "num_particles": 4, "num_steps": 3}])
def test_a_score_per_step_is_the_evidence_over_the_steps(options):
    x, lengths, evidence = example()
    score = pv.log_marginal(Level(), (x, lengths), batch_size=3, **options)
    assert torch.equal(score.num_steps, lengths)
    torch.testing.assert_close(score.values, evidence, rtol=0, atol=1e-9)
    assert score.per_step == pytest.approx(ratio_and_standard_error(evidence, lengths), abs=1e-9)
    said = f"{score.per_step[0]:.2f} nats per step over {int(lengths.sum())} steps"
    assert said in score.remarks()
    assert said in repr(score)


def test_data_that_are_no_sequences_have_no_steps():
    model, x = pv.LinearGaussian(torch.ones(3, 1)), torch.zeros(4, 3)
    score, bound = pv.log_marginal(model, x, num_particles=2), pv.evaluate_bound(model, x)
    assert score.num_steps is score.per_step is bound.per_step is bound.per_step_std_error is None
    assert "per step" not in repr(score)


def test_padding_has_no_influence_and_a_program_that_lets_it_in_is_seen():
    x, lengths, _ = example()
    other = filled(x, lengths)
    for judge in (pv.evaluate_bound, lambda *args: pv.log_marginal(*args, num_particles=3).values.tolist()):
        assert judge(Level(), (x, lengths)) == judge(Level(), (other, lengths))
        assert judge(Level(leaky=True), (x, lengths)) != judge(Level(leaky=True), (other, lengths))
        assert judge(Level(leaky=True), (x, lengths)) != judge(Level(), (x, lengths))
    padded = (torch.cat([x, torch.full((len(x), 3), 9.0)], 1), lengths)  # padded further
    assert pv.evaluate_bound(Level(), padded).per_step == pytest.approx(
        pv.evaluate_bound(Level(), (x, lengths)).per_step
    )


def test_each_length_stays_with_its_sequence():
    """A shuffled data set has the same values, shuffled: lengths of other rows would give others."""
    x, lengths, evidence = example()
    order = torch.randperm(len(x))
    score = pv.log_marginal(Level(), (x[order], lengths[order]), num_particles=2, batch_size=2)
    torch.testing.assert_close(score.values, evidence[order], rtol=0, atol=1e-9)
    assert torch.equal(score.num_steps, lengths[order])


# ---- Training


@pytest.mark.parametrize("compile", [False, True])
def test_training_on_sequences(compile):
    data = dataset()
    level = Level()
    run = pv.fit(level, data, optimizer="adam", learning_rate=0.05, batch_size=8, epochs=4, patience=5, compile=compile)
    for split in ("train", "valid", "test"):
        lengths, row = getattr(data, f"{split}_lengths"), run.history[-1]
        sequences, steps = len(lengths), lengths.sum().item()
        assert row[f"{split}_bound_per_step"] == pytest.approx(row[f"{split}_bound"] * sequences / steps)
    assert level.shift.item() != 0
    json.dumps(run.history)


def test_training_sees_each_sequence_with_its_own_length_and_no_padding():
    found = []
    for value in (0.0, 1e3):
        data = dataset()
        x = {
            split: filled(getattr(data, split), getattr(data, f"{split}_lengths"), value) for split in ("train", "test")
        }
        level = Level()
        other = pv.Dataset("levels", x["train"], data.valid, x["test"], train_lengths=data.train_lengths,
                           valid_lengths=data.valid_lengths, test_lengths=data.test_lengths)  # fmt: skip
        run = pv.fit(level, other, batch_size=8, epochs=2)
        found.append((level.shift.item(), [{n: v for n, v in row.items() if n != "seconds"} for row in run.history]))
    assert found[0] == found[1]


def test_a_data_set_and_a_tuple_train_alike():
    data = dataset()
    levels = [Level(), Level()]
    test = (data.test, data.test_lengths)
    pv.fit(levels[0], data, epochs=2)
    pv.fit(levels[1], (data.train, data.train_lengths), test=test, epochs=2)
    assert levels[0].shift.item() == levels[1].shift.item()


def test_histories_of_other_data_say_nothing_of_steps():
    vae = pv.VAE((3,), latent_dim=1, hidden_dims=(2,))
    run = pv.fit(vae, torch.zeros(8, 3), epochs=1)
    assert not any("per_step" in name for name in run.history[-1])


# ---- The command line


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A run on sequences in a file, of a model that the package knows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "Level", Level, raising=False)
    monkeypatch.setattr(models, "__all__", [*models.__all__, "Level"])
    data = dataset()
    names = [f"{split}{part}" for split in ("train", "valid", "test") for part in ("", "_lengths")]
    np.savez("levels.npz", **{name: getattr(data, name).numpy() for name in names})
    return pv.fit(Level(), pv.load_dataset("levels.npz"), epochs=1, run_dir="r")


def test_evaluate_says_nats_per_step(stored, tmp_path):
    result = CliRunner().invoke(
        cli.app, ["evaluate", "r", "--num-particles", "3", "--json", "s.json", "--num-data", "5"]
    )
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "s.json").read_text())
    lengths = dataset().test_lengths[:5]
    assert written["num_steps"] == lengths.sum()
    assert written["log_marginal_per_step"] == pytest.approx(written["log_marginal"] * 5 / lengths.sum().item())
    assert "nats per step" in result.output
    assert f"{written['log_marginal_per_step']:.3f}" in result.output
    assert f"{written['bound_per_step']:.3f}" in result.output
    other = CliRunner().invoke(cli.app, ["evaluate", "r", "--num-particles", "3", "--split", "valid"])
    assert f"over {int(dataset().valid_lengths.sum())} steps" in other.output


def test_training_is_reported_by_step(stored, tmp_path, capsys):
    with cli.console.capture() as captured:
        cli._report_training("SGVB", stored, tmp_path)
    assert "nats per step" in captured.get()
    assert f"{stored.history[-1]['test_bound_per_step']:.3f}" in captured.get()


def test_a_stored_run_finds_its_data_again(stored):
    assert len(pv.load_run("r").dataset().train_lengths) == 40


def test_a_vae_is_not_trained_on_padding(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lengths = np.array([1, 2, 3, 4])
    np.savez("few.npz", **{name: np.zeros((4, 4, 2), np.uint8) for name in ("train", "valid", "test")},
             train_lengths=lengths, valid_lengths=lengths, test_lengths=lengths)  # fmt: skip
    result = CliRunner().invoke(cli.app, ["train", "--model", "vae", "--dataset", "few.npz", "--num-samples", "10"])
    assert result.exit_code == 2
    assert "expected a program with an argument `lengths`" in " ".join(result.output.split())


def test_datasets_lists_the_sequences():
    result = CliRunner().invoke(cli.app, ["datasets"])
    assert "T=160x88" in result.output
    assert "T=4,273x88" in result.output
    assert "T=50x256" in result.output
