"""Fill the table of numbers in benchmarks/README.md from the stored raw outputs.

python benchmarks/table.py
"""

import fractions
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import record

from ancer_jax.metrics import round_down, round_up

README = pathlib.Path(__file__).parent / "README.md"
BEGIN, END = "<!-- table: python benchmarks/table.py -->", "<!-- end of table -->"
# Older raw outputs have the words that the library used then.
RENAMED = {"shared": "universal", "reference": "published"}
WITHOUT_LEAKY = "ACR-tilde without leaky"

Line = tuple[str, str, str]  # what, figure, bar
Lines = Iterator[Line]


def share(value: float, images: int) -> str:
    """A share of so many images, rounded down as the fraction that it is: 0.57 of 100 images is 0.570."""
    return round_down(fractions.Fraction(round(value * images), images), 3)


def down(row: dict[str, Any], *names: str) -> str:
    """Figures of a row, rounded down."""
    return "; ".join("not measured" if row[name] is None else round_down(row[name], 3) for name in names)


def soundness(found: dict[str, Any]) -> Lines:
    for r in found["results"]["rows"]:
        case = f"{r['norm']}, d = {r['d']}"
        figure = f"{r['violations']} (p-value {r['p_value']:.2f}); {r['violations_if_5_percent_larger']} if 5 % larger"
        yield f"{case}: violated certificates of {r['seeds']:,} (alpha {r['alpha']})", figure, "p-value >= 0.01"
        yield f"{case}: median gap / true gap", f"{r['median_ratio']:.3f}", ">= 0.95"


def invariance(found: dict[str, Any]) -> Lines:
    rows, images = found["results"]["rows"], found["results"]["images"]
    what = f"images whose counts depend on chunk, batch, order or devices, of {len(rows)} x {images}"
    yield what, str(sum(r["images_that_differ"] for r in rows)), "0"


def overhead(found: dict[str, Any]) -> Lines:
    bars, best = found["results"]["bars"], found["results"]["best"]
    for r in found["results"]["rows"]:
        certify, bare, noise = (f"{r[name + '_us_per_row']:,.1f}" for name in ("certify", "bare", "noise"))
        judged = r["network"] in bars and best[r["network"]]["chunk"] == r["chunk"]
        what = f"{r['network']}, chunk {r['chunk']}: certification / bare forward passes"
        figure = f"{r['ratio']:.2f} ({certify} / {bare} us a row, noise {noise})"
        yield what, figure, f"<= {bars[r['network']]}" if judged else ""


def memory(found: dict[str, Any]) -> Lines:
    few, many = found["results"]["rows"]
    figure = f"{found['results']['ratio']:.3f} ({many['peak_mib']:.0f} / {few['peak_mib']:.0f} MiB)"
    yield f"peak memory, n = {many['n']:,} / n = {few['n']:,}", figure, "<= 1.05"


def demo(found: dict[str, Any]) -> Lines:
    for r in found["results"]:
        mean = r["mean_proxy_radius"]
        fixed = max(value for name, value in mean.items() if name.startswith("fixed"))
        figure = " / ".join(round_down(value, 3) for value in (mean["ancer"], mean["isotropic"], fixed))
        yield f"demo, {r['norm']}: mean proxy radius, ANCER / isotropic / best fixed", figure, "falling"
        yield f"demo, {r['norm']}: seconds from start to table", f"{r['seconds']:.0f}", "<= 300"


def reconcile(found: dict[str, Any]) -> Lines:
    for r in found["results"]["rows"]:
        what = f"l{r['norm']}: seconds for {r['count']:,} regions of 3,072 coordinates, {r['case']}"
        figure = f"{r['seconds']:.1f} ({r['exact_share']:.1%} of pairs tested, {r['peak_gib']:.2f} GiB)"
        yield what, figure, "<= 60" if r["case"] == "apart" else "<= 600"
    for r in found["results"]["inserts"]:
        what = f"l{r['norm']}: ms for one more insertion, {r['stored']:,} stored, {r['case']}"
        yield what, f"{r['ms_per_insert']:.1f}", ""


def hard_cases(found: dict[str, Any]) -> Lines:
    for r in found["results"]:
        what = f"{r['case']}, {r['norm']}: regions changed; images given the class of another, of {r['images']}"
        yield what, f"{r['changed']}; {r['overruled']}", ""


def leakage(found: dict[str, Any]) -> Lines:
    for r in found["results"]["rows"]:
        if r["method"] != "fixed":
            figure = f"{round_down(r['acr_tilde'], 3)}; {round_up(r['mean_leakage'], 3)}"
            yield f"{r['norm']}, {r['noise']}: ACR-tilde after memory; mean leakage", figure, ""
    if cost := found["results"].get("cost"):
        yield f"leakage / certification, n = {cost['n']:,}, in time", f"{cost['ratio']:.3f}", "<= 0.15"


