import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancer_jax import Gaussian, Smoothed, Uniform, from_function, load_bundled, load_dataset
from ancer_jax.search.leakage import leakage, leakage_penalty, make_probes, smoothed_classes, soft_leakage
from ancer_jax.smoothing import ABSTAIN
from ancer_jax.smoothing.smoothed import Stage, probs_of_each
from tests import reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEYS = jax.random.split(jax.random.key(0), 12)
IMAGES = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
ELSEWHERE = np.full(3, 9, np.float32)
START = np.full(3, 0.3, np.float32)
WIDE = np.float32([0.1, 2.0, 0.3])
SIZES = {"num_samples": 9, "chunk": 9}

leakage_penalty = jax.jit(leakage_penalty, static_argnames="batch")


def largest_logits(threshold, x):
    """Class of the largest coordinate; NaN where the first one exceeds the threshold."""
    return jnp.where(x[:, :1] > threshold, jnp.nan, x)


def largest(threshold=np.inf):
    return Smoothed(from_function(largest_logits, np.float32(threshold), num_classes=3), Gaussian(), START)


def loud_logits(_, x):
    """Class 1 iff the first coordinate is positive or the second one is far from 0; the third one is ignored."""
    score = jnp.maximum(x[:, 0], jnp.abs(x[:, 1]) - 1)
    return jnp.stack([-score, score], axis=-1)


LARGEST = largest()
LOUD = Smoothed(from_function(loud_logits, (), num_classes=2), Gaussian(), START)


def probes_of(smoothed=LARGEST, images=IMAGES):
    return make_probes(KEYS, smoothed, images, **SIZES)


def measure(probes, theta, c, *, smoothed=LARGEST, x=ELSEWHERE):
    return leakage(probes, smoothed.with_theta(np.float32(theta)), x, np.int32(c), chunk=9)


def measure_softly(key, probes, theta, c, *, batch=100):
    return leakage_penalty(key, probes, LARGEST.with_theta(jnp.asarray(theta)), ELSEWHERE, np.int32(c), batch=batch)


def naive_counts(smoothed, theta, stage=Stage.LEAKAGE):
    keys = [jax.random.fold_in(key, stage) for key in KEYS]
    return [
        reference.counts_one_by_one(key, smoothed.with_theta(theta), image, SIZES["num_samples"])
        for key, image in zip(keys, IMAGES, strict=True)
    ]


def naive_classes(smoothed, theta):
    return np.array([c.argmax() if c.any() else -1 for c in naive_counts(smoothed, theta)])


def test_counts_are_those_of_a_naive_loop():
    smoothed = largest(threshold=0.5)
    before, after = naive_classes(smoothed, START), naive_classes(smoothed, WIDE)
    assert set(before) == {-1, 0, 1, 2}
    assert (before != after).any()
    probes = probes_of(smoothed)
    np.testing.assert_array_equal(probes.classes, before)
    assert probes.classes.dtype == jnp.int32
    for c in range(3):
        num_leaked, num_eligible = measure(probes, WIDE, c, smoothed=smoothed)
        assert num_leaked == ((before != c) & (after == c)).sum()
        assert num_eligible == (before != c).sum()
        assert num_leaked.dtype == num_eligible.dtype == jnp.int32


def test_soft_leakage_counts_single_votes_under_draws_of_its_own():
    smoothed = largest(threshold=0.5)
    probes, wide = probes_of(smoothed), smoothed.with_theta(np.float32(WIDE))
    counts = np.array(naive_counts(smoothed, WIDE, Stage.SOFT_LEAKAGE))
    assert (counts != naive_counts(smoothed, WIDE)).any()
    soft = lambda c: soft_leakage(
        probes, wide, ELSEWHERE, np.int32(c), num_samples=SIZES["num_samples"], chunk=SIZES["chunk"]
    )
    for c in range(3):
        eligible = np.asarray(probes.classes) != c
        assert soft(c) == (counts[eligible, c].sum(), eligible.sum() * SIZES["num_samples"])
    assert soft(ABSTAIN) == (0, 0)


def test_leakage_of_another_theta_compiles_nothing_again(compilations):
    measure(probes_of(), WIDE, 1)
    before = compilations()
    measure(probes_of(), 2 * WIDE, 2)
    assert compilations() == before


def test_nothing_leaks_at_the_starting_theta():
    for c in range(3):
        num_leaked, num_eligible = measure(probes_of(), START, c)
        assert num_leaked == 0
        assert num_eligible == (probes_of().classes != c).sum() > 0


def test_nothing_leaks_at_the_starting_theta_of_a_network_in_a_batch():
    bundled, images = load_bundled("fashion-mnist-cnn-l2-0.25"), load_dataset("fashion-mnist-subset").images[:12]
    smoothed = Smoothed(bundled.classifier, Gaussian(), bundled.theta)
    probes = probes_of(smoothed, images)
    assert len(np.unique(probes.classes)) > 3
    one = lambda x, theta, c: leakage(probes, smoothed.with_theta(theta), x, c, chunk=9)
    num_leaked, num_eligible = jax.vmap(one)(images[:4], jnp.full(4, bundled.theta), jnp.arange(4))
    assert (num_leaked == 0).all()
    assert (num_eligible > 6).all()


