import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from ancer_jax import (
    AnisotropicConfig,
    GaussianL2,
    IsotropicConfig,
    UniformL1,
    from_function,
    guarded_choice,
    optimize,
    optimize_anisotropic,
    optimize_isotropic,
)
from ancer_jax.leakage import leakage, make_references
from ancer_jax.smoothing import Stage, stage_key
from tests import reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
ORIGIN = np.zeros(1, np.float32)
STEEP = 50.0


def interval_logits(half_width, x):
    """Class 1 iff |x| < half_width in every coordinate, with a steep slope, so that soft and hard votes agree."""
    inside = STEEP * jnp.min(half_width - jnp.abs(x), axis=-1)
    return jnp.stack([-inside, inside], axis=-1)


def interval(*half_widths):
    return from_function(interval_logits, np.float32(half_widths), num_classes=2)


def paintable_logits(_, x):
    """Class 1 iff the first coordinate is positive, or the second one far from 0; the third one means nothing."""
    score = 10 * jnp.maximum(x[:, 0], jnp.abs(x[:, 1]) - 1)
    return jnp.stack([-score, score], axis=-1)


PAINTABLE, PAINTED = from_function(paintable_logits, (), num_classes=2), np.float32([0.5, 0, 0])


@functools.cache
def references():
    """24 images that the second coordinate says nothing about, about half of them of each class."""
    images = np.random.default_rng(0).uniform(-1, 1, (24, 3)).astype(np.float32) * np.float32([1, 0.1, 1])
    keys = jax.random.split(KEY, 24)
    return make_references(keys, PAINTABLE, GaussianL2(), images, 0.25, num_samples=16, chunk=16)


def leaked(theta):
    """(leaked, eligible) to class 1."""
    counts = leakage(references(), PAINTABLE, GaussianL2(), PAINTED, theta, 1, num_samples=16, chunk=16)
    return tuple(int(count) for count in counts)


def not_a_number(variables, x):
    return x[:, :2] * jnp.nan


@pytest.mark.parametrize("objective", ["ancer", "log_volume"])
@pytest.mark.parametrize(("certificate", "start"), [(GaussianL2(), 0.2), (GaussianL2(), 0.9), (UniformL1(), 0.6)])
def test_isotropic_search_finds_the_level_that_is_best(certificate, start, objective):
    """Size `theta * gap(P(|theta * eps| < 1))` has a closed form; the search comes close to its maximum."""
    law = scipy.stats.norm() if certificate.norm == 2 else scipy.stats.uniform(-1, 2)
    size = lambda theta: theta * float(certificate.gap(min(law.cdf(1 / theta) - law.cdf(-1 / theta), 0.999)))
    best = size(scipy.optimize.minimize_scalar(lambda t: -size(t), bounds=(0.05, 3), method="bounded").x)
    rate = 0.02 if objective == "ancer" else 0.01
    config = IsotropicConfig(steps=300, num_samples=300, learning_rate=rate, theta_max=4.0, objective=objective)
    theta, trace = jax.jit(optimize_isotropic, static_argnames=("certificate", "config"))(
        KEY, interval(1.0), certificate, ORIGIN, start, config=config
    )
    assert size(float(theta)) > 0.9 * best
    assert size(start) < 0.75 * best
    assert trace.gap.shape == trace.proxy_radius.shape == (300,)
    assert trace.proxy_radius[-20:].mean() > trace.proxy_radius[0]


@pytest.mark.parametrize("objective", ["ancer", "log_volume"])
@pytest.mark.parametrize(("certificate", "highest"), [(GaussianL2(), 0.7), (UniformL1(), 1.25)])
def test_anisotropic_search_grows_where_the_classifier_does_not_look(certificate, highest, objective):
    classifier = reference.linear([STEEP, 0.0, 0.0, 0.0], b=STEEP)
    config = AnisotropicConfig(steps=60, num_samples=100, theta_max=2.0, objective=objective)
    theta, trace = optimize_anisotropic(KEY, classifier, certificate, np.zeros(4, np.float32), 0.5, config=config)
    assert theta.shape == (4,)
    np.testing.assert_allclose(theta[1:], 2.0)
    # Uniform noise up to the boundary costs nothing.
    assert 0.5 <= theta[0] < highest
    assert trace.proxy_radius[-1] > 1.5 * trace.proxy_radius[0]