def best_fixed(found: dict[str, Any]) -> Lines:
    images = found["results"]["images"]
    for r in found["results"]["rows"]:
        what = f"{r['norm']}, fixed {r['theta']:g}, seed {r['seed']}, {images} images: accuracy; ACR"
        yield what, f"{share(r['accuracy'], images)}; {down(r, 'ACR')}", ""


def training(found: dict[str, Any]) -> Lines:
    for name, acr in found["results"]["acr"].items():
        what = f"ACR after {found['results']['epochs']} epochs of {name}, mean of {len(found['seed'])} seeds"
        yield what, round_down(acr, 3), "> augmentation" if name in ("smoothadv", "macer") else ""


def volume_training(found: dict[str, Any]) -> Lines:
    for name, acr in found["results"]["acr"].items():
        what = f"ACR after {found['results']['epochs']} epochs, {name}, mean of {len(found['seed'])} seeds"
        yield what, round_down(acr, 3), "> augmentation" if name.endswith("volume") else ""


def shared_theta(found: dict[str, Any]) -> Lines:
    for r in found["results"]["rows"]:
        method = RENAMED.get(r["method"], r["method"])
        if method == "universal":  # an older raw output has the figure of all thetas here
            r = r | {WITHOUT_LEAKY: None}
        what = f"{r['norm']}, {method}, {found['results']['images']} images: ACR; ACR-tilde; {WITHOUT_LEAKY}"
        yield what, down(r, "ACR", "ACR-tilde", WITHOUT_LEAKY), "ACR-tilde > fixed" if method == "universal" else ""


def attack(found: dict[str, Any]) -> Lines:
    for r in found["results"]["rows"]:
        what = f"{r['norm']}, {r['method']}: answers changed by an attack in regions {r['size']:g} times as large"
        figure = f"{r['attack_flips']} of {r['certified']} (random points: {r['random_flips']})"
        yield what, figure, "0" if r["size"] == 1 else ""


def gradients(found: dict[str, Any]) -> Lines:
    for r in found["results"]["rows"]:
        what = f"{r['estimate']}, n = {r['n']:,}: bias and spread of derivatives in x; in theta"
        yield what, "; ".join(f"{r[f'bias_{v}']:.3f}, {r[f'spread_{v}']:.2f}" for v in ("x", "theta")), ""


def sequential(found: dict[str, Any]) -> Lines:
    for r in found["results"]["simulated"]["draws"]:
        what = f"simulated draws to decide radius {r['radius']:g} at sigma 1: ours / confidence sequence (published)"
        yield what, f"{r['ours']:,.0f} / {r['confidence sequence']:,.0f} ({r['published']:,})", "< 1"
    yield from sequential_runs(found)


def sequential_runs(found: dict[str, Any]) -> Lines:
    for r in found["results"]["rows"]:
        what = f"{r['case']}, {r['images']} images, {r['rule']}: times fewer draws (an oracle); decisions lost"
        figure = f"{r['fewer']:.1f} ({r['fewer, least']:.1f}); {r['sure decisions lost']}"
        yield what, figure, ">= 3; 0" if "tolerance" in r["rule"] else ">= 20; 0"


def search(found: dict[str, Any]) -> Lines:
    for r in found["results"]:
        schedule = RENAMED.get(r["schedule"], r["schedule"])
        what = f"{r['case']}, {r['images']} images, {schedule}: passes; proxy radius (leakage) of both searches"
        both = (
            f"{round_down(r[f'{stage} proxy radius'], 3)} ({round_up(r[f'{stage} leakage'], 3)})"
            for stage in ("isotropic", "anisotropic")
        )
        yield what, "; ".join([f"{r['passes']:,}", *both]), ">= published" if r["preset"] and schedule == "fast" else ""


def splitting(found: dict[str, Any]) -> Lines:
    for r in found["results"]:
        what = f"l1, {r['noise']} {r['theta']:g}, {r['method']}, n = {r['n']}: passes; ACR; ACR-tilde; {WITHOUT_LEAKY}"
        figure = f"{r['passes']:,.0f}; {down(r, 'ACR', 'ACR-tilde', WITHOUT_LEAKY)}"
        yield what, figure, "ACR > uniform" if (r["method"], r["n"]) == ("fixed", "exact") else ""


def cifar10(found: dict[str, Any]) -> Lines:
    for r in found["results"]["rows"]:
        if r["run"] != "network":
            what = f"CIFAR-10, {r['norm']}, {r['run']}, {r['images']} images: accuracy; ACR; ACR-tilde after memory"
            yield what, f"{share(r['accuracy'], r['images'])}; {down(r, 'ACR', 'ACR-tilde')}", ""


