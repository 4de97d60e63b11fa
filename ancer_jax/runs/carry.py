"""Carry the certificates of a run to a changed network: a run of that network, from few draws for each image."""

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from ancer_jax import devices
from ancer_jax._checks import check_choice, check_integer, check_type
from ancer_jax.data import Dataset, batches, pixel_hashes, take
from ancer_jax.runs.config import Execution, Precision, RunConfig
from ancer_jax.runs.directory import Run, bound_and_gap, open_run, read_run
from ancer_jax.runs.job import Job, make_job
from ancer_jax.runs.pipeline import finish, missing_images
from ancer_jax.runs.plan import choose_batch
from ancer_jax.runs.settings import describe_run, differences, made_with, plain
from ancer_jax.search.leakage import LeakageCounts
from ancer_jax.smoothing.carry import CarryConfig, losing_classifier
from ancer_jax.smoothing.certificate import ABSTAIN, CertifyConfig
from ancer_jax.smoothing.classifier import WRAP_IT, Classifier, check_classifier
from ancer_jax.smoothing.smoothed import Stage


@dataclasses.dataclass(frozen=True)
class CarryRunConfig:
    """How the certificates of a run are carried to a changed network.

    Attributes:
      n: common draws for each image, for which both networks run (`CarryConfig` says what they cost in size).
      alpha: probability that the bound on lost votes fails, for each image; None is a tenth of the run's alpha.
      seed: seed of the common draws, in [0, 2^31). They are independent of those of the run, whatever its seed.
      precision: of the changed network's matrix products, as in `RunConfig`. Those of the original network are computed
        with the precision of the run.
      memory: whether data-dependent certificates go through a memory of their own at the end, in order of ids.

    Raises:
      ValueError: if a setting is out of range.
    """

    n: int = CarryConfig.n
    alpha: float | None = None
    seed: int = 0
    precision: Precision = "default"
    memory: bool = True

    def __post_init__(self):
        CarryConfig(self.n, CarryConfig.alpha if self.alpha is None else self.alpha)  # checks them
        check_integer("seed", self.seed, 0, 2**31 - 1)
        check_choice("precision", self.precision, Precision)


def carry_run(
    path: epath.PathLike,
    classifiers: tuple[Classifier, Classifier],
    dataset: Dataset,
    config: CarryRunConfig = CarryRunConfig(),
    *,
    out: epath.PathLike,
    execution: Execution = Execution(),
) -> epath.Path:
    """Carry the certificates of a run to a changed network, into the run directory `out`, continuing what is there.

    Classes and thetas are those of the run; the votes that a class loses are counted on common draws (`carry`), and an
    abstention stays one. Data-dependent certificates then go through a memory of their own: the memory of the run holds
    regions of the original network. Their leakage under the changed network is not measured.

    Args:
      path: run directory, finished for these images.
      classifiers: the base classifier that the run certified, and the changed one; in JAX or outside of it.
      dataset: images of the run, all or some.
      config: draws, alpha, seed; precision of the changed network.
      out: run directory of the changed network, new or unfinished.
      execution, several processes: as in `certify_dataset`.

    Returns:
      Path of the table, as in `certify_dataset`. Its columns `count` and `n` are those of the run before.

    Guarantee: as in `certify_dataset`, for the changed network, with the sum of the run's alpha and that of the config
    in place of alpha. The changed network must not depend on the common draws: if it is one of several that were
    compared by carrying, carry with another seed than the one that compared them.

    Raises:
      ValueError: if the run is exact or was itself carried; if classifier, data, platform or precision of the first
        classifier are not those of the run, or that cannot be known, because the classifier calls back to the host; if
        the run lacks an image; as in `certify_dataset`.
      OSError: if `out` cannot be written.

    References: Ugare et al. 2024 (arXiv 2305.19521).
    """
    for classifier in classifiers:
        check_type("classifier", classifier, Classifier, WRAP_IT)
    check_type("dataset", dataset, Dataset, "make it by dataset_from_arrays or load_dataset")
    check_type("config", config, CarryRunConfig, "CarryRunConfig(n=...)")
    before, changed = classifiers
    run, mesh = read_run(path), devices.device_mesh(execution.devices)
    _refuse_run(run, dataset)
    theta = np.asarray(next(run.shards(["theta"]))["theta"][0])
    at_precision = None if run.precision == "default" else run.precision
    with jax.default_matmul_precision(at_precision):
        check_classifier(before, dataset.images[0])
        here = plain(describe_run(before, dataset, run.config, theta, mesh))
    if text := differences(run.settings, here):
        raise ValueError(f"{run.path} is not a run of this classifier (--carry-from), data and device ({text})")
    if not before.on_host:
        before = dataclasses.replace(before, apply=_AtPrecision(before.apply, at_precision))
    pair = losing_classifier(before, changed)
    asked = config.precision != "default"
    with jax.default_matmul_precision(config.precision) if asked else contextlib.nullcontext():
        check_classifier(changed, dataset.images[0])
        settings = describe_run(changed, dataset, run.config, theta, mesh) | {"carried": _describe(run, here, config)}
        counting = RunConfig(
            run.config.norm,
            certify=CertifyConfig(n=config.n),
            seed=config.seed,
            noise=run.config.noise,
            basis=run.config.basis,
        )
        job = make_job(devices.replicate(pair, mesh), counting, theta, execution, mesh)
        process, processes = jax.process_index(), jax.process_count()
        with open_run(out, settings, made_with(), process=process, processes=processes) as carried:
            _carry_missing(run, carried, job, dataset, execution)
            return finish(carried, dataset, execution, memory=config.memory)


