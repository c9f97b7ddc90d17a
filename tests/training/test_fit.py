"""The loop: what it accepts, what it does with it, what it refuses."""

import functools
import math
from typing import ClassVar
from unittest import mock

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.training import NonFiniteLossError
from pyro_vae.training.checkpoint import RunDirectory
from pyro_vae.training.schedules import Schedule
from pyro_vae.training.step import Batch, EagerStep
from tests.statistics import assert_mean_close
from tests.training.test_resume import assert_same, parameters, small_vae

UNTIL_FLAT = functools.partial(ReduceLROnPlateau, mode="max", threshold_mode="abs")


def ppca(num_data=400):
    """A linear-Gaussian model started away from the parameters that made its data."""
    truth = pv.LinearGaussian(torch.tensor([[1.0], [2.0], [-1.0]]), torch.tensor([0.5, 0.0, -0.5]), noise_scale=0.5)
    with torch.no_grad():
        x = truth.decode(torch.randn(num_data, 1)).sample()
    return truth, pv.LinearGaussian(torch.ones(3, 1)), x


def test_training_reaches_the_evidence_of_the_truth():
    truth, model, x = ppca()
    before = pv.log_marginal(model, x, num_particles=1).mean
    run = pv.fit(model, x, optimizer="adam", learning_rate=0.05, epochs=60, test=x)
    after = run.history[-1]["test_bound"]
    assert before < -5
    assert after > truth.log_marginal(x).mean().item() - 0.02  # the guide is the posterior: the bound is the evidence


def test_forms_of_data_are_the_same_data():
    x = torch.rand(50, 8, 8).round()

    def trained(data):
        vae = small_vae()
        pv.fit(vae, data, epochs=2, batch_size=20)
        return parameters(vae)

    wanted = trained(x)
    for data in (x.numpy(), (x,), {"x": x}, x.flatten(1), x.bool(), (x * 255).to(torch.uint8), x.to(torch.uint8)):
        assert_same(wanted, trained(data))


def test_dictionary_and_tuple_reach_the_arguments_by_name_and_position():
    seen = {}

    def model(x, offset):
        seen["model"] = (x, offset)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(pyro.param("a", torch.ones(())) * z + offset, 1.0), obs=x)

    def guide(x, offset):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - offset) / 2, 0.7))

    x, offset = torch.randn(30), torch.arange(30.0)
    for data in ((x, offset), {"offset": offset, "x": x}):
        pv.fit(pv.Program(model, guide), data, epochs=1, batch_size=30)
        batch, its_offset = seen["model"]
        order = its_offset.argsort()
        assert torch.equal(batch[order], x)


def test_data_loader_with_test_set():
    x = torch.rand(60, 8, 8).round()
    run = pv.fit(small_vae(), DataLoader(TensorDataset(x), batch_size=25), epochs=3, test=x[:20])
    assert [row["samples"] for row in run.history] == [60, 120, 180]
    assert run.history[-1]["train_bound"] is None
    assert math.isfinite(run.history[-1]["test_bound"])


def test_history_has_the_agreed_keys_and_only_grows():
    run = pv.fit(small_vae(), pv.load_dataset("digits"), num_samples=1200, evaluate_every=500)
    assert [row["samples"] for row in run.history] == [500, 1000, 1200]
    assert {"samples", "seconds", "train_bound", "test_bound", "test_bound_se"} <= run.history[0].keys()
    assert all(a["seconds"] < b["seconds"] for a, b in zip(run.history, run.history[1:], strict=False))


@pytest.mark.parametrize("name", ["Trace_ELBO", "TraceMeanField_ELBO", "TraceGraph_ELBO"])
def test_pyros_own_elbos_train_and_are_per_datum(name):
    elbo = getattr(pyro.infer, name)()
    _, model, x = ppca(100)
    run = pv.fit(model, x, objective=elbo, optimizer="sgd", learning_rate=1e-6, epochs=1, batch_size=50)
    ours = pv.fit(ppca(100)[1], x, optimizer="sgd", learning_rate=1e-6, epochs=1, batch_size=50)
    assert run.history[-1]["train_bound"] == pytest.approx(ours.history[-1]["train_bound"], abs=0.2)


@pytest.mark.filterwarnings("ignore:training goes on eagerly")  # the ELBO decides by values
def test_enumerated_sites_are_summed_out_by_pyros_elbo():
    """A mixture whose labels no guide draws: TraceEnum_ELBO recovers its two means."""
    x = torch.randn(400) * 0.3 + torch.where(torch.rand(400) < 0.5, -2.0, 1.0)

    def model(x):
        means = pyro.param("means", torch.tensor([-0.5, 0.5]))
        with pyro.plate("data", len(x)):
            label = pyro.sample("label", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(means[label], 0.3), obs=x)

    def guide(x):
        pass

    program = pv.Program(model, guide)
    elbo = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)
    run = pv.fit(program, x, objective=elbo, optimizer="adam", learning_rate=0.05, epochs=60, test=x)
    means = program.named_parameters()["means"].detach()
    torch.testing.assert_close(means, torch.tensor([-2.0, 1.0]), atol=0.1, rtol=0)
    exact = torch.logsumexp(dist.Normal(means, 0.3).log_prob(x[:, None]), 1).mean() - math.log(2)
    assert run.history[-1]["test_bound"] == pytest.approx(exact.item(), abs=1e-6)


