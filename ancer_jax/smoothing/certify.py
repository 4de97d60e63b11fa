"""Prediction and certification by Monte Carlo (Cohen et al. 2019, algorithm 1)."""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from ancer_jax._checks import check_integer, check_real, check_type
from ancer_jax.smoothing import bounds
from ancer_jax.smoothing.certificate import (
    ABSTAIN,
    Certificate,
    CertifyConfig,
    certificate_from_evidence,
    random_evidence,
    theta_of_each,
    votes_of,
)
from ancer_jax.smoothing.noise import Noise, noise_dtype
from ancer_jax.smoothing.smoothed import (
    Smoothed,
    Stage,
    check_key,
    check_random,
    check_theta_shape,
    class_counts,
    count_range,
    stage_key,
)

_FLOAT32 = np.finfo(np.float32)
_CHUNK = 1000  # draws at a time, where nothing is asked for


def count_votes(
    key: Key[Array, ""], smoothed: Smoothed, x: Float[ArrayLike, "*d"], *, config: CertifyConfig, chunk: int
) -> tuple[Int[Array, ""], Int[Array, "..."]]:
    """The traced half of `certify`, for jit, vmap and many devices: the selected class and its count.

    `config.n0` draws select the class, `config.n` fresh draws count it. Arguments as in `class_counts`; `key` is the
    example's key, the stages are folded in here. Returns the class and its count among the n draws, int32 [] each;
    with `config.bound = "separate"` the count is int32 [2], that of the class and that of the runner-up.
    `certificate_from_votes` makes a certificate of them.
    """
    refuse_narrow(x)
    selected = class_counts(stage_key(key, Stage.SELECT), smoothed, x, num_samples=config.n0, chunk=chunk).argmax()
    counts = class_counts(stage_key(key, Stage.ESTIMATE), smoothed, x, num_samples=config.n, chunk=chunk)
    votes, runner_up = votes_of(counts, selected, config.n, config.bound)
    return selected, votes if config.bound == "two-class" else jnp.stack([votes, runner_up])


def certificate_from_votes(
    smoothed: Smoothed, x: ArrayLike, selected: ArrayLike, count: ArrayLike, *, config: CertifyConfig
) -> Certificate:
    """The host half of `certify`: certificates from integer counts, in float64. Arguments may be batched.

    They are certificates around x and theta in JAX's precision (float32 by default), with which the votes were counted,
    and of the network that got copies of that type; `certify` and `predict` give it float32.

    Args:
      smoothed: of theta [], [*d], [...] or [..., *d].
      x: [..., *d].
      selected, count: int [...], as `count_votes` returns them; with `config.bound = "separate"` count is [..., 2].
      config: the settings that they were counted with.

    Guarantee: as in `certify`, if `count` comes from draws that did not choose `selected`.

    Raises:
      ValueError: if the noise is enumerable, a count is out of range or not of the bound of `config`, x is not finite
        or of a type below 32 bits, or theta is not positive and finite, or of another shape.
    """
    check_random(smoothed.noise)
    votes, runner_up = count, None
    expected = np.shape(selected) + (2,) * (config.bound == "separate")
    if np.shape(count) != expected:
        there = f"count must have shape {list(expected)} for {config.bound} bounds and this selected class"
        raise ValueError(f"{there}, got {list(np.shape(count))}")
    if config.bound == "separate":
        votes, runner_up = np.moveaxis(np.asarray(count), -1, 0)
    refuse_narrow(x)
    x = np.array(jnp.asarray(x))  # x and theta as the traced program had them; copies: the caller may write to them
    smoothed = smoothed.with_theta(np.array(jnp.asarray(smoothed.theta, noise_dtype(x))))
    _check_values(x, np.asarray(smoothed.theta))
    evidence = random_evidence(votes, config, runner_up)
    return certificate_from_evidence(selected, evidence, smoothed, x, alpha=config.alpha)


def refuse_narrow(x: ArrayLike) -> None:
    """Refuse to count votes for inputs below 32 bits: the network gets copies of their type, so they would be votes of
    another function, which rounds first.
    """
    dtype = jnp.result_type(x)
    _check_floating("x", dtype)
    if jnp.finfo(dtype).bits < 32:
        raise ValueError(f"x must be float32 when votes are counted, got {dtype}: the network sees copies of this type")


