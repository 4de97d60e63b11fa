"""Networks by name, and trained networks on disk: a folder with the variables (orbax) and their description."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ancer_jax._messages import did_you_mean, first_line
from ancer_jax.basis import read_basis
from ancer_jax.models.cnn import SmallCNN
from ancer_jax.models.efficientnet import EfficientNetLite0
from ancer_jax.models.front import WithFront
from ancer_jax.models.resnet import IMAGENET_MEAN, IMAGENET_STD, Bottleneck, ResNet
from ancer_jax.models.wide_resnet import WideResNet
from ancer_jax.search.theta_map import ThetaMap, load_theta_map, save_theta_map
from ancer_jax.smoothing.classifier import Classifier, from_linen
from ancer_jax.storage import absolute, write_file

NETWORKS: dict[str, Any] = {
    "small_cnn": SmallCNN(),
    "cifar_resnet20": ResNet((3, 3, 3), width=16),
    "cifar_resnet110": ResNet((18, 18, 18), width=16),
    "cifar_resnet18": ResNet((2, 2, 2, 2)),
    "ancer_resnet18": ResNet((2, 2, 2, 2), stem="imagenet", stem_norm=False),
    "wrn_40_2": WideResNet(),
    "imagenet_resnet50": ResNet(
        (3, 4, 6, 3), Bottleneck, stem="imagenet", num_classes=1000, mean=IMAGENET_MEAN, std=IMAGENET_STD
    ),
    "efficientnet_lite0": EfficientNetLite0(),
}
_IMAGE_SHAPES = {"small_cnn": (28, 28, 1), "imagenet_resnet50": (224, 224, 3), "efficientnet_lite0": (224, 224, 3)}
_INFO, _VARIABLES, _THETA_MAP = "network.json", "variables", "theta_map.npz"
# In a folder without `network.json`: unfinished training, which stores its network there at the end.
TRAINING_SETTINGS = "training.json"


def make_network(name: str, *, front: Mapping[str, Any] | None = None, **changes: Any) -> Any:
    """The network of that name, with changed attributes (`num_classes`, `mean`, `std`, `compute_dtype`, ...).

    With a `front`, the description of a basis (`Basis.describe`), it is a `WithFront`.

    Raises:
      ValueError: if there is no such network or attribute, or a value is out of range.
    """
    if name not in NETWORKS:
        hint = did_you_mean(name, NETWORKS, 0.3)
        raise ValueError(f"there is no network {name!r}, only {', '.join(NETWORKS)}{hint}")
    network = NETWORKS[name]
    if unknown := changes.keys() - {field.name for field in dataclasses.fields(network)}:
        raise ValueError(f"the network {name!r} has no attribute {min(unknown)!r}")
    network = network.clone(**changes)
    if network.num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {network.num_classes}")
    if not (np.isfinite(network.mean).all() and np.isfinite(network.std).all() and np.min(network.std) > 0):
        raise ValueError(f"std must be positive, mean and std finite, got {network.mean} and {network.std}")
    if network.compute_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"compute_dtype must be float32 or bfloat16, got {network.compute_dtype!r}")
    return network if front is None else WithFront(network, read_basis(front))


def image_shape(name: str) -> tuple[int, int, int]:
    """Height, width and channels of the images in the usual data set of the network of that name."""
    return _IMAGE_SHAPES.get(name, (32, 32, 3))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A trained network and what is known of its training.

    Attributes:
      name, attributes: the arguments of `make_network`.
      variables: parameters and batch statistics.
      image_shape: height, width and channels of the images that the network takes.
      norm, theta: the noise it was trained with: "l2" or "l1", and the noise parameter, None if it is not known.
      theta_map: instead of one theta, that of each coefficient; theta is their geometric mean then.
      history: how it was trained or where it was converted from, as JSON values.
      classes: names of the classes in the order of their labels; () if they are not known.
    """

    name: str
    attributes: Mapping[str, Any]
    variables: Any = dataclasses.field(repr=False)
    image_shape: tuple[int, int, int]
    norm: str = "l2"
    theta: float | None = None
    history: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    classes: tuple[str, ...] = ()
    theta_map: ThetaMap | None = None

    @property
    def network(self) -> nn.Module:
        """The Flax module."""
        return make_network(self.name, **self.attributes)

    @property
    def classifier(self) -> Classifier:
        """The base classifier, in evaluation mode."""
        return from_linen(self.network, self.variables, num_classes=self.network.num_classes)


