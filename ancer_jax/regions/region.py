"""A certified region and its size."""

import dataclasses
import math
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from ancer_jax._numerics import Leaf, Values, array_library, geometric_mean, rounding
from ancer_jax.basis import Basis, Pixels


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Region:
    """`{y : ||B(y - center) / theta||_norm <= gap}`: an ellipsoid (norm 2) or a cross-polytope (norm 1); a pytree.

    B gives the coefficients in a basis, usually the pixels themselves. `gap * theta` are the semi-axes. One region, or
    many: leading axes `...` are those of `gap`, and sizes have them, too. Sizes are computed on the host in float64;
    under jit, vmap and grad they stay traced.

    Attributes:
      center: [..., *d], the certified input.
      theta: [...] or [..., *d], positive noise parameter of each coefficient, in the units of the input.
      gap: [...], size in units of theta; 0 is the single point `center`.
      norm: 2 or 1 (static).
      basis: of the coefficients (static); another one than the pixels needs norm 2, which a rotation preserves.

    Raises:
      ValueError: if `norm` is something else, or has no such basis; when a size is asked for, if the shapes do not fit
        or, outside jit, theta is not positive or gap negative.

    >>> region = Region(center=[0.0, 0.0], theta=[1.0, 4.0], gap=0.5, norm=2)
    >>> float(region.radius), float(region.proxy_radius)
    (0.5, 1.0)
    """

    center: Leaf = dataclasses.field(repr=False)
    theta: Leaf = dataclasses.field(repr=False)
    gap: Leaf
    norm: int = dataclasses.field(metadata={"static": True})
    basis: Basis = dataclasses.field(default=Pixels(), metadata={"static": True}, repr=False)

    def __post_init__(self):
        if self.norm not in (2, 1):
            raise ValueError(f"norm must be 2 or 1, got {self.norm!r}")
        if self.norm == 1 and self.basis != Pixels():
            raise ValueError(f"regions of norm 1 are in pixels: {self.basis} does not preserve that norm")

    @property
    def radius(self) -> Values:
        """`min(theta) * gap` [...]: radius of the largest l_norm ball around the center inside the region."""
        xnp, _, theta, gap, axes = parts_of(self)
        return xnp.min(theta, axis=axes) * gap

    @property
    def proxy_radius(self) -> Values:
        """`geometric_mean(theta) * gap` [...]: radius of the l_norm ball with the region's volume."""
        _, _, theta, gap, axes = parts_of(self)
        return geometric_mean(theta, axes) * gap

    @property
    def log_volume(self) -> Values:
        """Natural logarithm of the volume [...]; `-inf` for a single point.

        Norm 2: `d log(gap) + (d/2) log(pi) - lgamma(d/2 + 1) + sum(log theta)`;
        norm 1: `d log(2 gap) - lgamma(d + 1) + sum(log theta)`.
        """
        xnp, center, theta, gap, axes = parts_of(self)
        d = math.prod(center.shape[axis] for axis in axes)
        unit_ball = {
            2: d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1),
            1: d * math.log(2) - math.lgamma(d + 1),
        }[self.norm]
        log_gap = xnp.where(gap > 0, xnp.log(xnp.where(gap > 0, gap, 1.0)), -xnp.inf)
        return d * log_gap + unit_ball + xnp.sum(xnp.log(theta), axis=axes)

    def contains(self, point: ArrayLike) -> Values:
        """Whether `point`, [*d] for all regions or [..., *d], one for each, lies in the region: bool [...].

        The boundary is included. A point of another shape is a ValueError.
        """
        xnp, there = self._one_for_each("point", point)
        _, center, theta, gap, axes = parts_of(self)
        return _norm(xnp, self.basis.coefficients(there - center) / theta, axes, self.norm) <= gap

    def reach(self, direction: ArrayLike) -> Values:
        """How many times `direction` the region allows: t [...] for which `center + t * direction` is on its boundary.

        `direction` is [*d] for all regions or [..., *d], one for each. All points from `center - t * direction` to
        `center + t * direction` lie in the region, but for the rounding of these points. t is finite: a huge number
        where `direction` is zero. It is rounded down; in float32 (under jit) and in another basis than the pixels by
        some per cent, of large images by a third or more. A direction of another shape is a ValueError.

        >>> region = Region(center=[0.0, 0.0], theta=[1.0, 4.0], gap=0.5, norm=2)
        >>> tuple(round(float(region.reach(direction)), 9) for direction in np.eye(2))
        (0.5, 2.0)
        """
        xnp, along = self._one_for_each("direction", direction)
        _, _, theta, gap, axes = parts_of(self)
        shape, numbers = along.shape[gap.ndim :], np.finfo(along.dtype)
        d, least = math.prod(shape), xnp.min(theta, axis=axes)
        norm = _norm(xnp, self.basis.coefficients(along) / theta, axes, self.norm)
        # What the transform may have lost, and what may have vanished because it was too small for the arithmetic.
        lost = d * float(numbers.tiny) * (1 + 1 / least)
        if rotation := self.basis.rounding(shape, along.dtype):
            lost = lost + rotation * math.sqrt(d) * _norm(xnp, along, axes, 2) / least
        norm = norm + (lost if xnp is np else jax.lax.stop_gradient(lost))
        t = xnp.minimum(gap / norm, float(numbers.max)) * max(1 - rounding(d, along.dtype), 0)
        return xnp.where(t < float(numbers.tiny), 0.0, t)

    def _one_for_each(self, name: str, array: ArrayLike) -> tuple[ModuleType, Any]:
        """`array`, [*d] or [..., *d], in the shape of the center, and the library to compute with."""
        _, center, _, gap, _ = parts_of(self)
        if np.shape(array) not in (center.shape, center.shape[gap.ndim :]):
            raise ValueError(f"{name} must be {list(center.shape[gap.ndim :])}, got {list(np.shape(array))}")
        xnp = array_library(self.center, self.theta, self.gap, array)
        return xnp, xnp.broadcast_to(xnp.asarray(array, dtype=float), center.shape)


