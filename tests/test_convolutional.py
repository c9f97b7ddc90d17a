"""Convolutional networks: against convolutions by scipy, datum by datum, and for images of every size."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d, correlate2d
from torch import Tensor, nn

from pyro_vae.compile import capture
from pyro_vae.networks import ConvDecoder, ConvEncoder, convolutional

J = 3
SHAPES = [(1, 1), (1, 6), (2, 3), (7, 5), (28, 28), (28, 20), (3, 4, 1), (32, 32, 3), (33, 17, 3)]
SMALL = [(1, 1), (1, 6), (2, 3), (7, 5), (9, 7, 3)]

each_kind = pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_small_shape = pytest.mark.parametrize("shape", SMALL, ids=str)


def channels_for(shape):
    return (4, 6) if min(shape[:2]) > 2 else (4,)


def pair(shape, residual, num_parameters=2, activation="tanh"):
    """An encoder to 2 J numbers and its decoder; smooth ones, for a ReLU's gradient may be zero for good reasons."""
    channels = channels_for(shape)
    encoder = ConvEncoder(shape, 2 * J, channels, 11, activation, residual)
    return encoder, ConvDecoder(J, shape, num_parameters, channels[::-1], 11, activation, residual)


def same(left, right, atol=1e-12):
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


# Shapes ---------------------------------------------------------------------------------------------------------------


@each_kind
@each_shape
def test_shapes(shape, residual):
    encoder, decoder = pair(shape, residual)
    for leading in [(), (1,), (2,), (3, 2), (0,)]:
        assert encoder(torch.rand(*leading, *shape)).shape == (*leading, 2 * J)
        assert decoder(torch.randn(*leading, J)).shape == (*leading, 2, *shape)


def test_as_they_come():
    assert ConvEncoder((28, 28), 40)(torch.rand(2, 28, 28)).shape == (2, 40)
    assert ConvDecoder(20, (28, 28))(torch.randn(2, 20)).shape == (2, 1, 28, 28)
    widths = [layer.out_channels for layer in ConvEncoder((28, 28), 40).modules() if isinstance(layer, nn.Conv2d)]
    assert widths == [32, 64]


@each_kind
def test_single_precision(residual):
    encoder, decoder = (network.float() for network in pair((7, 5), residual))
    assert encoder(torch.rand(2, 7, 5).float()).dtype == torch.float32
    assert decoder(torch.randn(2, J).float()).dtype == torch.float32


