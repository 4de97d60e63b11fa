"""Noise laws and the certificates they give: sampler, gap from a probability bound, differentiable gap.

A certificate says: if the smoothed classifier `g_theta(x) = argmax_c P(f(x + theta * eps) = c)` gives its top class
with probability at least `p_lower`, then it is constant on `{y : ||(y - x) / theta||_p <= gap(p_lower)}`.
"""

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Float, Key

from ancer_jax.regions import array_library

# Monte Carlo means of a softmax are clipped to this range before the normal quantile (ANCER's reference settings).
_CLIP = 1e-3


@runtime_checkable
class Certificate(Protocol):
    """What a certificate provides. Implementations are frozen and hashable and hold no arrays (static arguments)."""

    norm: ClassVar[int]

    def sample(self, key: Key[Array, ""], theta: Float[Array, "*d"]) -> Float[Array, "*d"]:
        """One noise draw `theta * eps`, of the shape and dtype of `theta`."""
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


@dataclasses.dataclass(frozen=True)
class GaussianL2:
    """`eps ~ N(0, I)`: l2 certificates, theta = standard deviation.

    `gap = Phi^-1(p_lower)`, or `(Phi^-1(p_lower) - Phi^-1(p_b_upper)) / 2` with separate bounds.

    References: Cohen et al. 2019 (arXiv 1902.02918), theorem 1; anisotropic: Eiras et al. 2022 (arXiv 2107.04570).
    """

    norm: ClassVar[int] = 2

    def sample(self, key: Key[Array, ""], theta: Float[Array, "*d"]) -> Float[Array, "*d"]:
        """One draw of `theta * N(0, I)`."""
        return theta * jax.random.normal(key, theta.shape, theta.dtype)

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
class UniformL1:
    """`eps ~ U[-1, 1]^d`: l1 certificates, theta = half-width of the noise (not its standard deviation).

    `gap = 2 p_lower - 1`, or `p_lower - p_b_upper` with separate bounds.

    References: Yang et al. 2020 (arXiv 2002.08118); anisotropic: Eiras et al. 2022 (arXiv 2107.04570).
    """

    norm: ClassVar[int] = 1

    def sample(self, key: Key[Array, ""], theta: Float[Array, "*d"]) -> Float[Array, "*d"]:
        """One draw of `theta * U[-1, 1]^d`."""
        return theta * jax.random.uniform(key, theta.shape, theta.dtype, minval=-1.0, maxval=1.0)

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


def _failure_probabilities(p_lower, p_b_upper):
    """(library, `1 - p_lower`, `p_b_upper`, margin): near 1 the failure probability keeps the digits.

    The margin is many times the relative error of ndtri in float64 (SciPy) or float32 (XLA).
    """
    xnp = array_library(p_lower, p_b_upper)
    q_upper = 1 - xnp.asarray(p_lower, dtype=float)
    p_b_upper = q_upper if p_b_upper is None else xnp.asarray(p_b_upper, dtype=float)
    return xnp, q_upper, p_b_upper, 2.0**-40 if xnp is np else 2.0**-16


CERTIFICATES: dict[str, Certificate] = {"l2": GaussianL2(), "l1": UniformL1()}
