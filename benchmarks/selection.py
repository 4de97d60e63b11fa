"""What selection does to alpha: a memory picks wrong certificates out, and so does choosing the best of several thetas.

    python benchmarks/selection.py    # a minute on two CPU cores

Votes are binomial, with the probabilities that linear classifiers have; certificates and memory are the package's own.

memory: a threshold in one dimension, four inputs before it and one 1e-6 behind it, alpha = 0.05, n = 200. Counted: how
often the last input's answer is wrong (its class, or a region that crosses the threshold) before and after the memory;
whether an answer is ever wrong though all certificates are right; and whether, where the memory overrules an input, the
earlier certificate is always wrong. Exit status 1 if one of the last two fails, or more are wrong than 5 alpha allows.

choice: linear classifiers, whose true radius does not depend on theta, and six thetas; of a data set of 1, 5 or 50
images the theta with the largest mean certified radius is chosen. Counted: the share of its certificates that are
wrong, with the draws that it was chosen by, and with others. Exit status 1 if the latter is above alpha.
"""

import argparse
import sys

import numpy as np
import record
import scipy.stats

from ancer_jax import CertifyConfig, GaussianL2, Region, memory
from ancer_jax.certification import certification

SEED, CONFIG, NOISE = 0, CertifyConfig(n0=50, n=200, alpha=0.05), GaussianL2()
INPUTS = np.array([[0.5], [0.7], [0.9], [1.1], [-1e-6]])
THETAS = np.array([0.125, 0.1875, 0.25, 0.3125, 0.375, 0.5])


def certify(rng, p):
    """Certificates of two classes, of which class 1 has the probabilities p."""
    selected = (rng.binomial(CONFIG.n0, p) > CONFIG.n0 / 2).astype(int)
    count = rng.binomial(CONFIG.n, np.where(selected == 1, p, 1 - p))
    return certification(selected, count, certificate=NOISE, config=CONFIG)


def wrong(certificates, distance, theta=1.0):
    """Whether a region reaches the border, at that distance on the side of class 1, or the class is the wrong one."""
    right = certificates.prediction == (distance > 0)
    return (certificates.prediction >= 0) & ~(right & (theta * certificates.gap < abs(distance)))


def of_memory(trials):
    found = certify(np.random.default_rng(SEED), np.broadcast_to(scipy.stats.norm.cdf(INPUTS[:, 0]), (trials, 5)))
    before, after, explained = wrong(found, INPUTS[:, 0]), np.zeros(trials, bool), True
    overruled = np.zeros(trials, bool)
    for i in range(trials):
        regions = Region(INPUTS, np.ones(5), found.gap[i], 2)
        _, info = memory.insert_batch(memory.empty(2), regions, found.prediction[i])
        crosses = info.prediction[-1] == 0 and info.region.gap[-1] > 1e-6
        after[i] = info.prediction[-1] == 1 or crosses
        overruled[i] = info.prediction[-1] != found.prediction[i, -1]
        explained &= bool(before[i].any() or not after[i])
        explained &= bool(not overruled[i] or before[i, int(info.inside[-1])])
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


def of_choice(images, trials):
    rng = np.random.default_rng([SEED, images])
    distance = rng.uniform(0.1, 0.4, (trials, 1, images))
    p = scipy.stats.norm.cdf(distance / THETAS[:, None])
    chosen, fresh = certify(rng, p), certify(rng, p)
    best = (THETAS[:, None] * chosen.gap).mean(axis=2).argmax(axis=1)
    at = np.arange(trials), best
    share = lambda found: float(wrong(found, distance, THETAS[:, None])[at].mean())
    return {"images": images, "trials": trials, "same draws": share(chosen), "other draws": share(fresh)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=2000)
    trials = parser.parse_args().trials
    answers, choices = of_memory(trials), [of_choice(images, trials) for images in (1, 5, 50)]
    record.show([answers])
    record.show(choices)
    record.save("selection", {"alpha": CONFIG.alpha, "n": CONFIG.n, "memory": answers, "choice": choices}, seed=SEED)
    passed = answers["every wrong answer has a wrong certificate"] and answers["p-value of more than 5 alpha"] > 1e-3
    for row in choices:
        wrongly, size = round(row["other draws"] * trials * row["images"]), trials * row["images"]
        passed &= scipy.stats.binomtest(wrongly, size, CONFIG.alpha, alternative="greater").pvalue > 1e-3
    print("passed" if passed else "MISSED A BAR")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
