"""Sample-wise noise parameters: gradient ascent on the size of the certifiable region (method of ANCER).

All functions work on one input and are meant to be vmapped. What they return is a choice of theta, not a certificate:
theta is then certified with draws of its own.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Bool, Float, Key

from ancer_jax import bounds
from ancer_jax._checks import check_integer, check_real
from ancer_jax.certificates import Certificate, noise_dtype
from ancer_jax.classifiers import Classifier
from ancer_jax.leakage import References, leakage, soft_leakage
from ancer_jax.regions import Region, geometric_mean, is_superset, proxy_radius
from ancer_jax.smoothing import Stage, class_counts, smoothed_probs, stage_key

Objective = Literal["ancer", "log_volume"]
Ascent = Literal["log", "reference"]
_Config = TypeVar("_Config", bound="SearchConfig")
Guard = Literal["off", "volume", "superset"]

# Without a bound the search runs away: noise that erases the image makes the network constant, and the certificate of a
# constant function is huge, true and worthless.
THETA_MAX_FACTOR = 4.0
# A proxy gap of 0 has no logarithm; the gradient of the "log_volume" objective is bounded by 1 / _SMALLEST_GAP.
_SMALLEST_GAP = 1e-3


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """Settings that both searches share; they change the thetas that are found.

    Attributes:
      steps: ascent steps.
      num_samples: noise draws per step, fresh ones each time.
      learning_rate: step size: of log(theta), or with `ascent="reference"` in the units of x.
      ascent: "log", Adam over log(theta) with steps that end at 0 (a cosine); or "reference", what the papers' code
        does: plain gradient ascent over theta (isotropic), or Adam (anisotropic). See `reference`.
      objective: "ancer" (the paper's) or "log_volume" (log-volume divided by the dimension, up to constants).
      theta_max: upper bound of every coordinate of theta (never below `theta_init`); None means 4 times `theta_init`;
        `inf` is no bound.
      leakage_weight: how much of the soft leakage (`leakage.soft_leakage`) is taken off the objective; 0 is none. With
        weights of 20 and more plain gradient ascent can overshoot.
      leakage_batch: references per step.

    Raises:
      ValueError: if a setting is out of range.
    """

    steps: int = 100
    num_samples: int = 64
    learning_rate: float = 0.08
    ascent: Ascent = "log"
    objective: Objective = "ancer"
    theta_max: float | None = None
    leakage_weight: float = 0.0
    leakage_batch: int = 32

    def __post_init__(self):
        for name in ("steps", "num_samples", "leakage_batch"):
            check_integer(name, getattr(self, name))
        check_real("learning_rate", self.learning_rate, "(0, inf)")
        if self.theta_max is not None:
            check_real("theta_max", self.theta_max, "(0, inf]")
        check_real("leakage_weight", self.leakage_weight, "[0, inf)")
        for name, choices in (("objective", get_args(Objective)), ("ascent", get_args(Ascent))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")

    @classmethod
    def reference(cls: type[_Config], **changes: Any) -> _Config:
        """The settings of the papers' code, with `changes`: 100 draws, rate 0.04, and 900 (isotropic) or 100 steps."""
        steps = 900 if cls is IsotropicConfig else 100
        settings = {"steps": steps, "num_samples": 100, "learning_rate": 0.04, "ascent": "reference"}
        return cls(**settings | changes)


@dataclasses.dataclass(frozen=True)
class IsotropicConfig(SearchConfig):
    """Settings of `optimize_isotropic`; those of Alfarra et al. 2022 are `IsotropicConfig.reference()`."""

    steps: int = 20
    num_samples: int = 32
    learning_rate: float = 0.2


@dataclasses.dataclass(frozen=True)
class AnisotropicConfig(SearchConfig):
    """Settings of `optimize_anisotropic`; those of Eiras et al. 2022 are `AnisotropicConfig.reference()`.

    Attributes:
      kappa: weight of `min(theta)` in the "ancer" objective.
    """

    kappa: float = 2.0

    def __post_init__(self):
        super().__post_init__()
        check_real("kappa", self.kappa, "[0, inf)")


class OptimizeTrace(NamedTuple):
    """Soft estimates at the theta before each step; float [steps] each."""

    gap: Float[Array, " steps"]
    proxy_radius: Float[Array, " steps"]


def optimize_isotropic(
    key: Key[Array, ""],
    classifier: Classifier,
    certificate: Certificate,
    x: Float[ArrayLike, "*d"],
    theta_init: Float[ArrayLike, ""],
    *,
    config: IsotropicConfig,
    references: References | None = None,
) -> tuple[Float[Array, ""], OptimizeTrace]:
    """One noise level for this input: gradient ascent of `theta * proxy_gap(theta)` over a scalar theta.

    With `objective="log_volume"`: `log(proxy_gap) + log(theta)`.

    Args:
      key: the example's key (the stage is folded in here).
      classifier, certificate, x: as in `smoothing.class_counts`.
      theta_init: [] start, an array per example: the noise level the classifier was trained with.
      config: search settings.
      references: what `config.leakage_weight` is measured on; needed if that is above 0.

    Returns:
      theta [], in [theta_init / 100, theta_max], and the trace. Where a step is not finite, the last finite theta
      is kept.

    Raises:
      ValueError: outside jit, if `theta_init` is not positive and finite; at trace time, if references are needed and
        missing.

    References: Alfarra et al. 2022 (arXiv 2012.04351).
    """
    check_start(theta_init)
    x = jnp.asarray(x)
    theta_init = jnp.asarray(theta_init, noise_dtype(x))

    def objective(theta, gap):
        if config.objective == "log_volume":
            return jnp.log(jnp.maximum(gap, _SMALLEST_GAP)) + jnp.log(theta)
        return theta * gap

    return _ascend(
        stage_key(key, Stage.ISOTROPIC),
        classifier,
        certificate,
        x,
        theta_init,
        objective=objective,
        reference=optax.sgd(config.learning_rate),
        lower=theta_init / 100,
        config=config,
        references=references,
    )


def optimize_anisotropic(
    key: Key[Array, ""],
    classifier: Classifier,
    certificate: Certificate,
    x: Float[ArrayLike, "*d"],
    theta_init: Float[ArrayLike, "..."],
    *,
    config: AnisotropicConfig,
    references: References | None = None,
) -> tuple[Float[Array, "*d"], OptimizeTrace]:
    """One noise parameter per coordinate: projected gradient ascent.

    Maximises `proxy_gap * (geometric_mean(theta) + kappa * min(theta))` (or, with `objective="log_volume"`,
    `log(proxy_gap) + mean(log theta)`) subject to `theta_init <= theta <= theta_max`, projecting after every step.

    Args:
      key: the example's key (the stage is folded in here).
      classifier, certificate, x: as in `smoothing.class_counts`.
      theta_init: [] or [*d] start and lower bound: the isotropic theta. An array per example.
      config: search settings.
      references: what `config.leakage_weight` is measured on; needed if that is above 0.

    Returns:
      theta [*d] and the trace. Where a step is not finite, the last finite theta is kept. `theta >= theta_init` alone
      does not make the certified region larger, because the class probability can fall: see `guarded_choice`.

    Raises:
      ValueError: outside jit, if `theta_init` is not positive and finite; at trace time, if references are needed and
        missing.

    References: Eiras et al. 2022 (arXiv 2107.04570).
    """
    check_start(theta_init)
    x = jnp.asarray(x)
    theta_init = jnp.broadcast_to(jnp.asarray(theta_init, noise_dtype(x)), x.shape)

    def objective(theta, gap):
        if config.objective == "log_volume":
            return jnp.log(jnp.maximum(gap, _SMALLEST_GAP)) + jnp.log(theta).mean()
        return gap * (geometric_mean(theta) + config.kappa * theta.min())

    return _ascend(
        stage_key(key, Stage.ANISOTROPIC),
        classifier,
        certificate,
        x,
        theta_init,
        objective=objective,
        reference=optax.adam(config.learning_rate),
        lower=theta_init,
        config=config,
        references=references,
    )


def check_start(theta_init) -> None:
    """Refuse a start, or a bound, that is not positive and finite, outside jit."""
    if not isinstance(theta_init, jax.core.Tracer):
        theta = np.asarray(theta_init)
        if not ((theta > 0) & np.isfinite(theta)).all():
            raise ValueError(f"theta_init must be positive and finite, got {theta.min()}")


def _ascend(key, classifier, certificate, x, theta_init, *, objective, reference, lower, config, references):
    """Projected gradient ascent, fresh draws at every step, of `objective(theta, gap)` less the penalty:
    `leakage_weight` times the soft leakage to the class that x has at this step. It is over log(theta), or over theta
    with the optimizer `reference`.
    """
    if config.leakage_weight > 0 and references is None:
        raise ValueError(f"leakage_weight = {config.leakage_weight} needs references, got None")
    upper = THETA_MAX_FACTOR * theta_init if config.theta_max is None else config.theta_max
    upper = jnp.maximum(upper, theta_init)

    if config.ascent == "log":
        # The variance of gradients is forgotten over a hundred steps, not over a thousand: there are few.
        optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps), b2=0.99)
        inside, to_theta = jnp.log, jnp.exp
    else:
        optimizer, inside, to_theta = reference, jnp.asarray, jnp.asarray

    def loss(position, key):
        theta = to_theta(position)
        probs = smoothed_probs(key, classifier, certificate, x, theta, num_samples=config.num_samples)
        gap = certificate.proxy_gap(probs)
        value = objective(theta, gap)
        if config.leakage_weight > 0:
            # The draws of x have the indices below num_samples.
            key = jax.random.fold_in(key, config.num_samples)
            value -= config.leakage_weight * soft_leakage(
                key, references, classifier, certificate, x, theta, probs.argmax(), batch=config.leakage_batch
            )
        return -value, OptimizeTrace(gap, gap * geometric_mean(theta))

    def step(carry, i):
        position, state = carry
        gradient, trace = jax.grad(loss, has_aux=True)(position, jax.random.fold_in(key, i))
        updates, new_state = optimizer.update(gradient, state)
        new_position = jnp.clip(position + updates, inside(lower), inside(upper))
        finite = jnp.isfinite(to_theta(new_position)).all()
        keep = lambda new, old: jnp.where(finite, new, old)
        return jax.tree.map(keep, (new_position, new_state), (position, state)), trace

    start = inside(theta_init)
    (position, _), trace = jax.lax.scan(step, (start, optimizer.init(start)), jnp.arange(config.steps))
    theta = jnp.where(position >= inside(upper), upper, to_theta(position))  # the bound itself, whatever exp rounds
    return jnp.clip(theta, lower, upper), trace


