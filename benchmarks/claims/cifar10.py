"""CIFAR-10 from scratch: networks trained with noise, then certified by all methods, for both norms, with memory.

FOLDER holds CIFAR-10's binary files (`ancer-jax fetch`), or is another data set that `--data` takes. Every step is a
command of `ancer-jax`, and printed. Networks and runs stay in the folder `--work`, where a second call continues.

By default: ResNet-20, 4 epochs, every 100th image, n = 1,000, short searches: all steps on real data, but no row of the
field's table. `--field`: ResNet-18 of ANCER's code at sigma .12, .25, .5 and 1 (l2), WRN-40-2 at half-widths .5 and 1
(l1), the training recipe of the papers, all 10,000 images, n = 100,000, and the default searches, each also without the
limit of theta. All of it wants a GPU; the flags for sizes choose a part. Over the networks of one norm it also reports
the largest radius and the largest proxy radius of each image, as the field does: the network is then chosen by its
certificate, so that this is a figure of no classifier.

Certified accuracy at 0 is that of the answers. Every network must learn, and ACR-tilde after memory must rise from
fixed noise (by default: the best of three thetas, chosen by the draws of another seed) to isotropic noise to ANCER.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ancer_jax.data import load_dataset
from ancer_jax.metrics import average_certified_radius, round_down, round_share
from ancer_jax.models.checkpoints import load_network
from ancer_jax.report import Results, load_results
from benchmarks import figures
from benchmarks.benchmark import Benchmark, Found, Line, Lines, load, markdown
from benchmarks.claims.demo import printed_cells
from benchmarks.figures import WITHOUT_LEAKY

SHORT = ["--preset", "published", "--iso-steps", "25", "--iso-samples", "32"]
SHORT += ["--guard-samples", "300", "--leakage-probes", "32", "--leakage-samples", "16"]
SHORT_ANCER = ["--ancer-steps", "25", "--ancer-samples", "32"]
USUAL = {
    "epochs": 4,
    "drop_every": 0,
    "images": 100,
    "n": 1_000,
    "l2_network": "cifar_resnet20",
    "l1_network": "cifar_resnet20",
    "l2_sigmas": [0.25],
    "l1_sigmas": [0.5],
    "factors": [0.5, 1.0, 2.0],
}
SMALL = USUAL | {"epochs": 3, "images": 2, "l2_network": "small_cnn", "l1_network": "small_cnn", "factors": [1.0, 2.0]}
FIELD = {
    "epochs": 90,
    "drop_every": 30,
    "images": 10_000,
    "n": 100_000,
    "l2_network": "ancer_resnet18",
    "l1_network": "wrn_40_2",
    "l2_sigmas": [0.12, 0.25, 0.5, 1.0],
    "l1_sigmas": [0.5, 1.0],
    "factors": [1.0],
}
LEARNED = 0.3  # the accuracy that a network must exceed


def table_row(columns: Mapping[str, np.ndarray], norm: str) -> dict[str, Any]:
    """The figures of a run before or after memory."""
    correct = columns["correct"] == 1
    radius, proxy = columns["radius"], columns["radius_proxy"]
    found: dict[str, Any] = {
        "images": len(correct),
        "accuracy": float(correct.mean()),
        "ACR": average_certified_radius(radius, correct),
        "ACR-tilde": average_certified_radius(proxy, correct),
        "median radius": float(np.median(radius * correct)),
        "median proxy radius": float(np.median(proxy * correct)),
    }
    if np.isfinite(middle := np.median(columns["log_volume"])):  # an abstention has -inf
        found["median log-volume"] = float(middle)
    for by, values in (("radius", radius), ("proxy radius", proxy)):
        found[f"accuracy by {by}"] = accuracy_at(np.where(correct, values, -np.inf), norm)
    return found


def accuracy_at(radii: np.ndarray, norm: str) -> dict[str, float]:
    """Certified accuracy at the radii of the literature; `radii` are negative where the answer is wrong."""
    return {str(at): float((radii >= at).mean()) for at in figures.RADII[norm]}


def row_of(results: Results) -> dict[str, Any]:
    """A run: after and before memory, with and without leaky thetas, and what it cost."""
    row = table_row(results.columns, results.norm)
    if results.before is not None:
        row["before"] = table_row(results.before, results.norm)
        row["changed regions"] = int(results["changed"].sum())
    if results.data_dependent:
        row["leakage"] = figures.mean_leakage(results)
        row["ACR without leaky"] = figures.without_leaky(results, "radius")
        row[WITHOUT_LEAKY] = figures.without_leaky(results, "radius_proxy")
        row["images with a theta at its bound"] = int((results["at_theta_max"] > 0).sum())
    return row | {"seconds an image": results.seconds}


def of_network(
    norm: str, sigma: float, options: argparse.Namespace, run: Callable[..., str]
) -> Iterator[dict[str, Any]]:
    """Train a network, and certify it by all methods: a row of each."""
    at, network = f"{norm}-{sigma:g}", getattr(options, f"{norm}_network")
    data = ["--data", options.folder, "--norm", norm]
    drops = ["--schedule", "drops", "--drop-every", str(options.drop_every)]
    recipe = ["--epochs", str(options.epochs), *(drops if options.drop_every else ["--schedule", "cosine"])]
    recipe += ["--seed", str(options.seed)]
    recipe += [] if options.field else ["--batch-size", "64", "--lr", "0.1"]
    run("train", *data, "--network", network, "--sigma", f"{sigma:g}", *recipe, "--out", f"{at}/network")
    accuracy = load_network(options.work / at / "network").history["test_accuracy"]
    yield {"norm": norm, "sigma": sigma, "run": "network", "accuracy": accuracy}

    every = max(1, len(load_dataset(options.folder)) // options.images)
    part = ["--skip", str(every), "--max", str(options.images), "--n", str(options.n)]

    def certify(name: str, method: str, theta: float, *flags: str, seed: int = options.seed) -> dict[str, Any]:
        how = ["--classifier", f"{at}/network", "--method", method, "--sigma", f"{theta:g}", "--seed", str(seed)]
        run("certify", *data, *how, *part, *flags, "--out", f"{at}/{name}")
        return {"norm": norm, "sigma": sigma, "run": name} | row_of(load_results(options.work / at / name))

    thetas = [sigma * factor for factor in options.factors]
    tried: dict[float, float] = {}
    if len(thetas) > 1:  # chosen by other draws than those that certify it
        for theta in thetas:
            yield (row := certify(f"try-{theta:g}", "fixed", theta, seed=options.seed + 1))
            tried[theta] = row["ACR-tilde"]
    best = max(thetas, key=lambda theta: tried.get(theta, 0))
    yield certify(f"fixed-{best:g}", "fixed", best)
    for method in ("isotropic", "ancer"):
        short = SHORT + SHORT_ANCER * (method == "ancer")
        yield certify(method, method, sigma, *([] if options.field else short))
    for method in ("isotropic", "ancer") if options.field else ():
        yield certify(f"{method}-unbounded", method, sigma, "--theta-max", "inf")


def largest_of_all(work: pathlib.Path, norm: str, sigmas: list[float]) -> Iterator[dict[str, Any]]:
    """For each method a row of each image's largest radius over the networks of one norm."""
    for name in ("fixed", "isotropic", "ancer"):
        paths = [work / f"{norm}-{s:g}" / (f"fixed-{s:g}" if name == "fixed" else name) for s in sigmas]
        some = [load_results(path) for path in paths]
        assert all((r["idx"] == some[0]["idx"]).all() for r in some), "runs of different images"
        row = {"norm": norm, "sigma": "largest of all", "run": name, "images": len(some[0].correct)}
        for key, what, by in (("radius", "ACR", "radius"), ("radius_proxy", "ACR-tilde", "proxy radius")):
            largest = np.max([np.where(r.correct, r[key], -np.inf) for r in some], axis=0)
            row[what] = float(np.maximum(largest, 0).mean())
            row[f"accuracy by {by}"] = accuracy_at(largest, norm)
        yield row


