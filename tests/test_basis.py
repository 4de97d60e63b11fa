"""Orthonormal bases of images: formulas, SciPy and longer numbers; what is decorrelated; descriptions."""

import base64
import dataclasses
import inspect
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ancer_jax import Memory, RunConfig, save_memory
from ancer_jax import basis as module
from ancer_jax.basis import (
    MOST_UNEQUAL,
    Cosine,
    KarhunenLoeve,
    Pixels,
    check_instance,
    make_basis,
    read_basis,
    spectrum,
)
from ancer_jax.search import ThetaMap
from ancer_jax.smoothing import Gaussian

KEY = jax.random.key(0)
SHAPES = [(4, 5, 3), (4, 4, 1), (1, 7, 3)]


def images_of(shape, count=50, seed=0):
    """Images [count, *shape] whose neighbours are alike."""
    steps = np.random.default_rng(seed).normal(size=(count, *shape)) * np.arange(1, shape[-1] + 1)
    return (0.5 + 0.1 * steps.cumsum(1).cumsum(2).cumsum(3)).astype(np.float32)


CASES = [(basis, shape) for shape in SHAPES for basis in (Cosine(), KarhunenLoeve.of(images_of(shape)))]
each = pytest.mark.parametrize(("basis", "shape"), CASES, ids=lambda value: getattr(value, "name", str(value)))
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def values_of(shape, width=64):
    """Values of any size; not so small that they vanish."""
    numbers = st.floats(-4, 4, width=16)
    scaled = st.tuples(hnp.arrays(np.float64, shape, elements=numbers), st.integers(-20, 20))
    return scaled.map(lambda pair: (pair[0] * 2.0 ** pair[1]).astype(np.float64 if width == 64 else np.float32))


def cosines(size):
    """The matrix of the discrete cosine transform by its formula, in longer numbers than float64."""
    pi = np.longdouble("3.14159265358979323846264338327950288")
    k, i = np.arange(size, dtype=np.longdouble)[:, None], np.arange(size, dtype=np.longdouble)
    rows = np.sqrt(np.longdouble(2) / size) * np.cos(pi * k * (2 * i + 1) / (2 * size))
    return np.concatenate([rows[:1] / np.sqrt(np.longdouble(2)), rows[1:]])


def exact_matrix(basis, shape):
    """[d, d] of longer numbers, from inputs to coefficients: for cosines by the formula."""
    if basis == Cosine():
        opponent = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]], np.longdouble)
        channels = opponent / np.sqrt((opponent**2).sum(1, keepdims=True)) if shape[2] == 3 else np.ones((1, 1))
        factors = (cosines(shape[0]), cosines(shape[1]), channels)
    else:
        factors = (basis.rows, basis.columns, basis.channels)
    rows, columns, channels = (np.asarray(factor, np.longdouble) for factor in factors)
    return np.einsum("ai,bj,ck->abcijk", rows, columns, channels).reshape(math.prod(shape), -1)


def lengths(values):
    return np.sqrt((np.asarray(values, np.float64) ** 2).sum((-3, -2, -1)))


@each
def test_the_matrices_are_orthonormal(basis, shape):
    for matrix, size in zip(basis.matrices(shape), shape, strict=True):
        assert matrix.shape == (size, size) and matrix.dtype == np.float64
        assert abs(matrix @ matrix.T - np.eye(size)).max() < 1e-14
    whole = exact_matrix(basis, shape)
    assert abs(whole @ whole.T - np.eye(len(whole))).max() < 1e-14


@pytest.mark.parametrize("size", [1, 2, 28, 32, 224])
def test_the_cosines_are_those_of_the_formula(size):
    for matrix in Cosine().matrices((size, size, 3))[:2]:
        assert abs(matrix - cosines(size)).max() < 1e-15
        assert abs(matrix @ matrix.T - np.eye(size)).max() < 1e-14


@each
@given(data=st.data())
@settings(max_examples=20)
def test_coefficients_and_inputs_are_inverse_and_keep_lengths(basis, shape, data):
    x = data.draw(values_of((2, *shape)))
    length, largest = lengths(x), lengths(x).max()
    for there, back in ((basis.coefficients, basis.inputs), (basis.inputs, basis.coefficients)):
        z = there(x)
        assert isinstance(z, np.ndarray) and z.dtype == np.float64 and z.shape == x.shape
        np.testing.assert_allclose(back(z), x, atol=1e-12 * largest)
        np.testing.assert_allclose(lengths(z), length, rtol=1e-12)


