"""Data sets in memory, from npz and idx files, and the bundled one; parts, batches and fingerprints of them."""

import dataclasses
import gzip
import importlib.resources
import struct
import zipfile

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from ancer_jax.data import BUNDLED_SUBSET, Dataset, batches, load_dataset, select, shard, take
from ancer_jax.models import BUNDLED_BY_NORM, load_bundled

_RNG = np.random.default_rng(0)


@pytest.fixture
def without_type_checks(monkeypatch):
    # Users run without the type checks of the tests, which would raise first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def _dataset(n=5, **changes):
    fields = {
        "name": "toy",
        "ids": np.arange(n) * 3,
        "images": _RNG.random((n, 4, 3, 1), np.float32),
        "labels": np.arange(n) % 3,
        "num_classes": 3,
    }
    return Dataset(**fields | changes)


def _npz(path, **arrays):
    fields = {"images": _RNG.integers(0, 256, (4, 5, 6)).astype(np.uint8), "labels": np.array([0, 2, 1, 0])} | arrays
    np.savez(path, **{name: array for name, array in fields.items() if array is not None})
    return str(path)


def _idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.mark.parametrize(("split", "size", "every"), [("test", 500, 20), ("train", 2000, 30)])
def test_bundled_subset_has_every_20th_test_and_every_30th_training_image(split, size, every):
    dataset = load_dataset(BUNDLED_SUBSET, split=split)
    assert dataset.images.shape == (size, 28, 28, 1)
    np.testing.assert_array_equal(dataset.ids, np.arange(size) * every)
    assert dataset.num_classes == 10
    frequency = np.bincount(dataset.labels, minlength=10) / size
    assert frequency.min() > 0.06 and frequency.max() < 0.14
    assert dataset.images.min() == 0 and dataset.images.max() == 1
    assert 0.2 < dataset.images.mean() < 0.35
    assert len(np.unique(dataset.images, axis=0)) == size


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_bundled_labels_belong_to_the_images(norm):
    dataset, bundled = load_dataset(BUNDLED_SUBSET), load_bundled(BUNDLED_BY_NORM[norm])
    accuracy = np.mean(np.argmax(bundled.classifier(jnp.asarray(dataset.images)), axis=1) == dataset.labels)
    expected = bundled.card["clean_accuracy"]
    assert abs(accuracy - expected) < 4 * np.sqrt(expected * (1 - expected) / len(dataset))


def test_licence_of_the_bundled_images_ships():
    text = (importlib.resources.files("ancer_jax.data") / "LICENSE.fashion-mnist").read_text()
    assert "Zalando" in text and "Permission is hereby granted" in text


def test_npz_of_bytes_is_scaled_to_one(tmp_path):
    images = np.array([0, 51, 255], np.uint8).reshape(3, 1, 1)
    dataset = load_dataset(_npz(tmp_path / "a.npz", images=images, labels=np.array([1, 0, 4])))
    np.testing.assert_array_equal(dataset.images.ravel(), np.float32([0, 0.2, 1]))
    assert dataset.images.shape == (3, 1, 1, 1)
    assert dataset.images.dtype == np.float32
    assert dataset.name == "a.npz"
    assert dataset.num_classes == 5
    np.testing.assert_array_equal(dataset.ids, [0, 1, 2])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npz_of_floats_is_not_scaled_and_keeps_its_ids(tmp_path, dtype):
    images = _RNG.random((3, 5, 6, 2)).astype(dtype)
    ids = np.array([4, 7, 1000], np.uint16)
    dataset = load_dataset(_npz(tmp_path / "a.npz", images=images, labels=np.array([0, 1, 1], np.int8), ids=ids))
    np.testing.assert_array_equal(dataset.images, images.astype(np.float32))
    np.testing.assert_array_equal(dataset.ids, ids)
    np.testing.assert_array_equal(dataset.labels, [0, 1, 1])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("split", "prefix"), [("test", "t10k"), ("train", "train")])
def test_idx_folder_is_read(tmp_path, split, prefix, packed):
    images, labels = _RNG.integers(0, 256, (3, 4, 5)).astype(np.uint8), np.array([9, 0, 3], np.uint8)
    for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
        data = _idx(array)
        (tmp_path / f"{name}{'.gz' if packed else ''}").write_bytes(gzip.compress(data) if packed else data)
    dataset = load_dataset(str(tmp_path), split=split)
    np.testing.assert_allclose(dataset.images[..., 0], images / 255, rtol=1e-6)
    np.testing.assert_array_equal(dataset.labels, labels)
    assert dataset.num_classes == 10
    with pytest.raises(ValueError, match="there is neither"):
        load_dataset(str(tmp_path), split="train" if split == "test" else "test")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("damage", ["short", "long", "header only", "not idx", "empty", "flipped"])
