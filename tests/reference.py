"""Naive versions and closed-form classifiers to compare with."""

import jax
import jax.numpy as jnp
import numpy as np

import ancer_jax
from ancer_jax.smoothing import Stage


def linear_logits(variables, x):
    """Class 1 iff w.x + b > 0."""
    score = x.reshape(x.shape[0], -1) @ variables["w"] + variables["b"]
    return jnp.stack([jnp.zeros_like(score), score], axis=-1)


def linear(w, b=0.0):
    variables = {"w": np.asarray(w, np.float32), "b": np.float32(b)}
    return ancer_jax.from_function(linear_logits, variables, num_classes=2)


def first_coordinate(threshold=0.0, d=4):
    """Class 1 iff x[0] > threshold."""
    return linear(np.eye(d)[0], -threshold)


def constant_logits(variables, x):
    return jnp.broadcast_to(variables, (x.shape[0], variables.shape[0]))


def constant(logits):
    return ancer_jax.from_function(constant_logits, np.asarray(logits, np.float32), num_classes=len(logits))


def counts_one_by_one(key, classifier, certificate, x, theta, num_samples):
    counts = np.zeros(classifier.num_classes, int)
    for i in range(num_samples):
        noise = certificate.sample(jax.random.fold_in(key, i), jnp.broadcast_to(jnp.float32(theta), x.shape))
        logits = np.asarray(classifier((x + noise)[None]))[0]
        if not np.isnan(logits).any():
            counts[logits.argmax()] += 1
    return counts


def draws(key, stage: Stage, certificate, theta, num_samples):
    key = jax.random.fold_in(key, stage)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num_samples))
    return np.asarray(jax.vmap(lambda k: certificate.sample(k, theta))(keys))
