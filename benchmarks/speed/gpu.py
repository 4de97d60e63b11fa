"""All measurements that need an accelerator, the most valuable first.

Correctness:
- votes that move between calls, processes, chunks and devices (`_moved_votes.py`), with the usual kernels and with
  deterministic ones at the highest precision: the latter may move none between identical calls, and all others at most
  1e-4 of the votes. Reported, not judged: another base classifier (default against highest precision, bfloat16);
- `clopper_pearson_lower_traced` and its upper twin against the exact bounds on a grid of n, count and alpha;
- counts of classifiers with known class probability (`claims/soundness.py`): their law, and their certificates;
- random bits as on the CPU, and noisy copies that do not depend on how many are drawn at a time.

Speed: certification of SmallCNN, ResNet-18 and ResNet-50 (224 x 224) at several numbers of images x chunk, which decide
the defaults of `Execution`; at the usual sizes its ratio to the bare forward passes (`overhead.py`), and its rate as a
share of that of large matrix products; runs with ResNet-50 at the batch and chunk that are chosen for the device's
memory; both theta searches; bfloat16; training.

Results are stored after every section. A section that would start after `--minutes` is left out: a second call with
`--as gpu-more --sections ...` makes up for it. With `--small` all is rehearsed on a CPU.
"""

import argparse
import dataclasses
import functools
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from ancer_jax import (
    AnisotropicConfig,
    CertifyConfig,
    Execution,
    Gaussian,
    IsotropicConfig,
    RunConfig,
    Smoothed,
    Uniform,
    certify_dataset,
    devices,
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
from benchmarks.speed import _moved_votes, overhead

SMALLEST_P_VALUE, LOOSEST = 1e-3, 1.01
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


def check_draws(small: bool, seed: int) -> list[Row]:
    """Draws against those of the CPU, and noisy copies against those of another number at a time."""
    n, shape, cpu = 1000, (28, 28, 1), jax.devices("cpu")[0]
    key = jax.random.key(seed, impl="threefry2x32")
    x, theta = jnp.full(shape, 0.5), jnp.full(shape, overhead.THETA)

    def against_cpu(draw: Callable[[Any], jax.Array]) -> np.ndarray:
        here = np.asarray(jax.jit(draw)(key))
        with jax.default_device(cpu):
            return np.stack([here, np.asarray(jax.jit(draw)(jax.device_put(key, cpu)))])

    bits = against_cpu(lambda key: jax.random.bits(key, (n * 100,)))
    rows: list[Row] = [{"draws": "random bits", "against": "CPU", "differ": int((bits[0] != bits[1]).sum())}]
    normal = against_cpu(lambda key: Gaussian().sample(key, jnp.ones(n * 100))).astype(np.float64)
    rows.append({"draws": "normal", "against": "CPU", "largest_difference": float(np.abs(normal[0] - normal[1]).max())})
    for name, noise in (("Gaussian", Gaussian()), ("uniform", Uniform())):
        copies = jax.jit(jax.vmap(lambda i, noise=noise: noise.perturb(key, i, x, theta)))
        whole = np.asarray(copies(np.arange(n)))
        parts = np.concatenate([np.asarray(copies(np.arange(i, i + n // 10))) for i in range(0, n, n // 10)])
        line = {"draws": f"noisy copies, {name}", "against": "a tenth at a time"}
        rows.append(line | {"differ": int((whole != parts).sum())})
    return rows


@functools.cache
def peak_rate(dtype: str, size: int) -> float:
    """Billion operations a second of large matrix products, at the precision that networks get."""
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    return 2 * size**3 / float(np.median(overhead.seconds({"product": lambda: a @ a}, 10)["product"])) / 1e9


def throughput(
    plans: Sequence[tuple[str, int, int]], total: int, *, small: bool, seed: int, dtype: str = "float32"
) -> list[Row]:
    """Rows a second of certification for (network, images, chunk), and the share of the device that they use.

    Each has `total` rows, or two chunks of each image. At the usual sizes it is compared with the bare forward passes.
    """
    rows: list[Row] = []
    for name, batch, chunk in plans:
        line = {"network": name, "dtype": dtype, "batch": batch, "chunk": chunk, "rows": batch * chunk}
        n = chunk * max(2, total // (batch * chunk))
        parts = ("certify", "bare", "noise") if (batch, chunk) == _usual(small) else ("certify",)
        sizes = {"batch": batch, "chunk": chunk, "n": n, "repeats": 3}
        try:
            measured, _ = overhead.compare(name, **sizes, seed=seed, dtype=dtype, parts=parts)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            rows.append(line | {"out_of_memory": True})
            continue
        classifier, shape = overhead.make_classifier(name, seed)
        with jax.default_device(jax.devices("cpu")[0]):  # a GPU reports no costs before compilation
            row = jax.tree.map(np.asarray, (classifier, np.zeros((1, *shape), np.float32)))
            costs = jax.jit(lambda classifier, x: classifier(x)).lower(*row).cost_analysis()
        assert costs
        rate, products = 1e6 / measured["certify_us_per_row"], peak_rate(dtype, 512 if small else 8192)
        line |= measured | {"rows_per_second": rate, "gflops_of_products": products}
        line |= {"share_of_bare": 1 / measured["ratio"]} if "ratio" in measured else {}
        rows.append(line | {"share_of_products": rate * costs["flops"] / 1e9 / products})
    fastest = max((row["rows_per_second"] for row in rows if "rows_per_second" in row), default=0)
    for row in rows:
        if "rows_per_second" in row:
            row["share_of_fastest"] = row["rows_per_second"] / fastest
    return rows


def _usual(small: bool) -> tuple[int, int]:
    """Images and chunk that a run takes on an accelerator where nothing is asked for."""
    return (4, 16) if small else (32, 128)


def certify_small_cnn(small: bool, seed: int) -> list[Row]:
    """Certification of the bundled network: which images x chunk suits a small network, and one image."""
    sizes = [(1, 128), (1, 1024), (1, 4096), (32, 128), (1, 16_384), (32, 512), (1, 65_536)]
    sizes, total = ([(1, 64), (4, 16)], 256) if small else (sizes, 1_000_000)
    return throughput([("SmallCNN", *size) for size in sizes], total, small=small, seed=seed)


def certify_resnet18(small: bool, seed: int) -> list[Row]:
    """Certification of a ResNet-18 on 32 x 32, in float32."""
    sizes = [(1, 128), (1, 1024), (1, 4096), (32, 128), (1, 16_384)]
    name, sizes, total = ("cifar_resnet20", [(4, 16)], 128) if small else ("ResNet-18", sizes, 40_000)
    return throughput([(name, *size) for size in sizes], total, small=small, seed=seed)


def certify_bfloat16(small: bool, seed: int) -> list[Row]:
    """Certification of a ResNet-18 that computes in bfloat16."""
    name, total = ("cifar_resnet20", 128) if small else ("ResNet-18", 40_000)
    return throughput([(name, *_usual(small))], total, small=small, seed=seed, dtype="bfloat16")


def certify_resnet50(small: bool, seed: int) -> list[Row]:
    """Certification of a ResNet-50 on 224 x 224. Of 16,384 rows, one layer's output alone would take 53 GB."""
    sizes = [(1, 128), (1, 1024), (32, 128)]
    name, sizes, total = ("cifar_resnet20", [(1, 64)], 128) if small else ("ResNet-50", sizes, 0)
    return throughput([(name, *size) for size in sizes], total, small=small, seed=seed)


def search(small: bool, seed: int) -> list[Row]:
    """Both theta searches: microseconds per gradient row (steps x draws), and images a second at full settings."""
    plans = [
        ("SmallCNN", 1, "fast"),
        ("SmallCNN", 32, "fast"),
        ("ResNet-18", 32, "fast"),
        ("ResNet-18", 32, "published"),
    ]
    searches = [(optimize_isotropic, IsotropicConfig), (optimize_anisotropic, AnisotropicConfig)]
    rows = []
    for name, batch, preset in [("SmallCNN", 2, "fast")] if small else plans:
        classifier, shape = overhead.make_classifier(name, seed)
        images = jnp.asarray(np.random.default_rng(seed).uniform(0, 1, (batch, *shape)), jnp.float32)
        keys = jax.random.split(jax.random.key(seed, impl="threefry2x32"), batch)
        theta = jnp.full(batch, overhead.THETA)
        for optimize, kind in searches:
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


def imagenet(small: bool, seed: int, plans: Sequence[tuple[str, Method]]) -> list[Row]:
    """Runs with a ResNet-50 at the batch and chunk that `choose_batch` takes: images a second, and the memory."""
    rows, name, images = [], *(("cifar_resnet20", 3) if small else ("ResNet-50", 96))
    for dtype, method in plans:
        classifier, shape = overhead.make_classifier(name, seed, dtype)
        ids = np.arange(images)
        data = Dataset("grey", ids, np.full((images, *shape), 0.5, np.float32), 0 * ids, classifier.num_classes)
        # Multiples of the usual chunk: no draw is computed in vain.
        certify = CertifyConfig(n0=10, n=10) if small else CertifyConfig(n0=128, n=512)
        search = IsotropicConfig.published(steps=1 if small else 5, num_samples=4 if small else 100)
        config = RunConfig(method=method, certify=certify, isotropic=search, leakage=None, memory=False)
        start, mesh = np.asarray(config.theta, np.float32), devices.device_mesh(1)
        begin = time.perf_counter()
        job, batch = choose_batch(make_job(classifier, config, start, Execution(), mesh), data, Execution())
        times = [time.perf_counter()]
        with tempfile.TemporaryDirectory() as folder:
            progress = lambda stage, images, times=times: times.append(time.perf_counter())
            execution = Execution(devices=1, progress=progress)
            certify_dataset(classifier, data, config, out=f"{folder}/run", execution=execution)
        last = times[-1] - times[-2]  # the first batch is compiled
        peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
        line: Row = {"network": name, "dtype": dtype, "method": method, "batch": batch, "chunk": job.chunk}
        line |= {"draws": certify.n0 + certify.n, "images_per_second": batch / last, "peak_gib_so_far": peak}
        rows.append(line | {"seconds_of_planning": times[0] - begin})
    return rows


# In this order: the votes come first, from processes of their own, before this one takes the device.
SECTIONS: dict[str, Callable[[bool, int], list[Row]]] = {
    "votes": _moved_votes.compare,
    "bounds": check_bounds,
    "certificates": check_linear,
    "draws": check_draws,
    "small-cnn": certify_small_cnn,
    "resnet18": certify_resnet18,
    "resnet50": certify_resnet50,
    "imagenet": functools.partial(imagenet, plans=[("float32", "fixed"), ("bfloat16", "fixed")]),
    "search": search,
    "bfloat16": certify_bfloat16,
    "imagenet-search": functools.partial(imagenet, plans=[("float32", "isotropic")]),
    "training": training,
}


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """All sections that are asked for, and how long they took."""
    start, compiling = time.perf_counter(), [0.0]

    def note(event: str, duration_secs: float, **_: Any) -> None:
        compiling[0] += duration_secs * event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(note)
    results: dict[str, list[Row]] = {}
    times: list[Row] = []
    for name in [name for name in SECTIONS if name in options.sections]:
        begin = time.perf_counter()
        print(f"{name} (after {begin - start:.0f} s)", flush=True)
        if begin - start > 60 * options.minutes:
            results[name] = [{"left_out": "for lack of time"}]
        else:
            compiling[0] = 0.0
            try:
                results[name] = SECTIONS[name](options.small, options.seed)
            except Exception as error:  # a GPU may be lent for minutes: the other sections are run in any case
                traceback.print_exc()
                results[name] = [{"error": repr(error)}]
            took = {"seconds": time.perf_counter() - begin, "seconds_compiling": compiling[0]}
            times.append({"section": name} | took)
        yield results | {"time": times}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=[*SECTIONS],
        default=[*SECTIONS],
        metavar="SECTION",
        help=f"some of {', '.join(SECTIONS)}",
    )


# Of a row: what names it, and what only the raw output has.
NAMES = (
    *("section", "network", "dtype", "method", "search", "preset", "kernels", "precision"),
    *("norm", "alpha", "batch", "chunk", "rows", "draws", "against"),
)
WORDED = {"kernels": "{} kernels", "precision": "{} precision", "against": "against {}"}
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
    if "differ" in row:
        return "0 differ", row["differ"] == 0
    if "moved" in row and (most := _moved_votes.most_moved(row)) is not None:
        return f"<= {most:g} of votes" if most else "0 moved", row["moved"] <= most * row["votes"]
    return "", None


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def lines(found: Found) -> Lines:
    for section, rows in found["results"].items():
        for row in rows:
            named = {name: row[name] for name in NAMES if name in row}
            worded = {name: "{}" for name, value in named.items() if isinstance(value, str)} | WORDED
            what = (worded.get(name, f"{name} {{}}").format(_text(value)) for name, value in named.items())
            shown = {name: value for name, value in row.items() if name not in NAMES + UNSHOWN}
            figures = (f"{name.replace('_', ' ')} {_text(value)}" for name, value in shown.items())
            yield Line(", ".join([section, *what]), "; ".join(figures), *_bar(row))


BENCHMARK = Benchmark(
    claim="On a GPU, bounds and counts are right; how fast certification, searches and training are there.",
    takes="8 minutes on a GPU, by estimate",
    measure=measure,
    sizes={"minutes": (60.0, 6.5)},
    arguments=_arguments,
    outputs={"gpu": lines, "gpu-more": lines},
)
