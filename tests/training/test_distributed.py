"""Two processes of torchrun are one run: the same numbers as one process, one writer, and no end in a deadlock.

The file is a test and the script that torchrun starts: what the processes find they write down, one file each, and the
tests compare it with what one process finds.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from filelock import FileLock
from pyro.infer import Trace_ELBO
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import pyro_vae as pv
from pyro_vae.parallel import Ranks
from pyro_vae.training import RunDirectoryError
from pyro_vae.training.checkpoint import RunDirectory

RANK = int(os.environ.get("RANK", "0"))
ROOT = Path(__file__).parents[2]


# Programs, in both kinds of processes -------------------------------------------------------------------------------


def noisy(num_data=None):
    """Its noise comes with the data, so that it is the same however many processes there are. Only rank 0's counts."""
    torch.manual_seed(1 + RANK)
    encoder, decoder = nn.Linear(3, 4), nn.Linear(2, 3)

    def plate(x):
        return pyro.plate("data", num_data, subsample_size=len(x)) if num_data else pyro.plate("data", len(x))

    def model(x, e):
        pyro.module("decoder", decoder)
        scale = pyro.param("scale", torch.tensor(1.0 + RANK), constraint=dist.constraints.positive)
        with plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z).tanh(), scale).to_event(1), obs=x)

    def guide(x, e):
        pyro.module("encoder", encoder)
        with plate(x):
            loc, log_scale = encoder(x).chunk(2, -1)
            z = loc + log_scale.exp() * e
            log_q = dist.Normal(loc, log_scale.exp()).to_event(1).log_prob(z)
            pyro.sample("z", dist.Delta(z, log_density=log_q, event_dim=1))

    return pv.Program(model, guide)


def columns(count=22):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 3, generator=generator), torch.randn(count, 2, generator=generator)


def loader(x, e, batch_size=7, **more):
    return DataLoader(TensorDataset(x, e), batch_size=batch_size, **more)


# Seven rows a batch: shards of four and three, and a last batch of one row, which only rank 0 has.
SETTINGS = {"batch_size": 7, "epochs": 6, "optimizer": "adam", "learning_rate": 0.05, "progress": False}
EVERYTHING = {"prior_scale": 1.0, "max_grad_norm": 0.5, "kl_warmup": 60, "valid": columns(9), "patience": 50}
CASES = {
    "eager": lambda: (noisy(), columns(), {"compile": False}),
    "captured": lambda: (noisy(), columns(), {}),
    "everything": lambda: (noisy(), columns(), EVERYTHING),
    "the plate states N": lambda: (noisy(22), columns(), {"compile": False}),
    "N in one batch": lambda: (noisy(6), columns(6), {"prior_scale": 1.0}),
    "an ELBO of Pyro's": lambda: (noisy(22), columns(), {"objective": Trace_ELBO()}),
    "IWAE, the guide alone": lambda: (noisy(), columns(), {"objective": pv.IWAE(2), "trained": "guide"}),
    "wake-sleep weights": lambda: (noisy(), columns(), {"objective": pv.ReweightedWakeSleep(2), "compile": False}),
    "a list of batches": lambda: (noisy(), list(loader(*columns())), {}),
    "a loader": lambda: (noisy(), loader(*columns()), {}),
}


def parameters(program):
    named = program.named_parameters()
    return {name: tensor.detach().clone() for name, tensor in (named.items() if isinstance(named, dict) else named)}


def without_seconds(history):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


