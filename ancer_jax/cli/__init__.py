"""The command line: flags to frozen configs, progress bars, printed tables; nothing else."""

import ast
import contextlib
import dataclasses
import functools
import importlib.metadata
import inspect
import io
import itertools
import os
import re
import signal
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import tyro

from ancer_jax._messages import first_line
from ancer_jax.cli.certify import Certify
from ancer_jax.cli.convert import Convert
from ancer_jax.cli.demo import Demo
from ancer_jax.cli.fetch import Fetch
from ancer_jax.cli.learn import LearnTheta
from ancer_jax.cli.report import Report
from ancer_jax.cli.runtime import Runtime
from ancer_jax.cli.train import Train

# Commands that go on where an earlier call was stopped.
_RESUMED = (Certify, Demo, Train)
_OUT_OF_MEMORY = "the device's memory is too small: ask for a smaller --batch-size or --chunk, or for fewer samples"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `ancer-jax`: bad input gets one line and exit status 2."""
    if (sys.argv[1:] if arguments is None else [*arguments]) == ["--version"]:
        print(f"ancer-jax {importlib.metadata.version('ancer-jax')}")
        return
    command = _parse(arguments)
    hint = "; start the same command again to continue" if isinstance(command, _RESUMED) else ""
    stop = functools.partial(_stop, hint)
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"ancer-jax: warning: {message}", file=sys.stderr)
            command.run()
    except BrokenPipeError:  # as of `ancer-jax report RUN | head`: nobody reads what would be written at exit, either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, ImportError) as error:
        _fail(error)
    except jax.errors.JaxRuntimeError as error:
        line = first_line(error)
        if "RESOURCE_EXHAUSTED" in line:
            _fail(f"{_OUT_OF_MEMORY} ({line})")
        elif jax.distributed.is_initialized():
            _fail(f"another process has stopped, or cannot be reached ({line})")
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _parse(arguments: Sequence[str] | None) -> Any:
    """The command with its flags. A bad value is reported in one line instead of the box that tyro draws."""
    commands = {"demo": Demo, "certify": Certify, "fetch": Fetch, "train": Train, "learn-theta": LearnTheta}
    commands |= {"convert": Convert, "report": Report}
    for flags in (*commands.values(), Runtime):
        with contextlib.suppress(OSError):  # there may be no source; tyro has no descriptions then, either
            _join_lines(flags)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            command = tyro.extras.subcommand_cli_from_dict(commands, prog="ancer-jax", args=arguments)
    except SystemExit:
        lines = [line.strip(" │|") for line in re.sub(r"\x1b\[[\d;]*m", "", box.getvalue()).splitlines()]  # no colours
        value_error = itertools.dropwhile(lambda line: not line.startswith("Error parsing "), lines)
        if line := " ".join(itertools.takewhile(lambda line: line.strip("─-"), value_error)):
            _fail(line.removeprefix("Error parsing "))
        print(box.getvalue(), end="", file=sys.stderr)
        raise
    print(box.getvalue(), end="", file=sys.stderr)
    return command


def _join_lines(flags: type) -> None:
    """Join the lines of each flag's description: tyro would keep these breaks and add its own."""
    (source,) = ast.parse(inspect.getsource(flags)).body
    assert isinstance(source, ast.ClassDef)
    fields = {field.name: field for field in dataclasses.fields(flags)}
    for field, text in itertools.pairwise(source.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(description))):
                fields[name].metadata = types.MappingProxyType({"help": " ".join(description.split())})


def _fail(why) -> NoReturn:
    print(f"ancer-jax: error: {why}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():  # an orderly end would wait for the other processes
        os._exit(2)
    raise SystemExit(2) from None


def _stop(hint: str, number: int, _) -> None:
    """Leave at once: what is finished is stored, and an orderly exit under running XLA threads can crash or hang."""
    print(f"\nancer-jax: stopped{hint}", file=sys.stderr, flush=True)
    os._exit(128 + number)
