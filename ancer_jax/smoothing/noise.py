"""Noise laws: noisy copies of an input, and the region that a probability bound certifies under them.

If the smoothed classifier `g_theta(x) = argmax_c P(f(noisy copy of x) = c)` gives its top class with probability at
least `p_lower`, then it is constant on `{y : ||B(y - x) / theta||_norm <= gap(p_lower)}`, where B gives coefficients in
the basis of the noise: for all noise but `Gaussian(basis)` these are the pixels.
"""

import abc
import dataclasses
from types import ModuleType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from ancer_jax._numerics import Values, array_library
from ancer_jax.basis import MOST_UNEQUAL, Basis, Pixels, check_instance, check_thetas
from ancer_jax.regions.region import Region, parts_of

# Monte Carlo means of a softmax are clipped to this range before the normal quantile (the settings of ANCER's code).
_CLIP = 1e-3


class Noise(abc.ABC):
    """A noise law and the certificate it gives. Subclasses are frozen, hashable and hold no arrays of JAX.

    Most noise is random: draws are sampled, and their votes give a bound on a probability. Enumerable noise has
    finitely many equally likely draws, numbered `0, ..., num_draws(theta) - 1`, and all of them are counted:
    certificates hold without alpha. Such noise overrides `num_draws`, `exact_gap` and `for_search` and, where not every
    theta or input will do, `admissible`, `check_inputs` and `certified_inputs`. Its `perturb` must ignore the key. If
    draws are not equally likely, certificates are wrong, with no alpha to allow for it. `norm` is 2 or 1, the norm in
    which it certifies.
    """

    norm: ClassVar[int]

    @property
    def basis(self) -> Basis:
        """The basis of the coefficients that theta belongs to."""
        return Pixels()

    def region(self, x: Values | float, theta: Values | float, gap: Values | float) -> Region:
        """The region of that gap around x under this noise; shapes as in `Region`."""
        return Region(x, theta, gap, self.norm, self.basis)

    @abc.abstractmethod
    def perturb(
        self, key: Key[Array, ""], draw: Int[ArrayLike, ""], x: Float[Array, "*d"], theta: Float[Array, "*d"]
    ) -> Float[Array, "*d"]:
        """Noisy copy number `draw` of x, from the key `fold_in(key, draw)`."""

    @abc.abstractmethod
    def gap(self, p_lower: ArrayLike, p_b_upper: ArrayLike | None = None) -> Values:
        """Size [...] of the certified region in units of theta; 0 where nothing is certified.

        Args:
          p_lower: [...] lower bound of the top class's probability. Computed on the host in float64; under jit, vmap
            and grad traced in float32.
          p_b_upper: [...] upper bound of every other class's probability, holding together with `p_lower`
            (`bounds.separate_bounds`); `1 - p_lower` if left out, the two-class bound.

        Guarantee: never above the exact value of the formula.
        """

    @abc.abstractmethod
    def proxy_gap(self, probs: Float[Array, " K"]) -> Float[Array, ""]:
        """Differentiable gap of estimated class probabilities: an objective for a search, never a certificate."""

    def num_draws(self, theta: ArrayLike) -> int | None:
        """How many draws there are for an admissible theta of one input; None, for every theta, if draws are random."""
        return None

    @property
    def enumerable(self) -> bool:
        """Whether there are finitely many draws, all of which are counted."""
        return self.num_draws(1.0) is not None  # the same answer for every theta

    def exact_gap(self, votes_top: ArrayLike, votes_second: ArrayLike, num_draws: ArrayLike) -> Values:
        """Gap [...] from the votes of all draws for the top class and the second one, of enumerable noise."""
        raise NotImplementedError(f"{self} has random draws: use gap")

    def admissible(self, theta: ArrayLike) -> Values:
        """The theta of one input, rounded down to what this noise can certify with."""
        return jnp.asarray(theta)

    @property
    def for_search(self) -> "Noise":
        """The noise with which theta is searched and leakage is measured: its draws are random."""
        return self

    @property
    def certified_inputs(self) -> str:
        """In words, the inputs of which certificates of this noise speak: reports say it of exact ones."""
        return "all inputs"

    def check_inputs(self, inputs: np.ndarray, ids: np.ndarray) -> None:
        """Refuse inputs [m, *d] of which certificates of this noise say nothing, naming the first by its id."""
        return None


