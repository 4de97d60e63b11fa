"""Regions: membership and sizes, of one region and of many with leading axes."""

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ancer_jax.basis import Cosine, Pixels
from ancer_jax.regions import Region, is_superset

thetas = hnp.arrays(np.float64, st.integers(1, 6), elements=st.floats(0.01, 10))
norms = st.sampled_from([2, 1])
both_norms = pytest.mark.parametrize("norm", [2, 1])
SIZES = ("radius", "proxy_radius", "log_volume")


def region(theta, gap=1.0, norm=2, center=None):
    return Region(np.zeros(np.shape(theta)) if center is None else center, theta, gap, norm)


def sizes(region):
    return [getattr(region, name) for name in SIZES]


@given(thetas, st.floats(0.01, 5), norms)
def test_radius_is_the_largest_ball_inside(theta, gap, norm):
    a = region(theta, gap, norm)
    ball = region(np.ones_like(theta), a.radius * (1 - 1e-12), norm)
    larger = region(np.ones_like(theta), a.radius * (1 + 1e-6), norm)
    assert is_superset(a, ball)
    assert not is_superset(a, larger)


@given(thetas, st.floats(0.01, 5), norms)
def test_proxy_radius_is_that_of_the_ball_of_the_same_volume(theta, gap, norm):
    a = region(theta, gap, norm)
    ball = region(np.ones_like(theta), a.proxy_radius, norm)
    assert a.log_volume == pytest.approx(ball.log_volume, abs=1e-9)


@pytest.mark.parametrize(("norm", "unit"), [(2, math.pi), (1, 2.0)])
def test_volume_in_the_plane(norm, unit):
    a = region(np.array([0.5, 2.0]), 0.7, norm)
    assert a.log_volume == pytest.approx(math.log(unit * 0.7**2 * 0.5 * 2.0))
    points = np.random.default_rng(0).uniform(-1.5, 1.5, (20_000, 2))
    inside = np.mean([a.contains(point) for point in points])
    assert inside * 9 == pytest.approx(math.exp(a.log_volume), rel=0.05)


@given(thetas, st.floats(0.01, 5), norms, st.integers(0, 99), st.sampled_from([1e-200, 1e-20, 1.0, 1e150]))
def test_reach_is_where_a_direction_leaves_the_region(theta, gap, norm, seed, length):
    direction = np.random.default_rng(seed).normal(size=theta.shape) * length
    a = region(theta, gap, norm)
    for sign in (1, -1):
        t = a.reach(sign * direction)
        assert a.contains(t * direction) and a.contains(-t * direction)
        assert not a.contains(t * (1 + 1e-12) * direction)


@both_norms
def test_the_reach_of_the_narrowest_and_the_widest_coordinate(norm):
    a = region(np.array([[0.5, 2.0], [1.0, 3.0]]), 0.7, norm)
    unit = np.eye(4).reshape(4, 2, 2)
    found = [float(a.reach(one)) for one in unit]
    assert found == pytest.approx([0.35, 1.4, 0.7, 2.1], rel=1e-12) and found[0] <= a.radius
    assert 1e300 < a.reach(np.zeros((2, 2))) < np.inf
    assert np.isnan(a.reach(np.full((2, 2), np.nan)))
    assert region(np.ones(2), 0.0, norm).reach(np.ones(2)) == 0


@both_norms
def test_the_reach_of_many_regions_and_in_compiled_functions(norm):
    rng = np.random.default_rng(0)
    many = Region(rng.normal(size=(5, 2, 3)), rng.uniform(0.1, 2, (5, 2, 3)), rng.uniform(0, 2, 5), norm)
    directions = rng.normal(size=(5, 2, 3))
    for given_ in (directions, directions[0]):
        one_each = np.broadcast_to(given_, directions.shape)
        expected = [float(one_of(many, i).reach(one_each[i])) for i in range(5)]
        np.testing.assert_allclose(many.reach(given_), expected, rtol=1e-12)
        traced = np.asarray(jax.jit(lambda a, d: a.reach(d))(many, given_))
        assert np.all(traced <= expected)
        np.testing.assert_allclose(traced, expected, rtol=1e-4)
    one = Region(np.zeros(2), np.ones(2), 1.0, norm)
    slope = jax.grad(lambda gap: dataclasses.replace(one, gap=gap).reach(np.ones(2)))(1.0)
    assert slope == pytest.approx(2 ** (-1 / norm), rel=1e-3)
    np.testing.assert_allclose(jax.vmap(one.reach)(np.eye(2, dtype=np.float32)), 1, rtol=1e-4)
    expected = {1: [-1 / 49, -1 / 49], 2: [-3 / 125, -4 / 125]}[norm]  # of 1 / 7 and 1 / 5
    np.testing.assert_allclose(jax.grad(one.reach)(np.float32([3, 4])), expected, rtol=1e-3)


