"""`ancer-jax certify` and `ancer-jax demo`: flags to a `RunConfig`, a progress bar, a table."""

import dataclasses
import decimal
import difflib
import importlib
import math
import sys
import warnings
from typing import Any, Literal

import jax
import numpy as np
import tqdm
import tyro
from etils import epath

from ancer_jax import parallel, report
from ancer_jax._checks import check_real
from ancer_jax.certificates import Noise
from ancer_jax.certification import CertifyConfig
from ancer_jax.classifiers import Classifier
from ancer_jax.cli.report import RADII, draw, parse_radii, print_table
from ancer_jax.cli.runtime import Runtime, leave
from ancer_jax.config import Execution, Method, Precision, RunConfig, Split
from ancer_jax.data import BUNDLED_SUBSET, Dataset, check_classes, load_dataset, select, share
from ancer_jax.data.pictures import Crop
from ancer_jax.leakage import LeakageConfig
from ancer_jax.metrics import round_down
from ancer_jax.models import load_bundled
from ancer_jax.models.checkpoints import Trained, is_network, load_network
from ancer_jax.optimize import AnisotropicConfig, Guard, IsotropicConfig, Objective, SearchConfig
from ancer_jax.pipeline import certify_dataset
from ancer_jax.regions import geometric_mean
from ancer_jax.runs import read_run
from ancer_jax.sequential import SequentialConfig
from ancer_jax.storage import read_array
from ancer_jax.training.loop import SETTINGS

_SIGMA_FACTORS = {"theta": 1.0, "rs4a": math.sqrt(3), "ancer": 1 / math.sqrt(3)}


