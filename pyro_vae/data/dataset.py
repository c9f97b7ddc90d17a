"""A data set in three parts: the form in which named data, files and simulations come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_vae.data.sparse import is_sparse

__all__ = ["SPLITS", "Array", "Binarize", "Dataset", "Parts", "dataset_of"]

Array: TypeAlias = NDArray[Any]
Binarize: TypeAlias = Literal["dynamic", "none"]
Parts: TypeAlias = dict[str, Any]  # arrays: some of train, valid, test, and with what `Dataset` knows of each
Data: TypeAlias = Any  # a Tensor, or a csr_array of counts
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """A data set in three parts.

    Attributes:
        name: Name in `DATASETS`, or the name of the user's file or folder.
        train: Training data, uint8 images (N, H, W) or (N, H, W, C), or a file's array as stored; of documents
            their word counts (N, D), a scipy.sparse.csr_array of int32; of sequences (N, T, ...), padded at
            the end.
        valid: Validation data, likewise; of sequences with a T of its own.
        test: Test data, likewise.
        train_labels: Classes, int64 (N,), or None; so too `valid_labels` and `test_labels`.
        label_names: Name of each class, or None.
        binarize: "dynamic" if pixels are probabilities of 1, drawn afresh at each use; else "none".
        source: What `load_dataset` finds it by again: the name, or the absolute path.
        vocab: Of documents the D words, in the order of the columns; else None.
        train_lengths: Of sequences their steps, int64 (N,), from 1 to T; else None; so too `valid_lengths` and
            `test_lengths`.
        train_states: Of simulated sequences the states that the observations hide, float32 (N, T, S); else
            None; so too `valid_states` and `test_states`.
    """

    name: str
    train: Data
    valid: Data
    test: Data
    train_labels: Tensor | None = None
    valid_labels: Tensor | None = None
    test_labels: Tensor | None = None
    label_names: tuple[str, ...] | None = None
    binarize: Binarize = "none"
    source: str = ""
    vocab: tuple[str, ...] | None = None
    train_lengths: Tensor | None = None
    valid_lengths: Tensor | None = None
    test_lengths: Tensor | None = None
    train_states: Tensor | None = None
    valid_states: Tensor | None = None
    test_states: Tensor | None = None

    def __repr__(self) -> str:
        shapes = ", ".join(f"{split}={tuple(getattr(self, split).shape)}" for split in SPLITS)
        return f"Dataset({self.name!r}, {shapes}, binarize={self.binarize!r})"

    def observed(self, split: str) -> Tensor | None:
        """Where a split holds numbers, bool of its shape; None if nowhere it is NaN."""
        x = getattr(self, split)
        if is_sparse(x) or not x.is_floating_point() or not bool(x.isnan().any()):
            return None
        observed: Tensor = ~x.isnan()
        return observed

    def with_test(self, split: str = "test", num_data: int | None = None) -> Dataset:
        """The data set with the first data of a split, and all that is known of them, in the place of its test split.

        Args:
            split: "train", "valid" or "test".
            num_data: How many to take; None for all.

        Example:
            >>> from pyro_vae.data import load_dataset
            >>> len(load_dataset("digits").with_test("train", 10).test_labels)
            10
        """
        few: dict[str, Any] = {}
        for part in ("", "_labels", "_lengths", "_states"):
            whole = getattr(self, f"{split}{part}")
            few[f"test{part}"] = None if whole is None else whole[:num_data]
        return replace(self, **few)


def dataset_of(name: str, parts: Mapping[str, Any], binarize: Binarize = "none", source: str = "") -> Dataset:
    """A data set of arrays, which are copied; labels and lengths become int64."""
    names: Any = {key: tuple(map(str, parts[key])) for key in ("label_names", "vocab") if key in parts}
    data = {key: _tensor(key, array) for key, array in parts.items() if key not in names}
    return Dataset(name, **data, **names, binarize=binarize, source=source)


def _tensor(key: str, array: Any) -> Data:
    if is_sparse(array):
        return array
    dtype = np.dtype(np.int64) if key.endswith(("_labels", "_lengths")) else array.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(array, dtype, order="C"))  # a copy: some arrays are read-only
