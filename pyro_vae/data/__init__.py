"""Data sets, and how a batch is cut, scaled and binarised. Knows nothing of Pyro."""

from pyro_vae.data.batches import BatchIterable, Columns, Reader, TensorData, as_columns
from pyro_vae.data.datasets import DATASETS, Dataset, DatasetInfo, is_available, load_dataset

__all__ = [
    "DATASETS",
    "BatchIterable",
    "Columns",
    "Dataset",
    "DatasetInfo",
    "Reader",
    "TensorData",
    "as_columns",
    "is_available",
    "load_dataset",
]
