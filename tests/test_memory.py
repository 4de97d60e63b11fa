import concurrent.futures
import copy
import math
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ancer_jax import memory as module
from ancer_jax.certification import ABSTAIN
from ancer_jax.memory import classify, empty, insert, insert_batch, restore
from ancer_jax.regions import Region, contains
from tests import geometry

both_norms = pytest.mark.parametrize("norm", [2, 1])
nobody = lambda x: -99


def fill(norm, *answers):
    """The memory after inserting (centre, theta, gap, class) in turn, and what it answered."""
    memory, infos = empty(norm), []
    for center, theta, gap, prediction in answers:
        memory, info = insert(memory, Region(np.asarray(center, float), theta, gap, norm), prediction)
        infos.append(info)
    return memory, infos


def stored_in(memory):
    """All stored regions, theta per coordinate."""
    regions = memory.regions
    theta = regions.theta.reshape(len(memory), *(-1,) * (regions.center.ndim - 1))
    return Region(regions.center, np.broadcast_to(theta, regions.center.shape), regions.gap, memory.norm)


def some(regions, places):
    return jax.tree.map(lambda value: np.asarray(value)[places], regions)


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
    """How far a's centre is from that of b in units of b's gap; 1 is the surface."""
    away = geometry.distance(a.center, b.center, semi_axes(b), a.norm)
    return np.where((b.gap > 0) | (away == 0), away, math.inf)


def check_answer(region, prediction, stored, classes, info):
    """Class, size and `changed` of an answer, from the rules and independent geometry, given what was stored before."""
    depths = depth(region, stored)
    surface = np.abs(depths - 1).min(initial=math.inf)
    if surface < 1e-9:  # rounding decides
        return
    holding = np.flatnonzero((depths < 1) & (classes != prediction))
    if holding.size:
        answer, largest = classes[holding[0]], inside(region, some(stored, holding)).max()
        assert info.inside in holding
    else:
        answer, largest = prediction, outside(region, some(stored, classes != prediction)).min(initial=math.inf)
    loss = 1e-6 + 1e-12 / surface
    assert info.prediction == answer
    assert min(region.gap, largest) * (1 - loss) <= info.region.gap <= min(region.gap, largest)
    assert info.changed == (answer != prediction or info.region.gap != region.gap)
    assert (info.inside >= 0) == (depths < 1).any()
    assert info.inside < 0 or depths[info.inside] < 1


