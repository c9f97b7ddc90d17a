"""Semi-amortised inference against closed forms of a linear-Gaussian VAE, quadrature and finite differences."""

import itertools
import json
import math

import pyro
import pytest
import torch
from scipy import stats
from torch import nn

import pyro_vae as pv
from pyro_vae.models import semi_amortized
from pyro_vae.models.posteriors import POSTERIORS
from pyro_vae.models.priors import PRIORS
from pyro_vae.objectives import OBJECTIVES
from tests import oracles
from tests.statistics import assert_mean_close
from tests.training import test_compiled
from tests.training.test_resume import assert_same

D, J, M = 5, 2, 4
OF_IMPLICIT_DRAWS = ("student-t", "gamma", "beta", "dirichlet")


def close(left, right, atol=1e-12):
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


def linear_vae(posterior="full", latent_dim=J):
    """Both networks are one linear map each."""
    vae = pv.VAE((D,), latent_dim, (), likelihood="gaussian-shared", posterior=posterior)
    with torch.no_grad():
        vae.likelihood.log_scale.fill_(-0.5)
        vae.decoder[0].weight.normal_(0, 0.8)
    return vae


def joint_of(vae):
    weight, bias = vae.decoder[0].weight.detach(), vae.decoder[0].bias.detach()
    return oracles.linear_gaussian(weight, bias, vae.likelihood.scale.detach())


def bounds_of(vae, law, x):
    """The evidence lower bound of each datum, (M,), of Gaussians q by mean and covariance, in closed form."""
    cov = law.covariance_matrix if hasattr(law, "covariance_matrix") else law.variance.diag_embed()
    each = [oracles.Gaussian(mean, root) for mean, root in zip(law.mean, cov, strict=True)]
    return torch.stack([oracles.elbo(joint_of(vae), q, row) for q, row in zip(each, x, strict=True)])


def small(**parts):
    return pv.VAE(**{"data_shape": (6,), "latent_dim": 2, "hidden_dims": (5,)} | parts)


def binary(*shape):
    return torch.rand(shape).round()


def sgvb(program, x, num_particles=1, estimator="A"):
    return pv.SGVB(num_particles, estimator).bound(program.model, program.guide, x)


# The bound ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_rise(posterior):
    """The best law of the family: of a full Gaussian the posterior, of a diagonal one that with its precisions."""
    torch.manual_seed(2)
    vae, x = linear_vae(posterior), torch.randn(M, D)
    vae.decoder[0].weight[:, 1] += vae.decoder[0].weight[:, 0]  # latents that depend on each other, given x
    joint = joint_of(vae)
    posterior_law = joint.given_last(x)
    cov = posterior_law.cov
    if posterior == "diagonal":
        cov = (1 / cov.inverse().diagonal()).diag_embed()
    pairs = zip(posterior_law.mean, x, strict=True)
    best = torch.stack([oracles.elbo(joint, oracles.Gaussian(mean, cov), row) for mean, row in pairs])
    counts = (1, 3, 10, 30, 300)
    refined = [pv.SemiAmortized(vae, n, step_size=0.05, num_particles=64) for n in counts]
    found = torch.stack([bounds_of(vae, law, x) for law in (vae.encode(x), *(r.encode(x) for r in refined))])
    assert (found.diff(dim=0)[:-1] > 0).all()
    assert (best - found[0] > 0.2).all()  # the encoder knows nothing
    close(found[-1], best, 1e-3)
    return joint, x, found[-1]


def test_the_bound_of_a_full_gaussian_rises_to_the_evidence():
    joint, x, found = check_rise("full")
    close(found, joint.last(D).log_prob(x), 1e-3)


def test_the_bound_of_a_diagonal_gaussian_rises_to_its_best():
    joint, x, found = check_rise("diagonal")
    assert (joint.last(D).log_prob(x) - found > 0.01).all()


def descending(self, slope):
    return -slope / slope.norm(dim=-1, keepdim=True).clamp_min(1.0)


