"""Scores on graphs: the same numbers as by Python, and what cannot be recorded is said."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae import compile
from pyro_vae.evaluation import marginal

WORTH_RECORDING = marginal._WORTH_RECORDING
OPTIONS = {
    "importance": {"num_particles": 60},
    "defensive": {"method": "importance", "num_particles": 60, "defensive": 0.2},
    "ais": {"method": "ais", "num_particles": 3, "num_steps": 6},
    "ais from the prior": {"method": "ais", "num_particles": 3, "num_steps": 6, "initial": "prior"},
    "posterior-density": {"method": "posterior-density", "num_particles": 20, "num_chains": 2, "num_warmup": 4},
}


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """However little there is to do."""
    monkeypatch.setattr(marginal, "_WORTH_RECORDING", 0)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were made."""
    made = []

    def capture(*args, original=compile.capture):
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(compile, "capture", capture)
    return made


def vae():
    torch.manual_seed(0)
    return pv.VAE((6,), 2, (5,))


def score(compile, model=None, rows=17, **options):
    x = (torch.rand(rows, 6, generator=torch.Generator().manual_seed(1)) > 0.5).double()
    return pv.log_marginal(model or vae(), x, batch_size=4, max_elements=300, compile=compile, **options)


@pytest.mark.filterwarnings("ignore:annealed importance", "ignore:Appendix D")
@pytest.mark.parametrize("name", OPTIONS)
def test_a_recorded_score_is_the_score(name, graphs):
    """With short chunks and a short last minibatch; a random number more or less would show in all that follow."""
    plain = score(False, **OPTIONS[name])
    assert not graphs
    recorded = score(True, **OPTIONS[name])
    assert graphs
    torch.testing.assert_close(recorded.values, plain.values, atol=1e-10, rtol=0)
    for diagnostic, values in plain.diagnostics.items():
        torch.testing.assert_close(recorded.diagnostics[diagnostic], values, atol=1e-8, rtol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:annealed importance")
@pytest.mark.parametrize("name", ["importance", "ais"])
def test_a_compiled_score_is_the_score(name, monkeypatch):
    monkeypatch.setattr(marginal, "_WORTH_COMPILING", 0)
    compiled = []

    def compiles(graph, inputs, original=compile.Graph.compiled):
        compiled.append(original(graph, inputs))
        return compiled[-1]

    monkeypatch.setattr(compile.Graph, "compiled", compiles)
    found, plain = score(True, rows=8, **OPTIONS[name]), score(False, rows=8, **OPTIONS[name])
    assert compiled
    torch.testing.assert_close(found.values, plain.values, atol=1e-10, rtol=0)


def test_little_work_is_not_worth_a_graph(monkeypatch, graphs):
    monkeypatch.setattr(marginal, "_WORTH_RECORDING", WORTH_RECORDING)
    score(True, num_particles=60)
    assert not graphs


@pytest.mark.filterwarnings("ignore:annealed importance")
def test_a_graph_serves_all_minibatches_of_a_shape(graphs):
    score(True, rows=17, **OPTIONS["ais"])
    few = len(graphs)
    graphs.clear()
    score(True, rows=41, **OPTIONS["ais"])
    assert len(graphs) == few


def draws_of_numpys():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0)) + 0.1 * float(np.random.randn())  # noqa: NPY002
            pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 6), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1), 1.0))

    return pv.Program(model, guide)


def decides_by_values():
    program = draws_of_numpys()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1), 1.0 if x.sum() > 0 else 2.0))

    return pv.Program(program.functions["model"], guide)


@pytest.mark.parametrize(
    ("make", "said"), [(draws_of_numpys, "something other than a tensor"), (decides_by_values, "a tensor's value")]
)
def test_what_cannot_be_recorded_runs_as_python_and_says_why(make, said):
    with pytest.warns(UserWarning, match=f"running eagerly: .*{said}"):
        recorded = score(True, make(), num_particles=60)
    torch.testing.assert_close(recorded.values, score(False, make(), num_particles=60).values)


def test_the_gradient_of_a_recorded_function_reaches_the_positions_alone():
    recorder, weight = compile.Recorder(), torch.tensor(3.0, requires_grad=True)
    u = torch.randn(4, 2, requires_grad=True)
    for _ in range(3):
        value = recorder.differentiable("key", lambda u, beta: beta * weight * u.square().sum(-1))(u, torch.tensor(0.5))
        (gradient,) = torch.autograd.grad((torch.arange(4.0) * value).sum(), u)
        torch.testing.assert_close(gradient, torch.arange(4.0)[:, None] * 3.0 * u.detach())
    assert not torch.autograd.grad(value.sum(), [weight], allow_unused=True)[0]
