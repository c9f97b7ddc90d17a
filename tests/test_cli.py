"""The command line as a person meets it: what it does, what it says, how it exits."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import pyro_vae as pv
from pyro_vae.cli import app

SMALL = ["--epochs", "2", "--hidden-dims", "8", "--latent-dim", "2"]


@pytest.fixture(autouse=True)
def _single_precision_and_wide_terminal(monkeypatch, tmp_path):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(*arguments):
    """The message of a call that must end with exit code 2 and no traceback."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A small trained run, not to be changed."""
    torch.set_default_dtype(torch.float32)
    path = tmp_path_factory.mktemp("runs") / "small"
    torch.manual_seed(0)
    pv.fit(pv.VAE((8, 8), 2, (8,)), pv.load_dataset("digits"), epochs=2, run_dir=path)
    return path


def test_help_is_quick_and_imports_no_torch():
    code = "import sys, time; t = time.perf_counter(); import pyro_vae.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("command", ["train", "evaluate", "compare", "sample", "plot", "datasets"])
def test_every_command_has_help_with_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: pyro-vae {command}" in " ".join(result.output.split())


def test_every_option_is_documented():
    from typer.main import get_command

    for command in get_command(app).commands.values():
        for parameter in command.params:
            assert getattr(parameter, "help", "") or parameter.name == "help", (command.name, parameter.name)


def test_train_evaluate_sample_plot(tmp_path):
    result = run("train", *SMALL, "--run-dir", "r", "--optimizer", "adam")
    assert result.exit_code == 0, result.output
    assert "nats per datum" in result.output
    history = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert f"{history[-1]['test_bound']:.2f}" in result.output

    result = run("evaluate", "r", "--num-particles", 60, "--num-data", 50, "--json", "scores.json")
    assert result.exit_code == 0, result.output
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["num_data"] == 50
    assert f"{scores['log_marginal']:.2f}" in result.output
    program = pv.load_run("r").program
    wanted = pv.log_marginal(program, pv.load_dataset("digits").test[:50], num_particles=60)
    assert scores["log_marginal"] == pytest.approx(wanted.mean)

    assert run("sample", "r", "--num", 5, "--output", "x.npy").exit_code == 0
    assert np.load("x.npy").shape == (5, 8, 8)
    assert run("plot", "r").exit_code == 0
    names = {path.stem for path in (tmp_path / "r/figures").glob("*.png")}
    assert names == {"curves", "samples", "reconstructions", "latents", "manifold", "traversals"}


