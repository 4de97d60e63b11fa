"""Results as exact columns, and as tables: a line per input, with Cohen's columns first for existing scripts."""

import datetime
import fractions
import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from ancer_jax.metrics import round_down, round_up
from ancer_jax.regions.region import Region
from ancer_jax.runs.config import RunConfig
from ancer_jax.smoothing.certificate import ABSTAIN

Columns = dict[str, np.ndarray]

_COHEN = ("idx", "label", "predict", "radius", "correct", "time")
COLUMNS = (
    *_COHEN,
    *("radius_proxy", "min_sigma", "gap", "p_lower", "count", "n", "log_volume", "method", "at_theta_max", "leakage"),
    "soft_leakage",
)
MEMORY_COLUMNS = (*COLUMNS, "changed", "answered_by")
_LEAKAGES = ("leakage", "soft_leakage")
# Digits of what is written rounded down, and of what counts against a result and is rounded up.
_DOWN = {**dict.fromkeys(("radius", "radius_proxy", "min_sigma", "gap"), 6), "p_lower": 8, "log_volume": 3}
_UP = dict.fromkeys(("at_theta_max", *_LEAKAGES), 4)


def columns_of(
    shards: Iterable[Mapping[str, np.ndarray]], config: RunConfig, image_shape: tuple[int, ...]
) -> tuple[Columns, Columns]:
    """Exact columns of the certificates before memory, in order of idx, from the shards of a run (`Run.shards`).

    Returns:
      The columns of a table: names as in `COLUMNS`, with `seconds` for time, and `draws`. Leakages are Fractions, or
      NaN where they were not measured. And further columns: sizes of a region of gap 1 (`radius`, `radius_proxy`,
      `log_volume`), and a `digest` of each certificate.
    """
    parts = [_of_shard(shard, config, image_shape) for shard in shards]
    if not parts:
        return {}, {}
    tables, units = zip(*parts, strict=True)
    order = np.argsort(np.concatenate([table["idx"] for table in tables]))
    joined = lambda many: {name: np.concatenate([one[name] for one in many])[order] for name in many[0]}
    return joined(tables), joined(units)


def _of_shard(shard: Mapping[str, np.ndarray], config: RunConfig, image_shape) -> tuple[Columns, Columns]:
    theta, count = shard["theta"], len(shard["ids"])
    norm, axes = config.certified_noise.norm, tuple(range(1, theta.ndim))
    region = Region(np.broadcast_to(0.0, (count, *image_shape)), theta, np.ones(count), norm)
    sizes = {"radius": region.radius, "radius_proxy": region.proxy_radius, "log_volume": region.log_volume}
    unit = {**{name: np.asarray(size) for name, size in sizes.items()}, "digest": digests_of(shard)}
    leakage, soft = _leakages(shard, config)
    table = {
        "idx": shard["ids"],
        "label": shard["labels"],
        **_sizes(unit, shard["predictions"], shard["gap"], shard["labels"], math.prod(image_shape)),
        "seconds": shard["seconds"],
        "min_sigma": theta.min(axis=axes).astype(np.float64),
        "p_lower": shard["p_lower"],
        "count": shard["counts"],
        "n": shard["n"],
        "method": np.full(count, config.method),
        "at_theta_max": np.mean(theta >= np.float32(config.theta_bound), axis=axes, dtype=np.float64),
        "leakage": leakage,
        "soft_leakage": soft,
        "draws": shard["draws"],
    }
    return table, unit


def _sizes(unit: Columns, predictions: np.ndarray, gap: np.ndarray, labels: np.ndarray, d: int) -> Columns:
    """The columns that follow from class and gap, given the sizes at gap 1."""
    with np.errstate(divide="ignore"):
        log_volume = d * np.log(gap) + unit["log_volume"]
    return {
        "predict": predictions,
        "correct": (predictions == labels).astype(np.int64),
        "gap": gap,
        "radius": unit["radius"] * gap,
        "radius_proxy": unit["radius_proxy"] * gap,
        "log_volume": log_volume,
    }


