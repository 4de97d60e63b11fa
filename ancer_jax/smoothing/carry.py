"""Certificates of a changed network, from those of the original network and few common draws.

With the same draws for f and f', `P(f' = c) >= P(f = c) - P(f = c and f' != c)`. A certificate bounds the first
probability on the right from below; the votes that f has for c and f' has not, among common draws, bound the second one
from above.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from ancer_jax._checks import check_integer, check_real, check_type
from ancer_jax._numerics import HostValues
from ancer_jax.smoothing import bounds
from ancer_jax.smoothing.certificate import ABSTAIN, Certificate
from ancer_jax.smoothing.certify import check_example, refuse_narrow, undo_float32_rounding
from ancer_jax.smoothing.classifier import WRAP_IT, Classifier, from_host
from ancer_jax.smoothing.noise import Noise
from ancer_jax.smoothing.smoothed import Smoothed, Stage, check_random, class_counts, count_range, stage_key


@dataclasses.dataclass(frozen=True)
class CarryConfig:
    """How a certificate is carried to a changed network.

    Even if no vote is lost, `p_lower` falls by `1 - alpha^(1/n)`, about `log(1/alpha) / n`: by default 0.0009. That
    takes a Gaussian gap of 1.644 (`p_lower` = 0.95) to 1.635, and 3.81, the largest that 100,000 draws prove, to 3.09;
    with n = 100,000, to 3.59. alpha, which adds to that of the certificate, matters little: a tenth of Cohen et al.'s
    0.001, as here, costs a third more than all of it would.

    Attributes:
      n: common draws, for each of which both networks run; at most 2^31 - 1.
      alpha: probability that the bound on lost votes fails, for each input; in [1e-200, 1).

    Raises:
      ValueError: if a setting is out of range.
    """

    n: int = 10_000
    alpha: float = 0.0001

    def __post_init__(self):
        check_integer("n", self.n, 1, 2**31 - 1)
        check_real("alpha", self.alpha, f"[{bounds.LEAST_ALPHA}, 1)")


def carry(
    key: Key[Array, ""],
    certificate: Certificate,
    smoothed: Smoothed,
    changed: Classifier,
    *,
    config: CarryConfig = CarryConfig(),
    chunk: int = 1000,
) -> Certificate:
    """Carry a certificate of one input to a changed network: quantised, pruned, of another precision, or retrained.

    Args:
      key: the example's typed key, as in `certify`; it may be the same one.
      certificate: of `smoothed` at one input, by `certify` or `certify_sequentially`, or a row of `certify_batch`. What
        was carried may be carried on: each time, alpha of the config is added to the certificate's.
      smoothed: the smoothed classifier that was certified. Another classifier, or another noise law of the same norm
        and basis, is not noticed: the result then certifies nothing.
      changed: the changed network. Both run at the current `jax.default_matmul_precision`, which must be that of the
        certificate; a network that has another one sets it in its own `apply`, as `carry_run` does.
      config: n, alpha.
      chunk: draws at a time; changes speed and memory only.

    Returns:
      The certificate of the changed network: same class, theta and center, smaller `p_lower` and region, or an
      abstention. An abstention stays one, with `p_lower` 0, for it does not say which class was counted. Its `count`
      and `n` are those of the certificate before.

    Guarantee: as in `certify`, for the changed network, with probability at least `1 - alpha` over both sets of draws,
    where alpha is the sum of `certificate.alpha` and `config.alpha`, as the result has it. The changed network must not
    depend on the common draws: if it is one of several that were compared by carrying, carry with another key than the
    one that compared them.

    Raises:
      ValueError: if the certificate is a batch, or not of this theta, norm and basis; if the classifiers do not have
        the same number of classes; as in `certify`.

    References: Ugare et al. 2024 (arXiv 2305.19521), who count all draws on which the networks disagree.
    """
    check_type("config", config, CarryConfig, "CarryConfig(n=...)")
    check_integer("chunk", chunk)
    region, lost = certificate.region, 0
    if np.ndim(certificate.p_lower):
        raise ValueError("certificate must be of one input: carry the rows of a batch one by one, each with its key")
    check_random(smoothed.noise)
    of_region, x = check_example(smoothed.with_theta(region.theta), region.center)
    theta = np.asarray(smoothed.theta, np.float32)
    if theta.shape not in ((), x.shape) or not (theta == np.asarray(of_region.theta)).all():
        raise ValueError("the certificate is of another theta than that of the smoothed classifier")
    if certificate.prediction != ABSTAIN:
        selected = int(certificate.prediction)
        check_integer("the certified class", selected, 0, smoothed.classifier.num_classes - 1)
        compared = dataclasses.replace(of_region, classifier=losing_classifier(smoothed.classifier, changed))
        lost = count_range(stage_key(key, Stage.CARRY), compared, x, (0, config.n), chunk=chunk)[selected]
    return certificate_from_lost_votes(certificate, smoothed, np.asarray(lost), config=config)


def count_lost_votes(
    key: Key[Array, ""],
    smoothed: Smoothed,
    changed: Classifier,
    x: Float[ArrayLike, "*d"],
    *,
    config: CarryConfig,
    chunk: int,
) -> Int[Array, " K"]:
    """The traced half of `carry`, for jit, vmap and many devices: the votes that each class loses.

    `lost[c] = #{i : f votes for c on draw i, and the changed network does not}` among `config.n` common draws, int32
    [K]. A draw with a NaN logit votes for no class. Other arguments as in `count_votes`; `certificate_from_lost_votes`
    makes a certificate of the entry of the certified class.
    """
    refuse_narrow(x)
    compared = dataclasses.replace(smoothed, classifier=losing_classifier(smoothed.classifier, changed))
    return class_counts(stage_key(key, Stage.CARRY), compared, x, num_samples=config.n, chunk=chunk)[:-1]


def certificate_from_lost_votes(
    certificate: Certificate, smoothed: Smoothed, lost: ArrayLike, *, config: CarryConfig
) -> Certificate:
    """The host half of `carry`: certificates of a changed network from integer counts, in float64.

    Args:
      certificate: [...] of the original network.
      smoothed: its smoothed classifier, whose noise is used, which must be the one that was certified; center and theta
        are those of the certificate.
      lost: int [...], how many votes its class loses among `config.n` common draws.
      config: the settings that they were counted with.

    Guarantee: as in `carry`, if the draws of `lost` chose neither class nor theta, and all votes are of the float32
      values of center and theta.

    Raises:
      ValueError: if the noise is enumerable or of another norm or basis, or a count is out of range.
    """
    check_random(smoothed.noise)
    if np.ndim(certificate.p_lower):
        counts = np.broadcast_to(lost, np.shape(certificate.p_lower))
        rows = [
            certificate_from_lost_votes(certificate[row], smoothed, count, config=config)
            for row, count in enumerate(counts)
        ]
        return jax.tree.map(lambda *values: np.stack(values), *rows)
    region, noise = certificate.region, smoothed.noise
    if (region.norm, region.basis) != (noise.norm, noise.basis):
        raise ValueError(f"the certificate is not of {noise}: its norm is l{region.norm}, its basis {region.basis}")
    smoothed = smoothed.with_theta(region.theta)
    as_float32, x = check_example(smoothed, region.center)
    draws = config.n * (np.asarray(certificate.prediction) != ABSTAIN)
    p_lower, gap = carried_bound_and_gap(certificate.p_lower, lost, draws, config.alpha, noise)
    prediction = np.where(gap > 0, certificate.prediction, ABSTAIN)[()]
    counted = noise.region(np.asarray(x), np.asarray(as_float32.theta), gap[()])
    alpha = np.nextafter(certificate.alpha + config.alpha, np.inf)  # rounded up
    carried = dataclasses.replace(certificate, prediction=prediction, region=counted, p_lower=p_lower[()], alpha=alpha)
    return undo_float32_rounding(carried, smoothed, region.center)


def carried_bound_and_gap(
    p_lower: ArrayLike, lost: ArrayLike, draws: ArrayLike, alpha: float, noise: Noise
) -> tuple[HostValues, HostValues]:
    """`p_lower` less the Clopper-Pearson upper bound of the lost votes, and its gap: float64 [...], never too large.

    Args:
      p_lower: [...] lower bound of the class's probability under the original network.
      lost: integers [...], in [0, draws].
      draws: integers [...]; without any draw nothing is known, and both results are 0.
      alpha, noise: error probability of the upper bound, and the noise law.
    """
    draws = np.asarray(draws)
    q_upper = bounds.clopper_pearson_upper(lost, np.maximum(draws, 1), alpha)
    difference = np.nextafter(p_lower - np.where(draws > 0, q_upper, 1.0), -np.inf)  # rounded down
    carried = np.maximum(difference, 0.0)
    return carried, np.asarray(noise.gap(carried))


def losing_classifier(classifier: Classifier, changed: Classifier) -> Classifier:
    """The classifier that votes for the class of `classifier` where `changed` does not, and elsewhere for an additional
    last class: its votes for a class are the votes that the class loses by the change.
    """
    for name, one in (("classifier", classifier), ("changed", changed)):
        check_type(name, one, Classifier, WRAP_IT)
    if classifier.num_classes != changed.num_classes:
        raise ValueError(f"the changed network has {changed.num_classes} classes instead of {classifier.num_classes}")
    both, num_classes = (classifier, changed), classifier.num_classes + 1
    if classifier.on_host or changed.on_host:
        return from_host(functools.partial(_lost, both), num_classes=num_classes)
    return Classifier(_lost, both, num_classes)


def _lost(classifiers: tuple[Classifier, Classifier], x: jax.Array) -> jax.Array:
    before, after = (_votes(classifier, x) for classifier in classifiers)
    none = classifiers[0].num_classes
    return jax.nn.one_hot(jnp.where(before == after, none, before), none + 1)


def _votes(classifier: Classifier, x: jax.Array) -> jax.Array:
    """The class of each row, or K for a row that votes for none."""
    logits = classifier(x) if classifier.on_host else _compiled_logits(classifier, x)
    return jnp.where(jnp.isnan(logits).any(axis=-1), classifier.num_classes, logits.argmax(axis=-1))


_compiled_logits = jax.jit(Classifier.__call__)
