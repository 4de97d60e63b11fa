"""Losses of the training methods, each for one image: pure functions of the logits of its noisy copies.

`logits` are float [m, K], of m noisy copies of one image, and `label` is its class; `jax.vmap` gives those of a batch.
"""

import jax
import jax.numpy as jnp
import optax
from jax.scipy.stats import norm
from jaxtyping import Array, ArrayLike, Float, Int

from ancer_jax.smoothing import bounds
from ancer_jax.smoothing.noise import Noise

_ALPHA = 0.5  # of the bound in `volume`, which is the median of its beta distribution then


def augmentation(logits: Float[ArrayLike, "m K"], label: Int[ArrayLike, ""]) -> Float[Array, ""]:
    """Noise augmentation: the mean cross-entropy of the noisy copies.

    References: Cohen et al. 2019 (arXiv 1902.02918), section 3.3; uniform noise: Yang et al. 2020 (arXiv 2002.08118).
    """
    return -jax.nn.log_softmax(logits)[:, label].mean()


def macer(
    logits: Float[ArrayLike, "m K"],
    label: Int[ArrayLike, ""],
    theta: Float[ArrayLike, ""],
    *,
    weight: float = 12.0,
    inverse_temperature: float = 16.0,
    margin: float = 8.0,
) -> Float[Array, ""]:
    """MACER: cross-entropy of the mean probability, and a hinge on the soft l2 radius of correctly classified images.

    `-log p_label + weight * theta / 2 * max(margin - xi, 0) [right]`, with `p` the mean softmax of the logits and
    `xi = Phi^-1(q_1) - Phi^-1(q_2)` of the two largest entries of q, the mean softmax of the logits times
    `inverse_temperature`. The second term is 0 where xi is not finite or exceeds the margin.

    References: Zhai et al. 2020 (arXiv 2001.02378), section 4, and its code (defaults for CIFAR-10).
    """
    mean = jax.nn.softmax(logits).mean(axis=0)
    sharp = jax.nn.softmax(inverse_temperature * jnp.asarray(logits)).mean(axis=0)
    (first, second), _ = jax.lax.top_k(sharp, 2)
    usable = (sharp.argmax() == label) & (first < 1) & (second >= jnp.finfo(sharp.dtype).tiny)
    first, second = (jnp.where(usable, value, other) for value, other in ((first, 0.75), (second, 0.25)))
    xi = norm.ppf(first) - norm.ppf(second)
    hinge = jnp.where(usable & (xi <= margin), margin - xi, 0.0)
    return -jnp.log(mean[label] + 1e-10) + weight * theta / 2 * hinge


def consistency(
    logits: Float[ArrayLike, "m K"], label: Int[ArrayLike, ""], *, weight: float = 10.0, entropy_weight: float = 0.5
) -> Float[Array, ""]:
    """Consistency: `mean_i CE(p_i) + weight * mean_i KL(p || p_i) + entropy_weight * H(p)`, with p the mean of the p_i.

    References: Jeong and Shin 2020 (arXiv 2006.04062), section 3, and its code (defaults for CIFAR-10).
    """
    log_each = jax.nn.log_softmax(logits)
    mean = jnp.exp(log_each).mean(axis=0)
    log_mean = jnp.log(jnp.clip(mean, 1e-20))
    divergence = (mean * (log_mean - log_each)).sum(axis=1).mean()
    entropy = -(mean * log_mean).sum()
    return augmentation(logits, label) + weight * divergence + entropy_weight * entropy


def stability(logits: Float[ArrayLike, "m K"], label: Int[ArrayLike, ""], *, weight: float = 6.0) -> Float[Array, ""]:
    """Stability training: `CE(p_1) + weight * mean_{i>1} KL(p_1 || p_i)`, where p_1 is of a noisy copy, too.

    References: Li et al. 2019 (arXiv 1809.03113); Yang et al. 2020 (arXiv 2002.08118) and its code (m = 2, weight 6).
    """
    log_each = jax.nn.log_softmax(logits)
    first, others = log_each[0], log_each[1:]
    return -first[label] + weight * (jnp.exp(first) * (first - others)).sum(axis=1).mean()


def volume(
    logits: Float[ArrayLike, "m K"],
    label: Int[ArrayLike, ""],
    theta: Float[ArrayLike, ""],
    noise: Noise,
    *,
    weight: float = 8.0,
    inverse_temperature: float = 4.0,
) -> Float[Array, ""]:
    """Certified volume: `-log p_label - weight * theta * gap(p_lower)`, with p the mean softmax of the logits.

    `theta * gap`, in units of [0, 1] pixels, is the proxy radius of the region that the m copies would certify: that of
    the ball of the same volume. `p_lower` is the Clopper-Pearson bound, with alpha 1/2, for m draws and a share of
    `q_label` of the votes, where q is the mean softmax of the logits times `inverse_temperature`. The gap is 0, without
    a slope, where `p_lower` is at most 1/2. The mean proxy radius over images estimates ACR-tilde. The bound keeps one
    image from gaining an unbounded radius.

    References: ours; `differentiable.estimated_region` with the soft estimate.
    """
    sharp = jax.nn.softmax(inverse_temperature * jnp.asarray(logits))
    share = sharp.mean(axis=0)[label]
    p_lower = bounds.clopper_pearson_lower_traced(share * len(sharp), len(sharp), _ALPHA)
    mean = jax.nn.softmax(logits).mean(axis=0)[label]
    return -jnp.log(mean + 1e-10) - weight * theta * noise.gap(p_lower)


def smoothed_loss(logits: Float[ArrayLike, "m K"], label: Int[ArrayLike, ""]) -> Float[Array, ""]:
    """`-log mean_i softmax(logits_i)_label`, the loss that SmoothAdv's attack increases (Salman et al. 2019, eq. 6)."""
    log_each = jax.nn.log_softmax(logits)[:, label]
    return -(jax.nn.logsumexp(log_each) - jnp.log(len(log_each)))


def smoothadv_attack(apply, x, label, noise, *, epsilon, steps: int):
    """SmoothAdv's attack on one image: projected gradient ascent of `smoothed_loss` through fixed noise.

    Each step has length `2 epsilon / steps` along the normalised gradient, and is projected to the l2 ball and then to
    pixels in [0, 1].

    Args:
      apply: noisy images [m, *d] -> logits [m, K], in evaluation mode.
      x, label: image [*d] in [0, 1], and its class.
      noise: [m, *d], the draws that the network is then trained on.
      epsilon, steps: radius of the l2 ball, and number of steps.

    Returns:
      The adversarial image [*d].

    References: Salman et al. 2019 (arXiv 1906.04584), section 3. Its code clips to [0, 1] before it projects, and takes
    a random direction where the gradient is 0.
    """
    loss = lambda y: smoothed_loss(apply(y[None] + noise), label)

    def step(y, _):
        gradient = jax.grad(loss)(y)
        y = y + 2 * epsilon / steps * gradient / (optax.tree.norm(gradient) + 1e-8)
        away = y - x
        away *= jnp.minimum(1.0, epsilon / (optax.tree.norm(away) + 1e-12))
        return jnp.clip(x + away, 0.0, 1.0), None

    return jax.lax.scan(step, x, None, length=steps)[0]
