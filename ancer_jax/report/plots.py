"""Pictures: certified accuracy curves and theta maps."""

import numpy as np
from etils import epath

from ancer_jax.data import Dataset
from ancer_jax.metrics import certified_accuracy, round_down
from ancer_jax.report.tables import NOT_RECONCILED, Results
from ancer_jax.runs import Run

_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))


def plot_certified_accuracy(results: list[Results], path: epath.PathLike) -> None:
    """Certified accuracy against radius and against proxy radius, one curve a run, as PNG."""
    norm = " / ".join(sorted({r.norm for r in results if r.norm}))
    figure, axes = _figure(1, 2, (10, 4.2), sharey=True)
    for column, axis, label in (
        ("radius", axes[0, 0], f"{norm} radius (image units, pixels in [0, 1])"),
        ("radius_proxy", axes[0, 1], f"{norm} proxy radius (same volume)"),
    ):
        end = max(r[column].max() for r in results) * 1.05 or 1.0
        at = np.linspace(0, end, 400)
        fixed = [r for r in results if not r.data_dependent]
        for i, r in enumerate(results):
            name = r.name if r.reconciled else f"{r.name} *"
            accuracy = certified_accuracy(r[column], r.correct, at)
            width = 2.4 if r.data_dependent else 1.4
            color = f"C{i % 10}"
            if 0 < len(fixed) < len(results):  # fixed noise is what the others are compared with
                others = [other for other in results if other.data_dependent]
                color = f"C{others.index(r) % 10}" if r.data_dependent else str(0.7 - 0.5 * fixed.index(r) / len(fixed))
            style = {"linestyle": _STYLES[i % len(_STYLES)], "color": color, "linewidth": width}
            axis.plot(at, accuracy, drawstyle="steps-pre", label=name, **style)
        axis.set(xlabel=label.strip(), xlim=(0, end), ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    sizes = sorted({len(r.correct) for r in results})
    axes[0, 0].set_ylabel(f"certified accuracy ({' / '.join(map(str, sizes))} images)")
    axes[0, 1].legend(fontsize=8)
    if not all(r.reconciled for r in results):
        figure.supxlabel(f"* {NOT_RECONCILED}", fontsize=8)
    _save(figure, path)


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
    found = [
        (int(i), theta, int(label), int(prediction), float(gap))
        for shard in run.shards()
        for i, theta, label, prediction, gap in zip(
            shard["ids"], shard["theta"], shard["labels"], shard["predictions"], shard["gap"], strict=True
        )
        if theta.ndim == 3 and i in dataset.ids
    ][:columns]
    if not found:
        return False
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bound = np.float32(run.settings["anisotropic"]["theta_max"])
    figure, axes = _figure(2, len(found), (1.6 * len(found) + 1, 3.8))
    scale = Normalize(0, max(theta.max() for _, theta, *_ in found))
    for column, (i, theta, label, prediction, gap) in enumerate(found):
        image = dataset.images[np.searchsorted(dataset.ids, i)]
        pixels = image[..., 0] if image.shape[-1] == 1 else image
        axes[0, column].imshow(pixels, cmap="gray", vmin=0, vmax=1)
        answer = "abstains" if prediction < 0 else f"predicts {prediction}"
        axes[0, column].set_title(f"#{i}, label {label}\n{answer}", fontsize=8)
        axes[1, column].imshow(theta.mean(axis=-1), cmap="viridis", norm=scale)
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
