"""`ancer-jax certify`: flags to a `RunConfig`, a progress bar, a table."""

import contextlib
import dataclasses
import decimal
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeVar

import jax
import tqdm
import tyro
from etils import epath

from ancer_jax import devices
from ancer_jax._checks import check_real
from ancer_jax._numerics import geometric_mean
from ancer_jax.basis import Basis, BasisName, KarhunenLoeve, read_basis
from ancer_jax.cli.report import RADII, RadiiFlag, parse_radii, print_table
from ancer_jax.cli.runtime import Runtime, advance, leave
from ancer_jax.data import BUNDLED_SUBSET, Dataset, load_dataset, select, shard
from ancer_jax.data.pictures import Crop
from ancer_jax.models import Checkpoint, check_fit, resolve_classifier
from ancer_jax.runs import CarryRunConfig, carry_run, read_run
from ancer_jax.runs.config import Execution, Method, Norm, Precision, RunConfig, Shard
from ancer_jax.runs.pipeline import certify_dataset
from ancer_jax.search.config import AnisotropicConfig, Guard, IsotropicConfig, LeakageConfig, Objective, SearchConfig
from ancer_jax.search.theta_map import ThetaMap, load_theta_map
from ancer_jax.smoothing.certificate import Bound, CertifyConfig
from ancer_jax.smoothing.classifier import Classifier
from ancer_jax.smoothing.registry import NoiseName
from ancer_jax.smoothing.sequential import SequentialConfig

_SIGMA_FACTORS = {"theta": 1.0, "rs4a": math.sqrt(3), "ancer": 1 / math.sqrt(3)}
# Flags that have no effect where theta is not searched.
_OF_SEARCHES = (
    *("preset", "iso_steps", "iso_lr", "iso_samples", "ancer_steps", "ancer_lr", "ancer_samples", "kappa", "objective"),
    *("theta_max", "guard", "guard_samples", "leakage_probes", "leakage_samples", "leakage_weight", "leakage_limit"),
)
_OF_ANCER = ("ancer_steps", "ancer_lr", "ancer_samples", "kappa", "guard")
# Flags that have an effect with --carry.
_OF_CARRYING = (
    *("data", "split", "crop", "classifier", "carry", "carry_from", "carry_n", "carry_alpha", "skip", "max", "seed"),
    *("memory", "batch_size", "chunk", "devices", "precision", "runtime", "out"),
)
_Search = TypeVar("_Search", bound=SearchConfig)


