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
UNKNOWN = "not known whether theta was chosen for each image: if so, these are " + NOT_RECONCILED
LEAKAGE_LIMIT = 0.1
# What a name is marked with, and why.
_MARKS = {"*": NOT_RECONCILED, "?": UNKNOWN}


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
    def data_dependent(self) -> bool | None:
        """Whether theta was chosen per input; None where a table does not say.

        It says so by its column `method`. In others' tables a sigma that varies, or regions that are no balls, show
        that it was; nothing shows that it was not.
        """
        if "method" in self.columns:
            return bool((~np.isin(self["method"], ("fixed", "shared"))).any())
        sigmas = [self.columns[name] for name in ("min_sigma", "sigma") if name in self.columns]
        if (self["radius_proxy"] != self["radius"]).any() or any((sigma != sigma[0]).any() for sigma in sigmas):
            return True
        return None

    @property
    def reconciled(self) -> bool:
        """Whether the columns are known to be those of one classifier: theta is fixed, or there was a memory."""
        return "changed" in self.columns or self.data_dependent is False

    @property
    def alpha(self) -> fractions.Fraction | None:
        """The error probability of each certificate, 0 of exact ones; None where the settings are not known."""
        if self.run is None:
            return None
        exact = self.run.settings.get("exact")
        return fractions.Fraction(0) if exact else fractions.Fraction(repr(self.run.settings["certify"]["alpha"]))

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
            **({"all lines hold": _joint(r)} if any(r.alpha is not None for r in results) else {}),
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
        {"run": mark(r), "by": by} | {_exactly(at): _share(r.correct & (r[column] >= at)) for at in radii}
        for by, column in (("radius", "radius"), ("proxy radius", "radius_proxy"))
        for r in results
        if column == "radius" or (r["radius_proxy"] != r["radius"]).any()
    ]
    tables = [("Figures", figures), ("Certified accuracy at", accuracies)]
    if memories := [_memory(r) for r in results if "changed" in r.columns]:
        tables.append(("Memory (before -> after)", memories))
    if leakages := [_leakage(r, leakage_limit) for r in results if r.data_dependent]:
        limit = _exactly(leakage_limit)
        title = (
            f"Leakage to the image's class, and figures of those thetas alone that are known to leak at most {limit}"
        )
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
    """Distribution of leakage over the inputs that were answered, and the main figures with every theta that is not
    known to leak at most the limit counted as certifying nothing.
    """
    row, kept, soft = {"run": mark(results)}, _kept(results, limit), _measured(results, "soft_leakage")
    known = _measured(results, "leakage")
    for name, figure in (("median", statistics.median), ("mean", statistics.mean), ("largest", max)):
        row[name] = round_up(figure(known), 3) if known else _NOT_MEASURED
    row["mean soft, held out"] = round_up(statistics.mean(soft), 3) if soft else _NOT_MEASURED
    above = sum(leakage > fractions.Fraction(repr(float(limit))) for leakage in known)
    row[f"above {_exactly(limit)}"] = f"{above} of {len(known)}" if known else _NOT_MEASURED
    figures = {
        "accuracy without leaky": lambda kept: _share(kept),
        "ACR without leaky": lambda kept: round_down(average_certified_radius(results["radius"], kept), 3),
        "ACR-tilde without leaky": lambda kept: round_down(average_certified_radius(results["radius_proxy"], kept), 3),
    }
    return row | {
        name: _NOT_MEASURED if kept is None else figure(results.correct & kept) for name, figure in figures.items()
    }


_NOT_MEASURED = "not measured"


def _measured(results: Results, column: str) -> list[fractions.Fraction]:
    """The known values of a column of leakage, of the inputs that were answered."""
    values = results.columns.get(column, np.full(len(results.correct), np.nan))
    # The column's decimals are exact; as binary numbers some would be rounded up once more.
    return [fractions.Fraction(str(value)) for value in values[~np.isnan(values) & (results["predict"] != -1)]]


def _kept(results: Results, limit: float) -> np.ndarray | None:
    """Whether each input's theta is known to leak at most the limit; None where nothing was measured."""
    leakage = results.columns.get("leakage", np.full(len(results.correct), np.nan))
    return None if np.isnan(leakage).all() else leakage <= limit  # NaN is not