def test_pyros_elbo_has_the_gradient_of_ours():
    _, _, x = ppca(100)
    steps = []
    for objective in (pv.SGVB(), pyro.infer.Trace_ELBO(), pyro.infer.TraceGraph_ELBO()):
        model = ppca(100)[1]
        pv.fit(model, x, objective=objective, optimizer="sgd", learning_rate=0.01, num_samples=100)
        steps.append(parameters(model))
    assert_same(steps[0], steps[1])
    for name in steps[0]:
        torch.testing.assert_close(steps[0][name], steps[2][name])


def test_loss_is_divided_by_the_number_of_data_whatever_the_plate_says():
    """A plate that scales to N gives the same mean gradient as one that does not."""

    def program(scaled):
        def model(x):
            size = {"size": 40, "subsample_size": len(x)} if scaled else {"size": len(x)}
            with pyro.plate("data", **size):
                z = pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(())), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):
            size = {"size": 40, "subsample_size": len(x)} if scaled else {"size": len(x)}
            with pyro.plate("data", **size):
                pyro.sample("z", dist.Normal(x / 2 + pyro.param("b", torch.zeros(())), 0.7))

        return pv.Program(model, guide)

    x = torch.randn(40)
    results = []
    for scaled in (False, True):
        p = program(scaled)
        pv.fit(p, x, optimizer="sgd", learning_rate=0.1, batch_size=10, num_samples=10)
        results.append({name: t.detach().clone() for name, t in p.named_parameters().items()})
    for name in results[0]:
        # the permutation of rows that pyro draws for the scaled plate takes random numbers, so compare coarsely
        assert results[0][name].abs() < 0.5
        assert (results[0][name] - results[1][name]).abs() < 0.1


def step_once(prior_precision=0.0, max_grad_norm=None, seed=0):
    _, model, x = ppca(20)
    program = pv.programs.as_program(model)
    named = program.named_parameters()
    optimizer = torch.optim.SGD(list(named.values()), lr=1.0)
    step = EagerStep(program, pv.SGVB(), optimizer, named, prior_precision=prior_precision, max_grad_norm=max_grad_norm)
    before = {name: t.detach().clone() for name, t in named.items()}
    torch.manual_seed(seed)
    step(Batch((x[:20],), {}, 20))
    return before, {name: before[name] - t.detach() for name, t in named.items()}


def test_parameter_prior_adds_the_gradient_of_its_log_density():
    torch.manual_seed(1)
    before, plain = step_once()
    torch.manual_seed(1)
    _, with_prior = step_once(prior_precision=0.25)
    for name in before:  # d/dt of t^2 / 2 * precision
        torch.testing.assert_close(with_prior[name] - plain[name], 0.25 * before[name])


def test_gradient_clipping():
    torch.manual_seed(1)
    _, plain = step_once()
    norm = torch.stack([g.norm() for g in plain.values()]).norm()
    torch.manual_seed(1)
    _, clipped = step_once(max_grad_norm=norm.item() / 2)
    for name in plain:
        torch.testing.assert_close(clipped[name], plain[name] / 2, rtol=1e-4, atol=1e-8)


