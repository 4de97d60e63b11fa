"""Bias and variance of the derivatives of estimated regions, against a closed form.

A linear classifier in 20 dimensions, anisotropic Gaussian noise, class probability 0.9. The gap of its region, from n
draws at alpha = 0.001, is `Phi^-1(b(p))` with the Clopper-Pearson bound `b`. Its derivatives in x and theta, by central
differences in float64, are compared with those of `differentiable.estimated_region` over 400 keys. Two figures, as
shares of the length of the exact derivative: bias is the length of the error of the mean, given with the standard error
of that mean; spread is the root mean square deviation of the derivative of one key.

Logits are `steepness` times the margin: where they are flat, the soft estimate is of another function. "votes, plain"
is the derivative by the score function without its control variate, of the share only, put through the same bound. The
bars are for the estimates that should have no bias but that of the bound: votes, and the soft estimate of steep logits.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats

from ancer_jax import Gaussian, Smoothed, from_function
from ancer_jax.differentiable import EstimateConfig, estimated_region
from ancer_jax.smoothing.bounds import clopper_pearson_lower_traced
from benchmarks.benchmark import Benchmark, Found, Line, Lines, load, markdown

BAR, NEARLY_UNBIASED = 0.05, ("votes", "soft, steepness 30")
D, KEYS, ALPHA, GAP = 20, 400, 0.001, float(scipy.special.ndtri(0.9))


def margin(variables, y):
    """Logits (0, margin) of a linear classifier."""
    value = (y * variables["w"]).sum(-1) + variables["b"]
    return jnp.stack([jnp.zeros_like(value), value], axis=-1)


def plain_gap(key, w, b, x, theta, n):
    """The gap with the score-function derivative of the share, no control variate."""
    key = jax.random.fold_in(key, 0)
    eps = jax.random.normal(key, (n, D))
    votes = ((jax.lax.stop_gradient(x + theta * eps) * w).sum(-1) + b > 0).astype(jnp.float32)
    center, scale = jax.lax.stop_gradient((x, theta))
    scores = (eps / scale * (x - center) + (eps**2 - 1) / scale * (theta - scale)).sum(-1)
    share = votes.mean() + (votes * scores).mean()
    return Gaussian().gap(clopper_pearson_lower_traced(share * n, n, ALPHA))


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """A row for each estimate and number of draws."""
    rng = np.random.default_rng(options.seed)
    w, x, theta = rng.normal(size=D), rng.normal(size=D), rng.uniform(0.2, 0.6, D)
    b = GAP * np.linalg.norm(w * theta) - w @ x
    keys = jax.random.split(jax.random.key(options.seed, impl="threefry2x32"), KEYS)
    arguments = jnp.float32(x), jnp.float32(theta)

    def exact(n, step=1e-6):
        def gap(at):
            p = scipy.special.ndtr((w @ at[:D] + b) / np.linalg.norm(w * at[D:]))
            return scipy.special.ndtri(scipy.stats.beta.ppf(ALPHA, n * p, n - n * p + 1))

        at = np.concatenate([x, theta])
        return np.array([(gap(at + step * e) - gap(at - step * e)) / (2 * step) for e in np.eye(2 * D)])

    def estimate(kind, steepness):
        classifier = from_function(margin, {"w": jnp.float32(steepness * w), "b": steepness * b}, num_classes=2)

        def gap(key, x, theta, n):
            config = EstimateConfig(num_samples=n, alpha=ALPHA, kind=kind)
            return estimated_region(key, Smoothed(classifier, Gaussian(), theta), x, 1, config=config).gap

        return gap

    cases = {f"soft, steepness {s}": estimate("soft", s) for s in (1, 3, 10, 30)}
    cases["votes"] = estimate("votes", 1)
    cases["votes, plain"] = lambda key, x, theta, n: plain_gap(key, w, b, x, theta, n)
    rows = []
    for n in options.n:
        true = exact(n)
        for name, gap in cases.items():
            slope = jax.grad(lambda key, x, t, gap=gap, n=n: gap(key, x, t, n), (1, 2))
            gradient = jax.jit(jax.vmap(slope, (0, None, None)))
            found = np.concatenate([np.asarray(part, np.float64) for part in gradient(keys, *arguments)], axis=1)
            row = {"estimate": name, "n": n}
            for what, part in (("x", slice(0, D)), ("theta", slice(D, None))):
                length, values = np.linalg.norm(true[part]), found[:, part]
                row[f"bias_{what}"] = float(np.linalg.norm(values.mean(0) - true[part]) / length)
                row[f"error_{what}"] = float(np.sqrt(values.var(0).sum() / KEYS) / length)
                row[f"spread_{what}"] = float(np.sqrt(values.var(0).sum()) / length)
            rows.append(row)
        yield {"dimensions": D, "keys": KEYS, "alpha": ALPHA, "rows": rows}


def lines(found: Found) -> Lines:
    for r in found["results"]["rows"]:
        what = f"{r['estimate']}, n = {r['n']:,}: bias and spread of derivatives in x; in theta"
        figure = "; ".join(f"{r[f'bias_{v}']:.3f}, {r[f'spread_{v}']:.2f}" for v in ("x", "theta"))
        if r["estimate"] in NEARLY_UNBIASED and r["n"] == 1000:
            holds = all(r[f"bias_{v}"] < BAR + 4 * r[f"error_{v}"] for v in ("x", "theta"))
            yield Line(what, figure, f"bias < {BAR} + 4 standard errors", holds)
        else:
            yield Line(what, figure)


def _table() -> str:
    rows = []
    for r in load("gradients")["results"]["rows"]:
        if r["n"] == 1000:
            row = [r["estimate"].replace("votes, plain", "votes without the control variate")]
            for v in ("x", "theta"):
                row += [f"{r[f'bias_{v}']:.3f} ({r[f'error_{v}']:.3f})", f"{r[f'spread_{v}']:.2f}"]
            rows.append(row)
    bias = "bias in {} (standard error)"
    return markdown(["1,000 draws", bias.format("x"), "spread", bias.format("theta"), "spread"], rows)


BENCHMARK = Benchmark(
    claim="Derivatives of estimated regions have nearly no bias: those of votes, and of steep softmax outputs.",
    takes="1 minute",
    measure=measure,
    sizes={"n": ([1000], [100, 1000])},
    outputs={"gradients": lines},
    figures={"table": _table},
)
