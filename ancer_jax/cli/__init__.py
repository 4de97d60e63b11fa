"""The command line: flags to frozen configs, progress bars, printed tables; nothing else."""

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

import jax
import tyro

from ancer_jax.cli.certify import Certify
from ancer_jax.cli.convert import Convert
from ancer_jax.cli.demo import Demo
from ancer_jax.cli.report import Report
from ancer_jax.cli.train import Train

_OUT_OF_MEMORY = "the device's memory is too small: ask for a smaller --batch-size or --chunk, or for fewer samples"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `ancer-jax`: bad input gets one line and exit status 2."""
    commands = {"demo": Demo, "certify": Certify, "train": Train, "convert": Convert, "report": Report}
    command = tyro.extras.subcommand_cli_from_dict(commands, prog="ancer-jax", args=arguments)
    previous = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"ancer-jax: warning: {message}", file=sys.stderr)
            command.run()
    except (ValueError, OSError, ImportError) as error:
        _fail(error)
    except jax.errors.JaxRuntimeError as error:
        line = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" in line:
            _fail(f"{_OUT_OF_MEMORY} ({line})")
        elif jax.distributed.is_initialized():
            _fail(f"another process has stopped, or cannot be reached ({line})")
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _fail(why) -> NoReturn:
    print(f"ancer-jax: error: {why}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():  # an orderly end would wait for the other processes
        os._exit(2)
    raise SystemExit(2) from None


def _stop(number: int, _) -> None:
    """Leave at once: what is finished is stored, and an orderly exit under running XLA threads can crash or hang."""
    print("\nancer-jax: stopped; start the same command again to continue", file=sys.stderr, flush=True)
    os._exit(128 + number)