def check_invariants(memory, rng):
    """Regions of different classes have no point in common; answers inside a region are its class."""
    stored, classes = stored_in(memory), memory.predictions
    rays = geometry.rays_and_axes(rng, 5, stored.center.shape[1], memory.norm)
    for i, prediction in enumerate(classes):
        a, others = some(stored, i), some(stored, classes != prediction)
        assert contains(a, a.center)
        assert (a.gap < outside(a, others)).all()
        points = a.center + a.gap * a.theta * rays * rng.choice([1 - 1e-9, 0.5], (len(rays), 1))
        # Rounding moves those of a region that is tiny beside its centre out of it.
        points = points[geometry.distance(points, a.center, a.theta, a.norm) <= a.gap]
        assert (geometry.distance(points[:, None], others.center, others.theta, a.norm) > others.gap).all()
        for point in (a.center, *points[:: len(points) // 2 or 1]):
            assert classify(memory, point, nobody) == prediction


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
@settings(max_examples=30, deadline=None)
def test_answers_follow_the_rules_and_never_contradict(crowd, seed):
    norm, answers = crowd
    memory, infos = fill(norm, *answers)
    stored = stored_in(memory)
    for i, (center, theta, gap, prediction) in enumerate(answers):
        center = np.asarray(center, float)
        region = Region(center, np.broadcast_to(theta, center.shape), gap, norm)
        check_answer(region, prediction, some(stored, slice(i)), memory.predictions[:i], infos[i])
        np.testing.assert_array_equal(stored.center[i], center)
        np.testing.assert_array_equal(stored.theta[i], region.theta)
        assert (stored.gap[i], memory.predictions[i]) == (infos[i].region.gap, infos[i].prediction)
    check_invariants(memory, np.random.default_rng(seed))


@given(crowds([2]), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_a_batch_is_answered_one_after_another(crowd, block):
    norm, answers = crowd
    memory, infos = fill(norm, *answers)
    center, gap = (np.array([answer[i] for answer in answers], float) for i in (0, 2))
    theta = np.stack([np.broadcast_to(answer[1], center.shape[1:]) for answer in answers])
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BATCH", block)
        regions = Region(center, theta, gap, norm)
        batched, info = insert_batch(empty(norm), regions, [answer[3] for answer in answers], progress=told.append)
    assert sum(told) == len(answers)
    np.testing.assert_array_equal(batched.predictions, memory.predictions)
    # One theta for all coordinates takes another program than one for each: the last bit may differ.
    np.testing.assert_allclose(batched.regions.gap, memory.regions.gap, rtol=1e-12)
    for i, one in enumerate(infos):
        assert (info.prediction[i], info.changed[i], info.inside[i]) == (one.prediction, one.changed, one.inside)
        assert info.region.gap[i] == batched.regions.gap[i]


def random_answers(rng, count, d, norm, dtype=np.float32):
    regions = Region(
        *(dtype(rng.uniform(low, 1, size)) for low, size in ((0, (count, d)), (0.1, (count, d)), (0, count))), norm
    )
    return regions, rng.integers(0, 3, count)


def assert_same(a, b):
    np.testing.assert_array_equal(a.predictions, b.predictions)
    for value, other in zip(jax.tree.leaves(a.regions), jax.tree.leaves(b.regions), strict=True):
        np.testing.assert_array_equal(value, other)


@both_norms
def test_more_neighbours_than_are_asked_at_once(norm):
    regions, classes = random_answers(np.random.default_rng(0), 300, 2, norm)
    memory, _ = insert_batch(empty(norm), regions, classes)
    one_by_one = empty(norm)
    for i in range(300):
        one_by_one, _ = insert(one_by_one, some(regions, i), classes[i])
    assert_same(memory, one_by_one)
    stored = stored_in(memory)
    for i in (64, 65, 200, 256, 299):
        before = some(stored, np.flatnonzero(memory.predictions[:i] != memory.predictions[i]))
        assert (stored.gap[i] < outside(some(stored, i), before)).all()


# --- named cases


@both_norms
def test_balls_of_radius_2_at_distance_3(norm):
    memory, (first, second) = fill(norm, ([0, 0], 1.0, 2.0, 0), ([3, 0], 1.0, 2.0, 1))
    assert (first.prediction, first.region.gap, first.changed) == (0, 2, False)
    assert (second.prediction, second.changed, second.inside) == (1, True, -1)
    assert 1 - 1e-6 < second.region.gap < 1
    assert classify(memory, np.array([2.0, 0]), nobody) == 0
    _, (_, second) = fill(norm, ([0, 0], 1.0, 2.0, 0), ([3, 0], 1.0, 2.0, 0))
    assert (second.region.gap, second.changed) == (2, False)


@both_norms
def test_tangent_regions_of_different_classes_part(norm):
    memory, (_, second) = fill(norm, ([0, 0], 1.0, 2.0, 0), ([3, 0], 0.5, 2.0, 1))
    assert 2 - 2e-6 < second.region.gap < 2
    assert second.changed
    assert classify(memory, np.array([2.0, 0]), nobody) == 0
    assert classify(memory, np.array([2.0001, 0]), nobody) == 1


@both_norms
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("first", [0, 1])
def test_an_input_just_inside_one_of_two_touching_regions(norm, dtype, first):
    left, right = ([0, 0], 1.0, 1.0 + first, 0), ([2.5, 0], 1.0, 2.5 - first, 1)
    memory, _ = fill(norm, *((left, right), (right, left))[first])
    for x, prediction in ((0.999999, 0), (1.0, first), (1.000001, 1)):
        x = np.array([x, 0]).astype(dtype)
        assert classify(memory, x, nobody) == prediction
        for given_class in (0, 1):
            for gap in (0.5, 0):
                _, info = insert(memory, Region(x, 1.0, gap, norm), given_class)
                assert info.prediction == prediction
                assert info.region.gap == pytest.approx(min(gap, abs(x[0] - 1)), rel=1e-2, abs=1e-9)
        _, info = insert(memory, Region(x, 1.0, 0, norm), ABSTAIN)
        assert info.prediction == prediction


@both_norms
def test_an_input_just_outside_keeps_its_class(norm):
    memory, _ = fill(norm, (np.zeros(300), 1.0, 1.0, 0))
    x = np.eye(300)[0] * (1 + 1e-6)
    for gap in (1.0, 0):
        _, info = insert(memory, Region(x, 1.0, gap, norm), 1)
        assert (info.prediction, info.inside) == (1, -1)
        assert info.region.gap == pytest.approx(min(gap, 1e-6), rel=1e-3)
    assert classify(memory, x, nobody) == nobody(x)


@both_norms
def test_concentric_regions_of_different_classes(norm):
    theta = np.array([1.0, 2.0])
    for gap, largest in ((0.5, 0.5), (2.0, 1.0)):  # within the first, and around it
        _, (_, info) = fill(norm, ([1, 1], theta, 1.0, 4), ([1, 1], theta, gap, 7))
        assert (info.prediction, info.changed, info.inside) == (4, True, 0)
        assert largest * (1 - 1e-6) < info.region.gap <= largest
    _, (_, info) = fill(norm, ([1, 1], theta, 1.0, 4), ([1, 1], theta[::-1], 2.0, 7))
    assert info.region.gap == pytest.approx(0.5, rel=1e-6)


@both_norms
def test_duplicates(norm):
    answer = ([1.0, 1], 1.0, 1.0, 4)
    memory, (_, info) = fill(norm, answer, answer)
    assert (info.prediction, info.region.gap, info.changed, info.inside) == (4, 1, False, 0)
    assert len(memory) == 2


@both_norms
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-20, 1e-3, 1.0, 1e20, 1e30, 1e100])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_duplicates_of_any_scale_are_recognised(norm, scale, offset):
    center = offset + scale * np.array([1.0, -3, 0.3])
    memory, (_, info) = fill(norm, (center, 1.0, 0.0, 4), (center, 1.0, 0.0, 7))
    assert (info.prediction, info.inside) == (4, 0)
    assert classify(memory, center, nobody) == 4


@both_norms
def test_an_input_inside_two_regions_of_one_class(norm):
    memory, (*_, info) = fill(norm, ([0, 0], 1.0, 2.0, 0), ([1, 0], 1.0, 2.0, 0), ([1.5, 0], 1.0, 9.0, 1))
    assert (info.prediction, info.changed, info.inside) == (0, True, 1)
    assert 1.5 - 2e-6 < info.region.gap < 1.5  # inside the second, 0.5 inside the first
    _, info = insert(memory, Region(np.array([0.5, 0]), 1.0, 9.0, norm), 0)
    assert (info.prediction, info.region.gap, info.changed) == (0, 9, False)


@both_norms
def test_an_abstention_inside_a_stored_region_gets_its_class(norm):
    memory, (_, info) = fill(norm, ([0, 0], 1.0, 2.0, 5), ([1, 0], 1.0, 0.0, ABSTAIN))
    assert (info.prediction, info.region.gap, info.changed, info.inside) == (5, 0, True, 0)
    assert memory.predictions.tolist() == [5, 5]


@both_norms
@pytest.mark.parametrize("first", [ABSTAIN, 1])
def test_a_region_does_not_swallow_an_earlier_point(norm, first):
    memory, (_, info) = fill(norm, ([1, 0], 1.0, 0.0, first), ([0, 0], 0.5, 9.0, 0))
    assert (info.prediction, info.changed) == (0, True)
    assert 2 - 2e-6 < info.region.gap < 2
    assert classify(memory, np.array([1.0, 0]), nobody) == first
    assert classify(memory, np.array([0.9999, 0]), nobody) == 0
    _, (_, info) = fill(norm, ([1, 0], 1.0, 0.0, 0), ([0, 0], 0.5, 9.0, 0))
    assert not info.changed


@both_norms
def test_points_at_one_place_get_the_first_class(norm):
    memory, infos = fill(norm, *(([1, 0], 1.0, 0.0, prediction) for prediction in (ABSTAIN, 3, ABSTAIN)))
    assert [info.prediction for info in infos] == [ABSTAIN] * 3
    assert [info.changed for info in infos] == [False, True, False]
    assert [info.inside for info in infos] == [-1, 0, 0]
    memory, info = insert(memory, Region(np.array([1.0, 0]), 1.0, 5.0, 2), 3) if norm == 2 else (memory, infos[0])
    assert (info.prediction, info.region.gap) == (ABSTAIN, 0)
    assert classify(memory, np.array([1, 0]), nobody) == ABSTAIN


@both_norms
def test_the_order_decides(norm):
    large, small = ([0, 0], 1.0, 2.0, 0), ([1, 0], 1.0, 0.1, 1)
    _, (_, info) = fill(norm, large, small)
    assert info.prediction == 0
    _, (_, info) = fill(norm, small, large)
    assert info.prediction == 0
    assert info.region.gap == pytest.approx(0.9)


def test_outside_all_regions_the_fallback_answers():
    memory, _ = fill(2, ([0, 0], 1.0, 1.0, 3))
    assert classify(memory, np.array([0.5, 0]), nobody) == 3
    assert classify(memory, np.array([1.5, 0]), lambda x: int(x[0] * 2)) == 3
    assert classify(empty(2), np.zeros(2), lambda x: 8) == 8


# --- a value


@both_norms
def test_continuing_twice_leaves_a_memory_as_it_was(norm):
    rng = np.random.default_rng(1)
    regions, classes = random_answers(rng, 36, 2, norm)
    memory = empty(norm)
    for places in (slice(15), slice(15, 20)):  # which leaves room for 10 more
        memory, _ = insert_batch(memory, some(regions, places), classes[places])
    before = copy.deepcopy(memory)
    continuations = []
    for places in (slice(20, 28), slice(28, 36)):  # the first may share arrays, the second may not overwrite them
        for columns in ([places], range(places.start, places.stop)):
            one = memory
            for place in columns:
                place = place if isinstance(place, slice) else slice(place, place + 1)
                one, _ = insert_batch(one, some(regions, place), classes[place])
            continuations.append(one)
        assert_same(memory, before)
    assert_same(continuations[0], continuations[1])
    assert_same(continuations[2], continuations[3])
    for one, places in zip(continuations[::2], (slice(28), np.r_[:20, 28:36]), strict=True):
        assert_same(one, insert_batch(empty(norm), some(regions, places), classes[places])[0])
    fresh, _ = insert_batch(before, some(regions, slice(20, 28)), classes[20:28])
    assert_same(fresh, continuations[0])


def test_stored_values_cannot_be_written_and_inputs_are_copied():
    center = np.zeros(2, np.float32)
    memory, info = insert(empty(2), Region(center, 1.0, 1.0, 2), 3)
    center[:] = 7
    info.region.center[...] = 9
    assert classify(memory, np.zeros(2), nobody) == 3
    for values in (*jax.tree.leaves(memory.regions), memory.predictions):
        with pytest.raises(ValueError, match="read-only"):
            values[...] = 0


def test_an_interrupted_batch_leaves_a_memory_as_it_was(monkeypatch):
    monkeypatch.setattr(module, "_BATCH", 4)
    regions, classes = random_answers(np.random.default_rng(2), 20, 2, 2)
    memory, _ = insert_batch(empty(2), some(regions, slice(8)), classes[:8])
    before = copy.deepcopy(memory)

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        insert_batch(memory, some(regions, slice(12, 20)), classes[12:20], progress=interrupt)
    assert_same(memory, before)
    again, _ = insert_batch(memory, some(regions, slice(8, 20)), classes[8:20])
    assert_same(again, insert_batch(empty(2), regions, classes)[0])


def test_an_empty_memory():
    memory = empty(1)
    assert len(memory) == memory.size == 0
    assert memory.predictions.shape == memory.regions.gap.shape == (0,)
    assert len(memory.regions.center) == 0
    for start in (memory, fill(1, ([0, 0], 1.0, 1.0, 3))[0]):
        nothing = Region(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0), 1)
        after, info = insert_batch(start, nothing, np.zeros(0, int))
        assert len(after) == len(start)
        assert info.prediction.shape == info.changed.shape == info.inside.shape == (0,)


