"""Data sets on disk: CIFAR-10's files, folders of pictures, TensorFlow data sets."""

import dataclasses
import importlib.util
import io
import shutil
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from ancer_jax import CertifyConfig, IsotropicConfig, RunConfig, certify_dataset, from_function
from ancer_jax.data import batches, check_classes, dataset_from_arrays, load_dataset, select
from ancer_jax.data.pictures import decode
from ancer_jax.runs.table import read_table

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (7, 32, 32, 3), np.uint8)
LABELS = np.array([3, 0, 9, 3, 1, 0, 2])


def brightness(variables, x):
    mean = x.mean(axis=(1, 2))
    return mean @ variables


def write_cifar(folder, name, pixels, labels):
    planes = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.bin").write_bytes(np.concatenate([labels[:, None].astype(np.uint8), planes], axis=1).tobytes())


def write_pictures(folder, names, pixels):
    for name, image in zip(names, pixels, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(folder / name)


def test_cifar_files_are_read(tmp_path):
    write_cifar(tmp_path, "test_batch", PIXELS, LABELS)
    for i in range(1, 6):
        write_cifar(tmp_path, f"data_batch_{i}", PIXELS[i : i + 2], LABELS[i : i + 2])
    test, train = (load_dataset(str(tmp_path), split=split) for split in ("test", "train"))
    np.testing.assert_array_equal(test.images, PIXELS.astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(test.labels, LABELS)
    assert test.ids.tolist() == list(range(7)) and test.num_classes == 10
    np.testing.assert_array_equal(train.labels, np.concatenate([LABELS[i : i + 2] for i in range(1, 6)]))
    np.testing.assert_array_equal(train.images[8], test.images[5])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda file: file.write_bytes(file.read_bytes()[:-5]),
            r"test_batch\.bin: not a whole CIFAR-10 file: 21506 bytes",
        ),
        (lambda file: file.write_bytes(b""), r"test_batch\.bin: not a whole CIFAR-10 file: 0 bytes"),
        (lambda file: file.write_bytes(b"\x0a" + file.read_bytes()[1:]), r"label 10 is outside 0\.\.9"),
        (lambda file: file.rename(file.with_name("other.bin")), r"there is no test_batch\.bin"),
    ],
)
def test_damaged_cifar_files_are_refused_by_name(tmp_path, damage, message):
    write_cifar(tmp_path, "test_batch", PIXELS, LABELS)
    damage(tmp_path / "test_batch.bin")
    with pytest.raises(ValueError, match=message):
        load_dataset(str(tmp_path))


def test_folders_of_pictures_are_numbered_as_torchvision_does(tmp_path):
    """Classes are in alphabetical order, pictures are ordered by class and name, and other files are ignored."""
    names = ["n02/b.png", "n02/a.tif", "n01/z.PNG", "n03/c.bmp"]
    write_pictures(tmp_path / "val", names, PIXELS[:4])
    (tmp_path / "val" / ".cache").mkdir()
    (tmp_path / "val" / "n01" / "notes.txt").write_text("x")
    (tmp_path / "val" / "list.txt").write_text("x")
    data = load_dataset(str(tmp_path), split="val")
    assert data.labels.tolist() == [0, 1, 1, 2] and data.ids.tolist() == [0, 1, 2, 3] and data.num_classes == 3
    expected = PIXELS[[2, 1, 0, 3]].astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(data.images[np.arange(4)], expected)
    np.testing.assert_array_equal(data.images[2], expected[2])
    part = select(data, skip=2)
    np.testing.assert_array_equal(part.images[[1]], expected[[2]])
    assert part.whole is data and part.fingerprint == data.fingerprint
    found = list(batches(part, 2))
    np.testing.assert_array_equal(found[0]["image"], expected[[0, 2]])
    assert load_dataset(str(tmp_path / "val")).fingerprint == data.fingerprint
    write_pictures(tmp_path / "val", ["n03/d.png"], PIXELS[4:5])
    assert load_dataset(str(tmp_path), split="val").fingerprint != data.fingerprint


