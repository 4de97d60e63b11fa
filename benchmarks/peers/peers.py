"""Side by side with the packages of the papers (ancer-python, ddsmoothing-python: "the reference") and with ART.

Both networks of the reference, ResNet-18 (l2) and WRN-40-2 (l1), are trained by PyTorch with its code, and converted.
Then ours and the reference take turns in processes of their own, on JAX's device, on the same images, with the same n,
steps, draws, rows at a time and precision (float32; on a GPU with TF32 products):

- certification with fixed noise, in noisy forward passes a second; of ART, too (l2). The votes for all classes must
  agree within Monte Carlo error. The seconds of ours include files, checks and the certificates on the host;
- isotropic and anisotropic search, in noisy forward and backward passes a second. The anisotropic search of the
  reference computes gradients of the parameters, too: it is measured as released, and with the parameters frozen, with
  which ours is compared. The thetas of both are certified by the same draws, and their leakage is measured. The median
  of the images' ratios of proxy radii, ours to theirs, has a bar. A network of the reference gets a softmax where it
  lacks one, without which its search is meaningless;
- whole: all that the papers do for an image (900 + 100 steps of 100 draws, n = 100,000) against the fast preset and
  `--sampling sequential` at the radii in the tables of the literature, with memory and without a measure of leakage
  (the reference has neither), in seconds for an image, start and compilation included. The thetas of the reference are
  cut off at our bound. Sizes of regions are compared as above, with 20,000 draws outside of all seconds, because
  sequential sampling decides the radii of a table, and no more.

The raw outputs are `peers-<network>` and `whole-<network>`. Speed is not judged with `--small`. The reference needs
Python 3.11, and gets a virtual environment in `--work` unless `--reference-python` names one. Without `--cifar10`: the
bundled Fashion-MNIST images, padded to 32 x 32 x 3.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
import scipy.stats

import ancer_jax as aj
from ancer_jax._numerics import geometric_mean
from ancer_jax.metrics import round_down, round_up
from ancer_jax.report import LEAKY_ABOVE
from ancer_jax.smoothing.bounds import clopper_pearson_lower
from benchmarks import figures
from benchmarks.benchmark import Benchmark, Found, Line, Lines, load, markdown

HERE = pathlib.Path(__file__).parent
NETWORKS = {"ancer_resnet18": ("l2", 0.25), "wrn_40_2": ("l1", 0.5)}
TITLES = {"ancer_resnet18": "ResNet-18", "wrn_40_2": "WRN-40-2"}
STEPS = {"ancer_resnet18": 20, "wrn_40_2": 6}  # of a search on a CPU: some seconds
WHOLE = {"ancer_resnet18": 8, "wrn_40_2": 1}  # images; one takes the reference 2 and 20 minutes on two cores
NEEDS = ["torch==2.13.0", "numpy<2", "scipy<1.12", "ancer-python==1.0.0", "ddsmoothing-python==1.0.0"]
NEEDS += ["adversarial-robustness-toolbox==1.20.1"]
KINDS = ("isotropic", "anisotropic")
ALPHA, N0 = 1e-3, 100
BAR_P_VALUE, BAR_SIZE, BAR_GPU, BAR_WHOLE = 1e-3, 0.95, 4, 10
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}  # of the workers


class Worker:
    """A process that does one task after another."""

    def __init__(self, *command: str | os.PathLike[str], **environment: str):
        pipe = subprocess.PIPE
        arguments = list(map(str, command))
        self.process = subprocess.Popen(arguments, env=ENVIRONMENT | environment, stdin=pipe, stdout=pipe, text=True)

    def __call__(self, do: str, **task: Any) -> dict[str, Any]:
        """The answer to a task, with its seconds."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps({"do": do} | task), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the worker has stopped: {self.process.args}")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


Start = Callable[..., Worker]
Tasks = Mapping[str, Callable[[], dict[str, Any]]]


def in_turn(rounds: int, tasks: Tasks) -> tuple[dict[str, float], dict[str, Any], dict[str, list[float]]]:
    """Median seconds, last answer and all seconds of each task: once for compilation, then in turn."""
    answers = {name: task() for name, task in tasks.items()}
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            answers[name] = task()
            seconds[name].append(answers[name]["seconds"])
    return {name: float(np.median(all_of)) for name, all_of in seconds.items()}, answers, seconds


