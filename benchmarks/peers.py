"""Side by side with what else there is: the packages of the papers (ancer-python, ddsmoothing-python) and ART.

    python benchmarks/peers.py [--cifar10 FOLDER] [--work peers] [--reference-python PYTHON] [--small]

Both networks of the reference, ResNet-18 (l2) and WRN-40-2 (l1), are trained by PyTorch with its code, and converted.
Then, in turn, in processes of their own, on the same images, with the same n, steps, draws, rows at a time and float32:

- certification with fixed noise: noisy forward passes a second; ART's too; counts must agree within Monte Carlo error;
- isotropic and anisotropic search: noisy forward and backward passes a second; the reference's anisotropic search as
  released, which computes gradients of the parameters too, and with these frozen; the thetas of both are certified
  by the same draws, and ours must be as good within two standard errors;
- seconds from the start of a process to the first certificate, compilation and all; peak memory of the process;
- whole: everything the papers do for an image (900 + 100 steps of 100 draws, n = 100,000), against our defaults with
  `--sampling sequential` at the radii of the usual table: seconds for an image, and what both certify.

The reference needs Python 3.11, and gets a virtual environment in `--work` unless `--reference-python` names one.
Without `--cifar10`: the bundled Fashion-MNIST images, padded to 32 x 32 x 3. Exit status 1 if counts or thetas
disagree, or, but for --small, if a rate is below the reference's (on a GPU: four times it) or "whole" is not ten
times as fast.
"""

import argparse
import contextlib
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
import record
import scipy.stats

HERE = pathlib.Path(__file__).parent
NETWORKS = {"ancer_resnet18": ("l2", 0.25), "wrn_40_2": ("l1", 0.5)}
NEEDS = ["torch==2.13.0", "numpy<2", "scipy<1.12", "ancer-python==1.0.0", "ddsmoothing-python==1.0.0"]
NEEDS += ["adversarial-robustness-toolbox==1.20.1"]
SEED, ALPHA, N0 = 0, 1e-3, 100
ENVIRONMENT = dict(os.environ)  # of the workers


