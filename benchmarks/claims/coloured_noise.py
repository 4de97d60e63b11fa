"""Coloured noise against white noise: do its certificates contain the other ones, at the same accuracy?

FOLDER holds CIFAR-10's binary files, or Fashion-MNIST's idx files. For each sigma one network is trained for each row
by `ancer-jax train`, all with the same recipe, and certified by `ancer-jax certify` on every `skip`-th test image:

    white                  isotropic noise sigma
    white, filter          and Wiener's filter in front of the network
    cosine, no filter      coloured: the spectral theta map in the cosine basis, from sigma to theta_max = 4 sigma
    cosine                 and Wiener's filter
    Karhunen-Loeve         the same in the basis that decorrelates the training images
    pixels                 one theta for each pixel, by the same formula: what the basis is good for
    cosine, learned        the map of "cosine" after an ascent on training images under its network; trained anew
    cosine, 2 (8)          "cosine" with theta_max = 2 or 8 sigma (the spectral map has no larger theta)
    cosine, learned, 8 (16)    "cosine, learned" with theta_max = 8 or 16 sigma: where is the knee?

`--rows` names some of them. No theta is below sigma, so the region of an image contains that of white noise of the same
sigma where its radius is at least as large. ACR-tilde depends on theta_max, which is named in each row. Per-image
noise (ANCER after memory, and without leaky thetas) is that of the white network, on every `ancer_skip`-th image: the
other rows are given on these images, too.

ACR is compared with that of "white, filter", too: a difference to "white" may be the filter's.
Bars for "cosine" and "cosine, learned" against "white" of the same sigma: ACR at least 98 %, ACR-tilde at least three
times as large, and at least half of the images that both answer correctly have a region that contains white's.

Networks, maps and runs stay in the folder `--work`, where a second call continues. With `--shipped`, rows whose network
ships with the package take it: those of CIFAR-10 were trained here, by the same recipe for 30 epochs. The rows may be
measured in several calls, each with a raw output of its own (`--as`): the table has all of them.
"""

import argparse
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ancer_jax._numerics import geometric_mean
from ancer_jax.metrics import round_down, round_share
from ancer_jax.models import load_bundled
from ancer_jax.report import Results, load_results
from ancer_jax.search import load_theta_map, save_theta_map
from benchmarks import figures
from benchmarks.benchmark import Benchmark, Found, Line, Lines, load, markdown, stored
from benchmarks.data.cifar10_models import RECIPE, ancer_jax

FASHION = ["--network", "small_cnn", "--batch-size", "128", "--optimizer", "muon", "--muon-lr", "0.05"]
FASHION += ["--schedule", "onecycle", "--flip", "random", "--shift", "1"]


class Row(NamedTuple):
    """The noise of a row, and whether Wiener's filter is in front of its network."""

    basis: str | None = None  # None: white noise
    factor: float = 1  # theta_max in units of sigma
    filtered: bool = True
    learned: bool = False
    shipped: str | None = None  # how the names of its bundled networks end


ROWS = {
    "white": Row(filtered=False, shipped=""),
    "white, filter": Row(),
    "cosine, no filter": Row("cosine", 4, filtered=False),
    "cosine": Row("cosine", 4, shipped="-spectral"),
    "Karhunen-Loeve": Row("karhunen-loeve", 4),
    "pixels": Row("pixels", 4, filtered=False),
    "cosine, learned": Row("cosine", 4, learned=True, shipped="-coloured"),
    "cosine, 2": Row("cosine", 2),
    "cosine, 8": Row("cosine", 8),
    "cosine, learned, 8": Row("cosine", 8, learned=True),
    "cosine, learned, 16": Row("cosine", 16, learned=True),
}
JUDGED = ("cosine", "cosine, learned")
ANCER = "ANCER, after memory"
# In the picture: rows by growing theta_max.
KNEE = {
    ("spectral", "o-"): ("white, filter", "cosine, 2", "cosine", "cosine, 8"),
    ("learned", "s--"): ("cosine, learned", "cosine, learned, 8", "cosine, learned, 16"),
}
# The raw outputs, by the data set; the rows of CIFAR-10 were measured in several calls.
OUTPUTS = {
    "cifar10": (
        "coloured_noise",
        "coloured_noise-filter",
        "coloured_noise-filter-0.5",
        "coloured_noise-ancer-0.25",
        "coloured_noise-ancer-0.5",
    ),
    "fashion": ("coloured_noise-fashion",),
}


