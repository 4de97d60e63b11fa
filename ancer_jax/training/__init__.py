"""Training base classifiers for randomized smoothing: settings and losses of the methods, and a training loop."""

from ancer_jax.training.config import METHODS, PRESETS, TrainConfig, TrainingMethod
from ancer_jax.training.denoiser import DenoiserConfig, DenoiserState, denoiser_state, train_denoiser
from ancer_jax.training.loop import HISTORY, TrainState, train

__all__ = [
    "HISTORY",
    "METHODS",
    "PRESETS",
    "DenoiserConfig",
    "DenoiserState",
    "TrainConfig",
    "TrainState",
    "TrainingMethod",
    "denoiser_state",
    "train",
    "train_denoiser",
]
