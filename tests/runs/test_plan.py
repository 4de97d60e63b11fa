"""How many images and noisy copies at a time: as many as the devices' memory can take, by the programs that run."""

import dataclasses
import types
import warnings

import jax
import numpy as np
import pytest

from ancer_jax import Execution, RunConfig, SequentialConfig, certify_dataset, devices
from ancer_jax.data import take
from ancer_jax.runs import plan
from ancer_jax.runs.job import make_job, usual_chunk
from ancer_jax.runs.votes import Program
from tests.runs.points import ANCER, FIXED, ISOTROPIC, POINTS, SMALL, THETA
from tests.toy import CLASSIFIER

pytestmark = pytest.mark.usefixtures("quick_compilation")


def chosen(monkeypatch, memory, config=FIXED, **execution):
    """Batch size and chunk where so many bytes are left on each device."""
    monkeypatch.setattr(devices, "free_memory", lambda mesh: memory)
    execution = Execution(**execution)
    mesh = devices.device_mesh(execution.devices or 1)
    job, batch = plan.choose_batch(make_job(CLASSIFIER, config, THETA, execution, mesh), POINTS, execution)
    return batch, job.chunk


def test_batches_fit_into_memory(monkeypatch):
    assert chosen(monkeypatch, 10**9) == (10, 100)
    assert chosen(monkeypatch, 10**9, devices=8) == (56, 100)  # two batches, not one of 80 and one of 20
    assert chosen(monkeypatch, 10**9, devices=8, shard="draws") == (10, 100)
    batch, chunk = chosen(monkeypatch, 60_000)
    assert batch == 10 and 1 < chunk < 100
    assert chosen(monkeypatch, 60_000, chunk=77)[1] == 77
    assert chosen(monkeypatch, 1, batch_size=7, chunk=90) == (7, 90)  # what is asked for is kept
    with pytest.warns(match=r"a batch of 1 images needs \d+ MiB on each device, and 0 are left"):
        assert chosen(monkeypatch, 10) == (1, 1)


