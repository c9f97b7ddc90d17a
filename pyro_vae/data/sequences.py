"""Sequences: padding and lengths, piano rolls, and simulated pendulums and bouncing balls.

N sequences of unequal length are one array (N, T, ...), T the longest, padded with zeros at the end, and their lengths
(N,). A program that takes an argument named ``lengths`` is given both. Padding is no data: a program masks it.

Piano rolls are uint8 (N, T, 88), 1 where a key sounds, from A0 (MIDI note 21) to C8. Padded, the larger sets are large:
the training split of MuseData is 524 x 3457 x 88 numbers, 160 MB, of which 14% are music.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pyro_vae.data.dataset import SPLITS, Array, Dataset, Parts, dataset_of

__all__ = [
    "LENGTHS",
    "MASK",
    "bouncing_balls",
    "concatenated_rolls",
    "convert_concatenated",
    "convert_padded",
    "pad_sequences",
    "padded_rolls",
    "pendulum",
    "require_lengths",
]

LENGTHS, MASK = "lengths", "mask"  # arguments of programs, by their names
_KEYS = 88  # of a piano
_LONGEST = 160  # steps of a chorale, to which the stored arrays are padded


# ---- Padding


def pad_sequences(sequences: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Sequences of unequal length as one tensor, padded with zeros at the end, and their lengths.

    Args:
        sequences: N tensors or arrays (T_n, ...), of one type and equal but for the number of steps T_n >= 1.

    Returns:
        x of shape (N, T, ...), T the greatest T_n, and lengths, int64 (N,).

    Raises:
        ValueError: There is none, one is empty, or one is unlike the first; says which.

    Example:
        >>> x, lengths = pad_sequences([np.ones((2, 3)), np.ones((4, 3))])
        >>> x.shape, lengths
        (torch.Size([2, 4, 3]), tensor([2, 4]))
        >>> x[0].sum(-1)
        tensor([3., 3., 0., 0.], dtype=torch.float64)
    """
    steps = [torch.as_tensor(sequence) for sequence in sequences]
    if not steps:
        raise ValueError("expected at least one sequence, got none")
    for number, sequence in enumerate(steps):
        if sequence.ndim == 0 or len(sequence) == 0:
            raise ValueError(
                f"sequence {number}: expected an array (T, ...) of at least one step, got shape {tuple(sequence.shape)}"
            )
        if sequence.shape[1:] != steps[0].shape[1:] or sequence.dtype != steps[0].dtype:
            raise ValueError(
                f"sequence {number}: expected steps like those of the first, {steps[0].dtype} of shape "
                f"{tuple(steps[0].shape[1:])}, got {sequence.dtype} of shape {tuple(sequence.shape[1:])}"
            )
    return pad_sequence(steps, batch_first=True), torch.tensor([len(sequence) for sequence in steps])


def require_lengths(name: str, lengths: Any, shape: Sequence[int]) -> None:
    """Refuse what cannot be the lengths of padded sequences.

    Args:
        name: What they are called in messages.
        lengths: A tensor or an array.
        shape: Of the sequences, (N, T, ...).

    Raises:
        ValueError: They are not N whole numbers from 1 to T; says the first that is not.
    """
    if len(shape) < 2:
        raise ValueError(f"{name}: expected sequences of shape (N, T, ...) beside them, got shape {tuple(shape)}")
    lengths, (count, longest) = torch.as_tensor(lengths), shape[:2]
    expected = f"{name}: expected {count} whole numbers from 1 to {longest}, one for each sequence of {tuple(shape)}"
    if lengths.dtype == torch.bool or lengths.dtype.is_complex or tuple(lengths.shape) != (count,):
        raise ValueError(f"{expected}, got {lengths.dtype} of shape {tuple(lengths.shape)}")
    numbers = lengths.double()
    bad = ~((numbers >= 1) & (numbers <= longest) & (numbers == numbers.floor()))  # of NaN, too
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"{expected}; got {numbers[row].item():g} in row {row}")


# ---- Piano rolls


def padded_rolls(arrays: Mapping[str, Array]) -> Parts:
    """Splits of padded piano rolls, each cut to the longest of its own."""
    return dict(arrays) | {split: arrays[split][:, : arrays[f"{split}_lengths"].max()] for split in SPLITS}


def concatenated_rolls(arrays: Mapping[str, Array]) -> Parts:
    """Splits of piano rolls that are stored one after another, (steps, 11) with eight keys in a byte, padded."""
    parts: Parts = dict(arrays)
    for split in SPLITS:
        lengths = arrays[f"{split}_lengths"]
        sounding = np.arange(lengths.max()) < lengths[:, None]  # (N, T)
        parts[split] = np.zeros((*sounding.shape, _KEYS), np.uint8)
        parts[split][sounding] = np.unpackbits(arrays[split], axis=1)
    return parts