@dataclasses.dataclass(frozen=True)
class _AtPrecision:
    """A network whose matrix products have a precision of their own; None is the usual one of the device."""

    apply: Any
    precision: str | None

    def __call__(self, variables, x):
        with jax.default_matmul_precision(self.precision):
            return self.apply(variables, x)


def _refuse_run(run: Run, dataset: Dataset) -> None:
    """ValueError if the certificates of a run cannot be carried, or not those of all images."""
    if run.config.enumerable:
        raise ValueError(f"{run.path} has exact certificates, which need all draws: certify the changed network itself")
    if run.carried is not None:
        raise ValueError(f"{run.path} was itself carried: carry the run that it comes from, straight to this network")
    if run.calls_the_host:
        what = "calls code on the host that has no hash: nothing tells whether this is still the same classifier"
        raise ValueError(f"{run.path} cannot be carried, for its classifier {what}")
    if not run.matches(dataset):
        raise ValueError(f"{run.path} is a run of other data than {dataset.name}: other images, labels or ids")
    if missing := {*dataset.ids.tolist()} - run.done():
        few = f"{len(missing)} of {len(dataset)} images, like {min(missing)}"
        raise ValueError(f"{run.path} has no certificates of {few}: finish it first, or carry fewer images")


def _describe(run: Run, there: Mapping[str, Any], config: CarryRunConfig) -> dict[str, Any]:
    """The settings of carrying: those of the run by their hash, its network, and what is drawn now."""
    alpha = run.config.certify.alpha / 10 if config.alpha is None else config.alpha
    known = {name: there[name] for name in ("classifier", "precision")}
    return {"run": run.settings_hash, **known, **dataclasses.asdict(CarryConfig(config.n, alpha)), "seed": config.seed}


def _carry_missing(before: Run, run: Run, job: Job, dataset: Dataset, execution: Execution) -> None:
    """Carry and store those of this process's images that are not stored yet, shard after shard of the run before."""
    mine, missing = missing_images(run, dataset, execution)
    if mine is None:
        return
    job, batch_size = choose_batch(job, mine, execution)
    for certified in before.shards():
        rows = missing[np.isin(mine.ids[missing], certified["ids"])]
        for batch in batches(take(mine, rows), batch_size) if len(rows) else ():
            began, places = time.perf_counter(), np.searchsorted(certified["ids"], batch["id"])
            of_batch = {name: column[places] for name, column in certified.items()}
            _carry_batch(run, job, of_batch, batch, began)
            execution.progress("certified", int(batch["mask"].sum()))


def _carry_batch(
    run: Run, job: Job, certified: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray], began: float
) -> None:
    """Count the lost votes of a batch, and write a shard of its carried certificates."""
    if (other := pixel_hashes(batch["image"]) != certified["pixels"]).any():
        raise ValueError(f"{run.data.name}: image {batch['id'][other][0]} is no longer the one that was certified")
    how, classes = run.carried, certified["predictions"]
    assert how is not None
    answered = np.flatnonzero(batch["mask"] & (classes != ABSTAIN))
    counter = job.vote_counter(batch["id"].astype(np.uint32), batch["image"], certified["theta"])
    lost, draws = np.zeros((2, len(classes)), np.int64)
    launches = counter.launch(Stage.CARRY, answered, 0, how.n)
    lost[answered] = counter.collect(launches)[answered, classes[answered]]
    draws[answered] = how.n
    carried = {**certified, "labels": batch["label"], "lost_votes": lost, "lost_draws": draws, "draws": 2 * draws}
    p_lower, gap = bound_and_gap(carried, run.config, how)
    carried |= {"p_lower": p_lower, "gap": gap, "predictions": np.where(gap > 0, classes, ABSTAIN)}
    carried |= {f"leakage_{name}": np.zeros(len(classes), np.int32) for name in LeakageCounts._fields}
    indices = np.flatnonzero(batch["mask"])
    seconds = (time.perf_counter() - began) / len(indices)
    stored = {name: column[indices] for name, column in carried.items()}
    passes = 2 * sum(launch.passes for launch in launches)  # of both networks
    run.write_shard(stored | {"seconds": np.full(len(indices), seconds), "passes": np.array(passes)})
