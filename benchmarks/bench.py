"""A small version of the large comparisons, on this machine, in minutes: JSON and Markdown in the folder bench/.

    make bench    # or: python benchmarks/bench.py

Runs three comparisons: against the reference packages (benchmarks/peers.py; left out without Python 3.11), of all
methods after memory, with networks that it trains (benchmarks/cifar10.py, on the bundled images), and the checks on a
GPU (benchmarks/gpu.py; a rehearsal where there is no GPU). The sizes are too small for any claim.

Exit status 1 if a check fails.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import time

HERE, OUT = pathlib.Path(__file__).parent, pathlib.Path("bench")
# Another process asks JAX: this one would keep the memory of the GPU.
BACKEND = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
ON_GPU = subprocess.run(BACKEND, check=True, capture_output=True, text=True).stdout.strip() == "gpu"
PARTS = {
    "Against the reference packages": ["peers.py", "--small", "--work", str(OUT / "peers")],
    "All methods, after memory": ["cifar10.py", "fashion-mnist-subset", "--small", "--work", str(OUT / "networks")],
    "On a GPU" if ON_GPU else "On a GPU, rehearsed without one": ["gpu.py", *([] if ON_GPU else ["--small"])],
}
JUDGED = ("peers.py", "gpu.py")


def main() -> int:
    OUT.mkdir(exist_ok=True)
    parts, failed = ["# A small benchmark of ancer_jax"], []
    for title, (script, *flags) in PARTS.items():
        parts += [f"## {title}", f"`python benchmarks/{' '.join([script, *flags])}`"]
        print(f"\n{title}", flush=True)
        if script == "peers.py" and not shutil.which("python3.11"):
            parts.append("Left out: the reference packages need Python 3.11, and there is no `python3.11`.")
            print(parts[-1])
            continue
        began, lines = time.perf_counter(), []
        environment = os.environ | {"BENCH_RESULTS": str(OUT.resolve()), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, str(HERE / script), *flags]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
        if process.returncode and script in JUDGED:
            failed.append(script)
        parts += [
            f"{time.perf_counter() - began:.0f} s, exit status {process.returncode}",
            "```",
            "".join(lines),
            "```",
        ]
        (OUT / "bench.md").write_text("\n\n".join(parts) + "\n")
    print(f"\n{OUT / 'bench.md'}, and raw outputs beside it" + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
