"""Certified regions as differentiable functions of the input, of theta and of the network: estimates, not certificates.

What goes into a loss or an attack is a `Region` whose gap can be differentiated; `regions.radius`, `proxy_radius` and
`log_volume` take it from there. What comes out of training or searching is then certified by `certify`, with draws of
its own. Two uses are here: `learn_theta`, one anisotropic theta for all inputs, and `attack`, on a certified region.
"""

import functools
import math
from typing import Literal, get_args

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, Int, Key

from ancer_jax import bounds
from ancer_jax._checks import check_integer
from ancer_jax.certificates import Certificate, GaussianL2, noise_dtype
from ancer_jax.classifiers import Classifier
from ancer_jax.optimize import THETA_MAX_FACTOR, check_start
from ancer_jax.regions import Region, proxy_radius
from ancer_jax.smoothing import Stage, smoothed_probs, stage_key

Estimate = Literal["soft", "votes"]


def estimated_region(
    key: Key[Array, ""],
    classifier: Classifier,
    certificate: Certificate,
    x: Float[ArrayLike, "*d"],
    theta: Float[ArrayLike, "..."],
    label: Int[ArrayLike, ""],
    *,
    num_samples: int,
    alpha: float = 0.001,
    estimate: Estimate = "soft",
    chunk: int = 100,
) -> Region:
    """The region that `certify` would find for the class `label` from `num_samples` draws, differentiable.

    Its gap is that of the Clopper-Pearson bound (`bounds.clopper_pearson_lower_traced`, by its implicit derivative) of
    the share of the class: with "soft", the mean softmax output over reparameterised noise, which has derivatives in x,
    theta and the classifier's variables, and a bias as large as the softmax is flat; with "votes", the share of hard
    votes (`vote_share`), which is unbiased and has derivatives in x and theta only.

    Args:
      key: typed key of the draws; the stage is folded in here, the draws are those of no certificate.
      classifier, certificate, x, theta: as in `smoothing.class_counts`; any of them may be differentiated.
      label: [] the class that is to be certified.
      num_samples: number of draws (static), below 2^24. "soft" holds all copies at once.
      alpha: error probability of the bound.
      estimate: "soft" or "votes" (static).
      chunk: with "votes", draws at a time (static).

    Returns:
      The region, around x, of this theta. Where the bound is at most 1/2 its gap is 0, and so are all derivatives.

    Guarantee: none. The estimate is compared with nothing, and whoever optimises it overfits its draws.

    Raises:
      ValueError: at trace time, if `estimate` is unknown; outside jit, if `label` is no class; as in `vote_share`.
    """
    _check_labels(label, classifier)
    if estimate not in get_args(Estimate):
        raise ValueError(f"estimate must be one of {', '.join(get_args(Estimate))}, got {estimate!r}")
    arguments = stage_key(key, Stage.DIFFERENTIABLE), classifier, certificate, x, theta
    if estimate == "soft":
        share = smoothed_probs(*arguments, num_samples=num_samples)[label]
    else:
        share = vote_share(*arguments, label, num_samples=num_samples, chunk=chunk)
    p_lower = bounds.clopper_pearson_lower_traced(share * num_samples, num_samples, alpha)
    return Region(x, theta, certificate.gap(p_lower), certificate.norm)


def _check_labels(labels, classifier: Classifier) -> None:
    """Refuse what is no class, outside jit: `ABSTAIN`, say, would count as the last one."""
    if not isinstance(labels, jax.core.Tracer):
        low, high = np.min(labels), np.max(labels)
        if not 0 <= low <= high < classifier.num_classes:
            raise ValueError(f"labels must be in 0..{classifier.num_classes - 1}, got {low} to {high}")


