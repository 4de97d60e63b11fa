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
# # Regions and memory in two dimensions
#
# In the plane, all regions can be drawn to scale. This notebook shows how smoothing changes the decision regions of a
# classifier, the regions that are certified around a few inputs under fixed, isotropic and anisotropic noise, and how
# the memory turns certificates of many smoothed classifiers into certificates of one: regions shrink until they touch,
# an input inside an earlier region gets the class of that region, and the order of the inputs matters.
#
# Takes about 30 seconds on two CPU cores.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import patheffects
from matplotlib.patches import Ellipse, Polygon

import ancer_jax as aj
from ancer_jax.metrics import round_down
from ancer_jax.smoothing import class_counts

plt.rcParams.update({"figure.dpi": 90, "savefig.dpi": 90, "font.size": 9, "figure.constrained_layout.use": True})

# %% [markdown]
# ## A base classifier
#
# Inputs are points of the unit square. Class 1 is a band along a step, wide on the left and narrow on the right; class
# 0 lies below it and class 2 above. A small island of class 1 lies in the region of class 2. `from_function` takes any
# pure function of (variables, inputs) that returns logits.


# %%
def band(variables, points):
    """Logits [n, 3] of points [n, 2]."""
    x, y = points[:, 0], points[:, 1]
    step = jnp.tanh((x - 0.5) / variables["length"])
    slope = 0.22 / variables["length"] * (1 - step**2)
    height = (y - 0.5 - 0.22 * step) / jnp.sqrt(1 + slope**2)  # about the distance from the middle of the band
    narrowing = jax.nn.sigmoid((x - 0.55) / 0.06)
    half_width = variables["left"] + (variables["right"] - variables["left"]) * narrowing
    island = variables["radius"] - jnp.hypot(x - variables["center"][0], y - variables["center"][1])
    inside = jnp.maximum(2 * half_width - abs(height), abs(height) + 2 * island)
    return variables["sharpness"] * jnp.stack([-height, inside, height], axis=1)


variables = {"length": 0.1, "left": 0.1, "right": 0.035, "sharpness": 60.0, "radius": 0.045, "center": [0.25, 0.8]}
classifier = aj.from_function(band, variables, num_classes=3)
aj.check_classifier(classifier, np.array([0.5, 0.5], np.float32))

# %% [markdown]
# ## The effect of smoothing
#
# The smoothed classifier gives the class that most noisy copies of the input get. For each point of a grid,
# `smoothing.class_counts` counts the classes of 400 noisy copies, and their majority is drawn; dotted lines are the
# boundaries of the base classifier. A feature smaller than the noise disappears: under theta = 0.10 the island, and
# most of the narrow part of the band.

# %%
SIDE = 70
ticks = (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE
grid = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)


@jax.jit
def majority(theta):
    smoothed = aj.Smoothed(classifier, aj.Gaussian(), theta)
    counts = lambda point: class_counts(jax.random.key(0), smoothed, point, num_samples=400, chunk=400)
    return jax.lax.map(counts, grid, batch_size=100).argmax(axis=-1).reshape(SIDE, SIDE)


SHADES, HATCHES, PLACES = ("0.97", "0.78", "0.9"), ("", "////", ""), ((0.9, 0.08), (0.1, 0.28), (0.1, 0.9))


def plane(axis, title, classes=None):
    """Axes of the unit square, over the decision regions of `classes` or, thinly, over those of the base classifier."""
    levels = [-0.5, 0.5, 1.5, 2.5]
    if classes is not None:
        at = np.linspace(0.5, len(classes) - 0.5, len(classes)) / len(classes)
        axis.contourf(at, at, classes, levels=levels, colors=SHADES, hatches=HATCHES)
        for number, place in enumerate(PLACES):
            axis.text(*place, f"class {number}", ha="center", va="center", backgroundcolor="white", fontsize=8)
    axis.contour(fine, fine, base, levels=levels[1:-1], colors="0.55", linewidths=0.8, linestyles=":")
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="first coordinate", ylabel="second coordinate")
    axis.set_title(title, fontsize=9)
    axis.label_outer()


