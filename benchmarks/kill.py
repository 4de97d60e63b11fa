"""A run killed by SIGKILL at 20 random moments gives the same shards and table: stores what the slow test prints.

python benchmarks/kill.py

The test is `test_twenty_kills_change_nothing` in tests/test_runs.py (`make slow`). About 3 minutes on two CPU cores.
"""

import pathlib
import subprocess
import sys

import record


def main() -> int:
    top = pathlib.Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-m", "slow", "-s", "-v", "--no-header", "tests/test_runs.py"]
    done = subprocess.run(command, cwd=top, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    lines = [line for line in done.stdout.splitlines() if not line.startswith(("platform", "rootdir", "cachedir"))]
    record.save("kill", {"passed": done.returncode == 0, "printed": lines}, seed=0)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