def convert_padded(path: Path) -> Parts:
    """Arrays as `padded_rolls` takes them, from a Matlab file."""
    parts: Parts = {}
    for split, rolls in _matlab_rolls(path).items():
        parts[split] = np.zeros((len(rolls), _LONGEST, _KEYS), np.uint8)
        for row, roll in zip(parts[split], rolls, strict=True):
            row[: len(roll)] = roll
        parts[f"{split}_lengths"] = np.array([len(roll) for roll in rolls], np.int32)
    return parts


def convert_concatenated(path: Path) -> Parts:
    """Arrays as `concatenated_rolls` takes them, from a Matlab file."""
    parts: Parts = {}
    for split, rolls in _matlab_rolls(path).items():
        parts[split] = np.packbits(np.concatenate(rolls), axis=1)
        parts[f"{split}_lengths"] = np.array([len(roll) for roll in rolls], np.int32)
    return parts


def _matlab_rolls(path: Path) -> dict[str, list[Array]]:
    """Piano rolls (T_n, 88) of each split, of the cell arrays `traindata`, `validdata` and `testdata`."""
    from scipy.io import loadmat

    data = loadmat(path)
    return {split: [(roll > 0).astype(np.uint8) for roll in data[f"{split}data"][0]] for split in SPLITS}


# ---- Simulations


def pendulum(
    num_sequences: int = 1000,
    num_steps: int = 50,
    seed: int = 0,
    *,
    noise: float = 0.1,
    process_noise: float = 0.0,
    interval: float = 0.1,
) -> Dataset:
    r"""Noisy observations of a pendulum's angle, with the true angles beside them.

    The angle a and the angular velocity v follow

        da = v dt,    dv = -(g / l) sin(a) dt + process_noise dW,    g / l = 9.81 / s^2

    from a ~ U(-3 pi / 4, 3 pi / 4) and v ~ N(0, 1), by the leapfrog rule with twenty steps in an interval, and what is
    observed at its end is x_t = (sin a_t, cos a_t) + noise * N(0, I). Small swings take 2.0 s, twenty intervals.

    Args:
        num_sequences: At least 3; split 8 : 1 : 1 in the order in which they are drawn.
        num_steps: T, at least 1.
        seed: Of all that is drawn.
        noise: Standard deviation of the observations, at least 0.
        process_noise: Of what kicks the velocity, in 1 / s^(3/2), at least 0.
        interval: Seconds from one observation to the next, above 0.

    Returns:
        Observations, float32 (N, T, 2), lengths, all T, and states, float32 (N, T, 2): the angle in radians, which
        goes on where it passes pi, and the angular velocity in radians per second.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> data = pendulum(20, num_steps=30)
        >>> data.train.shape, data.train_states.shape
        (torch.Size([16, 30, 2]), torch.Size([16, 30, 2]))
    """
    _require_whole("num_sequences", num_sequences, 3)
    _require_whole("num_steps", num_steps, 1)
    for name, value in (("noise", noise), ("process_noise", process_noise), ("interval", interval)):
        if not (math.isfinite(value) and (value > 0 if name == "interval" else value >= 0)):
            limits = "above 0" if name == "interval" else "of at least 0"
            raise ValueError(f"{name}: expected a number {limits}, got {value!r}")
    rng = np.random.default_rng(seed)
    state = np.stack([rng.uniform(-0.75 * np.pi, 0.75 * np.pi, num_sequences), rng.normal(size=num_sequences)], -1)
    states = np.empty((num_sequences, num_steps, 2))
    for step in range(num_steps):
        states[:, step] = state = _swing(state, interval, process_noise, rng)
    angle = states[..., 0]
    x = np.stack([np.sin(angle), np.cos(angle)], -1) + noise * rng.normal(size=states.shape)
    return _simulated("pendulum", x.astype(np.float32), states)


def _swing(state: Array, interval: float, process_noise: float, rng: np.random.Generator, parts: int = 20) -> Array:
    """The states (N, 2) an interval later; the leapfrog rule keeps the energy, but for an error of second order."""
    h = interval / parts
    angle, velocity = state.T
    for _ in range(parts):
        velocity = velocity - h / 2 * 9.81 * np.sin(angle)
        angle = angle + h * velocity
        velocity = velocity - h / 2 * 9.81 * np.sin(angle)
        if process_noise > 0:
            velocity = velocity + process_noise * math.sqrt(h) * rng.normal(size=len(velocity))
    return np.stack([angle, velocity], -1)


