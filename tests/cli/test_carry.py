"""`ancer-jax certify --carry`: certificates of a run become those of a changed network, on real images."""

import pandas as pd
import pytest

from ancer_jax import cli
from ancer_jax.runs import read_run
from tests.cli.commands import SMALL, error_line, settings_of, toy

pytestmark = pytest.mark.usefixtures("here", "quick_compilation")

CHANGED = """
import dataclasses
import ancer_jax as aj

def bfloat16():
    checkpoint = aj.load_bundled("fashion-mnist-cnn-l2-0.25").checkpoint
    return dataclasses.replace(checkpoint, attributes={**checkpoint.attributes, "compute_dtype": "bfloat16"}).classifier
"""
SAME = ("--devices", "1", "--batch-size", "2")
OTHER = """
def opposite():
    return from_function(linear, -weights, num_classes=3)
"""


def test_certificates_of_a_bundled_network_are_carried_to_bfloat16(here, capsys):
    (here / "changed.py").write_text(CHANGED)
    images = ("--skip", "100", "--max", "3")
    cli.main(["certify", "--method", "fixed", "--n", "400", *images, *SMALL, "--out", "runs/one"])
    carry = ["certify", "--carry", "runs/one", "--classifier", "changed:bfloat16", *images, *SAME]
    cli.main([*carry, "--carry-n", "300", "--seed", "5"])
    printed = capsys.readouterr()
    assert "carried from one: 100%" in printed.err and "3/3" in printed.err
    assert "one-carried (300 common draws, alpha = 0.001 + 0.0001)" in printed.out
    run = read_run(here / "runs" / "one-carried")
    assert settings_of(run.path)["carried"] | {"classifier": "", "run": ""} == {
        **{"run": "", "classifier": "", "precision": "default"},
        **{"n": 300, "alpha": 0.0001, "seed": 5},
    }
    before, after = (pd.read_csv(here / "runs" / name / "results.tsv", sep="\t") for name in ("one", "one-carried"))
    assert before["idx"].tolist() == after["idx"].tolist() == [0, 2000, 4000]
    assert before["predict"].tolist() == after["predict"].tolist()
    assert (after["radius"] < before["radius"]).all() and (after["radius"] > 0.5 * before["radius"]).all()
    assert run.columns("lost_votes")["lost_votes"].max() <= 10


def test_own_classifiers_are_named_on_both_sides(here):
    with (here / "plugin.py").open("a") as file:
        file.write(OTHER)
    cli.main(toy(n="500"))
    own = ["certify", "--data", "toy.npz", "--carry", "run", "--carry-from", "plugin:three", *SAME, "--carry-n", "200"]
    cli.main([*own, "--classifier", "plugin:three", "--out", "same"])
    cli.main([*own, "--classifier", "plugin:opposite", "--out", "opposite", "--carry-alpha", "0.01"])
    same, opposite = (pd.read_csv(here / name / "results.tsv", sep="\t") for name in ("same", "opposite"))
    assert (same["predict"] >= 0).any() and (opposite["predict"] == -1).all()
    assert settings_of(here / "opposite")["carried"]["alpha"] == 0.01


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--carry", "run", "--n", "50", "--method", "fixed"], "takes certificates as they are: --method, --n must"),
        (["--carry", "run", "--sigma", "0.5"], "--sigma must not be given"),
        (["--carry", "run", "--radii", "0.5"], "--radii must not be given"),
        (["--carry-n", "50", "--carry-from", "bundled"], "without --carry, --carry-from, --carry-n must not be given"),
        (["--carry", "nothing"], "nothing is not a run directory"),
    ],
)
def test_flags_without_effect_get_one_line(capsys, flags, message):
    assert message in error_line(capsys, ["certify", *flags])


def test_another_classifier_than_that_of_the_run_gets_one_line(here, capsys):
    with (here / "plugin.py").open("a") as file:
        file.write(OTHER)
    cli.main(toy())
    capsys.readouterr()
    carry = ["certify", "--data", "toy.npz", "--carry", "run", "--classifier", "plugin:three"]
    assert "run is not a run of this classifier (--carry-from)" in error_line(
        capsys, [*carry, "--carry-from", "plugin:opposite"]
    )
    assert "the data are 2 x 1" in error_line(capsys, carry)  # bundled is the default, and takes other images