def test_stored_regions_can_be_inserted_again():
    memory, _ = fill(2, ([0, 0], 1.0, 2.0, 0), ([3, 0], 1.0, 2.0, 1))
    again, info = insert_batch(empty(2), memory.regions, memory.predictions)
    assert_same(again, memory)
    assert not info.changed.any()


@both_norms
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_restored_memory_continues_like_the_first(norm, dtype):
    regions, classes = random_answers(np.random.default_rng(4), 40, 2, norm, dtype)
    memory, _ = insert_batch(empty(norm), some(regions, slice(20)), classes[:20])
    restored = restore(memory.regions, memory.predictions)
    assert_same(restored, memory)
    rest = some(regions, slice(20, 40)), classes[20:]
    assert_same(insert_batch(restored, *rest)[0], insert_batch(memory, *rest)[0])
    assert len(restore(empty(norm).regions, empty(norm).predictions)) == 0
    with pytest.raises(ValueError, match="gap is out of range: -1"):
        restore(Region(np.zeros((1, 2)), np.ones(1), -np.ones(1), norm), np.zeros(1, int))


# --- inputs


@both_norms
def test_arrays_of_any_library_and_type_give_the_same(norm):
    rng = np.random.default_rng(3)
    regions, classes = random_answers(rng, 40, 2, norm)
    expected, _ = insert_batch(empty(norm), regions, classes)
    for library, dtype in ((np, np.float64), (jnp, jnp.float32)):
        converted = jax.tree.map(lambda value, kind=(library, dtype): kind[0].asarray(value, kind[1]), regions)
        assert_same(insert_batch(empty(norm), converted, library.asarray(classes))[0], expected)
    far = Region(np.array([1e3 + 0.1, 0]), np.array([0.1, 0.3]), 0.1, norm)  # not float32
    memory, _ = insert(empty(norm), far, 0)
    memory, _ = insert_batch(memory, regions, classes)
    np.testing.assert_array_equal(memory.regions.gap[1:], expected.regions.gap)
    np.testing.assert_array_equal(memory.predictions[1:], expected.predictions)


