"""Monte Carlo EM: the gradient of log p(x) at posterior draws, chains that persist, a step size that is tuned."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae import hmc
from pyro_vae.objectives import mcem
from pyro_vae.objectives.mcem import MCEM
from pyro_vae.programs import as_program
from tests import oracles
from tests.oracles import ScalarGaussian, gradients_per_datum
from tests.statistics import assert_mean_close

M = 20_000
STILL = {"optimizer": "sgd", "learning_rate": 1e-12, "progress": False}


def close(left, right, atol=1e-10):
    torch.testing.assert_close(torch.as_tensor(left), torch.as_tensor(right), rtol=0, atol=atol)


def rejected(samples, truth, min_effect):
    with pytest.raises(AssertionError, match="mean"):
        assert_mean_close(samples, truth, min_effect=min_effect)


# The gradient ---------------------------------------------------------------------------------------------------------


def scalar_posterior():
    """Mean and standard deviation of p(z | x) of the scalar Gaussian, and the gradient of log p(x), (3,)."""
    a, b, log_s = (torch.tensor(value).requires_grad_() for value in ScalarGaussian.theta_values)
    variance = a**2 + (2 * log_s).exp()
    log_marginal = -0.5 * ((ScalarGaussian.x - b) ** 2 / variance + variance.log() + math.log(2 * math.pi))
    close(log_marginal.detach(), ScalarGaussian.log_marginal())
    gradient = torch.stack(torch.autograd.grad(log_marginal, (a, b, log_s)))
    gain = (a / variance).item()
    return gain * (ScalarGaussian.x - b.item()), math.sqrt(1 - gain * a.item()), gradient


def exact(space, position):
    mean, sd, _ = scalar_posterior()
    return mean + sd * torch.randn_like(position)


def too_wide(space, position):
    mean, sd, _ = scalar_posterior()
    return mean + 1.5 * sd * torch.randn_like(position)


def prior(space, position):
    return position


@pytest.mark.parametrize("num_particles", [1, 3])
def test_with_exact_draws_it_is_the_gradient_of_the_log_evidence(num_particles, monkeypatch):
    toy, truth = ScalarGaussian(M), scalar_posterior()[2]
    objective = MCEM(num_particles=num_particles)
    monkeypatch.setattr(objective, "_transitions", exact)
    samples = gradients_per_datum(objective, toy)
    assert_mean_close(samples[:, :3], truth, min_effect=0.1)
    assert (samples[:, 3:] == 0).all()  # the guide learns nothing
    assert (truth.abs() > 0.1).any()


@pytest.mark.parametrize("draws", [prior, too_wide])
def test_draws_of_another_law_are_rejected(draws, monkeypatch):
    objective = MCEM()
    monkeypatch.setattr(objective, "_transitions", draws)
    rejected(gradients_per_datum(objective, ScalarGaussian(M))[:, :3], scalar_posterior()[2], 0.2)


def test_its_own_transitions_come_to_the_posterior():
    objective, truth = MCEM(num_transitions=30), scalar_posterior()[2]
    assert_mean_close(gradients_per_datum(objective, ScalarGaussian(M))[:, :3], truth, min_effect=0.1)
    hasty = MCEM(num_leapfrog=1, num_transitions=1)
    rejected(gradients_per_datum(hasty, ScalarGaussian(M))[:, :3], truth, 0.2)


def test_the_linear_gaussians_gradient_is_that_of_its_log_marginal(monkeypatch):
    model, x = pv.LinearGaussian(*oracles.example()), oracles.example_data(3)
    truth = torch.autograd.grad(model.log_marginal(x).sum(), list(model.parameters()))
    objective = MCEM(num_particles=20)
    found = {}
    laws = {"posterior": lambda space, u: model.posterior(x).sample((20,)), "prior": lambda space, u: u}
    for law, transitions in laws.items():
        monkeypatch.setattr(objective, "_transitions", transitions)
        rows = []
        for _ in range(150):
            loss = objective.differentiable_loss(model.model, model.guide, x)
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(-loss, list(model.parameters()))]))
        found[law] = torch.stack(rows)
    truth = torch.cat([g.flatten() for g in truth])
    assert_mean_close(found["posterior"], truth, min_effect=4.0)
    rejected(found["prior"], truth, 50.0)


def test_the_loss_is_minus_the_complete_data_log_likelihood_without_the_maps_jacobian(monkeypatch):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x, u = torch.tensor([0.5, 2.0]), torch.randn(3, 2, 1)
    objective = MCEM(num_particles=3)
    monkeypatch.setattr(objective, "_transitions", lambda space, position: u)
    z = u[..., 0].exp()
    truth = dist.LogNormal(0.0, 1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(x)
    close(objective.loss(model, None, x), -truth.mean(0).sum())


def test_minibatches_of_a_plate_that_states_its_size_are_scaled(monkeypatch):
    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + pyro.param("b", torch.ones(())), 1.0), obs=x)

    objective, x = MCEM(), torch.randn(10)
    monkeypatch.setattr(objective, "_transitions", lambda space, position: torch.ones(1, 10, 1))
    close(objective.loss(model, None, x, size=40), 4 * objective.loss(model, None, x))


def test_a_plate_that_states_its_size_gives_the_same_step_in_fit():
    def program(size):
        def model(x):
            with pyro.plate("data", size or len(x), subsample_size=len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
                pyro.sample("x", dist.Normal(z + pyro.param("b", torch.ones(())), 1.0), obs=x)

        return pv.Program(model)

    x, found = torch.randn(2000) + 3, []
    for size in (None, 2000):
        p = program(size)
        objective = MCEM(num_transitions=5, num_updates=1)
        pv.fit(p, x, objective=objective, optimizer="sgd", learning_rate=0.1, batch_size=1000, num_samples=1000)
        found.append(p.param("b").item() - 1)
    assert found[0] == pytest.approx(0.1, abs=0.02)  # E[x - z - b] = (x - b) / 2 = 1, times the rate
    assert found[1] == pytest.approx(found[0], abs=0.02)


# Updates --------------------------------------------------------------------------------------------------------------


class Counting(torch.optim.SGD):
    steps = 0

    def step(self, *args, **kwargs):
        type(self).steps += 1
        return super().step(*args, **kwargs)


@pytest.mark.parametrize("num_updates", [1, 5])
def test_a_minibatchs_draws_serve_several_updates(num_updates, monkeypatch):
    seen, moves = [], []

    def loss(self, model, guide, *args, original=MCEM.differentiable_loss, **kwargs):
        assert self._held is not None
        seen.append((self._held[1].clone(), lg.bias.detach().clone()))
        return original(self, model, guide, *args, **kwargs)

    def transitions(self, space, position, original=MCEM._transitions):
        moves.append(1)
        return original(self, space, position)

    monkeypatch.setattr(MCEM, "differentiable_loss", loss)
    monkeypatch.setattr(MCEM, "_transitions", transitions)
    monkeypatch.setattr(Counting, "steps", 0)
    lg, objective = pv.LinearGaussian(*oracles.example()), MCEM(num_updates=num_updates)
    pv.fit(lg, oracles.example_data(30), objective=objective, optimizer=Counting, learning_rate=0.01, batch_size=10, epochs=2)  # fmt: skip # noqa: E501
    assert Counting.steps == len(seen) == 6 * num_updates
    assert len(moves) == 6
    for first in range(0, len(seen), num_updates):
        draws, thetas = zip(*seen[first : first + num_updates], strict=True)
        assert all(torch.equal(draw, draws[0]) for draw in draws)
        assert len({tuple(theta.tolist()) for theta in thetas}) == num_updates
    assert len({tuple(draw.flatten().tolist()) for draw, _ in seen}) == 6
    assert objective._held is None


def test_the_reported_joint_is_that_of_the_draws(monkeypatch):
    """Nats per datum, averaged over the samples since the row before, short batches counted as what they are."""
    losses = []

    def loss(self, model, guide, *args, original=MCEM.differentiable_loss, **kwargs):
        value = original(self, model, guide, *args, **kwargs)
        losses.append(-value.item())
        return value

    monkeypatch.setattr(MCEM, "differentiable_loss", loss)
    lg, x = pv.LinearGaussian(*oracles.example()), oracles.example_data(25)
    run = pv.fit(lg, x, objective=MCEM(num_updates=2), learning_rate=0.01, batch_size=10, epochs=2, test=x)
    for row, part in zip(run.history, (losses[:6], losses[6:]), strict=True):
        assert row["train_log_joint"] == pytest.approx(sum(part[1::2]) / 25)
        assert all(row[name] is None for name in ("train_bound", "test_bound", "train_bound_se", "test_bound_se"))
    assert repr(run) == "Run(50 samples)"


def test_a_failure_leaves_nothing_held():
    """An error between two updates, kept alive by who caught it, does not lend its draws to what comes next."""
    objective, x = MCEM(), oracles.example_data(8)
    model = pv.LinearGaussian(*oracles.example())

    def failing(values):
        raise RuntimeError("no step")

    class Failing(torch.optim.SGD):
        step = failing

    with pytest.raises(RuntimeError, match="no step"):
        pv.fit(model, x, objective=objective, optimizer=Failing, learning_rate=0.1, epochs=1)
    pv.fit(model, x[:5], objective=objective, learning_rate=0.1, epochs=1)
    assert math.isfinite(objective.loss(model.model, model.guide, x[:3]))


# The step size --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0.2, 2.0])
@pytest.mark.parametrize("target", [0.6, 0.9])
def test_the_step_size_is_tuned_to_the_wanted_acceptance(target, first, monkeypatch):
    """In the mean over visits: near the limit of stability the acceptance falls from one to nothing within a few %."""
    rates = []

    def step(*args, original=hmc.step, **kwargs):
        state, info = original(*args, **kwargs)
        rates.append(info.acceptance.mean().item())
        return state, info

    monkeypatch.setattr(hmc, "step", step)
    monkeypatch.setattr(mcem, "_FIRST_STEP_SIZE", first)
    model, x = pv.LinearGaussian(*oracles.example()), oracles.example_data(100)
    objective = MCEM(num_leapfrog=3, target_accept=target, num_updates=1, num_transitions=8)
    pv.fit(model, x, objective=objective, batch_size=100, epochs=40, **STILL)
    assert len(rates) == 320
    assert sum(rates[-100:]) / 100 == pytest.approx(target, abs=0.04)
    assert abs(sum(rates[:10]) / 10 - target) > 0.07


# Chains ---------------------------------------------------------------------------------------------------------------


def numbered(num_data):
    """A program whose datum's first number is its row."""

    def model(x):
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1) + loc, 1.0), obs=x[:, 1])

    return pv.Program(model), torch.stack([torch.arange(float(num_data)), torch.randn(num_data)], 1)