def grey_program():
    """Its latent does not bear on the data: log p(x) is known without noise, and tells which grey levels were drawn."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(torch.tensor([0.2, 0.4, 0.7])).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    return pv.Program(model, guide)


def sequence_program():
    """One level of a sequence and its steps, with the posterior as guide."""

    def steps(x, lengths):
        return torch.arange(x.shape[1]) < lengths[:, None]

    def model(x, lengths):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            law = dist.Normal(z[..., None].expand(*z.shape, x.shape[1]), 1.0)
            pyro.sample("x", law.mask(steps(x, lengths)).to_event(1), obs=x)

    def guide(x, lengths):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x * steps(x, lengths)).sum(-1) / (lengths + 1), (lengths + 1.0).rsqrt()))

    return pv.Program(model, guide)


def scores():
    """Values per datum and bounds that have no noise, whatever the number of processes."""
    generator = torch.Generator().manual_seed(7)
    exact = pv.LinearGaussian(torch.tensor([[1.0], [0.5], [-1.0]]))
    x, grey = torch.randn(7, 3, generator=generator), torch.rand(2500, 3, generator=generator)
    shuffled = DataLoader(TensorDataset(x), batch_size=2, shuffle=True)
    sequences = sequence_program(), (torch.randn(7, 4, generator=generator), torch.tensor([1, 4, 2, 3, 3, 1, 4]))
    by_steps = pv.log_marginal(*sequences, num_particles=2, batch_size=2)
    tensors = {
        "steps": by_steps.num_steps,
        "per step": torch.tensor(by_steps.per_step),
        "exact": pv.log_marginal(exact, x, num_particles=3, batch_size=2).values,
        "one datum": pv.log_marginal(exact, x[:1], num_particles=3).values,
        "grey": pv.log_marginal(grey_program(), grey, num_particles=2, seed=3, batch_size=700).values,
    }
    bounds = [
        pv.evaluate_bound(exact, x),
        pv.evaluate_bound(exact, x, num_data=1),
        pv.evaluate_bound(exact, shuffled),
        pv.evaluate_bound(exact, [x[:3], x[3:]]),
        pv.evaluate_bound(grey_program(), grey, seed=3, num_data=1900),
    ]
    in_steps = [pv.evaluate_bound(*sequences), pv.evaluate_bound(sequences[0], loader(*sequences[1], batch_size=3))]
    per_step = [[bound.per_step, bound.per_step_std_error] for bound in in_steps]
    return tensors, [[bound.mean, bound.std_error] for bound in (*bounds, *in_steps)] + per_step


DIGITS = {"num_samples": 3000, "evaluate_every": 700, "optimizer": "adam", "learning_rate": 1e-3, "progress": False}


def digits_run(objective=None, **more):
    torch.manual_seed(3 + RANK)
    vae = pv.VAE(data_shape=(8, 8), latent_dim=2, hidden_dims=(8,))
    run = pv.fit(vae, pv.load_dataset("digits"), objective=objective, **{**DIGITS, **more})
    return vae, run


# What each of torchrun's processes does -----------------------------------------------------------------------------


def refused(function):
    try:
        function()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


class Normalised(nn.Module):
    """Buffers that steps write, and one that they do not."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.layer = nn.Linear(3, 4)
        self.register_buffer("constant", torch.tensor([0.1, -torch.inf, torch.nan]))

    def forward(self, x):
        return self.layer(self.norm(x))


def normalised():
    encoder, decoder = Normalised(), nn.Linear(2, 3)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x.flatten(0, -2)).reshape(*x.shape[:-1], 4).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return pv.Program(model, guide), encoder


