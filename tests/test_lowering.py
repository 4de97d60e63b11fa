"""Every program is one for GPUs and TPUs, too: each is lowered for both here, and runs on neither.

No program calls the host, computes in float64, or takes the CPU's way through a convolution.
"""

import dataclasses
import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancer_jax import (
    AnisotropicConfig,
    CertifyConfig,
    Execution,
    Gaussian,
    IsotropicConfig,
    LeakageConfig,
    RunConfig,
    Smoothed,
    Uniform,
    UniversalConfig,
    count_votes,
    devices,
    from_linen,
    optimize_universal,
)
from ancer_jax.basis import Cosine
from ancer_jax.data import Dataset
from ancer_jax.differentiable import attack
from ancer_jax.models import NETWORKS, DnCNN, make_network
from ancer_jax.models._convolution import convolution
from ancer_jax.models.front import WithFront
from ancer_jax.runs.job import _classes, make_job
from ancer_jax.smoothing.smoothed import Stage
from ancer_jax.training import PRESETS, DenoiserConfig, denoiser_state
from ancer_jax.training.denoiser import _step
from ancer_jax.training.step import Training, _evaluate_batch, initial_state, train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

PLATFORMS = "cuda", "tpu"
# What a device computes itself: random numbers, the largest of an array, and who has which rows.
ON_THE_DEVICE = {"cu_threefry2x32_ffi", "mhlo.topk", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}
KEY = jax.random.key(0, impl="threefry2x32")
THETA = np.array(0.25, np.float32)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)).astype(np.float32) / np.float32(255)
LABELS = np.zeros(4, np.int32)
DATASET = Dataset("noise", np.arange(4), IMAGES, LABELS, 3)
# One network of each family, with fewer blocks and channels; the blocks are the same.
FAMILIES = {
    "small_cnn": {"features": (2, 2, 2), "hidden": 4},
    "cifar_resnet20": {"stage_sizes": (1, 1, 1), "width": 4},
    "ancer_resnet18": {"stage_sizes": (1, 1, 1, 1), "width": 4},
    "imagenet_resnet50": {"stage_sizes": (1, 1, 1, 1), "width": 4},
    "wrn_40_2": {"depth": 10, "widen_factor": 1},
    "efficientnet_lite0": {},
}
SMALL = {
    "certify": CertifyConfig(n0=4, n=20),
    "isotropic": IsotropicConfig(steps=2, num_samples=2, leakage_weight=1.0, leakage_batch=2),
    "anisotropic": AnisotropicConfig(steps=2, num_samples=2),
    "guard_samples": 4,
    "leakage": LeakageConfig(2, 4),
    "leakage_limit": 0.5,
}
RUNS = {
    "l2": RunConfig(method="ancer", **SMALL),
    "coloured": RunConfig(method="ancer", basis=Cosine(), **SMALL),
    "uniform": RunConfig(method="isotropic", norm="l1", **SMALL),
    "splitting": RunConfig(method="ancer", norm="l1", noise="splitting", exact=True, period=60, **SMALL),
}


def network(name="small_cnn", dtype="float32"):
    return make_network(name, num_classes=3, compute_dtype=dtype, **FAMILIES[name])


def classifier(name="small_cnn", dtype="float32"):
    some = network(name, dtype)
    shapes = jax.eval_shape(some.init, KEY, IMAGES[:1])
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return from_linen(some, variables, num_classes=3)


def lowered(platforms, function, *arguments, **static):
    """The text of a jitted function, lowered for each of the platforms."""
    traced = function.trace(*arguments, **static)
    return [traced.lower(lowering_platforms=(platform,)).as_text() for platform in platforms]


def check(function, *arguments, **static):
    for text in lowered(PLATFORMS, function, *arguments, **static):
        calls = set(re.findall(r"custom_call @([\w.]+)", text))
        assert calls <= ON_THE_DEVICE, calls
        assert "callback" not in text
        assert not re.search(r"(tensor<|x)f64\b", text)


