"""Make the data that ships inside the package: the Fashion-MNIST subset and two classifiers trained with noise.

    python benchmarks/train_bundled.py subset --data FOLDER
    python benchmarks/train_bundled.py train --data FOLDER --norm l2
    python benchmarks/train_bundled.py train --data FOLDER --norm l1

FOLDER holds Fashion-MNIST's four idx files (Debian: package dataset-fashion-mnist). Training is noise augmentation
(Cohen et al. 2019, section 3.3): one fresh draw of the noise for each image, cross-entropy, Adam with a cosine
schedule. About seven minutes a classifier on two CPU cores. Everything is drawn from one seed; another machine or
another version of XLA gives other last digits.
"""

import dataclasses
import json
import pathlib
import time
from typing import Any, Literal

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
import tyro

import ancer_jax.data
import ancer_jax.models
from ancer_jax.data.loading import load_dataset
from ancer_jax.models.cnn import SmallCNN
from ancer_jax.smoothing import AdditiveNoise, make_noise

TRAINING_THETA = {"l2": 0.25, "l1": 0.5}
TEST_STRIDE, TRAIN_STRIDE = 20, 30


@dataclasses.dataclass(frozen=True)
class Subset:
    """Write every 20th test image and every 30th training image to the package."""

    data: pathlib.Path

    def run(self):
        arrays = {}
        for split, stride in (("test", TEST_STRIDE), ("train", TRAIN_STRIDE)):
            full = load_dataset(str(self.data), split=split)
            arrays[f"{split}_ids"] = full.ids[::stride].astype(np.int32)
            arrays[f"{split}_images"] = np.rint(full.images[::stride, ..., 0] * 255).astype(np.uint8)
            arrays[f"{split}_labels"] = full.labels[::stride].astype(np.uint8)
        path = pathlib.Path(ancer_jax.data.__file__).parent / "fashion_mnist_subset.npz"
        np.savez_compressed(path, **arrays)
        print(f"{path.name}: {path.stat().st_size:,} bytes, " + ", ".join(f"{k} {v.shape}" for k, v in arrays.items()))


@dataclasses.dataclass(frozen=True)
class Train:
    """Train one classifier and write it, with its accuracies, to the package."""

    data: pathlib.Path
    norm: Literal["l2", "l1"] = "l2"
    epochs: int = 40
    batch_size: int = 256
    learning_rate: float = 2e-3
    seed: int = 0

    def run(self):
        train, test = (load_dataset(str(self.data), split=split) for split in ("train", "test"))
        theta, noise = TRAINING_THETA[self.norm], make_noise(self.norm)
        assert isinstance(noise, AdditiveNoise)
        network = SmallCNN()
        key_init, key_noise = jax.random.split(jax.random.key(self.seed))
        variables: Any = network.init(key_init, train.images[:1])
        steps_per_epoch = len(train) // self.batch_size
        optimizer = optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.epochs * steps_per_epoch))
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

        def measure(key: jax.Array | None = None) -> float:
            """Accuracy on the test images, under noise if there is a key."""
            images = test.images if key is None else noisy(key, test.images)
            return round(float(accuracy(variables, images, test.labels)), 4)

        value = np.nan
        state, rng, start = optimizer.init(variables), np.random.default_rng(self.seed), time.perf_counter()
        progress = tqdm.trange(self.epochs, desc=f"training {self.norm}", unit="epoch")
        for epoch in progress:
            order = rng.permutation(len(train))
            for i in range(steps_per_epoch):
                rows = order[i * self.batch_size : (i + 1) * self.batch_size]
                key = jax.random.fold_in(key_noise, epoch * steps_per_epoch + i)
                variables, state, value = step(variables, state, key, train.images[rows], train.labels[rows])
            progress.set_postfix(loss=f"{float(value):.3f}", clean=measure(), noisy=measure(key_noise))
        info = {
            "data": "Fashion-MNIST",
            "network": "SmallCNN",
            "norm": self.norm,
            "theta": theta,
            "clean_accuracy": measure(),
            "noisy_accuracy": measure(jax.random.fold_in(key_noise, 1 << 30)),
            "training": dataclasses.asdict(self) | {"data": "60,000 training images"},
            "versions": {"jax": jax.__version__, "optax": optax.__version__},
        }
        stem = pathlib.Path(ancer_jax.models.__file__).parent / f"fashion_mnist_{self.norm}"
        stem.with_suffix(".msgpack").write_bytes(flax.serialization.msgpack_serialize(jax.device_get(variables)))
        stem.with_suffix(".json").write_text(json.dumps(info, indent=2) + "\n")
        print(json.dumps(info), f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"subset": Subset, "train": Train}).run()
