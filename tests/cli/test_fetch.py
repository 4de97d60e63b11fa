"""`ancer-jax fetch`: what it prints; tests/data has the fetching."""

import pytest

from ancer_jax import cli
from tests.cifar import NAMES, NPM, WEB, World, contents
from tests.cli.commands import error_line

pytestmark = pytest.mark.usefixtures("here", "quick_compilation")


@pytest.fixture
def world(tmp_path, monkeypatch):
    world = World(tmp_path, monkeypatch)
    yield world
    world.close()


def test_fetch_then_certify(world, here, capsys):
    cli.main(["fetch", "cifar10", "data"])
    printed = capsys.readouterr()
    assert {file.name: file.read_bytes() for file in (here / "data").iterdir()} == contents()
    first, following = printed.out.splitlines()
    assert first == "data: cifar10, fetched, with the checksums of the original"
    assert following.startswith("next: ancer-jax certify --data data --classifier ")
    assert f"downloading {WEB}" in printed.err and "100%" in printed.err
    cli.main(["fetch", "cifar10", "data"])
    assert capsys.readouterr() == (f"data: cifar10, all files are there already\n{following}\n", "")


def test_an_archive_is_enough(world, here, capsys):
    (world.site / WEB).unlink()
    cli.main(["fetch", "cifar10", "data", "--archive", str(world.registry / NPM)])
    assert sorted(file.name for file in (here / "data").iterdir()) == sorted(NAMES)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar11", "data"], "no data set 'cifar11' can be fetched, only cifar10"),
        (["cifar10", "toy.npz"], "toy.npz is a file, not a folder"),
        (["cifar10", "data", "--archive", "toy.npz"], "toy.npz is neither cifar-10-binary.tar.gz"),
        (["cifar10", "data", "--archive", "nothing"], "nothing: there is no such file"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert message in error_line(capsys, ["fetch", *arguments])


def test_no_network_is_one_line_after_the_progress(world, capsys):
    (world.site / WEB).unlink()
    (world.registry / NPM).unlink()
    with pytest.raises(SystemExit) as stop:
        cli.main(["fetch", "cifar10", "data"])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ancer-jax: error: cifar10 cannot be fetched (") and last.endswith("with --archive")
    assert "registry" not in last
