"""Memory: what turns certificates of per-input smoothed classifiers into those of one classifier.

Noise that depends on the input gives every input a smoothed classifier of its own. The classifier with memory answers
inputs one after another and stores (input, class, region); a new answer never contradicts a stored one:

1. An input inside a stored region of another class gets that class, and its region shrinks (same center and shape)
   until it lies inside that region.
2. Otherwise its region shrinks until it is disjoint from every stored region of another class.
3. The answer is stored. A gap of 0 is the single point x, and an abstention is x with class `ABSTAIN`.

Invariants: stored regions of different classes (`ABSTAIN` counts as one) are pairwise disjoint; each contains its
center; every answer inside a stored region is its class; no region is larger than the certificate it came from. All
decisions are made in float64 and err on the safe side. The answers depend on the order of the inputs.

Later inputs in a stored region get its class by rule, whether its certificate holds or not. The i-th stored region is
right (some smoothed classifier gives its class everywhere in it) if the first i certificates hold: with probability at
least 1 - i alpha. This speaks of later inputs only, unlike certificates of a universal theta.

References: Alfarra et al. 2022 (arXiv 2012.04351); Eiras et al. 2022 (arXiv 2107.04570).
"""

import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from ancer_jax._checks import check_type
from ancer_jax._numerics import Leaf, Values, float64_on_the_host, rounding
from ancer_jax.basis import Basis, Pixels
from ancer_jax.regions.pairs import largest_inside, largest_outside
from ancer_jax.regions.region import Region, rounding_of_contains
from ancer_jax.smoothing.certificate import ABSTAIN, Certificate, WithRegion

