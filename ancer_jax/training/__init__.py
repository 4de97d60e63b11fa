"""Training base classifiers for smoothing: pure losses, and one linear loop."""

from ancer_jax.training.loop import HISTORY, PRESETS, TrainConfig, TrainingMethod, TrainState, train

__all__ = ["HISTORY", "PRESETS", "TrainConfig", "TrainState", "TrainingMethod", "train"]
