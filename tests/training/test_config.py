"""The settings of training: presets are the published ones, and bad settings are refused."""

import pytest

from ancer_jax.training import PRESETS, TrainConfig


def test_presets_are_the_published_settings():
    names = ("epochs", "batch_size", "copies", "learning_rate", "weight_decay", "schedule", "drop_every", "weight")
    published = {
        "augmentation": (90, 256, 1, 0.1, 1e-4, "drops", 30, 0),
        "smoothadv": (90, 256, 1, 0.1, 1e-4, "drops", 30, 0),
        "macer": (440, 64, 16, 0.01, 5e-4, "drops", 200, 12),
        "consistency": (150, 128, 2, 0.1, 1e-4, "drops", 50, 10),
        "stability": (120, 64, 2, 0.1, 1e-4, "cosine", 0, 6),
    }
    found = {method: tuple(getattr(preset, name) for name in names) for method, preset in PRESETS.items()}
    assert found.pop("volume") and found == published
    for preset in PRESETS.values():
        assert (preset.optimizer, preset.momentum, preset.shift, preset.flip) == ("sgd", 0.9, 4, "random")
    assert [method for method, preset in PRESETS.items() if preset.nesterov] == ["stability"]
    attack = PRESETS["smoothadv"]
    assert (attack.epsilon, attack.attack_steps, attack.warmup_epochs) == (0.25, 10, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"theta": 0.0}, r"theta must be in \(0, inf\), got 0"),
        ({"learning_rate": float("nan")}, r"learning_rate must be in \(0, inf\), got nan"),
        ({"muon_learning_rate": 0.0}, r"muon_learning_rate must be in \(0, inf\), got 0"),
        ({"momentum": -0.1}, r"momentum must be in \[0, 1\), got -0.1"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1"),
        ({"schedule": "drops"}, "the schedule drops needs a positive drop_every"),
        ({"drop_every": 30}, "the schedule cosine has no drop_every, got 30"),
        ({"schedule": "onecycle", "drop_every": 3}, "the schedule onecycle has no drop_every, got 3"),
        ({"schedule": "drops", "drop_every": -1}, "drop_every must be at least 0, got -1"),
        ({"method": "stability", "weight": 6.0}, "at least 2, got copies = 1"),
        ({"method": "consistency", "weight": 6.0}, "at least 2, got copies = 1"),
        ({"method": "macer", "norm": "l1", "weight": 1.0}, "norm must be l2"),
        ({"method": "macer"}, "macer training needs a positive weight"),
        ({"method": "smoothadv", "epsilon": 0.5}, "smoothadv training needs a positive attack_steps"),
        ({"epsilon": 0.5}, "augmentation training has no epsilon, got 0.5"),
        ({"seed": 2**31}, "seed must be in"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optimizer", "adam", "optimizer must be one of sgd, muon, got 'adam'"),
        ("schedule", "linear", "schedule must be one of drops, cosine, onecycle, got 'linear'"),
        ("flip", True, "flip must be one of random, alternating, none, got True"),
    ],
)
def test_an_unknown_choice_is_named(name, value, message):
    config = TrainConfig()
    object.__setattr__(config, name, value)  # past the types, which are checked while the tests run
    with pytest.raises(ValueError, match=message):
        config.__post_init__()
