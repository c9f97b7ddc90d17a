"""Word counts: their density against products written out, their draws against the multinomial enumerated.

Markov sequences and emissions: against loops over steps and sequences, with anything at all in the padding.
"""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import affine_autoregressive
from torch import nn
from torch.distributions import kl_divergence

from pyro_vae.distributions import Emissions, MarkovSequence, WordCounts
from pyro_vae.distributions import sequences as distributions
from pyro_vae.distributions.sequences import _from_noise
from pyro_vae.objectives import SGVB
from pyro_vae.programs import log_weights
from tests.statistics import assert_mean_close


def close(left, right, atol=1e-12):
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


def counts_of(total, width):
    """Every vector of counts of so many words."""
    every = [c for c in itertools.product(range(total + 1), repeat=width) if sum(c) == total]
    return torch.tensor(every, dtype=torch.get_default_dtype())


def orders_of(counts):
    """In how many orders the words can stand: n! / prod x_v!."""
    factorials = [math.prod(math.factorial(int(x)) for x in row) for row in counts.tolist()]
    return torch.tensor([math.factorial(int(row.sum())) / f for row, f in zip(counts, factorials, strict=True)])


# Density --------------------------------------------------------------------------------------------------------------


def test_density_is_the_product_of_the_words_probabilities():
    logits = torch.randn(5, 4)
    words = torch.tensor([[0, 0, 3], [1, 2, 3], [2, 2, 2], [0, 1, 0], [3, 1, 1]])  # documents of three words
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    expected = p.gather(1, words).log().sum(-1)
    close(WordCounts(logits).log_prob(torch.nn.functional.one_hot(words, 4).sum(1).double()), expected)


def test_densities_of_all_documents_sum_to_one_and_a_multinomials_do_not():
    logits, counts = torch.randn(3), counts_of(4, 3)
    density = WordCounts(logits, 4).log_prob(counts).exp()
    assert (density * orders_of(counts)).sum().item() == pytest.approx(1.0, abs=1e-12)
    planted = torch.distributions.Multinomial(4, logits=logits).log_prob(counts).exp()
    assert (planted * orders_of(counts)).sum().item() > 1.5


def test_a_document_without_words_has_density_one():
    assert WordCounts(torch.randn(6), 0).log_prob(torch.zeros(6)).item() == 0.0
    assert WordCounts(torch.randn(6), 0).sample().tolist() == [0.0] * 6


def test_density_does_not_depend_on_the_stated_number_of_words():
    logits, x = torch.randn(2, 3), torch.tensor([[1.0, 0, 2], [4, 0, 0]])
    close(WordCounts(logits, 7).log_prob(x), WordCounts(logits, torch.tensor([3, 4])).log_prob(x))


def test_shapes_broadcast():
    logits, count = torch.randn(5, 1, 3), torch.tensor([2, 0, 9, 1])
    words = WordCounts(logits, count)
    assert (words.batch_shape, words.event_shape) == ((5, 4), (3,))
    assert words.log_prob(torch.ones(4, 3)).shape == (5, 4)
    assert words.sample((2,)).shape == words.sample((2,)).shape == (2, 5, 4, 3)
    wide = words.expand((6, 5, 4))
    assert wide.sample().shape == (6, 5, 4, 3)
    close(wide.log_prob(torch.ones(4, 3))[2], words.log_prob(torch.ones(4, 3)))
    close(wide.mean[1], words.total_count[..., None] * words.logits.softmax(-1))


def test_gradient_is_the_residual_of_the_counts():
    logits, x = torch.randn(3, requires_grad=True), torch.tensor([2.0, 0.0, 5.0])
    (gradient,) = torch.autograd.grad(WordCounts(logits).log_prob(x), logits)
    close(gradient, x - 7 * logits.detach().softmax(-1))


@pytest.mark.parametrize(
    ("x", "said"),
    [
        ([[1.0, 2, 3], [0, -1, 0]], "at least 0, got -1 in row 1, word 1"),
        ([[1.0, 2, 0.5]] * 2, "whole numbers of at least 0, got 0.5 in row 0, word 2"),
        ([[1.0, 2, math.nan]], "got nan in row 0, word 2"),
        ([1.0, 2.5, 0.0], "got 2.5, word 1"),
        ([[1.0, 2.0]], r"shape \(..., 3\), got \(1, 2\)"),
    ],
)
def test_what_are_no_counts_is_refused(x, said):
    with pytest.raises(ValueError, match=said):
        WordCounts(torch.zeros(3)).log_prob(torch.tensor(x))
    if "shape" not in said:
        WordCounts(torch.zeros(3), validate_args=False).log_prob(torch.tensor(x))


def test_logits_without_words_are_refused():
    with pytest.raises(ValueError, match="a dimension of words"):
        WordCounts(torch.tensor(0.0))


