import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ancer_jax.regions import (
    Region,
    contains,
    geometric_mean,
    is_superset,
    log_volume,
    proxy_radius,
    radius,
)

thetas = hnp.arrays(np.float64, st.integers(1, 6), elements=st.floats(0.01, 10))
norms = st.sampled_from([2, 1])


def region(theta, gap=1.0, norm=2, center=None):
    return Region(np.zeros(np.shape(theta)) if center is None else center, theta, gap, norm)


@given(thetas, st.floats(0.01, 5), norms)
def test_radius_is_the_largest_ball_inside(theta, gap, norm):
    a = region(theta, gap, norm)
    ball = region(np.ones_like(theta), radius(a) * (1 - 1e-12), norm)
    larger = region(np.ones_like(theta), radius(a) * (1 + 1e-6), norm)
    assert is_superset(a, ball)
    assert not is_superset(a, larger)


@given(thetas, st.floats(0.01, 5), norms)
def test_proxy_radius_is_that_of_the_ball_of_the_same_volume(theta, gap, norm):
    a = region(theta, gap, norm)
    ball = region(np.ones_like(theta), proxy_radius(a), norm)
    assert log_volume(a) == pytest.approx(log_volume(ball), abs=1e-9)


@pytest.mark.parametrize(("norm", "unit"), [(2, math.pi), (1, 2.0)])
def test_volume_in_the_plane(norm, unit):
    a = region(np.array([0.5, 2.0]), 0.7, norm)
    assert log_volume(a) == pytest.approx(math.log(unit * 0.7**2 * 0.5 * 2.0))
    points = np.random.default_rng(0).uniform(-1.5, 1.5, (20_000, 2))
    inside = np.mean([contains(a, point) for point in points])
    assert inside * 9 == pytest.approx(math.exp(log_volume(a)), rel=0.05)


def test_a_scalar_theta_counts_in_every_coordinate():
    center = np.zeros((3, 4))
    for function in (radius, proxy_radius, log_volume):
        scalar = function(Region(center, 0.25, 2.0, 2))
        assert scalar == pytest.approx(function(Region(center, np.full((3, 4), 0.25), 2.0, 2)), rel=1e-12)


@given(thetas, st.floats(0.01, 5), norms, st.integers(0, 2**32))
def test_contains_is_the_scaled_norm(theta, gap, norm, seed):
    center, direction = np.random.default_rng(seed).normal(size=(2, theta.size))
    direction /= np.linalg.norm(direction, ord=norm)
    a = region(theta, gap, norm, center)
    assert contains(a, center + theta * direction * gap * 0.999)
    assert not contains(a, center + theta * direction * gap * 1.001)


def test_a_gap_of_zero_is_a_point():
    a = region(np.ones(3), 0.0)
    assert log_volume(a) == -math.inf
    assert radius(a) == proxy_radius(a) == 0
    assert contains(a, np.zeros(3))
    assert not contains(a, np.array([1e-9, 0, 0]))


def test_superset_needs_every_coordinate():
    a, b = region(np.array([1.0, 1.0])), region(np.array([2.0, 0.9]))
    assert not is_superset(a, b)
    assert not is_superset(b, a)
    assert is_superset(region(np.array([2.0, 1.0])), a)
    assert is_superset(a, a)
    assert is_superset(region(np.array([0.5, 0.5]), 2.0), a)
    assert not is_superset(region(np.array([9.0, 9.0]), center=np.array([0.0, 0.1])), a)
    with pytest.raises(ValueError, match="different norms"):
        is_superset(a, region(np.ones(2), norm=1))


def test_geometric_mean_keeps_its_digits_in_many_dimensions():
    theta = np.random.default_rng(0).uniform(0.1, 1.0, 150_528).astype(np.float32)
    exact = math.exp(math.fsum(math.log(float(t)) for t in theta) / theta.size)
    assert geometric_mean(theta) == pytest.approx(exact, rel=1e-12)
    assert geometric_mean(jnp.asarray(theta)) == pytest.approx(exact, rel=1e-5)


@given(thetas, st.floats(0.1, 5), norms)
@settings(max_examples=20, deadline=None)
def test_traced_and_host_agree(theta, gap, norm):
    a = region(theta, gap, norm)
    traced = jax.tree.map(jnp.float32, a)
    for function in (radius, proxy_radius, log_volume):
        assert jax.jit(function)(traced) == pytest.approx(float(function(a)), rel=1e-4, abs=1e-4)


def test_concrete_jax_arrays_are_computed_in_float64():
    theta = jax.random.uniform(jax.random.key(0), (50,), minval=0.1)
    a = Region(jnp.zeros(50), theta, 1.2345678901, 2)
    exact = Region(np.zeros(50), np.float64(theta), 1.2345678901, 2)
    for function in (radius, proxy_radius, log_volume):
        assert function(a) == function(exact)


def test_sizes_are_differentiable_and_batched():
    theta = jnp.array([0.5, 1.0, 2.0])
    size = lambda theta: log_volume(Region(jnp.zeros(3), theta, 1.0, 2))
    np.testing.assert_allclose(jax.grad(size)(theta), 1 / theta, rtol=1e-6)
    batch = Region(jnp.zeros((2, 3)), jnp.stack([theta, 2 * theta]), jnp.array([1.0, 3.0]), 2)
    np.testing.assert_allclose(jax.vmap(radius)(batch), [0.5, 3.0])