@pytest.mark.parametrize(
    "options", [[], ["--learning-rate-schedule", 0.5, "--ema-decay", 0.9, "--kl-by-site", "--free-bits", 0.1]]
)
def test_resume_goes_on_bit_for_bit(options):
    assert run("train", *SMALL, *options, "--run-dir", "straight", "--epochs", 4).exit_code == 0
    assert run("train", *SMALL, *options, "--run-dir", "parts").exit_code == 0
    result = run("train", "--resume", "parts", "--epochs", 4)
    assert result.exit_code == 0, result.output
    a, b = (pv.load_run(path).program.state_dict() for path in ("straight", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(("train_kl_z" in row) == bool(options) for row in pv.load_run("parts").history)


def test_a_schedule_that_is_a_function_is_resumed_in_python_alone():
    schedule = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=10)
    vae = pv.VAE((8, 8), 2, (5,))
    pv.fit(vae, pv.load_dataset("digits"), learning_rate_schedule=schedule, epochs=1, run_dir="r")
    said = refused("train", "--resume", "r", "--epochs", 2)
    assert "the learning_rate_schedule of r is cosineannealinglr(T_max=10), which only its own code can make" in said


def test_parts_and_layers_from_training_to_pictures():
    parts = ("--network", "conv", "--channels", "3,4", "--prior", "mixture", "--posterior", "iaf")
    small = ("--dataset", "digits", "--hidden-dims", "8", "--num-samples", 1300)
    assert run("train", *small, *parts, "--latent-dim", 2, "--run-dir", "p").exit_code == 0
    layers = ("--model", "hierarchical", "--guide", "top-down", "--latent-dims", "4,2")
    assert run("train", *small, *layers, "--run-dir", "h").exit_code == 0
    grey = ("--network", "resnet", "--channels", "3,4", "--likelihood", "discretized-logistic", "--binarize", "none")
    np.save("grey.npy", np.random.default_rng(0).integers(0, 256, (60, 8, 6, 3)).astype("u1"))
    given = ("--dataset", "grey.npy", "--hidden-dims", "8", "--num-samples", 100)
    assert run("train", *given, *grey, "--run-dir", "g").exit_code == 0
    for folder in ("p", "h", "g"):
        result = run("evaluate", folder, "--num-particles", 5, "--num-data", 5)
        assert result.exit_code == 0, result.output
        assert ("bits per dimension" in result.output) == (folder == "g")
        assert run("plot", folder).exit_code == 0
    assert "one layer of latents" in run("plot", "h").output
    assert "--posterior is for --model vae, got --model hierarchical" in refused(
        "train", "--model", "hierarchical", "--posterior", "iaf"
    )


LADDER = ("--model", "hierarchical", "--guide", "top-down", "--latent-dims", "4,2", "--hidden-dims", "8")


@pytest.mark.parametrize("model", [LADDER, ("--latent-dim", 2, "--hidden-dims", "8")])
def test_a_prior_of_pseudo_inputs_that_begin_at_data(model):
    vamp = ("--prior", "vamp", "--num-components", 30, "--pseudo-inputs", "data")
    hardly = ("--optimizer", "sgd", "--learning-rate", 1e-9, "--epochs", 1)
    assert run("train", *model, *vamp, *hardly, "--run-dir", "r").exit_code == 0
    prior, train = pv.load_run("r").program.prior, pv.load_dataset("digits").train / 255
    u = prior.pseudo_inputs.detach()
    nearest = (u[:, None] - train).abs().flatten(2).amax(-1).min(1)
    assert (nearest.values < 0.0101).all()
    assert len(nearest.indices.unique()) == 30
    result = run("train", "--resume", "r", "--epochs", 2)
    assert result.exit_code == 0, result.output
    torch.testing.assert_close(pv.load_run("r").program.prior.pseudo_inputs, u, atol=1e-3, rtol=0)
    assert pv.load_run("r").config["program"]["config"]["prior"] == "vamp:30"
    for command in (["evaluate", "r", "--num-particles", 5, "--num-data", 5], ["plot", "r"], ["sample", "r"]):
        result = run(*command)
        assert result.exit_code == 0, result.output


def test_a_prior_of_a_number_of_components(tmp_path):
    (tmp_path / "c.toml").write_text('prior = "mixture"\nnum-components = 3\n')
    assert run("train", *LADDER, "--config", "c.toml", "--epochs", 1, "--run-dir", "m").exit_code == 0
    assert pv.load_run("m").program.prior.loc.shape == (3, 2)
    random = ("--prior", "vamp", "--num-components", 4, "--pseudo-inputs", "random", "--epochs", 1)
    assert run("train", *LADDER, *random, "--run-dir", "v").exit_code == 0
    assert (pv.load_run("v").program.prior.pseudo_inputs - 0.5).abs().max() < 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-components", "3"], "--num-components is for --prior mixture or vamp, got --prior standard"),
        (
            ["--prior", "flow", "--num-components", "3"],
            "--num-components is for --prior mixture or vamp, got --prior flow",
        ),
        (["--prior", "mixture", "--pseudo-inputs", "data"], "--pseudo-inputs is for --prior vamp, got --prior mixture"),
        (["--prior", "vamp", "--pseudo-inputs", "dat"], "--pseudo-inputs: expected one of random, data, got 'dat'"),
        (["--prior", "vamp", "--num-components", "0"], "--num-components"),
        (["--prior", "vamp", "--num-components", "2000", "--pseudo-inputs", "data"], "data: expected at least 2000"),
        (["--prior", "vamp", "--model", "hierarchical"], 'prior: expected guide="top-down" or one layer with a vamp'),
        (["--model", "deep-markov", "--pseudo-inputs", "data"], "--pseudo-inputs is for --model vae or hierarchical"),
    ],
)
def test_bad_options_of_priors(tmp_path, arguments, message):
    assert message in refused("train", "--epochs", 1, *arguments, "--run-dir", "r")
    assert not (tmp_path / "r").exists()


