import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ancer_jax import ABSTAIN, CertifyConfig, GaussianL2, Region, UniformL1, bounds, certify, memory, predict, regions
from ancer_jax.certification import certification, count_votes
from ancer_jax.smoothing import Stage
from tests import reference

CONFIG = CertifyConfig(n0=50, n=2000, alpha=0.001)


def linear_problems(count, d, seed=0):
    """Linear classifiers with random anisotropic theta and margins over the whole range of p_A."""
    rng = np.random.default_rng(seed)
    w, theta = rng.normal(size=(count, d)), rng.lognormal(-1, 0.7, (count, d))
    x = rng.normal(size=(count, d))
    gap = rng.uniform(0.2, 3, count) * rng.choice([-1, 1], count)
    b = gap * np.linalg.norm(w * theta, axis=1) - np.sum(w * x, axis=1)
    return (np.float32(a) for a in (w, b, theta, x)), gap


def certify_all(certificate, w, b, theta, x, alpha):
    config = dataclasses.replace(CONFIG, alpha=alpha)

    def one(i, w, b, theta, x):
        classifier = reference.linear(np.zeros(len(w)))
        classifier = dataclasses.replace(classifier, variables={"w": w, "b": b})
        return count_votes(
            jax.random.fold_in(jax.random.key(1), i), classifier, certificate, x, theta, config=config, chunk=500
        )

    selected, count = jax.jit(jax.vmap(one))(jnp.arange(len(w)), w, b, theta, x)
    return certification(selected, count, certificate=certificate, config=config)


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_l2_regions_of_linear_classifiers_leave_the_true_one_no_more_often_than_alpha(alpha):
    (w, b, theta, x), gap = linear_problems(1000, 8)
    result = certify_all(GaussianL2(), w, b, theta, x, alpha)
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
    result = certify_all(UniformL1(), np.tile(np.float32([1, 0, 0, 0, 0]), (1000, 1)), b, theta, x, 0.05)
    wrong = (result.prediction == 1) & (result.gap > gap)
    assert scipy.stats.binomtest(int(wrong.sum()), 1000, 0.05, alternative="greater").pvalue > 1e-3
    assert np.median(result.gap / gap) > 0.85


@pytest.mark.parametrize("certificate", [GaussianL2(), UniformL1()])
def test_no_attack_inside_a_region_changes_the_smoothed_class(certificate):
    d, rng = 3, np.random.default_rng(3)
    theta = np.float32([0.3, 1.0, 0.1])
    # Class 1 inside a box: not linear, and its smoothed probabilities are known exactly.
    low, high = np.array([-0.8, -1.5, -0.4]), np.array([0.6, 1.0, 0.5])
    law = scipy.stats.norm() if certificate.norm == 2 else scipy.stats.uniform(-1, 2)
    probability = lambda y: np.prod(law.cdf((high - y) / theta) - law.cdf((low - y) / theta), axis=-1)

    box = reference.ancer_jax.from_function(in_box, np.float32([low, high]), num_classes=2)
    x = np.zeros(d, np.float32)
    result = certify(jax.random.key(0), box, certificate, x, theta, config=CertifyConfig(n=20_000))
    assert result.prediction == 1
    assert result.gap > 0.1
    directions = rng.normal(size=(20_000, d))
    directions /= np.linalg.norm(directions, ord=certificate.norm, axis=1, keepdims=True)
    vertices = np.concatenate([np.eye(d), -np.eye(d)])
    points = x + theta * result.gap * np.concatenate([directions, vertices])
    region = Region(x, theta, result.gap * (1 + 1e-9), certificate.norm)
    assert all(regions.contains(region, point) for point in points[:: len(points) // 50])
    assert (probability(points) > 0.5).all()


def in_box(box, x):
    inside = jnp.all((x > box[0]) & (x < box[1]), axis=-1)
    return jnp.stack([jnp.zeros_like(inside), inside], axis=-1).astype(jnp.float32)


def test_certify_is_the_host_half_of_the_traced_half():
    classifier, x, key = reference.linear([1.0, 2.0]), np.float32([0.5, 0.2]), jax.random.key(5)
    result = certify(key, classifier, GaussianL2(), x, 0.5, config=CONFIG, chunk=300)
    selected, count = count_votes(key, classifier, GaussianL2(), x, 0.5, config=CONFIG, chunk=2000)
    assert (result.prediction, result.count, result.n) == (selected, count, 2000)
    assert result.p_lower == bounds.clopper_pearson_lower(int(count), 2000, 0.001)
    assert result.gap == GaussianL2().gap(result.p_lower)


def test_selection_and_estimation_share_no_draw():
    key, theta = jax.random.key(7), jnp.ones(1)
    select, estimate = (reference.draws(key, s, GaussianL2(), theta, 500) for s in (Stage.SELECT, Stage.ESTIMATE))
    assert not np.isin(select, estimate).any()
    classifier = reference.linear([1.0])
    _, count = count_votes(key, classifier, GaussianL2(), np.float32([0.0]), 1.0, config=CertifyConfig(n=500), chunk=50)
    assert count in ((estimate > 0).sum(), (estimate <= 0).sum())


def test_an_undecided_input_abstains():
    classifier, x = reference.linear([1.0]), np.float32([0.0])
    result = certify(jax.random.key(0), classifier, GaussianL2(), x, 1.0, config=CONFIG)
    assert (result.prediction, result.gap) == (ABSTAIN, 0)
    assert predict(jax.random.key(0), classifier, GaussianL2(), x, 1.0) == ABSTAIN
    assert predict(jax.random.key(0), classifier, GaussianL2(), np.float32([2.0]), 1.0) == 1
    assert predict(jax.random.key(0), classifier, GaussianL2(), np.float32([-2.0]), 1.0) == 0


def test_too_few_samples_abstain():
    config = CertifyConfig(n0=10, n=9, alpha=0.001)
    arguments = jax.random.key(0), reference.constant([0, 1]), GaussianL2(), np.zeros(2, np.float32), 1.0
    with pytest.warns(match="with n = 9 draws every input abstains at alpha = 0.001, .* n must be at least 10"):
        result = certify(*arguments, config=config)
    assert result.count == 9
    assert result.prediction == ABSTAIN
    assert certify(*arguments, config=dataclasses.replace(config, n=10)).prediction == 1  # without a warning
    with pytest.warns(match="n = 10 draws decide nothing at alpha = 0.001, .* n must be at least 11"):
        assert predict(*arguments, n=10, alpha=0.001) == ABSTAIN
    assert predict(*arguments, n=11, alpha=0.001) == 1


def test_prediction_is_wrong_no_more_often_than_alpha():
    classifier, key = reference.linear([1.0]), jax.random.key(3)
    x = np.float32([0.02])
    answers = [
        predict(jax.random.fold_in(key, i), classifier, GaussianL2(), x, 1.0, n=100, alpha=0.1) for i in range(300)
    ]
    assert scipy.stats.binomtest(answers.count(0), 300, 0.1, alternative="greater").pvalue > 1e-3
    assert answers.count(ABSTAIN) > 150


def test_the_region_is_that_of_the_callers_theta_and_centre():
    """float64 arguments are drawn around as float32; what is returned must fit inside what was certified."""
    classifier, key = reference.linear([1.0, 1.0]), jax.random.key(0)
    x, theta = np.array([0.7, 0.1]), np.array([0.7, 0.9])
    exact = certify(key, classifier, GaussianL2(), np.float32(x), np.float32(theta), config=CONFIG).gap
    gap = certify(key, classifier, GaussianL2(), x, theta, config=CONFIG).gap
    assert gap == pytest.approx(exact, rel=1e-5)
    rng = np.random.default_rng(0)
    for direction in rng.normal(size=(200, 2)):
        point = x + theta * gap * direction / np.linalg.norm(direction)
        assert np.linalg.norm((point - np.float32(x)) / np.float64(np.float32(theta))) <= exact * (1 + 1e-15)


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
        (np.float32([0.0, 1.0]), np.ones(3, np.float32), r"theta must be a scalar or have x's shape \[2\], got \[3\]"),
    ],
)
def test_what_cannot_be_certified_is_refused(x, theta, text):
    for function in (certify, predict):
        with pytest.raises(ValueError, match=text):
            function(jax.random.key(0), reference.linear([1.0, 1.0]), GaussianL2(), x, theta)


