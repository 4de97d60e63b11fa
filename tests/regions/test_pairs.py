"""Pairs of regions: the answers are compared with independent geometry and with a convex solver.

Optimal values are compared with points that attain them (tests/geometry.py, cvxpy): a distance to a point of a region
is never below the distance to the region.
"""

import math

import cvxpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ancer_jax.regions import Region, disjoint, is_superset, largest_inside, largest_outside, separation
from tests import geometry

norms = st.sampled_from([2, 1])
both_norms = pytest.mark.parametrize("norm", [2, 1])
QUESTIONS = {"separation": separation, "outside": largest_outside, "inside": largest_inside}
# Few shapes, since each is compiled: coordinates, and whether theta is a scalar in a and in b.
SHAPES = [(1, True, True), (2, False, True), (4, True, False)]


@st.composite
def pairs(draw):
    """Two regions of one norm that overlap, touch nearly, lie in each other or far apart."""
    d, *scalars = draw(st.sampled_from(SHAPES))
    coordinates = st.one_of(st.integers(-3, 3), st.floats(-3, 3, width=32))
    sizes = st.one_of(st.sampled_from([0.25, 1.0, 4.0]), st.floats(0.0625, 16, width=32))
    norm = draw(norms)
    return tuple(
        Region(
            draw(hnp.arrays(np.float64, d, elements=coordinates)),
            draw(sizes) if scalar else draw(hnp.arrays(np.float64, d, elements=sizes)),
            draw(sizes),
            norm,
        )
        for scalar in scalars
    )


def random_pair(rng, d, norm, depth):
    """The center of a at `depth` (1 is the surface) of b in a random direction; theta of a per coordinate."""
    center, direction = rng.normal(size=(2, d))
    theta_a, theta_b = np.exp(rng.normal(size=(2, d)))
    b = Region(center, theta_b, rng.uniform(0.5, 2), norm)
    offset = depth * b.gap * direction / np.linalg.norm(direction, ord=norm)
    return Region(center + offset * theta_b, theta_a, rng.uniform(0.1, 1), norm), b


def semi_axes(a):
    return np.broadcast_to(a.theta * np.float64(a.gap), np.shape(a.center))


def reference(question, a, b):
    theta, beta = np.broadcast_to(a.theta, a.center.shape), semi_axes(b)
    return getattr(geometry, question)(a.center, theta, b.center, beta, a.norm)


def depth(a, b):
    """1 if the center of a lies on the surface of b."""
    return geometry.distance(a.center, b.center, semi_axes(b), a.norm)


def assert_just_below(answer, exact, relative=1e-6):
    assert exact * (1 - relative) <= answer <= exact


@given(pairs(), st.integers(0, 2**32))
@settings(max_examples=100)
def test_outside_and_inside_are_the_largest_gaps(pair, seed):
    a, b = pair
    assume(abs(depth(a, b) - 1) > 1e-3)
    assert_just_below(largest_outside(a, b), reference("outside", a, b))
    assert_just_below(largest_inside(a, b), reference("inside", a, b))
    theta, beta = np.broadcast_to(a.theta, a.center.shape), semi_axes(b)
    rays = geometry.rays_and_axes(np.random.default_rng(seed), 500, a.center.size, a.norm)
    if depth(a, b) < 1:
        exits = geometry.leaves_at(rays, a.center, theta, b.center, beta, a.norm).min()
        assert largest_inside(a, b) <= exits
        if a.norm == 1:  # a cross-polytope lies in b if its vertices do, and they are among the rays
            assert_just_below(largest_inside(a, b), exits)
    else:
        assert largest_outside(a, b) <= geometry.distance(b.center + beta * rays, a.center, theta, a.norm).min()


