"""What selection does to alpha: a memory favours wrong certificates, and so does choosing the best of several thetas.

    python benchmarks/selection.py            # a minute on two CPU cores
    python benchmarks/selection.py --small    # 300 trials

Votes are binomial, with the probabilities that linear classifiers have; certificates and memory are the package's own.

Memory: a threshold in one dimension, four inputs on one side and one input 1e-6 on the other side, alpha = 0.05,
n = 200. Counted: how often the answer to the last input is wrong (its class, or a region that crosses the threshold)
before and after the memory; whether an answer is ever wrong though all certificates are right; and whether, where the
memory overrules an input, the earlier certificate is always wrong. Exit status 1 if one of the last two fails, or if
more answers are wrong than 5 alpha allows.

Choice: linear classifiers, whose true radius does not depend on theta, and six thetas. For a data set of 1, 5 or 50
images the theta with the largest mean certified radius is chosen. Counted: the share of its certificates that are
wrong, with the draws that it was chosen by, and with others. Exit status 1 if the second share is above alpha.
"""

import sys
from typing import Any

import numpy as np
import record
import scipy.stats

from ancer_jax import Certificate, CertifyConfig, Gaussian, Memory, Smoothed, from_function
from ancer_jax.smoothing import certificate_from_votes

SEED, CONFIG = 0, CertifyConfig(n0=50, n=200, alpha=0.05)
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


def of_memory(trials: int) -> dict[str, Any]:
    """How often the answer of a memory is wrong."""
    p = np.broadcast_to(scipy.stats.norm.cdf(INPUTS[:, 0]), (trials, 5))
    x, theta = np.broadcast_to(INPUTS, (trials, 5, 1)), np.ones((trials, 5))
    found = certify(np.random.default_rng(SEED), p, x, theta)
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
        "every wrong answer has a wrong certificate": explained,
        "p-value of more than 5 alpha": scipy.stats.binomtest(
            int(after.sum()), trials, 5 * CONFIG.alpha, alternative="greater"
        ).pvalue,
    }


def of_choice(images: int, trials: int) -> dict[str, Any]:
    """How often the certificates of the chosen theta are wrong."""
    rng = np.random.default_rng([SEED, images])
    distance = rng.uniform(0.1, 0.4, (trials, 1, images))
    p = scipy.stats.norm.cdf(distance / THETAS[:, None])
    x, theta = np.zeros((*p.shape, 1)), np.broadcast_to(THETAS[:, None], p.shape)
    chosen, fresh = certify(rng, p, x, theta), certify(rng, p, x, theta)
    best = chosen.radius.mean(axis=2).argmax(axis=1)
    at = np.arange(trials), best
    share = lambda found: float(wrong(found, distance)[at].mean())
    return {"images": images, "trials": trials, "same draws": share(chosen), "other draws": share(fresh)}


def main() -> int:
    parser = record.parser(__doc__)
    parser.add_argument("--trials", type=int)
    options = parser.parse_args()
    trials = options.trials or (300 if options.small else 2000)
    answers, choices = of_memory(trials), [of_choice(images, trials) for images in (1, 5, 50)]
    record.show([answers])
    record.show(choices)
    stored = {"alpha": CONFIG.alpha, "n": CONFIG.n, "memory": answers, "choice": choices}
    record.save("selection", stored, seed=SEED, small=options.small)
    passed = answers["every wrong answer has a wrong certificate"] and answers["p-value of more than 5 alpha"] > 1e-3
    for row in choices:
        wrongly, size = round(row["other draws"] * trials * row["images"]), trials * row["images"]
        passed &= scipy.stats.binomtest(wrongly, size, CONFIG.alpha, alternative="greater").pvalue > 1e-3
    print("passed" if passed else "MISSED A BAR")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
