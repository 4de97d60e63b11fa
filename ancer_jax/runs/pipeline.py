"""The main job: find theta for every image of a data set, certify it, store it, and put all images through a memory."""

import contextlib
import functools
import time
import warnings

import jax
import numpy as np
from etils import epath
from jaxtyping import ArrayLike, Float

from ancer_jax import devices
from ancer_jax._checks import check_type
from ancer_jax.data import Dataset, batches, pixel_hashes, shard, take
from ancer_jax.memory import Memory
from ancer_jax.runs.config import Execution, RunConfig
from ancer_jax.runs.directory import BEFORE_MEMORY, RESULTS, Run, open_run
from ancer_jax.runs.job import Collected, Job, Pending, make_job
from ancer_jax.runs.plan import choose_batch
from ancer_jax.runs.settings import describe_run, made_with
from ancer_jax.runs.table import digests_of
from ancer_jax.search.theta_map import ThetaMap
from ancer_jax.smoothing.certificate import Certificate
from ancer_jax.smoothing.certify import warn_if_undecidable
from ancer_jax.smoothing.classifier import WRAP_IT, Classifier, check_classifier
from ancer_jax.smoothing.smoothed import Smoothed


def certify_dataset(
    classifier: Classifier,
    dataset: Dataset,
    config: RunConfig,
    *,
    out: epath.PathLike,
    theta_map: ThetaMap | Float[ArrayLike, "*d"] | None = None,
    execution: Execution = Execution(),
) -> epath.Path:
    """Certify every image of `dataset` into the run directory `out`, continuing what is there.

    Where JAX runs as several processes (`jax.distributed`), each calls this with the same arguments and certifies its
    own images (`data.shard`) on its local devices, without waiting for the others; the one that finishes last writes
    the tables. What a process has not done, the next call does, with any number of processes.

    Data-dependent certificates (method "isotropic" or "ancer") then go through a memory, in order of ids, unless
    `config.memory` is False. A stored memory that these images do not continue (lower ids came in, or it was saved
    there by hand) is kept under another name, with a warning.

    Args:
      classifier: base classifier; checked first (`check_classifier`).
      dataset: images in [0, 1] with labels.
      config: what to compute.
      out: run directory, new or unfinished. More images may be added to a run, other settings may not.
      theta_map: with method "universal" (and no other), the theta of all images, say of `optimize_universal`, or a
        `ThetaMap` in the basis of the config.
      execution: how to compute it, and whom to tell about progress.

    Returns:
      Path of the table that is written when all processes have finished: `results.tsv`, whose lines are of one
      classifier; or, for data-dependent noise without memory, `results_before_memory.tsv`.

    Guarantee: each certificate holds with probability at least 1 - alpha, as one of `certify`, and the first m lines of
    a table hold together with probability at least 1 - m alpha. With "fixed" or "universal" all lines speak of one
    smoothed classifier. With "isotropic" or "ancer" those of `results.tsv` speak of the classifier with memory, for
    inputs that come later in the order of ids. Such a line holds if the smoothed classifier of its image's theta, or of
    the theta of the earlier image whose class it was given, has the line's class everywhere in the line's region: the
    i-th line alone with probability at least 1 - i alpha (docs/guarantee.md, "alpha with a memory").

    Whatever is chosen by looking at certified figures, a `theta_map` or the best of several thetas by a finished run,
    is to be certified with another seed.

    Raises:
      ValueError: if the classifier or the data cannot be certified, theta is to be searched for a classifier outside of
        JAX, `theta_map` is missing, not wanted or not a theta of these images, several CPU devices are to share draws,
        or `out` holds something else: other settings, another platform or precision, or the work of a classifier that
        calls back to the host, which cannot be continued.
      OSError: if `out` cannot be written.
    """
    if isinstance(classifier, Smoothed):
        raise ValueError("certify_dataset takes smoothed.classifier; its noise and theta are set in RunConfig")
    check_type("classifier", classifier, Classifier, WRAP_IT)
    check_type("dataset", dataset, Dataset, "make it by dataset_from_arrays or load_dataset")
    check_type("config", config, RunConfig, "RunConfig(method=..., theta=...)")
    _check_labels(classifier, dataset)
    start = _start(config, theta_map, dataset.images.shape[1:])
    if classifier.on_host and config.data_dependent:
        raise ValueError(
            f"method {config.method} searches for theta by gradients, which a classifier outside of JAX does not give: "
            "take method fixed or universal, or ancer_jax.torch.translate"
        )
    mesh = devices.device_mesh(execution.devices)
    if execution.shard == "draws" and config.data_dependent:
        devices.refuse_collectives(mesh, "shard the draws of a search")
    if not config.enumerable:
        warn_if_undecidable(config.certify, config.certified_noise)
    asked = config.precision != "default"
    with jax.default_matmul_precision(config.precision) if asked else contextlib.nullcontext():
        check_classifier(classifier, dataset.images[0])
        settings = describe_run(classifier, dataset, config, start, mesh)
        job = make_job(devices.replicate(classifier, mesh), config, start, execution, mesh)
        process, processes = jax.process_index(), jax.process_count()
        with open_run(out, settings, made_with(), process=process, processes=processes) as run:
            _certify_missing(run, job, dataset, execution)
            return finish(run, dataset, execution, memory=config.memory)


