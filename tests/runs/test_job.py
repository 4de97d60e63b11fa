"""How a run is carried out: each program is compiled once, and devices compute what is wanted and no more."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from ancer_jax import CertifyConfig, Execution, RunConfig, SequentialConfig, certify_dataset, devices
from ancer_jax.data import take
from ancer_jax.runs import votes
from ancer_jax.runs.directory import read_run
from ancer_jax.runs.job import Job
from ancer_jax.smoothing.smoothed import Stage
from tests.runs.points import ANCER, FIXED, ISOTROPIC, POINTS, THETA
from tests.toy import CLASSIFIER

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def compiled_names():
    """Names of the functions that were compiled so far."""
    names = []

    def listen(event, duration, **what):
        if event.endswith("backend_compile_duration"):
            names.append(what["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.usefixtures("as_on_accelerators")
@pytest.mark.parametrize(
    ("config", "execution"),
    [
        (FIXED, Execution(devices=1)),
        (FIXED, Execution(batch_size=9, chunk=30, devices=4)),
        (FIXED, Execution(chunk=30, devices=2, shard="draws")),
        (ISOTROPIC, Execution(batch_size=9, chunk=30, devices=4)),
        (ANCER, Execution(chunk=30, devices=2, shard="draws")),
    ],
    ids=lambda value: value.method if isinstance(value, RunConfig) else f"{value.shard} over {value.devices}",
)
def test_each_program_is_compiled_once(tmp_path, compiled_names, config, execution):
    """Whether its size is asked for or chosen; the last batch, which is not full, needs no other."""
    jax.clear_caches()
    compiled_names.clear()
    after_batches = []
    done = lambda stage, images: after_batches.append(len(compiled_names))
    config, execution = dataclasses.replace(config, memory=False), dataclasses.replace(execution, progress=done)
    certify_dataset(CLASSIFIER, POINTS, config, out=tmp_path, execution=execution)
    assert len(after_batches) > 3 and len(set(after_batches[1:])) == 1
    ours = {"jit(_find_theta)", "jit(_classes)", "jit(_measure_leakage)"} if config.data_dependent else set()
    ours |= {"jit(_count_items)"}
    assert {name: compiled_names.count(name) for name in ours} == dict.fromkeys(ours, 1)


@pytest.mark.parametrize("sampling", [None, SequentialConfig(radii=(0.1,))], ids=["all draws", "sequential"])
def test_no_votes_are_counted_for_what_fills_a_batch_up(tmp_path, monkeypatch, sampling):
    """Three images on two devices."""
    asked = {stage: np.zeros(4, int) for stage in Stage}

    def recording(keys, images, smoothed, items, steps, stage, **static):
        items = np.asarray(items)
        np.add.at(asked[Stage(int(stage))], items[:, 0], items[:, 2] - items[:, 1])
        return count(keys, images, smoothed, items, steps, stage, **static)

    count = votes._count_items
    monkeypatch.setattr(votes, "_count_items", recording)
    config = dataclasses.replace(FIXED, sampling=sampling)
    execution = Execution(batch_size=4, chunk=30, devices=2)
    certify_dataset(CLASSIFIER, take(POINTS, np.arange(3)), config, out=tmp_path, execution=execution)
    np.testing.assert_array_equal(asked[Stage.SELECT], [10, 10, 10, 0])
    drawn = asked[Stage.SELECT] + asked[Stage.PILOT] + asked[Stage.ESTIMATE]
    np.testing.assert_array_equal(drawn, [*read_run(tmp_path).columns("draws")["draws"], 0])


def counter(config, batch, chunk):
    """The vote counter of a batch, on one device."""
    job = Job(CLASSIFIER, config, THETA, None, devices.device_mesh(1), "images", chunk)
    return job.vote_counter(np.arange(batch, dtype=np.uint32), POINTS.images[:batch], job.starting_thetas(batch))


@pytest.mark.parametrize(("n", "chunk"), [(20, 100), (110, 100), (100, 100), (1_000, 128)])
def test_no_more_noisy_copies_than_draws_as_far_as_equal_chunks_allow(n, chunk):
    found = counter(RunConfig(certify=CertifyConfig(n=n)), 3, chunk)
    steps = -(-n // chunk)
    assert found.sizes == (3,) and found.chunk <= chunk and -(-n // found.chunk) == steps
    assert n <= steps * found.chunk < n + steps


def test_looks_of_sequential_sampling_are_whole_chunks():
    """As many noisy copies at a time are divided among more work items."""
    config = RunConfig(sampling=SequentialConfig(tolerance=0.1))
    for chunk, expected in ((60, (60, 3)), (100, (100, 3)), (128, (100, 3)), (500, (100, 15))):
        found = counter(config, 3, chunk)
        assert (found.chunk, found.sizes[-1]) == expected


def test_sequential_sampling_has_smaller_launches_for_its_last_looks():
    config = RunConfig(sampling=SequentialConfig(tolerance=0.1))
    assert counter(config, 32, 100).sizes == (2, 8, 32)
    assert counter(config, 3, 100).sizes == (1, 3)
    assert counter(RunConfig(), 32, 100).sizes == (32,)


def test_the_passes_of_a_run_are_those_that_the_network_makes(tmp_path):
    """Three images that go on to the end, one chunk after another: 10 and 100 draws each, in chunks of 30."""
    config = dataclasses.replace(FIXED, sampling=SequentialConfig(radii=(0.0,)))
    execution = Execution(batch_size=4, chunk=30, devices=1)
    certify_dataset(CLASSIFIER, take(POINTS, np.arange(3)), config, out=tmp_path, execution=execution)
    assert read_run(tmp_path).passes() == 3 * 30 + 3 * 120


def test_devices_share_the_rows_of_a_call():
    classifier, x = devices.shard_classifier(CLASSIFIER, devices.device_mesh(4)), POINTS.images[:8]
    sharded = functools.partial(jax.jit(lambda classifier, x: classifier(x)), classifier)
    assert {part.data.shape for part in sharded(x).addressable_shards} == {(2, 2)}
    np.testing.assert_allclose(sharded(x), CLASSIFIER(x), atol=1e-6)
    np.testing.assert_allclose(sharded(x[:3]), CLASSIFIER(x[:3]), atol=1e-6)  # not a multiple: not sharded


def test_a_run_that_is_started_again_has_the_same_bits(tmp_path, monkeypatch):
    """However much of it is left, its batches stay as large as they were: 6 and 5 images, of which the 5 are left."""
    odd, calls, sizes = take(POINTS, np.arange(11)), [], []

    def recording(job, batch):
        sizes.append(len(batch["id"]))
        return launch(job, batch)

    def stop(stage, images):
        calls.append(images)
        if len(calls) == 2:
            raise InterruptedError

    def start(out):
        config = dataclasses.replace(ANCER, memory=False, leakage=None)
        execution = Execution(devices=1, progress=stop)
        certify_dataset(CLASSIFIER, odd, config, out=out, execution=execution)
        return read_run(out).columns("theta", "counts")

    launch = Job.launch
    monkeypatch.setattr(Job, "launch", recording)
    with pytest.raises(InterruptedError):
        start(tmp_path / "stopped")
    assert len(read_run(tmp_path / "stopped").done()) == 6
    stopped, whole = start(tmp_path / "stopped"), start(tmp_path / "whole")
    assert set(sizes) == {6}
    for name in whole:
        np.testing.assert_array_equal(stopped[name], whole[name])
