"""`ancer-jax certify`: its flags reach the settings, its tables are right, and bad input gets one line."""

import dataclasses
import fractions
import math
import re

import numpy as np
import pandas as pd
import pytest

from ancer_jax import cli
from ancer_jax.data import BUNDLED_SUBSET, load_dataset
from ancer_jax.report import NOT_RECONCILED
from ancer_jax.runs import read_run
from ancer_jax.search import AnisotropicConfig, IsotropicConfig
from tests.cli.commands import SEARCH, SEARCH_ALONE, SMALL, error_line, settings_of, toy

pytestmark = pytest.mark.usefixtures("here", "quick_compilation")


@pytest.mark.parametrize(("norm", "method", "theta"), [("l2", "ancer", 0.25), ("l1", "fixed", 0.5)])
def test_certify_on_the_bundled_images(here, capsys, norm, method, theta):
    flags = ["certify", "--norm", norm, "--method", method, "--n", "100", "--skip", "100", "--max", "3"]
    cli.main([*flags, *SMALL, *SEARCH[method]])
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
    settings = settings_of(out)
    assert (settings["norm"], settings["theta"], settings["certify"]) == (norm, theta, certify_settings(n=100, n0=10))
    assert ("anisotropic" in settings, "isotropic" in settings) == (method == "ancer", method != "fixed")
    assert out.name in printed.out and "Certified accuracy at" in printed.out
    assert NOT_RECONCILED not in printed.out
    assert all((title in printed.out) == (method != "fixed") for title in ("Memory (before -> after)", "Leakage into"))
    assert (out / "results_before_memory.tsv").exists() == (out / "memory.npz").exists() == (method != "fixed")
    assert "(compiling, then the first batch):   0%" in printed.err and f"{method} {theta:g}: 100%" in printed.err
    assert "3/3" in printed.err


def certify_settings(**changes):
    return {"n0": 100, "n": 100_000, "alpha": 0.001} | changes


def test_certify_again_continues_and_changes_nothing(here, capsys):
    cli.main(toy("--max", "2"))
    cli.main(toy())
    whole = (here / "run" / "results.tsv").read_bytes()
    shards = {file.name: file.stat().st_mtime_ns for file in (here / "run" / "shards").iterdir()}
    assert sorted(shards) == ["0.npz", "2.npz"]
    capsys.readouterr()
    cli.main(toy())
    assert (here / "run" / "results.tsv").read_bytes() == whole
    assert {file.name: file.stat().st_mtime_ns for file in (here / "run" / "shards").iterdir()} == shards
    printed = capsys.readouterr().err
    assert "4/4" in printed and "compiling" not in printed


def test_an_own_classifier_certifies_what_it_says(here):
    cli.main(toy(n="500"))
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
    """The arguments that `certify_dataset` is called with."""
    found = {}

    def stop(classifier, dataset, config, **arguments):
        found.update(config=config, **arguments)
        raise ValueError("enough")

    monkeypatch.setattr(cli.certify, "certify_dataset", stop)
    return found


def test_flags_reach_the_settings(captured):
    flags = [
        *("--norm", "l1", "--method", "ancer", "--alpha", "0.05", "--seed", "7"),
        *("--bound", "separate"),
        *("--iso-steps", "11", "--iso-lr", "0.1", "--iso-samples", "12"),
        *("--ancer-steps", "13", "--ancer-lr", "0.2", "--ancer-samples", "14", "--kappa", "1.5"),
        *("--theta-max", "3", "--guard", "superset", "--guard-samples", "15", "--batch-size", "3", "--chunk", "16"),
        *("--leakage-probes", "17", "--leakage-samples", "18", "--leakage-weight", "1.25", "--leakage-limit", "0.2"),
        *("--shard-devices", "draws", "--no-memory"),
    ]
    with pytest.raises(SystemExit):
        cli.main([*toy(), *flags])
    both = {"objective": "ancer", "theta_max": 3.0, "leakage_weight": 1.25, "leakage_batch": 32, "ascent": "log"}
    assert captured["config"].settings() == {
        **{"norm": "l1", "method": "ancer", "theta": 0.25, "seed": 7, "guard": "superset", "guard_samples": 15},
        "certify": certify_settings(n0=10, n=100, alpha=0.05, bound="separate"),
        "isotropic": {"steps": 11, "learning_rate": 0.1, "num_samples": 12, **both},
        "anisotropic": {"steps": 13, "learning_rate": 0.2, "num_samples": 14, "kappa": 1.5, **both},
        "leakage": {"num_probes": 17, "num_samples": 18},
        "leakage_limit": 0.2,
    }
    assert captured["config"].memory is False
    execution = captured["execution"]
    assert (execution.batch_size, execution.chunk, execution.devices, execution.shard) == (3, 16, 1, "draws")
    assert captured["out"] == "run"
    with pytest.raises(SystemExit):
        cli.main(toy("--objective", "log_volume", method="ancer"))
    assert captured["config"].anisotropic.objective == captured["config"].isotropic.objective == "log_volume"


