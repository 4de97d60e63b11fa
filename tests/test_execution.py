"""How a run is carried out: each program is compiled once, and batches fit into the devices' memory."""

import dataclasses
import functools
import warnings

import jax
import numpy as np
import pytest

from ancer_jax import (
    CertifyConfig,
    Execution,
    LeakageConfig,
    RunConfig,
    SequentialConfig,
    certify_dataset,
    counting,
    execution,
    parallel,
    pipeline,
)
from ancer_jax.data import Dataset, take
from ancer_jax.execution import fit
from ancer_jax.runs import read_run
from ancer_jax.smoothing import Stage
from tests.test_pipeline import CLASSIFIER, SEARCH

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
DATASET = Dataset("points", np.arange(100), RNG.random((100, 3, 3, 1), np.float32), RNG.integers(0, 2, 100), 2)
SMALL = {"certify": CertifyConfig(n0=10, n=100), "leakage": LeakageConfig(3, 4), "guard_samples": 20, **SEARCH}
ANCER, FIXED = RunConfig(method="ancer", theta=0.3, **SMALL), RunConfig(theta=0.3, certify=SMALL["certify"])


@pytest.fixture(scope="module")
def compilations():
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
    ("config", "how"),
    [
        (FIXED, Execution(devices=1)),
        (FIXED, Execution(batch_size=9, chunk=30, devices=4)),
        (FIXED, Execution(chunk=30, devices=2, split="draws")),
        (ANCER, Execution(batch_size=9, chunk=30, devices=4)),
        (ANCER, Execution(chunk=30, devices=2, split="draws")),
    ],
    ids=lambda value: value.method if value in (FIXED, ANCER) else f"{value.split} over {value.devices}",
)
def test_each_program_is_compiled_once(tmp_path, compilations, config, how):
    """Whether its size is asked for or chosen; the last batch, which is not full, needs no other."""
    jax.clear_caches()
    compilations.clear()
    after_batches = []
    done = lambda images: after_batches.append(len(compilations))
    certify_dataset(CLASSIFIER, DATASET, config, out=tmp_path, execution=how, reconcile=False, progress=done)
    assert len(after_batches) > 3 and len(set(after_batches[1:])) == 1
    ours = {"jit(_find_theta)", "jit(_classes)", "jit(_measure_leakage)"} if config is ANCER else set()
    ours |= {"jit(count_pieces)"}
    assert {name: compilations.count(name) for name in ours} == dict.fromkeys(ours, 1)


def _fit(monkeypatch, memory, config=FIXED, **execution):
    monkeypatch.setattr(parallel, "free_memory", lambda mesh: memory)
    mesh = parallel.device_mesh(execution.pop("devices", 1))
    return fit(CLASSIFIER, DATASET, np.asarray(0.3, np.float32), None, config, Execution(**execution), mesh)


def test_batches_fit_into_memory(monkeypatch):
    assert _fit(monkeypatch, 10**9) == (10, 100)
    assert _fit(monkeypatch, 10**9, devices=8) == (56, 100)  # two batches, not one of 80 and one of 20
    assert _fit(monkeypatch, 10**9, devices=8, split="draws") == (10, 100)
    batch, chunk = _fit(monkeypatch, 60_000)
    assert batch == 10 and 1 < chunk < 100
    assert _fit(monkeypatch, 60_000, chunk=77)[1] == 77
    assert _fit(monkeypatch, 1, batch_size=7, chunk=90) == (7, 90)  # what is asked for is kept
    with pytest.warns(match=r"a batch of 1 images needs \d+ MiB on each device, and 0 are left"):
        assert _fit(monkeypatch, 10) == (1, 1)


