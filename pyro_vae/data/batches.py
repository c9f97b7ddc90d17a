"""Batches: data sets cut by index, or iterables of batches, and the reader that turns stored data into model inputs.

Data are *columns*: tensors, or sparse rows, by argument name with one row per datum. A data set stays in its stored
form (images as uint8), on the device of the computation; a batch is cut by index and only then scaled and binarised.
No Python runs per datum. Columns may be larger than memory (arrays that ``numpy.memmap`` maps from files, read-only
ones too): nothing here copies a whole column or writes into one, and what looks at every number does so in blocks of
rows. Sparse columns stay sparse: the rows of a batch are made dense when they are read.

Two columns are known by their names: "lengths", of padded sequences, and "mask", of observations that are missing.
Both speak of the first of the other columns.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.sequences import LENGTHS, MASK, require_lengths
from pyro_vae.data.sparse import SparseRows, is_sparse, sparse_rows

__all__ = [
    "BatchIterable",
    "Column",
    "Columns",
    "Reader",
    "StoredColumns",
    "TensorData",
    "along_the_sequences",
    "as_column",
    "as_columns",
    "blocks",
    "is_by_name",
    "is_grey",
    "is_unscaled",
    "observed_name",
    "require_range",
    "require_valid",
    "stored_blocks",
    "trimmed",
]

Column: TypeAlias = Tensor | SparseRows
StoredColumns: TypeAlias = dict[str, Column]
Columns: TypeAlias = dict[str, Tensor]  # as they are read

C = TypeVar("C", Tensor, Column)

_ELEMENTS_IN_BLOCK = 2**20  # that fit in a processor's cache
_LEVEL_TOLERANCE = 1e-3  # of a step: single precision rounds to a hundredth of it
_ROWS_PER_DRAW, _ELEMENTS_PER_DRAW = 1000, 2**26  # part of what a seed means, on devices that draw in parallel


def as_columns(data: Any, names: Sequence[str]) -> StoredColumns | None:
    """Columns by argument name from a tensor, a tuple or list (by position) or a dict (by name) of them.

    Args:
        data: tensors, numpy arrays, or matrices or arrays of scipy.sparse.
        names: argument names for what comes by position.

    Returns:
        The columns in the order of ``names``, or None if ``data`` is none of these.

    Raises:
        ValueError: there are more tensors than names.
    """
    if is_by_name(data):
        columns = {str(name): as_column(str(name), value) for name, value in data.items()}
        order = [name for name in names if name in columns]
        return {name: columns[name] for name in dict.fromkeys((*order, *columns))}
    if _is_column(data):
        data = (data,)
    if not isinstance(data, (tuple, list)) or not all(map(_is_column, data)):
        return None
    if len(data) > len(names):
        raise ValueError(
            f"expected at most {len(names)} tensors, for the arguments {list(names)}; got {len(data)}. What the "
            "program does not take, such as labels, must be left out of the data"
        )
    return {name: as_column(name, value) for name, value in zip(names, data, strict=False)}


def is_by_name(data: Any) -> bool:
    """Whether data are a dict of columns; scipy's matrices in dictionary-of-keys format are mappings too."""
    return isinstance(data, Mapping) and not is_sparse(data)


def _is_column(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray, SparseRows)) or is_sparse(value)


def as_column(name: str, value: Any) -> Column:
    """A tensor, an array or a sparse matrix as a column; nothing is copied that need not be.

    Raises:
        ValueError: it is something else, or holds what torch has no type for.
    """
    if isinstance(value, np.ndarray):
        return _on_the_memory_of(name, value)
    if is_sparse(value):
        return sparse_rows(name, value)
    if not isinstance(value, (Tensor, SparseRows)):
        raise ValueError(
            f"data '{name}': expected a tensor, a numpy array or a scipy.sparse matrix, got {type(value).__name__}"
        )
    if isinstance(value, Tensor) and value.layout != torch.strided:
        raise ValueError(
            f"data '{name}': expected a dense tensor or a scipy.sparse matrix, which is made dense batch by batch; got "
            f"a tensor of layout {value.layout}"
        )
    return value


