"""Switching dynamics against every path of regimes, one by one."""

import itertools
import warnings

import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.models.switching import SwitchingSequence
from tests import oracles
from tests.statistics import assert_mean_close

S, J, T = 3, 2, 4


def close(left, right, atol=1e-10):
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


def parameters():
    """First regime, moves, first means and scales, A, b, Q: as the oracle takes them."""
    root = 0.4 * torch.randn(S, J, J).tril() + 0.8 * torch.eye(J)
    first, moves = torch.randn(S).softmax(-1), torch.randn(S, S).softmax(-1)
    return (
        first,
        moves,
        torch.randn(S, J),
        torch.rand(S, J) + 0.5,
        torch.randn(S, J, J),
        torch.randn(S, J),
        root @ root.mT,
    )


def sequence(values, num_steps=T, lengths=None):
    first, moves, means, scales, A, b, Q = values
    start = dist.Normal(means, scales).to_event(1)
    return SwitchingSequence(
        start, first.log() + 2.0, moves.log() - 1.0, A, b, torch.linalg.cholesky(Q), num_steps, lengths
    )


def enumerated(values, z, lengths):
    """log p(z), (M,), and p(s_t | z), (M, T, S)."""
    evidence, posterior = [], torch.zeros(*z.shape[:2], S)
    for row, n in enumerate(lengths.tolist()):
        paths = oracles.switching_paths(z[row, :n], *values)
        evidence.append(paths.flatten().logsumexp(0))
        for t in range(n):
            others = [axis for axis in range(n) if axis != t]
            share = (paths - evidence[-1]).exp()
            posterior[row, t] = share.sum(others) if others else share
    return torch.stack(evidence), posterior


# The sequence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[4, 4, 4], [4, 1, 3]])
def test_density_and_posterior_are_those_of_all_paths(lengths):
    values, z, lengths = parameters(), torch.randn(3, T, J), torch.tensor(lengths)
    evidence, posterior = enumerated(values, z, lengths)
    law = sequence(values, lengths=lengths)
    close(law.log_prob(z), evidence)
    close(law.switch_posterior(z), posterior)
    close(law.step_log_prob(z).sum(-1), evidence)
    padded = torch.where(law.valid[..., None], z, 1e4)
    close(law.log_prob(padded), evidence)
    close(law.switch_posterior(padded), posterior)
    close(law.expand((5, 3)).log_prob(z.expand(5, 3, T, J)), evidence.expand(5, 3))


def test_a_steps_density_is_that_given_the_steps_before():
    values, z = parameters(), torch.randn(2, T, J)
    steps = sequence(values).step_log_prob(z)
    for n in range(1, T + 1):
        evidence, _ = enumerated(values, z, torch.full((2,), n))
        close(steps[:, :n].sum(-1), evidence)
        close(sequence(values, n).log_prob(z[:, :n]), evidence)


def test_gradients_are_those_of_all_paths():
    values, z = [value.requires_grad_() for value in parameters()], torch.randn(3, T, J, requires_grad=True)
    lengths = torch.tensor([4, 1, 3])
    expected = torch.autograd.grad(enumerated(values, z, lengths)[0].sum(), [*values, z])
    found = torch.autograd.grad(sequence(values, lengths=lengths).log_prob(z).sum(), [*values, z])
    # The sequence's logits need not sum to one: of probabilities, gradients along the simplex are compared.
    for place, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if place < 2:
            p = values[place].detach()
            theirs = theirs - (theirs * p).sum(-1, keepdim=True)
        close(ours, theirs, atol=1e-9)


@pytest.mark.parametrize("plant", ["transposed moves", "moves with z of the step itself", "no first regime"])
def test_planted_bugs_are_seen(plant):
    values, z, lengths = parameters(), torch.randn(3, T, J), torch.full((3,), T)
    first, moves, *rest = values
    law = sequence(values)
    if plant == "transposed moves":
        law = sequence((first, moves.mT / moves.mT.sum(-1, keepdim=True), *rest))
    elif plant == "no first regime":
        law = sequence((torch.full((S,), 1 / S), moves, *rest))
    else:
        law._densities = lambda value: sequence(values)._densities(value.roll(1, -2))
    assert (law.log_prob(z) - enumerated(values, z, lengths)[0]).abs().max() > 1e-2


