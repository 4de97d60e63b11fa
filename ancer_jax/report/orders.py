"""How much the figures of the classifier with memory depend on the order in which the inputs came."""

import fractions
from typing import Any

import numpy as np
from etils import epath

from ancer_jax import memory
from ancer_jax.metrics import average_certified_radius, round_down
from ancer_jax.regions import Region, proxy_radius, radius
from ancer_jax.report.tables import Results
from ancer_jax.runs import read_run


def order_figures(path: epath.PathLike, order: np.ndarray | None = None) -> dict[str, Any]:
    """Accuracy, ACR, ACR-tilde and number of changed regions of a run, had its inputs come in another order.

    Args:
      path: run directory that has gone through a memory.
      order: permutation of the inputs, which are in order of ids; None is that order.

    Raises:
      ValueError: if the run has no memory of all its inputs.
    """
    run = read_run(path)
    stored = run.read_memory()
    columns = run.columns("labels", "predictions", "gap")
    if stored is None or len(stored[1]) != len(columns["ids"]):
        raise ValueError(f"{path}: its inputs have not gone through a memory; certify again to finish the run")
    regions = stored[0].regions
    rows = np.arange(len(columns["ids"])) if order is None else order
    given = Region(regions.center[rows], regions.theta[rows], columns["gap"][rows], regions.norm)
    _, info = memory.insert_batch(memory.empty(regions.norm), given, columns["predictions"][rows])
    correct = info.prediction == columns["labels"][rows]
    one_by_one = [
        Region(center, theta, gap, regions.norm)
        for center, theta, gap in zip(given.center, given.theta, info.region.gap, strict=True)
    ]
    return {
        "accuracy": fractions.Fraction(int(correct.sum()), len(correct)),
        "ACR": average_certified_radius([radius(region) for region in one_by_one], correct),
        "ACR-tilde": average_certified_radius([proxy_radius(region) for region in one_by_one], correct),
        "regions changed": int(info.changed.sum()),
    }


def order_rows(results: list[Results], *, orders: int, seed: int = 0) -> list[dict[str, str]]:
    """Figures of each run in order of ids, and their range over random orders: rows of a table.

    Raises:
      ValueError: if one is of no run directory, or has no memory of all its inputs.
    """
    rows = []
    for r in results:
        if r.run is None:
            raise ValueError(f"{r.name} is no run directory: it has no memory")
        path, count, rng = r.run.path, len(r.correct), np.random.default_rng(seed)
        by_id = order_figures(path)
        others = [order_figures(path, rng.permutation(count)) for _ in range(orders)]
        row = {"run": r.name, "random orders": str(orders)}
        for name, figure in by_id.items():
            values = (figure, min(other[name] for other in others), max(other[name] for other in others))
            text = [str(value) if isinstance(value, int) else round_down(value, 4) for value in values]
            row[name] = f"{text[0]} ({text[1]} to {text[2]})"
        rows.append(row)
    return rows
