"""The variational recurrent network against a loop over its steps, written out."""

import itertools
import warnings

import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae import smc
from pyro_vae.distributions import WithMemory
from pyro_vae.models.variational_rnn import RecallingSequence
from pyro_vae.programs import LatentSpace, dream, sequence_laws
from tests.statistics import assert_mean_close

J, H, D, T, M = 2, 4, 3, 5, 4
LENGTHS = (5, 1, 3, 4)


def close(left, right, atol=1e-10):
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


def model_of(**changes):
    model = pv.VariationalRNN(**({"data_dim": D, "latent_dim": J, "hidden_dim": H, "feature_dim": 5} | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def data(masked=False):
    given = {"x": (torch.rand(M, T, D) < 0.5).double(), "lengths": torch.tensor(LENGTHS)}
    return given | ({"mask": torch.rand(M, T, D) < 0.7} if masked else {})


def by_hand(model, given, z, stale=False):
    """log p(x, z) and log q(z | x) of z (K, M, T, J), each (K, M), step by step; or with an h that lags."""
    log_p, log_q = [], []
    for k, m in itertools.product(range(z.shape[0]), range(z.shape[1])):
        h, p, q, before = model.memory.start, torch.zeros(()), torch.zeros(()), model.memory.start
        for t in range(int(given["lengths"][m])):
            x, seen = given["x"][m, t], given.get("mask", torch.ones(M, T, D, dtype=torch.bool))[m, t]
            phi_x = model.features(torch.where(seen, x, 0.0)).relu()
            phi_z = model.memory.features(z[k, m, t]).relu()
            h_seen = before if stale else h

            def normal(moments):
                loc, raw = moments.chunk(2, -1)
                return torch.distributions.Normal(loc, torch.nn.functional.softplus(raw) + 1e-4)

            p = p + normal(model.prior_step.moments(h_seen)).log_prob(z[k, m, t]).sum()
            q = q + normal(model.guide_step.moments(torch.cat([h_seen, phi_x]))).log_prob(z[k, m, t]).sum()
            logits = model.emission.emission.network(torch.cat([phi_z, h_seen]))
            p = p + torch.where(seen, torch.distributions.Bernoulli(logits=logits).log_prob(x), 0.0).sum()
            before, h = h, model.memory.cell(h, model.memory.into(torch.cat([phi_x, phi_z])))
        log_p.append(p)
        log_q.append(q)
    return tuple(torch.stack(terms).reshape(z.shape[:2]) for terms in (log_p, log_q))


# The law with a memory ------------------------------------------------------------------------------------------------


def test_what_is_remembered_is_not_random():
    base = dist.Normal(torch.zeros(J), torch.ones(J)).to_event(1)
    law = WithMemory(base, torch.arange(6.0).reshape(3, 2))
    assert (law.batch_shape, law.event_shape) == ((3,), (J + 2,))
    drawn = law.rsample((5,))
    close(drawn[..., J:], torch.arange(6.0).reshape(3, 2).expand(5, 3, 2))
    close(law.log_prob(drawn), base.log_prob(drawn[..., :J]))
    close(law.expand((7, 3)).log_prob(drawn[:, None]), law.log_prob(drawn)[:, None].expand(5, 7, 3))
    other = WithMemory(dist.Normal(torch.ones(J), 2.0).to_event(1), torch.zeros(2))
    close(torch.distributions.kl_divergence(law, other)[0], torch.distributions.kl_divergence(base, other.base_dist))
    close(law.mean[1], torch.tensor([0.0, 0.0, 2.0, 3.0]))
    with pytest.raises(NotImplementedError):
        torch.distributions.biject_to(law.support)
    assert law.support.check(drawn).all()


# Densities ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_weights_are_a_loop_over_steps_in_value_and_gradient(masked):
    model, given = model_of(), data(masked)
    names, parameters = zip(*model.named_parameters(), strict=True)
    weights = pv.log_weights(model.model, model.guide, (), given, num_particles=2)
    z = weights.latents["z"][..., :J].detach()
    log_p, log_q = by_hand(model, given, z)
    close(weights.log_w, log_p - log_q)
    stale, _ = by_hand(model, given, z, stale=True)
    assert (stale - log_p).abs().max() > 1e-3  # what a bug would be seen as
    # With draws that are held fixed, gradients are those of the densities as functions of z and of the parameters.
    fixed = pv.log_weights(
        model.model,
        model.guide,
        (),
        given,
        latents=weights.latents | {"z": weights.latents["z"].detach()},
        num_particles=2,
    )
    for ours, theirs in ((fixed.log_joint, log_p), (fixed.log_q, log_q)):
        found = torch.autograd.grad(ours.sum(), parameters, retain_graph=True, allow_unused=True)
        expected = torch.autograd.grad(theirs.sum(), parameters, retain_graph=True, allow_unused=True)
        for name, one, other in zip(names, found, expected, strict=True):
            assert (one is None) == (other is None), name
            if one is not None:
                torch.testing.assert_close(one, other, rtol=0, atol=1e-10, msg=name)


def test_gradients_through_draws_are_those_of_a_loop():
    model, given = model_of(), data()
    parameters = list(model.parameters())
    with torch.random.fork_rng():
        weights = pv.log_weights(model.model, model.guide, (), given, num_particles=2)
    found = torch.autograd.grad(weights.log_w.sum(), parameters)
    path = weights.latents["z"].detach()
    laws = model.encode(given["x"], given["lengths"]).expand((2, M)).laws(path)
    noise = torch.cat(
        [
            (
                (path[..., :1, :J] - laws[0].base_dist.base_dist.loc[..., None, :])
                / laws[0].base_dist.base_dist.scale[..., None, :]
            ),
            (path[..., 1:, :J] - laws[1].base_dist.base_dist.loc) / laws[1].base_dist.base_dist.scale,
        ],
        -2,
    ).detach()
    steps, h = [], model.memory.start
    for t in range(T):  # the same draws by hand
        phi_x = model.features(given["x"][:, t]).relu()
        law = model.guide_step.law(h, phi_x).base_dist.base_dist
        z = law.loc + law.scale * noise[..., t, :]
        steps.append(z)
        given_z = torch.cat([phi_x.expand(2, M, -1), model.memory.features(z).relu()], -1)
        h = model.memory.cell(h, model.memory.into(given_z))
    log_p, log_q = by_hand(model, given, torch.stack(steps, -2))
    close(log_p - log_q, weights.log_w)
    for ours, theirs in zip(found, torch.autograd.grad((log_p - log_q).sum(), parameters), strict=True):
        close(ours, theirs, atol=1e-9)


def test_a_density_does_not_read_the_memory_of_a_value():
    model, given = model_of(), data()
    guide = model.encode(**given)
    path = guide.sample()
    other = torch.cat([path[..., :J], torch.randn(M, T, H)], -1)
    close(guide.log_prob(other), guide.log_prob(path.clone()))
    close(guide.log_prob(path), guide.log_prob(path.clone()))
    prior = model.prior(T, given["lengths"], x=given["x"])
    valid = (torch.arange(T) < given["lengths"][:, None])[..., None]
    close(torch.where(valid, prior.recalled(other), 0.0), path)


def test_a_path_drawn_without_gradients_has_a_density_with_them():
    model, given = model_of(), data()
    parameters, found = list(model.parameters()), []
    guide = model.encode(**given)
    path = guide.sample()
    for value in (path, path.clone()):
        density = model.encode(**given).log_prob(value) if found else guide.log_prob(value)
        found.append(torch.autograd.grad(density.sum(), parameters, allow_unused=True))
    for ours, anew in zip(*found, strict=True):
        assert (ours is None) == (anew is None)
        if ours is not None:
            close(ours, anew)


def test_particles_can_be_moved_step_by_step():
    model, given = model_of(), data()
    guide, prior = model.encode(**given), model.prior(T, given["lengths"], x=given["x"])
    path = guide.sample()
    found = model.decode(path, given["lengths"])
    for t in range(1, T):
        valid = t < given["lengths"]
        for law in (guide, prior):
            step = law.step_law(path[:, t - 1], t)
            close(torch.where(valid, step.log_prob(path[:, t]), 0.0), law.step_log_prob(path)[:, t])
            close(torch.where(valid[:, None], step.memory, 0.0), path[:, t, J:])
        close(
            torch.where(valid, found.law(path[:, t]).log_prob(given["x"][:, t]), 0.0),
            found.step_log_prob(given["x"])[:, t],
        )


def test_padding_has_no_influence():
    model, given = model_of(), data()
    value = pv.log_weights(model.model, model.guide, (), given)
    padded = (torch.arange(T) >= given["lengths"][:, None])[..., None]
    other = given | {"x": torch.where(padded, 1.0 - given["x"], given["x"])}
    again = pv.log_weights(model.model, model.guide, (), other, latents=value.latents)
    close(again.log_w, value.log_w)
    assert (value.latents["z"][0][padded[..., 0]] == 0).all()


def test_the_analytic_divergence_has_the_mean_of_the_sampled_one():
    model, given = model_of(), data()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a Kullback-Leibler divergence that is not in closed form
        pv.SGVB(estimator="B").bound(model.model, model.guide, **given)
    with torch.no_grad():
        sampled = pv.log_weights(model.model, model.guide, (), given, num_particles=20_000)
        analytic = pv.log_weights(model.model, model.guide, (), given, num_particles=20_000, analytic_kl=True)
    assert_mean_close(sampled.kl["z"] - analytic.kl["z"], 0.0, min_effect=0.3)
    with pytest.raises(AssertionError, match="truth"):
        assert_mean_close(sampled.kl["z"] - 1.3 * analytic.kl["z"], 0.0, min_effect=0.3)


@pytest.mark.parametrize("emission", ["bernoulli", "gaussian", "student-t", "poisson"])
def test_samples_feed_themselves_back(emission):
    model = model_of(emission=emission)
    x = model.sample(6, 7)
    assert x.shape == model.sample(6, 7, mean=True).shape == (6, 7, D)
    assert model.decode(model.encode(x).sample()).log_prob(x).isfinite().all()


def test_samples_have_the_models_law():
    """The frequency of each of the four x of two steps is its mean importance weight."""
    model = pv.VariationalRNN(1, J, H)
    with torch.no_grad():
        model.emission.emission.network[-1].weight.mul_(20.0)
        model.memory.cell.hidden.weight.mul_(3.0)
    x, n = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2)))[..., None], 40_000
    with torch.no_grad():
        weights = pv.log_weights(model.model, model.guide, (x,), num_particles=n)
        probabilities = weights.log_w.exp()
        assert_mean_close(probabilities.sum(-1), 1.0, min_effect=0.1)
        drawn = model.sample(n, 2)
        frequency = (drawn[:, None] == x).all(-1).all(-1).double()
    assert_mean_close(frequency - probabilities, 0.0, min_effect=0.05)
    with pytest.raises(AssertionError, match="truth"):
        assert_mean_close(frequency.flip(-1) - probabilities, 0.0, min_effect=0.05)


