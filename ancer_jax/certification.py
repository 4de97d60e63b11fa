"""Prediction and certification of one input by Monte Carlo (Cohen et al. 2019, algorithm 1)."""

import dataclasses
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Key

from ancer_jax import bounds
from ancer_jax.certificates import Certificate, SplittingL1
from ancer_jax.classifiers import Classifier
from ancer_jax.smoothing import Stage, class_counts, stage_key

ABSTAIN = -1
_FLOAT32 = np.finfo(np.float32)


@dataclasses.dataclass(frozen=True)
class CertifyConfig:
    """Settings that change a certificate (defaults: Cohen et al. 2019).

    Attributes:
      n0: draws that select the class.
      n: fresh draws that estimate its probability; at most 2^31 - 1.
      alpha: probability that the certificate is wrong, per input, in (0, 1).

    Raises:
      ValueError: if a setting is out of range.
    """

    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001

    def __post_init__(self):
        for name in ("n0", "n"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value < 2**31:
                raise ValueError(f"{name} must be an int, at least 1 and below 2^31, got {value!r}")
        bounds.check_alpha(self.alpha)


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


def certification(selected, count, *, certificate: Certificate, config: CertifyConfig) -> Certification:
    """The host half of `certify`: certificates from integer counts, in float64. Arguments may be batched.

    Guarantee: as in `certify`, if `count` comes from draws that did not choose `selected`.
    """
    selected, count = np.asarray(selected), np.asarray(count)
    p_lower = bounds.clopper_pearson_lower(count, config.n, config.alpha)
    gap = certificate.gap(p_lower)
    prediction = np.where(gap > 0, selected, ABSTAIN)
    columns = (prediction, p_lower, gap, count, np.full(count.shape, config.n))
    return Certification(*(np.asarray(column)[()] for column in columns))


def exact_certification(counts, num_draws, *, certificate: SplittingL1) -> Certification:
    """Certificates from the votes for every class in all draws there are, of the exact form of splitting noise.

    Args:
      counts: integers [..., K]; ties go to the lowest class.
      num_draws: number of draws [...].
      certificate: the noise law.

    Returns:
      `p_lower` is the top class's probability, and `count` its votes of `n`; the classifier abstains where the second
      class is as frequent, or behind by one vote.

    Guarantee: no alpha; for inputs on the grid, see `SplittingL1`.
    """
    counts, num_draws = np.asarray(counts), np.asarray(num_draws)
    top = counts.argmax(axis=-1)
    second, first = np.partition(counts, -2, axis=-1)[..., -2:].transpose(-1, *range(counts.ndim - 1))
    gap = certificate.exact_gap(first, second, num_draws)
    return Certification(np.where(gap > 0, top, ABSTAIN), first / num_draws, gap, first, num_draws)


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
      theta: [] or [*d] noise parameter, positive, in the units of x. It must not depend on the draws of this call.
      config: n0, n, alpha.
      chunk: draws at a time; changes speed and memory only.

    Returns:
      A `Certification` of scalars, computed on the host. With `regions.Region(x, theta, gap, norm)` come its sizes.

    Guarantee: with probability at least `1 - alpha` over the draws, either the answer is `ABSTAIN`, or
    `g_theta(y) = prediction` for every y with `||(y - x) / theta||_p <= gap`. It speaks of the smoothed classifier
    of this theta, not of the base classifier; a theta that was chosen for x makes another smoothed classifier for
    every input.

    Raises:
      ValueError: if theta or x is not finite, theta is not positive, or shapes do not fit.

    References: Cohen et al. 2019 (arXiv 1902.02918), algorithm 1; Eiras et al. 2022 (arXiv 2107.04570).
    """
    x32, theta32 = check_example(x, theta)
    config = config or CertifyConfig()
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

    Compares the two largest counts by an exact binomial test. Arguments and errors as in `certify`.

    Guarantee: with probability at least `1 - alpha` the answer is `ABSTAIN` or `g_theta(x)`, of x and theta as float32.

    References: Cohen et al. 2019 (arXiv 1902.02918), algorithm 1, after Hung & Fithian 2019.
    """
    x, theta = check_example(x, theta)
    bounds.check_alpha(alpha)
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
