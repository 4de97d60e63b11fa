"""Conversion of PyTorch checkpoints by an explicit table of names. Nothing in a file is executed."""

import pickle
import re
import warnings
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from ancer_jax._messages import first_line
from ancer_jax.models.efficientnet import EfficientNetLite0
from ancer_jax.models.resnet import ResNet
from ancer_jax.models.wide_resnet import WideResNet

# Patterns of our module names, and PyTorch's names.
_MODULES: dict[type[nn.Module], tuple[tuple[str, str], ...]] = {
    ResNet: ((r"layer(\d+)_(\d+)", r"layer\1.\2"), (r"downsample_(\d)", r"downsample.\1")),
    WideResNet: ((r"block(\d+)_layer_(\d+)", r"block\1.layer.\2"),),
    EfficientNetLite0: ((r"blocks_(\d+)\.", r"blocks.\1."), (r"(^|\.)([a-z])", r"\1_\2")),
}
# Our names of tensors, and PyTorch's.
_TENSORS = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
# Other authors' names of the same modules.
_SYNONYMS = ((r"\bshortcut\.", "downsample."), (r"\blinear\.", "fc."))
# The constants of normalisation layers, under the names that various authors use, and how to compute ours from them.
_NORMALISATION = {
    **dict.fromkeys(("means", "mean", "mu"), ("mean", np.asarray)),
    **dict.fromkeys(("sds", "std", "sigma"), ("std", np.asarray)),
    "log_sig": ("std", np.exp),
}
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")


def convert_torch(
    network: nn.Module, tensors: Mapping[str, np.ndarray], image_shape: tuple[int, int, int]
) -> dict[str, Any]:
    """Variables of `network` from the tensors of a PyTorch checkpoint (`read_torch`).

    Prefixes that wrappers add (DataParallel's `module.`, the `1.` behind a normalisation layer) are removed. If the
    checkpoint has the constants of a normalisation layer (`stored_normalisation`), they must be those of `network`.

    Args:
      network: a network of this package, with the checkpoint's number of classes.
      tensors: name -> array.
      image_shape: height, width, channels.

    Raises:
      ValueError: naming the tensor and the shapes, if a tensor is missing, unused or of another shape, or if the
        normalisation differs.
    """
    patterns = _MODULES.get(type(network))
    if patterns is None:
        raise ValueError(f"there is no table of PyTorch names for a {type(network).__name__}")
    what = f"a {type(network).__name__} with {network.num_classes} classes"
    inputs = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    shapes: dict[tuple[str, ...], Any] = dict(flatten_dict(jax.eval_shape(network.init, jax.random.key(0), inputs)))
    names = {path: f"{_rename('.'.join(path[1:-1]), patterns)}.{_TENSORS[path[-1]]}" for path in shapes}
    renamed = {_rename(name, _SYNONYMS): tensor for name, tensor in tensors.items()}
    first = next(iter(names.values()))
    prefix = min((name.removesuffix(first) for name in renamed if name.endswith(first)), key=len, default="")
    leaves = {}
    for path, expected in shapes.items():
        name = prefix + names[path]
        if name not in renamed:
            raise ValueError(f"not a checkpoint of {what}: there is no tensor {name}")
        leaf = np.asarray(renamed.pop(name), np.float32)
        if path[-1] == "kernel":  # in Flax, output features are the last axis
            leaf = leaf.transpose(2, 3, 1, 0) if leaf.ndim == 4 else leaf.T
        if leaf.shape != expected.shape:
            both = f"{list(leaf.shape)} in Flax's order of axes, the network's {list(expected.shape)}"
            raise ValueError(f"{name} does not fit {what}: its shape is {both}")
        if not np.isfinite(leaf).all():
            raise ValueError(f"{name} has values that are not finite")
        leaves[path] = leaf
    constants = stored_normalisation(renamed, len(network.mean))
    for attribute, (name, value) in constants.items():
        if not np.allclose(value, wanted := list(getattr(network, attribute)), atol=1e-4):
            raise ValueError(f"the checkpoint's {attribute} ({name}) is {value.tolist()}, the network's {wanted}")
    known = {name for name, _ in constants.values()}
    for name in renamed:
        if name not in known and not name.endswith("num_batches_tracked"):
            raise ValueError(f"not a checkpoint of {what}, which has no tensor {name}")
    return unflatten_dict(leaves)


def _rename(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


def stored_normalisation(tensors: Mapping[str, np.ndarray], channels: int) -> dict[str, tuple[str, np.ndarray]]:
    """The "mean" and "std" of a normalisation layer, each with its tensor's name, as far as a checkpoint has them."""
    found = {}
    for name, tensor in tensors.items():
        last = name.rpartition(".")[-1]
        if last in _NORMALISATION and np.size(tensor) == channels:
            attribute, value = _NORMALISATION[last]
            found[attribute] = name, value(tensor).ravel()
    return found


def read_torch(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch checkpoint (`.pt`, `.pth`, `.tar`; needs torch) or of a safetensors file, as float32.

    PyTorch files are read with `weights_only`: a file with any object but tensors and plain containers is refused, and
    no code in it is executed.

    Raises:
      ValueError: if the file cannot be read or has no tensors.
      ImportError: if torch is needed and is not installed.
    """
    path = epath.Path(path)
    if not path.exists():
        raise ValueError(f"{path}: there is no such file")
    found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)
    found = next((found[name] for name in _WRAPPERS if isinstance(found.get(name), Mapping)), found)
    tensors = {str(name): value for name, value in found.items() if isinstance(value, np.ndarray)}
    if not tensors:
        raise ValueError(f"{path}: the file has no tensors")
    return tensors


def _read_safetensors(path) -> dict[str, Any]:
    try:
        return safetensors.numpy.load(path.read_bytes())
    except KeyError as error:
        raise ValueError(f"{path}: tensors of type {error} cannot be read; store them as float32") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None


def _read_pickled(path) -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        raise ImportError(f"{path}: reading PyTorch files needs torch (pip install 'ancer-jax[torch]')") from None

    def to_numpy(tree: Any) -> Any:
        if isinstance(tree, torch.Tensor):
            return tree.detach().to(torch.float32).numpy()
        return {name: to_numpy(value) for name, value in tree.items()} if isinstance(tree, Mapping) else tree

    try:
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            found = to_numpy(torch.load(file, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError:
        what = "it has more than tensors and plain containers (nothing in it was executed)"
        raise ValueError(f"{path}: refused, because {what}") from None
    except Exception as error:  # damaged files raise many types
        raise ValueError(f"{path}: not a readable PyTorch file ({first_line(error)})") from None
    return dict(found) if isinstance(found, Mapping) else {}