@each
@given(data=st.data())
@settings(max_examples=20)
def test_in_float32_they_do_so_up_to_rounding(basis, shape, data):
    x = jnp.asarray(data.draw(values_of((2, *shape), width=32)))
    length, error = lengths(x), basis.rounding(shape, np.float32)
    for there, back in ((basis.coefficients, basis.inputs), (basis.inputs, basis.coefficients)):
        z = there(x)
        assert isinstance(z, jax.Array) and z.dtype == jnp.float32 and z.shape == x.shape
        assert (lengths(np.float64(back(z)) - x) <= 2.001 * error * length).all()
        assert (abs(lengths(z) - length) <= error * length).all()


@each
@given(data=st.data())
@settings(max_examples=20)
def test_rounding_is_a_bound_of_the_error(basis, shape, data):
    """Of float64 against longer numbers, of float32 against both; and no bound that is far from all errors."""
    x = data.draw(values_of(shape, width=32))
    matrix, length = exact_matrix(basis, shape), lengths(x)
    for function, transform in ((basis.coefficients, matrix), (basis.inputs, matrix.T)):
        exact = (transform @ x.ravel().astype(np.longdouble)).reshape(shape)
        wide, narrow = function(x), np.asarray(function(jnp.asarray(x)))
        assert lengths(wide - exact) <= basis.rounding(shape, np.float64) * length
        for reference in (exact, wide):
            assert lengths(narrow - reference) <= basis.rounding(shape, np.float32) * length
    assert basis.rounding(shape, np.float64) < 1e-13 and basis.rounding(shape, np.float32) < 1e-4


def test_in_pixels_nothing_is_computed():
    x = np.float32([[1, 2], [3, 4]])
    assert Pixels().coefficients(x) is x and Pixels().inputs(x) is x
    assert Pixels().rounding((2, 2), np.float32) == 0


@each
def test_noise_in_float32_has_the_law_of_the_basis(basis, shape):
    """The linear map that fits many draws best: its error is less than one rounding."""
    z = np.random.default_rng(0).normal(size=(20_000, *shape)).astype(np.float32)
    error = np.asarray(jax.jit(basis.inputs)(jnp.asarray(z)), np.float64) - basis.inputs(z)
    d = math.prod(shape)
    added = z.reshape(-1, d).T.astype(np.float64) @ error.reshape(-1, d) / len(z)
    assert np.abs(added).max() < np.finfo(np.float32).eps
    assert np.abs(error.mean(0)).max() < np.finfo(np.float32).eps / 30


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3), (224, 224, 3)])
def test_the_gap_allows_for_the_skew_of_matrices_in_float32(shape):
    """The region of the skewed noise contains that of the basis if 2^-14 is at least the skew times the ratio of the
    thetas."""
    images = np.random.default_rng(0).random((3, *shape), np.float32)
    for basis in (Cosine(), KarhunenLoeve.of(images)):
        skew = sum(np.linalg.norm(m.astype(np.float32) - m, 2) for m in basis.matrices(shape))
        assert 0 < skew * MOST_UNEQUAL < 2.0**-14


@each
def test_the_linear_map_of_the_noise_is_that_of_the_basis(basis, shape, monkeypatch):
    """Of the coefficients theta * eps, with the unit vectors for eps."""
    d = math.prod(shape)
    theta = np.random.default_rng(1).uniform(0.1, 2, shape).astype(np.float32)

    def sample(eps):
        monkeypatch.setattr(jax.random, "normal", lambda key, shape, dtype: eps)
        return Gaussian(basis).sample(KEY, jnp.asarray(theta))

    found = jax.vmap(sample)(jnp.eye(d).reshape(d, *shape))
    assert found.dtype == jnp.float32
    exact = exact_matrix(basis, shape) * theta.reshape(d, 1)
    deviation = np.asarray(found, np.float64).reshape(d, d) - exact
    assert (np.linalg.norm(deviation, axis=1) <= basis.rounding(shape, np.float32) * theta.ravel()).all()
    assert np.abs(deviation).max() < 4 * np.finfo(np.float32).eps * theta.max()


@each
def test_a_batch_has_the_coefficients_of_each_input(basis, shape):
    x = np.random.default_rng(2).normal(size=(2, 3, *shape))
    for function in (basis.coefficients, basis.inputs):
        together = function(x)
        for index in np.ndindex(2, 3):
            np.testing.assert_allclose(together[index], function(x[index]), atol=1e-14)
        traced = jax.jit(jax.vmap(jax.vmap(function)))(np.float32(x))
        np.testing.assert_allclose(traced, together, atol=1e-5)


