"""A universal theta: one anisotropic theta for a whole data set, found by gradient ascent, needs no memory.

    python benchmarks/shared_theta.py            # half an hour on two CPU cores
    python benchmarks/shared_theta.py --small    # a few minutes

Finds theta on the 2,000 bundled Fashion-MNIST training images (`optimize_universal`). Then certifies 50 test images
with it, with the best fixed theta, and with isotropic and anisotropic theta for each image (after memory); bundled
classifiers, n = 10,000, alpha = 0.001, l2 and l1. The best fixed theta is chosen on the test images, which favours it,
but by other draws than those that certify it (benchmarks/best_fixed.py). Draws the universal thetas into
results/shared_theta.png.

Exit status 1 if the universal theta does not beat the best fixed one in ACR-tilde.
"""

import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import best_fixed
import figures
import jax
import numpy as np
import record
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import ancer_jax as aj
from ancer_jax.data import select
from ancer_jax.report import load_results
from ancer_jax.runs.config import Method, Norm
from ancer_jax.search import UniversalConfig, optimize_universal
from ancer_jax.smoothing import make_noise

SEED = 0


def compare(
    norm: Norm, folder: str, images: int, steps: int, n: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any], np.ndarray]:
    """A row for each method; the rows of all fixed thetas; how theta was found; and the universal theta."""
    bundled, train = aj.load_bundled(norm), aj.load_dataset("fashion-mnist-subset", split="train")
    test = aj.load_dataset("fashion-mnist-subset")
    test = select(test, skip=len(test) // images, max_images=images)
    began = time.perf_counter()
    key = jax.random.key(SEED, impl="threefry2x32")
    smoothed = aj.Smoothed(bundled.classifier, make_noise(norm), bundled.theta)
    found = optimize_universal(key, smoothed, train.images[:], train.labels, config=UniversalConfig(steps=steps))
    theta, objective = map(np.asarray, found)
    seconds = time.perf_counter() - began
    best, tried = best_fixed.choose(norm, test, folder, n=n)
    runs: list[tuple[str, Method, float]] = [
        (f"fixed {best:g}", "fixed", best),
        ("universal", "universal", bundled.theta),
        ("isotropic", "isotropic", bundled.theta),
        ("ancer", "ancer", bundled.theta),
    ]
    rows = []
    for name, method, start in runs:
        config = aj.RunConfig(
            norm,
            method,
            start,
            aj.CertifyConfig(n=n),
            isotropic=aj.IsotropicConfig.published(steps=100),
            anisotropic=aj.AnisotropicConfig.published(),
            seed=SEED,
        )
        theta_map, out = theta if method == "universal" else None, f"{folder}/{norm}-{name}"
        aj.certify_dataset(bundled.classifier, test, config, out=out, theta_map=theta_map)
        results = load_results(out)
        row = {"norm": norm, "method": name} | figures.summary(results)
        row["ACR-tilde without leaky"] = figures.without_leaky(results, "radius_proxy")
        rows.append(row | {"s/image": results.seconds})
        print(rows[-1], flush=True)
    search = {
        "norm": norm,
        "steps": steps,
        "seconds": seconds,
        "objective_first_10_steps": float(objective[:10].mean()),
        "objective_last_10_steps": float(objective[-10:].mean()),
        "theta_min": float(theta.min()),
        "theta_geometric_mean": float(np.exp(np.log(theta).mean())),
        "theta_max": float(theta.max()),
    }
    return rows, tried, search, theta


def draw(thetas: Mapping[str, np.ndarray], name: str) -> None:
    """A picture of the universal theta of each norm."""
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (norm, theta) in zip(figure.subplots(1, 2), thetas.items(), strict=True):
        figure.colorbar(axis.imshow(theta[..., 0], cmap="viridis"), ax=axis, label="theta (image units)")
        axis.set_title(f"{norm}: universal theta")
        axis.axis("off")
    figure.savefig(record.RESULTS / name, dpi=120)


def main() -> int:
    small = record.parser(__doc__).parse_args().small
    images, steps, n = (2, 20, 500) if small else (50, 300, 10_000)
    rows, tried, searches, thetas = [], [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        for norm in ("l2", "l1"):
            more, of_fixed, search, thetas[norm] = compare(norm, folder, images, steps, n)
            rows, tried, searches = rows + more, tried + of_fixed, [*searches, search]
    record.show(rows)
    stored = {"images": images, "n": n, "learned": searches, "tried": tried, "rows": rows}
    record.save("shared_theta", stored, seed=SEED, small=small)
    draw(thetas, "small-shared_theta.png" if small else "shared_theta.png")
    size = {(row["norm"], row["method"].split()[0]): row["ACR-tilde"] for row in rows}
    passed = all(size[norm, "universal"] > size[norm, "fixed"] for norm in thetas)
    print("passed" if passed else "MISSED A BAR")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
