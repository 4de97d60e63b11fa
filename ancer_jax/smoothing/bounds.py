"""Confidence bounds on a Bernoulli mean: exact on the host in float64, and a traced, conservative twin.

Whatever is reported comes from the host functions. The traced twin is for decisions on the device and for
differentiable experiments; it is never above the exact bound.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ancer_jax._numerics import HostValues

# Relative margin of a bound towards the safe side.
_MARGIN = 2.0**-40
# Every bound is verified by SciPy's incomplete beta function, because its inverse is wrong at isolated points
# (SciPy 1.17: by 1e-8 to 1e-3 around 999 failures). The function itself is off by up to 4e-8 of its value where there
# are few successes and alpha is tiny; this slack is many times that.
_SLACK = 1e-6
LEAST_ALPHA = 1e-200  # below, the incomplete beta function underflows
# Traced twin: terms of the tail that are summed one by one, bisection steps, and the margin on log(alpha), which
# covers the float32 error of the log tail (about 1e-3 at n = 1e7).
_TERMS, _BISECTIONS, _LOG_MARGIN = 128, 40, 2e-3
MOST_TRACED_TRIALS, LEAST_TRACED_ALPHA = 2**24 - 1, 1e-9


def clopper_pearson_lower(successes: ArrayLike, trials: ArrayLike, alpha: ArrayLike) -> HostValues:
    """One-sided Clopper-Pearson lower bound: the p with `P(Bin(trials, p) >= successes) = alpha`.

    Returns float64 [...], 0 where there are no successes.

    Args:
      successes: integers [...], in [0, trials].
      trials: integers [...], at least 1.
      alpha: probability of error, in [1e-200, 1).

    Guarantee: if the count is `Bin(trials, p)`, the bound exceeds p with probability at most alpha.

    Raises:
      ValueError: if an argument is outside its range.

    References: Clopper & Pearson 1934.

    >>> round(float(clopper_pearson_lower(100_000, 100_000, 0.001)), 8)
    0.99993092
    """
    successes, trials, alpha = _checked(successes, trials, alpha)
    k, failures = np.maximum(successes, 1), trials - successes
    guess = scipy.special.betaincinv(k, failures + 1, alpha / (1 + 2 * _SLACK)) * (1 - _MARGIN)

    def tail(p):  # P(Bin(trials, p) >= successes), from whichever of p and 1 - p has more digits
        upper = scipy.special.betaincc(failures + 1, k, 1 - p)
        return np.where(p < 0.5, scipy.special.betainc(k, failures + 1, p), upper)

    return np.where(successes == 0, 0.0, _proven(tail, guess, 0.0, alpha))


def clopper_pearson_upper(successes: ArrayLike, trials: ArrayLike, alpha: ArrayLike) -> HostValues:
    """One-sided Clopper-Pearson upper bound: the p with `P(Bin(trials, p) <= successes) = alpha`.

    Arguments, guarantee (p is above the bound with probability at most alpha) and errors as in
    `clopper_pearson_lower`; 1 where every trial is a success.

    >>> round(float(clopper_pearson_upper(0, 1000, 0.001)), 6)
    0.006884
    """
    successes, trials, alpha = _checked(successes, trials, alpha)
    failures = np.maximum(trials - successes, 1)
    guess = scipy.special.betainccinv(successes + 1, failures, alpha / (1 + 2 * _SLACK)) * (1 + _MARGIN)
    proven = _proven(lambda p: scipy.special.betaincc(successes + 1, failures, p), np.minimum(guess, 1.0), 1.0, alpha)
    return np.where(successes == trials, 1.0, proven)


def confidence_sequence_lower(successes: ArrayLike, trials: ArrayLike, alpha: ArrayLike) -> HostValues:
    """Lower bound that holds after every draw at once: count, look at it, and stop whenever you like.

    The lower end of the confidence sequence of the Beta(1/2, 1/2) mixture: with k successes in t trials, the largest
    p below k / t for which `M_t(p) = B(k + 1/2, t - k + 1/2) / (B(1/2, 1/2) p^k (1 - p)^(t - k))` is 1 / alpha.

    Arguments and errors as in `clopper_pearson_lower`.

    Guarantee: for independent draws of probability p, the bound exceeds p after any number of draws with probability
    at most alpha (Ville's inequality: at the true p, M_t is a martingale that begins at 1).

    References: Robbins 1970; Waudby-Smith & Ramdas 2024 (arXiv 2010.09686); Voracek 2024 (arXiv 2406.17830).

    >>> round(float(confidence_sequence_lower(1000, 1000, 0.001)), 6)
    0.989125
    """
    k, t, alpha = np.broadcast_arrays(*_checked(successes, trials, alpha))
    error = 1e-9 + 1e-12 * t  # of the logarithms, many times

    def tail(p):
        log_ratio = scipy.special.betaln(k + 0.5, t - k + 0.5) - math.log(math.pi)  # B(1/2, 1/2) is pi
        return np.exp(scipy.special.xlogy(k, p) + scipy.special.xlog1py(t - k, -p) - log_ratio + error)  # 1 / M_t(p)

    return _proven(tail, k / t, 0.0, alpha)


def _proven(tail: Callable[[HostValues], HostValues], guess: Any, safe: float, alpha: HostValues) -> HostValues:
    """A bound whose tail is proven to be at most alpha: `guess`, if its tail is that and close to alpha; otherwise the
    result of a bisection from `safe`, which is 0 for a lower bound and 1 for an upper one.
    """
    at_guess, limit = tail(guess), alpha / (1 + _SLACK)
    holds = at_guess <= limit
    right = holds & (at_guess >= alpha / (1 + 4 * _SLACK))
    if right.all():
        return guess
    good, bad = np.where(holds, guess, safe), np.where(holds | np.isnan(guess), 1 - safe, guess)
    for _ in range(60):
        middle = (good + bad) / 2
        below = tail(middle) <= limit
        good, bad = np.where(below, middle, good), np.where(below, bad, middle)
    return np.where(right, guess, good + (safe - good) * _MARGIN)


def separate_bounds(
    votes: ArrayLike, runner_up: ArrayLike, trials: ArrayLike, alpha: ArrayLike
) -> tuple[HostValues, HostValues]:
    """Lower bound of one class's probability and upper bound of every other class's, holding together.

    `p_b_upper = min(clopper_pearson_upper(runner_up, trials, alpha), 1 - p_lower)`. However many classes there are,
    alpha is not divided among them. Let C be the most probable of the other classes, one of them if several tie: which
    one that is does not depend on the draws. The upper bound from the count of C is below the probability of C with
    probability at most alpha. It grows with the count, so that from the largest count it is at least as large; and no
    other class is more probable than C.

    Args:
      votes: integers [...], votes for the class, of draws that did not choose it.
      runner_up: integers [...], the most votes that any other class has. Draws that voted for no class are to be added:
        they might all have voted for that one.
      trials: integers [...], number of draws.
      alpha: probability of error of each of the two bounds, in [1e-200, 1).

    Returns:
      `(p_lower, p_b_upper)`, float64 [...], for `Noise.gap`. Where all other votes are the runner-up's, `p_b_upper` is
      `1 - p_lower`, the two-class bound.

    Guarantee: with probability at least `1 - 2 alpha` both hold.

    Raises:
      ValueError: if an argument is outside its range, or there are more votes than trials.

    References: Clopper & Pearson 1934; the argument is that of an intersection-union test, Berger 1982.

    >>> p_lower, p_b_upper = separate_bounds(400, 60, 1000, 0.0005)  # the other votes are spread over many classes
    >>> round(float(p_lower), 4), round(float(p_b_upper), 4)
    (0.3494, 0.0887)
    """
    votes, runner_up, trials = (
        _integers(name, values) for name, values in (("votes", votes), ("runner_up", runner_up), ("trials", trials))
    )
    if (votes + runner_up > trials).any():
        raise ValueError("votes and runner_up must not add up to more than trials")
    p_lower = clopper_pearson_lower(votes, trials, alpha)
    p_b_upper = np.minimum(clopper_pearson_upper(runner_up, trials, alpha), 1 - p_lower)
    return p_lower, np.where(votes + runner_up == trials, 1 - p_lower, p_b_upper)


def binomial_test(count_a: ArrayLike, count_b: ArrayLike) -> HostValues:
    """Two-sided p-value of the exact binomial test that classes a and b are equally likely.

    Takes the votes of the two classes, non-negative integers [...]. Returns float64 [...] in (0, 1], rounded up; 1
    where both counts are 0.

    References: Hung & Fithian 2019; Cohen et al. 2019, algorithm 1 (Predict).

    >>> round(float(binomial_test(10, 0)), 8)
    0.00195313
    """
    count_a, count_b = _integers("count_a", count_a), _integers("count_b", count_b)
    if (count_a < 0).any() or (count_b < 0).any():
        raise ValueError("counts must not be negative")
    high, total = np.maximum(count_a, count_b), count_a + count_b
    tail = scipy.special.betainc(np.maximum(high, 1), total - high + 1, 0.5)
    p_value = np.maximum(2 * tail * (1 + _SLACK), np.finfo(np.float64).tiny)  # it may underflow, but it is no 0
    return np.where(high == 0, 1.0, np.minimum(p_value, 1.0))


def clopper_pearson_lower_traced(successes: ArrayLike, trials: ArrayLike, alpha: ArrayLike) -> Float[Array, "..."]:
    """Traced float32 twin of `clopper_pearson_lower`, for use under jit, vmap and grad.

    Arguments broadcast. Gradients are the implicit derivatives of the defining equation; counts may then be real
    numbers (expected counts). Returns float32 [...]; 0 where `trials` is 2^24 or more (float32 counts no further),
    alpha is below 1e-9, or an argument is out of range.

    Guarantee: never above the exact bound; `1 - p` at most 1 % too large, plus float32's resolution below 1 (6e-8;
    `clopper_pearson_upper_traced(trials - successes, ...)` gives `1 - p` itself with all its digits), for alpha
    from 1e-9 to 1/2.
    """
    # As float32 at once: narrower integers would wrap in the subtraction.
    successes, trials = jnp.asarray(successes, jnp.float32), jnp.asarray(trials, jnp.float32)
    q = clopper_pearson_upper_traced(trials - successes, trials, alpha)
    # Round down: 1 - q is exact for q >= 1/2, and otherwise to nearest, half a spacing of float32 off at most.
    return jnp.where(q < 0.5, 1 - q - 2.0**-24, 1 - q)


def clopper_pearson_upper_traced(successes: ArrayLike, trials: ArrayLike, alpha: ArrayLike) -> Float[Array, "..."]:
    """Traced float32 twin of `clopper_pearson_upper`: never below the exact bound, at most 1 % above it.

    Returns float32 [...]; 1 where `clopper_pearson_lower_traced` is 0 for want of range.

    Solves `log P(Bin(n, q) <= k) = log(alpha)` for q by bisection, with an upper bound of the tail: its first 128
    terms, then a geometric series. Everything is in logarithms and deviations from the mean, so that float32
    suffices below n = 2^24.
    """
    k, n, alpha = jnp.broadcast_arrays(*(jnp.asarray(v, jnp.float32) for v in (successes, trials, alpha)))
    valid = (k >= 0) & (k < n) & (n <= MOST_TRACED_TRIALS) & (alpha >= 0.99 * LEAST_TRACED_ALPHA) & (alpha < 1)
    q = _root(jnp.where(valid, k, 0.0), jnp.where(valid, n, 1.0), jnp.where(valid, alpha, 0.5))
    return jnp.where(valid, q, 1.0)


@jax.custom_jvp
def _root(k, n, alpha):
    """The q, or a little more, at which `_excess` is 0; elementwise, float32 arrays of one shape."""

    def halve(_, interval):
        low, high = interval
        middle = (low + high) / 2
        above = _excess(middle, k, n, alpha) > 0
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    # The bound lies between k / n and 1, and on the safe side of the bisection is `high`.
    return jax.lax.fori_loop(0, _BISECTIONS, halve, (k / n, jnp.ones_like(k)))[1]


@_root.defjvp
def _implicit_derivative(values, tangents):
    """The implicit derivative; where that has no limit (counts next to 0 or n), it is 0."""
    q = _root(*values)
    inside = jnp.where(q < 1, q, 0.75)
    slope, *partials = jax.grad(lambda *at: _excess(*at).sum(), argnums=(0, 1, 2, 3))(inside, *values)
    moved = jnp.zeros_like(q)
    for partial, tangent in zip(partials, tangents, strict=True):
        moved += jnp.nan_to_num(-partial / slope, nan=0.0, posinf=0.0, neginf=0.0) * tangent
    return q, jnp.where(q < 1, moved, 0.0)


def _excess(q, k, n, alpha):
    """By how much the logarithm of the tail at q exceeds that of alpha, rounding included."""
    return _log_tail(k, n, q) - (jnp.log(alpha) - _LOG_MARGIN)


def _log_tail(k, n, q):
    """Upper bound of `log P(Bin(n, q) <= k)`, close for q above k / n; elementwise, float32."""
    # Saddle-point form of the log mass function at k (Loader 2000): deviances are computed from k - n q, in the form
    # that keeps its digits near 1.
    deviation = jnp.where(q < 0.5, k - n * q, n * (1 - q) - (n - k))
    deviance = _deviance(deviation, n * q) + _deviance(-deviation, n * (1 - q))
    log_mass = _log_stirling(n) - _log_stirling(k) - _log_stirling(n - k) - deviance
    # Ratios of one mass to the next: P(k - i - 1) / P(k - i).
    i = jnp.arange(_TERMS, dtype=jnp.float32)
    odds = ((1 - q) / q)[..., None]
    ratios = jnp.maximum(k[..., None] - i, 0.0) / (n[..., None] - k[..., None] + i + 1) * odds
    masses = jnp.cumprod(ratios, axis=-1)
    # Ratios fall with i, so that the rest is below a geometric series of the last one.
    last = jnp.minimum(ratios[..., -1], 1 - 1e-6)
    return log_mass + jnp.log1p(masses[..., :-1].sum(-1) + masses[..., -1] / (1 - last))


def _deviance(deviation, mean):
    """`x log(x / mean) + mean - x` for `x = mean + deviation >= 0`."""
    mean = jnp.maximum(mean, 1e-30)
    u = jnp.maximum(deviation / mean, -1 + 1e-7)  # x = 0, where the logarithm's derivative has no limit
    return mean * ((1 + u) * jnp.log1p(u) - u)


def _log_stirling(x):
    """`log(x!) - x log(x) + x`, for real x >= 0: `log(2 pi x) / 2` and its series for large x."""
    small, large = jnp.clip(x, 1e-6, 16.0), jnp.maximum(x, 16.0)
    exact = jax.lax.lgamma(small + 1) - small * jnp.log(small) + small
    series = 0.5 * jnp.log(2 * math.pi * large) + 1 / (12 * large) - 1 / (360 * large**3)
    return jnp.where(x < 16, exact, series)


def _integers(name: str, values: ArrayLike) -> HostValues:
    """int64, if the values are integers."""
    values = np.asarray(values)
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name} must be integers, got {values.dtype}")
    return values.astype(np.int64)


def _checked(successes: ArrayLike, trials: ArrayLike, alpha: ArrayLike) -> tuple[HostValues, HostValues, HostValues]:
    """int64 successes and trials and float64 alpha, all within range."""
    successes, trials = _integers("successes", successes), _integers("trials", trials)
    if (trials < 1).any():
        raise ValueError(f"trials must be at least 1, got {trials.min()}")
    wrong = (successes < 0) | (successes > trials)
    if wrong.any():
        first, among = (np.broadcast_to(values, wrong.shape)[wrong][0] for values in (successes, trials))
        raise ValueError(f"successes must be in 0..{among}, got {first}")
    values = np.asarray(alpha)
    if values.dtype.kind != "f":
        raise ValueError(f"alpha must be a real number below 1, got {alpha!r}")
    values = values.astype(np.float64)
    if not ((values >= LEAST_ALPHA) & (values < 1)).all():
        raise ValueError(f"alpha must be in [{LEAST_ALPHA:g}, 1), got {alpha}")
    return successes, trials, values
