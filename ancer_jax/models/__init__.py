"""Flax networks, one file per family, where they come from and how they are stored."""

from ancer_jax.models.bundled import BundledModel, load_bundled
from ancer_jax.models.checkpoints import NETWORKS, Trained, load_network, make_network, save_network
from ancer_jax.models.torch_import import convert_torch, read_torch, stored_normalisation

__all__ = [
    "NETWORKS",
    "BundledModel",
    "Trained",
    "convert_torch",
    "load_bundled",
    "load_network",
    "make_network",
    "read_torch",
    "save_network",
    "stored_normalisation",
]