def test_prior_scale_is_shared_out_over_the_data():
    """With no data to speak of, the prior pulls by t / (N s^2) a step."""
    x = torch.zeros(10)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + 0 * pyro.param("t", torch.tensor(3.0)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    program = pv.Program(model, guide)
    pv.fit(program, x, optimizer="sgd", learning_rate=1.0, prior_scale=0.5, num_samples=10, batch_size=10)
    assert program.named_parameters()["t"].item() == pytest.approx(3.0 - 3.0 / (10 * 0.25))


class Noted(torch.optim.SGD):
    """Gradient steps, whose rates are written down, and the parameters after each of them."""

    rates: ClassVar[list] = []
    path: ClassVar[list] = []

    def step(self, closure=None):
        (group,) = self.param_groups
        self.rates.append(group["lr"])
        super().step(closure)
        self.path.append([tensor.detach().clone() for tensor in group["params"]])


def noted(**settings):
    """A VAE after four epochs of three steps at a rate of 0.01, the rates, and the parameters after each step."""
    Noted.rates, Noted.path, vae = [], [], small_vae()
    run = pv.fit(
        vae, torch.ones(6, 8, 8), batch_size=2, optimizer=Noted, learning_rate=0.01, **({"epochs": 4} | settings)
    )
    return run, Noted.rates, Noted.path


@pytest.mark.parametrize(
    ("schedule", "every", "expected"),
    [
        (0.1, "epoch", [1] * 3 + [0.1] * 3 + [0.01] * 3 + [0.001] * 3),
        (0.5, "step", [0.5**n for n in range(12)]),
        (functools.partial(StepLR, step_size=2, gamma=0.1), "epoch", [1] * 6 + [0.1] * 6),
        (functools.partial(LinearLR, start_factor=0.5, total_iters=2), "step", [0.5, 0.75] + [1] * 10),
        (functools.partial(LambdaLR, lr_lambda=lambda epoch: epoch), "epoch", [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3),
    ],
)
def test_the_rate_follows_its_schedule(schedule, every, expected):
    _, rates, _ = noted(learning_rate_schedule=schedule, schedule_every=every)
    assert rates == pytest.approx([0.01 * factor for factor in expected])


def test_a_plateau_of_the_validation_bound_lowers_the_rate():
    schedule = functools.partial(UNTIL_FLAT, factor=0.1, patience=1, threshold=1e9)
    _, rates, _ = noted(learning_rate_schedule=schedule, epochs=6, valid=torch.ones(2, 8, 8))
    assert rates == pytest.approx([0.01] * 9 + [0.001] * 6 + [0.0001] * 3)  # the first is the best; then two are not
    seen, see = [], Schedule.see
    with mock.patch.object(Schedule, "see", lambda self, bound: seen.append(bound) or see(self, bound)):
        run, _, _ = noted(learning_rate_schedule=schedule, valid=torch.zeros(2, 8, 8))
    assert seen == [row["valid_bound"] for row in run.history]
    assert seen != [row["train_bound"] for row in run.history]


def test_averaged_weights_are_evaluated_and_kept():
    """By hand: the mean of the steps' parameters until there are ten, then d a + (1 - d) w."""
    plain, _, path = noted()
    averages, found = path[0], []
    for n, weights in enumerate(path, 1):
        d = min(0.9, (n - 1) / n)
        averages = [d * a + (1 - d) * w for a, w in zip(averages, weights, strict=True)]
        found.append(averages)
    run, _, averaged_path = noted(ema_decay=0.9)
    for a, b in zip(path[-1], averaged_path[-1], strict=True):
        assert torch.equal(a, b)  # the average takes no part in training
    for ours, expected in zip(run.program.parameters(), found[-1], strict=True):
        torch.testing.assert_close(ours, expected)
    assert [row["train_bound"] for row in run.history] != [row["train_bound"] for row in plain.history]
    for row, weights in zip(run.history, found[2::3], strict=True):
        vae = small_vae()
        for tensor, value in zip(vae.parameters(), weights, strict=True):
            tensor.data.copy_(value)
        assert row["train_bound"] == pytest.approx(pv.evaluate_bound(vae, torch.ones(6, 8, 8), seed=0).mean, rel=1e-5)


def test_the_best_weights_are_averages_too(tmp_path):
    run, _, _ = noted(ema_decay=0.9, valid=torch.zeros(2, 8, 8), patience=100, run_dir=tmp_path / "r")
    assert run.best_bound == max(row["valid_bound"] for row in run.history)
    bound = pv.evaluate_bound(run.program, torch.zeros(2, 8, 8), seed=0)
    assert bound.mean == pytest.approx(run.best_bound, rel=1e-5)
    assert_same(parameters(pv.load_run(tmp_path / "r").program), parameters(run.program))


def test_a_stored_run_gives_the_averages(tmp_path):
    run, _, path = noted(ema_decay=0.9, run_dir=tmp_path / "r")
    stored = pv.load_run(tmp_path / "r").program
    assert_same(parameters(stored), parameters(run.program))
    assert not torch.equal(next(stored.parameters()), path[-1][0])


def test_constants_of_a_module_are_no_part_of_a_checkpoint(tmp_path):
    pv.fit(small_vae(), torch.ones(6, 8, 8), epochs=1, run_dir=tmp_path / "r")
    stored = RunDirectory(tmp_path / "r").load().part("model")
    assert {name.split("/")[0] for name in stored} == {"parameters"}  # and none of what is registered but not kept


def test_kl_warmup_changes_training_but_never_what_is_logged(monkeypatch):
    weights = []
    real = pv.SGVB.differentiable_loss

    def spy(self, *args, **kwargs):
        weights.append(self.kl_weight.item())
        return real(self, *args, **kwargs)

    monkeypatch.setattr(pv.SGVB, "differentiable_loss", spy)
    _, model, x = ppca(100)
    objective = pv.SGVB()
    still = {"optimizer": "sgd", "learning_rate": 1e-9}
    run = pv.fit(model, x, objective=objective, kl_warmup=200, num_samples=300, batch_size=50, **still)
    assert weights == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert run.history[0]["train_bound"] == pytest.approx(model.log_marginal(x).mean().item(), abs=1e-6)


def test_free_bits_are_of_the_run_and_never_of_what_is_logged():
    _, model, x = ppca(100)
    objective, seen = pv.SGVB(), []
    real = pv.SGVB.differentiable_loss

    def spy(self, *args, **kwargs):
        seen.append(self.free_bits.item())
        return real(self, *args, **kwargs)

    still = {"optimizer": "sgd", "learning_rate": 1e-9, "num_samples": 300, "batch_size": 50}
    with mock.patch.object(pv.SGVB, "differentiable_loss", spy):
        run = pv.fit(model, x, objective=objective, free_bits=2.5, **still)
    assert seen == [2.5] * 6
    assert objective.free_bits.item() == 0.0
    assert run.history[0]["train_bound"] == pytest.approx(model.log_marginal(x).mean().item(), abs=1e-6)


def test_free_bits_keep_latents_in_use():
    """A decoder that begins without them gets none by itself; with free bits its latents cost at least these."""
    x = (torch.rand(200, 8, 8) < 0.5).double()  # nothing to be known
    costs = []
    for free in (None, 3.0):
        vae = small_vae()
        run = pv.fit(vae, x, free_bits=free, kl_by_site=True, optimizer="adam", learning_rate=0.01, epochs=40)
        costs.append(run.history[-1]["train_kl_z"])
    assert costs[0] < 0.5
    assert costs[1] > 2.0


def test_costs_by_site_are_in_the_history():
    vae, x = small_vae(), torch.ones(60, 8, 8)
    run = pv.fit(vae, x, test=x[:10], kl_by_site=True, epochs=2, optimizer="adam")
    for row in run.history:
        assert {name for name in row if "_kl_" in name} == {"train_kl_z", "test_kl_z"}
    q = vae.encode(x)
    expected = torch.distributions.kl_divergence(q.base_dist, torch.distributions.Normal(0.0, 1.0)).sum(-1).mean()
    found = [pv.evaluation.evaluate_kl(vae, x, seed=seed)["z"] for seed in range(50)]
    assert_mean_close(torch.tensor(found), expected.detach(), min_effect=0.2)
    with pytest.raises(ValueError, match="kl_by_site: expected a program with a guide"):
        pv.fit(pv.Program(vae.model, None), x, objective=pv.MCEM(), epochs=1, kl_by_site=True)


def test_evaluation_uses_the_whole_bound_while_annealing():
    _, model, x = ppca(100)
    run = pv.fit(model, x, kl_warmup=10_000, num_samples=100, optimizer="sgd", learning_rate=1e-9)
    assert run.history[0]["train_bound"] == pytest.approx(model.log_marginal(x).mean().item(), abs=1e-6)


def test_buffers_and_training_mode(tmp_path):
    """Batch norm: statistics move in training, not in evaluation, and come back on resuming."""

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)

    def make():
        torch.manual_seed(0)
        encoder = Encoder()

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 3), 1.0).to_event(1), obs=x)

        def guide(x):
            pyro.module("encoder", encoder)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(encoder.linear(encoder.norm(x))[:, 0], 0.7))

        return encoder, pv.Program(model, guide)

    x = torch.randn(64, 3) + 5
    encoder, program = make()
    pv.fit(program, x, epochs=4, batch_size=16, optimizer="adam", test=x)
    assert encoder.norm.num_batches_tracked > 16 - 1
    assert encoder.norm.training
    _, first = make()
    pv.fit(first, x, epochs=2, batch_size=16, optimizer="adam", test=x, run_dir=tmp_path / "r")
    resumed_encoder, resumed = make()
    pv.fit(resumed, x, epochs=4, batch_size=16, optimizer="adam", test=x, run_dir=tmp_path / "r", resume=True)
    assert_same(dict(encoder.state_dict()), dict(resumed_encoder.state_dict()))


