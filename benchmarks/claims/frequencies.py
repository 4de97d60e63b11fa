"""An attacker who adds a single spatial frequency: how far do certificates reach, and where does the answer change?

The perturbation is a multiple of one basis vector of the discrete cosine transform: k half waves from top to bottom and
k from left to right, k from 0 (brightness) to 27 (nearly a checkerboard). Two smoothed classifiers are compared: the
bundled one of white noise of 0.25, and the bundled one of coloured noise, with a theta for each frequency. Certifies
bundled test images by both (n = 10,000, alpha = 0.001) and takes the first 20 of 30 that both answer correctly.

The certified distance in such a direction is where it leaves the certified region: for coloured noise theta of this
frequency times the gap, for white noise the radius. From there the distance is doubled until the answer, the majority
of 1,000 draws, is another class, and then bisected four times, which leaves 5 %. This is done along + and - the vector,
and the nearer one counts. A step may pass over a change that is undone. Nothing is clipped to [0, 1]. Beyond 28, the
distance from a black to a white image, nothing is tried.

Bar: at 0.999 of the certified distance no answer differs. As in `attack`, a violation is another class whose
probability has a lower bound above 1/2 (1,000 draws select the class, 1,000 fresh ones count it; alpha = 0.001 each).
"""

import argparse
import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import ancer_jax as aj
from ancer_jax.basis import Cosine
from ancer_jax.data import Dataset, select
from ancer_jax.metrics import round_down
from ancer_jax.models import BUNDLED_BY_NORM
from ancer_jax.models.bundled import COLOURED
from ancer_jax.smoothing import certificate_from_votes, class_counts
from benchmarks.benchmark import Benchmark, Found, Line, Lines, load, markdown, stored

LARGEST = 28.0  # the l2 distance from a black to a white image
BISECTIONS = 4
SHAPE = (28, 28, 1)
BATCH = 20  # points at a time
FEW = (0, 9, 18, 27)  # frequencies in the table of the guide


@dataclasses.dataclass(frozen=True)
class Rays:
    """Directions from images: starts [m, *d], unit vectors [m, *d], the class there [m], certified distances [m]."""

    starts: np.ndarray
    directions: np.ndarray
    labels: np.ndarray
    certified: np.ndarray

    def points(self, distances: np.ndarray) -> np.ndarray:
        """The points [m, *d] at these distances."""
        return self.starts + distances.astype(np.float32)[:, None, None, None] * self.directions


@functools.partial(jax.jit, static_argnames="draws")
def votes(keys, smoothed, points, *, draws):
    """The votes for each class at each of the points."""
    return jax.vmap(lambda key, x: class_counts(key, smoothed, x, num_samples=draws, chunk=100))(keys, points)


def count(key: jax.Array, smoothed: aj.Smoothed, points: np.ndarray, draws: int) -> np.ndarray:
    """`votes` [m, K] at points [m, *d], in batches of equal size: one compiled program does them all."""
    counts = []
    for start in range(0, len(points), BATCH):
        keys = jax.random.split(jax.random.fold_in(key, start), BATCH)
        batch = points[np.arange(start, start + BATCH) % len(points)]
        counts.append(np.asarray(votes(keys, smoothed, batch, draws=draws)))
    return np.concatenate(counts)[: len(points)]


def distances_of_change(key: jax.Array, smoothed: aj.Smoothed, rays: Rays, draws: int) -> np.ndarray:
    """The distance [m] at which the answer was seen to change; infinite where it was not found to."""
    keys = iter(jax.random.split(key, 100))
    low, high = rays.certified, np.minimum(2 * rays.certified, LARGEST)
    found, searching = np.zeros(len(low), bool), np.ones(len(low), bool)

    def changed(at: np.ndarray, where: np.ndarray) -> np.ndarray:
        answers = count(next(keys), smoothed, rays.points(at)[where], draws).argmax(axis=1)
        result = np.zeros(len(at), bool)
        result[where] = answers != rays.labels[where]
        return result

    while searching.any():
        found |= changed(high, searching)
        searching &= ~found & (high < LARGEST)
        low = np.where(searching, high, low)
        high = np.where(searching, np.minimum(2 * high, LARGEST), high)
    for _ in range(BISECTIONS if found.any() else 0):
        middle = np.sqrt(low * high)
        other = changed(middle, found)
        low, high = np.where(other, low, middle), np.where(other, middle, high)
    return np.where(found, high, np.inf)