def guarded_choice(
    key: Key[Array, ""],
    classifier: Classifier,
    certificate: Certificate,
    x: Float[ArrayLike, "*d"],
    theta_narrow: Float[ArrayLike, "..."],
    theta_wide: Float[ArrayLike, "..."],
    *,
    guard: Guard,
    num_samples: int,
    alpha: float = 0.001,
    chunk: int,
    references: References | None = None,
    leakage_limit: float | None = None,
    leakage_samples: int = 64,
) -> tuple[Float[Array, "*d"], Bool[Array, ""]]:
    """Choose between two thetas of one input, say the isotropic and the anisotropic, on draws that certify nothing.

    Both thetas get a Clopper-Pearson gap from the same `num_samples` draws. The second one is taken if it has the
    same class and, with `guard="volume"`, the larger proxy radius, or with `guard="superset"`, a region that contains
    the first one's; with `guard="off"`, always. With a leakage limit it must also keep `leakage.leakage` to the class
    it votes for at or below the limit.

    Args:
      key: the example's key (the stage is folded in here).
      classifier, certificate, x: as in `smoothing.class_counts`.
      theta_narrow, theta_wide: [] or [*d], first and second.
      guard: the criterion (static).
      num_samples, chunk: draws for each theta, and how many at a time (static).
      alpha: error probability of the bounds that are compared; no guarantee hangs on it.
      references: what leakage is measured on; needed with a limit.
      leakage_limit: share of the eligible references, in [0, 1] (static); None is no limit.
      leakage_samples: draws for each reference (static), as many as `references` was made with.

    Returns:
      theta [*d], and whether it is the second one.

    Raises:
      ValueError: at trace time, if there is no such guard, or the limit is out of range or lacks references.
    """
    if guard not in get_args(Guard):
        raise ValueError(f"guard must be one of {', '.join(get_args(Guard))}, got {guard!r}")
    check_integer("num_samples", num_samples)
    check_integer("leakage_samples", leakage_samples)
    if leakage_limit is not None:
        check_real("leakage_limit", leakage_limit, "[0, 1]")
    if leakage_limit is not None and references is None:
        raise ValueError(f"leakage_limit = {leakage_limit} needs references, got None")
    x = jnp.asarray(x)
    theta_narrow, theta_wide = (
        jnp.broadcast_to(jnp.asarray(theta, noise_dtype(x)), x.shape) for theta in (theta_narrow, theta_wide)
    )

    def estimate(theta):
        counts = class_counts(
            stage_key(key, Stage.GUARD), classifier, certificate, x, theta, num_samples=num_samples, chunk=chunk
        )
        gap = certificate.gap(bounds.clopper_pearson_lower_traced(counts.max(), num_samples, alpha))
        return counts.argmax(), Region(x, theta, gap, certificate.norm)

    if guard == "off" and leakage_limit is None:
        return theta_wide, jnp.asarray(True)
    class_wide, wide = estimate(theta_wide)
    taken = jnp.asarray(True)
    if guard != "off":
        class_narrow, narrow = estimate(theta_narrow)
        if guard == "volume":
            taken = proxy_radius(wide) > proxy_radius(narrow)
        else:
            taken = is_superset(wide, narrow) & (wide.gap > 0)
        taken &= class_wide == class_narrow
    if leakage_limit is not None and references is not None:
        leaked, eligible = leakage(
            references, classifier, certificate, x, theta_wide, class_wide, num_samples=leakage_samples, chunk=chunk
        )
        taken &= leaked / jnp.maximum(eligible, 1) <= leakage_limit
    return jnp.where(taken, theta_wide, theta_narrow), taken
