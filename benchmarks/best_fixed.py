"""The best fixed theta: chosen by the draws of one seed, certified by those of another.

    python benchmarks/best_fixed.py [--images 50] [--n 10000]    # five minutes on two CPU cores

The best of several certificates is often the one that was lucky: whoever picks it by its own draws is wrong more often
than alpha (benchmarks/selection.py). So all thetas are certified with one seed, the one with the largest ACR-tilde is
chosen, and certified with another: bundled classifiers and test images, alpha = 0.001, l2 and l1. For other benchmarks,
which compare with the best fixed theta: `choose`.
"""

import argparse
import sys
import tempfile

import record

import ancer_jax as aj
from ancer_jax import report
from ancer_jax.data import Dataset, select
from ancer_jax.metrics import average_certified_radius

FACTORS = (0.75, 1.0, 1.25, 1.5, 2.0)  # of the theta that the classifier was trained with
SEED, CHOICE_SEED = 0, 1
N = 10_000


def certify(norm: str, theta: float, dataset: Dataset, folder: str, *, seed: int, n: int = N) -> dict:
    """One fixed theta of the bundled classifier."""
    config = aj.RunConfig(norm=norm, theta=theta, certify=aj.CertifyConfig(n=n), seed=seed)
    out = f"{folder}/{norm} seed {seed} fixed {theta:g}"
    aj.certify_dataset(aj.load_bundled(norm).classifier, dataset, config, out=out)
    r = report.load_results(out)
    figures = {
        "accuracy": float(r.correct.mean()),
        "ACR": average_certified_radius(r["radius"], r.correct),
        "ACR-tilde": average_certified_radius(r["radius_proxy"], r.correct),
    }
    row = {"norm": norm, "theta": theta, "seed": seed} | figures
    print(row, flush=True)
    return row


def choose(norm: str, dataset: Dataset, folder: str, *, n: int = N) -> tuple[float, list[dict]]:
    """The theta with the largest ACR-tilde, to be certified with another seed than CHOICE_SEED; and a row for each."""
    thetas = [factor * aj.load_bundled(norm).theta for factor in FACTORS]
    tried = [certify(norm, theta, dataset, folder, seed=CHOICE_SEED, n=n) for theta in thetas]
    return max(tried, key=lambda row: row["ACR-tilde"])["theta"], tried


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--n", type=int, default=N)
    options = parser.parse_args()
    whole, rows = aj.load_dataset("fashion-mnist-subset"), []
    dataset = select(whole, skip=len(whole) // options.images, max_images=options.images)
    with tempfile.TemporaryDirectory() as folder:
        for norm in ("l2", "l1"):
            best, tried = choose(norm, dataset, folder, n=options.n)
            rows += [*tried, certify(norm, best, dataset, folder, seed=SEED, n=options.n)]
    record.show(rows)
    record.save("best_fixed", {"images": options.images, "n": options.n, "rows": rows}, seed=[CHOICE_SEED, SEED])
    return 0


if __name__ == "__main__":
    sys.exit(main())
