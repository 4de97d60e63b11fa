"""Certified regions and their size: `{y : ||(y - center) / theta||_p <= gap}`.

p = 2 is an ellipsoid with semi-axes `gap * theta`, p = 1 a cross-polytope with half-diagonals `gap * theta`.
Values are computed on the host in float64 (what is reported); under jit, vmap and grad they stay traced.
"""

import contextlib
import dataclasses
import functools
import math
from types import ModuleType
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from ancer_jax.duals import ellipsoid_dual, knapsack_dual


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Region:
    """`{y : ||(y - center) / theta||_norm <= gap}`, a pytree.

    Attributes:
      center: [*d], the certified input.
      theta: [] or [*d], positive noise parameter, in the units of the input.
      gap: [], size in units of theta; 0 is the single point `center`.
      norm: 2 or 1 (static).

    Raises:
      ValueError: if `norm` is something else.
    """

    center: Any
    theta: Any
    gap: Any
    norm: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self):
        if self.norm not in (2, 1):
            raise ValueError(f"norm must be 2 or 1, got {self.norm!r}")


def array_library(*values) -> ModuleType:
    """`jax.numpy` if any value is traced (jit, vmap, grad), else `numpy`, which has float64."""
    return jnp if any(isinstance(value, jax.core.Tracer) for value in values) else np


def _parts(region: Region):
    """(library, center, theta of the shape of center, gap), as floats of that library."""
    xnp = array_library(region.center, region.theta, region.gap)
    center = xnp.asarray(region.center, dtype=float)
    theta = xnp.broadcast_to(xnp.asarray(region.theta, dtype=float), center.shape)
    return xnp, center, theta, xnp.asarray(region.gap, dtype=float)


def geometric_mean(theta):
    """`exp(mean(log theta))` over all coordinates: no overflow, and no product of roots (0.4 % off at d = 150,528)."""
    xnp = array_library(theta)
    return xnp.exp(xnp.mean(xnp.log(xnp.asarray(theta, dtype=float))))


def radius(region: Region):
    """`min(theta) * gap`: the radius of the largest l_norm ball around the centre inside the region."""
    xnp, _, theta, gap = _parts(region)
    return xnp.min(theta) * gap


def proxy_radius(region: Region):
    """`geometric_mean(theta) * gap`: the radius of the l_norm ball with the region's volume."""
    _, _, theta, gap = _parts(region)
    return geometric_mean(theta) * gap


def log_volume(region: Region):
    """Natural logarithm of the region's volume; `-inf` for a single point.

    p = 2: `d log(gap) + (d/2) log(pi) - lgamma(d/2 + 1) + sum(log theta)`;
    p = 1: `d log(2 gap) - lgamma(d + 1) + sum(log theta)`.
    """
    xnp, center, theta, gap = _parts(region)
    d = center.size
    unit_ball = {
        2: d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1),
        1: d * math.log(2) - math.lgamma(d + 1),
    }[region.norm]
    log_gap = xnp.where(gap > 0, xnp.log(xnp.where(gap > 0, gap, 1.0)), -xnp.inf)
    return d * log_gap + unit_ball + xnp.sum(xnp.log(theta))


def contains(region: Region, point):
    """Whether `point` [*d] lies in the region (boundary included), as a boolean scalar."""
    xnp, center, theta, gap = _parts(region)
    scaled = xnp.abs((xnp.asarray(point, dtype=float) - center) / theta)
    distance = xnp.sqrt(xnp.sum(scaled**2)) if region.norm == 2 else xnp.sum(scaled)
    return distance <= gap


def is_superset(a: Region, b: Region):
    """Whether region `a` contains region `b` of the same norm and centre.

    True iff `gap_a * theta_a >= gap_b * theta_b` in every coordinate (ANCER). Centres that differ give
    False: the comparison says nothing about them.

    Raises:
      ValueError: if the norms differ.
    """
    if a.norm != b.norm:
        raise ValueError(f"regions of different norms cannot be compared: {a.norm} and {b.norm}")
    xnp, center_a, theta_a, gap_a = _parts(a)
    _, center_b, theta_b, gap_b = _parts(b)
    return xnp.all(gap_a * theta_a >= gap_b * theta_b) & xnp.all(center_a == center_b)