def compare_proxy_radius(results: list[Results], best: Results) -> str:
    """Mean proxy radius, after memory, of the best fixed theta's run and of each data-dependent one, as text.

    Args:
      results: the runs.
      best: the run of the best fixed theta: chosen by other draws than its own, since what is chosen by the draws that
        certify it is wrong more often than alpha.
    """
    lines = []
    for r in (best, *(r for r in results if r.data_dependent)):
        ratio = r.mean_proxy_radius / best.mean_proxy_radius if best.mean_proxy_radius else float("inf")
        mean, kept = round_down(r.mean_proxy_radius, 3), _kept(r, LEAKAGE_LIMIT)
        honest = _NOT_MEASURED if kept is None else round_down(float((r["radius_proxy"] * kept).mean()), 3)
        text = f"{round_down(ratio, 2)} x the best fixed theta; without leaky thetas {honest}"
        lines.append(f"  {mark(r):13} {mean}   {text}")
    return "\n".join([*lines, *_two_claims(results), *legend_of_marks(results)])


TWO_CLAIMS = (
    "A certificate of one theta for all images holds for any input in its region. After memory, a certificate speaks "
    "of inputs that are served after its image (in the order of ids), and inside a stored region the memory answers by "
    "rule. These are two threat models: a larger figure does not make its classifier the more robust one."
)


def _two_claims(results: list[Results]) -> list[str]:
    kinds = {r.data_dependent for r in results}
    return [TWO_CLAIMS] if True in kinds and len(kinds) > 1 else []


def notes(results: list[Results]) -> list[str]:
    """What has to be said of these runs beside each other."""
    said = []
    if any(not np.array_equal(np.sort(r["idx"]), np.sort(results[0]["idx"])) for r in results):
        said.append("These runs are not of the same images: their figures do not compare.")
    if len({r.norm for r in results if r.norm}) > 1:
        said.append("These runs are of different norms: their figures do not compare.")
    said += _two_claims(results)
    if any(r.data_dependent and r.reconciled and r.alpha != 0 for r in results):
        said.append(
            "alpha applies to each certificate. After memory, a line holds if its own certificate and those of all "
            "earlier images do: the i-th line with probability at least 1 - i alpha."
        )
    if any(r.data_dependent and r.reconciled and _kept(r, LEAKAGE_LIMIT) is not None for r in results):
        said.append(
            "Figures without leaky thetas count such images as 0; their regions stay in the memory, and may have "
            "changed others."
        )
    if decided := [r for r in results if _sampling(r).get("radii")]:
        radii = "; ".join(f"{r.name}: {', '.join(_exactly(at) for at in _sampling(r)['radii'])}" for r in decided)
        said.append(
            f"Draws went on until these radii were decided ({radii}): at other radii, and in means and medians, "
            "regions may be larger than is known."
        )
    if exact := [r.name for r in results if r.run and r.run.settings.get("exact")]:
        said.append(f"Exact, without alpha, for images of 8 bits: {', '.join(exact)}.")
    if splitting := [r.name for r in results if r.run and r.run.settings.get("noise") == "splitting"]:
        said.append(f"Splitting noise: {', '.join(splitting)}.")
    return said + legend_of_marks(results)


def _joint(results: Results) -> str:
    """The probability, at least, with which all certificates of a table hold together, rounded down."""
    if results.alpha is None:
        return "-"
    certain = 1 - len(results.correct) * results.alpha
    return "always" if certain == 1 else f"p >= {round_down(certain, 4)}" if certain > 0 else "nothing is known"


def _exactly(number: float) -> str:
    """The shortest text of a number that is no other one."""
    return text if float(text := f"{number:g}") == number else repr(float(number))


def _sampling(results: Results) -> Mapping[str, Any]:
    """How sampling stopped before n; empty if it did not."""
    return (results.run.settings.get("sampling") if results.run else None) or {}


def _share(mask) -> str:
    return round_down(fractions.Fraction(int(mask.sum()), len(mask)), 3)


def format_table(rows: list[dict]) -> str:
    """Rows of one set of keys as a GitHub-style table."""
    return tabulate.tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def mark(results: Results) -> str:
    """The name of a run, marked where its certificates are not, or not known to be, those of one classifier."""
    return results.name + _mark(results)


def _mark(results: Results) -> str:
    return "" if results.reconciled else "?" if results.data_dependent is None else "*"


def legend_of_marks(results: list[Results]) -> list[str]:
    """What the marks of these runs mean."""
    return [f"{mark} {why}" for mark, why in _MARKS.items() if mark in map(_mark, results)]


def footnotes(results: list[Results]) -> list[str]:
    """What a picture of these runs has to say: the marks, and in short that there are two threat models."""
    short = "Two threat models: one theta for all, any input in a region; with memory, inputs that are served later."
    return ([short] if _two_claims(results) else []) + legend_of_marks(results)


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
