"""Fill the table of numbers in benchmarks/README.md from the stored raw outputs.

python benchmarks/table.py
"""

import json
import pathlib

import record

from ancer_jax.metrics import round_down, round_up

README = pathlib.Path(__file__).parent / "README.md"
BEGIN, END = "<!-- table: python benchmarks/table.py -->", "<!-- end of table -->"


def lines():
    """(what, figure, bar, file) of everything that is stored."""
    load = lambda name: json.loads(path.read_text()) if (path := record.RESULTS / f"{name}.json").exists() else None
    if found := load("soundness"):
        for r in found["results"]["rows"]:
            what = f"{r['norm']}, d = {r['d']}: violated certificates of {r['seeds']:,} (alpha {r['alpha']})"
            figure = (
                f"{r['violations']} (p-value {r['p_value']:.2f}); {r['violations_if_5_percent_larger']} if 5 % larger"
            )
            yield what, figure, "p-value >= 0.01", "soundness", found
            yield f"{r['norm']}, d = {r['d']}: median gap / true gap", f"{r['median_ratio']:.3f}", ">= 0.95", "", found
    if found := load("invariance"):
        rows, images = found["results"]["rows"], found["results"]["images"]
        what = f"images whose counts depend on chunk, batch, order or devices, of {len(rows)} x {images}"
        yield what, sum(r["images_that_differ"] for r in rows), "0", "invariance", found
    if found := load("overhead"):
        for r in found["results"]["rows"]:
            what = f"{r['network']}, chunk {r['chunk']}: certification / bare forward"
            certify, bare, noise = (f"{r[name + '_us_per_row']:,.1f}" for name in ("certify", "bare", "noise"))
            best = found["results"]["best"][r["network"]]["chunk"] == r["chunk"]
            bars = found["results"]["bars"]
            bar = f"<= {bars[r['network']]}" if best and r["network"] in bars else ""
            yield what, f"{r['ratio']:.2f} ({certify} / {bare} us a row, noise {noise})", bar, "overhead", found
    if found := load("memory"):
        small, large = found["results"]["rows"]
        figure = f"{found['results']['ratio']:.3f} ({large['peak_mib']:.0f} / {small['peak_mib']:.0f} MiB)"
        yield f"peak memory, n = {large['n']:,} / n = {small['n']:,}", figure, "<= 1.05", "memory", found
    if found := load("demo"):
        for r in found["results"]:
            mean = r["mean_proxy_radius"]
            fixed = max(value for name, value in mean.items() if name.startswith("fixed"))
            figure = " / ".join(round_down(value, 3) for value in (mean["ancer"], mean["isotropic"], fixed))
            yield (
                f"demo, {r['norm']}: mean proxy radius, ANCER / isotropic / best fixed",
                figure,
                "falling",
                "demo",
                found,
            )
            yield f"demo, {r['norm']}: seconds from start to table", f"{r['seconds']:.0f}", "<= 300", "", found
    if found := load("reconcile"):
        for r in found["results"]["rows"]:
            what = f"l{r['norm']}: seconds for {r['count']:,} regions of 3,072 coordinates, {r['case']}"
            figure = f"{r['seconds']:.1f} ({r['exact_share']:.1%} of pairs tested, {r['peak_gib']:.2f} GiB)"
            yield what, figure, "<= 60" if r["case"] == "apart" else "<= 600", "reconcile", found
        for r in found["results"]["inserts"]:
            what = f"l{r['norm']}: ms for one more insertion, {r['stored']:,} stored, {r['case']}"
            yield what, f"{r['ms_per_insert']:.1f}", "", "reconcile", found
    if found := load("hard_cases"):
        for r in found["results"]:
            what = f"{r['case']}, {r['norm']}: regions changed; images given another's class, of {r['images']}"
            yield what, f"{r['changed']}; {r['overruled']}", "", "hard_cases", found
    if found := load("leakage"):
        for r in found["results"]["rows"]:
            if r["method"] != "fixed":
                what = f"{r['norm']}, {r['noise']}: ACR-tilde after memory; mean leakage"
                figure = f"{round_down(r['acr_tilde'], 3)}; {round_up(r['mean_leakage'], 3)}"
                yield what, figure, "", "leakage", found
        if cost := found["results"].get("cost"):
            yield f"leakage / certification, n = {cost['n']:,}", f"{cost['ratio']:.3f}", "<= 0.15", "leakage", found
    if found := load("best_fixed"):
        for r in found["results"]["rows"]:
            images = found["results"]["images"]
            what = f"{r['norm']}, fixed {r['theta']:g}, seed {r['seed']}, {images} images: accuracy; ACR"
            yield what, f"{round_down(r['accuracy'], 3)}; {round_down(r['ACR'], 3)}", "", "best_fixed", found
    if found := load("training"):
        for name, acr in found["results"]["acr"].items():
            bar = "> augmentation" if name in ("smoothadv", "macer") else ""
            what = f"ACR after {found['results']['epochs']} epochs of {name}, mean of {len(found['seed'])} seeds"
            yield what, round_down(acr, 3), bar, "training", found
    if found := load("volume_training"):
        for name, acr in found["results"]["acr"].items():
            bar = "> augmentation" if name.endswith("volume") else ""
            what = f"ACR after {found['results']['epochs']} epochs, {name}, mean of {len(found['seed'])} seeds"
            yield what, round_down(acr, 3), bar, "volume_training", found
    if found := load("shared_theta"):
        for r in found["results"]["rows"]:
            images = found["results"]["images"]
            what = f"{r['norm']}, {r['method']}, {images} images: ACR; ACR-tilde; without leaky thetas"
            figure = "; ".join(round_down(r[name], 3) for name in ("ACR", "ACR-tilde", "ACR-tilde without leaky"))
            bar = "> fixed" if r["method"] == "shared" else ""
            yield what, figure, bar, "shared_theta", found
    if found := load("attack"):
        for r in found["results"]["rows"]:
            what = f"{r['norm']}, {r['method']}: answers flipped by an attack in regions {r['size']:g} times as large"
            figure = f"{r['attack_flips']} of {r['certified']} (random points: {r['random_flips']})"
            yield what, figure, "0" if r["size"] == 1 else "", "attack", found
    if found := load("gradients"):
        for r in found["results"]["rows"]:
            what = f"{r['estimate']}, n = {r['n']:,}: bias and spread of derivatives in x; in theta"
            figure = "; ".join(f"{r[f'bias_{v}']:.3f}, {r[f'spread_{v}']:.2f}" for v in ("x", "theta"))
            yield what, figure, "", "gradients", found
    if found := load("sequential"):
        for r in found["results"]["simulated"]["draws"]:
            what = (
                f"simulated draws to decide radius {r['radius']:g} at sigma 1: ours / confidence sequence (published)"
            )
            figure = f"{r['ours']:,.0f} / {r['confidence sequence']:,.0f} ({r['published']:,})"
            yield what, figure, "< 1", "sequential", found
    for name in ("sequential", "sequential-cifar10-l1"):
        for r in found["results"]["rows"] if (found := load(name)) else ():
            what = f"{r['case']}, {r['images']} images, {r['rule']}: times fewer draws (an oracle); decisions lost"
            bar = ">= 3; 0" if "tolerance" in r["rule"] else ">= 20; 0"
            yield what, f"{r['fewer']:.1f} ({r['fewer, least']:.1f}); {r['sure decisions lost']}", bar, name, found
    for name in ("search", "search-cifar10-l1"):
        for r in found["results"] if (found := load(name)) else ():
            what = (
                f"{r['case']}, {r['images']} images, {r['schedule']}: passes; proxy radius (leakage) of both searches"
            )
            figure = "; ".join(
                f"{round_down(r[f'{stage} proxy radius'], 3)} ({round_up(r[f'{stage} leakage'], 3)})"
                for stage in ("isotropic", "anisotropic")
            )
            bar = ">= reference" if r["preset"] and r["schedule"] == "fast" else ""
            yield what, f"{r['passes']:,}; {figure}", bar, name, found
    if found := load("splitting"):
        for r in found["results"]:
            what = f"l1, {r['noise']} {r['theta']:g}, {r['method']}, n = {r['n']}: passes; ACR; ACR-tilde; honest"
            figure = "; ".join(round_down(r[name], 3) for name in ("ACR", "ACR-tilde", "ACR-tilde without leaky"))
            bar = "ACR > uniform" if (r["method"], r["n"]) == ("fixed", "exact") else ""
            yield what, f"{r['passes']:,.0f}; {figure}", bar, "splitting", found
    if found := load("cifar10"):
        for r in found["results"]["rows"]:
            if r["run"] != "network":
                what = f"CIFAR-10, {r['norm']}, {r['run']}, {r['images']} images: accuracy; ACR; ACR-tilde after memory"
                figure = "; ".join(round_down(r[name], 3) for name in ("accuracy", "ACR", "ACR-tilde"))
                yield what, figure, "", "cifar10", found
    for network in ("ancer_resnet18", "wrn_40_2"):
        if found := load(f"peers-{network}"):
            r = found["results"]
            for phase in (name for name, one in r.items() if isinstance(one, dict) and "rates" in one):
                what = f"{network}, {phase}, passes a second: {' / '.join(r[phase]['rates'])}"
                bar = ">= reference" if found["machine"]["device"] == "cpu" else ">= 4 x reference"
                rates = " / ".join(f"{rate:,.0f}" for rate in r[phase]["rates"].values())
                yield what, rates, bar, f"peers-{network}", found
            first = r["first certificate"]
            what = f"{network}, seconds from start to the first certificate: {' / '.join(first)}"
            yield what, " / ".join(f"{seconds:.1f}" for seconds in first.values()), "", "", found
            for where in ("host", "device"):
                if memory := {who: m[f"{where}_mib"] for who, m in r["memory"].items() if m[f"{where}_mib"]}:
                    what = f"{network}, peak memory of the {where} in MiB: {' / '.join(memory)}"
                    yield what, " / ".join(f"{mib:,.0f}" for mib in memory.values()), "", "", found
        if found := load(f"whole-{network}"):
            r = found["results"]
            what = f"{network}, seconds for an image, start to end: {' / '.join(r['seconds'])}"
            figure = " / ".join(f"{seconds:,.0f}" for seconds in r["seconds"].values())
            what += f" ({r['images']} images; {' / '.join(f'{n:,.0f}' for n in r['draws'].values())} draws)"
            ratio = round_down(r["times faster"], 1)
            yield what, f"{figure} (ratio {ratio})", "ratio >= 10", f"whole-{network}", found
    if found := load("field"):
        for r in found["results"]["rows"]:
            if r["run"] != "network":
                what = f"CIFAR-10, {r['norm']}, sigma {r['sigma']}, {r['run']}, {r['images']} images, after memory: "
                names = [name for name in ("accuracy", "ACR", "ACR-tilde", "ACR-tilde without leaky") if name in r]
                yield what + "; ".join(names), "; ".join(round_down(r[name], 3) for name in names), "", "field", found
    if found := load("loading"):
        for r in found["results"]["rows"]:
            what = f"CIFAR-10, {r['split']}, {r['format']}: images, labels, ids as in the authors' files"
            figure = f"{r['same images']}, {r['labels']}, {r['ids']} ({r['images']:,} images)"
            yield what, figure, "True, True, True", "loading", found
    if found := load("faults"):
        r, total = found["results"], sum(found["results"]["faults"].values())
        what = f"{total} faults in {sum(r['runs'].values())} runs: shards lost; images twice; other bytes at the end"
        yield what, f"{r['lost']}; {r['twice']}; {r['different']}", "0; 0; 0", "faults", found
    if found := load("scaling"):
        for r in found["results"]["sharded_path"]:
            what = f"{r['network']}, one device: batches through the sharded path / plain jit and vmap"
            yield what, f"{r['ratio']:.3f}", "<= 1.03", "scaling", found
    if found := load("convolution"):
        for r in found["results"]["rows"]:
            figure = " / ".join(f"{r[who + '_us_per_row']:,.0f}" for who in ("xla", "ours", "cores"))
            what = f"{r['network']}, {r['what']}: us a row, XLA / ours / ours, {found['results']['devices']} devices"
            yield what, figure, "", "convolution", found


def main():
    table = ["| what | figure | bar | raw output | made |", "|---|---|---|---|---|"]
    for what, figure, bar, name, found in lines():
        name = name and f"[{name}.json](results/{name}.json)"
        machine = found["machine"]
        device = f"{machine['cores']} cores" if machine["device"] == "cpu" else machine["device"]
        table.append(f"| {what} | {figure} | {bar} | {name} | {found['date'][:10]}, {device} |")
    text = README.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(before + "\n".join([BEGIN, *table, END]) + after)


if __name__ == "__main__":
    main()
