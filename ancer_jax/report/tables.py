"""Results of runs, side by side, as text tables."""

import dataclasses
import datetime
import fractions
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tabulate
from etils import epath

from ancer_jax.metrics import average_certified_radius, round_down, round_up
from ancer_jax.report.compute import Passes, passes
from ancer_jax.results import parse_results, read_results
from ancer_jax.runs import Run, read_run

NOT_RECONCILED = "per-input classifiers, not reconciled by memory"
LEAKAGE_LIMIT = 0.1
_MARK = "*"


@dataclasses.dataclass(frozen=True)
class Results:
    """One run's results.

    Attributes:
      name: how the run is called in tables and legends.
      columns: the columns of its table (`results.read_results`), float64: of the classifier with memory, if the run has
        gone through one.
      norm: "l2" or "l1"; "" where a table does not say.
      before: the columns before memory, where they are known and `columns` are not they.
      run: where they come from, if that is a run directory.
    """

    name: str
    columns: dict[str, np.ndarray]
    norm: str = ""
    before: dict[str, np.ndarray] | None = None
    run: Run | None = None

    def __getitem__(self, column: str) -> np.ndarray:
        return self.columns[column]

    @property
    def correct(self) -> np.ndarray:
        """Whether each input was answered with its label."""
        return self["correct"] == 1

    @property
    def data_dependent(self) -> bool:
        """Whether theta was chosen per input; in tables without a column `method`, whether it is not one number."""
        if "method" not in self.columns:
            sigmas = [self.columns[name] for name in ("min_sigma", "sigma") if name in self.columns]
            varies = any((sigma != sigma[0]).any() for sigma in sigmas)
            return bool((self["radius_proxy"] != self["radius"]).any() or varies)
        return bool((~np.isin(self["method"], ("fixed", "shared"))).any())

    @property
    def reconciled(self) -> bool:
        """Whether the columns are those of one classifier: theta is fixed, or there was a memory."""
        return "changed" in self.columns or not self.data_dependent

    @property
    def passes(self) -> Passes | None:
        """Passes through the network for each image; None where the settings are not known."""
        return passes(self.run.settings, self.run.columns("draws")["draws"].mean()) if self.run else None

    @property
    def seconds(self) -> float | None:
        """Mean seconds for each image; None where that is not known."""
        try:
            return float(np.mean([_parse_time(text) for text in self.columns["time"]]))
        except (KeyError, ValueError):
            return None

    @property
    def mean_proxy_radius(self) -> float:
        """Mean over all inputs, whatever their answer; 0 where the classifier abstained."""
        return float(self["radius_proxy"].mean())


def load_results(path: epath.PathLike) -> Results:
    """The results of a run directory, finished or not, or of a TSV file, ours, Cohen's or ANCER's.

    Raises:
      ValueError: if there are none.
    """
    path = epath.Path(path)
    if not path.exists():
        raise ValueError(f"{path}: there is no such run or file")
    if path.is_dir():
        run = read_run(path)
        before, after = parse_results(run.table(), path), run.memory_table()
        if after is None:
            return Results(path.name, before, run.settings["norm"], run=run)
        return Results(path.name, parse_results(after, path), run.settings["norm"], before, run)
    return Results(path.stem, read_results(path))


def summary_table(results: list[Results], radii: Sequence[float], leakage_limit: float = LEAKAGE_LIMIT) -> str:
    """The tables of `summary` and their notes as GitHub-style text."""
    parts = [part for title, rows in summary(results, radii, leakage_limit) for part in (title, format_table(rows))]
    return "\n\n".join([*parts[1:], *notes(results)])


