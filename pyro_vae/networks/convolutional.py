r"""Convolutional encoders and decoders of images, plain and residual.

Each entry of ``channels`` is a level that halves the image, H -> ceil(H / 2), by a convolution of stride 2 in place of
pooling (Radford et al., arXiv:1511.06434, Sec. 3); the decoder goes through the encoder's sizes in reverse, whatever
they are. Between the levels stands an activation, or a residual block of the pre-activation kind (He et al.,
arXiv:1603.05027, eq. (3)):

    x_{l+1} = x_l + F(x_l),    F = conv . activation . norm . conv . activation . norm

with group normalisation (Wu & He, arXiv:1803.08494, Sec. 3). Nothing is normalised over a batch: what a network gives
for a datum must not depend on the data beside it, or else a bound per datum is none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from torch import Tensor, nn

from pyro_vae.networks.mlp import ACTIVATIONS, MLP

__all__ = ["ConvDecoder", "ConvEncoder"]

_MOST_GROUPS = 8
_LEAST_VALUES = 8  # in a group: it loses its mean and scale, after which two values would say only which is greater


class ConvEncoder(nn.Module):
    """Numbers of an image: convolutions that halve it, then an MLP of one hidden layer.

    Args:
        data_shape: shape of an image, (H, W) if grey or (H, W, C), sides and channels of any size.
        out_dim: size of the last dimension of the output, for example 2 J for mean and log variance of J latents.
        channels: of each level, first to last.
        hidden_dim: width of the MLP's hidden layer.
        activation: "tanh", "relu" or "softplus".
        residual: whether a level is a convolution and a residual block, rather than a convolution and an activation.

    Raises:
        ValueError: ``data_shape`` or ``channels`` are not positive whole numbers, or there are more levels than it
            takes to halve the shorter side to 1. (Where it is 1 there may be one level, which keeps it.)

    Example:
        >>> import torch
        >>> encoder = ConvEncoder((28, 28), 40, channels=(8, 16), hidden_dim=32)
        >>> encoder(torch.zeros(5, 100, 28, 28)).shape
        torch.Size([5, 100, 40])
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        out_dim: int,
        channels: Sequence[int] = (32, 64),
        hidden_dim: int = 256,
        activation: str = "relu",
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.image_shape = _image_shape(data_shape)
        self.data_shape = self.image_shape[: len(data_shape)]
        sizes = _sizes(self.image_shape, channels)
        widths = itertools.pairwise((self.image_shape[-1], *channels))
        levels: list[nn.Module] = []
        for (width, next_width), size in zip(widths, sizes[1:], strict=True):
            levels.append(nn.Conv2d(width, next_width, 3, stride=2, padding=1))
            levels.append(_ResidualBlock(next_width, size, activation) if residual else ACTIVATIONS[activation]())
        num_features = channels[-1] * math.prod(sizes[-1])
        self.elements_per_row = _largest(channels, sizes[1:])
        self.layers = nn.Sequential(*levels, nn.Flatten(), MLP(num_features, (hidden_dim,), out_dim, activation))

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_dim) of images x (..., *data_shape).

        Raises:
            ValueError: x does not end in ``data_shape``.
        """
        start = max(0, x.ndim - len(self.data_shape))
        if x.shape[start:] != self.data_shape:
            raise ValueError(f"x: expected (..., {', '.join(map(str, self.data_shape))}), got {tuple(x.shape)}")
        out: Tensor = self.layers(x.reshape(-1, *self.image_shape).movedim(-1, 1))
        return out.reshape(*x.shape[:start], out.shape[-1])


class ConvDecoder(nn.Module):
    """Parameters of a law of each pixel: an MLP of one hidden layer, then convolutions that double the image.

    Args:
        latent_dim: J.
        data_shape: shape of an image, (H, W) if grey or (H, W, C), sides and channels of any size.
        num_parameters: P, how many numbers a pixel's law has: 1 for logits, 2 for mean and log variance.
        channels: of each level, first to last: those of an encoder in reverse.
        hidden_dim: width of the MLP's hidden layer.
        activation: "tanh", "relu" or "softplus".
        residual: whether a level is a residual block and a convolution, rather than an activation and a convolution.

    Raises:
        ValueError: as :class:`ConvEncoder` says.

    Example:
        >>> import torch
        >>> decoder = ConvDecoder(20, (32, 32, 3), num_parameters=2, channels=(16, 8), hidden_dim=32)
        >>> loc, log_variance = decoder(torch.zeros(5, 100, 20)).unbind(-4)
        >>> loc.shape
        torch.Size([5, 100, 32, 32, 3])
    """

    def __init__(
        self,
        latent_dim: int,
        data_shape: Sequence[int],
        num_parameters: int = 1,
        channels: Sequence[int] = (64, 32),
        hidden_dim: int = 256,
        activation: str = "relu",
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.image_shape = _image_shape(data_shape)
        self.data_shape = self.image_shape[: len(data_shape)]
        self.num_parameters = num_parameters
        sizes = _sizes(self.image_shape, channels)[::-1]
        widths = itertools.pairwise((*channels, num_parameters * self.image_shape[-1]))
        levels: list[nn.Module] = []
        for (width, next_width), (size, next_size) in zip(widths, itertools.pairwise(sizes), strict=True):
            levels.append(_ResidualBlock(width, size, activation) if residual else ACTIVATIONS[activation]())
            levels.append(_doubling(width, next_width, next_size))
        self.elements_per_row = _largest((*channels, num_parameters * self.image_shape[-1]), sizes)
        start = (channels[0], *sizes[0])
        mlp = MLP(latent_dim, (hidden_dim,), math.prod(start), activation)
        self.layers = nn.Sequential(mlp, nn.Unflatten(-1, start), *levels)

    def forward(self, z: Tensor) -> Tensor:
        """Return (..., P, *data_shape) of latents z (..., J)."""
        images: Tensor = self.layers(z.reshape(-1, z.shape[-1]))
        parameters: Tensor = images.unflatten(1, (self.num_parameters, -1)).movedim(2, -1)
        return parameters.reshape(*z.shape[:-1], self.num_parameters, *self.data_shape)


def _largest(widths: Sequence[int], sizes: Sequence[tuple[int, int]]) -> int:
    """Numbers of the largest feature map, of so many channels each."""
    return max(width * math.prod(size) for width, size in zip(widths, sizes, strict=True))


class _ResidualBlock(nn.Module):
    """x + F(x) of images x (N, width, *size)."""

    def __init__(self, width: int, size: tuple[int, int], activation: str) -> None:
        super().__init__()
        first, second = _norm(width, size), _norm(width, size)
        self.layers = nn.Sequential(
            first,
            ACTIVATIONS[activation](),
            # A norm takes away a shift of its group, and has a bias of its own.
            nn.Conv2d(width, width, 3, padding=1, bias=isinstance(second, nn.Identity)),
            second,
            ACTIVATIONS[activation](),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The images after the block, (N, width, *size)."""
        return x + self.layers(x)  # type: ignore[no-any-return]


