"""`ancer-jax report`: runs as tables, as pictures, and as one HTML page."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated

import tyro
from etils import epath

from ancer_jax import report
from ancer_jax._checks import check_real
from ancer_jax.data import BUNDLED_SUBSET, Dataset, load_dataset
from ancer_jax.data.pictures import Crop

RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
RadiiFlag = Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="RADIUS,RADIUS,...")]


@dataclasses.dataclass(frozen=True)
class Report:
    """Compare runs: tables, curves and theta maps as PNG, and one HTML page with all of these and more."""

    runs: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)")
    ]
    """Run directories, or TSV files (ours, Cohen's, ANCER's)."""
    radii: RadiiFlag = None
    """Radii for the table of certified accuracy, separated by commas or spaces; to be named after the runs."""
    leaky_above: float = report.LEAKY_ABOVE
    """Leakage above which a theta counts as leaky, in the figures without leaky thetas."""
    orders: int = 0
    """Insert the images into the memory in this many random orders, too, and show how far the figures move."""
    data: str = BUNDLED_SUBSET
    """Data set of the runs, as in certify; its images are shown."""
    split: str = "test"
    """Part of that data set."""
    crop: Crop = "none"
    """Crop of its pictures, as in certify."""
    out: str = "report"
    """Folder of report.html and of the pictures."""

    def run(self) -> list[report.Results]:
        """Print the tables, draw the pictures, write the page; return the results of the runs."""
        radii = parse_radii(self.radii) or RADII  # first: if --radii comes before the runs, it takes them, too
        if not self.runs:
            raise ValueError("name at least one run directory or TSV file")
        if self.orders < 0:
            raise ValueError(f"--orders must not be negative, got {self.orders}")
        check_real("--leaky-above", self.leaky_above, "[0, 1]")
        if not all(0 <= radius < math.inf for radius in radii):
            raise ValueError(f"--radii must be finite and not negative, got {self.radii}")
        dataset = load_dataset(self.data, split=self.split, crop=self.crop)
        results, more = print_table(self.runs, radii, self.leaky_above), []
        if self.orders:
            with_memory = [r for r in results if "changed" in r.columns]
            if not with_memory:
                raise ValueError("--orders needs a run directory with a memory")
            title = "In order of ids (and the range over random orders)"
            more.append((title, report.order_rows(with_memory, orders=self.orders)))
            print("", title, report.format_table(more[0][1]), sep="\n\n")
        folder = epath.Path(self.out)
        folder.mkdir(parents=True, exist_ok=True)
        drawn, missing = _draw(results, dataset, folder)
        page, limit = folder / "report.html", self.leaky_above
        report.write_page(results, page, radii=radii, leaky_above=limit, datasets=[dataset], more=more)
        print("", "pictures: " + ", ".join(map(str, drawn)), f"page: {page}", *missing, sep="\n")
        return results


def parse_radii(texts: Sequence[str] | None) -> tuple[float, ...] | None:
    """The numbers in texts like "0.25,0.5"."""
    if texts is None:
        return None
    radii = []
    for number in ",".join(texts).split(","):
        try:
            radii.append(float(number))
        except ValueError:
            raise ValueError(f"--radii takes numbers, like 0,0.25,0.5, got {number!r}") from None
    return tuple(radii)


def print_table(
    runs: Sequence[str], radii: Sequence[float], leaky_above: float = report.LEAKY_ABOVE
) -> list[report.Results]:
    """Print the tables of the runs; return their results."""
    results = [report.load_results(run) for run in runs]
    if len({r.name for r in results}) < len(runs):
        results = [dataclasses.replace(r, name=run) for r, run in zip(results, runs, strict=True)]
    print(report.summary_table(results, radii, leaky_above))
    return results


def _draw(results: list[report.Results], dataset: Dataset, folder: epath.Path) -> tuple[list[epath.Path], list[str]]:
    """Draw the curves of all runs and the theta maps of each run of `dataset`: the files, and what is missing."""
    drawn, missing = [folder / "certified_accuracy.png"], []
    report.plot_certified_accuracy(results, drawn[0])
    for i, r in enumerate(results):
        if r.run is None:
            continue
        maps = r.run.config.method in ("ancer", "universal")
        if not r.run.matches(dataset):
            what = "theta maps" if maps else "images"
            missing.append(f"no {what} of {r.run.path}: {dataset.name} is not its data set (--data, --split, --crop)")
        elif maps:
            path = folder / f"theta_{r.run.path.name}.png"
            path = folder / f"theta_{r.run.path.name}_{i}.png" if path in drawn else path
            if report.plot_theta(r, dataset, path):
                drawn.append(path)
    return drawn, missing
