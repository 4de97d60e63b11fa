"""Search for violations inside certified regions: projected gradient ascent through the noise finds none.

Certifies 20 bundled test images (n = 10,000, alpha = 0.001) under fixed, isotropic and anisotropic noise, l2 and l1;
and under coloured noise, l2, by the bundled model that was trained with it, with a theta for each spatial frequency.
Then attacks each smoothed classifier (`differentiable.attack`: 50 steps of 64 draws, from the center) inside its
certified region, and inside regions up to 4 times as large (l1: 32), where nothing is promised. The class that the
smoothed classifier gives at each point found is measured with 2,000 fresh draws: a violation is another class whose
probability has a lower bound above 1/2 (alpha = 0.001 each). As many random points on the surfaces of the regions are
measured in the same way. There may be no violation inside a certified region, and the attack must be strong enough to
change half of the answers at the largest size (fixed noise).
"""

import argparse
import tempfile
from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

import ancer_jax as aj
from ancer_jax.basis import Pixels
from ancer_jax.data import Dataset, select
from ancer_jax.differentiable import attack
from ancer_jax.models import BUNDLED_BY_NORM, BundledModel
from ancer_jax.models.bundled import COLOURED
from ancer_jax.runs import read_run
from ancer_jax.runs.config import Method, Norm
from ancer_jax.smoothing import certificate_from_votes, count_votes
from benchmarks.benchmark import Benchmark, Found, Line, Lines, load, markdown

SCALES = {"l2": (1.0, 1.5, 2.0, 3.0, 4.0), "l1": (1.0, 4.0, 8.0, 16.0, 32.0)}
MEASURE = aj.CertifyConfig(n=2_000)
NAMES = {"fixed": "fixed", "isotropic": "isotropic", "ancer": "ANCER", "coloured": "coloured"}  # in tables


@jax.jit
def search(keys, smoothed, regions, label):
    """A point of each region at which the smoothed classifier is likely to give another class."""

    def one(key, region, label):
        return attack(key, smoothed.with_theta(region.theta), region, label)

    return jax.vmap(one)(keys, regions, label)


@jax.jit
def random_points(keys, regions):
    """Random points on the surface of each region: uniform directions (l2), or points of the faces (l1)."""

    def one(key, region):
        draw = jax.random.normal if region.norm == 2 else jax.random.laplace
        scaled = draw(key, region.center.shape)
        length = jnp.sqrt((scaled**2).sum()) if region.norm == 2 else jnp.abs(scaled).sum()
        return region.center + region.basis.inputs(region.theta * region.gap * (1 - 1e-5) * scaled / length)

    return jax.vmap(one)(keys, regions)


@jax.jit
def count(keys, smoothed, x, theta):
    """The selected class at each of the points x, and its votes."""

    def one(key, x, theta):
        return count_votes(key, smoothed.with_theta(theta), x, config=MEASURE, chunk=100)

    return jax.vmap(one)(keys, x, theta)


def settings_of(norm: Norm, method: str, n: int, seed: int) -> tuple[BundledModel, aj.RunConfig]:
    """The bundled model and the settings that certify it; "coloured" is a universal theta in another basis."""
    model = aj.load_bundled(COLOURED if method == "coloured" else BUNDLED_BY_NORM[norm])
    assert model.checkpoint.theta is not None
    settings = aj.RunConfig(
        norm,
        cast(Method, "universal" if method == "coloured" else method),
        model.checkpoint.theta,
        aj.CertifyConfig(n=n),
        isotropic=aj.IsotropicConfig.published(steps=100),
        anisotropic=aj.AnisotropicConfig.published(),
        seed=seed,
        basis=model.theta_map.basis if model.theta_map else Pixels(),
        memory=False,
    )
    return model, settings


