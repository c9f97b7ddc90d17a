"""Particle filters: unbiased for p(x), exact where they must be, each sequence by itself."""

import math
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae import models, smc
from pyro_vae.distributions import Emissions, MarkovSequence
from pyro_vae.numerics import log_mean_exp
from pyro_vae.programs import SequenceLaws, log_weights, sequence_laws
from tests import oracles
from tests.sequences import LinearStateSpace, draws, example, vague
from tests.statistics import assert_mean_close

LENGTHS = (6, 1, 3, 5, 2)


def ragged():
    """Five sequences of up to six steps, with values missing, and log p(x) of each."""
    law, lengths = example(), torch.tensor(LENGTHS)
    x, mask = draws(law, 5, 6), torch.rand(5, 6, 3) < 0.7
    x = torch.where(mask & (torch.arange(6) < lengths[:, None])[..., None], x, 0.0)
    return law, (x, lengths, mask), law.log_marginal(x, lengths, mask)


def laws_of(guide, args, law=None):
    program = LinearStateSpace(example() if law is None else law, guide)
    with torch.no_grad():
        return sequence_laws(program.model, program.guide, args)


def copies(num_copies, lengths=(5, 2, 4)):
    """Sequences of some lengths, so many copies of each one after another, and log p(x) of each, (L,)."""
    law, n = vague(), torch.tensor(lengths)
    x = 1.5 * torch.sin(torch.arange(len(lengths) * max(lengths) * 3.0)).reshape(len(lengths), max(lengths), 3)
    many = x.repeat_interleave(num_copies, 0), n.repeat_interleave(num_copies)
    return many, law.log_marginal(x, n)


# Exact where it must be -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 2, 7])
def test_the_exact_smoother_without_resampling_gives_the_kalman_likelihood(K):
    _, args, exact = ragged()
    found = smc.run(laws_of("smoother", args), K, threshold=0)
    torch.testing.assert_close(found.log_evidence, exact, rtol=0, atol=1e-10)
    assert not found.resampled.any()
    final = found.ess[-1]
    torch.testing.assert_close(final, torch.full_like(final, K))


@pytest.mark.parametrize("guide", ["prior", "amortized"])
def test_another_proposal_does_not(guide):
    _, args, exact = ragged()
    found = smc.run(laws_of(guide, args), 7, threshold=0)
    assert ((found.log_evidence - exact).abs() > 1e-3).all()


@pytest.mark.parametrize("guide", ["prior", "amortized", "smoother"])
def test_without_resampling_it_is_importance_sampling_of_paths(guide):
    """The weights of the paths that it drew, by the bridge, whose log mean they are."""
    _, args, _ = ragged()
    program = LinearStateSpace(example(), guide)
    found = smc.run(sequence_laws(program.model, program.guide, args), 7, threshold=0)
    paths = found.trajectories()
    weights = log_weights(program.model, program.guide, args, num_particles=7, latents={"z": paths}).log_w
    torch.testing.assert_close(found.log_evidence, log_mean_exp(weights), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.log_weights[-1], weights.log_softmax(0), rtol=0, atol=1e-10)


def test_a_chain_on_two_states():
    """Latents that are drawn without a gradient; the bound by a sum over all paths."""
    start, stay = 0.3, torch.tensor([0.2, 0.9])  # of state 1, and of going to it from 0 and from 1
    first = dist.Bernoulli(torch.tensor([start])).to_event(1)

    def emission(z):
        return dist.Normal(2 * z, 1.5).to_event(1)

    x = torch.tensor([0.1, 1.5, 2.2, -0.3])[:, None]
    log_likelihood = dist.Normal(2 * torch.arange(2.0), 1.5).log_prob(x)
    moves = torch.stack([1 - stay, stay], -1)
    exact = oracles.hidden_markov_log_marginal(torch.tensor([1 - start, start]), moves, log_likelihood)
    M = 20_000
    prior = MarkovSequence(first, lambda z: dist.Bernoulli(stay[z.long()]).to_event(1), 4).expand((M,))
    laws = SequenceLaws(prior, prior, Emissions(emission, prior.sample()), x.expand(M, 4, 1))
    for threshold in (0.0, 0.5, 1.0):
        found = smc.run(laws, 6, threshold=threshold).log_evidence
        assert_mean_close((found - exact).exp(), 1.0, min_effect=0.03)


# Expectations ---------------------------------------------------------------------------------------------------------

