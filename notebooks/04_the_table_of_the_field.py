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
# # The table of the field
#
# Papers on randomized smoothing report certified accuracy at a few radii and the average certified radius (ACR). This
# notebook makes that table with `certify_dataset` and `report`: for fixed noise of several strengths, for one noise
# level per image and for ANCER, one per pixel; after memory, and with leakage. It does so on 10 images with few draws,
# which shows how the table is made and proves nothing about the methods.
#
# Takes about 40 seconds on two CPU cores.

# %%
import dataclasses
import pathlib
import tempfile

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown

import ancer_jax as aj
from ancer_jax import report
from ancer_jax.data import select
from ancer_jax.metrics import certified_accuracy

plt.rcParams.update({"figure.dpi": 90, "savefig.dpi": 90, "font.size": 9, "figure.constrained_layout.use": True})

# %% [markdown]
# ## Classifier and images
#
# The bundled classifier was trained on Fashion-MNIST with Gaussian noise. Ten of the bundled test images, evenly
# spread:

# %%
bundled = aj.load_bundled("l2")
test = aj.load_dataset("fashion-mnist-subset")
images = select(test, skip=50, max_images=10)
print(f"trained with theta = {bundled.theta}; images {images.ids.tolist()}")

# %% [markdown]
# ## Runs
#
# A `RunConfig` holds all that changes results, and `certify_dataset` certifies every image into a run directory. A run
# that was stopped continues where it was. With `isotropic` and `ancer` all images then go through the memory, in order
# of their ids. The searches are bounded by four times the theta that they start from; leakage asks how many of 50 other
# images the noise that was found sends to the image's class, and which share of single draws it sends there, over 50
# more that no search has seen.

# %%
few = aj.CertifyConfig(n=1_000, alpha=0.001)
searches = {
    "isotropic": aj.IsotropicConfig(steps=25, num_samples=32),
    "anisotropic": aj.AnisotropicConfig(steps=25, num_samples=32),
    "leakage": aj.LeakageConfig(num_references=50, num_samples=16),
    "guard_samples": 200,
}
configs = {f"fixed {theta:g}": aj.RunConfig(theta=theta, certify=few) for theta in (0.125, 0.25, 0.5)}
for method in ("isotropic", "ancer"):
    configs[method] = aj.RunConfig(method=method, theta=bundled.theta, certify=few, **searches)

results = []
with tempfile.TemporaryDirectory() as folder:
    for name, config in configs.items():
        aj.certify_dataset(bundled.classifier, images, config, out=pathlib.Path(folder, name))
        results.append(report.load_results(pathlib.Path(folder, name)))
    orders = report.format_table(report.order_rows(results[-1:], orders=5))

# %% [markdown]
# ## The table
#
# All figures are over all 10 images; a wrong answer or an abstention counts as radius 0. ACR is the mean radius, that
# of the largest ball inside the region; ACR-tilde the mean proxy radius, that of the ball of the same volume. What is
# certified is the smoothed classifier: with fixed noise one for all images, with `isotropic` and `ancer` the one with
# memory, which `summary_table` takes wherever a run has gone through one.

# %%
without_times = [
    dataclasses.replace(r, columns={name: column for name, column in r.columns.items() if name != "time"})
    for r in results
]
Markdown(report.summary_table(without_times, radii=[0.0, 0.25, 0.5, 0.75, 1.0]))

# %% [markdown]
# ## How to read it
#
# - **Memory**: the line of a run says how many regions had to shrink, and which figures changed. Ten images of
#   clothes lie far apart, so that hardly any region meets another one; near-duplicates are where the memory works (see
#   notebook 02). Its answers depend on the order of the images:

# %%
Markdown(orders)

