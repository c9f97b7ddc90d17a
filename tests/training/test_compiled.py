"""A recorded step is the program's own step: the same numbers from the same noise, or Python with a word of why.

What is compared is always two runs: one that records (and, where it is said, compiles) after a few steps, and one that
never does. Where Inductor is not involved they must agree bit for bit.
"""

import copy
import dataclasses
import logging
import math
import random
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
import pyro_vae.compile
from pyro_vae.inputs import batch_size_of, open_inputs
from pyro_vae.objectives import OBJECTIVES, Objective
from pyro_vae.programs import as_program
from pyro_vae.training import CheckpointError, NonFiniteLossError, compiled
from pyro_vae.training.checkpoint import RunDirectory
from pyro_vae.training.compiled import CompiledStep
from pyro_vae.training.optimizers import _BY_NAME, _REFUSED
from pyro_vae.training.step import Batch, EagerStep
from tests.sequences import LinearStateSpace, example
from tests.training.test_resume import assert_same, without_seconds

NEVER = 10**9
SMALL = {"num_samples": 300, "batch_size": 20, "optimizer": "adam", "learning_rate": 0.01, "progress": False}


@pytest.fixture(scope="module", autouse=True)
def _few_messages():
    """Inductor's debug records are many, and pytest keeps them all."""
    logging.getLogger("torch.__trace").setLevel(logging.WARNING)


@pytest.fixture
def soon(monkeypatch):
    """Recorded after three steps, never compiled."""
    monkeypatch.setattr(compiled, "CAPTURE_AFTER", 3)
    monkeypatch.setattr(compiled, "COMPILE_AFTER", NEVER)


# Programs -------------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Three numbers, one latent; ``seen`` is what the model makes of its data."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 2), nn.Linear(1, 3)

    def seen(self, x):
        return x

    def model(self, x):
        pyro.module("small", self)
        x = self.seen(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("small", self)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class WithBuffersAndDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.encoder = nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.decoder, self.dropout = nn.Linear(1, 4), nn.Dropout(0.3)

    def model(self, x):
        pyro.module("program", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.dropout(self.decoder(z)), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("program", self)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(self.norm(x)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def plain_functions(**options):
    """Nothing of it is a module; a constraint, a plate that scales to N, a mask of the data's own."""

    def model(x):
        loc = pyro.param("loc", torch.zeros(3))
        scale = pyro.param("noise", torch.tensor(0.7), constraint=dist.constraints.positive)
        with pyro.plate("data", 40, subsample_size=len(x)), pyro.poutine.mask(mask=x[:, 0] > -1.0):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(loc + z[..., None], scale).to_event(1), obs=x)

    def guide(x):
        scale = pyro.param("scale", torch.tensor(0.6), constraint=dist.constraints.interval(0.1, 2.0))
        slope = pyro.param("slope", torch.tensor([0.1, -0.2, 0.3]))
        with pyro.plate("data", 40, subsample_size=len(x)), pyro.poutine.mask(mask=x[:, 0] > -1.0):
            pyro.sample("z", dist.Normal(x @ slope, scale))

    return pv.Program(model, guide, **options)


def with_covariate():
    """Regression: a label that is an index, and a covariate that is not observed."""

    def model(x, group, c):
        shift = pyro.param("shift", torch.tensor([0.5, -0.5]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(c, 1.0))
            pyro.sample("x", dist.Normal(z + shift[group], 0.8), obs=x)

    def guide(x, group, c):
        slope = pyro.param("slope", torch.tensor([0.3, 0.2]))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope[0] * x + slope[1] * c, 0.7))

    return pv.Program(model, guide)


def with_global_latent():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean[..., None] if mean.ndim else mean, 1.0))
            pyro.sample("x", dist.Normal(z, pyro.param("noise", torch.ones(()))), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(pyro.param("m", torch.zeros(())), 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.4)) * x, 0.8))

    return pv.Program(model, guide)


