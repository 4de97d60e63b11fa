"""A run on disk: what is written is read, damage is named, and a process may die at any moment without any loss."""

import contextlib
import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from ancer_jax import CertifyConfig, Execution, RunConfig, SequentialConfig, certify_dataset, from_function
from ancer_jax.data import Dataset, select
from ancer_jax.runs import directory, open_run, read_run
from ancer_jax.runs.settings import RESULTS_VERSION
from ancer_jax.runs.table import read_table
from ancer_jax.search import IsotropicConfig
from ancer_jax.smoothing import Gaussian
from ancer_jax.smoothing.certificate import Evidence
from tests.runs.shards import CONFIG, arrays, settings, write

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _brightness(weights, x):
    return x.reshape(len(x), -1) @ weights


_TOY = RunConfig(theta=0.5, certify=CertifyConfig(n0=10, n=200, alpha=0.01))


def _images(n=7):
    rng = np.random.default_rng(1)
    images = rng.random((n, 2, 2, 1), np.float32)
    return Dataset("toy", np.arange(n) * 3, images, rng.integers(0, 3, n), 3)


def _certify(out, dataset=None, *, batch_size=2, devices=1, config=_TOY, progress=lambda stage, images: None):
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(4, 3)), jnp.float32)
    classifier = from_function(_brightness, weights, num_classes=3)
    dataset = _images() if dataset is None else dataset
    execution = Execution(batch_size=batch_size, devices=devices, progress=progress)
    return certify_dataset(classifier, dataset, config, out=out, execution=execution)


def _record(images_of_calls):
    """A `progress` that appends the number of images of each call to a list."""

    def progress(stage, images):
        assert stage == "certified"
        images_of_calls.append(images)

    return progress


def _without_time(tsv):
    """Its lines, without the column `time`."""
    cells = [line.split("\t") for line in pathlib.Path(tsv).read_text().splitlines()]
    assert cells[0].index("time") == 5
    return [row[:5] + row[6:] for row in cells]


def _contents(out):
    """Every shard's arrays, `seconds` apart."""
    shards = {}
    for file in sorted((pathlib.Path(out) / "shards").iterdir()):
        with np.load(file) as arrays:
            shards[file.name] = {name: arrays[name].tobytes() for name in arrays.files if name != "seconds"}
    return shards


def _written(out):
    return {file.name: file.stat().st_mtime_ns for file in (pathlib.Path(out) / "shards").glob("*.npz")}


