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
# # Certify your own classifier
#
# We train a small network with noise, wrap it, check it and certify it: with the same noise for all images, with one
# noise level for each image, and with one for each pixel of each image. The network itself, the base classifier, is
# never certified, but the smoothed classifier: the majority vote of the network over noisy copies of an image.
#
# Takes about 30 seconds on two CPU cores, training included.

# %%
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import ancer_jax as aj
from ancer_jax.metrics import round_down

plt.rcParams.update({"figure.dpi": 90, "savefig.dpi": 90, "font.size": 9, "figure.constrained_layout.use": True})

# %% [markdown]
# ## Data and network
#
# The package includes a part of Fashion-MNIST: grey images with pixels in [0, 1], every 30th training image and every
# 20th test image. Noise and radii are in the units of the pixels.

# %%
train = aj.load_dataset("fashion-mnist-subset", split="train")
test = aj.load_dataset("fashion-mnist-subset")
print(f"{len(train)} training images, {len(test)} test images, each {train.images.shape[1:]}")

# %% [markdown]
# The network is any Flax Linen module that maps images `[n, 28, 28, 1]` to logits `[n, 10]`.


# %%
class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(12, (5, 5), strides=(3, 3))((x - 0.3) / 0.35))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


network = Network()
variables = jax.jit(network.init)(jax.random.key(0), train.images[:1])
print(f"{sum(leaf.size for leaf in jax.tree.leaves(variables)):,} parameters")

# %% [markdown]
# ## Training with noise
#
# A network that has never seen noise classifies noisy images badly, and little can be certified. So every batch gets
# fresh Gaussian noise with the standard deviation of the later certificates, `THETA` (noise augmentation, [Cohen et al.
# 2019](https://arxiv.org/abs/1902.02918)). The whole training is one `scan`.

# %%
THETA, STEPS, BATCH = 0.25, 500, 100
optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))


@jax.jit
def fit(variables, images, labels):
    def loss(variables, key):
        rows_key, noise_key = jax.random.split(key)
        rows = jax.random.randint(rows_key, [BATCH], 0, len(images))
        noisy = images[rows] + THETA * jax.random.normal(noise_key, (BATCH, *images.shape[1:]))
        logits = jnp.asarray(network.apply(variables, noisy))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    def step(carry, key):
        variables, state = carry
        value, gradient = jax.value_and_grad(loss)(variables, key)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(variables, updates), state), value

    keys = jax.random.split(jax.random.key(1), STEPS)
    (variables, _), losses = jax.lax.scan(step, (variables, optimizer.init(variables)), keys)
    return variables, losses


variables, losses = fit(variables, train.images, train.labels)
print(f"loss of the first 20 steps {losses[:20].mean():.2f}, of the last 20 {losses[-20:].mean():.2f}")

# %% [markdown]
# ## Wrapping
#
# `from_linen` makes a `Classifier` from a module and its variables. Here is its accuracy without noise, and under one
# draw of noise for each image:

# %%
classifier = aj.from_linen(network, variables, num_classes=10)
noise = THETA * jax.random.normal(jax.random.key(2), test.images.shape)
for name, inputs in (("without noise", test.images[:]), ("under noise", test.images[:] + noise)):
    print(f"accuracy {name}: {(classifier(inputs).argmax(axis=-1) == test.labels).mean():.3f}")

# %% [markdown]
# Flax NNX models and plain functions are wrapped in the same way (untrained here, to show the calls).


# %%
class NnxNetwork(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(784, 10, rngs=rngs)

    def __call__(self, x):
        return self.layer(x.reshape(len(x), -1))


def linear(weights, x):
    return x.reshape(len(x), -1) @ weights


for other in (
    aj.from_nnx(NnxNetwork(nnx.Rngs(0)), num_classes=10),
    aj.from_function(linear, jnp.zeros((784, 10)), num_classes=10),
):
    print("logits", other(test.images[:2]).shape)

# %% [markdown]
# ## Checking
#
# A certificate speaks of a function of one image. `check_classifier` refuses a classifier that is not such a function.
# A batch norm in training mode, for example, makes the logits of an image depend on the rest of its batch: nothing
# would fail, and every certificate would be void.


# %%
class WithBatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train)(x.reshape(len(x), -1))
        return nn.Dense(10)(x)


module = WithBatchNorm()
batch_norm_variables = module.init(jax.random.key(3), test.images[:8])


def in_training_mode(variables, x):
    return module.apply(variables, x, train=True, mutable=["batch_stats"])[0]


try:
    aj.check_classifier(aj.from_function(in_training_mode, batch_norm_variables, num_classes=10), test.images[0])
except ValueError as error:
    print(f"refused: {error}")

# %% [markdown]
# `from_linen` puts the same module into evaluation mode, and then it passes. So does the network that we trained above.

# %%
aj.check_classifier(aj.from_linen(module, batch_norm_variables, num_classes=10), test.images[0])
aj.check_classifier(classifier, test.images[0])

# %% [markdown]
# ## Fixed noise
#
# `Smoothed` holds the three parts of a smoothed classifier: the base classifier, the noise law, and theta, here the
# standard deviation. `certify` selects a class by `n0` draws, counts its votes among `n` fresh draws, and turns the
# count into a lower bound of the probability of that class. With probability at least 1 - alpha over the draws, the
# smoothed classifier gives the same class everywhere in the region: all y with `norm2((y - x) / theta) <= gap`.

