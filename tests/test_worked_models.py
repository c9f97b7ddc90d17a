"""Models with global latents, as a user writes them: exact where conjugate, whatever the minibatches and the guide.

A global latent is one outside the data plate, which then states N. What is proved here, on plain Pyro functions: the
bound with the exact posterior as guide, the gradient of all data as the mean of minibatch gradients, and Pyro's
automatic guides of the globals, alone and beside an amortised guide of local latents, recorded and not.
"""

import itertools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import nn
from torch._inductor import config as inductor_config

import pyro_vae as pv
from pyro_vae.programs import check_program
from pyro_vae.training import compiled
from tests import oracles
from tests.training.test_resume import assert_same, without_seconds

NEVER = 10**9
PRIOR_SCALE, NOISE = 0.8, 0.6


def close(left, right, atol=1e-10):
    torch.testing.assert_close(torch.as_tensor(left), torch.as_tensor(right), rtol=0, atol=atol)


# Conjugate regression -------------------------------------------------------------------------------------------------


def regression_data(num_data=6, num_weights=3):
    inputs = torch.randn(num_data, num_weights)
    return inputs @ torch.tensor([0.7, -1.0, 0.4][:num_weights]) + NOISE * torch.randn(num_data), inputs


class Regression:
    """w ~ N(0, a^2 I), y_i ~ N(w . x_i, s^2), with a Gaussian of full covariance as guide: exact unless moved."""

    def __init__(self, y, inputs, plate="stated", shift=0.0, widening=1.0):
        self.joint = oracles.regression(inputs, PRIOR_SCALE, NOISE)
        posterior = self.joint.given_last(y)
        self.loc = (posterior.mean + shift).requires_grad_()
        self.root = (widening * torch.linalg.cholesky(posterior.cov)).requires_grad_()
        self.num_data, self.plate_kind = len(y), plate

    def plate(self, y):
        if self.plate_kind == "silent":  # the bug: N is not stated
            return pyro.plate("data", len(y))
        if self.plate_kind == "drawn":
            return pyro.plate("data", self.num_data, subsample_size=len(y))
        return pyro.plate("data", self.num_data, subsample=torch.arange(len(y)))

    def weights(self):
        return pyro.sample("w", dist.Normal(torch.zeros(len(self.loc)), PRIOR_SCALE).to_event(1))

    def drawn(self):
        return pyro.sample("w", dist.MultivariateNormal(self.loc, scale_tril=self.root.tril()))

    def model(self, y, inputs):
        w = self.weights() if self.plate_kind != "inside" else None
        with self.plate(y):
            w = self.weights() if w is None else w  # the bug: a latent of its own for each datum
            pyro.sample("y", dist.Normal((w * inputs).sum(-1), NOISE), obs=y)

    def guide(self, y, inputs):
        if self.plate_kind != "inside":
            self.drawn()
        with self.plate(y):
            if self.plate_kind == "inside":
                self.drawn()


def loss_of_part(objective, program, data, rows, seed):
    """The loss on some rows, with the draw of the globals that a seed gives."""
    pyro.set_rng_seed(seed)
    return objective.differentiable_loss(program.model, program.guide, *(column[rows] for column in data))


def parts_of(num_data, size):
    return [torch.tensor(rows) for rows in itertools.combinations(range(num_data), size)]


@pytest.mark.parametrize("num_particles", [1, 2, 7])
@pytest.mark.parametrize("plate", ["stated", "drawn"])
def test_the_exact_posterior_gives_the_evidence_of_all_data_without_variance(plate, num_particles):
    data = regression_data()
    program, objective = Regression(*data, plate=plate), pv.SGVB(num_particles)
    truth = program.joint.last(6).log_prob(data[0]).item()
    for seed in range(5):
        close(-loss_of_part(objective, program, data, slice(None), seed).item(), truth)
    pyro.set_rng_seed(0)
    close(objective.bound(program.model, program.guide, *data).sum().item(), truth)


