import dataclasses

import pytest

from ancer_jax import AnisotropicConfig, GuardConfig, IsotropicConfig, LeakageConfig, UniversalConfig, bounds


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
def test_search_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        AnisotropicConfig(**change)


def refused_choice(config, name, value):
    """The message about a value that the type checker of the tests would refuse before the config can."""
    object.__setattr__(config, name, value)
    with pytest.raises(ValueError) as refusal:
        config.__post_init__()
    return str(refusal.value)


@pytest.mark.parametrize(
    ("config", "name", "value", "text"),
    [
        (AnisotropicConfig(), "objective", "radius", "objective must be one of ancer, log_volume, got 'radius'"),
        (AnisotropicConfig(), "ascent", "linear", "ascent must be one of log, published, got 'linear'"),
        (GuardConfig(), "criterion", "on", "criterion must be one of off, volume, superset, got 'on'"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused(config, name, value, text):
    assert refused_choice(config, name, value) == text


@pytest.mark.parametrize(
    "change",
    [
        {"num_samples": 0},
        {"num_samples": bounds.MOST_TRACED_TRIALS + 1},
        {"chunk": 0},
        {"alpha": 0.0},
        {"alpha": bounds.LEAST_TRACED_ALPHA / 2},
        {"alpha": 1.0},
    ],
)
def test_guard_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        GuardConfig(**change)


@pytest.mark.parametrize("limit", [-0.1, 1.1, float("nan")])
def test_a_leakage_limit_that_is_no_share_is_refused(limit):
    with pytest.raises(ValueError, match=rf"leakage_limit must be in \[0, 1\], got {limit}"):
        GuardConfig(leakage_limit=limit)


@pytest.mark.parametrize("name", ["num_probes", "num_samples"])
def test_leakage_settings_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        LeakageConfig(**{name: 0})


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"batch_size": 0}, {"num_samples": 0}, {"learning_rate": 0.0}, {"alpha": 1.0}, {"theta_max": -1.0}],
)
def test_universal_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        UniversalConfig(**change)


@pytest.mark.parametrize(("config", "steps"), [(IsotropicConfig, 900), (AnisotropicConfig, 100)])
def test_the_published_preset_has_the_settings_of_the_papers_code(config, steps):
    published = config.published()
    assert (published.steps, published.num_samples, published.learning_rate) == (steps, 100, 0.04)
    assert published.ascent == "published"
    assert config.published(steps=3) == dataclasses.replace(published, steps=3)
