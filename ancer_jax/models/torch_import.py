"""Conversion of PyTorch checkpoints by an explicit table of names. Nothing in a file is executed."""

import pickle
import re
import warnings
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

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


def torch_names(network: nn.Module, variables: Any) -> dict[tuple[str, ...], str]:
    """The table of names: path of each leaf of `variables` -> its PyTorch name.

    Raises:
      ValueError: if there is no table for this network.
    """
    if type(network) not in _MODULES:
        raise ValueError(f"there is no table of PyTorch names for a {type(network).__name__}")
    table = {}
    for path in flatten_dict(variables):
        module = ".".join(path[1:-1])
        for ours, theirs in _MODULES[type(network)]:
            module = re.sub(ours, theirs, module)
        table[path] = f"{module}.{_TENSORS[path[-1]]}"
    return table


def convert_torch(
    network: nn.Module, tensors: Mapping[str, np.ndarray], image_shape: tuple[int, int, int]
) -> dict[str, Any]:
    """Variables of `network` from the tensors of a PyTorch checkpoint (`read_torch`).

    Prefixes that wrappers add (DataParallel's `module.`, the `1.` behind a normalisation layer) are removed. If the
    checkpoint has the constants of a normalisation layer (`stored_normalisation`), they must be those of `network`.
    Cohen's and ANCER's checkpoints have none, and MACER's networks do not normalise at all.

    Args:
      network: a network of this package, with the checkpoint's number of classes.
      tensors: name -> array.
      image_shape: height, width, channels.

    Raises:
      ValueError: naming the tensor and the shapes, if a tensor is missing, unused or of another shape, or if the
        normalisation differs.
    """
    inputs = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    shapes: dict[tuple[str, ...], Any] = dict(flatten_dict(jax.eval_shape(network.init, jax.random.key(0), inputs)))
    table = torch_names(network, unflatten_dict(shapes))
    renamed = {}
    for name, tensor in tensors.items():
        for other, usual in _SYNONYMS:
            name = re.sub(other, usual, name)
        renamed[name] = tensor
    first = next(iter(table.values()))
    prefixes = [name.removesuffix(first) for name in renamed if name.endswith(first)]
    prefix = min(prefixes, key=len, default="")
    leaves = {}
    for path, name in table.items():
        if prefix + name not in renamed:
            raise ValueError(f"not a checkpoint of a {_describe(network)}: there is no tensor {prefix + name}")
        leaf, shape = _leaf(path, renamed.pop(prefix + name)), list(shapes[path].shape)
        if list(leaf.shape) != shape:
            both = f"{list(leaf.shape)} in Flax's order of axes, the network's {shape}"
            raise ValueError(f"{prefix + name} does not fit a {_describe(network)}: its shape is {both}")
        if not np.isfinite(leaf).all():
            raise ValueError(f"{prefix + name} has values that are not finite")
        leaves[path] = leaf
    constants = stored_normalisation(renamed, len(network.mean))
    for attribute, (name, value) in constants.items():
        if not np.allclose(value, wanted := list(getattr(network, attribute)), atol=1e-4):
            raise ValueError(f"the checkpoint's {attribute} ({name}) is {value.tolist()}, the network's {wanted}")
    known = {name for name, _ in constants.values()}
    for name in renamed:
        if name not in known and not name.endswith("num_batches_tracked"):
            raise ValueError(f"not a checkpoint of a {_describe(network)}, which has no tensor {name}")
    return unflatten_dict(leaves)


def stored_normalisation(tensors: Mapping[str, np.ndarray], channels: int) -> dict[str, tuple[str, np.ndarray]]:
    """The "mean" and "std" of a normalisation layer, each with its tensor's name, as far as a checkpoint has them."""
    found = {}
    for name, tensor in tensors.items():
        last = name.rpartition(".")[-1]
        if last in _NORMALISATION and np.size(tensor) == channels:
            attribute, value = _NORMALISATION[last]
            found[attribute] = name, value(tensor).ravel()
    return found


def _leaf(path, tensor) -> np.ndarray:
    """A tensor with Flax's order of axes: output features of kernels are last."""
    tensor = np.asarray(tensor, np.float32)
    if path[-1] == "kernel":
        return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
    return tensor


def _describe(network) -> str:
    return f"{type(network).__name__} with {network.num_classes} classes"


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
    for name in _WRAPPERS:
        if isinstance(found.get(name), Mapping):
            found = found[name]
            break
    tensors = {str(name): value for name, value in found.items() if isinstance(value, np.ndarray)}
    if not tensors:
        raise ValueError(f"{path}: the file has no tensors")
    return tensors


def _read_safetensors(path) -> dict[str, Any]:
    import safetensors
    import safetensors.numpy

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
        line = (str(error).splitlines() or ["empty"])[0]
        raise ValueError(f"{path}: not a readable PyTorch file ({line})") from None
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: the file has no tensors")
    return dict(found)
