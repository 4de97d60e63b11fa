"""CIFAR-10's 60,000 images have the same arrays, ids and labels as TensorFlow data sets and as the authors' files.

Needs `pip install ".[tensorflow]"`, and the folder of the authors' binary files (`ancer-jax fetch`). A second process
lets tensorflow-datasets' own `cifar10` prepare them, as ArrayRecord and as TFRecord. This process reads both, the first
without TensorFlow, and compares.
"""

import argparse
import multiprocessing
import pathlib
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

from ancer_jax.data import load_dataset
from benchmarks.benchmark import Benchmark, Found, Line, Lines, load

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def prepare(folder: str, out: str) -> None:
    """Prepare the data sets, as `tfds build cifar10` does after its download."""
    import tensorflow_datasets as tfds

    download = pathlib.Path(out, "download")
    inside = download / "cifar-10-batches-bin"
    inside.mkdir(parents=True)
    for file in pathlib.Path(folder).resolve().glob("*.bin"):
        (inside / file.name).symlink_to(file)
    (inside / "batches.meta.txt").write_text("\n".join(CLASSES))
    local = types.SimpleNamespace(download_and_extract=lambda url: str(download))
    for file_format in ("array_record", "tfrecord"):
        builder: Any = tfds.builder("cifar10", data_dir=f"{out}/{file_format}", file_format=file_format)
        splits = builder._split_generators
        builder._split_generators = lambda _, splits=splits: splits(local)
        builder.download_and_prepare()


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """Both formats against the binary files."""
    rows = []
    with tempfile.TemporaryDirectory() as out:
        worker = multiprocessing.get_context("spawn").Process(target=prepare, args=(options.folder, out))
        worker.start()
        worker.join()
        if worker.exitcode:
            raise SystemExit("tensorflow-datasets could not prepare cifar10")
        for file_format in ("array_record", "tfrecord"):  # the second imports TensorFlow
            for split in ("test", "train"):
                expected = load_dataset(options.folder, split=split)
                start = time.perf_counter()
                found = load_dataset(f"tfds:cifar10@{out}/{file_format}", split=split)
                opened = time.perf_counter() - start
                images = found.images[np.arange(len(found))]
                reading = time.perf_counter() - start - opened
                row = {"format": file_format, "split": split, "images": len(found)}
                row |= {"TensorFlow": "tensorflow" in sys.modules}
                row |= {"same images": np.array_equal(images, expected.images[:])}
                for name in ("labels", "ids"):
                    row[name] = np.array_equal(getattr(found, name), getattr(expected, name))
                rows.append(row | {"seconds to open": opened, "images/s": len(found) / reading})
                yield {"rows": rows}


def lines(found: Found) -> Lines:
    rows = found["results"]["rows"]
    for r in rows:
        what = f"CIFAR-10, {r['split']}, {r['format']}: images, labels, ids as in the authors' files"
        same = [r[name] for name in ("same images", "labels", "ids")]
        figure = f"{', '.join(map(str, same))} ({r['images']:,} images)"
        yield Line(what, figure, "True, True, True", all(same))
    imported = any(r["TensorFlow"] for r in rows if r["format"] == "array_record")
    yield Line("CIFAR-10, array_record: TensorFlow is imported", str(imported), "False", not imported)


def _images() -> str:
    """How many images were compared, of each format."""
    return f"{sum(r['images'] for r in load('loading')['results']['rows'] if r['format'] == 'tfrecord'):,}"


BENCHMARK = Benchmark(
    claim="CIFAR-10 is the same from TensorFlow data sets and from its authors' files.",
    takes="2 minutes",
    measure=measure,
    arguments=lambda parser: parser.add_argument("folder"),
    outputs={"loading": lines},
    figures={"images": _images},
)
