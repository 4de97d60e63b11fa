"""Monte Carlo on the smoothed classifier: the only place where noise meets a classifier.

Draw i of a stage uses the key `fold_in(fold_in(key, stage), i)`, so that no draw is used twice and neither chunk size,
batch size nor device count changes a bit of the noise.
"""

import enum
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Key

from ancer_jax._checks import check_integer
from ancer_jax.certificates import Certificate, SplittingL1, noise_dtype
from ancer_jax.classifiers import Classifier


class Stage(enum.IntEnum):
    """What draws are for; each stage's draws are independent of the others'."""

    SELECT = 0
    ESTIMATE = 1
    PREDICT = 2
    ISOTROPIC = 3
    ANISOTROPIC = 4
    GUARD = 5
    LEAKAGE = 6
    DIFFERENTIABLE = 7
    PILOT = 8
    SOFT_LEAKAGE = 9


def stage_key(key: Key[Array, ""], stage: Stage | Int[Array, ""]) -> Key[Array, ""]:
    """The key of one stage of one example.

    Raises:
      ValueError: at trace time, if `key` is no typed threefry key: the other generators' draws change under vmap.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or str(jax.random.key_impl(key)) != "threefry2x32":
        raise ValueError("key must be a typed threefry key: jax.random.key(seed, impl='threefry2x32')")
    return jax.random.fold_in(key, stage)


def _noisy_logits(key, classifier, certificate, x, theta, draws):
    """Logits [m, K] of `x` [m, *d], or [1, *d] for all, under the noise draws with the given indices [m].

    Noise is drawn and added in float32 or wider; the network gets the copies in the type of x.
    """
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise ValueError(f"x must be floating point, got {jnp.result_type(x)}")
    dtype, wide = jnp.result_type(x), noise_dtype(x)
    x = jnp.asarray(x, wide)
    theta = jnp.broadcast_to(jnp.asarray(theta, wide), x.shape[1:])
    copy = lambda draw, x: certificate.perturb(key, draw, x, theta)
    copies = jax.vmap(copy, (0, 0 if len(x) > 1 else None))(draws, x if len(x) > 1 else x[0])
    return classifier(copies.astype(dtype))


def class_counts(
    key: Key[Array, ""],
    classifier: Classifier,
    certificate: Certificate,
    x: Float[ArrayLike, "*d"],
    theta: Float[ArrayLike, "..."],
    *,
    num_samples: int,
    chunk: int,
) -> Int[Array, " K"]:
    """How many of `num_samples` noisy copies of `x` the base classifier puts into each class.

    `counts[c] = #{i : f(x + theta * eps_i) = c}`. A draw with a NaN logit votes for no class, so that the counts may
    add up to less than `num_samples`. Memory is that of `chunk` copies, whatever `num_samples`.

    Args:
      key: typed key of the draws; draw i uses `fold_in(key, i)`.
      classifier, certificate: base classifier and noise law.
      x: [*d] one input.
      theta: [] or [*d] noise parameter, in the units of x.
      num_samples: number of draws (static).
      chunk: how many draws at a time (static); changes speed and memory, never the draws.

    Returns:
      int32 [K].

    Raises:
      ValueError: at trace time, if `num_samples` or `chunk` is not an integer of at least 1, x is not floating point,
        or the noise is the exact form of splitting noise, whose draws are not random.
    """
    check_integer("num_samples", num_samples)
    check_integer("chunk", chunk)
    check_random(certificate)
    chunk = min(int(chunk), int(num_samples))
    steps = math.ceil(num_samples / chunk)
    return class_counts_between(
        key, classifier, certificate, x, theta, first=0, stop=num_samples, steps=steps, chunk=chunk
    )


def check_random(certificate: Certificate) -> None:
    """Refuse the exact form of splitting noise, whose draws are not random.

    Raises:
      ValueError: if it is that.
    """
    if isinstance(certificate, SplittingL1) and certificate.exact:
        raise ValueError("exact certificates are of all draws there are, not of some: certify_dataset with exact=True")


def class_counts_between(
    key: Key[Array, ""],
    classifier: Classifier,
    certificate: Certificate,
    x: Float[ArrayLike, "*d"],
    theta: Float[ArrayLike, "..."],
    *,
    first: Int[ArrayLike, ""],
    stop: Int[ArrayLike, ""],
    steps: Int[ArrayLike, ""],
    chunk: int,
) -> Int[Array, " K"]:
    """`class_counts` of the draws `first`, ..., `stop - 1` alone: counts of ranges add up to those of their union.

    Args:
      first, stop: range of draws.
      steps: how many chunks are computed, `(stop - first) / chunk` or more; draws after these are left out. Like
        first and stop it may be traced, but should be the same for all examples of a batch.
      key, classifier, certificate, x, theta, chunk: as in `class_counts`; the exact form of splitting noise, too.

    Raises:
      ValueError: at trace time, if `chunk` is not an integer of at least 1 or x is not floating point.
    """
    check_integer("chunk", chunk)

    def add(step, counts):
        draws = first + step * chunk + jnp.arange(chunk)
        logits = _noisy_logits(key, classifier, certificate, jnp.asarray(x)[None], theta, draws)
        left = jnp.asarray(stop) - first - step * chunk
        counted = (jnp.arange(chunk) < left) & ~jnp.isnan(logits).any(axis=-1)
        votes = jax.nn.one_hot(logits.argmax(axis=-1), classifier.num_classes, dtype=jnp.int32)
        return counts + (votes * counted[:, None]).sum(axis=0, dtype=jnp.int32)

    return jax.lax.fori_loop(0, steps, add, jnp.zeros(classifier.num_classes, jnp.int32))


def smoothed_probs(
    key: Key[Array, ""],
    classifier: Classifier,
    certificate: Certificate,
    x: Float[ArrayLike, "*d"],
    theta: Float[ArrayLike, "..."],
    *,
    num_samples: int,
) -> Float[Array, " K"]:
    """Mean softmax output over `num_samples` noisy copies of `x`: a soft estimate of the class probabilities.

    Differentiable in x, theta (reparameterised noise) and the classifier's variables. All copies are held at once.
    Arguments as in `class_counts`.

    Returns:
      float [K], sums to 1.
    """
    check_integer("num_samples", num_samples)
    check_random(certificate)
    logits = _noisy_logits(key, classifier, certificate, jnp.asarray(x)[None], theta, jnp.arange(num_samples))
    return jax.nn.softmax(logits, axis=-1).mean(axis=0)


def probs_of_each(
    key: Key[Array, ""],
    classifier: Classifier,
    certificate: Certificate,
    images: Float[ArrayLike, "m *d"],
    theta: Float[ArrayLike, "..."],
) -> Float[Array, "m K"]:
    """Softmax output at one noisy copy of each of several images.

    Differentiable like `smoothed_probs`. All copies are held at once.

    Args:
      key: typed key of the draws; image i uses `fold_in(key, i)`.
      classifier, certificate: base classifier and noise law.
      images: [m, *d].
      theta: [] or [*d] noise parameter of all images, in their units.

    Returns:
      float [m, K], each row sums to 1.

    Raises:
      ValueError: at trace time, if the images are not floating point.
    """
    check_random(certificate)
    logits = _noisy_logits(key, classifier, certificate, images, theta, jnp.arange(jnp.shape(images)[0]))
    return jax.nn.softmax(logits, axis=-1)