def test_draws_have_the_density():
    values = parameters()
    law, n = sequence(values, 2), 60_000
    z, s = law.draw((n,))
    first, moves, means, *_ = values
    for one, two in itertools.product(range(S), range(S)):
        path = (s == torch.tensor([one, two])).all(-1).to(z)
        assert_mean_close(path, first[one] * moves[one, two], min_effect=0.02)
    close(z.mean(0)[0], first @ means, atol=0.03)
    # E_p[q(z) / p(z)] = 1 for any density q
    other = sequence(parameters(), 2)
    narrow = SwitchingSequence(
        other.initial, torch.zeros(S), torch.zeros(S, S), law.weight, law.bias, 0.7 * law.scale_tril, 2
    )
    narrow.initial = law.initial
    assert_mean_close((narrow.log_prob(z) - law.log_prob(z)).exp(), 1.0, min_effect=0.1)
    with pytest.raises(AssertionError):
        assert_mean_close((narrow.log_prob(z.flip(-1)) - law.log_prob(z)).exp(), 1.0, min_effect=0.1)


def test_draws_are_zero_in_the_padding():
    lengths = torch.tensor([1, 4, 2])
    z, s = sequence(parameters(), lengths=lengths).draw((5,))
    assert (z.shape, s.shape) == ((5, 3, T, J), (5, 3, T))
    past = torch.arange(T) >= lengths[:, None]
    assert (z[:, past] == 0).all()
    assert (z[:, ~past] != 0).all()


def test_a_long_sequence_stays_finite():
    values = [value.float() for value in parameters()]
    values[4] = values[4] * 0.2
    law = sequence(values, 1000)
    z = law.sample((2,))
    exact = sequence([value.double() for value in values], 1000)
    torch.testing.assert_close(law.log_prob(z).double(), exact.log_prob(z.double()), rtol=1e-3, atol=0.5)
    close(law.switch_posterior(z).sum(-1).double(), torch.ones(2, 1000), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("initial", dist.Normal(torch.zeros(S), 1.0)),
        ("initial_logits", torch.zeros(S, 1)),
        ("transition_logits", torch.zeros(S)),
        ("weight", torch.zeros(J, J)),
        ("bias", torch.zeros(S)),
        ("scale_tril", torch.zeros(S, J)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name, value):
    law = sequence(parameters())
    given = {"initial": law.initial, "initial_logits": law.log_initial, "transition_logits": law.log_transition}
    given |= {"weight": law.weight, "bias": law.bias, "scale_tril": law.scale_tril}
    with pytest.raises(ValueError, match=f"{name}: expected"):
        SwitchingSequence(**(given | {name: value}), num_steps=T)


# The model ------------------------------------------------------------------------------------------------------------


def regimes(n, num_steps, stay=0.95):
    """Sequences of a system that turns one way or the other, and the regimes that they were in."""
    angle = torch.tensor([0.5, -0.5])
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()], -1), torch.stack([angle.sin(), angle.cos()], -1)], -2)
    moves = torch.tensor([[stay, 1 - stay], [1 - stay, stay]]).log()
    start = dist.Normal(torch.zeros(2, 2), torch.ones(2, 2)).to_event(1)
    root = (0.15 * torch.eye(2)).expand(2, 2, 2)
    law = SwitchingSequence(start, torch.zeros(2), moves, turn, torch.zeros(2, 2), root, num_steps)
    z, s = law.draw((n,))
    return z + 0.1 * torch.randn_like(z), s


def test_it_segments_what_two_regimes_have_made():
    torch.manual_seed(5)
    x, s = regimes(120, 20)
    lengths = torch.randint(10, 21, (120,))
    model = pv.SwitchingLDS(data_dim=2, latent_dim=2, num_states=2, rnn_dim=12)
    options = {"optimizer": "adam", "learning_rate": 0.03, "batch_size": 30, "epochs": 40, "progress": False}
    before = pv.SGVB(5).bound(model.model, model.guide, x, lengths).mean()
    pv.fit(model, {"x": x, "lengths": lengths}, **options)
    with torch.no_grad():
        assert pv.SGVB(5).bound(model.model, model.guide, x, lengths).mean() > before + 5
        z = model.encode(x, lengths).expand((20, 120)).sample()
        found = model.switch_posterior(z, lengths).mean(0).argmax(-1)
    valid = torch.arange(20) < lengths[:, None]
    right = (found == s)[valid].double().mean().item()
    assert max(right, 1 - right) > 0.9


