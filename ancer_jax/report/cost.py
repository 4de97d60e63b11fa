"""What a run spends on each image, counted in passes through the network."""

from typing import NamedTuple

from ancer_jax.runs import RunConfig


class Passes(NamedTuple):
    """Passes per image, forward and backward; `leakage` are further forward passes, which only measure leakage."""

    forward: float
    backward: float
    leakage: float


def passes(config: RunConfig, draws: float) -> Passes:
    """Passes per image of a run with this config that takes so many draws per certificate, on average.

    Every noisy copy counts as one pass. Derivatives are taken with respect to the noise only. Leakage is counted for as
    many probes as the config asks for; a small data set has fewer. Two costs that arise once per run are left out: the
    smoothed classes of the probes, and the optimization of a universal theta.
    """
    if not config.searches:
        return Passes(draws, 0, 0)
    forward, backward, leakage = draws, 0, config.leakage
    for search in config.searches.values():
        probes = min(search.leakage_batch, leakage.num_probes) if leakage and search.leakage_weight > 0 else 0
        backward += search.steps * (search.num_samples + probes)
    forward += backward
    limited = config.leakage_limit is not None
    measured = leakage.num_probes * leakage.num_samples if leakage else 0
    held_out = leakage.num_probes * leakage.held_out_samples if leakage else 0
    # The isotropic theta is only tested for leakage; the anisotropic one is also compared with it.
    for guard in ("off", config.guard)[: len(config.searches)]:
        thetas = 2 if guard != "off" else int(limited)
        forward += thetas * config.guard_samples + measured * limited
    return Passes(forward, backward, measured + held_out)
