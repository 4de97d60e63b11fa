"""CIFAR-10 from scratch: a network trained with noise, then certified by all methods, for both norms, with memory.

python benchmarks/cifar10.py FOLDER [--work cifar10] [--epochs 4] [--skip 100] [--n 1000]

FOLDER holds CIFAR-10's binary files (benchmarks/fetch_cifar10.py). Every step is a command of `ancer-jax`, and printed;
networks and runs stay in the folder `--work`, where a second call continues. The literature trains for 90 epochs and
more, with larger networks; n and the searches are cut to what two CPU cores do in two hours. This shows the whole way
on real data, and is no row of the field's table. Exits with status 1 if a network does not learn, or if ACR-tilde after
memory does not rise from the best fixed theta to isotropic noise to ANCER.
"""

import argparse
import pathlib
import subprocess
import sys

import numpy as np
import record

from ancer_jax.metrics import average_certified_radius
from ancer_jax.models.checkpoints import load_network
from ancer_jax.report import load_results

NETWORK = "cifar_resnet20"
SIGMA = {"l2": 0.25, "l1": 0.5}
FACTORS = (0.5, 1.0, 2.0)  # of the training noise, for fixed theta
TRAIN = ["--batch-size", "64", "--lr", "0.1", "--drop-every", "0"]
SEARCH = ["--preset", "reference", "--iso-steps", "25", "--iso-samples", "32", "--ancer-steps", "25"]
SEARCH += ["--ancer-samples", "32", "--guard-samples", "300", "--leakage-references", "32", "--leakage-samples", "16"]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--work", default="cifar10")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--skip", type=int, default=100)
    parser.add_argument("--n", type=int, default=1000)
    options = parser.parse_args()
    commands, printed, rows, passed = [], {}, [], True
    clean = lambda text: text.replace(options.folder, "FOLDER").replace(options.work, "cifar10")

    def run(*arguments: str) -> str:
        commands.append(clean(" ".join(["ancer-jax", *arguments])))
        print(commands[-1], flush=True)
        command = [sys.executable, "-m", "ancer_jax.cli", *arguments]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    for norm, sigma in SIGMA.items():
        work = pathlib.Path(options.work, norm)
        data = ["--data", options.folder, "--norm", norm]
        settings = ["--network", NETWORK, "--sigma", str(sigma), "--epochs", str(options.epochs), *TRAIN]
        run("train", *data, *settings, "--out", str(work / "network"))
        runs = {}
        methods = [("fixed", sigma * factor) for factor in FACTORS] + [("isotropic", sigma), ("ancer", sigma)]
        for method, theta in methods:
            name = f"fixed-{theta:g}" if method == "fixed" else method
            what = ["--classifier", str(work / "network"), "--method", method, "--sigma", f"{theta:g}"]
            how = ["--skip", str(options.skip), "--n", str(options.n), *([] if method == "fixed" else SEARCH)]
            run("certify", *data, *what, *how, "--out", str(work / name))
            runs[name] = load_results(work / name)
        shown = ["--data", options.folder, "--out", str(work / "report")]
        printed[norm] = clean(run("report", *(str(work / name) for name in runs), *shown))
        print(printed[norm], flush=True)
        accuracy = load_network(work / "network").history["test_accuracy"]
        tilde = {}
        for name, results in runs.items():
            correct, radius, proxy = results.correct, results["radius"], results["radius_proxy"]
            tilde[name] = float(average_certified_radius(proxy, correct))
            row = {"norm": norm, "run": name, "images": len(correct), "accuracy": float(correct.mean())}
            row |= {"ACR": float(average_certified_radius(radius, correct)), "ACR-tilde": tilde[name]}
            if "leakage" in results.columns:
                row |= {"leakage": float(np.nanmean(results["leakage"]))}
            rows.append(row)
        best = max(value for name, value in tilde.items() if name.startswith("fixed"))
        ordered = tilde["ancer"] > tilde["isotropic"] > best
        passed &= ordered and accuracy > 0.3
        rows.append({"norm": norm, "run": "network", "images": 10_000, "accuracy": accuracy})
    record.show(rows)
    record.save("cifar10", {"commands": commands, "rows": rows, "printed": printed, "passed": passed}, seed=0)
    print("passed" if passed else "MISSED A BAR")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
