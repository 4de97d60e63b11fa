"""The size of regions (ACR-tilde, after memory) against their leakage, for penalties from 0 up.

Certifies real images (Fashion-MNIST, bundled classifiers, n = 10,000, alpha = 0.001) with the best fixed theta (chosen
by other draws, as in `best_fixed`), isotropic noise and ANCER, under several weights of the leakage penalty and
with the leakage limit, all after memory. Draws them into results/leakage.png. Then times the measure of leakage against
certification with n = 100,000: it may cost 15 %.
"""

import argparse
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import ancer_jax as aj
from ancer_jax import devices, report
from ancer_jax.data import Dataset, load_dataset, select
from ancer_jax.metrics import average_certified_radius, round_down, round_up
from ancer_jax.models import BUNDLED_BY_NORM
from ancer_jax.runs.config import Norm
from ancer_jax.runs.job import example_keys, make_job
from ancer_jax.smoothing import make_noise
from benchmarks import figures
from benchmarks.benchmark import Benchmark, Found, Line, Lines, load, markdown, stored
from benchmarks.claims import best_fixed

BAR = 0.15
WEIGHTS = {"l2": (0.0, 1.0, 5.0, 20.0, 80.0), "l1": (0.0, 5.0, 20.0)}
LIMIT = 0.1