def test_images_integers_and_python_numbers():
    memory, info = insert(empty(2), Region(np.zeros((2, 2), np.uint8), 1, 3, 2), 4)
    assert info.region.gap == 3
    memory, info = insert(memory, Region(jnp.ones((2, 2)) * 4, jnp.ones((2, 2)), jnp.float32(9), 2), jnp.int32(5))
    assert info.region.gap == pytest.approx(5, rel=1e-6)
    assert memory.regions.center.shape == memory.regions.theta.shape == (2, 2, 2)
    assert memory.shape == (2, 2)
    _, info = insert(empty(1), Region(0.5, 1.0, 1.0, 1), 0)
    assert not info.changed
    memory, _ = insert(empty(2), Region(np.zeros((2, 2)), 0.5, 1.0, 2), 4)
    assert memory.regions.theta.shape == (1,)


GOOD = {"center": np.zeros(2), "theta": 1.0, "gap": 1.0, "norm": 2, "prediction": 3}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"norm": 1}, "holds regions of the l2 norm, got one of the l1 norm"),
        ({"center": np.zeros(3)}, r"holds inputs of shape \[2\], got \[3\]"),
        ({"theta": np.ones(3)}, r"do not fit together: .*\[1, 3\]"),
        ({"gap": np.ones(2)}, "do not fit together"),
        ({"prediction": np.zeros(2, int)}, "do not fit together"),
        ({"prediction": 1.5}, "prediction must be an integer, got float64"),
        ({"prediction": "1"}, "prediction must be an integer, got <U1"),
        ({"center": np.zeros(2, complex)}, "center must be real numbers, got complex128"),
        ({"prediction": -2}, "prediction must be a class or ABSTAIN .* got -2"),
        ({"center": np.array([0, math.nan])}, "center is out of range: nan"),
        ({"theta": 0.0}, "theta is out of range: 0.0"),
        ({"theta": np.array([1, -1.0])}, "theta is out of range: -1.0"),
        ({"theta": math.inf}, "theta is out of range: inf"),
        ({"gap": -0.5}, "gap is out of range: -0.5"),
        ({"gap": math.nan}, "gap is out of range: nan"),
        ({"gap": math.inf}, "gap is out of range: inf"),
        ({"theta": 1e-39}, "theta is out of range: 1e-39"),  # smaller than any normal float32
        ({"gap": 1e39}, r"gap is out of range: 1e\+39"),
        ({"prediction": ABSTAIN}, "gap of an abstention is out of range: 1.0"),
    ],
)
def test_bad_answers_are_refused(wrong, message):
    """Each would be accepted but for one value."""
    memory, _ = fill(2, ([5, 5], 1.0, 1.0, 0))
    values = GOOD | wrong
    prediction = values.pop("prediction")
    region = jax.tree.map(lambda value: np.asarray(value)[None], Region(**values))
    with pytest.raises(ValueError, match=message):
        insert_batch(memory, region, np.asarray(prediction)[None])
    assert len(memory) == 1


