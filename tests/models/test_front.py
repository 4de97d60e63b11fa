"""A linear filter in front of a network: what it computes, and that training and checkpoints keep it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancer_jax import check_classifier, from_function
from ancer_jax.basis import Cosine, KarhunenLoeve
from ancer_jax.models import Checkpoint, Front, WithFront, load_network, make_network, save_network
from ancer_jax.models.front import wiener_front, with_front

RNG = np.random.default_rng(0)
SHAPE = (4, 5, 3)
IMAGES = RNG.uniform(0, 1, (200, *SHAPE)).astype(np.float32)
BASES = [Cosine(), KarhunenLoeve.of(IMAGES)]
each_basis = pytest.mark.parametrize("basis", BASES, ids=lambda basis: basis.name)


def matrix_of(basis):
    """The basis as a d x d matrix, a basis vector in each row."""
    d = int(np.prod(SHAPE))
    return np.asarray(basis.coefficients(np.eye(d).reshape(d, *SHAPE))).reshape(d, d).T


@each_basis
def test_the_filter_is_a_matrix_product(basis):
    x, mean, weights = (RNG.normal(size=size).astype(np.float32) for size in ((2, *SHAPE), SHAPE, SHAPE))
    b = matrix_of(basis)
    expected = (x - mean).reshape(2, -1) @ (b.T @ np.diag(weights.ravel()) @ b).T + mean.ravel()
    np.testing.assert_allclose(Front(mean, weights, basis)(x).reshape(2, -1), expected, atol=1e-5)


@each_basis
def test_no_filter_of_one_weight_per_coefficient_leaves_a_smaller_error_than_wieners(basis):
    theta = np.full(SHAPE, 0.3, np.float32)
    front = wiener_front(IMAGES, theta, basis)
    noise = 0.3 * RNG.normal(size=(50, *IMAGES.shape)).astype(np.float32)

    def error(factor):
        filtered = Front(front.mean, front.weights * factor, basis)((IMAGES + noise).reshape(-1, *SHAPE))
        return float(((filtered.reshape(noise.shape) - IMAGES) ** 2).mean())

    best = error(1.0)
    assert best < error(0.8) and best < error(1.25)
    assert best < float((noise**2).mean())
    assert ((front.weights > 0) & (front.weights < 1)).all()


def linear(weights, x):
    return x.reshape(len(x), -1) @ weights


def test_a_classifier_with_a_front_filters_first():
    weights = RNG.normal(size=(60, 3)).astype(np.float32)
    front = wiener_front(IMAGES, 0.5, Cosine())
    classifier = from_function(linear, weights, num_classes=3)
    filtered = with_front(classifier, front)
    check_classifier(filtered, IMAGES[0])
    np.testing.assert_allclose(filtered(IMAGES[:5]), classifier(front(IMAGES[:5])), atol=1e-5)
    assert hash(filtered.apply) == hash(with_front(classifier, front).apply)


def test_a_network_with_a_front_is_stored_with_it(tmp_path):
    attributes = {"num_classes": 3, "stage_sizes": (1,), "width": 2, "front": BASES[1].describe()}
    network = make_network("cifar_resnet20", **attributes)
    assert isinstance(network, WithFront) and network.num_classes == 3
    variables = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    x = jnp.asarray(IMAGES[:2])
    inner = {name: values["network"] for name, values in variables.items() if name != "front"}
    # `init` makes a filter that changes nothing.
    np.testing.assert_allclose(network.apply(variables, x), network.network.apply(inner, x), atol=1e-5)
    front = wiener_front(IMAGES, 0.5, BASES[1])
    variables = {**variables, "front": {"mean": front.mean, "weights": front.weights}}
    save_network(Checkpoint("cifar_resnet20", attributes, variables, SHAPE), tmp_path / "net")
    logits = load_network(tmp_path / "net").classifier(x)
    np.testing.assert_array_equal(logits, network.apply(variables, x))
    np.testing.assert_allclose(logits, network.network.apply(inner, front(x)), atol=1e-5)


@pytest.mark.parametrize(
    ("theta", "text"),
    [
        (np.nan, "nan to nan"),
        (-1.0, r"-1.0 to -1.0"),
        (np.ones((4, 5)), r"one number or \[4, 5, 1\], got one of shape"),
    ],
)
def test_thetas_that_make_no_sense_are_refused(theta, text):
    images = np.random.default_rng(0).random((3, 4, 5, 1))
    with pytest.raises(ValueError, match=text):
        wiener_front(images, theta, Cosine())
