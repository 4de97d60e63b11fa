"""The main job: for every image of a data set find theta, certify, and store the result in a run directory."""

import dataclasses
import functools
import importlib.metadata
import math
import platform
import time
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ancer_jax import parallel
from ancer_jax.certificates import CERTIFICATES
from ancer_jax.certification import CertifyConfig, certification, count_votes
from ancer_jax.classifiers import Classifier, check_classifier, fingerprint
from ancer_jax.data import Dataset, batches, take
from ancer_jax.optimize import (
    THETA_MAX_FACTOR,
    AnisotropicConfig,
    Guard,
    IsotropicConfig,
    guarded_choice,
    optimize_anisotropic,
    optimize_isotropic,
)
from ancer_jax.runs import Run, open_run

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
    seed: int = 0

    def __post_init__(self):
        for name, choices in (("norm", tuple(CERTIFICATES)), ("method", get_args(Method)), ("guard", get_args(Guard))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if not np.finfo(np.float32).tiny <= self.theta <= np.finfo(np.float32).max:
            raise ValueError(f"theta must be positive and finite as float32, got {self.theta}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be in 0..2^31 - 1, got {self.seed}")
        if self.guard_samples < 1:
            raise ValueError(f"guard_samples must be at least 1, got {self.guard_samples}")
        for name in ("isotropic", "anisotropic"):
            search = getattr(self, name)
            if search.theta_max is None:
                search = dataclasses.replace(search, theta_max=THETA_MAX_FACTOR * self.theta)
                object.__setattr__(self, name, search)
            if search.theta_max < self.theta:
                raise ValueError(f"theta_max must be at least theta = {self.theta}, got {search.theta_max}")

    def settings(self) -> dict[str, Any]:
        """What is hashed into the run: the settings that the method uses."""
        stages = {"fixed": (), "isotropic": ("isotropic",), "ancer": ("isotropic", "anisotropic")}[self.method]
        used = ["norm", "method", "theta", "certify", *stages, "seed"]
        used += ["guard", "guard_samples"] if self.method == "ancer" else []
        values = dataclasses.asdict(self)
        return {name: values[name] for name in used}


@dataclasses.dataclass(frozen=True)
class Execution:
    """Settings that change speed and memory only: no draw, no count.

    Attributes:
      batch_size: images at a time (rounded up to a multiple of the devices).
      chunk: noisy copies of each image at a time in certification.
      devices: how many local devices; None is all of them.
    """

    batch_size: int = 10
    chunk: int = 100
    devices: int | None = None

    def __post_init__(self):
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
    progress: Callable[[int], object] = lambda images: None,
) -> epath.Path:
    """Certify every image of `dataset` into the run directory `out`, continuing what is there.

    Args:
      classifier: base classifier; checked first (`classifiers.check_classifier`).
      dataset: images in [0, 1] with labels.
      config: what to compute.
      out: run directory, new or unfinished. More images may be added to a run, other settings may not.
      execution: how to compute it.
      progress: called after each batch with the number of images that were finished.

    Returns:
      Path of `results.tsv`.

    Guarantee: each line's region is certified as in `certification.certify`, with error probability `alpha` per
    image. With method "isotropic" or "ancer" each line speaks of its own smoothed classifier, that of the theta found
    for this image; they are not yet reconciled into one classifier.

    Raises:
      ValueError: if the classifier or the data cannot be certified, or `out` holds something else.
      OSError: if `out` cannot be written.
    """
    if dataset.num_classes > classifier.num_classes:
        raise ValueError(
            f"{dataset.name} has {dataset.num_classes} classes, the classifier only {classifier.num_classes}"
        )
    check_classifier(classifier, dataset.images[0])
    mesh = parallel.device_mesh(execution.devices)
    batch_size = math.ceil(min(execution.batch_size, len(dataset)) / mesh.size) * mesh.size
    classifier = parallel.replicate(classifier, mesh)
    with open_run(out, _settings(classifier, dataset, config), _made_with()) as run:
        done = run.done()
        progress(sum(int(i) in done for i in dataset.ids))
        todo = [row for row, i in enumerate(dataset.ids) if int(i) not in done]
        if todo:
            for batch in batches(take(dataset, todo), batch_size):
                _certify_batch(run, classifier, batch, config, execution, mesh)
                progress(int(batch["mask"].sum()))
        return run.export()


def _certify_batch(run: Run, classifier, batch, config: RunConfig, execution: Execution, mesh) -> None:
    start = time.perf_counter()
    certificate = CERTIFICATES[config.norm]
    mask = batch["mask"]
    ids, images = parallel.split_rows((batch["id"].astype(np.uint32), batch["image"]), mesh)
    keys = _example_keys(config.seed, ids)
    theta = _find_theta(keys, classifier, images, config=config, chunk=execution.chunk)
    selected, count = _count(
        keys, classifier, images, theta, certificate=certificate, config=config.certify, chunk=execution.chunk
    )
    result = certification(selected, count, certificate=certificate, config=config.certify)
    theta = np.asarray(theta)
    seconds = time.perf_counter() - start
    run.write_shard(
        {
            "ids": batch["id"][mask],
            "labels": batch["label"][mask],
            "predictions": result.prediction[mask],
            "counts": result.count[mask],
            "p_lower": result.p_lower[mask],
            "gap": result.gap[mask],
            "theta": theta[mask],
            "seconds": np.full(mask.sum(), seconds / mask.sum()),
        }
    )


@jax.jit
def _example_keys(seed, ids):
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)


@functools.partial(jax.jit, static_argnames=("config", "chunk"))
def _find_theta(keys, classifier, images, *, config: RunConfig, chunk: int):
    """theta of each image: [batch] for fixed and isotropic, [batch, *d] for ancer."""
    certificate = CERTIFICATES[config.norm]
    theta = jnp.full(len(images), config.theta, images.dtype)

    def per_image(key, x, theta):
        if config.method == "fixed":
            return theta
        theta, _ = optimize_isotropic(key, classifier, certificate, x, theta, config=config.isotropic)
        if config.method == "isotropic":
            return theta
        wider, _ = optimize_anisotropic(key, classifier, certificate, x, theta, config=config.anisotropic)
        theta, _ = guarded_choice(
            key,
            classifier,
            certificate,
            x,
            theta,
            wider,
            guard=config.guard,
            num_samples=config.guard_samples,
            alpha=config.certify.alpha,
            chunk=chunk,
        )
        return theta

    return jax.vmap(per_image)(keys, images, theta)


@functools.partial(jax.jit, static_argnames=("certificate", "config", "chunk"))
def _count(keys, classifier, images, theta, *, certificate, config, chunk):
    votes = functools.partial(count_votes, config=config, chunk=chunk)
    theta = theta.reshape(theta.shape + (1,) * (images.ndim - theta.ndim))
    one = lambda key, x, theta: votes(key, classifier, certificate, x, jnp.broadcast_to(theta, x.shape))
    return jax.vmap(one)(keys, images, theta)


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
