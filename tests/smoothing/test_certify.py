"""Certificates and predictions: closed forms, coverage, attacks; batches give what single calls give."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ancer_jax.memory import Memory
from ancer_jax.smoothing import (
    ABSTAIN,
    CertifyConfig,
    Gaussian,
    SequentialConfig,
    Smoothed,
    Uniform,
    bounds,
    certificate_from_votes,
    certify,
    certify_batch,
    certify_sequentially,
    count_votes,
    from_function,
    predict,
    predict_batch,
)
from ancer_jax.smoothing.smoothed import Stage
from tests import reference

CONFIG = CertifyConfig(n0=50, n=2000, alpha=0.001)
KEY = jax.random.key(0)


def linear_problems(count, d, seed=0):
    """Linear classifiers with random anisotropic theta and margins over the whole range of p_A."""
    rng = np.random.default_rng(seed)
    w, theta = rng.normal(size=(count, d)), rng.lognormal(-1, 0.7, (count, d))
    x = rng.normal(size=(count, d))
    gap = rng.uniform(0.2, 3, count) * rng.choice([-1, 1], count)
    b = gap * np.linalg.norm(w * theta, axis=1) - np.sum(w * x, axis=1)
    return (np.float32(a) for a in (w, b, theta, x)), gap


def certify_all(noise, w, b, theta, x, alpha):
    config = dataclasses.replace(CONFIG, alpha=alpha)
    linear = reference.linear(np.zeros(w.shape[1]))
    smoothed = Smoothed(dataclasses.replace(linear, variables={"w": w, "b": b}), noise, theta)

    def one(i, smoothed, x):
        return count_votes(jax.random.fold_in(jax.random.key(1), i), smoothed, x, config=config, chunk=500)

    selected, count = jax.jit(jax.vmap(one))(jnp.arange(len(w)), smoothed, x)
    return certificate_from_votes(smoothed, x, selected, count, config=config)


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_l2_regions_of_linear_classifiers_leave_the_true_one_no_more_often_than_alpha(alpha):
    (w, b, theta, x), gap = linear_problems(1000, 8)
    result = certify_all(Gaussian(), w, b, theta, x, alpha)
    wrong = (result.prediction != ABSTAIN) & ((result.gap > abs(gap)) | (result.prediction != (gap > 0)))
    assert scipy.stats.binomtest(int(wrong.sum()), 1000, alpha, alternative="greater").pvalue > 1e-3
    certified = result.prediction != ABSTAIN
    assert certified.mean() > 0.95
    assert np.median(result.gap[certified] / abs(gap[certified])) > 0.85


def test_l1_regions_of_one_coordinate_classifiers_leave_the_true_one_no_more_often_than_alpha():
    rng = np.random.default_rng(2)
    theta = rng.lognormal(-1, 0.7, (1000, 5)).astype(np.float32)
    gap = rng.uniform(0.1, 0.95, 1000)
    x = rng.normal(size=(1000, 5)).astype(np.float32)
    b = np.float32(gap * theta[:, 0] - x[:, 0])
    result = certify_all(Uniform(), np.tile(np.float32([1, 0, 0, 0, 0]), (1000, 1)), b, theta, x, 0.05)
    wrong = (result.prediction == 1) & (result.gap > gap)
    assert scipy.stats.binomtest(int(wrong.sum()), 1000, 0.05, alternative="greater").pvalue > 1e-3
    assert np.median(result.gap / gap) > 0.85


@pytest.mark.parametrize("noise", [Gaussian(), Uniform()])
def test_no_attack_inside_a_region_changes_the_smoothed_class(noise):
    d, rng = 3, np.random.default_rng(3)
    theta = np.float32([0.3, 1.0, 0.1])
    # Class 1 inside a box: not linear, and its smoothed probabilities are known exactly.
    low, high = np.array([-0.8, -1.5, -0.4]), np.array([0.6, 1.0, 0.5])
    law = scipy.stats.norm() if noise.norm == 2 else scipy.stats.uniform(-1, 2)
    probability = lambda y: np.prod(law.cdf((high - y) / theta) - law.cdf((low - y) / theta), axis=-1)

    box = from_function(in_box, np.float32([low, high]), num_classes=2)
    x = np.zeros(d, np.float32)
    result = certify(KEY, Smoothed(box, noise, theta), x, config=CertifyConfig(n=20_000))
    assert result.prediction == 1
    assert result.gap > 0.1
    directions = rng.normal(size=(20_000, d))
    directions /= np.linalg.norm(directions, ord=noise.norm, axis=1, keepdims=True)
    vertices = np.concatenate([np.eye(d), -np.eye(d)])
    points = x + theta * result.gap * np.concatenate([directions, vertices])
    region = dataclasses.replace(result.region, gap=result.gap * (1 + 1e-9))
    assert all(region.contains(point) for point in points[:: len(points) // 50])
    assert (probability(points) > 0.5).all()


def in_box(box, x):
    inside = jnp.all((x > box[0]) & (x < box[1]), axis=-1)
    return jnp.stack([jnp.zeros_like(inside), inside], axis=-1).astype(jnp.float32)


def test_certify_is_the_host_half_of_the_traced_half():
    smoothed, x, key = Smoothed(reference.linear([1.0, 2.0]), Gaussian(), 0.5), np.float32([0.5, 0.2]), KEY
    result = certify(key, smoothed, x, config=CONFIG, chunk=300)
    selected, count = count_votes(key, smoothed, x, config=CONFIG, chunk=2000)
    assert (result.prediction, result.count, result.n, result.alpha) == (selected, count, 2000, 0.001)
    assert result.p_lower == bounds.clopper_pearson_lower(int(count), 2000, 0.001)
    assert result.gap == Gaussian().gap(result.p_lower)


def between(borders, x):
    """Class 0 between two borders of a line, 1 below and 2 above them; above the last one NaN, which is no vote."""
    low, high, last = borders
    of_x = jnp.concatenate([(x > low) & (x < high), x <= low, x >= high], axis=1).astype(jnp.float32)
    return jnp.where(x < last, of_x, jnp.nan)


def probabilities(y, borders):
    """Of the three classes at y [...] under noise of theta 1, and of no vote: [4, ...]."""
    low, high, last = (scipy.stats.norm.cdf(border - y) for border in borders)
    return np.array([high - low, low, last - high, 1 - last])


@pytest.mark.parametrize(
    ("borders", "certified"),
    [((-0.6, 0.6, 9), True), ((-0.6, 0.6, 1.5), True), ((-0.6, 0.6, 0.9), False), ((-0.3, 0.3, 9), False)],
)
def test_separate_bounds_certify_without_a_majority_and_no_more_than_is_true(borders, certified):
    """On a line, where the probabilities of all classes are known everywhere. Draws without a vote may be anybody's."""
    config = CertifyConfig(n0=200, n=20_000, bound="separate")
    smoothed = Smoothed(from_function(between, np.float32(borders), num_classes=3), Gaussian(), np.float32(1))
    result = certify(KEY, smoothed, np.float32([0.0]), config=config)
    at_x, y = probabilities(0.0, borders), np.linspace(-3, 3, 60_001)
    gap = Gaussian().gap(at_x[0], at_x[1:3].max() + at_x[3])
    assert 0.7 * gap <= result.gap <= gap
    assert (result.prediction, gap > 0) == ((0, True) if certified else (ABSTAIN, False))
    classes = probabilities(y, borders)[:3]
    assert (classes.argmax(axis=0)[abs(y) < result.gap] == 0).all()
    two_class = certify(KEY, smoothed, np.float32([0.0]), config=dataclasses.replace(config, bound="two-class"))
    assert (two_class.prediction, two_class.count) == (ABSTAIN, result.count)


