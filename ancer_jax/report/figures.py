"""Figures of matplotlib, made without pyplot: they need no display, and share no state with the user's matplotlib."""

import io

from etils import epath


def subplots(rows: int, columns: int, size: tuple[float, float], **options):
    """A figure of that size in inches, and its axes [rows, columns]; the options are those of `Figure.subplots`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def png(figure) -> bytes:
    """A figure as PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def save(figure, path: epath.PathLike) -> None:
    """Write a figure as PNG."""
    epath.Path(path).write_bytes(png(figure))
