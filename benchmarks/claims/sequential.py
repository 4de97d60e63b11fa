"""Sequential sampling: how many draws it takes, and whether it decides what all draws decide.

1. By simulation, the mean number of draws that decide one radius at sigma = 1 (l2), for inputs whose p is Phi of the
   radii that eth-sri/acr-weakness publishes for 10,000 CIFAR-10 test images (Gaussian training, sigma 1, n = 1e5;
   quantiles below; the 30.31 % that abstain there get p uniform in [0.25, 0.5]). Compared are ours, the confidence
   sequence after every draw (`bounds.confidence_sequence_lower`, both sides at alpha / 2, at most 131,100 draws, as in
   the code of Voracek 2024), and the counts in that paper, of a network and a p that are not published.
2. How often the bound is above p, over 20,000 inputs of one p, for several p.
3. On the bundled images, and on CIFAR-10 with the networks of `cifar10`: n = 100,000 for every image,
   against `--sampling sequential` by all radii of the table of the literature, by each alone, and by a tolerance of
   2 %.

The confidence sequence has no bar: it proves both answers at alpha / 2 each, and ours gives inputs up by a guess. The
benchmark `bounds` compares the two where both only prove that a radius is reached.

Bars: no more failures than alpha explains; the decisions of n = 100,000 at every radius that it certifies with 1 %
slack (at radius 0: with a gap of 0.01). On images also 20 times fewer draws for radii and 3 times for the tolerance. A
radius that no certificate of a fixed theta can reach has no bar. Where even `least` is lower, the number of an oracle
that knows p and looks once, that bar cannot be met.
"""

import argparse
import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import scipy.stats

import ancer_jax as aj
from ancer_jax.data import Dataset, select
from ancer_jax.runs import read_run
from ancer_jax.runs.config import Method
from ancer_jax.smoothing import bounds, make_noise
from ancer_jax.smoothing.sequential import SequentialVotes, sample_until_decided, scales_of
from benchmarks import figures
from benchmarks.benchmark import Benchmark, Found, Line, Lines, load, markdown
from benchmarks.claims import search

CONFIG = aj.CertifyConfig()
PUBLISHED = {0.5: 531, 1.25: 2169, 2.0: 2130}  # Voracek 2024, table of CIFAR-10, sigma 1: betting
TOLERANCE = 0.02
THETA = {"l2": 0.25, "l1": 0.5}  # of raw outputs that do not say it
OUTPUTS = ("sequential", "sequential-cifar10-l1")
# 41 quantiles of the positive certified radii.
QUANTILES = np.array([
    0.0, 0.03, 0.05, 0.09, 0.11, 0.14, 0.17, 0.21, 0.24, 0.27, 0.31, 0.35, 0.38, 0.42, 0.46, 0.5, 0.54, 0.59, 0.63,
    0.67, 0.72, 0.77, 0.83, 0.89, 0.94, 1.0, 1.06, 1.13, 1.2, 1.27, 1.34, 1.42, 1.52, 1.62, 1.72, 1.83, 1.97, 2.14,
    2.32, 2.64, 3.81,
])  # fmt: skip


def public_p(count: int) -> np.ndarray:
    """Class probabilities that have the published distribution of radii."""
    u = (np.arange(count) + 0.5) / count
    certified = scipy.stats.norm.cdf(np.interp((u - 0.3031) / 0.6969, np.linspace(0, 1, 41), QUANTILES))
    return np.where(u < 0.3031, 0.25 + 0.25 * u / 0.3031, certified)


def simulate(p: np.ndarray, rule: aj.SequentialConfig, seed: int, norm: str = "l2") -> SequentialVotes:
    """Sequential sampling of inputs with the class probabilities p."""
    rng = np.random.default_rng(seed)

    def draw(stage, columns, first, stop):
        votes = rng.binomial(stop - first, p[columns])
        return np.stack([votes, stop - first - votes], axis=-1)

    selected, scales = np.zeros(len(p), np.int64), np.ones((len(p), 1))
    return sample_until_decided(draw, selected, scales, noise=make_noise(norm), config=CONFIG, sequential=rule)


def draws_of_the_sequence(p: np.ndarray, at: float, seed: int, most: int = 131_100) -> float:
    """Mean number of draws until the confidence sequence, of both sides, excludes `at`."""
    rng, taken = np.random.default_rng(seed), []
    for one in p:
        drawn, count, block = 0, 0, 1_000
        while drawn < most:
            block = min(block, most - drawn)
            counts, trials = count + (rng.random(block) < one).cumsum(), drawn + 1 + np.arange(block)
            lower = bounds.confidence_sequence_lower(counts, trials, CONFIG.alpha / 2) > at
            upper = bounds.confidence_sequence_lower(trials - counts, trials, CONFIG.alpha / 2) > 1 - at
            if (decided := lower | upper).any():
                drawn += int(decided.argmax()) + 1
                break
            drawn, count, block = drawn + block, counts[-1], 2 * block
        taken.append(drawn)
    return float(np.mean(taken))


