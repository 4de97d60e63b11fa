"""This library at work, for benchmarks/peers.py, in a process of its own: one JSON line in, one out."""

import json
import pathlib
import re
import sys
import tempfile
import time

import jax
import numpy as np
import record

import ancer_jax as aj
from ancer_jax.certification import certification
from ancer_jax.leakage import leakage, make_references
from ancer_jax.models import convert_torch, make_network
from ancer_jax.smoothing import Stage, class_counts, stage_key


class Worker:
    def load(self, network, weights, images, norm):
        aj.parallel.use_all_cores()
        self.norm, self.mesh = norm, aj.parallel.device_mesh()
        self.law = aj.GaussianL2() if norm == "l2" else aj.UniformL1()
        self.images = np.load(images).transpose(0, 2, 3, 1)
        flax = make_network(network)
        self.classifier = aj.from_linen(flax, convert_torch(flax, np.load(weights), (32, 32, 3)), num_classes=10)
        self.programs = {}

    def certify(self, rows, theta, n0, n, alpha, batch, seed):
        config = aj.RunConfig(norm=self.norm, seed=seed, theta=theta, certify=aj.CertifyConfig(n0, n, alpha))
        execution = aj.Execution(batch_size=len(rows), chunk=max(1, batch // len(rows)))
        found, _ = self._run(rows, config, execution)
        return {name: found[name].astype(int).tolist() for name in ("predict", "count")}

    def whole(self, rows, theta, n0, n, alpha, seed, out):
        config = aj.RunConfig(
            norm=self.norm, method="ancer", theta=theta, certify=aj.CertifyConfig(n0, n, alpha), seed=seed,
            leakage=None, sampling=aj.SequentialConfig(radii=record.RADII[self.norm]),
        )  # fmt: skip
        execution = aj.Execution()
        if len(rows) < self.mesh.size:  # as the guide says for few images; CPU devices cannot share draws
            on_cpu = jax.default_backend() == "cpu"
            execution = aj.Execution(devices=1) if on_cpu else aj.Execution(split="draws")
        found, stored = self._run(rows, config, execution)
        np.save(out, stored["theta"].transpose(0, 3, 1, 2))
        return {"radius_proxy": found["radius_proxy"].tolist(), "draws": float(stored["draws"].mean())}

    def isotropic(self, rows, start, steps, samples, lr, seed, out):
        config = aj.IsotropicConfig.reference(
            steps=steps, num_samples=samples, learning_rate=lr, theta_max=float("inf")
        )
        self._search(aj.optimize_isotropic, rows, np.full(len(rows), start, np.float32), config, seed, out)

    def anisotropic(self, rows, start, steps, samples, lr, seed, out):
        settings = {"steps": steps, "num_samples": samples, "learning_rate": lr, "theta_max": float("inf")}
        config = aj.AnisotropicConfig.reference(**settings)
        self._search(aj.optimize_anisotropic, rows, np.load(start), config, seed, out)

    def votes(self, rows, theta, n, batch, seed):
        """Votes for all classes in the draws of `certify`."""

        def count(classifier, key, x):
            key = stage_key(key, Stage.ESTIMATE)
            return class_counts(key, classifier, self.law, x, theta, num_samples=n, chunk=batch)

        return {"votes": self._for_each(count, rows, seed, self.images[rows]).tolist()}

    def sizes(self, rows, references, theta, start, n0, n, alpha, batch, seed):
        """Sizes of regions and leakage of thetas from a file, by draws that do not depend on where they came from."""
        theta, images, config = np.load(theta), self.images[rows], aj.CertifyConfig(n0, n, alpha)
        theta = theta.reshape(-1, 1, 1, 1) if theta.ndim == 1 else theta.transpose(0, 2, 3, 1)
        theta = np.broadcast_to(theta, images.shape)
        how = {"num_samples": 16, "chunk": batch}
        keys = jax.random.split(jax.random.key(seed + 2, impl="threefry2x32"), len(references))
        references = jax.jit(make_references, static_argnums=2, static_argnames=how)(
            keys, self.classifier, self.law, self.images[references], start, **how
        )

        def measure(shared, key, x, theta):
            classifier, references = shared
            selected, count = aj.count_votes(key, classifier, self.law, x, theta, config=config, chunk=batch)
            return selected, count, *leakage(references, classifier, self.law, x, theta, selected, **how)

        shared = self.classifier, references
        selected, count, leaked, asked = self._for_each(measure, rows, seed + 1, images, theta, shared=shared)
        found = certification(selected, count, certificate=self.law, config=config)
        regions = [aj.Region(*one, self.law.norm) for one in zip(images, theta, found.gap, strict=True)]
        sizes = {
            "radius": [float(aj.radius(r)) for r in regions],
            "proxy": [float(aj.proxy_radius(r)) for r in regions],
        }
        return sizes | {"leakage": (leaked / np.maximum(asked, 1)).tolist()}

    def memory(self):
        statistics = jax.local_devices()[0].memory_stats() or {}
        device = statistics["peak_bytes_in_use"] / 2**20 if "peak_bytes_in_use" in statistics else None
        peak = re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())  # ru_maxrss has the parent's
        return {"host_mib": int(peak[1]) / 1024 if peak else None, "device_mib": device}

    def _run(self, rows, config, execution):
        """Columns of the results table, and thetas and draws, of a run whose folder is thrown away."""
        data = aj.data.Dataset("peers", np.arange(len(rows)), self.images[rows], np.zeros(len(rows), np.int64), 10)
        with tempfile.TemporaryDirectory() as folder:
            aj.certify_dataset(self.classifier, data, config, out=folder, execution=execution)
            return aj.report.load_results(folder), aj.runs.read_run(folder).columns("theta", "draws")

    def _search(self, optimize, rows, start, config, seed, out):
        def search(classifier, key, x, theta):
            return optimize(key, classifier, self.law, x, theta, config=config)[0]

        theta = self._for_each(search, rows, seed, self.images[rows], start, keep=config)
        np.save(out, theta if theta.ndim == 1 else theta.transpose(0, 3, 1, 2))

    def _for_each(self, function, rows, seed, *arrays, shared=None, keep=None):
        """Results of function(classifier or shared, key, row of each array), on all devices; kept under a name."""
        count = len(rows)
        shared_out = np.resize(np.arange(count), -(-count // self.mesh.size) * self.mesh.size)
        key = jax.random.key(seed, impl="threefry2x32")
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(shared_out)
        arrays = aj.parallel.split_rows((keys, *(array[shared_out] for array in arrays)), self.mesh)
        of_rows = jax.vmap(function, (None, *[0] * len(arrays)))
        program = jax.jit(aj.parallel.each_with_its_rows(of_rows, self.mesh, [False, *[True] * len(arrays)]))
        if keep is not None:
            program = self.programs.setdefault(keep, program)
        found = program(aj.parallel.replicate(shared or self.classifier, self.mesh), *arrays)
        return jax.tree.map(lambda array: np.asarray(array)[:count], found)


worker, say = Worker(), sys.stdout
sys.stdout = sys.stderr
for line in sys.stdin:
    options = json.loads(line)
    began = time.perf_counter()
    found = getattr(worker, options.pop("do"))(**options) or {}
    print(json.dumps({"seconds": time.perf_counter() - began} | found), file=say, flush=True)