def without_the_prior(self, raw, x, prior, uniform):
    z, log_q = semi_amortized._drawn(self.vae.posterior(raw), uniform[:, None])
    return (self.decode(z).log_prob(x) - log_q).mean(0)


@pytest.mark.parametrize(("method", "bug"), [("_clipped", descending), ("_bound", without_the_prior)])
def test_a_refinement_of_something_else_is_noticed(monkeypatch, method, bug):
    monkeypatch.setattr(pv.SemiAmortized, method, bug)
    with pytest.raises(AssertionError):
        check_rise("full")


def test_an_untrained_encoder_loses_little_of_the_evidence():
    """Bernoulli data of the model itself, of one latent: the evidence by quadrature."""
    vae = small(latent_dim=1)
    with torch.no_grad():
        vae.decoder[0].weight.mul_(4)
        vae.decoder[-1].weight.mul_(6)
        x = vae.sample(100)
        refined = pv.SemiAmortized(vae, num_steps=60, num_particles=4)
        gaps = [(evidence(vae, x) - sgvb(program, x, 2000, "B")).mean().item() for program in (vae, refined)]
    assert gaps[0] > 0.3
    assert 0 < gaps[1] < 0.3 * gaps[0]


def evidence(vae, x):
    z = torch.linspace(-12, 12, 4001)[:, None, None]
    log_joint = vae.decode(z).log_prob(x) - 0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
    return log_joint.logsumexp(0) + math.log(24 / 4000)


def test_importance_weights_have_the_evidence_as_their_mean():
    vae = small(latent_dim=1)
    refined, x = pv.SemiAmortized(vae), binary(3, 6)
    with torch.no_grad():
        log_w = pv.log_weights(refined.model, refined.guide, (x,), num_particles=20_000).log_w
        assert_mean_close((log_w - evidence(vae, x)).exp(), 1.0, min_effect=0.05)
        assert not torch.allclose(refined.encode(x).mean, vae.encode(x).mean, atol=0.05)


# The steps ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_two_steps(max_grad_norm, step_size=0.07):
    """The gradient of a linear-Gaussian bound, written out."""
    torch.manual_seed(3)
    vae, x = linear_vae("diagonal"), torch.randn(M, D)
    refined = pv.SemiAmortized(vae, 2, step_size, num_particles=3, max_grad_norm=max_grad_norm)
    loc, log_variance = vae.encoder(x).chunk(2, -1)
    weight, bias, variance = vae.decoder[0].weight, vae.decoder[0].bias, vae.likelihood.scale**2
    clipped = []
    for uniform in refined.noise:
        e = torch.from_numpy(stats.norm.ppf(uniform.numpy()))[:, None]
        scale = (0.5 * log_variance).exp()
        pull = (x - (loc + scale * e) @ weight.T - bias) @ weight / variance
        slope = torch.cat([pull.mean(0) - loc, ((pull * e).mean(0) * scale - scale**2 + 1) / 2], -1)
        norm = slope.norm(dim=-1, keepdim=True)
        clipped += (norm > (max_grad_norm or math.inf)).flatten().tolist()
        step = step_size * (slope if max_grad_norm is None else slope * (max_grad_norm / norm).clamp(max=1))
        loc, log_variance = loc + step[:, :J], log_variance + step[:, J:]
    law = refined.encode(x)
    close(law.mean, loc)
    close(law.variance.log(), log_variance)
    return clipped


def test_two_steps_by_hand():
    assert not any(check_two_steps(None))
    clipped = check_two_steps(4.0)
    assert any(clipped)
    assert not all(clipped)


def clipped_together(self, slope):
    return slope * (1 / slope.norm().clamp_min(1.0))


@torch.no_grad()
def check_each_by_itself():
    torch.manual_seed(4)
    vae, x = small(), binary(2, 3, 6)
    with torch.no_grad():
        vae.decoder[-1].weight.mul_(5)
    refined = pv.SemiAmortized(vae, 4, num_particles=2)
    assert not torch.allclose(refined.encode(x).mean, vae.encode(x).mean, atol=0.01)
    for i, j in itertools.product(range(2), range(3)):
        one = refined.encode(x[i, j])
        close(refined.encode(x).mean[i, j], one.mean)
        close(refined.encode(x).stddev[i, j], one.stddev)


