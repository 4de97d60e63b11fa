"""Do counts depend on how they are computed? They must not: execution settings may only change speed.

On 20 bundled test images, with Gaussian and with uniform noise and n = 10,000:

- fixed theta through `certify_dataset`: chunk, batch size, order of the images (half of them first, the rest by
  resuming the run) and one against four devices; the stored counts and predictions are compared by id;
- an anisotropic random theta per image, counted as a run does: chunk, batch size, shuffled order and four devices; all
  ten classes' counts are compared.

The four devices are virtual (`--xla_force_host_platform_device_count=4`), in a process of their own. Noise is the same
bit for bit, so the only thing that could differ is a logit's last digit, and with it a vote between two classes that
nearly tie: any such difference is printed and is a failure.

    python benchmarks/invariance.py           # 10 minutes on two CPU cores

Exit status 1 if any count differs.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np
import record

from ancer_jax import CertifyConfig, Execution, RunConfig, certify_dataset, load_bundled, load_dataset, parallel
from ancer_jax.counting import Votes
from ancer_jax.data import select, take
from ancer_jax.runs import read_run
from ancer_jax.smoothing import Stage

IMAGES = 20
# The first is what the others are compared with.
EXECUTIONS = (
    [{"chunk": 100, "batch_size": 10}]
    + [{"chunk": chunk, "batch_size": 10} for chunk in (64, 1000, 1500)]
    + [{"chunk": 100, "batch_size": batch_size} for batch_size in (1, 7, 64)]
    + [{"chunk": 100, "batch_size": 10, "order": "shuffled"}]
)
FOUR_DEVICES = [{"chunk": chunk, "batch_size": 10, "devices": 4} for chunk in (100, 1500)]


def fixed_theta(norm, n, seed, *, chunk, batch_size, order="plain", devices=1):
    """[prediction, count] of each image, by id, through the pipeline."""
    bundled = load_bundled(norm)
    dataset = select(load_dataset("fashion-mnist-subset"), skip=25, max_images=IMAGES)
    config = RunConfig(norm=norm, theta=bundled.theta, certify=CertifyConfig(n=n), seed=seed)
    execution = Execution(batch_size=batch_size, chunk=chunk, devices=devices)
    first = [take(dataset, np.arange(1, IMAGES, 2))] if order == "shuffled" else []
    with tempfile.TemporaryDirectory() as folder:
        for part in [*first, dataset]:
            certify_dataset(bundled.classifier, part, config, out=f"{folder}/run", execution=execution)
        shards = list(read_run(f"{folder}/run").shards())
    columns = {name: np.concatenate([shard[name] for shard in shards]) for name in ("ids", "predictions", "counts")}
    by_id = np.argsort(columns["ids"])
    return np.stack([columns["predictions"][by_id], columns["counts"][by_id]], axis=1).tolist()


def anisotropic_theta(norm, n, seed, *, chunk, batch_size, order="plain", devices=1):
    """Counts of all classes of each image, by id, with a random theta per image and pixel."""
    bundled = load_bundled(norm)
    images = select(load_dataset("fashion-mnist-subset"), skip=25, max_images=IMAGES).images
    rng = np.random.default_rng(seed)
    theta = bundled.theta * np.exp(rng.uniform(-1, 1, images.shape)).astype(np.float32)
    rows = rng.permutation(IMAGES) if order == "shuffled" else np.arange(IMAGES)
    key, mesh = jax.random.key(seed, impl="threefry2x32"), parallel.device_mesh(devices)
    classifier = parallel.replicate(bundled.classifier, mesh)
    counts = np.zeros((IMAGES, 10), int)
    for batch in np.split(rows, range(batch_size, IMAGES, batch_size)):
        keys, every = jax.vmap(jax.random.fold_in, (None, 0))(key, batch), np.arange(len(batch))
        arguments = keys, classifier, images[batch], theta[batch], RunConfig(norm=norm)
        votes = Votes(*arguments, chunk=chunk, mesh=mesh)
        counts[batch] = votes(Stage.ESTIMATE, every, np.zeros_like(every), np.full_like(every, n))
    return counts.tolist()


def measure(executions, n, seed):
    """Counts of every norm, kind of theta and execution."""
    results = []
    for norm in ("l2", "l1"):
        for kind, function in (("fixed", fixed_theta), ("anisotropic", anisotropic_theta)):
            for execution in executions:
                counts = function(norm, n, seed, **execution)
                results.append({"norm": norm, "theta": kind} | execution | {"counts": counts})
    return results


def four_devices(arguments):
    """The same in a fresh process that sees four virtual devices."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "counts.json"
        flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
        options = ["--n", str(arguments.n), "--seed", str(arguments.seed), "--child", str(out)]
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        subprocess.run([sys.executable, __file__, *options], check=True, env=environment)
        return json.loads(out.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=10_000, help="draws per image")
    parser.add_argument("--child", type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        arguments.child.write_text(json.dumps(measure(FOUR_DEVICES, arguments.n, arguments.seed)))
        return 0
    results = measure(EXECUTIONS, arguments.n, arguments.seed) + four_devices(arguments)
    reference = {(r["norm"], r["theta"]): np.array(r["counts"]) for r in reversed(results) if "devices" not in r}
    rows = []
    for result in results:
        expected = reference[result["norm"], result["theta"]]
        difference = np.array(result.pop("counts")) - expected
        shown = {"chunk": 0, "batch_size": 0, "order": "plain", "devices": 1} | result
        rows.append({"norm": shown.pop("norm"), "theta": shown.pop("theta")} | shown)
        rows[-1] |= {"images_that_differ": int(difference.any(-1).sum()), "largest": int(np.abs(difference).max())}
    record.show(rows)
    differ = sum(row["images_that_differ"] for row in rows)
    reference = {" ".join(name): counts.tolist() for name, counts in reference.items()}
    results = {"images": IMAGES, "n": arguments.n, "rows": rows, "reference_counts": reference}
    record.save("invariance", results, seed=arguments.seed)
    print("all counts are equal" if not differ else f"{differ} COUNTS DIFFER")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
