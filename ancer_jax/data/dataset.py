"""A labelled image data set, its parts and its batches."""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Int

from ancer_jax._checks import check_integer

_SOME = 5000


@dataclasses.dataclass(frozen=True, eq=False)
class LazyImages:
    """8-bit images that are read when they are indexed, in place of an array that is too large for memory.

    `images[indices]` is float32 [len(indices), height, width, channels], in [0, 1]; `images[i]` is one image.

    Attributes:
      read: position in the whole data set -> uint8 [height, width, channels].
      positions: those of these images.
      image_shape: height, width, channels.
    """

    read: Callable[[int], np.ndarray]
    positions: np.ndarray
    image_shape: tuple[int, int, int]
    dtype = np.dtype(np.float32)
    ndim = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """That of the array of all images."""
        return (len(self.positions), *self.image_shape)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, indices) -> np.ndarray:
        chosen = self.positions[indices]
        images = np.stack([self.read(int(position)) for position in np.atleast_1d(chosen)])
        return (images if np.ndim(chosen) else images[0]).astype(np.float32) / np.float32(255)

    def take(self, indices) -> "LazyImages":
        """The images of these indices, without reading them."""
        return dataclasses.replace(self, positions=self.positions[indices])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images with labels, and with the ids that name them in results.

    Attributes:
      name: name of the data set in results.
      ids: int64 [n], increasing, in [0, 2^31): indices of the images in the upstream data set.
      images: float32 [n, height, width, channels], in [0, 1], or `LazyImages`.
      labels: int64 [n], in [0, num_classes).
      num_classes: number of classes of the data set.
      fingerprint: hash of ids, labels and pixels, or, in place of the pixels of lazy images, of the given fingerprint;
        `select`, `take` and `shard` keep that of the whole data set.
      classes: names of the classes in the order of their labels; () if they are not known.
      whole: the data set that `select`, `take` and `shard` took this one from at first, or itself.

    Raises:
      ValueError: naming the array and the value, if one of these conditions does not hold.
    """

    name: str
    ids: Int[np.ndarray, " n"]
    images: Float[np.ndarray, "n height width channels"] | LazyImages
    labels: Int[np.ndarray, " n"]
    num_classes: int
    fingerprint: str = ""
    classes: tuple[str, ...] = ()
    whole: "Dataset" = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        images, labels, ids = self.images, self.labels, self.ids
        if images.ndim != 4 or images.dtype != np.float32:
            found = f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"{self.name}: images must be float32 [n, height, width, channels], got {found}")
        if len(images) == 0:
            raise ValueError(f"{self.name}: there are no images")
        if ids.shape != (len(images),) or labels.shape != (len(images),):
            found = f"{list(ids.shape)} and {list(labels.shape)}"
            raise ValueError(f"{self.name}: {len(images)} images need as many ids and labels, got {found}")
        check_integer(f"{self.name}: num_classes", self.num_classes, minimum=2)
        if self.classes and len(self.classes) != self.num_classes:
            raise ValueError(f"{self.name}: {len(self.classes)} names for {self.num_classes} classes")
        if (np.diff(ids.astype(np.int64)) <= 0).any() or ids[0] < 0 or ids[-1] >= 2**31:
            raise ValueError(f"{self.name}: ids must be increasing and in 0..2^31 - 1")
        lazy = isinstance(images, LazyImages)
        if not lazy:
            self._check_pixels(images)
        if labels.min() < 0 or labels.max() >= self.num_classes:
            bad = labels.max() if labels.max() >= self.num_classes else labels.min()
            raise ValueError(f"{self.name}: label {bad} is outside 0..{self.num_classes - 1}")
        digest = hashlib.sha256(repr((images.shape, self.num_classes)).encode())
        pixels = np.frombuffer(self.fingerprint.encode(), "u1") if lazy else images.astype("<f4")
        for array in (ids.astype("<i8"), labels.astype("<i8"), pixels):
            digest.update(array.tobytes())
        object.__setattr__(self, "fingerprint", digest.hexdigest())
        object.__setattr__(self, "whole", self)

    def _check_pixels(self, images):
        if not np.isfinite(images).all():
            bad = self.ids[~np.isfinite(images).all(axis=(1, 2, 3))][0]
            raise ValueError(f"{self.name}: image {bad} has values that are not finite")
        low, high = images.min(), images.max()
        if low < 0 or high > 1:
            hint = " (divide 8-bit pixels by 255)" if low >= 0 else ""
            raise ValueError(f"{self.name}: pixels must be in [0, 1], found {low:g} to {high:g}{hint}")

    def __len__(self) -> int:
        return len(self.ids)

    def some_images(self) -> Float[np.ndarray, "m height width channels"]:
        """Images for statistics: all of them; of lazy images at most 5,000, which are spread evenly."""
        return self.images[:: 1 if isinstance(self.images, np.ndarray) else -(-len(self) // _SOME)]


def check_classes(dataset: Dataset, classes: tuple[str, ...]) -> None:
    """Check that labels have the same meaning for a network or data set with these `classes`, unless one is ().

    Raises:
      ValueError: naming the first class that differs.
    """
    for label, (here, there) in enumerate(itertools.zip_longest(dataset.classes, classes, fillvalue="none")):
        if dataset.classes and classes and here != there:
            raise ValueError(f"{dataset.name}: class {label} is {here}, but elsewhere {there}: labels would be wrong")


def pixel_hashes(images: np.ndarray) -> np.ndarray:
    """A hash of each image's pixels, uint64 [n], which tells whether an image is still the one that was certified."""
    digests = [hashlib.sha256(np.asarray(image, "<f4").tobytes()).digest() for image in images]
    return np.array([int.from_bytes(digest[:8], "little") for digest in digests], np.uint64)