def test_the_published_preset_is_that_of_the_papers(captured):
    with pytest.raises(SystemExit):
        cli.main(toy("--preset", "published", "--ancer-steps", "7", method="ancer"))
    config = captured["config"]
    assert config.isotropic == IsotropicConfig.published(theta_max=1.0)
    assert config.anisotropic == AnisotropicConfig.published(theta_max=1.0, steps=7)


@pytest.mark.parametrize(
    ("convention", "theta"),
    # Half-width 0.3; standard deviation 0.3; and, as ANCER's scripts do, half-width 0.3 / sqrt(3).
    [("theta", 0.3), ("rs4a", 0.3 * math.sqrt(3)), ("ancer", 0.3 / math.sqrt(3))],
)
def test_sigma_convention(captured, convention, theta):
    with pytest.raises(SystemExit):
        cli.main(toy("--norm", "l1", "--sigma-convention", convention, sigma="0.3"))
    assert captured["config"].theta == pytest.approx(theta, rel=1e-12)


@pytest.mark.parametrize("convention", ["rs4a", "ancer"])
def test_sigma_convention_is_for_l1_only(here, capsys, convention):
    refused = "--sigma-convention is for the uniform noise of --norm l1"
    assert refused in error_line(capsys, toy("--sigma-convention", convention))
    assert refused in error_line(capsys, toy("--norm", "l1", "--noise", "splitting", "--sigma-convention", convention))
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--alpha", "0"), "alpha .*0"),
        (("--alpha", "1"), "alpha .*1"),
        (("--alpha", "2"), "alpha .*2"),
        (("--alpha", "nan"), "alpha .*nan"),
        (("--n", "0"), r"n must be in 1\.\.2147483647, got 0"),
        (("--n", "-5"), "n must be in .*, got -5"),
        (("--n", "2147483648"), "n must be .*got 2147483648"),
        (("--n0", "0"), "n0 must be in .*, got 0"),
        (("--sigma", "0"), r"--sigma must be in \(0, inf\), got 0"),
        (("--sigma", "-1"), r"--sigma must be in \(0, inf\), got -1"),
        (("--sigma", "nan"), r"--sigma must be in \(0, inf\), got nan"),
        (("--sigma", "inf"), r"--sigma must be in \(0, inf\), got inf"),
        (("--sigma", "1e39"), "theta must be positive and finite as float32, got 1e\\+39"),
        (("--sigma", "0.25", "-1"), r"--sigma must be in \(0, inf\), got -1"),
        (("--theta-max", "0.1"), "theta_max must be at least theta = 0.25, got 0.1"),
        (("--theta-max", "0"), r"theta_max must be in \(0, inf\], got 0"),
        (("--theta-max", "nan"), r"theta_max must be in \(0, inf\], got nan"),
        (("--skip", "0"), "skip must be at least 1, got 0"),
        (("--max", "0"), "max must be at least 1, got 0"),
        (("--method", "universal"), "--method universal takes theta from a map .*: --sigma does not go with it"),
        (("--theta-map", "no.npy"), "--theta-map holds theta itself: --sigma does not go with it"),
        (("--seed", "-1"), "seed must be in .*got -1"),
        (("--iso-steps", "0"), "steps must be at least 1, got 0"),
        (("--ancer-lr", "0"), r"learning_rate must be in \(0, inf\), got 0"),
        (("--ancer-samples", "0"), "num_samples must be at least 1, got 0"),
        (("--kappa", "-1"), r"kappa must be in \[0, inf\), got -1"),
        (("--guard-samples", "0"), r"guard_samples must be in 1\.\.16777215, got 0"),
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
            r"'bundle' is neither a bundled model \(bundled, .*fashion-mnist-cnn-l2-0.25.*\), "
            "nor the folder of a network, nor module:function; did you mean 'bundled'",
        ),
        (("--classifier", "fashion-mnist-l1-0.5"), "did you mean 'fashion-mnist-cnn-l1-0.5'"),
        (("--classifier", "resnet"), r"'resnet' is neither a bundled model \(.*\), nor the folder .*module:function$"),
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
        (
            ("--norm", "l1", "--noise", "splitting", "--exact"),
            "--exact counts all draws, and has no alpha: --n0, --n must",
        ),
        (("--out", "toy.npz"), "toy.npz is a file, not a run directory"),
        (("--out", "toy.npz/run"), "toy.npz/run"),
        (("--out", "."), r"\. is not a run directory: it holds plugin\.py and no config\.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line(here, capsys, flags, message):
    assert re.search(message, error_line(capsys, toy(*flags, method="ancer")))
    assert not (here / "run").exists()
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == ["plugin.py", "toy.npz"]


@pytest.mark.parametrize("method", ["fixed", "universal"])
@pytest.mark.parametrize(
    "flags",
    [
        *(
            ("--preset", "published"),
            ("--iso-steps", "3"),
            ("--ancer-lr", "0.1"),
            ("--kappa", "1.5"),
            ("--guard", "off"),
        ),
        *(("--theta-max", "inf"), ("--leakage-probes", "3"), ("--leakage-weight", "5"), ("--leakage-limit", "0.1")),
    ],
    ids=" ".join,
)
def test_flags_of_searches_are_refused_where_theta_is_not_searched(here, capsys, flags, method):
    np.save(here / "theta.npy", np.full((2, 1, 1), 0.25))
    arguments = ["certify", "--data", "toy.npz", "--classifier", "plugin:three", "--out", "run", "--method", method]
    arguments += ["--theta-map", "theta.npy"] if method == "universal" else ["--sigma", "0.25"]
    refused = f"--method {method} does not search for theta: {flags[0]} must not be given"
    assert refused in error_line(capsys, [*arguments, *flags])
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ancer-steps", "3"), "--method isotropic does not search for an anisotropic theta: --ancer-steps must"),
        (("--guard", "superset", "--kappa", "1"), "theta: --kappa, --guard must"),
        (("--no-leakage", "--leakage-probes", "7"), "with --no-leakage, --leakage-probes must"),
        (("--period", "17"), "without --exact, --period must"),
        (("--crop", "imagenet"), "crop is for folders of pictures and TFDS, and toy.npz is neither"),
    ],
)
def test_flags_without_effect_are_refused(here, capsys, flags, message):
    assert message in error_line(capsys, toy(*flags, method="isotropic"))
    assert not (here / "run").exists()