@pytest.mark.parametrize("sizes", [(6,), (3, 3), (2, 2, 2), (1, 2, 3), (1,) * 6])
def test_the_minibatches_of_a_partition_add_up_to_the_evidence(sizes):
    """Each stands for its share of the data: sum of M / N times its bound, with one draw of the globals for all."""
    data = regression_data()
    program, objective = Regression(*data), pv.SGVB(3)
    truth = program.joint.last(6).log_prob(data[0]).item()
    parts = torch.randperm(6).split(sizes)
    single = [loss_of_part(objective, program, data, rows, seed=1).item() for rows in parts]
    close(-sum(len(rows) / 6 * loss for rows, loss in zip(parts, single, strict=True)), truth)
    if len(sizes) > 1:
        assert max(abs(-loss - truth) for loss in single) > 0.1  # one minibatch alone has variance


class CountsTheKLPerDatum(pv.SGVB):
    """The bug: the terms of the globals scaled by N / M as those of the data are."""

    def _bounds(self, weights, *rest):
        found = list(super()._bounds(weights, *rest))
        found[1] = found[1] * weights.scale
        return tuple(found)


BUGS = {
    "N is not stated": lambda data: (Regression(*data, plate="silent"), pv.SGVB(3)),
    "the KL of the globals per datum": lambda data: (Regression(*data), CountsTheKLPerDatum(3)),
    "the global inside the plate": lambda data: (Regression(*data, plate="inside"), pv.SGVB(3)),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_does_not_give_the_evidence(bug):
    data = regression_data()
    program, objective = BUGS[bug](data)
    truth = program.joint.last(6).log_prob(data[0]).item()
    single = [loss_of_part(objective, program, data, rows, seed=1).item() for rows in torch.arange(6).split(2)]
    with pytest.raises(AssertionError):
        close(-sum(single) / 3, truth, atol=0.1)


def test_a_global_of_the_model_in_the_plate_of_the_guide_is_refused_by_name():
    data = regression_data()
    right, wrong = Regression(*data), Regression(*data, plate="inside")
    with pytest.raises(ValueError, match="site 'w' has one shape in the model and another in the guide"):
        check_program(pv.Program(right.model, wrong.guide), data)


@pytest.mark.parametrize("wrong", [{"shift": 0.3}, {"widening": 1.6}])
def test_a_wrong_guide_gives_the_analytic_bound_of_the_data_set(wrong):
    data = regression_data()
    program = Regression(*data, **wrong)
    q = oracles.Gaussian(program.loc.detach(), (program.root @ program.root.T).detach())
    truth = oracles.elbo(program.joint, q, data[0])
    assert truth < program.joint.last(6).log_prob(data[0]) - 0.1
    with torch.no_grad():
        weights = pv.log_weights(program.model, program.guide, data, num_particles=200_000)
    log_w = weights.log_w.sum(1) + weights.log_w_global
    close(log_w.mean(), truth, atol=5 * log_w.std().item() / 200_000**0.5)


# The gradient of all data is the mean over minibatches ----------------------------------------------------------------


class WithLocals:
    """A factor model with global loadings and one latent per datum, whose noise is given, so that it can be repeated.

    Draws are point masses at a differentiable map of given noise, with the Gaussian's density there: estimator A.
    """

    def __init__(self, num_data):
        self.num_data = num_data
        self.noise = {"w": torch.randn(3), "z": torch.randn(num_data)}
        self.parameters = [
            torch.randn(3).requires_grad_(),
            (-0.5 + 0.1 * torch.randn(3)).requires_grad_(),
            torch.randn(3).requires_grad_(),
            torch.tensor(-0.3).requires_grad_(),
            torch.tensor(-0.4).requires_grad_(),
        ]

    def plate(self, x):
        return pyro.plate("data", self.num_data, subsample=torch.arange(len(x)))

    def model(self, x, row):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with self.plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z[..., None] * w, self.parameters[4].exp()).to_event(1), obs=x)

    def point(self, loc, log_scale, noise, event_dim):
        value = loc + log_scale.exp() * noise
        density = dist.Normal(loc, log_scale.exp()).to_event(event_dim).log_prob(value)
        return dist.Delta(value, log_density=density, event_dim=event_dim)

    def guide(self, x, row):
        loc, log_scale, gain, local_log_scale, _ = self.parameters
        pyro.sample("w", self.point(loc, log_scale, self.noise["w"], 1))
        with self.plate(x):
            pyro.sample("z", self.point(x @ gain, local_log_scale, self.noise["z"][row], 0))


