"""The Lagrangian duals of two questions about regions: concave functions of one variable, maximised from below.

Any value of a dual is a valid answer, so that nothing here needs to converge to be right.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def ellipsoid_dual(e, w, start, enough, margin):
    """Maximum of the concave `g(lambda) = lambda (sum e / (1 + lambda w) - 1)` right of `start`, from below.

    Args:
      e, w: [d], not negative; w positive.
      start: [] left of the maximum, which is where `h(lambda) = sum e / (1 + lambda w)^2` is 1, and right of the pole.
        From there Newton's iteration for `1 / sqrt(h) = 1` (concave, nearly linear) climbs without passing it.
      enough: the square root of a value that need not be improved on.
      margin: relative error of sums, taken off (static).
    """
    return _climb(e, w, start, enough, margin)[0]


@ellipsoid_dual.defjvp
def _ellipsoid_dual_jvp(margin, primals, tangents):
    e, w, start, enough = primals
    value, lam = _climb(e, w, start, enough, margin)
    r = 1 / (1 + lam * w)
    return value, lam * jnp.sum(tangents[0] * r - lam * tangents[1] * e * r**2)


def _climb(e, w, start, enough, margin):
    """(value, lambda) of `ellipsoid_dual`."""
    few_eps = 8 * jnp.finfo(e.dtype).eps
    scale = w.max()  # without units, lambda w neither overflows nor vanishes
    w, start = w / scale, start * scale

    def step(lam, r):
        h, slope = jnp.sum(e * r**2), jnp.sum(e * w * r**3)
        return jnp.maximum(h / jnp.where(slope > 0, slope, 1.0) * (jnp.sqrt(h) - 1), 0.0)

    def climb(state):
        i, lam, move, _, _ = state
        lam = lam + move
        r = 1 / (1 + lam * w - jnp.where(lam < 0, few_eps, 0.0))
        total = jnp.sum(e * r) * (1 - margin * jnp.sign(lam))
        value, move = (lam * (total - 1) - jnp.abs(lam) * few_eps) / scale, step(lam, r)
        return i + 1, lam, move, value, (value >= enough**2) | (move <= 1e-6 * jnp.abs(lam))

    def unfinished(state):
        i, _, _, _, done = state
        return (i < 60) & ~done

    zero = jnp.zeros((), e.dtype)
    move = jnp.where(start < 0, zero, step(start, 1.0))
    _, lam, _, value, _ = jax.lax.while_loop(unfinished, climb, (0, start, move, zero, False))
    return value, lam / scale


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def knapsack_dual(p, q, enough, margin):
    """Maximum of the piecewise linear, concave `g(lambda) = sum min(p, lambda q) - lambda`, lambda >= 0, from below.

    Tangents (height at 0, slope) left and right of the maximum meet above it; the tangent there replaces one of them.

    Args:
      p, q: [d], not negative.
      enough: a value that need not be improved on.
      margin: relative error of sums, taken off (static).
    """

    def unfinished(state):
        i, _, _, best, above = state
        return (i < 200) & (best < enough) & (above - best > max(1e-9, 4 * margin) * above)

    def cut(state):
        i, left, right, best, _ = state
        lam = (right[0] - left[0]) / (left[1] - right[1])
        above = left[0] + left[1] * lam
        clipped = lam * q >= p
        height, slope = jnp.sum(jnp.where(clipped, p, 0.0)), jnp.sum(jnp.where(clipped, 0.0, q))
        value, here = (height + lam * slope) * (1 - margin) - lam, (height, slope - 1)
        keep = lambda condition, new, old: jax.tree.map(functools.partial(jnp.where, condition), new, old)
        return i + 1, keep(slope > 1, here, left), keep(slope > 1, right, here), jnp.maximum(best, value), above

    zero = jnp.zeros((), p.dtype)
    left, right = (zero, jnp.sum(q) - 1), (jnp.sum(p), -jnp.ones((), p.dtype))
    above = jnp.where(left[1] > 0, right[0], zero)  # no more than all of p; nothing if the slope falls from 0
    return jax.lax.while_loop(unfinished, cut, (0, left, right, zero, above))[3]


@knapsack_dual.defjvp
def _knapsack_dual_jvp(margin, primals, tangents):
    p, q, enough = primals
    # The maximum is where the cheapest shares `filled` of q add up to all but 1; one of them may be a part.
    cost = jnp.where(q > 0, p / jnp.where(q > 0, q, 1.0), jnp.inf)
    order = jnp.argsort(cost)
    before = jnp.cumsum(q[order]) - q[order]
    share = jnp.clip((jnp.sum(q) - 1 - before) / jnp.where(q[order] > 0, q[order], 1.0), 0.0, 1.0)
    filled = jnp.zeros_like(q).at[order].set(jnp.where(q[order] > 0, share, 0.0))
    lam = jnp.max(jnp.where(filled > 0, cost, 0.0))
    slope = jnp.sum(filled * tangents[0]) + lam * jnp.sum((1 - filled) * tangents[1])
    return knapsack_dual(p, q, enough, margin), jnp.where(lam > 0, slope, 0.0)