def warn_if_undecidable(config: CertifyConfig, noise: Noise) -> None:
    """Warn where every input would abstain, whatever the votes."""
    if noise.gap(bounds.clopper_pearson_lower(config.n, config.n, config.alpha_of_bound)) == 0:
        least = math.floor(math.log2(1 / config.alpha_of_bound)) + 1
        warnings.warn(
            f"with n = {config.n} draws every input abstains at alpha = {config.alpha:g}, whatever the votes: n must "
            f"be at least {least}, and far larger for a region of any size",
            stacklevel=3,
        )


def certify(
    key: Key[Array, ""],
    smoothed: Smoothed,
    x: Float[ArrayLike, "*d"],
    *,
    config: CertifyConfig = CertifyConfig(),
    chunk: int = _CHUNK,
) -> Certificate:
    """Certify the smoothed classifier at `x`.

    Args:
      key: the example's typed key; use one per example. Selection and estimation draw from independent stages of it,
        and so do the theta searches: the same key may go to all of them.
      smoothed: smoothed classifier. Its base classifier must pass `check_classifier`: nothing is checked here.
      x: [*d] one input.
      config: n0, n, alpha, bound.
      chunk: draws at a time; changes speed and memory, never the draws.

    Returns:
      A `Certificate` of scalars, computed on the host; `.radius`, `.proxy_radius` and `.log_volume` are its sizes.
      Where n is too small for any count to decide at this alpha, a warning says so.

    Guarantee: with probability at least `1 - alpha` over the draws, either the answer is `ABSTAIN`, or the smoothed
    classifier gives `prediction` for every y with `||B(y - x) / theta||_norm <= gap`, where B gives coefficients in the
    basis of the noise: usually the pixels. This speaks of the smoothed classifier of this theta, not of the base
    classifier. A theta that was chosen for x makes another smoothed classifier for every input. Neither x nor theta may
    depend on the draws: x must not come from somebody who knows the key, and theta must not be the best of several that
    were certified with the same draws.

    Raises:
      ValueError: if theta or x is not finite, theta is not positive, shapes do not fit, the noise is enumerable, or
        `chunk` is not an integer.
      TypeError: if theta or x is traced.

    References: Cohen et al. 2019 (arXiv 1902.02918), algorithm 1; Eiras et al. 2022 (arXiv 2107.04570).
    """
    check_type("smoothed", smoothed, Smoothed, "Smoothed(classifier, noise, theta)")
    check_type("config", config, CertifyConfig, "CertifyConfig(n=...)")
    check_integer("chunk", chunk)
    warn_if_undecidable(config, smoothed.noise)
    return _certify(key, smoothed, x, config, chunk)


def _certify(key: Key[Array, ""], smoothed: Smoothed, x: ArrayLike, config: CertifyConfig, chunk: int) -> Certificate:
    as_float32, x32 = check_example(smoothed, x)
    check_random(smoothed.noise)
    counts = lambda stage, n: np.asarray(count_range(stage_key(key, stage), as_float32, x32, (0, n), chunk=chunk))
    selected = counts(Stage.SELECT, config.n0).argmax()
    votes, runner_up = votes_of(counts(Stage.ESTIMATE, config.n), selected, config.n, config.bound)
    evidence = random_evidence(votes, config, runner_up)
    certificate = certificate_from_evidence(selected, evidence, as_float32, x32, alpha=config.alpha)
    return undo_float32_rounding(certificate, smoothed, x)