RULES = [(threshold, resampling) for threshold in (0.5, 1.0) for resampling in smc.RESAMPLING]


def ratios(guide, K=6, num_copies=6000, **options):
    """Estimates of p(x), over p(x): (num_copies, L) for sequences of several lengths."""
    args, exact = copies(num_copies)
    found = smc.run(laws_of(guide, args, vague()), K, **options)
    return (found.log_evidence.unflatten(0, (-1, num_copies)) - exact[:, None]).exp().T


@pytest.mark.parametrize(("threshold", "resampling"), RULES)
@pytest.mark.parametrize("guide", ["prior", "amortized", "smoother"])
def test_the_estimate_of_the_likelihood_has_no_bias(guide, threshold, resampling):
    assert_mean_close(ratios(guide, 14, threshold=threshold, resampling=resampling), 1.0, min_effect=0.1)


def test_the_bootstrap_filter_by_the_prior_itself():
    args, exact = copies(6000)
    program = LinearStateSpace(vague())
    with torch.no_grad():
        laws = sequence_laws(program.model, None, args)
    assert laws.proposal is laws.prior
    found = smc.run(laws, 6).log_evidence.unflatten(0, (-1, 6000)) - exact[:, None]
    assert_mean_close(found.exp().T, 1.0, min_effect=0.05)


def _others(log_weights, resampling="systematic", original=smc.resample):
    """Ancestors that another sequence's weights chose."""
    return original(log_weights, resampling).roll(1, -1)


def _averaged(state, z, log_w, original=smc._weighed):
    """Increments that are means over particles, whatever weights they carry."""
    new, _ = original(state, z, log_w)
    increment = log_mean_exp(log_w)
    return smc.FilterState(new.particles, new.log_weights, state.log_evidence + increment), increment


