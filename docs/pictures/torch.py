"""Draws torch.png beside this file: what runs where with a PyTorch module, in two ways.

python docs/pictures/torch.py
"""

import pathlib

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

COLOURS = {"JAX": "#d7e7f5", "PyTorch": "#fbe0cf", "host (CPU)": "#e6e6e6"}
WAYS = {
    "from_module": [
        ("JAX", "noisy copies\nof x"),
        ("PyTorch", "module(copies)\non its own device"),
        ("host (CPU)", "votes\n(integers)"),
        ("host (CPU)", "bounds, region\n(float64)"),
    ],
    "translate": [
        ("JAX", "noisy copies\nof x"),
        ("JAX", "translated module,\ncompiled"),
        ("JAX", "votes\n(integers)"),
        ("host (CPU)", "bounds, region\n(float64)"),
    ],
}


def draw(axis, name, steps):
    """A row of boxes, with arrows from each to the next."""
    axis.set(xlim=(-1.3, 4 * len(steps) - 2.2), ylim=(-1.1, 1.5))
    axis.axis("off")
    axis.text(-1.2, 1.3, name, family="monospace", fontsize=10, weight="bold", va="center")
    for i, (where, text) in enumerate(steps):
        box = FancyBboxPatch((4 * i - 1, -0.6), 2.6, 1.3, boxstyle="round,pad=0.1", facecolor=COLOURS[where], ec="0.4")
        axis.add_patch(box)
        axis.text(4 * i + 0.3, 0.05, text, ha="center", va="center", fontsize=8.5)
        axis.text(4 * i + 0.3, -0.95, where, ha="center", va="center", fontsize=8, color="0.35")
        if i:
            axis.annotate("", (4 * i - 1.1, 0.05), (4 * i - 2.3, 0.05), arrowprops={"arrowstyle": "->", "color": "0.3"})
    if name == "from_module":
        axis.text(2.3, 0.17, "via the host", ha="center", fontsize=7, color="0.35")
        axis.text(2.3, 1.1, "no gradients", ha="center", va="center", fontsize=8, color="C3")
    else:
        arrow = {"arrowstyle": "->", "color": "C3", "connectionstyle": "arc3,rad=0.15"}
        axis.annotate("", (0.3, 0.85), (4.3, 0.85), arrowprops=arrow)
        axis.text(2.3, 1.2, "gradients, for searches of theta", ha="center", va="bottom", fontsize=8, color="C3")


if __name__ == "__main__":
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    for axis, (name, steps) in zip(figure.subplots(2, 1), WAYS.items(), strict=True):
        draw(axis, name, steps)
    figure.savefig(pathlib.Path(__file__).with_suffix(".png"), dpi=130)
