import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from ancer_jax import GaussianL2, SplittingL1, UniformL1
from ancer_jax.certificates import CERTIFICATES, Certificate

THETA = np.array([0.1, 1.0, 7.0], np.float32)


@pytest.mark.parametrize(
    ("certificate", "law"), [(GaussianL2(), scipy.stats.norm()), (UniformL1(), scipy.stats.uniform(-1, 2))]
)
def test_law_of_the_noise(certificate, law):
    keys = jax.random.split(jax.random.key(0), 20_000)
    noise = np.asarray(jax.vmap(lambda key: certificate.sample(key, jnp.asarray(THETA)))(keys))
    assert noise.shape == (20_000, 3)
    for i, theta in enumerate(THETA):
        assert scipy.stats.kstest(noise[:, i] / theta, law.cdf).pvalue > 1e-3
        for wrong in (2 / 3, 3 / 2):
            assert scipy.stats.kstest(noise[:, i] / theta * wrong, law.cdf).pvalue < 1e-9
    assert abs(scipy.stats.spearmanr(noise[:, 0], noise[:, 1]).statistic) < 0.03


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float32, np.float64])
@pytest.mark.parametrize(
    ("certificate", "law"), [(GaussianL2(), scipy.stats.norm()), (UniformL1(), scipy.stats.uniform(-1, 2))]
)
def test_noise_has_the_same_law_whatever_type_x_and_theta_have(certificate, law, dtype):
    """A normal draw in bfloat16 would have 128 values at most, none of them beyond 2.5."""
    with jax.enable_x64(dtype is np.float64):
        x, theta = jnp.full(50, 0.5, dtype), jnp.full(50, 0.25, dtype)
        key = jax.random.key(0)
        noisy = jax.vmap(lambda draw: certificate.perturb(key, draw, x, theta))(jnp.arange(2000))
        assert noisy.dtype == (jnp.float64 if dtype is np.float64 else jnp.float32)
        noise = (np.asarray(noisy, np.float64).ravel() - 0.5) / 0.25
    assert scipy.stats.kstest(noise, law.cdf).pvalue > 1e-3
    assert len(np.unique(noise)) > 90_000
    assert abs(noise).max() > law.ppf(1 - 1e-3)


def test_splitting_noise_has_the_same_law_whatever_type_x_has():
    key, theta = jax.random.key(0), jnp.full(50, 0.3, jnp.bfloat16)
    copies = jax.vmap(lambda draw: SplittingL1().perturb(key, draw, jnp.full(50, 0.5, jnp.bfloat16), theta))
    assert len(np.unique(copies(jnp.arange(2000)))) > 50_000


def exact_gap(certificate, p, p_b):
    with mpmath.workdps(40):
        p, p_b = mpmath.mpf(float(p)), 1 - mpmath.mpf(float(p)) if p_b is None else mpmath.mpf(float(p_b))
        if certificate.norm == 1:
            return p - p_b
        quantile = lambda q: mpmath.sqrt(2) * mpmath.erfinv(2 * q - 1)
        return (quantile(p) - quantile(p_b)) / 2


@pytest.mark.parametrize("certificate", CERTIFICATES.values())
@given(p=st.floats(0.501, 1 - 1e-9), share=st.none() | st.floats(0.01, 1))
def test_gap_is_the_formula_rounded_down(certificate, p, share):
    p_b = None if share is None else (1 - p) * share
    exact, gap = exact_gap(certificate, p, p_b), certificate.gap(p, p_b)
    assert gap.dtype == np.float64
    assert gap <= exact
    assert gap == pytest.approx(float(exact), rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("certificate", CERTIFICATES.values())
def test_traced_gap_is_below_the_gap_on_the_host(certificate):
    p = np.concatenate([np.linspace(0.5, 1, 4001)[:-1], 1 - np.geomspace(1e-7, 0.5, 2000)]).astype(np.float32)
    traced = np.float64(jax.jit(certificate.gap)(jnp.asarray(p)))
    host = certificate.gap(np.float64(p))
    assert (traced <= host).all()
    np.testing.assert_allclose(traced, host, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("certificate", CERTIFICATES.values())
def test_nothing_is_certified_at_one_half_or_below(certificate):
    for p in (0.0, 0.3, 0.5, np.nan):
        assert certificate.gap(p) == 0
        assert certificate.gap(jnp.float32(p)) == 0
    assert certificate.gap(0.4, 0.4) == 0
    assert certificate.gap(0.4, 0.2) > 0


def test_largest_gaps_of_the_usual_settings():
    p = 0.001 ** (1 / 100_000)
    assert GaussianL2().gap(p) == pytest.approx(3.811, abs=1e-3)
    assert UniformL1().gap(p) == pytest.approx(0.99986, abs=1e-5)


def test_proxy_gap_of_known_probabilities():
    probs = jnp.array([0.1, 0.7, 0.2])
    assert UniformL1().proxy_gap(probs) == pytest.approx(0.5)
    expected = (scipy.stats.norm.ppf(0.7) - scipy.stats.norm.ppf(0.2)) / 2
    assert GaussianL2().proxy_gap(probs) == pytest.approx(expected, rel=1e-5)
    certain = GaussianL2().proxy_gap(jnp.array([1.0, 0.0]))
    assert certain == pytest.approx(scipy.stats.norm.ppf(0.999), rel=1e-4)
    gradient = jax.grad(GaussianL2().proxy_gap)(probs)
    assert gradient[1] > 0 > gradient[2]
    assert gradient[0] == 0


def test_certificates_are_static_arguments():
    for certificate in CERTIFICATES.values():
        assert isinstance(certificate, Certificate)
        assert hash(certificate) == hash(type(certificate)())
        assert certificate == type(certificate)()