def _leakages(shard: Mapping[str, np.ndarray], config: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    """Leakage, the share of eligible probes whose majority votes for an input's class under its theta, and soft
    leakage, the share of such votes among the draws of held-out probes; NaN where they were not measured, as for one
    theta for all inputs.
    """
    count = len(shard["ids"])
    if not config.data_dependent or config.leakage is None:
        unknown = _objects([math.nan] * count)
        return unknown, unknown

    def shares(part: str, whole: str) -> np.ndarray:
        pairs = zip(shard[f"leakage_{part}"].tolist(), shard[f"leakage_{whole}"].tolist(), strict=True)
        return _objects([fractions.Fraction(a, b) if b else math.nan for a, b in pairs])

    zeros = _objects([fractions.Fraction(0)] * count)
    abstains = shard["predictions"] == ABSTAIN  # nothing can leak to an abstention
    hard, soft = shares("num_leaked", "num_eligible"), shares("votes", "draws")
    return np.where(abstains, zeros, hard), np.where(abstains, zeros, soft)


def without_leakage(columns: Columns) -> Columns:
    """The columns, with leakages that were not measured."""
    return columns | {name: _objects([math.nan] * len(columns["idx"])) for name in _LEAKAGES}


def _objects(values: list[Any]) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def digests_of(shard: Mapping[str, np.ndarray]) -> np.ndarray:
    """A hash of each certificate: of id, class, gap and theta."""
    names = ("ids", "predictions", "gap", "theta")
    rows = (b"".join(shard[name][row].tobytes() for name in names) for row in range(len(shard["ids"])))
    return _objects([hashlib.sha256(row).digest() for row in rows])


def after_memory(before: Columns, unit: Columns, answers: Columns, image_shape: tuple[int, ...]) -> Columns:
    """The columns of the classifier with memory (`MEMORY_COLUMNS`), from those of `columns_of` and the answers.

    Answers: `prediction`, `gap` and `inside` (idx of an earlier input in whose region it lies, or -1) of each input. An
    input that was given the class of an earlier one has the leakage of the theta whose class that is.
    """
    predictions, gap, inside = (answers[name] for name in ("prediction", "gap", "inside"))
    overruled = predictions != before["predict"]
    leakages = {name: before[name].copy() for name in _LEAKAGES}
    places = {int(idx): place for place, idx in enumerate(before["idx"])}
    for place in np.flatnonzero(overruled):  # in order of idx: the earlier input has its own already
        for column in leakages.values():
            column[place] = column[places[int(inside[place])]]
    return {
        **before,
        **_sizes(unit, predictions, gap, before["label"], math.prod(image_shape)),
        **leakages,
        "changed": (overruled | (gap != before["gap"])).astype(np.int64),
        "answered_by": inside,
    }


def write_table(columns: Columns) -> str:
    """The text of a table of exact columns: sizes and bounds rounded down, leakage up."""
    header = MEMORY_COLUMNS if "changed" in columns else COLUMNS

    def text(name: str) -> list[str]:
        if name == "time":
            return [str(datetime.timedelta(seconds=float(seconds))) for seconds in columns["seconds"]]
        if name in _DOWN:
            return [round_down(value, _DOWN[name]) for value in columns[name]]
        if name in _UP:
            return [round_up(value, _UP[name]) for value in columns[name]]
        return [str(value) for value in columns[name].tolist()]

    lines = zip(*map(text, header), strict=True) if columns else ()
    return "".join("\t".join(line) + "\n" for line in (header, *lines))


def read_table(path: epath.PathLike) -> Columns:
    """The columns of a results file, by `parse_table`.

    Raises:
      ValueError: if the file is not such a table or is empty.
    """
    try:
        return parse_table(epath.Path(path).read_text(), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None


def parse_table(text: str, path: epath.PathLike) -> Columns:
    """The columns of a results table: ours, Cohen's, or ANCER's (at least idx, label, predict, radius, correct).

    Where there is no column `radius_proxy`, the noise was isotropic and the radius stands in for it. The column `time`
    becomes `seconds`, and is left out if it cannot be read; leakages become Fractions, or NaN.

    Raises:
      ValueError: naming `path`, if the text is not such a table or is empty.
    """
    lines = text.removeprefix("\ufeff").splitlines()  # spreadsheets write a byte-order mark
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
    columns: Columns = {}
    for name, values in zip(header, zip(*rows, strict=True), strict=True):
        try:
            columns |= _parse_column(name, values)
        except ValueError as error:
            raise ValueError(f"{path}: column {name!r}: {error}") from None
    columns = {"radius_proxy": columns["radius"]} | columns
    checks = {name: (columns[name] >= 0) & np.isfinite(columns[name]) for name in ("radius", "radius_proxy")}
    checks["correct"] = columns["correct"] == (columns["predict"] == columns["label"])
    checks["idx"] = np.isin(np.arange(len(rows)), np.unique(columns["idx"], return_index=True)[1])
    for name, valid in checks.items():
        if not valid.all():
            row = valid.argmin()
            raise ValueError(f"{path}: line {row + 2}: {name} cannot be {columns[name][row]:g}")
    return columns


def _parse_column(name: str, values: tuple[str, ...]) -> Columns:
    if name == "time":
        try:
            return {"seconds": np.array([_parse_time(text) for text in values])}
        except ValueError:
            return {}
    if name == "method":
        return {name: np.array(values)}
    numbers = np.array(values, np.float64)
    if name in _LEAKAGES:  # the decimals are exact; as binary numbers some would be rounded up once more
        return {name: _objects([math.nan if math.isnan(x) else fractions.Fraction(str(x)) for x in numbers.tolist()])}
    return {name: numbers}


def _parse_time(text: str) -> float:
    """Seconds in Cohen's time column, `H:MM:SS[.ffffff]`."""
    hours, minutes, seconds = text.split(":")
    return datetime.timedelta(hours=int(hours), minutes=int(minutes), seconds=float(seconds)).total_seconds()