def test_bad_norms_and_inputs_are_refused():
    for make in (empty, lambda norm: Region(np.zeros(2), 1.0, 1.0, norm)):
        with pytest.raises(ValueError, match="norm must be 2 or 1, got 3"):
            make(3)
    memory, _ = fill(2, ([5, 5], 1.0, 1.0, 0))
    with pytest.raises(ValueError, match=r"shape \[2\], got \[3\]"):
        classify(memory, np.zeros(3), nobody)
    with pytest.raises(ValueError, match="nan"):
        classify(memory, np.array([0, math.nan]), nobody)


# --- the filter


def exact_square(a, b):
    """Squared distances of all pairs, with the exponents and the digits of long double."""
    return ((a[:, None].astype(np.longdouble) - b.astype(np.longdouble)) ** 2).sum(-1)


def places(rng, kind, count, d):
    spread = rng.normal(size=(count, d))
    return {
        "unit": spread,
        "offset": 1000 + 1e-4 * spread,
        "float64": 1000 + 1e-9 * spread,
        "images": (rng.random((count, d)) < 0.1) * rng.random((count, d)),
        "all scales": spread * 10.0 ** rng.uniform(-30, 3, (count, 1)),
        "tiny": 1e-25 * spread,
        "large": 1e19 * spread,
        "overflow": 1e30 * spread,
        "beyond float32": 1e60 * spread,
    }[kind]


