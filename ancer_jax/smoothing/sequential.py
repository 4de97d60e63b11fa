"""Certificates from no more draws than they need: sampling that stops early, with the guarantee of a fixed n.

An input's draws are counted at a few looks, of growing numbers of draws. Each look gives a Clopper-Pearson bound, or
two of them, and the error probabilities of all looks add up to alpha, so that every bound holds at once, and sampling
may stop at any look for any reason. Over so few looks this is tighter than a confidence sequence that holds after every
single draw (`bounds.confidence_sequence_lower`; benchmarks/claims/sequential.py compares them).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from ancer_jax._checks import check_integer, check_real, check_type
from ancer_jax._numerics import geometric_mean
from ancer_jax.smoothing.certificate import (
    Bound,
    Certificate,
    CertifyConfig,
    Evidence,
    certificate_from_evidence,
    votes_of,
)
from ancer_jax.smoothing.certify import check_example, undo_float32_rounding, warn_if_undecidable
from ancer_jax.smoothing.noise import Noise
from ancer_jax.smoothing.smoothed import Smoothed, Stage, check_random, count_range, stage_key

# Sizes of looks are multiples of UNIT, each half as large again as the last one.
UNIT, _GROWTH, _MOST_LOOKS = 100, 1.5, 64
# Part of alpha of one special look; the others have equal parts of the rest. With radii it is the last look, so that a
# run that goes on to n draws loses little against a fixed n; with a tolerance the first, whose size the pilot chose.
_LAST_SHARE, _PLANNED_SHARE = 0.1, 0.9
# What only a rate of votes this many standard deviations above the observed one would reach is given up.
_OPTIMISM_Z = 2.6
# The pilot takes n / 100 draws, and up to n / 25 where fewer than 10 draws vote for the class, or fewer than 10 do not.
_PILOT_DIVISOR, _LARGEST_PILOT_DIVISOR, _RARE = 100, 25, 10


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
            if np.ndim(self.radii) != 1 or not len(self.radii):
                raise ValueError(f"radii must be a tuple of one or more numbers, got {self.radii!r}")
            for radius in self.radii:
                check_real("radii", radius, "[0, inf)")
            object.__setattr__(self, "radii", tuple(self.radii))  # hashable
        if self.tolerance is not None:
            check_real("tolerance", self.tolerance, "(0, 1)")


def check_divisible(config: CertifyConfig) -> None:
    """Refuse an alpha whose parts, which are 1e-4 of it at least, could be below `bounds.LEAST_ALPHA`."""
    check_real("alpha", config.alpha, "[1e-196, 1)")


def certify_sequentially(
    key: Key[Array, ""],
    smoothed: Smoothed,
    x: Float[ArrayLike, "*d"],
    *,
    sequential: SequentialConfig,
    config: CertifyConfig = CertifyConfig(),
    chunk: int = UNIT,
) -> Certificate:
    """`certify` with as many of the `config.n` draws as `sequential` asks for; the certificate's `n` says how many.

    Arguments, guarantee and errors as in `certify`; `chunk` has another default, as most inputs need few draws.
    """
    as_float32, x32 = check_example(smoothed, x)
    check_integer("chunk", chunk)
    check_random(smoothed.noise)
    check_type("config", config, CertifyConfig, "CertifyConfig(n=...)")
    check_type("sequential", sequential, SequentialConfig, "SequentialConfig(radii=...) or (tolerance=...)")
    warn_if_undecidable(config, smoothed.noise)

    def counts(stage, first, stop):
        return np.asarray(count_range(stage_key(key, stage), as_float32, x32, (first, stop), chunk=chunk))

    def votes_in(stage, indices, first, stop):
        return counts(stage, int(first[0]), int(stop[0]))[None]

    selected = int(counts(Stage.SELECT, 0, config.n0).argmax())
    scales = scales_of(np.asarray(as_float32.theta)[None])
    found = sample_until_decided(
        votes_in, np.array([selected]), scales, noise=smoothed.noise, config=config, sequential=sequential
    )
    one = jax.tree.map(lambda column: column[0], found)
    certificate = certificate_from_sequential(selected, one, as_float32, x32, alpha=config.alpha)
    return undo_float32_rounding(certificate, smoothed, x)


class SequentialVotes(NamedTuple):
    """What sequential sampling of a batch has found: integers [batch].

    Attributes:
      evidence: of the look whose gap is the largest; among equal ones, of that with the largest `p_lower`.
      votes, n: votes for the selected class, and draws, when each input was done.
      pilot: draws of the pilot.
    """

    evidence: Evidence
    votes: np.ndarray
    n: np.ndarray
    pilot: np.ndarray


def certificate_from_sequential(
    selected: ArrayLike, found: SequentialVotes, smoothed: Smoothed, x: ArrayLike, *, alpha: float
) -> Certificate:
    """The certificates of the classes `selected`, with all draws as `n`; arguments as `certificate_from_evidence`."""
    certificate = certificate_from_evidence(selected, found.evidence, smoothed, x, alpha=alpha)
    return dataclasses.replace(certificate, count=found.votes, n=found.n)


def scales_of(theta: np.ndarray) -> np.ndarray:
    """Radius and proxy radius of a region of gap 1 for each theta, of [batch, ...]: float64 [batch, 2]."""
    return np.array([(one.min(), geometric_mean(one)) for one in theta.astype(np.float64)])


def sample_until_decided(
    votes_in: Callable[[Stage, np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    selected: Int[np.ndarray, " batch"],
    scales: Float[np.ndarray, "batch m"],
    *,
    noise: Noise,
    config: CertifyConfig,
    sequential: SequentialConfig,
) -> SequentialVotes:
    """The host half of `certify_sequentially`, for a batch: look after look, which inputs need more draws?

    Args:
      votes_in: `votes_in(stage, indices, first, stop)`: the votes of the draws first, ..., stop - 1 ([m] each) of a
        stage for each class, of each of the inputs `indices` [m]; integers [m, K]. Draws of other numbers or stages,
        and those that selected the class, must be independent of them.
      selected: the class of each input.
      scales: what a gap of 1 is worth, for each kind of radius that is to be decided (`scales_of`).
      noise, config, sequential: noise law, limits, and when to stop.

    Guarantee: each input's `p_lower` is above the probability of its selected class with probability at most
      `config.alpha`, whatever made it stop. The looks and their parts of alpha are fixed before the draws that they
      count (for a tolerance by a pilot of other draws); the bound of a look fails with probability at most its part;
      the parts add up to alpha. The result is the largest of the bounds. With separate bounds each of the two has half
      of its look's part, and the result is the pair of the look with the largest gap.
    """
    check_random(noise)
    check_divisible(config)
    batch, n, tolerance = len(selected), config.n, sequential.tolerance
    going, pilot_draws, goals = np.arange(batch), np.zeros(batch, np.int64), _goals(sequential, scales)
    if tolerance is None:
        sizes, alphas, last_alpha = _looks(np.full(batch, UNIT), config, planned=False)
    else:
        pilot = _pilot(votes_in, selected, config)
        first, pilot_draws = _planned_size(pilot, noise, config, tolerance), pilot.n
        sizes, alphas, last_alpha = _looks(first, config, planned=True)
        # Inputs without hope take no draws: they end with n = 0, and a look without votes as their evidence.
        going = going[_optimistic_gap(pilot, noise, config, config.alpha_of_bound) > 0]
    count, drawn, best_p_lower, best_gap = (np.zeros(batch, kind) for kind in (np.int64, np.int64, float, float))
    best = Evidence(np.zeros(batch, np.int64), sizes[:, 0].copy(), alphas[:, 0].copy(), sizes[:, 0].copy())
    look, counts = 0, np.int64(0)  # of the inputs that go on, [m, K]
    while going.size:
        size = sizes[going, look]
        counts = counts + votes_in(Stage.ESTIMATE, going, drawn[going], size)
        votes, runner_up = votes_of(counts, selected[going], size, config.bound)
        seen = Evidence(votes, size, alphas[going, look], runner_up)
        count[going], drawn[going] = votes, size
        p_lower, gap = seen.bound_and_gap(noise)
        better = (gap > best_gap[going]) | ((gap == best_gap[going]) & (p_lower > best_p_lower[going]))
        for column, value in zip((*best, best_p_lower, best_gap), (*seen, p_lower, gap), strict=True):
            column[going[better]] = value[better]
        reached = best_gap[going]
        optimistic = _optimistic_gap(seen, noise, config, last_alpha[going], counted=True)
        if tolerance is None:
            enough = ((reached[:, None] >= goals[going]) | (optimistic[:, None] < goals[going])).all(axis=1)
        else:
            expected = np.rint(votes / size * n), np.rint(runner_up / size * n)
            gap_of_n = _gap(*expected, n, config.alpha_of_bound, noise, config.bound)
            enough = (optimistic == 0) | ((reached > 0) & (reached >= (1 - tolerance) * gap_of_n))
        more = ~enough & (size < n)
        going, counts, look = going[more], counts[more], look + 1
    return SequentialVotes(best, count, drawn, pilot_draws)


def _goals(sequential: SequentialConfig, scales: np.ndarray) -> np.ndarray:
    """The gaps that are to be decided, [batch, goals]: none for a tolerance."""
    goals = (np.array(sequential.radii or [])[:, None] / scales[:, None]).reshape(len(scales), -1)
    # A little larger, so that the table, which rounds down, shows a radius that was reached; with 1e-12, radius 0 is
    # reached only by a region.
    return np.maximum(goals * (1 + 1e-9), 1e-12)


def _looks(first: np.ndarray, config: CertifyConfig, *, planned: bool):
    """Sizes of the looks, n from the last one on, and their parts of alpha, [batch, looks]; and the last one's part."""
    looks = np.arange(_MOST_LOOKS)
    sizes = np.ceil(np.ceil(first[:, None] / UNIT) * _GROWTH**looks) * UNIT
    sizes = np.minimum(sizes, config.n).astype(np.int64)
    last = sizes.argmax(axis=1)[:, None]
    share, special = (_PLANNED_SHARE, 0) if planned else (_LAST_SHARE, last)
    shares = np.where(looks == special, share, (1 - share) / np.maximum(last, 1))
    alphas = np.where(last == 0, 1.0, shares) * (config.alpha_of_bound * (1 - 1e-12))  # no sum is rounded above it
    return sizes, alphas, np.take_along_axis(alphas, last, axis=1)[:, 0]


