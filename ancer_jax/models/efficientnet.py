"""EfficientNet-Lite0 (Tan and Le 2019; the variant without squeeze-and-excitation, with ReLU6).

Submodules have their names in the PyTorch package efficientnet-lite-pytorch, without leading underscores.
"""

import functools
from typing import Any

import flax.linen as nn
import jax

from ancer_jax.models._batch_norm import BatchNorm
from ancer_jax.models.resnet import dense, he_normal, normalise, relu6

# Number of blocks, kernel size, stride of the first block, expansion and channels of each stage.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 for images of about 224 x 224, with its normalisation; attributes are those of `ResNet`."""

    num_classes: int = 1000
    mean: tuple[float, ...] = (127 / 255,) * 3
    std: tuple[float, ...] = (128 / 255,) * 3
    compute_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits [n, num_classes] of images [n, height, width, 3]."""
        norm = functools.partial(BatchNorm, not train, momentum=0.99, epsilon=1e-3, dtype=self.compute_dtype)

        def conv(features, size, stride, *, groups=1, name):  # TensorFlow's padding "SAME"
            return nn.Conv(
                features, (size, size), (stride, stride), "SAME", feature_group_count=groups, use_bias=False,
                dtype=self.compute_dtype, kernel_init=he_normal, name=name,
            )  # fmt: skip

        x = normalise(x, self.mean, self.std).astype(self.compute_dtype)
        x = relu6(norm(name="bn0")(conv(32, 3, 2, name="conv_stem")(x)))
        blocks = [
            (features, size, stride if i == 0 else 1, expansion)
            for repeats, size, stride, expansion, features in _STAGES
            for i in range(repeats)
        ]
        for number, block in enumerate(blocks):
            x = MobileBlock(*block, conv, norm, name=f"blocks_{number}")(x)
        x = relu6(norm(name="bn1")(conv(1280, 1, 1, name="conv_head")(x)))
        return dense(self.num_classes, x.mean(axis=(1, 2)))


class MobileBlock(nn.Module):
    """Inverted bottleneck: 1x1 expansion, depthwise convolution, 1x1 projection; a shortcut where shapes agree."""

    features: int
    size: int
    stride: int
    expansion: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        """[n, h, w, c] -> [n, h / stride, w / stride, features]."""
        y, width = x, x.shape[-1] * self.expansion
        if self.expansion > 1:
            y = relu6(self.norm(name="bn0")(self.conv(width, 1, 1, name="expand_conv")(y)))
        y = self.conv(width, self.size, self.stride, groups=width, name="depthwise_conv")(y)
        y = relu6(self.norm(name="bn1")(y))
        y = self.norm(name="bn2")(self.conv(self.features, 1, 1, name="project_conv")(y))
        return x + y if x.shape == y.shape else y
