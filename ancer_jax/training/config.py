"""The settings of training, and the training methods: their losses and their published settings."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from ancer_jax._checks import check_choice, check_integer, check_real
from ancer_jax._numerics import geometric_mean
from ancer_jax.basis import Basis, Cosine, Pixels
from ancer_jax.search.theta_map import ThetaMap
from ancer_jax.smoothing.noise import AdditiveNoise, Noise
from ancer_jax.smoothing.registry import make_noise
from ancer_jax.training import losses

TrainingMethod = Literal["augmentation", "smoothadv", "macer", "consistency", "stability", "volume"]
Schedule = Literal["drops", "cosine", "onecycle"]
Optimizer = Literal["sgd", "muon"]
Flip = Literal["random", "alternating", "none"]
FrontName = Literal["none", "wiener"]
_WITHOUT = (("theta_map", None), ("front", "none"))
# Settings that belong to some methods only, and may be positive in no other.
_OF_METHODS = ("weight", "epsilon", "attack_steps", "warmup_epochs")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a network is trained. `PRESETS` has the published settings of each method; the defaults are of no method.

    Attributes:
      method: the training method, see `METHODS`.
      norm, theta: "l2" (Gaussian noise) or "l1", and the noise parameter in units of [0, 1] pixels.
      theta_map: instead, one theta for each coefficient of a basis; `theta` is its geometric mean then, with which
        MACER and volume training weigh their estimates of the gap.
      noise: for l1 "uniform" or "splitting" (Levine & Feizi 2021); None is the default noise of the norm.
      epochs, batch_size: passes over the training set, and images per batch, not counting noisy copies. An epoch leaves
        out the images that fill no batch, others each time.
      copies: noisy copies of each image (m).
      optimizer: "sgd", or "muon": Muon for the kernels of convolutions and hidden dense layers, SGD for all others.
      learning_rate: of SGD, where the schedule starts ("onecycle": its peak).
      muon_learning_rate: the same of Muon; "sgd" does not use it. Networks with batch norm take more, such as 0.15.
      momentum: of both optimizers.
      nesterov: whether SGD's momentum is Nesterov's; Muon's always is.
      weight_decay: of all parameters. SGD adds `weight_decay * w` to the gradient of w. Muon shrinks its kernels
        directly, by the share `learning_rate * weight_decay / (1 - momentum)` in each step: SGD's learning rate, and as
        much as SGD would shrink them in the long run.
      schedule: "drops" divides the learning rates by 10 every `drop_every` epochs; "cosine" lets them fall to 0 along
        half a cosine; "onecycle" lets them rise from 1/25 of their peak in the first 30 % of the steps, and then fall
        nearly to 0, both along half a cosine.
      drop_every: of "drops"; 0 with other schedules.
      weight: of the second term of the loss (MACER, consistency, stability, volume).
      epsilon, attack_steps, warmup_epochs: radius of SmoothAdv's l2 ball, steps of its attack, and epochs in which the
        radius grows to epsilon (0 or 1: it is epsilon from the start). Settings that a method does not use are 0.
      shift: largest random shift of an image in pixels; 0 turns shifts off.
      flip: "random" mirrors half of the images, drawn anew in each epoch; "alternating" draws them for the first epoch,
        mirrors the other half in the second, and so on in turn (Jordan 2024, arXiv 2404.00498); "none" mirrors none.
      front: "wiener" puts a fixed linear filter in front of the network, Wiener's for the training images and Gaussian
        noise (`models.front`), in the basis of the theta map, or in the cosine basis where there is none.
      seed: of initial parameters, order of the images, noise and augmentation.

    Raises:
      ValueError: if a setting is out of range.
    """

    method: TrainingMethod = "augmentation"
    norm: Literal["l2", "l1"] = "l2"
    theta: float = 0.25
    epochs: int = 90
    batch_size: int = 256
    copies: int = 1
    optimizer: Optimizer = "sgd"
    learning_rate: float = 0.1
    muon_learning_rate: float = 0.05
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    schedule: Schedule = "cosine"
    drop_every: int = 0
    weight: float = 0.0
    epsilon: float = 0.0
    attack_steps: int = 0
    warmup_epochs: int = 0
    shift: int = 4
    flip: Flip = "random"
    seed: int = 0
    noise: str | None = None
    theta_map: ThetaMap | None = None
    front: FrontName = "none"

    def __post_init__(self):
        if self.theta_map is not None:
            object.__setattr__(self, "theta", float(f"{geometric_mean(self.theta_map.theta):.6g}"))
        check_choice("method", self.method, TrainingMethod)
        check_choice("norm", self.norm, Literal["l2", "l1"])
        check_choice("optimizer", self.optimizer, Optimizer)
        check_choice("schedule", self.schedule, Schedule)
        check_choice("flip", self.flip, Flip)
        check_choice("front", self.front, FrontName)
        for name in ("epochs", "batch_size", "copies"):
            check_integer(name, getattr(self, name))
        for name in ("drop_every", "attack_steps", "warmup_epochs", "shift"):
            check_integer(name, getattr(self, name), 0)
        check_integer("seed", self.seed, 0, 2**31 - 1)
        for name in ("theta", "learning_rate", "muon_learning_rate"):
            check_real(name, getattr(self, name), "(0, inf)")
        check_real("momentum", self.momentum, "[0, 1)")
        for name in ("weight_decay", "weight", "epsilon"):
            check_real(name, getattr(self, name), "[0, inf)")
        if self.schedule == "drops" and self.drop_every == 0:
            raise ValueError("the schedule drops needs a positive drop_every")
        if self.schedule != "drops" and self.drop_every > 0:
            raise ValueError(f"the schedule {self.schedule} has no drop_every, got {self.drop_every}")
        used = METHODS[self.method].settings
        for name in _OF_METHODS:
            if name in used and getattr(self, name) == 0 and name != "warmup_epochs":
                raise ValueError(f"{self.method} training needs a positive {name}")
            if name not in used and getattr(self, name) > 0:
                raise ValueError(f"{self.method} training has no {name}, got {getattr(self, name)}")
        if self.method in ("consistency", "stability") and self.copies < 2:
            raise ValueError(f"{self.method} training compares noisy copies: at least 2, got copies = {self.copies}")
        if self.method == "macer" and self.norm != "l2":
            raise ValueError("macer maximises the l2 radius of Gaussian noise: norm must be l2")
        additive = isinstance(self.noise_law, AdditiveNoise)  # also refuses noise that does not fit the norm
        if self.method == "smoothadv" and not additive:
            raise ValueError(f"smoothadv attacks through noise that is added, not through {self.noise} noise")
        if self.front == "wiener" and self.norm != "l2":
            raise ValueError("the front wiener is a filter for Gaussian noise: norm must be l2")
        if self.front_basis == Pixels():
            raise ValueError("the front wiener needs a theta map in another basis than the pixels, or none")

    @property
    def noise_law(self) -> Noise:
        """The noise that the network is trained with."""
        return make_noise(self.norm, self.noise, basis=Pixels() if self.theta_map is None else self.theta_map.basis)

    @property
    def front_basis(self) -> Basis | None:
        """The basis of the filter in front of the network; None without one."""
        if self.front == "none":
            return None
        return Cosine() if self.theta_map is None else self.theta_map.basis

    @property
    def thetas(self) -> np.ndarray:
        """The noise parameter, float32: [], or [*d] of a theta map."""
        return np.asarray(self.theta, np.float32) if self.theta_map is None else self.theta_map.theta

    def settings(self) -> dict[str, Any]:
        """The settings as JSON values, without a theta map or front where there is none."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {"theta_map": self.theta_map and repr(self.theta_map)}
        return {name: value for name, value in values.items() if (name, value) not in _WITHOUT}


class Method(NamedTuple):
    """A training method: the loss of one image, from the config, the logits of its noisy copies, and its label; the
    settings of `_OF_METHODS` that it uses; and its published settings for CIFAR-10, where `TrainConfig` differs.
    """

    loss: Callable[[TrainConfig, Float[Array, "m K"], Int[Array, ""]], Float[Array, ""]]
    settings: tuple[str, ...]
    published: Mapping[str, Any]


_COHEN = {"schedule": "drops", "drop_every": 30}

# The published codes differ from these settings in some details: RS4A's runs the network on each noisy copy by itself,
# so that batch statistics are those of one copy, and changes its learning rate once an epoch. RS4A also uses the
# settings of stability training for noise augmentation.
METHODS: dict[str, Method] = {
    # Cohen et al. 2019, code/train.py
    "augmentation": Method(lambda config, logits, label: losses.augmentation(logits, label), (), _COHEN),
    # Salman et al. 2019, code/train_pgd.py: noise augmentation of images that are attacked first
    "smoothadv": Method(
        lambda config, logits, label: losses.augmentation(logits, label),
        ("epsilon", "attack_steps", "warmup_epochs"),
        _COHEN | {"epsilon": 64 / 256, "attack_steps": 10, "warmup_epochs": 1},
    ),
    # Zhai et al. 2020, main.py: 440 epochs, with a tenth of the learning rate after 200 and 400
    "macer": Method(
        lambda config, logits, label: losses.macer(logits, label, config.theta, weight=config.weight),
        ("weight",),
        {"epochs": 440, "batch_size": 64, "copies": 16, "learning_rate": 0.01}
        | {"weight_decay": 5e-4, "schedule": "drops", "drop_every": 200, "weight": 12.0},
    ),
    # Jeong and Shin 2020, code/train_consistency.py: a batch of 256 consists of two noisy copies of 128 images
    "consistency": Method(
        lambda config, logits, label: losses.consistency(logits, label, weight=config.weight),
        ("weight",),
        {"epochs": 150, "batch_size": 128, "copies": 2, "schedule": "drops", "drop_every": 50, "weight": 10.0},
    ),
    # Yang et al. 2020, src/train.py
    "stability": Method(
        lambda config, logits, label: losses.stability(logits, label, weight=config.weight),
        ("weight",),
        {"epochs": 120, "batch_size": 64, "copies": 2, "nesterov": True, "schedule": "cosine", "weight": 6.0},
    ),
    # Ours: the schedule of Cohen et al., and as many noisy copies in a batch as they have
    "volume": Method(
        lambda config, logits, label: losses.volume(
            logits, label, config.theta, config.noise_law, weight=config.weight
        ),
        ("weight",),
        _COHEN | {"batch_size": 32, "copies": 8, "learning_rate": 0.02, "weight": 8.0},
    ),
}

PRESETS = {name: TrainConfig(**{"method": name, **method.published}) for name, method in METHODS.items()}