def of_many_kinds():
    """Normal, gamma, categorical and Bernoulli latents, and dropout."""

    def model(x):
        levels = pyro.param("levels", torch.tensor([-1.0, 0.5, 2.0]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            r = pyro.sample("r", dist.Gamma(2.0, 1.0))
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            b = pyro.sample("b", dist.Bernoulli(0.4))
            kept = nn.functional.dropout(z, 0.5)
            pyro.sample("x", dist.Normal(levels[k] + kept + b, (r + 0.1).sqrt()), obs=x)

    def guide(x):
        w = pyro.param("w", torch.tensor([0.3, 0.1, -0.2, 0.4]))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(w[0] * x, 0.8))
            pyro.sample("r", dist.Gamma((w[1] * x).exp() + 1.0, 1.0))
            pyro.sample("k", dist.Categorical(logits=torch.stack([w[2] * x, 0 * x, w[3] * x], -1)))
            pyro.sample("b", dist.Bernoulli(logits=w[2] * x))

    return pv.Program(model, guide)


def sequences():
    """Of unequal length; whether their particles are resampled depends on their weights."""
    return LinearStateSpace(example(), "amortized")


def binary(*shape):
    return torch.rand(shape).round()


CASES = {
    "vae": (lambda: pv.VAE((6,), 2, (5,)), lambda: binary(8, 6)),
    "vae of real data": (lambda: pv.VAE((6,), 2, (5,), likelihood="gaussian"), lambda: torch.rand(8, 6)),
    "linear": (lambda: pv.LinearGaussian(torch.randn(3, 2), guide_widening=1.5), lambda: torch.randn(8, 3)),
    "binary latents": (lambda: pv.SigmoidBeliefNetwork((6,), (4, 3)), lambda: binary(8, 6)),
    "plain functions": (plain_functions, lambda: torch.randn(8, 3)),
    "particle by particle": (lambda: plain_functions(vectorize=False), lambda: torch.randn(8, 3)),
    "covariates by name": (
        with_covariate,
        lambda: {"c": torch.randn(8), "x": torch.randn(8), "group": torch.arange(8) % 2},
    ),
    "buffers and dropout": (WithBuffersAndDropout, lambda: torch.randn(8, 4)),
    "global latent": (with_global_latent, lambda: torch.randn(8)),
    "sequences": (sequences, lambda: (torch.randn(8, 4, 3), torch.arange(8) % 4 + 1)),
}

LEARNING = {
    "sgvb": lambda: pv.SGVB(2),
    "sgvb B": lambda: pv.SGVB(1, "B"),
    "iwae": lambda: pv.IWAE(3),
    "dreg": lambda: pv.DReG(3),
    "dreg stl": lambda: pv.DReG(3, "stl"),
    "renyi": lambda: pv.Renyi(0.5, 3),
    "renyi max": lambda: pv.Renyi(-math.inf, 3),
    "vimco": lambda: pv.VIMCO(3),
    "fivo": lambda: pv.FIVO(5, threshold=0.8),
    "fivo multinomial": lambda: pv.FIVO(3, threshold=1.0, resampling="multinomial"),
    "wake-sleep": pv.WakeSleep,
    "reweighted-wake-sleep": lambda: pv.ReweightedWakeSleep(3, 0.5),
    "mcem": lambda: pv.MCEM(3, num_updates=2),
    "Trace": Trace_ELBO,
    "TraceMeanField": TraceMeanField_ELBO,
    "TraceGraph": TraceGraph_ELBO,
    "Renyi": lambda: RenyiELBO(alpha=0.5, num_particles=2),
    "Renyi vectorized": lambda: RenyiELBO(alpha=0, num_particles=2, vectorize_particles=True, max_plate_nesting=1),
}

_OF_CONTINUOUS = ("sgvb", "iwae", "dreg", "renyi", "mcem")  # what needs draws with a gradient
_OF_LOCAL = (
    "iwae",
    "dreg",
    "renyi",
    "vimco",
    "reweighted",
    "wake-sleep",
    "mcem",
)  # what needs every latent in the plate

_QUICK = ("vae", "binary latents", "buffers and dropout", "covariates by name", "sequences")


def admitted():
    for case in CASES:
        for name in LEARNING:
            if case == "binary latents" and name.startswith(_OF_CONTINUOUS):
                continue
            if case == "global latent" and (name.startswith(_OF_LOCAL) or "vectorized" in name):
                continue
            if case == "particle by particle" and name == "sgvb B":
                continue
            if (case == "sequences") != name.startswith("fivo") and (case, name) != ("sequences", "iwae"):
                continue
            marks = () if case in _QUICK else pytest.mark.slow
            yield pytest.param(case, name, id=f"{case}, {name}", marks=marks)


def test_every_objective_is_in_the_matrix():
    assert {type(make()) for make in LEARNING.values()} >= set(OBJECTIVES.values())


# Steps by hand --------------------------------------------------------------------------------------------------------


class Watched:
    """Keeps what a step computed."""

    seen: list[list[Tensor | None]]

    def gradients(self, batch):
        loss, gradients = super().gradients(batch)
        self.seen.append([torch.as_tensor(loss).clone(), *(None if g is None else g.clone() for g in gradients)])
        return loss, gradients


class WatchedEager(Watched, EagerStep):
    pass


class WatchedCompiled(Watched, CompiledStep):
    pass


@dataclasses.dataclass
class Trail:
    losses: list[float]
    seen: list[list[Tensor | None]]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    objective: dict[str, Tensor]
    generator: Tensor
    step: EagerStep


def build(make, data):
    torch.manual_seed(3)
    program = as_program(make())
    inputs = open_inputs(program, data)
    return program, inputs


def trail(make, data, objective, kind, num_steps=3, capture_after=1, compile_after=NEVER, **options):
    """Take steps on one batch, from the same parameters and the same seed whatever the kind of step."""
    program, inputs = build(make, data)
    named = program.named_parameters()
    optimizer = torch.optim.SGD(list(named.values()), lr=1e-3)
    shapes = [tensor.shape for tensor in Batch(*inputs.first(), 0).tensors]
    more = {} if kind is WatchedEager else {"shapes": shapes}
    step = kind(program, objective, optimizer, named, **more, **options)
    step.seen, step.capture_after, step.compile_after = [], capture_after, compile_after
    losses = []
    pyro.set_rng_seed(11)
    with pyro.validation_enabled(False):
        for _ in range(num_steps):
            args, kwargs = inputs.first()
            size = batch_size_of(args, kwargs)
            losses.append(step(Batch(args, kwargs, inputs.check.data_of(size), torch.arange(size))))
    state = objective.state_dict() if isinstance(objective, pv.MCEM) else {}
    return Trail(
        losses,
        step.seen,
        {name: tensor.detach().clone() for name, tensor in named.items()},
        {name: tensor.clone() for name, tensor in program.named_buffers().items()},
        {name: tensor.clone() for name, tensor in state.items()},
        torch.get_rng_state(),
        step,
    )


def assert_same_step(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:estimator B. no analytic KL")
@pytest.mark.parametrize(("case", "name"), list(admitted()))
def test_a_recorded_step_gives_the_bits_of_the_program(case, name):
    make, data = CASES[case]
    data = data()
    ours = trail(make, data, LEARNING[name](), WatchedCompiled)
    theirs = trail(make, data, LEARNING[name](), WatchedEager)
    assert ours.step.path == "captured"
    assert ours.losses == theirs.losses
    assert len(set(ours.losses)) == len(ours.losses)  # new noise each time
    for a, b in zip(ours.seen, theirs.seen, strict=True):
        assert_same_step(a, b)
    assert_same(ours.parameters, theirs.parameters)
    assert_same(ours.buffers, theirs.buffers)
    assert_same(ours.objective, theirs.objective)
    assert torch.equal(ours.generator, theirs.generator)


def test_the_steps_that_are_compared_are_not_trivial():
    """Gradients that are not zero, buffers that move, parameters that some objectives leave alone."""
    make, data = CASES["buffers and dropout"]
    data = data()
    few, many = (trail(make, data, pv.SGVB(), WatchedCompiled, num_steps=n) for n in (2, 3))
    assert all(gradient.abs().sum() > 0 for gradient in many.seen[-1][1:])
    assert not torch.equal(
        few.buffers["WithBuffersAndDropout.norm.running_mean"], many.buffers[next(iter(many.buffers))]
    )
    assert many.buffers["WithBuffersAndDropout.norm.num_batches_tracked"] == 3
    without = trail(*_drawn("vae"), pv.MCEM(), WatchedCompiled).seen[-1]
    assert any(gradient is None for gradient in without[1:])


def _drawn(case):
    make, data = CASES[case]
    return make, data()


def beside(step, batch, spoil):
    """Compare with a graph whose results are spoilt; whether that was noticed."""
    original = step._by_graph_of

    def spoilt(graph, batch):
        loss, gradients = original(graph, batch)
        return spoil(loss, list(gradients))

    step._by_graph_of = spoilt
    try:
        step.compare()
    finally:
        step._by_graph_of = original
    return step.refused is not None


@pytest.mark.parametrize("what", ["loss", "gradient", "no gradient", "buffer", "nothing", "rounding"])
@pytest.mark.filterwarnings("ignore:training goes on eagerly")
def test_the_comparison_notices_any_part_of_a_step(what):
    step, batch = step_of(WithBuffersAndDropout, torch.randn(9, 4))
    with pyro.validation_enabled(False):
        for _ in range(3):
            step(batch)
        step.compare()
        assert step.path == "captured"

        def spoil(loss, gradients):
            if what == "loss":
                return loss + 1e-6, gradients
            if what == "gradient":
                gradients[3] = gradients[3] + 1e-5
            if what == "no gradient":
                gradients[3] = None
            if what == "buffer":
                step._buffers()[0].add_(1e-6)
            if what == "rounding":
                gradients = [gradient * (1 + 1e-15) for gradient in gradients]
            return loss, gradients

        assert beside(step, batch, spoil) == (what not in ("nothing", "rounding"))


# Inductor -------------------------------------------------------------------------------------------------------------

COMPILED = {
    "vae": ("vae", lambda: pv.SGVB(2)),
    "binary latents": ("binary latents", lambda: pv.VIMCO(3)),
    "buffers and dropout": ("buffers and dropout", lambda: pv.IWAE(2)),
    "draws of many kinds": (None, lambda: pv.ReweightedWakeSleep(2, 0.5)),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float64) for name in COMPILED), ("vae", torch.float32)])
