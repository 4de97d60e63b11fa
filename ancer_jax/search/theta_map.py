"""Theta maps: one theta for each coefficient of a basis, the same for all inputs, in a file; and where they start."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jax.typing import ArrayLike
from jaxtyping import Float

from ancer_jax._checks import check_real
from ancer_jax._numerics import geometric_mean
from ancer_jax.basis import Basis, Pixels, check_basis, check_theta_range, check_thetas, read_basis, spectrum
from ancer_jax.storage import read_array, read_arrays, write_file

_FLOAT32 = np.finfo(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class ThetaMap:
    """A universal theta and its basis; hashable by value.

    Attributes:
      theta: float32 [*d], positive and finite.
      basis: of the coefficients.
      history: how it was made, as JSON values; two maps that differ in it alone are equal.

    Raises:
      ValueError: if a theta is not positive and finite as float32, or, in another basis than the pixels, theta is not
        of the shape of its images, or the largest is more than 32 times the smallest.
    """

    theta: np.ndarray
    basis: Basis = Pixels()
    history: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        theta = np.asarray(self.theta)
        if not theta.size:
            raise ValueError(f"theta of a map must not be empty, got shape {list(theta.shape)}")
        if not ((theta >= _FLOAT32.tiny) & (theta <= _FLOAT32.max)).all():
            raise ValueError(f"theta of a map must be positive and finite, got {theta.min()} to {theta.max()}")
        check_basis(self.basis)
        if self.basis != Pixels():
            self.basis.coefficients(np.zeros(theta.shape))  # refuses other shapes
            check_thetas(theta.min(), theta.max())
        theta = np.array(theta, np.float32)  # a copy, which nobody changes
        theta.flags.writeable = False
        object.__setattr__(self, "theta", theta)

    @functools.cached_property
    def digest(self) -> str:
        """Hash of theta and basis."""
        described = json.dumps([self.theta.shape, self.basis.describe()], sort_keys=True)
        return hashlib.sha256(described.encode() + self.theta.tobytes()).hexdigest()

    def check_norm(self, norm: str, where: str) -> None:
        """ValueError if `where` gave a map that was learned for the noise of another norm than this."""
        if (own := self.history.get("norm", norm)) != norm:
            raise ValueError(f"{where} is a theta map of {own} noise, not {norm}: the units of theta differ")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ThetaMap) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.theta.shape))
        return f"ThetaMap({size}, {self.basis}, {self.digest[:12]})"

    def __str__(self) -> str:
        low, mean, high = (float(value) for value in (self.theta.min(), geometric_mean(self.theta), self.theta.max()))
        return f"theta {low:.3g} to {high:.3g}, geometric mean {mean:.4g}, basis {self.basis.name}"


def spectral_theta(
    images: Float[ArrayLike, "m *d"], basis: Basis, sigma: float, *, theta_max: float, power: float = 1.0
) -> ThetaMap:
    """The theta map `theta_k = clip(sigma * (sigma / s_k)^power, least, theta_max)`, where s_k is the standard
    deviation of coefficient k over the images: the less the images differ in a coefficient, the more noise it gets.

    It needs no network. For the same votes, regions contain those of white noise sigma: the smallest theta, `least`, is
    sigma or, in another basis than the pixels, 1.00012 sigma (`basis.least_theta`).

    Args:
      images: [m, *d] of the training data.
      basis: of the coefficients.
      sigma: standard deviation of the white noise that it is compared with.
      theta_max: the largest theta. Sizes depend on it: report it.
      power: 0 gives the smallest theta everywhere.

    Raises:
      ValueError: if theta_max is below the smallest theta, or a setting is not positive; as in `spectrum`.
    """
    least = check_theta_range(sigma, theta_max, basis)
    check_real("power", power, "[0, inf)")
    deviations = np.maximum(spectrum(images, basis)[1], np.finfo(np.float64).tiny)
    with np.errstate(over="ignore"):
        theta = np.clip(sigma * (sigma / deviations) ** power, least, theta_max)
    history = {
        "start": "spectral",
        "sigma": float(sigma),
        "theta_max": float(theta_max),
        "power": float(power),
        "images": np.shape(images)[0],
    }
    return ThetaMap(np.maximum(theta.astype(np.float32), np.float32(least)), basis, history)


def save_theta_map(theta_map: ThetaMap, path: epath.PathLike) -> None:
    """Write a theta map to an npz file.

    Raises:
      OSError: if it cannot be written.
    """
    described = {"basis": theta_map.basis.describe(), "history": {**theta_map.history}}
    arrays: dict[str, Any] = {name: np.array(json.dumps(value)) for name, value in described.items()}
    arrays["theta"] = theta_map.theta
    write_file(epath.Path(path), lambda file: np.savez(file, **arrays))


def load_theta_map(path: epath.PathLike) -> ThetaMap:
    """The theta map in a file of `save_theta_map`, or that in the pixels in an .npy file with theta alone.

    Raises:
      ValueError: if it cannot be read, or is not a theta map.
    """
    path = epath.Path(path)
    if path.suffix == ".npy":
        theta, basis, history = read_array(path), Pixels(), {}
    else:
        try:
            arrays = read_arrays(path, ("theta", "basis", "history"))
            theta, basis = arrays["theta"], read_basis(json.loads(str(arrays["basis"])))
            history = json.loads(str(arrays["history"]))
            if not isinstance(history, dict):
                raise ValueError("history is not a mapping")
        except FileNotFoundError:
            raise ValueError(f"{path}: there is no such file") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not a theta map that can be read ({error})") from None
    try:
        return ThetaMap(theta, basis, history)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