def simulations(small: bool, seed: int) -> dict[str, Any]:
    """Draws and failures."""
    p, inputs, rows, failures = public_p(400 if small else 2_000), 1_000 if small else 20_000, [], []
    for at, published in PUBLISHED.items():
        ours = simulate(p, aj.SequentialConfig(radii=(at,)), seed)
        sequence = draws_of_the_sequence(p[::4], float(scipy.stats.norm.cdf(at)), seed)
        rows.append({"radius": at, "ours": ours.n.mean(), "confidence sequence": sequence, "published": published})
    for norm in ("l2", "l1"):
        for rule in (aj.SequentialConfig(radii=(0.25, 0.5, 1.0)), aj.SequentialConfig(tolerance=TOLERANCE)):
            for one in (0.5, 0.6, 0.75, 0.9, 0.99, 0.999):
                p_lower, _ = simulate(np.full(inputs, one), rule, seed, norm).evidence.bound_and_gap(make_noise(norm))
                failed = int((p_lower > one).sum())
                p_value = scipy.stats.binomtest(failed, inputs, CONFIG.alpha, alternative="greater").pvalue
                failures.append({"norm": norm, "rule": str(rule), "p": one, "failures": failed, "p_value": p_value})
    return {"inputs": inputs, "draws": rows, "failures": failures}


def least_draws(p: np.ndarray, norm: str, goals: np.ndarray | None) -> float:
    """Draws of an oracle: one look, planned with p, at which the bound is near that of n draws, or decides `goals`."""
    sizes = np.unique(np.geomspace(100, CONFIG.n, 400).astype(int))[:, None]

    def gap(size):
        return make_noise(norm).gap(bounds.clopper_pearson_lower((p * size).astype(int), size, CONFIG.alpha))

    whole = np.asarray(gap(np.full_like(p, CONFIG.n, dtype=int)))
    if goals is None:
        enough = gap(sizes) >= (1 - TOLERANCE) * whole
    else:
        reached = np.where(whole >= goals, goals, 0).max(axis=0)
        enough = gap(sizes) >= reached
    return float(sizes[enough.argmax(axis=0), 0].mean())


