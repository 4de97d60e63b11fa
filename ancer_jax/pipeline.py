"""The main job: for every image of a data set find theta, certify, reconcile by memory, store in a run directory."""

import contextlib
import hashlib
import importlib.metadata
import itertools
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import ArrayLike, Float

from ancer_jax import memory, parallel
from ancer_jax.certificates import SplittingL1
from ancer_jax.certification import warn_if_undecidable
from ancer_jax.classifiers import Classifier, calls_the_host, check_classifier, fingerprint
from ancer_jax.config import Execution, RunConfig
from ancer_jax.data import Dataset, batches, pixel_hashes, share, take
from ancer_jax.execution import Computed, certificates, compute, find_probes, fit
from ancer_jax.regions import Region
from ancer_jax.runs import BEFORE_MEMORY, RESULTS, Run, open_run


def certify_dataset(
    classifier: Classifier,
    dataset: Dataset,
    config: RunConfig,
    *,
    out: epath.PathLike,
    theta_map: Float[ArrayLike, "*d"] | None = None,
    execution: Execution = Execution(),
    reconcile: bool = True,
    progress: Callable[[int], object] = lambda images: None,
    reconciled: Callable[[int], object] = lambda images: None,
) -> epath.Path:
    """Certify every image of `dataset` into the run directory `out`, continuing what is there.

    Where JAX runs as several processes (`jax.distributed`), each calls this with the same arguments and certifies its
    share of the images (`data.share`) on its local devices, without waiting for the others; the one that finishes
    last writes the tables. What a process has not done, the next call does, with any number of processes.

    Args:
      classifier: base classifier; checked first (`classifiers.check_classifier`).
      dataset: images in [0, 1] with labels.
      config: what to compute.
      out: run directory, new or unfinished. More images may be added to a run, other settings may not.
      theta_map: with method "shared" (and no other), the theta of all images, say of `differentiable.learn_theta`.
      execution: how to compute it.
      reconcile: with method "isotropic" or "ancer", whether all finished images of the run go through a memory, in
        order of ids, at the end. It writes `memory.npz` and `results.tsv`. A memory that these images do not
        continue (lower ids came in, or it was saved there by hand) is kept under another name, with a warning.
      progress: called after each batch with the number of images that were finished.
      reconciled: called with the number of images that went through the memory since the last call.

    Returns:
      Path of the table that is written when all processes have finished: `results.tsv`, whose lines are of one
      classifier; or, for data-dependent noise without memory, `results_before_memory.tsv`.

    Guarantee: each certificate holds with probability at least 1 - alpha, as one of `certification.certify`. With
    method "fixed" or "shared" all lines speak of one smoothed classifier, for any y in the region.

    With "isotropic" or "ancer" each certificate speaks of the smoothed classifier of the theta found for its image, and
    the lines of `results.tsv` speak of the classifier with memory, for inputs that come later in the order of ids. Such
    a line holds if one smoothed classifier answers with the line's class everywhere in the line's region: that of this
    image's theta, or of an earlier image's whose class it was given. It does if its own certificate and those of all
    earlier images hold: for the i-th line with probability at least 1 - i alpha. (Terms can be left out only for images
    that cannot reach this one whatever the draws.)

    With every method the first m lines hold together with probability at least 1 - m alpha. So `alpha = A / number of
    images` gives a table that holds as a whole with probability at least 1 - A.

    Whatever is chosen by looking at certified figures, a `theta_map` or the best of several thetas by a finished run,
    is to be certified with another seed.

    Raises:
      ValueError: if the classifier or the data cannot be certified, `theta_map` is missing, not wanted or no theta of
        these images, several CPU devices are to share draws, or `out` holds something else: other settings, another
        platform or precision, or the work of a classifier that calls back to the host, which cannot be continued.
      OSError: if `out` cannot be written.
    """
    if dataset.num_classes > classifier.num_classes:
        raise ValueError(
            f"{dataset.name} has {dataset.num_classes} classes, the classifier only {classifier.num_classes}"
        )
    if dataset.classes and dataset.num_classes < classifier.num_classes:
        raise ValueError(
            f"{dataset.name} has folders of {dataset.num_classes} classes, the classifier knows "
            f"{classifier.num_classes}: labels are places in the list of folders, so all must be there"
        )
    theta = _theta(config, theta_map, dataset.images.shape[1:])
    mesh = parallel.device_mesh(execution.devices)
    if execution.split == "draws" and config.data_dependent:
        parallel.refuse_collectives(mesh, "share the draws of a search")
    if not config.exact:
        warn_if_undecidable(config.certify, config.certificate)
    asked = config.precision != "default"
    with jax.default_matmul_precision(config.precision) if asked else contextlib.nullcontext():
        check_classifier(classifier, dataset.images[0])
        settings = _settings(classifier, dataset, config, theta, mesh)
        classifier = parallel.replicate(classifier, mesh)
        process = jax.process_index()
        mine = share(dataset, process_index=process, process_count=jax.process_count())
        who = {"process": process, "processes": jax.process_count()}
        with open_run(out, settings, _made_with(), **who) as run:
            done = run.done()
            todo = [] if mine is None else [row for row, i in enumerate(mine.ids) if int(i) not in done]
            progress(0 if mine is None else len(mine) - len(todo))
            if mine is not None and todo:
                if settings["calls_the_host"]:
                    _warn_or_refuse(out, begun=bool(done))
                _certify_images(run, classifier, mine, todo, theta, config, execution, mesh, progress)
            if {*dataset.ids.tolist()} <= run.done():
                with run.exporting() as ours:  # not if another process has finished, too, and was first
                    if ours and reconcile and config.data_dependent:
                        _reconcile(run, dataset.whole, config.certificate.norm, reconciled)
                    if ours:
                        return run.export()
            return run.path / (RESULTS if reconcile or not config.data_dependent else BEFORE_MEMORY)


