"""Votes counted by work items: however draws are divided among images, launches and devices, all count once."""

import functools
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ancer_jax import devices, from_function
from ancer_jax.runs.votes import VoteCounter, _count_items
from ancer_jax.smoothing import Gaussian, Smoothed, Splitting, Uniform
from ancer_jax.smoothing.smoothed import Stage, class_counts, class_counts_between, stage_key
from tests.toy import CLASSIFIER, DATASET, Coins

pytestmark = pytest.mark.usefixtures("quick_compilation")

NUM_DRAWS = 150
THETA = {
    "scalar": np.linspace(0.1, 0.9, 5).astype(np.float32),
    "per coordinate": np.random.default_rng(0).uniform(0.1, 0.9, (5, 3, 3, 1)).astype(np.float32),
}
ALL = np.arange(5)


def keys_of(ids):
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))(ids.astype(np.uint32))


def counter(theta=THETA["scalar"], *, columns=ALL, noise=Gaussian(), classifier=CLASSIFIER, chunk=7, items=2, on=1):
    """A counter for the images `columns` of the data set, on so many devices; `items`: one size of launches, or all."""
    mesh = devices.device_mesh(on)
    batch = keys_of(DATASET.ids[columns]), DATASET.images[columns], Smoothed(classifier, noise, theta[columns])
    sizes = items if isinstance(items, tuple) else (items,)
    return VoteCounter(*devices.replicate(batch, mesh), chunk, sizes, mesh)


@functools.cache
def expected(kind, noise, stage):
    """Votes for each class of `NUM_DRAWS` draws of each image, by `class_counts`."""

    def count(key, x, theta):
        key = stage_key(key, stage)
        return class_counts(key, Smoothed(CLASSIFIER, noise, theta), x, num_samples=NUM_DRAWS, chunk=NUM_DRAWS)

    votes = np.asarray(jax.jit(jax.vmap(count))(keys_of(DATASET.ids), DATASET.images, THETA[kind]))
    assert (votes.sum(axis=1) == NUM_DRAWS).all() and (votes.min(axis=1) > 0).any()
    return votes


ON_TWO = [(1, 2), (7, 2), (7, 32), (7, (2, 8, 32)), (100, 6), (NUM_DRAWS, 6), (400, 2)]


@pytest.mark.parametrize(
    ("chunk", "items", "on"), [(1, 2, 1), (7, (2, 8, 32), 1), *((*sizes, 2) for sizes in ON_TWO)], ids=str
)
def test_work_items_of_any_size_give_the_votes_of_class_counts(chunk, items, on):
    votes = counter(chunk=chunk, items=items, on=on)
    for stage in (Stage.SELECT, Stage.ESTIMATE):
        np.testing.assert_array_equal(votes(stage, ALL, 0, NUM_DRAWS), expected("scalar", Gaussian(), stage))


@pytest.mark.parametrize("noise", [Gaussian(), Uniform(), Splitting()], ids=lambda noise: type(noise).__name__)
@pytest.mark.parametrize("kind", THETA)
def test_every_noise_is_counted_at_the_theta_of_each_image(noise, kind):
    votes = counter(THETA[kind], noise=noise, items=4, on=2)(Stage.ESTIMATE, ALL, 0, NUM_DRAWS)
    np.testing.assert_array_equal(votes, expected(kind, noise, Stage.ESTIMATE))


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 60), st.integers(0, 60)), max_size=6, unique_by=lambda r: r[0])
)
def test_each_image_may_have_a_range_of_its_own(ranges):
    columns, a, b = (np.array(ends, int) for ends in zip(*ranges, strict=True)) if ranges else [np.zeros(0, int)] * 3
    first, stop = np.minimum(a, b), np.maximum(a, b)
    votes = counter(items=4, on=2)
    counted = votes(Stage.ESTIMATE, columns, first, stop)
    for column, low, high, found in zip(columns, first, stop, counted, strict=True):
        np.testing.assert_array_equal(found, between(int(column), int(low), int(high)))


