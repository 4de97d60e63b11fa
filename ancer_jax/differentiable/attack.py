"""An attack on a certified region: empirical evidence beside the proof."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from ancer_jax._checks import check_integer, check_type
from ancer_jax.differentiable.estimates import check_labels
from ancer_jax.regions.region import Region
from ancer_jax.smoothing.noise import noise_dtype
from ancer_jax.smoothing.smoothed import Smoothed, Stage, smoothed_probs, stage_key, theta_like


def attack(
    key: Key[Array, ""],
    smoothed: Smoothed,
    region: Region,
    prediction: Int[ArrayLike, ""],
    *,
    steps: int = 50,
    num_samples: int = 64,
) -> Float[Array, "*d"]:
    """The point of a region that projected gradient ascent through the noise finds least like its class.

    Increases `-log mean_i softmax(f(noisy copy i of y))_prediction` over y, with fresh draws at every step, in the
    coordinates `B(y - center) / theta`, B of the region's basis, where the region is a ball: steps along the normalised
    gradient, of `2.5 gap / steps`, projected to the ball. It is an expectation-over-transformation attack (Athalye et
    al. 2018), and SmoothAdv's (Salman et al. 2019) for ellipsoids and cross-polytopes. Like the certificate, it may
    leave [0, 1].

    Args:
      key: typed key; the attack's draws are none of those of certificates, even with the same key.
      smoothed: the smoothed classifier that is attacked.
      region: one region in which to look. A gap larger than the certified one shows how strong the attack is.
      prediction: [] the class that was certified. With the label of an image that is answered wrongly, the attack
        would make the certified class likelier.
      steps, num_samples: of the ascent, and draws of each step (static).

    Returns:
      y [*d], inside the region (`Region.contains`). What the smoothed classifier answers there, `certify` says. Room is
      left for rounding: in a small l1 region of very many pixels (gap 0.1, 150,000 pixels) only the center remains.

    Raises:
      ValueError: if region and noise have different norms or bases; outside jit, if `prediction` is not a class.
    """
    check_type("region", region, Region, "of a certificate, take certificate.region")
    if region.norm != smoothed.noise.norm:
        raise ValueError(f"the region is of norm {region.norm}, the noise certifies norm {smoothed.noise.norm}")
    if region.basis != smoothed.noise.basis:
        raise ValueError(f"the region is in the basis {region.basis}, the noise in {smoothed.noise.basis}")
    check_labels(prediction, smoothed.classifier)
    check_integer("steps", steps)
    check_integer("num_samples", num_samples)
    return _attack(key, smoothed, region, prediction, steps, num_samples)


@functools.partial(jax.jit, static_argnames=("steps", "num_samples"))
def _attack(key, smoothed: Smoothed, region: Region, prediction: ArrayLike, steps: int, num_samples: int) -> jax.Array:
    key = stage_key(key, Stage.DIFFERENTIABLE)
    center = jnp.asarray(region.center, noise_dtype(region.center))
    theta = theta_like(region.theta, center.shape, center.dtype)
    norm = lambda values: jnp.sqrt((values**2).sum()) if region.norm == 2 else jnp.abs(values).sum()
    point = lambda scaled: center + region.basis.inputs(theta * scaled)
    # What rounding may add to the distance of such a point.
    eps, rotation = float(jnp.finfo(center.dtype).eps), region.basis.rounding(center.shape, center.dtype)
    slack = 4 * eps * norm(jnp.abs(center) / theta + region.gap)
    if rotation:  # an error of one pixel is one of all coefficients
        slack += (4 * eps * norm(center) + (4 * eps + rotation) * theta.max() * region.gap) / theta.min()
    gap = jnp.maximum(jnp.asarray(region.gap, center.dtype) * (1 - 1e-5) - slack, 0.0)
    project = optax.projections.projection_l2_ball if region.norm == 2 else optax.projections.projection_l1_ball

    def loss(scaled, key):
        probs = smoothed_probs(key, smoothed, point(scaled), num_samples=num_samples)
        return -jnp.log(probs[prediction] + 1e-12)

    def step(scaled, i):
        gradient = jax.grad(loss)(scaled, jax.random.fold_in(key, i))
        length = jnp.sqrt((gradient**2).sum())
        scaled += 2.5 * gap / steps * gradient / jnp.where(length > 0, length, 1.0)
        return jnp.where(gap > 0, project(scaled, jnp.where(gap > 0, gap, 1.0)), 0.0), None

    scaled, _ = jax.lax.scan(step, jnp.zeros_like(center), jnp.arange(steps))
    return jnp.asarray(point(scaled))
