"""A run on disk: settings, one immutable shard per finished batch, resume, export.

    config.json          settings that change results, their hash, and what the run was made with
    shards/<first id>.npz   one finished batch; written to a temporary name and renamed
    results.tsv          derived from the shards: Cohen's columns first

A process that is killed at any moment leaves finished shards only; the next one continues after them.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import filelock
import numpy as np
from etils import epath

from ancer_jax.metrics import round_down
from ancer_jax.regions import Region, log_volume, proxy_radius, radius

RESULTS = "results.tsv"
_COHEN = ("idx", "label", "predict", "radius", "correct", "time")
COLUMNS = (
    *_COHEN,
    *("radius_proxy", "min_sigma", "gap", "p_lower", "count", "n", "log_volume", "method", "at_theta_max"),
)
_ARRAYS = ("ids", "labels", "predictions", "counts", "p_lower", "gap", "theta", "seconds")


@dataclasses.dataclass(frozen=True)
class Run:
    """An open run directory; made by `open_run`.

    Attributes:
      path: the directory.
      settings: nested mapping of everything that changes results.
      key: hash of the settings; every shard carries it.
    """

    path: epath.Path
    settings: Mapping[str, Any]
    key: str

    def shards(self) -> Iterator[dict[str, np.ndarray]]:
        """The finished batches, in order of their first id.

        Raises:
          ValueError: if a shard is truncated, renamed, doubled, or belongs to another run.
        """
        files, seen = list((self.path / "shards").glob("*.npz")), set()
        for file in files:
            if not file.stem.isdecimal():
                raise ValueError(f"{file}: not a shard of this run; move it away")
        for file in sorted(files, key=lambda file: int(file.stem)):
            try:
                with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
                    shard = {name: arrays[name] for name in (*_ARRAYS, "key")}
            except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise ValueError(f"{file}: truncated or not a shard ({error}); delete it to compute it again") from None
            if str(shard.pop("key")) != self.key:
                raise ValueError(f"{file}: this shard belongs to a run with other settings")
            ids = [int(i) for i in shard["ids"]]
            if ids[0] != int(file.stem) or seen & {*ids} or any(len(shard[name]) != len(ids) for name in _ARRAYS):
                raise ValueError(f"{file}: renamed, copied or damaged; move it away")
            seen |= {*ids}
            yield shard

    def done(self) -> set[int]:
        """Ids of the inputs that are finished."""
        return {int(i) for shard in self.shards() for i in shard["ids"]}

    def write_shard(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Store one finished batch; after this returns it survives the process.

        Raises:
          OSError: naming the file, if it cannot be written (a full disk).
        """
        buffer = io.BytesIO()
        named: dict[str, Any] = {name: arrays[name] for name in _ARRAYS}
        np.savez(buffer, key=np.array(self.key), **named)
        _write(self.path / "shards" / f"{int(arrays['ids'][0])}.npz", buffer.getvalue())

    def table(self) -> str:
        """The text of `results.tsv`: a line per finished input, in order of ids, numbers rounded towards zero."""
        rows = sorted((row for shard in self.shards() for row in self._rows(shard)), key=lambda row: row[0])
        lines = ["\t".join(COLUMNS), *("\t".join(map(str, row)) for row in rows)]
        return "\n".join(lines) + "\n"

    def export(self) -> epath.Path:
        """Write `results.tsv`."""
        path = self.path / RESULTS
        _write(path, self.table().encode())
        return path

    def _rows(self, shard):
        settings = self.settings
        search = settings.get("anisotropic", settings.get("isotropic"))
        norm = {"l2": 2, "l1": 1}[settings["norm"]]
        center = np.zeros(settings["data"]["image_shape"])
        for values in zip(*(shard[name] for name in _ARRAYS), strict=True):
            id_, label, prediction, count, p_lower, gap, theta, seconds = values
            region = Region(center, theta, gap, norm)
            at_bound = np.mean(theta >= np.float32(search["theta_max"])) if search else 0.0
            yield (
                int(id_),
                int(label),
                int(prediction),
                round_down(radius(region), 6),
                int(prediction == label),
                datetime.timedelta(seconds=float(seconds)),
                round_down(proxy_radius(region), 6),
                round_down(theta.min(), 6),
                round_down(gap, 6),
                round_down(p_lower, 8),
                int(count),
                settings["certify"]["n"],
                round_down(log_volume(region), 3),
                settings["method"],
                round_down(at_bound, 4),
            )


@contextlib.contextmanager
def open_run(path: epath.PathLike, settings: Mapping[str, Any], made_with: Mapping[str, Any]) -> Iterator[Run]:
    """Open a new or unfinished run for writing; only one process may.

    Args:
      path: the run directory, made if it does not exist.
      settings: nested mapping of everything that changes results; JSON values.
      made_with: versions, device and the like: recorded, not compared.

    Raises:
      ValueError: if the directory is something else, the run there has other settings (named), or another process
        is writing to it.
      OSError: if it cannot be written.
    """
    path = epath.Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, not a run directory")
    foreign = [] if not path.exists() else [p.name for p in path.iterdir() if p.name not in ("lock", "shards")]
    if foreign and not (path / "config.json").exists() and foreign != ["config.json.tmp"]:
        raise ValueError(f"{path} is not a run directory: it holds {min(foreign)} and no config.json")
    (path / "shards").mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(str(path / "lock"), timeout=0)
    try:
        held = lock.acquire()
    except filelock.Timeout:
        raise ValueError(f"another process is writing to the run {path}") from None
    with held:
        settings = json.loads(json.dumps(settings))
        run = _run(path, settings)
        config = path / "config.json"
        if config.exists():
            _refuse_other_settings(path, read_settings(path), settings)
        else:
            document = {"hash": run.key, "settings": settings, "made_with": made_with}
            _write(config, (json.dumps(document, indent=2) + "\n").encode())
        for leftover in (path / "shards").glob("*.tmp"):
            leftover.unlink()
        yield run


def read_settings(path: epath.PathLike) -> dict[str, Any]:
    """The settings of the run in the directory `path`.

    Raises:
      ValueError: if there is no readable `config.json`.
    """
    config = epath.Path(path) / "config.json"
    try:
        settings = json.loads(config.read_text())["settings"]
        if not isinstance(settings, dict):
            raise TypeError(f"settings are {settings!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config}: not the settings of a run ({error!r})") from None
    return settings


def read_run(path: epath.PathLike) -> Run:
    """A finished or unfinished run, for reading."""
    return _run(epath.Path(path), read_settings(path))


def _run(path, settings) -> Run:
    return Run(path, settings, hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest())


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
    columns = {}
    for name, values in zip(header, zip(*rows, strict=True), strict=True):
        try:
            columns[name] = np.array(values, dtype=str if name in ("time", "method") else np.float64)
        except ValueError as error:
            raise ValueError(f"{path}: column {name!r}: {error}") from None
    return {"radius_proxy": columns["radius"]} | columns


def _refuse_other_settings(path, there, asked):
    flat = [dict(_flatten(settings)) for settings in (there, asked)]
    differ = [name for name in sorted({*flat[0], *flat[1]}) if flat[0].get(name) != flat[1].get(name)]
    if differ:
        text = "; ".join(f"{name} is {flat[0].get(name)} there and {flat[1].get(name)} here" for name in differ)
        raise ValueError(f"the run {path} was made with other settings: {text}")


def _flatten(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _write(path: epath.Path, data: bytes) -> None:
    """Write a whole file or nothing: a temporary name, then a rename."""
    temporary = path.parent / f"{path.name}.tmp"
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; what was finished before is kept") from error