def bouncing_balls(
    num_sequences: int = 1000, num_steps: int = 50, size: int = 16, num_balls: int = 2, seed: int = 0
) -> Dataset:
    """Binary films of balls in a box, which bounce off its walls and off one another without loss.

    In a box of side 1, balls of radius r = 0.12 and equal mass move on straight lines, 0.06 a step to begin with. At a
    wall the velocity's component across it turns round; two balls that meet, with n the direction from one centre to
    the other, exchange their components along it:

        v_1' = v_1 - ((v_1 - v_2) . n) n,    v_2' = v_2 + ((v_1 - v_2) . n) n

    A pixel is 1 where its centre is in a ball. After Sutskever, Hinton & Taylor, NIPS 2008.

    Args:
        num_sequences: At least 3; split 8 : 1 : 1 in the order in which they are drawn.
        num_steps: T, at least 1.
        size: Pixels along a side, at least 4.
        num_balls: 1, 2 or 3.
        seed: Of all that is drawn.

    Returns:
        Films, uint8 (N, T, size * size), row by row, of 0 and 1 as numbers; lengths, all T; and states, float32
        (N, T, 4 num_balls): of each ball the place (down, right) in the box and the velocity in sides per step.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> data = bouncing_balls(10, num_steps=5)
        >>> data.train.shape, data.train.dtype, data.train_states.shape
        (torch.Size([8, 5, 256]), torch.uint8, torch.Size([8, 5, 8]))
    """
    _require_whole("num_sequences", num_sequences, 3)
    _require_whole("num_steps", num_steps, 1)
    _require_whole("size", size, 4)
    _require_whole("num_balls", num_balls, 1, 3)
    rng = np.random.default_rng(seed)
    place = _apart(num_sequences, num_balls, rng)  # (N, B, 2)
    velocity = rng.normal(size=place.shape)
    velocity *= _SPEED / np.linalg.norm(velocity, axis=-1, keepdims=True)
    films = np.empty((num_sequences, num_steps, size * size), np.uint8)
    states = np.empty((num_sequences, num_steps, num_balls, 4))
    for step in range(num_steps):
        films[:, step], states[:, step] = _film(place, size), np.concatenate([place, velocity], -1)
        place, velocity = _bounce(place, velocity)
    return _simulated("bouncing-balls", films, states.reshape(num_sequences, num_steps, -1))


_RADIUS, _SPEED = 0.12, 0.06


def _apart(count: int, num_balls: int, rng: np.random.Generator) -> Array:
    """Places (N, B, 2) in the box, no two balls on one another."""
    place = rng.uniform(_RADIUS, 1 - _RADIUS, (count, num_balls, 2))
    while (touching := _closest(place) < 2 * _RADIUS).any():
        place[touching] = rng.uniform(_RADIUS, 1 - _RADIUS, (touching.sum(), num_balls, 2))
    return place


def _closest(place: Array) -> Array:
    """The least distance between two of the balls, (N,)."""
    pairs = itertools.combinations(range(place.shape[1]), 2)
    distances = [np.linalg.norm(place[:, i] - place[:, j], axis=-1) for i, j in pairs]
    least: Array = np.min(distances or [np.full(len(place), np.inf)], axis=0)
    return least


def _bounce(place: Array, velocity: Array, parts: int = 10) -> tuple[Array, Array]:
    """Places and velocities (N, B, 2) a step later, looked at for collisions so many times on the way."""
    for _ in range(parts):
        place = place + velocity / parts
        outward = ((place < _RADIUS) & (velocity < 0)) | ((place > 1 - _RADIUS) & (velocity > 0))
        velocity = np.where(outward, -velocity, velocity)
        for i, j in itertools.combinations(range(place.shape[1]), 2):
            between = place[:, j] - place[:, i]
            distance = np.linalg.norm(between, axis=-1, keepdims=True)
            normal = between / distance
            closing = ((velocity[:, i] - velocity[:, j]) * normal).sum(-1, keepdims=True)
            exchanged = np.where((distance < 2 * _RADIUS) & (closing > 0), closing, 0.0) * normal
            velocity[:, i] -= exchanged
            velocity[:, j] += exchanged
    return place, velocity


def _film(place: Array, size: int) -> Array:
    """Pictures (N, size * size) of balls at these places."""
    centres = (np.arange(size) + 0.5) / size
    down, right = (np.abs(place[..., axis, None] - centres) ** 2 for axis in (0, 1))  # (N, B, size)
    inside = down[..., :, None] + right[..., None, :] < _RADIUS**2
    pixels: Array = inside.any(1).reshape(len(place), -1).astype(np.uint8)
    return pixels


def _simulated(name: str, x: Array, states: Array) -> Dataset:
    count, steps = x.shape[:2]
    tenth = max(1, count // 10)
    cuts = [count - 2 * tenth, count - tenth]
    parts: Parts = {}
    for split, rows, hidden in zip(SPLITS, np.split(x, cuts), np.split(states, cuts), strict=True):
        parts |= {split: rows, f"{split}_lengths": np.full(len(rows), steps)}
        parts[f"{split}_states"] = hidden.astype(np.float32)
    return dataset_of(name, parts)


def _require_whole(name: str, value: Any, least: int, most: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= most:
        limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name}: expected a whole number {limits}, got {value!r}")
