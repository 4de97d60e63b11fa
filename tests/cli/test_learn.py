"""`ancer-jax learn-theta`, and what train and certify do with its theta map."""

import pathlib
import signal

import numpy as np
import pandas as pd
import pytest

from ancer_jax import Gaussian, cli
from ancer_jax.basis import Cosine, KarhunenLoeve, Pixels
from ancer_jax.data import BUNDLED_SUBSET, load_dataset
from ancer_jax.models import WithFront, load_network
from ancer_jax.models.bundled import COLOURED
from ancer_jax.runs import read_run
from ancer_jax.search import ThetaMap, load_theta_map, save_theta_map
from tests.cli.commands import error_line

pytestmark = pytest.mark.usefixtures("quick_compilation")

LEARN = ["learn-theta", "--out", "map.npz", "--theta-max", "1"]


@pytest.fixture(autouse=True)
def in_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("default")
def test_from_the_theta_map_to_the_certificates(tmp_path, capsys):
    cli.main([*LEARN, "--sigma", "0.25", "--max", "300"])
    theta_map = load_theta_map("map.npz")
    assert theta_map.basis == Cosine()
    assert theta_map.theta.min() == np.float32(0.25 * (1 + 2**-13)) and theta_map.theta.max() == 1
    assert (tmp_path / "map.png").stat().st_size > 10_000
    assert f"map.npz: {theta_map}" in capsys.readouterr().out
    train = ["train", "--out", "net", "--theta-map", "map.npz", "--epochs", "1", "--batch-size", "100", "--max", "300"]
    cli.main([*train, "--front", "wiener", "--test-max", "100", "--devices", "1"])
    checkpoint = load_network("net")
    assert isinstance(checkpoint.network, WithFront)
    assert checkpoint.theta == pytest.approx(np.exp(np.log(theta_map.theta.astype(float)).mean()), rel=1e-5)
    assert load_theta_map("net/theta_map.npz") == theta_map
    capsys.readouterr()
    certify = ["certify", "--classifier", "net", "--max", "2", "--n", "100", "--n0", "10", "--out", "run"]
    wanted = "was trained with a theta map, not one sigma: give --method universal (or --sigma, for other noise)"
    assert wanted in error_line(capsys, certify)
    cli.main([*certify, "--method", "universal"])
    assert read_run("run").config.certified_noise.basis == Cosine()
    capsys.readouterr()
    other = [*certify, "--method", "universal", "--basis", "pixels"]
    assert "the theta map of net is in the basis cosine, not pixels" in error_line(capsys, other)
    save_theta_map(ThetaMap(theta_map.theta * 2, Cosine()), "other.npz")
    cli.main([*certify[:-1], "doubled", "--method", "universal", "--theta-map", "other.npz"])
    assert "warning: net was trained with another noise: theta 0.25 to 1" in capsys.readouterr().err
    (tmp_path / "other.npz").rename(tmp_path / "net" / "theta_map.npz")
    changed = [*certify, "--method", "universal"]
    assert "net/theta_map.npz is not the theta map of the network" in error_line(capsys, changed)
    stored = tmp_path / "net" / "network.json"
    description = stored.read_text()
    stored.write_text(description.replace(f'"{theta_map.digest}"', "null"))
    fixed = [*certify, "--method", "fixed"]
    assert "it was trained with a theta map, whose hash is missing" in error_line(capsys, fixed)
    stored.write_text(description)
    (tmp_path / "net" / "theta_map.npz").unlink()
    assert "net/theta_map.npz: there is no such file" in error_line(capsys, changed)
    lines = pd.read_csv("run/results.tsv", sep="\t")
    # The geometric mean is the larger one, and so is the proxy radius of whatever is certified.
    assert (lines["radius_proxy"] >= lines["radius"]).all() and set(lines["min_sigma"]) == {0.25003}
    capsys.readouterr()
    assert "--sigma does not go with it" in error_line(capsys, [*train, "--sigma", "0.25"])


def test_an_ascent_at_its_upper_bound_can_be_continued(capsys):
    flags = ["--max", "50", "--steps", "2", "--batch-size", "2", "--samples", "8", "--theta-max", "0.35"]
    cli.main(["learn-theta", "--out", "map.npz", "--sigma", "0.25", *flags])
    assert load_theta_map("map.npz").theta.max() == np.float32(0.35)  # exp(log(0.35)) is larger
    cli.main(["learn-theta", "--out", "next.npz", "--start", "map.npz", *flags])
    assert load_theta_map("next.npz").history["sigma"] == 0.25


@pytest.mark.parametrize(("basis", "kind"), [("pixels", Pixels), ("karhunen-loeve", KarhunenLoeve)])
def test_an_ascent_stays_between_its_bounds(basis, kind, capsys):
    flags = ["--basis", basis, "--max", "100", "--start", "flat", "--steps", "3", "--batch-size", "2", "--samples", "8"]
    cli.main([*LEARN, *flags, "--lr", "0.5"])
    theta_map = load_theta_map("map.npz")
    assert isinstance(theta_map.basis, kind)
    assert theta_map.theta.min() >= np.float32(0.25) and 0.3 < theta_map.theta.max() <= 1  # sigma of the bundled model
    printed = capsys.readouterr().out
    assert "start: theta 0.25 to 0.25" in printed and "estimated ACR-tilde" in printed


