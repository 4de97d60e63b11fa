"""A memory is a value: continued, restored, shared between threads, and filled with numbers of any type.

Its answers are tested in test_memory.py.
"""

import concurrent.futures
import copy
import dataclasses
import math
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancer_jax import memory as module
from ancer_jax.memory import Memory
from ancer_jax.regions import Region
from ancer_jax.smoothing import ABSTAIN
from tests.memories import assert_same, both_norms, certificate, fill, nobody, random_answers, some


@both_norms
def test_continuing_twice_leaves_a_memory_as_it_was(norm):
    rng = np.random.default_rng(1)
    certificates = random_answers(rng, 36, 2, norm)
    memory = Memory.empty(norm)
    for places in (slice(15), slice(15, 20)):  # which leaves room for 10 more
        memory, _ = memory.insert_batch(some(certificates, places))
    before = copy.deepcopy(memory)
    continuations = []
    for places in (slice(20, 28), slice(28, 36)):  # the first may share arrays, the second may not overwrite them
        for columns in ([places], range(places.start, places.stop)):
            one = memory
            for place in columns:
                place = place if isinstance(place, slice) else slice(place, place + 1)
                one, _ = one.insert_batch(some(certificates, place))
            continuations.append(one)
        assert_same(memory, before)
    assert_same(continuations[0], continuations[1])
    assert_same(continuations[2], continuations[3])
    for one, places in zip(continuations[::2], (slice(28), np.r_[:20, 28:36]), strict=True):
        assert_same(one, Memory.empty(norm).insert_batch(some(certificates, places))[0])
    fresh, _ = before.insert_batch(some(certificates, slice(20, 28)))
    assert_same(fresh, continuations[0])


def test_stored_values_cannot_be_written_and_inputs_are_copied():
    center = np.zeros(2, np.float32)
    memory, answer = Memory.empty(2).insert(certificate(Region(center, 1.0, 1.0, 2), 3))
    center[:] = 7
    answer.region.center[...] = 9
    assert memory.classify(np.zeros(2), nobody) == 3
    for values in (*jax.tree.leaves(memory.regions), memory.predictions):
        with pytest.raises(ValueError, match="read-only"):
            values[...] = 0


def test_an_interrupted_batch_leaves_a_memory_as_it_was(monkeypatch):
    monkeypatch.setattr(module, "_BATCH", 4)
    certificates = random_answers(np.random.default_rng(2), 20, 2, 2)
    memory, _ = Memory.empty(2).insert_batch(some(certificates, slice(8)))
    before = copy.deepcopy(memory)

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        memory.insert_batch(some(certificates, slice(12, 20)), progress=interrupt)
    assert_same(memory, before)
    again, _ = memory.insert_batch(some(certificates, slice(8, 20)))
    assert_same(again, Memory.empty(2).insert_batch(certificates)[0])


def test_an_empty_memory():
    memory = Memory.empty(1)
    assert len(memory) == memory.size == 0
    assert memory.predictions.shape == memory.regions.gap.shape == (0,)
    assert len(memory.regions.center) == 0
    for start in (memory, fill(1, ([0, 0], 1.0, 1.0, 3))[0]):
        nothing = Region(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0), 1)
        after, answer = start.insert_batch(certificate(nothing, np.zeros(0, int)))
        assert len(after) == len(start)
        assert answer.prediction.shape == answer.changed.shape == answer.inside.shape == (0,)


def test_stored_regions_can_be_inserted_again():
    memory, _ = fill(2, ([0, 0], 1.0, 2.0, 0), ([3, 0], 1.0, 2.0, 1))
    again, answer = Memory.empty(2).insert_batch(certificate(memory.regions, memory.predictions))
    assert_same(again, memory)
    assert not answer.changed.any()


@both_norms
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_restored_memory_continues_like_the_first(norm, dtype):
    certificates = random_answers(np.random.default_rng(4), 40, 2, norm, dtype)
    memory, _ = Memory.empty(norm).insert_batch(some(certificates, slice(20)))
    restored = Memory.restore(memory.regions, memory.predictions)
    assert_same(restored, memory)
    rest = some(certificates, slice(20, 40))
    assert_same(restored.insert_batch(rest)[0], memory.insert_batch(rest)[0])
    assert len(Memory.restore(Memory.empty(norm).regions, Memory.empty(norm).predictions)) == 0
    with pytest.raises(ValueError, match="gap is out of range: -1"):
        Memory.restore(Region(np.zeros((1, 2)), np.ones(1), -np.ones(1), norm), np.zeros(1, int))