@each
def test_the_derivative_of_one_is_the_other(basis, shape):
    x, weights = jnp.asarray(np.random.default_rng(3).normal(size=(2, *shape)), jnp.float32)
    for function, transpose in ((basis.coefficients, basis.inputs), (basis.inputs, basis.coefficients)):
        gradient = jax.grad(lambda x, function=function: (weights * function(x)).sum())(x)
        np.testing.assert_allclose(gradient, transpose(weights), atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 4, 1), (5, 8, 1), (1, 1, 1)])
def test_cosines_of_gray_images_are_those_of_scipy(shape):
    x = np.random.default_rng(0).normal(size=(3, *shape))
    expected = scipy.fft.dctn(x, axes=(1, 2), norm="ortho")
    np.testing.assert_allclose(Cosine().coefficients(x), expected, atol=1e-13)
    np.testing.assert_allclose(Cosine().coefficients(jnp.float32(x)), expected, atol=1e-5)
    np.testing.assert_allclose(Cosine().inputs(x), scipy.fft.idctn(x, axes=(1, 2), norm="ortho"), atol=1e-13)


@pytest.mark.parametrize(
    ("pixel", "expected"),
    [
        ([1, 1, 1], [math.sqrt(3), 0, 0]),
        ([1, 0, 0], [1 / math.sqrt(3), 1 / math.sqrt(2), 1 / math.sqrt(6)]),
        ([0, 1, 0], [1 / math.sqrt(3), 0, -2 / math.sqrt(6)]),
        ([0, 0, 1], [1 / math.sqrt(3), -1 / math.sqrt(2), 1 / math.sqrt(6)]),
    ],
)
def test_channels_are_brightness_red_against_blue_and_green_against_both(pixel, expected):
    z = Cosine().coefficients(np.broadcast_to(np.float64(pixel), (4, 5, 3)))
    np.testing.assert_allclose(z[0, 0], np.sqrt(20) * np.array(expected), atol=1e-14)
    np.testing.assert_allclose(z.reshape(20, 3)[1:], 0, atol=1e-14)


def test_a_coefficient_is_a_wave_from_top_to_bottom_and_from_left_to_right():
    z = np.zeros((4, 5, 1))
    z[1, 0] = 1
    falling = Cosine().inputs(z)[..., 0]
    assert (np.diff(falling, axis=0) < 0).all() and np.abs(np.diff(falling, axis=1)).max() < 1e-15
    z[1, 0], z[0, 2] = 0, 1
    two_half_waves = Cosine().inputs(z)[..., 0]
    assert np.abs(np.diff(two_half_waves, axis=0)).max() < 1e-15
    assert np.sign(two_half_waves[0]).tolist() == [1, -1, -1, -1, 1]


def covariance(centred, axis):
    flat = np.moveaxis(np.asarray(centred, np.float64), axis, -1).reshape(-1, centred.shape[axis])
    return flat.T @ flat


@each_shape
def test_karhunen_loeve_decorrelates_rows_columns_and_channels(shape):
    images = images_of(shape, seed=3)
    basis = KarhunenLoeve.of(images)
    z = basis.coefficients(images.astype(np.float64) - images.mean(0, dtype=np.float64))
    for axis in (1, 2, 3):
        found = covariance(z, axis)
        variances = np.diag(found)
        assert np.abs(found - np.diag(variances)).max() < 1e-6 * variances.max()
        assert (np.diff(variances) <= 1e-9 * variances.max()).all()
        before = covariance(images - images.mean(0), axis)
        assert shape[axis - 1] == 1 or np.abs(before - np.diag(np.diag(before))).max() > 0.01 * variances.max()