@given(pairs(), st.integers(0, 2**32))
@settings(max_examples=100)
def test_separation_is_the_smallest_larger_distance(pair, seed):
    a, b = pair
    d, alpha, beta = a.center - b.center, semi_axes(a), semi_axes(b)
    t = np.linspace(0, 1, 4001)[1:-1, None]
    if a.norm == 2:
        s = (d**2 / (alpha**2 / t + beta**2 / (1 - t))).sum(-1)
        share = 1 / (1 + beta**2 / alpha**2 * t / (1 - t))
        points = a.center - d * share  # nearest to both, for every weight
    else:
        s = (np.minimum(t / alpha, (1 - t) / beta) * np.abs(d)).sum(-1)
        points = a.center - d * np.random.default_rng(seed).choice([0, 0.5, 1], (1000, d.size))
    both = [geometry.distance(points, region.center, semi_axes(region), a.norm) for region in pair]
    smallest = np.max(both, axis=0).min()
    assert s.max() * (1 - 1e-12) <= separation(a, b) <= smallest**a.norm
    if a.norm == 2 and d.any():
        assert separation(a, b) >= smallest**2 * (1 - 1e-2)


@given(pairs())
@settings(max_examples=100)
def test_disjoint_means_outside(pair):
    a, b = pair
    room = reference("outside", a, b) / a.gap
    assume(abs(room - 1) > 1e-6 and abs(depth(a, b) - 1) > 1e-6)
    assert disjoint(a, b) == disjoint(b, a) == (room > 1)


def solve(objective, *constraints):
    """The minimum up to about 1e-7; points that attain it are put into the variables."""
    return cvxpy.Problem(cvxpy.Minimize(objective), constraints).solve(
        cvxpy.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10
    )


def scaled(y, a, axes):
    return cvxpy.norm(cvxpy.multiply(y - a.center, 1 / axes), a.norm)


@both_norms
@pytest.mark.parametrize("far", [1.05, 1.5, 20])
def test_distances_and_separation_are_those_of_a_convex_solver(norm, far):
    for seed in range(3):
        a, b = random_pair(np.random.default_rng(seed), 50, norm, far)
        y = cvxpy.Variable(50)
        solve(scaled(y, a, a.theta), scaled(y, b, semi_axes(b)) <= 1)
        into_b = max(1, geometry.distance(y.value, b.center, semi_axes(b), norm))
        point = b.center + (y.value - b.center) / into_b
        assert_just_below(largest_outside(a, b), geometry.distance(point, a.center, a.theta, norm), 3e-6)
        solve(cvxpy.maximum(scaled(y, a, semi_axes(a)), scaled(y, b, semi_axes(b))))
        larger = max(geometry.distance(y.value, region.center, semi_axes(region), norm) for region in (a, b))
        assert_just_below(separation(a, b), larger**norm)


@pytest.mark.parametrize("deep", [0.05, 0.6, 0.98])
def test_an_ellipsoid_inside_another_is_that_of_a_semidefinite_program(deep):
    a, b = random_pair(np.random.default_rng(7), 12, 2, deep)
    # In z, with y = center_a + theta_a * turn @ z: |z| <= gap implies that y is in b iff
    # 1 - ||y - center_b||_b^2 - multiplier (gap^2 - |z|^2) >= 0 for all z; here divided by the multiplier.
    turn = np.linalg.qr(np.random.default_rng(8).normal(size=(12, 12)))[0]
    scale, offset = np.diag(a.theta / semi_axes(b)) @ turn, (a.center - b.center) / semi_axes(b)
    linear = -(scale.T @ offset)[:, None]
    inverse, square = cvxpy.Variable(), cvxpy.Variable((1, 1))
    corner = inverse * np.full((1, 1), 1 - offset @ offset) - square
    form = cvxpy.bmat([[np.eye(12) - inverse * scale.T @ scale, inverse * linear], [inverse * linear.T, corner]])
    solve(-square[0, 0], form >> 0)
    assert largest_inside(a, b) == pytest.approx(math.sqrt(square.value[0, 0]), rel=1e-5)
    assert_just_below(largest_inside(a, b), reference("inside", a, b))


