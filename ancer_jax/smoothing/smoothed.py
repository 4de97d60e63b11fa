"""The smoothed classifier, and Monte Carlo on it: the only place where noise meets a network.

Draw i of a stage uses the key `fold_in(fold_in(key, stage), i)`: stages share no draw, and chunk size, batch size and
number of devices change no random bit and, on CPUs, no bit of the noise. (Of coloured noise: no bit of its
coefficients. They are transformed to pixels in float32, whose last digits may differ. A classifier outside of JAX gets
its noisy copies from a program of their own, whose last digits may differ, too.)
"""

import dataclasses
import enum
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key, UInt

from ancer_jax._checks import check_integer
from ancer_jax._numerics import Leaf
from ancer_jax.smoothing.classifier import WRAP_IT, Classifier
from ancer_jax.smoothing.noise import Noise, noise_dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Smoothed:
    """The smoothed classifier `g(x) = argmax_c P(classifier(noisy copy of x) = c)`: what is certified. A pytree.

    Attributes:
      classifier: base classifier. It need not be robust, but must pass `check_classifier`.
      noise: noise law (static).
      theta: [] or [*d] noise parameter, positive, in the units of the input.

    Raises:
      ValueError: if arguments are in the wrong order, or the network is no `Classifier`.
    """

    classifier: Classifier
    noise: Noise = dataclasses.field(metadata={"static": True})
    theta: Leaf

    def __post_init__(self):
        # JAX may put placeholders into the fields of a pytree: only what is certainly wrong is refused.
        if not isinstance(self.noise, Noise) or isinstance(self.theta, Classifier):
            got = ", ".join(type(value).__name__ for value in (self.classifier, self.noise, self.theta))
            hint = f"; write {self.noise.__name__}()" if isinstance(self.noise, type) else ""
            raise ValueError(f"Smoothed(classifier, noise, theta): got arguments of types {got}{hint}")
        if callable(self.classifier) and not isinstance(self.classifier, Classifier):
            kind = type(self.classifier).__name__
            raise ValueError(f"{kind} is not a Classifier: {WRAP_IT}")

    def with_theta(self, theta: ArrayLike) -> "Smoothed":
        """The smoothed classifier of another theta."""
        return dataclasses.replace(self, theta=theta)


class Stage(enum.IntEnum):
    """What draws are for; each stage's draws are independent of the others'.

    All but the first three are larger than any id of an input: ids are below 2^31. A batch folds the ids of its inputs
    into its own key, so a search may have the key of a batch, too. The first three are used with the key of one input,
    which is never that of a batch.
    """

    SELECT = 0
    ESTIMATE = 1
    PREDICT = 2
    ISOTROPIC = 2**31
    ANISOTROPIC = 2**31 + 1
    GUARD = 2**31 + 2
    LEAKAGE = 2**31 + 3
    SOFT_LEAKAGE = 2**31 + 4
    UNIVERSAL = 2**31 + 5
    DIFFERENTIABLE = 2**31 + 6
    PILOT = 2**31 + 7
    CARRY = 2**31 + 8


def stage_key(key: Key[Array, ""], stage: Stage | UInt[Array, ""]) -> Key[Array, ""]:
    """The key of one stage of one example."""
    check_key(key)
    return jax.random.fold_in(key, np.uint32(stage) if isinstance(stage, Stage) else stage)


