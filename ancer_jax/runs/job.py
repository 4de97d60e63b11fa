"""One run's work on the devices.

`Job.launch` finds the thetas of a batch and sends its draws to the devices. `Job.collect` waits for the votes
(sequential sampling takes most of its draws there) and makes the certificates.

Where theta is decided: in `_find_theta` for the methods isotropic and ancer, one for each image; in `pipeline._start`
for fixed and universal, one for all.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ancer_jax import devices
from ancer_jax.data import Dataset
from ancer_jax.runs.config import Execution, RunConfig, Shard
from ancer_jax.runs.votes import Launch, Program, VoteCounter
from ancer_jax.search.ascent import optimize_anisotropic, optimize_isotropic
from ancer_jax.search.guard import guarded_choice
from ancer_jax.search.leakage import LeakageCounts, Probes, ProbeSets, leakage, smoothed_classes, soft_leakage
from ancer_jax.smoothing.certificate import (
    Certificate,
    Evidence,
    certificate_from_evidence,
    enumerated_evidence,
    random_evidence,
    votes_of,
)
from ancer_jax.smoothing.classifier import Classifier
from ancer_jax.smoothing.noise import Noise
from ancer_jax.smoothing.sequential import UNIT, certificate_from_sequential, sample_until_decided, scales_of
from ancer_jax.smoothing.smoothed import Smoothed, Stage

# Where nothing is asked for and memory allows it: images for each device, and noisy copies of each image at a time on a
# CPU, or of all images at a time on each accelerator.
_IMAGES_ON_CPU, _CHUNK_ON_CPU = 10, 100
_IMAGES, _COPIES = 32, 4096
# Launches of sequential sampling have all work items, a quarter or a sixteenth of them.
PARTS = (1, 4, 16)


class Pending(NamedTuple):
    """A batch whose votes are being counted.

    Attributes:
      batch: from `data.batches`: id, image, label and mask [batch].
      indices: of the images in the batch that are not padding.
      theta: on the host; [batch] for fixed and isotropic, [batch, *d] for universal and ancer.
      leakage: what was counted for the leakage of each image; zeros where it is not measured.
      counter: the vote counter.
      selection: launches of the draws that select the class; of enumerable noise, of all draws there are.
      estimation: launches of the draws of the certificate; none where sampling is sequential or the noise enumerable.
    """

    batch: Mapping[str, np.ndarray]
    indices: np.ndarray
    theta: np.ndarray
    leakage: LeakageCounts
    counter: VoteCounter
    selection: list[Launch]
    estimation: list[Launch]


class Collected(NamedTuple):
    """The results of a batch, without its padding: columns on the host.

    Attributes:
      certificate, evidence: of each image.
      draws: all that an image took, those that selected the class and those of a pilot included.
      passes: noisy copies that the network classified for the certificates of the batch.
      leakage: what was counted for the leakage of each image.
    """

    certificate: Certificate
    evidence: Evidence
    draws: np.ndarray
    passes: int
    leakage: LeakageCounts


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that one run computes with (`make_job`).

    Attributes:
      classifier: base classifier, on all devices of the mesh.
      config: the settings of the run.
      start: theta of all images, [] or [*d], or where its search starts.
      probes: leakage probes; None if leakage is not measured.
      mesh: the devices.
      shard: what they share in searches and leakage.
      chunk: noisy copies of each image at a time.
    """

    classifier: Classifier
    config: RunConfig
    start: np.ndarray
    probes: ProbeSets | None
    mesh: Mesh
    shard: Shard
    chunk: int

    def launch(self, batch: Mapping[str, np.ndarray]) -> Pending:
        """Find the theta of each image of a batch, and launch the counting of its votes.

        Waits only for the search of theta and, if leakage is measured, for the selected classes.
        """
        config, noise = self.config, self.config.certified_noise
        indices = np.flatnonzero(batch["mask"])
        noise.check_inputs(batch["image"], batch["id"])
        ids, images = batch["id"].astype(np.uint32), batch["image"]
        theta = self.starting_thetas(len(ids))
        if config.data_dependent:
            theta = np.asarray(self.search_program(ids, images).run())
        counter = self.vote_counter(ids, images, theta)
        if noise.enumerable:
            selection, estimation = counter.launch(Stage.ESTIMATE, indices, 0, _num_draws(noise, theta)[indices]), []
        else:
            selection = counter.launch(Stage.SELECT, indices, 0, config.certify.n0)
            estimation = [] if config.sampling else counter.launch(Stage.ESTIMATE, indices, 0, config.certify.n)
        leaked = LeakageCounts(*(np.zeros(len(ids), np.int32) for _ in LeakageCounts._fields))
        if self.probes is not None:
            predictions = counter.collect(selection).argmax(axis=1).astype(np.int32)
            leaked = self.leakage_program(images, theta, predictions).run()
        return Pending(batch, indices, theta, leaked, counter, selection, estimation)

    def collect(self, pending: Pending) -> Collected:
        """Wait for the votes of a batch, and make its certificates from them."""
        config, noise, indices = self.config, self.config.certified_noise, pending.indices
        votes = pending.counter.collect(pending.selection)[indices]
        theta, images = pending.theta[indices], pending.batch["image"][indices]
        smoothed = Smoothed(self.classifier, noise, theta)
        leaked = LeakageCounts(*(np.asarray(column)[indices] for column in pending.leakage))
        passes = sum(launch.passes for launch in (*pending.selection, *pending.estimation))
        if noise.enumerable:
            selected, evidence = enumerated_evidence(votes, _num_draws(noise, theta))
            certificate = certificate_from_evidence(selected, evidence, smoothed, images, alpha=config.alpha)
            return Collected(certificate, evidence, evidence.n, passes, leaked)
        selected = votes.argmax(axis=1).astype(np.int32)
        if config.sampling is None:
            counts, certify = pending.counter.collect(pending.estimation)[indices], config.certify
            votes, runner_up = votes_of(counts, selected, certify.n, certify.bound)
            evidence = random_evidence(votes, certify, runner_up)
            certificate = certificate_from_evidence(selected, evidence, smoothed, images, alpha=config.alpha)
            return Collected(certificate, evidence, config.certify.n0 + evidence.n, passes, leaked)

        def votes_in(stage, some, first, stop):
            nonlocal passes
            launches = pending.counter.launch(stage, indices[some], first, stop)
            passes += sum(launch.passes for launch in launches)
            return pending.counter.collect(launches)[indices[some]]

        found = sample_until_decided(
            votes_in, selected, scales_of(theta), noise=noise, config=config.certify, sequential=config.sampling
        )
        certificate = certificate_from_sequential(selected, found, smoothed, images, alpha=config.alpha)
        draws = config.certify.n0 + found.pilot + found.n
        return Collected(certificate, found.evidence, draws, passes, leaked)

    def with_probes(self, dataset: Dataset) -> "Job":
        """The job with leakage probes chosen from a data set by the seed, if leakage is measured.

        They should come from the whole of the data set, whatever part of it is certified.
        """
        config, mesh, settings = self.config, self.mesh, self.config.leakage
        if settings is None or not config.data_dependent:
            return self
        chunk, start = min(self.chunk, _CHUNK_ON_CPU), np.float32(config.theta)
        count, rng = min(settings.num_probes, len(dataset)), np.random.default_rng(config.seed)
        in_search = rng.choice(len(dataset), count, replace=False)
        others = np.setdiff1d(np.arange(len(dataset)), in_search)
        held_out = rng.choice(others, min(count, len(others)), replace=False)

        def probes(rows: np.ndarray) -> Probes:
            rows = np.sort(rows)
            ids, images = dataset.ids[rows].astype(np.uint32), dataset.images[rows]
            filled = np.resize(np.arange(len(rows)), math.ceil(len(rows) / mesh.size) * mesh.size)
            sharded = devices.shard_rows((ids[filled], images[filled]), mesh)
            classes = np.asarray(_classes(*sharded, self.classifier, start, config=config, chunk=chunk, mesh=mesh))
            ids, images, classes = devices.replicate((ids, images, classes[: len(rows)]), mesh)
            return Probes(example_keys(config.seed, ids), images, classes, settings.num_samples)

        found = ProbeSets(probes(in_search), probes(held_out) if len(held_out) else None)
        return dataclasses.replace(self, probes=found)

    def starting_thetas(self, count: int) -> np.ndarray:
        """The starting theta, once for each of `count` images."""
        return np.repeat(self.start[None], count, axis=0)

    def search_program(self, ids: np.ndarray, images: np.ndarray) -> Program:
        """The program that finds the theta of each image."""
        in_search = None if self.probes is None else self.probes.in_search
        return self._program(_find_theta, (ids, images, self.starting_thetas(len(ids))), in_search)

    def leakage_program(self, images: np.ndarray, theta: np.ndarray, predictions: np.ndarray) -> Program:
        """The program that counts for the leakage of each image, of its theta and class."""
        return self._program(_measure_leakage, (images, theta, predictions), self.probes)

    def _program(self, function: Any, of_images: tuple[np.ndarray, ...], probes: Probes | ProbeSets | None) -> Program:
        """A program on arrays with an entry for each image, which shards the images or the draws."""
        place, classifier = devices.shard_rows, self.classifier
        if self.shard == "draws":
            place, classifier = devices.replicate, devices.shard_classifier(classifier, self.mesh)
        static = {"config": self.config, "shard": self.shard, "chunk": self.chunk, "mesh": self.mesh}
        return Program(function, (*place(of_images, self.mesh), classifier, probes), static)

    def vote_counter(self, ids: np.ndarray, images: np.ndarray, theta: np.ndarray) -> VoteCounter:
        """The vote counter of a batch."""
        config, chunk, per_image = self.config, self.chunk, 1
        if config.sampling is not None and chunk > UNIT:
            per_image, chunk = chunk // UNIT, UNIT  # sequential sampling draws multiples of UNIT: smaller items
        elif config.sampling is None and not config.enumerable:
            chunk = math.ceil(config.certify.n / math.ceil(config.certify.n / chunk))  # equal chunks: the last is full
        # Few images are left for the last looks of sequential sampling: smaller launches have fewer empty items.
        parts = (1,) if config.sampling is None else PARTS
        sizes = {math.ceil(len(ids) * per_image / part / self.mesh.size) * self.mesh.size for part in parts}
        on_all = devices.replicate((ids, images, theta), self.mesh)
        smoothed = Smoothed(self.classifier, config.certified_noise, on_all[2])
        return VoteCounter(
            example_keys(config.seed, on_all[0]), on_all[1], smoothed, chunk, tuple(sorted(sizes)), self.mesh
        )


