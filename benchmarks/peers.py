"""Side by side with what else there is: the packages of the papers (ancer-python, ddsmoothing-python) and ART.

    python benchmarks/peers.py [--cifar10 FOLDER] [--work peers] [--reference-python PYTHON] [--small]

Both networks of the reference, ResNet-18 (l2) and WRN-40-2 (l1), are trained by PyTorch with its code, and converted.
Then, in turn, in processes of their own, on JAX's device, on the same images, with the same n, steps, draws, rows at a
time and the same precision (float32; on a GPU with TF32 products):

- certification with fixed noise: noisy forward passes a second; ART's too (l2). The votes for all classes must agree
  within Monte Carlo error. Ours has files, checks and the host's certificates inside its seconds;
- isotropic and anisotropic search: noisy forward and backward passes a second; the reference's anisotropic search as
  released, which computes gradients of the parameters too, and with these frozen, which is what we are judged by. The
  thetas of both are certified by the same draws, and their leakage is measured; the median of the images' ratios of
  proxy radii, ours to theirs, must be 0.95 at least. Its networks get a softmax where they lack it, without which its
  search means nothing;
- seconds from the start of a process to the first certificate, compilation and all; peak memory of the process;
- whole: what the papers do for an image (900 + 100 steps of 100 draws, n = 100,000) against the fast search and
  `--sampling sequential` at the radii of the usual table, with memory, leakage not measured (the reference has
  neither): seconds for an image, start and compilation included. Its thetas are cut off at our bound. Sizes of regions
  are compared as above, with 20,000 draws that are in nobody's seconds: sequential sampling decides the radii of a
  table, and no more.

The reference needs Python 3.11, and gets a virtual environment in `--work` unless `--reference-python` names one.
Without `--cifar10`: the bundled Fashion-MNIST images, padded to 32 x 32 x 3. Exit status 1 if votes or thetas
disagree, or, but for --small, if a rate is below the reference's (on a GPU: four times it) or "whole" is not ten
times as fast.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial

import jax
import numpy as np
import record
import scipy.stats

import ancer_jax as aj
from ancer_jax.bounds import clopper_pearson_lower
from ancer_jax.regions import geometric_mean

HERE = pathlib.Path(__file__).parent
NETWORKS = {"ancer_resnet18": ("l2", 0.25), "wrn_40_2": ("l1", 0.5)}
STEPS = {"ancer_resnet18": 20, "wrn_40_2": 6}  # of a search on a CPU: some seconds
WHOLE = {"ancer_resnet18": 8, "wrn_40_2": 1}  # images; one takes the reference 2 and 20 minutes on two cores
NEEDS = ["torch==2.13.0", "numpy<2", "scipy<1.12", "ancer-python==1.0.0", "ddsmoothing-python==1.0.0"]
NEEDS += ["adversarial-robustness-toolbox==1.20.1"]
SEED, ALPHA, N0 = 0, 1e-3, 100
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}  # of the workers


class Worker:
    """A process that does what it is told, one thing after another."""

    def __init__(self, *command, **environment):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(list(map(str, command)), env=ENVIRONMENT | environment, **pipes)

    def __call__(self, do, **options):
        assert self.process.stdin and self.process.stdout
        print(json.dumps({"do": do} | options), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the worker has stopped: {self.process.args}")
        return json.loads(answer)

    def close(self):
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def in_turn(rounds, **tasks):
    """Median seconds and last answer of each task; each once before, for compilation, then in turn."""
    answers, seconds = {name: task() for name, task in tasks.items()}, {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            answers[name] = task()
            seconds[name].append(answers[name]["seconds"])
    return {name: float(np.median(all_of)) for name, all_of in seconds.items()}, answers, seconds


def load_data(options):
    """Training images and labels, uint8 [n, 3, 32, 32], and test images, float32."""
    name = options.cifar10 or "fashion-mnist-subset"
    train, test = aj.load_dataset(name, split="train"), aj.load_dataset(name)
    pixels = [np.asarray(images[:]) for images in (train.images, test.images)]
    if not options.cifar10:
        pixels = [np.pad(p, ((0, 0), (2, 2), (2, 2), (0, 0))).repeat(3, axis=-1) for p in pixels]
    train_pixels, test_pixels = (np.ascontiguousarray(p.transpose(0, 3, 1, 2)) for p in pixels)
    count = options.train_images or len(train_pixels)
    return np.round(train_pixels[:count] * 255).astype(np.uint8), train.labels[:count], test_pixels.astype(np.float32)


def prepare(options, reference) -> dict[str, dict]:
    """Weights of both networks and the test images, as files."""
    work = pathlib.Path(options.work)
    pixels, labels, test = load_data(options)
    count = options.images + options.references
    np.save(work / "images.npy", test[:: max(1, len(test) // count)][:count])
    np.savez(work / "train.npz", images=pixels, labels=labels)
    found = {}
    for network in options.networks:
        norm, scale = NETWORKS[network]
        trained = f"{options.epochs}-epochs-of-{len(labels)}-{'cifar10' if options.cifar10 else 'bundled'}"
        weights = work / f"{network}-{trained}.npz"
        if not weights.exists():
            settings = {"noise": norm, "scale": scale, "epochs": options.epochs, "seed": SEED}
            data = str(work / "train.npz")
            seconds = reference("train", network=network, data=data, out=str(weights), **settings)["seconds"]
            print(f"{network}: trained in {seconds:.0f} s", flush=True)
        found[network] = {"network": network, "weights": str(weights), "images": str(work / "images.npy"), "norm": norm}
    return found


def measure(options, load, start_ours, start_reference, results):
    """Fills `results`, thing after thing, so that what was measured outlives what fails later."""
    work, network = pathlib.Path(options.work), load["network"]
    norm, theta = NETWORKS[network]
    rows, scale = list(range(options.images)), {"theta": theta, "seed": SEED}
    ours, theirs = start_ours(), start_reference()
    ours("load", **load)
    results |= {"network": network, "norm": norm, "theta": theta, "reference": theirs("load", **load)}

    def add(name, passes, times, raw, **more):
        rates = {who: passes / seconds for who, seconds in times.items()}
        results[name] = {"passes": passes, "rates": rates, "seconds": raw} | more
        print(f"{network}, {name}: " + ", ".join(f"{who} {rate:,.0f}/s" for who, rate in rates.items()), flush=True)

    for batch in options.batch:
        task = {"rows": rows, "n": options.n, "n0": N0, "alpha": ALPHA, "batch": batch} | scale
        tasks = {"ours": partial(ours, "certify", **task), "reference": partial(theirs, "certify", **task)}
        art = start_reference() if norm == "l2" else None  # of its own: it holds all copies of an image at once
        if art:
            art("load", **load)
            tasks["ART"] = partial(art, "art", **task)
        times, answers, raw = in_turn(options.rounds, **tasks)
        votes = ours("votes", rows=rows, n=options.n, batch=batch, **scale)["votes"]
        name, passes = f"certification, {batch} rows at a time", len(rows) * (options.n + N0)
        add(name, passes, times, raw, **compare_votes(votes, answers, theta, options.n))
        if art:
            results["memory"] = {"ART": art("memory")}
            art.close()

    # Searches at equal work; the second starts from our first one's thetas.
    settings = {
        "rows": rows,
        "samples": options.samples,
        "steps": results["settings"]["steps"],
        "lr": 0.04,
        "seed": SEED,
    }
    file = lambda name: str(work / f"{network}-{name}.npy")
    tasks = {
        "ours": partial(ours, "isotropic", start=theta, **settings, out=file("isotropic-ours")),
        "reference": partial(theirs, "isotropic", start=theta, **settings, out=file("isotropic-reference")),
    }
    times, _, raw = in_turn(options.rounds, **tasks)
    passes = len(rows) * settings["steps"] * options.samples
    add("isotropic search", passes, times, raw, **compare_thetas(ours, file, "isotropic", options, theta))
    np.save(file("start"), np.minimum(np.load(file("isotropic-ours")), 4 * theta).astype(np.float32))
    settings["start"], released = file("start"), file("anisotropic-released")
    tasks = {
        "ours": partial(ours, "anisotropic", **settings, out=file("anisotropic-ours")),
        "reference": partial(theirs, "anisotropic", **settings, out=file("anisotropic-reference"), frozen=True),
        "reference as released": partial(theirs, "anisotropic", **settings, out=released, frozen=False),
    }
    times, _, raw = in_turn(options.rounds, **tasks)
    add("anisotropic search", passes, times, raw, **compare_thetas(ours, file, "anisotropic", options, theta))
    results["memory"] = {"ours": ours("memory"), "reference": theirs("memory")} | results.get("memory", {})
    ours.close(), theirs.close()

    # From the start of a process.
    firsts = {"ours": [], "ours, programs kept": [], "reference": []}
    one = {"rows": [0], "n": 1_000, "n0": N0, "alpha": ALPHA, "batch": 200} | scale
    with tempfile.TemporaryDirectory() as kept:
        keep = {"JAX_COMPILATION_CACHE_DIR": kept, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        start_kept = partial(start_ours, **keep)
        for _ in range(options.rounds + 1):
            for who, start in zip(firsts, (start_ours, start_kept, start_reference), strict=True):
                began = time.perf_counter()
                worker = start()
                worker("load", **load), worker("certify", **one)
                firsts[who].append(time.perf_counter() - began)
                worker.close()
    firsts["ours, programs kept"] = firsts["ours, programs kept"][1:]
    results["first certificate"] = {who: float(np.median(times)) for who, times in firsts.items()}
    shown = ", ".join(f"{who} {seconds:.1f}" for who, seconds in results["first certificate"].items())
    print(f"{network}, seconds to the first certificate: {shown}", flush=True)


def compare_votes(votes, answers, theta, n):
    """Whether votes have one law: the smallest p-value of all images, times their number (Bonferroni).

    `votes` are ours [m, K] of the draws that our answers are of; the reference's and ART's are compared with them.
    """
    ours, theirs = answers["ours"], np.array(answers["reference"]["votes"])
    votes, p_values = np.array(votes), []
    for row, (a, b) in enumerate(zip(votes, theirs, strict=True)):
        assert ours["predict"][row] < 0 or ours["count"][row] == a[ours["predict"][row]], "not the same draws"
        often = a + b >= 20
        table = np.array([[*v[often], v[~often].sum()] for v in (a, b)])
        table = table[:, table.sum(axis=0) > 0]
        p_values.append(scipy.stats.chi2_contingency(table).pvalue if table.shape[1] > 1 else 1.0)
    lower = clopper_pearson_lower(np.arange(n + 1), n, ALPHA)
    art = answers.get("ART", {"classes": [], "radii": []})
    for a, label, radius in zip(votes, art["classes"], art["radii"], strict=False):
        if label >= 0:  # its votes for the class, from its radius
            count = int(abs(lower - scipy.stats.norm.cdf(radius / theta)).argmin())
            table = np.array([[a[label], n - a[label]], [count, n - count]])
            p_values.append(scipy.stats.chi2_contingency(table).pvalue if table[:, 1].any() else 1.0)
    answered = {"ours": ours["predict"], "reference": answers["reference"]["classes"]}
    return {
        "votes": {"ours": votes.tolist(), "reference": theirs.tolist()},
        "answers of ART": art["classes"],
        "certified": {who: sum(label >= 0 for label in labels) for who, labels in answered.items()},
        "p_value": min(1.0, min(p_values) * len(p_values)),
    }


def compare_thetas(ours, file, kind, options, start, rows=None, n=None):
    """Radii, proxy radii and leakage of the thetas of both by the same draws."""
    how = {"rows": rows or list(range(options.images)), "n": n or options.n, "n0": N0, "alpha": ALPHA, "seed": SEED}
    how |= {
        "references": list(range(options.images, options.images + options.references)),
        "start": start,
        "batch": 100,
    }
    sizes = {who: ours("sizes", theta=file(f"{kind}-{who}"), **how) for who in ("ours", "reference")}
    return {name: {who: found[name] for who, found in sizes.items()} for name in ("radius", "proxy", "leakage")}


def whole(options, load, images, start_ours, start_reference, results):
    """All that an image costs, processes and compilation included, and what is certified for it."""
    (norm, theta), rows = NETWORKS[load["network"]], list(range(images))
    file = lambda name: str(pathlib.Path(options.work) / f"{load['network']}-{name}.npy")
    steps, n = (90, 10_000) if options.small else (900, 100_000)
    began = time.perf_counter()
    theirs = start_reference()
    theirs("load", **load)
    search = {"rows": rows, "samples": 100, "lr": 0.04, "seed": SEED}
    theirs("isotropic", start=theta, steps=steps, out=file("whole-isotropic"), **search)
    # Their scripts bound nothing; the bound of our searches keeps both thetas in one range.
    isotropic = np.load(file("whole-isotropic"))
    np.save(file("whole-start"), np.clip(isotropic, theta / 100, 4 * theta))
    theirs(
        "anisotropic", start=file("whole-start"), steps=steps // 9, out=file("whole-reference"), frozen=False, **search
    )
    anisotropic = np.load(file("whole-reference"))
    np.save(file("whole-reference"), np.minimum(anisotropic, 4 * theta))
    law = {"n0": N0, "n": n, "alpha": ALPHA, "seed": SEED}
    answer = theirs("certify", rows=rows, theta=file("whole-reference"), batch=200, **law)
    seconds = {"reference": (time.perf_counter() - began) / len(rows)}
    theirs.close()

    began = time.perf_counter()
    ours = start_ours()
    ours("load", **load)
    found = ours("whole", rows=rows, theta=theta, out=file("whole-ours"), **law)
    seconds["ours"] = (time.perf_counter() - began) / len(rows)
    # Once more in the same process: what it costs when nothing has to be started and compiled.
    again = ours("whole", rows=rows, theta=theta, out=file("whole-again"), **law)["seconds"]
    seconds["ours, compiled"] = again / len(rows)
    # The region of a sequential run is as large as its decisions need: sizes are compared by other draws.
    sizes = compare_thetas(ours, file, "whole", options, theta, rows=rows, n=n // 5)
    ours.close()
    proxies = [
        gap * geometric_mean(one) for gap, one in zip(answer["gaps"], np.load(file("whole-reference")), strict=True)
    ]
    decided = {"ours": np.array(found["radius_proxy"]), "reference": np.array(proxies)}
    results |= {
        "network": load["network"],
        "images": len(rows),
        "seconds": seconds,
        "times faster": seconds["reference"] / seconds["ours"],
        "draws": {"ours": found["draws"], "reference": N0 + n},
        **sizes,
        "proxy radius at least": {
            str(at): {who: int(((d >= at) & (d > 0)).sum()) for who, d in decided.items()} for at in record.RADII[norm]
        },
        "theta of the reference cut off": {
            "isotropic": float((isotropic > 4 * theta).mean()),
            "anisotropic": float((anisotropic > 4 * theta).mean()),
        },
    }
    short = ", ".join(f"{who} {value:.1f}" for who, value in seconds.items())
    print(f"{load['network']}, whole, {len(rows)} images, seconds for each: {short}", flush=True)


def not_smaller(found) -> bool:
    """Whether the median of the images' ratios of proxy radii, ours to theirs, is 0.95 at least."""
    pairs = np.array([found["proxy"][who] for who in ("ours", "reference")])
    ours, theirs = pairs[:, pairs.any(axis=0)]  # images that one of them certifies; without any the median is NaN
    return bool(np.median(ours / np.maximum(theirs, 1e-9)) >= 0.95)