def test_each_datum_is_refined_by_itself():
    check_each_by_itself()


def test_a_norm_of_the_whole_batch_is_noticed(monkeypatch):
    monkeypatch.setattr(pv.SemiAmortized, "_clipped", clipped_together)
    with pytest.raises(AssertionError):
        check_each_by_itself()


def check_one_law():
    """What draws first and takes the density later gets the density of the law that was drawn from."""
    refined, x = pv.SemiAmortized(small()), binary(M, 6)
    drawn = pv.log_weights(refined.model, refined.guide, (x,), num_particles=3)
    again = pv.log_weights(refined.model, refined.guide, (x,), num_particles=3, latents=drawn.latents)
    close(again.log_w, drawn.log_w, 0)


def test_q_is_a_function_of_x():
    check_one_law()


def test_noise_that_is_new_each_time_is_noticed(monkeypatch):
    bound = pv.SemiAmortized._bound
    monkeypatch.setattr(pv.SemiAmortized, "_bound", lambda *args: bound(*args[:-1], torch.rand_like(args[-1])))
    with pytest.raises(AssertionError):
        check_one_law()


def check_draws(posterior):
    """Draws that uniform numbers make against the law's own: moments of bounded functions, and log densities."""
    module = POSTERIORS[posterior](2)
    law = module(0.5 * torch.randn(module.num_parameters))
    z, log_q = semi_amortized._drawn(law, torch.rand(20_000, 2))
    close(log_q, law.log_prob(z), 1e-8)
    own, z = (values.tanh() for values in (law.sample((20_000,)), z))
    for function in (lambda t: t, torch.square, lambda t: t.prod(-1)):
        assert_mean_close(function(z) - function(own), 0.0, min_effect=0.06)


REFINED = [name for name in POSTERIORS if name not in OF_IMPLICIT_DRAWS]


@pytest.mark.parametrize("posterior", REFINED)
def test_uniform_numbers_make_draws_of_the_posterior(posterior):
    check_draws(posterior)


def test_draws_of_a_neighbouring_law_are_noticed(monkeypatch):
    ndtri = torch.special.ndtri
    monkeypatch.setattr(torch.special, "ndtri", lambda uniform: 1.2 * ndtri(uniform))
    with pytest.raises(AssertionError):
        check_draws("full")


def test_particles_share_one_refinement():
    vae = small()
    refined, seen = pv.SemiAmortized(vae, num_steps=3, num_particles=2), []
    pv.log_weights(refined.model, refined.guide, (binary(M, 6),), num_particles=7)  # finds the plates' places
    vae.decoder.register_forward_hook(lambda _, inputs, output: seen.append(tuple(inputs[0].shape)))
    pv.log_weights(refined.model, refined.guide, (binary(M, 6),), num_particles=7)
    assert seen == [(2, M, 2)] * 3 + [(7, M, 2)]


