"""Draws the picture of the guide "coloured noise", coloured.png beside it: `python docs/pictures/coloured.py`."""

import pathlib

import ancer_jax as aj
from ancer_jax.basis import Cosine
from ancer_jax.report import plot_theta_map
from ancer_jax.search import spectral_theta

if __name__ == "__main__":
    images = aj.load_dataset("fashion-mnist-subset", split="train").images
    theta_map = spectral_theta(images, Cosine(), 0.25, theta_max=1.0)
    plot_theta_map(theta_map, images[[0, 4, 5, 8]], pathlib.Path(__file__).with_suffix(".png"))
