"""Carried certificates: votes that are lost, the bounds that follow, and what is true of the changed network."""

import fractions

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import ancer_jax as aj
from ancer_jax.basis import Cosine
from ancer_jax.smoothing import bounds, from_function
from ancer_jax.smoothing.carry import carried_bound_and_gap, certificate_from_lost_votes
from ancer_jax.smoothing.smoothed import Stage
from tests import reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(3, impl="threefry2x32")
W = np.array([1.0, -0.5, 2.0, 0.25], np.float32)
X = np.array([0.3, 0.1, -0.2, 0.4], np.float32)
THETA = np.array([0.2, 0.4, 0.3, 0.5], np.float32)
BEFORE, CHANGED = reference.linear(W, 0.3), reference.linear(W, 0.1)
SMOOTHED = aj.Smoothed(BEFORE, aj.Gaussian(), THETA)
CONFIG = aj.CarryConfig(n=2_000, alpha=0.001)


def lost(smoothed=SMOOTHED, changed=CHANGED, config=CONFIG, chunk=500):
    return np.asarray(aj.count_lost_votes(KEY, smoothed, changed, X, config=config, chunk=chunk))


def test_lost_votes_of_linear_classifiers_have_the_binomial_law_of_the_closed_form():
    n, spread = 20_000, np.linalg.norm(W * THETA)
    one, other = (scipy.stats.norm.cdf((W @ X + b) / spread) for b in (0.3, 0.1))  # P(class 1)
    votes = lost(config=aj.CarryConfig(n=n))
    assert votes[0] == 0  # a smaller offset gives class 0 more votes
    assert scipy.stats.binomtest(int(votes[1]), n, one - other).pvalue > 1e-3
    assert one - other > 0.05
    back = lost(aj.Smoothed(CHANGED, aj.Gaussian(), THETA), BEFORE, aj.CarryConfig(n=n))
    assert back.tolist() == [votes[1], 0]  # the same draws, and what one class loses the other one wins


@pytest.mark.parametrize("noise", [aj.Gaussian(), aj.Uniform()])
@pytest.mark.parametrize("chunk", [1, 7, 300, 1000])
def test_lost_votes_are_those_of_a_naive_count(noise, chunk):
    smoothed = aj.Smoothed(BEFORE, noise, THETA)
    expected = np.zeros(2, int)
    key = jax.random.fold_in(KEY, Stage.CARRY)
    copies = jax.vmap(lambda i: noise.perturb(key, i, jnp.asarray(X), jnp.asarray(THETA)))(jnp.arange(300))
    for old, new in zip(BEFORE(copies).argmax(1), CHANGED(copies).argmax(1), strict=True):
        expected[old] += old != new
    assert lost(smoothed, config=aj.CarryConfig(n=300), chunk=chunk).tolist() == expected.tolist()
    assert expected.sum() > 10


def test_a_class_loses_the_share_of_its_votes_that_the_change_flips():
    def flipped(variables, x):
        return jnp.where(x[:, :1] > X[0], -1, 1) * reference.linear_logits(variables, x)

    certain = aj.Smoothed(reference.linear(W, 100.0), aj.Gaussian(), THETA)  # always class 1
    votes = lost(certain, from_function(flipped, certain.classifier.variables, num_classes=2))
    assert votes[0] == 0 and scipy.stats.binomtest(int(votes[1]), CONFIG.n, 0.5).pvalue > 1e-3


def test_a_draw_with_a_nan_votes_for_no_class():
    nan = from_function(lambda variables, x: jnp.full((len(x), 2), jnp.nan), (), num_classes=2)
    counts = aj.smoothing.class_counts(jax.random.fold_in(KEY, Stage.CARRY), SMOOTHED, X, num_samples=2000, chunk=500)
    assert lost(changed=nan).tolist() == counts.tolist()  # every vote is lost
    assert lost(aj.Smoothed(nan, aj.Gaussian(), THETA), BEFORE).tolist() == [0, 0]  # there was none to lose
    assert lost(aj.Smoothed(nan, aj.Gaussian(), THETA), nan).tolist() == [0, 0]


def on_host(offset):
    def logits(x):
        score = np.asarray(x) @ W + np.float32(offset)
        return np.stack([np.zeros_like(score), score], axis=-1)

    return aj.from_host(logits, num_classes=2)


@pytest.mark.parametrize(
    ("before", "changed"), [(on_host(0.3), on_host(0.1)), (on_host(0.3), CHANGED), (BEFORE, on_host(0.1))]
)
def test_classifiers_outside_of_jax_lose_the_same_votes(before, changed):
    smoothed = aj.Smoothed(before, aj.Gaussian(), THETA)
    assert lost(smoothed, changed, chunk=700).tolist() == lost().tolist()
    certificate, config = aj.certify(KEY, SMOOTHED, X), aj.CarryConfig(n=200)
    carried = [aj.carry(KEY, certificate, *pair, config=config) for pair in ((smoothed, changed), (SMOOTHED, CHANGED))]
    jax.tree.map(np.testing.assert_array_equal, *carried)