class Ours:
    """The worker: what is asked for on stdin, by one JSON line, in this library."""

    def load(self, network, weights, images, norm):
        import ancer_jax as aj
        from ancer_jax.models import convert_torch, make_network

        aj.parallel.use_all_cores()
        self.norm, self.mesh = norm, aj.parallel.device_mesh()
        self.images = np.load(images).transpose(0, 2, 3, 1)
        flax = make_network(network)
        self.classifier = aj.from_linen(flax, convert_torch(flax, np.load(weights), (32, 32, 3)), num_classes=10)
        self.searches = {}

    def _run(self, rows, folder, batch, **config):
        import ancer_jax as aj

        data = aj.data.Dataset("peers", np.arange(len(rows)), self.images[rows], np.zeros(len(rows), np.int64), 10)
        config = aj.RunConfig(norm=self.norm, seed=SEED, **config)
        aj.certify_dataset(self.classifier, data, config, out=folder, execution=aj.Execution(chunk=batch))
        return aj.report.load_results(folder)

    def certify(self, rows, theta, n0, n, alpha, batch, seed):
        import ancer_jax as aj

        with tempfile.TemporaryDirectory() as folder:
            found = self._run(rows, folder, batch, theta=theta, certify=aj.CertifyConfig(n0, n, alpha))
        return {"classes": found["predict"].astype(int).tolist(), "counts": found["count"].astype(int).tolist()}

    def whole(self, rows, theta, n, batch, out):
        import ancer_jax as aj

        config = {"method": "ancer", "theta": theta, "certify": aj.CertifyConfig(N0, n, ALPHA), "leakage": None}
        sampling = aj.SequentialConfig(radii=record.RADII[self.norm])
        with tempfile.TemporaryDirectory() as folder:
            found = self._run(rows, folder, batch, **config, sampling=sampling)
            draws = float(found["draws"].mean())
            np.save(out, aj.runs.read_run(folder).columns("theta")["theta"].transpose(0, 3, 1, 2))
        return {"radius_proxy": found["radius_proxy"].tolist(), "draws": draws}

    def _search(self, kind, rows, start, config, out):
        import jax

        import ancer_jax as aj

        optimize = {"isotropic": aj.optimize_isotropic, "anisotropic": aj.optimize_anisotropic}[kind]
        law = aj.GaussianL2() if self.norm == "l2" else aj.UniformL1()
        one = lambda key, x, theta: optimize(key, self.classifier, law, x, theta, config=config)[0]
        search = self.searches.setdefault(config, jax.jit(jax.vmap(one)))
        keys = jax.random.split(jax.random.key(SEED, impl="threefry2x32"), len(rows))
        theta = search(*aj.parallel.split_rows((keys, self.images[rows], start), self.mesh))
        theta = np.asarray(theta)
        np.save(out, theta if theta.ndim == 1 else theta.transpose(0, 3, 1, 2))

    def isotropic(self, rows, start, steps, samples, lr, seed, out):
        import ancer_jax as aj

        config = aj.IsotropicConfig.reference(
            steps=steps, num_samples=samples, learning_rate=lr, theta_max=float("inf")
        )
        self._search("isotropic", rows, np.full(len(rows), start, np.float32), config, out)

    def anisotropic(self, rows, start, steps, samples, lr, seed, out):
        import ancer_jax as aj

        settings = {"steps": steps, "num_samples": samples, "learning_rate": lr, "theta_max": float("inf")}
        self._search("anisotropic", rows, np.load(start), aj.AnisotropicConfig.reference(**settings), out)

    def radii(self, rows, theta, n, batch):
        """Radii and proxy radii of thetas from a file, certified by draws that do not depend on where it came from."""
        import jax

        import ancer_jax as aj
        from ancer_jax.certification import certification

        law, theta = aj.GaussianL2() if self.norm == "l2" else aj.UniformL1(), np.load(theta)
        theta = theta.reshape(-1, 1, 1, 1) if theta.ndim == 1 else theta.transpose(0, 2, 3, 1)
        images, config = self.images[rows], aj.CertifyConfig(N0, n, ALPHA)
        theta = np.broadcast_to(theta, images.shape)
        count = lambda key, x, theta: aj.count_votes(key, self.classifier, law, x, theta, config=config, chunk=batch)
        keys = jax.random.split(jax.random.key(SEED + 1, impl="threefry2x32"), len(rows))
        votes = jax.jit(jax.vmap(count))(*aj.parallel.split_rows((keys, images, theta), self.mesh))
        found = certification(*map(np.asarray, votes), certificate=law, config=config)
        regions = [aj.Region(*one, law.norm) for one in zip(images, theta, found.gap, strict=True)]
        return {"radius": [float(aj.radius(r)) for r in regions], "proxy": [float(aj.proxy_radius(r)) for r in regions]}

    def memory(self):
        import jax

        statistics = jax.local_devices()[0].memory_stats() or {}
        device = statistics["peak_bytes_in_use"] / 2**20 if "peak_bytes_in_use" in statistics else None
        return {"host_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "device_mib": device}


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


def serve():
    ours, say = Ours(), sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        options = json.loads(line)
        began = time.perf_counter()
        found = getattr(ours, options.pop("do"))(**options) or {}
        print(json.dumps({"seconds": time.perf_counter() - began} | found), file=say, flush=True)


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
    import ancer_jax as aj

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
    np.save(work / "images.npy", test[:: max(1, len(test) // options.images)][: options.images])
    np.savez(work / "train.npz", images=pixels, labels=labels)
    found = {}
    for network in options.networks:
        norm, scale = NETWORKS[network]
        weights = work / f"{network}.npz"
        if not weights.exists():
            settings = {"noise": norm, "scale": scale, "epochs": options.epochs, "seed": SEED}
            data = str(work / "train.npz")
            seconds = reference("train", network=network, data=data, out=str(weights), **settings)["seconds"]
            print(f"{network}: trained in {seconds:.0f} s", flush=True)
        found[network] = {"network": network, "weights": str(weights), "images": str(work / "images.npy"), "norm": norm}
    return found


def measure(options, load, start_ours, start_reference):
    work, network = pathlib.Path(options.work), load["network"]
    norm, theta = NETWORKS[network]
    rows, few = list(range(options.images)), list(range(options.few))
    ours, theirs = start_ours(), start_reference()
    ours("load", **load), theirs("load", **load)
    law = {"n0": N0, "alpha": ALPHA, "theta": theta, "seed": SEED, "batch": options.batch}
    results = {"network": network, "norm": norm, "theta": theta}

    def add(name, passes, times, raw, **more):
        rates = {who: passes / seconds for who, seconds in times.items()}
        results[name] = {"passes": passes, "rates": rates, "seconds": raw} | more
        print(f"{network}, {name}: " + ", ".join(f"{who} {rate:,.0f}/s" for who, rate in rates.items()), flush=True)

    # Certification.
    task = {"rows": few, "n": options.n, **law}
    tasks = {"ours": lambda: ours("certify", **task), "reference": lambda: theirs("certify", **task)}
    if norm == "l2":
        tasks["ART"] = lambda: theirs("art", **task)
    times, answers, raw = in_turn(options.rounds, **tasks)
    a, b = (np.array(answers[who]["counts"]) for who in ("ours", "reference"))
    same = np.array(answers["ours"]["classes"]) == np.array(answers["reference"]["classes"])
    pooled = np.clip((a + b) / (2 * options.n), 1e-6, 1 - 1e-6)
    z = ((a - b) / np.sqrt(2 * options.n * pooled * (1 - pooled)))[same]
    add(
        "certification", len(few) * (options.n + N0), times, raw, counts={"ours": a.tolist(), "reference": b.tolist()},
        same_class=int(same.sum()), p_value=float(scipy.stats.chi2.sf((z**2).sum(), max(1, len(z)))),
    )  # fmt: skip

    # Searches at equal work; the second starts from our first one's thetas.
    settings = {"rows": few, "samples": options.samples, "lr": 0.04, "seed": SEED}
    file = lambda name: str(work / f"{network}-{name}.npy")
    first = {"start": theta, "steps": options.steps, **settings}
    tasks = {
        "ours": lambda: ours("isotropic", **first, out=file("isotropic-ours")),
        "reference": lambda: theirs("isotropic", **first, out=file("isotropic-reference")),
    }
    times, _, raw = in_turn(options.rounds, **tasks)
    passes = len(few) * options.steps * options.samples
    add("isotropic search", passes, times, raw, **compare_thetas(ours, file, "isotropic", few, options))
    np.save(file("start"), np.minimum(np.load(file("isotropic-ours")), 4 * theta).astype(np.float32))
    second = {"start": file("start"), "steps": options.steps, **settings}
    ref = lambda name, frozen: theirs("anisotropic", **second, out=file(name), frozen=frozen)
    tasks = {
        "ours": lambda: ours("anisotropic", **second, out=file("anisotropic-ours")),
        "reference": lambda: ref("anisotropic-reference", True),
        "reference as released": lambda: ref("anisotropic-released", False),
    }
    times, _, raw = in_turn(options.rounds, **tasks)
    add("anisotropic search", passes, times, raw, **compare_thetas(ours, file, "anisotropic", few, options))
    results["memory"] = {"ours": ours("memory"), "reference": theirs("memory")}
    ours.close(), theirs.close()

    # From the start of a process.
    firsts = {"ours": [], "ours, programs kept": [], "reference": []}
    one = {"rows": [0], "n": 1_000, **law}
    with tempfile.TemporaryDirectory() as kept:
        start_kept = lambda: start_ours(JAX_COMPILATION_CACHE_DIR=kept, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
        for _ in range(options.rounds + 1):
            for who, start in zip(firsts, (start_ours, start_kept, start_reference), strict=True):
                began = time.perf_counter()
                worker = start()
                worker("load", **load), worker("certify", **one)
                firsts[who].append(time.perf_counter() - began)
                worker.close()
    firsts["ours, programs kept"] = firsts["ours, programs kept"][1:]
    results["first certificate"] = {who: float(np.median(times)) for who, times in firsts.items()}
    print(f"{network}, seconds to the first certificate: {results['first certificate']}", flush=True)

    if options.whole:
        results["whole"] = whole(options, load, rows[: options.whole], file, start_ours, start_reference)
    return results


def compare_thetas(ours, file, kind, rows, options):
    """Mean proxy radii of both searches' thetas by the same draws, and the standard error of their difference."""
    found = {}
    for who in ("ours", "reference"):
        found[who] = np.array(ours("radii", rows=rows, theta=file(f"{kind}-{who}"), n=options.n, batch=100)["proxy"])
    difference = found["ours"] - found["reference"]
    error = float(difference.std(ddof=1) / np.sqrt(len(difference)))
    return {"proxy": {who: float(p.mean()) for who, p in found.items()}, "standard_error": error}


def whole(options, load, rows, file, start_ours, start_reference):
    """All that an image costs, processes and compilation included, and what is certified for it."""
    norm, theta = NETWORKS[load["network"]]
    steps, n = (90, 10_000) if options.small else (900, 100_000)
    began = time.perf_counter()
    theirs = start_reference()
    theirs("load", **load)
    search = {"rows": rows, "samples": 100, "lr": 0.04, "seed": SEED}
    theirs("isotropic", start=theta, steps=steps, out=file("whole-isotropic"), **search)
    # Their scripts bound nothing; the bound of our searches keeps both thetas in one range.
    np.save(file("whole-start"), np.clip(np.load(file("whole-isotropic")), theta / 100, 4 * theta))
    theirs(
        "anisotropic", start=file("whole-start"), steps=steps // 9, out=file("whole-reference"), frozen=False, **search
    )
    np.save(file("whole-reference"), np.minimum(np.load(file("whole-reference")), 4 * theta))
    law = {"n0": N0, "n": n, "alpha": ALPHA, "seed": SEED, "batch": options.batch}
    answer = theirs("certify", rows=rows, theta=file("whole-reference"), **law)
    seconds = {"reference": (time.perf_counter() - began) / len(rows)}
    theirs.close()

    from ancer_jax.bounds import clopper_pearson_lower
    from ancer_jax.certificates import CERTIFICATES
    from ancer_jax.regions import geometric_mean

    thetas = np.load(file("whole-reference")).astype(np.float64)
    gaps = CERTIFICATES[norm].gap(clopper_pearson_lower(np.array(answer["counts"]), n, ALPHA))
    gaps = np.where(np.array(answer["classes"]) >= 0, gaps, 0)
    proxies = {"reference": gaps * [geometric_mean(one) for one in thetas]}
    radii = {"reference": gaps * thetas.min(axis=(1, 2, 3))}
    began = time.perf_counter()
    ours = start_ours()
    ours("load", **load)
    found = ours("whole", rows=rows, theta=theta, n=n, batch=options.batch, out=file("whole-ours"))
    seconds["ours"] = (time.perf_counter() - began) / len(rows)
    # The region of a sequential run is as large as its decisions need: for sizes, the same thetas by all draws.
    sizes = ours("radii", rows=rows, theta=file("whole-ours"), n=n, batch=100)
    ours.close()
    proxies["ours"], radii["ours"] = np.array(sizes["proxy"]), np.array(sizes["radius"])
    decided = {"ours": np.array(found["radius_proxy"]), "reference": proxies["reference"]}
    results = {
        "images": len(rows),
        "seconds": seconds,
        "times faster": seconds["reference"] / seconds["ours"],
        "draws": {"ours": found["draws"], "reference": n},
        "mean proxy radius": {who: float(p.mean()) for who, p in proxies.items()},
        "mean radius": {who: float(r.mean()) for who, r in radii.items()},
        "certified at": {
            str(at): {who: int(((d >= at) & (d > 0)).sum()) for who, d in decided.items()} for at in record.RADII[norm]
        },
    }
    print(f"{load['network']}, whole: {json.dumps(results)}", flush=True)
    return results


def passed(results, device, small) -> bool:
    """Whether certificates and thetas agree, and, but for a rehearsal, whether ours is fast enough."""
    good, bar = True, 1 if device == "cpu" else 4
    for one in results:
        same = one["certification"]["p_value"] >= 1e-3
        for kind in ("isotropic search", "anisotropic search"):
            proxy, error = one[kind]["proxy"], one[kind]["standard_error"]
            same &= proxy["ours"] >= proxy["reference"] - 2 * error - 0.01 * proxy["reference"]
        rates = [one[k]["rates"] for k in ("certification", "isotropic search", "anisotropic search")]
        fast = all(rate["ours"] >= bar * rate["reference"] for rate in rates)
        fast &= "whole" not in one or one["whole"]["times faster"] >= 10
        print(f"{one['network']}: {'agrees' if same else 'DISAGREES'}, {'as fast' if fast else 'SLOWER THAN THE BAR'}")
        good &= bool(same) and (small or bool(fast))
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10")
    parser.add_argument("--work", default="peers")
    parser.add_argument("--reference-python")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of the reference; ours takes JAX's")
    parser.add_argument("--small", action="store_true", help="a rehearsal of minutes; nothing is judged but agreement")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--train-images", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--few", type=int, default=4, help="images at a time")
    parser.add_argument("--n", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--samples", type=int, default=50, help="draws of a step of a search")
    parser.add_argument("--batch", type=int, default=200, help="rows at a time in certification")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--whole", type=int, help="images that go through everything; 0: none")
    options = parser.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # this process leaves a GPU's memory to the workers
    defaults = {"n": (500, 2_000), "steps": (3, 10), "rounds": (1, 3), "whole": (0, 1)}
    defaults |= {"epochs": (2, 3 if options.cifar10 else 20), "train_images": (1_000, 10_000)}
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
        subprocess.run([python, "-m", "pip", "install", "--quiet", *NEEDS], check=True)
    start_reference = lambda: Worker(python, HERE / "peers_torch.py", options.device)
    start_ours = lambda **environment: Worker(sys.executable, __file__, "--worker", **environment)
    with contextlib.closing(start_reference()) as reference:
        networks = prepare(options, reference)
    settings, results = {k: v for k, v in vars(options).items() if k not in ("work", "reference_python", "cifar10")}, []
    for load in networks.values():
        results.append(measure(options, load, start_ours, start_reference))
        record.save("peers-small" if options.small else "peers", {"settings": settings, "networks": results}, seed=SEED)
    return 0 if passed(results, options.device, options.small) else 1


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1:] == ["--worker"] else main())
