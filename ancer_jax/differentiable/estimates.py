"""Differentiable estimates of the certified region, from soft outputs or from votes."""

import dataclasses
from typing import Literal

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from ancer_jax._checks import check_choice, check_integer, check_real
from ancer_jax.regions.region import Region
from ancer_jax.smoothing import bounds
from ancer_jax.smoothing.classifier import Classifier
from ancer_jax.smoothing.noise import Gaussian, noise_dtype
from ancer_jax.smoothing.smoothed import Smoothed, Stage, smoothed_probs, stage_key, theta_like

EstimateKind = Literal["soft", "votes"]


@dataclasses.dataclass(frozen=True)
class EstimateConfig:
    """How a region is estimated; a setting out of range is a ValueError.

    Attributes:
      num_samples: number of draws, below 2^24. "soft" holds all noisy copies at once.
      alpha: error probability of the bound.
      kind: "soft", from the mean softmax output; or "votes", from hard votes.
      chunk: with "votes", draws at a time; changes speed and memory, never the draws.
    """

    num_samples: int
    alpha: float = 0.001
    kind: EstimateKind = "soft"
    chunk: int = 100

    def __post_init__(self):
        check_integer("num_samples", self.num_samples, 1, bounds.MOST_TRACED_TRIALS)
        check_integer("chunk", self.chunk)
        check_real("alpha", self.alpha, f"[{bounds.LEAST_TRACED_ALPHA}, 1)")
        check_choice("kind", self.kind, EstimateKind)


def estimated_region(
    key: Key[Array, ""],
    smoothed: Smoothed,
    x: Float[ArrayLike, "*d"],
    label: Int[ArrayLike, ""],
    *,
    config: EstimateConfig,
) -> Region:
    """The region that `certify` would find for the class `label` from few draws, differentiable.

    Its gap is that of the Clopper-Pearson bound (`bounds.clopper_pearson_lower_traced`, by its implicit derivative) of
    the share of the class. "soft" takes the mean softmax output over reparameterised noise; it has derivatives in x,
    theta and the classifier's variables, and a bias that is the larger the flatter the softmax. "votes" takes the share
    of hard votes (`vote_share`), which is unbiased and has derivatives in x and theta only.

    Args:
      key: typed key of the draws; the stage is folded in here, the draws are those of no certificate.
      smoothed, x: as in `class_counts`.
      label: [] the class that is to be certified.
      config: number of draws, alpha, and kind of estimate (static).

    Returns:
      The region around x. Where the bound is at most 1/2 its gap is 0, and so are all derivatives.

    Guarantee: none. It is a plug-in estimate; optimising it overfits its draws, so certify with fresh ones.

    Raises:
      ValueError: outside jit, if `label` is not a class; as in `vote_share`.
    """
    check_labels(label, smoothed.classifier)
    key = stage_key(key, Stage.DIFFERENTIABLE)
    if config.kind == "soft":
        share = smoothed_probs(key, smoothed, x, num_samples=config.num_samples)[label]
    else:
        share = vote_share(key, smoothed, x, label, num_samples=config.num_samples, chunk=config.chunk)
    p_lower = bounds.clopper_pearson_lower_traced(share * config.num_samples, config.num_samples, config.alpha)
    return smoothed.noise.region(jnp.asarray(x), smoothed.theta, smoothed.noise.gap(p_lower))


def check_labels(labels: ArrayLike, classifier: Classifier) -> None:
    """Refuse what is not a class, outside jit: `ABSTAIN`, say, would count as the last class."""
    if not isinstance(labels, jax.core.Tracer):
        low, high = np.min(labels), np.max(labels)
        if not 0 <= low <= high < classifier.num_classes:
            raise ValueError(f"labels must be in 0..{classifier.num_classes - 1}, got {low} to {high}")


def vote_share(
    key: Key[Array, ""],
    smoothed: Smoothed,
    x: Float[ArrayLike, "*d"],
    label: Int[ArrayLike, ""],
    *,
    num_samples: int,
    chunk: int,
) -> Float[Array, ""]:
    """Share of the draws that vote for `label`, with the score-function derivative of its expectation.

    `d/dz E[v] = E[(v - b) eps / theta]` and `d/dtheta E[v] = E[(v - b) (eps^2 - 1) / theta]` for a vote v in {0, 1},
    Gaussian eps, and the coefficients z of x in the basis of the noise. The control variate b of a draw is the share of
    the other draws, so that the estimate stays unbiased.
    Derivatives are of first order, and those in the classifier's variables are 0: votes do not move with them.

    Args:
      key, smoothed, x, num_samples, chunk: as in `class_counts`, whose draws these are.
      label: [] a class.

    Returns:
      float []: the value is `class_counts(...)[label] / num_samples`, of which a NaN logit gives no vote.

    Raises:
      ValueError: at trace time, if the noise is not Gaussian (the support of uniform noise moves with x and theta, so
        that it has no score function), or there are fewer than 2 draws.

    References: the score function or likelihood-ratio estimate, Glynn 1990; leave-one-out, Kool et al. 2019.
    """
    noise = smoothed.noise
    if not isinstance(noise, Gaussian):
        raise ValueError(f"votes have derivatives under Gaussian noise only, got {noise}: use the soft estimate")
    check_integer("num_samples", num_samples, minimum=2)
    check_integer("chunk", chunk)
    dtype = jnp.result_type(x)
    x = jnp.asarray(x, noise_dtype(x))
    theta = theta_like(smoothed.theta, x.shape, x.dtype)
    fixed_classifier, center, scale = jax.lax.stop_gradient((smoothed.classifier, x, theta))
    chunk = min(chunk, num_samples)

    def add(sums, start):
        draws = start + jnp.arange(chunk)
        eps = jax.vmap(lambda i: Gaussian().sample(jax.random.fold_in(key, i), jnp.ones_like(scale)))(draws)
        logits = fixed_classifier((center[None] + noise.basis.inputs(scale[None] * eps)).astype(dtype))
        inside = draws < num_samples
        votes = inside & (logits.argmax(-1) == label) & ~jnp.isnan(logits).any(-1)
        moments = jnp.stack([eps, eps**2 - 1])  # the scores in coefficients and theta, times theta
        weighted = [jnp.tensordot(weights.astype(x.dtype), moments, (0, 1)) for weights in (votes, inside)]
        return jax.tree.map(jnp.add, sums, (votes.sum(), *weighted)), None

    zeros = jnp.zeros((2, *x.shape), x.dtype)
    (count, voted, drawn), _ = jax.lax.scan(add, (jnp.int32(0), zeros, zeros), jnp.arange(0, num_samples, chunk))
    share = count.astype(x.dtype) / num_samples
    slopes = (voted - share * drawn) / (num_samples - 1) / scale
    moved = jnp.asarray(noise.basis.coefficients(x - center))
    return share + (slopes * jnp.stack([moved, theta - scale])).sum()  # the value is share: both differences are 0
