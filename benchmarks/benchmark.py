"""What a benchmark is: its claim, how it is run, and how its raw output is read.

A module of `benchmarks/claims`, `speed`, `peers` or `data` has one, `BENCHMARK`, and bears its name. `measure` makes
results (JSON values). The runner stores them as the raw output `results/<name>.json`, with date, command, seed, machine
and versions. Everything that is printed or written about them is computed from that file: `outputs` gives the lines of
the table of measurements, with their bars, and `figures` the texts that `python -m benchmarks render` fills into the
guides.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import tabulate

TOP = pathlib.Path(__file__).parents[1]
RESULTS = pathlib.Path(os.environ.get("BENCH_RESULTS", TOP / "benchmarks" / "results"))
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scipy")

Found = Mapping[str, Any]  # a raw output: date, command, seed, machine, versions, results


class Line(NamedTuple):
    """A line of the table of measurements; `holds` says whether its bar is met, and is None where there is no bar."""

    what: str
    figure: str
    bar: str = ""
    holds: bool | None = None


Lines = Iterator[Line]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark.

    Attributes:
      claim: what it shows, in one sentence.
      takes: how long, on two CPU cores.
      measure: gets the options and yields the results so far; the last ones are kept. It may set `options.output` to go
        on to another raw output.
      sizes: a flag for each size, with its value for `--small` and its usual value. A list is a flag that takes several
        values.
      arguments: adds other flags.
      small_is_judged: whether the bars mean something with `--small`.
      outputs: for each raw output its lines. A run makes the first, unless `--as` names another.
      figures: texts for the guides, each computed from raw outputs (`load`).
    """

    claim: str
    takes: str
    measure: Callable[[argparse.Namespace], Iterable[Any]]
    sizes: Mapping[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    arguments: Callable[[argparse.ArgumentParser], object] | None = None
    small_is_judged: bool = True
    outputs: Mapping[str, Callable[[Found], Lines]] = dataclasses.field(default_factory=dict)
    figures: Mapping[str, Callable[[], str]] = dataclasses.field(default_factory=dict)

    def run(self, arguments: list[str], *, name: str, description: str | None) -> int:
        """Measure, store, show all lines; 1 if a bar is missed."""
        parser = argparse.ArgumentParser(
            prog=f"python -m benchmarks run {name}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--small", action="store_true", help="tiny sizes: a rehearsal, stored as small-<name>.json")
        if "seeds" not in self.sizes:
            parser.add_argument("--seed", type=int, default=0)
        parser.add_argument(
            "--as", dest="output", default=next(iter(self.outputs), name), help="name of the raw output"
        )
        for flag, values in self.sizes.items():
            usual = values[1]
            kind, many = (type(usual[0]), "+") if isinstance(usual, list) else (type(usual), None)
            parser.add_argument(f"--{flag.replace('_', '-')}", type=kind, nargs=many, help=f"usually {usual}")
        if self.arguments:
            self.arguments(parser)
        options = parser.parse_args(arguments)
        for flag, (small, usual) in self.sizes.items():
            if getattr(options, flag) is None:
                setattr(options, flag, small if options.small else usual)
        found = {}
        for results in self.measure(options):  # which may go on to another raw output
            seed = options.seeds if "seeds" in self.sizes else options.seed
            found[options.output] = save(stored(options, ".json"), results, seed=seed)
        if not found:
            return 0
        first = next(iter(self.outputs.values()))
        lines = [line for output, one in found.items() for line in self.outputs.get(output, first)(one)]
        met = {None: "", True: "yes", False: "NO"}
        rows = [[*line[:3], met[line.holds]] for line in lines]
        print(tabulate.tabulate(rows, ["what", "figure", "bar", "met"], maxcolwidths=[60, 60, 20, None]), flush=True)
        missed = sum(line.holds is False for line in lines)
        if options.small and not self.small_is_judged:
            print("a rehearsal: its bars mean nothing")
            return 0
        print(f"MISSED {missed} BARS" if missed else "passed")
        return 1 if missed else 0


def stored(options: argparse.Namespace, ending: str) -> pathlib.Path:
    """The file of a raw output: `results/<output><ending>`, or `results/small-<output><ending>` of a rehearsal."""
    return RESULTS / f"{'small-' if options.small else ''}{options.output}{ending}"


def save(path: pathlib.Path, results: Any, *, seed: int | list[int]) -> Found:
    """Write a raw output."""
    arguments = [pathlib.Path(a).name if os.path.isabs(a) else a for a in sys.argv[1:]]
    document = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python -m benchmarks", *arguments]),
        "seed": seed,
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
        "results": results,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")
    print(f"raw output: {os.path.relpath(path)}", flush=True)
    return json.loads(path.read_text())


@functools.cache
def load(name: str) -> Found:
    """A raw output that is committed."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def machine() -> dict[str, Any]:
    """CPU model, cores that this process may use, memory, and JAX's device."""
    import jax  # here, so that a process that only starts others stays small

    device = jax.local_devices()[0]
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "device": "cpu" if device.platform == "cpu" else device.device_kind,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print a list of flat dictionaries as a table."""
    print(tabulate.tabulate(rows, headers="keys", floatfmt=".4g"), flush=True)


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    lines = [list(header)]
    lines += [["---"] * len(lines[0]), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