def test_bayesian_weights_from_training_to_pictures(tmp_path):
    shared = ["--bayesian", "decoder", "--local-reparameterization", "--learn-prior", "--prior-scale", "0.5"]
    result = run("train", *SMALL, *shared, "--estimator", "B", "--run-dir", "r")
    assert result.exit_code == 0, result.output
    assert "bound on the log evidence of all training data" in result.output
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["program"]["config"]["num_data"] == 1297
    assert config["program"]["config"]["prior_scale"] == 0.5
    assert config["fit"]["prior_scale"] is None
    assert run("train", "--resume", "r", "--epochs", "3").exit_code == 0
    for command in (["evaluate", "r", "--num-particles", "20", "--num-data", "30"], ["plot", "r"], ["sample", "r"]):
        result = run(*command)
        assert result.exit_code == 0, result.output
    held_out = pv.evaluate_bound(pv.load_run("r").program, pv.load_dataset("digits"), predictive=True)
    assert f"{held_out.mean:.2f}" in run("evaluate", "r", "--num-particles", "20").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bayesian", "encoder"], "--bayesian: expected one of decoder, all, none"),
        (["--learn-prior"], "--learn-prior is for --bayesian decoder or all"),
        (["--local-reparameterization"], "--local-reparameterization is for --bayesian decoder or all"),
        (["--bayesian", "all", "--prior-scale", "-1"], "prior_scale: expected a positive number, got -1.0"),
        (["--bayesian", "all", "--objective", "iwae"], "SGVB"),
    ],
)
def test_bad_options_of_bayesian_weights(arguments, message):
    assert message in refused("train", *SMALL, *arguments, "--run-dir", "r")


