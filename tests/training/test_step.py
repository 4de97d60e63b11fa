"""Augmentation gives shifted and mirrored copies of an image, and nothing else."""

import jax
import numpy as np

from ancer_jax.training import TrainConfig
from ancer_jax.training.step import augment


def test_shifts_and_reflections_are_those_of_the_image():
    image = np.random.default_rng(0).random((6, 6, 1)).astype(np.float32)
    config = TrainConfig(shift=1)
    found = np.asarray(augment(jax.random.key(0), np.stack([image] * 200), config))
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    cuts = [padded[i : i + 6, j : j + 6] for i in range(3) for j in range(3)]
    possible = {cut.tobytes() for cut in cuts} | {np.ascontiguousarray(cut[:, ::-1]).tobytes() for cut in cuts}
    assert {one.tobytes() for one in found} == possible
    plain = augment(jax.random.key(0), image[None], TrainConfig(shift=0, flip=False))
    np.testing.assert_array_equal(plain[0], image)