@pytest.mark.parametrize(("ascent", "rate"), [("log", 0.3), ("reference", 0.5)])
def test_theta_stays_between_the_isotropic_one_and_the_bound(ascent, rate):
    theta_init = np.array([0.3, 0.6, 0.9], np.float32)
    config = AnisotropicConfig(steps=40, num_samples=20, learning_rate=rate, ascent=ascent, theta_max=1.0)
    theta, _ = optimize_anisotropic(
        KEY, interval(0.5, 2.0, 4.0), GaussianL2(), np.zeros(3, np.float32), theta_init, config=config
    )
    assert (theta >= theta_init).all()
    assert (theta <= 1.0).all()
    assert (theta != theta_init).any()
    assert theta[2] == 1.0  # the bound itself, as reports count it


def test_the_search_runs_away_without_a_bound_and_not_with_it():
    """A network that noise makes constant: the certified region of the constant is as large as one likes."""
    search = lambda **settings: optimize_isotropic(
        KEY,
        reference.constant([0, 5]),
        GaussianL2(),
        ORIGIN,
        0.25,
        config=IsotropicConfig(steps=100, num_samples=10, **settings),
    )[0]
    assert search() == 1.0
    assert search(theta_max=0.7) == np.float32(0.7)
    assert search(theta_max=float("inf")) > 5


@pytest.mark.parametrize("bound", [0.2, 0.7, 3.2])
def test_a_theta_at_its_bound_is_the_bound(bound):
    """To the bit, as reports count it."""
    config = IsotropicConfig(steps=20, num_samples=2, learning_rate=1.0, theta_max=bound)
    theta, _ = optimize_isotropic(KEY, reference.constant([0, 5]), GaussianL2(), ORIGIN, bound / 4, config=config)
    assert theta == np.float32(bound)


@pytest.mark.parametrize("search", [optimize_isotropic, optimize_anisotropic])
def test_the_last_finite_theta_is_kept(search):
    settings = IsotropicConfig if search is optimize_isotropic else AnisotropicConfig
    classifier = from_function(not_a_number, (), num_classes=2)
    theta, _ = search(
        KEY, classifier, GaussianL2(), np.zeros(2, np.float32), 0.25, config=settings(steps=3, num_samples=5)
    )
    np.testing.assert_array_equal(theta, jnp.full(theta.shape, 0.25))


def test_a_start_that_is_not_positive_is_refused():
    for theta, text in ((-0.25, "got -0.25"), (0.0, "got 0.0"), (np.inf, "got inf")):
        with pytest.raises(ValueError, match=f"theta_init must be positive and finite, {text}"):
            optimize_isotropic(KEY, interval(1.0), GaussianL2(), ORIGIN, theta, config=IsotropicConfig())
        with pytest.raises(ValueError, match=f"theta_init must be positive and finite, {text}"):
            optimize_anisotropic(KEY, interval(1.0), GaussianL2(), ORIGIN, theta, config=AnisotropicConfig())


def test_isotropic_theta_stays_positive():
    config = IsotropicConfig(steps=20, num_samples=20, learning_rate=100.0)
    theta, _ = optimize_isotropic(KEY, interval(0.1), GaussianL2(), ORIGIN, 1.0, config=config)
    assert 0.01 <= theta <= 4


@pytest.mark.parametrize("search", [optimize_isotropic, optimize_anisotropic])
def test_vmap_is_a_loop_over_inputs(search):
    settings = IsotropicConfig if search is optimize_isotropic else AnisotropicConfig
    config = settings(steps=10, num_samples=20)
    keys = jax.random.split(KEY, 3)
    xs, thetas = np.float32([[0.1, 0.2], [0.5, -0.3], [0.0, 0.7]]), np.float32([0.3, 0.4, 0.5])
    one = lambda key, x, theta: search(key, interval(1.0, 2.0), GaussianL2(), x, theta, config=config)[0]
    batched = jax.vmap(one)(keys, xs, thetas)
    alone = jnp.stack([one(*arguments) for arguments in zip(keys, xs, thetas, strict=True)])
    np.testing.assert_allclose(batched, alone, rtol=1e-5)
    assert len(np.unique(np.asarray(batched))) >= 3


