"""Shards as a run writes them, of random thetas and counts: for tests of run directories and of their tables."""

import numpy as np

from ancer_jax.runs import RunConfig, open_run
from ancer_jax.search import AnisotropicConfig, IsotropicConfig, LeakageConfig
from ancer_jax.smoothing import ABSTAIN, CertifyConfig
from ancer_jax.smoothing.certify import random_evidence

CONFIG = RunConfig(
    method="ancer",
    theta=0.25,
    certify=CertifyConfig(n0=10, n=1000, alpha=0.001),
    isotropic=IsotropicConfig(theta_max=1.25),
    anisotropic=AnisotropicConfig(theta_max=1.5),
    leakage=LeakageConfig(num_probes=50, num_samples=8),
)
IMAGE_SHAPE = (3, 2, 1)


def settings(config=CONFIG):
    """The settings of a run of images of `IMAGE_SHAPE`."""
    data = {"name": "toy", "fingerprint": "0", "image_shape": [*IMAGE_SHAPE], "num_classes": 3}
    return config.settings() | {"data": data}


def arrays(ids, config=CONFIG):
    """The arrays of one shard: random counts, the gaps that follow from them, and random thetas of at most 1.5."""
    rng = np.random.default_rng([*ids])
    n = len(ids)
    theta_shape = (n, *IMAGE_SHAPE) if config.method in ("ancer", "universal") else (n,)
    counts = rng.integers(400, 1001, n).astype(np.int32)
    spread = (config.certify.n - counts) // 2 if config.certify.bound == "separate" else None
    evidence = random_evidence(counts, config.certify, spread)
    p_lower, gap = evidence.bound_and_gap(config.certified_noise)
    return {
        "ids": np.asarray(ids),
        "labels": rng.integers(0, 3, n),
        "pixels": rng.integers(0, 2**63, n).astype(np.uint64),
        "predictions": np.where(gap > 0, rng.integers(0, 3, n), ABSTAIN),
        "counts": counts,
        "n": evidence.n,
        "draws": evidence.n + config.certify.n0,
        "passes": np.array(1200 * n),
        "p_lower": p_lower,
        "gap": gap,
        "theta": np.minimum(rng.exponential(size=theta_shape), 1.5).astype(np.float32),
        **{f"bound_{name}": column for name, column in evidence._asdict().items()},
        "leakage_num_leaked": rng.integers(0, 50, n).astype(np.int32),
        "leakage_num_eligible": np.full(n, 50, np.int32),
        "leakage_votes": rng.integers(0, 400, n).astype(np.int32),
        "leakage_draws": np.full(n, 400, np.int32),
        "seconds": rng.exponential(size=n),
    }


def write(path, *batches, config=CONFIG):
    """Write a shard for each batch of ids into the run directory `path`, and its tables; the path of `results.tsv`."""
    with open_run(path, settings(config), {}) as run:
        for ids in batches:
            run.write_shard(arrays(ids, config))
        return run.export()
