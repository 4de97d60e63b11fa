"""Train the CIFAR-10 networks that ship with the package, certify them, and make their files.

FOLDER holds CIFAR-10's binary files (`ancer-jax fetch cifar10 FOLDER`). Each network is a ResNet-20, trained on all
training images by `ancer-jax train`; every 20th test image is certified by `ancer-jax certify` with the theta of the
training; then `ship_model` writes the variables and the card into the package. Networks and runs stay in the folder
`--work`, where a second call continues at any point. `--models` names some of the networks, and `--as` another raw
output for them. With `--small` one tiny training, on the bundled images; the package stays as it is.

Seconds of training are those of the median epoch times the epochs, so that an interruption does not count.

Bars: at sigma 0.5, accuracy and ACR of at least 95 % of those of the public ResNet-20 that Jeong and Shin (2020)
trained for 150 epochs: as published, from all test images with n = 100,000, and with our images and our n
(`public_networks`).
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from ancer_jax.metrics import round_down, round_share
from ancer_jax.report import load_results
from benchmarks import figures
from benchmarks.benchmark import RESULTS, Benchmark, Found, Line, Lines, load, markdown
from benchmarks.claims.public_networks import DRAWS
from benchmarks.data import ship_model

NETWORK = "cifar10-resnet20"
MODELS: dict[str, list[str]] = {
    f"{NETWORK}-l2-0.5": ["--sigma", "0.5"],
    f"{NETWORK}-l2-0.25": ["--sigma", "0.25"],
    f"{NETWORK}-l2-0.5-consistency": ["--sigma", "0.5", "--method", "consistency"],
    f"{NETWORK}-l2-0.25-consistency": ["--sigma", "0.25", "--method", "consistency"],
    f"{NETWORK}-l1-0.5": ["--norm", "l1", "--sigma", "0.5"],
}
RECIPE = ["--network", "cifar_resnet20", "--batch-size", "128", "--optimizer", "muon", "--muon-lr", "0.15"]
RECIPE += ["--schedule", "onecycle", "--flip", "alternating"]
TINY = ["--max", "256", "--test-max", "20", "--mean", "0.286", "--std", "0.353"]
NEAR = 0.95
OUTPUTS = (
    "cifar10_models",
    "cifar10_models-consistency",
    "cifar10_models-consistency-0.25",
    "cifar10_models-l1",
)


def ancer_jax(*arguments: str) -> None:
    """Run the command line, and print what it prints."""
    print("ancer-jax", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "ancer_jax.cli", *arguments], check=True)


def row_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train, certify and ship one network."""
    network, run = (os.path.join(options.work, kind, name) for kind in ("nets", "runs"))
    data, norm = ["--data", options.folder], name.removeprefix(f"{NETWORK}-")[:2]
    recipe = [*RECIPE, *MODELS[name], "--epochs", str(options.epochs), *(TINY if options.small else [])]
    ancer_jax("train", *data, *recipe, "--seed", str(options.seed), "--out", network)
    part = ["--skip", str(options.skip), "--max", str(options.images), "--n", str(options.n)]
    how = ["--method", "fixed", "--norm", norm, "--classifier", network, "--seed", str(options.seed)]
    ancer_jax("certify", *data, *how, *part, "--out", run)
    ship = {"network": network, "name": name, "data": options.folder, "certified": run}
    ship_model.measure(argparse.Namespace(**ship, seed=options.seed, small=options.small))
    results = load_results(run)
    with open(os.path.join(network, "training.tsv")) as file:
        seconds = np.loadtxt(file, skiprows=1, ndmin=2)[:, -1]
    assert results.seconds is not None  # a run has them
    radius = np.where(results.correct, results["radius"], -np.inf)
    return {
        "name": name,
        "epochs": options.epochs,
        "images": len(radius),
        **figures.summary(results),
        "accuracy by radius": {str(at): float((radius >= at).mean()) for at in figures.RADII[norm]},
        "seconds of training": float(np.median(seconds)) * options.epochs,
        "seconds of certification": results.seconds * len(radius),
    }


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """All networks."""
    if not (options.folder or options.small):
        raise SystemExit("give the FOLDER of CIFAR-10")
    options.folder = options.folder or "fashion-mnist-subset"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        options.work = str(pathlib.Path(options.work or temporary).resolve())
        for name in options.models or (list(MODELS)[2:3] if options.small else MODELS):
            rows.append(row_of(name, options))
            yield {"skip": options.skip, "n": options.n, "rows": rows}


