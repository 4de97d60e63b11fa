"""What is said of settings that differ."""

import pytest

from ancer_jax.runs.settings import differences, short


def test_long_values_are_shown_where_they_differ():
    first, second = ({"data": {"name": "x"}, "map": f"ThetaMap(32 x 32 x 3, Cosine(), {i}23456789abc)"} for i in "0f")
    assert differences(first, second) == "map is ...(), 02345678... there, ...(), f2345678... here"


@pytest.mark.parametrize(
    ("at", "text"),
    [(0, "abcdefghijkl..."), (4, "abcdefghijkl..."), (6, "...cdefghijklmn..."), (51, "...opqrstuvwxyz")],
)
def test_a_long_value_is_cut_around_a_place(at, text):
    assert short("abcdefghijklmnopqrstuvwxyz" * 2, at) == text
    assert short(1.5, at) == "1.5"
