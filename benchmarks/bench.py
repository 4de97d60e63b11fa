"""A small version of the large comparisons, on this machine, in minutes: JSON and Markdown in the folder bench/.

    make bench    # or: python benchmarks/bench.py

Against the reference packages (benchmarks/peers.py; left out where there is no Python 3.11 for them), all methods after
memory for networks trained here (benchmarks/cifar10.py, on the bundled images), and what is to be seen on a GPU
(benchmarks/gpu.py; a rehearsal where there is none). The sizes are too small for any claim. Exit status 1 if a check
fails.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import time

HERE, OUT = pathlib.Path(__file__).parent, pathlib.Path("bench")
METHODS = ["--work", str(OUT / "networks"), "--l2-network", "small_cnn", "--l1-network", "small_cnn"]
METHODS += ["--epochs", "10", "--images", "10"]
ASK = [sys.executable, "-c", "import jax; print(jax.default_backend())"]  # a process that has a GPU keeps its memory
ON_GPU = subprocess.run(ASK, check=True, capture_output=True, text=True).stdout.strip() == "gpu"
PARTS = {
    "Against the reference packages": ["peers.py", "--small", "--work", str(OUT / "peers")],
    "All methods, after memory": ["cifar10.py", "fashion-mnist-subset", *METHODS],
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
