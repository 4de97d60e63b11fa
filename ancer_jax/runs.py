"""A run on disk: settings, one immutable shard per finished batch, resume, export.

    config.json               settings that change results, and their hash
    shards/<first id>.npz     one finished batch, and what made it; written to a temporary name and renamed
    results.tsv               a line for each input, of one classifier: Cohen's columns first. Where theta depends on
                              the input, it is the classifier with memory
    results_before_memory.tsv the same columns of the per-input classifiers, before memory
    memory.npz                the memory after all inputs, in order of ids

A process that is killed at any moment leaves finished shards only; the next one continues after them.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from ancer_jax import memory
from ancer_jax.certificates import noise_law
from ancer_jax.certification import ABSTAIN, Evidence
from ancer_jax.leakage import Leaked
from ancer_jax.memory import Memory
from ancer_jax.regions import Region
from ancer_jax.results import Answer, leakage_of, write_table
from ancer_jax.storage import (
    as_os_error,
    in_bucket,
    list_folder,
    locked,
    locked_share,
    read_arrays,
    read_text,
    remove,
    rename,
    write_file,
)

RESULTS = "results.tsv"
BEFORE_MEMORY = "results_before_memory.tsv"
MEMORY = "memory.npz"
# Of what the same settings mean: to be raised whenever they give other draws, bounds, regions or counts than before.
RESULTS_VERSION = 2
_ARRAYS = (
    *("ids", "labels", "pixels", "predictions", "counts", "n", "draws", "p_lower", "gap", "theta"),
    *(f"bound_{name}" for name in Evidence._fields),
    *(f"leaked_{name}" for name in Leaked._fields),
    "seconds",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """An open run directory; made by `open_run`.

    Attributes:
      path: the directory.
      settings: nested mapping of everything that changes results.
      key: hash of the settings; every shard carries it.
      made_with: versions, device and the like of this process; stored with every shard that it writes.
      process: which of several processes writes; names its temporary files.
      still_held: raises ValueError if another process has taken the run over.
    """

    path: epath.Path
    settings: Mapping[str, Any]
    key: str
    made_with: Mapping[str, str] = dataclasses.field(default_factory=dict)
    process: int = 0
    still_held: Callable[[], None] = lambda: None

    def files(self) -> list[epath.Path]:
        """The shards that are there, in order of their first id.

        Raises:
          ValueError: if there is a file that is none.
        """
        files = [file for file in list_folder(self.path / "shards") if file.suffix == ".npz"]
        for file in files:
            if not file.stem.isdecimal():
                raise ValueError(f"{file}: not a shard of this run; move it away")
        return sorted(files, key=lambda file: int(file.stem))

    def shards(
        self, names: Sequence[str] = _ARRAYS, files: Sequence[epath.Path] | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """The finished batches, in order of their first id: `ids` and the arrays `names`, of `files` (default: all).

        Gaps are checked: they must follow from the counts that are stored beside them.

        Raises:
          ValueError: if a shard is truncated, renamed, doubled, changed, or belongs to another run.
        """
        checked = ("gap", "p_lower", "predictions", "counts", "n", *(f"bound_{name}" for name in Evidence._fields))
        names = tuple(dict.fromkeys(("ids", *names)))
        seen, read = set(), tuple(dict.fromkeys((*names, *(checked if "gap" in names else ()))))
        for file in self.files() if files is None else files:
            try:
                shard = read_arrays(file, (*read, "key"))
            except ValueError as error:
                raise ValueError(f"{file}: truncated or not a shard ({error}); delete it to compute it again") from None
            if str(shard.pop("key")) != self.key:
                raise ValueError(f"{file}: this shard belongs to a run with other settings")
            ids = [int(i) for i in shard["ids"]]
            if ids[0] != int(file.stem) or seen & {*ids} or any(len(shard[name]) != len(ids) for name in read):
                raise ValueError(f"{file}: renamed, copied or damaged; move it away")
            if "gap" in names and not _follows_from_counts(shard, self.settings):
                raise ValueError(f"{file}: its gaps do not follow from its counts; delete it to compute it again")
            seen |= {*ids}
            yield {name: shard[name] for name in names}

    def done(self) -> set[int]:
        """Ids of the inputs that are finished."""
        return {int(i) for shard in self.shards(["ids"]) for i in shard["ids"]}

    def write_shard(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Store one finished batch; after this returns it survives the process.

        Raises:
          OSError: naming the file, if it cannot be written (a full disk).
          ValueError: if another process has taken the run over.
        """
        self.still_held()
        buffer = io.BytesIO()
        named: dict[str, Any] = {name: arrays[name] for name in _ARRAYS}
        np.savez(buffer, key=np.array(self.key), made_with=np.array(json.dumps(dict(self.made_with))), **named)
        write_file(self.path / "shards" / f"{int(arrays['ids'][0])}.npz", buffer.getvalue(), self.process)

    def made(self) -> dict[str, str]:
        """Versions, device and the like that shards were made with; where they differ, all of them."""
        found: dict[str, dict[str, None]] = {}
        for file in self.files():
            for name, value in json.loads(str(read_arrays(file, ["made_with"])["made_with"])).items():
                found.setdefault(name, {})[value] = None
        return {name: ", ".join(values) for name, values in found.items()}

    @property
    def data_dependent(self) -> bool:
        """Whether every input has a theta of its own."""
        return self.settings["method"] in ("isotropic", "ancer")

    def table(self, files: Sequence[epath.Path] | None = None) -> str:
        """The table of certificates, before memory: a line per finished input, in order of ids, numbers rounded
        towards zero.
        """
        return write_table(self.shards(files=files), self.settings)

    def memory_table(self, files: Sequence[epath.Path] | None = None) -> str | None:
        """The table of the classifier with memory; None if the finished inputs have not been reconciled."""
        files = self.files() if files is None else files  # once: another process may be adding to them
        answers = self._answers(files)
        return None if answers is None else write_table(self.shards(files=files), self.settings, answers)

    def columns(self, *names: str, files: Sequence[epath.Path] | None = None) -> dict[str, np.ndarray]:
        """Arrays of all finished inputs (or those in the shards `files`), in order of ids."""
        shards = list(self.shards(names, files))
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
        """Write the tables: `results.tsv` of one classifier, and what is before memory under another name.

        Returns:
          The path of `results.tsv`, or, where no memory made one classifier of them, of the table before memory.
        """
        self.still_held()
        files, path = self.files(), self.path / RESULTS
        before = self.table(files)
        if not self.data_dependent:
            write_file(path, before.encode(), self.process)
            return path
        after = self.memory_table(files)
        remove(path)  # first: the two tables are never of different inputs
        write_file(self.path / BEFORE_MEMORY, before.encode(), self.process)
        if after is None:
            return self.path / BEFORE_MEMORY
        write_file(path, after.encode(), self.process)
        return path

    def write_memory(self, memory: Memory, ids: np.ndarray, inside: np.ndarray) -> None:
        """Store the memory after the inputs `ids`, and for each the id of an input whose region it lies in, or -1."""
        self.still_held()
        made_from = np.array(self._made_from(self.files(), len(ids)))
        save_memory(memory, self.path / MEMORY, ids=ids, inside=inside, made_from=made_from)

    def read_memory(self) -> tuple[Memory, np.ndarray, np.ndarray] | None:
        """What `write_memory` stored; None if it was not made from the first finished inputs, in order of ids, as they
        are now, or cannot be read.
        """
        stored = self._stored(self.files(), "ids", "inside")
        try:
            return None if stored is None else (_memory(self.path / MEMORY), stored["ids"], stored["inside"])
        except (ValueError, TypeError):
            return None

    def _stored(self, files, *names: str) -> dict[str, np.ndarray] | None:
        """Arrays of the memory, if it was made from the first inputs in the shards `files`, as they are."""
        try:
            arrays = read_arrays(self.path / MEMORY, (*names, "ids", "made_from"))
        except (FileNotFoundError, ValueError):
            return None
        return arrays if str(arrays["made_from"]) == self._made_from(files, len(arrays["ids"])) else None

    def _made_from(self, files, count: int) -> str:
        """Hash of this run's settings and of the certificates of its first `count` inputs."""
        certificates: dict[int, bytes] = {}  # hashed one by one: the thetas of all inputs may not fit into memory
        for shard in self.shards(["predictions", "gap", "theta"], files):
            for row, id_ in enumerate(shard["ids"]):
                numbers = b"".join(shard[name][row].tobytes() for name in ("ids", "predictions", "gap", "theta"))
                certificates[int(id_)] = hashlib.sha256(numbers).digest()
        digest = hashlib.sha256(f"memory 2 {self.key}".encode())
        for id_ in sorted(certificates)[:count]:
            digest.update(certificates[id_])
        return digest.hexdigest()

    def set_memory_aside(self) -> tuple[epath.Path, epath.Path] | None:
        """Rename a memory that is not, or no longer, this run's; its name and the new one, or None if there is none."""
        file, there = self.path / MEMORY, {path.name for path in list_folder(self.path)}
        if MEMORY not in there:
            return None
        names = (f"memory_replaced_{i}.npz" for i in itertools.count(1))
        aside = self.path / next(name for name in names if name not in there)
        rename(file, aside)
        return file, aside

    def _answers(self, files) -> dict[int, Answer] | None:
        after = self._stored(files, "inside", "gap", "prediction")
        if after is None:
            return None
        leaked = [f"leaked_{name}" for name in Leaked._fields]
        before = self.columns("predictions", "gap", *leaked, files=files)
        if len(after["ids"]) != len(before["ids"]):
            return None
        sound = (after["gap"] >= 0) & (after["gap"] <= before["gap"]) & (after["inside"] < before["ids"])
        sound &= (after["prediction"] == before["predictions"]) | np.isin(after["inside"], before["ids"])
        if not (sound & ((after["prediction"] != ABSTAIN) | (after["gap"] == 0))).all():
            raise ValueError(f"{self.path / MEMORY}: no memory of this run's certificates; delete it to make it again")
        answers: dict[int, Answer] = {}
        for row, id_ in enumerate(before["ids"]):
            was, prediction, inside = before["predictions"][row], after["prediction"][row], int(after["inside"][row])
            changed = prediction != was or after["gap"][row] != before["gap"][row]
            leakage = leakage_of(self.settings, Leaked(*(before[name][row] for name in leaked)), int(was))
            if prediction != was:
                leakage = answers[inside].leakage
            answers[int(id_)] = Answer(prediction, after["gap"][row], bool(changed), inside, leakage)
        return answers


