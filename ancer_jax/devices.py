"""Devices: a mesh over the local devices, or those of all processes, and the rows of a batch sharded over it."""

import contextlib
import ctypes
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Sequence
from platform import libc_ver
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ancer_jax._checks import check_integer
from ancer_jax.smoothing.classifier import Classifier

_MOST_CPU_DEVICES = 8


def use_all_cores() -> None:
    """Make each core of the CPU, of up to eight, a device of JAX; call it before anything is computed.

    Some convolutions gain little from a second core; sharding images over cores gains nearly all of it. For a given
    theta, counts do not depend on the number of CPU devices. Does nothing if the number of CPU devices is set already
    (`jax_num_cpu_devices`), or if JAX has started.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = getattr(jax.config, "jax_num_cpu_devices") >= 0  # noqa: B009
    if not asked and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has computed something: it keeps its devices
            jax.config.update("jax_num_cpu_devices", min(cores, _MOST_CPU_DEVICES))


def keep_freed_memory() -> None:
    """Make this process keep the memory that it frees, for its next allocation; call it before anything is computed.

    On CPUs, JAX allocates the work space of a program anew in each call. By default the C library fetches it from the
    operating system and returns it every time, which takes time. Threads that run already may still do so. Does nothing
    where the C library is not glibc.
    """
    if libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD: one heap, never by mmap, never trimmed, in large steps.
        for option, value in ((-8, 1), (-4, 0), (-1, -1), (-2, 2**28)):
            mallopt(option, value)


def device_mesh(num_devices: int | None = None, *, all_processes: bool = False) -> Mesh:
    """A one-dimensional mesh over the first `num_devices` local devices (all of them by default).

    With `all_processes` the mesh has that many devices of each process, and programs run in all processes together.

    Raises:
      ValueError: if there are not that many.
    """
    local = jax.local_devices()
    count = len(local) if num_devices is None else num_devices
    check_integer("devices", count)
    if count > len(local):
        raise ValueError(f"devices must be in 1..{len(local)} on this machine, got {count}")
    of_each = itertools.groupby(jax.devices(), key=lambda device: device.process_index)
    devices = [device for _, group in of_each for device in [*group][:count]] if all_processes else local[:count]
    # Explicit axes, JAX's default, fail in the scan of the theta ascent.
    return Mesh(np.array(devices), ("rows",), axis_types=(AxisType.Auto,))


def platform(mesh: Mesh) -> str:
    """What the devices of the mesh are: "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform


def free_memory(mesh: Mesh) -> int:
    """Free bytes on each device of the mesh, if it tells; on CPUs an equal part of the machine's free memory."""
    statistics = [device.memory_stats() for device in mesh.devices.flat]
    known = [s["bytes_limit"] - s.get("bytes_in_use", 0) for s in statistics if s and "bytes_limit" in s]
    return min(known) if known else psutil.virtual_memory().available // mesh.size


def shard_rows(tree: Any, mesh: Mesh) -> Any:
    """Arrays with their leading axis sharded over the mesh; its size must be a multiple of the mesh's."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("rows")))


@dataclasses.dataclass(frozen=True)
class _Sharded:
    """A network whose rows are sharded over the devices of a mesh, if each gets the same number."""

    apply: Callable[[Any, jax.Array], jax.Array]
    mesh: Mesh

    def __call__(self, variables, x):
        if len(x) % self.mesh.size == 0:
            x = jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec("rows")))
        return self.apply(variables, x)


def shard_classifier(classifier: Classifier, mesh: Mesh) -> Classifier:
    """The classifier with the rows of each call sharded: for the noisy copies of one image on many devices."""
    return dataclasses.replace(classifier, apply=_Sharded(classifier.apply, mesh))


def take_rows(images: Any, rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """`images[rows]`, sharded like `shard_rows`; each process reads only the rows of its own devices."""
    sharding = NamedSharding(mesh, PartitionSpec("rows"))

    def of_device(index: Any):
        return images[rows[index[0]]]

    return jax.make_array_from_callback((len(rows), *images.shape[1:]), sharding, of_device)


def pmap_examples(
    function: Callable[..., Any], in_axes: int | Sequence[int | None] | None = 0, *, devices: int | None = None
) -> Callable[..., Any]:
    """`jax.vmap(function, in_axes)` sharded over local devices by `jax.pmap`: a function of one example over many.

    If the number of examples is not a multiple of the number of devices, the last one is repeated, and the results of
    the copies are cut off. The library itself uses `shard_rows`, which gives the same numbers; this is for code that is
    written with `pmap`.

    Args:
      function: of one example, traceable; its results are arrays.
      in_axes: 0 for arguments with a leading axis of examples, None for those that are the same for all examples.
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


def on_own_rows(function: Callable[..., Any], mesh: Mesh, sharded: Sequence[bool]) -> Callable[..., Any]:
    """`function` of a batch, computed by each device for its own rows: no device waits for another.

    Args:
      function: its results have a row for each row of its sharded arguments.
      mesh: the devices.
      sharded: for each argument, whether its rows are sharded (`shard_rows`), or all of it is on each device.
    """
    specs = tuple(PartitionSpec("rows") if rows else PartitionSpec() for rows in sharded)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("rows"), check_vma=False)


def refuse_collectives(mesh: Mesh, what: str) -> None:
    """Refuse a program, described by `what`, in which several CPU devices of this process exchange results.

    XLA aborts the whole process when one of them is 40 s late, which happens on a busy machine.

    Raises:
      ValueError: if the mesh has more than one CPU device of this process.
    """
    if len(mesh.local_devices) > 1 and platform(mesh) == "cpu":
        raise ValueError(
            f"{len(mesh.local_devices)} CPU devices cannot {what}: they would wait for each other, and XLA aborts a "
            "process where one is late; use one device, which has all cores"
        )
