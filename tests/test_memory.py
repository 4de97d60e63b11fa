"""The answers of a memory: by its rules, against independent geometry, and under attack.

The bookkeeping behind them is tested in test_memory_state.py.
"""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ancer_jax import memory as module
from ancer_jax.memory import Memory
from ancer_jax.regions import Region
from ancer_jax.smoothing import ABSTAIN
from tests import geometry
from tests.memories import assert_same, both_norms, certificate, fill, nobody, random_answers, some, stored_in


def semi_axes(regions):
    return np.where(regions.gap > 0, regions.gap, 1.0)[..., None] * regions.theta


def outside(a, b):
    """Largest gap of a that leaves b alone; b may be many regions."""
    to_point = geometry.distance(b.center, a.center, a.theta, a.norm)
    return np.where(b.gap > 0, geometry.outside(a.center, a.theta, b.center, semi_axes(b), a.norm), to_point)


def inside(a, b):
    """Largest gap of a within b."""
    return np.where(b.gap > 0, geometry.inside(a.center, a.theta, b.center, semi_axes(b), a.norm), 0.0)


def depth(a, b):
    """How far a's center is from that of b in units of b's gap; 1 is the surface."""
    away = geometry.distance(a.center, b.center, semi_axes(b), a.norm)
    return np.where((b.gap > 0) | (away == 0), away, math.inf)


def check_answer(region, prediction, stored, classes, answer):
    """Class, size and `changed` of an answer, from the rules and independent geometry, given what was stored before."""
    depths = depth(region, stored)
    surface = np.abs(depths - 1).min(initial=math.inf)
    if surface < 1e-9:  # rounding decides
        return
    holding = np.flatnonzero((depths < 1) & (classes != prediction))
    if holding.size:
        expected, largest = classes[holding[0]], inside(region, some(stored, holding)).max()
        assert answer.inside in holding
    else:
        expected, largest = prediction, outside(region, some(stored, classes != prediction)).min(initial=math.inf)
    loss = 1e-6 + 1e-12 / surface
    assert answer.prediction == expected
    assert min(region.gap, largest) * (1 - loss) <= answer.region.gap <= min(region.gap, largest)
    assert answer.changed == (expected != prediction or answer.region.gap != region.gap)
    assert (answer.inside >= 0) == (depths < 1).any()
    assert answer.inside < 0 or depths[answer.inside] < 1