def field(found: dict[str, Any]) -> Lines:
    for r in found["results"]["rows"]:
        if r["run"] != "network":
            names = [name for name in ("ACR", "ACR-tilde", WITHOUT_LEAKY) if name in r]
            figures = ([share(r["accuracy"], r["images"])] if "accuracy" in r else []) + [down(r, *names)]
            names = ["accuracy", *names] if "accuracy" in r else names
            what = f"CIFAR-10, {r['norm']}, sigma {r['sigma']}, {r['run']}, {r['images']} images, after memory: "
            yield what + "; ".join(names), "; ".join(figures), ""


def peers(found: dict[str, Any]) -> Lines:
    r = found["results"]
    network, bar = r["network"], ">= reference" if found["machine"]["device"] == "cpu" else ">= 4 x reference"
    for phase in (name for name, one in r.items() if isinstance(one, dict) and "rates" in one):
        rates = " / ".join(f"{rate:,.0f}" for rate in r[phase]["rates"].values())
        yield f"{network}, {phase}, passes a second: {' / '.join(r[phase]['rates'])}", rates, bar
    first = r["first certificate"]
    what = f"{network}, seconds from start to the first certificate: {' / '.join(first)}"
    yield what, " / ".join(f"{seconds:.1f}" for seconds in first.values()), ""
    for where in ("host", "device"):
        if mib := {who: m[f"{where}_mib"] for who, m in r["memory"].items() if m[f"{where}_mib"]}:
            what = f"{network}, peak memory of the {where} in MiB: {' / '.join(mib)}"
            yield what, " / ".join(f"{value:,.0f}" for value in mib.values()), ""


def whole(found: dict[str, Any]) -> Lines:
    r = found["results"]
    draws = " / ".join(f"{n:,.0f}" for n in r["draws"].values())
    what = f"{r['network']}, seconds for an image, start to end: {' / '.join(r['seconds'])}"
    figure = " / ".join(f"{seconds:,.0f}" for seconds in r["seconds"].values())
    ratio = round_down(r["times faster"], 1)
    yield f"{what} ({r['images']} images; {draws} draws)", f"{figure} (ratio {ratio})", "ratio >= 10"


def loading(found: dict[str, Any]) -> Lines:
    for r in found["results"]["rows"]:
        what = f"CIFAR-10, {r['split']}, {r['format']}: images, labels, ids as in the authors' files"
        figure = f"{r['same images']}, {r['labels']}, {r['ids']} ({r['images']:,} images)"
        yield what, figure, "True, True, True"


def faults(found: dict[str, Any]) -> Lines:
    r, total = found["results"], sum(found["results"]["faults"].values())
    what = f"{total} faults in {sum(r['runs'].values())} runs: shards lost; images twice; other bytes at the end"
    yield what, f"{r['lost']}; {r['twice']}; {r['different']}", "0; 0; 0"


def scaling(found: dict[str, Any]) -> Lines:
    for r in found["results"]["sharded_path"]:
        what = f"{r['network']}, one device: batches through the sharded path / plain jit and vmap"
        yield what, f"{r['ratio']:.3f}", "<= 1.03"


def convolution(found: dict[str, Any]) -> Lines:
    for r in found["results"]["rows"]:
        figure = " / ".join(f"{r[who + '_us_per_row']:,.0f}" for who in ("xla", "ours", "cores"))
        devices = found["results"]["devices"]
        yield f"{r['network']}, {r['what']}: us a row, XLA / ours / ours, {devices} devices", figure, ""


# In the order of the table: the name of a raw output, and its lines.
SECTIONS: dict[str, Callable[[dict[str, Any]], Lines]] = {
    "soundness": soundness,
    "invariance": invariance,
    "overhead": overhead,
    "memory": memory,
    "demo": demo,
    "reconcile": reconcile,
    "hard_cases": hard_cases,
    "leakage": leakage,
    "best_fixed": best_fixed,
    "training": training,
    "volume_training": volume_training,
    "shared_theta": shared_theta,
    "attack": attack,
    "gradients": gradients,
    "sequential": sequential,
    "sequential-cifar10-l1": sequential_runs,
    "search": search,
    "search-cifar10-l1": search,
    "splitting": splitting,
    "cifar10": cifar10,
    "peers-ancer_resnet18": peers,
    "whole-ancer_resnet18": whole,
    "peers-wrn_40_2": peers,
    "whole-wrn_40_2": whole,
    "field": field,
    "loading": loading,
    "faults": faults,
    "scaling": scaling,
    "convolution": convolution,
}


def main() -> None:
    table = ["| what | figure | bar | raw output | made |", "|---|---|---|---|---|"]
    for name, lines in SECTIONS.items():
        path = record.RESULTS / f"{name}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        machine = found["machine"]
        device = f"{machine['cores']} cores" if machine["device"] == "cpu" else machine["device"]
        made = f"[{name}.json](results/{name}.json) | {found['date'][:10]}, {device}"
        table += [f"| {what} | {figure} | {bar} | {made} |" for what, figure, bar in lines(found)]
    text = README.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(before + "\n".join([BEGIN, *table, END]) + after)


if __name__ == "__main__":
    main()
