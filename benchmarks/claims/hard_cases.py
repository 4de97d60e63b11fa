"""Cases that need the memory, on real images: near-duplicates of different classes, and a search that diverges.

Near-duplicates: a path leads from a bundled Fashion-MNIST test image to the closest one of another predicted class. One
image just before and one just after the place where the smoothed classifier changes its class are certified with ANCER
noise: their regions overlap, and the memory has to shrink them. For l2 the path is a blend of both ends, and the two
images are three fortieths of it apart; for l1 it changes one pixel after the other, and they differ in one pixel. Each
image has the label of the end that is nearer.

Runaway: isotropic noise without an upper bound (`theta_max = inf`, l2). For one image, which comes first here, the
search finds noise that erases everything. Its region is huge, its certificate true and worthless; the images after it
lie inside that region and get its class.

A region must change in the first case, and an image get the class of another in the second. The table that
`ancer-jax report` prints is stored, too.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

import ancer_jax as aj
from ancer_jax import report
from ancer_jax.data import Dataset, load_dataset, take
from ancer_jax.metrics import round_down, round_share
from ancer_jax.models import BUNDLED_BY_NORM
from ancer_jax.runs.config import Norm
from ancer_jax.search.leakage import smoothed_classes
from ancer_jax.smoothing import make_noise
from benchmarks import figures
from benchmarks.benchmark import Benchmark, Found, Line, Lines, load, markdown

RUNAWAY = 320  # an image whose noise runs away (l2)
CASES: tuple[tuple[str, Norm], ...] = (("near-duplicates", "l2"), ("near-duplicates", "l1"), ("runaway", "l2"))


def path(a: np.ndarray, b: np.ndarray, norm: int) -> np.ndarray:
    """Images [m, d] that lead from a to b: 41 blends (l2), or pixel after pixel, the most different first (l1)."""
    if norm == 2:
        share = np.linspace(0, 1, 41, dtype=np.float32)[:, None]
        return (1 - share) * a + share * b
    rank = np.argsort(np.argsort(-np.abs(a - b)))
    return np.where(rank < np.arange(a.size + 1)[:, None], b, a)


def near_duplicates(smoothed: aj.Smoothed, pairs: int, seed: int) -> Dataset:
    """Two images on both sides of the change of class, for each of the closest pairs of different predicted classes."""
    norm = smoothed.noise.norm
    whole = load_dataset("fashion-mnist-subset")
    every = whole.images[:]
    flat = every.reshape(len(whole), -1)
    classes = np.asarray(smoothed.classifier(every)).argmax(axis=1)
    square = (flat**2).sum(axis=1)
    distance = square[:, None] + square - 2 * flat @ flat.T
    distance[np.tril_indices(len(flat))] = np.inf
    distance[classes[:, None] == classes] = np.inf
    images, labels = [], []
    for place in np.argsort(distance, axis=None):
        ends = np.unravel_index(place, distance.shape)
        start, end = flat[list(ends)]
        line = path(start, end, norm).reshape(-1, *whole.images.shape[1:])
        keys = jax.random.split(jax.random.key(seed), len(line))
        found = np.asarray(smoothed_classes(keys, smoothed, line, num_samples=200, chunk=200))
        changes = np.flatnonzero(found[1:] != found[:-1])
        if not changes.size:  # under noise both ends have one class
            continue
        margin = 1 if norm == 2 else 0
        for k in (max(changes[0] - margin, 0), min(changes[0] + 1 + margin, len(line) - 1)):
            images.append(line[k])
            nearer = np.argmin(np.square(flat[list(ends)] - line[k].ravel()).sum(axis=1))
            labels.append(whole.labels[ends[nearer]])
        if len(images) == 2 * pairs:
            break
    return Dataset("near-duplicates", np.arange(len(images)), np.stack(images), np.array(labels), whole.num_classes)


def certify(case: str, norm: Norm, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """A run of one case: the figures before and after memory."""
    bundled = aj.load_bundled(BUNDLED_BY_NORM[norm])
    config = aj.RunConfig(norm, "ancer", bundled.theta, aj.CertifyConfig(n=options.n), seed=options.seed)
    if case == "near-duplicates":
        smoothed = aj.Smoothed(bundled.classifier, make_noise(norm), bundled.theta)
        dataset = near_duplicates(smoothed, options.pairs, options.seed)
        isotropic = aj.IsotropicConfig.published(steps=options.steps)
        anisotropic = aj.AnisotropicConfig.published(steps=options.steps)
        config = dataclasses.replace(config, isotropic=isotropic, anisotropic=anisotropic)
    else:
        whole = load_dataset("fashion-mnist-subset")
        first = int(np.flatnonzero(whole.ids == RUNAWAY)[0])
        dataset = take(whole, [first, *range(first + 4, len(whole), 20)[: options.images - 1]])
        search = aj.IsotropicConfig.published(steps=3 * options.steps, theta_max=float("inf"))
        config = dataclasses.replace(config, method="isotropic", isotropic=search)
    out = f"{folder}/{case}-{norm}"
    aj.certify_dataset(bundled.classifier, dataset, config, out=out)
    results = report.load_results(out)
    before, after = results.own, results.columns
    printed = report.summary_table([results], figures.RADII[norm])
    print(f"{case}, {norm}\n\n{printed}\n", flush=True)
    return {
        "case": case,
        "norm": norm,
        "images": len(dataset),
        "changed": int(after["changed"].sum()),
        "inside": int((after["answered_by"] >= 0).sum()),
        "overruled": int((after["predict"] != before["predict"]).sum()),
        "largest_radius_before": float(before["radius"].max()),
        "accuracy": [float(before["correct"].mean()), float(after["correct"].mean())],
        "acr": [float((columns["radius"] * columns["correct"]).mean()) for columns in (before, after)],
        "acr_tilde": [float((columns["radius_proxy"] * columns["correct"]).mean()) for columns in (before, after)],
        "printed": printed,
    }


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """All cases."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for case, norm in CASES:
            rows.append(certify(case, norm, options.runs or temporary, options))
            yield rows


