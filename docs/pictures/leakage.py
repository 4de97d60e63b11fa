"""Draws leakage.png beside this file: two thetas, and what they do to other images. A minute.

python docs/pictures/leakage.py
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import ancer_jax as aj
from ancer_jax.smoothing import class_counts

CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
IMAGES, OTHERS = (1, 11), (0, 3, 4, 5, 6)  # of the bundled test set


if __name__ == "__main__":
    bundled, test = aj.load_bundled("fashion-mnist-cnn-l2-0.25"), aj.load_dataset("fashion-mnist-subset")
    smoothed = aj.Smoothed(bundled.classifier, aj.Gaussian(), bundled.theta)
    majority = jax.jit(lambda *of: class_counts(*of, num_samples=1000, chunk=100).argmax())
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    for row, i in zip(figure.subplots(2, 2 + len(OTHERS)), IMAGES, strict=True):
        key, x = jax.random.fold_in(jax.random.key(0), test.ids[i]), jnp.asarray(test.images[i])
        theta, _ = aj.optimize_isotropic(key, smoothed, x, config=aj.IsotropicConfig(theta_max=1.0))
        theta, _ = aj.optimize_anisotropic(
            key, smoothed.with_theta(theta), x, config=aj.AnisotropicConfig(theta_max=1.0)
        )
        of_theta = smoothed.with_theta(theta)
        row[0].imshow(x[..., 0], cmap="gray", vmin=0, vmax=1)
        own = int(majority(key, of_theta, x))
        row[0].set_title(f"x: {CLASSES[own]}", fontsize=9)
        row[1].imshow(np.asarray(theta)[..., 0], cmap="viridis", vmin=0, vmax=1)
        row[1].set_title("theta of x", fontsize=9)
        noise = theta * jax.random.normal(key, x.shape)
        for axis, other in zip(row[2:], OTHERS, strict=True):
            y = jnp.asarray(test.images[other])
            axis.imshow((y + noise)[..., 0], cmap="gray", vmin=0, vmax=1)
            usual, found = (int(majority(key, s, y)) for s in (smoothed, of_theta))
            color = "C3" if found == own else "black"
            axis.set_title(
                CLASSES[usual] if found == usual else f"{CLASSES[usual]} -> {CLASSES[found]}", fontsize=9, color=color
            )
        for axis in row:
            axis.axis("off")
    figure.savefig(pathlib.Path(__file__).with_suffix(".png"), dpi=110)
