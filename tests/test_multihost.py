"""Several processes share a run, or training: the same as one, whoever dies."""

import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from ancer_jax.models import load_network
from ancer_jax.runs import read_run

pytestmark = pytest.mark.slow
CERTIFY = "certify --method fixed --n 2000 --skip 25 --batch-size 1 --chunk 50 --max 10 --out"
TRAIN = "train --epochs 2 --batch-size 32 --lr 0.02 --max 160 --test-max 50 --out"


def start(folder, out, *more, command=CERTIFY, devices=1):
    command = [sys.executable, "-m", "ancer_jax.cli", *command.split(), out, *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def alone(folder, out, **options):
    process = start(folder, out, **options)
    printed = process.communicate(timeout=300)
    assert process.returncode == 0, printed


def start_all(folder, out, count, *more, **options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = ["--multihost", "--coordinator", address, "--processes", str(count)]
    return [start(folder, out, *flags, *more, "--process", str(i), **options) for i in range(count)]


def table(folder):
    lines = (folder / "results.tsv").read_text().splitlines()
    return [line.split("\t")[:5] + line.split("\t")[6:] for line in lines]  # less the time


@pytest.mark.parametrize(("count", "devices", "shard"), [(2, 1, "images"), (4, 2, "images"), (2, 4, "draws")])
def test_processes_write_the_table_that_one_writes(tmp_path, count, devices, shard):
    alone(tmp_path, "one")
    processes = start_all(tmp_path, "all", count, "--shard-devices", shard, devices=devices)
    printed = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, printed
    assert table(tmp_path / "all") == table(tmp_path / "one")
    assert all(f"process {i} of {count} has finished" in out for i, (out, _) in enumerate(printed))
    assert "Certified accuracy at" in printed[0][0] and "Certified accuracy at" not in printed[1][0]
    assert sorted(i for shard in read_run(tmp_path / "all").shards() for i in shard["ids"]) == list(range(0, 5000, 500))


def test_a_process_that_dies_does_not_lose_the_others_work(tmp_path):
    command = CERTIFY.replace("--max 10", "--max 20")
    alone(tmp_path, "one", command=command)
    first, second = start_all(tmp_path, "all", 2, command=command)
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
    alone(tmp_path, "all", command=command)  # another number of processes continues
    assert table(tmp_path / "all") == table(tmp_path / "one")


def test_processes_train_the_network_that_one_trains(tmp_path):
    """Up to rounding; and one process goes on with what several have begun."""
    alone(tmp_path, "one", command=TRAIN)
    processes = start_all(tmp_path, "all", 2, command=TRAIN, devices=2)
    printed = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert "on 50 test images" in printed[0][0] and "on 50 test images" not in printed[1][0]
    (tmp_path / "all" / "network.json").unlink()
    alone(tmp_path, "all", command=TRAIN)  # nothing is left but to store the network
    one, several = load_network(tmp_path / "one"), load_network(tmp_path / "all")
    for ours, theirs in zip(jax.tree.leaves(several.variables), jax.tree.leaves(one.variables), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    columns = [np.loadtxt(tmp_path / name / "training.tsv", skiprows=1) for name in ("one", "all")]
    np.testing.assert_allclose(columns[0][:, :-1], columns[1][:, :-1], rtol=1e-3)