def test_pictures_are_read_only_when_they_are_needed(tmp_path):
    write_pictures(tmp_path, ["a/0.png", "a/1.png", "b/2.png"], PIXELS[:3])
    data = load_dataset(str(tmp_path))
    content = (tmp_path / "a" / "1.png").read_bytes()
    (tmp_path / "a" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"a/1\.png: not a readable picture"):
        load_dataset(str(tmp_path))
    (tmp_path / "a" / "1.png").write_bytes(content[:-400])
    data.images[[0, 2]]
    with pytest.raises(ValueError, match=r"a/1\.png: not a readable picture") as error:
        data.images[[1]]
    assert "\n" not in str(error.value)


def test_pictures_of_other_sizes_need_a_crop(tmp_path):
    wide, tall = RNG.integers(0, 256, (300, 500, 3), np.uint8), RNG.integers(0, 256, (600, 400, 3), np.uint8)
    write_pictures(tmp_path, ["a/0.png", "b/1.png"], [wide, tall])
    with pytest.raises(ValueError, match=r"b/1\.png is \[600, 400, 3\], others are \[300, 500, 3\]: .*--crop imagenet"):
        load_dataset(str(tmp_path))
    data = load_dataset(str(tmp_path), crop="imagenet")
    assert data.images.shape == (2, 224, 224, 3)
    resized = PIL.Image.fromarray(tall).resize((256, 384), PIL.Image.Resampling.BILINEAR)
    expected = np.asarray(resized)[80:304, 16:240].astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(data.images[1], expected)


def test_folders_without_data_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="neither idx files, nor CIFAR-10 files, nor pictures in folders of classes"):
        load_dataset(str(tmp_path))
    write_pictures(tmp_path, ["imagenet/val/a/0.png", "imagenet/train/a/0.png"], PIXELS[:2])
    with pytest.raises(ValueError, match=r"there is no folder .*imagenet.test; folders: train, val"):
        load_dataset(str(tmp_path / "imagenet"))
    with pytest.raises(ValueError, match=r"imagenet.val: pictures of one class only, a"):
        load_dataset(str(tmp_path / "imagenet"), split="val")
    write_pictures(tmp_path, ["plain/a/0.png", "plain/b/0.png"], PIXELS[:2])
    assert len(load_dataset(str(tmp_path / "plain"))) == 2
    with pytest.raises(ValueError, match=r"there is no folder .*plain.vall; folders: a, b"):
        load_dataset(str(tmp_path / "plain"), split="vall")
    write_pictures(tmp_path, ["plain/b/more/0.png"], PIXELS[:1])
    with pytest.raises(ValueError, match=r"plain.b.more: the pictures of a class must lie in one folder"):
        load_dataset(str(tmp_path / "plain"))


def test_a_class_without_a_folder_is_noticed(tmp_path):
    """Labels are positions in the list of folders: without one folder, all later labels would shift."""
    write_pictures(tmp_path, ["train/a/0.png", "train/b/1.png", "train/c/2.png"], PIXELS[:3, :4, :4])
    write_pictures(tmp_path, ["test/a/0.png", "test/c/2.png"], PIXELS[:2, :4, :4])
    train_set, test_set = (load_dataset(str(tmp_path), split=split) for split in ("train", "test"))
    assert train_set.classes == ("a", "b", "c") and select(test_set, max_images=1).classes == ("a", "c")
    with pytest.raises(ValueError, match="class 1 is c, but elsewhere b: labels would be wrong"):
        check_classes(test_set, train_set.classes)
    check_classes(test_set, ())
    check_classes(train_set, train_set.classes)
    classifier = from_function(brightness, np.eye(3, dtype=np.float32), num_classes=3)
    with pytest.raises(ValueError, match="has folders of 2 classes, the classifier knows 3"):
        certify_dataset(classifier, test_set, RunConfig(certify=CertifyConfig(10, 100)), out=tmp_path / "run")