@given(
    st.lists(st.tuples(*[st.floats(-300, 300)] * 2), min_size=1, max_size=4), st.floats(-300, 300), norms, st.booleans()
)
def test_the_reach_of_extreme_regions_is_never_too_large(powers, gap, norm, traced):
    dtype, scale = (np.float32, 10) if traced else (np.float64, 1)
    theta, direction = (10.0 ** (np.array(powers).T / scale)).astype(dtype)
    gap = dtype(10.0 ** (gap / scale))
    a = region(theta, gap, norm)
    with np.errstate(all="ignore"):
        t = float(jax.jit(Region.reach)(a, direction) if traced else a.reach(direction))
    # (t |direction| / theta)^norm summed, exactly
    scaled = [Fraction(t) * Fraction(float(x)) / Fraction(float(y)) for x, y in zip(direction, theta, strict=True)]
    assert sum(x**norm for x in scaled) <= Fraction(float(gap)) ** norm


def test_a_scalar_theta_counts_in_every_coordinate():
    center = np.zeros((3, 4))
    per_coordinate = Region(center, np.full((3, 4), 0.25), 2.0, 2)
    assert sizes(Region(center, 0.25, 2.0, 2)) == pytest.approx(sizes(per_coordinate), rel=1e-12)


@given(thetas, st.floats(0.01, 5), norms, st.integers(0, 2**32))
def test_contains_is_the_scaled_norm(theta, gap, norm, seed):
    center, direction = np.random.default_rng(seed).normal(size=(2, theta.size))
    direction /= np.linalg.norm(direction, ord=norm)
    a = region(theta, gap, norm, center)
    assert a.contains(center + theta * direction * gap * 0.999)
    assert not a.contains(center + theta * direction * gap * 1.001)


def test_a_gap_of_zero_is_a_point():
    a = region(np.ones(3), 0.0)
    assert a.log_volume == -math.inf
    assert a.radius == a.proxy_radius == 0
    assert a.contains(np.zeros(3)) and not a.contains(np.array([0, 1e-200, 0]))
    assert not a.contains(np.array([1e-9, 0, 0]))


@given(thetas, st.floats(0.1, 5), norms)
@settings(max_examples=20)
def test_traced_and_host_agree(theta, gap, norm):
    a = region(theta, gap, norm)
    traced = jax.jit(sizes)(jax.tree.map(jnp.float32, a))
    assert [float(size) for size in traced] == pytest.approx([float(size) for size in sizes(a)], rel=1e-4, abs=1e-4)


def test_concrete_jax_arrays_are_computed_in_float64():
    theta = jax.random.uniform(jax.random.key(0), (50,), minval=0.1)
    a = Region(jnp.zeros(50), theta, 1.2345678901, 2)
    exact = Region(np.zeros(50), np.float64(theta), 1.2345678901, 2)
    assert sizes(a) == sizes(exact)
    assert all(np.asarray(size).dtype == np.float64 for size in sizes(a))


def test_sizes_are_differentiable_and_batched():
    theta = jnp.array([0.5, 1.0, 2.0])
    size = lambda theta: Region(jnp.zeros(3), theta, 1.0, 2).log_volume
    np.testing.assert_allclose(jax.grad(size)(theta), 1 / theta, rtol=1e-6)
    batch = Region(jnp.zeros((2, 3)), jnp.stack([theta, 2 * theta]), jnp.array([1.0, 3.0]), 2)
    np.testing.assert_allclose(jax.vmap(lambda one: one.radius)(batch), [0.5, 3.0])


def many(rng, leading, norm, scalar, shape=(3, 2)):
    """Regions with these leading axes, some of them single points, and with one theta each or one per coordinate."""
    gap = rng.uniform(0.1, 2, leading) * (rng.random(leading) < 0.8)
    theta = rng.uniform(0.1, 2, leading if scalar else (*leading, *shape))
    return Region(rng.normal(size=(*leading, *shape)), theta, gap, norm)


def one_of(regions, index):
    return jax.tree.map(lambda value: value[index], regions)


@both_norms
@pytest.mark.parametrize("scalar", [True, False])
@pytest.mark.parametrize("leading", [(5,), (2, 3), (0,)])
def test_leading_axes_give_the_sizes_of_each_region_alone(norm, scalar, leading):
    regions = many(np.random.default_rng(0), leading, norm, scalar)
    for name in SIZES:
        size = getattr(regions, name)
        assert size.shape == leading and size.dtype == np.float64
        for index in np.ndindex(leading):
            assert size[index] == pytest.approx(getattr(one_of(regions, index), name), rel=1e-14)


