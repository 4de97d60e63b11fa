"""A memory in a basis answers like one in pixels that holds the coefficients of the centers."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from ancer_jax import memory as module
from ancer_jax.basis import Cosine, KarhunenLoeve, Pixels
from ancer_jax.memory import Memory
from ancer_jax.regions import Region
from ancer_jax.runs.memory_file import load_memory, save_memory
from ancer_jax.smoothing import ABSTAIN
from tests import geometry
from tests.memories import assert_same, certificate, nobody, some

pytestmark = pytest.mark.usefixtures("quick_compilation")

CASES = [
    (Cosine(), (4, 5, 3)),
    (KarhunenLoeve.of(np.random.default_rng(0).random((20, 4, 4, 1))), (4, 4, 1)),
]
each = pytest.mark.parametrize(("basis", "shape"), CASES, ids=lambda value: getattr(value, "name", str(value)))


def coefficients(basis, centers):
    """Of centers [..., *d], by the matrix of the whole basis."""
    shape = np.shape(centers)
    if basis == Pixels():
        return np.float64(centers)
    whole = functools.reduce(np.kron, basis.matrices(shape[-3:]))
    return (np.float64(centers).reshape(*shape[:-3], -1) @ whole.T).reshape(shape)


def crowd(basis, shape, count=100, seed=0, scalar=False):
    """Near-duplicates of different classes with regions that are far too large, points and abstentions among them."""
    rng = np.random.default_rng(seed)
    middles = rng.random((5, *shape))
    away = rng.normal(size=(count, *shape)) / math.sqrt(math.prod(shape))
    away *= (10 ** rng.uniform(-1.5, -0.2, count)).reshape(-1, 1, 1, 1)
    center = np.float32(middles[rng.integers(5, size=count)] + away)
    theta = np.float32(np.exp(rng.normal(size=count if scalar else (count, *shape)) / 3))
    prediction = rng.integers(ABSTAIN, 3, count)
    gap = np.where((prediction == ABSTAIN) | (rng.random(count) < 0.1), 0.0, 10 ** rng.uniform(-1.5, 0, count))
    return certificate(Region(center, theta, gap, 2, basis), prediction)


def in_pixels(certificates):
    """The same answers around the coefficients of the centers."""
    region = certificates.region
    center = coefficients(region.basis, region.center)
    return dataclasses.replace(certificates, region=dataclasses.replace(region, center=center, basis=Pixels()))


@functools.cache
def filled(basis, shape, scalar=False):
    """Certificates, the memory that holds them, and its answers."""
    certificates = crowd(basis, shape, scalar=scalar)
    return certificates, *Memory.empty(2, basis).insert_batch(certificates)


@pytest.mark.parametrize(
    ("basis", "shape", "scalar"),
    [(*CASES[0], True), (*CASES[0], False), (*CASES[1], False)],
    ids=["cosine, one theta", "cosine, thetas", "karhunen-loeve, thetas"],
)
def test_answers_are_those_of_the_coefficients_in_pixels(basis, shape, scalar):
    certificates, memory, answers = filled(basis, shape, scalar)
    flat, expected = Memory.empty(2).insert_batch(in_pixels(certificates))
    for name in ("prediction", "changed", "inside"):
        np.testing.assert_array_equal(getattr(answers, name), getattr(expected, name))
    np.testing.assert_allclose(answers.gap, expected.gap, rtol=1e-9)
    np.testing.assert_array_equal(memory.predictions, flat.predictions)
    kept = answers.prediction == certificates.prediction
    assert min((~kept).sum(), (answers.changed & kept).sum(), (~answers.changed).sum()) >= 10
    assert answers.region.basis == memory.regions.basis == memory.basis == basis
    np.testing.assert_array_equal(memory.regions.center, certificates.region.center)
    np.testing.assert_array_equal(memory.regions.theta, certificates.region.theta)
    assert (answers.gap <= certificates.gap).all()


@each
def test_a_batch_is_answered_one_after_another(basis, shape, monkeypatch):
    certificates, memory, answers = filled(basis, shape)
    one_by_one = Memory.empty(2, basis)
    for i in range(30):
        one_by_one, answer = one_by_one.insert(some(certificates, i))
        for name in ("prediction", "changed", "inside", "gap"):
            assert getattr(answer, name) == getattr(answers, name)[i]
        assert answer.region.basis == basis
    monkeypatch.setattr(module, "_BATCH", 9)
    again, _ = one_by_one.insert_batch(some(certificates, slice(30, None)))
    assert_same(again, memory)


@each
def test_regions_of_different_classes_have_no_point_in_common(basis, shape):
    _, memory, _ = filled(basis, shape)
    regions, classes = memory.regions, memory.predictions
    center = coefficients(basis, regions.center).reshape(len(memory), -1)
    theta, gap = regions.theta.reshape(len(memory), -1), regions.gap
    rng, pairs = np.random.default_rng(1), 0
    for i in range(len(memory)):
        others = np.flatnonzero((classes != classes[i]) & (gap > 0))
        beta = gap[others, None] * theta[others]
        room = geometry.outside(center[i], theta[i], center[others], beta, 2)
        assert (gap[i] < room).all()
        points = (classes != classes[i]) & (gap == 0)
        assert (geometry.distance(center[points], center[i], theta[i], 2) > gap[i]).all()
        pairs += (room < 2 * gap[i]).sum()
        one = some(regions, i)
        assert one.contains(one.center)
        assert memory.classify(one.center, nobody) == classes[i]
        if gap[i] > 0:
            ray = geometry.rays(rng, 2, theta.shape[1], 2)[0] * theta[i] * gap[i] * (1 - 1e-9)
            inputs = regions.center[i] + np.asarray(basis.inputs(ray.reshape(shape)))
            assert one.contains(inputs)
            assert memory.classify(inputs, nobody) == classes[i]
            held = geometry.distance(center[i] + ray, center[others], theta[others], 2) <= gap[others]
            assert not held.any()
    assert pairs > 20


@each
def test_answers_that_were_placed_in_a_region_lie_in_it(basis, shape):
    certificates, memory, answers = filled(basis, shape)
    center, regions = coefficients(basis, memory.regions.center).reshape(len(memory), -1), memory.regions
    theta, rng = regions.theta.reshape(len(memory), -1), np.random.default_rng(2)
    placed = np.flatnonzero(answers.prediction != certificates.prediction)
    for i in placed:
        j = answers.inside[i]
        assert j < i and memory.predictions[i] == memory.predictions[j]
        assert some(regions, j).contains(regions.center[i])
        if regions.gap[i] > 0:
            beta = regions.gap[j] * theta[j]
            assert geometry.farthest(rng, center[i], theta[i], regions.gap[i], center[j], beta, 2) <= 1
    assert (regions.gap[placed] > 0).sum() >= 3


@each
def test_classify_is_that_of_the_coefficients_in_pixels(basis, shape):
    certificates, memory, _ = filled(basis, shape)
    flat, _ = Memory.empty(2).insert_batch(in_pixels(certificates))
    rng, found = np.random.default_rng(3), []
    for i in rng.integers(len(memory), size=60):
        one = some(memory.regions, i)
        ray = one.theta * rng.normal(size=shape)
        ray *= max(float(one.gap), 1e-3) * rng.choice([0.3, 0.9, 1.1, 3]) / np.linalg.norm(ray / one.theta)
        x = one.center + np.asarray(basis.inputs(ray))
        found.append(memory.classify(x, nobody))
        assert found[-1] == flat.classify(coefficients(basis, x), nobody)
    assert len(set(found)) >= 4
    assert Memory.empty(2, basis).classify(np.zeros(shape), lambda x: 8) == 8


@pytest.mark.parametrize("gap", [0.5, 0.0])
def test_a_sphere_holds_the_same_in_every_basis(gap):
    """With one theta for all coefficients the basis does not matter."""
    basis, shape = CASES[0]
    rng = np.random.default_rng(4)
    answered = []
    for of in (Pixels(), basis):
        rng = np.random.default_rng(4)
        memory = Memory.empty(2, of)
        for prediction in (0, 1, 2, 0, 1):
            region = Region(rng.normal(size=shape) / 10, 0.5, gap + rng.random(), 2, of)
            memory, _ = memory.insert(certificate(region, prediction))
        answered.append(memory)
    first, second = answered
    np.testing.assert_array_equal(first.predictions, second.predictions)
    np.testing.assert_allclose(first.regions.gap, second.regions.gap, rtol=1e-9)


@each
def test_a_memory_is_the_same_after_a_file(basis, shape, tmp_path):
    certificates, memory, _ = filled(basis, shape)
    half, _ = Memory.empty(2, basis).insert_batch(some(certificates, slice(60)))
    save_memory(half, tmp_path / "memory.npz")
    loaded = load_memory(tmp_path / "memory.npz")
    assert loaded.basis == basis and loaded.norm == 2 and loaded.shape == shape
    assert_same(loaded, half)
    for one in (loaded, load_memory(tmp_path), Memory.restore(half.regions, half.predictions)):
        finished, _ = one.insert_batch(some(certificates, slice(60, None)))
        assert_same(finished, memory)


@each
def test_an_empty_memory_keeps_its_basis_in_a_file(basis, shape, tmp_path):
    save_memory(Memory.empty(2, basis), tmp_path / "memory.npz")
    loaded = load_memory(tmp_path / "memory.npz")
    assert len(loaded) == 0 and loaded.basis == basis
    assert len(loaded.insert_batch(some(crowd(basis, shape), slice(3)))[0]) == 3


@pytest.mark.parametrize("text", ["", "{}", '{"name": "wavelet"}', '{"name": "karhunen-loeve", "rows": "?"}'])
def test_a_file_with_a_damaged_basis_is_refused(text, tmp_path):
    file = tmp_path / "memory.npz"
    save_memory(filled(*CASES[0])[1], file)
    with np.load(file) as arrays:
        np.savez(file, **dict(arrays) | {"basis": np.array(text)})
    with pytest.raises(ValueError, match="not a memory that can be read") as raised:
        load_memory(file)
    assert "\n" not in str(raised.value)


def test_bases_that_differ_are_refused():
    shape = (4, 5, 3)
    rng = np.random.default_rng(5)
    bases = [Pixels(), Cosine(), *(KarhunenLoeve.of(rng.random((9, *shape))) for _ in range(2))]
    for i, basis in enumerate(bases):
        memory, _ = Memory.empty(2, basis).insert(some(crowd(basis, shape), 0))
        for j, other in enumerate(bases):
            certificates = crowd(other, shape, count=3)
            for held in (Memory.empty(2, basis), memory):
                if i == j:
                    assert len(held.insert_batch(certificates)[0]) == len(held) + 3
                    continue
                with pytest.raises(ValueError, match=r"this memory holds regions in the basis .*, got one in"):
                    held.insert_batch(certificates)
                with pytest.raises(ValueError, match=r"this memory holds regions in the basis .*, got one in"):
                    held.insert(some(certificates, 0))


def test_a_memory_of_norm_1_has_no_regions_in_a_basis():
    with pytest.raises(ValueError, match="this memory holds regions of the l1 norm, got one of the l2 norm"):
        Memory.empty(1, Cosine()).insert_batch(crowd(*CASES[0], count=3))


def test_classify_refuses_what_is_no_input_of_the_memory():
    memory = filled(*CASES[0])[1]
    with pytest.raises(ValueError, match=r"this memory holds inputs of shape \[4, 5, 3\], got \[4, 4, 1\]"):
        memory.classify(np.zeros((4, 4, 1)), nobody)
    assert jax.tree.structure(memory.regions) == jax.tree.structure(Region(0, 0, 0, 2, Cosine()))