def vote_share(
    key: Key[Array, ""],
    classifier: Classifier,
    certificate: Certificate,
    x: Float[ArrayLike, "*d"],
    theta: Float[ArrayLike, "..."],
    label: Int[ArrayLike, ""],
    *,
    num_samples: int,
    chunk: int,
) -> Float[Array, ""]:
    """Share of the draws that vote for `label`, with the score-function derivative of its expectation.

    `d/dx E[v] = E[(v - b) eps / theta]` and `d/dtheta E[v] = E[(v - b) (eps^2 - 1) / theta]` for a vote v in {0, 1} and
    Gaussian eps. The control variate b of a draw is the share of the other draws, so that the estimate stays unbiased.
    Derivatives are of first order, and those in the classifier's variables are 0: votes do not move with them.

    Args:
      key, classifier, certificate, x, theta, num_samples, chunk: as in `smoothing.class_counts`, whose draws these are.
      label: [] a class.

    Returns:
      float []: the value is `class_counts(...)[label] / num_samples`, of which a NaN logit gives no vote.

    Raises:
      ValueError: at trace time, if the noise is not Gaussian (the support of uniform noise moves with x and theta, so
        that it has no score function), or there are fewer than 2 draws.

    References: the score function or likelihood-ratio estimate, Glynn 1990; leave-one-out, Kool et al. 2019.
    """
    if not isinstance(certificate, GaussianL2):
        raise ValueError(f"votes have derivatives under Gaussian noise only, got {certificate}: use the soft estimate")
    check_integer("num_samples", num_samples, minimum=2)
    check_integer("chunk", chunk)
    dtype = jnp.result_type(x)
    x = jnp.asarray(x, noise_dtype(x))
    theta = jnp.broadcast_to(jnp.asarray(theta, x.dtype), x.shape)
    fixed_classifier, center, scale = jax.lax.stop_gradient((classifier, x, theta))
    chunk = min(chunk, num_samples)

    def add(sums, start):
        draws = start + jnp.arange(chunk)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(draws)
        eps = jax.vmap(lambda k: certificate.sample(k, jnp.ones_like(scale)))(keys)
        logits = fixed_classifier((center[None] + scale[None] * eps).astype(dtype))
        inside = draws < num_samples
        votes = inside & (logits.argmax(-1) == label) & ~jnp.isnan(logits).any(-1)
        moments = jnp.stack([eps, eps**2 - 1])  # the scores in x and theta, times theta
        weighted = [jnp.tensordot(weights.astype(x.dtype), moments, (0, 1)) for weights in (votes, inside)]
        return jax.tree.map(jnp.add, sums, (votes.sum(), *weighted)), None

    zeros = jnp.zeros((2, *x.shape), x.dtype)
    (count, voted, drawn), _ = jax.lax.scan(add, (jnp.int32(0), zeros, zeros), jnp.arange(0, num_samples, chunk))
    share = count.astype(x.dtype) / num_samples
    slopes = (voted - share * drawn) / (num_samples - 1) / scale
    return share + (slopes * jnp.stack([x - center, theta - scale])).sum()  # the value is share: both differences are 0


def learn_theta(
    key: Key[Array, ""],
    classifier: Classifier,
    certificate: Certificate,
    images: Float[ArrayLike, "images *d"],
    labels: Int[ArrayLike, " images"],
    theta_init: Float[ArrayLike, "..."],
    *,
    steps: int = 300,
    batch_size: int = 32,
    num_samples: int = 32,
    learning_rate: float = 0.03,
    alpha: float = 0.05,
    theta_max: Float[ArrayLike, ""] | None = None,
) -> tuple[Float[Array, "*d"], Float[Array, " steps"]]:
    """One theta, a value for each coordinate, for all inputs: Adam ascent of the mean estimated proxy radius.

    The objective is ACR-tilde with estimated regions (`estimated_region`, soft, of the images' labels): an image that
    the smoothed classifier gets wrong counts 0. Ascends `log theta`, with a rate that falls to 0 along a cosine, in
    `[theta_init / 10, theta_max]`. The upper bound is needed here, too: noise that erases every image leaves a constant
    classifier, right on the images of one class, with regions as large as the noise.

    Args:
      key: typed key of the draws and of the choice of images.
      classifier, certificate: as in `smoothing.class_counts`.
      images, labels: of the training data. Theta must not depend on the draws of the certificates that use it: on test
        images, learn it with another seed than the run that certifies; and the accuracy would be flattered.
      theta_init: [] or [*d], the start.
      steps, batch_size, num_samples: of the ascent, images of each step, and draws for each image (static). All noisy
        copies of a step are held at once.
      learning_rate: of log theta.
      alpha: of the bound in the estimate (static). With 1/2, the luck of few draws would pass for a region, and pay
        the more the larger the noise.
      theta_max: [] upper bound, never below `theta_init`; None is 4 times that. ACR-tilde depends on it: report it.

    Returns:
      theta [*d], and the objective at each step [steps]. Where a step is not finite, the last finite theta is kept.

    Guarantee: none of size. A certificate with this theta is one of the single smoothed classifier `g_theta`, for
    whatever input: it needs no memory.

    Raises:
      ValueError: if there is not a label for each image; outside jit, if one is no class, or if `theta_init` or
        `theta_max` is not positive and finite.
    """
    if len(np.shape(labels)) != 1 or np.shape(labels) != np.shape(images)[:1]:
        raise ValueError(f"there must be a label for each image, got {np.shape(labels)} and {np.shape(images)}")
    _check_labels(labels, classifier)
    check_integer("steps", steps)
    check_integer("batch_size", batch_size)
    for bound in (theta_init, *(() if theta_max is None else (theta_max,))):
        check_start(bound)
    key = stage_key(jax.random.fold_in(key, np.uint32(2**32 - 1)), Stage.DIFFERENTIABLE)  # of no input: ids are smaller
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    start = jnp.log(jnp.broadcast_to(jnp.asarray(theta_init, noise_dtype(images)), images.shape[1:]))
    upper = start + math.log(THETA_MAX_FACTOR) if theta_max is None else jnp.maximum(jnp.log(theta_max), start)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def size(log_theta, key, x, label):
        region = estimated_region(
            key, classifier, certificate, x, jnp.exp(log_theta), label, num_samples=num_samples, alpha=alpha
        )
        return proxy_radius(region)

    def step(carry, i):
        log_theta, state = carry
        of_choice, of_noise = jax.random.split(jax.random.fold_in(key, i))
        rows = jax.random.randint(of_choice, (batch_size,), 0, len(images))
        keys = jax.random.split(of_noise, batch_size)
        loss = lambda log_theta: -jax.vmap(functools.partial(size, log_theta))(keys, images[rows], labels[rows]).mean()
        value, gradient = jax.value_and_grad(loss)(log_theta)
        updates, new_state = optimizer.update(gradient, state)
        new = jnp.clip(log_theta + updates, start - math.log(10.0), upper)
        finite = jnp.isfinite(new).all()
        keep = lambda new, old: jnp.where(finite, new, old)
        return jax.tree.map(keep, (new, new_state), (log_theta, state)), -value

    (log_theta, _), trace = jax.lax.scan(step, (start, optimizer.init(start)), jnp.arange(steps))
    return jnp.exp(log_theta), trace


