"""The networks that ship with the package: their names, files and cards."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancer_jax import check_classifier, load_dataset
from ancer_jax.models import BUNDLED_BY_NORM, bundled, bundled_models, load_bundled, load_network, save_network
from ancer_jax.smoothing import make_noise

pytestmark = pytest.mark.usefixtures("quick_compilation")

NAME = BUNDLED_BY_NORM["l2"]


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A folder of its own with the files of one bundled model."""
    for suffix in (".json", ".msgpack"):
        (tmp_path / f"{NAME}{suffix}").write_bytes((bundled.WEIGHTS / f"{NAME}{suffix}").read_bytes())
    monkeypatch.setattr(bundled, "WEIGHTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", bundled_models())
def test_a_name_says_what_the_model_is(name):
    model = load_bundled(name)
    data, norm, theta, method = re.fullmatch(r"(.+)-\w+-(l[12])-([\d.]+)(?:-(\w+))?", name).groups()
    assert (model.name, model.checkpoint.norm, model.theta) == (name, norm, float(theta))
    assert model.card["method"] == model.checkpoint.history["method"] == (method or "augmentation")
    assert model.card["data"].lower().replace("-", "") == data.replace("-", "")
    assert {leaf.dtype for leaf in jax.tree.leaves(model.checkpoint.variables)} == {np.dtype("float32")}
    check_classifier(model.classifier, np.zeros(model.checkpoint.image_shape, np.float32))


@pytest.mark.parametrize("name", bundled_models())
def test_a_card_tells_how_good_the_model_is_and_where_it_comes_from(name):
    card = load_bundled(name).card
    assert all(0.3 < card[f"{kind}_accuracy"] < 1 for kind in ("clean", "noisy")) and card["test_images"] == 10_000
    if card["certified"]:
        assert {"acr", "accuracy", "images", "method", "theta", "n", "alpha"} == card["certified"].keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", card["date"]) and "jax" in card["versions"]
    assert card["command"].startswith(("ancer-jax train ", "python -m benchmarks run "))
    assert not re.search(r"/(home|root|tmp|work|Users)/", json.dumps(card))


@pytest.mark.parametrize("name", BUNDLED_BY_NORM.values())
def test_the_bundled_images_get_the_accuracy_of_the_card(name):
    model, test = load_bundled(name), load_dataset("fashion-mnist-subset")
    key, noise = jax.random.key(0), make_noise(model.checkpoint.norm)
    noisy = test.images + noise.sample(key, jnp.full(test.images.shape, model.theta))
    for kind, images in (("clean", test.images), ("noisy", noisy)):
        accuracy = (np.asarray(model.classifier(images)).argmax(-1) == test.labels).mean()
        # 500 of the 10,000 images: four standard errors.
        assert abs(accuracy - model.card[f"{kind}_accuracy"]) < 4 * 0.33 / np.sqrt(500)


def test_every_norm_has_a_model_for_the_bundled_images():
    assert bundled_models() == tuple(sorted(bundled_models()))
    for norm, name in BUNDLED_BY_NORM.items():
        checkpoint = load_bundled(name).checkpoint
        assert (checkpoint.norm, checkpoint.image_shape) == (norm, (28, 28, 1))


def test_a_printed_model_shows_its_card(weights):
    path = weights / f"{NAME}.json"
    description = json.loads(path.read_text())
    assert str(load_bundled(NAME)).splitlines()[:3] == [
        NAME,
        "  network    small_cnn, images 28 x 28 x 1, 10 classes",
        "  noise      l2, theta 0.25",
    ]
    description["card"] |= {"clean_accuracy": 0.57, "test_images": 100}  # 0.57 is below 57/100 as a float
    description["card"]["certified"] = {"acr": 0.5678, "accuracy": 0.57, "images": 100, "method": "fixed"}
    description["card"]["certified"] |= {"theta": 0.25, "n": 100_000, "alpha": 0.001}
    path.write_text(json.dumps(description))
    printed = str(load_bundled(NAME))
    assert "accuracy   0.570; under noise " in printed
    assert "ACR 0.567, accuracy 0.570 (100 test images, fixed theta 0.25, n = 100,000, alpha = 0.001)" in printed


def test_a_bundled_model_can_be_stored_like_any_other(tmp_path):
    checkpoint = load_bundled(NAME).checkpoint
    save_network(checkpoint, tmp_path / "net")
    copy = load_network(tmp_path / "net")
    assert (copy.norm, copy.theta, copy.history) == (checkpoint.norm, checkpoint.theta, checkpoint.history)
    x = np.random.default_rng(0).random((2, 28, 28, 1), np.float32)
    np.testing.assert_array_equal(copy.classifier(x), checkpoint.classifier(x))


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "gone", "no card", "not JSON", "another network"])
def test_damaged_files_are_one_line(weights, damage):
    variables, card = weights / f"{NAME}.msgpack", weights / f"{NAME}.json"
    whole = variables.read_bytes()
    if damage == "gone":
        variables.unlink()
    elif damage in ("no card", "not JSON"):
        card.write_text("{}" if damage == "no card" else "{")
    elif damage == "another network":
        card.write_text(card.read_text().replace('"small_cnn"', '"cnn"'))
    else:
        middle = len(whole) // 2
        changed = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        variables.write_bytes({"cut": whole[:-1], "changed": changed, "empty": b""}[damage])
    with pytest.raises(
        ValueError, match=f"the files of the bundled model {NAME} are damaged .*: install again"
    ) as error:
        load_bundled(NAME)
    assert "\n" not in str(error.value)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(ValueError, match=r"no bundled model 'l2', only .*fashion-mnist-cnn-l2-0\.25"):
        load_bundled("l2")
    with pytest.raises(ValueError, match=r"; did you mean 'fashion-mnist-cnn-l1-0\.5'\?"):
        load_bundled("fashion-mnist-cnn-l1")