def verdict(network, same, fast, small) -> bool:
    speed = "speed not judged" if small else "as fast" if fast else "SLOWER THAN THE BAR"
    print(f"{network}: {'agrees' if same else 'DISAGREES'}, {speed}", flush=True)
    return same and (small or fast)


def passed(results, bar, small) -> bool:
    """Whether votes and thetas agree, and, but for a rehearsal, whether ours is `bar` times as fast."""
    certifications = [found for name, found in results.items() if name.startswith("certification")]
    searches = [results["isotropic search"], results["anisotropic search"]]
    same = all(found["p_value"] >= 1e-3 for found in certifications) and all(map(not_smaller, searches))
    best = {who: max(found["rates"][who] for found in certifications) for who in ("ours", "reference")}
    fast = all(rate["ours"] >= bar * rate["reference"] for rate in [best, *(found["rates"] for found in searches)])
    return verdict(results["network"], same, fast, small)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10")
    parser.add_argument("--work", default="peers")
    parser.add_argument("--reference-python")
    parser.add_argument("--small", action="store_true", help="a rehearsal of minutes; nothing is judged but agreement")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--train-images", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--images", type=int)
    parser.add_argument("--references", type=int, help="images for the measure of leakage, behind those")
    parser.add_argument("--n", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--samples", type=int, default=50, help="draws of a step of a search")
    parser.add_argument("--batch", type=int, nargs="+", help="rows at a time in certification")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--whole", type=int, help="images that go through everything (8 and 1; --small: none)")
    options = parser.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # this process leaves a GPU's memory to the workers
    on_cpu = jax.default_backend() == "cpu"
    defaults = {"n": (500, 1_000 if on_cpu else 100_000), "steps": (3, None if on_cpu else 50), "rounds": (1, 5)}
    defaults |= {"batch": ([200], [200] if on_cpu else [200, 1_000, 4_000])}
    defaults |= {"images": (4, 8), "references": (20, 100)}
    defaults |= {"epochs": (2, 3 if options.cifar10 else 20), "train_images": (300, 10_000)}
    for name, (small, usual) in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, small if options.small else usual)
    work = pathlib.Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    python = options.reference_python or work / "reference" / "bin" / "python"
    if not options.reference_python and not python.exists():
        if not shutil.which("python3.11"):
            parser.error("the reference packages need Python 3.11, and there is no python3.11: see --reference-python")
        subprocess.run(["python3.11", "-m", "venv", work / "reference"], check=True)
        print(f"installing PyTorch and the reference packages into {work / 'reference'}", flush=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *NEEDS], check=True)
    start_reference = lambda: Worker(python, HERE / "peers_torch.py", "cpu" if on_cpu else "cuda")
    start_ours = lambda **environment: Worker(sys.executable, HERE / "peers_ours.py", **environment)
    with contextlib.closing(start_reference()) as reference:
        networks = prepare(options, reference)
    settings, good = {k: v for k, v in vars(options).items() if k not in ("work", "reference_python", "cifar10")}, True
    settings["data"] = "CIFAR-10" if options.cifar10 else "bundled"
    for network, load in networks.items():
        settings["steps"] = options.steps or STEPS[network]
        name, results = f"{'small-' * options.small}{network}", {"settings": settings}
        try:
            measure(options, load, start_ours, start_reference, results)
        finally:
            record.save(f"peers-{name}", results, seed=SEED)
        good &= passed(results, 1 if on_cpu else 4, options.small)
        images = options.whole if options.whole is not None else 0 if options.small else WHOLE[network]
        if images:
            results = {"settings": settings}
            whole(options, load, images, start_ours, start_reference, results)
            record.save(f"whole-{name}", results, seed=SEED)
            good &= verdict(f"{network}, whole", not_smaller(results), results["times faster"] >= 10, options.small)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
