"""The demo from start to table, for both norms: how long it takes, and the order of the methods.

Runs `ancer-jax demo` for both norms in an empty folder and stores all that it prints, also as
`results/demo_<norm>.txt`. The best fixed theta is chosen with one seed (the runs try-*) and certified with another
(fixed-*). The mean proxy radius must rise from the best fixed theta to isotropic noise to ANCER.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from ancer_jax.metrics import round_down
from ancer_jax.report import load_results
from benchmarks.benchmark import Benchmark, Found, Line, Lines, load, markdown, stored
from benchmarks.figures import WITHOUT_LEAKY

LIMIT_SECONDS = 300


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """l2, then l1."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for norm in ("l2", "l1"):
            start = time.perf_counter()
            sizes = ["--max", str(options.images), "--n", str(options.n)]
            command = [sys.executable, "-m", "ancer_jax.cli", "demo", "--norm", norm, *sizes]
            printed = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout
            print(printed, flush=True)
            seconds = time.perf_counter() - start
            runs = [p for p in sorted(pathlib.Path(folder, f"demo-{norm}").iterdir()) if p.is_dir()]
            mean = {run.name: load_results(run).mean_proxy_radius for run in runs}
            rows.append({"norm": norm, "seconds": seconds, "mean_proxy_radius": mean, "printed": printed})
            yield rows
            path = stored(options, f"_{norm}.txt")
            path.write_text(printed)


def lines(found: Found) -> Lines:
    for r in found["results"]:
        mean = r["mean_proxy_radius"]
        fixed = max(value for name, value in mean.items() if name.startswith("fixed"))
        figure = " / ".join(round_down(value, 3) for value in (mean["ancer"], mean["isotropic"], fixed))
        falling = mean["ancer"] > mean["isotropic"] > fixed
        yield Line(f"demo, {r['norm']}: mean proxy radius, ANCER / isotropic / best fixed", figure, "falling", falling)
        what = f"demo, {r['norm']}: seconds from start to table"
        yield Line(what, f"{r['seconds']:.0f}", f"<= {LIMIT_SECONDS}", r["seconds"] <= LIMIT_SECONDS)


def printed_cells(printed: str) -> dict[str, dict[str, str]]:
    """The tables that `ancer-jax report` prints: for each run its cells by column, the first of several."""
    runs: dict[str, dict[str, str]] = {}
    header: list[str] = []
    for line in printed.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "run":
            header = cells
        elif line.startswith("| "):
            runs[cells[0]] = dict(zip(header, cells, strict=True)) | runs.get(cells[0], {})
    for cells in runs.values():  # leakage is measured only where each image has its own theta
        cells.setdefault("mean", "-")
        cells.setdefault(WITHOUT_LEAKY, "-")
    return runs


def _table() -> str:
    """Of the l2 demo, what is most important."""
    columns = ["run", "accuracy", "ACR", "ACR-tilde", WITHOUT_LEAKY]
    runs = printed_cells(load("demo")["results"][0]["printed"])
    return markdown(columns, ([cells[column] for column in columns] for cells in runs.values()))


def _both() -> str:
    """More, of both demos."""
    columns, rows = ["accuracy", "ACR", "ACR-tilde", WITHOUT_LEAKY], []
    for r in load("demo")["results"]:
        for run, cells in printed_cells(r["printed"]).items():
            method, _, theta = run.partition("-")
            name = f"best fixed theta ({theta})" if theta else method.replace("ancer", "ANCER")
            bound = cells["theta at its limit"].replace("% of coordinates", " % of pixels")
            mean = round_down(r["mean_proxy_radius"][run], 3)
            rows.append([f"{r['norm']}, {name}", *(cells[column] for column in columns), mean, bound])
    more = ["mean proxy radius, wrong answers included", "images with theta at its limit"]
    return markdown(["", *columns[:-1], f"{WITHOUT_LEAKY} thetas", *more], rows)


BENCHMARK = Benchmark(
    claim="`make demo` takes minutes, and the mean proxy radius rises from fixed noise to isotropic noise to ANCER.",
    takes="3 minutes",
    measure=measure,
    sizes={"images": (2, 30), "n": (500, 10_000)},
    small_is_judged=False,
    outputs={"demo": lines},
    figures={
        "table": _table,
        "both": _both,
        "seconds": lambda: " and ".join(f"{r['seconds']:.0f} s" for r in load("demo")["results"]),
    },
)