def recorded_noise():
    """What the process draws in a step, written down."""
    drawn = []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(pyro.param("a", torch.ones(())) * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            drawn.append(pyro.sample("z", dist.Normal(0.0, pyro.param("s", torch.ones(())))).detach().flatten())

    program = pv.Program(model, guide)
    pv.fit(program, torch.zeros(10), batch_size=10, epochs=4, compile=False, progress=False)
    return torch.cat([draws for draws in drawn if len(draws) == 5][-8:])


def sharded_loader_run():
    x, e = columns(23)
    sampler = DistributedSampler(TensorDataset(x, e), shuffle=False)
    program = noisy()
    run = pv.fit(program, loader(x, e, 4, sampler=sampler), **SETTINGS)
    return program, run, sampler.epoch


def checks(out, report):
    """Everything that needs two processes and no accident."""
    if RANK:  # only rank 0 writes

        def fail(*_):
            raise AssertionError("rank 1 writes")

        for name in ("save", "write_config", "write_metrics", "append_metrics"):
            setattr(RunDirectory, name, fail)
    tensors = {}

    def keep(case, named):
        tensors.update({f"{case}/{name}": value.contiguous().clone() for name, value in named.items()})

    torch.set_default_dtype(torch.float64)
    for case, make in CASES.items():
        program, data, more = make()
        run = pv.fit(program, data, **SETTINGS, **more)
        keep(case, parameters(program))
        report[case] = {"history": run.history, "samples": run.samples, "path": run.path}
    program, run, epoch = sharded_loader_run()
    keep("sharded", parameters(program))
    report["sharded"] = {"samples": run.samples, "epoch": epoch}
    program, encoder = normalised()
    run = pv.fit(program, columns()[0][:20], batch_size=5, epochs=3, progress=False)
    keep("normalised", parameters(program) | dict(encoder.named_buffers()))
    keep("noise", {"drawn": recorded_noise()})
    values, report["bounds"] = scores()
    keep("scores", values)

    x, e = columns()
    e[3] = 1e200
    report["not finite"] = refused(lambda: pv.fit(noisy(), (x, e), **SETTINGS))
    report["mcem"] = refused(lambda: pv.fit(noisy(), columns(), objective=pv.MCEM(), **SETTINGS))
    report["compare"] = refused(lambda: pv.compare({"a": pv.SGVB()}, noisy, columns(), epochs=1))
    report["full"] = refused(lambda: digits_run(run_dir=out))
    chains = pv.MCEM(2, persistent=False, num_updates=2)
    run = pv.fit(pv.LinearGaussian(torch.ones(3, 2)), x, objective=chains, **SETTINGS, run_dir=out / "chains")
    report["chains"] = run.history

    torch.set_default_dtype(torch.float32)
    vae, run = digits_run(compile=False)
    keep("straight", parameters(vae))
    report["straight"] = run.history
    _, run = digits_run(compile=False, num_samples=1000, run_dir=out / "two")
    if RANK == 0:
        shutil.copytree(out / "two", out / "two then one")
    vae, run = digits_run(compile=False, run_dir=out / "two", resume=True)
    keep("resumed", parameters(vae))
    report["resumed"] = run.history
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, run = digits_run(compile=False, run_dir=out / "one", resume=True)
    report["one then two"] = {"samples": run.samples, "warnings": [str(warning.message) for warning in caught]}
    save_file(tensors, out / f"{RANK}.safetensors")


class Dying(pv.SGVB):
    """Rank 1's process is killed in the course of its 17th step, the first time."""

    steps = 0

    def differentiable_loss(self, *args, **kwargs):
        self.steps += 1
        if RANK and self.steps == 17 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().differentiable_loss(*args, **kwargs)


def killed(out, report):
    _, run = digits_run(Dying(), compile=False, checkpoint_every=500, run_dir=out / "run")
    report["restarts"] = os.environ["TORCHELASTIC_RESTART_COUNT"]
    report["history"] = run.history


def endless(out, report):
    digits_run(num_samples=10**9, evaluate_every=1000, checkpoint_every=10**9, run_dir=out / "run")


def main(task, out):
    torch.set_num_threads(1)
    report = {}
    globals()[task](out, report)
    (out / f"{RANK}.json").write_text(json.dumps(report))


# The tests ----------------------------------------------------------------------------------------------------------


def started(*command, restarts=0):
    """Two processes of torchrun."""
    options = ["--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process):
    """Output and messages of processes that must succeed."""
    with process:
        try:
            output, messages = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise
    assert process.returncode == 0, messages
    return output, messages


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two processes found, (reports, tensors) by rank, and where; once for all of pytest's workers."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if run else base) / f"distributed-{run}"
    with FileLock(f"{out}.lock"):
        if not (out / "1.json").exists():
            out.mkdir()
            torch.set_default_dtype(torch.float32)
            digits_run(compile=False, num_samples=1000, run_dir=out / "one")
            finished(started(__file__, "checks", out))
    reports = [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]
    return reports, [load_file(out / f"{rank}.safetensors") for rank in (0, 1)], out


def of(tensors, case):
    return {name.split("/", 1)[1]: value for name, value in tensors.items() if name.startswith(f"{case}/")}


def assert_equal(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    assert a
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_run(found, case):
    reports, tensors, _ = found
    program, data, more = CASES[case]()
    run = pv.fit(program, data, **SETTINGS, **more)
    assert_equal(of(tensors[0], case), parameters(program), 1e-10)
    for report in reports:
        assert report[case]["samples"] == run.samples
        assert report[case]["path"] == run.path
        assert len(report[case]["history"]) == len(run.history)
        for theirs, ours in zip(report[case]["history"], run.history, strict=True):
            bounds = [name for name in ours if name.endswith("bound") and ours[name] is not None]
            assert [theirs[n] for n in bounds] == pytest.approx([ours[n] for n in bounds], abs=1e-9)


def test_both_processes_know_the_same(found):
    (first, second), tensors, _ = found
    for case in (*CASES, "normalised", "sharded", "scores", "straight", "resumed"):
        assert_equal(of(tensors[0], case), of(tensors[1], case))
    for case in CASES:
        assert first[case] == second[case]  # seconds too
    assert first["straight"] == second["straight"]
    assert first["chains"] == second["chains"]
    assert first["chains"][-1]["train_log_joint"] is not None


def test_each_process_draws_noise_of_its_own(found):
    _, tensors, _ = found
    first, second = (of(one, "noise")["drawn"] for one in tensors)
    assert len(first.unique()) == len(second.unique()) == len(first)
    assert not set(first.tolist()) & set(second.tolist())


def test_buffers_are_averaged_counted_and_left_alone(found):
    _, tensors, _ = found
    program, encoder = normalised()
    pv.fit(program, columns()[0][:20], batch_size=5, epochs=3, progress=False)
    theirs, ours = of(tensors[0], "normalised"), dict(encoder.named_buffers())
    assert theirs["norm.num_batches_tracked"] == 12
    assert torch.equal(theirs["constant"][:2], torch.tensor([0.1, -torch.inf]))
    assert theirs["constant"][2].isnan()
    torch.testing.assert_close(theirs["norm.running_mean"], ours["norm.running_mean"])  # means of parts, by their sizes


def test_a_distributed_sampler_has_cut_the_data_already(found):
    reports, tensors, _ = found
    x, e = columns(23)
    whole = noisy()
    pv.fit(whole, loader(torch.cat([x, x[:1]]), torch.cat([e, e[:1]]), 8), **SETTINGS)
    assert_equal(of(tensors[0], "sharded"), parameters(whole), 1e-10)
    assert [report["sharded"] for report in reports] == [{"samples": 24 * 6, "epoch": 5}] * 2


def test_scores_and_bounds_are_those_of_one_process(found):
    reports, tensors, _ = found
    values, bounds = scores()
    assert_equal(of(tensors[0], "scores"), values, 1e-12)
    for report in reports:
        for theirs, ours in zip(report["bounds"], bounds, strict=True):
            assert theirs == pytest.approx(ours, abs=1e-12, nan_ok=True)


def test_what_one_process_refuses_all_do(found):
    reports, _, out = found
    assert reports[0]["not finite"] == reports[1]["not finite"]
    kind, message = reports[0]["not finite"]
    assert kind == "NonFiniteLossError"
    assert "site 'z'" in message
    for report in reports:
        assert report["mcem"][0] == report["compare"][0] == "ValueError"
        assert "MCEM(persistent=False" in report["mcem"][1]
        assert "n_jobs" in report["compare"][1]
        assert report["full"] == [RunDirectoryError.__name__, reports[0]["full"][1]]
        assert str(out) in report["full"][1]


def test_a_resumed_run_of_two_is_the_same_bit_for_bit(found):
    reports, tensors, _ = found
    assert_equal(of(tensors[0], "straight"), of(tensors[0], "resumed"))
    straight = without_seconds(reports[0]["straight"])
    assert [row for row in without_seconds(reports[0]["resumed"]) if row in straight] == straight


def test_another_number_of_processes_goes_on_and_says_so(found):
    reports, _, out = found
    for report in reports:
        assert report["one then two"]["samples"] == 3094  # 1,297 an epoch: the last of each is short
    assert any("processes 1, now 2" in message for message in reports[0]["one then two"]["warnings"])
    assert reports[1]["one then two"]["warnings"] == []
    torch.set_default_dtype(torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, run = digits_run(compile=False, run_dir=out / "two then one", resume=True)
    assert any("processes 2, now 1: it goes on, but not bit for bit" in str(warning.message) for warning in caught)
    assert run.samples == 3094
    shutil.rmtree(out / "two then one")


@pytest.mark.slow
def test_a_killed_process_loses_nothing(found, tmp_path):
    reports, tensors, _ = found
    # One restart is needed. There may be more: torch's processes have been seen to abort, in one run of 60 or so.
    finished(started(__file__, "killed", tmp_path, restarts=3))
    ended = json.loads((tmp_path / "0.json").read_text())
    assert int(ended["restarts"]) >= 1
    assert without_seconds(ended["history"]) == without_seconds(reports[0]["straight"])
    torch.set_default_dtype(torch.float32)
    assert_equal(of(tensors[0], "straight"), parameters(pv.load_run(tmp_path / "run").program))


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_and_ends(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    with started(__file__, "endless", tmp_path) as process:
        deadline = time.monotonic() + 120
        while not (directory.metrics_file.exists() and directory.metrics_file.read_text()):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, messages = process.communicate(timeout=60)
    assert process.returncode != 0
    assert directory.load().state["position"]["samples"] >= 1000  # the only other checkpoint is the start's
    assert messages.count("TrainingInterrupted: stopped by SIGTERM") == 2


@pytest.mark.slow
def test_the_command_line_speaks_once(tmp_path):
    small = ["--epochs", "1", "--hidden-dims", "8", "--latent-dim", "2"]
    output, _ = finished(started("-m", "pyro_vae", "train", *small, "--run-dir", tmp_path / "run"))
    assert output.count("training a VAE") == 1
    assert output.count("run directory") == 1
    assert json.loads((tmp_path / "run/config.json").read_text())["environment"]["processes"] == 2


def test_parts_cover_everything_once():
    for size in (1, 2, 3, 5):
        for count in (1, 2, 7, 15):
            parts = [list(range(count))[Ranks(rank, size).part(count)] for rank in range(size)]
            assert [row for part in parts for row in part] == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            assert parts == [part.tolist() for part in torch.arange(count).tensor_split(size)]


def test_rank_0_keeps_the_seed_and_others_have_their_own():
    assert Ranks().seed(7) == Ranks(0, 4).seed(7) == 7
    seeds = {Ranks(rank, 4).seed(seed, *more) for rank in (1, 2, 3) for seed in (0, 7) for more in ((), (5,))}
    assert len(seeds) == 12


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
