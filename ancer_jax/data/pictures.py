"""Folders of pictures, one for each class, read one picture at a time."""

import hashlib
import io
from typing import Literal

import numpy as np
from etils import epath

from ancer_jax.data.dataset import Dataset, LazyImages

Crop = Literal["none", "imagenet"]
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_RESIZED, _CROPPED = 256, 224


def load_class_folders(folder: epath.Path, split: str, crop: Crop) -> Dataset:
    """The pictures in `folder/<class>/`, or in `folder/<split>/<class>/` if there is a folder of that name.

    Classes are numbered by the alphabet, pictures by class and then by name: torchvision's `ImageFolder` gives the same
    labels, and ImageNet's ids are those of the usual scripts. Names and sizes of the files make the fingerprint. A
    class without a folder shifts the labels of those behind it: `classes` has the names.

    Raises:
      ValueError: if there are none, or of one class only, or not of one size and `crop` is "none".
    """
    root = folder / split if (folder / split).is_dir() else folder
    classes = sorted(path.name for path in root.iterdir() if path.is_dir())
    files, labels = [], []
    for label, name in enumerate(classes):
        here = sorted((p for p in (root / name).iterdir() if p.suffix.lower() in _SUFFIXES), key=lambda path: path.name)
        files += here
        labels += [label] * len(here)
    if not files:
        missing = (
            "" if root != folder else f" (there is no folder {folder / split}; it has {', '.join(classes) or 'none'})"
        )
        raise ValueError(f"{root}: neither idx files, nor CIFAR-10 files, nor pictures in folders of classes{missing}")
    if len(classes) < 2:
        raise ValueError(f"{root}: pictures of one class only, {classes[0]}")
    shape = read_picture(files[0], crop).shape
    if crop == "none":
        for file in files:
            same_shape(_header_shape(file), shape, file)

    def read(row: int) -> np.ndarray:
        image = read_picture(files[row], crop)
        same_shape(image.shape, shape, files[row])
        return image

    digest = hashlib.sha256(crop.encode())
    for file in files:
        digest.update(f"{file.parent.name}/{file.name} {file.stat().length}\n".encode())
    rows = np.arange(len(files))
    images = LazyImages(read, rows, shape)
    return Dataset(folder.name, rows, images, np.array(labels), len(classes), digest.hexdigest(), tuple(classes))


def same_shape(found: tuple[int, ...], shape: tuple[int, ...], name) -> None:
    """Refuse another shape."""
    if found != shape:
        raise ValueError(f"{name} is {list(found)}, others are {list(shape)}: pictures of one size, or --crop imagenet")


def _header_shape(file: epath.Path) -> tuple[int, int, int]:
    """Height, width and 3, read from the first bytes of a picture."""
    import PIL.Image

    try:
        with file.open("rb") as opened, PIL.Image.open(opened) as picture:
            return (picture.height, picture.width, 3)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{file}: not a picture that can be read ({error})") from None


def read_picture(file: epath.Path, crop: Crop) -> np.ndarray:
    """uint8 [height, width, 3] of a picture in a file.

    Raises:
      ValueError: if it cannot be read.
    """
    try:
        return decode(file.read_bytes(), crop)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{file}: not a picture that can be read ({error})") from None


def decode(content: bytes, crop: Crop, channels: int = 3) -> np.ndarray:
    """uint8 [height, width, channels] of a picture's bytes; as for ImageNet: the shorter side to 256 (bilinear), then
    the central 224 x 224.
    """
    import PIL.Image

    picture = PIL.Image.open(io.BytesIO(content))
    if picture.mode not in _MODES:
        raise ValueError(f"pixels must have 8 bits a channel, these are of PIL's mode {picture.mode}")
    picture = picture.convert("L" if channels == 1 else "RGB")
    if crop == "imagenet":
        width, height = (side * _RESIZED // min(picture.size) for side in picture.size)
        picture = picture.resize((width, height), PIL.Image.Resampling.BILINEAR)
        left, top = round((width - _CROPPED) / 2), round((height - _CROPPED) / 2)
        picture = picture.crop((left, top, left + _CROPPED, top + _CROPPED))
    return np.asarray(picture).reshape(picture.height, picture.width, channels)