def test_weights_are_a_loop_over_steps_by_hand():
    model = pv.SwitchingLDS(3, 2, 2, rnn_dim=5)
    x, lengths = torch.randn(4, 5, 3), torch.tensor([5, 1, 3, 4])
    weights = pv.log_weights(model.model, model.guide, (x, lengths), num_particles=2)
    z, guide = weights.latents["z"], model.encode(x, lengths)
    Q = torch.diag_embed((2 * model.log_scale).exp())
    values = model.initial_logits.softmax(-1), model.transition_logits.softmax(-1), model.initial_loc
    values = *values, model.initial_log_scale.exp(), model.weight, model.bias, Q
    for k, m in itertools.product(range(2), range(4)):
        n = int(lengths[m])
        expected = oracles.switching_paths(z[k, m, :n], *values).flatten().logsumexp(0)
        for t in range(n):
            states = model.rnn(torch.cat([x, torch.ones_like(x)], -1), lengths)[m, t]
            before = model.z_q_0 if t == 0 else z[k, m, t - 1]
            expected = expected + model.emission(z[k, m, t]).log_prob(x[m, t])
            expected = expected - model.combiner(before, states).log_prob(z[k, m, t])
        close(weights.log_w[k, m], expected)
    assert guide.batch_shape == (4,)


@pytest.mark.parametrize("emission", ["linear", "bernoulli", "student-t"])
def test_emissions_masks_and_objectives(emission):
    model = pv.SwitchingLDS(3, 2, 2, emission=emission, emission_dim=4, rnn_dim=5)
    x, lengths = model.sample(6, 5), torch.randint(1, 6, (6,))
    given = {"x": x, "lengths": lengths, "mask": torch.rand(6, 5, 3) < 0.7}
    assert model.sample(6, 5, mean=True).shape == x.shape
    for objective in (pv.IWAE(2), pv.DReG(2), pv.WakeSleep()):
        assert objective.differentiable_loss(model.model, model.guide, **given).isfinite()
    with pytest.warns(UserWarning, match=r"no analytic KL at sites \['z'\]"):
        pv.SGVB(estimator="B").bound(model.model, model.guide, **given)
    other = given | {"x": torch.where(given["mask"], x, 1.0)}
    with torch.random.fork_rng():
        expected = pv.SGVB().bound(model.model, model.guide, **given)
    close(pv.SGVB().bound(model.model, model.guide, **other), expected)


def test_latents_can_be_moved():
    model, x = pv.SwitchingLDS(3, 2, 2, rnn_dim=5), torch.randn(3, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few particles
        ais = pv.log_marginal(model, x, method="ais", num_particles=10, num_steps=20, num_leapfrog=2, num_pilot=4)
        importance = pv.log_marginal(model, x, num_particles=20_000)
    close(ais.values.mean(), importance.values.mean(), atol=0.5)


def test_config_builds_the_same_architecture(tmp_path):
    model = pv.SwitchingLDS(3, 2, 4, rnn_dim=5, emission="gaussian", emission_dim=6, stickiness=0.7)
    x = model.sample(6, 4)
    close(model.transition_logits.softmax(-1).diagonal(), torch.full((4,), 0.7))
    pv.fit(model, x, epochs=1, run_dir=tmp_path, progress=False)
    z = torch.randn(6, 4, 2)
    close(pv.load_run(tmp_path).program.prior(4).log_prob(z), model.prior(4).log_prob(z))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_states": 0}, "num_states: expected a whole number"),
        ({"emission": "cauchy"}, "emission: expected one of linear"),
        ({"cell": "rnn"}, "cell: expected one of"),
        ({"stickiness": 1.0}, "stickiness: expected a number between 0 and 1"),
    ],
)
def test_bad_arguments_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        pv.SwitchingLDS(**({"data_dim": 2, "latent_dim": 2, "num_states": 2} | changes))


def test_inputs_are_refused():
    model = pv.SwitchingLDS(2, 2, 2)
    with pytest.raises(ValueError, match="inputs: expected None"):
        model.prior(3, inputs=torch.zeros(2, 3, 1))