# %% [markdown]
# - **Leakage**: the share of other images that get this image's class under the noise found for it. Where it is large,
#   the noise itself looks like the class, and the certificate, though true, says little about the image. The columns
#   "without leaky" count every theta that is not known to leak at most 0.1 as certifying nothing. Soft leakage is the
#   share of single votes, over images that no search has seen; it has no threshold, and is not 0 under usual noise.
# - **Theta at its bound**: how many images have coordinates of theta at `theta_max`. Their regions are as large as
#   the bound lets them be.
#
# Before memory, `isotropic` and `ancer` have a classifier for each image. Such figures are labelled
# "per-input classifiers, not reconciled by memory". A run with `reconcile=False` has only those, in
# `results_before_memory.tsv`; `results.tsv` is always of one classifier.

# %%
with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder, "isotropic alone")
    aj.certify_dataset(bundled.classifier, images, configs["isotropic"], out=out, reconcile=False)
    alone = report.load_results(out)
print(f"speak of one classifier: {alone.reconciled}; label: {report.NOT_RECONCILED}")

# %% [markdown]
# ## From here to a paper's table
#
# The same calls make it, with another data set, classifier and settings:
#
# ```python
# test = aj.load_dataset("data/cifar10")                                # CIFAR-10's own binary files
# classifier = aj.models.load_network("nets/gaussian").classifier       # trained or converted: see the README
# for theta in (0.12, 0.25, 0.5, 1.0):
#     config = aj.RunConfig(theta=theta)                                # n0=100, n=100,000, alpha=0.001
#     aj.certify_dataset(classifier, test, config, out=f"runs/fixed-{theta}")
# config = aj.RunConfig(method="ancer", theta=0.25)                     # 20 steps of 32 and 100 of 64 draws
# aj.certify_dataset(classifier, test, config, out="runs/ancer")
# ```
#
# Draws, steps and learning rates are by default those of the papers ([Cohen et al.
# 2019](https://arxiv.org/abs/1902.02918), [Eiras et al. 2022](https://arxiv.org/abs/2107.04570)) and their code; the
# upper bound of theta and the guarded choice between isotropic and anisotropic theta are not theirs. For fixed noise
# papers train one network for each theta. Some certify all 10,000 test images and some a part, which `data.select`
# takes.
#
# ## What these numbers do not say
#
# - One image of ten is a tenth of accuracy. No method is better than another by this table.
# - With few draws no radius can be large, even if all of them vote for one class:

# %%
for n in (few.n, 100_000):
    p_lower = aj.bounds.clopper_pearson_lower(n, n, few.alpha)
    print(f"n = {n:,}: probability at most {p_lower:.5f}, gap at most {aj.GaussianL2().gap(p_lower):.3f}")

# %% [markdown]
# - Each certificate holds with probability at least 1 - alpha; all of them together with at least 1 - 10 alpha. After
#   memory a line holds if its own certificate and those of all earlier images do: the i-th with at least 1 - i alpha.
# - Do not pick the best fixed theta by these runs: of several certificates the best is often the one that was lucky.
#   Choose with one seed, and certify with another.
# - A larger region need not be about the image: look at the columns without leaky thetas before comparing.
#
# ## Curves
#
# Certified accuracy against radius and proxy radius. `report.plot_certified_accuracy` draws the same into a file.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9.5, 4), sharey=True)
styles = {"fixed 0.125": ":", "fixed 0.25": "--", "fixed 0.5": "-.", "isotropic": (0, (6, 2)), "ancer": "-"}
for axis, column, title in (
    (axes[0], "radius", "l2 radius"),
    (axes[1], "radius_proxy", "l2 proxy radius (same volume)"),
):
    end = 1.05 * max(r[column].max() for r in results)
    at = np.linspace(0, end, 500)
    for r in results:
        width, name = (2.2, f"{r.name}, with memory") if r.data_dependent else (1.2, r.name)
        axis.plot(
            at, certified_accuracy(r[column], r.correct, at), linestyle=styles[r.name], linewidth=width, label=name
        )
    axis.set(xlabel=f"{title}, units of pixels in [0, 1]", xlim=(0, end), ylim=(0, 1.02))
axes[0].set_ylabel(f"certified accuracy ({len(images)} images)")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, handlelength=3.5)
plt.show()