def halvings(side):
    return 0 if side == 1 else 1 + halvings((side + 1) // 2)


@pytest.mark.parametrize("height", range(1, 10))
@pytest.mark.parametrize("width", [1, 2, 5, 8, 9])
def test_as_many_levels_as_halve_the_shorter_side_to_one(height, width):
    most = max(1, halvings(min(height, width)))
    for levels in range(1, most + 1):
        features = nn.Sequential(*ConvEncoder((height, width), 1, [2] * levels, 1).layers[:-2])
        found = features(torch.rand(1, 1, height, width)).shape[2:]
        assert found == (math.ceil(height / 2**levels), math.ceil(width / 2**levels))
        assert ConvDecoder(1, (height, width), 1, [2] * levels, 1)(torch.rand(1)).shape == (1, height, width)
    for build, dims in ((ConvEncoder, ((height, width), 1)), (ConvDecoder, (1, (height, width)))):
        with pytest.raises(ValueError, match=rf"^channels: expected at most {most} levels? for"):
            build(*dims, channels=[2] * (most + 1))


# By hand --------------------------------------------------------------------------------------------------------------


def of_kind(network, kind):
    return [module for module in network.modules() if isinstance(module, kind)]


def numbers(*parameters):
    return [0.0 if parameter is None else parameter.detach().numpy() for parameter in parameters]


def convolved(image, layer):
    """An image (C, H, W), zero outside, correlated with the layer's kernels."""
    weight, bias = numbers(layer.weight, layer.bias)
    sums = [sum(correlate2d(a, b, "same") for a, b in zip(image, kernels, strict=True)) for kernels in weight]
    return np.stack(sums) + np.reshape(bias, (-1, 1, 1))


def spread(image, layer, size):
    """Each pixel (i, j) adds its multiple of the kernel at (2 i - 1 or 2 i - 2, ...), that it sits in the middle."""
    weight, bias = numbers(layer.weight, layer.bias)
    apart = np.zeros((len(image), *(2 * side - 1 for side in image.shape[1:])))
    apart[:, ::2, ::2] = image
    sums = [sum(convolve2d(a, b) for a, b in zip(apart, kernels, strict=True)) for kernels in weight.swapaxes(0, 1)]
    top, left = (2 if side % 2 else 1 for side in size)
    return np.stack(sums)[:, top : top + size[0], left : left + size[1]] + bias[:, None, None]


def normalised(image, layer):
    """Each group of channels has mean 0 and variance 1, before the scale and the shift of each channel."""
    groups = image.reshape(layer.num_groups, -1)
    groups = (groups - groups.mean(1, keepdims=True)) / np.sqrt(groups.var(1, keepdims=True) + 1e-5)
    weight, bias = numbers(layer.weight, layer.bias)
    return groups.reshape(image.shape) * weight[:, None, None] + bias[:, None, None]


def blocks(network):
    """The activations between the levels, or the residual blocks in their place."""
    norms = of_kind(network, nn.GroupNorm)
    if not norms:
        return itertools.repeat(np.tanh)
    kept = [layer for layer in of_kind(network, nn.Conv2d) if layer.stride == (1, 1)]
    parts = zip(norms[::2], kept[::2], norms[1::2], kept[1::2], strict=True)

    def block(image, first_norm, first, second_norm, second):
        inner = convolved(np.tanh(normalised(image, first_norm)), first)
        return image + convolved(np.tanh(normalised(inner, second_norm)), second)

    return [lambda image, part=part: block(image, *part) for part in parts]


def perceived(network, x):
    (a, b), (c, d) = (numbers(layer.weight, layer.bias) for layer in of_kind(network, nn.Linear))
    return c @ np.tanh(a @ x + b) + d


def encoded(encoder, x):
    image = np.moveaxis(np.atleast_3d(x), -1, 0)
    for layer, block in zip(
        [c for c in of_kind(encoder, nn.Conv2d) if c.stride == (2, 2)], blocks(encoder), strict=False
    ):
        image = block(convolved(image, layer)[:, ::2, ::2])
    return perceived(encoder, image.ravel())


def decoded(decoder, z, shape, num_parameters):
    sizes = [tuple(math.ceil(side / 2**level) for side in shape[:2]) for level in (2, 1, 0)]
    image = perceived(decoder, z).reshape(-1, *sizes[0])
    for layer, block, size in zip(of_kind(decoder, nn.ConvTranspose2d), blocks(decoder), sizes[1:], strict=False):
        image = spread(block(image), layer, size)
    return np.moveaxis(image.reshape(num_parameters, -1, *shape[:2]), 1, -1).reshape(num_parameters, *shape)


def shaken(network):
    """With norms that scale and shift, as after a step of training."""
    with torch.no_grad():
        for norm in of_kind(network, nn.GroupNorm):
            norm.weight.normal_()
            norm.bias.normal_()
    return network


@each_kind
@pytest.mark.parametrize("shape", [(9, 7), (8, 7, 3), (12, 16, 2)], ids=str)
def test_networks_by_hand(shape, residual):
    encoder, decoder = map(shaken, pair(shape, residual))
    assert bool(of_kind(encoder, nn.GroupNorm)) == bool(of_kind(decoder, nn.GroupNorm)) == residual
    x, z = torch.rand(2, *shape), torch.randn(2, J)
    for ours, datum in zip(encoder(x), x, strict=True):
        same(ours, torch.tensor(encoded(encoder, datum.numpy())))
    for ours, latent in zip(decoder(z), z, strict=True):
        same(ours, torch.tensor(decoded(decoder, latent.numpy(), shape, 2)))


def test_pixels_read_as_if_colours_came_first_are_noticed(monkeypatch):
    movedim = Tensor.movedim
    monkeypatch.setattr(Tensor, "movedim", lambda x, *dims: x.reshape(movedim(x, *dims).shape))
    with pytest.raises(AssertionError):
        test_networks_by_hand((8, 7, 3), False)
    with pytest.raises(AssertionError):
        test_colours_are_the_last_dimension()


def test_colours_are_the_last_dimension():
    encoder, x, order = pair((7, 5, 3), False)[0], torch.rand(4, 7, 5, 3), [2, 0, 1]
    expected = encoder(x)
    first = encoder.layers[0].weight
    with torch.no_grad():
        first.copy_(first[:, order])
    same(encoder(x[..., order]), expected)
    assert not torch.allclose(encoder(x), expected)


def test_a_decoder_gives_parameters_first_and_colours_last():
    decoder = pair((7, 5, 3), False)[1]
    with torch.no_grad():
        decoder.layers[-1].weight.zero_()
        decoder.layers[-1].bias.copy_(torch.arange(6.0))
    loc, other = decoder(torch.randn(4, J)).unbind(-4)
    same(loc, torch.tensor([0.0, 1.0, 2.0]).expand(4, 7, 5, 3))
    same(other, torch.tensor([3.0, 4.0, 5.0]).expand(4, 7, 5, 3))


# Each datum for itself ------------------------------------------------------------------------------------------------


def gradients(value, tensors):
    return torch.autograd.grad(value, tensors)


@each_kind
@each_small_shape
def test_a_datum_does_not_depend_on_its_neighbours(shape, residual):
    encoder, decoder = pair(shape, residual)
    for network, datum in ((encoder, torch.rand(*shape)), (decoder, torch.randn(J))):

        def of_datum(neighbours, network=network, datum=datum):
            x = datum.clone().requires_grad_()
            result = network(torch.stack([x, *neighbours]))[0]
            return result, *gradients(result.sin().sum(), [x, *network.parameters()])

        alone = of_datum([])
        for neighbours in (torch.randn(1, *datum.shape), 100 * torch.randn(5, *datum.shape)):
            for ours, expected in zip(of_datum(neighbours), alone, strict=True):
                same(ours, expected)


def test_a_norm_over_the_batch_is_noticed(monkeypatch):
    monkeypatch.setattr(convolutional, "_norm", lambda width, size: nn.BatchNorm2d(width))
    with pytest.raises(AssertionError):
        test_a_datum_does_not_depend_on_its_neighbours((7, 5), True)


@each_kind
def test_particles_are_each_their_own(residual):
    encoder, decoder = pair((7, 5, 2), residual)
    for network, x in ((encoder, torch.rand(3, 2, 4, 7, 5, 2)), (decoder, torch.randn(3, 2, 4, J))):
        one_by_one = torch.stack([torch.stack([torch.stack([network(c) for c in b]) for b in a]) for a in x])
        same(network(x), one_by_one)


# What depends on what -------------------------------------------------------------------------------------------------


@each_kind
@each_small_shape
def test_every_parameter_has_a_gradient(shape, residual):
    """Of its tensor, if a kernel's edge falls outside of a small image; of each number otherwise."""
    encoder, decoder = pair(shape, residual)
    for network, x in ((encoder, torch.randn(8, *shape)), (decoder, torch.randn(8, J))):
        for name, parameter in network.named_parameters():
            (slope,) = gradients(network(x).sin().sum(), parameter)
            assert slope.abs().max() > 1e-6, name
            assert min(shape[:2]) < 5 or slope.abs().min() > 1e-12, name


def test_a_bias_that_a_norm_takes_away_is_noticed(monkeypatch):
    class Biased(nn.Conv2d):
        def __init__(self, *args, bias=True, **options):
            super().__init__(*args, **options)

    monkeypatch.setattr(convolutional.nn, "Conv2d", Biased)
    with pytest.raises(AssertionError):
        test_every_parameter_has_a_gradient((7, 5), True)


@each_kind
@each_small_shape
def test_an_encoder_sees_every_pixel(shape, residual):
    encoder, x = pair(shape, residual)[0], torch.randn(4, *shape, requires_grad=True)
    (slope,) = gradients(encoder(x).sin().sum(), x)
    assert slope.abs().min() > 1e-8


def test_an_encoder_that_skips_pixels_is_noticed(monkeypatch):
    conv = nn.Conv2d
    monkeypatch.setattr(convolutional.nn, "Conv2d", lambda a, b, size, stride, padding: conv(a, b, 1, stride))
    with pytest.raises(AssertionError):
        test_an_encoder_sees_every_pixel((7, 5), False)


@each_kind
@each_small_shape
def test_every_pixel_depends_on_every_latent(shape, residual):
    decoder = pair(shape, residual)[1]
    slopes = torch.autograd.functional.jacobian(decoder, torch.randn(J))
    assert slopes.shape == (2, *shape, J)
    assert slopes.abs().min() > 1e-8


def test_a_decoder_that_leaves_holes_is_noticed(monkeypatch):
    def sparse(width, next_width, next_size):
        return nn.ConvTranspose2d(width, next_width, 1, stride=2, output_padding=[1 - side % 2 for side in next_size])

    monkeypatch.setattr(convolutional, "_doubling", sparse)
    with pytest.raises(AssertionError):
        test_every_pixel_depends_on_every_latent((7, 5), False)


def test_pixels_are_sums_over_as_many_of_the_smaller_image():
    """Away from the edges: 2 x 2. It is what keeps a checkerboard out of a picture of equal weights."""
    for size in [(12, 16), (11, 15), (12, 15)]:
        layer = convolutional._doubling(1, 1, size)
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
        counts = layer(torch.ones(1, 1, *(math.ceil(side / 2) for side in size)))[0, 0]
        assert counts.shape == size
        assert torch.equal(counts[2:-2, 2:-2], torch.full((size[0] - 4, size[1] - 4), 4.0))


# Normalisation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "size", "groups"),
    [
        (32, (14, 14), 8),
        (12, (7, 7), 6),
        (11, (7, 7), 1),
        (6, (3, 2), 3),
        (4, (1, 2), 1),
        (16, (1, 1), 2),
        (8, (1, 1), 1),
        (7, (1, 1), None),
        (1, (2, 3), None),
        (1, (3, 3), 1),
    ],
)
def test_groups_divide_the_channels_and_keep_enough_values(width, size, groups):
    norm = convolutional._norm(width, size)
    assert (norm.num_groups if isinstance(norm, nn.GroupNorm) else None) == groups