def test_killed_before_its_first_checkpoint_a_run_starts_again_as_it_did(tmp_path):
    assert run("train", *SMALL, "--run-dir", "straight").exit_code == 0
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed/config.json").write_bytes((tmp_path / "straight/config.json").read_bytes())
    torch.manual_seed(77)
    assert run("train", "--resume", "killed").exit_code == 0
    a, b = (pv.load_run(path).program.state_dict() for path in ("straight", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_config_file_and_its_overrides(tmp_path):
    (tmp_path / "c.toml").write_text('epochs = 1\nhidden-dims = [9, 7]\nlatent_dim = 3\noptimizer = "adam"\n')
    result = run("train", "--config", "c.toml", "--run-dir", "r", "--latent-dim", 4)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "r/config.json").read_text())
    assert config["program"]["config"]["hidden_dims"] == [9, 7]
    assert config["program"]["config"]["latent_dim"] == 4
    assert config["fit"]["optimizer"] == "adam"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latent-dmi = 3", "did you mean 'latent_dim'"),
        ("epochs = ", "cannot read c.toml"),
        ("[train]\nepochs = 1", "unknown key 'train'"),
        ('epochs = "many"', "'--epochs'"),
    ],
)
def test_bad_config_files(tmp_path, text, message):
    (tmp_path / "c.toml").write_text(text)
    assert message in refused("train", "--config", "c.toml", "--run-dir", "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "mnits"], "did you mean 'mnist'"),
        (["--dataset", "no/such.npy"], "such.npy"),
        (["--objective", "sgbv"], "did you mean 'sgvb'"),
        (["--likelihood", "gausian"], "did you mean 'gaussian'"),
        (["--activation", "sigmoid"], "expected one of tanh, relu, softplus"),
        (["--optimizer", "adagard"], "did you mean 'adagrad'"),
        (["--hidden-dims", "5,x"], "expected whole numbers such as"),
        (["--latent-dim", "0"], "latent_dim: expected"),
        (["--latent-dmi", "3"], "--latent-dim"),
        (["--device", "cuda:7"], "device: expected one that this machine has"),
        (["--epochs", "1", "--num-samples", "5"], "num_samples or epochs"),
        (["--estimator", "C"], "estimator: expected"),
        (["--config", "none.toml"], "cannot read none.toml"),
        (["--resume", "nowhere"], "there is no nowhere"),
        (["--binarize", "none"], "got grey levels"),
        (["--patience", "0"], "patience: expected"),
    ],
)
def test_bad_options_of_train(tmp_path, arguments, message):
    given = [] if "--resume" in arguments or "--epochs" in arguments else ["--epochs", "1"]
    where = [] if "--resume" in arguments else ["--run-dir", "r"]
    assert message in refused("train", *given, *where, *arguments)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: np.full((20, 4, 4), np.nan, "f4"), "NaN or infinity"),
        (lambda: np.full((20, 4, 4), 3.0, "f4"), "[0, 1]"),
        (lambda: np.zeros((0, 4, 4), "f4"), "u.npy"),
        (lambda: np.array(["a", "b"] * 20), "u.npy"),
        (lambda: np.ones((20, 4, 4), "c8"), "u.npy"),
    ],
)
def test_bad_data_files(tmp_path, make, message):
    np.save(tmp_path / "u.npy", make())
    assert message in refused("train", *SMALL, "--dataset", tmp_path / "u.npy", "--run-dir", "r")
    assert not (tmp_path / "r").exists()


def test_truncated_data_file(tmp_path):
    np.savez(tmp_path / "u.npz", train=np.zeros((50, 4, 4), "f4"))
    (tmp_path / "u.npz").write_bytes((tmp_path / "u.npz").read_bytes()[:300])
    assert "u.npz" in refused("train", *SMALL, "--dataset", tmp_path / "u.npz", "--run-dir", "r")


def test_own_data_from_training_to_pictures(tmp_path):
    """A user's array that is no image: everything works but the pictures of images."""
    np.save(tmp_path / "u.npy", np.random.default_rng(0).uniform(size=(200, 6)).astype("f4"))
    result = run("train", *SMALL, "--dataset", tmp_path / "u.npy", "--likelihood", "gaussian", "--run-dir", "r")
    assert result.exit_code == 0, result.output
    assert run("evaluate", "r", "--num-particles", 10).exit_code == 0
    assert run("plot", "r").exit_code == 0
    assert {path.stem for path in (tmp_path / "r/figures").glob("*.png")} == {"curves", "latents"}
    assert "does not apply to this run" in refused("plot", "r", "--kind", "manifold")
    assert "choose a .npy output" in refused("sample", "r")


def test_existing_run_directory(stored):
    before = sorted((p.name, p.stat().st_mtime_ns) for p in stored.iterdir())
    assert "holds a run: resume it" in refused("train", *SMALL, "--run-dir", stored)
    assert "--hidden-dims" in refused("train", "--resume", stored, "--hidden-dims", "9")
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in stored.iterdir())