def make_job(classifier: Classifier, config: RunConfig, start: np.ndarray, execution: Execution, mesh: Mesh) -> Job:
    """The job of a run, with the chunk that is asked for, or a usual one until `choose_batch` has chosen; to measure
    leakage it needs `Job.with_probes`.
    """
    chunk = execution.chunk or usual_chunk(mesh, usual_images(mesh) * mesh.size)
    return Job(classifier, config, start, None, mesh, execution.shard, chunk)


def usual_images(mesh: Mesh) -> int:
    """Images for each device, where nothing is asked for."""
    return _IMAGES_ON_CPU if devices.platform(mesh) == "cpu" else _IMAGES


def usual_chunk(mesh: Mesh, batch: int) -> int:
    """Noisy copies of each of `batch` images at a time, where nothing is asked for."""
    if devices.platform(mesh) == "cpu":
        return _CHUNK_ON_CPU
    return max(1, _COPIES // math.ceil(batch / mesh.size))


def _num_draws(noise: Noise, theta: np.ndarray) -> np.ndarray:
    """How many draws of enumerable noise there are for the theta of each image: int64 [batch]."""
    return np.array([noise.num_draws(one) for one in theta], np.int64)


@jax.jit
def example_keys(seed, ids):
    """The key of each example: `fold_in(key(seed), id)`."""
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)


