"""The speed of the memory: 10,000 regions of 3,072 coordinates, apart and crowded, and the cost of one insertion.

Apart: uniform random images, whose regions the distance filter separates at once. Crowded: the images lie around 17
points, so that more than 5 % of the pairs (of different classes, and near each other) need the exact test. Both for l2
and l1 with anisotropic theta. Each case runs in a process of its own, whose peak memory is stored. Then the cost of one
more insertion into memories of growing size.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
import unittest.mock
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ancer_jax import Certificate, Memory, Region, memory
from benchmarks.benchmark import TOP, Benchmark, Found, Line, Lines, load

D = 3072
BARS = {"apart": 60, "crowded": 600}
MEMORY_BAR, EXACT_BAR = 2.0, 0.05  # GiB; share of pairs, crowded


def certificates(case: str, norm: int, count: int, rng: np.random.Generator) -> Certificate:
    """Batched certificates of random images, anisotropic thetas, gaps and classes."""
    theta = rng.uniform(0.12, 0.5, (count, D)).astype(np.float32)
    if case == "apart":
        center = rng.random((count, D), np.float32)
    else:
        # The filter sees the longest direction of a region only: a few long ones defeat it, but not the exact test.
        points = rng.random((17, D), np.float32)
        center = points[rng.integers(17, size=count)] + 0.08 * rng.standard_normal((count, D), np.float32)
        theta[np.arange(count)[:, None], rng.integers(D, size=(count, 3))] = 8
    region = Region(center, theta, rng.uniform(0.3, 1.5 if norm == 2 else 1.0, count), norm)
    # A memory reads prediction and region only.
    unread = np.zeros(count, np.int64)
    return Certificate(rng.integers(10, size=count), region, np.zeros(count), count=unread, n=unread, alpha=unread)


def whole(case: str, norm: int, count: int, seed: int) -> dict[str, Any]:
    """Seconds to insert all, and the share of pairs that needed the exact test."""
    candidates = certificates(case, norm, count, np.random.default_rng(seed))
    compare, disjoint_gap = memory._compare, memory._disjoint_gap  # pyright: ignore[reportPrivateUsage]
    exact = 0

    def counted(comparison, region, columns, places):
        nonlocal exact
        exact += places.size if comparison is disjoint_gap else 0
        return compare(comparison, region, columns, places)

    with unittest.mock.patch.object(memory, "_compare", counted):
        start = time.perf_counter()
        _, answers = Memory.empty(norm).insert_batch(candidates)
        seconds = time.perf_counter() - start
    return {
        "case": case,
        "norm": norm,
        "count": count,
        "seconds": seconds,
        "exact_share": exact / (count * (count - 1) / 2),
        "changed": int(np.sum(answers.changed)),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20),
    }


def growth(norm: int, sizes: Sequence[int], seed: int, repeats: int = 20) -> list[dict[str, Any]]:
    """Milliseconds of one more insertion, apart and crowded, into memories of growing size."""
    rows = []
    for case in BARS:
        candidates = certificates(case, norm, max(sizes) + repeats, np.random.default_rng(seed))
        filled = Memory.empty(norm)
        for size in sizes:
            filled, _ = filled.insert_batch(candidates[len(filled) : size])
            times, longer = [], filled
            for i in range(size, size + repeats):
                start = time.perf_counter()
                longer, _ = longer.insert(candidates[i])
                times.append(time.perf_counter() - start)
            # The first insertions copy the columns, which two memories cannot extend, or compile.
            median = 1e3 * float(np.median(times[repeats // 2 :]))
            rows.append({"case": case, "norm": norm, "stored": size, "ms_per_insert": median})
    return rows


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """All regions at once, then the growth."""
    results: dict[str, Any] = {"d": D, "rows": [], "inserts": []}
    for case in BARS:
        for norm in (2, 1):
            arguments = [case, str(norm), str(options.count), str(options.seed)]
            command = [sys.executable, "-m", "benchmarks.speed.reconcile", *arguments]
            done = subprocess.run(command, check=True, cwd=TOP, stdout=subprocess.PIPE, text=True)
            results["rows"].append(json.loads(done.stdout))
            yield results
    results["inserts"] = growth(2, [size for size in (100, 300, 1000, 3000) if size < options.count], options.seed)
    yield results


def lines(found: Found) -> Lines:
    for r in found["results"]["rows"]:
        crowded, most = r["case"] == "crowded", BARS[r["case"]]
        what = f"l{r['norm']}: seconds for {r['count']:,} regions of 3,072 coordinates, {r['case']}"
        figure = f"{r['seconds']:.1f} ({r['exact_share']:.1%} of pairs tested, {r['peak_gib']:.2f} GiB)"
        bar = f"<= {most} ({f'>= {EXACT_BAR:.0%}, ' * crowded}<= {MEMORY_BAR:g} GiB)"
        holds = r["seconds"] <= most and r["peak_gib"] <= MEMORY_BAR
        yield Line(what, figure, bar, holds and (not crowded or r["exact_share"] >= EXACT_BAR))
    for r in found["results"]["inserts"]:
        what = f"l{r['norm']}: ms for one more insertion, {r['stored']:,} stored, {r['case']}"
        yield Line(what, f"{r['ms_per_insert']:.1f}")


def _seconds(case: str, *norms: int) -> str:
    """Rounded up."""
    rows = load("reconcile")["results"]["rows"]
    return f"{math.ceil(max(r['seconds'] for r in rows if r['case'] == case and r['norm'] in norms))} s"


BENCHMARK = Benchmark(
    claim="The memory takes 10,000 regions of 3,072 coordinates in a minute, and crowded ones in ten.",
    takes="10 minutes",
    measure=measure,
    sizes={"count": (200, 10_000)},
    outputs={"reconcile": lines},
    figures={
        "apart": lambda: _seconds("apart", 2, 1),
        "crowded-l2": lambda: _seconds("crowded", 2),
        "crowded-l1": lambda: _seconds("crowded", 1),
    },
)

if __name__ == "__main__":
    print(json.dumps(whole(sys.argv[1], *map(int, sys.argv[2:]))))
