"""The command line: flags to frozen configs, progress bars, printed tables; nothing else."""

import dataclasses
import difflib
import importlib
import math
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import jax
import tqdm
import tyro
from etils import epath

from ancer_jax import report
from ancer_jax.certification import CertifyConfig
from ancer_jax.classifiers import Classifier
from ancer_jax.data import BUNDLED_SUBSET, Dataset, load_dataset, select
from ancer_jax.data.pictures import Crop
from ancer_jax.leakage import LeakageConfig
from ancer_jax.models import load_bundled
from ancer_jax.models.checkpoints import Trained, image_shape, is_network, load_network, make_network, save_network
from ancer_jax.models.torch_import import convert_torch, read_torch
from ancer_jax.optimize import AnisotropicConfig, Guard, IsotropicConfig, Objective, SearchConfig
from ancer_jax.pipeline import Execution, Method, RunConfig, certify_dataset
from ancer_jax.runs import MEMORY, read_run
from ancer_jax.training import HISTORY, PRESETS, TrainingMethod, train
from ancer_jax.training.loop import SETTINGS, STATE, TABLE

_SIGMA_FACTORS = {"theta": 1.0, "rs4a": math.sqrt(3), "ancer": 1 / math.sqrt(3)}
CURVES = "training.png"
_RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


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
    """l2: Gaussian noise (Cohen et al. 2019); l1: uniform noise (Yang et al. 2020)."""
    method: Method = "ancer"
    """fixed: one theta for all; isotropic: one per image (Alfarra et al. 2022); ancer: one per pixel (Eiras et al.
    2022)."""
    sigma: float | None = None
    """Noise theta in image units, pixels in [0, 1]: the fixed one, or where the search starts. Standard deviation for
    l2, half-width of the uniform noise for l1. Default: what the bundled classifier (0.25, 0.5), or the network in the
    folder, was trained with."""
    sigma_convention: Literal["theta", "rs4a", "ancer"] = "theta"
    """Only for l1, to compare with published runs: rs4a takes sigma as standard deviation (theta = sigma * sqrt(3)),
    ancer as its scripts do (theta = sigma / sqrt(3))."""
    n0: int = CertifyConfig.n0
    """Draws that select the class (Cohen et al. 2019: 100)."""
    n: int = CertifyConfig.n
    """Draws that estimate its probability (Cohen et al. 2019: 100,000)."""
    alpha: float = CertifyConfig.alpha
    """Probability that a certificate is wrong, per image (Cohen et al. 2019: 0.001)."""
    skip: int = 1
    """Take every skip-th image."""
    max: int | None = None
    """Take this many images at most."""
    seed: int = 0
    """Seed of all draws."""
    iso_steps: int = IsotropicConfig.steps
    """Steps of the isotropic search (Alfarra et al. 2022: 900)."""
    iso_lr: float = IsotropicConfig.learning_rate
    """Its step size, plain gradient ascent (reference: 0.04)."""
    iso_samples: int = IsotropicConfig.num_samples
    """Its draws per step (reference: 100)."""
    ancer_steps: int = AnisotropicConfig.steps
    """Steps of the anisotropic search (Eiras et al. 2022: 100)."""
    ancer_lr: float = AnisotropicConfig.learning_rate
    """Its step size, Adam (reference: 0.04)."""
    ancer_samples: int = AnisotropicConfig.num_samples
    """Its draws per step (reference: 100)."""
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
    batch_size: int = Execution.batch_size
    """Images at a time; speed only."""
    chunk: int = Execution.chunk
    """Noisy copies of each image at a time; speed and memory only."""
    devices: int | None = None
    """Local devices to use; default all."""
    out: str | None = None
    """Run directory; default runs/<norm>-<method>-<sigma>."""

    def run(self) -> None:
        """Certify, then print the table of this run."""
        classifier, sigma = _classifier(self.classifier, self.norm, self.sigma)
        dataset = select(load_dataset(self.data, split=self.split, crop=self.crop), skip=self.skip, max_images=self.max)
        out = self.out or f"runs/{self.norm}-{self.method}-{sigma:g}"
        self.certify(classifier, dataset, sigma, out)
        _report([out], None)

    def certify(self, classifier: Classifier, dataset: Dataset, sigma: float, out: str) -> None:
        """One run, with a progress bar."""
        if self.sigma_convention != "theta" and self.norm != "l1":
            raise ValueError("--sigma-convention is for --norm l1; for l2, sigma is the standard deviation")
        search: dict[str, Any] = {
            "objective": self.objective,
            "theta_max": self.theta_max,
            "leakage_weight": self.leakage_weight,
        }
        config = RunConfig(
            norm=self.norm,
            method=self.method,
            theta=sigma * _SIGMA_FACTORS[self.sigma_convention],
            certify=CertifyConfig(n0=self.n0, n=self.n, alpha=self.alpha),
            isotropic=IsotropicConfig(
                steps=self.iso_steps, num_samples=self.iso_samples, learning_rate=self.iso_lr, **search
            ),
            anisotropic=AnisotropicConfig(
                steps=self.ancer_steps,
                num_samples=self.ancer_samples,
                learning_rate=self.ancer_lr,
                kappa=self.kappa,
                **search,
            ),
            guard=self.guard,
            guard_samples=self.guard_samples,
            leakage=LeakageConfig(self.leakage_references, self.leakage_samples) if self.leakage else None,
            leakage_limit=self.leakage_limit,
            seed=self.seed,
        )
        execution = Execution(self.batch_size, self.chunk, self.devices)
        title = f"{self.method} {sigma:g}"
        # The delay keeps the bar back until the run is open: an error before that is one line alone.
        with tqdm.tqdm(total=len(dataset), unit="image", desc=title, smoothing=0, delay=1e-6) as bar:
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

    def run(self) -> None:
        """Certify with eight settings, print the table, draw the pictures."""
        bundled = load_bundled(self.norm)
        whole = load_dataset(BUNDLED_SUBSET)
        dataset = select(whole, skip=len(whole) // min(max(self.max, 1), len(whole)), max_images=self.max)
        out = self.out or f"demo-{self.norm}"
        runs: list[str] = []
        factors = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
        fixed: list[tuple[Method, float]] = [("fixed", f * bundled.theta) for f in factors]
        for method, sigma in [*fixed, ("isotropic", bundled.theta), ("ancer", bundled.theta)]:
            # A hundred steps of the isotropic search are enough here; 900 are the reference's.
            command = Certify(norm=self.norm, method=method, n=self.n, iso_steps=100)
            name = f"{method}-{sigma:g}" if method == "fixed" else method
            runs.append(f"{out}/{name}")
            command.certify(bundled.classifier, dataset, sigma, runs[-1])
        _report(runs, out)
        print("\nMean proxy radius (of the ball of the same volume) after memory, wrong answers included:")
        print(report.compare_proxy_radius([report.load_results(run) for run in runs]))


@dataclasses.dataclass(frozen=True)
class Convert:
    """Turn a PyTorch checkpoint into the folder of a network, which certify takes as its classifier."""

    checkpoint: tyro.conf.Positional[str]
    """PyTorch file (read with weights_only: code in it is refused, never run), or safetensors file."""
    network: str
    """Which network it is of: cifar_resnet110 and cifar_resnet20 (Cohen et al. 2019), imagenet_resnet50 (torchvision),
    ancer_resnet18 (Eiras et al. 2022), wrn_40_2 (Yang et al. 2020), cifar_resnet18, efficientnet_lite0."""
    out: str
    """New folder."""
    num_classes: int | None = None
    """Number of classes; default: that of the network's usual data set (10, 1000)."""
    norm: Literal["l2", "l1"] = "l2"
    """What noise it was trained with: l2 Gaussian, l1 uniform."""
    sigma: float | None = None
    """Noise theta it was trained with, in units of pixels in [0, 1]; certify's default."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel in its normalisation; default: the usual one. A checkpoint with another is refused."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel, likewise."""
    image_size: int | None = None
    """Height and width of its images; default: those of the network's usual data set (32, 224)."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of its layers; another one is another base classifier."""

    def run(self) -> None:
        """Read, convert, store."""
        asked = {name: getattr(self, name) for name in ("num_classes", "mean", "std", "compute_dtype")}
        attributes = {name: value for name, value in asked.items() if value is not None}
        network, shape = make_network(self.network, **attributes), image_shape(self.network)
        if self.image_size is not None:
            shape = (self.image_size, self.image_size, shape[-1])
        variables = convert_torch(network, read_torch(self.checkpoint), shape)
        history = {"converted_from": epath.Path(self.checkpoint).name}
        save_network(Trained(self.network, attributes, variables, shape, self.norm, self.sigma, history), self.out)
        count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        print(f"{self.out}: {self.network}, {count:,} parameters, {network.num_classes} classes")


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a network for smoothing; started again, it continues. Defaults are the method's published ones."""

    out: str
    """Folder of the network, for certify --classifier; it also holds what training goes on from."""
    data: str = BUNDLED_SUBSET
    """Data set, as in certify: its split train is trained on, its split test is measured."""
    network: str = "small_cnn"
    """small_cnn, cifar_resnet20, cifar_resnet110, cifar_resnet18, ancer_resnet18, wrn_40_2, imagenet_resnet50 or
    efficientnet_lite0."""
    method: TrainingMethod = "augmentation"
    """augmentation (Cohen et al. 2019), smoothadv (Salman et al. 2019), macer (Zhai et al. 2020), consistency (Jeong &
    Shin 2020) or stability (Yang et al. 2020)."""
    norm: Literal["l2", "l1"] = "l2"
    """l2: Gaussian noise; l1: uniform noise."""
    sigma: float = 0.25
    """Noise theta, in units of pixels in [0, 1]: standard deviation, or half-width of the uniform noise."""
    epochs: int | None = None
    """Times that every image is seen."""
    batch_size: int | None = None
    """Images per step, each with its noisy copies."""
    copies: int | None = None
    """Noisy copies of each image (m)."""
    lr: float | None = None
    """Learning rate of SGD, at the start."""
    drop_every: int | None = None
    """Epochs after which the learning rate falls to a tenth, again and again; 0 is a cosine to 0."""
    weight: float | None = None
    """Weight of the method's second term (macer, consistency, stability)."""
    epsilon: float | None = None
    """SmoothAdv: l2 radius of its attack, in units of pixels in [0, 1]."""
    attack_steps: int | None = None
    """SmoothAdv: its steps."""
    warmup: int | None = None
    """SmoothAdv: epochs in which the radius grows."""
    shift: int | None = None
    """Images are shifted at random by up to so many pixels."""
    flip: bool = True
    """Images are mirrored at random."""
    crop: Crop = "none"
    """What is done to pictures, as in certify."""
    max: int | None = None
    """Train on this many images at most."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the network's layers."""
    seed: int = 0
    """Of everything that is drawn."""

    def run(self) -> None:
        """Train, store the network, draw its curves."""
        train_set, test_set = (load_dataset(self.data, split=split, crop=self.crop) for split in ("train", "test"))
        if train_set.fingerprint == test_set.fingerprint:
            raise ValueError(f"{self.data} has one split only: it would be tested on the images it was trained on")
        train_set = select(train_set, max_images=self.max)
        preset = PRESETS[self.method]
        asked = {
            "epochs": self.epochs, "batch_size": self.batch_size, "copies": self.copies, "learning_rate": self.lr,
            "weight": self.weight, "epsilon": self.epsilon, "attack_steps": self.attack_steps,
            "warmup_epochs": self.warmup, "shift": self.shift,
        }  # fmt: skip
        changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        if self.drop_every is not None:
            changes["drop_every"] = self.drop_every or None
        config = dataclasses.replace(
            preset, norm=self.norm, theta=self.sigma, flip=self.flip, seed=self.seed, **changes
        )
        attributes = {"num_classes": train_set.num_classes, "compute_dtype": self.compute_dtype}
        total = config.epochs * (len(train_set) // config.batch_size)
        with tqdm.tqdm(total=total, unit="step", desc=f"{self.network}, {self.method}", smoothing=0, delay=1e-6) as bar:

            def progress(steps: int, figures: dict[str, float]) -> None:
                if bar.delay:
                    bar.delay, bar.initial = 0, steps
                bar.update(steps)
                if figures:
                    bar.set_postfix({name: f"{figures[name]:.3f}" for name in ("train_loss", "test_accuracy")})

            network = make_network(self.network, **attributes)
            state = train(network, train_set, test_set, config, out=self.out, progress=progress)
        if not is_network(self.out):
            history = dataclasses.asdict(config) | {"data": self.data, "test_accuracy": float(state.history[-1, 5])}
            trained = Trained(
                self.network, attributes, state.variables, train_set.images.shape[1:], self.norm, self.sigma, history
            )
            save_network(trained, self.out, beside=(SETTINGS, STATE, TABLE, CURVES))
        report.plot_training(dict(zip(HISTORY, state.history.T, strict=True)), epath.Path(self.out) / CURVES)
        last = dict(zip(HISTORY, state.history[-1], strict=True))
        print(
            f"{self.out}: accuracy {last['test_accuracy']:.4f} of {len(test_set):,} test images under one draw of the"
        )
        print(f"noise; {TABLE} and {CURVES} show how it came to that")


@dataclasses.dataclass(frozen=True)
class Report:
    """Compare runs: a table of certified accuracy, curves and theta maps as PNG."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run directories, or TSV files (ours, Cohen's, ANCER's)."""
    radii: tuple[float, ...] | None = None
    """Radii at which to list certified accuracy."""
    leakage_limit: float = report.LEAKAGE_LIMIT
    """Leakage above which a theta counts as certifying nothing, in the figures that say so."""
    orders: int = 0
    """Put the runs with a memory through it in this many random orders, too, and show how far the figures move."""
    out: str = "report"
    """Folder of the pictures."""

    def run(self) -> None:
        """Print the table, draw the pictures."""
        if not self.runs:
            raise ValueError("name at least one run directory or TSV file")
        if self.orders < 0:
            raise ValueError(f"--orders must not be negative, got {self.orders}")
        if not 0 <= self.leakage_limit <= 1:
            raise ValueError(f"--leakage-limit must be in [0, 1], got {self.leakage_limit}")
        if not all(0 <= radius < math.inf for radius in self.radii or ()):
            raise ValueError(f"--radii must be finite and not negative, got {self.radii}")
        with_memory = [run for run in self.runs if (epath.Path(run) / MEMORY).exists()]
        if self.orders and not with_memory:
            raise ValueError("--orders needs a run directory with a memory")
        _report(list(self.runs), self.out, self.radii, self.leakage_limit)
        if self.orders:
            print("\nIn order of ids (and the range over random orders)\n")
            print(report.order_table(with_memory, orders=self.orders))


def _classifier(name: str, norm: str, sigma: float | None) -> tuple[Classifier, float]:
    """The classifier of that name, and sigma, by default the bundled classifier's."""
    if name == "bundled":
        bundled = load_bundled(norm)
        return bundled.classifier, bundled.theta if sigma is None else sigma
    if is_network(name):
        trained = load_network(name)
        known = trained.theta if trained.norm == norm else None
        sigma = known if sigma is None else sigma
        if sigma is None:
            raise ValueError(f"--sigma is needed: {name} does not say what {norm} noise it was trained with")
        return trained.classifier, sigma
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
    return classifier, sigma


def _report(
    runs: list[str], out: str | None, radii: Sequence[float] | None = None, leakage_limit: float = report.LEAKAGE_LIMIT
) -> None:
    """Print the table of the runs; with `out`, draw the pictures there."""
    results = [report.load_results(run) for run in runs]
    if len({r.name for r in results}) < len(runs):
        results = [dataclasses.replace(r, name=run) for r, run in zip(results, runs, strict=True)]
    notes = [] if out is None else _draw(runs, results, epath.Path(out))
    print(report.summary_table(results, list(radii or _RADII), leakage_limit), *notes, sep="\n\n")


def _draw(runs: list[str], results: list[report.Results], folder: epath.Path) -> list[str]:
    """Curves of all runs and theta maps of each; what was drawn and what was not, as lines."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn, missing = [folder / "certified_accuracy.png"], []
    report.plot_certified_accuracy(results, drawn[0])
    for i, run in enumerate(runs):
        if not epath.Path(run).is_dir() or "anisotropic" not in read_run(run).settings:
            continue
        path = folder / f"theta_{epath.Path(run).name}.png"
        if path in drawn:
            path = folder / f"theta_{epath.Path(run).name}_{i}.png"
        if report.plot_theta(read_run(run), _images_of(run), path):
            drawn.append(path)
        else:
            missing.append(f"no theta maps of {run}: its images are not among the bundled ones")
    return ["pictures: " + ", ".join(map(str, drawn)), *missing]


def _images_of(run: str):
    """id -> image of the run's data set, where it is one of the bundled ones."""
    for split in ("test", "train"):
        dataset = load_dataset(BUNDLED_SUBSET, split=split)
        if dataset.fingerprint == read_run(run).settings["data"]["fingerprint"]:
            return {int(i): dataset.images[row] for row, i in enumerate(dataset.ids)}
    return {}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `ancer-jax`: bad input gets one line and exit status 2."""
    commands = {"demo": Demo, "certify": Certify, "train": Train, "convert": Convert, "report": Report}
    command = tyro.extras.subcommand_cli_from_dict(commands, prog="ancer-jax", args=arguments)
    previous = signal.signal(signal.SIGINT, _stop)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"ancer-jax: warning: {message}", file=sys.stderr)
            command.run()
    except (ValueError, OSError, ImportError) as error:
        print(f"ancer-jax: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        signal.signal(signal.SIGINT, previous)


def _stop(*_) -> None:
    """Leave at once: what is finished is stored, and an orderly exit under running XLA threads can crash or hang."""
    print("\nancer-jax: stopped; start the same command again to continue", file=sys.stderr, flush=True)
    os._exit(130)


if __name__ == "__main__":
    main()
