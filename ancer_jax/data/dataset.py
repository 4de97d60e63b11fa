"""A labelled image data set in memory, and its batches."""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Int

from ancer_jax._checks import check_integer


@dataclasses.dataclass(frozen=True, eq=False)
class LazyImages:
    """Images that are read when rows are asked for: what stands in for the array of a data set too large for memory.

    `images[rows]` is float32 [len(rows), height, width, channels], `images[i]` one image; values are in [0, 1], because
    they are 8-bit pixels divided by 255.

    Attributes:
      read: place in the whole data set -> uint8 [height, width, channels].
      rows: places of these images.
      image_shape: height, width, channels.
    """

    read: Callable[[int], np.ndarray]
    rows: np.ndarray
    image_shape: tuple[int, int, int]
    dtype = np.dtype(np.float32)
    ndim = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of all images, were they read."""
        return (len(self.rows), *self.image_shape)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows) -> np.ndarray:
        chosen = self.rows[rows]
        images = np.stack([self.read(int(row)) for row in np.atleast_1d(chosen)])
        return (images if np.ndim(chosen) else images[0]).astype(np.float32) / np.float32(255)

    def only(self, rows) -> "LazyImages":
        """The images in these rows, still unread."""
        return dataclasses.replace(self, rows=self.rows[rows])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images with labels and the ids that name them in results.

    Attributes:
      name: what the data are called in results.
      ids: int64 [n], increasing, in [0, 2^31); the index of the image in the upstream data set.
      images: float32 [n, height, width, channels], in [0, 1], or `LazyImages`.
      labels: int64 [n], in [0, num_classes).
      num_classes: number of classes of the data set.
      fingerprint: hash of ids, labels and pixels (of images that are read lazily: of what the reader gives instead);
        `select` and `take` keep that of the whole.
      classes: names of the classes in order of their labels, where they are known; else ().
      whole: what `select` and `take` have taken this from, at first; else itself.

    Raises:
      ValueError: naming the array and the value, if any of the above does not hold.
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
            raise ValueError(
                f"{self.name}: images must be float32 [n, height, width, channels], "
                f"got {images.dtype} {list(images.shape)}"
            )
        if len(images) == 0:
            raise ValueError(f"{self.name}: there are no images")
        if ids.shape != (len(images),) or labels.shape != (len(images),):
            raise ValueError(
                f"{self.name}: {len(images)} images need as many ids and labels, "
                f"got {list(ids.shape)} and {list(labels.shape)}"
            )
        check_integer(f"{self.name}: num_classes", self.num_classes, minimum=2)
        if self.classes and len(self.classes) != self.num_classes:
            raise ValueError(f"{self.name}: {len(self.classes)} names for {self.num_classes} classes")
        if (np.diff(ids) <= 0).any() or ids[0] < 0 or ids[-1] >= 2**31:
            raise ValueError(f"{self.name}: ids must be increasing and in 0..2^31 - 1")
        if isinstance(images, np.ndarray):
            self._check_pixels(images)
        if labels.min() < 0 or labels.max() >= self.num_classes:
            bad = labels.max() if labels.max() >= self.num_classes else labels.min()
            raise ValueError(f"{self.name}: label {bad} is outside 0..{self.num_classes - 1}")
        digest = hashlib.sha256(repr((images.shape, self.num_classes)).encode())
        pixels = (
            images.astype("<f4") if isinstance(images, np.ndarray) else np.frombuffer(self.fingerprint.encode(), "u1")
        )
        for array in (ids.astype("<i8"), labels.astype("<i8"), pixels):
            digest.update(np.ascontiguousarray(array).tobytes())
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


def check_classes(dataset: Dataset, classes: tuple[str, ...]) -> None:
    """Whether labels mean the same to a network or data set with these `classes`; nothing is known of ().

    Raises:
      ValueError: naming the first class that differs.
    """
    for label, (here, there) in enumerate(itertools.zip_longest(dataset.classes, classes, fillvalue="none")):
        if dataset.classes and classes and here != there:
            raise ValueError(f"{dataset.name}: class {label} is {here}, but elsewhere {there}: labels would be wrong")


def pixel_hashes(images: np.ndarray) -> np.ndarray:
    """A hash of each image's pixels, uint64 [n]: whether an image is still the one that was certified."""
    rows = (np.ascontiguousarray(image, "<f4").tobytes() for image in images)
    return np.array([int.from_bytes(hashlib.sha256(row).digest()[:8], "little") for row in rows], np.uint64)


def select(dataset: Dataset, *, skip: int = 1, max_images: int | None = None) -> Dataset:
    """Every `skip`-th image in order, `max_images` of them at most.

    Raises:
      ValueError: if `skip` or `max_images` is not an integer of at least 1.
    """
    check_integer("skip", skip)
    if max_images is not None:
        check_integer("max", max_images)
    return take(dataset, np.arange(0, len(dataset), skip)[:max_images])


def take(dataset: Dataset, rows) -> Dataset:
    """The images in the given rows (increasing)."""
    images = dataset.images[rows] if isinstance(dataset.images, np.ndarray) else dataset.images.only(rows)
    part = dataclasses.replace(dataset, ids=dataset.ids[rows], images=images, labels=dataset.labels[rows])
    object.__setattr__(part, "fingerprint", dataset.fingerprint)
    object.__setattr__(part, "whole", dataset.whole)
    return part


def share(dataset: Dataset, *, process_index: int, process_count: int) -> Dataset | None:
    """The images of one of several processes: every `process_count`-th, from the `process_index`-th on.

    Returns:
      None if there are fewer images than processes and none is left for this one.

    Raises:
      ValueError: if `process_index` is not in [0, process_count).
    """
    check_integer("process_count", process_count)
    check_integer("process_index", process_index, 0, process_count - 1)
    rows = np.arange(process_index, len(dataset), process_count)
    return take(dataset, rows) if len(rows) else None


def batches(dataset: Dataset, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches `{id, image, label, mask}` of exactly `batch_size` rows, in order.

    The last batch is filled up with copies of its first row; `mask` is False there.

    Raises:
      ValueError: if `batch_size` is not an integer of at least 1.
    """
    check_integer("batch_size", batch_size)
    for start in range(0, len(dataset), batch_size):
        rows = np.arange(start, start + batch_size)
        mask = rows < len(dataset)
        rows = np.where(mask, rows, start)
        yield {
            "id": dataset.ids[rows],
            "image": dataset.images[rows],
            "label": dataset.labels[rows],
            "mask": mask,
        }
