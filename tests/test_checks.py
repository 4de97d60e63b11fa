"""Counts and sizes are integers, probabilities real numbers: in the whole public API, without a type checker."""

import subprocess
import sys
from typing import Literal

import numpy as np
import pytest

from ancer_jax._checks import check_choice, check_integer, check_real

SCRIPT = """
import warnings
import jax, jax.numpy as jnp, numpy as np
from ancer_jax import data, devices, differentiable, search, smoothing
from ancer_jax.regions import Region
from ancer_jax.runs.config import Execution, RunConfig
from ancer_jax.training import TrainConfig

def light(variables, x):
    return jnp.stack([variables - x.sum(axis=(1, 2, 3)), x.sum(axis=(1, 2, 3)) - variables], axis=1)

def call(function, *arguments, **usual):
    return lambda **changed: function(*arguments, **usual | changed)

def each(names, function, *arguments, **usual):
    return [(name, call(function, *arguments, **usual)) for name in names]

classifier = smoothing.from_function(light, jnp.float32(2.0), num_classes=2)
key, x, theta = jax.random.key(0), np.full((2, 2, 1), 0.6, np.float32), np.float32(0.5)
smoothed = smoothing.Smoothed(classifier, smoothing.Gaussian(), theta)
these, batch, region = (key, smoothed, x), (key, smoothed, x[None]), Region(x, theta, 0.5, 2)
some = data.Dataset("some", np.arange(3), np.zeros((3, 2, 2, 1), np.float32), np.array([0, 1, 0]), 2)
INTEGERS = {
    "certify": each(["chunk"], smoothing.certify, *these),
    "certify_batch": each(["chunk", "ids"], smoothing.certify_batch, *batch),
    "certify_sequentially": each(
        ["chunk"], smoothing.certify_sequentially, *these, sequential=smoothing.SequentialConfig(tolerance=0.1)
    ),
    "predict": each(["n", "chunk"], smoothing.predict, *these),
    "predict_batch": each(["n", "ids"], smoothing.predict_batch, *batch),
    "count_votes": each(["chunk"], smoothing.count_votes, *these, config=smoothing.CertifyConfig()),
    "class_counts": each(["num_samples", "chunk"], smoothing.class_counts, *these, num_samples=10, chunk=5),
    "smoothed_probs": each(["num_samples"], smoothing.smoothed_probs, *these),
    "make_probes": each(
        ["num_samples", "chunk"], search.make_probes, key[None], smoothed, x[None], num_samples=10, chunk=5
    ),
    "vote_share": each(["num_samples", "chunk"], differentiable.vote_share, *these, 1, num_samples=10, chunk=5),
    "attack": each(["steps", "num_samples"], differentiable.attack, key, smoothed, region, 1),
    "from_function": each(["num_classes"], smoothing.from_function, light, jnp.float32(2.0)),
    "select": [*each(["skip"], data.select, some), ("max", lambda max: data.select(some, max_images=max))],
    "batches": [("batch_size", lambda **c: next(data.batches(some, **c)))],
    "shard": each(["process_index", "process_count"], data.shard, some, process_index=0, process_count=2),
    "device_mesh": [("devices", lambda **c: devices.device_mesh(c["devices"]))],
}
for config, names in {
    smoothing.CertifyConfig: ["n0", "n"],
    Execution: ["batch_size", "chunk", "devices"],
    RunConfig: ["seed", "period", "guard_samples"],
    smoothing.Splitting: ["period"],
    search.LeakageConfig: ["num_probes", "num_samples"],
    search.IsotropicConfig: ["steps", "num_samples", "leakage_batch"],
    search.AnisotropicConfig: ["steps"],
    search.GuardConfig: ["num_samples", "chunk"],
    search.UniversalConfig: ["steps", "batch_size", "num_samples"],
    differentiable.EstimateConfig: ["num_samples", "chunk"],
    TrainConfig: ["epochs", "batch_size", "copies", "drop_every", "attack_steps", "warmup_epochs", "shift", "seed"],
}.items():
    usual = {"num_samples": 10} if config is differentiable.EstimateConfig else {}
    INTEGERS[config.__name__] = each(names, config, **usual)
NUMBERS = {
    "CertifyConfig": each(["alpha"], smoothing.CertifyConfig),
    "predict": each(["alpha"], smoothing.predict, *these),
    "predict_batch": each(["alpha"], smoothing.predict_batch, *batch),
    "RunConfig": [*each(["theta"], RunConfig), *each(["leakage_limit"], RunConfig, method="ancer")],
    "SequentialConfig": [*each(["tolerance"], smoothing.SequentialConfig),
                         ("radii", lambda radii: smoothing.SequentialConfig(radii=(radii,)))],
    "AnisotropicConfig": each(["learning_rate", "theta_max", "leakage_weight", "kappa"], search.AnisotropicConfig),
    "GuardConfig": each(["alpha", "leakage_limit"], search.GuardConfig),
    "UniversalConfig": each(["learning_rate", "alpha", "theta_max"], search.UniversalConfig),
    "EstimateConfig": each(["alpha"], differentiable.EstimateConfig, num_samples=10),
    "TrainConfig": each(["theta", "learning_rate", "muon_learning_rate", "momentum"], TrainConfig),
}
warnings.simplefilter("ignore")
for kind, functions, values in (
    ("integer", INTEGERS, (333.4, 100.0, "100", True, np.bool_(True), None, 1j, np.ones(2))),
    ("number", NUMBERS, ("0.1", True, 1j, np.ones(2) / 2)),
):
    for name, calls in functions.items():
        for argument, function in calls:
            optional = argument == "ids" or argument in ("devices", "batch_size", "chunk") and name in (
                "Execution", "device_mesh")
            for value in values:
                if value is None and (optional or name == "select"):
                    continue
                try:
                    function(**{argument: value})
                except ValueError as error:
                    assert argument in str(error), (name, argument, value, error)
                else:
                    raise SystemExit(f"{name} took {argument} = {value!r}")
            print(name, argument)
print(smoothing.certify(*these, chunk=np.int64(333), config=smoothing.CertifyConfig(n=np.int32(1000))).count)
"""


def test_the_public_api_takes_no_other_types():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) > 60


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


def test_a_choice_is_one_of_those_that_are_named():
    check_choice("norm", "l2", Literal["l2", "l1"])
    for value in ("linf", 2, None):
        with pytest.raises(ValueError, match=f"norm must be one of l2, l1, got {value!r}"):
            check_choice("norm", value, Literal["l2", "l1"])
