"""Searches for theta at equal passes: the fast preset against the schedule of the papers' code.

For l2 and l1, on bundled test images and on CIFAR-10 (with the networks of `cifar10`): isotropic, then
anisotropic search, by `IsotropicConfig()` and `AnisotropicConfig()`, by both with fewer and with more steps and draws,
and by `.published()` of both, whole (900 + 100 steps of 100 draws) and with a tenth of the steps. Every theta is then
certified with n = 4,000 draws of its own, and its leakage is measured with 100 leakage probes. A pass is one noisy
copy, forward and backward. There is no guard and no leakage penalty.

Bar: the mean proxy radius of the whole published schedule, with at most a tenth of its 100,000 passes (fast preset).
Draws the curves into `results/search.png`.
"""

import argparse
import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ancer_jax as aj
from ancer_jax.data import Dataset, select
from ancer_jax.metrics import round_down, round_up
from ancer_jax.models import BUNDLED_BY_NORM
from ancer_jax.models.checkpoints import load_network
from ancer_jax.runs.config import Norm
from ancer_jax.runs.job import example_keys
from ancer_jax.search.leakage import leakage, make_probes
from ancer_jax.smoothing import certificate_from_votes, make_noise
from benchmarks.benchmark import Benchmark, Found, Line, Lines, load, markdown, stored

CERTIFY, TOGETHER = aj.CertifyConfig(n=4_000), 4
LEAKAGE, LIMIT = aj.LeakageConfig(num_probes=100), 0.1
FAST = [  # isotropic steps and draws, anisotropic steps and draws
    (10, 16, 15, 16),
    (20, 32, 25, 32),
    (20, 32, 50, 32),
    (20, 32, 100, 32),
    (20, 32, 100, 64),
    (40, 64, 100, 128),
]
OUTPUTS = ("search", "search-cifar10-l1")
Schedule = tuple[str, bool, aj.IsotropicConfig, aj.AnisotropicConfig]


def schedules(theta_max: float) -> Iterator[Schedule]:
    """Name, whether it is a preset, and the two searches."""
    iso, an = aj.IsotropicConfig(theta_max=theta_max), aj.AnisotropicConfig(theta_max=theta_max)
    for a, b, c, d in FAST:
        preset = (a, b, c, d) == (iso.steps, iso.num_samples, an.steps, an.num_samples)
        changed = dataclasses.replace(iso, steps=a, num_samples=b), dataclasses.replace(an, steps=c, num_samples=d)
        yield "fast", preset, *changed
    iso, an = aj.IsotropicConfig.published(theta_max=theta_max), aj.AnisotropicConfig.published(theta_max=theta_max)
    yield "published", False, dataclasses.replace(iso, steps=90), dataclasses.replace(an, steps=10)
    yield "published", True, iso, an


def cifar10_flags(parser: argparse.ArgumentParser) -> None:
    """Where CIFAR-10 and its networks are."""
    parser.add_argument("--cifar10", help="folder of CIFAR-10; without it only the bundled images are used")
    parser.add_argument("--work", default="cifar10", help="folder of networks `<norm>*/network`, trained by `cifar10`")


def cases(options: argparse.Namespace) -> Iterator[tuple[str, Norm, aj.Classifier, float, Dataset, int]]:
    """Name, norm, classifier, the theta that it was trained with, data set and number of images."""
    for norm in options.norm if options.images else ():
        bundled = aj.load_bundled(BUNDLED_BY_NORM[norm])
        images = aj.load_dataset("fashion-mnist-subset")
        yield "bundled", norm, bundled.classifier, bundled.theta, images, options.images
    for norm in options.norm if options.cifar10 else ():
        network = load_network(min(pathlib.Path(options.work).glob(f"{norm}*/network")))
        assert network.theta, "the folder does not say what noise the network was trained with"
        images = aj.load_dataset(options.cifar10)
        yield "CIFAR-10", norm, network.classifier, network.theta, images, options.cifar_images