def check_invariants(memory, rng):
    """Regions of different classes have no point in common; answers inside a region are its class."""
    stored, classes = stored_in(memory), memory.predictions
    rays = geometry.rays_and_axes(rng, 5, stored.center.shape[1], memory.norm)
    for i, prediction in enumerate(classes):
        a, others = some(stored, i), some(stored, classes != prediction)
        assert a.contains(a.center)
        assert (a.gap < outside(a, others)).all()
        points = a.center + a.gap * a.theta * rays * rng.choice([1 - 1e-9, 0.5], (len(rays), 1))
        # Rounding moves those of a region that is tiny beside its center out of it.
        points = points[geometry.distance(points, a.center, a.theta, a.norm) <= a.gap]
        assert (geometry.distance(points[:, None], others.center, others.theta, a.norm) > others.gap).all()
        for point in (a.center, *points[:: len(points) // 2 or 1]):
            assert memory.classify(point, nobody) == prediction


@st.composite
def crowds(draw, dimensions):
    """(norm, answers): so close to each other that most must shrink; duplicates, points and abstentions among them."""
    d = draw(st.sampled_from(dimensions))
    number = st.one_of(st.integers(-2, 2), st.floats(-2, 2, width=32))
    size = st.one_of(st.sampled_from([0.5, 1.0, 2.0]), st.floats(0.125, 8, width=32))
    centers = draw(st.lists(st.lists(number, min_size=d, max_size=d), min_size=1, max_size=10))
    answers = []
    for center in draw(st.lists(st.sampled_from(centers), min_size=2, max_size=10)):
        prediction = draw(st.integers(ABSTAIN, 2))
        per_coordinate = st.lists(size, min_size=d, max_size=d).map(np.array)
        theta = draw(st.one_of(size, per_coordinate) if d == 2 else per_coordinate)
        gap = 0.0 if prediction == ABSTAIN else draw(st.one_of(st.just(0.0), size))
        answers.append((center, theta, gap, prediction))
    return draw(st.sampled_from([2, 1])), answers


@given(crowds([1, 2, 4]), st.integers(0, 2**32))
@example((2, [([0, 1], 0.5, 0.0, 2), ([0, 0], 0.5, 2.0, 0), ([0, 1], 0.5, 0.5, 2)]), 2)
@example((2, [([0], np.array([0.5]), 0.0, -1), ([1.5414283107572988e-43], np.array([0.5]), 0.0, 0)]), 0)
@example((2, [([1.5414283107572988e-43], np.array([0.5]), 0.0, -1)] * 2), 0)
@settings(max_examples=30)
def test_answers_follow_the_rules_and_never_contradict(crowd, seed):
    norm, answers = crowd
    memory, answered = fill(norm, *answers)
    stored = stored_in(memory)
    for i, (center, theta, gap, prediction) in enumerate(answers):
        center = np.asarray(center, float)
        region = Region(center, np.broadcast_to(theta, center.shape), gap, norm)
        check_answer(region, prediction, some(stored, slice(i)), memory.predictions[:i], answered[i])
        np.testing.assert_array_equal(stored.center[i], center)
        np.testing.assert_array_equal(stored.theta[i], region.theta)
        assert (stored.gap[i], memory.predictions[i]) == (answered[i].region.gap, answered[i].prediction)
    check_invariants(memory, np.random.default_rng(seed))


@given(crowds([2]), st.integers(1, 4))
@settings(max_examples=30)
def test_a_batch_is_answered_one_after_another(crowd, block):
    norm, answers = crowd
    memory, one_by_one = fill(norm, *answers)
    center, gap = (np.array([answer[i] for answer in answers], float) for i in (0, 2))
    theta = np.stack([np.broadcast_to(answer[1], center.shape[1:]) for answer in answers])
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BATCH", block)
        batch = certificate(Region(center, theta, gap, norm), np.array([answer[3] for answer in answers]))
        batched, answered = Memory.empty(norm).insert_batch(batch, progress=told.append)
    assert sum(told) == len(answers)
    np.testing.assert_array_equal(batched.predictions, memory.predictions)
    # One theta for all coordinates takes another program than one for each: the last bit may differ.
    np.testing.assert_allclose(batched.regions.gap, memory.regions.gap, rtol=1e-12)
    for i, one in enumerate(one_by_one):
        parts = (answered.prediction[i], answered.changed[i], answered.inside[i])
        assert parts == (one.prediction, one.changed, one.inside)
        assert answered.region.gap[i] == batched.regions.gap[i]


@both_norms
def test_more_neighbours_than_are_asked_at_once(norm):
    certificates = random_answers(np.random.default_rng(0), 300, 2, norm)
    memory, _ = Memory.empty(norm).insert_batch(certificates)
    one_by_one = Memory.empty(norm)
    for i in range(300):
        one_by_one, _ = one_by_one.insert(some(certificates, i))
    assert_same(memory, one_by_one)
    stored = stored_in(memory)
    for i in (64, 65, 200, 256, 299):
        before = some(stored, np.flatnonzero(memory.predictions[:i] != memory.predictions[i]))
        assert (stored.gap[i] < outside(some(stored, i), before)).all()


@both_norms
def test_balls_of_radius_2_at_distance_3(norm):
    memory, (first, second) = fill(norm, ([0, 0], 1.0, 2.0, 0), ([3, 0], 1.0, 2.0, 1))
    assert (first.prediction, first.region.gap, first.changed) == (0, 2, False)
    assert (second.prediction, second.changed, second.inside) == (1, True, -1)
    assert 1 - 1e-6 < second.region.gap < 1
    assert memory.classify(np.array([2.0, 0]), nobody) == 0
    _, (_, second) = fill(norm, ([0, 0], 1.0, 2.0, 0), ([3, 0], 1.0, 2.0, 0))
    assert (second.region.gap, second.changed) == (2, False)


@both_norms
def test_tangent_regions_of_different_classes_part(norm):
    memory, (_, second) = fill(norm, ([0, 0], 1.0, 2.0, 0), ([3, 0], 0.5, 2.0, 1))
    assert 2 - 2e-6 < second.region.gap < 2
    assert second.changed
    assert memory.classify(np.array([2.0, 0]), nobody) == 0
    assert memory.classify(np.array([2.0001, 0]), nobody) == 1


@both_norms
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("first", [0, 1])
def test_an_input_just_inside_one_of_two_touching_regions(norm, dtype, first):
    left, right = ([0, 0], 1.0, 1.0 + first, 0), ([2.5, 0], 1.0, 2.5 - first, 1)
    memory, _ = fill(norm, *((left, right), (right, left))[first])
    for x, prediction in ((0.999999, 0), (1.0, first), (1.000001, 1)):
        x = np.array([x, 0]).astype(dtype)
        assert memory.classify(x, nobody) == prediction
        for given_class in (0, 1):
            for gap in (0.5, 0):
                _, answer = memory.insert(certificate(Region(x, 1.0, gap, norm), given_class))
                assert answer.prediction == prediction
                assert answer.region.gap == pytest.approx(min(gap, abs(x[0] - 1)), rel=1e-2, abs=1e-9)
        _, answer = memory.insert(certificate(Region(x, 1.0, 0, norm), ABSTAIN))
        assert answer.prediction == prediction


@both_norms
def test_an_input_just_outside_keeps_its_class(norm):
    memory, _ = fill(norm, (np.zeros(300), 1.0, 1.0, 0))
    x = np.eye(300)[0] * (1 + 1e-6)
    for gap in (1.0, 0):
        _, answer = memory.insert(certificate(Region(x, 1.0, gap, norm), 1))
        assert (answer.prediction, answer.inside) == (1, -1)
        assert answer.region.gap == pytest.approx(min(gap, 1e-6), rel=1e-3)
    assert memory.classify(x, nobody) == nobody(x)


@both_norms
def test_concentric_regions_of_different_classes(norm):
    theta = np.array([1.0, 2.0])
    for gap, largest in ((0.5, 0.5), (2.0, 1.0)):  # within the first, and around it
        _, (_, answer) = fill(norm, ([1, 1], theta, 1.0, 4), ([1, 1], theta, gap, 7))
        assert (answer.prediction, answer.changed, answer.inside) == (4, True, 0)
        assert largest * (1 - 1e-6) < answer.region.gap <= largest
    _, (_, answer) = fill(norm, ([1, 1], theta, 1.0, 4), ([1, 1], theta[::-1], 2.0, 7))
    assert answer.region.gap == pytest.approx(0.5, rel=1e-6)


@both_norms
def test_duplicates(norm):
    memory, (_, answer) = fill(norm, *[([1.0, 1], 1.0, 1.0, 4)] * 2)
    assert (answer.prediction, answer.region.gap, answer.changed, answer.inside) == (4, 1, False, 0)
    assert len(memory) == 2


@both_norms
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-20, 1e-3, 1.0, 1e20, 1e30, 1e100])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_duplicates_of_any_scale_are_recognized(norm, scale, offset):
    center = offset + scale * np.array([1.0, -3, 0.3])
    memory, (_, answer) = fill(norm, (center, 1.0, 0.0, 4), (center, 1.0, 0.0, 7))
    assert (answer.prediction, answer.inside) == (4, 0)
    assert memory.classify(center, nobody) == 4


