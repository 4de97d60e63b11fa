"""Data sets as arrays: the bundled subset, idx folders and npz files."""

from ancer_jax.data.dataset import Dataset, batches, select, take
from ancer_jax.data.loading import BUNDLED_SUBSET, load_dataset

__all__ = ["BUNDLED_SUBSET", "Dataset", "batches", "load_dataset", "select", "take"]
