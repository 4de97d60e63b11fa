"""Several processes share a run: the same bytes as one, whoever dies."""

import os
import socket
import subprocess
import sys
import time

import pytest

from ancer_jax.runs import read_run

pytestmark = pytest.mark.slow
FLAGS = "certify --method fixed --n 2000 --skip 25 --batch-size 1 --chunk 50 --out"


def start(folder, out, *more, images=10):
    command = [sys.executable, "-m", "ancer_jax.cli", *FLAGS.split(), out, "--max", str(images), *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=os.environ | {"XLA_FLAGS": ""}, **pipes)


def alone(folder, out, **options):
    process = start(folder, out, **options)
    printed = process.communicate(timeout=300)
    assert process.returncode == 0, printed


def start_all(folder, out, count, **options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = ["--multihost", "--coordinator", address, "--processes", str(count)]
    return [start(folder, out, *flags, "--process", str(i), **options) for i in range(count)]


def table(folder):
    lines = (folder / "results.tsv").read_text().splitlines()
    return [line.split("\t")[:5] + line.split("\t")[6:] for line in lines]  # less the time


@pytest.mark.parametrize("count", [2, 4])
def test_processes_write_the_table_that_one_writes(tmp_path, count):
    alone(tmp_path, "one")
    processes = start_all(tmp_path, "all", count)
    printed = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, printed
    assert table(tmp_path / "all") == table(tmp_path / "one")
    assert all(f"process {i} of {count} has done its share" in out for i, (out, _) in enumerate(printed))
    assert "Certified accuracy at" in printed[0][0] and "Certified accuracy at" not in printed[1][0]
    assert sorted(len(shard["ids"]) for shard in read_run(tmp_path / "all").shards()) == [1] * 10


def test_a_process_that_dies_does_not_lose_the_others_work(tmp_path):
    alone(tmp_path, "one", images=20)
    first, second = start_all(tmp_path, "all", 2, images=20)
    shards = tmp_path / "all" / "shards"
    while not any(int(path.stem) % 1000 == 500 for path in shards.glob("*.npz")):  # one of the second's
        time.sleep(0.05)
        assert second.poll() is None
    second.kill()
    second.communicate()
    out, _ = first.communicate(timeout=400)
    assert first.returncode == 0 and "images are left" in out
    done = read_run(tmp_path / "all").done()
    assert {*range(0, 10_000, 1000)} <= done
    alone(tmp_path, "all", images=20)  # another number of processes continues
    assert table(tmp_path / "all") == table(tmp_path / "one")
