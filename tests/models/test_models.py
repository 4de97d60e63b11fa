"""Networks by name, and networks on disk; test_torch_import.py compares the networks with PyTorch's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ancer_jax import Classifier, check_classifier
from ancer_jax.models.checkpoints import NETWORKS, Checkpoint, image_shape, load_network, make_network, save_network
from ancer_jax.smoothing.classifier import _takes_maxima_of_bfloat16

pytestmark = pytest.mark.usefixtures("quick_compilation")


def small(seed=0):
    network = make_network("small_cnn", num_classes=3, features=(2, 2, 2), hidden=4)
    variables = network.init(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)))
    return Checkpoint(
        "small_cnn", {"num_classes": 3, "features": (2, 2, 2), "hidden": 4}, variables, (8, 8, 1), "l1", 0.5, {"a": [1]}
    )


def test_a_stored_network_is_loaded_unchanged(tmp_path):
    checkpoint = small()
    save_network(checkpoint, tmp_path / "net")
    found = load_network(tmp_path / "net")
    assert jax.tree.all(jax.tree.map(np.array_equal, found.variables, checkpoint.variables))
    assert found.network == checkpoint.network
    assert (found.norm, found.theta, found.history, found.image_shape) == ("l1", 0.5, {"a": [1]}, (8, 8, 1))
    x = np.random.default_rng(0).random((2, 8, 8, 1), np.float32)
    np.testing.assert_array_equal(found.classifier(x), checkpoint.classifier(x))
    with pytest.raises(ValueError, match="exists already: a network is stored in a new folder"):
        save_network(checkpoint, tmp_path / "net")


def test_damaged_networks_are_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"not the folder of a network: there is no network\.json"):
        load_network(tmp_path)
    for case in ("text", "name", "attribute", "shape", "variables", "missing", "numbers"):
        folder = tmp_path / case
        save_network(small(), folder)
        info = json.loads((folder / "network.json").read_text())
        if case == "name":
            info["name"] = "small_cnm"
        elif case == "attribute":
            info["attributes"]["depth"] = 3
        elif case == "shape":
            info["attributes"]["hidden"] = 5
        elif case == "missing":
            (folder / "variables" / "manifest.ocdbt").unlink()
        elif case == "numbers":
            info["variables"] = "0" * 64
        (folder / "network.json").write_text("{" if case == "text" else json.dumps(info))
        if case == "variables":
            for file in sorted((folder / "variables").rglob("*")):
                if file.is_file():
                    file.write_bytes(b"")
        with pytest.raises(
            ValueError, match=r"not the description of a network|damaged, or of another network"
        ) as error:
            load_network(folder)
        assert "\n" not in str(error.value)


def test_networks_by_name():
    with pytest.raises(ValueError, match=r"no network 'resnet110'.*did you mean 'cifar_resnet110'\?"):
        make_network("resnet110")
    with pytest.raises(ValueError, match="has no attribute 'width'"):
        make_network("small_cnn", width=3)
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        make_network("small_cnn", num_classes=1)
    with pytest.raises(ValueError, match="compute_dtype must be float32 or bfloat16"):
        make_network("small_cnn", compute_dtype="float16")
    with pytest.raises(ValueError, match=r"takes images \[n, height, width, 3\], got \[1, 8, 8, 1\]"):
        jax.eval_shape(make_network("cifar_resnet20").init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


# Fewer blocks and channels than the networks have; the blocks are the same.
_SHORT = {name: {"stage_sizes": (1, 1, 1), "width": 4} for name in ("cifar_resnet20", "cifar_resnet110")}
_SHORT |= {
    name: {"stage_sizes": (1, 1, 1, 1), "width": 4}
    for name in ("cifar_resnet18", "ancer_resnet18", "imagenet_resnet50")
}
_SHORT["wrn_40_2"] = {"depth": 10, "widen_factor": 1}


# Two take long to compile; with so few blocks, the third is cifar_resnet20.
_SLOW = ("efficientnet_lite0", "imagenet_resnet50", "cifar_resnet110")


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_no_network_takes_maxima_of_bfloat16(name):
    """Those that some versions of jaxlib get wrong, for which `check_classifier` would refuse it."""
    network = make_network(name, num_classes=3, compute_dtype="bfloat16", **_SHORT.get(name, {}))
    x = np.zeros(image_shape(name), np.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), x[None])
    assert "bf16" in str(jax.make_jaxpr(network.apply)(variables, x[None]))
    assert not _takes_maxima_of_bfloat16(Classifier(network.apply, variables, 3), x)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in _SLOW else name for name in sorted(NETWORKS)]
)
def test_every_network_is_a_sound_classifier(name):
    """Evaluation uses stored batch statistics, training changes them, and logits are float32 in either dtype."""
    attributes = {"num_classes": 3, **_SHORT.get(name, {})}
    shape = (48, 48, 3) if NETWORKS[name].num_classes == 1000 or name == "ancer_resnet18" else image_shape(name)
    x = np.random.default_rng(0).random(shape, np.float32)
    network = make_network(name, **attributes)
    variables = jax.jit(network.init)(jax.random.key(0), x[None])
    assert {leaf.dtype for leaf in flatten_dict(variables).values()} == {jnp.dtype("float32")}
    check_classifier(Checkpoint(name, attributes, variables, shape).classifier, x)
    wide, narrow = (
        jax.jit(make_network(name, **attributes, compute_dtype=dtype).apply)(variables, x[None])
        for dtype in ("float32", "bfloat16")
    )
    assert wide.dtype == narrow.dtype == jnp.float32
    difference = np.abs(wide - narrow).max() / np.abs(wide).max()
    assert 1e-5 < difference < 0.1
    assert ("batch_stats" in variables) == (name != "small_cnn")
    if "batch_stats" in variables:
        train = lambda batch: network.apply(variables, batch, train=True, mutable=["batch_stats"])
        _, changed = jax.jit(train)(np.stack([x, x[::-1] ** 2]))
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), changed["batch_stats"], variables["batch_stats"])
        assert jax.tree.all(moved)


@pytest.mark.parametrize("name", ["mean", "std"])
def test_the_small_network_refuses_a_normalisation_of_other_channels(name):
    network = make_network("small_cnn", **{name: (0.4, 0.5, 0.6)})
    with pytest.raises(ValueError, match=f"{name} must be one number or 1, one for each channel, got"):
        jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
