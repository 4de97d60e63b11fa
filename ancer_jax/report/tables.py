"""Tables of the figures of runs, side by side."""

import dataclasses
import fractions
import statistics
from collections.abc import Sequence

import numpy as np
import tabulate

from ancer_jax._numerics import geometric_mean
from ancer_jax.basis import Pixels
from ancer_jax.metrics import round_down, round_up
from ancer_jax.report.notes import caveats, footnotes, mark, notes, shortest
from ancer_jax.report.results import LEAKY_ABOVE, Results

_NOT_MEASURED = "not measured"


def summary_table(results: list[Results], radii: Sequence[float], leaky_above: float = LEAKY_ABOVE) -> str:
    """The tables of `summary` and their notes, as GitHub-style text."""
    (_, figures), *others = summary(results, radii, leaky_above)
    parts = [part for title, rows in others for part in (title, format_table(rows))]
    return "\n\n".join([format_table(figures), *caveats(results, leaky_above), *parts, *notes(results)])


def summary(
    results: list[Results], radii: Sequence[float], leaky_above: float = LEAKY_ABOVE
) -> list[tuple[str, list[dict[str, str]]]]:
    """Tables with their titles: the main figures of each run; certified accuracy at `radii`; and for data-dependent
    noise, what the memory changed and how much the noise leaks.

    Every figure is over all images of its run. Certified figures are rounded down, leakage is rounded up. In ACR and
    ACR-tilde an abstention or a wrong answer counts as radius 0. If a run has a memory, all its figures are after
    memory, unless they say "before".
    """
    tables = [("Figures", _figures(results)), ("Certified accuracy at", _accuracies(results, radii))]
    if memories := [_memory(r) for r in results if "changed" in r.columns]:
        tables.append(("Memory (before -> after)", memories))
    if leakages := [_leakage(r, leaky_above) for r in results if r.data_dependent]:
        known = f"figures that count only thetas known to leak at most {shortest(leaky_above)}"
        tables.append((f"Leakage into each image's class; {known}", leakages))
    return tables


def format_table(rows: list[dict[str, str]]) -> str:
    """Rows with the same keys as a GitHub-style table."""
    return tabulate.tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def compare_proxy_radius(results: list[Results], best: Results) -> str:
    """Mean proxy radius, after memory, of the best fixed theta's run and of each other run, as text.

    The certificates of `best` must use other draws than those that chose its theta: a theta chosen by its own
    certifying draws is wrong more often than alpha.
    """
    lines = []
    for r in (best, *(r for r in results if r is not best)):
        ratio = r.mean_proxy_radius / best.mean_proxy_radius if best.mean_proxy_radius else float("inf")
        text, kept = f"{round_down(ratio, 2)} x the best fixed theta", r.leaks_at_most(LEAKY_ABOVE)
        if r.data_dependent:
            without = _NOT_MEASURED if kept is None else round_down((r["radius_proxy"] * kept).mean(), 3)
            text += f"; without leaky thetas {without}"
        lines.append(f"  {mark(r):13} {round_down(r.mean_proxy_radius, 3)}   {text}")
    return "\n".join([*lines, *footnotes(results)])


def percent(share: float) -> str:
    """A share in percent, with three digits: 0% only if it is 0."""
    return f"{100 * share:.3g}%"


def _figures(results: list[Results]) -> list[dict[str, str]]:
    sampled = any(r.config and r.config.sampling for r in results)
    certain = any(r.alpha is not None for r in results)
    mapped = any(r.config and (r.config.method == "universal" or r.config.basis != Pixels()) for r in results)
    return [
        {
            "run": mark(r),
            "norm": r.norm or "?",
            **({"theta": _theta(r)} if mapped else {}),
            "images": str(len(r.correct)) + " (unfinished)" * (not r.finished),
            **(
                {"draws": f"{r['n'].mean():,.0f}" if "n" in r.columns else "-", "passes": _passes(r)} if sampled else {}
            ),
            **({"all lines hold": _joint(r)} if certain else {}),
            "accuracy": _share(r.correct),
            "abstained": _share(r.abstained),
            "ACR": round_down(r.acr("radius"), 3),
            "median radius": round_down(np.median(r["radius"] * r.correct), 3),
            "ACR-tilde": round_down(r.acr("radius_proxy"), 3),
            "median proxy": round_down(np.median(r["radius_proxy"] * r.correct), 3),
            "theta at its limit": _at_limit(r),
            "s/image": "-" if r.seconds is None else f"{r.seconds:.2f}",
        }
        for r in results
    ]


