"""Batch norm with a gradient written by hand: it reads the batch less often than the one that JAX derives."""

import flax.linen as nn
import jax
import jax.numpy as jnp

_BATCH = (0, 1, 2)


class BatchNorm(nn.Module):
    """`flax.linen.BatchNorm` of images [n, height, width, channels]: the same variables, values and gradients.

    In training it has derivatives in reverse mode only.

    Attributes:
      use_running_average: whether to normalise by the running statistics, and not by those of the batch.
      momentum: of the running statistics.
      epsilon: added to the variance.
      dtype: of the output; statistics are float32.
    """

    use_running_average: bool
    momentum: float
    epsilon: float
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images of the same shape, with mean 0 and variance 1 in each channel, then scaled and shifted."""
        channels = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        variance = self.variable("batch_stats", "var", jnp.ones, channels)
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        if self.use_running_average:
            factor = scale * jax.lax.rsqrt(variance.value + self.epsilon)
            return ((x - mean.value) * factor + bias).astype(self.dtype)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        of_batch = wide.mean(_BATCH)
        var_of_batch = jnp.maximum(0, (wide * wide).mean(_BATCH) - of_batch**2)
        if not self.is_initializing():
            for stored, new in ((mean, of_batch), (variance, var_of_batch)):
                stored.value = self.momentum * stored.value + (1 - self.momentum) * new
        # The gradient of `_normalise` with respect to x includes what goes through them.
        statistics = jax.lax.stop_gradient((of_batch, jax.lax.rsqrt(var_of_batch + self.epsilon)))
        return _normalise(x, scale, bias, *statistics).astype(self.dtype)


@jax.custom_vjp
def _normalise(x, scale, bias, mean, factor):
    """`(x - mean) * factor * scale + bias`; the gradient accounts for mean and factor, which were computed from x."""
    return (x - mean) * (factor * scale) + bias


def _forward(x, scale, bias, mean, factor):
    return _normalise(x, scale, bias, mean, factor), (x, scale, mean, factor)


def _backward(residuals, gradient):
    """Ioffe and Szegedy 2015, section 3, in two sums over the batch and one more pass."""
    x, scale, mean, factor = residuals
    by_bias = gradient.sum(_BATCH)
    by_scale = (gradient * (x - mean)).sum(_BATCH) * factor
    n = x.size // x.shape[-1]
    by_x = (factor * scale) * (gradient - by_bias / n - (x - mean) * (factor * by_scale / n))
    return by_x.astype(x.dtype), by_scale, by_bias, jnp.zeros_like(mean), jnp.zeros_like(factor)


_normalise.defvjp(_forward, _backward)
