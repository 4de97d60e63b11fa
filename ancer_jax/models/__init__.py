"""Flax networks, one file per family; stored, bundled and converted ones."""

from ancer_jax.models.bundled import BUNDLED_BY_NORM, BundledModel, bundled_models, load_bundled
from ancer_jax.models.checkpoints import NETWORKS, Checkpoint, load_network, make_network, save_network
from ancer_jax.models.denoiser import DnCNN, denoised, one_step_diffusion
from ancer_jax.models.front import Front, WithFront, wiener_front, with_front
from ancer_jax.models.resolve import check_fit, resolve_classifier
from ancer_jax.models.torch_import import convert_torch, read_torch, stored_normalisation

__all__ = [
    "BUNDLED_BY_NORM",
    "NETWORKS",
    "BundledModel",
    "Checkpoint",
    "DnCNN",
    "Front",
    "WithFront",
    "bundled_models",
    "check_fit",
    "convert_torch",
    "denoised",
    "load_bundled",
    "load_network",
    "make_network",
    "one_step_diffusion",
    "read_torch",
    "resolve_classifier",
    "save_network",
    "stored_normalisation",
    "wiener_front",
    "with_front",
]
