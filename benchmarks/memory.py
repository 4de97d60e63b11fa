"""Memory must not grow with the number of draws: the peak memory of certifying ten bundled images, n = 1e3 against 1e6.

    python benchmarks/memory.py                    # 8 minutes on two CPU cores, nearly all of it n = 1e6
    python benchmarks/memory.py --n 1000 100000    # one minute
    python benchmarks/memory.py --small            # n = 100 and 200

Each run is `certify_dataset` (SmallCNN, batch 10, chunk 100) in a new process, which reports its own `ru_maxrss`
(Python, JAX and compilation included). The two must agree within 5 %.

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


def child(n: int, seed: int) -> None:
    """Certify, then print the peak memory of this process in MiB (the unit of ru_maxrss depends on the system)."""
    from ancer_jax import CertifyConfig, Execution, RunConfig, certify_dataset, load_bundled, load_dataset
    from ancer_jax.data import select

    dataset = select(load_dataset("fashion-mnist-subset"), skip=50, max_images=IMAGES)
    config = RunConfig(certify=CertifyConfig(n=n), seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        execution = Execution(batch_size=IMAGES, chunk=CHUNK, devices=1)
        certify_dataset(load_bundled("l2").classifier, dataset, config, out=f"{folder}/run", execution=execution)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak / (2**20 if sys.platform == "darwin" else 2**10))


def main() -> int:
    parser = record.parser(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, nargs=2, metavar=("FEW", "MANY"), help="the two numbers of draws")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.seed)
        return 0
    rows = []
    for n in options.n or ((100, 200) if options.small else (1000, 1_000_000)):
        command = [sys.executable, __file__, "--child", str(n), "--seed", str(options.seed)]
        peak = float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        rows.append({"n": n, "peak_mib": round(peak, 1)})
    ratio = rows[1]["peak_mib"] / rows[0]["peak_mib"]
    record.show(rows)
    print(f"ratio {ratio:.3f} (bar {BAR})")
    stored = {"images": IMAGES, "chunk": CHUNK, "bar": BAR, "passed": ratio <= BAR, "ratio": ratio, "rows": rows}
    record.save("memory", stored, seed=options.seed, small=options.small)
    return 0 if ratio <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