BUGS = {
    "weights kept after resampling": ("_made_equal", lambda log_weights, resampled: log_weights),
    "ancestors of another sequence": ("resample", _others),
    "no log K": ("math", SimpleNamespace(log=lambda count: 0.0, inf=math.inf)),
    "without the carried weights": ("_weighed", _averaged),
    "no ancestors": ("_taken", lambda particles, ancestors: particles),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_seen(bug, monkeypatch):
    monkeypatch.setattr(smc, *BUGS[bug])
    with pytest.raises(AssertionError, match="mean"):
        assert_mean_close(ratios("prior", threshold=0.8), 1.0, min_effect=1e9)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_its_logarithm_is_a_lower_bound_on_average(threshold):
    few, many = (ratios("prior", K, 2000, threshold=threshold).log() for K in (2, 16))
    for found in (few, many):
        mean, error = found.mean(0), found.std(0) / len(found) ** 0.5
        assert (mean < 3 * error).all()
    assert (few.mean(0) < many.mean(0)).all()
    assert (few.mean(0) < -0.02).all()


def test_resampling_makes_long_sequences_possible():
    law = example()
    x = draws(law, 1, 50).expand(200, -1, -1)
    exact = law.log_marginal(x[:1])
    laws = laws_of("prior", (x,))
    with_it, without = (smc.run(laws, 16, threshold=threshold).log_evidence for threshold in (0.5, 0.0))
    assert without.mean() < with_it.mean() - 10
    assert with_it.mean() < exact


# What it says of the latents ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", ["prior", "amortized"])
def test_filtering_means_are_kalmans(guide):
    law = example()
    x = draws(law, 1, 6)
    found = smc.run(laws_of(guide, (x.expand(300, -1, -1),)), 1000)
    assert_mean_close(found.means, law.filter_means(x[0]), min_effect=0.02)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_trajectories_are_draws_of_the_smoother(threshold):
    law = example()
    x = draws(law, 1, 4)
    found = smc.run(laws_of("prior", (x.expand(300, -1, -1),)), 1000, threshold=threshold)
    paths, weights = found.trajectories(), found.log_weights[-1].exp()
    smoothed = law.smoothed(x[0])
    mean = (weights[..., None, None] * paths).sum(0).flatten(1)
    assert_mean_close(mean, smoothed.mean, min_effect=0.05)
    square = (weights[..., None, None] * paths.square()).sum(0).flatten(1)
    assert_mean_close(square, smoothed.cov.diagonal() + smoothed.mean.square(), min_effect=0.1)


def test_the_ancestry_leads_back_to_the_particles():
    args, _ = copies(2)
    found = smc.run(laws_of("prior", args), 5, threshold=1.0, resampling="multinomial")
    assert found.resampled[1].all()
    paths, valid = found.trajectories(), found.valid
    for m in range(6):
        for k in range(5):
            lineage = k
            for t in reversed(range(5)):
                expected = found.particles[t, lineage, m] * valid[m, t]
                assert torch.equal(paths[k, m, t], expected)
                lineage = int(found.ancestors[t, lineage, m])
    assert found.num_resamplings.tolist() == found.resampled.sum(0).tolist()


# Each sequence by itself ----------------------------------------------------------------------------------------------


@pytest.fixture
def shared_noise(monkeypatch):
    """All draws of a filter from one table, of which a run takes the columns that it is told to."""
    normal, uniform = torch.randn(8, 30, 5, 2), torch.rand(8, 30, 5)
    at = SimpleNamespace(columns=slice(None), t=0)

    def drawn(law):
        base = law.base_dist if isinstance(law, dist.Independent) else law
        noise = normal[at.t, : law.batch_shape[0], at.columns]
        at.t += 1
        root = base.scale_tril if hasattr(base, "scale_tril") else torch.diag_embed(base.scale)
        return base.loc + (root @ noise[..., None]).squeeze(-1)

    monkeypatch.setattr(smc, "drawn_from", drawn)
    monkeypatch.setattr(smc, "_uniform", lambda K, M, like: uniform[at.t, :K, at.columns].to(like))

    def run(guide, args, columns, **options):
        at.columns, at.t = columns, 0
        return smc.run(laws_of(guide, args), 30, **options)

    return run


@pytest.mark.parametrize("guide", ["prior", "amortized", "smoother"])
@pytest.mark.parametrize("resampling", smc.RESAMPLING)
def test_a_sequence_alone_and_in_a_batch(shared_noise, guide, resampling):
    _, (x, lengths, mask), _ = ragged()
    whole = shared_noise(guide, (x, lengths, mask), slice(None), resampling=resampling, threshold=0.9)
    assert whole.num_resamplings.unique().numel() > 2  # they do not all resample together
    for m, n in enumerate(LENGTHS):
        one = slice(m, m + 1)
        cut = (x[one, :n], lengths[one], mask[one, :n])  # and without its padding
        alone = shared_noise(guide, cut, one, resampling=resampling, threshold=0.9)
        for ours, theirs in (
            (alone.log_evidence, whole.log_evidence[one]),
            (alone.particles, whole.particles[:n, :, one]),
            (alone.log_weights, whole.log_weights[:n, :, one]),
            (alone.means, whole.means[one, :n]),
            (alone.ess, whole.ess[:n, one]),
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
        assert torch.equal(alone.ancestors, whole.ancestors[:n, :, one])
        assert torch.equal(alone.resampled, whole.resampled[:n, one])


def test_padding_leaves_everything_as_it_is():
    _, (x, lengths, mask), _ = ragged()
    laws = laws_of("prior", (x, lengths, mask))
    state, info = smc.init(laws, 8)
    for t in range(1, 6):
        new, info = smc.step(laws, state, t, threshold=1.0)
        over = t >= lengths
        assert over.any()
        for before, after in ((state.particles.movedim(1, 0), new.particles.movedim(1, 0)),):
            assert torch.equal(before[over], after[over])
        assert torch.equal(state.log_weights[:, over], new.log_weights[:, over])
        assert torch.equal(state.log_evidence[over], new.log_evidence[over])
        assert not (state.log_evidence[~over] == new.log_evidence[~over]).any()
        assert not info.increment[over].any()
        assert not info.resampled[over].any()
        assert torch.equal(info.ancestors[:, over], torch.arange(8)[:, None].expand(8, int(over.sum())))
        state = new


@pytest.mark.parametrize("guide", ["prior", "smoother"])
def test_what_stands_in_the_padding_has_no_influence(guide):
    _, (x, lengths, mask), _ = ragged()
    padding = (torch.arange(6) >= lengths[:, None])[..., None]
    found = []
    for value in (0.0, 1e3):
        torch.manual_seed(1)
        found.append(smc.run(laws_of(guide, (torch.where(padding, value, x), lengths, mask)), 10))
    assert torch.equal(found[0].log_evidence, found[1].log_evidence)
    assert torch.equal(found[0].means, found[1].means)


def test_what_a_mask_hides_has_no_influence():
    _, (x, lengths, mask), _ = ragged()
    found = []
    for value in (0.0, 1e3):
        torch.manual_seed(1)
        found.append(smc.run(laws_of("prior", (torch.where(mask, x, value), lengths, mask)), 10).log_evidence)
    assert torch.equal(*found)


# Resampling -----------------------------------------------------------------------------------------------------------


def counted(weights, resampling, repeats=4000):
    """How often each particle is an ancestor, (repeats, K)."""
    log_weights = torch.tensor(weights).log()[:, None].expand(-1, repeats)
    ancestors = smc.resample(log_weights, resampling)
    assert ancestors.shape == (len(weights), repeats)
    return nn.functional.one_hot(ancestors, len(weights)).sum(0).double()


@pytest.mark.parametrize("resampling", smc.RESAMPLING)
def test_each_particle_is_expected_as_often_as_its_weight_says(resampling):
    weights = [0.05, 0.0, 0.4, 0.22, 0.33, 0.0]
    found = counted(weights, resampling)
    assert_mean_close(found, 6 * torch.tensor(weights), min_effect=0.11)
    assert not found[:, [1, 5]].any()
    if resampling == "systematic":
        expected = 6 * torch.tensor(weights)
        assert ((found >= expected.floor()) & (found <= expected.ceil())).all()
    else:
        assert_mean_close((found - 6 * torch.tensor(weights)).square(), _binomial(weights, 6), min_effect=0.2)


def _binomial(weights, K):
    share = torch.tensor(weights)
    return K * share * (1 - share)


@pytest.mark.parametrize("resampling", smc.RESAMPLING)
def test_many_particles_are_searched_and_few_compared_alike(resampling, monkeypatch):
    log_weights, found = torch.randn(40, 9).log_softmax(0), []
    for few in (0, 100):
        monkeypatch.setattr(smc, "_FEW", few)
        torch.manual_seed(1)
        found.append(smc.resample(log_weights, resampling))
    assert torch.equal(*found)


def test_each_sequence_by_its_own_weights():
    log_weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 0.5]]).log()
    for resampling in smc.RESAMPLING:
        ancestors = smc.resample(log_weights, resampling)
        assert ancestors[:, 0].tolist() == [0, 0, 0]
        assert ancestors[:, 1].tolist() == [1, 1, 1]
        assert set(ancestors[:, 2].tolist()) <= {1, 2}


