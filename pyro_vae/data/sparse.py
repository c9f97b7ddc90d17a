"""Columns of mostly zeros: kept in compressed sparse rows, and made dense only where rows are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from scipy.sparse import csr_array, sparray, spmatrix
from torch import Tensor

__all__ = ["SparseRows", "is_sparse", "sparse_rows"]

_VALUES_IN_BLOCK = 2**20


def is_sparse(data: Any) -> bool:
    """Whether data are a matrix or an array of scipy.sparse, of whatever format."""
    return isinstance(data, (sparray, spmatrix))


def sparse_rows(name: str, data: Any) -> SparseRows:
    """A scipy.sparse matrix or array as a column; one in canonical CSR format is not copied, and none is written to.

    Args:
        name: what the data are called in messages.
        data: (N, D), of any format: numbers that torch has a type for.

    Raises:
        ValueError: it is not two-dimensional, or holds something else.

    Example:
        >>> column = sparse_rows("x", csr_array(np.eye(3, 4)))
        >>> len(column), column.shape, column[1:].dense().shape
        (3, (3, 4), torch.Size([2, 4]))
    """
    if data.ndim != 2:
        raise ValueError(f"data '{name}': expected a sparse array of shape (N, D), got shape {data.shape}")
    if data.dtype.kind not in "biuf" or data.dtype.itemsize > 8 or not data.dtype.isnative:
        raise ValueError(
            f"data '{name}': expected real numbers of at most 64 bits in native byte order, got a sparse array of "
            f"dtype {data.dtype}"
        )
    rows = csr_array(data)
    if not rows.has_canonical_format:  # an entry that is stored in parts is their sum
        rows = rows.copy()
        rows.sum_duplicates()
    return SparseRows(rows)


@dataclass(frozen=True, eq=False)
class SparseRows:
    """N rows of D numbers, most of them zero: what a data set asks of a column, without a dense array of (N, D).

    Attributes:
        matrix: the rows, (N, D), in canonical CSR format.
    """

    matrix: Any  # csr_array, whose stubs know no slices of rows

    def __len__(self) -> int:
        return self.shape[0]

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice | Tensor) -> SparseRows: ...
    def __getitem__(self, index: int | slice | Tensor) -> SparseRows | Tensor:
        """The rows of a slice or an index (M,), sparse still; one row (D,) by its number, dense."""
        if isinstance(index, int):
            return self[index : index + 1 or None].dense()[0]
        if isinstance(index, slice) and index.indices(len(self)) == (0, len(self), 1):
            return self
        return SparseRows(self.matrix[index if isinstance(index, slice) else index.cpu().numpy()])

    def dense(self) -> Tensor:
        """A new tensor (N, D) of the stored type."""
        return torch.from_numpy(self.matrix.toarray())

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        rows, width = self.matrix.shape
        return int(rows), int(width)

    @property
    def ndim(self) -> int:
        """Two."""
        return 2

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers."""
        return self._values.dtype

    @property
    def device(self) -> torch.device:
        """The CPU: rows go to other devices as they are read."""
        return torch.device("cpu")

    def numel(self) -> int:
        """N D: numbers, not stored ones."""
        return self.shape[0] * self.shape[1]

    def is_floating_point(self) -> bool:
        """Whether the numbers are."""
        return self.dtype.is_floating_point

    def values(self) -> Iterator[Tensor]:
        """Blocks that hold every number that is somewhere in the column, stored or, once, as the zero that is not."""
        yield from (block for block in self._values.split(_VALUES_IN_BLOCK) if len(block))
        if self.matrix.nnz < self.numel():
            yield torch.zeros(1, dtype=self.dtype)

    def stored(self) -> Iterator[Tensor]:
        """Blocks of where the rows begin, of the places of the stored numbers, and of the numbers."""
        for places in (self.matrix.indptr, self.matrix.indices):
            for block in torch.from_numpy(places).split(_VALUES_IN_BLOCK):
                yield block.long()  # of 32 or 64 bits, as scipy had it
        yield from self._values.split(_VALUES_IN_BLOCK)

    def non_finite_rows(self) -> Tensor:
        """Indices of the rows that hold NaN or infinity."""
        bad = np.flatnonzero(~np.isfinite(self.matrix.data))
        return torch.from_numpy(np.unique(np.searchsorted(self.matrix.indptr, bad, side="right") - 1))

    @property
    def _values(self) -> Tensor:
        return torch.from_numpy(self.matrix.data)
