"""Orthonormal bases of images, in which noise has one theta for each coefficient.

Noise that is independent in the coefficients of a basis is coloured in the pixels. An orthonormal map keeps lengths and
volumes, so that regions of such noise have the same sizes: they are ellipsoids whose axes are the basis vectors.

Natural images have little power at high spatial frequencies. In a basis of frequencies, noise can be large there and
cost the classifier little.
"""

import abc
import base64
import binascii
import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft
from jax.typing import ArrayLike

from ancer_jax._checks import check_real
from ancer_jax._numerics import Values

BasisName = Literal["pixels", "cosine", "karhunen-loeve"]
# Brightness, red against blue, green against both.
_OPPONENT = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
# How much thetas may differ in another basis than the pixels: see `Gaussian`.
MOST_UNEQUAL = 32.0
_PART = 1000  # images at a time
_AXES = ("rows", "columns", "channels")


class Basis(abc.ABC):
    """An orthonormal basis of inputs [*d]; coefficients have the same shape. Frozen and hashable. Files and runs know
    `Pixels`, `Cosine` and `KarhunenLoeve`; docs/own-basis.md says what another one must do.

    Arrays of JAX stay arrays of JAX, in float32 or wider; all others are computed in float64 on the host.
    """

    name: BasisName

    @abc.abstractmethod
    def coefficients(self, x: ArrayLike) -> Values:
        """The coefficients [..., *d] of inputs [..., *d]; ValueError for a shape that the basis is not of."""

    @abc.abstractmethod
    def inputs(self, z: ArrayLike) -> Values:
        """The inputs [..., *d] of coefficients [..., *d]: the inverse of `coefficients`, and its transpose."""

    @abc.abstractmethod
    def rounding(self, shape: tuple[int, ...], dtype: Any) -> float:
        """Bound of the error of `coefficients`, and of `inputs`, in that arithmetic, as a share of the l2 norm."""

    def describe(self) -> dict[str, Any]:
        """The basis as JSON values, for `read_basis`."""
        return {"name": self.name}


@dataclasses.dataclass(frozen=True)
class Pixels(Basis):
    """The pixels themselves: every coefficient is a value of the input, of any shape."""

    name = "pixels"

    def coefficients(self, x: ArrayLike) -> Values:
        """The input itself."""
        return x  # pyright: ignore[reportReturnType]

    def inputs(self, z: ArrayLike) -> Values:
        """The coefficients themselves."""
        return z  # pyright: ignore[reportReturnType]

    def rounding(self, shape: tuple[int, ...], dtype: Any) -> float:
        """0: nothing is computed."""
        return 0.0