def save_network(checkpoint: Checkpoint, path: epath.PathLike, *, new: bool = True) -> None:
    """Store a network in a new folder, or with `new=False` in one that may hold other files.

    Raises:
      ValueError: if a folder that must be new is not empty, or theta or the theta map is no noise for such images.
      OSError: if the folder cannot be written.
    """
    import orbax.checkpoint as ocp

    path = absolute(path)
    if checkpoint.theta is not None and not 0 < checkpoint.theta < math.inf:
        raise ValueError(f"theta must be positive and finite, got {checkpoint.theta}")
    theta_map, shape = checkpoint.theta_map, tuple(checkpoint.image_shape)
    if theta_map is not None and theta_map.theta.shape != shape:
        raise ValueError(f"the theta map must be {list(shape)} as the images are, got {list(theta_map.theta.shape)}")
    if new and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists already: a network is stored in a new folder")
    path.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / _VARIABLES, checkpoint.variables, force=True)
    if jax.process_index() == 0:
        if checkpoint.theta_map is not None:
            save_theta_map(checkpoint.theta_map, path / _THETA_MAP)
        write_file(path / _INFO, f"{json.dumps(describe(checkpoint), indent=2)}\n".encode())


def is_network(path: epath.PathLike) -> bool:
    """Whether there is a network in the folder."""
    return (epath.Path(path) / _INFO).exists()


def load_network(path: epath.PathLike) -> Checkpoint:
    """The network that `save_network` stored in a folder.

    Raises:
      ValueError: if there is none, or its files are damaged.
    """
    import orbax.checkpoint as ocp

    path = absolute(path)
    if not is_network(path):
        raise ValueError(f"{path} is not the folder of a network: there is no {_INFO}")
    try:
        checkpoint, digests = read_description(json.loads((path / _INFO).read_text()))
        network = checkpoint.network
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path / _INFO}: not the description of a network ({error})") from None
    inputs = jax.ShapeDtypeStruct((1, *checkpoint.image_shape), jnp.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), inputs)
    try:
        if not (path / _VARIABLES / "manifest.ocdbt").exists():
            raise ValueError("files are missing")
        with ocp.StandardCheckpointer() as checkpointer:
            _check_shapes(checkpointer.metadata(path / _VARIABLES).item_metadata, shapes)
            variables = jax.tree.map(np.asarray, checkpointer.restore(path / _VARIABLES, shapes))
        if hash_variables(variables) != digests["variables"]:
            raise ValueError(f"its values are not those that {_INFO} describes")
    except Exception as error:  # orbax raises many types
        what = "damaged, or of another network"
        raise ValueError(f"{path / _VARIABLES}: {what} ({first_line(error)[:200]})") from None
    theta_map = read_theta_map(path / _THETA_MAP, digests["theta_map"])
    return dataclasses.replace(checkpoint, variables=variables, theta_map=theta_map)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint as JSON values, with hashes of its variables and its theta map in place of these."""
    info = dataclasses.asdict(dataclasses.replace(checkpoint, variables=None, theta_map=None))
    theta_map = checkpoint.theta_map and checkpoint.theta_map.digest
    return info | {"variables": hash_variables(checkpoint.variables), "theta_map": theta_map}


def read_description(description: Mapping[str, Any]) -> tuple[Checkpoint, dict[str, str | None]]:
    """The checkpoint that `describe` described, without its variables and its theta map, and the hashes of these."""
    info = {**description, **{name: tuple(description[name]) for name in ("image_shape", "classes")}}
    info["attributes"] = {k: tuple(v) if isinstance(v, list) else v for k, v in info["attributes"].items()}
    digests = {"variables": info.pop("variables"), "theta_map": info.pop("theta_map", None)}
    if digests["theta_map"] is None and info["history"].get("theta_map"):
        raise ValueError("it was trained with a theta map, whose hash is missing")
    return Checkpoint(variables=None, **info), digests


def read_theta_map(path: epath.PathLike, digest: str | None) -> ThetaMap | None:
    """The theta map of that hash in the file beside a network, or None if it has none; ValueError if it is another."""
    if digest is None:
        return None
    theta_map = load_theta_map(path)
    if theta_map.digest != digest:
        raise ValueError(f"{path} is not the theta map of the network's training")
    return theta_map


def _leaves(tree) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def hash_variables(variables: Any) -> str:
    """Hash of the names and values of all variables."""
    digest = hashlib.sha256()
    for name, leaf in sorted(_leaves(variables).items()):
        digest.update(name.encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _check_shapes(stored, shapes) -> None:
    found, wanted = ({name: leaf.shape for name, leaf in _leaves(tree).items()} for tree in (stored, shapes))
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise ValueError(f"{name} has the shape {found.get(name)}, the network's is {wanted.get(name)}")
