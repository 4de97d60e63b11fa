"""Folders of pictures, one folder for each class; each picture is read when it is needed."""

import contextlib
import hashlib
import io
from collections.abc import Iterator
from typing import Literal

import numpy as np
import PIL.Image
from etils import epath

from ancer_jax.data.dataset import Dataset, LazyImages

Crop = Literal["none", "imagenet"]
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")  # torchvision's
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_RESIZED, _CROPPED = 256, 224
_READ = 16  # pictures, evenly spaced, whose contents are in the fingerprint


def load_class_folders(folder: epath.Path, split: str, crop: Crop) -> Dataset:
    """The pictures in `folder/<split>/<class>/`, or in `folder/<class>/` without a folder "test" (or "train").

    Classes are numbered in alphabetical order, pictures by class and then by name: labels are those of torchvision's
    `ImageFolder`. A class without a folder shifts the labels of all later classes, which the names in `classes` reveal.
    The fingerprint is of names and sizes of the files, and of the contents of some of them. Hidden folders are ignored.
    ValueError without pictures, for one class, several sizes, or a folder in that of a class.
    """
    root = folder / split if (folder / split).is_dir() else folder
    classes = [path.name for path in _visible(root) if path.is_dir()]
    entries = [(label, path) for label, name in enumerate(classes) for path in _visible(root / name)]
    pictures = [(label, path) for label, path in entries if path.suffix.lower() in _SUFFIXES]
    labels, files = [label for label, _ in pictures], [path for _, path in pictures]
    missing = f"there is no folder {folder / split}; folders: {', '.join(classes) or 'none'}"
    if root == folder and split not in ("test", "train"):
        raise ValueError(missing)
    if not files:
        missing = f" ({missing})" if root == folder else ""
        raise ValueError(f"{root}: neither idx files, nor CIFAR-10 files, nor pictures in folders of classes{missing}")
    if inner := next((path for _, path in entries if path.is_dir()), None):
        raise ValueError(f"{inner}: the pictures of a class must lie in one folder, without folders in it")
    if len(classes) < 2:
        raise ValueError(f"{root}: pictures of one class only, {classes[0]}")
    shape = read_picture(files[0], crop).shape
    if crop == "none":
        for file in files:
            with _naming(file), file.open("rb") as opened, PIL.Image.open(opened) as picture:
                found = (picture.height, picture.width, 3)
            check_shape(found, shape, file)

    def read(position: int) -> np.ndarray:
        image = read_picture(files[position], crop)
        check_shape(image.shape, shape, files[position])
        return image

    digest = hashlib.sha256(crop.encode())
    for file in files:
        digest.update(f"{file.parent.name}/{file.name} {file.stat().length}\n".encode())
    for position in np.unique(np.linspace(0, len(files) - 1, _READ).astype(int)):
        digest.update(hashlib.sha256(files[position].read_bytes()).digest())
    ids = np.arange(len(files))
    images = LazyImages(read, ids, shape)
    return Dataset(folder.name, ids, images, np.array(labels), len(classes), digest.hexdigest(), tuple(classes))


def _visible(folder: epath.Path) -> list[epath.Path]:
    """What a folder holds, by name, without what is hidden."""
    return sorted((path for path in folder.iterdir() if path.name[0] != "."), key=lambda path: path.name)


def check_shape(found: tuple[int, ...], shape: tuple[int, ...], name) -> None:
    """ValueError for a picture that has another shape than the first one."""
    if found != shape:
        raise ValueError(f"{name} is {list(found)}, others are {list(shape)}: use one size, or --crop imagenet")


def read_picture(file: epath.Path, crop: Crop) -> np.ndarray:
    """The picture in a file, uint8 [height, width, 3]; ValueError if it cannot be read."""
    with _naming(file):
        return decode(file.read_bytes(), crop)


@contextlib.contextmanager
def _naming(file: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # PIL raises many types
        raise ValueError(f"{file}: not a readable picture ({error})") from None


def decode(content: bytes, crop: Crop, channels: int = 3) -> np.ndarray:
    """The picture in the bytes of a file, uint8 [height, width, channels]; `crop` is that of `load_dataset`."""
    picture = PIL.Image.open(io.BytesIO(content))
    if picture.mode not in _MODES:
        raise ValueError(f"pixels must have 8 bits per channel, but the mode in PIL is {picture.mode}")
    if any(";16B" in str(part) for part in getattr(picture, "tile", ())):  # PIL would drop half of the bits
        raise ValueError("pixels must have 8 bits per channel, not 16")
    picture = picture.convert("L" if channels == 1 else "RGB")
    if crop == "imagenet":
        width, height = (side * _RESIZED // min(picture.size) for side in picture.size)
        picture = picture.resize((width, height), PIL.Image.Resampling.BILINEAR)
        left, top = round((width - _CROPPED) / 2), round((height - _CROPPED) / 2)
        picture = picture.crop((left, top, left + _CROPPED, top + _CROPPED))
    return np.asarray(picture).reshape(picture.height, picture.width, channels)