def _norm(xnp: ModuleType, values: Any, axes: tuple[int, ...], norm: int) -> Any:
    """The l_norm norm over axes. The squares of small values do not vanish beside the largest, those of large ones do
    not overflow.
    """
    largest = xnp.max(xnp.abs(values), axis=axes, keepdims=True)
    unit = xnp.where((largest == 0) | (largest == xnp.inf), 1.0, largest)
    powers = xnp.sum(xnp.abs(values / unit) ** norm, axis=axes, keepdims=True)
    powers = xnp.where(largest == 0, 1.0, powers)
    return xnp.squeeze(largest * (xnp.sqrt(powers) if norm == 2 else powers), axis=axes)


def parts_of(region: Region) -> tuple[ModuleType, Any, Any, Any, tuple[int, ...]]:
    """(library, center, theta of the shape of center, gap, axes of one input), as floats of that library."""
    xnp = array_library(region.center, region.theta, region.gap)
    center, theta, gap = (xnp.asarray(value, dtype=float) for value in (region.center, region.theta, region.gap))
    axes = tuple(range(gap.ndim, center.ndim))
    if theta.shape not in (gap.shape, center.shape) or center.shape[: gap.ndim] != gap.shape:
        shapes = ", ".join(str(list(value.shape)) for value in (center, theta, gap))
        raise ValueError(f"center, theta and gap do not fit together: their shapes are {shapes}")
    if xnp is np and not ((theta > 0).all() and (gap >= 0).all()):
        raise ValueError(f"theta must be positive and gap not negative, got {theta.min()} and {gap.min()}")
    if len(axes) != 3 and region.basis != Pixels():
        raise ValueError(f"{region.basis} is of images [height, width, channels], got inputs of {len(axes)} axes")
    if theta.ndim == gap.ndim:
        theta = theta.reshape(*gap.shape, *(1 for _ in axes))
    return xnp, center, xnp.broadcast_to(theta, center.shape), gap, axes


def rounding_of_contains(region: Region) -> float | Values:
    """Bound of the relative error of the norm that `contains` compares with the gap, for points near the boundary; of
    one region.
    """
    xnp, center, theta, _, _ = parts_of(region)
    d, dtype = math.prod(center.shape), xnp.asarray(0.0).dtype
    if not (rotation := region.basis.rounding(center.shape, dtype)):
        return rounding(d, dtype)
    # Such a point is at most max(theta) gap from the center, and an error e there is e sqrt(d) / min(theta) at most.
    return rounding(d, dtype) + rotation * math.sqrt(d) * theta.max() / theta.min()
