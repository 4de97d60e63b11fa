"""A run on disk: settings, one immutable shard per finished batch, resume, export.

    config.json          settings that change results, their hash, and what the run was made with
    shards/<first id>.npz   one finished batch; written to a temporary name and renamed
    results.tsv          derived from the shards: Cohen's columns first
    memory.npz           data-dependent noise: the memory after all inputs, in order of ids
    results_memory.tsv   the same columns for the classifier with memory

A process that is killed at any moment leaves finished shards only; the next one continues after them.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any

import filelock
import numpy as np
from etils import epath

from ancer_jax import memory
from ancer_jax.memory import Memory
from ancer_jax.regions import Region
from ancer_jax.results import Answer, leakage_share, write_table

RESULTS = "results.tsv"
RESULTS_MEMORY = "results_memory.tsv"
MEMORY = "memory.npz"
_ARRAYS = (
    *("ids", "labels", "pixels", "predictions", "counts", "p_lower", "gap", "theta", "leaked", "references"),
    "seconds",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """An open run directory; made by `open_run`.

    Attributes:
      path: the directory.
      settings: nested mapping of everything that changes results.
      key: hash of the settings; every shard carries it.
      process: which of several processes writes; names its temporary files.
    """

    path: epath.Path
    settings: Mapping[str, Any]
    key: str
    process: int = 0

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
                shard = _read_arrays(file, (*_ARRAYS, "key"))
            except ValueError as error:
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
        write_file(self.path / "shards" / f"{int(arrays['ids'][0])}.npz", buffer.getvalue(), self.process)

    def table(self) -> str:
        """The text of `results.tsv`: a line per finished input, in order of ids, numbers rounded towards zero."""
        return write_table(self.shards(), self.settings)

    def memory_table(self) -> str | None:
        """The text of `results_memory.tsv`; None if the finished inputs have not been reconciled."""
        shards = list(self.shards())  # once: another process may be adding to them
        answers = self._answers(shards)
        return None if answers is None else write_table(shards, self.settings, answers)

    def columns(self, *names: str, of: Iterable[Mapping[str, np.ndarray]] | None = None) -> dict[str, np.ndarray]:
        """Arrays of all finished inputs (or those in the shards `of`), in order of ids."""
        shards = [{name: shard[name] for name in ("ids", *names)} for shard in (self.shards() if of is None else of)]
        columns = {name: np.concatenate([shard[name] for shard in shards]) for name in ("ids", *names)}
        order = np.argsort(columns["ids"])
        return {name: column[order] for name, column in columns.items()}

    @contextlib.contextmanager
    def exporting(self) -> Iterator[bool]:
        """Hold the right to write what is derived from all shards; False if another process has it."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self.path, "lock-export"))
            except ValueError:
                yield False
            else:
                yield True

    def export(self) -> epath.Path:
        """Write `results.tsv`, and `results_memory.tsv` if the finished inputs have been reconciled."""
        text, path = self.memory_table(), self.path / RESULTS_MEMORY
        path.unlink(missing_ok=True)  # first: the two tables are never of different inputs
        write_file(self.path / RESULTS, self.table().encode())
        if text is not None:
            write_file(path, text.encode())
        return self.path / RESULTS

    def write_memory(self, memory: Memory, ids: np.ndarray, inside: np.ndarray) -> None:
        """Store the memory after the inputs `ids`, and for each the id of an input whose region it lies in, or -1."""
        made_from = np.array(self._made_from(self.shards(), len(ids)))
        save_memory(memory, self.path / MEMORY, ids=ids, inside=inside, made_from=made_from)

    def read_memory(self) -> tuple[Memory, np.ndarray, np.ndarray] | None:
        """What `write_memory` stored; None if it was not made from the first finished inputs, in order of ids, as they
        are now, or cannot be read.
        """
        stored = self._stored(self.shards(), "ids", "inside")
        try:
            return None if stored is None else (load_memory(self.path), stored["ids"], stored["inside"])
        except ValueError:
            return None

    def _stored(self, shards, *names: str) -> dict[str, np.ndarray] | None:
        """Arrays of the memory, if it was made from the first inputs in the shards, as they are."""
        try:
            arrays = _read_arrays(self.path / MEMORY, (*names, "ids", "made_from"))
        except (OSError, ValueError):
            return None
        return arrays if str(arrays["made_from"]) == self._made_from(shards, len(arrays["ids"])) else None

    def _made_from(self, shards, count: int) -> str:
        """Hash of this run's settings and of the certificates of its first `count` inputs."""
        digest = hashlib.sha256(f"memory 1 {self.key}".encode())
        for column in self.columns("predictions", "gap", "theta", of=shards).values():
            digest.update(np.ascontiguousarray(column[:count]).tobytes())
        return digest.hexdigest()

    def set_memory_aside(self) -> tuple[epath.Path, epath.Path] | None:
        """Rename a memory that is not, or no longer, this run's; its name and the new one, or None if there is none."""
        file = self.path / MEMORY
        if not file.exists():
            return None
        names = (self.path / f"memory_replaced_{i}.npz" for i in itertools.count(1))
        aside = next(name for name in names if not name.exists())
        file.replace(aside)
        return file, aside

    def _answers(self, shards) -> dict[int, Answer] | None:
        after = self._stored(shards, "inside", "gap", "prediction")
        if after is None or len(after["ids"]) != sum(len(shard["ids"]) for shard in shards):
            return None
        before = self.columns("predictions", "gap", "leaked", "references", of=shards)
        answers: dict[int, Answer] = {}
        for row, id_ in enumerate(before["ids"]):
            was, prediction, inside = before["predictions"][row], after["prediction"][row], int(after["inside"][row])
            changed = prediction != was or after["gap"][row] != before["gap"][row]
            leakage = leakage_share(self.settings, before["leaked"][row], before["references"][row], was)
            if prediction != was:
                leakage = answers[inside].leakage
            answers[int(id_)] = Answer(prediction, after["gap"][row], bool(changed), inside, leakage)
        return answers


