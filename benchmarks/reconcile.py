"""The speed of the memory: 10,000 regions of 3,072 coordinates, apart and crowded, and the cost of one insertion.

    python benchmarks/reconcile.py [--count 10000]    # about 15 minutes on two CPU cores
    python benchmarks/reconcile.py --small            # 200 regions

Apart: uniform random images, whose regions the distance filter separates at once. Crowded: the images lie around 17
points, so that more than 5 % of the pairs (of different classes, and near each other) need the exact test. Both for l2
and l1 with anisotropic theta. Each case runs in a process of its own, whose peak memory is stored. Then the cost of one
more insertion into memories of growing size.

Exit status 1 if a bar is missed: 60 s apart, 600 s crowded, 2 GiB.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
import unittest.mock
from collections.abc import Sequence
from typing import Any

import numpy as np
import record

from ancer_jax import Certificate, Memory, Region, memory

SEED = 0
D = 3072
BARS = {"apart": 60, "crowded": 600}
MEMORY_BAR_GIB = 2.0


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
    return Certificate(rng.integers(10, size=count), region, np.zeros(count), count=unread, n=unread)


def whole(case: str, norm: int, count: int) -> dict[str, Any]:
    """Seconds to insert all, and the share of pairs that needed the exact test."""
    candidates = certificates(case, norm, count, np.random.default_rng(SEED))
    ask, clear = memory._ask, memory._clear  # pyright: ignore[reportPrivateUsage]
    exact = 0

    def counted(question, region, columns, places):
        nonlocal exact
        exact += places.size if question is clear else 0
        return ask(question, region, columns, places)

    with unittest.mock.patch.object(memory, "_ask", counted):
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
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def growth(norm: int, sizes: Sequence[int], repeats: int = 20) -> list[dict[str, Any]]:
    """Milliseconds of one more insertion, apart and crowded, into memories of growing size."""
    rows = []
    for case in BARS:
        candidates = certificates(case, norm, max(sizes) + repeats, np.random.default_rng(SEED))
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


def main() -> int:
    parser = record.parser(__doc__)
    parser.add_argument("--count", type=int, help="number of regions")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    count = options.count or (200 if options.small else 10_000)
    if options.child:
        case, norm = options.child
        print(json.dumps(whole(case, int(norm), count)))
        return 0
    rows = []
    for case in BARS:
        for norm in (2, 1):
            command = [sys.executable, __file__, "--count", str(count), "--child", case, str(norm)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout))
            record.show(rows[-1:])
    sizes = [size for size in (100, 300, 1000, 3000) if size < count]
    inserts = growth(2, sizes)
    record.show(inserts)
    record.save("reconcile", {"d": D, "rows": rows, "inserts": inserts}, seed=SEED, small=options.small)
    passed = all(row["seconds"] <= BARS[row["case"]] and row["peak_gib"] <= MEMORY_BAR_GIB for row in rows)
    passed &= all(row["exact_share"] >= 0.05 for row in rows if row["case"] == "crowded")
    print("passed" if passed else "MISSED A BAR")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