@both_norms
def test_an_input_inside_two_regions_of_one_class(norm):
    memory, (*_, answer) = fill(norm, ([0, 0], 1.0, 2.0, 0), ([1, 0], 1.0, 2.0, 0), ([1.5, 0], 1.0, 9.0, 1))
    assert (answer.prediction, answer.changed, answer.inside) == (0, True, 1)
    assert 1.5 - 2e-6 < answer.region.gap < 1.5  # inside the second, 0.5 inside the first
    _, answer = memory.insert(certificate(Region(np.array([0.5, 0]), 1.0, 9.0, norm), 0))
    assert (answer.prediction, answer.region.gap, answer.changed) == (0, 9, False)


@both_norms
def test_an_abstention_inside_a_stored_region_gets_its_class(norm):
    memory, (_, answer) = fill(norm, ([0, 0], 1.0, 2.0, 5), ([1, 0], 1.0, 0.0, ABSTAIN))
    assert (answer.prediction, answer.region.gap, answer.changed, answer.inside) == (5, 0, True, 0)
    assert memory.predictions.tolist() == [5, 5]


@both_norms
@pytest.mark.parametrize("first", [ABSTAIN, 1])
def test_a_region_does_not_swallow_an_earlier_point(norm, first):
    memory, (_, answer) = fill(norm, ([1, 0], 1.0, 0.0, first), ([0, 0], 0.5, 9.0, 0))
    assert (answer.prediction, answer.changed) == (0, True)
    assert 2 - 2e-6 < answer.region.gap < 2
    assert memory.classify(np.array([1.0, 0]), nobody) == first
    assert memory.classify(np.array([0.9999, 0]), nobody) == 0
    _, (_, answer) = fill(norm, ([1, 0], 1.0, 0.0, 0), ([0, 0], 0.5, 9.0, 0))
    assert not answer.changed


