"""Regions in a basis are those around the coefficients of their centers, in pixels."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ancer_jax.basis import Cosine, KarhunenLoeve, Pixels
from ancer_jax.regions import Region, disjoint, is_superset, largest_inside, largest_outside, separation
from ancer_jax.regions.region import rounding_of_contains
from tests import geometry

pytestmark = pytest.mark.usefixtures("quick_compilation")

CASES = [
    (Cosine(), (4, 5, 3)),
    (KarhunenLoeve.of(np.random.default_rng(0).random((20, 4, 4, 1))), (4, 4, 1)),
]
each = pytest.mark.parametrize(("basis", "shape"), CASES, ids=lambda value: getattr(value, "name", str(value)))
both_thetas = pytest.mark.parametrize("scalar", [True, False], ids=["one theta", "thetas"])
QUESTIONS = {"separation": separation, "outside": largest_outside, "inside": largest_inside}
each_question = pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)


def matrix(basis, shape):
    """[d, d], from inputs to coefficients."""
    return functools.reduce(np.kron, basis.matrices(shape))


def in_pixels(region):
    """The same region in the space of coefficients."""
    shape = np.shape(region.center)
    center = (matrix(region.basis, shape) @ np.float64(region.center).ravel()).reshape(shape)
    return dataclasses.replace(region, center=center, basis=Pixels())


def random_region(rng, basis, shape, scalar=False):
    theta = np.exp(rng.normal(size=() if scalar else shape))
    return Region(rng.normal(size=shape), theta, rng.uniform(0.5, 2), 2, basis)


def random_pair(rng, basis, shape, depth):
    """The center of a at `depth` (1 is the surface) of b in a random direction."""
    a, b = (random_region(rng, basis, shape) for _ in range(2))
    direction = rng.normal(size=shape)
    offset = depth * b.gap * b.theta * direction / np.linalg.norm(direction)
    center = b.center + (matrix(basis, shape).T @ offset.ravel()).reshape(shape)
    return dataclasses.replace(a, center=center), b


@each
@both_thetas
def test_sizes_are_those_in_pixels(basis, shape, scalar):
    rng = np.random.default_rng(1)
    batch = jax.tree.map(lambda *values: np.stack(values), *(random_region(rng, basis, shape, scalar) for _ in "abc"))
    for regions in (random_region(rng, basis, shape, scalar), batch):
        for name in ("radius", "proxy_radius", "log_volume"):
            size = getattr(regions, name)
            np.testing.assert_array_equal(size, getattr(dataclasses.replace(regions, basis=Pixels()), name))
            traced = jax.jit(lambda regions, name=name: getattr(regions, name))(regions)
            np.testing.assert_allclose(traced, size, rtol=1e-4, atol=1e-4)


@each
@both_thetas
def test_contains_is_the_scaled_norm_of_the_coefficients(basis, shape, scalar):
    rng, whole = np.random.default_rng(2), matrix(basis, shape)
    for _ in range(50):
        a = random_region(rng, basis, shape, scalar)
        direction = rng.normal(size=shape)
        surface = whole.T @ (a.gap * a.theta * direction / np.linalg.norm(direction)).ravel()
        for share in (0, 0.5, 1 - 1e-9, 1 + 1e-9, 2):
            point = a.center + share * surface.reshape(shape)
            coefficients = (whole @ (point - a.center).ravel()).reshape(shape)
            inside = np.linalg.norm(coefficients / a.theta) <= a.gap
            assert a.contains(point) == inside == (share < 1)
        assert 1 - 1e-9 < a.reach(surface.reshape(shape)) <= 1
    assert 0.9 < float(jax.jit(Region.reach)(a, np.float32(surface).reshape(shape))) < 1


@each
@both_thetas
def test_contains_answers_for_each_of_many_regions(basis, shape, scalar):
    rng = np.random.default_rng(3)
    each_region = [random_region(rng, basis, shape, scalar) for _ in range(30)]
    batch = jax.tree.map(lambda *values: np.stack(values), *each_region)
    for point in (rng.normal(size=shape), batch.center[7], batch.center[7] + 0.1):
        inside = [bool(region.contains(point)) for region in each_region]
        np.testing.assert_array_equal(batch.contains(point), inside)
        np.testing.assert_array_equal(jax.vmap(lambda region, point=point: region.contains(point))(batch), inside)
    assert batch.contains(batch.center[7])[7]


@each
@given(seed=st.integers(0, 2**32), power=st.integers(0, 6))
@settings(max_examples=30)
def test_the_rounding_of_contains_is_a_bound(basis, shape, seed, power):
    """Also for thetas that differ much: of points whose exact distance is 1."""
    rng = np.random.default_rng(seed)
    theta = 10.0 ** rng.uniform(-power, 0, shape)
    a = Region(np.zeros(shape), theta, 1.0, 2, basis)
    whole = matrix(basis, shape).astype(np.longdouble)
    point = (whole.T @ (theta * rng.normal(size=shape)).ravel()).astype(np.float64)
    exact = np.linalg.norm(((whole @ point).reshape(shape) / theta).astype(np.float64))
    margin = float(rounding_of_contains(a))
    point = point.reshape(shape)
    assert dataclasses.replace(a, gap=exact * (1 + margin)).contains(point)
    assert not dataclasses.replace(a, gap=exact * (1 - margin)).contains(point)


def test_regions_of_norm_1_are_in_pixels():
    with pytest.raises(ValueError, match=r"regions of norm 1 are in pixels: Cosine\(\) does not preserve that norm"):
        Region(np.zeros((4, 4, 1)), 1.0, 1.0, 1, Cosine())
    assert Region(np.zeros((4, 4, 1)), 1.0, 1.0, 1).basis == Pixels()


@each
@pytest.mark.parametrize("depth", [0.05, 0.6, 0.95, 1.05, 1.5, 20])
def test_pairs_are_answered_as_in_pixels(basis, shape, depth):
    for seed in range(5):
        a, b = random_pair(np.random.default_rng(seed), basis, shape, depth)
        flat_a, flat_b = in_pixels(a), in_pixels(b)
        for question in QUESTIONS.values():
            answer, expected = question(a, b), question(flat_a, flat_b)
            assert answer == pytest.approx(expected, rel=1e-8)
            assert answer <= expected * (1 + 1e-12)
        assert disjoint(a, b) == disjoint(flat_a, flat_b)
        center, theta, other, beta = (
            np.ravel(value) for value in (flat_a.center, a.theta, flat_b.center, b.gap * b.theta)
        )
        exact = {name: getattr(geometry, name)(center, theta, other, beta, 2) for name in ("outside", "inside")}
        for name, expected in exact.items():
            assert expected * (1 - 1e-6) <= QUESTIONS[name](a, b) <= expected


@each
def test_regions_that_touch_are_not_disjoint(basis, shape):
    rng = np.random.default_rng(4)
    for _ in range(10):
        a, b = random_pair(rng, basis, shape, 1.0)
        direction = rng.normal(size=shape)
        direction /= np.linalg.norm(direction)
        offset = (matrix(basis, shape).T @ (b.theta * direction).ravel()).reshape(shape)
        a = Region(b.center + (b.gap + 0.7) * offset, b.theta, 0.7, 2, basis)
        apart = dataclasses.replace(a, center=b.center + 1.001 * (b.gap + 0.7) * offset)
        assert not disjoint(a, b) and not disjoint(b, a)
        assert disjoint(apart, b) and disjoint(b, apart)
        assert 0.7 * (1 - 1e-6) < largest_outside(a, b) < 0.7 * (1 + 1e-9)


@each
def test_superset_needs_every_coefficient(basis, shape):
    rng = np.random.default_rng(5)
    a = random_region(rng, basis, shape)
    smaller = dataclasses.replace(a, theta=a.theta * rng.uniform(0.5, 1, shape))
    theta = smaller.theta.copy()
    theta[1, 2, 0] = a.theta[1, 2, 0] * 1.001
    sticks_out = dataclasses.replace(a, theta=theta)
    moved = dataclasses.replace(smaller, center=smaller.center + 1e-6)
    for region, contained in ((a, True), (smaller, True), (sticks_out, False), (moved, False)):
        assert is_superset(a, region) == contained
    for region in (smaller, sticks_out):
        assert is_superset(a, region) == is_superset(in_pixels(a), in_pixels(region))


@each
def test_the_same_center_and_single_points(basis, shape):
    rng = np.random.default_rng(6)
    a, b = (random_region(rng, basis, shape) for _ in range(2))
    b = dataclasses.replace(b, center=a.center)
    largest = (b.gap * b.theta / a.theta).min()
    assert separation(a, b) == largest_outside(a, b) == 0
    assert largest * (1 - 1e-6) <= largest_inside(a, b) <= largest
    point = Region(a.center + rng.normal(size=shape), 1.0, 0.0, 2, basis)
    away = np.linalg.norm(in_pixels(point).center - in_pixels(a).center)
    assert away * (1 - 1e-6) <= largest_outside(point, dataclasses.replace(a, gap=0.0)) <= away
    assert disjoint(point, dataclasses.replace(a, gap=0.0))
    assert not disjoint(point, point)
    assert largest_inside(a, point) == 0


@each_question
def test_different_bases_are_refused(question):
    shape = (4, 5, 3)
    rng = np.random.default_rng(7)
    bases = [Pixels(), Cosine(), *(KarhunenLoeve.of(rng.random((9, *shape))) for _ in range(2))]
    regions = [Region(np.zeros(shape), 1.0, 1.0, 2, basis) for basis in bases]
    for i, a in enumerate(regions):
        for j, b in enumerate(regions):
            for ask in (question, is_superset, disjoint):
                if i != j:
                    with pytest.raises(ValueError, match="regions of different bases cannot be compared"):
                        ask(a, b)
    same = dataclasses.replace(regions[2], basis=KarhunenLoeve(*bases[2].matrices(shape)))
    question(regions[2], same)
    assert is_superset(regions[1], dataclasses.replace(regions[0], basis=Cosine()))


@each
@each_question
def test_traced_answers_are_below_those_in_float64(basis, shape, question):
    rng = np.random.default_rng(8)
    a = random_region(rng, basis, shape)
    stored = []
    for i in range(40):
        b, direction = random_region(rng, basis, shape), rng.normal(size=shape)
        offset = b.gap * b.theta * direction / np.linalg.norm(direction)
        depth = 1 + rng.normal() * 10 ** rng.uniform(-6, 1) * (i % 10 > 0)
        center = a.center + depth * (matrix(basis, shape).T @ offset.ravel()).reshape(shape)
        stored.append(dataclasses.replace(b, center=center))
    a, *stored = (jax.tree.map(np.float32, region) for region in (a, *stored))
    batch = jax.tree.map(lambda *values: np.stack(values), *stored)
    together = np.asarray(jax.jit(jax.vmap(question, in_axes=(None, 0)))(a, batch))
    for answer, b in zip(together, stored, strict=True):
        exact = question(a, b)
        assert exact.dtype == np.float64
        assert answer <= exact
        flat = in_pixels(a), in_pixels(b)
        depth = geometry.distance(flat[0].center.ravel(), flat[1].center.ravel(), (b.gap * b.theta).ravel(), 2)
        if abs(depth - 1) > 0.1:
            assert answer >= exact * 0.9


@pytest.mark.parametrize("depth", [0.5, 1.3, 5])
def test_the_gradient_of_largest_outside_is_that_of_finite_differences(depth):
    basis, shape = Cosine(), (2, 2, 1)
    a, b = random_pair(np.random.default_rng(9), basis, shape, depth)
    numbers = (a.center, a.theta, b.center, b.theta, np.float64(b.gap))
    size = lambda ca, ta, cb, tb, gb: largest_outside(Region(ca, ta, 1.0, 2, basis), Region(cb, tb, gb, 2, basis))
    gradient = jax.jit(jax.grad(size, argnums=range(5)))(*map(jnp.float32, numbers))
    for place, number in enumerate(numbers):
        for i in np.ndindex(np.shape(number)):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [np.array(value, float) for value in numbers]
                moved[place][i] += step
                ends.append(size(*moved))
            assert gradient[place][i] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-2, abs=1e-3)


@each
@pytest.mark.parametrize(
    ("question", "gap"), [(separation, 1.0), (largest_inside, 1.0), (largest_outside, 1.0), (largest_outside, 0.0)]
)
def test_gradients_are_numbers_also_where_centers_agree(basis, shape, question, gap):
    rng = np.random.default_rng(10)
    a, b = (jax.tree.map(jnp.float32, random_region(rng, basis, shape)) for _ in range(2))

    def answer(center, theta):
        return question(Region(center, theta, 1.0, 2, basis), dataclasses.replace(b, gap=gap))

    gradient = jax.jit(jax.grad(answer, argnums=(0, 1)))
    for center in (b.center, b.center + 0.01, a.center, b.center + 100):
        for values in gradient(center, a.theta):
            assert np.isfinite(values).all()
    assert not np.any(gradient(b.center, a.theta)[0])


def test_regions_are_pytrees_with_their_basis():
    a = Region(np.zeros((4, 4, 1)), 1.0, 1.0, 2, Cosine())
    assert jax.tree.map(lambda value: value, a).basis == Cosine()
    assert jax.tree.structure(a) != jax.tree.structure(dataclasses.replace(a, basis=Pixels()))
    assert len(jax.tree.leaves(a)) == 3
    assert math.isfinite(float(jax.jit(lambda region: region)(a).log_volume))


def test_regions_of_what_is_no_image_are_refused():
    """A batch of regions [4] of inputs [5, 3] must not be taken for images."""
    region = Region(np.zeros((4, 5, 3)), np.ones(4), np.ones(4), 2, Cosine())
    with pytest.raises(ValueError, match="got inputs of 2 axes"):
        region.contains(np.zeros((5, 3)))
