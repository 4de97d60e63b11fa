"""Randomized smoothing: base classifiers, noise laws, the smoothed classifier, and its certificates."""

from ancer_jax.smoothing import bounds as bounds
from ancer_jax.smoothing.carry import CarryConfig, carry, certificate_from_lost_votes, count_lost_votes
from ancer_jax.smoothing.certificate import ABSTAIN, Certificate, CertifyConfig
from ancer_jax.smoothing.certify import (
    certificate_from_votes,
    certify,
    certify_batch,
    count_votes,
    predict,
    predict_batch,
)
from ancer_jax.smoothing.classifier import Classifier, check_classifier, from_function, from_host, from_linen, from_nnx
from ancer_jax.smoothing.noise import AdditiveNoise, Gaussian, Noise, Uniform
from ancer_jax.smoothing.registry import NOISES, make_noise
from ancer_jax.smoothing.sequential import SequentialConfig, certify_sequentially
from ancer_jax.smoothing.smoothed import Smoothed, class_counts, smoothed_probs
from ancer_jax.smoothing.splitting import Splitting

__all__ = [
    "ABSTAIN",
    "NOISES",
    "AdditiveNoise",
    "CarryConfig",
    "Certificate",
    "CertifyConfig",
    "Classifier",
    "Gaussian",
    "Noise",
    "SequentialConfig",
    "Smoothed",
    "Splitting",
    "Uniform",
    "bounds",
    "carry",
    "certificate_from_lost_votes",
    "certificate_from_votes",
    "certify",
    "certify_batch",
    "certify_sequentially",
    "check_classifier",
    "class_counts",
    "count_lost_votes",
    "count_votes",
    "from_function",
    "from_host",
    "from_linen",
    "from_nnx",
    "make_noise",
    "predict",
    "predict_batch",
    "smoothed_probs",
]
