"""Labelled image data sets, by name, file or folder, and their batches."""

from ancer_jax.data.dataset import Dataset, batches, check_classes, pixel_hashes, select, shard, take
from ancer_jax.data.fetch import fetch_dataset
from ancer_jax.data.loading import BUNDLED_SUBSET, dataset_from_arrays, load_dataset

__all__ = [
    "BUNDLED_SUBSET",
    "Dataset",
    "batches",
    "check_classes",
    "dataset_from_arrays",
    "fetch_dataset",
    "load_dataset",
    "pixel_hashes",
    "select",
    "shard",
    "take",
]