def test_non_finite_loss_stops_before_the_update_and_names_the_site(tmp_path):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("ink", dist.Normal(z, pyro.param("s", torch.tensor(1.0))), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    program = pv.Program(model, guide)
    with pytest.raises(NonFiniteLossError, match=r"after [\d,]+ samples: the loss became nan.*site 'ink'.*kept in"):
        pv.fit(program, torch.randn(50), optimizer="sgd", learning_rate=5.0, epochs=200, run_dir=tmp_path / "r")
    assert program.named_parameters()["s"].isfinite()
    assert (tmp_path / "r" / "state.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "num_samples or epochs"),
        ({"epochs": 1, "num_samples": 5}, "num_samples or epochs"),
        ({"epochs": 0}, "epochs: expected a whole number of at least 1, got 0"),
        ({"epochs": 1, "batch_size": 0}, "batch_size: expected"),
        ({"epochs": 1, "learning_rate": -1.0}, "learning_rate: expected a positive number, got -1.0"),
        ({"epochs": 1, "optimizer": "adagard"}, "did you mean 'adagrad'"),
        ({"epochs": 1, "optimizer": None}, "optimizer: expected a name or class"),
        ({"epochs": 1, "optimizer": dict}, "optimizer: expected a name or class"),
        ({"epochs": 1, "optimizer": torch.optim.SGD([torch.zeros(1)])}, "optimizer: expected a name or class"),
        ({"epochs": 1, "optimizer": pyro.optim.Adam({})}, "optimizer: expected a name or class"),
        ({"epochs": 1, "optimizer": functools.partial(torch.optim.LBFGS)}, "cannot train by stochastic gradients"),
        ({"epochs": 1, "objective": "sgvb"}, "objective: expected one such as"),
        ({"epochs": 1, "objective": pv.SGVB}, "objective: expected one such as"),
        ({"epochs": 1, "optimizer": "lbfgs"}, "cannot train by stochastic gradients"),
        ({"epochs": 1, "device": "cuda:99"}, "device: expected one that this machine has, got 'cuda:99'"),
        ({"epochs": 1, "device": "toaster"}, "device: expected one that this machine has, got 'toaster'"),
        ({"epochs": 1, "patience": 2}, "validation data"),
        ({"epochs": 1, "resume": True}, "need a run_dir"),
        ({"epochs": 1, "seed": -1}, "seed: expected"),
        ({"epochs": 1, "kl_warmup": 5, "objective": pyro.infer.Trace_ELBO()}, "kl_weight"),
        ({"epochs": 1, "binarize": "yes"}, "binarize: expected"),
        ({"epochs": 1, "prior_scale": 0.0}, "prior_scale: expected"),
        ({"epochs": 1, "free_bits": 1.0, "objective": pv.IWAE()}, "free_bits: expected an objective with a free_bits"),
        ({"epochs": 1, "free_bits": -1.0}, "free_bits: expected"),
        ({"epochs": 1, "ema_decay": 1.0}, "ema_decay: expected a number above 0 and below 1, got 1.0"),
        ({"epochs": 1, "ema_decay": "much"}, "ema_decay: expected"),
        ({"epochs": 1, "schedule_every": "week"}, "schedule_every: expected"),
        ({"epochs": 1, "learning_rate_schedule": -1.0}, "learning_rate_schedule: expected a factor above 0, or"),
        ({"epochs": 1, "learning_rate_schedule": "cosine"}, "scheduler, got 'cosine'"),
        ({"epochs": 1, "learning_rate_schedule": lambda optimizer: 0.1}, "which returned 0.1"),
        ({"epochs": 1, "learning_rate_schedule": ReduceLROnPlateau}, "with mode='max' and threshold_mode='abs'"),
        (
            {"epochs": 1, "objective": pv.MCEM(), "learning_rate_schedule": UNTIL_FLAT},
            "expected a bound for ReduceLROnPlateau to wait for, got MCEM",
        ),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        pv.fit(small_vae(), torch.ones(5, 8, 8), **arguments)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.full((5, 8, 8), math.nan), "NaN or infinity in 5 of 5 rows, the first at row 0"),
        (torch.full((5, 8, 8), 2.0), r"\[0, 1\], got values from 2 to 2|from 2 to 2"),
        (torch.zeros(0, 8, 8), "N > 0"),
        (torch.ones(5, 9, 8), "64; got .* 72 elements per datum"),
        (torch.ones(5, 8, 8, dtype=torch.complex64), "complex64"),
        (np.array([["a"]]), "expected numbers"),
        ((torch.ones(5, 8, 8), torch.ones(5)), "expected at most 1 tensors"),
        ("digits", "got str"),
        ([], "empty iterable"),
    ],
)
def test_bad_data_writes_nothing(data, message, tmp_path):
    vae = small_vae()
    before = parameters(vae)
    with pytest.raises(ValueError, match=message):
        pv.fit(vae, data, epochs=1, run_dir=tmp_path / "r")
    assert not (tmp_path / "r").exists()
    assert_same(before, parameters(vae))


