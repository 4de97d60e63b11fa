"""Leakage: how many other images the noise alone sends to an input's class.

A search for theta can paint a pattern that the network reads as the class of x. The certificate is then true of the
smoothed classifier of this theta and says little about x; other images tell: under this theta they get x's class too.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from ancer_jax._checks import check_integer
from ancer_jax.certificates import Certificate
from ancer_jax.classifiers import Classifier
from ancer_jax.smoothing import Stage, class_counts, probs_of_each, stage_key


@dataclasses.dataclass(frozen=True)
class LeakageConfig:
    """Settings that change a measured leakage.

    Attributes:
      num_references: how many other images are asked; and how many more, held out from every search, for the soft
        leakage.
      num_samples: noise draws for each of them; an eighth for those that are held out.

    Raises:
      ValueError: if a setting is not an integer of at least 1.
    """

    num_references: int = 200
    num_samples: int = 64

    @property
    def held_out_samples(self) -> int:
        """Draws for each image that is held out: their mean is of many images, and needs few of each."""
        return max(1, self.num_samples // 8)

    def __post_init__(self):
        for name in ("num_references", "num_samples"):
            check_integer(name, getattr(self, name))


class References(NamedTuple):
    """Images that leakage is measured on; a pytree that all inputs share.

    Attributes:
      keys: [m] the images' own example keys. Their draws are the same for every input and every theta.
      images: [m, *d].
      classes: int32 [m], their smoothed classes at the theta that the search starts from.
    """

    keys: Key[Array, " m"]
    images: Float[Array, "m *d"]
    classes: Int[Array, " m"]


class Probes(NamedTuple):
    """The images that leakage is measured on.

    Attributes:
      references: those of `leakage`, of a search's penalty, and of its limit.
      held_out: others, that no search sees; None if the data set has no more images.
    """

    references: References
    held_out: References | None


class Leaked(NamedTuple):
    """What was counted, for each input of a batch: int32 [batch] each.

    Attributes:
      leaked, references: of the eligible references, how many have the input's class under its theta, and all.
      votes, draws: the same of the draws of the eligible images that are held out.
    """

    leaked: Any
    references: Any
    votes: Any
    draws: Any


def make_references(
    keys: Key[Array, " m"],
    classifier: Classifier,
    certificate: Certificate,
    images: Float[ArrayLike, "m *d"],
    theta: Float[ArrayLike, "..."],
    *,
    num_samples: int,
    chunk: int,
) -> References:
    """References from images and the theta that the search starts from. Arguments as in `reference_classes`."""
    images = jnp.asarray(images)
    classes = reference_classes(keys, classifier, certificate, images, theta, num_samples=num_samples, chunk=chunk)
    return References(keys, images, classes)


def reference_classes(
    keys: Key[Array, " m"],
    classifier: Classifier,
    certificate: Certificate,
    images: Float[ArrayLike, "m *d"],
    theta: Float[ArrayLike, "..."],
    *,
    num_samples: int,
    chunk: int,
) -> Int[Array, " m"]:
    """Smoothed class of every image under `theta`: the majority of few draws, ties to the lowest class.

    Memory is that of `chunk` noisy copies (`num_samples`, if that is less), whatever the number of images.

    Args:
      keys: [m] typed keys, one per image; the stage is folded in here.
      classifier, certificate: base classifier and noise law.
      images: [m, *d].
      theta: [] or [*d] noise parameter of all images, in their units.
      num_samples: draws for each image (static).
      chunk: how many draws at a time (static); changes speed and memory, never the draws.

    Returns:
      int32 [m]; -1 for an image all of whose draws give NaN.

    Raises:
      ValueError: at trace time, as in `smoothing.class_counts`.
    """

    of = Stage.LEAKAGE, keys, classifier, certificate, images, theta
    counts = _counts(*of, num_samples=num_samples, chunk=chunk)
    return jnp.where(counts.any(axis=1), counts.argmax(axis=1), -1).astype(jnp.int32)


def _counts(stage, keys, classifier, certificate, images, theta, *, num_samples, chunk) -> Int[Array, "m K"]:
    """Votes for each class of the draws of every image, of that stage."""

    def count(reference):
        key, image = stage_key(reference[0], stage), reference[1]
        return class_counts(key, classifier, certificate, image, theta, num_samples=num_samples, chunk=chunk)

    return jax.lax.map(count, (keys, jnp.asarray(images)), batch_size=max(1, chunk // num_samples))


def leakage(
    references: References,
    classifier: Classifier,
    certificate: Certificate,
    x: Float[ArrayLike, "*d"],
    theta: Float[ArrayLike, "..."],
    prediction: Int[ArrayLike, ""],
    *,
    num_samples: int,
    chunk: int,
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """How many references the smoothed classifier of this theta sends to the class of `x`, and out of how many.

    `leakage(x) = #{eligible r : g_theta(r) = prediction} / #{eligible r}`, where a reference r is eligible if its class
    at the starting theta is not `prediction` and it differs from `x` in some pixel.

    Args:
      references: from `make_references`, with the same `num_samples`.
      classifier, certificate: as in `reference_classes`.
      x: [*d] one input.
      theta: [] or [*d] the theta found for x.
      prediction: [] class of x; negative is an abstention, which nothing can leak to.
      num_samples, chunk: as in `reference_classes`.

    Returns:
      int32 [] leaked, int32 [] eligible; both 0 for an abstention.

    Guarantee: none is needed, nothing is certified by it. At the starting theta every reference has its own draws and
    class again, so that none leaks.

    Raises:
      ValueError: at trace time, if `x` has another shape than the references; as in `smoothing.class_counts`.
    """
    eligible = _eligible(references, x, prediction)
    classes = reference_classes(
        references.keys, classifier, certificate, references.images, theta, num_samples=num_samples, chunk=chunk
    )
    count = lambda mask: mask.sum(dtype=jnp.int32)
    return count(eligible & (classes == prediction)), count(eligible)


def vote_leakage(
    references: References,
    classifier: Classifier,
    certificate: Certificate,
    x: Float[ArrayLike, "*d"],
    theta: Float[ArrayLike, "..."],
    prediction: Int[ArrayLike, ""],
    *,
    num_samples: int,
    chunk: int,
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """How many draws of the eligible references vote for the class of `x`, and out of how many.

    The soft form of `leakage`, without its threshold at a majority. Arguments and errors as there; for a figure that no
    search could fit, the references are others than those of the search.

    Returns:
      int32 [] votes, int32 [] draws; both 0 for an abstention.
    """
    eligible = _eligible(references, x, prediction)
    of = Stage.SOFT_LEAKAGE, references.keys, classifier, certificate, references.images, theta
    counts = _counts(*of, num_samples=num_samples, chunk=chunk)
    votes = jnp.where(eligible, counts[:, prediction], 0).sum(dtype=jnp.int32)
    return votes, eligible.sum(dtype=jnp.int32) * num_samples


def soft_leakage(
    key: Key[Array, ""],
    references: References,
    classifier: Classifier,
    certificate: Certificate,
    x: Float[ArrayLike, "*d"],
    theta: Float[ArrayLike, "..."],
    prediction: Int[ArrayLike, ""],
    *,
    batch: int,
) -> Float[Array, ""]:
    """Mean softmax output for the class of `x` over a random batch of eligible references, one draw each.

    A noisy, differentiable `leakage`: the penalty of a search.

    Args:
      key: typed key of the batch and of its draws.
      references, classifier, certificate, x, theta, prediction: as in `leakage`.
      batch: how many references (static), drawn without replacement; all that are eligible, if there are fewer.

    Returns:
      float [] in [0, 1]; 0 if no reference is eligible.

    Raises:
      ValueError: at trace time, if `x` has another shape than the references.
    """
    batch_key, draw_key = jax.random.split(key)
    eligible = _eligible(references, x, prediction)
    order = jnp.where(eligible, jax.random.uniform(batch_key, eligible.shape), -1.0)
    chosen = jax.lax.top_k(order, min(batch, len(order)))[1]
    probs = probs_of_each(draw_key, classifier, certificate, references.images[chosen], theta)[:, prediction]
    return jnp.where(eligible[chosen], probs, 0.0).sum() / jnp.maximum(eligible[chosen].sum(), 1)


def _eligible(references: References, x, prediction) -> Bool[Array, " m"]:
    """Which references can leak to the class `prediction` of `x`."""
    if jnp.shape(x) != references.images.shape[1:]:
        raise ValueError(
            f"x must have the references' shape {list(references.images.shape[1:])}, got {list(jnp.shape(x))}"
        )
    other = (references.images != x).reshape(len(references.images), -1).any(axis=1)
    return other & (references.classes != prediction) & (prediction >= 0)