def record(monkeypatch):
    """Rows, starts and ends of every visit."""
    visits = []

    def transitions(self, space, position, original=MCEM._transitions):
        end = original(self, space, position)
        visits.append((space._args[0][:, 0].long(), position.clone(), end.clone()))
        return end

    monkeypatch.setattr(MCEM, "_transitions", transitions)
    return visits


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("persistent", [None, True])
def test_chains_go_on_from_where_their_datum_left_them(num_particles, persistent, monkeypatch):
    visits, (program, x) = record(monkeypatch), numbered(23)
    objective = MCEM(num_particles=num_particles, persistent=persistent)
    pv.fit(program, x, objective=objective, batch_size=5, epochs=3, progress=False)
    assert len(visits) == 15
    left = {}
    for number, (rows, starts, ends) in enumerate(visits):
        assert starts.shape == (num_particles, len(rows), 2)
        for m, row in enumerate(rows.tolist()):
            assert (number >= 5) == (row in left)
            if row in left:
                assert torch.equal(starts[:, m], left[row])
            left[row] = ends[:, m]
    assert objective.state_dict()["chains"].shape == (num_particles, 23, 2)
    assert visits[0][0].tolist() != visits[5][0].tolist()  # shuffled, so that rows are not places in a batch


def test_without_persistence_each_visit_begins_at_the_prior(monkeypatch):
    visits, (program, x) = record(monkeypatch), numbered(500)
    x[:, 1] = 6.0  # the posterior is far from the prior
    objective = MCEM(persistent=False, num_updates=1)
    pv.fit(program, x, objective=objective, batch_size=100, epochs=3, **STILL)
    assert_mean_close(torch.cat([starts[0] for _, starts, _ in visits]), torch.zeros(2), min_effect=0.2)
    assert "chains" not in objective.state_dict()
    kept = MCEM(num_updates=1)
    visits.clear()
    pv.fit(program, x, objective=kept, batch_size=100, epochs=3, **STILL)
    rejected(torch.cat([starts[0] for _, starts, _ in visits]), torch.zeros(2), 0.2)