@dataclasses.dataclass(frozen=True)
class Certify:
    """Find theta, certify every image, and store the results in a run directory; started again, it continues."""

    data: str = BUNDLED_SUBSET
    """Data set: fashion-mnist-subset (bundled); tfds:NAME or tfds:NAME@FOLDER (prepared TensorFlow data set); an npz
    file (images, labels[, ids]); or a folder of idx files, of CIFAR-10's binary files, or of a folder of pictures for
    each class."""
    split: str = "test"
    """Which part of the data set: test or train; for tfds and pictures whatever there is."""
    crop: Crop = "none"
    """What is done to pictures: nothing, or imagenet: the shorter side to 256, then the central 224 x 224."""
    classifier: str = "bundled"
    """Base classifier: bundled; the folder of a network (of convert or train); or module:function, of a function
    without arguments that returns a Classifier."""
    norm: Literal["l2", "l1"] = "l2"
    """l2: Gaussian noise (Cohen et al. 2019); l1: uniform noise (Yang et al. 2020), or --noise."""
    noise: Noise | None = None
    """For l1: uniform, or splitting (Levine & Feizi 2021). Default: what the network was trained with."""
    exact: bool = False
    """For splitting noise and images of 8 bits: count all draws there are, instead of --n random ones. No alpha."""
    period: int = RunConfig.period
    """For --exact with one theta per pixel: how many draws that are; 510 theta is rounded down to its divisors."""
    method: Method = "ancer"
    """fixed: one theta for all; shared: one per pixel, the same for all images (--theta-map); isotropic: one per image
    (Alfarra et al. 2022); ancer: one per pixel and image (Eiras et al. 2022)."""
    sigma: float | None = None
    """Noise theta in image units, pixels in [0, 1]: the fixed one, or where the search starts. Standard deviation for
    l2, half-width of the uniform noise for l1, half the distance of cuts for splitting. Default: what the bundled
    classifier (0.25, 0.5), or the network in the folder, was trained with."""
    theta_map: str | None = None
    """For shared: .npy file of theta, an array of the shape of an image (of differentiable.learn_theta, say)."""
    sigma_convention: Literal["theta", "rs4a", "ancer"] = "theta"
    """Only for l1, to compare with published runs: rs4a takes sigma as standard deviation (theta = sigma * sqrt(3)),
    ancer as its scripts do (theta = sigma / sqrt(3))."""
    n0: int = CertifyConfig.n0
    """Draws that select the class (Cohen et al. 2019: 100)."""
    n: int = CertifyConfig.n
    """Draws that estimate its probability (Cohen et al. 2019: 100,000)."""
    alpha: float = CertifyConfig.alpha
    """Probability that a certificate fails, for each image (Cohen et al. 2019: 0.001)."""
    alpha_run: float | None = None
    """Instead of --alpha: probability that any certificate of the table fails; each image gets its share. No images can
    be added to such a run."""
    sampling: Literal["fixed", "sequential"] = "fixed"
    """fixed: n draws for every image; sequential: at most n, as many as --radii or --tolerance need; alpha holds."""
    radii: tuple[str, ...] | None = None
    """For sequential: radii like 0,0.25,0.5; an image is done when it is decided which of them it reaches."""
    tolerance: float | None = None
    """For sequential: an image is done when its region is smaller by about this share than n draws would make it."""
    skip: int = 1
    """Take every skip-th image."""
    max: int | None = None
    """Take this many images at most."""
    seed: int = 0
    """Seed of all draws."""
    preset: Literal["fast", "reference"] = "fast"
    """How theta is searched: fast, Adam over log(theta), with a tenth of the passes; or as the papers' code does it."""
    iso_steps: int | None = None
    """Steps of the isotropic search (fast: 20; Alfarra et al. 2022: 900)."""
    iso_lr: float | None = None
    """Its step size (fast: 0.2 of log(theta); reference: 0.04 of theta)."""
    iso_samples: int | None = None
    """Its draws per step (fast: 32; reference: 100)."""
    ancer_steps: int | None = None
    """Steps of the anisotropic search (fast: 100; Eiras et al. 2022: 100)."""
    ancer_lr: float | None = None
    """Its step size (fast: 0.08 of log(theta); reference: 0.04 of theta)."""
    ancer_samples: int | None = None
    """Its draws per step (fast: 64; reference: 100)."""
    kappa: float = AnisotropicConfig.kappa
    """Weight of min(theta) in its objective (reference: 2)."""
    objective: Objective = AnisotropicConfig.objective
    """Objective of both searches: ancer (the paper's) or log_volume."""
    theta_max: float | None = None
    """Upper bound of theta in both searches; default 4 * sigma; inf for no bound, which lets the noise run away."""
    guard: Guard = "volume"
    """Keep the isotropic theta unless the anisotropic one has the larger volume / contains its region; off: never."""
    guard_samples: int = RunConfig.guard_samples
    """Draws for that choice, for each theta; none of them certifies."""
    memory: bool = True
    """Put data-dependent certificates through a memory, in order of ids: what makes them those of one classifier."""
    leakage: bool = True
    """Measure how many other images each found theta sends to its image's class."""
    leakage_references: int = LeakageConfig.num_references
    """Other images that are asked, drawn from the data set by the seed."""
    leakage_samples: int = LeakageConfig.num_samples
    """Draws for each of them."""
    leakage_weight: float = SearchConfig.leakage_weight
    """Penalty on leakage in both searches: taken off the objective, times the mean probability that 32 other images get
    the class (ours; 0 is none, 1 to 20 trade size for honesty)."""
    leakage_limit: float | None = None
    """Do not take a theta that leaks more than this share: anisotropic gives way to isotropic, isotropic to sigma."""
    batch_size: int | None = None
    """Images at a time; speed only. Default: 32 for each device (10 for a CPU), or what its memory can take."""
    chunk: int | None = None
    """Noisy copies of each image at a time; speed only. Default: 128 (on a CPU 100), or what memory can take."""
    devices: int | None = None
    """Local devices to use; default all. Without an accelerator each core is one, up to eight."""
    split_devices: Split = "images"
    """What the devices share in searches: images, for throughput; or the draws of one image after another, for few
    (not on several CPU devices)."""
    precision: Precision = RunConfig.precision
    """Of the network's products of matrices, on accelerators: default is the device's usual one (TF32 on recent GPUs,
    bfloat16 on TPUs), highest is float32. Serve with the same."""
    runtime: tyro.conf.OmitArgPrefixes[Runtime] = Runtime()
    out: str | None = None
    """Run directory; default runs/<norm>-<method>-<sigma>. Processes that share a run share it, too."""

    def run(self) -> None:
        """Certify, then print the table of this run."""
        parallel.use_all_cores()
        self.runtime.start(survive=True)
        theta_map = None
        if self.theta_map is not None:
            if self.sigma is not None or self.sigma_convention != "theta":
                raise ValueError("--theta-map holds theta itself: --sigma and --sigma-convention do not go with it")
            theta_map = read_array(self.theta_map)
            if not (theta_map > 0).all():
                raise ValueError(f"--theta-map {self.theta_map}: theta must be positive, got {theta_map.min()}")
        sigma = self.sigma if theta_map is None else float(f"{geometric_mean(theta_map):.4g}")  # a name, then
        classifier, sigma, trained = _classifier(self.classifier, self.norm, sigma)
        dataset = select(load_dataset(self.data, split=self.split, crop=self.crop), skip=self.skip, max_images=self.max)
        if trained is not None:
            _check_fit(self.classifier, trained, dataset)
        command = self
        if self.noise is None and trained is not None and trained.norm == self.norm:
            command = dataclasses.replace(self, noise=trained.history.get("noise"))
        law = "splitting-" * (command.noise == "splitting") + "exact-" * self.exact
        out = self.out or f"runs/{self.norm}-{law}{self.method}-{sigma:g}"
        command.certify(classifier, dataset, sigma, out, theta_map)
        if self.runtime.multihost:
            left = len(dataset) - len(read_run(out).done() & {*dataset.ids.tolist()})
            print(f"process {jax.process_index()} of {jax.process_count()} has done its share; {left} images are left")
            leave()
        print_table([out], parse_radii(self.radii) or RADII)

    def _search(self, config, steps: int | None, num_samples: int | None, learning_rate: float | None, **more: Any):
        asked = {"steps": steps, "num_samples": num_samples, "learning_rate": learning_rate}
        return (config.reference if self.preset == "reference" else config)(
            objective=self.objective,
            theta_max=self.theta_max,
            leakage_weight=self.leakage_weight,
            **{name: value for name, value in asked.items() if value is not None},
            **more,
        )

    def _sampling(self) -> SequentialConfig | None:
        if self.sampling == "sequential":
            if self.radii is None and self.tolerance is None:
                raise ValueError("--sampling sequential needs --radii (0,0.25,0.5, say) or --tolerance (0.02, say)")
            return SequentialConfig(parse_radii(self.radii), self.tolerance)
        if self.radii is not None or self.tolerance is not None:
            raise ValueError("--radii and --tolerance are for --sampling sequential")
        return None

    def certify(
        self, classifier: Classifier, dataset: Dataset, sigma: float, out: str, theta_map: np.ndarray | None = None
    ) -> None:
        """One run, with a progress bar."""
        if self.sigma_convention != "theta" and (self.norm != "l1" or self.noise == "splitting"):
            raise ValueError("--sigma-convention is for the uniform noise of --norm l1")
        alpha = self.alpha
        if self.alpha_run is not None:
            if self.alpha != CertifyConfig.alpha:
                raise ValueError("--alpha is of each certificate, --alpha-run of all: name one of them")
            alpha = _share_of_alpha(self.alpha_run, len(dataset))
        config = RunConfig(
            norm=self.norm,
            noise=self.noise,
            exact=self.exact,
            period=self.period,
            method=self.method,
            theta=sigma * _SIGMA_FACTORS[self.sigma_convention],
            certify=CertifyConfig(n0=self.n0, n=self.n, alpha=alpha),
            sampling=self._sampling(),
            isotropic=self._search(IsotropicConfig, self.iso_steps, self.iso_samples, self.iso_lr),
            anisotropic=self._search(
                AnisotropicConfig, self.ancer_steps, self.ancer_samples, self.ancer_lr, kappa=self.kappa
            ),
            guard=self.guard,
            guard_samples=self.guard_samples,
            leakage=LeakageConfig(self.leakage_references, self.leakage_samples) if self.leakage else None,
            leakage_limit=self.leakage_limit,
            seed=self.seed,
            precision=self.precision,
        )
        execution = Execution(self.batch_size, self.chunk, self.devices, self.split_devices)
        mine = share(dataset, process_index=jax.process_index(), process_count=jax.process_count())
        total, title = 0 if mine is None else len(mine), f"{self.method} {sigma:g}"
        # The delay keeps the bar back until the run is open: an error before that is one line alone.
        with tqdm.tqdm(total=total, unit="image", desc=title, smoothing=0, delay=1e-6) as bar:
            answered = 0

            def progress(images: int) -> None:
                if bar.delay:  # the first call: images that an earlier process finished say nothing about speed
                    bar.delay, bar.initial = 0, images
                bar.update(images)

            def reconciled(images: int) -> None:
                nonlocal answered
                answered += images
                bar.set_postfix_str(f"{answered} through the memory")

            certify_dataset(
                classifier,
                dataset,
                config,
                out=out,
                theta_map=theta_map,
                execution=execution,
                reconcile=self.memory,
                progress=progress,
                reconciled=reconciled,
            )


