"""Batches: data sets cut by index, or iterables of batches, and the reader that turns stored data into model inputs.

Data are *columns*: tensors by argument name with one row per datum. A data set that fits in memory stays there in its
stored form (images as uint8), on the device of the computation; a batch is cut by index and only then scaled and
binarised. No Python runs per datum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "BatchIterable",
    "Columns",
    "Reader",
    "TensorData",
    "as_columns",
    "is_grey",
    "is_unscaled",
    "require_range",
    "require_valid",
]

Columns = dict[str, Tensor]

_ROWS_AT_ONCE = 1000  # bounds the memory of floating-point copies


def as_columns(data: Any, names: Sequence[str]) -> Columns | None:
    """Tensors by argument name from a tensor, a tuple or list (by position) or a dict (by name) of them.

    Args:
        data: tensors or numpy arrays.
        names: argument names for what comes by position.

    Returns:
        The columns in the order of ``names``, or None if ``data`` is none of these.

    Raises:
        ValueError: there are more tensors than names.
    """
    if isinstance(data, Mapping):
        columns = {str(name): _as_tensor(str(name), value) for name, value in data.items()}
        order = [name for name in names if name in columns]
        return {name: columns[name] for name in dict.fromkeys((*order, *columns))}
    if isinstance(data, (Tensor, np.ndarray)):
        data = (data,)
    if not isinstance(data, (tuple, list)) or not all(isinstance(v, (Tensor, np.ndarray)) for v in data):
        return None
    if len(data) > len(names):
        raise ValueError(
            f"expected at most {len(names)} tensors, for the arguments {list(names)}; got {len(data)}. What the "
            "program does not take, such as labels, must be left out of the data"
        )
    return {name: _as_tensor(name, value) for name, value in zip(names, data, strict=False)}


def _as_tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            raise ValueError(f"data '{name}': expected numbers, got an array of dtype {value.dtype}")
        value = torch.from_numpy(value if value.flags.writeable else value.copy())
    if not isinstance(value, Tensor):
        raise ValueError(f"data '{name}': expected a tensor or a numpy array, got {type(value).__name__}")
    return value


def require_valid(columns: Columns) -> None:
    """Refuse data that no program can use, before any work is done.

    Raises:
        ValueError: no data, complex or non-finite numbers, or unequal first dimensions; says which and where.
    """
    if not columns:
        raise ValueError("expected at least one tensor of data, got none")
    for name, column in columns.items():
        if column.is_complex() or column.ndim == 0 or column.numel() == 0:
            raise ValueError(
                f"data '{name}': expected real numbers of shape (N, ...) with N > 0, "
                f"got {column.dtype} of shape {tuple(column.shape)}"
            )
        if column.is_floating_point() and not bool((finite := column.isfinite()).all()):
            rows = (~finite.flatten(1).all(1) if column.ndim > 1 else ~finite).nonzero().flatten()
            raise ValueError(
                f"data '{name}': expected finite numbers, got NaN or infinity in {len(rows)} of {len(column)} rows, "
                f"the first at row {rows[0].item()}"
            )
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"expected tensors with an equal first dimension, got {lengths}")


@dataclass(frozen=True)
class Reader:
    """Turns stored columns into what a program observes.

    Whole numbers of type uint8 are grey or colour levels and are divided by 255, unless the data set has none above 1:
    then they are binary already. Other real numbers are cast to the floating-point type; wider integers (labels,
    lengths) are left alone. The first argument of a program that states its ``data_shape`` is cast in any case, and
    reshaped to it if its element count agrees. Grey levels that a binary site observes are probabilities of ink and are
    drawn anew at each read (dynamic binarisation).

    Attributes:
        device: where the program runs.
        dtype: floating-point type of the program.
        data_shape: shape of one datum of the first argument; None leaves it as stored.
        drawn: names of the arguments to binarise by drawing.
        unscaled: names of the uint8 arguments that hold 0 and 1, not 0 to 255.
    """

    device: torch.device
    dtype: torch.dtype
    data_shape: tuple[int, ...] | None = None
    drawn: frozenset[str] = frozenset()
    unscaled: frozenset[str] = frozenset()

    def __call__(self, columns: Columns) -> Columns:
        """Read a batch; the draws come from torch's global generator of the device."""
        read = {name: self._scale(name, column) for name, column in columns.items()}
        if self.data_shape is not None:
            first = next(iter(read))
            read[first] = _reshape(read[first].to(self.dtype), self.data_shape)
        return {name: torch.bernoulli(x) if name in self.drawn else x for name, x in read.items()}

    def _scale(self, name: str, column: Tensor) -> Tensor:
        column = column.to(self.device, non_blocking=True)
        if column.dtype == torch.uint8:
            return column.to(self.dtype).div_(1 if name in self.unscaled else 255)
        if column.is_floating_point() or column.dtype == torch.bool:
            return column.to(self.dtype)
        return column


def is_unscaled(column: Tensor) -> bool:
    """Whether a uint8 column holds 0 and 1 rather than levels from 0 to 255."""
    return column.dtype == torch.uint8 and column.max().item() == 1


def require_range(name: str, column: Tensor, limits: tuple[float, float], unscaled: bool = False) -> None:
    """Refuse values outside of a range; uint8 levels are taken as divided by 255 unless unscaled.

    Raises:
        ValueError: there are such values.
    """
    if column.dtype == torch.bool:
        return
    one = 255 if column.dtype == torch.uint8 and not unscaled else 1
    low, high = column.min().item() / one, column.max().item() / one
    if low < limits[0] or high > limits[1]:
        raise ValueError(
            f"data '{name}': expected values in [{limits[0]:g}, {limits[1]:g}], got values from {low:.4g} to {high:.4g}"
        )


