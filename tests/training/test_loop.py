"""Every method improves its objective, and training resumes to the same bits."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from etils import epath

from ancer_jax import training
from ancer_jax.data import load_dataset, take
from ancer_jax.models import make_network
from ancer_jax.storage import locked
from ancer_jax.training import HISTORY, PRESETS

pytestmark = pytest.mark.usefixtures("quick_compilation")

train = functools.partial(training.train, devices=1)
TRAIN, TEST = load_dataset("fashion-mnist-subset", split="train"), load_dataset("fashion-mnist-subset")


def short(method, **changes):
    settings = {"epochs": 2, "batch_size": 50, "learning_rate": 0.02, "schedule": "cosine", "drop_every": 0, "shift": 1}
    settings |= {"macer": {"copies": 4}, "smoothadv": {"attack_steps": 2}}.get(method, {})
    return dataclasses.replace(PRESETS[method], **(settings | changes))


NETWORK = make_network("small_cnn", features=(4, 8, 8), hidden=16)
SOME = take(TRAIN, np.arange(500))


# For the other methods, the default suite tests the equations, and benchmarks/claims/training.py measures the gain.
_QUICK = ("augmentation",)


@pytest.mark.parametrize(
    "method", [*_QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in PRESETS if name not in _QUICK)]
)
def test_every_method_improves_its_objective_on_real_images(method, tmp_path):
    # The published weight and the published radius of the attack are too large for so small a network and few epochs.
    config = short(method, epochs=4, **{"macer": {"weight": 1.0}, "smoothadv": {"epsilon": 0.1}}.get(method, {}))
    state = train(NETWORK, (TRAIN, TEST), config, out=tmp_path / "net")
    history = dict(zip(HISTORY, state.history.T, strict=True))
    assert history["epoch"].tolist() == [1, 2, 3, 4]
    assert history["train_loss"][-1] < 0.9 * history["train_loss"][0]
    assert history["test_accuracy"][-1] > 0.4
    assert np.isfinite(state.history).all()


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("network", "method", "recipe"),
    [
        pytest.param(NETWORK, "smoothadv", {"schedule": "drops", "drop_every": 2}, marks=pytest.mark.slow),
        (make_network("cifar_resnet20", stage_sizes=(1,), width=2), "augmentation", {}),
        (NETWORK, "augmentation", {"optimizer": "muon", "schedule": "onecycle", "flip": "alternating"}),
    ],
)
def test_a_stopped_training_resumes_to_the_same_bits(tmp_path, network, method, recipe):
    """Stopped in the middle of an epoch, and between two; parameters, momentum and batch statistics come back."""
    data, test = (
        dataclasses.replace(part, images=np.repeat(part.images, 3, axis=3)) if "ResNet" in repr(network) else part
        for part in (SOME, take(TEST, np.arange(60)))
    )
    config = short(method, epochs=3, batch_size=100, **recipe)
    whole = train(network, (data, test), config, out=tmp_path / "whole")
    for stop in (7, 10):
        seen = []

        def progress(steps, figures, seen=seen, stop=stop):
            seen.append(steps)
            if sum(seen) >= stop:
                raise Stop

        out = tmp_path / f"stopped{stop}"
        with pytest.raises(Stop):
            train(network, (data, test), config, out=out, progress=progress)
        seen.clear()
        state = train(
            network, (data, test), config, out=out, progress=lambda steps, figures, seen=seen: seen.append(steps)
        )
        assert seen[0] in (5, 10) and sum(seen) == 15
        assert jax.tree.all(jax.tree.map(np.array_equal, state[:2], whole[:2]))
        np.testing.assert_array_equal(state.history[:, :-1], whole.history[:, :-1])
        lines = (out / "training.tsv").read_text().splitlines()
        assert len(lines) == 4 and lines[0] == "\t".join(HISTORY)


_BATCH_NORM = pytest.param("cifar_resnet20", 4, marks=pytest.mark.slow)


@pytest.mark.usefixtures("as_on_accelerators")
@pytest.mark.parametrize(("network", "devices"), [("small_cnn", 4), _BATCH_NORM])
def test_a_batch_is_sharded_over_devices(tmp_path, network, devices):
    """Parameters, batch statistics and history are those of one device, up to rounding."""
    color = 3 if network == "cifar_resnet20" else 1
    data = dataclasses.replace(SOME, images=np.repeat(SOME.images, color, axis=-1))
    # Only one step of the deep network, because rounding errors grow from step to step.
    data, test = take(data, np.arange(64 if color == 1 else 16)), take(data, np.arange(64, 99))
    attributes = {"features": (4, 8, 8), "hidden": 16} if color == 1 else {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    config = short("smoothadv" if color == 1 else "augmentation", epochs=2 if color == 1 else 1, batch_size=16)
    one, many = (
        train(make_network(network, **attributes), (data, test), config, out=tmp_path / str(count), devices=count)
        for count in (1, devices)
    )
    for ours, theirs in zip(jax.tree.leaves(many.variables), jax.tree.leaves(one.variables), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
        assert ours.sharding.is_fully_replicated and len(ours.sharding.device_set) == devices
    np.testing.assert_allclose(many.history[:, :-1], one.history[:, :-1], rtol=1e-3)


@pytest.mark.usefixtures("as_on_accelerators")
def test_a_batch_that_cannot_be_sharded_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 devices, got 50"):
        train(NETWORK, (SOME, TEST), short("augmentation"), out=tmp_path / "net", devices=3)
    assert not (tmp_path / "net").exists()


def test_other_settings_do_not_continue_a_training(tmp_path):
    config = short("augmentation", epochs=1, batch_size=250)
    train(NETWORK, (SOME, TEST), config, out=tmp_path / "net")
    for change in ({"seed": 1}, {"epochs": 2}, {"theta": 0.5}):
        ((name, value),) = change.items()
        with pytest.raises(ValueError, match=rf"{name} is {getattr(config, name)} there, {value} here"):
            train(NETWORK, (SOME, TEST), dataclasses.replace(config, **change), out=tmp_path / "net")
    with pytest.raises(ValueError, match=r"data is .* there, .* here"):
        train(NETWORK, (TEST, TEST), config, out=tmp_path / "net")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds something else"):
        train(NETWORK, (SOME, TEST), config, out=tmp_path / "other")
    with pytest.raises(ValueError, match=r"data is .* there, .* here"):
        train(NETWORK, (take(TRAIN, np.arange(500, 1000)), TEST), config, out=tmp_path / "net")
    with pytest.raises(ValueError, match=r"data is .* there, .* here"):
        train(NETWORK, (SOME, take(TEST, np.arange(50))), config, out=tmp_path / "net")
    with pytest.raises(ValueError, match=r"batch_size is 600, but .* has only 500 images"):
        train(NETWORK, (SOME, TEST), dataclasses.replace(config, batch_size=600), out=tmp_path / "new")
    with pytest.raises(ValueError, match="has 10 classes, the network only 9"):
        train(NETWORK.clone(num_classes=9), (SOME, TEST), config, out=tmp_path / "new")
    with (
        locked(epath.Path(tmp_path / "net"), "lock-0-of-1"),
        pytest.raises(ValueError, match=r"another process is writing to .*net"),
    ):
        train(NETWORK, (SOME, TEST), config, out=tmp_path / "net")


def test_an_attempt_that_finished_no_epoch_leaves_the_folder_free(tmp_path):
    config = short("augmentation", epochs=1, batch_size=250)
    with pytest.raises(ValueError, match=r"the loss of epoch 1 is .*: a smaller learning rate may help"):
        train(NETWORK, (SOME, TEST), dataclasses.replace(config, learning_rate=1e30), out=tmp_path / "net")
    assert np.isfinite(train(NETWORK, (SOME, TEST), config, out=tmp_path / "net").history).all()


def test_a_training_that_was_killed_between_two_files_resumes(tmp_path):
    config = short("augmentation", epochs=1, batch_size=250)
    (tmp_path / "training.json.0.tmp").write_text("{")
    state = train(NETWORK, (SOME, TEST), config, out=tmp_path)
    table = (tmp_path / "training.tsv").read_text()
    (tmp_path / "training.tsv").rename(tmp_path / "training.tsv.0.tmp")  # as if only the state had been stored
    again = train(NETWORK, (SOME, TEST), config, out=tmp_path)
    assert (tmp_path / "training.tsv").read_text() == table
    assert jax.tree.all(jax.tree.map(np.array_equal, again[:2], state[:2]))
    for file in (path for path in (tmp_path / "state").rglob("*") if path.is_file()):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="state: cannot be read; if it is damaged, delete it") as error:
        train(NETWORK, (SOME, TEST), config, out=tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "training.json").write_text('{"method": ')
    with pytest.raises(ValueError, match=r"training\.json: not settings of training"):
        train(NETWORK, (SOME, TEST), config, out=tmp_path)
