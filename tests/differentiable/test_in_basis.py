"""Estimates and attacks under coloured noise: against closed forms of linear classifiers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancer_jax import CertifyConfig, Gaussian, Region, Smoothed, certify
from ancer_jax.basis import Cosine, KarhunenLoeve, Pixels
from ancer_jax.differentiable import EstimateConfig, attack, estimated_region, vote_share
from ancer_jax.smoothing.smoothed import class_counts
from tests import reference
from tests.differentiable.closed_form import ALPHA, KEYS, differences, gap_of, means, probability

pytestmark = pytest.mark.usefixtures("quick_compilation")

# A linear classifier of 2 x 3 gray pixels, which gives class 1 the probability Phi(1.3) = 0.90.
SHAPE, BASIS = (2, 3, 1), Cosine()
WHOLE = functools.reduce(np.kron, BASIS.matrices(SHAPE))
RNG = np.random.default_rng(0)
W, X, THETA = RNG.normal(size=6), RNG.normal(size=6), RNG.uniform(0.3, 0.6, 6)
B = -float(W @ X) + 1.3 * np.linalg.norm(THETA * (WHOLE @ W))
X32, THETA32 = (np.float32(value).reshape(SHAPE) for value in (X, THETA))
SMOOTHED = Smoothed(reference.linear(W, B), Gaussian(BASIS), THETA32)


def share_of(x, theta):
    """The probability of class 1, of an input x [6]."""
    return probability(WHOLE @ x, theta, WHOLE @ W, B)


def margin(y):
    """How far y is on the side of class 1, in units of the exact region: its boundary is 0, the input is at 1.3."""
    return (W @ np.float64(y).ravel() + B) / np.linalg.norm(THETA * (WHOLE @ W))


def flat(gradients):
    return np.asarray(gradients, np.float64).reshape(len(gradients), -1)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_the_share_is_that_of_the_counts(chunk):
    counts = class_counts(KEYS[0], SMOOTHED, X32, num_samples=100, chunk=100)
    share = vote_share(KEYS[0], SMOOTHED, X32, 1, num_samples=100, chunk=chunk)
    assert float(share) == pytest.approx(int(counts[1]) / 100, abs=1e-7)


def test_derivatives_of_votes_are_those_of_the_closed_form():
    def share(x, theta, key):
        return vote_share(key, SMOOTHED.with_theta(theta), x, 1, num_samples=100, chunk=64)

    in_x, in_theta = jax.jit(jax.vmap(jax.grad(share, (0, 1)), (None, None, 0)))(X32, THETA32, KEYS)
    assert in_x.shape == in_theta.shape == (len(KEYS), *SHAPE)
    for found, exact in (
        (in_x, differences(lambda x: share_of(x, THETA), X)),
        (in_theta, differences(lambda theta: share_of(X, theta), THETA)),
    ):
        mean, error = means(flat(found))
        assert (abs(mean - exact) < 5 * error + 1e-6).all()
        assert np.linalg.norm(mean - exact) < 0.1 * np.linalg.norm(exact)


def test_the_derivative_in_a_scalar_theta_is_the_sum_of_the_derivatives():
    share = lambda theta: vote_share(KEYS[0], SMOOTHED.with_theta(theta), X32, 1, num_samples=50, chunk=64)
    whole = jax.grad(share)(jnp.full(SHAPE, 0.4))
    assert float(jax.grad(share)(jnp.float32(0.4))) == pytest.approx(float(whole.sum()), rel=1e-4)


@pytest.mark.parametrize("kind", ["votes", "soft"])
def test_sizes_have_the_derivatives_of_their_closed_forms(kind):
    n = 2000
    exact = lambda x, theta: gap_of(share_of(x, theta), n) * np.exp(np.log(theta).mean())
    classifier = reference.linear(20 * W, 20 * B) if kind == "soft" else SMOOTHED.classifier
    config = EstimateConfig(n, ALPHA, kind=kind, chunk=1000)

    def found(x, theta, key):
        smoothed = Smoothed(classifier, Gaussian(BASIS), theta)
        return estimated_region(key, smoothed, x, 1, config=config).proxy_radius

    value_and_grad = jax.jit(jax.vmap(jax.value_and_grad(found, (0, 1)), (None, None, 0)))
    values, (in_x, in_theta) = value_and_grad(X32, THETA32, KEYS[:50])
    assert float(values.mean()) == pytest.approx(exact(X, THETA), rel=0.03)
    for derivative, expected in (
        (in_x, differences(lambda x: exact(x, THETA), X)),
        (in_theta, differences(lambda theta: exact(X, theta), THETA)),
    ):
        mean, error = means(flat(derivative))
        assert np.linalg.norm(mean - expected) < 0.05 * np.linalg.norm(expected) + 4 * np.linalg.norm(error)


@pytest.mark.parametrize("kind", ["votes", "soft"])
@pytest.mark.parametrize("basis", [Cosine(), KarhunenLoeve.of(RNG.random((9, *SHAPE))), Pixels()], ids=repr)
def test_an_estimated_region_has_the_basis_of_the_noise(kind, basis):
    smoothed = dataclasses.replace(SMOOTHED, noise=Gaussian(basis))
    region = jax.jit(lambda x: estimated_region(KEYS[0], smoothed, x, 1, config=EstimateConfig(100, ALPHA, kind=kind)))(
        X32
    )
    assert region.basis == basis and region.norm == 2
    np.testing.assert_array_equal(region.center, X32)
    np.testing.assert_array_equal(region.theta, THETA32)


find = jax.jit(lambda smoothed, region, key: attack(key, smoothed, region, 1, steps=20, num_samples=100))
rough = jax.jit(jax.vmap(lambda s, r, key: attack(key, s, r, 1, steps=5, num_samples=4), (None, None, 0)))
STEEP = Smoothed(reference.linear(4 * W, 4 * B), Gaussian(BASIS), THETA32)


def test_an_attack_reaches_the_boundary_of_a_linear_classifier_and_not_beyond_the_region():
    for gap in (0.65, 1.29, 1.56):
        region = Region(X32, THETA32, np.float32(gap), 2, BASIS)
        y = find(STEEP, region, KEYS[3])
        assert region.contains(y)
        assert margin(y) == pytest.approx(1.3 - gap, abs=0.02 * gap)
        answer = class_counts(KEYS[4], STEEP, y, num_samples=10_000, chunk=1000).argmax()
        assert answer == (gap < 1.3)
    y = find(STEEP, Region(X32, THETA32, np.float32(0), 2, BASIS), KEYS[3])
    np.testing.assert_array_equal(y, X32)


def test_an_attack_stays_on_its_side_in_a_certified_region_but_not_in_one_of_twice_its_gap():
    certified = certify(KEYS[0], STEEP, X32, config=CertifyConfig(n=5000)).region
    assert certified.basis == BASIS and 1.1 < certified.gap < 1.3
    doubled = dataclasses.replace(certified, gap=2 * certified.gap)
    for key in KEYS[:10]:
        y = find(STEEP, certified, key)
        assert certified.contains(y)
        assert margin(y) > 0
        y = find(STEEP, doubled, key)
        assert doubled.contains(y) and not certified.contains(y)
        assert margin(y) < 0


@pytest.mark.parametrize("shape", [(4, 5, 3), (28, 28, 1)], ids=str)
@pytest.mark.parametrize("basis", [Cosine, KarhunenLoeve], ids=lambda kind: kind.name)
def test_an_attack_stays_inside_a_region_of_any_size_and_shape(basis, shape):
    """Of thetas that differ by a factor of 16, where the slack of rounding is largest."""
    rng = np.random.default_rng(1)
    basis = KarhunenLoeve.of(rng.random((40, *shape))) if basis is KarhunenLoeve else basis()
    w, center = rng.normal(size=int(np.prod(shape))), np.float32(rng.uniform(size=shape))
    classifier = reference.linear(w, 5.0)
    for low, high in ((0.25, 0.25), (0.1, 1.6)):
        theta = np.exp(rng.uniform(np.log(low), np.log(high), shape)).astype(np.float32)
        theta.flat[:2] = low, high
        smoothed = Smoothed(classifier, Gaussian(basis), theta)
        moved = []
        for gap in (0.0, 1e-6, 1e-3, 0.03, 1.0, 30.0, 1e4):
            region = Region(center, theta, np.float32(gap), 2, basis)
            ys = np.asarray(rough(smoothed, region, KEYS[:5]))
            assert all(region.contains(y) for y in ys)
            z = np.asarray(basis.coefficients(np.float64(ys) - center)) / theta
            moved.append(np.sqrt((z**2).sum((1, 2, 3))).min() / (gap or 1.0))
        # In the larger regions one step is enough: there the class has no probability any more, and no gradient.
        assert moved[3] > 0.8 and moved[4] > 0.95 and min(moved[5:]) > 0.45


@pytest.mark.parametrize("gap", [1e-4, 0.1, 10.0])
@pytest.mark.parametrize("theta_min", [1e-2, 1e-4])
def test_an_attack_stays_inside_where_one_theta_is_tiny(theta_min, gap):
    """The rounding of all pixels is then much in units of that theta."""
    rng, shape = np.random.default_rng(2), (28, 28, 1)
    theta = np.ones(shape, np.float32)
    theta[0, 0, 0] = theta_min
    smoothed = Smoothed(reference.linear(rng.normal(size=784), 5.0), Gaussian(BASIS), theta)
    center = rng.uniform(size=shape).astype(np.float32)
    center[0, 0, 0] = 0
    region = Region(center, theta, np.float32(gap), 2, BASIS)
    ys = np.asarray(rough(smoothed, region, KEYS[:20]))
    assert all(region.contains(y) for y in ys)
    if gap == 10 and theta_min == 1e-2:  # of small gaps rounding takes all
        assert not any(dataclasses.replace(region, gap=0.4 * gap).contains(y) for y in ys)


def test_an_attack_on_a_constant_classifier_stays_at_the_center():
    constant = dataclasses.replace(STEEP, classifier=reference.linear(0 * W, 1.0))
    y = find(constant, Region(X32, THETA32, np.float32(2), 2, BASIS), KEYS[0])
    np.testing.assert_array_equal(y, X32)


def test_a_region_in_another_basis_is_refused():
    other = KarhunenLoeve.of(RNG.random((9, *SHAPE)))
    for basis in (Pixels(), other):
        region = Region(X32, THETA32, np.float32(1), 2, basis)
        with pytest.raises(ValueError, match=r"the region is in the basis .*, the noise in Cosine\(\)"):
            attack(KEYS[0], SMOOTHED, region, 1)
    with pytest.raises(ValueError, match=r"the region is in the basis Cosine\(\), the noise in Pixels\(\)"):
        in_pixels = dataclasses.replace(SMOOTHED, noise=Gaussian())
        attack(KEYS[0], in_pixels, Region(X32, THETA32, np.float32(1), 2, BASIS), 1)