def test_a_compiled_step_gives_the_numbers_of_the_program(name, dtype):
    torch.set_default_dtype(dtype)
    case, objective = COMPILED[name]
    make, data = (of_many_kinds, torch.randn(8)) if case is None else _drawn(case)
    ours = trail(make, data, objective(), WatchedCompiled, num_steps=4, compile_after=2)
    theirs = trail(make, data, objective(), WatchedEager, num_steps=4)
    assert ours.step.path == "compiled"
    wide = dtype == torch.float32
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5 if wide else 1e-10)
    for a, b in zip(ours.seen, theirs.seen, strict=True):
        assert [t is None for t in a] == [t is None for t in b]
        a, b = (torch.cat([t.flatten() for t in seen[1:] if t is not None]) for seen in (a, b))
        assert (a - b).norm() <= (1e-4 if wide else 1e-10) * b.norm()
    for name, buffer in theirs.buffers.items():
        torch.testing.assert_close(ours.buffers[name], buffer)
    assert torch.equal(ours.generator, theirs.generator)


# Optimisers -----------------------------------------------------------------------------------------------------------


class Quadratic(Objective):
    """A noisy bowl around the data's mean: a step that costs next to nothing, of weights that are a matrix."""

    def bound(self, model, guide, x):
        return -(x**2).sum(-1)

    def differentiable_loss(self, model, guide, x):
        weight = guide.__self__.functions["guide"].__self__.weight
        noise = 0.1 * torch.randn_like(x)
        return ((x + noise) @ weight - x.flip(-1)).square().sum() + (0.1 * weight).abs().sum()


