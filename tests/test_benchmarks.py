"""Benchmarks: README and guides show what the raw outputs say, and all of them run in small."""

import dataclasses
import os
import pathlib
import shlex
import subprocess
import sys

import numpy as np
import pytest

from ancer_jax import cli as command_line
from ancer_jax.data import load_dataset
from ancer_jax.models import bundled, load_bundled, load_network
from ancer_jax.report import load_results
from ancer_jax.smoothing.classifier import fingerprint
from benchmarks import __main__ as cli
from benchmarks import render
from benchmarks.benchmark import RESULTS, Line, load, markdown

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOP = pathlib.Path(__file__).parents[1]
NAMES = [*cli.names()]
# They need data, packages or pictures that have to be fetched, or are the makers of what ships.
NOT_RUN = {
    "cifar10",
    "demo",
    "imagenet_pictures",
    "loading",
    "peers",
    "ship_model",
    "train_bundled",
    "training_step",
}
FLAGS = {"leakage": ["--norm", "l2"], "search": ["--norm", "l2"]}
FLAGS |= {"coloured_noise": ["--sigma", "0.25", "--rows", "cosine"]}


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
def test_runs_in_small(name, tmp_path, tmp_path_factory):
    cache = {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    cache |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.getbasetemp() / "compiled")}
    environment = os.environ | cache | {"BENCH_RESULTS": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = run("run", name, "--small", *FLAGS.get(name, []), cwd=TOP, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    cards = {path.with_suffix(".json").name for path in tmp_path.glob("small-*.msgpack")}  # of bundled models
    assert {path.name for path in tmp_path.glob("small-*.json")} - cards == {f"small-{name}.json"}


def test_a_trained_network_becomes_a_bundled_model(tmp_path, monkeypatch, capsys):
    name, ship_model = "fashion-mnist-tiny-l1-0.5-stability", cli.modules()["ship_model"]
    monkeypatch.chdir(tmp_path)
    train = ["train", "--norm", "l1", "--method", "stability", "--sigma", "0.5", "--max", "300", "--test-max", "20"]
    command_line.main([*train, "--epochs", "1", "--batch-size", "100", "--mean", "0.2", "--std", "0.4", "--out", "net"])
    certify = [
        "certify",
        "--norm",
        "l1",
        "--method",
        "fixed",
        "--skip",
        "250",
        "--n",
        "50",
        "--n0",
        "10",
        "--devices",
        "1",
    ]
    command_line.main([*certify, "--classifier", "net", "--out", "run"])
    command_line.main([*certify, "--max", "1", "--out", "other"])
    monkeypatch.setattr(ship_model, "RESULTS", tmp_path)

    def ship(name, *flags):
        arguments = ["net", name, "--data", "fashion-mnist-subset", "--small", *flags]
        return ship_model.BENCHMARK.run(arguments, name="ship_model", description=None)

    assert ship(name, "--certified", "run") == 0
    monkeypatch.setattr(bundled, "WEIGHTS", tmp_path)
    model, trained, test = load_bundled(f"small-{name}"), load_network("net"), load_dataset("fashion-mnist-subset")
    assert str(model).removeprefix("small-") in capsys.readouterr().out
    assert fingerprint(model.classifier, test.images[0]) == fingerprint(trained.classifier, test.images[0])
    clean, noisy = model.card["clean_accuracy"], model.card["noisy_accuracy"]
    assert clean == np.mean(np.asarray(trained.classifier(test.images)).argmax(1) == test.labels)
    assert abs(noisy - trained.history["test_accuracy"]) < 0.4  # of 20 images, by other draws
    results = load_results("run")
    found = {"acr": results.acr("radius"), "accuracy": results.correct.mean(), "images": 2, "n": 50, "theta": 0.5}
    assert found.items() <= model.card["certified"].items()
    flags = shlex.split(model.card["command"])[1:]
    monkeypatch.setattr(command_line.Train, "run", lambda self: commands.append(self))
    commands = []
    command_line.main(flags)
    (again,) = commands
    same = dataclasses.replace(again._config(), noise=None)
    assert same.settings().items() <= trained.history.items()
    assert (again.network, again.mean, again.std) == ("small_cnn", (0.2,), (0.4,))
    for wrong, message, *flags in (
        ("fashion-mnist-tiny-l1-0.25-stability", "trained with l1 noise of 0.5"),
        ("fashion-mnist-tiny-l1-0.5", "another training method than the network's, stability"),
        (name, "other is a run of another network", "--certified", "other"),
    ):
        with pytest.raises(SystemExit, match=message):
            ship(wrong, *flags)


@pytest.mark.parametrize("figure", ["table", "cards"])
def test_the_page_of_bundled_models_shows_all_of_them(figure):
    text = cli.modules()["ship_model"].BENCHMARK.figures[figure]()
    assert [name for name in bundled.bundled_models() if name not in text] == []
