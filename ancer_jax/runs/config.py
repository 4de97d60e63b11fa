"""What to compute, which changes results, and how, which does not."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from ancer_jax._checks import check_choice, check_integer, check_real
from ancer_jax.basis import Basis, Pixels, check_basis, read_basis
from ancer_jax.search.config import (
    THETA_MAX_FACTOR,
    AnisotropicConfig,
    Guard,
    GuardConfig,
    IsotropicConfig,
    LeakageConfig,
)
from ancer_jax.smoothing import bounds
from ancer_jax.smoothing.certificate import CertifyConfig
from ancer_jax.smoothing.noise import Gaussian, Noise, Uniform
from ancer_jax.smoothing.registry import DEFAULT_NOISE, make_noise
from ancer_jax.smoothing.sequential import SequentialConfig, check_divisible
from ancer_jax.smoothing.splitting import Splitting

Norm = Literal["l2", "l1"]
Method = Literal["fixed", "universal", "isotropic", "ancer"]
Precision = Literal["default", "high", "highest"]
Shard = Literal["images", "draws"]
# Settings that are configs of their own.
_PARTS: dict[str, Callable[..., Any]] = {
    "certify": CertifyConfig,
    "sampling": SequentialConfig,
    "isotropic": IsotropicConfig,
    "anisotropic": AnisotropicConfig,
    "leakage": LeakageConfig,
    "basis": lambda **description: read_basis(description),
}


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that changes the results of a run (semantic settings).

    Attributes:
      norm: "l2" (Gaussian noise) or "l1".
      method: "fixed" theta; "universal": one theta per coordinate, the same for all inputs, which `certify_dataset` is
        given; "isotropic" theta per input; or "ancer": isotropic, then one theta per coordinate and input.
      theta: the fixed noise parameter, or where the search starts: standard deviation (l2) or half-width (l1).
      sampling: when drawing stops before `certify.n`; None is never.
      certify, isotropic, anisotropic: settings of the stages. `theta_max=None` means 4 times `theta` in both searches.
      guard, guard_samples: the guarded choice between isotropic and anisotropic theta (`guarded_choice`).
      leakage: how the leakage of data-dependent noise is measured; None is not at all.
      leakage_limit: with a limit, a theta that leaks more is rejected: the anisotropic one in favour of the isotropic
        one, and that in favour of `theta`.
      seed: seed of all draws, in [0, 2^31).
      noise: for l1 "splitting"; None is the usual one of the norm.
      exact: count all draws there are of splitting noise instead of `certify.n` random ones (`Splitting`). Theta is
        rounded down to a value that allows it, after guard and leakage limit, and certificates hold without alpha.
      basis: orthonormal basis of the coefficients that theta belongs to, and in which the noise is independent
        (`ancer_jax.basis`); other than the pixels for l2 only.
      period: with exact and one theta per coordinate, the largest number of those draws.
      precision: of the network's matrix products, on accelerators (`jax.default_matmul_precision`): "default" is what
        JAX is set to, where float32 is TF32 on recent GPUs and bfloat16 on TPUs; "highest" is float32. Another
        precision makes another base classifier.
      memory: whether data-dependent certificates go through a memory at the end, in order of ids. It may be added to a
        finished run, and is not among `settings`.

    Raises:
      ValueError: if a setting is out of range.
    """

    norm: Norm = "l2"
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
    noise: str | None = None
    exact: bool = False
    basis: Basis = Pixels()
    period: int = 5040
    precision: Precision = "default"
    memory: bool = True

    def __post_init__(self):
        check_choice("norm", self.norm, Norm)
        check_choice("method", self.method, Method)
        check_choice("guard", self.guard, Guard)
        check_choice("precision", self.precision, Precision)
        check_basis(self.basis)
        make_noise(self.norm, self.noise, basis=self.basis)
        if self.noise == DEFAULT_NOISE[self.norm]:
            object.__setattr__(self, "noise", None)
        if self.exact and self.noise != "splitting":
            raise ValueError("exact certificates are for splitting noise: norm l1, noise splitting")
        check_integer("period", self.period, 1, 2**14)
        check_real("theta", self.theta, "[-inf, inf]")
        if not float(np.finfo(np.float32).tiny) <= self.theta <= float(np.finfo(np.float32).max):
            raise ValueError(f"theta must be positive and finite as float32, got {self.theta}")
        if self.enumerable and self.certify.bound != "two-class":
            raise ValueError("exact certificates count the second class in any case: no separate bounds")
        if self.sampling is not None:
            if self.enumerable:
                raise ValueError("exact certificates take all draws: no sequential sampling")
            check_divisible(self.certify)
        check_integer("seed", self.seed, 0, 2**31 - 1)
        check_integer("guard_samples", self.guard_samples, 1, bounds.MOST_TRACED_TRIALS)
        for name in ("isotropic", "anisotropic"):
            search = getattr(self, name)
            if search.theta_max is None:
                search = dataclasses.replace(search, theta_max=THETA_MAX_FACTOR * self.theta)
                object.__setattr__(self, name, search)
            if search.theta_max < self.theta and self.method != "universal":
                raise ValueError(f"theta_max must be at least theta = {self.theta}, got {search.theta_max}")
        if self.leakage_limit is not None:
            check_real("leakage_limit", self.leakage_limit, "[0, 1]")
            if not self.data_dependent:
                raise ValueError("leakage_limit is for methods that search for theta, isotropic and ancer")
        penalty = max(self.isotropic.leakage_weight, self.anisotropic.leakage_weight)
        if self.leakage is None and (penalty > 0 or self.leakage_limit is not None):
            raise ValueError("a leakage weight or limit needs leakage to be measured, got leakage = None")

    @property
    def certified_noise(self) -> Noise:
        """The noise law of the draws that certify; `for_search` of it is that of searches and leakage."""
        return make_noise(self.norm, self.noise, basis=self.basis, **self._form)

    @property
    def _form(self) -> dict[str, Any]:
        """Attributes of the noise law that this config names."""
        return {"exact": True, "period": self.period} if self.exact else {}

    @property
    def enumerable(self) -> bool:
        """Whether the noise that certifies has finitely many draws, all of which are counted."""
        return self.certified_noise.enumerable

    @property
    def alpha(self) -> float:
        """The probability that a certificate fails; 0 where all draws get counted."""
        return 0.0 if self.enumerable else self.certify.alpha

    @property
    def data_dependent(self) -> bool:
        """Whether every input has a theta of its own."""
        return self.method in ("isotropic", "ancer")

    @property
    def searches(self) -> dict[str, IsotropicConfig | AnisotropicConfig]:
        """The searches of the method, in their order."""
        names = {"isotropic": ("isotropic",), "ancer": ("isotropic", "anisotropic")}.get(self.method, ())
        return {name: getattr(self, name) for name in names}

    @property
    def theta_bound(self) -> float:
        """Upper bound of the last search, as a float32; infinite without a search.

        Coordinates of theta at or above it count as at the limit: a search that starts above `theta_max` stays there.
        """
        if not self.data_dependent:
            return np.inf
        *_, last = self.searches.values()
        bound = np.full((1,) if self.method == "ancer" else (), last.theta_max, np.float32)
        return float(np.asarray(self.certified_noise.admissible(bound)).max())

    def guard_config(self, *, anisotropic: bool, chunk: int) -> GuardConfig:
        """Settings of the choice between isotropic and anisotropic theta, by `guard`, or between start and isotropic
        theta, by the leakage limit alone. It compares two-class bounds, whatever the bound of the certificates.
        """
        criterion = self.guard if anisotropic else "off"
        # No guarantee depends on this alpha, and the traced bound needs 1e-9 at least.
        alpha = max(self.certify.alpha, bounds.LEAST_TRACED_ALPHA)
        return GuardConfig(criterion, self.guard_samples, alpha, self.leakage_limit, chunk)

    def settings(self) -> dict[str, Any]:
        """The settings that the method uses, as JSON values: the part of this config in the settings of a run."""
        used = ["norm", "method", "certify", "seed", *self.searches]
        used += ["theta"] if self.method != "universal" else []
        used += [] if self.noise is None else ["noise", "exact"]
        used += ["basis"] if self.basis != Pixels() else []
        used += ["period"] if self.exact and self.method in ("universal", "ancer") else []
        used += ["sampling"] if self.sampling is not None else []
        used += ["guard"] if self.method == "ancer" else []
        used += ["guard_samples"] if self.method == "ancer" or self.leakage_limit is not None else []
        used += ["leakage", "leakage_limit"] if self.data_dependent else []
        values, law = dataclasses.asdict(self) | {"basis": self.basis.describe()}, self.certified_noise
        if self.certify.bound == "two-class":
            del values["certify"]["bound"]  # settings that do not name it mean this one
        built_in = (Gaussian(self.basis), Uniform(), Splitting(**self._form))
        return {name: values[name] for name in used} | ({} if law in built_in else {"noise_law": repr(law)})

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "RunConfig":
        """The config that has these `settings`; those that its method does not use have their defaults.

        What a run adds to them (data, device, the precision that JAX was set to, ...) is ignored.

        Raises:
          ValueError: if these are not the settings of a run.
        """
        fields = {field.name for field in dataclasses.fields(cls)} - {"memory", "precision"}
        values = {name: value for name, value in settings.items() if name in fields}
        try:
            for name, part in _PARTS.items():
                if values.get(name) is not None:
                    given = {k: tuple(v) if isinstance(v, list) else v for k, v in values[name].items()}
                    values[name] = part(**given)
            return cls(**values)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not the settings of a run: {error}") from None


