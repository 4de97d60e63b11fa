"""Certificates, and the integers from which they follow."""

import dataclasses
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ancer_jax._checks import check_choice, check_integer, check_real
from ancer_jax._numerics import HostValues, Leaf, Values
from ancer_jax.regions.region import Region
from ancer_jax.smoothing import bounds
from ancer_jax.smoothing.noise import Noise
from ancer_jax.smoothing.smoothed import Smoothed

ABSTAIN = -1
Bound = Literal["two-class", "separate"]
_One = TypeVar("_One", bound="WithRegion")


@dataclasses.dataclass(frozen=True)
class CertifyConfig:
    """Settings that change a certificate (defaults: Cohen et al. 2019).

    Attributes:
      n0: draws that select the class.
      n: fresh draws that estimate its probability; at most 2^31 - 1.
      alpha: probability that a certificate fails, for each input; in [1e-200, 1), with separate bounds in [2e-200, 1).
      bound: of the probabilities of the other classes. "two-class": what `p_lower` leaves, so that a certificate needs
        more than half of the votes. "separate": an upper bound from the votes for the second class
        (`bounds.separate_bounds`); each of the two bounds has half of alpha. For many classes.

    Raises:
      ValueError: if a setting is out of range.
    """

    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001
    bound: Bound = "two-class"

    def __post_init__(self):
        check_choice("bound", self.bound, Bound)
        for name in ("n0", "n"):
            check_integer(name, getattr(self, name), 1, 2**31 - 1)
            object.__setattr__(self, name, int(getattr(self, name)))
        least = bounds.LEAST_ALPHA if self.bound == "two-class" else 2 * bounds.LEAST_ALPHA
        check_real("alpha", self.alpha, f"[{least}, 1)")
        object.__setattr__(self, "alpha", float(self.alpha))

    @property
    def alpha_of_bound(self) -> float:
        """Probability of error of each bound: alpha or, of two bounds, exactly half of it."""
        return self.alpha if self.bound == "two-class" else self.alpha / 2


