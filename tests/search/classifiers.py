"""Small classifiers whose behaviour under noise is known, for the searches and the guarded choice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ancer_jax import Gaussian, Smoothed, from_function
from ancer_jax.search.leakage import leakage, make_probes

KEY = jax.random.key(0)
ORIGIN = np.zeros(1, np.float32)
STEEP = 50.0


def interval_logits(half_width, x):
    """Class 1 iff |x| < half_width in every coordinate, with a steep slope, so that soft and hard votes agree."""
    inside = STEEP * jnp.min(half_width - jnp.abs(x), axis=-1)
    return jnp.stack([-inside, inside], axis=-1)


def interval(*half_widths):
    return from_function(interval_logits, np.float32(half_widths), num_classes=2)


def paintable_logits(_, x):
    """Class 1 iff the first coordinate is positive, or the second one is far from 0; the third one is ignored."""
    score = 10 * jnp.maximum(x[:, 0], jnp.abs(x[:, 1]) - 1)
    return jnp.stack([-score, score], axis=-1)


# Wide noise in the second coordinate makes every input of class 1. PAINTED is of class 1 without it.
PAINTABLE = Smoothed(from_function(paintable_logits, (), num_classes=2), Gaussian(), 0.25)
PAINTED = np.float32([0.5, 0, 0])


@functools.cache
def paintable_probes():
    """24 images, about half of them of each class, whose second coordinate is too small to decide anything."""
    images = np.random.default_rng(0).uniform(-1, 1, (24, 3)).astype(np.float32) * np.float32([1, 0.1, 1])
    return make_probes(jax.random.split(KEY, 24), PAINTABLE, images, num_samples=16, chunk=16)


def leakage_to_class_1(theta):
    """(leaked, eligible) of the paintable classifier under theta."""
    counts = leakage(paintable_probes(), PAINTABLE.with_theta(theta), PAINTED, 1, chunk=16)
    return tuple(int(count) for count in counts)