# Two regions of different centres. Each answer is the value of a concave function of one variable whose every value is
# on the safe side, so that the search for its maximum need not be exact; sums are lowered by their rounding error.


def _exact(function):
    """Values given outside jit, vmap and grad are computed in float64 on the host's CPU; traced ones stay traced."""
    jitted = jax.jit(function)

    @functools.wraps(function)
    def wrapper(a: Region, b: Region, **options):
        if a.norm != b.norm:
            raise ValueError(f"regions of different norms cannot be compared: {a.norm} and {b.norm}")
        if np.shape(a.center) != np.shape(b.center):
            shapes = f"{list(np.shape(a.center))} and {list(np.shape(b.center))}"
            raise ValueError(f"the centres of two regions must have one shape, got {shapes}")
        if array_library(*jax.tree.leaves((a, b))) is jnp:
            return function(a, b, **options)
        with float64_on_the_host():
            a, b = jax.tree.map(lambda value: np.asarray(value, np.float64), (a, b))
            for region in (a, b):
                if not ((region.theta > 0).all() and (region.gap >= 0).all()):
                    low = f"{region.theta.min()} and {region.gap.min()}"
                    raise ValueError(f"theta must be positive and gap not negative, got {low}")
            return np.asarray(jitted(a, b, **options))[()]

    return wrapper


