"""Sample-wise noise parameters: gradient ascent on the size of the certifiable region (the method of ANCER).

Both searches work on one input, and can be vmapped; they are compiled once for each config and shape of input. What
they return is a choice of theta, not a certificate: theta is then certified with fresh draws.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from ancer_jax._checks import check_type
from ancer_jax._numerics import geometric_mean
from ancer_jax.search.config import THETA_MAX_FACTOR, AnisotropicConfig, IsotropicConfig, SearchConfig
from ancer_jax.search.leakage import Probes, leakage_penalty
from ancer_jax.smoothing.noise import noise_dtype
from ancer_jax.smoothing.smoothed import Smoothed, Stage, smoothed_probs, stage_key, theta_like

# A soft gap of 0 has no logarithm; the gradient of the "log_volume" objective is bounded by 1 / _SMALLEST_GAP.
_SMALLEST_GAP = 1e-3

Trace = TypeVar("Trace")


class SearchTrace(NamedTuple):
    """Soft estimates at the theta before each step; float [steps] each."""

    gap: Float[Array, " steps"]
    proxy_radius: Float[Array, " steps"]


def optimize_isotropic(
    key: Key[Array, ""],
    smoothed: Smoothed,
    x: Float[ArrayLike, "*d"],
    *,
    config: IsotropicConfig = IsotropicConfig(),
    probes: Probes | None = None,
) -> tuple[Float[Array, ""], SearchTrace]:
    """One noise level for this input: gradient ascent of `theta * soft_gap(theta)` over a scalar theta.

    With `objective="log_volume"`: `log(soft_gap) + log(theta)`. The soft gap is that of the mean softmax output
    (`Noise.proxy_gap`).

    Args:
      key: the example's key (the stage is folded in here).
      smoothed: smoothed classifier of the theta [] where the search starts: the noise level that the base classifier
        was trained with.
      x: [*d] one input.
      config: search settings.
      probes: leakage probes; needed if `config.leakage_weight` is above 0.

    Returns:
      theta [], in [start / 100, max(theta_max, start)], and the trace. Where a step is NaN, the last theta is kept.

    Raises:
      ValueError: outside jit, if the start is not positive and finite, or x is not finite; at trace time, if the start
        has another shape than [], x is not floating point, probes are needed and missing, or the config is that of
        another search.

    References: Alfarra et al. 2022 (arXiv 2012.04351).
    """
    check_type("config", config, IsotropicConfig, "IsotropicConfig(steps=...)")
    check_start(smoothed.theta, x)
    if shape := jnp.shape(smoothed.theta):
        raise ValueError(f"an isotropic search starts at one number, got a theta of shape {list(shape)}")
    return _isotropic(key, smoothed, jnp.asarray(x), config, probes)


@functools.partial(jax.jit, static_argnames="config")
def _isotropic(key, smoothed: Smoothed, x: jax.Array, config: IsotropicConfig, probes: Probes | None):
    start = jnp.asarray(smoothed.theta, noise_dtype(x))
    key, smoothed = stage_key(key, Stage.ISOTROPIC), smoothed.with_theta(start)
    objective = lambda theta, gap: theta * gap
    return _climb(key, smoothed, x, config, probes, objective, start / 100, published=optax.sgd(config.learning_rate))


def optimize_anisotropic(
    key: Key[Array, ""],
    smoothed: Smoothed,
    x: Float[ArrayLike, "*d"],
    *,
    config: AnisotropicConfig = AnisotropicConfig(),
    probes: Probes | None = None,
) -> tuple[Float[Array, "*d"], SearchTrace]:
    """One noise parameter per coordinate: projected gradient ascent.

    Maximises `soft_gap * (geometric_mean(theta) + kappa * min(theta))` (or, with `objective="log_volume"`,
    `log(soft_gap) + mean(log theta)`) subject to `start <= theta <= theta_max`, projecting after every step.

    Arguments and errors as in `optimize_isotropic`, but the start is [] or [*d], usually the isotropic theta.

    Returns:
      theta [*d] and the trace. Where a step is NaN, the last theta is kept. `theta >= start` alone does not make the
      certified region larger, because the class probability can fall: see `guarded_choice`.

    References: Eiras et al. 2022 (arXiv 2107.04570).
    """
    check_type("config", config, AnisotropicConfig, "AnisotropicConfig(steps=...)")
    check_start(smoothed.theta, x)
    return _anisotropic(key, smoothed, jnp.asarray(x), config, probes)


@functools.partial(jax.jit, static_argnames="config")
def _anisotropic(key, smoothed: Smoothed, x: jax.Array, config: AnisotropicConfig, probes: Probes | None):
    start = theta_like(smoothed.theta, x.shape, noise_dtype(x))
    key, smoothed = stage_key(key, Stage.ANISOTROPIC), smoothed.with_theta(start)
    objective = lambda theta, gap: gap * (geometric_mean(theta) + config.kappa * theta.min())
    return _climb(key, smoothed, x, config, probes, objective, start, published=optax.adam(config.learning_rate))


def check_start(theta: ArrayLike, x: ArrayLike) -> None:
    """Refuse inputs that are not floating point; outside jit, a start that is not positive and finite, or inputs that
    are not finite.
    """
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise ValueError(f"x must be floating point, got {jnp.result_type(x)}")
    if not isinstance(x, jax.core.Tracer) and not np.isfinite(np.asarray(x)).all():
        raise ValueError("x must be finite")
    if not isinstance(theta, jax.core.Tracer):
        theta = np.asarray(theta)
        if not ((theta > 0) & np.isfinite(theta)).all():
            raise ValueError(f"the theta where the search starts must be positive and finite, got {theta.min()}")


def _climb(
    key: Key[Array, ""],
    smoothed: Smoothed,
    x: jax.Array,
    config: SearchConfig,
    probes: Probes | None,
    ancer_objective: Callable[[jax.Array, jax.Array], jax.Array],
    lower: jax.Array,
    *,
    published: optax.GradientTransformation,
) -> tuple[jax.Array, SearchTrace]:
    """theta and the trace, from `smoothed.theta`: projected gradient ascent with fresh draws at every step.

    `ancer_objective(theta, soft gap)` is maximised, unless `config.objective` is "log_volume". `published` optimizes
    theta in the papers' code; the "log" ascent has its own optimizer, of log(theta).
    """
    start = jnp.asarray(smoothed.theta)
    if config.leakage_weight > 0 and probes is None:
        raise ValueError(f"leakage_weight = {config.leakage_weight} needs leakage probes, got None")
    upper = jnp.maximum(THETA_MAX_FACTOR * start if config.theta_max is None else config.theta_max, start)
    if config.ascent == "log":
        # Searches are short: b2 = 0.99 averages squared gradients over a hundred steps, not over a thousand.
        optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps), b2=0.99)
    else:
        optimizer = published

    def to_ascend(theta, i):
        at_step, searched = jax.random.fold_in(key, i), smoothed.with_theta(theta)
        probs = smoothed_probs(at_step, searched, x, num_samples=config.num_samples)
        gap = smoothed.noise.proxy_gap(probs)
        if config.objective == "log_volume":
            value = jnp.log(jnp.maximum(gap, _SMALLEST_GAP)) + jnp.log(theta).mean()
        else:
            value = ancer_objective(theta, gap)
        if config.leakage_weight > 0 and probes is not None:  # the penalty is for the class that x has at this step
            of_penalty = jax.random.fold_in(at_step, config.num_samples)  # the draws of x have smaller indices
            leaked = leakage_penalty(of_penalty, probes, searched, x, probs.argmax(), batch=config.leakage_batch)
            value -= config.leakage_weight * leaked
        return value, SearchTrace(gap, gap * geometric_mean(theta))

    return ascend(to_ascend, start, (lower, upper), optimizer, steps=config.steps, in_log=config.ascent == "log")


def ascend(
    objective: Callable[[jax.Array, jax.Array], tuple[jax.Array, Trace]],
    start: jax.Array,
    bounds: tuple[jax.Array, jax.Array],
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    in_log: bool,
) -> tuple[jax.Array, Trace]:
    """theta after projected gradient ascent of `objective(theta, step) -> (value, trace)`, and the traces of all steps.

    theta stays within the bounds, between which it starts. With `in_log` the optimizer moves log(theta). Where a step
    is not finite, the last theta is kept.
    """
    lower, upper = bounds
    to_position, to_theta = (jnp.log, jnp.exp) if in_log else (jnp.asarray, jnp.asarray)

    def loss(position, i):
        value, trace = objective(to_theta(position), i)
        return -value, trace

    def step(carry, i):
        position, state = carry
        gradient, trace = jax.grad(loss, has_aux=True)(position, i)
        updates, new_state = optimizer.update(gradient, state)
        new_position = jnp.clip(position + updates, to_position(lower), to_position(upper))
        finite = jnp.isfinite(to_theta(new_position)).all()
        keep = lambda new, old: jnp.where(finite, new, old)
        return jax.tree.map(keep, (new_position, new_state), carry), trace

    carry = to_position(start), optimizer.init(to_position(start))
    (position, _), trace = jax.lax.scan(step, carry, jnp.arange(steps))
    theta = jnp.where(position >= to_position(upper), upper, to_theta(position))  # exp may round the bound
    return jnp.clip(theta, lower, upper), trace
