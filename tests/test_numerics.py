import math

import jax.numpy as jnp
import numpy as np
import pytest

from ancer_jax._numerics import geometric_mean


def test_geometric_mean_keeps_its_digits_in_many_dimensions():
    theta = np.random.default_rng(0).uniform(0.1, 1.0, 150_528).astype(np.float32)
    exact = math.exp(math.fsum(math.log(float(t)) for t in theta) / theta.size)
    assert geometric_mean(theta) == pytest.approx(exact, rel=1e-12)
    assert geometric_mean(jnp.asarray(theta)) == pytest.approx(exact, rel=1e-5)


def test_geometric_mean_over_some_axes_is_that_of_each_part():
    values = np.random.default_rng(0).uniform(0.1, 1.0, (3, 4, 5))
    expected = [geometric_mean(part) for part in values]
    np.testing.assert_allclose(geometric_mean(values, (1, 2)), expected, rtol=1e-14)