@both_norms
def test_enough_is_reached_and_never_too_much(norm):
    a, b = random_pair(np.random.default_rng(0), 50, norm, 5)
    largest = largest_outside(a, b)
    for share in (0, 0.1, 0.5, 0.9, 1, 2):
        answer = largest_outside(a, b, enough=share * largest)
        assert min(share, 1) * largest * (1 - 1e-9) <= answer <= reference("outside", a, b)
    assert largest_outside(a, b, enough=0.1 * largest) < largest * 0.999  # which saves time


def ball(center, gap, theta=1.0, norm=2):
    return Region(np.asarray(center, float), theta, gap, norm)


@both_norms
def test_superset_needs_every_coordinate(norm):
    a, b = (ball([0, 0], 1.0, np.array(theta), norm) for theta in ([1.0, 1.0], [2.0, 0.9]))
    assert not is_superset(a, b)
    assert not is_superset(b, a)
    assert is_superset(ball([0, 0], 1.0, np.array([2.0, 1.0]), norm), a)
    assert is_superset(a, a)
    assert is_superset(ball([0, 0], 2.0, np.array([0.5, 0.5]), norm), a)
    assert not is_superset(ball([0.0, 0.1], 1.0, np.array([9.0, 9.0]), norm), a)
    with pytest.raises(ValueError, match="different norms"):
        is_superset(a, ball([0, 0], 1.0, norm=3 - norm))


@both_norms
def test_balls_of_radius_2_at_distance_3_overlap(norm):
    a, b = ball([0, 0], 2.0, norm=norm), ball([3, 0], 2.0, norm=norm)
    assert not disjoint(a, b)
    assert separation(a, b) == pytest.approx(0.75**norm)
    assert_just_below(largest_outside(a, b), 1)
    assert largest_inside(a, b) == 0


@both_norms
@pytest.mark.parametrize("size", [1e-6, 1, 1e6])
@pytest.mark.parametrize("d", [1, 3072])
def test_tangent_regions_are_not_disjoint(norm, size, d):
    rng = np.random.default_rng(d)
    direction = rng.normal(size=d)
    theta = np.exp(rng.normal(size=d))
    direction /= geometry.distance(direction, 0, theta, norm)
    b = ball(np.zeros(d), size, theta, norm)
    for gap in (1.0, size, 0.0):
        touching = ball((gap + size) * direction, gap, theta, norm)
        assert not disjoint(touching, b)
        assert not disjoint(b, touching)
        if gap:
            assert_just_below(largest_outside(touching, b), gap * (1 + 1e-9), 1e-3 if size > gap else 1e-6)
    apart = ball(1.001 * (gap + size) * direction, gap, theta, norm)
    assert disjoint(apart, b)
    assert disjoint(b, apart)


@both_norms
def test_concentric_regions(norm):
    theta_a, theta_b = np.array([1.0, 2, 3, 4]), np.array([1.0, 1, 2, 1])
    a, b = ball(np.ones(4), 1.0, theta_a, norm), ball(np.ones(4), 2.0, theta_b, norm)
    assert separation(a, b) == largest_outside(a, b) == 0
    assert_just_below(largest_inside(a, b), 0.5)
    assert_just_below(largest_inside(b, b), 2)


@both_norms
def test_single_points(norm):
    a, b, c = (ball(center, 0.0, theta, norm) for center, theta in (([0, 0], 1.0), ([3, 4], 1.0), ([3, 4], 2.0)))
    apart = 5 if norm == 2 else 7
    assert disjoint(a, b)
    assert not disjoint(b, c)
    assert_just_below(largest_outside(a, b), apart)
    assert_just_below(largest_outside(c, a), apart / 2)
    assert largest_outside(b, c) == largest_inside(b, c) == 0
    disc = ball([3, 4], 1.0, norm=norm)
    assert_just_below(largest_outside(a, disc), apart - 1)
    assert separation(a, disc) == pytest.approx(apart**norm)
    assert separation(disc, a) == pytest.approx(apart**norm)
    assert not disjoint(ball([3, 4.5], 0.0, norm=norm), disc)


