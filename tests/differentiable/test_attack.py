import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancer_jax import Gaussian, Region, Smoothed, Uniform, from_function
from ancer_jax.differentiable import attack
from ancer_jax.smoothing.smoothed import class_counts
from tests import reference
from tests.differentiable.closed_form import CLASSIFIER, KEYS, RNG, SMOOTHED, THETA, THETA32, X32, B, D, W, X

pytestmark = pytest.mark.usefixtures("quick_compilation")


def region_of(gap, norm=2):
    return Region(X32, THETA32, np.float32(gap), norm)


@pytest.mark.parametrize("norm", [2, 1])
def test_an_attack_reaches_the_boundary_of_a_linear_classifier_and_not_beyond_the_region(norm):
    """Under Gaussian noise the boundary is at gap 1.3; under uniform noise f(y) = 1[y_2 > t] has it where y_2 = t."""
    if norm == 2:
        smoothed, w, boundary = Smoothed(reference.linear(4 * W, 4 * B), Gaussian(), THETA32), W, 1.3
    else:
        w, boundary = np.eye(D)[2], 0.6
        classifier = reference.linear(40 * w, -40 * (X[2] - boundary * THETA[2]))
        smoothed = Smoothed(classifier, Uniform(), THETA32)
    side = lambda y: w @ (np.asarray(y, np.float64) - X) / (np.linalg.norm(w * THETA) if norm == 2 else THETA[2])
    find = jax.jit(lambda region, key: attack(key, smoothed, region, 1, steps=20, num_samples=100))
    for gap in (0.5 * boundary, 0.99 * boundary, 1.2 * boundary):
        region = region_of(gap, norm)
        y = find(region, KEYS[3])
        assert region.contains(y)
        assert side(y) == pytest.approx(-gap, rel=0.02)  # the worst point of the region, on its surface
        answer = class_counts(KEYS[4], smoothed, y, num_samples=10_000, chunk=1000).argmax()
        assert answer == (gap < boundary)
    np.testing.assert_array_equal(find(region_of(0, norm), KEYS[3]), X32)


def test_an_attack_on_another_region_compiles_nothing_again(compilations):
    find = lambda gap: attack(KEYS[3], SMOOTHED, region_of(gap), 1, steps=2, num_samples=3)
    find(0.5)
    before = compilations()
    find(0.7)
    assert compilations() == before


rough = jax.jit(jax.vmap(lambda s, r, key: attack(key, s, r, 1, steps=5, num_samples=4), (None, None, 0)))


@pytest.mark.parametrize("norm", [2, 1])
@pytest.mark.parametrize("gap", [1e-6, 1e-3, 0.03, 1.0])
def test_an_attack_stays_inside_a_region_of_any_size(norm, gap):
    """Of many pixels, whose distances are sums that are rounded."""
    w, center = RNG.normal(size=784), np.float32(RNG.uniform(size=784))
    theta = np.full(784, 0.25, np.float32)
    smoothed = Smoothed(reference.linear(w, 5.0), Gaussian() if norm == 2 else Uniform(), theta)
    region = Region(center, theta, np.float32(gap), norm)
    assert all(region.contains(y) for y in np.asarray(rough(smoothed, region, KEYS[:10])))


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_that_is_no_class_is_refused(label):
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.1"):
        attack(KEYS[0], SMOOTHED, region_of(1), label)


def test_a_region_of_another_norm_is_refused():
    with pytest.raises(ValueError, match="the region is of norm 2, the noise certifies norm 1"):
        attack(KEYS[0], Smoothed(CLASSIFIER, Uniform(), THETA32), region_of(1), 1)


def test_an_attack_on_a_constant_classifier_stays_at_the_center():
    constant = Smoothed(reference.linear(0 * W, 1.0), Gaussian(), THETA32)
    y = attack(KEYS[0], constant, region_of(2), 1, steps=3, num_samples=4)
    np.testing.assert_array_equal(y, X32)


def ridge_logits(_, y):
    """The margin of class 1 grows with y_0, but falls steeply to the right of a narrow ridge at 0."""
    margin = y[:, 0] + 3 * jnp.exp(-((y[:, 0] / 0.1) ** 2) / 2)
    return jnp.stack([jnp.zeros_like(margin), margin], axis=-1)


@pytest.mark.parametrize(("theta", "end"), [(0.01, 0.09), (2.0, 0.01)])
def test_the_noise_has_the_theta_of_the_smoothed_classifier_not_that_of_the_region(theta, end):
    """Narrow noise sees the slope of the ridge, wide noise that of everything else: they lead to opposite ends."""
    smoothed = Smoothed(from_function(ridge_logits, (), num_classes=2), Gaussian(), np.float32(theta))
    region = Region(np.float32([0.05]), np.float32(1), np.float32(0.04), 2)
    y = attack(KEYS[3], smoothed, region, 1, steps=5, num_samples=5000)
    np.testing.assert_allclose(y, [end], atol=1e-4)
