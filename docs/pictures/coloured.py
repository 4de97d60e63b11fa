"""Draws the picture of the guide "coloured noise", coloured.png beside it: `python docs/pictures/coloured.py`."""

import pathlib

import ancer_jax as aj
from ancer_jax.models import wiener_front
from ancer_jax.models.bundled import COLOURED
from ancer_jax.report import plot_theta_map

if __name__ == "__main__":
    images = aj.load_dataset("fashion-mnist-subset", split="train").images
    theta_map = aj.load_bundled(COLOURED).theta_map
    assert theta_map is not None
    front = wiener_front(images, theta_map.theta, theta_map.basis)
    plot_theta_map(theta_map, images[[0, 4, 5, 8]], pathlib.Path(__file__).with_suffix(".png"), front=front)
