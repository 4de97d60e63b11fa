"""ACR after each training method, on the bundled data set, at equal epochs.

Trains the small network on the 2,000 bundled Fashion-MNIST training images by each method (Gaussian noise of 0.25, one
learning rate and schedule), and certifies every second of the 500 test images under fixed noise (n = 2,000, alpha =
0.001). Noise augmentation is also run with as many noisy copies as MACER takes, to show what the copies alone gain.
SmoothAdv and MACER, averaged over the seeds, must beat plain noise augmentation.

The flag `--volume` measures training for certified volume in the same way, against noise augmentation and the most
similar method of the field, all with the same number of noisy copies of an image: Gaussian noise of 0.25 (l2), and
uniform noise of 0.5 (l1), for which there is no MACER. Volume must beat augmentation in both norms.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

import ancer_jax as aj
from ancer_jax.data import load_dataset, select
from ancer_jax.metrics import round_down
from ancer_jax.models import make_network
from ancer_jax.report import load_results
from ancer_jax.training import HISTORY, PRESETS, train
from benchmarks.benchmark import Benchmark, Found, Line, Lines, load, markdown

# The published settings are for 50,000 images and 90 epochs and more. Here all methods have one rate, small batches and
# small weights, and SmoothAdv's attack takes four steps in a larger ball.
COMMON = {"batch_size": 50, "learning_rate": 0.02, "schedule": "cosine", "drop_every": 0, "shift": 2, "theta": 0.25}
L2, L1 = {"copies": 8, "norm": "l2", "theta": 0.25}, {"copies": 8, "norm": "l1", "theta": 0.5}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "training": {
        "augmentation": {},
        "augmentation, 8 copies": {"copies": 8},
        "smoothadv": {"epsilon": 0.5, "attack_steps": 4, "warmup_epochs": 10},
        "macer": {"copies": 8, "weight": 2.0},
        "consistency": {"weight": 5.0},
        "stability": {"weight": 2.0},
    },
    "volume_training": {
        "l2, augmentation, 8 copies": L2,
        "l2, macer": L2 | {"weight": 2.0},
        "l2, volume": L2 | {"weight": 8.0},
        "l1, augmentation, 8 copies": L1,
        "l1, stability, 8 copies": L1 | {"weight": 2.0},
        "l1, volume": L1 | {"weight": 8.0},
    },
}
MUST_BEAT = {
    "smoothadv": "augmentation",
    "macer": "augmentation",
    "l2, volume": "l2, augmentation, 8 copies",
    "l1, volume": "l1, augmentation, 8 copies",
}


def row_of(name: str, settings: dict[str, Any], seed: int, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train and certify."""
    preset = next(preset for method, preset in PRESETS.items() if method in name)
    config = dataclasses.replace(preset, epochs=options.epochs, seed=seed, **(COMMON | settings))
    data, test = load_dataset("fashion-mnist-subset", split="train"), load_dataset("fashion-mnist-subset")
    network = make_network("small_cnn")
    state = train(network, (data, test), config, out=f"{folder}/{name}-{seed}")
    history = dict(zip(HISTORY, state.history.T, strict=True))
    classifier = aj.from_linen(network, state.variables, num_classes=10)
    run = aj.RunConfig(config.norm, "fixed", config.theta, aj.CertifyConfig(n=2_000))
    part = select(test, skip=len(test) // options.images, max_images=options.images)
    aj.certify_dataset(classifier, part, run, out=f"{folder}/run-{name}-{seed}")
    results = load_results(f"{folder}/run-{name}-{seed}")
    return {
        "method": name,
        "seed": seed,
        "noisy_accuracy": float(history["test_accuracy"][-1]),
        "certified_accuracy_0.5": float((results.correct & (results["radius"] >= 0.5)).mean()),
        "acr": results.acr("radius"),
        "seconds": float(history["seconds"].sum()),
    }


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """All methods, with all seeds."""
    if options.volume and options.output == "training":
        options.output = "volume_training"
    settings = SETTINGS["volume_training" if options.volume else "training"]
    rows, acr = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name in settings:
            for seed in options.seeds:
                rows.append(row_of(name, settings[name], seed, folder, options))
                print(rows[-1], flush=True)
                acr[name] = float(np.mean([row["acr"] for row in rows if row["method"] == name]))
                yield {"epochs": options.epochs, "common": COMMON, "settings": settings, "rows": rows, "acr": acr}


def lines(found: Found) -> Lines:
    acr = found["results"]["acr"]
    for name in acr:
        what = f"ACR after {found['results']['epochs']} epochs, {name}, mean of {len(found['seed'])} seeds"
        if name in MUST_BEAT:
            yield Line(what, round_down(acr[name], 3), "> augmentation", acr[name] > acr[MUST_BEAT[name]])
        else:
            yield Line(what, round_down(acr[name], 3))


NAMES = {"smoothadv": "SmoothAdv", "macer": "MACER", "consistency": "Consistency"}


def _table() -> str:
    acr: dict[str, float] = load("training")["results"]["acr"]
    return markdown(["method", "ACR"], ([NAMES.get(name, name), round_down(value, 3)] for name, value in acr.items()))


def _volume_table() -> str:
    acr = load("volume_training")["results"]["acr"]
    methods, rows = ("augmentation, 8 copies", "macer", "stability, 8 copies", "volume"), []
    for norm, noise in (("l2", "sigma 0.25"), ("l1", "half-width 0.5")):
        found = (acr.get(f"{norm}, {method}") for method in methods)
        rows.append([f"{norm}, {noise}", *("-" if value is None else round_down(value, 3) for value in found)])
    return markdown(["", *(NAMES.get(method, method) for method in methods)], rows)


BENCHMARK = Benchmark(
    claim="ACR after each training method, at equal epochs: SmoothAdv, MACER and volume against noise augmentation.",
    takes="15 minutes; with `--volume` 30",
    measure=measure,
    sizes={"epochs": (1, 20), "images": (10, 250), "seeds": ([0], [0, 1, 2])},
    arguments=lambda parser: parser.add_argument("--volume", action="store_true", help="train for certified volume"),
    small_is_judged=False,
    outputs={"training": lines, "volume_training": lines},
    figures={"table": _table, "volume-table": _volume_table},
)
