"""Leakage: how many other images the noise alone sends to an input's class.

A search for theta can paint a pattern that the network reads as the class of x. The certificate is then true of the
smoothed classifier of this theta and says little about x. Other images tell: under this theta they get x's class, too.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key

from ancer_jax._checks import check_integer
from ancer_jax._numerics import Leaf
from ancer_jax.smoothing.smoothed import Smoothed, Stage, class_counts, probs_of_each, stage_key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probes:
    """Leakage probes: images on which leakage is measured; a pytree that all inputs share.

    Attributes:
      keys: [m] the images' own example keys. Their draws are the same for every input and every theta.
      images: [m, *d].
      classes: int32 [m], their smoothed classes at the theta where the search starts.
      num_samples: draws for each probe that decide its class (static).
    """

    keys: Leaf
    images: Leaf
    classes: Leaf
    num_samples: int = dataclasses.field(metadata={"static": True})


class ProbeSets(NamedTuple):
    """The leakage probes of a run: those of `leakage` and of searches, and others that no search sees, if any."""

    in_search: Probes
    held_out: Probes | None


class LeakageCounts(NamedTuple):
    """For each input of a batch, int32 [batch]: what `leakage` counted, and `soft_leakage` of the held-out probes."""

    num_leaked: np.ndarray | jax.Array
    num_eligible: np.ndarray | jax.Array
    votes: np.ndarray | jax.Array
    draws: np.ndarray | jax.Array


def make_probes(
    keys: Key[Array, " m"], smoothed: Smoothed, images: Float[ArrayLike, "m *d"], *, num_samples: int, chunk: int
) -> Probes:
    """Leakage probes: images, and the majority of few draws for each.

    Args:
      keys: [m] typed keys, one per image; the stage is folded in here.
      smoothed: smoothed classifier of the theta where the search starts.
      images: [m, *d].
      num_samples: draws for each image (static).
      chunk: how many draws at a time (static); changes speed and memory, never the draws. Memory is that of so many
        noisy copies (of `num_samples`, if that is less), whatever the number of images.

    Raises:
      ValueError: at trace time, as in `class_counts`.
    """
    images = jnp.asarray(images)
    classes = smoothed_classes(keys, smoothed, images, num_samples=num_samples, chunk=chunk)
    return Probes(keys, images, classes, num_samples)


def smoothed_classes(
    keys: Key[Array, " m"], smoothed: Smoothed, images: Float[ArrayLike, "m *d"], *, num_samples: int, chunk: int
) -> Int[Array, " m"]:
    """Smoothed class of every image, int32 [m]: the majority of few draws, ties to the lowest class; -1 if all are NaN.

    Arguments and errors as in `make_probes`.
    """
    counts = _counts(Stage.LEAKAGE, keys, smoothed, images, num_samples, chunk)
    return jnp.where(counts.any(axis=1), counts.argmax(axis=1), -1).astype(jnp.int32)


def _counts(stage: Stage, keys, smoothed: Smoothed, images, num_samples: int, chunk: int) -> Int[Array, "m K"]:
    """Votes for each class of `num_samples` draws of each image, of that stage."""
    check_integer("num_samples", num_samples)
    check_integer("chunk", chunk)
    return _compiled_counts(keys, smoothed, jnp.asarray(images), stage, num_samples, chunk)


@functools.partial(jax.jit, static_argnames=("stage", "num_samples", "chunk"))
def _compiled_counts(keys, smoothed: Smoothed, images: jax.Array, stage: Stage, num_samples: int, chunk: int):
    def count(one):
        key, image = one
        return class_counts(stage_key(key, stage), smoothed, image, num_samples=num_samples, chunk=chunk)

    return jax.lax.map(count, (keys, images), batch_size=max(1, chunk // num_samples))


def leakage(
    probes: Probes, smoothed: Smoothed, x: Float[ArrayLike, "*d"], prediction: Int[ArrayLike, ""], *, chunk: int
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """How many leakage probes the smoothed classifier sends to the class of `x`, and out of how many.

    `leakage(x) = #{eligible r : g_theta(r) = prediction} / #{eligible r}`, where a probe r is eligible if its class at
    the starting theta is not `prediction` and it differs from `x` in some pixel.

    Args:
      probes: from `make_probes`.
      smoothed: smoothed classifier of the theta found for x.
      x: [*d] one input.
      prediction: [] class of x; negative is an abstention, to which nothing can leak.
      chunk: as in `make_probes`.

    Returns:
      Numerator and denominator, int32 [] each; both 0 for an abstention. At the starting theta none leaks: every probe
      has the same draws, and so the same class, again.

    Raises:
      ValueError: at trace time, if `x` has another shape than the probes; as in `class_counts`.
    """
    eligible = _eligible(probes, x, prediction)
    keys, images = jnp.asarray(probes.keys), jnp.asarray(probes.images)
    classes = smoothed_classes(keys, smoothed, images, num_samples=probes.num_samples, chunk=chunk)
    leaked = eligible & (classes == prediction)
    return leaked.sum(dtype=jnp.int32), eligible.sum(dtype=jnp.int32)


def soft_leakage(
    probes: Probes,
    smoothed: Smoothed,
    x: Float[ArrayLike, "*d"],
    prediction: Int[ArrayLike, ""],
    *,
    num_samples: int,
    chunk: int,
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """How many draws of the eligible leakage probes vote for the class of `x`, and out of how many.

    This is `leakage` without its threshold at a majority. Arguments and errors as in `leakage`, but `num_samples` draws
    of each probe are counted (static), and no search should have seen the probes.

    Returns:
      int32 [] votes, int32 [] draws; both 0 for an abstention.
    """
    eligible = _eligible(probes, x, prediction)
    counts = _counts(Stage.SOFT_LEAKAGE, probes.keys, smoothed, probes.images, num_samples, chunk)
    votes = jnp.where(eligible, counts[:, prediction], 0).sum(dtype=jnp.int32)
    return votes, eligible.sum(dtype=jnp.int32) * num_samples


def leakage_penalty(
    key: Key[Array, ""],
    probes: Probes,
    smoothed: Smoothed,
    x: Float[ArrayLike, "*d"],
    prediction: Int[ArrayLike, ""],
    *,
    batch: int,
) -> Float[Array, ""]:
    """Mean softmax output for the class of `x` over a random batch of eligible leakage probes, one draw each.

    A noisy, differentiable `leakage`: the penalty of a search.

    Args:
      key: typed key of the batch and of its draws.
      probes, smoothed, x, prediction: as in `leakage`.
      batch: how many probes (static), drawn without replacement; all that are eligible, if there are fewer.

    Returns:
      float [] in [0, 1]; 0 if no probe is eligible. Errors as in `leakage`.
    """
    batch_key, draw_key = jax.random.split(key)
    eligible = _eligible(probes, x, prediction)
    order = jnp.where(eligible, jax.random.uniform(batch_key, eligible.shape), -1.0)
    chosen = jax.lax.top_k(order, min(batch, len(order)))[1]
    probs = probs_of_each(draw_key, smoothed, jnp.asarray(probes.images)[chosen])[:, prediction]
    return jnp.where(eligible[chosen], probs, 0.0).sum() / jnp.maximum(eligible[chosen].sum(), 1)


def _eligible(probes: Probes, x: ArrayLike, prediction: ArrayLike) -> Bool[Array, " m"]:
    """Which probes can leak to the class `prediction` of `x`."""
    images, classes = jnp.asarray(probes.images), jnp.asarray(probes.classes)
    if jnp.shape(x) != images.shape[1:]:
        raise ValueError(f"x must have the leakage probes' shape {list(images.shape[1:])}, got {list(jnp.shape(x))}")
    other = (images != x).reshape(len(images), -1).any(axis=1)
    return other & (classes != prediction) & (jnp.asarray(prediction) >= 0)
