"""Pictures of theta maps: what they draw, and the files that they write."""

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
from ancer_jax.report import theta_maps
from tests.report.examples import ANCER, from_text, grey, png_size, write_run

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("channels", [1, 3])
def test_plot_theta_draws_the_images_that_are_found(tmp_path, channels):
    theta = np.random.default_rng(0).uniform(0.01, 1, (3, 4, 5, channels)).astype(np.float32)
    whole = grey([0, 20, 40, 99], channels)
    run = report.load_results(write_run(tmp_path / "run", "ancer", theta, dataset=whole))
    images = take(whole, [0, 2, 3])
    assert report.plot_theta(run, images, tmp_path / "two.png")
    assert report.plot_theta(run, images, tmp_path / "one.png", columns=1)
    (wide, height), (narrow, _) = png_size(tmp_path / "two.png"), png_size(tmp_path / "one.png")
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
    scale, _ = theta_maps.color_scale([theta])
    for row, answer in enumerate(("abstains", "predicts 0", "predicts 1")):
        axes = Figure().subplots(2)
        own = {name: column[row] for name, column in results.own.items()}
        theta_maps.draw_theta(axes, own, np.full((4, 5, 1), 0.5), theta[row], scale)
        assert axes[0].get_title() == f"#{20 * row}, label {row}\n{answer}"
        np.testing.assert_array_equal(axes[0].images[0].get_array(), np.full((4, 5), 0.5))
        np.testing.assert_array_equal(axes[1].images[0].get_array(), theta[row, ..., 0])
        assert axes[1].get_title().startswith(f"{theta[row].min():.2f}..{theta[row].max():.2f}, gap ")
        assert axes[1].get_title().endswith("at the limit 5%" if row == 2 else "at the limit 0%")  # 1 of 20 pixels


@pytest.mark.parametrize(("largest", "far", "middle"), [(1.0, False, 0.6), (20.0, True, 2.0)])
def test_colours_of_thetas_that_are_far_apart_go_by_logarithms(largest, far, middle):
    scale, logarithmic = theta_maps.color_scale([np.array([[0.2]]), np.array([[largest]])])
    assert logarithmic is far
    np.testing.assert_allclose(scale([0.2, middle, largest]), [0, 0.5, 1])
    assert theta_maps.heat_map(np.full((2, 3), middle), scale).shape == (2, 3, 3)


def _dark(variables, x):
    """Class 0, whatever the input is: wider noise only makes the region larger."""
    return variables + 0 * x.reshape(len(x), -1)[:, :2]


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
        theta_maps.draw_theta(axes, own, images[i], theta, theta_maps.color_scale([theta])[0])
        drawn.append(float(axes[1].get_title().split("at the limit ")[1].removesuffix("%")))
    assert drawn == [float(f"{100 * share:.3g}") for share in shares]
    assert row["theta at its limit"] == f"2 of 2 ({np.mean(drawn):.3g}% of coordinates)"
    assert report.plot_theta(results, dataset, tmp_path / "a.png")
