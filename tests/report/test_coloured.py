"""Reports of coloured noise: theta by coefficient of a basis, and the noise that it makes in pixels."""

import re

import numpy as np
import pytest

from ancer_jax import Gaussian, RunConfig, Uniform, certify_dataset, report
from ancer_jax.basis import Cosine, KarhunenLoeve, Pixels, make_basis
from ancer_jax.data import Dataset, take
from ancer_jax.report import theta_maps
from ancer_jax.search import ThetaMap
from tests.report.examples import png_size
from tests.report.test_cost import SMALL
from tests.toy import CLASSIFIER, DATASET

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIGS = {
    "pixels": RunConfig(method="universal", **SMALL),
    "universal": RunConfig(method="universal", basis=Cosine(), **SMALL),
    "frequencies": RunConfig(method="ancer", theta=0.3, basis=Cosine(), **SMALL | {"leakage": None}),
    "searched": RunConfig(method="ancer", theta=0.3, **SMALL | {"leakage": None}),
    "patterns": RunConfig(method="universal", basis=KarhunenLoeve.of(DATASET.images), **SMALL),
    "balls": RunConfig(theta=0.3, basis=Cosine(), **SMALL),
    "diamond": RunConfig(method="universal", norm="l1", **SMALL),
}
BY = {"universal": "by frequency", "frequencies": "by frequency", "patterns": "by coefficient"}
OF_ALL = ("pixels", "universal", "patterns", "diamond")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder, theta_map = tmp_path_factory.mktemp("coloured"), np.linspace(0.1, 0.9, 9).reshape(3, 3, 1)
    for name, config in CONFIGS.items():
        of_all = theta_map if name in OF_ALL else None
        certify_dataset(CLASSIFIER, DATASET, config, out=folder / name, theta_map=of_all)
    return {name: report.load_results(folder / name) for name in CONFIGS}


@pytest.fixture
def figure(monkeypatch):
    """The figures that are saved, the last one last."""
    saved, save = [], theta_maps.save
    monkeypatch.setattr(theta_maps, "save", lambda figure, path: (saved.append(figure), save(figure, path)))
    return saved


def page(results, path, datasets=(DATASET,)):
    """The page of these runs, and the part of each run's regions."""
    report.write_page(results, path, radii=[0.0], datasets=datasets)
    text = path.read_text("utf-8")
    parts = re.findall(r"<summary>(\w+)\*?</summary>(.*?)</details>", text, re.DOTALL)
    return text, {name: part for name, part in parts if name in CONFIGS}


def test_every_image_has_its_theta_by_frequency_and_a_noisy_copy(runs, tmp_path, figure):
    assert report.plot_theta(runs["frequencies"], take(DATASET, [1, 3]), tmp_path / "a.png")
    assert png_size(tmp_path / "a.png") == (630, 900)
    *axes, bar = figure[-1].axes
    assert [axis.get_title() for axis in axes[4:]] == ["a noisy copy"] * 2
    assert bar.get_ylabel() == "theta by frequency (image units)"
    caption = figure[-1].get_supxlabel().replace("\n", " ")
    assert caption.startswith("Theta by frequency, mean over channels.") and "top left" in caption
    assert caption.endswith("Each image has its own theta; answers and gaps are those before memory.")
    for i, theta in enumerate(runs["frequencies"].thetas(DATASET.ids[[1, 3]].tolist()).values()):
        np.testing.assert_array_equal(axes[2 + i].images[0].get_array(), theta[..., 0])
        copy = theta_maps.noisy_copy(CONFIGS["frequencies"].certified_noise, DATASET.images[[1, 3][i]], theta)
        np.testing.assert_array_equal(axes[4 + i].images[0].get_array(), np.clip(copy[..., 0], 0, 1))


def test_theta_in_pixels_is_drawn_without_noisy_copies(runs, tmp_path, figure):
    assert report.plot_theta(runs["searched"], take(DATASET, [1, 3]), tmp_path / "a.png")
    assert png_size(tmp_path / "a.png") == (630, 570)
    assert figure[-1].axes[-1].get_ylabel() == "theta (image units)"
    caption = "each image has its own theta; answers and gaps are those before memory"
    assert figure[-1].get_supxlabel() == caption
    assert report.plot_theta(runs["balls"], DATASET, tmp_path / "b.png") is False


