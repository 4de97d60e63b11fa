"""Figures that several benchmarks report: of a finished run, and of a row of a raw output."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ancer_jax.metrics import round_down
from ancer_jax.report import LEAKY_ABOVE, Results

# The radii in the tables of the literature.
RADII = {"l2": (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0), "l1": (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)}
WITHOUT_LEAKY = "ACR-tilde without leaky"  # how reports name this column


def summary(results: Results) -> dict[str, Any]:
    """Accuracy, ACR and ACR-tilde over all images; after memory, if the run has one."""
    accuracy = float(results.correct.mean())
    return {"accuracy": accuracy, "ACR": results.acr("radius"), "ACR-tilde": results.acr("radius_proxy")}


def without_leaky(results: Results, column: str, limit: float = LEAKY_ABOVE) -> float | None:
    """ACR (`column` is "radius") or ACR-tilde ("radius_proxy") if every theta that leaks more certifies nothing.

    None where leakage was not measured.
    """
    kept = results.leaks_at_most(limit)
    return None if kept is None else results.acr(column, kept)


def mean_leakage(results: Results) -> float | None:
    """Mean leakage of the thetas of all images, 0 for an abstention; None where it was not measured."""
    leakage = np.array(results["leakage"], float)
    measured = leakage[~np.isnan(leakage)]
    return float(measured.mean()) if measured.size else None


def down(row: Mapping[str, Any], *names: str) -> str:
    """Figures of a row, rounded down."""
    return "; ".join("not measured" if row[name] is None else round_down(row[name], 3) for name in names)
