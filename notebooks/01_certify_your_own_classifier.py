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
# A small network of your own is trained with noise, wrapped, checked and certified: with the same noise for all
# images, with one noise level for each image, and with one for each pixel of each image. What is certified is never
# the network itself but the smoothed classifier: the majority vote of the network over noisy copies of an image.
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

plt.rcParams.update({"figure.dpi": 90, "savefig.dpi": 90, "font.size": 9, "figure.constrained_layout.use": True})

# %% [markdown]
# ## Data and network
#
# The package ships a part of Fashion-MNIST: grey images with pixels in [0, 1], every 30th training image and every
# 20th test image. Noise and radii are in the same units as the pixels.

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
# A network that has never seen noise answers noisy images badly, and little can be certified. So every batch gets
# fresh Gaussian noise of the standard deviation that is used later, `THETA` (noise augmentation, [Cohen et al.
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
        return optax.softmax_cross_entropy_with_integer_labels(network.apply(variables, noisy), labels[rows]).mean()

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
# `from_linen` makes a `Classifier` of module and variables. Its accuracy without noise, and under one draw of noise
# for each image:

# %%
classifier = aj.from_linen(network, variables, num_classes=10)
noise = THETA * jax.random.normal(jax.random.key(2), test.images.shape)
for name, images in (("without noise", test.images), ("under noise", test.images + noise)):
    print(f"accuracy {name}: {(classifier(images).argmax(axis=-1) == test.labels).mean():.3f}")

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
# A certificate is about a function of one image. `check_classifier` refuses what is none. A batch norm in training
# mode, for example, makes the logits of an image depend on the others in its batch; nothing fails, and every
# certificate would be void.


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
# `from_linen` puts the same module into evaluation mode, and then it passes. So does the network that was trained
# above.

# %%
aj.check_classifier(aj.from_linen(module, batch_norm_variables, num_classes=10), test.images[0])
aj.check_classifier(classifier, test.images[0])

# %% [markdown]
# ## Fixed noise
#
# `certify` selects a class by `n0` draws, counts it in `n` fresh ones, and turns the count into a lower bound of the
# class's probability. With probability at least 1 - alpha over the draws, the smoothed classifier gives the
# same class everywhere in the region: all y with `norm2((y - x) / theta) <= gap`. Use one key for each image.

# %%
gaussian = aj.GaussianL2()
config = aj.CertifyConfig(n=5_000, alpha=0.001)
x, label, key = test.images[0], test.labels[0], jax.random.key(0)
result = aj.certify(key, classifier, gaussian, x, THETA, config=config)
region = aj.Region(x, THETA, result.gap, gaussian.norm)
print(f"label {label}, prediction {result.prediction}, {result.count} of {result.n} votes")
print(f"probability at least {result.p_lower:.4f}, radius {aj.radius(region):.3f}")

# %% [markdown]
# Whether that class is right is another matter: a certificate says that the answer does not change, not that it is
# the label.
#
# ## Noise for each image, noise for each pixel
#
# The searches climb the estimated size of the region, from `THETA` up to `theta_max`: first over one theta for the
# image, then over one theta for each pixel. Without the bound, noise could grow until it erases the image. Both work
# on one image; `vmap` makes them work on many, and `jit` compiles them once.

# %%
COUNT = 6
keys = jax.vmap(functools.partial(jax.random.fold_in, key))(test.ids[:COUNT])
isotropic_config = aj.IsotropicConfig(steps=50, num_samples=50, theta_max=4 * THETA)
anisotropic_config = aj.AnisotropicConfig(steps=50, num_samples=50, theta_max=4 * THETA)


@jax.jit
@jax.vmap
def search(key, x):
    isotropic, _ = aj.optimize_isotropic(key, classifier, gaussian, x, THETA, config=isotropic_config)
    anisotropic, _ = aj.optimize_anisotropic(key, classifier, gaussian, x, isotropic, config=anisotropic_config)
    return isotropic, anisotropic


isotropic, anisotropic = map(np.asarray, search(keys, test.images[:COUNT]))
print("theta of each image:", *(f"{theta:.2f}" for theta in isotropic))
print("theta of each pixel:", *(f"{theta.min():.2f}..{theta.max():.2f}" for theta in anisotropic))

# %% [markdown]
# A theta of a whole image at the bound, four times `THETA`, is a warning: the noise has grown until the network reads
# the noise rather than the image, and nothing is left for the search over pixels. The certificate is then true of the
# smoothed classifier and says little about the image.
#
# The thetas that were found are then certified with draws of their own. `radius` is that of the largest ball inside
# the region, `proxy_radius` that of the ball of the same volume. They differ where theta has a value for each pixel.
#
# Every image has a smoothed classifier of its own here, so these are **per-input classifiers, not reconciled by
# memory**. Notebook 02 shows what a memory does about it.

# %%
thetas = {"fixed": np.full(COUNT, THETA), "isotropic": isotropic, "anisotropic": anisotropic}
predictions, regions = {}, {}
for method, values in thetas.items():
    rows = zip(keys, test.images, values, strict=False)
    results = [aj.certify(key, classifier, gaussian, x, theta, config=config) for key, x, theta in rows]
    predictions[method] = [int(r.prediction) for r in results]
    rows = zip(test.images, values, results, strict=False)
    regions[method] = [aj.Region(x, theta, r.gap, gaussian.norm) for x, theta, r in rows]
    print(f"{method:12} classes", *predictions[method])
print("labels              ", *test.labels[:COUNT])

# %% [markdown]
# ## Images, thetas, radii
#
# Light pixels of the second row get much noise, so that the region is long in their direction. The number after each
# method is the class that is certified (`?`: the smoothed classifier abstained). How much of a large region is owed
# to the image and how much to the noise alone is another question, that of leakage: see notebook 04.

# %%
figure = plt.figure(figsize=(9, 6))
axes = figure.subplots(3, COUNT, gridspec_kw={"height_ratios": [1, 1, 1.3]})
for column in range(COUNT):
    axes[0, column].imshow(test.images[column, ..., 0], cmap="gray", vmin=0, vmax=1)
    axes[0, column].set_title(f"label {test.labels[column]}", fontsize=8)
    picture = axes[1, column].imshow(anisotropic[column, ..., 0], cmap="gray", vmin=0, vmax=4 * THETA)
    axes[1, column].set_title(f"one theta: {isotropic[column]:.2f}", fontsize=8)
    for axis in axes[:2, column]:
        axis.set(xticks=[], yticks=[])
    bars = axes[2, column]
    for place, (method, hatch) in enumerate(zip(thetas, ("", "//", "xx"), strict=True)):
        sizes = aj.radius(regions[method][column]), aj.proxy_radius(regions[method][column])
        bars.bar(place, sizes[0], 0.7, color="0.75", edgecolor="black", hatch=hatch)
        bars.plot([place - 0.35, place + 0.35], [sizes[1]] * 2, color="black", linewidth=2.5)
    answers = {method: "?" if found[column] == aj.ABSTAIN else found[column] for method, found in predictions.items()}
    bars.set_xticks(range(3), [f"{method}: {answer}" for method, answer in answers.items()], rotation=60, ha="right")
    bars.set_ylim(0, 1.08 * max(aj.proxy_radius(r) for found in regions.values() for r in found))
    bars.label_outer()
axes[0, 0].set_ylabel("image")
axes[1, 0].set_ylabel("theta of each pixel")
axes[2, 0].set_ylabel("radius (bars), proxy radius\n(lines), in units of pixels")
figure.colorbar(picture, ax=axes[1], label="theta (units of pixels)", fraction=0.02)
plt.show()
