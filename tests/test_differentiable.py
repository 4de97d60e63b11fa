"""Derivatives of estimated regions against closed forms: linear classifiers, whose class probabilities are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from ancer_jax import Classifier, GaussianL2, UniformL1, log_volume, parallel, proxy_radius, radius
from ancer_jax.differentiable import attack, estimated_region, learn_theta, vote_share
from ancer_jax.regions import Region, contains
from ancer_jax.smoothing import Stage, class_counts, stage_key
from tests import reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
D, ALPHA = 6, 0.001
W, X, THETA = RNG.normal(size=D), RNG.normal(size=D), RNG.uniform(0.3, 0.6, D)
B = -float(W @ X) + 1.3 * np.linalg.norm(W * THETA)  # the class is 1 with probability Phi(1.3) = 0.90
CLASSIFIER, L2 = reference.linear(W, B), GaussianL2()
KEY = lambda seed: jax.random.key(seed, impl="threefry2x32")
KEYS = jax.vmap(lambda i: jax.random.fold_in(KEY(0), i))(jnp.arange(400))
X32, THETA32 = X.astype(np.float32), THETA.astype(np.float32)


def probability(x, theta, w=W, b=B):
    return scipy.special.ndtr((w @ x + b) / np.linalg.norm(w * theta))


def differences(function, at, step=1e-6):
    """Central finite differences, float64."""
    return np.array([(function(at + step * e) - function(at - step * e)) / (2 * step) for e in np.eye(len(at))])


def means(derivatives):
    """Mean over keys and its standard error."""
    derivatives = np.asarray(derivatives, np.float64)
    return derivatives.mean(0), derivatives.std(0) / np.sqrt(len(derivatives))


@pytest.mark.parametrize("chunk", [7, 100, 1000])
def test_the_share_is_that_of_the_counts(chunk):
    counts = class_counts(KEYS[0], CLASSIFIER, L2, X32, THETA32, num_samples=100, chunk=100)
    share = vote_share(KEYS[0], CLASSIFIER, L2, X32, THETA32, 1, num_samples=100, chunk=chunk)
    assert float(share) == pytest.approx(int(counts[1]) / 100, abs=1e-7)
    nan = reference.linear(W * np.nan)
    assert vote_share(KEYS[0], nan, L2, X32, THETA32, 1, num_samples=10, chunk=chunk) == 0


def test_derivatives_of_votes_are_unbiased_and_the_control_variate_pays():
    share = functools.partial(vote_share, classifier=CLASSIFIER, certificate=L2, label=1, num_samples=100, chunk=64)
    gradient = jax.grad(lambda x, theta, key: share(key, x=x, theta=theta), (0, 1))
    of_x, of_theta = jax.jit(jax.vmap(gradient, (None, None, 0)))(X32, THETA32, KEYS)
    for found, exact in (
        (of_x, differences(lambda x: probability(x, THETA), X)),
        (of_theta, differences(lambda theta: probability(X, theta), THETA)),
    ):
        mean, error = means(found)
        assert (abs(mean - exact) < 5 * error + 1e-6).all()
        assert np.linalg.norm(mean - exact) < 0.1 * np.linalg.norm(exact)
    draws = jax.vmap(
        lambda key: jax.vmap(lambda i: L2.sample(jax.random.fold_in(key, i), jnp.asarray(THETA32)))(jnp.arange(100))
    )
    noise = np.asarray(draws(KEYS), np.float64)
    votes = ((X + noise) @ W + B > 0).astype(float)
    plain = (votes[..., None] * noise / THETA**2).mean(1)
    assert np.asarray(of_x).std(0).sum() < 0.6 * plain.std(0).sum()
    centred = (votes - votes.mean(1, keepdims=True))[..., None] * noise / THETA**2
    np.testing.assert_allclose(of_x, centred.sum(1) / 99, rtol=1e-3, atol=1e-4)


def test_a_scalar_theta_has_the_sum_of_the_derivatives():
    share = lambda theta: vote_share(KEYS[0], CLASSIFIER, L2, X32, theta, 1, num_samples=50, chunk=64)
    whole = jax.grad(share)(jnp.full(D, 0.4))
    assert float(jax.grad(share)(jnp.float32(0.4))) == pytest.approx(float(whole.sum()), rel=1e-4)


def test_derivatives_of_the_soft_share_and_their_bias():
    """With steep logits the softmax is nearly the vote; with flat ones it is another function, and so is its slope."""
    exact = differences(lambda x: probability(x, THETA), X)

    def relative_bias(steepness):
        classifier = reference.linear(W * steepness, B * steepness)
        region = lambda x, key: estimated_region(key, classifier, L2, x, THETA32, 1, num_samples=2000)
        gradient = jax.grad(lambda x, key: scipy_share(region(x, key).gap))
        return np.linalg.norm(
            means(jax.jit(jax.vmap(gradient, (None, 0)))(X32, KEYS[:20]))[0] - slope
        ) / np.linalg.norm(slope)

    # The bound's own slope: gap(p) = Phi^-1(beta quantile), differentiated by finite differences at the true p.
    scipy_share = lambda gap: gap
    bound = lambda p: scipy.special.ndtri(scipy.stats.beta.ppf(ALPHA, 2000 * p, 2000 - 2000 * p + 1))
    p = probability(X, THETA)
    slope = exact * (bound(p + 1e-6) - bound(p - 1e-6)) / 2e-6
    assert relative_bias(20.0) < 0.05 < 0.3 < relative_bias(1.0)


@pytest.mark.parametrize(
    "size", [radius, proxy_radius, log_volume], ids=["certified radius", "proxy radius", "log volume"]
)
@pytest.mark.parametrize("estimate", ["votes", "soft"])
def test_sizes_have_the_derivatives_of_their_closed_forms(estimate, size):
    n = 2000

    def exact(x, theta):
        p = probability(x, theta)
        gap = scipy.special.ndtri(scipy.stats.beta.ppf(ALPHA, n * p, n - n * p + 1))
        if size is log_volume:
            return D * np.log(gap) + D / 2 * np.log(np.pi) - scipy.special.gammaln(D / 2 + 1) + np.log(theta).sum()
        return gap * (theta.min() if size is radius else np.exp(np.log(theta).mean()))

    steep = reference.linear(20 * W, 20 * B) if estimate == "soft" else CLASSIFIER

    def found(x, theta, key):
        return size(estimated_region(key, steep, L2, x, theta, 1, num_samples=n, estimate=estimate, chunk=1000))

    value_and_grad = jax.jit(jax.vmap(jax.value_and_grad(found, (0, 1)), (None, None, 0)))
    values, (of_x, of_theta) = value_and_grad(X32, THETA32, KEYS[:50])
    assert float(values.mean()) == pytest.approx(exact(X, THETA), rel=0.02, abs=0.2 if size is log_volume else 0)
    for derivative, expected in (
        (of_x, differences(lambda x: exact(x, THETA), X)),
        (of_theta, differences(lambda theta: exact(X, theta), THETA)),
    ):
        mean, error = means(derivative)
        assert np.linalg.norm(mean - expected) < 0.05 * np.linalg.norm(expected) + 4 * np.linalg.norm(error)


def test_the_network_can_be_differentiated_by_the_soft_estimate():
    """d/db of Phi((w x + b) / s) is the normal density over s."""
    scale = 20.0

    def gap(b, key):
        classifier = reference.linear(scale * W)
        variables = classifier.variables | {"b": scale * b}
        moved = classifier.__class__(classifier.apply, variables, classifier.num_classes)
        return estimated_region(key, moved, L2, X32, THETA32, 1, num_samples=5000).gap

    found = np.mean(jax.jit(jax.vmap(jax.grad(gap), (None, 0)))(jnp.float32(B), KEYS[:50]))
    p, s = probability(X, THETA), np.linalg.norm(W * THETA)
    bound = lambda p: scipy.special.ndtri(scipy.stats.beta.ppf(ALPHA, 5000 * p, 5000 - 5000 * p + 1))
    exact = (bound(p + 1e-6) - bound(p - 1e-6)) / 2e-6 * scipy.stats.norm.pdf(scipy.special.ndtri(p)) / s
    assert found == pytest.approx(exact, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("estimate", ["votes", "soft"])
def test_jit_vmap_grad_jvp_and_many_devices_agree(estimate):
    images = jnp.asarray(X32 + RNG.normal(size=(8, D)).astype(np.float32) * 0.05)

    def size(key, x):
        return proxy_radius(estimated_region(key, CLASSIFIER, L2, x, THETA32, 1, num_samples=200, estimate=estimate))

    gradient = jax.jit(jax.grad(size, 1))
    one = [gradient(key, x) for key, x in zip(KEYS, images, strict=False)]
    many = jax.jit(jax.vmap(jax.grad(size, 1)))
    np.testing.assert_allclose(many(KEYS[:8], images), one, rtol=1e-4, atol=1e-5)
    mesh = parallel.device_mesh(8)
    np.testing.assert_allclose(many(*parallel.split_rows((KEYS[:8], images), mesh)), one, rtol=1e-4, atol=1e-5)
    direction = jnp.asarray(RNG.normal(size=D), jnp.float32)
    _, slope = jax.jit(lambda x: jax.jvp(functools.partial(size, KEYS[0]), (x,), (direction,)))(images[0])
    assert float(slope) == pytest.approx(float(one[0] @ direction), rel=1e-3)


@pytest.mark.parametrize("estimate", ["votes", "soft"])
def test_nothing_certified_has_no_slope(estimate):
    def size(x, theta):
        region = estimated_region(KEYS[0], CLASSIFIER, L2, x, theta, 0, num_samples=100, estimate=estimate)
        return radius(region) + proxy_radius(region)

    value, gradients = jax.jit(jax.value_and_grad(size, (0, 1)))(X32, THETA32)
    assert value == 0 and not np.any(gradients)


def test_certain_votes_have_finite_derivatives():
    sure = lambda theta: radius(estimated_region(KEYS[0], reference.linear(W, 1e3), L2, X32, theta, 1, num_samples=100))
    value, gradient = jax.jit(jax.value_and_grad(sure))(THETA32)
    assert value > 0 and np.isfinite(gradient).all()


def test_draws_are_those_of_no_certificate():
    found = jax.jit(
        lambda x: estimated_region(KEYS[0], CLASSIFIER, L2, x, THETA32, 1, num_samples=100, estimate="votes")
    )(X32)
    share = vote_share(
        stage_key(KEYS[0], Stage.DIFFERENTIABLE), CLASSIFIER, L2, X32, THETA32, 1, num_samples=100, chunk=9
    )
    lower = scipy.stats.beta.ppf(ALPHA, 100 * float(share), 101 - 100 * float(share))
    assert float(found.gap) == pytest.approx(scipy.special.ndtri(lower), rel=0.02)


def test_uniform_noise_has_the_soft_estimate_only():
    region = estimated_region(KEYS[0], CLASSIFIER, UniformL1(), X32, THETA32, 1, num_samples=100)
    assert region.norm == 1
    with pytest.raises(ValueError, match=r"Gaussian noise only, got UniformL1\(\): use the soft estimate"):
        estimated_region(KEYS[0], CLASSIFIER, UniformL1(), X32, THETA32, 1, num_samples=100, estimate="votes")
    with pytest.raises(ValueError, match="num_samples must be at least 2, got 1"):
        vote_share(KEYS[0], CLASSIFIER, L2, X32, THETA32, 1, num_samples=1, chunk=1)


@pytest.mark.parametrize("norm", [2, 1])
def test_an_attack_reaches_the_boundary_of_a_linear_classifier_and_not_beyond_the_region(norm):
    """Under Gaussian noise the boundary is at gap 1.3; under uniform noise f(y) = 1[y_2 > t] has it where y_2 = t."""
    if norm == 2:
        classifier, certificate, w, boundary = reference.linear(4 * W, 4 * B), L2, W, 1.3
    else:
        w = np.eye(D)[2]
        boundary = 0.6
        classifier, certificate = reference.linear(40 * w, -40 * (X[2] - boundary * THETA[2])), UniformL1()
    side = lambda y: w @ (np.asarray(y, np.float64) - X) / (np.linalg.norm(w * THETA) if norm == 2 else THETA[2])
    find = jax.jit(lambda region, key: attack(key, classifier, certificate, region, 1, steps=20, num_samples=100))
    for gap in (0.5 * boundary, 0.99 * boundary, 1.2 * boundary):
        region = Region(X32, THETA32, np.float32(gap), norm)
        y = find(region, KEYS[3])
        assert contains(region, y)
        assert side(y) == pytest.approx(-gap, rel=0.02)  # the worst point of the region, on its surface
        answer = class_counts(KEYS[4], classifier, certificate, y, THETA32, num_samples=10_000, chunk=1000).argmax()
        assert answer == (gap < boundary)
    point = find(Region(X32, THETA32, np.float32(0), norm), KEYS[3])
    np.testing.assert_array_equal(point, X32)


@pytest.mark.parametrize("norm", [2, 1])
@pytest.mark.parametrize("gap", [1e-6, 1e-3, 0.03, 1.0])
def test_an_attack_stays_inside_a_region_of_any_size(norm, gap):
    """Of many pixels, whose distances are sums that are rounded."""
    w, center = RNG.normal(size=784), np.float32(RNG.uniform(size=784))
    theta, certificate = np.full(784, 0.25, np.float32), L2 if norm == 2 else UniformL1()
    region = Region(center, theta, np.float32(gap), norm)
    find = lambda key: attack(key, reference.linear(w, 5.0), certificate, region, 1, steps=5, num_samples=4)
    assert all(contains(region, y) for y in np.asarray(jax.jit(jax.vmap(find))(KEYS[:10])))


def test_a_start_or_bound_that_is_no_theta_is_refused():
    images, labels = np.zeros((2, D), np.float32), np.zeros(2, np.int32)
    for bad in ({"theta_init": 0.0}, {"theta_init": np.nan}, {"theta_init": 0.5, "theta_max": -1.0}):
        with pytest.raises(ValueError, match="must be positive and finite"):
            learn_theta(KEYS[0], CLASSIFIER, L2, images, labels, **bad)


def test_what_is_no_class_or_no_fitting_region_is_refused():
    images, labels = np.zeros((2, D), np.float32), np.array([0, 1])
    region = Region(X32, THETA32, np.float32(1), 2)
    for bad in (-1, 2):
        with pytest.raises(ValueError, match=rf"labels must be in 0\.\.1, got {bad} to {bad}"):
            estimated_region(KEYS[0], CLASSIFIER, L2, X32, THETA32, bad, num_samples=10)
        with pytest.raises(ValueError, match=r"labels must be in 0\.\.1"):
            attack(KEYS[0], CLASSIFIER, L2, region, bad)
    with pytest.raises(ValueError, match="the region is of norm 2, the noise certifies norm 1"):
        attack(KEYS[0], CLASSIFIER, UniformL1(), region, 1)
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.1, got 50 to 51"):
        learn_theta(KEYS[0], CLASSIFIER, L2, images, labels + 50, 0.5)
    with pytest.raises((ValueError, TypeError)):  # where types are checked, as here, they are first
        learn_theta(KEYS[0], CLASSIFIER, L2, images, labels[:1], 0.5)


def test_an_attack_with_nowhere_to_go_stays():
    constant = reference.linear(0 * W, 1.0)
    y = attack(KEYS[0], constant, L2, Region(X32, THETA32, np.float32(2), 2), 1, steps=3, num_samples=4)
    np.testing.assert_array_equal(y, X32)


def bowl(variables, y):
    """Class 1 where w.y + q |y|^2 + b is positive."""
    margin = (y * variables["w"]).sum(-1) + variables["q"] * (y**2).sum(-1) + variables["b"]
    return jnp.stack([jnp.zeros_like(margin), margin], axis=-1)


@pytest.fixture(scope="module")
def learn():
    images = np.float32(np.random.default_rng(1).normal(size=(40, D)))
    labels = (images[:, 0] > 0).astype(np.int32)
    settings = {"steps": 120, "batch_size": 16, "num_samples": 50, "learning_rate": 0.1}
    return jax.jit(
        lambda classifier, theta_max: learn_theta(
            KEYS[0], classifier, L2, images, labels, np.float32(0.3), theta_max=theta_max, **settings
        )
    )


def test_the_shared_theta_widens_where_the_classifier_does_not_look(learn):
    """Of f(y) = 1[y_0 > 0], coordinates 1 to 5 are free: their theta goes to the bound, that of 0 stays below."""
    theta, trace = learn(Classifier(bowl, {"w": 20 * np.eye(D)[0], "b": 0.0, "q": 0.0}, 2), 1.2)
    np.testing.assert_allclose(theta[1:], 1.2, rtol=1e-4)
    assert 0.1 < theta[0] < 1.0
    assert trace.shape == (120,) and trace[-10:].mean() > 1.5 * trace[:10].mean()


def test_without_a_bound_the_shared_theta_runs_away_too(learn):
    """What strong noise makes constant is right on half of the images, with regions as large as the noise."""
    erased = Classifier(bowl, {"w": 20 * np.eye(D)[0], "b": 0.0, "q": 20.0}, 2)
    assert learn(erased, 1e4)[0].min() > 5
    assert learn(erased, 0.5)[0].max() == pytest.approx(0.5)
