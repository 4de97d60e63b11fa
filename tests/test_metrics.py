import fractions
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from ancer_jax.metrics import average_certified_radius, certified_accuracy, round_down

_INPUTS = st.lists(st.tuples(st.floats(0, 4), st.booleans()), min_size=1, max_size=30)
_NUMBERS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(-5, 5),
    st.floats(width=32, allow_nan=False, allow_infinity=False).map(np.float32),
    st.fractions(),
)


@hypothesis.given(_INPUTS, st.lists(st.floats(0, 4), min_size=1, max_size=5))
def test_certified_accuracy_is_the_naive_count(inputs, at):
    radius, correct = map(list, zip(*inputs, strict=True))
    expected = [sum(c and r >= a for r, c in inputs) / len(inputs) for a in at]
    np.testing.assert_allclose(certified_accuracy(radius, correct, at), expected, rtol=1e-15)


def test_certified_accuracy_counts_a_radius_that_is_reached_exactly():
    assert certified_accuracy([0.5], [True], 0.5) == 1
    assert certified_accuracy([0.5], [True], np.nextafter(0.5, 1)) == 0


def test_certified_accuracy_has_the_shape_of_the_radii():
    assert certified_accuracy([0.5], [True], 0.1).shape == ()
    assert certified_accuracy([0.5, 1.0], [True, True], np.zeros((3, 2))).shape == (3, 2)


@hypothesis.given(_INPUTS)
def test_average_certified_radius_is_the_naive_mean(inputs):
    radius, correct = map(list, zip(*inputs, strict=True))
    expected = math.fsum(r for r, c in inputs if c) / len(inputs)
    assert average_certified_radius(radius, correct) == pytest.approx(expected, rel=1e-12)


@hypothesis.given(_INPUTS)
def test_average_certified_radius_is_the_area_under_certified_accuracy(inputs):
    radius, correct = map(list, zip(*inputs, strict=True))
    ends = np.unique([0.0, *radius])
    area = np.sum(np.diff(ends) * certified_accuracy(radius, correct, ends[1:]))
    assert average_certified_radius(radius, correct) == pytest.approx(area, abs=1e-12)


@pytest.mark.parametrize("figure", [lambda *a: certified_accuracy(*a, 0.5), average_certified_radius])
@pytest.mark.parametrize(
    ("radius", "correct"), [([], []), ([1.0], [True, False]), ([[1.0]], [[True]]), (1.0, True)], ids=str
)
def test_columns_that_do_not_match_are_refused(figure, radius, correct):
    with pytest.raises(ValueError, match="radius and correct must be two columns of one length"):
        figure(radius, correct)


@hypothesis.given(_NUMBERS, st.integers(1, 9))
def test_round_down_is_never_above_and_within_one_unit_of_the_last_digit(value, digits):
    text = round_down(value, digits)
    exact = value if isinstance(value, fractions.Fraction) else fractions.Fraction(float(value))
    assert 0 <= exact - fractions.Fraction(text) < fractions.Fraction(1, 10**digits)
    assert len(text.partition(".")[2]) == digits


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.3, 1, "0.2"),  # the double nearest to 0.3 is below it
        (0.1, 1, "0.1"),
        (fractions.Fraction(3, 10), 1, "0.3"),
        (np.float32(0.1), 9, "0.100000001"),
        (-0.25, 1, "-0.3"),
        (-0.0, 2, "0.00"),
        (-1e-300, 2, "-0.01"),
        (2.0, 3, "2.000"),
        (math.inf, 3, "inf"),
        (-math.inf, 3, "-inf"),
        (math.nan, 3, "nan"),
    ],
    ids=str,
)
def test_round_down_at_the_edges(value, digits, text):
    assert round_down(value, digits) == text
