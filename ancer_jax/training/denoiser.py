"""Training of a denoiser for denoised smoothing."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from ancer_jax._checks import check_integer, check_real
from ancer_jax.smoothing.classifier import Classifier
from ancer_jax.training.step import root_key


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """How a denoiser is trained: by Adam, whose learning rate falls along half a cosine.

    Attributes:
      theta: standard deviation of the Gaussian noise, in units of [0, 1] pixels.
      epochs, batch_size: passes over the training set, and images per batch; half of them are mirrored at random.
      learning_rate: the first.
      classifier_weight: weight of the classifier's loss (below); 0: the squared error alone.
      seed: of initial parameters, order of the images, mirroring and noise.

    The loss is the mean squared error in units of `theta^2`, and `classifier_weight` times the cross-entropy of the
    classifier on the denoised image, whose label is what the classifier says of the clean one (Salman et al. 2020: the
    objectives MSE and STAB).

    Raises:
      ValueError: if a setting is out of range.
    """

    theta: float = 0.25
    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 1e-3
    classifier_weight: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            check_integer(name, getattr(self, name))
        check_integer("seed", self.seed, 0, 2**31 - 1)
        for name in ("theta", "learning_rate"):
            check_real(name, getattr(self, name), "(0, inf)")
        check_real("classifier_weight", self.classifier_weight, "[0, inf)")


class DenoiserState(NamedTuple):
    """What training goes on from: variables of the network, state of Adam, and epochs that are done; a pytree."""

    variables: Any
    optimizer_state: Any
    epoch: int


def denoiser_state(
    network: nn.Module,
    images: Float[np.ndarray, "m h w c"],
    config: DenoiserConfig,
    *,
    variables: Mapping[str, Any] | None = None,
) -> DenoiserState:
    """The state in which `train_denoiser` begins: with new parameters, or from `variables` of an earlier training."""
    start: Any = variables or jax.jit(network.init)(root_key(config.seed), images[:1])
    steps = len(images) // config.batch_size
    return DenoiserState(start, _optimizer(config, steps).init(start["params"]), 0)


def train_denoiser(
    network: nn.Module,
    images: Float[np.ndarray, "m h w c"],
    config: DenoiserConfig,
    *,
    classifier: Classifier | None = None,
    state: DenoiserState | None = None,
) -> Iterator[tuple[DenoiserState, float]]:
    """Train a denoiser, an epoch at a time: yields the state and the mean loss after each.

    Args:
      network: takes images [n, h, w, c] and `train`, and returns denoised images; such as `models.DnCNN`. Its only
        variables are parameters.
      images: [m, h, w, c] clean training images in [0, 1].
      config: settings.
      classifier: needed if `config.classifier_weight` is positive; it is not changed.
      state: where it begins or goes on: of `denoiser_state`, or one that this training yielded.

    Raises:
      ValueError: if images are not in [0, 1], or fewer than a batch has; if the classifier is missing, not wanted or
        runs outside of JAX.
    """
    if len(images) < config.batch_size:
        raise ValueError(f"{len(images)} images do not fill a batch of {config.batch_size}")
    if not (np.min(images) >= 0 and np.max(images) <= 1):
        raise ValueError(f"pixels must be in [0, 1], found {np.min(images):g} to {np.max(images):g}")
    if (classifier is None) != (config.classifier_weight == 0):
        raise ValueError("a classifier is needed with a positive classifier_weight, and only then")
    if classifier is not None and classifier.on_host:
        raise ValueError("a denoiser learns by gradients of the classifier, which one outside of JAX does not give")
    return _epochs(network, images, config, classifier, state or denoiser_state(network, images, config))


def _epochs(network, images, config, classifier, state) -> Iterator[tuple[DenoiserState, float]]:
    size, key = config.batch_size, root_key(config.seed)
    steps = len(images) // size
    for epoch in range(state.epoch, config.epochs):
        order, losses = np.random.default_rng((config.seed, epoch)).permutation(len(images)), []
        variables, optimizer_state, _ = state
        for number in range(steps):
            rows, step_key = order[number * size :][:size], jax.random.fold_in(key, 1 + epoch * steps + number)
            settings = {"network": network, "config": config, "steps": steps}
            variables, optimizer_state, loss = _step(
                variables, optimizer_state, step_key, images[rows], classifier, **settings
            )
            losses.append(loss)
        state = DenoiserState(variables, optimizer_state, epoch + 1)
        yield state, float(np.mean(jax.device_get(losses)))


def _optimizer(config: DenoiserConfig, steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.epochs * steps))


@functools.partial(jax.jit, static_argnames=("network", "config", "steps"))
def _step(variables, optimizer_state, key, images, classifier, *, network, config: DenoiserConfig, steps: int):
    """One step of Adam: new variables, its new state, and the loss."""
    noise_key, flip_key = jax.random.split(key)
    mirrored = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
    images = jnp.where(mirrored, images[:, :, ::-1], images)
    noisy = images + config.theta * jax.random.normal(noise_key, images.shape)

    def loss(params):
        clean = network.apply({"params": params}, noisy, train=True)
        value = jnp.mean((clean - images) ** 2) / config.theta**2
        if classifier is not None:
            labels = classifier(images).argmax(axis=-1)
            cross_entropy = optax.softmax_cross_entropy_with_integer_labels(classifier(clean), labels)
            value += config.classifier_weight * cross_entropy.mean()
        return value

    value, gradient = jax.value_and_grad(loss)(variables["params"])
    updates, optimizer_state = _optimizer(config, steps).update(gradient, optimizer_state, variables["params"])
    return {"params": optax.apply_updates(variables["params"], updates)}, optimizer_state, value