def check_key(key: Key[Array, ""]) -> None:
    """Refuse all but one typed threefry key: other draws change under vmap."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed or str(jax.random.key_impl(key)) != "threefry2x32":
        raise ValueError("key must be a typed threefry key: jax.random.key(seed, impl='threefry2x32')")
    if key.shape:
        many = "for many inputs use certify_batch or predict_batch with one key and ids, or jax.vmap"
        raise ValueError(f"key must be a single key, got keys of shape {list(key.shape)}; {many}")


def _noisy_logits(key: Key[Array, ""], smoothed: Smoothed, x: ArrayLike, draws: jax.Array) -> jax.Array:
    """Logits [m, K] of `x` [m, *d], or [1, *d] for all, under the noise draws with the given indices [m]."""
    return smoothed.classifier(_noisy_copies(key, smoothed.noise, smoothed.theta, x, draws))


def _noisy_copies(key: Key[Array, ""], noise: Noise, theta: ArrayLike, x: ArrayLike, draws: jax.Array) -> jax.Array:
    """What the network gets: noise is drawn and added in float32 or wider, the copies are in the type of x."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise ValueError(f"x must be floating point, got {jnp.result_type(x)}")
    dtype, wide = jnp.result_type(x), noise_dtype(x)
    x = jnp.asarray(x, wide)
    theta = theta_like(theta, x.shape[1:], wide)
    copy = lambda draw, x: noise.perturb(key, draw, x, theta)
    axis, x = (0, x) if len(x) > 1 else (None, x[0])
    return jax.vmap(copy, (0, axis))(draws, x).astype(dtype)