def test_an_ascent_from_the_map_of_a_network_keeps_its_basis_and_its_smallest_theta(capsys):
    cli.main([*LEARN, "--basis", "karhunen-loeve", "--sigma", "0.3", "--max", "100"])
    first = load_theta_map("map.npz")
    assert first.history["start"] == "spectral" and first.history["images"] == 100 and "lr" not in first.history
    again = ["learn-theta", "--out", "next.npz", "--theta-max", "1", "--start", "map.npz", "--max", "100"]
    flags = ["--steps", "2", "--batch-size", "2", "--samples", "8", "--lr", "0.1"]
    capsys.readouterr()
    assert "map.npz is a file, from which an ascent starts: give --steps" in error_line(capsys, again)
    cosine = [*again, *flags, "--basis", "cosine"]
    assert "map.npz is in the basis karhunen-loeve, not cosine" in error_line(capsys, cosine)
    narrow = [*again, *flags, "--sigma", "0.5"]
    bounds = "from 0.3000366 to 1: not between 0.500061 (--sigma 0.5) and --theta-max 1"
    assert bounds in error_line(capsys, narrow)
    save_theta_map(ThetaMap(np.full((28, 28, 1), 0.3), first.basis, {"sigma": 0.3}), "low.npz")
    low = ["learn-theta", "--out", "next.npz", "--theta-max", "1", "--start", "low.npz", "--max", "100", *flags]
    assert "from 0.3 to 0.3: not between 0.3000366 (--sigma 0.3)" in error_line(capsys, low)
    cli.main([*again, *flags])
    found = load_theta_map("next.npz")
    assert found.basis == first.basis and found != first
    gaps = [float(Gaussian(basis).gap(0.9)) for basis in (found.basis, Pixels())]
    assert found.theta.min() * gaps[0] >= np.float32(0.3) * gaps[1] and found.theta.max() <= 1
    assert found.history["start"] == first.history and found.history["lr"] == 0.1
    capsys.readouterr()
    assert "next.npz exists already: name a new file" in error_line(capsys, [*again, *flags])
    pathlib.Path("next.npz").unlink()  # its picture is still there
    assert "next.png exists already: name a new file" in error_line(capsys, [*again, *flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--norm", "l1", "--basis", "cosine"], "noise for l1 is in pixels: Cosine() does not preserve l1 distances"),
        (["--out", "map.npy"], "--out is the file of a theta map, NAME.npz"),
        (["--theta-max", "0.1"], "theta_max must be at least 0.250031 with sigma 0.25, got 0.1"),
        (["--theta-max", "9", "--start", "flat"], "thetas may differ by a factor of 32 at most"),
        (["--sigma", "-1"], "sigma must be"),
        (["--data", "nowhere"], "nowhere"),
        (["--steps", "-1"], "steps"),
        (["--classifier", COLOURED], "was trained with a theta map, not one sigma: give --sigma"),
        (["--lr", "5", "--samples", "9"], "without --steps, --samples, --lr must not be given"),
        (["--power", "9", "--start", "flat"], "without --start spectral, --power must not be given"),
        (["--steps", "2", "--seed", "-1"], "seed must be in 0..2147483647, got -1"),
        (["--start", "spectrum"], "spectral, flat, or the file of a theta map; no file is named 'spectrum'"),
    ],
)
def test_bad_input_gets_one_line(flags, message, capsys):
    assert message in error_line(capsys, [*LEARN, *flags])


def test_a_map_of_the_noise_of_another_norm_is_refused(tmp_path, capsys):
    cli.main([*LEARN, "--norm", "l1", "--sigma", "0.5", "--max", "50"])
    assert (tmp_path / "map.png").stat().st_size > 10_000
    refused = "is a theta map of l1 noise, not l2: the units of theta differ"
    for command in (
        ["certify", "--method", "universal", "--theta-map", "map.npz", "--max", "1", "--out", "run"],
        ["train", "--theta-map", "map.npz", "--out", "net"],
        ["learn-theta", "--start", "map.npz", "--steps", "1", "--theta-max", "1", "--out", "next.npz"],
    ):
        assert refused in error_line(capsys, command)


def test_an_ascent_can_be_stopped_at_any_time(monkeypatch, capsys):
    """Its program returns to Python at its end only, so that Python's own handler would come too late."""
    before, during = signal.getsignal(signal.SIGINT), []

    def ascent(*_, **__):
        during.append(signal.getsignal(signal.SIGINT))
        raise ValueError("enough")

    monkeypatch.setattr(cli.learn, "optimize_universal", ascent)
    with pytest.raises(SystemExit):
        cli.main([*LEARN, "--steps", "1", "--max", "20"])
    assert during == [signal.SIG_DFL]
    assert signal.getsignal(signal.SIGINT) == before


def test_an_ascent_that_finds_no_region_is_an_error(tmp_path, capsys):
    (tmp_path / "plugin.py").write_text(
        "import jax.numpy as jnp\nfrom ancer_jax import from_function\n"
        "def undecided():\n    return from_function(lambda _, x: jnp.zeros((len(x), 10)), (), num_classes=10)\n"
    )
    ascent = ["--sigma", "0.25", "--max", "20", "--steps", "2", "--samples", "8", "--batch-size", "2"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*LEARN, *ascent, "--classifier", "plugin:undecided"])
    assert stop.value.code == 2
    assert "error: there is nothing to ascend with plugin:undecided" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "map.npz").exists()


def test_certify_takes_the_basis_of_the_training_images(capsys):
    images = load_dataset(BUNDLED_SUBSET, split="train").images
    flags = ["--basis", "karhunen-loeve", "--max", "2", "--n", "50", "--classifier", "bundled"]
    np.save("theta.npy", np.full((28, 28, 1), 0.3, np.float32))
    cli.main(["certify", "--method", "universal", "--theta-map", "theta.npy", *flags, "--out", "run"])
    assert read_run("run").config.basis == KarhunenLoeve.of(images)
    capsys.readouterr()
    assert "noise for l1 is in pixels" in error_line(capsys, ["certify", "--norm", "l1", *flags, "--out", "l1"])