def test_whole_numbers_of_numpy_are_taken_and_booleans_are_not():
    run = pv.fit(small_vae(), torch.ones(30, 8, 8), batch_size=np.int64(10), num_samples=np.int32(20), seed=np.uint8(3))
    assert run.samples == 20
    for name in ("batch_size", "num_samples", "seed"):
        with pytest.raises(ValueError, match=f"{name}: expected a whole number"):
            pv.fit(small_vae(), torch.ones(30, 8, 8), **{"num_samples": 10} | {name: True})


@pytest.mark.parametrize("objective", [pyro.infer.ReweightedWakeSleep(), pyro.infer.JitTrace_ELBO()])
def test_objectives_of_another_protocol_are_refused_by_name(objective):
    with pytest.raises(ValueError, match=f"Pyro's {type(objective).__name__} has a protocol of its own"):
        pv.fit(small_vae(), torch.ones(5, 8, 8), objective=objective, epochs=1)


def test_images_of_the_wrong_shape_are_reported_in_the_users_terms():
    encoder = torch.nn.Linear(64, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None, None], 1.0).expand([*z.shape, 8, 8]).to_event(2), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x)[..., 0], 1.0))

    with pytest.raises(ValueError, match=r"fails on a batch \{'x': \(\(5, 8, 8\).*mat1 and mat2.*data_shape"):
        pv.fit(pv.Program(model, guide), torch.ones(5, 8, 8), epochs=1)


def test_modules_behind_helper_functions_are_found():
    """A guide that calls a function that uses the module: evaluation mode, buffers and devices must reach it."""
    norm = torch.nn.BatchNorm1d(3)

    def encoded(x):
        return norm(x).sum(-1)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(())), 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).expand([*z.shape, 3]).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoded(x), 1.0))

    program = pv.Program(model, guide)
    assert [m for m in program.modules().values() if m is norm]
    assert any(name.endswith("running_mean") for name in program.named_buffers())


def test_gaussian_data_outside_of_the_means_range_are_refused():
    vae = pv.VAE((3,), 1, (4,), likelihood="gaussian")
    with pytest.raises(ValueError, match=r"expected values in \[0, 1\], got values from -"):
        pv.fit(vae, torch.randn(50, 3), epochs=1)


def test_gaussian_pixels_that_never_change_do_not_explode():
    x = torch.cat([torch.zeros(200, 4), torch.rand(200, 2)], 1)
    test = x.clone()
    test[:, 0] = 1.0  # never seen lit
    vae = pv.VAE((6,), 2, (16,), likelihood="gaussian")
    run = pv.fit(vae, x, test=test, optimizer="adam", learning_rate=0.01, epochs=100)
    scale = vae.decode(torch.randn(100, 2) * 3).base_dist.scale
    assert 1 / 255 - 1e-9 <= scale.min() <= scale.max() <= 1.0
    assert run.history[-1]["train_bound"] < 6 * math.log(255)  # the density at the floor
    assert run.history[-1]["test_bound"] > -0.5 * 255**2 - 100


def test_no_parameters_is_an_error():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    with pytest.raises(ValueError, match="nothing to train"):
        pv.fit(pv.Program(model, guide), torch.ones(4), epochs=1)


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboard")
    pv.fit(small_vae(), pv.load_dataset("digits"), epochs=1, run_dir=tmp_path / "r", tensorboard=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "r")).Reload()
    assert {"train_bound", "test_bound"} <= set(events.Tags()["scalars"])