@both_norms
def test_points_at_one_place_get_the_first_class(norm):
    memory, answered = fill(norm, *(([1, 0], 1.0, 0.0, prediction) for prediction in (ABSTAIN, 3, ABSTAIN)))
    assert [answer.prediction for answer in answered] == [ABSTAIN] * 3
    assert [answer.changed for answer in answered] == [False, True, False]
    assert [answer.inside for answer in answered] == [-1, 0, 0]
    memory, answer = memory.insert(certificate(Region(np.array([1.0, 0]), 1.0, 5.0, norm), 3))
    assert (answer.prediction, answer.region.gap) == (ABSTAIN, 0)
    assert memory.classify(np.array([1, 0]), nobody) == ABSTAIN


@both_norms
def test_the_order_decides(norm):
    large, small = ([0, 0], 1.0, 2.0, 0), ([1, 0], 1.0, 0.1, 1)
    _, (_, answer) = fill(norm, large, small)
    assert answer.prediction == 0
    _, (_, answer) = fill(norm, small, large)
    assert answer.prediction == 0
    assert answer.region.gap == pytest.approx(0.9)


def test_outside_all_regions_the_fallback_answers():
    memory, _ = fill(2, ([0, 0], 1.0, 1.0, 3))
    assert memory.classify(np.array([0.5, 0]), nobody) == 3
    assert memory.classify(np.array([1.5, 0]), lambda x: int(x[0] * 2)) == 3
    assert Memory.empty(2).classify(np.zeros(2), lambda x: 8) == 8


@both_norms
def test_an_answer_has_the_sizes_of_its_region_alone_and_in_a_batch(norm):
    certificates = random_answers(np.random.default_rng(6), 20, 2, norm)
    memory, answers = Memory.empty(norm).insert_batch(certificates)
    for name in ("gap", "radius", "proxy_radius", "log_volume"):
        sizes = getattr(answers, name)
        np.testing.assert_array_equal(sizes, getattr(answers.region, name))
        np.testing.assert_array_equal(sizes, getattr(memory.regions, name))
        assert sizes.shape == (20,) and (sizes <= getattr(certificates, name)).all()
        assert [getattr(answers[i], name) for i in range(20)] == pytest.approx(sizes.tolist(), rel=1e-14)


def crowd_of_images(rng, clusters, members, norm, d=3072):
    """Near-duplicates of different classes with regions that are far too large; the clusters are mixed."""
    count = clusters * members
    away = rng.normal(size=(count, d)) * (rng.random((count, 1)) < rng.choice([0.02, 1.0], (count, d)))
    away *= (10 ** rng.uniform(-3, 0, count) / np.linalg.norm(away, ord=norm, axis=1))[:, None]
    cluster = rng.permutation(np.arange(count) % clusters)
    center = np.float32(rng.random((clusters, d))[cluster] + away)
    theta = np.float32(10 ** rng.uniform(-1, 1, (count, d)))
    gap = 10 ** rng.uniform(-2.5, 0.5, count)
    prediction = rng.integers(ABSTAIN, 4, count)
    return certificate(Region(center, theta, np.where(prediction == ABSTAIN, 0, gap), norm), prediction), cluster