def test_karhunen_loeve_of_whole_numbers_is_that_of_the_same_images():
    images = np.random.default_rng(0).integers(0, 256, (30, 4, 5, 3)).astype(np.uint8)
    found, expected = KarhunenLoeve.of(images), KarhunenLoeve.of(images.astype(np.float64))
    for one, other in zip(found.matrices((4, 5, 3)), expected.matrices((4, 5, 3)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)


def test_karhunen_loeve_of_one_image_is_a_basis_still():
    basis = make_basis("karhunen-loeve", np.ones((1, 4, 5, 3), np.float32))
    np.testing.assert_allclose(basis.inputs(basis.coefficients(np.ones((4, 5, 3)))), 1, atol=1e-14)


def test_matrices_are_copies_that_nobody_changes():
    rows = np.eye(4)
    basis = KarhunenLoeve(rows, np.eye(5), np.eye(1))
    rows[0, 0] = 7
    assert basis.rows[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        basis.rows[0, 0] = 7
    x = np.random.default_rng(0).normal(size=(4, 5, 1))
    np.testing.assert_array_equal(basis.coefficients(x), x)


@pytest.mark.parametrize("basis", [Pixels(), *(basis for basis, _ in CASES)], ids=repr)
def test_a_description_gives_the_basis_back(basis):
    again = read_basis(json.loads(json.dumps(basis.describe())))
    assert again == basis and hash(again) == hash(basis) and repr(again) == repr(basis)
    assert again.describe() == basis.describe()


def test_bases_are_equal_if_they_have_equal_vectors():
    first, other = (KarhunenLoeve.of(images_of((4, 5, 3), seed=seed)) for seed in (0, 1))
    same = KarhunenLoeve.of(images_of((4, 5, 3), seed=0))
    turned = KarhunenLoeve(-first.rows, first.columns, first.channels)
    assert first == same and hash(first) == hash(same) and first is not same
    assert len({Pixels(), Pixels(), Cosine(), Cosine(), first, same, other, turned}) == 5
    assert first != other and first != turned and first != Cosine() and Cosine() != Pixels()


@pytest.mark.parametrize("name", ["pixels", "cosine", "karhunen-loeve"])
def test_a_basis_is_made_by_name(name):
    images = images_of((4, 5, 3))
    expected = {"pixels": Pixels(), "cosine": Cosine(), "karhunen-loeve": KarhunenLoeve.of(images)}[name]
    assert make_basis(name, images) == expected
    assert expected.name == name


def test_an_equal_basis_is_not_compiled_again():
    traced = []

    def function(basis, x):
        traced.append(basis)
        return basis.coefficients(x)

    jitted = jax.jit(function, static_argnums=0)
    for seed in (0, 0, 1, 0):
        jitted(KarhunenLoeve.of(images_of((4, 4, 1), seed=seed)), jnp.ones((4, 4, 1)))
    assert len(traced) == 2


@pytest.mark.parametrize("shape", [(), (4,), (4, 5), (4, 5, 2), (4, 5, 4)])
@pytest.mark.parametrize("function", [Cosine().coefficients, Cosine().inputs], ids=["coefficients", "inputs"])
@pytest.mark.parametrize("make", [np.zeros, jnp.zeros])
def test_cosines_of_what_is_no_image_are_refused(shape, function, make):
    with pytest.raises(
        ValueError, match=r"the cosine basis is of images \[height, width, 1 or 3 channels\], got shape"
    ):
        function(make(shape))


@pytest.mark.parametrize("shape", [(4, 5), (5, 4, 3), (4, 5, 1)])
@pytest.mark.parametrize("make", [np.zeros, jnp.zeros])
def test_karhunen_loeve_is_of_images_of_its_shape_only(shape, make):
    basis = KarhunenLoeve.of(images_of((4, 5, 3)))
    for function in (basis.coefficients, basis.inputs):
        with pytest.raises(ValueError, match=r"this Karhunen-Loeve basis is of images \[4, 5, 3\], got shape"):
            function(make(shape))


@pytest.mark.parametrize("shape", [(4, 5, 3), (0, 4, 5, 3), (2, 3, 4, 5, 3)])
def test_karhunen_loeve_needs_images(shape):
    with pytest.raises(ValueError, match=r"images must be \[m, .*\], got shape"):
        KarhunenLoeve.of(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    "matrix", [2 * np.eye(4), np.eye(4)[:3], np.eye(4)[0], np.eye(4) + 1e-9, np.full((4, 4), np.nan), np.ones((4, 4))]
)
@pytest.mark.parametrize("axis", ["rows", "columns", "channels"])
def test_a_matrix_that_is_not_orthonormal_is_refused(matrix, axis):
    with pytest.raises(ValueError, match=f"{axis} must be an orthonormal matrix, got one of shape"):
        KarhunenLoeve(**{"rows": np.eye(4), "columns": np.eye(4), "channels": np.eye(4)} | {axis: matrix})


def test_matrices_that_lose_too_much_in_float32_are_refused():
    matrices = Cosine().matrices((64, 64, 1))
    module._check_float32(matrices)
    with pytest.raises(ValueError, match=r"a basis of 64 x 64 x 64 .* loses too much by rounding to float32"):
        module._check_float32(matrices[:1] * 100)


def described(**changes):
    return KarhunenLoeve.of(images_of((4, 5, 3))).describe() | changes


def encoded(values):
    return base64.b64encode(np.asarray(values, "<f8")).decode()


@pytest.mark.parametrize(
    ("description", "text"),
    [
        ({"name": "wavelet"}, "there is no basis 'wavelet', only pixels, cosine and karhunen-loeve"),
        ({"name": None}, "there is no basis None"),
        ({"name": ["cosine"]}, "not the description of a basis"),
        ({}, "not the description of a basis"),
        ({"name": "karhunen-loeve"}, "not the description of a basis"),
        (described(rows="???"), "not the description of a basis"),
        (described(rows=None), "not the description of a basis"),
        (described(rows=described()["rows"][:-4]), "not the description of a basis"),
        (described(columns=encoded(np.eye(5).ravel()[:-1])), "not the description of a basis"),
        (described(channels=encoded(2 * np.eye(3))), "not the description of a basis"),
        (described(channels=""), "not the description of a basis"),
    ],
)
def test_what_does_not_describe_a_basis_is_refused(description, text):
    with pytest.raises(ValueError, match=text) as raised:
        read_basis(description)
    assert "\n" not in str(raised.value)


each_or_pixels = pytest.mark.parametrize(
    ("basis", "shape"), [*CASES, (Pixels(), (4, 5, 3))], ids=lambda value: getattr(value, "name", str(value))
)


@each_or_pixels
@pytest.mark.parametrize("count", [1, 50, 2001])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_spectrum_is_mean_image_and_deviations(basis, shape, count, dtype):
    images = images_of(shape, count).astype(dtype)
    mean, deviations = spectrum(images, basis)
    assert mean.dtype == np.float32 and mean.shape == shape
    assert deviations.dtype == np.float64 and deviations.shape == shape
    np.testing.assert_allclose(mean, images.mean(0, dtype=np.float64), rtol=1e-6)
    matrix = np.eye(math.prod(shape)) if basis == Pixels() else np.float64(exact_matrix(basis, shape))
    expected = (images.reshape(count, -1).astype(np.float64) @ matrix.T).std(0).reshape(shape)
    np.testing.assert_allclose(deviations, expected, rtol=1e-5, atol=1e-5)


@each_or_pixels
def test_the_spectrum_of_whole_numbers_is_that_of_the_same_images(basis, shape):
    images = np.random.default_rng(0).integers(0, 256, (30, *shape)).astype(np.uint8)
    for found, expected in zip(spectrum(images, basis), spectrum(np.float64(images), basis), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@each_or_pixels
def test_images_that_hardly_differ_have_hardly_any_deviation(basis, shape):
    images = np.full((20, *shape), 0.7, np.float32)
    images[::2] += np.float32(1e-4)
    deviations = spectrum(images, basis)[1]
    np.testing.assert_allclose(np.linalg.norm(deviations), 5e-5 * np.sqrt(math.prod(shape)), rtol=0.01)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((), r"images must be \[m, \*d\], got shape \[\]"),
        ((7,), r"images must be \[m, \*d\], got shape \[7\]"),
        ((0, 4, 5, 3), r"images must be \[m, \*d\], got shape \[0, 4, 5, 3\]"),
        ((9, 4, 5), "the cosine basis is of images"),
        ((9, 4, 5, 2), "the cosine basis is of images"),
    ],
)
def test_images_that_have_no_spectrum_are_refused(shape, text):
    with pytest.raises(ValueError, match=text):
        spectrum(np.zeros(shape, np.float32), Cosine())


@dataclasses.dataclass(frozen=True)
class Turned(Cosine):
    """A basis of somebody else, which its description does not tell from the cosine basis."""


@pytest.mark.parametrize("basis", [Turned(), "cosine", None])
def test_a_basis_that_could_not_be_read_back_is_refused(basis, tmp_path):
    for make in (lambda: RunConfig(basis=basis), lambda: ThetaMap(np.ones((4, 4, 1)), basis)):
        with pytest.raises(Exception, match="basis"):
            make()
    if isinstance(basis, Turned):
        with pytest.raises(ValueError, match="basis must be Pixels"):
            save_memory(Memory.empty(2, basis), tmp_path / "memory.npz")


@pytest.mark.parametrize("value", ["cosine", Cosine, None])
def test_what_is_not_a_basis_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"basis must be a basis such as Cosine\(\), got "):
        inspect.unwrap(check_instance)(value)
