"""Make the two files of a bundled model from a trained network, and show the cards of all bundled models.

NETWORK is the folder of a finished `ancer-jax train`, or the name of a bundled model, which then gets a new card. NAME
consists of data, network, norm and theta, and of the training method where it is not noise augmentation:
`cifar10-resnet20-l2-0.25-consistency`. Accuracy is measured on all test images of `--data`: without noise, and under
one draw of the noise of the training for each image. ACR comes from the run directory `--certified`, which must be of
this network. With `--small` the package stays as it is.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import pathlib
import re
import types
from collections.abc import Mapping
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

import ancer_jax.models
from ancer_jax.data import Dataset, load_dataset
from ancer_jax.metrics import round_down
from ancer_jax.models import BundledModel, Checkpoint, bundled_models, load_bundled, load_network
from ancer_jax.models.checkpoints import describe
from ancer_jax.report import load_results
from ancer_jax.runs import read_run
from ancer_jax.smoothing import Classifier, Noise, make_noise
from ancer_jax.smoothing.classifier import fingerprint
from ancer_jax.training import PRESETS
from benchmarks.benchmark import RESULTS, Benchmark, markdown
from benchmarks.figures import share

DATA = {"cifar10": "CIFAR-10", "fashion-mnist": "Fashion-MNIST"}
NAME = re.compile(rf"(?P<data>{'|'.join(DATA)})-\w+-(?P<norm>l[12])-(?P<theta>[\d.]+)(-(?P<method>\w+))?")
FLAGS = {"theta": "sigma", "learning_rate": "lr", "muon_learning_rate": "muon_lr", "warmup_epochs": "warmup"}
BATCH = 500


def place(options: argparse.Namespace, package: types.ModuleType, name: str) -> pathlib.Path:
    """A file of the package; in a rehearsal one beside the raw outputs."""
    top = pathlib.Path(package.__file__ or "").parent
    path = RESULTS / f"small-{pathlib.Path(name).name}" if options.small else top / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def ship(options: argparse.Namespace, name: str, checkpoint: Checkpoint, card: Mapping[str, Any]) -> None:
    """Write the two files of a bundled model, and print the card."""
    variables = jax.tree.map(np.asarray, checkpoint.variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    description = {"checkpoint": describe(checkpoint), "card": card}
    serialized = flax.serialization.msgpack_serialize(variables)
    place(options, ancer_jax.models, f"weights/{name}.msgpack").write_bytes(serialized)
    place(options, ancer_jax.models, f"weights/{name}.json").write_text(json.dumps(description, indent=2) + "\n")
    print(BundledModel(name, checkpoint, card))


def accuracies(checkpoint: Checkpoint, test: Dataset, seed: int) -> dict[str, Any]:
    """The accuracy on all images of a data set: without noise, and under one draw of noise for each image."""
    noise, key = make_noise(checkpoint.norm, checkpoint.history.get("noise")), jax.random.key(seed)
    right = np.zeros(2, int)
    for start in range(0, len(test), BATCH):
        part = slice(start, start + BATCH)
        ids, images, labels = test.ids[part], test.images[part], test.labels[part]
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.asarray(ids, jnp.uint32))
        right += np.asarray(_right(checkpoint.classifier, keys, images, labels, checkpoint.theta, noise=noise))
    clean, noisy = (right / len(test)).tolist()
    return {"test_images": len(test), "clean_accuracy": clean, "noisy_accuracy": noisy}


@functools.partial(jax.jit, static_argnames="noise")
def _right(
    classifier: Classifier, keys: jax.Array, images: jax.Array, labels: jax.Array, theta: float, *, noise: Noise
) -> jax.Array:
    """How many images the classifier answers with their label, [2]: without noise and with it."""
    perturb = lambda key, x: noise.perturb(key, 0, x, jnp.full(x.shape, theta))
    noisy = jax.vmap(perturb)(keys, images)
    return jnp.stack([(classifier(x).argmax(-1) == labels).sum() for x in (images, noisy)])


def certified(folder: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """ACR and certified accuracy of a run directory, whose network must be this one."""
    results, run = load_results(folder), read_run(folder)
    config, platform = run.config, run.settings["platform"]
    if config.exact or config.sampling is not None or not results.finished:
        raise SystemExit(f"{folder}: not a finished run with a fixed number of random draws")
    if platform == jax.default_backend() == "cpu":
        if run.settings["classifier"] != fingerprint(checkpoint.classifier, np.zeros(checkpoint.image_shape)):
            raise SystemExit(f"{folder} is a run of another network, or of other versions of the code or JAX")
    else:
        print(f"{folder} was made on {platform}: only a run on CPUs can be checked to be of this network")
    return {
        "acr": results.acr("radius"),
        "accuracy": float(results.correct.mean()),
        "images": len(results.correct),
        "method": config.method,
        "theta": config.theta,
        "n": config.certify.n,
        "alpha": config.certify.alpha,
    }


def command(checkpoint: Checkpoint, data: str, name: str) -> str:
    """The `ancer-jax train` that trains such a network: the flags that its method's published settings do not imply."""
    history, preset = checkpoint.history, dataclasses.asdict(PRESETS[checkpoint.history["method"]])
    settings = {field: history[field] for field, usual in preset.items() if history.get(field) not in (usual, None)}
    if not history["drop_every"]:  # of the schedule drops
        settings.pop("drop_every", None)
    settings = {"method": history["method"], "theta": checkpoint.theta} | settings
    unusual = lambda field, value: field in ("mean", "std") or value == "bfloat16"
    settings |= {field: value for field, value in checkpoint.attributes.items() if unusual(field, value)}
    words = ["ancer-jax", "train", "--data", f"data/{data}", "--network", checkpoint.name]
    for field, value in settings.items():
        words += [f"--{FLAGS.get(field, field).replace('_', '-')}"]
        words += map(str, np.atleast_1d(value).tolist())
    return " ".join([*words, "--out", f"nets/{name}"])