class Bowl(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1.0, 1.0, 9).reshape(3, 3))

    def model(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pass


def trained(make, data, **settings):
    """A run, its parameters and its warnings; of parameters that begin the same way each time."""
    torch.manual_seed(5)
    program = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = pv.fit(program, data, **SMALL | settings)
    named = program.named_parameters()
    named = named if isinstance(named, dict) else dict(named)
    return run, {n: t.detach().clone() for n, t in named.items()}, [str(w.message) for w in caught], program


def both(make, data, **settings):
    """The same run recorded and not."""
    return (trained(make, data, compile=compile, **settings) for compile in (True, False))


def assert_recorded_as_if_not(make, data, path="captured", **settings):
    (run, ours, said, program), (other, theirs, told, _) = both(make, data, **settings)
    assert said == told == []
    assert (run.path, other.path) == (path, "eager")
    assert_same(ours, theirs)
    assert without_seconds(run.history) == without_seconds(other.history)
    return run, program


@pytest.mark.parametrize("name", sorted(set(_BY_NAME) - set(_REFUSED)))
def test_every_optimiser_goes_on_as_if_nothing_were_recorded(soon, name):
    settings = {"optimizer": name, "learning_rate": None, "num_samples": 20 * 200, "evaluate_every": 2000}
    run, _ = assert_recorded_as_if_not(Bowl, torch.randn(40, 3), objective=Quadratic(), **settings)
    assert run.samples == 4000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adagrad", "adam"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
def test_a_thousand_recorded_steps(monkeypatch, name, dtype):
    torch.set_default_dtype(dtype)
    monkeypatch.setattr(compiled, "COMPILE_AFTER", NEVER)
    settings = {"optimizer": name, "learning_rate": None, "num_samples": 20 * 1010, "evaluate_every": 20_000}
    assert_recorded_as_if_not(Bowl, torch.randn(40, 3), objective=Quadratic(), **settings)


@pytest.mark.parametrize("options", [{"momentum": 0.9, "nesterov": True}, {"momentum": 0.5, "weight_decay": 0.1}])
def test_an_optimiser_with_options(soon, options):
    def optimizer(tensors):
        return torch.optim.SGD(tensors, lr=0.01, **options)

    assert_recorded_as_if_not(Small, torch.randn(50, 3), optimizer=optimizer, learning_rate=None)


def falling_rate(made):
    """An optimiser whose rate the data's reader changes."""

    def optimizer(tensors):
        made.append(torch.optim.Adam(tensors, lr=0.05, fused=True))
        return made[-1]

    return optimizer


class Lowering:
    """Batches, between which the newest optimiser's learning rate falls; and rises to what it was in the end."""

    def __init__(self, batches, made):
        self.batches, self.made = batches, made

    def __iter__(self):
        for index, batch in enumerate(self.batches):
            yield batch
            if self.made:
                self.made[-1].param_groups[0]["lr"] = 0.05 if index > 12 else 0.05 / (1 + index // 5)


def test_a_learning_rate_that_changes_is_followed(soon):
    made, x = [], torch.randn(16, 20, 3)
    data = Lowering(list(x), made)
    settings = {"optimizer": falling_rate(made), "learning_rate": None, "num_samples": None, "epochs": 2}
    assert_recorded_as_if_not(Small, data, **settings)
    fixed = trained(Small, list(x), **settings)[1]
    assert any(
        not torch.equal(a, b) for a, b in zip(fixed.values(), trained(Small, data, **settings)[1].values(), strict=True)
    )


def test_a_rate_that_is_a_tensor_is_followed(soon):
    rate = torch.tensor(0.05)

    def optimizer(tensors):
        rate.fill_(0.05)
        return torch.optim.Adam(tensors, lr=rate, capturable=False, foreach=False)

    class Falling:
        def __iter__(self):
            for batch in torch.randn(15, 20, 3, generator=torch.Generator().manual_seed(1)):
                yield batch
                rate.mul_(0.9)

    assert_recorded_as_if_not(Small, Falling(), optimizer=optimizer, learning_rate=None, num_samples=None, epochs=1)


def test_a_scheduler_that_wraps_the_step_is_followed(soon):
    def optimizer(tensors):
        made = torch.optim.Adam(tensors, lr=0.05)
        schedule = torch.optim.lr_scheduler.StepLR(made, 4, 0.5)
        made.register_step_post_hook(lambda *_: schedule.step())
        return made

    assert_recorded_as_if_not(Small, torch.randn(50, 3), optimizer=optimizer, learning_rate=None)


class Clipped(torch.optim.Adam):
    """As pyro.optim.ClippedAdam: its state is a Python number, and the rate falls at each step."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] *= 0.97
            for tensor in group["params"]:
                tensor.grad = tensor.grad.clamp(-0.05, 0.05)
        result = super().step(closure)
        for state in self.state.values():
            state["count"] = state.get("count", 0) + 1
        return result


class Lion(torch.optim.Optimizer):
    def __init__(self, tensors, lr=0.01):
        super().__init__(tensors, {"lr": lr})
        self.taken = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.taken += 1
        for group in self.param_groups:
            for tensor in group["params"]:
                mean = self.state[tensor].setdefault("mean", torch.zeros_like(tensor))
                tensor.add_((0.9 * mean + 0.1 * tensor.grad).sign(), alpha=-group["lr"] / self.taken)
                mean.lerp_(tensor.grad, 0.01)


@pytest.mark.parametrize("cls", [Clipped, Lion])
def test_an_optimiser_of_the_users_own_is_called_as_it_is(soon, cls):
    assert_recorded_as_if_not(
        Small, torch.randn(50, 3), optimizer=lambda tensors: cls(tensors, lr=0.01), learning_rate=None
    )


def test_hooks_of_an_optimiser_are_called_at_every_step(soon):
    counts = []

    def optimizer(tensors):
        made = torch.optim.Adam(tensors, lr=0.01)
        counts.append(0)

        def count(*_):
            counts[-1] += 1

        made.register_step_pre_hook(count)
        return made

    assert_recorded_as_if_not(Small, torch.randn(60, 3), optimizer=optimizer, learning_rate=None)
    assert counts == [15, 15]


# What a graph would freeze --------------------------------------------------------------------------------------------


class Scaled(Small):
    """Its likelihood is weighted by a Python number."""

    def __init__(self):
        super().__init__()
        self.beta = 1.0

    def seen(self, x):
        return self.beta * x


def step_of(make, data, objective=None, capture_after=1, compile_after=NEVER, kind=CompiledStep):
    program, inputs = build(make, data)
    named = program.named_parameters()
    more = {} if kind is EagerStep else {"shapes": [tensor.shape for tensor in Batch(*inputs.first(), 0).tensors]}
    step = kind(program, objective or pv.SGVB(), torch.optim.Adam(list(named.values()), lr=0.01), named, **more)
    step.capture_after, step.compile_after = capture_after, compile_after
    args, kwargs = inputs.first()
    return step, Batch(args, kwargs, batch_size_of(args, kwargs))


def by_both(step, batch, seed=4):
    """Loss and gradients as the step computes them, and as Python does."""
    results = []
    for gradients in (step.gradients, lambda batch: EagerStep.gradients(step, batch)):
        torch.manual_seed(seed)
        loss, found = gradients(batch)
        results.append([loss.clone(), *(g.clone() for g in found)])
    return results


@pytest.fixture
def unvalidated():
    with pyro.validation_enabled(False):
        yield


@pytest.mark.usefixtures("unvalidated")
def test_a_number_that_changes_is_found_at_the_next_comparison_and_followed_from_there():
    module = Scaled()
    step, batch = step_of(lambda: module, torch.randn(9, 3))
    for _ in range(3):
        step(batch)
    step.compare()
    assert step.path == "captured"
    module.beta = 3.0
    ours, theirs = by_both(step, batch)
    assert not torch.equal(ours[0], theirs[0])  # as it must be, until somebody looks
    with pytest.warns(UserWarning, match="^training goes on eagerly: .*a Python number") as caught:
        step.compare()
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert step.path == "eager"
    for beta in (3.0, 0.5):
        module.beta = beta
        assert_same_step(*by_both(step, batch))
        step(batch)
        step.compare()  # says nothing more
    assert step.path == "eager"


def test_a_number_that_the_datas_reader_changes_is_found_at_an_evaluation(soon):
    class Changing:
        def __init__(self, program):
            self.program, self.epoch = program, 0

        def __iter__(self):
            self.epoch += 1
            if self.epoch > 3:
                self.program.beta = 2.0
            yield from torch.randn(5, 20, 3, generator=torch.Generator().manual_seed(1))

    torch.manual_seed(5)
    program = Scaled()
    with pytest.warns(UserWarning, match="^training goes on eagerly") as caught:
        run = pv.fit(program, Changing(program), **SMALL | {"num_samples": None, "epochs": 6})
    assert len(caught) == 1
    assert run.path == "eager"
    assert [row["samples"] for row in run.history] == [100, 200, 300, 400, 500, 600]


def test_an_attribute_that_never_changes_disturbs_nobody(soon):
    assert_recorded_as_if_not(Scaled, torch.randn(60, 3))


class ByNumpy(Small):
    def seen(self, x):
        return x + np.random.normal()  # noqa: NPY002


class ByPython(Small):
    def seen(self, x):
        return x * (1 + random.random())


class ByList(Small):
    """Values of the batch take a way around torch."""

    def seen(self, x):
        return x + torch.tensor(x.mean(0).tolist())


class ByArray(Small):
    def seen(self, x):
        return x + torch.from_numpy(np.median(x.numpy(), 0))


class ByItems(Small):
    """Values of the parameters do."""

    def seen(self, x):
        return x + torch.tensor([value.item() for value in self.decoder.bias.detach()])


@pytest.mark.parametrize("make", [ByList, ByArray, ByItems])
def test_values_that_leave_torch_are_never_those_of_an_earlier_batch(soon, make):
    x = torch.randn(60, 3)
    (run, ours, said, _), (_, theirs, told, _) = both(make, x, evaluate_every=100_000)  # nobody looks on the way
    assert run.path == "eager"
    assert (len(said), told) == (1, [])
    assert_same(ours, theirs)


@pytest.mark.parametrize("make", [ByNumpy, ByPython])
def test_draws_that_are_not_torchs_are_found_at_once_and_nothing_is_lost(soon, make):
    (run, ours, said, _), (_, theirs, told, _) = both(make, torch.randn(60, 3))
    assert run.path == "eager"
    assert len(said) == 1
    assert "a draw of numpy's" in said[0]
    assert told == []
    assert_same(ours, theirs)


class Counting(Small):
    """A buffer that the program writes in place, and the loss reads."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def seen(self, x):
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * x.mean() + 0.1)
        return x - self.mean


class Replacing(Counting):
    """The same, by a new tensor each time."""

    def seen(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean() + 0.1
        return x - self.mean


def test_a_buffer_written_in_place_is_followed(soon):
    assert_recorded_as_if_not(Counting, torch.randn(60, 3))


def test_a_buffer_that_is_replaced_is_as_if_nobody_had_recorded(soon):
    x = torch.randn(60, 3)
    (run, ours, said, program), (_, theirs, _, other) = both(Replacing, x)
    assert run.path == "eager"
    assert len(said) == 1
    assert torch.equal(program.mean, other.mean)
    assert_same(ours, theirs)


def running_total():
    """A tensor of a plain program's own, neither parameter nor buffer, that the model writes in place."""
    total = torch.zeros(())
    inner = plain_functions()

    def model(x):
        if torch.is_grad_enabled():
            total.add_(0.1)
        inner.functions["model"](x + total)

    return pv.Program(model, inner.functions["guide"])


def test_a_plain_tensor_that_the_program_writes_is_followed(soon):
    assert_recorded_as_if_not(running_total, torch.randn(40, 3))


def writing_into_its_data():
    def model(x):
        x.mul_(0.5)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.zeros(3)) + z[..., None], 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(())), 0.8))

    return pv.Program(model, guide)


