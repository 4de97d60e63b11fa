"""Files that are whole or not there, and who may write in a folder; on a disk, or in a bucket (`gs://`, `s3://`).

For buckets, `exists`, `glob` and the like say that nothing is there when the network fails. Where that would matter,
files are read and folders listed, which raises.
"""

import contextlib
import os
import threading
import time
import uuid
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO

import filelock
import numpy as np
from etils import epath

# A lock in a bucket is renewed every BEAT seconds; it is stale if nobody has done so for PATIENCE seconds.
BEAT, PATIENCE = 10.0, 40.0
_SETTLE = 2.0


def write_file(path: epath.PathLike, content: bytes | Callable[[IO[bytes]], object], process: int = 0) -> None:
    """Write a whole file or nothing: a temporary name, of this process alone, then a rename.

    Raises:
      OSError: naming the file, if it cannot be written (a full disk).
    """
    path = epath.Path(path)
    temporary = path.parent / f"{path.name}.{process}.tmp"
    try:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            with temporary.open("wb") as file:
                content(file)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror or error}; what was finished before is kept") from error


def list_folder(path: epath.PathLike) -> list[epath.Path]:
    """What is in a folder; nothing, if it does not exist."""
    try:
        return list(epath.Path(path).iterdir())
    except FileNotFoundError:
        return []


def read_arrays(file: epath.Path, names) -> dict[str, np.ndarray]:
    """The arrays of those names in an npz file; others are not read.

    Raises:
      ValueError: if it is no such file.
      OSError: if it cannot be read.
    """
    try:
        with file.open("rb") as opened:
            if not zipfile.is_zipfile(opened):
                raise ValueError("truncated, or not an npz file")
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in names}
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(error) from None


@contextlib.contextmanager
def locked(path: epath.Path, name: str = "lock") -> Iterator[Callable[[], None]]:
    """Hold the lock of that name in the folder `path`; it ends with the process.

    On a disk it is a file lock, which the operating system releases whatever happens. Buckets have none: there the
    lock is a file that its holder rewrites; one that is no longer rewritten is taken over, after a wait.

    Yields:
      A function that raises ValueError if the lock was lost: in a bucket, to a process that took this one for dead.

    Raises:
      ValueError: if another process holds it.
    """
    if "://" in os.fspath(path):
        with _lease(path, path / name) as still_held:
            yield still_held
        return
    lock = filelock.FileLock(str(path / name), timeout=0)
    try:
        held = lock.acquire()
    except filelock.Timeout:
        raise ValueError(f"another process is writing to {path}") from None
    with held:
        yield lambda: None


@contextlib.contextmanager
def _lease(folder: epath.Path, file: epath.Path) -> Iterator[Callable[[], None]]:
    me, over, lost = uuid.uuid4().hex, threading.Event(), threading.Event()
    _wait_until_stale(folder, file)
    file.write_text(f"{me} 0")
    time.sleep(_SETTLE)  # of several that come at once, the one that wrote last has it
    if _owner(file) != me:
        raise ValueError(f"another process is writing to {folder}")

    def renew():
        beats = 0
        while not over.wait(BEAT):
            with contextlib.suppress(OSError):  # the next beat may succeed
                if _owner(file) != me:
                    return lost.set()
                file.write_text(f"{me} {(beats := beats + 1)}")

    def still_held():
        if lost.is_set():
            raise ValueError(f"another process has taken over {folder}, because this one had not been heard of")

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield still_held
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(OSError):  # else it gets stale
            if _owner(file) == me:
                file.unlink()


def _owner(file: epath.Path) -> str:
    return _read(file).partition(" ")[0]


def _read(file: epath.Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""


def _wait_until_stale(folder: epath.Path, file: epath.Path) -> None:
    """Watch a lock that is there already: whoever lives renews it. No clocks of different machines are compared."""
    if not (found := _read(file)):
        return
    until = time.monotonic() + PATIENCE
    warnings.warn(f"{file} is there: waiting up to {PATIENCE:g} s to see whether its process lives", stacklevel=4)
    while time.monotonic() < until:
        time.sleep(min(BEAT, PATIENCE) / 10)
        if not (now := _read(file)):
            return
        if now != found:
            raise ValueError(f"another process is writing to {folder}")