@contextlib.contextmanager
def open_run(
    path: epath.PathLike,
    settings: Mapping[str, Any],
    made_with: Mapping[str, str],
    *,
    process: int = 0,
    processes: int = 1,
) -> Iterator[Run]:
    """Open a new or unfinished run for writing; only one process of each number may.

    Args:
      path: the run directory, made if it does not exist.
      settings: nested mapping of everything that changes results; JSON values.
      made_with: versions, device and the like of this process: stored with its shards, not compared.
      process, processes: number of this process among those that share the run, and how many they are.

    Raises:
      ValueError: if the directory is something else, the run there has other settings (named), or another process
        of this number, or of a group of another size, is writing to it.
      OSError: if it cannot be written.
    """
    path = epath.Path(path)
    try:
        names = [file.name for file in list_folder(path)]
    except NotADirectoryError:
        raise ValueError(f"{path} is a file, not a run directory") from None
    foreign = [n for n in names if n != "shards" and not n.startswith(("lock", "config.json"))]
    if foreign and "config.json" not in names:
        raise ValueError(f"{path} is not a run directory: it holds {min(foreign)} and no config.json")
    (path / "shards").mkdir(parents=True, exist_ok=True)
    with locked_share(path, process, processes) as still_held:
        plain = json.dumps(settings, default=lambda number: number.item())  # numbers of numpy
        settings = {"results_version": RESULTS_VERSION, **json.loads(plain)}
        run = _run(path, settings, made_with=made_with, process=process, still_held=still_held)
        config = path / "config.json"
        if config not in list_folder(path):
            document = {"hash": run.key, "settings": settings}
            write_file(config, (json.dumps(document, indent=2) + "\n").encode(), process)
        refuse_other_settings(path, read_settings(path), settings)
        for file in list_folder(path / "shards"):
            if file.name.endswith(f".{process}.tmp"):
                remove(file)
        yield run