_PLAIN = IsotropicConfig.reference(steps=100, learning_rate=0.02, leakage_weight=1.0, objective="log_volume")


@pytest.mark.parametrize(
    ("search", "config", "growth"),
    [
        (optimize_isotropic, _PLAIN, 0.9),
        (optimize_anisotropic, AnisotropicConfig(60, leakage_weight=5.0), 1.5),
        (optimize_anisotropic, AnisotropicConfig(60, leakage_weight=5.0, objective="log_volume"), 1.5),
    ],
)
def test_the_penalty_keeps_the_search_from_painting_the_class(search, config, growth):
    find = lambda weight: search(
        KEY, PAINTABLE, GaussianL2(), PAINTED, 0.25, references=references(),
        config=dataclasses.replace(config, theta_max=4.0, leakage_weight=weight, leakage_batch=8),
    )  # fmt: skip
    count, eligible = leaked(find(0.0)[0])
    assert count > 0.7 * eligible > 5
    theta, trace = find(config.leakage_weight)
    assert leaked(theta)[0] == 0
    assert trace.proxy_radius[-1] > growth * trace.proxy_radius[0]


@pytest.mark.parametrize("search", [optimize_isotropic, optimize_anisotropic])
def test_references_change_nothing_without_a_weight(search):
    config = (IsotropicConfig if search is optimize_isotropic else AnisotropicConfig)(steps=5, num_samples=20)
    find = lambda **settings: search(KEY, PAINTABLE, GaussianL2(), PAINTED, 0.25, config=config, **settings)
    jax.tree.map(np.testing.assert_array_equal, find(references=references()), find())
    config = dataclasses.replace(config, leakage_weight=1.0)
    with pytest.raises(ValueError, match=r"leakage_weight = 1.0 needs references, got None"):
        find()
    assert (find(references=references())[0] != 0.25).any()


def test_vmap_of_a_penalised_search_is_a_loop_over_inputs():
    config = AnisotropicConfig(steps=10, num_samples=20, leakage_weight=1.0, leakage_batch=8)
    keys = jax.random.split(KEY, 3)
    xs, thetas = PAINTED + np.float32([[0], [-1], [0.2]]), np.float32([0.3, 0.4, 0.5])
    one = jax.jit(
        lambda key, x, theta: optimize_anisotropic(
            key, PAINTABLE, GaussianL2(), x, theta, config=config, references=references()
        )[0]
    )
    alone = jnp.stack([one(*arguments) for arguments in zip(keys, xs, thetas, strict=True)])
    np.testing.assert_allclose(jax.vmap(one)(keys, xs, thetas), alone, rtol=1e-5)


guarded_choice_jit = jax.jit(
    guarded_choice,
    static_argnames=("certificate", "guard", "num_samples", "chunk", "leakage_limit", "leakage_samples"),
)


def choose(classifier, narrow, wide, guard):
    theta, taken = guarded_choice_jit(
        KEY, classifier, GaussianL2(), np.zeros(2, np.float32), narrow, np.float32(wide), guard=guard,
        num_samples=2000, chunk=500,
    )  # fmt: skip
    assert (theta == (jnp.float32(wide) if taken else jnp.full(2, narrow))).all()
    return bool(taken)


def test_guarded_choice():
    one_sided = reference.linear([1.0, 0.0], b=1.0)
    assert choose(one_sided, 0.5, [0.5, 2.0], "volume")
    assert choose(one_sided, 0.5, [0.5, 2.0], "superset")
    # A larger first theta costs gap in the second: more volume, no superset.
    assert choose(one_sided, 0.5, [0.6, 2.0], "volume")
    assert not choose(interval(1.0, 1.0), 0.4, [0.4, 1.5], "volume")
    assert choose(interval(1.0, 1.0), 0.4, [0.4, 1.5], "off")


