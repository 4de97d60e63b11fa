"""The memory's speed: 10,000 regions of 3,072 coordinates, apart and crowded, and the cost of one insertion.

python benchmarks/reconcile.py [--count 10000]

Apart: uniform random images, whose regions the distance filter clears at once. Crowded: the images lie around 17
points, so that over 5 % of the pairs (of different classes, within reach of each other) need the exact test. Both for
l2 and l1 with anisotropic theta. Every case runs in a process of its own, whose peak memory is stored. Then the cost
of one more insertion into memories of growing size. Exits with status 1 if a bar is missed: 60 s apart, 600 s
crowded, 2 GiB. About 15 minutes on two CPU cores.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np
import record

from ancer_jax import memory
from ancer_jax.regions import Region

SEED = 0
D = 3072
BARS = {"apart": 60, "crowded": 600}
MEMORY_BAR_GIB = 2.0


def regions(case, norm, count, rng):
    """Candidates: images, anisotropic theta and gaps."""
    theta = rng.uniform(0.12, 0.5, (count, D)).astype(np.float32)
    if case == "apart":
        center = rng.random((count, D), np.float32)
    else:
        # A few directions in which a region is long defeat the filter, but not the exact test.
        points = rng.random((17, D), np.float32)
        center = points[rng.integers(17, size=count)] + 0.08 * rng.standard_normal((count, D), np.float32)
        theta[np.arange(count)[:, None], rng.integers(D, size=(count, 3))] = 8
    return Region(center, theta, rng.uniform(0.3, 1.5 if norm == 2 else 1.0, count), norm)


def whole(case, norm, count):
    """Seconds to reconcile all, and how many pairs needed the exact test."""
    rng = np.random.default_rng(SEED)
    candidates, classes = regions(case, norm, count, rng), rng.integers(10, size=count)
    asked, ask = [0], memory._ask

    def counted(question, region, columns, places):
        asked[0] += places.size if question is memory._clear else 0
        return ask(question, region, columns, places)

    memory._ask = counted
    start = time.perf_counter()
    _, info = memory.insert_batch(memory.empty(norm), candidates, classes)
    seconds = time.perf_counter() - start
    return {
        "case": case,
        "norm": norm,
        "count": count,
        "seconds": seconds,
        "exact_share": asked[0] / (count * (count - 1) / 2),
        "changed": int(info.changed.sum()),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def growth(norm, sizes, repeats=20):
    """Milliseconds of one more insertion, apart and crowded, into memories of growing size."""
    rows = []
    for case in BARS:
        rng, count = np.random.default_rng(SEED), max(sizes) + repeats
        all_of_them, classes = regions(case, norm, count, rng), rng.integers(10, size=count)

        def part(rows, of=all_of_them):
            return Region(of.center[rows], of.theta[rows], of.gap[rows], norm)

        state = memory.empty(norm)
        for size in sizes:
            state, _ = memory.insert_batch(state, part(slice(len(state), size)), classes[len(state) : size])
            times, longer = [], state
            for i in range(size, size + repeats):
                start = time.perf_counter()
                longer, _ = memory.insert(longer, part(i), classes[i])
                times.append(time.perf_counter() - start)
            # The first ones copy the columns (another memory goes on in them later) or compile.
            median = 1e3 * float(np.median(times[repeats // 2 :]))
            rows.append({"case": case, "norm": norm, "stored": size, "ms_per_insert": median})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--one", nargs=2)
    options = parser.parse_args()
    if options.one:
        case, norm = options.one
        print(json.dumps(whole(case, int(norm), options.count)))
        return 0
    rows = []
    for case in BARS:
        for norm in (2, 1):
            command = [sys.executable, __file__, "--count", str(options.count), "--one", case, str(norm)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout))
            record.show(rows[-1:])
    sizes = [size for size in (100, 300, 1000, 3000) if size < options.count]
    inserts = growth(2, sizes)
    record.show(inserts)
    record.save("reconcile", {"d": D, "rows": rows, "inserts": inserts}, seed=SEED)
    passed = all(row["seconds"] <= BARS[row["case"]] and row["peak_gib"] <= MEMORY_BAR_GIB for row in rows)
    passed &= all(row["exact_share"] >= 0.05 for row in rows if row["case"] == "crowded")
    print("passed" if passed else "MISSED A BAR")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