@pytest.mark.parametrize("per_search, per_count", [(1000, 10), (10, 1000), (1, 1)])
@pytest.mark.parametrize("memory", [1e3, 1e4, 1e5, 1e7])
@pytest.mark.parametrize("asked", [{}, {"batch_size": 6}, {"chunk": 40}])
def test_what_does_not_fit_gets_smaller(monkeypatch, asked, memory, per_search, per_count):
    """With programs whose needs are known."""
    needs = lambda batch, chunk: (batch // 2 * per_search, batch // 2 * chunk * per_count)
    monkeypatch.setattr(execution, "_needed_memory", lambda batch, *_, chunk, **how: needs(batch, chunk))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        batch, chunk = _fit(monkeypatch, memory, ANCER, devices=2, **asked)
    assert batch % 2 == 0 and asked.items() <= {"batch_size": batch, "chunk": chunk}.items()
    if warned:  # nothing was left to shrink
        assert max(needs(batch, chunk)) > 0.9 * memory
        assert batch == asked.get("batch_size", 2)
        assert needs(batch, chunk)[1] <= 0.9 * memory or chunk == asked.get("chunk", 1)
    else:
        assert max(needs(batch, chunk)) <= 0.9 * memory
        usual = asked.get("batch_size", 20), asked.get("chunk", 100)
        assert (batch, chunk) == usual or max(needs(batch + 2, chunk + 1)) > 0.5 * memory


@pytest.mark.parametrize("sampling", [None, SequentialConfig(radii=(0.1,))], ids=["all draws", "sequential"])
def test_no_votes_are_counted_for_what_fills_a_batch_up(tmp_path, monkeypatch, sampling):
    """Three images on two devices."""
    asked = {stage: np.zeros(4, int) for stage in Stage}

    def recording(keys, images, theta, classifier, pieces, steps, stage, **how):
        np.add.at(asked[Stage(int(stage))], np.asarray(pieces)[:, 0], np.diff(np.asarray(pieces)[:, 1:])[:, 0])
        return count(keys, images, theta, classifier, pieces, steps, stage, **how)

    count = counting.count_pieces
    monkeypatch.setattr(counting, "count_pieces", recording)
    how = Execution(batch_size=4, chunk=30, devices=2)
    config = dataclasses.replace(FIXED, sampling=sampling)
    certify_dataset(CLASSIFIER, take(DATASET, range(3)), config, out=tmp_path, execution=how)
    np.testing.assert_array_equal(asked[Stage.SELECT], [10, 10, 10, 0])
    drawn = asked[Stage.SELECT] + asked[Stage.PILOT] + asked[Stage.ESTIMATE]
    np.testing.assert_array_equal(drawn, [*read_run(tmp_path).columns("draws")["draws"], 0])


@pytest.mark.parametrize(("n", "chunk"), [(20, 100), (110, 100), (100, 100), (1_000, 128)])
def test_no_more_noisy_copies_than_draws_as_far_as_equal_chunks_allow(n, chunk):
    config = RunConfig(certify=CertifyConfig(n=n))
    count, how = counting.pieces(config, 3, chunk, parallel.device_mesh(1))
    steps = -(-n // chunk)
    assert count == 3 and how["chunk"] <= chunk and -(-n // how["chunk"]) == steps
    assert n <= steps * how["chunk"] < n + steps


def test_devices_share_the_rows_of_a_call():
    classifier, x = parallel.share_rows(CLASSIFIER, parallel.device_mesh(4)), DATASET.images[:8]
    shared = functools.partial(jax.jit(lambda classifier, x: classifier(x)), classifier)
    assert {part.data.shape for part in shared(x).addressable_shards} == {(2, 2)}
    np.testing.assert_allclose(shared(x), CLASSIFIER(x), atol=1e-6)
    np.testing.assert_allclose(shared(x[:3]), CLASSIFIER(x[:3]), atol=1e-6)  # no multiple: not shared


def test_memory_of_the_machine_is_known():
    assert 2**20 < parallel.free_memory(parallel.device_mesh(2)) < 2**50


def test_a_run_that_is_started_again_has_the_same_bits(tmp_path, monkeypatch):
    """Whatever is left of it, its batches stay as large as they were: 6 and 5 images, of which the 5 are left."""
    odd, calls, sizes = take(DATASET, np.arange(11)), [], []

    def recording(ids, *arguments, **options):
        sizes.append(len(ids))
        return execution.compute(ids, *arguments, **options)

    def stop(images):
        calls.append(images)
        if len(calls) == 2:
            raise InterruptedError

    def start(out):
        how = {"execution": Execution(devices=1), "reconcile": False, "progress": stop}
        certify_dataset(CLASSIFIER, odd, ANCER, out=out, **how)
        return read_run(out).columns("theta", "counts")

    monkeypatch.setattr(pipeline, "compute", recording)
    with pytest.raises(InterruptedError):
        start(tmp_path / "stopped")
    assert len(read_run(tmp_path / "stopped").done()) == 6
    stopped, whole = start(tmp_path / "stopped"), start(tmp_path / "whole")
    assert set(sizes) == {6}
    for name in whole:
        np.testing.assert_array_equal(stopped[name], whole[name])
