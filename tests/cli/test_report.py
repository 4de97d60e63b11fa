"""`ancer-jax report`: what it prints, which files it writes, and what it refuses."""

import re
import shutil

import numpy as np
import pytest

from ancer_jax import cli
from ancer_jax.report import NOT_RECONCILED, UNKNOWN
from tests.cli.commands import SEARCH, SEARCH_ALONE, error_line, toy

pytestmark = pytest.mark.usefixtures("here", "quick_compilation")


def test_report_compares_runs_and_files(here, capsys):
    cli.main(toy())
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
    assert missing == "no images of run: fashion-mnist-subset is not its data set (--data, --split, --crop)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: there is no such run or file"),
        (["empty"], "empty is not a run directory"),
        (["toy.tsv", "--leaky-above", "2"], r"--leaky-above must be in \[0, 1\], got 2.0"),
        (["toy.tsv", "--radii", "0", "nan"], "--radii must be finite"),
        (["toy.tsv", "--radii", "0,1", "abc"], "--radii takes numbers, like 0,0.25,0.5, got 'abc'"),
        (["--radii", "0.25", "0.5", "toy.tsv", "wrong.tsv"], "--radii takes numbers, like 0,0.25,0.5, got 'toy.tsv'"),
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
    assert re.search(message, error_line(capsys, ["report", *arguments]))
    assert not (here / "report").exists()


def test_report_shows_what_the_order_of_the_memory_does(here, capsys):
    cli.main(toy(*SEARCH["isotropic"], method="isotropic"))
    cli.main(toy("--out", "fixed"))
    capsys.readouterr()
    cli.main(["report", "run", "fixed", "--orders", "3", "--leaky-above", "0.25"])
    printed = capsys.readouterr().out
    assert "leak at most 0.25" in printed
    table = printed.split("In order of ids")[1]
    assert re.search(
        r"^\| run +\| random orders +\| accuracy +\| ACR +\| ACR-tilde +\| regions changed", table, re.MULTILINE
    )
    (row,) = re.findall(r"^\| run +\| 3 +\|.*$", table, re.MULTILINE)
    assert len(re.findall(r"\S+ \(\S+ to \S+\)", row)) == 4


@pytest.mark.parametrize(
    ("orders", "message"),
    [("-1", "--orders must not be negative, got -1"), ("2", "--orders needs a run directory with a memory")],
)
def test_bad_numbers_of_orders_are_one_line(here, capsys, orders, message):
    cli.main(toy())
    capsys.readouterr()
    assert message in error_line(capsys, ["report", "run", "--orders", orders])


def test_an_unfinished_run_is_called_so(here, capsys):
    cli.main(toy())
    (here / "run" / "shards" / "2.npz").unlink()  # as if it had been stopped before the second batch
    (here / "run" / "results.tsv").unlink()
    capsys.readouterr()
    cli.main(["report", "run"])
    printed = capsys.readouterr().out
    assert re.search(r"^\| run +\| l2 +\| 2 \(unfinished\) +\|", printed, re.MULTILINE)
    assert "run is unfinished: its figures are of the 2 images that are certified so far. The same ancer" in printed
    assert "run is unfinished" in (here / "report" / "report.html").read_text("utf-8")
    cli.main(toy())
    assert "unfinished" not in capsys.readouterr().out


def test_report_of_nothing_exits_with_2(capsys):
    assert "name at least one run directory or TSV file" in error_line(capsys, ["report"])


def test_theta_maps_are_beside_the_images_of_the_data_set_that_is_named(here, capsys):
    """And runs of one name do not overwrite each other's."""
    cli.main(toy("--out", "a/run", *SEARCH_ALONE["ancer"], "--no-leakage", method="ancer"))
    shutil.copytree("a", "b")
    capsys.readouterr()
    cli.main(["report", "a/run", "b/run", "--out", "pictures", "--data", "toy.npz"])
    assert "no theta maps" not in capsys.readouterr().out
    names = {path.name for path in (here / "pictures").iterdir()}
    assert names == {"certified_accuracy.png", "theta_run.png", "theta_run_1.png", "report.html"}
    cli.main(["report", "a/run", "--out", "others"])
    assert "no theta maps of a/run: fashion-mnist-subset is not its data set (--data," in capsys.readouterr().out
    assert "no data set is named 'toy'" in error_line(capsys, ["report", "a/run", "--data", "toy"])


def test_a_universal_theta_is_drawn_once(here):
    np.save(here / "theta.npy", np.float32([0.2, 0.4]).reshape(2, 1, 1))
    arguments = ["certify", "--data", "toy.npz", "--classifier", "plugin:three", "--n", "50", "--method", "universal"]
    cli.main([*arguments, "--theta-map", "theta.npy", "--out", "run"])
    cli.main(["report", "run", "--data", "toy.npz"])
    assert (here / "report" / "theta_run.png").read_bytes().startswith(b"\x89PNG")
    text = (here / "report" / "report.html").read_text("utf-8")
    assert text.count("The theta map of run, ") == 1 and "theta of image #" not in text