def visit(objective, program, x, rows):
    index = torch.tensor(rows)
    for _ in objective.updates(program.model, (x[index],), {}, index):
        pass


def test_rows_that_were_never_seen_begin_at_the_prior_and_the_table_grows(monkeypatch):
    visits, (program, x) = record(monkeypatch), numbered(10)
    objective = MCEM(num_particles=2)
    program.model(x)
    visit(objective, program, x, [1, 0])
    assert objective.state_dict()["chains"].shape == (2, 2, 2)
    visit(objective, program, x, [5, 1, 2])
    chains = objective.state_dict()["chains"]
    assert chains.shape == (2, 6, 2)
    assert chains.isnan().flatten(2).all(2).all(0).tolist() == [False, False, False, True, True, False]
    (_, _, first), (_, starts, ends) = visits
    assert torch.equal(starts[:, 1], first[:, 0])
    assert not torch.equal(starts[:, 0], first[:, 0])
    assert starts.isfinite().all()
    assert torch.equal(chains[:, [5, 1, 2]], ends)
    assert torch.equal(chains[:, 0], first[:, 1])


def test_a_checkpoints_chains_take_the_programs_type(monkeypatch):
    visits, (program, x) = record(monkeypatch), numbered(4)
    objective, chains = MCEM(), torch.randn(1, 4, 2)
    program.model(x)
    objective.load_state_dict({"step_size": torch.tensor(0.3, dtype=torch.float32), "chains": chains.float()})
    visit(objective, program, x, [2, 3])
    (_, starts, _) = visits[0]
    assert torch.equal(starts, chains[:, [2, 3]].float().double())
    assert {t.dtype for t in objective.state_dict().values()} == {torch.float64}