def public(name: str) -> list[dict[str, Any]]:
    """The same network made elsewhere: with our images and our n, and as published; empty if there is none."""
    if not (RESULTS / "public_networks.json").exists():  # a rehearsal that writes elsewhere has no bars
        return []
    rows = [r for r in load("public_networks")["results"]["rows"] if r["name"] == name]
    return [r for r in reversed(rows) if (r["which"] == "all") == (r["n"] == DRAWS)]


def lines(found: Found) -> Lines:
    for r in found["results"]["rows"]:
        what = f"{r['name']}, {r['images']} images: accuracy; ACR"
        cells = f"{round_share(r['accuracy'], r['images'])}; {round_down(r['ACR'], 3)}"
        others = public(r["name"])
        for p in others:
            holds = r["accuracy"] >= NEAR * p["accuracy"] and r["ACR"] >= NEAR * p["ACR"]
            bar = f">= {NEAR:.0%} of {figures.down(p, 'accuracy', 'ACR')} (n = {p['n']:,})"
            yield Line(what, cells, bar, holds)
        if not others:
            yield Line(what, cells)


def _table() -> str:
    """The networks, beside the public ones."""
    rows, there = [], [output for output in OUTPUTS if (RESULTS / f"{output}.json").exists()]
    for r in (r for output in there for r in load(output)["results"]["rows"]):
        others = [figures.down(p, "accuracy", "ACR") for p in public(r["name"])] or ["none", "none"]
        cells = [round_share(r["accuracy"], r["images"]), round_down(r["ACR"], 3), *others]
        minutes = (f"{r[f'seconds of {what}'] / 60:.0f}" for what in ("training", "certification"))
        rows.append([f"`{r['name']}`", *cells, *minutes])
    header = ["model", "certified accuracy", "ACR", "public network, same images and n: accuracy; ACR"]
    header += ["as published: accuracy; ACR", "minutes of training", "of certification"]
    return markdown(header, rows)


def _consistency() -> str:
    """Ours at sigma 0.5."""
    r = next(r for r in load("cifar10_models-consistency")["results"]["rows"] if "l2-0.5" in r["name"])
    return f"accuracy {round_share(r['accuracy'], r['images'])}, ACR {round_down(r['ACR'], 3)}"


def _public_consistency(which: int) -> str:
    """The public network's at sigma 0.5: 0, with our images and our n; 1, as published."""
    p = public(f"{NETWORK}-l2-0.5-consistency")[which]
    return f"accuracy {round_down(p['accuracy'], 3)}, ACR {round_down(p['ACR'], 3)}"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The data, and where networks and runs stay."""
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help="with --small: the bundled images, if not given")
    parser.add_argument("--work", help="a folder that keeps networks and runs")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="default: all")


BENCHMARK = Benchmark(
    claim="ResNet-20s trained here in 30 epochs come near the public ones of 150 epochs.",
    takes="9 hours",
    measure=measure,
    sizes={"epochs": (1, 30), "skip": (1, 20), "images": (2, 500), "n": (100, 10_000)},
    arguments=arguments,
    small_is_judged=False,
    outputs=dict.fromkeys(OUTPUTS, lines),
    figures={
        "table": _table,
        "consistency": _consistency,
        "consistency-public": lambda: _public_consistency(0),
        "consistency-published": lambda: _public_consistency(1),
    },
)