def test_gradient_that_is_not_finite_spoils_no_checkpoint(tmp_path):
    """The loss is finite, the gradient of sqrt at 0 is not: the checkpoint before it is kept."""

    def model(x):
        b = pyro.param("b", torch.ones(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + ((b - 1) ** 2).sqrt(), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    settings = {"batch_size": 10, "epochs": 3, "checkpoint_every": 10, "run_dir": tmp_path / "r"}
    with pytest.raises(NonFiniteLossError, match=r"parameter 'b' became NaN.*after 10 samples.*checkpoint is kept"):
        pv.fit(pv.Program(model, guide), torch.randn(50), optimizer="sgd", **settings)
    assert RunDirectory(tmp_path / "r").load().tensors["model/parameters/b"] == 1


def test_kl_weight_is_put_back_after_warmup():
    objective = pv.SGVB()
    pv.fit(small_vae(), torch.ones(50, 8, 8), objective=objective, kl_warmup=10_000, epochs=1)
    assert objective.kl_weight == 1


def test_validation_bound_that_is_not_a_number_is_no_best():
    class FirstIsNaN(pv.SGVB):
        calls = 0

        def bound(self, *args, **kwargs):
            self.calls += 1
            return super().bound(*args, **kwargs) * (math.nan if self.calls <= 2 else 1.0)

    x = torch.ones(90, 8, 8)
    run = pv.fit(small_vae(), x, valid=x, patience=2, epochs=6, objective=FirstIsNaN())
    assert not run.stopped_early  # the bound of these data rises at each evaluation


def test_iterable_that_runs_dry_is_an_error():
    class Once:
        batches = iter([torch.ones(4, 8, 8)] * 3)

        def __iter__(self):
            return self.batches

    with pytest.raises(ValueError, match="gave no batch in epoch 1"):
        pv.fit(small_vae(), Once(), num_samples=100)


# What is trained, and what is reported --------------------------------------------------------------------------------


def binary(num_data=60):
    return torch.bernoulli(torch.full((num_data, 8, 8), 0.4))


GUIDE_ONLY = {"trained": "guide", "batch_size": 20, "progress": False}


@pytest.mark.parametrize("objective", [pv.SGVB(), pv.ReweightedWakeSleep(3, 0.5), pv.WakeSleep(), pyro.infer.Trace_ELBO()])  # fmt: skip # noqa: E501
def test_only_the_guide_is_trained(objective):
    vae = small_vae()
    before = parameters(vae)
    pv.fit(vae, binary(), objective=objective, epochs=2, prior_scale=1.0, max_grad_norm=10.0, **GUIDE_ONLY)
    for name, tensor in vae.named_parameters():
        assert torch.equal(tensor, before[name]) == name.startswith("decoder"), name
        assert tensor.requires_grad
        if name.startswith("decoder"):
            assert tensor.grad is None


def test_weight_decay_does_not_reach_the_model():
    vae = small_vae()
    before = parameters(vae)
    decaying = functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5)
    pv.fit(vae, binary(), optimizer=decaying, epochs=1, **GUIDE_ONLY)
    assert all(torch.equal(t, before[n]) for n, t in vae.named_parameters() if n.startswith("decoder"))


def test_after_monte_carlo_em_a_guide_is_fitted_to_the_model_as_it_is():
    """The bound then comes to the evidence: here the guide can be the posterior."""
    weight = torch.tensor([[2.0, 1.0], [-1.0, 2.0], [0.0, 5.0**0.5]])
    inner, encoder = pv.LinearGaussian(weight), torch.nn.Linear(3, 4)

    def guide(x):
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    program, x = pv.Program(inner.model, guide), torch.randn(100, 3)
    pv.fit(program, x, objective=pv.MCEM(3), epochs=1, progress=False)
    theta = parameters(inner)
    pv.fit(program, x, optimizer="adam", learning_rate=0.03, epochs=150, **GUIDE_ONLY | {"batch_size": 100})
    assert_same(theta, parameters(inner))
    gap = inner.log_marginal(x).mean() - pv.evaluate_bound(program, x, pv.SGVB(50)).mean
    assert 0 < gap + 0.02 < 0.1


def test_the_models_parameters_train_again_after_a_failure():
    vae = small_vae()

    class Failing(torch.optim.SGD):
        def step(self):
            assert not any(t.requires_grad for n, t in vae.named_parameters() if n.startswith("decoder"))
            raise RuntimeError("no step")

    with pytest.raises(RuntimeError, match="no step"):
        pv.fit(vae, binary(), optimizer=Failing, learning_rate=0.1, epochs=1, **GUIDE_ONLY)
    assert all(tensor.requires_grad for tensor in vae.parameters())
    before = parameters(vae)
    pv.fit(vae, binary(), epochs=1)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in vae.named_parameters())


def test_what_model_and_guide_share_is_the_models():
    both = torch.nn.Linear(1, 1)

    def model(x):
        pyro.module("both", both)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(())), 1.0))
            pyro.sample("x", dist.Normal(both(z[..., None])[..., 0], 1.0), obs=x)

    def guide(x):
        pyro.module("both", both)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(both(x[:, None])[:, 0] + pyro.param("b", torch.zeros(())), 1.0))

    program = pv.Program(model, guide)
    pv.fit(program, torch.randn(50) + 3, epochs=2, **GUIDE_ONLY)
    assert program.param("b") != 0
    assert program.param("m") == 0
    before = parameters(both)
    pv.fit(program, torch.randn(50) + 3, epochs=2, **GUIDE_ONLY)
    assert_same(before, parameters(both))


