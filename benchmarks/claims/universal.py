"""A universal theta: one anisotropic theta for a whole data set, found by gradient ascent, needs no memory.

Finds theta on the 2,000 bundled Fashion-MNIST training images (`optimize_universal`). Then certifies 50 test images
with it, with the best fixed theta, and with isotropic and anisotropic theta for each image (after memory); bundled
classifiers, n = 10,000, alpha = 0.001, l2 and l1. The best fixed theta is chosen on the test images, which favours it,
but by other draws than those that certify it (`best_fixed`). Draws the universal thetas into `results/universal.png`.

Bar: the universal theta beats the best fixed one in ACR-tilde.
"""

import argparse
import pathlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import ancer_jax as aj
from ancer_jax.data import select
from ancer_jax.metrics import round_share
from ancer_jax.models import BUNDLED_BY_NORM
from ancer_jax.report import load_results
from ancer_jax.runs.config import Method, Norm
from ancer_jax.search import UniversalConfig, optimize_universal
from ancer_jax.smoothing import make_noise
from benchmarks import figures
from benchmarks.benchmark import Benchmark, Found, Line, Lines, load, markdown, stored
from benchmarks.claims import best_fixed
from benchmarks.figures import WITHOUT_LEAKY


def compare(
    norm: Norm, folder: str, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any], np.ndarray]:
    """A row for each method; the rows of all fixed thetas; how theta was found; and the universal theta."""
    bundled, train = aj.load_bundled(BUNDLED_BY_NORM[norm]), aj.load_dataset("fashion-mnist-subset", split="train")
    test = aj.load_dataset("fashion-mnist-subset")
    test = select(test, skip=len(test) // options.images, max_images=options.images)
    began = time.perf_counter()
    key = jax.random.key(options.seed, impl="threefry2x32")
    smoothed = aj.Smoothed(bundled.classifier, make_noise(norm), bundled.theta)
    config = UniversalConfig(steps=options.steps)
    found = optimize_universal(key, smoothed, train.images[:], train.labels, config=config)
    theta, objective = map(np.asarray, found)
    seconds = time.perf_counter() - began
    best, tried = best_fixed.choose(norm, test, folder, n=options.n, seed=options.seed)
    runs: list[tuple[str, Method, float]] = [
        (f"fixed {best:g}", "fixed", best),
        ("universal", "universal", bundled.theta),
        ("isotropic", "isotropic", bundled.theta),
        ("ancer", "ancer", bundled.theta),
    ]
    rows = []
    for name, method, start in runs:
        config = aj.RunConfig(
            norm,
            method,
            start,
            aj.CertifyConfig(n=options.n),
            isotropic=aj.IsotropicConfig.published(steps=100),
            anisotropic=aj.AnisotropicConfig.published(),
            seed=options.seed,
        )
        theta_map, out = theta if method == "universal" else None, f"{folder}/{norm}-{name}"
        aj.certify_dataset(bundled.classifier, test, config, out=out, theta_map=theta_map)
        results = load_results(out)
        row = {"norm": norm, "method": name} | figures.summary(results)
        row[WITHOUT_LEAKY] = figures.without_leaky(results, "radius_proxy")
        rows.append(row | {"s/image": results.seconds})
    search = {
        "norm": norm,
        "steps": options.steps,
        "seconds": seconds,
        "objective_first_10_steps": float(objective[:10].mean()),
        "objective_last_10_steps": float(objective[-10:].mean()),
        "theta_min": float(theta.min()),
        "theta_geometric_mean": float(np.exp(np.log(theta).mean())),
        "theta_max": float(theta.max()),
    }
    return rows, tried, search, theta


def draw(thetas: Mapping[str, np.ndarray], path: pathlib.Path) -> None:
    """A picture of the universal theta of each norm."""
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (norm, theta) in zip(figure.subplots(1, 2), thetas.items(), strict=True):
        figure.colorbar(axis.imshow(theta[..., 0], cmap="viridis"), ax=axis, label="theta (image units)")
        axis.set_title(f"{norm}: universal theta")
        axis.axis("off")
    figure.savefig(path, dpi=120)


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """l2, then l1."""
    rows, tried, searches, thetas = [], [], [], {}
    norms: tuple[Norm, ...] = ("l2", "l1")
    with tempfile.TemporaryDirectory() as folder:
        for norm in norms:
            more, of_fixed, search, thetas[norm] = compare(norm, folder, options)
            rows, tried, searches = rows + more, tried + of_fixed, [*searches, search]
            yield {"images": options.images, "n": options.n, "learned": searches, "tried": tried, "rows": rows}
    draw(thetas, stored(options, ".png"))


def _rows(found: Found) -> list[dict[str, Any]]:
    """The rows in today's words. Older raw outputs repeat ACR-tilde where no leakage was measured."""
    rows = [r | {"method": r["method"].replace("shared", "universal")} for r in found["results"]["rows"]]
    return [r if r["method"] in ("isotropic", "ancer") else r | {WITHOUT_LEAKY: None} for r in rows]


def _best_fixed(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each norm the fixed theta with the largest ACR-tilde; an older raw output has all of them."""
    fixed = [r for r in rows if r["method"].startswith("fixed")]
    return {r["norm"]: r for r in sorted(fixed, key=lambda r: r["ACR-tilde"])}


def lines(found: Found) -> Lines:
    best = _best_fixed(rows := _rows(found))
    for r in rows:
        what = f"{r['norm']}, {r['method']}, {found['results']['images']} images: ACR; ACR-tilde; {WITHOUT_LEAKY}"
        figure = figures.down(r, "ACR", "ACR-tilde", WITHOUT_LEAKY)
        if r["method"] == "universal":
            yield Line(what, figure, "ACR-tilde > fixed", r["ACR-tilde"] > best[r["norm"]]["ACR-tilde"])
        else:
            yield Line(what, figure)


def _table() -> str:
    found, table = load("universal"), []
    best = _best_fixed(rows := _rows(found))
    for r in rows:
        method, _, theta = r["method"].partition(" ")
        if method != "fixed" or r is best[r["norm"]]:
            name = f"best fixed theta ({theta})" if theta else method.replace("ancer", "ANCER")
            accuracy = round_share(r["accuracy"], found["results"]["images"])
            sizes = [figures.down(r, column) for column in ("ACR", "ACR-tilde")]
            sizes.append("-" if r[WITHOUT_LEAKY] is None else figures.down(r, WITHOUT_LEAKY))
            memory = "not needed" if method in ("fixed", "universal") else "needed"
            table.append([f"{r['norm']}, {name}", accuracy, *sizes, f"{r['s/image']:.1f}", memory])
    return markdown(["", "accuracy", "ACR", "ACR-tilde", f"{WITHOUT_LEAKY} thetas", "s/image", "memory"], table)


def _gain() -> str:
    """Of the universal theta over the best fixed one, in the norm where it is smaller."""
    best = _best_fixed(rows := _rows(load("universal")))
    gains = [r["ACR-tilde"] / best[r["norm"]]["ACR-tilde"] - 1 for r in rows if r["method"] == "universal"]
    return f"{int(100 * min(gains))} %"


BENCHMARK = Benchmark(
    claim="A learned universal theta, which needs no memory, has a larger ACR-tilde than the best fixed theta.",
    takes="30 minutes",
    measure=measure,
    sizes={"images": (2, 50), "steps": (20, 300), "n": (500, 10_000)},
    small_is_judged=False,
    outputs={"universal": lines},
    figures={
        "table": _table,
        "gain": _gain,
        "seconds": lambda: " and ".join(f"{r['seconds']:.0f}" for r in load("universal")["results"]["learned"]),
    },
)
