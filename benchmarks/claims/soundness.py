"""Certified regions hold, and are tight: certificates of classifiers whose true regions are known in closed form.

Gaussian noise: `f(y) = 1[w.y + b > 0]` with random w, x and anisotropic theta. The smoothed classifier is linear with
the same boundary, `p_A = Phi(gap*)`, and the boundary's distance from x in the norm `||B(y - x) / theta||_2` is
`gap* = |w.x + b| / ||theta * B(w)||_2`, where B(w) are the coefficients of w: those in pixels, w itself, and those of
the cosine basis (coloured noise, images of 8 x 8 x 1 and 32 x 32 x 3). Uniform noise: `f(y) = 1[y_j > t]`,
`p_A = (1 + gap*) / 2` and `gap* = |x_j - t| / theta_j` (smaller than 1). A certificate is violated iff its gap exceeds
gap* or it names the wrong class. Every seed is an independent certificate with noise drawn by the library, so that the
number of violations is stochastically below `Bin(seeds, alpha)`; the exact one-sided binomial test must not reject that
at 0.01. The bounds must also be tight: the median of gap / gap* must be at least 0.95. The violations of gaps that are
5 % larger show how sharp the test is.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats

from ancer_jax import ABSTAIN, Certificate, CertifyConfig, Gaussian, Noise, Smoothed, Uniform, from_function
from ancer_jax.basis import Cosine
from ancer_jax.smoothing import certificate_from_votes, count_votes
from benchmarks.benchmark import Benchmark, Found, Line, Lines, load, show

P_RANGE = (0.55, 0.9999)
BAR_P_VALUE, BAR_TIGHTNESS = 0.01, 0.95


NOISES = {"l2": Gaussian(), "l2, cosine basis": Gaussian(Cosine()), "l1": Uniform()}
SHAPES = {64: (8, 8, 1), 3072: (32, 32, 3)}


def linear(variables, y):
    """Two logits, (0, w.y + b), row by row. A sum of products, so that no device uses a reduced-precision matmul."""
    margin = (y * variables["w"]).reshape(len(y), -1).sum(-1) + variables["b"]
    return jnp.stack([jnp.zeros_like(margin), margin], axis=-1)


Cases = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def cases(noise: Noise, d: int, seeds: int, rng: np.random.Generator) -> Cases:
    """`seeds` random problems: classifier variables, x, theta (float32); true gap (float64), true class."""
    theta = np.exp(rng.uniform(np.log(0.05), 0.0, (seeds, d))).astype(np.float32)
    x = rng.uniform(0, 1, (seeds, d)).astype(np.float32)
    if noise.norm == 2:
        w = rng.normal(size=(seeds, d)).astype(np.float32)
        low, high = scipy.special.ndtri(P_RANGE)
    else:
        w = np.eye(d, dtype=np.float32)[rng.integers(d, size=seeds)]
        low, high = 2 * np.array(P_RANGE) - 1
    gap = rng.uniform(low, high, seeds)
    coefficients = np.asarray(noise.basis.coefficients(w.reshape(seeds, *SHAPES[d]))).reshape(seeds, d)
    scale = np.linalg.norm(np.float64(theta) * coefficients, axis=1)
    along = (np.float64(w) * x).sum(1)
    b = (rng.choice([-1, 1], seeds) * gap * scale - along).astype(np.float32)
    margin = along + b
    w, x, theta = (values.reshape(seeds, *SHAPES[d]) for values in (w, x, theta))
    return {"w": w, "b": b}, x, theta, np.abs(margin) / scale, (margin > 0).astype(int)


def certify_all(
    noise: Noise,
    variables: dict[str, np.ndarray],
    x: np.ndarray,
    theta: np.ndarray,
    *,
    config: CertifyConfig,
    chunk: int,
    block: int,
    seed: int,
) -> Certificate:
    """Certificates of all problems, `block` at a time: `count_votes` under vmap, over inputs and classifiers."""

    @jax.jit
    def votes(i, classifier, x, theta):
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), i)
        return count_votes(key, Smoothed(classifier, noise, theta), x, config=config, chunk=chunk)

    classifier, selected, count = None, [], []
    for start in range(0, len(x), block):
        rows = slice(start, start + block)
        classifier = from_function(linear, jax.tree.map(lambda v, rows=rows: v[rows], variables), num_classes=2)
        result = jax.vmap(votes)(jnp.arange(start, start + len(x[rows])), classifier, x[rows], theta[rows])
        for values, new in zip((selected, count), result, strict=True):
            values.append(np.asarray(new))
    assert classifier is not None
    smoothed = Smoothed(classifier, noise, theta)
    return certificate_from_votes(smoothed, x, np.concatenate(selected), np.concatenate(count), config=config)


def check(name: str, d: int, seeds: int, *, n: int, alpha: float, chunk: int, block: int, seed: int) -> dict[str, Any]:
    """One row of the report."""
    start = time.perf_counter()
    noise = NOISES[name]
    rng = np.random.default_rng([seed, d, noise.norm])
    variables, x, theta, true_gap, true_class = cases(noise, d, seeds, rng)
    config = CertifyConfig(n=n, alpha=alpha)
    result = certify_all(noise, variables, x, theta, config=config, chunk=chunk, block=block, seed=seed)
    prediction, gap = np.asarray(result.prediction), np.asarray(result.gap)
    certified = prediction != ABSTAIN
    wrong = certified & (prediction != true_class)
    violations = int((wrong | (certified & (gap > true_gap))).sum())
    ratio = gap / true_gap
    return {
        "norm": name,
        "d": d,
        "seeds": seeds,
        "n": n,
        "alpha": alpha,
        "abstained": int((~certified).sum()),
        "violations": violations,
        "p_value": float(scipy.stats.binomtest(violations, seeds, alpha, alternative="greater").pvalue),
        "median_ratio": float(np.median(ratio)),
        "largest_ratio": float(ratio.max()),
        "violations_if_5_percent_larger": int((1.05 * gap > true_gap).sum()),
        "seconds": round(time.perf_counter() - start, 1),
    }


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """All cases."""
    many, few = (20, 1) if options.small else (1000, 20)
    rows = []
    for name in NOISES:
        rows.append(check(name, 64, many, n=100_000, alpha=0.001, chunk=1000, block=20, seed=options.seed))
        rows.append(check(name, 3072, few, n=100_000, alpha=0.001, chunk=100, block=4, seed=options.seed))
        show(rows[-2:])
    yield {"rows": rows}


def lines(found: Found) -> Lines:
    for r in found["results"]["rows"]:
        case, p_value, ratio = f"{r['norm']}, d = {r['d']}", r["p_value"], r["median_ratio"]
        what = f"{case}: violated certificates of {r['seeds']:,} (alpha {r['alpha']})"
        figure = f"{r['violations']} (p-value {p_value:.2f}); {r['violations_if_5_percent_larger']} if 5 % larger"
        yield Line(what, figure, f"p-value >= {BAR_P_VALUE}", p_value >= BAR_P_VALUE)
        yield Line(f"{case}: median gap / true gap", f"{ratio:.3f}", f">= {BAR_TIGHTNESS}", ratio >= BAR_TIGHTNESS)


def _case(norm: str) -> dict[str, Any]:
    """The row of 1,000 certificates."""
    return next(r for r in load("soundness")["results"]["rows"] if (r["norm"], r["d"]) == (norm, 64))


BENCHMARK = Benchmark(
    claim="Certificates hold as often as they promise, and are tight, for classifiers with known regions.",
    takes="10 minutes",
    measure=measure,
    outputs={"soundness": lines},
    figures={
        "violations-l2": lambda: str(_case("l2")["violations"]),
        "violations-l1": lambda: str(_case("l1")["violations"]),
        "p-value-l2": lambda: f"{_case('l2')['p_value']:.2f}",
        "p-value-l1": lambda: f"{_case('l1')['p_value']:.2f}",
        "tightness-l2": lambda: f"{100 * _case('l2')['median_ratio']:.0f} %",
        "tightness-l1": lambda: f"{100 * _case('l1')['median_ratio']:.0f} %",
    },
)