# %%
smoothed = aj.Smoothed(classifier, aj.Gaussian(), THETA)
config = aj.CertifyConfig(n=5_000, alpha=0.001)
key = jax.random.key(0)
certificate = aj.certify(key, smoothed, test.images[0], config=config)
print(f"label {test.labels[0]}, prediction {certificate.prediction}, {certificate.count} of {certificate.n} votes")
print(f"probability at least {round_down(certificate.p_lower, 4)}, radius {round_down(certificate.radius, 3)}")

# %% [markdown]
# A certificate does not say that this class is the label. It says that the class does not change in the region.
#
# ## Noise for each image, noise for each pixel
#
# Two searches maximise the estimated size of the region, from `THETA` up to `theta_max`: first over one theta for the
# image, then over one theta for each pixel. Without the limit, noise could grow until it erases the image. Both work
# on one image; `vmap` makes them work on many, and `jit` compiles them once. Every image has a key of its own.

# %%
COUNT = 6
images, labels, ids = test.images[:COUNT], test.labels[:COUNT], test.ids[:COUNT]
keys = jax.vmap(functools.partial(jax.random.fold_in, key))(ids)
isotropic_config = aj.IsotropicConfig(steps=50, num_samples=50, theta_max=4 * THETA)
anisotropic_config = aj.AnisotropicConfig(steps=50, num_samples=50, theta_max=4 * THETA)


@jax.jit
@jax.vmap
def search(key, x):
    isotropic, _ = aj.optimize_isotropic(key, smoothed, x, config=isotropic_config)
    anisotropic, _ = aj.optimize_anisotropic(key, smoothed.with_theta(isotropic), x, config=anisotropic_config)
    return isotropic, anisotropic


isotropic, anisotropic = map(np.asarray, search(keys, images))
print("theta of each image:", *(f"{theta:.2f}" for theta in isotropic))
print("theta of each pixel:", *(f"{theta.min():.2f}..{theta.max():.2f}" for theta in anisotropic))

# %% [markdown]
# If the theta of a whole image is at the limit, four times `THETA`, be careful: the noise has grown until the network
# reads the noise rather than the image, and the search over pixels has no room. The certificate is then true of the
# smoothed classifier and says little about the image.
#
# Each theta that was found is now certified with draws of its own. The `radius` of a certificate is that of the largest
# ball inside its region, the `proxy_radius` that of the ball of the same volume. They differ where theta has a value
# for each pixel. `certify_batch` certifies many images by one smoothed classifier; image i uses the key
# `fold_in(key, ids[i])`, as the searches above do.
#
# Where theta was searched, every image has a smoothed classifier of its own, so these are **per-input classifiers, not
# reconciled by memory**. Notebook 02 shows how a memory makes one classifier of them.

# %%
fixed = aj.certify_batch(key, smoothed, images, ids=ids, config=config)
certificates = {"fixed": [fixed[i] for i in range(COUNT)]}
for method, thetas in (("isotropic", isotropic), ("anisotropic", anisotropic)):
    certificates[method] = [
        aj.certify(key, smoothed.with_theta(theta), x, config=config)
        for key, theta, x in zip(keys, thetas, images, strict=True)
    ]
for method, found in certificates.items():
    print(f"{method:12} classes", *(int(certificate.prediction) for certificate in found))
print("labels              ", *labels)

# %% [markdown]
# ## Images, thetas, radii
#
# Light pixels of the second row get much noise, so that the region is long in their direction. The number after each
# method is the certified class (`?`: the smoothed classifier abstained). Whether a region is large because of the image
# or because of the noise alone is another question, that of leakage: see notebook 04.

# %%
figure = plt.figure(figsize=(9, 6))
axes = figure.subplots(3, COUNT, gridspec_kw={"height_ratios": [1, 1, 1.3]})
for column in range(COUNT):
    axes[0, column].imshow(images[column, ..., 0], cmap="gray", vmin=0, vmax=1)
    axes[0, column].set_title(f"label {labels[column]}", fontsize=8)
    axes[1, column].imshow(anisotropic[column, ..., 0], cmap="gray", vmin=0, vmax=4 * THETA)
    axes[1, column].set_title(f"one theta: {isotropic[column]:.2f}", fontsize=8)
    for axis in axes[:2, column]:
        axis.set(xticks=[], yticks=[])
    bars, names = axes[2, column], []
    for place, ((method, found), hatch) in enumerate(zip(certificates.items(), ("", "//", "xx"), strict=True)):
        certificate = found[column]
        bars.bar(place, certificate.radius, 0.7, color="0.75", edgecolor="black", hatch=hatch)
        bars.plot([place - 0.35, place + 0.35], [certificate.proxy_radius] * 2, color="black", linewidth=2.5)
        names.append(f"{method}: {'?' if certificate.prediction == aj.ABSTAIN else certificate.prediction}")
    bars.set_xticks(range(3), names, rotation=60, ha="right")
    bars.set_ylim(0, 1.08 * max(c.proxy_radius for found in certificates.values() for c in found))
    bars.label_outer()
axes[0, 0].set_ylabel("image")
axes[1, 0].set_ylabel("theta of each pixel")
axes[2, 0].set_ylabel("radius (bars), proxy radius\n(lines), in units of pixels")
figure.colorbar(axes[1, 0].images[0], ax=axes[1], label="theta (units of pixels)", fraction=0.02)
plt.show()