def _warn_or_refuse(out, *, begun: bool) -> None:
    """Say that a classifier that calls back to the host cannot be told from another one; refuse to go on with it."""
    what = "the classifier calls code on the host (by pure_callback or the like): what it computes there has no hash"
    if jax.process_count() > 1:
        raise ValueError(f"{what}, so several processes cannot know that theirs is the same")
    if begun:
        raise ValueError(f"{what}, so {out} cannot be continued: it may have been another classifier")
    warnings.warn(f"{what}, so this run cannot be continued once it is stopped", stacklevel=3)


def _reconcile(run: Run, dataset: Dataset, norm: int, progress) -> None:
    """Put every finished image through the memory in order of ids, continuing a memory that is stored."""
    columns = run.columns("pixels", "predictions", "gap", "theta")
    stored = run.read_memory()
    if stored is None and (names := run.set_memory_aside()):
        warnings.warn(
            f"{names[0]} is not of the first images of this run as they are now (images with lower ids were added, "
            f"say): it was renamed to {names[1].name}, and a new one was made, whose answers may differ",
            stacklevel=3,
        )
    state, ids, inside = stored or (memory.empty(norm), np.zeros(0, np.int64), np.zeros(0, np.int64))
    new = {name: column[len(ids) :] for name, column in columns.items()}
    if not len(new["ids"]):
        return
    images = dataset.images[np.searchsorted(dataset.ids, new["ids"])]
    if (other := pixel_hashes(images) != new["pixels"]).any():
        raise ValueError(f"{dataset.name}: image {new['ids'][other][0]} is no longer the one that was certified")
    regions = Region(images, new["theta"], new["gap"], norm)
    state, info = memory.insert_batch(state, regions, new["predictions"], progress=progress)
    inside_id = np.where(info.inside < 0, -1, columns["ids"][info.inside])
    run.write_memory(state, columns["ids"], np.concatenate([inside, inside_id]))


def _theta(config: RunConfig, theta_map, shape) -> np.ndarray:
    """The theta of all images, [] or [*d], or where their search starts."""
    if (theta_map is None) == (config.method == "shared"):
        raise ValueError(f"method shared needs a theta_map (--theta-map), and no other takes one: got {config.method}")
    theta = np.asarray(config.theta if theta_map is None else theta_map, np.float32)
    if theta_map is not None and theta.shape != shape:
        raise ValueError(f"theta_map must be {list(shape)} as the images are, got {list(theta.shape)}")
    if not (np.isfinite(theta) & (theta >= np.finfo(np.float32).tiny)).all():
        raise ValueError(f"theta_map must be positive and finite, got {theta.min()} to {theta.max()}")
    if config.exact and not config.data_dependent:
        theta = np.asarray(SplittingL1().quantised(theta, period=config.period if theta.ndim else None))
    return theta


