"""Shapes, widths, activations and initialisation of the paper's MLPs."""

import itertools

import pytest
import torch
from torch import nn

from pyro_vae.networks import ACTIVATIONS, MLP, GaussianMLP, init_paper


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