def arguments(parser: argparse.ArgumentParser) -> None:
    """The data, and sizes that depend on `--field`."""
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help="with --small: the bundled images, if not given")
    parser.add_argument("--work", help="a folder that keeps networks and runs")
    parser.add_argument("--field", action="store_true", help="the tables of the field, stored as field.json")
    for name, value in USUAL.items():
        many, kind = isinstance(value, list), type(value[0] if isinstance(value, list) else value)
        usually = f"usually {value}, with --field {FIELD[name]}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, nargs="*" if many else None, help=usually)


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """All networks of both norms."""
    if options.field and options.output == "cifar10":
        options.output = "field"
    for name, value in (FIELD if options.field else SMALL if options.small else USUAL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if not (options.folder or options.small):
        raise SystemExit("give the FOLDER of CIFAR-10")
    options.folder = options.folder or "fashion-mnist-subset"
    if pathlib.Path(options.folder).exists():
        options.folder = str(pathlib.Path(options.folder).resolve())
    stored: dict[str, Any] = {"commands": [], "rows": [], "printed": {}}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        options.work = pathlib.Path(options.work or temporary)
        options.work.mkdir(parents=True, exist_ok=True)

        def run(*arguments: str) -> str:
            stored["commands"].append(" ".join(["ancer-jax", *arguments]).replace(options.folder, "FOLDER"))
            print(stored["commands"][-1], flush=True)
            command = [sys.executable, "-m", "ancer_jax.cli", *arguments]
            done = subprocess.run(command, cwd=options.work, check=True, stdout=subprocess.PIPE, text=True)
            stored["seconds"] = round(time.perf_counter() - began)
            return done.stdout.replace(options.folder, "FOLDER")

        for norm in ("l2", "l1"):
            sigmas = getattr(options, f"{norm}_sigmas")
            for sigma in sigmas:
                at, runs = f"{norm}-{sigma:g}", []
                for row in of_network(norm, sigma, options, run):
                    stored["rows"].append(row)
                    runs += [] if row["run"].startswith(("network", "try")) else [f"{at}/{row['run']}"]
                    yield stored
                radii = ",".join(f"{radius:g}" for radius in figures.RADII[norm])
                shown = ["--data", options.folder, "--radii", radii, "--out", f"{at}/report"]
                stored["printed"][at] = run("report", *runs, *shown)
                print(stored["printed"][at], flush=True)
            if len(sigmas) > 1 and len(options.factors) == 1:
                stored["rows"] += largest_of_all(options.work, norm, sigmas)
            yield stored


def lines(found: Found) -> Lines:
    rows = found["results"]["rows"]
    for r in rows:
        case = ", ".join(["CIFAR-10", r["norm"], *([f"sigma {r['sigma']}"] if "sigma" in r else []), r["run"]])
        if r["run"] == "network":
            what, accuracy = f"{case}: accuracy under the noise of its training", r["accuracy"]
            yield Line(what, round_down(accuracy, 3), f"> {LEARNED}", accuracy > LEARNED)
            continue
        cells = {"accuracy": round_share(r["accuracy"], r["images"])} if "accuracy" in r else {}
        cells |= {name: figures.down(r, name) for name in ("ACR", "ACR-tilde", WITHOUT_LEAKY) if name in r}
        what = f"{case}, {r['images']} images, after memory: {'; '.join(cells)}"
        if r["run"] == "ancer" and "accuracy" in r:  # otherwise a figure of no classifier
            same = [o for o in rows if (o["norm"], o.get("sigma")) == (r["norm"], r.get("sigma"))]
            fixed = max(o["ACR-tilde"] for o in same if o["run"].startswith("fixed"))
            (isotropic,) = (o["ACR-tilde"] for o in same if o["run"] == "isotropic")
            holds = r["ACR-tilde"] > isotropic > fixed
            yield Line(what, "; ".join(cells.values()), "ACR-tilde > isotropic > fixed", holds)
        else:
            yield Line(what, "; ".join(cells.values()))


def _table(output: str) -> str:
    """All methods; of fixed thetas the best one."""
    columns, rows, images = ["accuracy", "ACR", "ACR-tilde", "mean", WITHOUT_LEAKY], [], ""
    for network, printed in load(output)["results"]["printed"].items():
        runs = printed_cells(printed)
        best = max((run for run in runs if run.startswith("fixed")), key=lambda run: float(runs[run]["ACR-tilde"]))
        for run in (best, *(run for run in runs if not run.startswith("fixed"))):
            name = run.replace("fixed-", "fixed ").replace("ancer", "ANCER").replace("-unbounded", ", no limit")
            rows.append([f"{network.replace('-', ', sigma ')}, {name}", *(runs[run][column] for column in columns)])
            images = runs[run]["images"]
    return markdown([f"{images} images", *columns[:3], "mean leakage", f"{WITHOUT_LEAKY} thetas"], rows)


def _right(output: str, norm: str) -> str:
    """Test images that a network classifies under one draw of noise."""
    rows = load(output)["results"]["rows"]
    return f"{round_down(100 * next(r for r in rows if (r['norm'], r['run']) == (norm, 'network'))['accuracy'], 1)} %"


def _seconds() -> str:
    seconds = [r["seconds an image"] for r in load("field")["results"]["rows"] if r["run"] != "network"]
    return f"{min(seconds):.0f} to {max(seconds):.0f}"


def _leaky() -> str:
    """Thetas without bound that leak more than 0.1."""
    printed = next(iter(load("field")["results"]["printed"].values()))
    return printed_cells(printed)["ancer-unbounded"]["above 0.1"]


BENCHMARK = Benchmark(
    claim="CIFAR-10 from scratch: trained, and certified by all methods, after memory.",
    takes="2 hours; with `--field` hours on a GPU",
    measure=measure,
    arguments=arguments,
    small_is_judged=False,
    outputs={"cifar10": lines, "field": lines},
    figures={
        "table": lambda: _table("cifar10"),
        "right-l2": lambda: _right("cifar10", "l2"),
        "right-l1": lambda: _right("cifar10", "l1"),
        "field-table": lambda: _table("field"),
        "field-right": lambda: _right("field", "l2"),
        "field-seconds": _seconds,
        "field-leaky": _leaky,
    },
)
