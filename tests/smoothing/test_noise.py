"""Noise laws: what they draw, the gaps they certify, and what every noise answers about itself."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from ancer_jax.smoothing import (
    ABSTAIN,
    NOISES,
    Gaussian,
    Noise,
    Smoothed,
    Splitting,
    Uniform,
    from_function,
    make_noise,
)
from ancer_jax.smoothing.certificate import certificate_from_evidence, enumerated_evidence
from ancer_jax.smoothing.registry import DEFAULT_NOISE
from ancer_jax.smoothing.smoothed import class_counts_between
from tests.toy import KEY, Coins

THETA = np.array([0.1, 1.0, 7.0], np.float32)
ADDITIVE = [(Gaussian(), scipy.stats.norm()), (Uniform(), scipy.stats.uniform(-1, 2))]
ENUMERABLE = [Splitting(exact=True), Splitting(exact=True, levels=4, seed=7, period=24), Coins()]
of_each_norm = pytest.mark.parametrize("noise", [Gaussian(), Uniform()])
ROUND = {noise: jax.jit(noise.admissible) for noise in ENUMERABLE}
of_each_noise = pytest.mark.parametrize("noise", [*NOISES.values(), *ENUMERABLE], ids=str)


@pytest.mark.parametrize(("noise", "law"), ADDITIVE)
def test_law_of_the_noise(noise, law):
    keys = jax.random.split(jax.random.key(0), 20_000)
    samples = np.asarray(jax.vmap(lambda key: noise.sample(key, jnp.asarray(THETA)))(keys))
    assert samples.shape == (20_000, 3)
    for i, theta in enumerate(THETA):
        assert scipy.stats.kstest(samples[:, i] / theta, law.cdf).pvalue > 1e-3
        for wrong in (2 / 3, 3 / 2):
            assert scipy.stats.kstest(samples[:, i] / theta * wrong, law.cdf).pvalue < 1e-9
    assert abs(scipy.stats.spearmanr(samples[:, 0], samples[:, 1]).statistic) < 0.03


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float32, np.float64])
@pytest.mark.parametrize(("noise", "law"), ADDITIVE)
def test_noise_has_the_same_law_whatever_type_x_and_theta_have(noise, law, dtype):
    """A normal draw in bfloat16 would have 128 values at most, none of them beyond 2.5."""
    with jax.enable_x64(dtype is np.float64):
        x, theta = jnp.full(50, 0.5, dtype), jnp.full(50, 0.25, dtype)
        key = jax.random.key(0)
        noisy = jax.vmap(lambda draw: noise.perturb(key, draw, x, theta))(jnp.arange(2000))
        assert noisy.dtype == (jnp.float64 if dtype is np.float64 else jnp.float32)
        samples = (np.asarray(noisy, np.float64).ravel() - 0.5) / 0.25
    assert scipy.stats.kstest(samples, law.cdf).pvalue > 1e-3
    assert len(np.unique(samples)) > 90_000
    assert abs(samples).max() > law.ppf(1 - 1e-3)


def exact_gap(noise, p, p_b):
    with mpmath.workdps(40):
        p, p_b = mpmath.mpf(float(p)), 1 - mpmath.mpf(float(p)) if p_b is None else mpmath.mpf(float(p_b))
        if noise.norm == 1:
            return p - p_b
        quantile = lambda q: mpmath.sqrt(2) * mpmath.erfinv(2 * q - 1)
        return (quantile(p) - quantile(p_b)) / 2


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
@given(p=st.floats(0.501, 1 - 1e-9), share=st.none() | st.floats(0.01, 1))
def test_gap_is_the_formula_rounded_down(noise, p, share):
    check_gap(noise, p, None if share is None else (1 - p) * share)


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
@given(exponent=st.floats(-9, -0.302), share=st.floats(0.01, 0.99))
def test_gap_of_rare_classes_is_the_formula_rounded_down(noise, exponent, share):
    check_gap(noise, 10**exponent, share * 10**exponent)


def check_gap(noise, p, p_b):
    exact, gap = exact_gap(noise, p, p_b), noise.gap(p, p_b)
    assert gap.dtype == np.float64
    assert gap <= exact
    assert gap == pytest.approx(float(exact), rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_traced_gap_is_below_the_gap_on_the_host(noise):
    p = np.concatenate([np.linspace(0.5, 1, 4001)[:-1], 1 - np.geomspace(1e-7, 0.5, 2000)]).astype(np.float32)
    traced = np.float64(jax.jit(noise.gap)(jnp.asarray(p)))
    host = noise.gap(np.float64(p))
    assert (traced <= host).all()
    np.testing.assert_allclose(traced, host, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_nothing_is_certified_at_one_half_or_below(noise):
    for p in (0.0, 0.3, 0.5, np.nan):
        assert noise.gap(p) == 0
        assert noise.gap(jnp.float32(p)) == 0
    assert noise.gap(0.4, 0.4) == 0
    assert noise.gap(0.4, 0.2) > 0


def test_largest_gaps_of_the_usual_settings():
    p = 0.001 ** (1 / 100_000)
    assert Gaussian().gap(p) == pytest.approx(3.811, abs=1e-3)
    assert Uniform().gap(p) == pytest.approx(0.99986, abs=1e-5)


def test_proxy_gap_of_known_probabilities():
    probs, proxy_gap = jnp.array([0.1, 0.7, 0.2]), jax.jit(Gaussian().proxy_gap)
    assert Uniform().proxy_gap(probs) == pytest.approx(0.5)
    expected = (scipy.stats.norm.ppf(0.7) - scipy.stats.norm.ppf(0.2)) / 2
    assert proxy_gap(probs) == pytest.approx(expected, rel=1e-5)
    assert proxy_gap(jnp.array([1.0, 0.0])) == pytest.approx(scipy.stats.norm.ppf(0.999), rel=1e-4)
    gradient = jax.jit(jax.grad(Gaussian().proxy_gap))(probs)
    assert gradient[1] > 0 > gradient[2]
    assert gradient[0] == 0


@of_each_noise
def test_a_noise_is_a_static_argument(noise):
    again = type(noise)(**vars(noise))
    assert isinstance(noise, Noise)
    assert noise == again and hash(noise) == hash(again)
    assert not any(isinstance(value, jax.Array | np.ndarray) for value in vars(noise).values())


@of_each_noise
def test_a_noise_for_search_has_random_draws_in_the_same_norm(noise):
    searched = noise.for_search
    assert searched.num_draws(np.float32(0.5)) is None
    assert searched.norm == noise.norm
    assert searched.for_search == searched
    assert not searched.enumerable
    assert noise.enumerable == (noise in ENUMERABLE)
    if not noise.enumerable:
        assert searched == noise


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
@pytest.mark.parametrize("theta", [np.float32(0.3), np.float32([[0.2, 0.7], [1e-6, 30.0]])], ids=["scalar", "map"])
def test_random_noise_certifies_with_any_theta_and_says_something_of_any_input(noise, theta):
    assert noise.num_draws(theta) is None
    np.testing.assert_array_equal(noise.admissible(theta), theta)
    assert noise.check_inputs(np.float32([[0.1234567, -3.0], [1e9, 0.5]]), np.arange(2)) is None


@of_each_norm
def test_random_noise_has_no_gap_of_all_draws(noise):
    with pytest.raises(NotImplementedError, match="has random draws: use gap"):
        noise.exact_gap(np.array(5), np.array(2), np.array(10))


@pytest.mark.parametrize("noise", ENUMERABLE, ids=str)
@given(values=st.lists(st.floats(2.0**-20, 4, width=32), min_size=1, max_size=4), scalar=st.booleans())
def test_enumerable_noise_certifies_with_a_theta_rounded_down(noise, values, scalar):
    theta = np.float32(values[0]) if scalar else np.float32(values)
    found = np.asarray(noise.admissible(theta))
    assert found.shape == theta.shape and found.dtype == np.float32
    np.testing.assert_array_equal(noise.admissible(found), found)
    traced = np.asarray(ROUND[noise](theta))
    np.testing.assert_allclose(traced, found, rtol=2e-7)
    assert noise.num_draws(traced) == noise.num_draws(found)
    least = np.asarray(noise.admissible(np.float32(1e-9)))  # a smaller theta is raised to the least one there is
    assert (found <= np.maximum(theta * (1 + 1e-2), least)).all()
    draws = noise.num_draws(found)
    assert isinstance(draws, int) and draws >= 1
    if isinstance(noise, Splitting) and not scalar:
        assert noise.period % draws == 0


@pytest.mark.parametrize("noise", ENUMERABLE, ids=str)
@pytest.mark.parametrize("theta", [0.5, [0.25, 0.5, 0.5], [0.5, 0.75, 1.0]], ids=str)
def test_draws_of_enumerable_noise_need_no_key_and_stay_the_same(noise, theta):
    theta = np.asarray(noise.admissible(np.float32(theta)))
    draws, x = jnp.arange(noise.num_draws(theta)), jnp.float32([0.25, 0.5, 1.0])
    copy = jax.jit(jax.vmap(lambda key, i: noise.perturb(key, i, x, jnp.broadcast_to(theta, x.shape)), (None, 0)))
    copies = [copy(key, draws) for key in (KEY, jax.random.key(1))]
    np.testing.assert_array_equal(*copies)
    assert len(np.unique(copies[0], axis=0)) > 1


@pytest.mark.parametrize(
    ("noise", "wrong", "text"),
    [
        (Splitting(exact=True), 0.3, r"pixels of image 9 are not multiples of 1/255"),
        (Splitting(exact=True, levels=4), 1 / 255, r"pixels of image 9 are not multiples of 1/4"),
        (Coins(), 1.5, "not for image 9"),
    ],
)
def test_enumerable_noise_refuses_inputs_that_it_says_nothing_of_by_their_id(noise, wrong, text):
    images, ids = np.zeros((3, 2, 2, 1), np.float32), np.array([4, 9, 11])
    images[:, 0] = 1.0
    assert noise.check_inputs(images, ids) is None
    images[1:, 1, 1] = wrong
    with pytest.raises(ValueError, match=text):
        noise.check_inputs(images, ids)


def stripes(variables, x):
    """Class by the gray value of a copy, in many narrow stripes: as hard for a certificate as can be."""
    return jax.nn.one_hot((jnp.floor(x.mean(axis=1) * variables) % 3).astype(int), 3)


@pytest.mark.parametrize("theta", [0.5, [0.25, 0.5, 0.5], [1.0, 0.25, 0.75]], ids=str)
@pytest.mark.parametrize("frequency", [1.3, 3.1, 5.3])
def test_the_toy_noise_certifies_what_holds(theta, frequency):
    """Every one of many points inside a certified region has the class of its center."""
    noise, rng = Coins(), np.random.default_rng(0)
    smoothed = Smoothed(from_function(stripes, np.float32(frequency), num_classes=3), noise, np.float32(theta))
    np.testing.assert_array_equal(noise.admissible(smoothed.theta), smoothed.theta)
    draws = noise.num_draws(smoothed.theta)
    points = rng.random((3_000, 3)).astype(np.float32)
    points[1::2] = points[::2] + rng.normal(scale=0.05, size=(1_500, 3))
    points = np.clip(points, 0, 1)
    count = lambda x: class_counts_between(KEY, smoothed, x, (0, draws), steps=1, chunk=draws)
    votes = np.asarray(jax.jit(jax.vmap(count))(points))
    assert (votes.sum(axis=1) == draws).all()
    counted = enumerated_evidence(votes, np.full(len(votes), draws))
    certificates = certificate_from_evidence(*counted, smoothed, points, alpha=0.0)
    neighbours = 0
    for x, prediction, gap in zip(points, certificates.prediction, certificates.gap, strict=True):
        inside = (abs(points - x) / smoothed.theta).sum(axis=1) <= gap
        assert prediction == ABSTAIN or (votes.argmax(axis=1)[inside] == prediction).all()
        neighbours += inside.sum() - 1 if prediction != ABSTAIN else 0
    assert neighbours > 1_000


def test_noise_is_made_by_norm_and_name():
    assert make_noise("l2") == NOISES[DEFAULT_NOISE["l2"]] == Gaussian()
    assert make_noise("l1") == NOISES[DEFAULT_NOISE["l1"]] == Uniform()
    assert make_noise("l1", "splitting") == Splitting()
    exact = make_noise("l1", "splitting", exact=True, period=840)
    assert exact == Splitting(exact=True, period=840)
    assert all(make_noise(f"l{noise.norm}", name) == noise for name, noise in NOISES.items())


@pytest.mark.parametrize(
    ("norm", "name", "text"),
    [
        ("l2", "splitting", "noise for l2 must be one of gaussian, got 'splitting'"),
        ("l1", "gaussian", "noise for l1 must be one of uniform, splitting, got 'gaussian'"),
        ("l1", "laplace", "noise for l1 must be one of uniform, splitting, got 'laplace'"),
    ],
)
def test_noise_that_does_not_certify_in_this_norm_is_refused(norm, name, text):
    with pytest.raises(ValueError, match=text):
        make_noise(norm, name)