class _Separable(Basis):
    """A basis of products of a row, a column and a channel vector: a matrix for each axis of [height, width, channels].

    A transform is three small matrix products, and no matrix of all pixels is needed.
    """

    @abc.abstractmethod
    def matrices(self, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        """The orthonormal matrices of the axes, float64 [size, size], a basis vector in each row."""

    def coefficients(self, x: ArrayLike) -> Values:
        """See `Basis.coefficients`."""
        return self._transform(x, inverse=False)

    def inputs(self, z: ArrayLike) -> Values:
        """See `Basis.inputs`."""
        return self._transform(z, inverse=True)

    def rounding(self, shape: tuple[int, ...], dtype: Any) -> float:
        """See `Basis.rounding`."""
        # A product with a matrix of size n, computed in any order: (n + 2) eps times the norm of the matrix of absolute
        # values, which is sqrt(n) at most. Twice that, for the rounding of the matrix itself, and what `_skew` allows.
        eps = 2 * float(jnp.finfo(dtype).eps) + 4 * float(np.finfo(np.float64).eps)
        return eps * sum((n + 2) * math.sqrt(n) for n in shape)

    def _transform(self, values: ArrayLike, *, inverse: bool) -> Any:
        on_host = not isinstance(values, jax.Array)
        xnp: Any = np if on_host else jnp
        array: Any = xnp.asarray(values, np.float64 if on_host else jnp.result_type(values, jnp.float32))
        for axis, matrix in zip((-3, -2, -1), self.matrices(array.shape[-3:]), strict=True):
            matrix, moved = (matrix if inverse else matrix.T).astype(array.dtype), xnp.moveaxis(array, axis, -1)
            # Not in TF32 or bfloat16, whatever JAX is set to.
            product = moved @ matrix if on_host else jnp.matmul(moved, matrix, precision=jax.lax.Precision.HIGHEST)
            array = xnp.moveaxis(product, -1, axis)
        return array


@dataclasses.dataclass(frozen=True)
class Cosine(_Separable):
    """The discrete cosine transform (DCT-II) over rows and columns of images [height, width, 1 or 3 channels].

    Coefficient [i, j, c] is that of i half waves from top to bottom and j from left to right. Of three channels, c is
    brightness, red against blue, or green against both: (1, 1, 1) / sqrt 3, (1, 0, -1) / sqrt 2, (1, -2, 1) / sqrt 6.
    """

    name = "cosine"

    def matrices(self, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        """See `_Separable.matrices`."""
        return _cosine_matrices(shape)


@functools.cache
def _cosine_matrices(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    if len(shape) != 3 or shape[2] not in (1, 3):
        raise ValueError(f"the cosine basis is of images [height, width, 1 or 3 channels], got shape {list(shape)}")
    rows, columns = (np.asarray(scipy.fft.dct(np.eye(size), axis=0, norm="ortho")) for size in shape[:2])
    matrices = rows, columns, _OPPONENT if shape[2] == 3 else np.ones((1, 1))
    for matrix in matrices:
        matrix.flags.writeable = False
    _check_float32(matrices)
    return matrices


@dataclasses.dataclass(frozen=True, eq=False)
class KarhunenLoeve(_Separable):
    """A separable basis that decorrelates given images: `KarhunenLoeve.of(images)`.

    Attributes:
      rows, columns, channels: orthonormal matrices, float64 [size, size], with a basis vector in each row.

    Raises:
      ValueError: if a matrix is not orthonormal, or together they lose too much by rounding to float32.
    """

    rows: np.ndarray
    columns: np.ndarray
    channels: np.ndarray
    name = "karhunen-loeve"

    def __post_init__(self):
        for axis in _AXES:
            matrix = np.array(getattr(self, axis), np.float64, order="C")  # a copy, which nobody changes
            matrix.flags.writeable = False
            object.__setattr__(self, axis, matrix)
            square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
            if not square or not _skew(matrix) <= 4 * (len(matrix) + 2) * len(matrix) ** 0.5 * np.finfo(float).eps:
                raise ValueError(f"{axis} must be an orthonormal matrix, got one of shape {list(matrix.shape)}")
        _check_float32(self._matrices)

    @classmethod
    def of(cls, images: ArrayLike) -> "KarhunenLoeve":
        """The eigenvectors of the covariances of rows, of columns and of channels of images [m, height, width,
        channels], in order of falling variance.

        Raises:
          ValueError: if these are not images, or there are none.
        """
        images = np.asarray(images)
        if images.ndim != 4:
            raise ValueError(f"images must be [m, height, width, channels], got shape {list(images.shape)}")
        mean, covariances = spectrum(images, Pixels())[0], [np.zeros((size, size)) for size in images.shape[1:]]
        for part in _parts(images):
            for axis, covariance in enumerate(covariances, start=1):
                flat = np.moveaxis(part - mean, axis, -1).reshape(-1, len(covariance)).astype(np.float64)
                covariance += flat.T @ flat
        return cls(*map(_eigenvectors, covariances))

    def matrices(self, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        """See `_Separable.matrices`."""
        own = tuple(len(matrix) for matrix in self._matrices)
        if tuple(shape) != own:
            raise ValueError(f"this Karhunen-Loeve basis is of images {list(own)}, got shape {list(shape)}")
        return self._matrices

    @property
    def _matrices(self) -> tuple[np.ndarray, ...]:
        return self.rows, self.columns, self.channels

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the matrices."""
        return hashlib.sha256(b"".join(matrix.tobytes() for matrix in self._matrices)).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KarhunenLoeve) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"KarhunenLoeve({' x '.join(str(len(matrix)) for matrix in self._matrices)}, {self.digest[:12]})"

    def describe(self) -> dict[str, Any]:
        """See `Basis.describe`: the matrices as base64 of little-endian float64."""
        text = {axis: base64.b64encode(getattr(self, axis).astype("<f8")).decode() for axis in _AXES}
        return {"name": self.name, **text}


def _check_float32(matrices: tuple[np.ndarray, ...]) -> None:
    """Refuse matrices, one for each axis, that rounding to float32 changes by more than `Gaussian` covers."""
    lost = sum(float(np.linalg.norm(matrix.astype(np.float32) - matrix)) for matrix in matrices)
    if not lost < 2.0**-19:
        sizes = " x ".join(str(len(matrix)) for matrix in matrices)
        raise ValueError(
            f"a basis of {sizes} loses too much by rounding to float32: {lost:.2g}, at most {2.0**-19:.2g}"
        )


def _skew(matrix: np.ndarray) -> float:
    """How far a square matrix is from an orthonormal one."""
    return float(np.linalg.norm(matrix @ matrix.T - np.eye(len(matrix))))


def _eigenvectors(covariance: np.ndarray) -> np.ndarray:
    """The eigenvectors of a covariance, in rows, those of large variance first."""
    vectors = np.linalg.eigh(covariance)[1].T[::-1]
    largest = np.abs(vectors).argmax(axis=1)[:, None]
    return vectors * np.sign(np.take_along_axis(vectors, largest, axis=1))  # the sign is arbitrary: this one is fixed


def read_basis(description: Mapping[str, Any]) -> Basis:
    """The basis that `Basis.describe` described.

    Raises:
      ValueError: if it is not the description of a basis.

    >>> read_basis({"name": "cosine"})
    Cosine()
    """
    try:
        if description["name"] in _WITHOUT_DATA:
            return _WITHOUT_DATA[description["name"]]
        if description["name"] == KarhunenLoeve.name:
            values = (np.frombuffer(base64.b64decode(description[axis], validate=True), "<f8") for axis in _AXES)
            return KarhunenLoeve(*(flat.reshape(math.isqrt(flat.size), -1) for flat in values))
    except (KeyError, TypeError, binascii.Error, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"not the description of a basis: {error!r}") from None
    raise ValueError(f"there is no basis {description['name']!r}, only pixels, cosine and karhunen-loeve")


_WITHOUT_DATA: dict[str, Basis] = {basis.name: basis for basis in (Pixels(), Cosine())}


def make_basis(name: BasisName, images: ArrayLike) -> Basis:
    """The basis of that name; `images` [m, *d] are those of a Karhunen-Loeve basis.

    Raises:
      ValueError: if there is no such basis, or as in `KarhunenLoeve.of`.
    """
    return KarhunenLoeve.of(images) if name == KarhunenLoeve.name else read_basis({"name": name})


def check_instance(basis: Basis) -> None:
    """Refuse what is not a basis."""
    if not isinstance(basis, Basis):
        raise ValueError(f"basis must be a basis such as Cosine(), got {basis!r}")


def check_basis(basis: Basis) -> None:
    """Refuse what is not one of the bases here: another one could not be read back, and its rounding is not known."""
    if not isinstance(basis, Basis) or read_basis(basis.describe()) != basis:
        raise ValueError(f"basis must be Pixels(), Cosine() or a KarhunenLoeve basis, got {basis!r}")


def least_theta(sigma: float, basis: Basis) -> float:
    """The smallest theta with which regions contain those of white noise sigma for the same votes: sigma, or in another
    basis than the pixels, where gaps are smaller by 2^-14 of themselves (`Gaussian`), `(1 + 2^-13) sigma`."""
    return sigma if basis == Pixels() else sigma * (1 + 2**-13)


def check_theta_range(sigma: float, theta_max: float, basis: Basis) -> float:
    """`least_theta`; ValueError if sigma and `theta_max` are not numbers with that between them."""
    check_instance(basis)
    check_real("sigma", sigma, "(0, inf)")
    check_real("theta_max", theta_max, "(0, inf)")
    if theta_max < (least := least_theta(sigma, basis)):
        raise ValueError(f"theta_max must be at least {least:.6g} with sigma {sigma:g}, got {theta_max:g}")
    return least


def check_thetas(smallest: ArrayLike, largest: ArrayLike) -> None:
    """Refuse thetas in another basis than the pixels, the smallest and largest [...] of each input, if they differ by
    more than `MOST_UNEQUAL`, up to rounding.
    """
    smallest, largest = np.asarray(smallest, np.float64), np.asarray(largest, np.float64)
    if (largest > (1 + 1e-6) * MOST_UNEQUAL * smallest).any():
        found = f"{smallest.min():g} to {largest.max():g}"
        raise ValueError(f"thetas may differ by a factor of {MOST_UNEQUAL:g} at most, except in pixels; got {found}")


def spectrum(images: ArrayLike, basis: Basis) -> tuple[np.ndarray, np.ndarray]:
    """Mean image, float32 [*d], and standard deviation of each coefficient, float64 [*d], of images [m, *d].

    Raises:
      ValueError: if there are no images, or they are not finite or not of the shape of the basis.
    """
    check_instance(basis)
    images = np.asarray(images)
    mean, squares = np.zeros(images.shape[1:]), np.zeros(images.shape[1:])
    for part in _parts(images):
        mean += part.sum(axis=0, dtype=np.float64) / len(images)
        squares += (np.asarray(basis.coefficients(part), np.float64) ** 2).sum(axis=0) / len(images)
    if not np.isfinite(squares).all():
        raise ValueError("images must be finite")
    deviations = np.sqrt(np.maximum(squares - np.asarray(basis.coefficients(mean)) ** 2, 0.0))
    return mean.astype(np.float32), deviations


def _parts(images: np.ndarray) -> Iterator[np.ndarray]:
    """Images [m, *d], some at a time: float64 takes memory."""
    if images.ndim < 2 or not images.size:
        raise ValueError(f"images must be [m, *d], got shape {list(images.shape)}")
    return (images[start : start + _PART] for start in range(0, len(images), _PART))
