"""Checks of arguments, in one place: each raises a ValueError that names the argument and the value.

A count that is not an integer is not a matter of style: with a chunk of 333.4, chunks of draws overlap, and some draws
are counted twice.
"""

import numbers
from typing import Any, get_args


def check_integer(name: str, value: Any, minimum: int = 1, maximum: int | None = None) -> None:
    """Refuse what is not an integer in `minimum`..`maximum`. Floats, booleans and text are not.

    >>> check_integer("chunk", 100)
    >>> check_integer("chunk", 333.4)
    Traceback (most recent call last):
    ValueError: chunk must be an integer, got 333.4
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):  # numpy.bool is no Integral
        raise ValueError(f"{name} must be an integer, got {value!r}")
    number = int(value)
    if number < minimum or (maximum is not None and number > maximum):
        allowed = f"at least {minimum}" if maximum is None else f"in {minimum}..{maximum}"
        raise ValueError(f"{name} must be {allowed}, got {value}")


def check_real(name: str, value: Any, interval: str) -> None:
    """Refuse what is not a real number in the interval: "(0, 1)" excludes its ends, "[0, 1]" includes them.

    >>> check_real("alpha", 0.001, "(0, 1)")
    >>> check_real("leakage_limit", 1.5, "[0, 1]")
    Traceback (most recent call last):
    ValueError: leakage_limit must be in [0, 1], got 1.5
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, got {value!r}")
    number, (low, high) = float(value), (float(end) for end in interval[1:-1].split(","))
    inside = low <= number <= high
    if not inside or (number == low and interval[0] == "(") or (number == high and interval[-1] == ")"):
        raise ValueError(f"{name} must be in {interval}, got {value}")


def check_type(name: str, value: Any, kind: type, hint: str) -> None:
    """Refuse what is not of a type, with a hint at what to do."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}: {hint}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Refuse what is not one of the values of a `typing.Literal`."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")