def load_data(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training images and labels, uint8 [n, 3, 32, 32], and test images, float32."""
    name = options.cifar10 or "fashion-mnist-subset"
    train, test = aj.load_dataset(name, split="train"), aj.load_dataset(name)
    pixels = [np.asarray(images[:]) for images in (train.images, test.images)]
    if not options.cifar10:
        pixels = [np.pad(p, ((0, 0), (2, 2), (2, 2), (0, 0))).repeat(3, axis=-1) for p in pixels]
    train_pixels, test_pixels = (np.ascontiguousarray(p.transpose(0, 3, 1, 2)) for p in pixels)
    count = options.train_images or len(train_pixels)
    return np.round(train_pixels[:count] * 255).astype(np.uint8), train.labels[:count], test_pixels.astype(np.float32)


def workers(options: argparse.Namespace) -> tuple[Start, Start]:
    """What starts a process of ours, and of the reference, whose packages are installed if need be."""
    work = options.work = pathlib.Path(options.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    python = options.reference_python or work / "reference" / "bin" / "python"
    if not options.reference_python and not python.exists():
        if not shutil.which("python3.11"):
            raise SystemExit("the reference packages need Python 3.11, and there is no python3.11: --reference-python")
        subprocess.run(["python3.11", "-m", "venv", work / "reference"], check=True)
        print(f"installing PyTorch and the reference packages into {work / 'reference'}", flush=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *NEEDS], check=True)
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    return partial(Worker, sys.executable, HERE / "_ours.py"), partial(Worker, python, HERE / "_torch.py", device)


def prepare(options: argparse.Namespace, reference: Worker) -> dict[str, dict[str, str]]:
    """Weights of both networks and the test images, as files."""
    work = pathlib.Path(options.work)
    pixels, labels, test = load_data(options)
    count = options.images + options.probes
    np.save(work / "images.npy", test[:: max(1, len(test) // count)][:count])
    np.savez(work / "train.npz", images=pixels, labels=labels)
    found = {}
    for network in options.networks:
        norm, scale = NETWORKS[network]
        trained = (
            f"{options.epochs}-epochs-of-{len(labels)}-{'cifar10' if options.cifar10 else 'bundled'}-{options.seed}"
        )
        weights = work / f"{network}-{trained}.npz"
        if not weights.exists():
            settings = {"noise": norm, "scale": scale, "epochs": options.epochs, "seed": options.seed}
            data = str(work / "train.npz")
            seconds = reference("train", network=network, data=data, out=str(weights), **settings)["seconds"]
            print(f"{network}: trained in {seconds:.0f} s", flush=True)
        found[network] = {"network": network, "weights": str(weights), "images": str(work / "images.npy"), "norm": norm}
    return found


def side_by_side(
    options: argparse.Namespace,
    given: Mapping[str, str],
    start_ours: Start,
    start_reference: Start,
    results: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """`results`, filled step by step."""
    work, network = pathlib.Path(options.work), given["network"]
    norm, theta = NETWORKS[network]
    rows, noise = list(range(options.images)), {"theta": theta, "seed": options.seed}
    ours, theirs = start_ours(), start_reference()
    ours("load", **given)
    results |= {"network": network, "norm": norm, "theta": theta, "reference": theirs("load", **given)}

    def add(name, passes, times, raw, **more):
        rates = {who: passes / seconds for who, seconds in times.items()}
        results[name] = {"passes": passes, "rates": rates, "seconds": raw} | more
        print(f"{network}, {name}: " + ", ".join(f"{who} {rate:,.0f}/s" for who, rate in rates.items()), flush=True)

    for batch in options.batch:
        task = {"rows": rows, "n": options.n, "n0": N0, "alpha": ALPHA, "batch": batch} | noise
        tasks = {"ours": partial(ours, "certify", **task), "reference": partial(theirs, "certify", **task)}
        # ART gets a process of its own, because it holds all copies of an image at once.
        art = start_reference() if norm == "l2" else None
        if art:
            art("load", **given)
            tasks["ART"] = partial(art, "art", **task)
        times, answers, raw = in_turn(options.rounds, tasks)
        votes = ours("votes", rows=rows, n=options.n, batch=batch, **noise)["votes"]
        name, passes = f"certification, {batch} rows at a time", len(rows) * (options.n + N0)
        add(name, passes, times, raw, **compare_votes(votes, answers, theta, options.n))
        if art:
            art.close()
        yield results

    # Searches of equal work. The anisotropic ones start from the thetas of our isotropic search.
    settings: dict[str, Any] = {
        "rows": rows,
        "samples": options.samples,
        "steps": results["settings"]["steps"],
        "lr": 0.04,
        "seed": options.seed,
    }
    file = lambda name: str(work / f"{network}-{name}.npy")
    tasks = {
        "ours": partial(ours, "isotropic", start=theta, **settings, out=file("isotropic-ours")),
        "reference": partial(theirs, "isotropic", start=theta, **settings, out=file("isotropic-reference")),
    }
    times, _, raw = in_turn(options.rounds, tasks)
    passes = len(rows) * settings["steps"] * options.samples
    add("isotropic search", passes, times, raw, **compare_thetas(ours, file, "isotropic", options, theta))
    yield results
    np.save(file("start"), np.minimum(np.load(file("isotropic-ours")), 4 * theta).astype(np.float32))
    settings["start"], released = file("start"), file("anisotropic-released")
    tasks = {
        "ours": partial(ours, "anisotropic", **settings, out=file("anisotropic-ours")),
        "reference": partial(theirs, "anisotropic", **settings, out=file("anisotropic-reference"), frozen=True),
        "reference as released": partial(theirs, "anisotropic", **settings, out=released, frozen=False),
    }
    times, _, raw = in_turn(options.rounds, tasks)
    add("anisotropic search", passes, times, raw, **compare_thetas(ours, file, "anisotropic", options, theta))
    ours.close()
    theirs.close()
    yield results


def homogeneity(table: np.ndarray) -> float:
    """The p-value of the chi-squared test that both rows of a table of counts have one law."""
    found: Any = scipy.stats.chi2_contingency(table)
    return float(found.pvalue)


def compare_votes(counts: list[list[int]], answers: Mapping[str, Any], theta: float, n: int) -> dict[str, Any]:
    """Whether votes have one law: the smallest p-value of all images, times their number (Bonferroni).

    Args:
      counts: [m][K] our votes, of the draws of our answers; those of the reference and of ART are compared with them.
      answers: of each package.
      theta, n: noise parameter and number of draws.
    """
    ours, theirs = answers["ours"], np.array(answers["reference"]["votes"])
    votes, p_values = np.array(counts), []
    for row, (a, b) in enumerate(zip(votes, theirs, strict=True)):
        assert ours["predict"][row] < 0 or ours["count"][row] == a[ours["predict"][row]], "not the same draws"
        often = a + b >= 20
        table = np.array([[*v[often], v[~often].sum()] for v in (a, b)])
        table = table[:, table.sum(axis=0) > 0]
        p_values.append(homogeneity(table) if table.shape[1] > 1 else 1.0)
    lower = clopper_pearson_lower(np.arange(n + 1), n, ALPHA)
    art = answers.get("ART", {"classes": [], "radii": []})
    for a, label, radius in zip(votes, art["classes"], art["radii"], strict=False):
        if label >= 0:  # ART gives no votes: its votes for the class follow from its radius
            count = int(abs(lower - scipy.stats.norm.cdf(radius / theta)).argmin())
            table = np.array([[a[label], n - a[label]], [count, n - count]])
            p_values.append(homogeneity(table) if table[:, 1].any() else 1.0)
    answered = {"ours": ours["predict"], "reference": answers["reference"]["classes"]}
    return {
        "votes": {"ours": votes.tolist(), "reference": theirs.tolist()},
        "answers of ART": art["classes"],
        "certified": {who: sum(label >= 0 for label in labels) for who, labels in answered.items()},
        "p_value": min(1.0, min(p_values) * len(p_values)),
    }


def compare_thetas(
    ours: Worker,
    file: Callable[[str], str],
    kind: str,
    options: argparse.Namespace,
    start: float,
    rows: list[int] | None = None,
    n: int | None = None,
) -> dict[str, Any]:
    """Radii, proxy radii and leakage of the thetas of both, by the same draws."""
    task = {
        "rows": rows or list(range(options.images)),
        "probes": list(range(options.images, options.images + options.probes)),
        "start": start,
        "n0": N0,
        "n": n or options.n,
        "alpha": ALPHA,
        "batch": 100,
        "seed": options.seed,
    }
    sizes = {who: ours("sizes", theta=file(f"{kind}-{who}"), **task) for who in ("ours", "reference")}
    return {name: {who: found[name] for who, found in sizes.items()} for name in ("radius", "proxy", "leakage")}


def whole(
    options: argparse.Namespace,
    given: Mapping[str, str],
    images: int,
    start_ours: Start,
    start_reference: Start,
) -> dict[str, Any]:
    """The whole cost of an image, processes and compilation included, and what is certified for it."""
    (norm, theta), rows = NETWORKS[given["network"]], list(range(images))
    radii = figures.RADII[norm]
    file = lambda name: str(pathlib.Path(options.work) / f"{given['network']}-{name}.npy")
    steps, n = (90, 10_000) if options.small else (900, 100_000)
    began = time.perf_counter()
    theirs = start_reference()
    theirs("load", **given)
    search = {"rows": rows, "samples": 100, "lr": 0.04, "seed": options.seed}
    theirs("isotropic", start=theta, steps=steps, out=file("whole-isotropic"), **search)
    # The scripts of the reference have no bound; that of our searches keeps both thetas in one range.
    isotropic = np.load(file("whole-isotropic"))
    np.save(file("whole-start"), np.clip(isotropic, theta / 100, 4 * theta))
    theirs(
        "anisotropic", start=file("whole-start"), steps=steps // 9, out=file("whole-reference"), frozen=False, **search
    )
    anisotropic = np.load(file("whole-reference"))
    np.save(file("whole-reference"), np.minimum(anisotropic, 4 * theta))
    config = {"n0": N0, "n": n, "alpha": ALPHA, "seed": options.seed}
    answer = theirs("certify", rows=rows, theta=file("whole-reference"), batch=200, **config)
    seconds = {"reference": (time.perf_counter() - began) / len(rows)}
    theirs.close()

    began = time.perf_counter()
    ours = start_ours()
    ours("load", **given)
    found = ours("whole", rows=rows, theta=theta, radii=radii, out=file("whole-ours"), **config)
    seconds["ours"] = (time.perf_counter() - began) / len(rows)
    # Once more in the same process, where nothing has to be started and compiled.
    again = ours("whole", rows=rows, theta=theta, radii=radii, out=file("whole-again"), **config)["seconds"]
    seconds["ours, compiled"] = again / len(rows)
    # The region of a sequential run is as large as its decisions need: sizes are compared by other draws.
    sizes = compare_thetas(ours, file, "whole", options, theta, rows=rows, n=n // 5)
    ours.close()
    proxies = [
        gap * geometric_mean(one) for gap, one in zip(answer["gaps"], np.load(file("whole-reference")), strict=True)
    ]
    decided = {"ours": np.array(found["radius_proxy"]), "reference": np.array(proxies)}
    return {
        "network": given["network"],
        "images": len(rows),
        "seconds": seconds,
        "times faster": seconds["reference"] / seconds["ours"],
        "draws": {"ours": found["draws"], "reference": N0 + n},
        **sizes,
        "proxy radius at least": {
            str(at): {who: int(((d >= at) & (d > 0)).sum()) for who, d in decided.items()} for at in radii
        },
        "theta of the reference cut off": {
            "isotropic": float((isotropic > 4 * theta).mean()),
            "anisotropic": float((anisotropic > 4 * theta).mean()),
        },
    }


def larger(found: Mapping[str, Any]) -> np.ndarray:
    """The ratio of proxy radii, ours to theirs, of each image that either certifies."""
    pairs = np.array([found["proxy"][who] for who in ("ours", "reference")])
    ours, theirs = pairs[:, pairs.any(axis=0)]
    return ours / np.maximum(theirs, 1e-9)


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """Each network side by side, then whole; each into a raw output of its own."""
    if options.output != next(iter(BENCHMARK.outputs)):
        raise SystemExit(f"--as: a run makes several raw outputs, of {', '.join(BENCHMARK.outputs)}")
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # this process leaves a GPU's memory to the workers
    on_cpu = jax.default_backend() == "cpu"
    usual = {"n": 1_000, "steps": None, "batch": [200]}
    usual = usual if on_cpu else {"n": 100_000, "steps": 50, "batch": [200, 1_000, 4_000]}
    usual |= {"epochs": 3 if options.cifar10 else 20}
    for name, value in ({"n": 500, "steps": 3, "batch": [200], "epochs": 2} if options.small else usual).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    start_ours, start_reference = workers(options)
    with contextlib.closing(start_reference()) as reference:
        networks = prepare(options, reference)
    left_out = ("seed", "output", "work", "reference_python", "cifar10")
    settings = {k: v for k, v in vars(options).items() if k not in left_out}
    settings["data"] = "CIFAR-10" if options.cifar10 else "bundled"
    for network, given in networks.items():
        results: dict[str, Any] = {"settings": settings | {"steps": options.steps or STEPS[network]}}
        options.output = f"peers-{network}"
        yield from side_by_side(options, given, start_ours, start_reference, results)
        images = options.whole if options.whole is not None else 0 if options.small else WHOLE[network]
        if images:
            options.output = f"whole-{network}"
            yield {"settings": results["settings"]} | whole(options, given, images, start_ours, start_reference)


def rates_of(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Passes a second of each part, of all that took part in it."""
    return {name: one["rates"] for name, one in results.items() if isinstance(one, dict) and "rates" in one}


def size_line(what: str, found: Mapping[str, Any]) -> Line:
    """The bar for thetas."""
    ratio = float(np.median(larger(found)))  # NaN if neither certifies anything
    return Line(f"{what}: median ratio of proxy radii", round_down(ratio, 3), f">= {BAR_SIZE}", ratio >= BAR_SIZE)


def lines(found: Found) -> Lines:
    r, on_cpu = found["results"], found["machine"]["device"] == "cpu"
    network, small = r["network"], r["settings"]["small"]
    bar, factor = (">= reference", 1) if on_cpu else (f">= {BAR_GPU} x reference", BAR_GPU)
    rates = rates_of(r)
    batches = [name for name in rates if name.startswith("certification")]
    if len(batches) > 1:  # only the best is judged
        best = {who: max(rates[name][who] for name in batches) for who in rates[batches[0]]}
        rates["certification, each at its best"] = best
    for phase, rate in rates.items():
        judged = not small and not (phase in batches and len(batches) > 1)
        what = f"{network}, {phase}, passes a second: {' / '.join(rate)}"
        figure = " / ".join(f"{value:,.0f}" for value in rate.values())
        yield Line(what, figure, bar, rate["ours"] >= factor * rate["reference"]) if judged else Line(what, figure)
    for name in batches:
        p, what = r[name]["p_value"], f"{network}, {name}: p-value of the same votes"
        yield Line(what, f"{p:.2g}", f">= {BAR_P_VALUE}", p >= BAR_P_VALUE)
    for kind in KINDS:
        yield size_line(f"{network}, {kind} search, ours / reference", r[f"{kind} search"])


def whole_lines(found: Found) -> Lines:
    r, ratio = found["results"], found["results"]["times faster"]
    draws = " / ".join(f"{n:,.0f}" for n in r["draws"].values())
    what = f"{r['network']}, seconds for an image, start to end: {' / '.join(r['seconds'])}"
    what = f"{what} ({r['images']} images; {draws} draws)"
    figure = " / ".join(f"{seconds:,.0f}" for seconds in r["seconds"].values())
    figure = f"{figure} (ratio {round_down(ratio, 1)})"
    small = r["settings"]["small"]
    yield Line(what, figure) if small else Line(what, figure, f"ratio >= {BAR_WHOLE}", ratio >= BAR_WHOLE)
    yield size_line(f"{r['network']}, start to end, ours / reference", r)


def _found(name: str) -> dict[str, Any]:
    return load(name)["results"]


def _side_by_side() -> str:
    """Rates: a table."""
    resnet, wrn = NETWORKS
    columns = [(resnet, "ours"), (resnet, "reference"), (resnet, "ART"), (wrn, "ours"), (wrn, "reference")]

    def row(what: str, part: str, of: str = "{}") -> list[str]:
        """The rates of a part, of everyone who took part, as `of` names them."""
        rates = [(_found(f"peers-{network}")[part]["rates"], who) for network, who in columns]
        values = [of_part.get(of.format(who)) for of_part, who in rates]
        return [what, *("" if value is None else f"{value:,.0f}" for value in values)]

    rows = [
        row("certification", "certification, 200 rows at a time"),
        row("isotropic search", "isotropic search"),
        row("anisotropic search, parameters frozen", "anisotropic search"),
        row("anisotropic search, as released", "anisotropic search", of="{} as released"),
    ]
    title = [TITLES[network] for network in NETWORKS]
    return markdown(["", f"{title[0]}: ours", "theirs", "ART 1.20.1", f"{title[1]}: ours", "theirs"], rows)


def _span(values: Iterable[float], digits: int) -> str:
    values = list(values)
    return " to ".join(dict.fromkeys(round_down(of(values), digits) for of in (min, max)))


def _whole() -> str:
    """Seconds from start to end: a table."""
    rows = []
    for network, (norm, _) in NETWORKS.items():
        r = _found(f"whole-{network}")
        theirs, ours, compiled = (r["seconds"][who] for who in ("reference", "ours", "ours, compiled"))
        times = f"{round_down(r['times faster'], 1)} ({round_down(theirs / compiled, 1)} compiled)"
        what = f"{TITLES[network]}, {norm}, {r['images']} image{'s' * (r['images'] > 1)}"
        rows.append([what, f"{theirs:,.0f}", f"{ours:.1f}", f"{compiled:.1f}", times])
    return markdown(["", "theirs", "ours, start and compilation included", "ours, compiled", "times faster"], rows)


def _regions() -> str:
    """Regions from start to end: a table."""
    rows = []
    for network in NETWORKS:
        r = _found(f"whole-{network}")
        ratio, leakage = larger(r), np.array([r["leakage"][who] for who in ("ours", "reference")])
        little = ratio[(leakage <= LEAKY_ABOVE).all(axis=0)]
        rows.append([TITLES[network], _span(ratio, 2)])
        rows[-1] += [f"{_span(little, 2)} ({len(little)} images)" if len(little) else "no image"]
        rows[-1] += [round_up(mean, 2) for mean in leakage.mean(axis=1)]
        rows[-1] += [f"{100 * r['theta of the reference cut off']['anisotropic']:.0f} %"]
    header = ["", "ratio of proxy radii, ours to theirs", f"where neither theta leaks more than {LEAKY_ABOVE}"]
    return markdown([*header, "mean leakage, ours", "theirs", "coordinates of theirs that were cut off"], rows)


def _faster(name: str, kind: str) -> list[float]:
    """Ratios of rates, ours to theirs."""
    rates = rates_of(_found(name))
    return [rate["ours"] / rate["reference"] for part, rate in rates.items() if kind in part]


def _thetas() -> list[float]:
    """Median ratios of proxy radii in the searches."""
    found = [_found(f"peers-{network}")[f"{kind} search"] for network in NETWORKS for kind in KINDS]
    return [float(np.median(larger(one))) for one in found]


def places(parser: argparse.ArgumentParser) -> None:
    """Where data, workers and networks are."""
    parser.add_argument("--cifar10")
    parser.add_argument("--work", default="peers")
    parser.add_argument("--reference-python")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))


