"""The cost of sharding a run, and, on paper, how long ImageNet takes on 1 to 256 devices.

    python benchmarks/scaling.py            # about five minutes on two CPU cores that do nothing else
    python benchmarks/scaling.py --small    # few repeats, nothing on paper

Measured: the work of a run on one device (placement on a mesh, jitted batch, shard on disk) against a plain
`jax.jit(jax.vmap(count_votes))`, in turn in one process (bar: 1.03); the work of the host for each image; forward
passes of ResNet-50, and the compilation of its program.

On paper: 50,000 images, n = 100,000, fixed theta and ANCER, four devices a process. The forward passes a second of a
device are those of this machine's CPU, or 909 (a NVIDIA RTX 2080 Ti by Cohen et al. 2019, section 4: 110 seconds for
100,000).

Exit status 1 if the bar is missed.
"""

import dataclasses
import math
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import record
from overhead import NETWORKS, seconds

import ancer_jax as aj
from ancer_jax import devices
from ancer_jax.data import Dataset, batches
from ancer_jax.models import make_network
from ancer_jax.runs import open_run, pipeline
from ancer_jax.runs.job import example_keys, make_job
from ancer_jax.runs.settings import DataInfo
from ancer_jax.search.leakage import LeakageCounts
from ancer_jax.smoothing.certify import certificate_from_evidence, random_evidence

IMAGES, N, PER_PROCESS = 50_000, 100_100, 4
SEARCH = 3 * (900 + 100) * 100 + 2 * 1000 + (64 + 8) * 200  # gradients cost three passes; guard; leakage
DEVICES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
PUBLISHED = 909.0


def sharded_path(name: str, n: int, chunk: int, seed: int, repeats: int) -> dict[str, Any]:
    """Seconds of a batch of ten through the pipeline on a mesh of one device, and by plain jit and vmap."""
    classifier, shape = NETWORKS[name](seed)
    rng = np.random.default_rng(seed)
    images = rng.random((10, *shape), np.float32)
    data = Dataset("noise", np.arange(10), images, rng.integers(0, 10, 10), 10)
    config = aj.RunConfig(theta=0.25, certify=aj.CertifyConfig(n0=chunk, n=n))
    mesh, start = devices.device_mesh(1), np.asarray(config.theta, np.float32)
    job = make_job(devices.replicate(classifier, mesh), config, start, aj.Execution(chunk=chunk), mesh)
    (batch,) = batches(data, 10)

    @jax.jit
    def plain(classifier, images):
        def one(key, x):
            smoothed = aj.Smoothed(classifier, aj.Gaussian(), jnp.full(x.shape, 0.25))
            return aj.count_votes(key, smoothed, x, config=config.certify, chunk=chunk)

        return jax.vmap(one)(example_keys(0, jnp.arange(10)), images)

    with tempfile.TemporaryDirectory() as folder, open_run(f"{folder}/run", config.settings(), {}) as run:

        def sharded():
            pending = job.launch(batch)
            pipeline._store(run, pending, job.collect(pending), 0.0)  # pyright: ignore[reportPrivateUsage]

        times = seconds({"plain": lambda: plain(classifier, images), "sharded": sharded}, repeats)
    ratio = float(np.median(np.array(times["sharded"]) / np.array(times["plain"])))
    return {"network": name, "n": n, "ratio": ratio, "seconds": times}


