"""The settings of a run: what makes another base classifier, other data, or other results, and what made it."""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ancer_jax.data import Dataset
from ancer_jax.runs.config import RunConfig
from ancer_jax.smoothing.classifier import Classifier, calls_the_host, fingerprint
from ancer_jax.smoothing.noise import Noise
from ancer_jax.storage import read_text

# Options of JAX that decide which bits a key gives; they are settings of a run only where they are not these.
_USUAL_DRAWS = {"jax_threefry_partitionable": True, "jax_random_seed_offset": 0}
# To be raised whenever the same settings give other draws, bounds, regions or counts, or are written differently.
RESULTS_VERSION = 4


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What a run knows of its data set."""

    name: str
    fingerprint: str
    image_shape: tuple[int, ...]
    num_classes: int


def describe_run(
    classifier: Classifier, dataset: Dataset, config: RunConfig, theta: np.ndarray, mesh: Mesh
) -> dict[str, Any]:
    """All settings of a run, which are hashed: the config's, and fingerprints of classifier, data and arithmetic."""
    device, image = mesh.devices.flat[0], dataset.images[0]
    data = DataInfo(dataset.name, dataset.fingerprint, image.shape, dataset.num_classes)
    options = {name: getattr(jax.config, name, usual) for name, usual in _USUAL_DRAWS.items()}
    chosen, of_noise = config.settings(), {}
    if "noise_law" in chosen:  # its repr says nothing about its code
        of_noise["noise_program"] = noise_program(config.certified_noise, image.shape)
        of_noise |= {"admissible_theta": np.float32(theta).tolist()} if config.method == "fixed" else {}
    of_theta = {"theta_map": hashlib.sha256(theta.tobytes()).hexdigest()} if config.method == "universal" else {}
    return {
        **chosen,
        **of_noise,
        **of_theta,
        **{name: value for name, value in options.items() if value != _USUAL_DRAWS[name]},
        "classifier": fingerprint(classifier, image),
        "calls_the_host": calls_the_host(classifier, image),
        # Accelerators of one platform differ: float32 products are TF32 on some GPUs only.
        "platform": "cpu" if device.platform == "cpu" else f"{device.platform}, {device.device_kind}",
        "precision": getattr(jax.config, "jax_default_matmul_precision") or "default",  # noqa: B009
        "data": dataclasses.asdict(data),
    }


def noise_program(noise: Noise, shape: tuple[int, ...]) -> str:
    """Hash of the program that makes a noisy copy of an image."""
    key, number, image = (
        jax.random.key(0, impl="threefry2x32"),
        jax.ShapeDtypeStruct((), "int32"),
        jax.ShapeDtypeStruct(shape, "float32"),
    )
    copy = lambda *arguments: noise.perturb(*arguments)  # traced anew each time
    return hashlib.sha256(jax.jit(copy).lower(key, number, image, image).as_text().encode()).hexdigest()


def made_with() -> dict[str, str]:
    """Versions and device of this process, which are stored with its shards and not compared."""
    device = jax.local_devices()[0]
    names = ("ancer-jax", "jax", "jaxlib", "flax", "optax", "numpy", "scipy")
    versions = {name: importlib.metadata.version(name) for name in names}
    return versions | {"python": platform.python_version(), "device": device.device_kind, "platform": device.platform}


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back: numbers of numpy and tuples made plain; with `RESULTS_VERSION`."""
    text = json.dumps(settings, default=lambda number: number.item())
    return {"results_version": RESULTS_VERSION, **json.loads(text)}


def read_settings(path: epath.PathLike) -> dict[str, Any]:
    """The settings of the run in the directory `path`; refuses one without a `config.json`, or with another file."""
    config = epath.Path(path) / "config.json"
    try:
        if (text := read_text(config)) is None:
            raise FileNotFoundError
        settings = json.loads(text)["settings"]
        if not isinstance(settings, dict):
            raise TypeError(f"settings are {settings!r}")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} is not a run directory: there is no config.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config}: not the settings of a run ({error!r})") from None
    return settings


def refuse_other_version(path: epath.PathLike, settings: Mapping[str, Any]) -> None:
    """Refuse the run in the directory `path`, with these settings, if its results mean something else than today's."""
    if settings.get("results_version") != RESULTS_VERSION:
        raise ValueError(
            f"{path} was made by another version of ancer_jax (results_version {settings.get('results_version')}, not "
            f"{RESULTS_VERSION}): certify again into a new directory, or report its tables (*.tsv)"
        )


def refuse_other_settings(path: epath.PathLike, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse to go on in the directory `path`, made with the settings `there`, if these are not those `asked` for."""
    if text := differences(there, asked):
        raise ValueError(f"{path} was made with other settings ({text}); a new run needs a new directory")


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The settings that differ, and how; "" if none does."""
    old, new = dict(flatten(there)), dict(flatten(here))
    differ = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    said = []
    for name in differ:
        a, b = str(old.get(name)), str(new.get(name))
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)
        said.append(f"{name} is {short(a, at)} there, {short(b, at)} here")
    return "; ".join(said)


def short(value: Any, at: int = 0) -> str:
    """A value as text; of a long text 12 letters, that in place `at` among them."""
    if len(text := str(value)) <= 40:
        return text
    start = max(0, min(at - 4, len(text) - 12))
    before, after = "..." if start else "", "..." if start < len(text) - 12 else ""
    return before + text[start : start + 12] + after


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings under dotted names."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
