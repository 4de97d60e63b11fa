"""Noise laws and the certificates they give: noisy copies, gap from a probability bound, differentiable gap.

A certificate says: if the smoothed classifier `g_theta(x) = argmax_c P(f(noisy copy of x) = c)` gives its top class
with probability at least `p_lower`, then it is constant on `{y : ||(y - x) / theta||_p <= gap(p_lower)}`. For Gaussian
and uniform noise a noisy copy is `x + theta * eps`.
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, ArrayLike, Float, Int, Key

from ancer_jax.regions import array_library

# Of the exact form: the slack of one vote covers the rounding of float32 up to here, and indices are exact.
_MOST_CUTS = 2**14
# Monte Carlo means of a softmax are clipped to this range before the normal quantile (ANCER's reference settings).
_CLIP = 1e-3


@runtime_checkable
class Certificate(Protocol):
    """What a certificate provides. Implementations are frozen and hashable and hold no arrays (static arguments)."""

    norm: ClassVar[int]

    def perturb(
        self, key: Key[Array, ""], draw: Int[ArrayLike, ""], x: Float[Array, "*d"], theta: Float[Array, "*d"]
    ) -> Float[Array, "*d"]:
        """Noisy copy of x number `draw`, by the key `fold_in(key, draw)`."""
        ...

    def gap(self, p_lower, p_b_upper=None) -> Any:
        """Size of the certified region in units of theta; 0 where nothing is certified.

        Args:
          p_lower: lower bound of the top class's probability. Computed on the host in float64; under jit, vmap and
            grad traced in float32.
          p_b_upper: upper bound of every other class's probability, holding together with `p_lower`
            (`bounds.separate_bounds`); `1 - p_lower` if left out, the two-class bound.

        Guarantee: never above the exact value of the formula.
        """
        ...

    def proxy_gap(self, probs: Float[Array, " K"]) -> Float[Array, ""]:
        """Differentiable gap of estimated class probabilities: an objective for a search, never a certificate."""
        ...


def noise_dtype(value) -> jnp.dtype:
    """The type that noise is drawn in: that of the value, float32 at least."""
    dtype = jnp.result_type(value)
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)


def _wide(value: jax.Array) -> jax.Array:
    return value.astype(noise_dtype(value))


class AdditiveNoise(abc.ABC):
    """What Gaussian and uniform noise share: a noisy copy is `x + sample`."""

    @abc.abstractmethod
    def sample(self, key: Key[Array, ""], theta: Float[Array, "*d"]) -> Float[Array, "*d"]:
        """One noise draw `theta * eps`, of the shape of `theta`, in float32 or wider.

        A draw in bfloat16 would have at most 128 distinct normal values, none of them beyond 2.5.
        """

    def perturb(
        self, key: Key[Array, ""], draw: Int[ArrayLike, ""], x: Float[Array, "*d"], theta: Float[Array, "*d"]
    ) -> Float[Array, "*d"]:
        """`x + sample(fold_in(key, draw), theta)`."""
        return _wide(x) + self.sample(jax.random.fold_in(key, draw), theta)


@dataclasses.dataclass(frozen=True)
class GaussianL2(AdditiveNoise):
    """`eps ~ N(0, I)`: l2 certificates, theta = standard deviation.

    `gap = Phi^-1(p_lower)`, or `(Phi^-1(p_lower) - Phi^-1(p_b_upper)) / 2` with separate bounds.

    References: Cohen et al. 2019 (arXiv 1902.02918), theorem 1; anisotropic: Eiras et al. 2022 (arXiv 2107.04570).
    """

    norm: ClassVar[int] = 2

    def sample(self, key: Key[Array, ""], theta: Float[Array, "*d"]) -> Float[Array, "*d"]:
        """One draw of `theta * N(0, I)`."""
        return _wide(theta) * jax.random.normal(key, theta.shape, noise_dtype(theta))

    def gap(self, p_lower, p_b_upper=None):
        """See `Certificate.gap`.

        >>> float(GaussianL2().gap(0.5)), round(float(GaussianL2().gap(0.9)), 6)
        (0.0, 1.281552)
        """
        xnp, q_upper, p_b_upper, margin = _failure_probabilities(p_lower, p_b_upper)
        quantile = scipy.special.ndtri if xnp is np else jax.scipy.special.ndtri
        a, b = -quantile(q_upper), -quantile(p_b_upper)
        gap = (a * (1 - margin * xnp.sign(a)) + b * (1 - margin * xnp.sign(b))) / 2
        return xnp.where(gap > 0, gap, 0.0)

    def proxy_gap(self, probs: Float[Array, " K"]) -> Float[Array, ""]:
        """`(Phi^-1(p1) - Phi^-1(p2)) / 2` of the two largest probabilities, clipped to [0.001, 0.999]."""
        top = jax.lax.top_k(jnp.clip(probs, _CLIP, 1 - _CLIP), 2)[0]
        quantiles = jax.scipy.special.ndtri(top)
        return (quantiles[0] - quantiles[1]) / 2


@dataclasses.dataclass(frozen=True)
class UniformL1(AdditiveNoise):
    """`eps ~ U[-1, 1]^d`: l1 certificates, theta = half-width of the noise (not its standard deviation).

    `gap = 2 p_lower - 1`, or `p_lower - p_b_upper` with separate bounds.

    References: Yang et al. 2020 (arXiv 2002.08118); anisotropic: Eiras et al. 2022 (arXiv 2107.04570).
    """

    norm: ClassVar[int] = 1

    def sample(self, key: Key[Array, ""], theta: Float[Array, "*d"]) -> Float[Array, "*d"]:
        """One draw of `theta * U[-1, 1]^d`."""
        return _wide(theta) * jax.random.uniform(key, theta.shape, noise_dtype(theta), minval=-1.0, maxval=1.0)

    def gap(self, p_lower, p_b_upper=None):
        """See `Certificate.gap`.

        >>> float(UniformL1().gap(0.5)), round(float(UniformL1().gap(0.9)), 6)
        (0.0, 0.8)
        """
        xnp, q_upper, p_b_upper, margin = _failure_probabilities(p_lower, p_b_upper)
        gap = (1 - q_upper - p_b_upper) - margin
        return xnp.where(gap > 0, gap, 0.0)

    def proxy_gap(self, probs: Float[Array, " K"]) -> Float[Array, ""]:
        """`p1 - p2` of the two largest probabilities."""
        top = jax.lax.top_k(probs, 2)[0]
        return top[0] - top[1]


@dataclasses.dataclass(frozen=True)
class SplittingL1:
    """Splitting noise: l1 certificates; a noisy copy says of each coordinate in which part of a random split it lies.

    The line is cut at `s + 2 theta k` for all whole k, s being random, and a coordinate goes to the middle of its part
    of [0, 1]. Two inputs have different copies only if a cut falls between them in some coordinate, with probability
    `sum |x - y| / (2 theta)` at most, so that `gap = 2 p_lower - 1`, or `p_lower - p_b_upper` (exact: `exact_gap`): the
    formulas of uniform noise, for whatever joint distribution of the cuts, and so for one theta per coordinate.

    In the random form, s is uniform on [0, 2 theta] in each coordinate. In the exact form inputs are whole multiples of
    `1 / levels`, as images of 8 bits are, `2 theta levels` is a whole number Q (`quantised`), cuts are halfway between
    levels, and draw i cuts coordinate j next to level `(i + offset_j) mod Q_j`. A common multiple of all Q_j of such
    draws is all there are: counts are probabilities, and certificates hold without alpha, for inputs on the grid.

    Attributes:
      exact: which form.
      levels: grid of the exact form: 255 for images of 8 bits.
      seed: of the offsets, in [0, 2^32). They are fixed for all inputs: a hash of seed and coordinate, with no random
        generator that another version or setting of JAX could change.

    References: Levine & Feizi 2021 (arXiv 2103.10834). One theta per coordinate is ours, by their proof, which uses no
    more than the distribution of each coordinate's cuts.
    """

    exact: bool = False
    levels: int = 255
    seed: int = 0

    norm: ClassVar[int] = 1
    gap = UniformL1.gap
    proxy_gap = UniformL1.proxy_gap

    def perturb(
        self, key: Key[Array, ""], draw: Int[ArrayLike, ""], x: Float[Array, "*d"], theta: Float[Array, "*d"]
    ) -> Float[Array, "*d"]:
        """Noisy copy of x number `draw`; the exact form needs no key.

        The random form has a derivative in theta for searches: that of the probability to be cut, times what the cut
        then says, to first order (a straight-through estimate). There is none in x.
        """
        x, theta = _wide(x), _wide(theta)
        if self.exact:
            cuts = jnp.rint(2 * self.levels * theta)
            offsets = _offsets(math.prod(x.shape), self.seed).reshape(x.shape)
            first = jnp.mod(offsets + draw, cuts.astype(jnp.int32)) + 0.5
            return _middle(jnp.rint(x * self.levels), first, cuts, self.levels) / self.levels
        uniform = jax.random.uniform(jax.random.fold_in(key, draw), x.shape, x.dtype)
        fixed, x = jax.lax.stop_gradient(theta), jax.lax.stop_gradient(x)
        copy = _middle(x, 2 * fixed * uniform, 2 * fixed, 1.0)
        # Where 2 theta >= 1, there is one cut or none: with probability 1 / (2 theta) it lies somewhere in [0, 1].
        inside = jnp.minimum(1 / (2 * fixed), 1.0)
        cut = jnp.where(uniform < inside, uniform / inside, (uniform - inside) / jnp.maximum(1 - inside, 1e-6))
        told = jnp.where(x < cut, cut, 1 + cut) / 2
        slope = jnp.where(2 * fixed >= 1, (0.5 - told) * inside / fixed, (copy - x) / fixed)
        return copy + slope * (theta - fixed)

    def quantised(self, theta, *, period: int | None = None) -> Float[Array, "..."]:
        """The largest theta of the exact form not above this one: `2 theta levels` is whole, and divides `period`.

        A thousandth of a step above counts as rounding, of float32.

        Args:
          theta: [...]; below `1 / (2 levels)` it becomes that, and above 2^14 times that it becomes that.
          period: number of draws of all coordinates together; None: of each by itself.

        Returns:
          float32 [...].
        """
        cuts = jnp.clip(jnp.floor(2 * self.levels * jnp.asarray(theta, jnp.float32) + 1e-3), 1, _MOST_CUTS)
        if period is not None:
            divisors = jnp.asarray([i for i in range(1, period + 1) if period % i == 0], jnp.float32)
            cuts = divisors[jnp.searchsorted(divisors, cuts, side="right") - 1]
        return cuts / (2 * self.levels)

    def num_draws(self, theta) -> int:
        """How many draws of the exact form there are for a theta of `quantised`: their least common multiple."""
        return math.lcm(*np.unique(np.rint(2 * self.levels * np.asarray(theta, np.float64)).astype(int)).tolist())

    def exact_gap(self, votes_top, votes_second, num_draws) -> Any:
        """The gap from the votes of all draws for the top class and the second one: `(top - second - 1) / num_draws`.

        The 1 is for ties, which are decided against us. Arrays of integers [...]; float64 [...], 0 if nothing is
        certified.

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


