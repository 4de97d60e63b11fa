"""What a search for theta gets for its passes: the fast preset against the schedule of the papers' code.

    python benchmarks/search.py [--images 16] [--cifar10 FOLDER --work cifar10 --cifar-images 4 --norm l2 l1]

For l2 and l1, on bundled test images and on CIFAR-10 (with the networks of benchmarks/cifar10.py): isotropic, then
anisotropic search, by `IsotropicConfig()` and `AnisotropicConfig()`, by both with fewer and with more steps and draws,
and by `.reference()` of both, whole (900 + 100 steps of 100 draws) and with a tenth of the steps. Every theta is then
certified with n = 4,000 draws of its own, and its leakage measured on 100 images. A pass is one noisy copy, forward and
backward. No guard, no leakage penalty.

Bar: the mean proxy radius of the whole reference schedule, with at most a tenth of its 100,000 passes (fast preset).
Writes the curves to results/search.png.
"""

import argparse
import functools
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import record

import ancer_jax as aj
from ancer_jax.certificates import CERTIFICATES
from ancer_jax.certification import certification
from ancer_jax.data import select
from ancer_jax.leakage import leakage, make_references
from ancer_jax.models.checkpoints import load_network

SEED, CERTIFY, TOGETHER = 0, aj.CertifyConfig(n=4_000), 4
LEAKAGE, LIMIT = aj.LeakageConfig(num_references=100), 0.1
FAST = [  # isotropic steps and draws, anisotropic steps and draws
    (10, 16, 15, 16),
    (20, 32, 25, 32),
    (20, 32, 50, 32),
    (20, 32, 100, 32),
    (20, 32, 100, 64),
    (40, 64, 100, 128),
]


def schedules(theta_max):
    iso, an = aj.IsotropicConfig, aj.AnisotropicConfig
    bound = {"theta_max": theta_max}
    for a, b, c, d in FAST:
        preset = (a, b, c, d) == (iso().steps, iso().num_samples, an().steps, an().num_samples)
        yield "fast", preset, iso(steps=a, num_samples=b, **bound), an(steps=c, num_samples=d, **bound)
    yield "reference", False, iso.reference(steps=90, **bound), an.reference(steps=10, **bound)
    yield "reference", True, iso.reference(**bound), an.reference(**bound)


def measure(case, classifier, norm, start, dataset, others):
    law = CERTIFICATES[norm]
    root = jax.random.key(SEED, impl="threefry2x32")
    example_keys = lambda ids: jax.vmap(lambda i: jax.random.fold_in(root, i))(jnp.asarray(ids, jnp.uint32))
    keys, images = example_keys(dataset.ids), jnp.asarray(dataset.images[:])
    how = {"num_samples": LEAKAGE.num_samples, "chunk": 100}
    start = jnp.float32(start)
    references = make_references(example_keys(others.ids), classifier, law, others.images[:], start, **how)

    @jax.jit
    def certify(classifier, keys, images, theta, references):
        def one(arguments):
            key, x, theta = arguments
            selected, count = aj.count_votes(key, classifier, law, x, theta, config=CERTIFY, chunk=100)
            return selected, count, leakage(references, classifier, law, x, theta, selected, **how)

        return jax.lax.map(one, (keys, images, theta))

    rows = []
    for name, preset, isotropic, anisotropic in schedules(4 * float(start)):

        def search(classifier, arguments, isotropic=isotropic, anisotropic=anisotropic):
            key, x = arguments
            first, _ = aj.optimize_isotropic(key, classifier, law, x, start, config=isotropic)
            second, _ = aj.optimize_anisotropic(key, classifier, law, x, first, config=anisotropic)
            return jnp.broadcast_to(first, x.shape), second

        @jax.jit
        def together(classifier, images, search=search):
            return jax.lax.map(functools.partial(search, classifier), images, batch_size=TOGETHER)

        compiled = together.lower(classifier, (keys, images)).compile()
        began = time.perf_counter()
        thetas = jax.block_until_ready(compiled(classifier, (keys, images)))
        seconds = (time.perf_counter() - began) / len(images)
        passes = [c.steps * c.num_samples for c in (isotropic, anisotropic)]
        row = {"case": case, "schedule": name, "preset": preset, "images": len(images)}
        row |= {"passes": sum(passes), "seconds an image": seconds}
        for stage, theta in zip(("isotropic", "anisotropic"), thetas, strict=True):
            selected, count, (leaked, asked) = jax.tree.map(
                np.asarray, certify(classifier, keys, images, theta, references)
            )
            found = certification(selected, count, certificate=law, config=CERTIFY)
            regions = [aj.Region(x, t, g, law.norm) for x, t, g in zip(images, theta, found.gap, strict=True)]
            right, leaks = found.prediction == dataset.labels, leaked / np.maximum(asked, 1)
            proxies = np.array([aj.proxy_radius(r) for r in regions])
            row[f"{stage} passes"] = passes[0] if stage == "isotropic" else sum(passes)
            row[f"{stage} proxy radius"] = float(proxies.mean())
            row[f"{stage} radius"] = float(np.mean([aj.radius(r) for r in regions]))
            row[f"{stage} ACR-tilde"] = float((proxies * right).mean())
            row[f"{stage} leakage"] = float(leaks.mean())
            row[f"{stage} ACR-tilde without leaky"] = float((proxies * right * (leaks <= LIMIT)).mean())
        rows.append(row)
        print(f"{case}: {name}{' (preset)' * preset}, {sum(passes):,} passes, {seconds:.1f} s an image")
        print("\n".join(f"  {key}: {value:.3f}" for key, value in row.items() if key.startswith("a") or "iso" in key))
    return rows


