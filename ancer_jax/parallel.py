"""Devices: a mesh over the local devices, rows of a batch spread over it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def device_mesh(num_devices: int | None = None) -> Mesh:
    """A one-dimensional mesh over the first `num_devices` local devices (all of them by default).

    Raises:
      ValueError: if there are not that many.
    """
    devices = jax.local_devices()
    count = len(devices) if num_devices is None else num_devices
    if not 1 <= count <= len(devices):
        raise ValueError(f"devices must be in 1..{len(devices)} on this machine, got {count}")
    # Explicit axes, JAX's default, fail in the scan of the theta ascent.
    return Mesh(np.array(devices[:count]), ("rows",), axis_types=(AxisType.Auto,))


def split_rows(tree: Any, mesh: Mesh) -> Any:
    """Arrays with their leading axis spread over the mesh; its size must be a multiple of the mesh's."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("rows")))


def pmap_examples(
    function: Callable[..., Any], in_axes: int | Sequence[int | None] | None = 0, *, devices: int | None = None
) -> Callable[..., Any]:
    """`jax.vmap(function, in_axes)` spread over local devices by `jax.pmap`: a function of one example over many.

    Numbers of examples that are no multiple of the number of devices are filled up with the last one, and cut off. The
    library itself uses `split_rows`, which gives the same numbers; this is for code that is written with `pmap`.

    Args:
      function: of one example, traceable; its results are arrays.
      in_axes: 0 for arguments that have an example axis in front, None for those that all examples share.
      devices: how many local devices; None is all of them.

    Raises:
      ValueError: if there are not that many devices, or arguments differ in their number of examples.
    """
    chosen = list(device_mesh(devices).devices)
    mapped = jax.pmap(jax.vmap(function, in_axes), in_axes=in_axes, devices=chosen)

    def over_examples(*arguments):
        axes = in_axes if isinstance(in_axes, Sequence) else [in_axes] * len(arguments)
        split = [argument for argument, axis in zip(arguments, axes, strict=True) if axis == 0]
        counts = {jnp.shape(leaf)[0] for leaf in jax.tree.leaves(split)}
        if len(counts) != 1:
            raise ValueError(f"arguments must have one number of examples, got {sorted(counts)}")
        count = counts.pop()
        rows = np.minimum(np.arange(math.ceil(count / len(chosen)) * len(chosen)), count - 1).reshape(len(chosen), -1)
        deal = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], tree)
        results = mapped(*(deal(a) if axis == 0 else a for a, axis in zip(arguments, axes, strict=True)))
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], results)

    return over_examples


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Arrays copied to every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
