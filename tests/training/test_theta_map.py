"""Training under the noise of a theta map, and with a filter in front of the network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancer_jax import training
from ancer_jax.basis import Cosine, Pixels
from ancer_jax.data import load_dataset, take
from ancer_jax.models import WithFront, make_network, wiener_front
from ancer_jax.search import ThetaMap, spectral_theta
from ancer_jax.smoothing import Gaussian
from ancer_jax.training import PRESETS, TrainConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

train = functools.partial(training.train, devices=1)
DATA = take(load_dataset("fashion-mnist-subset", split="train"), np.arange(500))
TEST = load_dataset("fashion-mnist-subset")
NETWORK = make_network("small_cnn", features=(4, 8, 8), hidden=16)
MAP = spectral_theta(DATA.images, Cosine(), 0.25, theta_max=1.0)
SHORT = {"epochs": 2, "batch_size": 50, "learning_rate": 0.02, "schedule": "cosine", "drop_every": 0}


def short(method="augmentation", **changes):
    return dataclasses.replace(PRESETS[method], **(SHORT | changes))


def test_a_flat_map_in_pixels_is_theta(tmp_path):
    flat = ThetaMap(np.full((28, 28, 1), 0.25, np.float32), Pixels())
    states = [
        train(NETWORK, (DATA, TEST), short(epochs=1, **noise), out=tmp_path / str(i))
        for i, noise in enumerate(({"theta": 0.25}, {"theta_map": flat}))
    ]
    jax.tree.map(np.testing.assert_array_equal, *(state.variables for state in states))
    np.testing.assert_array_equal(states[0].history[:, :-1], states[1].history[:, :-1])


def test_a_network_learns_under_coloured_noise_behind_a_filter_that_stays_as_it_is(tmp_path):
    config = short(theta_map=MAP, front="wiener", epochs=4)
    state, front = train(NETWORK, (DATA, TEST), config, out=tmp_path), wiener_front(DATA.images, MAP.theta, Cosine())
    assert state.history[-1, 2] < 0.92 * state.history[0, 2]  # the training loss
    np.testing.assert_array_equal(state.variables["front"]["weights"], front.weights)
    np.testing.assert_array_equal(state.variables["front"]["mean"], front.mean)
    logits = WithFront(NETWORK, Cosine()).apply(state.variables, jnp.asarray(TEST.images))
    assert (np.argmax(logits, axis=1) == TEST.labels).mean() > 0.15
    other = dataclasses.replace(config, theta_map=ThetaMap(MAP.theta * 2, Cosine()))
    with pytest.raises(ValueError, match=r"theta_map is \.\.\.\(\), [0-9a-f]{8}\.\.\. there"):
        train(NETWORK, (DATA, TEST), other, out=tmp_path)


@pytest.mark.parametrize(
    "method", ["consistency", *(pytest.param(m, marks=pytest.mark.slow) for m in ("smoothadv", "macer", "volume"))]
)
def test_all_methods_train_under_coloured_noise(method, tmp_path):
    data, test = take(DATA, np.arange(50)), take(TEST, np.arange(20))
    settings = {"macer": {"copies": 4}, "smoothadv": {"attack_steps": 2}}.get(method, {})
    config = short(method, theta_map=MAP, epochs=1, **settings)
    assert np.isfinite(train(NETWORK, (data, test), config, out=tmp_path).history).all()


def test_the_config_of_a_theta_map():
    config = TrainConfig(theta_map=MAP, theta=3.0)
    assert config.theta == pytest.approx(np.exp(np.log(MAP.theta.astype(float)).mean()), rel=1e-6)
    assert config.noise_law == Gaussian(Cosine())
    assert config.settings()["theta_map"] == repr(MAP)
    assert {"theta_map", "front"}.isdisjoint(TrainConfig().settings())


def test_the_filter_is_in_the_basis_of_the_noise_or_of_cosines():
    assert TrainConfig().front_basis is None
    assert TrainConfig(front="wiener").front_basis == Cosine()
    assert TrainConfig(front="wiener", theta_map=MAP).front_basis == MAP.basis


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"front": "wiener", "norm": "l1"}, "a filter for Gaussian noise: norm must be l2"),
        ({"front": "wiener", "theta_map": ThetaMap(np.ones((4, 4, 1)))}, "needs a theta map in another basis"),
        ({"theta_map": MAP, "norm": "l1"}, "noise for l1 is in pixels"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_a_map_of_other_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the theta map is \[4, 4, 1\], the images are \[28, 28, 1\]"):
        train(NETWORK, (DATA, TEST), short(theta_map=ThetaMap(np.ones((4, 4, 1)))), out=tmp_path / "net")
