"""Denoisers in front of a classifier, which make one that was never trained with noise worth smoothing."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from ancer_jax._checks import check_integer, check_real
from ancer_jax.models._convolution import convolution
from ancer_jax.smoothing.classifier import Classifier, from_function

# denoise(variables, x[n, *d], theta) -> [n, *d]
Denoise = Callable[[Any, jax.Array, jax.Array], Any]


class DnCNN(nn.Module):
    """The denoising network of Zhang et al. 2017, which subtracts the noise that it predicts; without batch norm.

    Attributes:
      depth: number of 3 x 3 convolutions, at least 2 (Zhang et al.: 17).
      features: their channels (Zhang et al.: 64).
    """

    depth: int = 6
    features: int = 32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Denoised images [n, height, width, channels]; `train` affects speed only. At first they are `x`."""
        check_integer("depth", self.depth, 2)
        fast = functools.partial(convolution, in_loop=not train)
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), conv_general_dilated=fast)
        y = x - 0.5
        for _ in range(self.depth - 1):
            y = nn.relu(conv(self.features)(y))
        return x - conv(x.shape[-1], kernel_init=nn.initializers.zeros)(y)


@dataclasses.dataclass(frozen=True)
class _DenoisedApply:
    denoise: Denoise
    apply: Callable[[Any, jax.Array], jax.Array]

    def __call__(self, variables, x):
        of_denoiser, theta, of_classifier = variables
        clean = self.denoise(of_denoiser, x, theta)
        if clean.shape != x.shape:
            raise ValueError(f"the denoiser returned shape {list(clean.shape)} for inputs {list(x.shape)}")
        return self.apply(of_classifier, clean)


def denoised(denoise: Denoise, variables: Any, classifier: Classifier, theta: Float[ArrayLike, "..."]) -> Classifier:
    """Denoised smoothing: the base classifier that denoises its inputs first.

    Its smoothed classifier has the same guarantee as any other: the denoiser is a part of the base classifier, and the
    smoothing noise is added before it.

    Args:
      denoise: `denoise(variables, x[n, *d], theta) -> [n, *d]`, pure and row by row. Pass the same function object each
        time (not a new lambda): compiled programs are kept by it.
      variables: those of the denoiser, a pytree of arrays.
      classifier: of clean inputs.
      theta: [] or [*d], the noise that the denoiser is told to remove: that of the smoothing, as a rule.

    Raises:
      ValueError: if the classifier runs outside of JAX; when it is called, if the denoiser returns another shape.

    References: Salman et al. 2020 (arXiv 2003.01908); Carlini et al. 2023 (arXiv 2206.10550).
    """
    if classifier.on_host:
        raise ValueError("a denoiser in JAX cannot be put in front of a classifier that runs outside of it")
    inner = variables, jnp.asarray(theta, jnp.float32), classifier.variables
    return from_function(_DenoisedApply(denoise, classifier.apply), inner, num_classes=classifier.num_classes)


@dataclasses.dataclass(frozen=True)
class _OneStep:
    predict_noise: Callable[[Any, jax.Array, jax.Array], Any]
    kept: tuple[float, ...]

    def __call__(self, variables, x, theta):
        if jnp.ndim(theta):
            raise ValueError(f"a diffusion model removes the same noise from each pixel: theta has shape {theta.shape}")
        kept = jnp.asarray(self.kept, jnp.float32)
        noise = jnp.sqrt(1 / kept - 1)  # of the diffusion after each step, in units of [-1, 1] pixels
        step = jnp.argmin(jnp.abs(noise - 2 * theta))
        signal = jnp.sqrt(kept[step])
        scaled = signal * (2 * x - 1)
        predicted = self.predict_noise(variables, scaled, step)
        clean = (scaled - jnp.sqrt(1 - kept[step]) * predicted) / signal
        return (jnp.clip(clean, -1, 1) + 1) / 2


def one_step_diffusion(
    predict_noise: Callable[[Any, jax.Array, jax.Array], Any], kept: Float[ArrayLike, " T"] | Sequence[float]
) -> Denoise:
    """A denoiser, for `denoised`, that makes one step of a diffusion model: the step whose noise is nearest to theta.

    The noise must be the same in every pixel: theta is [].

    Args:
      predict_noise: `predict_noise(variables, x[n, *d], step) -> [n, *d]`: the model's estimate of the standard normal
        noise in `x = sqrt(kept[step]) * image + sqrt(1 - kept[step]) * noise`, of images in [-1, 1]; step is int32 [].
      kept: [T] share of the image's variance that each step keeps, falling: the cumulative product of `1 - beta`.

    Raises:
      ValueError: if `kept` is not between 0 and 1, or does not fall; when it is called, if theta is not one number.

    References: Carlini et al. 2023 (arXiv 2206.10550), algorithm 1; Ho et al. 2020 (arXiv 2006.11239).
    """
    shares = np.asarray(kept, np.float64)
    if shares.ndim != 1 or not len(shares):
        raise ValueError(f"kept must be one number for each step, got shape {list(shares.shape)}")
    for share in shares:
        check_real("kept", float(share), "(0, 1)")
    if (np.diff(shares) >= 0).any():
        raise ValueError("kept must fall from step to step")
    return _OneStep(predict_noise, tuple(shares.tolist()))