@both_norms
@pytest.mark.parametrize("scalar", [True, False])
def test_leading_axes_give_the_sizes_of_vmap(norm, scalar):
    regions = jax.tree.map(jnp.float32, many(np.random.default_rng(1), (2, 3), norm, scalar))
    of_each = jax.jit(jax.vmap(jax.vmap(sizes)))(regions)
    for size, one_by_one in zip(jax.jit(sizes)(regions), of_each, strict=True):
        assert size.shape == (2, 3)
        np.testing.assert_allclose(size, one_by_one, rtol=1e-6)
    for size, exact in zip(of_each, sizes(regions), strict=True):
        np.testing.assert_allclose(size, exact, rtol=1e-5)


@both_norms
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("scalar", [True, False])
def test_leading_axes_give_the_derivatives_of_each_region_alone(norm, name, scalar):
    regions = jax.tree.map(jnp.float32, many(np.random.default_rng(2), (4,), norm, scalar))
    regions = Region(regions.center, regions.theta, jnp.abs(regions.gap) + 0.5, norm)
    together = jax.grad(lambda theta, gap: getattr(Region(regions.center, theta, gap, norm), name).sum(), (0, 1))
    alone = jax.grad(lambda center, theta, gap: getattr(Region(center, theta, gap, norm), name), (1, 2))
    one_by_one = jax.vmap(alone)(regions.center, regions.theta, regions.gap)
    for gradient, expected in zip(together(regions.theta, regions.gap), one_by_one, strict=True):
        assert np.any(expected)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


@both_norms
@pytest.mark.parametrize("scalar", [True, False])
def test_contains_answers_for_each_of_many_regions(norm, scalar):
    rng = np.random.default_rng(3)
    regions = many(rng, (40,), norm, scalar)
    for point in (*rng.normal(size=(20, 3, 2)), regions.center[0]):
        inside = [bool(one_of(regions, i).contains(point)) for i in range(40)]
        np.testing.assert_array_equal(regions.contains(point), inside)
    assert regions.contains(regions.center[0])[0]
    assert regions.contains(regions.center).all()


@pytest.mark.parametrize(("theta", "gap"), [(0.0, 1.0), (-1.0, 1.0), (np.nan, 1.0), (1.0, -0.1), (1.0, np.nan)])
def test_regions_that_are_none_have_no_size(theta, gap):
    for name in SIZES:
        with pytest.raises(ValueError, match="theta must be positive and gap not negative, got"):
            getattr(Region(np.zeros(3), np.array([1.0, theta, 2.0]), gap, 2), name)


@pytest.mark.parametrize(
    ("center", "theta", "gap"),
    [
        (np.zeros(3), np.ones(2), 1.0),  # theta has neither the shape of gap nor that of center
        (np.zeros((2, 3)), np.ones(3), np.ones(2)),  # one theta per coordinate, but not for each region
        (np.zeros((2, 3)), 1.0, np.ones(2)),
        (np.zeros((2, 3)), np.ones((2, 3)), np.ones(3)),  # gap has more regions than center
        (np.zeros(3), np.ones(3), np.ones(2)),
    ],
)
def test_shapes_that_do_not_fit_are_refused_when_a_size_is_asked_for(center, theta, gap):
    a = Region(center, theta, gap, 2)
    shapes = ", ".join(rf"\[{', '.join(map(str, np.shape(value)))}\]" for value in (center, theta, gap))
    of_a_point = (lambda: a.contains(np.zeros(3)), lambda: a.reach(np.zeros(3)))
    for ask in (*(lambda name=name: getattr(a, name) for name in SIZES), *of_a_point):
        with pytest.raises(ValueError, match=f"center, theta and gap do not fit together: their shapes are {shapes}"):
            ask()


@pytest.mark.parametrize("basis", [Pixels(), Cosine()])
@pytest.mark.parametrize("shape", [(4, 5), (2, 4, 5, 1), ()])
def test_a_point_of_another_shape_is_refused(basis, shape):
    region = Region(np.zeros((4, 5, 1)), 1.0, 1.0, 2, basis)
    with pytest.raises(ValueError, match=r"point must be \[4, 5, 1\], got \["):
        region.contains(np.zeros(shape))
    with pytest.raises(ValueError, match=r"direction must be \[4, 5, 1\], got \["):
        region.reach(np.zeros(shape))


def test_a_norm_that_is_not_2_or_1_is_refused():
    with pytest.raises(ValueError, match="norm must be 2 or 1, got 3"):
        Region(np.zeros(2), 1.0, 1.0, 3)
