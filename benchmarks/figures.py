"""Figures of a finished run that several benchmarks report."""

from typing import Any

import numpy as np

from ancer_jax.report import LEAKAGE_LIMIT, Results


def summary(results: Results) -> dict[str, Any]:
    """Accuracy, ACR and ACR-tilde over all images; after memory, if the run has one."""
    accuracy = float(results.correct.mean())
    return {"accuracy": accuracy, "ACR": results.acr("radius"), "ACR-tilde": results.acr("radius_proxy")}


def without_leaky(results: Results, column: str, limit: float = LEAKAGE_LIMIT) -> float | None:
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
