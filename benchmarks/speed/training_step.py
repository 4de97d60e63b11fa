"""A training step on this machine's CPUs, against PyTorch: the same network, batch and number of threads, in turn.

Both add Gaussian noise, go forward and backward, and update by SGD with momentum and weight decay; ours also shifts and
mirrors the images, and keeps freed memory, as `ancer-jax train` does. The twins in PyTorch are those with which the
tests compare logits. A third contender is PyTorch that keeps freed memory, too, which it does not by itself.

Each has a process of its own: in a common one, threads that wait for work slow the others down. They take turns of a
second; figures are medians over the turns. Needs PyTorch (the extra `torch`).
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ancer_jax import devices
from ancer_jax.metrics import round_down
from ancer_jax.models import make_network
from ancer_jax.training import PRESETS
from ancer_jax.training.step import Training, compiled_train_step, initial_state
from benchmarks.benchmark import Benchmark, Found, Line, Lines, load, machine, markdown

SIGMA = 0.25
TURN = 1.0  # seconds
OURS, THEIRS, KEEPING = "ours", "PyTorch", "PyTorch that keeps memory"


def ours(name: str, images: np.ndarray, labels: np.ndarray) -> Callable[[], jax.Array]:
    """A step of `ancer-jax train`, from the state that the last one left."""
    mesh = devices.device_mesh(1)
    config = dataclasses.replace(PRESETS["augmentation"], batch_size=len(images), theta=SIGMA)
    training = Training(make_network(name), config, 100, mesh)
    step = functools.partial(compiled_train_step(devices.platform(mesh)), training=training)
    batch = devices.replicate((jnp.asarray(images), jnp.asarray(labels), jnp.arange(len(images)) % 2 == 0), mesh)
    state = [*initial_state(training, images)]

    def run():
        *state[:], figures = step(*state, batch, np.int32(0), np.float32(0))
        return figures

    return run


def theirs(name: str, images: np.ndarray, labels: np.ndarray) -> Callable[[], float]:
    """The same in PyTorch."""
    import torch
    from torch import nn

    from tests import torch_networks

    torch.set_num_threads(machine()["cores"])
    small = [nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1)]
    network: nn.Module = {
        "small_cnn": lambda: nn.Sequential(
            *small, nn.ReLU(), nn.Flatten(), nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10)
        ),
        "cifar_resnet20": lambda: torch_networks.ResNet((3, 3, 3), 16, "cifar"),
        "ancer_resnet18": lambda: torch_networks.ResNet((2, 2, 2, 2), 64, "imagenet", stem_norm=False),
    }[name]()
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    x, y = torch.tensor(np.moveaxis(images, -1, 1).copy()), torch.tensor(labels)

    def run():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(x + SIGMA * torch.randn_like(x)), y)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return run


@functools.cache
def step_of(who: str, name: str, batch: int, seed: int) -> Callable[[], Any]:
    """A step that has been compiled; made once in each process."""
    if who != THEIRS:
        devices.keep_freed_memory()
    rng = np.random.default_rng(seed)
    shape = (28, 28, 1) if name == "small_cnn" else (32, 32, 3)
    images, labels = rng.random((batch, *shape), np.float32), rng.integers(0, 10, batch)
    step = (ours if who == OURS else theirs)(name, images, labels)
    jax.block_until_ready(step())
    return step


def turn(*what: Any) -> float:
    """Seconds a step, over steps that take at least a second together."""
    step, steps = step_of(*what), 0
    start = time.perf_counter()
    while (taken := time.perf_counter() - start) < TURN or not steps:
        jax.block_until_ready(step())
        steps += 1
    return taken / steps


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """Each network."""
    rows, spawn = [], multiprocessing.get_context("spawn")
    for name in options.networks:
        times: dict[str, list[float]] = {OURS: [], THEIRS: [], KEEPING: []}
        with contextlib.ExitStack() as stack:
            pool = functools.partial(concurrent.futures.ProcessPoolExecutor, 1, spawn)
            processes = {who: stack.enter_context(pool()) for who in times}
            for i in range(options.repeats + 1):
                for who, one in processes.items():
                    seconds = one.submit(turn, who, name, options.batch, options.seed).result()
                    times[who] += [seconds] if i else []  # the first turn is a warm-up
        rates = {who: options.batch / statistics.median(some) for who, some in times.items()}
        rows.append({"network": name, "batch": options.batch, "images a second": rates, "seconds": times})
        yield {"rows": rows}


def lines(found: Found) -> Lines:
    for r in found["results"]["rows"]:
        us, *them = (r["images a second"][who] for who in (OURS, THEIRS, KEEPING))
        what = f"{r['network']}, training step of {r['batch']}: images a second, ours / {THEIRS} / {KEEPING} (ratios)"
        ratios = [us / one for one in them]
        figure = f"{us:,.0f} / {them[0]:,.0f} / {them[1]:,.0f} ({ratios[0]:.2f}; {ratios[1]:.2f})"
        yield Line(what, figure, "last ratio >= 1", ratios[1] >= 1)


def _table() -> str:
    """All networks."""
    rows = []
    for r in load("training_step")["results"]["rows"]:
        us, *others = (r["images a second"][who] for who in (OURS, THEIRS, KEEPING))
        cells = (f"{them:,.0f} ({round_down(us / them, 2)})" for them in others)
        rows.append([f"`{r['network']}`", f"{us:,.0f}", *cells])
    return markdown(["network", "ancer_jax, images a second", f"{THEIRS} (ours / it)", f"{KEEPING} (ours / it)"], rows)


BENCHMARK = Benchmark(
    claim="Training steps on CPUs against PyTorch's, both keeping freed memory; the bar is the same speed.",
    takes="3 minutes",
    measure=measure,
    sizes={
        "networks": (["small_cnn"], ["small_cnn", "cifar_resnet20", "ancer_resnet18"]),
        "batch": (16, 128),
        "repeats": (2, 15),
    },
    small_is_judged=False,
    outputs={"training_step": lines},
    figures={"table": _table},
)
