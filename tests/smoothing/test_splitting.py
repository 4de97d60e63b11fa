"""Splitting noise: certificates checked by enumeration, in both forms, with one theta and with one per coordinate."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ancer_jax import (
    AnisotropicConfig,
    Execution,
    IsotropicConfig,
    LeakageConfig,
    RunConfig,
    certify_dataset,
    optimize_anisotropic,
    report,
)
from ancer_jax.data import Dataset
from ancer_jax.runs.directory import read_run
from ancer_jax.smoothing import (
    ABSTAIN,
    CertifyConfig,
    SequentialConfig,
    Smoothed,
    Splitting,
    certify,
    certify_batch,
    certify_sequentially,
    class_counts,
    count_votes,
    from_function,
    predict,
    predict_batch,
    splitting,
)
from ancer_jax.smoothing.certificate import certificate_from_evidence, enumerated_evidence
from ancer_jax.smoothing.smoothed import class_counts_between
from ancer_jax.training import TrainConfig
from tests.toy import KEY

pytestmark = pytest.mark.usefixtures("quick_compilation")

LEVELS, DIMENSION, CLASSES = 4, 3, 3
RANDOM, EXACT = Splitting(levels=LEVELS), Splitting(exact=True, levels=LEVELS, period=24)
GRID = np.array(list(itertools.product(range(LEVELS + 1), repeat=DIMENSION)), np.float32) / LEVELS


@pytest.mark.parametrize("cuts", [153, 510, 5040])
def test_of_8_bit_images_no_more_draws_than_levels_between_them_tell_two_apart(cuts):
    """The theorem, with all rounding of float32: inputs may be off the grid by 1e-5 steps."""
    noise, theta = Splitting(exact=True), jnp.float32([cuts / 510])
    assert noise.num_draws(theta) == cuts
    copy = jax.jit(jax.vmap(lambda draw, x: noise.perturb(KEY, draw, x, theta), (0, None)))
    rng = np.random.default_rng(cuts)
    levels = np.unique(np.r_[0, 1, 127, 128, 254, 255, rng.integers(0, 256, 30)])
    inputs = np.float32((levels + rng.uniform(-1e-5, 1e-5, len(levels))) / 255)
    copies = [np.asarray(copy(np.arange(cuts), x[None]))[:, 0] for x in inputs]
    for (a, of_a), (b, of_b) in itertools.combinations(zip(levels, copies, strict=True), 2):
        assert 0 < (of_a != of_b).sum() <= b - a


def _hashing(variables, x):
    """A classifier without any structure: each input gets a class as if by chance."""
    numbers = jnp.rint(x.reshape(len(x), -1) * 8 * LEVELS).astype(jnp.uint32)  # copies are multiples of 1 / (4 levels)
    mixed = (numbers * variables["odd"]).sum(axis=1)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(2_246_822_519)
    mixed = (mixed ^ (mixed >> 13)) % variables["bias"]
    return jax.nn.one_hot(jnp.minimum(mixed, CLASSES - 1), CLASSES)


def _classifier(seed, bias):
    odd = np.random.default_rng(seed).integers(2**31, size=DIMENSION, dtype=np.uint32) * 2 + 1
    return from_function(_hashing, {"odd": odd, "bias": jnp.uint32(bias)}, num_classes=CLASSES)


@jax.jit
def _votes(smoothed, num_draws):
    """Votes of all draws at every point of the grid."""
    return jax.vmap(lambda x: class_counts_between(KEY, smoothed, x, (0, num_draws), steps=num_draws, chunk=1))(GRID)


def _certificates(smoothed, votes, num_draws):
    counted = enumerated_evidence(votes, np.full(len(votes), num_draws))
    return certificate_from_evidence(*counted, smoothed, GRID, alpha=0.0)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("anisotropic", [False, True])
def test_every_point_of_a_certified_region_keeps_its_class(seed, anisotropic):
    """All points of the grid, with the votes of all draws there are."""
    rng = np.random.default_rng(seed)
    divisors = np.array([i for i in range(2, EXACT.period + 1) if EXACT.period % i == 0])
    cuts = rng.choice(divisors, DIMENSION if anisotropic else 1) * np.ones(DIMENSION, int)
    theta = np.float32(cuts / (2 * LEVELS))
    np.testing.assert_array_equal(EXACT.admissible(theta), theta)
    num_draws = EXACT.num_draws(theta)
    assert num_draws == np.lcm.reduce(cuts)
    certified = 0
    for bias in (4, 40, 1_000):  # more and more inputs get the last class
        smoothed = Smoothed(_classifier(seed, bias), EXACT, theta)
        votes = np.asarray(_votes(smoothed, num_draws))
        assert (votes.sum(axis=1) == num_draws).all()
        result = _certificates(smoothed, votes, num_draws)
        for x, prediction, gap in zip(GRID, result.prediction, result.gap, strict=True):
            inside = (abs(GRID - x) / theta).sum(axis=1) <= gap
            assert prediction == ABSTAIN or (votes.argmax(axis=1)[inside] == prediction).all()
            certified += inside.sum() - 1 if prediction != ABSTAIN else 0
    assert certified > 0


def test_the_gap_cannot_be_made_larger():
    """A vote more, and a point of the region has another class: a classifier that looks at one coordinate."""
    first_half = from_function(lambda v, x: jnp.stack([0.45 - x[:, 0], x[:, 0] - 0.45], 1), {}, num_classes=2)
    theta = np.float32(np.full(DIMENSION, 5 / (2 * LEVELS)))
    smoothed = Smoothed(first_half, EXACT, theta)
    votes = np.asarray(_votes(smoothed, 5))
    result = _certificates(smoothed, votes, 5)
    too_large = [
        (votes.argmax(axis=1)[(abs(GRID - x) / theta).sum(axis=1) <= gap + 2 / 5 + 1e-6] != prediction).any()
        for x, prediction, gap in zip(GRID, result.prediction, result.gap, strict=True)
        if prediction != ABSTAIN
    ]
    assert any(too_large)


def test_cuts_of_a_coordinate_are_uniform_and_copies_are_middles():
    theta = np.float32([5 / 8, 2 / 8, 10 / 8])
    for x in GRID[[0, 7, 40, 124]]:
        copies = np.array([EXACT.perturb(KEY, i, jnp.asarray(x), jnp.asarray(theta)) for i in range(10)])
        for j, cuts in enumerate((5, 2, 10)):
            expected = []
            for s in range(cuts):
                edges = [s + 0.5 + cuts * k for k in range(-20, 20)]
                lower = max(edge for edge in edges if edge < x[j] * LEVELS)
                expected.append((max(lower, 0) + min(lower + cuts, LEVELS)) / 2 / LEVELS)
            np.testing.assert_array_equal(np.sort(copies[:, j]), np.sort(np.float32(expected * (10 // cuts))))


@pytest.mark.parametrize("theta", [0.2, 0.5, 0.9])
def test_random_copies_follow_their_law(theta):
    """Copies of two inputs differ with the probability of a cut between them; a copy is the middle of its part."""
    x, y, draws = np.float32(0.35), np.float32(0.55), jnp.arange(20_000)
    copy = jax.jit(jax.vmap(lambda i, x: RANDOM.perturb(KEY, i, x, jnp.full((1,), theta)), (0, None)))
    ours, theirs = copy(draws, jnp.full((1,), x)), copy(draws, jnp.full((1,), y))
    assert abs((ours != theirs).mean() - 0.2 / (2 * theta)) < 0.012
    assert (ours >= 0).all() and (ours <= 1).all()
    if theta >= 0.5:
        uncut = np.isclose(ours, 0.5).mean()
        assert abs(uncut - (1 - 1 / (2 * theta))) < 0.015


def test_splitting_noise_has_the_same_law_whatever_type_x_has():
    key, theta = jax.random.key(0), jnp.full(50, 0.3, jnp.bfloat16)
    copies = jax.vmap(lambda draw: Splitting().perturb(key, draw, jnp.full(50, 0.5, jnp.bfloat16), theta))
    assert len(np.unique(copies(jnp.arange(2000)))) > 50_000


@pytest.mark.parametrize("theta", [0.6, 1.2])
def test_the_derivative_is_right_for_a_linear_function(theta):
    """E[copy] in closed form for x = 0.2: 1/2 + (mean copy where there is a cut - 1/2) / (2 theta)."""
    x, draws = jnp.full((1,), 0.2), jnp.arange(40_000)
    mean = lambda t: jax.vmap(lambda i: RANDOM.perturb(KEY, i, x, jnp.full((1,), t)))(draws).mean()
    where_cut = (0.2 + 0.2**2 / 2) / 2 + (1 - 0.2**2) / 4
    value, slope = jax.value_and_grad(mean)(theta)
    assert value == pytest.approx(0.5 + (where_cut - 0.5) / (2 * theta), abs=5e-3)
    assert slope == pytest.approx((0.5 - where_cut) / (2 * theta**2), abs=5e-3)


@pytest.mark.parametrize(
    ("theta", "period", "expected"),
    [(0.5, None, 255), (0.3, None, 153), (0.25, None, 127), (0.5, 5040, 252), (0.5, 840, 210)],
)
def test_theta_is_rounded_down_to_what_can_be_enumerated(theta, period, expected):
    """One theta for all coordinates is its own period; one per coordinate divides the period of the noise."""
    noise, many = Splitting(exact=True, period=period or 5040), np.full(3, theta, np.float32)
    found = noise.admissible(many if period else theta)
    # XLA may replace a division by a product, which moves the last bit of a map.
    np.testing.assert_allclose(found, np.float32(expected / 510), rtol=2e-7 if period else 0)
    assert noise.num_draws(found) == expected
    np.testing.assert_array_equal(noise.admissible(found), found)
    traced = jax.jit(noise.admissible)(many if period else theta)
    np.testing.assert_allclose(traced, found, rtol=2e-7)
    assert noise.num_draws(traced) == expected
    assert noise.admissible(1e-6) == np.float32(1 / 510)
    assert noise.admissible(many).shape == many.shape


RNG = np.random.default_rng(0)
IMAGES = (RNG.integers(0, 256, (6, 3, 3, 1)) / 255).astype(np.float32)
DATASET = Dataset("levels", np.arange(6), IMAGES, RNG.integers(0, 2, 6), 2)
LINEAR = from_function(
    lambda v, x: jnp.stack([x.sum((1, 2, 3)) - 4.5, 4.5 - x.sum((1, 2, 3))], 1) * 3.0, {}, num_classes=2
)
SHORT = {"steps": 5, "num_samples": 10}
SMALL = dict(
    norm="l1", noise="splitting", theta=0.3, certify=CertifyConfig(n0=20, n=2_000), guard_samples=50,
    isotropic=IsotropicConfig(**SHORT), anisotropic=AnisotropicConfig(**SHORT), leakage=LeakageConfig(3, 4),
)  # fmt: skip


@pytest.mark.parametrize("method", ["fixed", pytest.param("isotropic", marks=pytest.mark.slow), "ancer"])
def test_an_exact_run_takes_all_draws_and_needs_no_alpha(tmp_path, method):
    config = RunConfig(**SMALL | {"leakage": None}, method=method, exact=True, period=840)
    certify_dataset(LINEAR, DATASET, config, out=tmp_path / "a", execution=Execution(batch_size=4, chunk=64))
    certify_dataset(LINEAR, DATASET, config, out=tmp_path / "b", execution=Execution(batch_size=6, devices=3, chunk=7))
    first, other = (read_run(tmp_path / name).columns("counts", "n", "draws", "gap", "theta") for name in "ab")
    for name in first:
        np.testing.assert_array_equal(first[name], other[name])
    cuts = np.rint(first["theta"] * 510).astype(int)
    np.testing.assert_allclose(first["theta"], cuts / 510, rtol=1e-6)
    expected = {"fixed": 153, "isotropic": cuts, "ancer": [np.lcm.reduce(one.ravel()) for one in cuts]}[method]
    np.testing.assert_array_equal(first["n"], np.broadcast_to(expected, 6))
    assert (840 % cuts == 0).all() or method != "ancer"
    np.testing.assert_array_equal(first["draws"], first["n"])
    margin = 2 * first["counts"] - first["n"] - 1
    np.testing.assert_array_equal(first["gap"], np.maximum(margin, 0) / first["n"])
    assert (first["gap"] > 0).any()
    results = report.load_results(tmp_path / "a")
    bound = cuts >= 612 if method == "isotropic" else cuts >= 420  # of 4 x 0.3, rounded down
    share = bound.reshape(6, -1).mean(axis=1) if method != "fixed" else np.zeros(6)
    np.testing.assert_allclose(results["at_theta_max"], share, atol=1e-4)
    assert results.reconciled and results.norm == "l1"


def test_random_and_exact_certificates_agree(tmp_path):
    for name, exact in (("random", False), ("exact", True)):
        certify_dataset(LINEAR, DATASET, RunConfig(**SMALL, exact=exact), out=tmp_path / name)
    table = report.summary_table([report.load_results(tmp_path / name) for name in ("random", "exact")], [0.0])
    assert "without alpha, for images of 8 bits: exact." in table and "Splitting noise: random, exact." in table
    random, exact = (read_run(tmp_path / name).columns("gap", "counts", "n") for name in ("random", "exact"))
    # Not equal: the exact form's cuts depend on each other, so that it is another classifier.
    np.testing.assert_allclose(random["counts"] / random["n"], exact["counts"] / exact["n"], atol=0.35)
    assert "noise" in read_run(tmp_path / "random").settings


def test_the_mean_over_offsets_is_the_random_form():
    """Offsets are like random ones: of neighbours, and of one coordinate under different seeds."""
    x, theta, shares = DATASET.images[0], np.float32(0.3), []
    for seed in range(24):
        smoothed = Smoothed(LINEAR, Splitting(exact=True, seed=seed), theta)
        counts = class_counts_between(KEY, smoothed, x, (0, 153), steps=2, chunk=100)
        shares.append(np.asarray(counts) / 153)
    random = class_counts(KEY, Smoothed(LINEAR, Splitting(), theta), x, num_samples=20_000, chunk=1000) / 20_000
    np.testing.assert_allclose(np.mean(shares, axis=0), random, atol=4 * np.std(shares) / 24**0.5)


def test_offsets_are_one_fixed_table():
    """Of no generator that a version or setting of JAX could change: a run that goes on elsewhere is the same run."""
    expected = [_murmur(i + 0x9E3779B9) >> 12 for i in range(2000)]
    offsets = np.asarray(splitting._offsets(2000, 0))
    assert offsets.tolist() == expected and offsets[:3].tolist() == expected[:3]
    for name, value in (("jax_threefry_partitionable", False), ("jax_enable_x64", True)):
        before = getattr(jax.config, name)
        jax.config.update(name, value)
        try:
            np.testing.assert_array_equal(jax.jit(lambda: splitting._offsets(2000, 0))(), offsets)
        finally:
            jax.config.update(name, before)
    for cuts in (153, 255, 510):
        cells = np.bincount(np.asarray(splitting._offsets(100_000, 3)) % cuts, minlength=cuts)
        assert scipy.stats.chisquare(cells).pvalue > 1e-3


def _murmur(value):
    """MurmurHash3's 32-bit finalizer, in Python's integers."""
    value &= 2**32 - 1
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        value = (value ^ (value >> shift)) * factor % 2**32
    return value ^ (value >> 16)


@pytest.mark.parametrize(
    ("votes", "text"),
    [
        ((5, 2, 2**14 + 1), r"exact certificates are of 1\.\.16384 draws, got 16385"),
        ((5, 6, 20), "votes must be"),
        ((15, 6, 20), "votes must be"),
        ((5, -1, 20), "votes must be"),
        ((5.0, 1, 20), "votes and draws must be integers"),
    ],
)
def test_an_exact_gap_of_what_its_proof_does_not_cover_is_refused(votes, text):
    with pytest.raises(ValueError, match=text):
        EXACT.exact_gap(*map(np.asarray, votes))


def test_the_search_follows_splitting_noise():
    search = AnisotropicConfig(steps=20, num_samples=64, learning_rate=0.05, theta_max=2.0)
    smoothed = Smoothed(LINEAR, Splitting(), np.float32(0.6))
    theta, trace = optimize_anisotropic(KEY, smoothed, IMAGES[0] * 0 + 0.9, config=search)
    assert (theta >= 0.6).all() and theta.max() > 0.7 and trace.proxy_radius[-1] > trace.proxy_radius[0]


def test_noise_of_training_fits_the_norm():
    with pytest.raises(ValueError, match="noise for l1 must be one of uniform, splitting, got 'gaussian'"):
        TrainConfig(norm="l1", noise="gaussian")


def test_images_off_the_grid_are_refused_by_name(tmp_path):
    off = dataclasses.replace(DATASET, images=IMAGES + np.float32(1e-6) * (np.arange(6) == 3)[:, None, None, None])
    with pytest.raises(ValueError, match="pixels of image 3 are not multiples of 1/255"):
        certify_dataset(LINEAR, off, RunConfig(**SMALL, exact=True), out=tmp_path)


@pytest.mark.parametrize(
    ("function", "more"),
    [
        (certify, {}),
        (certify_batch, {}),
        (count_votes, {"config": CertifyConfig(), "chunk": 10}),
        (predict, {}),
        (predict_batch, {}),
        (certify_sequentially, {"sequential": SequentialConfig(tolerance=0.1)}),
    ],
)
def test_some_draws_of_the_exact_form_certify_nothing(function, more):
    """They are not random: a bound for random draws says nothing of them."""
    inputs = IMAGES[:1] if function in (certify_batch, predict_batch) else IMAGES[0]
    with pytest.raises(ValueError, match="the draws of enumerable noise must all be counted"):
        function(KEY, Smoothed(LINEAR, Splitting(exact=True), np.float32(0.3)), inputs, **more)


def test_smoothadv_needs_noise_that_is_added():
    with pytest.raises(ValueError, match="smoothadv attacks through noise that is added, not through splitting noise"):
        TrainConfig("smoothadv", "l1", epsilon=0.1, attack_steps=2, noise="splitting")
