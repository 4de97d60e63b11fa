"""One step of training, and the evaluation after an epoch: pure functions, compiled once."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ancer_jax.data import Dataset
from ancer_jax.devices import replicate, take_rows
from ancer_jax.models.front import wiener_front
from ancer_jax.smoothing.noise import AdditiveNoise, Noise
from ancer_jax.training import losses
from ancer_jax.training.config import METHODS, TrainConfig

_EVALUATION_BATCH = 500
# On CPUs, XLA calls the library YNNPACK for matrix products, sums and convolutions. It computes convolutions of few
# channels on one core, so here it gets the other two only.
_CPU_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE",
}


class Training(NamedTuple):
    """What the programs of training are compiled for; `steps` is per epoch, and batches are sharded over the mesh."""

    network: Any  # flax.linen.Module
    config: TrainConfig
    steps: int
    mesh: Mesh


def initial_state(training: Training, images: Any) -> tuple[Any, optax.OptState]:
    """Variables of the network, initialised on the first of `images`, and state of the optimizer; replicated.

    The filter in front of the network, if there is one, is made from all of them.
    """
    key, _ = jax.random.split(root_key(training.config.seed))
    variables = _initial_variables(key, images[:1], network=training.network)
    if training.config.front_basis is not None:
        front = wiener_front(images, training.config.thetas, training.config.front_basis)
        variables = {**variables, "front": {"mean": front.mean, "weights": front.weights}}
    state = variables, _optimizer(training).init(variables["params"])
    return replicate(jax.tree.map(np.asarray, state), training.mesh)


@functools.partial(jax.jit, static_argnames="network")
def _initial_variables(key, images, *, network):
    """`network.init`, compiled once for equal networks: `jax.jit` of a bound method would compile at every call."""
    return network.init(key, images)


@functools.partial(jax.jit, static_argnames="training")
def train_step(variables, optimizer_state, batch, number, epsilon, *, training: Training):
    """Step `number` of the optimizer, counted from the start of training, with SmoothAdv's radius `epsilon`.

    `batch` is images, labels, and which images are mirrored, sharded over the mesh. Returns new variables of the
    network, the optimizer's new state, and [loss, accuracy] on the noisy copies, replicated on all devices.
    """
    images, labels, mirrored = batch
    network, config, _, mesh = training
    _, noise_key = jax.random.split(root_key(config.seed))
    key_augment, key_noise = jax.random.split(jax.random.fold_in(noise_key, number))
    images = augment(key_augment, images, mirrored, config)
    theta = jnp.full((len(images), config.copies, *images.shape[1:]), config.thetas)
    if config.method == "smoothadv":
        noise = _add_noise(config.noise_law, key_noise, jnp.zeros_like(theta), theta)
        apply = lambda noisy: network.apply(variables, noisy)
        attack = functools.partial(losses.smoothadv_attack, apply, epsilon=epsilon, steps=config.attack_steps)
        images = jax.lax.stop_gradient(jax.vmap(attack)(images, labels, noise))
    noisy = _add_noise(config.noise_law, key_noise, jnp.broadcast_to(images[:, None], theta.shape), theta)
    noisy = noisy.reshape(-1, *images.shape[1:])
    statistics = {name: value for name, value in variables.items() if name != "params"}

    def loss(params):
        logits, changed = network.apply({"params": params, **statistics}, noisy, train=True, mutable=list(statistics))
        logits = logits.reshape(len(images), config.copies, -1)
        value = jax.vmap(functools.partial(METHODS[config.method].loss, config))(logits, labels).mean()
        correct = (logits.argmax(-1) == labels[:, None]).mean()
        return value, (changed, jnp.stack([value, correct]))

    gradient, (changed, figures) = jax.grad(loss, has_aux=True)(variables["params"])
    updates, optimizer_state = _optimizer(training).update(gradient, optimizer_state, variables["params"])
    state = {"params": optax.apply_updates(variables["params"], updates), **changed}, optimizer_state, figures
    return jax.lax.with_sharding_constraint(state, NamedSharding(mesh, PartitionSpec()))


@functools.cache
def compiled_train_step(platform: str) -> Any:
    """`train_step`, compiled with the options that are fastest on a platform and that the installed jaxlib knows."""
    if platform != "cpu":
        return train_step
    try:
        jax.jit(lambda: 0, compiler_options=_CPU_OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:  # an experimental option may go away; it changes speed alone
        return train_step
    return jax.jit(train_step, static_argnames="training", compiler_options=_CPU_OPTIONS)


def augment(key, images, mirrored, config: TrainConfig):
    """Shift each image at random by up to `config.shift` pixels, filling with black, and mirror those of `mirrored`."""
    if config.shift:
        pad = config.shift
        padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        shifts = jax.random.randint(key, (len(images), 2), 0, 2 * pad + 1)
        cut = lambda image, shift: jax.lax.dynamic_slice(image, (*shift, 0), images.shape[1:])
        images = jax.vmap(cut)(padded, shifts)
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def evaluate(training: Training, variables, test: Dataset) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of the base classifier on `test`, under one noise draw per image."""
    sums, batch_size, mesh = np.zeros(2), min(_EVALUATION_BATCH, len(test)), training.mesh
    positions = np.arange(math.ceil(batch_size / mesh.size) * mesh.size)
    for start in range(0, len(test), batch_size):
        mask = positions < min(batch_size, len(test) - start)
        chosen = np.where(mask, start + positions, 0)
        batch = [take_rows(column, chosen, mesh) for column in (test.images, test.labels)]
        batch.append(take_rows(mask, positions, mesh))
        sums += _evaluate_batch(variables, batch, np.int32(start), training=training, batch_size=batch_size)
    loss, accuracy = sums / len(test)
    return float(loss), float(accuracy)


