"""Denoised smoothing: a denoiser in front of a ResNet-20 that was trained without noise, on CIFAR-10.

FOLDER holds CIFAR-10's binary files (`ancer-jax fetch cifar10 FOLDER`). A ResNet-20 is trained on clean images (its
noise, 0.001, is none to speak of), and a DnCNN on the squared error, and then further on the classifier's loss, too.
Every 40th test image is certified with the classifier alone, with each of the two denoisers in front, and with the
bundled ResNet-20 that was trained with noise. Networks and runs stay in the folder `--work`, where a second call
continues. With `--small` tiny networks, on the bundled images.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

from ancer_jax import CertifyConfig, Classifier, RunConfig, certify_dataset, devices, load_bundled, load_dataset
from ancer_jax.data import Dataset, select
from ancer_jax.metrics import round_down, round_share
from ancer_jax.models import DnCNN, denoised, load_network
from ancer_jax.report import load_results
from ancer_jax.training import DenoiserConfig, denoiser_state, train_denoiser
from benchmarks import figures
from benchmarks.benchmark import Benchmark, Found, Line, Lines, load, markdown

CLEAN = ["--sigma", "0.001", "--batch-size", "128", "--optimizer", "muon"]
CLEAN += ["--muon-lr", "0.15", "--schedule", "onecycle", "--flip", "alternating"]
TINY = ["--max", "256", "--test-max", "20"]
ALONE, TRAINED = "trained without noise", "trained with noise"
SQUARED, BOTH = "denoiser of the squared error in front", "denoiser of the classifier's loss, too, in front"


def train_clean(options: argparse.Namespace) -> Classifier:
    """The ResNet-20 of clean images."""
    network = os.path.join(options.work, "clean")
    name = "small_cnn" if options.small else "cifar_resnet20"
    size = ["--network", name, "--epochs", str(options.epochs), "--seed", str(options.seed)]
    size += TINY if options.small else []
    command = ["ancer-jax", "train", "--data", options.folder, *CLEAN, *size, "--out", network]
    print(*command, flush=True)
    subprocess.run([sys.executable, "-m", "ancer_jax.cli", *command[1:]], check=True)
    return load_network(network).classifier


def train(name: str, network: nn.Module, data: Dataset, options: argparse.Namespace, **settings: Any) -> Any:
    """Variables of a denoiser, whose state after each epoch is stored in the file `name` of the work folder."""
    start, classifier = settings.pop("start", None), settings.pop("classifier", None)
    config = DenoiserConfig(theta=options.sigma, seed=options.seed, batch_size=options.batch, **settings)
    path, images = pathlib.Path(options.work, f"{name}.msgpack"), np.asarray(data.images)
    state: Any = denoiser_state(network, images, config, variables=start)
    if path.exists():
        state = flax.serialization.from_bytes(state, path.read_bytes())
    began = time.monotonic()
    for state, loss in train_denoiser(network, images, config, classifier=classifier, state=state):  # noqa: B020
        path.write_bytes(flax.serialization.to_bytes(state))
        print(f"{name}, epoch {state.epoch}: loss {loss:.4f}, {time.monotonic() - began:.0f} s", flush=True)
    return state.variables


def _denoise(variables, x, theta):
    return DnCNN().apply(variables, x)


def _denoise_tiny(variables, x, theta):
    return DnCNN(2, 4).apply(variables, x)


def row_of(name: str, classifier: Classifier, test: Dataset, options: argparse.Namespace) -> dict[str, Any]:
    """Certify a classifier under white noise."""
    config = RunConfig(theta=options.sigma, certify=CertifyConfig(n=options.n), seed=options.seed)
    run = os.path.join(options.work, f"run-{name}")
    certify_dataset(classifier, test, config, out=run)
    results = load_results(run)
    clean = jax.jit(Classifier.__call__)(classifier, jnp.asarray(test.images)).argmax(axis=-1)
    return {"name": name, "clean accuracy": float((clean == test.labels).mean()), **figures.summary(results)}


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """All rows."""
    if not (options.folder or options.small):
        raise SystemExit("give the FOLDER of CIFAR-10")
    devices.use_all_cores()
    options.folder = options.folder or "fashion-mnist-subset"
    bundled = "fashion-mnist-cnn-l2-0.25" if options.small else f"cifar10-resnet20-l2-{options.sigma:g}"
    network, denoise = (DnCNN(2, 4), _denoise_tiny) if options.small else (DnCNN(), _denoise)
    with tempfile.TemporaryDirectory() as temporary:
        options.work = options.work or temporary
        data = load_dataset(options.folder, split="train")
        test = select(load_dataset(options.folder), skip=options.skip, max_images=options.images)
        alone = train_clean(options)
        first = train("squared", network, data, options, epochs=options.squared_epochs)
        more = {"classifier": alone, "classifier_weight": 1.0, "learning_rate": 3e-4, "epochs": options.both_epochs}
        second = train("both", network, data, options, start=first, **more)
        classifiers = {
            ALONE: alone,
            SQUARED: denoised(denoise, first, alone, options.sigma),
            BOTH: denoised(denoise, second, alone, options.sigma),
            TRAINED: load_bundled(bundled).classifier,
        }
        rows: list[dict[str, Any]] = []
        for name, classifier in classifiers.items():
            rows.append(row_of(name, classifier, test, options))
            yield {"sigma": options.sigma, "n": options.n, "images": len(test), "rows": rows}


def lines(found: Found) -> Lines:
    results = found["results"]
    by_name = {r["name"]: r for r in results["rows"]}
    for name, r in by_name.items():
        shares = "; ".join(round_share(r[key], results["images"]) for key in ("clean accuracy", "accuracy"))
        what = f"{name}, sigma {results['sigma']:g}, {results['images']} images: clean accuracy; certified; ACR"
        better = name in (SQUARED, BOTH)
        above = r["ACR"] > by_name[ALONE]["ACR"] if better else None
        yield Line(what, f"{shares}; {round_down(r['ACR'], 3)}", f"ACR above that of {ALONE}" if better else "", above)


def _table() -> str:
    results = load("denoised")["results"]
    rows = []
    for r in results["rows"]:
        shares = [round_share(r[key], results["images"]) for key in ("clean accuracy", "accuracy")]
        rows.append([r["name"], *shares, round_down(r["ACR"], 3)])
    return markdown(["ResNet-20", "accuracy without noise", "certified accuracy", "ACR"], rows)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The data, and where networks and runs stay."""
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help="with --small: the bundled images, if not given")
    parser.add_argument("--work", help="a folder that keeps networks and runs")
    parser.add_argument("--sigma", type=float, default=0.25)


BENCHMARK = Benchmark(
    claim="A denoiser makes a classifier that was trained without noise worth smoothing.",
    takes="90 minutes",
    measure=measure,
    sizes={
        "epochs": (1, 10),
        "squared_epochs": (1, 5),
        "both_epochs": (1, 3),
        "batch": (64, 128),
        "skip": (250, 40),
        "images": (2, 250),
        "n": (100, 1000),
    },
    arguments=arguments,
    small_is_judged=False,
    outputs={"denoised": lines},
    figures={"table": _table},
)
