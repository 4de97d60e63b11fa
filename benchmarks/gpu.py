"""Everything that has to be measured on a GPU, in one call; what is correct first, then what is fast.

    python benchmarks/gpu.py            # under 8 minutes on one large GPU; needs the extra `cuda`
    python benchmarks/gpu.py --small    # rehearsal on a CPU, 2 minutes; its timings mean nothing

Correctness (exit status 1 if any fails):
- `clopper_pearson_lower_traced` and its upper twin against the exact bounds on a grid of n, count and alpha;
- counts of classifiers with known class probability (benchmarks/soundness.py): law and certificates;
- repeated calls and other chunks give the same counts.
Reported, not judged: how many votes differ between CPU and GPU (draws and logits round differently there, and float32
products may be computed in TF32), between default and highest matmul precision, and between float32 and bfloat16.

Speed: certification of SmallCNN and ResNet-18 at several batches and chunks, its ratio to the bare forward passes
(benchmarks/overhead.py), its share of the rate of large matrix products, and the share of the noise; ResNet-50 at the
batch and chunk that are chosen for the device's memory; both theta searches; bfloat16; which generator of random
numbers pays; training. Results are stored after every section, and a section that would start after `--minutes` is left
out and named.
"""

import argparse
import dataclasses
import functools
import itertools
import sys
import tempfile
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import overhead
import record
import scipy.stats
import soundness
from jax.sharding import Mesh

from ancer_jax import (
    AnisotropicConfig,
    Execution,
    GaussianL2,
    IsotropicConfig,
    RunConfig,
    bounds,
    certify_dataset,
    execution,
    from_linen,
    load_bundled,
    load_dataset,
    optimize_anisotropic,
    optimize_isotropic,
    parallel,
)
from ancer_jax.certification import CertifyConfig
from ancer_jax.data import Dataset, select
from ancer_jax.models import make_network
from ancer_jax.training import HISTORY, PRESETS, train

SMALLEST_P_VALUE = 1e-3


def check_bounds(small, seed):
    """Traced bounds on the device against the exact ones: sides, and how loose."""
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
        rows[-1]["ok"] = (
            not (rows[-1]["lower_above_exact"] or rows[-1]["upper_below_exact"])
            and max(rows[-1]["loosest_lower"], rows[-1]["loosest_upper"]) <= 1.01
        )
    return rows