@dataclasses.dataclass(frozen=True)
class Execution:
    """Settings of speed and memory. They change no draw and, for a given theta, on CPUs no count; on accelerators, with
    kernels for each shape, a vote between logits that tie up to rounding may move. A search rounds differently, so that
    the thetas it finds can differ by a few percent.

    Attributes:
      batch_size: images at a time (rounded up to a multiple of the devices, if these shard the images). None: 32 for
        each device, 10 for each CPU, or fewer if their memory is too small.
      chunk: noisy copies of each image at a time in certification, on each device. None: on CPUs 100; else
        4,096 divided by the images of a batch on each device, 128 for 32 images; or fewer.
      devices: how many local devices; None is all of them.
      shard: what the devices share in searches and leakage: "images", for throughput, or the "draws" of one image after
        another, where images are fewer than devices. Votes are always spread evenly. Several CPU devices cannot share
        draws: they would have to wait for each other (`devices.refuse_collectives`).
      progress: called with ("certified", number of images that were finished), at first those of earlier calls, and
        with ("remembered", number of images that went through the memory since the last call).

    Raises:
      ValueError: if a setting is out of range.
    """

    batch_size: int | None = None
    chunk: int | None = None
    devices: int | None = None
    shard: Shard = "images"
    progress: Callable[[str, int], object] = dataclasses.field(default=lambda stage, images: None, compare=False)

    def __post_init__(self):
        check_choice("shard", self.shard, Shard)
        for name in ("batch_size", "chunk", "devices"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name))