@pytest.mark.parametrize("per_search, per_count", [(1000, 10), (10, 1000), (1, 1)])
@pytest.mark.parametrize("memory", [1e3, 1e4, 1e5, 1e7])
@pytest.mark.parametrize("asked", [{}, {"batch_size": 6}, {"chunk": 40}])
def test_what_does_not_fit_gets_smaller(monkeypatch, asked, memory, per_search, per_count):
    """With programs whose needs are known."""
    needs = lambda batch, chunk: (batch // 2 * per_search, batch // 2 * chunk * per_count)
    monkeypatch.setattr(plan, "needed_memory", lambda job, image, batch: needs(batch, job.chunk))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        batch, chunk = chosen(monkeypatch, memory, ANCER, devices=2, **asked)
    assert batch % 2 == 0 and asked.items() <= {"batch_size": batch, "chunk": chunk}.items()
    if warned:  # nothing was left to shrink
        assert max(needs(batch, chunk)) > 0.9 * memory
        assert batch == asked.get("batch_size", 2)
        assert needs(batch, chunk)[1] <= 0.9 * memory or chunk == asked.get("chunk", 1)
    else:
        assert max(needs(batch, chunk)) <= 0.9 * memory
        usual = asked.get("batch_size", 20), asked.get("chunk", 100)
        assert (batch, chunk) == usual or max(needs(batch + 2, chunk + 1)) > 0.5 * memory


def test_an_accelerator_gets_4096_copies_at_a_time_of_however_few_images(monkeypatch):
    chunks = lambda on, *batches: [usual_chunk(devices.device_mesh(on), batch) for batch in batches]
    assert chunks(4, 1, 32) == [100, 100]
    monkeypatch.setattr(devices, "platform", lambda mesh: "gpu")
    assert chunks(1, 1, 2, 32, 100, 5000) == [4096, 2048, 128, 40, 1]
    assert chunks(4, 1, 4, 8, 128) == [4096, 4096, 2048, 128]
    assert chosen(monkeypatch, 10**9) == (25, 163) and chosen(monkeypatch, 10**9, batch_size=4) == (4, 1024)
    assert chosen(monkeypatch, 10**9, devices=8, shard="draws") == (25, 1024)
    assert chosen(monkeypatch, 10**9, chunk=50) == (25, 50)


@pytest.mark.parametrize(("platform", "options"), [("gpu", {"xla_gpu_autotune_level": "0"}), ("tpu", None)])
def test_plans_for_a_gpu_are_made_without_autotuning(monkeypatch, platform, options):
    """XLA knows the option: the CPU's compiler takes it, too."""
    monkeypatch.setattr(devices, "platform", lambda mesh: platform)
    function, asked = jax.jit(lambda x, mesh: x + 1, static_argnames="mesh"), []
    lowered = function.lower(np.ones(3, np.float32), mesh=None)

    def compile(options):
        asked.append(options)
        return lowered.compile(options)

    stand_in = types.SimpleNamespace(lower=lambda *a, **k: types.SimpleNamespace(compile=compile, out_info=None))
    needed, _ = Program(stand_in, (), {"mesh": None}).plan()
    assert asked == [options] and needed >= 24
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_autotune"):
        lowered.compile({"xla_gpu_autotune": "0"})


def test_memory_of_the_machine_is_known():
    assert 2**20 < devices.free_memory(devices.device_mesh(2)) < 2**50


@pytest.fixture
def calls(monkeypatch):
    """What identifies each program that was planned, and each that was run, to JAX: it compiles no other for them."""

    def identity(program):
        leaves, structure = jax.tree.flatten(program.arguments)
        kinds = tuple((np.shape(leaf), leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves)
        return program.function, structure, kinds, tuple(sorted(program.static.items()))

    found = {"plan": [], "run": []}

    def recording(name):
        method = getattr(Program, name)

        def wrapper(program):
            found[name].append(identity(program))
            return method(program)

        return wrapper

    for name in found:
        monkeypatch.setattr(Program, name, recording(name))
    return found


SPLITTING = {"norm": "l1", "noise": "splitting", "exact": True, "period": 60}


@pytest.mark.usefixtures("as_on_accelerators")
@pytest.mark.parametrize(
    ("shard", "config"),
    [
        ("images", FIXED),
        ("draws", FIXED),
        ("images", dataclasses.replace(FIXED, sampling=SequentialConfig(tolerance=0.1))),
        ("draws", dataclasses.replace(FIXED, **SPLITTING)),
        ("images", dataclasses.replace(FIXED, method="universal")),
        ("draws", ISOTROPIC),
        ("images", dataclasses.replace(ISOTROPIC, leakage=None)),
        ("images", ANCER),
        ("draws", ANCER),
        ("images", RunConfig(method="ancer", theta=0.3, **SMALL, **SPLITTING)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.method} {value.certified_noise} {value.sampling}",
)
def test_the_programs_that_are_planned_are_those_that_run(tmp_path, calls, shard, config):
    """The same jitted functions, on arguments of the same shapes, types and devices, with the same static arguments.

    Sequential sampling also has smaller launches, which need less memory.
    """
    theta_map = np.linspace(0.1, 0.5, 9).reshape(3, 3, 1) if config.method == "universal" else None
    execution = Execution(devices=2, shard=shard)
    config, dataset = dataclasses.replace(config, memory=False), take(POINTS, np.arange(45))  # in three batches
    certify_dataset(CLASSIFIER, dataset, config, out=tmp_path, theta_map=theta_map, execution=execution)
    programs = {"_count_items", *(["_find_theta"] if config.data_dependent else [])}
    programs |= {"_measure_leakage"} if config.data_dependent and config.leakage else set()
    assert {function.__name__ for function, *_ in calls["plan"]} == programs
    assert {*calls["run"]} >= {*calls["plan"]} and len(calls["run"]) > len(calls["plan"]) == len(programs)
    assert {*calls["run"]} == {*calls["plan"]} or config.sampling


def test_where_memory_is_short_the_last_plan_is_what_runs(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(devices, "free_memory", lambda mesh: 60_000)
    certify_dataset(CLASSIFIER, POINTS, FIXED, out=tmp_path, execution=Execution(devices=1))
    assert len({*calls["plan"]}) > 1 and {*calls["run"]} == {calls["plan"][-1]}
