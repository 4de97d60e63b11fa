"""Searches for theta: isotropic and anisotropic for one input, universal for all; the guarded choice; leakage."""

from ancer_jax.search.ascent import SearchTrace, optimize_anisotropic, optimize_isotropic
from ancer_jax.search.config import (
    AnisotropicConfig,
    GuardConfig,
    IsotropicConfig,
    LeakageConfig,
    SearchConfig,
    UniversalConfig,
)
from ancer_jax.search.guard import guarded_choice
from ancer_jax.search.leakage import Probes, leakage, leakage_penalty, make_probes, soft_leakage
from ancer_jax.search.theta_map import ThetaMap, load_theta_map, save_theta_map, spectral_theta
from ancer_jax.search.universal import optimize_universal

__all__ = [
    "AnisotropicConfig",
    "GuardConfig",
    "IsotropicConfig",
    "LeakageConfig",
    "Probes",
    "SearchConfig",
    "SearchTrace",
    "ThetaMap",
    "UniversalConfig",
    "guarded_choice",
    "leakage",
    "leakage_penalty",
    "load_theta_map",
    "make_probes",
    "optimize_anisotropic",
    "optimize_isotropic",
    "optimize_universal",
    "save_theta_map",
    "soft_leakage",
    "spectral_theta",
]