def test_a_program_that_writes_into_its_batch_is_followed(soon):
    assert_recorded_as_if_not(writing_into_its_data, torch.randn(60, 3))


@pytest.mark.usefixtures("unvalidated")
@pytest.mark.parametrize("where", ["a closure", "an attribute", "the objective"])
def test_a_tensor_changed_in_place_from_outside_is_followed(where):
    offset = torch.tensor(0.0)

    class Offset(Small):
        def __init__(self):
            super().__init__()
            self.offset = offset

        def seen(self, x):
            return x + (self.offset if where == "an attribute" else offset)

    objective = pv.SGVB()
    step, batch = step_of(Offset, torch.randn(9, 3), objective)
    for _ in range(3):
        step(batch)
    before = by_both(step, batch)[0]
    (objective.kl_weight if where == "the objective" else offset).fill_(0.25)
    ours, theirs = by_both(step, batch)
    assert step.path == "captured"
    assert_same_step(ours, theirs)
    assert not torch.equal(ours[0], before[0])
    step.compare()
    assert step.path == "captured"


# What cannot be recorded ----------------------------------------------------------------------------------------------


class Deciding(Small):
    def seen(self, x):
        return x + 1 if x.sum() > 0 else x - 1


class Converting(Small):
    def seen(self, x):
        return x * float(x.abs().max())


class Changing(Small):
    """As many particles of it as the data say."""

    def seen(self, x):
        return x + x[x[:, 0] > 0].mean()


class Failing(Small):
    """Fails where it is recorded, and nowhere else."""

    def seen(self, x):
        if torch.fx.experimental.proxy_tensor.get_proxy_mode() is not None:
            raise ValueError("not here,\nplease")
        return x


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Deciding, "a tensor's value decides"),
        (Converting, "a tensor's value decides"),
        (Failing, "ValueError: not here,"),
    ],
)
def test_what_cannot_be_recorded_runs_as_python_and_says_why_once(soon, make, reason):
    (run, ours, said, _), (other, theirs, told, _) = both(make, torch.randn(60, 3))
    assert (run.path, told) == ("eager", [])
    (line,) = said
    assert line.startswith(f"training goes on eagerly: the step cannot be recorded: {reason}")
    assert "\n" not in line
    assert_same(ours, theirs)
    assert without_seconds(run.history) == without_seconds(other.history)


def test_shapes_that_depend_on_data_are_never_frozen(soon):
    """Recorded or not, the numbers are the program's: a graph of boolean indexing has no shape of its own."""
    (_, ours, _, _), (_, theirs, _, _) = both(Changing, torch.randn(60, 3))
    assert_same(ours, theirs)


def test_an_elbo_that_looks_at_values_runs_as_python(soon):
    (run, ours, said, _), (_, theirs, _, _) = both(
        Small, torch.randn(60, 3), objective=TraceEnum_ELBO(max_plate_nesting=1)
    )
    assert run.path == "eager"
    assert len(said) == 1
    assert_same(ours, theirs)


class Logging(Small):
    def __init__(self):
        super().__init__()
        self.log = []

    def seen(self, x):
        self.log.append(x.mean().item())
        return x


