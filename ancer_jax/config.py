"""What to compute, which changes results, and how, which does not."""

import dataclasses
from typing import Any, Literal, get_args

import numpy as np

from ancer_jax._checks import check_integer, check_real
from ancer_jax.certificates import CERTIFICATES, Certificate, Noise, noise_law
from ancer_jax.certification import CertifyConfig
from ancer_jax.leakage import LeakageConfig
from ancer_jax.optimize import THETA_MAX_FACTOR, AnisotropicConfig, Guard, IsotropicConfig
from ancer_jax.sequential import SequentialConfig

Method = Literal["fixed", "shared", "isotropic", "ancer"]
Split = Literal["images", "draws"]
Precision = Literal["default", "high", "highest"]


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that changes the results of a run (semantic settings).

    Attributes:
      norm: "l2" (Gaussian noise) or "l1".
      method: "fixed" theta; "shared": one theta per coordinate, the same for all inputs, which `certify_dataset` is
        given; "isotropic" theta per input; or "ancer": isotropic, then one theta per coordinate and input.
      theta: the fixed noise parameter, or where the search starts: standard deviation (l2) or half-width (l1).
      sampling: when drawing stops before `certify.n`; None is never.
      certify, isotropic, anisotropic: settings of the stages. `theta_max=None` means 4 times `theta` in both searches.
      guard, guard_samples: the guarded choice between isotropic and anisotropic theta (`optimize.guarded_choice`).
      leakage: how the leakage of data-dependent noise is measured; None is not at all.
      leakage_limit: with a limit, a theta that leaks more is not taken: the anisotropic one gives way to the isotropic
        one, and that to `theta`.
      seed: of all draws, in [0, 2^31).
      noise: for l1 "uniform" or "splitting"; None is the usual one of the norm.
      exact: of splitting noise, count all draws there are instead of `certify.n` random ones (`SplittingL1`): theta is
        rounded down to where that can be done, after guard and leakage limit, and certificates hold without alpha.
      period: with exact and one theta per coordinate, the number of those draws; whole numbers `510 theta` are rounded
        down to its divisors (for images of 8 bits).
      precision: of the network's products of matrices, on accelerators (`jax.default_matmul_precision`): "default" is
        what JAX is set to, where float32 is TF32 on recent GPUs and bfloat16 on TPUs; "highest" is float32. Another
        precision makes another base classifier.

    Raises:
      ValueError: if a setting is out of range.
    """

    norm: Literal["l2", "l1"] = "l2"
    method: Method = "fixed"
    theta: float = 0.25
    certify: CertifyConfig = CertifyConfig()
    sampling: SequentialConfig | None = None
    isotropic: IsotropicConfig = IsotropicConfig()
    anisotropic: AnisotropicConfig = AnisotropicConfig()
    guard: Guard = "volume"
    guard_samples: int = 1000
    leakage: LeakageConfig | None = LeakageConfig()
    leakage_limit: float | None = None
    seed: int = 0
    noise: Noise | None = None
    exact: bool = False
    period: int = 5040
    precision: Precision = "default"

    def __post_init__(self):
        for name, choices in (
            ("norm", tuple(CERTIFICATES)),
            ("method", get_args(Method)),
            ("guard", get_args(Guard)),
            ("precision", get_args(Precision)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        noise_law(self.norm, self.noise)
        if self.exact and self.noise != "splitting":
            raise ValueError("exact certificates are for splitting noise: norm l1, noise splitting")
        if self.exact and self.sampling is not None:
            raise ValueError("exact certificates take all draws: no sequential sampling")
        check_integer("period", self.period, 1, 2**14)
        check_real("theta", self.theta, "[-inf, inf]")
        if not np.finfo(np.float32).tiny <= self.theta <= np.finfo(np.float32).max:
            raise ValueError(f"theta must be positive and finite as float32, got {self.theta}")
        check_integer("seed", self.seed, 0, 2**31 - 1)
        check_integer("guard_samples", self.guard_samples)
        for name in ("isotropic", "anisotropic"):
            search = getattr(self, name)
            if search.theta_max is None:
                search = dataclasses.replace(search, theta_max=THETA_MAX_FACTOR * self.theta)
                object.__setattr__(self, name, search)
            if search.theta_max < self.theta and self.method != "shared":
                raise ValueError(f"theta_max must be at least theta = {self.theta}, got {search.theta_max}")
        if self.leakage_limit is not None:
            check_real("leakage_limit", self.leakage_limit, "[0, 1]")
        if self.leakage_limit is not None and not self.data_dependent:
            raise ValueError("leakage_limit is for methods that search theta, isotropic and ancer")
        penalty = max(self.isotropic.leakage_weight, self.anisotropic.leakage_weight)
        if self.leakage is None and (penalty > 0 or self.leakage_limit is not None):
            raise ValueError("a leakage weight or limit needs leakage to be measured, got leakage = None")

    @property
    def certificate(self) -> Certificate:
        """The noise law of searches and of random draws."""
        return noise_law(self.norm, self.noise)

    @property
    def counted(self) -> Certificate:
        """The noise law of the draws that certify."""
        return noise_law(self.norm, self.noise, exact=self.exact)

    @property
    def data_dependent(self) -> bool:
        """Whether every input has a theta of its own."""
        return self.method in ("isotropic", "ancer")

    def settings(self) -> dict[str, Any]:
        """What is hashed into the run: the settings that the method uses."""
        stages = {"shared": (), "fixed": ("theta",), "isotropic": ("theta", "isotropic")}
        stages["ancer"] = (*stages["isotropic"], "anisotropic")
        used = ["norm", "method", "certify", *stages[self.method], "seed"]
        used += ["noise", "exact"] if self.noise == "splitting" else []
        used += ["period"] if self.exact and self.method in ("shared", "ancer") else []
        used += ["sampling"] if self.sampling is not None else []
        used += ["guard"] if self.method == "ancer" else []
        used += ["guard_samples"] if self.method == "ancer" or self.leakage_limit is not None else []
        used += ["leakage", "leakage_limit"] if self.data_dependent else []
        values = dataclasses.asdict(self)
        return {name: values[name] for name in used}


@dataclasses.dataclass(frozen=True)
class Execution:
    """Settings that change speed and memory only: for a given theta no draw, no count.

    Attributes:
      batch_size: images at a time (rounded up to a multiple of the devices, if these split the images). None: 32 for
        each device, 10 for each CPU, or fewer if their memory is too small.
      chunk: noisy copies of each image at a time in certification, on each device. None: 128, on CPUs 100, or fewer.
      devices: how many local devices; None is all of them.
      split: what the devices share: "images", for throughput, or the "draws" of one image after another, where images
        are fewer than devices. Votes are shared out evenly in any case; this is for searches and leakage. Several CPU
        devices cannot share draws: they would have to wait for each other (`parallel.refuse_collectives`).
    """

    batch_size: int | None = None
    chunk: int | None = None
    devices: int | None = None
    split: Split = "images"

    def __post_init__(self):
        if self.split not in get_args(Split):
            raise ValueError(f"split must be images or draws, got {self.split!r}")
        for name in ("batch_size", "chunk", "devices"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name))
