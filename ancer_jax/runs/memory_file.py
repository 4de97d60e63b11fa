"""A memory in a file."""

import json
from typing import Any

import numpy as np
from etils import epath

from ancer_jax.basis import check_basis, read_basis
from ancer_jax.memory import Memory
from ancer_jax.regions.region import Region
from ancer_jax.storage import as_os_error, in_bucket, read_arrays, write_file

MEMORY = "memory.npz"


def save_memory(memory: Memory, path: epath.PathLike, **more: np.ndarray) -> None:
    """Write a memory, with its inputs, to an npz file.

    Raises:
      ValueError: if its basis is not one of `ancer_jax.basis`.
      OSError: if it cannot be written, or is a folder.
    """
    path, regions = epath.Path(path), memory.regions
    check_basis(memory.basis)
    if not in_bucket(path) and path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name the file that the memory goes to")
    arrays = {"center": regions.center, "theta": regions.theta, "gap": regions.gap, "prediction": memory.predictions}
    kind = {"norm": np.array(memory.norm), "basis": np.array(json.dumps(memory.basis.describe()))}
    named: dict[str, Any] = kind | arrays | more
    write_file(path, lambda file: np.savez(file, **named))


@as_os_error
def load_memory(path: epath.PathLike) -> Memory:
    """The memory of a run directory, or of a file that `save_memory` wrote: to serve from, or to insert into.

    The stored answers are not compared with each other again: load only what you trust.

    Raises:
      ValueError: if there is none, or it is damaged.
    """
    path = epath.Path(path)
    file = path / MEMORY if path.is_dir() else path
    try:
        return read_memory_file(file)
    except FileNotFoundError:
        raise ValueError(f"{file}: there is no memory; runs with fixed noise, or unfinished, have none") from None
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file}: not a memory that can be read ({error})") from None


def read_memory_file(file: epath.Path) -> Memory:
    """The memory in an npz file; raises what reading it raises."""
    arrays = read_arrays(file, ("norm", "basis", "center", "theta", "gap", "prediction"))
    kind = int(arrays["norm"]), read_basis(json.loads(str(arrays["basis"])))
    region = Region(arrays["center"], arrays["theta"], arrays["gap"], *kind)
    return Memory.restore(region, arrays["prediction"])
