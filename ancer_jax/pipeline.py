"""The main job: for every image of a data set find theta, certify, reconcile by memory, store in a run directory."""

import dataclasses
import functools
import importlib.metadata
import itertools
import math
import platform
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import PartitionSpec

from ancer_jax import memory, parallel
from ancer_jax.certificates import CERTIFICATES
from ancer_jax.certification import ABSTAIN, CertifyConfig, certification, count_votes
from ancer_jax.classifiers import Classifier, check_classifier, fingerprint
from ancer_jax.data import Dataset, batches, pixel_hashes, share, take
from ancer_jax.leakage import LeakageConfig, References, leakage, make_references
from ancer_jax.optimize import (
    THETA_MAX_FACTOR,
    AnisotropicConfig,
    Guard,
    IsotropicConfig,
    guarded_choice,
    optimize_anisotropic,
    optimize_isotropic,
)
from ancer_jax.regions import Region
from ancer_jax.runs import RESULTS, Run, open_run

Method = Literal["fixed", "isotropic", "ancer"]


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that changes the results of a run (semantic settings).

    Attributes:
      norm: "l2" (Gaussian noise) or "l1" (uniform noise).
      method: "fixed" theta, "isotropic" theta per input, or "ancer": isotropic, then one theta per coordinate.
      theta: the fixed noise parameter, or where the search starts: standard deviation (l2) or half-width (l1).
      certify, isotropic, anisotropic: settings of the stages. `theta_max=None` means 4 times `theta` in both searches.
      guard, guard_samples: the guarded choice between isotropic and anisotropic theta (`optimize.guarded_choice`).
      leakage: how the leakage of data-dependent noise is measured; None is not at all.
      leakage_limit: with a limit, a theta that leaks more is not taken: the anisotropic one gives way to the isotropic
        one, and that to `theta`.
      seed: of all draws, in [0, 2^31).

    Raises:
      ValueError: if a setting is out of range.
    """

    norm: Literal["l2", "l1"] = "l2"
    method: Method = "fixed"
    theta: float = 0.25
    certify: CertifyConfig = CertifyConfig()
    isotropic: IsotropicConfig = IsotropicConfig()
    anisotropic: AnisotropicConfig = AnisotropicConfig()
    guard: Guard = "volume"
    guard_samples: int = 1000
    leakage: LeakageConfig | None = LeakageConfig()
    leakage_limit: float | None = None
    seed: int = 0

    def __post_init__(self):
        for name, choices in (("norm", tuple(CERTIFICATES)), ("method", get_args(Method)), ("guard", get_args(Guard))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if not np.finfo(np.float32).tiny <= self.theta <= np.finfo(np.float32).max:
            raise ValueError(f"theta must be positive and finite as float32, got {self.theta}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be an int in 0..2^31 - 1, got {self.seed!r}")
        if self.guard_samples < 1:
            raise ValueError(f"guard_samples must be at least 1, got {self.guard_samples}")
        for name in ("isotropic", "anisotropic"):
            search = getattr(self, name)
            if search.theta_max is None:
                search = dataclasses.replace(search, theta_max=THETA_MAX_FACTOR * self.theta)
                object.__setattr__(self, name, search)
            if search.theta_max < self.theta:
                raise ValueError(f"theta_max must be at least theta = {self.theta}, got {search.theta_max}")
        if self.leakage_limit is not None and not 0 <= self.leakage_limit <= 1:
            raise ValueError(f"leakage_limit must be in [0, 1], got {self.leakage_limit}")
        if self.leakage_limit is not None and not self.data_dependent:
            raise ValueError("leakage_limit is for methods that search theta, isotropic and ancer")
        penalty = max(self.isotropic.leakage_weight, self.anisotropic.leakage_weight)
        if self.leakage is None and (penalty > 0 or self.leakage_limit is not None):
            raise ValueError("a leakage weight or limit needs leakage to be measured, got leakage = None")

    @property
    def data_dependent(self) -> bool:
        """Whether every input has a theta of its own."""
        return self.method != "fixed"

    def settings(self) -> dict[str, Any]:
        """What is hashed into the run: the settings that the method uses."""
        stages = {"fixed": (), "isotropic": ("isotropic",), "ancer": ("isotropic", "anisotropic")}[self.method]
        used = ["norm", "method", "theta", "certify", *stages, "seed"]
        used += ["guard", "guard_samples"] if self.method == "ancer" else []
        used += ["leakage", "leakage_limit"] if self.data_dependent else []
        values = dataclasses.asdict(self)
        return {name: values[name] for name in used}


@dataclasses.dataclass(frozen=True)
class Execution:
    """Settings that change speed and memory only: no draw, no count.

    Attributes:
      batch_size: images at a time (rounded up to a multiple of the devices, if these split the images).
      chunk: noisy copies of each image at a time in certification, on each device.
      devices: how many local devices; None is all of them.
      split: what the devices share: "images", for throughput, or the "draws" of each image in certification, where
        images are large and few; theta is then searched on every device alike.
    """

    batch_size: int = 10
    chunk: int = 100
    devices: int | None = None
    split: Literal["images", "draws"] = "images"

    def __post_init__(self):
        if self.split not in ("images", "draws"):
            raise ValueError(f"split must be images or draws, got {self.split!r}")
        for name in ("batch_size", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def certify_dataset(
    classifier: Classifier,
    dataset: Dataset,
    config: RunConfig,
    *,
    out: epath.PathLike,
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
      execution: how to compute it.
      reconcile: with method "isotropic" or "ancer", whether all finished images of the run go through a memory, in
        order of ids, at the end. It writes `memory.npz` and `results_memory.tsv`. A memory that these images do not
        continue (lower ids came in, or it was saved there by hand) is kept under another name, with a warning.
      progress: called after each batch with the number of images that were finished.
      reconciled: called with the number of images that went through the memory since the last call.

    Returns:
      Path of `results.tsv`, which is written when all processes have finished.

    Guarantee: each line's region is certified as in `certification.certify`, with error probability `alpha` per
    image. With method "isotropic" or "ancer" each line of `results.tsv` speaks of its own smoothed classifier, that of
    the theta found for this image; the lines of `results_memory.tsv` speak of one classifier, that with memory.

    Raises:
      ValueError: if the classifier or the data cannot be certified, or `out` holds something else.
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
    check_classifier(classifier, dataset.images[0])
    mesh = parallel.device_mesh(execution.devices)
    classifier = parallel.replicate(classifier, mesh)
    process = jax.process_index()
    mine = share(dataset, process_index=process, process_count=jax.process_count())
    with open_run(out, _settings(classifier, dataset, config), _made_with(), process=process) as run:
        done = run.done()
        todo = [] if mine is None else [row for row, i in enumerate(mine.ids) if int(i) not in done]
        progress(0 if mine is None else len(mine) - len(todo))
        if mine is not None and todo:
            _certify_images(run, classifier, take(mine, todo), config, execution, mesh, progress)
        if {*dataset.ids.tolist()} <= run.done():
            with run.exporting() as ours:  # not if another process has finished, too, and was first
                if ours and reconcile and config.data_dependent:
                    _reconcile(run, dataset.whole, CERTIFICATES[config.norm].norm, reconciled)
                if ours:
                    run.export()
        return run.path / RESULTS


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


def _references(classifier, dataset: Dataset, config: RunConfig, chunk: int, mesh) -> References | None:
    """The images on which leakage is measured, the same whatever part of the data set is certified."""
    if config.leakage is None or not config.data_dependent:
        return None
    count = min(config.leakage.num_references, len(dataset))
    rows = np.sort(np.random.default_rng(config.seed).choice(len(dataset), count, replace=False))
    images = parallel.replicate(dataset.images[rows], mesh)
    keys = _example_keys(config.seed, parallel.replicate(dataset.ids[rows].astype(np.uint32), mesh))
    theta = jnp.asarray(config.theta, images.dtype)
    settings = {"certificate": CERTIFICATES[config.norm], "num_samples": config.leakage.num_samples, "chunk": chunk}
    return _make_references(keys, classifier, images=images, theta=theta, **settings)


_make_references = jax.jit(make_references, static_argnames=("certificate", "num_samples", "chunk"))


def _certify_images(run: Run, classifier, dataset, config: RunConfig, execution: Execution, mesh, progress) -> None:
    """Certify and store batch after batch; the devices have the next one before the host looks at the last one."""
    by_images = execution.split == "images"
    devices = mesh.size if by_images else 1
    batch_size = math.ceil(min(execution.batch_size, len(dataset)) / devices) * devices
    place = functools.partial(parallel.split_rows if by_images else parallel.replicate, mesh=mesh)
    references = _references(classifier, dataset.whole, config, execution.chunk, mesh)
    ended = time.perf_counter()

    def computing():
        for batch in batches(dataset, batch_size):
            ids, images = place((batch["id"].astype(np.uint32), batch["image"]))
            yield batch, _compute(ids, classifier, images, references, config, execution, mesh)
        yield {}, ()

    for (batch, computed), _ in itertools.pairwise(computing()):  # the next one is computing already
        _store(run, batch, computed, config, ended)
        ended = time.perf_counter()
        progress(int(batch["mask"].sum()))


def _compute(ids, classifier, images, references, config: RunConfig, execution: Execution, mesh):
    """theta, selected class, its count, leaked and asked references of each image, on the devices: nothing waits."""
    certificate, chunk = CERTIFICATES[config.norm], execution.chunk
    keys = _example_keys(config.seed, ids)
    theta = _find_theta(keys, classifier, images, references, config=config, chunk=chunk)
    how = {"certificate": certificate, "config": config.certify, "chunk": chunk}
    if execution.split == "draws":
        selected, count = _count_by_draws(keys, classifier, images, theta, mesh=mesh, **how)
    else:
        selected, count = _count(keys, classifier, images, theta, **how)
    leaked = asked = np.zeros(len(ids), np.int32)
    if references is not None and config.leakage is not None:
        how = {"certificate": certificate, "num_samples": config.leakage.num_samples, "chunk": chunk}
        leaked, asked = _measure_leakage(references, classifier, images, theta, selected, **how)
    return theta, selected, count, leaked, asked


def _store(run: Run, batch, computed, config: RunConfig, began: float) -> None:
    """The host's part of a batch: certificates from integers, and its shard."""
    theta, selected, count, leaked, asked = map(np.asarray, computed)
    seconds, mask = time.perf_counter() - began, batch["mask"]
    result = certification(selected, count, certificate=CERTIFICATES[config.norm], config=config.certify)
    answered = result.prediction != ABSTAIN  # nothing can leak to an abstention
    run.write_shard(
        {
            "ids": batch["id"][mask],
            "labels": batch["label"][mask],
            "pixels": pixel_hashes(batch["image"][mask]),
            "predictions": result.prediction[mask],
            "counts": result.count[mask],
            "p_lower": result.p_lower[mask],
            "gap": result.gap[mask],
            "theta": theta[mask],
            "leaked": (leaked * answered)[mask],
            "references": (asked * answered)[mask],
            "seconds": np.full(mask.sum(), seconds / mask.sum()),
        }
    )


