"""Data sets of images, by name, file or folder, and their batches."""

from ancer_jax.data.dataset import Dataset, batches, select, take
from ancer_jax.data.loading import BUNDLED_SUBSET, load_dataset

__all__ = ["BUNDLED_SUBSET", "Dataset", "batches", "load_dataset", "select", "take"]
