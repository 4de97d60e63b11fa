"""The overhead of certification: the votes of a run against the bare forward passes of the same network.

Bare: a jitted `lax.scan` over as many chunks of as many rows, each the network on one fixed block of images, argmax
and count, without noise. Certification and bare forward passes alternate in one process; the medians of their times,
and the ratio of these, are reported for

- the bundled SmallCNN on 28x28x1, at several chunk sizes;
- a ResNet-18 with a CIFAR stem on 32x32x3, 11 million random weights;
- the ResNet-18 of ANCER's code on 32x32x3, whose feature maps are smaller, so that the noise weighs more (no bar).

The cost of the noise alone is that of certifying a classifier that only sums its input: keys, draws and `x + noise` are
all there. Everything runs on one device. The ratio at the fastest chunk has a bar.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ancer_jax import CertifyConfig, Classifier, Execution, RunConfig, devices, from_function, from_linen, load_bundled
from ancer_jax.models import make_network
from ancer_jax.models.checkpoints import image_shape
from ancer_jax.runs.job import make_job
from ancer_jax.smoothing.smoothed import Stage
from benchmarks.benchmark import Benchmark, Found, Line, Lines, load

BARS = {"SmallCNN": 1.4, "ResNet-18": 1.1}
THETA = 0.25


def make_classifier(name: str, seed: int, dtype: str = "float32") -> tuple[Classifier, tuple[int, ...]]:
    """The bundled SmallCNN, always in float32, or a network with random weights; and the shape of its images."""
    if name == "SmallCNN":
        return load_bundled("fashion-mnist-cnn-l2-0.25").classifier, (28, 28, 1)
    name = {"ResNet-18": "cifar_resnet18", "ResNet-50": "imagenet_resnet50"}.get(name, name)
    network, shape = make_network(name, compute_dtype=dtype), image_shape(name)
    variables = jax.jit(network.init)(jax.random.key(seed), jnp.zeros((1, *shape)))
    return from_linen(network, variables, num_classes=network.num_classes), shape


def _sum(_, x):
    total = x.reshape(len(x), -1).sum(-1)
    return jnp.stack([total, -total], axis=-1)


SUM = from_function(_sum, {}, num_classes=2)


def certify(classifier: Classifier, images, theta, *, n: int, chunk: int, seed: int, mesh: Mesh) -> np.ndarray:
    """Counts [batch, K] as a run makes them, for thetas [batch, *d] of Gaussian noise."""
    config = RunConfig(certify=CertifyConfig(n=n), seed=seed)
    job = make_job(classifier, config, np.asarray(THETA, np.float32), Execution(chunk=chunk), mesh)
    columns = np.arange(len(images))
    return job.vote_counter(columns.astype(np.uint32), images, theta)(Stage.ESTIMATE, columns, 0, n)


@functools.partial(jax.jit, static_argnames=("n", "chunk"))
def bare(classifier: Classifier, block, *, n: int, chunk: int):
    """Counts [batch, K] of the forward passes alone; `block` is [batch, chunk + 1, *d]."""

    def add(counts, i):
        # The slice moves: XLA would compute the network of rows that stay the same once, outside the loop.
        rows = jax.lax.dynamic_slice_in_dim(block, i % 2, chunk, axis=1)
        logits = classifier(rows.reshape(-1, *rows.shape[2:])).reshape(*rows.shape[:2], -1)
        return counts + jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=jnp.int32).sum(1), None

    start = jnp.zeros((block.shape[0], classifier.num_classes), jnp.int32)
    return jax.lax.scan(add, start, jnp.arange(-(-n // chunk)))[0]


def seconds(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, [repeats] lists, in turn; the first call of each (compilation) is not counted."""
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return times


def compare(
    name: str,
    *,
    batch: int,
    chunk: int,
    n: int,
    repeats: int,
    seed: int,
    dtype: str = "float32",
    parts: Sequence[str] = ("certify", "bare", "noise"),
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Microseconds per row of certification, bare forward and noise, and the ratio of the first two; all times."""
    mesh = devices.device_mesh(1)
    classifier, shape = make_classifier(name, seed, dtype)
    classifier = devices.replicate(classifier, mesh)
    rng = np.random.default_rng(seed)
    images = jnp.asarray(rng.uniform(0, 1, (batch, *shape)), jnp.float32)
    block = jnp.asarray(rng.uniform(0, 1, (batch, chunk + 1, *shape)), jnp.float32)
    theta = jnp.full(images.shape, THETA)
    functions = {
        "certify": lambda: certify(classifier, images, theta, n=n, chunk=chunk, seed=seed, mesh=mesh),
        "bare": lambda: bare(classifier, block, n=n, chunk=chunk),
        "noise": lambda: certify(SUM, images, theta, n=n, chunk=chunk, seed=seed, mesh=mesh),
    }
    times = seconds({part: functions[part] for part in parts}, repeats)
    line: dict[str, Any] = {"network": name, "batch": batch, "chunk": chunk, "n": n}
    line |= {f"{part}_us_per_row": float(np.median(t)) / (batch * n) * 1e6 for part, t in times.items()}
    if {"certify", "bare"} <= times.keys():
        line["ratio"] = float(np.median(times["certify"]) / np.median(times["bare"]))
    return line, {f"{part}_seconds": t for part, t in times.items()}


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """All networks and chunks."""
    plans = [("SmallCNN", 10, chunk, 2000, 7) for chunk in (20, 50, 100, 200, 500, 1000)]
    plans += [("ResNet-18", 1, chunk, 1000, 5) for chunk in (100, 200)]
    plans += [("ancer_resnet18", 1, chunk, 4000, 7) for chunk in (100, 200, 500)]
    if options.small:
        plans = [("SmallCNN", 10, 100, 1000, 3), ("ResNet-18", 1, 100, 100, 3), ("ancer_resnet18", 1, 100, 1000, 3)]
    rows = []
    for name, batch, chunk, n, repeats in plans:
        row, times = compare(name, batch=batch, chunk=chunk, n=n, repeats=repeats, seed=options.seed)
        rows.append(row | times)
        yield {"rows": rows}


def fastest(found: Found) -> dict[str, dict[str, Any]]:
    """For each network its row at the fastest chunk."""
    slowest_first = sorted(found["results"]["rows"], key=lambda r: -r["certify_us_per_row"])
    return {r["network"]: r for r in slowest_first}


def lines(found: Found) -> Lines:
    judged = [row for name, row in fastest(found).items() if name in BARS]
    for r in found["results"]["rows"]:
        certify, bare, noise = (f"{r[name + '_us_per_row']:,.1f}" for name in ("certify", "bare", "noise"))
        what = f"{r['network']}, chunk {r['chunk']}: certification / bare forward passes"
        figure = f"{r['ratio']:.2f} ({certify} / {bare} us a row, noise {noise})"
        if r in judged:
            bar = BARS[r["network"]]
            yield Line(what, figure, f"<= {bar}", r["ratio"] <= bar)
        else:
            yield Line(what, figure)


def _ratio(network: str) -> str:
    return f"{fastest(load('overhead'))[network]['ratio']:.2f}"


BENCHMARK = Benchmark(
    claim="Certification takes little longer than the bare forward passes of a network.",
    takes="5 to 10 minutes",
    measure=measure,
    small_is_judged=False,
    outputs={"overhead": lines},
    figures={
        "resnet18": lambda: _ratio("ResNet-18"),
        "ancer-resnet18": lambda: _ratio("ancer_resnet18"),
        "small-cnn": lambda: _ratio("SmallCNN"),
    },
)