def test_groups_are_those_of_each_level():
    groups = [[norm.num_groups for norm in of_kind(network, nn.GroupNorm)] for network in pair((5, 5), True)]
    assert groups == [[4, 4, 3, 3], [3, 3, 4, 4]]  # 4 channels of 3 x 3, and 6 of 2 x 2


def test_a_convolution_has_a_bias_unless_a_norm_follows():
    for size, biased in [((3, 3), [False, True]), ((1, 1), [True, True])]:
        block = convolutional._ResidualBlock(2, size, "tanh")
        assert [layer.bias is not None for layer in of_kind(block, nn.Conv2d)] == biased


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("width", [1, 2, 3, 8, 16])
def test_a_block_depends_on_its_image(width, size):
    """By more than its skip connection, and by more than which value is the greater one."""
    block = convolutional._ResidualBlock(width, size, "tanh")
    x = torch.randn(16, width, *size, requires_grad=True)
    (slope,) = gradients((block(x) - x).square().sum(), x)
    assert slope.square().mean().sqrt() > 1e-3


@pytest.mark.parametrize(("width", "groups"), [(16, 16), (2, 1)], ids=["one value a group", "two"])
def test_a_norm_of_too_few_values_is_noticed(width, groups, monkeypatch):
    monkeypatch.setattr(convolutional, "_norm", lambda width, size: nn.GroupNorm(groups, width))
    with pytest.raises(AssertionError):
        test_a_block_depends_on_its_image(width, (1, 1))


