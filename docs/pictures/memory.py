"""Draws memory.png beside this file: what a memory does with three inputs, in two orders. A minute.

python docs/pictures/memory.py
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

import ancer_jax as aj

COLORS = ("C1", "C0")  # of classes 0 and 1
ISLANDS = ((0.3, 0.6, 0.05), (0.72, 0.44, 0.12))  # center, radius


def islands(variables, points):
    """Two logits of points [n, 2]: class 0 is two discs, class 1 all else."""
    inside = jnp.max(jnp.stack([r - jnp.hypot(points[:, 0] - x, points[:, 1] - y) for x, y, r in variables]), 0)
    return 200 * jnp.stack([inside, -inside], axis=1)


def certify(x, theta):
    """The certificate of x by the smoothed classifier of theta."""
    classifier = aj.from_function(islands, ISLANDS, num_classes=2)
    smoothed = aj.Smoothed(classifier, aj.Gaussian(), jnp.asarray(theta))
    return aj.certify(jax.random.key(0), smoothed, jnp.asarray(x))


def draw(axis, title, answers):
    """Regions, drawn in the colour of their class."""
    for x, y, radius in ISLANDS:
        axis.add_patch(Ellipse((x, y), 2 * radius, 2 * radius, color="0.8"))
    for name, prediction, region in answers:
        width, height = 2 * float(region.gap) * np.broadcast_to(np.asarray(region.theta), [2])
        axis.add_patch(Ellipse(region.center, width, height, color=COLORS[int(prediction)], alpha=0.35))
        axis.plot(*region.center, "k.")
        axis.annotate(
            f"{name}: class {int(prediction)}", region.center, (4, -10), textcoords="offset points", fontsize=8
        )
    axis.set(xlim=(0, 1), ylim=(0.2, 0.8), aspect="equal", xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)


if __name__ == "__main__":
    thetas = {"A": ((0.4, 0.5), (0.2, 0.16)), "B": ((0.72, 0.44), (0.03, 0.035)), "C": ((0.3, 0.6), (0.014, 0.014))}
    certificates = {name: certify(*of) for name, of in thetas.items()}
    print({name: (c.prediction, c.radius) for name, c in certificates.items()})
    figure = Figure(figsize=(9, 2.2), layout="constrained")
    axes = figure.subplots(1, 3)
    own = [(name, c.prediction, c.region) for name, c in certificates.items()]
    draw(axes[0], "three certificates that contradict each other", own)
    for axis, order in zip(axes[1:], ("ABC", "CBA"), strict=True):
        memory, answers = aj.Memory.empty(2), []
        for name in order:
            memory, answer = memory.insert(certificates[name])
            answers.append((name, answer.prediction, answer.region))
        draw(axis, f"after memory, in the order {', '.join(order)}", answers)
    figure.savefig(pathlib.Path(__file__).with_suffix(".png"), dpi=110)
