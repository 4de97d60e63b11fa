"""Near the boundary of a stored region, far above rounding, every answer is the exact one: float32 inputs or not."""

import numpy as np
import pytest

from ancer_jax import ABSTAIN, Memory, Region
from tests.memories import certificate

D = 784


def certified(prediction, *region):
    return certificate(Region(*region), prediction)


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("distance", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("norm", [2, 1])
def test_just_outside_is_outside(norm, distance, far):
    at = lambda value: np.eye(D, dtype=np.float32)[0] * np.float32(value)
    memory, _ = Memory.empty(norm).insert(certified(0, at(0), 1.0, 1.0, norm))
    if far:  # an unrelated input that only float64 can represent
        memory, _ = memory.insert(certified(5, np.full(D, 1e3 + 1e-9), 1.0, 0.0, norm))
    x = at(1 + distance)
    assert memory.classify(x, lambda x: 7) == 7
    assert memory.insert(certified(ABSTAIN, x, 1.0, 0.0, norm))[1].prediction == ABSTAIN
    assert memory.insert(certified(0, x, 1.0, 1.0, norm))[1].inside == -1
    memory, answer = memory.insert(certified(1, x, 1.0, 1.0, norm))
    assert answer.prediction == 1 and 0 < answer.gap <= float(x[0]) - 1
    assert memory.classify(x, lambda x: 7) == 1


@pytest.mark.parametrize("norm", [2, 1])
def test_a_shrunk_region_is_answered_up_to_its_border(norm):
    rng = np.random.default_rng(0)
    memory, _ = Memory.empty(norm).insert(certified(0, np.zeros(D, np.float32), np.float32(0.25), 1.0, norm))
    a = np.zeros(D, np.float32)
    a[0] = 0.6
    memory, answer = memory.insert(certified(1, a, np.float32(0.25), 3.0, norm))
    assert answer.changed
    for fraction in (0.9, 0.9999, 1 - 1e-7):
        y = a.astype(float)
        y[0] -= fraction * 0.25 * answer.gap  # towards the other region
        y[1:] += 1e-12 * rng.normal(size=D - 1)
        assert answer.region.contains(y)
        assert memory.classify(y, lambda x: 7) == 1


@pytest.mark.parametrize("norm", [2, 1])
def test_numbers_whose_products_overflow_are_not_far_apart(norm):
    center = np.full((2, 1), 1e25, np.float32) * np.float32([[1], [-1]])
    many = Region(center, np.full(2, 1e20, np.float32), np.full(2, 1e6), norm)
    _, answers = Memory.empty(norm).insert_batch(certificate(many, np.array([0, 1])))
    assert answers.prediction.tolist() == [0, 0]


@pytest.mark.parametrize("norm", [2, 1])
def test_a_region_that_underflows_gives_nothing(norm):
    tiny = np.finfo(np.float32).tiny
    memory, _ = Memory.empty(norm).insert(certified(0, np.zeros(3), tiny, 1e-300, norm))
    _, answer = memory.insert(certified(1, np.zeros(3), 1.0, 3.0, norm))
    assert (answer.prediction, answer.gap) == (0, 0)