def test_a_second_run_does_not_begin_at_the_firsts_chains():
    """The same seed gives the same run, whatever the objective did before; another number of latents is no trouble."""
    objective, x = MCEM(), oracles.example_data(30)

    def trained(used):
        model = pv.LinearGaussian(*oracles.example())
        pv.fit(model, x, objective=used, batch_size=10, epochs=2, progress=False)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first, second = trained(objective), trained(objective)
    assert torch.equal(first, second)
    pv.fit(pv.LinearGaussian(torch.ones(3, 1)), x, objective=objective, batch_size=10, epochs=1, progress=False)
    assert objective.state_dict()["chains"].shape == (1, 30, 1)


def loader(x):
    return DataLoader(TensorDataset(x), batch_size=5)


def test_an_iterable_of_batches_has_no_rows_to_keep_chains_by(monkeypatch):
    visits, (program, x) = record(monkeypatch), numbered(10)
    with pytest.raises(ValueError, match=r"persistent: .* got an iterable of batches"):
        pv.fit(program, loader(x), objective=MCEM(persistent=True), epochs=1)
    objective = MCEM()
    run = pv.fit(program, loader(x), objective=objective, epochs=2)
    assert len(visits) == 4
    assert run.samples == 20
    assert "chains" not in objective.state_dict()
    assert [math.isfinite(row["train_log_joint"]) for row in run.history] == [True, True]


