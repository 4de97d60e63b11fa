"""Counts must not depend on how they are computed: execution settings may only change speed.

    python benchmarks/invariance.py            # 10 minutes on two CPU cores
    python benchmarks/invariance.py --small    # n = 100, some minutes

On 20 bundled test images, with Gaussian and with uniform noise and n = 10,000, it varies

- with a fixed theta and `certify_dataset`: chunk, batch size, order of the images (half of them first, the rest by
  resuming the run), and one against four devices; the stored counts and predictions are compared by id;
- with an anisotropic random theta per image, counted as a run counts: chunk, batch size, shuffled order and four
  devices; the counts of all ten classes are compared.

The four devices are virtual (`--xla_force_host_platform_device_count=4`), in a process of their own. The noise is the
same bit for bit. Only the last digit of a logit could differ, and with it a vote between two classes that nearly tie:
any such difference is printed, and is a failure.

Exit status 1 if any count differs.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import record

from ancer_jax import CertifyConfig, Execution, RunConfig, certify_dataset, devices, load_bundled, load_dataset
from ancer_jax.data import select, take
from ancer_jax.runs import read_run
from ancer_jax.runs.config import Norm
from ancer_jax.runs.job import make_job
from ancer_jax.smoothing.smoothed import Stage

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
    with tempfile.TemporaryDirectory() as folder:
        for part in [*first, dataset]:
            certify_dataset(load_bundled(norm).classifier, part, config, out=f"{folder}/run", execution=execution)
        columns = read_run(f"{folder}/run").columns("predictions", "counts")
    return np.stack([columns["predictions"], columns["counts"]], axis=1).tolist()


def anisotropic_theta(norm: Norm, config: RunConfig, execution: Execution, order: str) -> list[list[int]]:
    """Counts of all classes of each image, with a random theta per image and pixel."""
    assert execution.batch_size
    bundled, n = load_bundled(norm), config.certify.n
    images = select(load_dataset("fashion-mnist-subset"), skip=25, max_images=IMAGES).images
    rng = np.random.default_rng(config.seed)
    theta = bundled.theta * np.exp(rng.uniform(-1, 1, images.shape)).astype(np.float32)
    rows = rng.permutation(IMAGES) if order == "shuffled" else np.arange(IMAGES)
    mesh = devices.device_mesh(execution.devices)
    start = np.asarray(bundled.theta, np.float32)
    job = make_job(devices.replicate(bundled.classifier, mesh), config, start, execution, mesh)
    counts = np.zeros((IMAGES, 10), int)
    for batch in np.split(rows, range(execution.batch_size, IMAGES, execution.batch_size)):
        counter = job.counter(batch.astype(np.uint32), images[batch], theta[batch])
        counts[batch] = counter(Stage.ESTIMATE, np.arange(len(batch)), 0, n)
    return counts.tolist()


def measure(executions: Sequence[dict[str, Any]], n: int, seed: int) -> list[dict[str, Any]]:
    """Counts for each norm, kind of theta and execution."""
    results = []
    for norm in ("l2", "l1"):
        config = RunConfig(norm=norm, theta=load_bundled(norm).theta, certify=CertifyConfig(n=n), seed=seed)
        for kind, function in (("fixed", fixed_theta), ("anisotropic", anisotropic_theta)):
            for settings in executions:
                order = settings.get("order", "plain")
                execution = Execution(**{"devices": 1, **{k: v for k, v in settings.items() if k != "order"}})
                counts = function(norm, config, execution, order)
                results.append({"norm": norm, "theta": kind} | settings | {"counts": counts})
    return results


def four_devices(n: int, seed: int) -> list[dict[str, Any]]:
    """The same in a new process that sees four virtual devices."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "counts.json"
        flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
        options = ["--n", str(n), "--seed", str(seed), "--child", str(out)]
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        subprocess.run([sys.executable, __file__, *options], check=True, env=environment)
        return json.loads(out.read_text())


def main() -> int:
    parser = record.parser(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, help="draws per image")
    parser.add_argument("--child", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    n, seed = options.n or (100 if options.small else 10_000), options.seed
    if options.child:
        options.child.write_text(json.dumps(measure(FOUR_DEVICES, n, seed)))
        return 0
    results = measure(EXECUTIONS, n, seed) + four_devices(n, seed)
    expected = {(r["norm"], r["theta"]): np.array(r["counts"]) for r in reversed(results) if "devices" not in r}
    rows = []
    for result in results:
        difference = np.array(result.pop("counts")) - expected[result["norm"], result["theta"]]
        shown = {"chunk": 0, "batch_size": 0, "order": "plain", "devices": 1} | result
        rows.append({"norm": shown.pop("norm"), "theta": shown.pop("theta")} | shown)
        rows[-1] |= {"images_that_differ": int(difference.any(-1).sum()), "largest": int(np.abs(difference).max())}
    record.show(rows)
    differ = sum(row["images_that_differ"] for row in rows)
    counts = {" ".join(name): values.tolist() for name, values in expected.items()}
    stored = {"images": IMAGES, "n": n, "rows": rows, "reference_counts": counts}
    record.save("invariance", stored, seed=seed, small=options.small)
    print("all counts are equal" if not differ else f"{differ} COUNTS DIFFER")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
