"""The report as one HTML page that needs no other file."""

import base64
import datetime
import importlib.metadata
import importlib.resources
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tabulate
from etils import epath

from ancer_jax.data import Dataset
from ancer_jax.metrics import average_certified_radius, round_down, round_up
from ancer_jax.report import plots, tables
from ancer_jax.report.tables import LEAKAGE_LIMIT, Results
from ancer_jax.runs import Run, flatten

_CARDS, _PIXELS = 6, 96  # regions of a kind that are shown; longer side of a picture


class Card(NamedTuple):
    """One image's region on the page: its pictures (data URIs, "" where there are none), and lines of text."""

    title: str
    image: str
    theta: str
    lines: list[str]


def write_page(
    results: list[Results],
    path: epath.PathLike,
    *,
    radii: Sequence[float],
    leakage_limit: float = LEAKAGE_LIMIT,
    datasets: Sequence[Dataset] = (),
    more: Sequence[tuple[str, list[dict[str, str]]]] = (),
) -> None:
    """Write the report of runs as one self-contained HTML page: no script, no other file, nothing from a network.

    Args:
      results: of runs or tables (`load_results`), with names of their own. What only a run directory knows (images,
        theta, settings) is left out for tables.
      path: the file.
      radii, leakage_limit: as in `tables.summary`.
      datasets: data sets whose images are shown, where a run is of one of them.
      more: further tables with their titles.

    Raises:
      ValueError: if there are no results.
    """
    import jinja2

    if not results:
        raise ValueError("results must hold at least one run")
    template = importlib.resources.files("ancer_jax.report").joinpath("page.html").read_text("utf-8")
    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(**options)
    bounded = [r for r in results if "p_lower" in r.columns]
    page = environment.from_string(template).render(
        runs=[tables.mark(r) for r in results],
        tables=[(title, _table(rows)) for title, rows in (*tables.summary(results, radii, leakage_limit), *more)],
        facts=_facts([r.run.settings for r in results if r.run]),
        notes=tables.notes(results),
        curves=_curves(results),
        bounds=_uri("svg+xml", plots.p_lower_figure(bounded)) if bounded else "",
        compute=_compute(results),
        regions=[_regions(r, r.run, datasets) for r in results if r.run],
        settings=_settings({tables.mark(r): r.run for r in results if r.run}),
        version=importlib.metadata.version("ancer-jax"),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        leakage_limit=leakage_limit,
    )
    with epath.Path(path).open("wb") as file:
        file.write(page.encode())


def _table(rows: list[dict[str, str]]) -> str:
    """An HTML table; tabulate escapes what is in it."""
    return tabulate.tabulate(rows, headers="keys", tablefmt="html", disable_numparse=True)


def _uri(kind: str, content: str | bytes) -> str:
    content = content.encode() if isinstance(content, str) else content
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _facts(settings: Sequence[Mapping[str, Any]]) -> str:
    """What one has to know of all runs before their figures mean anything."""
    values = [
        (", ".join(dict.fromkeys(s["data"]["name"] for s in settings)), ""),
        (", ".join(dict.fromkeys(s["norm"] for s in settings)), ""),
        (", ".join(dict.fromkeys(f"{s['certify']['n']:,}" for s in settings)), "n = "),
        (
            ", ".join(dict.fromkeys("0" if s.get("exact") else repr(s["certify"]["alpha"]) for s in settings)),
            "alpha = ",
        ),
    ]
    return "; ".join(f"{name}{value}" for value, name in values)


def _curves(results: list[Results]) -> list[tuple[str, str]]:
    """Curves by radius and, where it is another one, by proxy radius, each with its description."""
    both = any((r["radius"] != r["radius_proxy"]).any() for r in results)
    return [
        (_uri("svg+xml", plots.certified_accuracy_figure(results, column)), name)
        for column, name in (("radius", "radius"), ("radius_proxy", "proxy radius"))
        if both or column == "radius"
    ]


def _compute(results: list[Results]) -> dict[str, Any] | None:
    """Sizes against cost, as a table and as pictures; None where no cost is known."""
    if not any(r.seconds is not None or r.passes for r in results):
        return None
    rows, figures = [], []
    for r in results:
        forward, backward, leakage = (f"{count:,.0f}" for count in r.passes) if r.passes else "---"
        rows.append(
            {
                "run": tables.mark(r),
                "s/image": "-" if r.seconds is None else f"{r.seconds:.3g}",
                "forward passes": forward,
                "backward passes": backward,
                "for leakage": leakage,
                "ACR": round_down(average_certified_radius(r["radius"], r.correct), 3),
                "ACR-tilde": round_down(average_certified_radius(r["radius_proxy"], r.correct), 3),
            }
        )
    for x, name, known in (
        ("seconds", "seconds", [r for r in results if r.seconds]),
        ("passes", "passes through the network, forward and backward", [r for r in results if r.passes]),
    ):
        if known:
            figures.append((_uri("svg+xml", plots.compute_figure(known, x)), name))
    return {"table": _table(rows), "figures": figures}