def certify_batch(
    key: Key[Array, ""],
    smoothed: Smoothed,
    xs: Float[ArrayLike, "m *d"],
    *,
    ids: Int[ArrayLike, " m"] | Sequence[int] | None = None,
    config: CertifyConfig = CertifyConfig(),
    chunk: int = _CHUNK,
) -> Certificate:
    """`certify` at many inputs, from one key: a `Certificate` with a row for each input.

    Args:
      key: typed key of the batch; input i uses `fold_in(key, ids[i])`, as a run does with `jax.random.key(seed)`. Two
        calls with one key and the same ids use the same draws: do not choose theta by one and certify by the other. The
        keys of `jax.random.split(key, m)` are those of ids 0 to m - 1: for other draws take another seed.
      smoothed: smoothed classifier of theta [] or [*d]; or, of theta [m] or [m, *d], one for each input. For m
        inputs [m], theta [m] could mean both, and is refused.
      config, chunk: as in `certify`.
      xs: [m, *d] inputs.
      ids: numbers that name the inputs, in [0, 2^31), all different; by default 0, ..., m - 1.

    Guarantee: each row's, as in `certify`. A theta for each input makes per-input smoothed classifiers, of which
    `Memory.insert_batch` makes one.

    Raises:
      ValueError: as in `certify`; if there are no inputs, or thetas or ids do not fit.
    """
    check_type("config", config, CertifyConfig, "CertifyConfig(n=...)")
    check_integer("chunk", chunk)
    examples = _examples(key, smoothed, ids, xs)
    warn_if_undecidable(config, smoothed.noise)
    rows = [_certify(*example, config, chunk) for example in examples]
    return jax.tree.map(lambda *values: np.stack(values), *rows)


def _examples(
    key: Key[Array, ""], smoothed: Smoothed, ids: ArrayLike | Sequence[int] | None, xs: ArrayLike
) -> list[tuple[Any, Smoothed, np.ndarray]]:
    """The key of each input of a batch, its smoothed classifier, and the input; keys, ids and shapes are checked."""
    check_type("smoothed", smoothed, Smoothed, "Smoothed(classifier, noise, theta)")
    _refuse_tracers(smoothed.theta, xs)
    check_key(key)
    count = np.shape(xs)[0] if np.ndim(xs) else 0
    if not count:
        raise ValueError(f"xs must be one or more inputs [m, *d], got shape {list(np.shape(xs))}")
    numbers = np.arange(count) if ids is None else np.asarray(ids)
    if numbers.shape != (count,) or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(f"ids must be {count} integers, got {numbers.dtype} {list(numbers.shape)}")
    if numbers.min() < 0 or numbers.max() >= 2**31:
        raise ValueError(f"ids must be in 0..2^31 - 1, got {numbers.min()} to {numbers.max()}")
    names, times = np.unique(numbers, return_counts=True)
    if times.max() > 1:
        raise ValueError(f"ids must be different numbers, got {names[times.argmax()]} {times.max()} times")
    xs = np.asarray(xs)
    thetas = theta_of_each(smoothed.theta, (count,), xs.shape[1:])
    keys = [jax.random.fold_in(key, i) for i in numbers.astype(np.uint32)]
    return list(zip(keys, map(smoothed.with_theta, thetas), xs, strict=True))


def undo_float32_rounding(certificate: Certificate, smoothed: Smoothed, x: ArrayLike) -> Certificate:
    """The certificate of the caller's x and theta, from one that was made for them as float32.

    Rounding shifts and stretches the caller's region: its gap is reduced until it provably lies inside the region that
    was certified. Abstains if that gap is 0.
    """
    region = certificate.region
    center, center32, theta, theta32 = (
        np.asarray(value, np.float64) for value in (x, region.center, smoothed.theta, region.theta)
    )
    moved = center - center32
    shift = np.linalg.norm(np.ravel(region.basis.coefficients(moved) / theta32), ord=region.norm)
    error = region.basis.rounding(moved.shape, np.float64) * np.linalg.norm(moved)
    shift += error * np.linalg.norm(1 / np.broadcast_to(theta32, moved.shape))
    stretch = np.maximum(1.0, np.max(theta / theta32))
    # 1e-9 is far above the rounding of these sums in float64.
    gap = np.maximum(np.asarray(region.gap) - shift * (1 + 1e-9), 0.0) / stretch
    # Copies: the caller may write to these arrays later.
    region = smoothed.noise.region(np.array(x), np.array(smoothed.theta), gap)
    prediction = np.where(gap > 0, np.asarray(certificate.prediction), ABSTAIN)[()]
    return dataclasses.replace(certificate, region=region, prediction=prediction)