def test_everything_leaks_where_the_noise_decides_the_class():
    probes = probes_of(LOUD, IMAGES * np.float32([1, 0.1, 1]))
    num_eligible = (probes.classes == 0).sum()
    assert num_eligible > 3
    assert measure(probes, [0.3, 50, 0.3], 1, smoothed=LOUD) == (num_eligible, num_eligible)
    assert measure(probes, [0.3, 0.3, 50], 1, smoothed=LOUD) == (0, num_eligible)


def test_the_input_itself_and_its_duplicates_are_not_eligible():
    images = IMAGES.copy()
    images[7] = images[3]
    probes = probes_of(images=images)
    c = (probes.classes[3] + 1) % 3
    everywhere = np.array(measure(probes, [50, 50, 50], c))
    classes = probes_of(LARGEST.with_theta(np.full(3, 50, np.float32)), images).classes
    num_leaked = (classes[np.array([3, 7])] == c).sum()
    without = np.array(measure(probes, [50, 50, 50], c, x=images[3]))
    np.testing.assert_array_equal(everywhere - without, [num_leaked, 2])
    nearly = images[3] * np.float32([1, 1, 1.0001])
    np.testing.assert_array_equal(measure(probes, [50, 50, 50], c, x=nearly), everywhere)


def test_nothing_leaks_to_an_abstention_and_nothing_from_nan():
    assert measure(probes_of(), [50, 50, 50], -1) == (0, 0)
    smoothed = largest(threshold=-np.inf)
    probes = probes_of(smoothed)
    np.testing.assert_array_equal(probes.classes, -1)
    assert measure(probes, [50, 50, 50], -1, smoothed=smoothed) == (0, 0)
    assert measure(probes, [50, 50, 50], 0, smoothed=smoothed) == (0, 12)


@pytest.mark.parametrize("chunk", [4, 50])
def test_chunk_changes_no_class(chunk):
    wide = LARGEST.with_theta(WIDE)
    classes = smoothed_classes(KEYS, wide, IMAGES, num_samples=9, chunk=chunk)
    np.testing.assert_array_equal(classes, probes_of(wide).classes)


def test_vmap_is_a_loop_over_inputs():
    probes = probes_of()
    thetas = np.float32([[0.1, 2, 0.3], [3, 0.1, 0.1], [1, 1, 1], [0.2, 0.2, 4]])
    arguments = (IMAGES[:4], thetas, np.int32([1, 0, -1, 2]))
    one = lambda x, theta, c: leakage(probes, LARGEST.with_theta(theta), x, c, chunk=9)
    batched = np.stack(jax.vmap(one)(*arguments), axis=1)
    np.testing.assert_array_equal(batched, [one(*row) for row in zip(*arguments, strict=True)])
    assert len(np.unique(batched[:, 0])) > 1


def test_probs_of_each_are_those_of_one_draw_each():
    noise = Uniform()
    probs = probs_of_each(KEYS[0], Smoothed(LARGEST.classifier, noise, WIDE), IMAGES)
    keys = [jax.random.fold_in(KEYS[0], i) for i in range(len(IMAGES))]
    noisy = IMAGES + np.stack([noise.sample(key, jnp.asarray(WIDE)) for key in keys])
    np.testing.assert_allclose(probs, jax.nn.softmax(LARGEST.classifier(noisy)), rtol=1e-5)


def test_leakage_penalty_is_the_mean_over_eligible_probes():
    """With hardly any noise each probe has a probability of its own."""
    probes, still = probes_of(), np.full(3, 1e-6, np.float32)
    eligible = np.asarray(probes.classes != 2)
    probs = np.asarray(jax.nn.softmax(IMAGES, axis=-1))[eligible, 2]
    assert measure_softly(KEYS[0], probes, still, 2) == pytest.approx(probs.mean(), rel=1e-4)
    singles = [measure_softly(key, probes, still, 2, batch=1) for key in jax.random.split(KEYS[1], 60)]
    distances = abs(np.array(singles)[:, None] - probs)
    assert distances.min(axis=1).max() < 1e-4, "a probe that is not eligible was drawn"
    assert distances.min(axis=0).max() < 1e-4, "an eligible probe is never drawn"


def test_leakage_penalty_is_zero_where_no_probe_is_eligible():
    probes = dataclasses.replace(probes_of(), classes=jnp.ones(12, jnp.int32))
    assert measure_softly(KEYS[0], probes, WIDE, 0) > 0
    assert measure_softly(KEYS[0], probes, WIDE, 1) == measure_softly(KEYS[0], probes, WIDE, -1) == 0


def test_leakage_penalty_has_the_gradient_of_finite_differences():
    value = lambda theta: measure_softly(KEYS[0], probes_of(), theta, 1)
    theta, step = jnp.array([0.5, 0.7, 0.4]), 1e-2 * jnp.eye(3)
    differences = [(value(theta + s) - value(theta - s)) / 2e-2 for s in step]
    gradient = jax.grad(value)(theta)
    np.testing.assert_allclose(gradient, differences, atol=1e-3)
    assert jnp.abs(gradient).max() > 1e-2


def test_an_input_of_another_shape_is_refused():
    flat, text = np.zeros(2, np.float32), r"x must have the leakage probes' shape \[3\], got \[2\]"
    with pytest.raises(ValueError, match=text):
        measure(probes_of(), START, 1, x=flat)
    with pytest.raises(ValueError, match=text):
        leakage_penalty(KEYS[0], probes_of(), LARGEST, flat, 1, batch=5)
