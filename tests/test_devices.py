"""One device, several by a mesh, several by pmap: the same counts, and thetas that agree up to rounding."""

import functools
import os
import platform
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancer_jax import (
    CertifyConfig,
    Gaussian,
    IsotropicConfig,
    Smoothed,
    Uniform,
    count_votes,
    devices,
    optimize_isotropic,
)
from tests import reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
IMAGES = RNG.random((5, 3, 3, 1)).astype(np.float32)
CLASSIFIER = reference.linear(np.linspace(-1, 1.5, 9), b=-1.0)
KEYS = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), i))(jnp.arange(5))
THETAS = np.linspace(0.1, 0.5, 5, dtype=np.float32)


def votes(noise, key, x, theta):
    return count_votes(key, Smoothed(CLASSIFIER, noise, theta), x, config=CertifyConfig(n0=20, n=501), chunk=64)


@functools.cache
def votes_by_vmap(noise):
    return jax.jit(jax.vmap(functools.partial(votes, noise)))(KEYS, IMAGES, THETAS)


@pytest.mark.parametrize(("noise", "count"), [(Gaussian(), 1), (Gaussian(), 3), (Gaussian(), 8), (Uniform(), 3)])
def test_pmap_gives_the_counts_of_vmap(noise, count):
    found = devices.pmap_examples(functools.partial(votes, noise), devices=count)(KEYS, IMAGES, THETAS)
    for ours, theirs in zip(found, votes_by_vmap(noise), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_pmap_takes_what_all_examples_have_in_common_and_gives_the_thetas_of_one_device():
    search = functools.partial(optimize_isotropic, config=IsotropicConfig(steps=5, num_samples=10, theta_max=2.0))
    one = lambda classifier, key, x, theta: search(key, Smoothed(classifier, Gaussian(), theta), x)[0]
    axes, theta = (None, 0, 0, 0), np.full(5, 0.3, np.float32)
    found = devices.pmap_examples(one, axes)(CLASSIFIER, KEYS, IMAGES, theta)
    expected = jax.jit(jax.vmap(one, axes))(CLASSIFIER, KEYS, IMAGES, theta)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert (found != theta).all()


def test_pmap_takes_a_smoothed_classifier_for_each_example():
    """The noise is static, the classifier is the same everywhere, and theta has a row for each example."""
    count = functools.partial(count_votes, config=CertifyConfig(n0=20, n=501), chunk=64)
    theta = np.linspace(0.1, 0.5, 5, dtype=np.float32)
    many = jax.vmap(lambda theta: Smoothed(CLASSIFIER, Gaussian(), theta))(theta)
    expected = jax.jit(jax.vmap(count))(KEYS, many, IMAGES)
    found = devices.pmap_examples(count, devices=3)(KEYS, many, IMAGES)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_pmap_of_unequal_arguments_is_refused():
    with pytest.raises(ValueError, match=r"one number of examples, got \[3, 5\]"):
        devices.pmap_examples(lambda a, b: a + b)(np.ones(3), np.ones(5))
    with pytest.raises(ValueError, match=r"devices must be in 1\.\.8"):
        devices.pmap_examples(lambda a: a, devices=9)


@pytest.mark.parametrize("set_already", ["", "--xla_force_host_platform_device_count=3"])
def test_each_core_is_a_device_unless_their_number_is_set(set_already):
    code = "import jax, ancer_jax as aj; aj.devices.use_all_cores(); n = jax.device_count(); aj.devices.use_all_cores()"
    environment = os.environ | {"XLA_FLAGS": set_already}
    done = subprocess.run([sys.executable, "-c", f"{code}; print(n)"], env=environment, capture_output=True, text=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert done.stdout.split() == ["3" if set_already else str(min(cores, 8))], done.stderr


def test_devices_are_kept_once_there_are_some():
    count = jax.device_count()
    devices.use_all_cores()
    assert jax.device_count() == count


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
@pytest.mark.parametrize("kept", [False, True])
def test_kept_memory_is_not_fetched_again(kept):
    """Fewest page faults in 40 calls whose work space takes 32 MB or more: kept memory serves some of the calls."""
    code = f"""
import resource
from ancer_jax import devices
if {kept}: devices.keep_freed_memory()
import jax, jax.numpy as jnp
program, x = jax.jit(lambda x: jnp.cumsum(jnp.flip(jnp.cumsum(x)))[:3]), jnp.arange(8e6)
faults = []
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(program(x))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 8e6 * 4 / resource.getpagesize()) == kept