def test_separate_bounds_are_the_same_by_the_traced_half():
    smoothed = Smoothed(from_function(between, np.float32([-0.6, 0.6, 1.5]), num_classes=3), Gaussian(), np.float32(1))
    config, xs = CertifyConfig(n0=20, n=2_000, bound="separate"), np.float32([[0.0], [0.2], [-1.5], [1.0]])
    batch = certify_batch(KEY, smoothed, xs, config=config)
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(4))
    selected, count = jax.jit(jax.vmap(lambda key, x: count_votes(key, smoothed, x, config=config, chunk=300)))(
        keys, xs
    )
    assert count.shape == (4, 2) and (count.sum(axis=1) < 2_000).any()
    same = certificate_from_votes(smoothed, xs, selected, count, config=config)
    np.testing.assert_array_equal(same.gap, batch.gap)
    np.testing.assert_array_equal((same.prediction, same.count), (batch.prediction, batch.count))
    assert set(batch.prediction) >= {0, 1}


def test_selection_and_estimation_share_no_draw():
    key, theta = jax.random.key(7), jnp.ones(1)
    select, estimate = (reference.draws(key, s, Gaussian(), theta, 500) for s in (Stage.SELECT, Stage.ESTIMATE))
    assert not np.isin(select, estimate).any()
    smoothed, config = Smoothed(reference.linear([1.0]), Gaussian(), 1.0), CertifyConfig(n0=9, n=500)
    assert (select[:9] > 0).sum() != (estimate[:9] > 0).sum()
    x = np.float32([-np.median([*select[:9, 0], *estimate[:9, 0]])])  # the first draws of the stages disagree
    expected = int((x + select[:9] > 0).sum() > 4)
    assert expected != int((x + estimate[:9] > 0).sum() > 4)
    selected, count = count_votes(key, smoothed, x, config=config, chunk=50)
    assert (selected, count) == (expected, ((x + estimate > 0) == expected).sum())


