"""Flax networks, one file per family; stored, bundled and converted ones."""

from ancer_jax.models.bundled import BundledModel, load_bundled
from ancer_jax.models.checkpoints import NETWORKS, Checkpoint, load_network, make_network, save_network
from ancer_jax.models.resolve import check_fit, resolve_classifier
from ancer_jax.models.torch_import import convert_torch, read_torch, stored_normalisation

__all__ = [
    "NETWORKS",
    "BundledModel",
    "Checkpoint",
    "check_fit",
    "convert_torch",
    "load_bundled",
    "load_network",
    "make_network",
    "read_torch",
    "resolve_classifier",
    "save_network",
    "stored_normalisation",
]
