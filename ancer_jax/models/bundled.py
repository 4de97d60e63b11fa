"""The two noise-trained Fashion-MNIST classifiers that ship with the package."""

import importlib.resources
import json
from typing import Literal, NamedTuple

import flax.serialization

from ancer_jax._checks import check_choice
from ancer_jax.models.cnn import SmallCNN
from ancer_jax.smoothing.classifier import Classifier, from_linen


class BundledModel(NamedTuple):
    """A bundled classifier and how it was trained (`benchmarks/data/train_bundled.py`).

    Attributes:
      classifier: `SmallCNN` on images [28, 28, 1] in [0, 1].
      theta: noise parameter it was trained with: standard deviation (l2) or half-width (l1).
      clean_accuracy, noisy_accuracy: on the 10,000 test images of Fashion-MNIST, without noise and under one draw of
        the training noise per image.
    """

    classifier: Classifier
    theta: float
    clean_accuracy: float
    noisy_accuracy: float


def load_bundled(norm: str) -> BundledModel:
    """The bundled classifier for `"l2"` (trained with Gaussian noise) or `"l1"` (uniform noise).

    Raises:
      ValueError: if the norm is another one.
    """
    check_choice("norm", norm, Literal["l2", "l1"])
    folder = importlib.resources.files("ancer_jax.models")
    info = json.loads((folder / f"fashion_mnist_{norm}.json").read_text())
    variables = flax.serialization.msgpack_restore((folder / f"fashion_mnist_{norm}.msgpack").read_bytes())
    classifier = from_linen(SmallCNN(), variables, num_classes=10)
    return BundledModel(classifier, info["theta"], info["clean_accuracy"], info["noisy_accuracy"])
