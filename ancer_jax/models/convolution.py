"""A convolution whose derivative is fast on CPUs, for `flax.linen.Conv(conv_general_dilated=...)`.

XLA's CPU backend runs the derivative of a strided convolution inside a loop (every theta search is one) several times
slower than the same sum written as shifted slices and one matrix product; the forward pass is the other way round
(`benchmarks/convolution.py`).
"""

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def convolution(lhs, rhs, window_strides, padding, **options) -> jax.Array:
    """`jax.lax.conv_general_dilated` in NHWC, with the derivative by shifted slices on CPUs.

    Dilated and grouped convolutions, and other backends, get XLA's own derivative.
    """
    special = ("lhs_dilation", "rhs_dilation", "feature_group_count")
    plain = all(options.get(name) in (None, (1, 1), 1) for name in special)
    if plain and jax.default_backend() == "cpu":
        if isinstance(padding, str):
            padding = jax.lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
        return _convolve(lhs, rhs, tuple(window_strides), tuple(padding))
    return jax.lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)


def _forward(lhs, rhs, strides, pads):
    return jax.lax.conv_general_dilated(lhs, rhs, strides, pads, dimension_numbers=_DIMENSIONS)


def _by_slices(lhs, rhs, strides, pads):
    height, width, _, features = rhs.shape
    lhs = jnp.pad(lhs, ((0, 0), *pads, (0, 0)))
    rows, columns = ((lhs.shape[1 + i] - rhs.shape[i]) // strides[i] * strides[i] + 1 for i in range(2))
    patches = [
        lhs[:, i : i + rows : strides[0], j : j + columns : strides[1]] for i in range(height) for j in range(width)
    ]
    return jnp.concatenate(patches, axis=-1) @ rhs.reshape(-1, features)


_convolve = jax.custom_jvp(_forward, nondiff_argnums=(2, 3))


def _jvp(strides, pads, primals, tangents):
    (lhs, rhs), (lhs_dot, rhs_dot) = primals, tangents
    out = _convolve(lhs, rhs, strides, pads)
    out_dot = jnp.zeros_like(out)
    if not isinstance(lhs_dot, SymbolicZero):
        out_dot += _by_slices(lhs_dot, rhs, strides, pads)
    if not isinstance(rhs_dot, SymbolicZero):
        out_dot += _by_slices(lhs, rhs_dot, strides, pads)
    return out, out_dot


_convolve.defjvp(_jvp, symbolic_zeros=True)