@jax.jit
def _example_keys(seed, ids):
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)


@functools.partial(jax.jit, static_argnames=("config", "chunk"))
def _find_theta(keys, classifier, images, references, *, config: RunConfig, chunk: int):
    """theta of each image: [batch] for fixed and isotropic, [batch, *d] for ancer."""
    certificate = CERTIFICATES[config.norm]
    theta = jnp.full(len(images), config.theta, images.dtype)

    def per_image(key, x, theta):
        if config.method == "fixed":
            return theta
        arguments = key, classifier, certificate, x
        choose = functools.partial(
            guarded_choice,
            num_samples=config.guard_samples,
            alpha=config.certify.alpha,
            chunk=chunk,
            references=references,
            leakage_limit=config.leakage_limit,
            leakage_samples=config.leakage.num_samples if config.leakage else 1,
        )
        wider, _ = optimize_isotropic(*arguments, theta, config=config.isotropic, references=references)
        chosen, _ = choose(*arguments, theta, wider, guard="off")
        theta = chosen.reshape(-1)[0]  # all coordinates are one number
        if config.method == "isotropic":
            return theta
        wider, _ = optimize_anisotropic(*arguments, theta, config=config.anisotropic, references=references)
        theta, _ = choose(*arguments, theta, wider, guard=config.guard)
        return theta

    return jax.vmap(per_image)(keys, images, theta)


