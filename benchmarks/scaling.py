"""What sharing a run costs, and, on paper, how long ImageNet takes on 1 to 256 devices.

python benchmarks/scaling.py [--quick]

Measured: the path that a run takes on one device (placement on a mesh, jitted batch, shard on disk) against a plain
`jax.jit(jax.vmap(count_votes))`, alternating in one process (bar: 1.03); what the host does for each image; ResNet-50's
forward passes, and how long its program is compiled.

On paper: 50,000 images, n = 100,000, fixed theta and ANCER, four devices a process. A device's forward passes a second
are this machine's CPU's, or 909 (a NVIDIA RTX 2080 Ti by Cohen et al. 2019, section 4: 110 seconds for 100,000). About
five minutes on two CPU cores that do nothing else.
"""

import argparse
import functools
import math
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import record
from overhead import NETWORKS, seconds

import ancer_jax as aj
from ancer_jax import execution, parallel, pipeline
from ancer_jax.certification import all_draws, certification_from
from ancer_jax.data import Dataset, batches
from ancer_jax.leakage import Leaked
from ancer_jax.models import make_network
from ancer_jax.runs import open_run

IMAGES, N, PER_PROCESS = 50_000, 100_100, 4
SEARCH = 3 * (900 + 100) * 100 + 2 * 1000 + (64 + 8) * 200  # gradients cost three passes; guard; leakage
DEVICES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
PUBLISHED = 909.0
LAW = aj.GaussianL2()


def sharded_path(name, n, chunk, seed, repeats):
    """One line: seconds of a batch of ten through the pipeline on a mesh of one device, and by plain jit and vmap."""
    classifier, shape = NETWORKS[name](seed)
    rng = np.random.default_rng(seed)
    images = rng.random((10, *shape), np.float32)
    data = Dataset("noise", np.arange(10), images, rng.integers(0, 10, 10), 10)
    config = aj.RunConfig(theta=0.25, certify=aj.CertifyConfig(n0=chunk, n=n))
    mesh = parallel.device_mesh(1)
    replicated = parallel.replicate(classifier, mesh)
    (batch,) = batches(data, 10)
    votes = functools.partial(aj.count_votes, config=config.certify, chunk=chunk)

    @jax.jit
    def plain(classifier, images):
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), i))(jnp.arange(10))
        one = lambda key, x: votes(key, classifier, LAW, x, jnp.full(x.shape, 0.25))
        return jax.vmap(one)(keys, images)

    with tempfile.TemporaryDirectory() as folder, open_run(f"{folder}/run", config.settings(), {}) as run:

        def sharded():
            ids, start = batch["id"].astype(np.uint32), np.asarray(config.theta, np.float32)
            how = {"rows": np.arange(10), "split": "images", "chunk": chunk, "mesh": mesh}
            computed = execution.compute(ids, replicated, batch["image"], start, None, config, **how)
            pipeline._store(run, batch, computed, config, 0.0)

        times = seconds({"plain": lambda: plain(classifier, images), "sharded": sharded}, repeats)
    ratio = float(np.median(np.array(times["sharded"]) / np.array(times["plain"])))
    return {"network": name, "n": n, "ratio": ratio, "seconds": times}


def host(images, shape, per_coordinate):
    """Seconds of the host for each image of a run: its shard, being found again, and its line."""
    config = aj.RunConfig(theta=0.25)
    theta = np.full((10, *shape) if per_coordinate else 10, 0.25, np.float32)
    settings = config.settings() | {"data": {"image_shape": list(shape)}}
    evidence = all_draws(np.full(10, 99_000), config.certify)
    found = certification_from(np.zeros(10, int), evidence, LAW)
    arrays = {"predictions": found.prediction, "counts": found.count, "n": found.n, "p_lower": found.p_lower}
    arrays |= {"gap": found.gap, "theta": theta, "seconds": np.ones(10), "pixels": np.zeros(10, np.uint64)}
    arrays |= {"labels": np.zeros(10, int), "draws": np.full(10, N)}
    arrays |= {f"bound_{name}": column for name, column in evidence._asdict().items()}
    arrays |= {f"leaked_{name}": np.zeros(10, np.int32) for name in Leaked._fields}
    result = {"coordinates of theta": theta[0].size}
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


def resnet50(seed):
    """Rows a second of ResNet-50 in certification, and seconds until the first batch is done (compilation mostly)."""
    network = make_network("imagenet_resnet50")
    variables = jax.jit(network.init)(jax.random.key(seed), jnp.zeros((1, 224, 224, 3)))
    classifier = aj.from_linen(network, variables, num_classes=1000)
    key, x = jax.random.key(seed, impl="threefry2x32"), np.full((224, 224, 3), 0.5, np.float32)
    config = aj.CertifyConfig(n0=16, n=48)
    count = jax.jit(lambda key, classifier, x: aj.count_votes(key, classifier, LAW, x, 0.25, config=config, chunk=16))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(count(key, classifier, x))
        times.append(time.perf_counter() - start)
    return {"rows_per_second": 64 / min(times), "compilation_seconds": times[0] - min(times)}


def on_paper(rate, compilation, hosts, method):
    """Hours, and device hours, of the job on each number of devices."""
    passes, shard, line = N + (SEARCH if method == "ancer" else 0), hosts["stored"], hosts["exported"]
    rows = []
    for devices in DEVICES:
        processes = math.ceil(devices / PER_PROCESS)
        images = math.ceil(IMAGES / processes)  # of the busiest process
        sharing = min(devices, PER_PROCESS)
        of_each = math.ceil(images / math.ceil(images / 32 / sharing) / sharing)  # images of a device in a batch
        busy = math.ceil(images / of_each / sharing) * of_each * passes / rate
        alone = 60 + compilation + of_each * sharing * shard + IMAGES * (line + hosts["found again"])
        hours = (busy + alone) / 3600
        efficiency = IMAGES * passes / rate / 3600 / (devices * hours)
        rows.append({"method": method, "passes/s": round(rate), "devices": devices, "hours": round(hours, 1),
                     "device days": round(devices * hours / 24, 1), "efficiency": round(efficiency, 3)})  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few repeats, nothing on paper, nothing is stored")
    options = parser.parse_args()
    plans = ("SmallCNN", 2000, 50), ("ResNet-18", 20, 10)
    paths = [sharded_path(*plan, options.seed, 3 if options.quick else 41) for plan in plans]
    record.show([{name: path[name] for name in ("network", "n", "ratio")} for path in paths])
    hosts = {"fixed": host(5000, (224, 224, 3), False), "ancer": host(500, (224, 224, 3), True)}
    record.show([*hosts.values()])
    passed = all(path["ratio"] <= 1.03 for path in paths)
    if not options.quick:
        network = resnet50(options.seed)
        print(network)
        compilation = network["compilation_seconds"]
        rates = network["rows_per_second"], PUBLISHED
        jobs = [(rate, method) for rate in rates for method in hosts]
        paper = [row for rate, method in jobs for row in on_paper(rate, compilation, hosts[method], method)]
        record.show(paper)
        results = {"bar": 1.03, "passed": passed, "sharded_path": paths, "host_seconds_per_image": hosts}
        record.save("scaling", results | {"resnet50": network, "on_paper": paper}, seed=options.seed)
    print("passed" if passed else "MISSED A BAR")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
