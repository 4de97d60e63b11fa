"""A batch of images on the devices: theta, votes and leakage of each; and how large a batch their memory can take."""

import functools
import math
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ancer_jax import counting, parallel
from ancer_jax.certificates import SplittingL1
from ancer_jax.certification import Certification, Evidence, all_draws, certification_from, exact_evidence
from ancer_jax.classifiers import Classifier
from ancer_jax.config import Execution, RunConfig, Split
from ancer_jax.data import Dataset
from ancer_jax.leakage import LeakageConfig, Leaked, Probes, References, leakage, reference_classes, vote_leakage
from ancer_jax.optimize import guarded_choice, optimize_anisotropic, optimize_isotropic
from ancer_jax.sequential import estimate, scales_of
from ancer_jax.smoothing import Stage

# Images for each device, and noisy copies of each: what is usual where nothing is asked for and memory allows it.
_USUAL, _USUAL_ON_CPU = (32, 128), (10, 100)
_SHARE = 0.9  # of a device's memory that a program may plan with


class Computed(NamedTuple):
    """A batch's results: an entry for each image, on the host, and votes that are still being counted.

    Attributes:
      theta: [batch] for fixed and isotropic, [batch, *d] for shared and ancer.
      leaked: what was counted for its leakage; zeros where it is not measured.
      votes: what counts the votes.
      selection: the draws that select the class, being counted; for exact certificates those of the certificate.
      estimation: the draws of the certificate, being counted; None where sampling is sequential.
    """

    theta: np.ndarray
    leaked: Leaked
    votes: counting.Votes
    selection: list
    estimation: list | None

    @property
    def selected(self) -> np.ndarray:
        """The selected class of each image, of exact certificates the top one; waits for its votes."""
        return self.votes.end(self.selection).argmax(axis=1).astype(np.int32)


def compute(
    ids: np.ndarray,
    classifier: Classifier,
    images: np.ndarray,
    start: np.ndarray,
    probes: Probes | None,
    config: RunConfig,
    *,
    rows: np.ndarray,
    split: Split,
    chunk: int,
    mesh: Mesh,
) -> Computed:
    """Start a batch on the devices, from the theta of all images, [] or [*d].

    The host waits for the search of theta and for the selected class, if its leakage is measured; the devices have the
    votes of the certificate to count meanwhile. Votes are counted for the images `rows` of the batch; the others fill
    it up.
    """
    theta = np.repeat(start[None], len(ids), axis=0)
    on_all = parallel.replicate((ids, images), mesh)
    batch = parallel.split_rows((ids, images), mesh) if split == "images" and config.data_dependent else on_all
    shared = _shared(classifier, split, mesh)
    how = {"split": split, "chunk": chunk, "mesh": mesh}
    if config.data_dependent:
        found = _find_theta(*batch, shared, place(theta, split, mesh), _references(probes), config=config, **how)
        theta = np.asarray(found)
    keys = _example_keys(config.seed, on_all[0])
    votes = counting.Votes(keys, classifier, on_all[1], parallel.replicate(theta, mesh), config, chunk=chunk, mesh=mesh)
    begin = lambda stage, n: votes.begin(stage, rows, np.zeros_like(rows), np.broadcast_to(n, rows.shape))
    if config.exact:
        selection = estimation = begin(Stage.ESTIMATE, _num_draws(theta)[rows])
    else:
        selection = begin(Stage.SELECT, config.certify.n0)
        estimation = None if config.sampling else begin(Stage.ESTIMATE, config.certify.n)
    computed = Computed(theta, Leaked(*(np.zeros(len(ids), np.int32),) * 4), votes, selection, estimation)
    if probes is None or config.leakage is None:
        return computed
    measured = place((theta, computed.selected), split, mesh)
    leaked = _measure_leakage(probes, shared, batch[1], *measured, config=config, **how)
    return computed._replace(leaked=leaked)


def certificates(computed: Computed, rows: np.ndarray, config: RunConfig) -> tuple[Certification, Evidence, np.ndarray]:
    """Certificates of the images `rows` of a batch, their evidence, and how many draws each took in all."""
    n0 = config.certify.n0
    if config.exact:
        selected, evidence = exact_evidence(
            computed.votes.end(computed.estimation or [])[rows], _num_draws(computed.theta)[rows]
        )
        return certification_from(selected, evidence, config.counted), evidence, evidence.n
    selected = computed.selected[rows]
    if config.sampling is None:
        votes = computed.votes.end(computed.estimation or [])[rows, selected]
        evidence = all_draws(votes, config.certify)
        return certification_from(selected, evidence, config.certificate), evidence, n0 + evidence.n

    def draw(stage, some, first, stop):
        return computed.votes(stage, rows[some], first, stop)[np.arange(len(some)), selected[some]]

    found = estimate(
        draw,
        selected,
        scales_of(computed.theta[rows]),
        certificate=config.certificate,
        config=config.certify,
        sequential=config.sampling,
    )
    return found.certification, found.evidence, n0 + found.pilot + found.certification.n


