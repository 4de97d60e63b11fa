"""Accuracy and ACR of public ResNet-20s on CIFAR-10, as published and if they had been certified with fewer draws.

FOLDER is a copy of github.com/jh-jeong/smoothing-consistency, in which Jeong and Shin (2020) published certificates of
all 10,000 test images with n = 100,000 draws at sigma 0.5. More draws make larger radii, so networks are compared at
the same n. A published radius has three digits; the count of draws is taken for which the radius is nearest. Of `n` of
these draws, chosen at random, the count is hypergeometric: the figures for fewer draws are its expectations, exact but
for the published digits. They are given for all images, and for every `skip`-th, those of `cifar10_models`.
"""

import argparse
import csv
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.stats

from ancer_jax import Gaussian
from ancer_jax.metrics import round_down
from ancer_jax.smoothing.bounds import clopper_pearson_lower
from benchmarks.benchmark import Benchmark, Found, Line, Lines

SIGMA, ALPHA, DRAWS = 0.5, 0.001, 100_000
FILES = {
    "cifar10-resnet20-l2-0.5": "cohen/cifar_resnet20/noise_0.50_7483",
    "cifar10-resnet20-l2-0.5-consistency": "consistency/cohen/num_2/lbd_10.0/eta_0.5/cifar_resnet20/noise_0.50",
}


def radii(n: int) -> np.ndarray:
    """The certified radius for each count, 0 to n, of n draws; 0 for an abstention."""
    return SIGMA * np.asarray(Gaussian().gap(clopper_pearson_lower(np.arange(n + 1), n, ALPHA)))


def counts(published: np.ndarray) -> np.ndarray:
    """The counts of all draws for which radii are nearest to the published ones."""
    possible = radii(DRAWS)
    between = (possible[1:] + possible[:-1]) / 2
    return np.searchsorted(between, published)


def expected(count: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """For each image the probability of a radius above 0, and the expected radius, of n of all draws."""
    kinds, place = np.unique(count, return_inverse=True)
    # By the logarithm: SciPy's pmf itself takes milliseconds for each value.
    weights = np.exp([scipy.stats.hypergeom.logpmf(np.arange(n + 1), DRAWS, kind, n) for kind in kinds])
    found = weights @ np.stack([radii(n) > 0, radii(n)], axis=1)
    return found[place, 0], found[place, 1]


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """Both networks."""
    rows = []
    for name, file in FILES.items():
        with open(options.folder / "data/certify/cifar10" / file) as lines:
            images = [*csv.DictReader(lines, delimiter="\t")]
        right, radius = (np.array([float(image[column]) for image in images]) for column in ("correct", "radius"))
        some = np.array([int(image["idx"]) for image in images]) % options.skip == 0
        certified, fewer = expected(counts(radius), options.n)
        for what, chosen in (("all", slice(None)), (f"every {options.skip}th", some)):
            mean = lambda values, chosen=chosen, right=right: float((values * right)[chosen].mean())
            row = {"name": name, "images": len(radius[chosen]), "which": what}
            for n, values in ((DRAWS, (radius > 0, radius)), (options.n, (certified, fewer))):
                rows.append({**row, "n": n, "accuracy": mean(values[0]), "ACR": mean(values[1])})
        yield {"skip": options.skip, "rows": rows}


def lines(found: Found) -> Lines:
    for r in found["results"]["rows"]:
        what = f"{r['name']}, {r['which']} ({r['images']}), n = {r['n']:,}: accuracy; ACR"
        yield Line(what, f"{round_down(r['accuracy'], 3)}; {round_down(r['ACR'], 3)}")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Where the certificates are."""
    parser.add_argument("folder", metavar="FOLDER", type=pathlib.Path)


BENCHMARK = Benchmark(
    claim="What public ResNet-20s would get with as few draws as ours.",
    takes="1 minute",
    measure=measure,
    sizes={"n": (100, 10_000), "skip": (20, 20)},
    arguments=arguments,
    outputs={"public_networks": lines},
)