fine = np.linspace(0, 1, 301, dtype=np.float32)
base = (
    np.asarray(classifier(np.stack(np.meshgrid(fine, fine), axis=-1).reshape(-1, 2))).argmax(axis=-1).reshape(301, 301)
)
_, axes = plt.subplots(1, 3, figsize=(9, 3.3))
plane(axes[0], "base classifier", base)
plane(axes[1], "smoothed classifier, theta = 0.03", majority(0.03))
plane(axes[2], "smoothed classifier, theta = 0.10", majority(0.10))

# %% [markdown]
# ## Certified regions
#
# There are ten inputs, each named by a letter. For each, the noise parameter theta is chosen in three ways: one number
# for all inputs, one number per input, one number per input and coordinate. `theta_max` limits theta.
# They work on one input; `jax.vmap` makes them work on many, and `jax.jit` compiles them once.

# %%
NAMES = "abcdefghij"
INPUTS = np.array(
    [
        *[(0.15, 0.1), (0.2, 0.28), (0.2, 0.56), (0.34, 0.85), (0.8, 0.88)],
        *[(0.25, 0.8), (0.85, 0.725), (0.52, 0.14), (0.44, 0.27), (0.8, 0.46)],
    ],
    np.float32,
)
KEYS = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(1)))(jnp.arange(len(INPUTS)))


@functools.partial(jax.jit, static_argnames="noise")
def searches(noise, theta):
    bound = 4 * THETA[noise]
    smoothed = aj.Smoothed(classifier, noise, theta)
    isotropic = aj.IsotropicConfig.published(steps=100, learning_rate=0.002, theta_max=bound)
    anisotropic = aj.AnisotropicConfig.published(learning_rate=0.005, theta_max=bound)

    def search(key, x):
        start, _ = aj.optimize_isotropic(key, smoothed, x, config=isotropic)
        return start, aj.optimize_anisotropic(key, smoothed.with_theta(start), x, config=anisotropic)[0]

    return jax.vmap(search)(KEYS, INPUTS)


# %% [markdown]
# `certify` then draws fresh noise, 10,000 times for each input. The region of a certificate is the set of all y with
# `norm((y - x) / theta) <= gap`. Under Gaussian noise these are circles and ellipses, under uniform noise (l1 norm)
# diamonds.

# %%
THETA = {aj.Gaussian(): 0.03, aj.Uniform(): 0.05}
METHODS = ("fixed", "isotropic", "anisotropic")
config = aj.CertifyConfig(n=10_000)


def certified(noise):
    """For each method the certificates, one for each input."""
    isotropic, anisotropic = searches(noise, THETA[noise])
    found = {}
    for method, thetas in zip(METHODS, (np.full(len(INPUTS), THETA[noise]), isotropic, anisotropic), strict=True):
        found[method] = [
            aj.certify(key, aj.Smoothed(classifier, noise, theta), x, config=config)
            for key, x, theta in zip(KEYS, INPUTS, np.asarray(thetas), strict=True)
        ]
    return found


FOUND = {noise: certified(noise) for noise in THETA}

# %%
LINES = {-1: ":", 0: "-", 1: "--", 2: (0, (4, 1, 1, 1))}
COLORS = {-1: "black", 0: "C0", 1: "C3", 2: "C2"}


def draw(axis, answer, name, width=1.3, hatch=""):
    """The region of a certificate to scale, in the line of its class, and its center (a cross: abstained)."""
    region, prediction = answer.region, int(answer.prediction)
    a, b = np.broadcast_to(region.theta, 2) * region.gap
    if region.norm == 2:
        shape = Ellipse(region.center, 2 * a, 2 * b)
    else:
        shape = Polygon(region.center + np.array([[a, 0], [0, b], [-a, 0], [0, -b]]))
    shape.set(fill=False, hatch=hatch, linestyle=LINES[prediction], edgecolor=COLORS[prediction], linewidth=width)
    axis.add_patch(shape)
    axis.plot(*region.center, "x" if prediction == aj.ABSTAIN else ".", color=COLORS[prediction], markersize=5)
    text = f"{name}:{prediction}" if prediction >= 0 else f"{name}:?"
    halo = [patheffects.withStroke(linewidth=2, foreground="white")]
    top = region.center + np.array([0, b if b < 0.06 else 0])  # small regions are named above, not inside
    where = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "va": "bottom"}
    axis.annotate(text, top, **where, fontsize=8, path_effects=halo, zorder=5)