# Draws ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8, 13, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_are_counts_of_the_stated_number_of_words(width, dtype):
    count = torch.tensor([0, 1, 7, 4306])
    x = WordCounts(5 * torch.randn(4, width, dtype=dtype), count).sample((10,))
    assert x.dtype == dtype
    assert x.shape == (10, 4, width)
    assert (x >= 0).all()
    assert torch.equal(x, x.round())
    assert torch.equal(x.sum(-1), count.to(dtype).expand(10, 4))


def frequencies(logits, counts, total, n=40_000):
    """Indicators (n, documents) of which one was drawn, and their probabilities."""
    drawn = WordCounts(logits, total).sample((n,))
    p = (counts * logits.log_softmax(-1)).sum(-1).exp() * orders_of(counts)
    return (drawn[:, None] == counts).all(-1), p


@pytest.mark.parametrize("width", [2, 3, 5])
def test_draws_have_the_multinomials_law(width):
    counts = counts_of(3, width)
    assert_mean_close(*frequencies(torch.randn(width), counts, 3), min_effect=0.015)


@pytest.mark.parametrize(
    "planted",
    [
        lambda left, right: torch.full_like(left, 0.5),
        lambda left, right: right / (left + right),
        lambda left, right: torch.where(right > 0, left, (left > 0).to(left.dtype)),  # of the whole, not of the pair
    ],
)
def test_draws_by_other_shares_are_rejected(monkeypatch, planted):
    monkeypatch.setattr("pyro_vae.distributions.counts._share", planted)
    found, p = frequencies(torch.tensor([1.0, 0.0, -0.5, 0.4]), counts_of(3, 4), 3)
    with pytest.raises(AssertionError, match="mean"):
        assert_mean_close(found, p, min_effect=0.02)


def test_words_of_no_probability_are_never_drawn():
    logits = torch.tensor([0.0, -math.inf, -math.inf, -math.inf, 0.0, -math.inf, -1e4])
    x = WordCounts(logits, 1000, validate_args=False).sample((50,))
    assert x[:, [1, 2, 3, 5, 6]].sum() == 0
    assert_mean_close(x[:, 0], 500.0, min_effect=30)


def test_moments():
    words = WordCounts(torch.randn(5), 20)
    x = words.sample((20_000,))
    assert_mean_close(x, words.mean, min_effect=0.15)
    assert_mean_close((x - words.mean).square(), words.variance, min_effect=0.5)


# Markov sequences -----------------------------------------------------------------------------------------------------

J, U, STEPS = 2, 3, 5
LENGTHS = torch.tensor([5, 1, 3])


class Walk(nn.Module):
    """A transition: a non-linear mean of z and u, and a scale that is one law's or another's."""

    def __init__(self, kind="normal", num_inputs=0):
        super().__init__()
        self.kind = kind
        self.linear, self.scale = nn.Linear(J + num_inputs, J), nn.Linear(J, J)
        if kind == "flow":
            self.flow = affine_autoregressive(J, [4], stable=True)

    def forward(self, z, u=None):
        seen = z
        if u is not None:
            shape = torch.broadcast_shapes(z.shape[:-1], u.shape[:-1])
            seen = torch.cat([z.expand(*shape, J), u.expand(*shape, u.shape[-1])], -1)
        loc, scale = self.linear(seen).tanh(), 0.3 + self.scale(z).sigmoid()
        normal = dist.Normal(loc, scale).to_event(1)
        if self.kind == "normal":
            return normal
        if self.kind == "multivariate":
            root = torch.diag_embed(scale) + torch.tensor([[0.0, 0.0], [0.4, 0.0]])
            return dist.MultivariateNormal(loc, scale_tril=root)
        if self.kind == "flow":
            return dist.TransformedDistribution(normal, [self.flow])
        if self.kind == "positive":
            return dist.LogNormal(loc + 0.1 * z.log(), scale).to_event(1)
        if self.kind == "laplace":
            return dist.Laplace(loc, scale).to_event(1)
        either = dist.Normal(torch.stack([loc, -loc], -2), torch.stack([scale, scale], -2)).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(*loc.shape[:-1], 2)), either)


KINDS = ("normal", "multivariate", "flow", "positive", "laplace")
each_kind = pytest.mark.parametrize("kind", KINDS)


def start(kind="normal", batch=()):
    normal = dist.Normal(torch.linspace(-1, 1, J).expand(*batch, J), 0.8)
    return (dist.LogNormal(normal.loc, 0.5) if kind == "positive" else normal).to_event(1)


def walk(kind="normal", batch=(), lengths=None, inputs=None, steps=STEPS, transition=None):
    transition = transition or Walk(kind, 0 if inputs is None else U)
    return MarkovSequence(start(kind, batch), transition, steps, inputs, lengths)


