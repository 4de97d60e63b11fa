"""Benchmarks: README and guides show what the raw outputs say, and all of them run in small."""

import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys

import jax
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
from benchmarks.claims import public_networks
from benchmarks.speed import _moved_votes, gpu

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
    "public_networks",
    "ship_model",
    "start",
    "train_bundled",
    "training_step",
}
FLAGS = {"leakage": ["--norm", "l2"], "search": ["--norm", "l2"]}
FLAGS |= {"coloured_noise": ["--sigma", "0.25", "--rows", "cosine"]}


def run(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], capture_output=True, text=True, **options)


def test_readme_and_guides_show_what_the_raw_outputs_say(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "render", "--check"])
    assert cli.main() == 0, capsys.readouterr().out


def test_list_names_every_benchmark():
    listed = run("list", cwd=TOP).stdout.splitlines()
    assert [line.split()[0] for line in listed] == NAMES
    assert {"soundness", "overhead", "peers", "loading"} <= set(NAMES)


def test_certificates_with_fewer_draws_follow_from_published_radii():
    some = np.array([60_000, 90_000, 100_000])
    count = public_networks.counts(np.round(public_networks.radii(public_networks.DRAWS)[some], 3))
    assert count[-1] == some[-1] and np.abs(count - some).max() < 100
    certified, radius = public_networks.expected(some, 1000)
    rng, of_count = np.random.default_rng(0), public_networks.radii(1000)
    draws = rng.hypergeometric(some, public_networks.DRAWS - some, 1000, size=(20_000, 3))
    np.testing.assert_allclose(radius, of_count[draws].mean(0), atol=0.002)
    assert certified[-1] > 1 - 1e-9 and radius[-1] > of_count[-1] - 1e-9


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
    if name == "gpu":
        check_every_section(json.loads((tmp_path / "small-gpu.json").read_text())["results"])


def check_every_section(results):
    assert [*results] == [*gpu.SECTIONS, "time"]
    assert [row["section"] for row in results["time"]] == [*gpu.SECTIONS]
    for section, rows in results.items():
        assert rows, section
        assert not any({"error", "left_out", "out_of_memory"} & row.keys() for row in rows), section
    compared = {(row["kernels"], row["against"]) for row in results["votes"]}
    assert {(k, a) for k in ("usual", "deterministic") for a in ("repeated", "another process", "CPU")} <= compared


@pytest.mark.parametrize(
    ("kernels", "precision", "against", "most"),
    [
        ("deterministic", "highest", "repeated", 0),
        ("deterministic", "highest", "another process", 0),
        ("deterministic", "highest", "chunk / 10", 1e-4),
        ("deterministic", "highest", "chunk / 1.5", 1e-4),
        ("deterministic", "highest", "CPU", 1e-4),
        ("usual", "default", "repeated", 1e-4),
        ("usual", "default", "another process", 1e-4),
        ("usual", "default", "chunk / 10", 1e-4),
        ("usual", "default", "CPU", None),  # these three are other base classifiers
        ("usual", "default", "highest precision", None),
        ("usual", "default", "bfloat16", None),
    ],
)
def test_moved_votes_are_judged_by_what_may_move_them(kernels, precision, against, most):
    row = {"network": "SmallCNN", "kernels": kernels, "precision": precision, "against": against, "votes": 200_000}
    rows = [row | {"moved": round(share * 200_000)} for share in (0, 1e-5, 1e-3)]
    lines = [*gpu.lines({"results": {"votes": rows}})]
    assert [line.holds for line in lines] == [None if most is None else share <= most for share in (0, 1e-5, 1e-3)]
    assert all((line.holds is None) == (not line.bar) for line in lines)


def test_votes_that_move_are_counted_and_one_failure_leaves_the_other_kernels(monkeypatch):
    first = np.array([[90, 10], [50, 50]])
    apart = {"repeated": 0, "chunk / 10": 1, "chunk / 1.5": 2, "CPU": 3, "highest precision": 4, "bfloat16": 5}

    def process(kernels, *arguments):
        if kernels == "deterministic":
            raise subprocess.CalledProcessError(1, "python")
        counts = {way: first + moved * np.array([[-1, 1], [0, 0]]) for way, moved in ({"first": 0} | apart).items()}
        return {way: counts[way] for way in arguments[-1]}

    monkeypatch.setattr(_moved_votes, "_in_new_process", process)
    *usual, failed = _moved_votes.compare(True, 0)
    assert {row["against"]: row["moved"] for row in usual} == apart | {"another process": 0}
    assert {row["votes"] for row in usual} == {200}
    *_, line = gpu.lines({"results": {"votes": [*usual, failed]}})
    assert line.holds is False
    assert "deterministic kernels" in line.what


@pytest.mark.parametrize(
    ("row", "holds"),
    [
        ({"error": "RuntimeError()"}, False),
        ({"left_out": "for lack of time"}, None),
        ({"draws": "random bits", "against": "CPU", "differ": 0}, True),
        ({"draws": "random bits", "against": "CPU", "differ": 1}, False),
        ({"lower_above_exact": 0, "upper_below_exact": 0, "loosest_lower": 1.001, "loosest_upper": 1.0}, True),
        ({"lower_above_exact": 1, "upper_below_exact": 0, "loosest_lower": 1.001, "loosest_upper": 1.0}, False),
        ({"lower_above_exact": 0, "upper_below_exact": 0, "loosest_lower": 1.0, "loosest_upper": 1.02}, False),
        ({"count_law_p_value": 0.5, "violations": 1, "violations_p_value": 0.4}, True),
        ({"count_law_p_value": 1e-4, "violations": 0, "violations_p_value": 1.0}, False),
        ({"network": "SmallCNN", "rows_per_second": 1e6, "share_of_fastest": 0.1}, None),
    ],
)
def test_other_rows_for_a_gpu_are_judged(row, holds):
    (line,) = gpu.lines({"results": {"section": [row]}})
    assert line.holds is holds


def test_a_plan_that_does_not_fit_a_gpu_leaves_the_others(monkeypatch):
    def compare(name, *, batch, chunk, **_):
        if chunk > 100:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return {"certify_us_per_row": 2.0 if batch == 1 else 1.0}, {}

    monkeypatch.setattr(gpu.overhead, "compare", compare)
    monkeypatch.setattr(gpu, "peak_rate", lambda dtype, size: 1e3)
    plans = [("SmallCNN", 1, 64), ("SmallCNN", 1, 128), ("SmallCNN", 2, 64)]
    rows = gpu.throughput(plans, 100, small=True, seed=0)
    assert [row.get("share_of_fastest") for row in rows] == [0.5, None, 1.0]
    assert [row["rows"] for row in rows if row.get("out_of_memory")] == [128]


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
