"""Pictures of theta maps, and of what their noise does to images."""

import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.typing import ArrayLike
from jaxtyping import Float

from ancer_jax.basis import BasisName, Pixels
from ancer_jax.data import Dataset
from ancer_jax.metrics import round_down
from ancer_jax.models import Front
from ancer_jax.report.figures import save, subplots
from ancer_jax.report.notes import THETA_BY
from ancer_jax.report.results import Results
from ancer_jax.report.tables import percent
from ancer_jax.search import ThetaMap
from ancer_jax.smoothing import ABSTAIN, Gaussian, Noise

_OPPONENT = ("brightness", "red against blue", "green against both")
# What is counted to the right, and down, in a theta map.
_AXIS_LABELS: dict[BasisName, tuple[str, str]] = {
    "pixels": ("column", "row"),
    "cosine": ("half waves to the right", "half waves down"),
    "karhunen-loeve": ("pattern along a row", "pattern down"),
}


def plot_theta(results: Results, dataset: Dataset, path: epath.PathLike, *, columns: int = 8) -> bool:
    """Draw the theta maps of a run as PNG: below each of its first images its theta map and, for coloured noise, a
    noisy copy. A run with one map for all images gets the picture of `plot_theta_map`.

    Args:
      results: of a run directory whose theta has one value per coordinate.
      dataset: the data set of the run, or a part of it.
      path: PNG file.
      columns: how many images, if each has its theta.

    Returns:
      False, with nothing drawn, if theta is one number per image, or `dataset` has no image of the run.
    """
    if results.run is None or not results.run.matches(dataset):
        return False
    if figure := universal_figure(results, dataset):
        save(figure, path)
        return True
    config = results.run.config
    rows = np.flatnonzero(np.isin(results["idx"], dataset.ids))[:columns]
    thetas = list(results.thetas(results["idx"][rows].tolist()).values())
    if not thetas or thetas[0].ndim != 3:
        return False
    from matplotlib.cm import ScalarMappable

    scale, _ = color_scale([theta.mean(axis=-1) for theta in thetas])
    (by, where), coloured = THETA_BY[config.basis.name], config.basis != Pixels()
    width = 1.6 * len(thetas) + 1
    figure, axes = subplots(2 + coloured, len(thetas), (width, 6.0 if coloured else 3.8))
    for column, row, theta in zip(axes.T, rows, thetas, strict=True):
        image = dataset.images[np.searchsorted(dataset.ids, results["idx"][row])]
        draw_theta(column[:2], {name: column[row] for name, column in results.own.items()}, image, theta, scale)
        if coloured:
            _draw_image(column[2], noisy_copy(config.certified_noise, image, theta), "a noisy copy")
    figure.colorbar(ScalarMappable(scale, "viridis"), ax=axes, shrink=0.8, label=f"{by} (image units)")
    caption = "each image has its own theta; answers and gaps are those before memory"
    if coloured:
        caption = _wrapped(width, f"{by}, mean over channels", where, caption)
    figure.supxlabel(caption, fontsize=8)
    save(figure, path)
    return True


def plot_theta_map(
    theta_map: ThetaMap,
    images: Float[ArrayLike, "m *d"],
    path: epath.PathLike,
    *,
    front: Front | None = None,
    noise: Noise | None = None,
) -> None:
    """A theta map, and images with noise of it, as PNG: below each image a noisy copy of it, what a filter makes of
    this copy, and a copy with white noise of the smallest theta. The first image is grey, so that the noise is seen.

    Args:
      theta_map: of images [height, width, channels].
      images: [m, *d] in [0, 1]; the first four are drawn.
      path: PNG file.
      front: the filter (`wiener_front`), if there is one.
      noise: in the basis of the map; by default Gaussian.

    Raises:
      ValueError: if there are no images, or they are not of the shape of theta.
    """
    save(_map_figure(theta_map, images, front, noise or Gaussian(theta_map.basis)), path)


def universal_figure(results: Results, dataset: Dataset):
    """The picture of the theta map of a run that has one for all images, with images of `dataset`; None if it has none,
    or `dataset` none of its images.
    """
    run = results.run
    if run is None or run.config.method != "universal" or not run.matches(dataset):
        return None
    ids = results["idx"].tolist()
    images = dataset.images[np.flatnonzero(np.isin(dataset.ids, ids))[:4]]
    (theta,) = results.thetas(ids[:1]).values()
    if theta.ndim != 3 or not len(images):
        return None
    return _map_figure(ThetaMap(theta, run.config.basis), images, None, run.config.certified_noise)