def by_hand(sequence, z):
    """The definition, for each sequence by itself."""
    lengths = [sequence.num_steps] * len(z) if sequence.valid is None else sequence.valid.sum(-1).tolist()
    totals = []
    for m, (path, length) in enumerate(zip(z, lengths, strict=True)):
        total = sequence.initial.log_prob(path[0])
        total = total[m] if total.ndim else total
        for t in range(1, length):
            u = () if sequence.inputs is None else (sequence.inputs[m, t],)
            total = total + sequence.transition(path[t - 1], *u).log_prob(path[t])
        totals.append(total)
    return torch.stack(totals)


@each_kind
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "ragged"])
@pytest.mark.parametrize("with_inputs", [False, True])
def test_density_of_a_path_is_the_product_of_its_steps(kind, lengths, with_inputs):
    sequence = walk(kind, lengths=lengths, inputs=torch.randn(3, STEPS, U) if with_inputs else None).expand((3,))
    z = sequence.sample().detach().clone()
    close(sequence.log_prob(z), by_hand(sequence, z), 1e-10)
    assert sequence.step_log_prob(z).shape == (3, STEPS)
    close(sequence.step_log_prob(z).sum(-1), sequence.log_prob(z))


def test_a_transition_at_the_wrong_step_is_noticed(monkeypatch):
    def late(self, value):
        return self.initial, self.transition(value[..., 1:, :])

    monkeypatch.setattr(MarkovSequence, "laws", late)
    with pytest.raises(AssertionError):
        test_density_of_a_path_is_the_product_of_its_steps("normal", None, False)


def test_inputs_at_the_wrong_step_are_noticed(monkeypatch):
    def early(self, value):
        return self.initial, self.transition(value[..., :-1, :], self.inputs[..., :-1, :])

    monkeypatch.setattr(MarkovSequence, "laws", early)
    with pytest.raises(AssertionError):
        test_density_of_a_path_is_the_product_of_its_steps("normal", None, True)


def test_densities_of_paths_integrate_to_one():
    """A path's density under itself, as an importance weight against a chain of its own."""
    wide, narrow = (walk(transition=Walk()).expand((40_000,)) for _ in range(2))
    z = wide.sample()
    assert_mean_close((narrow.log_prob(z) - wide.log_prob(z)).exp(), 1.0, min_effect=0.3)


@each_kind
def test_a_draw_is_made_step_by_step_of_its_noise(kind, monkeypatch):
    """The same draws and gradients by the operation and by a loop of laws."""
    if kind == "laplace":
        pytest.skip("no function of normal noise")
    transition, inputs, lengths = Walk(kind, U), torch.randn(3, STEPS, U), LENGTHS
    found = []
    for by_scan in (True, False):
        sequence = walk(kind, (3,), lengths, inputs, transition=transition).expand((4, 3))
        torch.manual_seed(0)
        if by_scan:
            z = sequence.rsample((2,))
        else:
            sequence.rsample((2,))
            noise = sequence._path.noise.detach()
            steps = [_from_noise(sequence.initial, noise[..., 0, :])]
            for t in range(1, STEPS):
                steps.append(_from_noise(transition(steps[-1], inputs[:, t]), noise[..., t, :]))
            valid = (torch.arange(STEPS) < lengths[:, None])[..., None]
            z = torch.where(valid, torch.stack(steps, -2), 0.0)
        assert z.shape == (2, 4, 3, STEPS, J)
        used = list(transition.parameters())
        found.append((z, *torch.autograd.grad(z.sin().sum(), used, allow_unused=True)))
    for a, b in zip(*found, strict=True):
        close(a, b)


def density_of_a_draw(kind, lengths, graded, again):
    """log q of a path that was drawn with or without gradients, and its slopes; of a copy of it if ``again``."""
    torch.manual_seed(0)
    transition = Walk(kind)
    sequence = walk(kind, (3,), lengths, transition=transition).expand((4, 3))
    with torch.set_grad_enabled(graded):
        z = sequence.rsample()
    density = sequence.log_prob(z.clone() if again else z)
    used = list(transition.parameters())
    return density, *torch.autograd.grad(density.sum(), used, allow_unused=True)


@each_kind
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "ragged"])
@pytest.mark.parametrize("graded", [True, False], ids=["with gradients", "without"])
def test_laws_that_a_draw_needed_serve_its_density(kind, lengths, graded):
    """Values and slopes are those of laws computed anew, also where the path was drawn without gradients."""
    for ours, anew in zip(*(density_of_a_draw(kind, lengths, graded, again) for again in (False, True)), strict=True):
        assert (ours is None) == (anew is None)
        if ours is not None:
            close(ours, anew)


def test_a_normal_transition_is_called_once_for_a_draw_and_its_density():
    calls = []
    transition = Walk("normal")
    sequence = walk("normal", (3,), transition=transition)
    z = sequence.rsample()
    transition.register_forward_hook(lambda *_: calls.append(1))
    sequence.log_prob(z)
    assert not calls
    sequence.log_prob(z.clone())
    assert calls


