"""A comparison: every objective from the same start, scored alike; killed, it is finished by the same call."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import joblib
import numpy as np
import pyro.infer
import pytest
import torch
from matplotlib.figure import Figure

import pyro_vae as pv
from pyro_vae.experiments import Comparison, load_comparison
from pyro_vae.training import CheckpointError, RunDirectoryError, TrainingInterrupted
from pyro_vae.training.checkpoint import RunDirectory

DATA = pv.load_dataset("digits")
QUICK = {"num_samples": 400, "evaluate_every": 100, "evaluation_size": 50, "num_particles": 20, "num_data": 30}
TWO = {"AEVB": pv.SGVB(), "wake-sleep": pv.WakeSleep()}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def vae():
    return pv.VAE((8, 8), 2, (8,))


def compare(objectives=None, factory=vae, data=DATA, **options):
    return pv.compare(objectives or TWO, factory, data, **{**QUICK, "seeds": 1, **options})


def scores(comparison):
    return [(row["objective"], row["setting"], row["seed"], row["log_marginal"]) for row in comparison.rows]


def without_times(comparison):
    """Everything that must not depend on when and where it was computed."""
    timed = ("seconds", "seconds_to_bound")
    rows = [{name: value for name, value in row.items() if name not in timed} for row in comparison.rows]
    histories = {
        label: [[{name: value for name, value in row.items() if name != "seconds"} for row in run] for run in runs]
        for label, runs in comparison.histories.items()
    }
    return rows, histories, comparison.reference_bound, comparison.scored


# What is compared.


def test_a_member_is_fit_and_log_marginal_and_nothing_else():
    (row,) = compare({"IWAE": pv.IWAE(3)}, seeds=[5], learning_rate=0.1).rows
    torch.manual_seed(5)
    program = vae()
    settings = {"num_samples": 400, "evaluate_every": 100, "evaluation_size": 50, "learning_rate": 0.1}
    run = pv.fit(program, DATA, objective=pv.IWAE(3), evaluate_with=pv.SGVB(), seed=5, **settings)
    test = torch.as_tensor(DATA.test[:30])
    score = pv.log_marginal(program, test, num_particles=20, binarize=DATA.binarize)
    assert row["log_marginal"] == score.mean
    assert (row["log_marginal_se"], row["mc_error"]) == (score.std_error, score.mc_error)
    assert row["median_ess"] == score.diagnostics["ess"].median().item()
    assert (row["test_bound"], row["samples"]) == (run.history[-1]["test_bound"], 400)
    assert row["error"] is None


def test_the_grid_is_objectives_by_settings_by_seeds():
    settings = {"slow": {"learning_rate": 0.01}, "fast": {"learning_rate": 0.1}}
    result = compare(settings=settings, seeds=2, num_samples=200)
    members = [(row["objective"], row["setting"], row["seed"]) for row in result.rows]
    assert members == [(o, s, i) for o in ("AEVB", "wake-sleep") for s in ("slow", "fast") for i in (0, 1)]
    assert list(result.histories) == ["AEVB, slow", "AEVB, fast", "wake-sleep, slow", "wake-sleep, fast"]
    assert len({row["log_marginal"] for row in result.rows}) == 8


def test_all_objectives_start_from_the_same_parameters(monkeypatch):
    made = []

    def factory():
        made.append(vae())
        return made[-1]

    def first_parameters(self, model, guide, *args, **kwargs):
        started.append([t.detach().clone() for t in made[-1].parameters()])
        raise RuntimeError("seen enough")

    started = []
    monkeypatch.setattr(pv.SGVB, "differentiable_loss", first_parameters)
    monkeypatch.setattr(pv.IWAE, "differentiable_loss", first_parameters)
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    compare({"AEVB": pv.SGVB(), "IWAE": pv.IWAE(2)}, factory, seeds=2)
    assert torch.equal(torch.rand(2), wanted)  # the surrounding random numbers are left alone
    (a0, a1, b0, b1) = started
    assert all(torch.equal(x, y) for x, y in zip(a0 + a1, b0 + b1, strict=True))
    assert not torch.equal(a0[0], a1[0])


class Halved(pyro.infer.Trace_ELBO):
    """A user's own objective, with a state of its own."""

    steps = 0

    def differentiable_loss(self, model, guide, *args, **kwargs):
        self.steps += 1
        return 0.5 * super().differentiable_loss(model, guide, *args, **kwargs)