def test_lost_votes_can_be_counted_under_jit_and_vmap():
    counts = jax.jit(jax.vmap(lambda x: aj.count_lost_votes(KEY, SMOOTHED, CHANGED, x, config=CONFIG, chunk=500)))
    assert counts(np.stack([X, X]))[1].tolist() == lost().tolist()


@pytest.mark.parametrize("gained", [0.0, 0.03])
@pytest.mark.parametrize(("p", "q"), [(0.8, 0.0), (0.8, 0.05), (0.995, 0.001)])
def test_bounds_fail_as_rarely_as_the_sum_of_both_alphas_allows(p, q, gained):
    rng, trials, n, draws, alpha, more = np.random.default_rng(0), 20_000, 500, 300, 0.03, 0.02
    p_lower = bounds.clopper_pearson_lower(rng.binomial(n, p, trials), n, alpha)
    bound, _ = carried_bound_and_gap(
        p_lower, rng.binomial(draws, q, trials), np.full(trials, draws), more, aj.Gaussian()
    )
    failures = int((bound > p - q + gained * (1 - p)).sum())
    assert scipy.stats.binom.sf(failures - 1, trials, alpha + more) > 1e-3


@hypothesis.given(st.floats(0, 1), st.integers(0, 50), st.integers(50, 10**6), st.sampled_from([1e-9, 0.001, 0.3]))
def test_no_rounding_makes_a_bound_larger(p_lower, lost, draws, alpha):
    bound, gap = carried_bound_and_gap(p_lower, lost, draws, alpha, aj.Gaussian())
    q_upper = float(bounds.clopper_pearson_upper(lost, draws, alpha))
    exact = fractions.Fraction(p_lower) - fractions.Fraction(q_upper)
    assert fractions.Fraction(float(bound)) <= max(exact, 0)
    assert float(bound) >= float(max(exact, 0)) - 2e-16
    assert gap == aj.Gaussian().gap(bound)


def test_without_draws_nothing_is_known():
    bound, gap = carried_bound_and_gap(np.full(2, 0.9), 0, np.array([0, 1000]), 0.001, aj.Uniform())
    assert (bound[0], gap[0]) == (0, 0) and bound[1] > 0.89


def test_an_unchanged_network_loses_no_vote_and_keeps_all_but_the_bound_of_none():
    certificate = aj.certify(KEY, SMOOTHED, X)
    carried = aj.carry(KEY, certificate, SMOOTHED, BEFORE, config=CONFIG)
    q_upper = float(bounds.clopper_pearson_upper(0, CONFIG.n, CONFIG.alpha))
    assert carried.p_lower == pytest.approx(certificate.p_lower - q_upper, abs=1e-15)
    assert carried.gap == aj.Gaussian().gap(carried.p_lower) < certificate.gap
    assert (carried.prediction, carried.count, carried.n) == (certificate.prediction, certificate.count, certificate.n)
    assert 0 <= carried.alpha - (certificate.alpha + CONFIG.alpha) < 1e-15
    np.testing.assert_array_equal(carried.region.theta, THETA)
    np.testing.assert_array_equal(carried.region.center, X)


def test_a_carried_certificate_is_true_of_the_changed_network():
    """The distance to the border of a linear classifier is known for every theta."""
    smoothed = SMOOTHED.with_theta(THETA / 6)
    certificate = aj.certify(KEY, smoothed, X)
    carried = aj.carry(KEY, certificate, smoothed, CHANGED)
    largest = (W @ X + 0.1) / np.linalg.norm(W * THETA / 6)
    assert carried.prediction == certificate.prediction == 1
    assert 0.8 * largest < carried.gap < largest < certificate.gap


def test_a_class_that_loses_its_majority_is_abstained_from():
    opposite = reference.linear(-W, -0.3)
    carried = aj.carry(KEY, aj.certify(KEY, SMOOTHED, X), SMOOTHED, opposite, config=CONFIG)
    assert (carried.prediction, carried.gap, carried.radius) == (aj.ABSTAIN, 0, 0)


def test_an_abstention_stays_one():
    even = aj.Smoothed(reference.linear(W, -float(W @ X)), aj.Gaussian(), THETA)
    abstained = aj.certify(KEY, even, X, config=aj.CertifyConfig(n=100))
    assert abstained.prediction == aj.ABSTAIN and abstained.p_lower > 0
    carried = aj.carry(KEY, abstained, even, reference.linear(W, 100.0), config=CONFIG)
    assert (carried.prediction, carried.p_lower, carried.gap) == (aj.ABSTAIN, 0, 0)


def test_what_was_carried_may_be_carried_on():
    certificate, again = aj.certify(KEY, SMOOTHED, X), aj.Smoothed(CHANGED, aj.Gaussian(), THETA)
    first = aj.carry(KEY, certificate, SMOOTHED, CHANGED, config=CONFIG)
    second = aj.carry(KEY, first, again, BEFORE, config=CONFIG)
    falls = [bounds.clopper_pearson_upper(int(count), CONFIG.n, CONFIG.alpha) for count in (lost()[1], 0)]
    assert first.prediction == 1
    assert second.p_lower == pytest.approx(certificate.p_lower - sum(falls), abs=1e-15)


