"""Certificates from no more draws than they need: sampling that stops early, with the guarantee of a fixed n.

An input's draws are counted at a few looks, of growing numbers of draws. Each look gives a Clopper-Pearson bound, and
the error probabilities of all looks add up to alpha, so that every bound holds at once, and sampling may stop at any
look for any reason. Over so few looks this is tighter than a confidence sequence that holds after every single draw
(`bounds.confidence_sequence_lower`; benchmarks/sequential.py compares them).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Key

from ancer_jax import bounds
from ancer_jax._checks import check_integer, check_real
from ancer_jax.certificates import Certificate
from ancer_jax.certification import (
    Certification,
    CertifyConfig,
    Evidence,
    certification_from,
    check_example,
    in_callers_numbers,
    select_class,
    warn_if_undecidable,
)
from ancer_jax.classifiers import Classifier
from ancer_jax.regions import geometric_mean
from ancer_jax.smoothing import Stage, check_random, class_counts_between, stage_key

# Sizes of looks are multiples of UNIT, each half as large again as the last one.
UNIT, _GROWTH, _MOST_LOOKS = 100, 1.5, 64
# Share of alpha: for given radii that of the last look, which then decides almost as a fixed n would; for a tolerance
# that of the first look, which was planned to be enough. The others have equal parts of the rest.
_LAST_SHARE, _PLANNED_SHARE = 0.1, 0.9
# What would take more luck than this many standard deviations of the draws to come is given up.
_LUCK = 2.6
# The pilot takes n / 100 draws, and up to n / 25 where fewer than 10 of them are votes, or fewer than 10 are none.
_LEAST_PILOT, _MOST_PILOT, _RARE = 100, 25, 10


@dataclasses.dataclass(frozen=True)
class SequentialConfig:
    """When to stop drawing; one of the two.

    Attributes:
      radii: stop when it is decided, for each of these radii, in the units of the input, whether the certified radius
        reaches it, and whether the proxy radius does. A region is then as large as these decisions needed: certified
        accuracy at these radii is what such a run is for, not ACR.
      tolerance: stop when the gap is at most this share (in (0, 1)) below the one that all n draws would give, if they
        went on to vote as they did so far.

    Raises:
      ValueError: if not exactly one is given, or it is out of range.
    """

    radii: tuple[float, ...] | None = None
    tolerance: float | None = None

    def __post_init__(self):
        if (self.radii is None) == (self.tolerance is None):
            raise ValueError(
                f"sequential sampling takes either radii or a tolerance, got {self.radii} and {self.tolerance}"
            )
        if self.radii is not None:
            if not self.radii:
                raise ValueError("radii must be one or more numbers, got none")
            for radius in self.radii:
                check_real("radii", radius, "[0, inf)")
        if self.tolerance is not None:
            check_real("tolerance", self.tolerance, "(0, 1)")


def certify_sequentially(
    key: Key[Array, ""],
    classifier: Classifier,
    certificate: Certificate,
    x: Float[ArrayLike, "*d"],
    theta: Float[ArrayLike, "..."],
    *,
    config: CertifyConfig | None = None,
    sequential: SequentialConfig,
    chunk: int = UNIT,
) -> Certification:
    """`certification.certify` with as many of the `config.n` draws as `sequential` asks for; the result says how many.

    Arguments, guarantee and errors as in `certification.certify`.
    """
    x32, theta32 = check_example(x, theta)
    check_integer("chunk", chunk)
    config = config or CertifyConfig()
    warn_if_undecidable(config, certificate)
    arguments = key, classifier, certificate, x32, theta32
    selected = int(_select_class(*arguments, n0=config.n0, chunk=chunk))

    def draw(stage, rows, first, stop):
        between = {"first": int(first[0]), "stop": int(stop[0])}
        steps = math.ceil((between["stop"] - between["first"]) / chunk)
        return np.asarray(_counts_between(stage, *arguments, **between, steps=steps, chunk=chunk))[None, selected]

    how = {"certificate": certificate, "config": config, "sequential": sequential}
    found = estimate(draw, np.array([selected]), scales_of(np.asarray(theta32)[None]), **how)
    result = Certification(
        *(getattr(found.certification, field.name)[0] for field in dataclasses.fields(Certification))
    )
    return in_callers_numbers(result, certificate, x, theta, x32, theta32)


_select_class = jax.jit(select_class, static_argnames=("certificate", "n0", "chunk"))


@functools.partial(jax.jit, static_argnames=("certificate", "chunk"))
def _counts_between(stage, key, classifier, certificate, x, theta, **which):
    return class_counts_between(stage_key(key, stage), classifier, certificate, x, theta, **which)


class Estimate(NamedTuple):
    """What a batch's certificates are, and what they took beside the draws that certify.

    Attributes:
      certification: with the number of each input's draws as `n`.
      evidence: of the look whose bound is the largest.
      pilot: draws of the pilot, int64 [batch].
    """

    certification: Certification
    evidence: Evidence
    pilot: np.ndarray


def scales_of(theta: np.ndarray) -> np.ndarray:
    """Radius and proxy radius of a region of gap 1 for each theta, of [batch, ...]: float64 [batch, 2]."""
    return np.array([(one.min(), geometric_mean(one)) for one in theta.astype(np.float64)])


def estimate(
    draw: Callable[[Stage, np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    selected: Int[np.ndarray, " batch"],
    scales: Float[np.ndarray, "batch m"],
    *,
    certificate: Certificate,
    config: CertifyConfig,
    sequential: SequentialConfig,
) -> Estimate:
    """The host half of `certify_sequentially`, for a batch: look by look, who needs more draws?

    Args:
      draw: `draw(stage, rows, first, stop)`: how many of the draws first, ..., stop - 1 ([m] each) of a stage vote for
        the selected class of each of the inputs `rows` [m]; integers [m]. Draws of other numbers or stages, and those
        that selected the class, must be independent of them.
      selected: the class of each input.
      scales: what a gap of 1 is worth, for each kind of radius that is to be decided (`scales_of`).
      certificate, config, sequential: noise law, limits, and when to stop.

    Guarantee: each input's `p_lower` is above the probability of its selected class with probability at most
      `config.alpha`, whatever made it stop. The looks and their parts of alpha are fixed before the draws that they
      count (for a tolerance by a pilot of other draws); the bound of a look fails with probability at most its part;
      the parts add up to alpha. The result is the largest of the bounds.
    """
    check_random(certificate)
    batch, n, tolerance = len(selected), config.n, sequential.tolerance
    rows, pilot = np.arange(batch), np.zeros(batch, np.int64)
    if tolerance is None:
        sizes, alphas, last_alpha = _looks(np.full(batch, UNIT), config, planned=False)
    else:
        votes, pilot = _pilot(draw, batch, n)
        first = _planned_size(votes, pilot, certificate, config, tolerance)
        sizes, alphas, last_alpha = _looks(first, config, planned=True)
        rows = rows[_hope(0, n, votes, pilot, certificate, n, config.alpha) > 0]
    goals = (np.array(sequential.radii or [])[:, None] / scales[:, None]).reshape(batch, -1)
    goals = np.maximum(goals * (1 + 1e-9), 1e-12)  # reached in the table, too, and 0 only by a region
    count, drawn, p_lower = np.zeros(batch, np.int64), np.zeros(batch, np.int64), np.zeros(batch)
    best = Evidence(np.zeros(batch, np.int64), sizes[:, 0].copy(), alphas[:, 0].copy(), sizes[:, 0].copy())
    for look in itertools.count():
        if not rows.size:
            break
        size = sizes[rows, look]
        count[rows] += draw(Stage.ESTIMATE, rows, drawn[rows], size)
        drawn[rows], votes = size, count[rows]
        bound = bounds.clopper_pearson_lower(votes, size, alphas[rows, look])
        better = bound > p_lower[rows]
        for column, value in zip(best, (votes, size, alphas[rows, look], size - votes), strict=True):
            column[rows[better]] = value[better]
        p_lower[rows] = np.maximum(p_lower[rows], bound)
        gap = certificate.gap(p_lower[rows])
        hope = _hope(votes, n - size, votes, size, certificate, n, last_alpha[rows])
        if tolerance is None:
            enough = ((gap[:, None] >= goals[rows]) | (hope[:, None] < goals[rows])).all(axis=1)
        else:
            whole = bounds.clopper_pearson_lower(np.rint(votes / size * n).astype(np.int64), n, config.alpha)
            enough = (hope == 0) | ((gap > 0) & (gap >= (1 - tolerance) * certificate.gap(whole)))
        rows = rows[~enough & (size < n)]
    result = dataclasses.replace(certification_from(selected, best, certificate), count=count, n=drawn)
    return Estimate(result, best, pilot)


def _looks(first: np.ndarray, config: CertifyConfig, *, planned: bool):
    """Sizes of the looks, n from the last one on, and their parts of alpha, [batch, looks]; and the last one's part."""
    looks = np.arange(_MOST_LOOKS)
    sizes = np.ceil(np.ceil(first[:, None] / UNIT) * _GROWTH**looks) * UNIT
    sizes = np.minimum(sizes, config.n).astype(np.int64)
    last = sizes.argmax(axis=1)[:, None]
    share, special = (_PLANNED_SHARE, 0) if planned else (_LAST_SHARE, last)
    shares = np.where(looks == special, share, (1 - share) / np.maximum(last, 1))
    alphas = np.where(last == 0, 1.0, shares) * (config.alpha * (1 - 1e-12))
    return sizes, alphas, np.take_along_axis(alphas, last, axis=1)[:, 0]