def compare(
    case: str, smoothed: aj.Smoothed, dataset: Dataset, others: Dataset, chosen: Sequence[Schedule], seed: int
) -> Iterator[dict[str, Any]]:
    """A row for each of the schedules, which start at the theta of `smoothed`; `others` are the leakage probes."""
    keys, images = example_keys(seed, dataset.ids.astype(np.uint32)), jnp.asarray(dataset.images[:])
    probes = make_probes(
        example_keys(seed, others.ids.astype(np.uint32)),
        smoothed,
        others.images[:],
        num_samples=LEAKAGE.num_samples,
        chunk=100,
    )

    @jax.jit
    def certify(smoothed, probes, keys, images, theta):
        def one(arguments):
            key, x, theta = arguments
            of_theta = smoothed.with_theta(theta)
            selected, count = aj.count_votes(key, of_theta, x, config=CERTIFY, chunk=100)
            return selected, count, leakage(probes, of_theta, x, selected, chunk=100)

        return jax.lax.map(one, (keys, images, theta))

    for name, preset, isotropic, anisotropic in chosen:

        def search(smoothed, arguments, isotropic=isotropic, anisotropic=anisotropic):
            key, x = arguments
            first, _ = aj.optimize_isotropic(key, smoothed, x, config=isotropic)
            second, _ = aj.optimize_anisotropic(key, smoothed.with_theta(first), x, config=anisotropic)
            return jnp.broadcast_to(first, x.shape), second

        @jax.jit
        def together(smoothed, arguments, search=search):
            return jax.lax.map(functools.partial(search, smoothed), arguments, batch_size=TOGETHER)

        compiled = together.lower(smoothed, (keys, images)).compile()
        began = time.perf_counter()
        thetas = jax.block_until_ready(compiled(smoothed, (keys, images)))
        seconds = (time.perf_counter() - began) / len(images)
        passes = [c.steps * c.num_samples for c in (isotropic, anisotropic)]
        row: dict[str, Any] = {"case": case, "schedule": name, "preset": preset, "images": len(images)}
        row |= {"passes": sum(passes), "seconds an image": seconds}
        for stage, theta in zip(("isotropic", "anisotropic"), thetas, strict=True):
            selected, count, (num_leaked, num_eligible) = jax.tree.map(
                np.asarray, certify(smoothed, probes, keys, images, theta)
            )
            found = certificate_from_votes(
                smoothed.with_theta(np.asarray(theta)), images, selected, count, config=CERTIFY
            )
            correct, leaks = found.prediction == dataset.labels, num_leaked / np.maximum(num_eligible, 1)
            proxies = np.asarray(found.proxy_radius)
            row[f"{stage} passes"] = passes[0] if stage == "isotropic" else sum(passes)
            row[f"{stage} proxy radius"] = float(proxies.mean())
            row[f"{stage} radius"] = float(found.radius.mean())
            row[f"{stage} ACR-tilde"] = float((proxies * correct).mean())
            row[f"{stage} leakage"] = float(leaks.mean())
            row[f"{stage} ACR-tilde without leaky"] = float((proxies * correct * (leaks <= LIMIT)).mean())
        yield row


def draw(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """A picture of proxy radius against passes, for each case."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure = Figure(figsize=(4 * len(cases), 3.4), layout="constrained")
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        for stage, style in (("isotropic", "o--"), ("anisotropic", "s-")):
            for name, color in (("fast", "C0"), ("published", "C1")):
                some = [r for r in rows if r["case"] == case and _schedule(r) == name]
                x, y = ([r[f"{stage} {what}"] for r in some] for what in ("passes", "proxy radius"))
                axes.plot(x, y, style, color=color, label=f"{name}, {stage}")
        axes.set(xscale="log", title=case, xlabel="passes for an image, forward and backward", ylim=(0, None))
    figure.axes[0].set_ylabel("mean certified proxy radius")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """All cases and schedules."""
    rows: list[dict[str, Any]] = []
    for case, norm, classifier, theta, whole, count in cases(options):
        few, others = (select(whole, skip=len(whole) // k, max_images=k) for k in (count, 100))
        smoothed = aj.Smoothed(classifier, make_noise(norm), jnp.float32(theta))
        chosen = [*schedules(4 * theta)]
        chosen = [chosen[0], chosen[-2]] if options.small else chosen
        for row in compare(f"{case}, {norm}", smoothed, few, others, chosen, options.seed):
            rows.append(row)
            yield rows
        draw(rows, stored(options, ".png"))


def _schedule(row: Mapping[str, Any]) -> str:
    """Older raw outputs say "reference"."""
    return "published" if row["schedule"] == "reference" else row["schedule"]


def _both(row: Mapping[str, Any], stage: str) -> str:
    return f"{round_down(row[f'{stage} proxy radius'], 3)} ({round_up(row[f'{stage} leakage'], 3)})"


def lines(found: Found) -> Lines:
    published = {r["case"]: r for r in found["results"] if r["preset"] and _schedule(r) == "published"}
    for r in found["results"]:
        what = f"{r['case']}, {r['images']} images, {_schedule(r)}: passes; proxy radius (leakage) of both searches"
        figure = "; ".join([f"{r['passes']:,}", _both(r, "isotropic"), _both(r, "anisotropic")])
        theirs, size = published.get(r["case"]), "anisotropic proxy radius"
        if r["preset"] and _schedule(r) == "fast" and theirs:
            holds = r[size] >= theirs[size] and r["passes"] <= theirs["passes"] / 10
            yield Line(what, figure, ">= published, in at most 1/10 of its passes", holds)
        else:
            yield Line(what, figure)


def _presets(schedule: str) -> list[dict[str, Any]]:
    """The row of the preset, for each case."""
    rows = [r for name in OUTPUTS for r in load(name)["results"]]
    return [r for r in rows if r["preset"] and _schedule(r) == schedule]


def _table() -> str:
    rows = []
    for stage, what in (("isotropic", ", isotropic only"), ("anisotropic", "")):
        for schedule in ("fast", "published"):
            some = _presets(schedule)
            passes = f"{some[0][f'{stage} passes']:,}"
            rows.append([schedule + what, passes, *(_both(r, stage) for r in some)])
    cases = [f"{r['case']} ({r['images']} images)" for r in _presets("fast")]
    return markdown(["preset", "passes for an image", *cases], rows)


def _fewer_passes() -> str:
    fast, published = (_presets(schedule)[0]["passes"] for schedule in ("fast", "published"))
    return f"{published / fast:.0f} times fewer"


BENCHMARK = Benchmark(
    claim="The fast search finds regions as large as the published schedule, with at most a tenth of its passes.",
    takes="15 minutes (with `--cifar10`: 2 hours)",
    measure=measure,
    sizes={"images": (2, 16), "cifar_images": (1, 3), "norm": (["l2"], ["l2", "l1"])},
    arguments=cifar10_flags,
    outputs=dict.fromkeys(OUTPUTS, lines),
    figures={"table": _table, "fewer-passes": _fewer_passes},
)
