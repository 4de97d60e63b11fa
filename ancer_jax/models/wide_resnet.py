"""Wide residual networks (Zagoruyko and Komodakis 2016), as RS4A and ANCER use them; names are as in `resnet`."""

from collections.abc import Callable

import flax.linen as nn
import jax

from ancer_jax.models.resnet import CIFAR10_MEAN, CIFAR10_STD, dense, layers, normalise, relu


class PreActivationBlock(nn.Module):
    """Batch norm, ReLU and 3x3 convolution, twice; where the width changes, the shortcut is of the activated input."""

    features: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x):
        """[n, h, w, c] -> [n, h / stride, w / stride, features]."""
        y = relu(self.norm(name="bn1")(x))
        if x.shape[-1] != self.features:
            x = self.conv(self.features, 1, self.stride, name="convShortcut")(y)
        y = relu(self.norm(name="bn2")(self.conv(self.features, 3, self.stride, name="conv1")(y)))
        return x + self.conv(self.features, 3, 1, name="conv2")(y)


class WideResNet(nn.Module):
    """A WRN that contains its normalisation.

    Attributes (the others are those of `ResNet`):
      depth: 6 n + 4.
      widen_factor: channels of the first stage, in units of 16.
    """

    depth: int = 40
    widen_factor: int = 2
    num_classes: int = 10
    mean: tuple[float, ...] = CIFAR10_MEAN
    std: tuple[float, ...] = CIFAR10_STD
    compute_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits [n, num_classes] of images [n, height, width, channels]."""
        conv, norm = layers(self.compute_dtype, train)
        x = normalise(x, self.mean, self.std).astype(self.compute_dtype)
        x = conv(16, 3, 1, name="conv1")(x)
        for i in range(3):
            for j in range((self.depth - 4) // 6):
                features, stride = 16 * self.widen_factor * 2**i, 2 if i > 0 and j == 0 else 1
                x = PreActivationBlock(features, stride, conv, norm, name=f"block{i + 1}_layer_{j}")(x)
        x = relu(norm(name="bn1")(x))
        return dense(self.num_classes, x.mean(axis=(1, 2)))