@pytest.mark.parametrize("few", [0, 100])
@pytest.mark.parametrize("value", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("resampling", smc.RESAMPLING)
def test_the_ends_of_the_unit_interval(value, resampling, few, monkeypatch):
    """No particle of weight zero, and none that is not there, is an ancestor at either end."""
    monkeypatch.setattr(smc, "_FEW", few)
    monkeypatch.setattr(smc, "_uniform", lambda K, M, like: torch.full((K, M), value))
    for weights in ([0.0, 0.5, 0.5, 0.0], [0.1] * 10, [1e-300, 1.0, 0.0], [1 / 3] * 3):
        log_weights = torch.tensor(weights).log()[:, None]
        ancestors = smc.resample(log_weights - log_weights.logsumexp(0), resampling)
        assert (torch.tensor(weights)[ancestors] > 0).all()


def test_effective_sample_sizes():
    weights = torch.tensor([[1.0, 0.25, 0.5], [0.0, 0.25, 0.5], [0.0, 0.25, 0.0], [0.0, 0.25, 0.0]])
    torch.testing.assert_close(smc._ess(weights.log()), torch.tensor([1.0, 4.0, 2.0]))


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_who_is_resampled(threshold):
    args, _ = copies(20)
    found = smc.run(laws_of("prior", args), 6, threshold=threshold)
    due = found.ess[:-1] < threshold * 6
    assert torch.equal(found.resampled[1:], due & found.valid.T[1:])
    assert not found.resampled[0].any()
    assert found.resampled.any() == (threshold > 0)
    kept = ~found.resampled[:, None].expand_as(found.ancestors)
    assert torch.equal(found.ancestors[kept], torch.arange(6)[:, None].expand_as(found.ancestors)[kept])


def test_where_no_particle_is_possible_the_estimate_is_zero():
    first = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    with pyro.validation_enabled(False):
        prior = MarkovSequence(first, lambda z: dist.Normal(z, 1.0).to_event(1), 3).expand((2,))
        emission = lambda z: dist.Uniform(z - 1e-3, z + 1e-3).to_event(1)  # noqa: E731
        x = torch.tensor([1e6, 0.0])[:, None, None].expand(2, 3, 1)
        found = smc.run(SequenceLaws(prior, prior, Emissions(emission, prior.sample()), x), 5)
    assert found.log_evidence[0] == -math.inf
    assert not found.log_weights[:, :, 0].isnan().any()
    assert not found.particles.isnan().any()


def test_a_mean_field_proposal_draws_for_each_particle():
    """Its law of z_t knows no z_{t-1}, and so nothing of the particles' dimension."""
    dmm = pv.DeepMarkovModel(3, 2, 4, 4, 5, guide="mf-lr")
    x = torch.rand(4, 5, 3).round()
    found = smc.run(sequence_laws(dmm.model, dmm.guide, (x,)), 6, threshold=0)
    assert found.particles[-1].unique(dim=0).shape[0] == 6
    weights = log_weights(dmm.model, dmm.guide, (x,), num_particles=6, latents={"z": found.trajectories()})
    torch.testing.assert_close(found.log_evidence, log_mean_exp(weights.log_w), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["VariationalRNN", "StochasticVolatility", "LinearGaussianSSM"])
def test_models_of_the_package(name):
    model = {
        "VariationalRNN": lambda: models.VariationalRNN(3, 2, 4),
        "StochasticVolatility": lambda: models.StochasticVolatility(3),
        "LinearGaussianSSM": lambda: models.LinearGaussianSSM(example().transition, example().emission),
    }[name]()
    args = torch.rand(4, 5, 3).round(), torch.tensor([5, 1, 3, 4])
    found = smc.run(sequence_laws(model.model, model.guide, args), 6, threshold=0)
    weights = log_weights(model.model, model.guide, args, num_particles=6, latents={"z": found.trajectories()})
    torch.testing.assert_close(found.log_evidence, log_mean_exp(weights.log_w), rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{"num_flows": 2, "flow_dim": 4}, {"input_dim": 2}, {"missing": True}])
