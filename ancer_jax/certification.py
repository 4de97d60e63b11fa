"""Prediction and certification of one input by Monte Carlo (Cohen et al. 2019, algorithm 1)."""

import dataclasses
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Key

from ancer_jax import bounds
from ancer_jax._checks import check_integer, check_real
from ancer_jax.certificates import Certificate, SplittingL1
from ancer_jax.classifiers import Classifier
from ancer_jax.smoothing import Stage, check_random, class_counts, stage_key

ABSTAIN = -1
_FLOAT32 = np.finfo(np.float32)


@dataclasses.dataclass(frozen=True)
class CertifyConfig:
    """Settings that change a certificate (defaults: Cohen et al. 2019).

    Attributes:
      n0: draws that select the class.
      n: fresh draws that estimate its probability; at most 2^31 - 1.
      alpha: probability that a certificate fails, for each input; in [1e-200, 1).

    Raises:
      ValueError: if a setting is out of range.
    """

    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001

    def __post_init__(self):
        for name in ("n0", "n"):
            check_integer(name, getattr(self, name), 1, 2**31 - 1)
            object.__setattr__(self, name, int(getattr(self, name)))
        check_real("alpha", self.alpha, f"[{bounds.LEAST_ALPHA}, 1)")
        object.__setattr__(self, "alpha", float(self.alpha))


@dataclasses.dataclass(frozen=True)
class Certification:
    """What was certified; float64 and integers on the host, rounded towards zero. Fields may be batched.

    Attributes:
      prediction: the class, or `ABSTAIN` (-1).
      p_lower: lower bound of the selected class's probability.
      gap: size of the certified region in units of theta; 0 where the classifier abstains.
      count: how many of the n draws voted for the selected class.
      n: number of draws.
    """

    prediction: Any
    p_lower: Any
    gap: Any
    count: Any
    n: Any


