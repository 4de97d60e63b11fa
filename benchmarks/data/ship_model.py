"""Make the files of a bundled model from a trained network, and show the cards of all bundled models.

NETWORK is the folder of a finished `ancer-jax train`, or the name of a bundled model, which then gets a new card. NAME
consists of data, network, norm and theta, and of the training method where it is not noise augmentation:
`cifar10-resnet20-l2-0.25-consistency`. If it was trained with a theta map, theta is the smallest one, and the name ends
with "spectral" or, for a map that was learned with a bundled model, "coloured": `fashion-mnist-cnn-l2-0.25-coloured`.

Accuracy is measured on all test images of `--data`: without noise, and under one draw of the noise of training for
each image. ACR comes from the run directory `--certified`, which must be of this network. With `--small` the package
stays as it is.
"""

import argparse
import dataclasses
import datetime
import functools
import hashlib
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
from jax.typing import ArrayLike

import ancer_jax.models
from ancer_jax.basis import Pixels
from ancer_jax.cli.learn import LearnTheta
from ancer_jax.data import Dataset, load_dataset
from ancer_jax.metrics import round_down, round_share
from ancer_jax.models import BundledModel, Checkpoint, bundled_models, load_bundled, load_network
from ancer_jax.models.checkpoints import describe, hash_variables
from ancer_jax.report import load_results
from ancer_jax.runs import Run, read_run
from ancer_jax.search import ThetaMap, save_theta_map
from ancer_jax.smoothing import Classifier, Noise, make_noise
from ancer_jax.smoothing.classifier import fingerprint
from ancer_jax.training import PRESETS
from benchmarks.benchmark import RESULTS, Benchmark, markdown

DATA = {"cifar10": "CIFAR-10", "fashion-mnist": "Fashion-MNIST"}
NAME = re.compile(
    rf"(?P<data>{'|'.join(DATA)})-\w+-(?P<norm>l[12])-(?P<theta>[\d.]+)"
    r"(-(?P<method>(?!spectral|coloured)\w+))?(-(?P<map>spectral|coloured))?"
)
FLAGS = {"theta": "sigma", "learning_rate": "lr", "muon_learning_rate": "muon_lr", "warmup_epochs": "warmup"}
BATCH = 500


def place(options: argparse.Namespace, package: types.ModuleType, name: str) -> pathlib.Path:
    """A file of the package; in a rehearsal one beside the raw outputs."""
    top = pathlib.Path(package.__file__ or "").parent
    path = RESULTS / f"small-{pathlib.Path(name).name}" if options.small else top / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def ship(options: argparse.Namespace, name: str, checkpoint: Checkpoint, card: Mapping[str, Any]) -> None:
    """Write the files of a bundled model, and print the card."""
    variables = jax.tree.map(np.asarray, checkpoint.variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    description = {"checkpoint": describe(checkpoint), "card": card}
    serialized = flax.serialization.msgpack_serialize(variables)
    place(options, ancer_jax.models, f"weights/{name}.msgpack").write_bytes(serialized)
    place(options, ancer_jax.models, f"weights/{name}.json").write_text(json.dumps(description, indent=2) + "\n")
    if checkpoint.theta_map is not None:
        save_theta_map(checkpoint.theta_map, place(options, ancer_jax.models, f"weights/{name}.npz"))
    print(BundledModel(name, checkpoint, card))


def accuracies(checkpoint: Checkpoint, test: Dataset, seed: int) -> dict[str, Any]:
    """The accuracy on all images of a data set: without noise, and under one draw of noise for each image."""
    theta_map, key, right = checkpoint.theta_map, jax.random.key(seed), np.zeros(2, int)
    theta, basis = (checkpoint.theta, Pixels()) if theta_map is None else (theta_map.theta, theta_map.basis)
    noise = make_noise(checkpoint.norm, checkpoint.history.get("noise"), basis=basis)
    for start in range(0, len(test), BATCH):
        part = slice(start, start + BATCH)
        ids, images, labels = test.ids[part], test.images[part], test.labels[part]
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.asarray(ids, jnp.uint32))
        right += np.asarray(_right(checkpoint.classifier, keys, images, labels, theta, noise=noise))
    clean, noisy = (right / len(test)).tolist()
    return {"test_images": len(test), "clean_accuracy": clean, "noisy_accuracy": noisy}


@functools.partial(jax.jit, static_argnames="noise")
def _right(
    classifier: Classifier, keys: jax.Array, images: jax.Array, labels: jax.Array, theta: ArrayLike, *, noise: Noise
) -> jax.Array:
    """How many images the classifier answers with their label, [2]: without noise and with it."""
    perturb = lambda key, x: noise.perturb(key, 0, x, jnp.broadcast_to(theta, x.shape))
    noisy = jax.vmap(perturb)(keys, images)
    return jnp.stack([(classifier(x).argmax(-1) == labels).sum() for x in (images, noisy)])