def test_an_undecided_input_abstains():
    smoothed = Smoothed(reference.linear([1.0]), Gaussian(), 1.0)
    result = certify(KEY, smoothed, np.float32([0.0]), config=CONFIG)
    assert (result.prediction, result.gap) == (ABSTAIN, 0)
    assert predict(KEY, smoothed, np.float32([0.0])) == ABSTAIN
    assert predict(KEY, smoothed, np.float32([2.0])) == 1
    assert predict(KEY, smoothed, np.float32([-2.0])) == 0


def test_too_few_samples_abstain():
    config = CertifyConfig(n0=10, n=9, alpha=0.001)
    arguments = KEY, Smoothed(reference.constant([0, 1]), Gaussian(), 1.0), np.zeros(2, np.float32)
    with pytest.warns(match="with n = 9 draws every input abstains at alpha = 0.001, .* n must be at least 10"):
        result = certify(*arguments, config=config)
    assert result.count == 9
    assert result.prediction == ABSTAIN
    assert certify(*arguments, config=dataclasses.replace(config, n=10)).prediction == 1  # without a warning
    with pytest.warns(match="n = 10 draws decide nothing at alpha = 0.001, .* n must be at least 11"):
        assert predict(*arguments, n=10, alpha=0.001) == ABSTAIN
    assert predict(*arguments, n=11, alpha=0.001) == 1


def test_prediction_is_wrong_no_more_often_than_alpha():
    smoothed, xs = Smoothed(reference.linear([1.0]), Gaussian(), 1.0), np.full((300, 1), 0.02, np.float32)
    answers = predict_batch(jax.random.key(3), smoothed, xs, n=100, alpha=0.1).tolist()
    assert scipy.stats.binomtest(answers.count(0), 300, 0.1, alternative="greater").pvalue > 1e-3
    assert answers.count(ABSTAIN) > 150


@pytest.mark.parametrize("noise", [Gaussian(), Uniform()])
def test_the_region_is_that_of_the_callers_theta_and_center(noise):
    """float64 arguments are certified as float32; the region that is returned must lie in the certified one."""
    smoothed, x = Smoothed(reference.linear([1.0, 1.0]), noise, np.array([0.7, 0.9])), np.array([0.7, 0.1])
    theta, norm = smoothed.theta, functools.partial(np.linalg.norm, ord=noise.norm)
    exact = certify(KEY, smoothed.with_theta(np.float32(theta)), np.float32(x), config=CONFIG).gap
    result = certify(KEY, smoothed, x, config=CONFIG)
    np.testing.assert_array_equal(result.region.center, x)
    np.testing.assert_array_equal(result.region.theta, theta)
    assert result.gap == pytest.approx(exact, rel=1e-5)
    rng = np.random.default_rng(0)
    for direction in rng.normal(size=(200, 2)):
        point = x + theta * result.gap * direction / norm(direction)
        assert norm((point - np.float32(x)) / np.float64(np.float32(theta))) <= exact * (1 + 1e-15)


