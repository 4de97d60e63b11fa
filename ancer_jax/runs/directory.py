"""A run on disk: settings, one immutable shard per finished batch, resume, export.

    config.json               settings that change results
    shards/<first id>.npz     one finished batch, and what made it; written to a temporary name and renamed
    results.tsv               a line for each input, of one classifier: Cohen's columns first. Where theta depends on
                              the input, it is the classifier with memory
    results_before_memory.tsv the same columns of the per-input classifiers, before memory
    memory.npz                the memory after the first inputs in order of ids; in a finished run, after all

A process that is killed at any moment leaves finished shards only; the next one continues after them.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from ancer_jax.data import Dataset
from ancer_jax.memory import Memory
from ancer_jax.runs.config import RunConfig
from ancer_jax.runs.memory_file import MEMORY, read_memory_file, save_memory
from ancer_jax.runs.settings import DataInfo, plain, read_settings, refuse_other_settings, refuse_other_version
from ancer_jax.runs.table import Columns, after_memory, columns_of, digests_of, without_leakage, write_table
from ancer_jax.search.leakage import LeakageCounts
from ancer_jax.smoothing.carry import CarryConfig, carried_bound_and_gap
from ancer_jax.smoothing.certificate import ABSTAIN, Evidence
from ancer_jax.storage import list_folder, locked, locked_shard, read_arrays, remove, rename, write_file

RESULTS = "results.tsv"
BEFORE_MEMORY = "results_before_memory.tsv"
_EVIDENCE = tuple(f"bound_{name}" for name in Evidence._fields)
_LEAKAGE = tuple(f"leakage_{name}" for name in LeakageCounts._fields)
_ARRAYS = (
    *("ids", "labels", "pixels", "predictions", "counts", "n", "draws", "p_lower", "gap", "theta"),
    *(*_EVIDENCE, *_LEAKAGE, "seconds"),
)
# Further arrays of a carried run: lost votes among so many common draws, which are none for an abstention.
_CARRIED = ("lost_votes", "lost_draws")


@dataclasses.dataclass(frozen=True)
class Run:
    """An open run directory; made by `open_run` and `read_run`.

    Attributes:
      path: the directory.
      settings: nested mapping of everything that changes results.
      made_with: versions, device and the like of this process; stored with every shard that it writes.
      process: which of several processes writes; names its temporary files.
      still_held: raises ValueError if another process has taken the run over.
    """

    path: epath.Path
    settings: Mapping[str, Any]
    made_with: Mapping[str, str] = dataclasses.field(default_factory=dict)
    process: int = 0
    still_held: Callable[[], None] = lambda: None

    @functools.cached_property
    def settings_hash(self) -> str:
        """Hash of the settings; every shard carries it."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def config(self) -> RunConfig:
        """The settings as a config."""
        return RunConfig.from_settings(self.settings)

    @functools.cached_property
    def data(self) -> DataInfo:
        """The data set that the run certifies."""
        try:
            data = self.settings["data"]
            return DataInfo(**{**data, "image_shape": tuple(data["image_shape"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path / 'config.json'}: not the settings of a run ({error!r})") from None

    @functools.cached_property
    def carried(self) -> CarryConfig | None:
        """How its certificates were carried from another network (`carry_run`); None if they were not."""
        how = self.settings.get("carried")
        return None if how is None else CarryConfig(how["n"], how["alpha"])

    @property
    def precision(self) -> str:
        """Precision of its classifier's matrix products, as JAX was set."""
        return self.settings["precision"]

    @property
    def calls_the_host(self) -> bool:
        """Whether its classifier calls code that is not in its hash (`classifier.calls_the_host`)."""
        return self.settings["calls_the_host"]

    def matches(self, dataset: Dataset) -> bool:
        """Whether the run is of (a part of) this data set."""
        return self.data.fingerprint == dataset.fingerprint

    def files(self) -> list[epath.Path]:
        """The shards that are there, in order of their first id.

        Raises:
          ValueError: if there is a file that is not a shard.
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
        names = tuple(dict.fromkeys(("ids", *names)))
        checked = ("gap", "p_lower", "predictions", "counts", "n", *self._evidence_names()) if "gap" in names else ()
        seen, read = set(), tuple(dict.fromkeys((*names, *checked)))
        for file in self.files() if files is None else files:
            try:
                shard = read_arrays(file, (*read, "key"))
            except ValueError as error:
                raise ValueError(f"{file}: truncated or not a shard ({error}); delete it to compute it again") from None
            if str(shard.pop("key")) != self.settings_hash:
                raise ValueError(f"{file}: this shard belongs to a run with other settings")
            ids = [int(i) for i in shard["ids"]]
            if ids[0] != int(file.stem) or seen & {*ids} or any(len(shard[name]) != len(ids) for name in read):
                raise ValueError(f"{file}: renamed, copied or damaged; move it away")
            if checked and not _follows_from_counts(shard, self.config, self.carried):
                raise ValueError(f"{file}: its gaps do not follow from its counts; delete it to compute it again")
            seen |= {*ids}
            yield {name: shard[name] for name in names}

    def _evidence_names(self) -> tuple[str, ...]:
        """Names of the arrays from which `p_lower` and gap follow (`bound_and_gap`)."""
        return _EVIDENCE if self.carried is None else (*_EVIDENCE, *_CARRIED)

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
        names = dict.fromkeys((*_ARRAYS, *self._evidence_names(), "passes"))
        named: dict[str, Any] = {name: arrays[name] for name in names}
        named |= {"key": np.array(self.settings_hash), "made_with": np.array(json.dumps(dict(self.made_with)))}
        np.savez(buffer, **named)
        write_file(self.path / "shards" / f"{int(arrays['ids'][0])}.npz", buffer.getvalue(), self.process)

    def made_with_all(self) -> dict[str, str]:
        """Versions, device and the like that the shards were made with; where they differ, all of them."""
        found: dict[str, dict[str, None]] = {}
        for file in self.files():
            for name, value in json.loads(str(read_arrays(file, ["made_with"])["made_with"])).items():
                found.setdefault(name, {})[value] = None
        return {name: ", ".join(values) for name, values in found.items()}

    def passes(self) -> int:
        """Noisy copies that the network classified to certify the finished inputs, also those that nobody counted."""
        return sum(int(read_arrays(file, ["passes"])["passes"]) for file in self.files())

    def columns(self, *names: str) -> dict[str, np.ndarray]:
        """Arrays of all finished inputs, in order of ids. (`report.load_results` has sizes, too.)

        Args:
          *names: of "labels", "predictions", "counts", "n", "p_lower", "gap", "theta" and the other arrays of a run.

        Raises:
          ValueError: if a run has no such array, or no input is finished; as in `shards`.
        """
        known = dict.fromkeys((*_ARRAYS, *self._evidence_names()))
        if unknown := [name for name in names if name not in known]:
            sizes = "sizes are in report.load_results"
            raise ValueError(f"a run has no array {unknown[0]!r}, only {', '.join(known)}; {sizes}")
        if not (shards := list(self.shards(names))):
            raise ValueError(f"{self.path}: there are no results yet")
        columns = {name: np.concatenate([shard[name] for shard in shards]) for name in ("ids", *names)}
        order = np.argsort(columns["ids"])
        return {name: column[order] for name, column in columns.items()}

    def results(self) -> tuple[Columns, Columns | None]:
        """The exact columns of the tables, before and after memory; each shard is read once.

        Returns:
          Before memory, and of the classifier with memory: None if the finished inputs have not gone through one. Both
          are empty if nothing is finished.
        """
        files = self.files()  # once: another process may be adding to them
        before, unit = columns_of(self.shards(files=files), self.config, self.data.image_shape)
        if before and self.carried is not None:
            before = without_leakage(before)  # it is that of another network
        answers = self._answers(before, unit) if before else None
        return before, None if answers is None else after_memory(before, unit, answers, self.data.image_shape)

    def _answers(self, before: Columns, unit: Columns) -> Columns | None:
        """What the stored memory answers to all finished inputs; None if it is not of exactly these certificates."""
        stored = self._stored(unit["digest"].tolist(), "inside", "gap", "prediction")
        if stored is None or len(stored["ids"]) != len(before["idx"]):
            return None
        sound = (stored["gap"] >= 0) & (stored["gap"] <= before["gap"]) & (stored["inside"] < before["idx"])
        sound &= (stored["prediction"] == before["predict"]) | np.isin(stored["inside"], before["idx"])
        if not (sound & ((stored["prediction"] != ABSTAIN) | (stored["gap"] == 0))).all():
            raise ValueError(f"{self.path / MEMORY}: not a memory of this run's certificates; delete it to remake it")
        return stored

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
        before, after = self.results()
        tables = {RESULTS: before}
        if self.config.data_dependent:
            remove(self.path / RESULTS)  # first: the two tables are never of different inputs
            tables = {BEFORE_MEMORY: before} | ({} if after is None else {RESULTS: after})
        for name, columns in tables.items():
            write_file(self.path / name, write_table(columns).encode(), self.process)
        return self.path / (RESULTS if RESULTS in tables else BEFORE_MEMORY)

    def write_memory(self, memory: Memory, ids: np.ndarray, inside: np.ndarray, digests: Sequence[bytes]) -> None:
        """Store the memory after the inputs `ids`, whose certificates have these digests (`digests_of`), and for each
        input the id of one whose region it lies in, or -1.
        """
        self.still_held()
        made_from = np.array(self._memory_hash(digests, len(ids)))
        save_memory(memory, self.path / MEMORY, ids=ids, inside=inside, made_from=made_from)

    def read_memory(self, digests: Sequence[bytes] | None = None) -> tuple[Memory, np.ndarray, np.ndarray] | None:
        """What `write_memory` stored; None if it was not made from the first finished inputs, in order of ids, as they
        are now, or cannot be read. `digests` are theirs (`digests_of`), if they are known.
        """
        stored = self._stored(self._digests() if digests is None else digests, "inside")
        try:
            return None if stored is None else (read_memory_file(self.path / MEMORY), stored["ids"], stored["inside"])
        except (ValueError, TypeError):
            return None

    def _digests(self) -> Sequence[bytes]:
        """A hash of each finished certificate, in order of ids."""
        of_ids = {}
        for shard in self.shards(["predictions", "gap", "theta"]):  # shard by shard: no second copy of all thetas
            of_ids |= dict(zip(shard["ids"].tolist(), digests_of(shard), strict=True))
        return [of_ids[i] for i in sorted(of_ids)]

    def _stored(self, digests: Sequence[bytes], *names: str) -> dict[str, np.ndarray] | None:
        """Arrays of the memory, if it was made from the first of the certificates with these digests."""
        try:
            arrays = read_arrays(self.path / MEMORY, (*names, "ids", "made_from"))
        except (FileNotFoundError, ValueError):
            return None
        return arrays if str(arrays["made_from"]) == self._memory_hash(digests, len(arrays["ids"])) else None

    def _memory_hash(self, digests: Sequence[bytes], count: int) -> str:
        """Hash of this run's settings and of the certificates of its first `count` inputs."""
        return hashlib.sha256(b"".join([f"memory 3 {self.settings_hash}".encode(), *digests[:count]])).hexdigest()

    def set_memory_aside(self) -> tuple[epath.Path, epath.Path] | None:
        """Rename a memory that is not, or no longer, this run's; its name and the new one, or None if there is none."""
        file, there = self.path / MEMORY, {path.name for path in list_folder(self.path)}
        if MEMORY not in there:
            return None
        names = (f"memory_replaced_{i}.npz" for i in itertools.count(1))
        aside = self.path / next(name for name in names if name not in there)
        rename(file, aside)
        return file, aside


def bound_and_gap(
    shard: Mapping[str, np.ndarray], config: RunConfig, carried: CarryConfig | None
) -> tuple[np.ndarray, np.ndarray]:
    """`p_lower` and gap that follow from the integers in a shard, float64 [...]."""
    noise = config.certified_noise
    p_lower, gap = Evidence(*(shard[name] for name in _EVIDENCE)).bound_and_gap(noise)
    if carried is None:
        return p_lower, gap
    lost, draws = (shard[name] for name in _CARRIED)
    return carried_bound_and_gap(p_lower, lost, draws, carried.alpha, noise)


def _follows_from_counts(shard: Mapping[str, np.ndarray], config: RunConfig, carried: CarryConfig | None) -> bool:
    """Whether `p_lower`, gap and abstentions of a shard are those of the votes stored in it, up to rounding."""
    evidence, certify = Evidence(*(shard[name] for name in _EVIDENCE)), config.certify
    alpha = 0.0 if config.enumerable else certify.alpha_of_bound
    others = evidence.n - evidence.votes
    sound = (shard["predictions"] >= ABSTAIN) & (evidence.runner_up >= 0) & (evidence.runner_up <= others)
    if not config.enumerable and certify.bound == "two-class":
        sound &= evidence.runner_up == others
    if config.sampling is not None:
        sound &= (evidence.n <= certify.n) & (shard["n"] <= certify.n)
        sound &= (evidence.alpha <= alpha) & (evidence.alpha > 0) & (evidence.votes <= shard["counts"])
        sound &= (evidence.n <= shard["n"]) | (evidence.votes == 0)  # where nothing was drawn, a look without votes
    else:
        sound &= (evidence.votes == shard["counts"]) & (evidence.n == shard["n"]) & (evidence.alpha == alpha)
        sound &= config.enumerable | (evidence.n == certify.n)
    if carried is not None:
        sound &= (shard["lost_draws"] == carried.n) | (shard["lost_draws"] == 0)
    if not sound.all():
        return False
    try:
        p_lower, gap = bound_and_gap(shard, config, carried)
    except ValueError:
        return False
    same = np.isclose(gap, shard["gap"], rtol=1e-8, atol=0) & np.isclose(p_lower, shard["p_lower"], rtol=1e-8, atol=0)
    return bool((same & ((shard["predictions"] == ABSTAIN) == (gap == 0))).all())


@contextlib.contextmanager
def open_run(
    path: epath.PathLike,
    settings: Mapping[str, Any],
    made_with: Mapping[str, str],
    *,
    process: int = 0,
    processes: int = 1,
) -> Iterator[Run]:
    """Open a new or unfinished run for writing; at most one process of each number at a time.

    Args:
      path: the run directory, made if it does not exist.
      settings: nested mapping of everything that changes results; JSON values.
      made_with: versions, device and the like of this process: stored with its shards, not compared.
      process, processes: number of this process among those that share the run, and how many they are.

    Raises:
      ValueError: if the directory is something else, the run there has other settings (named) or is of another version
        of this library, or another process of this number, or of a group of another size, is writing to it.
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
    with locked_shard(path, process, processes) as still_held:
        asked, config_file = plain(settings), path / "config.json"
        if config_file not in list_folder(path):
            write_file(config_file, (json.dumps({"settings": asked}, indent=2) + "\n").encode(), process)
        there = read_settings(path)
        refuse_other_version(path, there)
        refuse_other_settings(path, there, asked)
        for file in list_folder(path / "shards"):
            if file.name.endswith(f".{process}.tmp"):
                remove(file)
        yield Run(path, there, made_with, process, still_held)  # as stored: 1 and 1.0 are equal, and differ in the hash


def read_run(path: epath.PathLike) -> Run:
    """A finished or unfinished run, for reading.

    Raises:
      ValueError: if there is none, or its results mean something else than those of this version.
    """
    settings = read_settings(path)
    refuse_other_version(path, settings)
    return Run(epath.Path(path), settings)