@given(st.lists(st.integers(0, 60), min_size=5, max_size=5), st.sampled_from([(2,), (4,), (2, 6, 20)]))
def test_no_more_is_classified_than_chunks_and_the_smallest_launch_ask_for(draws, sizes):
    """Each launch but the last is full, or filled to three quarters."""
    launches = counter(items=sizes).launch(Stage.ESTIMATE, ALL, 0, np.array(draws))
    chunks, passes = sum(-(-count // 7) for count in draws), sum(launch.passes for launch in launches)
    assert 0 <= passes - 7 * chunks < 7 * max(sizes[0], 1 + sizes[-1] // 4)
    assert {len(launch.indices) for launch in launches} <= {*sizes}


def test_large_launches_come_first():
    """Two images want 40 and 9 chunks: 20 items of two chunks, of the one, six items of one, and the rest in twos."""
    launches = counter(items=(2, 6, 20)).launch(Stage.ESTIMATE, np.array([1, 2]), 0, np.array([280, 63]))
    assert [(len(launch.indices), launch.passes) for launch in launches] == [(20, 280), (6, 42), (2, 14), (2, 14)]


@functools.partial(jax.jit, static_argnames="chunk")
def between_at_once(key, smoothed, x, draws, chunk):
    return class_counts_between(stage_key(key, Stage.ESTIMATE), smoothed, x, draws, steps=1, chunk=chunk)


def between(column, first, stop):
    """The votes of one range of draws of one image, counted at once."""
    smoothed = Smoothed(CLASSIFIER, Gaussian(), THETA["scalar"][column])
    return between_at_once(keys_of(DATASET.ids)[column], smoothed, DATASET.images[column], (first, stop), 60)


@pytest.mark.parametrize("on", [1, 2])
def test_votes_of_ranges_add_up(on):
    votes = counter(items=4, on=on)
    cuts = [0, 1, 20, 20, 77, NUM_DRAWS]
    parts = [votes(Stage.ESTIMATE, ALL, *ends) for ends in itertools.pairwise(cuts)]
    assert (parts[2] == 0).all()
    np.testing.assert_array_equal(sum(parts), expected("scalar", Gaussian(), Stage.ESTIMATE))


@pytest.mark.parametrize("columns", [[3], [4, 0], [1, 2, 3]], ids=str)
def test_other_images_in_the_batch_change_nothing(columns):
    """Neither in the batch, nor among those that are asked for."""
    whole = expected("scalar", Gaussian(), Stage.ESTIMATE)[columns]
    np.testing.assert_array_equal(counter()(Stage.ESTIMATE, np.array(columns), 0, NUM_DRAWS), whole)
    part = counter(columns=np.array(columns))
    np.testing.assert_array_equal(part(Stage.ESTIMATE, np.arange(len(columns)), 0, NUM_DRAWS), whole)


def test_launches_wait_for_nothing_and_are_collected_for_the_whole_batch():
    votes = counter(items=2, on=2)
    launches = votes.launch(Stage.ESTIMATE, np.array([1, 3]), 0, NUM_DRAWS)
    assert all(len(launch.indices) == 2 and isinstance(launch.votes, jax.Array) for launch in launches)
    collected = votes.collect(launches)
    whole = expected("scalar", Gaussian(), Stage.ESTIMATE)
    np.testing.assert_array_equal(collected[[1, 3]], whole[[1, 3]])
    assert collected.dtype == np.int64 and not collected[[0, 2, 4]].any()


def test_nothing_is_launched_for_no_draws():
    votes = counter()
    assert votes.launch(Stage.ESTIMATE, ALL, 9, 9) == votes.launch(Stage.ESTIMATE, ALL[:0], 0, 9) == []
    assert votes.collect([]).shape == (5, 2) and not votes.collect([]).any()


@pytest.mark.parametrize("sizes", [(10,), (1, 3, 10)])
def test_ranges_of_any_size_take_one_program_for_each_size_of_launch(sizes):
    votes = counter(chunk=3, items=sizes)
    votes(Stage.ESTIMATE, ALL, 0, 9)  # 15 chunks: 10, 3 and twice 1
    compiled = _count_items._cache_size()
    for columns, stop in ((ALL, 200), (ALL[:1], 1), (ALL[2:], np.array([5, 0, 90]))):
        votes(Stage.PILOT, columns, 0, stop)
    assert _count_items._cache_size() == compiled


@pytest.mark.parametrize("noise", [Splitting(exact=True), Coins()], ids=["splitting", "coins"])
def test_all_draws_of_an_enumerable_noise_are_counted(noise):
    """Each image has as many as its theta says."""
    theta = np.asarray(jax.vmap(noise.admissible)(THETA["scalar"]))
    num_draws = np.array([noise.num_draws(one) for one in theta])
    assert len(set(num_draws)) > 1
    images = np.round(DATASET.images * 255).astype(np.float32) / np.float32(255)
    mesh = devices.device_mesh(2)
    batch = keys_of(DATASET.ids), images, Smoothed(CLASSIFIER, noise, theta)
    votes = VoteCounter(*devices.replicate(batch, mesh), 7, (4,), mesh)(Stage.ESTIMATE, ALL, 0, num_draws)
    assert (votes.sum(axis=1) == num_draws).all()

    @jax.jit
    def class_of(x, theta, draw):
        return CLASSIFIER(noise.perturb(keys_of(DATASET.ids)[0], draw, x, theta)[None])[0].argmax()

    for found, x, one, count in zip(votes, images, theta, num_draws, strict=True):
        by_hand = jax.vmap(class_of, (None, None, 0))(x, np.broadcast_to(one, x.shape), np.arange(count))
        np.testing.assert_array_equal(found, np.bincount(by_hand, minlength=2))


def nan_where_dark(variables, x):
    """NaN for copies whose first pixel is dark."""
    first = x.reshape(len(x), -1)[:, 0]
    return jax.numpy.stack([variables - first, jax.numpy.where(first < 0.5, jax.numpy.nan, first)], axis=1)


def test_a_draw_with_a_nan_votes_for_no_class():
    classifier = from_function(nan_where_dark, np.float32(0.9), num_classes=2)
    votes = counter(classifier=classifier, items=4, on=2)(Stage.ESTIMATE, ALL, 0, NUM_DRAWS)
    assert ((votes.sum(axis=1) > 0) & (votes.sum(axis=1) < NUM_DRAWS)).all()