def test_corrupt_and_foreign_runs(stored, tmp_path):
    for name in ("config.json", "state.json", "checkpoint.safetensors"):
        (tmp_path / name).write_bytes((stored / name).read_bytes())
    content = bytearray((tmp_path / "checkpoint.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "checkpoint.safetensors").write_bytes(content)
    for command in ("evaluate", "sample", "plot"):
        assert "corrupt" in refused(command, tmp_path)
    assert "corrupt" in refused("train", "--resume", tmp_path)
    assert "there is no" in refused("evaluate", tmp_path / "nothing")
    assert "holds no run" in refused("evaluate", stored.parent)
    config = json.loads((stored / "config.json").read_text())
    config["program"]["config"]["hidden_dims"] = [9]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "checkpoint.safetensors").write_bytes((stored / "checkpoint.safetensors").read_bytes())
    assert "another architecture" in refused("evaluate", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--split", "all"], "--split: expected"),
        (["evaluate", "--num-particles", "0"], "num_particles: expected"),
        (["plot", "--kind", "sample"], "did you mean 'samples'"),
        (["sample", "--output", "x.gif"], ".png or .npy"),
        (["sample", "--num", "0"], "num"),
    ],
)
def test_bad_options_of_the_others(stored, arguments, message):
    assert message in refused(arguments[0], stored, *arguments[1:])


def test_datasets_lists_every_name():
    result = run("datasets")
    assert result.exit_code == 0
    assert all(name in result.output for name in ("digits", "mnist", "frey-face", "omniglot", "caltech101-silhouettes"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_resume(tmp_path, number, code):
    command = [sys.executable, "-m", "pyro_vae", "train", "--hidden-dims", "8", "--num-samples", "100000000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--run-dir", "r"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "r/metrics.jsonl").exists() and time.monotonic() < deadline:
        if (tmp_path / "r/state.json").exists():
            break
        time.sleep(0.05)
    time.sleep(0.3)
    try:
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, said
    assert "go on with" in said
    assert "pyro-vae train --resume r" in said
    assert "Traceback" not in said
    samples = pv.load_run("r").config["fit"]["num_samples"]
    assert samples == 100_000_000


def test_loss_that_is_not_finite_exits_with_2(monkeypatch, tmp_path):
    np.save(tmp_path / "u.npy", np.full((100, 4), 0.5, "f4"))  # constant data: the Gaussian density has no bound
    said = refused(
        "train", "--dataset", tmp_path / "u.npy", "--likelihood", "gaussian", "--run-dir", "r", "--optimizer", "sgd",
        "--learning-rate", "1000", "--epochs", "50",
    )  # fmt: skip
    assert "the loss became" in said
    assert "site" in said
    assert "kept in r" in said


QUICK = ["--hidden-dims", "8", "--latent-dim", "2", "--num-samples", "300", "--num-particles", "10", "--num-data", "20"]


def test_compare_prints_the_table_and_goes_on(tmp_path):
    objectives = ["--objective", "sgvb", "--objective", "iwae:num_particles=3", "--objective", "wake-sleep"]
    rates = ["--learning-rate", "0.02", "--learning-rate", "0.1"]
    result = run("compare", *QUICK, *objectives, *rates, "--seeds", 1, "--run-dir", "c")
    assert result.exit_code == 0, result.output
    stored = json.loads((tmp_path / "c/results.json").read_text())
    assert [(row["objective"], row["setting"]) for row in stored["rows"]] == [
        (name, rate) for name in ("sgvb", "iwae:num_particles=3", "wake-sleep") for rate in ("lr=0.02", "lr=0.1")
    ]
    for row in stored["rows"]:
        assert f"{row['log_marginal']:.2f}" in result.output
    assert (tmp_path / "c/table.md").read_text() in result.output
    assert (tmp_path / "c/curves.png").exists()
    config = json.loads((tmp_path / "c/iwae-num_particles=3_lr=0.1_seed0/config.json").read_text())
    assert config["objective"]["config"] == {"num_particles": 3}
    assert config["fit"]["learning_rate"] == 0.1
    again = run("compare", *QUICK, *objectives, *rates, "--seeds", 1, "--run-dir", "c")
    assert again.output == result.output
    other = refused("compare", *QUICK, *objectives, *rates, "--seeds", 1, "--run-dir", "c", "--batch-size", 50)
    assert "a run with batch_size=100, got 50" in other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objective", "sgbv"], "did you mean 'sgvb'"),
        (["--objective", "iwae:num_particle=3"], "--objective iwae: expected key=value,... of num_particles; got"),
        (["--objective", "iwae:3"], "--objective iwae: expected key=value"),
        (["--objective", "iwae:num_particles=few"], "num_particles: expected a whole number"),
        (["--objective", "wake-sleep:num_particles=3"], "--objective wake-sleep: expected no options"),
        (["--objective", "mcem"], "'mcem' trains no guide"),
        (["--method", "aiss"], "did you mean 'ais'"),
        (["--method", "ais", "--initial", "posterior"], "initial: expected one of guide, prior"),
        (["--num-steps", "3"], "--num-steps is not for --method importance"),
        (["--epochs", "3"], "num_samples or epochs"),
        (["--learning-rate", "-1"], "learning_rate: expected a positive number"),
        (["--dataset", "mnits"], "did you mean 'mnist'"),
    ],
)
def test_bad_options_of_compare(tmp_path, arguments, message):
    assert message in refused("compare", *QUICK, "--run-dir", "c", *arguments)
    assert not list(tmp_path.glob("c/*/config.json"))


