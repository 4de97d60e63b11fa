"""Pictures: curves and theta maps. The functions `draw_...` draw on an axis that they are given."""

import io
import textwrap
from collections.abc import Callable
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
from ancer_jax.report.notes import THETA_BY, footnotes, legend_of_marks, mark
from ancer_jax.report.results import Results
from ancer_jax.report.tables import percent
from ancer_jax.search import ThetaMap
from ancer_jax.smoothing import ABSTAIN, Gaussian, Noise

_SIZE = (4.6, 4.1)  # inches: two pictures side by side on a desk, one on a phone
_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
_MARKERS = "osD^vP*X<>"
_SIZES = {"radius": "radius (image units, pixels in [0, 1])", "radius_proxy": "proxy radius (same volume)"}
_OPPONENT = ("brightness", "red against blue", "green against both")
# What is counted to the right, and down, in a theta map.
_STEPS: dict[BasisName, tuple[str, str]] = {
    "pixels": ("column", "row"),
    "cosine": ("half waves to the right", "half waves down"),
    "karhunen-loeve": ("pattern along a row", "pattern down"),
}


def plot_certified_accuracy(results: list[Results], path: epath.PathLike) -> None:
    """Certified accuracy against radius and against proxy radius, one curve per run, as PNG."""
    figure, axes = _figure(1, 2, (10, 4.2), sharey=True)
    for column, axis in zip(_SIZES, axes[0], strict=True):
        draw_accuracy(axis, results, column)
    axes[0, 1].set_ylabel("")
    axes[0, 1].legend(fontsize=8, handlelength=3)
    if notes := footnotes(results):
        figure.supxlabel("\n".join(notes), fontsize=8)
    _save(figure, path)


def plot_theta(results: Results, dataset: Dataset, path: epath.PathLike, *, columns: int = 8) -> bool:
    """The theta maps of a run as PNG: of its first images, below them, with a noisy copy where the noise is coloured.
    Of a theta map of all images, the picture is that of `plot_theta_map`.

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
        _save(figure, path)
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
    figure, axes = _figure(2 + coloured, len(thetas), (width, 6.0 if coloured else 3.8))
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
    _save(figure, path)
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
    _save(_map_figure(theta_map, images, front, noise or Gaussian(theta_map.basis)), path)


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


def plot_training(history: dict[str, np.ndarray], path: epath.PathLike) -> None:
    """Loss and accuracy under noise against epochs, for training and test images, as PNG.

    Args:
      history: columns epoch, train_loss, train_accuracy, test_loss, test_accuracy.
      path: PNG file.
    """
    figure, axes = _figure(1, 2, (9, 3.6))
    draw_history(axes[0, 0], history, "loss", "loss (for training: that of the method)")
    draw_history(axes[0, 1], history, "accuracy", "accuracy under noise")
    _save(figure, path)


def draw_accuracy(axis, results: list[Results], column: str) -> None:
    """Certified accuracy against the `column` "radius" or "radius_proxy", one curve per run."""
    end = max(float(r[column].max()) for r in results) * 1.05 or 1.0
    for r, style in zip(results, line_styles(results), strict=True):
        _draw_at_least(axis, r[column][r.correct], len(r.correct), (0.0, end), label=_label(r), **style)
    norm = " / ".join(sorted({r.norm for r in results if r.norm}))
    images = " / ".join(map(str, sorted({len(r.correct) for r in results})))
    axis.set(xlabel=f"{norm} {_SIZES[column]}".strip(), ylabel=f"certified accuracy ({images} images)")
    axis.set(xlim=(0, end), ylim=(0, 1.02))


def draw_p_lower(axis, results: list[Results]) -> None:
    """Share of each run's inputs whose class probability has at least a given lower bound."""
    for r, style in zip(results, line_styles(results), strict=True):
        # Before memory: a class that the memory gave has no bound of its own.
        bounds, answered = r.own["p_lower"], r.own["predict"] != ABSTAIN
        _draw_at_least(axis, bounds[answered], len(bounds), (0.5, 1.0), label=_label(r), **style)
    axis.set(xlabel="lower bound of the class probability (p_lower)", ylabel="share of images with at least that bound")
    axis.set(xlim=(0.5, 1.002), ylim=(0, 1.02))