def shipped_name(row: str, sigma: float, options: argparse.Namespace) -> str | None:
    """The name of the bundled network of a row, if it is to be taken."""
    ending = ROWS[row].shipped
    return f"{options.name}-l2-{sigma:g}{ending}" if options.shipped and ending is not None else None


def theta_map(row: str, sigma: float, options: argparse.Namespace) -> str | None:
    """The file of the theta map of a row; it is made if it does not exist. None for white noise."""
    what = ROWS[row]
    if what.basis is None:
        return None
    file = os.path.join(options.work, f"{slug(row)}-{sigma:g}.npz")
    if os.path.exists(file):
        return file
    if name := shipped_name(row, sigma, options):
        shipped = load_bundled(name).theta_map
        assert shipped is not None
        save_theta_map(shipped, file)
        return file
    flags = ["--data", options.folder, "--basis", what.basis, "--seed", str(options.seed + 1), "--out", file]
    if what.learned:
        flags += ["--steps", str(options.steps), "--classifier", network("cosine", sigma, options)]
    ancer_jax("learn-theta", *flags, "--sigma", str(sigma), "--theta-max", str(what.factor * sigma))
    return file


def network(row: str, sigma: float, options: argparse.Namespace) -> str:
    """The network of a row, by name or folder; trained if it is not."""
    if name := shipped_name(row, sigma, options):
        return name
    folder, file = os.path.join(options.work, f"net-{slug(row)}-{sigma:g}"), theta_map(row, sigma, options)
    noise = ["--sigma", str(sigma)] if file is None else ["--theta-map", file]
    noise += ["--front", "wiener"] if ROWS[row].filtered else []
    how = [*options.recipe, "--epochs", str(options.epochs), "--seed", str(options.seed)]
    ancer_jax("train", "--data", options.folder, *how, *noise, "--out", folder)
    return folder


