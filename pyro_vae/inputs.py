"""Where programs and data meet: a user's data, of any accepted form, as batches that a program can be called with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_vae.data import LENGTHS, MASK, BatchIterable, Columns, Dataset, Reader, TensorData, as_columns
from pyro_vae.data.batches import (
    Column,
    StoredColumns,
    along_the_sequences,
    blocks,
    is_by_name,
    is_grey,
    is_unscaled,
    observed_name,
    require_counts,
    require_levels,
    require_range,
    require_valid,
    trimmed,
)
from pyro_vae.programs import HasModelAndGuide, Program, ProgramCheck, as_program, check_program, signature_of

__all__ = ["Inputs", "batch_size_of", "device_of", "move_to", "open_inputs"]

_DRY_RUN = 100


@dataclass(frozen=True, eq=False)
class Inputs:
    """A program's data, checked against it.

    Attributes:
        data: the rows or batches.
        by_name: call the program by keyword (the data came as a dict), not by position.
        check: what the dry run found.
        takes_lengths: whether the program has an argument of that name, so that its data are sequences.
    """

    data: TensorData | BatchIterable
    by_name: bool
    check: ProgramCheck
    takes_lengths: bool = False

    def call(self, columns: Columns) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The (args, kwargs) with which to call the program's functions on a batch."""
        return ((), dict(columns)) if self.by_name else (tuple(columns.values()), {})

    def num_steps(self, columns: Columns | StoredColumns) -> Tensor | None:
        """Steps of each sequence of some columns, int64 (M,): its length, or T where none is given; else None."""
        if not self.takes_lengths:
            return None
        if LENGTHS in columns:
            lengths = columns[LENGTHS]
            return (lengths if isinstance(lengths, Tensor) else lengths.dense()).to(torch.int64)
        x = columns[observed_name(columns)]
        shape = self.data.reader.data_shape or (*x.shape[1:], 1)
        return torch.full(x.shape[:1], shape[0], device=x.device)

    def first(self) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The (args, kwargs) of one batch: the first rows, or the iterable's first batch."""
        if isinstance(self.data, TensorData):
            return self.call(self.data.rows(slice(0, _DRY_RUN)))
        return self.call(self.data.reader(self.data.columns(self.data.first())))

    def trimming(self, program: Program) -> Inputs:
        """The same inputs, of which each batch is cut to about its own longest sequence.

        Raises:
            ValueError: they have no lengths, or the program does not take fewer steps.
        """
        columns = self.data.columns if isinstance(self.data, TensorData) else self.data.columns(self.data.first())
        if LENGTHS not in columns:
            raise ValueError(f"trim_padding: expected padded sequences and their {LENGTHS}, got {list(columns)}")
        read = self.data.reader({name: column[:_DRY_RUN] for name, column in columns.items()})
        fewer = int(read[LENGTHS].max() + 1) // 2
        names = along_the_sequences(columns, by_name=not isinstance(self.data, TensorData))
        args, kwargs = self.call(trimmed(read | {LENGTHS: read[LENGTHS].clamp(max=fewer)}, names))
        try:
            check_program(program, args, kwargs)
        except ValueError as error:
            raise ValueError(f"trim_padding: expected a program that takes any number of steps: {error}") from error
        return replace(self, data=replace(self.data, reader=replace(self.data.reader, trims=names)))

    def tensors(self) -> TensorData:
        """The data as rows.

        Raises:
            ValueError: they are an iterable of batches.
        """
        if not isinstance(self.data, TensorData):
            raise ValueError("expected tensors or a data set here, got an iterable of batches")
        return self.data


def batch_size_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """M, the number of data that a program is called with."""
    return len(next(iter((*args, *kwargs.values()))))


def device_of(program: Program) -> tuple[torch.device, torch.dtype]:
    """Device and floating-point type of a program: its first parameter's, else torch's defaults."""
    parameters = [p for m in program.modules().values() for p in m.parameters()]
    for tensor in (*program.named_parameters().values(), *parameters):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.get_default_device(), torch.get_default_dtype()