def host(images: int, shape: tuple[int, ...], per_coordinate: bool) -> dict[str, Any]:
    """Seconds of the host for each image of a run: writing its shard, finding it again, and writing its line."""
    config = aj.RunConfig(theta=0.25)
    theta = np.full((10, *shape) if per_coordinate else 10, 0.25, np.float32)
    data = DataInfo("noise", "", shape, 1000)
    settings = config.settings() | {"data": dataclasses.asdict(data)}
    evidence = random_evidence(np.full(10, 99_000), config.certify)
    smoothed = aj.Smoothed(aj.from_function(lambda _, x: x, {}, num_classes=1000), aj.Gaussian(), theta)
    found = certificate_from_evidence(np.zeros(10, int), evidence, smoothed, np.zeros((10, *shape), np.float32))
    arrays: dict[str, Any] = {"predictions": found.prediction, "counts": found.count, "n": found.n}
    arrays |= {"p_lower": found.p_lower, "gap": found.gap, "theta": theta}
    arrays |= {"seconds": np.ones(10), "pixels": np.zeros(10, np.uint64)}
    arrays |= {"labels": np.zeros(10, int), "draws": np.full(10, N)}
    arrays |= {f"bound_{name}": column for name, column in evidence._asdict().items()}
    arrays |= {f"leakage_{name}": np.zeros(10, np.int32) for name in LeakageCounts._fields}
    result: dict[str, Any] = {"coordinates of theta": theta[0].size}
    with tempfile.TemporaryDirectory() as folder, open_run(f"{folder}/run", settings, {}) as run:
        for what, work in (
            ("stored", lambda: [run.write_shard(arrays | {"ids": np.arange(i, i + 10)}) for i in range(0, images, 10)]),
            ("found again", run.done),
            ("exported", run.export),
        ):
            start = time.perf_counter()
            work()
            result[what] = (time.perf_counter() - start) / images
    return result


def resnet50(seed: int) -> dict[str, float]:
    """Rows a second of ResNet-50 in certification, and the seconds that its compilation takes."""
    network = make_network("imagenet_resnet50")
    variables = jax.jit(network.init)(jax.random.key(seed), jnp.zeros((1, 224, 224, 3)))
    classifier = aj.from_linen(network, variables, num_classes=1000)
    key, x = jax.random.key(seed, impl="threefry2x32"), np.full((224, 224, 3), 0.5, np.float32)
    config = aj.CertifyConfig(n0=16, n=48)

    @jax.jit
    def count(key, classifier, x):
        return aj.count_votes(key, aj.Smoothed(classifier, aj.Gaussian(), 0.25), x, config=config, chunk=16)

    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(count(key, classifier, x))
        times.append(time.perf_counter() - start)
    return {"rows_per_second": 64 / min(times), "compilation_seconds": times[0] - min(times)}


def on_paper(rate: float, compilation: float, hosts: Mapping[str, float], method: str) -> list[dict[str, Any]]:
    """Hours, and device days, of the job on each number of devices."""
    passes, shard, line = N + (SEARCH if method == "ancer" else 0), hosts["stored"], hosts["exported"]
    rows = []
    for count in DEVICES:
        processes = math.ceil(count / PER_PROCESS)
        images = math.ceil(IMAGES / processes)  # of the busiest process
        local = min(count, PER_PROCESS)  # devices of that process
        of_each = math.ceil(images / math.ceil(images / 32 / local) / local)  # images of a device in a batch
        busy = math.ceil(images / of_each / local) * of_each * passes / rate
        alone = 60 + compilation + of_each * local * shard + IMAGES * (line + hosts["found again"])
        hours = (busy + alone) / 3600
        efficiency = IMAGES * passes / rate / 3600 / (count * hours)
        rows.append({"method": method, "passes/s": round(rate), "devices": count, "hours": round(hours, 1),
                     "device days": round(count * hours / 24, 1), "efficiency": round(efficiency, 3)})  # fmt: skip
    return rows


def main() -> int:
    parser = record.parser(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    plans = ("SmallCNN", 2000, 50), ("ResNet-18", 20, 10)
    paths = [sharded_path(*plan, options.seed, 3 if options.small else 41) for plan in plans]
    record.show([{name: path[name] for name in ("network", "n", "ratio")} for path in paths])
    hosts = {"fixed": host(5000, (224, 224, 3), False), "ancer": host(500, (224, 224, 3), True)}
    record.show([*hosts.values()])
    passed = all(path["ratio"] <= 1.03 for path in paths)
    stored = {"bar": 1.03, "passed": passed, "sharded_path": paths, "host_seconds_per_image": hosts}
    if not options.small:
        network = resnet50(options.seed)
        print(network)
        compilation = network["compilation_seconds"]
        rates = network["rows_per_second"], PUBLISHED
        jobs = [(rate, method) for rate in rates for method in hosts]
        paper = [row for rate, method in jobs for row in on_paper(rate, compilation, hosts[method], method)]
        record.show(paper)
        stored |= {"resnet50": network, "on_paper": paper}
    record.save("scaling", stored, seed=options.seed, small=options.small)
    print("passed" if passed else "MISSED A BAR")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
