"""Near the boundary of a stored region, far above rounding, every answer is the exact one: float32 inputs or not."""

import numpy as np
import pytest

from ancer_jax.certification import ABSTAIN
from ancer_jax.memory import classify, empty, insert, insert_batch
from ancer_jax.regions import Region, contains

D = 784


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("distance", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("norm", [2, 1])
def test_just_outside_is_outside(norm, distance, far):
    at = lambda value: np.eye(D, dtype=np.float32)[0] * np.float32(value)
    memory, _ = insert(empty(norm), Region(at(0), 1.0, 1.0, norm), 0)
    if far:  # an unrelated input that only float64 holds
        memory, _ = insert(memory, Region(np.full(D, 1e3 + 1e-9), 1.0, 0.0, norm), 5)
    x = at(1 + distance)
    assert classify(memory, x, lambda x: 7) == 7
    assert insert(memory, Region(x, 1.0, 0.0, norm), ABSTAIN)[1].prediction == ABSTAIN
    assert insert(memory, Region(x, 1.0, 1.0, norm), 0)[1].inside == -1
    memory, info = insert(memory, Region(x, 1.0, 1.0, norm), 1)
    assert info.prediction == 1 and 0 < info.region.gap <= float(x[0]) - 1
    assert classify(memory, x, lambda x: 7) == 1


@pytest.mark.parametrize("norm", [2, 1])
def test_a_shrunk_region_is_answered_up_to_its_border(norm):
    rng = np.random.default_rng(0)
    memory, _ = insert(empty(norm), Region(np.zeros(D, np.float32), np.float32(0.25), 1.0, norm), 0)
    a = np.zeros(D, np.float32)
    a[0] = 0.6
    memory, info = insert(memory, Region(a, np.float32(0.25), 3.0, norm), 1)
    assert info.changed
    for share in (0.9, 0.9999, 1 - 1e-7):
        y = a.astype(float)
        y[0] -= share * 0.25 * info.region.gap  # towards the other region
        y[1:] += 1e-12 * rng.normal(size=D - 1)
        assert contains(info.region, y)
        assert classify(memory, y, lambda x: 7) == 1


@pytest.mark.parametrize("norm", [2, 1])
def test_numbers_whose_products_overflow_are_not_far_apart(norm):
    center = np.full((2, 1), 1e25, np.float32) * np.float32([[1], [-1]])
    regions = Region(center, np.full(2, 1e20, np.float32), np.full(2, 1e6), norm)
    _, info = insert_batch(empty(norm), regions, np.array([0, 1]))
    assert info.prediction.tolist() == [0, 0]


@pytest.mark.parametrize("norm", [2, 1])
def test_a_region_that_underflows_gives_nothing(norm):
    tiny = np.finfo(np.float32).tiny
    memory, _ = insert(empty(norm), Region(np.zeros(3), tiny, 1e-300, norm), 0)
    _, info = insert(memory, Region(np.zeros(3), 1.0, 3.0, norm), 1)
    assert (info.prediction, info.region.gap) == (0, 0)
