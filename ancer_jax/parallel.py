"""Devices: a mesh over the local devices, rows of a batch spread over it."""

from typing import Any

import jax
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


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Arrays copied to every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