def _pilot(draw, batch: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Votes and draws of the pilot; more draws where one of the two outcomes is rare."""
    rows, target, limit = np.arange(batch), max(1, n // _LEAST_PILOT), max(1, n // _MOST_PILOT)
    votes, trials = np.zeros(batch, np.int64), np.zeros(batch, np.int64)
    while rows.size:
        votes[rows] += draw(Stage.PILOT, rows, trials[rows], np.full(len(rows), target))
        trials[rows] = target
        rare = np.minimum(votes, trials - votes)[rows] < _RARE
        rows = rows[rare & (target < limit)]
        target = min(2 * target, limit)
    return votes, trials


def _planned_size(votes, trials, certificate, config: CertifyConfig, tolerance: float) -> np.ndarray:
    """How many draws will come near enough to what n draws give, if they vote as the pilot did."""
    rate = votes / trials

    def gap(size, alpha):
        return certificate.gap(bounds.clopper_pearson_lower(np.floor(rate * size).astype(np.int64), size, alpha))

    wanted = (1 - tolerance) * gap(np.full(len(rate), config.n), config.alpha)
    low, high = np.ones(len(rate)), np.full(len(rate), float(config.n))
    for _ in range(20):
        middle = np.sqrt(low * high)
        enough = gap(np.ceil(middle).astype(np.int64), _PLANNED_SHARE * config.alpha) >= wanted
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return 1.05 * high  # the pilot may be a little off


def _hope(counted, rest, votes, trials, certificate, n: int, alpha) -> np.ndarray:
    """The gap after n draws: `counted` votes, and the `rest` of the draws if they do well for what `trials` showed."""
    rate = (votes + 0.5) / (trials + 1)
    luck = _LUCK * np.sqrt(rest * rate * (1 - rate) * (1 + rest / trials))
    count = np.minimum(np.ceil(counted + rest * rate + luck), n).astype(np.int64)
    return certificate.gap(bounds.clopper_pearson_lower(count, n, alpha))
