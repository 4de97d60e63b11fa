"""Settings of the searches for theta, of the guarded choice, and of leakage."""

import dataclasses
from typing import Any, Literal, TypeVar

from ancer_jax._checks import check_choice, check_integer, check_real
from ancer_jax.smoothing import bounds

Objective = Literal["ancer", "log_volume"]
Ascent = Literal["log", "published"]
Guard = Literal["off", "volume", "superset"]
_Config = TypeVar("_Config", bound="SearchConfig")

# Without a bound the search runs away: noise that erases the image makes the network constant, and the certificate of a
# constant function is huge, true and worthless.
THETA_MAX_FACTOR = 4.0


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """Settings that the isotropic and the anisotropic search share; one out of range is a ValueError.

    Attributes:
      steps: ascent steps.
      num_samples: noise draws per step, fresh ones each time.
      learning_rate: step size in log(theta), or with `ascent="published"` in theta.
      ascent: "log", Adam over log(theta) with a rate that falls to 0 along a cosine; or "published", as in the code of
        the papers: plain gradient ascent over theta (isotropic), or Adam (anisotropic). See `published`.
      objective: "ancer" (the paper's) or "log_volume" (log-volume divided by the dimension, up to constants).
      theta_max: upper bound of every coordinate of theta (never below the start); `inf` is no bound. None means 4 times
        the start, which in the anisotropic search is the isotropic theta; `RunConfig` sets both to 4 times its theta.
      leakage_weight: weight of `leakage_penalty`, which is subtracted from the objective; 0 is none. With weights
        of 20 and more plain gradient ascent can overshoot.
      leakage_batch: leakage probes per step.
    """

    steps: int = 100
    num_samples: int = 64
    learning_rate: float = 0.08
    ascent: Ascent = "log"
    objective: Objective = "ancer"
    theta_max: float | None = None
    leakage_weight: float = 0.0
    leakage_batch: int = 32

    def __post_init__(self):
        for name in ("steps", "num_samples", "leakage_batch"):
            check_integer(name, getattr(self, name))
        check_real("learning_rate", self.learning_rate, "(0, inf)")
        if self.theta_max is not None:
            check_real("theta_max", self.theta_max, "(0, inf]")
        check_real("leakage_weight", self.leakage_weight, "[0, inf)")
        check_choice("objective", self.objective, Objective)
        check_choice("ascent", self.ascent, Ascent)

    @classmethod
    def published(cls: type[_Config], **changes: Any) -> _Config:
        """The schedule of the papers' code, with `changes`: 100 draws, rate 0.04, and 900 (isotropic) or 100 steps."""
        steps = 900 if cls is IsotropicConfig else 100
        return cls(**{"steps": steps, "num_samples": 100, "learning_rate": 0.04, "ascent": "published"} | changes)


@dataclasses.dataclass(frozen=True)
class IsotropicConfig(SearchConfig):
    """Settings of `optimize_isotropic`; those of Alfarra et al. 2022 are `IsotropicConfig.published()`.

    Attributes are those of `SearchConfig`.
    """

    steps: int = 20
    num_samples: int = 32
    learning_rate: float = 0.2


@dataclasses.dataclass(frozen=True)
class AnisotropicConfig(SearchConfig):
    """Settings of `optimize_anisotropic`; those of Eiras et al. 2022 are `AnisotropicConfig.published()`.

    Attributes (the others are those of `SearchConfig`):
      kappa: weight of `min(theta)` in the "ancer" objective.
    """

    kappa: float = 2.0

    def __post_init__(self):
        super().__post_init__()
        check_real("kappa", self.kappa, "[0, inf)")


@dataclasses.dataclass(frozen=True)
class UniversalConfig:
    """Settings of `optimize_universal`; one out of range is a ValueError.

    Attributes:
      steps, batch_size, num_samples: of the ascent, images of each step, and draws for each image. All noisy copies of
        a step are held at once.
      learning_rate: step size in log(theta).
      alpha: of the Clopper-Pearson bound in the estimate. At 1/2, a lucky few draws would count as a region, and
        the more so the larger the noise.
      theta_min: lower bound, never above the start; None is a tenth of that.
      theta_max: upper bound, never below the start; None is 4 times that. ACR-tilde depends on it: report it.
    """

    steps: int = 300
    batch_size: int = 32
    num_samples: int = 32
    learning_rate: float = 0.03
    alpha: float = 0.05
    theta_min: float | None = None
    theta_max: float | None = None

    def __post_init__(self):
        for name in ("steps", "batch_size", "num_samples"):
            check_integer(name, getattr(self, name))
        check_real("learning_rate", self.learning_rate, "(0, inf)")
        check_real("alpha", self.alpha, f"[{bounds.LEAST_TRACED_ALPHA}, 1)")
        if self.alpha ** (1 / self.num_samples) <= 0.5:
            few = f"{self.num_samples} draws certify nothing at alpha = {self.alpha:g}, whatever they are"
            raise ValueError(f"num_samples is too small: {few}, so there is nothing to ascend")
        for name in ("theta_min", "theta_max"):
            if getattr(self, name) is not None:
                check_real(name, getattr(self, name), "(0, inf)")


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Settings of `guarded_choice`; one out of range is a ValueError.

    Attributes:
      criterion: "volume", "superset", or "off".
      num_samples: draws for each of the two thetas.
      alpha: error probability of the bounds that are compared; no guarantee depends on it.
      leakage_limit: largest share of the eligible leakage probes, in [0, 1]; None is no limit.
      chunk: draws at a time; changes speed and memory, never the draws.
    """

    criterion: Guard = "volume"
    num_samples: int = 1000
    alpha: float = 0.001
    leakage_limit: float | None = None
    chunk: int = 100

    def __post_init__(self):
        check_choice("criterion", self.criterion, Guard)
        check_integer("num_samples", self.num_samples, 1, bounds.MOST_TRACED_TRIALS)
        check_integer("chunk", self.chunk)
        check_real("alpha", self.alpha, f"[{bounds.LEAST_TRACED_ALPHA}, 1)")
        if self.leakage_limit is not None:
            check_real("leakage_limit", self.leakage_limit, "[0, 1]")


@dataclasses.dataclass(frozen=True)
class LeakageConfig:
    """Settings that change a measured leakage; one that is not an integer of at least 1 is a ValueError.

    Attributes:
      num_probes: how many leakage probes a search may see; and how many more, held out from every search, for the soft
        leakage.
      num_samples: noise draws for each probe; an eighth for those that are held out.
    """

    num_probes: int = 200
    num_samples: int = 64

    @property
    def held_out_samples(self) -> int:
        """Draws for each probe that is held out: the mean is over many images, and needs few draws of each."""
        return max(1, self.num_samples // 8)

    def __post_init__(self):
        for name in ("num_probes", "num_samples"):
            check_integer(name, getattr(self, name))