def is_grey(name: str, column: Tensor, unscaled: bool = False) -> bool:
    """Whether data for a binary site have values strictly between 0 and 1 (0 and 255 for uint8 levels).

    Raises:
        ValueError: there are values outside of that range.
    """
    require_range(name, column, (0.0, 1.0), unscaled)
    one = 255 if column.dtype == torch.uint8 and not unscaled else 1
    return column.dtype != torch.bool and not bool(((column == 0) | (column == one)).all())


def _reshape(column: Tensor, shape: tuple[int, ...]) -> Tensor:
    if column[0].numel() != math.prod(shape):
        raise ValueError(
            f"expected data of shape (N, {', '.join(map(str, shape))}) or with as many elements, {math.prod(shape)}; "
            f"got {tuple(column.shape)}, which is {column[0].numel()} elements per datum"
        )
    return column.reshape(len(column), *shape)


@dataclass(frozen=True, eq=False)
class TensorData:
    """A data set that is in memory, cut by index.

    Attributes:
        columns: tensors by argument name, N rows each.
        reader: makes a batch of what the index cuts out.
    """

    columns: Columns
    reader: Reader

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def resident(self) -> TensorData:
        """The same data on the reader's device."""
        return TensorData({name: c.to(self.reader.device) for name, c in self.columns.items()}, self.reader)

    def drawn_once(self, seed: int, num_data: int | None = None) -> TensorData:
        """The first data, with grey levels that a binary site observes drawn once and for all.

        For evaluations: whatever is evaluated, in whatever batches, it is evaluated on the same binary data.

        Args:
            seed: of the draws; torch's global generators are not used.
            num_data: how many data to take; None for all.
        """
        columns = {name: column[:num_data] for name, column in self.columns.items()}
        generator = torch.Generator(self.reader.device).manual_seed(seed)
        plain = replace(self.reader, drawn=frozenset(), data_shape=None)
        for name in self.reader.drawn & columns.keys():
            grey = (plain({name: rows})[name] for rows in columns[name].split(_ROWS_AT_ONCE))
            columns[name] = torch.cat([torch.bernoulli(x, generator=generator).to(torch.uint8) for x in grey])
        unscaled = self.reader.unscaled | self.reader.drawn
        return TensorData(columns, replace(self.reader, drawn=frozenset(), unscaled=unscaled))

    def rows(self, index: Tensor | slice) -> Columns:
        """Read the rows of an index (M,) or a slice."""
        return self.reader({name: column[index] for name, column in self.columns.items()})

    def in_order(self, batch_size: int) -> Iterator[Columns]:
        """Every row once, in order; the last batch may be short."""
        for start in range(0, len(self), batch_size):
            yield self.rows(slice(start, start + batch_size))

    def shuffled(self, batch_size: int, seed: int, epoch: int, skip: int = 0) -> Iterator[tuple[Tensor, Columns]]:
        """Every row once, with its index, in an order that depends on seed and epoch alone; the last may be short.

        Args:
            batch_size: M.
            seed: of the run.
            epoch: counted from 0.
            skip: batches to leave out at the start.
        """
        order = np.random.default_rng([seed, epoch]).permutation(len(self))
        index = torch.from_numpy(order).to(self.reader.device)
        for batch in itertools.islice(index.split(batch_size), skip, None):
            yield batch, self.rows(batch)


@dataclass(frozen=True, eq=False)
class BatchIterable:
    """Batches that somebody else makes: a DataLoader, or any iterable that can be iterated over again.

    Attributes:
        batches: yields tensors, or tuples or dicts of them.
        names: argument names for what comes by position.
        reader: makes a batch of what the iterable yields.
        binary: names of the arguments that a binary site observes, whose values must lie in [0, 1].
        binarize: "none" refuses grey levels among them.
    """

    batches: Iterable[Any]
    names: tuple[str, ...]
    reader: Reader
    binary: frozenset[str] = frozenset()
    binarize: str | None = None

    def first(self) -> Any:
        """The first batch, as it comes. The iterable is asked for it once, and for nothing more.

        Raises:
            ValueError: the iterable is a one-shot iterator, or empty.
        """
        if isinstance(self.batches, Iterator):
            raise ValueError(
                f"expected an iterable that can be iterated over again, such as a DataLoader or a list; got a one-shot "
                f"{type(self.batches).__name__}, which serves one epoch only and cannot be resumed"
            )
        for batch in self.batches:
            return batch
        raise ValueError("expected at least one batch of data, got an empty iterable")

    def columns(self, batch: Any) -> Columns:
        """A batch as columns, validated."""
        columns = as_columns(batch, self.names)
        if columns is None:
            raise ValueError(f"expected batches of tensors, or tuples or dicts of them; got {type(batch).__name__}")
        require_valid(columns)
        for name in self.binary & columns.keys():
            if is_grey(name, columns[name], name in self.reader.unscaled) and self.binarize == "none":
                raise ValueError(f"data '{name}': expected values 0 and 1 with binarize=\"none\", got grey levels")
        return columns

    def raw(self) -> Iterator[Columns]:
        """The batches as columns, not yet read."""
        return map(self.columns, self.batches)
