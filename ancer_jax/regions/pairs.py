"""Two regions: does one contain the other, do they meet, and how far can one grow?

Each answer about different centers is the value of a concave function of one variable whose every value errs on the
safe side, so that the search for its maximum need not be exact. Sums are lowered by a bound of their rounding error,
and so are distances in the coefficients of a basis, or raised, whichever is safe.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ancer_jax._checks import check_type
from ancer_jax._numerics import Values, array_library, float64_on_the_host, rounding
from ancer_jax.regions._duals import ellipsoid_dual, knapsack_dual
from ancer_jax.regions.region import Region, parts_of, rounding_of_contains


def is_superset(a: Region, b: Region) -> Values:
    """Whether region `a` contains region `b` of the same norm, basis and center (bool []); one region each.

    True if `gap_a * theta_a >= gap_b * theta_b` in every coordinate. The products are rounded: where they differ by no
    more than that, either answer may come out. Centers that differ give False: the comparison says nothing about them.

    Raises:
      ValueError: if norms, bases or shapes differ, or a region is a batch.

    References: Eiras et al. 2022 (arXiv 2107.04570).
    """
    _check_pair(a, b)
    xnp, center_a, theta_a, gap_a, _ = parts_of(a)
    _, center_b, theta_b, gap_b, _ = parts_of(b)
    with np.errstate(over="ignore"):
        outer, inner = gap_a * theta_a, gap_b * theta_b
    # What overflows may be larger than anything that is known.
    return xnp.all((outer >= inner) & (inner < xnp.inf)) & xnp.all(center_a == center_b)


def _in_float64(function: Callable[..., Values]) -> Callable[..., Values]:
    """`function` of two regions, checked; outside jit, vmap and grad computed in float64 on the host's CPU."""
    jitted = jax.jit(function)

    @functools.wraps(function)
    def wrapper(a: Region, b: Region, **options):
        _check_pair(a, b)
        if array_library(*jax.tree.leaves((a, b))) is jnp:
            return function(a, b, **options)
        with float64_on_the_host():
            a, b = jax.tree.map(lambda value: np.asarray(value, np.float64), (a, b))
            for region in (a, b):
                parts_of(region)  # refuses values out of range
            return np.asarray(jitted(a, b, **options))[()]

    return wrapper


def _check_pair(a: Region, b: Region) -> None:
    for region in (a, b):
        check_type("a region", region, Region, "of a certificate, take certificate.region")
    if np.ndim(a.gap) or np.ndim(b.gap):
        raise ValueError("pairs are of one region each: use jax.vmap for batches")
    if a.norm != b.norm:
        raise ValueError(f"regions of different norms cannot be compared: {a.norm} and {b.norm}")
    if a.basis != b.basis:
        hint = "a ball is one in every basis: dataclasses.replace(region, basis=...) gives it that of the other one"
        raise ValueError(f"regions of different bases cannot be compared: {a.basis} and {b.basis} ({hint})")
    if np.shape(a.center) != np.shape(b.center):
        shapes = f"{list(np.shape(a.center))} and {list(np.shape(b.center))}"
        raise ValueError(f"the centers of two regions must have one shape, got {shapes}")


def _pair(a: Region, b: Region, *, at_least: bool = False):
    """(|difference of the centers|, theta of a, theta of b), flat and in coefficients, and `rounding` of them.

    The differences are at most the exact ones, or `at_least` these.
    """
    _, center_a, theta_a, _, _ = parts_of(a)
    _, center_b, theta_b, _, _ = parts_of(b)
    apart = center_a - center_b
    difference = jnp.ravel(a.basis.coefficients(apart))
    difference *= jnp.sign(difference)  # its absolute value, with derivative 0 at 0
    if error := a.basis.rounding(apart.shape, apart.dtype):
        length = jax.lax.stop_gradient(jnp.sqrt((apart**2).sum())) * error
        difference = difference + length if at_least else jnp.maximum(difference - length, 0.0)
    return difference, jnp.ravel(theta_a), jnp.ravel(theta_b), rounding(difference.size, difference.dtype)


@_in_float64
def separation(a: Region, b: Region) -> Values:
    """How clearly two regions of one norm and basis are separated ([]): above 1 they are disjoint; up to rounding, only
    then.

    `max_{0<t<1} s(t)`, where with semi-axes `u = gap_a theta_a`, `v = gap_b theta_b` and
    `d = |B(center_a - center_b)|`, p = 2: `s(t) = sum d^2 / (u^2 / t + v^2 / (1 - t))`; p = 1:
    `s(t) = sum min(t / u, (1 - t) / v) d`. Infinite for two points that differ.

    Guarantee: never above the exact value.

    Raises:
      ValueError: if norms, bases or shapes differ, or a region is a batch.
    """
    d, theta_a, theta_b, margin = _pair(a, b)
    distance = jnp.where(d > 0, d, 1.0)
    u, v = theta_a / distance * a.gap, theta_b / distance * b.gap  # in units of d, so that squares do not vanish

    def total(values):
        return jnp.sum(jnp.where(d > 0, values, 0.0))

    def slope(tau):  # of s at t = tau / (1 + tau), times a positive number
        if a.norm == 2:
            q = u**2 + v**2 * tau
            return total((u + v * tau) / q * ((u - v * tau) / q))
        return total(jnp.where(v * tau < u, 1 / u, -1 / v))

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        rising = slope(jnp.exp(middle)) > 0
        return jnp.where(rising, middle, low), jnp.where(rising, high, middle)

    ratio = jnp.log(jnp.where(u + v > 0, u / v, 1.0))
    ends = jnp.clip(ratio.min(), -80.0, 80.0), jnp.clip(ratio.max(), -80.0, 80.0)
    tau = jnp.exp(jax.lax.fori_loop(0, 60, halve, ends)[0])
    if a.norm == 2:
        s = total((tau / (1 + tau)) / (u**2 + v**2 * tau))
    else:
        s = total(jnp.minimum(tau / u, 1 / v)) / (1 + tau)
    return s * (1 - margin)