class WithRegion:
    """Mixin: the sizes [...] of `region`, and indexing into a batch."""

    region: Region

    @property
    def gap(self) -> Leaf:
        """Size of the region in units of theta [...]."""
        return self.region.gap

    @property
    def radius(self) -> Values:
        """Certified radius [...]: of the largest ball inside the region."""
        return self.region.radius

    @property
    def proxy_radius(self) -> Values:
        """Radius [...] of the ball with the region's volume."""
        return self.region.proxy_radius

    @property
    def log_volume(self) -> Values:
        """Natural logarithm of the region's volume [...]."""
        return self.region.log_volume

    def __len__(self) -> int:
        return len(np.asarray(self.region.gap))

    def __getitem__(self: _One, index: Any) -> _One:
        """One of a batch, or some of them."""
        return jax.tree.map(lambda values: values[index], self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Certificate(WithRegion):
    """What was certified of one input, or of many (leading axes `...`); on the host, rounded towards zero.

    Attributes:
      prediction: int [...], the class, or `ABSTAIN` (-1).
      region: where the smoothed classifier gives this class; of gap 0 where it abstains.
      p_lower: float64 [...], lower bound of the selected class's probability.
      count: int [...], how many of the n draws voted for the selected class.
      n: int [...], number of draws. (Of sequential sampling, count and n are of all draws, and `p_lower` is that of
        the look with the largest gap.)
      alpha: float64 [...]: the certificate fails with at most this probability; 0 if all draws that exist were counted.
    """

    prediction: Leaf
    region: Region
    p_lower: Leaf
    count: Leaf
    n: Leaf
    alpha: Leaf


class Evidence(NamedTuple):
    """The counts, and the alpha of the bound, from which a certificate follows, [...] each. A run stores them to check
    its gaps.

    Attributes:
      votes, n: votes for the class, and number of draws, that give the bound: all n draws or, of sequential sampling,
        those of the look with the largest bound.
      alpha: error probability of that bound and, with separate bounds, of the other one, too; 0 for enumerable noise.
      runner_up: votes for the second class, of enumerable noise and with separate bounds (`votes_of`); with the
        two-class bound `n - votes`, the most that it can have.
    """

    votes: HostValues
    n: HostValues
    alpha: HostValues
    runner_up: HostValues

    def bound_and_gap(self, noise: Noise) -> tuple[HostValues, HostValues]:
        """`p_lower` and gap, float64 [...]."""
        if noise.enumerable:
            return self.votes / self.n, np.asarray(noise.exact_gap(self.votes, self.runner_up, self.n))
        if (self.runner_up == self.n - self.votes).all():  # the second bound of `separate_bounds` would change nothing
            p_lower = bounds.clopper_pearson_lower(self.votes, self.n, self.alpha)
            return p_lower, np.asarray(noise.gap(p_lower))
        p_lower, p_b_upper = bounds.separate_bounds(self.votes, self.runner_up, self.n, self.alpha)
        return p_lower, np.asarray(noise.gap(p_lower, p_b_upper))


def votes_of(counts: Any, selected: Any, num_draws: Any, bound: Bound) -> tuple[Any, Any]:
    """Votes for the classes `selected` and for the runner-up, integers [...] each; traced if the counts are.

    The runner-up is the other class with most votes; draws without a vote (NaN logits) count as if they were for it.
    With the two-class bound all draws that are not for `selected` do.

    Args:
      counts: integers [..., K], votes of random draws for each class.
      selected: integers [...].
      num_draws: integers [...], how many draws these are.
      bound: as in `CertifyConfig`.
    """
    xnp: Any = jnp if isinstance(counts, jax.Array) else np
    at = xnp.asarray(selected)[..., None]
    votes = xnp.take_along_axis(counts, at, axis=-1)[..., 0]
    if bound == "two-class":
        return votes, num_draws - votes
    others = xnp.where(xnp.arange(counts.shape[-1]) == at, 0, counts)
    return votes, others.max(axis=-1) + (num_draws - counts.sum(axis=-1))


def random_evidence(votes: ArrayLike, config: CertifyConfig, runner_up: ArrayLike | None = None) -> Evidence:
    """The evidence of votes [...] among `config.n` random draws.

    `runner_up` may be left out with the two-class bound: every other vote counts as one for the runner-up.
    """
    votes = np.asarray(votes)
    n, alpha = np.full(votes.shape, config.n), np.full(votes.shape, config.alpha_of_bound)
    return Evidence(votes, n, alpha, n - votes if runner_up is None else np.asarray(runner_up))


def enumerated_evidence(counts: ArrayLike, num_draws: ArrayLike) -> tuple[HostValues, Evidence]:
    """The top class (of a tie, the lowest) and its evidence, from the votes of all draws that exist.

    `counts`, integers [..., K], has the votes for each class; `num_draws` [...] is how many draws there are.
    """
    counts, num_draws = np.asarray(counts), np.asarray(num_draws)
    second, top = np.moveaxis(np.partition(counts, -2, axis=-1)[..., -2:], -1, 0)
    return counts.argmax(axis=-1), Evidence(top, num_draws, np.zeros(num_draws.shape), second)


def certificate_from_evidence(
    selected: ArrayLike, evidence: Evidence, smoothed: Smoothed, x: ArrayLike, *, alpha: float
) -> Certificate:
    """The certificates of the classes `selected` [...] for the inputs x [..., *d], in float64 on the host.

    theta may be [], [*d], [...] or [..., *d]; `alpha` is that of each certificate.

    Guarantee: as in `certify`, if the evidence comes from draws that did not choose `selected`. Of enumerable noise it
      holds without alpha, for the inputs that the noise speaks of (`Noise.check_inputs`).
    """
    p_lower, gap = evidence.bound_and_gap(smoothed.noise)
    x = np.asarray(x)
    theta = theta_of_each(smoothed.theta, gap.shape, x.shape[gap.ndim :])
    prediction = np.where(gap > 0, np.asarray(selected), ABSTAIN)
    columns = (p_lower, evidence.votes, evidence.n, np.full(gap.shape, alpha))
    return Certificate(
        prediction[()], smoothed.noise.region(x, theta, gap[()]), *(np.asarray(column)[()] for column in columns)
    )


def theta_of_each(theta: ArrayLike, batch: tuple[int, ...], shape: tuple[int, ...]) -> HostValues:
    """theta [...] or [..., *d], of each input of a batch [...]. One of [] or [*d], an input's shape, is for all.

    ValueError for any other shape.
    """
    theta = np.asarray(theta)
    if batch and theta.shape == batch == shape:
        shapes = f"{list(shape)} may be one map or a number for each input: give it shape {[*batch, *shape]}"
        raise ValueError(f"theta of shape {shapes}")
    if theta.shape in ((), shape):
        return np.broadcast_to(theta, batch + theta.shape)
    if theta.shape not in (batch, batch + shape):
        allowed = f"a scalar or have x's shape {list(shape)}"
        allowed += f", or be one for each of {np.prod(batch)} inputs" * bool(batch)
        raise ValueError(f"theta must be {allowed}, got {list(theta.shape)}")
    return theta