@functools.partial(jax.jit, static_argnames=("config", "chunk", "mesh"))
def _classes(ids, images, classifier: Classifier, theta, *, config: RunConfig, chunk: int, mesh: Mesh):
    """The smoothed classes of images under the starting theta: int32 [m]."""
    settings, noise = config.leakage, config.certified_noise.for_search
    assert settings is not None

    def classes(keys, images, classifier, theta):
        smoothed = Smoothed(classifier, noise, theta)
        return smoothed_classes(keys, smoothed, images, num_samples=settings.num_samples, chunk=chunk)

    on_rows = devices.on_own_rows(classes, mesh, [True, True, False, False])
    return on_rows(example_keys(config.seed, ids), images, classifier, theta)


def _for_each(function: Callable[..., Any], shard: Shard, mesh: Mesh) -> Callable[..., Any]:
    """`function` of one image, over a batch: three arguments have an entry for each image, two are the same for all.

    Each device does it for its images; or all devices do it together, for one image after another.
    """
    if shard == "images":
        on_each = jax.vmap(function, (0, 0, 0, None, None))
        return devices.on_own_rows(on_each, mesh, [True, True, True, False, False])
    return lambda *arguments: jax.lax.map(lambda one: function(*one, *arguments[3:]), arguments[:3])


@functools.partial(jax.jit, static_argnames=("config", "shard", "chunk", "mesh"))
def _find_theta(ids, images, theta, classifier, probes, *, config: RunConfig, shard: Shard, chunk: int, mesh: Mesh):
    """theta of each image, found from the one given: [batch] for isotropic, [batch, *d] for ancer."""
    noise = config.certified_noise

    def per_image(key, x, theta, classifier, probes: Probes | None):
        smoothed = Smoothed(classifier, noise.for_search, theta)
        theta, _ = optimize_isotropic(key, smoothed, x, config=config.isotropic, probes=probes)
        if config.leakage_limit is not None:
            guard = config.guard_config(anisotropic=False, chunk=chunk)
            chosen, _ = guarded_choice(key, smoothed, x, theta, config=guard, probes=probes)
            theta = chosen.reshape(-1)[0]  # all coordinates are one number
        if config.method == "ancer":
            smoothed = smoothed.with_theta(theta)
            found, _ = optimize_anisotropic(key, smoothed, x, config=config.anisotropic, probes=probes)
            guard = config.guard_config(anisotropic=True, chunk=chunk)
            theta, _ = guarded_choice(key, smoothed, x, found, config=guard, probes=probes)
        return noise.admissible(theta)

    of_all = _for_each(per_image, shard, mesh)
    return of_all(example_keys(config.seed, ids), images, theta, classifier, probes)


@functools.partial(jax.jit, static_argnames=("config", "shard", "chunk", "mesh"))
def _measure_leakage(
    images, theta, predictions, classifier, probes, *, config: RunConfig, shard: Shard, chunk: int, mesh: Mesh
) -> LeakageCounts:
    """What is counted for the leakage of each image: int32 [batch] each."""
    settings, noise = config.leakage, config.certified_noise.for_search
    assert settings is not None

    def per_image(x, theta, prediction, classifier, probes: ProbeSets) -> LeakageCounts:
        smoothed = Smoothed(classifier, noise, theta)
        counted = leakage(probes.in_search, smoothed, x, prediction, chunk=chunk)
        if probes.held_out is None:
            return LeakageCounts(*counted, jnp.int32(0), jnp.int32(0))
        samples = settings.held_out_samples
        votes = soft_leakage(probes.held_out, smoothed, x, prediction, num_samples=samples, chunk=chunk)
        return LeakageCounts(*counted, *votes)

    of_all = _for_each(per_image, shard, mesh)
    return of_all(images, theta, predictions, classifier, probes)
