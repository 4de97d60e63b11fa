"""`ancer-jax train` and `ancer-jax convert` make networks that certify takes as its classifier."""

import json
import re

import numpy as np
import pytest

from ancer_jax import cli
from ancer_jax.data import load_dataset
from ancer_jax.models import load_network, make_network
from tests.cli.commands import error_line

pytestmark = pytest.mark.usefixtures("quick_compilation")


def last_error(capsys, arguments):
    """The last line that a command with bad input prints, perhaps after a progress bar."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_train_then_certify(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--epochs", "2", "--batch-size", "100", "--lr", "0.02", "--max", "300", "--sigma", "0.3", "--shift", "0"]
    flags += ["--devices", "1"]
    cli.main(["train", "--out", "net", *flags])
    printed = capsys.readouterr()
    assert "on 500 test images" in printed.out
    assert "small_cnn, augmentation (compiling):   0%" in printed.err and "small_cnn, augmentation: 100%" in printed.err
    checkpoint = load_network("net")
    assert (checkpoint.name, checkpoint.norm, checkpoint.theta) == ("small_cnn", "l2", 0.3)
    assert checkpoint.history["epochs"] == 2
    assert (tmp_path / "net" / "training.png").stat().st_size > 10_000
    test = load_dataset("fashion-mnist-subset")
    np.savez("one.npz", images=test.images, labels=test.labels)
    before = json.loads((tmp_path / "net" / "network.json").read_text())
    cli.main(["train", "--out", "net", *flags])  # the training is finished: nothing changes
    assert json.loads((tmp_path / "net" / "network.json").read_text()) == before
    cli.main(["certify", "--classifier", "net", "--method", "fixed", "--max", "2", "--n", "50", "--n0", "10"])
    assert "fixed-0.3" in capsys.readouterr().out
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "training.json").write_text("{}")
    for arguments, message in (
        (["train", "--out", "net", *flags, "--seed", "3"], "seed is 0 there, 3 here"),
        (["train", "--out", "new", *flags, "--mean", "0"], "--mean and --std go together"),
        (["train", "--out", "new", *flags, "--muon-lr", "0.1"], "--muon-lr needs --optimizer muon"),
        (
            ["train", "--out", "new", *flags, "--schedule", "onecycle", "--drop-every", "2"],
            "onecycle has no drop_every",
        ),
        (["train", "--out", "new", *flags, "--drop-every", "0"], "drops needs a positive drop_every"),
        (["train", "--out", "new", *flags, "--optimizer", "muon", "--muon-lr", "0"], "muon_learning_rate must be in"),
        (["certify", "--classifier", "net", "--norm", "l1"], "net was trained with l2 noise of 0.3: --sigma is needed"),
        (["certify", "--classifier", "net/training.tsv"], "is a file: ancer-jax convert makes the folder of a network"),
        (["certify", "--classifier", "half"], "half: its training is not finished"),
        (["train", "--out", "new", "--network", "cifar_resnet20", *flags], "takes images [n, height, width, 3], got"),
        (["train", "--out", "new", "--network", "resnet"], "there is no network 'resnet'"),
        (["train", "--out", "new", "--data", "nowhere"], "nowhere"),
        (["train", "--out", "new", "--data", "one.npz"], "training images of one.npz are the test images"),
    ):
        assert message in last_error(capsys, arguments)


def test_a_recipe_is_what_its_flags_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = ["--schedule", "onecycle", "--optimizer", "muon", "--flip", "alternating", "--muon-lr", "0.05"]
    cli.main(
        ["train", "--out", "net", *recipe, "--epochs", "2", "--batch-size", "100", "--max", "350", "--devices", "1"]
    )
    printed = capsys.readouterr()
    assert "100/600 [00:00<?, ?image/s]" in printed.err  # the step that compiles is not timed
    assert re.search(r"600/600 \[.*, [\d.]+image/s, train_loss=", printed.err)
    history = load_network("net").history
    found = {name: history[name] for name in ("schedule", "drop_every", "optimizer", "flip", "muon_learning_rate")}
    assert found == {
        "schedule": "onecycle",
        "drop_every": 0,  # not the preset's 30
        "optimizer": "muon",
        "flip": "alternating",
        "muon_learning_rate": 0.05,
    }


@pytest.mark.filterwarnings("default")
def test_convert_then_certify(tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch", reason="the test converts PyTorch files")
    from tests import torch_networks

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    theirs = torch_networks.scramble(torch_networks.ResNet((3, 3, 3), 16, "cifar"))
    torch.save({"state_dict": theirs.state_dict()}, "checkpoint.pth.tar")
    network = make_network("cifar_resnet20")
    with_layer = torch.nn.Sequential(torch_networks.Normalise(network.mean, network.std), theirs)
    torch.save(with_layer.state_dict(), "with_layer.pth")
    cli.main(["convert", "checkpoint.pth.tar", "--network", "cifar_resnet20", "--sigma", "0.5", "--out", "net"])
    printed = capsys.readouterr()
    parameters = int(printed.out.split(" parameters")[0].split()[-1].replace(",", ""))
    assert parameters == sum(p.numel() for p in theirs.parameters())
    assert "normalisation: mean 0.4914 0.4822 0.4465, std 0.2023 0.1994 0.201\n" in printed.out
    assert "warning: checkpoint.pth.tar does not say how its network normalises images" in printed.err
    resnet20 = ["convert", "with_layer.pth", "--network", "cifar_resnet20"]
    cli.main([*resnet20, "--out", "net2"])
    printed = capsys.readouterr()
    assert "std 0.2023 0.1994 0.201, as stored\n" in printed.out and printed.err == ""
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    np.savez("data.npz", images=images, labels=np.array([0, 1]))
    certify = ["certify", "--data", "data.npz", "--classifier", "net", "--method", "fixed"]
    certify += ["--n", "20", "--n0", "5", "--devices", "1"]
    cli.main(certify)
    assert "fixed-0.5" in capsys.readouterr().out
    wrn = ["--network", "wrn_40_2", "--out", "b"]
    for arguments, message in (
        ([*certify, "--norm", "l1"], "net was trained with l2 noise of 0.5: --sigma is needed"),
        (["certify", "--classifier", "net", "--max", "1"], "net takes images 32 x 32 x 3, the data are 28 x 28 x 1"),
        ([*resnet20, "--out", "net"], "exists already"),
        (["convert", "checkpoint.pth.tar", *wrn], "checkpoint.pth.tar as wrn_40_2: not a checkpoint of a WideResNet"),
        (["convert", "nothing.pth", *wrn], "there is no such file"),
        ([*resnet20, "--image-size", "0", "--out", "b"], "at least 1"),
        ([*resnet20, "--sigma", "nan", "--out", "b"], "theta must be"),
        ([*resnet20, "--std", "0", "0", "0", "--out", "b"], "--mean and --std go together"),
        ([*resnet20, "--out", "b", "--mean", *"000", "--std", *"000"], "std must be positive"),
        ([*resnet20, "--mean", "0", "--std", "1", "--out", "b"], "--mean and --std need 3 values"),
    ):
        assert message in error_line(capsys, arguments)
    assert not (tmp_path / "b").exists()
