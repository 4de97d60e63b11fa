"""Numbers: float64 on the host for what is reported, traced values under jit, and bounds of rounding errors."""

import contextlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

# Leaf: a field of a pytree. While JAX transforms one, it puts other objects there, so that nothing may check it.
# HostValues, Values: what is computed, on the host or anywhere. On the host that may be scalars of numpy, too.
# Numbers: what the host is given, lists among them.
if TYPE_CHECKING:
    Leaf: TypeAlias = np.ndarray | jax.Array | float
    HostValues: TypeAlias = np.ndarray
    Values: TypeAlias = np.ndarray | jax.Array
else:
    Leaf, HostValues = Any, np.ndarray | np.generic
    Values = HostValues | jax.Array
Numbers: TypeAlias = Sequence[Any] | Values | float | int


def array_library(*values: Any) -> ModuleType:
    """`jax.numpy` if any value is traced (jit, vmap, grad), else `numpy`, which has float64."""
    return jnp if any(isinstance(value, jax.core.Tracer) for value in values) else np


@contextlib.contextmanager
def float64_on_the_host() -> Iterator[None]:
    """Inside this context JAX computes in float64, on the CPU."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


def geometric_mean(values: Any, axis: Any = None) -> Any:
    """`exp(mean(log values))` over `axis` (default: all). Logarithms do not overflow, as a product of many would."""
    xnp = array_library(values)
    return xnp.exp(xnp.mean(xnp.log(xnp.asarray(values, dtype=float)), axis=axis))


def rounding(d: int, dtype: Any) -> float:
    """Bound of the relative error of a sum of `d` positive terms, each computed by a few operations of `dtype`."""
    return 2 * (d + 64) * float(jnp.finfo(dtype).eps)