@pytest.mark.parametrize("name", OF_ALL)
def test_one_theta_of_all_images_is_drawn_once_with_images_under_its_noise(runs, tmp_path, figure, name):
    assert report.plot_theta(runs[name], take(DATASET, [1, 3]), tmp_path / "a.png")
    left, right = figure[-1].subfigs
    (theta,) = runs[name].thetas(DATASET.ids[:1].tolist()).values()
    np.testing.assert_array_equal(left.axes[0].images[0].get_array(), theta[..., 0])
    images = [np.full_like(DATASET.images[0], 0.5), *DATASET.images[[1, 3]]]
    noise = CONFIGS[name].certified_noise
    for i, image in enumerate(images):
        expected = (image, theta_maps.noisy_copy(noise, image, theta))
        for row, shown in enumerate(expected):
            drawn = right.axes[3 * row + i].images[0].get_array()
            np.testing.assert_array_equal(drawn, theta_maps.drawable(shown))


def test_the_page_shows_theta_by_frequency_and_noisy_copies(runs, tmp_path):
    _, parts = page([*runs.values()], tmp_path / "a.html")
    assert list(parts) == [*CONFIGS]
    for name, part in parts.items():
        pictures = [part.count(f'alt="{what} #') for what in ("image", "theta of image", "noisy copy of image")]
        assert pictures == [5, 5 * (name in ("frequencies", "searched")), 5 * (name in BY)]
        assert part.count(f"The theta map of {name}, and images under its noise.") == (name in OF_ALL)
        assert ("changes of the image." in part) == (name in ("pixels", "searched", "diamond"))
        assert ("changes of that coefficient." in part) == (name in BY)
        assert ("Below, a noisy copy is beside each image." in part) == (name in ("universal", "patterns"))
        assert ("The third picture is a noisy copy" in part) == (name == "frequencies")
    assert "beside it, pixel by pixel (mean over channels)" in parts["searched"]
    assert "beside it, by frequency (mean over channels)" in parts["frequencies"] and "top left" in parts["frequencies"]
    _, parts = page([*runs.values()], tmp_path / "b.html", datasets=())
    assert not any("noisy copy" in part or "theta map of" in part for part in parts.values())
    for name, by in BY.items():
        assert f"beside it, {by} (mean over channels)" in parts[name]
        assert parts[name].count('alt="theta of image #') == 5


def test_the_page_says_which_basis_each_run_has(runs, tmp_path):
    text, _ = page([*runs.values()], tmp_path / "a.html")
    (row,) = re.findall(r"<td>basis.name</td>(.*?)</tr>", text)
    names = ["pixels", "cosine", "cosine", "pixels", "karhunen-loeve", "cosine", "pixels"]
    assert re.findall("<td>(.*?)</td>", row) == names
    (row,) = re.findall(r"<td>basis.digest</td>(.*?)</tr>", text)
    assert re.findall("<td>(.*?)</td>", row)[4].startswith(CONFIGS["patterns"].basis.digest[:12])
    assert "basis.rows" not in text and "<dt>basis</dt>" in text
    (_, figures), *_ = report.summary([*runs.values()], [0.0])
    thetas = [row["theta"] for row in figures]
    assert [theta.split(": ")[0] if ": " in theta else "pixels" for theta in thetas] == names
    assert re.fullmatch(r"cosine: 0\.\d+ to [\d.]+, geometric mean 0\.\d+", thetas[names.index("cosine")])
    note = "Coloured noise, with one theta for each coefficient of a basis: "
    note += "universal (cosine), frequencies (cosine), patterns (karhunen-loeve)."
    assert note in text and note in report.summary_table([*runs.values()], [0.0])


def test_nothing_is_said_of_a_basis_where_all_noise_is_in_pixels(runs, tmp_path):
    text, _ = page([runs["pixels"]], tmp_path / "a.html")
    for words in ("basis", "oefficient", "requenc", "oloured", "noisy copy of", "three"):
        assert words not in re.sub(r'data:image/[^"]*', "", text)
    assert "basis" not in report.summary([runs["pixels"]], [0.0])[0][1][0]