def summary(
    results: list[Results], radii: Sequence[float], leakage_limit: float = LEAKAGE_LIMIT
) -> list[tuple[str, list[dict[str, str]]]]:
    """Tables with their titles: a line per run with its main figures; certified accuracy at `radii`; for data-dependent
    noise what the memory changed, and how much of the certificates the noise carries.

    Every figure is over all images of its run, what is certified rounded down (leakage up); abstentions and wrong
    answers count as radius 0 in ACR and ACR-tilde. Where a run went through a memory, all figures but those "before"
    are after it.
    """
    sampled = any(_sampling(r) for r in results)
    figures = [
        {
            "run": mark(r),
            "norm": r.norm or "?",
            "images": str(len(r.correct)),
            **({"draws": f"{r['n'].mean():,.0f}" if "n" in r.columns else "-"} if sampled else {}),
            "accuracy": _share(r.correct),
            "abstained": _share(r["predict"] == -1),
            "ACR": round_down(average_certified_radius(r["radius"], r.correct), 3),
            "median radius": round_down(np.median(r["radius"] * r.correct), 3),
            "ACR-tilde": round_down(average_certified_radius(r["radius_proxy"], r.correct), 3),
            "median proxy": round_down(np.median(r["radius_proxy"] * r.correct), 3),
            "theta at its bound": _at_bound(r),
            "s/image": "-" if r.seconds is None else f"{r.seconds:.2f}",
        }
        for r in results
    ]
    accuracies = [
        {"run": mark(r), "by": by} | {f"{at:g}": _share(r.correct & (r[column] >= at)) for at in radii}
        for by, column in (("radius", "radius"), ("proxy radius", "radius_proxy"))
        for r in results
        if column == "radius" or (r["radius_proxy"] != r["radius"]).any()
    ]
    tables = [("Figures", figures), ("Certified accuracy at", accuracies)]
    if memories := [_memory(r) for r in results if "changed" in r.columns]:
        tables.append(("Memory (before -> after)", memories))
    measured = [r for r in results if r.data_dependent and np.isfinite(r.columns.get("leakage", np.nan)).any()]
    if leakages := [_leakage(r, leakage_limit) for r in measured]:
        title = f"Leakage to the image's class, and figures without the thetas that leak more than {leakage_limit:g}"
        tables.append((title, leakages))
    return tables


def _memory(results: Results) -> dict[str, str]:
    """What the memory changed in a run."""
    after, before = results.columns, results.before
    shrunk = after["changed"] == 1
    row = {"run": mark(results), "regions changed": f"{int(shrunk.sum())} of {len(shrunk)}"}
    inside = after["answered_by"] >= 0
    if before is None:
        return row | {"inside an earlier region": str(int(inside.sum()))}
    had = shrunk & (before["gap"] > 0)
    kept = after["gap"][had] / (before["gap"][had] + 1e-6)  # what the column may have rounded off
    overruled = after["predict"] != before["predict"]
    row["size kept by those, median (least)"] = (
        f"{round_down(np.median(kept), 3)} ({round_down(kept.min(), 3)})" if kept.size else "-"
    )
    row["inside an earlier region"] = str(int(inside.sum()))
    row["given its class instead of their own"] = str(int(overruled.sum()))
    correct = before["correct"] == 1
    row["accuracy"] = f"{_share(correct)} -> {_share(results.correct)}"
    for name, column in (("ACR", "radius"), ("ACR-tilde", "radius_proxy")):
        was = average_certified_radius(before[column], correct)
        row[name] = f"{round_down(was, 3)} -> {round_down(average_certified_radius(after[column], results.correct), 3)}"
    return row


def _leakage(results: Results, limit: float) -> dict[str, str]:
    """Distribution of leakage over the inputs that were answered, and the main figures with every theta above the limit
    counted as certifying nothing.
    """
    leakage, row = results["leakage"], {"run": mark(results)}
    # The column's decimals are exact; as binary numbers some would be rounded up once more.
    known = [fractions.Fraction(str(value)) for value in leakage[~np.isnan(leakage) & (results["predict"] != -1)]]
    kept = results.correct & (leakage <= limit)
    for name, figure in (("median", statistics.median), ("mean", statistics.mean), ("largest", max)):
        row[name] = round_up(figure(known), 3) if known else "-"
    row[f"above {limit:g}"] = f"{int((leakage > limit).sum())} of {len(known)}"
    row["accuracy without leaky"] = _share(kept)
    row["ACR without leaky"] = round_down(average_certified_radius(results["radius"], kept), 3)
    row["ACR-tilde without leaky"] = round_down(average_certified_radius(results["radius_proxy"], kept), 3)
    return row


