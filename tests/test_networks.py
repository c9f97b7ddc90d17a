"""The paper's MLPs, by their shapes, widths, activations and initial values; recurrent ones, against torch's own."""

import itertools

import pytest
import torch
from torch import nn

from pyro_vae.networks import ACTIVATIONS, CELLS, MLP, GaussianMLP, Recurrent, init_paper, recurrent


def linear_layers(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("leading", [(), (1,), (5,), (3, 5), (2, 3, 5)])
def test_leading_dimensions_pass_through(leading):
    x = torch.randn(*leading, 4)
    assert MLP(4, (6,), 3)(x).shape == (*leading, 3)
    assert [t.shape for t in GaussianMLP(4, (6,), 3)(x)] == [(*leading, 3)] * 2


@pytest.mark.parametrize("hidden", [(), (6,), (6, 5), (7, 6, 5)])
def test_widths(hidden):
    dims = (4, *hidden, 3)
    layers = linear_layers(MLP(4, hidden, 3))
    assert [(layer.in_features, layer.out_features) for layer in layers] == list(itertools.pairwise(dims))


def test_each_row_is_its_own():
    network, x = MLP(4, (6,), 3), torch.randn(2, 5, 4)
    one_by_one = torch.stack([network(row) for row in x.reshape(10, 4)]).reshape(2, 5, 3)
    torch.testing.assert_close(network(x), one_by_one, rtol=0, atol=1e-14)


FORMULAS = {"tanh": torch.tanh, "relu": lambda a: a.clamp_min(0), "softplus": lambda a: (1 + a.exp()).log()}


def test_every_activation_has_a_formula_here():
    assert FORMULAS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("activation", FORMULAS)
def test_mlp_by_hand(activation):
    network, x = MLP(4, (6, 5), 3, activation), torch.randn(7, 4)
    first, second, last = linear_layers(network)
    act = FORMULAS[activation]
    h = act(act(x @ first.weight.T + first.bias) @ second.weight.T + second.bias)
    torch.testing.assert_close(network(x), h @ last.weight.T + last.bias, rtol=0, atol=1e-13)


def test_gaussian_mlp_gives_mean_and_standard_deviation():
    """Eq. (12): the second linear map is log sigma^2, so the standard deviation is exp(half of it)."""
    network, x = GaussianMLP(4, (6,), 3), torch.randn(7, 4)
    hidden, last = linear_layers(network)
    out = (x @ hidden.weight.T + hidden.bias).tanh() @ last.weight.T + last.bias
    loc, scale = network(x)
    torch.testing.assert_close(loc, out[:, :3], rtol=0, atol=1e-13)
    torch.testing.assert_close(scale.square().log(), out[:, 3:], rtol=0, atol=1e-13)


def test_init_paper_draws_every_parameter_with_standard_deviation_a_tenth():
    """Sec. 5: N(0, 0.01) is a variance."""
    network = MLP(300, (200, 200), 100)
    init_paper(network)
    for parameter in network.parameters():
        n = parameter.numel()
        assert parameter.requires_grad
        assert abs(parameter.mean().item()) < 5 * 0.1 / n**0.5
        assert abs(parameter.std().item() - 0.1) < 5 * 0.1 / (2 * n) ** 0.5


# Recurrent networks ---------------------------------------------------------------------------------------------------

D, H = 3, 4


def blocks(tensor, order):
    """Gates in another order."""
    return torch.cat([tensor.chunk(len(order), 0)[place] for place in order])


def pair(kind, backwards=False):
    """A network of this package and torch's with the same weights: forwards, whichever way the first one reads."""
    ours = Recurrent(D, H, kind, backwards)
    if kind in ("tanh", "relu"):
        theirs, order = nn.RNN(D, H, nonlinearity=kind, batch_first=True), [0]
    elif kind == "gru":
        theirs, order = nn.GRU(D, H, batch_first=True), [0, 1, 2]
    else:
        theirs, order = nn.LSTM(D, H, batch_first=True), [0, 1, 3, 2]  # torch has the new values before the output gate
    with torch.no_grad():
        ours.start.zero_()
        ours.inputs.weight.copy_(blocks(theirs.weight_ih_l0, order))
        ours.cell.hidden.weight.copy_(blocks(theirs.weight_hh_l0, order))
        if kind == "gru":
            ours.inputs.bias.copy_(theirs.bias_ih_l0)
            ours.cell.hidden.bias.copy_(theirs.bias_hh_l0)
        else:
            ours.inputs.bias.copy_(blocks(theirs.bias_ih_l0 + theirs.bias_hh_l0, order))
    return ours, theirs


def same(left, right, atol=1e-12):
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


each_cell = pytest.mark.parametrize("kind", CELLS)


@each_cell
@pytest.mark.parametrize("backwards", [False, True])
def test_recurrent_is_torchs_own_in_value_and_gradient(kind, backwards):
    ours, theirs = pair(kind, backwards)
    x = torch.randn(5, 6, D, requires_grad=True)
    states = theirs(x.flip(1) if backwards else x)[0]
    expected = states.flip(1) if backwards else states
    same(ours(x), expected)
    weights = torch.randn_like(expected)
    (a,), (b,) = (torch.autograd.grad((weights * y).sum(), x, retain_graph=True) for y in (ours(x), expected))
    same(a, b)
    (weights * ours(x)).sum().backward()
    (weights * expected).sum().backward()
    order = [0, 1, 3, 2] if kind == "lstm" else range(3 if kind == "gru" else 1)
    same(ours.cell.hidden.weight.grad, blocks(theirs.weight_hh_l0.grad, order))
    same(ours.inputs.weight.grad, blocks(theirs.weight_ih_l0.grad, order))


@each_cell
def test_recurrent_begins_where_it_learns_to(kind):
    ours, theirs = pair(kind)
    with torch.no_grad():
        ours.start.normal_()
    start = ours.start.detach().expand(1, 5, -1).contiguous()
    start = tuple(part.contiguous() for part in start.chunk(2, -1)) if kind == "lstm" else start
    x = torch.randn(5, 6, D)
    same(ours(x), theirs(x, start)[0])
    (slope,) = torch.autograd.grad(ours(x).sum(), ours.start)
    assert slope.abs().min() > 0


@each_cell
@pytest.mark.parametrize("backwards", [False, True])
def test_a_ragged_batch_is_each_sequence_by_itself(kind, backwards):
    network, lengths = Recurrent(D, H, kind, backwards), torch.tensor([6, 1, 4, 3])
    x = torch.randn(4, 6, D)
    states = network(x, lengths)
    assert states.shape == (4, 6, H)
    for row, length, found in zip(x, lengths, states, strict=True):
        same(found[:length], network(row[None, :length])[0])


@each_cell
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("garbage", [1e30, torch.inf, torch.nan])
def test_padding_has_no_influence_on_a_network(kind, backwards, garbage):
    network, lengths = Recurrent(D, H, kind, backwards), torch.tensor([6, 1, 4])
    within = (torch.arange(6) < lengths[:, None])[..., None]

    def slopes(padding):
        x = torch.where(within, torch.linspace(-1, 1, 3 * 6 * D).reshape(3, 6, D), padding).requires_grad_()
        states = torch.where(within, network(x, lengths), 0.0)
        return states, *torch.autograd.grad(states.sin().sum(), [x, *network.parameters()])

    for a, b in zip(slopes(garbage), slopes(0.0), strict=True):
        same(a, b, 0)


def test_leading_dimensions_of_a_recurrent_network():
    network, x = Recurrent(D, H, "gru", backwards=True), torch.randn(2, 4, 6, D)
    lengths = torch.tensor([6, 1, 4, 3])
    one_by_one = torch.stack([network(part, lengths) for part in x])
    same(network(x, lengths), one_by_one)
    same(network(x[0, 0]), network(x[:1, 0])[0])


def test_sequences_are_reversed_within_their_lengths():
    x = torch.arange(1, 11).reshape(2, 5, 1)
    found = recurrent.reversed_within(x, torch.tensor([3, 5])).squeeze(-1)
    assert found.tolist() == [[3, 2, 1, 4, 5], [10, 9, 8, 7, 6]]
    assert torch.equal(recurrent.reversed_within(x, None), x.flip(1))
    assert torch.equal(recurrent.reversed_within(found[..., None], torch.tensor([3, 5])), x)


def test_a_reversal_that_ignores_lengths_is_noticed(monkeypatch):
    monkeypatch.setattr(recurrent, "reversed_within", lambda x, lengths: x.flip(-2))
    with pytest.raises(AssertionError):
        test_a_ragged_batch_is_each_sequence_by_itself("gru", True)
