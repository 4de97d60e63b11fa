"""The benchmarks run, in small, and find nothing wrong; bars that such sizes say nothing about are not judged."""

import os
import pathlib
import subprocess
import sys

import pytest

MAY_MISS_ITS_BAR = ("overhead.py", "scaling.py", "splitting.py", "memory.py")  # speed, training, peak of compilation
BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "overhead.py --quick",
        "scaling.py --quick",
        "soundness.py --quick",
        "invariance.py --n 100",
        "memory.py --small 100 --large 200",
        "reconcile.py --count 200",
        "selection.py --trials 300",
        "best_fixed.py --images 2 --n 200",
        "splitting.py --work work --epochs 1 --images 2 --theta 0.5",
        "faults.py --faults 4 --no-record",
        "convolution.py --networks SmallCNN",
        "gpu.py --small",
    ],
)
def test_runs(command, tmp_path):
    script, *flags = command.split()
    environment = os.environ | {"BENCH_RESULTS": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    how = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, str(BENCHMARKS / script), *flags], **how)
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    assert done.returncode == 0 or (done.returncode == 1 and script in MAY_MISS_ITS_BAR), done.stdout + done.stderr
    assert done.stdout