def settings(norm: Norm, best: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, changes of the run's configuration) of every point; `best` is the best fixed theta."""
    yield f"fixed {best:g}", {"method": "fixed", "theta": best}
    for method, weights in (("isotropic", (0.0, 5.0)), ("ancer", WEIGHTS[norm])):
        for weight in weights:
            yield f"{method}, weight {weight:g}", {"method": method, "weight": weight}
        yield f"{method}, limit {LIMIT:g}", {"method": method, "leakage_limit": LIMIT}


def run(
    norm: Norm, dataset: Dataset, name: str, changes: Mapping[str, Any], folder: str, options: argparse.Namespace
) -> dict[str, Any]:
    """The figures of one point."""
    bundled = aj.load_bundled(BUNDLED_BY_NORM[norm])
    method, weight = changes["method"], changes.get("weight", 0.0)
    config = aj.RunConfig(
        norm=norm,
        method=method,
        theta=changes.get("theta", bundled.theta),
        certify=aj.CertifyConfig(n=options.n),
        isotropic=aj.IsotropicConfig.published(steps=options.steps, leakage_weight=weight),
        anisotropic=aj.AnisotropicConfig.published(steps=options.steps, leakage_weight=weight),
        leakage_limit=changes.get("leakage_limit"),
        seed=options.seed,
    )
    out = f"{folder}/{norm} {name}"
    aj.certify_dataset(bundled.classifier, dataset, config, out=out)
    results = report.load_results(out)
    leakage = [float(value) for value in results["leakage"] if value == value]  # NaN, not measured, for a fixed theta
    return {
        "norm": norm,
        "noise": name,
        "method": method,
        "weight": weight,
        "mean_leakage": figures.mean_leakage(results),
        "median_leakage": float(np.median(leakage)) if leakage else None,
        "above_limit": sum(value > LIMIT for value in leakage),
        "accuracy": float(results.correct.mean()),
        "acr": results.acr("radius"),
        "acr_tilde_before": average_certified_radius(results.own["radius_proxy"], results.own["correct"] == 1),
        "acr_tilde": results.acr("radius_proxy"),
        "acr_tilde_without_leaky": figures.without_leaky(results, "radius_proxy", LIMIT),
        "changed": int(results["changed"].sum()) if "changed" in results.columns else 0,
    }


def cost(n: int, seed: int, *, norm: Norm = "l2", images: int = 10) -> dict[str, Any]:
    """Seconds of the measure of leakage and of certification, for one batch, both compiled before."""
    bundled, whole = aj.load_bundled(BUNDLED_BY_NORM[norm]), load_dataset("fashion-mnist-subset")
    config = aj.RunConfig(norm=norm, method="isotropic", theta=bundled.theta, certify=aj.CertifyConfig(n=n), seed=seed)
    part = select(whole, skip=len(whole) // images, max_images=images)
    start, mesh = np.asarray(bundled.theta, np.float32), devices.device_mesh(1)
    job = make_job(bundled.classifier, config, start, aj.Execution(chunk=100), mesh).with_probes(whole)
    keys, theta = example_keys(seed, part.ids.astype(np.uint32)), np.full(images, bundled.theta, np.float32)
    smoothed = aj.Smoothed(bundled.classifier, make_noise(norm), bundled.theta)

    @jax.jit
    def count(keys, images, theta):
        def one(key, x, theta):
            return aj.count_votes(key, smoothed.with_theta(theta), x, config=config.certify, chunk=100)

        return jax.vmap(one)(keys, images, theta)

    def leak():
        return job.leakage_program(part.images[:], theta, part.labels.astype(np.int32)).run()

    def seconds(work: Callable[[], Any]) -> float:
        jax.block_until_ready(work())
        start = time.perf_counter()
        jax.block_until_ready(work())
        return time.perf_counter() - start

    # The measure before, between and after: the machine's speed drifts.
    measures, certifications = [seconds(leak)], []
    for _ in range(2):
        certifications.append(seconds(lambda: count(keys, part.images, theta)))
        measures.append(seconds(leak))
    ratio = float(np.mean(measures) / np.mean(certifications))
    return {"images": images, "n": n, "leakage_s": measures, "certification_s": certifications, "ratio": ratio}


def draw(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """A picture of ACR-tilde against mean leakage."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    figure = Figure(figsize=(5.4 * len(norms), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, norm in zip(figure.subplots(1, len(norms), squeeze=False)[0], norms, strict=True):
        here = [row for row in rows if row["norm"] == norm]
        for method, marker, color in (("fixed", "s", "C7"), ("isotropic", "^", "C0"), ("ancer", "o", "C3")):
            points = [row for row in here if row["method"] == method]
            curve = [row for row in points if "limit" not in row["noise"]]
            x, y = [[row[name] or 0 for row in curve] for name in ("mean_leakage", "acr_tilde")]
            axis.plot(x, y, marker=marker, color=color, linestyle="none" if method == "fixed" else "-", label=method)
            for row in curve:
                label = row["noise"].split()[-1]
                place = (row["mean_leakage"] or 0, row["acr_tilde"])
                side = {"xytext": (-7, -3), "ha": "right"} if method == "fixed" else {"xytext": (0, 7), "ha": "center"}
                axis.annotate(label, place, textcoords="offset points", fontsize=7, color=color, **side)
            for row in (row for row in points if "limit" in row["noise"]):
                star = {"marker": "*", "markersize": 12, "color": color, "linestyle": "none"}
                axis.plot(row["mean_leakage"], row["acr_tilde"], label=f"{method}, limit {LIMIT:g}", **star)
        axis.set(xlabel="mean leakage", ylabel="ACR-tilde after memory", title=norm)
        axis.margins(x=0.15)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower right")
    figure.supxlabel("small numbers: weight of the penalty; fixed noise: theta", fontsize=8)
    figure.savefig(path, dpi=130)


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """All points, then the cost."""
    whole, rows, tried = load_dataset("fashion-mnist-subset"), [], []
    dataset = select(whole, skip=len(whole) // options.images, max_images=options.images)
    results: dict[str, Any] = {"images": options.images, "n": options.n, "limit": LIMIT, "rows": rows, "tried": tried}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.runs or temporary
        for norm in options.norm:
            best, thetas = best_fixed.choose(norm, dataset, folder, n=options.n, seed=options.seed)
            tried += thetas
            for name, changes in [*settings(norm, best)][:: 3 if options.small else 1]:
                rows.append(run(norm, dataset, name, changes, folder, options))
                print(rows[-1])
                yield results
    draw(rows, stored(options, ".png"))
    yield results | {"cost": cost(10 * options.n, options.seed)}


def lines(found: Found) -> Lines:
    for r in found["results"]["rows"]:
        if r["method"] != "fixed":
            figure = f"{round_down(r['acr_tilde'], 3)}; {round_up(r['mean_leakage'], 3)}"
            yield Line(f"{r['norm']}, {r['noise']}: ACR-tilde after memory; mean leakage", figure)
    if cost := found["results"].get("cost"):
        what, ratio = f"leakage / certification, n = {cost['n']:,}, in time", cost["ratio"]
        yield Line(what, f"{ratio:.3f}", f"<= {BAR}", ratio <= BAR)


def _rows(norm: str) -> dict[str, Mapping[str, Any]]:
    """The best fixed theta, certified with another seed than it was chosen with, and ANCER; figures by column."""
    fixed = [r for r in load("best_fixed")["results"]["rows"] if r["norm"] == norm][-1]
    rows: dict[str, Mapping[str, Any]] = {
        "best fixed theta": {"acr": fixed["ACR"], "acr_tilde": fixed["ACR-tilde"], "mean_leakage": None}
    }
    for r in load("leakage")["results"]["rows"]:
        if r["norm"] == norm and r["noise"].startswith("ancer"):
            rows[r["noise"].replace("ancer", "ANCER")] = r
    return rows


def _penalties() -> str:
    """ANCER with several penalties and with a limit, and the best fixed theta."""
    table = []
    for norm in ("l2", "l1"):
        for name, r in _rows(norm).items():
            leaks = r["mean_leakage"]
            last = ["-", "-"] if leaks is None else [figures.down(r, "acr_tilde_without_leaky"), round_up(leaks, 3)]
            table.append([f"{norm}, {name}", figures.down(r, "acr"), figures.down(r, "acr_tilde"), *last])
    return markdown(["after memory", "ACR", "ACR-tilde", "ACR-tilde without leaky thetas", "mean leakage"], table)


BENCHMARK = Benchmark(
    claim="ACR-tilde after memory against leakage, for penalties from 0 up; what the measure costs.",
    takes="60 minutes",
    measure=measure,
    sizes={"images": (2, 50), "n": (500, 10_000), "steps": (5, 100), "norm": (["l2"], ["l2", "l1"])},
    arguments=lambda parser: parser.add_argument("--runs", help="a folder that keeps the runs, to continue there"),
    small_is_judged=False,
    outputs={"leakage": lines},
    figures={
        "penalties": _penalties,
        "fixed": lambda: figures.down(_rows("l2")["best fixed theta"], "acr_tilde"),
        "ancer": lambda: figures.down(_rows("l2")["ANCER, weight 0"], "acr_tilde"),
        "ancer-without-leaky": lambda: figures.down(_rows("l2")["ANCER, weight 0"], "acr_tilde_without_leaky"),
        "cost": lambda: f"{100 * load('leakage')['results']['cost']['ratio']:.0f} %",
    },
)