def test_a_noisy_copy_has_the_noise_of_its_basis():
    theta, image = np.full((4, 5, 3), 1e-9, np.float32), np.full((4, 5, 3), 0.5, np.float32)
    theta[0, 0, 0] = 0.3  # brightness of the whole image
    change = theta_maps.noisy_copy(Gaussian(Cosine()), image, theta) - image
    assert np.ptp(change) < 1e-6 < abs(change.mean())
    copies = [theta_maps.noisy_copy(Gaussian(), image, np.full_like(theta, 0.9)) for _ in range(2)]
    np.testing.assert_array_equal(*copies)
    assert copies[0].min() < 0 and copies[0].max() > 1


@pytest.mark.parametrize("name", ["pixels", "cosine", "karhunen-loeve"])
@pytest.mark.parametrize(("channels", "largest"), [(1, 0.9), (3, 0.9), (3, 3.0)])
def test_a_theta_map_is_drawn_with_images_under_its_noise(tmp_path, figure, name, channels, largest):
    images = np.random.default_rng(0).uniform(0, 1, (6, 4, 5, channels)).astype(np.float32)
    theta = np.linspace(0.1, largest, 20 * channels).reshape(4, 5, channels)
    report.plot_theta_map(ThetaMap(theta, make_basis(name, images)), images, tmp_path / "a.png")
    maps = 3 if channels == 3 and name != "pixels" else 1
    assert png_size(tmp_path / "a.png") == (150 * (9.6 + (4.4 if maps == 1 else 3.4)), 900)
    left, right = figure[-1].subfigs
    *drawn, bar = left.axes
    colours = ["brightness", "red against blue", "green against both"]
    if name != "karhunen-loeve":
        titles = colours[:maps] if name == "cosine" else ["mean over channels"]
        assert [axis.get_title() for axis in drawn] == titles
    for i, axis in enumerate(drawn):
        shown = theta[..., i] if maps == channels else theta.mean(axis=-1)
        np.testing.assert_allclose(axis.images[0].get_array(), shown, rtol=1e-6)
    assert bar.get_yscale() == ("log" if largest > 1 else "linear")
    by = {"pixels": "theta", "cosine": "theta by frequency", "karhunen-loeve": "theta by coefficient"}[name]
    assert bar.get_ylabel() == f"{by} (image units)"
    labels = ["image", "noise of\nthe map", "white noise,\ntheta 0.1"]
    assert [axis.get_ylabel() for axis in right.axes[::5]] == labels and len(right.axes) == 15
    assert np.all(np.asarray(right.axes[0].images[0].get_array()) == 0.5)
    assert ("top left" in figure[-1].get_supxlabel().replace("\n", " ")) == (name != "pixels")


def test_a_theta_map_of_other_noise_is_drawn_with_that_noise(tmp_path, figure):
    images = np.random.default_rng(0).uniform(0, 1, (1, 4, 5, 1)).astype(np.float32)
    theta = np.linspace(0.1, 0.2, 20).reshape(4, 5, 1).astype(np.float32)
    report.plot_theta_map(ThetaMap(theta), images, tmp_path / "a.png", noise=Uniform())
    noisy, white = (axis.images[0].get_array() for axis in figure[-1].subfigs[1].axes[3::2])
    for shown, drawn in ((noisy, theta), (white, np.full_like(theta, 0.1))):
        np.testing.assert_array_equal(shown, theta_maps.drawable(theta_maps.noisy_copy(Uniform(), images[0], drawn)))
        assert not np.array_equal(shown, theta_maps.drawable(theta_maps.noisy_copy(Gaussian(), images[0], drawn)))


def test_a_theta_map_and_images_of_another_shape_are_refused(tmp_path):
    for theta, images in (
        (np.ones((4, 5, 1)), np.ones((2, 5, 4, 1))),
        (np.ones((4, 5, 1)), np.ones((0, 4, 5, 1))),
        (np.ones(3), np.ones((2, 3))),
    ):
        with pytest.raises(ValueError, match="images must be"):
            report.plot_theta_map(ThetaMap(theta, Pixels()), images, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_noisy_copies_are_of_the_images_of_the_run(runs, tmp_path):
    """Images of another data set are not drawn, with or without noise."""
    other = Dataset("other", DATASET.ids, 1 - DATASET.images, DATASET.labels, 2)
    _, parts = page([runs["universal"]], tmp_path / "a.html", datasets=[other])
    assert "noisy copy" not in parts["universal"]
    assert report.plot_theta(runs["universal"], other, tmp_path / "a.png") is False
