# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Differentiable certification
#
# `differentiable.estimated_region` is a certified region as a differentiable function of the input, of theta and of
# the network: an estimate that goes into losses, searches and attacks, and that certifies nothing. Its derivatives
# are compared with those of a case that has a formula. Then theta of one image climbs the volume of its region, and
# what the climb promises is compared with what `certify` finds with fresh draws.
#
# Takes about 30 seconds on two CPU cores.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from scipy.stats import norm

import ancer_jax as aj
from ancer_jax.differentiable import estimated_region

plt.rcParams.update({"figure.dpi": 90, "savefig.dpi": 90, "font.size": 9, "figure.constrained_layout.use": True})
gaussian = aj.GaussianL2()

# %% [markdown]
# ## A case that has a formula
#
# A linear classifier of two classes answers 1 where `w . x > b`. Under Gaussian noise theta the probability of class 1
# is `p = Phi(m)` with the margin `m = (w . x - b) / ||theta * w||`, and the gap of the true region is m itself. For
# the radius, which is `min(theta) * gap`, and the logarithm of the volume all derivatives are known.

# %%
DIMENSION = 8
weights = jax.random.normal(jax.random.key(0), [DIMENSION])
x = jax.random.normal(jax.random.key(1), [DIMENSION])
theta = jnp.linspace(0.5, 1.0, DIMENSION)
offset = weights @ x - 1.2 * jnp.linalg.norm(theta * weights)  # so that the margin is 1.2


def two_logits(variables, inputs):
    """Steep logits: their softmax is nearly a vote."""
    score = 20 * (inputs @ variables["weights"] - variables["offset"])
    return jnp.stack([-score, score], axis=-1)


linear = aj.from_function(two_logits, {"weights": weights, "offset": offset}, num_classes=2)


def true_region(x, theta):
    margin = (weights @ x - offset) / jnp.linalg.norm(theta * weights)
    return aj.Region(x, theta, margin, gaussian.norm)


print(f"true probability {norm.cdf(true_region(x, theta).gap):.4f}, true radius {aj.radius(true_region(x, theta)):.4f}")

# %% [markdown]
# ## Two estimates
#
# With `estimate="soft"` the share of a class is the mean softmax output over the draws. It has derivatives in
# everything, the network's variables included, and a bias where the softmax is flat. With `estimate="votes"` it is
# the share of hard votes, without bias, differentiated by its score function, in x and theta only. Both shares go
# through the Clopper-Pearson bound, which takes off less the more draws there are; here most of what is missing to the
# true values is that.


# %%
def sizes(region):
    return jnp.stack([aj.radius(region), aj.log_volume(region)])


@functools.partial(jax.jit, static_argnames="estimate")
def estimated(key, x, theta, *, estimate):
    """Both sizes, and their derivatives in x and theta."""
    of = lambda x, theta: estimated_region(
        key, linear, gaussian, x, theta, 1, num_samples=20_000, estimate=estimate, chunk=1000
    )
    return sizes(of(x, theta)), jax.jacrev(lambda x, theta: sizes(of(x, theta)), argnums=(0, 1))(x, theta)


true = sizes(true_region(x, theta)), jax.jacrev(lambda x, theta: sizes(true_region(x, theta)), argnums=(0, 1))(x, theta)
FOUND = {"formula": true}
for estimate in ("soft", "votes"):
    FOUND[estimate] = estimated(jax.random.key(3), x, theta, estimate=estimate)
for row, name in enumerate(("radius", "log volume")):
    for estimate, (values, slopes) in FOUND.items():
        off = [jnp.linalg.norm(a[row] - b[row]) / jnp.linalg.norm(b[row]) for a, b in zip(slopes, true[1], strict=True)]
        print(
            f"{name} by {estimate:7} {values[row]:.4f}; derivative in x off by {off[0]:.1%}, in theta by {off[1]:.1%}"
        )

# %% [markdown]
# Coordinate by coordinate, for the log volume:

# %%
_, axes = plt.subplots(1, 2, figsize=(9, 3))
for axis, which, unit in ((axes[0], 0, "x"), (axes[1], 1, "theta")):
    for estimate, marker, size in (("formula", "_", 16), ("soft", "o", 6), ("votes", "x", 6)):
        slopes = FOUND[estimate][1][which][1]
        axis.plot(range(DIMENSION), slopes, marker, markersize=size, fillstyle="none", label=estimate, color="black")
    axis.set(xlabel="coordinate", ylabel=f"derivative in {unit}\n(log volume per unit of {unit})")
    axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
axes[0].legend()
plt.show()

# %% [markdown]
# ## vmap, jit, grad
#
# The function works on one input, and JAX's transformations make of it what a training loop or an attack needs. Here
# the bundled Fashion-MNIST classifier, which is trained with Gaussian noise of 0.25, and four test images at once:
# the norm of the derivative of each image's radius, in its pixels and in the variables of the network.

# %%
bundled = aj.load_bundled("l2")
test = aj.load_dataset("fashion-mnist-subset")
keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(3)))(test.ids[:4])


