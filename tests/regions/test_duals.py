"""Derivatives of the duals at many points, also where the optimum lies at a kink."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancer_jax.regions import Region, largest_outside


@pytest.mark.parametrize("norm", [2, 1])
@pytest.mark.parametrize("seed", range(8))
def test_largest_outside_has_the_derivative_of_finite_differences(norm, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=4), np.zeros(4)
    theta_a, theta_b = rng.uniform(0.3, 2, (2, 4))
    gap_b = 0.3 * np.linalg.norm(a / theta_b, ord=norm)

    def distance(a, theta_a, theta_b, gap_b):
        return largest_outside(Region(a, theta_a, 1.0, norm), Region(b, theta_b, gap_b, norm))

    values = (a, theta_a, theta_b, gap_b)
    with jax.enable_x64(True):
        gradients = jax.grad(distance, argnums=(0, 1, 2, 3))(*(jnp.asarray(value) for value in values))
    for i, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
        for place in np.ndindex(np.shape(value)):
            step = np.zeros(np.shape(value))
            step[place] = 1e-5
            high, low = (distance(*values[:i], value + s * step, *values[i + 1 :]) for s in (1, -1))
            assert gradient[place] == pytest.approx((high - low) / 2e-5, rel=1e-4, abs=1e-5)
