"""The cost of sharding a run, and, on paper, how long ImageNet takes on 1 to 256 devices.

Measured: the work of a run on one device (placement on a mesh, jitted batch, shard on disk) against a plain
`jax.jit(jax.vmap(count_votes))`, in turn in one process; the work of the host for each image; forward
passes of ResNet-50, and the compilation of its program.

On paper: 50,000 images, n = 100,000, fixed theta and ANCER, four devices a process. The forward passes a second of a
device are those of this machine's CPU, or 909 (a NVIDIA RTX 2080 Ti by Cohen et al. 2019, section 4: 110 seconds for
100,000). A rehearsal puts nothing on paper.
"""

import argparse
import dataclasses
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ancer_jax as aj
from ancer_jax import devices
from ancer_jax.data import Dataset, batches
from ancer_jax.models import make_network
from ancer_jax.runs import open_run, pipeline
from ancer_jax.runs.job import example_keys, make_job
from ancer_jax.runs.settings import DataInfo
from ancer_jax.search.leakage import LeakageCounts
from ancer_jax.smoothing.certify import certificate_from_evidence, random_evidence
from benchmarks.benchmark import Benchmark, Found, Line, Lines, load, markdown
from benchmarks.speed.overhead import make_classifier, seconds

IMAGES, N, PER_PROCESS = 50_000, 100_100, 4
SEARCH = 3 * (900 + 100) * 100 + 2 * 1000 + (64 + 8) * 200  # gradients cost three passes; guard; leakage
DEVICES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
PUBLISHED = 909.0
TITLES = {"fixed": "fixed theta", "ancer": "ANCER"}
BAR = 1.03


def sharded_path(name: str, n: int, chunk: int, seed: int, repeats: int) -> dict[str, Any]:
    """Seconds of a batch of ten through the pipeline on a mesh of one device, and by plain jit and vmap."""
    classifier, shape = make_classifier(name, seed)
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
    found = certificate_from_evidence(
        np.zeros(10, int), evidence, smoothed, np.zeros((10, *shape), np.float32), alpha=config.certify.alpha
    )
    arrays: dict[str, Any] = {"predictions": found.prediction, "counts": found.count, "n": found.n}
    arrays |= {"p_lower": found.p_lower, "gap": found.gap, "theta": theta}
    arrays |= {"seconds": np.ones(10), "pixels": np.zeros(10, np.uint64)}
    arrays |= {"labels": np.zeros(10, int), "draws": np.full(10, N), "passes": np.array(10 * N)}
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


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """What sharding costs, what the host does, and then the table."""
    results: dict[str, Any] = {"sharded_path": []}
    plans = [("SmallCNN", 2000, 50)] if options.small else [("SmallCNN", 2000, 50), ("ResNet-18", 20, 10)]
    for plan in plans:
        results["sharded_path"].append(sharded_path(*plan, options.seed, options.repeats))
        yield results
    hosts = {"fixed": host(5000, (224, 224, 3), False), "ancer": host(500, (224, 224, 3), True)}
    results["host_seconds_per_image"] = hosts
    yield results
    if not options.small:
        network = results["resnet50"] = resnet50(options.seed)
        compilation = network["compilation_seconds"]
        jobs = [(rate, method) for rate in (network["rows_per_second"], PUBLISHED) for method in hosts]
        results["on_paper"] = [
            row for rate, method in jobs for row in on_paper(rate, compilation, hosts[method], method)
        ]
        yield results


def lines(found: Found) -> Lines:
    for r in found["results"]["sharded_path"]:
        what = f"{r['network']}, one device: batches through the sharded path / plain jit and vmap"
        yield Line(what, f"{r['ratio']:.3f}", f"<= {BAR}", r["ratio"] <= BAR)


def _ratio(network: str) -> str:
    rows = load("scaling")["results"]["sharded_path"]
    return next(f"{r['ratio']:.2f}" for r in rows if r["network"] == network)


def _on_paper(*counts: int, method: str) -> list[dict[str, Any]]:
    """The rows of so many devices, at the published rate."""
    rows = [r for r in load("scaling")["results"]["on_paper"] if r["passes/s"] == PUBLISHED and r["method"] == method]
    return [next(r for r in rows if r["devices"] == count) for count in counts]


def _paper() -> str:
    counts, rows = (1, 4, 16, 64, 128, 256), []
    for method, title in TITLES.items():
        found = [(r["hours"], r["device days"]) for r in _on_paper(*counts, method=method)]
        cells = [f"{hours:,.{1 if hours < 100 else 0}f} ({days:.0f})" for hours, days in found]
        rows.append([f"{title}: hours (device days)", *cells])
    return markdown([f"{PUBLISHED:.0f} passes a second", "1 device", *map(str, counts[1:])], rows)


def _lost() -> str:
    """Percent, at 64 and 128 devices."""
    lost = [100 * (1 - r["efficiency"]) for method in TITLES for r in _on_paper(64, 128, method=method)]
    return f"{min(lost):.1f} to {max(lost):.1f} %"


BENCHMARK = Benchmark(
    claim="Sharding a run costs next to nothing; ImageNet on 1 to 256 devices, on paper.",
    takes="5 minutes",
    measure=measure,
    sizes={"repeats": (3, 41)},
    small_is_judged=False,
    outputs={"scaling": lines},
    figures={
        "small-cnn": lambda: _ratio("SmallCNN"),
        "resnet18": lambda: _ratio("ResNet-18"),
        "passes": lambda: f"{load('scaling')['results']['resnet50']['rows_per_second']:.0f}",
        "paper": _paper,
        "lost": _lost,
    },
)
