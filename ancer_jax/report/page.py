"""The report as one HTML page that needs no other file."""

import base64
import datetime
import importlib.metadata
import importlib.resources
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tabulate
from etils import epath

from ancer_jax.basis import Basis, KarhunenLoeve, Pixels
from ancer_jax.data import Dataset
from ancer_jax.metrics import round_down, round_up
from ancer_jax.report import curves, notes, tables, theta_maps
from ancer_jax.report.figures import png
from ancer_jax.report.notes import alpha_of, mark
from ancer_jax.report.results import LEAKY_ABOVE, Results
from ancer_jax.runs import Run
from ancer_jax.runs.settings import flatten, short
from ancer_jax.smoothing import ABSTAIN

_CARDS, _PIXELS = 6, 96  # regions shown of each kind; longer side of a picture


def write_page(
    results: list[Results],
    path: epath.PathLike,
    *,
    radii: Sequence[float],
    leaky_above: float = LEAKY_ABOVE,
    datasets: Sequence[Dataset] = (),
    more: Sequence[tuple[str, list[dict[str, str]]]] = (),
) -> None:
    """Write the report of runs as one self-contained HTML page: no script, no other file, no network access.

    Args:
      results: of runs or tables (`load_results`), each with a different name. Images, theta and settings are only shown
        for run directories.
      path: the file.
      radii, leaky_above: as in `summary`.
      datasets: data sets of the runs; runs of other data sets are shown without their images.
      more: further tables with their titles.

    Raises:
      ValueError: if there are no results.
    """
    import jinja2

    if not results:
        raise ValueError("results must hold at least one run")
    template = (importlib.resources.files("ancer_jax.report") / "page.html").read_text("utf-8")
    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    bounded = [r for r in results if "p_lower" in r.columns]
    page = jinja2.Template(template, **options).render(
        runs=[mark(r) for r in results],
        tables=[(title, _table(rows)) for title, rows in (*tables.summary(results, radii, leaky_above), *more)],
        facts=_facts(results),
        notes=notes.caveats(results, leaky_above) + notes.notes(results),
        curves=_curves(results),
        bounds=_svg(bounded, curves.draw_p_lower) if bounded else "",
        cost=_cost(results),
        regions=[_regions(r, r.run, datasets) for r in results if r.run],
        settings=_settings({mark(r): r.run for r in results if r.run}),
        version=importlib.metadata.version("ancer-jax"),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        leaky_above=leaky_above,
        coloured=any(r.config and r.config.basis != Pixels() for r in results),
    )
    epath.Path(path).write_bytes(page.encode())


def _table(rows: list[dict[str, str]]) -> str:
    """An HTML table; tabulate escapes its cells."""
    return tabulate.tabulate(rows, headers="keys", tablefmt="html", disable_numparse=True)


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _svg(results: list[Results], draw, *arguments: str) -> str:
    return _uri("svg+xml", curves.svg(results, draw, *arguments).encode())


def _facts(results: list[Results]) -> str:
    """The settings without which the figures of these runs mean nothing."""
    runs = [r.run for r in results if r.run]
    names, norms = [run.data.name for run in runs], [run.config.norm for run in runs]
    counts = ["all draws" if run.config.enumerable else f"{run.config.certify.n:,}" for run in runs]
    alphas = [alpha_of(r) for r in results if r.run]
    facts = (("", names), ("", norms), ("n = ", counts), ("alpha = ", alphas))
    return "; ".join(name + ", ".join(dict.fromkeys(values)) for name, values in facts)


def _curves(results: list[Results]) -> list[tuple[str, str]]:
    """Curves by radius and, if it differs from the radius, by proxy radius, each with the name of its axis."""
    both = [("radius", "radius"), ("radius_proxy", "proxy radius")][: 1 if all(r.only_balls for r in results) else 2]
    return [(_svg(results, curves.draw_accuracy, column), name) for column, name in both]