# Where it works -------------------------------------------------------------------------------------------------------


def test_the_guide_is_left_alone():
    torch.manual_seed(0)
    vae = pv.VAE((6,), 2, (5,))
    before = {name: t.detach().clone() for name, t in vae.named_parameters()}
    pv.fit(vae, torch.bernoulli(torch.full((20, 6), 0.5)), objective=MCEM(), epochs=2, prior_scale=1.0)
    for name, tensor in vae.named_parameters():
        assert torch.equal(tensor, before[name]) == name.startswith("encoder"), name


def test_it_works_in_pyros_svi():
    x = torch.randn(200) * 2**0.5 + 3.0

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    svi = pyro.infer.SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.2}), MCEM(5, num_transitions=3))
    for _ in range(60):
        loss = svi.step(x)
    assert math.isfinite(loss)
    assert pyro.param("loc").item() == pytest.approx(x.mean().item(), abs=0.2)
    with pytest.raises(ValueError, match=r"persistent: .* or no fit"):
        MCEM(persistent=True).loss(model, None, x)


@pytest.mark.parametrize("form", ["dict", "tuple"])
def test_without_a_guide_with_covariates(form):
    def model(x, shift):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 0.5))
            pyro.sample("x", dist.Normal(z + shift, 0.5), obs=x)

    shift = 50 * torch.rand(300)
    x = shift + 2.0 + 0.5**0.5 * torch.randn(300)
    program = pv.Program(model)
    data = {"shift": shift, "x": x} if form == "dict" else (x, shift)
    pv.fit(program, data, objective=MCEM(), optimizer="adam", learning_rate=0.05, epochs=25, batch_size=100)
    assert program.param("loc").item() == pytest.approx(2.0, abs=0.25)


def test_a_program_that_loops_over_particles():
    model, _ = oracles.without_broadcasting()

    def shifted(x):
        model(x - pyro.param("shift", torch.ones(3)))

    program = pv.Program(shifted, vectorize=False)
    run = pv.fit(program, oracles.example_data(10), objective=MCEM(num_particles=2), epochs=1)
    assert math.isfinite(run.history[-1]["train_log_joint"])


def test_it_finds_the_maximum_of_the_likelihood_of_probabilistic_pca():
    """Tipping & Bishop 1999, eqs. (7) and (8): the noise is the mean of the eigenvalues left over."""
    N, D, J = 200, 5, 1
    truth = pv.LinearGaussian(torch.tensor([[1.0], [2.0], [-1.0], [0.5], [0.0]]), torch.randn(D), noise_scale=0.7)
    with torch.no_grad():
        x = truth.decode(torch.randn(N, J)).sample()
    values = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    noise = values[J:].mean()
    best = -0.5 * (D * math.log(2 * math.pi) + values[:J].log().sum() + (D - J) * noise.log() + D)
    model = pv.LinearGaussian(torch.ones(D, J))
    start = model.log_marginal(x).mean().item()
    settings = {"optimizer": "adam", "batch_size": N, "progress": False}
    pv.fit(model, x, objective=MCEM(5, num_updates=8), learning_rate=0.05, epochs=60, **settings)
    pv.fit(model, x, objective=MCEM(5, num_particles=5), learning_rate=0.01, epochs=40, **settings)
    found = model.log_marginal(x).mean().item()
    assert start < best.item() - 1
    assert best.item() - 0.05 < found <= best.item() + 1e-9