def test_a_number_read_for_a_log_alone_does_not_hinder(soon):
    assert_recorded_as_if_not(Logging, torch.randn(60, 3))


class OneHot(Small):
    def seen(self, x):
        return x + nn.functional.one_hot((x[:, 0] > 0).long(), num_classes=3)


def test_one_hot_labels_do_not_hinder(soon):
    assert_recorded_as_if_not(OneHot, torch.randn(60, 3))


def test_without_a_compiler_the_graph_runs_as_it_is(monkeypatch, soon):
    monkeypatch.setattr(compiled, "COMPILE_AFTER", 6)
    x = torch.randn(60, 3)
    with inductor_config.patch({"cpp.cxx": ("/no/such/compiler",), "force_disable_caches": True}):
        (run, ours, said, _), (_, theirs, _, _) = both(Small, x)
    assert run.path == "captured"
    (line,) = said
    assert line.startswith("the step runs as recorded, but not compiled: ")
    assert "\n" not in line
    assert "compiler" in line
    assert_same(ours, theirs)


def test_a_graph_that_is_too_large_is_not_compiled(monkeypatch, soon):
    monkeypatch.setattr(compiled, "COMPILE_AFTER", 6)
    monkeypatch.setattr(pyro_vae.compile, "_LARGEST", 50)
    monkeypatch.setattr(torch._inductor, "compile", None)  # is not even asked
    (run, ours, said, _), (_, theirs, _, _) = both(Small, torch.randn(60, 3))
    assert run.path == "captured"
    assert len(said) == 1
    assert "operations would take minutes to compile (limit 50)" in said[0]
    assert_same(ours, theirs)


# Resumption -----------------------------------------------------------------------------------------------------------


def early(monkeypatch, capture_after=4, compile_after=10):
    monkeypatch.setattr(compiled, "CAPTURE_AFTER", capture_after)
    monkeypatch.setattr(compiled, "COMPILE_AFTER", compile_after)


RESUMED = {"evaluate_every": 60}  # of 60 rows: every third batch


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 7, 13])
def test_a_run_in_two_parts_takes_the_same_paths(monkeypatch, tmp_path, stop):
    """Stopped before, between and after the two switches."""
    early(monkeypatch)
    x = torch.randn(55, 3)  # a short last batch
    whole, ours, _, _ = trained(Small, x, num_samples=315, **RESUMED)
    trained(Small, x, num_samples=18 * stop, run_dir=tmp_path / "r", **RESUMED)
    run, theirs, said, _ = trained(Small, x, num_samples=315, run_dir=tmp_path / "r", resume=True, **RESUMED)
    assert said == []
    assert (whole.path, run.path) == ("compiled", "compiled")
    assert_same(ours, theirs)
    rows = {row["samples"]: row for row in without_seconds(run.history)}
    assert all(rows[row["samples"]] == row for row in without_seconds(whole.history))


@pytest.mark.slow
def test_a_thousand_compiled_steps_from_a_checkpoint(monkeypatch, tmp_path):
    early(monkeypatch)
    x, settings = torch.randn(60, 3), {"evaluate_every": 12_000}
    whole, ours, _, _ = trained(Small, x, num_samples=24_000, **settings)
    trained(Small, x, num_samples=4_000, run_dir=tmp_path / "r", **settings)
    run, theirs, said, _ = trained(Small, x, num_samples=24_000, run_dir=tmp_path / "r", resume=True, **settings)
    assert said == []
    assert run.samples == whole.samples == 24_000
    assert_same(ours, theirs)


def test_what_was_refused_stays_refused(monkeypatch, soon, tmp_path):
    x = torch.randn(60, 3)
    _, _, said, _ = trained(ByNumpy, x, num_samples=100, run_dir=tmp_path / "r")
    assert len(said) == 1
    assert "numpy" in RunDirectory(tmp_path / "r").load().state["position"]["refused"]

    def never(*_):
        raise AssertionError("recorded again")

    monkeypatch.setattr(CompiledStep, "_capture", never)
    monkeypatch.setattr(CompiledStep, "_agrees", never)
    run, ours, said, _ = trained(ByNumpy, x, run_dir=tmp_path / "r", resume=True)
    assert (run.path, said) == ("eager", [])
    assert_same(ours, trained(ByNumpy, x, compile=False)[1])


def test_resuming_in_another_way_is_said(soon, tmp_path):
    x = torch.randn(60, 3)
    trained(Small, x, num_samples=100, run_dir=tmp_path / "r")
    run, _, said, _ = trained(Small, x, run_dir=tmp_path / "r", resume=True, compile=False)
    assert (run.path, run.samples) == ("eager", 300)
    assert len(said) == 1
    assert "steps compiled, now eager" in said[0]
    run, _, said, _ = trained(Small, x, num_samples=400, run_dir=tmp_path / "r", resume=True)
    assert (run.path, run.samples) == ("captured", 400)
    assert "steps eager, now compiled" in said[0]


def test_precision_is_the_runs_own(soon, tmp_path):
    x = torch.randn(60, 3)
    trained(Small, x, num_samples=100, run_dir=tmp_path / "r")
    with pytest.raises(CheckpointError, match="precision='full', got 'bf16'"):
        pv.fit(Small(), x, **SMALL, run_dir=tmp_path / "r", resume=True, precision="bf16")


# Batches of other sizes -----------------------------------------------------------------------------------------------


@pytest.fixture
def recordings(monkeypatch):
    """How often a function was recorded."""
    counts = []
    original = pyro_vae.compile.make_fx

    def counted(*args, **kwargs):
        counts.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(pyro_vae.compile, "make_fx", counted)
    return counts


SOURCES = {
    "rows": lambda x: x,
    "loader": lambda x: DataLoader(TensorDataset(x), batch_size=20, shuffle=True),
    "a list that begins with the usual size": lambda x: list(x.split(20)),
}


@pytest.mark.parametrize("source", SOURCES)
def test_short_batches_are_stepped_and_recorded_for_nobody(soon, recordings, source):
    x = torch.randn(71, 3)  # 20 + 20 + 20 + 11
    settings = {"num_samples": None, "epochs": 4}
    run, _ = assert_recorded_as_if_not(Small, SOURCES[source](x), **settings)
    assert run.samples == 4 * 71
    assert [row["samples"] for row in run.history] == [71, 142, 213, 284]
    assert len(recordings) == 1