@pytest.mark.parametrize("noise", [Gaussian(), Uniform()])
def test_where_rounding_moves_x_by_more_than_the_gap_nothing_is_certified(noise):
    """1e8 + 3 is 1e8 as float32. The shift is taken in the norm of the region: in l1 that of two pixels adds up."""
    smoothed = Smoothed(reference.linear([1.0]), noise, np.float64(1))
    sequentially = functools.partial(certify_sequentially, sequential=SequentialConfig(radii=(0.0, 0.5)))
    for function in (certify, sequentially):
        exact = function(KEY, smoothed, np.float32([1e8]), config=CONFIG)
        assert exact.prediction == 1 and exact.gap > 0
        moved = function(KEY, smoothed, np.float64([1e8 + 3]), config=CONFIG)
        assert (moved.prediction, moved.gap) == (ABSTAIN, 0)
    of_two = Smoothed(reference.linear([1.0, 1.0]), noise, np.float64(100))
    exact, moved = (certify(KEY, of_two, np.full(2, 1e8) + shift, config=CONFIG) for shift in (0, 3))
    assert moved.gap == pytest.approx(exact.gap - 0.03 * 2 ** (1 / noise.norm), rel=1e-6)


@pytest.mark.parametrize(
    ("x", "theta", "text"),
    [
        (np.float32([0.0, np.nan]), 1.0, "x must be finite as float32, got nan"),
        (np.float32([0.0, 1.0]), 0.0, "theta must be positive as float32, got 0.0"),
        (np.float32([0.0, 1.0]), -1.0, "theta must be positive as float32, got -1.0"),
        (np.float32([0.0, 1.0]), np.inf, "theta must be finite as float32, got inf"),
        (np.float32([0.0, 1.0]), np.float32([1.0, 0.0]), "theta must be positive"),
        (np.float32([0.0, 1.0]), 1e-50, "theta must be positive as float32, got 1e-50"),
        (np.float32([0.0, 1.0]), 1e39, r"theta must be finite as float32, got 1e\+39"),
        (
            np.float32([0.0, 1.0]),
            np.ones(3, np.float32),
            r"theta must be a scalar or have x's shape \[2\],.* got \[3\]",
        ),
    ],
)
def test_what_cannot_be_certified_is_refused(x, theta, text):
    smoothed = Smoothed(reference.linear([1.0, 1.0]), Gaussian(), theta)
    for function in (certify, predict):
        with pytest.raises(ValueError, match=text):
            function(KEY, smoothed, x)
    for function in (certify_batch, predict_batch):
        with pytest.raises(ValueError, match=text):
            function(KEY, smoothed, x[None])


@pytest.mark.usefixtures("without_type_checker")
def test_theta_may_be_an_integer_and_images_may_not():
    smoothed, x = Smoothed(reference.linear([1.0, 1.0]), Gaussian(), 1), np.float32([0.5, 0.5])
    assert certify(KEY, smoothed, x, config=CONFIG).gap == certify(KEY, smoothed.with_theta(1.0), x, config=CONFIG).gap
    with pytest.raises(ValueError, match=r"x must be floating point, got uint8 \(divide 8-bit pixels by 255\)"):
        certify(KEY, smoothed, np.zeros(2, np.uint8), config=CONFIG)


@pytest.mark.parametrize("change", [{"n": 0}, {"n0": 0}, {"alpha": 0.0}, {"alpha": 1.0}, {"n": 2**31}])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        CertifyConfig(**change)


@pytest.mark.parametrize("function", [certify, predict, certify_batch, predict_batch])
def test_reports_are_refused_inside_jit(function):
    smoothed, x = Smoothed(reference.linear([1.0, 1.0]), Gaussian(), 1.0), np.zeros((1, 2), np.float32)
    with pytest.raises(TypeError, match="count_votes"):
        jax.jit(lambda x: jnp.asarray(function(KEY, smoothed, x)))(x)
    with pytest.raises(TypeError, match="count_votes"):
        jax.jit(lambda theta: jnp.asarray(function(KEY, smoothed.with_theta(theta), x)))(np.float32(1.0))


XS = np.random.default_rng(0).normal(0, 0.5, (6, 3, 2)).astype(np.float32)
MAP = np.random.default_rng(1).uniform(0.2, 1, (3, 2)).astype(np.float32)
LINEAR = reference.linear(np.linspace(-1, 1.5, 6), b=0.1)


