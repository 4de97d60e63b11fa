"""Certificates of one input or of many: indices, sizes, and the votes from which they follow."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ancer_jax.smoothing import (
    ABSTAIN,
    CarryConfig,
    Certificate,
    CertifyConfig,
    Gaussian,
    Smoothed,
    Uniform,
    bounds,
    certificate_from_votes,
    certify_batch,
    count_lost_votes,
    count_votes,
)
from ancer_jax.smoothing.certificate import (
    Evidence,
    certificate_from_evidence,
    enumerated_evidence,
    random_evidence,
    votes_of,
)
from tests import reference
from tests.toy import KEY, Coins

XS = np.random.default_rng(0).normal(0, 0.5, (6, 3, 2)).astype(np.float32)
MAP = np.random.default_rng(1).uniform(0.2, 1, (3, 2)).astype(np.float32)
LINEAR = reference.linear(np.linspace(-1, 1.5, 6), b=0.1)


def batch_of(count, noise=None):
    smoothed = Smoothed(LINEAR, noise or Gaussian(), MAP)
    return certify_batch(KEY, smoothed, XS[:count], config=CertifyConfig(n0=20, n=300))


def test_a_certificate_of_a_batch_is_taken_by_its_index():
    batch = batch_of(6)
    assert isinstance(batch[2], Certificate) and batch[2].region.norm == batch.region.norm
    assert (batch[2].prediction, batch[2].gap, batch[-1].count) == (
        batch.prediction[2],
        batch.gap[2],
        batch.count[5],
    )
    np.testing.assert_array_equal(batch[2].region.center, XS[2])
    for places in (slice(1, 4), np.array([5, 0]), batch.gap > np.median(batch.gap)):
        some = batch[places]
        assert len(some) == len(batch.gap[places])
        for name in ("prediction", "gap", "radius", "proxy_radius", "log_volume", "p_lower", "count", "n", "alpha"):
            np.testing.assert_array_equal(getattr(some, name), getattr(batch, name)[places])
    assert [one.count for one in batch] == batch.count.tolist()
    with pytest.raises(IndexError):
        batch[6]
    with pytest.raises(TypeError):
        len(batch[0])


@pytest.mark.parametrize("noise", [Gaussian(), Uniform()])
def test_a_certificate_has_the_sizes_of_its_region(noise):
    batch = batch_of(6, noise)
    for name in ("gap", "radius", "proxy_radius", "log_volume"):
        together = getattr(batch, name)
        np.testing.assert_array_equal(together, getattr(batch.region, name))
        for i in range(6):
            assert getattr(batch[i], name) == pytest.approx(together[i], rel=1e-14)
            assert getattr(batch[i], name) == getattr(batch[i].region, name)


@pytest.mark.parametrize("theta", [np.float32(0.4), MAP], ids=["scalar", "map"])
def test_certificates_of_a_batch_have_one_theta_or_one_each(theta):
    smoothed, selected, count = Smoothed(LINEAR, Gaussian(), theta), np.zeros(6, int), np.arange(295, 301)
    config = CertifyConfig(n0=20, n=300)
    batch = certificate_from_votes(smoothed, XS, selected, count, config=config)
    each = smoothed.with_theta(np.stack([theta] * 6))
    of_each = certificate_from_votes(each, XS, selected, count, config=config)
    reference.assert_same_certificates(of_each, list(batch))
    alone = [certificate_from_votes(smoothed, x, 0, n, config=config) for x, n in zip(XS, count, strict=True)]
    reference.assert_same_certificates(batch, alone)


def test_a_theta_of_neither_an_input_nor_a_batch_is_refused():
    smoothed, votes = Smoothed(LINEAR, Gaussian(), np.ones(2, np.float32)), (np.zeros(6, int), np.full(6, 299))
    with pytest.raises(ValueError, match=r"or have x's shape \[3, 2\], or be one for each of 6 inputs, got \[2\]"):
        certificate_from_votes(smoothed, XS, *votes, config=CertifyConfig(n=300))


def test_a_theta_that_may_be_a_map_or_a_number_for_each_input_is_refused():
    smoothed = Smoothed(LINEAR, Gaussian(), np.full(6, 0.4, np.float32))
    with pytest.raises(ValueError, match="may be one map or a number for each input"):
        certificate_from_votes(
            smoothed, np.zeros((6, 6), np.float32), np.zeros(6, int), np.full(6, 299), config=CertifyConfig(n=300)
        )


def test_votes_of_all_draws_give_the_top_class_and_its_evidence():
    counts = np.array([[3, 9, 4], [8, 8, 0], [0, 0, 16]])
    selected, evidence = enumerated_evidence(counts, np.full(3, 16))
    np.testing.assert_array_equal(selected, [1, 0, 2])
    np.testing.assert_array_equal(evidence.votes, [9, 8, 16])
    np.testing.assert_array_equal(evidence.runner_up, [4, 8, 0])
    assert not evidence.alpha.any()
    smoothed = Smoothed(LINEAR, Coins(), np.float32(0.25))
    result = certificate_from_evidence(selected, evidence, smoothed, XS[:3], alpha=0.0)
    np.testing.assert_array_equal(result.prediction, [1, ABSTAIN, 2])
    np.testing.assert_array_equal(result.gap, np.array([2, 0, 13]) / 16)
    np.testing.assert_array_equal(result.p_lower, counts.max(axis=1) / 16)


def test_votes_of_random_draws_say_no_more_than_their_bound():
    evidence = random_evidence(np.array([299, 200]), CertifyConfig(n=300))
    p_lower, gap = evidence.bound_and_gap(Gaussian())
    np.testing.assert_array_equal(p_lower, bounds.clopper_pearson_lower(evidence.votes, 300, 0.001))
    np.testing.assert_array_equal(gap, Gaussian().gap(p_lower))
    np.testing.assert_array_equal(evidence.runner_up, [1, 100])
    with pytest.raises(ValueError, match="the draws of enumerable noise must all be counted"):
        certificate_from_votes(Smoothed(LINEAR, Coins(), np.float32(0.25)), XS[0], 0, 10, config=CertifyConfig(n=16))


@pytest.mark.parametrize(
    ("x", "theta", "message"),
    [(np.nan, 0.25, "x must be finite"), (0.0, -1.0, "theta must be positive"), (0.0, np.nan, "theta must be finite")],
)
def test_votes_for_no_input_or_no_theta_certify_nothing(x, theta, message):
    smoothed = Smoothed(LINEAR, Gaussian(), np.float32(theta))
    with pytest.raises(ValueError, match=message):
        certificate_from_votes(smoothed, np.full_like(XS[0], x), 0, 10, config=CertifyConfig(n=16))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_votes_of_copies_of_16_bits_certify_nothing(dtype):
    """They are votes of another classifier: one that rounds the copies first."""
    smoothed, x, config = Smoothed(LINEAR, Gaussian(), np.float32(0.4)), jnp.asarray(XS[0], dtype), CertifyConfig(n=16)
    for use in (
        lambda: count_votes(KEY, smoothed, x, config=config, chunk=16),
        lambda: certificate_from_votes(smoothed, x, 0, 10, config=config),
        lambda: count_lost_votes(KEY, smoothed, LINEAR, x, config=CarryConfig(), chunk=16),
    ):
        with pytest.raises(ValueError, match=f"x must be float32 when votes are counted, got {np.dtype(dtype)}"):
            use()
    with pytest.raises(ValueError, match=r"x must be floating point, got uint8 \(divide 8-bit pixels by 255\)"):
        certificate_from_votes(smoothed, np.uint8(XS[0]), 0, 10, config=config)


@pytest.mark.parametrize("noise", [Gaussian(), Uniform()])
def test_no_votes_give_no_certificates(noise):
    smoothed, none = Smoothed(LINEAR, noise, np.float32(0.4)), np.zeros(0, int)
    batch = certificate_from_votes(smoothed, XS[:0], none, none, config=CertifyConfig(n=300))
    assert len(batch) == 0 and batch.gap.shape == batch.radius.shape == batch.log_volume.shape == (0,)


def votes_one_by_one(counts, selected, num_draws):
    """Votes for the class and for the runner-up, by sorting."""
    others = sorted(np.delete(counts, selected))
    return counts[selected], others[-1] + num_draws - counts.sum()


@pytest.mark.parametrize("xnp", [np, jnp])
def test_the_runner_up_is_the_second_class_with_all_draws_that_did_not_vote(xnp):
    counts = np.random.default_rng(0).integers(0, 50, (4, 3, 5), dtype=np.int32)
    counts[0, 0] = [7, 7, 7, 0, 0]  # ties
    selected = np.random.default_rng(1).integers(0, 5, (4, 3))
    num_draws = counts.sum(axis=-1) + np.random.default_rng(2).integers(0, 4, (4, 3))
    votes, runner_up = votes_of(xnp.asarray(counts), xnp.asarray(selected), xnp.asarray(num_draws), "separate")
    for i in np.ndindex(4, 3):
        assert (votes[i], runner_up[i]) == votes_one_by_one(counts[i], selected[i], num_draws[i])
    votes, runner_up = votes_of(xnp.asarray(counts), xnp.asarray(selected), xnp.asarray(num_draws), "two-class")
    np.testing.assert_array_equal(votes + runner_up, num_draws)


def test_counts_up_to_the_largest_n_do_not_wrap():
    most = 2**31 - 1
    counts = np.array([most - 5, 3, 2], np.int32)
    for one in (counts, jnp.asarray(counts)):
        assert [int(value) for value in votes_of(one, 0, most, "separate")] == [most - 5, 3]
        assert [int(value) for value in votes_of(one * 0, 1, most, "separate")] == [0, most]


SEPARATE = CertifyConfig(n=1000, alpha=0.002, bound="separate")


def test_separate_bounds_give_the_gap_of_both():
    """The third line has no votes but those of two classes: the two-class bound, at half of alpha."""
    votes, runner_up = np.array([400, 700, 900]), np.array([60, 100, 100])
    evidence = random_evidence(votes, SEPARATE, runner_up)
    np.testing.assert_array_equal(evidence.alpha, 0.001)
    lower, upper = (
        scipy.stats.beta.ppf(q, k + (q > 0.5), 1000 - k + (q < 0.5)) for q, k in ((0.001, votes), (0.999, runner_up))
    )
    upper = np.minimum(upper, 1 - lower)
    p_lower, gap = evidence.bound_and_gap(Gaussian())
    np.testing.assert_allclose(p_lower, lower, rtol=1e-6)
    np.testing.assert_allclose(gap, (scipy.stats.norm.ppf(lower) - scipy.stats.norm.ppf(upper)) / 2, rtol=1e-5)
    np.testing.assert_allclose(evidence.bound_and_gap(Uniform())[1], lower - upper, rtol=1e-5)
    two_class = Evidence(votes, evidence.n, evidence.alpha, evidence.n - votes)
    expected = two_class.bound_and_gap(Gaussian())[1]
    assert gap[0] > expected[0] == 0 and gap[1] > expected[1] and gap[2] == expected[2]
    for i in range(3):  # no line depends on the others
        one = Evidence(*(column[i] for column in evidence)).bound_and_gap(Gaussian())
        assert one == (p_lower[i], gap[i])


def test_a_certificate_of_separate_bounds_takes_both_counts():
    smoothed, selected, count = Smoothed(LINEAR, Gaussian(), MAP), np.zeros(2, int), np.array([[400, 60], [900, 100]])
    batch = certificate_from_votes(smoothed, XS[:2], selected, count, config=SEPARATE)
    np.testing.assert_array_equal(
        batch.gap, random_evidence(*count[:, :1].T, SEPARATE, count[:, 1]).bound_and_gap(Gaussian())[1]
    )
    np.testing.assert_array_equal((batch.count, batch.prediction), ([400, 900], [0, 0]))
    for wrong in (count[:, 0], count[0], count[:, [0, 1, 1]]):
        with pytest.raises(
            ValueError, match=r"count must have shape .* for separate bounds and this selected class, got"
        ):
            certificate_from_votes(smoothed, XS[:2], selected, wrong, config=SEPARATE)


def test_two_bounds_share_alpha():
    assert CertifyConfig().bound == "two-class" and CertifyConfig(alpha=0.3).alpha_of_bound == 0.3
    for alpha in (0.1, 0.3, 1 / 3, 0.999, 2e-200):
        assert 2 * CertifyConfig(alpha=alpha, bound="separate").alpha_of_bound == alpha
    with pytest.raises(ValueError, match=r"alpha must be in \[2e-200, 1\), got 1e-200"):
        CertifyConfig(alpha=1e-200, bound="separate")


@pytest.mark.usefixtures("without_type_checker")
def test_another_bound_is_refused():
    with pytest.raises(ValueError, match="bound must be one of two-class, separate, got 'bonferroni'"):
        CertifyConfig(bound="bonferroni")
