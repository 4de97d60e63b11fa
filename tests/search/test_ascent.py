import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from ancer_jax import (
    AnisotropicConfig,
    Gaussian,
    IsotropicConfig,
    Smoothed,
    Uniform,
    from_function,
    optimize_anisotropic,
    optimize_isotropic,
)
from ancer_jax.search import ascent
from ancer_jax.smoothing.smoothed import Stage, stage_key
from tests import reference
from tests.search.classifiers import (
    KEY,
    ORIGIN,
    PAINTABLE,
    PAINTED,
    STEEP,
    interval,
    leakage_to_class_1,
    paintable_probes,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

BOTH_SEARCHES = pytest.mark.parametrize(
    ("search", "Config"), [(optimize_isotropic, IsotropicConfig), (optimize_anisotropic, AnisotropicConfig)]
)


def not_a_number(variables, x):
    return x[:, :2] * jnp.nan


@pytest.mark.parametrize("objective", ["ancer", "log_volume"])
@pytest.mark.parametrize(("noise", "start"), [(Gaussian(), 0.2), (Gaussian(), 0.9), (Uniform(), 0.6)])
def test_isotropic_search_finds_the_best_noise_level(noise, start, objective):
    """The size `theta * gap(P(|theta * eps| < 1))` has a closed form; the search comes close to its maximum."""
    law = scipy.stats.norm() if noise.norm == 2 else scipy.stats.uniform(-1, 2)
    size = lambda theta: theta * float(noise.gap(min(law.cdf(1 / theta) - law.cdf(-1 / theta), 0.999)))
    best = size(scipy.optimize.minimize_scalar(lambda t: -size(t), bounds=(0.05, 3), method="bounded").x)
    rate = 0.02 if objective == "ancer" else 0.01
    config = IsotropicConfig(steps=300, num_samples=300, learning_rate=rate, theta_max=4.0, objective=objective)
    theta, trace = jax.jit(optimize_isotropic, static_argnames="config")(
        KEY, Smoothed(interval(1.0), noise, start), ORIGIN, config=config
    )
    assert size(float(theta)) > 0.9 * best
    assert size(start) < 0.75 * best
    assert trace.gap.shape == trace.proxy_radius.shape == (300,)
    assert trace.proxy_radius[-20:].mean() > trace.proxy_radius[0]


@pytest.mark.parametrize("objective", ["ancer", "log_volume"])
@pytest.mark.parametrize(("noise", "highest"), [(Gaussian(), 0.7), (Uniform(), 1.25)])
def test_anisotropic_search_grows_where_the_classifier_does_not_look(noise, highest, objective):
    smoothed = Smoothed(reference.linear([STEEP, 0.0, 0.0, 0.0], b=STEEP), noise, 0.5)
    config = AnisotropicConfig(steps=60, num_samples=100, theta_max=2.0, objective=objective)
    theta, trace = optimize_anisotropic(KEY, smoothed, np.zeros(4, np.float32), config=config)
    assert theta.shape == (4,)
    np.testing.assert_allclose(theta[1:], 2.0)
    # Uniform noise that ends at the decision boundary does not lower the class probability.
    assert 0.5 <= theta[0] < highest
    assert trace.proxy_radius[-1] > 1.5 * trace.proxy_radius[0]


@pytest.mark.parametrize(("schedule", "rate"), [("log", 0.3), ("published", 0.5)])
def test_theta_stays_between_its_start_and_the_bound(schedule, rate):
    start = np.array([0.3, 0.6, 0.9], np.float32)
    config = AnisotropicConfig(steps=40, num_samples=20, learning_rate=rate, ascent=schedule, theta_max=1.0)
    smoothed = Smoothed(interval(0.5, 2.0, 4.0), Gaussian(), start)
    theta, _ = optimize_anisotropic(KEY, smoothed, np.zeros(3, np.float32), config=config)
    assert (theta >= start).all()
    assert (theta <= 1.0).all()
    assert (theta != start).any()
    assert theta[2] == 1.0  # exactly the bound: reports count the thetas that reach it


def test_only_a_bound_keeps_theta_from_growing_for_ever():
    """A network that noise makes constant: the certified region of a constant function has any size."""
    search = lambda **settings: optimize_isotropic(
        KEY,
        Smoothed(reference.constant([0, 5]), Gaussian(), 0.25),
        ORIGIN,
        config=IsotropicConfig(steps=100, num_samples=10, **settings),
    )[0]
    assert search() == 1.0
    assert search(theta_max=0.7) == np.float32(0.7)
    assert search(theta_max=float("inf")) > 5


@pytest.mark.parametrize("bound", [0.2, 0.7, 3.2])
def test_a_theta_at_its_bound_is_exactly_the_bound(bound):
    """Reports count such thetas by comparing them with the bound."""
    config = IsotropicConfig(steps=20, num_samples=2, learning_rate=1.0, theta_max=bound)
    smoothed = Smoothed(reference.constant([0, 5]), Gaussian(), bound / 4)
    theta, _ = optimize_isotropic(KEY, smoothed, ORIGIN, config=config)
    assert theta == np.float32(bound)


@BOTH_SEARCHES
def test_the_last_finite_theta_is_kept(search, Config):
    smoothed = Smoothed(from_function(not_a_number, (), num_classes=2), Gaussian(), 0.25)
    theta, _ = search(KEY, smoothed, np.zeros(2, np.float32), config=Config(steps=3, num_samples=5))
    np.testing.assert_array_equal(theta, jnp.full(theta.shape, 0.25))


@BOTH_SEARCHES
@pytest.mark.parametrize(("theta", "text"), [(-0.25, "got -0.25"), (0.0, "got 0.0"), (np.inf, "got inf")])
def test_a_start_that_is_not_positive_and_finite_is_refused(search, Config, theta, text):
    with pytest.raises(ValueError, match=f"theta where the search starts must be positive and finite, {text}"):
        search(KEY, Smoothed(interval(1.0), Gaussian(), theta), ORIGIN, config=Config())


def test_a_start_of_another_shape_is_refused():
    smoothed = Smoothed(interval(1.0), Gaussian(), np.full((3,), 0.25, np.float32))
    with pytest.raises(ValueError, match=r"an isotropic search starts at one number, got a theta of shape \[3\]"):
        optimize_isotropic(KEY, smoothed, ORIGIN)
    with pytest.raises(ValueError, match=r"theta must be a scalar or have x's shape"):
        optimize_anisotropic(KEY, smoothed, ORIGIN)


@BOTH_SEARCHES
def test_the_config_of_the_other_search_is_refused(search, Config):
    (other,) = {IsotropicConfig, AnisotropicConfig} - {Config}
    with pytest.raises(ValueError, match=f"config must be of type {Config.__name__}, got {other.__name__}"):
        inspect.unwrap(search)(KEY, Smoothed(interval(1.0), Gaussian(), 0.5), ORIGIN, config=other())


def test_isotropic_theta_stays_positive():
    config = IsotropicConfig(steps=20, num_samples=20, learning_rate=100.0)
    theta, _ = optimize_isotropic(KEY, Smoothed(interval(0.1), Gaussian(), 1.0), ORIGIN, config=config)
    assert 0.01 <= theta <= 4


@BOTH_SEARCHES
def test_vmap_is_a_loop_over_inputs(search, Config):
    config = Config(steps=10, num_samples=20)
    keys = jax.random.split(KEY, 3)
    xs, thetas = np.float32([[0.1, 0.2], [0.5, -0.3], [0.0, 0.7]]), np.float32([0.3, 0.4, 0.5])
    one = lambda key, x, theta: search(key, Smoothed(interval(1.0, 2.0), Gaussian(), theta), x, config=config)[0]
    batched = jax.vmap(one)(keys, xs, thetas)
    alone = jnp.stack([one(*arguments) for arguments in zip(keys, xs, thetas, strict=True)])
    np.testing.assert_allclose(batched, alone, rtol=1e-5)
    assert len(np.unique(np.asarray(batched))) >= 3


@pytest.mark.parametrize(
    ("search", "config", "growth"),
    [
        (
            optimize_isotropic,
            IsotropicConfig.published(steps=100, learning_rate=0.02, leakage_weight=1.0, objective="log_volume"),
            0.9,
        ),
        (optimize_anisotropic, AnisotropicConfig(60, leakage_weight=5.0), 1.5),
    ],
)
def test_the_penalty_keeps_the_search_from_painting_the_class(search, config, growth):
    def find(weight):
        changed = dataclasses.replace(config, theta_max=4.0, leakage_weight=weight, leakage_batch=8)
        return search(KEY, PAINTABLE, PAINTED, config=changed, probes=paintable_probes())

    num_leaked, num_eligible = leakage_to_class_1(find(0.0)[0])
    assert num_leaked > 0.7 * num_eligible > 5
    theta, trace = find(config.leakage_weight)
    assert leakage_to_class_1(theta)[0] == 0
    assert trace.proxy_radius[-1] > growth * trace.proxy_radius[0]


@BOTH_SEARCHES
def test_probes_change_nothing_without_a_weight(search, Config):
    config = Config(steps=5, num_samples=20)
    find = lambda **settings: search(KEY, PAINTABLE, PAINTED, config=config, **settings)
    jax.tree.map(np.testing.assert_array_equal, find(probes=paintable_probes()), find())
    config = dataclasses.replace(config, leakage_weight=1.0)
    with pytest.raises(ValueError, match=r"leakage_weight = 1.0 needs leakage probes, got None"):
        find()


def test_vmap_of_a_penalised_search_is_a_loop_over_inputs():
    config = AnisotropicConfig(steps=10, num_samples=20, leakage_weight=1.0, leakage_batch=8)
    keys = jax.random.split(KEY, 3)
    xs, thetas = PAINTED + np.float32([[0], [-1], [0.2]]), np.float32([0.3, 0.4, 0.5])
    one = jax.jit(
        lambda key, x, theta: optimize_anisotropic(
            key, PAINTABLE.with_theta(theta), x, config=config, probes=paintable_probes()
        )[0]
    )
    alone = jnp.stack([one(*arguments) for arguments in zip(keys, xs, thetas, strict=True)])
    np.testing.assert_allclose(jax.vmap(one)(keys, xs, thetas), alone, rtol=1e-5)


def test_each_search_draws_by_a_stage_key_of_its_own(monkeypatch):
    """So that none of its draws is one of those that certify."""
    stages = []
    monkeypatch.setattr(ascent, "stage_key", lambda key, stage: stages.append(stage) or stage_key(key, stage))
    smoothed = Smoothed(reference.linear([1.0, -1.0]), Gaussian(), np.float32(0.5))
    x = np.float32([0.5, 0.1])
    optimize_isotropic(KEY, smoothed, x, config=IsotropicConfig(steps=1, num_samples=2))
    optimize_anisotropic(KEY, smoothed, x, config=AnisotropicConfig(steps=1, num_samples=2))
    assert stages == [Stage.ISOTROPIC, Stage.ANISOTROPIC]


@BOTH_SEARCHES
def test_a_search_of_another_input_compiles_nothing_again(search, Config, compilations):
    searched = lambda x, start: search(KEY, Smoothed(interval(1.0), Gaussian(), start), x, config=Config(steps=2))
    searched(ORIGIN, 0.2)
    before = compilations()
    searched(ORIGIN + 0.1, 0.3)
    assert compilations() == before


@BOTH_SEARCHES
def test_an_input_that_is_not_finite_is_refused(search, Config):
    with pytest.raises(ValueError, match="x must be finite"):
        search(KEY, Smoothed(interval(1.0), Gaussian(), 0.2), ORIGIN * np.nan, config=Config(steps=2))