@pytest.mark.parametrize("noise", [Gaussian(), Uniform()])
@pytest.mark.parametrize("theta", [np.float32(0.4), MAP, np.float64(MAP)], ids=["scalar", "map", "float64"])
@pytest.mark.parametrize("ids", [None, np.array([7, 0, 123_456, 2**31 - 1, 5, 9])], ids=["counted", "given"])
@pytest.mark.parametrize("chunk", [1000, 37])
def test_certify_batch_gives_what_certify_gives_for_each_input(noise, theta, ids, chunk):
    smoothed, config = Smoothed(LINEAR, noise, theta), CertifyConfig(n0=20, n=300)
    batch = certify_batch(KEY, smoothed, XS, ids=ids, config=config, chunk=chunk)
    keys = [jax.random.fold_in(KEY, i) for i in (range(6) if ids is None else ids)]
    reference.assert_same_certificates(
        batch, [certify(key, smoothed, x, config=config) for key, x in zip(keys, XS, strict=True)]
    )
    assert batch.radius.shape == batch.proxy_radius.shape == batch.log_volume.shape == batch.count.shape == (6,)
    assert batch.region.center.shape == (6, 3, 2) and batch.region.theta.shape == (6, *np.shape(theta))
    assert len(np.unique(batch.count)) > 1


@pytest.mark.parametrize("noise", [Gaussian(), Uniform()])
@pytest.mark.parametrize("theta", [np.float32(0.4), MAP], ids=["scalar", "map"])
@pytest.mark.parametrize("ids", [None, np.array([7, 0, 123_456, 2**31 - 1, 5, 9])], ids=["counted", "given"])
def test_predict_batch_gives_what_predict_gives_for_each_input(noise, theta, ids):
    smoothed = Smoothed(LINEAR, noise, theta)
    answers = predict_batch(KEY, smoothed, XS / 4, ids=ids, n=300, alpha=0.01)
    keys = [jax.random.fold_in(KEY, i) for i in (range(6) if ids is None else ids)]
    for chunk in (1000, 37):
        expected = [
            predict(key, smoothed, x, n=300, alpha=0.01, chunk=chunk) for key, x in zip(keys, XS / 4, strict=True)
        ]
        np.testing.assert_array_equal(answers, expected)
    assert answers.dtype == np.int64 and answers.shape == (6,)
    assert len(np.unique(answers)) > 1


def certify_by_parts(key, smoothed, x, *, config):
    return certificate_from_votes(smoothed, x, *count_votes(key, smoothed, x, config=config, chunk=300), config=config)


