"""`ancer-jax convert`: a PyTorch checkpoint becomes a network that certify takes as its classifier."""

import dataclasses
import warnings
from typing import Literal

import jax
import numpy as np
import tyro
from etils import epath

from ancer_jax._checks import check_integer
from ancer_jax.models.checkpoints import Checkpoint, image_shape, make_network, save_network
from ancer_jax.models.torch_import import convert_torch, read_torch, stored_normalisation


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert a PyTorch checkpoint to the folder of a network, for certify --classifier."""

    checkpoint: tyro.conf.Positional[str]
    """PyTorch file (read with weights_only: a file with code is refused, and nothing in it is executed), or safetensors
    file."""
    network: str
    """Its network: cifar_resnet110 or cifar_resnet20 (Cohen et al. 2019), imagenet_resnet50 (torchvision),
    ancer_resnet18 (Eiras et al. 2022), wrn_40_2 (Yang et al. 2020), cifar_resnet18 or efficientnet_lite0."""
    out: str
    """New folder."""
    num_classes: int | None = None
    """Number of classes; default: that of the network's usual data set (10, 1000)."""
    norm: Literal["l2", "l1"] = "l2"
    """Noise that it was trained with: l2 for Gaussian, l1 for uniform noise."""
    sigma: float | None = None
    """Noise theta that it was trained with, in units of [0, 1] pixels; the default of certify."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel in its normalisation; default: the usual one. It must agree with the checkpoint's, which
    most checkpoints do not store. For networks that do not normalise, like MACER's: --mean 0 0 0 --std 1 1 1."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel, likewise."""
    image_size: int | None = None
    """Height and width of its images; default: those of the network's usual data set (32, 224)."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of its layers; another type makes another base classifier."""

    def run(self) -> None:
        """Read the checkpoint, convert it, store the network."""
        asked = {name: getattr(self, name) for name in ("num_classes", "mean", "std", "compute_dtype")}
        attributes = {name: value for name, value in asked.items() if value is not None}
        if (self.mean is None) != (self.std is None):
            raise ValueError("--mean and --std go together")
        network, shape = make_network(self.network, **attributes), image_shape(self.network)
        if {np.size(network.mean), np.size(network.std)} != {shape[-1]}:
            raise ValueError(f"--mean and --std need {shape[-1]} values, one for each channel")
        if self.image_size is not None:
            check_integer("--image-size", self.image_size)
            shape = (self.image_size, self.image_size, shape[-1])
        tensors = read_torch(self.checkpoint)
        try:
            variables = convert_torch(network, tensors, shape)
        except ValueError as error:
            raise ValueError(f"{self.checkpoint} as {self.network}: {error}") from None
        history = {"converted_from": epath.Path(self.checkpoint).name}
        save_network(Checkpoint(self.network, attributes, variables, shape, self.norm, self.sigma, history), self.out)
        count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        print(f"{self.out}: {self.network}, {count:,} parameters, {network.num_classes} classes")
        stored = {"mean", "std"} <= set(stored_normalisation(tensors, np.size(network.mean)))
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (network.mean, network.std))
        print(f"normalisation: mean {mean}, std {std}{', as stored' if stored else ''}")
        if not stored and self.mean is None:
            said = f"{self.checkpoint} does not say how its network normalises images: the usual constants are assumed"
            warnings.warn(f"{said} (others: --mean, --std)", stacklevel=2)
