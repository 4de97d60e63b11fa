"""Files that are whole or not there, and who may write in a folder; on a disk, or in a bucket (`gs://`, `s3://`).

For buckets, `exists`, `glob` and the like say that nothing is there when the network fails. Where that would matter,
files are read and folders listed, which raises.
"""

import contextlib
import functools
import io
import os
import threading
import time
import uuid
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO

import filelock
import numpy as np
from etils import epath

# A lock in a bucket is renewed every BEAT seconds; it is stale if nobody has done so for PATIENCE seconds.
BEAT, PATIENCE = 10.0, 40.0
_SETTLE = 2.0


def in_bucket(path: epath.PathLike) -> bool:
    """Whether a path is of a bucket, not of a disk."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path from the root, as orbax wants it; that of a bucket is one already."""
    return epath.Path(path) if in_bucket(path) else epath.Path(path).resolve()


def as_os_error(function):
    """Let errors of a bucket's library, of whatever type, be an OSError, and let it see other processes' files."""

    @functools.wraps(function)
    def wrapper(path, *arguments, **options):
        if not in_bucket(path):
            return function(path, *arguments, **options)
        try:
            _disable_listing_cache()
            return function(path, *arguments, **options)
        except (OSError, ValueError, ImportError):
            raise
        except Exception as error:
            raise OSError(f"{path}: {error}") from error

    return wrapper


@functools.cache
def _disable_listing_cache() -> None:
    """Turn off the caches of listings in libraries for buckets: they hide files that other processes write."""
    try:
        from fsspec.config import conf
    except ImportError:  # TensorFlow reads and writes buckets, too
        return
    for protocol in ("gs", "gcs", "s3", "s3a", "az", "abfs", "hf"):
        conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)


@as_os_error
def write_file(path: epath.PathLike, content: bytes | Callable[[IO[bytes]], object], process: int = 0) -> None:
    """Write a whole file or nothing: a temporary name, of this process alone, then a rename. OSErrors name the file."""
    path = epath.Path(path)
    temporary = path.parent / f"{path.name}.{process}.tmp"
    try:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            with temporary.open("wb") as file:
                content(file)
        temporary.replace(path)
    except Exception as error:
        with contextlib.suppress(Exception):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError) and not in_bucket(path):
            raise
        why = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write {path}: {why}; what was finished before is kept") from error


@as_os_error
def read_text(path: epath.PathLike) -> str | None:
    """What is in a file; None, if it does not exist."""
    try:
        return epath.Path(path).read_text()
    except FileNotFoundError:
        return None


@as_os_error
def remove(path: epath.PathLike) -> None:
    """Remove a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        epath.Path(path).unlink()


@as_os_error
def rename(path: epath.PathLike, new: epath.PathLike) -> None:
    """Give a file another name."""
    epath.Path(path).replace(new)


@as_os_error
def list_folder(path: epath.PathLike) -> list[epath.Path]:
    """What is in a folder; nothing, if it does not exist."""
    try:
        return list(epath.Path(path).iterdir())
    except FileNotFoundError:
        return []


@as_os_error
def read_array(file: epath.PathLike) -> np.ndarray:
    """The array of numbers in an .npy file; ValueError if it cannot be read, is damaged, or holds something else."""
    try:
        array = np.load(io.BytesIO(epath.Path(file).read_bytes()), allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: cannot be read as an .npy file ({error})") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or not array.size:
        raise ValueError(f"{file}: not an .npy file with an array of real numbers")
    return array


@as_os_error
def read_arrays(file: epath.Path, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of those names, or all, in an npz file; ValueError if it is none, OSError if it cannot be read."""
    with contextlib.suppress(*_NO_ARRAYS), file.open("rb") as opened:
        return _arrays(opened, names)
    # It is damaged, or could not be read, which zipfile does not tell apart.
    content = io.BytesIO(file.read_bytes())
    try:
        return _arrays(content, names)
    except _NO_ARRAYS as error:
        raise ValueError(error) from None


_NO_ARRAYS = (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


def _arrays(opened, names) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(opened):
        raise ValueError("truncated, or not an npz file")
    opened.seek(0)
    with np.load(opened, allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in (arrays.files if names is None else names)}
    if other := [name for name, array in found.items() if not isinstance(array, np.ndarray)]:  # bytes of another file
        raise ValueError(f"not an array: {', '.join(other)}")
    return found


@contextlib.contextmanager
def locked_shard(path: epath.Path, process: int, processes: int) -> Iterator[Callable[[], None]]:
    """Hold the lock of one of several processes that share the folder `path`, and yield as `locked`.

    Refused if another process holds it, or the folder is shared by another number of processes.
    """
    with locked(path, f"lock-{process}-of-{processes}") as still_held:
        for file in list_folder(path):
            if file.name.startswith("lock-") and "-of-" in file.name and not file.name.endswith(f"-of-{processes}"):
                with locked(path, file.name):
                    pass
        yield still_held


@contextlib.contextmanager
def locked(path: epath.Path, name: str) -> Iterator[Callable[[], None]]:
    """Hold the lock of that name in the folder `path`; it ends with the process.

    On a disk it is a file lock, which the operating system releases whatever happens. Buckets have none: there the
    lock is a file that its holder rewrites; one that is no longer rewritten is taken over, after a wait.

    Yields a function that raises ValueError if the lock was lost (in a bucket, to a process that took this one for
    dead). Raises ValueError if another process holds it.
    """
    if in_bucket(path):
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
    me, over = uuid.uuid4().hex, threading.Event()
    _wait_until_stale(folder, file)
    _write_text(file, f"{me} 0")
    time.sleep(_SETTLE)  # of several that come at once, the one that wrote last has it
    if _owner(file) != me:
        raise ValueError(f"another process is writing to {folder}")

    def renew():
        beats = 0
        while not over.wait(BEAT):
            with contextlib.suppress(Exception):  # the next beat may succeed
                if _owner(file) != me:
                    return
                _write_text(file, f"{me} {(beats := beats + 1)}")

    def still_held():
        if _owner(file) != me:
            raise ValueError(f"another process has taken over {folder}, because this one had not been heard of")

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield still_held
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(Exception):  # else it gets stale
            if _owner(file) == me:
                remove(file)


@as_os_error
def _write_text(file: epath.Path, text: str) -> None:
    file.write_text(text)  # in a bucket: there as a whole, or not at all


def _owner(file: epath.Path) -> str:
    return (read_text(file) or "").partition(" ")[0]


def _wait_until_stale(folder: epath.Path, file: epath.Path) -> None:
    """Watch a lock that is there already: whoever lives renews it. No clocks of different machines are compared."""
    if (found := read_text(file)) is None:
        return
    until = time.monotonic() + PATIENCE
    warnings.warn(f"{file} is there: waiting up to {PATIENCE:g} s to see whether its process lives", stacklevel=4)
    while time.monotonic() < until:
        time.sleep(min(BEAT, PATIENCE) / 10)
        if (now := read_text(file)) is None:
            return
        if now != found:
            raise ValueError(f"another process is writing to {folder}")
