"""Counts of the same draws, computed in different ways: how many votes move.

XLA reads its flags once, before JAX takes a device, and may choose kernels anew in each process. So all counts come
from processes of their own, and this process must not have taken the device before: many accelerators serve one
process only.

What may move is a vote between two classes whose logits tie up to rounding. Another chunk is another shape, for which
cuDNN and XLA may choose another kernel, with another order of summation. Without deterministic operations the same call
may move votes, too. On the bundled network, rounding the inputs of all products to TF32 moves 4e-5 of the votes in an
emulation on a CPU: so even a choice between kernels of both precisions keeps within `MOST_MOVED`. With deterministic
operations and without autotuning nothing is left to chance, and an identical call may move none.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ancer_jax import Classifier, devices, load_bundled, load_dataset
from ancer_jax.data import select
from benchmarks.benchmark import TOP
from benchmarks.speed import overhead

DETERMINISTIC = "--xla_gpu_exclude_nondeterministic_ops=true --xla_gpu_autotune_level=0"
MOST_MOVED = 1e-4  # of the votes
REPEATED, CHUNKS = ("repeated", "another process"), ("chunk / 10", "chunk / 1.5")


def compare(small: bool, seed: int) -> list[dict[str, Any]]:
    """How many votes move against the first counts: repeated, in another process, with other chunks, on the CPU."""
    rows: list[dict[str, Any]] = []
    for kernels, precision in (("usual", "default"), ("deterministic", "highest")):
        ways = ["first", "repeated", *CHUNKS, "CPU"]
        ways += ["highest precision", "bfloat16"] if kernels == "usual" else []
        line = {"network": "SmallCNN", "kernels": kernels, "precision": precision}
        try:
            found = _in_new_process(kernels, small, seed, precision, ways)
            again = _in_new_process(kernels, small, seed, precision, ["first"])
        except subprocess.CalledProcessError as error:  # the other kernels are compared in any case
            rows.append(line | {"error": f"the process ended with status {error.returncode}"})
            continue
        first = found.pop("first")
        for against, counts in {"repeated": found["repeated"], "another process": again["first"], **found}.items():
            moved = int(np.abs(counts - first).sum()) // 2
            rows.append(line | {"against": against, "votes": int(first.sum()), "moved": moved})
    return rows


def most_moved(row: Mapping[str, Any]) -> float | None:
    """The largest share of votes that may move; None where the other side is another base classifier."""
    deterministic = row["kernels"] == "deterministic"
    if row["against"] in REPEATED:
        return 0.0 if deterministic else MOST_MOVED
    judged = row["against"] in CHUNKS or (row["against"] == "CPU" and row["precision"] == "highest")
    return MOST_MOVED if judged else None


def count(small: bool, seed: int, precision: str, ways: Sequence[str]) -> dict[str, list[list[int]]]:
    """Counts [10, K] of the bundled network, computed in each of the ways."""
    n, chunk = (1000, 100) if small else (20_000, 1000)
    bundled = load_bundled("fashion-mnist-cnn-l2-0.25")
    attributes = {**bundled.checkpoint.attributes, "compute_dtype": "bfloat16"}
    half = dataclasses.replace(bundled.checkpoint, attributes=attributes).classifier
    images = select(load_dataset("fashion-mnist-subset"), skip=50, max_images=10).images[:]
    usual: dict[str, Any] = {"classifier": bundled.classifier, "chunk": chunk, "precision": precision}
    others = {
        "chunk / 10": {"chunk": chunk // 10},
        "chunk / 1.5": {"chunk": chunk * 2 // 3},
        "CPU": {"device": jax.devices("cpu")[0]},
        "highest precision": {"precision": "highest"},
        "bfloat16": {"classifier": half},
    }
    return {way: _votes(images, n=n, seed=seed, **usual | others.get(way, {})).tolist() for way in ways}


def _votes(
    images: np.ndarray, *, n: int, seed: int, classifier: Classifier, chunk: int, precision: str, device: Any = None
) -> np.ndarray:
    """Counts [batch, K] on a device (by default JAX's) at a precision of products (by default the device's)."""
    mesh = Mesh(np.array([device or jax.devices()[0]]), ("rows",))
    products = jax.default_matmul_precision(precision) if precision != "default" else contextlib.nullcontext()
    with jax.default_device(device), products:
        images, classifier = devices.replicate(jax.tree.map(np.asarray, (images, classifier)), mesh)
        theta = jnp.full(images.shape, overhead.THETA)
        return overhead.certify(classifier, images, theta, n=n, chunk=chunk, seed=seed, mesh=mesh)


def _in_new_process(kernels: str, *arguments: Any) -> dict[str, np.ndarray]:
    """`count` in a new process, which keeps no programs: it would find the kernels that another one chose."""
    flags = DETERMINISTIC if kernels == "deterministic" else ""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()  # XLA takes a blank for the name of a file
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-m", __spec__.name, json.dumps(arguments)]
    done = subprocess.run(command, check=True, cwd=TOP, env=environment, stdout=subprocess.PIPE)
    return {way: np.array(counts) for way, counts in json.loads(done.stdout).items()}


if __name__ == "__main__":
    print(json.dumps(count(*json.loads(sys.argv[1]))))