_, axes = plt.subplots(2, 3, figsize=(9, 6.2))
for row, (noise, found) in zip(axes, FOUND.items(), strict=True):
    for axis, (method, answers) in zip(row, found.items(), strict=True):
        area = np.mean([np.exp(answer.log_volume) for answer in answers])
        plane(axis, f"l{noise.norm}, {method}: mean area {area:.4f}")
        for name, answer in zip(NAMES, answers, strict=True):
            draw(axis, answer, name)

# %% [markdown]
# Regions of class 0 are solid, those of class 1 dashed, those of class 2 dash-dotted; the number at each letter is the
# class (`?`: abstained). Ellipses grow along the band and not across it, as far as the axes allow. Each region is
# certified for a smoothed classifier of its own: these are **per-input classifiers, not reconciled by memory**. Regions
# of different classes may overlap, and then the classifiers contradict each other.

# %%
certificates = dict(zip(NAMES, FOUND[aj.Gaussian()]["anisotropic"], strict=True))
for first, a in certificates.items():
    for second, b in certificates.items():
        if first < second and a.prediction != b.prediction and not aj.disjoint(a.region, b.region):
            print(f"{first} (class {a.prediction}) and {second} (class {b.prediction}) overlap")

# %% [markdown]
# ## The memory at work
#
# The classifier with memory answers inputs one after another and stores its answers. An input inside a stored region of
# another class gets that class, and the part of its own region that lies inside. Any other region shrinks, with the
# same center and shape, until it meets no stored region of another class.


# %%
def remember(certificates, order):
    """The answers of a memory, in this order, by name; and one line for each input."""
    memory, answers, lines = aj.Memory.empty(certificates[order[0]].region.norm), {}, []
    for name in order:
        certificate = certificates[name]
        memory, answer = memory.insert(certificate)
        answers[name] = answer
        line = f"{name}: class {certificate.prediction}, proxy radius {round_down(certificate.proxy_radius, 3)}"
        if answer.changed:
            line += f" -> class {answer.prediction}, proxy radius {round_down(answer.proxy_radius, 3)}"
        if answer.prediction != certificate.prediction:
            line += f" (inside the region of {order[answer.inside]})"
        lines.append(line)
    return answers, lines


forwards, lines = remember(certificates, NAMES)
print(*lines, sep="\n")

# %% [markdown]
# The same in pictures: the thick line is the newest region after the memory; thin ones were stored before. The noise of
# d is so wide that its smoothed classifier does not see the island, and its region covers the island. So f, on the
# island, was certified with class 1 and is answered with class 2. The region of i shrinks until it touches that of h.

# %%
_, axes = plt.subplots(1, 4, figsize=(11, 3.2))
for axis, newest in zip(axes, "dfhi", strict=True):
    plane(axis, f"{newest} arrives")
    for name in NAMES[: NAMES.index(newest) + 1]:
        draw(axis, forwards[name], name, width=2 if name == newest else 1)

# %% [markdown]
# ## The order matters
#
# The first input keeps its whole region, and later regions shrink. In the opposite order other regions shrink. So
# certify in the order in which you serve.

# %%
backwards, lines = remember(certificates, NAMES[::-1])
print(*lines, sep="\n")

# %%
_, axes = plt.subplots(1, 2, figsize=(8, 4))
for axis, title, after in ((axes[0], "order a to j", forwards), (axes[1], "order j to a", backwards)):
    plane(axis, f"after memory, {title}")
    for name in NAMES:
        draw(axis, after[name], name)

# %% [markdown]
# ## Before and after
#
# The changes by the memory, for both norms, in the order a to j. Hatched regions were changed: they shrank, or their
# input was given another class. After memory no two regions of different classes meet, and the certificates are of one
# classifier, the one with memory.

# %%
_, axes = plt.subplots(2, 2, figsize=(8, 8))
for row, (noise, found) in zip(axes, FOUND.items(), strict=True):
    before = dict(zip(NAMES, found["anisotropic"], strict=True))
    after, _ = remember(before, NAMES)
    changed = [name for name in NAMES if after[name].changed]
    plane(row[0], f"l{noise.norm}, per-input classifiers,\nnot reconciled by memory")
    plane(row[1], f"l{noise.norm}, classifier with memory\n(changed: {', '.join(changed) or 'none'})")
    for name in NAMES:
        draw(row[0], before[name], name)
        draw(row[1], after[name], name, hatch="/////" if name in changed else "")
plt.show()
