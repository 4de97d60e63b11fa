"""Figures over a data set: certified accuracy, average certified radius, medians. Host float64."""

import fractions
import math
from typing import SupportsFloat

import numpy as np

from ancer_jax._numerics import HostValues, Numbers


def certified_accuracy(radius: Numbers, correct: Numbers, at: Numbers) -> HostValues:
    """Share, float64 [...], of all inputs that are answered correctly with a radius of at least `at`.

    Args:
      radius: [n] certified radii, 0 where the classifier abstained; or proxy radii.
      correct: [n] whether the answer is the label (False where the classifier abstained).
      at: [...] radii.

    Raises:
      ValueError: if the arrays do not match or are empty.

    References: Cohen et al. 2019.

    >>> certified_accuracy([0.2, 0.6, 0.9], [True, True, False], [0.0, 0.5]).tolist()
    [0.6666666666666666, 0.3333333333333333]
    """
    radius, correct = _columns(radius, correct)
    reached = correct & (radius >= np.asarray(at, np.float64)[..., None])
    return reached.mean(axis=-1)


def average_certified_radius(radius: Numbers, correct: Numbers) -> float:
    """ACR: mean over all inputs of `radius * correct`; with proxy radii, the ACR-tilde of ANCER.

    Raises:
      ValueError: if the arrays do not match or are empty.

    References: Zhai et al. 2020 (MACER, arXiv 2001.02378); Eiras et al. 2022.
    """
    radius, correct = _columns(radius, correct)
    return float((radius * correct).mean())


def round_down(value: SupportsFloat, digits: int) -> str:
    """`float(value)`, or a fraction, as decimal text with `digits` decimals, rounded towards minus infinity, exactly.

    >>> round_down(1.2469, 2), round_down(-0.001, 2), round_down(float("-inf"), 2)
    ('1.24', '-0.01', '-inf')
    """
    if not isinstance(value, fractions.Fraction):
        if not math.isfinite(value):
            return str(float(value))
        value = fractions.Fraction(float(value))
    scaled = math.floor(value * 10**digits)
    whole, rest = divmod(abs(scaled), 10**digits)
    return f"{'-' if scaled < 0 else ''}{whole}.{rest:0{digits}}"


def round_up(value: SupportsFloat, digits: int) -> str:
    """`float(value)`, or a fraction, as decimal text with `digits` decimals, rounded towards plus infinity, exactly.

    >>> round_up(0.1201, 2), round_up(0.0, 2), round_up(float("nan"), 2)
    ('0.13', '0.00', 'nan')
    """
    text = round_down(-value if isinstance(value, fractions.Fraction) else -float(value), digits)
    if text == "nan" or not text.strip("0."):
        return text
    return text[1:] if text.startswith("-") else f"-{text}"


def _columns(radius: Numbers, correct: Numbers) -> tuple[np.ndarray, np.ndarray]:
    radius, correct = np.asarray(radius, np.float64), np.asarray(correct, bool)
    if radius.ndim != 1 or radius.shape != correct.shape or not radius.size:
        raise ValueError(
            f"radius and correct must be two columns of one length, got {list(radius.shape)} and {list(correct.shape)}"
        )
    return radius, correct
