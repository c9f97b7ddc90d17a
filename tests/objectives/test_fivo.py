"""The filtering objective: a bound on log p(x) of sequences, IWAE's where nothing is resampled."""

import json

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam

import pyro_vae as pv
from pyro_vae import smc
from pyro_vae.distributions import Emissions, MarkovSequence
from pyro_vae.numerics import log_mean_exp
from pyro_vae.objectives import OBJECTIVES
from pyro_vae.programs import log_weights, sequence_laws
from tests.sequences import LinearStateSpace, draws, example, vague
from tests.statistics import assert_mean_close

LENGTHS = torch.tensor([5, 1, 3, 4])


def data(num_data=4, num_steps=5):
    """Sequences, their lengths, and log p(x) of each."""
    x = draws(example(), num_data, num_steps)
    lengths = LENGTHS[:num_data]
    x = torch.where((torch.arange(num_steps) < lengths[:, None])[..., None], x, 0.0)
    return (x, lengths), example().log_marginal(x, lengths)


def both(objective, program, args, seed=3):
    """The loss and its gradients, by parameter."""
    torch.manual_seed(seed)
    loss = objective.differentiable_loss(program.model, program.guide, *args)
    named = dict(program.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return loss.detach(), {n: g for n, g in zip(named, found, strict=True) if g is not None}


# The value ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 2, 7])
def test_at_the_exact_smoother_without_resampling_it_is_the_likelihood(K):
    args, exact = data()
    program = LinearStateSpace(example())
    bound = pv.FIVO(K, threshold=0).bound(program.model, program.guide, *args)
    torch.testing.assert_close(bound, exact, rtol=0, atol=1e-10)
    other = LinearStateSpace(example(), "amortized")
    assert ((pv.FIVO(K, threshold=0).bound(other.model, other.guide, *args) - exact).abs() > 1e-3).all()


@pytest.mark.parametrize("resampling", smc.RESAMPLING)
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_it_is_the_filters_estimate(threshold, resampling):
    args, _ = data()
    program = LinearStateSpace(example(), "amortized")
    objective = pv.FIVO(6, threshold, resampling)
    torch.manual_seed(3)
    bound = objective.bound(program.model, program.guide, *args)
    loss, _ = both(objective, program, args)
    torch.manual_seed(3)
    laws = sequence_laws(program.model, program.guide, args)
    found = smc.run(laws, 6, threshold=threshold, resampling=resampling)
    assert found.resampled.any()
    assert torch.equal(bound, found.log_evidence)
    torch.testing.assert_close(loss, -bound.sum())


@pytest.mark.parametrize("guide", ["prior", "amortized"])
def test_it_is_a_lower_bound_that_rises_with_the_particles(guide):
    x = 1.5 * torch.sin(torch.arange(15.0)).reshape(1, 5, 3)
    exact, args = vague().log_marginal(x), (x.expand(3000, -1, -1),)
    program = LinearStateSpace(vague(), guide)
    with torch.no_grad():
        few, many = (pv.FIVO(k).bound(program.model, program.guide, *args) - exact for k in (2, 16))
    assert few.mean() + 3 * few.std() / 3000**0.5 < many.mean()
    assert_mean_close(many.exp(), 1.0, min_effect=0.2)
    assert many.mean() < 3 * many.std() / 3000**0.5


def test_where_sequences_are_long_it_is_tighter_than_iwae():
    law = example()
    x = draws(law, 1, 50).expand(100, -1, -1)
    program = LinearStateSpace(law, "prior")
    with torch.no_grad():
        fivo, iwae = (o.bound(program.model, program.guide, x).mean() for o in (pv.FIVO(16), pv.IWAE(16)))
    exact = law.log_marginal(x[:1])
    assert iwae + 10 < fivo < exact


def test_the_plates_scale():
    program, x = LinearStateSpace(example(), "prior"), draws(example(), 4, 3)

    def stated(function):
        def run(x):
            with pyro.plate("data", 40, subsample_size=len(x)):
                z = pyro.sample("z", program.prior(3))
                if function == "model":
                    pyro.sample("x", Emissions(program.emission, z), obs=x)

        return run

    torch.manual_seed(0)
    loss = pv.FIVO(3).differentiable_loss(stated("model"), stated("guide"), x)
    torch.manual_seed(0)
    bound = pv.FIVO(3).bound(stated("model"), stated("guide"), x)
    torch.testing.assert_close(loss, -10 * bound.sum())


# The gradient ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", ["prior", "amortized", "smoother"])
def test_without_resampling_the_gradients_are_iwaes(guide):
    """Of the same paths, which the bridge weighs."""
    args, _ = data()
    program = LinearStateSpace(example(), guide)
    loss, gradients = both(pv.FIVO(5, threshold=0), program, args)
    torch.manual_seed(3)
    paths = smc.run(sequence_laws(program.model, program.guide, args), 5, threshold=0).trajectories()
    weights = log_weights(program.model, program.guide, args, num_particles=5, latents={"z": paths})
    iwae = -log_mean_exp(weights.log_w).sum()
    torch.testing.assert_close(loss, iwae.detach())
    named = dict(program.named_parameters())
    theirs = torch.autograd.grad(iwae, [named[name] for name in gradients])
    assert len(gradients) >= (8 if guide == "amortized" else 5)
    for (name, ours), other in zip(gradients.items(), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-10, msg=name)


def along(program, args, found, noise):
    """log p^(x) of a filter whose ancestors and noise are given, by a loop of its own over steps and sequences."""
    (x, lengths), K, total = args, found.ancestors.shape[1], []
    first = program.prior(x.shape[1]).initial
    for m, n in enumerate(lengths.tolist()):
        z, log_w, estimate = None, torch.zeros(K), torch.zeros(())
        for t in range(n):
            if t == 0:
                q, p = program.amortized(torch.zeros(2), x[m, 0]).expand((K,)), first
            else:
                if found.resampled[t, m]:
                    estimate = estimate + log_mean_exp(log_w)
                    z, log_w = z[found.ancestors[t, :, m]], torch.zeros(K)
                q, p = program.amortized(z, x[m, t]), program.transition(z)
            z = q.base_dist.loc + q.base_dist.scale * noise[t, :, m]
            log_w = log_w + p.log_prob(z) + program.emission(z).log_prob(x[m, t]) - q.log_prob(z)
        total.append(estimate + log_mean_exp(log_w))
    return torch.stack(total)


@pytest.mark.parametrize(("threshold", "resampling"), [(0.5, "systematic"), (0.9, "multinomial"), (1.0, "systematic")])
def test_the_gradient_is_that_of_the_estimate_with_its_ancestors_held_fixed(threshold, resampling):
    args, _ = data()
    program = LinearStateSpace(example(), "amortized")
    loss, gradients = both(pv.FIVO(6, threshold, resampling), program, args)
    torch.manual_seed(3)
    laws = sequence_laws(program.model, program.guide, args)
    found = smc.run(laws, 6, threshold=threshold, resampling=resampling)
    assert found.resampled.any()
    noise = []
    for t in range(5):
        before = None if t == 0 else smc._taken(found.particles[t - 1], found.ancestors[t])
        law = laws.proposal.initial if t == 0 else laws.proposal.step_law(before, t)
        noise.append(((found.particles[t] - law.base_dist.loc) / law.base_dist.scale).detach())
    ours = -along(program, args, found, torch.stack(noise)).sum()
    torch.testing.assert_close(ours.detach(), loss)
    named = dict(program.named_parameters())
    theirs = torch.autograd.grad(ours, [named[name] for name in gradients])
    assert len(gradients) == 8
    for (name, gradient), other in zip(gradients.items(), theirs, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-9, msg=name)


def test_a_sequences_bound_is_its_own():
    (x, lengths), _ = data()
    program = LinearStateSpace(example(), "amortized")
    leaf = x.clone().requires_grad_()
    bound = pv.FIVO(6, threshold=0.9).bound(program.model, program.guide, leaf, lengths)
    (gradient,) = torch.autograd.grad(bound[2], leaf)
    assert gradient[2, :3].abs().min() > 0
    assert not gradient[2, 3:].any()
    assert not gradient[[0, 1, 3]].any()


def test_padding_reaches_no_gradient():
    (x, lengths), _ = data()
    padding = (torch.arange(5) >= lengths[:, None])[..., None]
    program = LinearStateSpace(example(), "amortized")
    loss, gradients = both(pv.FIVO(6), program, (x, lengths))
    filled_loss, filled = both(pv.FIVO(6), program, (torch.where(padding, 1e3, x), lengths))
    assert torch.equal(loss, filled_loss)
    assert gradients.keys() == filled.keys()
    assert all(torch.equal(gradients[name], filled[name]) for name in gradients)


# In use ---------------------------------------------------------------------------------------------------------------


def test_in_pyros_own_loop():
    args, _ = data()
    program = LinearStateSpace(example(), "amortized")
    svi = SVI(program.model, program.guide, Adam({"lr": 0.05}), loss=pv.FIVO(4))
    before = {name: value.clone() for name, value in program.state_dict().items()}
    first = svi.evaluate_loss(*args)
    losses = [svi.step(*args) for _ in range(60)]
    assert sum(losses[-10:]) / 10 < first
    moved = [name for name, value in program.state_dict().items() if not torch.equal(value, before[name])]
    assert {"transition.weight", "emission.weight", "amortized.slope", "amortized.log_scale"} <= set(moved)


@pytest.mark.parametrize("compile", [False, True])
def test_in_fit(compile):
    x = draws(example(), 60, 6)
    lengths = torch.arange(60) % 6 + 1
    torch.manual_seed(0)
    program = LinearStateSpace(example(), "amortized")
    options = {"optimizer": "adam", "learning_rate": 0.02, "batch_size": 20, "epochs": 8, "progress": False}
    run = pv.fit(program, (x, lengths), objective=pv.FIVO(4), compile=compile, **options)
    bounds = [row["train_bound"] for row in run.history]
    assert bounds[-1] > bounds[0]
    assert run.path == ("captured" if compile else "eager")
    estimate = pv.evaluate_bound(program, (x, lengths), pv.FIVO(4))
    assert estimate.per_step is not None


def test_long_sequences_are_not_recorded():
    """Their unrolled steps would be, for minutes."""
    x = draws(example(), 8, 41)
    torch.manual_seed(0)
    options = {"optimizer": "adam", "learning_rate": 0.01, "batch_size": 4, "epochs": 7, "progress": False}
    with pytest.warns(UserWarning, match="eagerly: the step cannot be recorded: .* a filter of 41 steps") as caught:
        run = pv.fit(LinearStateSpace(example(), "prior"), x, objective=pv.FIVO(2), **options)
    assert len(caught) == 1
    assert run.path == "eager"


def test_single_precision():
    torch.set_default_dtype(torch.float32)
    (x, lengths), exact = data()
    program = LinearStateSpace(example())
    bound = pv.FIVO(4, threshold=0).bound(program.model, program.guide, x, lengths)
    assert bound.dtype == torch.float32
    torch.testing.assert_close(bound, exact, rtol=1e-4, atol=1e-3)


def test_deep_markov_models():
    dmm = pv.DeepMarkovModel(3, 2, 4, 4, 5, guide="st-l")
    x = (torch.rand(30, 6, 3) < 0.4).to(torch.get_default_dtype())
    run = pv.fit(dmm, x, objective=pv.FIVO(3), epochs=2, batch_size=10, learning_rate=0.01, progress=False)
    assert run.samples == 60


# Refusals and configuration -------------------------------------------------------------------------------------------


def test_programs_without_sequences_are_refused_by_name():
    said = r"a particle filter expects sequences: .* got latent sites 'z' \(Normal\).*SGVB and IWAE"
    vae, x = pv.VAE((3,), 2, (4,)), torch.zeros(6, 3)
    with pytest.raises(ValueError, match=said):
        pv.FIVO(4).bound(vae.model, vae.guide, x)
    with pytest.raises(ValueError, match=said):
        pv.fit(vae, x, objective=pv.FIVO(4), epochs=1, progress=False)


def test_draws_without_a_gradient_are_refused():
    def chain(x):
        law = lambda z: dist.Bernoulli(0.3 + 0.4 * z).to_event(1)  # noqa: E731
        return MarkovSequence(dist.Bernoulli(torch.tensor([0.3])).to_event(1), law, x.shape[1])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", chain(x))
            pyro.sample("x", Emissions(lambda z: dist.Normal(z, 1.0).to_event(1), z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", chain(x))

    x = torch.randn(5, 4, 1)
    with pytest.raises(ValueError, match="without reparameterised samples"):
        pv.FIVO(4).differentiable_loss(model, guide, x)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_particles": 0}, "num_particles: expected a whole number of at least 1, got 0"),
        ({"threshold": 1.1}, "threshold: expected a share from 0 to 1, got 1.1"),
        ({"threshold": "half"}, "threshold: expected a share from 0 to 1, got 'half'"),
        ({"resampling": "systematical"}, "did you mean 'systematic'"),
    ],
)
def test_bad_arguments_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        pv.FIVO(**options)


def test_configuration():
    assert OBJECTIVES["fivo"] is pv.FIVO
    objective = pv.FIVO(3, 0.7, "multinomial")
    assert repr(objective) == "FIVO(num_particles=3, threshold=0.7, resampling='multinomial')"
    assert pv.FIVO(**json.loads(json.dumps(objective.config))).config == objective.config
    assert objective.has_bound