def violations(key: jax.Array, smoothed: aj.Smoothed, rays: Rays, draws: int) -> np.ndarray:
    """Whether the answer at 0.999 of the certified distance is another class, with a bound above 1/2: bool [m]."""
    points = rays.points(0.999 * rays.certified)
    select_key, count_key = jax.random.split(key)
    selected = count(select_key, smoothed, points, draws).argmax(axis=1)
    counts = count(count_key, smoothed, points, draws)[np.arange(len(points)), selected]
    answer = certificate_from_votes(smoothed, points, selected, counts, config=aj.CertifyConfig(n=draws))
    return (np.asarray(answer.prediction) != aj.ABSTAIN) & (np.asarray(answer.prediction) != rays.labels)


def smoothed_classifiers() -> dict[str, aj.Smoothed]:
    """The two that are compared."""
    white, coloured = aj.load_bundled(BUNDLED_BY_NORM["l2"]), aj.load_bundled(COLOURED)
    theta_map = coloured.theta_map
    assert theta_map is not None
    return {
        "white": aj.Smoothed(white.classifier, aj.Gaussian(), np.asarray(white.theta, np.float32)),
        "coloured": aj.Smoothed(coloured.classifier, aj.Gaussian(theta_map.basis), theta_map.theta),
    }


def certify(
    classifiers: dict[str, aj.Smoothed], test: Dataset, options: argparse.Namespace
) -> tuple[list[int], dict[str, aj.Certificate]]:
    """The ids of the images that all answer correctly, and their certificates."""
    test = select(test, skip=len(test) // (options.images + 10), max_images=options.images + 10)
    config, key = aj.CertifyConfig(n=options.n), jax.random.key(options.seed, impl="threefry2x32")
    certificates = {
        name: aj.certify_batch(key, smoothed, test.images[:], ids=test.ids, config=config, chunk=100)
        for name, smoothed in classifiers.items()
    }
    correct = np.all([np.asarray(c.prediction) == test.labels for c in certificates.values()], axis=0)
    chosen = np.flatnonzero(correct)[: options.images]
    return test.ids[chosen].tolist(), {name: certificate[chosen] for name, certificate in certificates.items()}


def direction(frequency: int) -> np.ndarray:
    """The unit vector [28, 28, 1] of so many half waves from top to bottom and from left to right."""
    coefficients = np.zeros(SHAPE)
    coefficients[frequency, frequency] = 1
    return np.asarray(Cosine().inputs(coefficients))


def attack_frequencies(
    smoothed: aj.Smoothed, certificates: aj.Certificate, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row for each frequency."""
    region, labels = certificates.region, np.asarray(certificates.prediction)
    images = np.asarray(region.center)
    for frequency in options.frequencies:
        one = direction(frequency)
        certified = np.asarray(region.reach(one))
        theta = float(1 / np.linalg.norm(smoothed.noise.basis.coefficients(one) / np.asarray(smoothed.theta)))
        both = np.repeat([one, -one], len(images), axis=0).astype(np.float32)
        rays = Rays(np.tile(images, (2, 1, 1, 1)), both, np.tile(labels, 2), np.tile(certified, 2))
        for points in np.split(rays.points(0.999 * rays.certified), 2):
            assert np.all(region.contains(points))
        key = jax.random.fold_in(jax.random.key(options.seed + 1, impl="threefry2x32"), frequency)
        inside, outside = jax.random.split(key)
        found = distances_of_change(outside, smoothed, rays, options.draws)
        plus, minus = ([None if np.isinf(at) else float(at) for at in half] for half in np.split(found, 2))
        row = {"frequency": frequency, "theta": theta, "certified": certified.tolist()}
        wrong = violations(inside, smoothed, rays, options.draws)
        yield row | {"plus": plus, "minus": minus, "measured": len(wrong), "violations": int(wrong.sum())}


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """All frequencies of both."""
    classifiers, rows = smoothed_classifiers(), []
    ids, certificates = certify(classifiers, aj.load_dataset("fashion-mnist-subset"), options)
    for name, smoothed in classifiers.items():
        for row in attack_frequencies(smoothed, certificates[name], options):
            rows.append({"noise": name, **row})
            print(name, row["frequency"], *(_text(of(rows[-1], 0.5)) for of in (_certified, _change)), flush=True)
        yield {"n": options.n, "draws": options.draws, "largest": LARGEST, "ids": ids, "rows": rows}
    draw(rows, stored(options, ".png"))


def _certified(row: dict[str, Any], quantile: float) -> float:
    """A quantile over images of the certified distance."""
    return float(np.quantile(row["certified"], quantile, method="lower"))


def _change(row: dict[str, Any], quantile: float) -> float:
    """A quantile over images of the distance at which the answer changes; infinite if it is not found."""
    both = np.array([row["plus"], row["minus"]], float)  # None becomes NaN
    return float(np.quantile(np.where(np.isnan(both), np.inf, both).min(axis=0), quantile, method="lower"))


def _text(distance: float) -> str:
    return f"> {LARGEST:g}" if np.isinf(distance) else round_down(distance, 2)


def lines(found: Found) -> Lines:
    rows = found["results"]["rows"]
    frequencies = sorted({r["frequency"] for r in rows})
    for r in rows:
        if r["frequency"] in (frequencies[0], frequencies[len(frequencies) // 2], frequencies[-1]):
            what = f"{r['noise']} noise, {r['frequency']} half waves of theta {r['theta']:.2f}"
            figure = f"{_text(_certified(r, 0.5))}; {_text(_change(r, 0.5))}"
            yield Line(f"{what}: certified distance; distance at which the answer changes (medians)", figure)
    wrong, measured = sum(r["violations"] for r in rows), sum(r["measured"] for r in rows)
    what = "a single frequency, both noises: answers that differ at 0.999 of the certified distance"
    yield Line(what, f"{wrong} of {measured}", "0", wrong == 0)


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Both distances against the frequency: medians, and quartiles as bands; above, what is added."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis, frequencies = figure.subplots(), np.array(sorted({r["frequency"] for r in rows}))
    for noise, colour, aside in (("white", "C0", -0.3), ("coloured", "C1", 0.3)):
        some = [r for r in rows if r["noise"] == noise]
        for of, style, label in ((_certified, "o--", "certified distance"), (_change, "o-", "the answer changes")):
            lower, median, upper = (np.array([of(r, q) for r in some]) for q in (0.25, 0.5, 0.75))
            axis.plot(frequencies, np.where(median < np.inf, median, np.nan), colour + style, label=f"{noise}: {label}")
            band = np.minimum(lower, LARGEST), np.minimum(upper, LARGEST)
            axis.fill_between(frequencies, *band, color=colour, alpha=0.15, linewidth=0)
        at = frequencies[median == np.inf] + aside
        label = f"{noise}: no change up to {LARGEST:g}"
        axis.plot(at, np.full(len(at), LARGEST), f"{colour}^", markersize=8, label=label)
    axis.set(yscale="log", ylim=(0.2, 34), ylabel="l2 distance along that frequency", xticks=frequencies)
    axis.set(xlabel="spatial frequency: half waves from top to bottom, and from left to right")
    axis.set_yticks([0.25, 0.5, 1, 2, 4, 8, 16, LARGEST], ["0.25", "0.5", "1", "2", "4", "8", "16", "28"], minor=False)
    axis.set_yticks([], minor=True)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.72), ncols=2)
    for frequency in frequencies:
        top = axis.inset_axes((frequency - 1.2, 1.02, 2.4, 0.16), transform=axis.get_xaxis_transform())
        top.imshow(direction(frequency)[..., 0], cmap="gray", vmin=-2 / 28, vmax=2 / 28)
        top.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


def _table() -> str:
    """Medians for a few frequencies."""
    rows = {(r["noise"], r["frequency"]): r for r in load("frequencies")["results"]["rows"]}
    table = []
    for frequency in FEW:
        both = [rows[noise, frequency] for noise in ("white", "coloured")]
        distances = (_text(of(r, 0.5)) for of in (_certified, _change) for r in both)
        table.append([str(frequency), f"{both[1]['theta']:.2f}", *distances])
    header = ["half waves", "theta, coloured", "certified, white", "certified, coloured"]
    return markdown([*header, "answer changes, white", "answer changes, coloured"], table)


BENCHMARK = Benchmark(
    claim="How far an attacker may go along one spatial frequency: certificates of white and of coloured noise hold.",
    takes="10 minutes",
    measure=measure,
    sizes={
        "images": (2, 20),
        "n": (1000, 10_000),
        "draws": (100, 1000),
        "frequencies": ([0, 18, 27], [*range(0, 28, 3)]),
    },
    outputs={"frequencies": lines},
    figures={"table": _table},
)