def select(dataset: Dataset, *, skip: int = 1, max_images: int | None = None) -> Dataset:
    """Every `skip`-th image in order, at most `max_images` of them.

    Raises:
      ValueError: if `skip` or `max_images` is not an integer of at least 1.
    """
    check_integer("skip", skip)
    if max_images is not None:
        check_integer("max", max_images)
    return take(dataset, np.arange(0, len(dataset), skip)[:max_images])


def take(dataset: Dataset, indices: np.ndarray | list[int]) -> Dataset:
    """The images of the given indices, which must increase."""
    images = dataset.images[indices] if isinstance(dataset.images, np.ndarray) else dataset.images.take(indices)
    part = dataclasses.replace(dataset, ids=dataset.ids[indices], images=images, labels=dataset.labels[indices])
    object.__setattr__(part, "fingerprint", dataset.fingerprint)
    object.__setattr__(part, "whole", dataset.whole)
    return part


def shard(dataset: Dataset, *, process_index: int, process_count: int) -> Dataset | None:
    """The images of one of several processes: every `process_count`-th, from the `process_index`-th on.

    Returns:
      None if there are fewer images than processes, and none for this one.

    Raises:
      ValueError: if `process_index` is not in [0, process_count).
    """
    check_integer("process_count", process_count)
    check_integer("process_index", process_index, 0, process_count - 1)
    indices = np.arange(process_index, len(dataset), process_count)
    return take(dataset, indices) if len(indices) else None


def batches(dataset: Dataset, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches `{id, image, label, mask}` of exactly `batch_size` images, in order.

    Copies of its first image fill up the last batch, and `mask` is False for them.

    Raises:
      ValueError: if `batch_size` is not an integer of at least 1.
    """
    check_integer("batch_size", batch_size)
    for start in range(0, len(dataset), batch_size):
        indices = np.arange(start, start + batch_size)
        mask = indices < len(dataset)
        indices = np.where(mask, indices, start)
        columns = {"id": dataset.ids, "image": dataset.images, "label": dataset.labels}
        yield {name: column[indices] for name, column in columns.items()} | {"mask": mask}
