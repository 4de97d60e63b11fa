"""The settings of a training: presets are the published ones, and bad settings are refused."""

import pytest

from ancer_jax.training import PRESETS, TrainConfig


def test_presets_are_the_published_settings():
    names = ("epochs", "batch_size", "copies", "learning_rate", "weight_decay", "drop_every", "weight")
    published = {
        "augmentation": (90, 256, 1, 0.1, 1e-4, 30, 0),
        "smoothadv": (90, 256, 1, 0.1, 1e-4, 30, 0),
        "macer": (440, 64, 16, 0.01, 5e-4, 200, 12),
        "consistency": (150, 128, 2, 0.1, 1e-4, 50, 10),
        "stability": (120, 64, 2, 0.1, 1e-4, None, 6),
    }
    found = {method: tuple(getattr(preset, name) for name in names) for method, preset in PRESETS.items()}
    assert found.pop("volume") and found == published
    assert all(preset.momentum == 0.9 and preset.shift == 4 and preset.flip for preset in PRESETS.values())
    assert [method for method, preset in PRESETS.items() if preset.nesterov] == ["stability"]
    attack = PRESETS["smoothadv"]
    assert (attack.epsilon, attack.attack_steps, attack.warmup_epochs) == (0.25, 10, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"theta": 0.0}, r"theta must be in \(0, inf\), got 0"),
        ({"learning_rate": float("nan")}, r"learning_rate must be in \(0, inf\), got nan"),
        ({"momentum": -0.1}, r"momentum must be in \[0, inf\), got -0.1"),
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
