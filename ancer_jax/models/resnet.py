"""Residual networks (He et al. 2015), as the literature on randomized smoothing uses them.

Submodules have their PyTorch names, with `_` for `.`: `torch_import` relies on that.
"""

import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from ancer_jax.models._batch_norm import BatchNorm
from ancer_jax.models._convolution import convolution

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    features: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    expansion = 1

    @nn.compact
    def __call__(self, x):
        """[n, h, w, c] -> [n, h / stride, w / stride, features]."""
        y = relu(self.norm(name="bn1")(self.conv(self.features, 3, self.stride, name="conv1")(x)))
        y = self.conv(self.features, 3, 1, name="conv2")(y)
        return relu(self.norm(name="bn2")(y) + _shortcut(self, x, y))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride: "v1.5") and 1x1 convolutions and a shortcut."""

    features: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    expansion = 4

    @nn.compact
    def __call__(self, x):
        """[n, h, w, c] -> [n, h / stride, w / stride, 4 features]."""
        y = relu(self.norm(name="bn1")(self.conv(self.features, 1, 1, name="conv1")(x)))
        y = relu(self.norm(name="bn2")(self.conv(self.features, 3, self.stride, name="conv2")(y)))
        y = self.conv(self.features * self.expansion, 1, 1, name="conv3")(y)
        return relu(self.norm(name="bn3")(y) + _shortcut(self, x, y))


def _shortcut(block, x, y):
    if x.shape == y.shape:
        return x
    x = block.conv(y.shape[-1], 1, block.stride, name="downsample_0")(x)
    return block.norm(name="downsample_1")(x)


class ResNet(nn.Module):
    """A ResNet that contains its normalisation `(x - mean) / std`: noise and radii are in units of [0, 1] pixels.

    Attributes:
      stage_sizes: blocks of each stage; every stage but the first halves height and width.
      block: `BasicBlock` or `Bottleneck`.
      width: channels of the first stage; each later stage doubles them.
      stem: "imagenet" (7x7, stride 2, and max pooling) or "cifar" (3x3).
      stem_norm: whether the stem has batch norm (the ResNet-18 of ANCER's code has none).
      num_classes: number of logits.
      mean, std: of each channel.
      compute_dtype: of the layers, "float32" or "bfloat16"; normalisation and logits are float32.
    """

    stage_sizes: tuple[int, ...]
    block: type[BasicBlock] | type[Bottleneck] = BasicBlock
    width: int = 64
    stem: Literal["imagenet", "cifar"] = "cifar"
    stem_norm: bool = True
    num_classes: int = 10
    mean: tuple[float, ...] = CIFAR10_MEAN
    std: tuple[float, ...] = CIFAR10_STD
    compute_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits [n, num_classes] of images [n, height, width, channels]."""
        conv, norm = layers(self.compute_dtype, train)
        x = normalise(x, self.mean, self.std).astype(self.compute_dtype)
        imagenet = self.stem == "imagenet"
        x = conv(self.width, 7 if imagenet else 3, 2 if imagenet else 1, name="conv1")(x)
        x = relu(norm(name="bn1")(x) if self.stem_norm else x)
        if imagenet:
            padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # x >= 0: zeros do not change a maximum
            x = nn.max_pool(padded, (3, 3), (2, 2))
        for i, size in enumerate(self.stage_sizes):
            for j in range(size):
                stride = 2 if i > 0 and j == 0 else 1
                x = self.block(self.width * 2**i, stride, conv, norm, name=f"layer{i + 1}_{j}")(x)
        return dense(self.num_classes, x.mean(axis=(1, 2)))


def normalise(x: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """`(x - mean) / std` in each channel; ValueError, at trace time, for another number of channels."""
    if x.ndim != 4 or x.shape[-1] != len(mean):
        raise ValueError(f"the network takes images [n, height, width, {len(mean)}], got {list(x.shape)}")
    return (x - jnp.asarray(mean, x.dtype)) / jnp.asarray(std, x.dtype)


def layers(dtype: str, train: bool) -> tuple[Callable[..., nn.Module], Callable[..., nn.Module]]:
    """Convolution without bias, `conv(features, kernel size, stride)`, and batch norm, with PyTorch's conventions."""

    def conv(features, size, stride, *, name):
        pad = (size - 1) // 2
        return nn.Conv(
            features, (size, size), (stride, stride), [(pad, pad)] * 2, use_bias=False,
            dtype=dtype, kernel_init=he_normal, name=name,
            conv_general_dilated=functools.partial(convolution, in_loop=not train),
        )  # fmt: skip

    norm = functools.partial(BatchNorm, not train, momentum=0.9, epsilon=1e-5, dtype=dtype)
    return conv, norm


def _in_float32(activation: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Of bfloat16 numbers, XLA may get maxima wrong: see `check_classifier`."""
    return lambda x: activation(x.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)


relu, relu6 = _in_float32(nn.relu), _in_float32(nn.relu6)


def dense(num_classes: int, x: jax.Array) -> jax.Array:
    """The last layer, "fc", in float32."""
    return nn.Dense(num_classes, name="fc")(x.astype(jnp.float32))