def test_paths_have_the_law_of_the_steps():
    """A linear chain's moments."""

    class Linear(nn.Module):
        def forward(self, z):
            return dist.Normal(0.5 * z + 1.0, 2.0).to_event(1)

    for transition in (Linear(), lambda z: Linear()(z)):
        sequence = MarkovSequence(dist.Normal(torch.ones(1), 0.5).to_event(1), transition, 3)
        z = sequence.sample((20_000,)).squeeze(-1)
        assert_mean_close(z, torch.tensor([1.0, 1.5, 1.75]), min_effect=0.12)
        centred = z - torch.tensor([1.0, 1.5, 1.75])
        variances = torch.tensor([0.25, 0.0625 + 4, 0.25 * 4.0625 + 4])
        assert_mean_close(centred.square(), variances, min_effect=0.4)
        assert_mean_close(centred[:, 1] * centred[:, 2], 0.5 * 4.0625, min_effect=0.3)


@each_kind
def test_padding_is_zero_in_what_is_drawn(kind):
    for transition in (Walk(kind), Walk(kind).forward):
        sequence = walk(kind, lengths=LENGTHS, transition=transition)
        for z in (sequence.sample(), sequence.rsample((4,))):
            valid = torch.arange(STEPS) < LENGTHS[:, None]
            assert (z[..., ~valid, :] == 0).all()
            assert (z[..., valid, :] != 0).all()
            assert z.isfinite().all()


def influence(kind, padding, lengths=LENGTHS):
    """Density and all its gradients, with this in the padding of values and inputs."""
    torch.manual_seed(4)
    transition, z, u = Walk(kind, U), torch.rand(3, STEPS, J) + 0.5, torch.randn(3, STEPS, U)
    beyond = (torch.arange(STEPS) >= lengths[:, None])[..., None]
    z, u = (torch.where(beyond, padding, t).requires_grad_() for t in (z, u))
    sequence = walk(kind, (3,), lengths, u, transition=transition)
    density = sequence.log_prob(z)
    drawn = sequence.rsample()
    leaves = [z, u, *transition.parameters()]
    slopes = torch.autograd.grad(density.sum(), leaves, allow_unused=True, retain_graph=True)
    drawn_slopes = torch.autograd.grad(drawn.sin().sum(), leaves, allow_unused=True)
    return [density, drawn, *(t for t in (*slopes, *drawn_slopes) if t is not None)]


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding", [-1e30, torch.nan])
def test_padding_has_no_influence(kind, dtype, padding):
    torch.set_default_dtype(dtype)
    found, expected = influence(kind, padding), influence(kind, 0.3)
    assert len(found) == len(expected) > 6
    for a, b in zip(found, expected, strict=True):
        assert b.isfinite().all()
        assert torch.equal(a, b)


def test_padding_that_leaks_is_noticed(monkeypatch):
    monkeypatch.setattr(distributions, "steps_within", lambda n, num_steps: torch.ones(*n.shape, num_steps) > 0)
    with pytest.raises(AssertionError):
        test_padding_has_no_influence("normal", torch.float64, 1e30)
    with pytest.raises(AssertionError):
        test_a_ragged_batch_is_each_sequence_by_itself("normal")


@each_kind
def test_a_ragged_batch_is_each_sequence_by_itself(kind):
    inputs = torch.randn(3, STEPS, U)
    together = walk(kind, (3,), LENGTHS, inputs)
    z = together.sample((4,))
    found = together.log_prob(z)
    for m, length in enumerate(LENGTHS.tolist()):
        alone = walk(kind, (), None, inputs[m, :length], length, together.transition)
        close(found[:, m], alone.log_prob(z[:, m, :length]), 1e-10)


