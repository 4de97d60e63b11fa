"""Classifiers outside of JAX: the same draws, votes and certificates as in JAX; no gradients; runs that know them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ancer_jax as aj
from ancer_jax.runs import read_run
from ancer_jax.smoothing import class_counts
from tests.toy import DATASET, untimed

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
WEIGHTS = np.random.default_rng(0).normal(size=(np.prod(DATASET.images.shape[1:]), 3)).astype(np.float32)
X = DATASET.images[0]
CONFIG = aj.RunConfig(theta=0.3, certify=aj.CertifyConfig(n0=20, n=300))


def on_host(x):
    return np.asarray(x).reshape(len(x), -1) @ WEIGHTS


def in_jax(variables, x):
    return x.reshape(len(x), -1) @ variables


HOSTED = aj.from_host(on_host, num_classes=3, digest="one")
PAIR = (HOSTED, aj.from_function(in_jax, jnp.asarray(WEIGHTS), num_classes=3))


@pytest.mark.parametrize(
    ("noise", "chunks"), [(aj.Gaussian(), (1, 7, 300, 1000)), (aj.Uniform(), (7,)), (aj.Splitting(), (1000,))]
)
def test_votes_are_those_of_the_same_function_in_jax(noise, chunks):
    for chunk in chunks:
        votes = [class_counts(KEY, aj.Smoothed(c, noise, 0.3), X, num_samples=300, chunk=chunk) for c in PAIR]
        np.testing.assert_array_equal(*votes)
        assert votes[0].sum() == 300


def test_certificates_and_predictions_are_those_of_the_same_function_in_jax():
    theta = np.linspace(0.1, 0.5, X.size, dtype=np.float32).reshape(X.shape)
    hosted, native = (aj.Smoothed(classifier, aj.Gaussian(), theta) for classifier in PAIR)
    config, xs = aj.CertifyConfig(n0=50, n=500), DATASET.images[:3]
    both = [aj.certify_batch(KEY, one, xs, config=config, chunk=70) for one in (hosted, native)]
    jax.tree.map(np.testing.assert_array_equal, *both)
    np.testing.assert_array_equal(*(aj.predict_batch(KEY, one, xs, n=200) for one in (hosted, native)))
    sequential = aj.SequentialConfig(radii=(0.1,))
    both = [aj.certify_sequentially(KEY, one, X, sequential=sequential, config=config) for one in (hosted, native)]
    jax.tree.map(np.testing.assert_array_equal, *both)
    selected, count = aj.count_votes(KEY, hosted, X, config=config, chunk=70)
    assert (selected, count) == aj.count_votes(KEY, native, X, config=config, chunk=70)


def test_a_draw_with_a_nan_votes_for_no_class():
    some = aj.from_host(lambda x: np.where(np.arange(len(x))[:, None] % 2, np.nan, on_host(x)), num_classes=3)
    assert class_counts(KEY, aj.Smoothed(some, aj.Gaussian(), 0.3), X, num_samples=100, chunk=10).sum() == 50


@pytest.mark.parametrize("sampling", [None, aj.SequentialConfig(radii=(0.05,))])
@pytest.mark.parametrize("number", [1, 3])
def test_runs_are_those_of_the_same_function_in_jax(tmp_path, sampling, number):
    config = aj.RunConfig(theta=0.3, certify=CONFIG.certify, sampling=sampling)
    for name, classifier in zip(("host", "jax"), PAIR, strict=True):
        execution = aj.Execution(devices=number, batch_size=2 * number)
        aj.certify_dataset(classifier, DATASET, config, out=tmp_path / name, execution=execution)
    host, native = (untimed((tmp_path / name / "results.tsv").read_text()) for name in ("host", "jax"))
    assert host == native


def test_exact_certificates_of_splitting_noise(tmp_path):
    config = aj.RunConfig(norm="l1", noise="splitting", exact=True, theta=0.2)
    images = aj.dataset_from_arrays((255 * DATASET.images[:2]).astype(np.uint8), DATASET.labels[:2], num_classes=3)
    counts = []
    for name, classifier in zip(("host", "jax"), PAIR, strict=True):
        aj.certify_dataset(classifier, images, config, out=tmp_path / name)
        counts.append(read_run(tmp_path / name).columns("counts")["counts"])
    np.testing.assert_array_equal(*counts)


def test_a_run_is_continued_with_the_same_digest_only(tmp_path):
    few = aj.data.select(DATASET, max_images=2)
    aj.certify_dataset(HOSTED, few, CONFIG, out=tmp_path / "run")
    aj.certify_dataset(aj.from_host(on_host, num_classes=3, digest="one"), DATASET, CONFIG, out=tmp_path / "run")
    with pytest.raises(ValueError, match="classifier is"):
        aj.certify_dataset(aj.from_host(on_host, num_classes=3, digest="two"), DATASET, CONFIG, out=tmp_path / "run")
    nameless = aj.from_host(on_host, num_classes=3)
    with pytest.warns(UserWarning, match="cannot be continued once it is stopped"):
        aj.certify_dataset(nameless, few, CONFIG, out=tmp_path / "nameless")
    with pytest.raises(ValueError, match="cannot be continued"):
        aj.certify_dataset(nameless, DATASET, CONFIG, out=tmp_path / "nameless")


@pytest.mark.parametrize(
    "use",
    [
        lambda smoothed: aj.optimize_isotropic(KEY, smoothed, X),
        lambda smoothed: aj.optimize_anisotropic(KEY, smoothed, X),
        lambda smoothed: jax.jit(smoothed.classifier)(X[None]),
        lambda smoothed: jax.vmap(lambda key: class_counts(key, smoothed, X, num_samples=5, chunk=5))(KEY[None]),
    ],
)
def test_what_traces_the_classifier_is_refused(use):
    with pytest.raises(ValueError, match=r"this classifier runs outside of JAX, where there are no gradients"):
        use(aj.Smoothed(HOSTED, aj.Gaussian(), 0.3))


@pytest.mark.parametrize("method", ["isotropic", "ancer"])
def test_methods_that_search_theta_are_refused(tmp_path, method):
    with pytest.raises(ValueError, match=f"method {method} searches for theta by gradients"):
        aj.certify_dataset(HOSTED, DATASET, aj.RunConfig(method=method, theta=0.3), out=tmp_path / "run")


def test_what_voids_a_certificate_is_refused():
    rng = np.random.default_rng(0)
    wrong = {
        "place in the batch": lambda x: on_host(x) + rng.normal(size=(len(x), 3)),
        "rest of the batch": lambda x: on_host(x) - on_host(x).mean(axis=0),
        "not finite": lambda x: on_host(x) * np.inf,
        "must return logits of shape": lambda x: on_host(x)[:, :2],
        "must be real numbers": lambda x: on_host(x) * 1j,
    }
    for text, function in wrong.items():
        with pytest.raises(ValueError, match=text):
            aj.check_classifier(aj.from_host(function, num_classes=3), X)
