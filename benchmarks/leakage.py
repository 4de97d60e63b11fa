"""How large regions are (ACR-tilde, after memory) against how much of them the noise carries, for penalties from 0 up.

python benchmarks/leakage.py [--images 50] [--runs FOLDER] [--norm l2 l1]

Certifies real images (Fashion-MNIST, bundled classifiers, n = 10,000, alpha = 0.001) with the best fixed noise (chosen
by other draws: benchmarks/best_fixed.py), isotropic noise and ANCER under several weights of the leakage penalty, and
with the leakage limit, all after memory. Stores every figure and a picture, results/leakage.png. Then times the measure
against certification with n = 100,000.
`--runs` keeps the runs and continues there. About an hour on two CPU cores. Exits with status 1 if the measure costs
over 15 %.
"""

import argparse
import functools
import sys
import tempfile
import time

import best_fixed
import jax
import numpy as np
import record
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import ancer_jax as aj
from ancer_jax import execution, parallel, report
from ancer_jax.data import load_dataset, select
from ancer_jax.metrics import average_certified_radius

SEED = 0
BAR = 0.15
WEIGHTS = {"l2": (0.0, 1.0, 5.0, 20.0, 80.0), "l1": (0.0, 5.0, 20.0)}
LIMIT = 0.1


def settings(norm, best):
    """(name, changes of the run's configuration) of every point; `best` is the best fixed theta."""
    yield f"fixed {best:g}", {"method": "fixed", "theta": best}
    for method, weights in (("isotropic", (0.0, 5.0)), ("ancer", WEIGHTS[norm])):
        for weight in weights:
            yield f"{method}, weight {weight:g}", {"method": method, "weight": weight}
        yield f"{method}, limit {LIMIT:g}", {"method": method, "leakage_limit": LIMIT}


def run(norm, dataset, classifier, theta, name, changes, folder):
    method, weight = changes["method"], changes.get("weight", 0.0)
    config = aj.RunConfig(
        norm=norm,
        method=method,
        theta=changes.get("theta", theta),
        certify=aj.CertifyConfig(n=10_000),
        isotropic=aj.IsotropicConfig.reference(steps=100, leakage_weight=weight),
        anisotropic=aj.AnisotropicConfig.reference(leakage_weight=weight),
        leakage_limit=changes.get("leakage_limit"),
        seed=SEED,
    )
    out = f"{folder}/{norm} {name}"
    aj.certify_dataset(classifier, dataset, config, out=out)
    results = report.load_results(out)
    before = results.before or results.columns
    acr = lambda columns, name, kept=True: average_certified_radius(columns[name], (columns["correct"] == 1) & kept)
    leakage = results["leakage"]
    return {
        "norm": norm,
        "noise": name,
        "method": method,
        "weight": weight,
        "mean_leakage": float(leakage.mean()),
        "median_leakage": float(np.median(leakage)),
        "above_limit": int((leakage > LIMIT).sum()),
        "accuracy": float(results.correct.mean()),
        "acr": acr(results.columns, "radius"),
        "acr_tilde_before": acr(before, "radius_proxy"),
        "acr_tilde": acr(results.columns, "radius_proxy"),
        "acr_tilde_without_leaky": acr(results.columns, "radius_proxy", leakage <= LIMIT),
        "changed": int(results.columns["changed"].sum()) if "changed" in results.columns else 0,
    }


def cost(norm="l2", images=10, n=100_000):
    """Seconds of the measure and of certification for one batch, both compiled before."""
    bundled, whole = aj.load_bundled(norm), load_dataset("fashion-mnist-subset")
    config = aj.RunConfig(norm=norm, method="isotropic", theta=bundled.theta, certify=aj.CertifyConfig(n=n))
    mesh = parallel.device_mesh(1)
    probes = execution.find_probes(bundled.classifier, whole, config, aj.Execution(), mesh)
    part = select(whole, skip=len(whole) // images, max_images=images)
    keys = execution._example_keys(SEED, part.ids.astype(np.uint32))
    theta = np.full(images, bundled.theta, np.float32)
    law = aj.GaussianL2() if norm == "l2" else aj.UniformL1()

    @functools.partial(jax.jit, static_argnames="config")
    def count(keys, images, theta, *, config):
        one = lambda key, x, theta: aj.count_votes(key, bundled.classifier, law, x, theta, config=config, chunk=100)
        return jax.vmap(one)(keys, images, theta)

    def certification(config):
        return count(keys, part.images, theta, config=config)

    def measure():
        arguments = probes, bundled.classifier, part.images, theta, part.labels.astype(np.int32)
        return execution._measure_leakage(*arguments, config=config, split="images", chunk=100, mesh=mesh)

    def seconds(work):
        jax.block_until_ready(work())
        start = time.perf_counter()
        jax.block_until_ready(work())
        return time.perf_counter() - start

    # The measure before, between and after: the machine's speed drifts.
    measures, certifications = [seconds(measure)], []
    for _ in range(2):
        certifications.append(seconds(lambda: certification(config.certify)))
        measures.append(seconds(measure))
    ratio = float(np.mean(measures) / np.mean(certifications))
    return {"images": images, "n": n, "leakage_s": measures, "certification_s": certifications, "ratio": ratio}


def draw(rows):
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
    figure.savefig(record.RESULTS / "leakage.png", dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--runs")
    parser.add_argument("--norm", nargs="+", default=["l2", "l1"])
    parser.add_argument("--no-cost", action="store_true")
    options = parser.parse_args()
    whole = load_dataset("fashion-mnist-subset")
    dataset = select(whole, skip=len(whole) // options.images, max_images=options.images)
    rows, tried = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for norm in options.norm:
            bundled, folder = aj.load_bundled(norm), options.runs or temporary
            best, thetas = best_fixed.choose(norm, dataset, folder)
            tried += thetas
            for name, changes in settings(norm, best):
                rows.append(run(norm, dataset, bundled.classifier, bundled.theta, name, changes, folder))
                print(rows[-1], flush=True)
    record.show([{name: row[name] for name in row if name != "method"} for row in rows])
    draw(rows)
    results = {"images": options.images, "n": 10_000, "limit": LIMIT, "rows": rows, "tried": tried}
    if not options.no_cost:
        results["cost"] = cost()
        print(results["cost"])
    record.save("leakage", results, seed=SEED)
    return 0 if options.no_cost or results["cost"]["ratio"] <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