def read_settings(path: epath.PathLike) -> dict[str, Any]:
    """The settings of the run in the directory `path`.

    Raises:
      ValueError: if there is no `config.json`, or it is another file.
      OSError: if it cannot be read.
    """
    return _read_document(path)["settings"]


def _read_document(path: epath.PathLike) -> dict[str, Any]:
    config = epath.Path(path) / "config.json"
    try:
        if (text := read_text(config)) is None:
            raise FileNotFoundError
        document = json.loads(text)
        if not isinstance(document["settings"], dict):
            raise TypeError(f"settings are {document['settings']!r}")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} is not a run directory: there is no config.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config}: not the settings of a run ({error!r})") from None
    return document


def save_memory(memory: Memory, path: epath.PathLike, **more: np.ndarray) -> None:
    """Write a memory, with its inputs, to an npz file.

    Raises:
      OSError: if it cannot be written, or is a folder.
    """
    regions = memory.regions
    arrays = {"center": regions.center, "theta": regions.theta, "gap": regions.gap, "prediction": memory.predictions}
    path = epath.Path(path)
    if not in_bucket(path) and path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name the file that the memory goes to")
    named: dict[str, Any] = arrays | more
    write_file(path, lambda file: np.savez(file, norm=np.array(memory.norm), **named))