def test_a_batch_of_certificates_is_carried_row_by_row():
    xs, ids = np.stack([X, -X, X + 0.2]), [4, 9, 30]
    batch = aj.certify_batch(KEY, SMOOTHED, xs, ids=ids)
    keys = [jax.random.fold_in(KEY, i) for i in ids]
    one_by_one = [aj.carry(key, row, SMOOTHED, CHANGED, config=CONFIG) for key, row in zip(keys, batch, strict=True)]
    count = lambda key, x: aj.count_lost_votes(key, SMOOTHED, CHANGED, x, config=CONFIG, chunk=100)
    of_class = np.array([count(key, x)[row.prediction] for key, x, row in zip(keys, xs, batch, strict=True)])
    carried = aj.certificate_from_lost_votes(batch, SMOOTHED, of_class, config=CONFIG)
    reference.assert_same_certificates(carried, one_by_one)


def test_the_region_in_the_callers_numbers_lies_inside_the_one_that_was_counted():
    smoothed = SMOOTHED.with_theta(0.3)  # not a float32
    certificate = aj.certify(KEY, smoothed, np.asarray(X, np.float64) + 1e-9)
    carried = aj.carry(KEY, certificate, smoothed, CHANGED, config=CONFIG)
    assert carried.region.center.dtype == np.float64
    assert 0 < aj.Gaussian().gap(carried.p_lower) - carried.gap < 1e-6


@pytest.mark.parametrize(
    ("message", "smoothed", "changed"),
    [
        ("another theta", SMOOTHED.with_theta(2 * THETA), CHANGED),
        ("another theta", SMOOTHED.with_theta(THETA[:2]), CHANGED),
        ("3 classes instead of 2", SMOOTHED, reference.constant([0.0, 1.0, 2.0])),
        ("not of Uniform", aj.Smoothed(BEFORE, aj.Uniform(), THETA), CHANGED),
        ("enumerable", aj.Smoothed(BEFORE, aj.Splitting(exact=True), THETA), CHANGED),
    ],
)
def test_what_does_not_fit_is_refused(message, smoothed, changed):
    with pytest.raises(ValueError, match=message):
        aj.carry(KEY, aj.certify(KEY, SMOOTHED, X), smoothed, changed, config=CONFIG)


def test_lost_votes_of_another_basis_or_of_more_draws_than_there_are_carry_nothing():
    certificate = aj.certify(KEY, SMOOTHED, X)
    for count in (-1, CONFIG.n + 1):
        with pytest.raises(ValueError, match="must be in 0"):
            certificate_from_lost_votes(certificate, SMOOTHED, count, config=CONFIG)
    rotated = aj.Smoothed(BEFORE, aj.Gaussian(Cosine()), THETA)
    with pytest.raises(ValueError, match=r"not of Gaussian\(basis=Cosine.*its basis Pixels"):
        certificate_from_lost_votes(certificate, rotated, 0, config=CONFIG)


def test_a_batch_is_refused_where_one_certificate_is_wanted():
    batch = aj.certify_batch(KEY, SMOOTHED, X[None])
    with pytest.raises(ValueError, match="one by one"):
        aj.carry(KEY, batch, SMOOTHED, CHANGED)


@pytest.mark.parametrize("settings", [{"n": 0}, {"alpha": 0.0}, {"alpha": 1.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        aj.CarryConfig(**settings)


@pytest.mark.parametrize(("votes", "pays"), [(0.9, True), (0.995, True), (0.997, False), (1.0, False)])
def test_carrying_pays_where_the_guide_says(votes, pays):
    """Without lost votes, against certifying afresh with as many passes, at the same total alpha."""
    certified = bounds.clopper_pearson_lower(int(votes * 100_000), 100_000, 0.001)
    carried, _ = carried_bound_and_gap(certified, 0, 10_000, 0.0001, aj.Gaussian())
    assert (carried > bounds.clopper_pearson_lower(int(votes * 20_000), 20_000, 0.0011)) == pays


def test_the_docstring_says_what_the_defaults_cost():
    config, gap = aj.CarryConfig(), aj.Gaussian().gap
    p_lower = np.array([0.95, bounds.clopper_pearson_lower(100_000, 100_000, 0.001)])
    _, carried = carried_bound_and_gap(p_lower, 0, config.n, config.alpha, aj.Gaussian())
    _, more = carried_bound_and_gap(p_lower, 0, 100_000, config.alpha, aj.Gaussian())
    figures = [*gap(p_lower), *carried, more[1], bounds.clopper_pearson_upper(0, config.n, config.alpha)]
    assert figures == pytest.approx([1.6448, 3.8114, 1.6359, 3.0933, 3.5967, 0.00092], abs=1e-4)