# Recording and learning -----------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("shape", [(1, 1), (9, 7, 3)], ids=str)
def test_networks_are_recorded_with_their_gradients(shape, residual):
    for network, event in zip(pair(shape, residual, activation="relu"), (shape, (J,)), strict=True):
        parameters = list(network.parameters())

        def slopes(x, network=network, parameters=parameters):
            result = network(x)
            return result.detach(), *gradients(result.sin().sum(), parameters)

        graph = capture(slopes, [torch.randn(3, 2, *event)], parameters)
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.1 * torch.randn_like(parameter))
        x = torch.randn(3, 2, *event)
        for ours, expected in zip(graph(x), slopes(x), strict=True):
            same(ours, expected)


@each_kind
def test_eight_images_are_learned(residual):
    x = torch.rand(8, 9, 7)
    encoder = ConvEncoder((9, 7), 8, (16, 32), 64, "tanh", residual)
    decoder = ConvDecoder(8, (9, 7), 1, (32, 16), 64, "tanh", residual)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=3e-3)
    for _ in range(200):
        error = (decoder(encoder(x)).squeeze(-3) - x).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert error < 0.01 * x.var(0).mean()


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(), (28,), (2, 2, 2, 2), (28, 0), (28, -1), (28, 28.0), (28, True), 784, "28", None, (28, None)], ids=repr
)
def test_shapes_that_are_no_images_are_refused(shape):
    expected = re.escape(f"convolutions, positive whole numbers, got {shape!r}")
    for build in (lambda: ConvEncoder(shape, 1), lambda: ConvDecoder(1, shape)):
        with pytest.raises(ValueError, match=rf"^data_shape: expected \(H, W\) or \(H, W, C\) for {expected}$"):
            build()


