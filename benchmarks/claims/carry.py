"""Certificates carried to a changed network, against certifying that network afresh.

A bundled network is certified with n draws under fixed noise, every 20th bundled test image. Then it is changed: its
layers compute in bfloat16, or the kernels of its layers are rounded to 8 or to 4 bits (each to multiples of 1/127 or
1/7 of its largest absolute weight). Each changed network gets certificates in three ways: carried, by a tenth of n
common draws, which take two passes each; afresh, with n draws; and afresh with as many passes as carrying takes. Alpha
is 0.001, and 0.0001 more for carrying. Passes are per image and of the changed network's certificates alone.

Bars: the certified accuracy that is carried to 8 bits and to bfloat16, at radii up to twice sigma, is at most 1 % of
the images below that of n fresh draws. ACR has no bar: the largest radii fall by a fifth even if no vote is lost.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

import ancer_jax as aj
from ancer_jax.data import Dataset, select
from ancer_jax.metrics import certified_accuracy, round_share, round_up
from ancer_jax.models import Checkpoint
from ancer_jax.report import load_results
from ancer_jax.runs import read_run
from benchmarks import figures
from benchmarks.benchmark import Benchmark, Found, Line, Lines, load, markdown

BUNDLED = "fashion-mnist-cnn-l2-0.25"
RADII = (0.0, 0.25, 0.5, 0.75)  # the largest that n = 100,000 draws can certify is 0.95
CARRIED, AFRESH, EQUAL = "carried", "afresh", "afresh, as many passes"


def in_bfloat16(checkpoint: Checkpoint) -> aj.Classifier:
    """The network whose layers compute in bfloat16."""
    attributes = {**checkpoint.attributes, "compute_dtype": "bfloat16"}
    return dataclasses.replace(checkpoint, attributes=attributes).classifier


def rounded(bits: int) -> Callable[[Checkpoint], aj.Classifier]:
    """The network whose kernels are rounded to so many bits."""

    def of(checkpoint: Checkpoint) -> aj.Classifier:
        def rounded_kernel(array: Any) -> np.ndarray:
            array = np.asarray(array)
            step = abs(array).max() / (2 ** (bits - 1) - 1) if array.ndim > 1 else 0
            return np.rint(array / step) * step if step else array

        return dataclasses.replace(checkpoint, variables=jax.tree.map(rounded_kernel, checkpoint.variables)).classifier

    return of


NETWORKS = {"bfloat16": in_bfloat16, "8 bits": rounded(8), "4 bits": rounded(4)}


def row(out: str, network: str, how: str) -> dict[str, Any]:
    """The figures of a run."""
    results = load_results(out)
    assert results.passes is not None
    at = {f"at {r:g}": certified_accuracy(results["radius"], results.correct, r) for r in RADII}
    found = {"network": network, "how": how, "passes": results.passes.forward, "images": len(results.correct)}
    return found | figures.summary(results) | at


def afresh(classifier: aj.Classifier, test: Dataset, options: argparse.Namespace, n: int, out: str) -> str:
    """Certify with n draws: the run."""
    config = aj.RunConfig(theta=aj.load_bundled(BUNDLED).theta, certify=aj.CertifyConfig(n=n), seed=options.seed)
    aj.certify_dataset(classifier, test, config, out=out)
    return out


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """The network as it is, then each change of it."""
    checkpoint = aj.load_bundled(BUNDLED).checkpoint
    whole, draws = aj.load_dataset("fashion-mnist-subset"), options.n // 10
    test, before = select(whole, skip=len(whole) // options.images, max_images=options.images), checkpoint.classifier
    with tempfile.TemporaryDirectory() as folder:
        certified = afresh(before, test, options, options.n, f"{folder}/before")
        rows = [row(certified, "as it was", AFRESH)]
        for name in options.networks:
            changed, out = NETWORKS[name](checkpoint), f"{folder}/{name}"
            config = aj.CarryRunConfig(n=draws, seed=options.seed)
            aj.carry_run(certified, (before, changed), test, config, out=f"{out} carried")
            counts = read_run(f"{out} carried").columns("lost_votes", "lost_draws")
            lost = counts["lost_votes"].sum() / counts["lost_draws"].sum()
            rows.append(row(f"{out} carried", name, CARRIED) | {"lost": float(lost)})
            yield {"n": options.n, "draws": draws, "rows": rows}
            for how, n in ((EQUAL, 2 * draws), (AFRESH, options.n)):
                rows.append(row(afresh(changed, test, options, n, f"{out} {n}"), name, how))
                yield {"n": options.n, "draws": draws, "rows": rows}


def _of(found: Found) -> dict[tuple[str, str], dict[str, Any]]:
    return {(r["network"], r["how"]): r for r in found["results"]["rows"]}


def lines(found: Found) -> Lines:
    rows = _of(found)
    for (network, how), r in rows.items():
        what = f"{network}, {how}, {r['images']} images: passes; accuracy; ACR"
        figure = f"{r['passes']:,.0f}; {round_share(r['accuracy'], r['images'])}; {figures.down(r, 'ACR')}"
        if how != CARRIED or network == "4 bits":
            yield Line(what, figure)
            continue
        full = rows[network, AFRESH]
        falls = [full[f"at {radius:g}"] - r[f"at {radius:g}"] for radius in RADII[:3]]
        yield Line(what, figure, "certified accuracy up to radius 0.5 within 1 % of fresh draws", max(falls) <= 0.01)


def _table() -> str:
    rows = []
    for (network, how), r in _of(load("carry")).items():
        lost = f"{round_up(100 * r['lost'], 3)} %" if "lost" in r else "-"
        at = [round_share(r[f"at {radius:g}"], r["images"]) for radius in RADII]
        rows.append([network, how, f"{r['passes']:,.0f}", lost, *at, figures.down(r, "ACR")])
    header = ["network", "certificates", "passes", "votes lost", *(f"at {radius:g}" for radius in RADII), "ACR"]
    return markdown(header, rows)


BENCHMARK = Benchmark(
    claim="Certificates carried to a changed network with a fifth of the passes, against certifying it afresh.",
    takes="15 minutes",
    measure=measure,
    sizes={"images": (2, 25), "n": (200, 100_000), "networks": (["8 bits"], [*NETWORKS])},
    small_is_judged=False,
    outputs={"carry": lines},
    figures={"table": _table},
)