# Objectives -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective", [pv.SGVB(2), pv.IWAE(2), pv.DReG(2), pv.VIMCO(2), pv.ReweightedWakeSleep(2)], ids=repr
)
def test_objectives_take_it(objective):
    model, given = model_of(), data(masked=True)
    objective.differentiable_loss(model.model, model.guide, **given).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_dreams_are_refused():
    model, given = model_of(), data()
    with pytest.raises(ValueError, match="the law of site 'z' depends on the data"):
        dream(model.model, (given["x"],))
    with pytest.raises(ValueError, match="site 'z'"):
        pv.WakeSleep().differentiable_loss(model.model, model.guide, **given)
    with pytest.raises(ValueError, match="site 'z'"):
        pv.ReweightedWakeSleep(2, insomnia=0.5).differentiable_loss(model.model, model.guide, **given)


def test_moving_latents_is_refused():
    model, given = model_of(), data()
    with pytest.raises(ValueError, match=r"no bijection .* the distribution of site 'z'"):
        LatentSpace(model.model, model.guide, (), given)
    with pytest.raises(ValueError, match="site 'z'"):
        pv.MCEM(persistent=False).differentiable_loss(model.model, None, **given)
    with pytest.raises(ValueError, match="site 'z'"):
        pv.log_marginal(model, given, method="ais", num_particles=2, num_steps=2)


