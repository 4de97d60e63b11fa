"""A batch of images on the devices: theta, votes and leakage of each; and how large a batch their memory can take."""

import functools
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ancer_jax import counting, parallel
from ancer_jax.certificates import SplittingL1
from ancer_jax.certification import Certification, certification, exact_certification
from ancer_jax.classifiers import Classifier
from ancer_jax.config import Execution, RunConfig, Split
from ancer_jax.data import Dataset
from ancer_jax.leakage import References, leakage, make_references
from ancer_jax.optimize import guarded_choice, optimize_anisotropic, optimize_isotropic
from ancer_jax.sequential import estimate, scales_of
from ancer_jax.smoothing import Stage

# Images for each device, and noisy copies of each: what is usual where nothing is asked for and memory allows it.
_USUAL, _USUAL_ON_CPU = (32, 128), (10, 100)
_SHARE = 0.9  # of a device's memory that a program may plan with


class Computed(NamedTuple):
    """A batch's results, on the devices: arrays with an entry for each image.

    Attributes:
      theta: [batch] for fixed and isotropic, [batch, *d] for shared and ancer.
      selected: the selected class; for exact certificates the top one.
      leaked, asked: references that theta sends to the selected class, and how many could be sent.
      votes: what counts the votes.
      begun: votes of all draws, being counted; None where sampling is sequential. For exact certificates, the votes.
    """

    theta: jax.Array
    selected: jax.Array
    leaked: jax.Array | np.ndarray
    asked: jax.Array | np.ndarray
    votes: counting.Votes
    begun: Any


def compute(
    ids,
    classifier: Classifier,
    images,
    start: np.ndarray,
    references: References | None,
    config: RunConfig,
    *,
    rows: np.ndarray,
    split: Split,
    chunk: int,
    mesh: Mesh,
) -> Computed:
    """Start a batch on the devices, from the theta of all images, [] or [*d]; nothing waits but for exact votes.

    Votes are counted for the images `rows` of the batch; the others fill it up.
    """
    keys, theta = _example_keys(config.seed, ids), _start(len(ids), start, split, mesh)
    shared = _shared(classifier, split, mesh)
    if config.data_dependent:
        theta = _find_theta(keys, shared, images, theta, references, config=config, split=split, chunk=chunk)
    votes = counting.Votes(keys, classifier, images, theta, config, chunk=chunk, mesh=mesh)
    begin = lambda stage, n: votes.begin(stage, rows, np.zeros_like(rows), np.broadcast_to(n, rows.shape))
    if config.exact:
        begun = votes.end(begin(Stage.ESTIMATE, _num_draws(theta)[rows]))
        selected = begun.argmax(axis=1).astype(np.int32)
    else:
        selected = votes.top(begin(Stage.SELECT, config.certify.n0))
        begun = None if config.sampling else begin(Stage.ESTIMATE, config.certify.n)
    selected = place(selected, split, mesh)
    leaked = asked = np.zeros(len(ids), np.int32)
    if references is not None and config.leakage is not None:
        how = {"certificate": config.certificate, "num_samples": config.leakage.num_samples, "chunk": chunk}
        leaked, asked = _measure_leakage(references, shared, images, theta, selected, split=split, **how)
    return Computed(theta, selected, leaked, asked, votes, begun)


def certificates(computed: Computed, rows: np.ndarray, config: RunConfig) -> tuple[Certification, np.ndarray]:
    """Certificates of the images `rows` of a batch, and how many draws each one's took, selection included."""
    certificate, selected, n0 = config.certificate, np.asarray(computed.selected)[rows], config.certify.n0
    if config.exact:
        result = exact_certification(computed.begun[rows], _num_draws(computed.theta)[rows], certificate=SplittingL1())
        return result, result.n
    if config.sampling is None:
        votes = computed.votes.end(computed.begun)[rows, selected]
        result = certification(selected, votes, certificate=certificate, config=config.certify)
        return result, n0 + result.n

    def draw(stage, some, first, stop):
        return computed.votes(stage, rows[some], first, stop)[np.arange(len(some)), selected[some]]

    result, pilot = estimate(
        draw,
        selected,
        scales_of(np.asarray(computed.theta)[rows]),
        certificate=certificate,
        config=config.certify,
        sequential=config.sampling,
    )
    return result, n0 + pilot + result.n