def noise_dtype(value: Any) -> jnp.dtype:
    """The type that noise is drawn in: that of the value, but float32 at least."""
    dtype = jnp.result_type(value)
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)


def widen(value: jax.Array) -> jax.Array:
    """The value in `noise_dtype`."""
    return value.astype(noise_dtype(value))


class AdditiveNoise(Noise):
    """Noise that is added: a noisy copy is `x + sample`."""

    @abc.abstractmethod
    def sample(self, key: Key[Array, ""], theta: Float[Array, "*d"]) -> Float[Array, "*d"]:
        """One noise draw `theta * eps`, of the shape of `theta`, in float32 or wider: bfloat16 has too few values."""

    def perturb(
        self, key: Key[Array, ""], draw: Int[ArrayLike, ""], x: Float[Array, "*d"], theta: Float[Array, "*d"]
    ) -> Float[Array, "*d"]:
        """`x + sample(fold_in(key, draw), theta)`."""
        return widen(x) + self.sample(jax.random.fold_in(key, draw), theta)


@dataclasses.dataclass(frozen=True)
class Gaussian(AdditiveNoise):
    """Gaussian noise: l2 certificates. Each coefficient gets `theta * eps`, `eps ~ N(0, 1)`, so that theta is its
    standard deviation.

    `gap = Phi^-1(p_lower)`, or `(Phi^-1(p_lower) - Phi^-1(p_b_upper)) / 2` with separate bounds; in another basis than
    the pixels times `1 - 2^-14`. The matrices of a basis are rounded to float32 where noise is drawn, so that the
    noise has a slightly skewed basis: this covers thetas that differ by a factor of up to 32 (`region` refuses others,
    `admissible` lowers them), where rounding changes the basis by less than 2^-19 (the bases here refuse more).

    In another basis than the pixels the noise is coloured. With B(x) the coefficients of x, the smoothed classifier of
    f at x is that of `z -> f(B^-1(z))` at `B(x)`, under independent noise: so the theorems hold for `B(y) - B(x)`.
    B preserves l2 distances, and so the radius is `min(theta) * gap` in any basis.

    Attributes:
      basis: orthonormal basis (`ancer_jax.basis`); anything else is a ValueError.

    References: Cohen et al. 2019 (arXiv 1902.02918), theorem 1; anisotropic: Eiras et al. 2022 (arXiv 2107.04570);
      noise of a few directions only, in an orthonormal basis: Pfrommer et al. 2023 (arXiv 2309.13794).
    """

    norm: ClassVar[int] = 2
    basis: Basis = Pixels()  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self):
        check_instance(self.basis)

    def sample(self, key: Key[Array, ""], theta: Float[Array, "*d"]) -> Float[Array, "*d"]:
        """One draw of `theta * N(0, I)`, from coefficients to inputs."""
        coefficients = widen(theta) * jax.random.normal(key, theta.shape, noise_dtype(theta))
        return jnp.asarray(self.basis.inputs(coefficients))

    def region(self, x: Values | float, theta: Values | float, gap: Values | float) -> Region:
        """See `Noise.region`; in another basis than the pixels, thetas that differ too much are a ValueError."""
        region = super().region(x, theta, gap)
        if self.basis != Pixels():
            xnp, _, thetas, _, axes = parts_of(region)
            if xnp is np:  # under jit there are estimates only
                check_thetas(thetas.min(axes), thetas.max(axes))
        return region

    def admissible(self, theta: ArrayLike) -> Values:
        """theta; in another basis than the pixels at most 32 times the smallest one."""
        theta = jnp.asarray(theta)
        return theta if self.basis == Pixels() else jnp.minimum(theta, MOST_UNEQUAL * theta.min())

    def gap(self, p_lower: ArrayLike, p_b_upper: ArrayLike | None = None) -> Values:
        """See `Noise.gap`.

        >>> float(Gaussian().gap(0.5)), round(float(Gaussian().gap(0.9)), 6)
        (0.0, 1.281552)
        """
        xnp, not_top, runner_up, margin = _failure_probabilities(p_lower, p_b_upper)
        quantile = scipy.special.ndtri if xnp is np else jax.scipy.special.ndtri
        top = xnp.asarray(p_lower, dtype=float)
        # 1 - p is exact for p >= 1/2 only.
        a = xnp.where(top < 0.5, 1, -1) * quantile(xnp.where(top < 0.5, top, not_top))
        b = -quantile(runner_up)
        gap = (a * (1 - margin * xnp.sign(a)) + b * (1 - margin * xnp.sign(b))) / 2
        skew = 0.0 if self.basis == Pixels() else 2.0**-14
        return xnp.where(gap > 0, gap * (1 - skew), 0.0)

    def proxy_gap(self, probs: Float[Array, " K"]) -> Float[Array, ""]:
        """`(Phi^-1(p1) - Phi^-1(p2)) / 2` of the two largest probabilities, clipped to [0.001, 0.999]."""
        top = jax.lax.top_k(jnp.clip(probs, _CLIP, 1 - _CLIP), 2)[0]
        quantiles = jax.scipy.special.ndtri(top)
        return (quantiles[0] - quantiles[1]) / 2