def test_damaged_idx_is_refused_by_name(tmp_path, packed, damage):
    whole = _idx(_RNG.integers(0, 256, (3, 8, 8)).astype(np.uint8))
    data = gzip.compress(whole) if packed else whole
    if damage == "flipped":
        data = data[:12] + bytes(255 - byte for byte in data[12:])
    else:
        changed = {
            "short": data[:-9],
            "long": data + b"x" if not packed else gzip.compress(whole + b"x"),
            "header only": data[:6],
            "not idx": gzip.compress(b"hello") if packed else b"hello",
            "empty": b"",
        }
        data = changed[damage]
    name = f"t10k-images-idx3-ubyte{'.gz' if packed else ''}"
    (tmp_path / name).write_bytes(data)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(_idx(np.zeros(3, np.uint8)))
    with pytest.raises(ValueError, match=f"{name}: not a readable idx file"):
        load_dataset(str(tmp_path))


@pytest.mark.parametrize("keep", [0, 1, 100, 300, -1])
def test_truncated_npz_is_refused_by_name(tmp_path, keep):
    path = tmp_path / "a.npz"
    _npz(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"a\.npz: not a readable npz file"):
        load_dataset(str(path))


def test_npz_with_another_file_in_place_of_an_array_is_refused(tmp_path):
    path = _npz(tmp_path / "a.npz", labels=np.array([0, 1]))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("images", b"not an array")
    with pytest.raises(ValueError, match=r"a\.npz: not a readable npz file \(not an array: images\)"):
        load_dataset(path)


def test_damaged_compressed_npz_is_refused_by_name(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, images=_RNG.integers(0, 256, (4, 9, 9)).astype(np.uint8), labels=np.zeros(4, int))
    data = bytearray(path.read_bytes())
    data[60:120] = bytes(255 - byte for byte in data[60:120])
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.npz: not a readable npz file"):
        load_dataset(str(path))


def test_npy_and_pickles_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 3, 3)))
    with pytest.raises(ValueError, match=r"a\.npy: not a readable npz file"):
        load_dataset(str(tmp_path / "a.npy"))
    np.savez(tmp_path / "b.npz", images=np.array([{}], object), labels=np.zeros(1, int))
    with pytest.raises(ValueError, match="allow_pickle"):
        load_dataset(str(tmp_path / "b.npz"))


_IMAGES = np.full((4, 5, 6, 1), 0.5, np.float32)


def _with(value):
    images = _IMAGES.copy()
    images[2, 1, 1, 0] = value
    return images


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": None}, "no array images"),
        ({"images": None, "labels": None}, "no array images and no labels"),
        ({"images": _with(np.nan)}, "image 2 has values that are not finite"),
        ({"images": _with(-np.inf)}, "image 2 has values that are not finite"),
        ({"images": np.full((4, 5, 6), 1e300)}, "image 0 has values that are not finite"),
        ({"images": _with(1.001)}, r"pixels must be in \[0, 1\], found 0.5 to 1.001"),
        ({"images": _with(-0.001)}, r"pixels must be in \[0, 1\], found -0.001 to 0.5"),
        ({"images": 255 * _IMAGES}, "divide 8-bit pixels by 255"),
        ({"images": np.ones((4, 5, 6), np.int32)}, "images must be uint8 or float, got int32"),
        ({"images": np.ones((4, 5, 6), bool)}, "images must be uint8 or float, got bool"),
        ({"images": np.ones((4, 5), np.uint8)}, r"images must be .*got \[4, 5\]"),
        ({"images": np.float32(0.5)}, r"images must be .*got \[\]"),
        ({"images": np.ones((4, 5, 6, 1, 1), np.uint8)}, r"images must be .*got \[4, 5, 6, 1, 1\]"),
        ({"images": np.ones((0, 5, 6), np.uint8), "labels": np.zeros(0, int)}, "there are no images"),
        ({"labels": np.array([0, 1, 2])}, r"4 images need as many ids and labels, got \[4\] and \[3\]"),
        ({"labels": np.zeros((4, 1), int)}, r"got \[4\] and \[4, 1\]"),
        ({"labels": np.array([0, 1, -1, 2])}, r"label -1 is outside 0\.\.2"),
        ({"labels": np.array([0.0, 1, 0, 2])}, "labels must be integers, got float64"),
        ({"ids": np.array([0, 1, 1, 2])}, "ids must be increasing"),
        ({"ids": np.array([3, 2, 1, 0])}, "ids must be increasing"),
        ({"ids": np.array([-1, 0, 1, 2])}, "ids must be increasing and in 0"),
        ({"ids": np.array([0, 1, 2, 2**31])}, r"ids must be increasing and in 0..2\^31 - 1"),
        ({"ids": np.array([0.5, 1.5, 2.5, 3.5])}, "ids must be integers, got float64"),
        ({"ids": np.array(["a", "b", "c", "d"])}, "ids must be integers"),
        ({"ids": np.arange(3)}, r"got \[3\] and \[4\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_npz_is_refused_naming_file_and_value(tmp_path, without_type_checks, arrays, message):
    with pytest.raises(ValueError, match=rf"a\.npz: .*{message}"):
        load_dataset(_npz(tmp_path / "a.npz", **arrays))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((5, 4, 3, 1))}, "images must be float32 .*got float64"),
        ({"images": np.zeros((5, 4, 3), np.float32)}, r"images must be float32 .*\[5, 4, 3\]"),
        ({"labels": np.array([0, 1, 2, 3, 0])}, r"label 3 is outside 0\.\.2"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_dataset_is_refused(without_type_checks, changes, message):
    with pytest.raises(ValueError, match=f"toy: .*{message}"):
        _dataset(**changes)


def test_unknown_names_are_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"'fashion-mnist'.*did you mean 'fashion-mnist-subset'"):
        load_dataset("fashion-mnist")
    with pytest.raises(ValueError, match="no data set is named 'zzz'") as error:
        load_dataset("zzz")
    assert "did you mean" not in str(error.value)
    with pytest.raises(ValueError, match="`ancer-jax fetch cifar10 FOLDER` gets it"):
        load_dataset("cifar10")
    with pytest.raises(ValueError, match="split must be one of test, train, got 'validation'"):
        load_dataset(BUNDLED_SUBSET, split="validation")