def test_a_convention_of_sigma_needs_a_sigma(here, capsys):
    arguments = ["certify", "--norm", "l1", "--sigma-convention", "rs4a", "--method", "fixed", "--max", "1"]
    assert "--sigma-convention says what --sigma means" in error_line(capsys, arguments)


def test_a_theta_map_from_a_file(here, capsys):
    arguments = ["certify", "--data", "toy.npz", "--classifier", "plugin:three", "--n", "50", "--method", "universal"]
    arguments += ["--theta-map", "theta.npy"]
    assert "theta.npy: cannot be read as an .npy file" in error_line(capsys, arguments)
    np.save(here / "theta.npy", np.zeros((1, 1, 1)))
    assert "theta.npy: theta of a map must be positive and finite, got 0.0 to 0.0" in error_line(capsys, arguments)
    for other in (np.array(["a"]), np.ones(2, complex), np.zeros(0)):
        np.save(here / "theta.npy", other)
        assert "theta.npy: not an .npy file with an array of real numbers" in error_line(capsys, arguments)
    np.savez(here / "theta.npz", theta=np.ones(1))
    assert "theta.npz: not a theta map that can be read" in error_line(capsys, [*arguments[:-1], "theta.npz"])
    np.save(here / "theta.npy", np.ones((2, 2, 1)))
    assert "theta_map must be [2, 1, 1] as the images are, got [2, 2, 1]" in error_line(capsys, arguments)
    np.save(here / "theta.npy", np.full((2, 1, 1), 0.25))
    cli.main(arguments)
    lines = pd.read_csv(here / "runs" / "l2-universal-0.25" / "results.tsv", sep="\t")
    assert set(lines["method"]) == {"universal"} and set(lines["min_sigma"]) == {0.25}


def test_an_own_classifier_needs_sigma(capsys):
    arguments = ["certify", "--data", "toy.npz", "--classifier", "plugin:three"]
    assert "--sigma is needed for your own classifier" in error_line(capsys, arguments)


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
    assert re.search(f"error: bad.npz:? .*{message}", error_line(capsys, toy("--data", "bad.npz")))
    assert not (here / "run").exists()


def test_a_run_with_other_settings_is_one_line_and_stays(here, capsys):
    cli.main(toy(n="10"))
    before = (here / "run" / "results.tsv").read_bytes()
    capsys.readouterr()
    assert "certify.n is 10 there, 20 here" in error_line(capsys, toy(n="20"))
    assert "theta is 0.25 there, 0.5 here" in error_line(capsys, toy(n="10", sigma="0.5"))
    assert (here / "run" / "results.tsv").read_bytes() == before


def test_damage_in_a_run_is_one_line(here, capsys):
    cli.main(toy(n="10"))
    capsys.readouterr()
    shard = here / "run" / "shards" / "2.npz"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    assert "2.npz: truncated or not a shard" in error_line(capsys, toy(n="10"))
    shard.write_bytes(whole)
    (here / "run" / "config.json").write_text("{")
    assert "config.json: not the settings of a run" in error_line(capsys, toy(n="10"))