def test_a_guide_with_nothing_of_its_own_is_refused():
    _, model, x = ppca(20)
    with pytest.raises(ValueError, match='trained="guide": expected parameters that are the guide\'s alone, got none'):
        pv.fit(model, x, epochs=1, trained="guide")
    assert all(tensor.requires_grad for tensor in model.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"trained": "model"}, "trained: expected one of all, guide, got 'model'"),
        ({"trained": "guide", "objective": pv.MCEM()}, 'trained="guide": MCEM trains no guide'),
        ({"evaluate_with": pv.MCEM()}, "evaluate_with: expected an objective with a bound"),
        ({"evaluate_with": pv.SGVB}, "evaluate_with: expected one such as pyro_vae.SGVB"),
        ({"evaluate_with": "sgvb"}, "evaluate_with: expected one such as pyro_vae.SGVB"),
        ({"objective": pv.MCEM(), "patience": 1, "valid": torch.ones(5, 8, 8)}, "patience: MCEM has no bound"),
        ({"objective": pv.MCEM(), "kl_warmup": 10}, "kl_warmup: expected an objective with a kl_weight"),
    ],
)
def test_bad_choices_of_what_is_trained_and_reported(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        pv.fit(small_vae(), torch.ones(5, 8, 8), epochs=1, run_dir=tmp_path / "r", **options)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("options", [{}, {"objective": pv.MCEM(), "evaluate_with": pv.SGVB()}, {"trained": "guide"}])
def test_a_program_without_a_guide_is_refused_where_one_is_needed(options, tmp_path):
    program = pv.Program(ppca()[1].model)
    with pytest.raises(ValueError, match=r"expected a program with a guide, .*only MCEM\(\) trains"):
        pv.fit(program, torch.randn(5, 3), epochs=1, run_dir=tmp_path / "r", **options)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("objective", [pv.WakeSleep(), pv.MCEM(3)])
def test_the_bounds_reported_are_those_of_another_objective(objective):
    _, model, x = ppca(60)
    other, still = pv.IWAE(7), {"optimizer": "sgd", "learning_rate": 1e-12, "progress": False}
    wrong = pv.LinearGaussian(model.weight.detach(), guide_shift=0.5)
    run = pv.fit(wrong, x, objective=objective, evaluate_with=other, epochs=1, test=x[:20], **still)
    (row,) = run.history
    for split, data in (("train", x), ("test", x[:20])):
        wanted = pv.evaluate_bound(wrong, data, other)
        assert row[f"{split}_bound"] == pytest.approx(wanted.mean, abs=1e-6)
        assert row[f"{split}_bound_se"] == pytest.approx(wanted.std_error, abs=1e-6)
        assert row[f"{split}_bound"] != pytest.approx(pv.evaluate_bound(wrong, data).mean, abs=1e-2)
    assert ("train_log_joint" in row) == isinstance(objective, pv.MCEM)


def test_the_reported_bound_changes_nothing_in_what_is_trained():
    trained = []
    for other in (None, pv.SGVB(20), pyro.infer.Trace_ELBO()):
        vae = small_vae()
        pv.fit(vae, binary(), evaluate_with=other, epochs=2, batch_size=20)
        trained.append(parameters(vae))
    assert_same(trained[0], trained[1])
    assert_same(trained[0], trained[2])


def test_early_stopping_is_by_the_reported_bound():
    class Falling(pv.SGVB):
        level = 0.0

        def bound(self, *args, **kwargs):
            self.level -= 1.0
            return torch.zeros_like(super().bound(*args, **kwargs)) + self.level

    _, model, x = ppca(40)
    run = pv.fit(model, x, objective=pv.MCEM(2), evaluate_with=Falling(), valid=x, patience=2, epochs=30, batch_size=20)
    assert run.stopped_early
    assert [row["valid_bound"] for row in run.history] == [-2.0, -4.0, -6.0]


def test_running_statistics_of_a_model_that_is_held_fixed_do_not_move():
    torch.manual_seed(0)
    decoder, encoder = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), nn.Linear(3, 2)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            mean = decoder(z.reshape(-1, 1)).reshape(*z.shape[:-1], 3)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    program, x = pv.Program(model, guide), torch.randn(40, 3)
    pv.fit(program, x, epochs=1, batch_size=20)
    buffers = {name: buffer.clone() for name, buffer in program.named_buffers().items()}
    pv.fit(program, x, epochs=1, batch_size=20, trained="guide")
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in program.named_buffers().items())
    assert decoder.training
    pv.fit(program, x, epochs=1, batch_size=20)  # and do where it is not
    assert any(not torch.equal(buffer, buffers[name]) for name, buffer in program.named_buffers().items())


def test_the_kept_row_is_of_the_parameters_that_were_kept():
    """The last row of a budget that ends off the rhythm never competes, however good it is."""
    x = torch.randn(50, 3)
    model = pv.LinearGaussian(torch.ones(3, 1))
    run = pv.fit(model, x, valid=x, test=x, patience=9, batch_size=10, num_samples=130, evaluate_every=50)
    assert [row["samples"] for row in run.history] == [50, 100, 130]
    assert run.kept["samples"] in (50, 100)
    assert pv.evaluate_bound(model, x).mean == pytest.approx(run.kept["test_bound"], abs=1e-9)


# Padding --------------------------------------------------------------------------------------------------------------


def chains(num_data=24, steps=20):
    """Sequences of a linear-Gaussian state space, a few of them long."""
    torch.manual_seed(0)
    lengths = torch.where(torch.arange(num_data) % 8 == 0, steps, torch.randint(1, 6, (num_data,)))
    return torch.randn(num_data, steps, 2), lengths