def attack_all(norm: Norm, method: str, test: Dataset, n: int, seed: int, folder: str) -> list[dict[str, Any]]:
    """A row for each size of regions."""
    (bundled, settings), images = settings_of(norm, method, n, seed), len(test)
    noise, out = settings.certified_noise, f"{folder}/{norm}-{method}"
    aj.certify_dataset(bundled.classifier, test, settings, out=out, theta_map=bundled.theta_map)
    columns = read_run(out).columns("predictions", "gap", "theta")
    theta = columns["theta"].reshape(images, *(columns["theta"].shape[1:] or (1, 1, 1)))
    theta = np.broadcast_to(theta, test.images.shape)
    certified = columns["gap"] > 0
    label, gap = columns["predictions"].astype(np.int32), columns["gap"].astype(np.float32)
    smoothed = aj.Smoothed(bundled.classifier, noise, theta)
    root = jax.random.key(seed + 1, impl="threefry2x32")  # the certificates have another seed
    rows = []
    for number, scale in enumerate(SCALES[norm]):
        keys = [jax.random.split(jax.random.fold_in(root, 2 * number + i), images) for i in range(2)]
        regions = noise.region(test.images[:], theta, scale * gap)
        found, drawn = search(keys[0], smoothed, regions, label), random_points(keys[0], regions)
        row = {"norm": norm, "method": method, "size": scale, "certified": int(certified.sum())}
        for name, points in (("attack", found), ("random", drawn)):
            assert np.all(regions.contains(np.asarray(points)))
            selected, votes = count(keys[1], smoothed, points, theta)
            answer = certificate_from_votes(smoothed, points, selected, votes, config=MEASURE)
            prediction = np.asarray(answer.prediction)
            other = certified & (prediction != label) & (prediction != aj.ABSTAIN)
            row[f"{name}_flips"] = int(other.sum())
            kept = np.where(prediction == label, answer.p_lower, 0.5)[certified]
            row[f"{name}_least_p_lower_kept"] = float(kept.min(initial=1.0))
        rows.append(row)
        print(row, flush=True)
    return rows


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """All norms and methods."""
    test, rows = aj.load_dataset("fashion-mnist-subset"), []
    test = select(test, skip=len(test) // options.images, max_images=options.images)
    stored = {"images": options.images, "n": options.n, "n_measured": MEASURE.n, "alpha": MEASURE.alpha, "rows": rows}
    with tempfile.TemporaryDirectory() as folder:
        for norm in ("l2", "l1"):
            for method in options.method:
                if (norm, method) == ("l1", "coloured"):  # a rotation does not preserve l1 distances
                    continue
                rows += attack_all(norm, method, test, options.n, options.seed, folder)
                yield stored


def lines(found: Found) -> Lines:
    for r in found["results"]["rows"]:
        what = f"{r['norm']}, {r['method']}: answers changed by an attack in regions {r['size']:g} times as large"
        figure = f"{r['attack_flips']} of {r['certified']} (random points: {r['random_flips']})"
        if r["size"] == 1:
            yield Line(what, figure, "0", r["attack_flips"] + r["random_flips"] == 0)
        elif (r["method"], r["size"]) == ("fixed", SCALES[r["norm"]][-1]):
            yield Line(what, figure, ">= half", 2 * r["attack_flips"] >= r["certified"])
        else:
            yield Line(what, figure)


def _rows(norm: str) -> dict[tuple[str, float], dict[str, Any]]:
    rows = load("attack")["results"]["rows"]
    return {(r["method"], r["size"]): r for r in rows if r["norm"] == norm}


def _table(norm: str) -> str:
    """Flips for each kind of theta and size."""
    _, *sizes = SCALES[norm]
    found, table = _rows(norm), []
    for method, name in NAMES.items():
        if not (inside := found.get((method, 1.0))):  # there is no coloured l1 noise
            continue
        first = f"{inside['attack_flips']} of {inside['certified']}"
        table.append([f"{norm}, {name}", first, *(str(found[method, size]["attack_flips"]) for size in sizes)])
    return markdown(["flips, of certified images", "inside the region", *(f"{size:g} x" for size in sizes)], table)


def _flips(place: int) -> tuple[int, int]:
    """Answers that the attack changes, and answers, in all regions of the first or last size."""
    rows = [r for norm, sizes in SCALES.items() for (_, size), r in _rows(norm).items() if size == sizes[place]]
    return sum(r["attack_flips"] for r in rows), sum(r["certified"] for r in rows)


BENCHMARK = Benchmark(
    claim="Projected gradient ascent through the noise finds no violation inside certified regions.",
    takes="15 minutes",
    measure=measure,
    sizes={"images": (2, 20), "n": (1000, 10_000), "method": (["fixed", "coloured"], [*NAMES])},
    outputs={"attack": lines},
    figures={
        "flips-l2": lambda: _table("l2"),
        "flips-l1": lambda: _table("l1"),
        "inside": lambda: "{} of {}".format(*_flips(0)),
        "enlarged": lambda: "{} of {}".format(*_flips(-1)),
        "sizes": lambda: " and ".join(f"{SCALES[norm][-1]:g}" for norm in ("l2", "l1")),
    },
)
