"""All measurements that need a GPU, in one call: first correctness, then speed.

Correctness:
- `clopper_pearson_lower_traced` and its upper twin against the exact bounds on a grid of n, count and alpha;
- counts of classifiers with known class probability (`claims/soundness.py`): their law, and their certificates;
- repeated calls and other chunks give the same counts.
Reported, not judged: how many votes differ between CPU and GPU (draws and logits round differently there, and float32
products may be computed in TF32), between default and highest matmul precision, and between float32 and bfloat16.

Speed: certification of SmallCNN and ResNet-18 at several batches and chunks, its ratio to the bare forward passes
(`overhead.py`), its rate as a share of that of large matrix products, and the share of the noise; ResNet-50 at
the batch and chunk that are chosen for the device's memory; both theta searches; bfloat16; the generators of random
numbers; training. Results are stored after every section. A section that would start after `--minutes` is left out.
With `--small` all is rehearsed on a CPU.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jax.sharding import Mesh

from ancer_jax import (
    AnisotropicConfig,
    CertifyConfig,
    Classifier,
    Execution,
    Gaussian,
    IsotropicConfig,
    RunConfig,
    Smoothed,
    certify_dataset,
    devices,
    from_linen,
    load_bundled,
    load_dataset,
    optimize_anisotropic,
    optimize_isotropic,
)
from ancer_jax.data import Dataset, select
from ancer_jax.models import make_network
from ancer_jax.runs.config import Method
from ancer_jax.runs.job import make_job
from ancer_jax.runs.plan import choose_batch
from ancer_jax.smoothing import bounds
from ancer_jax.training import HISTORY, PRESETS, train
from benchmarks.benchmark import Benchmark, Found, Line, Lines
from benchmarks.claims import soundness
from benchmarks.speed import overhead

SMALLEST_P_VALUE, LOOSEST = 1e-3, 1.01
SAME_COUNTS = ("repeated", "chunk / 10", "chunk / 1.5")
Row = dict[str, Any]


def check_bounds(small: bool, seed: int) -> list[Row]:
    """Traced bounds on the device against the exact ones: never on the wrong side, and how loose."""
    rows = []
    for alpha in (1e-9, 1e-6, 1e-3, 0.05, 0.5):
        trials, failures = [], []
        for exponent in range(0, 6 if small else 8):
            n = 10**exponent
            k = np.unique(np.concatenate([np.arange(min(n, 40)), np.geomspace(1, n, 200), n - np.geomspace(1, n, 200)]))
            k = np.unique(np.clip(k.astype(np.int64), 0, n - 1))
            trials.append(np.full(k.shape, n))
            failures.append(k)
        n, k = np.concatenate(trials), np.concatenate(failures)
        lower = np.asarray(jax.jit(bounds.clopper_pearson_lower_traced)(n - k, n, alpha), np.float64)
        upper = np.asarray(jax.jit(bounds.clopper_pearson_upper_traced)(k, n, alpha), np.float64)
        exact_lower = bounds.clopper_pearson_lower(n - k, n, alpha)
        exact_upper = bounds.clopper_pearson_upper(k, n, alpha)
        rows.append(
            {
                "alpha": alpha,
                "points": len(n),
                "lower_above_exact": int((lower > exact_lower).sum()),
                "upper_below_exact": int((upper < exact_upper).sum()),
                "loosest_lower": float(((1 - lower - 1.2e-7) / (1 - exact_lower)).max()),
                "loosest_upper": float((upper / exact_upper).max()),
            }
        )
    return rows


def check_linear(small: bool, seed: int) -> list[Row]:
    """Counts against their binomial law, and certificates against true regions."""
    rows = []
    seeds, n = (10, 10_000) if small else (500, 100_000)
    for norm, noise in soundness.NOISES.items():
        variables, x, theta, true_gap, true_class = soundness.cases(noise, 64, seeds, np.random.default_rng(seed))
        config = CertifyConfig(n=n)
        result = soundness.certify_all(
            noise, variables, x, theta, config=config, chunk=n // 10, block=10 if small else 100, seed=seed
        )
        p = scipy.stats.norm.cdf(true_gap) if noise.norm == 2 else (1 + true_gap) / 2
        prediction, count, gap = (np.asarray(values) for values in (result.prediction, result.count, result.gap))
        right = prediction == true_class
        z = (count - n * p)[right] / np.sqrt(n * p * (1 - p))[right]
        violations = int(((gap > true_gap) | ((prediction >= 0) & ~right)).sum())
        rows.append(
            {
                "norm": norm,
                "problems": seeds,
                "n": n,
                "count_law_p_value": float(scipy.stats.chi2.sf((z**2).sum(), right.sum())),
                "violations": violations,
                "violations_p_value": float(scipy.stats.binomtest(violations, seeds, config.alpha, "greater").pvalue),
            }
        )
    return rows


def votes(
    classifier: Classifier,
    images: np.ndarray,
    *,
    n: int,
    chunk: int,
    seed: int,
    device: Any = None,
    precision: str = "default",
) -> np.ndarray:
    """Counts [batch, K] on a device (by default JAX's) at a matmul precision (by default the device's)."""
    mesh = Mesh(np.array([device or jax.devices()[0]]), ("rows",))
    products = jax.default_matmul_precision(precision) if precision != "default" else contextlib.nullcontext()
    with jax.default_device(device), products:
        images, classifier = devices.replicate(jax.tree.map(np.asarray, (images, classifier)), mesh)
        theta = jnp.full(images.shape, overhead.THETA)
        return overhead.certify(classifier, images, theta, n=n, chunk=chunk, seed=seed, mesh=mesh)


def compare_votes(small: bool, seed: int) -> list[Row]:
    """Votes that differ though the draws do not. Those against `SAME_COUNTS` may not."""
    n, chunk = (1000, 100) if small else (20_000, 1000)
    cpu, classifier = jax.devices("cpu")[0], load_bundled("fashion-mnist-cnn-l2-0.25").classifier
    images = select(load_dataset("fashion-mnist-subset"), skip=50, max_images=10).images[:]
    count = functools.partial(votes, classifier, images, n=n, chunk=chunk, seed=seed)
    here, highest, on_cpu = count(), count(precision="highest"), count(device=cpu)
    pairs = [
        ("CPU", here, on_cpu),
        ("CPU, highest matmul precision here", highest, on_cpu),
        ("highest matmul precision", here, highest),
        ("repeated", here, count()),
        ("chunk / 10", here, count(chunk=chunk // 10)),
        ("chunk / 1.5", here, count(chunk=chunk * 2 // 3)),
    ]
    rows: list[Row] = []
    for what, a, b in pairs:
        moved = int(np.abs(a - b).sum()) // 2
        rows.append({"network": "SmallCNN", "against": what, "votes": 10 * n, "moved": moved})
    draw = jax.jit(lambda key: Gaussian().sample(key, jnp.ones(100_000)))
    draws = []
    for device in (None, cpu):
        with jax.default_device(device):
            draws.append(np.asarray(draw(jax.random.key(seed, impl="threefry2x32")), np.float64))
    difference = float(np.abs(draws[0] - draws[1]).max())
    rows.append({"against": "CPU", "largest_difference_of_a_draw": difference})
    n = 20 if small else 10_000
    images = np.random.default_rng(seed).uniform(0, 1, (2, 32, 32, 3)).astype(np.float32)
    chunk = min(1000, n)
    full, half = (
        votes(overhead.make_classifier("ResNet-18", seed, dtype)[0], images, n=n, chunk=chunk, seed=seed)
        for dtype in ("float32", "bfloat16")
    )
    moved = int(np.abs(full - half).sum()) // 2
    rows.append({"network": "ResNet-18", "against": "bfloat16", "votes": 2 * n, "moved": moved})
    return rows


@functools.cache
def peak_rate(dtype: str, size: int) -> float:
    """Billion operations a second of large matrix products, at the precision that networks get."""
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    return 2 * size**3 / float(np.median(overhead.seconds({"product": lambda: a @ a}, 10)["product"])) / 1e9


def throughput(
    plans: Sequence[tuple[str, int, int, int]], *, small: bool, seed: int, dtype: str = "float32"
) -> list[Row]:
    """`overhead.compare` for (network, batch, chunk, n), with rows a second, and the share of the device they use."""
    rows = []
    for name, batch, chunk, n in plans:
        line, _ = overhead.compare(name, batch=batch, chunk=chunk, n=n, repeats=3, seed=seed, dtype=dtype)
        classifier, shape = overhead.make_classifier(name, seed)
        with jax.default_device(jax.devices("cpu")[0]):  # a GPU reports no costs before compilation
            row = jax.tree.map(np.asarray, (classifier, np.zeros((1, *shape), np.float32)))
            costs = jax.jit(lambda classifier, x: classifier(x)).lower(*row).cost_analysis()
        assert costs
        rate, products = 1e6 / line["certify_us_per_row"], peak_rate(dtype, 512 if small else 8192)
        line |= {"rows_per_second": rate, "share_of_bare": 1 / line["ratio"], "gflops_of_products": products}
        rows.append(line | {"share_of_products": rate * costs["flops"] / 1e9 / products})
    return rows


def certify_small_cnn(small: bool, seed: int) -> list[Row]:
    """Certification of the bundled network."""
    plans = [(1, 1000), (1, 10_000), (10, 100), (10, 1000), (10, 10_000), (100, 1000)]
    total = 1_000_000
    if small:
        plans, total = [(1, 100), (4, 50)], 400
    return throughput([("SmallCNN", b, c, max(total // b, 2 * c)) for b, c in plans], small=small, seed=seed)


def certify_resnet18(small: bool, seed: int) -> list[Row]:
    """Certification of a ResNet-18."""
    plans, total = ([(1, 10)], 20) if small else ([(1, 100), (1, 1000), (10, 100), (10, 1000), (100, 100)], 40_000)
    return throughput([("ResNet-18", b, c, total // b) for b, c in plans], small=small, seed=seed)


def certify_resnet18_bfloat16(small: bool, seed: int) -> list[Row]:
    """Certification of a ResNet-18 that computes in bfloat16."""
    plans, total = ([(1, 10)], 20) if small else ([(10, 1000)], 40_000)
    plans = [("ResNet-18", b, c, total // b) for b, c in plans]
    return [row | {"dtype": "bfloat16"} for row in throughput(plans, small=small, seed=seed, dtype="bfloat16")]


def search(small: bool, seed: int) -> list[Row]:
    """Both theta searches: microseconds per gradient row (steps x draws), and images a second at full settings."""
    plans = [("SmallCNN", batch) for batch in ((2,) if small else (1, 10, 100))] + [("ResNet-18", 1 if small else 10)]
    searches = [(optimize_isotropic, IsotropicConfig), (optimize_anisotropic, AnisotropicConfig)]
    rows = []
    for name, batch in plans:
        classifier, shape = overhead.make_classifier(name, seed)
        images = jnp.asarray(np.random.default_rng(seed).uniform(0, 1, (batch, *shape)), jnp.float32)
        keys = jax.random.split(jax.random.key(seed, impl="threefry2x32"), batch)
        theta = jnp.full(batch, overhead.THETA)
        for preset, (optimize, kind) in itertools.product(("fast", "published"), searches):
            whole = kind() if preset == "fast" else kind.published()
            some = {"steps": 2, "num_samples": 10} if small else {"steps": min(whole.steps, 20)}
            config = dataclasses.replace(whole, **some)

            @jax.jit
            def run(keys, classifier, images, theta, optimize=optimize, config=config):
                smoothed = lambda theta: Smoothed(classifier, Gaussian(), theta)
                one = lambda key, x, theta: optimize(key, smoothed(theta), x, config=config)[0]
                return jax.vmap(one)(keys, images, theta)

            call = lambda run=run, a=(keys, classifier, images, theta): run(*a)
            per_row = float(np.median(overhead.seconds({"": call}, 3)[""])) / (
                batch * config.steps * config.num_samples
            )
            line = {"network": name, "search": optimize.__name__, "preset": preset, "batch": batch}
            line |= {"draws": config.num_samples, "us_per_row": per_row * 1e6}
            rows.append(line | {"images_per_second": 1 / (per_row * whole.steps * whole.num_samples)})
    return rows


def generators(small: bool, seed: int) -> list[Row]:
    """Normals a second of each generator: with a key for each draw, as the library draws, and from one key."""
    draws, d = (10, 3072) if small else (10_000, 3072)
    rows = []
    for impl in ("threefry2x32", "rbg", "unsafe_rbg"):
        key = jax.random.key(seed, impl=impl)
        per_draw = jax.vmap(lambda key, i: jax.random.normal(jax.random.fold_in(key, i), (d,)), (None, 0))
        many = jax.jit(lambda key, per_draw=per_draw: per_draw(key, jnp.arange(draws)))
        one = jax.jit(lambda key: jax.random.normal(key, (draws, d)))
        for how, function in (("key per draw", many), ("one key", one)):
            median = float(np.median(overhead.seconds({how: lambda f=function, k=key: f(k)}, 5)[how]))
            rows.append({"generator": impl, "how": how, "billion_normals_per_second": draws * d / median / 1e9})
    return rows


def training(small: bool, seed: int) -> list[Row]:
    """Images a second of training by noise augmentation, and whether a second training gives the same bits."""
    rows = []
    for name, batch in (("cifar_resnet20", 8),) if small else (("cifar_resnet110", 256), ("cifar_resnet18", 256)):
        count, rng = batch * (2 if small else 40), np.random.default_rng(seed)
        images = rng.random((count, 32, 32, 3), np.float32)
        data = Dataset("random", np.arange(count), images, rng.integers(0, 10, count), 10)
        config = dataclasses.replace(PRESETS["augmentation"], epochs=2, batch_size=batch, seed=seed)
        datasets = data, select(data, max_images=8)
        with tempfile.TemporaryDirectory() as folder:
            first, second = (train(make_network(name), datasets, config, out=f"{folder}/{i}") for i in (0, 1))
        speed = count / dict(zip(HISTORY, first.history[-1], strict=True))["seconds"]
        same = jax.tree.all(jax.tree.map(np.array_equal, first.variables, second.variables))
        rows.append({"network": name, "batch": batch, "images_per_second": speed, "same_bits": bool(same)})
    return rows


def imagenet(small: bool, seed: int) -> list[Row]:
    """ResNet-50: the batch and chunk that `choose_batch` takes, images a second of a run with them, and its memory."""
    rows, size = [], 32 if small else 224
    classes, rng = 1000, np.random.default_rng(seed)
    data = Dataset("noise", np.arange(96), rng.random((96, size, size, 3), np.float32), np.zeros(96, int), classes)
    data = select(data, max_images=3 if small else 96)
    plans: list[tuple[str, Method]] = [("float32", "fixed"), ("bfloat16", "fixed"), ("float32", "isotropic")]
    for dtype, method in plans:
        network = make_network("imagenet_resnet50", compute_dtype=dtype)
        variables = jax.jit(network.init)(jax.random.key(seed), data.images[:1])
        classifier = from_linen(network, variables, num_classes=classes)
        n, steps = (10, 1) if small else (2000, 5)
        search = IsotropicConfig.published(steps=steps, num_samples=4 if small else 100)
        config = RunConfig(
            method=method, certify=CertifyConfig(n0=10, n=n), isotropic=search, leakage=None, memory=False
        )
        start, mesh = np.asarray(config.theta, np.float32), devices.device_mesh(1)
        job, batch = choose_batch(make_job(classifier, config, start, Execution(), mesh), data, Execution())
        times: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            progress = lambda stage, images, times=times: times.append(time.perf_counter())
            execution = Execution(devices=1, progress=progress)
            certify_dataset(classifier, data, config, out=f"{folder}/run", execution=execution)
        last = times[-1] - times[-2]  # the first batch is compiled
        peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
        rows.append({"network": "ResNet-50", "dtype": dtype, "method": method, "batch": batch, "chunk": job.chunk,
                     "images_per_second": batch / last, "draws": n + 10, "peak_gib_so_far": peak})  # fmt: skip
    return rows


SECTIONS: dict[str, Callable[[bool, int], list[Row]]] = {
    "traced bounds": check_bounds,
    "known classifiers": check_linear,
    "certification, small network": certify_small_cnn,
    "certification, large network": certify_resnet18,
    "ImageNet": imagenet,
    "votes that move": compare_votes,
    "search": search,
    "generators": generators,
    "certification in bfloat16": certify_resnet18_bfloat16,
    "training": training,
}


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """All sections."""
    start, results = time.perf_counter(), {}
    for name, section in SECTIONS.items():
        elapsed = time.perf_counter() - start
        print(f"{name} (after {elapsed:.0f} s)", flush=True)
        if elapsed > 60 * options.minutes:
            results[name] = [{"left out": "for lack of time"}]
        else:
            try:
                results[name] = section(options.small, options.seed)
            except Exception as error:  # a GPU may be lent for minutes: the other sections are run in any case
                traceback.print_exc()
                results[name] = [{"error": repr(error)}]
        yield results


# Of a row: what names it, and what only the raw output has.
NAMES = (
    *("network", "dtype", "method", "search", "preset", "generator", "how", "against"),
    *("norm", "alpha", "batch", "chunk", "draws"),
)
UNSHOWN = (
    *("n", "points", "problems", "ratio", "gflops_of_products"),
    *("certify_us_per_row", "bare_us_per_row", "noise_us_per_row"),
)


def _bar(row: Row) -> tuple[str, bool | None]:
    """The bar of a row, and whether it is met."""
    if "error" in row:
        return "no error", False
    if "lower_above_exact" in row:
        loosest = max(row["loosest_lower"], row["loosest_upper"])
        right = not (row["lower_above_exact"] or row["upper_below_exact"])
        return f"0; 0; both <= {LOOSEST}", right and loosest <= LOOSEST
    if "count_law_p_value" in row:
        smallest = min(row["count_law_p_value"], row["violations_p_value"])
        return f"p-values >= {SMALLEST_P_VALUE}", smallest >= SMALLEST_P_VALUE
    if row.get("against") in SAME_COUNTS:
        return "0 moved", row["moved"] == 0
    return "", None


def lines(found: Found) -> Lines:
    text = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
    for section, rows in found["results"].items():
        for row in rows:
            named = {name: row[name] for name in NAMES if name in row}
            what = (value if isinstance(value, str) else f"{name} {text(value)}" for name, value in named.items())
            shown = {name: value for name, value in row.items() if name not in NAMES + UNSHOWN}
            figures = (f"{name.replace('_', ' ')} {text(value)}" for name, value in shown.items())
            yield Line(", ".join([section, *what]), "; ".join(figures), *_bar(row))


BENCHMARK = Benchmark(
    claim="On a GPU, bounds and counts are right; how fast certification, searches and training are there.",
    takes="8 minutes, on a GPU",
    measure=measure,
    sizes={"minutes": (60.0, 6.5)},
    outputs={"gpu": lines},
)