def _assert_same(out, reference):
    assert _contents(out) == _contents(reference)
    assert _without_time(out / "results.tsv") == _without_time(reference / "results.tsv")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An undisturbed run of `_certify`."""
    out = tmp_path_factory.mktemp("finished") / "run"
    _certify(out)
    return out


def test_what_is_written_is_read(tmp_path):
    write(tmp_path / "run", [0, 2, 9], [10, 11])
    run = read_run(tmp_path / "run")
    assert run.settings == {"results_version": RESULTS_VERSION} | settings()
    assert run.config == CONFIG and run.path == tmp_path / "run"
    assert run.done() == {0, 2, 9, 10, 11} and run.passes() == 6000
    for shard, ids in zip(run.shards(), ([0, 2, 9], [10, 11]), strict=True):
        expected = arrays(ids)
        del expected["passes"]
        assert shard.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(shard[name], array)
            assert shard[name].dtype == array.dtype


def test_each_shard_is_read_once_for_both_tables(tmp_path, monkeypatch):
    write(tmp_path / "run", [0, 2, 9], [10, 11])
    files, read = [], directory.read_arrays

    def recording(file, names):
        files.append(file.name)
        return read(file, names)

    monkeypatch.setattr(directory, "read_arrays", recording)
    before, after = read_run(tmp_path / "run").results()
    assert before["idx"].tolist() == [0, 2, 9, 10, 11] and after is None
    assert sorted(set(files) - {"memory.npz"}) == sorted(files[:2]) == ["0.npz", "10.npz"]
    assert files.count("0.npz") == files.count("10.npz") == 1


def test_a_run_without_shards_has_no_results(tmp_path):
    with open_run(tmp_path / "run", settings(), {}) as run:
        assert run.done() == set() and run.results() == ({}, None)
        with pytest.raises(ValueError, match="run: there are no results yet"):
            run.columns("gap")


def test_config_records_settings(tmp_path):
    write(tmp_path / "run", [0])
    document = json.loads((tmp_path / "run" / "config.json").read_text())
    assert document == {"settings": {"results_version": RESULTS_VERSION} | settings()}


def test_a_run_is_continued_with_a_number_of_another_type(tmp_path):
    """An integer from Python, a float from the command line."""
    for ids, theta in (([0], 1), ([1], 1.0)):
        with open_run(tmp_path / "run", settings() | {"theta": theta}, {}) as run:
            run.write_shard(arrays(ids))
    assert read_run(tmp_path / "run").done() == {0, 1}


def test_an_array_that_no_run_has_is_named(finished):
    with pytest.raises(ValueError, match=r"a run has no array 'radius', only ids, labels, .*report\.load_results"):
        read_run(finished).columns("radius")


def test_every_shard_says_what_it_was_made_with(tmp_path, finished):
    for ids, device in (([0], "a CPU"), ([1], "another CPU"), ([2], "a CPU")):
        with open_run(tmp_path / "run", settings(), {"jax": "1.2.3", "device": device}) as run:
            run.write_shard(arrays(ids))
    assert read_run(tmp_path / "run").made_with_all() == {"jax": "1.2.3", "device": "a CPU, another CPU"}
    assert {"ancer-jax", "jax", "numpy", "python", "device"} <= read_run(finished).made_with_all().keys()


@pytest.mark.parametrize("version", [None, 2, RESULTS_VERSION + 1])
def test_a_run_of_another_version_is_refused_with_what_to_do(tmp_path, version):
    """By whoever goes on with it, and by whoever reads it; its settings are not even looked at, and nothing changes."""
    run = tmp_path / "run"
    run.mkdir()
    # What version 2 wrote, and the versions before it without a number.
    settings = {"norm": "l2", "method": "shared", "leakage": None, "data": {"image_shape": [3, 2, 1]}}
    settings |= {} if version is None else {"results_version": version}
    (run / "config.json").write_text(json.dumps({"settings": settings}))
    before = (run / "config.json").read_bytes()
    for use in (lambda: read_run(run), lambda: write(run, [1]), lambda: _certify(run)):
        with pytest.raises(ValueError, match=r"run was made by another version of ancer_jax") as error:
            use()
        assert f"(results_version {version}, not {RESULTS_VERSION})" in str(error.value)
        assert "certify again into a new directory, or report its tables (*.tsv)" in str(error.value)
        assert "\n" not in str(error.value)
    assert (run / "config.json").read_bytes() == before
    assert not any((run / "shards").glob("*")) and not (run / "results.tsv").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"gap": lambda a: a["gap"] * 1.0001},
        {"gap": lambda a: a["gap"] + (a["gap"] == 0)},
        {"gap": lambda a: a["gap"] * 100, "p_lower": lambda a: a["p_lower"] ** 0.01},
        {"predictions": lambda a: np.maximum(a["predictions"], 0)},
        {"bound_alpha": lambda a: a["bound_alpha"] * 100},
        {"bound_alpha": lambda a: a["bound_alpha"] * 0},
        {"counts": lambda a: a["counts"] - 1},
        {"n": lambda a: a["n"] * 2},
        {"bound_n": lambda a: a["bound_n"] * 2},
        {"bound_votes": lambda a: a["bound_n"] + 1},
        {"bound_runner_up": lambda a: a["bound_runner_up"] - 1},
        {"bound_runner_up": lambda a: a["bound_runner_up"] // 2, "gap": lambda a: separate_gap(a, a["bound_alpha"])},
    ],
    ids=[
        "a little",
        "of an abstention",
        "and bound",
        "class of an abstention",
        "alpha",
        "no alpha",
        "counts",
        "n",
        "bound's n",
        "votes",
        "runner-up",
        "separate bounds",
    ],
)
def test_a_gap_that_does_not_follow_from_its_counts_is_not_believed(tmp_path, change):
    ids, shard = list(range(20)), tmp_path / "run" / "shards" / "0.npz"
    write(tmp_path / "run", ids)
    with np.load(shard) as arrays:
        stored = dict(arrays)
    assert (stored["gap"] == 0).any()
    np.savez(shard, **stored | {name: value(stored) for name, value in change.items()})
    with pytest.raises(ValueError, match=r"0\.npz: its gaps do not follow from its counts; delete it"):
        read_run(tmp_path / "run").results()
    np.savez(shard, **stored)
    read_run(tmp_path / "run").results()


def separate_gap(stored, alpha, runner_up=None):
    """Gaps of separate bounds at alpha, from half of the votes that are stored for the runner-up."""
    runner_up = stored["bound_runner_up"] // 2 if runner_up is None else runner_up
    return Evidence(stored["bound_votes"], stored["bound_n"], alpha, runner_up).bound_and_gap(Gaussian())[1]


@pytest.mark.parametrize(
    "change",
    [
        {"bound_runner_up": lambda a: a["bound_runner_up"] + 1},
        {"bound_runner_up": lambda a: a["bound_runner_up"] - 1},
        {"bound_runner_up": lambda a: a["bound_runner_up"] * 0 - 1},
        {"bound_runner_up": lambda a: a["bound_n"] - a["bound_votes"] + 1},
        {
            "bound_alpha": lambda a: a["bound_alpha"] * 2,
            "gap": lambda a: separate_gap(a, a["bound_alpha"] * 2, a["bound_runner_up"]),
        },
    ],
    ids=["more", "fewer", "negative", "more than are left", "alpha"],
)
def test_a_gap_of_separate_bounds_that_does_not_follow_is_not_believed(tmp_path, change):
    certify = dataclasses.replace(CONFIG.certify, bound="separate")
    write(tmp_path / "run", list(range(20)), config=dataclasses.replace(CONFIG, certify=certify))
    shard = tmp_path / "run" / "shards" / "0.npz"
    with np.load(shard) as arrays:
        stored = dict(arrays)
    assert (stored["bound_alpha"] == 0.0005).all() and (stored["gap"] > 0).all()
    np.savez(shard, **stored | {name: value(stored) for name, value in change.items()})
    with pytest.raises(ValueError, match=r"0\.npz: its gaps do not follow from its counts; delete it"):
        read_run(tmp_path / "run").results()
    np.savez(shard, **stored)
    read_run(tmp_path / "run").results()


@pytest.mark.parametrize(
    "forged",
    [
        lambda e: e._replace(alpha=10 * e.alpha),
        lambda e: e._replace(n=2 * e.n, runner_up=2 * e.n - e.votes),
        lambda e: e._replace(votes=e.n, runner_up=0 * e.n),
    ],
    ids=["a larger alpha", "more draws than n", "more votes than there were"],
)
def test_a_look_that_could_not_have_been_is_not_believed(tmp_path, forged):
    """Of sequential sampling; `p_lower` and gap do follow from the look that is forged."""
    config = dataclasses.replace(CONFIG, sampling=SequentialConfig(radii=(0.1,)))
    write(tmp_path / "run", list(range(20)), config=config)
    shard = tmp_path / "run" / "shards" / "0.npz"
    with np.load(shard) as arrays:
        stored = {name: value[arrays["gap"] > 0] if value.ndim else value for name, value in arrays.items()}
    evidence = Evidence(*(stored[f"bound_{name}"] for name in Evidence._fields))
    for look, message in ((evidence, None), (forged(evidence), r"0\.npz: its gaps do not follow from its counts")):
        p_lower, gap = look.bound_and_gap(Gaussian())
        columns = {f"bound_{name}": value for name, value in look._asdict().items()}
        np.savez(shard, **stored | columns | {"p_lower": p_lower, "gap": gap})
        with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
            read_run(tmp_path / "run").results()


def test_shards_come_in_the_order_of_numbers_and_lines_in_that_of_ids(tmp_path):
    # As text "100" < "20" < "9"; the second batch interleaves with the first.
    tsv = write(tmp_path / "run", [100, 101], [9, 102], [20])
    assert [int(shard["ids"][0]) for shard in read_run(tmp_path / "run").shards()] == [9, 20, 100]
    assert read_table(tsv)["idx"].tolist() == [9, 20, 100, 101, 102]


def test_a_finished_run_computes_nothing_again(tmp_path, finished):
    calls = []
    _certify(tmp_path / "run", progress=_record(calls))
    assert calls == [0, 2, 2, 2, 1]
    _assert_same(tmp_path / "run", finished)
    before, tsv = _written(tmp_path / "run"), (tmp_path / "run" / "results.tsv").read_bytes()
    calls.clear()
    _certify(tmp_path / "run", progress=_record(calls))
    assert calls == [7]
    assert _written(tmp_path / "run") == before
    assert (tmp_path / "run" / "results.tsv").read_bytes() == tsv


def test_only_what_is_missing_is_computed(tmp_path, finished):
    out = tmp_path / "run"
    _certify(out)
    before = _written(out)
    (out / "shards" / "6.npz").unlink()
    calls = []
    _certify(out, progress=_record(calls))
    assert calls == [5, 2]
    after = _written(out)
    assert {name for name in after if after[name] != before[name]} == {"6.npz"}
    _assert_same(out, finished)


def test_more_images_are_added_to_a_finished_run(tmp_path, finished):
    out, calls = tmp_path / "run", []
    _certify(out, select(_images(), skip=3))
    before = _written(out)
    assert len(read_table(out / "results.tsv")["idx"]) == 3
    _certify(out, progress=_record(calls))
    assert calls == [3, 2, 2]
    assert {name: _written(out)[name] for name in before} == before
    assert _without_time(out / "results.tsv") == _without_time(finished / "results.tsv")
    # Fewer images again: nothing is lost.
    calls.clear()
    _certify(out, select(_images(), max_images=2), progress=_record(calls))
    assert calls == [2]
    assert _without_time(out / "results.tsv") == _without_time(finished / "results.tsv")


def test_execution_settings_may_change_between_the_parts_of_a_run(tmp_path, finished):
    out = tmp_path / "run"
    _certify(out, select(_images(), max_images=3), batch_size=1)
    _certify(out, batch_size=4, devices=2)
    assert _without_time(out / "results.tsv") == _without_time(finished / "results.tsv")


def test_an_unbounded_search_can_be_continued(tmp_path):
    # Infinity is no JSON number.
    config = dataclasses.replace(CONFIG, isotropic=IsotropicConfig(theta_max=float("inf")))
    for ids in ([0], [1]):
        write(tmp_path / "run", ids, config=config)
    run = read_run(tmp_path / "run")
    assert run.done() == {0, 1} and run.config == config


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (RunConfig(theta=0.25, certify=_TOY.certify), "theta is 0.5 there, 0.25 here"),
        (RunConfig(theta=0.5, certify=CertifyConfig(10, 100, 0.01)), "certify.n is 200 there, 100 here"),
        (
            RunConfig(theta=0.5, certify=CertifyConfig(10, 200, 0.01, "separate")),
            "certify.bound is None there, separate",
        ),
        (RunConfig(theta=0.5, certify=_TOY.certify, seed=1), "seed is 0 there, 1 here"),
        (RunConfig(norm="l1", theta=0.5, certify=_TOY.certify), "norm is l2 there, l1 here"),
        (RunConfig(theta=0.5, certify=_TOY.certify, method="isotropic"), "isotropic.steps is None there"),
    ],
    ids=["theta", "n", "bound", "seed", "norm", "method"],
)
def test_other_settings_are_refused_by_name(finished, config, field):
    before = _contents(finished)
    with pytest.raises(ValueError, match=rf"was made with other settings \((.*; )?{field}"):
        _certify(finished, config=config)
    assert _contents(finished) == before


def test_other_data_and_other_classifiers_are_refused(finished):
    images = _images()
    images.images[3, 0, 0, 0] = 0.123
    with pytest.raises(ValueError, match=r"other settings \(data\.fingerprint is"):
        _certify(finished, Dataset("toy", images.ids, images.images, images.labels, 3))
    other = from_function(_brightness, jnp.ones((4, 3)), num_classes=3)
    with pytest.raises(ValueError, match=r"other settings \(classifier is"):
        certify_dataset(other, _images(), _TOY, out=finished)


def test_a_refused_run_is_not_held(tmp_path):
    write(tmp_path / "run", [0])
    try:
        write(tmp_path / "run", [1], config=dataclasses.replace(CONFIG, norm="l1"))
    except ValueError as error:
        # A debugger or a notebook keeps the traceback, and with it every frame.
        kept = error
        write(tmp_path / "run", [1])
    assert "norm" in str(kept)
    assert read_run(tmp_path / "run").done() == {0, 1}


@pytest.mark.parametrize("keep", [0, 10, 200, -1])
def test_a_truncated_shard_is_named_and_the_rest_is_kept(tmp_path, finished, keep):
    out = tmp_path / "run"
    _certify(out)
    shard = out / "shards" / "6.npz"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"6\.npz: truncated or not a shard .*; delete it to compute it again"):
        _certify(out)
    shard.unlink()
    _certify(out)
    _assert_same(out, finished)


def _npy(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text("hello"),
        lambda path: np.savez(path, ids=np.arange(2)),
        lambda path: np.savez(path, ids=np.array([{}], object)),
        _npy,
    ],
    ids=["text", "other arrays", "pickle", "npy"],
)
def test_a_file_that_is_no_shard_is_named(tmp_path, damage):
    write(tmp_path / "run", [0])
    damage(tmp_path / "run" / "shards" / "5.npz")
    with pytest.raises(ValueError, match=r"5\.npz: truncated or not a shard"):
        read_run(tmp_path / "run").done()


def test_shards_of_others_are_named(tmp_path):
    write(tmp_path / "run", [0])
    write(tmp_path / "other", [5], config=dataclasses.replace(CONFIG, norm="l1"))
    foreign = (tmp_path / "other" / "shards" / "5.npz").read_bytes()
    (tmp_path / "run" / "shards" / "5.npz").write_bytes(foreign)
    with pytest.raises(ValueError, match=r"5\.npz: this shard belongs to a run with other settings"):
        write(tmp_path / "run", [6])
    (tmp_path / "run" / "shards" / "5.npz").rename(tmp_path / "run" / "shards" / "copy of 5.npz")
    with pytest.raises(ValueError, match=r"copy of 5\.npz: not a shard of this run"):
        write(tmp_path / "run", [6])


def test_a_foreign_directory_or_file_is_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(ValueError, match=r"thesis is not a run directory: it holds chapter\.tex and no config\.json"):
        write(tmp_path / "thesis", [0])
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]
    with pytest.raises(ValueError, match=r"chapter\.tex is a file, not a run directory"):
        write(tmp_path / "thesis" / "chapter.tex", [0])
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "x"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"settings": 3}', '{"settings": [1]}', "null", "\x00"])
def test_a_damaged_config_is_named(tmp_path, text):
    write(tmp_path / "run", [0])
    (tmp_path / "run" / "config.json").write_text(text)
    for use in (lambda: write(tmp_path / "run", [1]), lambda: read_run(tmp_path / "run")):
        with pytest.raises(ValueError, match=r"config\.json: not the settings of a run") as error:
            use()
        assert "\n" not in str(error.value)


def test_a_run_is_open_once_in_a_process(tmp_path):
    with open_run(tmp_path / "run", settings(), {}):
        with pytest.raises(ValueError, match="another process is writing to"):
            write(tmp_path / "run", [0])
        assert read_run(tmp_path / "run").done() == set()
    write(tmp_path / "run", [0])


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    write(tmp_path / "run", [0])
    hold = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True)"
    hold += "; input()"
    command = [sys.executable, "-c", hold, str(tmp_path / "run" / "lock-0-of-1")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"held\n"
            with pytest.raises(ValueError, match=r"another process is writing to .*run"):
                write(tmp_path / "run", [1])
        finally:
            process.kill()
    write(tmp_path / "run", [1])
    assert read_run(tmp_path / "run").done() == {0, 1}


def test_an_interruption_between_batches_changes_nothing(tmp_path, finished):
    class Interruption(Exception):
        pass

    for _ in range(3):
        with pytest.raises(Interruption):
            # The first call reports what was finished before.
            _certify(tmp_path / "run", progress=_after(1, Interruption))
    assert sorted(_written(tmp_path / "run")) == ["0.npz", "12.npz", "6.npz"]
    assert not (tmp_path / "run" / "results.tsv").exists()
    _certify(tmp_path / "run")
    _assert_same(tmp_path / "run", finished)


def _after(calls, error):
    left = [calls]

    def progress(stage, images):
        left[0] -= 1
        if left[0] < 0:
            raise error

    return progress


class _Killed(BaseException):
    pass


def test_dying_in_any_file_operation_changes_nothing(tmp_path, finished, monkeypatch):
    kind = type(epath.Path(tmp_path))
    real = {name: getattr(kind, name) for name in ("mkdir", "write_bytes", "replace")}
    left = [0]

    def dying(name):
        def operation(path, *arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                if name == "write_bytes":
                    real[name](path, arguments[0][: len(arguments[0]) // 2])
                raise _Killed
            return real[name](path, *arguments, **options)

        return operation

    for name in real:
        monkeypatch.setattr(kind, name, dying(name))
    deaths = 0
    for moment in range(1, 100):
        out = tmp_path / str(moment)
        left[0] = moment
        try:
            _certify(out)
        except _Killed:
            deaths += 1
        else:
            break
        left[0] = 10**9
        before = _written(out)
        _certify(out)
        assert {name: _written(out)[name] for name in before} == before
        _assert_same(out, finished)
    # A directory, then settings, four shards and the table: each written and renamed.
    assert deaths >= 1 + 2 * 6


@contextlib.contextmanager
def _files_of_at_most(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_loses_no_finished_batch(tmp_path, finished):
    out = tmp_path / "run"

    def fill(stage, images):
        if (out / "shards" / "0.npz").exists():
            (out / "shards" / "6.npz.0.tmp").symlink_to("/dev/full")

    with pytest.raises(OSError, match=r"cannot write .*6\.npz: No space left on device; what was finished"):
        _certify(out, progress=fill)
    before = _written(out)
    assert list(before) == ["0.npz"]
    _certify(out)
    assert _written(out)["0.npz"] == before["0.npz"]
    _assert_same(out, finished)


@pytest.mark.parametrize(("size", "file"), [(0, "config.json"), (1500, r"0\.npz")])
def test_a_write_that_stops_half_way_leaves_no_shard(tmp_path, finished, size, file):
    out = tmp_path / "run"
    with _files_of_at_most(size), pytest.raises(OSError, match=f"cannot write .*{file}: File too large"):
        _certify(out)
    assert not _written(out)
    _certify(out)
    _assert_same(out, finished)


def test_a_table_that_cannot_be_written_keeps_the_old_one(tmp_path):
    tsv = write(tmp_path / "run", [0])
    old = tsv.read_bytes()
    with open_run(tmp_path / "run", settings(), {}) as run:
        run.write_shard(arrays([1, 2, 3]))
        with (
            _files_of_at_most(len(old) + 5),
            pytest.raises(OSError, match=r"cannot write .*results_before_memory\.tsv"),
        ):
            run.export()
        assert tsv.read_bytes() == old
        run.export()
    assert read_table(tsv)["idx"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("damage", ["copied", "renamed", "shortened"])
def test_shards_that_were_moved_about_are_refused(tmp_path, damage):
    write(tmp_path / "run", [0, 1], [2, 3])
    shards = tmp_path / "run" / "shards"
    if damage == "copied":
        (shards / "77.npz").write_bytes((shards / "0.npz").read_bytes())
    elif damage == "renamed":
        (shards / "0.npz").rename(shards / "77.npz")
    else:
        with np.load(shards / "0.npz") as arrays:
            changed = {name: arrays[name] for name in arrays.files}
        np.savez(shards / "0.npz", **changed | {"labels": changed["labels"][:1]})
    with pytest.raises(ValueError, match=r"(77|0)\.npz: renamed, copied or damaged"):
        read_run(tmp_path / "run").export()
