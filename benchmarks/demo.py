"""The demo from start to table, for both norms: how long it takes, and the order of the methods.

    python benchmarks/demo.py    # about 6 minutes on two CPU cores

Runs `ancer-jax demo` and `ancer-jax demo --norm l1` in an empty folder and stores all that they print, with the wall
time. The best fixed sigma is chosen with one seed (the runs try-*) and certified with another (fixed-*).

Exit status 1 if one of them takes more than 5 minutes, or if the mean proxy radius does not rise from the best fixed
sigma to isotropic noise to ANCER.
"""

import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import record

from ancer_jax.report import load_results

LIMIT_SECONDS = 300


def demo(norm: str, folder: str) -> dict[str, Any]:
    """One demo."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "ancer_jax.cli", "demo", "--norm", norm]
    done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    runs = {p.name: load_results(p) for p in sorted(pathlib.Path(folder, f"demo-{norm}").iterdir()) if p.is_dir()}
    mean = {name: results.mean_proxy_radius for name, results in runs.items()}
    (fixed,) = (value for name, value in mean.items() if name.startswith("fixed"))
    ordered = mean["ancer"] > mean["isotropic"] > fixed
    print(done.stdout, f"{seconds:.0f} s, ANCER > isotropic > best fixed: {ordered}", sep="\n")
    return {"norm": norm, "seconds": seconds, "ordered": ordered, "mean_proxy_radius": mean, "printed": done.stdout}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        results = [demo(norm, folder) for norm in ("l2", "l1")]
    record.save("demo", results, seed=0)
    for result in results:
        path = record.RESULTS / f"demo_{result['norm']}.txt"
        path.write_text(result["printed"])
    passed = all(result["ordered"] and result["seconds"] <= LIMIT_SECONDS for result in results)
    print("passed" if passed else "MISSED A BAR")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