def test_guarded_choice_keeps_the_class():
    # Far out the class is 0, so that wide noise is classified confidently, as something else.
    assert not choose(interval(1.0, 1.0), 0.3, [50.0, 50.0], "volume")
    assert choose(interval(1.0, 1.0), 0.3, [50.0, 50.0], "off")
    with pytest.raises(ValueError, match="guard must be one of off, volume, superset, got 'on'"):
        unchecked = inspect.unwrap(guarded_choice)
        unchecked(KEY, interval(1.0), GaussianL2(), ORIGIN, 0.3, 1.0, guard="on", num_samples=10, chunk=10)


def choose_within(limit, wide, guard="off", x=PAINTED):
    _, taken = guarded_choice_jit(
        KEY, PAINTABLE, GaussianL2(), x, 0.25, np.float32(wide), guard=guard, num_samples=1000, chunk=500,
        references=references(), leakage_limit=limit, leakage_samples=16,
    )  # fmt: skip
    return bool(taken)


def test_guarded_choice_within_a_leakage_limit():
    honest, painted, small = [0.25, 0.25, 2], [0.25, 1.7, 0.25], [0.1, 0.1, 0.1]
    count, eligible = leaked(np.float32(painted))
    assert 0 < count < eligible
    assert leaked(np.float32(honest))[0] == leaked(np.float32(small))[0] == 0
    assert choose_within(None, painted, "volume")
    for guard in ("off", "volume"):
        assert choose_within(0.0, honest, guard)
        assert not choose_within(0.0, painted, guard)
    assert choose_within(count / eligible, painted)
    # The limit alone does not ask for a larger region; with the guard it does not replace it.
    assert choose_within(0.0, small)
    assert not choose_within(0.0, small, "volume")


def test_the_limit_is_on_leakage_to_the_class_that_the_wider_theta_votes_for():
    x, loud = np.float32([-0.5, 0, 0]), [0.25, 50, 0.25]
    assert leaked(np.float32(loud))[0] > 0
    # Under this theta x, too, is of class 1; to class 0 nothing leaks.
    assert not choose_within(0.0, loud, x=x)
    assert choose_within(0.0, [0.25, 0.25, 2], x=x)


def test_limits_that_make_no_sense_are_refused():
    arguments = (KEY, PAINTABLE, GaussianL2(), PAINTED, 0.25, PAINTED + 1)
    settings = {"guard": "off", "num_samples": 10, "chunk": 10}
    for limit in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"leakage_limit must be in \[0, 1\], got {limit}"):
            guarded_choice(*arguments, **settings, references=references(), leakage_limit=limit)
    with pytest.raises(ValueError, match=r"leakage_limit = 0.1 needs references, got None"):
        guarded_choice(*arguments, **settings, leakage_limit=0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"num_samples": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"theta_max": -1.0},
        {"leakage_weight": -1.0},
        {"leakage_weight": float("nan")},
        {"leakage_weight": float("inf")},
        {"leakage_batch": 0},
        {"kappa": -1.0},
    ],
)
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        AnisotropicConfig(**change)
    config = AnisotropicConfig()
    object.__setattr__(config, "objective", "radius")
    with pytest.raises(ValueError, match="objective must be one of ancer, log_volume, got 'radius'"):
        config.__post_init__()


def test_searches_and_guard_draw_by_keys_of_their_own(monkeypatch):
    """Not by those of the draws that certify."""
    stages = []
    monkeypatch.setattr(optimize, "stage_key", lambda key, stage: stages.append(stage) or stage_key(key, stage))
    of = jax.random.key(0), reference.linear([1.0, -1.0]), GaussianL2(), np.float32([0.5, 0.1])
    optimize_isotropic(*of, np.float32(0.5), config=IsotropicConfig(steps=1, num_samples=2))
    optimize_anisotropic(*of, np.float32(0.5), config=AnisotropicConfig(steps=1, num_samples=2))
    guarded_choice(*of, np.float32(0.5), np.float32(0.6), guard="volume", num_samples=5, chunk=5)
    assert set(stages) == {Stage.ISOTROPIC, Stage.ANISOTROPIC, Stage.GUARD}
