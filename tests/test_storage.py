"""Run directories in a bucket: no folders, no file locks, operations that fail at random."""

import contextlib
import threading
import time

import numpy as np
import pytest
from etils import epath
from etils.epath import gpath

from ancer_jax import load_dataset, load_memory, storage
from ancer_jax.runs.directory import read_run
from ancer_jax.storage import locked, locked_shard, read_arrays, write_file
from tests import bucket
from tests.toy import CONFIG, SEARCH, run

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def gs(tmp_path, monkeypatch):
    """Sets how often an operation on `gs://` fails."""
    bucket.install()
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setenv(bucket.FOLDER, str(tmp_path))
    for name, value in (("BEAT", 0.05), ("PATIENCE", 0.5), ("_SETTLE", 0.02)):
        monkeypatch.setattr(storage, name, value)
    failing = lambda rate: monkeypatch.setenv(bucket.FAILURES, str(rate))
    failing(0)
    return failing


def test_a_file_is_whole_or_not_there(gs):
    file = epath.Path("gs://b/run/x.npz")
    write_file(file, lambda opened: np.savez(opened, a=np.arange(3), b=np.ones(2)))
    assert list(read_arrays(file, ["a"])["a"]) == [0, 1, 2]
    assert [path.name for path in file.parent.iterdir()] == ["x.npz"]
    gs(1)
    with pytest.raises(OSError, match=r"cannot write gs://b/run/x\.npz: 503 Service Unavailable; what was finished"):
        write_file(file, b"torn")
    gs(0)
    assert list(read_arrays(file, ["a"])["a"]) == [0, 1, 2]


def test_a_run_in_a_bucket_is_that_on_a_disk(gs, tmp_path):
    config = CONFIG.__class__(method="isotropic", theta=0.3, certify=CONFIG.certify, **SEARCH)
    expected, found = run(tmp_path / "disk", config), run("gs://b/run", config)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
    names = {path.name for path in epath.Path("gs://b/run").iterdir()}
    assert names == {"config.json", "shards", "results.tsv", "memory.npz", "results_before_memory.tsv"}
    assert len(load_memory("gs://b/run")) == 5


@pytest.mark.filterwarnings("default:.*is there. waiting")
def test_a_bucket_that_fails_at_random_loses_and_doubles_nothing(gs, tmp_path, monkeypatch):
    monkeypatch.setattr(bucket.Bucket, "random", bucket.random.Random(0))
    config = CONFIG.__class__(method="isotropic", theta=0.3, certify=CONFIG.certify, **SEARCH)
    expected, failures = run(tmp_path / "disk", config, batch_size=1, devices=1), 0
    for number in range(2):
        out = f"gs://b/run{number}"
        done = set()
        while True:
            gs(0.002)
            try:
                found = run(out, config, batch_size=1, devices=1)
                break
            except OSError as error:
                assert "503" in str(error) or "does not exist" in str(error)  # etils calls an error "not there"
                failures += 1
            gs(0)
            if (epath.Path(out) / "config.json").exists():
                assert read_run(out).done() >= done
                done = read_run(out).done()
        gs(0)
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])
        for name in ("results.tsv", "results_before_memory.tsv"):
            lines = [
                [row.split("\t")[:5] + row.split("\t")[6:] for row in (where / name).read_text().splitlines()]
                for where in (epath.Path(out), tmp_path / "disk")
            ]
            assert lines[0] == lines[1]
    assert failures >= 3


def test_what_cannot_be_read_is_not_called_damaged(gs, tmp_path):
    config = CONFIG.__class__(method="isotropic", theta=0.3, certify=CONFIG.certify, **SEARCH)
    run("gs://b/run", config)
    before = {path.name for path in epath.Path("gs://b/run").iterdir()}
    gs(1)
    with pytest.raises(OSError, match="503 Service Unavailable"):
        read_run("gs://b/run")
    gs(0)
    opened = read_run("gs://b/run")
    gs(0.2)
    for _ in range(30):
        for read in (opened.done, opened.read_memory, lambda: opened.results()[1]):
            with contextlib.suppress(OSError):
                assert read() is not None
    gs(0)
    assert {path.name for path in epath.Path("gs://b/run").iterdir()} == before


def test_a_group_of_another_size_is_refused(tmp_path):
    with locked_shard(epath.Path(tmp_path), 1, 2), locked_shard(epath.Path(tmp_path), 0, 2):
        with pytest.raises(ValueError, match="another process is writing"):
            locked_shard(epath.Path(tmp_path), 0, 1).__enter__()
        with pytest.raises(ValueError, match="another process is writing"):
            locked_shard(epath.Path(tmp_path), 2, 3).__enter__()
    with locked_shard(epath.Path(tmp_path), 0, 1):
        pass


def test_a_second_writer_is_refused_while_the_first_lives(gs):
    folder = epath.Path("gs://b/run")
    with locked(folder, "lock") as still_held:
        time.sleep(0.2)
        with pytest.raises(ValueError, match="another process is writing to gs://b/run"), pytest.warns(match="waiting"):
            locked(folder, "lock").__enter__()
        still_held()
    assert not (folder / "lock").exists()
    with locked(folder, "lock"):
        pass


def test_a_stale_lock_is_taken_over_and_its_holder_told(gs, monkeypatch):
    folder = epath.Path("gs://b/run")
    monkeypatch.setattr(storage, "BEAT", 1.0)  # the first holder is too slow
    with locked(folder, "lock") as still_held:
        monkeypatch.setattr(storage, "BEAT", 0.05)
        with (
            pytest.warns(match=r"gs://b/run/lock is there: waiting up to 0\.5 s"),
            locked(folder, "lock") as second_holds,
        ):
            time.sleep(1)
            second_holds()
            with pytest.raises(ValueError, match="another process has taken over gs://b/run"):
                still_held()
            assert (folder / "lock").exists()


@pytest.mark.filterwarnings("default:.*is there. waiting")
def test_of_several_that_come_at_once_one_gets_the_lock(gs):
    folder, got, ready = epath.Path("gs://b/run"), [], threading.Barrier(5)

    def come():
        ready.wait()
        try:
            with locked(folder, "lock"):
                got.append(True)
                time.sleep(0.5)
        except ValueError:
            got.append(False)

    threads = [threading.Thread(target=come) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 4 + [True]


def test_data_come_from_a_bucket(gs):
    images = load_dataset("fashion-mnist-subset")
    with epath.Path("gs://b/images.npz").open("wb") as file:
        np.savez(file, images=images.images[:3], labels=images.labels[:3], ids=images.ids[:3])
    found = load_dataset("gs://b/images.npz")
    np.testing.assert_array_equal(found.images, images.images[:3])
    assert found.ids.tolist() == images.ids[:3].tolist()
