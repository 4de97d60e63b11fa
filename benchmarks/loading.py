"""CIFAR-10's 60,000 images have the same arrays, ids and labels as TensorFlow data sets and as the authors' files.

    python benchmarks/loading.py FOLDER    # two minutes on two CPU cores

Needs `pip install ".[tensorflow]"`. FOLDER holds the binary files (benchmarks/fetch_cifar10.py). A second process lets
tensorflow-datasets' own `cifar10` prepare them, as ArrayRecord and as TFRecord. This process reads both, the first
without TensorFlow, and compares.

Exit status 1 if anything differs.
"""

import argparse
import multiprocessing
import pathlib
import sys
import tempfile
import time
import types
from typing import Any

import numpy as np
import record

from ancer_jax.data import load_dataset

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    folder = parser.parse_args().folder
    rows = []
    with tempfile.TemporaryDirectory() as out:
        worker = multiprocessing.get_context("spawn").Process(target=prepare, args=(folder, out))
        worker.start()
        worker.join()
        if worker.exitcode:
            raise SystemExit("tensorflow-datasets could not prepare cifar10")
        for file_format in ("array_record", "tfrecord"):  # the second imports TensorFlow
            for split in ("test", "train"):
                expected = load_dataset(folder, split=split)
                start = time.perf_counter()
                found = load_dataset(f"tfds:cifar10@{out}/{file_format}", split=split)
                opened = time.perf_counter() - start
                images = found.images[np.arange(len(found))]
                reading = time.perf_counter() - start - opened
                same = {
                    name: np.array_equal(getattr(found, name), getattr(expected, name)) for name in ("labels", "ids")
                }
                row = {"format": file_format, "split": split, "images": len(found)}
                row |= {
                    "TensorFlow": "tensorflow" in sys.modules,
                    "same images": np.array_equal(images, expected.images[:]),
                }
                rows.append(row | same | {"seconds to open": opened, "images/s": len(found) / reading})
    record.show(rows)
    passed = all(row["same images"] and row["labels"] and row["ids"] for row in rows)
    passed &= not any(row["TensorFlow"] for row in rows if row["format"] == "array_record")
    record.save("loading", {"rows": rows, "passed": passed}, seed=0)
    print("passed" if passed else "MISSED A BAR")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
