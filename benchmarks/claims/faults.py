"""Random faults: after any of them a run loses nothing, has nothing twice, and ends with the same bytes.

A run (ANCER with memory, 40 images in batches of two) is started again and again until it is finished. Each time one
fault hits it at a random moment: SIGKILL; SIGTERM; a full disk (files of the process cannot grow beyond a random size);
or a stored shard that is cut off at a random length. Other runs live in a bucket, each operation of which fails with
probability 0.4 %, or are sharded over three processes (fixed theta), one of which is killed. After every fault each
shard that was there must be there unchanged. At the end all shards, tables and the memory must be those of an
undisturbed run, apart from the seconds that images took.
"""

import argparse
import collections
import io
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from ancer_jax.runs import read_run
from ancer_jax.runs.directory import RESULTS
from ancer_jax.storage import list_folder
from benchmarks.benchmark import TOP, Benchmark, Found, Line, Lines, load

# How often each kind of fault is taken.
RATES = {"SIGKILL": 0.3, "SIGTERM": 0.15, "disk full": 0.15, "torn shard": 0.15, "bucket": 0.15, "one of several": 0.1}
PLUGIN = f"""
import sys
sys.path.insert(0, {str(TOP)!r})
from ancer_jax import load_bundled, storage
from tests import bucket
bucket.install()
storage.BEAT, storage.PATIENCE, storage._SETTLE = 0.5, 3.0, 0.1

def make():
    return load_bundled("fashion-mnist-cnn-l2-0.25").classifier
"""
CERTIFY = "certify --classifier plugin:make --sigma 0.25 --skip 12 --max 40 --n 500 --batch-size 2 --chunk 50 --out"
SEARCH = (
    "--method ancer --iso-steps 3 --iso-samples 8 --ancer-steps 3 --ancer-samples 8 --guard-samples 50 "
    "--leakage-probes 10 --leakage-samples 8"
)
FIXED = "--method fixed --n 5000 --batch-size 1"
WRONG = {"lost": 0, "twice": 0, "different": 0}  # counted in all runs


def start(folder: pathlib.Path, out: epath.PathLike, *flags: str, failures: float = 0.0) -> subprocess.Popen[str]:
    """The command of a run, in a process of its own."""
    from tests import bucket  # here, because it needs what only tests install

    command = [sys.executable, "-m", "ancer_jax.cli", *CERTIFY.split(), str(out), *" ".join(flags).split()]
    cache = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = os.environ | cache | {bucket.FOLDER: f"{folder}/bucket", bucket.FAILURES: str(failures)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def contents(out: epath.Path) -> tuple[Any, ...]:
    """All that a finished run stores, except seconds: the lines of its tables, its memory, its shards by id."""
    tables = []
    for name in ("results.tsv", "results_before_memory.tsv"):
        if (out / name).exists():
            cells = [line.split("\t") for line in (out / name).read_text().splitlines()]
            tables.append([row[:5] + row[6:] for row in cells])
    memory = {}
    if (out / "memory.npz").exists():
        with (out / "memory.npz").open("rb") as file, np.load(file) as arrays:
            memory = {name: arrays[name].tobytes() for name in arrays.files}
    by_id = {}
    for shard in read_run(out).shards():
        for row, id_ in enumerate(shard["ids"]):
            by_id[int(id_)] = {name: column[row].tobytes() for name, column in shard.items() if name != "seconds"}
    return tables, memory, by_id


def shards(out: epath.Path) -> dict[str, bytes]:
    """The bytes of each shard file."""
    return {file.name: file.read_bytes() for file in list_folder(out / "shards") if file.suffix == ".npz"}


def compare(out: epath.Path, before: dict[str, bytes], torn: str = "") -> None:
    """Count the shards of `before` that are missing or changed, and the images that are stored twice."""
    now = shards(out)
    WRONG["lost"] += sum(now.get(name) != content for name, content in before.items() if name != torn)
    ids = [i for content in now.values() for i in np.load(io.BytesIO(content))["ids"].tolist()]
    WRONG["twice"] += len(ids) - len(set(ids))


def wait(
    rng: random.Random, process: subprocess.Popen[str], out: epath.Path, before: dict[str, bytes], duration: float
):
    """Wait for a random moment: of the whole run, or soon after a shard was stored."""
    until = time.monotonic() + rng.uniform(0.3, 1) * duration
    if rng.random() < 0.5:
        while process.poll() is None and len(list(out.glob("shards/*.npz"))) <= len(before) + rng.randrange(3):
            time.sleep(0.005)
        until = time.monotonic() + rng.uniform(0, 0.1)
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)


def disturb(rng: random.Random, kind: str, process: subprocess.Popen[str], out: epath.Path) -> tuple[bool, str]:
    """Cause a fault.

    Returns:
      Whether the process was still running, and the name of the shard that was cut off ("" if none was).
    """
    running = process.poll() is None
    if kind in ("SIGKILL", "torn shard"):
        process.kill()
    elif kind == "SIGTERM":
        process.terminate()
    elif running:
        size = rng.choice([0, rng.randrange(4000)])
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    printed = process.communicate(timeout=300)[1]
    if not running or process.returncode == 0:
        return False, ""
    if kind == "SIGTERM" and process.returncode == -signal.SIGTERM:
        # Before the command has begun, or after its end: nobody waits for the signal.
        assert not printed or (out / RESULTS).exists(), printed
        return False, ""
    expected = {"SIGTERM": (143, "start the same command again"), "disk full": (2, "cannot write")}
    status, text = expected.get(kind, (-signal.SIGKILL, ""))
    assert process.returncode == status and text in printed, (kind, process.returncode, printed)
    if kind == "torn shard":
        files = sorted(out.glob("shards/*.npz"))
        if not files:
            return False, ""
        torn = rng.choice(files)
        torn.write_bytes(torn.read_bytes()[: rng.randrange(torn.stat().length)])
        again = start(pathlib.Path(out.parent), out, SEARCH)
        printed = again.communicate(timeout=300)[1]
        assert again.returncode == 2 and f"{torn}: truncated" in printed and "delete it" in printed, printed
        torn.unlink()
        return True, torn.name
    return True, ""