def move_to(program: HasModelAndGuide, device: str | torch.device) -> None:
    """Move a program's modules and parameters to a device, in place.

    Raises:
        ValueError: there is no such device.
    """
    try:
        target = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: expected one that this machine has, got {str(device)!r} ({reason})") from error
    bridged = as_program(program)
    for module in bridged.modules().values():
        module.to(target)
    for tensor in bridged.named_parameters().values():
        tensor.data = tensor.data.to(target)


def open_inputs(
    program: Program, data: Any, *, binarize: str | None = None, split: str = "train", batch_size: int = _DRY_RUN
) -> Inputs:
    """Check data and program against each other, by a dry run on the first batch.

    Args:
        program: what will observe the data.
        data: a tensor; a tuple (by position) or dict (by name) of tensors with an equal first dimension; a data set of
            :func:`pyro_vae.load_dataset`, of which ``split`` is taken; or an iterable of batches. Arrays serve as
            tensors, and those mapped from files (``numpy.load(..., mmap_mode="r")``) may be larger than memory; so do
            matrices of scipy.sparse, of which a batch's rows alone are made dense. Of sequences of unequal length, x
            (N, T, ...), padded, and by the argument's name ``lengths`` (N,); a data set's own are given to a program
            that has an argument of that name. Beside ``mask``, of bool and of x's shape or its first axes, x may be NaN
            where the mask is False; it is read as 0 there. A data set that has NaN gives a program with an argument
            of that name the mask of what is not NaN.
        binarize: "dynamic" draws grey levels that a binary site observes, "none" refuses them. None: as the data set
            says, else "dynamic".
        split: "train", "valid" or "test".
        batch_size: rows of the dry run.

    Returns:
        The data, on the program's device if there is room, with the reader that fits the program.

    Raises:
        ValueError: the data or the program are not as they should be; see :func:`pyro_vae.programs.check_program`.
    """
    if binarize not in (None, "dynamic", "none"):
        raise ValueError(f'binarize: expected "dynamic", "none" or None, got {binarize!r}')
    if isinstance(data, Dataset):
        binarize = binarize or data.binarize
        data = _columns_of(program, data, split)
    by_name = is_by_name(data)
    device, dtype = device_of(program)
    reader = Reader(device, dtype, program.data_shape)
    names = _argument_names(program)
    columns = None if isinstance(data, list) else as_columns(data, names)
    if columns is not None:
        require_valid(columns, names, program.data_shape)
        check, reader = _fit_reader(program, columns, reader, by_name, binarize, batch_size)
        return Inputs(TensorData(columns, reader).resident(), by_name, check, _takes(program, LENGTHS))
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
        raise ValueError(
            "expected data as a tensor, a tuple or dict of tensors, a data set of load_dataset or an iterable of "
            f"batches; got {type(data).__name__}"
        )
    return _open_batches(program, BatchIterable(data, names, reader), binarize)


def _columns_of(program: Program, data: Dataset, split: str) -> Any:
    """What a program takes of a data set: a split, and what it has arguments for of its lengths and its gaps.

    Raises:
        ValueError: the sequences are of unequal length, and it has no argument for their lengths.
    """
    x, lengths = getattr(data, split), getattr(data, f"{split}_{LENGTHS}")
    if lengths is not None and not _takes(program, LENGTHS):
        if bool((lengths != x.shape[1]).any()):
            raise ValueError(
                f"{data.name}: sequences of {int(lengths.min())} to {int(lengths.max())} steps are padded to "
                f"{x.shape[1]}, and padding is no data: expected a program with an argument `{LENGTHS}`, to mask it "
                f"by; got arguments ({', '.join(signature_of(program.model).parameters)})"
            )
        lengths = None
    mask = data.observed(split) if _takes(program, MASK) else None
    if lengths is None and mask is None:
        return x
    named = {observed_name(dict.fromkeys(_argument_names(program))): x, LENGTHS: lengths, MASK: mask}
    return {name: column for name, column in named.items() if column is not None}


