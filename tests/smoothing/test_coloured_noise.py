"""Gaussian noise in a basis: its law, certificates of linear classifiers, which are known, and settings of runs."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from ancer_jax import RunConfig
from ancer_jax.basis import Cosine, KarhunenLoeve, Pixels
from ancer_jax.runs.config import Method
from ancer_jax.smoothing import (
    ABSTAIN,
    CertifyConfig,
    Gaussian,
    Smoothed,
    Uniform,
    certificate_from_votes,
    certify,
    certify_batch,
    count_votes,
    make_noise,
    predict,
)
from ancer_jax.smoothing.smoothed import class_counts
from tests import geometry, reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

CASES = [
    (Cosine(), (4, 5, 3)),
    (KarhunenLoeve.of(np.random.default_rng(0).random((20, 4, 4, 1))), (4, 4, 1)),
]
each = pytest.mark.parametrize(("basis", "shape"), CASES, ids=lambda value: getattr(value, "name", str(value)))
each_basis = pytest.mark.parametrize("basis", [Cosine(), CASES[1][0]], ids=lambda basis: basis.name)
KEY = jax.random.key(0, impl="threefry2x32")


def matrix(basis, shape):
    """[d, d], from inputs to coefficients."""
    return functools.reduce(np.kron, basis.matrices(shape))


def problems(basis, shape, count, seed=0):
    """Linear classifiers, thetas and inputs of many images, float32, and the gap of each exact region, with a sign."""
    rng, d = np.random.default_rng(seed), math.prod(shape)
    w, theta = rng.normal(size=(count, d)), np.clip(rng.lognormal(-1, 0.7, (count, *shape)), 0.08, 2.4)
    x, gap = rng.normal(size=(count, *shape)), rng.uniform(0.2, 3, count) * rng.choice([-1, 1], count)
    spread = np.linalg.norm(theta.reshape(count, d) * (w @ matrix(basis, shape).T), axis=1)
    b = gap * spread - np.sum(w * x.reshape(count, d), axis=1)
    w, b, theta, x = (np.float32(value) for value in (w, b, theta, x))
    exact = (np.float64(w) * x.reshape(count, d)).sum(1) + b
    spread = np.linalg.norm(np.float64(theta).reshape(count, d) * (np.float64(w) @ matrix(basis, shape).T), axis=1)
    return (w, b, theta, x), exact / spread


def certify_all(basis, w, b, theta, x, config):
    linear = reference.linear(np.zeros(w.shape[1]))
    smoothed = Smoothed(dataclasses.replace(linear, variables={"w": w, "b": b}), Gaussian(basis), theta)

    def one(i, smoothed, x):
        return count_votes(jax.random.fold_in(KEY, i), smoothed, x, config=config, chunk=500)

    selected, count = jax.jit(jax.vmap(one))(jnp.arange(len(w)), smoothed, x)
    return certificate_from_votes(smoothed, x, selected, count, config=config)


@each
def test_regions_of_linear_classifiers_are_inside_the_exact_half_spaces(basis, shape):
    """The smoothed probability is Phi(margin / |theta B w|), and so is the largest gap."""
    (w, b, theta, x), gap = problems(basis, shape, 200)
    config = CertifyConfig(n0=50, n=1000, alpha=1e-4)
    result = certify_all(basis, w, b, theta, x, config)
    certified = result.prediction != ABSTAIN
    assert (result.prediction[certified] == (gap > 0)[certified]).all()
    assert (result.p_lower <= scipy.special.ndtr(np.where(result.prediction == 0, -gap, abs(gap)))).all()
    assert (result.gap <= abs(gap)).all()
    assert certified.mean() > 0.9 and np.median(result.gap[certified] / abs(gap[certified])) > 0.8
    assert result.region.basis == basis
    # The point of each region where the classifier is worst is on the right side.
    direction = theta.reshape(len(w), -1) ** 2 * (np.float64(w) @ matrix(basis, shape).T)
    length = np.linalg.norm(direction / theta.reshape(len(w), -1), axis=1)
    worst = x.reshape(len(w), -1) - (np.sign(gap) * result.gap / length)[:, None] * (direction @ matrix(basis, shape))
    assert ((np.sum(w * worst, axis=1) + b > 0) == (gap > 0)).all()
    inner = x.reshape(len(w), -1) + (worst - x.reshape(len(w), -1)) * (1 - 1e-9)
    for i in np.flatnonzero(certified)[:10]:
        assert result.region.contains(inner[i].reshape(shape))[i]
        assert not result.region.contains((2 * worst[i] - x[i].ravel()).reshape(shape))[i]


@each
def test_shares_of_votes_are_those_of_the_exact_law_and_of_no_other(basis, shape):
    (w, b, theta, x), gap = problems(basis, shape, 6, seed=1)
    count = jax.jit(lambda smoothed, x: class_counts(KEY, smoothed, x, num_samples=20_000, chunk=2000))
    for i in range(6):
        smoothed = Smoothed(reference.linear(w[i], b[i]), Gaussian(basis), theta[i])
        votes = int(count(smoothed, x[i])[1])
        p = scipy.special.ndtr(gap[i])
        assert scipy.stats.binomtest(votes, 20_000, p).pvalue > 1e-4
    in_pixels = gap * np.linalg.norm(theta.reshape(6, -1) * (w @ matrix(basis, shape).T), axis=1)
    in_pixels /= np.linalg.norm(theta.reshape(6, -1) * w, axis=1)
    assert abs(scipy.special.ndtr(in_pixels) - scipy.special.ndtr(gap)).max() > 0.02


def draws(noise, theta, count=40_000):
    keys = jax.random.split(KEY, count)
    samples = jax.jit(jax.vmap(lambda key: noise.sample(key, jnp.asarray(theta))))(keys)
    assert samples.dtype == jnp.float32 and samples.shape == (count, *np.shape(theta))
    return np.asarray(samples, np.float64).reshape(count, -1)


def assert_mean_and_covariance(samples, covariance):
    """Within six standard errors of each number."""
    count, variances = len(samples), np.diag(covariance)
    assert (abs(samples.mean(0)) < 6 * np.sqrt(variances / count)).all()
    error = np.sqrt((np.outer(variances, variances) + covariance**2) / count)
    assert (abs(samples.T @ samples / count - covariance) < 6 * error).all()


@pytest.mark.parametrize(
    "basis", [Cosine(), KarhunenLoeve.of(np.random.default_rng(1).random((9, 2, 3, 3)))], ids=lambda basis: basis.name
)
def test_the_covariance_of_the_noise(basis):
    shape = (2, 3, 3)
    theta = np.random.default_rng(2).uniform(0.2, 2, shape).astype(np.float32)
    whole, samples = matrix(basis, shape), draws(Gaussian(basis), theta)
    assert_mean_and_covariance(samples, whole.T @ np.diag(np.float64(theta.ravel()) ** 2) @ whole)
    for coefficient, scale in zip((samples @ whole.T).T, theta.ravel(), strict=True):
        assert scipy.stats.kstest(coefficient / scale, "norm").pvalue > 1e-3
    with pytest.raises(AssertionError):
        assert_mean_and_covariance(samples, np.diag(np.float64(theta.ravel()) ** 2))


@each
def test_with_one_theta_the_law_is_that_in_pixels(basis, shape):
    theta = np.full(shape, 0.5, np.float32)
    for noise in (Gaussian(basis), Gaussian()):
        assert_mean_and_covariance(draws(noise, theta, 20_000), 0.25 * np.eye(math.prod(shape)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@each
def test_coloured_noise_is_drawn_in_float32_at_least(basis, shape, dtype):
    theta, x = jnp.full(shape, 0.25, dtype), jnp.full(shape, 0.5, dtype)
    narrow = Gaussian(basis).perturb(KEY, 3, x, theta)
    assert narrow.dtype == jnp.float32
    np.testing.assert_array_equal(narrow, Gaussian(basis).perturb(KEY, 3, x.astype(jnp.float32), jnp.float32(theta)))


@each
def test_noise_in_pixels_is_what_it_was(basis, shape):
    theta = jnp.full(shape, 0.25)
    expected = theta * jax.random.normal(KEY, shape)
    np.testing.assert_array_equal(Gaussian().sample(KEY, theta), expected)
    np.testing.assert_array_equal(Gaussian(basis).sample(KEY, theta), basis.inputs(expected))


@each
@pytest.mark.parametrize("scalar", [True, False], ids=["one theta", "thetas"])
def test_the_region_of_float64_inputs_is_inside_that_certified_in_float32(basis, shape, scalar):
    rng = np.random.default_rng(3)
    for scale in (1.0, 100.0):
        x = rng.normal(scale=scale, size=shape)
        theta = np.float64(0.7) if scalar else np.clip(rng.lognormal(-1, 1, shape), 0.1, 3)
        smoothed = Smoothed(reference.constant([0, 1]), Gaussian(basis), theta)
        rounded = smoothed.with_theta(np.float32(theta))
        config = CertifyConfig(n0=10, n=500)
        result, certified = (
            certify(KEY, smoothed, x, config=config),
            certify(KEY, rounded, np.float32(x), config=config),
        )
        np.testing.assert_array_equal(result.region.center, x)
        np.testing.assert_array_equal(result.region.theta, theta)
        assert result.region.basis == certified.region.basis == basis
        assert result.prediction == certified.prediction == 1
        assert certified.gap * (1 - 1e-3) < result.gap < certified.gap
        inner, outer = result.region, certified.region
        whole, axes = matrix(basis, shape), lambda region: np.broadcast_to(np.float64(region.theta), shape).ravel()
        centers = (whole @ np.float64(region.center).ravel() for region in (inner, outer))
        a, b = centers
        beta = certified.gap * axes(outer)
        assert geometry.farthest(rng, a, axes(inner), result.gap, b, beta, 2) <= 1 + 1e-15
        for direction in geometry.rays_and_axes(rng, 50, a.size, 2):
            assert geometry.distance(a + result.gap * axes(inner) * direction, b, beta, 2) <= 1 + 1e-15


@each
def test_a_batch_is_certified_one_by_one(basis, shape):
    (w, b, theta, x), _ = problems(basis, shape, 3, seed=4)
    config, linear = CertifyConfig(n0=20, n=300), reference.linear(w[0], b[0])
    keys = [jax.random.fold_in(KEY, i) for i in range(3)]
    for thetas in (theta, theta[0], np.float32(0.3)):
        smoothed = Smoothed(linear, Gaussian(basis), thetas)
        each_theta = thetas if thetas.ndim == 4 else [thetas] * 3
        one_by_one = [
            certify(key, smoothed.with_theta(one), image, config=config)
            for key, one, image in zip(keys, each_theta, x, strict=True)
        ]
        reference.assert_same_certificates(certify_batch(KEY, smoothed, x, config=config), one_by_one)


def test_inputs_that_the_basis_is_not_of_are_refused():
    smoothed = Smoothed(reference.linear(np.ones(4)), Gaussian(Cosine()), 0.5)
    for function in (certify, predict):
        with pytest.raises(ValueError, match="the cosine basis is of images"):
            function(KEY, smoothed, np.zeros(4, np.float32))


@each_basis
def test_the_noise_has_its_basis(basis):
    noise = Gaussian(basis)
    assert noise == make_noise("l2", basis=basis) != Gaussian()
    assert noise.basis == noise.for_search.basis == basis and noise.norm == 2 and not noise.enumerable
    assert noise.gap(0.9) == pytest.approx(Gaussian().gap(0.9) * (1 - 2.0**-14), rel=1e-12)
    assert Gaussian().basis == Uniform().basis == Pixels() and Gaussian(Pixels()) == Gaussian()
    region = noise.region(np.zeros((4, 4, 1)), 0.5, 1.0)
    assert (region.theta, region.gap, region.norm, region.basis) == (0.5, 1.0, 2, basis)
    with pytest.raises(ValueError, match="noise for l1 is in pixels"):
        make_noise("l1", basis=basis)


@pytest.mark.parametrize("basis", [Cosine(), Pixels()], ids=["cosine", "pixels"])
def test_thetas_that_differ_too_much_are_refused_or_lowered(basis):
    theta = np.ones((2, 4, 4, 1), np.float32)
    theta[1, 0, 0] = 33
    noise, x = Gaussian(basis), np.zeros(theta.shape)
    lowered = noise.admissible(theta[1])
    assert lowered.max() == (33 if basis == Pixels() else 32) and noise.region(x[1], np.asarray(lowered), 1.0)
    if basis == Pixels():
        assert noise.region(x, theta, np.ones(2)).gap.shape == (2,)
        return
    with pytest.raises(ValueError, match="may differ by a factor of 32 at most, except in pixels; got 1 to 33"):
        noise.region(x, theta, np.ones(2))


def test_equal_noise_is_not_compiled_again():
    made = lambda seed: Gaussian(KarhunenLoeve.of(np.random.default_rng(seed).random((9, 4, 4, 1))))
    assert made(0) == made(0) != made(1) and hash(made(0)) == hash(made(0))
    assert len({Gaussian(), Gaussian(), Gaussian(Cosine()), Gaussian(Cosine()), made(0), made(0), made(1)}) == 4
    traced = []

    @jax.jit
    def function(smoothed, x):
        traced.append(smoothed.noise)
        return smoothed.noise.perturb(KEY, 0, x, smoothed.theta)

    linear = reference.linear(np.ones(16))
    for noise in (made(0), made(0), Gaussian(Cosine()), made(1), Gaussian(Cosine()), made(0)):
        function(Smoothed(linear, noise, jnp.ones((4, 4, 1))), jnp.ones((4, 4, 1)))
    assert traced == [made(0), Gaussian(Cosine()), made(1)]


@each_basis
@pytest.mark.parametrize("method", Method.__args__)
def test_settings_of_a_run_give_its_basis_back(basis, method):
    config = RunConfig(method=method, basis=basis)
    settings = json.loads(json.dumps(config.settings()))
    again = RunConfig.from_settings(settings)
    assert again == config and again.basis == basis and hash(again.basis) == hash(basis)
    assert settings["basis"]["name"] == basis.name
    assert again.certified_noise == Gaussian(basis) and again.settings() == config.settings()
    assert again != dataclasses.replace(config, basis=Pixels())


def test_settings_of_a_run_in_pixels_name_no_basis():
    for config in (RunConfig(), RunConfig(basis=Pixels()), RunConfig(norm="l1")):
        assert "basis" not in config.settings()
        assert RunConfig.from_settings(config.settings()).basis == Pixels()
        assert config.certified_noise in (Gaussian(), Uniform())


@pytest.mark.parametrize("change", [{}, {"noise": "uniform"}, {"noise": "splitting"}])
def test_l1_is_in_pixels_only(change):
    with pytest.raises(ValueError, match=r"noise for l1 is in pixels: Cosine\(\) does not preserve l1 distances"):
        RunConfig(norm="l1", basis=Cosine(), **change)


@pytest.mark.parametrize(
    ("basis", "text"),
    [
        ({"name": "wavelet"}, "there is no basis 'wavelet'"),
        ({}, "not the description of a basis"),
        ({"name": "karhunen-loeve", "rows": "?"}, "not the description of a basis"),
        ("cosine", "not the settings of a run"),
    ],
)
def test_settings_with_a_damaged_basis_are_refused(basis, text):
    with pytest.raises(ValueError, match=text):
        RunConfig.from_settings(RunConfig(basis=Cosine()).settings() | {"basis": basis})