KINDS = ["unit", "offset", "float64", "images", "all scales", "tiny", "large", "overflow", "beyond float32"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 3, 1000])
def test_the_filter_drops_no_pair_that_meets(kind, d):
    rng = np.random.default_rng(d)
    a, b = places(rng, kind, 40, d), places(rng, kind, 60, d)
    b[:30] = a[:30] * (1 + np.float32(1e-7) * rng.integers(0, 3, (30, 1)))  # near duplicates, and duplicates
    square = exact_square(a, b)
    theta = 1e30 if kind == "beyond float32" else 1.0
    for size in ("pair", "sum", 0):  # radii with which pairs just meet
        reach = np.zeros(60) if size == 0 else np.float64(np.sqrt(square[rng.integers(40, size=60), np.arange(60)]))
        own = np.full(40, np.median(reach) if size == "sum" else 0.0)
        reach = np.abs(reach - own[0])
        stored, rows = (
            module._rows(empty(2), Region(centers, np.full(len(gap), theta), gap / theta, 2), np.zeros(len(gap), int))
            for centers, gap in ((b, reach), (a, own))
        )
        own, reach = (np.longdouble(value["reach"]) for value in (rows, stored))
        may_meet, may_lie_in = module._near(rows, stored, 60)
        assert may_meet[square <= (own[:, None] + reach) ** 2].all()
        assert may_lie_in[square <= reach**2].all()


def test_the_filter_drops_most_pairs_that_are_far_apart():
    regions, classes = random_answers(np.random.default_rng(5), 100, 500, 2)
    rows = module._rows(
        empty(2), some(Region(regions.center, regions.theta, regions.gap / 100, 2), slice(None)), classes
    )
    may_meet, may_lie_in = module._near(rows, rows, 100)
    assert (may_meet | may_lie_in).sum() == 100  # each with itself


# --- attacks in many dimensions


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
    return Region(center, theta, np.where(prediction == ABSTAIN, 0, gap), norm), prediction, cluster


def worst_overlap(memory, cluster, rng, pairs):
    """The smallest max of both normalised distances over all points that the attacks found, for different classes."""
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


