"""The base classifier of a name, and its noise parameter; tests/cli has the messages for names that mean nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancer_jax.data import load_dataset
from ancer_jax.models import (
    BUNDLED_BY_NORM,
    Checkpoint,
    check_fit,
    load_bundled,
    make_network,
    resolve_classifier,
    save_network,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def stored(path, norm, theta):
    """The name of a folder with a small network that was trained with noise of this norm and theta."""
    attributes = {"num_classes": 3, "features": (2, 2, 2), "hidden": 4}
    variables = make_network("small_cnn", **attributes).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    save_network(Checkpoint("small_cnn", attributes, variables, (8, 8, 1), norm, theta), path)
    return str(path)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_the_bundled_classifier_has_its_own_theta(norm):
    classifier, sigma, checkpoint = resolve_classifier("bundled", norm, None)
    bundled = load_bundled(BUNDLED_BY_NORM[norm])
    assert sigma == bundled.theta
    x = load_dataset("fashion-mnist-subset").images[:2]
    for one in (classifier, checkpoint.classifier):
        np.testing.assert_array_equal(one(x), bundled.classifier(x))
    assert (checkpoint.norm, checkpoint.theta, checkpoint.image_shape) == (norm, bundled.theta, (28, 28, 1))
    assert resolve_classifier("bundled", norm, 1.5)[1] == 1.5
    check_fit("bundled", checkpoint, load_dataset("fashion-mnist-subset"))


def test_a_bundled_model_by_its_name_is_like_a_network_in_a_folder():
    name = BUNDLED_BY_NORM["l1"]
    classifier, sigma, checkpoint = resolve_classifier(name, "l1", None)
    assert (checkpoint.norm, checkpoint.theta, sigma) == ("l1", 0.5, 0.5)
    x = load_dataset("fashion-mnist-subset").images[:2]
    np.testing.assert_array_equal(classifier(x), load_bundled(name).classifier(x))
    with pytest.raises(ValueError, match=rf"{name} was trained with l1 noise of 0\.5: --sigma is needed to certify it"):
        resolve_classifier(name, "l2", None)
    with pytest.raises(ValueError, match=r"norm must be one of l2, l1, got 'linf'"):
        resolve_classifier("bundled", "linf", None)


def test_theta_of_a_stored_network_is_that_of_its_training(tmp_path):
    name = stored(tmp_path / "net", "l2", 0.3)
    classifier, sigma, checkpoint = resolve_classifier(name, "l2", None)
    x = np.random.default_rng(0).random((2, 8, 8, 1), np.float32)
    np.testing.assert_array_equal(classifier(x), checkpoint.classifier(x))
    assert sigma == 0.3 and checkpoint.norm == "l2"
    assert resolve_classifier(name, "l2", 0.7)[1] == 0.7
    with pytest.raises(ValueError, match=r"net was trained with l2 noise of 0\.3: --sigma is needed"):
        resolve_classifier(name, "l1", None)
    with pytest.warns(UserWarning, match=r"net was trained with l2 noise of 0\.3, not with l1 noise"):
        assert resolve_classifier(name, "l1", 0.7)[1] == 0.7


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_an_unknown_theta_must_be_given(tmp_path, norm):
    name = stored(tmp_path / "net", "l2", None)
    with pytest.raises(ValueError, match=r"--sigma is needed: .*net does not say what noise it was trained with"):
        resolve_classifier(name, norm, None)
    assert resolve_classifier(name, norm, 0.7)[1] == 0.7


def test_data_that_do_not_fit_are_refused_and_few_classes_are_noticed(tmp_path):
    images = load_dataset("fashion-mnist-subset")
    _, _, small = resolve_classifier(stored(tmp_path / "net", "l2", 0.3), "l2", None)
    with pytest.raises(ValueError, match=r"net takes images 8 x 8 x 1, the data are 28 x 28 x 1 \(--classifier"):
        check_fit("net", small, images)
    np.savez(tmp_path / "few.npz", images=images.images[:4], labels=np.array([0, 1, 4, 0]))
    _, _, bundled = resolve_classifier("bundled", "l2", None)
    with pytest.warns(UserWarning, match=r"few\.npz has labels of 5 classes, bundled knows 10"):
        check_fit("bundled", bundled, load_dataset(str(tmp_path / "few.npz")))