def gradient_of(loss, parameters):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_gradient_of_all_data_is_the_mean_over_all_minibatches_with_locals(size):
    x, row = torch.randn(5, 3), torch.arange(5)
    toy, objective = WithLocals(5), pv.SGVB()
    whole = gradient_of(objective.differentiable_loss(toy.model, toy.guide, x, row), toy.parameters)
    parts = [
        gradient_of(objective.differentiable_loss(toy.model, toy.guide, x[rows], rows), toy.parameters)
        for rows in parts_of(5, size)
    ]
    close(sum(parts) / len(parts), whole)
    assert whole.abs().min() > 1e-3
    assert size == 5 or (parts[0] - whole).abs().max() > 0.1  # a minibatch's own is another


@pytest.mark.parametrize("estimator", ["A", "B"])
@pytest.mark.parametrize("objective", ["SGVB", "Trace"])
def test_the_gradient_of_all_data_is_the_mean_over_all_minibatches_of_a_regression(objective, estimator):
    data = regression_data()
    program = Regression(*data, shift=0.3, widening=1.4)
    if estimator == "B":  # a KL is registered between factorised Gaussians
        program.drawn = lambda: pyro.sample("w", dist.Normal(program.loc, program.root.diagonal()).to_event(1))
    pyros = Trace_ELBO if estimator == "A" else TraceMeanField_ELBO
    rule = (
        pv.SGVB(4, estimator)
        if objective == "SGVB"
        else pyros(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    )
    parameters = [program.loc, program.root]
    whole = gradient_of(loss_of_part(rule, program, data, slice(None), seed=2), parameters)
    parts = [gradient_of(loss_of_part(rule, program, data, rows, seed=2), parameters) for rows in parts_of(6, 2)]
    close(sum(parts) / len(parts), whole)
    assert (parts[0] - whole).abs().max() > 0.1


@pytest.mark.parametrize("bug", sorted(BUGS.keys() - {"the global inside the plate"}))
def test_a_planted_bug_changes_the_mean_gradient(bug):
    data = regression_data()
    program, objective = BUGS[bug](data)
    with torch.no_grad():
        program.loc.add_(0.3)
    parameters, right = [program.loc, program.root], Regression(*data)
    right.loc, right.root = parameters
    whole = gradient_of(loss_of_part(pv.SGVB(3), right, data, slice(None), seed=2), parameters)
    parts = [gradient_of(loss_of_part(objective, program, data, rows, seed=2), parameters) for rows in parts_of(6, 2)]
    with pytest.raises(AssertionError):
        close(sum(parts) / len(parts), whole, atol=0.1)


# Learning reaches the exact answer ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_automatic_guide_reaches_the_evidence_and_the_posterior():
    data = regression_data(60)
    exact = Regression(*data)
    program = pv.Program(exact.model, AutoMultivariateNormal(exact.model, init_scale=0.3))
    for rate in (0.05, 0.01, 0.002):
        options = {"optimizer": "adam", "learning_rate": rate, "epochs": 150, "batch_size": 20, "progress": False}
        run = pv.fit(program, data, objective=pv.SGVB(8), evaluate_every=NEVER, **options)
    truth = exact.joint.last(60).log_prob(data[0]).item()
    bound = pv.evaluate_bound(program, data, pv.SGVB(2000), batch_size=60).mean * 60
    assert bound == pytest.approx(truth, abs=0.1)
    score = pv.log_marginal(program, data, of="dataset", num_particles=2000)
    assert score.mean == pytest.approx(truth, abs=max(0.01, 5 * score.mc_error))
    assert run.history[-1]["dataset_bound"] == pytest.approx(truth, abs=2.0)
    with torch.no_grad():
        w = pv.log_weights(program.model, program.guide, data, num_particles=20_000).latents["w"].flatten(0, -2)
    posterior = exact.joint.given_last(data[0])
    scale = posterior.cov.diagonal().sqrt()
    close((w.mean(0) - posterior.mean) / scale, torch.zeros(3), atol=0.15)
    close(w.T.cov() / scale.outer(scale), posterior.cov / scale.outer(scale), atol=0.15)


@pytest.mark.slow
def test_empirical_bayes_reaches_the_maximum_of_the_exact_evidence():
    y, inputs = regression_data(60)

    def model(y, inputs):
        scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
        noise = pyro.param("noise", torch.tensor(1.5), constraint=dist.constraints.positive)
        w = pyro.sample("w", dist.Normal(torch.zeros(3), scale).to_event(1))
        with pyro.plate("data", 60, subsample=torch.arange(len(y))):
            pyro.sample("y", dist.Normal((w * inputs).sum(-1), noise), obs=y)

    program = pv.Program(model, AutoMultivariateNormal(model, init_scale=0.1))
    for rate in (0.05, 0.01, 0.002):
        options = {"optimizer": "adam", "learning_rate": rate, "epochs": 150, "batch_size": 20, "progress": False}
        pv.fit(program, (y, inputs), objective=pv.SGVB(8), evaluate_every=NEVER, **options)

    def evidence(scale, noise):
        return oracles.regression(inputs, scale, noise).last(60).log_prob(y)

    grid = torch.cartesian_prod(torch.linspace(0.3, 3.0, 40), torch.linspace(0.3, 1.2, 40))
    values = torch.stack([evidence(scale, noise) for scale, noise in grid])
    found = evidence(program.param("scale"), program.param("noise"))
    assert found > values.max() - 0.05
    assert evidence(torch.tensor(2.0), torch.tensor(1.5)) < values.max() - 5


# Pyro's automatic guides ----------------------------------------------------------------------------------------------

AUTOMATIC = {
    "AutoNormal": lambda model: AutoNormal(model, init_scale=0.2),
    "AutoDiagonalNormal": lambda model: AutoDiagonalNormal(model, init_scale=0.2),
    "AutoMultivariateNormal": lambda model: AutoMultivariateNormal(model, init_scale=0.2),
    "AutoLowRankMultivariateNormal": lambda model: AutoLowRankMultivariateNormal(model, init_scale=0.2, rank=2),
    "AutoIAFNormal": lambda model: AutoIAFNormal(model, hidden_dim=[6], num_transforms=2),
}
LEARNING = {
    "sgvb": lambda: pv.SGVB(2),
    "sgvb B": lambda: pv.SGVB(2, "B"),
    "Trace": Trace_ELBO,
    "Trace vectorized": lambda: Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1),
    "TraceMeanField": TraceMeanField_ELBO,
}
NUM_DATA = 40


