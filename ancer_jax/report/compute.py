"""What a run spends on each image, counted in passes through the network."""

from collections.abc import Mapping
from typing import Any, NamedTuple


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

    Noisy copies are counted one by one. Derivatives are with respect to the noise only. The references of leakage are
    those that were asked for; a small data set has fewer. What is spent once a run is left out: choosing the
    references, and learning the theta of method "shared".
    """
    certificate, leakage = settings["certify"], settings.get("leakage") or {"num_references": 0, "num_samples": 0}
    forward, backward = certificate["n0"] + certificate["n"] if draws is None else draws, 0
    searches = [settings[name] for name in ("isotropic", "anisotropic") if name in settings]
    for search in searches:
        batch = min(search["leakage_batch"], leakage["num_references"]) if search["leakage_weight"] > 0 else 0
        forward += search["steps"] * (search["num_samples"] + batch)
        backward += search["steps"] * (search["num_samples"] + batch)
    measured = leakage["num_references"] * leakage["num_samples"]
    limited = settings.get("leakage_limit") is not None
    guards = ["off", *([settings["guard"]] if len(searches) > 1 else [])] if searches else []
    for guard in guards:  # how many thetas are compared
        thetas = 2 if guard != "off" else int(limited)
        forward += thetas * settings.get("guard_samples", 0) + measured * limited
    return Passes(forward, backward, measured if searches else 0)
