"""What tests of the memory share: certificates made by hand, memories filled with them, comparisons."""

import jax
import numpy as np
import pytest

from ancer_jax.memory import Memory
from ancer_jax.regions import Region
from ancer_jax.smoothing import Certificate

both_norms = pytest.mark.parametrize("norm", [2, 1])
nobody = lambda x: -99


def certificate(region, prediction):
    """A certificate of this class and region, or a batch; the memory may not read anything else of it."""
    unread = np.full(np.shape(region.gap), np.nan)
    return Certificate(prediction, region, p_lower=unread, count=unread, n=unread, alpha=unread)


def fill(norm, *answers):
    """The memory after inserting (center, theta, gap, class) in turn, and what it answered."""
    memory, given = Memory.empty(norm), []
    for center, theta, gap, prediction in answers:
        memory, answer = memory.insert(certificate(Region(np.asarray(center, float), theta, gap, norm), prediction))
        given.append(answer)
    return memory, given


def some(batch, places):
    """The entries of a batch at these places."""
    return jax.tree.map(lambda value: np.asarray(value)[places], batch)


def stored_in(memory):
    """All stored regions, theta per coordinate."""
    regions = memory.regions
    theta = regions.theta.reshape(len(memory), *(-1,) * (regions.center.ndim - 1))
    return Region(regions.center, np.broadcast_to(theta, regions.center.shape), regions.gap, memory.norm)


def random_answers(rng, count, d, norm, dtype=np.float32):
    """A batch of random certificates in the unit cube, so large that many of them meet."""
    regions = Region(
        *(dtype(rng.uniform(low, 1, size)) for low, size in ((0, (count, d)), (0.1, (count, d)), (0, count))), norm
    )
    return certificate(regions, rng.integers(0, 3, count))


def assert_same(a, b):
    """That two memories hold the same bits."""
    np.testing.assert_array_equal(a.predictions, b.predictions)
    for value, other in zip(jax.tree.leaves(a.regions), jax.tree.leaves(b.regions), strict=True):
        np.testing.assert_array_equal(value, other)
