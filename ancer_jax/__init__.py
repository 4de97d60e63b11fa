"""Certify image classifiers by randomized smoothing with anisotropic noise (ANCER), in JAX."""

from ancer_jax import devices as devices
from ancer_jax import differentiable as differentiable
from ancer_jax import metrics as metrics
from ancer_jax import report as report
from ancer_jax.data import dataset_from_arrays, load_dataset
from ancer_jax.memory import Answer, Memory
from ancer_jax.models import bundled_models, load_bundled
from ancer_jax.regions import Region, disjoint, is_superset
from ancer_jax.runs import CarryRunConfig, Execution, RunConfig, carry_run, certify_dataset, load_memory, save_memory
from ancer_jax.search import (
    AnisotropicConfig,
    GuardConfig,
    IsotropicConfig,
    LeakageConfig,
    UniversalConfig,
    guarded_choice,
    optimize_anisotropic,
    optimize_isotropic,
    optimize_universal,
)
from ancer_jax.smoothing import (
    ABSTAIN,
    CarryConfig,
    Certificate,
    CertifyConfig,
    Classifier,
    Gaussian,
    Noise,
    SequentialConfig,
    Smoothed,
    Splitting,
    Uniform,
    carry,
    certificate_from_lost_votes,
    certificate_from_votes,
    certify,
    certify_batch,
    certify_sequentially,
    check_classifier,
    count_lost_votes,
    count_votes,
    from_function,
    from_host,
    from_linen,
    from_nnx,
    predict,
    predict_batch,
)
from ancer_jax.smoothing import bounds as bounds

__version__ = "0.1.0"

__all__ = [
    "ABSTAIN",
    "AnisotropicConfig",
    "Answer",
    "CarryConfig",
    "CarryRunConfig",
    "Certificate",
    "CertifyConfig",
    "Classifier",
    "Execution",
    "Gaussian",
    "GuardConfig",
    "IsotropicConfig",
    "LeakageConfig",
    "Memory",
    "Noise",
    "Region",
    "RunConfig",
    "SequentialConfig",
    "Smoothed",
    "Splitting",
    "Uniform",
    "UniversalConfig",
    "bundled_models",
    "carry",
    "carry_run",
    "certificate_from_lost_votes",
    "certificate_from_votes",
    "certify",
    "certify_batch",
    "certify_dataset",
    "certify_sequentially",
    "check_classifier",
    "count_lost_votes",
    "count_votes",
    "dataset_from_arrays",
    "disjoint",
    "from_function",
    "from_host",
    "from_linen",
    "from_nnx",
    "guarded_choice",
    "is_superset",
    "load_bundled",
    "load_dataset",
    "load_memory",
    "optimize_anisotropic",
    "optimize_isotropic",
    "optimize_universal",
    "predict",
    "predict_batch",
    "save_memory",
]
