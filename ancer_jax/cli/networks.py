"""`ancer-jax train` and `ancer-jax convert`: networks that certify takes as its classifier."""

import dataclasses
import warnings
from typing import Any, Literal

import jax
import numpy as np
import tqdm
import tyro
from etils import epath

from ancer_jax import report
from ancer_jax.certificates import Noise
from ancer_jax.cli.runtime import Runtime
from ancer_jax.data import BUNDLED_SUBSET, load_dataset, select
from ancer_jax.data.pictures import Crop
from ancer_jax.models.checkpoints import Trained, image_shape, is_network, make_network, save_network
from ancer_jax.models.torch_import import convert_torch, read_torch, stored_normalisation
from ancer_jax.training import HISTORY, PRESETS, TrainingMethod, train
from ancer_jax.training.loop import TABLE

CURVES = "training.png"


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a network for smoothing; started again, it continues. What is None by default is as in the published code
    of each method for CIFAR-10, and printed at the start."""

    out: str
    """Folder of the network, for certify --classifier; it also holds what training goes on from."""
    data: str = BUNDLED_SUBSET
    """Data set, as in certify: its split train is trained on. An npz file has one split: name another with
    --test-data."""
    test_data: str | None = None
    """Data set that is measured after every epoch; default: the same one."""
    test_split: str = "test"
    """Which part of it."""
    network: str = "small_cnn"
    """small_cnn, cifar_resnet20, cifar_resnet110, cifar_resnet18, ancer_resnet18, wrn_40_2, imagenet_resnet50 or
    efficientnet_lite0."""
    method: TrainingMethod = "augmentation"
    """augmentation (Cohen et al. 2019), smoothadv (Salman et al. 2019), macer (Zhai et al. 2020), consistency (Jeong &
    Shin 2020), stability (Yang et al. 2020) or volume (ours)."""
    norm: Literal["l2", "l1"] = "l2"
    """l2: Gaussian noise; l1: uniform noise, or --noise."""
    noise: Noise | None = None
    """For l1: uniform, or splitting (Levine & Feizi 2021)."""
    sigma: float = 0.25
    """Noise theta, in units of pixels in [0, 1]: standard deviation, or half-width of the uniform noise; for splitting,
    half the distance between cuts."""
    epochs: int | None = None
    """Times that every image is seen."""
    batch_size: int | None = None
    """Images per step, each with its noisy copies."""
    copies: int | None = None
    """Noisy copies of each image (m)."""
    lr: float | None = None
    """Learning rate of SGD, at the start."""
    weight_decay: float | None = None
    """Weight decay, of all parameters."""
    drop_every: int | None = None
    """Epochs after which the learning rate falls to a tenth, again and again; 0 is a cosine to 0."""
    weight: float | None = None
    """Weight of the method's second term (macer, consistency, stability, volume)."""
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
    mean: tuple[float, ...] | None = None
    """Mean of each channel in the network's normalisation; default: that of its usual data set. 0 and 1: none."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel."""
    crop: Crop = "none"
    """What is done to pictures, as in certify."""
    max: int | None = None
    """Train on this many images at most."""
    test_max: int | None = None
    """Measure this many test images at most."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the network's layers."""
    seed: int = 0
    """Of everything that is drawn."""
    devices: int | None = None
    """Devices of each process that share every batch; default all. CPUs: one, which has all cores."""
    runtime: tyro.conf.OmitArgPrefixes[Runtime] = Runtime()

    def run(self) -> None:
        """Train, store the network, draw its curves."""
        self.runtime.start(survive=False)
        train_set = load_dataset(self.data, split="train", crop=self.crop)
        test_set = load_dataset(self.test_data or self.data, split=self.test_split, crop=self.crop)
        if train_set.fingerprint == test_set.fingerprint:
            raise ValueError(f"it would be tested on the images of {self.data} that it is trained on (--test-data)")
        train_set, test_set = select(train_set, max_images=self.max), select(test_set, max_images=self.test_max)
        preset = PRESETS[self.method]
        asked = {
            "epochs": self.epochs, "batch_size": self.batch_size, "copies": self.copies, "learning_rate": self.lr,
            "weight_decay": self.weight_decay, "weight": self.weight, "epsilon": self.epsilon,
            "attack_steps": self.attack_steps,
            "warmup_epochs": self.warmup, "shift": self.shift,
        }  # fmt: skip
        changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        if self.drop_every is not None:
            changes["drop_every"] = self.drop_every or None
        config = dataclasses.replace(
            preset, norm=self.norm, noise=self.noise, theta=self.sigma, flip=self.flip, seed=self.seed, **changes
        )
        if (self.mean is None) != (self.std is None):
            raise ValueError("--mean and --std go together")
        attributes = {"num_classes": train_set.num_classes, "compute_dtype": self.compute_dtype}
        attributes |= {} if self.mean is None else {"mean": self.mean, "std": self.std}
        print(", ".join(f"{name} {value}" for name, value in dataclasses.asdict(config).items()), flush=True)
        total = config.epochs * (len(train_set) // config.batch_size)
        with tqdm.tqdm(total=total, unit="step", desc=f"{self.network}, {self.method}", smoothing=0, delay=1e-6) as bar:

            def progress(steps: int, figures: dict[str, float]) -> None:
                if bar.delay:
                    bar.delay, bar.initial = 0, steps
                bar.update(steps)
                if figures:
                    bar.set_postfix({name: f"{figures[name]:.3f}" for name in ("train_loss", "test_accuracy")})

            network = make_network(self.network, **attributes)
            state = train(network, train_set, test_set, config, out=self.out, devices=self.devices, progress=progress)
        if not is_network(self.out):
            history = dataclasses.asdict(config) | {"data": self.data, "test_accuracy": float(state.history[-1, 5])}
            what = self.network, attributes, state.variables, train_set.images.shape[1:], self.norm, self.sigma
            save_network(Trained(*what, history=history, classes=train_set.classes), self.out, new=False)
        if jax.process_index() > 0:
            return
        report.plot_training(dict(zip(HISTORY, state.history.T, strict=True)), epath.Path(self.out) / CURVES)
        last = dict(zip(HISTORY, state.history[-1], strict=True))
        print(
            f"{self.out}: accuracy {last['test_accuracy']:.4f} of {len(test_set):,} test images under one draw of the"
        )
        print(f"noise; {TABLE} and {CURVES} show how it came to that")


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
    """Mean of each channel in its normalisation; default: the usual one. A checkpoint that says another is refused;
    most do not say. Networks that do not normalise (MACER's): --mean 0 0 0 --std 1 1 1."""
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
        if (self.mean is None) != (self.std is None):
            raise ValueError("--mean and --std go together")
        network, shape = make_network(self.network, **attributes), image_shape(self.network)
        if {np.size(network.mean), np.size(network.std)} != {shape[-1]}:
            raise ValueError(f"--mean and --std need {shape[-1]} values, one for each channel")
        if self.image_size is not None:
            if self.image_size < 1:
                raise ValueError(f"--image-size must be at least 1, got {self.image_size}")
            shape = (self.image_size, self.image_size, shape[-1])
        tensors = read_torch(self.checkpoint)
        try:
            variables = convert_torch(network, tensors, shape)
        except ValueError as error:
            raise ValueError(f"{self.checkpoint} as {self.network}: {error}") from None
        history = {"converted_from": epath.Path(self.checkpoint).name}
        save_network(Trained(self.network, attributes, variables, shape, self.norm, self.sigma, history), self.out)
        count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        print(f"{self.out}: {self.network}, {count:,} parameters, {network.num_classes} classes")
        said = {"mean", "std"} <= set(stored_normalisation(tensors, np.size(network.mean)))
        print(f"normalisation: mean {_listed(network.mean)}, std {_listed(network.std)}{', as stored' if said else ''}")
        if not said and self.mean is None:
            warnings.warn(
                f"{self.checkpoint} does not say how its network normalises images: the usual constants were assumed "
                "(others: --mean, --std)",
                stacklevel=2,
            )


def _listed(values) -> str:
    return " ".join(f"{value:.4g}" for value in values)
