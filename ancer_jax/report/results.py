"""The results of one run, as arrays."""

import dataclasses
import fractions
import math
from collections.abc import Iterable

import numpy as np
from etils import epath

from ancer_jax.metrics import average_certified_radius
from ancer_jax.report.cost import Passes, passes
from ancer_jax.runs import Run, RunConfig, read_run, read_table
from ancer_jax.runs.directory import BEFORE_MEMORY, RESULTS
from ancer_jax.smoothing import ABSTAIN
from ancer_jax.storage import read_text

LEAKY_ABOVE = 0.1


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of one run.

    Attributes:
      name: name of the run in tables and legends.
      columns: one array for each column of a results table, one row for each input. If the run has a memory, they are
        of the classifier with memory. Those of a run directory are exact (`Run.results`); those of a file are rounded
        (`read_table`).
      norm: "l2" or "l1"; "" where a table does not say.
      before: the columns before memory, if `columns` are those after memory and both are known.
      run: the run directory, if the results come from one.
      finished: whether these are all results of the run; False if it was stopped, or is still going on.
    """

    name: str
    columns: dict[str, np.ndarray]
    norm: str = ""
    before: dict[str, np.ndarray] | None = None
    run: Run | None = None
    finished: bool = True

    def __getitem__(self, column: str) -> np.ndarray:
        if column not in self.columns:
            raise KeyError(f"{self.name} has no column {column!r}, only {', '.join(self.columns)}")
        return self.columns[column]

    @property
    def config(self) -> RunConfig | None:
        """The settings of the run; None where they are not known."""
        return self.run.config if self.run else None

    @property
    def own(self) -> dict[str, np.ndarray]:
        """The columns of each input's own certificate: those before memory, where these are known."""
        return self.before or self.columns

    @property
    def correct(self) -> np.ndarray:
        """Whether the answer to each input is its label."""
        return self["correct"] == 1

    @property
    def abstained(self) -> np.ndarray:
        """Whether the answer to each input is an abstention."""
        return self["predict"] == ABSTAIN

    @property
    def data_dependent(self) -> bool | None:
        """Whether theta was chosen per input; None where a table does not say.

        Our tables say so in the column `method`. In tables of others, a sigma that varies or regions that are not balls
        show that it was chosen per input. Nothing there can show that it was not.
        """
        if "method" in self.columns:
            return bool((~np.isin(self["method"], ("fixed", "universal"))).any())
        sigmas = [self[name] for name in ("min_sigma", "sigma") if name in self.columns]
        varies = (self["radius_proxy"] != self["radius"]).any() or any((sigma != sigma[0]).any() for sigma in sigmas)
        return True if varies else None

    @property
    def reconciled(self) -> bool:
        """Whether the columns are known to be of one classifier: by a memory, or by a theta chosen for all inputs."""
        return "changed" in self.columns or self.data_dependent is False

    @property
    def only_balls(self) -> bool:
        """Whether radius and proxy radius agree up to rounding: all regions are balls, or cross-polytopes."""
        return np.allclose(self["radius_proxy"], self["radius"], rtol=1e-6, atol=2e-6)  # a file has six decimals

    @property
    def alpha(self) -> fractions.Fraction | None:
        """Error probability of each certificate, 0 for exact ones; None where the settings are not known."""
        return sum(map(decimal, self.alphas), fractions.Fraction()) if self.alphas else None

    @property
    def alphas(self) -> tuple[float, ...]:
        """The parts of `alpha`: that of certifying and, of a carried run, that of carrying."""
        if self.run is None:
            return ()
        carried = self.run.carried
        return (self.run.config.alpha,) if carried is None else (self.run.config.alpha, carried.alpha)

    @property
    def passes(self) -> Passes | None:
        """Passes through the network per image, of a carried run those of carrying alone; None where the settings are
        not known.
        """
        if self.run is None:
            return None
        draws = float(self["draws"].mean())
        return passes(self.run.config, draws) if self.run.carried is None else Passes(draws, 0, 0)

    @property
    def seconds(self) -> float | None:
        """Mean seconds per image; None where they are not known."""
        return float(self["seconds"].mean()) if "seconds" in self.columns else None

    @property
    def mean_proxy_radius(self) -> float:
        """Mean over all inputs, right or wrong; an abstention counts as 0."""
        return float(self["radius_proxy"].mean())

    def standard_errors(self) -> tuple[float, float]:
        """Standard errors of the accuracy and of ACR, over the choice of inputs; NaN for a single one."""
        if len(self.correct) < 2:
            return math.nan, math.nan
        right, radii = (
            values.std(ddof=1) / math.sqrt(len(values)) for values in (self.correct, self["radius"] * self.correct)
        )
        return float(right), float(radii)

    def acr(self, column: str, kept: np.ndarray | bool = True) -> float:
        """ACR (`column` is "radius") or ACR-tilde ("radius_proxy"); an input that is not `kept` counts as 0."""
        return average_certified_radius(self[column], self.correct & kept)

    def leakages(self, column: str = "leakage") -> list[fractions.Fraction]:
        """The measured values of `leakage` or `soft_leakage` of the inputs that were answered."""
        values = self.columns[column][~self.abstained] if column in self.columns else ()
        return [value for value in values if value == value]  # NaN is not

    def leaky(self, limit: float) -> int:
        """How many of the inputs that were answered have a theta that is known to leak more than `limit`."""
        return sum(leakage > decimal(limit) for leakage in self.leakages())

    def leaks_at_most(self, limit: float) -> np.ndarray | None:
        """Whether the theta of each input is known to leak at most `limit`; None if no leakage was measured."""
        values, most = self.columns.get("leakage", ()), decimal(limit)
        known = any(value == value for value in values)
        return np.array([bool(value <= most) for value in values]) if known else None  # NaN is not

    def thetas(self, ids: Iterable[int]) -> dict[int, np.ndarray]:
        """The thetas of these inputs of a run directory, read on demand: all of them may not fit into memory."""
        wanted, found = set(ids), {}
        for shard in self.run.shards(["theta"]) if self.run else ():
            pairs = zip(shard["ids"].tolist(), shard["theta"], strict=True)
            found |= {i: np.array(theta) for i, theta in pairs if i in wanted}  # a copy: a view keeps the shard
            if len(found) == len(wanted):
                break
        return dict(sorted(found.items()))


def load_results(path: epath.PathLike) -> Results:
    """The results of a run directory, finished or not, or of a TSV file: ours, Cohen's or ANCER's.

    Raises:
      ValueError: if there are none.
    """
    path = epath.Path(path)
    if not path.exists():
        raise ValueError(f"{path}: there is no such run or file")
    if not path.is_dir():
        return Results(path.stem if path.suffix in (".tsv", ".txt") else path.name, read_table(path))
    run = read_run(path)
    before, after = run.results()
    if not before:
        raise ValueError(f"{path}: there are no results yet")
    # The table is written once all images are finished: one of fewer images is from before --max was raised.
    table = read_text(path / (BEFORE_MEMORY if run.config.data_dependent else RESULTS)) or ""
    finished = table.count("\n") == len(before["idx"]) + 1
    name = path.name or path.resolve().name  # of "."
    return Results(name, after or before, run.config.norm, before if after else None, run, finished)


def decimal(number: float) -> fractions.Fraction:
    """The decimal number that is written for a float: 1/10 for 0.1."""
    return fractions.Fraction(repr(float(number)))