@both_norms
@pytest.mark.parametrize(("size_a", "size_b"), [(1e-6, 1e6), (1e6, 1e-6), (1e-6, 1), (1, 1e6)])
def test_very_unequal_sizes(norm, size_a, size_b):
    rng = np.random.default_rng(3)
    for far in (0.3, 1 + 1e-3, 2, 1e3):
        a, b = random_pair(rng, 4, norm, far)
        a, b = (
            ball(a.center * size_b, a.gap, a.theta * size_a, norm),
            ball(b.center * size_b, b.gap * size_b, b.theta, norm),
        )
        assert_just_below(largest_outside(a, b), reference("outside", a, b))
        assert_just_below(largest_inside(a, b), reference("inside", a, b))


@both_norms
@pytest.mark.parametrize("size", [1e-12, 1e-60, 1e-100])
def test_a_tiny_region_leaves_almost_as_much_as_a_point(norm, size):
    a, b = ball([0, 0], 1.0, norm=norm), ball([3, 4], size, norm=norm)
    assert_just_below(largest_outside(a, b), 5 if norm == 2 else 7)
    if size >= 1e-12:  # float32, too, where squares are tiny earlier
        assert jax.jit(largest_outside)(*jax.tree.map(jnp.float32, (a, b))) == pytest.approx(
            5 if norm == 2 else 7, rel=1e-3
        )


@both_norms
@pytest.mark.parametrize(("size", "compute"), [(1e-19, jax.jit(separation)), (1e-154, separation)], ids=["32", "64"])
def test_separation_is_not_too_large_where_squares_underflow(norm, size, compute):
    assert not compute(ball([0.0], size, norm=norm), ball([2.5 * size], 2 * size, norm=norm)) > (5 / 6) ** norm * 1.001


@both_norms
@pytest.mark.parametrize("d", [2, 3072])
def test_very_elongated_and_in_many_dimensions(norm, d):
    rng = np.random.default_rng(4)
    for far in (0.1, 0.9, 1.1, 10):
        a, b = random_pair(rng, d, norm, far)
        a, b = (ball(r.center, r.gap, 10 ** rng.permutation(np.linspace(-2, 2, d)), norm) for r in (a, b))
        b = ball(a.center + (b.center - a.center) / depth(a, b) * far, b.gap, b.theta, norm)
        assert_just_below(largest_outside(a, b), reference("outside", a, b))
        assert_just_below(largest_inside(a, b), reference("inside", a, b))


@pytest.mark.parametrize("at_longest", [0.0, 1e-200, 1e-12, 1e-4])
@pytest.mark.parametrize("other", [0.01, 0.3, 0.8])
def test_inside_where_the_centers_agree_on_the_longest_axis(at_longest, other):
    """The hard case of the trust-region subproblem: the multiplier is at the pole, or nearly."""
    a, b = ball([at_longest, other, 0], 1.0, np.array([2.0, 1, 1])), ball([0, 0, 0], 1.0)
    assert_just_below(largest_inside(a, b), reference("inside", a, b))
    if other < 0.75:  # the farthest point is off the axis: 4 z^2 + (other + sqrt(t^2 - z^2))^2 <= 1
        assert_just_below(largest_inside(a, b), math.sqrt((1 - other**2 * 4 / 3) / 4) * (1 + 1e-9), 1e-3)


@pytest.mark.usefixtures("without_type_checker")
@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_what_is_no_region_is_refused(question):
    with pytest.raises(ValueError, match="a region must be of type Region, got float: of a certificate, take certifi"):
        question(ball([0, 0], 1.0), 1.0)


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_regions_that_do_not_fit_are_refused(question):
    a = ball([0, 0], 1.0)
    with pytest.raises(ValueError, match="different norms cannot be compared: 2 and 1"):
        question(a, ball([1, 0], 1.0, norm=1))
    with pytest.raises(ValueError, match=r"one shape, got \[2\] and \[3\]"):
        question(a, ball([1, 0, 0], 1.0))
    for bad in (ball([1, 0], 1.0, np.array([1, -0.5])), ball([1, 0], -0.5)):
        with pytest.raises(ValueError, match=r"theta must be positive and gap not negative, got .*-0\.5"):
            question(a, bad)


