"""Make the data that ships inside the package: the Fashion-MNIST subset and two classifiers trained with noise.

They are made from Fashion-MNIST's four idx files (Debian: package dataset-fashion-mnist). Training is noise
augmentation (Cohen et al. 2019, section 3.3): one fresh draw of the noise for each image, cross-entropy, Adam with a
cosine schedule. Everything is drawn from one seed; another machine or another version of XLA gives other last digits.
With `--small` the package stays as it is.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

import ancer_jax.data
from ancer_jax.data.loading import load_dataset
from ancer_jax.models import BUNDLED_BY_NORM, Checkpoint, make_network
from ancer_jax.runs.config import Norm
from ancer_jax.smoothing import AdditiveNoise, make_noise
from benchmarks.benchmark import Benchmark
from benchmarks.data.ship_model import accuracies, place, ship, today

TRAINING_THETA = {"l2": 0.25, "l1": 0.5}
TEST_STRIDE, TRAIN_STRIDE = 20, 30
PARTS = ["subset", "l2", "l1"]


def subset(options: argparse.Namespace) -> None:
    """Write every 20th test image and every 30th training image."""
    arrays = {}
    for split, stride in (("test", TEST_STRIDE), ("train", TRAIN_STRIDE)):
        full = load_dataset(options.folder, split=split)
        arrays[f"{split}_ids"] = full.ids[::stride].astype(np.int32)
        arrays[f"{split}_images"] = np.rint(full.images[::stride, ..., 0] * 255).astype(np.uint8)
        arrays[f"{split}_labels"] = full.labels[::stride].astype(np.uint8)
    path = place(options, ancer_jax.data, "fashion_mnist_subset.npz")
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {path.stat().st_size:,} bytes, " + ", ".join(f"{k} {v.shape}" for k, v in arrays.items()))


def train(options: argparse.Namespace, norm: Norm) -> None:
    """Train one classifier and write it, with its accuracies."""
    train, test = (load_dataset(options.folder, split=split) for split in ("train", "test"))
    theta, noise = TRAINING_THETA[norm], make_noise(norm)
    assert isinstance(noise, AdditiveNoise)
    network = make_network("small_cnn")
    key_init, key_noise = jax.random.split(jax.random.key(options.seed))
    variables: Any = network.init(key_init, train.images[:1])
    steps_per_epoch = len(train) // options.batch_size
    optimizer = optax.adam(optax.cosine_decay_schedule(options.learning_rate, options.epochs * steps_per_epoch))
    noisy = lambda key, x: x + noise.sample(key, jnp.full(x.shape, theta))

    def loss(variables, images, labels):
        logits: Any = network.apply(variables, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(variables, state, key, images, labels):
        key_flip, key_noise = jax.random.split(key)
        flip = jax.random.bernoulli(key_flip, 0.5, (len(images), 1, 1, 1))
        images = noisy(key_noise, jnp.where(flip, images[:, :, ::-1], images))
        value, gradient = jax.value_and_grad(loss)(variables, images, labels)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(variables, updates), state, value

    @jax.jit
    def accuracy(variables, images, labels):
        logits: Any = network.apply(variables, images)
        return (logits.argmax(-1) == labels).mean()

    def right(key: jax.Array | None = None) -> float:
        """Accuracy on the test images, under noise if there is a key."""
        images = test.images if key is None else noisy(key, test.images)
        return round(float(accuracy(variables, images, test.labels)), 4)

    value = np.nan
    state, rng, start = optimizer.init(variables), np.random.default_rng(options.seed), time.perf_counter()
    progress = tqdm.trange(options.epochs, desc=f"training {norm}", unit="epoch")
    for epoch in progress:
        order = rng.permutation(len(train))
        for i in range(steps_per_epoch):
            rows = order[i * options.batch_size : (i + 1) * options.batch_size]
            key = jax.random.fold_in(key_noise, epoch * steps_per_epoch + i)
            variables, state, value = step(variables, state, key, train.images[rows], train.labels[rows])
        progress.set_postfix(loss=f"{float(value):.3f}", clean=right(), noisy=right(key_noise))
    history = {
        "method": "augmentation",
        "data": "Fashion-MNIST",
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "optimizer": "adam",
        "learning_rate": options.learning_rate,
        "schedule": "cosine",
        "seed": options.seed,
    }
    checkpoint = Checkpoint("small_cnn", {}, jax.device_get(variables), (28, 28, 1), norm, theta, history)
    card = {
        "data": "Fashion-MNIST",
        "command": f"python -m benchmarks run train_bundled FOLDER --parts {norm}",
        "method": "augmentation",
        "epochs": options.epochs,
        **accuracies(checkpoint, test, options.seed),
        "certified": None,
        **today(),
    }
    ship(options, BUNDLED_BY_NORM[norm], checkpoint, card)
    print(f"{time.perf_counter() - start:.0f} s")


def measure(options: argparse.Namespace) -> tuple[()]:
    """Make all parts; there is nothing to measure."""
    if "subset" in options.parts:
        subset(options)
    for norm in ("l2", "l1"):
        if norm in options.parts:
            train(options, norm)
    return ()


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)


BENCHMARK = Benchmark(
    claim="Makes the bundled images and classifiers.",
    takes="15 minutes",
    measure=measure,
    sizes={"epochs": (1, 40), "batch_size": (256, 256), "learning_rate": (2e-3, 2e-3)},
    arguments=arguments,
)
