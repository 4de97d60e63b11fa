"""Draws the picture at the top of the README, front.png beside this file: `python docs/pictures/front.py`, a minute.

Upper row: two dimensions, where regions can be drawn to scale. Lower row: images of the bundled test set, by the
bundled l2 classifier. Each region belongs to the smoothed classifier of its own theta; there is no memory.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

import ancer_jax as aj
from ancer_jax.differentiable import attack
from ancer_jax.metrics import round_down

CONFIG = aj.CertifyConfig(n=100_000)
IMAGES = (0, 1, 5)  # of the bundled test set
CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def channel(variables, points):
    """Two logits of points [n, 2]: class 1 is a channel that bends."""
    x, y = points[:, 0], points[:, 1]
    inside = variables["width"] - jnp.abs(y - 0.5 - 0.05 * jnp.sin(5 * (x - 0.5)))
    return 100 * jnp.stack([-inside, inside], axis=1)


def searched(key, smoothed, x, theta_max):
    """Three certificates of x: of the theta of `smoothed`, of one theta for x, of one theta for each coordinate."""
    isotropic, _ = aj.optimize_isotropic(key, smoothed, x, config=aj.IsotropicConfig(theta_max=theta_max))
    start = smoothed.with_theta(isotropic)
    anisotropic, _ = aj.optimize_anisotropic(key, start, x, config=aj.AnisotropicConfig(theta_max=theta_max))
    thetas = (smoothed.theta, isotropic, anisotropic)
    return [aj.certify(key, smoothed.with_theta(theta), x, config=CONFIG) for theta in thetas]


def draw_plane(axes):
    """Fixed, isotropic and anisotropic region of one point, over the decision boundary of the base classifier."""
    classifier = aj.from_function(channel, {"width": 0.22}, num_classes=2)
    smoothed = aj.Smoothed(classifier, aj.Gaussian(), 0.03)
    x = jnp.array([0.5, 0.5])
    ticks = np.linspace(0, 1, 301, dtype=np.float32)
    grid = np.stack(np.meshgrid(ticks, ticks), axis=-1)
    classes = np.asarray(classifier(grid.reshape(-1, 2))).argmax(-1).reshape(grid.shape[:2])
    names = (
        "fixed: one theta for all inputs",
        "isotropic: one theta for this input",
        "anisotropic: one theta per axis",
    )
    certificates = searched(jax.random.key(0), smoothed, x, 0.3)
    for axis, name, certificate in zip(axes, names, certificates, strict=True):
        axis.contourf(ticks, ticks, classes, levels=[-0.5, 0.5, 1.5], colors=["0.82", "0.97"])
        width, height = 2 * float(certificate.gap) * np.broadcast_to(np.asarray(certificate.region.theta), [2])
        axis.add_patch(Ellipse((0.5, 0.5), width, height, color="C0", alpha=0.45))
        axis.plot(*x, "k.")
        axis.set(xlim=(0, 1), ylim=(0.1, 0.9), aspect="equal", xticks=[], yticks=[])
        axis.set_title(f"{name}\nproxy radius {round_down(certificate.proxy_radius, 3)}", fontsize=9)


def draw_images(axes):
    """For each image: itself, its theta, and the worst point of its certified region that an attack finds."""
    bundled, test = aj.load_bundled("fashion-mnist-cnn-l2-0.25"), aj.load_dataset("fashion-mnist-subset")
    smoothed = aj.Smoothed(bundled.classifier, aj.Gaussian(), bundled.theta)
    for three, i in zip(np.reshape(axes, (-1, 3)), IMAGES, strict=True):
        key, x = jax.random.fold_in(jax.random.key(0), test.ids[i]), jnp.asarray(test.images[i])
        *_, certificate = searched(key, smoothed, x, 1.0)
        region = certificate.region
        changed = attack(key, smoothed.with_theta(region.theta), region, certificate.prediction)
        titles = ("image", "theta", f"still: {CLASSES[int(certificate.prediction)]}")
        for axis, title, values in zip(three, titles, (x, region.theta, changed), strict=True):
            axis.imshow(np.asarray(values)[..., 0], cmap="viridis" if title == "theta" else "gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.set_title(title, fontsize=9)
            axis.axis("off")


if __name__ == "__main__":
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.2, 1])
    draw_plane(top.subplots(1, 3))
    draw_images(bottom.subplots(1, 9))
    figure.savefig(pathlib.Path(__file__).with_suffix(".png"), dpi=110)