@contextlib.contextmanager
def open_run(
    path: epath.PathLike, settings: Mapping[str, Any], made_with: Mapping[str, Any], *, process: int = 0
) -> Iterator[Run]:
    """Open a new or unfinished run for writing; only one process of each number may.

    Args:
      path: the run directory, made if it does not exist.
      settings: nested mapping of everything that changes results; JSON values.
      made_with: versions, device and the like: recorded, not compared.
      process: number of this process among those that share the run.

    Raises:
      ValueError: if the directory is something else, the run there has other settings (named), or another process
        is writing to it.
      OSError: if it cannot be written.
    """
    path = epath.Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, not a run directory")
    names = [] if not path.exists() else [p.name for p in path.iterdir()]
    foreign = [n for n in names if n != "shards" and not n.startswith(("lock", "config.json"))]
    if foreign and not (path / "config.json").exists():
        raise ValueError(f"{path} is not a run directory: it holds {min(foreign)} and no config.json")
    (path / "shards").mkdir(parents=True, exist_ok=True)
    with locked(path, f"lock-{process}"):
        settings = json.loads(json.dumps(settings))
        run = dataclasses.replace(_run(path, settings), process=process)
        config = path / "config.json"
        if config.exists():
            refuse_other_settings(path, read_settings(path), settings)
        else:
            document = {"hash": run.key, "settings": settings, "made_with": made_with}
            write_file(config, (json.dumps(document, indent=2) + "\n").encode(), process)
        for leftover in (path / "shards").glob(f"*.{process}.tmp"):
            leftover.unlink()
        yield run


@contextlib.contextmanager
def locked(path: epath.Path, name: str = "lock") -> Iterator[None]:
    """Hold the lock of that name in the folder `path`; it ends with the process.

    Raises:
      ValueError: if another process holds it.
    """
    lock = filelock.FileLock(str(path / name), timeout=0)
    try:
        held = lock.acquire()
    except filelock.Timeout:
        raise ValueError(f"another process is writing to {path}") from None
    with held:
        yield


def read_settings(path: epath.PathLike) -> dict[str, Any]:
    """The settings of the run in the directory `path`.

    Raises:
      ValueError: if there is no readable `config.json`.
    """
    config = epath.Path(path) / "config.json"
    if not config.exists():
        raise ValueError(f"{path} is not a run directory: there is no config.json")
    try:
        settings = json.loads(config.read_text())["settings"]
        if not isinstance(settings, dict):
            raise TypeError(f"settings are {settings!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config}: not the settings of a run ({error!r})") from None
    return settings


def save_memory(memory: Memory, path: epath.PathLike, **more: np.ndarray) -> None:
    """Write a memory, with its inputs, to an npz file.

    Raises:
      OSError: if it cannot be written, or is a folder.
    """
    regions = memory.regions
    arrays = {"center": regions.center, "theta": regions.theta, "gap": regions.gap, "prediction": memory.predictions}
    path = epath.Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name the file that the memory goes to")
    named: dict[str, Any] = arrays | more
    write_file(path, lambda file: np.savez(file, norm=np.array(memory.norm), **named))


def load_memory(path: epath.PathLike) -> Memory:
    """The memory of a run directory, or of a file that `save_memory` wrote: to serve from, or to insert into.

    What the file says is not compared with itself again: load only what you trust.

    Raises:
      ValueError: if there is none, or it is damaged.
    """
    path = epath.Path(path)
    file = path / MEMORY if path.is_dir() else path
    try:
        arrays = _read_arrays(file, ("norm", "center", "theta", "gap", "prediction"))
        regions = Region(arrays["center"], arrays["theta"], arrays["gap"], int(arrays["norm"]))
        return memory.restore(regions, arrays["prediction"])
    except FileNotFoundError:
        raise ValueError(f"{file}: there is no memory; runs with fixed noise, or unfinished, have none") from None
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file}: no memory that can be read ({error})") from None


def _read_arrays(file: epath.Path, names) -> dict[str, np.ndarray]:
    try:
        with file.open("rb") as opened:
            if not zipfile.is_zipfile(opened):
                raise ValueError("truncated, or not an npz file")
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in names}
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(error) from None


def read_run(path: epath.PathLike) -> Run:
    """A finished or unfinished run, for reading."""
    return _run(epath.Path(path), read_settings(path))


def _run(path, settings) -> Run:
    return Run(path, settings, hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest())


def refuse_other_settings(path: epath.PathLike, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse to go on in the directory `path`, made with the settings `there`, if these are not those `asked` for.

    Raises:
      ValueError: naming the settings that differ, and both values.
    """
    flat = [dict(_flatten(settings)) for settings in (there, asked)]
    differ = [name for name in sorted({*flat[0], *flat[1]}) if flat[0].get(name) != flat[1].get(name)]
    if differ:
        text = "; ".join(
            f"{name} is {_short(flat[0].get(name))} there, {_short(flat[1].get(name))} here" for name in differ
        )
        raise ValueError(f"{path} was made with other settings ({text}); a new run needs a new directory")


def _short(value) -> str:
    return text if len(text := str(value)) < 40 else f"{text[:12]}..."


def _flatten(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def write_file(path: epath.Path, content: bytes | Callable[[IO[bytes]], object], process: int = 0) -> None:
    """Write a whole file or nothing: a temporary name, of this process alone, then a rename."""
    temporary = path.parent / f"{path.name}.{process}.tmp"
    try:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            with temporary.open("wb") as file:
                content(file)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror or error}; what was finished before is kept") from error
