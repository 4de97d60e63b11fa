"""Sampling that stops early: the guarantee, by simulation with the rules that run, its decisions and its draws."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.stats

from ancer_jax import Execution, RunConfig, certify_dataset, report
from ancer_jax.regions import Region
from ancer_jax.runs.directory import read_run
from ancer_jax.smoothing import (
    ABSTAIN,
    CertifyConfig,
    Gaussian,
    SequentialConfig,
    Smoothed,
    Uniform,
    bounds,
    certify,
    certify_sequentially,
    sequential,
)
from ancer_jax.smoothing.smoothed import Stage
from tests.toy import CLASSIFIER, CONFIG, DATASET, KEY

pytestmark = pytest.mark.usefixtures("quick_compilation")

RADII, TOLERANCE = SequentialConfig(radii=(0.0, 0.25, 0.5, 1.0)), SequentialConfig(tolerance=0.02)
GRID = (0.3, 0.5, 0.52, 0.6, 0.7, 0.8, 0.9, 0.97, 0.995, 0.9995)
NOISES = {"l2": Gaussian(), "l1": Uniform()}


def certificates(found, noise, batch):
    """The certificates of sequential votes, each of class 0 at the origin of a line."""
    smoothed = Smoothed(CLASSIFIER, noise, np.float32(1.0))
    return sequential.certificate_from_sequential(
        np.zeros(batch, np.int64), found, smoothed, np.zeros(batch, np.float32), alpha=0.05
    )


def two_classes(votes, size):
    """Votes for class 0 and for class 1."""
    return np.stack([votes, size - votes], axis=-1)


def simulate(p, batch, rule, config, noise=NOISES["l2"], seed=0):
    """The rules on coin flips, whatever stage these are for: certificates, and draws of the pilot."""
    rng = np.random.default_rng(seed)

    def votes_in(stage, indices, first, stop):
        return two_classes(rng.binomial(stop - first, np.broadcast_to(p, batch)[indices]), stop - first)

    scales = np.tile([0.4, 0.9], (batch, 1))
    selected = np.zeros(batch, np.int64)
    found = sequential.sample_until_decided(votes_in, selected, scales, noise=noise, config=config, sequential=rule)
    result = certificates(found, noise, batch)
    p_lower, gap = found.evidence.bound_and_gap(noise)  # what a run stores gives the certificates again
    np.testing.assert_array_equal([p_lower, gap], [result.p_lower, result.gap])
    assert (found.evidence.alpha <= config.alpha).all() and (found.evidence.n <= config.n).all()
    return result, found.pilot


def _too_often(failures, batch, alpha):
    """Whether so many failures are not explained by chance, if alpha is the probability of one."""
    return scipy.stats.binomtest(int(failures), batch, alpha, alternative="greater").pvalue < 1e-4


@pytest.mark.parametrize("norm", NOISES)
@pytest.mark.parametrize("rule", [RADII, TOLERANCE], ids=["radii", "tolerance"])
@pytest.mark.parametrize(
    ("batch", "config"),
    [
        (4_000, CertifyConfig(n=3_000, alpha=0.05)),
        pytest.param(100_000, CertifyConfig(n=100_000, alpha=0.001), marks=pytest.mark.slow),
        pytest.param(100_000, CertifyConfig(n=100_000, alpha=0.1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_bounds_fail_no_more_often_than_alpha(norm, rule, batch, config):
    failures = []
    for p in GRID:
        result, _ = simulate(p, batch, rule, config, NOISES[norm])
        failures.append(int((result.p_lower > p).sum()))
        wrong = result.gap > NOISES[norm].gap(p) * (1 + 1e-9) + 1e-9
        assert wrong.sum() <= failures[-1]
    assert not any(_too_often(failed, batch, config.alpha) for failed in failures), failures
    assert sum(failures) > 0 or config.alpha < 0.05  # a check that can fail


def test_the_alphas_of_all_looks_add_up_to_alpha_and_the_last_look_has_n_draws():
    first = np.array([1.0, 100.0, 730.0, 99_999.0, 100_000.0, 2e5])
    for planned in (True, False):
        sizes, alphas, last_alpha = sequential._looks(first, CertifyConfig(), planned=planned)
        for row in range(len(first)):
            last = int(sizes[row].argmax())
            assert sizes[row, last] == 100_000 and (np.diff(sizes[row, : last + 1]) > 0).all()
            assert 0.999 * 0.001 < alphas[row, : last + 1].sum() <= 0.001
            assert alphas[row, last] == last_alpha[row] and (alphas[row, : last + 1] > 0).all()


@pytest.mark.parametrize("n", [1, 7, 99, 100, 101, 2**31 - 1])
@pytest.mark.parametrize("rule", [RADII, TOLERANCE], ids=["radii", "tolerance"])
def test_any_n_is_kept(n, rule):
    result, pilot = simulate(np.array([0.5, 0.9, 1.0]), 3, rule, CertifyConfig(n=n))
    assert (result.n <= n).all() and (pilot <= max(1, n // 25)).all()
    assert (result.count <= result.n).all()


def test_inputs_far_from_every_radius_take_few_draws():
    p = np.array([0.05, 0.45, 0.6914, 0.95, 1.0])  # gap 0.5 at the third one: a proxy radius of 0.45, a radius of 0.2
    result, pilot = simulate(p, 5, SequentialConfig(radii=(0.45,)), CertifyConfig())
    assert (pilot == 0).all()
    assert (result.n[[0, 1, 4]] <= [100, 800, 800]).all() and result.n[2] > 10_000
    assert result.prediction[0] == result.prediction[1] == ABSTAIN


def test_decisions_are_those_of_all_n_draws_where_these_have_slack():
    """On the same draws: the counts of the first draws, and of all."""
    rng, radii, config = np.random.default_rng(1), (0.25, 0.5, 0.75), CertifyConfig(n=20_000)
    p = scipy.stats.norm.cdf(rng.uniform(-0.5, 3, 300))
    votes = (rng.random((300, config.n)) < p[:, None]).cumsum(axis=1, dtype=np.int32)
    votes = np.concatenate([np.zeros((300, 1), np.int32), votes], axis=1)
    votes_in = lambda stage, indices, first, stop: two_classes(
        votes[indices, stop] - votes[indices, first], stop - first
    )
    selected, scales, rule = np.zeros(300, np.int64), np.full((300, 1), 0.25), SequentialConfig(radii=radii)
    found = sequential.sample_until_decided(
        votes_in, selected, scales, noise=NOISES["l2"], config=config, sequential=rule
    )
    result = certificates(found, NOISES["l2"], 300)
    whole = 0.25 * NOISES["l2"].gap(bounds.clopper_pearson_lower(votes[:, -1], config.n, config.alpha))
    for at in radii:
        decided = 0.25 * result.gap >= at
        assert decided[whole >= 1.01 * at].all() and not decided[whole < at * 0.95].any()
    assert result.n.mean() < config.n / 5


def test_a_tolerance_is_kept_against_all_n_draws():
    p, config = np.repeat([0.6, 0.75, 0.9, 0.97, 0.995], 100), CertifyConfig()
    result, pilot = simulate(p, len(p), TOLERANCE, config)
    expected = NOISES["l2"].gap(bounds.clopper_pearson_lower((p * config.n).astype(int), config.n, config.alpha))
    kept = result.gap / expected
    assert np.quantile(kept, 0.02) > 0.93 and 0.975 < kept.mean() < 1
    assert (result.n + pilot).mean() < config.n / 2.8


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, "takes either radii or a tolerance, got None and None"),
        ({"radii": (0.5,), "tolerance": 0.1}, r"takes either radii or a tolerance, got \(0.5,\) and 0.1"),
        ({"radii": ()}, r"radii must be a tuple of one or more numbers, got \(\)"),
        ({"radii": (0.5, float("nan"))}, r"radii must be in \[0, inf\), got nan"),
        ({"radii": (-0.5,)}, r"radii must be in \[0, inf\), got -0.5"),
        ({"tolerance": 0.0}, r"tolerance must be in \(0, 1\), got 0.0"),
        ({"tolerance": 1.0}, r"tolerance must be in \(0, 1\), got 1.0"),
    ],
)
def test_rules_out_of_range_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        SequentialConfig(**change)


@pytest.mark.usefixtures("without_type_checker")
@pytest.mark.parametrize("radii", [[0.0, 0.5], np.array([0.0, 0.5])], ids=["list", "array"])
def test_radii_may_come_in_any_sequence(radii):
    assert {SequentialConfig(radii=radii)} == {SequentialConfig(radii=(0.0, 0.5))}


@pytest.mark.usefixtures("without_type_checker")
def test_one_radius_without_a_tuple_is_refused():
    with pytest.raises(ValueError, match=r"radii must be a tuple of one or more numbers, got 0\.5"):
        SequentialConfig(radii=0.5)


def test_one_input_stops_on_the_first_of_the_draws_that_certify_makes():
    config = CertifyConfig(n0=20, n=5_000)
    arguments = KEY, Smoothed(CLASSIFIER, NOISES["l2"], np.float32(0.3)), DATASET.images[0]
    result = certify_sequentially(*arguments, config=config, sequential=SequentialConfig(radii=(0.05,)))
    assert 0 < result.n < config.n
    same = certify(*arguments, config=dataclasses.replace(config, n=int(result.n)))
    assert (result.prediction, result.count) == (same.prediction, same.count) and result.p_lower < same.p_lower
    assert result.radius >= 0.05 and result.alpha == config.alpha


def _sampled(path, rule, norm="l2", **execution):
    config = dataclasses.replace(CONFIG, sampling=rule, norm=norm, certify=CertifyConfig(n0=20, n=3_000))
    certify_dataset(CLASSIFIER, DATASET, config, out=path, execution=Execution(**execution))
    return read_run(path).columns("predictions", "counts", "n", "draws", "gap", "p_lower")


@pytest.mark.parametrize("rule", [SequentialConfig(radii=(0.1, 0.3)), SequentialConfig(tolerance=0.1)], ids=str)
def test_execution_changes_no_decision(tmp_path, rule):
    """Nor which draws are counted, and a line is what one input gives alone."""
    plans = [
        {"batch_size": 5, "chunk": 100, "devices": 1}, {"batch_size": 2, "chunk": 33, "devices": 2},
        {"batch_size": 3, "chunk": 512, "devices": 3, "shard": "draws"}, {"devices": 8},
    ]  # fmt: skip
    first, *others = (_sampled(tmp_path / str(i), rule, **plan) for i, plan in enumerate(plans))
    for other in others:
        for name in first:
            np.testing.assert_array_equal(other[name], first[name])
    assert (first["n"] < 3_000).any() and (first["draws"] >= first["n"] + 20).all()
    smoothed, config = Smoothed(CLASSIFIER, NOISES["l2"], np.float32(0.3)), CertifyConfig(n0=20, n=3_000)
    for column, (i, x) in enumerate(zip(DATASET.ids, DATASET.images, strict=True)):
        key = jax.random.fold_in(KEY, int(i))
        one = certify_sequentially(key, smoothed, x, config=config, sequential=rule)
        assert (one.count, one.n, one.gap) == tuple(first[name][column] for name in ("counts", "n", "gap"))


def test_a_run_says_how_it_sampled_and_what_it_took(tmp_path):
    rule = SequentialConfig(radii=(0.1, 0.3))
    columns = _sampled(tmp_path / "run", rule)
    settings = read_run(tmp_path / "run").settings
    assert settings["sampling"] == {"radii": [0.1, 0.3], "tolerance": None}
    results = report.load_results(tmp_path / "run")
    assert "decided (run: 0.1, 0.3). At other radii" in report.summary_table([results], [0.0])
    np.testing.assert_array_equal(results["n"], columns["n"])
    assert results.passes.forward == columns["draws"].mean()
    with pytest.raises(ValueError, match=r"sampling.radii is \[0.1, 0.3\] there, \[0.1\] here"):
        _sampled(tmp_path / "run", SequentialConfig(radii=(0.1,)))
    assert "sampling" not in RunConfig().settings()  # runs of a fixed n keep their names


def test_the_table_reaches_the_radii_that_were_decided(tmp_path):
    at = 0.123457  # as many digits as the table has
    _sampled(tmp_path / "run", SequentialConfig(radii=(at,)))
    columns = read_run(tmp_path / "run").columns("gap", "theta")
    table = report.load_results(tmp_path / "run")
    for gap, theta, printed in zip(columns["gap"], columns["theta"], table["radius"], strict=True):
        assert (float(gap) * float(theta) >= at) == (printed >= at)


def test_scales_are_radius_and_proxy_radius():
    theta = np.random.default_rng(0).uniform(0.1, 1, (3, 4, 2)).astype(np.float32)
    for one, scales in zip(theta, sequential.scales_of(theta), strict=True):
        region = Region(np.zeros((4, 2)), one, 1.0, 2)
        np.testing.assert_allclose(scales, (region.radius, region.proxy_radius), rtol=1e-12)
    np.testing.assert_array_equal(sequential.scales_of(np.float32([0.5])), [[0.5, 0.5]])


def test_pilot_and_estimate_are_other_draws():
    seen = set()

    def votes_in(stage, indices, first, stop):
        ends = zip(indices, first, stop, strict=True)
        seen.update((int(stage), int(index), i) for index, a, b in ends for i in (a, b - 1))
        assert (first < stop).all()
        return two_classes(stop - first, stop - first)

    selected, scales, config = np.zeros(2, np.int64), np.ones((2, 2)), CertifyConfig(n=2_000)
    sequential.sample_until_decided(votes_in, selected, scales, noise=NOISES["l1"], config=config, sequential=TOLERANCE)
    assert {stage for stage, _, _ in seen} == {Stage.PILOT, Stage.ESTIMATE}
    assert (int(Stage.ESTIMATE), 0, 0) in seen  # from the first one


def test_an_alpha_too_small_to_be_divided_between_looks_is_refused():
    smoothed, config = Smoothed(CLASSIFIER, NOISES["l2"], np.float32(0.3)), CertifyConfig(alpha=1e-198)
    with pytest.raises(ValueError, match=r"alpha must be in .* got 1e-198"):
        certify_sequentially(KEY, smoothed, DATASET.images[0], sequential=RADII, config=config)
    with pytest.raises(ValueError, match=r"alpha must be in .* got 1e-198"):
        simulate(0.9, 2, TOLERANCE, config)
    least = CertifyConfig(n=2_000, alpha=1e-195)
    for rule in (RADII, TOLERANCE):
        assert (simulate(1.0, 2, rule, least)[0].p_lower > 0.5).all()


# Probabilities of three classes, of which the first is selected, and of draws without a vote.
SPREAD = {
    "far": [0.45, 0.15, 0.2, 0.2],
    "near": [0.42, 0.4, 0.18, 0.0],
    "wrong": [0.3, 0.4, 0.3, 0.0],
    "sure": [0.99, 0.006, 0.004, 0.0],
}


def simulate_spread(p, batch, rule, config, noise):
    """The rules on draws of three classes: the evidence, and draws."""
    rng = np.random.default_rng(0)
    votes_in = lambda stage, indices, first, stop: rng.multinomial(stop - first, p)[:, :3]
    selected, scales = np.zeros(batch, np.int64), np.ones((batch, 1))
    return sequential.sample_until_decided(votes_in, selected, scales, noise=noise, config=config, sequential=rule)


@pytest.mark.parametrize("norm", NOISES)
@pytest.mark.parametrize("rule", [RADII, TOLERANCE], ids=["radii", "tolerance"])
def test_separate_bounds_fail_no_more_often_than_alpha(norm, rule):
    batch, config, failures = 1_500, CertifyConfig(n=3_000, alpha=0.05, bound="separate"), []
    for p in SPREAD.values():
        found = simulate_spread(p, batch, rule, config, NOISES[norm])
        p_lower, gap = found.evidence.bound_and_gap(NOISES[norm])
        _, p_b_upper = bounds.separate_bounds(
            found.evidence.votes, found.evidence.runner_up, found.evidence.n, found.evidence.alpha
        )
        highest = max(p[1:3]) + p[3]
        failures.append(int(((p_lower > p[0]) | (p_b_upper < highest)).sum()))
        assert (gap > NOISES[norm].gap(p[0], highest) * (1 + 1e-9) + 1e-9).sum() <= failures[-1]
        assert (found.evidence.alpha <= config.alpha / 2).all()
    assert not any(_too_often(failed, batch, config.alpha) for failed in failures), failures
    assert sum(failures) > 0


def test_separate_bounds_decide_what_two_classes_cannot():
    rule, noise, separate = SequentialConfig(radii=(0.04,)), NOISES["l2"], CertifyConfig(bound="separate")

    def reached(p, config=separate, rule=rule):
        found = simulate_spread(p, 200, rule, config, noise)
        return (found.evidence.bound_and_gap(noise)[1] >= min(rule.radii)).mean(), found.n.mean()

    for p in ([0.45, 0.15, 0.4, 0.0], [0.45, 0.15, 0.2, 0.2]):  # the last draws have no votes
        assert reached(p)[0] > 0.9 and reached(p, CertifyConfig())[0] == 0
    assert reached([0.45, 0.15, 0.1, 0.3])[0] == 0
    share, draws = reached([0.45, 0.15, 0.4, 0.0], rule=SequentialConfig(radii=(0.5,)))
    assert share == 0 and draws < 1_000  # given up, as both rates are seen


def test_a_tolerance_is_kept_against_all_n_draws_with_separate_bounds():
    config = CertifyConfig(bound="separate")
    for p in ([0.45, 0.15, 0.4, 0.0], [0.45, 0.25, 0.3, 0.0], [0.9, 0.04, 0.06, 0.0], [0.9, 0.0, 0.1, 0.0]):
        found = simulate_spread(p, 200, TOLERANCE, config, NOISES["l2"])
        votes = (np.array(p) * config.n).astype(int)
        p_lower, p_b_upper = bounds.separate_bounds(votes[0], votes[1:].max(), config.n, config.alpha_of_bound)
        kept = found.evidence.bound_and_gap(NOISES["l2"])[1] / NOISES["l2"].gap(p_lower, p_b_upper)
        assert 0.96 < kept.mean() < 1.01 and (found.n + found.pilot).mean() < config.n


def test_the_runner_up_is_the_class_with_most_votes_of_all_looks():
    """Not of each look: two classes that lead in turn have half of the other votes each."""
    turn = iter(range(100))

    def votes_in(stage, indices, first, stop):
        size = stop - first
        second = np.where(next(turn) % 2, 0, size // 2)
        return np.stack([size - size // 2, second, size // 2 - second], axis=-1)

    config, rule = CertifyConfig(n=2_000, bound="separate"), SequentialConfig(radii=(0.05,))
    selected, scales = np.zeros(1, np.int64), np.ones((1, 1))
    found = sequential.sample_until_decided(
        votes_in, selected, scales, noise=NOISES["l2"], config=config, sequential=rule
    )
    assert found.evidence.runner_up[0] < found.evidence.n[0] - found.evidence.votes[0]
