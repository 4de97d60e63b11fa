"""Figures of the memory in other orders of the inputs."""

import fractions
import re

import numpy as np
import pytest

from ancer_jax import report
from ancer_jax.memory import Memory
from ancer_jax.metrics import round_down
from ancer_jax.regions import Region
from ancer_jax.report.orders import order_rows
from tests.memories import certificate
from tests.report.examples import ANCER, from_text
from tests.toy import BUMPS, CROWD, WILD, certify_dataset

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """A run whose regions meet, and its images."""
    path = tmp_path_factory.mktemp("orders") / "crowded"
    certify_dataset(BUMPS, CROWD, WILD, out=path)
    return path


def _one_after_another(path, order):
    """The figures of a run whose images are inserted in this order, one by one."""
    run, memory = report.load_results(path).run, Memory.empty(2)
    columns = run.columns("labels", "predictions", "gap", "theta")
    correct, sizes, changed = [], {"radius": [], "proxy_radius": []}, 0
    for row in order:
        region = Region(CROWD.images[row], columns["theta"][row], columns["gap"][row], 2)
        memory, answer = memory.insert(certificate(region, columns["predictions"][row]))
        correct.append(answer.prediction == columns["labels"][row])
        changed += int(answer.prediction != columns["predictions"][row] or answer.gap != region.gap)
        for name, values in sizes.items():
            values.append(float(getattr(answer, name)) * correct[-1])
    return [fractions.Fraction(sum(map(int, correct)), len(correct)), *map(np.mean, sizes.values()), changed]


def test_the_rows_hold_the_figures_by_id_and_their_range_over_random_orders(crowded):
    (row,) = order_rows([report.load_results(crowded)], orders=3, seed=5)
    rng = np.random.default_rng(5)
    by_id, *others = [
        _one_after_another(crowded, order) for order in (np.arange(12), *(rng.permutation(12) for _ in range(3)))
    ]
    assert len({tuple(figures) for figures in (by_id, *others)}) > 1  # the order matters here
    assert (row["run"], row["random orders"]) == ("crowded", "3")
    names = ("accuracy", "ACR", "ACR-tilde", "regions changed")
    for name, figure, *moved in zip(names, by_id, *others, strict=True):
        found = [float(text) for text in re.fullmatch(r"(\S+) \((\S+) to (\S+)\)", row[name]).groups()]
        expected = [figure, min(moved), max(moved)]
        if name == "regions changed":
            assert found == expected
        else:  # by insertions one by one, the last bits of a gap may differ
            np.testing.assert_allclose(found, [float(round_down(value, 4)) for value in expected], rtol=0, atol=1.1e-4)


def test_the_order_of_ids_gives_the_figures_of_the_run(crowded):
    results = report.load_results(crowded)
    (row,) = order_rows([results], orders=1)
    correct = fractions.Fraction(int(results.correct.sum()), len(results.correct))
    assert results["changed"].any()
    assert row["accuracy"].split()[0] == round_down(correct, 4)
    assert row["ACR"].split()[0] == round_down(results.acr("radius"), 4)
    assert row["ACR-tilde"].split()[0] == round_down(results.acr("radius_proxy"), 4)
    assert row["regions changed"].split()[0] == str(int(results["changed"].sum()))


def test_a_run_without_a_memory_of_all_its_inputs_is_refused(crowded, tmp_path):
    with pytest.raises(ValueError, match="a is not a run directory: it has no memory"):
        order_rows([from_text(tmp_path, "a.tsv", ANCER)], orders=1)
    results = report.load_results(crowded)
    results.run.set_memory_aside()
    with pytest.raises(ValueError, match="not all inputs are in its memory; certify again to finish the run"):
        order_rows([results], orders=1)
