"""What all commands of `ancer-jax` share: syntax errors, signals, several processes, the compilation cache."""

import os
import signal
import subprocess
import sys

import jax
import pytest

import ancer_jax
from ancer_jax import cli
from tests.cli.commands import error_line, toy

pytestmark = pytest.mark.usefixtures("here", "quick_compilation")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_says_how_to_continue(here, capsys, monkeypatch, number):
    def left(status):
        raise SystemExit(status)

    before = signal.getsignal(number)
    monkeypatch.setattr(os, "_exit", left)
    monkeypatch.setattr(cli.certify, "certify_dataset", lambda *_, **__: signal.raise_signal(number))
    with pytest.raises(SystemExit) as stop:
        cli.main(toy())
    assert stop.value.code == 128 + number
    assert capsys.readouterr().err == "\nancer-jax: stopped; start the same command again to continue\n"
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["unknown"], ["certify", "--nonsense", "1"], ["certify", "--norm", "l3"], ["certify", "--n", "many"]),
        *(["certify", "--method", "best"], ["certify", "--split", "validation"], ["certify", "--guard", "maybe"]),
        *(["certify", "--method", "shared"], ["certify", "--preset", "reference"]),  # names of before
    ],
    ids=" ".join,
)
def test_syntax_errors_exit_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator", "host:1"], "--coordinator, --processes and --process need --multihost"),
        (
            ["--multihost", "--coordinator", "host", "--processes", "2", "--process", "0"],
            "must be host:port, got 'host'",
        ),
        # What JAX says depends on whether it is in use already.
        (["--multihost", "--coordinator", "host:1", "--processes", "2", "--process", "2"], "--multihost: "),
        (["--multihost", "--processes", "2", "--process", "0"], "--multihost: "),
    ],
    ids=str,
)
def test_processes_that_are_not_named_well_are_one_line(here, capsys, flags, message):
    assert message in error_line(capsys, toy(*flags))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["certify", "--n", "1e5"], "error: --n: invalid literal for int() with base 10: '1e5'"),
        (["certify", "--theta-max", "x"], "error: --theta-max: no type matching {None}|FLOAT could be instantiated"),
        (["report", "run", "--orders", "1.5"], "error: --orders: invalid literal for int() with base 10: '1.5'"),
    ],
    ids=str,
)
def test_values_of_another_type_are_one_line(capsys, arguments, message):
    assert message in error_line(capsys, arguments)


def test_the_version_is_that_of_the_package(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"ancer-jax {ancer_jax.__version__}\n"


def test_help_breaks_lines_only_where_they_are_full(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    for command, text in (
        ("certify", "(prepared TensorFlow data set); an npz file (images, labels[, ids]); or a folder of idx files"),
        ("certify", "(or $JAX_COMPILATION_CACHE_DIR), so that starting again is quick."),
        ("report", "RUN [RUN ...]  Run directories, or TSV files"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
        assert text in capsys.readouterr().out


def test_a_device_that_is_too_small_is_one_line(monkeypatch, capsys):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 bytes.\nmore")

    monkeypatch.setattr(cli.certify, "certify_dataset", fail)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["certify", "--out", "run"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].endswith("(RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 bytes.)")
    assert "a smaller --batch-size or --chunk" in error[-1]


@pytest.mark.parametrize("kept", [True, False])
def test_compiled_programs_are_kept_in_the_users_cache_folder(tmp_path, kept):
    code = f"from ancer_jax.cli.runtime import Runtime; Runtime({kept}).start(survive=True)\n"
    code += "import jax; jax.jit(lambda x: x + 1)(1.0)"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert any((tmp_path / "cache").rglob("*-cache")) == kept