@contextlib.contextmanager
def float64_on_the_host():
    """JAX computes in float64, on the CPU."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


def rounding(d: int, dtype) -> float:
    """Bound of the relative error of a sum of `d` positive terms and of what is computed before and after it."""
    return 2 * (d + 64) * float(jnp.finfo(dtype).eps)


def _pair(a: Region, b: Region):
    """(|difference of the centres|, theta of a, theta of b), flat, and `rounding` of them."""
    _, center_a, theta_a, _ = _parts(a)
    _, center_b, theta_b, _ = _parts(b)
    difference = jnp.ravel(center_a - center_b)
    difference *= jnp.sign(difference)  # its absolute value, with derivative 0 at 0
    return difference, jnp.ravel(theta_a), jnp.ravel(theta_b), rounding(difference.size, difference.dtype)


@_exact
def separation(a: Region, b: Region):
    """How clearly two regions of one norm are separated: they are disjoint if (up to rounding: only if) this is > 1.

    `max_{0<t<1} s(t)`, where with semi-axes `alpha = gap_a theta_a`, `beta = gap_b theta_b` and
    `d = |center_a - center_b|`, p = 2: `s(t) = sum d^2 / (alpha^2 / t + beta^2 / (1 - t))`; p = 1:
    `s(t) = sum min(t / alpha, (1 - t) / beta) d`. Infinite for two points that differ.

    Guarantee: never above the exact value.

    Raises:
      ValueError: if norms or shapes differ.
    """
    d, theta_a, theta_b, margin = _pair(a, b)
    distance = jnp.where(d > 0, d, 1.0)
    alpha, beta = theta_a / distance * a.gap, theta_b / distance * b.gap  # in units of d, so that squares do not vanish

    def total(values):
        return jnp.sum(jnp.where(d > 0, values, 0.0))

    def slope(tau):  # of s at t = tau / (1 + tau), times a positive number
        if a.norm == 2:
            q = alpha**2 + beta**2 * tau
            return total((alpha + beta * tau) / q * ((alpha - beta * tau) / q))
        return total(jnp.where(beta * tau < alpha, 1 / alpha, -1 / beta))

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        rising = slope(jnp.exp(middle)) > 0
        return jnp.where(rising, middle, low), jnp.where(rising, high, middle)

    ratio = jnp.log(jnp.where(alpha + beta > 0, alpha / beta, 1.0))
    ends = jnp.clip(ratio.min(), -80.0, 80.0), jnp.clip(ratio.max(), -80.0, 80.0)
    tau = jnp.exp(jax.lax.fori_loop(0, 60, halve, ends)[0])
    if a.norm == 2:
        s = total((tau / (1 + tau)) / (alpha**2 + beta**2 * tau))
    else:
        s = total(jnp.minimum(tau / alpha, 1 / beta)) / (1 + tau)
    return s * (1 - margin)


def disjoint(a: Region, b: Region):
    """Whether two regions of one norm (boundaries included) have no point in common.

    Guarantee: True is proven; regions that touch, or nearly, give False.

    Raises:
      ValueError: if norms or shapes differ.
    """
    return separation(a, b) > 1


@_exact
def largest_outside(a: Region, b: Region, *, enough=math.inf):
    """The largest gap with which `a`, its centre and theta kept, is disjoint from `b`; its own gap does not matter.

    This is the distance from the centre of a to b in the norm of a: with `beta = gap_b theta_b`, the maximum over
    `lambda >= 0` of, p = 2: `gap^2 = lambda (sum (d^2 / beta^2) / (1 + lambda theta_a^2 / beta^2) - 1)`, and p = 1:
    `gap = sum min(d / theta_a, lambda d / beta) - lambda` (a fractional knapsack); both are the Lagrangian dual.

    Args:
      a, b: regions of one norm and shape.
      enough: an answer of at least this may be given early, below the largest.

    Guarantee: below the exact value by 2^-32 of it and rounding, never above; 0 if the centre of a lies in b, or
    where numbers overflow.
    Differentiable under jit and grad.

    Raises:
      ValueError: if norms or shapes differ.
    """
    d, theta_a, theta_b, margin = _pair(a, b)
    # Slightly too large, so that b also keeps clear of what `contains` cannot decide.
    gap_b = b.gap * (1 + margin)
    inverse = 1 / (theta_b * jnp.where(gap_b > 0, gap_b, 1.0))
    if a.norm == 2:
        e, w = (d * inverse) ** 2, (theta_a * inverse) ** 2
        gap = _root(ellipsoid_dual(e, w, jnp.zeros((), e.dtype), enough, margin))
        point = _root(jnp.sum((d / theta_a) ** 2))
    else:
        gap = knapsack_dual(d / theta_a, d * inverse, enough, margin)
        point = jnp.sum(d / theta_a)
    return _finite(jnp.where(gap_b > 0, gap, point * (1 - margin))) * (1 - _slack(margin))


@_exact
def largest_inside(a: Region, b: Region):
    """The largest gap with which `a`, its centre and theta kept, lies inside `b`; its own gap does not matter.

    With `beta = gap_b theta_b`, `w = theta_a^2 / beta^2`, `e = d^2 / beta^2`, p = 2:
    `gap^2 = max_{0 < rho < 1/max w} rho (1 - sum e / (1 - rho w))` (S-lemma); p = 1:
    `gap = (1 - sum d / beta) min(beta / theta_a)`.

    Guarantee: below the exact value by about 2^-32 of it (p = 2: 2^-26) and rounding, never above; 0 if the centre of a
    is not inside b.

    Raises:
      ValueError: if norms or shapes differ.
    """
    d, theta_a, theta_b, margin = _pair(a, b)
    beta = theta_b * jnp.where(b.gap > 0, b.gap, 1.0)
    if a.norm == 2:
        e, w = (d / beta) ** 2, (theta_a / beta) ** 2
        # Left of the optimum: there the term of each coordinate alone reaches 1. The pole itself is left out.
        pole = (1 - float(jnp.finfo(e.dtype).eps) ** 0.5) / w.max()
        start = jnp.minimum(((1 - jnp.sqrt(e)) / w).min(), pole)
        dual = ellipsoid_dual(e, w, -jnp.maximum(start, 0.0), jnp.inf, margin)
        gap = jnp.where((start > 0) & (jnp.sum(e) < 1), _root(dual), 0.0)
    else:
        gap = jnp.maximum(1 - jnp.sum(d / beta) * (1 + margin) - margin, 0.0) * jnp.min(beta / theta_a)
    return _finite(jnp.where(b.gap > 0, gap, 0.0)) * (1 - _slack(margin))


def _slack(margin: float) -> float:
    """How much smaller answers are made, relatively, so that they stay right when they are computed again."""
    return max(2.0**-32, 2 * margin)


def _finite(gap):
    """0 instead of what overflowed."""
    return jnp.where(jnp.isfinite(gap), gap, 0.0)


def _root(square):
    """Square root with a derivative (0) at 0."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
