"""A linear filter in front of a network, which takes from an image what noise has drowned anyway."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ancer_jax._numerics import Leaf
from ancer_jax.basis import Basis, spectrum
from ancer_jax.smoothing.classifier import Classifier, from_function


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Front:
    """The filter `x -> B^-1(weights * B(x - mean)) + mean`, where B gives coefficients in a basis; a pytree.

    Attributes:
      mean: [height, width, channels], the mean image.
      weights: of the same shape, one for each coefficient.
      basis: the basis (static).
    """

    mean: Leaf
    weights: Leaf
    basis: Basis = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Float[ArrayLike, "n ..."]) -> Float[Array, "n ..."]:
        """The filtered images [n, height, width, channels]; ValueError if they have another number of axes."""
        if jnp.ndim(x) != 4:
            raise ValueError(f"a filter takes images [n, height, width, channels], got shape {list(jnp.shape(x))}")
        coefficients = self.weights * jnp.asarray(self.basis.coefficients(jnp.asarray(x) - self.mean))
        return jnp.asarray(self.basis.inputs(coefficients)) + self.mean


def wiener_front(images: Float[ArrayLike, "m *d"], theta: Float[ArrayLike, "..."], basis: Basis) -> Front:
    """Wiener's filter for Gaussian noise theta: `weights = s^2 / (s^2 + theta^2)`, where s is the standard deviation of
    each coefficient over the images. Of all filters with one weight for each coefficient it leaves the smallest squared
    error.

    Args:
      images: [m, *d] of the training data.
      theta: [] or [*d], standard deviation of the noise in each coefficient.
      basis: of the coefficients, in which the noise is independent.

    Raises:
      ValueError: if theta is not positive and finite, or of another shape; as in `spectrum`.
    """
    mean, deviations = spectrum(images, basis)
    theta = np.asarray(theta, np.float64)
    if theta.shape not in ((), mean.shape) or not (np.isfinite(theta) & (theta > 0)).all():
        what = f"of shape {list(theta.shape)}, {theta.min()} to {theta.max()}"
        raise ValueError(f"theta must be positive, finite, and one number or {list(mean.shape)}, got one {what}")
    power, noise = deviations**2, theta**2
    return Front(mean, (power / (power + noise)).astype(np.float32), basis)


@dataclasses.dataclass(frozen=True)
class _WithFrontApply:
    apply: Callable[[Any, jax.Array], jax.Array]

    def __call__(self, variables, x):
        front, inner = variables
        return self.apply(inner, front(x))


def with_front(classifier: Classifier, front: Front) -> Classifier:
    """The base classifier that filters its inputs first; the smoothing noise is added before the filter.

    Raises:
      ValueError: if the classifier runs outside of JAX.
    """
    if classifier.on_host:
        raise ValueError("a filter in JAX cannot be put in front of a classifier that runs outside of it")
    variables = front, classifier.variables
    return from_function(_WithFrontApply(classifier.apply), variables, num_classes=classifier.num_classes)


class WithFront(nn.Module):
    """A network with a `Front`, whose mean and weights are variables that training leaves as they are.

    They are in the collection "front"; `init` makes a filter that changes nothing.

    Attributes:
      network: a network that takes `train`.
      basis: basis of the filter.
    """

    network: Any
    basis: Basis

    @property
    def num_classes(self) -> int:
        """Number of classes of the network."""
        return self.network.num_classes

    @nn.compact
    def __call__(self, x, train: bool = False):
        """Logits [n, num_classes] of images [n, *d]."""
        mean = self.variable("front", "mean", jnp.zeros, x.shape[1:])
        weights = self.variable("front", "weights", jnp.ones, x.shape[1:])
        return self.network(Front(mean.value, weights.value, self.basis)(x), train=train)
