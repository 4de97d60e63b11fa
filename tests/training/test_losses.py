"""The losses are the equations of their papers, computed naively in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from ancer_jax import Gaussian, Uniform
from ancer_jax.training import losses

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(5, 4)) * 2


def softmax(logits):
    return scipy.special.softmax(np.asarray(logits, np.float64), axis=-1)


@pytest.mark.parametrize("label", range(4))
def test_losses_are_the_equations_of_their_papers(label):
    probs = softmax(LOGITS)
    mean = probs.mean(axis=0)
    entropy = lambda p: -(p * np.log(p)).sum(axis=-1)
    crossed = -np.log(probs[:, label]).mean()
    np.testing.assert_allclose(losses.augmentation(jnp.array(LOGITS), label), crossed, rtol=1e-5)
    divergence = (mean * (np.log(mean) - np.log(probs))).sum(axis=1).mean()
    value = losses.consistency(jnp.array(LOGITS), label, weight=3.0, entropy_weight=0.25)
    np.testing.assert_allclose(value, crossed + 3 * divergence + 0.25 * entropy(mean), rtol=1e-5)
    divergence = (probs[0] * (np.log(probs[0]) - np.log(probs[1:]))).sum(axis=1).mean()
    value = losses.stability(jnp.array(LOGITS), label, weight=2.0)
    np.testing.assert_allclose(value, -np.log(probs[0, label]) + 2 * divergence, rtol=1e-5)
    np.testing.assert_allclose(losses.smoothed_loss(jnp.array(LOGITS), label), -np.log(mean[label]), rtol=1e-5)


def naive_macer(logits, label, theta, *, weight=12.0, inverse_temperature=16.0, margin=8.0):
    value = -np.log(softmax(logits).mean(axis=0)[label])
    sharp = softmax(inverse_temperature * np.asarray(logits)).mean(axis=0)
    second, first = np.sort(sharp)[-2:]
    xi = scipy.stats.norm.ppf(first) - scipy.stats.norm.ppf(second)
    if sharp.argmax() == label and xi <= margin:
        value += weight * theta / 2 * (margin - xi)
    return value


@pytest.mark.parametrize("label", range(4))
def test_macer_is_its_equation(label):
    value = losses.macer(jnp.array(LOGITS), label, 0.5)
    np.testing.assert_allclose(value, naive_macer(LOGITS, label, 0.5), rtol=1e-4)


@functools.partial(jax.jit, static_argnames=("noise", "weight"))
def volume_and_slope(noise, logits, label, weight):
    loss = lambda logits: losses.volume(logits, label, 0.5, noise, weight=weight, inverse_temperature=2.0)
    return jax.value_and_grad(loss)(logits)


@pytest.mark.parametrize("noise", [Gaussian(), Uniform()])
@pytest.mark.parametrize("label", range(4))
def test_volume_is_its_equation(label, noise):
    logits, m = np.add(LOGITS, [4, 0, 0, 0]), len(LOGITS)
    share = softmax(2.0 * logits).mean(axis=0)[label]
    p_lower = scipy.stats.beta.ppf(0.5, share * m, m - share * m + 1)
    radius = 0.5 * max(0.0, scipy.stats.norm.ppf(p_lower) if noise.norm == 2 else 2 * p_lower - 1)
    assert (radius > 0) == (label == 0)
    value, slope = volume_and_slope(noise, jnp.array(logits), label, 3.0)
    expected = -np.log(softmax(logits).mean(axis=0)[label]) - 3 * radius
    assert -1e-5 < value - expected < 5.5e-3  # the traced bound is a little smaller
    _, without = volume_and_slope(noise, jnp.array(logits), label, 0.0)
    assert np.allclose(slope, without) == (label != 0)  # the radius has no slope where nothing is certified


def test_losses_of_confident_logits_are_finite_and_macer_has_no_second_term():
    """One class has probability 1: its radius is infinite, and cannot grow."""
    sure = jnp.array([[50.0, 0.0, 0.0]] * 4)
    value, gradient = jax.value_and_grad(losses.macer)(sure, 0, 0.5)
    assert value == pytest.approx(0, abs=1e-6) and np.isfinite(gradient).all()
    value, gradient = jax.value_and_grad(losses.volume)(sure, 0, 0.5, Gaussian())
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_the_attack_stays_in_its_ball_and_finds_the_worst_point_of_a_linear_classifier():
    weights = jnp.array(RNG.normal(size=(6, 3)))
    x, noise = jnp.full(6, 0.5), jnp.array(RNG.normal(size=(8, 6)) * 0.1)
    apply = lambda y: y @ weights[:, :2]
    found = losses.smoothadv_attack(apply, x, 0, noise, epsilon=0.2, steps=20)
    away = weights[:, 1] - weights[:, 0]
    np.testing.assert_allclose(found, x + 0.2 * away / jnp.linalg.norm(away), atol=1e-3)
    assert np.linalg.norm(found - x) <= 0.2 + 1e-6
    large = losses.smoothadv_attack(apply, x, 0, noise, epsilon=5.0, steps=20)
    assert large.min() >= 0 and large.max() <= 1
    np.testing.assert_array_equal(losses.smoothadv_attack(apply, x, 0, noise, epsilon=0.0, steps=3), x)