def lines(found: Found) -> Lines:
    for r in found["results"]:
        what = f"{r['case']}, {r['norm']}: regions changed; images given the class of another, of {r['images']}"
        figure, runaway = f"{r['changed']}; {r['overruled']}", r["case"] == "runaway"
        holds = r["overruled"] > 0 if runaway else r["changed"] > 0
        yield Line(what, figure, "images > 0" if runaway else "regions > 0", holds)


def _table() -> str:
    """What memory changes in each case."""
    rows = []
    for r in load("hard_cases")["results"]:
        accuracy = " -> ".join(round_share(value, r["images"]) for value in r["accuracy"])
        acr_tilde = " -> ".join(round_down(value, 3) for value in r["acr_tilde"])
        case = f"{r['norm']}, {r['case']}, {'isotropic' if r['case'] == 'runaway' else 'ANCER'}"
        rows.append([case, f"{r['changed']} of {r['images']}", str(r["overruled"]), accuracy, acr_tilde])
    header = ["before -> after memory", "regions changed", "given another input's class", "accuracy", "ACR-tilde"]
    return markdown(header, rows)


BENCHMARK = Benchmark(
    claim="Regions that overlap, and one that contains the images after it, on real images.",
    takes="10 minutes",
    measure=measure,
    sizes={"n": (1000, 10_000), "steps": (10, 100), "pairs": (1, 10), "images": (2, 25)},
    arguments=lambda parser: parser.add_argument("--runs", help="a folder that keeps the runs"),
    small_is_judged=False,
    outputs={"hard_cases": lines},
    figures={
        "table": _table,
        "runaway-radius": lambda: round_down(load("hard_cases")["results"][-1]["largest_radius_before"], 1),
    },
)