def test_a_run_without_a_trained_guide_is_not_scored_by_it(tmp_path):
    small = ("--dataset", "digits", "--latent-dim", "2", "--hidden-dims", "4", "--num-samples", "200")
    trained = run("train", *small, "--objective", "mcem", "--run-dir", tmp_path / "m")
    assert "--method ais --initial prior" in trained.output
    assert "trained no guide" in refused("evaluate", tmp_path / "m")
    few = ("--num-data", "3", "--num-steps", "3", "--num-particles", "2")
    run("evaluate", tmp_path / "m", "--method", "ais", "--initial", "prior", *few, "--json", tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["bound"] is None


# The parts of a model, of every command that trains ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        (["--network", "conv", "--channels", "4", "--prior", "vamp", "--num-components", "3"], {"prior": "vamp:3"}),
        (["--posterior", "full", "--kl-warmup", "50"], {"posterior": "full"}),
        (["--model", "hierarchical", "--latent-dims", "3,2", "--guide", "top-down"], {"guide": "top-down"}),
    ],
)
def test_any_model_is_compared(tmp_path, arguments, config):
    budget = ["--num-samples", "200", "--num-particles", "5", "--num-data", "10", "--seeds", "1", "--hidden-dims", "8"]
    result = run("compare", *budget, "--objective", "sgvb", "--run-dir", "c", *arguments)
    assert result.exit_code == 0, result.output
    stored = json.loads((tmp_path / "c/sgvb_seed0/config.json").read_text())
    assert config.items() <= stored["program"]["config"].items()
    assert pv.load_run(tmp_path / "c/sgvb_seed0").program.config == pv.load_run("c/sgvb_seed0").program.config


def test_models_of_sequences_are_compared(tmp_path):
    sizes = ["--latent-dim", "2", "--transition-dim", "4", "--emission-dim", "4", "--rnn-dim", "4", "--trim-padding"]
    np.savez(tmp_path / "s.npz", train=np.random.default_rng(0).normal(size=(12, 6, 2)).astype("f4"),
             train_lengths=np.arange(12) % 6 + 1)  # fmt: skip
    result = run(
        "compare", "--dataset", "s.npz", "--model", "deep-markov", *sizes, "--objective", "sgvb", "--objective",
        "fivo:num_particles=2", "--num-samples", "24", "--batch-size", "4", "--num-particles", "5", "--seeds", "1",
        "--run-dir", "c",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "c/results.json").read_text())["rows"]
    assert [row["error"] for row in rows] == [None, None]
    assert json.loads((tmp_path / "c/sgvb_seed0/config.json").read_text())["fit"]["trim_padding"] is True


def test_what_is_for_another_model_is_refused_by_compare(tmp_path):
    said = refused("compare", *QUICK, "--run-dir", "c", "--rnn-dim", "4")
    assert "--rnn-dim is for --model deep-markov, got --model vae" in said