def theta_like(theta: ArrayLike, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """theta [] or [*d], for one input of the given shape [*d]: as an array [*d].

    Raises:
      ValueError: for a theta of any other shape. NumPy's rules would, for instance, take three numbers for channels,
        which certificates take for three inputs.
    """
    check_theta_shape(theta, shape)
    return jnp.broadcast_to(jnp.asarray(theta, dtype), shape)


def check_theta_shape(theta: ArrayLike, shape: tuple[int, ...]) -> None:
    """ValueError if theta is neither a scalar nor of the shape of an input."""
    if jnp.shape(theta) not in ((), shape):
        raise ValueError(f"theta must be a scalar or have x's shape {list(shape)}, got {list(jnp.shape(theta))}")


_compiled_noisy_copies = jax.jit(_noisy_copies, static_argnames="noise")


def class_counts(
    key: Key[Array, ""], smoothed: Smoothed, x: Float[ArrayLike, "*d"], *, num_samples: int, chunk: int
) -> Int[Array, " K"]:
    """How many of `num_samples` noisy copies of `x` the base classifier puts into each class: int32 [K].

    `counts[c] = #{i : f(noisy copy i of x) = c}`. A draw with a NaN logit votes for no class, so that the counts may
    add up to less than `num_samples`. Memory is that of `chunk` copies, whatever `num_samples`.

    Args:
      key: typed key of the draws; draw i uses `fold_in(key, i)`.
      smoothed: smoothed classifier.
      x: [*d] one input.
      num_samples: number of draws (static).
      chunk: how many draws at a time (static); changes speed and memory, never the draws.

    Raises:
      ValueError: at trace time, if `num_samples` or `chunk` is not an integer of at least 1, x is not floating point,
        theta is neither a scalar nor of x's shape, or the noise is enumerable.
    """
    check_integer("num_samples", num_samples)
    check_integer("chunk", chunk)
    check_random(smoothed.noise)
    chunk = min(int(chunk), int(num_samples))
    return class_counts_between(key, smoothed, x, (0, num_samples), steps=math.ceil(num_samples / chunk), chunk=chunk)


def check_random(noise: Noise) -> None:
    """Refuse enumerable noise, all draws of which have to be counted."""
    if noise.enumerable:
        raise ValueError("the draws of enumerable noise must all be counted, which only certify_dataset does")


def class_counts_between(
    key: Key[Array, ""],
    smoothed: Smoothed,
    x: Float[ArrayLike, "*d"],
    draws: tuple[Int[ArrayLike, ""], Int[ArrayLike, ""]],
    *,
    steps: Int[ArrayLike, ""],
    chunk: int,
) -> Int[Array, " K"]:
    """Like `class_counts`, but of a range of draws, and of enumerable noise, too. Counts of disjoint ranges add up.

    Args:
      key, smoothed, x, chunk: as in `class_counts`.
      draws: first and stop: the draws `first, ..., stop - 1`. May be traced.
      steps: how many chunks are computed, `(stop - first) / chunk` or more; draws from `stop` on are left out. May be
        traced, but should be the same for all examples of a batch.

    Raises:
      ValueError: if `chunk` is not an integer or below 1.
    """
    check_integer("chunk", chunk)  # a fraction would count draws twice
    first, stop = draws
    if smoothed.classifier.on_host:
        return _counts_on_host(key, smoothed, jnp.asarray(x), draws, chunk)

    def add(step, counts):
        indices = first + step * chunk + jnp.arange(chunk)
        logits = _noisy_logits(key, smoothed, jnp.asarray(x)[None], indices)
        left = jnp.asarray(stop) - first - step * chunk
        counted = (jnp.arange(chunk) < left) & ~jnp.isnan(logits).any(axis=-1)
        votes = jax.nn.one_hot(logits.argmax(axis=-1), smoothed.classifier.num_classes, dtype=jnp.int32)
        return counts + (votes * counted[:, None]).sum(axis=0, dtype=jnp.int32)

    return jax.lax.fori_loop(0, steps, add, jnp.zeros(smoothed.classifier.num_classes, jnp.int32))


def _counts_on_host(key, smoothed: Smoothed, x: jax.Array, draws: tuple[Any, Any], chunk: int) -> jax.Array:
    """`class_counts_between` of a classifier outside of JAX."""
    counts, (first, stop) = np.zeros(smoothed.classifier.num_classes, np.int64), map(int, draws)
    for start in range(first, stop, chunk):
        indices = start + jnp.arange(chunk)  # a whole chunk each time: one compiled program
        copies = _compiled_noisy_copies(key, smoothed.noise, smoothed.theta, x[None], indices)
        logits = np.asarray(smoothed.classifier(copies[: stop - start]))
        counted = ~np.isnan(logits).any(axis=-1)
        counts += np.bincount(logits[counted].argmax(axis=-1), minlength=len(counts))
    return jnp.asarray(counts, jnp.int32)


_compiled_counts_between = jax.jit(class_counts_between, static_argnames="chunk")


def count_range(
    key: Key[Array, ""], smoothed: Smoothed, x: Float[Array, "*d"], draws: tuple[int, int], *, chunk: int
) -> Int[Array, " K"]:
    """`class_counts_between` outside of a traced program: one is compiled for each chunk, noise and shape of x."""
    first, stop = draws
    chunk = max(1, min(chunk, stop - first))
    count = class_counts_between if smoothed.classifier.on_host else _compiled_counts_between
    return count(key, smoothed, x, draws, steps=math.ceil((stop - first) / chunk), chunk=chunk)


def smoothed_probs(
    key: Key[Array, ""], smoothed: Smoothed, x: Float[ArrayLike, "*d"], *, num_samples: int
) -> Float[Array, " K"]:
    """Mean softmax output over `num_samples` noisy copies of `x`, float [K]: a soft estimate of class probabilities.

    Differentiable in x, theta (reparameterised noise) and the classifier's variables. All copies are held at once.
    Arguments and errors as in `class_counts`.
    """
    check_integer("num_samples", num_samples)
    check_random(smoothed.noise)
    logits = _noisy_logits(key, smoothed, jnp.asarray(x)[None], jnp.arange(num_samples))
    return jax.nn.softmax(logits, axis=-1).mean(axis=0)


def probs_of_each(key: Key[Array, ""], smoothed: Smoothed, images: Float[ArrayLike, "m *d"]) -> Float[Array, "m K"]:
    """Softmax output at one noisy copy of each of several images, that of image i from the key `fold_in(key, i)`.

    Differentiable like `smoothed_probs`. All copies are held at once.
    """
    check_random(smoothed.noise)
    return jax.nn.softmax(_noisy_logits(key, smoothed, images, jnp.arange(jnp.shape(images)[0])), axis=-1)