def of_globals(make):
    """Regression with an unknown noise: a real global vector and a positive one."""

    def model(y, inputs):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        noise = pyro.sample("noise", dist.LogNormal(torch.tensor(0.0), 1.0))
        with pyro.plate("data", NUM_DATA, subsample=torch.arange(len(y))):
            pyro.sample("y", dist.Normal((w * inputs).sum(-1), noise), obs=y)

    return pv.Program(model, make(model))


def with_amortised_locals(make):
    """The same beside one latent per datum, whose guide is a network of the datum."""
    encoder = nn.Linear(4, 2)

    def model(y, inputs):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        noise = pyro.sample("noise", dist.LogNormal(torch.tensor(0.0), 1.0))
        with pyro.plate("data", NUM_DATA, subsample=torch.arange(len(y))):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("y", dist.Normal((w * inputs).sum(-1) + z, noise), obs=y)

    automatic = make(poutine.block(model, expose=["w", "noise"]))

    def guide(y, inputs):
        pyro.module("encoder", encoder)
        automatic(y, inputs)
        with pyro.plate("data", NUM_DATA, subsample=torch.arange(len(y))):
            loc, log_scale = encoder(torch.cat([y[:, None], inputs], 1)).unbind(-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    return pv.Program(model, guide)


PROGRAMS = {"globals": of_globals, "globals and locals": with_amortised_locals}


def trained(program, automatic, objective, **settings):
    """A run of a few steps, some on a short batch; parameters that begin the same way each time."""
    torch.manual_seed(5)
    program, data = PROGRAMS[program](AUTOMATIC[automatic]), regression_data(NUM_DATA)
    small = {"optimizer": "adam", "learning_rate": 0.01, "batch_size": 15, "epochs": 5, "progress": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="estimator B: no analytic KL")
        run = pv.fit(program, data, objective=LEARNING[objective](), **small | settings)
    return run, {name: tensor.detach().clone() for name, tensor in program.named_parameters().items()}


@pytest.fixture
def soon(monkeypatch):
    """Recorded after three steps, never compiled."""
    monkeypatch.setattr(compiled, "CAPTURE_AFTER", 3)
    monkeypatch.setattr(compiled, "COMPILE_AFTER", NEVER)


@pytest.mark.parametrize("objective", LEARNING)
@pytest.mark.parametrize("automatic", AUTOMATIC)
@pytest.mark.parametrize("program", PROGRAMS)
def test_automatic_guides_train_recorded_as_if_not(soon, program, automatic, objective):
    run, ours = trained(program, automatic, objective)
    other, theirs = trained(program, automatic, objective, compile=False)
    assert (run.path, other.path) == ("captured", "eager")
    assert_same(ours, theirs)
    assert without_seconds(run.history) == without_seconds(other.history)
    assert all(math.isfinite(row["train_bound"]) for row in run.history)
    _, begun = trained(program, automatic, objective, compile=False, num_samples=15, epochs=None)  # one step
    still = [name for name in ours if torch.equal(ours[name], begun[name])]
    assert still == []  # every parameter of the guide learns


@pytest.mark.slow
@pytest.mark.parametrize("automatic", AUTOMATIC)
def test_automatic_guides_learn(automatic):
    """To within a few nats of log p(X), by far more than they begin with."""
    settings = {"epochs": 300, "learning_rate": 0.02, "evaluate_every": 100 * NUM_DATA}
    run, _ = trained("globals", automatic, "sgvb", **settings)
    score = pv.log_marginal(run.program, regression_data_again(), of="dataset", num_particles=5000)
    assert score.mc_error < 0.2
    bound = run.history[-1]["dataset_bound"]
    assert score.mean - 3.0 < bound < score.mean + 3.0


def regression_data_again():
    """The data of :func:`trained`: its program draws first, from the same seed."""
    torch.manual_seed(5)
    PROGRAMS["globals"](AUTOMATIC["AutoNormal"])
    return regression_data(NUM_DATA)


@pytest.mark.slow
@pytest.mark.parametrize("automatic", ["AutoNormal", "AutoMultivariateNormal", "AutoIAFNormal"])
def test_a_compiled_step_goes_on_with_automatic_guides(monkeypatch, automatic):
    """The numbers of the eager steps but for rounding, where Inductor is told to draw torch's own noise."""
    monkeypatch.setattr(compiled, "CAPTURE_AFTER", 3)
    monkeypatch.setattr(compiled, "COMPILE_AFTER", 6)
    with inductor_config.patch({"fallback_random": True}):
        run, ours = trained("globals and locals", automatic, "sgvb", epochs=10)
    other, theirs = trained("globals and locals", automatic, "sgvb", epochs=10, compile=False)
    assert (run.path, other.path) == ("compiled", "eager")
    for name in theirs:
        close(ours[name], theirs[name], atol=1e-8)
