"""Figures over a data set, certified accuracy and ACR, in float64 on the host; and figures as text, rounded safely."""

import fractions
import math
from collections.abc import Callable
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
    return _decimal(value, digits, math.floor)


def round_up(value: SupportsFloat, digits: int) -> str:
    """`float(value)`, or a fraction, as decimal text with `digits` decimals, rounded towards plus infinity, exactly.

    >>> round_up(0.1201, 2), round_up(0.0, 2), round_up(float("nan"), 2)
    ('0.13', '0.00', 'nan')
    """
    return _decimal(value, digits, math.ceil)


def round_share(value: float, count: int) -> str:
    """A share of `count` images as text with three decimals, rounded down as the fraction that it is, not as its float.

    >>> round_share(0.57, 100), round_down(0.57, 3)
    ('0.570', '0.569')
    """
    return round_down(fractions.Fraction(round(value * count), count), 3)


def _decimal(value: SupportsFloat, digits: int, whole: Callable[[fractions.Fraction], int]) -> str:
    if not isinstance(value, fractions.Fraction):
        if not math.isfinite(value):
            return str(float(value))
        value = fractions.Fraction(float(value))
    scaled = whole(value * 10**digits)
    ones, rest = divmod(abs(scaled), 10**digits)
    return f"{'-' if scaled < 0 else ''}{ones}.{rest:0{digits}}"


def _columns(radius: Numbers, correct: Numbers) -> tuple[np.ndarray, np.ndarray]:
    radius, correct = np.asarray(radius, np.float64), np.asarray(correct, bool)
    if radius.ndim != 1 or radius.shape != correct.shape or not radius.size:
        raise ValueError(
            f"radius and correct must be two columns of one length, got {list(radius.shape)} and {list(correct.shape)}"
        )
    return radius, correct
