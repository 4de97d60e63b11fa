"""l1 certificates by splitting noise, random and exact, against uniform noise, fixed and searched.

    python benchmarks/splitting.py [FOLDER] [--work splitting] [--epochs 5] [--images 50] [--theta 0.5 1.0]

Trains the small network with uniform and with splitting noise of each theta, alike (on Fashion-MNIST's idx files in
FOLDER; without it on the 2,000 bundled ones, for 20 times as many epochs), and certifies bundled test images by fixed,
isotropic and anisotropic noise: n = 10,000 draws (alpha 0.001), as many draws as the exact form of that theta has, and
all draws there are (exact); searches without and with a leakage penalty. All figures are after memory, which
data-dependent runs go through; leakage is of the 200 images that the penalty takes and, with FOLDER, of 250 others
("elsewhere"). Passes are noisy copies for an image: search, guard and certificate. Networks and runs stay in `--work`.

Bar: for every theta, exact certificates of fixed noise have a larger ACR than uniform noise with n = 10,000.
"""

import argparse
import functools
import pathlib
import subprocess
import sys

import jax
import numpy as np
import record

import ancer_jax as aj
from ancer_jax.data import select, take
from ancer_jax.leakage import leakage, make_references
from ancer_jax.metrics import average_certified_radius
from ancer_jax.models.checkpoints import load_network
from ancer_jax.runs import read_run

SAMPLES, CHUNK = 64, 640
SEED, LIMIT, RADII = 0, 0.1, (0.0, 0.25, 0.5, 1.0, 2.0)


def trained(noise: str, theta: float, options) -> aj.Classifier:
    folder = pathlib.Path(options.work, f"{noise}-{theta:g}")
    epochs = options.epochs * (1 if options.folder else 20)
    command = ["train", "--norm", "l1", "--noise", noise, "--sigma", f"{theta:g}", "--epochs", str(epochs)]
    command += ["--batch-size", "128", "--lr", "0.05", "--drop-every", "0", "--shift", "2", "--test-max", "2000"]
    command += ["--data", options.folder] if options.folder else []
    if not (folder / "network.json").exists():
        subprocess.run([sys.executable, "-m", "ancer_jax.cli", *command, "--out", str(folder)], check=True)
    return load_network(folder).classifier


@functools.partial(jax.jit, static_argnames="certificate")
def _leaks(classifier, references, images, theta, predictions, *, certificate):
    measure = functools.partial(leakage, references, classifier, certificate, num_samples=SAMPLES, chunk=CHUNK)
    return jax.lax.map(lambda one: measure(*one), (images, theta, predictions))


def leakage_elsewhere(out, classifier, config: aj.RunConfig, test, folder) -> np.ndarray:
    """Leakage of a run's thetas on images that are not among the bundled ones, of the same test set."""
    others = take(aj.load_dataset(folder), np.arange(10, 10_000, 40))
    keys = jax.random.split(jax.random.key(SEED, impl="threefry2x32"), len(others))
    how = {"num_samples": SAMPLES, "chunk": CHUNK}
    references = make_references(keys, classifier, config.certificate, others.images[:], config.theta, **how)
    run = read_run(out).columns("ids", "theta", "predictions")
    assert (run["ids"] == test.ids).all()
    arrays = test.images, run["theta"], run["predictions"]
    leaked, asked = _leaks(classifier, references, *arrays, certificate=config.certificate)
    return np.asarray(leaked) / np.maximum(asked, 1)


def measure(theta: float, options) -> list[dict]:
    test = aj.load_dataset("fashion-mnist-subset")
    test = select(test, skip=len(test) // options.images, max_images=options.images)
    whole, rows = round(510 * theta), []
    settings = [("uniform", "fixed", 10_000, 0), ("uniform", "fixed", whole, 0)]
    settings += [("splitting", "fixed", 10_000, 0), ("splitting", "fixed", whole, 0), ("splitting", "fixed", None, 0)]
    settings += [("splitting", "isotropic", None, weight) for weight in options.weights]
    settings += [
        (noise, "ancer", n, w) for noise, n in (("uniform", 10_000), ("splitting", None)) for w in options.weights
    ]
    for noise, method, n, weight in settings:
        config = aj.RunConfig(
            norm="l1", noise=noise, exact=n is None, method=method, theta=theta, seed=SEED,
            certify=aj.CertifyConfig(n=n or 10_000), isotropic=aj.IsotropicConfig(leakage_weight=weight),
            anisotropic=aj.AnisotropicConfig(leakage_weight=weight),
        )  # fmt: skip
        name = f"{method}-weight-{weight:g}" if weight else method
        out = pathlib.Path(options.work, f"run-{noise}-{name}-{n or 'exact'}-{theta:g}")
        aj.certify_dataset(trained(noise, theta, options), test, config, out=out)
        results = aj.report.load_results(out)
        passes = results.passes
        assert passes is not None
        kept = results.correct & (results["leakage"] <= LIMIT)
        acr, elsewhere = lambda column, mask, results=results: average_certified_radius(results[column], mask), {}
        if options.folder and config.data_dependent:
            leaks = leakage_elsewhere(out, trained(noise, theta, options), config, test, options.folder)
            elsewhere["mean leakage elsewhere"] = float(leaks.mean())
            kept_there = results.correct & (leaks <= LIMIT)
            elsewhere["ACR-tilde without leaky elsewhere"] = acr("radius_proxy", kept_there)
        rows.append(
            {
                "theta": theta,
                "noise": noise,
                "method": name,
                "n": "exact" if n is None else n,
                "passes": passes.forward + passes.backward,
                "seconds": results.seconds,
                "accuracy": float(results.correct.mean()),
                "ACR": acr("radius", results.correct),
                "ACR-tilde": acr("radius_proxy", results.correct),
                "ACR-tilde without leaky": acr("radius_proxy", kept),
                "ACR without leaky": acr("radius", kept),
                "mean leakage": float(np.nanmean(results["leakage"])),
            }
            | elsewhere
            | {f"at {at:g}": float((results.correct & (results["radius"] >= at)).mean()) for at in RADII}
        )
        record.show(rows[-1:])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--work", default="splitting")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 5.0], help="of leakage in the searches")
    parser.add_argument("--theta", type=float, nargs="+", default=[0.5, 1.0])
    options = parser.parse_args()
    rows = [row for theta in options.theta for row in measure(theta, options)]
    record.save("splitting", rows, seed=SEED)
    acr = {(r["theta"], r["noise"], r["method"], r["n"]): r["ACR"] for r in rows}
    ahead = [acr[t, "splitting", "fixed", "exact"] > acr[t, "uniform", "fixed", 10_000] for t in options.theta]
    return 0 if all(ahead) else 1


if __name__ == "__main__":
    sys.exit(main())
