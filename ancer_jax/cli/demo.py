"""`ancer-jax demo`: the main job on bundled images."""

import dataclasses

from ancer_jax import devices, report
from ancer_jax.cli.certify import Certify
from ancer_jax.cli.report import Report
from ancer_jax.cli.runtime import Runtime
from ancer_jax.data import BUNDLED_SUBSET, load_dataset, select
from ancer_jax.metrics import round_down
from ancer_jax.models import BUNDLED_BY_NORM, BundledModel, load_bundled
from ancer_jax.models.bundled import COLOURED
from ancer_jax.runs.config import Method, Norm


@dataclasses.dataclass(frozen=True)
class Demo:
    """Certify real images (Fashion-MNIST, bundled) with fixed, isotropic, anisotropic and coloured noise, and compare
    them."""

    norm: Norm = "l2"
    """l2: Gaussian noise; l1: uniform noise."""
    max: int = 30
    """How many of the 500 bundled test images, spread evenly."""
    n: int = 10_000
    """Draws per certificate."""
    out: str | None = None
    """Folder of the runs and pictures; default demo-<norm>. Started again, it continues there."""
    compilation_cache: bool = Runtime.compilation_cache
    """Keep compiled programs in the user's cache folder, so that starting again is quick."""

    def run(self) -> None:
        """Certify by all methods, print the table, draw the pictures."""
        devices.use_all_cores()
        Runtime(self.compilation_cache).start(survive=True)
        bundled = load_bundled(BUNDLED_BY_NORM[self.norm])
        whole = load_dataset(BUNDLED_SUBSET)
        dataset = select(whole, skip=len(whole) // min(max(self.max, 1), len(whole)), max_images=self.max)
        out = self.out or f"demo-{self.norm}"

        def certify(name: str, method: Method, sigma: float, seed: int, model: BundledModel = bundled) -> str:
            command = Certify(norm=self.norm, method=method, n=self.n, seed=seed)
            command.certify(model.classifier, dataset, sigma, f"{out}/{name}", model.theta_map)
            return f"{out}/{name}"

        # The best fixed theta is chosen by the draws of one seed, and certified by those of another: a theta chosen by
        # the draws that certify it is wrong more often than alpha.
        sigmas = [factor * bundled.theta for factor in (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)]
        tried = [report.load_results(certify(f"try-{sigma:g}", "fixed", sigma, 1)) for sigma in sigmas]
        best = max(zip(sigmas, tried, strict=True), key=lambda pair: pair[1].mean_proxy_radius)[0]
        runs = [certify(f"fixed-{best:g}", "fixed", best, 0)]
        runs += [certify(method, method, bundled.theta, 0) for method in ("isotropic", "ancer")]
        if self.norm == "l2":
            coloured = load_bundled(COLOURED)
            assert coloured.checkpoint.theta is not None
            runs.append(certify("coloured", "universal", coloured.checkpoint.theta, 0, coloured))
        print("Fixed thetas, tried with another seed:")
        for sigma, r in zip(sigmas, tried, strict=True):
            figures = f"accuracy {round_down(r.correct.mean(), 3)}, proxy radius {round_down(r.mean_proxy_radius, 3)}"
            print(f"  {sigma:<7g} {figures}")
        print()
        results = Report(tuple(runs), out=out).run()
        if self.norm == "l2":
            print(f"\ncoloured: one theta for each spatial frequency, and a network of its own, {COLOURED}.")
        print("\nMean proxy radius (of the ball of the same volume) after memory, wrong answers included:")
        print(report.compare_proxy_radius(results, results[0]))
