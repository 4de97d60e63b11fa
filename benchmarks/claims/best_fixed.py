"""The best fixed theta: chosen by the draws of one seed, certified by those of another.

The best of several certificates is often the one that was lucky: whoever picks it by its own draws is wrong more often
than alpha (see `selection`). So all thetas are certified with one seed, and the one with the largest ACR-tilde is
certified again with another seed: bundled classifiers and test images, alpha = 0.001, l2 and l1. Other benchmarks that
compare with the best fixed theta use `choose`.
"""

import argparse
import tempfile
from collections.abc import Iterator
from typing import Any

import ancer_jax as aj
from ancer_jax.data import Dataset, select
from ancer_jax.metrics import round_share
from ancer_jax.models import BUNDLED_BY_NORM
from ancer_jax.report import load_results
from ancer_jax.runs.config import Norm
from benchmarks import figures
from benchmarks.benchmark import Benchmark, Found, Line, Lines

FACTORS = (0.75, 1.0, 1.25, 1.5, 2.0)  # of the theta that the classifier was trained with


def certify(norm: Norm, theta: float, dataset: Dataset, folder: str, *, seed: int, n: int) -> dict[str, Any]:
    """The figures of one fixed theta of the bundled classifier."""
    config = aj.RunConfig(norm=norm, theta=theta, certify=aj.CertifyConfig(n=n), seed=seed)
    out = f"{folder}/{norm} seed {seed} fixed {theta:g}"
    aj.certify_dataset(aj.load_bundled(BUNDLED_BY_NORM[norm]).classifier, dataset, config, out=out)
    row = {"norm": norm, "theta": theta, "seed": seed} | figures.summary(load_results(out))
    print(row, flush=True)
    return row


def choose(norm: Norm, dataset: Dataset, folder: str, *, n: int, seed: int = 0) -> tuple[float, list[dict[str, Any]]]:
    """The theta with the largest ACR-tilde under seed + 1, to certify with `seed`, and a row for each one."""
    thetas = [factor * aj.load_bundled(BUNDLED_BY_NORM[norm]).theta for factor in FACTORS]
    tried = [certify(norm, theta, dataset, folder, seed=seed + 1, n=n) for theta in thetas]
    return max(tried, key=lambda row: row["ACR-tilde"])["theta"], tried


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """Both norms."""
    whole, rows = aj.load_dataset("fashion-mnist-subset"), []
    dataset = select(whole, skip=len(whole) // options.images, max_images=options.images)
    with tempfile.TemporaryDirectory() as folder:
        for norm in ("l2", "l1"):
            best, tried = choose(norm, dataset, folder, n=options.n, seed=options.seed)
            rows += [*tried, certify(norm, best, dataset, folder, seed=options.seed, n=options.n)]
            yield {"images": options.images, "n": options.n, "rows": rows}


def lines(found: Found) -> Lines:
    images = found["results"]["images"]
    for r in found["results"]["rows"]:
        what = f"{r['norm']}, fixed {r['theta']:g}, seed {r['seed']}, {images} images: accuracy; ACR"
        yield Line(what, f"{round_share(r['accuracy'], images)}; {figures.down(r, 'ACR')}")


BENCHMARK = Benchmark(
    claim="Fixed thetas, and the best of them: chosen by one seed, certified by another.",
    takes="5 minutes",
    measure=measure,
    sizes={"images": (2, 50), "n": (200, 10_000)},
    outputs={"best_fixed": lines},
)
