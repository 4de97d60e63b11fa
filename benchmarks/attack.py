"""Search for violations inside certified regions: projected gradient ascent through the noise finds none.

    python benchmarks/attack.py            # half an hour on two CPU cores
    python benchmarks/attack.py --small    # a minute

Certifies 20 bundled test images under fixed, isotropic and anisotropic noise, l2 and l1 (n = 10,000, alpha = 0.001).
Then attacks each smoothed classifier (`differentiable.attack`: 50 steps of 64 draws, from the center) inside its
certified region, and inside regions up to 4 times as large (l1: 32), where nothing is promised. The class that the
smoothed classifier gives at each point found is measured with 2,000 fresh draws: a violation is another class whose
probability has a lower bound above 1/2 (alpha = 0.001 each). As many random points on the surfaces of the regions are
measured in the same way.

Exit status 1 if there is a violation inside a certified region, or if the attack is so weak that it changes less than
half of the answers at the largest size (fixed noise).
"""

import functools
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import record

import ancer_jax as aj
from ancer_jax.data import Dataset, select
from ancer_jax.differentiable import attack
from ancer_jax.runs import read_run
from ancer_jax.runs.config import Method, Norm
from ancer_jax.smoothing import certificate_from_votes, count_votes, make_noise

SEED = 0
SCALES = {"l2": (1.0, 1.5, 2.0, 3.0, 4.0), "l1": (1.0, 4.0, 8.0, 16.0, 32.0)}
MEASURE = aj.CertifyConfig(n=2_000)


@functools.partial(jax.jit, static_argnames="norm")
def search(keys, classifier, x, theta, gap, label, *, norm):
    """A point of each region at which the smoothed classifier is likely to give another class."""
    noise = make_noise(norm)

    def one(key, x, theta, gap, label):
        return attack(key, aj.Smoothed(classifier, noise, theta), aj.Region(x, theta, gap, noise.norm), label)

    return jax.vmap(one)(keys, x, theta, gap, label)


@functools.partial(jax.jit, static_argnames="norm")
def random_points(keys, x, theta, gap, *, norm):
    """Random points on the surface of each region: uniform directions (l2), or points of the faces (l1)."""

    def one(key, x, theta, gap):
        if norm == "l2":
            scaled = jax.random.normal(key, x.shape)
            return x + theta * gap * (1 - 1e-5) * scaled / jnp.sqrt((scaled**2).sum())
        scaled = jax.random.laplace(key, x.shape)
        return x + theta * gap * (1 - 1e-5) * scaled / jnp.abs(scaled).sum()

    return jax.vmap(one)(keys, x, theta, gap)


@functools.partial(jax.jit, static_argnames="norm")
def count(keys, classifier, x, theta, *, norm):
    """The selected class at each of the points x, and its votes."""

    def one(key, x, theta):
        return count_votes(key, aj.Smoothed(classifier, make_noise(norm), theta), x, config=MEASURE, chunk=100)

    return jax.vmap(one)(keys, x, theta)


def measure(norm: Norm, method: Method, test: Dataset, config: aj.CertifyConfig, folder: str) -> list[dict[str, Any]]:
    """A row for each size of regions."""
    bundled, noise, images = aj.load_bundled(norm), make_noise(norm), len(test)
    settings = aj.RunConfig(
        norm,
        method,
        bundled.theta,
        config,
        isotropic=aj.IsotropicConfig.published(steps=100),
        anisotropic=aj.AnisotropicConfig.published(),
        seed=SEED,
        memory=False,
    )
    out = f"{folder}/{norm}-{method}"
    aj.certify_dataset(bundled.classifier, test, settings, out=out)
    columns = read_run(out).columns("predictions", "gap", "theta")
    theta = columns["theta"].reshape(images, *(columns["theta"].shape[1:] or (1, 1, 1)))
    theta = np.broadcast_to(theta, test.images.shape)
    certified = columns["gap"] > 0
    label, gap = columns["predictions"].astype(np.int32), columns["gap"].astype(np.float32)
    root = jax.random.key(SEED + 1, impl="threefry2x32")  # the certificates have another seed
    rows = []
    for number, scale in enumerate(SCALES[norm]):
        keys = [jax.random.split(jax.random.fold_in(root, 2 * number + i), images) for i in range(2)]
        found = search(keys[0], bundled.classifier, test.images, theta, scale * gap, label, norm=norm)
        drawn = random_points(keys[0], test.images, theta, scale * gap, norm=norm)
        row = {"norm": norm, "method": method, "size": scale, "certified": int(certified.sum())}
        for name, points in (("attack", found), ("random", drawn)):
            for x, t, g, point in zip(test.images[:], theta, scale * gap, np.asarray(points), strict=True):
                assert aj.Region(x, t, g, noise.norm).contains(point)
            selected, votes = count(keys[1], bundled.classifier, points, theta, norm=norm)
            smoothed = aj.Smoothed(bundled.classifier, noise, theta)
            answer = certificate_from_votes(smoothed, points, selected, votes, config=MEASURE)
            prediction = np.asarray(answer.prediction)
            other = certified & (prediction != label) & (prediction != aj.ABSTAIN)
            row[f"{name}_flips"] = int(other.sum())
            kept = np.where(prediction == label, answer.p_lower, 0.5)[certified]
            row[f"{name}_least_p_lower_kept"] = float(kept.min(initial=1.0))
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> int:
    small = record.parser(__doc__).parse_args().small
    images, config = (2, aj.CertifyConfig(n=1_000)) if small else (20, aj.CertifyConfig(n=10_000))
    test, rows = aj.load_dataset("fashion-mnist-subset"), []
    test = select(test, skip=len(test) // images, max_images=images)
    with tempfile.TemporaryDirectory() as folder:
        for norm in ("l2", "l1"):
            for method in ("fixed",) if small else ("fixed", "isotropic", "ancer"):
                rows += measure(norm, method, test, config, folder)
    record.show(rows)
    stored = {"images": images, "n": config.n, "n_measured": MEASURE.n, "alpha": config.alpha, "rows": rows}
    record.save("attack", stored, seed=SEED, small=small)
    inside = sum(row["attack_flips"] + row["random_flips"] for row in rows if row["size"] == 1)
    strong = all(
        2 * row["attack_flips"] >= row["certified"]
        for row in rows
        if (row["size"], row["method"]) == (SCALES[row["norm"]][-1], "fixed")
    )
    print(f"{inside} violations inside certified regions;", "passed" if strong and not inside else "MISSED A BAR")
    return 0 if strong and not inside else 1


if __name__ == "__main__":
    sys.exit(main())