def _arguments(parser: argparse.ArgumentParser) -> None:
    places(parser)
    parser.add_argument("--n", type=int, help="usually 1000; on a GPU 100000")
    parser.add_argument("--steps", type=int, help=f"of a search; usually {STEPS}; on a GPU 50")
    parser.add_argument("--batch", type=int, nargs="+", help="rows at a time; usually 200; on a GPU also 1000 and 4000")
    parser.add_argument("--epochs", type=int, help="usually 20; of CIFAR-10 3")
    parser.add_argument("--whole", type=int, help=f"images that go through everything; usually {WHOLE}; --small: none")


BENCHMARK = Benchmark(
    claim="At equal work, certification and searches are at least as fast as those of the papers' packages.",
    takes="2 hours",
    measure=measure,
    sizes={
        "images": (4, 8),
        "probes": (20, 100),
        "train_images": (300, 10_000),
        "samples": (50, 50),
        "rounds": (1, 5),
    },
    arguments=_arguments,
    outputs={
        **{f"{kind}-{network}": of for network in NETWORKS for kind, of in (("peers", lines), ("whole", whole_lines))},
        "peers-ancer_resnet18-busy": lines,  # an earlier run, shorter, while the machine had other work
    },
    figures={
        "side-by-side": _side_by_side,
        "whole": _whole,
        "regions": _regions,
        "rates": lambda: _span((x for network in NETWORKS for x in _faster(f"peers-{network}", "")), 1),
        "rates-busy": lambda: " and ".join(round_down(x, 2) for x in _faster("peers-ancer_resnet18-busy", "search")),
        "thetas": lambda: _span(_thetas(), 2),
        "draws": lambda: " of ".join(f"{n:,.0f}" for n in _found("whole-ancer_resnet18")["draws"].values()),
    },
)