@functools.partial(jax.jit, static_argnames=("certificate", "config", "chunk"))
def _count(keys, classifier, images, theta, *, certificate, config, chunk):
    votes = functools.partial(count_votes, config=config, chunk=chunk)
    one = lambda key, x, theta: votes(key, classifier, certificate, x, jnp.broadcast_to(theta, x.shape))
    return jax.vmap(one)(keys, images, theta)


@functools.partial(jax.jit, static_argnames=("certificate", "config", "chunk", "mesh"))
def _count_by_draws(keys, classifier, images, theta, *, certificate, config, chunk, mesh):
    """`_count`, with the draws of each image shared out over the devices and one integer sum at the end."""
    votes = functools.partial(count_votes, config=config, chunk=chunk, axis_name=mesh.axis_names[0])
    one = lambda key, x, theta: votes(key, classifier, certificate, x, jnp.broadcast_to(theta, x.shape))
    everywhere = PartitionSpec()
    return jax.shard_map(jax.vmap(one), mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)(
        keys, images, theta
    )


@functools.partial(jax.jit, static_argnames=("certificate", "num_samples", "chunk"))
def _measure_leakage(references, classifier, images, theta, predictions, *, certificate, num_samples, chunk):
    measure = functools.partial(leakage, references, classifier, certificate, num_samples=num_samples, chunk=chunk)
    return jax.vmap(measure)(images, theta, predictions)


def _settings(classifier, dataset, config) -> dict[str, Any]:
    return config.settings() | {
        "classifier": fingerprint(classifier, dataset.images[0]),
        "data": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "image_shape": list(dataset.images.shape[1:]),
            "num_classes": dataset.num_classes,
        },
    }


def _made_with() -> dict[str, str]:
    device = jax.local_devices()[0]
    names = ("ancer-jax", "jax", "jaxlib", "flax", "optax", "numpy", "scipy")
    versions = {name: importlib.metadata.version(name) for name in names}
    return versions | {"python": platform.python_version(), "device": device.device_kind, "platform": device.platform}
