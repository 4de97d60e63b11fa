"""Votes of a batch of images, counted on all devices by work items, each a range of draws of one image.

Whichever images want draws, and how many, all devices have work; how it is distributed changes no draw.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key

from ancer_jax import devices
from ancer_jax.smoothing.smoothed import Smoothed, Stage, class_counts_between, stage_key

# So full a launch must be, if there is a smaller one.
_NEARLY_FILLED = 0.75


class Program(NamedTuple):
    """A jitted function and its arguments: to run, or to learn what memory it would take."""

    function: Any
    arguments: tuple[Any, ...]
    static: dict[str, Any]

    def run(self) -> Any:
        """Start the program; nothing waits for it."""
        return self.function(*self.arguments, **self.static)

    def plan(self) -> tuple[int, Any]:
        """Bytes on one device that the program takes, and shapes and types of its results."""
        lowered = self.function.lower(*self.arguments, **self.static)
        # A GPU autotunes for minutes, and this program may turn out too large. On other platforms, what is compiled is
        # kept for `run`.
        on_gpu = devices.platform(self.static["mesh"]) == "gpu"
        sizes = lowered.compile({"xla_gpu_autotune_level": "0"} if on_gpu else None).memory_analysis()
        needed = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + sizes.output_size_in_bytes
        return needed, lowered.out_info


class Launch(NamedTuple):
    """Work items that are being counted.

    Attributes:
      indices: the image of each item.
      votes: of each item; they may still be on the devices.
      passes: noisy copies that the network classifies, those that nobody counts included.
    """

    indices: np.ndarray
    votes: jax.Array
    passes: int


class VoteCounter(NamedTuple):
    """Counts the votes of noisy copies of a batch of images, on all devices of the mesh.

    A classifier outside of JAX gets its copies from the first of them, one image after another.

    Attributes:
      keys, images: an entry for each image, on every device.
      smoothed: smoothed classifier of the theta of each image, [batch] or [batch, *d], on every device.
      chunk: noisy copies at a time of each work item.
      sizes: how many work items a launch may have, ascending, multiples of the devices; a program is compiled for each
        that is used.
      mesh: the devices.
    """

    keys: Key[Array, " batch"]
    images: jax.Array
    smoothed: Smoothed
    chunk: int
    sizes: tuple[int, ...]
    mesh: Mesh

    def __call__(self, stage: Stage, indices: np.ndarray, first: Any, stop: Any) -> np.ndarray:
        """Votes for each class, int64 [m, K], of the images `indices` [m] in the draws first, ..., stop - 1 of a stage;
        first and stop are [m], or one range for all.
        """
        return self.collect(self.launch(stage, indices, first, stop))[indices]

    def launch(self, stage: Stage, indices: np.ndarray, first: Any, stop: Any) -> list[Launch]:
        """Launch the counting without waiting for it, unless the classifier runs outside of JAX."""
        ranges = np.broadcast_arrays(indices, first, stop)
        wanted = [(int(index), int(a), int(b)) for index, a, b in zip(*ranges, strict=True) if a < b]
        if self.smoothed.classifier.on_host:
            return [
                Launch(np.array([index]), self._count_on_host(stage, index, (a, b)), b - a) for index, a, b in wanted
            ]
        launches = []
        while wanted:
            items, steps, wanted = self._next_items(wanted)
            votes = self.program(stage, items, steps).run()
            launches.append(Launch(items[:, 0], votes, len(items) * steps * self.chunk))
        return launches

    def _next_items(self, wanted: list[tuple[int, int, int]]) -> tuple[np.ndarray, int, list[tuple[int, int, int]]]:
        """The work items (index, first, stop) of the next launch, int32 [items, 3], the chunks of each, and what is
        left of the ranges that are wanted.

        Every item of a launch runs the same number of chunks (steps), as one compiled program. The launch is the
        largest that is nearly filled, with as many steps as fill all items.
        """
        chunks = [math.ceil((stop - first) / self.chunk) for _, first, stop in wanted]
        size = max((size for size in self.sizes if _NEARLY_FILLED * size <= sum(chunks)), default=self.sizes[0])
        possible = range(sum(chunks) // size, 1, -1)
        steps = next((steps for steps in possible if sum(count // steps for count in chunks) >= size), 1)
        draws = steps * self.chunk
        items = [(index, i, min(i + draws, stop)) for index, first, stop in wanted for i in range(first, stop, draws)]
        items.sort(key=lambda item: item[1] - item[2])  # the shorter ones are left
        padding = [(0, 0, 0)] * (size - len(items))  # of no draws
        return np.array(items[:size] + padding, np.int32), steps, items[size:]

    def _count_on_host(self, stage: Stage, index: int, draws: tuple[int, int]) -> jax.Array:
        """Votes in the draws first, ..., stop - 1 for one image: int32 [1, K]."""
        of_image = self.keys[index], self.images[index], jnp.asarray(self.smoothed.theta)[index]
        key, image, theta = jax.device_put(of_image, self.mesh.devices.flat[0])
        smoothed, steps = self.smoothed.with_theta(theta), math.ceil((draws[1] - draws[0]) / self.chunk)
        key = stage_key(key, stage)
        return class_counts_between(key, smoothed, image, draws, steps=steps, chunk=self.chunk)[None]

    def program(self, stage: Stage, items: np.ndarray, steps: int) -> Program:
        """The program that counts work items (index, first, stop), int32 [items, 3], of so many chunks."""
        batch = self.keys, self.images, self.smoothed
        arguments = (*batch, devices.shard_rows(items, self.mesh), np.int32(steps), np.uint32(stage))
        return Program(_count_items, arguments, {"chunk": self.chunk, "mesh": self.mesh})

    def collect(self, launches: list[Launch]) -> np.ndarray:
        """Wait for the votes that were launched: int64 [batch, K], for all images of the batch."""
        votes = np.zeros((len(self.images), self.smoothed.classifier.num_classes), np.int64)
        for launch in launches:
            np.add.at(votes, launch.indices, np.asarray(launch.votes))
        return votes


@functools.partial(jax.jit, static_argnames=("chunk", "mesh"))
def _count_items(keys, images, smoothed: Smoothed, items, steps, stage, *, chunk: int, mesh: Mesh):
    """Votes for each class in each of the work items (index, first, stop) [m, 3], of so many chunks: int32 [m, K].

    Each device counts the items that it has. Sums over devices are left to the host.
    """

    def count(keys, images, smoothed, steps, stage, item):
        index, first, stop = item
        of_image = smoothed.with_theta(smoothed.theta[index])
        key = stage_key(keys[index], stage)
        return class_counts_between(key, of_image, images[index], (first, stop), steps=steps, chunk=chunk)

    count_all = devices.on_own_rows(jax.vmap(count, (*[None] * 5, 0)), mesh, [*[False] * 5, True])
    return count_all(keys, images, smoothed, steps, stage, items)
