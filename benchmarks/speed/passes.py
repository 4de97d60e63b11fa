"""How many noisy copies the network classifies in sequential sampling that nobody counts.

The draws of a look are work items of a launch, a program that is compiled for a number of items. Few images are left
for the last looks, so that they leave most items of a large launch empty. Launches of three sizes are compared with
launches of one size, on bundled images (theta 0.25, Gaussian noise, SmallCNN), with the batch and chunk that are usual
on CPUs (20 images on two devices, chunk 100) and on an accelerator (32 images, chunk 128).

A pass is a noisy copy that the network classifies; `Run.passes` counts them. The draws are the same in all runs.
"""

import argparse
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import ancer_jax as aj
from ancer_jax.data import select
from ancer_jax.runs import job, read_run
from benchmarks.benchmark import Benchmark, Found, Line, Lines, load

BAR = 1.25
RULES = {
    "radii": aj.SequentialConfig(radii=(0.0, 0.25, 0.5, 0.75, 1.0)),
    "radius 0.25": aj.SequentialConfig(radii=(0.25,)),
    "tolerance": aj.SequentialConfig(tolerance=0.02),
}
PLANS = {
    "CPUs": aj.Execution(batch_size=20, chunk=100, devices=2),
    "accelerator": aj.Execution(batch_size=32, chunk=128, devices=1),
}


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """Draws and passes of each rule and plan, with three sizes of launches and with one."""
    aj.devices.use_all_cores()
    dataset = select(aj.load_dataset("fashion-mnist-subset"), skip=7, max_images=options.images)
    classifier, rows = aj.load_bundled("fashion-mnist-cnn-l2-0.25").classifier, []
    for plan, execution in PLANS.items():
        for rule, sampling in RULES.items():
            config = aj.RunConfig(certify=aj.CertifyConfig(n=options.n), sampling=sampling, seed=options.seed)
            passes, draws = [], []
            for parts in (job.PARTS, (1,)):
                with tempfile.TemporaryDirectory() as folder, mock.patch.object(job, "PARTS", parts):
                    aj.certify_dataset(classifier, dataset, config, out=f"{folder}/run", execution=execution)
                    run = read_run(f"{folder}/run")
                    passes.append(run.passes())
                    draws.append(int(run.columns("draws")["draws"].sum()))
            assert draws[0] == draws[1]
            rows.append({"plan": plan, "rule": rule, "draws": draws[0], "passes": passes[0], "one_size": passes[1]})
            yield {"images": len(dataset), "n": options.n, "rows": rows}


def lines(found: Found) -> Lines:
    images = found["results"]["images"]
    for row in found["results"]["rows"]:
        ratio = row["passes"] / row["draws"]
        of_one = row["one_size"] / row["draws"]
        figure = f"{ratio:.2f} ({row['passes'] / images:,.0f} passes an image); {of_one:.2f} with one size"
        yield Line(f"{row['plan']}, {row['rule']}: passes / draws", figure, f"<= {BAR}", ratio <= BAR)


def _ratios(column: str) -> str:
    rows = load("passes")["results"]["rows"]
    ratios = [row[column] / row["draws"] for row in rows]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


BENCHMARK = Benchmark(
    claim="Sequential sampling makes few passes more than it counts draws.",
    takes="10 minutes",
    measure=measure,
    sizes={"images": (4, 64), "n": (2000, 100_000)},
    small_is_judged=False,
    outputs={"passes": lines},
    figures={"now": lambda: _ratios("passes"), "one_size": lambda: _ratios("one_size")},
)