def scaled_to(num_data):
    """A plate that states N: a short batch stands for as many data as any other."""

    def model(x):
        with pyro.plate("data", num_data, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.zeros(3)) + z[..., None], 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", num_data, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(pyro.param("slope", torch.ones(3) / 4) @ x.T, 0.5))

    return pv.Program(model, guide)


def test_short_batches_that_stand_for_as_many_data(soon, recordings):
    settings = {"num_samples": None, "epochs": 4, "evaluation_size": 20}
    run, _ = assert_recorded_as_if_not(lambda: scaled_to(71), torch.randn(71, 3), **settings)
    assert run.samples == 4 * 71
    assert len(recordings) == 1


def test_fewer_data_than_a_batch(soon, recordings):
    run, _ = assert_recorded_as_if_not(Small, torch.randn(7, 3), num_samples=70)
    assert run.samples == 70
    assert len(recordings) == 1


def test_sizes_that_come_in_any_order(soon, recordings):
    x = torch.randn(100, 3)
    batches = [x[:30], x[30:40], x[40:70], x[70:71], x[71:]]
    run, _ = assert_recorded_as_if_not(Small, batches, num_samples=None, epochs=4)
    assert run.samples == 400
    assert len(recordings) == 1


@pytest.mark.slow
def test_compiled_once_whatever_the_last_batch(monkeypatch, recordings):
    early(monkeypatch, 3, 5)
    counts, original = [], torch._inductor.compile

    def counted(*args, **kwargs):
        counts.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch._inductor, "compile", counted)
    run, _, said, _ = trained(Small, torch.randn(55, 3), num_samples=550)
    assert (run.path, said, run.samples) == ("compiled", [], 550)
    assert (len(counts), len(recordings)) == (1, 1)


@pytest.mark.slow
def test_batches_of_other_strides_and_types_are_compiled_for_nobody(monkeypatch):
    """A loader may give columns first or rows first: the same shape, not the same memory."""
    early(monkeypatch, 3, 5)
    x = torch.randn(12, 3, 20)
    batches = [batch.T if index % 3 else batch.T.contiguous() for index, batch in enumerate(x)]
    (run, ours, said, _), (_, theirs, _, _) = both(Small, batches, num_samples=None, epochs=2)
    assert (run.samples, said) == (480, [])
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-9, atol=1e-9)


# Settings -------------------------------------------------------------------------------------------------------------


def digits():
    x = torch.rand(90, 3)
    return pv.Dataset("few", x[:60], x[60:75], x[75:], binarize="dynamic")


SETTINGS = {
    "kl_warmup": {"kl_warmup": 200},
    "kl_warmup with B": {"kl_warmup": 200, "objective": pv.SGVB(2, "B")},
    "prior_scale": {"prior_scale": 0.5},
    "max_grad_norm": {"max_grad_norm": 0.05},
    "prior_scale and max_grad_norm": {"prior_scale": 0.5, "max_grad_norm": 0.05},
    "guide alone": {"trained": "guide"},
    "patience": {"patience": 2, "evaluate_every": 20, "learning_rate": 0.3, "num_samples": 3000},
    "bf16": {"precision": "bf16"},
    "monte carlo em": {"objective": pv.MCEM(3, num_updates=2)},
    "adagrad": {"optimizer": "adagrad", "learning_rate": None},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_is_part_of_the_recorded_step(soon, settings):
    run, _ = assert_recorded_as_if_not(lambda: pv.VAE((3,), 1, (4,)), digits(), **settings)
    if "patience" in settings:
        assert run.stopped_early
        assert run.samples > 60  # recorded by then


@pytest.mark.parametrize(
    "settings", [{"prior_scale": 0.5}, {"max_grad_norm": 0.05}, {"kl_warmup": 200}, {"trained": "guide"}]
)
def test_these_settings_do_something(soon, settings):
    x = torch.rand(60, 3).round()
    plain, ours = (trained(lambda: pv.VAE((3,), 1, (4,)), x, optimizer="sgd", **s)[1] for s in ({}, settings))
    assert any(not torch.equal(plain[name], ours[name]) for name in plain)


def test_parameters_whose_gradients_are_one_tensor():
    """autograd gives the terms of a sum the same gradient tensor: what is added to one must not reach the other."""

    def two_terms():
        def model(x):
            a, b = pyro.param("a", torch.ones(3)), pyro.param("b", 2 * torch.ones(3))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(a + b + z[..., None], 1.0).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.0 * x.sum(-1), 1.0))

        return pv.Program(model, guide)

    x = torch.randn(20, 3)
    settings = {"num_samples": 20, "optimizer": "sgd", "learning_rate": 0.1}
    plain, prior, clipped = (
        trained(two_terms, x, **settings, **more)[1] for more in ({}, {"prior_scale": 0.5}, {"max_grad_norm": 0.5})
    )
    for name, start in (("a", 1.0), ("b", 2.0)):  # the prior pulls each to zero by its own value / (N s^2)
        torch.testing.assert_close(prior[name] - plain[name], torch.full((3,), -0.1 * start / (20 * 0.25)))
    moved = torch.stack([clipped["a"] - 1.0, clipped["b"] - 2.0]).norm()
    assert moved.item() == pytest.approx(0.1 * 0.5, rel=1e-4)


@pytest.mark.parametrize("compile", [True, False])
def test_a_gradient_that_is_one_number_repeated(soon, compile):
    """The gradient of a sum is expanded from one number, and cannot be written into."""

    def penalised():
        def model(x):
            pyro.factor("penalty", -pyro.param("a", torch.ones(3)).sum())
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.0 * x.sum(-1), 1.0))

        return pv.Program(model, guide)

    settings = {"objective": Trace_ELBO(), "optimizer": "sgd", "learning_rate": 0.1, "prior_scale": 1.0}
    _, ours, _, _ = trained(
        penalised, torch.randn(20, 3), num_samples=100, max_grad_norm=10.0, compile=compile, **settings
    )
    value = 1.0
    for _ in range(5):
        value -= 0.1 * (1 / 20 + value / 20)
    torch.testing.assert_close(ours["a"], torch.full((3,), value))