def draw(rows, path):
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure = Figure(figsize=(4 * len(cases), 3.4), layout="constrained")
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        for stage, style in (("isotropic", "o--"), ("anisotropic", "s-")):
            for name, color in (("fast", "C0"), ("reference", "C1")):
                some = [r for r in rows if r["case"] == case and r["schedule"] == name]
                x, y = ([r[f"{stage} {what}"] for r in some] for what in ("passes", "proxy radius"))
                axes.plot(x, y, style, color=color, label=f"{name}, {stage}")
        axes.set(xscale="log", title=case, xlabel="passes for an image, forward and backward", ylim=(0, None))
    figure.axes[0].set_ylabel("mean certified proxy radius")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=16, help="bundled ones; 0: none")
    parser.add_argument("--cifar10")
    parser.add_argument("--work", default="cifar10")
    parser.add_argument("--cifar-images", type=int, default=4)
    parser.add_argument("--norm", nargs="+", default=["l2", "l1"])
    options = parser.parse_args()
    some = lambda whole, count: select(whole, skip=len(whole) // count, max_images=count)
    rows = []

    def add(case, norm, network, images, count):
        rows.extend(
            measure(f"{case}, {norm}", network.classifier, norm, network.theta, some(images, count), some(images, 100))
        )
        draw(rows, record.RESULTS / "search.png")
        record.save("search", rows, seed=SEED)

    for norm in options.norm if options.images else ():
        add("bundled", norm, aj.load_bundled(norm), aj.load_dataset("fashion-mnist-subset"), options.images)
    for norm in options.norm if options.cifar10 else ():
        network = load_network(min(pathlib.Path(options.work).glob(f"{norm}*/network")))
        add("CIFAR-10", norm, network, aj.load_dataset(options.cifar10), options.cifar_images)
    presets = {(r["case"], r["schedule"]): r for r in rows if r["preset"]}
    ahead = [
        presets[case, "fast"]["anisotropic proxy radius"] >= presets[case, "reference"]["anisotropic proxy radius"]
        and presets[case, "fast"]["passes"] <= presets[case, "reference"]["passes"] / 10
        for case in dict.fromkeys(r["case"] for r in rows)
    ]
    return 0 if all(ahead) else 1


if __name__ == "__main__":
    sys.exit(main())
