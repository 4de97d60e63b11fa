"""A worker of peers.py that runs this library: one task a line, as JSON, and one answer a line."""

import collections
import json
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.monitoring
import numpy as np

import ancer_jax as aj
from ancer_jax import devices
from ancer_jax.data import Dataset
from ancer_jax.models import convert_torch, make_network
from ancer_jax.report import Results, load_results
from ancer_jax.runs import read_run
from ancer_jax.runs.config import Norm
from ancer_jax.runs.job import example_keys
from ancer_jax.search.leakage import leakage, make_probes
from ancer_jax.smoothing import certificate_from_votes, class_counts, make_noise
from ancer_jax.smoothing.smoothed import Stage, stage_key

Answer = dict[str, Any]


class Worker:
    """Does the tasks; `load` comes first."""

    def load(self, network: str, weights: str, images: str, norm: Norm) -> None:
        """Load a network's weights and the test images."""
        devices.use_all_cores()
        self.norm: Norm = norm
        self.noise, self.mesh = make_noise(norm), devices.device_mesh()
        self.images = np.load(images).transpose(0, 2, 3, 1)
        flax = make_network(network)
        self.classifier = aj.from_linen(flax, convert_torch(flax, np.load(weights), (32, 32, 3)), num_classes=10)
        self.programs: dict[Any, Callable[..., Any]] = {}

    def certify(self, rows: list[int], theta: float, n0: int, n: int, alpha: float, batch: int, seed: int) -> Answer:
        """Certify images under fixed noise, `batch` noisy copies at a time."""
        config = aj.RunConfig(norm=self.norm, seed=seed, theta=theta, certify=aj.CertifyConfig(n0, n, alpha))
        execution = aj.Execution(batch_size=len(rows), chunk=max(1, batch // len(rows)))
        found, _ = self._run(rows, config, execution)
        return {"predict": found["predict"].astype(int).tolist(), "count": found["count"].astype(int).tolist()}

    def whole(
        self, rows: list[int], theta: float, n0: int, n: int, alpha: float, radii: list[float], seed: int, out: str
    ) -> Answer:
        """A whole run of ANCER with the fast preset and sequential sampling."""
        config = aj.RunConfig(
            norm=self.norm,
            method="ancer",
            theta=theta,
            certify=aj.CertifyConfig(n0, n, alpha),
            seed=seed,
            leakage=None,
            sampling=aj.SequentialConfig(radii=tuple(radii)),
        )
        execution = aj.Execution()
        if len(rows) < self.mesh.size:  # as the guide recommends for few images; CPU devices cannot share draws
            on_cpu = jax.default_backend() == "cpu"
            execution = aj.Execution(devices=1) if on_cpu else aj.Execution(shard="draws")
        found, stored = self._run(rows, config, execution)
        np.save(out, stored["theta"].transpose(0, 3, 1, 2))
        return {"radius_proxy": found["radius_proxy"].tolist(), "draws": float(stored["draws"].mean())}

    def isotropic(
        self, rows: list[int], start: float, steps: int, samples: int, lr: float, seed: int, out: str
    ) -> None:
        """Isotropic search from one theta, without a bound."""
        config = aj.IsotropicConfig.published(
            steps=steps, num_samples=samples, learning_rate=lr, theta_max=float("inf")
        )

        def search(classifier, key, x, theta):
            return aj.optimize_isotropic(key, aj.Smoothed(classifier, self.noise, theta), x, config=config)[0]

        np.save(out, self._search(search, config, rows, np.full(len(rows), start, np.float32), seed))

    def anisotropic(
        self, rows: list[int], start: str, steps: int, samples: int, lr: float, seed: int, out: str
    ) -> None:
        """Anisotropic search from the isotropic thetas in a file, without a bound."""
        config = aj.AnisotropicConfig.published(
            steps=steps, num_samples=samples, learning_rate=lr, theta_max=float("inf")
        )

        def search(classifier, key, x, theta):
            return aj.optimize_anisotropic(key, aj.Smoothed(classifier, self.noise, theta), x, config=config)[0]

        np.save(out, self._search(search, config, rows, np.load(start), seed).transpose(0, 3, 1, 2))

    def votes(self, rows: list[int], theta: float, n: int, batch: int, seed: int) -> Answer:
        """Votes for all classes in the draws of `certify`."""

        def count(classifier, key, x):
            smoothed = aj.Smoothed(classifier, self.noise, theta)
            return class_counts(stage_key(key, Stage.ESTIMATE), smoothed, x, num_samples=n, chunk=batch)

        found = self._program(count, 1)(self.classifier, *self._shard(rows, seed, self.images[rows]))
        return {"votes": self._host(found, len(rows)).tolist()}

    def sizes(
        self,
        rows: list[int],
        probes: list[int],
        theta: str,
        start: float,
        n0: int,
        n: int,
        alpha: float,
        batch: int,
        seed: int,
    ) -> Answer:
        """Sizes of regions and leakage of the thetas in a file, by draws that do not depend on who found them."""
        images, config = self.images[rows], aj.CertifyConfig(n0, n, alpha)
        thetas = np.load(theta)
        thetas = thetas.reshape(-1, 1, 1, 1) if thetas.ndim == 1 else thetas.transpose(0, 2, 3, 1)
        thetas = np.broadcast_to(thetas, images.shape)
        keys = jax.random.split(jax.random.key(seed + 2, impl="threefry2x32"), len(probes))
        smoothed = aj.Smoothed(self.classifier, self.noise, start)
        made = jax.jit(make_probes, static_argnames=("num_samples", "chunk"))(
            keys, smoothed, self.images[probes], num_samples=16, chunk=batch
        )

        def measure(given, key, x, theta):
            classifier, probes = given
            smoothed = aj.Smoothed(classifier, self.noise, theta)
            selected, count = aj.count_votes(key, smoothed, x, config=config, chunk=batch)
            return selected, count, *leakage(probes, smoothed, x, selected, chunk=batch)

        arrays = self._shard(rows, seed + 1, images, thetas)
        found = self._program(measure, 2)((self.classifier, made), *arrays)
        selected, count, num_leaked, num_eligible = self._host(found, len(rows))
        certificates = certificate_from_votes(smoothed.with_theta(thetas), images, selected, count, config=config)
        return {
            "radius": np.asarray(certificates.radius).tolist(),
            "proxy": np.asarray(certificates.proxy_radius).tolist(),
            "leakage": (num_leaked / np.maximum(num_eligible, 1)).tolist(),
        }

    def memory(self) -> Answer:
        """Peak memory of this process."""
        peak = re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())  # ru_maxrss has the parent's
        return {"mib": int(peak[1]) / 1024 if peak else None}

    def preparation(self) -> Answer:
        """Seconds of tracing, lowering and compiling programs, so far."""
        return dict(preparation)

    def _run(
        self, rows: list[int], config: aj.RunConfig, execution: aj.Execution
    ) -> tuple[Results, dict[str, np.ndarray]]:
        """The results of a run whose folder is thrown away, with its thetas and draws."""
        data = Dataset("peers", np.arange(len(rows)), self.images[rows], np.zeros(len(rows), np.int64), 10)
        with tempfile.TemporaryDirectory() as folder:
            aj.certify_dataset(self.classifier, data, config, out=folder, execution=execution)
            return load_results(folder), read_run(folder).columns("theta", "draws")

    def _search(
        self, search: Callable[..., Any], config: Any, rows: list[int], start: np.ndarray, seed: int
    ) -> np.ndarray:
        """Thetas of a search, with the program that was compiled for this config before."""
        program = self.programs.setdefault(config, self._program(search, 2))
        return self._host(program(self.classifier, *self._shard(rows, seed, self.images[rows], start)), len(rows))

    def _program(self, function: Callable[..., Any], arrays: int) -> Callable[..., Any]:
        """`function(given, key, entry of each array)` of one image, for a batch, on all devices."""
        of_rows = jax.vmap(function, (None, *[0] * (1 + arrays)))
        program = jax.jit(devices.on_own_rows(of_rows, self.mesh, [False, *[True] * (1 + arrays)]))
        return lambda given, *sharded: program(devices.replicate(given, self.mesh), *sharded)

    def _shard(self, rows: Sequence[int], seed: int, *arrays: np.ndarray) -> list[Any]:
        """Keys and arrays with an entry for each image, sharded; filled up to a multiple of the devices."""
        filled = np.resize(np.arange(len(rows)), -(-len(rows) // self.mesh.size) * self.mesh.size)
        keys = example_keys(seed, filled.astype(np.uint32))
        return list(devices.shard_rows((keys, *(array[filled] for array in arrays)), self.mesh))

    def _host(self, found: Any, count: int) -> Any:
        """Results of the first `count` images, on the host."""
        return jax.tree.map(lambda array: np.asarray(array)[:count], found)


preparation: dict[str, float] = collections.defaultdict(float)
STEPS = {"jaxpr_trace": "tracing", "jaxpr_to_mlir_module": "lowering", "backend_compile": "compilation"}


def note(event: str, duration_secs: float, **_) -> None:
    """Add up the durations that JAX reports."""
    step = event.removeprefix("/jax/core/compile/").removesuffix("_duration")
    if step in STEPS:
        preparation[STEPS[step]] += duration_secs


jax.monitoring.register_event_duration_secs_listener(note)
worker, answers = Worker(), sys.stdout
sys.stdout = sys.stderr  # only answers go to the standard output
for line in sys.stdin:
    task = json.loads(line)
    began = time.perf_counter()
    answer = getattr(worker, task.pop("do"))(**task) or {}
    print(json.dumps({"seconds": time.perf_counter() - began} | answer), file=answers, flush=True)