@functools.partial(jax.jit, static_argnames=("training", "batch_size"))
def _evaluate_batch(variables, batch, start, *, training: Training, batch_size: int):
    """Sums of losses and of correct answers over the images of the batch that the mask keeps."""
    (images, labels, mask), config = batch, training.config
    key = jax.random.fold_in(root_key(config.seed), 2 + start)  # 0 and 1 are the keys that `split` gives
    # Without the padding, whose size depends on the number of devices: draws would depend on it, too.
    theta = jnp.full((batch_size, *images.shape[1:]), config.thetas)
    noisy = _add_noise(config.noise_law, key, images[:batch_size], theta)
    noisy = jnp.pad(noisy, [(0, len(images) - batch_size), *[(0, 0)] * (images.ndim - 1)])
    logits = training.network.apply(variables, noisy)
    losses_ = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.stack([(losses_ * mask).sum(), ((logits.argmax(-1) == labels) * mask).sum()])


def learning_rate(config: TrainConfig, steps: int, *, muon: bool = False) -> optax.Schedule:
    """The learning rate of SGD, or of Muon, as a function of the step, with `steps` steps per epoch."""
    value = config.muon_learning_rate if muon else config.learning_rate
    if config.schedule == "drops":
        drops = {epoch * steps: 0.1 for epoch in range(config.drop_every, config.epochs, config.drop_every)}
        return optax.piecewise_constant_schedule(value, drops)
    if config.schedule == "onecycle":
        return optax.cosine_onecycle_schedule(config.epochs * steps, value)
    return optax.cosine_decay_schedule(value, config.epochs * steps)


def _optimizer(training: Training) -> optax.GradientTransformation:
    network, config, steps, _ = training
    sgd = optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(learning_rate(config, steps), config.momentum, nesterov=config.nesterov),
    )
    if config.optimizer == "sgd":
        return sgd
    muon = optax.contrib.muon(
        learning_rate(config, steps, muon=True),
        beta=config.momentum,
        # Muon multiplies it by its own learning rate.
        weight_decay=config.weight_decay * config.learning_rate / (1 - config.momentum) / config.muon_learning_rate,
        muon_weight_dimension_numbers=functools.partial(jax.tree.map, _as_matrix),
    )
    hidden = lambda w: w.ndim > 2 or (w.ndim == 2 and w.shape[1] != network.num_classes)  # the last layer is not
    of = lambda params: jax.tree.map(lambda w: "muon" if hidden(w) else "sgd", params)
    return optax.partition({"muon": muon, "sgd": sgd}, of)


def _as_matrix(kernel) -> optax.contrib.MuonDimensionNumbers:
    """Muon's matrix: all axes but the last one, and the last one, which is that of the outputs."""
    return optax.contrib.MuonDimensionNumbers(tuple(range(kernel.ndim - 1)), kernel.ndim - 1)


def root_key(seed: int):
    """The key of all draws of training. No image has this id, so certificates of the same seed share no draw."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), np.uint32(2**32 - 2))


def _add_noise(noise: Noise, key, images, theta):
    """Noisy copies of all images at once, from a single draw for the whole array."""
    if isinstance(noise, AdditiveNoise):
        return images + noise.sample(key, theta)
    return noise.perturb(key, 0, images, theta)