@dataclasses.dataclass(frozen=True)
class Demo:
    """Certify real images (Fashion-MNIST, bundled) with fixed, isotropic and anisotropic noise, and compare them."""

    norm: Literal["l2", "l1"] = "l2"
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
        parallel.use_all_cores()
        Runtime(self.compilation_cache).start(survive=True)
        bundled = load_bundled(self.norm)
        whole = load_dataset(BUNDLED_SUBSET)
        dataset = select(whole, skip=len(whole) // min(max(self.max, 1), len(whole)), max_images=self.max)
        out = self.out or f"demo-{self.norm}"

        def certify(name: str, method: Method, sigma: float, seed: int) -> str:
            command = Certify(norm=self.norm, method=method, n=self.n, seed=seed)
            command.certify(bundled.classifier, dataset, sigma, f"{out}/{name}")
            return f"{out}/{name}"

        # The best fixed theta is chosen by the draws of one seed, and certified by those of another: what is chosen by
        # the draws that certify it is wrong more often than alpha.
        sigmas = [factor * bundled.theta for factor in (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)]
        tried = [report.load_results(certify(f"try-{sigma:g}", "fixed", sigma, 1)) for sigma in sigmas]
        best = max(zip(sigmas, tried, strict=True), key=lambda pair: pair[1].mean_proxy_radius)[0]
        runs = [certify(f"fixed-{best:g}", "fixed", best, 0)]
        runs += [certify(method, method, bundled.theta, 0) for method in ("isotropic", "ancer")]
        print("Fixed thetas, tried with another seed:", *_tried(sigmas, tried), "", sep="\n")
        draw(runs, print_table(runs), whole, out)
        print("\nMean proxy radius (of the ball of the same volume) after memory, wrong answers included:")
        results = [report.load_results(run) for run in runs]
        print(report.compare_proxy_radius(results, results[0]))


def _tried(sigmas: list[float], results: list[report.Results]) -> list[str]:
    """A line for each fixed theta that was tried."""
    return [
        f"  {sigma:<7g} accuracy {round_down(r.correct.mean(), 3)}, proxy radius {round_down(r.mean_proxy_radius, 3)}"
        for sigma, r in zip(sigmas, results, strict=True)
    ]


def _share_of_alpha(alpha: float, images: int) -> float:
    """alpha / images, rounded down to six digits, so that so many of them are at most alpha."""
    check_real("alpha_run", alpha, "(0, 1)")
    with decimal.localcontext(prec=6, rounding=decimal.ROUND_DOWN):
        return float(decimal.Decimal(repr(alpha)) / images)


def _check_fit(name: str, trained: Trained, dataset: Dataset) -> None:
    """Whether the data are what the network was trained on, as far as it knows."""
    shape = tuple(dataset.images.shape[1:])
    if shape != trained.image_shape:
        sizes = (" x ".join(map(str, sizes)) for sizes in (trained.image_shape, shape))
        raise ValueError("{} takes images {}, the data are {} (--classifier, --data, --crop)".format(name, *sizes))
    check_classes(dataset, trained.classes)
    if 2 * dataset.num_classes <= trained.network.num_classes:
        warnings.warn(
            f"{dataset.name} has labels of {dataset.num_classes} classes, {name} knows {trained.network.num_classes}",
            stacklevel=2,
        )


def _classifier(name: str, norm: str, sigma: float | None) -> tuple[Classifier, float, Trained | None]:
    """The classifier of that name; sigma, by default that of its training; and what is known of that training."""
    if name == "bundled":
        bundled = load_bundled(norm)
        known = Trained("small_cnn", {}, bundled.classifier.variables, (28, 28, 1), norm, bundled.theta)
        return bundled.classifier, bundled.theta if sigma is None else sigma, known
    if is_network(name):
        trained = load_network(name)
        noise = f"{trained.norm} noise" + ("" if trained.theta is None else f" of {trained.theta:g}")
        if trained.norm != norm and trained.theta is not None:
            if sigma is None:
                raise ValueError(f"{name} was trained with {noise}: --sigma is needed to certify it under {norm} noise")
            warnings.warn(f"{name} was trained with {noise}, not with {norm} noise", stacklevel=2)
        sigma = trained.theta if sigma is None else sigma
        if sigma is None:
            raise ValueError(f"--sigma is needed: {name} does not say what noise it was trained with")
        return trained.classifier, sigma, trained
    path = epath.Path(name)
    if path.is_file():
        raise ValueError(f"--classifier {name} is a file: ancer-jax convert makes a folder of a checkpoint")
    if (path / SETTINGS).exists():
        raise ValueError(f"--classifier {name}: its training is not finished; the same ancer-jax train goes on")
    module, colon, function = name.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, ["bundled"], n=1, cutoff=0.3)
        hint = "; did you mean 'bundled'?" if near else ""
        raise ValueError(
            f"--classifier {name!r} is neither bundled, nor the folder of a network, nor module:function{hint}"
        )
    if sigma is None:
        raise ValueError("--sigma is needed for your own classifier: the noise it was trained with")
    try:
        sys.path.insert(0, "")
        classifier = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"--classifier {name!r}: {error}") from error
    if not isinstance(classifier, Classifier):
        raise ValueError(f"--classifier {name!r} returned {type(classifier).__name__}, not a Classifier")
    return classifier, sigma, None