@pytest.mark.parametrize("make", [certify, certify_by_parts])
@pytest.mark.parametrize("theta", [np.float32(0.4), MAP], ids=["scalar", "map"])
def test_a_certificate_does_not_change_with_the_arrays_that_it_was_made_from(theta, make):
    x, theta = XS[0].copy(), np.array(theta)
    certificate = make(KEY, Smoothed(LINEAR, Gaussian(), theta), x, config=CertifyConfig(n=300))
    before = [np.array(leaf) for leaf in jax.tree.leaves(certificate)]
    x[...], theta[...] = -1, 9
    for old, new in zip(before, jax.tree.leaves(certificate), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.usefixtures("without_type_checker")
def test_what_is_no_smoothed_classifier_is_refused():
    text = r"smoothed must be of type Smoothed, got Classifier: Smoothed\(classifier, noise, theta\)"
    for function, one in ((certify, XS[0]), (predict, XS[0]), (certify_batch, XS), (predict_batch, XS)):
        with pytest.raises(ValueError, match=text):
            function(KEY, LINEAR, one)
    with pytest.raises(ValueError, match=r"x must not be empty, got shape \[0\]"):
        certify(KEY, Smoothed(LINEAR, Gaussian(), 0.5), XS[0, 0, :0])
    with pytest.raises(ValueError, match=r"got arguments of types .*; write Gaussian\(\)"):
        Smoothed(LINEAR, Gaussian, 0.5)


THETAS = np.random.default_rng(2).uniform(0.2, 1, XS.shape)


@pytest.mark.parametrize("thetas", [np.float32(THETAS[:, 0, 0]), THETAS], ids=["numbers", "maps of float64"])
def test_a_batch_may_have_a_theta_for_each_input(thetas):
    smoothed, config = Smoothed(LINEAR, Gaussian(), thetas), CertifyConfig(n0=20, n=300)
    batch = certify_batch(KEY, smoothed, XS, config=config)
    keys = [jax.random.fold_in(KEY, i) for i in range(6)]
    each = list(zip(keys, map(smoothed.with_theta, thetas), XS, strict=True))
    reference.assert_same_certificates(batch, [certify(*one, config=config) for one in each])
    np.testing.assert_array_equal(batch.region.theta, thetas)
    np.testing.assert_array_equal(predict_batch(KEY, smoothed, XS), [predict(*one) for one in each])


@pytest.mark.parametrize(
    ("xs", "theta", "text"),
    [
        (XS, THETAS[:5], r"have x's shape \[3, 2\], or be one for each of 6 inputs, got \[5, 3, 2\]"),
        (XS, THETAS[:, 0], r"one for each of 6 inputs, got \[6, 2\]"),
        (
            XS[:2, 0],
            THETAS[:2, 0, 0],
            r"theta of shape \[2\] may be .* a number for each input: give it shape \[2, 2\]",
        ),
        (XS, -THETAS, "theta must be positive"),
    ],
)
def test_thetas_that_do_not_fit_a_batch_are_refused(xs, theta, text):
    for function in (certify_batch, predict_batch):
        with pytest.raises(ValueError, match=text):
            function(KEY, Smoothed(LINEAR, Gaussian(), theta), xs)


def test_the_id_of_an_input_decides_its_draws_not_its_place():
    smoothed, config, ids = Smoothed(LINEAR, Gaussian(), MAP), CertifyConfig(n0=20, n=300), np.arange(6) + 10
    batch = certify_batch(KEY, smoothed, XS, ids=ids, config=config)
    back = certify_batch(KEY, smoothed, XS[::-1], ids=ids[::-1], config=config)
    np.testing.assert_array_equal(back.count[::-1], batch.count)
    some = certify_batch(KEY, smoothed, XS[2:4], ids=ids[2:4], config=config)
    np.testing.assert_array_equal(some.count, batch.count[2:4])
    assert (certify_batch(KEY, smoothed, XS, config=config).count != batch.count).any()


@pytest.mark.usefixtures("without_type_checker")
@pytest.mark.parametrize(
    ("xs", "ids", "text"),
    [
        (XS[:0], None, r"xs must be one or more inputs \[m, \*d\], got shape \[0, 3, 2\]"),
        (np.float32(1.0), None, r"xs must be one or more inputs \[m, \*d\], got shape \[\]"),
        (XS, [0, 1], r"ids must be 6 integers, got int64 \[2\]"),
        (XS, np.arange(6.0), r"ids must be 6 integers, got float64 \[6\]"),
        (XS, [0, 1, 2, 3, 4, -1], r"ids must be in 0\.\.2\^31 - 1, got -1 to 4"),
        (XS, [0, 1, 2, 3, 4, 2**31], r"ids must be in 0\.\.2\^31 - 1, got 0 to 2147483648"),
        (XS, [0, 1, 2, 3, 3, 5], "ids must be different numbers, got 3 2 times"),
    ],
)
def test_batches_whose_inputs_or_ids_do_not_fit_are_refused(xs, ids, text):
    for function in (certify_batch, predict_batch):
        with pytest.raises(ValueError, match=text):
            function(KEY, Smoothed(LINEAR, Gaussian(), 0.5), xs, ids=ids)


def test_a_batch_in_which_every_input_must_abstain_says_so():
    smoothed, few = Smoothed(LINEAR, Gaussian(), 0.5), CertifyConfig(n0=5, n=9)
    with pytest.warns(match="with n = 9 draws every input abstains at alpha = 0.001") as warned:
        batch = certify_batch(KEY, smoothed, XS, config=few)
    assert len(warned) == 1 and (batch.prediction == ABSTAIN).all()
    with pytest.warns(match="n = 10 draws decide nothing at alpha = 0.001"):
        assert (predict_batch(KEY, smoothed, XS, n=10) == ABSTAIN).all()


@pytest.mark.parametrize("noise", [Gaussian(), Uniform()])
def test_certificates_go_into_a_memory_one_by_one_or_as_a_batch(noise):
    """Wide noise for inputs near each other and near the border: some certificates contradict earlier ones."""
    smoothed = Smoothed(reference.linear([1.0, 0.5]), noise, np.float32([1.0, 2.0]))
    xs = np.random.default_rng(2).normal(0, 0.3, (12, 2)).astype(np.float32)
    certificates = certify_batch(KEY, smoothed, xs, config=CertifyConfig(n0=20, n=300, alpha=0.1))
    regions = dataclasses.replace(certificates.region, gap=2 * certificates.gap)  # larger than they are
    certificates = dataclasses.replace(certificates, region=regions)
    together, answers = Memory.empty(noise.norm).insert_batch(certificates)
    memory = Memory.empty(noise.norm)
    for i, one in enumerate(certificates):
        memory, answer = memory.insert(one)
        for value, expected in zip(jax.tree.leaves(answer), jax.tree.leaves(answers), strict=True):
            np.testing.assert_array_equal(value, np.asarray(expected)[i])
        assert (answer.gap, answer.radius) == (answers.gap[i], answers.radius[i])
        assert answer.proxy_radius == pytest.approx(answers.proxy_radius[i], rel=1e-14)
    np.testing.assert_array_equal(memory.predictions, together.predictions)
    np.testing.assert_array_equal(memory.regions.gap, together.regions.gap)
    assert answers.changed.any() and (answers.prediction != ABSTAIN).any()


LATER = np.float32(-1e-6)


@pytest.mark.slow
def test_alpha_is_of_each_certificate_and_adds_up_in_the_memory():
    """Four inputs on one side of a threshold, then one just beyond it: every earlier region that is too large holds it.

    Before memory its own certificate is wrong with probability alpha; after, with up to five times that.
    """
    alpha, trials, config = 0.05, 2000, CertifyConfig(n0=50, n=200, alpha=0.05)
    smoothed, xs = Smoothed(reference.linear([1.0]), Gaussian(), 1.0), np.float32([[0.5], [0.7], [0.9], [1.1], [LATER]])

    def one(key, x):
        return count_votes(key, smoothed, x, config=config, chunk=50)

    keys = jax.vmap(jax.random.key)(jnp.arange(trials * len(xs))).reshape(trials, len(xs))
    selected, count = jax.jit(jax.vmap(jax.vmap(one), (0, None)))(keys, xs)
    inputs = np.broadcast_to(xs, (trials, *xs.shape))
    before = certificate_from_votes(smoothed, inputs, selected, count, config=config)
    wrong = lambda x, prediction, gap: (prediction == 1) & (x - gap < 0) | (prediction == 0) & (x + gap > 0)
    wrong_before = wrong(xs[:, 0], before.prediction, before.gap)
    wrong_after = np.zeros(trials, bool)
    for i in range(trials):
        _, answers = Memory.empty(2).insert_batch(before[i])
        wrong_after[i] = wrong(LATER, answers.prediction[-1], answers.gap[-1])
        if answers.prediction[-1] != before.prediction[i, -1]:
            assert wrong_before[i, int(answers.inside[-1])]
        assert wrong_before[i].any() or not wrong_after[i]
    too_often = lambda bound: scipy.stats.binomtest(int(wrong_after.sum()), trials, bound, alternative="greater").pvalue
    assert scipy.stats.binomtest(int(wrong_before[:, -1].sum()), trials, alpha, alternative="greater").pvalue > 1e-3
    assert too_often(alpha) < 1e-12  # so alpha alone is no bound
    assert too_often(5 * alpha) > 1e-3
    assert wrong_after.mean() > 3 * wrong_before[:, -1].mean()


@pytest.mark.parametrize("selected", [2, [2, 0]])
def test_votes_of_separate_bounds_are_no_votes_of_two_class_bounds(selected):
    """The votes of the runner-up would become those of the selected class of another certificate."""
    count = np.broadcast_to([10, 900], (*np.shape(selected), 2))
    smoothed = Smoothed(reference.linear(np.ones(3)), Gaussian(), np.float32(0.5))
    with pytest.raises(ValueError, match="for two-class bounds and this selected class, got"):
        certificate_from_votes(smoothed, np.zeros(3), np.array(selected), count, config=CertifyConfig(n=1_000))


def test_a_certificate_from_votes_is_around_the_numbers_that_were_counted():
    smoothed = Smoothed(LINEAR, Gaussian(), 0.7)  # as float32 it is smaller
    x = np.full(XS.shape[1:], 0.1)
    certificate = certificate_from_votes(smoothed, x, 1, 990, config=CertifyConfig(n=1_000))
    assert float(certificate.region.theta) == float(np.float32(0.7)) < 0.7
    np.testing.assert_array_equal(certificate.region.center, x.astype(np.float32))