def certified(folder: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """ACR and certified accuracy of a run directory, whose network must be this one."""
    results, run = load_results(folder), read_run(folder)
    config, platform = run.config, run.settings["platform"]
    if config.exact or config.sampling is not None or not results.finished:
        raise SystemExit(f"{folder}: not a finished run with a fixed number of random draws")
    _check_noise(run, checkpoint)
    if platform == jax.default_backend() == "cpu":
        if run.settings["classifier"] != fingerprint(checkpoint.classifier, np.zeros(checkpoint.image_shape)):
            raise SystemExit(f"{folder} is a run of another network, or of other versions of the code or JAX")
    else:
        print(f"{folder} was made on {platform}: only a run on CPUs can be checked to be of this network")
    return {
        "acr": results.acr("radius"),
        "acr_tilde": results.acr("radius_proxy"),
        "accuracy": float(results.correct.mean()),
        "images": len(results.correct),
        "method": config.method,
        "theta": None if config.method == "universal" else config.theta,
        "n": config.certify.n,
        "alpha": config.certify.alpha,
    }


def _check_noise(run: Run, checkpoint: Checkpoint) -> None:
    """SystemExit if a network that was trained with a theta map was certified with another one."""
    theta_map, config = checkpoint.theta_map, run.config
    if theta_map is None:
        return
    digest = hashlib.sha256(theta_map.theta.tobytes()).hexdigest()
    if config.basis != theta_map.basis or run.settings.get("theta_map") != digest:
        raise SystemExit(f"{run.path} is a run with another theta map than that of training")


def _for_others(theta_map: ThetaMap, data: str) -> ThetaMap:
    """A theta map whose history names no folders: the data set, and the bundled model that it was learned with."""
    history = {**theta_map.history, "data": data}
    if not isinstance(history["start"], str):
        raise SystemExit("its theta map was learned from another one, which a card cannot say yet")
    if "classifier" in history and history["classifier"] not in bundled_models():
        used = hash_variables(load_network(history["classifier"]).variables)
        same = [m.name for m in _models() if hash_variables(m.checkpoint.variables) == used]
        if not same:
            raise SystemExit(f"{history['classifier']}, with which its theta map was learned, is not bundled")
        history["classifier"] = same[0]
    return dataclasses.replace(theta_map, history=history)


def theta_command(checkpoint: Checkpoint, data: str, name: str) -> str:
    """The `ancer-jax learn-theta` that makes its theta map: the flags that are not defaults."""
    usual = {field.name: field.default for field in dataclasses.fields(LearnTheta)} | {"basis": "cosine"}
    words = ["ancer-jax", "learn-theta", "--data", f"data/{data}"]
    assert checkpoint.theta_map is not None
    for field, value in checkpoint.theta_map.history.items():
        if field != "data" and field in usual and value != usual[field]:
            words += [f"--{field.replace('_', '-')}", str(value)]
    return " ".join([*words, "--out", f"nets/{name}.npz"])


def command(checkpoint: Checkpoint, data: str, name: str) -> str:
    """The `ancer-jax train` that trains such a network: the flags that its method's published settings do not imply."""
    history, preset = checkpoint.history, dataclasses.asdict(PRESETS[checkpoint.history["method"]])
    settings = {field: history[field] for field, usual in preset.items() if history.get(field) not in (usual, None)}
    if not history["drop_every"]:  # of the schedule drops
        settings.pop("drop_every", None)
    settings = {"method": history["method"], "theta": checkpoint.theta} | settings
    if checkpoint.theta_map is not None:
        del settings["theta"]
        settings["theta_map"] = f"nets/{name}.npz"
    unusual = lambda field, value: field in ("mean", "std") or value == "bfloat16"
    settings |= {field: value for field, value in checkpoint.attributes.items() if unusual(field, value)}
    words = ["ancer-jax", "train", "--data", f"data/{data}", "--network", checkpoint.name]
    for field, value in settings.items():
        words += [f"--{FLAGS.get(field, field).replace('_', '-')}"]
        words += map(str, np.atleast_1d(value).tolist())
    train = " ".join([*words, "--out", f"nets/{name}"])
    return train if checkpoint.theta_map is None else f"{theta_command(checkpoint, data, name)} && {train}"


def today() -> dict[str, Any]:
    """Date and versions for a card."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    return {"date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}", "versions": versions}


def measure(options: argparse.Namespace) -> tuple[()]:
    """Measure and write the card; there is no raw output."""
    old = load_bundled(options.network) if options.network in bundled_models() else None
    checkpoint = old.checkpoint if old else load_network(options.network)
    parts, history = NAME.fullmatch(options.name), dict(checkpoint.history)
    theta_map = checkpoint.theta_map
    theta = checkpoint.theta if theta_map is None else float(f"{theta_map.theta.min():.3g}")
    if not parts or (parts["norm"], float(parts["theta"])) != (checkpoint.norm, theta):
        of = f"trained with {checkpoint.norm} noise of {theta}"
        raise SystemExit(f"{options.name} is not DATA-NETWORK-NORM-THETA[-METHOD][-MAP] of a network {of}")
    made = theta_map and ("coloured" if theta_map.history.get("steps") else "spectral")
    if parts["map"] != made:
        raise SystemExit(f"{options.name} must end with the kind of its theta map, {made}")
    if (parts["method"] or "augmentation") != history.get("method"):
        raise SystemExit(f"{options.name} names another training method than the network's, {history.get('method')}")
    history["data"] = DATA[parts["data"]]  # not the folder of whoever trained it
    theta_map = theta_map and _for_others(theta_map, history["data"])
    checkpoint = dataclasses.replace(checkpoint, history=history, theta_map=theta_map)
    card: dict[str, Any] = {
        "data": DATA[parts["data"]],
        "command": old.card["command"] if old else command(checkpoint, parts["data"], options.name),
        "method": history["method"],
        "epochs": history["epochs"],
        **accuracies(checkpoint, load_dataset(options.data), options.seed),
        "certified": certified(options.certified, checkpoint) if options.certified else None,
        **today(),
    }
    ship(options, options.name, checkpoint, card)
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
        clean, noisy = (round_share(card[f"{kind}_accuracy"], card["test_images"]) for kind in ("clean", "noisy"))
        acr = f"{round_down(found['acr'], 3)} ({found['images']:,} images)" if found else "not measured"
        method = f"{card['method']}, {card['epochs']} epochs"
        rows.append([f"[`{model.name}`](#{model.name.replace('.', '')})", card["data"], method, clean, noisy, acr])
    return markdown(["name", "data", "training", "clean accuracy", "accuracy under noise", "ACR"], rows)


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
