"""Pictures: certified accuracy curves and theta maps."""

import io
import itertools

import numpy as np
from etils import epath

from ancer_jax.data import Dataset
from ancer_jax.metrics import average_certified_radius, certified_accuracy, round_down
from ancer_jax.report.tables import Results, footnotes, legend_of_marks, mark
from ancer_jax.results import theta_bound
from ancer_jax.runs import Run

_SIZE = (4.6, 4.1)  # inches: two of them beside each other on a desk, one on a phone
_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
_MARKERS = "osD^vP*X<>"
_SIZES = {"radius": "radius (image units, pixels in [0, 1])", "radius_proxy": "proxy radius (same volume)"}


def plot_certified_accuracy(results: list[Results], path: epath.PathLike) -> None:
    """Certified accuracy against radius and against proxy radius, one curve a run, as PNG."""
    figure, axes = _figure(1, 2, (10, 4.2), sharey=True)
    for column, axis in zip(_SIZES, axes[0], strict=True):
        _draw_accuracy(axis, results, column)
    axes[0, 1].set_ylabel("")
    axes[0, 1].legend(fontsize=8, handlelength=3)
    if notes := footnotes(results):
        figure.supxlabel("\n".join(notes), fontsize=8)
    _save(figure, path)


def certified_accuracy_figure(results: list[Results], column: str) -> str:
    """Certified accuracy against the `column` "radius" or "radius_proxy", one curve a run, as SVG."""
    figure, axes = _figure(1, 1, _SIZE)
    _draw_accuracy(axes[0, 0], results, column)
    return _svg(figure, results)


