"""Prepared TensorFlow data sets; without TensorFlow where they are stored as ArrayRecord."""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from ancer_jax.data.dataset import Dataset, LazyImages
from ancer_jax.data.pictures import Crop, decode, same_shape


def load_tfds(name: str, split: str, crop: Crop) -> Dataset:
    """The split of a TensorFlow data set with features image and label, in upstream order.

    Looked for in turn: prepared ArrayRecord files; prepared TFRecord files, which need TensorFlow; else it is
    downloaded and prepared, which needs TensorFlow and the network. `NAME@FOLDER` looks in FOLDER, `NAME` in that of
    the variable TFDS_DATA_DIR (default: `tensorflow_datasets` in the user's home).

    Ids are the numbers at the end of the feature `id` or `file_name` (upstream indices), where these differ; else the
    order of those names; else places on disk.

    Raises:
      ValueError: if it is not there, or needs what is not installed.
    """
    import tensorflow_datasets as tfds

    what, raw = f"tfds:{name}, split {split}", {"image": tfds.decode.SkipDecoding()}
    with _one_line(what):
        dataset, _, folder = name.partition("@")
        builder: Any = tfds.builder(dataset, data_dir=folder or None)
        records = _records(tfds, builder, split, raw)
    if "image" not in builder.info.features or "label" not in builder.info.features:
        raise ValueError(f"tfds:{name}: it has the features {', '.join(builder.info.features)}, not image and label")
    with _one_line(what):
        meta = [{key: record[key] for key in ("label", "id", "file_name") if key in record} for record in records]
        order, ids = _order(meta)
        labels = np.array([int(meta[row]["label"]) for row in order])
        channels = builder.info.features["image"].shape[-1]
        shape = decode(records[int(order[0])]["image"], crop, channels).shape

    def read(row: int) -> np.ndarray:
        with _one_line(f"{what}, record {row}"):
            image = decode(records[row]["image"], crop, channels)
        same_shape(image.shape, shape, f"tfds:{name}, record {row}")
        return image

    version = f"{builder.info.full_name} {split} {crop} {builder.info.splits[split].num_bytes}"
    fingerprint = hashlib.sha256(version.encode()).hexdigest()
    num_classes = builder.info.features["label"].num_classes
    return Dataset(f"tfds:{name}", ids, LazyImages(read, order, shape), labels, num_classes, fingerprint)


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """What goes wrong in TFDS, of many kinds (unknown names, no network, half a file), as a ValueError of one line."""
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"{what}: no prepared ArrayRecord files are there, and all else needs TensorFlow "
            f"(pip install 'ancer-jax[tensorflow]'): {_line(error)}"
        ) from None
    except Exception as error:
        raise ValueError(f"{what}: not to be had ({_line(error)})") from None


def _records(tfds, builder, split: str, raw) -> Any:
    """A sequence of records with undecoded images."""
    if not builder.data_path.exists():
        import tensorflow  # noqa: F401  (without it the download would be in vain)

        builder.download_and_prepare()
    try:
        return builder.as_data_source(split=split, decoders=raw)
    except NotImplementedError:  # TFRecord files have no random access
        return list(tfds.as_numpy(builder.as_dataset(split=split, decoders=raw)))


def _order(meta: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """(places in upstream order, ids)."""
    for feature in ("id", "file_name"):
        if feature in meta[0]:
            names = [_text(one[feature]) for one in meta]
            numbers = [int(found[0]) if (found := re.findall(r"(\d+)\D*$", one)) else -1 for one in names]
            if len({*numbers}) == len(meta) and min(numbers) >= 0:
                order = np.argsort(numbers)
                return order, np.array(numbers)[order]
            return np.array(sorted(range(len(names)), key=names.__getitem__)), np.arange(len(meta))
    return np.arange(len(meta)), np.arange(len(meta))


def _text(value) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
