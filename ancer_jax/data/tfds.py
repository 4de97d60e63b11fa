"""Prepared TensorFlow data sets, read without TensorFlow if they are stored as ArrayRecord."""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from ancer_jax._messages import first_line
from ancer_jax.data.dataset import Dataset, LazyImages
from ancer_jax.data.pictures import Crop, check_shape, decode


def load_tfds(name: str, split: str, crop: Crop) -> Dataset:
    """A split of a TensorFlow data set with the features image and label, in upstream order.

    Prepared ArrayRecord files are read if there are any, otherwise prepared TFRecord files, which need TensorFlow. If
    neither exist, the data set is downloaded and prepared, which needs TensorFlow and internet access. `NAME@FOLDER` is
    looked for in FOLDER, `NAME` in that of the environment variable TFDS_DATA_DIR (default: `~/tensorflow_datasets`).

    Ids are the numbers at the end of the feature `id` or `file_name`, which are upstream indices, if these are unique;
    otherwise positions in the order of these names, or on disk if there is neither feature. ValueError if the data set
    cannot be read, or needs a library that is not installed.
    """
    import tensorflow_datasets as tfds

    what = f"tfds:{name}, split {split}"
    with _one_line(what):
        dataset, _, folder = name.partition("@")
        builder: Any = tfds.builder(dataset, data_dir=folder or None)
        records = _records(tfds, builder, split)
    if "image" not in builder.info.features or "label" not in builder.info.features:
        raise ValueError(f"tfds:{name}: the features are {', '.join(builder.info.features)}, not image and label")
    with _one_line(what):
        meta = [{key: record[key] for key in ("label", "id", "file_name") if key in record} for record in records]
        order, ids = _order(meta)
        labels = np.array([int(meta[position]["label"]) for position in order])
        channels = builder.info.features["image"].shape[-1]
        shape = decode(records[int(order[0])]["image"], crop, channels).shape

    def read(position: int) -> np.ndarray:
        with _one_line(f"{what}, record {position}"):
            image = decode(records[position]["image"], crop, channels)
        check_shape(image.shape, shape, f"tfds:{name}, record {position}")
        return image

    version = f"{builder.info.full_name} {split} {crop} {builder.info.splits[split].num_bytes}"
    fingerprint = hashlib.sha256(version.encode()).hexdigest()
    num_classes = builder.info.features["label"].num_classes
    return Dataset(f"tfds:{name}", ids, LazyImages(read, order, shape), labels, num_classes, fingerprint)


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn errors of TFDS, which have many types (unknown names, no network, damaged files), into ValueErrors."""
    try:
        yield
    except ImportError as error:
        needs = f"anything else needs TensorFlow (pip install 'ancer-jax[tensorflow]'): {first_line(error)}"
        raise ValueError(f"{what}: there are no prepared ArrayRecord files, and {needs}") from None
    except Exception as error:
        raise ValueError(f"{what}: cannot be read ({first_line(error)})") from None


def _records(tfds, builder, split: str) -> Any:
    """A sequence of records, with images that are not decoded."""
    if not builder.data_path.exists():
        import tensorflow  # noqa: F401  (fails before the download, not after it)

        builder.download_and_prepare()
    raw = {"image": tfds.decode.SkipDecoding()}
    try:
        return builder.as_data_source(split=split, decoders=raw)
    except NotImplementedError:  # TFRecord files have no random access
        return list(tfds.as_numpy(builder.as_dataset(split=split, decoders=raw)))


def _order(meta: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Positions on disk in upstream order, and ids."""
    places = np.arange(len(meta))
    feature = next((feature for feature in ("id", "file_name") if feature in meta[0]), None)
    if feature is None:
        return places, places
    values = [record[feature] for record in meta]
    names = [value.decode() if isinstance(value, bytes) else str(value) for value in values]
    numbers = [int(found[0]) if (found := re.findall(r"(\d+)\D*$", name)) else -1 for name in names]
    if len({*numbers}) == len(meta) and min(numbers) >= 0:
        order = np.argsort(numbers)
        return order, np.array(numbers)[order]
    return np.array(sorted(places, key=names.__getitem__)), places
