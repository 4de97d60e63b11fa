import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancer_jax import GaussianL2, UniformL1, from_function, load_bundled, load_dataset
from ancer_jax.leakage import LeakageConfig, leakage, make_references, reference_classes, soft_leakage
from ancer_jax.smoothing import Stage, probs_of_each
from tests import reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEYS = jax.random.split(jax.random.key(0), 12)
IMAGES = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
ELSEWHERE = np.full(3, 9, np.float32)
START = np.full(3, 0.3, np.float32)
WIDE = np.float32([0.1, 2.0, 0.3])
SIZES = {"num_samples": 9, "chunk": 9}

static = functools.partial(jax.jit, static_argnames=("certificate", "num_samples", "chunk"))
leakage, make_references, reference_classes = map(static, (leakage, make_references, reference_classes))
soft_leakage = jax.jit(soft_leakage, static_argnames=("certificate", "batch"))


def largest_logits(threshold, x):
    """Class of the largest coordinate; NaN where the first one exceeds the threshold."""
    return jnp.where(x[:, :1] > threshold, jnp.nan, x)


def largest(threshold=np.inf):
    return from_function(largest_logits, np.float32(threshold), num_classes=3)


def loud_logits(_, x):
    """Class 1 iff the first coordinate is positive or the second one far from 0, whatever the rest."""
    score = jnp.maximum(x[:, 0], jnp.abs(x[:, 1]) - 1)
    return jnp.stack([-score, score], axis=-1)


LARGEST, LOUD = largest(), from_function(loud_logits, (), num_classes=2)


def references(classifier=LARGEST, images=IMAGES, theta=START):
    return make_references(KEYS, classifier, GaussianL2(), images, theta, **SIZES)


def measure(shared, theta, c, *, classifier=LARGEST, x=ELSEWHERE):
    return leakage(shared, classifier, GaussianL2(), x, np.float32(theta), np.int32(c), **SIZES)


def measure_softly(key, shared, theta, c, *, batch=100):
    return soft_leakage(key, shared, LARGEST, GaussianL2(), ELSEWHERE, jnp.asarray(theta), np.int32(c), batch=batch)


def naive_classes(classifier, theta):
    keys = [jax.random.fold_in(key, Stage.LEAKAGE) for key in KEYS]
    counts = [
        reference.counts_one_by_one(key, classifier, GaussianL2(), image, theta, SIZES["num_samples"])
        for key, image in zip(keys, IMAGES, strict=True)
    ]
    return np.array([c.argmax() if c.any() else -1 for c in counts])


def test_counts_are_those_of_a_naive_loop():
    classifier = largest(threshold=0.5)
    before, after = naive_classes(classifier, START), naive_classes(classifier, WIDE)
    assert set(before) == {-1, 0, 1, 2}
    assert (before != after).any()
    shared = references(classifier)
    np.testing.assert_array_equal(shared.classes, before)
    assert shared.classes.dtype == jnp.int32
    for c in range(3):
        leaked, eligible = measure(shared, WIDE, c, classifier=classifier)
        assert leaked == ((before != c) & (after == c)).sum()
        assert eligible == (before != c).sum()
        assert leaked.dtype == eligible.dtype == jnp.int32


def test_nothing_leaks_at_the_starting_theta():
    for c in range(3):
        leaked, eligible = measure(references(), START, c)
        assert leaked == 0
        assert eligible == (references().classes != c).sum() > 0


def test_nothing_leaks_at_the_starting_theta_of_a_network_in_a_batch():
    bundled, images = load_bundled("l2"), load_dataset("fashion-mnist-subset").images[:12]
    shared = make_references(KEYS, bundled.classifier, GaussianL2(), images, bundled.theta, **SIZES)
    assert len(np.unique(shared.classes)) > 3
    one = lambda x, theta, c: leakage(shared, bundled.classifier, GaussianL2(), x, theta, c, **SIZES)
    leaked, eligible = jax.vmap(one)(images[:4], jnp.full(4, bundled.theta), jnp.arange(4))
    assert (leaked == 0).all()
    assert (eligible > 6).all()


def test_everything_leaks_where_the_noise_decides_the_class():
    shared = references(LOUD, IMAGES * np.float32([1, 0.1, 1]))
    eligible = (shared.classes == 0).sum()
    assert eligible > 3
    assert measure(shared, [0.3, 50, 0.3], 1, classifier=LOUD) == (eligible, eligible)
    assert measure(shared, [0.3, 0.3, 50], 1, classifier=LOUD) == (0, eligible)


