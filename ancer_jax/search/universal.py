"""One theta map for all inputs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from ancer_jax._checks import check_type
from ancer_jax.differentiable.estimates import EstimateConfig, check_labels, estimated_region
from ancer_jax.search.ascent import ascend, check_start
from ancer_jax.search.config import THETA_MAX_FACTOR, UniversalConfig
from ancer_jax.smoothing.noise import noise_dtype
from ancer_jax.smoothing.smoothed import Smoothed, Stage, stage_key, theta_like


def optimize_universal(
    key: Key[Array, ""],
    smoothed: Smoothed,
    images: Float[ArrayLike, "images *d"],
    labels: Int[ArrayLike, " images"],
    *,
    config: UniversalConfig = UniversalConfig(),
    progress: Callable[[Any, Any], None] | None = None,
) -> tuple[Float[Array, "*d"], Float[Array, " steps"]]:
    """A universal theta: one value for each coefficient in the basis of the noise, the same for all inputs.

    Adam ascent of the mean estimated proxy radius: ACR-tilde with estimated regions (`estimated_region`, soft, of the
    images' labels), where an image that the smoothed classifier gets wrong counts 0. It ascends `log theta`, with a
    rate that falls to 0 along a cosine, in `[theta_min, theta_max]`. The upper bound keeps the noise from erasing
    every image: the constant classifier would be right on one class, with regions as large as the noise.

    Args:
      key: typed key of the draws and of the choice of images.
      smoothed: smoothed classifier of the theta [] or [*d] where the ascent starts.
      images, labels: of the training data. Theta must not depend on the draws of the certificates that use it: learned
        on test images, it needs another seed than the run that certifies, and flatters the accuracy.
      config: settings of the ascent (static).
      progress: called on the host with the number of each step and its objective (static).

    Returns:
      theta [*d], and the objective at each step [steps]. Where a step is not finite, the last finite theta is kept.

    Guarantee: none of size. Certificates with this theta are all of one smoothed classifier: they need no memory.

    Raises:
      ValueError: if there is not a label for each image, or the config is of another type; outside jit, if a label is
        not a class, images are not finite, or the start is not positive and finite.
    """
    if len(np.shape(labels)) != 1 or np.shape(labels) != np.shape(images)[:1]:
        raise ValueError(f"there must be a label for each image, got {np.shape(labels)} and {np.shape(images)}")
    check_type("config", config, UniversalConfig, "UniversalConfig(steps=...)")
    check_labels(labels, smoothed.classifier)
    check_start(smoothed.theta, images)
    key = stage_key(key, Stage.UNIVERSAL)
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    start = theta_like(smoothed.theta, images.shape[1:], noise_dtype(images))
    lower = start / 10 if config.theta_min is None else jnp.minimum(config.theta_min, start)
    upper = THETA_MAX_FACTOR * start if config.theta_max is None else jnp.maximum(config.theta_max, start)
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))
    estimate = EstimateConfig(config.num_samples, config.alpha)

    def size(theta, key, x, label):
        region = estimated_region(key, smoothed.with_theta(theta), x, label, config=estimate)
        return jnp.asarray(region.proxy_radius)

    def mean_size(theta, i):
        of_choice, of_noise = jax.random.split(jax.random.fold_in(key, i))
        chosen = jax.random.randint(of_choice, (config.batch_size,), 0, len(images))
        batch = jax.random.split(of_noise, config.batch_size), images[chosen], labels[chosen]
        value = jax.vmap(size, (None, 0, 0, 0))(theta, *batch).mean()
        if progress is not None:
            jax.debug.callback(progress, i, value)
        return value, value

    return ascend(mean_size, start, (lower, upper), optimizer, steps=config.steps, in_log=True)