def test_fit_improves_the_bound_by_compiled_steps_over_ragged_sequences():
    torch.manual_seed(3)
    phase, lengths = torch.rand(60, 1) * 6, torch.randint(4, 13, (60,))
    wave = (torch.arange(12) * 0.8 + phase).sin()[..., None] > torch.linspace(-0.5, 0.5, 4)
    x = wave.to(torch.get_default_dtype())
    model = pv.VariationalRNN(4, 2, 12)
    before = pv.SGVB().bound(model.model, model.guide, x, lengths).mean()
    independent = -0.69 * 4 * lengths.double().mean()
    pv.fit(
        model,
        {"x": x, "lengths": lengths},
        objective=pv.SGVB(estimator="B"),
        optimizer="adam",
        learning_rate=0.03,
        batch_size=20,
        epochs=40,
        progress=False,
    )
    after = pv.SGVB().bound(model.model, model.guide, x, lengths).mean()
    assert after > before + 3
    assert after > independent + 2  # of fair coins


def test_config_builds_the_same_architecture(tmp_path):
    model, given = model_of(emission="gaussian", feature_dim=None), data()
    pv.fit(model, given, epochs=1, run_dir=tmp_path, progress=False)
    stored = pv.load_run(tmp_path).program
    path = model.encode(**given).sample()
    close(stored.encode(**given).log_prob(path), model.encode(**given).log_prob(path))
    assert isinstance(stored.encode(**given), RecallingSequence)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"latent_dim": 0}, "latent_dim: expected a whole number"),
        ({"feature_dim": 1.5}, "feature_dim: expected a whole number"),
        ({"emission": "cauchy"}, "emission: expected one of"),
    ],
)
def test_bad_arguments_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        model_of(**changes)


def test_a_prior_needs_the_data():
    with pytest.raises(ValueError, match=r"x: expected observations \(\.\.\., 5, 3\), got None"):
        model_of().prior(T)
    with pytest.raises(ValueError, match="inputs: expected None"):
        model_of().sample(2, 3, inputs=torch.zeros(2, 3, 1))


def test_a_particle_filter_without_resampling_has_the_weights_of_paths():
    model, given = model_of(), data(masked=True)
    with torch.random.fork_rng(), torch.no_grad():
        found = pv.FIVO(1, threshold=0.0).bound(model.model, model.guide, **given)
    laws = sequence_laws(model.model, model.guide, (), given)
    with torch.no_grad():
        walk = smc.run(laws, 3, threshold=0.0)
        paths = walk.trajectories()
        weights = pv.log_weights(model.model, model.guide, (), given, num_particles=3, latents={"z": paths})
    close(walk.log_evidence, weights.log_w.logsumexp(0) - torch.tensor(3.0).log())
    assert found.isfinite().all()
    resampled = pv.FIVO(8, threshold=1.0).differentiable_loss(model.model, model.guide, **given)
    resampled.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
