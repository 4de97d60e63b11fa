"""Convolutions that are fast on CPUs, for `flax.linen.Conv(conv_general_dilated=...)`.

XLA's CPU backend has fast code for a convolution in its usual layout, but not for maps of at most 2 x 2 pixels, for few
channels, for the layout in which the gradient of a convolution comes, or for the gradient of a strided one. Each is
computed in another way here. Two cases differ in what is differentiated:

- In a theta search, a loop, gradients are those with respect to the input (`benchmarks/speed/convolution.py`).
- In a training step, they are also those with respect to the kernel (`benchmarks/speed/training_step.py`).

The way is chosen where a program is lowered, by the platform that it is lowered for: other platforms than the CPU use
XLA's convolution and its derivatives.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

_USUAL = ("NHWC", "HWIO", "NHWC")
_FEW = 4  # channels of the input
# A part of the batch has at most so many pixels, or so many numbers in its two matrices (5 MB): the larger part counts.
# Measured on a processor with 1 MB of second-level cache for each core; twice or half as much makes little difference.
_PIXELS, _NUMBERS = 2**13, 5 * 2**18


def convolution(lhs, rhs, window_strides, padding, *, in_loop: bool = True, **options) -> jax.Array:
    """`jax.lax.conv_general_dilated` in NHWC, with fast code for itself and for its derivatives on CPUs.

    Convolutions with options (dilated, grouped, of another precision), and those with padding that is negative or as
    wide as the kernel, are XLA's everywhere. A convolution that is not `in_loop` is one of a training step: it has
    derivatives in reverse mode only.
    """
    strides, pads = tuple(window_strides), padding
    if isinstance(padding, str):
        pads = jax.lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, padding)
    pads = tuple(pads)
    plain = all(value in (None, 1, (1, 1)) for name, value in options.items() if name != "dimension_numbers")
    small_pads = all(0 <= pad < size for side, size in zip(pads, rhs.shape, strict=False) for pad in side)
    if not (plain and small_pads):
        return jax.lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)
    fits = all(lhs.shape[1 + i] + sum(pads[i]) >= rhs.shape[i] for i in range(2))
    if max(lhs.shape[1:3]) <= 2 and min(rhs.shape[:2]) > 1 and fits:
        return _on_cpus(_by_matrix, strides, pads)(lhs, rhs)
    return (_convolve if in_loop else _convolve_in_training)(lhs, rhs, strides, pads)


def _xla(lhs, rhs, strides, pads):
    return jax.lax.conv_general_dilated(lhs, rhs, strides, pads, dimension_numbers=_USUAL)


def _on_cpus(way, strides, pads):
    """The convolution computed in this way on CPUs, and by XLA on other platforms."""
    ways = [functools.partial(one, strides=strides, pads=pads) for one in (way, _xla)]
    return lambda lhs, rhs: jax.lax.platform_dependent(lhs, rhs, cpu=ways[0], default=ways[1])


def _value(lhs, rhs, strides, pads):
    """XLA's convolution; on CPUs, where channels are few, it computes several pixels at once."""
    width = (lhs.shape[2] + sum(pads[1]) - rhs.shape[1]) // strides[1] + 1
    inputs, outputs = rhs.shape[2:]
    most = 64 if inputs <= _FEW else 32 if inputs <= 16 else 0  # channels of the output; measured
    count = next((n for n in (4, 2) if n * outputs <= most and width >= n and width % n == 0), 1)
    if count == 1:
        return _xla(lhs, rhs, strides, pads)
    return _on_cpus(functools.partial(_at_once, count), strides, pads)(lhs, rhs)


def _at_once(count, lhs, rhs, strides, pads):
    """Neighbouring pixels of a row as channels of one pixel; the wider kernel has a shifted copy for each of them."""
    step = strides[1]
    zeros = [(step * i, step * (count - 1 - i)) for i in range(count)]
    wide = jnp.concatenate([jnp.pad(rhs, ((0, 0), some, (0, 0), (0, 0))) for some in zeros], axis=-1)
    out = _xla(lhs, wide, (strides[0], count * step), pads)
    return out.reshape(*out.shape[:2], count * out.shape[2], rhs.shape[3])