def test_select_takes_every_skip_th_image_and_max_at_most():
    dataset = _dataset(10)
    np.testing.assert_array_equal(select(dataset).ids, dataset.ids)
    np.testing.assert_array_equal(select(dataset, skip=4).ids, dataset.ids[[0, 4, 8]])
    chosen = select(dataset, skip=3, max_images=2)
    np.testing.assert_array_equal(chosen.images, dataset.images[[0, 3]])
    np.testing.assert_array_equal(chosen.labels, dataset.labels[[0, 3]])
    assert len(select(dataset, max_images=99)) == 10
    with pytest.raises(ValueError, match="skip must be at least 1, got 0"):
        select(dataset, skip=0)
    with pytest.raises(ValueError, match="max must be at least 1, got 0"):
        select(dataset, max_images=0)


def test_take_keeps_images_labels_and_ids_together():
    dataset = _dataset(6)
    taken = take(dataset, [1, 4])
    np.testing.assert_array_equal(taken.ids, [3, 12])
    np.testing.assert_array_equal(taken.images, dataset.images[[1, 4]])
    np.testing.assert_array_equal(taken.labels, dataset.labels[[1, 4]])
    with pytest.raises(ValueError, match="there are no images"):
        take(dataset, [])


@pytest.mark.parametrize("processes", [1, 2, 5, 9])
def test_every_image_belongs_to_one_process(processes):
    dataset = _dataset(7)
    shards = [shard(dataset, process_index=index, process_count=processes) for index in range(processes)]
    ids = [[] if part is None else part.ids.tolist() for part in shards]
    assert sorted(i for part in ids for i in part) == dataset.ids.tolist()
    assert max(map(len, ids)) - min(map(len, ids)) <= 1
    assert all(part is None or part.whole is dataset for part in shards)
    for index in (-1, processes):
        with pytest.raises(ValueError, match=r"process_index must be in 0\.\."):
            shard(dataset, process_index=index, process_count=processes)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_batches_have_every_image_once_and_are_filled_up(size):
    dataset = _dataset(5)
    found = list(batches(dataset, size))
    assert all(len(batch[name]) == size for batch in found for name in ("id", "image", "label", "mask"))
    for name, whole in (("id", dataset.ids), ("image", dataset.images), ("label", dataset.labels)):
        np.testing.assert_array_equal(np.concatenate([batch[name][batch["mask"]] for batch in found]), whole)
    last = found[-1]
    for row in np.flatnonzero(~last["mask"]):
        np.testing.assert_array_equal(last["image"][row], last["image"][0])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        next(batches(dataset, 0))


def test_fingerprint_depends_on_the_content_only():
    dataset = _dataset(5)
    changed = dataset.images.copy()
    changed[3, 2, 1, 0] = np.nextafter(changed[3, 2, 1, 0], np.float32(2))
    labels, ids = dataset.labels.copy(), dataset.ids.copy()
    labels[4], ids[4] = 2, 99
    others = [
        dataclasses.replace(dataset, images=changed),
        dataclasses.replace(dataset, images=dataset.images.reshape(5, 3, 4, 1)),
        dataclasses.replace(dataset, labels=labels),
        dataclasses.replace(dataset, ids=ids),
        dataclasses.replace(dataset, num_classes=4),
    ]
    assert len({dataset.fingerprint, *(other.fingerprint for other in others)}) == 6
    copy = dataclasses.replace(dataset, name="other", images=np.asfortranarray(dataset.images))
    assert copy.fingerprint == dataset.fingerprint


def test_select_and_take_keep_the_fingerprint_of_the_whole_data_set():
    dataset = _dataset(5)
    assert select(dataset, skip=2, max_images=2).fingerprint == dataset.fingerprint
    assert take(dataset, [1]).fingerprint == dataset.fingerprint
