"""The trained networks that ship with the package: variables in `weights/NAME.msgpack`, a card in `weights/NAME.json`,
and in `weights/NAME.npz` the theta map of those that were trained with one.

A name consists of data, network, norm and theta of training, and of its method where it is not noise augmentation.
Of a theta map, theta is the smallest one, and at the end is "spectral", or "coloured" if it was learned.
`benchmarks/data/ship_model.py` makes the files.
"""

import dataclasses
import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

import flax.serialization

from ancer_jax._messages import did_you_mean, first_line
from ancer_jax.basis import Pixels
from ancer_jax.metrics import round_down, round_share
from ancer_jax.models.checkpoints import Checkpoint, hash_variables, read_description, read_theta_map
from ancer_jax.search.theta_map import ThetaMap
from ancer_jax.smoothing.classifier import Classifier
from ancer_jax.smoothing.registry import make_noise
from ancer_jax.smoothing.smoothed import Smoothed

# What `--classifier bundled` means: networks for the bundled images.
BUNDLED_BY_NORM = {"l2": "fashion-mnist-cnn-l2-0.25", "l1": "fashion-mnist-cnn-l1-0.5"}
COLOURED = "fashion-mnist-cnn-l2-0.25-coloured"  # trained with a learned theta map
WEIGHTS = importlib.resources.files("ancer_jax.models") / "weights"


@dataclasses.dataclass(frozen=True)
class BundledModel:
    """A trained network that ships with the package; `print` shows its card.

    Attributes:
      name: its name, for `load_bundled` and `--classifier`.
      checkpoint: the network, its variables, and the noise it was trained with.
      card: how it was trained and what was measured, as JSON values: `data`, `command`, `method`, `epochs`;
        `test_images`, and on them `clean_accuracy` and `noisy_accuracy` (under one draw of the training noise for each
        image); `certified`, None or a mapping with `acr`, `accuracy`, `images`, `method`, `theta`, `n` and `alpha`;
        `date`, `versions`.
    """

    name: str
    checkpoint: Checkpoint = dataclasses.field(repr=False)
    card: Mapping[str, Any] = dataclasses.field(repr=False)

    @property
    def classifier(self) -> Classifier:
        """The base classifier."""
        return self.checkpoint.classifier

    @property
    def theta(self) -> float:
        """The noise parameter it was trained with; ValueError if that was a theta map."""
        assert self.checkpoint.theta is not None
        if self.theta_map is not None:
            raise ValueError(f"{self.name} was trained with a theta map: take model.smoothed, or model.theta_map")
        return self.checkpoint.theta

    @property
    def theta_map(self) -> ThetaMap | None:
        """The theta map it was trained with, if it was."""
        return self.checkpoint.theta_map

    @property
    def smoothed(self) -> Smoothed:
        """The smoothed classifier of the noise it was trained with."""
        theta_map, history = self.theta_map, self.checkpoint.history
        theta, basis = (self.theta, Pixels()) if theta_map is None else (theta_map.theta, theta_map.basis)
        return Smoothed(self.classifier, make_noise(self.checkpoint.norm, history.get("noise"), basis=basis), theta)

    @property
    def summary(self) -> dict[str, str]:
        """The card in words."""
        card, checkpoint = self.card, self.checkpoint
        size = " x ".join(map(str, checkpoint.image_shape))
        clean, noisy = (round_share(card[f"{kind}_accuracy"], card["test_images"]) for kind in ("clean", "noisy"))
        versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
        certified = "not measured"
        if found := card["certified"]:
            theta = "theta map" if found["method"] == "universal" else f"theta {found['theta']:g}"
            how = f"{found['method']} {theta}, n = {found['n']:,}, alpha = {found['alpha']:g}"
            acr, accuracy = round_down(found["acr"], 3), round_share(found["accuracy"], found["images"])
            sizes = f"ACR {acr}, "
            if self.theta_map is not None:
                sizes += f"ACR-tilde {round_down(found['acr_tilde'], 3)}, "
            certified = f"{sizes}certified accuracy {accuracy} ({found['images']:,} test images, {how})"
        return {
            "network": f"{checkpoint.name}, images {size}, {checkpoint.network.num_classes} classes",
            "noise": f"{checkpoint.norm}, {self.theta_map or f'theta {self.theta:g}'}",
            "data": card["data"],
            "training": f"{card['method']}, {card['epochs']} epochs",
            "command": card["command"],
            "accuracy": f"{clean} clean, {noisy} under noise ({card['test_images']:,} test images)",
            "certified": certified,
            "made": f"{card['date']}, {versions}",
        }

    def __str__(self) -> str:
        return "\n".join([self.name, *(f"  {name:<10} {text}" for name, text in self.summary.items())])


def bundled_models() -> tuple[str, ...]:
    """The names of all bundled models.

    >>> "fashion-mnist-cnn-l2-0.25" in bundled_models()
    True
    """
    files = (file.name for file in WEIGHTS.iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in files if name.endswith(".json")))


def load_bundled(name: str) -> BundledModel:
    """The bundled model of that name.

    Raises:
      ValueError: if there is none, or its files are damaged.

    >>> load_bundled("fashion-mnist-cnn-l2-0.25").theta
    0.25
    """
    if name not in (names := bundled_models()):
        hint = did_you_mean(name, names)
        raise ValueError(f"there is no bundled model {name!r}, only {', '.join(names)}{hint}")
    try:
        info = json.loads((WEIGHTS / f"{name}.json").read_text())
        checkpoint, digests = read_description(info["checkpoint"])
        variables = flax.serialization.msgpack_restore((WEIGHTS / f"{name}.msgpack").read_bytes())
        if hash_variables(variables) != digests["variables"]:
            raise ValueError("the values are not those that the card describes")
        with importlib.resources.as_file(WEIGHTS) as folder:
            theta_map = read_theta_map(folder / f"{name}.npz", digests["theta_map"])
        checkpoint = dataclasses.replace(checkpoint, variables=variables, theta_map=theta_map)
        model = BundledModel(name, checkpoint, info["card"])
        _ = model.classifier, model.summary  # they need all of the card
        return model
    except Exception as error:  # msgpack raises many types
        line = first_line(error)[:200]
        raise ValueError(f"the files of the bundled model {name} are damaged ({line}): install again") from None
