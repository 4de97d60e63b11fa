"""Benchmarks: README and guides show what the raw outputs say, and all of them run in small."""

import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import __main__ as cli
from benchmarks import render
from benchmarks.benchmark import RESULTS, Line, load, markdown

TOP = pathlib.Path(__file__).parents[1]
NAMES = [*cli.names()]
# They need data, packages or pictures that have to be fetched, or are the makers of what ships.
NOT_RUN = {
    "cifar10",
    "demo",
    "fetch_cifar10",
    "imagenet_pictures",
    "loading",
    "peers",
    "train_bundled",
    "training_step",
}
FLAGS = {"leakage": ["--norm", "l2"], "search": ["--norm", "l2"]}


def run(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], capture_output=True, text=True, **options)


def test_readme_and_guides_show_what_the_raw_outputs_say():
    done = run("render", "--check", cwd=TOP)
    assert done.returncode == 0, done.stdout + done.stderr


def test_list_names_every_benchmark():
    listed = run("list", cwd=TOP).stdout.splitlines()
    assert [line.split()[0] for line in listed] == NAMES
    assert {"soundness", "overhead", "peers", "loading"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_lines_of_a_raw_output_have_bars_that_are_judged(name):
    benchmark = cli.modules()[name].BENCHMARK
    for output, lines in benchmark.outputs.items():
        if (RESULTS / f"{output}.json").exists():
            for line in lines(load(output)):
                assert isinstance(line, Line)
                assert (line.holds is None) == (not line.bar)


def test_every_raw_output_belongs_to_a_benchmark():
    outputs = {output for module in cli.modules().values() for output in module.BENCHMARK.outputs}
    stored = {path.stem for path in RESULTS.glob("*.json") if not path.stem.startswith("small-")}
    assert stored <= outputs


def test_a_page_that_disagrees_is_found_and_filled(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks").mkdir()
    benchmark = cli.modules()["memory"].BENCHMARK
    page = tmp_path / "README.md"
    page.write_text("It took <!-- memory.few -->1 MiB<!-- end -->, then <!-- memory.many --><!-- end -->.\n")
    (tmp_path / "benchmarks" / "README.md").write_text("<!-- benchmarks.overview --><!-- end -->\n")
    (tmp_path / "docs" / "a.md").write_text(
        "<!-- benchmarks.missed --><!-- end -->\n\n<!-- benchmarks.measurements --><!-- end -->\n"
    )
    monkeypatch.setattr(render, "TOP", tmp_path)
    assert render.render({"memory": benchmark}, check=True) == 1
    assert "README.md" in capsys.readouterr().out
    assert "1 MiB" in page.read_text()
    assert render.render({"memory": benchmark}, check=False) == 0
    assert render.render({"memory": benchmark}, check=True) == 0
    assert benchmark.figures["few"]() in page.read_text()
    page.write_text("<!-- memory.nothing -->1<!-- end -->\n")
    assert render.render({"memory": benchmark}, check=True) == 1
    printed = capsys.readouterr().out
    assert "no benchmark has the figure memory.nothing" in printed
    assert "no page uses the figure memory.few" in printed


def test_markdown_tables():
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_RUN])
def test_runs_in_small(name, tmp_path):
    environment = os.environ | {"BENCH_RESULTS": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = run("run", name, "--small", *FLAGS.get(name, []), cwd=TOP, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.glob("small-*.json")] == [f"small-{name}.json"]