def _offsets(count: int, seed: int) -> Int[Array, " {count}"]:
    """A hash in [0, 2^20) of each of the numbers 0, ..., count - 1 and the seed: MurmurHash3's 32-bit finaliser, of
    `i + 0x9E3779B9 (seed + 1)` modulo 2^32. Integer arithmetic only.
    """
    value = jnp.arange(count, dtype=jnp.uint32) + jnp.uint32(0x9E3779B9 * (seed + 1) % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        value = (value ^ (value >> jnp.uint32(shift))) * jnp.uint32(factor)
    return ((value ^ (value >> jnp.uint32(16))) >> jnp.uint32(12)).astype(jnp.int32)


def _middle(x, first, width, end):
    """The middle of that part of [0, end] in which x lies, where cuts are at `first` and every `width` from there."""
    lower = first + width * jnp.floor((x - first) / width)
    return (jnp.maximum(lower, 0.0) + jnp.minimum(lower + width, end)) / 2


def _failure_probabilities(p_lower, p_b_upper):
    """(library, `1 - p_lower`, `p_b_upper`, margin): near 1 the failure probability keeps the digits.

    The margin is many times the relative error of ndtri in float64 (SciPy) or float32 (XLA).
    """
    xnp = array_library(p_lower, p_b_upper)
    q_upper = 1 - xnp.asarray(p_lower, dtype=float)
    p_b_upper = q_upper if p_b_upper is None else xnp.asarray(p_b_upper, dtype=float)
    return xnp, q_upper, p_b_upper, 2.0**-40 if xnp is np else 2.0**-16


Noise = Literal["gaussian", "uniform", "splitting"]
NOISES: dict[str, Certificate] = {"gaussian": GaussianL2(), "uniform": UniformL1(), "splitting": SplittingL1()}
CERTIFICATES: dict[str, Certificate] = {"l2": NOISES["gaussian"], "l1": NOISES["uniform"]}


def noise_law(norm: str, noise: str | None = None, *, exact: bool = False) -> Certificate:
    """The noise law of that name, or the usual one of the norm; `exact` is a form of splitting noise.

    Raises:
      ValueError: if the noise does not certify in this norm, naming those that do.
    """
    fitting = [name for name, law in NOISES.items() if f"l{law.norm}" == norm]
    if noise is not None and noise not in fitting:
        raise ValueError(f"noise for {norm} must be one of {', '.join(fitting)}, got {noise!r}")
    return SplittingL1(exact=True) if exact else NOISES[noise] if noise else CERTIFICATES[norm]
