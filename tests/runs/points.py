"""A hundred points, and settings of short runs of them: for tests of how a run is carried out."""

import numpy as np

from ancer_jax import CertifyConfig, LeakageConfig, RunConfig
from ancer_jax.data import Dataset
from tests.toy import SEARCH

RNG = np.random.default_rng(0)
IMAGES = (RNG.integers(0, 256, (100, 3, 3, 1)) / 255).astype(np.float32)  # of 8 bits, as exact certificates need
POINTS = Dataset("points", np.arange(100), IMAGES, RNG.integers(0, 2, 100), 2)
THETA = np.asarray(0.3, np.float32)
SMALL = {"certify": CertifyConfig(n0=10, n=100), "leakage": LeakageConfig(3, 4), "guard_samples": 20, **SEARCH}
FIXED = RunConfig(theta=0.3, certify=SMALL["certify"])
ISOTROPIC = RunConfig(method="isotropic", theta=0.3, **SMALL)
ANCER = RunConfig(method="ancer", theta=0.3, **SMALL)
