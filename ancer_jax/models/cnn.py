"""The small convolutional network of the bundled classifiers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ancer_jax.models._convolution import convolution
from ancer_jax.models.resnet import relu


class SmallCNN(nn.Module):
    """Three convolutions and one hidden layer for small images; about 115,000 parameters on 28x28x1.

    It contains its normalisation. Without batch norm and dropout, training and evaluation mode give the same logits.

    Attributes (the others are those of `ResNet`):
      features: channels of the three convolutions.
      hidden: width of the hidden layer.
      mean, std: for each channel or for all (default: those of Fashion-MNIST).
    """

    num_classes: int = 10
    features: tuple[int, int, int] = (16, 32, 32)
    hidden: int = 64
    mean: float | tuple[float, ...] = 0.286
    std: float | tuple[float, ...] = 0.353
    compute_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits [n, num_classes] of images [n, height, width, channels]; `train` affects speed only."""
        fast = functools.partial(convolution, in_loop=not train)
        conv = functools.partial(nn.Conv, dtype=self.compute_dtype, conv_general_dilated=fast)
        for name, value in (("mean", self.mean), ("std", self.std)):
            if np.ndim(value) and np.size(value) != x.shape[-1]:
                raise ValueError(f"{name} must be one number or {x.shape[-1]}, one for each channel, got {value}")
        x = (x - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        x = relu(conv(self.features[0], (5, 5), strides=(2, 2))(x))
        x = relu(conv(self.features[1], (3, 3), strides=(2, 2))(x))
        x = relu(conv(self.features[2], (3, 3))(x))
        x = relu(nn.Dense(self.hidden, dtype=self.compute_dtype)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.num_classes)(x.astype(jnp.float32))