def _cost(results: list[Results]) -> dict[str, Any] | None:
    """Figures against cost, as a table and as pictures; None where no cost is known."""
    if all(r.seconds is None and r.passes is None for r in results):
        return None
    rows = []
    for r in results:
        forward, backward, leakage = (f"{count:,.0f}" for count in r.passes) if r.passes else ["-"] * 3
        row = {"run": mark(r), "s/image": "-" if r.seconds is None else f"{r.seconds:.3g}"}
        row |= {"forward passes": forward, "backward passes": backward, "for leakage": leakage}
        acr = {"ACR": round_down(r.acr("radius"), 3), "ACR-tilde": round_down(r.acr("radius_proxy"), 3)}
        rows.append(row | acr)
    names = {"seconds": "seconds", "passes": "passes through the network, forward and backward,"}
    known = {cost: [r for r in results if getattr(r, cost)] for cost in names}
    figures = [(_svg(known[cost], curves.draw_cost, cost), name) for cost, name in names.items() if known[cost]]
    return {"table": _table(rows), "figures": figures}


def _groups(results: Results) -> list[tuple[str, list[int]]]:
    """The regions of a run that are shown, under titles, as rows of its results."""
    size, groups = results["radius_proxy"], []
    if "changed" in results.columns and (changed := np.flatnonzero(results["changed"] == 1)).size:
        lost = results.own["radius_proxy"][changed] - size[changed]
        title = f"Changed by the memory: {len(changed)}, largest losses first"
        groups.append((title, changed[np.argsort(-lost, kind="stable")][:_CARDS]))
    if len(size) <= _CARDS:
        groups.append(("All images, largest proxy radius first", np.argsort(-size, kind="stable")))
    else:
        certified = np.flatnonzero(size > 0)
        order = certified[np.argsort(size[certified], kind="stable")]
        groups.append(("Largest regions (proxy radius)", order[::-1][:_CARDS]))
        groups.append(("Smallest regions", order[:_CARDS]))
        groups.append(("First images", np.argsort(results["idx"])[:_CARDS]))
    return [(title, rows.tolist()) for title, rows in groups if rows.size]


def _regions(results: Results, run: Run, datasets: Sequence[Dataset]) -> dict[str, Any]:
    """What the page shows of the regions of a run."""
    dataset = next((d for d in datasets if run.matches(d)), None)
    figure = None if dataset is None else theta_maps.universal_figure(results, dataset)
    groups, ids = _groups(results), results["idx"]
    thetas = results.thetas({int(ids[row]) for _, rows in groups for row in rows})
    shown = [theta.mean(axis=-1) for theta in thetas.values() if theta.ndim == 3 and not figure]
    scale, logarithmic = theta_maps.color_scale(shown or [np.ones(1)])
    by, axes = notes.THETA_BY[run.config.basis.name]
    drawn = scale if shown else None
    cards = {row: _card(results, row, thetas[int(ids[row])], drawn, dataset) for _, rows in groups for row in rows}
    return {
        "name": mark(results),
        "note": "; ".join(notes.legend_of_marks([results])),
        "map": figure and _uri("png", png(figure)),
        "bar": _picture(theta_maps.heat_map(scale.inverse(np.linspace(0, 1, 64))[None], scale)) if shown else "",
        "scale": [f"{value:.3g}" for value in (scale.vmin, scale.vmax)],
        "logarithmic": logarithmic,
        "by": by.removeprefix("theta").strip(),
        "axes": f"{axes} " if axes else "",
        "images": dataset is not None,
        "data": run.data.name,
        "groups": [(title, [cards[row] for row in rows]) for title, rows in groups],
    }