def p_lower_figure(results: list[Results]) -> str:
    """Share of each run's inputs whose class probability has at least that lower bound, as SVG."""
    figure, axes = _figure(1, 1, _SIZE)
    axis = axes[0, 0]
    for r, style in zip(results, _line_styles(results), strict=True):
        own = r.before or r.columns  # a class that the memory gave has no bound of its own
        bounds = np.sort(np.where(own["predict"] == -1, 0.0, own["p_lower"]))
        shares = np.arange(len(bounds), 0, -1) / len(bounds)
        axis.step([0.5, *bounds, 1.0], [1.0, *shares, 0.0], label=_label(r), **style)
    label = "lower bound of the class probability (p_lower)"
    axis.set(xlabel=label, ylabel="share of images with at least that", xlim=(0.5, 1.002), ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    return _svg(figure, results)


def compute_figure(results: list[Results], x: str) -> str:
    """ACR (hollow) and ACR-tilde (filled) against what an image costs, as SVG.

    Args:
      results: with what is asked for.
      x: "seconds" or "passes".
    """
    from matplotlib.ticker import LogLocator, NullLocator

    figure, axes = _figure(1, 1, _SIZE)
    axis = axes[0, 0]
    for i, r in enumerate(results):
        cost = r.seconds if x == "seconds" else sum((r.passes or ())[:2])
        style = {"color": _colors(results)[i], "marker": _MARKERS[i % len(_MARKERS)], "markersize": 7}
        sizes = [average_certified_radius(r[column], r.correct) for column in _SIZES]
        axis.plot([cost, cost], sizes, color=style["color"], linewidth=0.8)
        axis.plot(cost, sizes[0], fillstyle="none", linestyle="none", **style)
        axis.plot(cost, sizes[1], linestyle="none", label=_label(r), **style)
    label = "seconds for an image, as measured" if x == "seconds" else "passes through the network for an image"
    axis.set(xlabel=label, ylabel="ACR (hollow), ACR-tilde (filled)", xscale="log")
    axis.margins(y=0.1)
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_formatter("{x:,g}")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.margins(x=0.1)
    axis.grid(alpha=0.3)
    return _svg(figure, results)


def _draw_accuracy(axis, results: list[Results], column: str) -> None:
    end = max(r[column].max() for r in results) * 1.05 or 1.0
    at = np.linspace(0, end, 400)
    for r, style in zip(results, _line_styles(results), strict=True):
        accuracy = certified_accuracy(r[column], r.correct, at)
        axis.plot(at, accuracy, drawstyle="steps-pre", label=_label(r), **style)
    norm = " / ".join(sorted({r.norm for r in results if r.norm}))
    sizes = sorted({len(r.correct) for r in results})
    axis.set(xlabel=f"{norm} {_SIZES[column]}".strip(), xlim=(0, end), ylim=(0, 1.02))
    axis.set_ylabel(f"certified accuracy ({' / '.join(map(str, sizes))} images)")
    axis.grid(alpha=0.3)


def _label(results: Results) -> str:
    """The name of a run, marked, without what a legend would take for a formula or leave out."""
    name = mark(results).replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def _line_styles(results: list[Results]) -> list[dict]:
    """A line for each run, which can be told from the others without colour."""
    return [
        {"linestyle": _STYLES[i % len(_STYLES)], "color": color, "linewidth": 2.4 if r.data_dependent else 1.4}
        for i, (r, color) in enumerate(zip(results, _colors(results), strict=True))
    ]


def _colors(results: list[Results]) -> list[str]:
    """Grey for fixed noise, which the others are compared with, if there are others."""
    fixed = sum(r.data_dependent is False for r in results)
    if fixed in (0, len(results)):
        return [f"C{i % 10}" for i in range(len(results))]
    greys = (str(0.7 - 0.5 * i / fixed) for i in range(fixed))
    colors = (f"C{i % 10}" for i in range(len(results)))
    return [next(greys) if r.data_dependent is False else next(colors) for r in results]


def color_scale(thetas: list[np.ndarray]):
    """matplotlib's scale from the least of these to the largest, and whether it is logarithmic: they are far apart."""
    from matplotlib.colors import LogNorm, Normalize

    least, largest = float(np.min(thetas)), float(np.max(thetas))
    far = largest > 10 * least  # without a bound a few coordinates may be many times as wide as the others
    return (LogNorm if far else Normalize)(least, largest), far


def heat_map(shown: np.ndarray, scale) -> np.ndarray:
    """Colours of theta by a scale: uint8 [height, width, 3] of [height, width]."""
    import matplotlib

    return (matplotlib.colormaps["viridis"](scale(shown))[..., :3] * 255).astype(np.uint8)


def plot_theta(run: Run, dataset: Dataset, path: epath.PathLike, *, columns: int = 8) -> bool:
    """The theta maps of a run's first images beside the images, as PNG.

    Args:
      run: a run whose theta has one value per coordinate.
      dataset: the images of the run, or more of the same data set.
      path: PNG file.
      columns: how many images.

    Returns:
      False, with nothing drawn, if theta is one number per image or `dataset` is not what the run is of.
    """
    if dataset.fingerprint != run.settings["data"]["fingerprint"]:
        return False
    of_images = (
        (int(i), theta, int(label), int(prediction), float(gap))
        for shard in run.shards()
        for i, theta, label, prediction, gap in zip(
            shard["ids"], shard["theta"], shard["labels"], shard["predictions"], shard["gap"], strict=True
        )
        if theta.ndim == 3 and i in dataset.ids
    )
    found = list(itertools.islice(of_images, columns))
    if not found:
        return False
    from matplotlib.cm import ScalarMappable

    bound = theta_bound(run.settings)
    figure, axes = _figure(2, len(found), (1.6 * len(found) + 1, 3.8))
    shown = [theta.mean(axis=-1) for _, theta, *_ in found]
    scale, _ = color_scale(shown)
    for column, (i, theta, label, prediction, gap) in enumerate(found):
        image = dataset.images[np.searchsorted(dataset.ids, i)]
        pixels = image[..., 0] if image.shape[-1] == 1 else image
        axes[0, column].imshow(pixels, cmap="gray", vmin=0, vmax=1)
        answer = "abstains" if prediction < 0 else f"predicts {prediction}"
        axes[0, column].set_title(f"#{i}, label {label}\n{answer}", fontsize=8)
        axes[1, column].imshow(shown[column], cmap="viridis", norm=scale)
        title = f"{theta.min():.2f}..{theta.max():.2f}, gap {round_down(gap, 2)}"
        axes[1, column].set_title(f"{title}\nat the bound {np.mean(theta >= bound):.0%}", fontsize=8)
    for axis in axes.flat:
        axis.axis("off")
    figure.colorbar(ScalarMappable(scale, "viridis"), ax=axes, shrink=0.8, label="theta (image units)")
    figure.supxlabel("each image has a theta of its own; gaps are those before memory", fontsize=8)
    _save(figure, path)
    return True


def plot_training(history: dict[str, np.ndarray], path: epath.PathLike) -> None:
    """Loss and accuracy under noise against epochs, of training and of test images, as PNG.

    Args:
      history: columns epoch, train_loss, train_accuracy, test_loss, test_accuracy.
      path: PNG file.
    """
    figure, axes = _figure(1, 2, (9, 3.6))
    for axis, what, label in (
        (axes[0, 0], "loss", "loss (training: the method's own)"),
        (axes[0, 1], "accuracy", "accuracy under noise"),
    ):
        for part, style in (("train", "C0-"), ("test", "C3--")):
            axis.plot(history["epoch"], history[f"{part}_{what}"], style, marker=".", label=part)
        axis.set(xlabel="epoch", ylabel=label)
        axis.locator_params(axis="x", integer=True)
        axis.set_ylim(0, 1.02 if what == "accuracy" else 1.05 * axis.dataLim.y1)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    _save(figure, path)


def _figure(rows, columns, size, **options):
    """A figure with a canvas of its own: no display, and no state shared with the user's matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _save(figure, path):
    with epath.Path(path).open("wb") as file:
        figure.savefig(file, format="png", dpi=150)


def _svg(figure, results: list[Results]) -> str:
    """The figure as SVG with text in it as text, a legend below, and a note where the memory has not been at work."""
    import matplotlib

    if marks := legend_of_marks(results):
        axis = figure.axes[0]
        axis.set_xlabel("\n".join([axis.get_xlabel(), *marks]), fontsize=8)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=9, handlelength=3)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ancer-jax"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
