"""Random faults: whatever happens to a run, nothing is lost, nothing is there twice, and it ends with the same bytes.

python benchmarks/faults.py [--faults 200] [--seed 0]

A run (ANCER with memory, 40 images in batches of two) is started again and again until it is finished, and hit by one
fault each time, at a random moment: SIGKILL, SIGTERM, a disk that is full (files of the process cannot grow beyond a
random size), a shard that is torn afterwards, by whatever, to a random length. Others live in a bucket, each operation
of which fails with probability 0.4 %, or are shared by three processes (fixed theta), one of which is killed. After
every fault each shard that was there must be there, untouched; at the end all shards, tables and the memory must be
those of an undisturbed run (but for the seconds that images took). About an hour on two CPU cores.
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

import numpy as np
import record
from etils import epath

TOP = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(TOP))

from ancer_jax.runs import read_run  # noqa: E402
from ancer_jax.storage import list_folder  # noqa: E402
from tests import bucket  # noqa: E402

SHARES = {"SIGKILL": 0.3, "SIGTERM": 0.15, "disk full": 0.15, "torn shard": 0.15, "bucket": 0.15, "one of several": 0.1}
PLUGIN = f"""
import sys
sys.path.insert(0, {str(TOP)!r})
from ancer_jax import load_bundled, storage
from tests import bucket
bucket.install()
storage.BEAT, storage.PATIENCE, storage._SETTLE = 0.5, 3.0, 0.1

def make():
    return load_bundled("l2").classifier
