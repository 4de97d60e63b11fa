"""Answers for tools that verify one input at a time: is the class the same everywhere within epsilon?"""

import dataclasses
import hashlib
import math
import time
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Key

from ancer_jax._checks import check_choice, check_real, check_type
from ancer_jax.basis import Pixels
from ancer_jax.regions import Region
from ancer_jax.smoothing.certificate import ABSTAIN, Certificate, CertifyConfig
from ancer_jax.smoothing.certify import certify
from ancer_jax.smoothing.smoothed import Smoothed, check_key, check_random

Channels = Literal["first", "last"]
Ball = Literal["linf", "l2", "l1"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """An answer, with the fields of VERONA's `CompleteVerificationData`.

    Attributes:
      result: "UNSAT": no input within epsilon gets another class than the label. "SAT": the input itself does.
        "TIMEOUT": neither is certified.
      took: seconds.
      obtained_labels: the class of the input, or `ABSTAIN`.
      counter_example, err, stdout: not used.
    """

    result: Literal["UNSAT", "SAT", "TIMEOUT"]
    took: float
    obtained_labels: list[int]
    counter_example: str | None = None
    err: str = ""
    stdout: str = ""


class Verifier:
    """A verification module for VERONA and tools like it: `verify(context, epsilon)`.

    It speaks of the smoothed classifier, whatever network the context names. An input is certified when it is first
    asked about; all answers about these same numbers, under whatever id, come from this one certificate.

    Guarantee: for each input, with probability at least `1 - alpha` over the draws, all its answers "UNSAT" and "SAT"
    are true. The input must not depend on the draws (`certify`).
    """

    def __init__(
        self,
        key: Key[Array, ""],
        smoothed: Smoothed,
        *,
        ball: Ball = "linf",
        config: CertifyConfig = CertifyConfig(),
        channels: Channels = "first",
    ):
        """A verifier without answers.

        Args:
          key: typed key; each input uses `fold_in(key, h)`, where h is a hash of its numbers.
          smoothed: smoothed classifier of one theta [] or [*d].
          ball: the norm in which epsilon is meant, in units of the input. The ball must lie inside the certified
            region: an l-infinity ball in d dimensions does only where epsilon is small, about `radius / sqrt(d)`.
          config: n0, n, alpha.
          channels: "first" if the tool's images are [channels, height, width].

        Raises:
          ValueError: if a setting is unknown or of a wrong type, or the noise is enumerable.
        """
        check_key(key)
        check_type("smoothed", smoothed, Smoothed, "Smoothed(classifier, noise, theta)")
        check_type("config", config, CertifyConfig, "CertifyConfig(n=...)")
        check_random(smoothed.noise)
        check_choice("ball", ball, Ball)
        check_choice("channels", channels, Channels)
        self.name = f"randomized smoothing, {ball}"
        self._key, self._smoothed, self._config = key, smoothed, config
        self._ball: Ball = ball
        self._channels: Channels = channels
        self._certificates: dict[bytes, Certificate] = {}

    def verify(self, context: Any, epsilon: float) -> Verdict:
        """Whether all inputs within epsilon of `context.data_point.data` get the class `context.data_point.label`.

        Args:
          context: has a `data_point` with `label` and `data`, an array or a PyTorch tensor [*d], or of an image also
            [1, channels, height, width].
          epsilon: radius of the ball.

        Raises:
          ValueError: as in `certify`; if epsilon is negative or not finite, or the label is no integer; if the
            context asks whether the class becomes a certain other one (VERONA's `One2OnePropertyGenerator`).
        """
        began, point = time.monotonic(), context.data_point
        check_real("epsilon", epsilon, "[0, inf)")
        if getattr(getattr(context, "property_generator", None), "target_class", None) is not None:
            raise ValueError("certificates are about all other classes, not about one target class")
        certificate, label = self._certificate(self._input(point.data)), int(point.label)
        if label != point.label:
            raise ValueError(f"label must be an integer, got {point.label}")
        prediction = int(certificate.prediction)
        result = "TIMEOUT"
        if prediction not in (ABSTAIN, label):
            result = "SAT"
        elif prediction == label and contains_ball(certificate.region, float(epsilon), self._ball):
            result = "UNSAT"
        return Verdict(result, time.monotonic() - began, [prediction])

    def _input(self, data: Any) -> np.ndarray:
        """The input as it is certified, in float64."""
        if hasattr(data, "detach"):  # a tensor
            data = data.detach().cpu().double() if data.is_floating_point() else data.detach().cpu()
        x = np.asarray(data)
        if not np.issubdtype(x.dtype, np.floating):
            raise ValueError(f"data must be floating point, in the units of theta, got {x.dtype}")
        x = x.astype(np.float64) + 0.0  # equal numbers, of whatever type and sign of zero, are one input
        x = x[0] if x.ndim == 4 and len(x) == 1 else x
        return np.moveaxis(x, 0, -1) if self._channels == "first" and x.ndim == 3 else x

    def _certificate(self, x: np.ndarray) -> Certificate:
        name = hashlib.sha256(repr(x.shape).encode() + x.tobytes()).digest()
        if name not in self._certificates:
            key = jax.random.fold_in(self._key, np.frombuffer(name[:4], np.uint32)[0])
            self._certificates[name] = certify(key, self._smoothed, x, config=self._config)
        return self._certificates[name]


def contains_ball(region: Region, epsilon: float, ball: Ball) -> bool:
    """Whether a region contains the ball of radius epsilon around its center; in doubt it does not.

    Arguments are as in `Verifier`; the region is one, not a batch.
    """
    check_choice("ball", ball, Ball)
    theta = np.broadcast_to(np.asarray(region.theta, np.float64), np.shape(region.center))
    dimensions, gap = theta.size, float(np.asarray(region.gap))
    if ball == "linf" and region.basis == Pixels():
        farthest = epsilon * np.linalg.norm(1 / theta.ravel(), ord=region.norm)
    else:  # norm_p(v) <= d^(1/p - 1/q) norm_q(v) for p <= q
        power = max(0.0, 1 / region.norm - {"linf": 0.0, "l2": 0.5, "l1": 1.0}[ball])
        farthest = epsilon * dimensions**power / theta.min()
    rounding = 1e-6 + float(region.basis.rounding(theta.shape, np.float64)) * math.sqrt(dimensions)
    return bool(gap > 0 and epsilon >= 0 and theta.min() > 0 and farthest * (1 + rounding) <= gap)
