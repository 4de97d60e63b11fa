import dataclasses
import fractions
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pandas as pd
import pytest

from ancer_jax import cli, report
from ancer_jax.data import BUNDLED_SUBSET, load_dataset
from ancer_jax.report import NOT_RECONCILED, TWO_CLAIMS, UNKNOWN
from ancer_jax.runs import read_run

pytestmark = pytest.mark.usefixtures("quick_compilation")

_PLUGIN = """
import jax.numpy as jnp
from ancer_jax import from_function

weights = jnp.array([[1.0, -1.0, 0.5], [-1.0, 1.0, 0.0]])

def linear(weights, x):
    return x.reshape(len(x), -1)[:, :2] @ weights

def three():
    return from_function(linear, weights, num_classes=3)

def nothing():
    return None

def needs(argument):
    return argument

def wrong_logits():
    return from_function(linear, weights, num_classes=4)

def infinite():
    return from_function(linear, weights * jnp.inf, num_classes=3)

number = 3
"""
_SMALL = ["--devices", "1", "--batch-size", "2", "--n0", "10"]
# The settings of `_SmallCertify` below: programs that are compiled for one test serve the other.
_SEARCH = [
    *("--iso-steps", "100", "--iso-samples", "4", "--ancer-steps", "3", "--ancer-samples", "4"),
    *("--guard-samples", "50", "--leakage-references", "5", "--leakage-samples", "8"),
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "plugin.py").write_text(_PLUGIN)
    images = np.random.default_rng(0).integers(0, 256, (4, 2, 1)).astype(np.uint8)
    np.savez(tmp_path / "toy.npz", images=images, labels=np.array([0, 1, 2, 1]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield tmp_path
    sys.modules.pop("plugin", None)


def _toy(*flags, method="fixed", sigma="0.25", n="100"):
    own = ["--data", "toy.npz", "--classifier", "plugin:three", "--out", "run"]
    return ["certify", *own, "--method", method, "--sigma", sigma, "--n", n, *_SMALL, *flags]


def _error(capsys, arguments):
    """The one line that the command prints."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ancer-jax: error: ")
    return line


def _settings(run):
    return json.loads((run / "config.json").read_text())["settings"]


@pytest.mark.parametrize(
    ("norm", "method", "theta"), [("l2", "ancer", 0.25), ("l2", "isotropic", 0.25), ("l1", "fixed", 0.5)]
)
def test_certify_on_the_bundled_images(here, capsys, norm, method, theta):
    flags = ["certify", "--norm", norm, "--method", method, "--n", "100", "--skip", "100", "--max", "3"]
    cli.main([*flags, *_SMALL, *_SEARCH])
    printed = capsys.readouterr()
    out = here / "runs" / f"{norm}-{method}-{theta:g}"
    table = pd.read_csv(out / "results.tsv", sep="\t")
    assert table["idx"].tolist() == [0, 2000, 4000]
    dataset = load_dataset(BUNDLED_SUBSET)
    assert table["label"].tolist() == dataset.labels[[0, 100, 200]].tolist()
    assert set(table["method"]) == {method}
    assert table["correct"].sum() >= 2
    shape = (1, 28, 28, 1) if method == "ancer" else (1,)
    assert [shard["theta"][:1].shape for shard in read_run(out).shards()] == [shape, shape]
    largest = {"l2": 4 * theta * 2.5, "l1": 4 * theta}[norm]
    assert (table["radius"] < largest).all() and (table["radius"] <= table["radius_proxy"] + 1e-6).all()
    settings = _settings(out)
    assert (settings["norm"], settings["theta"], settings["certify"]) == (norm, theta, _certify(n=100, n0=10))
    assert ("anisotropic" in settings, "isotropic" in settings) == (method == "ancer", method != "fixed")
    assert out.name in printed.out and "Certified accuracy at" in printed.out
    assert NOT_RECONCILED not in printed.out
    assert all((title in printed.out) == (method != "fixed") for title in ("Memory (before -> after)", "Leakage to"))
    assert (out / "results_before_memory.tsv").exists() == (out / "memory.npz").exists() == (method != "fixed")
    assert "3/3" in printed.err


def _certify(**changes):
    return {"n0": 100, "n": 100_000, "alpha": 0.001} | changes


def test_certify_again_continues_and_changes_nothing(here, capsys):
    cli.main(_toy("--max", "2"))
    cli.main(_toy())
    whole = (here / "run" / "results.tsv").read_bytes()
    shards = {file.name: file.stat().st_mtime_ns for file in (here / "run" / "shards").iterdir()}
    assert sorted(shards) == ["0.npz", "2.npz"]
    cli.main(_toy())
    assert (here / "run" / "results.tsv").read_bytes() == whole
    assert {file.name: file.stat().st_mtime_ns for file in (here / "run" / "shards").iterdir()} == shards
    assert "4/4" in capsys.readouterr().err


def test_an_own_classifier_certifies_what_it_says(here):
    cli.main(_toy(n="500"))
    table = pd.read_csv(here / "run" / "results.tsv", sep="\t")
    images = load_dataset("toy.npz").images.reshape(4, 2)
    weights = np.array([[1.0, -1.0, 0.5], [-1.0, 1.0, 0.0]])
    for line, image in zip(table.itertuples(), images, strict=True):
        logits = image @ weights
        if line.predict >= 0:
            assert line.predict == logits.argmax()
            margins = (logits.max() - logits) / np.maximum(
                np.linalg.norm(weights[:, [line.predict]] - weights, axis=0), 1e-9
            )
            # No ball that crosses the boundary of a linear classifier can be certified.
            assert line.radius <= np.delete(margins, line.predict).min()
    assert (table["predict"] >= 0).any()


@pytest.fixture
def captured(monkeypatch):
    """What `certify_dataset` would be given."""
    found = {}

    def stop(classifier, dataset, config, *, out, execution, reconcile, **progress):
        found.update(config=config.settings(), execution=dataclasses.asdict(execution), out=out, reconcile=reconcile)
        raise ValueError("enough")

    monkeypatch.setattr(cli.certify, "certify_dataset", stop)
    return found


def test_flags_reach_the_settings(captured):
    flags = [
        *("--norm", "l1", "--method", "ancer", "--alpha", "0.05", "--seed", "7", "--objective", "log_volume"),
        *("--iso-steps", "11", "--iso-lr", "0.1", "--iso-samples", "12"),
        *("--ancer-steps", "13", "--ancer-lr", "0.2", "--ancer-samples", "14", "--kappa", "1.5"),
        *("--theta-max", "3", "--guard", "superset", "--guard-samples", "15", "--batch-size", "3", "--chunk", "16"),
        *(
            "--leakage-references",
            "17",
            "--leakage-samples",
            "18",
            "--leakage-weight",
            "1.25",
            "--leakage-limit",
            "0.2",
        ),
        *("--split-devices", "draws", "--no-memory"),
    ]
    with pytest.raises(SystemExit):
        cli.main([*_toy(), *flags])
    shared = {"objective": "log_volume", "theta_max": 3.0, "leakage_weight": 1.25, "leakage_batch": 32, "ascent": "log"}
    assert captured["config"] == {
        **{"norm": "l1", "method": "ancer", "theta": 0.25, "seed": 7, "guard": "superset", "guard_samples": 15},
        "certify": _certify(n0=10, n=100, alpha=0.05),
        "isotropic": {"steps": 11, "learning_rate": 0.1, "num_samples": 12, **shared},
        "anisotropic": {"steps": 13, "learning_rate": 0.2, "num_samples": 14, "kappa": 1.5, **shared},
        "leakage": {"num_references": 17, "num_samples": 18},
        "leakage_limit": 0.2,
    }
    assert captured["reconcile"] is False
    assert captured["execution"] == {"batch_size": 3, "chunk": 16, "devices": 1, "split": "draws"}
    assert captured["out"] == "run"


@pytest.mark.parametrize(
    ("convention", "theta"),
    # Half-width 0.3, standard deviation 0.3, and the reference's scripts: half-width 0.3 / sqrt(3).
    [("theta", 0.3), ("rs4a", 0.3 * math.sqrt(3)), ("ancer", 0.3 / math.sqrt(3))],
)
def test_sigma_convention(captured, convention, theta):
    with pytest.raises(SystemExit):
        cli.main(_toy("--norm", "l1", "--sigma-convention", convention, sigma="0.3"))
    assert captured["config"]["theta"] == pytest.approx(theta, rel=1e-12)


@pytest.mark.parametrize("convention", ["rs4a", "ancer"])
def test_sigma_convention_is_for_l1_only(here, capsys, convention):
    refused = "--sigma-convention is for the uniform noise of --norm l1"
    assert refused in _error(capsys, _toy("--sigma-convention", convention))
    assert refused in _error(capsys, _toy("--norm", "l1", "--noise", "splitting", "--sigma-convention", convention))
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--alpha", "0"), "alpha .*0"),
        (("--alpha", "1"), "alpha .*1"),
        (("--alpha", "2"), "alpha .*2"),
        (("--alpha", "nan"), "alpha .*nan"),
        (("--n", "0"), "n must be in 1\.\.2147483647, got 0"),
        (("--n", "-5"), "n must be in .*, got -5"),
        (("--n", "2147483648"), "n must be .*got 2147483648"),
        (("--n0", "0"), "n0 must be in .*, got 0"),
        (("--sigma", "0"), "theta must be positive and finite as float32, got 0"),
        (("--sigma", "-1"), "theta must be positive and finite as float32, got -1"),
        (("--sigma", "nan"), r"theta must be in \[-inf, inf\], got nan"),
        (("--sigma", "inf"), "theta must be positive and finite as float32, got inf"),
        (("--theta-max", "0.1"), "theta_max must be at least theta = 0.25, got 0.1"),
        (("--theta-max", "0"), r"theta_max must be in \(0, inf\], got 0"),
        (("--theta-max", "nan"), r"theta_max must be in \(0, inf\], got nan"),
        (("--skip", "0"), "skip must be at least 1, got 0"),
        (("--max", "0"), "max must be at least 1, got 0"),
        (("--method", "shared"), "no other takes one: got shared"),
        (("--theta-map", "no.npy"), "--theta-map holds theta itself: --sigma and --sigma-convention do not go with it"),
        (("--seed", "-1"), "seed must be in .*got -1"),
        (("--iso-steps", "0"), "steps must be at least 1, got 0"),
        (("--ancer-lr", "0"), r"learning_rate must be in \(0, inf\), got 0"),
        (("--ancer-samples", "0"), "num_samples must be at least 1, got 0"),
        (("--kappa", "-1"), r"kappa must be in \[0, inf\), got -1"),
        (("--guard-samples", "0"), "guard_samples must be at least 1, got 0"),
        (("--batch-size", "0"), "batch_size must be at least 1, got 0"),
        (("--chunk", "0"), "chunk must be at least 1, got 0"),
        (("--devices", "0"), "devices must be at least 1, got 0"),
        (("--devices", "99"), r"devices must be in 1\.\.\d+ on this machine, got 99"),
        (("--data", "fashion-mnist"), "'fashion-mnist'.*did you mean 'fashion-mnist-subset'"),
        (("--data", "nowhere.npz"), "no data set is named 'nowhere.npz' and no file or folder is there"),
        (("--data", "."), "neither idx files, nor CIFAR-10 files, nor pictures in folders of classes"),
        (("--data", "plugin.py"), "plugin.py: not a readable npz file"),
        (
            ("--classifier", "bundle"),
            "'bundle' is neither bundled, nor the folder of a network, nor module:function; did you mean 'bundled'",
        ),
        (("--classifier", "resnet"), "'resnet' is neither bundled, nor the folder of a network, nor module:function"),
        (("--classifier", "nomodule:three"), "'nomodule:three': No module named 'nomodule'"),
        (("--classifier", "plugin:four"), "'plugin:four': .*four"),
        (("--classifier", "plugin:"), "'plugin:': "),
        (("--classifier", ":three"), "':three': "),
        (("--classifier", ".plugin:three"), "'.plugin:three': "),
        (("--classifier", "plugin:number"), "'plugin:number': .*not callable"),
        (("--classifier", "plugin:needs"), "'plugin:needs': .*argument"),
        (("--classifier", "plugin:nothing"), "'plugin:nothing' returned NoneType, not a Classifier"),
        (("--classifier", "plugin:wrong_logits"), r"must return logits of shape \[\d+, 4\].* got \[\d+, 3\]"),
        (("--classifier", "plugin:infinite"), "logits are not finite"),
        (("--data", BUNDLED_SUBSET), "has 10 classes, the classifier only 3"),
        (("--out", "toy.npz"), "toy.npz is a file, not a run directory"),
        (("--out", "toy.npz/run"), "toy.npz/run"),
        (("--out", "."), r"\. is not a run directory: it holds plugin\.py and no config\.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line(here, capsys, flags, message):
    assert re.search(message, _error(capsys, _toy(*flags)))
    assert not (here / "run").exists()
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == ["plugin.py", "toy.npz"]


def test_a_theta_map_of_ones_own(here, capsys):
    arguments = ["certify", "--data", "toy.npz", "--classifier", "plugin:three", "--n", "50", "--method", "shared"]
    arguments += ["--theta-map", "theta.npy"]
    assert "theta.npy: cannot be read as an .npy file" in _error(capsys, arguments)
    np.save(here / "theta.npy", np.zeros((1, 1, 1)))
    assert "--theta-map theta.npy: theta must be positive, got 0.0" in _error(capsys, arguments)
    for other in (np.array(["a"]), np.ones(2, complex), np.zeros(0)):
        np.save(here / "theta.npy", other)
        assert "theta.npy: not an .npy file with an array of real numbers" in _error(capsys, arguments)
    np.savez(here / "theta.npz", theta=np.ones(1))
    assert "theta.npz: not an .npy file" in _error(capsys, [*arguments[:-1], "theta.npz"])
    np.save(here / "theta.npy", np.ones((2, 2, 1)))
    assert "theta_map must be [2, 1, 1] as the images are, got [2, 2, 1]" in _error(capsys, arguments)
    np.save(here / "theta.npy", np.full((2, 1, 1), 0.25))
    cli.main(arguments)
    lines = pd.read_csv(here / "runs" / "l2-shared-0.25" / "results.tsv", sep="\t")
    assert set(lines["method"]) == {"shared"} and set(lines["min_sigma"]) == {0.25}


def test_an_own_classifier_needs_sigma(capsys):
    arguments = ["certify", "--data", "toy.npz", "--classifier", "plugin:three"]
    assert "--sigma is needed for your own classifier" in _error(capsys, arguments)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.array([[[0.5]], [[np.nan]]])}, "image 1 has values that are not finite"),
        ({"images": np.array([[[0.5]], [[255.0]]])}, r"pixels must be in \[0, 1\], found 0.5 to 255"),
        ({"images": np.zeros((0, 1, 1)), "labels": np.zeros(0, int)}, "there are no images"),
        ({"images": np.zeros((2, 1))}, "images must be "),
        ({"labels": np.array([0, -1])}, r"label -1 is outside 0\.\.1"),
        ({"labels": np.array([0.0, 1.0])}, "labels must be integers, got float64"),
        # Without a list of classes a label that is too large is a class that the classifier lacks.
        ({"labels": np.array([0, 3])}, "has 4 classes, the classifier only 3"),
    ],
    ids=["nan", "255", "empty", "shape", "negative label", "float label", "large label"],
)
def test_bad_data_is_one_line(here, capsys, arrays, message):
    np.savez(here / "bad.npz", **{"images": np.zeros((2, 2, 1)), "labels": np.arange(2)} | arrays)
    assert re.search(f"error: bad.npz:? .*{message}", _error(capsys, _toy("--data", "bad.npz")))
    assert not (here / "run").exists()


def test_a_run_with_other_settings_is_one_line_and_stays(here, capsys):
    cli.main(_toy(n="10"))
    before = (here / "run" / "results.tsv").read_bytes()
    capsys.readouterr()
    assert "certify.n is 10 there, 20 here" in _error(capsys, _toy(n="20"))
    assert "theta is 0.25 there, 0.5 here" in _error(capsys, _toy(n="10", sigma="0.5"))
    assert (here / "run" / "results.tsv").read_bytes() == before


def test_damage_in_a_run_is_one_line(here, capsys):
    cli.main(_toy(n="10"))
    capsys.readouterr()
    shard = here / "run" / "shards" / "2.npz"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    assert "2.npz: truncated or not a shard" in _error(capsys, _toy(n="10"))
    shard.write_bytes(whole)
    (here / "run" / "config.json").write_text("{")
    assert "config.json: not the settings of a run" in _error(capsys, _toy(n="10"))


def test_a_full_disk_is_the_last_line_and_keeps_what_is_finished(here, capsys, monkeypatch):
    # A link instead of a full disk: whatever is written to it fails with ENOSPC.
    real = cli.certify.certify_dataset

    def filling(*arguments, progress, **options):
        def fill(images):
            progress(images)
            if (here / "run" / "shards" / "0.npz").exists():
                (here / "run" / "shards" / "2.npz.0.tmp").symlink_to("/dev/full")

        return real(*arguments, progress=fill, **options)

    monkeypatch.setattr(cli.certify, "certify_dataset", filling)
    with pytest.raises(SystemExit) as stop:
        cli.main(_toy(n="10"))
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"^ancer-jax: error: cannot write run/shards/2\.npz: No space left on device; what was", last)
    monkeypatch.setattr(cli.certify, "certify_dataset", real)
    cli.main(_toy(n="10"))
    assert len(pd.read_csv(here / "run" / "results.tsv", sep="\t")) == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_says_how_to_continue(here, capsys, monkeypatch, number):
    def left(status):
        raise SystemExit(status)

    before = signal.getsignal(number)
    monkeypatch.setattr(os, "_exit", left)
    monkeypatch.setattr(cli.certify, "certify_dataset", lambda *_, **__: signal.raise_signal(number))
    with pytest.raises(SystemExit) as stop:
        cli.main(_toy())
    assert stop.value.code == 128 + number
    assert capsys.readouterr().err == "\nancer-jax: stopped; start the same command again to continue\n"
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["unknown"], ["certify", "--nonsense", "1"], ["certify", "--norm", "l3"], ["certify", "--n", "many"]),
        *(["certify", "--method", "best"], ["certify", "--split", "validation"], ["certify", "--guard", "maybe"]),
    ],
    ids=" ".join,
)
def test_syntax_errors_exit_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize(("alpha", "each"), [("0.05", 0.0125), ("0.1", 0.025), ("1e-6", 2.5e-7)])
def test_alpha_of_a_run_is_shared_by_its_images(here, capsys, alpha, each):
    cli.main(_toy("--alpha-run", alpha, n="500"))
    assert _settings(here / "run")["certify"]["alpha"] == each
    assert f" p >= {'0.9999' if alpha == '1e-6' else format(1 - float(alpha), '.4f')} " in capsys.readouterr().out
    # One image more, and each would have less.
    assert "certify.alpha is" in _error(capsys, _toy("--alpha-run", alpha, "--max", "3", n="500"))


@pytest.mark.parametrize("images", [3, 7, 30, 500, 10_000])
@pytest.mark.parametrize("alpha", [0.05, 0.1, 1e-3])
def test_so_many_shares_of_alpha_are_not_more_than_alpha(images, alpha):
    each = cli.certify._share_of_alpha(alpha, images)
    total = images * fractions.Fraction(repr(each))
    assert 0.99999 * alpha < total <= fractions.Fraction(repr(alpha))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--alpha-run", "0"), "alpha_run must be in (0, 1), got 0.0"),
        (("--alpha-run", "1.5"), "alpha_run must be in (0, 1), got 1.5"),
        (("--alpha-run", "0.1", "--alpha", "0.01"), "--alpha is of each certificate, --alpha-run of all: name one"),
    ],
)
def test_alphas_that_do_not_go_together_are_one_line(here, capsys, flags, message):
    assert message in _error(capsys, _toy(*flags))


def test_report_compares_runs_and_files(here, capsys):
    cli.main(_toy())
    (here / "cohen.tsv").write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t3\t3\t0.625\t1\t0:00:15.01\n")
    capsys.readouterr()
    cli.main(["report", "run", "cohen.tsv", "--radii", "0.1", "0.6", "--out", "pictures/here"])
    printed = capsys.readouterr().out
    assert re.search(r"^\| cohen\? +\| \? +\| 1 .* 0\.625 ", printed, re.MULTILINE)
    assert re.search(r"^\| cohen\? +\| radius +\| 1\.000 +\| 1\.000 +\|$", printed, re.MULTILINE)
    assert re.search(r"^\| run +\| l2 +\| 4 ", printed, re.MULTILINE)
    assert f"\n? {UNKNOWN}\n" in printed and f"* {NOT_RECONCILED}" not in printed
    files = {path.name for path in (here / "pictures" / "here").iterdir()}
    assert files == {"certified_accuracy.png", "report.html"}
    *last, missing = printed.splitlines()[-3:]
    assert last == ["pictures: pictures/here/certified_accuracy.png", "page: pictures/here/report.html"]
    assert missing.startswith("no images of run: fashion-mnist-subset is not what it is of")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: there is no such run or file"),
        (["empty"], "empty is not a run directory"),
        (["toy.tsv", "--leakage-limit", "2"], r"--leakage-limit must be in \[0, 1\], got 2.0"),
        (["toy.tsv", "--radii", "0", "nan"], "--radii must be finite"),
        (["toy.tsv", "--orders", "2"], "--orders needs a run directory with a memory"),
        (["negative.tsv"], "negative.tsv: line 3: radius cannot be -5"),
        (["wrong.tsv"], "wrong.tsv: line 3: correct cannot be 1"),
        (["twice.tsv"], "twice.tsv: line 3: idx cannot be 0"),
        (["column.tsv"], "column.tsv: two columns have one name"),
        (["picture.png"], "picture.png: cannot be read"),
        (["toy.npz"], "toy.npz: (cannot be read|not a results table)"),
        (["plugin.py"], "plugin.py: not a results table, no column 'idx'"),
    ],
    ids=str,
)
def test_report_of_something_else_is_one_line(here, capsys, arguments, message):
    (here / "empty").mkdir()
    (here / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    lines = "idx\tlabel\tpredict\tradius\tcorrect\n0\t3\t3\t0.5\t1\n"
    for name, line in (("toy", "1\t3\t3\t0\t1"), ("negative", "1\t3\t3\t-5\t1"), ("wrong", "1\t3\t2\t0\t1")):
        (here / f"{name}.tsv").write_text(lines + line)
    (here / "twice.tsv").write_text(lines + "0\t3\t3\t0.5\t1")
    (here / "column.tsv").write_text(lines.replace("\n", "\tradius\n", 1).replace("1\n", "1\t0.5\n"))
    assert re.search(message, _error(capsys, ["report", *arguments]))
    assert not (here / "report").exists()


def test_without_memory_the_label_says_so(here, capsys):
    cli.main(_toy(*_SEARCH, "--no-memory", "--no-leakage", method="isotropic"))
    printed = capsys.readouterr().out
    assert NOT_RECONCILED in printed
    assert "Memory (before" not in printed and "| not measured |" in printed
    assert not (here / "run" / "memory.npz").exists() and not (here / "run" / "results.tsv").exists()
    # The memory is no setting of the run: it can be had later.
    cli.main(_toy(*_SEARCH, "--no-leakage", method="isotropic"))
    assert NOT_RECONCILED not in capsys.readouterr().out
    assert (here / "run" / "results.tsv").exists()


def test_report_shows_what_the_order_of_the_memory_does(here, capsys):
    cli.main(_toy(*_SEARCH, method="isotropic"))
    cli.main(_toy("--out", "fixed"))
    capsys.readouterr()
    cli.main(["report", "run", "fixed", "--orders", "3", "--leakage-limit", "0.25"])
    printed = capsys.readouterr().out
    assert "leak at most 0.25" in printed
    table = printed.split("In order of ids")[1]
    assert re.search(
        r"^\| run +\| random orders +\| accuracy +\| ACR +\| ACR-tilde +\| regions changed", table, re.MULTILINE
    )
    (row,) = re.findall(r"^\| run +\| 3 +\|.*$", table, re.MULTILINE)
    assert len(re.findall(r"\S+ \(\S+ to \S+\)", row)) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "run", "--orders", "-1"], "--orders must not be negative, got -1"),
        (["report", "run", "--orders", "2"], "--orders needs a run directory with a memory"),
        (_toy("--leakage-references", "0", method="ancer"), "num_references must be at least 1, got 0"),
        (_toy("--leakage-limit", "1.5", method="ancer"), r"leakage_limit must be in \[0, 1\], got 1.5"),
        (_toy("--leakage-weight", "-1", method="ancer"), r"leakage_weight must be in \[0, inf\), got -1"),
        (_toy("--leakage-weight", "1", "--no-leakage", method="ancer"), "a leakage weight or limit needs leakage"),
    ],
    ids=str,
)
def test_bad_values_of_memory_and_leakage_are_one_line(here, capsys, arguments, message):
    if arguments[0] == "report":
        cli.main(_toy())
        capsys.readouterr()
    assert re.search(message, _error(capsys, arguments))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator", "host:1"], "--coordinator, --processes and --process need --multihost"),
        (
            ["--multihost", "--coordinator", "host", "--processes", "2", "--process", "0"],
            "must be host:port, got 'host'",
        ),
        # What JAX says depends on whether it is in use already.
        (["--multihost", "--coordinator", "host:1", "--processes", "2", "--process", "2"], "--multihost: "),
        (["--multihost", "--processes", "2", "--process", "0"], "--multihost: "),
    ],
    ids=str,
)
def test_processes_that_are_not_named_well_are_one_line(here, capsys, flags, message):
    assert message in _error(capsys, _toy(*flags))


def test_report_of_nothing_exits_with_2(capsys):
    assert "name at least one run directory or TSV file" in _error(capsys, ["report"])


@dataclasses.dataclass(frozen=True)
class _SmallCertify(cli.Certify):
    n0: int = 10
    iso_samples: int = 4
    ancer_steps: int = 3
    ancer_samples: int = 4
    guard_samples: int = 50
    leakage_references: int = 5
    leakage_samples: int = 8
    batch_size: int = 2
    devices: int | None = 1


def test_demo_compares_three_methods_and_draws_them(here, capsys, monkeypatch):
    monkeypatch.setattr(cli.certify, "Certify", _SmallCertify)
    cli.main(["demo", "--max", "2", "--n", "100"])
    printed = capsys.readouterr().out
    lines = [line.split("|")[1].strip() for line in printed.splitlines() if re.match(r"\| \S+ +\| l2 +\| 2 ", line)]
    assert len(lines) == 3 and lines[0].startswith("fixed-") and lines[1:] == ["isotropic", "ancer"]
    assert sorted(path.name for path in (here / "demo-l2").glob("*.png")) == [
        "certified_accuracy.png",
        "theta_ancer.png",
    ]
    tried = [f"try-{factor * 0.25:g}" for factor in (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)]
    for name in (*tried, *lines):
        table = pd.read_csv(here / "demo-l2" / name / "results.tsv", sep="\t")
        assert table["idx"].tolist() == [0, 5000]
    # The best of those that were tried is certified again, by other draws.
    proxy = {name: report.load_results(here / "demo-l2" / name).mean_proxy_radius for name in tried}
    best = max(proxy, key=proxy.__getitem__)
    assert lines[0] == best.replace("try", "fixed")
    seeds = [_settings(here / "demo-l2" / name)["seed"] for name in (best, *lines)]
    assert seeds == [1, 0, 0, 0]
    assert printed.count("x the best fixed theta") == 3
    assert "1.00 x the best fixed theta" in printed and TWO_CLAIMS in printed


@pytest.mark.parametrize(("flag", "message"), [("--max", "max must be"), ("--n", "n must be")])
def test_demo_of_nothing_is_one_line(here, capsys, flag, message):
    assert message in _error(capsys, ["demo", flag, "0"])
    assert not (here / "demo-l2").exists()


def test_theta_maps_are_beside_the_images_of_the_data_set_that_is_named(here, capsys):
    """And runs of one name do not overwrite each other's."""
    cli.main(_toy("--out", "a/run", *_SEARCH, method="ancer"))
    shutil.copytree("a", "b")
    capsys.readouterr()
    cli.main(["report", "a/run", "b/run", "--out", "pictures", "--data", "toy.npz"])
    assert "no theta maps" not in capsys.readouterr().out
    names = {path.name for path in (here / "pictures").iterdir()}
    assert names == {"certified_accuracy.png", "theta_run.png", "theta_run_1.png", "report.html"}
    cli.main(["report", "a/run", "--out", "others"])
    assert "no theta maps of a/run: fashion-mnist-subset is not what it is of (--data," in capsys.readouterr().out
    assert "no data set is named 'toy'" in _error(capsys, ["report", "a/run", "--data", "toy"])


def test_a_device_that_is_too_small_is_one_line(monkeypatch, capsys):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 bytes.\nmore")

    monkeypatch.setattr(cli.certify, "certify_dataset", fail)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["certify", "--out", "run"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].endswith("(RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 bytes.)")
    assert "a smaller --batch-size or --chunk" in error[-1]


@pytest.mark.parametrize("kept", [True, False])
def test_compiled_programs_are_kept_in_the_users_cache_folder(tmp_path, kept):
    code = f"from ancer_jax.cli.runtime import Runtime; Runtime({kept}).start(survive=True)\n"
    code += "import jax; jax.jit(lambda x: x + 1)(1.0)"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert any((tmp_path / "cache").rglob("*-cache")) == kept