@both_norms
@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
@pytest.mark.parametrize("d", [2, 300])
def test_traced_answers_are_below_those_in_float64(norm, question, d):
    rng = np.random.default_rng(d)
    stored = [random_pair(rng, d, norm, 1)[1] for _ in range(60)]
    a = random_pair(rng, d, norm, 1)[0]
    for i, b in enumerate(stored):  # a at all depths, on the surface up to rounding in every tenth
        far = 1 + rng.normal() * 10 ** rng.uniform(-7, 2) * (i % 10 > 0)
        stored[i] = ball(a.center + (b.center - a.center) * far / depth(a, b), b.gap, b.theta, norm)
    a, *stored = (jax.tree.map(np.float32, region) for region in (a, *stored))
    batch = jax.tree.map(lambda *values: np.stack(values), *stored)
    together = np.asarray(jax.jit(jax.vmap(question, in_axes=(None, 0)))(a, batch))
    alone = jax.jit(question)
    for answer, b in zip(together, stored, strict=True):
        exact = question(a, b)  # of the same float32 numbers
        assert exact.dtype == np.float64
        assert answer <= exact
        if d == 2:
            assert np.asarray(alone(a, b)) == pytest.approx(answer, rel=1e-4, abs=1e-6)
        if abs(depth(a, b) - 1) > 0.1:
            assert answer >= exact * (1 - 1e-2)


@both_norms
@pytest.mark.parametrize("far", [1.2, 10])
def test_the_gradient_of_largest_outside_is_that_of_finite_differences(norm, far):
    a, b = random_pair(np.random.default_rng(1), 4, norm, far)
    numbers = (a.center, a.theta, b.center, b.theta, np.float64(b.gap))
    size = lambda ca, ta, cb, tb, gb: largest_outside(Region(ca, ta, 1.0, norm), Region(cb, tb, gb, norm))
    gradient = jax.jit(jax.grad(size, argnums=range(5)))(*map(jnp.float32, numbers))
    for place, number in enumerate(numbers):
        for i in np.ndindex(np.shape(number)):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [np.array(value, float) for value in numbers]
                moved[place][i] += step
                ends.append(size(*moved))
            assert gradient[place][i] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-2, abs=1e-3)


@both_norms
@pytest.mark.parametrize("gap", [0.0, 1.0])
@pytest.mark.parametrize("center", [[0, 0], [0.5, 0], [3, 0]], ids=["same", "inside", "outside"])
def test_the_gradient_where_centers_agree_is_zero_and_finite(norm, gap, center):
    size = lambda center, theta: largest_outside(Region(center, theta, 1.0, norm), ball([0, 0], gap, norm=norm))
    by_center, by_theta = jax.jit(jax.grad(size, argnums=(0, 1)))(jnp.float32(center), jnp.ones(2))
    far = max(center[0] - gap, 0)
    np.testing.assert_allclose(by_center, [far > 0, 0], atol=1e-3)
    np.testing.assert_allclose(by_theta, [-far, 0], atol=1e-3)


@pytest.mark.parametrize("question", [is_superset, disjoint, separation, largest_outside, largest_inside])
def test_batches_of_regions_are_refused(question):
    """They would be compared as one region of more coordinates."""
    batch = Region(np.zeros((2, 1)), np.ones(2), np.full(2, 0.1), 2)
    with pytest.raises(ValueError, match="pairs are of one region each"):
        question(batch, batch)


@pytest.mark.parametrize("question", [is_superset, disjoint, separation, largest_outside, largest_inside])
@pytest.mark.parametrize("shape", [(1,), (1, 2), (3,)])
def test_regions_of_other_shapes_are_refused(question, shape):
    """Numbers of one would be broadcast to the other."""
    with pytest.raises(ValueError, match="must have one shape"):
        question(ball(np.zeros(2), 1.0), ball(np.zeros(shape), 0.5))


def test_a_region_that_overflows_is_in_no_other():
    large, larger = (ball([0.0], 1e300, theta) for theta in (1e10, 1e20))
    assert not is_superset(large, larger) and is_superset(larger, ball([0.0], 1.0))
