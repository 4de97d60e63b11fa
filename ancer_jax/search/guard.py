"""The guarded choice between two thetas of one input."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Key

from ancer_jax._checks import check_type
from ancer_jax.regions.pairs import is_superset
from ancer_jax.regions.region import Region
from ancer_jax.search.config import GuardConfig
from ancer_jax.search.leakage import Probes, leakage
from ancer_jax.smoothing import bounds
from ancer_jax.smoothing.noise import noise_dtype
from ancer_jax.smoothing.smoothed import Smoothed, Stage, class_counts, stage_key, theta_like


def guarded_choice(
    key: Key[Array, ""],
    smoothed: Smoothed,
    x: Float[ArrayLike, "*d"],
    candidate: Float[ArrayLike, "..."],
    *,
    config: GuardConfig,
    probes: Probes | None = None,
) -> tuple[Float[Array, "*d"], Bool[Array, ""]]:
    """Choose between two thetas of one input, say the isotropic and the anisotropic, on draws of their own.

    Both thetas get a Clopper-Pearson gap from the same `config.num_samples` draws. With the criterion "volume" the
    candidate must have the same class and the larger proxy radius; with "superset" the same class and a region that
    contains the other one; with "off" it is taken. With a leakage limit, whatever the criterion, it must also keep
    `leakage` to the class it votes for at or below the limit.

    Args:
      key: the example's key (the stage is folded in here).
      smoothed: smoothed classifier of the current theta, [] or [*d], kept unless the candidate is taken.
      x: [*d] one input.
      candidate: theta [] or [*d] that may replace it.
      config: criterion and draws (static).
      probes: leakage probes; needed with a limit.

    Returns:
      theta [*d], and whether it is the candidate.

    Raises:
      ValueError: at trace time, if a limit lacks probes, a theta has neither shape [] nor x's, or `config` is no
        `GuardConfig`.
    """
    check_type("config", config, GuardConfig, "GuardConfig(criterion=...)")
    if config.leakage_limit is not None and probes is None:
        raise ValueError(f"leakage_limit = {config.leakage_limit} needs leakage probes, got None")
    return _choose(key, smoothed, jnp.asarray(x), candidate, config, probes)


@functools.partial(jax.jit, static_argnames="config")
def _choose(key, smoothed: Smoothed, x: jax.Array, candidate: ArrayLike, config: GuardConfig, probes: Probes | None):
    current, candidate = (theta_like(theta, x.shape, noise_dtype(x)) for theta in (smoothed.theta, candidate))
    if config.criterion == "off" and config.leakage_limit is None:
        return candidate, jnp.asarray(True)
    key = stage_key(key, Stage.GUARD)

    def class_and_region(theta: jax.Array) -> tuple[jax.Array, Region]:
        counts = class_counts(key, smoothed.with_theta(theta), x, num_samples=config.num_samples, chunk=config.chunk)
        p_lower = bounds.clopper_pearson_lower_traced(counts.max(), config.num_samples, config.alpha)
        return counts.argmax(), smoothed.noise.region(x, theta, smoothed.noise.gap(p_lower))

    class_candidate, region_candidate = class_and_region(candidate)
    taken = jnp.asarray(True)
    if config.criterion != "off":
        class_current, region_current = class_and_region(current)
        if config.criterion == "volume":
            taken = region_candidate.proxy_radius > region_current.proxy_radius
        else:
            taken = is_superset(region_candidate, region_current) & (region_candidate.gap > 0)
        taken &= class_candidate == class_current
    if config.leakage_limit is not None and probes is not None:
        leaked, eligible = leakage(probes, smoothed.with_theta(candidate), x, class_candidate, chunk=config.chunk)
        taken &= leaked / jnp.maximum(eligible, 1) <= config.leakage_limit
    return jnp.where(taken, candidate, current), taken