def exact_chain():
    """Its guide is its posterior: the bound is the evidence, and estimator A's gradient has no noise."""
    return pv.LinearGaussianSSM(0.5 * torch.eye(2), torch.tensor([[1.0, 0.3], [-0.2, 0.8]]))


@pytest.mark.parametrize("missing", [False, True])
def test_padding_that_is_left_out_changes_no_number(missing):
    x, lengths = chains()
    data = {"x": x, "lengths": lengths}
    if missing:
        data["mask"] = torch.rand(24, 20) < 0.7
    settings = {"batch_size": 4, "epochs": 4, "optimizer": "sgd", "learning_rate": 0.01, "progress": False}
    runs = [(exact_chain().double(), trim) for trim in (False, True)]
    histories = [
        pv.fit(made, data, objective=pv.SGVB(estimator="A"), test=data, trim_padding=trim, **settings).history
        for made, trim in runs
    ]
    names = ("train_bound", "test_bound", "train_bound_per_step")
    for plain, trimmed in zip(*histories, strict=True):
        assert [plain[name] for name in names] == pytest.approx([trimmed[name] for name in names], abs=1e-9)
    ours, theirs = (parameters(made) for made, _ in runs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["importance", "smc"])
def test_scores_without_the_padding_are_the_scores(method):
    made, data = exact_chain().double(), chains()
    steps = []

    def noting(x, lengths):
        steps.append(x.shape[1])
        made.model(x, lengths)

    program = pv.Program(noting, made.guide)
    options = {"threshold": 0.0} if method == "smc" else {}
    settings = {"method": method, "num_particles": 3, "batch_size": 4, "compile": False, "trim_padding": True}
    score = pv.log_marginal(program, data, **settings, **options)
    truth = made.log_marginal(*data)
    torch.testing.assert_close(score.values, truth, rtol=0, atol=1e-9)
    assert {*steps} >= {5, 20}
    bound = pv.evaluate_bound(program, data, pv.SGVB(estimator="A"), batch_size=4, trim_padding=True)
    assert bound.mean == pytest.approx(truth.mean().item(), abs=1e-9)


def test_large_data_are_evaluated_in_small_batches(monkeypatch):
    monkeypatch.setattr("pyro_vae.evaluation.bounds._MAX_NUMBERS", 500)
    made, (x, lengths) = exact_chain().double(), chains()
    rows = []

    def noting(x, lengths):
        rows.append(len(x))
        made.model(x, lengths)

    bound = pv.evaluate_bound(pv.Program(noting, made.guide), (x, lengths), pv.SGVB(num_particles=2, estimator="A"))
    assert max(rows[-4:]) == 500 // (40 * 2)
    assert bound.mean == pytest.approx(made.log_marginal(x, lengths).mean().item(), abs=1e-9)


def test_batches_of_trimmed_sequences_are_as_long_as_they_must_be():
    steps, made = [], exact_chain()
    model = made.model

    def noting(x, lengths):
        steps.append((x.shape[1], int(lengths.max())))
        model(x, lengths)

    program = pv.Program(noting, made.guide)
    pv.fit(program, chains(), batch_size=4, epochs=2, trim_padding=True, compile=False, progress=False)
    assert {kept for kept, _ in steps} >= {20, 5}
    assert all(longest <= kept <= math.ceil(longest * math.sqrt(2)) for kept, longest in steps[-12:])


def test_what_is_data_beyond_the_lengths_is_never_cut():
    (x, lengths), seen = chains(), set()

    def model(x, y, u, labels, lengths):
        seen.add((x.shape[1], y.shape[1], u.shape[1], labels.shape[1]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            steps = torch.arange(x.shape[1]) < lengths[:, None]
            law = dist.Normal(z[..., None, :], 1.0).mask(steps[..., None]).expand(z.shape[:-1] + x.shape[1:])
            pyro.sample("x", law.to_event(2), obs=x)

    def guide(x, y, u, labels, lengths):
        scale = pyro.param("scale", torch.ones(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(u.mean(1, keepdim=True), scale.abs()).to_event(1))

    within = torch.arange(20) < lengths[:, None]
    data = {"x": x, "y": torch.randn(24, 20, 2), "u": torch.randn(24, 20), "labels": within.long(), "lengths": lengths}
    program = pv.Program(model, guide)
    whole, cut = (pv.evaluate_bound(program, data, batch_size=3, trim_padding=trim) for trim in (False, True))
    assert cut.mean == pytest.approx(whole.mean, abs=1e-9)
    assert {shape[0] for shape in seen} >= {20, 5}
    assert {shape[1:3] for shape in seen} == {(20, 20)}
    assert all(kept == labels for kept, _, _, labels in seen)


class FixedSteps(nn.Module):
    """Its guide reads exactly 20 steps."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(40, 2)

    def model(self, x, lengths):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., None, :], torch.ones(x.shape[1:])).to_event(2), obs=x)

    def guide(self, x, lengths):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x.flatten(1)), 1.0).to_event(1))


@pytest.mark.parametrize(
    ("make", "data", "objective", "said"),
    [
        (exact_chain, chains()[0], None, r"trim_padding: expected padded sequences and their lengths, got \['x'\]"),
        (FixedSteps, chains(), None, "trim_padding: expected a program that takes any number of steps: the program"),
        (exact_chain, chains(), pv.MCEM(), "trim_padding: MCEM keeps chains of the longest sequence's steps"),
    ],
)
def test_what_cannot_be_trimmed_is_refused(make, data, objective, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        pv.fit(make(), data, objective=objective, epochs=1, trim_padding=True, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