# Inputs whose distances to all stored ones are computed by one matrix product.
_BATCH = 256
# Pairs of regions that are compared by one call: few shapes, so that little is compiled.
_PAIRS = (8, 64)
_FLOAT32 = np.finfo(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Memory:
    """What has been answered so far; a value: `insert` returns a new one and leaves this one as it was.

    Attributes:
      norm: 2 or 1.
      basis: of the regions.
      shape: shape of the inputs; None while empty.
      size: number of stored answers.
    """

    norm: int
    basis: Basis
    shape: tuple[int, ...] | None
    size: int
    _columns: "_Columns" = dataclasses.field(repr=False)

    @classmethod
    def empty(cls, norm: int, basis: Basis = Pixels()) -> "Memory":
        """A memory of regions of the l_norm in a basis, with nothing in it.

        Raises:
          ValueError: if `norm` is not 2 or 1.
        """
        if norm not in (2, 1):
            raise ValueError(f"norm must be 2 or 1, got {norm!r}")
        return cls(norm, basis, None, 0, _Columns({}))

    @classmethod
    def restore(cls, regions: Region, predictions: ArrayLike) -> "Memory":
        """The memory that holds these answers (`regions` and `predictions` of another memory); not compared again.

        Raises:
          ValueError: if a value makes no sense.
        """
        memory = cls.empty(regions.norm, regions.basis)
        new = _checked(memory, regions, predictions)
        count = len(new["gap"])
        if not count:
            return memory
        return cls(memory.norm, memory.basis, np.shape(regions.center)[1:], count, memory._columns.append(0, new))

    def __len__(self) -> int:
        return self.size

    @property
    def regions(self) -> Region:
        """The stored regions in order of insertion: center [n, *d], theta [n, *d] or [n], gap [n] (float64)."""
        center, theta = self._column("center"), self._column("theta")
        shape = (self.size, *(self.shape or ()))
        theta = theta.reshape(shape if theta.shape == center.shape else self.size)
        return Region(center.reshape(shape), theta, self._column("gap"), self.norm, self.basis)

    @property
    def predictions(self) -> np.ndarray:
        """int64 [n], the stored classes, `ABSTAIN` among them."""
        return self._column("prediction")

    def _column(self, name: str) -> np.ndarray:
        empty = np.zeros(0, np.int64 if name == "prediction" else np.float64)
        column = self._columns.get(name, empty)[: self.size]
        column.flags.writeable = False
        return column

    def insert(self, certificate: Certificate) -> tuple["Memory", "Answer"]:
        """Answer one input by the prediction and the region of its certificate, and store the answer.

        Returns:
          The memory with one more answer, and the answer.

        Guarantee: the invariants at the head of this module. A region that must shrink falls short of the largest one
        allowed by less than 1e-6 of its size, plus rounding: 1e-12 of the other region for each thousand coordinates,
        more in another basis than the pixels.

        Raises:
          ValueError: if norm, basis or shape differ from what is stored, or a value makes no sense.
        """
        check_type("certificate", certificate, Certificate, "certify makes one")
        region = certificate.region
        if np.ndim(region.gap):
            raise ValueError(f"insert takes one certificate, got a batch of {len(certificate)}: use insert_batch")
        center, theta, gap = (np.asarray(value)[None] for value in (region.center, region.theta, region.gap))
        prediction = np.asarray(certificate.prediction)[None]
        region = dataclasses.replace(region, center=center, theta=theta, gap=gap)
        memory, answers = self.insert_batch(dataclasses.replace(certificate, prediction=prediction, region=region))
        return memory, answers[0]

    def insert_batch(
        self, certificates: Certificate, *, progress: Callable[[int], object] = lambda inputs: None
    ) -> tuple["Memory", "Answer"]:
        """`insert` one after another, in the order given, at less cost: the same answers, up to the last bits of gaps.

        Args:
          certificates: of the inputs, with one leading axis.
          progress: called with the number of inputs that were answered since the last call.

        Returns:
          The memory with m more answers, and the answers, batched. Errors as in `insert`.
        """
        check_type("certificates", certificates, Certificate, "certify_batch makes them")
        region, columns = certificates.region, self._columns
        if not np.ndim(region.gap):
            raise ValueError("insert_batch takes a batch of certificates, got one: use insert")
        new = _checked(self, region, certificates.prediction)
        count = len(new["gap"])
        inside = np.full(count, -1)
        if not count:
            return self, Answer(new["prediction"], region, np.zeros(0, bool), inside)
        like = dataclasses.replace(region, center=np.asarray(region.center)[0], theta=1.0, gap=0.0)
        with float64_on_the_host():
            for start in range(0, count, _BATCH):
                block = {name: column[start : start + _BATCH] for name, column in new.items()}
                size = self.size + start
                columns = columns.append(size, block)
                may_meet, may_lie_in = _near(block, columns, size + len(block["gap"]))
                for j in range(len(block["gap"])):
                    row = size + j
                    near = may_meet[j, :row].nonzero()[0], may_lie_in[j, :row].nonzero()[0]
                    prediction, gap, inside[start + j] = _answer(like, columns, row, *near)
                    columns["prediction"][row], columns["gap"][row] = prediction, gap
                    columns["outer_radius"][row] = gap * columns["theta"][row].max().astype(np.float64)
                progress(len(block["gap"]))
        memory = Memory(self.norm, self.basis, np.shape(region.center)[1:], self.size + count, columns)
        gap, prediction = (memory._column(name)[self.size :].copy() for name in ("gap", "prediction"))
        changed = (gap != new["gap"]) | (prediction != new["prediction"])
        return memory, Answer(prediction, dataclasses.replace(region, gap=gap), changed, inside)

    def classify(self, x: ArrayLike, fallback: Callable[[Any], int]) -> int:
        """The answer of the classifier with memory at `x` [*d]: the class of the stored region that contains it.

        Where none does, `fallback(x)` answers: the smoothed classifier of a theta found for x, say. Nothing is stored,
        so that a fallback's answer promises nothing: beside x, and even at x itself, a later answer may be another one.
        To serve answers that are kept, certify x and `insert` the certificate.

        Raises:
          ValueError: if the shape of x differs from what is stored, or x is not finite.
        """
        point = Region(np.asarray(x), np.ones(()), np.zeros(()), self.norm, self.basis)
        row = _checked(self, jax.tree.map(lambda value: value[None], point), np.array([ABSTAIN]))
        if not self.size:
            return int(fallback(x))
        near = _near(row, self._columns, self.size)[1][0].nonzero()[0]
        with float64_on_the_host():
            inside = near[_compare(_contains_center, point, self._columns, near)]
        return int(self.predictions[inside[0]]) if inside.size else int(fallback(x))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Answer(WithRegion):
    """What the classifier with memory answers: one input or many (leading axes `...`); on the host.

    Attributes:
      prediction: int [...], the class, or `ABSTAIN`.
      region: the certified region, at most as large as the one that was given.
      changed: bool [...], whether the class or the region differs from what was given.
      inside: int [...], place (in order of insertion) of a stored region that contains the input, -1 if none does. If
        `prediction` is not the class that was given, it is the class of this region.
    """

    prediction: Leaf
    region: Region
    changed: Leaf
    inside: Leaf


_claiming = threading.Lock()


class _Columns(dict[str, np.ndarray]):
    """Arrays by name, with spare rows at their ends. Memories may share them: rows that a Memory counts never change.

    Rows are claimed before they are written (of two threads that insert into one Memory, one gets a copy), and only
    the insertion that claimed them writes to them.
    """

    used = 0

    def append(self, size: int, rows: dict[str, np.ndarray]) -> "_Columns":
        """These columns with `rows` behind the first `size` rows: in place where that is free, else a copy."""
        end, columns = size + len(rows["gap"]), self
        wanted = {}
        for name, column in rows.items():
            there = self.get(name, column)
            wanted[name] = np.result_type(there, column), np.broadcast_shapes(there.shape[1:], column.shape[1:])
        have = {name: (column.dtype, column.shape[1:]) for name, column in self.items()}
        with _claiming:
            free = wanted == have and size == self.used and end <= len(self["gap"])
            if free:
                self.used = end
        if not free:
            length = max(end, 2 * size)
            columns = _Columns({name: np.empty((length, *width), dtype) for name, (dtype, width) in wanted.items()})
            columns.used = end
            for name, column in self.items():
                columns[name][:size] = column[:size]
        for name, column in rows.items():
            columns[name][size:end] = column
        return columns


def _checked(memory: Memory, regions: Region, predictions: ArrayLike) -> dict[str, np.ndarray]:
    """The columns of a batch of answers, checked."""
    center, theta, gap, prediction = map(np.asarray, (regions.center, regions.theta, regions.gap, predictions))
    if regions.norm != memory.norm:
        raise ValueError(f"this memory holds regions of the l{memory.norm} norm, got one of the l{regions.norm} norm")
    if regions.basis != memory.basis:
        raise ValueError(f"this memory holds regions in the basis {memory.basis}, got one in {regions.basis}")
    if memory.shape is not None and center.shape[1:] != memory.shape:
        raise ValueError(f"this memory holds inputs of shape {list(memory.shape)}, got {list(center.shape[1:])}")
    count = len(center)
    if theta.shape not in ((count,), center.shape) or gap.shape != (count,) or prediction.shape != (count,):
        shapes = ", ".join(str(list(value.shape)) for value in (center, theta, gap, prediction))
        raise ValueError(f"center, theta, gap and prediction do not fit together: their shapes are {shapes}")
    for name, value in (("center", center), ("theta", theta), ("gap", gap)):
        if not np.can_cast(value.dtype, np.float64, "same_kind"):
            raise ValueError(f"{name} must be real numbers, got {value.dtype}")
    if not np.issubdtype(prediction.dtype, np.integer):
        raise ValueError(f"prediction must be an integer, got {prediction.dtype}")
    if (prediction < ABSTAIN).any():
        raise ValueError(f"prediction must be a class or ABSTAIN (-1), got {prediction.min()}")
    for name, value, valid in (
        ("center", center, np.isfinite(center)),
        ("theta", theta, (theta >= _FLOAT32.tiny) & (theta <= _FLOAT32.max)),
        ("gap", gap, (gap >= 0) & (gap <= _FLOAT32.max)),
        ("gap of an abstention", gap, (gap == 0) | (prediction != ABSTAIN)),
    ):
        if not valid.all():
            raise ValueError(f"{name} is out of range: {value[~valid].flat[0]}")
    center, theta = (_lossless(value.reshape(count, -1 if count else 1)) for value in (center, theta))
    square = np.einsum("ij,ij->i", center, center, dtype=np.float64)
    gap = gap.astype(np.float64)
    columns = {"center": center, "theta": theta, "gap": gap, "prediction": prediction.astype(np.int64)}
    return columns | {"square": square, "outer_radius": gap * theta.max(axis=1, initial=0).astype(np.float64)}


def _lossless(values: np.ndarray) -> np.ndarray:
    """As float32 where that loses nothing, else as float64. XLA takes subnormal numbers of float32 for 0."""
    with np.errstate(over="ignore", under="ignore"):
        narrow = values.astype(np.float32)
    kept = (narrow == values) & ((abs(narrow) >= _FLOAT32.tiny) | (narrow == 0))
    return narrow if kept.all() else values.astype(np.float64)


def _region(like: Region, columns: dict[str, np.ndarray], row: Any) -> Region:
    """The region in a row, or those in some rows, of the norm, basis and input shape of the region `like`."""
    gap, (center, theta) = columns["gap"][row], (columns[name][row] for name in ("center", "theta"))
    shape = np.shape(gap) + np.shape(like.center)
    # A number for each input is stored as [n, 1].
    theta = theta.reshape(shape) if theta.shape == center.shape else theta[..., 0]
    return Region(center.reshape(shape), theta, gap, like.norm, like.basis)


def _near(rows: dict[str, np.ndarray], columns: dict[str, np.ndarray], end: int) -> tuple[np.ndarray, np.ndarray]:
    """[m, end] whether each row's region may meet, and whether its center may lie in, each of the first stored ones.

    Both regions lie in l2 balls around their centers (for norm 1, too), with the largest semi-axis as radius. Squared
    distances come from a float32 matrix product, less a bound of its error (the second part: of what underflows).
    """
    stored = {name: columns[name][:end] for name in ("center", "square", "outer_radius")}
    length_a, length_b = np.sqrt(rows["square"])[:, None], np.sqrt(stored["square"])
    with np.errstate(over="ignore", invalid="ignore"):
        a, b = (value["center"].astype(np.float32, copy=False) for value in (rows, stored))
        product = (a @ b.T).astype(np.float64)
        error = rounding(a.shape[1], np.float32) * (length_a + length_b) ** 2
        error += 4 * a.shape[1] * _FLOAT32.tiny * (1 + length_a + length_b)
        square = rows["square"][:, None] + stored["square"] - 2 * product - error
        known = np.isfinite(product)
        beyond = lambda distance: known & (square > distance**2)
        own, others = rows["outer_radius"][:, None], stored["outer_radius"]
        return ~beyond(own + others), ~beyond(others)


def _answer(
    like: Region, columns: dict[str, np.ndarray], row: int, may_meet: np.ndarray, may_lie_in: np.ndarray
) -> tuple[int, float, int]:
    """(class, gap, place of a stored region that contains it or -1) for the input in `row`."""
    region, prediction, gap = _region(like, columns, row), columns["prediction"][row], columns["gap"][row]
    meets = may_meet[columns["prediction"][may_meet] != prediction]
    gaps = _compare(_disjoint_gap, region, columns, meets)
    # A gap of 0: the stored region was not proven to exclude the center. Only such a region can contain it.
    doubtful = meets[gaps == 0]
    others = doubtful[_compare(_contains_center, region, columns, doubtful)]
    if others.size:
        inner = _compare(largest_inside, region, columns, others)
        place = others[inner.argmax()]
        return int(columns["prediction"][place]), float(min(gap, inner.max())), int(place)
    own = may_lie_in[columns["prediction"][may_lie_in] == prediction]
    own = own[_compare(_contains_center, region, columns, own)]
    return int(prediction), float(min(gap, gaps.min(initial=np.inf))), int(own[0]) if own.size else -1


def _with_margin(stored: Region) -> Region:
    """A stored region, so much larger that it contains whatever rounding may take for a point of it."""
    return dataclasses.replace(stored, gap=stored.gap * (1 + rounding_of_contains(stored)))


def _contains_center(region: Region, stored: Region) -> Values:
    """Whether the stored region contains the center of the region, or rounding leaves it open."""
    return _with_margin(stored).contains(region.center)


def _disjoint_gap(region: Region, stored: Region) -> Values:
    """A gap with which the region is disjoint from the stored one and its margin: the largest, or at least its own."""
    return largest_outside(region, _with_margin(stored), enough=region.gap)


@functools.partial(jax.jit, static_argnames="comparison")
def _compare_padded(comparison: Callable[[Region, Region], Values], region: Region, stored: Region):
    return jax.lax.map(lambda one: comparison(region, one), stored, batch_size=8)


def _compare(
    comparison: Callable[[Region, Region], Values], region: Region, columns: dict[str, np.ndarray], places: np.ndarray
) -> np.ndarray:
    """`comparison(region, stored)` for the stored regions at `places`."""
    found = [np.zeros(0, bool if comparison is _contains_center else np.float64)]
    for start in range(0, places.size, _PAIRS[-1]):
        some = places[start : start + _PAIRS[-1]]
        padded = np.resize(some, next(size for size in _PAIRS if size >= some.size))
        stored = _region(region, columns, padded)
        found.append(np.asarray(_compare_padded(comparison, region, stored))[: some.size])
    return np.concatenate(found)
