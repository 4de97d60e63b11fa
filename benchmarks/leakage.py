"""The size of regions (ACR-tilde, after memory) against their leakage, for penalties from 0 up.

    python benchmarks/leakage.py [--images 50] [--runs FOLDER] [--norm l2 l1]    # about an hour on two CPU cores
    python benchmarks/leakage.py --small --norm l2                               # a few minutes

Certifies real images (Fashion-MNIST, bundled classifiers, n = 10,000, alpha = 0.001) with the best fixed theta (chosen
by other draws: benchmarks/best_fixed.py), isotropic noise and ANCER, under several weights of the leakage penalty and
with the leakage limit, all after memory. Stores every figure and a picture, results/leakage.png. Then times the measure
of leakage against certification with n = 100,000. `--runs` keeps the runs, and continues there.

Exit status 1 if the measure costs more than 15 %.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import best_fixed
import figures
import jax
import numpy as np
import record
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import ancer_jax as aj
from ancer_jax import devices, report
from ancer_jax.data import Dataset, load_dataset, select
from ancer_jax.metrics import average_certified_radius
from ancer_jax.runs.config import Norm
from ancer_jax.runs.job import example_keys, make_job
from ancer_jax.smoothing import make_noise

SEED = 0
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


def run(norm: Norm, dataset: Dataset, n: int, name: str, changes: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """The figures of one point."""
    bundled = aj.load_bundled(norm)
    method, weight = changes["method"], changes.get("weight", 0.0)
    config = aj.RunConfig(
        norm=norm,
        method=method,
        theta=changes.get("theta", bundled.theta),
        certify=aj.CertifyConfig(n=n),
        isotropic=aj.IsotropicConfig.published(steps=100, leakage_weight=weight),
        anisotropic=aj.AnisotropicConfig.published(leakage_weight=weight),
        leakage_limit=changes.get("leakage_limit"),
        seed=SEED,
    )
    out = f"{folder}/{norm} {name}"
    aj.certify_dataset(bundled.classifier, dataset, config, out=out)
    results = report.load_results(out)
    leakage = np.array(results["leakage"], float)
    return {
        "norm": norm,
        "noise": name,
        "method": method,
        "weight": weight,
        "mean_leakage": float(leakage.mean()),
        "median_leakage": float(np.median(leakage)),
        "above_limit": int((leakage > LIMIT).sum()),
        "accuracy": float(results.correct.mean()),
        "acr": results.acr("radius"),
        "acr_tilde_before": average_certified_radius(results.own["radius_proxy"], results.own["correct"] == 1),
        "acr_tilde": results.acr("radius_proxy"),
        "acr_tilde_without_leaky": figures.without_leaky(results, "radius_proxy", LIMIT),
        "changed": int(results["changed"].sum()) if "changed" in results.columns else 0,
    }


def cost(norm: Norm = "l2", images: int = 10, n: int = 100_000) -> dict[str, Any]:
    """Seconds of the measure of leakage and of certification, for one batch, both compiled before."""
    bundled, whole = aj.load_bundled(norm), load_dataset("fashion-mnist-subset")
    config = aj.RunConfig(norm=norm, method="isotropic", theta=bundled.theta, certify=aj.CertifyConfig(n=n), seed=SEED)
    part = select(whole, skip=len(whole) // images, max_images=images)
    start, mesh = np.asarray(bundled.theta, np.float32), devices.device_mesh(1)
    job = make_job(bundled.classifier, config, start, aj.Execution(chunk=100), mesh).with_probes(whole)
    keys, theta = example_keys(SEED, part.ids.astype(np.uint32)), np.full(images, bundled.theta, np.float32)
    smoothed = aj.Smoothed(bundled.classifier, make_noise(norm), bundled.theta)

    @jax.jit
    def count(keys, images, theta):
        def one(key, x, theta):
            return aj.count_votes(key, smoothed.with_theta(theta), x, config=config.certify, chunk=100)

        return jax.vmap(one)(keys, images, theta)

    def measure():
        return job.measure_leakage(part.images[:], theta, part.labels.astype(np.int32)).run()

    def seconds(work: Callable[[], Any]) -> float:
        jax.block_until_ready(work())
        start = time.perf_counter()
        jax.block_until_ready(work())
        return time.perf_counter() - start

    # The measure before, between and after: the machine's speed drifts.
    measures, certifications = [seconds(measure)], []
    for _ in range(2):
        certifications.append(seconds(lambda: count(keys, part.images, theta)))
        measures.append(seconds(measure))
    ratio = float(np.mean(measures) / np.mean(certifications))
    return {"images": images, "n": n, "leakage_s": measures, "certification_s": certifications, "ratio": ratio}


def draw(rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """A picture of ACR-tilde against mean leakage."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    figure = Figure(figsize=(5.4 * len(norms), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, norm in zip(figure.subplots(1, len(norms), squeeze=False)[0], norms, strict=True):
        here = [row for row in rows if row["norm"] == norm]
        for method, marker, color in (("fixed", "s", "C7"), ("isotropic", "^", "C0"), ("ancer", "o", "C3")):
            points = [row for row in here if row["method"] == method]
            curve = [row for row in points if "limit" not in row["noise"]]
            x, y = [[row[name] for row in curve] for name in ("mean_leakage", "acr_tilde")]
            axis.plot(x, y, marker=marker, color=color, linestyle="none" if method == "fixed" else "-", label=method)
            for row in curve:
                label = row["noise"].split()[-1]
                place = (row["mean_leakage"], row["acr_tilde"])
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
    figure.savefig(record.RESULTS / name, dpi=130)


def main() -> int:
    parser = record.parser(__doc__)
    parser.add_argument("--images", type=int)
    parser.add_argument("--runs", help="a folder that keeps the runs")
    parser.add_argument("--norm", nargs="+", default=["l2", "l1"])
    parser.add_argument("--no-cost", action="store_true", help="do not time the measure")
    options = parser.parse_args()
    images, n = options.images or (2 if options.small else 50), 500 if options.small else 10_000
    whole = load_dataset("fashion-mnist-subset")
    dataset = select(whole, skip=len(whole) // images, max_images=images)
    rows, tried = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for norm in options.norm:
            folder = options.runs or temporary
            best, thetas = best_fixed.choose(norm, dataset, folder, n=n)
            tried += thetas
            for name, changes in settings(norm, best):
                rows.append(run(norm, dataset, n, name, changes, folder))
                print(rows[-1], flush=True)
    record.show([{name: row[name] for name in row if name != "method"} for row in rows])
    stored: dict[str, Any] = {"images": images, "n": n, "limit": LIMIT, "rows": rows, "tried": tried}
    passed = True
    if not (options.no_cost or options.small):
        stored["cost"] = cost()
        passed = stored["cost"]["ratio"] <= BAR
        print(stored["cost"])
    record.save("leakage", stored, seed=SEED, small=options.small)
    draw(rows, "small-leakage.png" if options.small else "leakage.png")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