def find_probes(
    classifier: Classifier, dataset: Dataset, config: RunConfig, execution: Execution, mesh: Mesh
) -> Probes | None:
    """The images on which leakage is measured, the same whatever part of the data is certified; None if it is not."""
    if config.leakage is None or not config.data_dependent:
        return None
    count, rng = min(config.leakage.num_references, len(dataset)), np.random.default_rng(config.seed)
    rows = rng.choice(len(dataset), count, replace=False)
    others = np.setdiff1d(np.arange(len(dataset)), rows)
    held_out = rng.choice(others, min(count, len(others)), replace=False)

    def references(rows):
        if not len(rows):
            return None
        rows = np.sort(rows)
        padded = np.resize(rows, math.ceil(len(rows) / mesh.size) * mesh.size)
        spread = parallel.split_rows((dataset.ids[padded].astype(np.uint32), dataset.images[padded]), mesh)
        classes = _classes(*spread, classifier, np.float32(config.theta), config=config, chunk=chunk, mesh=mesh)
        ids, images = parallel.replicate((dataset.ids[rows].astype(np.uint32), dataset.images[rows]), mesh)
        return References(
            _example_keys(config.seed, ids), images, parallel.replicate(np.asarray(classes)[: len(rows)], mesh)
        )

    chunk = min(execution.chunk or _USUAL_ON_CPU[1], _USUAL_ON_CPU[1])
    found = references(rows)
    return None if found is None else Probes(found, references(held_out))


def _references(probes: Probes | None) -> References | None:
    return None if probes is None else probes.references


def place(tree, split: Split, mesh: Mesh):
    """Arrays of a batch on the devices that share its images, or its draws: their rows shared out, or all on each."""
    return (parallel.split_rows if split == "images" else parallel.replicate)(tree, mesh)


