"""The passes that a report counts are those that the network sees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancer_jax import (
    AnisotropicConfig,
    CertifyConfig,
    Execution,
    IsotropicConfig,
    LeakageConfig,
    RunConfig,
    devices,
    from_function,
)
from ancer_jax.data import Dataset, batches, take
from ancer_jax.report.cost import passes
from ancer_jax.runs.job import make_job
from tests.toy import DATASET

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = {
    "certify": CertifyConfig(n0=10, n=300),
    "isotropic": IsotropicConfig(steps=4, num_samples=8),
    "anisotropic": AnisotropicConfig(steps=4, num_samples=8),
    "leakage": LeakageConfig(3, 4),
    "guard_samples": 20,
}
PENALISED = {
    "isotropic": IsotropicConfig(steps=4, num_samples=8, leakage_weight=1.0, leakage_batch=5),
    "anisotropic": AnisotropicConfig(steps=3, num_samples=8, leakage_weight=1.0, leakage_batch=5),
}


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(theta=0.3, **SMALL),
        RunConfig(method="universal", **SMALL),
        pytest.param(RunConfig(method="isotropic", theta=0.3, leakage_limit=0.5, **SMALL), marks=pytest.mark.slow),
        RunConfig(method="isotropic", theta=0.3, **SMALL | {"leakage": None}),
        pytest.param(RunConfig(method="ancer", theta=0.3, guard="off", **SMALL), marks=pytest.mark.slow),
        RunConfig(method="ancer", theta=0.3, leakage_limit=0.5, **SMALL | PENALISED),
    ],
    ids=[
        "fixed",
        "universal",
        "isotropic with a limit",
        "isotropic without leakage",
        "ancer without guard",
        "ancer with penalty and limit",
    ],
)
def test_passes_are_those_that_the_network_sees(config):
    """Of a linear network that counts."""
    mesh, seen = devices.device_mesh(1), {"forward": 0, "backward": 0}

    def count(what, rows):
        seen[what] += len(rows)

    @jax.custom_vjp
    def watched(x):
        jax.debug.callback(functools.partial(count, "forward"), x[:, 0])
        return x

    def backward(_, slope):
        jax.debug.callback(functools.partial(count, "backward"), slope[:, 0])
        return (slope,)

    watched.defvjp(lambda x: (watched(x), None), backward)
    weights = jnp.linspace(-1, 1.5, 9)
    logits = lambda _, x: watched(x.reshape(len(x), -1)) @ jnp.stack([0 * weights, weights], axis=1)
    classifier = from_function(logits, {}, num_classes=2)
    six = Dataset("six", np.arange(6), np.concatenate([DATASET.images, 1 - DATASET.images[:1]]), np.zeros(6, int), 2)
    start = np.full((3, 3, 1) if config.method == "universal" else (), 0.3, np.float32)
    job = make_job(classifier, config, start, Execution(chunk=10), mesh).with_probes(six)
    jax.effects_barrier()
    seen.update(forward=0, backward=0)  # what is spent once per run
    (batch,) = batches(take(six, np.arange(5)), 5)
    collected = job.collect(job.launch(batch))
    jax.effects_barrier()
    forward, backward, leakage = passes(config, float(collected.draws.mean()))
    assert (seen["forward"], seen["backward"]) == (5 * (forward + leakage), 5 * backward)
    assert leakage == (12 + 3 if config.data_dependent and config.leakage else 0)
