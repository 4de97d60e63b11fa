"""Results as tables: a line per input, Cohen's columns first, so that existing analysis scripts read them."""

import datetime
import fractions
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from ancer_jax.certificates import SplittingL1
from ancer_jax.certification import ABSTAIN
from ancer_jax.leakage import Leaked
from ancer_jax.metrics import round_down, round_up
from ancer_jax.regions import Region, log_volume, proxy_radius, radius

_COHEN = ("idx", "label", "predict", "radius", "correct", "time")
COLUMNS = (
    *_COHEN,
    *("radius_proxy", "min_sigma", "gap", "p_lower", "count", "n", "log_volume", "method", "at_theta_max", "leakage"),
    "soft_leakage",
)
MEMORY_COLUMNS = (*COLUMNS, "changed", "answered_by")


class Answer(NamedTuple):
    """What the classifier with memory answers one input.

    Attributes:
      prediction: class or `ABSTAIN`.
      gap: of the region that is left.
      changed: whether class or gap differ from the certificate the input came with.
      answered_by: id of an earlier input in whose region it lies, -1 if there is none.
      leakage: leakage and soft leakage of the theta whose class is answered: the earlier input's if the class was
        changed.
    """

    prediction: int
    gap: float
    changed: bool
    answered_by: int
    leakage: tuple[fractions.Fraction | float, fractions.Fraction | float]


def leakage_of(settings: Mapping[str, Any], leaked: Leaked, prediction: int) -> tuple[Any, Any]:
    """Leakage and soft leakage of one input: shares of the reference images whose majority, and of the draws of the
    images held out that vote for its class under its theta; NaN where that was not measured.
    """
    if settings["method"] == "fixed":
        return fractions.Fraction(0), math.nan  # all images have this theta, the usual one
    if settings["method"] == "shared" or settings["leakage"] is None:
        return math.nan, math.nan
    if prediction == ABSTAIN:  # nothing can leak to an abstention
        return fractions.Fraction(0), fractions.Fraction(0)
    share = lambda part, whole: fractions.Fraction(int(part), int(whole)) if whole else math.nan
    return share(leaked.leaked, leaked.references), share(leaked.votes, leaked.draws)


def theta_bound(settings: Mapping[str, Any]) -> np.ndarray:
    """The largest theta that the search of a run could give: infinite without a search; exact runs round it down."""
    search = settings.get("anisotropic", settings.get("isotropic"))
    bound = np.float32(search["theta_max"] if search else np.inf)
    if search and settings.get("exact"):
        bound = SplittingL1().quantised(bound, period=settings.get("period"))
    return np.asarray(bound)


def write_table(
    shards: Iterable[Mapping[str, np.ndarray]], settings: Mapping[str, Any], answers: Mapping[int, Answer] | None = None
) -> str:
    """The text of a table of results: in order of ids, numbers rounded towards zero, leakage away from it.

    Args:
      shards: finished batches (`runs.Run.shards`).
      settings: of the run.
      answers: id -> answer of the classifier with memory; without them the table is of the certificates before it.
    """
    rows = sorted((row for shard in shards for row in _rows(shard, settings, answers)), key=lambda row: row[0])
    header = COLUMNS if answers is None else MEMORY_COLUMNS
    return "\n".join(["\t".join(header), *("\t".join(map(str, row)) for row in rows)]) + "\n"


def _rows(shard, settings, answers):
    bound = theta_bound(settings)
    norm = {"l2": 2, "l1": 1}[settings["norm"]]
    center = np.zeros(settings["data"]["image_shape"])
    for row, id_ in enumerate(shard["ids"]):
        one = {name: column[row] for name, column in shard.items()}
        theta, prediction, gap = one["theta"], one["predictions"], one["gap"]
        leakage = leakage_of(settings, Leaked(*(one[f"leaked_{name}"] for name in Leaked._fields)), int(prediction))
        extra = ()
        if answers is not None:
            prediction, gap, changed, answered_by, leakage = answers[int(id_)]
            extra = (int(changed), answered_by)
        region = Region(center, theta, gap, norm)
        at_bound = np.mean(theta >= bound)
        yield (
            int(id_),
            int(one["labels"]),
            int(prediction),
            round_down(radius(region), 6),
            int(prediction == one["labels"]),
            datetime.timedelta(seconds=float(one["seconds"])),
            round_down(proxy_radius(region), 6),
            round_down(theta.min(), 6),
            round_down(gap, 6),
            round_down(one["p_lower"], 8),
            int(one["counts"]),
            int(one["n"]),
            round_down(log_volume(region), 3),
            settings["method"],
            round_up(at_bound, 4),
            *(round_up(share, 4) for share in leakage),
            *extra,
        )


def read_results(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The columns of a results file, by `parse_results`.

    Raises:
      ValueError: if the file is not such a table or is empty.
    """
    try:
        return parse_results(epath.Path(path).read_text(), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None


def parse_results(text: str, path: epath.PathLike) -> dict[str, np.ndarray]:
    """The columns of a results table: ours, Cohen's, or ANCER's (at least idx, label, predict, radius, correct).

    Where there is no column `radius_proxy`, the noise was isotropic and the radius stands in for it.

    Raises:
      ValueError: naming `path`, if the text is not such a table or is empty.
    """
    lines = text.splitlines()
    header, rows = (lines[0].split("\t") if lines else []), [line.split("\t") for line in lines[1:] if line]
    missing = [name for name in _COHEN[:5] if name not in header]
    if missing:
        raise ValueError(f"{path}: not a results table, no column {missing[0]!r}")
    if not rows:
        raise ValueError(f"{path}: there are no results yet")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ValueError(f"{path}: line {number} has {len(row)} columns instead of {len(header)}")
    if len(set(header)) < len(header):
        raise ValueError(f"{path}: two columns have one name")
    columns = {}
    for name, values in zip(header, zip(*rows, strict=True), strict=True):
        try:
            columns[name] = np.array(values, dtype=str if name in ("time", "method") else np.float64)
        except ValueError as error:
            raise ValueError(f"{path}: column {name!r}: {error}") from None
    columns = {"radius_proxy": columns["radius"]} | columns
    for name, valid in (
        ("radius", (columns["radius"] >= 0) & np.isfinite(columns["radius"])),
        ("radius_proxy", (columns["radius_proxy"] >= 0) & np.isfinite(columns["radius_proxy"])),
        ("correct", columns["correct"] == (columns["predict"] == columns["label"])),
        ("idx", np.isin(np.arange(len(rows)), np.unique(columns["idx"], return_index=True)[1])),
    ):
        if not valid.all():
            row = valid.argmin()
            raise ValueError(f"{path}: line {row + 2}: {name} cannot be {columns[name][row]:g}")
    return columns
