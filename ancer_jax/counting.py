"""Votes of a batch of images, counted on all devices in pieces, each so many draws of one image.

Whichever images want draws, and how many, all devices have work; how it is shared out changes no draw.
"""

import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ancer_jax import parallel
from ancer_jax.config import RunConfig
from ancer_jax.sequential import UNIT
from ancer_jax.smoothing import Stage, class_counts_between, stage_key


class Votes:
    """Counts the votes of noisy copies of a batch of images, on all devices of the mesh."""

    def __init__(self, keys, classifier, images, theta, config: RunConfig, *, chunk: int, mesh: Mesh):
        """Arrays with an entry for each image, on every device; `chunk` noisy copies of each at a time."""
        self._batch = keys, images, theta
        self._classifier, self._mesh = classifier, mesh
        self._shape = len(images), classifier.num_classes
        self._pieces, self._how = pieces(config, len(images), chunk, mesh)

    def __call__(self, stage: Stage, rows: np.ndarray, first: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Votes for each class of each of `rows` [m] in its draws first, ..., stop - 1 [m] of a stage: int64 [m, K]."""
        return self.end(self.begin(stage, rows, first, stop))[rows]

    def begin(self, stage: Stage, rows, first, stop) -> list[tuple[np.ndarray, jax.Array]]:
        """Start counting; nothing waits for it. The rows of the pieces, and their votes."""
        begun, chunk = [], self._how["chunk"]
        wanted = [(int(row), int(a), int(b)) for row, a, b in zip(rows, first, stop, strict=True) if a < b]
        while wanted:
            # Pieces as large as fill the devices once; what does not fit goes into smaller ones.
            steps = max(1, sum(math.ceil((b - a) / chunk) for _, a, b in wanted) // self._pieces)
            cut = [(row, i, min(i + steps * chunk, b)) for row, a, b in wanted for i in range(a, b, steps * chunk)]
            now, wanted = cut[: self._pieces], cut[self._pieces :]
            now += [(0, 0, 0)] * (self._pieces - len(now))
            pieces = parallel.split_rows(np.array(now, np.int32), self._mesh)
            votes = count_pieces(*self._batch, self._classifier, pieces, np.int32(steps), np.int32(stage), **self._how)
            begun.append((np.array(now)[:, 0], votes))
        return begun

    def end(self, begun: list[tuple[np.ndarray, jax.Array]]) -> np.ndarray:
        """What `begin` started, for all images of the batch: int64 [batch, K]."""
        votes = np.zeros(self._shape, np.int64)
        for rows, counted in begun:
            np.add.at(votes, rows, np.asarray(counted))
        return votes


def pieces(config: RunConfig, batch: int, chunk: int, mesh: Mesh) -> tuple[int, dict[str, Any]]:
    """How many pieces are counted at a time, `chunk` draws of each image of the batch; and the static arguments."""
    many, n = 1, config.certify.n
    if config.sampling is None and not config.exact:  # no rows beyond the n draws, as far as equal chunks allow
        chunk = math.ceil(n / math.ceil(n / chunk))
    if config.sampling is not None and chunk > UNIT:  # looks are multiples of UNIT
        many, chunk = max(1, chunk // UNIT), UNIT
    count = math.ceil(batch * many / mesh.size) * mesh.size
    return count, {"certificate": config.counted, "chunk": chunk, "mesh": mesh}


@functools.partial(jax.jit, static_argnames=("certificate", "chunk", "mesh"))
def count_pieces(keys, images, theta, classifier, pieces, steps, stage, *, certificate, chunk, mesh):
    """Votes for each class in each of the pieces (row, first, stop) [m, 3] of so many chunks: int32 [m, K].

    Each device counts the pieces that it has. Sums over devices are left to the host.
    """

    def count(keys, images, theta, classifier, steps, stage, piece):
        row, first, stop = piece
        arguments = stage_key(keys[row], stage), classifier, certificate, images[row], theta[row]
        return class_counts_between(*arguments, first=first, stop=stop, steps=steps, chunk=chunk)

    count_all = parallel.each_with_its_rows(jax.vmap(count, (*[None] * 6, 0)), mesh, [*[False] * 6, True])
    return count_all(keys, images, theta, classifier, steps, stage, pieces)