def test_a_refinement_leaves_no_trace():
    refined, x = pv.SemiAmortized(small()), binary(M, 6)
    refined.vae.decoder.eval()
    modes, generator = [part.training for part in refined.modules()], torch.get_rng_state()
    law = refined.encode(x)
    assert law.mean.requires_grad
    assert all(parameter.grad is None for parameter in refined.parameters())
    assert [part.training for part in refined.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert pyro.settings.get("validate_distributions_pyro")
    with torch.no_grad():
        unrecorded = refined.encode(x)
    assert not unrecorded.mean.requires_grad
    assert torch.equal(unrecorded.mean, law.mean)


# Gradients ------------------------------------------------------------------------------------------------------------

PARTS = {
    "diagonal": {},
    "full, mixture": {"posterior": "full", "prior": "mixture"},
    "iaf": {"posterior": "iaf"},
    "vamp, gaussian": {"prior": "vamp", "likelihood": "gaussian"},
}


def directional(function, parameters, direction, eps):
    """The central difference of a function along a direction."""
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, step in zip(parameters, direction, strict=True):
                parameter.add_(step, alpha=sign * eps)
        values.append(function().item())
    with torch.no_grad():
        for parameter, step in zip(parameters, direction, strict=True):
            parameter.add_(step, alpha=eps)
    return (values[0] - values[1]) / (2 * eps)


def check_gradient(refined, x, loss, eps=1e-5):
    """Autograd's slope of the bound against differences of a function, along three directions."""
    parameters = [parameter for parameter in refined.parameters() if parameter.requires_grad]
    slopes = torch.autograd.grad(bound_of(refined, x), parameters)
    for _ in range(3):
        direction = [torch.randn_like(parameter) for parameter in parameters]
        ours = sum((s * d).sum() for s, d in zip(slopes, direction, strict=True)).item()
        assert ours == pytest.approx(directional(loss, parameters, direction, eps), rel=1e-5, abs=1e-6)


def bound_of(refined, x):
    torch.manual_seed(5)
    return sgvb(refined, x, 2).sum()


@pytest.mark.parametrize("parts", PARTS)
def test_the_gradient_goes_through_the_steps(parts):
    refined, x = pv.SemiAmortized(small(**PARTS[parts]), 3, num_particles=2), binary(M, 6)
    check_gradient(refined, x, lambda: bound_of(refined, x))


def test_the_gradient_goes_through_the_steps_of_an_encoder_that_is_held():
    refined, x = pv.SemiAmortized(small(), 3), binary(M, 6)
    refined.vae.encoder.requires_grad_(False)
    check_gradient(refined, x, lambda: bound_of(refined, x))


class Shifted(pv.SemiAmortized):
    """The encoder's numbers and constants."""

    shift = 0.0

    def _refined(self, x):
        return self.vae.encoder(x) + self.shift


def truncated_of(refined, x):
    """The same bound as a function of parameters that the refinement's increments do not follow."""
    shifted = Shifted(refined.vae)
    with torch.no_grad():
        shifted.shift = refined._refined(x) - refined.vae.encoder(x)
    return lambda: bound_of(shifted, x)


@pytest.mark.parametrize("parts", PARTS)
def test_the_gradient_that_is_cut_takes_the_increments_as_constants(parts):
    refined, x = pv.SemiAmortized(small(**PARTS[parts]), 3, num_particles=2, through=False), binary(M, 6)
    check_gradient(refined, x, truncated_of(refined, x))


@pytest.mark.parametrize("through", [True, False])
def test_either_gradient_is_told_from_the_other(through):
    refined, x = pv.SemiAmortized(small(), 3, through=through), binary(M, 6)
    wrong = truncated_of(refined, x) if through else lambda: bound_of(refined, x)
    with pytest.raises(AssertionError):
        check_gradient(refined, x, wrong)


@pytest.mark.parametrize("gradient", ["dreg", None])
def test_the_doubly_reparameterised_gradient_is_that_of_iwae(gradient):
    """The decoder's parameters are in the guide too, where DReG's path derivatives reach them. None: draws held."""
    vae = small(hidden_dims=(), latent_dim=1)
    refined, x = pv.SemiAmortized(vae, 2, step_size=0.5), binary(1, 6).expand(20, 6)
    direction = [torch.randn_like(parameter) for parameter in refined.parameters()]

    def slope(objective):
        loss = objective.differentiable_loss(refined.model, refined.guide, x) / len(x)
        found = torch.autograd.grad(loss, list(refined.parameters()))
        return sum((s * d).sum() for s, d in zip(found, direction, strict=True))

    other = pv.DReG(2) if gradient else pv.VIMCO(2)
    with pyro.validation_enabled(False):
        gaps = torch.stack([slope(other) - slope(pv.IWAE(2)) for _ in range(150)])
    assert_mean_close(gaps, 0.0, min_effect=0.2)


# What is done with it -------------------------------------------------------------------------------------------------

LEARNING = (
    *(pv.SGVB(2), pv.IWAE(3), pv.DReG(3), pv.Renyi(0.5, 3), pv.VIMCO(3), pv.ReweightedWakeSleep(3), pv.WakeSleep()),
    pv.SGVB(1, "B"),
)
RECORDED = ("sgvb B", "dreg", "vimco", "reweighted-wake-sleep", "mcem", "Trace")


@torch.no_grad()
def test_bounds_of_the_refined_posterior_are_the_evidence():
    """By draws alone: the closed form of the KL leaves the likelihood its variance."""
    vae, x = linear_vae("full"), torch.randn(M, D)
    refined, truth = pv.SemiAmortized(vae, 300, step_size=0.05, num_particles=64), joint_of(vae).last(D).log_prob(x)
    for objective in LEARNING[:-1]:
        close(objective.bound(refined.model, refined.guide, x), truth, 0.2)
        with pytest.raises(AssertionError):
            close(objective.bound(vae.model, vae.guide, x), truth, 0.2)


@pytest.mark.parametrize("objective", LEARNING, ids=repr)
def test_every_objective_trains_encoder_and_decoder(objective):
    refined, x = pv.SemiAmortized(small(), 3), binary(M, 6)
    loss = objective.differentiable_loss(refined.model, refined.guide, x)
    slopes = torch.autograd.grad(loss, list(refined.parameters()))
    assert all(slope.isfinite().all() and slope.abs().sum() > 0 for slope in slopes)


def test_every_objective_of_independent_data_is_tried():
    assert {type(objective) for objective in LEARNING} | {pv.MCEM, pv.FIVO} == set(OBJECTIVES.values())


@pytest.mark.parametrize(("name", "through"), [*((name, True) for name in RECORDED), ("sgvb B", False)])
def test_a_recorded_step_gives_the_bits_of_the_program(name, through):
    def make():
        return pv.SemiAmortized(small(), 2, through=through)

    x = binary(8, 6)
    kinds = (test_compiled.WatchedCompiled, test_compiled.WatchedEager)
    ours, theirs = (test_compiled.trail(make, x, test_compiled.LEARNING[name](), kind) for kind in kinds)
    assert ours.step.path == "captured"
    assert ours.losses == theirs.losses
    for a, b in zip(ours.seen, theirs.seen, strict=True):
        test_compiled.assert_same_step(a, b)
    assert_same(ours.parameters, theirs.parameters)
    assert_same(ours.buffers, theirs.buffers)


EVERYWHERE = [
    *({"posterior": name} for name in REFINED),
    *({"prior": name} for name in PRIORS if name != "standard"),
    *({"network": name, "data_shape": (4, 4), "channels": (3,)} for name in ("conv", "resnet")),
    {"prior": "flow", "posterior": "spline", "likelihood": "gaussian"},
]


@pytest.mark.parametrize("parts", EVERYWHERE, ids=lambda parts: "-".join(map(str, parts.values())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_part_gains_and_has_a_gradient(parts, dtype):
    torch.set_default_dtype(dtype)
    vae = small(**parts)
    refined, x = pv.SemiAmortized(vae, num_steps=6, num_particles=2), binary(8, *vae.data_shape)
    with torch.no_grad():
        before, after = (sgvb(program, x, 200).mean() for program in (vae, refined))
    assert after > before
    slopes = torch.autograd.grad(sgvb(refined, x).sum(), list(vae.parameters()))
    assert all(slope.isfinite().all() and slope.abs().sum() > 0 for slope in slopes)


TRAINED = [
    {"posterior": "full", "likelihood": "gaussian", "prior": "mixture"},
    {"prior": "vamp"},
    {"network": "conv", "data_shape": (4, 4), "channels": (3,)},
]


@pytest.mark.parametrize("parts", TRAINED, ids=lambda parts: "-".join(map(str, parts.values())))
def test_it_is_trained_scored_and_stored(parts, tmp_path):
    refined = pv.SemiAmortized(small(**parts), num_steps=2)
    x = binary(8, *refined.data_shape)
    run = pv.fit(refined, x, optimizer="adam", epochs=6, batch_size=4, run_dir=tmp_path / "r", progress=False)
    assert run.path == "captured"
    assert math.isfinite(pv.log_marginal(refined, x, num_particles=3).mean)
    stored = pv.load_run(tmp_path / "r").program
    assert json.loads(json.dumps(stored.config)) == json.loads(json.dumps(refined.config))
    assert_same(refined.state_dict(), stored.state_dict())
    torch.manual_seed(1)
    expected = refined.encode(x).sample()
    torch.manual_seed(1)
    assert torch.equal(stored.encode(x).sample(), expected)


def test_scorers_agree_on_the_evidence():
    vae, x = small(latent_dim=1), binary(6, 6)
    refined = pv.SemiAmortized(vae)
    with torch.no_grad():
        truth = evidence(vae, x).mean().item()
    for options in (
        {"num_particles": 2000},
        {"num_particles": 2000, "defensive": 0.3},
        {"method": "ais", "num_steps": 5, "num_particles": 100},
    ):
        assert pv.log_marginal(refined, x, **options).mean == pytest.approx(truth, abs=0.02)
    bound = pv.evaluate_bound(refined, x, pv.SGVB(100)).mean
    assert truth - 1 < bound < truth
    assert all(parameter.grad is None for parameter in refined.parameters())


def test_grey_levels_are_drawn_for_it_as_for_a_vae():
    assert pv.fit(pv.SemiAmortized(small()), torch.rand(8, 6), epochs=1, progress=False).samples == 8


def test_single_precision():
    refined, x = pv.SemiAmortized(small()), binary(M, 6)
    expected = refined.encode(x).mean
    single = refined.float().encode(x.float()).mean
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_pictures_are_those_of_the_vae():
    refined = pv.SemiAmortized(small(prior="vamp"))
    assert (refined.latent_dim, refined.data_range) == (2, (0.0, 1.0))
    assert refined.sample(3).shape == (3, 6)
    z = torch.randn(5, 2)
    close(refined.prior(refined.encode).log_prob(z), refined.vae.prior(refined.vae.encode).log_prob(z), 0)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pv.SemiAmortized(nn.Linear(2, 2)), "vae: expected a VAE, or the arguments of one, got Linear"),
        (lambda: pv.SemiAmortized(pv.LinearGaussian(torch.ones(3, 1))), "vae: expected a VAE, .*got LinearGaussian"),
        (lambda: pv.SemiAmortized(small(bayesian=True)), "vae: expected one without Bayesian weights, got .*True"),
        (lambda: pv.SemiAmortized(small(bayesian="decoder")), "without Bayesian weights, got bayesian='decoder'"),
        (lambda: pv.SemiAmortized(small(), 0), "num_steps: expected a whole number of at least 1, got 0"),
        (lambda: pv.SemiAmortized(small(), num_particles=0), "num_particles: expected a whole number"),
        (lambda: pv.SemiAmortized(small(), step_size=0), "step_size: expected a positive number, got 0"),
        (lambda: pv.SemiAmortized(small(), step_size=-0.1), "step_size: expected a positive number, got -0.1"),
        (lambda: pv.SemiAmortized(small(), step_size=math.nan), "step_size: expected a positive number, got nan"),
        (lambda: pv.SemiAmortized(small(), max_grad_norm=0.0), "max_grad_norm: expected a positive number, got 0.0"),
        *(
            (lambda name=name: pv.SemiAmortized(small(posterior=name)), "draws are a function of fixed noise")
            for name in OF_IMPLICIT_DRAWS
        ),
    ],
)
def test_what_cannot_be_refined_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_vae_of_own_parts_has_no_config():
    networks = nn.Linear(6, 4), nn.Linear(2, 6)
    refined = pv.SemiAmortized(small(network=networks))
    assert refined.config is None
    assert pv.fit(refined, binary(8, 6), epochs=1, progress=False).samples == 8