def draw_cost(axis, results: list[Results], cost: str) -> None:
    """ACR (hollow) and ACR-tilde (filled) against the `cost` per image, "seconds" or "passes", which must be known."""
    from matplotlib.ticker import LogLocator, NullLocator

    for i, (r, color) in enumerate(zip(results, _colors(results), strict=True)):
        at = r.seconds if cost == "seconds" else sum((r.passes or ())[:2])
        style = {"color": color, "marker": _MARKERS[i % len(_MARKERS)], "markersize": 7, "linestyle": "none"}
        axis.plot([at, at], [r.acr("radius"), r.acr("radius_proxy")], color=color, linewidth=0.8)
        axis.plot(at, r.acr("radius"), fillstyle="none", **style)
        axis.plot(at, r.acr("radius_proxy"), label=_label(r), **style)
    label = "seconds per image, as measured" if cost == "seconds" else "passes through the network per image"
    axis.set(xlabel=label, ylabel="ACR (hollow), ACR-tilde (filled)", xscale="log")
    axis.margins(x=0.1, y=0.1)
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_formatter("{x:,g}")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.3)


def draw_theta(axes, own: dict[str, Any], image: np.ndarray, theta: np.ndarray, scale) -> None:
    """On two axes an image, and below it its theta map; `own` is the row of its own certificate in the results."""
    answer = "abstains" if own["predict"] == ABSTAIN else f"predicts {int(own['predict'])}"
    _draw_image(axes[0], image, f"#{int(own['idx'])}, label {int(own['label'])}\n{answer}")
    axes[1].imshow(theta.mean(axis=-1), cmap="viridis", norm=scale)
    spread = f"{theta.min():.2f}..{theta.max():.2f}, gap {round_down(own['gap'], 2)}"
    axes[1].set_title(f"{spread}\nat the limit {percent(own['at_theta_max'])}", fontsize=8)
    for axis in axes:
        axis.axis("off")


def draw_history(axis, history: dict[str, np.ndarray], what: str, label: str) -> None:
    """The columns `train_<what>` and `test_<what>` of a history against epochs."""
    for part, style in (("train", "C0-"), ("test", "C3--")):
        axis.plot(history["epoch"], history[f"{part}_{what}"], style, marker=".", label=part)
    axis.set(xlabel="epoch", ylabel=label)
    axis.locator_params(axis="x", integer=True)
    axis.set_ylim(0, 1.02 if what == "accuracy" else 1.05 * axis.dataLim.y1)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def svg(results: list[Results], draw: Callable[..., None], *arguments: str) -> str:
    """What `draw(axis, results, *arguments)` draws, as SVG: text stays text, a legend and the marks are below."""
    import matplotlib

    figure, axes = _figure(1, 1, _SIZE)
    axis = axes[0, 0]
    draw(axis, results, *arguments)
    if marks := legend_of_marks(results):
        axis.set_xlabel("\n".join([axis.get_xlabel(), *marks]), fontsize=8)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9, handlelength=3)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ancer-jax"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def png(figure) -> bytes:
    """A figure of matplotlib as PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def line_styles(results: list[Results]) -> list[dict[str, Any]]:
    """Line styles, one per run, that can be told apart without colour."""
    return [
        {"linestyle": _STYLES[i % len(_STYLES)], "color": color, "linewidth": 2.4 if r.data_dependent else 1.4}
        for i, (r, color) in enumerate(zip(results, _colors(results), strict=True))
    ]


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
    right, down = _STEPS[name]
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


def _draw_at_least(axis, values: np.ndarray, count: int, ends: tuple[float, float], **style: Any) -> None:
    """The step function `t -> (number of values that are at least t) / count`, exactly, between two ends."""
    values = np.sort(values)
    at = np.concatenate([ends[:1], values, ends[1:]])
    axis.step(at, (len(values) - np.searchsorted(values, at)) / count, where="pre", **style)
    axis.grid(alpha=0.3)


def _label(results: Results) -> str:
    """The marked name of a run, without what a legend would take for a formula or leave out."""
    name = mark(results).replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def _colors(results: list[Results]) -> list[str]:
    """Colours of the runs: grey for fixed noise, with which the others are compared, if there are others."""
    fixed = sum(r.data_dependent is False for r in results)
    colors = (f"C{i % 10}" for i in range(len(results)))
    if fixed in (0, len(results)):
        return list(colors)
    greys = (str(0.7 - 0.5 * i / fixed) for i in range(fixed))
    return [next(greys if r.data_dependent is False else colors) for r in results]


def _figure(rows, columns, size, **options):
    """A figure without pyplot: it needs no display, and shares no state with the user's matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _save(figure, path):
    epath.Path(path).write_bytes(png(figure))
