"""Draws perturbation.png beside this file: the largest certified multiples of spatial frequencies. Half a minute.

python docs/pictures/perturbation.py
"""

import pathlib
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

import ancer_jax as aj
from ancer_jax.basis import Cosine
from ancer_jax.metrics import round_down
from ancer_jax.models import BUNDLED_BY_NORM
from ancer_jax.models.bundled import COLOURED

CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
IMAGES = (0, 5)  # of the bundled test set
CONFIG, SEED = aj.CertifyConfig(n=10_000), 0
LOW = (3, 3, 0)  # half waves down and to the right


def frequencies(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of two frequencies: of those with the largest theta the lowest one; and one with the smallest."""
    down, right, _ = np.indices(theta.shape)
    at = np.where(theta == theta.max(), down**2 + right**2, np.inf).argmin()
    high, low = np.zeros(theta.shape), np.zeros(theta.shape)
    high.flat[at], low[LOW] = 1, 1
    assert theta[LOW] == theta.min()
    return np.asarray(Cosine().inputs(high)), np.asarray(Cosine().inputs(low))


def draw(axis: Any, values: np.ndarray, title: str, limits: tuple[float, float]) -> None:
    """One picture."""
    axis.imshow(values[..., 0], cmap="gray", vmin=limits[0], vmax=limits[1])
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)


def draw_group(figure: Any, images: list[tuple[int, np.ndarray]], smoothed: aj.Smoothed, direction: np.ndarray) -> None:
    """A row for each image: the largest certified perturbation in that direction, and what it makes of the image."""
    for (i, image), (left, right) in zip(images, figure.subplots(len(images), 2), strict=True):
        key = jax.random.fold_in(jax.random.key(SEED), i)
        certificate = aj.certify(key, smoothed, image, config=CONFIG)
        length = certificate.region.reach(direction)
        perturbation = length * direction
        draw(left, perturbation, f"perturbation\nl2 length {round_down(length, 2)}", (-0.25, 0.25))
        name = CLASSES[int(certificate.prediction)]
        draw(right, image + perturbation, f"image + perturbation\ncertified: {name}", (-0.25, 1.25))


if __name__ == "__main__":
    white, coloured = (aj.load_bundled(name) for name in (BUNDLED_BY_NORM["l2"], COLOURED))
    theta_map, test = coloured.theta_map, aj.load_dataset("fashion-mnist-subset")
    assert theta_map is not None
    of_white = aj.Smoothed(white.classifier, aj.Gaussian(), np.full(theta_map.theta.shape, 0.25, np.float32))
    of_coloured = aj.Smoothed(coloured.classifier, aj.Gaussian(theta_map.basis), theta_map.theta)
    high, low = frequencies(theta_map.theta)
    images = [(int(test.ids[i]), test.images[i]) for i in IMAGES]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    first, *groups = figure.subfigures(1, 4, squeeze=False, width_ratios=[1, 2, 2, 2], wspace=0.04)[0]
    first.suptitle(" ", fontsize=10)
    for (_, image), axis in zip(images, first.subplots(len(images), 1), strict=True):
        draw(axis, image, "\nimage", (-0.25, 1.25))
    for group, title, smoothed, direction in (
        (groups[0], "white noise (same length in every direction)", of_white, high),
        (groups[1], "coloured noise, a high frequency", of_coloured, high),
        (groups[2], "coloured noise, a low frequency", of_coloured, low),
    ):
        group.suptitle(title, fontsize=10)
        draw_group(group, images, smoothed, direction)
    figure.savefig(pathlib.Path(__file__).with_suffix(".png"), dpi=110)
