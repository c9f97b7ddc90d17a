"""The value of a bound over a data set: the same whatever the batches, for this package's objectives and for Pyro's."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.evaluation import evaluate_bound
from pyro_vae.evaluation.bounds import frozen
from pyro_vae.inputs import open_inputs
from pyro_vae.programs import as_program
from tests import oracles


def opened(program, data, **options):
    bridged = as_program(program)
    return bridged, open_inputs(bridged, data, **options)


def exact(num_data=None):
    """x ~ N(0, 2), its exact posterior as guide, in a plate of num_data or of the batch's own size."""

    def model(x):
        with pyro.plate("data", num_data or len(x), subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", num_data or len(x), subsample_size=len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    return pv.Program(model, guide)


OBJECTIVES = {"SGVB": pv.SGVB(2), "Trace_ELBO": Trace_ELBO(num_particles=2, vectorize_particles=True)}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 500])
@pytest.mark.parametrize("plate_size", [None, 10, 60])
def test_the_exact_posterior_gives_the_mean_evidence_whatever_the_batches(objective, batch_size, plate_size):
    """Short last batches count by their size, and a plate's N / M is divided out, however the inputs were opened."""
    x = torch.randn(10)
    program, inputs = opened(exact(plate_size), x)
    estimate = evaluate_bound(program, inputs, OBJECTIVES[objective], batch_size=batch_size)
    evidence = dist.Normal(0.0, 2**0.5).log_prob(x)
    assert estimate.mean == pytest.approx(evidence.mean().item(), abs=1e-10)
    if objective == "SGVB":
        assert estimate.std_error == pytest.approx(evidence.std().item() / 10**0.5, rel=1e-8)


def test_the_bound_of_a_wrong_guide_is_the_analytic_one():
    toy, x = oracles.Amortized(), oracles.example_data(3)
    program, inputs = opened(pv.Program(toy.model, toy.guide), x.repeat(4000, 1))
    truth = toy.elbo(x).mean().item()
    for objective in (pv.SGVB(), pv.SGVB(estimator="B")):
        estimate = evaluate_bound(program, inputs, objective, batch_size=6000)
        assert 0 < estimate.std_error < 0.05
        assert estimate.mean == pytest.approx(truth, abs=5 * estimate.std_error)


@pytest.mark.parametrize("objective", [Trace_ELBO(), TraceMeanField_ELBO()])
def test_pyros_objectives_agree_with_ours(objective):
    toy, x = oracles.Amortized(), oracles.example_data(3)
    program, inputs = opened(pv.Program(toy.model, toy.guide), x.repeat(1000, 1))
    estimate = evaluate_bound(program, inputs, objective)
    assert 0 < estimate.std_error < 0.2
    assert estimate.mean == pytest.approx(toy.elbo(x).mean().item(), abs=5 * estimate.std_error)


@pytest.mark.parametrize("num_data", [1, 4, 10, 99])
def test_num_data_takes_the_first(num_data):
    x = torch.randn(10)
    program, inputs = opened(exact(), x)
    estimate = evaluate_bound(program, inputs, pv.SGVB(), batch_size=3, num_data=num_data)
    expected = dist.Normal(0.0, 2**0.5).log_prob(x[:num_data]).mean().item()
    assert estimate.mean == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_batches_of_an_iterable(objective):
    x = torch.randn(10)
    program, inputs = opened(exact(), torch.utils.data.DataLoader(x, batch_size=4))
    estimate = evaluate_bound(program, inputs, OBJECTIVES[objective])
    assert estimate.mean == pytest.approx(dist.Normal(0.0, 2**0.5).log_prob(x).mean().item(), abs=1e-10)


def test_an_annealed_weight_is_not_evaluated_and_is_put_back():
    toy, x = oracles.Amortized(), oracles.example_data(5)
    program, inputs = opened(pv.Program(toy.model, toy.guide), x)
    annealed = pv.SGVB()
    annealed.kl_weight.fill_(0.1)
    assert evaluate_bound(program, inputs, annealed) == evaluate_bound(program, inputs, pv.SGVB())
    assert annealed.kl_weight.item() == pytest.approx(0.1)


class Fragile(nn.Module):
    data_shape = (3,)

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.mean = nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(*z.shape[:-1], 3), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("fragile", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.mean(self.drop(self.norm(x))), 1.0).to_event(1))


@pytest.mark.parametrize("objective", [pv.SGVB(), Trace_ELBO()])
def test_evaluating_changes_nothing_and_is_repeatable(objective):
    module, x = Fragile(), oracles.example_data(8)
    generator = torch.get_rng_state()
    state = {n: t.clone() for n, t in module.state_dict().items()}
    program, inputs = opened(module, x)
    first, again = (evaluate_bound(program, inputs, objective, batch_size=3) for _ in range(2))
    assert first == again
    assert evaluate_bound(program, inputs, objective, batch_size=3, seed=1) != first
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(t, state[n]) for n, t in module.state_dict().items())
    assert all(m.training for m in module.modules())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_frozen_puts_everything_back_after_a_failure():
    module = Fragile()
    generator = torch.get_rng_state()
    seen = {}

    def fail():
        with frozen(as_program(module), seed=3):
            seen.update(training=module.training, grad=torch.is_grad_enabled(), draw=torch.randn(5))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (seen["training"], seen["grad"]) == (False, False)
    assert torch.equal(torch.get_rng_state(), generator)
    assert module.training
    assert torch.is_grad_enabled()


def test_grey_levels_are_drawn_by_the_evaluations_own_seed():
    vae = pv.VAE((4,), latent_dim=1, hidden_dims=(3,))
    program, inputs = opened(vae, torch.rand(30, 4))
    torch.manual_seed(0)
    first = evaluate_bound(program, inputs, pv.SGVB())
    torch.manual_seed(1)
    assert evaluate_bound(program, inputs, pv.SGVB()) == first