def compare(
    name: str, classifier: aj.Classifier, dataset: Dataset, base: aj.RunConfig, folder: pathlib.Path
) -> Iterator[dict[str, Any]]:
    """A row for each rule of sequential sampling, against all draws."""

    def run(sampling: aj.SequentialConfig | None) -> dict[str, np.ndarray]:
        out = folder / f"{name}-{sampling}".replace(" ", "").replace("/", "-")
        aj.certify_dataset(classifier, dataset, dataclasses.replace(base, sampling=sampling), out=out)
        return read_run(out).columns("counts", "n", "draws", "gap", "theta")

    whole, norm, radii = run(None), base.norm, figures.RADII[base.norm]
    theta = whole["theta"]
    smallest, mean = scales_of(theta).T
    p = whole["counts"] / CONFIG.n
    rules: Sequence[tuple[float, ...] | None] = (radii, *((at,) for at in radii if at), None)
    for rule in rules:
        sampling = aj.SequentialConfig(rule) if rule else aj.SequentialConfig(tolerance=TOLERANCE)
        some = run(sampling)
        assert (some["theta"] == theta).all()
        lost = gained = 0
        for scale in (smallest, mean):
            for at in rule or ():
                sure = whole["gap"] * scale >= 1.01 * at if at else whole["gap"] > 0.01
                ours = some["gap"] * scale >= at if at else some["gap"] > 0
                lost += int((sure & ~ours).sum())
                gained += int((ours & (whole["gap"] * scale < at)).sum())
        goals = None if rule is None else np.array([at / s for at in rule for s in (smallest, mean)])
        kept = some["gap"][whole["gap"] > 0] / whole["gap"][whole["gap"] > 0]
        yield {
            "case": name,
            "theta": base.theta,
            "rule": "2 % tolerance" if rule is None else ", ".join(f"{at:g}" for at in rule),
            "images": len(theta),
            "draws": some["draws"].mean(),
            "fewer": CONFIG.n / some["draws"].mean(),
            "fewer, least": CONFIG.n / least_draws(p, norm, goals),
            "sure decisions lost": lost,
            "decisions gained": gained,
            "gap kept, mean": kept.mean() if rule is None else None,
            "gap kept, least": kept.min() if rule is None else None,
        }


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """Simulations, then a row for each case and rule."""
    rows: list[dict[str, Any]] = []
    results = {"simulated": simulations(options.small, options.seed), "rows": rows}
    yield results
    for case, norm, classifier, theta, whole, count in search.cases(options):
        methods: list[tuple[Method, int]] = [("fixed", count)]
        if case == "bundled":
            methods.append(("ancer", max(1, count // 5)))
        for method, images in methods:
            config = aj.RunConfig(
                norm=norm,
                method=method,
                theta=theta,
                # Short searches are enough: all rules are compared at the same theta.
                isotropic=aj.IsotropicConfig.published(steps=50),
                anisotropic=aj.AnisotropicConfig.published(steps=50),
                leakage=None,
                seed=options.seed,
                memory=False,
            )
            dataset = select(whole, skip=len(whole) // images, max_images=images)
            with tempfile.TemporaryDirectory() as folder:
                for row in compare(f"{case}, {norm}, {method}", classifier, dataset, config, pathlib.Path(folder)):
                    rows.append(row)
                    yield results


def _failures(found: Found) -> tuple[str, float, int]:
    """The largest number of failures, its p-value, and the number of cases."""
    simulated = found["results"]["simulated"]
    worst = max(simulated["failures"], key=lambda r: r["failures"])
    inputs = simulated.get("inputs", 20_000)  # an older raw output does not say how many
    return f"{worst['failures']} of {inputs:,}", worst["p_value"], len(simulated["failures"])


def lines(found: Found) -> Lines:
    for r in found["results"]["simulated"]["draws"]:
        what = f"simulated draws to decide radius {r['radius']:g} at sigma 1: ours / confidence sequence (published)"
        figure = f"{r['ours']:,.0f} / {r['confidence sequence']:,.0f} ({r['published']:,})"
        yield Line(what, figure)
    failures, p_value, cases = _failures(found)
    what = f"simulated bounds above p (alpha {CONFIG.alpha}), most of {cases} cases"
    yield Line(what, f"{failures} (p-value {p_value:.2f})", f"p-value > 0.01 / {cases}", p_value > 0.01 / cases)
    yield from lines_of_images(found)


def lines_of_images(found: Found) -> Lines:
    for r in found["results"]["rows"]:
        what = f"{r['case']}, {r['images']} images, {r['rule']}: times fewer draws (an oracle); decisions lost"
        figure = f"{r['fewer']:.1f} ({r['fewer, least']:.1f}); {r['sure decisions lost']}"
        if not _reachable(r):
            yield Line(f"{what} (no certificate reaches this radius)", figure)
            continue
        bar = 3 if "tolerance" in r["rule"] else 20
        yield Line(what, figure, f">= {bar}; 0", r["fewer"] >= bar and r["sure decisions lost"] == 0)


def _reachable(r: dict[str, Any]) -> bool:
    """Whether a certificate can reach the one radius of a row at all: of a fixed theta, the one of the training."""
    _, norm, method = r["case"].split(", ")
    if method != "fixed" or not r["rule"].replace(".", "").isdigit():
        return True
    largest = make_noise(norm).gap(bounds.clopper_pearson_lower(CONFIG.n, CONFIG.n, CONFIG.alpha))
    return bool(float(r["rule"]) <= r.get("theta", THETA[norm]) * largest)


def _cases() -> dict[str, list[dict[str, Any]]]:
    """For each case the rows of all radii, of single ones, and of the tolerance."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in OUTPUTS:
        for r in load(name)["results"]["rows"]:
            found.setdefault(f"{r['case'].replace('ancer', 'ANCER')} ({r['images']} images)", []).append(r)
    return found


def _times(value: float) -> str:
    return f"{value:.1f}" if value < 50 else f"{value:.0f}"


def _table() -> str:
    rows = []
    for case, (together, *alone, tolerance) in _cases().items():
        some = [r["fewer"] for r in alone if _reachable(r)]
        both = [f"{_times(r['fewer'])} ({_times(r['fewer, least'])})" for r in (together, tolerance)]
        rows.append([case, both[0], " to ".join(dict.fromkeys((_times(min(some)), _times(max(some))))), both[1]])
    header = "times fewer draws than n = 100,000", "all radii of a table (l2: 0 to 2, l1: 0 to 4)"
    return markdown([*header, "one of them alone (that can be reached)", "tolerance 2 %"], rows)


def _span(norm: str) -> str:
    """Least and most times fewer draws for all radii of a table."""
    found = [rows[0]["fewer"] for case, rows in _cases().items() if norm in case]
    return f"{_times(min(found))} to {_times(max(found))}"


BENCHMARK = Benchmark(
    claim="Sequential sampling decides what n = 100,000 decides, with fewer draws and as few failures as alpha allows.",
    takes="90 minutes (with `--cifar10`: 3 hours)",
    measure=measure,
    sizes={"images": (0, 50), "cifar_images": (1, 6), "norm": (["l2", "l1"], ["l2", "l1"])},
    arguments=search.cifar10_flags,
    outputs=dict(zip(OUTPUTS, (lines, lines_of_images), strict=True)),
    figures={
        "table": _table,
        "radii-l2": lambda: _span("l2"),
        "radii-l1": lambda: _span("l1"),
        "failures": lambda: _failures(load("sequential"))[0],
        "failures-p-value": lambda: f"{_failures(load('sequential'))[1]:.2f}",
    },
)