@dataclasses.dataclass(frozen=True)
class Certify:
    """Find theta, certify every image, and store the results in a run directory; started again, it continues."""

    data: str = BUNDLED_SUBSET
    """Data set: fashion-mnist-subset (bundled); tfds:NAME or tfds:NAME@FOLDER (prepared TensorFlow data set); an npz
    file (images, labels[, ids]); or a folder of idx files, of CIFAR-10's binary files, or of a folder of pictures for
    each class."""
    split: str = "test"
    """Which part of the data set: test or train; for tfds and pictures any split that exists."""
    crop: Crop = "none"
    """What is done to pictures: nothing, or imagenet: the shorter side to 256, then the central 224 x 224."""
    classifier: str = "bundled"
    """Base classifier: bundled, the small network for the bundled images and --norm; the name of another bundled model
    (the guide "bundled models" lists them); the folder of a network (of convert or train); or module:function, of a
    function without arguments that returns a Classifier."""
    norm: Norm = "l2"
    """l2: Gaussian noise (Cohen et al. 2019); l1: uniform noise (Yang et al. 2020), or --noise."""
    noise: NoiseName | None = None
    """For l1: uniform, or splitting (Levine & Feizi 2021). Default: what the network was trained with."""
    exact: bool = False
    """For splitting noise and images of 8 bits: count all draws there are, instead of --n random ones. No alpha."""
    period: int = RunConfig.period
    """For --exact with one theta per pixel: the number of draws; 510 theta is rounded down to a divisor of it."""
    method: Method = "ancer"
    """fixed: one theta for all; universal: one per pixel, or coefficient, the same for all images (--theta-map);
    isotropic: one per image (Alfarra et al. 2022); ancer: one per pixel and image (Eiras et al. 2022)."""
    basis: BasisName | None = None
    """For l2 noise: the basis in which it is independent, and in whose coefficients ancer searches for theta; pixels,
    cosine or karhunen-loeve (of the training images of --data, as in learn-theta). Default: that of --theta-map, or
    pixels."""
    sigma: tuple[float, ...] | None = None
    """Noise theta in image units, pixels in [0, 1]: the fixed one, or where the search starts. Standard deviation for
    l2, half-width of the uniform noise for l1, half the distance of cuts for splitting. Several make a run each, in
    folders of --out. Default: what the bundled model, or the network in the folder, was trained with."""
    theta_map: str | None = None
    """For universal: a theta map (of learn-theta), or an .npy file of theta in --basis, an array of the shape of an
    image. Default: the map that the network was trained with."""
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
    """Instead of --alpha: probability that any certificate of a run's table fails; each image gets its share. No images
    can be added to such a run."""
    bound: Bound = CertifyConfig.bound
    """What bounds the other classes: two-class, all votes that are not for the class; separate, the votes for the
    second class, at half of alpha each, for many classes among which votes are spread."""
    sampling: Literal["fixed", "sequential"] = "fixed"
    """fixed: n draws for every image; sequential: as many as --radii or --tolerance need, at most n, at the same
    alpha."""
    radii: RadiiFlag = None
    """For sequential: radii like 0,0.25,0.5; an image is done when it is decided which of them it reaches."""
    tolerance: float | None = None
    """For sequential: an image is done when its region is smaller by about this share than n draws would make it."""
    skip: int = 1
    """Take every skip-th image."""
    max: int | None = None
    """Take this many images at most."""
    seed: int = 0
    """Seed of all draws."""
    preset: Literal["fast", "published"] = "fast"
    """How theta is searched: fast, Adam over log(theta), with a fourteenth of the passes; or published, the schedule of
    the papers' code."""
    iso_steps: int | None = None
    """Steps of the isotropic search (fast: 20; Alfarra et al. 2022: 900)."""
    iso_lr: float | None = None
    """Its step size (fast: 0.2 of log(theta); published: 0.04 of theta)."""
    iso_samples: int | None = None
    """Its draws per step (fast: 32; published: 100)."""
    ancer_steps: int | None = None
    """Steps of the anisotropic search (fast: 100; Eiras et al. 2022: 100)."""
    ancer_lr: float | None = None
    """Its step size (fast: 0.08 of log(theta); published: 0.04 of theta)."""
    ancer_samples: int | None = None
    """Its draws per step (fast: 64; published: 100)."""
    kappa: float = AnisotropicConfig.kappa
    """Weight of min(theta) in its objective (published: 2)."""
    objective: Objective = AnisotropicConfig.objective
    """Objective of both searches: ancer (the paper's) or log_volume."""
    theta_max: float | None = None
    """Limit of theta in both searches; default 4 * sigma; inf for none, which lets the noise run away."""
    guard: Guard = "volume"
    """When the anisotropic theta replaces the isotropic one. volume: if its region is larger; superset: if its region
    contains the other; off: always."""
    guard_samples: int = RunConfig.guard_samples
    """Draws for that choice, for each theta; none of them certifies."""
    memory: bool = True
    """Put data-dependent certificates through a memory, in order of ids, which makes them those of one classifier."""
    leakage: bool = True
    """Measure how many other images (leakage probes) each found theta sends to its image's class."""
    leakage_probes: int = LeakageConfig.num_probes
    """Number of leakage probes, drawn from the data set by the seed."""
    leakage_samples: int = LeakageConfig.num_samples
    """Draws for each of them."""
    leakage_weight: float = SearchConfig.leakage_weight
    """Leakage penalty in both searches: this times the mean probability that 32 leakage probes get the class is
    subtracted from the objective (ours; 0 is none, 1 to 20 trade size for honesty)."""
    leakage_limit: float | None = None
    """Reject a theta that leaks more than this share: the anisotropic one in favour of the isotropic one, and that in
    favour of sigma."""
    carry: str | None = None
    """Instead of certifying --classifier afresh, carry to it the certificates of this run directory, of another network
    (the guide "changed networks"). Norm, noise, thetas and classes are those of the run."""
    carry_from: str | None = None
    """With --carry: the classifier of that run, written as for --classifier; default: bundled."""
    carry_n: int = CarryRunConfig.n
    """With --carry: draws for each image, on which both networks run."""
    carry_alpha: float | None = None
    """With --carry: probability that an image's certificate fails because of these draws, which adds to the alpha of
    the run; default: a tenth of that."""
    batch_size: int | None = None
    """Images at a time; changes no draw. Default: 32 for each device (10 for a CPU), or what its memory can take."""
    chunk: int | None = None
    """Noisy copies of each image at a time; changes no draw. Default: on a CPU 100, else 4,096 divided by the images of
    a batch on each device, or what memory can take."""
    devices: int | None = None
    """Local devices to use; default all. Without an accelerator each core is one, up to eight."""
    shard_devices: Shard = "images"
    """What the devices share in searches: images, for throughput; or the draws of one image after another, for few
    images (not on several CPU devices)."""
    precision: Precision = RunConfig.precision
    """Precision of the network's matrix products on accelerators: default is the device's usual one (TF32 on recent
    GPUs, bfloat16 on TPUs), highest is float32. Serve with the same."""
    runtime: tyro.conf.OmitArgPrefixes[Runtime] = Runtime()
    out: str | None = None
    """Run directory; default runs/<norm>-<method>-<sigma>. Processes that share a run share it, too."""

    def run(self) -> None:
        """Certify under each sigma, then print the table of these runs."""
        devices.use_all_cores()
        self.runtime.start(survive=True)
        self._refuse_flags_without_effect()
        runs = self._certify_each() if self.carry is None else [self._carry(self.carry)]
        if self.runtime.multihost:
            leave()
        print_table(runs, parse_radii(self.radii) or RADII)
        if len(runs) > 1:
            print("\nIf you choose a sigma by this table, certify with another --seed, or better other images, too.")

    def _certify_each(self) -> list[str]:
        """A run under each sigma: their directories."""
        if self.sigma is not None and not 0 < len({f"{sigma:g}" for sigma in self.sigma}) == len(self.sigma):
            raise ValueError(f"--sigma takes one or more different numbers, got {list(self.sigma)}")
        sigmas = self.sigma or ()
        for sigma in sigmas:
            check_real("--sigma", sigma, "(0, inf)")
        asked = self._read_theta_map() or (sigmas[0] if sigmas else None)
        classifier, theta, checkpoint = resolve_classifier(self.classifier, self.norm, asked)
        if isinstance(theta, ThetaMap):
            self._check_theta_map(theta)
        elif self.sigma is None and self.sigma_convention != "theta":
            raise ValueError("--sigma-convention says what --sigma means, which must be given")
        dataset, command = self._dataset(), self
        if checkpoint is not None:
            self._check_checkpoint(checkpoint, dataset, theta)
            if self.noise is None and checkpoint.norm == self.norm:
                command = dataclasses.replace(self, noise=checkpoint.history.get("noise"))
        if len(sigmas) < 2:
            return [command._certify_one(classifier, dataset, theta, self.out)]
        outs = [self.out and f"{self.out}/{sigma:g}" for sigma in sigmas]
        return [command._certify_one(classifier, dataset, *each) for each in zip(sigmas, outs, strict=True)]

    def _check_checkpoint(self, checkpoint: Checkpoint, dataset: Dataset, theta: float | ThetaMap) -> None:
        """ValueError if a network does not fit the data; a warning if it was trained under another map than `theta`."""
        check_fit(self.classifier, checkpoint, dataset)
        if checkpoint.theta_map not in (None, theta):
            trained = f"{self.classifier} was trained with another noise: {checkpoint.theta_map}"
            warnings.warn(trained, stacklevel=1)

    def _carry(self, path: str) -> str:
        """Carry the certificates of a run: the new run's directory."""
        run, dataset = read_run(path), self._dataset()
        classifiers = []
        for name in (self.carry_from or "bundled", self.classifier):
            classifier, _, checkpoint = resolve_classifier(name, run.config.norm, run.config.theta)
            if checkpoint is not None:
                check_fit(name, checkpoint, dataset)
            classifiers.append(classifier)
        out = self.out or f"{run.path}-carried"
        config = CarryRunConfig(self.carry_n, self.carry_alpha, self.seed, self.precision, self.memory)
        with self._execution(f"carried from {run.path.name}", dataset) as execution:
            before, changed = classifiers
            carry_run(path, (before, changed), dataset, config, out=out, execution=execution)
        self._print_rest(out, dataset)
        return out

    def _dataset(self) -> Dataset:
        """The images that are asked for."""
        whole = load_dataset(self.data, split=self.split, crop=self.crop)
        return select(whole, skip=self.skip, max_images=self.max)

    def _print_rest(self, out: str, dataset: Dataset) -> None:
        """With several processes, what the others have yet to do."""
        if self.runtime.multihost:
            left = len(dataset) - len(read_run(out).done() & {*dataset.ids.tolist()})
            print(f"process {jax.process_index()} of {jax.process_count()} has finished; {left} images are left")

    def _certify_one(self, classifier: Classifier, dataset: Dataset, theta: float | ThetaMap, out: str | None) -> str:
        """One run, under theta: its directory."""
        if isinstance(theta, ThetaMap):
            theta_map, sigma = theta, float(f"{geometric_mean(theta.theta):.4g}")
        else:
            theta_map, sigma = None, theta
        named = {"splitting": self.noise == "splitting", "exact": self.exact}
        named[str(self.basis)] = self.basis not in (None, "pixels")
        law = [name for name, there in named.items() if there]
        out = out or "runs/" + "-".join([self.norm, *law, self.method, f"{sigma:g}"])
        self.certify(classifier, dataset, sigma, out, theta_map)
        self._print_rest(out, dataset)
        return out

    def _read_theta_map(self) -> ThetaMap | None:
        """The map of --theta-map."""
        if self.method == "universal" and self.sigma is not None:
            raise ValueError("--method universal takes theta from a map (--theta-map): --sigma does not go with it")
        if self.theta_map is None:
            return None
        if self.sigma is not None:
            raise ValueError("--theta-map holds theta itself: --sigma does not go with it")
        theta_map = load_theta_map(self.theta_map)
        if epath.Path(self.theta_map).suffix == ".npy" and self.basis is not None:
            return ThetaMap(theta_map.theta, self._basis())
        return theta_map

    def _basis(self) -> Basis:
        """The basis of --basis."""
        if self.basis == KarhunenLoeve.name:
            return KarhunenLoeve.of(load_dataset(self.data, split="train", crop=self.crop).some_images())
        return read_basis({"name": self.basis or "pixels"})

    def _check_theta_map(self, theta_map: ThetaMap) -> None:
        """ValueError if the map that was given, or that of training, does not go with the other flags."""
        if self.theta_map is None and self.method != "universal":
            what = f"{self.classifier} was trained with a theta map, not one sigma"
            raise ValueError(f"{what}: give --method universal (or --sigma, for other noise)")
        theta_map.check_norm(self.norm, self.theta_map or self.classifier)
        if self.sigma_convention != "theta":
            raise ValueError("a theta map holds theta itself: --sigma-convention does not go with it")
        if self.basis not in (None, theta_map.basis.name):
            where = self.theta_map or f"the theta map of {self.classifier}"
            raise ValueError(f"{where} is in the basis {theta_map.basis.name}, not {self.basis}")

    def certify(
        self, classifier: Classifier, dataset: Dataset, sigma: float, out: str, theta_map: ThetaMap | None = None
    ) -> None:
        """One run, with a progress bar."""
        basis = self._basis() if theta_map is None else theta_map.basis
        config = self._config(sigma, basis, len(dataset))
        if self.alpha_run is not None:
            self._refuse_other_images(out, dataset)
        with self._execution(f"{self.method} {sigma:g}", dataset) as execution:
            certify_dataset(classifier, dataset, config, out=out, theta_map=theta_map, execution=execution)

    @contextlib.contextmanager
    def _execution(self, title: str, dataset: Dataset) -> Iterator[Execution]:
        """Settings of speed and memory, with a progress bar."""
        mine = shard(dataset, process_index=jax.process_index(), process_count=jax.process_count())
        total = 0 if mine is None else len(mine)
        # The delay keeps the bar back until the run is open: an error before that is one line alone.
        with tqdm.tqdm(total=total, unit="image", desc=title, smoothing=0, delay=1e-6) as bar:
            remembered = 0

            def progress(stage: str, images: int) -> None:
                nonlocal remembered
                if stage == "remembered":
                    remembered += images
                    bar.set_postfix_str(f"{remembered} through the memory")
                    return
                advance(bar, title, images, "compiling, then the first batch")

            yield Execution(self.batch_size, self.chunk, self.devices, self.shard_devices, progress)

    def _config(self, sigma: float, basis: Basis, images: int) -> RunConfig:
        """The settings of a run of so many images."""
        if self.sigma_convention != "theta" and (self.norm != "l1" or self.noise == "splitting"):
            raise ValueError("--sigma-convention is for the uniform noise of --norm l1")
        return RunConfig(
            norm=self.norm,
            noise=self.noise,
            exact=self.exact,
            basis=basis,
            period=self.period,
            method=self.method,
            theta=sigma * _SIGMA_FACTORS[self.sigma_convention],
            certify=CertifyConfig(self.n0, self.n, self._alpha(images), self.bound),
            sampling=self._sampling(),
            isotropic=self._search(IsotropicConfig, self.iso_steps, self.iso_samples, self.iso_lr),
            anisotropic=dataclasses.replace(
                self._search(AnisotropicConfig, self.ancer_steps, self.ancer_samples, self.ancer_lr), kappa=self.kappa
            ),
            guard=self.guard,
            guard_samples=self.guard_samples,
            leakage=LeakageConfig(self.leakage_probes, self.leakage_samples) if self.leakage else None,
            leakage_limit=self.leakage_limit,
            seed=self.seed,
            precision=self.precision,
            memory=self.memory,
        )

    def _refuse_flags_without_effect(self) -> None:
        """Refuse flags that would do nothing beside the others."""
        names = [field.name for field in dataclasses.fields(self)]
        fixed = self.method in ("fixed", "universal")
        compares = self.leakage_limit is not None or (self.method == "ancer" and self.guard != "off")
        of_draws = {"n0", "n", "alpha_run", *(() if compares else ("alpha",))}
        for applies, flags, why in (
            (self.carry is not None, {*names} - {*_OF_CARRYING}, "--carry takes certificates as they are:"),
            (self.carry is None, {"carry_from", "carry_n", "carry_alpha"}, "without --carry,"),
            (fixed, _OF_SEARCHES, f"--method {self.method} does not search for theta:"),
            (self.method == "isotropic", _OF_ANCER, "--method isotropic does not search for an anisotropic theta:"),
            (not self.leakage, {"leakage_probes", "leakage_samples"}, "with --no-leakage,"),
            (not self.exact, {"period"}, "without --exact,"),
            (self.exact, of_draws, "--exact counts all draws, and has no alpha:"),
            (self.method in ("fixed", "isotropic"), {"period"}, "with one theta for all pixels,"),
            (self.objective == "log_volume", {"kappa"}, "with --objective log_volume,"),
        ):
            if applies and (given := self._given([name for name in names if name in flags])):
                raise ValueError(f"{why} {given} must not be given")

    def _given(self, names: Iterable[str]) -> str:
        """Those of these flags that have another value than their default."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return ", ".join(f"--{name.replace('_', '-')}" for name in names if getattr(self, name) != defaults[name])

    def _search(
        self, config: type[_Search], steps: int | None, num_samples: int | None, learning_rate: float | None
    ) -> _Search:
        asked: dict[str, Any] = {"steps": steps, "num_samples": num_samples, "learning_rate": learning_rate}
        asked |= {"objective": self.objective, "theta_max": self.theta_max, "leakage_weight": self.leakage_weight}
        make = config.published if self.preset == "published" else config
        return make(**{name: value for name, value in asked.items() if value is not None})

    def _sampling(self) -> SequentialConfig | None:
        if self.sampling == "sequential":
            if self.radii is None and self.tolerance is None:
                raise ValueError("--sampling sequential needs --radii (0,0.25,0.5, say) or --tolerance (0.02, say)")
            return SequentialConfig(parse_radii(self.radii), self.tolerance)
        if self.radii is not None or self.tolerance is not None:
            raise ValueError("--radii and --tolerance are for --sampling sequential")
        return None

    def _refuse_other_images(self, out: str, dataset: Dataset) -> None:
        """ValueError if a run that shares one error probability would get certificates of more images than share it."""
        if (epath.Path(out) / "config.json").exists() and read_run(out).done() - {*dataset.ids.tolist()}:
            raise ValueError(f"{out} has other images, too, among which --alpha-run was divided: name a new --out")

    def _alpha(self, images: int) -> float:
        """The error probability of each certificate: `--alpha-run` is divided equally, rounded down to six digits."""
        if self.alpha_run is None:
            return self.alpha
        if self.alpha != CertifyConfig.alpha:
            raise ValueError("--alpha is of each certificate, --alpha-run of all: name one of them")
        check_real("alpha_run", self.alpha_run, "(0, 1)")
        with decimal.localcontext(prec=6, rounding=decimal.ROUND_DOWN):
            return float(decimal.Decimal(repr(self.alpha_run)) / images)
