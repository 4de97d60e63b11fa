"""Training under the noise of a theta map, and with a filter in front of the network."""

import dataclasses
import functools

import jax
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
    network, front = WithFront(NETWORK, Cosine()), wiener_front(DATA.images, MAP.theta, Cosine())
    config = short(theta_map=MAP, epochs=4)
    state = train(network, (DATA, TEST), config, out=tmp_path, front=front)
    assert state.history[-1, 2] < 0.92 * state.history[0, 2]  # the training loss
    np.testing.assert_array_equal(state.variables["front"]["weights"], front.weights)
    np.testing.assert_array_equal(state.variables["front"]["mean"], front.mean)
    other = dataclasses.replace(config, theta_map=ThetaMap(MAP.theta * 2, Cosine()))
    with pytest.raises(ValueError, match="theta_map is ThetaMap"):
        train(network, (DATA, TEST), other, out=tmp_path, front=front)


@pytest.mark.parametrize("method", ["smoothadv", "macer", "consistency", "volume"])
def test_all_methods_train_under_coloured_noise(method, tmp_path):
    data, test = take(DATA, np.arange(50)), take(TEST, np.arange(20))
    settings = {"macer": {"copies": 4}, "smoothadv": {"attack_steps": 2}}.get(method, {})
    config = short(method, theta_map=MAP, epochs=1, **settings)
    assert np.isfinite(train(NETWORK, (data, test), config, out=tmp_path).history).all()


def test_the_config_of_a_theta_map():
    config = TrainConfig(theta_map=MAP, theta=3.0)
    assert config.theta == pytest.approx(np.exp(np.log(MAP.theta.astype(float)).mean()), rel=1e-6)
    assert config.noise_law == Gaussian(Cosine())
    assert config.settings()["theta_map"] == repr(MAP) and TrainConfig().settings()["theta_map"] is None
    with pytest.raises(ValueError, match="basis"):
        _ = TrainConfig(theta_map=MAP, norm="l1").noise_law


@pytest.mark.parametrize(
    ("network", "front", "changes", "message"),
    [
        (NETWORK, wiener_front(DATA.images, 0.25, Cosine()), {}, "a WithFront network needs a front of its basis"),
        (WithFront(NETWORK, Cosine()), None, {}, "a WithFront network needs a front of its basis"),
        (WithFront(NETWORK, Pixels()), wiener_front(DATA.images, 0.25, Cosine()), {}, "a front of its basis"),
        (NETWORK, None, {"theta_map": ThetaMap(np.ones((4, 4, 1)))}, r"the theta map is \[4, 4, 1\], the images are"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, network, front, changes, message):
    with pytest.raises(ValueError, match=message):
        train(network, (DATA, TEST), short(**changes), out=tmp_path / "net", front=front)