def today() -> dict[str, Any]:
    """Date and versions for a card."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    return {"date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}", "versions": versions}


def measure(options: argparse.Namespace) -> tuple[()]:
    """Measure and write the card; there is no raw output."""
    old = load_bundled(options.network) if options.network in bundled_models() else None
    checkpoint = old.checkpoint if old else load_network(options.network)
    parts, history = NAME.fullmatch(options.name), dict(checkpoint.history)
    if not parts or (parts["norm"], float(parts["theta"])) != (checkpoint.norm, checkpoint.theta):
        of = f"trained with {checkpoint.norm} noise of {checkpoint.theta}"
        raise SystemExit(f"{options.name} is not DATA-NETWORK-NORM-THETA[-METHOD] of a network {of}")
    if (parts["method"] or "augmentation") != history.get("method"):
        raise SystemExit(f"{options.name} names another training method than the network's, {history.get('method')}")
    history["data"] = DATA[parts["data"]]  # not the folder of whoever trained it
    card: dict[str, Any] = {
        "data": DATA[parts["data"]],
        "command": old.card["command"] if old else command(checkpoint, parts["data"], options.name),
        "method": history["method"],
        "epochs": history["epochs"],
        **accuracies(checkpoint, load_dataset(options.data), options.seed),
        "certified": certified(options.certified, checkpoint) if options.certified else None,
        **today(),
    }
    ship(options, options.name, dataclasses.replace(checkpoint, history=history), card)
    return ()


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("network", metavar="NETWORK")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--data", required=True, help="the data set; its test images are classified")
    parser.add_argument("--certified", metavar="RUN", help="run directory of ancer-jax certify")


def _models() -> list[BundledModel]:
    return [load_bundled(name) for name in bundled_models()]


def _table() -> str:
    """All bundled models, a line each."""
    rows = []
    for model in _models():
        card, found = model.card, model.card["certified"]
        clean, noisy = (share(card[f"{kind}_accuracy"], card["test_images"]) for kind in ("clean", "noisy"))
        acr = f"{round_down(found['acr'], 3)} ({found['images']:,} images)" if found else "not measured"
        method = f"{card['method']}, {card['epochs']} epochs"
        rows.append([f"[`{model.name}`](#{model.name.replace('.', '')})", card["data"], method, clean, noisy, acr])
    return markdown(["name", "data", "training", "accuracy", "under its noise", "ACR"], rows)


def _cards() -> str:
    """The card of each bundled model, a section each."""
    sections = []
    for model in _models():
        summary = model.summary | {"command": f"`{model.summary['command']}`"}
        sections.append(f"### {model.name}\n\n{markdown(['', ''], (list(row) for row in summary.items()))}")
    return "\n\n".join(sections)


BENCHMARK = Benchmark(
    claim="Makes the files of a bundled model from a trained network.",
    takes="1 minute",
    measure=measure,
    arguments=arguments,
    figures={"table": _table, "cards": _cards},
)