def test_deep_markov_models(options):
    dmm = pv.DeepMarkovModel(3, 2, 4, 4, 5, emission="gaussian", **options)
    x, lengths, mask = torch.randn(4, 5, 3), torch.tensor([5, 1, 3, 4]), torch.rand(4, 5, 3) < 0.8
    kwargs = {"x": x, "lengths": lengths, "mask": mask}
    if "input_dim" in options:
        kwargs["inputs"] = torch.randn(4, 5, 2)
    found = smc.run(sequence_laws(dmm.model, dmm.guide, (), kwargs), 6, threshold=0)
    latents = {"z": found.trajectories()}
    weights = log_weights(dmm.model, dmm.guide, (), kwargs, num_particles=6, latents=latents).log_w
    torch.testing.assert_close(found.log_evidence, log_mean_exp(weights), rtol=0, atol=1e-10)


# The laws of a program ------------------------------------------------------------------------------------------------


class Sequences(nn.Module):
    """A random walk, with something wrong with it."""

    def __init__(self, what="nothing"):
        super().__init__()
        self.what = what

    def chain(self, x, lengths=None):
        first = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        return MarkovSequence(first, lambda z: dist.Normal(z, 1.0).to_event(1), x.shape[1], lengths=lengths)

    def latents(self, x, lengths=None):
        if self.what == "scaled":
            with pyro.poutine.scale(scale=0.5):
                return pyro.sample("z", self.chain(x, lengths))
        if self.what == "masked":
            with pyro.poutine.mask(mask=x[:, 0, 0] > 0):
                return pyro.sample("z", self.chain(x, lengths))
        return pyro.sample("z", self.chain(x, lengths))

    def model(self, x, lengths=None):
        if self.what == "global latent":
            pyro.sample("theta", dist.Normal(0.0, 1.0))
        outer = pyro.plate("chains", 2, dim=-2) if self.what == "another plate" else pyro.poutine.mask(mask=True)
        with outer, pyro.plate("data", len(x)):
            if self.what == "another latent":
                pyro.sample("c", dist.Normal(0.0, 1.0))
            if self.what == "lengths in the model alone":
                lengths = torch.full(x.shape[:1], x.shape[1])
            z = self.latents(x, lengths)
            if self.what == "another chain":
                pyro.sample("z2", self.chain(x))
            if self.what == "what is emitted":
                pyro.sample("x", dist.Normal(z, 1.0).to_event(2), obs=x)
                return
            seen = z + 1 if self.what == "other latents" else z
            pyro.sample("x", Emissions(lambda z: dist.Normal(z, 1.0).to_event(1), seen), obs=x)
            if self.what == "two observations":
                pyro.sample("y", Emissions(lambda z: dist.Normal(z, 1.0).to_event(1), z), obs=x)

    def guide(self, x, lengths=None):
        if self.what == "global latent":
            pyro.sample("theta", dist.Normal(0.0, 1.0))
        outer = pyro.plate("chains", 2, dim=-2) if self.what == "another plate" else pyro.poutine.mask(mask=True)
        with outer, pyro.plate("data", len(x)):
            if self.what == "another latent":
                pyro.sample("c", dist.Normal(0.0, 1.0))
            if self.what == "what is proposed":
                pyro.sample("z", dist.Normal(torch.zeros(x.shape), 1.0).to_event(2))
                return
            self.latents(x, lengths)
            if self.what == "another chain":
                pyro.sample("z2", self.chain(x))


