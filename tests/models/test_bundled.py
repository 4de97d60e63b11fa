"""The networks that ship with the package: their names, files and cards."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancer_jax import Gaussian, Uniform, check_classifier, load_dataset
from ancer_jax.basis import Cosine
from ancer_jax.models import BUNDLED_BY_NORM, bundled, bundled_models, load_bundled, load_network, save_network
from ancer_jax.models.bundled import COLOURED
from ancer_jax.search import ThetaMap, save_theta_map
from ancer_jax.smoothing import make_noise

pytestmark = pytest.mark.usefixtures("quick_compilation")

NAME = BUNDLED_BY_NORM["l2"]


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A folder of its own with the files of two bundled models."""
    for file in (
        f"{NAME}.json",
        f"{NAME}.msgpack",
        *(f"{COLOURED}{suffix}" for suffix in (".json", ".msgpack", ".npz")),
    ):
        (tmp_path / file).write_bytes((bundled.WEIGHTS / file).read_bytes())
    monkeypatch.setattr(bundled, "WEIGHTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", bundled_models())
def test_a_name_says_what_the_model_is(name):
    model = load_bundled(name)
    pattern = r"(.+)-\w+-(l[12])-([\d.]+)(?:-((?!coloured|spectral)\w+))?(-coloured|-spectral)?"
    data, norm, theta, method, coloured = re.fullmatch(pattern, name).groups()
    smallest = model.theta if model.theta_map is None else model.theta_map.theta.min()
    assert (model.name, model.checkpoint.norm) == (name, norm) and smallest == pytest.approx(float(theta), rel=2e-4)
    assert bool(coloured) == (model.theta_map is not None)
    assert model.card["method"] == model.checkpoint.history["method"] == (method or "augmentation")
    assert model.card["data"].lower().replace("-", "") == data.replace("-", "")
    assert {leaf.dtype for leaf in jax.tree.leaves(model.checkpoint.variables)} == {np.dtype("float32")}
    check_classifier(model.classifier, np.zeros(model.checkpoint.image_shape, np.float32))


@pytest.mark.parametrize("name", bundled_models())
def test_a_card_tells_how_good_the_model_is_and_where_it_comes_from(name):
    card, theta_map = load_bundled(name).card, load_bundled(name).theta_map
    assert all(0.3 < card[f"{kind}_accuracy"] < 1 for kind in ("clean", "noisy")) and card["test_images"] == 10_000
    if card["certified"]:
        found = {"acr", "accuracy", "images", "method", "theta", "n", "alpha"}
        assert found == card["certified"].keys() - {"acr_tilde"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", card["date"]) and "jax" in card["versions"]
    assert card["command"].startswith(("ancer-jax train ", "ancer-jax learn-theta ", "python -m benchmarks run "))
    history = {} if theta_map is None else {**theta_map.history}
    assert not re.search(r"/(home|root|tmp|work|Users)/", json.dumps([card, history]))


@pytest.mark.parametrize("name", [*BUNDLED_BY_NORM.values(), COLOURED])
def test_the_bundled_images_get_the_accuracy_of_the_card(name):
    model, test = load_bundled(name), load_dataset("fashion-mnist-subset")
    theta_map = model.theta_map or ThetaMap(np.full((28, 28, 1), model.theta))
    noise = make_noise(model.checkpoint.norm, basis=theta_map.basis)
    perturb = jax.vmap(lambda key, x: noise.perturb(key, 0, x, jnp.asarray(theta_map.theta)))
    noisy = perturb(jax.random.split(jax.random.key(0), len(test)), test.images)
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
    assert "accuracy   0.570 clean, " in printed
    how = "(100 test images, fixed theta 0.25, n = 100,000, alpha = 0.001)"
    assert f"ACR 0.567, certified accuracy 0.570 {how}" in printed


def test_a_model_has_the_smoothed_classifier_of_its_training():
    white, coloured = load_bundled(NAME), load_bundled(COLOURED)
    assert (white.smoothed.noise, white.smoothed.theta) == (Gaussian(), 0.25)
    assert load_bundled(BUNDLED_BY_NORM["l1"]).smoothed.noise == Uniform()
    assert coloured.smoothed.noise == Gaussian(Cosine())
    np.testing.assert_array_equal(coloured.smoothed.theta, coloured.theta_map.theta)
    with pytest.raises(ValueError, match=r"was trained with a theta map: take model\.smoothed"):
        _ = coloured.theta  # one number would be white noise


def test_the_card_of_a_coloured_model_says_so():
    noise = "noise      l2, theta 0.25 to 1, geometric mean 0.7589, basis cosine"
    assert f"  {noise}\n" in str(load_bundled(COLOURED)) and "ACR-tilde" in str(load_bundled(COLOURED))


@pytest.mark.parametrize("name", [NAME, COLOURED])
def test_a_bundled_model_can_be_stored_like_any_other(tmp_path, name):
    checkpoint = load_bundled(name).checkpoint
    save_network(checkpoint, tmp_path / "net")
    copy = load_network(tmp_path / "net")
    assert (copy.norm, copy.theta, copy.history) == (checkpoint.norm, checkpoint.theta, checkpoint.history)
    assert copy.theta_map == checkpoint.theta_map
    if copy.theta_map is not None:
        assert copy.theta_map.history == checkpoint.theta_map.history
    x = np.random.default_rng(0).random((2, 28, 28, 1), np.float32)
    np.testing.assert_array_equal(copy.classifier(x), checkpoint.classifier(x))


@pytest.mark.parametrize("theta", [None, 0.7], ids=["gone", "another"])
def test_a_damaged_theta_map_is_one_line(weights, theta):
    file = weights / f"{COLOURED}.npz"
    file.unlink() if theta is None else save_theta_map(ThetaMap(np.full((28, 28, 1), theta), Cosine()), file)
    with pytest.raises(ValueError, match=rf"the files of the bundled model {COLOURED} are damaged .*: install again"):
        load_bundled(COLOURED)


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
