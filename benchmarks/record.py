"""What all benchmarks share: their command line, and how they store their raw output.

Each script stores one JSON file in benchmarks/results/ (or in $BENCH_RESULTS). It says when, by which command, from
which seed, on what machine and with which versions its numbers were made.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
from typing import Any

import tabulate

RESULTS = pathlib.Path(os.environ.get("BENCH_RESULTS", pathlib.Path(__file__).parent / "results"))
# The radii in the tables of the literature.
RADII = {"l2": (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0), "l1": (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)}
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scipy")


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with the flag `--small`, a rehearsal in tiny sizes that shows no more than that a script runs.

    Args:
      description: the docstring of the script.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--small", action="store_true", help="tiny sizes: a rehearsal, stored as small-<name>.json")
    return made


def save(name: str, results: Any, *, seed: int | list[int], small: bool = False) -> None:
    """Write `results/<name>.json`, or `results/small-<name>.json` of a rehearsal; `results` are JSON values."""
    arguments = [pathlib.Path(a).name if os.path.isabs(a) else a for a in sys.argv[1:]]
    document = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python", f"benchmarks/{pathlib.Path(sys.argv[0]).name}", *arguments]),
        "seed": seed,
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
        "results": results,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{'small-' if small else ''}{name}.json"
    path.write_text(json.dumps(document, indent=2) + "\n")
    print(f"raw output: {os.path.relpath(path)}")


def machine() -> dict[str, Any]:
    """CPU model, cores that this process may use, memory, and JAX's device."""
    import jax  # here, so that the parent process of benchmarks/memory.py stays small

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
