"""How much the figures of the classifier with memory depend on the order of the inputs."""

import dataclasses
import fractions
from typing import Any

import numpy as np

from ancer_jax.memory import Memory
from ancer_jax.metrics import average_certified_radius, round_down
from ancer_jax.report.results import Results
from ancer_jax.smoothing import Certificate


def order_rows(results: list[Results], *, orders: int, seed: int = 0) -> list[dict[str, str]]:
    """Accuracy, ACR, ACR-tilde and number of changed regions of each run: in order of ids, and their range over random
    orders; the rows of a table.

    Raises:
      ValueError: if a run is not a run directory, or has no memory of all its inputs.
    """
    rows = []
    for r in results:
        certificates, labels, rng = _certificates(r), r["label"], np.random.default_rng(seed)
        shuffled = [rng.permutation(len(labels)) for _ in range(orders)]
        by_id, *others = [_figures(certificates[order], labels[order]) for order in (np.arange(len(labels)), *shuffled)]
        row = {"run": r.name, "random orders": str(orders)}
        for name, figure in by_id.items():
            values = (figure, min(other[name] for other in others), max(other[name] for other in others))
            text = [str(value) if isinstance(value, int) else round_down(value, 4) for value in values]
            row[name] = f"{text[0]} ({text[1]} to {text[2]})"
        rows.append(row)
    return rows


def _certificates(results: Results) -> Certificate:
    """The certificates of a run before memory, in order of ids."""
    if results.run is None:
        raise ValueError(f"{results.name} is not a run directory: it has no memory")
    stored, own = results.run.read_memory(), results.own
    if stored is None or len(stored[1]) != len(own["idx"]):
        raise ValueError(f"{results.run.path}: not all inputs are in its memory; certify again to finish the run")
    regions = stored[0].regions
    region = dataclasses.replace(regions, gap=own["gap"])
    alpha = np.full(len(own["idx"]), float(sum(results.alphas)))
    return Certificate(own["predict"], region, own["p_lower"], own["count"], own["n"], alpha)


def _figures(certificates: Certificate, labels: np.ndarray) -> dict[str, Any]:
    """The figures of inputs that come in this order."""
    _, answers = Memory.empty(certificates.region.norm, certificates.region.basis).insert_batch(certificates)
    correct = np.asarray(answers.prediction) == labels
    return {
        "accuracy": fractions.Fraction(int(correct.sum()), len(correct)),
        "ACR": average_certified_radius(answers.radius, correct),
        "ACR-tilde": average_certified_radius(answers.proxy_radius, correct),
        "regions changed": int(np.sum(answers.changed)),
    }