def test_a_users_own_objective_takes_part_by_being_named():
    own = Halved()
    result = compare({"own": own, "Pyro's": pyro.infer.Trace_ELBO(), "AEVB": pv.SGVB()})
    assert [row["error"] for row in result.rows] == [None] * 3
    assert own.steps == 0  # each training works on a copy
    bounds = [[row["test_bound"] for row in result.histories[name][0]] for name in ("own", "Pyro's")]
    assert len(bounds[0]) == 4
    assert all(np.isfinite(bounds[0] + bounds[1]))  # of SGVB, per datum, whatever was trained


def test_a_member_that_fails_is_a_row_with_its_error_and_stops_no_other(tmp_path):
    def without_guide(x):
        raise ZeroDivisionError("in the guide's second half")

    class Breaks(pv.SGVB):
        def differentiable_loss(self, model, guide, *args, **kwargs):
            without_guide(args)

    layers = [5, 4]
    objectives = {"SGVB": pv.SGVB(), "own": Breaks(), "wake-sleep": pv.WakeSleep()}
    result = compare(
        objectives, lambda: pv.SigmoidBeliefNetwork((8, 8), layers), run_dir=tmp_path / "c", seeds=2, num_samples=200
    )
    table = result.table()
    failed, own, fine = result.summary()
    assert (failed["n_ok"], failed["n"], failed["log_marginal"]) == (0, 2, None)
    assert "reparameterised" in failed["error"]
    assert own["error"].startswith("ZeroDivisionError: in the guide's second half (test_compare.py, line")
    assert fine["n_ok"] == 2
    assert fine["log_marginal"] is not None
    assert "0 of 2" in table
    assert f"SGVB: 2 of 2 failed: {failed['error']}" in table
    lines = table.splitlines()
    assert lines[2].startswith("| wake-sleep ")  # best first, failures last
    assert not (tmp_path / "c/SGVB_seed0/score.json").exists()  # a rerun tries again
    assert load_comparison(tmp_path / "c").rows == result.rows


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,), lambda x: {"x": x}, lambda x: x.numpy()])
def test_data_of_any_form_with_test_data(form):
    train, test = (getattr(DATA, split) > 7 for split in ("train", "test"))
    result = compare({"AEVB": pv.SGVB()}, data=form(train.double()), test=form(test.double()))
    assert result.rows[0]["error"] is None
    assert result.rows[0]["log_marginal"] < 0
    few = compare({"AEVB": pv.SGVB()}, data=form(train.double()), test=form(test[:30].double()), num_data=None)
    assert few.rows[0]["log_marginal"] == result.rows[0]["log_marginal"]
    assert few.scored["test_data"] != result.scored["test_data"]


def test_monte_carlo_em_is_scored_by_what_needs_no_trained_guide():
    em = {"MCEM": pv.MCEM(num_leapfrog=2, num_updates=1), "AEVB": pv.SGVB()}
    for options in ({}, {"method": "ais"}):
        with pytest.raises(ValueError, match=r"'MCEM' trains no guide.*refit_samples.*prior"):
            compare(em, **options)
    ais = {"method": "ais", "num_particles": 2, "num_data": 5}
    result = compare(em, scorer_options={"initial": "prior", "num_steps": 5, "num_pilot": 2}, **ais)
    assert [row["error"] for row in result.rows] == [None, None]
    assert result.rows[0]["test_bound"] is None
    assert "num_pareto_k_above_0.7" not in result.rows[0]
    assert result.rows[0]["samples_to_bound"] is None
    assert result.histories["MCEM"][0][-1]["train_log_joint"] < 0
    assert "initial=prior" in result.table()
    assert isinstance(result.plot(), Figure)


def test_a_refit_trains_every_guide_and_no_model(tmp_path):
    em = {"MCEM": pv.MCEM(num_leapfrog=2, num_updates=1), "AEVB": pv.SGVB()}
    result = compare(em, refit_samples=300, learning_rate=0.1, run_dir=tmp_path / "c", evaluate_every=None)
    assert [row["error"] for row in result.rows] == [None, None]
    for name in ("MCEM", "AEVB"):
        trained, refitted = (pv.load_run(tmp_path / "c" / f"{name}_seed0" / part).program for part in ("", "refit"))
        for parameter, value in trained.named_parameters():
            same = torch.equal(value, refitted.get_parameter(parameter))
            assert same == parameter.startswith("decoder"), (name, parameter)
    score = pv.log_marginal(refitted, DATA.test[:30], num_particles=20, binarize=DATA.binarize)
    assert result.rows[1]["log_marginal"] == score.mean