def test_a_full_disk_is_the_last_line_and_keeps_what_is_finished(here, capsys, monkeypatch):
    # A link instead of a full disk: whatever is written to it fails with ENOSPC.
    real = cli.certify.certify_dataset

    def filling(*arguments, execution, **options):
        def fill(stage, images):
            execution.progress(stage, images)
            if (here / "run" / "shards" / "0.npz").exists():
                (here / "run" / "shards" / "2.npz.0.tmp").symlink_to("/dev/full")

        return real(*arguments, execution=dataclasses.replace(execution, progress=fill), **options)

    monkeypatch.setattr(cli.certify, "certify_dataset", filling)
    with pytest.raises(SystemExit) as stop:
        cli.main(toy(n="10"))
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"^ancer-jax: error: cannot write run/shards/2\.npz: No space left on device; what was", last)
    monkeypatch.setattr(cli.certify, "certify_dataset", real)
    cli.main(toy(n="10"))
    assert len(pd.read_csv(here / "run" / "results.tsv", sep="\t")) == 4


@pytest.mark.parametrize(("alpha", "each"), [("0.05", 0.0125), ("0.1", 0.025), ("1e-6", 2.5e-7)])
def test_alpha_of_a_run_is_divided_among_its_images(here, capsys, alpha, each):
    cli.main(toy("--alpha-run", alpha, n="500"))
    assert settings_of(here / "run")["certify"]["alpha"] == each
    assert f" p >= {'0.9999' if alpha == '1e-6' else format(1 - float(alpha), '.4f')} " in capsys.readouterr().out


def test_no_images_are_added_to_a_run_that_shares_alpha(here, capsys):
    run = lambda *flags: toy("--alpha-run", "0.05", *flags, n="500")
    cli.main(run("--max", "2"))
    cli.main(run("--max", "2"))
    capsys.readouterr()
    assert "certify.alpha is" in error_line(capsys, run("--max", "3"))
    assert "run has other images" in error_line(capsys, run("--max", "2", "--skip", "2"))
    assert len(read_run(here / "run").done()) == 2


@pytest.mark.parametrize("images", [3, 7, 30, 500, 10_000])
@pytest.mark.parametrize("alpha", [0.05, 0.1, 1e-3])
def test_so_many_shares_of_alpha_are_not_more_than_alpha(images, alpha):
    each = cli.Certify(alpha_run=alpha)._alpha(images)
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
    assert message in error_line(capsys, toy(*flags))


def test_without_memory_the_label_says_so(here, capsys):
    cli.main(toy(*SEARCH_ALONE["isotropic"], "--no-memory", "--no-leakage", method="isotropic"))
    printed = capsys.readouterr().out
    assert NOT_RECONCILED in printed
    assert "Memory (before" not in printed and "| not measured |" in printed
    assert not (here / "run" / "memory.npz").exists() and not (here / "run" / "results.tsv").exists()
    # The memory is no setting of the run: it can be had later.
    cli.main(toy(*SEARCH_ALONE["isotropic"], "--no-leakage", method="isotropic"))
    assert NOT_RECONCILED not in capsys.readouterr().out
    assert (here / "run" / "results.tsv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (toy("--leakage-probes", "0", method="ancer"), "num_probes must be at least 1, got 0"),
        (toy("--leakage-limit", "1.5", method="ancer"), r"leakage_limit must be in \[0, 1\], got 1.5"),
        (toy("--leakage-weight", "-1", method="ancer"), r"leakage_weight must be in \[0, inf\), got -1"),
        (toy("--leakage-weight", "1", "--no-leakage", method="ancer"), "a leakage weight or limit needs leakage"),
    ],
    ids=str,
)
def test_bad_values_of_memory_and_leakage_are_one_line(here, capsys, arguments, message):
    assert re.search(message, error_line(capsys, arguments))


def test_several_sigmas_make_a_run_each_and_compile_once(here, capsys, compilations):
    cli.main(["certify", *toy()[1:], "--sigma", "0.25", "0.5", "1"])
    before = compilations()
    printed = capsys.readouterr().out
    assert [settings_of(here / "run" / name)["theta"] for name in ("0.25", "0.5", "1")] == [0.25, 0.5, 1.0]
    assert re.findall(r"^\| (\S+) +\| l2", printed, re.MULTILINE) == ["0.25", "0.5", "1"]
    assert "certify with another --seed" in printed
    cli.main(["certify", *toy()[1:], "--sigma", "0.7", "0.8"])
    assert compilations() == before


@pytest.mark.parametrize("values", [[], ["0.25", "0.5", "0.25"]])
def test_sigmas_must_be_different_numbers(here, capsys, values):
    assert "--sigma takes one or more different numbers" in error_line(capsys, ["certify", "--sigma", *values])