def worst_escape(memory, info, places, rng):
    """How far regions reach in those that they were placed in; 1 is the surface."""
    assert (memory.predictions[places] == memory.predictions[info.inside[places]]).all()
    stored, worst = stored_in(memory), 0.0
    for a, b in ((some(stored, i), some(stored, info.inside[i])) for i in places if memory.regions.gap[i] > 0):
        worst = max(worst, geometry.farthest(rng, a.center, a.theta, a.gap, b.center, b.gap * b.theta, a.norm))
    return worst


def attack(norm, clusters, members, pairs, swallowed):
    rng = np.random.default_rng(norm)
    regions, classes, cluster = crowd_of_images(rng, clusters, members, norm)
    memory, info = insert_batch(empty(norm), regions, classes)
    assert (memory.regions.gap <= regions.gap).all()
    placed = np.flatnonzero(info.prediction != classes)
    shrunk = info.changed & (info.prediction == classes)
    print(f"p={norm}: {len(classes)} answers, {len(placed)} placed in others, {shrunk.sum()} shrunk", end="; ")
    assert min(len(placed), shrunk.sum()) > 0.15 * len(classes)
    assert len(placed) + shrunk.sum() > 0.5 * len(classes)
    overlap = worst_overlap(memory, cluster, rng, pairs)
    escape = worst_escape(memory, info, rng.permutation(placed)[:swallowed], rng)
    print(f"overlap 1 + {overlap - 1:.1e}, escape 1 - {1 - escape:.1e}")
    assert overlap > 1
    assert escape <= 1
    for i in rng.permutation(len(classes))[:20]:
        a = some(stored_in(memory), i)
        point = a.center + a.theta * a.gap * geometry.rays(rng, 1, a.center.size, norm)[0] * (1 - 1e-9)
        assert classify(memory, point, nobody) == memory.predictions[i]


@both_norms
def test_attacks_find_no_contradiction(norm):
    attack(norm, clusters=6, members=50, pairs=60, swallowed=30)


@pytest.mark.slow
@both_norms
def test_attacks_find_no_contradiction_among_ten_thousand(norm):
    attack(norm, clusters=200, members=50, pairs=1000, swallowed=500)


def test_threads_that_insert_into_one_memory_get_their_own_rows(request):
    """A Memory is a value, for threads, too: what each adds to it is what it would be alone."""
    rng = np.random.default_rng(0)
    start, _ = fill(2, *((rng.normal(size=3), 1.0, 0.1, i % 2) for i in range(4)))
    inputs = [(rng.normal(size=3), 1.0, 0.2, i % 2) for i in range(8)]
    barrier, interval = threading.Barrier(len(inputs)), sys.getswitchinterval()

    def work(one):
        center, theta, gap, prediction = one
        barrier.wait()
        return insert(start, Region(center, theta, gap, 2), prediction)

    with concurrent.futures.ThreadPoolExecutor(len(inputs)) as pool:
        request.addfinalizer(lambda: sys.setswitchinterval(interval))
        sys.setswitchinterval(1e-6)
        for _ in range(30):
            start = restore(start.regions, start.predictions)  # with spare rows again, which all of them want
            start = insert(start, Region(rng.normal(size=3), 1.0, 0.0, 2), 1)[0]
            expected = [
                insert(restore(start.regions, start.predictions), Region(c, t, g, 2), p) for c, t, g, p in inputs
            ]
            for (memory, info), (wanted, answer) in zip(pool.map(work, inputs), expected, strict=True):
                np.testing.assert_array_equal(memory.regions.center, wanted.regions.center)
                np.testing.assert_array_equal(memory.predictions, wanted.predictions)
                assert info.prediction == answer.prediction and info.region.gap == answer.region.gap


def test_a_row_is_claimed_once():
    """Two threads that append to the same columns at the same moment: one of them gets a copy."""
    start, _ = fill(2, *((np.full(3, i), 1.0, 0.1, i % 2) for i in range(3)))
    columns = start._columns
    rows = lambda value: {
        name: np.full((1, *column.shape[1:]), value, column.dtype) for name, column in columns.items()
    }
    first, second = columns.append(3, rows(1)), columns.append(3, rows(2))
    assert (first is columns) != (second is columns)
    assert first["gap"][3] == 1 and second["gap"][3] == 2