class LinearGap(Noise):
    """Noise under which the laws of the noisy copies of x and y differ by `||(x - y) / theta||_1 / 2` at most, in total
    variation: `gap = 2 p_lower - 1`, or `p_lower - p_b_upper` with separate bounds.
    """

    norm: ClassVar[int] = 1

    def gap(self, p_lower: ArrayLike, p_b_upper: ArrayLike | None = None) -> Values:
        """See `Noise.gap`.

        >>> float(Uniform().gap(0.5)), round(float(Uniform().gap(0.9)), 6)
        (0.0, 0.8)
        """
        xnp, not_top, runner_up, margin = _failure_probabilities(p_lower, p_b_upper)
        gap = (1 - not_top - runner_up) - margin
        return xnp.where(gap > 0, gap, 0.0)

    def proxy_gap(self, probs: Float[Array, " K"]) -> Float[Array, ""]:
        """`p1 - p2` of the two largest probabilities."""
        top = jax.lax.top_k(probs, 2)[0]
        return top[0] - top[1]


@dataclasses.dataclass(frozen=True)
class Uniform(LinearGap, AdditiveNoise):
    """Uniform noise, `eps ~ U[-1, 1]^d`: l1 certificates; theta is its half-width, not its standard deviation.

    References: Yang et al. 2020 (arXiv 2002.08118); anisotropic: Eiras et al. 2022 (arXiv 2107.04570).
    """

    def sample(self, key: Key[Array, ""], theta: Float[Array, "*d"]) -> Float[Array, "*d"]:
        """One draw of `theta * U[-1, 1]^d`."""
        return widen(theta) * jax.random.uniform(key, theta.shape, noise_dtype(theta), minval=-1.0, maxval=1.0)


def _failure_probabilities(p_lower: Any, p_b_upper: Any) -> tuple[ModuleType, Any, Any, float]:
    """(library, `1 - p_lower`, `p_b_upper`, margin).

    The margin is many times the rounding of a gap, that of ndtri included, in float64 (SciPy) or float32 (XLA).
    """
    xnp = array_library(p_lower, p_b_upper)
    not_top = 1 - xnp.asarray(p_lower, dtype=float)
    runner_up = not_top if p_b_upper is None else xnp.asarray(p_b_upper, dtype=float)
    return xnp, not_top, runner_up, 2.0**-40 if xnp is np else 2.0**-16