def fit(
    classifier: Classifier,
    dataset: Dataset,
    start: np.ndarray,
    probes: Probes | None,
    config: RunConfig,
    execution: Execution,
    mesh: Mesh,
) -> tuple[int, int]:
    """Batch size and chunk: what is asked for, else what is usual, or less where the devices' memory is short.

    What a batch needs is read from its compiled programs, which are then those that run. The batch size is a multiple
    of the devices that share the images, and no larger than the data need; one that is not asked for makes all batches
    of one size, so that no device waits for a last one that is nearly empty.
    """
    devices = mesh.size if execution.split == "images" else 1
    usual = _USUAL_ON_CPU if mesh.devices.flat[0].platform == "cpu" else _USUAL
    per_device, chunk = usual[0], execution.chunk or usual[1]
    while True:
        even = math.ceil(len(dataset) / math.ceil(len(dataset) / per_device / devices))
        batch = math.ceil(min(execution.batch_size or even, len(dataset)) / devices) * devices
        if execution.batch_size and execution.chunk:
            return batch, chunk
        budget = int(_SHARE * parallel.free_memory(mesh))
        how = {"split": execution.split, "chunk": chunk, "mesh": mesh}
        search, count = _needed_memory(batch, classifier, dataset, start, probes, config, **how)
        if max(search, count) <= budget:
            return batch, chunk
        if count > budget and chunk > 1 and not execution.chunk:
            chunk = _shrunk(chunk, count, budget)
        elif batch > devices and not execution.batch_size:
            per_device = _shrunk(batch // devices, max(search, count), budget)
        else:
            warnings.warn(
                f"a batch of {batch} images needs {max(search, count) / 2**20:,.0f} MiB on each device, and "
                f"{budget / 2**20:,.0f} are left: searches with fewer samples need less",
                stacklevel=4,
            )
            return batch, chunk


def _shrunk(size: int, needed: int, budget: int) -> int:
    return max(1, min(size * 3 // 4, size * budget // needed))


def _needed_memory(batch, classifier, dataset, start, probes, config, *, split, chunk, mesh) -> tuple[int, int]:
    """Bytes on one device for the search for theta, and for the counting of votes; by their compiled programs."""
    ids, images = np.zeros(batch, np.uint32), np.repeat(dataset.images[:1], batch, axis=0)
    theta, search, leakage = np.repeat(start[None], batch, axis=0), 0, 0
    shared, how = _shared(classifier, split, mesh), {"split": split, "chunk": chunk, "mesh": mesh}
    if config.data_dependent:
        placed = place((ids, images), split, mesh)
        search, found = _planned(
            _find_theta, *placed, shared, place(theta, split, mesh), _references(probes), config=config, **how
        )
        theta = np.zeros(found.shape, found.dtype)
        if probes is not None and config.leakage is not None:
            measured = place((theta, np.zeros(batch, np.int32)), split, mesh)
            leakage = _planned(_measure_leakage, probes, shared, placed[1], *measured, config=config, **how)[0]
    count, how = counting.pieces(config, batch, chunk, mesh)
    on_all = parallel.replicate((ids, images, theta), mesh)
    pieces = parallel.split_rows(np.zeros((count, 3), np.int32), mesh)
    arguments = _example_keys(config.seed, on_all[0]), *on_all[1:], classifier, pieces, np.int32(1), np.int32(0)
    return search, max(leakage, _planned(counting.count_pieces, *arguments, **how)[0])


def _planned(function, *arguments, **static):
    """Bytes on one device that a jitted function takes, and shape and type of its result."""
    lowered = function.lower(*arguments, **static)
    return _memory(lowered.compile()), lowered.out_info


def _memory(compiled) -> int:
    sizes = compiled.memory_analysis()
    return sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + sizes.output_size_in_bytes


def _num_draws(theta: np.ndarray) -> np.ndarray:
    """How many draws of the exact form there are for the theta of each image: int64 [batch]."""
    return np.array([SplittingL1(exact=True).num_draws(one) for one in theta])


@jax.jit
def _example_keys(seed, ids):
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)


@functools.partial(jax.jit, static_argnames=("config", "chunk", "mesh"))
def _classes(ids, images, classifier, theta, *, config: RunConfig, chunk: int, mesh: Mesh):
    """The smoothed classes of images under the starting theta: int32 [m]."""

    def classes(keys, images, classifier, theta):
        how = {"num_samples": config.leakage.num_samples, "chunk": chunk} if config.leakage else {}
        return reference_classes(keys, classifier, config.certificate, images, theta, **how)

    of_rows = parallel.each_with_its_rows(classes, mesh, [True, True, False, False])
    return of_rows(_example_keys(config.seed, ids), images, classifier, theta)


def _shared(classifier: Classifier, split: Split, mesh: Mesh) -> Classifier:
    return classifier if split == "images" else parallel.share_rows(classifier, mesh)


def _for_each(function, split: Split, mesh: Mesh, rows):
    """`function` of one image, of a batch; `rows` says which arguments have an entry for each image.

    Each device does it for its images; or all devices do it together, for one image after another.
    """
    if split == "images":
        return parallel.each_with_its_rows(jax.vmap(function, [0 if spread else None for spread in rows]), mesh, rows)

    def one_after_another(*arguments):
        batch = [argument for argument, spread in zip(arguments, rows, strict=True) if spread]

        def of_one(one):
            entries = iter(one)
            return function(*(next(entries) if spread else a for a, spread in zip(arguments, rows, strict=True)))

        return jax.lax.map(of_one, batch)

    return one_after_another


@functools.partial(jax.jit, static_argnames=("config", "split", "chunk", "mesh"))
def _find_theta(ids, images, classifier, theta, references, *, config: RunConfig, split: Split, chunk: int, mesh: Mesh):
    """theta of each image, found from the one given: [batch] for isotropic, [batch, *d] for ancer."""

    def per_image(key, x, theta, classifier, references):
        arguments = key, classifier, config.certificate, x
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

    of_all = _for_each(per_image, split, mesh, [True, True, True, False, False])
    found = of_all(_example_keys(config.seed, ids), images, theta, classifier, references)
    if not config.exact:
        return found
    return SplittingL1().quantised(found, period=config.period if config.method == "ancer" else None)


@functools.partial(jax.jit, static_argnames=("config", "split", "chunk", "mesh"))
def _measure_leakage(
    probes, classifier, images, theta, predictions, *, config: RunConfig, split: Split, chunk: int, mesh: Mesh
) -> Leaked:
    def per_image(x, theta, prediction, classifier, probes: Probes) -> Leaked:
        arguments = classifier, config.certificate, x, theta, prediction
        settings = config.leakage or LeakageConfig()
        counted = leakage(probes.references, *arguments, num_samples=settings.num_samples, chunk=chunk)
        if probes.held_out is None:
            return Leaked(*counted, jnp.int32(0), jnp.int32(0))
        soft = vote_leakage(probes.held_out, *arguments, num_samples=settings.held_out_samples, chunk=chunk)
        return Leaked(*counted, *soft)

    of_all = _for_each(per_image, split, mesh, [True, True, True, False, False])
    return of_all(images, theta, predictions, classifier, probes)
