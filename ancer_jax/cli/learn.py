"""`ancer-jax learn-theta`: one theta map for all inputs, from training images."""

import contextlib
import dataclasses
import functools
import signal
import warnings
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath

from ancer_jax import report
from ancer_jax._checks import check_integer
from ancer_jax.basis import BasisName, Pixels, check_theta_range, check_thetas, least_theta, make_basis
from ancer_jax.cli.runtime import Runtime
from ancer_jax.data import BUNDLED_SUBSET, Dataset, load_dataset, select
from ancer_jax.data.pictures import Crop
from ancer_jax.models import check_fit, resolve_classifier, wiener_front
from ancer_jax.runs.config import Norm
from ancer_jax.search import (
    ThetaMap,
    UniversalConfig,
    load_theta_map,
    optimize_universal,
    save_theta_map,
    spectral_theta,
)
from ancer_jax.smoothing.classifier import check_classifier
from ancer_jax.smoothing.registry import make_noise
from ancer_jax.smoothing.smoothed import Smoothed

_OF_ASCENT = ("batch_size", "samples", "lr")


@contextlib.contextmanager
def _stopped_at_once() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process by themselves: handlers of Python would wait until the whole ascent, one
    program, is over.
    """
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclasses.dataclass(frozen=True)
class LearnTheta:
    """Learn a theta map, one theta for each coefficient of a basis and the same for all images, from training images;
    for certify --method universal, and for train. Certificates of one map need no memory."""

    out: str
    """New file of the theta map (.npz); a picture of it goes beside it (.png)."""
    theta_max: float
    """Limit of theta. The size of regions depends on it, so report both."""
    data: str = BUNDLED_SUBSET
    """Data set, as in certify."""
    split: str = "train"
    """Which part of it: not the one that is certified later. An npz file has one part only."""
    crop: Crop = "none"
    """Crop of pictures, as in certify."""
    max: int | None = None
    """Take this many images at most: the first ones."""
    basis: BasisName | None = None
    """pixels; cosine: spatial frequencies; or karhunen-loeve: a basis in which these images are decorrelated. l1 noise
    has pixels only. Default: cosine (l1: pixels), or that of the map in --start."""
    norm: Norm = "l2"
    """l2: Gaussian noise; l1: uniform noise."""
    sigma: float | None = None
    """Lower bound of theta, in image units: for the same votes, a region contains that of white noise sigma. Default:
    that of the map in --start, or what the classifier was trained with."""
    start: str = "spectral"
    """spectral: the less the images differ in a coefficient, the larger its theta, up to --theta-max; flat: the lower
    bound everywhere; or the file of a theta map, say that of the network's training."""
    power: float = 1.0
    """For --start spectral: theta is sigma * (sigma / standard deviation of the coefficient)^power."""
    steps: int = 0
    """Steps of the ascent from there; 0: the start is the map, and needs no classifier if --sigma is given. An ascent
    that is stopped cannot be continued."""
    classifier: str = "bundled"
    """Base classifier, as in certify."""
    batch_size: int = UniversalConfig.batch_size
    """Images in each step."""
    samples: int = UniversalConfig.num_samples
    """Noise draws for each of them; all noisy copies of a step are held at once."""
    lr: float = UniversalConfig.learning_rate
    """Step size of log(theta)."""
    seed: int = 0
    """Seed of the draws; certify with another one if the images are the same."""
    compilation_cache: bool = True
    """Keep compiled programs, as in certify."""

    def run(self) -> None:
        """Learn the map, store it, draw it."""
        Runtime(self.compilation_cache).start(survive=True)
        self._refuse_flags_without_effect()
        out, given = self._out(), self._given()
        dataset = select(load_dataset(self.data, split=self.split, crop=self.crop), max_images=self.max)
        classifier, sigma = None, self.sigma
        if sigma is None and given is not None:
            sigma = given.history.get("sigma")
        if self.steps or sigma is None:
            classifier, trained, checkpoint = resolve_classifier(self.classifier, self.norm, sigma)
            if isinstance(trained, ThetaMap):
                raise ValueError(f"{self.classifier} was trained with a theta map, not one sigma: give --sigma")
            if checkpoint is not None:
                try:
                    check_fit(self.classifier, checkpoint, dataset)
                except ValueError as error:
                    raise ValueError(f"{error}{'' if self.steps else '; or give --sigma'}") from None
            sigma = trained
        images = dataset.some_images()
        theta_map = given or self._start(images, sigma)
        self._check(theta_map, sigma, images.shape[1:])
        noise = make_noise(self.norm, basis=theta_map.basis)
        if self.steps and classifier is not None:
            print(f"start: {theta_map}", flush=True)
            check_classifier(classifier, dataset.images[0])
            theta = self._ascend(Smoothed(classifier, noise, theta_map.theta), dataset, sigma)
            theta_map = ThetaMap(theta, theta_map.basis)
        unused = ["out", "compilation_cache"]
        unused += [] if self.steps else [*_OF_ASCENT, "steps", "classifier", "seed"]
        unused += [] if self.start == "spectral" else ["power"]
        history = {name: value for name, value in vars(self).items() if name not in unused}
        history |= {"sigma": sigma, "basis": theta_map.basis.name, "images": len(dataset if self.steps else images)}
        history |= {} if given is None else {"start": {**given.history}}
        theta_map = dataclasses.replace(theta_map, history=history)
        save_theta_map(theta_map, out)
        picture = out.with_suffix(".png")
        coloured = theta_map.basis != Pixels()
        front = wiener_front(images, theta_map.theta, theta_map.basis) if coloured else None
        report.plot_theta_map(theta_map, images[:4], picture, front=front, noise=noise)
        print(f"{out}: {theta_map}\npicture: {picture}")

    def _refuse_flags_without_effect(self) -> None:
        """Refuse flags of an ascent without one, and --power without a spectral start."""
        check_integer("seed", self.seed, 0, 2**31 - 1)
        of_ascent = _OF_ASCENT + ("classifier",) * (self.sigma is not None)
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for needed, there, names in (
            ("--steps", self.steps, of_ascent),
            ("--start spectral", self.start == "spectral", ("power",)),
        ):
            given = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) != defaults[name]]
            if given and not there:
                raise ValueError(f"without {needed}, {', '.join(given)} must not be given")

    def _out(self) -> epath.Path:
        """The file of the map, which must be new, in a folder that exists."""
        out = epath.Path(self.out)
        if out.suffix != ".npz":
            raise ValueError(f"--out is the file of a theta map, NAME.npz, got {out}")
        for file in (out, out.with_suffix(".png")):  # the map, and its picture
            if file.exists():
                raise ValueError(f"{file} exists already: name a new file")
        out.parent.mkdir(parents=True, exist_ok=True)
        return out

    def _given(self) -> ThetaMap | None:
        """The map in the file --start."""
        if self.start in ("spectral", "flat"):
            return None
        if not epath.Path(self.start).exists():
            raise ValueError(f"--start is spectral, flat, or the file of a theta map; no file is named {self.start!r}")
        if not self.steps:
            raise ValueError(f"--start {self.start} is a file, from which an ascent starts: give --steps")
        theta_map = load_theta_map(self.start)
        theta_map.check_norm(self.norm, "--start")
        if self.basis not in (None, theta_map.basis.name):
            raise ValueError(f"{self.start} is in the basis {theta_map.basis.name}, not {self.basis}")
        return theta_map

    def _start(self, images: np.ndarray, sigma: float) -> ThetaMap:
        """The spectral or flat start."""
        power = self.power if self.start == "spectral" else 0.0
        basis = make_basis(self.basis or ("cosine" if self.norm == "l2" else "pixels"), images)
        theta_map = spectral_theta(images, basis, sigma, theta_max=self.theta_max, power=power)
        if theta_map.theta.min() == theta_map.theta.max() and self.start == "spectral":
            warnings.warn(f"all thetas of the start are {theta_map.theta.min():g}: that is white noise", stacklevel=1)
        return theta_map

    def _check(self, start: ThetaMap, sigma: float, shape: tuple[int, ...]) -> None:
        """ValueError, now rather than after an ascent, if a start or its bounds do not fit."""
        if start.theta.shape != shape:
            size, found = (" x ".join(map(str, sizes)) for sizes in (shape, start.theta.shape))
            raise ValueError(f"{self.start} is a theta map for images {found}, the data are {size}")
        least = check_theta_range(sigma, self.theta_max, start.basis)
        low, high = float(start.theta.min()), float(start.theta.max())
        if low < np.float32(least) or high > np.float32(self.theta_max):
            bounds = f"{least:.7g} (--sigma {sigma:g}) and --theta-max {self.theta_max:g}"
            raise ValueError(f"{self.start} has thetas from {low:.7g} to {high:.7g}: not between {bounds}")
        if start.basis != Pixels():
            check_thetas(sigma, self.theta_max)

    def _ascend(self, smoothed: Smoothed, dataset: Dataset, sigma: float) -> np.ndarray:
        """Theta at the end of the ascent, with a progress bar."""
        bounds = {"theta_min": least_theta(sigma, smoothed.noise.basis), "theta_max": self.theta_max}
        config = UniversalConfig(self.steps, self.batch_size, self.samples, self.lr, **bounds)
        with _stopped_at_once(), tqdm.tqdm(total=self.steps, unit="step", desc="compiling") as bar:

            def progress(step, objective) -> None:
                bar.set_description_str("theta", refresh=False)
                bar.set_postfix_str(f"ACR-tilde on training images, estimated: {float(objective):.3f}", refresh=False)
                bar.update()

            learn = jax.jit(functools.partial(optimize_universal, config=config, progress=progress))
            key = jax.random.key(self.seed, impl="threefry2x32")
            theta, trace = learn(key, smoothed, dataset.images[:], jnp.asarray(dataset.labels))
            jax.effects_barrier()
        tenth = max(1, self.steps // 10)
        first, last = (float(np.mean(part)) for part in (trace[:tenth], trace[-tenth:]))
        if not np.any(np.asarray(trace) > 0):
            why = "under this noise it classifies none of the images well enough to estimate a region"
            raise ValueError(f"there is nothing to ascend with {self.classifier}: {why}")
        print(f"estimated ACR-tilde: {first:.3f} in the first {tenth} steps, {last:.3f} in the last {tenth}")
        return np.asarray(theta)
