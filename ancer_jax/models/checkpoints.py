"""Networks by name, and trained ones on disk: a folder with orbax's variables and a `network.json` that says what they
are.
"""

import dataclasses
import difflib
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

from ancer_jax.classifiers import Classifier, from_linen
from ancer_jax.models.cnn import SmallCNN
from ancer_jax.models.efficientnet import EfficientNetLite0
from ancer_jax.models.resnet import IMAGENET_MEAN, IMAGENET_STD, Bottleneck, ResNet
from ancer_jax.models.wide_resnet import WideResNet
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
_INFO, _VARIABLES = "network.json", "variables"


def make_network(name: str, **changes: Any) -> Any:
    """The network of that name, with other attributes if asked (`num_classes`, `mean`, `std`, `compute_dtype`).

    Raises:
      ValueError: if there is no such network or attribute.
    """
    if name not in NETWORKS:
        near = difflib.get_close_matches(name, NETWORKS, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no network {name!r}, only {', '.join(NETWORKS)}{hint}")
    network = NETWORKS[name]
    fields = {field.name for field in dataclasses.fields(network)}
    if unknown := set(changes) - fields:
        raise ValueError(f"the network {name!r} has no attribute {min(unknown)!r}")
    network = network.clone(**changes)
    if network.num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {network.num_classes}")
    if not (np.isfinite(network.mean).all() and np.isfinite(network.std).all() and np.min(network.std) > 0):
        raise ValueError(f"std must be positive, mean and std finite, got {network.mean} and {network.std}")
    if network.compute_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"compute_dtype must be float32 or bfloat16, got {network.compute_dtype!r}")
    return network


def image_shape(name: str) -> tuple[int, int, int]:
    """Height, width and channels of the images that the network of that name is usually given."""
    return _IMAGE_SHAPES.get(name, (32, 32, 3))


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network, as it is stored.

    Attributes:
      name, attributes: of the network (`make_network`).
      variables: its parameters and batch statistics.
      image_shape: height, width, channels of the images it takes.
      norm, theta: the noise it was trained with: "l2" or "l1" and its noise parameter; theta None if it is not known.
      history: anything else worth knowing (how it was trained, where it was converted from); JSON values.
      classes: names of the classes in order, where they are known.
    """

    name: str
    attributes: Mapping[str, Any]
    variables: Any = dataclasses.field(repr=False)
    image_shape: tuple[int, int, int]
    norm: str = "l2"
    theta: float | None = None
    history: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    classes: tuple[str, ...] = ()

    @property
    def network(self) -> nn.Module:
        """The Flax module."""
        return make_network(self.name, **self.attributes)

    @property
    def classifier(self) -> Classifier:
        """The base classifier, in evaluation mode."""
        return from_linen(self.network, self.variables, num_classes=self.network.num_classes)


def save_network(trained: Trained, path: epath.PathLike, *, new: bool = True) -> None:
    """Store a network in a new folder; with `new=False` beside what is there.

    Raises:
      ValueError: if there is something in a folder that should be new, or theta cannot be a noise parameter.
      OSError: if it cannot be written.
    """
    import orbax.checkpoint as ocp

    path = absolute(path)
    if trained.theta is not None and not 0 < trained.theta < math.inf:
        raise ValueError(f"theta must be positive and finite, got {trained.theta}")
    if new and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is there already: a network goes into a new folder")
    path.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / _VARIABLES, trained.variables, force=True)
    info = dataclasses.asdict(dataclasses.replace(trained, variables=None))
    info["variables"] = _hash(trained.variables)
    if jax.process_index() == 0:
        write_file(path / _INFO, f"{json.dumps(info, indent=2)}\n".encode())


def is_network(path: epath.PathLike) -> bool:
    """Whether there is a folder of that name with a network in it."""
    return (epath.Path(path) / _INFO).exists()


def load_network(path: epath.PathLike) -> Trained:
    """The network that `save_network` stored.

    Raises:
      ValueError: if there is none, or its variables do not fit.
    """
    import orbax.checkpoint as ocp

    path = absolute(path)
    file = path / _INFO
    if not file.exists():
        raise ValueError(f"{path} is not the folder of a network: there is no {_INFO}")
    try:
        info = json.loads(file.read_text())
        info |= {name: tuple(info[name]) for name in ("image_shape", "classes")}
        info["attributes"] = {k: tuple(v) if isinstance(v, list) else v for k, v in info["attributes"].items()}
        fingerprint = info.pop("variables")
        trained = Trained(variables=None, **info)
        network = trained.network
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: not the description of a network ({error})") from None
    inputs = jax.ShapeDtypeStruct((1, *trained.image_shape), jnp.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), inputs)
    try:
        if not (path / _VARIABLES / "manifest.ocdbt").exists():
            raise ValueError("files are missing")
        with ocp.StandardCheckpointer() as checkpointer:
            _check_shapes(checkpointer.metadata(path / _VARIABLES).item_metadata, shapes)
            variables = checkpointer.restore(path / _VARIABLES, shapes)
    except Exception as error:  # orbax raises many kinds
        raise ValueError(
            f"{path / _VARIABLES}: damaged, or of another network ({str(error).splitlines()[0][:200]})"
        ) from None
    variables = jax.tree.map(np.asarray, variables)
    if _hash(variables) != fingerprint:
        raise ValueError(f"{path / _VARIABLES}: damaged, or of another network (its numbers are not those of {_INFO})")
    return dataclasses.replace(trained, variables=variables)


def _hash(variables) -> str:
    digest = hashlib.sha256()
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
    for name in sorted(named):
        digest.update(name.encode() + np.ascontiguousarray(named[name]).tobytes())
    return digest.hexdigest()


def _check_shapes(stored, shapes) -> None:
    there, here = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (stored, shapes)
    )
    for name in sorted({*there, *here}):
        if there.get(name) != here.get(name):
            raise ValueError(f"{name} has the shape {there.get(name)}, the network's is {here.get(name)}")
