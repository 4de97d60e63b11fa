"""Splitting noise (Levine & Feizi 2021), in its random and in its enumerable form."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from ancer_jax._checks import check_integer
from ancer_jax._numerics import Values
from ancer_jax.smoothing.noise import LinearGap, Noise, widen

# Of the exact form: up to here the slack of one vote covers the rounding of float32, and indices are exact.
_MOST_CUTS = 2**14


@dataclasses.dataclass(frozen=True)
class Splitting(LinearGap):
    """Splitting noise: l1 certificates. A noisy copy tells of each coordinate in which part of a split it lies.

    The line is cut at `s + 2 theta k` for all whole k, with a random s, and a coordinate moves to the middle of its
    part of [0, 1]. Two inputs have different copies only if a cut falls between them in some coordinate, with
    probability `sum |x - y| / (2 theta)` at most. So the formulas of uniform noise hold, `gap = 2 p_lower - 1`, for
    whatever joint distribution of the cuts, and so for one theta per coordinate.

    In the random form s is uniform on [0, 2 theta] in each coordinate. The exact form is enumerable. Its inputs are
    whole multiples of `1 / levels`, as images of 8 bits are; `2 theta levels` is a whole number Q (`admissible`); cuts
    are halfway between levels, and draw i cuts coordinate j next to level `(i + offset_j) mod Q_j`. The least common
    multiple of all Q_j is the number of draws: counts are probabilities, and certificates hold without alpha, for
    inputs on the grid.

    Attributes:
      exact: which form.
      levels: grid of the exact form: 255 for images of 8 bits.
      seed: of the offsets, in [0, 2^32). They are the same for all inputs: a hash of seed and coordinate, with no
        random generator that another version or setting of JAX could change.
      period: of the exact form with one theta per coordinate: each Q_j is rounded down to a divisor of it, so that it
        bounds the number of draws.

    References: Levine & Feizi 2021 (arXiv 2103.10834). One theta per coordinate is ours, by their proof, which uses no
    more than the distribution of each coordinate's cuts.
    """

    exact: bool = False
    levels: int = 255
    seed: int = 0
    period: int = 5040

    def __post_init__(self):
        check_integer("period", self.period, 1, _MOST_CUTS)

    @property
    def for_search(self) -> Noise:
        """The random form."""
        return Splitting()

    def perturb(
        self, key: Key[Array, ""], draw: Int[ArrayLike, ""], x: Float[Array, "*d"], theta: Float[Array, "*d"]
    ) -> Float[Array, "*d"]:
        """Noisy copy number `draw` of x; the exact form needs no key.

        The random form has a derivative in theta for searches: that of the probability to be cut, times what the cut
        then says, to first order (a straight-through estimate). It has none in x.
        """
        x, theta = widen(x), widen(theta)
        if self.exact:
            cuts = jnp.rint(2 * self.levels * theta)
            offsets = _offsets(math.prod(x.shape), self.seed).reshape(x.shape)
            first = jnp.mod(offsets + draw, cuts.astype(jnp.int32)) + 0.5
            return _middle(jnp.rint(x * self.levels), first, cuts, float(self.levels)) / self.levels
        uniform = jax.random.uniform(jax.random.fold_in(key, draw), x.shape, x.dtype)
        fixed, x = jax.lax.stop_gradient(theta), jax.lax.stop_gradient(x)
        copy = _middle(x, 2 * fixed * uniform, 2 * fixed, 1.0)
        # Where 2 theta >= 1, there is one cut or none: with probability 1 / (2 theta) it lies somewhere in [0, 1].
        inside = jnp.minimum(1 / (2 * fixed), 1.0)
        cut = jnp.where(uniform < inside, uniform / inside, (uniform - inside) / jnp.maximum(1 - inside, 1e-6))
        told = jnp.where(x < cut, cut, 1 + cut) / 2
        slope = jnp.where(2 * fixed >= 1, (0.5 - told) * inside / fixed, (copy - x) / fixed)
        return copy + slope * (theta - fixed)

    def admissible(self, theta: ArrayLike) -> Values:
        """The largest theta of the exact form not above this one: `2 theta levels` is whole, from 1 to 2^14.

        One theta per coordinate ([*d], not []) also divides `period`. A thousandth of a step above counts as rounding
        of float32. The random form takes any theta. Returns float32, of the shape of theta.
        """
        theta = jnp.asarray(theta, jnp.float32)
        if not self.exact:
            return theta
        cuts = jnp.clip(jnp.floor(2 * self.levels * theta + 1e-3), 1, _MOST_CUTS)
        if theta.ndim:
            divisors = jnp.asarray(_divisors(self.period), jnp.float32)
            cuts = divisors[jnp.searchsorted(divisors, cuts, side="right") - 1]
        return cuts / (2 * self.levels)

    def num_draws(self, theta: ArrayLike) -> int | None:
        """The number of draws of the exact form for an admissible theta: the least common multiple of all Q_j."""
        if not self.exact:
            return None
        return math.lcm(*np.unique(np.rint(2 * self.levels * np.asarray(theta, np.float64)).astype(int)).tolist())

    def exact_gap(self, votes_top: ArrayLike, votes_second: ArrayLike, num_draws: ArrayLike) -> Values:
        """`(top - second - 1) / num_draws` from integers [...]; float64 [...], 0 where nothing is certified.

        The 1 is for ties, which are decided against us.

        Guarantee: every input on the grid in the region has more votes for the top class than for any other.

        Raises:
          ValueError: if these cannot be the votes of so many draws, or there are more than 2^14 draws: beyond, one vote
            no longer covers what rounding may add to the share of draws that cut between two inputs.
        """
        top, second, draws = (np.asarray(value) for value in (votes_top, votes_second, num_draws))
        if not all(np.issubdtype(value.dtype, np.integer) for value in (top, second, draws)):
            raise ValueError(f"votes and draws must be integers, got {top.dtype}, {second.dtype} and {draws.dtype}")
        top, second, draws = (value.astype(np.int64) for value in (top, second, draws))
        if not ((draws >= 1) & (draws <= _MOST_CUTS)).all():
            raise ValueError(f"exact certificates are of 1..{_MOST_CUTS} draws, got {draws.min()} to {draws.max()}")
        if not ((second >= 0) & (second <= top) & (top + second <= draws)).all():
            raise ValueError("votes must be 0 <= second <= top, and not more than the draws")
        return np.maximum(top - second - 1, 0) / draws.astype(np.float64)

    @property
    def certified_inputs(self) -> str:
        """See `Noise.certified_inputs`."""
        return "images of 8 bits" if self.levels == 255 else f"inputs in whole multiples of 1/{self.levels}"

    def check_inputs(self, inputs: np.ndarray, ids: np.ndarray) -> None:
        """Refuse inputs that are not on the grid of the exact form."""
        if not self.exact:
            return
        steps = inputs.astype(np.float64).reshape(len(ids), -1) * self.levels
        # Float32 may round by 3e-5 steps. Where two inputs have the same level, this only adds to their distance; where
        # they differ, by a step at least, it takes off at most 6e-5 of it. And 6e-5 of 2^14 draws are less than the
        # vote that `exact_gap` takes off.
        if (wrong := (abs(steps - np.rint(steps)) > 3e-5).any(axis=1)).any():
            raise ValueError(
                f"exact certificates are of {self.certified_inputs}: pixels of image {ids[wrong][0]} are not multiples "
                f"of 1/{self.levels}"
            )


@functools.cache
def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]


def _offsets(count: int, seed: int) -> Int[Array, " {count}"]:
    """A hash in [0, 2^20) of each of the numbers 0, ..., count - 1 and the seed: MurmurHash3's 32-bit finaliser, of
    `i + 0x9E3779B9 (seed + 1)` modulo 2^32. Integer arithmetic only.
    """
    value = jnp.arange(count, dtype=jnp.uint32) + jnp.uint32(0x9E3779B9 * (seed + 1) % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        value = (value ^ (value >> jnp.uint32(shift))) * jnp.uint32(factor)
    return ((value ^ (value >> jnp.uint32(16))) >> jnp.uint32(12)).astype(jnp.int32)


def _middle(x: jax.Array, first: jax.Array, width: jax.Array, end: float) -> jax.Array:
    """The middle of that part of [0, end] in which x lies, where cuts are at `first` and every `width` from there."""
    lower = first + width * jnp.floor((x - first) / width)
    return (jnp.maximum(lower, 0.0) + jnp.minimum(lower + width, end)) / 2
