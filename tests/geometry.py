"""Independent answers about pairs of regions: NumPy in float64, no code of ancer_jax. Leading axes broadcast."""

import numpy as np


def length(v, norm):
    return np.sqrt((v**2).sum(-1)) if norm == 2 else np.abs(v).sum(-1)


def distance(points, center, theta, norm):
    """In units of theta: at most `gap` inside a region."""
    return length((np.asarray(points, float) - np.asarray(center, float)) / theta, norm)


def nearest(point, theta, center, beta, norm):
    """The point of the surface of the region with semi-axes `beta` that is nearest to `point` in the norm of theta.

    p = 2: from both sides (Lagrange, with a multiplier found by bisection); p = 1: from outside, the cheapest
    coordinates first. Every answer lies on the surface, so that its distance is never too small.
    """
    point, theta, center, beta = np.broadcast_arrays(*(np.asarray(v, float) for v in (point, theta, center, beta)))
    d, side = np.abs(point - center), np.where(point < center, -1.0, 1.0)
    if norm == 2:
        weight, target = (beta / theta) ** 2, d * beta / theta**2
        excess = weight - weight.min(-1, keepdims=True)
        low, high = np.full(d.shape[:-1], -300.0), np.log(length(target, 2) + 1e-130)
        for _ in range(90):
            middle = (low + high) / 2
            short = length(target / (excess + np.exp(middle)[..., None]), 2) < 1
            low, high = np.where(short, low, middle), np.where(short, middle, high)
        u = target / (excess + np.exp(high)[..., None])
        missing = np.maximum(1 - (u**2).sum(-1, keepdims=True), 0)  # the hard case: along the cheapest axis
        u = np.where(np.arange(u.shape[-1]) == weight.argmin(-1)[..., None], np.sqrt(u**2 + missing), u)
        return center + side * beta * u / length(u, 2)[..., None]
    q, cost = d / beta, beta / theta
    order = np.argsort(cost, axis=-1)
    q_sorted = np.take_along_axis(q, order, -1)
    before = np.cumsum(q_sorted, -1) - q_sorted
    used = np.clip(q.sum(-1, keepdims=True) - 1 - before, 0, q_sorted)
    moved = np.empty_like(q)
    np.put_along_axis(moved, order, used, -1)
    return center + side * beta * (q - moved)


def outside(a, theta, b, beta, norm):
    """Largest gap of a region (a, theta) that leaves the region with semi-axes beta around b alone; 0 if a is in it."""
    d = np.abs(np.asarray(a, float) - b)
    surface = distance(nearest(a, theta, b, beta, norm), a, theta, norm)
    return np.where(length(d / beta, norm) > 1, surface, 0.0)


def inside(a, theta, b, beta, norm):
    """Largest gap of a region (a, theta) inside the region with semi-axes beta around b; 0 if a is not in it."""
    room = 1 - length(np.abs(np.asarray(a, float) - b) / beta, norm)
    by_vertex = room * (beta / theta).min(-1)  # p = 1: it leaves through the vertex on its longest axis
    surface = distance(nearest(a, theta, b, beta, 2), a, theta, 2) if norm == 2 else by_vertex
    return np.where(room > 0, surface, 0.0)


def leaves_at(directions, a, theta, b, beta, norm):
    """Where rays from a along `directions` (of length 1 in the norm of theta) leave the region around b."""
    low, high = np.zeros(directions.shape[:-1]), np.full(directions.shape[:-1], 4 * (beta / theta).max())
    for _ in range(60):
        middle = (low + high) / 2
        still = distance(a + middle[..., None] * theta * directions, b, beta, norm) <= 1
        low, high = np.where(still, middle, low), np.where(still, high, middle)
    return high


def rays(rng, count, d, norm):
    """Random points of the unit sphere of the norm, every second one with few coordinates that are not 0."""
    v = rng.normal(size=(count, d))
    v[1::2] *= rng.random(v[1::2].shape) < 0.3
    v[np.arange(count), rng.integers(d, size=count)] += 1e-3
    return v / length(v, norm)[:, None]


def rays_and_axes(rng, count, d, norm):
    return np.concatenate([rays(rng, count, d, norm), np.eye(d), -np.eye(d)])


def farthest(rng, a, theta, gap, b, beta, norm, steps=100):
    """Distance, in units of beta from b, of the farthest point that could be found in the region (a, theta, gap).

    p = 1: over all vertices. p = 2: the linearised problem's answer again and again (a convex function only grows).
    """
    theta, beta = np.broadcast_to(theta, a.shape), np.broadcast_to(beta, a.shape)
    offset, axes = a - b, gap * theta
    if norm == 1:
        base = np.abs(offset / beta)
        return (base.sum() + np.maximum(np.abs(offset + axes), np.abs(offset - axes)) / beta - base).max()
    longest = (np.arange(a.size) == (theta / beta).argmax()) * np.array([[1.0], [-1.0]])
    u = np.concatenate([rays(rng, 1, a.size, 2), longest, [offset * theta + 1e-300]])
    for _ in range(steps):
        u = u / length(u, 2)[:, None]
        u = axes * (offset + axes * u) / beta**2 + 1e-300
    u = u / length(u, 2)[:, None]
    return distance(a + axes * u, b, beta, 2).max()
