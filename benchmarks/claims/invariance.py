"""On CPUs, counts must not depend on how they are computed: execution settings may only change speed.

On 20 bundled test images, with Gaussian and with uniform noise and n = 10,000, it varies

- with a fixed theta and `certify_dataset`: chunk, batch size, order of the images (half of them first, the rest by
  resuming the run), and one against four devices; the stored counts and predictions are compared by id;
- with an anisotropic random theta per image, counted as a run counts: chunk, batch size, shuffled order and four
  devices; the counts of all ten classes are compared.

The four devices are virtual (`--xla_force_host_platform_device_count=4`), in a process of their own. The noise is the
same bit for bit. Only the last digit of a logit could differ, and with it a vote between two classes that nearly tie:
any such difference is counted, and is a failure. An accelerator may choose other kernels for another chunk, and so move
such votes: there, `benchmarks/speed/gpu.py` counts them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ancer_jax import CertifyConfig, Execution, RunConfig, certify_dataset, devices, load_bundled, load_dataset
from ancer_jax.data import select, take
from ancer_jax.models import BUNDLED_BY_NORM
from ancer_jax.runs import read_run
from ancer_jax.runs.config import Norm
from ancer_jax.runs.job import make_job
from ancer_jax.smoothing.smoothed import Stage
from benchmarks.benchmark import TOP, Benchmark, Found, Line, Lines, load, show

IMAGES = 20
# The others are compared with the first.
EXECUTIONS: list[dict[str, Any]] = (
    [{"chunk": 100, "batch_size": 10}]
    + [{"chunk": chunk, "batch_size": 10} for chunk in (64, 1000, 1500)]
    + [{"chunk": 100, "batch_size": batch_size} for batch_size in (1, 7, 64)]
    + [{"chunk": 100, "batch_size": 10, "order": "shuffled"}]
)
FOUR_DEVICES: list[dict[str, Any]] = [{"chunk": chunk, "batch_size": 10, "devices": 4} for chunk in (100, 1500)]


def fixed_theta(norm: Norm, config: RunConfig, execution: Execution, order: str) -> list[list[int]]:
    """[prediction, count] of each image, in order of ids, through the pipeline."""
    dataset = select(load_dataset("fashion-mnist-subset"), skip=25, max_images=IMAGES)
    first = [take(dataset, np.arange(1, IMAGES, 2))] if order == "shuffled" else []
    classifier = load_bundled(BUNDLED_BY_NORM[norm]).classifier
    with tempfile.TemporaryDirectory() as folder:
        for part in [*first, dataset]:
            certify_dataset(classifier, part, config, out=f"{folder}/run", execution=execution)
        columns = read_run(f"{folder}/run").columns("predictions", "counts")
    return np.stack([columns["predictions"], columns["counts"]], axis=1).tolist()


def anisotropic_theta(norm: Norm, config: RunConfig, execution: Execution, order: str) -> list[list[int]]:
    """Counts of all classes of each image, with a random theta per image and pixel."""
    assert execution.batch_size
    bundled, n = load_bundled(BUNDLED_BY_NORM[norm]), config.certify.n
    images = select(load_dataset("fashion-mnist-subset"), skip=25, max_images=IMAGES).images
    rng = np.random.default_rng(config.seed)
    theta = bundled.theta * np.exp(rng.uniform(-1, 1, images.shape)).astype(np.float32)
    rows = rng.permutation(IMAGES) if order == "shuffled" else np.arange(IMAGES)
    mesh = devices.device_mesh(execution.devices)
    start = np.asarray(bundled.theta, np.float32)
    job = make_job(devices.replicate(bundled.classifier, mesh), config, start, execution, mesh)
    counts = np.zeros((IMAGES, 10), int)
    for batch in np.split(rows, range(execution.batch_size, IMAGES, execution.batch_size)):
        counter = job.vote_counter(batch.astype(np.uint32), images[batch], theta[batch])
        counts[batch] = counter(Stage.ESTIMATE, np.arange(len(batch)), 0, n)
    return counts.tolist()


def counted(executions: Sequence[dict[str, Any]], norms: Sequence[Norm], n: int, seed: int) -> list[dict[str, Any]]:
    """Counts for each norm, kind of theta and execution."""
    results = []
    for norm in norms:
        theta = load_bundled(BUNDLED_BY_NORM[norm]).theta
        config = RunConfig(norm=norm, theta=theta, certify=CertifyConfig(n=n), seed=seed)
        for kind, function in (("fixed", fixed_theta), ("anisotropic", anisotropic_theta)):
            for settings in executions:
                order = settings.get("order", "plain")
                execution = Execution(**{"devices": 1, **{k: v for k, v in settings.items() if k != "order"}})
                counts = function(norm, config, execution, order)
                results.append({"norm": norm, "theta": kind} | settings | {"counts": counts})
    return results


def on_four_devices(norms: Sequence[Norm], n: int, seed: int) -> list[dict[str, Any]]:
    """The same in a new process that sees four virtual devices."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "benchmarks.claims.invariance", json.dumps([norms, n, seed])]
    return json.loads(subprocess.run(command, check=True, cwd=TOP, env=environment, stdout=subprocess.PIPE).stdout)


def compare(results: Sequence[dict[str, Any]], n: int) -> dict[str, Any]:
    """How far each execution is from the first of its norm and kind of theta."""
    expected = {(r["norm"], r["theta"]): np.array(r["counts"]) for r in reversed(results) if "devices" not in r}
    rows = []
    for result in results:
        difference = np.array(result["counts"]) - expected[result["norm"], result["theta"]]
        row = {"norm": "", "theta": "", "chunk": 0, "batch_size": 0, "order": "plain", "devices": 1} | result
        del row["counts"]
        differ = {"images_that_differ": int(difference.any(-1).sum()), "largest": int(np.abs(difference).max())}
        rows.append(row | differ)
    counts = {" ".join(name): values.tolist() for name, values in expected.items()}
    return {"images": IMAGES, "n": n, "rows": rows, "reference_counts": counts}


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """One device, then four."""
    asked = options.norm, options.n, options.seed
    results = counted(EXECUTIONS, *asked)
    yield compare(results, options.n)
    compared = compare(results + on_four_devices(*asked), options.n)
    show(compared["rows"])
    yield compared


def _differ(found: Found) -> int:
    return sum(r["images_that_differ"] for r in found["results"]["rows"])


def lines(found: Found) -> Lines:
    rows, images = found["results"]["rows"], found["results"]["images"]
    what = f"images whose counts depend on chunk, batch, order or devices, of {len(rows)} x {images}"
    yield Line(what, str(_differ(found)), "0", _differ(found) == 0)


BENCHMARK = Benchmark(
    claim="On CPUs, chunk, batch size, order and devices change no count.",
    takes="10 minutes",
    measure=measure,
    sizes={"n": (100, 10_000), "norm": (["l2"], ["l2", "l1"])},
    outputs={"invariance": lines},
    figures={"changed": lambda: f"{differ} counts" if (differ := _differ(load("invariance"))) else "no count"},
)

if __name__ == "__main__":
    print(json.dumps(counted(FOUR_DEVICES, *json.loads(sys.argv[1]))))