def check_linear(small, seed):
    """Counts against their binomial law, and certificates against true regions."""
    rows = []
    seeds, n = (10, 10_000) if small else (500, 100_000)
    for norm in ("l2", "l1"):
        variables, x, theta, true_gap, true_class = soundness.cases(norm, 64, seeds, np.random.default_rng(seed))
        config = CertifyConfig(n=n)
        options = {"config": config, "chunk": n // 10, "block": 10 if small else 100, "seed": seed}
        result = soundness.certify_all(norm, variables, x, theta, **options)
        p = scipy.stats.norm.cdf(true_gap) if norm == "l2" else (1 + true_gap) / 2
        right = result.prediction == true_class
        z = (result.count - n * p)[right] / np.sqrt(n * p * (1 - p))[right]
        violations = int(((result.gap > true_gap) | ((result.prediction >= 0) & ~right)).sum())
        line = {
            "norm": norm,
            "problems": seeds,
            "n": n,
            "count_law_p_value": float(scipy.stats.chi2.sf((z**2).sum(), right.sum())),
            "violations": violations,
            "violations_p_value": float(scipy.stats.binomtest(violations, seeds, config.alpha, "greater").pvalue),
        }
        line["ok"] = min(line["count_law_p_value"], line["violations_p_value"]) >= SMALLEST_P_VALUE
        rows.append(line)
    return rows


def votes(classifier, images, *, n, chunk, seed, device=None, precision=None):
    """Counts [batch, K] on a device (default: JAX's) at a matmul precision (default: the device's)."""
    mesh = Mesh(np.array([device or jax.devices()[0]]), ("rows",))
    with jax.default_device(device), jax.default_matmul_precision(precision):
        images, classifier = parallel.replicate(jax.tree.map(np.asarray, (images, classifier)), mesh)
        keys = jax.random.split(jax.random.key(seed, impl="threefry2x32"), len(images))
        theta = jnp.full(images.shape, overhead.THETA)
        return overhead.certify(keys, classifier, images, theta, n=n, chunk=chunk, mesh=mesh)


def compare_votes(small, seed):
    """Votes that move when something else than the draws changes; those of the last three pairs must not."""
    n, chunk = (1000, 100) if small else (20_000, 1000)
    cpu, classifier = jax.devices("cpu")[0], load_bundled("l2").classifier
    images = select(load_dataset("fashion-mnist-subset"), skip=50, max_images=10).images
    count = functools.partial(votes, classifier, images, n=n, chunk=chunk, seed=seed)
    here, highest, on_cpu = count(), count(precision="highest"), count(device=cpu)
    pairs = [
        ("CPU", here, on_cpu, False),
        ("CPU, highest matmul precision here", highest, on_cpu, False),
        ("highest matmul precision", here, highest, False),
        ("repeated", here, count(), True),
        ("chunk / 10", here, count(chunk=chunk // 10), True),
        ("chunk / 1.5", here, count(chunk=chunk * 2 // 3), True),
    ]
    rows = []
    for what, a, b, must_agree in pairs:
        moved = int(np.abs(a - b).sum()) // 2
        line = {"network": "SmallCNN", "against": what, "votes": 10 * n, "moved": moved}
        rows.append(line | {"ok": moved == 0} if must_agree else line)
    draw = jax.jit(lambda key: GaussianL2().sample(key, jnp.ones(100_000)))
    draws = []
    for device in (None, cpu):
        with jax.default_device(device):
            draws.append(np.asarray(draw(jax.random.key(seed, impl="threefry2x32")), np.float64))
    difference = float(np.abs(draws[0] - draws[1]).max())
    rows.append({"network": "none", "against": "CPU", "largest_difference_of_a_draw": difference})
    n = 20 if small else 10_000
    images = np.random.default_rng(seed).uniform(0, 1, (2, 32, 32, 3)).astype(np.float32)
    chunk = min(1000, n)
    full, half = (
        votes(overhead.resnet18(seed, dtype)[0], images, n=n, chunk=chunk, seed=seed)
        for dtype in ("float32", "bfloat16")
    )
    moved = int(np.abs(full - half).sum()) // 2
    rows.append({"network": "ResNet-18", "against": "bfloat16", "votes": 2 * n, "moved": moved})
    return rows


@functools.cache
def ceiling(dtype, size):
    """Billion operations a second of large matrix products, at the precision that networks get."""
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    return 2 * size**3 / float(np.median(overhead.seconds({"product": lambda: a @ a}, 10)["product"])) / 1e9


def throughput(plans, *, small, repeats, seed, dtype=None):
    """overhead.compare for (network, batch, chunk, n), with rows per second, and the share of the device they use."""
    rows = []
    for name, batch, chunk, n in plans:
        line, _ = overhead.compare(name, batch=batch, chunk=chunk, n=n, repeats=repeats, seed=seed, dtype=dtype)
        classifier, shape = overhead.NETWORKS[name](seed)
        with jax.default_device(jax.devices("cpu")[0]):  # a GPU's client says nothing before compilation
            row = jax.tree.map(np.asarray, (classifier, np.zeros((1, *shape), np.float32)))
            costs = jax.jit(lambda classifier, x: classifier(x)).lower(*row).cost_analysis()
        rate, products = 1e6 / line["certify_us_per_row"], ceiling(dtype or "float32", 512 if small else 8192)
        line |= {"rows_per_second": rate, "share_of_bare": 1 / line["ratio"], "gflops_of_products": products}
        rows.append(line | {"share_of_products": rate * costs["flops"] / 1e9 / products})
        record.show(rows[-1:])
    return rows


def certify_small_cnn(small, seed):
    plans = [(1, 1000), (1, 10_000), (10, 100), (10, 1000), (10, 10_000), (100, 1000)]
    total = 1_000_000
    if small:
        plans, total = [(1, 100), (4, 50)], 400
    return throughput([("SmallCNN", b, c, max(total // b, 2 * c)) for b, c in plans], small=small, repeats=3, seed=seed)


def certify_resnet18(small, seed):
    plans, total = ([(1, 10)], 20) if small else ([(1, 100), (1, 1000), (10, 100), (10, 1000), (100, 100)], 40_000)
    return throughput([("ResNet-18", b, c, total // b) for b, c in plans], small=small, repeats=3, seed=seed)


def certify_resnet18_bfloat16(small, seed):
    plans, total = ([(1, 10)], 20) if small else ([(10, 1000)], 40_000)
    plans = [("ResNet-18", b, c, total // b) for b, c in plans]
    rows = throughput(plans, small=small, repeats=3, seed=seed, dtype="bfloat16")
    return [row | {"dtype": "bfloat16"} for row in rows]


def search(small, seed):
    """Both theta searches: microseconds per gradient row (steps x draws), and images per second at full settings."""
    plans = [("SmallCNN", batch) for batch in ((2,) if small else (1, 10, 100))] + [("ResNet-18", 1 if small else 10)]
    searches = [(optimize_isotropic, IsotropicConfig), (optimize_anisotropic, AnisotropicConfig)]
    rows = []
    for name, batch in plans:
        classifier, shape = overhead.NETWORKS[name](seed)
        images = jnp.asarray(np.random.default_rng(seed).uniform(0, 1, (batch, *shape)), jnp.float32)
        keys = jax.random.split(jax.random.key(seed, impl="threefry2x32"), batch)
        theta = jnp.full(batch, overhead.THETA)
        for preset, (optimize, kind) in itertools.product(("fast", "reference"), searches):
            whole = kind() if preset == "fast" else kind.reference()
            some = {"steps": 2, "num_samples": 10} if small else {"steps": min(whole.steps, 20)}
            config = dataclasses.replace(whole, **some)

            @jax.jit
            def run(keys, classifier, images, theta, optimize=optimize, config=config):
                one = lambda key, x, theta: optimize(key, classifier, GaussianL2(), x, theta, config=config)[0]
                return jax.vmap(one)(keys, images, theta)

            call = lambda run=run, a=(keys, classifier, images, theta): run(*a)
            per_row = float(np.median(overhead.seconds({"": call}, 3)[""])) / (
                batch * config.steps * config.num_samples
            )
            line = {"network": name, "search": optimize.__name__, "preset": preset, "batch": batch}
            line |= {"draws": config.num_samples, "us_per_row": per_row * 1e6}
            rows.append(line | {"images_per_second": 1 / (per_row * whole.steps * whole.num_samples)})
    return rows


def generators(small, seed):
    """Normals per second of each generator, with a key per draw as the library draws them, and from one key."""
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


def training(small, seed):
    """Images per second of training by noise augmentation, and whether a second training gives the same bits."""
    rows = []
    for name, batch in (("cifar_resnet20", 8),) if small else (("cifar_resnet110", 256), ("cifar_resnet18", 256)):
        count, rng = batch * (2 if small else 40), np.random.default_rng(seed)
        images = rng.random((count, 32, 32, 3), np.float32)
        data = Dataset("random", np.arange(count), images, rng.integers(0, 10, count), 10)
        config = dataclasses.replace(PRESETS["augmentation"], epochs=2, batch_size=batch, seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            first, second = (
                train(make_network(name), data, select(data, max_images=8), config, out=f"{folder}/{i}") for i in (0, 1)
            )
        speed = count / dict(zip(HISTORY, first.history[-1], strict=True))["seconds"]
        same = jax.tree.all(jax.tree.map(np.array_equal, first.variables, second.variables))
        rows.append({"network": name, "batch": batch, "images_per_second": speed, "same_bits": bool(same)})
    return rows


def imagenet(small, seed):
    """What `execution.fit` chooses for ResNet-50, forward passes a second of a run with it, and the memory it took."""
    rows, size = [], 32 if small else 224
    classes, rng = 1000, np.random.default_rng(seed)
    data = Dataset("noise", np.arange(96), rng.random((96, size, size, 3), np.float32), np.zeros(96, int), classes)
    data = select(data, max_images=3 if small else 96)
    for dtype, method in (("float32", "fixed"), ("bfloat16", "fixed"), ("float32", "isotropic")):
        network = make_network("imagenet_resnet50", compute_dtype=dtype)
        variables = jax.jit(network.init)(jax.random.key(seed), data.images[:1])
        classifier = from_linen(network, variables, num_classes=classes)
        n, steps = (10, 1) if small else (2000, 5)
        search = IsotropicConfig.reference(steps=steps, num_samples=4 if small else 100)
        config = RunConfig(method=method, certify=CertifyConfig(n0=10, n=n), isotropic=search, leakage=None)
        start = np.asarray(config.theta, np.float32)
        chosen = execution.fit(classifier, data, start, None, config, Execution(), parallel.device_mesh(1))
        times = []
        with tempfile.TemporaryDirectory() as folder:
            done = lambda images, times=times: times.append(time.perf_counter())
            how = {"execution": Execution(devices=1), "reconcile": False, "progress": done}
            certify_dataset(classifier, data, config, out=f"{folder}/run", **how)
        last = times[-1] - times[-2]  # the first batch is compiled
        peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
        rows.append({"dtype": dtype, "method": method, "batch": chosen[0], "chunk": chosen[1],
                     "images_per_second": chosen[0] / last, "draws": n + 10, "peak_gib_so_far": peak})  # fmt: skip
    return rows


SECTIONS = {
    "traced bounds": check_bounds,
    "known classifiers": check_linear,
    "certification, SmallCNN": certify_small_cnn,
    "certification, ResNet-18": certify_resnet18,
    "ImageNet, ResNet-50": imagenet,
    "votes that move": compare_votes,
    "search": search,
    "generators": generators,
    "certification, ResNet-18, bfloat16": certify_resnet18_bfloat16,
    "training": training,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="rehearsal with tiny sizes, stored as gpu_small.json")
    parser.add_argument("--minutes", type=float, default=6.5, help="start no section after this time")
    arguments = parser.parse_args()
    start, results, failed = time.perf_counter(), {}, []
    for name, section in SECTIONS.items():
        elapsed = time.perf_counter() - start
        print(f"\n{name} (after {elapsed:.0f} s)", flush=True)
        if elapsed > 60 * arguments.minutes:
            results[name] = "left out: no time"
            continue
        try:
            results[name] = section(arguments.small, arguments.seed)
        except Exception as error:  # the device is lent for minutes: the other sections shall have theirs
            traceback.print_exc()
            results[name] = [{"ok": False, "error": repr(error)}]
        record.show(results[name])
        failed += [name for row in results[name] if not row.get("ok", True)]
        record.save("gpu_small" if arguments.small else "gpu", results, seed=arguments.seed)
    print(f"FAILED: {', '.join(dict.fromkeys(failed))}" if failed else "all checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