def certified(row: str, sigma: float, options: argparse.Namespace) -> Results:
    """The run of a row."""
    run = os.path.join(options.work, f"run-{slug(row)}-{sigma:g}")
    if run in options.certified:
        return load_results(run)
    own, skip = "white" if row == ANCER else row, options.ancer_skip if row == ANCER else options.skip
    file = theta_map(own, sigma, options)
    how = ["--method", "ancer"] if row == ANCER else ["--method", "fixed" if file is None else "universal"]
    how += [] if file is None else ["--theta-map", file]
    part = ["--skip", str(skip), "--max", str(-(-options.images * options.skip // skip)), "--n", str(options.n)]
    how += ["--classifier", network(own, sigma, options), "--seed", str(options.seed)]
    ancer_jax("certify", "--data", options.folder, *how, *part, "--out", run)
    options.certified.add(run)
    return load_results(run)


def slug(row: str) -> str:
    """The name of a row in file names."""
    return row.replace(", ", "-").replace(" ", "-")


def ancer_row(sigma: float, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of ANCER after memory."""
    results = certified(ANCER, sigma, options)
    found = {"row": ANCER, "sigma": sigma, "images": len(results.correct), **figures.summary(results)}
    without = {column: figures.without_leaky(results, column) for column in ("radius", "radius_proxy")}
    return found | {"without leaky": without, "mean leakage": figures.mean_leakage(results)}


def row_of(row: str, sigma: float, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of another row, and their comparison with white noise of the same sigma."""
    white, results = (certified(one, sigma, options) for one in ("white", row))
    found = {"row": row, "sigma": sigma, "images": len(results.correct), **figures.summary(results)}
    file = theta_map(row, sigma, options)
    theta = np.float64(sigma) if file is None else load_theta_map(file).theta
    both = results.correct & white.correct
    contains = both & (results["radius"] >= white["radius"]) & (np.min(theta) >= np.float32(sigma))
    radius = np.where(results.correct, results["radius"], -np.inf)
    some = np.isin(results["idx"], results["idx"][:: options.ancer_skip // options.skip])
    return found | {
        "theta_max": float(ROWS[row].factor * sigma),
        "geometric mean": float(geometric_mean(theta)),
        "correct with white": int(both.sum()),
        "contain white's": int(contains.sum()),
        "accuracy by radius": {str(at): float((radius >= at).mean()) for at in figures.RADII["l2"]},
        "on the images of ANCER": {
            "images": int(some.sum()),
            "accuracy": float(results.correct[some].mean()),
            "ACR": float(np.where(results.correct, results["radius"], 0)[some].mean()),
            "ACR-tilde": float(np.where(results.correct, results["radius_proxy"], 0)[some].mean()),
        },
    }


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """All rows of each sigma."""
    if not (options.folder or options.small):
        raise SystemExit("give the FOLDER of CIFAR-10 or of Fashion-MNIST")
    options.folder = options.folder or "fashion-mnist-subset"
    is_cifar = "cifar" in options.folder
    options.recipe, options.name = (RECIPE, "cifar10-resnet20") if is_cifar else (FASHION, "fashion-mnist-cnn")
    if options.small:
        options.recipe = [*options.recipe, "--max", "256", "--test-max", "20"]
    options.certified = set()  # runs of this call
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        options.work = str(pathlib.Path(options.work or temporary).resolve())
        os.makedirs(options.work, exist_ok=True)
        for sigma in options.sigma:
            for row in options.rows or (["white", "cosine", ANCER] if options.small else [*ROWS, ANCER]):
                rows.append(ancer_row(sigma, options) if row == ANCER else row_of(row, sigma, options))
                how = {name: getattr(options, name) for name in ("epochs", "skip", "ancer_skip", "steps", "n")}
                yield {"data": options.name, **how, "rows": rows}
    if any(len(set(names) & {r["row"] for r in rows}) > 1 for names in KNEE.values()):
        draw(rows, stored(options, ".png"))


def lines(found: Found) -> Lines:
    results = found["results"]
    rows = {(r["row"], r["sigma"]): r for r in results["rows"]}
    for (name, sigma), r in rows.items():
        what = f"{results['data']}, sigma {sigma:g}, {name}, {r['images']} images"
        cells = f"{round_share(r['accuracy'], r['images'])}; {figures.down(r, 'ACR', 'ACR-tilde')}"
        yield Line(f"{what}: accuracy; ACR; ACR-tilde", cells)
        if name == ANCER:
            kept = {"ACR": r["without leaky"]["radius"], "ACR-tilde": r["without leaky"]["radius_proxy"]}
            yield Line(f"{what}, without leaky thetas: ACR; ACR-tilde", figures.down(kept, "ACR", "ACR-tilde"))
        white = rows.get(("white", sigma))
        if name not in JUDGED or white is None:
            continue
        for figure, factor in (("ACR", 0.98), ("ACR-tilde", 3.0)):
            ratio = r[figure] / white[figure] if white[figure] else float("nan")
            yield Line(f"{what}: {figure} in units of white's", f"{ratio:.3f}", f">= {factor}", ratio >= factor)
        if (filtered := rows.get(("white, filter", sigma))) and filtered["ACR"]:
            yield Line(
                f"{what}: ACR in units of that of white noise and the filter", f"{r['ACR'] / filtered['ACR']:.3f}"
            )
        inside, both = r["contain white's"], r["correct with white"]
        what += ": regions that contain white's, where both are right"
        yield Line(what, f"{inside} of {both}", ">= half", 2 * inside >= both)


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Accuracy, ACR and ACR-tilde against the geometric mean of theta, in units of sigma, as theta_max grows."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    for axis, column in zip(axes, ("accuracy", "ACR", "ACR-tilde"), strict=True):
        for i, sigma in enumerate(dict.fromkeys(r["sigma"] for r in rows)):
            of_sigma = {r["row"]: r for r in rows if r["sigma"] == sigma}
            for (kind, style), names in KNEE.items():
                knee = [of_sigma[name] for name in names if name in of_sigma]
                at = [r["geometric mean"] / sigma for r in knee]
                label = f"sigma {sigma:g}, {kind} map, filter"
                axis.plot(at, [r[column] for r in knee], f"C{i}{style}", label=label)
                below = kind == "spectral"
                for j, (r, x) in enumerate(zip(knee, at, strict=True)):
                    place = {"xytext": (0, -14 if below else 6), "ha": ("right", "left")[j % 2] if below else "center"}
                    axis.annotate(
                        f"{r['theta_max'] / sigma:g}", (x, r[column]), textcoords="offset points", fontsize=8, **place
                    )
            if white := of_sigma.get("white"):
                label = f"sigma {sigma:g}, white noise, no filter"
                axis.axhline(white[column], color=f"C{i}", linestyle=":", label=label)
        axis.set(xlabel="geometric mean of theta / sigma\n(at the marks: theta_max / sigma)", ylabel=column)
        axis.set_ylim(0, 1.2 * max(r[column] for r in rows if r["row"] != ANCER) or 1)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=120)


def _rows(data: str) -> dict[tuple[str, float], dict[str, Any]]:
    """The rows of all raw outputs of a data set, in the order of `ROWS` for each sigma."""
    measured = [r for output in OUTPUTS[data] for r in load(output)["results"]["rows"]]
    rows = {(r["row"], r["sigma"]): r for r in reversed(measured)}  # of rows measured twice, the first
    order = [*ROWS, ANCER]
    return dict(sorted(rows.items(), key=lambda row: (row[0][1], order.index(row[0][0]))))


def _table(data: str) -> str:
    """All rows of a data set; where ANCER was run, the rows that it is compared with again, on its images."""
    table: list[list[str]] = []
    rows = _rows(data)
    for (name, sigma), r in rows.items():
        if name == ANCER:
            some = f", {r['images']} images"
            for other in (rows[compared, sigma] for compared in ("white", *JUDGED) if (compared, sigma) in rows):
                table.append(
                    [*_first(other, other["row"] + some), *_means(other["on the images of ANCER"]), "", "", ""]
                )
            first, kept = [f"{sigma:g}", name + some, f"{4 * sigma:g}", ""], r["without leaky"]
            table.append([*first, *_means(r), "", "", ""])
            first[1] += ", without leaky thetas"
            sizes = [round_down(kept[column], 3) for column in ("radius", "radius_proxy")]
            table.append([*first, "", *sizes, "", "", ""])
            continue
        relative = [_percent(r, rows.get((white, sigma))) for white in ("white", "white, filter")]
        contain = "" if name == "white" else "{} of {}".format(r["contain white's"], r["correct with white"])
        table.append([*_first(r, name), *_means(r), *relative, contain])
    header = ["sigma", "noise", "theta_max", "geometric mean / sigma", "accuracy", "ACR", "ACR-tilde"]
    return markdown([*header, "ACR / white's", "ACR / white, filter's", "contains white's"], table)


def _percent(r: dict[str, Any], baseline: dict[str, Any] | None) -> str:
    """The ACR of a row in that of another one."""
    if baseline is None or r is baseline or not baseline["ACR"]:
        return ""
    return f"{round_down(100 * r['ACR'] / baseline['ACR'], 1)} %"


def _first(r: dict[str, Any], name: str) -> list[str]:
    """The cells of a row that describe its noise."""
    return [f"{r['sigma']:g}", name, f"{r['theta_max']:g}", f"{r['geometric mean'] / r['sigma']:.2f}"]


def _means(r: dict[str, Any]) -> list[str]:
    """The cells of accuracy, ACR and ACR-tilde."""
    return [round_share(r["accuracy"], r["images"]), round_down(r["ACR"], 3), round_down(r["ACR-tilde"], 3)]


def _sizes(data: str, name: str) -> str:
    """The figures of a row, of the smallest sigma."""
    r = next(r for (row, _), r in _rows(data).items() if row == name)
    return "accuracy {}, ACR {}, ACR-tilde {}".format(*_means(r))


def arguments(parser: argparse.ArgumentParser) -> None:
    """The data, what is compared, and where everything stays."""
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help="with --small: the bundled images, if not given")
    parser.add_argument("--work", help="a folder that keeps networks, maps and runs")
    parser.add_argument(
        "--shipped", action="store_true", help="take the networks that ship with the package, where there are any"
    )
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, ANCER], help="default: all")


BENCHMARK = Benchmark(
    claim="Coloured noise against white noise at equal training: accuracy, sizes, and whose regions contain whose.",
    takes="a day on CIFAR-10; 2 hours on Fashion-MNIST",
    measure=measure,
    sizes={
        "epochs": (1, 30),
        "images": (4, 500),
        "skip": (1, 20),
        "ancer_skip": (2, 40),
        "steps": (2, 300),
        "n": (100, 10_000),
    },
    arguments=arguments,
    small_is_judged=False,
    outputs={output: lines for outputs in OUTPUTS.values() for output in outputs},
    figures={
        "cifar10": lambda: _table("cifar10"),
        "cifar10-coloured": lambda: _sizes("cifar10", "cosine"),
        "cifar10-white": lambda: _sizes("cifar10", "white"),
        "cifar10-white-filter": lambda: _sizes("cifar10", "white, filter"),
        "fashion": lambda: _table("fashion"),
    },
)
