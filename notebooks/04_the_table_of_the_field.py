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
# level per image, and for ANCER, with one per pixel; after memory, and with leakage. It takes 10 images and few draws,
# which shows how the table is made and says nothing about the methods.
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
from ancer_jax.smoothing import bounds

plt.rcParams.update({"figure.dpi": 90, "savefig.dpi": 90, "font.size": 9, "figure.constrained_layout.use": True})

# %% [markdown]
# ## Classifier and images
#
# The bundled classifier was trained on Fashion-MNIST with Gaussian noise. Ten of the bundled test images, evenly
# spread:

# %%
bundled = aj.load_bundled("fashion-mnist-cnn-l2-0.25")
test = aj.load_dataset("fashion-mnist-subset")
images = select(test, skip=50, max_images=10)
print(f"trained with theta = {bundled.theta}; images {images.ids.tolist()}")

# %% [markdown]
# ## Runs
#
# A `RunConfig` holds all settings that change results, and `certify_dataset` certifies every image into a run
# directory. A run that was stopped continues where it was. With `isotropic` and `ancer` all certificates then go
# through the memory, in order of their ids. Theta is limited to four times the theta where a search starts.
# Leakage is measured on leakage probes: how many of 50 other images get this image's class under the noise that was
# found, and, for 50 more images that no search has seen, what share of single draws gets it.

# %%
few = aj.CertifyConfig(n=1_000, alpha=0.001)
configs = {f"fixed {theta:g}": aj.RunConfig(theta=theta, certify=few) for theta in (0.125, 0.25, 0.5)}
searched = aj.RunConfig(
    method="ancer",
    theta=bundled.theta,
    certify=few,
    isotropic=aj.IsotropicConfig(steps=25, num_samples=32),
    anisotropic=aj.AnisotropicConfig(steps=25, num_samples=32),
    leakage=aj.LeakageConfig(num_probes=50, num_samples=16),
    guard_samples=200,
)
configs |= {"isotropic": dataclasses.replace(searched, method="isotropic"), "ancer": searched}

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
# of the largest ball inside the region; ACR-tilde is the mean proxy radius, that of the ball of the same volume. With
# fixed noise the figures are of one smoothed classifier for all images; with `isotropic` and `ancer` they are of the
# classifier with memory, which `summary_table` takes wherever a run has one.

# %%
without_times = [
    dataclasses.replace(r, columns={name: column for name, column in r.columns.items() if name != "seconds"})
    for r in results
]
Markdown(report.summary_table(without_times, radii=[0.0, 0.25, 0.5, 0.75, 1.0]))

# %% [markdown]
# ## How to read it
#
# - **Memory**: the line of a run says how many regions had to shrink, and which figures changed. Ten images of
#   clothes lie far apart, so that hardly any region meets another one; the memory matters for near-duplicates (see
#   notebook 02). Its answers depend on the order of the images:

# %%
Markdown(orders)

# %% [markdown]
# - **Leakage**: the share of leakage probes that get this image's class under the noise found for it. Where it is
#   large, the noise itself looks like the class, and the certificate, though true, says little about the image. The
#   figures "without leaky" count every theta that is not known to leak at most 0.1 as certifying nothing. Soft leakage
#   is the share of single votes, over probes that no search has seen; it has no threshold, and is not 0 under the noise
#   of the training.
# - **Theta at its limit**: how many images have coordinates of theta at `theta_max`. A larger limit would give them
#   larger regions.
#
# Before memory, `isotropic` and `ancer` have a classifier for each image. Such figures are labelled
# "per-input classifiers, not reconciled by memory". A run with `memory=False` has only those, in
# `results_before_memory.tsv`; `results.tsv` is always of one classifier.

# %%
with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder, "isotropic alone")
    config = dataclasses.replace(configs["isotropic"], memory=False)
    aj.certify_dataset(bundled.classifier, images, config, out=out)
    alone = report.load_results(out)
print(f"speak of one classifier: {alone.reconciled}; label: {report.NOT_RECONCILED}")

# %% [markdown]
# ## From here to a paper's table
#
# Such a table takes the same calls, with another data set, classifier and settings:
#
# ```python
# test = aj.load_dataset("data/cifar10")                                # CIFAR-10's own binary files
# classifier = aj.models.load_network("nets/gaussian").classifier       # trained or converted: see the guides
# for theta in (0.12, 0.25, 0.5, 1.0):
#     config = aj.RunConfig(theta=theta)                                # n0=100, n=100,000, alpha=0.001
#     aj.certify_dataset(classifier, test, config, out=f"runs/fixed-{theta}")
# config = aj.RunConfig(method="ancer", theta=0.25)                     # 20 steps of 32 and 100 of 64 draws
# aj.certify_dataset(classifier, test, config, out="runs/ancer")
# ```
#
# The numbers of draws and alpha are by default those of [Cohen et al. 2019](https://arxiv.org/abs/1902.02918). The
# searches are by default a fast preset; `IsotropicConfig.published()` and `AnisotropicConfig.published()` are the
# schedules of the papers ([Eiras et al. 2022](https://arxiv.org/abs/2107.04570)) and their code. The limit of
# theta and the guarded choice between isotropic and anisotropic theta are ours. For fixed noise papers train one
# network for each theta. Some certify all 10,000 test images and some a part, for which there is `data.select`.
#
# ## What these numbers do not say
#
# - One image of ten is a tenth of accuracy. This table does not show that one method is better than another.
# - With few draws no radius can be large, even if all of them vote for one class:

# %%
for n in (few.n, 100_000):
    p_lower = bounds.clopper_pearson_lower(n, n, few.alpha)
    print(f"n = {n:,}: probability at most {p_lower:.5f}, gap at most {aj.Gaussian().gap(p_lower):.3f}")

# %% [markdown]
# - Each certificate holds with probability at least 1 - alpha; all of them together with at least 1 - 10 alpha. After
#   memory a line holds if its own certificate and those of all earlier images do: the i-th with at least 1 - i alpha.
# - Do not pick the best fixed theta by these runs: the best of several certificates is often the one that was lucky.
#   Choose with one seed, and certify with another.
# - A larger region may owe its size to leakage: look at the figures without leaky thetas before comparing.
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