def worst_overlap(memory, cluster, rng, pairs):
    """The smallest max of both normalized distances over all points that the attacks found, for different classes."""
    regions, classes, norm, worst = memory.regions, memory.predictions, memory.norm, math.inf
    closest = []
    for members in (np.flatnonzero((cluster == c) & (regions.gap > 0)) for c in range(cluster.max() + 1)):
        center, axes = np.float64(regions.center[members]), regions.theta[members] * regions.gap[members, None]
        for i, own in enumerate(members):
            other = np.flatnonzero(classes[members] != classes[own])
            if not other.size:
                continue
            towards = (center[other[:1]] - center[i]) / axes[i]
            rays = np.concatenate(
                [geometry.rays(rng, 2, *towards[0].shape, norm), towards / geometry.length(towards, norm)]
            )
            points = center[i] + axes[i] * rays
            distances = geometry.distance(points[:, None], center[other], axes[other], norm)
            worst = min(worst, np.maximum(distances, 1).min())
            d = np.abs(center[i] - center[other])
            for share in (0.1, 0.5, 0.9):  # a lower bound of how clearly the two are separated, to choose pairs
                if norm == 2:
                    s = (d**2 / (axes[i] ** 2 / share + axes[other] ** 2 / (1 - share))).sum(-1)
                else:
                    s = (np.minimum(share / axes[i], (1 - share) / axes[other]) * d).sum(-1)
                closest.append(np.stack([s, np.full(other.size, own), members[other]], -1))
    closest = np.concatenate(closest)
    closest = np.unique(closest[closest[:, 0].argsort()][: 4 * pairs, 1:].astype(int), axis=0)[:pairs]
    for start in range(0, len(closest), 50):
        i, j = closest[start : start + 50].T
        a, b = (np.float64(regions.center[k]) for k in (i, j))
        theta_a, theta_b = (np.float64(regions.theta[k]) for k in (i, j))
        alpha, beta = (regions.gap[k][:, None] * theta for k, theta in ((i, theta_a), (j, theta_b)))
        in_b = geometry.nearest(a, theta_a, b, beta, norm)  # alternating projections
        for _ in range(2):
            in_a = geometry.nearest(in_b, theta_b, a, alpha, norm)
            for points in (in_b, in_a, (in_a + in_b) / 2):
                larger = np.maximum(*(geometry.distance(points, *r, norm) for r in ((a, alpha), (b, beta))))
                worst = min(worst, larger.min())
            in_b = geometry.nearest(in_a, theta_a, b, beta, norm)
    return worst


def worst_escape(memory, inside, places, rng):
    """How far regions reach inside the regions that they were placed in; 1 is the surface."""
    assert (memory.predictions[places] == memory.predictions[inside[places]]).all()
    stored, worst = stored_in(memory), 0.0
    for a, b in ((some(stored, i), some(stored, inside[i])) for i in places if memory.regions.gap[i] > 0):
        worst = max(worst, geometry.farthest(rng, a.center, a.theta, a.gap, b.center, b.gap * b.theta, a.norm))
    return worst


def attack(norm, clusters, members, pairs, swallowed):
    rng = np.random.default_rng(norm)
    certificates, cluster = crowd_of_images(rng, clusters, members, norm)
    memory, answers = Memory.empty(norm).insert_batch(certificates)
    classes = certificates.prediction
    assert (memory.regions.gap <= certificates.region.gap).all()
    placed = np.flatnonzero(answers.prediction != classes)
    shrunk = answers.changed & (answers.prediction == classes)
    print(f"p={norm}: {len(classes)} answers, {len(placed)} placed in others, {shrunk.sum()} shrunk", end="; ")
    assert min(len(placed), shrunk.sum()) > 0.15 * len(classes)
    assert len(placed) + shrunk.sum() > 0.5 * len(classes)
    overlap = worst_overlap(memory, cluster, rng, pairs)
    escape = worst_escape(memory, answers.inside, rng.permutation(placed)[:swallowed], rng)
    print(f"overlap 1 + {overlap - 1:.1e}, escape 1 - {1 - escape:.1e}")
    assert overlap > 1
    assert escape <= 1
    for i in rng.permutation(len(classes))[:20]:
        a = some(stored_in(memory), i)
        point = a.center + a.theta * a.gap * geometry.rays(rng, 1, a.center.size, norm)[0] * (1 - 1e-9)
        assert memory.classify(point, nobody) == memory.predictions[i]


@both_norms
def test_attacks_find_no_contradiction(norm):
    attack(norm, clusters=6, members=50, pairs=60, swallowed=30)


@pytest.mark.slow
@both_norms
def test_attacks_find_no_contradiction_among_ten_thousand(norm):
    attack(norm, clusters=200, members=50, pairs=1000, swallowed=500)
