"""The smoothed classifier, and the votes and probabilities that are drawn from it."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from ancer_jax.smoothing import (
    CertifyConfig,
    Gaussian,
    SequentialConfig,
    Smoothed,
    Splitting,
    Uniform,
    certify,
    certify_batch,
    certify_sequentially,
    count_votes,
    from_function,
    predict,
    predict_batch,
)
from ancer_jax.smoothing.smoothed import (
    Stage,
    class_counts,
    class_counts_between,
    probs_of_each,
    smoothed_probs,
    stage_key,
)
from tests import reference
from tests.toy import Coins

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
X = np.array([0.3, -0.2, 0.5, 0.1], np.float32)
CLASSIFIER = reference.linear([1.0, -2.0, 0.5, 0.3])
SMOOTHED = Smoothed(CLASSIFIER, Gaussian(), 0.5)
MAP = np.array([0.1, 1.0, 0.3, 2.0], np.float32)


@pytest.mark.parametrize("noise", [Gaussian(), Uniform()])
@pytest.mark.parametrize("theta", [0.5, MAP], ids=["scalar", "map"])
def test_counts_are_those_of_draws_taken_one_by_one(noise, theta):
    smoothed = Smoothed(CLASSIFIER, noise, theta)
    counts = class_counts(KEY, smoothed, X, num_samples=53, chunk=10)
    np.testing.assert_array_equal(counts, reference.counts_one_by_one(KEY, smoothed, X, 53))
    assert counts.dtype == jnp.int32


@pytest.fixture(scope="module")
def whole():
    """The votes of 1,003 draws."""
    return class_counts(KEY, SMOOTHED, X, num_samples=1003, chunk=64)


@pytest.mark.parametrize("chunk", [1, 7, 100, 1000, 1001, 5000])
def test_chunk_changes_no_count(chunk, whole):
    counts = class_counts(KEY, SMOOTHED, X, num_samples=1003, chunk=chunk)
    np.testing.assert_array_equal(counts, whole)
    assert counts.sum() == 1003


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_counts_of_ranges_add_up(chunk, whole):
    """Whether their ends are known at compile time or not, and however many steps too many are made."""
    between = jax.jit(
        lambda first, stop, steps: class_counts_between(KEY, SMOOTHED, X, (first, stop), steps=steps, chunk=chunk)
    )
    parts = [between(a, b, -(-(b - a) // chunk) + i) for i, (a, b) in enumerate([(0, 1), (1, 400), (400, 1003)])]
    np.testing.assert_array_equal(sum(parts), whole)
    assert not between(5, 5, 3).any()


@pytest.mark.parametrize("chunk", [0, -3])
def test_a_chunk_that_would_miscount_ranges_is_refused(chunk):
    with pytest.raises(ValueError, match="chunk must be"):
        class_counts_between(KEY, SMOOTHED, X, (0, 1000), steps=3, chunk=chunk)


@pytest.mark.parametrize("shape", [(3,), (2, 1, 3), (1, 1, 1)])
def test_a_theta_that_only_numpy_would_fit_to_an_input_is_refused(shape):
    """Three numbers would be drawn as one for each channel, and certified as one for each of three images."""
    smoothed = Smoothed(reference.linear(np.ones(12)), Gaussian(), np.full(shape, 0.5, np.float32))
    count = lambda x: count_votes(KEY, smoothed, x, config=CertifyConfig(n0=2, n=2), chunk=2)
    with pytest.raises(ValueError, match=r"theta must be a scalar or have x's shape \[2, 2, 3\]"):
        jax.jit(jax.vmap(count))(np.zeros((3, 2, 2, 3), np.float32))


def test_batch_and_order_change_no_count():
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(5))
    xs = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    count = jax.jit(lambda key, x: class_counts(key, SMOOTHED, x, num_samples=500, chunk=100))
    alone, batch = jnp.stack([count(key, x) for key, x in zip(keys, xs, strict=True)]), jax.jit(jax.vmap(count))
    np.testing.assert_array_equal(batch(keys, xs), alone)
    np.testing.assert_array_equal(batch(keys[::-1], xs[::-1]), alone[::-1])


def test_more_samples_contain_the_first_ones():
    count = lambda n: class_counts(KEY, SMOOTHED, X, num_samples=n, chunk=100)
    assert (count(300) >= count(200)).all()
    assert (count(300) - count(200)).sum() == 100


def test_counts_follow_the_closed_form():
    w = np.array([1.0, -2.0, 0.5, 0.3])
    p = scipy.stats.norm.cdf(w @ X / np.linalg.norm(w * MAP))
    counts = class_counts(KEY, SMOOTHED.with_theta(MAP), X, num_samples=20_000, chunk=1000)
    assert scipy.stats.binomtest(int(counts[1]), 20_000, p).pvalue > 1e-3


def far_out(variables, x):
    """Class 1 where noise of standard deviation 1 is beyond 2.75, where a draw in bfloat16 never is."""
    assert x.dtype == variables.dtype
    return jnp.stack([jnp.zeros(len(x)), x[:, 0].astype(jnp.float32) - 2.75], axis=1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_votes_are_of_noise_in_float32_and_the_network_sees_the_type_of_x(dtype):
    smoothed = Smoothed(from_function(far_out, jnp.zeros((), dtype), num_classes=2), Gaussian(), 1.0)
    x = jnp.zeros(4, dtype)
    counts = class_counts(KEY, smoothed, x, num_samples=50_000, chunk=5000)
    assert scipy.stats.binomtest(int(counts[1]), 50_000, scipy.stats.norm.sf(2.75)).pvalue > 1e-3
    probs = smoothed_probs(KEY, smoothed, x, num_samples=100)
    assert probs.dtype == jnp.float32


def nan_above(variables, x):
    return jnp.where(x[:, :1] > variables, jnp.nan, x[:, :2])


def test_a_draw_with_nan_votes_for_no_class():
    classifier = from_function(nan_above, np.float32(0.3), num_classes=2)
    counts = class_counts(KEY, Smoothed(classifier, Gaussian(), 0.5), X, num_samples=1000, chunk=100)
    above = (X[0] + 0.5 * reference_normal() > 0.3).sum()
    assert counts.sum() == 1000 - above


def reference_normal():
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(1000))
    return np.asarray(jax.vmap(lambda key: Gaussian().sample(key, jnp.ones(4))[0])(keys))


def test_ties_go_to_the_lowest_class():
    smoothed = Smoothed(reference.constant([0, 1, 1]), Gaussian(), 0.5)
    np.testing.assert_array_equal(class_counts(KEY, smoothed, X, num_samples=10, chunk=10), [0, 10, 0])


def test_a_search_with_the_key_of_a_batch_shares_no_draw_with_its_inputs():
    fold = lambda key, numbers: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(numbers, jnp.uint32))
    names = lambda keys: {key.tobytes() for key in np.asarray(jax.random.key_data(keys)).reshape(-1, 2)}
    folding = [stage for stage in Stage if stage not in (Stage.SELECT, Stage.ESTIMATE, Stage.PREDICT)]
    steps = names(jax.vmap(lambda key: fold(key, range(50)))(fold(KEY, folding)))
    of_inputs = names(jax.vmap(lambda key: fold(key, [*Stage]))(fold(KEY, [*range(50), 2**31 - 1])))
    assert len(steps) == 50 * len(folding) and not steps & of_inputs


def test_stages_draw_independently():
    draws = [reference.draws(KEY, stage, Gaussian(), jnp.ones(1), 4000).ravel() for stage in Stage]
    for i, first in enumerate(draws):
        for second in draws[:i]:
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.06


def test_smoothed_probs_are_the_mean_softmax():
    probs = smoothed_probs(KEY, SMOOTHED, X, num_samples=200)
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(200))
    noise = jax.vmap(lambda key: Gaussian().sample(key, jnp.full(4, 0.5)))(keys)
    np.testing.assert_allclose(probs, jax.nn.softmax(CLASSIFIER(X + noise)).mean(0), rtol=1e-5)
    assert probs.sum() == pytest.approx(1)


def test_probs_of_each_are_those_of_one_noisy_copy_of_each_image():
    images = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    found = probs_of_each(KEY, SMOOTHED.with_theta(MAP), images)
    for i, (x, probs) in enumerate(zip(images, found, strict=True)):
        copy = x + Gaussian().sample(jax.random.fold_in(KEY, i), jnp.asarray(MAP))
        np.testing.assert_allclose(probs, jax.nn.softmax(CLASSIFIER(copy[None])[0]), rtol=1e-5)


def test_smoothed_probs_have_the_gradient_of_finite_differences():
    value = jax.jit(lambda theta: smoothed_probs(KEY, SMOOTHED.with_theta(theta), X, num_samples=500)[1])
    theta = jnp.array([0.5, 0.7, 0.4, 0.6])
    step = 1e-2 * jnp.eye(4)
    differences = [(value(theta + s) - value(theta - s)) / 2e-2 for s in step]
    np.testing.assert_allclose(jax.grad(value)(theta), differences, atol=2e-4)


def test_nothing_is_compiled_again_for_another_example():
    traces = []

    @jax.jit
    def run(key, smoothed, x):
        traces.append(1)
        return class_counts(key, smoothed, x, num_samples=10, chunk=5)

    for i in range(3):
        smoothed = Smoothed(reference.linear(np.full(4, 1.0 + i)), Gaussian(), jnp.float32(0.1 + i))
        run(jax.random.key(i), smoothed, X + i)
    assert len(traces) == 1
    run(KEY, Smoothed(CLASSIFIER, Uniform(), jnp.float32(0.1)), X)
    assert len(traces) == 2  # the noise is static


def test_certificates_of_other_inputs_thetas_and_settings_compile_nothing_again(compilations):
    def certify_all(x, theta, n0, n, alpha):
        smoothed, config = Smoothed(CLASSIFIER, Gaussian(), theta), CertifyConfig(n0, n, alpha)
        certify(KEY, smoothed, x, config=config, chunk=10)
        certify_sequentially(KEY, smoothed, x, config=config, sequential=SequentialConfig(radii=(0.1,)), chunk=10)
        predict(KEY, smoothed, x, n=n, alpha=alpha, chunk=10)

    certify_all(np.ones(4, np.float32), 0.5, 20, 300, 0.01)
    before = compilations()
    for i in range(3):
        certify_all(np.full(4, 0.1 * i, np.float32), 0.5 + i, 20 + i, 300 + i, 0.01 / (1 + i))
    assert compilations() == before
    certify_all(np.ones(5, np.float32)[:4], np.ones(4, np.float32), 20, 300, 0.01)
    assert compilations() > before  # theta of another shape


@pytest.mark.usefixtures("without_type_checker")
@pytest.mark.parametrize("key", [jax.random.key(0, impl="rbg"), np.zeros(2, np.uint32), 0])
def test_keys_whose_draws_depend_on_the_batch_are_refused(key):
    with pytest.raises(ValueError, match="key must be a typed threefry key"):
        stage_key(key, Stage.SELECT)


@pytest.mark.usefixtures("without_type_checker")
@pytest.mark.parametrize(
    "function",
    [
        lambda keys: certify(keys, SMOOTHED, X),
        lambda keys: certify_batch(keys, SMOOTHED, X[None]),
        lambda keys: predict_batch(keys, SMOOTHED, X[None]),
    ],
    ids=["certify", "certify_batch", "predict_batch"],
)
def test_many_keys_are_refused(function):
    with pytest.raises(ValueError, match=r"key must be a single key, got keys of shape \[6\]; .*one key and ids"):
        function(jax.random.split(KEY, 6))


@pytest.mark.parametrize(
    ("change", "text"),
    [({"num_samples": 0}, "num_samples must be at least 1, got 0"), ({"chunk": 0}, "chunk must be at least 1, got 0")],
)
def test_sizes_below_one_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        class_counts(KEY, SMOOTHED, X, **({"num_samples": 5, "chunk": 5} | change))


@pytest.mark.parametrize("noise", [Splitting(exact=True), Coins()], ids=str)
@pytest.mark.parametrize(
    "function",
    [
        lambda smoothed: class_counts(KEY, smoothed, X, num_samples=10, chunk=5),
        lambda smoothed: smoothed_probs(KEY, smoothed, X, num_samples=10),
        lambda smoothed: probs_of_each(KEY, smoothed, X[None]),
    ],
    ids=["class_counts", "smoothed_probs", "probs_of_each"],
)
def test_some_draws_of_enumerable_noise_estimate_nothing(noise, function):
    with pytest.raises(ValueError, match="the draws of enumerable noise must all be counted"):
        function(Smoothed(CLASSIFIER, noise, np.float32(0.5)))


def test_a_smoothed_classifier_is_a_pytree_with_static_noise():
    leaves, structure = jax.tree.flatten(SMOOTHED)
    assert len(leaves) == len(jax.tree.leaves(CLASSIFIER)) + 1
    again = jax.tree.unflatten(structure, leaves)
    assert isinstance(again, Smoothed) and again.noise is SMOOTHED.noise
    doubled = jax.tree.map(lambda leaf: 2 * leaf, SMOOTHED)
    assert doubled.theta == 1.0
    np.testing.assert_array_equal(doubled.classifier.variables["w"], 2 * CLASSIFIER.variables["w"])


@pytest.mark.parametrize("shape", [(3,), (3, 4)], ids=["scalars", "maps"])
def test_a_smoothed_classifier_vmaps_over_theta(shape):
    thetas = np.random.default_rng(0).uniform(0.1, 1, shape).astype(np.float32)
    count = jax.jit(lambda smoothed: class_counts(KEY, smoothed, X, num_samples=500, chunk=100))
    together = jax.vmap(lambda theta: count(SMOOTHED.with_theta(theta)))(thetas)
    alone = np.array([count(SMOOTHED.with_theta(theta)) for theta in thetas])
    np.testing.assert_array_equal(together, alone)
    assert len(np.unique(alone, axis=0)) > 1
    axes = jax.tree.map(lambda leaf: None, SMOOTHED).with_theta(0)  # the classifier is the same for all
    np.testing.assert_array_equal(jax.vmap(count, (axes,))(SMOOTHED.with_theta(thetas)), alone)


@pytest.mark.usefixtures("without_type_checker")
@pytest.mark.parametrize("network", [nn.Dense(2), nnx.Linear(4, 2, rngs=nnx.Rngs(0)), lambda x: x])
def test_a_network_that_is_not_wrapped_is_refused(network):
    with pytest.raises(ValueError, match="is not a Classifier: wrap it with from_linen, from_nnx"):
        Smoothed(network, Gaussian(), 0.5)


WRONG_ORDERS = [order for order in itertools.permutations(range(3)) if order != (0, 1, 2)]


@pytest.mark.usefixtures("without_type_checker")
@pytest.mark.parametrize("theta", [0.5, np.full((2, 2, 1), 0.5, np.float32)], ids=["scalar", "map"])
@pytest.mark.parametrize("order", WRONG_ORDERS, ids=str)
def test_arguments_in_the_wrong_order_are_refused_in_one_line(order, theta):
    arguments = (CLASSIFIER, Gaussian(), theta)
    with pytest.raises(ValueError, match=r"^Smoothed\(classifier, noise, theta\): ") as refused:
        Smoothed(*(arguments[place] for place in order))
    assert len(str(refused.value).splitlines()) == 1
    assert len(str(refused.value)) < 200
