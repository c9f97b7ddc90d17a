"""A run that is stopped, however, and resumed is the run that was never stopped, bit for bit."""

import dataclasses
import functools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae import runs
from pyro_vae.training import CheckpointError, RunDirectoryError, TrainingInterrupted
from pyro_vae.training.checkpoint import RunDirectory
from pyro_vae.training.optimizers import optimizer_name


def small_vae():
    torch.manual_seed(3)
    return pv.VAE(data_shape=(8, 8), latent_dim=2, hidden_dims=(8,))


def parameters(program):
    return {name: tensor.detach().clone() for name, tensor in program.named_parameters()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def without_seconds(history):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


class StopAfter:
    """A batch source that sends this process a signal when it has served so many batches."""

    def __init__(self, batches, count, number=signal.SIGTERM):
        self.batches, self.left, self.number = batches, count, number

    def __iter__(self):
        for batch in self.batches:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.number)
            yield batch


SETTINGS = {
    "adagrad": {"optimizer": "adagrad"},
    "adam": {"optimizer": "adam", "learning_rate": 1e-3},
    "nadam with everything": {
        "optimizer": "nadam",
        "objective": pv.SGVB(num_particles=2, estimator="B"),
        "kl_warmup": 3000,
        "max_grad_norm": 1.0,
        "prior_scale": 1.0,
        "patience": 50,
    },
    "falling rate, averaged weights": {
        "optimizer": "adam",
        "learning_rate_schedule": 0.5,
        "ema_decay": 0.9,
        "valid": torch.rand(50, 8, 8),
        "patience": 50,
    },
    "one cycle of rates and momenta": {
        "optimizer": "adam",
        "learning_rate_schedule": functools.partial(OneCycleLR, max_lr=0.01, total_steps=100),
        "schedule_every": "step",
        "ema_decay": 0.99,
    },
    "rate by plateau": {
        "optimizer": "sgd",
        "learning_rate": 1e-6,
        "learning_rate_schedule": functools.partial(
            ReduceLROnPlateau, mode="max", threshold_mode="abs", patience=0, threshold=1.0
        ),
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("stop", [0, 1, 12, 13, 14, 29])
def test_thousand_samples_in_two_parts_equal_one(tmp_path, settings, stop):
    data = pv.load_dataset("digits")  # 13 batches an epoch, the last of them short
    straight, parts = small_vae(), small_vae()
    whole = pv.fit(straight, data, num_samples=3000, evaluate_every=700, **settings)
    if stop:
        pv.fit(parts, data, num_samples=min(100 * stop, 3000), evaluate_every=700, run_dir=tmp_path / "r", **settings)
    resumed = small_vae()  # fresh parameters, as a new process has
    with torch.no_grad():
        for tensor in resumed.parameters():
            tensor.add_(1.0) if stop else None
    run = pv.fit(resumed, data, num_samples=3000, evaluate_every=700, run_dir=tmp_path / "r", resume=True, **settings)
    assert_same(parameters(straight), parameters(resumed))
    assert run.samples == whole.samples
    extra = [] if stop in (0, 7, 14, 21, 28, 29) else [100 * stop]  # where the first part ended it was evaluated too
    rows = [row for row in without_seconds(run.history) if row["samples"] not in extra or row["samples"] % 700 < 100]
    wanted = without_seconds(whole.history)
    assert [r for r in rows if r["samples"] in {w["samples"] for w in wanted}] == wanted


def test_the_surrounding_random_numbers_are_left_alone():
    vae = small_vae()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    pv.fit(vae, pv.load_dataset("digits"), epochs=1)
    assert torch.equal(torch.rand(3), wanted)


def test_seed_decides_everything():
    def trained(seed):
        vae = small_vae()
        pv.fit(vae, pv.load_dataset("digits"), epochs=1, seed=seed)
        return parameters(vae)

    assert_same(trained(1), trained(1))
    with pytest.raises(AssertionError):
        assert_same(trained(1), trained(2))


def gaussian_program():
    """Plain functions with pyro.param and a constraint: nothing of it is a module."""

    def model(x):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(loc + z[..., None], 1.0).to_event(1), obs=x)

    def guide(x):
        scale = pyro.param("scale", torch.rand(()) + 0.5, constraint=dist.constraints.positive)
        slope = pyro.param("slope", torch.randn(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ slope, scale))

    return pv.Program(model, guide)


def test_plain_functions_resume(tmp_path):
    x = torch.randn(70, 2)

    def trained(num_samples, **more):
        program = gaussian_program()
        pv.fit(program, x, num_samples=num_samples, batch_size=32, optimizer="adam", **more)
        return {name: t.detach().clone() for name, t in program.named_parameters().items()}

    straight = trained(500)
    trained(200, run_dir=tmp_path / "r")
    assert_same(straight, trained(500, run_dir=tmp_path / "r", resume=True))


@pytest.mark.parametrize("stop", [1, 5, 9])
@pytest.mark.parametrize("own_generator", [False, True], ids=["global generator", "generator of its own"])
@pytest.mark.parametrize("grey", [False, True], ids=["binary", "grey, drawn at each read"])
def test_iterables_are_replayed_to_their_position(tmp_path, stop, own_generator, grey):
    x = torch.rand(90, 8, 8) if grey else torch.rand(90, 8, 8).round()

    def loader():  # 4 batches an epoch
        generator = torch.Generator().manual_seed(9) if own_generator else None
        return DataLoader(TensorDataset(x), batch_size=24, shuffle=True, generator=generator)

    straight, resumed = small_vae(), small_vae()
    pv.fit(straight, loader(), epochs=3, optimizer="adam")
    first = small_vae()
    with pytest.raises(TrainingInterrupted):
        pv.fit(first, StopAfter(loader(), stop + 2), epochs=3, optimizer="adam", run_dir=tmp_path / "r")
    pv.fit(resumed, loader(), epochs=3, optimizer="adam", run_dir=tmp_path / "r", resume=True)
    assert_same(parameters(straight), parameters(resumed))


def test_a_program_around_a_model_resumes_though_its_store_names_hold_a_number(tmp_path):
    data = pv.load_dataset("digits")

    def composed():
        vae = small_vae()
        return vae, pv.Program(lambda x: vae.model(x), lambda x: vae.guide(x), data_shape=(8, 8))

    straight, program = composed()
    pv.fit(program, data, num_samples=600)
    pv.fit(composed()[1], data, num_samples=300, run_dir=tmp_path / "r")
    resumed, program = composed()
    pv.fit(program, data, num_samples=600, run_dir=tmp_path / "r", resume=True)
    assert_same(parameters(straight), parameters(resumed))


@pytest.mark.parametrize("first", [2300, 2900, 3700])
def test_where_a_budget_ends_does_not_matter_to_early_stopping(tmp_path, first):
    data = pv.load_dataset("digits")
    few = pv.Dataset("few", data.train[:60], data.valid[:60], data.test[:60], binarize="dynamic")
    settings = {"optimizer": "adam", "learning_rate": 0.02, "patience": 2, "evaluate_every": 300, "batch_size": 20}
    straight, parts, resumed = (small_vae() for _ in range(3))
    run = pv.fit(straight, few, num_samples=20_000, **settings)
    pv.fit(parts, few, num_samples=first, run_dir=tmp_path / "r", **settings)
    again = pv.fit(resumed, few, num_samples=20_000, run_dir=tmp_path / "r", resume=True, **settings)
    assert (run.stopped_early, run.samples) == (again.stopped_early, again.samples)
    assert_same(parameters(straight), parameters(resumed))


def test_own_programs_are_loaded_with_their_data(tmp_path):
    x = torch.randn(70, 2)
    trained, loaded = gaussian_program(), gaussian_program()
    pv.fit(trained, x, epochs=2, run_dir=tmp_path / "r")
    assert pv.load_run(tmp_path / "r", loaded, data=x[:5]).program is loaded
    assert_same(trained.named_parameters(), loaded.named_parameters())
    assert loaded.param("scale") > 0
    assert loaded.param("scale").log() == pytest.approx(trained.named_parameters()["scale"].item())
    with pytest.raises(CheckpointError, match="another architecture"):
        pv.load_run(tmp_path / "r", gaussian_program())
    with pytest.raises(CheckpointError, match="only its own code can build"):
        pv.load_run(tmp_path / "r")


def test_data_that_changed_since_are_noticed(tmp_path):
    rows = torch.rand(100, 3).numpy().astype("f4")
    np.save(tmp_path / "x.npy", rows)
    run_dir = tmp_path / "r"
    data = pv.load_dataset(tmp_path / "x.npy", binarize="dynamic")
    pv.fit(pv.VAE((3,), 1, (4,)), data, epochs=1, run_dir=run_dir)
    assert torch.equal(pv.load_run(run_dir).dataset().train, data.train)
    np.save(tmp_path / "x.npy", rows[::-1])
    with pytest.raises(CheckpointError, match="has changed since"):
        pv.load_run(run_dir).dataset()


@pytest.mark.parametrize(
    "damage", [{"fit": None}, {"fit": {"batch_sise": 3}}, {"program": {"type": "VAE", "config": {"x": 1}}}]
)
def test_damaged_configuration(tmp_path, damage):
    pv.fit(small_vae(), pv.load_dataset("digits"), num_samples=100, run_dir=tmp_path / "r")
    file = tmp_path / "r/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    with pytest.raises(CheckpointError, match=r"config\.json is corrupt"):
        runs.fit_settings(runs.load_run(tmp_path / "r").config, tmp_path / "r")


def test_one_shot_generator_is_refused():
    with pytest.raises(ValueError, match="one-shot generator"):
        pv.fit(small_vae(), (x for x in [torch.ones(4, 8, 8)]), epochs=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_say_how_to_go_on(tmp_path, number):
    batches = [torch.ones(10, 8, 8)] * 20
    vae = small_vae()
    with pytest.raises(TrainingInterrupted, match=r"saved in .*resume=True, or pyro-vae train --resume") as caught:
        pv.fit(vae, StopAfter(batches, 7, number), epochs=5, run_dir=tmp_path / "r")
    assert caught.value.signal == number
    state = RunDirectory(tmp_path / "r").load().state
    assert 0 < state["position"]["samples"] < 1000
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_a_second_process_is_refused(tmp_path):
    directory = RunDirectory(tmp_path / "r")
    code = (
        "import sys; from pathlib import Path; from pyro_vae.training.checkpoint import *\n"
        "try:\n  with RunDirectory(Path(sys.argv[1])).locked(): print('in')\n"
        "except RunDirectoryError as error: print(error)"
    )
    with directory.locked():
        said = subprocess.run([sys.executable, "-c", code, str(directory.path)], capture_output=True, text=True).stdout
    assert "another process is training" in said


def test_other_settings_are_refused_and_named(tmp_path):
    data, run_dir = pv.load_dataset("digits"), tmp_path / "r"
    pv.fit(small_vae(), data, num_samples=300, run_dir=run_dir)
    before = {file.name: file.read_bytes() for file in run_dir.iterdir() if file.is_file()}
    for settings, message in [
        ({"batch_size": 50}, "batch_size=100, got 50"),
        ({"optimizer": "adam"}, "optimizer='adagrad', got 'adam'"),
        ({"seed": 1}, "seed=0, got 1"),
        ({"objective": pv.SGVB(2)}, "num_particles"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            pv.fit(small_vae(), data, num_samples=400, run_dir=run_dir, resume=True, **settings)
    other_data = dataclasses.replace(data, train=data.train.flip(0))
    with pytest.raises(CheckpointError, match="checksum"):
        pv.fit(small_vae(), other_data, num_samples=400, run_dir=run_dir, resume=True)
    with pytest.raises(CheckpointError, match=r"another architecture: 'decoder\.0\.weight' has shape \[8, 2\] there"):
        pv.fit(pv.VAE((8, 8), 3, (8,)), data, num_samples=400, run_dir=run_dir, resume=True)
    with pytest.raises(RunDirectoryError, match="holds a run: resume it"):
        pv.fit(small_vae(), data, num_samples=400, run_dir=run_dir)
    assert before == {file.name: file.read_bytes() for file in run_dir.iterdir() if file.is_file()}


def test_early_stop_returns_to_the_best_and_resumes(tmp_path):
    data = pv.load_dataset("digits")
    small = pv.Dataset("few", data.train[:60], data.valid[:60], data.test[:60], binarize="dynamic")  # overfits at once
    settings = {"optimizer": "adam", "learning_rate": 0.02, "patience": 3, "evaluate_every": 300}

    def trained(num_samples, **more):
        vae = pv.VAE((8, 8), 4, (64,))
        with torch.no_grad():
            for index, tensor in enumerate(vae.parameters()):
                tensor.copy_(torch.linspace(-0.3, 0.3, tensor.numel()).reshape(tensor.shape).roll(index))
        return vae, pv.fit(vae, small, num_samples=num_samples, **settings, **more)

    vae, run = trained(30_000)
    bounds = [row["valid_bound"] for row in run.history]
    assert run.stopped_early
    assert bounds.index(max(bounds)) == len(bounds) - 4
    assert run.samples < 30_000
    trained(600, run_dir=tmp_path / "r")
    resumed, again = trained(30_000, run_dir=tmp_path / "r", resume=True)
    assert again.stopped_early
    assert_same(parameters(vae), parameters(resumed))


# Monte Carlo EM, and a guide alone ------------------------------------------------------------------------------------


def weights_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("stop", [30, 70, 110, 120])
def test_monte_carlo_em_in_two_parts_equals_one(tmp_path, stop):
    """Chains, step size and the mean log joint go on as if the run had never stopped."""
    x = torch.randn(45, 3)
    settings = {"batch_size": 10, "optimizer": "adam", "evaluate_every": 40}

    def trained(num_samples, **more):
        model, objective = pv.LinearGaussian(torch.ones(3, 2)), pv.MCEM(4, num_particles=2, num_updates=2)
        run = pv.fit(model, x, objective=objective, num_samples=num_samples, **settings, **more)
        return weights_of(model), objective.state_dict(), without_seconds(run.history)

    straight, state, history = trained(200)
    trained(stop, run_dir=tmp_path / "r")
    resumed, again, rows = trained(200, run_dir=tmp_path / "r", resume=True)
    assert_same(straight, resumed)
    assert_same(state, again)
    assert state["chains"].shape == (2, 45, 2)
    samples = {row["samples"] for row in history}
    assert [row for row in rows if row["samples"] in samples] == history
    assert all(row["train_log_joint"] is not None for row in rows)


def test_monte_carlo_em_goes_on_after_a_signal(tmp_path):
    x = torch.randn(60, 3)
    settings = {"epochs": 2, "optimizer": "adam"}

    def batches():
        return DataLoader(TensorDataset(x), batch_size=10, shuffle=True)

    def make():
        return pv.LinearGaussian(torch.ones(3, 2)), pv.MCEM(4, num_updates=2)

    (straight, first), (parts, second), (resumed, third) = make(), make(), make()
    pv.fit(straight, batches(), objective=first, **settings)
    with pytest.raises(TrainingInterrupted):
        pv.fit(parts, StopAfter(batches(), 8), objective=second, run_dir=tmp_path / "r", **settings)
    pv.fit(resumed, batches(), objective=third, run_dir=tmp_path / "r", resume=True, **settings)
    assert_same(weights_of(straight), weights_of(resumed))
    assert first.step_size == third.step_size


def test_other_settings_of_monte_carlo_em_are_refused(tmp_path):
    x = torch.randn(20, 3)
    settings = {"run_dir": tmp_path / "r", "num_samples": 20}
    pv.fit(pv.LinearGaussian(torch.ones(3, 2)), x, objective=pv.MCEM(4), **settings)
    with pytest.raises(CheckpointError, match=r"'num_leapfrog': 4,.* got .*'num_leapfrog': 5"):
        pv.fit(pv.LinearGaussian(torch.ones(3, 2)), x, objective=pv.MCEM(5), resume=True, **settings)


@pytest.mark.parametrize("stop", [200, 500])
def test_a_guide_alone_in_two_parts_equals_one(tmp_path, stop):
    data = pv.load_dataset("digits")
    settings = {"optimizer": "adam", "trained": "guide", "evaluate_with": pv.SGVB(3), "evaluate_every": 300}
    straight, parts, resumed = (small_vae() for _ in range(3))
    whole = pv.fit(straight, data, num_samples=900, **settings)
    pv.fit(parts, data, num_samples=stop, run_dir=tmp_path / "r", **settings)
    with torch.no_grad():
        for tensor in resumed.parameters():
            tensor.add_(1.0)
    again = pv.fit(resumed, data, num_samples=900, run_dir=tmp_path / "r", resume=True, **settings)
    assert_same(parameters(straight), parameters(resumed))
    samples = {row["samples"] for row in whole.history}
    rows = [row for row in without_seconds(again.history) if row["samples"] in samples]
    assert rows == without_seconds(whole.history)
    assert_same(parameters(straight), parameters(pv.load_run(tmp_path / "r").program))  # the model's are stored too
    with pytest.raises(CheckpointError, match="trained='guide', got 'all'"):
        pv.fit(small_vae(), data, num_samples=900, run_dir=tmp_path / "r", resume=True, **settings | {"trained": "all"})


def test_a_run_of_a_version_that_did_not_say_what_it_trained_goes_on(tmp_path):
    data, file = pv.load_dataset("digits"), tmp_path / "r/config.json"
    pv.fit(small_vae(), data, num_samples=200, run_dir=tmp_path / "r")
    config = json.loads(file.read_text())
    assert config["fit"].pop("trained") == "all"
    file.write_text(json.dumps(config))
    run = pv.fit(small_vae(), data, num_samples=400, run_dir=tmp_path / "r", resume=True)
    assert run.samples == 400


# A real process, killed -----------------------------------------------------------------------------------------------

BUDGET = {"num_samples": 100_000, "evaluate_every": 20_000, "checkpoint_every": 2_000, "progress": False}


def _train(run_dir, started):
    torch.set_num_threads(1)
    vae, data = small_vae(), pv.load_dataset("digits")
    started.set()
    pv.fit(vae, data, run_dir=run_dir, resume=True, **BUDGET)


@pytest.fixture
def single_precision_on_one_thread():
    """As in the processes, which do not go through conftest."""
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_kill_at_twenty_random_moments_loses_nothing(tmp_path, single_precision_on_one_thread):
    straight = small_vae()
    began = time.monotonic()
    run = pv.fit(straight, pv.load_dataset("digits"), run_dir=tmp_path / "straight", **BUDGET)
    duration = time.monotonic() - began
    context = multiprocessing.get_context("forkserver")  # a forked child starts at once; this one has run no torch code
    context.set_forkserver_preload(["pyro_vae.training", "sklearn.datasets", "torch._dynamo"])
    moments, longest = random.Random(0), 0.1 * duration
    kills = advanced = 0
    for attempt in range(10):  # a run that gets through before the twentieth kill is checked, and the next one begins
        directory, finished, seen = RunDirectory(tmp_path / f"killed-{attempt}"), False, 0
        while not finished:
            started = context.Event()
            process = context.Process(target=_train, args=(directory.path, started))
            process.start()
            if kills < 20:
                assert started.wait(120)
                time.sleep(moments.uniform(0.0, longest))
                process.kill()
            process.join()
            finished = process.exitcode == 0
            kills += process.exitcode == -signal.SIGKILL
            samples = directory.load().state["position"]["samples"] if directory.state_file.exists() else 0
            assert samples >= seen
            advanced += seen < samples
            longest *= 0.8 if seen < samples else 1.3  # how long a process takes to begin depends on the machine
            seen = samples
        resumed = pv.load_run(directory.path)
        assert_same(parameters(straight), parameters(resumed.program))
        assert without_seconds(resumed.history) == without_seconds(run.history)
        assert [json.loads(line) for line in directory.metrics_file.read_text().splitlines()] == resumed.history
        if kills == 20:
            break
    assert kills == 20
    assert advanced >= 5, "the kills fell too early to show anything"


def numpy_program():
    """Its model draws from numpy's and Python's generators too."""

    def model(x):
        slope = pyro.param("a", torch.ones(2)) + 0.1 * float(np.random.randn()) + 0.1 * random.random()  # noqa: NPY002
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(slope * z[..., None], 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.sum(-1) / 3, pyro.param("s", torch.ones(()))))

    return pv.Program(model, guide)


@pytest.mark.filterwarnings("ignore:training goes on eagerly")  # a graph would freeze the draws of numpy and Python
@pytest.mark.parametrize("held_out", ["tensor", "loader"])
def test_evaluations_draw_nothing_from_the_stream_of_training(tmp_path, held_out):
    """Training is the same however often it is evaluated, and so is a run in two parts, evaluated once more."""
    x = torch.randn(70, 2)

    def trained(num_samples, **more):
        program = numpy_program()
        test = x if held_out == "tensor" else DataLoader(TensorDataset(x), batch_size=30)
        pv.fit(program, x, test=test, num_samples=num_samples, batch_size=32, optimizer="adam", **more)
        return {name: t.detach().clone() for name, t in program.named_parameters().items()}

    straight = trained(500, evaluate_every=10**6)
    assert_same(straight, trained(500, evaluate_every=32))
    trained(200, run_dir=tmp_path / "r", evaluate_every=10**6)
    assert_same(straight, trained(500, run_dir=tmp_path / "r", resume=True, evaluate_every=10**6))


def test_optimizer_state_keeps_its_type(tmp_path):
    """NAdam keeps a number in the default type whatever the parameters' is; torch casts it on loading."""
    torch.set_default_dtype(torch.float32)

    def trained(num_samples, **more):
        vae = small_vae().double()
        pv.fit(vae, torch.ones(90, 8, 8), num_samples=num_samples, optimizer="nadam", learning_rate=0.01, **more)
        return parameters(vae)

    straight = trained(900)
    trained(300, run_dir=tmp_path / "r")
    assert_same(straight, trained(900, run_dir=tmp_path / "r", resume=True))


def test_an_optimizer_made_by_partial_is_known_again():
    def make(parameters, rate):
        return torch.optim.SGD(parameters, lr=rate)

    assert optimizer_name(functools.partial(make, rate=0.1)) == "make(rate=0.1)"
    assert optimizer_name(functools.partial(functools.partial(make, rate=0.1), rate=2, of=print)) == "make(rate=2)"


def test_another_rate_or_schedule_in_a_partial_is_another_run(tmp_path):
    made = {
        "optimizer": functools.partial(torch.optim.Adam, lr=0.1),
        "learning_rate_schedule": functools.partial(torch.optim.lr_scheduler.StepLR, step_size=2),
    }
    others = {
        "optimizer": functools.partial(torch.optim.Adam, lr=0.2),
        "learning_rate_schedule": functools.partial(torch.optim.lr_scheduler.StepLR, step_size=3),
    }
    settings = {"num_samples": 100, "run_dir": tmp_path / "r", "progress": False}
    pv.fit(small_vae(), torch.ones(50, 8, 8), **made, **settings)
    for name, other in others.items():
        with pytest.raises(CheckpointError, match=name):
            pv.fit(small_vae(), torch.ones(50, 8, 8), **made | {name: other}, **settings, resume=True)
    with pytest.raises(CheckpointError, match=r"schedule of .* is steplr\(step_size=2\), which only its own code"):
        runs.fit_settings(runs.load_run(tmp_path / "r").config, tmp_path / "r")


def test_runs_of_before_go_on(tmp_path):
    made = {"optimizer": functools.partial(torch.optim.Adam, lr=0.1), "progress": False, "run_dir": tmp_path / "r"}
    pv.fit(small_vae(), torch.ones(50, 8, 8), num_samples=100, **made)
    file = tmp_path / "r/config.json"
    config = json.loads(file.read_text())
    del config["fit"]["trim_padding"]  # as it was before there was such a setting
    config["fit"]["optimizer"] = "adam"  # and before the numbers were recorded
    file.write_text(json.dumps(config))
    run = pv.fit(small_vae(), torch.ones(50, 8, 8), num_samples=200, resume=True, **made)
    assert run.samples == 200


@pytest.mark.parametrize("one", [0.001, np.float64(0.001), torch.tensor(0.001, dtype=torch.float64)])
def test_numbers_of_a_partial_are_recorded_whatever_their_type(one):
    made = functools.partial(torch.optim.Adam, lr=one, betas=[0.9, 0.99])
    assert optimizer_name(made) == "adam(betas=(0.9, 0.99), lr=0.001)"
    assert optimizer_name(functools.partial(torch.optim.Adam, lr=2 * one)) == "adam(lr=0.002)"


def test_what_cannot_train_is_refused_with_numbers_too():
    made = functools.partial(torch.optim.LBFGS, lr=1.0)
    with pytest.raises(ValueError, match="'lbfgs' cannot train by stochastic gradients"):
        pv.fit(small_vae(), torch.ones(50, 8, 8), num_samples=50, optimizer=made, progress=False)


def test_an_optimizer_of_a_function_is_not_made_by_its_name(tmp_path):
    made = functools.partial(torch.optim.Adam, lr=0.1)
    pv.fit(small_vae(), torch.ones(50, 8, 8), num_samples=50, run_dir=tmp_path / "r", optimizer=made, progress=False)
    with pytest.raises(CheckpointError, match=r"the optimizer of .* is adam\(lr=0.1\), which only its own"):
        runs.fit_settings(runs.load_run(tmp_path / "r").config, tmp_path / "r")


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a background job
    try:
        run = pv.fit(small_vae(), StopAfter([torch.ones(10, 8, 8)] * 5, 3, signal.SIGINT), epochs=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert run.samples == 50