def predict(
    key: Key[Array, ""],
    smoothed: Smoothed,
    x: Float[ArrayLike, "*d"],
    *,
    n: int = 1000,
    alpha: float = 0.001,
    chunk: int = _CHUNK,
) -> int:
    """The smoothed classifier's class at `x`, or `ABSTAIN` where the n draws do not decide it.

    Compares the two largest counts by an exact binomial test. Arguments and errors as in `certify`. Where n is too
    small for any count to decide at this alpha, a warning says so.

    Guarantee: with probability at least `1 - alpha` the answer is `ABSTAIN` or the smoothed classifier's class, of x
    and theta as float32, if x does not depend on the draws. To serve, take a new and unpredictable key for each query:
    with one key for all, whoever knows the draws can send inputs on which these draws give a wrong answer.

    References: Cohen et al. 2019 (arXiv 1902.02918), algorithm 1, after Hung & Fithian 2019.
    """
    check_integer("chunk", chunk)
    _check_prediction(n, alpha)
    return _predict(key, smoothed, x, n, alpha, chunk)


def _check_prediction(n: int, alpha: float) -> None:
    """Refuse what is out of range; warn where every input would abstain."""
    check_integer("n", n, 1, 2**31 - 1)
    check_real("alpha", alpha, f"[{bounds.LEAST_ALPHA}, 1)")
    if bounds.binomial_test(n, 0) > alpha:
        least = math.ceil(math.log2(2 / alpha) + 2e-6)  # p-values are rounded up by a millionth
        warnings.warn(
            f"n = {n} draws decide nothing at alpha = {alpha:g}, whatever the votes: n must be at least {least}",
            stacklevel=3,
        )


def _predict(key: Key[Array, ""], smoothed: Smoothed, x: ArrayLike, n: int, alpha: float, chunk: int) -> int:
    smoothed, x = check_example(smoothed, x)
    key = stage_key(key, Stage.PREDICT)
    check_random(smoothed.noise)
    counts = np.asarray(count_range(key, smoothed, x, (0, n), chunk=chunk))
    top, second = np.argsort(-counts, kind="stable")[:2]
    return int(top) if bounds.binomial_test(counts[top], counts[second]) <= alpha else ABSTAIN


def predict_batch(
    key: Key[Array, ""],
    smoothed: Smoothed,
    xs: Float[ArrayLike, "m *d"],
    *,
    ids: Int[ArrayLike, " m"] | Sequence[int] | None = None,
    n: int = 1000,
    alpha: float = 0.001,
) -> Int[np.ndarray, " m"]:
    """`predict` at many inputs, from one key: int64 [m].

    `key`, `smoothed`, `xs`, `ids` and errors as in `certify_batch`; `n` and `alpha` as in `predict`.
    """
    _check_prediction(n, alpha)
    return np.array([_predict(*example, n, alpha, _CHUNK) for example in _examples(key, smoothed, ids, xs)])


def check_example(smoothed: Smoothed, x: ArrayLike) -> tuple[Smoothed, jax.Array]:
    """`smoothed` and `x` with theta and x as float32, if they can be certified. Values are checked here, not in jit."""
    check_type("smoothed", smoothed, Smoothed, "Smoothed(classifier, noise, theta)")
    _refuse_tracers(smoothed.theta, x)
    x, theta = np.asarray(x), np.asarray(smoothed.theta)
    if np.issubdtype(theta.dtype, np.integer):
        theta = theta.astype(np.float64)
    if not x.size:
        raise ValueError(f"x must not be empty, got shape {list(x.shape)}")
    _check_values(x, theta)
    check_theta_shape(theta, x.shape)
    return smoothed.with_theta(jnp.asarray(theta, jnp.float32)), jnp.asarray(x, jnp.float32)


def _check_values(x: np.ndarray, theta: np.ndarray) -> None:
    for name, value in (("x", x), ("theta", theta)):
        _check_floating(name, value.dtype)
        if (infinite := ~(abs(value) <= _FLOAT32.max)).any():
            raise ValueError(f"{name} must be finite as float32, got {value[infinite].flat[0]}")
    if not (theta >= _FLOAT32.tiny).all():
        raise ValueError(f"theta must be positive as float32, got {theta.min()}")


def _check_floating(name: str, dtype: np.dtype) -> None:
    if not jnp.issubdtype(dtype, jnp.floating):
        hint = " (divide 8-bit pixels by 255)" if dtype == np.uint8 else ""
        raise ValueError(f"{name} must be floating point, got {dtype}{hint}")


def _refuse_tracers(*values: ArrayLike) -> None:
    if any(isinstance(value, jax.core.Tracer) for value in values):
        raise TypeError("certify and predict report on the host; under jit and vmap use count_votes")
