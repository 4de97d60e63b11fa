"""A bucket for tests: `gs://` paths by fsspec's interface, kept in a folder, failing at random if asked to.

As in a real one there are no folders and no locks, an object is there as a whole when its file is closed, and renaming
is copying and deleting. An operation that fails may have been done all the same.
"""

import io
import os
import pathlib
import random
import uuid

import fsspec

FOLDER, FAILURES = "ANCER_TEST_BUCKET", "ANCER_TEST_BUCKET_FAILURES"


def install(folder=None, failures=0.0):
    """Let `gs://` be a bucket in that folder that fails with that probability; from the environment, if None."""
    if folder is not None:
        os.environ |= {FOLDER: str(folder), FAILURES: str(failures)}
    fsspec.register_implementation("gcs", Bucket, clobber=True)


class Bucket(fsspec.AbstractFileSystem):
    protocol = ("gcs", "gs")
    random = random.Random()

    def _fail(self):
        if self.random.random() < float(os.environ[FAILURES]):
            raise self.random.choice([OSError, BucketError])("503 Service Unavailable")

    def _key(self, path):
        return pathlib.Path(os.environ[FOLDER]) / "objects" / self._strip_protocol(path)

    def info(self, path, **_):
        self._fail()
        key = self._key(path)
        if key.is_file():
            return {"name": self._strip_protocol(path), "size": key.stat().st_size, "type": "file"}
        if any(inside.is_file() for inside in key.rglob("*")):
            return {"name": self._strip_protocol(path), "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path, detail=True, **_):
        if self.info(path)["type"] == "file":
            inside = [path]
        else:
            inside = [f"{self._strip_protocol(path)}/{key.name}" for key in self._key(path).iterdir()]
        found = []
        for one in inside:
            try:
                found.append(self.info(one))
            except FileNotFoundError:  # an empty folder, or gone since
                continue
        return found if detail else [one["name"] for one in found]

    def _open(self, path, mode="rb", **_):
        if mode == "rb":
            self._fail()
            return _Download(self, self._key(path).read_bytes())
        return _Upload(self, path)

    def put_object(self, path, content):
        self._fail()
        upload = pathlib.Path(os.environ[FOLDER]) / "uploads" / uuid.uuid4().hex
        for file in (upload, self._key(path)):
            file.parent.mkdir(parents=True, exist_ok=True)
        upload.write_bytes(content)
        upload.replace(self._key(path))
        self._fail()

    def cp_file(self, path1, path2, **_):
        self.put_object(path2, self._key(path1).read_bytes())

    def mv(self, path1, path2, **_):
        self.cp_file(path1, path2)
        self.rm_file(path1)

    def rm(self, path, recursive=False, **_):
        for one in self.find(path) if recursive else [path]:
            self.rm_file(one)

    def rm_file(self, path):
        self._fail()
        self._key(path).unlink()
        self._fail()

    def mkdir(self, path, *_, **__):
        pass

    makedirs = mkdir


class BucketError(Exception):
    """As some libraries' errors, no OSError."""


class _Download(io.BytesIO):
    def __init__(self, bucket, content):
        super().__init__(content)
        self.bucket = bucket

    def seek(self, *position):  # how reading an npz file begins
        self.bucket._fail()
        return super().seek(*position)


class _Upload(io.BytesIO):
    def __init__(self, bucket, path):
        super().__init__()
        self.bucket, self.path = bucket, path

    def close(self):
        if not self.closed:
            content = self.getvalue()
            super().close()
            self.bucket.put_object(self.path, content)