@pytest.mark.parametrize("change", [{"n": 0}, {"n0": 0}, {"alpha": 0.0}, {"alpha": 1.0}, {"n": 2**31}])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        CertifyConfig(**change)


def test_reports_are_refused_inside_jit():
    classifier = reference.linear([1.0, 1.0])
    with pytest.raises(TypeError, match="count_votes"):
        jax.jit(lambda x: certify(jax.random.key(0), classifier, GaussianL2(), x, 1.0).gap)(np.zeros(2, np.float32))


LATER = np.float32(-1e-6)


@pytest.mark.slow
def test_alpha_is_of_each_certificate_and_adds_up_in_the_memory():
    """Four inputs on one side of a threshold, then one just beyond it: every earlier region that is too large holds it.

    Before memory its own certificate is wrong with probability alpha; after, with up to five times that.
    """
    alpha, trials, config = 0.05, 2000, CertifyConfig(n0=50, n=200, alpha=0.05)
    xs = np.float32([[0.5], [0.7], [0.9], [1.1], [LATER]])

    def one(key, x):
        return count_votes(key, reference.linear([1.0]), GaussianL2(), x, 1.0, config=config, chunk=50)

    keys = jax.vmap(jax.random.key)(jnp.arange(trials * len(xs))).reshape(trials, len(xs))
    selected, count = jax.jit(jax.vmap(jax.vmap(one), (0, None)))(keys, xs)
    before = certification(selected, count, certificate=GaussianL2(), config=config)
    wrong = lambda x, prediction, gap: (prediction == 1) & (x - gap < 0) | (prediction == 0) & (x + gap > 0)
    wrong_before = wrong(xs[:, 0], before.prediction, before.gap)
    wrong_after = np.zeros(trials, bool)
    for i in range(trials):
        regions = Region(xs, np.ones(len(xs)), before.gap[i], 2)
        _, info = memory.insert_batch(memory.empty(2), regions, before.prediction[i])
        wrong_after[i] = wrong(LATER, info.prediction[-1], info.region.gap[-1])
        if info.prediction[-1] != before.prediction[i, -1]:
            assert wrong_before[i, int(info.inside[-1])]
        assert wrong_before[i].any() or not wrong_after[i]
    too_often = lambda bound: scipy.stats.binomtest(int(wrong_after.sum()), trials, bound, alternative="greater").pvalue
    assert scipy.stats.binomtest(int(wrong_before[:, -1].sum()), trials, alpha, alternative="greater").pvalue > 1e-3
    assert too_often(alpha) < 1e-12  # so alpha alone is no bound
    assert too_often(5 * alpha) > 1e-3
    assert wrong_after.mean() > 3 * wrong_before[:, -1].mean()