def disjoint(a: Region, b: Region) -> Values:
    """Whether two regions of one norm (boundaries included) have no point in common.

    Guarantee: True is proven; regions that touch, or nearly, give False. Errors as in `separation`.
    """
    return separation(a, b) > 1


@_in_float64
def largest_outside(a: Region, b: Region, *, enough: ArrayLike = math.inf) -> Values:
    """The largest gap with which `a`, its center and theta kept, is disjoint from `b`; its own gap does not matter.

    This is the distance from the center of a to b in the norm of a: with `beta = gap_b theta_b`, the maximum over
    `lambda >= 0` of, p = 2: `gap^2 = lambda (sum (d^2 / beta^2) / (1 + lambda theta_a^2 / beta^2) - 1)`, and p = 1:
    `gap = sum min(d / theta_a, lambda d / beta) - lambda` (a fractional knapsack); both are the Lagrangian dual.

    Args:
      a, b: regions of one norm and shape.
      enough: stop early at an answer of at least this, even if it is not the largest.

    Guarantee: below the exact value by 2^-32 of it and rounding, never above; 0 if the center of a lies in b, or
    where numbers overflow. Differentiable under jit and grad. Errors as in `separation`.
    """
    d, theta_a, theta_b, margin = _pair(a, b)
    enough = enough / (1 - _slack(margin))  # the slack is taken off below
    # Slightly too large, so that b also keeps clear of what `contains` cannot decide.
    gap_b = b.gap * (1 + jax.lax.stop_gradient(rounding_of_contains(b)))
    inverse = 1 / (theta_b * jnp.where(gap_b > 0, gap_b, 1.0))
    if a.norm == 2:
        e, w = (d * inverse) ** 2, (theta_a * inverse) ** 2
        gap = _root(ellipsoid_dual(e, w, jnp.zeros((), e.dtype), enough, margin))
        point = _root(jnp.sum((d / theta_a) ** 2))
    else:
        gap = knapsack_dual(d / theta_a, d * inverse, enough, margin)
        point = jnp.sum(d / theta_a)
    return _lowered(jnp.where(gap_b > 0, gap, point * (1 - margin)), margin)


@_in_float64
def largest_inside(a: Region, b: Region) -> Values:
    """The largest gap with which `a`, its center and theta kept, lies inside `b`; its own gap does not matter.

    With `beta = gap_b theta_b`, `w = theta_a^2 / beta^2`, `e = d^2 / beta^2`, p = 2:
    `gap^2 = max_{0 < rho < 1/max w} rho (1 - sum e / (1 - rho w))` (S-lemma); p = 1:
    `gap = (1 - sum d / beta) min(beta / theta_a)`.

    Guarantee: below the exact value by about 2^-32 of it (p = 2: 2^-26) and rounding, never above; 0 if the center of a
    is not inside b. Errors as in `separation`.
    """
    d, theta_a, theta_b, margin = _pair(a, b, at_least=True)
    beta = theta_b * jnp.where(b.gap > 0, b.gap, 1.0)
    if a.norm == 2:
        e, w = (d / beta) ** 2, (theta_a / beta) ** 2
        # With lambda = -rho this is `ellipsoid_dual`. Its start, left of the maximum, is a rho that is larger than the
        # best: the smallest at which the term of one coordinate of h alone reaches 1, clear of the pole.
        pole = (1 - float(jnp.finfo(e.dtype).eps) ** 0.5) / w.max()
        start = jnp.minimum(((1 - jnp.sqrt(e)) / w).min(), pole)
        dual = ellipsoid_dual(e, w, -jnp.maximum(start, 0.0), jnp.inf, margin)
        gap = jnp.where((start > 0) & (jnp.sum(e) < 1), _root(dual), 0.0)
    else:
        gap = jnp.maximum(1 - jnp.sum(d / beta) * (1 + margin) - margin, 0.0) * jnp.min(beta / theta_a)
    return _lowered(jnp.where(b.gap > 0, gap, 0.0), margin)


def _slack(margin: float) -> float:
    """How much smaller answers are made, relatively, so that they stay right when they are computed again."""
    return max(2.0**-32, 2 * margin)


def _lowered(gap, margin: float):
    """The answer: smaller by the slack, and 0 instead of what overflowed."""
    return jnp.where(jnp.isfinite(gap), gap, 0.0) * (1 - _slack(margin))


def _root(square):
    """Square root with a derivative (0) at 0."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