def compare_proxy_radius(results: list[Results]) -> str:
    """Mean proxy radius, after memory, of the best run with one theta for all and of each other run, as text."""
    best = max((r for r in results if not r.data_dependent), key=lambda r: r.mean_proxy_radius)
    lines = []
    for r in (best, *(r for r in results if r.data_dependent)):
        ratio = r.mean_proxy_radius / best.mean_proxy_radius if best.mean_proxy_radius else float("inf")
        mean = round_down(r.mean_proxy_radius, 3)
        leaky = r.columns.get("leakage", np.zeros(len(r.correct))) > LEAKAGE_LIMIT
        honest = round_down(float((r["radius_proxy"] * ~leaky).mean()), 3)
        text = f"{round_down(ratio, 2)} x the best fixed theta; without leaky thetas {honest}"
        lines.append(f"  {mark(r):13} {mean}   {text}")
    return "\n".join([*lines, *notes(results)])


def notes(results: list[Results]) -> list[str]:
    """What has to be said of these runs beside each other."""
    said = []
    if any(not np.array_equal(np.sort(r["idx"]), np.sort(results[0]["idx"])) for r in results):
        said.append("These runs are not of the same images: their figures do not compare.")
    if len({r.norm for r in results if r.norm}) > 1:
        said.append("These runs are of different norms: their figures do not compare.")
    if decided := [r for r in results if _sampling(r).get("radii")]:
        radii = "; ".join(f"{r.name}: {', '.join(f'{at:g}' for at in _sampling(r)['radii'])}" for r in decided)
        said.append(
            f"Draws went on until these radii were decided ({radii}): at other radii, and in means and medians, "
            "regions may be larger than is known."
        )
    if exact := [r.name for r in results if r.run and r.run.settings.get("exact")]:
        said.append(f"Exact, without alpha, for images of 8 bits: {', '.join(exact)}.")
    if splitting := [r.name for r in results if r.run and r.run.settings.get("noise") == "splitting"]:
        said.append(f"Splitting noise: {', '.join(splitting)}.")
    if not all(r.reconciled for r in results):
        said.append(f"{_MARK} {NOT_RECONCILED}")
    return said


def _sampling(results: Results) -> Mapping[str, Any]:
    """How sampling stopped before n; empty if it did not."""
    return (results.run.settings.get("sampling") if results.run else None) or {}


def _share(mask) -> str:
    return round_down(fractions.Fraction(int(mask.sum()), len(mask)), 3)


def format_table(rows: list[dict]) -> str:
    """Rows of one set of keys as a GitHub-style table."""
    return tabulate.tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def mark(results: Results) -> str:
    """The name of a run, marked where its certificates are not those of one classifier."""
    return results.name + ("" if results.reconciled else _MARK)


def _at_bound(results: Results) -> str:
    """How many inputs have coordinates of theta at the bound, and how much of them on average."""
    share = results.columns.get("at_theta_max")
    if share is None or not results.data_dependent:
        return "-"
    inputs = int((share > 0).sum())
    return f"{inputs} of {len(share)}" + (f" ({share[share > 0].mean():.0%} of coordinates)" if inputs else "")


def _parse_time(text: str) -> float:
    """Seconds in Cohen's time column, `H:MM:SS[.ffffff]`."""
    hours, minutes, seconds = text.split(":")
    return datetime.timedelta(hours=int(hours), minutes=int(minutes), seconds=float(seconds)).total_seconds()