def test_pictures_that_change_after_they_were_certified_do_not_enter_the_memory(tmp_path):
    """BMP files of equal size have equal length, so that neither name nor length changes; few contents are compared."""
    names = [f"{'abc'[i // 12]}/{i:02}.bmp" for i in range(36)]
    pixels = RNG.integers(0, 256, (36, 4, 4, 3), np.uint8)
    write_pictures(tmp_path / "data", names, pixels)
    config = RunConfig(
        method="isotropic", isotropic=IsotropicConfig(steps=2, num_samples=4), certify=CertifyConfig(10, 100)
    )
    classifier = from_function(brightness, np.eye(3, dtype=np.float32), num_classes=3)
    run = lambda memory: certify_dataset(
        classifier,
        load_dataset(str(tmp_path / "data")),
        dataclasses.replace(config, memory=memory),
        out=tmp_path / "run",
    )
    run(False)
    write_pictures(tmp_path / "data", names[1:2], pixels[5:6])
    with pytest.raises(ValueError, match="data: image 1 is no longer the one that was certified"):
        run(True)
    write_pictures(tmp_path / "data", names[1:2], pixels[1:2])
    run(True)
    write_pictures(tmp_path / "data", names[:1], pixels[5:6])
    with pytest.raises(ValueError, match="was made with other settings"):
        run(True)


def test_two_parts_with_equal_names_and_sizes_are_two_data_sets(tmp_path):
    names = [f"{name}/{i}.bmp" for name in "ab" for i in range(3)]
    for split in ("train", "test"):
        write_pictures(tmp_path / split, names, RNG.integers(0, 256, (6, 4, 4, 3), np.uint8))
    first, second = (load_dataset(str(tmp_path), split=split) for split in ("train", "test"))
    assert first.fingerprint != second.fingerprint


def test_a_picture_of_16_bits_in_each_of_three_channels_is_refused(tmp_path):
    """PIL would read the upper half of the bits."""
    rows = b"".join(b"\0" + RNG.integers(0, 256, 4 * 6, np.uint8).tobytes() for _ in range(4))
    parts = ((b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    write_pictures(tmp_path, ["b/1.png"], PIXELS[:1, :4, :4])
    with pytest.raises(ValueError, match=r"0\.png: not a readable picture .*8 bits per channel, not 16"):
        load_dataset(str(tmp_path)).images[0]


def test_a_picture_of_16_bits_for_all_channels_together_is_read(tmp_path):
    pixels = RNG.integers(0, 2**15, (4, 4)).astype("<u2")  # 5 bits of each channel
    header = struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 16, 0, pixels.nbytes, 0, 0, 0, 0)
    (tmp_path / "a.bmp").write_bytes(
        b"BM" + struct.pack("<IHHI", 54 + pixels.nbytes, 0, 0, 54) + header + pixels.tobytes()
    )
    assert decode((tmp_path / "a.bmp").read_bytes(), "none").shape == (4, 4, 3)


def test_a_picture_that_pil_takes_for_an_attack_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 4)
    write_pictures(tmp_path, ["a/0.png", "b/1.png"], PIXELS[:2, :4, :4])
    with pytest.raises(ValueError, match=r"0\.png: not a readable picture .*decompression bomb"):
        load_dataset(str(tmp_path)).images[0]


def test_pictures_with_more_than_8_bits_are_refused(tmp_path):
    write_pictures(tmp_path, ["a/0.png", "b/1.png"], [np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000] * 2)
    with pytest.raises(
        ValueError, match=r"a.0\.png: not a readable picture .*8 bits per channel, but the mode in PIL is I;16"
    ):
        load_dataset(str(tmp_path))


def test_pictures_are_certified_like_arrays(tmp_path):
    """Lazy images and an array of the same pixels give the same table."""
    names = [f"{label}/{i}.png" for i, label in enumerate([0, 0, 1, 1, 2])]
    write_pictures(tmp_path / "pictures", names, PIXELS[:5, :4, :4])
    np.savez(tmp_path / "a.npz", images=PIXELS[:5, :4, :4], labels=np.array([0, 0, 1, 1, 2]))
    classifier = from_function(brightness, np.eye(3, dtype=np.float32), num_classes=3)
    config = RunConfig(certify=CertifyConfig(10, 100))
    columns = [
        read_table(certify_dataset(classifier, load_dataset(str(tmp_path / source)), config, out=tmp_path / f"run{i}"))
        for i, source in enumerate(("pictures", "a.npz"))
    ]
    for name, column in columns[0].items():
        if name != "seconds":
            assert repr(column.tolist()) == repr(columns[1][name].tolist())  # as text, NaN equals itself