def _takes(program: Program, name: str) -> bool:
    return name in signature_of(program.model).parameters


def _open_batches(program: Program, batches: BatchIterable, binarize: str | None) -> Inputs:
    first = batches.first()
    columns, by_name = batches.columns(first), is_by_name(first)
    size = len(next(iter(columns.values())))
    check, reader = _fit_reader(program, columns, batches.reader, by_name, binarize, size, _undecided(batches, columns))
    # One batch does not tell what the next ones hold: each is checked as it comes, and drawn where drawing is allowed.
    drawn = reader.drawn if binarize == "none" else check.binary_arguments & columns.keys()
    read = replace(batches, reader=replace(reader, drawn=drawn))
    checks = replace(read, counts=check.count_arguments, levels=check.level_arguments)
    whole = replace(checks, binary=check.binary_arguments, binarize=binarize)
    return Inputs(whole, by_name, check, _takes(program, LENGTHS))


def _undecided(batches: BatchIterable, first: StoredColumns) -> frozenset[str]:
    """Names of the uint8 columns that are 0 throughout the first batch, but numbers 0 and 1 in the next that is not."""
    open_yet = {name for name, column in first.items() if column.dtype == torch.uint8 and not _is_above_zero(column)}
    found = set()
    for batch in batches.batches if open_yet else ():
        columns = batches.columns(batch)
        decided = {name for name in open_yet & columns.keys() if _is_above_zero(columns[name])}
        found |= {name for name in decided if is_unscaled(columns[name])}
        if not (open_yet := open_yet - decided):
            break
    return frozenset(found)


def _is_above_zero(column: Column) -> bool:
    return any(bool(block.any()) for block in blocks(column))


def _argument_names(program: Program) -> tuple[str, ...]:
    parameters = signature_of(program.model).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return tuple(positional) or ("x",)


def _fit_reader(
    program: Program,
    columns: StoredColumns,
    reader: Reader,
    by_name: bool,
    binarize: str | None,
    batch_size: int,
    unscaled: frozenset[str] = frozenset(),
) -> tuple[ProgramCheck, Reader]:
    unscaled |= frozenset(name for name, column in columns.items() if is_unscaled(column))
    if program.data_range is not None and program.data_range[1] > 1:
        unscaled |= {next(iter(columns))}  # counts, not levels of grey
    missing = frozenset({observed_name(columns)} if MASK in columns else ())
    reader = replace(reader, unscaled=unscaled, missing=missing)
    few = reader({name: column[:batch_size] for name, column in columns.items()})
    args, kwargs = ((), few) if by_name else (tuple(few.values()), {})
    check = check_program(program, args, kwargs)
    rows = len(next(iter(few.values())))
    if check.batch_size != rows:
        raise ValueError(
            f'the plate "data" holds {check.batch_size} data where the program is given {rows} rows: one row is one '
            "datum, and minibatches are cut before the program is called; it states the size of the whole data set by "
            'pyro.plate("data", N, subsample_size=len(x))'
        )
    binary = check.binary_arguments & columns.keys()
    grey = {name for name in binary if is_grey(name, columns[name], name in unscaled)}
    if grey and binarize == "none":
        raise ValueError(
            f"data {sorted(grey)} are observed by a binary site: expected values 0 and 1 (0 and 255 for uint8), got "
            'grey levels; binarize="dynamic" (--binarize dynamic) draws them anew at each read, or choose a likelihood '
            "for real numbers, such as gaussian"
        )
    for name in check.count_arguments & columns.keys():
        require_counts(name, columns[name])
    for name in check.level_arguments.keys() & columns.keys():
        require_levels(name, columns[name], check.level_arguments[name])
    if program.data_range is not None:
        first = next(iter(columns))
        require_range(first, columns[first], program.data_range, first in unscaled)
    return check, replace(reader, drawn=frozenset(grey))