class Breaking(Small):
    """Not a number where a datum is large."""

    def seen(self, x):
        return torch.where(x.amax() > 50, math.nan, 1.0) * x


def test_a_loss_that_is_not_finite_stops_at_the_same_step(soon):
    batches = list(torch.randn(12, 20, 3))
    batches[8][3, 0] = 100.0
    messages, left = [], []
    for compile in (True, False):
        torch.manual_seed(5)
        program = Breaking()
        with pytest.raises(NonFiniteLossError) as caught:
            pv.fit(program, batches, **SMALL | {"num_samples": None, "epochs": 1}, compile=compile)
        messages.append(str(caught.value))
        left.append({name: tensor.detach().clone() for name, tensor in program.named_parameters()})
    assert messages[0] == messages[1]
    assert "epoch 0, batch 8, after 160 samples: the loss became nan" in messages[0]
    assert_same(*left)
    torch.manual_seed(5)
    program = Breaking()
    pv.fit(program, batches[:8], **SMALL | {"num_samples": None, "epochs": 1})
    assert_same(left[0], dict(program.named_parameters()))


# The surroundings -----------------------------------------------------------------------------------------------------


def surroundings(compile):
    torch.manual_seed(5)
    program = WithBuffersAndDropout()
    program.dropout.eval()
    pyro.param("of somebody else", torch.ones(2))
    pyro.set_rng_seed(9)
    pv.fit(program, torch.randn(60, 4), **SMALL, compile=compile)
    return {
        "torch": torch.rand(3).tolist(),
        "numpy": np.random.rand(3).tolist(),  # noqa: NPY002
        "python": random.random(),
        "training": [module.training for module in program.modules()],
        "requires_grad": [tensor.requires_grad for tensor in program.parameters()],
        "store": {name: value.tolist() for name, value in pyro.get_param_store().items()},
        "validation": torch.distributions.Distribution._validate_args,
        "dtype": torch.get_default_dtype(),
        "gradients enabled": torch.is_grad_enabled(),
        "has gradients": [tensor.grad is not None for tensor in program.parameters()],
        "gradients": [None if tensor.grad is None else tensor.grad.tolist() for tensor in program.parameters()],
    }


def test_the_surroundings_are_left_as_without_recording(soon):
    ours, theirs = surroundings(True), surroundings(False)
    assert ours.pop("gradients") is not None
    theirs.pop("gradients")
    assert ours == theirs
    assert ours["store"] == {"of somebody else": [1.0, 1.0]}


def test_gradients_are_left_as_without_recording(soon):
    assert surroundings(True)["gradients"] == surroundings(False)["gradients"]


def test_a_program_trains_again_and_by_pyro_after_it_was_recorded(soon):
    x = torch.randn(60, 3)
    program, other = trained(Small, x)[3], trained(Small, x, compile=False)[3]
    for again in (program, other):
        pv.fit(again, x, **SMALL)
        elbo, optimizer = pv.SGVB(), pyro.optim.Adam({"lr": 0.01})
        pyro.clear_param_store()
        svi = pyro.infer.SVI(again.model, again.guide, optimizer, elbo)
        pyro.set_rng_seed(1)
        losses = [svi.step(x) for _ in range(3)]
        assert all(map(math.isfinite, losses))
    assert_same(dict(program.named_parameters()), dict(other.named_parameters()))
    copy.deepcopy(program)


# Several shapes -------------------------------------------------------------------------------------------------------


def ragged(num_data=120, steps=16):
    """Sequences of which one in eight is long."""
    torch.manual_seed(2)
    lengths = torch.where(torch.arange(num_data) % 8 == 0, steps, torch.randint(1, 5, (num_data,)))
    return torch.randn(num_data, steps, 3), lengths


def test_each_shape_has_a_graph_of_its_own_and_the_usual_one_is_compiled(monkeypatch):
    monkeypatch.setattr(compiled, "CAPTURE_AFTER", 3)
    monkeypatch.setattr(compiled, "COMPILE_AFTER", 40)
    kept, make = [], CompiledStep.__init__

    def noted(self, *args, **kwargs):
        make(self, *args, **kwargs)
        kept.append(self)

    monkeypatch.setattr(CompiledStep, "__init__", noted)
    more = {"batch_size": 4, "num_samples": 4 * 60, "trim_padding": True}
    (run, ours, said, _), (_, theirs, told, _) = both(sequences, ragged(), **more)
    assert said == told == []
    assert run.path == "compiled"
    recorded = {shapes[0][1]: found for shapes, found in kept[0]._recorded.items() if found.graph is not None}
    assert sorted(recorded) == [4, 16]
    assert recorded[16].compiled
    assert not recorded[4].compiled
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_captured_steps_of_several_shapes_give_the_same_bits_also_if_a_run_was_stopped(soon, tmp_path):
    more = {"batch_size": 4, "trim_padding": True}
    _, program = assert_recorded_as_if_not(sequences, ragged(), num_samples=300, **more)
    straight = {name: value.detach().clone() for name, value in program.named_parameters()}
    trained(sequences, ragged(), num_samples=120, run_dir=tmp_path / "run", **more)
    _, resumed, _, _ = trained(sequences, ragged(), num_samples=300, run_dir=tmp_path / "run", resume=True, **more)
    assert_same(straight, resumed)


def test_a_loader_whose_batches_have_shapes_of_their_own(soon, monkeypatch):
    monkeypatch.setattr(compiled, "_MOST_SHAPES", 2)
    torch.manual_seed(4)
    batches = [(torch.randn(4, steps, 3), torch.full((4,), steps)) for steps in [5, 3, 4, 2] * 6]
    assert_recorded_as_if_not(sequences, batches, num_samples=200)


def test_a_number_that_changes_is_found_in_every_shape(soon):
    class Drifting(LinearStateSpace):
        """Its model's law depends on how often it was called with few steps, a Python number."""

        calls = 0

        def model(self, x, lengths=None, mask=None):
            self.calls += x.shape[1] < 16
            super().model(x * (1 + 0.1 * self.calls), lengths, mask)

    _, _, said, _ = trained(
        lambda: Drifting(example(), "amortized"), ragged(), batch_size=4, num_samples=240, trim_padding=True
    )
    assert len([text for text in said if "not the program's own" in text]) == 1