@pytest.mark.parametrize(("run", "dtype"), [*((run, "float32") for run in RUNS), ("l2", "bfloat16")])
def test_the_programs_of_a_run(run, dtype):
    config = RUNS[run]
    job = make_job(classifier(dtype=dtype), config, THETA, Execution(chunk=4), devices.device_mesh(2))
    job = job.with_probes(DATASET)
    ids, theta = np.arange(4, dtype=np.uint32), np.full(IMAGES.shape, 0.25, np.float32)
    counter = job.vote_counter(ids, IMAGES, theta)
    items = np.zeros((counter.sizes[-1], 3), np.int32)
    programs = [
        job.search_program(ids, IMAGES),
        job.leakage_program(IMAGES, theta, LABELS),
        counter.program(Stage.ESTIMATE, items, 1),
    ]
    for program in programs:
        check(program.function, *program.arguments, **program.static)
    rows = *devices.shard_rows((ids, IMAGES), job.mesh), job.classifier, THETA
    check(_classes, *rows, config=config, chunk=4, mesh=job.mesh)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_votes_and_gradients_of_each_family_of_networks(name, dtype):
    def votes_and_gradient(key, smoothed, x):
        votes = count_votes(key, smoothed, x, config=CertifyConfig(n0=2, n=4), chunk=2)
        return votes, jax.grad(lambda x: smoothed.classifier(x[None]).max())(x)

    smoothed = Smoothed(classifier(name, dtype), Gaussian(), THETA)
    check(jax.jit(votes_and_gradient), KEY, smoothed, IMAGES[0])


def test_the_families_are_those_that_exist():
    kind = lambda some: (type(some), getattr(some, "block", None), getattr(some, "stem", None))
    assert {kind(NETWORKS[name]) for name in FAMILIES} == {kind(some) for some in NETWORKS.values()}


@pytest.mark.parametrize(("method", "dtype"), [*((method, "float32") for method in PRESETS), ("volume", "bfloat16")])
def test_a_training_step_and_its_evaluation(method, dtype):
    config = dataclasses.replace(PRESETS[method], epochs=1, batch_size=4, front="wiener")
    training = Training(WithFront(network(dtype=dtype), Cosine()), config, 1, devices.device_mesh(1))
    variables, moments = initial_state(training, IMAGES)
    batch = IMAGES, LABELS, np.zeros(4, bool)
    numbers = np.int32(0), np.float32(0.5)
    check(train_step, variables, moments, batch, *numbers, training=training)
    check(_evaluate_batch, variables, batch, numbers[0], training=training, batch_size=4)


def test_a_training_step_of_a_denoiser():
    network, config = (
        DnCNN(depth=2, features=4),
        DenoiserConfig(theta=0.25, epochs=1, batch_size=4, classifier_weight=1.0),
    )
    variables, state, _ = denoiser_state(network, IMAGES, config)
    check(_step, variables, state, KEY, IMAGES, classifier(), network=network, config=config, steps=1)


@pytest.mark.parametrize("noise", [Gaussian(), Gaussian(Cosine()), Uniform()], ids=str)
def test_a_universal_search_and_an_attack(noise):
    smoothed = Smoothed(classifier(), noise, THETA)
    search = functools.partial(optimize_universal, config=UniversalConfig(steps=2, num_samples=8, batch_size=2))
    check(jax.jit(search), KEY, smoothed, IMAGES, LABELS)
    region = noise.region(IMAGES[0], np.full(IMAGES.shape[1:], THETA), np.float32(1.0))
    find = jax.jit(functools.partial(attack, steps=2, num_samples=2))
    check(find, KEY, smoothed, region, np.int32(0))


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("in_loop", [True, False])
def test_other_platforms_convolve_as_xla_does(in_loop, stride, size):
    """The operations are those of XLA's convolution and its derivatives; on CPUs they are others."""
    x, w = jnp.ones((3, size, size, 6)), jnp.ones((3, 3, 6, 5))
    usual = {"padding": [(1, 1), (1, 1)], "dimension_numbers": ("NHWC", "HWIO", "NHWC")}

    def operations(of):
        out = jax.eval_shape(of, x, w)
        gradients = jax.jit(lambda x, w: jax.vjp(of, x, w)[1](jnp.ones(out.shape)))
        texts = lowered((*PLATFORMS, "cpu"), gradients, x, w)
        return [Counter(re.findall(r"stablehlo\.(convolution|reverse|dot_general|slice|pad)", text)) for text in texts]

    *ours, on_cpus = operations(lambda x, w: convolution(x, w, (stride, stride), in_loop=in_loop, **usual))
    *theirs, _ = operations(lambda x, w: jax.lax.conv_general_dilated(x, w, (stride, stride), **usual))
    assert ours == theirs
    assert on_cpus["dot_general"] > 0


def test_what_is_looked_for_would_be_found():
    with pytest.raises(ValueError, match="platform"):  # JAX itself refuses this one where there is no GPU
        check(jax.jit(lambda x: jax.pure_callback(np.sin, x, x)), np.float32(1))
    with pytest.raises(AssertionError):
        check(jax.jit(jnp.linalg.inv), np.eye(2, dtype=np.float32))
    with pytest.raises(AssertionError), jax.enable_x64(True):
        check(jax.jit(jnp.sin), np.float64(1))