def _norm(width: int, size: tuple[int, int]) -> nn.Module:
    """Group normalisation, in as many groups as leave each of them enough values; none where one group has too few."""
    values = width * math.prod(size)
    groups = [g for g in range(1, _MOST_GROUPS + 1) if width % g == 0 and values // g >= _LEAST_VALUES]
    return nn.GroupNorm(groups[-1], width) if groups else nn.Identity()


def _doubling(width: int, next_width: int, next_size: tuple[int, int]) -> nn.Module:
    """A convolution from images of half this size, rounded up, to images of exactly this one.

    The kernel's width 4 is a multiple of the stride 2, so that away from the edges every pixel is a sum over 2 x 2 of
    the smaller image's. Of a kernel 3 wide it would be over 1, 2 or 4 of them by turns: a checkerboard (Odena et al.,
    Distill 2016). To resize the image and convolve it avoids that too, with 9 products for every 4 of these.
    """
    odd = (next_size[0] % 2, next_size[1] % 2)
    padding = (1 + odd[0], 1 + odd[1])  # 2 h + 2 - 2 padding + odd = 2 h - odd
    return nn.ConvTranspose2d(width, next_width, 4, stride=2, padding=padding, output_padding=odd)


def _image_shape(data_shape: Sequence[int]) -> tuple[int, int, int]:
    """Height, width and colours: one, if the image is grey."""
    if not (isinstance(data_shape, Sequence) and len(data_shape) in (2, 3) and all(map(_is_size, data_shape))):
        raise ValueError(
            f"data_shape: expected (H, W) or (H, W, C) for convolutions, positive whole numbers, got {data_shape!r}"
        )
    height, width, *colours = map(int, data_shape)
    return height, width, colours[0] if colours else 1


def _sizes(image_shape: tuple[int, int, int], channels: Sequence[int]) -> list[tuple[int, int]]:
    """Height and width before the first level, and after each."""
    if not (isinstance(channels, Sequence) and len(channels) and all(map(_is_size, channels))):
        raise ValueError(f"channels: expected at least one level, positive whole numbers, got {channels!r}")
    height, width, _ = image_shape
    most = max(1, (min(height, width) - 1).bit_length())  # halvings to 1
    if len(channels) > most:
        levels = "1 level" if most == 1 else f"{most} levels"
        raise ValueError(
            f"channels: expected at most {levels} for images of {height} x {width}, whose sides each level halves, "
            f"got {len(channels)}"
        )
    return [(math.ceil(height / 2**level), math.ceil(width / 2**level)) for level in range(len(channels) + 1)]


def _is_size(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= 1