"""
CERTIFY = "certify --classifier plugin:make --sigma 0.25 --skip 12 --max 40 --n 500 --batch-size 2 --chunk 50 --out"
SEARCH = (
    "--method ancer --iso-steps 3 --iso-samples 8 --ancer-steps 3 --ancer-samples 8 --guard-samples 50 "
    "--leakage-references 10 --leakage-samples 8"
)
FIXED = "--method fixed --n 5000 --batch-size 1"
WRONG = {"lost": 0, "twice": 0, "different": 0}


def start(folder, out, *flags, failures=0.0):
    command = [sys.executable, "-m", "ancer_jax.cli", *CERTIFY.split(), str(out), *" ".join(flags).split()]
    cache = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = os.environ | cache | {bucket.FOLDER: f"{folder}/bucket", bucket.FAILURES: str(failures)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def contents(out):
    """Everything that a finished run says, the seconds apart: its lines, its memory, its shards by id."""
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


def shards(out):
    return {file.name: file.read_bytes() for file in list_folder(out / "shards") if file.suffix == ".npz"}


def compare(out, before, torn=""):
    """Count the shards that were there, and are no more or are others, and the images that are there twice."""
    now = shards(out)
    WRONG["lost"] += sum(now.get(name) != content for name, content in before.items() if name != torn)
    ids = [i for content in now.values() for i in np.load(io.BytesIO(content))["ids"].tolist()]
    WRONG["twice"] += len(ids) - len(set(ids))


def moment(rng, process, out, before, duration):
    """Wait for a random moment: of the whole run, or soon after a shard has come."""
    until = time.monotonic() + rng.uniform(0.3, 1) * duration
    if rng.random() < 0.5:
        while process.poll() is None and len(list(out.glob("shards/*.npz"))) <= len(before) + rng.randrange(3):
            time.sleep(0.005)
        until = time.monotonic() + rng.uniform(0, 0.1)
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)


def disturb(rng, kind, process, out):
    """Do it: whether the process was still there to feel it, and the shard that was torn, if any."""
    felt = process.poll() is None
    if kind in ("SIGKILL", "torn shard"):
        process.kill()
    elif kind == "SIGTERM":
        process.terminate()
    elif felt:
        size = rng.choice([0, rng.randrange(4000)])
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    printed = process.communicate(timeout=300)[1]
    if not felt or process.returncode == 0:
        return False, ""
    expected = {"SIGTERM": (143, "start the same command again"), "disk full": (2, "cannot write")}
    status, text = expected.get(kind, (-signal.SIGKILL, ""))
    assert process.returncode == status and text in printed, (kind, process.returncode, printed)
    if kind == "torn shard":
        files = sorted(out.glob("shards/*.npz"))
        if not files:
            return False, ""
        torn = rng.choice(files)
        torn.write_bytes(torn.read_bytes()[: rng.randrange(torn.stat().st_size)])
        again = start(out.parent, out, SEARCH)
        printed = again.communicate(timeout=300)[1]
        assert again.returncode == 2 and f"{torn}: truncated" in printed and "delete it" in printed, printed
        torn.unlink()
        return True, torn.name
    return True, ""


def on_disk(rng, folder, left, duration):
    """One run, and the faults that it took."""
    out, faults = folder / "run", []
    shutil.rmtree(out, ignore_errors=True)
    while True:
        before, process, torn = shards(out), start(folder, out, SEARCH), ""
        kinds = [kind for kind, count in left.items() if count > faults.count(kind)]
        if kinds:
            kind = rng.choice(kinds)
            moment(rng, process, out, before, duration)
            felt, torn = disturb(rng, kind, process, out)
            faults += [kind] * felt
        else:
            process.communicate(timeout=300)
        compare(out, before, torn)
        if process.returncode == 0:
            return out, faults


def in_bucket(rng, folder, left, _):
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


def by_several(rng, folder, left, duration):
    out, faults = folder / "run", []
    shutil.rmtree(out, ignore_errors=True)
    while True:
        before = shards(out)
        count = 3 if left["one of several"] > len(faults) else rng.choice([1, 2])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        flags = f"--multihost --coordinator 127.0.0.1:{port} --processes {count} --process"
        processes = [start(folder, out, FIXED, f"{flags} {i}") for i in range(count)]
        if count == 3:
            killed = processes[rng.choice([0, 1, 1, 2, 2])]
            while killed.poll() is None and len(shards(out)) < len(before) + 3:  # all have joined
                time.sleep(0.02)
            moment(rng, killed, out, shards(out), duration / 2)
            if killed.poll() is None:
                killed.kill()
                faults.append("one of several")
        for process in processes:
            printed = process.communicate(timeout=600)[1]
            alive = count < 3 or (process is not killed and killed is not processes[0])
            assert process.returncode == 0 or not alive, printed
        compare(out, before)
        if (out / "results.tsv").exists() and len(read_run(out).done()) == 40:
            return out, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-record", action="store_true", help="do not store the results")
    options = parser.parse_args()
    rng, began = random.Random(options.seed), time.time()
    left = {kind: round(share * options.faults) for kind, share in SHARES.items()}
    taken, finished = collections.Counter(), collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "plugin.py").write_text(PLUGIN)
        bucket.install(folder / "bucket")
        expected, duration = {}, 0.0
        for flags in (SEARCH, FIXED, SEARCH):  # the last with all programs compiled before
            shutil.rmtree(folder / "run", ignore_errors=True)
            clock, process = time.monotonic(), start(folder, folder / "run", flags)
            assert process.wait() == 0, process.communicate()
            duration = time.monotonic() - clock
            print(f"undisturbed: {duration:.1f} s", flush=True)
            found = contents(folder / "run")
            assert expected.setdefault(flags, found) == found
        for kinds, one_run, flags in (
            (("SIGKILL", "SIGTERM", "disk full", "torn shard"), on_disk, SEARCH),
            (("bucket",), in_bucket, SEARCH),
            (("one of several",), by_several, FIXED),
        ):
            while any(left[kind] for kind in kinds):
                out, faults = one_run(rng, folder, {kind: left[kind] for kind in kinds}, duration)
                WRONG["different"] += contents(out) != expected[flags]
                for kind in faults:
                    left[kind] -= 1
                    taken[kind] += 1
                finished[one_run.__name__] += 1
                so_far = sum(taken.values()), sum(finished.values()), time.time() - began
                print("{} faults, {} runs finished as they should, {:.0f} s".format(*so_far), flush=True)
    results = {"faults": dict(taken), "runs": dict(finished), **WRONG}
    print(results)
    if not options.no_record:
        record.save("faults", results | {"seconds": round(time.time() - began)}, seed=options.seed)
    return int(any(WRONG.values()))


if __name__ == "__main__":
    sys.exit(main())
