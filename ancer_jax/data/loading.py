"""Reading data sets: by name (bundled, TFDS), from an npz file, or from a folder of idx, CIFAR or picture files."""

import gzip
import importlib.resources
import zlib
from typing import Literal

import numpy as np
from etils import epath

from ancer_jax._checks import check_choice
from ancer_jax._messages import did_you_mean
from ancer_jax.data.dataset import Dataset
from ancer_jax.data.fetch import SOURCES
from ancer_jax.data.pictures import Crop, load_class_folders
from ancer_jax.data.tfds import load_tfds
from ancer_jax.storage import read_arrays

BUNDLED_SUBSET = "fashion-mnist-subset"
_CIFAR_RECORD = 1 + 3 * 32 * 32  # label, red, green and blue plane
_IDX_PREFIX = {"test": "t10k", "train": "train"}


def load_dataset(source: str, *, split: str = "test", crop: Crop = "none") -> Dataset:
    """The data set `source`, as float32 images in [0, 1].

    Args:
      source: `"fashion-mnist-subset"`, which is bundled: every 20th test image and every 30th training image of
        Fashion-MNIST; `"tfds:NAME"` or `"tfds:NAME@FOLDER"`, a prepared TensorFlow data set (`data.tfds`); the path of
        an `.npz` file with `images` (uint8, or float in [0, 1]; [n, h, w] or [n, h, w, c]), `labels` [n] and optionally
        `ids` [n]; or the path of a folder with MNIST-style idx files (`t10k-images-idx3-ubyte[.gz]`, ...), with
        CIFAR-10's binary files (`test_batch.bin`, ...), or with a folder of pictures for each class (`data.pictures`).
      split: `"test"` or `"train"` (for TFDS and pictures any split that exists); an npz file has one split only and
        ignores it. Ids are positions in the split, as in the upstream data set.
      crop: how the pictures of class folders and TFDS are cropped: `"none"`, or `"imagenet"` for resizing the shorter
        side to 256 (bilinear) and taking the central 224 x 224.

    Raises:
      ValueError: if there is no such source, a file is damaged, or the arrays do not meet the conditions of `Dataset`.
    """
    check_choice("crop", crop, Crop)
    if source.startswith("tfds:"):
        return load_tfds(source.removeprefix("tfds:"), split, crop)
    path = epath.Path(source)
    if path.is_dir() and not any(path.glob("*-ubyte*")) and not any(path.glob("*.bin")):
        return load_class_folders(path, split, crop)
    check_choice("split", split, Literal["test", "train"])
    if crop != "none":
        raise ValueError(f"crop is for folders of pictures and TFDS, and {source} is neither")
    if source == BUNDLED_SUBSET:
        return _load_bundled(split)
    if path.is_dir():
        return _load_cifar(path, split) if any(path.glob("*.bin")) else _load_idx(path, split)
    if path.exists():
        return _load_npz(path)
    hint = did_you_mean(source, [BUNDLED_SUBSET], 0.3)
    if source in SOURCES:
        hint = f"; `ancer-jax fetch {source} FOLDER` gets it"
    raise ValueError(f"no data set is named {source!r} and no file or folder is there{hint}")


def _load_bundled(split: str) -> Dataset:
    archive = importlib.resources.files("ancer_jax.data") / "fashion_mnist_subset.npz"
    with archive.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        images, labels, ids = (arrays[f"{split}_{name}"] for name in ("images", "labels", "ids"))
        return _dataset(BUNDLED_SUBSET, images, labels, ids, 10)


def _load_npz(path: epath.Path) -> Dataset:
    try:
        found = read_arrays(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable npz file ({error})") from error
    missing = {"images", "labels"} - set(found)
    if missing:
        raise ValueError(f"{path}: the npz file has no array {' and no '.join(sorted(missing))}")
    return _dataset(path.name, found["images"], found["labels"], found.get("ids"), None)


def _load_cifar(folder: epath.Path, split: str) -> Dataset:
    names = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    records = []
    for path in (folder / f"{name}.bin" for name in names):
        if not path.exists():
            raise ValueError(f"{folder}: there is no {path.name}")
        data = np.frombuffer(path.read_bytes(), np.uint8)
        if data.size == 0 or data.size % _CIFAR_RECORD:
            raise ValueError(f"{path}: not a whole CIFAR-10 file: {data.size} bytes, not a multiple of {_CIFAR_RECORD}")
        records.append(data.reshape(-1, _CIFAR_RECORD))
    records = np.concatenate(records)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return _dataset(folder.name, images, records[:, 0], None, 10)


def _load_idx(folder: epath.Path, split: str) -> Dataset:
    arrays = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        plain = folder / f"{_IDX_PREFIX[split]}-{kind}"
        packed = folder / f"{plain.name}.gz"
        path = plain if plain.exists() else packed
        if not path.exists():
            raise ValueError(f"{folder}: there is neither {plain.name} nor {packed.name}")
        try:
            data = path.read_bytes()
            arrays.append(parse_idx(gzip.decompress(data) if path == packed else data))
        except (ValueError, OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not a readable idx file ({error})") from error
    return _dataset(folder.name, arrays[0], arrays[1], None, 10)


def parse_idx(data: bytes) -> np.ndarray:
    """The uint8 array in the bytes of an idx file, the format of MNIST: magic number, sizes, values."""
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError("no idx header of unsigned bytes")
    shape = np.frombuffer(data, ">u4", data[3], 4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if values.size != shape.prod():
        raise ValueError(f"header says {shape.tolist()} values, found {values.size}")
    return values.reshape(shape)


def dataset_from_arrays(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    ids: np.ndarray | None = None,
    num_classes: int | None = None,
    name: str = "arrays",
) -> Dataset:
    """A data set of your own arrays.

    Args:
      images: [n, height, width, channels] or [n, height, width]: uint8, or float in [0, 1].
      labels: [n] integers in [0, num_classes).
      ids: [n] integers that name the images, increasing; by default 0, ..., n - 1.
      num_classes: by default one more than the largest label.
      name: in results.

    Raises:
      ValueError: if the arrays do not meet the conditions of `Dataset`.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    return _dataset(name, images, labels, None if ids is None else np.asarray(ids), num_classes)


def _dataset(name, images, labels, ids, num_classes) -> Dataset:
    if images.dtype == np.uint8:
        images = images.astype(np.float32) / np.float32(255)
    elif np.issubdtype(images.dtype, np.floating):
        with np.errstate(over="ignore"):
            images = images.astype(np.float32)
    else:
        raise ValueError(f"{name}: images must be uint8 or float, got {images.dtype}")
    if images.ndim not in (3, 4):
        shape = list(images.shape)
        raise ValueError(f"{name}: images must be [n, height, width] or [n, height, width, channels], got {shape}")
    if images.ndim == 3:
        images = images[..., None]
    ids = np.arange(len(images)) if ids is None else ids
    for what, array in (("labels", labels), ("ids", ids)):
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{name}: {what} must be integers, got {array.dtype}")
    if num_classes is None:
        num_classes = max(2, int(labels.max(initial=0)) + 1)
    return Dataset(name, ids.astype(np.int64), images, labels.astype(np.int64), num_classes)
