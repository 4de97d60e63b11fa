"""Results of runs, side by side, as text tables."""

import dataclasses
import datetime
import fractions

import numpy as np
import tabulate
from etils import epath

from ancer_jax.metrics import average_certified_radius, round_down
from ancer_jax.runs import parse_results, read_results, read_run

NOT_RECONCILED = "per-input classifiers, not yet reconciled by memory"
_MARK = "*"


@dataclasses.dataclass(frozen=True)
class Results:
    """One run's results.

    Attributes:
      name: how the run is called in tables and legends.
      columns: the columns of its table (`runs.read_results`), float64.
      norm: "l2" or "l1"; "" where a table does not say.
    """

    name: str
    columns: dict[str, np.ndarray]
    norm: str = ""

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
            min_sigma = self.columns.get("min_sigma", np.zeros(1))
            return bool((self["radius_proxy"] != self["radius"]).any() or (min_sigma != min_sigma[0]).any())
        return bool((self["method"] != "fixed").any())

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
        return Results(path.name, parse_results(run.table(), path), run.settings["norm"])
    return Results(path.stem, read_results(path))


def summary_table(results: list[Results], radii: list[float]) -> str:
    """Two GitHub-style tables: one line a run with its main figures, and certified accuracy at `radii`.

    Every figure is over all images of its run and rounded down; abstentions and wrong answers count as radius 0 in ACR
    and ACR-tilde.
    """
    figures = [
        {
            "run": _name(r),
            "norm": r.norm or "?",
            "images": len(r.correct),
            "accuracy": _share(r.correct),
            "abstained": _share(r["predict"] == -1),
            "ACR": round_down(average_certified_radius(r["radius"], r.correct), 3),
            "median radius": round_down(np.median(r["radius"] * r.correct), 3),
            "ACR-tilde": round_down(average_certified_radius(r["radius_proxy"], r.correct), 3),
            "median proxy": round_down(np.median(r["radius_proxy"] * r.correct), 3),
            "theta at its bound": _at_bound(r),
            "s/image": _seconds(r),
        }
        for r in results
    ]
    accuracies = [
        {"run": _name(r), "by": by} | {f"{at:g}": _share(r.correct & (r[column] >= at)) for at in radii}
        for by, column in (("radius", "radius"), ("proxy radius", "radius_proxy"))
        for r in results
        if column == "radius" or (r["radius_proxy"] != r["radius"]).any()
    ]
    parts = [_table(figures), "Certified accuracy at", _table(accuracies), *_notes(results)]
    return "\n\n".join(parts)


def compare_proxy_radius(results: list[Results]) -> str:
    """Mean proxy radius of the best run with one theta for all and of each data-dependent run, as text."""
    best = max((r for r in results if not r.data_dependent), key=lambda r: r.mean_proxy_radius)
    lines = []
    for r in (best, *(r for r in results if r.data_dependent)):
        ratio = r.mean_proxy_radius / best.mean_proxy_radius if best.mean_proxy_radius else float("inf")
        mean = round_down(r.mean_proxy_radius, 3)
        lines.append(f"  {_name(r):13} {mean}   {round_down(ratio, 2)} x the best fixed theta")
    return "\n".join([*lines, *_notes(results)])


def _notes(results: list[Results]) -> list[str]:
    notes = []
    if any(not np.array_equal(np.sort(r["idx"]), np.sort(results[0]["idx"])) for r in results):
        notes.append("These runs are not of the same images: their figures do not compare.")
    if len({r.norm for r in results if r.norm}) > 1:
        notes.append("These runs are of different norms: their figures do not compare.")
    if any(r.data_dependent for r in results):
        notes.append(f"{_MARK} {NOT_RECONCILED}")
    return notes


def _share(mask) -> str:
    return round_down(fractions.Fraction(int(mask.sum()), len(mask)), 3)


def _table(rows: list[dict]) -> str:
    return tabulate.tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def _name(results: Results) -> str:
    return results.name + (_MARK if results.data_dependent else "")


def _at_bound(results: Results) -> str:
    """How many inputs have coordinates of theta at the bound, and how much of them on average."""
    share = results.columns.get("at_theta_max")
    if share is None or not results.data_dependent:
        return "-"
    inputs = int((share > 0).sum())
    return f"{inputs} of {len(share)}" + (f" ({share[share > 0].mean():.0%} of coordinates)" if inputs else "")


def _seconds(results: Results) -> str:
    if "time" not in results.columns:
        return "-"
    try:
        return f"{np.mean([_parse_time(text) for text in results['time']]):.2f}"
    except ValueError:
        return "-"


def _parse_time(text: str) -> float:
    """Seconds in Cohen's time column, `H:MM:SS[.ffffff]`."""
    hours, minutes, seconds = text.split(":")
    return datetime.timedelta(hours=int(hours), minutes=int(minutes), seconds=float(seconds)).total_seconds()
