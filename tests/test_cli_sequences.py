"""The command line on sequences: training a deep Markov model, and what can then be asked of the run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae.data.dataset import dataset_of
from pyro_vae.inputs import open_inputs
from pyro_vae.programs import as_program
from pyro_vae.sequence_gallery import SequenceGallery, draw_samples
from tests.test_cli import refused, run

SIZES = ["--latent-dim", 2, "--transition-dim", 4, "--emission-dim", 4, "--rnn-dim", 5]
SMALL = ["--model", "deep-markov", *SIZES, "--epochs", 1, "--no-compile", "--optimizer", "adam"]


@pytest.fixture(autouse=True)
def _single_precision_and_wide_terminal(monkeypatch, tmp_path):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


def done(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def read(path):
    return json.loads(Path(path).read_text())


def table(path, gaps=False):
    """Twenty sequences of 5 to 9 steps of two variables, in a CSV file, maybe with empty cells."""
    rng = np.random.default_rng(0)
    lines = ["sequence,a,b"]
    for number in range(20):
        for step in range(5 + number % 5):
            a, b = np.sin([step / 2, step / 3]) + 0.1 * rng.normal(size=2)
            lines.append(f"{number},{'' if gaps and rng.random() < 0.2 else a},{b}")
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sequences")


@pytest.fixture(scope="module")
def stored(folder):
    """A small run on sequences of unequal length, not to be changed but for its figures."""
    torch.set_default_dtype(torch.float32)
    done("train", *SMALL, "--dataset", table(folder / "whole.csv"), "--run-dir", folder / "whole")
    return folder / "whole"


@pytest.fixture(scope="module")
def gappy(folder):
    torch.set_default_dtype(torch.float32)
    done("train", *SMALL, "--missing", "--dataset", table(folder / "gaps.csv", gaps=True), "--run-dir", folder / "gaps")
    return folder / "gaps"


@pytest.fixture(scope="module")
def images(folder):
    torch.set_default_dtype(torch.float32)
    pv.fit(pv.VAE((8, 8), 2, (8,)), pv.load_dataset("digits"), num_samples=100, run_dir=folder / "images")
    return folder / "images"


# ---- Training


def test_training_says_what_it_trains_and_what_comes_next(folder, stored):
    said = done("train", *SMALL, "--dataset", folder / "whole.csv", "--run-dir", "r")
    assert "a deep Markov model 2 -> 2, gaussian emissions, on whole.csv (16 training sequences)" in said
    assert "nats per step" in said
    assert "next: pyro-vae evaluate r pyro-vae forecast r" in said
    config = json.loads((stored / "config.json").read_text())["program"]
    assert config["type"] == "DeepMarkovModel"
    sizes = {"latent_dim": 2, "transition_dim": 4, "emission_dim": 4, "rnn_dim": 5, "cell": "tanh", "missing": False}
    assert config["config"].items() >= {**sizes, "data_dim": 2, "guide": "st-r", "emission": "gaussian"}.items()


def test_every_option_of_the_model_arrives(folder, stored):
    options = ["--guide", "st-lr", "--emission", "student-t", "--cell", "gru", "--num-flows", 1, "--missing"]
    done("train", *SMALL, *options, "--dataset", folder / "whole.csv", "--run-dir", "r")
    config = read("r/config.json")["program"]["config"]
    wanted = {"guide": "st-lr", "emission": "student-t", "cell": "gru", "num_flows": 1, "missing": True}
    assert config.items() >= wanted.items()


def test_binary_data_have_bernoulli_emissions_and_the_papers_sizes():
    done(
        "train", "--model", "deep-markov", "--dataset", "bouncing-balls", "--num-samples", 2, "--batch-size", 2,
        "--no-compile", "--run-dir", "r", "--rnn-dim", 4, "--evaluate-every", 2,
    )  # fmt: skip
    config = read("r/config.json")["program"]["config"]
    sizes = {"data_dim": 256, "latent_dim": 100, "transition_dim": 200, "emission_dim": 100, "rnn_dim": 4}
    assert config.items() >= {**sizes, "emission": "bernoulli"}.items()


def test_config_file_resume_and_fivo(folder, stored, tmp_path):
    lines = ['model = "deep-markov"', f'dataset = "{folder / "whole.csv"}"', "rnn-dim = 5", "latent_dim = 2"]
    lines += ["transition-dim = 4", "emission-dim = 4", 'objective = "fivo"', "threshold = 0.7", "compile = false"]
    (tmp_path / "c.toml").write_text("\n".join(lines))
    done("train", "--config", "c.toml", "--epochs", 2, "--run-dir", "straight")
    done("train", "--config", "c.toml", "--epochs", 1, "--run-dir", "parts")
    done("train", "--resume", "parts", "--epochs", 2)
    a, b = (pv.load_run(path).program.state_dict() for path in ("straight", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    objective = json.loads((tmp_path / "parts/config.json").read_text())["objective"]
    assert objective["type"] == "FIVO"
    assert objective["config"]["threshold"] == 0.7
    (tmp_path / "c.toml").write_text('model = "deep-markov"\nhidden-dims = [3]\n')
    assert "--hidden-dims is for --model vae" in refused("train", "--config", "c.toml", "--run-dir", "r")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "pendulum"], "pendulum holds sequences: expected --model deep-markov"),
        (["--dataset", "digits", "--model", "deep-markov"], "digits holds no sequences, but data of shape (8, 8)"),
        (["--model", "deep-markow"], "--model: expected one of vae, hierarchical, deep-markov, got 'deep-markow'"),
        (["--model", "deep-markov", "--bayesian", "all"], "--bayesian is for --model vae, got --model deep-markov"),
        (["--model", "deep-markov", "--learn-prior"], "--learn-prior is for --model vae"),
        (["--model", "deep-markov", "--likelihood", "gaussian"], "--likelihood is for --model vae"),
        (["--rnn-dim", "3"], "--rnn-dim is for --model deep-markov, got --model vae"),
        (["--missing"], "--missing is for --model deep-markov"),
        (["--dataset", "pendulum", "--model", "deep-markov", "--guide", "st"], "guide: expected one of st-r, st-l"),
        (["--dataset", "pendulum", "--model", "deep-markov", "--emission", "normal"], "emission: expected one of"),
        (["--dataset", "pendulum", "--model", "deep-markov", "--latent-dim", "0"], "latent_dim: expected"),
        (["--dataset", "pendulum", *map(str, SMALL), "--emission", "bernoulli"], "expected values in [0, 1]"),
        (["--objective", "fivo", "--alpha", "0.5"], "options are: --num-particles, --threshold, --resampling"),
        (["--threshold", "0.5"], "--threshold is not for --objective sgvb"),
    ],
)
def test_bad_options_of_training(tmp_path, arguments, message):
    assert message in refused("train", *arguments, "--run-dir", "r")
    assert not (tmp_path / "r").exists()


def test_flat_data_and_images_in_files_are_no_sequences(tmp_path):
    np.save(tmp_path / "u.npy", np.zeros((20, 6), "f4"))
    said = refused("train", *SMALL, "--dataset", tmp_path / "u.npy", "--run-dir", "r")
    assert "u.npy holds no sequences, but data of shape (6,)" in said


# ---- Questions to a run


@pytest.mark.parametrize("command", ["forecast", "smooth", "filter", "fill", "sample"])
def test_every_command_has_help_with_an_example(command):
    assert f"Example: pyro-vae {command}" in done(command, "--help")


def loaded(file):
    with np.load(file) as arrays:
        return dict(arrays)


def test_evaluation_by_every_scorer_that_takes_sequences(stored):
    for method, options in (("importance", []), ("smc", ["--proposal", "prior"]), ("ais", ["--num-steps", 3])):
        few = ["--num-particles", 3, "--method", method, *options, "--json", f"{method}.json"]
        assert "nats per step" in done("evaluate", stored, *few)
        assert read(f"{method}.json")["log_marginal_per_step"] < 10


def test_forecasts_beside_the_truth(stored):
    said = done("forecast", stored, "--split", "train", "--rows", "2,0", "--start", 3, "--num-samples", 20)
    found = loaded(stored / "figures/forecast.npz")
    data = pv.load_run(stored).dataset()
    lengths = data.train_lengths[[2, 0]]
    horizon = int(lengths.max()) - 3
    assert found["draws"].shape == (20, 2, horizon, 2)
    assert found["quantiles"].shape == (2, 5, horizon, 2)
    assert found["rows"].tolist() == [2, 0]
    assert found["start"].tolist() == [3, 3]
    np.testing.assert_allclose(found["mean"], found["draws"].mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["quantiles"][:, 2], np.median(found["draws"], 0), rtol=1e-6)
    for place, row in enumerate((2, 0)):
        known = int(lengths[place])
        np.testing.assert_array_equal(found["history"][place], data.train[row, :3])
        np.testing.assert_array_equal(found["truth"][place, : known - 3], data.train[row, 3:known])
        assert np.isnan(found["truth"][place, known - 3 :]).all()
        assert (stored / f"figures/forecast-row{row}.png").exists()
    assert "wrote" in said
    assert "of them lie in the 90 % intervals" in said
    model = pv.load_run(stored).program
    torch.manual_seed(0)
    wanted = model.forecast(data.train[[2], :3], horizon, num_samples=20)
    np.testing.assert_array_equal(found["draws"][:, :1], wanted.numpy())  # of nothing that was held back


def test_forecasts_beyond_the_end_do_as_the_model_does(stored):
    done("forecast", stored, "--rows", 0, "--horizon", 4, "--num-samples", 50, "--output", "f.npz", "--seed", 3)
    found, data, model = loaded("f.npz"), pv.load_run(stored).dataset(), pv.load_run(stored).program
    known = int(data.test_lengths[0])
    assert found["start"].tolist() == [known]
    assert np.isnan(found["truth"]).all()
    torch.manual_seed(3)
    wanted = model.forecast(data.test[:1, :known], 4, num_samples=50)
    np.testing.assert_array_equal(found["draws"], wanted.numpy())
    done("forecast", stored, "--rows", 0, "--horizon", 4, "--num-samples", 50, "--output", "g.npz", "--seed", 3)
    np.testing.assert_array_equal(loaded("g.npz")["draws"], found["draws"])


def test_smoothed_and_filtered_latents(stored):
    lengths = pv.load_run(stored).dataset().test_lengths
    steps = int(lengths.max())
    assert done("smooth", stored, "--latents", 1, "--num-samples", 7).count("wrote") == 1 + len(lengths)
    done("filter", stored, "--num-samples", 7, "--num-particles", 30)
    for name in ("smooth", "filter"):
        found = loaded(stored / f"figures/{name}.npz")
        assert found["draws"].shape == (7, len(lengths), steps, 2)
        for row, length in enumerate(lengths):
            assert np.isfinite(found["mean"][row, :length]).all()
            assert np.isnan(found["mean"][row, length:]).all()
    assert found["log_evidence"].shape == lengths.shape
    assert np.nanmax(found["ess"]) <= 30.001


def test_the_three_proposals_of_smoothing_differ(stored):
    draws = []
    for options in ([], ["--num-particles", 20], ["--proposal", "prior"]):
        done("smooth", stored, *options, "--rows", 0, "--output", "s.npz")
        draws.append(loaded("s.npz")["mean"])
    assert not np.allclose(draws[0], draws[1])
    assert not np.allclose(draws[1], draws[2])


def test_dropped_steps_are_filled_and_the_rest_is_kept(stored):
    said = done("fill", stored, "--drop", 0.4, "--split", "train", "--rows", 0, "--rows", 4, "--num-samples", 9)
    assert "the guide was not trained on gaps" in said
    assert "values that were hidden" in said
    found = loaded(stored / "figures/fill.npz")
    x, lengths = pv.load_run(stored).dataset().train, pv.load_run(stored).dataset().train_lengths
    for place, row in enumerate((0, 4)):
        length = int(lengths[row])
        seen = found["observed"][place, :length]
        assert (~seen.all(-1)).sum() == round(0.4 * length)
        drawn = found["draws"][:, place, :length]
        np.testing.assert_array_equal(drawn[:, seen], np.tile(x[row, :length][seen].numpy(), (9, 1)))
        assert (drawn[:, ~seen].std(0) > 0).all()
        np.testing.assert_array_equal(found["truth"][place, :length], x[row, :length])


def test_a_mask_of_the_split_or_of_the_rows(stored):
    x = pv.load_run(stored).dataset().test
    mask = np.ones(x.shape[:2], bool)
    mask[1, 2] = False
    for name, given in (("whole", mask), ("elements", mask[..., None].repeat(2, -1)), ("row", mask[1:])):
        np.save("m.npy", given)
        done("fill", stored, "--mask", "m.npy", "--rows", 1, "--output", f"{name}.npz", "--proposal", "guide")
    found = [loaded(f"{name}.npz") for name in ("whole", "elements", "row")]
    assert not found[0]["observed"][0, 2].any()
    assert found[0]["observed"].sum() == found[0]["observed"].size - 2
    for other in found[1:]:
        np.testing.assert_array_equal(other["draws"], found[0]["draws"])


def test_data_with_gaps_from_training_to_filling(gappy):
    data = pv.load_run(gappy).dataset()
    assert data.train.isnan().any()
    done("evaluate", gappy, "--num-particles", 3)
    for command in ("forecast", "smooth", "filter"):
        assert "not trained on gaps" not in done(command, gappy, "--split", "train", "--rows", 0)
    said = done("fill", gappy, "--split", "train", "--rows", "0,1,2")
    assert "not trained on gaps" not in said
    found = loaded(gappy / "figures/fill.npz")
    gaps = data.train[:3].isnan().numpy()
    assert np.isfinite(found["draws"][:, gaps]).all()
    np.testing.assert_array_equal(~found["observed"][:, : gaps.shape[1]], gaps[:, : found["observed"].shape[1]])


def test_gaps_without_missing_are_trained_on_with_a_word(folder, gappy):
    said = done("train", *SMALL, "--dataset", folder / "gaps.csv", "--run-dir", "r")
    assert "gaps.csv has gaps: with --missing the guide is told where" in said
    assert "not trained on gaps" in done("smooth", "r", "--split", "train", "--rows", 0)
    assert "not trained on gaps" in done("forecast", "r", "--split", "train", "--rows", 0)


def test_a_data_set_with_gaps_gives_its_mask_to_programs_that_take_one():
    x = np.ones((6, 3, 2), "f4")
    x[2, 1, 0] = np.nan
    data = dataset_of("d", {**dict.fromkeys(("train", "valid", "test"), x), "train_lengths": np.full(6, 3)})
    inputs = open_inputs(as_program(pv.DeepMarkovModel(2, 2, 4, 4, 5, emission="gaussian")), data)
    columns = inputs.tensors().rows(slice(None))
    assert torch.equal(columns["mask"], torch.from_numpy(np.isfinite(x)))
    assert not columns["x"][2, 1, 0]
    with pytest.raises(ValueError, match="NaN"):
        open_inputs(as_program(pv.VAE((3, 2), 2, (4,), likelihood="gaussian")), data)


def test_samples_are_arrays_and_figures(stored):
    said = done("sample", stored, "--num", 5, "--num-steps", 6)
    assert "samples.npy" in said
    assert "samples.png" in said
    assert np.load(stored / "figures/samples.npy").shape == (5, 6, 2)
    assert done("sample", stored, "--num", 2, "--output", "x.npy", "--draw") == "wrote x.npy"
    assert np.load("x.npy").shape == (2, 100, 2)


def test_samples_of_88_keys_are_piano_rolls():
    rolls = draw_samples(np.zeros((6, 9, 88)))
    assert [axes.get_title(loc="left") for axes in rolls.axes] == [f"sample {n}" for n in range(4)]
    assert all(axes.images for axes in rolls.axes)
    assert len(draw_samples(np.zeros((6, 9, 3))).axes) == 3


def test_piano_rolls_of_a_run(tmp_path):
    rolls = (np.random.default_rng(0).random((30, 8, 88)) < 0.05).astype("f4")
    np.savez(tmp_path / "u.npz", x=rolls, lengths=np.full(30, 8))
    done("train", *SMALL, "--dataset", "u.npz", "--run-dir", "r")
    run_of = SequenceGallery(pv.load_run("r"), rows=[1])
    forecast = run_of.forecast(start=5, num_samples=4, num_particles=5)
    panels = forecast.figures[1].axes
    titles = ["observed, then the mean of the draws", "observed, then a draw", "truth"]
    assert [axes.get_title(loc="left") for axes in panels] == titles
    assert "intervals" not in forecast.remarks[0]
    filled = run_of.fill(drop=0.5, num_samples=4).figures[1].axes
    assert [axes.get_title(loc="left") for axes in filled] == ["observed", "mean of the draws", "a draw", "truth"]
    assert np.ma.getmaskarray(filled[0].images[0].get_array()).any(0).sum() == 4
    assert run_of.forecast(2, num_samples=4, variables=[3]).figures[1].axes[0].get_ylabel() == "x[3]"


def test_plot_draws_the_curves_alone(stored):
    assert "left out manifold: it needs a VAE" in done("plot", stored, "--output", "p")
    assert "does not apply to this run: it needs a VAE" in refused("plot", stored, "--kind", "latents")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["forecast", "--horizon", "0"], "'--horizon'"),
        (["forecast", "--start", "0"], "'--start'"),
        (["forecast", "--start", "500"], "start: expected a step from 1 to"),
        (["forecast", "--rows", "99"], "rows: expected rows of the test split, from 0 to 1, got 99"),
        (["forecast", "--rows", "-1"], "--rows: expected whole numbers of at least 0, got '-1'"),
        (["forecast", "--rows", "a"], "--rows: expected whole numbers such as 0 or 0,1,2, got 'a'"),
        (["forecast", "--split", "all"], "--split: expected one of train, valid, test"),
        (["forecast", "--variables", "2"], "variables: expected numbers from 0 to 1, got 2"),
        (["forecast", "--num-samples", "0"], "'--num-samples'"),
        (["forecast", "--horizn", "3"], "--horizon"),
        (["forecast", "--output", "f.npy"], "--output: expected a file ending in .npz"),
        (["forecast", "--output", "nowhere/f.npz"], "a folder that exists"),
        (["smooth", "--latents", "2"], "latents: expected numbers from 0 to 1, got 2"),
        (["smooth", "--proposal", "prio"], "--proposal: expected one of guide, prior"),
        (["filter", "--num-particles", "0"], "'--num-particles'"),
        (["fill"], "nothing to fill"),
        (["fill", "--drop", "1.5"], "--drop: expected a number between 0 and 1, got 1.5"),
        (["fill", "--mask", "none.npy"], "none.npy"),
        (["fill", "--mask", "none.npy", "--drop", "0.2"], "expected --mask or --drop, got both"),
        (["sample", "--num-steps", "0"], "'--num-steps'"),
    ],
)
def test_bad_options(stored, arguments, message):
    assert message in refused(arguments[0], stored, *arguments[1:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda shape: np.ones(shape), "expected a mask of bool, True where x may be seen, got float64"),
        (lambda shape: np.ones((3, 2), bool), "mask: expected bool, True where x may be seen, of shape"),
        (lambda shape: np.array([{}]), "expected a .npy file that holds a mask of bool"),
    ],
)
def test_bad_masks(stored, make, message):
    shape = pv.load_run(stored).dataset().test.shape
    np.save("m.npy", make(shape))
    assert message in refused("fill", stored, "--mask", "m.npy")


@pytest.mark.parametrize("command", [["forecast"], ["smooth"], ["filter"], ["fill", "--drop", "0.2"]])
def test_runs_that_are_missing_or_of_images(images, command):
    assert "there is no nowhere" in refused(command[0], "nowhere", *command[1:])
    assert "VAE, which is no model of sequences" in refused(command[0], images, *command[1:])


def test_steps_are_for_sequences(images):
    assert "--num-steps is for models of sequences" in refused("sample", images, "--num-steps", 5)