@each_kind
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "ragged"])
def test_a_draws_density_is_that_of_any_path(kind, lengths):
    """A flow's kept inverse against its inverse: value, and the derivative along the draw."""
    sequence = walk(kind, (3,), lengths)
    z = sequence.rsample((4,))
    own, other = sequence.log_prob(z), sequence.log_prob(z.clone())
    close(own, other, 1e-9)
    parameters = list(sequence.transition.parameters())
    slopes = [torch.autograd.grad(v.sum(), parameters, retain_graph=True, allow_unused=True) for v in (own, other)]
    for a, b in zip(*slopes, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() < 1e-7


def test_a_flow_is_not_inverted_at_its_own_draws(monkeypatch):
    sequence = walk("flow", (3,))
    sequence.initial = dist.TransformedDistribution(start("normal", (3,)), [sequence.transition.flow])
    z = sequence.rsample()
    monkeypatch.setattr(type(sequence.transition.flow), "_inverse_stable", None)
    monkeypatch.setattr(sequence.transition.flow, "_inverse", None)
    assert sequence.log_prob(z).isfinite().all()
    with pytest.raises(TypeError):
        sequence.log_prob(z.clone())


def test_one_step_is_the_law_of_the_first():
    sequence = walk(steps=1, batch=(3,))
    z = sequence.rsample()
    assert z.shape == (3, 1, J)
    close(sequence.log_prob(z), sequence.initial.log_prob(z[:, 0]))
    close(walk(steps=1, lengths=torch.tensor([1, 1])).log_prob(z[:2]), sequence.log_prob(z)[:2])


def test_shapes_of_sequences():
    sequence = walk(batch=(3,), lengths=LENGTHS, inputs=torch.randn(3, STEPS, U))
    assert (sequence.batch_shape, sequence.event_shape) == ((3,), (STEPS, J))
    assert sequence.expand((4, 3)).rsample((2,)).shape == (2, 4, 3, STEPS, J)
    assert sequence.log_prob(torch.zeros(4, 1, STEPS, J)).shape == (4, 3)
    assert walk().expand((3,)).log_prob(torch.zeros(STEPS, J)).shape == (3,)
    assert walk(lengths=LENGTHS).batch_shape == walk(inputs=torch.randn(3, STEPS, U)).batch_shape == (3,)
    wide = walk().expand((3,)).expand((4, 3))
    assert len(wide.sample().flatten(0, 1).unique(dim=0)) == 12
    close(
        wide.log_prob(torch.ones(4, 3, STEPS, J)),
        walk(transition=wide.transition).log_prob(torch.ones(STEPS, J)).expand(4, 3),
    )


def test_draws_without_gradients_stay_without():
    sequence = walk()
    assert sequence.has_rsample
    assert sequence.rsample().requires_grad
    assert not sequence.sample().requires_grad


def test_a_mixture_is_not_reparameterized_once_it_is_known_to_be_one():
    sequence = walk("mixture")
    sequence.rsample((4,))
    assert not sequence.has_rsample
    assert not sequence.expand((3,)).has_rsample


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MarkovSequence(dist.Normal(0.0, 1.0), Walk(), 3), r"initial: expected a law of event shape \(J,\)"),
        (lambda: walk(steps=0), "num_steps: expected at least 1, got 0"),
        (lambda: walk(inputs=torch.zeros(3, 4, U)), r"inputs: expected shape \(..., 5, U\), got \(3, 4, 3\)"),
        (lambda: walk(inputs=torch.zeros(5)), r"inputs: expected shape \(..., 5, U\), got \(5,\)"),
        (lambda: walk(batch=(4,), lengths=LENGTHS), r"broadcast, got initial \(4,\), inputs \(\), lengths \(3,\)"),
    ],
)
def test_sequences_of_shapes_that_do_not_fit_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_validation_looks_at_steps_and_not_at_padding():
    sequence, z = walk("positive", lengths=LENGTHS), torch.ones(3, STEPS, J)
    z[1, 1:] = -1.0
    assert sequence.log_prob(z).isfinite().all()
    z[0, 4, 1] = -1.0
    with pytest.raises(ValueError, match="support"):
        sequence.log_prob(z)


# One site, or one for each step ---------------------------------------------------------------------------------------


