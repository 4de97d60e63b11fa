"""Noise laws by name."""

import dataclasses
from typing import Any, Literal

from ancer_jax.basis import Basis, Pixels
from ancer_jax.smoothing.noise import Gaussian, Noise, Uniform
from ancer_jax.smoothing.splitting import Splitting

NoiseName = Literal["gaussian", "uniform", "splitting"]
NOISES: dict[str, Noise] = {"gaussian": Gaussian(), "uniform": Uniform(), "splitting": Splitting()}
DEFAULT_NOISE = {"l2": "gaussian", "l1": "uniform"}


def make_noise(norm: str, name: str | None = None, *, basis: Basis = Pixels(), **attributes: Any) -> Noise:
    """The noise law of that name, by default the usual one of the norm ("l2" or "l1"), in a basis, with attributes.

    Raises:
      ValueError: if the noise does not certify in this norm, naming those that do, or has no such attribute or basis.

    >>> make_noise("l1", "splitting", exact=True).num_draws(0.5)
    255
    """
    fitting = [noise for noise, law in NOISES.items() if f"l{law.norm}" == norm]
    if (name or DEFAULT_NOISE.get(norm)) not in fitting:
        raise ValueError(f"noise for {norm} must be one of {', '.join(fitting)}, got {name!r}")
    noise = NOISES[name or DEFAULT_NOISE[norm]]
    fields = {field.name for field in dataclasses.fields(noise)}  # pyright: ignore[reportArgumentType]
    if basis != Pixels():
        if "basis" not in fields:
            raise ValueError(f"noise for {norm} is in pixels: {basis} does not preserve {norm} distances")
        attributes["basis"] = basis
    if unknown := set(attributes) - fields:
        raise ValueError(f"{type(noise).__name__} noise has no attribute {min(unknown)!r}")
    return dataclasses.replace(noise, **attributes)  # pyright: ignore[reportArgumentType]
