"""Counts and sizes are integers, probabilities real numbers: in the whole public API, without a type checker."""

import subprocess
import sys

import numpy as np
import pytest

from ancer_jax._checks import check_integer, check_real

SCRIPT = """
import dataclasses, warnings
import jax, jax.numpy as jnp, numpy as np
import ancer_jax as aj
from ancer_jax import bounds, data, differentiable, leakage, memory, parallel, smoothing
from ancer_jax.training.loop import TrainConfig

def light(variables, x):
    return jnp.stack([variables - x.sum(axis=(1, 2, 3)), x.sum(axis=(1, 2, 3)) - variables], axis=1)

classifier = aj.from_function(light, jnp.float32(2.0), num_classes=2)
key, noise, x, theta = jax.random.key(0), aj.GaussianL2(), np.full((2, 2, 1), 0.6, np.float32), np.float32(0.5)
these, some = (key, classifier, noise, x, theta), data.Dataset("some", np.arange(3), np.zeros((3, 2, 2, 1), np.float32),
                                                             np.array([0, 1, 0]), 2)
sequential, region = aj.SequentialConfig(tolerance=0.1), aj.Region(x, theta, 0.5, 2)
guarded = lambda **change: aj.guarded_choice(
    *these, theta, guard="volume", **{"num_samples": 10, "chunk": 10, "leakage_samples": 8} | change
)
INTEGERS = {
    "certify": [("chunk", lambda **c: aj.certify(*these, **c))],
    "certify_sequentially": [("chunk", lambda **c: aj.certify_sequentially(*these, sequential=sequential, **c))],
    "predict": [(name, lambda **c: aj.predict(*these, **c)) for name in ("n", "chunk")],
    "count_votes": [("chunk", lambda **c: aj.count_votes(*these, config=aj.CertifyConfig(), **c))],
    "class_counts": [
        (name, lambda **c: smoothing.class_counts(*these, **{"num_samples": 10, "chunk": 5} | c))
        for name in ("num_samples", "chunk")
    ],
    "smoothed_probs": [("num_samples", lambda **c: smoothing.smoothed_probs(*these, **c))],
    "guarded_choice": [(name, guarded) for name in ("num_samples", "chunk", "leakage_samples")],
    "vote_share": [
        (name, lambda **c: differentiable.vote_share(*these, 1, **{"num_samples": 10, "chunk": 5} | c))
        for name in ("num_samples", "chunk")
    ],
    "learn_theta": [
        (name, lambda **c: differentiable.learn_theta(key, classifier, noise, some.images, some.labels, 0.5, **c))
        for name in ("steps", "batch_size", "num_samples")
    ],
    "attack": [
        (name, lambda **c: differentiable.attack(key, classifier, noise, region, 1, **c))
        for name in ("steps", "num_samples")
    ],
    "from_function": [("num_classes", lambda **c: aj.from_function(light, jnp.float32(2.0), **c))],
    "select": [("skip", lambda **c: data.select(some, **c)), ("max", lambda max: data.select(some, max_images=max))],
    "batches": [("batch_size", lambda **c: next(data.batches(some, **c)))],
    "share": [(name, lambda **c: data.share(some, **{"process_index": 0, "process_count": 2} | c))
              for name in ("process_index", "process_count")],
    "device_mesh": [("devices", lambda devices: parallel.device_mesh(devices))],
}
for config, names in {
    aj.CertifyConfig: ["n0", "n"], aj.Execution: ["batch_size", "chunk", "devices"],
    aj.RunConfig: ["seed", "period", "guard_samples"], aj.LeakageConfig: ["num_references", "num_samples"],
    aj.IsotropicConfig: ["steps", "num_samples", "leakage_batch"], aj.AnisotropicConfig: ["steps"],
    TrainConfig: ["epochs", "batch_size", "copies", "drop_every", "attack_steps", "warmup_epochs", "shift", "seed"],
}.items():
    INTEGERS[config.__name__] = [(name, lambda config=config, **c: config(**c)) for name in names]
NUMBERS = {
    "CertifyConfig": [("alpha", lambda **c: aj.CertifyConfig(**c))],
    "predict": [("alpha", lambda **c: aj.predict(*these, **c))],
    "RunConfig": [("theta", lambda **c: aj.RunConfig(**c)),
                  ("leakage_limit", lambda **c: aj.RunConfig(method="ancer", **c))],
    "SequentialConfig": [("tolerance", lambda **c: aj.SequentialConfig(**c)),
                         ("radii", lambda radii: aj.SequentialConfig(radii=(radii,)))],
    "AnisotropicConfig": [(name, lambda **c: aj.AnisotropicConfig(**c))
                          for name in ("learning_rate", "theta_max", "leakage_weight", "kappa")],
    "TrainConfig": [(name, lambda **c: TrainConfig(**c)) for name in ("theta", "learning_rate", "momentum")],
}
warnings.simplefilter("ignore")
for kind, functions, values in (
    ("integer", INTEGERS, (333.4, 100.0, "100", True, np.bool_(True), None, 1j, np.ones(2))),
    ("number", NUMBERS, ("0.1", True, 1j, np.ones(2) / 2)),
):
    for name, calls in functions.items():
        for argument, call in calls:
            optional = argument in ("devices", "batch_size", "chunk", "drop_every") and name in (
                "Execution", "TrainConfig", "device_mesh")
            for value in values:
                if value is None and (optional or name == "select"):
                    continue
                try:
                    call(**{argument: value})
                except ValueError as error:
                    assert argument in str(error), (name, argument, value, error)
                else:
                    raise SystemExit(f"{name} took {argument} = {value!r}")
            print(name, argument)
print(aj.certify(*these, chunk=np.int64(333), config=aj.CertifyConfig(n=np.int32(1000))).count)
"""


def test_the_public_api_takes_no_other_types():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) > 50


@pytest.mark.parametrize("value", [1, np.int64(5), np.uint8(7), 2**40])
def test_integers_of_numpy_are_integers(value):
    check_integer("n", value)


@pytest.mark.parametrize(
    ("value", "interval", "inside"),
    [
        *((0.0, "[0, 1]", True), (0.0, "(0, 1]", False), (1, "[0, 1]", True), (1.0, "[0, 1)", False)),
        *((float("nan"), "[-inf, inf]", False), (float("inf"), "(0, inf)", False), (np.float32(0.5), "(0, 1)", True)),
    ],
)
def test_intervals_have_their_ends_or_not(value, interval, inside):
    if inside:
        check_real("theta", value, interval)
    else:
        with pytest.raises(ValueError, match="theta must be in"):
            check_real("theta", value, interval)