@pytest.mark.parametrize("channels", [(), [], (0,), (8, -1), (8.0,), (True,), 8, "88", None], ids=repr)
def test_channels_that_are_none_are_refused(channels):
    said = re.escape(f"channels: expected at least one level, positive whole numbers, got {channels!r}")
    for build in (lambda: ConvEncoder((28, 28), 1, channels), lambda: ConvDecoder(1, (28, 28), 1, channels)):
        with pytest.raises(ValueError, match=f"^{said}$"):
            build()


def test_too_many_levels_are_refused_by_how_many_work():
    said = "channels: expected at most 5 levels for images of 28 x 30, whose sides each level halves, got 6"
    with pytest.raises(ValueError, match=f"^{said}$"):
        ConvEncoder((28, 30), 1, [2] * 6)
    said = "channels: expected at most 1 level for images of 2 x 3, whose sides each level halves, got 2"
    with pytest.raises(ValueError, match=f"^{said}$"):
        ConvDecoder(1, (2, 3, 3))


def test_images_of_another_shape_are_refused():
    """A row less, and the features would be as many."""
    encoder = ConvEncoder((28, 28), 1, (2,), 3)
    for shape in [(4, 27, 28), (28,), (), (4, 28, 28, 1)]:
        with pytest.raises(ValueError, match=rf"^x: expected \(\.\.\., 28, 28\), got {re.escape(str(shape))}$"):
            encoder(torch.zeros(shape))


def test_numpys_whole_numbers_will_do():
    assert ConvEncoder(np.array([7, 5]).tolist(), 2, tuple(np.array([2, 3])), 4)(torch.rand(7, 5)).shape == (2,)
    assert ConvDecoder(J, tuple(np.array([7, 5])), 1, (3, 2), 4)(torch.rand(J)).shape == (1, 7, 5)
