"""Derivatives of estimated regions against closed forms: linear classifiers, whose class probabilities are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from ancer_jax import Gaussian, Smoothed, Uniform, devices
from ancer_jax.differentiable import EstimateConfig, estimated_region, vote_share
from ancer_jax.smoothing.smoothed import Stage, class_counts, stage_key
from tests import reference
from tests.differentiable.closed_form import (
    ALPHA,
    CLASSIFIER,
    KEYS,
    RNG,
    SMOOTHED,
    THETA,
    THETA32,
    X32,
    B,
    D,
    W,
    X,
    differences,
    gap_of,
    gap_slope,
    means,
    probability,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def config(num_samples, **settings):
    return EstimateConfig(num_samples=num_samples, alpha=ALPHA, **settings)


@pytest.mark.parametrize("chunk", [7, 100, 1000])
def test_the_share_is_that_of_the_counts(chunk):
    counts = class_counts(KEYS[0], SMOOTHED, X32, num_samples=100, chunk=100)
    share = vote_share(KEYS[0], SMOOTHED, X32, 1, num_samples=100, chunk=chunk)
    assert float(share) == pytest.approx(int(counts[1]) / 100, abs=1e-7)
    nan = Smoothed(reference.linear(W * np.nan), Gaussian(), THETA32)
    assert vote_share(KEYS[0], nan, X32, 1, num_samples=10, chunk=chunk) == 0


def test_derivatives_of_votes_are_unbiased_and_the_control_variate_reduces_their_variance():
    def share(x, theta, key):
        return vote_share(key, SMOOTHED.with_theta(theta), x, 1, num_samples=100, chunk=64)

    in_x, in_theta = jax.jit(jax.vmap(jax.grad(share, (0, 1)), (None, None, 0)))(X32, THETA32, KEYS)
    for found, exact in (
        (in_x, differences(lambda x: probability(x, THETA), X)),
        (in_theta, differences(lambda theta: probability(X, theta), THETA)),
    ):
        mean, error = means(found)
        assert (abs(mean - exact) < 5 * error + 1e-6).all()
        assert np.linalg.norm(mean - exact) < 0.1 * np.linalg.norm(exact)
    draws = jax.vmap(
        lambda key: jax.vmap(lambda i: Gaussian().sample(jax.random.fold_in(key, i), jnp.asarray(THETA32)))(
            jnp.arange(100)
        )
    )
    noise = np.asarray(draws(KEYS), np.float64)
    votes = ((X + noise) @ W + B > 0).astype(float)
    plain = (votes[..., None] * noise / THETA**2).mean(1)
    assert np.asarray(in_x).std(0).sum() < 0.6 * plain.std(0).sum()
    centred = (votes - votes.mean(1, keepdims=True))[..., None] * noise / THETA**2
    np.testing.assert_allclose(in_x, centred.sum(1) / 99, rtol=1e-3, atol=1e-4)


def test_the_derivative_in_a_scalar_theta_is_the_sum_of_the_derivatives():
    share = lambda theta: vote_share(KEYS[0], SMOOTHED.with_theta(theta), X32, 1, num_samples=50, chunk=64)
    whole = jax.grad(share)(jnp.full(D, 0.4))
    assert float(jax.grad(share)(jnp.float32(0.4))) == pytest.approx(float(whole.sum()), rel=1e-4)


def test_the_soft_estimate_has_small_bias_for_steep_logits_only():
    """With steep logits the softmax is nearly the vote; with flat ones it is another function, and so is its slope."""
    slope = differences(lambda x: probability(x, THETA), X) * gap_slope(probability(X, THETA), 2000)

    @jax.jit
    def gradients(classifier):
        smoothed = Smoothed(classifier, Gaussian(), THETA32)
        gradient = jax.grad(lambda x, key: estimated_region(key, smoothed, x, 1, config=config(2000)).gap)
        return jax.vmap(gradient, (None, 0))(X32, KEYS[:20])

    def relative_bias(steepness):
        mean, _ = means(gradients(reference.linear(W * steepness, B * steepness)))
        return np.linalg.norm(mean - slope) / np.linalg.norm(slope)

    assert relative_bias(20.0) < 0.05 < 0.3 < relative_bias(1.0)


@pytest.mark.parametrize("kind", ["votes", "soft"])
def test_sizes_have_the_derivatives_of_their_closed_forms(kind):
    n, sizes = 2000, ("radius", "proxy_radius", "log_volume")

    def exact(x, theta):
        gap = gap_of(probability(x, theta), n)
        volume = D * np.log(gap) + D / 2 * np.log(np.pi) - scipy.special.gammaln(D / 2 + 1) + np.log(theta).sum()
        return np.array([gap * theta.min(), gap * np.exp(np.log(theta).mean()), volume])

    classifier = reference.linear(20 * W, 20 * B) if kind == "soft" else CLASSIFIER

    def found(x, theta, key):
        smoothed = Smoothed(classifier, Gaussian(), theta)
        region = estimated_region(key, smoothed, x, 1, config=config(n, kind=kind, chunk=1000))
        values = jnp.stack([getattr(region, size) for size in sizes])
        return values, values

    slopes_and_values = jax.jit(jax.vmap(jax.jacrev(found, (0, 1), has_aux=True), (None, None, 0)))
    (in_x, in_theta), values = slopes_and_values(X32, THETA32, KEYS[:50])
    for i, size in enumerate(sizes):
        slack = 0.2 if size == "log_volume" else 0
        assert float(values[:, i].mean()) == pytest.approx(exact(X, THETA)[i], rel=0.02, abs=slack), size
        for derivative, expected in (
            (in_x, differences(lambda x: exact(x, THETA), X)),
            (in_theta, differences(lambda theta: exact(X, theta), THETA)),
        ):
            (mean, error), exactly = means(derivative[:, i]), expected[:, i]
            assert np.linalg.norm(mean - exactly) < 0.05 * np.linalg.norm(exactly) + 4 * np.linalg.norm(error), size


def test_the_soft_estimate_can_be_differentiated_in_the_network():
    """d/db of Phi((w x + b) / s) is the normal density over s."""
    scale = 20.0

    def gap(b, key):
        classifier = reference.linear(scale * W)
        variables = classifier.variables | {"b": scale * b}
        moved = classifier.__class__(classifier.apply, variables, classifier.num_classes)
        return estimated_region(key, Smoothed(moved, Gaussian(), THETA32), X32, 1, config=config(5000)).gap

    found = np.mean(jax.jit(jax.vmap(jax.grad(gap), (None, 0)))(jnp.float32(B), KEYS[:50]))
    p, s = probability(X, THETA), np.linalg.norm(W * THETA)
    exact = gap_slope(p, 5000) * scipy.stats.norm.pdf(scipy.special.ndtri(p)) / s
    assert found == pytest.approx(exact, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["votes", "soft"])
def test_jit_vmap_grad_jvp_and_many_devices_agree(kind):
    images = jnp.asarray(X32 + RNG.normal(size=(8, D)).astype(np.float32) * 0.05)

    def size(key, x):
        return estimated_region(key, SMOOTHED, x, 1, config=config(200, kind=kind)).proxy_radius

    gradient = jax.jit(jax.grad(size, 1))
    one = [gradient(key, x) for key, x in zip(KEYS, images, strict=False)]
    many = jax.jit(jax.vmap(jax.grad(size, 1)))
    np.testing.assert_allclose(many(KEYS[:8], images), one, rtol=1e-4, atol=1e-5)
    mesh = devices.device_mesh(8)
    np.testing.assert_allclose(many(*devices.shard_rows((KEYS[:8], images), mesh)), one, rtol=1e-4, atol=1e-5)
    direction = jnp.asarray(RNG.normal(size=D), jnp.float32)
    _, slope = jax.jit(lambda x: jax.jvp(functools.partial(size, KEYS[0]), (x,), (direction,)))(images[0])
    assert float(slope) == pytest.approx(float(one[0] @ direction), rel=1e-3)


@functools.partial(jax.jit, static_argnames="kind")
def size_and_slopes(classifier, label, kind):
    def size(x, theta):
        smoothed = Smoothed(classifier, Gaussian(), theta)
        region = estimated_region(KEYS[0], smoothed, x, label, config=config(100, kind=kind))
        return region.radius + region.proxy_radius

    return jax.value_and_grad(size, (0, 1))(X32, THETA32)


@pytest.mark.parametrize("kind", ["votes", "soft"])
def test_the_derivatives_are_zero_where_nothing_is_certified(kind):
    value, gradients = size_and_slopes(CLASSIFIER, 0, kind)
    assert value == 0 and not np.any(gradients)


def test_derivatives_are_finite_where_every_draw_has_the_class():
    value, gradients = size_and_slopes(reference.linear(W, 1e3), 1, "soft")
    assert value > 0 and np.isfinite(gradients).all()


def test_an_estimate_draws_by_a_stage_key_of_its_own():
    """So that its draws are those of no certificate."""
    found = jax.jit(lambda x: estimated_region(KEYS[0], SMOOTHED, x, 1, config=config(100, kind="votes")))(X32)
    share = vote_share(stage_key(KEYS[0], Stage.DIFFERENTIABLE), SMOOTHED, X32, 1, num_samples=100, chunk=9)
    lower = scipy.stats.beta.ppf(ALPHA, 100 * float(share), 101 - 100 * float(share))
    assert float(found.gap) == pytest.approx(scipy.special.ndtri(lower), rel=0.02)


def test_uniform_noise_has_the_soft_estimate_only():
    smoothed = Smoothed(CLASSIFIER, Uniform(), THETA32)
    assert estimated_region(KEYS[0], smoothed, X32, 1, config=config(100)).norm == 1
    with pytest.raises(ValueError, match=r"Gaussian noise only, got Uniform\(\): use the soft estimate"):
        estimated_region(KEYS[0], smoothed, X32, 1, config=config(100, kind="votes"))


def test_votes_need_two_draws():
    with pytest.raises(ValueError, match="num_samples must be at least 2, got 1"):
        vote_share(KEYS[0], SMOOTHED, X32, 1, num_samples=1, chunk=1)


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_that_is_no_class_is_refused(label):
    with pytest.raises(ValueError, match=rf"labels must be in 0\.\.1, got {label} to {label}"):
        estimated_region(KEYS[0], SMOOTHED, X32, label, config=config(10))