def soft_radius(classifier, key, x, label):
    return aj.radius(estimated_region(key, classifier, gaussian, x, bundled.theta, label, num_samples=64))


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0, 0, 0))
def slopes_of_each(classifier, key, x, label):
    radius, slopes = jax.value_and_grad(soft_radius, argnums=(0, 2))(classifier, key, x, label)
    return radius, *map(optax.tree.norm, slopes)


found = slopes_of_each(bundled.classifier, keys, test.images[:4], test.labels[:4])
for label, radius, of_network, of_pixels in zip(test.labels, *found, strict=False):
    print(
        f"label {label}: estimated radius {radius:.3f}, norm of its derivative "
        f"in the pixels {of_pixels:.2f}, in the network {of_network:.2f}"
    )

# %% [markdown]
# Where the bound on the probability is at most 1/2 the gap is 0, and so are all derivatives.
#
# ## A climb
#
# One image, one theta for each pixel, and Adam on the log volume of the estimated region. Theta stays between the
# training noise and four times that: without an upper bound the noise would erase the image, and the volume
# would have no end. The climb is done twice: with the same 64 draws in every step, and with fresh ones.

# %%
STEPS, DRAWS, EVERY = 36, 64, 7
image, label = test.images[3], int(test.labels[3])
optimizer = optax.adam(0.02)


def volume(theta, key):
    region = estimated_region(key, bundled.classifier, gaussian, image, theta, label, num_samples=DRAWS)
    return aj.log_volume(region) / image.size, aj.proxy_radius(region)


@jax.jit
def climb(key, fresh):
    def step(carry, i):
        theta, state = carry
        step_key = jax.random.fold_in(key, i * fresh)
        (_, proxy_radius), slope = jax.value_and_grad(volume, has_aux=True)(theta, step_key)
        updates, state = optimizer.update(-slope, state)
        new_theta = jnp.clip(optax.apply_updates(theta, updates), bundled.theta, 4 * bundled.theta)
        return (new_theta, state), (theta, proxy_radius)

    theta = jnp.full(image.shape, bundled.theta)
    return jax.lax.scan(step, (theta, optimizer.init(theta)), jnp.arange(STEPS))[1]


climbs = {"same draws": climb(jax.random.key(4), 0), "fresh draws": climb(jax.random.key(4), 1)}

# %% [markdown]
# ## Estimate and certificate
#
# Every seventh theta is now certified, each with a key of its own, which the climb has not seen: with as many draws as
# the estimate had, 64, and with 4,000. Only these are certificates, each of the smoothed classifier of its theta and
# each with error probability alpha. They are not to be picked by size: to certify the best of several thetas, choose
# it by other draws, and certify once.

# %%
certificates = {}
for name, (thetas, _) in climbs.items():
    for n in (DRAWS, 4_000):
        config, sizes = aj.CertifyConfig(n=n), []
        for i in range(0, STEPS, EVERY):
            key = jax.random.fold_in(jax.random.key(5), i)
            result = aj.certify(key, bundled.classifier, gaussian, image, thetas[i], config=config)
            gap = result.gap if result.prediction == label else 0.0
            sizes.append(float(aj.proxy_radius(aj.Region(image, thetas[i], gap, gaussian.norm))))
        certificates[name, n] = sizes

for name, (_, estimates) in climbs.items():
    last = range(0, STEPS, EVERY)[-1]
    row = (estimates[last], certificates[name, DRAWS][-1], certificates[name, 4_000][-1])
    print(
        f"{name}, step {last}: estimated {row[0]:.2f}, "
        f"certified with {DRAWS} draws {row[1]:.2f}, with 4,000 {row[2]:.2f}"
    )

# %% [markdown]
# An estimate on the draws that were climbed on promises too much for that number of draws: theta was fitted to them.
# With fresh draws in every step the estimate stays close to what the same number of fresh draws certifies, but for the
# flatness of the softmax. More draws certify more, because the bound is tighter. None of these curves says how much of
# the growth is leakage, noise that looks like the class by itself: notebook 04 measures that.

# %%
_, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
steps = range(0, STEPS, EVERY)
for axis, (name, (_, estimates)) in zip(axes, climbs.items(), strict=True):
    axis.plot(estimates, color="black", linewidth=1.5)
    axis.plot(steps, certificates[name, 4_000], "k--s", markersize=4)
    axis.plot(steps, certificates[name, DRAWS], "k:o", markersize=4, fillstyle="none")
    axis.set(xlabel="step of the climb", title=f"{name} in every step")
    ends = {
        "estimate": float(estimates[-1]),
        "certified, 4,000 draws": certificates[name, 4_000][-1],
        f"certified, {DRAWS} draws": certificates[name, DRAWS][-1],
    }
    height = -np.inf
    for text, end in sorted(ends.items(), key=lambda item: item[1]):
        height = max(end, height + 0.06)  # so that no label covers another
        axis.annotate(text, (STEPS + 1, height), va="center", fontsize=8, annotation_clip=False)
    axis.set_xlim(0, STEPS)
axes[0].set_ylabel("proxy radius (units of pixels)")
plt.show()
