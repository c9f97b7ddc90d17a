"""Time series in tables: a CSV file with a column for each variable and a row for each step."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae.data.dataset import SPLITS, Array, Parts
from pyro_vae.data.sequences import pad_sequences

__all__ = ["read_table"]

SEQUENCE = "sequence"


def read_table(path: Path) -> Parts:
    """Read a CSV file of numbers, with the names of the columns in its first line.

    A column named "sequence" says which sequence a row is a step of; steps are in the order of the rows. Without it
    the file is one long sequence, which is cut in time, 8 : 1 : 1. Each split is one sequence then: whoever wants
    windows cuts them.

    Args:
        path: Of the file.

    Returns:
        Of several sequences "train" (N, T, D), float32, padded at the end, and "train_lengths" (N,); of one, each
        split, (1, T, D), and its length. Empty cells are NaN.

    Raises:
        ValueError: The file is no such table; says the column and the first bad cell.
    """
    table = _read(path)
    keys = table.pop(SEQUENCE) if SEQUENCE in table.columns else None
    if not len(table) or not len(table.columns):
        raise ValueError(f"{path}: expected rows of numbers, found {len(table)} rows of {list(table.columns)}")
    numbers = np.stack([_numbers(path, name, table[name]) for name in table.columns], -1)
    if keys is None:
        return _cut_in_time(path, numbers)
    if keys.isna().any():
        raise ValueError(
            f"{path}: expected a value in each cell of column {SEQUENCE!r}, found none in {_row(keys.isna())}"
        )
    rows = keys.groupby(keys, sort=False).indices
    x, lengths = pad_sequences([numbers[rows[key]] for key in keys.unique()])
    return {"train": x.numpy(), "train_lengths": lengths.numpy()}


def _read(path: Path) -> Any:
    import pandas

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)  # of rows with more cells than names
            table = pandas.read_csv(path, skipinitialspace=True, index_col=False)
    except (ValueError, pandas.errors.ParserWarning) as error:  # of a parser, of an empty file and of encodings
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: expected a CSV file with a name for each column in its first line ({reason})"
        ) from error
    names = [str(name).strip() for name in table.columns]
    if nameless := [number for number, name in enumerate(names) if name == "" or name.startswith("Unnamed: ")]:
        raise ValueError(
            f"{path}: expected a name for each column, found none for column {nameless[0]} (if it is an index: "
            "to_csv(index=False))"
        )
    if repeated := [name for number, name in enumerate(names) if name in names[:number]]:
        raise ValueError(f"{path}: expected a name of its own for each column, found {repeated[0]!r} again")
    if all(map(_is_number, names)) and names != [str(number) for number in range(len(names))]:
        raise ValueError(
            f"{path}: expected the names of columns in the first line, found numbers: {', '.join(names[:5])}"
        )
    table.columns = names
    return table


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _numbers(path: Path, name: str, column: Any) -> Array:
    """A column as float32; empty cells are NaN."""
    import pandas

    numbers = pandas.to_numeric(column, errors="coerce")
    bad = numbers.isna() & column.notna()
    if bad.any():
        raise ValueError(
            f"{path}: expected numbers in column {name!r}, found {column[bad].iloc[0]!r} in {_row(bad)}; leave the "
            "column out, or write numbers for what it says"
        )
    with np.errstate(over="ignore"):  # infinite in float32: refused where it is used
        array: Array = numbers.to_numpy(np.float32, na_value=np.nan)
    return array


def _row(bad: Any) -> str:
    return f"row {int(np.flatnonzero(bad)[0])} (the first below the names is row 0)"


def _cut_in_time(path: Path, numbers: Array) -> Parts:
    """One series (T, D) as three, each of one sequence: the last tenth is for the test, that before it to validate."""
    tenth = max(1, len(numbers) // 10)
    if len(numbers) < 3:
        raise ValueError(f"{path}: expected at least 3 rows to cut into train, valid and test, found {len(numbers)}")
    parts: Parts = {}
    for split, steps in zip(SPLITS, np.split(numbers, [-2 * tenth, -tenth]), strict=True):
        parts |= {split: steps[None], f"{split}_lengths": np.array([len(steps)])}
    return parts