def _regions(results: Results, run: Run, datasets: Sequence[Dataset]) -> dict[str, Any]:
    """The largest and the smallest certified regions of a run, its first ones, and those that the memory changed."""
    dataset = next((d for d in datasets if d.fingerprint == run.settings["data"].get("fingerprint")), None)
    size, ids = results["radius_proxy"], results["idx"].astype(int)
    certified = np.flatnonzero(size > 0)
    order = certified[np.argsort(size[certified], kind="stable")]
    groups = [("All images, largest proxy radius first", np.argsort(-size, kind="stable"))]
    if len(ids) > _CARDS:
        groups = [
            ("Largest regions (proxy radius)", order[::-1][:_CARDS]),
            ("Smallest regions", order[:_CARDS]),
            ("First images", np.argsort(ids)[:_CARDS]),
        ]
    if "changed" in results.columns and (changed := np.flatnonzero(results["changed"] == 1)).size:
        lost = (results.before or results.columns)["radius_proxy"][changed] - size[changed]
        title = f"Changed by the memory: {len(changed)}, those that lost most first"
        groups.insert(0, (title, changed[np.argsort(-lost, kind="stable")][:_CARDS]))
    groups = [(title, rows.tolist()) for title, rows in groups]
    wanted = {int(ids[row]) for _, rows in groups for row in rows}
    thetas = {
        int(i): np.array(theta)  # not a part of its shard, which would stay
        for shard in run.shards(["theta"])
        for i, theta in zip(shard["ids"], shard["theta"], strict=True)
        if int(i) in wanted
    }
    shown = [theta.mean(axis=-1) for theta in thetas.values() if theta.ndim == 3]
    maps, (scale, logarithmic) = bool(shown), plots.color_scale(shown or [np.ones(1)])
    cards = {row: _card(results, row, thetas[int(ids[row])], scale, dataset) for _, rows in groups for row in rows}
    return {
        "name": tables.mark(results),
        "note": "; ".join(tables.legend_of_marks([results])),
        "maps": maps,
        "bar": _picture(plots.heat_map(scale.inverse(np.linspace(0, 1, 64))[None], scale)) if maps else "",
        "scale": [f"{value:.3g}" for value in (scale.vmin, scale.vmax)],
        "logarithmic": logarithmic,
        "images": dataset is not None,
        "data": run.settings["data"]["name"],
        "groups": [(title, [cards[row] for row in rows]) for title, rows in groups if rows],
    }


def _card(results: Results, row: int, theta: np.ndarray, scale, dataset: Dataset | None) -> Card:
    line = {name: column[row] for name, column in results.columns.items()}
    i, label, answer = (int(line[name]) for name in ("idx", "label", "predict"))
    own = answer if results.before is None else int(results.before["predict"][row])  # p_lower is of that
    image = ""
    if dataset is not None and i in dataset.ids:
        image = _picture((np.clip(dataset.images[np.searchsorted(dataset.ids, i)], 0, 1) * 255).astype(np.uint8))
    spread = " to ".join(dict.fromkeys(f"{value:.3g}" for value in (theta.min(), theta.max())))
    said = "abstains" if answer == -1 else f"answers {answer}" + ("" if answer == label else " (wrong)")
    lines = [
        f"label {label}, {said}",
        f"radius {round_down(line['radius'], 3)}",
        f"proxy radius {round_down(line['radius_proxy'], 3)}",
        f"gap {round_down(line['gap'], 3)}",
        f"p_lower {round_down(line['p_lower'], 4)}" + (f" of {own}, its own answer" if own != answer else ""),
        f"theta {spread}",
    ]
    if results.data_dependent and np.isfinite(line["leakage"]):
        lines.append(f"leakage {round_up(line['leakage'], 3)}, soft {round_up(line['soft_leakage'], 3)}")
    if line.get("changed") == 1 and results.before is not None:
        was = {name: column[row] for name, column in results.before.items()}
        before = f"proxy radius {round_down(was['radius_proxy'], 3)}"
        before += f", answer {int(was['predict'])}" if was["predict"] != answer else ""
        lines.append(f"before memory: {before}")
    if line.get("answered_by", -1) >= 0:
        lines.append(f"inside the region of #{int(line['answered_by'])}")
    picture = _picture(plots.heat_map(theta.mean(axis=-1), scale)) if theta.ndim == 3 else ""
    return Card(f"#{i}", image, picture, lines)


def _picture(pixels: np.ndarray) -> str:
    """A small PNG: uint8 [height, width, channels], of 1 or 3 channels."""
    import PIL.Image

    picture = PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    picture.thumbnail((_PIXELS, _PIXELS))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return _uri("png", file.getvalue())


def _settings(runs: dict[str, Run]) -> list[dict[str, Any]]:
    """Settings and versions, a row for each: those that differ between the runs, and the others."""
    columns = []
    for run in runs.values():
        made = {f"made with {name}": value for name, value in run.made().items()}
        columns.append(dict(flatten(run.settings)) | made)
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = {name: [column.get(name) for column in columns] for name in names}
    tables = []
    for title, differs in (("What differs between the runs", True), ("The same for all", False)):
        part = {name: row for name, row in rows.items() if any(value != row[0] for value in row) == differs}
        shown = [(name, [_short(value) for value in (row if differs else row[:1])]) for name, row in part.items()]
        tables.append({"title": title, "open": differs, "runs": list(runs) if differs else ["value"], "rows": shown})
    if len(runs) == 1:
        tables[1] |= {"title": "Of this run", "open": True}
    return [table for table in tables if table["rows"]]


def _short(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