Outcome = tuple[epath.Path, list[str]]


def on_disk(rng: random.Random, folder: pathlib.Path, left: dict[str, int], duration: float) -> Outcome:
    """One run on disk, and the faults that it took; `left` says how many of each kind are still due."""
    out, faults = epath.Path(folder / "run"), []
    shutil.rmtree(out, ignore_errors=True)
    while True:
        before, process, torn = shards(out), start(folder, out, SEARCH), ""
        kinds = [kind for kind, count in left.items() if count > faults.count(kind)]
        if kinds:
            kind = rng.choice(kinds)
            wait(rng, process, out, before, duration)
            hit, torn = disturb(rng, kind, process, out)
            faults += [kind] * hit
        else:
            process.communicate(timeout=300)
        compare(out, before, torn)
        if process.returncode == 0:
            return out, faults


def in_bucket(rng: random.Random, folder: pathlib.Path, left: dict[str, int], duration: float) -> Outcome:
    """One run in a bucket, and the faults that it took."""
    out, faults = epath.Path(f"gs://b/run{rng.randrange(10**9)}"), []
    while True:
        before = shards(out)
        process = start(folder, out, SEARCH, failures=0.004 if len(faults) < left["bucket"] else 0)
        printed = process.communicate(timeout=600)[1]
        compare(out, before)
        if process.returncode == 0:
            return out, faults
        assert process.returncode == 2 and "Traceback" not in printed, printed
        faults.append("bucket")


def by_several(rng: random.Random, folder: pathlib.Path, left: dict[str, int], duration: float) -> Outcome:
    """One run of several processes, and the faults that it took."""
    out, faults = epath.Path(folder / "run"), []
    shutil.rmtree(out, ignore_errors=True)
    while True:
        before = shards(out)
        count = 3 if left["one of several"] > len(faults) else rng.choice([1, 2])
        killed = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        flags = f"--multihost --coordinator 127.0.0.1:{port} --processes {count} --process"
        processes = [start(folder, out, FIXED, f"{flags} {i}") for i in range(count)]
        if count == 3:
            killed = processes[rng.choice([0, 1, 1, 2, 2])]
            while killed.poll() is None and len(shards(out)) < len(before) + 3:  # all have joined
                time.sleep(0.02)
            wait(rng, killed, out, shards(out), duration / 2)
            if killed.poll() is None:
                killed.kill()
                faults.append("one of several")
        for process in processes:
            printed = process.communicate(timeout=600)[1]
            # The first process takes the others with it.
            alive = killed is None or (process is not killed and killed is not processes[0])
            assert process.returncode == 0 or not alive, printed
        compare(out, before)
        if (out / "results.tsv").exists() and len(read_run(out).done()) == 40:
            return out, faults


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """Undisturbed runs, then disturbed ones until all faults are taken."""
    from tests import bucket

    rng, began = random.Random(options.seed), time.time()
    left = {kind: round(rate * options.faults) for kind, rate in RATES.items()}
    taken, finished = collections.Counter(), collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "plugin.py").write_text(PLUGIN)
        bucket.install(folder / "bucket")
        expected, duration = {}, 0.0
        for flags in (SEARCH, FIXED, SEARCH):  # the last with all programs compiled before
            shutil.rmtree(folder / "run", ignore_errors=True)
            clock, process = time.monotonic(), start(folder, folder / "run", flags)
            printed = process.communicate()
            assert process.returncode == 0, printed
            duration = time.monotonic() - clock
            print(f"undisturbed: {duration:.1f} s", flush=True)
            found = contents(epath.Path(folder / "run"))
            assert expected.setdefault(flags, found) == found
        for kinds, one_run, flags in (
            (("SIGKILL", "SIGTERM", "disk full", "torn shard"), on_disk, SEARCH),
            (("bucket",), in_bucket, SEARCH),
            (("one of several",), by_several, FIXED),
        ):
            while any(left[kind] for kind in kinds):
                out, hits = one_run(rng, folder, {kind: left[kind] for kind in kinds}, duration)
                WRONG["different"] += contents(out) != expected[flags]
                for kind in hits:
                    left[kind] -= 1
                    taken[kind] += 1
                finished[one_run.__name__] += 1
                print(f"{sum(taken.values())} faults, {sum(finished.values())} runs", flush=True)
                yield {"faults": taken, "runs": finished, **WRONG, "seconds": round(time.time() - began)}


def lines(found: Found) -> Lines:
    r, total = found["results"], sum(found["results"]["faults"].values())
    what = f"{total} faults in {sum(r['runs'].values())} runs: shards lost; images twice; other bytes at the end"
    wrong = r["lost"], r["twice"], r["different"]
    yield Line(what, "; ".join(map(str, wrong)), "0; 0; 0", not any(wrong))


def _results() -> dict[str, Any]:
    return load("faults")["results"]


BENCHMARK = Benchmark(
    claim="After random faults a run loses nothing, has nothing twice, and ends with the same bytes.",
    takes="1 hour",
    measure=measure,
    sizes={"faults": (6, 200)},
    outputs={"faults": lines},
    figures={
        "count": lambda: str(sum(_results()["faults"].values())),
        "lost": lambda: str(_results()["lost"]),
        "twice": lambda: str(_results()["twice"]),
        "different": lambda: f"{_results()['different']} of {sum(_results()['runs'].values())}",
    },
)
