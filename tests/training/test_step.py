"""Augmentation gives shifted and mirrored copies of an image; schedules and Muon's updates are what they promise."""

import jax
import numpy as np
import pytest

from ancer_jax import devices
from ancer_jax.models import make_network
from ancer_jax.training import TrainConfig, step
from ancer_jax.training.loop import _mirrored
from ancer_jax.training.step import (
    Training,
    _optimizer,
    augment,
    compiled_train_step,
    initial_state,
    learning_rate,
    train_step,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_shifts_and_reflections_are_those_of_the_image():
    image = np.random.default_rng(0).random((6, 6, 1)).astype(np.float32)
    mirrored = np.arange(200) % 2 == 0
    found = np.asarray(augment(jax.random.key(0), np.stack([image] * 200), mirrored, TrainConfig(shift=1)))
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    cuts = [padded[i : i + 6, j : j + 6] for i in range(3) for j in range(3)]
    assert {one.tobytes() for one in found[~mirrored]} == {cut.tobytes() for cut in cuts}
    reflections = {np.ascontiguousarray(cut[:, ::-1]).tobytes() for cut in cuts}
    assert {one.tobytes() for one in found[mirrored]} == reflections
    plain = augment(jax.random.key(0), np.stack([image] * 2), np.array([False, True]), TrainConfig(shift=0))
    np.testing.assert_array_equal(plain, np.stack([image, image[:, ::-1]]))


def test_alternating_flips_mirror_each_image_in_every_other_epoch():
    config = TrainConfig(flip="alternating")
    epochs = [_mirrored(config, epoch, 10_000) for epoch in range(4)]
    assert 0.48 < epochs[0].mean() < 0.52
    np.testing.assert_array_equal(epochs[1], ~epochs[0])
    np.testing.assert_array_equal(epochs[2], epochs[0])
    np.testing.assert_array_equal(epochs[3], epochs[1])
    other = _mirrored(TrainConfig(flip="alternating", seed=1), 0, 10_000)
    assert 0.48 < (other ^ epochs[0]).mean() < 0.52


def test_random_flips_of_two_epochs_are_independent():
    first, second = (_mirrored(TrainConfig(), epoch, 10_000) for epoch in (0, 1))
    for mirrored in (first, second, first ^ second):
        assert 0.48 < mirrored.mean() < 0.52
    assert not _mirrored(TrainConfig(flip="none"), 0, 10_000).any()


@pytest.mark.parametrize("muon", [False, True])
def test_schedules_have_their_values_at_their_ends_and_in_between(muon):
    rates = {"learning_rate": 0.5, "muon_learning_rate": 0.5} | {"learning_rate" if muon else "muon_learning_rate": 3.0}

    def at(step, **settings):
        return float(learning_rate(TrainConfig(epochs=10, **rates, **settings), 20, muon=muon)(step))

    found = [at(step, schedule="drops", drop_every=4) for step in (0, 79, 80, 159, 160, 199)]
    np.testing.assert_allclose(found, [0.5, 0.5, 0.05, 0.05, 0.005, 0.005], rtol=1e-6)
    found = [at(step, schedule="cosine") for step in (0, 50, 100, 150, 200)]
    np.testing.assert_allclose(found, 0.25 * (1 + np.cos(np.pi * np.linspace(0, 1, 5))), atol=1e-6)
    found = [at(step, schedule="onecycle") for step in (0, 30, 60, 130, 200)]
    np.testing.assert_allclose(found, [0.02, 0.26, 0.5, 0.25, 0.0], atol=1e-5)
    rates_of_steps = [at(step, schedule="onecycle") for step in range(200)]
    assert np.argmax(rates_of_steps) == 60 and min(rates_of_steps) > 0


def updates_of(name, config, gradient, **attributes):
    """Parameters, and by how much the first step of the optimizer changes them."""
    training = Training(make_network(name, **attributes), config, 10, devices.device_mesh(1))
    shape = (1, 28, 28, 1) if name == "small_cnn" else (1, 32, 32, 3)
    variables, state = initial_state(training, np.zeros(shape, np.float32))
    params = variables["params"]
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda w: gradient * rng.normal(size=w.shape).astype(np.float32), params)
    updates, _ = _optimizer(training).update(gradients, state, params)
    return params, gradients, updates