def _map_figure(theta_map: ThetaMap, images: ArrayLike, front: Front | None, noise: Noise):
    """The figure of `plot_theta_map`."""
    images, theta = np.asarray(images)[:4], theta_map.theta
    if theta.ndim != 3 or not len(images) or images.shape[1:] != theta.shape:
        shapes = f"{list(images.shape)} for a theta of shape {list(theta.shape)}"
        raise ValueError(f"images must be [m, height, width, channels] as theta is, got shape {shapes}")
    from matplotlib.figure import Figure

    images = np.concatenate([np.full_like(images[:1], 0.5), images])
    maps = [theta.mean(axis=-1)] if theta_map.basis == Pixels() else list(np.moveaxis(theta, -1, 0))
    widths = 4.4 if len(maps) == 1 else 3.4, 0.6 + 1.8 * len(images)
    rows = 3 if front is None else 4
    figure = Figure(figsize=(sum(widths), 2 * rows), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=widths)[0]
    _draw_coefficients(left, theta_map, maps)
    axes, least = right.subplots(rows, len(images), squeeze=False), theta.min()
    for column, image in zip(axes.T, images, strict=True):
        noisy = noisy_copy(noise, image, theta)
        filtered = [] if front is None else [np.asarray(front(noisy[None])[0])]
        white = noisy_copy(noise, image, np.full_like(theta, least))
        for axis, shown in zip(column, (image, noisy, *filtered, white), strict=True):
            _draw_image(axis, shown)
    after = [] if front is None else ["the same,\nfiltered"]
    labels = ("image", "noise of\nthe map", *after, f"white noise,\ntheta {least:.3g}")
    for axis, label in zip(axes[:, 0], labels, strict=True):
        axis.set_ylabel(label, fontsize=9)
    figure.supxlabel(_wrapped(sum(widths), str(theta_map), THETA_BY[theta_map.basis.name][1]), fontsize=8)
    return figure


def draw_theta(axes, own: dict[str, Any], image: np.ndarray, theta: np.ndarray, scale) -> None:
    """On two axes an image, and below it its theta map; `own` is the row of its own certificate in the results."""
    answer = "abstains" if own["predict"] == ABSTAIN else f"predicts {int(own['predict'])}"
    _draw_image(axes[0], image, f"#{int(own['idx'])}, label {int(own['label'])}\n{answer}")
    axes[1].imshow(theta.mean(axis=-1), cmap="viridis", norm=scale)
    spread = f"{theta.min():.2f}..{theta.max():.2f}, gap {round_down(own['gap'], 2)}"
    axes[1].set_title(f"{spread}\nat the limit {percent(own['at_theta_max'])}", fontsize=8)
    for axis in axes:
        axis.axis("off")


def color_scale(thetas: list[np.ndarray]):
    """matplotlib's scale over these values, and whether it is logarithmic, as it is if they are far apart."""
    from matplotlib.colors import LogNorm, Normalize

    smallest, largest = float(np.min(thetas)), float(np.max(thetas))
    far = largest > 10 * smallest  # without a bound, a few coordinates may be many times as wide as the others
    return (LogNorm if far else Normalize)(smallest, largest), far


def heat_map(values: np.ndarray, scale) -> np.ndarray:
    """Colours of the values [height, width] on a scale: uint8 [height, width, 3]."""
    import matplotlib

    return (matplotlib.colormaps["viridis"](scale(values))[..., :3] * 255).astype(np.uint8)


def drawable(image: np.ndarray) -> np.ndarray:
    """An image [height, width, channels] as it is drawn, clipped to [0, 1]: in colours if it has three channels, else
    the mean over channels.
    """
    image = np.clip(image, 0, 1)
    return image if image.shape[-1] == 3 else image.mean(axis=-1)


def noisy_copy(noise: Noise, image: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """A copy of an image [*d] under noise, always the same one."""
    key = jax.random.key(0, impl="threefry2x32")
    return np.asarray(noise.perturb(key, 0, jnp.asarray(image), jnp.asarray(theta)))


def _wrapped(inches: float, *sentences: str) -> str:
    """Sentences as the caption of a figure of that width, in lines of about the same length."""
    said = " ".join(f"{sentence[0].upper()}{sentence[1:].removesuffix('.')}." for sentence in sentences if sentence)
    widest = max(1, int(15 * inches))
    lines = len(textwrap.wrap(said, widest))
    return next(
        textwrap.fill(said, width) for width in range(1, widest + 1) if len(textwrap.wrap(said, width)) <= lines
    )


def _draw_image(axis, image: np.ndarray, title: str = "") -> None:
    axis.imshow(drawable(image), cmap="gray", vmin=0, vmax=1)
    axis.set_title(title, fontsize=8)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _draw_coefficients(figure, theta_map: ThetaMap, maps: list[np.ndarray]) -> None:
    """The heat maps of a theta map, one below the other."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import LogLocator

    name = theta_map.basis.name
    numbered = [f"channel pattern {i}" for i in range(len(maps))]
    titles = {"pixels": ["mean over channels"], "cosine": _OPPONENT}.get(name, numbered)
    right, down = _AXIS_LABELS[name]
    scale, logarithmic = color_scale(maps)
    axes = figure.subplots(len(maps), 1, squeeze=False, sharex=True)[:, 0]
    for axis, values, title in zip(axes, maps, titles, strict=False):
        axis.imshow(values, cmap="viridis", norm=scale)
        axis.set_title(title, fontsize=9)
        axis.set_ylabel(down, fontsize=9)
        axis.tick_params(labelsize=8)
    axes[-1].set_xlabel(right, fontsize=9)
    ticks = LogLocator(subs=(1, 2, 5)) if logarithmic else np.unique(np.linspace(np.min(maps), np.max(maps), 4))
    options = {"label": f"{THETA_BY[name][0]} (image units)", "format": "{x:.3g}", "ticks": ticks, "shrink": 0.6}
    figure.colorbar(ScalarMappable(scale, "viridis"), ax=axes, **options).minorticks_off()