def _certify_images(
    run: Run, classifier, dataset: Dataset, rows: list[int], theta, config: RunConfig, execution, mesh, progress
) -> None:
    """Certify and store batch after batch of `rows`; the devices have the next one before the host looks at the last.

    Batches are as large as those of the whole data set: one that is made again gives the same bits.
    """
    probes = find_probes(classifier, dataset.whole, config, execution, mesh)
    batch_size, chunk = fit(classifier, dataset, theta, probes, config, execution, mesh)
    how = {"split": execution.split, "chunk": chunk, "mesh": mesh}
    ended = time.perf_counter()

    def computing() -> Iterator[tuple[dict[str, np.ndarray], Any]]:
        for batch in batches(take(dataset, rows), batch_size):
            if config.exact:
                _check_levels(batch, SplittingL1().levels)
            ids, present = batch["id"].astype(np.uint32), np.flatnonzero(batch["mask"])
            yield batch, compute(ids, classifier, batch["image"], theta, probes, config, rows=present, **how)
        yield {}, None

    for (batch, computed), _ in itertools.pairwise(computing()):  # the next one is computing already
        _store(run, batch, computed, config, ended)
        ended = time.perf_counter()
        progress(int(batch["mask"].sum()))


def _check_levels(batch, levels: int) -> None:
    """Refuse images that exact certificates say nothing of."""
    steps = batch["image"].astype(np.float64).reshape(len(batch["id"]), -1) * levels
    # What float32 rounds off. All pixels together stay below the one vote that `SplittingL1.exact_gap` takes off.
    if (wrong := (abs(steps - np.rint(steps)) > 3e-5).any(axis=1)).any():
        raise ValueError(
            f"exact certificates are of images of 8 bits: pixels of image {batch['id'][wrong][0]} are no multiples of "
            f"1/{levels}"
        )


def _store(run: Run, batch, computed: Computed, config: RunConfig, began: float) -> None:
    """The host's part of a batch: certificates from integers, and its shard."""
    rows = np.flatnonzero(batch["mask"])
    result, evidence, draws = certificates(computed, rows, config)
    run.write_shard(
        {
            "ids": batch["id"][rows],
            "labels": batch["label"][rows],
            "pixels": pixel_hashes(batch["image"][rows]),
            "predictions": result.prediction,
            "counts": result.count,
            "n": result.n,
            "draws": draws,
            "p_lower": result.p_lower,
            "gap": result.gap,
            "theta": computed.theta[rows],
            **{f"bound_{name}": column for name, column in evidence._asdict().items()},
            **{f"leaked_{name}": np.asarray(column)[rows] for name, column in computed.leaked._asdict().items()},
            "seconds": np.full(len(rows), (time.perf_counter() - began) / len(rows)),
        }
    )


def _settings(classifier, dataset, config, theta, mesh) -> dict[str, Any]:
    """What is hashed into the run: all that makes another base classifier, other data, or other results."""
    device = mesh.devices.flat[0]
    shared = {"theta_map": hashlib.sha256(theta.tobytes()).hexdigest()} if config.method == "shared" else {}
    return (
        config.settings()
        | shared
        | {
            "classifier": fingerprint(classifier, dataset.images[0]),
            "calls_the_host": calls_the_host(classifier, dataset.images[0]),
            # Accelerators of one platform differ: float32 products are TF32 on some GPUs only.
            "platform": "cpu" if device.platform == "cpu" else f"{device.platform}, {device.device_kind}",
            "precision": getattr(jax.config, "jax_default_matmul_precision") or "default",  # noqa: B009
            "data": {
                "name": dataset.name,
                "fingerprint": dataset.fingerprint,
                "image_shape": list(dataset.images.shape[1:]),
                "num_classes": dataset.num_classes,
            },
        }
    )


def _made_with() -> dict[str, str]:
    device = jax.local_devices()[0]
    names = ("ancer-jax", "jax", "jaxlib", "flax", "optax", "numpy", "scipy")
    versions = {name: importlib.metadata.version(name) for name in names}
    return versions | {"python": platform.python_version(), "device": device.device_kind, "platform": device.platform}