class OneSite(nn.Module):
    """A chain that is seen through noise, as one site and as one site for each step."""

    def __init__(self, prior="normal", guide="normal"):
        super().__init__()
        self.transition, self.combiner = Walk(prior), Walk(guide, U)
        self.encoder, self.decoder = nn.Linear(4, U), nn.Linear(J, 4)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", MarkovSequence(start(), self.transition, x.shape[1]))
            pyro.sample("x", Emissions(lambda z: dist.Normal(self.decoder(z), 0.7).to_event(1), z), obs=x)

    def guide(self, x):
        u = self.encoder(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", MarkovSequence(start(batch=(1,)), self.combiner, x.shape[1], u))

    def model_by_step(self, x):
        z = None
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", start() if z is None else self.transition(z))
                pyro.sample(f"x_{t}", dist.Normal(self.decoder(z), 0.7).to_event(1), obs=x[:, t])

    def guide_by_step(self, x):
        u, z = self.encoder(x), None
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", start() if z is None else self.combiner(z, u[:, t]))


@pytest.mark.parametrize("kind", ["normal", "multivariate", "flow"])
@pytest.mark.parametrize("particles", [1, 3])
def test_one_site_is_a_site_for_each_step(kind, particles):
    """Log weights and the gradient of SGVB, reparameterised, of the same draws."""
    program, x = OneSite(kind, kind), torch.randn(4, STEPS, 4)
    one = log_weights(program.model, program.guide, (x,), num_particles=particles, reparameterized=True)
    z = one.latents["z"]
    assert z.shape == (particles, 4, STEPS, J)
    by_step = {f"z_{t}": z[..., t, :] for t in range(STEPS)}
    each = log_weights(program.model_by_step, program.guide_by_step, (x,), num_particles=particles, latents=by_step)
    close(one.log_w, each.log_w, 1e-9)
    close(one.log_prior["z"], sum(each.log_prior.values()), 1e-9)
    slopes = [
        torch.autograd.grad(w.log_w.sum(), list(program.parameters()), retain_graph=True, allow_unused=True)
        for w in (one, each)
    ]
    for (name, _), a, b in zip(program.named_parameters(), *slopes, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or (a - b).abs().max() < (1e-6 if kind == "flow" else 1e-10), name


def test_a_path_that_is_not_reparameterized_is_refused_by_name():
    program = OneSite(guide="mixture")
    with pytest.raises(ValueError, match="site 'z' is drawn from MarkovSequence, which has no reparameterised"):
        SGVB().differentiable_loss(program.model, program.guide, torch.randn(4, STEPS, 4))


# The divergence along a path ------------------------------------------------------------------------------------------


def joint(sequence):
    """The joint Gaussian of a chain z_t ~ N(A z_{t-1} + b, s^2), (T J), built up of its noise."""
    A, b, scale = sequence.transition.linear.weight, sequence.transition.linear.bias, sequence.transition.scale
    first, width = sequence.initial.base_dist, sequence.num_steps * J
    loc, root = [first.loc], [torch.diag(first.scale) @ torch.eye(J, width)]
    for t in range(1, sequence.num_steps):
        loc.append(A @ loc[-1] + b)
        root.append(A @ root[-1] + scale * torch.eye(width)[t * J : (t + 1) * J])
    whole = torch.cat(root)
    return dist.MultivariateNormal(torch.cat(loc), whole @ whole.T)


class Linear(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.linear, self.scale = nn.Linear(J, J), scale

    def forward(self, z):
        return dist.Normal(self.linear(z), self.scale).to_event(1)


def chain(scale, steps=3, lengths=None, transition=None):
    loc = torch.full((J,), scale)
    return MarkovSequence(dist.Normal(loc, 1.3 * scale).to_event(1), transition or Linear(scale), steps, None, lengths)


def divergences(q, p, n=20_000):
    """Of n draws from q: KL along the path, and log q - log p."""
    with torch.no_grad():
        wide = q.expand((n,))
        z = wide.rsample()
        return kl_divergence(wide, p.expand((n,))), wide.log_prob(z) - p.log_prob(z)


@pytest.mark.parametrize("steps", [1, 3])
def test_divergence_along_paths_is_the_joint_gaussians_in_mean_and_varies_less(steps):
    q, p = chain(0.8, steps), chain(1.2, steps)
    exact = kl_divergence(joint(q), joint(p)).detach()
    along, sampled = divergences(q, p)
    assert_mean_close(along, exact, min_effect=0.15)
    assert_mean_close(sampled, exact, min_effect=0.2)
    assert along.var() < sampled.var()


def test_divergence_without_its_first_step_is_noticed():
    q, p = chain(0.8), chain(1.2)
    along, _ = divergences(q, p)
    planted = along - kl_divergence(q.initial, p.initial)
    with pytest.raises(AssertionError, match="mean"):
        assert_mean_close(planted, kl_divergence(joint(q), joint(p)), min_effect=0.15)


@pytest.mark.parametrize("kind", ["normal", "multivariate", "laplace"])
@pytest.mark.parametrize("as_function", [False, True])
def test_divergence_along_paths_is_the_sampled_one_in_mean(kind, as_function):
    lengths = torch.tensor([3, 1, 2])
    parts = [Walk(kind), Walk(kind)]
    q, p = (walk(kind, (3,), lengths, steps=3, transition=part.forward if as_function else part) for part in parts)
    if kind == "laplace":
        q.initial = p.initial = dist.Laplace(torch.zeros(J), 1.0).to_event(1).expand((3,))
    if kind == "multivariate":
        q.initial = p.initial = dist.MultivariateNormal(torch.zeros(J), torch.eye(J)).expand((3,))
    with torch.no_grad():
        wide = q.expand((8_000, 3))
        z = wide.rsample()
        along, sampled = kl_divergence(wide, p), wide.log_prob(z) - p.log_prob(z)
    assert along.shape == sampled.shape == (8_000, 3)
    assert (along[:, 1] == 0).all()  # of one step, of one law
    assert_mean_close(sampled - along, 0.0, min_effect=0.3)


def test_divergence_of_a_ragged_batch_leaves_out_the_padding():
    q, p = chain(0.8, 3, torch.tensor([3, 1])), chain(1.2, 3)
    z = q.rsample()
    found = kl_divergence(q, p)
    close(found[1], kl_divergence(q.initial, p.initial))
    steps = kl_divergence(q.transition(z[0, :-1]), p.transition(z[0, :-1]))
    close(found[0], kl_divergence(q.initial, p.initial) + steps.sum())


def test_divergence_has_the_gradient_of_the_path():
    """Of its mean: along the path, and of the laws at it."""
    q, p = chain(0.8), chain(1.2)
    parameters = [*q.transition.parameters(), *p.transition.parameters()]
    exact = torch.autograd.grad(kl_divergence(joint(q), joint(p)), parameters)
    found = []
    for _ in range(40):
        wide = q.expand((200,))
        wide.rsample()
        slopes = torch.autograd.grad(kl_divergence(wide, p).mean(), parameters)
        found.append(torch.cat([s.flatten() for s in slopes]))
    assert_mean_close(torch.stack(found), torch.cat([s.flatten() for s in exact]), min_effect=0.4)


def test_divergence_is_not_known_before_a_draw_nor_of_laws_without_one():
    with pytest.raises(NotImplementedError, match="no path was drawn"):
        kl_divergence(chain(0.8), chain(1.2))
    for kind in ("mixture", "flow"):
        q = walk(kind)
        q.rsample()
        with pytest.raises(NotImplementedError):
            kl_divergence(q, walk(kind))


@pytest.mark.parametrize("as_function", [False, True])
def test_estimator_b_takes_it(as_function):
    program, x = OneSite(), torch.randn(4, STEPS, 4)
    if as_function:
        for name in ("transition", "combiner"):
            walked = getattr(program, name)
            del program._modules[name]
            setattr(program, name, walked.forward)
    weights = log_weights(program.model, program.guide, (x,), num_particles=2, analytic_kl=True)
    assert weights.analytic_kl["z"].shape == (2, 4)
    assert not weights.log_prior


# Emissions ------------------------------------------------------------------------------------------------------------

COUNT = 3  # D


class Emitting(nn.Module):
    def __init__(self, kind="bernoulli", num_inputs=0):
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(J + num_inputs, COUNT)

    def forward(self, z, u=None):
        found = self.linear(z if u is None else torch.cat([z, u.expand(*z.shape[:-1], -1)], -1))
        laws = {
            "bernoulli": lambda: dist.Bernoulli(logits=found),
            "gaussian": lambda: dist.Normal(found, 0.6),
            "student-t": lambda: dist.StudentT(3.0, found, 0.6),
            "poisson": lambda: dist.Poisson(found.exp()),
            "gamma": lambda: dist.Gamma(found.exp(), 2.0),
        }
        if self.kind == "multivariate":
            return dist.MultivariateNormal(found, torch.eye(COUNT))
        return laws[self.kind]().to_event(1)


EMITTED = ("bernoulli", "gaussian", "student-t", "poisson", "gamma")
each_emission = pytest.mark.parametrize("kind", EMITTED)


def masked(mask, lengths):
    """What is observed, (3, STEPS, COUNT), by hand."""
    seen = torch.ones(3, STEPS, COUNT, dtype=torch.bool) if mask is None else mask.expand(3, STEPS, COUNT).clone()
    for m, length in enumerate([] if lengths is None else lengths.tolist()):
        seen[m, length:] = False
    return seen


MASKS = {
    "none": lambda: None,
    "elements": lambda: torch.rand(3, STEPS, COUNT) > 0.4,
    "steps": lambda: torch.rand(3, STEPS, 1) > 0.4,
    "of all sequences": lambda: torch.rand(STEPS, COUNT) > 0.4,
}


@each_emission
@pytest.mark.parametrize("what", MASKS)
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "ragged"])
@pytest.mark.parametrize("with_inputs", [False, True])
def test_density_of_emissions_is_the_sum_over_what_is_observed(kind, what, lengths, with_inputs):
    u = torch.randn(3, STEPS, U) if with_inputs else None
    law, mask = Emitting(kind, U if with_inputs else 0), MASKS[what]()
    z = torch.randn(4, 3, STEPS, J)
    emitted = Emissions(law, z, u, lengths, mask)
    x = Emissions(law, z[0], u).sample()
    assert (emitted.batch_shape, emitted.event_shape) == ((4, 3), (STEPS, COUNT))
    elements = law(z, *(() if u is None else (u,))).base_dist.log_prob(x)
    close(emitted.log_prob(x), torch.where(masked(mask, lengths), elements, 0.0).sum((-1, -2)))
    assert emitted.step_log_prob(x).shape == (4, 3, STEPS)


def seen_through(kind, what, garbage, in_padding=False):
    """Density and gradients with this where nothing is observed; in the padding of z and u, too."""
    torch.manual_seed(3)
    law, mask = Emitting(kind, U), MASKS[what]()
    z, u = torch.randn(3, STEPS, J), torch.randn(3, STEPS, U)
    x = Emissions(law, z, u).sample()
    x = torch.where(masked(mask, LENGTHS), x, garbage)
    if in_padding:
        z, u = (torch.where((torch.arange(STEPS) < LENGTHS[:, None])[..., None], t, garbage) for t in (z, u))
    z.requires_grad_()
    density = Emissions(law, z, u, LENGTHS, mask).log_prob(x)
    return density, *torch.autograd.grad(density.sum(), [z, *law.parameters()])


@each_emission
@pytest.mark.parametrize("what", MASKS)
@pytest.mark.parametrize("garbage", [1e30, -1e30, torch.inf, torch.nan])
def test_what_is_not_observed_has_no_influence(kind, what, garbage):
    expected = seen_through(kind, what, 1.0)
    for in_padding in (False, True):
        for a, b in zip(seen_through(kind, what, garbage, in_padding), expected, strict=True):
            assert b.isfinite().all()
            assert torch.equal(a, b)


def test_what_is_observed_has_one():
    """The check above can fail."""
    close(seen_through("gaussian", "none", 5.0)[0], seen_through("gaussian", "none", 1.0)[0])
    law, z = Emitting("gaussian"), torch.randn(3, STEPS, J)
    whole = Emissions(law, z)
    assert (
        whole.log_prob(torch.zeros(3, STEPS, COUNT)) - whole.log_prob(torch.ones(3, STEPS, COUNT))
    ).abs().min() > 0.1


def test_elements_that_are_not_independent_have_no_mask_of_their_own():
    law, z, x = Emitting("multivariate"), torch.randn(3, STEPS, J), torch.randn(3, STEPS, COUNT)
    steps = torch.rand(3, STEPS, 1) > 0.5
    close(Emissions(law, z, mask=steps).log_prob(x), torch.where(steps[..., 0], law(z).log_prob(x), 0.0).sum(-1))
    with pytest.raises(ValueError, match=r"mask: expected one of steps.*MultivariateNormal"):
        Emissions(law, z, mask=torch.rand(3, STEPS, COUNT) > 0.5).log_prob(x)


def test_one_element_has_one_mask():
    law, z, mask = (
        (lambda z: dist.Normal(z[..., :1], 1.0).to_event(1)),
        torch.randn(3, STEPS, J),
        torch.rand(3, STEPS, 1) > 0.5,
    )
    x = torch.randn(3, STEPS, 1)
    close(Emissions(law, z, mask=mask).log_prob(x), torch.where(mask, law(z).base_dist.log_prob(x), 0.0).sum((-1, -2)))


@each_emission
def test_draws_of_emissions_are_zero_in_the_padding(kind):
    law, z = Emitting(kind), torch.zeros(3, STEPS, J)
    with torch.no_grad():
        law.linear.bias.fill_(1.0)
    x = Emissions(law, z, lengths=LENGTHS, mask=torch.zeros(3, STEPS, 1, dtype=torch.bool)).sample((200,))
    valid = torch.arange(STEPS) < LENGTHS[:, None]
    assert x.shape == (200, 3, STEPS, COUNT)
    assert (x[:, ~valid] == 0).all()
    assert (x[:, valid] != 0).any(0).all()
    elements = law(z).base_dist
    spread = elements.stddev if kind != "student-t" else elements.scale * 3**0.5
    gap = (x.mean(0) - elements.mean).abs()[valid] / (spread[valid] / 200**0.5)
    assert gap.max() < 6


def test_each_of_a_batch_of_emissions_is_drawn_by_itself():
    """Also where the latents are one and the same."""
    one = torch.zeros(STEPS, J)
    for emitted in (
        Emissions(Emitting("gaussian"), one, lengths=LENGTHS),
        Emissions(Emitting("gaussian"), one).expand((3,)),
        Emissions(Emitting("gaussian"), one, mask=torch.ones(3, STEPS, 1, dtype=torch.bool)),
    ):
        x = emitted.sample((2,))
        assert x.shape == (2, 3, STEPS, COUNT)
        assert len(x[..., 0, :].flatten(0, 1).unique(dim=0)) == 6
        assert emitted.log_prob(x).shape == (2, 3)
        assert emitted.log_prob(x[0, 0]).shape == (3,)


def test_emissions_are_reparameterized_where_the_law_is():
    z = torch.randn(3, STEPS, J)
    assert Emissions(Emitting("gaussian"), z).has_rsample
    assert Emissions(Emitting("gaussian"), z).rsample().requires_grad
    assert not Emissions(Emitting("poisson"), z).has_rsample


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: Emissions(lambda z: dist.Normal(z.mean(-2), 1.0).to_event(1), torch.zeros(3, STEPS, J)),
            r"law: expected a batch shape \(..., 5\) for z \(3, 5, 2\), got \(3,\)",
        ),
        (
            lambda: Emissions(Emitting(), torch.zeros(4, STEPS, J), lengths=LENGTHS),
            r"broadcast, got z \(4,\), lengths \(3,\), mask \(\)",
        ),
        (
            lambda: Emissions(Emitting(), torch.zeros(4, STEPS, J), mask=torch.ones(3, STEPS, 1) > 0),
            r"broadcast, got z \(4,\), lengths \(\), mask \(3,\)",
        ),
    ],
)
def test_emissions_of_shapes_that_do_not_fit_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_validation_looks_at_what_is_observed():
    emitted = Emissions(Emitting("bernoulli"), torch.zeros(3, STEPS, J), lengths=LENGTHS)
    x = torch.zeros(3, STEPS, COUNT)
    x[1, 1:] = 0.5
    assert emitted.log_prob(x).isfinite().all()
    x[0, 0, 0] = 0.5
    with pytest.raises(ValueError, match="support"):
        emitted.log_prob(x)