def find_references(
    classifier: Classifier, dataset: Dataset, config: RunConfig, execution: Execution, mesh: Mesh
) -> References | None:
    """The images on which leakage is measured, the same whatever part of the data is certified; None if it is not."""
    if config.leakage is None or not config.data_dependent:
        return None
    count = min(config.leakage.num_references, len(dataset))
    rows = np.sort(np.random.default_rng(config.seed).choice(len(dataset), count, replace=False))
    images = parallel.replicate(dataset.images[rows], mesh)
    keys = _example_keys(config.seed, parallel.replicate(dataset.ids[rows].astype(np.uint32), mesh))
    theta = jnp.asarray(config.theta, images.dtype)
    settings = {"certificate": config.certificate, "num_samples": config.leakage.num_samples}
    chunk = min(execution.chunk or _USUAL_ON_CPU[1], _USUAL_ON_CPU[1])
    shared = parallel.share_rows(classifier, mesh)
    return _make_references(keys, shared, images=images, theta=theta, **settings, chunk=chunk)


def place(tree, split: Split, mesh: Mesh):
    """Arrays of a batch on the devices that share its images, or its draws: their rows shared out, or all on each."""
    return (parallel.split_rows if split == "images" else parallel.replicate)(tree, mesh)


def fit(
    classifier: Classifier,
    dataset: Dataset,
    start: np.ndarray,
    references: References | None,
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
        search, count = _needed_memory(batch, classifier, dataset, start, references, config, **how)
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


def _needed_memory(batch, classifier, dataset, start, references, config, *, split, chunk, mesh) -> tuple[int, int]:
    """Bytes on one device for the search for theta, and for the counting of votes; by their compiled programs."""
    ids, images = place((np.zeros(batch, np.uint32), np.repeat(dataset.images[:1], batch, axis=0)), split, mesh)
    keys, theta, search = _example_keys(config.seed, ids), _start(batch, start, split, mesh), 0
    shared = _shared(classifier, split, mesh)
    if config.data_dependent:
        how = {"config": config, "split": split, "chunk": chunk}
        search, theta = _planned(_find_theta, keys, shared, images, theta, references, **how)
    leakage, selected = 0, place(np.zeros(batch, np.int32), split, mesh)
    if references is not None and config.leakage is not None:
        how = {"certificate": config.certificate, "num_samples": config.leakage.num_samples, "chunk": chunk}
        leakage, _ = _planned(_measure_leakage, references, shared, images, theta, selected, split=split, **how)
    count, how = counting.pieces(config, batch, chunk, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    on_all = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere)
    arrays = jax.tree.map(on_all, (keys, images, theta))
    pieces = parallel.split_rows(np.zeros((count, 3), np.int32), mesh)
    votes, _ = _planned(counting.count_pieces, *arrays, classifier, pieces, np.int32(1), np.int32(0), **how)
    return search, max(leakage, votes)


def _planned(function, *arguments, **static):
    """Bytes on one device that a jitted function takes, and what its results will be."""
    lowered = function.lower(*arguments, **static)
    compiled = lowered.compile()
    results = jax.tree.map(
        lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding),
        *(lowered.out_info, compiled.output_shardings),
    )
    return _memory(compiled), results


def _memory(compiled) -> int:
    sizes = compiled.memory_analysis()
    return sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + sizes.output_size_in_bytes


def _start(batch: int, start: np.ndarray, split: Split, mesh: Mesh):
    """The theta of all images, or where their search starts, once for each image."""
    return place(np.repeat(start[None], batch, axis=0), split, mesh)


def _num_draws(theta) -> np.ndarray:
    """How many draws of the exact form there are for the theta of each image: int64 [batch]."""
    return np.array([SplittingL1(exact=True).num_draws(one) for one in np.asarray(theta)])


@jax.jit
def _example_keys(seed, ids):
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)


_make_references = jax.jit(make_references, static_argnames=("certificate", "num_samples", "chunk"))


def _shared(classifier: Classifier, split: Split, mesh: Mesh) -> Classifier:
    return classifier if split == "images" else parallel.share_rows(classifier, mesh)


def _for_each(function, split: Split):
    """`function` of one image, of a batch: all at once, or one after another on all devices."""
    return jax.vmap(function) if split == "images" else lambda *batch: jax.lax.map(lambda one: function(*one), batch)


@functools.partial(jax.jit, static_argnames=("config", "split", "chunk"))
def _find_theta(keys, classifier, images, theta, references, *, config: RunConfig, split: Split, chunk: int):
    """theta of each image, found from the one given: [batch] for isotropic, [batch, *d] for ancer."""
    certificate = config.certificate

    def per_image(key, x, theta):
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

    found = _for_each(per_image, split)(keys, images, theta)
    if not config.exact:
        return found
    return SplittingL1().quantised(found, period=config.period if config.method == "ancer" else None)


@functools.partial(jax.jit, static_argnames=("certificate", "split", "num_samples", "chunk"))
def _measure_leakage(references, classifier, images, theta, predictions, *, certificate, split, num_samples, chunk):
    measure = functools.partial(leakage, references, classifier, certificate, num_samples=num_samples, chunk=chunk)
    return _for_each(measure, split)(images, theta, predictions)
