"""Batch norm is that of Flax: variables, values and gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancer_jax.models._batch_norm import BatchNorm

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("running", [False, True])
def test_batch_norm_is_that_of_flax(dtype, running):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x, pull = (draw(4, 5, 3, 6) * jnp.arange(1, 7) + 3).astype(dtype), draw(4, 5, 3, 6).astype(dtype)
    variables = {"params": {"scale": draw(6), "bias": draw(6)}, "batch_stats": {"mean": draw(6), "var": draw(6) ** 2}}

    def results(module):
        def apply(params, x):
            return module.apply({**variables, "params": params}, x, mutable="batch_stats")

        value, back, changed = jax.vjp(apply, variables["params"], x, has_aux=True)
        return module.init(jax.random.key(0), x), value, back(pull), changed

    found, expected = (
        jax.jit(lambda law=law: results(law(running, momentum=0.9, epsilon=1e-5, dtype=dtype)))()
        for law in (BatchNorm, nn.BatchNorm)
    )
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, flax in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert ours.dtype == flax.dtype
        precision = 2**-7 if ours.dtype == "bfloat16" else 2e-6
        ours, flax = (np.asarray(value, np.float64) for value in (ours, flax))
        np.testing.assert_allclose(ours, flax, rtol=0, atol=precision * (1 + np.abs(flax).max()))
