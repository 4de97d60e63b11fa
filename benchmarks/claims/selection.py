"""What selection does to alpha: a memory favours wrong certificates, and so does choosing the best of several thetas.

Votes are binomial, with the probabilities that linear classifiers have; certificates and memory are the package's own.

Memory: a threshold in one dimension, four inputs on one side and one input 1e-6 on the other side, alpha = 0.05,
n = 200. Counted: how often the answer to the last input is wrong (its class, or a region that crosses the threshold)
before and after the memory; whether an answer is ever wrong though all certificates are right; and whether, where the
memory overrules an input, the earlier certificate is always wrong. Neither of the last two may fail, and no more
answers may be wrong than 5 alpha allows.

Choice: linear classifiers, whose true radius does not depend on theta, and six thetas. For a data set of 1, 5 or 50
images the theta with the largest mean certified radius is chosen. Counted: the share of its certificates that are
wrong, with the draws that it was chosen by, and with others. The second share must not be above alpha.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.stats

from ancer_jax import Certificate, CertifyConfig, Gaussian, Memory, Smoothed, from_function
from ancer_jax.metrics import round_up
from ancer_jax.smoothing import certificate_from_votes
from benchmarks.benchmark import Benchmark, Found, Line, Lines, load

BAR = 0.001  # of p-values
EXPLAINED = "every wrong answer has a wrong certificate"
CONFIG = CertifyConfig(n0=50, n=200, alpha=0.05)
INPUTS = np.array([[0.5], [0.7], [0.9], [1.1], [-1e-6]])
THETAS = np.array([0.125, 0.1875, 0.25, 0.3125, 0.375, 0.5])
# Votes are drawn here, so that the base classifier is never called.
CLASSIFIER = from_function(lambda _, x: x, {}, num_classes=2)


def certify(rng: np.random.Generator, p: np.ndarray, x: np.ndarray, theta: np.ndarray) -> Certificate:
    """Certificates [...] of two classes; class 1 has the probabilities p [...] at x [..., 1] under theta [...]."""
    selected = (rng.binomial(CONFIG.n0, p) > CONFIG.n0 / 2).astype(int)
    count = rng.binomial(CONFIG.n, np.where(selected == 1, p, 1 - p))
    return certificate_from_votes(Smoothed(CLASSIFIER, Gaussian(), theta), x, selected, count, config=CONFIG)


def wrong(certificates: Certificate, distance: np.ndarray) -> np.ndarray:
    """Whether the class is wrong, or the region reaches the boundary, at that distance on the side of class 1."""
    prediction = np.asarray(certificates.prediction)
    right = prediction == (distance > 0)
    return (prediction >= 0) & ~(right & (certificates.radius < abs(distance)))


def p_value(wrongly: int, size: int, alpha: float) -> float:
    """Of the exact test whether a share of at most alpha is wrong."""
    return float(scipy.stats.binomtest(wrongly, size, alpha, alternative="greater").pvalue)


def of_memory(trials: int, seed: int) -> dict[str, Any]:
    """How often the answer of a memory is wrong."""
    p = np.broadcast_to(scipy.stats.norm.cdf(INPUTS[:, 0]), (trials, 5))
    x, theta = np.broadcast_to(INPUTS, (trials, 5, 1)), np.ones((trials, 5))
    found = certify(np.random.default_rng(seed), p, x, theta)
    before, after, explained = wrong(found, INPUTS[:, 0]), np.zeros(trials, bool), True
    overruled = np.zeros(trials, bool)
    for i in range(trials):
        _, answers = Memory.empty(2).insert_batch(found[i])
        prediction, gap, inside = (
            np.asarray(values)[-1] for values in (answers.prediction, answers.gap, answers.inside)
        )
        after[i] = prediction == 1 or (prediction == 0 and gap > 1e-6)
        overruled[i] = prediction != np.asarray(found.prediction)[i, -1]
        explained &= bool(before[i].any() or not after[i])
        explained &= bool(not overruled[i] or before[i, int(inside)])
    return {
        "trials": trials,
        "wrong before memory": float(before[:, -1].mean()),
        "wrong after memory": float(after.mean()),
        "overruled": int(overruled.sum()),
        EXPLAINED: explained,
        "p-value of more than 5 alpha": p_value(int(after.sum()), trials, 5 * CONFIG.alpha),
    }


def of_choice(images: int, trials: int, seed: int) -> dict[str, Any]:
    """How often the certificates of the chosen theta are wrong."""
    rng = np.random.default_rng([seed, images])
    distance = rng.uniform(0.1, 0.4, (trials, 1, images))
    p = scipy.stats.norm.cdf(distance / THETAS[:, None])
    x, theta = np.zeros((*p.shape, 1)), np.broadcast_to(THETAS[:, None], p.shape)
    chosen, fresh = certify(rng, p, x, theta), certify(rng, p, x, theta)
    best = chosen.radius.mean(axis=2).argmax(axis=1)
    at = np.arange(trials), best
    share = lambda found: float(wrong(found, distance)[at].mean())
    return {"images": images, "trials": trials, "same draws": share(chosen), "other draws": share(fresh)}


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """Both simulations."""
    answers = of_memory(options.trials, options.seed)
    choices = [of_choice(images, options.trials, options.seed) for images in (1, 5, 50)]
    yield {"alpha": CONFIG.alpha, "n": CONFIG.n, "memory": answers, "choice": choices}


def lines(found: Found) -> Lines:
    alpha, r = found["results"]["alpha"], found["results"]["memory"]
    what = f"five inputs, alpha {alpha}, {r['trials']:,} trials: wrong answers to the last, before; after memory"
    figure = f"{_percent(r['wrong before memory'])}; {_percent(r['wrong after memory'])}"
    yield Line(what, figure, f"after <= 5 alpha (p-value > {BAR})", r["p-value of more than 5 alpha"] > BAR)
    what, explained = "a wrong certificate behind every wrong answer and every overruled input", r[EXPLAINED]
    yield Line(what, f"{explained} ({r['overruled']} overruled)", "True", explained)
    for r in found["results"]["choice"]:
        what = (
            f"best of six thetas, images: {r['images']}: wrong certificates, with the draws that chose it; with others"
        )
        size = r["trials"] * r["images"]
        holds = p_value(round(r["other draws"] * size), size, alpha) > BAR
        figure = f"{_percent(r['same draws'])}; {_percent(r['other draws'])}"
        yield Line(what, figure, f"other <= alpha (p-value > {BAR})", holds)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _memory(name: str) -> Any:
    return load("selection")["results"]["memory"][name]


def _same_draws() -> str:
    """For one, five and fifty images."""
    *most, last = (_percent(r["same draws"]) for r in load("selection")["results"]["choice"])
    return f"{', '.join(most)} and {last}"


def _other_draws() -> str:
    """The largest share."""
    return f"{round_up(100 * max(r['other draws'] for r in load('selection')['results']['choice']), 1)} %"


BENCHMARK = Benchmark(
    claim="What selection does to alpha: a memory, and choosing the best of several thetas.",
    takes="a minute",
    measure=measure,
    sizes={"trials": (300, 2000)},
    outputs={"selection": lines},
    figures={
        "before": lambda: f"{_percent(_memory('wrong before memory'))} of {_memory('trials'):,}",
        "after": lambda: _percent(_memory("wrong after memory")),
        "overruled": lambda: f"{_memory('overruled'):,}",
        "same-draws": _same_draws,
        "other-draws": _other_draws,
    },
)
