"""Training a base classifier for smoothing: one linear loop, resumable to the bit."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ancer_jax import parallel
from ancer_jax._checks import check_integer, check_real
from ancer_jax.certificates import CERTIFICATES, AdditiveNoise, Certificate, Noise, noise_law
from ancer_jax.data import Dataset, check_classes
from ancer_jax.runs import refuse_other_settings
from ancer_jax.storage import absolute, list_folder, locked_share, write_file
from ancer_jax.training import losses

TrainingMethod = Literal["augmentation", "smoothadv", "macer", "consistency", "stability", "volume"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a network is trained; `PRESETS` has the settings of each method's published code.

    Attributes:
      method: the loss (`training.losses`).
      norm, theta: "l2" (Gaussian noise) or "l1", and the noise parameter, in units of [0, 1] pixels.
      noise: for l1 "uniform" or "splitting" (Levine & Feizi 2021); None is the usual one of the norm.
      epochs, batch_size: images of a batch, without their noisy copies.
      copies: noisy copies of each image (m).
      learning_rate, momentum, nesterov, weight_decay: of SGD; the decay is on all parameters.
      drop_every: epochs after which the learning rate falls to a tenth, again and again; None is a cosine to 0.
      weight: of the method's second term (MACER, consistency, stability, volume).
      epsilon, attack_steps, warmup_epochs: SmoothAdv's l2 ball, its steps, and the epochs in which the ball grows.
        Settings that the method has no use for are 0.
      shift: largest random shift, in pixels; 0 is none.
      flip: whether images are mirrored at random.
      seed: of initial parameters, order, noise and augmentation.

    Raises:
      ValueError: if a setting is out of range.
    """

    method: TrainingMethod = "augmentation"
    norm: Literal["l2", "l1"] = "l2"
    theta: float = 0.25
    epochs: int = 90
    batch_size: int = 256
    copies: int = 1
    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    drop_every: int | None = 30
    weight: float = 0.0
    epsilon: float = 0.0
    attack_steps: int = 0
    warmup_epochs: int = 0
    shift: int = 4
    flip: bool = True
    seed: int = 0
    noise: Noise | None = None

    def __post_init__(self):
        for name, choices in (("method", get_args(TrainingMethod)), ("norm", tuple(CERTIFICATES))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("epochs", "batch_size", "copies"):
            check_integer(name, getattr(self, name))
        if self.drop_every is not None:
            check_integer("drop_every", self.drop_every)
        for name in ("attack_steps", "warmup_epochs", "shift"):
            check_integer(name, getattr(self, name), 0)
        check_integer("seed", self.seed, 0, 2**31 - 1)
        for name in ("theta", "learning_rate"):
            check_real(name, getattr(self, name), "(0, inf)")
        for name in ("momentum", "weight_decay", "weight", "epsilon"):
            check_real(name, getattr(self, name), "[0, inf)")
        used = _USED.get(self.method, ())
        for name in ("weight", "epsilon", "attack_steps", "warmup_epochs"):
            if name in used and getattr(self, name) == 0 and name != "warmup_epochs":
                raise ValueError(f"{self.method} training needs a positive {name}")
            if name not in used and getattr(self, name) > 0:
                raise ValueError(f"{self.method} training has no {name}, got {getattr(self, name)}")
        if self.method in ("consistency", "stability") and self.copies < 2:
            raise ValueError(f"{self.method} training compares noisy copies: at least 2, got copies = {self.copies}")
        if self.method == "macer" and self.norm != "l2":
            raise ValueError("macer maximises the l2 radius of Gaussian noise: norm must be l2")
        if not isinstance(noise_law(self.norm, self.noise), AdditiveNoise) and self.method == "smoothadv":
            raise ValueError(f"smoothadv attacks through noise that is added, not through {self.noise} noise")

    @property
    def certificate(self) -> Certificate:
        """The noise law."""
        return noise_law(self.norm, self.noise)


_USED: dict[TrainingMethod, tuple[str, ...]] = {
    "smoothadv": ("epsilon", "attack_steps", "warmup_epochs"),
    **dict.fromkeys(("macer", "consistency", "stability", "volume"), ("weight",)),
}

# What the codes do beside: RS4A's runs the network on each copy by itself, so that batch statistics are of one copy,
# and changes its rate once an epoch; it trains noise augmentation, too, as it does stability.
PRESETS: dict[TrainingMethod, TrainConfig] = {
    # Cohen et al. 2019, code/train.py
    "augmentation": TrainConfig("augmentation"),
    # Salman et al. 2019, code/train_pgd.py
    "smoothadv": TrainConfig("smoothadv", epsilon=64 / 256, attack_steps=10, warmup_epochs=1),
    # Zhai et al. 2020, main.py: 440 epochs, a tenth of the rate after 200 and 400
    "macer": TrainConfig(
        *("macer", "l2", 0.25, 440, 64),
        **{"copies": 16, "learning_rate": 0.01, "weight_decay": 5e-4, "drop_every": 200, "weight": 12.0},
    ),
    # Jeong and Shin 2020, code/train_consistency.py: batches of 256 are cut into one part for each of two draws
    "consistency": TrainConfig("consistency", epochs=150, batch_size=128, drop_every=50, copies=2, weight=10.0),
    # Yang et al. 2020, src/train.py
    "stability": TrainConfig(
        "stability", epochs=120, batch_size=64, copies=2, nesterov=True, drop_every=None, weight=6.0
    ),
    # Ours: Cohen et al.'s with as many copies in a batch
    "volume": TrainConfig("volume", batch_size=32, copies=8, learning_rate=0.02, weight=8.0),
}

SETTINGS, STATE, TABLE = "training.json", "state", "training.tsv"
HISTORY = ("epoch", "learning_rate", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds")


class TrainState(NamedTuple):
    """What training goes on from: the network's variables, the optimizer's state, and a row of HISTORY per epoch."""

    variables: Any
    optimizer: Any
    history: np.ndarray


def train(
    network: nn.Module,
    data: Dataset,
    test: Dataset,
    config: TrainConfig,
    *,
    out: epath.PathLike,
    devices: int | None = None,
    progress: Callable[[int, dict[str, float]], object] = lambda steps, figures: None,
) -> TrainState:
    """Train `network` on `data`, continuing what is in the folder `out`; after every epoch its state is stored there.

    A run that was stopped at any moment and started again gives the same parameters and the same history (`seconds`
    apart) as one that never was, on the same CPU (other devices may choose other algorithms in another process).

    The devices share every batch, and batch norm is of the whole of it: another number of devices gives the same up to
    rounding. Several CPU devices of one process cannot (`parallel.refuse_collectives`). Where JAX runs as several
    processes (`jax.distributed`), all call this with the same arguments and `out`.

    Args:
      network: takes `train=True` and may have batch statistics.
      data: images in [0, 1] to train on.
      test: images for the loss and accuracy under one draw of the noise each, after every epoch.
      config: how.
      out: folder, new or of an unfinished training with the same settings.
      devices: how many local devices of each process; None is all of them, but one CPU device.
      progress: called after every step with the number of steps (at first those that are done already) and the newest
        figures of HISTORY.

    Raises:
      ValueError: if the data do not fit the network or the batch, several CPU devices are asked for, the loss is not
        finite any more, `out` is of another training or damaged, or another process trains there.
      OSError: if `out` cannot be written.
    """
    import orbax.checkpoint as ocp

    steps = len(data) // config.batch_size
    if steps == 0:
        raise ValueError(f"batch_size is {config.batch_size}, but {data.name} has only {len(data)} images")
    if devices is None and jax.default_backend() == "cpu":
        devices = 1
    mesh = parallel.device_mesh(devices, all_processes=True)
    parallel.refuse_collectives(mesh, "share the batches of a training")
    _check_data(network, data, test)
    if config.batch_size % mesh.size:
        raise ValueError(f"batch_size must be a multiple of the {mesh.size} devices, got {config.batch_size}")
    out = absolute(out)
    variables, moments = jax.tree.map(np.asarray, _start(network, data, config, steps))
    history = np.full((config.epochs, len(HISTORY)), np.nan)
    state = TrainState(parallel.replicate(variables, mesh), parallel.replicate(moments, mesh), history)
    options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
    with (
        _same_training(out, network, data, test, config),
        ocp.CheckpointManager(out / STATE, options=options) as manager,
    ):
        done = manager.latest_step() or 0
        if done:
            state = _restore(manager, done, state)
            _write(out / TABLE, _table(state.history[:done]))
        progress(done * steps, _figures(state.history, done))
        for epoch in range(done, config.epochs):
            clock = time.perf_counter()
            epsilon = config.epsilon * min(1.0, (epoch + 1) / max(config.warmup_epochs, 1))
            sums = 0.0
            for number, rows in enumerate(_order(config, epoch, len(data), steps)):
                batch = (parallel.take_rows(column, rows, mesh) for column in (data.images, data.labels))
                variables, moments, figures = _step(
                    *(state.variables, state.optimizer, np.int32(epoch * steps + number), *batch, np.float32(epsilon)),
                    **{"network": network, "config": config, "steps": steps, "mesh": mesh},
                )
                state, sums = state._replace(variables=variables, optimizer=moments), sums + figures
                progress(1, {})
            loss, accuracy = np.asarray(sums / steps)
            measured = _measure(network, state.variables, test, config, mesh)
            if not (math.isfinite(loss) and math.isfinite(measured[0])):
                raise ValueError(
                    f"the loss of epoch {epoch + 1} is {loss:g}, {measured[0]:g} on test images: a smaller learning "
                    "rate may help"
                )
            rate = _learning_rate(config, steps)(epoch * steps)
            state.history[epoch] = (epoch + 1, rate, loss, accuracy, *measured, time.perf_counter() - clock)
            manager.save(epoch + 1, args=ocp.args.StandardSave(state._asdict()))
            manager.wait_until_finished()
            _write(out / TABLE, _table(state.history[: epoch + 1]))
            progress(0, _figures(state.history, epoch + 1))
    return state


def _key(config: TrainConfig):
    """The key of a training: of no image, so that a network shares no draw with the certificates of the same seed."""
    return jax.random.fold_in(jax.random.key(config.seed, impl="threefry2x32"), np.uint32(2**32 - 2))


def _start(network, data: Dataset, config: TrainConfig, steps: int):
    """The network's variables and the optimizer's state before the first step."""
    key, _ = jax.random.split(_key(config))
    variables = jax.jit(network.init)(key, data.images[:1])
    return variables, _optimizer(config, steps).init(variables["params"])


@functools.partial(jax.jit, static_argnames=("network", "config", "steps", "mesh"))
def _step(variables, moments, number, images, labels, epsilon, *, network, config: TrainConfig, steps: int, mesh):
    """A step of the optimizer: new variables, its new state, and (loss, accuracy) of the noisy copies; on all devices
    alike, from a batch that they share.
    """
    _, noise_key = jax.random.split(_key(config))
    key_augment, key_noise = jax.random.split(jax.random.fold_in(noise_key, number))
    images = _augment(key_augment, images, config)
    theta = jnp.full((len(images), config.copies, *images.shape[1:]), config.theta)
    if config.method == "smoothadv":
        noise = _noisy(config.certificate, key_noise, jnp.zeros_like(theta), theta)
        evaluate = lambda noisy: network.apply(variables, noisy)
        attack = functools.partial(losses.attack, evaluate, epsilon=epsilon, steps=config.attack_steps)
        images = jax.lax.stop_gradient(jax.vmap(attack)(images, labels, noise))
    noisy = _noisy(config.certificate, key_noise, jnp.broadcast_to(images[:, None], theta.shape), theta)
    noisy = noisy.reshape(-1, *images.shape[1:])
    rest = {name: value for name, value in variables.items() if name != "params"}

    def loss(params):
        logits, changed = network.apply({"params": params, **rest}, noisy, train=True, mutable=list(rest))
        logits = logits.reshape(len(images), config.copies, -1)
        value = jax.vmap(functools.partial(_loss, config))(logits, labels).mean()
        right = (logits.argmax(-1) == labels[:, None]).mean()
        return value, (changed, jnp.stack([value, right]))

    gradient, (changed, figures) = jax.grad(loss, has_aux=True)(variables["params"])
    updates, moments = _optimizer(config, steps).update(gradient, moments, variables["params"])
    state = {"params": optax.apply_updates(variables["params"], updates), **changed}, moments, figures
    return jax.lax.with_sharding_constraint(state, NamedSharding(mesh, PartitionSpec()))


def _loss(config: TrainConfig, logits, label):
    match config.method:
        case "macer":
            return losses.macer(logits, label, config.theta, weight=config.weight)
        case "consistency":
            return losses.consistency(logits, label, weight=config.weight)
        case "stability":
            return losses.stability(logits, label, weight=config.weight)
        case "volume":
            return losses.volume(logits, label, config.theta, config.certificate, weight=config.weight)
    return losses.augmentation(logits, label)


def _noisy(certificate: Certificate, key, images, theta):
    """Images under one draw of the noise of them all."""
    if isinstance(certificate, AdditiveNoise):
        return images + certificate.sample(key, theta)
    return certificate.perturb(key, 0, images, theta)


def _augment(key, images, config: TrainConfig):
    """Random shifts by up to `shift` pixels (black comes in) and reflections, each image its own."""
    key_shift, key_flip = jax.random.split(key)
    if config.shift:
        pad = config.shift
        padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        shifts = jax.random.randint(key_shift, (len(images), 2), 0, 2 * pad + 1)
        cut = lambda image, shift: jax.lax.dynamic_slice(image, (*shift, 0), images.shape[1:])
        images = jax.vmap(cut)(padded, shifts)
    if config.flip:
        flip = jax.random.bernoulli(key_flip, 0.5, (len(images), 1, 1, 1))
        images = jnp.where(flip, images[:, :, ::-1], images)
    return images


def _measure(network, variables, test: Dataset, config: TrainConfig, mesh: Mesh) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of the base classifier on `test`, each image under one draw of the noise."""
    sums, batch_size = np.zeros(2), min(500, len(test))
    rows = np.arange(math.ceil(batch_size / mesh.size) * mesh.size)
    for start in range(0, len(test), batch_size):
        inside = rows < min(batch_size, len(test) - start)
        chosen = np.where(inside, start + rows, 0)
        batch = (parallel.take_rows(column, chosen, mesh) for column in (test.images, test.labels))
        mask = parallel.take_rows(inside, rows, mesh)
        how = {"network": network, "config": config, "batch_size": batch_size}
        sums += _measure_batch(variables, np.int32(start), *batch, mask, **how)
    loss, accuracy = sums / len(test)
    return float(loss), float(accuracy)


@functools.partial(jax.jit, static_argnames=("network", "config", "batch_size"))
def _measure_batch(variables, start, images, labels, inside, *, network, config: TrainConfig, batch_size: int):
    key = jax.random.fold_in(_key(config), 2 + start)  # 0 and 1 are the keys of `split`
    # Of the images without the padding, which depends on the number of devices.
    noisy = _noisy(
        config.certificate, key, images[:batch_size], jnp.full((batch_size, *images.shape[1:]), config.theta)
    )
    noisy = jnp.pad(noisy, [(0, len(images) - batch_size), *[(0, 0)] * (images.ndim - 1)])
    logits = network.apply(variables, noisy)
    losses_ = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.stack([(losses_ * inside).sum(), ((logits.argmax(-1) == labels) * inside).sum()])


def _optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(_learning_rate(config, steps), config.momentum, nesterov=config.nesterov),
    )


def _learning_rate(config: TrainConfig, steps: int) -> optax.Schedule:
    if config.drop_every is None:
        return optax.cosine_decay_schedule(config.learning_rate, config.epochs * steps)
    drops = {epoch * steps: 0.1 for epoch in range(config.drop_every, config.epochs, config.drop_every)}
    return optax.piecewise_constant_schedule(config.learning_rate, drops)


def _order(config: TrainConfig, epoch: int, count: int, steps: int) -> np.ndarray:
    """The rows of each batch of an epoch; what does not fill a batch is left out, other images every time."""
    order = np.random.default_rng((config.seed, epoch)).permutation(count)
    return order[: steps * config.batch_size].reshape(steps, -1)


def _figures(history, epochs: int) -> dict[str, float]:
    return dict(zip(HISTORY, history[epochs - 1].tolist(), strict=True)) if epochs else {}


def _table(history) -> str:
    rows = [(int(row[0]), *(f"{value:.6g}" for value in row[1:])) for row in history]
    return "\n".join("\t".join(map(str, row)) for row in [HISTORY, *rows]) + "\n"


def _check_data(network, data: Dataset, test: Dataset) -> None:
    check_classes(test, data.classes)
    for part in (data, test):
        if part.num_classes > network.num_classes:
            raise ValueError(f"{part.name} has {part.num_classes} classes, the network only {network.num_classes}")
    if data.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            f"images are {list(data.images.shape[1:])}, those of {test.name} {list(test.images.shape[1:])}"
        )


def _write(file: epath.Path, text: str) -> None:
    """What all processes know, written by the first."""
    if jax.process_index() == 0:
        write_file(file, text.encode())


def _wait_for_all(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _restore(manager, epoch: int, like: TrainState) -> TrainState:
    import orbax.checkpoint as ocp

    try:
        return TrainState(**manager.restore(epoch, args=ocp.args.StandardRestore(like._asdict())))
    except Exception as error:  # orbax raises many kinds
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{manager.directory}: cannot be read; if it is damaged, delete it ({line})") from None


@contextlib.contextmanager
def _same_training(out: epath.Path, network, data: Dataset, test: Dataset, config: TrainConfig) -> Iterator[None]:
    """Hold the folder: a new one, or one of the same training."""
    described = [[part.name, part.fingerprint, hashlib.sha256(part.ids.tobytes()).hexdigest()] for part in (data, test)]
    settings = dataclasses.asdict(config) | {"network": repr(network), "data": described}
    settings, file = json.loads(json.dumps(settings)), out / SETTINGS
    foreign = [p.name for p in list_folder(out) if not p.name.startswith((SETTINGS, "lock-"))]
    if foreign and SETTINGS not in {p.name for p in list_folder(out)}:
        raise ValueError(f"{out} holds something else: name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    with locked_share(out, jax.process_index(), jax.process_count()):
        begun = any(epoch.name.isdecimal() for epoch in list_folder(out / STATE))
        if not begun:  # whatever was tried here before left nothing to go on from
            _write(file, f"{json.dumps(settings, indent=2)}\n")
        _wait_for_all("settings")
        try:
            there = dict(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{file}: not the settings of a training ({error})") from None
        refuse_other_settings(out, there, settings)
        yield