# What is told.


def history(*bounds):
    return [{"samples": 100 * i, "seconds": 2.0 * i, "test_bound": bound} for i, bound in enumerate(bounds, 1)]


def member(objective, seed, curve, log_marginal=-1.0, setting="", **more):
    final = curve[-1]["test_bound"] if curve else None
    row = {"objective": objective, "setting": setting, "seed": seed, "log_marginal": log_marginal, "mc_error": 0.1}
    return {
        **row,
        "scored_bound": final,
        "test_bound": final,
        "samples": 300,
        "seconds": 6.0,
        "error": None,
        **more,
    }, curve


def test_the_reference_is_the_bound_that_all_reach_and_times_are_to_it():
    result = Comparison.of(
        [
            member("good", 0, history(-9, -5, -1)),
            member("good", 1, history(-7, -3, -2)),
            member("bad", 0, history(-9, -7, -6)),
            member("bad", 1, history(-9, -5, -8)),
            member("EM", 0, history(None, None, None)),
            member("failed", 0, [], log_marginal=None, error="no"),
        ]
    )
    assert result.reference_bound == -7.0  # bad's mean over seeds of -6 and -8
    assert [row["samples_to_bound"] for row in result.rows] == [200, 100, 200, 200, None, None]
    assert [row["seconds_to_bound"] for row in result.rows] == [4.0, 2.0, 4.0, 4.0, None, None]
    good, bad, em, failed = result.summary()
    assert (good["samples_to_bound"], good["n_reached"]) == (150, 2)
    assert (bad["test_bound"], bad["test_bound_se"]) == (-7.0, 1.0)
    assert (em["samples_to_bound"], em["n_reached"], em["test_bound_se"]) == (None, 0, None)
    assert (failed["n_ok"], failed["error"]) == (0, "no")


def test_a_given_reference_and_how_many_reached_it():
    curves = [history(-9, -5, -1), history(-9, -5, -4)]
    result = Comparison.of([member("a", i, c) for i, c in enumerate(curves)], reference_bound=-2.0)
    (entry,) = result.summary()
    assert (entry["samples_to_bound"], entry["n_reached"], entry["n"]) == (300, 1, 2)
    assert "300 (1 of 2)" in result.table()
    assert "not reached" in Comparison.of([member("a", 0, curves[0])], reference_bound=5.0).table()


def test_summary_takes_the_error_over_seeds():
    values = [-10.0, -12.0, -17.0]
    (entry,) = Comparison.of([member("a", i, history(v), v) for i, v in enumerate(values)]).summary()
    assert entry["log_marginal"] == pytest.approx(-13.0)
    assert entry["log_marginal_se"] == pytest.approx(np.std(values, ddof=1) / 3**0.5)
    (alone,) = Comparison.of([member("a", 0, history(-1.0))]).summary()
    assert alone["log_marginal_se"] is None


def test_the_table_has_the_best_first_and_no_empty_columns():
    rows = [member("worse", 0, history(-3), -3.0), member("better [K=5]", 0, history(-2), -2.0)]
    scored = {"method": "importance", "num_particles": 5000, "num_data": 100}
    table = Comparison.of(rows, scored=scored).table()
    heads = [cell.strip() for cell in table.splitlines()[0].strip("|").split("|")]
    expected = ["objective", "log p(x)", "lower bound", "seconds", "samples to -3.00", "seconds to -3.00", "seeds"]
    assert heads == expected
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:4]] == ["better [K=5]", "worse"]
    assert "importance, 5,000 particles, the first 100 test data" in table
    assert repr(Comparison.of(rows, scored=scored)) == table


