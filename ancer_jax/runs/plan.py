"""How many images, and how many noisy copies of each, the devices' memory can take at a time."""

import dataclasses
import math
import warnings

import numpy as np

from ancer_jax import devices
from ancer_jax.data import Dataset
from ancer_jax.runs.config import Execution
from ancer_jax.runs.job import Job, usual_chunk, usual_images
from ancer_jax.smoothing.smoothed import Stage

_USABLE = 0.9  # part of a device's free memory that a program may plan with


def choose_batch(job: Job, dataset: Dataset, execution: Execution) -> tuple[Job, int]:
    """The job with the chunk, and the batch size: as asked for, else as usual, or less where memory is short.

    What a batch needs is read from the compiled programs that will run. The batch size is a multiple of the devices
    that share the images, and no larger than the data need. One that is not asked for makes all batches of one size, so
    that no device waits for a last batch that is nearly empty.
    """
    among = job.mesh.size if job.shard == "images" else 1
    per_device = usual_images(job.mesh)

    def batch_of(per_device: int) -> int:
        even_batch = math.ceil(len(dataset) / math.ceil(len(dataset) / per_device / among))
        return math.ceil(min(execution.batch_size or even_batch, len(dataset)) / among) * among

    if not execution.chunk:
        job = dataclasses.replace(job, chunk=usual_chunk(job.mesh, batch_of(per_device)))
    while True:
        batch = batch_of(per_device)
        # Nothing to choose, or no program of JAX to choose for: compile nothing.
        if job.classifier.on_host or (execution.batch_size and execution.chunk):
            return job, batch
        budget = int(_USABLE * devices.free_memory(job.mesh))
        search, count = needed_memory(job, dataset.images[:1], batch)
        if max(search, count) <= budget:
            return job, batch
        if count > budget and job.chunk > 1 and not execution.chunk:
            job = dataclasses.replace(job, chunk=_shrunk(job.chunk, count, budget))
        elif batch > among and not execution.batch_size:
            per_device = _shrunk(batch // among, max(search, count), budget)
        else:
            warnings.warn(
                f"a batch of {batch} images needs {max(search, count) / 2**20:,.0f} MiB on each device, and "
                f"{budget / 2**20:,.0f} are left: searches with fewer samples need less",
                stacklevel=4,
            )
            return job, batch


def _shrunk(size: int, needed: int, budget: int) -> int:
    return max(1, min(size * 3 // 4, size * budget // needed))


def needed_memory(job: Job, image: np.ndarray, batch: int) -> tuple[int, int]:
    """Bytes on one device for the search for theta, and for votes and leakage, of a batch of images like `image`."""
    ids, images = np.zeros(batch, np.uint32), np.repeat(image, batch, axis=0)
    theta, search, leakage = job.starting_thetas(batch), 0, 0
    if job.config.data_dependent:
        search, found = job.search_program(ids, images).plan()
        theta = np.zeros(found.shape, found.dtype)
    if job.probes is not None:
        leakage, _ = job.leakage_program(images, theta, np.zeros(batch, np.int32)).plan()
    counter = job.vote_counter(ids, images, theta)
    count, _ = counter.program(Stage.SELECT, np.zeros((counter.sizes[-1], 3), np.int32), 1).plan()
    return search, max(leakage, count)