def test_threads_that_insert_into_one_memory_get_their_own_rows(request):
    """A Memory is a value for threads, too: what one thread adds does not depend on the others."""
    rng = np.random.default_rng(0)
    start, _ = fill(2, *((rng.normal(size=3), 1.0, 0.1, i % 2) for i in range(4)))
    certificates = [certificate(Region(rng.normal(size=3), 1.0, 0.2, 2), i % 2) for i in range(8)]
    barrier, interval = threading.Barrier(len(certificates)), sys.getswitchinterval()

    def work(one):
        barrier.wait()
        return start.insert(one)

    with concurrent.futures.ThreadPoolExecutor(len(certificates)) as pool:
        request.addfinalizer(lambda: sys.setswitchinterval(interval))
        sys.setswitchinterval(1e-6)
        for _ in range(30):
            start = Memory.restore(start.regions, start.predictions)  # with spare rows again, which all of them want
            start = start.insert(certificate(Region(rng.normal(size=3), 1.0, 0.0, 2), 1))[0]
            expected = [Memory.restore(start.regions, start.predictions).insert(one) for one in certificates]
            for (memory, answer), (alone, wanted) in zip(pool.map(work, certificates), expected, strict=True):
                np.testing.assert_array_equal(memory.regions.center, alone.regions.center)
                np.testing.assert_array_equal(memory.predictions, alone.predictions)
                assert answer.prediction == wanted.prediction and answer.region.gap == wanted.region.gap


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


@both_norms
def test_arrays_of_any_library_and_type_give_the_same(norm):
    rng = np.random.default_rng(3)
    certificates = random_answers(rng, 40, 2, norm)
    expected, _ = Memory.empty(norm).insert_batch(certificates)
    for library, dtype in ((np, np.float64), (jnp, jnp.float32)):
        convert = lambda value, kind=(library, dtype): kind[0].asarray(value, kind[1])
        regions = jax.tree.map(convert, certificates.region)
        converted = certificate(regions, library.asarray(certificates.prediction))
        assert_same(Memory.empty(norm).insert_batch(converted)[0], expected)
    far = Region(np.array([1e3 + 0.1, 0]), np.array([0.1, 0.3]), 0.1, norm)  # not float32
    memory, _ = Memory.empty(norm).insert(certificate(far, 0))
    memory, _ = memory.insert_batch(certificates)
    np.testing.assert_array_equal(memory.regions.gap[1:], expected.regions.gap)
    np.testing.assert_array_equal(memory.predictions[1:], expected.predictions)


def test_images_integers_and_python_numbers():
    memory, answer = Memory.empty(2).insert(certificate(Region(np.zeros((2, 2), np.uint8), 1, 3, 2), 4))
    assert answer.region.gap == 3
    region = Region(jnp.ones((2, 2)) * 4, jnp.ones((2, 2)), jnp.float32(9), 2)
    memory, answer = memory.insert(certificate(region, jnp.int32(5)))
    assert answer.region.gap == pytest.approx(5, rel=1e-6)
    assert memory.regions.center.shape == memory.regions.theta.shape == (2, 2, 2)
    assert memory.shape == (2, 2)
    _, answer = Memory.empty(1).insert(certificate(Region(0.5, 1.0, 1.0, 1), 0))
    assert not answer.changed
    memory, _ = Memory.empty(2).insert(certificate(Region(np.zeros((2, 2)), 0.5, 1.0, 2), 4))
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
        memory.insert_batch(certificate(region, np.asarray(prediction)[None]))
    assert len(memory) == 1


def test_one_certificate_or_a_batch_is_refused_where_the_other_is_wanted():
    memory, batch = Memory.empty(2), random_answers(np.random.default_rng(0), 3, 2, 2)
    with pytest.raises(ValueError, match="insert takes one certificate, got a batch of 3: use insert_batch"):
        memory.insert(batch)
    with pytest.raises(ValueError, match="insert_batch takes a batch of certificates, got one: use insert"):
        memory.insert_batch(batch[0])


def test_bad_norms_and_inputs_are_refused():
    for make in (Memory.empty, lambda norm: Region(np.zeros(2), 1.0, 1.0, norm)):
        with pytest.raises(ValueError, match="norm must be 2 or 1, got 3"):
            make(3)
    memory, _ = fill(2, ([5, 5], 1.0, 1.0, 0))
    with pytest.raises(ValueError, match=r"shape \[2\], got \[3\]"):
        memory.classify(np.zeros(3), nobody)
    with pytest.raises(ValueError, match="nan"):
        memory.classify(np.array([0, math.nan]), nobody)


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
            module._checked(
                Memory.empty(2),
                Region(centers, np.full(len(gap), theta), gap / theta, 2),
                np.zeros(len(gap), int),
            )
            for centers, gap in ((b, reach), (a, own))
        )
        own, reach = (np.longdouble(value["outer_radius"]) for value in (rows, stored))
        may_meet, may_lie_in = module._near(rows, stored, 60)
        assert may_meet[square <= (own[:, None] + reach) ** 2].all()
        assert may_lie_in[square <= reach**2].all()


def test_the_filter_drops_most_pairs_that_are_far_apart():
    certificates = random_answers(np.random.default_rng(5), 100, 500, 2)
    regions = dataclasses.replace(certificates.region, gap=certificates.region.gap / 100)
    rows = module._checked(Memory.empty(2), regions, certificates.prediction)
    may_meet, may_lie_in = module._near(rows, rows, 100)
    assert (may_meet | may_lie_in).sum() == 100  # each with itself