def test_the_input_itself_and_its_duplicates_are_no_references():
    images = IMAGES.copy()
    images[7] = images[3]
    shared = references(images=images)
    c = (shared.classes[3] + 1) % 3
    everywhere = np.array(measure(shared, [50, 50, 50], c))
    classes = references(images=images, theta=np.full(3, 50, np.float32)).classes
    leaked = (classes[np.array([3, 7])] == c).sum()
    np.testing.assert_array_equal(everywhere - np.array(measure(shared, [50, 50, 50], c, x=images[3])), [leaked, 2])
    nearly = images[3] * np.float32([1, 1, 1.0001])
    np.testing.assert_array_equal(measure(shared, [50, 50, 50], c, x=nearly), everywhere)


def test_nothing_leaks_to_an_abstention_and_nothing_from_nan():
    assert measure(references(), [50, 50, 50], -1) == (0, 0)
    classifier = largest(threshold=-np.inf)
    shared = references(classifier)
    np.testing.assert_array_equal(shared.classes, -1)
    assert measure(shared, [50, 50, 50], -1, classifier=classifier) == (0, 0)
    assert measure(shared, [50, 50, 50], 0, classifier=classifier) == (0, 12)


@pytest.mark.parametrize("chunk", [4, 50])
def test_chunk_changes_no_class(chunk):
    classes = reference_classes(KEYS, LARGEST, GaussianL2(), IMAGES, WIDE, num_samples=9, chunk=chunk)
    np.testing.assert_array_equal(classes, references(theta=WIDE).classes)


def test_vmap_is_a_loop_over_inputs():
    shared = references()
    thetas = np.float32([[0.1, 2, 0.3], [3, 0.1, 0.1], [1, 1, 1], [0.2, 0.2, 4]])
    arguments = (IMAGES[:4], thetas, np.int32([1, 0, -1, 2]))
    one = lambda x, theta, c: leakage(shared, LARGEST, GaussianL2(), x, theta, c, **SIZES)
    batched = np.stack(jax.vmap(one)(*arguments), axis=1)
    np.testing.assert_array_equal(batched, [one(*row) for row in zip(*arguments, strict=True)])
    assert len(np.unique(batched[:, 0])) > 1


def test_probs_of_each_are_those_of_one_draw_each():
    probs = probs_of_each(KEYS[0], LARGEST, UniformL1(), IMAGES, WIDE)
    keys = [jax.random.fold_in(KEYS[0], i) for i in range(len(IMAGES))]
    noisy = IMAGES + np.stack([UniformL1().sample(key, jnp.asarray(WIDE)) for key in keys])
    np.testing.assert_allclose(probs, jax.nn.softmax(LARGEST(noisy)), rtol=1e-5)


def test_soft_leakage_is_the_mean_over_eligible_references():
    """With hardly any noise each reference has a probability of its own."""
    shared, still = references(), np.full(3, 1e-6, np.float32)
    eligible = np.asarray(shared.classes != 2)
    probs = np.asarray(jax.nn.softmax(IMAGES, axis=-1))[eligible, 2]
    assert measure_softly(KEYS[0], shared, still, 2) == pytest.approx(probs.mean(), rel=1e-4)
    singles = [measure_softly(key, shared, still, 2, batch=1) for key in jax.random.split(KEYS[1], 60)]
    distances = abs(np.array(singles)[:, None] - probs)
    assert distances.min(axis=1).max() < 1e-4, "an ineligible one was drawn"
    assert distances.min(axis=0).max() < 1e-4, "one is never drawn"


def test_soft_leakage_where_no_reference_is_eligible_is_nothing():
    shared = references()._replace(classes=jnp.ones(12, jnp.int32))
    assert measure_softly(KEYS[0], shared, WIDE, 0) > 0
    assert measure_softly(KEYS[0], shared, WIDE, 1) == measure_softly(KEYS[0], shared, WIDE, -1) == 0


def test_soft_leakage_has_the_gradient_of_finite_differences():
    value = lambda theta: measure_softly(KEYS[0], references(), theta, 1)
    theta, step = jnp.array([0.5, 0.7, 0.4]), 1e-2 * jnp.eye(3)
    differences = [(value(theta + s) - value(theta - s)) / 2e-2 for s in step]
    gradient = jax.grad(value)(theta)
    np.testing.assert_allclose(gradient, differences, atol=1e-3)
    assert jnp.abs(gradient).max() > 1e-2


@pytest.mark.parametrize("name", ["num_references", "num_samples"])
def test_settings_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        LeakageConfig(**{name: 0})


def test_an_input_of_another_shape_is_refused():
    flat, text = np.zeros(2, np.float32), r"x must have the references' shape \[3\], got \[2\]"
    with pytest.raises(ValueError, match=text):
        measure(references(), START, 1, x=flat)
    with pytest.raises(ValueError, match=text):
        soft_leakage(KEYS[0], references(), LARGEST, GaussianL2(), flat, START, 1, batch=5)