def test_grey_pictures_have_one_channel_if_the_data_set_has():
    file = io.BytesIO()
    PIL.Image.fromarray(PIXELS[0, :4, :5, 0]).save(file, "PNG")
    np.testing.assert_array_equal(decode(file.getvalue(), "none", 1), PIXELS[0, :4, :5, :1])
    assert decode(file.getvalue(), "none").shape == (4, 5, 3)


@pytest.fixture(scope="module")
def tfds():
    return pytest.importorskip("tensorflow_datasets", reason="the tests read its data sets")


@pytest.fixture(scope="module")
def prepared(tfds, tmp_path_factory):
    """Folder with a prepared `cifar10` of seven images, in ArrayRecord files, made without TensorFlow."""
    folder = tmp_path_factory.mktemp("tfds")

    class Cifar10(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("3.0.2")
        name = "cifar10"

        def _info(self):
            image, label = tfds.features.Image(shape=(32, 32, 3)), tfds.features.ClassLabel(num_classes=10)
            features = tfds.features.FeaturesDict({"id": tfds.features.Text(), "image": image, "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"test": self._generate_examples()}

        def _generate_examples(self):
            for i, (image, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
                png = io.BytesIO()
                PIL.Image.fromarray(image).save(png, "PNG")
                png.seek(0)
                yield f"test_{i:05d}", {"id": f"test_{i:05d}", "image": png, "label": int(label)}

    Cifar10(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def test_tfds_and_files_in_the_authors_format_agree(prepared, tmp_path):
    """Arrays, ids and labels are identical, although the order on disk differs."""
    write_cifar(tmp_path, "test_batch", PIXELS, LABELS)
    ours, theirs = load_dataset(str(tmp_path)), load_dataset(f"tfds:cifar10@{prepared}")
    np.testing.assert_array_equal(theirs.images[np.arange(7)], ours.images)
    np.testing.assert_array_equal(theirs.labels, ours.labels)
    np.testing.assert_array_equal(theirs.ids, ours.ids)
    assert theirs.num_classes == 10


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("cifar11", "test", "tfds:cifar11, split test: cannot be read .*cifar11"),
        ("cifar10@{prepared}", "validation", "split validation: cannot be read"),
        ("cifar10@{empty}", "test", "tfds:cifar10@.*: there are no prepared ArrayRecord files, .* needs TensorFlow"),
    ],
)
def test_a_missing_tensorflow_data_set_is_one_line(prepared, tmp_path, name, split, message):
    if "TensorFlow" in message and importlib.util.find_spec("tensorflow"):
        pytest.skip("TensorFlow is installed and would start a download")
    with pytest.raises(ValueError, match=message) as error:
        load_dataset("tfds:" + name.format(prepared=prepared, empty=tmp_path), split=split)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["half", "gone", "garbled", "info"])
def test_a_damaged_tensorflow_data_set_is_one_line(prepared, tmp_path, damage):
    shutil.copytree(prepared, tmp_path / "copy")
    (records,) = (tmp_path / "copy").rglob("*array_record*")
    whole = records.read_bytes()
    if damage == "half":
        records.write_bytes(whole[: len(whole) // 2])
    elif damage == "gone":
        records.unlink()
    elif damage == "garbled":
        records.write_bytes(bytes(byte ^ 0xFF for byte in whole))
    else:
        (records.parent / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match=r"tfds:cifar10@.*copy, split test: cannot be read") as error:
        load_dataset(f"tfds:cifar10@{tmp_path / 'copy'}")
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("without_type_checker")
def test_a_data_set_of_arrays():
    images, labels = PIXELS[..., 0], LABELS % 4
    dataset = dataset_from_arrays(images, labels, name="mine")
    assert (dataset.name, dataset.num_classes, dataset.ids.tolist()) == ("mine", 4, [*range(7)])
    np.testing.assert_array_equal(dataset.images, images[..., None].astype(np.float32) / np.float32(255))
    again = dataset_from_arrays(dataset.images, labels, ids=np.arange(7) * 2, num_classes=9)
    assert again.num_classes == 9 and again.ids.tolist() == [0, 2, 4, 6, 8, 10, 12]
    for wrong, text in (((images.astype(np.int64), labels), "uint8 or float"), ((images, labels[:3]), "as many ids")):
        with pytest.raises(ValueError, match=text):
            dataset_from_arrays(*wrong)
