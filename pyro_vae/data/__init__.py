"""Data sets, and how a batch is cut, scaled and binarised. Knows nothing of Pyro."""

from pyro_vae.data.batches import BatchIterable, Columns, Reader, TensorData, as_columns
from pyro_vae.data.dataset import Dataset
from pyro_vae.data.datasets import DATASETS, DatasetInfo, is_available, load_dataset
from pyro_vae.data.sequences import LENGTHS, MASK, bouncing_balls, pad_sequences, pendulum

__all__ = [
    "DATASETS",
    "LENGTHS",
    "MASK",
    "BatchIterable",
    "Columns",
    "Dataset",
    "DatasetInfo",
    "Reader",
    "TensorData",
    "as_columns",
    "bouncing_balls",
    "is_available",
    "load_dataset",
    "pad_sequences",
    "pendulum",
]
