"""Curves: the numbers that they draw, and the files that they write."""

import dataclasses

import numpy as np
import pytest
from matplotlib.figure import Figure

from ancer_jax import report
from ancer_jax.metrics import certified_accuracy
from ancer_jax.report import curves
from tests.report.examples import ANCER, FIXED, HEADER, MEMORY, from_text, png_size, write_run

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _axis():
    return Figure().subplots()


def _step(line, at):
    """The value at `at` of a line that is drawn in steps: that of its first point that is not left of `at`."""
    assert line.get_drawstyle() == "steps-pre"
    x, y = line.get_data()
    assert (np.diff(x) >= 0).all()
    return y[np.searchsorted(x, at)]


@pytest.mark.parametrize("column", ["radius", "radius_proxy"])
def test_the_curve_is_the_certified_accuracy_at_every_radius(tmp_path, column):
    results = [from_text(tmp_path, "fixed.tsv", FIXED), from_text(tmp_path, "ancer.tsv", ANCER)]
    axis = _axis()
    curves.draw_accuracy(axis, results, column)
    lines = axis.get_lines()
    assert [line.get_label() for line in lines] == ["fixed?", "ancer*"]
    end = 1.05 * max(r[column].max() for r in results)
    assert axis.get_xlim() == (0, end)
    for r, line in zip(results, lines, strict=True):
        jumps = r[column][r[column] > 0]
        at = np.concatenate([np.linspace(0, end, 300), jumps, np.nextafter(jumps, 9), np.nextafter(jumps, 0)])
        np.testing.assert_array_equal(_step(line, at), certified_accuracy(r[column], r.correct, at))


def test_the_curve_agrees_with_the_table(tmp_path):
    results, radii, axis = from_text(tmp_path, "a.tsv", FIXED), [0.0, 0.2, 0.25, 0.5, 1.25], _axis()
    curves.draw_accuracy(axis, [results], "radius")
    ((_, (row,)),) = [table for table in report.summary([results], radii) if "accuracy at" in table[0]]
    for at, text in zip(radii, [*row.values()][2:], strict=True):
        assert float(text) <= _step(axis.get_lines()[0], at) < float(text) + 1e-3


def test_the_distribution_of_p_lower_is_over_all_images_and_before_memory(tmp_path):
    header, *lines = FIXED.splitlines()
    bounds = [0.9, 0.75, 0.6, 0.4, 0.75, 1.0]  # the fourth image is an abstention
    text = "\n".join([f"{header}\tp_lower", *(f"{line}\t{p}" for line, p in zip(lines, bounds, strict=True))])
    results, axis = from_text(tmp_path, "a.tsv", text), _axis()
    after = results.columns | {"predict": np.full(6, -1.0)}
    curves.draw_p_lower(axis, [dataclasses.replace(results, columns=after, before=results.columns)])
    (line,) = axis.get_lines()
    at = [0.5, 0.6, 0.61, 0.75, 0.76, 0.9, 0.91, 1.0]
    np.testing.assert_array_equal(_step(line, at), np.array([5, 5, 4, 4, 2, 2, 1, 1]) / 6)


def test_costs_are_drawn_at_the_figures_of_the_table(tmp_path):
    run = report.load_results(write_run(tmp_path / "run", "isotropic", np.array([0.25, 0.5, 1.0], np.float32)))
    run.columns["correct"][:] = [0, 1, 1]
    for cost, at in (("seconds", 1.0), ("passes", run.passes.forward + run.passes.backward)):
        axis = _axis()
        curves.draw_cost(axis, [run], cost)
        bar, hollow, filled = axis.get_lines()
        assert [*hollow.get_xdata(), *filled.get_xdata(), *bar.get_xdata()] == [at] * 4
        assert [*bar.get_ydata()] == [*hollow.get_ydata(), *filled.get_ydata()]
        assert [*bar.get_ydata()] == [run.acr("radius"), run.acr("radius_proxy")]
        assert hollow.get_fillstyle() == "none" and filled.get_fillstyle() == "full"


def test_the_history_of_a_training_is_drawn_as_it_is():
    history = {"epoch": np.arange(1, 4), "train_loss": np.array([3.0, 2, 1]), "test_loss": np.array([4.0, 3, 2])}
    axis = _axis()
    curves.draw_history(axis, history, "loss", "loss")
    for line, part in zip(axis.get_lines(), ("train", "test"), strict=True):
        assert line.get_label() == part
        np.testing.assert_array_equal(line.get_data(), [history["epoch"], history[f"{part}_loss"]])
    assert axis.get_ylim() == (0, 1.05 * 4)


def test_plot_training_writes_a_png(tmp_path):
    columns = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
    report.plot_training({"epoch": np.arange(3)} | dict.fromkeys(columns, np.full(3, 0.5)), tmp_path / "a.png")
    assert png_size(tmp_path / "a.png") == (1350, 540)


@pytest.mark.parametrize("texts", [[FIXED], [FIXED, ANCER], [FIXED] * 9])
def test_plot_certified_accuracy_writes_a_png(tmp_path, texts):
    results = [from_text(tmp_path, f"{i}.tsv", text) for i, text in enumerate(texts)]
    report.plot_certified_accuracy(results, tmp_path / "a.png")
    assert png_size(tmp_path / "a.png") == (1500, 630)
    assert (tmp_path / "a.png").stat().st_size > 20_000


def test_plot_certified_accuracy_where_nothing_is_certified(tmp_path):
    nothing = f"{HEADER}\n0\t3\t-1\t0.0\t0\t0:00:01\n"
    report.plot_certified_accuracy([from_text(tmp_path, "a.tsv", nothing)], tmp_path / "a.png")
    assert png_size(tmp_path / "a.png") == (1500, 630)


def test_names_that_matplotlib_would_hide_or_typeset_are_shown(tmp_path):
    results, axis = from_text(tmp_path, "a.tsv", MEMORY), _axis()
    curves.draw_accuracy(axis, [dataclasses.replace(results, name=name) for name in ("_hidden", "a$b$")], "radius")
    assert axis.get_legend_handles_labels()[1] == [" _hidden", r"a\$b\$"]


def test_curves_can_be_told_apart_without_colour(tmp_path):
    methods = ("fixed", "universal", "isotropic", "ancer", "fixed")
    results = [from_text(tmp_path, f"{i}.tsv", ANCER.replace("\tancer", f"\t{m}")) for i, m in enumerate(methods)]
    styles = [(str(style["linestyle"]), style["linewidth"]) for style in curves.line_styles(results)]
    assert len(set(styles)) == len(styles)
