"""Certify image classifiers by randomized smoothing with sample-wise, anisotropic noise (ANCER), in JAX."""

from ancer_jax import differentiable as differentiable
from ancer_jax import memory as memory
from ancer_jax import parallel as parallel
from ancer_jax import report as report
from ancer_jax.certificates import GaussianL2, SplittingL1, UniformL1
from ancer_jax.certification import ABSTAIN, Certification, CertifyConfig, certify, count_votes, predict
from ancer_jax.classifiers import Classifier, check_classifier, from_function, from_linen, from_nnx
from ancer_jax.config import Execution, RunConfig
from ancer_jax.data import load_dataset
from ancer_jax.leakage import LeakageConfig
from ancer_jax.models import load_bundled
from ancer_jax.optimize import (
    AnisotropicConfig,
    IsotropicConfig,
    guarded_choice,
    optimize_anisotropic,
    optimize_isotropic,
)
from ancer_jax.pipeline import certify_dataset
from ancer_jax.regions import Region, disjoint, is_superset, log_volume, proxy_radius, radius
from ancer_jax.runs import load_memory, save_memory
from ancer_jax.sequential import SequentialConfig, certify_sequentially

__all__ = [
    "ABSTAIN",
    "AnisotropicConfig",
    "Certification",
    "CertifyConfig",
    "Classifier",
    "Execution",
    "GaussianL2",
    "IsotropicConfig",
    "LeakageConfig",
    "Region",
    "RunConfig",
    "SequentialConfig",
    "SplittingL1",
    "UniformL1",
    "certify",
    "certify_dataset",
    "certify_sequentially",
    "check_classifier",
    "count_votes",
    "disjoint",
    "from_function",
    "from_linen",
    "from_nnx",
    "guarded_choice",
    "is_superset",
    "load_bundled",
    "load_dataset",
    "load_memory",
    "log_volume",
    "optimize_anisotropic",
    "optimize_isotropic",
    "predict",
    "proxy_radius",
    "radius",
    "save_memory",
]