def count_votes(
    key: Key[Array, ""],
    classifier: Classifier,
    certificate: Certificate,
    x: Float[ArrayLike, "*d"],
    theta: Float[ArrayLike, "..."],
    *,
    config: CertifyConfig,
    chunk: int,
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The traced half of `certify`, for jit, vmap and many devices: the selected class and its count.

    `config.n0` draws select the class, `config.n` fresh draws count it. Arguments as in `class_counts`; `key` is the
    example's key, the stages are folded in here.

    Returns:
      int32 [] selected class, int32 [] its count among the n draws; `certification` turns them into a certificate.
    """
    selected = select_class(key, classifier, certificate, x, theta, n0=config.n0, chunk=chunk)
    counts = class_counts(
        stage_key(key, Stage.ESTIMATE), classifier, certificate, x, theta, num_samples=config.n, chunk=chunk
    )
    return selected, counts[selected]


def select_class(
    key: Key[Array, ""],
    classifier: Classifier,
    certificate: Certificate,
    x: Float[ArrayLike, "*d"],
    theta: Float[ArrayLike, "..."],
    *,
    n0: int,
    chunk: int,
) -> Int[Array, ""]:
    """The class that most of `n0` draws vote for, int32 []; arguments as in `count_votes`."""
    counts = class_counts(stage_key(key, Stage.SELECT), classifier, certificate, x, theta, num_samples=n0, chunk=chunk)
    return counts.argmax()


class Evidence(NamedTuple):
    """The integers that a certificate follows from, [...] each: what a run stores beside its gaps, to check them.

    Attributes:
      votes, n: votes for the class, and draws, of the bound that counts: all n draws, or those of the best look of
        sequential sampling.
      alpha: error probability of that bound; 0 for exact certificates.
      runner_up: votes for the second class, of exact certificates; else the most that it can have.
    """

    votes: np.ndarray
    n: np.ndarray
    alpha: np.ndarray
    runner_up: np.ndarray

    def bound_and_gap(self, certificate: Certificate) -> tuple[np.ndarray, np.ndarray]:
        """`p_lower` and gap, float64 [...]."""
        if isinstance(certificate, SplittingL1) and certificate.exact:
            return self.votes / self.n, certificate.exact_gap(self.votes, self.runner_up, self.n)
        p_lower = bounds.clopper_pearson_lower(self.votes, self.n, self.alpha)
        return p_lower, certificate.gap(p_lower)


def certification(selected, count, *, certificate: Certificate, config: CertifyConfig) -> Certification:
    """The host half of `certify`: certificates from integer counts, in float64. Arguments may be batched.

    Guarantee: as in `certify`, if `count` comes from draws that did not choose `selected`.

    Raises:
      ValueError: if the noise is the exact form of splitting noise, or a count is out of range.
    """
    check_random(certificate)
    return certification_from(selected, all_draws(count, config), certificate)


def all_draws(count, config: CertifyConfig) -> Evidence:
    """The evidence where all `config.n` draws are counted."""
    count = np.asarray(count)
    return Evidence(count, np.full(count.shape, config.n), np.full(count.shape, config.alpha), config.n - count)


def exact_evidence(counts, num_draws) -> tuple[np.ndarray, Evidence]:
    """The top class, ties to the lowest, and the evidence of the votes of all draws there are, integers [..., K]."""
    counts, num_draws = np.asarray(counts), np.asarray(num_draws)
    second, first = np.partition(counts, -2, axis=-1)[..., -2:].transpose(-1, *range(counts.ndim - 1))
    return counts.argmax(axis=-1), Evidence(first, num_draws, np.zeros(num_draws.shape), second)


def certification_from(selected, evidence: Evidence, certificate: Certificate) -> Certification:
    """The certificates of the classes `selected`, in float64 on the host.

    Guarantee: as in `certify`, if the evidence comes from draws that did not choose `selected`. Exact: no alpha; for
    inputs on the grid, see `SplittingL1`.
    """
    p_lower, gap = evidence.bound_and_gap(certificate)
    prediction = np.where(gap > 0, np.asarray(selected), ABSTAIN)
    columns = (prediction, p_lower, gap, evidence.votes, evidence.n)
    return Certification(*(np.asarray(column)[()] for column in columns))


def warn_if_undecidable(config: CertifyConfig, certificate: Certificate) -> None:
    """Warn where every input would abstain, whatever the votes."""
    if certificate.gap(bounds.clopper_pearson_lower(config.n, config.n, config.alpha)) == 0:
        least = math.floor(math.log2(1 / config.alpha)) + 1
        warnings.warn(
            f"with n = {config.n} draws every input abstains at alpha = {config.alpha:g}, whatever the votes: n must "
            f"be at least {least}, and far larger for a region of any size",
            stacklevel=3,
        )


_count_votes = jax.jit(count_votes, static_argnames=("certificate", "config", "chunk"))


def certify(
    key: Key[Array, ""],
    classifier: Classifier,
    certificate: Certificate,
    x: Float[ArrayLike, "*d"],
    theta: Float[ArrayLike, "..."],
    *,
    config: CertifyConfig | None = None,
    chunk: int = 1000,
) -> Certification:
    """Certify the smoothed classifier `g_theta` at `x`.

    Args:
      key: the example's typed key; use one per example. Selection and estimation draw from independent stages of it,
        and so do the theta searches: the same key may go to all of them.
      classifier: base classifier, which need not be robust, but must pass `check_classifier`: nothing is checked here.
      certificate: noise law, `GaussianL2()` or `UniformL1()`.
      x: [*d] one input.
      theta: [] or [*d] noise parameter, positive, in the units of x.
      config: n0, n, alpha.
      chunk: draws at a time; changes speed and memory only.

    Returns:
      A `Certification` of scalars, computed on the host. With `regions.Region(x, theta, gap, norm)` come its sizes.
      Where n is too small for any count to decide at this alpha, a warning says so.

    Guarantee: with probability at least `1 - alpha` over the draws, either the answer is `ABSTAIN`, or
    `g_theta(y) = prediction` for every y with `||(y - x) / theta||_p <= gap`. It speaks of the smoothed classifier
    of this theta, not of the base classifier; a theta that was chosen for x makes another smoothed classifier for
    every input. Neither x nor theta may depend on the draws: not x by somebody who knows the key, and not theta as the
    best of several that were certified with the same draws.

    Raises:
      ValueError: if theta or x is not finite, theta is not positive, shapes do not fit, or `chunk` is not an integer.

    References: Cohen et al. 2019 (arXiv 1902.02918), algorithm 1; Eiras et al. 2022 (arXiv 2107.04570).
    """
    x32, theta32 = check_example(x, theta)
    check_integer("chunk", chunk)
    config = config or CertifyConfig()
    warn_if_undecidable(config, certificate)
    selected, count = _count_votes(key, classifier, certificate, x32, theta32, config=config, chunk=chunk)
    result = certification(selected, count, certificate=certificate, config=config)
    return in_callers_numbers(result, certificate, x, theta, x32, theta32)


def in_callers_numbers(result: Certification, certificate: Certificate, x, theta, x32, theta32) -> Certification:
    """The part of a region around x and theta as float32, which were certified, that has the caller's x and theta."""
    center, center32, axes, axes32 = (np.asarray(value, np.float64) for value in (x, x32, theta, theta32))
    shift = np.linalg.norm(np.ravel((center - center32) / axes32), ord=certificate.norm)
    stretch = np.maximum(1.0, np.max(axes / axes32))
    gap = np.maximum(result.gap - shift, 0.0) / stretch
    return dataclasses.replace(result, gap=gap, prediction=np.where(gap > 0, result.prediction, ABSTAIN)[()])


_class_counts = jax.jit(class_counts, static_argnames=("certificate", "num_samples", "chunk"))


def predict(
    key: Key[Array, ""],
    classifier: Classifier,
    certificate: Certificate,
    x: Float[ArrayLike, "*d"],
    theta: Float[ArrayLike, "..."],
    *,
    n: int = 1000,
    alpha: float = 0.001,
    chunk: int = 1000,
) -> int:
    """The smoothed classifier's class at `x`, or `ABSTAIN` where the n draws do not decide it.

    Compares the two largest counts by an exact binomial test. Arguments and errors as in `certify`. Where n is too
    small for any count to decide at this alpha, a warning says so.

    Guarantee: with probability at least `1 - alpha` the answer is `ABSTAIN` or `g_theta(x)`, of x and theta as float32,
    if x does not depend on the draws. Whoever serves takes a new key for each query, which nobody can predict: with one
    key for all, somebody who knows the draws repeats those queries that they get wrong.

    References: Cohen et al. 2019 (arXiv 1902.02918), algorithm 1, after Hung & Fithian 2019.
    """
    x, theta = check_example(x, theta)
    check_integer("n", n, 1, 2**31 - 1)
    check_integer("chunk", chunk)
    check_real("alpha", alpha, f"[{bounds.LEAST_ALPHA}, 1)")
    if bounds.binomial_test(n, 0) > alpha:
        least = math.ceil(math.log2(2 / alpha) + 2e-6)
        warnings.warn(
            f"n = {n} draws decide nothing at alpha = {alpha:g}, whatever the votes: n must be at least {least}",
            stacklevel=2,
        )
    counts = np.asarray(
        _class_counts(stage_key(key, Stage.PREDICT), classifier, certificate, x, theta, num_samples=n, chunk=chunk)
    )
    top, second = np.argsort(-counts, kind="stable")[:2]
    return int(top) if bounds.binomial_test(counts[top], counts[second]) <= alpha else ABSTAIN


def check_example(x, theta):
    """`x` and `theta` as float32 arrays, if they can be certified (values are checked here, outside jit).

    Raises:
      ValueError: naming the argument and the value.
      TypeError: under jit or vmap, where values cannot be checked and nothing can be reported: use `count_votes`.
    """
    if isinstance(x, jax.core.Tracer) or isinstance(theta, jax.core.Tracer):
        raise TypeError("certify and predict report on the host; under jit and vmap use count_votes")
    x, theta = np.asarray(x), np.asarray(theta)
    for name, value in (("x", x), ("theta", theta)):
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {value.dtype}")
        if (infinite := ~(abs(value) <= _FLOAT32.max)).any():
            raise ValueError(f"{name} must be finite as float32, got {value[infinite].flat[0]}")
    if theta.shape not in ((), x.shape):
        raise ValueError(f"theta must be a scalar or have x's shape {list(x.shape)}, got {list(theta.shape)}")
    if not (theta >= _FLOAT32.tiny).all():
        raise ValueError(f"theta must be positive as float32, got {theta.min()}")
    return jnp.asarray(x, jnp.float32), jnp.asarray(theta, jnp.float32)