def finish(run: Run, dataset: Dataset, execution: Execution, *, memory: bool) -> epath.Path:
    """If all images are stored, put data-dependent certificates through a memory, if asked to, and write the tables.

    Returns:
      Path of the table of the run, which another process may still be going to write.
    """
    if {*dataset.ids.tolist()} <= run.done():
        with run.exporting() as ours:
            if ours:  # otherwise another process is writing the tables
                if memory and run.config.data_dependent:
                    _remember(run, dataset.whole, execution)
                return run.export()
    return run.path / (RESULTS if memory or not run.config.data_dependent else BEFORE_MEMORY)


def _check_labels(classifier: Classifier, dataset: Dataset) -> None:
    there, known = dataset.num_classes, classifier.num_classes
    if there > known:
        raise ValueError(f"{dataset.name} has {there} classes, the classifier only {known}")
    if dataset.classes and there < known:
        raise ValueError(
            f"{dataset.name} has folders of {there} classes, the classifier knows {known}: labels are places in the "
            "list of folders, so all must be there"
        )


def _start(config: RunConfig, theta_map: ThetaMap | ArrayLike | None, shape: tuple[int, ...]) -> np.ndarray:
    """The theta of all images, [] or [*d], or where their search starts."""
    if theta_map is None and config.method == "universal":
        raise ValueError("method universal needs theta_map, one theta for each coefficient (--theta-map)")
    if theta_map is not None and config.method != "universal":
        raise ValueError(f"theta_map (--theta-map) is for method universal, got method {config.method}")
    config.basis.coefficients(np.zeros(shape))  # refuses other images than those of the basis
    if theta_map is None:
        theta = np.asarray(config.theta, np.float32)
    else:
        theta_map = theta_map if isinstance(theta_map, ThetaMap) else ThetaMap(np.asarray(theta_map), config.basis)
        if theta_map.basis != config.basis:
            there = f"theta_map is in the basis {theta_map.basis}, the noise of the config in {config.basis}"
            raise ValueError(f"{there}: give RunConfig(basis=theta_map.basis)")
        theta = theta_map.theta
        if theta.shape != shape:
            raise ValueError(f"theta_map must be {list(shape)} as the images are, got {list(theta.shape)}")
    return theta if config.data_dependent else np.asarray(config.certified_noise.admissible(theta))


def _certify_missing(run: Run, job: Job, dataset: Dataset, execution: Execution) -> None:
    """Certify and store those of this process's images that are not stored yet, batch after batch.

    The batch size is chosen from all images of this process, not from the missing ones, so that resuming changes no
    rounding of the searches.
    """
    mine, missing = missing_images(run, dataset, execution)
    if mine is None:
        return
    job, batch_size = choose_batch(job.with_probes(dataset.whole), mine, execution)
    began, pending = time.perf_counter(), None

    def store(pending: Pending) -> None:
        nonlocal began
        _store(run, pending, job.collect(pending), began)
        began = time.perf_counter()
        execution.progress("certified", len(pending.indices))

    for batch in batches(take(mine, missing), batch_size):
        launched = job.launch(batch)
        if job.classifier.on_host:
            store(launched)  # its votes are there already
            continue
        if pending is not None:
            store(pending)  # only now, so that the devices stay busy
        pending = launched
    if pending is not None:
        store(pending)


