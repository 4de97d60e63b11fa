"""What several test modules share: small classifiers and data sets, settings of short runs, a toy enumerable noise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ancer_jax import (
    AnisotropicConfig,
    CertifyConfig,
    Execution,
    IsotropicConfig,
    LeakageConfig,
    RunConfig,
    certify_dataset,
    from_function,
)
from ancer_jax.data import Dataset
from ancer_jax.runs.directory import read_run
from ancer_jax.smoothing.noise import Noise, Uniform
from tests import reference

KEY = jax.random.key(0, impl="threefry2x32")

# Five images of 3 x 3 pixels, a linear classifier, and searches of a few steps.
D = 9
DATASET = Dataset(
    "points",
    np.array([3, 5, 8, 13, 21]),
    np.random.default_rng(0).uniform(0, 1, (5, 3, 3, 1)).astype(np.float32),
    np.array([0, 1, 1, 0, 1]),
    2,
)
CLASSIFIER = reference.linear(np.linspace(-1, 1.5, D), b=-1.0)
SEARCH = {
    "isotropic": IsotropicConfig(steps=5, num_samples=10),
    "anisotropic": AnisotropicConfig(steps=5, num_samples=10),
}
CONFIG = RunConfig(method="fixed", theta=0.3, certify=CertifyConfig(n0=20, n=500), **SEARCH)


def run(path, config=CONFIG, dataset=DATASET, **execution):
    """Certify the data set and return what was stored of each image, in the order of their ids."""
    certify_dataset(CLASSIFIER, dataset, config, out=path, execution=Execution(**execution))
    shards = list(read_run(path).shards())
    rows = {
        name: np.concatenate([s[name] for s in shards]) for name in ("ids", "predictions", "counts", "gap", "theta")
    }
    order = np.argsort(rows["ids"])
    return {name: column[order] for name, column in rows.items()}


def bumps(variables, x):
    """Class 1 in a ball around one point, 0 elsewhere: with noise of its own, every input gets another border."""
    distance = jnp.sqrt(((x - variables) ** 2).sum(axis=(1, 2, 3)))
    return 20 * jnp.stack([distance - 0.6, 0.6 - distance], axis=-1)


# Regions that meet: with a search this bold, the memory changes some answers.
BUMPS = from_function(bumps, np.full((3, 3, 1), 0.5, np.float32), num_classes=2)
CROWD = Dataset(
    "crowd",
    np.arange(12),
    np.clip(np.random.default_rng(1).normal(0.5, 0.2, (12, 3, 3, 1)), 0, 1).astype(np.float32),
    np.zeros(12, int),
    2,
)
WILD = RunConfig(
    method="isotropic",
    theta=0.1,
    certify=CertifyConfig(n0=20, n=200),
    isotropic=IsotropicConfig.published(steps=40, num_samples=20, theta_max=20.0),
    leakage=LeakageConfig(num_probes=8, num_samples=8),
)


def tables(path):
    """The text of the tables before and after memory."""
    return [(path / name).read_text() for name in ("results_before_memory.tsv", "results.tsv")]


def untimed(text):
    """The cells of a table without the column of seconds."""
    return [line.split("\t")[:5] + line.split("\t")[6:] for line in text.splitlines()]


def coin(variables, x):
    """Class 1 or 0 with probability 1/2 each under noise, whatever x is."""
    side = jnp.floor(50 * x.reshape(len(x), -1)[:, 0]) % 2
    return jnp.stack([variables - side, side - variables], axis=1)


def product(variables, x):
    """A linear classifier that is nothing but a matrix product."""
    return x.reshape(len(x), -1) @ variables


@dataclasses.dataclass(frozen=True)
class Coins(Noise):
    """A toy noise of finitely many draws: a noisy copy says only in which part of the line `u = sum x / theta` lies.

    Draw i of `N = num_draws(theta)` cuts the line at `2 (k + (i + 1/2) / N)` for all whole k. The copy is an image of
    one gray value, the one whose u is the middle of the part that holds the u of x.

    Why `exact_gap` is right: let y be at distance `r = sum |x - y| / theta` of x, so that their u differ by r at most,
    and let float32 change each u by e at most. The cuts of all draws together are `2 / N` apart. Fewer than
    `(r + 2 e) N / 2 + 1` of them lie between the two computed u, and only their draws give x and y different copies.
    Each such draw takes at most one vote from the top class and gives at most one to another class. The top class of x
    is therefore still ahead at y if `top - second >= (r + 2 e) N + 2`, which holds for `r <= (top - second - 3) / N`
    as long as `2 e N <= 1`. With at most 64 pixels in [0, 1] (`check_inputs`) and theta of at least 1/8 (`admissible`),
    u is at most 512, the rounding of its sum e < 1/256, and N at most 64.

    Attributes:
      per_unit: `N / max theta`; a whole number. Inputs with another theta have another number of draws.
    """

    per_unit: int = 64

    norm = 1

    def perturb(self, key, draw, x, theta):
        """Copy number `draw`, which needs no key."""
        x, theta = x.astype(jnp.float32), theta.astype(jnp.float32)
        start = (draw + 0.5) / jnp.rint(self.per_unit * theta.max())
        part = jnp.floor(jnp.sum(x / theta) / 2 - start)
        return jnp.full_like(x, 2 * (part + start + 0.5) / jnp.sum(1 / theta))

    def gap(self, p_lower, p_b_upper=None):
        """That of uniform noise: only `exact_gap` certifies."""
        return Uniform().gap(p_lower, p_b_upper)

    def proxy_gap(self, probs):
        """That of uniform noise."""
        return Uniform().proxy_gap(probs)

    def num_draws(self, theta) -> int:
        """`per_unit` times the largest theta, which `admissible` makes a whole number."""
        return round(self.per_unit * float(np.max(theta)))

    def exact_gap(self, votes_top, votes_second, num_draws):
        """`(top - second - 3) / num_draws`, at least 0."""
        top, second, draws = (np.asarray(value, np.int64) for value in (votes_top, votes_second, num_draws))
        return np.maximum(top - second - 3, 0) / draws.astype(np.float64)

    def admissible(self, theta):
        """theta rounded down to a multiple of `1 / per_unit`, at least 8 and at most 64 of them."""
        steps = jnp.floor(self.per_unit * jnp.asarray(theta, jnp.float32) + 1e-3)
        return jnp.clip(steps, 8, 64) / self.per_unit

    @property
    def for_search(self) -> Noise:
        """Uniform noise, which has a derivative in theta."""
        return Uniform()

    def check_inputs(self, inputs, ids) -> None:
        """Refuse inputs for which the bound of the rounding error does not hold."""
        for one, i in zip(inputs, ids, strict=True):
            if one.size > 64 or not ((one >= 0) & (one <= 1)).all():
                raise ValueError(f"this toy noise is for at most 64 pixels in [0, 1], not for image {i}")