def attack(
    key: Key[Array, ""],
    classifier: Classifier,
    certificate: Certificate,
    region: Region,
    label: Int[ArrayLike, ""],
    *,
    steps: int = 50,
    num_samples: int = 64,
) -> Float[Array, "*d"]:
    """The point of a region that projected gradient ascent through the noise finds least like `label`.

    Increases `-log mean_i softmax(f(y + theta eps_i))_label` over y, with fresh draws at every step, in the coordinates
    `(y - center) / theta`, where the region is a ball: steps along the normalised gradient, of `2.5 gap / steps`,
    projected to the ball. It is an expectation-over-transformation attack (Athalye et al. 2018), SmoothAdv's (Salman et
    al. 2019) for ellipsoids and cross-polytopes. Pixels may leave [0, 1], as the certificate allows it.

    Args:
      key: typed key of the draws; another one than that of the certificate.
      classifier, certificate: as in `smoothing.class_counts`.
      region: where to look, theta included. A gap larger than the certified one shows what the attack is worth.
      label: [] the class that the region has.
      steps, num_samples: of the ascent, and draws of each (static).

    Returns:
      y [*d], inside the region (`regions.contains`). What the smoothed classifier answers there, `certify` says.

    Raises:
      ValueError: if region and noise have different norms; outside jit, if `label` is no class.
    """
    if region.norm != certificate.norm:
        raise ValueError(f"the region is of norm {region.norm}, the noise certifies norm {certificate.norm}")
    _check_labels(label, classifier)
    check_integer("steps", steps)
    key = stage_key(key, Stage.DIFFERENTIABLE)
    center = jnp.asarray(region.center, noise_dtype(region.center))
    theta = jnp.broadcast_to(jnp.asarray(region.theta, center.dtype), center.shape)
    norm = lambda values: jnp.sqrt((values**2).sum()) if region.norm == 2 else jnp.abs(values).sum()
    # What rounding may add to the distance of center + theta * scaled.
    slack = 4 * float(jnp.finfo(center.dtype).eps) * norm(jnp.abs(center) / theta + region.gap)
    gap = jnp.maximum(jnp.asarray(region.gap, center.dtype) * (1 - 1e-5) - slack, 0.0)
    project = optax.projections.projection_l2_ball if region.norm == 2 else optax.projections.projection_l1_ball

    def loss(scaled, key):
        probs = smoothed_probs(key, classifier, certificate, center + theta * scaled, theta, num_samples=num_samples)
        return -jnp.log(probs[label] + 1e-12)

    def step(scaled, i):
        gradient = jax.grad(loss)(scaled, jax.random.fold_in(key, i))
        length = jnp.sqrt((gradient**2).sum())
        scaled += 2.5 * gap / steps * gradient / jnp.where(length > 0, length, 1.0)
        return jnp.where(gap > 0, project(scaled, jnp.where(gap > 0, gap, 1.0)), 0.0), None

    scaled, _ = jax.lax.scan(step, jnp.zeros_like(center), jnp.arange(steps))
    return center + theta * scaled
