"""What the settings of a run are, and what is said of those that differ."""

import jax
import numpy as np
import pytest

from ancer_jax import devices
from ancer_jax.runs.settings import describe_run, differences, short
from tests.runs.points import FIXED, POINTS
from tests.toy import CLASSIFIER


def test_options_of_jax_that_change_the_draws_are_settings():
    describe = lambda: describe_run(CLASSIFIER, POINTS, FIXED, np.array(0.3, np.float32), devices.device_mesh(1))
    usual = describe()
    jax.config.update("jax_threefry_partitionable", False)
    try:
        assert describe() == usual | {"jax_threefry_partitionable": False}
    finally:
        jax.config.update("jax_threefry_partitionable", True)


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