def missing_images(run: Run, dataset: Dataset, execution: Execution) -> tuple[Dataset | None, np.ndarray]:
    """The images of this process, and the rows of those that are not stored yet; None if nothing is left to do."""
    mine, done = shard(dataset, process_index=jax.process_index(), process_count=jax.process_count()), run.done()
    missing = np.flatnonzero([] if mine is None else ~np.isin(mine.ids, [*done]))
    execution.progress("certified", 0 if mine is None else len(mine) - len(missing))
    if not len(missing):
        return None, missing
    if run.calls_the_host:
        _warn_or_refuse(run, begun=bool(done))
    return mine, missing


def _warn_or_refuse(run: Run, *, begun: bool) -> None:
    """Say that a classifier that calls back to the host cannot be told from another one; refuse to go on with it."""
    how = "by pure_callback, from_host without a digest or the like"
    what = f"the classifier calls code on the host ({how}): what it computes there has no hash"
    if jax.process_count() > 1:
        raise ValueError(f"{what}, so several processes cannot know that theirs is the same")
    if begun:
        raise ValueError(f"{what}, so {run.path} cannot be continued: it may have been another classifier")
    warnings.warn(f"{what}, so this run cannot be continued once it is stopped", stacklevel=5)


def _store(run: Run, pending: Pending, collected: Collected, began: float) -> None:
    """Write the shard of a batch. Its seconds are those since `began`: the search of the next batch is among them."""
    certificate, indices, batch = collected.certificate, pending.indices, pending.batch
    run.write_shard(
        {
            "ids": batch["id"][indices],
            "labels": batch["label"][indices],
            "pixels": pixel_hashes(batch["image"][indices]),
            "predictions": np.asarray(certificate.prediction),
            "counts": np.asarray(certificate.count),
            "n": np.asarray(certificate.n),
            "draws": collected.draws,
            "passes": np.array(collected.passes),
            "p_lower": np.asarray(certificate.p_lower),
            "gap": np.asarray(certificate.gap),
            "theta": pending.theta[indices],
            **{f"bound_{name}": column for name, column in collected.evidence._asdict().items()},
            **{f"leakage_{name}": np.asarray(column) for name, column in collected.leakage._asdict().items()},
            "seconds": np.full(len(indices), (time.perf_counter() - began) / len(indices)),
        }
    )


def _remember(run: Run, dataset: Dataset, execution: Execution) -> None:
    """Put every finished image through the memory in order of ids, continuing a memory that is stored."""
    columns = run.columns("pixels", "predictions", "gap", "theta")
    digests = digests_of(columns).tolist()
    stored = run.read_memory(digests)
    if stored is None and (names := run.set_memory_aside()):
        warnings.warn(
            f"{names[0]} is not of the first images of this run as they are now (images with lower ids were added, "
            f"say): it was renamed to {names[1].name}, and a new one was made, whose answers may differ",
            stacklevel=4,
        )
    noise = run.config.certified_noise
    nothing = np.zeros(0, np.int64)
    memory, ids, inside = stored or (Memory.empty(noise.norm, noise.basis), nothing, nothing)
    new = {name: column[len(ids) :] for name, column in columns.items()}
    if not len(new["ids"]):
        return
    images = dataset.images[np.searchsorted(dataset.ids, new["ids"])]
    if (other := pixel_hashes(images) != new["pixels"]).any():
        raise ValueError(f"{dataset.name}: image {new['ids'][other][0]} is no longer the one that was certified")
    region, unused = noise.region(images, new["theta"], new["gap"]), np.zeros(len(images))
    certificates = Certificate(new["predictions"], region, unused, unused, unused, unused)
    memory, answers = memory.insert_batch(certificates, progress=functools.partial(execution.progress, "remembered"))
    places = np.asarray(answers.inside)
    inside = np.concatenate([inside, np.where(places < 0, -1, columns["ids"][places])])
    run.write_memory(memory, columns["ids"], inside, digests)
