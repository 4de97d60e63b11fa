"""What a run spends on each image, counted in passes through the network."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ancer_jax.leakage import LeakageConfig


class Passes(NamedTuple):
    """Passes through the network for an image: of search, choice and certificate; and forward ones beside, for the
    leakage that is measured.
    """

    forward: float
    backward: float
    leakage: float


def passes(settings: Mapping[str, Any], draws: float | None = None) -> Passes:
    """What each image of a run with these settings (`run.settings`) costs.

    `draws` is how many its certificate took on average (`shard["draws"]`); by default all that the settings allow.

    Noisy copies are counted one by one. Derivatives are with respect to the noise only. The images that leakage is
    measured on are as many as were asked for; a small data set has fewer. What is spent once a run is left out: the
    smoothed classes of these images, and learning the theta of method "shared".
    """
    certificate = settings["certify"]
    leakage = LeakageConfig(**settings["leakage"]) if settings.get("leakage") else None
    forward, backward = certificate["n0"] + certificate["n"] if draws is None else draws, 0
    searches = [settings[name] for name in ("isotropic", "anisotropic") if name in settings]
    for search in searches:
        batch = 0
        if leakage is not None and search["leakage_weight"] > 0:
            batch = min(search["leakage_batch"], leakage.num_references)
        forward += search["steps"] * (search["num_samples"] + batch)
        backward += search["steps"] * (search["num_samples"] + batch)
    measured = leakage.num_references * leakage.num_samples if leakage else 0
    held_out = leakage.num_references * leakage.held_out_samples if leakage else 0
    limited = settings.get("leakage_limit") is not None
    guards = ["off", *([settings["guard"]] if len(searches) > 1 else [])] if searches else []
    for guard in guards:  # how many thetas are compared
        thetas = 2 if guard != "off" else int(limited)
        forward += thetas * settings.get("guard_samples", 0) + measured * limited
    return Passes(forward, backward, measured + held_out if searches else 0)
