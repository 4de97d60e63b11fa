"""The training loop: it stores its state after every epoch and resumes to the same bits."""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ancer_jax import devices
from ancer_jax._messages import first_line
from ancer_jax.data import Dataset, check_classes
from ancer_jax.models.checkpoints import TRAINING_SETTINGS
from ancer_jax.models.front import WithFront
from ancer_jax.runs.settings import refuse_other_settings
from ancer_jax.storage import absolute, list_folder, locked_shard, write_file
from ancer_jax.training.config import TrainConfig
from ancer_jax.training.step import Training, compiled_train_step, evaluate, initial_state, learning_rate

STATE, TABLE = "state", "training.tsv"
HISTORY = ("epoch", "learning_rate", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds")

Progress = Callable[[int, dict[str, float]], object]


class TrainState(NamedTuple):
    """What training resumes from: variables of the network, state of the optimizer, and `HISTORY` per epoch."""

    variables: Any
    optimizer: Any
    history: np.ndarray


def train(
    network: nn.Module,
    datasets: tuple[Dataset, Dataset],
    config: TrainConfig,
    *,
    out: epath.PathLike,
    devices: int | None = None,
    progress: Progress = lambda steps, figures: None,
) -> TrainState:
    """Train `network`, storing the state after every epoch in the folder `out`, and resuming from what is there.

    A training that is stopped at any moment and started again gives the same parameters and history, except `seconds`,
    as one that was never stopped, on the same CPU (other devices may choose other algorithms in another process).

    Every batch is sharded over the devices, and batch norm is over the whole batch: the number of devices changes
    rounding only. If JAX runs as several processes (`jax.distributed`), all call this with the same arguments.

    Args:
      network: takes `train=True` and may have batch statistics. With a `front` in the config, what is trained and what
        the variables belong to is `models.WithFront(network, config.front_basis)`.
      datasets: the training set, with images in [0, 1], and the test set, on which loss and accuracy under one noise
        draw per image are measured after every epoch.
      config: the settings.
      out: a new folder, or that of an unfinished training with the same settings.
      devices: how many local devices each process uses; None is all of them, but only one CPU device.
      progress: called with the number of steps since the last call, and with the newest row of `HISTORY` after an epoch
        ({} after a step). The first call has the steps and the row of an earlier training that is resumed.

    Raises:
      ValueError: if the data do not fit the network or the batch, several CPU devices are asked for, the loss is no
        longer finite, `out` belongs to another training or is damaged, or another process trains there.
      OSError: if `out` cannot be written.
    """
    import orbax.checkpoint as ocp

    training, out = _set_up(network, datasets, config, devices), absolute(out)
    history = np.full((config.epochs, len(HISTORY)), np.nan)
    # Lazy images are read for the filter only.
    images = datasets[0].images if config.front_basis is None else datasets[0].some_images()
    state = TrainState(*initial_state(training, images), history)
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with _open_training(out, network, datasets, config), ocp.CheckpointManager(out / STATE, options=options) as manager:
        done = manager.latest_step() or 0
        if done:
            state = _restore(manager, done, state)
            _write(out / TABLE, _table(state.history[:done]))
        progress(done * training.steps, _figures(state.history, done))
        for epoch in range(done, config.epochs):
            state = _train_epoch(state, epoch, training, datasets, progress)
            manager.save(epoch + 1, args=ocp.args.StandardSave(state._asdict()))
            manager.wait_until_finished()
            _write(out / TABLE, _table(state.history[: epoch + 1]))
            progress(0, _figures(state.history, epoch + 1))
    return state


def _set_up(network, datasets: tuple[Dataset, Dataset], config: TrainConfig, num_devices: int | None) -> Training:
    """The `Training` of these settings, after checking that network, data and devices fit them."""
    data, test = datasets
    steps = len(data) // config.batch_size
    if steps == 0:
        raise ValueError(f"batch_size is {config.batch_size}, but {data.name} has only {len(data)} images")
    if num_devices is None and jax.default_backend() == "cpu":
        num_devices = 1
    mesh = devices.device_mesh(num_devices, all_processes=True)
    devices.refuse_collectives(mesh, "shard the batches of training")
    check_classes(test, data.classes)
    for part in datasets:
        if part.num_classes > network.num_classes:
            raise ValueError(f"{part.name} has {part.num_classes} classes, the network only {network.num_classes}")
    shapes = [list(part.images.shape[1:]) for part in datasets]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the training images are {shapes[0]}, those of {test.name} are {shapes[1]}")
    if config.theta_map is not None and list(config.thetas.shape) != shapes[0]:
        raise ValueError(f"the theta map is {list(config.thetas.shape)}, the images are {shapes[0]}")
    if config.batch_size % mesh.size:
        raise ValueError(f"batch_size must be a multiple of the {mesh.size} devices, got {config.batch_size}")
    if config.front_basis is not None:
        network = WithFront(network, config.front_basis)
    return Training(network, config, steps, mesh)


def _train_epoch(
    state: TrainState, epoch: int, training: Training, datasets: tuple[Dataset, Dataset], progress: Progress
) -> TrainState:
    """One epoch and its evaluation; a loss that is not finite is a ValueError."""
    (data, test), (_, config, steps, mesh) = datasets, training
    train_step = compiled_train_step(devices.platform(mesh))
    variables, optimizer_state, history = state
    clock, first, sums = time.perf_counter(), epoch * steps, 0.0
    columns = data.images, data.labels, _mirrored(config, epoch, len(data))
    epsilon = np.float32(config.epsilon * min(1.0, (epoch + 1) / max(config.warmup_epochs, 1)))
    for step, chosen in enumerate(_order(config, epoch, len(data), steps), start=first):
        batch = tuple(devices.take_rows(column, chosen, mesh) for column in columns)
        variables, optimizer_state, figures = train_step(
            variables, optimizer_state, batch, np.int32(step), epsilon, training=training
        )
        jax.block_until_ready(sums)  # of the last step: the host runs ahead of the devices by one, no more
        sums += figures
        progress(1, {})
    loss, accuracy = np.asarray(sums / steps)
    test_loss, test_accuracy = evaluate(training, variables, test)
    if not (math.isfinite(loss) and math.isfinite(test_loss)):
        both = f"{loss:g}, and {test_loss:g} on test images"
        raise ValueError(f"the loss of epoch {epoch + 1} is {both}: a smaller learning rate may help")
    rate, seconds = learning_rate(config, steps)(first), time.perf_counter() - clock
    history = history.copy()
    history[epoch] = (epoch + 1, rate, loss, accuracy, test_loss, test_accuracy, seconds)
    return TrainState(variables, optimizer_state, history)


def _order(config: TrainConfig, epoch: int, count: int, steps: int) -> np.ndarray:
    """Indices of the images of each batch, [steps, batch_size]. Images that fill no batch are others in each epoch."""
    order = np.random.default_rng((config.seed, epoch)).permutation(count)
    return order[: steps * config.batch_size].reshape(steps, -1)


def _mirrored(config: TrainConfig, epoch: int, count: int) -> np.ndarray:
    """Which of the `count` images are mirrored in this epoch."""
    if config.flip == "none":
        return np.zeros(count, bool)
    alternating = config.flip == "alternating"
    # The third number makes it another stream than that of `_order`.
    draws = np.random.default_rng((config.seed, 0 if alternating else epoch, 1)).random(count) < 0.5
    return draws ^ (alternating and epoch % 2 == 1)


def _figures(history: np.ndarray, epochs: int) -> dict[str, float]:
    return dict(zip(HISTORY, history[epochs - 1].tolist(), strict=True)) if epochs else {}


def _table(history: np.ndarray) -> str:
    lines = [(str(int(line[0])), *(f"{value:.6g}" for value in line[1:])) for line in history]
    return "\n".join("\t".join(line) for line in [HISTORY, *lines]) + "\n"


def _write(file: epath.Path, text: str) -> None:
    """Write from the first process only: all processes have the same text."""
    if jax.process_index() == 0:
        write_file(file, text.encode())


def _restore(manager, epoch: int, like: TrainState) -> TrainState:
    import orbax.checkpoint as ocp

    try:
        return TrainState(**manager.restore(epoch, args=ocp.args.StandardRestore(like._asdict())))
    except Exception as error:  # orbax raises many types
        what = "cannot be read; if it is damaged, delete it"
        raise ValueError(f"{manager.directory}: {what} ({first_line(error)})") from None


@contextlib.contextmanager
def _open_training(
    out: epath.Path, network: nn.Module, datasets: tuple[Dataset, Dataset], config: TrainConfig
) -> Iterator[None]:
    """Hold the lock of the folder, which must be new or belong to the same training."""
    described = [[data.name, data.fingerprint, hashlib.sha256(data.ids.tobytes()).hexdigest()] for data in datasets]
    settings = config.settings() | {"network": repr(network), "data": described}
    settings, file = json.loads(json.dumps(settings)), out / TRAINING_SETTINGS
    names = {path.name for path in list_folder(out)}
    foreign = [name for name in names if not name.startswith((TRAINING_SETTINGS, "lock-"))]
    if foreign and TRAINING_SETTINGS not in names:
        raise ValueError(f"{out} holds something else: name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    with locked_shard(out, jax.process_index(), jax.process_count()):
        begun = any(epoch.name.isdecimal() for epoch in list_folder(out / STATE))
        if not begun:  # an attempt that finished no epoch leaves nothing to resume: other settings may replace it
            _write(file, f"{json.dumps(settings, indent=2)}\n")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("settings")
        try:
            found = dict(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{file}: not settings of training ({error})") from None
        refuse_other_settings(out, found, settings)
        yield