@pytest.mark.parametrize(
    ("size", "network", "attributes", "hidden"),
    [
        (1e-3, "small_cnn", {"features": (4, 8, 8), "hidden": 16}, {"Conv_0", "Conv_1", "Conv_2", "Dense_0"}),
        (1e3, "cifar_resnet20", {"stage_sizes": (1, 1), "width": 4}, {"conv1", "conv2", "downsample_0"}),
    ],
)
def test_muon_updates_hidden_kernels_by_orthogonal_matrices_and_all_others_as_sgd(size, network, attributes, hidden):
    """Singular values of Muon's iteration are between 0.6 and 1.3, whatever the size of the gradient is."""
    config = TrainConfig(optimizer="muon", muon_learning_rate=0.05, learning_rate=0.3, weight_decay=0.0)
    _, gradients, updates = updates_of(network, config, size, **attributes)
    by_muon = set()
    for (path, update), gradient in zip(
        jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(gradients), strict=True
    ):
        if path[-1].key == "kernel" and path[-2].key in hidden:
            by_muon.add(path[-2].key)
            matrix = np.asarray(update).reshape(-1, update.shape[-1])
            scale = 0.05 * np.sqrt(max(1, matrix.shape[1] / matrix.shape[0]))
            values = np.linalg.svd(matrix, compute_uv=False) / scale
            assert (values > 0.6).all() and (values < 1.3).all()
            assert (matrix * gradient.reshape(matrix.shape)).sum() < 0
        else:
            np.testing.assert_allclose(update, -0.3 * gradient, rtol=1e-5)
    assert by_muon == hidden


def test_weight_decay_shrinks_muons_kernels_as_much_as_it_would_under_sgd():
    """Without a gradient, Muon shrinks a kernel in one step by what SGD's momentum adds up to in the long run."""
    config = TrainConfig(optimizer="muon", learning_rate=0.3, weight_decay=0.01, momentum=0.5)
    params, _, updates = updates_of("small_cnn", config, 0.0, features=(4, 8, 8), hidden=16)
    np.testing.assert_allclose(updates["Conv_0"]["kernel"], -0.3 * 0.01 / 0.5 * params["Conv_0"]["kernel"], rtol=1e-5)
    np.testing.assert_allclose(updates["Dense_1"]["kernel"], -0.3 * 0.01 * params["Dense_1"]["kernel"], rtol=1e-5)


def test_a_step_is_the_same_with_the_options_of_its_platform():
    """To rounding; the options are those that the installed jaxlib knows, and keep convolutions on all cores."""
    mesh, rng = devices.device_mesh(1), np.random.default_rng(0)
    training = Training(make_network("cifar_resnet20", stage_sizes=(1, 1)), TrainConfig(batch_size=4), 10, mesh)
    images = rng.random((4, 8, 8, 3)).astype(np.float32)
    batch = devices.replicate((images, np.arange(4), np.arange(4) % 2 == 0), mesh)
    arguments = (*initial_state(training, images), batch, np.int32(0), np.float32(0))
    plain, fast = train_step(*arguments, training=training), compiled_train_step("cpu")(*arguments, training=training)
    for found, expected in zip(*map(jax.tree.leaves, (fast, plain)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    program = compiled_train_step("cpu").lower(*arguments, training=training).compile().as_text()
    assert " convolution(" in program and "ROOT %conv" not in program  # one in a library's fusion would be its root


def test_options_that_jaxlib_does_not_know_are_left_out(monkeypatch):
    monkeypatch.setattr(step, "_CPU_OPTIONS", {"xla_gone": "1"})
    assert compiled_train_step.__wrapped__("cpu") is train_step