def _on_the_memory_of(name: str, array: np.ndarray[Any, Any]) -> Tensor:
    if array.dtype.kind not in "biuf":
        raise ValueError(f"data '{name}': expected numbers, got an array of dtype {array.dtype}")
    if not array.flags.aligned:
        raise ValueError(f"data '{name}': expected an aligned array, got an unaligned one; numpy.array(x) copies it")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor is it written to
            tensor: Tensor = torch.from_numpy(array)
            return tensor
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"data '{name}': expected an array that torch can use without a copy (native byte order, positive strides, "
            f"a type that torch has), got dtype {array.dtype.str} and strides {array.strides}; numpy.array(x, "
            "dtype=...) copies it"
        ) from error


def blocks(column: Column) -> Iterable[Tensor]:
    """What a pass over a column's numbers takes at a time: blocks of bounded size that hold them all.

    Of a tensor they are views of consecutive rows; of sparse rows, the stored numbers and a zero.
    """
    if isinstance(column, SparseRows):
        return column.values()
    rows = max(1, _ELEMENTS_IN_BLOCK // max(1, column[:1].numel()))
    cut: tuple[Tensor, ...] = column.split(rows)
    return cut


def stored_blocks(column: Column) -> Iterable[Tensor]:
    """Blocks of all that a column is stored as: of sparse rows, the places too."""
    return column.stored() if isinstance(column, SparseRows) else blocks(column)


def _extremes(block: Tensor) -> tuple[float, float]:
    try:
        low, high = block.aminmax()
    except NotImplementedError:  # such as uint16, of which torch can do little else than cast it
        low, high = block.double().aminmax()
    return low.item(), high.item()


def observed_name(columns: Mapping[str, Any]) -> str:
    """The column that "lengths" and "mask" speak of: the first of the others."""
    return next((name for name in columns if name not in (LENGTHS, MASK)), next(iter(columns)))


def require_valid(
    columns: Mapping[str, Column], names: Sequence[str] = (), data_shape: tuple[int, ...] | None = None
) -> None:
    """Refuse data that no program can use, before any work is done.

    Args:
        columns: by argument name.
        names: the program's arguments.
        data_shape: that the program states of a datum of its first argument.

    Raises:
        ValueError: no data, complex numbers, non-finite ones that are not masked, unequal first dimensions, or lengths
            that do not fit the sequences; says which and where.
    """
    if not columns:
        raise ValueError("expected at least one tensor of data, got none")
    for name, column in columns.items():
        if column.dtype.is_complex or column.ndim == 0 or column.numel() == 0:
            raise ValueError(
                f"data '{name}': expected real numbers of shape (N, ...) with N > 0, "
                f"got {column.dtype} of shape {tuple(column.shape)}"
            )
    sizes = {name: len(column) for name, column in columns.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"expected tensors with an equal first dimension, got {sizes}")
    first = observed_name(columns)
    if LENGTHS in columns and first != LENGTHS:
        shape = tuple(columns[first].shape)
        fits = data_shape is not None and columns[first][:1].numel() == math.prod(data_shape)
        _require_lengths(columns[LENGTHS], (*shape[:1], *data_shape) if fits and data_shape else shape)
    for name, column in columns.items():
        if column.is_floating_point():
            _require_finite(name, column, columns.get(MASK) if name == first else None, MASK in names)


def _require_lengths(lengths: Column, shape: tuple[int, ...]) -> None:
    require_lengths(f"data '{LENGTHS}'", lengths.dense() if isinstance(lengths, SparseRows) else lengths, shape)


def _require_finite(name: str, column: Column, mask: Column | None, takes_mask: bool) -> None:
    bad = column.non_finite_rows() if isinstance(column, SparseRows) else _non_finite_rows(column)
    if mask is not None and len(bad) and isinstance(column, Tensor):
        bad = _unmasked(name, column, mask, bad)
    if len(bad):
        hint = f"; expected NaN only where {MASK} is False" if takes_mask or mask is not None else ""
        if not hint and isinstance(column, Tensor) and bool(column[int(bad[0])].isnan().any()):
            hint = (
                f": fill in what is missing, or mask it in a program with an argument `{MASK}`, given by name beside "
                "the data, True where they are observed"
            )
        raise ValueError(
            f"data '{name}': expected finite numbers, got NaN or infinity in {len(bad)} of {len(column)} rows, the "
            f"first at row {int(bad[0])}{hint}"
        )


def _unmasked(name: str, column: Tensor, mask: Column, rows: Tensor) -> Tensor:
    """Those of the rows that are not finite where the mask, (N, ...) of bool, is True."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != column.shape[: mask.ndim]:
        raise ValueError(
            f"data '{MASK}': expected bool of the shape of '{name}', {tuple(column.shape)}, or of its first axes, for "
            f"'{name}' holds NaN; got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    bad = [rows[:0]]
    for few in rows.split(max(1, _ELEMENTS_IN_BLOCK // max(1, column[:1].numel()))):
        finite = column[few.to(column.device)].isfinite().reshape(len(few), *mask.shape[1:], -1).all(-1)
        wrong = mask[few.to(mask.device)].to(finite.device) & ~finite
        bad.append(few[wrong.reshape(len(few), -1).any(1).cpu()])
    return torch.cat(bad)


def _non_finite_rows(column: Tensor) -> Tensor:
    seen, bad = 0, [torch.zeros(0, dtype=torch.int64)]
    for block in blocks(column):
        if not all(map(math.isfinite, _extremes(block))):  # NaN is both extremes
            bad.append((~block.isfinite().reshape(len(block), -1).all(1)).nonzero().flatten().cpu() + seen)
        seen += len(block)
    return torch.cat(bad)


def _finite_blocks(column: Column) -> Iterator[Tensor]:
    """Blocks of a column that was found valid, without the numbers that are missing."""
    for block in blocks(column):
        if not block.is_floating_point() or math.isfinite(block.sum().item()):
            yield block
        elif (finite := block[block.isfinite()]).numel():
            yield finite


@dataclass(frozen=True)
class Reader:
    """Turns stored columns into what a program observes.

    Whole numbers of type uint8 are grey or colour levels and are divided by 255, unless the data set has none above
    1, for then they are binary already, or the program takes data above 1, for then they are counts. Other real
    numbers are cast to the floating-point type; wider integers (labels, lengths) are left alone. The first argument
    of a program that states its ``data_shape`` is cast in any case, and reshaped to it if its element count agrees.
    Grey levels that a binary site observes are probabilities of ink and are drawn anew at each read (dynamic
    binarisation). Lengths are read as int64, a mask of bool as it is, and what is missing as 0. What is read is a copy
    always: a program may write into it.

    Attributes:
        device: where the program runs.
        dtype: floating-point type of the program.
        data_shape: shape of one datum of the first argument; None leaves it as stored.
        drawn: names of the arguments to binarise by drawing.
        unscaled: names of the uint8 arguments that hold numbers as they are, not levels from 0 to 255.
        missing: names of the arguments of which numbers may be missing, NaN or infinite where the mask is False.
        trims: names of the arguments that are cut to about a batch's own longest sequence.
    """

    device: torch.device
    dtype: torch.dtype
    data_shape: tuple[int, ...] | None = None
    drawn: frozenset[str] = frozenset()
    unscaled: frozenset[str] = frozenset()
    missing: frozenset[str] = frozenset()
    trims: frozenset[str] = frozenset()

    def __call__(self, columns: Mapping[str, Column]) -> Columns:
        """Read a batch; the draws come from torch's global generator of the device."""
        read = {name: self._scale(name, column) for name, column in columns.items()}
        read = trimmed(read, self.trims) if self.trims else read
        if self.data_shape is not None:
            first = next(iter(read))
            read[first] = _reshape(read[first].to(self.dtype), self.data_shape)
        return {name: torch.bernoulli(x) if name in self.drawn else x for name, x in read.items()}

    def _scale(self, name: str, column: Column) -> Tensor:
        moved = self._move(column)
        if name == LENGTHS:
            return moved.to(torch.int64, copy=moved is column)
        if moved.dtype == torch.uint8:
            return moved.to(self.dtype).div_(1 if name in self.unscaled else 255)
        real = moved.is_floating_point() or (moved.dtype == torch.bool and name != MASK)
        read = moved.to(self.dtype if real else moved.dtype, copy=moved is column)
        return read.nan_to_num_(0.0, 0.0, 0.0) if name in self.missing else read

    def _move(self, column: Column) -> Tensor:
        column = column.dense() if isinstance(column, SparseRows) else column
        if self.device.type == "cuda" and column.device.type == "cpu":
            column = column.pin_memory()  # then the copy need not be waited for
        return column.to(self.device, non_blocking=True)


def trimmed(columns: Columns, names: Collection[str]) -> Columns:
    """Padded sequences (M, T, ...), and what goes with them step by step, without steps that all are padding.

    Their number of steps is one of T, T / sqrt(2), T / 2, ..., so that only a few shapes come.

    Args:
        columns: a batch, with lengths.
        names: of the columns to cut.
    """
    longest, shape = int(columns[LENGTHS].max()), columns[observed_name(columns)].shape[:2]
    halvings = math.floor(2 * math.log2(shape[1] / longest) + 1e-9)
    kept = max(longest, math.ceil(shape[1] / math.sqrt(2) ** halvings))
    return {name: x[:, :kept].contiguous() if name in names else x for name, x in columns.items()}


def along_the_sequences(columns: StoredColumns, by_name: bool = False) -> frozenset[str]:
    """Names of what has a value for each step: x, its mask, and what has their axes and is 0 beyond the lengths.

    Args:
        columns: all of the data, with lengths.
        by_name: take of others none but exogenous ``inputs``, for not all of their data can be looked at.
    """
    observed = observed_name(columns)
    shape = tuple(columns[observed].shape[:2])
    found = {name for name, c in columns.items() if name != LENGTHS and tuple(c.shape[:2]) == shape}
    known = {observed, MASK, "inputs"}
    return frozenset(n for n in found if n in known or not (by_name or _is_above_lengths(columns, n)))


def _is_above_lengths(columns: StoredColumns, name: str) -> bool:
    """Whether a column has other values than 0 in steps beyond the sequences' lengths."""
    column, lengths, start = columns[name], torch.as_tensor(columns[LENGTHS]), 0
    for block in stored_blocks(column):
        steps = torch.arange(block.shape[1], device=block.device)
        beyond = steps >= lengths[start : start + len(block)].to(block.device)[:, None]
        start += len(block)
        if bool((block[beyond] != 0).any()):
            return True
    return False


def is_unscaled(column: Column) -> bool:
    """Whether a uint8 column holds 0 and 1 rather than levels from 0 to 255."""
    if column.dtype != torch.uint8:
        return False
    highest = 0
    for block in blocks(column):
        highest = max(highest, int(block.max()))
        if highest > 1:
            break
    return highest == 1


def require_range(name: str, column: Column, limits: tuple[float, float], unscaled: bool = False) -> None:
    """Refuse values outside of a range; uint8 levels are taken as divided by 255 unless unscaled.

    Raises:
        ValueError: there are such values.
    """
    levels = column.dtype == torch.uint8 and not unscaled
    if column.dtype == torch.bool or (levels and limits[0] <= 0 and limits[1] >= 1):
        return
    lows, highs = zip(*[(math.inf, -math.inf), *map(_extremes, _finite_blocks(column))], strict=True)
    low, high = min(lows) / (255 if levels else 1), max(highs) / (255 if levels else 1)
    if low < limits[0] or high > limits[1]:
        raise ValueError(
            f"data '{name}': expected values in [{limits[0]:g}, {limits[1]:g}], got values from {low:.4g} to {high:.4g}"
        )


def require_counts(name: str, column: Column) -> None:
    """Refuse values that are not whole numbers from 0 on.

    Raises:
        ValueError: there are such values; says the first.
    """
    for block in _finite_blocks(column) if column.is_floating_point() else ():
        if bool((bad := (block < 0) | (block != block.floor())).any()):
            value = block[bad][0].item()
            raise ValueError(f"data '{name}': expected counts, whole numbers of at least 0, got {value:.4g} among them")
    require_range(name, column, (0.0, math.inf))


def require_levels(name: str, column: Column, highest: int) -> None:
    """Refuse values that are none of the levels k / highest, k = 0, ..., highest; whole numbers are divided when read.

    Raises:
        ValueError: there are such values; says the first.
    """
    for block in _finite_blocks(column) if column.is_floating_point() else ():
        level = block * highest
        if bool((bad := (level - level.round().clamp(0, highest)).abs() > _LEVEL_TOLERANCE).any()):
            raise ValueError(
                f"data '{name}': expected levels k / {highest}, k = 0, ..., {highest}, got {block[bad][0].item():.4g} "
                f"among them; images of {highest + 1} levels are divided by {highest}"
            )


def is_grey(name: str, column: Column, unscaled: bool = False) -> bool:
    """Whether data for a binary site have values strictly between 0 and 1 (0 and 255 for uint8 levels).

    Raises:
        ValueError: there are values outside of that range.
    """
    require_range(name, column, (0.0, 1.0), unscaled)
    if column.dtype == torch.bool or (column.dtype == torch.uint8 and unscaled):
        return False
    one = 255 if column.dtype == torch.uint8 else 1
    return not all(bool(((block == 0) | (block == one)).all()) for block in _finite_blocks(column))


def _reshape(column: Tensor, shape: tuple[int, ...]) -> Tensor:
    if column[0].numel() != math.prod(shape):
        raise ValueError(
            f"expected data of shape (N, {', '.join(map(str, shape))}) or with as many elements, {math.prod(shape)}; "
            f"got {tuple(column.shape)}, which is {column[0].numel()} elements per datum"
        )
    return column.reshape(len(column), *shape)


@dataclass(frozen=True, eq=False)
class TensorData:
    """A data set that is cut by index, in memory or mapped from files.

    Attributes:
        columns: tensors or sparse rows by argument name, N rows each.
        reader: makes a batch of what the index cuts out.
    """

    columns: StoredColumns
    reader: Reader

    def __len__(self) -> int:
        return _length(self.columns)

    def resident(self) -> TensorData:
        """The same data on the reader's device; left where they are if they would fill half of a GPU's free memory.

        Sparse rows are left where they are in any case.
        """
        device = self.reader.device
        dense = {name: c for name, c in self.columns.items() if isinstance(c, Tensor)}
        if device.type == "cuda":
            size = sum(column.nbytes for column in dense.values() if column.device.type == "cpu")
            if size > torch.cuda.mem_get_info(device)[0] / 2:
                return self
        return TensorData(self.columns | {name: c.to(device) for name, c in dense.items()}, self.reader)

    def drawn_once(self, seed: int, num_data: int | None = None) -> TensorData:
        """The first data, with grey levels that a binary site observes drawn once and for all.

        For evaluations: whatever is evaluated, in whatever batches, it is evaluated on the same binary data.

        Args:
            seed: of the draws; torch's global generators are not used.
            num_data: how many data to take; None for all.
        """
        columns = _rows(self.columns, slice(num_data))
        if not self.reader.drawn:
            return TensorData(columns, self.reader)
        unscaled = self.reader.unscaled | self.reader.drawn
        return _DrawnOnce(columns, replace(self.reader, drawn=frozenset(), unscaled=unscaled), self.reader, seed)

    def rows(self, index: Tensor | slice) -> Columns:
        """Read the rows of an index (M,) or a slice."""
        return self.reader(_rows(self.columns, index))

    def in_order(self, batch_size: int, part: slice = slice(None)) -> Iterator[Columns]:
        """Every row once, in order, or those of a part; the last batch may be short."""
        start, stop, _ = part.indices(len(self))
        for first in range(start, stop, batch_size):
            yield self.rows(slice(first, min(first + batch_size, stop)))

    def shuffle(self, batch_size: int, seed: int, epoch: int, skip: int = 0) -> Iterator[Tensor]:
        """Indices (M,) of minibatches that hold every row once, the last maybe short; nothing is read.

        Args:
            batch_size: M.
            seed: of the run: the order depends on it and on the epoch alone.
            epoch: counted from 0.
            skip: batches to leave out at the start.
        """
        order = np.random.default_rng([seed, epoch]).permutation(len(self))
        index = torch.from_numpy(order).to(next(iter(self.columns.values())).device)
        return itertools.islice(iter(index.split(batch_size)), skip, None)


def _length(columns: Mapping[str, Column]) -> int:
    return len(next(iter(columns.values())))


def _rows(columns: Mapping[str, C], index: Tensor | slice) -> dict[str, C]:
    if isinstance(index, slice):
        return {name: column[index] for name, column in columns.items()}
    return {name: column[index.to(column.device)] for name, column in columns.items()}


@dataclass(frozen=True, eq=False)
class _DrawnOnce(TensorData):
    """Stored grey levels that read as binary data: the same draws always, made when they are asked for.

    In order, they are drawn block by block as batches go by. Rows by index need what is drawn before them, so the drawn
    columns are then kept, one byte a number.

    Attributes:
        grey: the reader of the stored columns; ``reader`` is that of the drawn ones.
        seed: of the draws.
    """

    grey: Reader
    seed: int

    def rows(self, index: Tensor | slice) -> Columns:
        if isinstance(index, Tensor):
            return self._all.rows(index)
        start, stop, step = index.indices(len(self))
        return self._first(stop).rows(slice(start, stop, step))

    def in_order(self, batch_size: int, part: slice = slice(None)) -> Iterator[Columns]:
        start, stop, _ = part.indices(len(self))
        drawn = _regrouped(_cut(self._draw(stop), start, stop), batch_size)
        for first, batch in zip(range(start, stop, batch_size), drawn, strict=True):
            yield self.reader(_rows(self.columns, slice(first, min(first + batch_size, stop))) | batch)

    @functools.cached_property
    def _all(self) -> TensorData:
        return self._first(len(self))

    def _first(self, stop: int) -> TensorData:
        stored = _rows(self.columns, slice(stop))
        return TensorData({**stored, **next(_regrouped(self._draw(stop), stop), {})}, self.reader)

    def _draw(self, stop: int) -> Iterator[Columns]:
        """The drawn columns in blocks that cover the first rows; a block is the same wherever it stops."""
        generator = torch.Generator(self.grey.device).manual_seed(self.seed)
        plain = replace(self.grey, drawn=frozenset(), data_shape=None, trims=frozenset())
        grey = {name: column for name, column in self.columns.items() if name in self.grey.drawn}
        widest = max(column[:1].numel() for column in grey.values())
        size = max(1, min(_ROWS_PER_DRAW, _ELEMENTS_PER_DRAW // max(1, widest)))
        for start in range(0, stop, size):
            block = plain({name: column[start : start + size] for name, column in grey.items()})
            yield {n: torch.bernoulli(x, generator=generator).to(torch.uint8) for n, x in block.items()}


def _cut(batches: Iterable[Columns], start: int, stop: int) -> Iterator[Columns]:
    """The rows from ``start`` to ``stop`` of all that batches hold, in their batches."""
    seen = 0
    for batch in batches:
        count = _length(batch)
        if seen + count > start:
            yield _rows(batch, slice(max(0, start - seen), max(0, stop - seen)))
        seen += count


def _regrouped(batches: Iterable[Columns], size: int) -> Iterator[Columns]:
    """The rows of batches in batches of another size; the last may be short."""
    held: list[Columns] = []
    for batch in batches:
        held.append(batch)
        count = sum(map(_length, held))
        if count >= size:
            joined, whole = _joined(held), count - count % size
            yield from (_rows(joined, slice(start, start + size)) for start in range(0, whole, size))
            held = [_rows(joined, slice(whole, None))] if whole < count else []
    if held:
        yield _joined(held)


def _joined(batches: list[Columns]) -> Columns:
    return {name: torch.cat([columns[name] for columns in batches]) for name in batches[0]}


@dataclass(frozen=True, eq=False)
class BatchIterable:
    """Batches that somebody else makes: a DataLoader, or any iterable that can be iterated over again.

    Attributes:
        batches: yields tensors, or tuples or dicts of them.
        names: argument names for what comes by position.
        reader: makes a batch of what the iterable yields.
        binary: names of the arguments that a binary site observes, whose values must lie in [0, 1].
        binarize: "none" refuses grey levels among them.
        counts: names of the arguments that must hold whole numbers from 0 on.
        levels: highest levels L of those that must hold k / L, k = 0, ..., L.
    """

    batches: Iterable[Any]
    names: tuple[str, ...]
    reader: Reader
    binary: frozenset[str] = frozenset()
    binarize: str | None = None
    counts: frozenset[str] = frozenset()
    levels: Mapping[str, int] = field(default_factory=dict)

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

    def columns(self, batch: Any) -> StoredColumns:
        """A batch as columns, validated."""
        columns = as_columns(batch, self.names)
        if columns is None:
            raise ValueError(f"expected batches of tensors, or tuples or dicts of them; got {type(batch).__name__}")
        require_valid(columns, self.names, self.reader.data_shape)
        for name in self.binary & columns.keys():
            if is_grey(name, columns[name], name in self.reader.unscaled) and self.binarize == "none":
                raise ValueError(f"data '{name}': expected values 0 and 1 with binarize=\"none\", got grey levels")
        for name in self.counts & columns.keys():
            require_counts(name, columns[name])
        for name in self.levels.keys() & columns.keys():
            require_levels(name, columns[name], self.levels[name])
        return columns

    def raw(self) -> Iterator[dict[str, Any]]:
        """The batches as columns, not yet read."""
        return map(self.columns, self.batches)
