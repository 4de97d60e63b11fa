"""The command line of the benchmarks, from the top of the repository.

python -m benchmarks list
python -m benchmarks run NAME [--small] [flags; --help shows them]
python -m benchmarks render [--check]
"""

import argparse
import importlib
import pathlib
import sys
from types import ModuleType

HERE = pathlib.Path(__file__).parent
FOLDERS = ("claims", "speed", "peers", "data")


def names() -> dict[str, str]:
    """For each benchmark the name of its module."""
    paths = [path for folder in FOLDERS for path in sorted((HERE / folder).glob("[!_]*.py"))]
    return {path.stem: f"benchmarks.{path.parent.name}.{path.stem}" for path in paths}


def modules() -> dict[str, ModuleType]:
    """All benchmarks, in the order of the table."""
    return {name: importlib.import_module(module) for name, module in names().items()}


def main() -> int:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="all benchmarks, and how long they take")
    run = commands.add_parser("run", help="one benchmark", add_help=False)
    run.add_argument("name", choices=[*names()])
    render = commands.add_parser("render", help="fill the figures of all raw outputs into README and guides")
    render.add_argument("--check", action="store_true", help="change nothing; exit status 1 if something would change")
    options, rest = parser.parse_known_args()
    if options.command == "run":
        module = importlib.import_module(names()[options.name])
        return module.BENCHMARK.run(rest, name=options.name, description=module.__doc__)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "list":
        for name, module in modules().items():
            print(f"{name:20} {module.BENCHMARK.claim} ({module.BENCHMARK.takes})")
        return 0
    from benchmarks import render as rendering

    return rendering.render({name: module.BENCHMARK for name, module in modules().items()}, check=options.check)


if __name__ == "__main__":
    sys.exit(main())