@as_os_error
def load_memory(path: epath.PathLike) -> Memory:
    """The memory of a run directory, or of a file that `save_memory` wrote: to serve from, or to insert into.

    What the file says is not compared with itself again: load only what you trust.

    Raises:
      ValueError: if there is none, or it is damaged.
    """
    path = epath.Path(path)
    file = path / MEMORY if path.is_dir() else path
    try:
        return _memory(file)
    except FileNotFoundError:
        raise ValueError(f"{file}: there is no memory; runs with fixed noise, or unfinished, have none") from None
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file}: no memory that can be read ({error})") from None


def _memory(file: epath.Path) -> Memory:
    arrays = read_arrays(file, ("norm", "center", "theta", "gap", "prediction"))
    return memory.restore(
        Region(arrays["center"], arrays["theta"], arrays["gap"], int(arrays["norm"])), arrays["prediction"]
    )


def read_run(path: epath.PathLike) -> Run:
    """A finished or unfinished run, for reading.

    Raises:
      ValueError: if there is none, or its results mean something else than those of this version.
    """
    settings = read_settings(path)
    if settings.get("results_version") != RESULTS_VERSION:
        raise ValueError(
            f"{path} was made by another version of ancer_jax, whose results mean something else (results_version "
            f"{settings.get('results_version')}, not {RESULTS_VERSION}): certify again, or report its tables (*.tsv)"
        )
    return _run(epath.Path(path), settings)


def _run(path, settings, **options) -> Run:
    return Run(path, settings, hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(), **options)


def _follows_from_counts(shard: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> bool:
    """Whether `p_lower`, gap and abstentions of a shard are those of the votes stored in it, up to rounding."""
    law = noise_law(settings["norm"], settings.get("noise"), exact=bool(settings.get("exact")))
    evidence, config = Evidence(*(shard[f"bound_{name}"] for name in Evidence._fields)), settings["certify"]
    if settings.get("sampling"):
        sound = (evidence.n <= config["n"]) & (shard["n"] <= config["n"]) & (evidence.alpha <= config["alpha"])
    else:
        sound = (evidence.votes == shard["counts"]) & (evidence.n == shard["n"])
        exact = bool(settings.get("exact"))
        sound &= (evidence.alpha == 0) if exact else (evidence.n == config["n"]) & (evidence.alpha == config["alpha"])
    if not sound.all():
        return False
    try:
        p_lower, gap = evidence.bound_and_gap(law)
    except ValueError:
        return False
    same = np.isclose(gap, shard["gap"], rtol=1e-8, atol=0) & np.isclose(p_lower, shard["p_lower"], rtol=1e-8, atol=0)
    return bool((same & ((shard["predictions"] == ABSTAIN) == (gap == 0))).all())


def refuse_other_settings(path: epath.PathLike, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse to go on in the directory `path`, made with the settings `there`, if these are not those `asked` for.

    Raises:
      ValueError: naming the settings that differ, and both values.
    """
    flat = [dict(flatten(settings)) for settings in (there, asked)]
    differ = [name for name in sorted({*flat[0], *flat[1]}) if flat[0].get(name) != flat[1].get(name)]
    if differ:
        text = "; ".join(
            f"{name} is {_short(flat[0].get(name))} there, {_short(flat[1].get(name))} here" for name in differ
        )
        raise ValueError(f"{path} was made with other settings ({text}); a new run needs a new directory")


def _short(value) -> str:
    return text if len(text := str(value)) < 40 else f"{text[:12]}..."


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings under dotted names."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