def _card(results: Results, row: int, theta: np.ndarray, scale, dataset: Dataset | None) -> dict[str, Any]:
    """One image's region: pictures of the image, of its theta on a scale and of coloured noise ("" for none), and
    lines of text.
    """
    line, own = ({name: column[row] for name, column in part.items()} for part in (results.columns, results.own))
    i, label, answer = (int(line[name]) for name in ("idx", "label", "predict"))
    image = noisy = ""
    if dataset is not None and i in dataset.ids:
        pixels = dataset.images[np.searchsorted(dataset.ids, i)]
        image = _picture_of(pixels)
        if theta.ndim == 3 and results.config and results.config.basis != Pixels():
            noisy = _picture_of(theta_maps.noisy_copy(results.config.certified_noise, pixels, theta))
    spread = " to ".join(dict.fromkeys(f"{value:.3g}" for value in (theta.min(), theta.max())))
    said = "abstains" if answer == ABSTAIN else f"answers {answer}" + ("" if answer == label else " (wrong)")
    overruled = own["predict"] != answer  # p_lower is of the image's own class
    lines = [
        f"label {label}, {said}",
        f"radius {round_down(line['radius'], 3)}",
        f"proxy radius {round_down(line['radius_proxy'], 3)}",
        f"gap {round_down(line['gap'], 3)}",
        f"p_lower {round_down(line['p_lower'], 4)}" + f" of {int(own['predict'])}, its own answer" * bool(overruled),
        f"theta {spread}",
    ]
    if results.data_dependent and not math.isnan(line["leakage"]):
        soft = "" if math.isnan(line["soft_leakage"]) else f", soft {round_up(line['soft_leakage'], 3)}"
        lines.append(f"leakage {round_up(line['leakage'], 3)}{soft}")
    if line.get("changed") == 1:
        before = f"before memory: proxy radius {round_down(own['radius_proxy'], 3)}"
        lines.append(before + f", answer {int(own['predict'])}" * bool(overruled))
    if line.get("answered_by", -1) >= 0:
        lines.append(f"inside the region of #{int(line['answered_by'])}")
    heat_map = _picture(theta_maps.heat_map(theta.mean(axis=-1), scale)) if scale else ""
    return {"title": f"#{i}", "image": image, "theta": heat_map, "noisy": noisy, "lines": lines}


def _picture_of(image: np.ndarray) -> str:
    return _picture((theta_maps.drawable(image) * 255).astype(np.uint8))


def _picture(pixels: np.ndarray) -> str:
    """A small PNG of uint8 [height, width] or [height, width, 3], as a data URI."""
    import PIL.Image

    picture = PIL.Image.fromarray(pixels)
    picture.thumbnail((_PIXELS, _PIXELS))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return _uri("png", file.getvalue())


def _settings(runs: dict[str, Run]) -> list[dict[str, Any]]:
    """Tables of settings and versions: one of those that differ between the runs, one of the others."""
    columns, coloured = [], any(run.config.basis != Pixels() for run in runs.values())
    for run in runs.values():
        made_with = {f"made with {name}": value for name, value in run.made_with_all().items()}
        settings = {**run.settings, "basis": _basis(run.config.basis)} if coloured else run.settings
        columns.append(dict(flatten(settings)) | made_with)
    names = dict.fromkeys(name for column in columns for name in column)
    rows = {name: [column.get(name) for column in columns] for name in names}
    found, cells = [], lambda row: [short("-" if value is None else value) for value in row]
    for title, differs in (("Different between the runs", True), ("The same in all runs", False)):
        part = {name: row for name, row in rows.items() if any(value != row[0] for value in row) == differs}
        shown = [(name, cells(row if differs else row[:1])) for name, row in part.items()]
        found.append({"title": title, "open": differs, "runs": list(runs) if differs else ["value"], "rows": shown})
    if len(runs) == 1:
        found[1] |= {"title": "Of this run", "open": True}
    return [table for table in found if table["rows"]]


def _basis(basis: Basis) -> dict[str, str]:
    """Short settings of a basis: a hash in place of matrices."""
    return {"name": basis.name} | ({"digest": basis.digest} if isinstance(basis, KarhunenLoeve) else {})
