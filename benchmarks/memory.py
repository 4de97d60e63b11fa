"""Is memory independent of the number of draws? Peak memory of certifying ten bundled images, n = 1e3 against 1e6.

Each run is `certify_dataset` (SmallCNN, batch 10, chunk 100) in a fresh process, which reports its own `ru_maxrss`
(Python, JAX and compilation included). The two must agree within 5 %.

    python benchmarks/memory.py                   # 8 minutes on two CPU cores, nearly all of it n = 1e6
    python benchmarks/memory.py --large 100_000   # one minute

Exit status 1 if the bar is missed.
"""

import argparse
import resource
import subprocess
import sys
import tempfile

import record

BAR = 1.05
IMAGES, CHUNK = 10, 100


def child(n, seed):
    """Certify, then print the peak memory of this process in MiB (the unit of ru_maxrss is the system's)."""
    from ancer_jax import CertifyConfig, Execution, RunConfig, certify_dataset, load_bundled, load_dataset
    from ancer_jax.data import select

    dataset = select(load_dataset("fashion-mnist-subset"), skip=50, max_images=IMAGES)
    config = RunConfig(certify=CertifyConfig(n=n), seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        execution = Execution(batch_size=IMAGES, chunk=CHUNK, devices=1)
        certify_dataset(load_bundled("l2").classifier, dataset, config, out=f"{folder}/run", execution=execution)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak / (2**20 if sys.platform == "darwin" else 2**10))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", type=int, default=1000, help="the smaller n")
    parser.add_argument("--large", type=int, default=1_000_000, help="the larger n")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.seed)
        return 0
    rows = []
    for n in (arguments.small, arguments.large):
        command = [sys.executable, __file__, "--child", str(n), "--seed", str(arguments.seed)]
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append({"n": n, "peak_mib": round(peak, 1)})
    ratio = rows[1]["peak_mib"] / rows[0]["peak_mib"]
    record.show(rows)
    print(f"ratio {ratio:.3f} (bar {BAR})")
    results = {"images": IMAGES, "chunk": CHUNK, "bar": BAR, "passed": ratio <= BAR, "ratio": ratio, "rows": rows}
    record.save("memory", results, seed=arguments.seed)
    return 0 if ratio <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