def test_results_are_strict_json_and_come_back(tmp_path):
    rows = [member("a", 0, history(-3.0, -2.0), mc_error=float("nan")), member("b", 0, history(None), None)]
    result = Comparison.of(rows, scored={"options": {"density": len}})
    result.save(tmp_path / "new")
    text = (tmp_path / "new/results.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    again = load_comparison(tmp_path / "new")
    assert again.rows[0]["mc_error"] is None
    assert again.histories == result.histories
    assert again.summary()[1] == result.summary()[1]
    assert (tmp_path / "new/table.md").read_text() == result.table()
    assert (tmp_path / "new/curves.png").read_bytes().startswith(b"\x89PNG")
    Comparison.of([rows[1]]).save(tmp_path / "none")
    assert not (tmp_path / "none/curves.png").exists()


# Parallel, again, and killed.


def test_two_processes_give_the_same_as_one_bit_for_bit(tmp_path):
    options = {"factory": lambda: vae(), "seeds": 1, "settings": {"a": {}, "b": {"optimizer": "adam"}}}
    one = compare(**options)
    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        two = compare(**options, n_jobs=2, run_dir=tmp_path / "c")
    assert without_times(one) == without_times(two)
    assert without_times(load_comparison(tmp_path / "c")) == without_times(two)
    with joblib.parallel_config(backend="threading", n_jobs=3):  # threads share their random numbers: one at a time
        assert without_times(compare(**options)) == without_times(one)


def touched(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.name != ".lock"}


def test_what_is_finished_is_not_done_again(tmp_path, monkeypatch):
    first = compare(run_dir=tmp_path)
    before = touched(tmp_path / "AEVB_seed0")
    monkeypatch.setattr(pv.SGVB, "differentiable_loss", lambda *_: pytest.fail("trained again"))
    again = compare({**TWO, "IWAE": pv.IWAE(2)}, run_dir=tmp_path)
    assert touched(tmp_path / "AEVB_seed0") == before
    assert scores(again)[:2] == scores(first)
    assert len(scores(load_comparison(tmp_path))) == 3
    assert {row["seconds"] for row in first.rows} < {row["seconds"] for row in again.rows}


def test_another_scorer_scores_again_and_trains_nothing(tmp_path, monkeypatch):
    compare(run_dir=tmp_path)
    checkpoint = (tmp_path / "AEVB_seed0/checkpoint.safetensors").read_bytes()
    monkeypatch.setattr(pv.SGVB, "differentiable_loss", lambda *_: pytest.fail("trained again"))
    again = compare(run_dir=tmp_path, num_particles=50)
    assert (tmp_path / "AEVB_seed0/checkpoint.safetensors").read_bytes() == checkpoint
    monkeypatch.undo()
    assert scores(again) == scores(compare(num_particles=50))
    (tmp_path / "AEVB_seed0/score.json").write_text('{"scored": ')  # not whole: scored again
    assert scores(compare(run_dir=tmp_path, num_particles=50)) == scores(again)


def test_a_larger_budget_trains_on_and_a_smaller_one_is_refused(tmp_path):
    compare(run_dir=tmp_path, num_samples=200)
    longer = compare(run_dir=tmp_path, num_samples=400)
    assert without_times(longer) == without_times(compare(num_samples=400))
    with pytest.raises(CheckpointError, match="trained with num_samples=400, got 300"):
        compare(run_dir=tmp_path, num_samples=300)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 50}, "batch_size=100, got 50"),
        ({"objectives": {"AEVB": pv.SGVB(num_particles=2)}}, "'num_particles': 1.*got.*'num_particles': 2"),
        ({"factory": lambda: pv.VAE((8, 8), 3, (8,))}, "another architecture"),
        ({"factory": lambda: pv.VAE((8, 8), 2, (8,), activation="relu")}, "relu"),
        ({"data": replace(DATA, train=DATA.train[:100])}, "checksums differ"),
        ({"test": DATA.valid}, "test data are not those"),
    ],
)
def test_another_comparison_in_the_directory_is_refused_and_nothing_is_lost(tmp_path, change, message):
    compare({"AEVB": pv.SGVB()}, run_dir=tmp_path, num_samples=100)
    before = touched(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        compare(**{"objectives": {"AEVB": pv.SGVB()}, "run_dir": tmp_path, "num_samples": 100, **change})
    assert touched(tmp_path) == before


def test_two_comparisons_in_one_directory(tmp_path):
    with RunDirectory(tmp_path).locked(), pytest.raises(RunDirectoryError, match="another process"):
        compare(run_dir=tmp_path)


class Stops(pv.SGVB):
    """Sends this process a signal in its third step, once."""

    done = False

    def differentiable_loss(self, model, guide, *args, **kwargs):
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 3 and not Stops.done:
            Stops.done = True
            os.kill(os.getpid(), signal.SIGTERM)
        return super().differentiable_loss(model, guide, *args, **kwargs)


def test_a_signal_stops_everything_and_the_same_call_goes_on(tmp_path):
    objectives = {"AEVB": pv.SGVB(), "stops": Stops(), "IWAE": pv.IWAE(2)}
    Stops.done = False
    with pytest.raises(
        TrainingInterrupted, match=r"SIGTERM; what was done is kept in .*the same call goes on"
    ) as caught:
        compare(objectives, run_dir=tmp_path)
    assert caught.value.signal == signal.SIGTERM
    assert not (tmp_path / "IWAE_seed0").exists()
    assert json.loads((tmp_path / "stops_seed0/state.json").read_text())["position"]["samples"] == 300
    assert without_times(compare(objectives, run_dir=tmp_path)) == without_times(compare(objectives))


SCRIPT = """
import sys, time
import torch
import pyro_vae as pv

class Slow(pv.SGVB):
    pause = 0.0

    def differentiable_loss(self, model, guide, *args, **kwargs):
        time.sleep(self.pause)
        return super().differentiable_loss(model, guide, *args, **kwargs)

def comparison(run_dir, pause=0.0, n_jobs=None):
    torch.set_default_dtype(torch.float64)
    slow = Slow()
    slow.pause = pause
    return pv.compare(
        {"AEVB": pv.SGVB(), "slow": slow}, lambda: pv.VAE((8, 8), 2, (8,)), pv.load_dataset("digits"), seeds=1,
        run_dir=run_dir, num_samples=3000, checkpoint_every=200, evaluation_size=50, num_particles=20, num_data=30,
        n_jobs=n_jobs,
    )

if __name__ == "__main__":
    comparison(sys.argv[1], pause=0.2, n_jobs=int(sys.argv[2]))
"""


def until(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_free(run_dir):
    try:
        with RunDirectory(run_dir).locked():
            return True
    except RunDirectoryError:
        return False


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_killed_a_comparison_is_finished_by_the_same_call(tmp_path, monkeypatch, n_jobs):
    (tmp_path / "killed_script.py").write_text(textwrap.dedent(SCRIPT))
    monkeypatch.syspath_prepend(tmp_path)
    folder, root = tmp_path / "c", Path(pv.__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, str(tmp_path / "killed_script.py"), str(folder), str(n_jobs)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    until(lambda: (folder / "AEVB_seed0/score.json").exists() and (folder / "slow_seed0/state.json").exists())
    until(lambda: json.loads((folder / "slow_seed0/state.json").read_bytes())["position"]["samples"] >= 400)
    process.kill()
    process.wait()
    until(lambda: is_free(folder / "slow_seed0"), 20.0)  # the processes that it started save and stop

    reached = json.loads((folder / "slow_seed0/state.json").read_text())["position"]["samples"]
    assert 400 <= reached < 3000
    assert not (folder / "results.json").exists()
    finished = touched(folder / "AEVB_seed0")
    import killed_script

    monkeypatch.delitem(sys.modules, "killed_script")
    again = killed_script.comparison(folder)
    assert touched(folder / "AEVB_seed0") == finished
    straight = killed_script.comparison(None)
    assert scores(again) == scores(straight)
    assert without_times(again) == without_times(straight)
    assert (folder / "results.json").exists()


# What is refused, before any training.

SHARED = torch.nn.Linear(64, 4).double(), torch.nn.Linear(2, 64).double()


def shared_modules():
    import pyro.distributions as dist

    def model(x):
        pyro.module("decoder", SHARED[1])
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=SHARED[1](z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", SHARED[0])
        with pyro.plate("data", len(x)):
            loc, log_scale = SHARED[0](x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return pv.Program(model, guide, data_shape=(64,))


THE_SAME = vae()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objectives": [pv.SGVB()]}, "objectives: expected a mapping"),
        ({"objectives": {"a": pv.SGVB}}, "objective 'a': expected one such as"),
        ({"objectives": {"a": "sgvb"}}, "objective 'a': expected one such as"),
        ({"objectives": {"a b": pv.SGVB(), "a-b": pv.SGVB()}}, "got twice 'a-b_seed0'"),
        ({"factory": lambda seed: vae()}, "program_factory: expected a function that needs no arguments"),
        ({"factory": THE_SAME}, "program_factory: expected"),
        ({"factory": lambda: THE_SAME}, "expected a new program at each call"),
        ({"factory": shared_modules}, "expected a new program at each call"),
        ({"factory": lambda: 3}, "expected a program: an object with .model and .guide"),
        ({"factory": lambda: pv.VAE((7, 7), 2, (8,))}, r"data"),
        ({"data": DATA.train}, "expected test data to score"),
        ({"seeds": 0}, "seeds: expected a whole number of at least 1, got 0"),
        ({"seeds": []}, "seeds: expected"),
        ({"seeds": [1, 1]}, "seeds: expected.*different"),
        ({"seeds": [-1]}, "seeds: expected a whole number from 0"),
        ({"settings": {}}, "settings: expected a mapping"),
        ({"settings": {"a": 0.1}}, "settings: expected a mapping"),
        ({"settings": {"a": {"seed": 3}}}, r"settings\['a'\]: seed cannot be set here"),
        ({"settings": {"a": {"test": DATA.test}}}, "test cannot be set here"),
        ({"settings": {"a": {"learning_rat": 0.1}}}, "did you mean 'learning_rate'"),
        ({"settings": {"a": {"learning_rate": -1}}}, "learning_rate: expected a positive number"),
        ({"batchsize": 10}, "did you mean 'batch_size'"),
        ({"objective": pv.SGVB()}, "objective cannot be set here"),
        ({"resume": True}, "resume cannot be set here"),
        ({"epochs": 3}, "num_samples or epochs"),
        ({"optimizer": "adagard"}, "did you mean 'adagrad'"),
        ({"method": "importnace"}, "did you mean 'importance'"),
        ({"num_particles": 0}, "num_particles: expected"),
        ({"num_data": 0}, "num_data: expected"),
        ({"refit_samples": 0}, "refit_samples: expected"),
        ({"scorer_options": {"num_steps": 3}}, "expected options among"),
        ({"scorer_options": {"seed": 3}}, "seed cannot be set here"),
        ({"n_jobs": 0}, "n_jobs"),
    ],
)
def test_bad_input_is_refused_before_any_training(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(pv.SGVB, "differentiable_loss", lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match=message):
        compare(**{"objectives": {"a": pv.SGVB()}, "run_dir": tmp_path / "c", **change})
    assert not list(tmp_path.glob("c/*/config.json"))


def test_a_program_without_a_guide_needs_a_scorer_without_one():
    def factory():
        return pv.Program(vae().model, data_shape=(8, 8))

    with pytest.raises(ValueError, match="the program has no guide"):
        compare({"MCEM": pv.MCEM()}, factory, refit_samples=100)


def network():
    return pv.SigmoidBeliefNetwork((8, 8), (4,))


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (lambda: pv.VAE((8, 8), 8, (4,)), {"method": "posterior-density"}, "at most 5 latent dimensions.*got 8"),
        (network, {"method": "ais"}, "expected continuous latents, but site 'z_1'"),
        (network, {"refit_samples": 100}, "site 'z_1'.*no reparameterised sample"),
        (
            lambda: pv.VAE((8, 8), 2, (4,), prior="vamp:3"),
            {"refit_samples": 9},
            "parameters that are the guide's alone",
        ),
    ],
)
def test_a_scorer_that_cannot_work_is_refused_before_any_training(factory, options, message, monkeypatch):
    monkeypatch.setattr("pyro_vae.experiments.compare.fit", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(ValueError, match=message):
        compare({"RWS": pv.ReweightedWakeSleep(2)}, factory, num_particles=None, **options)


def test_discrete_guides_are_refitted_by_an_objective_of_theirs():
    found = compare({"RWS": pv.ReweightedWakeSleep(2)}, network, refit_samples=100, refit_objective=pv.WakeSleep())
    assert found.rows[0]["error"] is None
    assert found.scored["refit_objective"]["type"] == "WakeSleep"


def test_the_bound_beside_a_score_is_of_the_parameters_that_were_scored():
    found = compare({"AEVB": pv.SGVB()}, patience=9, num_samples=500, evaluate_every=200)
    history = found.histories["AEVB"][0]
    assert [row["samples"] for row in history] == [200, 400, 500]
    assert found.rows[0]["test_bound"] in [row["test_bound"] for row in history[:2]]


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "results.json").write_text("precious")
    with pytest.raises(RunDirectoryError, match="is not empty and holds no comparison"):
        compare(run_dir=tmp_path)
    assert (tmp_path / "results.json").read_text() == "precious"


def test_the_bound_in_the_table_is_on_the_scored_data():
    """Where log p(x) is of few data, the bound beside it is of the same ones, and so below it."""
    found = compare(num_data=5, num_particles=500)
    assert all(row["scored_bound"] < row["log_marginal"] for row in found.rows)
    assert all(row["scored_bound"] != row["test_bound"] for row in found.rows)
