"""What a training step costs at the least: its matrix products alone, their operations, and the bytes it moves."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from peers import Peer
from torch import Tensor

import pyro_vae as pv

__all__ = ["Floor", "ScoreFloor", "bytes_moved", "operations"]

Product = Callable[[], object]

_FLOAT = 4  # bytes
_CHUNKS = (250, 500, 1000, 2000, 4000, 8000)  # rows that the decoder takes at once


class Layer(NamedTuple):
    """A linear layer: rows of its input, widths, and whether its input has a gradient (data have none)."""

    rows: int
    wide: int
    narrow: int
    input_gradient: bool

    @property
    def products(self) -> int:
        """Matrix products of a training step: forward, the weight's gradient, the input's."""
        return 3 if self.input_gradient else 2


def _halves(vae: pv.VAE, num_data: int, num_particles: int) -> tuple[list[Layer], list[Layer]]:
    """The linear layers of the encoder, of M rows, and of the decoder, of K M.

    The two heads of the encoder, mean and log variance, are one layer of 2 J outputs.
    """
    data, hidden, latent = vae.data_shape[0], vae.hidden_dims, vae.latent_dim
    encoder = itertools.pairwise((data, *hidden, 2 * latent))
    decoder = itertools.pairwise((latent, *hidden[::-1], data))
    return (
        [Layer(num_data, wide, narrow, i > 0) for i, (wide, narrow) in enumerate(encoder)],
        [Layer(num_data * num_particles, wide, narrow, True) for wide, narrow in decoder],
    )


def _layers(vae: pv.VAE, num_data: int, num_particles: int) -> list[Layer]:
    encoder, decoder = _halves(vae, num_data, num_particles)
    return encoder + decoder


def operations(vae: pv.VAE, num_data: int, num_particles: int = 1) -> int:
    """Multiplications and additions of a step's matrix products: sum over layers of 2 rows in out (2 or 3 products)."""
    layers = _layers(vae, num_data, num_particles)
    return sum(2 * layer.rows * layer.wide * layer.narrow * layer.products for layer in layers)


def bytes_moved(vae: pv.VAE, num_data: int, num_particles: int = 1) -> int:
    """Bytes that a step reads and writes if no number stays in a cache between two matrix products.

    With P parameters, P_1 weights of the first layer, D numbers in a datum and n_l outputs of layer l in R_l rows (M in
    the encoder, K M in the decoder), in float32:

        parameters     4 (2 P - P_1)           read forward and, the first layer's apart, for the inputs' gradients
        gradients      4 (2 P)                 written, and read by the optimiser
        Adam           4 (6 P)                 parameters, means and squares, read and written
        data           4 (3 M D)               read forward, by the likelihood, for the first weight's gradient
        activations    4 sum_l 6 R_l n_l       written, read by the next product, read by its weight's gradient; the
                                               gradient: written, read for the weight's gradient and for the input's
                                               (not of the first layer: 5; the logits' weight gradient is not: 5)

    Elementwise functions are counted as parts of the products beside them. What stays in a cache costs less; what an
    implementation writes beside (a tensor for each elementwise function) costs more.
    """
    layers = _layers(vae, num_data, num_particles)
    parameters = sum((layer.wide + 1) * layer.narrow for layer in layers)
    first = layers[0].wide * layers[0].narrow
    outputs = [layer.rows * layer.narrow for layer in layers]
    activations = 6 * sum(outputs) - outputs[0] - outputs[-1]
    return _FLOAT * (10 * parameters - first + 3 * num_data * layers[0].wide + activations)


class Floor(Peer):
    """The matrix products of a training step, forward and backward, into memory that is there already; nothing else.

    They run over the tensors that a step would use: one set of weights, and outputs that are the next layer's inputs.
    Each product is taken in the way that was fastest when tried: see :func:`_fastest`.

    Args:
        vae: whose widths count.
        x: the minibatch, (M, 784).
        num_particles: K; None for one.
    """

    name = "matrix products alone"
    estimator = None

    def __init__(self, vae: pv.VAE, x: Tensor, num_particles: int | None = None) -> None:
        halves = _halves(vae, len(x), num_particles or 1)
        forward, backward = zip(*(_products(half) for half in halves), strict=True)
        self.products: list[Product] = [*itertools.chain(*forward), *itertools.chain(*backward[::-1])]

    @torch.no_grad()
    def step(self) -> None:
        """The products, once."""
        for product in self.products:
            product()

    def bound(self, x: Tensor, eps: Tensor) -> float:
        """There is none."""
        return math.nan


class ScoreFloor(Floor):
    """The decoder's products for K M rows, in chunks of the size that was fastest when tried.

    Args:
        vae: whose widths count.
        x: data, (M, 784).
        num_particles: K.
    """

    name = "decoder's matrix products alone"

    def __init__(self, vae: pv.VAE, x: Tensor, num_particles: int) -> None:
        tried = {rows: _products(_halves(vae, rows, 1)[1])[0] for rows in _CHUNKS}
        self.rows_at_once = min(tried, key=lambda rows: sum(map(_seconds, tried[rows])) / rows)
        self.products = tried[self.rows_at_once] * math.ceil(len(x) * num_particles / self.rows_at_once)
        self.steps = len(x)


def _products(layers: list[Layer]) -> tuple[list[Product], list[Product]]:
    """The forward products of a stack of layers, and the backward ones, in the order of a step."""
    weights = [torch.randn(layer.narrow, layer.wide) for layer in layers]
    widths = [layers[0].wide, *(layer.narrow for layer in layers)]
    values, slopes = ([torch.randn(layers[0].rows, width) for width in widths] for _ in range(2))
    forward, backward = [], []
    for i, (layer, weight) in enumerate(zip(layers, weights, strict=True)):
        forward.append(_fastest(values[i], weight.t(), values[i + 1]))
        products = [_fastest(slopes[i + 1].t(), values[i], torch.empty_like(weight))]
        if layer.input_gradient:
            products.append(_fastest(slopes[i + 1], weight, slopes[i]))
        backward = products + backward
    return forward, backward


def _fastest(left: Tensor, right: Tensor, out: Tensor) -> Product:
    """A product by torch's library (MKL, say), as it stands or transposed, or by numpy's (OpenBLAS, say).

    Numpy's is tried with one thread only: two libraries' pools of threads would be in each other's way.
    """
    turned = torch.empty(right.shape[1], len(left))
    ways = [
        functools.partial(torch.mm, left, right, out=out),
        functools.partial(torch.mm, right.t(), left.t(), out=turned),
    ]
    if torch.get_num_threads() == 1:
        ways.append(functools.partial(np.matmul, left.numpy(), right.numpy(), out=out.numpy()))
    return min(ways, key=_seconds)


def _seconds(product: Product, repeats: int = 7) -> float:
    """The least time of a few."""
    product()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        product()
        found.append(time.perf_counter() - start)
    return min(found)