# Arguments ------------------------------------------------------------------------------------------------------------


def test_its_configuration_builds_it_again():
    config = {
        "num_leapfrog": 3, "target_accept": 0.7, "num_updates": 2, "num_particles": 4, "num_transitions": 6,
        "persistent": False,
    }  # fmt: skip
    objective = MCEM(**config)
    assert objective.config == config
    assert repr(objective).startswith("MCEM(num_leapfrog=3, target_accept=0.7")
    assert MCEM(**MCEM().config).config == MCEM().config


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_leapfrog": 0}, "num_leapfrog: expected a whole number"),
        ({"num_updates": 1.5}, "num_updates: expected a whole number"),
        ({"num_transitions": 0}, "num_transitions: expected a whole number"),
        ({"num_particles": -1}, "num_particles: expected a whole number"),
        ({"target_accept": 1.0}, "target_accept: expected a number between 0 and 1, got 1.0"),
        ({"target_accept": math.nan}, "target_accept: expected a number between 0 and 1, got nan"),
        ({"persistent": "yes"}, "persistent: expected True, False or None, got 'yes'"),
    ],
)
def test_bad_arguments(options, said):
    with pytest.raises(ValueError, match=said):
        MCEM(**options)


def test_there_is_no_bound():
    model, x = pv.LinearGaussian(*oracles.example()), oracles.example_data()
    assert not MCEM.has_bound
    with pytest.raises(ValueError, match="MCEM has no bound"):
        MCEM().bound(model.model, model.guide, x)
    with pytest.raises(ValueError, match="MCEM has no bound"):
        pv.evaluate_bound(model, x, MCEM())


def test_discrete_latents_are_refused_by_name():
    network = pv.SigmoidBeliefNetwork((4,), (2,))
    with pytest.raises(ValueError, match="site 'z_1' is drawn from Bernoulli"):
        pv.fit(network, torch.ones(5, 4), objective=MCEM(), epochs=1)


def test_global_latents_are_refused_by_name():
    toy = oracles.SharedMean(4)
    program = as_program(pv.Program(toy.model, toy.guide))
    with pytest.raises(ValueError, match="site 'mu' is outside the data plate"):
        MCEM().loss(program.model, program.guide, torch.randn(4))


def test_the_gradient_where_the_support_moves_with_theta():
    """z ~ U(0, e^a), x ~ N(z, 0.7): grad_a log p(x) by quadrature; with z itself held fixed it would be -0.9."""
    log_width, x = nn.Parameter(torch.tensor(0.3)), torch.tensor([1.2])

    class Uniform(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_width = log_width

        def forward(self, x):
            pyro.module("uniform", self)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Uniform(0.0, self.log_width.exp()))
                pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    grid = (torch.arange(20_000) + 0.5) / 20_000

    def log_evidence(a):
        return (dist.Normal(grid * a.exp(), 0.7).log_prob(x).logsumexp(0)) - math.log(len(grid))

    (exact,) = torch.autograd.grad(log_evidence(log_width), log_width)
    objective = MCEM(num_particles=4000, num_transitions=40, persistent=False)
    objective.differentiable_loss(Uniform(), None, x).backward()
    assert -log_width.grad.item() == pytest.approx(exact.item(), abs=0.05)


def test_the_target_stays_one_while_chains_move():
    """Dropout would make each leapfrog step follow another density; and modules are as they were afterwards."""
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 3))
    program = pv.Program(through(decoder))
    objective = MCEM(num_transitions=150)
    x = torch.randn(50, 3)
    before = int(decoder[2].num_batches_tracked)
    for _ in objective.updates(program.model, (x,), {}, None):
        break
    assert objective.step_size > 0.1
    assert int(decoder[2].num_batches_tracked) == before
    assert decoder.training


def through(decoder):
    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            mean = decoder(z.reshape(-1, 2)).reshape(*z.shape[:-1], 3)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    return model
