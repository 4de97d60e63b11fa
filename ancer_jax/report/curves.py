"""Pictures of curves. The functions `draw_...` draw on an axis that they are given."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from ancer_jax.report.figures import save, subplots
from ancer_jax.report.notes import footnotes, legend_of_marks, mark
from ancer_jax.report.results import Results
from ancer_jax.smoothing import ABSTAIN

_SIZE = (4.6, 4.1)  # inches: two pictures side by side on a desk, one on a phone
_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
_MARKERS = "osD^vP*X<>"
_SIZES = {"radius": "radius (image units, pixels in [0, 1])", "radius_proxy": "proxy radius (same volume)"}


def plot_certified_accuracy(results: list[Results], path: epath.PathLike) -> None:
    """Certified accuracy against radius and against proxy radius, one curve per run, as PNG."""
    figure, axes = subplots(1, 2, (10.0, 4.2), sharey=True)
    for column, axis in zip(_SIZES, axes[0], strict=True):
        draw_accuracy(axis, results, column)
    axes[0, 1].set_ylabel("")
    axes[0, 1].legend(fontsize=8, handlelength=3)
    if notes := footnotes(results):
        figure.supxlabel("\n".join(notes), fontsize=8)
    save(figure, path)


def plot_training(history: dict[str, np.ndarray], path: epath.PathLike) -> None:
    """Loss and accuracy under noise against epochs, for training and test images, as PNG.

    Args:
      history: columns epoch, train_loss, train_accuracy, test_loss, test_accuracy.
      path: PNG file.
    """
    figure, axes = subplots(1, 2, (9.0, 3.6))
    draw_history(axes[0, 0], history, "loss", "loss (for training: that of the method)")
    draw_history(axes[0, 1], history, "accuracy", "accuracy under noise")
    save(figure, path)


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

    figure, axes = subplots(1, 1, _SIZE)
    axis = axes[0, 0]
    draw(axis, results, *arguments)
    if marks := legend_of_marks(results):
        axis.set_xlabel("\n".join([axis.get_xlabel(), *marks]), fontsize=8)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9, handlelength=3)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ancer-jax"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def line_styles(results: list[Results]) -> list[dict[str, Any]]:
    """Line styles, one per run, that can be told apart without colour."""
    return [
        {"linestyle": _STYLES[i % len(_STYLES)], "color": color, "linewidth": 2.4 if r.data_dependent else 1.4}
        for i, (r, color) in enumerate(zip(results, _colors(results), strict=True))
    ]


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