def _xla_swapped(lhs, rhs, strides, pads):
    """The same from a kernel of layout HWOI, for the sake of its transpose, the gradient with respect to the input.

    JAX transposes a convolution by exchanging I and O in the layout of its kernel: HWOI becomes HWIO, which is fast.
    """
    swapped = rhs.swapaxes(2, 3)
    return jax.lax.conv_general_dilated(lhs, swapped, strides, pads, dimension_numbers=("NHWC", "HWOI", "NHWC"))


def _by_matrix(lhs, rhs, strides, pads):
    """One product of all pixels of an image and a matrix that has a copy of the kernel for each output pixel."""
    pixels, kernel = lhs.shape[1:3], rhs.shape[:2]
    sizes = [(pixels[i] + sum(pads[i]) - kernel[i]) // strides[i] + 1 for i in range(2)]
    # Where in the kernel the image begins, for each row (column) of the output; outside the kernel are zeros.
    begins = [[pads[i][0] - strides[i] * place for place in range(sizes[i])] for i in range(2)]
    zeros = [(max(0, -begins[i][-1]), max(0, begins[i][0] + pixels[i] - kernel[i])) for i in range(2)]
    wide = jnp.pad(rhs, (*zeros, (0, 0), (0, 0)))
    rows, columns = ([slice(zeros[i][0] + at, zeros[i][0] + at + pixels[i]) for at in begins[i]] for i in range(2))
    copies = jnp.stack([wide[row, column] for row in rows for column in columns], axis=3)
    product = lhs.reshape(len(lhs), -1) @ copies.reshape(lhs[0].size, -1)
    return product.reshape(-1, *sizes, rhs.shape[3])


def _by_slices(lhs, rhs, strides, pads):
    """One matrix product of the kernel and all patches, cut out by strided slices; its transpose has no convolution."""
    height, width, _, features = rhs.shape
    lhs = jnp.pad(lhs, ((0, 0), *pads, (0, 0)))
    stops = [(lhs.shape[1 + i] - rhs.shape[i]) // strides[i] * strides[i] + 1 for i in range(2)]
    patches = [
        lhs[:, i : i + stops[0] : strides[0], j : j + stops[1] : strides[1]]
        for i in range(height)
        for j in range(width)
    ]
    return jnp.concatenate(patches, axis=-1) @ rhs.reshape(-1, features)


_convolve = jax.custom_jvp(_value, nondiff_argnums=(2, 3))


def _jvp(strides, pads, primals, tangents):
    """The usual convolution, with a tangent whose transpose, the gradient, is fast."""
    (lhs, rhs), (lhs_dot, rhs_dot) = primals, tangents
    out = _convolve(lhs, rhs, strides, pads)
    out_dot = jnp.zeros_like(out)
    if not isinstance(lhs_dot, SymbolicZero):
        # With few input channels, slices are about as fast or faster; with more, the patches take too much memory.
        way = _xla_swapped if strides == (1, 1) and lhs.shape[-1] > _FEW else _by_slices
        out_dot += _on_cpus(way, strides, pads)(lhs_dot, rhs)
    if not isinstance(rhs_dot, SymbolicZero):
        out_dot += _on_cpus(_by_slices, strides, pads)(lhs, rhs_dot)
    return out, out_dot


_convolve.defjvp(_jvp, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve_in_training(lhs, rhs, strides, pads):
    """The usual convolution, with a fast gradient with respect to the kernel; without forward-mode derivatives."""
    return _value(lhs, rhs, strides, pads)


def _forward(lhs, rhs, strides, pads):
    return _value(lhs, rhs, strides, pads), (lhs, rhs)


def _backward(strides, pads, residuals, gradient):
    lhs, rhs = residuals
    way = _xla_swapped if strides == (1, 1) else _by_slices
    (by_input,) = jax.linear_transpose(lambda lhs: _on_cpus(way, strides, pads)(lhs, rhs), lhs)(gradient)

    def elsewhere(lhs, gradient):
        return jax.linear_transpose(lambda rhs: _xla(lhs, rhs, strides, pads), rhs)(gradient)[0]

    on_cpus = functools.partial(_by_kernel, shape=rhs.shape, strides=strides, pads=pads)
    return by_input, jax.lax.platform_dependent(lhs, gradient, cpu=on_cpus, default=elsewhere)


_convolve_in_training.defvjp(_forward, _backward)


def _by_kernel(lhs, gradient, shape, strides, pads):
    """Gradient with respect to the kernel: a sum over equal parts of the batch that fit into the processor's cache.

    In a loop, because without one XLA computes for each part again what the input was computed from.
    """
    height, width, *features = shape
    columns = [height * width, 1] if strides[0] > 1 else [width, height]  # of the two matrices of a part
    pixels = gradient[..., 0].size
    numbers = pixels * sum(a * b for a, b in zip(columns, features, strict=True))
    of_part = functools.partial(_by_kernel_of_part, shape=shape, strides=strides, pads=pads)
    least = min(-(-pixels // _PIXELS), -(-numbers // _NUMBERS))
    if least <= 1:
        return of_part(lhs, gradient).astype(lhs.dtype)
    parts = next((n for n in range(least, len(lhs)) if len(lhs) % n == 0), len(lhs))
    split = [array.reshape(parts, -1, *array.shape[1:]) for array in (lhs, gradient)]
    zeros = jnp.zeros(shape, jnp.promote_types(lhs.dtype, jnp.float32))
    return jax.lax.scan(lambda total, part: (total + of_part(*part), None), zeros, split)[0].astype(lhs.dtype)


def _by_kernel_of_part(lhs, gradient, shape, strides, pads):
    """The product of two matrices: inputs and gradients, of all pixels, shifted in all ways that the kernel needs.

    Entry (i, j) is the sum over pixels p of the product of the input at p + (i, j) and the gradient at p. Without a
    vertical stride, that is the input shifted by (0, j) times the gradient shifted by (-i, 0).
    """
    height, width = shape[:2]
    lhs = jnp.pad(lhs, ((0, 0), pads[0] if strides[0] > 1 else (0, 0), pads[1], (0, 0)))
    rows, columns = (gradient.shape[1 + i] * strides[i] for i in range(2))
    inputs = [lhs[:, :, j : j + columns : strides[1]] for j in range(width)]
    gradients = [gradient]
    if strides[0] > 1:
        inputs = [some[:, i : i + rows : strides[0]] for i in range(height) for some in inputs]
    else:
        gradient = jnp.pad(gradient, ((0, 0), (height - 1, height - 1), (0, 0), (0, 0)))
        starts = [height - 1 + pads[0][0] - i for i in range(height)]
        gradients = [gradient[:, start : start + lhs.shape[1]] for start in starts]
    left, right = (jnp.stack(some, -2).reshape(-1, len(some) * some[0].shape[-1]) for some in (inputs, gradients))
    # Of one pair of tall matrices, XLA would first write a transpose of the left one into memory; not so of two pairs.
    pairs = 2 if len(left) % 2 == 0 and len(left) > 16 * left.shape[1] else 1
    left, right = (matrix.reshape(pairs, -1, matrix.shape[1]) for matrix in (left, right))
    wide = jnp.promote_types(left.dtype, jnp.float32)
    out = jnp.einsum("npc,npd->ncd", left, right, preferred_element_type=wide).sum(0)
    return out.reshape(-1, width, shape[2], len(gradients), shape[3]).transpose(0, 3, 1, 2, 4).reshape(shape)