def _theta(results: Results) -> str:
    """The basis, if it is not the pixels, and the theta of all images; of a theta map its range and geometric mean."""
    if results.config is None:
        return "?"
    basis, theta = results.config.basis.name, "of each image"
    if results.data_dependent is False:
        (values,) = results.thetas(results["idx"][:1].tolist()).values()
        low, mean, high = (f"{value:.3g}" for value in (values.min(), geometric_mean(values), values.max()))
        theta = low if low == high else f"{low} to {high}, geometric mean {mean}"
    return theta if basis == "pixels" else f"{basis}: {theta}"


def _passes(results: Results) -> str:
    """Noisy copies per image that the network classified to certify."""
    total = results.run.passes() if results.run else None
    return "-" if total is None else f"{total / len(results.correct):,.0f}"


def _joint(results: Results) -> str:
    """Lower bound on the probability that all certificates of a table hold."""
    if results.alpha is None:
        return "-"
    certain = 1 - len(results.correct) * results.alpha
    return "always" if certain == 1 else f"p >= {round_down(certain, 4)}" if certain > 0 else "nothing is known"


def _share(mask: np.ndarray) -> str:
    return round_down(fractions.Fraction(int(mask.sum()), len(mask)), 3)


def _at_limit(results: Results) -> str:
    """How many inputs have coordinates of theta at the limit, and the mean share of these coordinates."""
    share = results.columns.get("at_theta_max")
    if share is None or not results.data_dependent:
        return "-"
    at = share[share > 0]
    return f"{len(at)} of {len(share)}" + (f" ({percent(at.mean())} of coordinates)" if len(at) else "")


def _accuracies(results: list[Results], radii: Sequence[float]) -> list[dict[str, str]]:
    return [
        {"run": mark(r), "by": by} | {shortest(at): _share(r.correct & (r[column] >= at)) for at in radii}
        for by, column in (("radius", "radius"), ("proxy radius", "radius_proxy"))
        for r in results
        if column == "radius" or not r.only_balls
    ]


def _memory(results: Results) -> dict[str, str]:
    """What the memory changed in a run."""
    changed, inside = results["changed"] == 1, str(int((results["answered_by"] >= 0).sum()))
    row = {"run": mark(results), "regions changed": f"{int(changed.sum())} of {len(changed)}"}
    if results.before is None:
        return row | {"inside an earlier region": inside}
    before = dataclasses.replace(results, columns=results.before, before=None)
    had = changed & (before["gap"] > 0)
    kept = results["gap"][had] / before["gap"][had]
    row["gap after / before, median (smallest)"] = (
        f"{round_down(np.median(kept), 3)} ({round_down(kept.min(), 3)})" if kept.size else "-"
    )
    row["inside an earlier region"] = inside
    row["answered with its class"] = str(int((results["predict"] != before["predict"]).sum()))
    row["accuracy"] = f"{_share(before.correct)} -> {_share(results.correct)}"
    for name, column in (("ACR", "radius"), ("ACR-tilde", "radius_proxy")):
        row[name] = f"{round_down(before.acr(column), 3)} -> {round_down(results.acr(column), 3)}"
    return row


def _leakage(results: Results, limit: float) -> dict[str, str]:
    """Leakage of answered inputs, and figures in which those not known to leak at most the limit count as 0."""
    row, known, soft = {"run": mark(results)}, results.leakages(), results.leakages("soft_leakage")
    for name, figure in (("median", statistics.median), ("mean", statistics.mean), ("largest", max)):
        row[name] = round_up(figure(known), 3) if known else _NOT_MEASURED
    row["mean soft, held out"] = round_up(statistics.mean(soft), 3) if soft else _NOT_MEASURED
    row[f"above {shortest(limit)}"] = f"{results.leaky(limit)} of {len(known)}" if known else _NOT_MEASURED
    kept = results.leaks_at_most(limit)
    names = [f"{figure} without leaky" for figure in ("accuracy", "ACR", "ACR-tilde")]
    if kept is None:
        return row | dict.fromkeys(names, _NOT_MEASURED)
    acr = [round_down(results.acr(column, kept), 3) for column in ("radius", "radius_proxy")]
    return row | dict(zip(names, (_share(results.correct & kept), *acr), strict=True))
