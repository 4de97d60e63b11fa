"""`ancer-jax train`: train a network that certify takes as its classifier."""

import dataclasses
import itertools
import time
from typing import Any, Literal

import jax
import numpy as np
import tqdm
import tyro
from etils import epath

from ancer_jax import report
from ancer_jax.cli.runtime import Runtime, advance
from ancer_jax.data import BUNDLED_SUBSET, Dataset, load_dataset, select
from ancer_jax.data.pictures import Crop
from ancer_jax.models.checkpoints import Checkpoint, is_network, make_network, save_network
from ancer_jax.search.theta_map import ThetaMap, load_theta_map
from ancer_jax.smoothing.registry import NoiseName
from ancer_jax.training import HISTORY, PRESETS, TrainConfig, TrainingMethod, TrainState, train
from ancer_jax.training.config import Flip, FrontName, Optimizer, Schedule


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a network for smoothing; started again, it continues. Settings from --epochs to --shift that are None by
    default are those of each method's published code for CIFAR-10. They are printed at the start."""

    out: str
    """Folder of the network, for certify --classifier; it also stores the state that training resumes from."""
    data: str = BUNDLED_SUBSET
    """Data set, as in certify; its split train is trained on. An npz file has one split: name another file with
    --test-data."""
    test_data: str | None = None
    """Data set on which the network is evaluated after every epoch; default: --data."""
    test_split: str = "test"
    """Split of that data set."""
    network: str = "small_cnn"
    """small_cnn, cifar_resnet20, cifar_resnet110, cifar_resnet18, ancer_resnet18, wrn_40_2, imagenet_resnet50 or
    efficientnet_lite0."""
    method: TrainingMethod = "augmentation"
    """augmentation (Cohen et al. 2019), smoothadv (Salman et al. 2019), macer (Zhai et al. 2020), consistency (Jeong &
    Shin 2020), stability (Yang et al. 2020) or volume (ours)."""
    norm: Literal["l2", "l1"] = "l2"
    """l2: Gaussian noise; l1: uniform noise, or --noise."""
    noise: NoiseName | None = None
    """For l1: uniform, or splitting (Levine & Feizi 2021)."""
    sigma: float | None = None
    """Noise theta, in units of [0, 1] pixels: standard deviation of Gaussian noise, half-width of uniform noise, half
    the distance between cuts of splitting noise. Default: 0.25."""
    theta_map: str | None = None
    """Instead of --sigma: a theta map (of learn-theta), or an .npy file of theta for each pixel, under whose noise the
    network is trained."""
    front: FrontName = "none"
    """wiener: a fixed linear filter in front of the network, Wiener's for the training images and Gaussian noise, in
    the basis of --theta-map or, for noise that is independent in pixels, in the cosine basis."""
    epochs: int | None = None
    """Passes over the training images."""
    batch_size: int | None = None
    """Images per step, not counting noisy copies."""
    copies: int | None = None
    """Noisy copies of each image (m)."""
    optimizer: Optimizer = "sgd"
    """sgd, or muon: Muon for the kernels of convolutions and hidden dense layers, SGD for all other parameters."""
    lr: float | None = None
    """Learning rate of SGD at the start; with --schedule onecycle its peak. Weight decay is in proportion to it,
    that of Muon's kernels, too."""
    muon_lr: float | None = None
    """With --optimizer muon: learning rate of Muon, as --lr is that of SGD; default 0.05 for all methods."""
    weight_decay: float | None = None
    """Weight decay, of all parameters."""
    schedule: Schedule | None = None
    """Of the learning rate. drops: divided by 10 every --drop-every epochs; cosine: falls to 0; onecycle: rises to its
    peak in the first 30 % of the steps, then falls."""
    drop_every: int | None = None
    """With --schedule drops: epochs between two drops; with fewer --epochs there is no drop."""
    weight: float | None = None
    """Weight of the second term of the loss (macer, consistency, stability, volume)."""
    epsilon: float | None = None
    """SmoothAdv: l2 radius of its attack, in units of [0, 1] pixels."""
    attack_steps: int | None = None
    """SmoothAdv: steps of its attack."""
    warmup: int | None = None
    """SmoothAdv: epochs in which the radius grows; 1: all of it from the start."""
    shift: int | None = None
    """Largest random shift of an image, in pixels; 0: none."""
    flip: Flip = "random"
    """Which images are mirrored. random: half of them, drawn anew in each epoch; alternating: half of them in the first
    epoch, the other half in the second, and so on in turn; none."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel in the network's normalisation; default: that of its usual data set. With 0, and --std 1,
    there is none."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel."""
    crop: Crop = "none"
    """Crop of pictures, as in certify."""
    max: int | None = None
    """Train on this many images at most: the first ones (in folders of pictures, those of the first classes)."""
    test_max: int | None = None
    """Evaluate on this many test images at most, the first ones."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the network's layers."""
    seed: int = 0
    """Seed of all random draws."""
    devices: int | None = None
    """Devices of each process over which every batch is sharded; default all. On CPUs: one, which uses all cores."""
    runtime: tyro.conf.OmitArgPrefixes[Runtime] = Runtime()

    def run(self) -> None:
        """Train, store the network, plot the training curves."""
        self.runtime.start(survive=False)
        theta_map = self._read_theta_map()
        datasets, config = self._datasets(), self._config(theta_map)
        if (self.mean is None) != (self.std is None):
            raise ValueError("--mean and --std go together")
        attributes = {"num_classes": datasets[0].num_classes, "compute_dtype": self.compute_dtype}
        attributes |= {} if self.mean is None else {"mean": self.mean, "std": self.std}
        print(", ".join(f"{name} {value}" for name, value in config.settings().items()), flush=True)
        state = self._train(attributes, datasets, config)
        attributes |= {} if config.front_basis is None else {"front": config.front_basis.describe()}
        figures: dict[str, np.ndarray] = dict(zip(HISTORY, state.history.T, strict=True))
        accuracy = float(figures["test_accuracy"][-1])
        if not is_network(self.out):
            history = config.settings() | {"data": self.data, "test_accuracy": accuracy}
            what = self.network, attributes, state.variables, datasets[0].images.shape[1:], self.norm, config.theta
            checkpoint = Checkpoint(*what, history, datasets[0].classes, theta_map)
            save_network(checkpoint, self.out, new=False)
        if jax.process_index() == 0:
            report.plot_training(figures, epath.Path(self.out) / "training.png")
            print(f"{self.out}: accuracy {accuracy:.4f} on {len(datasets[1]):,} test images under one noise draw each")

    def _datasets(self) -> tuple[Dataset, Dataset]:
        """The training set and the test set."""
        train_set = load_dataset(self.data, split="train", crop=self.crop)
        test_set = load_dataset(self.test_data or self.data, split=self.test_split, crop=self.crop)
        if train_set.fingerprint == test_set.fingerprint:
            raise ValueError(f"the training images of {self.data} are the test images, too: name others (--test-data)")
        return select(train_set, max_images=self.max), select(test_set, max_images=self.test_max)

    def _read_theta_map(self) -> ThetaMap | None:
        if self.theta_map is None:
            return None
        if self.sigma is not None:
            raise ValueError("--theta-map holds theta itself: --sigma does not go with it")
        theta_map = load_theta_map(self.theta_map)
        theta_map.check_norm(self.norm, self.theta_map)
        return theta_map

    def _config(self, theta_map: ThetaMap | None = None) -> TrainConfig:
        """The method's preset with the settings that were asked for."""
        names = ("epochs", "batch_size", "copies", "weight_decay", "weight", "epsilon", "attack_steps", "shift")
        asked = {name: getattr(self, name) for name in names}
        asked |= {"schedule": self.schedule, "drop_every": self.drop_every, "warmup_epochs": self.warmup}
        asked |= {"learning_rate": self.lr, "muon_learning_rate": self.muon_lr}
        if self.muon_lr is not None and self.optimizer != "muon":
            raise ValueError("--muon-lr needs --optimizer muon")
        if self.schedule in ("cosine", "onecycle") and self.drop_every is None:
            asked["drop_every"] = 0  # not the preset's
        changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        changes |= {name: getattr(self, name) for name in ("norm", "noise", "optimizer", "flip", "front", "seed")}
        changes |= {} if self.sigma is None else {"theta": self.sigma}
        return dataclasses.replace(PRESETS[self.method], theta_map=theta_map, **changes)

    def _train(self, attributes: dict[str, Any], datasets: tuple[Dataset, Dataset], config: TrainConfig) -> TrainState:
        """Train with a progress bar. It appears with the first step: an error in the input is one line alone."""
        size, calls, title = config.batch_size, itertools.count(), f"{self.network}, {self.method}"
        total = config.epochs * (len(datasets[0]) // size) * size
        # Without smoothing, the rate is the mean over all images so far, which an evaluation changes little.
        with tqdm.tqdm(total=total, unit="image", desc=title, smoothing=0, delay=1e-6) as bar:

            def progress(steps: int, figures: dict[str, float]) -> None:
                if next(calls) == 1:  # the first step has compiled: the clock starts now
                    bar.initial, bar.start_t = bar.n + steps * size, time.time()
                advance(bar, title, steps * size, "compiling")
                if figures:
                    bar.set_postfix({name: f"{figures[name]:.3f}" for name in ("train_loss", "test_accuracy")})

            network = make_network(self.network, **attributes)
            return train(network, datasets, config, out=self.out, devices=self.devices, progress=progress)
