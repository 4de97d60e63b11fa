"""Theta maps: where they start, their files, and the search for one within bounds and in a basis."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ancer_jax import Gaussian, Smoothed, UniversalConfig, from_function, optimize_universal
from ancer_jax.basis import Cosine, KarhunenLoeve, Pixels, least_theta, spectrum
from ancer_jax.search.theta_map import ThetaMap, load_theta_map, save_theta_map, spectral_theta
from tests import reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPE = (4, 5, 3)
IMAGES = (np.random.default_rng(0).normal(size=(60, *SHAPE)).cumsum(1).cumsum(2) / 10).astype(np.float32)
BASES = [Pixels(), Cosine(), KarhunenLoeve.of(IMAGES)]
each_basis = pytest.mark.parametrize("basis", BASES, ids=lambda basis: basis.name)
THETA = np.random.default_rng(1).uniform(0.1, 2, SHAPE).astype(np.float32)
KEY = jax.random.key(0)


@each_basis
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_spectral_theta_is_that_of_the_formula(basis, power):
    found = spectral_theta(IMAGES, basis, 0.2, theta_max=1.0, power=power)
    deviations = np.asarray(basis.coefficients(np.float64(IMAGES))).std(0)
    least = 0.2 if basis == Pixels() else 0.2 * (1 + 2**-13)
    expected = np.clip(0.2 * (0.2 / deviations) ** power, least, 1.0)
    assert found.basis == basis
    assert found.theta.shape == SHAPE and found.theta.dtype == np.float32
    np.testing.assert_allclose(found.theta, expected, rtol=1e-5)
    assert len(np.unique(found.theta)) > 10
    order = np.argsort(spectrum(IMAGES, basis)[1], axis=None)
    assert (np.diff(found.theta.ravel()[order]) <= 0).all()  # the less images differ, the more noise


@given(
    sigma=st.floats(1e-3, 10),
    factor=st.floats(1.001, 32),
    power=st.floats(0, 50),
    scale=st.sampled_from([1e-20, 1, 1e10]),
)
@settings(max_examples=40)
def test_the_spectral_theta_is_within_its_bounds(sigma, factor, power, scale):
    theta = spectral_theta(IMAGES[:5] * scale, Cosine(), sigma, theta_max=sigma * factor, power=power).theta
    assert (theta >= np.float32(sigma)).all() and (theta <= np.float32(sigma * factor)).all()


@each_basis
def test_coefficients_in_which_images_do_not_differ_get_the_largest_theta(basis):
    constant = np.full((7, *SHAPE), 0.7, np.float32)
    np.testing.assert_array_equal(spectral_theta(constant, basis, 0.2, theta_max=0.9).theta, np.float32(0.9))
    one = spectral_theta(IMAGES[:1], basis, 0.2, theta_max=0.9)
    np.testing.assert_array_equal(one.theta, np.float32(0.9))


def test_images_that_differ_in_brightness_only_get_no_more_noise_there():
    images = np.float32([0.1, 0.9, 0.3])[:, None, None, None] * np.ones(SHAPE, np.float32)
    theta = spectral_theta(images, Cosine(), 0.2, theta_max=0.9).theta
    assert theta[0, 0, 0] == np.float32(0.2 * (1 + 2**-13))
    np.testing.assert_array_equal(theta.ravel()[1:], np.float32(0.9))


@each_basis
@pytest.mark.parametrize("sigma", [0.1, 0.7, 1 / 3])
@pytest.mark.parametrize("p_lower", [0.500001, 0.7, 0.9993, 1 - 1e-12])
def test_regions_contain_those_of_white_noise_for_the_same_votes(basis, sigma, p_lower):
    theta_map = spectral_theta(IMAGES, basis, sigma, theta_max=5 * sigma)
    gaps = [np.asarray(Gaussian(of).gap(p_lower)) for of in (basis, Pixels())]
    coloured = Gaussian(basis).region(IMAGES[0], theta_map.theta, gaps[0])
    white = Gaussian().region(IMAGES[0], np.full(SHAPE, sigma, np.float32), gaps[1])
    assert coloured.radius >= white.radius > 0


@each_basis
@pytest.mark.parametrize("sigma", [0.1, 0.7, 1 / 3])
def test_without_power_theta_is_sigma_everywhere(basis, sigma):
    theta = spectral_theta(IMAGES, basis, sigma, theta_max=5.0, power=0.0).theta
    np.testing.assert_array_equal(theta, np.float32(least_theta(sigma, basis)))
    least = least_theta(sigma, basis)
    np.testing.assert_array_equal(spectral_theta(IMAGES, basis, sigma, theta_max=least).theta, np.float32(least))
    with pytest.raises(ValueError, match="theta_max must be at least"):
        spectral_theta(IMAGES, basis, sigma, theta_max=np.nextafter(least, 0))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sigma": 0.0}, "sigma must be in"),
        ({"sigma": float("nan")}, "sigma must be in"),
        ({"theta_max": 0.1}, r"theta_max must be at least 0\.200024 with sigma 0\.2, got 0\.1"),
        ({"theta_max": float("inf")}, "theta_max must be in"),
        ({"power": -1.0}, "power must be in"),
        ({"images": IMAGES[:0]}, "images must be"),
        ({"images": IMAGES * np.nan}, "images must be finite"),
        ({"images": IMAGES[..., :2]}, "the cosine basis is of images"),
    ],
)
def test_a_spectral_theta_that_makes_no_sense_is_refused(change, text):
    arguments = {"images": IMAGES, "basis": Cosine(), "sigma": 0.2, "theta_max": 0.9, "power": 1.0} | change
    with pytest.raises(ValueError, match=text):
        spectral_theta(**arguments)


def test_theta_maps_are_equal_if_theta_and_basis_are():
    first, same = ThetaMap(THETA, Cosine()), ThetaMap(np.float64(THETA), Cosine(), {"start": "flat"})
    others = [ThetaMap(THETA), ThetaMap(2 * THETA, Cosine()), ThetaMap(THETA.reshape(5, 4, 3), Cosine())]
    others += [ThetaMap(THETA, BASES[2])]
    assert first == same and hash(first) == hash(same) and first.digest == same.digest
    assert len({first, same, *others}) == 5
    assert first != THETA.tobytes() and repr(first) == repr(same) != repr(others[1])
    assert "4 x 5 x 3" in repr(first) and "cosine" in str(first)


def test_a_theta_map_is_a_copy_that_nobody_changes():
    theta = THETA.copy()
    theta_map = ThetaMap(theta)
    theta[0, 0, 0] = 7
    np.testing.assert_array_equal(theta_map.theta, THETA)
    assert theta_map.theta.dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        theta_map.theta[0, 0, 0] = 7
    with pytest.raises(dataclasses.FrozenInstanceError):
        theta_map.theta = theta


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, 1e-50, 1e39])
def test_a_theta_that_is_not_positive_and_finite_as_float32_is_refused(value):
    theta = np.float64(THETA)
    theta[1, 2, 0] = value
    with pytest.raises(ValueError, match="theta of a map must be positive and finite, got"):
        ThetaMap(theta)


def test_a_theta_of_another_shape_than_the_images_of_the_basis_is_refused():
    with pytest.raises(ValueError, match="the cosine basis is of images"):
        ThetaMap(np.ones((2, 2, 2)), Cosine())


def test_a_theta_map_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"theta of a map must not be empty, got shape \[0, 3\]"):
        ThetaMap(np.zeros((0, 3), np.float32))


@each_basis
def test_a_theta_map_is_the_same_after_a_file(basis, tmp_path):
    theta_map = ThetaMap(THETA, basis, {"start": "spectral", "power": 0.5})
    save_theta_map(theta_map, tmp_path / "map.npz")
    loaded = load_theta_map(tmp_path / "map.npz")
    assert loaded == theta_map and loaded.basis == basis and loaded.history == theta_map.history
    np.testing.assert_array_equal(loaded.theta, THETA)
    assert load_theta_map(str(tmp_path / "map.npz")) == theta_map
    assert [file.name for file in tmp_path.iterdir()] == ["map.npz"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_array_alone_is_a_theta_map_in_pixels(dtype, tmp_path):
    np.save(tmp_path / "theta.npy", THETA.astype(dtype))
    assert load_theta_map(tmp_path / "theta.npy") == ThetaMap(THETA, Pixels())


def test_a_file_in_a_folder_that_is_not_there_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match="cannot write"):
        save_theta_map(ThetaMap(THETA), tmp_path / "nowhere" / "map.npz")


def described(basis):
    return np.array(json.dumps(basis.describe()))


BAD = {
    "basis missing": {"theta": THETA},
    "theta missing": {"basis": described(Cosine())},
    "unknown basis": {"theta": THETA, "basis": np.array('{"name": "wavelet"}')},
    "no name": {"theta": THETA, "basis": np.array("{}")},
    "history no mapping": {"theta": THETA, "basis": described(Cosine()), "history": np.array("[]")},
    "no JSON": {"theta": THETA, "basis": np.array("cosine")},
    "basis of numbers": {"theta": THETA, "basis": np.arange(3)},
    "half a basis": {"theta": THETA, "basis": np.array('{"name": "karhunen-loeve", "rows": "AAAA"}')},
    "negative": {"theta": -THETA, "basis": described(Cosine())},
    "nan": {"theta": THETA * np.nan, "basis": described(Cosine())},
    "no numbers": {"theta": np.array("large"), "basis": described(Cosine())},
    "empty": {"theta": THETA[:0], "basis": described(Cosine())},
    "other": {"weights": THETA},
}


def assert_refused(file):
    with pytest.raises(ValueError) as raised:
        load_theta_map(file)
    assert str(file) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("arrays", BAD.values(), ids=BAD)
def test_a_file_that_is_no_theta_map_is_refused_in_one_line(arrays, tmp_path):
    file = tmp_path / "map.npz"
    np.savez(file, **({"history": np.array("{}")} | arrays))
    assert_refused(file)


@pytest.mark.parametrize("name", ["map.npz", "theta.npy", "map"])
def test_files_that_cannot_be_read_are_refused_in_one_line(name, tmp_path):
    file = tmp_path / name
    assert_refused(file)  # there is none
    file.mkdir()
    assert_refused(file)
    file.rmdir()
    for content in (b"", b"theta", b"PK\x03\x04", b"\x93NUMPY"):
        file.write_bytes(content)
        assert_refused(file)


def test_a_damaged_file_is_refused_in_one_line(tmp_path):
    file = tmp_path / "map.npz"
    save_theta_map(ThetaMap(THETA, BASES[2]), file)
    content = file.read_bytes()
    for end in (10, len(content) // 2, len(content) - 3):
        file.write_bytes(content[:end])
        assert_refused(file)
    start = content.index(THETA.tobytes())
    file.write_bytes(content[:start] + b"\xff" * 40 + content[start + 40 :])  # the checksum tells
    assert_refused(file)


@pytest.mark.parametrize("array", [np.array(["a"]), np.zeros(0), -THETA, THETA * np.nan, np.array([1 + 1j])], ids=str)
def test_an_array_that_is_no_theta_is_refused_in_one_line(array, tmp_path):
    np.save(tmp_path / "theta.npy", array)
    assert_refused(tmp_path / "theta.npy")


# The search: this classifier looks at the first two coordinates alone. Noise there harms, all other noise is free.
D = 6
TWO = reference.linear([20, 60, 0, 0, 0, 0])
POINTS = np.random.default_rng(1).normal(size=(40, D)).astype(np.float32)
LABELS = (POINTS[:, 0] + 3 * POINTS[:, 1] > 0).astype(np.int32)
CONFIG = UniversalConfig(steps=60, batch_size=16, num_samples=32, learning_rate=0.1)
# The first step of Adam is as long as the learning rate: from bound to bound.
BOLD = dataclasses.replace(CONFIG, steps=1, num_samples=256, learning_rate=20.0)
learn = jax.jit(optimize_universal, static_argnames=("config", "progress"))


def search(start, config, progress=None):
    smoothed = Smoothed(TWO, Gaussian(), start)
    theta, objective = learn(KEY, smoothed, POINTS, LABELS, config=config, progress=progress)
    return np.asarray(theta), np.asarray(objective)


@pytest.mark.parametrize(("theta_min", "theta_max"), [(0.25, 1.2), (1 / 3, 0.95)])
def test_theta_stays_within_its_bounds_or_where_it_started(theta_min, theta_max):
    """As float32, not one bit below theta_min, where exp(log(theta_min)) is. Coordinates 1, 3 and 4 start outside."""
    start = np.float32([0.9, 0.2, 0.9, 3.0, 0.1, 0.9])
    theta, _ = search(start, dataclasses.replace(BOLD, theta_min=theta_min, theta_max=theta_max))
    assert theta[0] == np.float32(theta_min)
    assert theta[1] == start[1]
    np.testing.assert_allclose(theta[2:], [theta_max, 3.0, theta_max, theta_max], rtol=1e-6)


def test_without_bounds_theta_is_between_a_tenth_and_four_times_the_start():
    theta, _ = search(np.float32([1.5, 0.5, 0.5, 0.5, 0.5, 0.1]), BOLD)
    np.testing.assert_allclose(theta, [0.15, 0.05, 2.0, 2.0, 2.0, 0.4], rtol=1e-6)


@pytest.mark.parametrize("change", [{"theta_min": 0.0}, {"theta_min": -1.0}, {"theta_max": float("nan")}])
def test_bounds_that_are_not_positive_are_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be in"):
        UniversalConfig(**change)


def test_every_step_is_reported():
    told = []
    config = dataclasses.replace(CONFIG, theta_max=1.2)
    progress = lambda step, value: told.append((int(step), float(value)))
    theta, objective = search(np.float32(0.3), config, progress)
    jax.effects_barrier()
    told.sort()
    assert [step for step, _ in told] == list(range(CONFIG.steps))
    np.testing.assert_array_equal(np.float32([value for _, value in told]), objective)
    assert objective[-10:].mean() > 1.5 * objective[:10].mean()
    np.testing.assert_allclose(theta[2:], 1.2, rtol=1e-5)
    assert theta[:2].max() < 1.0


def brightness_logits(_, y):
    """Class 1 where the mean is positive: the lowest frequency alone."""
    score = 20 * y.mean((1, 2, 3))
    return jnp.stack([jnp.zeros_like(score), score], axis=-1)


def test_in_a_basis_theta_grows_at_the_frequencies_that_the_classifier_does_not_look_at():
    shape = (4, 4, 1)
    images = np.random.default_rng(2).normal(size=(40, *shape)).astype(np.float32) / 4
    images += np.random.default_rng(3).normal(size=(40, 1, 1, 1)).astype(np.float32) / 4
    labels = (images.mean((1, 2, 3)) > 0).astype(np.int32)
    smoothed = Smoothed(from_function(brightness_logits, (), num_classes=2), Gaussian(Cosine()), np.float32(0.25))
    config = dataclasses.replace(CONFIG, theta_min=0.25, theta_max=2.0)
    theta, objective = learn(KEY, smoothed, images, labels, config=config)
    np.testing.assert_allclose(np.ravel(theta)[1:], 2.0, rtol=1e-5)
    assert 0.25 <= theta[0, 0, 0] < 1.0
    assert np.mean(objective[-10:]) > 2 * np.mean(objective[:10])
