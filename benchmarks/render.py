"""Fills the texts between markers in README, guides and benchmarks/README.md, from the raw outputs.

A marker is a comment with the name of a figure, `<!-- soundness.violations-l2 -->`; the text ends at `<!-- end -->`.
"""

import functools
import re
from collections.abc import Callable, Mapping

from benchmarks.benchmark import RESULTS, TOP, Benchmark, Line, load, markdown

MARKED = re.compile(r"<!-- ([\w-]+\.[\w.-]+) -->(.*?)<!-- end -->", re.DOTALL)


def render(benchmarks: Mapping[str, Benchmark], *, check: bool) -> int:
    """Fill all pages; with `check` only say which would change.

    Returns:
      The exit status: 1 if a page would change, a marker has no figure, or a figure is used nowhere.
    """
    figures: dict[str, Callable[[], str]] = {
        f"{name}.{figure}": text for name, benchmark in benchmarks.items() for figure, text in benchmark.figures.items()
    }
    for of_all in (overview, missed, measurements):
        figures[f"benchmarks.{of_all.__name__}"] = functools.partial(of_all, benchmarks)
    used: set[str] = set()
    wrong: list[str] = []

    def fill(found: re.Match[str]) -> str:
        name = found[1]
        used.add(name)
        if name not in figures:
            wrong.append(f"no benchmark has the figure {name}")
            return found[0]
        text = figures[name]()
        if "\n" not in text and text[:1] != "|" and found.start() and found.string[found.start() - 1] == "\n":
            wrong.append(f"{name} begins a line, which would begin a block of HTML")
        block = f"\n\n{text}\n\n" if text.startswith("|") or "\n" in text else text
        return f"<!-- {name} -->{block}<!-- end -->"

    for page in [TOP / "README.md", *sorted((TOP / "docs").glob("*.md")), TOP / "benchmarks" / "README.md"]:
        text = page.read_text()
        new = MARKED.sub(fill, text)
        if text != new:
            name = page.relative_to(TOP)
            if check:
                wrong.append(f"{name} is not what `python -m benchmarks render` makes of the raw outputs")
            else:
                page.write_text(new)
                print(f"changed {name}")
    wrong += [f"no page uses the figure {name}" for name in figures if name not in used]
    print("\n".join(wrong) or "README and guides show what the raw outputs say")
    return 1 if wrong else 0


def lines(benchmark: Benchmark) -> dict[str, list[Line]]:
    """The lines of each raw output that there is."""
    there = {name: of for name, of in benchmark.outputs.items() if (RESULTS / f"{name}.json").exists()}
    return {name: [*of(load(name))] for name, of in there.items()}


def overview(benchmarks: Mapping[str, Benchmark]) -> str:
    """A table of all benchmarks: the claim, whether its bars are met, and what a run takes."""
    rows = []
    for name, benchmark in benchmarks.items():
        found = lines(benchmark)
        held = [line.holds for some in found.values() for line in some if line.holds is not None]
        stands = (
            f"{sum(held)} of {len(held)} met" if held else "no bar" if found else "not run" * bool(benchmark.outputs)
        )
        rows.append([f"`{name}`", benchmark.claim, stands, benchmark.takes])
    return markdown(["name", "shows", "bars", "takes (2 cores)"], rows)


def missed(benchmarks: Mapping[str, Benchmark]) -> str:
    """A table of the bars that are not met."""
    found = [line for benchmark in benchmarks.values() for some in lines(benchmark).values() for line in some]
    return markdown(["what", "figure", "bar"], [line[:3] for line in found if line.holds is False])


def measurements(benchmarks: Mapping[str, Benchmark]) -> str:
    """The lines of all raw outputs, a section for each benchmark."""
    parts = []
    for name, benchmark in benchmarks.items():
        if found := lines(benchmark):
            parts.append(f"## {name}\n\n{benchmark.claim}")
        for output, some in found.items():
            document = load(output)
            machine = document["machine"]
            device = f"{machine['cores']} CPU cores" if machine["device"] == "cpu" else machine["device"]
            made = f"[{output}.json](../benchmarks/results/{output}.json), {document['date'][:10]}, {device}:"
            bars = any(line.bar for line in some)
            header = ["what", "figure", *(["bar", "met"] if bars else [])]
            met = {None: "", True: "yes", False: "**no**"}
            rows = [[s.what, s.figure, *([s.bar, met[s.holds]] if bars else [])] for s in some]
            parts += [made, markdown(header, rows)]
    return "\n\n".join(parts)
