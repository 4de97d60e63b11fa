"""The losses are their papers' equations, each method improves its own objective, and training resumes to the bit."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from etils import epath

from ancer_jax import cli, training
from ancer_jax.certificates import CERTIFICATES
from ancer_jax.data import load_dataset, take
from ancer_jax.models import load_network, make_network
from ancer_jax.storage import locked
from ancer_jax.training import HISTORY, PRESETS, TrainConfig, losses

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(5, 4)) * 2
train = functools.partial(training.train, devices=1)
TRAIN, TEST = load_dataset("fashion-mnist-subset", split="train"), load_dataset("fashion-mnist-subset")


def softmax(logits):
    return scipy.special.softmax(np.asarray(logits, np.float64), axis=-1)


# --- losses


@pytest.mark.parametrize("label", range(4))
def test_losses_are_their_equations(label):
    probs = softmax(LOGITS)
    mean = probs.mean(axis=0)
    entropy = lambda p: -(p * np.log(p)).sum(axis=-1)
    crossed = -np.log(probs[:, label]).mean()
    np.testing.assert_allclose(losses.augmentation(jnp.array(LOGITS), label), crossed, rtol=1e-5)
    divergence = (mean * (np.log(mean) - np.log(probs))).sum(axis=1).mean()
    value = losses.consistency(jnp.array(LOGITS), label, weight=3.0, entropy_weight=0.25)
    np.testing.assert_allclose(value, crossed + 3 * divergence + 0.25 * entropy(mean), rtol=1e-5)
    divergence = (probs[0] * (np.log(probs[0]) - np.log(probs[1:]))).sum(axis=1).mean()
    value = losses.stability(jnp.array(LOGITS), label, weight=2.0)
    np.testing.assert_allclose(value, -np.log(probs[0, label]) + 2 * divergence, rtol=1e-5)
    np.testing.assert_allclose(losses.smoothed_loss(jnp.array(LOGITS), label), -np.log(mean[label]), rtol=1e-5)


def macer_reference(logits, label, theta, *, weight=12.0, inverse_temperature=16.0, margin=8.0):
    value = -np.log(softmax(logits).mean(axis=0)[label])
    sharp = softmax(inverse_temperature * np.asarray(logits)).mean(axis=0)
    second, first = np.sort(sharp)[-2:]
    xi = scipy.stats.norm.ppf(first) - scipy.stats.norm.ppf(second)
    if sharp.argmax() == label and xi <= margin:
        value += weight * theta / 2 * (margin - xi)
    return value


@pytest.mark.parametrize("label", range(4))
def test_macer_is_its_equation(label):
    value = losses.macer(jnp.array(LOGITS), label, 0.5)
    np.testing.assert_allclose(value, macer_reference(LOGITS, label, 0.5), rtol=1e-4)


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("label", range(4))
def test_volume_is_its_equation(label, norm):
    logits, m = np.add(LOGITS, [4, 0, 0, 0]), len(LOGITS)
    share = softmax(2.0 * logits).mean(axis=0)[label]
    p_lower = scipy.stats.beta.ppf(0.3, share * m, m - share * m + 1)
    radius = 0.5 * max(0.0, scipy.stats.norm.ppf(p_lower) if norm == "l2" else 2 * p_lower - 1)
    assert (radius > 0) == (label == 0)
    loss = functools.partial(losses.volume, certificate=CERTIFICATES[norm], inverse_temperature=2.0, alpha=0.3)
    value, slope = jax.value_and_grad(loss)(jnp.array(logits), label, 0.5, weight=3.0)
    np.testing.assert_allclose(
        value, -np.log(softmax(logits).mean(axis=0)[label]) - 3 * radius, atol=5e-3
    )  # the traced bound is a little below
    without = jax.grad(loss)(jnp.array(logits), label, 0.5, weight=0.0)
    assert np.allclose(slope, without) == (label != 0)  # nothing to gain where nothing is certified


def test_macer_of_sure_logits_is_finite_and_has_no_second_term():
    """One class with probability 1: the radius is infinite, and nothing is left to gain."""
    sure = jnp.array([[50.0, 0.0, 0.0]] * 4)
    value, gradient = jax.value_and_grad(losses.macer)(sure, 0, 0.5)
    assert value == pytest.approx(0, abs=1e-6) and np.isfinite(gradient).all()
    value, gradient = jax.value_and_grad(losses.volume)(sure, 0, 0.5, CERTIFICATES["l2"])
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_the_attack_stays_in_its_ball_and_finds_the_worst_point_of_a_linear_classifier():
    weights = jnp.array(RNG.normal(size=(6, 3)))
    x, noise = jnp.full(6, 0.5), jnp.array(RNG.normal(size=(8, 6)) * 0.1)
    apply = lambda y: y @ weights[:, :2]
    found = losses.attack(apply, x, 0, noise, epsilon=0.2, steps=20)
    away = weights[:, 1] - weights[:, 0]
    np.testing.assert_allclose(found, x + 0.2 * away / jnp.linalg.norm(away), atol=1e-3)
    assert np.linalg.norm(found - x) <= 0.2 + 1e-6
    large = losses.attack(apply, x, 0, noise, epsilon=5.0, steps=20)
    assert large.min() >= 0 and large.max() <= 1
    np.testing.assert_array_equal(losses.attack(apply, x, 0, noise, epsilon=0.0, steps=3), x)


# --- the loop


def short(method, **changes):
    settings = {"epochs": 2, "batch_size": 50, "learning_rate": 0.02, "drop_every": None, "shift": 1}
    settings |= {"macer": {"copies": 4}, "smoothadv": {"attack_steps": 2}}.get(method, {})
    return dataclasses.replace(PRESETS[method], **(settings | changes))


NETWORK = make_network("small_cnn", features=(4, 8, 8), hidden=16)
SOME = take(TRAIN, np.arange(500))


# Of the others the default suite has the equations, and benchmarks/training.py what they are worth.
_QUICK = ("augmentation",)


@pytest.mark.parametrize(
    "method", [*_QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in PRESETS if name not in _QUICK)]
)
def test_every_method_improves_its_objective_on_real_images(method, tmp_path):
    config = short(method, epochs=4, weight=1.0 if method == "macer" else PRESETS[method].weight)
    state = train(NETWORK, TRAIN, TEST, config, out=tmp_path / "net")
    history = dict(zip(HISTORY, state.history.T, strict=True))
    assert history["epoch"].tolist() == [1, 2, 3, 4]
    assert history["train_loss"][-1] < 0.9 * history["train_loss"][0]
    assert history["test_accuracy"][-1] > 0.4
    assert np.isfinite(state.history).all()


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("network", "method"),
    [
        pytest.param(NETWORK, "smoothadv", marks=pytest.mark.slow),
        (make_network("cifar_resnet20", stage_sizes=(1,), width=2), "augmentation"),
    ],
)
def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path, network, method):
    """Stopped in the middle of an epoch, and between two; parameters, momentum and batch statistics come back."""
    data, test = (
        dataclasses.replace(part, images=np.repeat(part.images, 3, axis=3)) if "ResNet" in repr(network) else part
        for part in (SOME, take(TEST, np.arange(60)))
    )
    config = short(method, epochs=3, batch_size=100, drop_every=2)
    whole = train(network, data, test, config, out=tmp_path / "whole")
    for stop in (7, 10):
        seen = []

        def progress(steps, figures, seen=seen, stop=stop):
            seen.append(steps)
            if sum(seen) >= stop:
                raise Stop

        out = tmp_path / f"stopped{stop}"
        with pytest.raises(Stop):
            train(network, data, test, config, out=out, progress=progress)
        seen.clear()
        state = train(
            network, data, test, config, out=out, progress=lambda steps, figures, seen=seen: seen.append(steps)
        )
        assert seen[0] in (5, 10) and sum(seen) == 15
        assert jax.tree.all(jax.tree.map(np.array_equal, state[:2], whole[:2]))
        np.testing.assert_array_equal(state.history[:, :-1], whole.history[:, :-1])
        lines = (out / "training.tsv").read_text().splitlines()
        assert len(lines) == 4 and lines[0] == "\t".join(HISTORY)


_BATCH_NORM = pytest.param("cifar_resnet20", 4, marks=pytest.mark.slow)


@pytest.mark.usefixtures("as_on_accelerators")
@pytest.mark.parametrize(("network", "devices"), [("small_cnn", 4), _BATCH_NORM])
def test_devices_share_a_batch(tmp_path, network, devices):
    """As one device has it, batch norm and all, up to rounding."""
    color = 3 if network == "cifar_resnet20" else 1
    data = dataclasses.replace(SOME, images=np.repeat(SOME.images, color, axis=-1))
    # One step of the deep network: rounding grows from step to step.
    data, test = take(data, np.arange(64 if color == 1 else 16)), take(data, np.arange(64, 99))
    attributes = {"features": (4, 8, 8), "hidden": 16} if color == 1 else {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    config = short("smoothadv" if color == 1 else "augmentation", epochs=2 if color == 1 else 1, batch_size=16)
    one, many = (
        train(make_network(network, **attributes), data, test, config, out=tmp_path / str(count), devices=count)
        for count in (1, devices)
    )
    for ours, theirs in zip(jax.tree.leaves(many.variables), jax.tree.leaves(one.variables), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
        assert ours.sharding.is_fully_replicated and len(ours.sharding.device_set) == devices
    np.testing.assert_allclose(many.history[:, :-1], one.history[:, :-1], rtol=1e-3)


@pytest.mark.usefixtures("as_on_accelerators")
def test_devices_that_cannot_share_a_batch_are_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 devices, got 50"):
        train(NETWORK, SOME, TEST, short("augmentation"), out=tmp_path / "net", devices=3)
    assert not (tmp_path / "net").exists()


def test_other_settings_do_not_continue_a_training(tmp_path):
    config = short("augmentation", epochs=1, batch_size=250)
    train(NETWORK, SOME, TEST, config, out=tmp_path / "net")
    for change in ({"seed": 1}, {"epochs": 2}, {"theta": 0.5}):
        ((name, value),) = change.items()
        with pytest.raises(ValueError, match=rf"{name} is {getattr(config, name)} there, {value} here"):
            train(NETWORK, SOME, TEST, dataclasses.replace(config, **change), out=tmp_path / "net")
    with pytest.raises(ValueError, match=r"data is .* there, .* here"):
        train(NETWORK, TEST, TEST, config, out=tmp_path / "net")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds something else"):
        train(NETWORK, SOME, TEST, config, out=tmp_path / "other")
    with pytest.raises(ValueError, match=r"data is .* there, .* here"):
        train(NETWORK, take(TRAIN, np.arange(500, 1000)), TEST, config, out=tmp_path / "net")
    with pytest.raises(ValueError, match=r"data is .* there, .* here"):
        train(NETWORK, SOME, take(TEST, np.arange(50)), config, out=tmp_path / "net")
    with pytest.raises(ValueError, match=r"batch_size is 600, but .* has only 500 images"):
        train(NETWORK, SOME, TEST, dataclasses.replace(config, batch_size=600), out=tmp_path / "new")
    with pytest.raises(ValueError, match="has 10 classes, the network only 9"):
        train(NETWORK.clone(num_classes=9), SOME, TEST, config, out=tmp_path / "new")
    with (
        locked(epath.Path(tmp_path / "net"), "lock-0-of-1"),
        pytest.raises(ValueError, match=r"another process is writing to .*net"),
    ):
        train(NETWORK, SOME, TEST, config, out=tmp_path / "net")


def test_an_attempt_without_an_epoch_leaves_the_folder_free(tmp_path):
    config = short("augmentation", epochs=1, batch_size=250)
    with pytest.raises(ValueError, match=r"the loss of epoch 1 is .*: a smaller learning rate may help"):
        train(NETWORK, SOME, TEST, dataclasses.replace(config, learning_rate=1e30), out=tmp_path / "net")
    assert np.isfinite(train(NETWORK, SOME, TEST, config, out=tmp_path / "net").history).all()


def test_a_training_that_was_killed_between_two_files_goes_on(tmp_path):
    config = short("augmentation", epochs=1, batch_size=250)
    (tmp_path / "training.json.0.tmp").write_text("{")
    state = train(NETWORK, SOME, TEST, config, out=tmp_path)
    table = (tmp_path / "training.tsv").read_text()
    (tmp_path / "training.tsv").rename(tmp_path / "training.tsv.0.tmp")  # the state was stored, the table was not
    again = train(NETWORK, SOME, TEST, config, out=tmp_path)
    assert (tmp_path / "training.tsv").read_text() == table
    assert jax.tree.all(jax.tree.map(np.array_equal, again[:2], state[:2]))
    for file in (path for path in (tmp_path / "state").rglob("*") if path.is_file()):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="state: cannot be read; if it is damaged, delete it") as error:
        train(NETWORK, SOME, TEST, config, out=tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "training.json").write_text('{"method": ')
    with pytest.raises(ValueError, match=r"training\.json: not the settings of a training"):
        train(NETWORK, SOME, TEST, config, out=tmp_path)


def test_presets_are_the_published_settings():
    names = ("epochs", "batch_size", "copies", "learning_rate", "weight_decay", "drop_every", "weight")
    published = {
        "augmentation": (90, 256, 1, 0.1, 1e-4, 30, 0),
        "smoothadv": (90, 256, 1, 0.1, 1e-4, 30, 0),
        "macer": (440, 64, 16, 0.01, 5e-4, 200, 12),
        "consistency": (150, 128, 2, 0.1, 1e-4, 50, 10),
        "stability": (120, 64, 2, 0.1, 1e-4, None, 6),
    }
    found = {method: tuple(getattr(preset, name) for name in names) for method, preset in PRESETS.items()}
    assert found.pop("volume") and found == published
    assert all(preset.momentum == 0.9 and preset.shift == 4 and preset.flip for preset in PRESETS.values())
    assert [method for method, preset in PRESETS.items() if preset.nesterov] == ["stability"]
    attack = PRESETS["smoothadv"]
    assert (attack.epsilon, attack.attack_steps, attack.warmup_epochs) == (0.25, 10, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"theta": 0.0}, r"theta must be in \(0, inf\), got 0"),
        ({"learning_rate": float("nan")}, r"learning_rate must be in \(0, inf\), got nan"),
        ({"momentum": -0.1}, r"momentum must be in \[0, inf\), got -0.1"),
        ({"method": "stability", "weight": 6.0}, "at least 2, got copies = 1"),
        ({"method": "consistency", "weight": 6.0}, "at least 2, got copies = 1"),
        ({"method": "macer", "norm": "l1", "weight": 1.0}, "norm must be l2"),
        ({"method": "macer"}, "macer training needs a positive weight"),
        ({"method": "smoothadv", "epsilon": 0.5}, "smoothadv training needs a positive attack_steps"),
        ({"epsilon": 0.5}, "augmentation training has no epsilon, got 0.5"),
        ({"seed": 2**31}, "seed must be in"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


def test_shifts_and_reflections_are_those_of_the_image():
    from ancer_jax.training.loop import _augment

    image = RNG.random((6, 6, 1)).astype(np.float32)
    config = TrainConfig(shift=1)
    found = np.asarray(_augment(jax.random.key(0), np.stack([image] * 200), config))
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    cuts = [padded[i : i + 6, j : j + 6] for i in range(3) for j in range(3)]
    possible = {cut.tobytes() for cut in cuts} | {np.ascontiguousarray(cut[:, ::-1]).tobytes() for cut in cuts}
    assert {one.tobytes() for one in found} == possible
    plain = _augment(jax.random.key(0), image[None], TrainConfig(shift=0, flip=False))
    np.testing.assert_array_equal(plain[0], image)


# --- the command line


def test_train_then_certify(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--epochs", "2", "--batch-size", "100", "--lr", "0.02", "--max", "300", "--sigma", "0.3", "--shift", "0"]
    flags += ["--devices", "1"]
    cli.main(["train", "--out", "net", *flags])
    assert "of 500 test images" in capsys.readouterr().out
    trained = load_network("net")
    assert (trained.name, trained.norm, trained.theta) == ("small_cnn", "l2", 0.3)
    assert trained.history["epochs"] == 2
    assert (tmp_path / "net" / "training.png").stat().st_size > 10_000
    np.savez("one.npz", images=TEST.images, labels=TEST.labels)
    before = json.loads((tmp_path / "net" / "network.json").read_text())
    cli.main(["train", "--out", "net", *flags])  # nothing is left to do
    assert json.loads((tmp_path / "net" / "network.json").read_text()) == before
    cli.main(["certify", "--classifier", "net", "--method", "fixed", "--max", "2", "--n", "50", "--n0", "10"])
    assert "fixed-0.3" in capsys.readouterr().out
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "training.json").write_text("{}")
    for arguments, message in (
        (["train", "--out", "net", *flags, "--seed", "3"], "seed is 0 there, 3 here"),
        (["train", "--out", "new", *flags, "--mean", "0"], "--mean and --std go together"),
        (["certify", "--classifier", "net", "--norm", "l1"], "net was trained with l2 noise of 0.3: --sigma is needed"),
        (["certify", "--classifier", "net/training.tsv"], "is a file: ancer-jax convert makes a folder"),
        (["certify", "--classifier", "half"], "half: its training is not finished"),
        (["train", "--out", "new", "--network", "cifar_resnet20", *flags], "takes images [n, height, width, 3], got"),
        (["train", "--out", "new", "--network", "resnet"], "there is no network 'resnet'"),
        (["train", "--out", "new", "--data", "nowhere"], "nowhere"),
        (["train", "--out", "new", "--data", "one.npz"], "it would be tested on the images of one.npz"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        error = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and message in error[-1]
