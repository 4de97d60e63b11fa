import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancer_jax import Classifier, Gaussian, Smoothed, UniversalConfig, optimize_universal
from ancer_jax.search import universal
from ancer_jax.smoothing.smoothed import Stage, stage_key
from tests import reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
D = 6
LINEAR = reference.linear(np.linspace(-1, 1, D))
IMAGES, LABELS = np.zeros((2, D), np.float32), np.array([0, 1])


@pytest.mark.parametrize("theta", [0.0, np.nan])
def test_a_start_that_is_not_positive_and_finite_is_refused(theta):
    with pytest.raises(ValueError, match="theta where the search starts must be positive and finite"):
        optimize_universal(KEY, Smoothed(LINEAR, Gaussian(), theta), IMAGES, LABELS)


@pytest.mark.usefixtures("without_type_checker")
def test_labels_that_do_not_fit_are_refused():
    smoothed = Smoothed(LINEAR, Gaussian(), 0.5)
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.1, got 50 to 51"):
        optimize_universal(KEY, smoothed, IMAGES, LABELS + 50)
    with pytest.raises(ValueError, match=r"there must be a label for each image, got \(1,\) and \(2, 6\)"):
        optimize_universal(KEY, smoothed, IMAGES, LABELS[:1])


def test_the_ascent_draws_by_a_stage_key_of_its_own(monkeypatch):
    """So that none of its draws is one of those that certify."""
    stages = []
    monkeypatch.setattr(universal, "stage_key", lambda key, stage: stages.append(stage) or stage_key(key, stage))
    config = UniversalConfig(steps=2, batch_size=2, num_samples=64)
    smoothed, images = Smoothed(LINEAR, Gaussian(), np.float32(0.5)), 2 * np.eye(D, dtype=np.float32)[[0, -1]]
    theta, _ = optimize_universal(KEY, smoothed, images, LABELS, config=config)
    assert stages == [Stage.UNIVERSAL]
    monkeypatch.setattr(universal, "stage_key", lambda key, stage: jax.random.key(9))
    assert (optimize_universal(KEY, smoothed, images, LABELS, config=config)[0] != theta).any()


def bowl_logits(variables, y):
    """Class 1 where w.y + q |y|^2 + b is positive."""
    margin = (y * variables["w"]).sum(-1) + variables["q"] * (y**2).sum(-1) + variables["b"]
    return jnp.stack([jnp.zeros_like(margin), margin], axis=-1)


def bowl(q):
    """Labels below are those of 1[y_0 > 0], which is this classifier with q = 0."""
    return Classifier(bowl_logits, {"w": 20 * np.eye(D)[0], "b": 0.0, "q": q}, 2)


def search(classifier, theta_max):
    images = np.float32(np.random.default_rng(1).normal(size=(40, D)))
    labels = (images[:, 0] > 0).astype(np.int32)
    config = UniversalConfig(steps=120, batch_size=16, num_samples=50, learning_rate=0.1, theta_max=theta_max)
    smoothed = Smoothed(classifier, Gaussian(), np.float32(0.3))
    return jax.jit(optimize_universal, static_argnames="config")(KEY, smoothed, images, labels, config=config)


def test_the_universal_theta_grows_where_the_classifier_does_not_look():
    """Of f(y) = 1[y_0 > 0] coordinates 1 to 5 are free: their theta goes to the bound, that of 0 stays below."""
    theta, objective = search(bowl(0.0), 1.2)
    np.testing.assert_allclose(theta[1:], 1.2, rtol=1e-4)
    assert 0.1 < theta[0] < 1.0
    assert objective.shape == (120,) and objective[-10:].mean() > 1.5 * objective[:10].mean()


def test_only_a_bound_keeps_the_universal_theta_from_growing_for_ever():
    """Strong noise makes the classifier constant: right on half of the images, with regions as large as the noise."""
    assert search(bowl(20.0), 1e4)[0].min() > 5
    assert search(bowl(20.0), 1.2)[0].max() == pytest.approx(1.2, rel=1e-5)  # the program of the test above