def test_what_is_right_is_taken():
    x = torch.randn(4, 3, 1)
    laws = sequence_laws(Sequences().model, Sequences().guide, (x,))
    assert laws.x.shape == (4, 3, 1)
    assert laws.scale == 1.0
    assert (laws.prior.batch_shape, laws.proposal.batch_shape) == ((4,), (4,))


def test_the_plate_states_the_scale():
    program = Sequences()

    def stated(function):
        def run(x):
            with pyro.plate("data", 40, subsample_size=len(x)):
                z = pyro.sample("z", program.chain(x))
                if function == "model":
                    pyro.sample("x", Emissions(lambda z: dist.Normal(z, 1.0).to_event(1), z), obs=x)

        return run

    x = torch.randn(4, 3, 1)
    assert sequence_laws(stated("model"), stated("guide"), (x,)).scale == 10.0
    assert sequence_laws(stated("model"), None, (x,)).scale == 10.0


WRONG = {
    "global latent": r"one latent site.* 'theta' \(Normal\), 'z' \(MarkovSequence\).*SGVB and IWAE",
    "another latent": r"got latent sites 'c' \(Normal\), 'z' \(MarkovSequence\)",
    "another chain": r"got latent sites 'z' \(MarkovSequence\), 'z2' \(MarkovSequence\)",
    "what is emitted": r"one observed site, its Emissions; .* observed sites 'x' \(Normal\)",
    "what is proposed": r"drawn as 'z' \(Normal\)",
    "two observations": r"observed sites 'x' \(Emissions\), 'y' \(Emissions\)",
    "other latents": r"site 'x' is not the Emissions of site 'z' itself.*expected Emissions\(law, z",
    "scaled": r"site 'z' is scaled",
    "masked": r"site 'z' is masked: expected the mask as Emissions",
    "another plate": r"expected site 'z' in the data plate alone.*\['chains', 'data'\]|\['data', 'chains'\]",
    "lengths in the model alone": "expected lengths of the latents in model and guide alike, got none in the guide",
}


@pytest.mark.parametrize("what", WRONG)
def test_programs_that_are_something_else_are_refused(what):
    program, x = Sequences(what), torch.randn(4, 3, 1)
    with pytest.raises(ValueError, match=WRONG[what]):
        sequence_laws(program.model, program.guide, (x,))


@pytest.mark.parametrize("guided", [True, False])
def test_programs_without_sequences_are_refused_by_name(guided):
    vae = pv.VAE((3,), 2, (4,))
    with pytest.raises(ValueError, match=r"got latent sites 'z' \(Normal\).*observed sites 'x' \(Bernoulli\)"):
        sequence_laws(vae.model, vae.guide if guided else None, (torch.zeros(5, 3),))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threshold": 1.5}, "threshold: expected a share from 0 to 1, got 1.5"),
        ({"threshold": -0.1}, "threshold: expected a share"),
        ({"resampling": "residual"}, "resampling: expected one of systematic, multinomial"),
        ({"num_particles": 0}, "num_particles: expected a whole number"),
    ],
)
def test_bad_arguments_are_refused(options, said):
    laws = laws_of("prior", (torch.zeros(2, 3, 3),))
    with pytest.raises(ValueError, match=said):
        smc.run(laws, **{"num_particles": 3} | options)
