"""Peak memory does not grow with the number of draws: ten bundled images, n = 1,000 against n = 1,000,000.

Each run is `certify_dataset` (SmallCNN, batch 10, chunk 100) in a new process, which reports its own `ru_maxrss`
(Python, JAX and compilation included).
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from benchmarks.benchmark import TOP, Benchmark, Found, Line, Lines, load

BAR = 1.05
IMAGES, CHUNK = 10, 100


def child(n: int, seed: int) -> None:
    """Certify, then print the peak memory of this process in MiB (the unit of ru_maxrss depends on the system)."""
    from ancer_jax import CertifyConfig, Execution, RunConfig, certify_dataset, load_bundled, load_dataset
    from ancer_jax.data import select

    dataset = select(load_dataset("fashion-mnist-subset"), skip=50, max_images=IMAGES)
    classifier = load_bundled("fashion-mnist-cnn-l2-0.25").classifier
    config = RunConfig(certify=CertifyConfig(n=n), seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        execution = Execution(batch_size=IMAGES, chunk=CHUNK, devices=1)
        certify_dataset(classifier, dataset, config, out=f"{folder}/run", execution=execution)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak / (2**20 if sys.platform == "darwin" else 2**10))


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """Few draws, then many."""
    rows = []
    for n in options.n:
        command = [sys.executable, "-m", "benchmarks.speed.memory", str(n), str(options.seed)]
        peak = float(subprocess.run(command, check=True, cwd=TOP, stdout=subprocess.PIPE, text=True).stdout)
        rows.append({"n": n, "peak_mib": round(peak, 1)})
    yield {"images": IMAGES, "chunk": CHUNK, "ratio": rows[1]["peak_mib"] / rows[0]["peak_mib"], "rows": rows}


def lines(found: Found) -> Lines:
    (few, many), ratio = found["results"]["rows"], found["results"]["ratio"]
    figure = f"{ratio:.3f} ({many['peak_mib']:.0f} / {few['peak_mib']:.0f} MiB)"
    yield Line(f"peak memory, n = {many['n']:,} / n = {few['n']:,}", figure, f"<= {BAR}", ratio <= BAR)


def _peak(i: int) -> str:
    return f"{load('memory')['results']['rows'][i]['peak_mib']:.0f} MiB"


BENCHMARK = Benchmark(
    claim="Peak memory does not grow with the number of draws.",
    takes="8 minutes",
    measure=measure,
    sizes={"n": ([100, 200], [1000, 1_000_000])},
    small_is_judged=False,
    outputs={"memory": lines},
    figures={"few": lambda: _peak(0), "many": lambda: _peak(1)},
)

if __name__ == "__main__":
    child(int(sys.argv[1]), int(sys.argv[2]))