def _pilot(votes_in, selected: np.ndarray, config: CertifyConfig) -> Evidence:
    """Votes and draws of the pilot, which bound nothing; more draws where one of the two outcomes is rare."""
    batch, target, limit = len(selected), max(1, config.n // _PILOT_DIVISOR), max(1, config.n // _LARGEST_PILOT_DIVISOR)
    going, (votes, trials, runner_up) = np.arange(batch), np.zeros((3, batch), np.int64)
    counts = np.int64(0)  # of the inputs that go on, [m, K]
    while going.size:
        counts = counts + votes_in(Stage.PILOT, going, trials[going], np.full(len(going), target))
        votes[going], runner_up[going] = votes_of(counts, selected[going], target, config.bound)
        trials[going] = target
        more = (np.minimum(votes, runner_up)[going] < _RARE) & (target < limit)
        going, counts = going[more], counts[more]
        target = min(2 * target, limit)
    return Evidence(votes, trials, np.ones(batch), runner_up)


def _gap(votes, runner_up, size, alpha, noise: Noise, bound: Bound) -> np.ndarray:
    """The gap of so many votes of `size` draws, whole numbers."""
    votes = votes.astype(np.int64)
    others = size - votes
    runner_up = others if bound == "two-class" else np.clip(runner_up.astype(np.int64), 0, others)
    return Evidence(votes, size, alpha, runner_up).bound_and_gap(noise)[1]


def _planned_size(pilot: Evidence, noise: Noise, config: CertifyConfig, tolerance: float) -> np.ndarray:
    """How many draws will come near enough to what n draws give, if they vote as the pilot did."""
    rate, second = pilot.votes / pilot.n, pilot.runner_up / pilot.n

    def gap(size, alpha):
        return _gap(np.floor(rate * size), np.ceil(second * size), size, alpha, noise, config.bound)

    wanted = (1 - tolerance) * gap(np.full(len(rate), config.n), config.alpha_of_bound)
    low, high = np.ones(len(rate)), np.full(len(rate), float(config.n))
    for _ in range(20):
        middle = np.sqrt(low * high)
        enough = gap(np.ceil(middle).astype(np.int64), _PLANNED_SHARE * config.alpha_of_bound) >= wanted
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return 1.05 * high  # the pilot may be a little off


def _optimistic_gap(seen: Evidence, noise: Noise, config: CertifyConfig, alpha, *, counted: bool = False) -> np.ndarray:
    """The optimistic gap at n draws: the draws to come vote 2.6 standard deviations above the rate that was seen for
    the class, and as far below it for the runner-up.

    A goal above this gap is given up. The draws seen are among the n draws if `counted`, else those of a pilot.
    """
    n, trials = config.n, seen.n
    rest = n - trials if counted else np.full(np.shape(trials), n)

    def expected(votes, deviations):
        rate = (votes + 0.5) / (trials + 1)
        # Standard deviations of the votes to come: binomial, and that of the rate, which comes from `trials` draws.
        excess = deviations * np.sqrt(rest * rate * (1 - rate) * (1 + rest / trials))
        return votes * counted + rest * rate + excess

    votes = np.minimum(np.ceil(expected(seen.votes, _OPTIMISM_Z)), n)
    return _gap(votes, np.floor(expected(seen.runner_up, -_OPTIMISM_Z)), n, alpha, noise, config.bound)
