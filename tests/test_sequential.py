"""Sampling that stops early: the guarantee by simulation with the rules that run, decisions, and the same draws."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.stats

from ancer_jax import (
    ABSTAIN,
    CertifyConfig,
    Execution,
    GaussianL2,
    RunConfig,
    SequentialConfig,
    UniformL1,
    bounds,
    certify,
    certify_dataset,
    certify_sequentially,
    report,
    sequential,
)
from ancer_jax.regions import Region, proxy_radius, radius
from ancer_jax.runs import read_run
from ancer_jax.smoothing import Stage
from tests.test_pipeline import CLASSIFIER, CONFIG, DATASET

pytestmark = pytest.mark.usefixtures("quick_compilation")

RADII, TOLERANCE = SequentialConfig(radii=(0.0, 0.25, 0.5, 1.0)), SequentialConfig(tolerance=0.02)
GRID = (0.3, 0.5, 0.52, 0.6, 0.7, 0.8, 0.9, 0.97, 0.995, 0.9995)
LAWS = {"l2": GaussianL2(), "l1": UniformL1()}
KEY = jax.random.key(0, impl="threefry2x32")


def simulate(p, batch, rule, config, certificate=LAWS["l2"], seed=0):
    """`estimate` on coin flips; which stage they are for makes no difference."""
    rng = np.random.default_rng(seed)
    draw = lambda stage, rows, first, stop: rng.binomial(stop - first, np.broadcast_to(p, batch)[rows])
    scales = np.tile([0.4, 0.9], (batch, 1))
    selected = np.zeros(batch, np.int64)
    found = sequential.estimate(draw, selected, scales, certificate=certificate, config=config, sequential=rule)
    p_lower, gap = found.evidence.bound_and_gap(certificate)  # what is stored gives the certificates again
    np.testing.assert_array_equal([p_lower, gap], [found.certification.p_lower, found.certification.gap])
    assert (found.evidence.alpha <= config.alpha).all() and (found.evidence.n <= config.n).all()
    return found.certification, found.pilot


def _too_often(failures, batch, alpha):
    """Whether so many failures are not explained by chance, if alpha is the probability of one."""
    return scipy.stats.binomtest(int(failures), batch, alpha, alternative="greater").pvalue < 1e-4


@pytest.mark.parametrize("norm", LAWS)
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
        result, _ = simulate(p, batch, rule, config, LAWS[norm])
        failures.append(int((result.p_lower > p).sum()))
        wrong = result.gap > LAWS[norm].gap(p) * (1 + 1e-9) + 1e-9
        assert wrong.sum() <= failures[-1]
    assert not any(_too_often(failed, batch, config.alpha) for failed in failures), failures
    assert sum(failures) > 0 or config.alpha < 0.05  # a check that can fail


def test_looks_share_out_alpha_and_end_at_n():
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


def test_what_is_far_from_every_radius_takes_few_draws():
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
    draw = lambda stage, rows, first, stop: votes[rows, stop] - votes[rows, first]
    how = {"certificate": LAWS["l2"], "config": config, "sequential": SequentialConfig(radii=radii)}
    result = sequential.estimate(draw, np.zeros(300, np.int64), np.full((300, 1), 0.25), **how).certification
    whole = 0.25 * LAWS["l2"].gap(bounds.clopper_pearson_lower(votes[:, -1], config.n, config.alpha))
    for at in radii:
        decided = 0.25 * result.gap >= at
        assert decided[whole >= 1.01 * at].all() and not decided[whole < at * 0.95].any()
    assert result.n.mean() < config.n / 5


def test_a_tolerance_is_kept_against_all_n_draws():
    p, config = np.repeat([0.6, 0.75, 0.9, 0.97, 0.995], 100), CertifyConfig()
    result, pilot = simulate(p, len(p), TOLERANCE, config)
    expected = LAWS["l2"].gap(bounds.clopper_pearson_lower((p * config.n).astype(int), config.n, config.alpha))
    kept = result.gap / expected
    assert np.quantile(kept, 0.02) > 0.93 and 0.975 < kept.mean() < 1
    assert (result.n + pilot).mean() < config.n / 2.8


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, "takes either radii or a tolerance, got None and None"),
        ({"radii": (0.5,), "tolerance": 0.1}, r"takes either radii or a tolerance, got \(0.5,\) and 0.1"),
        ({"radii": ()}, "radii must be one or more numbers, got none"),
        ({"radii": (0.5, float("nan"))}, r"radii must be in \[0, inf\), got nan"),
        ({"radii": (-0.5,)}, r"radii must be in \[0, inf\), got -0.5"),
        ({"tolerance": 0.0}, r"tolerance must be in \(0, 1\), got 0.0"),
        ({"tolerance": 1.0}, r"tolerance must be in \(0, 1\), got 1.0"),
    ],
)
def test_rules_out_of_range_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        SequentialConfig(**change)


def test_one_input_stops_on_the_first_of_the_draws_that_certify_makes():
    x, theta, config = DATASET.images[0], np.float32(0.3), CertifyConfig(n0=20, n=5_000)
    arguments = KEY, CLASSIFIER, LAWS["l2"], x, theta
    result = certify_sequentially(*arguments, config=config, sequential=SequentialConfig(radii=(0.05,)))
    assert 0 < result.n < config.n
    same = certify(*arguments, config=dataclasses.replace(config, n=int(result.n)))
    assert (result.prediction, result.count) == (same.prediction, same.count) and result.p_lower < same.p_lower
    assert radius(Region(x, theta, result.gap, 2)) >= 0.05


def _sampled(path, rule, norm="l2", **execution):
    config = dataclasses.replace(CONFIG, sampling=rule, norm=norm, certify=CertifyConfig(n0=20, n=3_000))
    certify_dataset(CLASSIFIER, DATASET, config, out=path, execution=Execution(**execution))
    return read_run(path).columns("predictions", "counts", "n", "draws", "gap", "p_lower")


@pytest.mark.parametrize("rule", [SequentialConfig(radii=(0.1, 0.3)), SequentialConfig(tolerance=0.1)], ids=str)
def test_execution_changes_no_decision(tmp_path, rule):
    """Nor which draws are counted, and a line is what one input gives alone."""
    plans = [
        {"batch_size": 5, "chunk": 100, "devices": 1}, {"batch_size": 2, "chunk": 33, "devices": 2},
        {"batch_size": 3, "chunk": 512, "devices": 3, "split": "draws"}, {"devices": 8},
    ]  # fmt: skip
    first, *others = (_sampled(tmp_path / str(i), rule, **plan) for i, plan in enumerate(plans))
    for other in others:
        for name in first:
            np.testing.assert_array_equal(other[name], first[name])
    assert (first["n"] < 3_000).any() and (first["draws"] >= first["n"] + 20).all()
    for row, (i, x) in enumerate(zip(DATASET.ids, DATASET.images, strict=True)):
        one = certify_sequentially(
            *(jax.random.fold_in(KEY, int(i)), CLASSIFIER, LAWS["l2"], x, np.float32(0.3)),
            config=CertifyConfig(n0=20, n=3_000),
            sequential=rule,
        )
        assert (one.count, one.n, one.gap) == tuple(first[name][row] for name in ("counts", "n", "gap"))


def test_a_run_says_how_it_sampled_and_what_it_took(tmp_path):
    rule = SequentialConfig(radii=(0.1, 0.3))
    columns = _sampled(tmp_path / "run", rule)
    settings = read_run(tmp_path / "run").settings
    assert settings["sampling"] == {"radii": [0.1, 0.3], "tolerance": None}
    results = report.load_results(tmp_path / "run")
    assert "decided (run: 0.1, 0.3): at other radii" in report.summary_table([results], [0.0])
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
        np.testing.assert_allclose(scales, (radius(region), proxy_radius(region)), rtol=1e-12)
    np.testing.assert_array_equal(sequential.scales_of(np.float32([0.5])), [[0.5, 0.5]])


def test_pilot_and_estimate_are_other_draws():
    seen = set()

    def draw(stage, rows, first, stop):
        seen.update((int(stage), int(row), i) for row, a, b in zip(rows, first, stop, strict=True) for i in (a, b - 1))
        assert (first < stop).all()
        return np.full(len(rows), 0) + (stop - first)

    how = {"certificate": LAWS["l1"], "config": CertifyConfig(n=2_000), "sequential": TOLERANCE}
    sequential.estimate(draw, np.zeros(2, np.int64), np.ones((2, 2)), **how)
    assert {stage for stage, _, _ in seen} == {Stage.PILOT, Stage.ESTIMATE}
    assert (int(Stage.ESTIMATE), 0, 0) in seen  # from the first one


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_a_confidence_sequence_holds_after_every_draw(p):
    rng, alpha, failures = np.random.default_rng(0), 0.05, 0
    trials = np.arange(1, 2_001)
    for _ in range(400):
        count = (rng.random(2_000) < p).cumsum()
        failures += bool((bounds.confidence_sequence_lower(count, trials, alpha) > p).any())
    assert failures > 0 and not _too_often(failures, 400, alpha)


def test_a_confidence_sequence_is_where_the_martingale_reaches_one_over_alpha():
    counts, trials = np.array([0, 1, 50, 900, 1_000, 10**7]), np.array([10, 1, 100, 1_000, 1_000, 10**7])
    found = bounds.confidence_sequence_lower(counts, trials, 0.001)
    assert (found <= bounds.clopper_pearson_lower(counts, trials, 0.001)).all() and found[0] == 0
    beta = scipy.special.betaln
    for k, t, p in zip(counts[1:], trials[1:], found[1:], strict=True):
        log_m = beta(k + 0.5, t - k + 0.5) - beta(0.5, 0.5) - scipy.special.xlogy(k, p)
        assert log_m - scipy.special.xlog1py(t - k, -p) == pytest.approx(np.log(1000), rel=1e-5)
    with pytest.raises(ValueError, match="successes must be in"):
        bounds.confidence_sequence_lower(11, 10, 0.001)
