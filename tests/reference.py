"""Naive versions and closed-form classifiers to compare with."""

import jax
import jax.numpy as jnp
import numpy as np

from ancer_jax.smoothing import from_function
from ancer_jax.smoothing.smoothed import Stage


def linear_logits(variables, x):
    """Class 1 iff w.x + b > 0."""
    score = x.reshape(x.shape[0], -1) @ variables["w"] + variables["b"]
    return jnp.stack([jnp.zeros_like(score), score], axis=-1)


def linear(w, b=0.0):
    variables = {"w": np.asarray(w, np.float32), "b": np.float32(b)}
    return from_function(linear_logits, variables, num_classes=2)


def first_coordinate(threshold=0.0, d=4):
    """Class 1 iff x[0] > threshold."""
    return linear(np.eye(d)[0], -threshold)


def constant_logits(variables, x):
    return jnp.broadcast_to(variables, (x.shape[0], variables.shape[0]))


def constant(logits):
    return from_function(constant_logits, np.asarray(logits, np.float32), num_classes=len(logits))


def counts_one_by_one(key, smoothed, x, num_samples):
    """Votes under additive noise, one noisy copy after another."""
    classifier, theta = smoothed.classifier, jnp.broadcast_to(jnp.float32(smoothed.theta), x.shape)
    counts = np.zeros(classifier.num_classes, int)
    for i in range(num_samples):
        sample = smoothed.noise.sample(jax.random.fold_in(key, i), theta)
        logits = np.asarray(classifier((x + sample)[None]))[0]
        if not np.isnan(logits).any():
            counts[logits.argmax()] += 1
    return counts


def draws(key, stage: Stage, noise, theta, num_samples):
    """The first draws of additive noise of one stage."""
    key = jax.random.fold_in(key, stage)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num_samples))
    return np.asarray(jax.vmap(lambda k: noise.sample(k, theta))(keys))


def assert_same_certificates(batch, one_by_one):
    """That a batch of certificates has the bits and the types of those of its inputs."""
    assert len(batch) == len(one_by_one)
    for i, one in enumerate(one_by_one):
        assert jax.tree.structure(batch[i]) == jax.tree.structure(one)
        for value, expected in zip(jax.tree.leaves(batch[i]), jax.tree.leaves(one), strict=True):
            np.testing.assert_array_equal(value, expected)
            assert np.asarray(value).dtype == np.asarray(expected).dtype
