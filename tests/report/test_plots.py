"""Pictures: the numbers that they draw, and the files that they write."""

import dataclasses
import struct
import zlib

import numpy as np
import pytest
from matplotlib.figure import Figure

from ancer_jax import (
    AnisotropicConfig,
    CertifyConfig,
    IsotropicConfig,
    RunConfig,
    certify_dataset,
    from_function,
    report,
)
from ancer_jax.data import Dataset, take
from ancer_jax.metrics import certified_accuracy
from ancer_jax.report import plots
from tests.report.examples import ANCER, FIXED, HEADER, MEMORY, from_text, grey, write_run

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _axis():
    return Figure().subplots()


def _step(line, at):
    """The value at `at` of a line that is drawn in steps: that of its first point that is not left of `at`."""
    assert line.get_drawstyle() == "steps-pre"
    x, y = line.get_data()
    assert (np.diff(x) >= 0).all()
    return y[np.searchsorted(x, at)]


def _size(path):
    """Width and height of a PNG file, all of its checksums verified."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds, size = 8, [], None
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body, (check,) = data[at + 4 : at + 8 + length], struct.unpack(">I", data[at + 8 + length : at + 12 + length])
        assert zlib.crc32(body) == check
        size = struct.unpack(">II", body[4:12]) if kind == b"IHDR" else size
        kinds.append(kind)
        at += 12 + length
    assert kinds[0] == b"IHDR" and kinds[-1] == b"IEND"
    return size


@pytest.mark.parametrize("column", ["radius", "radius_proxy"])
def test_the_curve_is_the_certified_accuracy_at_every_radius(tmp_path, column):
    results = [from_text(tmp_path, "fixed.tsv", FIXED), from_text(tmp_path, "ancer.tsv", ANCER)]
    axis = _axis()
    plots.draw_accuracy(axis, results, column)
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
    plots.draw_accuracy(axis, [results], "radius")
    ((_, (row,)),) = [table for table in report.summary([results], radii) if "accuracy at" in table[0]]
    for at, text in zip(radii, [*row.values()][2:], strict=True):
        assert float(text) <= _step(axis.get_lines()[0], at) < float(text) + 1e-3


def test_the_distribution_of_p_lower_is_over_all_images_and_before_memory(tmp_path):
    header, *lines = FIXED.splitlines()
    bounds = [0.9, 0.75, 0.6, 0.4, 0.75, 1.0]  # the fourth image is an abstention
    text = "\n".join([f"{header}\tp_lower", *(f"{line}\t{p}" for line, p in zip(lines, bounds, strict=True))])
    results, axis = from_text(tmp_path, "a.tsv", text), _axis()
    after = results.columns | {"predict": np.full(6, -1.0)}
    plots.draw_p_lower(axis, [dataclasses.replace(results, columns=after, before=results.columns)])
    (line,) = axis.get_lines()
    at = [0.5, 0.6, 0.61, 0.75, 0.76, 0.9, 0.91, 1.0]
    np.testing.assert_array_equal(_step(line, at), np.array([5, 5, 4, 4, 2, 2, 1, 1]) / 6)


def test_costs_are_drawn_at_the_figures_of_the_table(tmp_path):
    run = report.load_results(write_run(tmp_path / "run", "isotropic", np.array([0.25, 0.5, 1.0], np.float32)))
    run.columns["correct"][:] = [0, 1, 1]
    for cost, at in (("seconds", 1.0), ("passes", run.passes.forward + run.passes.backward)):
        axis = _axis()
        plots.draw_cost(axis, [run], cost)
        bar, hollow, filled = axis.get_lines()
        assert [*hollow.get_xdata(), *filled.get_xdata(), *bar.get_xdata()] == [at] * 4
        assert [*bar.get_ydata()] == [*hollow.get_ydata(), *filled.get_ydata()]
        assert [*bar.get_ydata()] == [run.acr("radius"), run.acr("radius_proxy")]
        assert hollow.get_fillstyle() == "none" and filled.get_fillstyle() == "full"


def test_the_history_of_a_training_is_drawn_as_it_is():
    history = {"epoch": np.arange(1, 4), "train_loss": np.array([3.0, 2, 1]), "test_loss": np.array([4.0, 3, 2])}
    axis = _axis()
    plots.draw_history(axis, history, "loss", "loss")
    for line, part in zip(axis.get_lines(), ("train", "test"), strict=True):
        assert line.get_label() == part
        np.testing.assert_array_equal(line.get_data(), [history["epoch"], history[f"{part}_loss"]])
    assert axis.get_ylim() == (0, 1.05 * 4)


def test_plot_training_writes_a_png(tmp_path):
    columns = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
    report.plot_training({"epoch": np.arange(3)} | dict.fromkeys(columns, np.full(3, 0.5)), tmp_path / "a.png")
    assert _size(tmp_path / "a.png") == (1350, 540)


@pytest.mark.parametrize("texts", [[FIXED], [FIXED, ANCER], [FIXED] * 9])
def test_plot_certified_accuracy_writes_a_png(tmp_path, texts):
    results = [from_text(tmp_path, f"{i}.tsv", text) for i, text in enumerate(texts)]
    report.plot_certified_accuracy(results, tmp_path / "a.png")
    assert _size(tmp_path / "a.png") == (1500, 630)
    assert (tmp_path / "a.png").stat().st_size > 20_000


def test_plot_certified_accuracy_where_nothing_is_certified(tmp_path):
    nothing = f"{HEADER}\n0\t3\t-1\t0.0\t0\t0:00:01\n"
    report.plot_certified_accuracy([from_text(tmp_path, "a.tsv", nothing)], tmp_path / "a.png")
    assert _size(tmp_path / "a.png") == (1500, 630)


def test_names_that_matplotlib_would_hide_or_typeset_are_shown(tmp_path):
    results, axis = from_text(tmp_path, "a.tsv", MEMORY), _axis()
    plots.draw_accuracy(axis, [dataclasses.replace(results, name=name) for name in ("_hidden", "a$b$")], "radius")
    assert axis.get_legend_handles_labels()[1] == [" _hidden", r"a\$b\$"]


def test_curves_can_be_told_apart_without_colour(tmp_path):
    methods = ("fixed", "universal", "isotropic", "ancer", "fixed")
    results = [from_text(tmp_path, f"{i}.tsv", ANCER.replace("\tancer", f"\t{m}")) for i, m in enumerate(methods)]
    styles = [(str(style["linestyle"]), style["linewidth"]) for style in plots.line_styles(results)]
    assert len(set(styles)) == len(styles)


@pytest.mark.parametrize("channels", [1, 3])
def test_plot_theta_draws_the_images_that_are_found(tmp_path, channels):
    theta = np.random.default_rng(0).uniform(0.01, 1, (3, 4, 5, channels)).astype(np.float32)
    whole = grey([0, 20, 40, 99], channels)
    run = report.load_results(write_run(tmp_path / "run", "ancer", theta, dataset=whole))
    images = take(whole, [0, 2, 3])
    assert report.plot_theta(run, images, tmp_path / "two.png")
    assert report.plot_theta(run, images, tmp_path / "one.png", columns=1)
    (wide, height), (narrow, _) = _size(tmp_path / "two.png"), _size(tmp_path / "one.png")
    assert (wide, narrow, height) == (630, 390, 570)


def test_plot_theta_draws_nothing_without_maps_or_images(tmp_path):
    whole = grey([0, 7, 20, 40])
    isotropic = write_run(tmp_path / "isotropic", "isotropic", np.ones(3, np.float32), dataset=whole)
    assert report.plot_theta(report.load_results(isotropic), whole, tmp_path / "a.png") is False
    path = write_run(tmp_path / "ancer", "ancer", np.ones((3, 4, 5, 1), np.float32), dataset=whole)
    ancer = report.load_results(path)
    assert report.plot_theta(ancer, take(whole, [1]), tmp_path / "a.png") is False
    assert report.plot_theta(ancer, grey([0, 20, 40]), tmp_path / "a.png") is False  # another data set
    assert report.plot_theta(from_text(tmp_path, "a.tsv", ANCER), whole, tmp_path / "a.png") is False
    assert not (tmp_path / "a.png").exists()


def test_a_theta_map_shows_the_image_and_its_own_certificate(tmp_path):
    theta = np.linspace(0.1, 1, 60, dtype=np.float32).reshape(3, 4, 5, 1)
    results = report.load_results(write_run(tmp_path / "run", "ancer", theta))
    scale, _ = plots.color_scale([theta])
    for row, answer in enumerate(("abstains", "predicts 0", "predicts 1")):
        axes = Figure().subplots(2)
        own = {name: column[row] for name, column in results.own.items()}
        plots.draw_theta(axes, own, np.full((4, 5, 1), 0.5), theta[row], scale)
        assert axes[0].get_title() == f"#{20 * row}, label {row}\n{answer}"
        np.testing.assert_array_equal(axes[0].images[0].get_array(), np.full((4, 5), 0.5))
        np.testing.assert_array_equal(axes[1].images[0].get_array(), theta[row, ..., 0])
        assert axes[1].get_title().startswith(f"{theta[row].min():.2f}..{theta[row].max():.2f}, gap ")
        assert axes[1].get_title().endswith("at the limit 5%" if row == 2 else "at the limit 0%")  # 1 of 20 pixels


@pytest.mark.parametrize(("largest", "far", "middle"), [(1.0, False, 0.6), (20.0, True, 2.0)])
def test_colours_of_thetas_that_are_far_apart_go_by_logarithms(largest, far, middle):
    scale, logarithmic = plots.color_scale([np.array([[0.2]]), np.array([[largest]])])
    assert logarithmic is far
    np.testing.assert_allclose(scale([0.2, middle, largest]), [0, 0.5, 1])
    assert plots.heat_map(np.full((2, 3), middle), scale).shape == (2, 3, 3)


def _dark(variables, x):
    """Class 0, whatever the input is: wider noise only makes the region larger."""
    return variables + 0 * x.reshape(len(x), -1)[:, :2]


@pytest.mark.usefixtures("quick_compilation")
def test_table_and_picture_count_the_same_thetas_at_the_bound_of_an_exact_run(tmp_path):
    """Exact runs round their thetas down, and the bound with them."""
    config = RunConfig(
        norm="l1",
        method="ancer",
        theta=0.05,
        certify=CertifyConfig(n0=10, n=100),
        isotropic=IsotropicConfig(steps=8, num_samples=4, theta_max=0.05),
        anisotropic=AnisotropicConfig(steps=8, num_samples=4, theta_max=0.1),
        guard_samples=100,
        leakage=None,
        noise="splitting",
        exact=True,
        period=60,
    )
    images = (np.arange(8).reshape(2, 2, 2, 1) / 255).astype(np.float32)
    dataset = Dataset("dark", np.array([1, 4]), images, np.zeros(2, int), 2)
    classifier = from_function(_dark, np.array([1.0, 0.0], np.float32), num_classes=2)
    certify_dataset(classifier, dataset, config, out=tmp_path / "run")
    results = report.load_results(tmp_path / "run")
    bound = results.run.config.theta_bound
    assert bound == np.float32(30 / 510) < 0.1  # 51 draws are rounded down to a divisor of the period
    thetas = results.thetas([1, 4])
    shares = [(theta >= bound).mean() for theta in thetas.values()]
    assert all(shares)  # the search reached the bound
    (_, (row,)), *_ = report.summary([results], [0.0])
    drawn = []
    for i, theta in enumerate(thetas.values()):
        axes = Figure().subplots(2)
        own = {name: column[i] for name, column in results.own.items()}
        plots.draw_theta(axes, own, images[i], theta, plots.color_scale([theta])[0])
        drawn.append(float(axes[1].get_title().split("at the limit ")[1].removesuffix("%")))
    assert drawn == [float(f"{100 * share:.3g}") for share in shares]
    assert row["theta at its limit"] == f"2 of 2 ({np.mean(drawn):.3g}% of coordinates)"
    assert report.plot_theta(results, dataset, tmp_path / "a.png")
