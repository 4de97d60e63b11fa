"""A linear classifier, whose class probabilities and their derivatives are known, and the point where it is tested."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats

from ancer_jax import Gaussian, Smoothed
from tests import reference

RNG = np.random.default_rng(0)
D, ALPHA = 6, 0.001
W, X, THETA = RNG.normal(size=D), RNG.normal(size=D), RNG.uniform(0.3, 0.6, D)
B = -float(W @ X) + 1.3 * np.linalg.norm(W * THETA)  # class 1 has probability Phi(1.3) = 0.90
X32, THETA32 = X.astype(np.float32), THETA.astype(np.float32)
CLASSIFIER = reference.linear(W, B)
SMOOTHED = Smoothed(CLASSIFIER, Gaussian(), THETA32)
KEYS = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), i))(jnp.arange(400))


def probability(x, theta, w=W, b=B):
    """Of class 1, in float64."""
    return scipy.special.ndtr((w @ x + b) / np.linalg.norm(w * theta))


def gap_of(p, num_samples):
    """Gap of the Clopper-Pearson bound for the share p of that many draws."""
    return scipy.special.ndtri(scipy.stats.beta.ppf(ALPHA, num_samples * p, num_samples - num_samples * p + 1))


def gap_slope(p, num_samples, step=1e-6):
    """Derivative of `gap_of` in p, by a central finite difference."""
    return (gap_of(p + step, num_samples) - gap_of(p - step, num_samples)) / (2 * step)


def differences(function, at, step=1e-6):
    """Central finite differences of a function of a vector, in float64."""
    return np.array([(function(at + step * e) - function(at - step * e)) / (2 * step) for e in np.eye(len(at))])


def means(derivatives):
    """Mean over keys and its standard error."""
    derivatives = np.asarray(derivatives, np.float64)
    return derivatives.mean(0), derivatives.std(0) / np.sqrt(len(derivatives))
