"""Flax networks, one file per family, and the classifiers that ship with the package."""

from ancer_jax.models.bundled import BundledModel, load_bundled
from ancer_jax.models.cnn import SmallCNN

__all__ = ["BundledModel", "SmallCNN", "load_bundled"]
