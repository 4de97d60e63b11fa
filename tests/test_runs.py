import contextlib
import fractions
import json
import os
import pathlib
import resource
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from etils import epath

from ancer_jax import CertifyConfig, Execution, RunConfig, certify_dataset, from_function
from ancer_jax.certificates import noise_law
from ancer_jax.certification import all_draws, certification_from
from ancer_jax.data import Dataset, select
from ancer_jax.metrics import average_certified_radius, certified_accuracy
from ancer_jax.results import COLUMNS, read_results
from ancer_jax.runs import RESULTS_VERSION, open_run, read_run, read_settings

pytestmark = pytest.mark.usefixtures("quick_compilation")

_SETTINGS = {
    "norm": "l2",
    "method": "ancer",
    "certify": {"n0": 10, "n": 1000, "alpha": 0.001},
    "leakage": {"num_references": 50, "num_samples": 8},
    "isotropic": {"theta_max": 1.25},
    "anisotropic": {"theta_max": 1.5, "kappa": 2.0},
    "data": {"image_shape": [3, 2, 1]},
}
_NUMBERS = ("radius", "radius_proxy", "min_sigma", "gap", "p_lower", "log_volume", "at_theta_max")


def _arrays(ids, *, per_coordinate=True, seed=0, norm="l2"):
    rng = np.random.default_rng([seed, *ids])
    n = len(ids)
    counts = rng.integers(400, 1001, n).astype(np.int32)
    evidence = all_draws(counts, CertifyConfig(10, 1000, 0.001))
    result = certification_from(rng.integers(0, 3, n), evidence, noise_law(norm))
    return {
        "ids": np.asarray(ids),
        "labels": rng.integers(0, 3, n),
        "pixels": rng.integers(0, 2**63, n).astype(np.uint64),
        "predictions": result.prediction,
        "counts": counts,
        "n": np.full(n, 1000),
        "draws": np.full(n, 1100),
        "p_lower": result.p_lower,
        "gap": result.gap,
        "theta": np.minimum(rng.exponential(size=(n, 3, 2, 1) if per_coordinate else n), 1.5).astype(np.float32),
        **{f"bound_{name}": column for name, column in evidence._asdict().items()},
        "leaked_leaked": rng.integers(0, 50, n).astype(np.int32),
        "leaked_references": np.full(n, 50, np.int32),
        "leaked_votes": rng.integers(0, 400, n).astype(np.int32),
        "leaked_draws": np.full(n, 400, np.int32),
        "seconds": rng.exponential(size=n),
    }


def _write(path, *batches, settings=_SETTINGS, **options):
    with open_run(path, settings, {}) as run:
        for ids in batches:
            run.write_shard(_arrays(ids, norm=settings["norm"], **options))
        return run.export()


def _brightness(weights, x):
    return x.reshape(len(x), -1) @ weights


_CONFIG = RunConfig(theta=0.5, certify=CertifyConfig(n0=10, n=200, alpha=0.01))


def _images(n=7):
    rng = np.random.default_rng(1)
    images = rng.random((n, 2, 2, 1), np.float32)
    return Dataset("toy", np.arange(n) * 3, images, rng.integers(0, 3, n), 3)


def _certify(out, dataset=None, *, batch_size=2, devices=1, config=_CONFIG, **options):
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(4, 3)), jnp.float32)
    classifier = from_function(_brightness, weights, num_classes=3)
    dataset = _images() if dataset is None else dataset
    execution = Execution(batch_size=batch_size, devices=devices)
    return certify_dataset(classifier, dataset, config, out=out, execution=execution, **options)


def _without_time(tsv):
    """Its lines, without the column `time`."""
    cells = [line.split("\t") for line in pathlib.Path(tsv).read_text().splitlines()]
    assert cells[0].index("time") == 5
    return [row[:5] + row[6:] for row in cells]


def _contents(out):
    """Every shard's arrays, `seconds` apart."""
    shards = {}
    for file in sorted((pathlib.Path(out) / "shards").iterdir()):
        with np.load(file) as arrays:
            shards[file.name] = {name: arrays[name].tobytes() for name in arrays.files if name != "seconds"}
    return shards


def _written(out):
    return {file.name: file.stat().st_mtime_ns for file in (pathlib.Path(out) / "shards").glob("*.npz")}


def _assert_same(out, reference):
    assert _contents(out) == _contents(reference)
    assert _without_time(out / "results.tsv") == _without_time(reference / "results.tsv")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An undisturbed run of `_certify`."""
    out = tmp_path_factory.mktemp("finished") / "run"
    _certify(out)
    return out


def test_what_is_written_is_read(tmp_path):
    _write(tmp_path / "run", [0, 2, 9], [10, 11])
    run = read_run(tmp_path / "run")
    assert run.settings == {"results_version": RESULTS_VERSION} | _SETTINGS == read_settings(tmp_path / "run")
    assert run.done() == {0, 2, 9, 10, 11}
    for shard, ids in zip(run.shards(), ([0, 2, 9], [10, 11]), strict=True):
        expected = _arrays(ids)
        assert shard.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(shard[name], array)
            assert shard[name].dtype == array.dtype


def test_config_records_settings_and_their_hash(tmp_path):
    _write(tmp_path / "run", [0])
    document = json.loads((tmp_path / "run" / "config.json").read_text())
    assert document["settings"] == {"results_version": RESULTS_VERSION} | _SETTINGS
    assert len(document["hash"]) == 64


def test_every_shard_says_what_it_was_made_with(tmp_path, finished):
    for ids, device in (([0], "a CPU"), ([1], "another CPU"), ([2], "a CPU")):
        with open_run(tmp_path / "run", _SETTINGS, {"jax": "1.2.3", "device": device}) as run:
            run.write_shard(_arrays(ids))
    assert read_run(tmp_path / "run").made() == {"jax": "1.2.3", "device": "a CPU, another CPU"}
    assert {"ancer-jax", "jax", "numpy", "python", "device"} <= read_run(finished).made().keys()


def test_a_run_whose_results_mean_something_else_is_refused(tmp_path):
    """Of an older version, say: by whoever goes on with it, and whoever reads it."""
    _write(tmp_path / "run", [0])
    config = tmp_path / "run" / "config.json"
    document = json.loads(config.read_text())
    del document["settings"]["results_version"]
    config.write_text(json.dumps(document))
    with pytest.raises(
        ValueError, match=r"results mean something else \(results_version None, not \d+\): certify again"
    ):
        read_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"other settings \(results_version is None there"):
        _write(tmp_path / "run", [1])


@pytest.mark.parametrize(
    "change",
    [
        {"gap": lambda a: a["gap"] * 1.0001},
        {"gap": lambda a: a["gap"] + (a["gap"] == 0)},
        {"gap": lambda a: a["gap"] * 100, "p_lower": lambda a: a["p_lower"] ** 0.01},
        {"predictions": lambda a: np.maximum(a["predictions"], 0)},
        {"bound_alpha": lambda a: a["bound_alpha"] * 100},
        {"counts": lambda a: a["counts"] - 1},
        {"n": lambda a: a["n"] * 2},
        {"bound_n": lambda a: a["bound_n"] * 2},
        {"bound_votes": lambda a: a["bound_n"] + 1},
    ],
    ids=[
        "a little",
        "of an abstention",
        "and bound",
        "class of an abstention",
        "alpha",
        "counts",
        "n",
        "bound's n",
        "votes",
    ],
)
def test_a_gap_that_does_not_follow_from_its_counts_is_not_believed(tmp_path, change):
    ids, shard = list(range(20)), tmp_path / "run" / "shards" / "0.npz"
    _write(tmp_path / "run", ids)
    with np.load(shard) as arrays:
        stored = dict(arrays)
    assert (stored["gap"] == 0).any()
    np.savez(shard, **stored | {name: value(stored) for name, value in change.items()})
    with pytest.raises(ValueError, match=r"0\.npz: its gaps do not follow from its counts; delete it"):
        read_run(tmp_path / "run").table()
    np.savez(shard, **stored)
    read_run(tmp_path / "run").table()


def test_shards_come_in_the_order_of_numbers_and_lines_in_that_of_ids(tmp_path):
    # As text "100" < "20" < "9"; the second batch interleaves with the first.
    tsv = _write(tmp_path / "run", [100, 101], [9, 102], [20])
    assert [int(shard["ids"][0]) for shard in read_run(tmp_path / "run").shards()] == [9, 20, 100]
    assert read_results(tsv)["idx"].tolist() == [9, 20, 100, 101, 102]


def test_columns_begin_with_cohens(tmp_path):
    header = _write(tmp_path / "run", [0]).read_text().splitlines()[0].split("\t")
    assert header[:6] == ["idx", "label", "predict", "radius", "correct", "time"]
    assert tuple(header) == COLUMNS


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("per_coordinate", [True, False])
def test_lines_hold_the_shard_and_never_more(tmp_path, norm, per_coordinate):
    ids = list(range(40))
    settings = _SETTINGS | {"norm": norm}
    tsv = _write(tmp_path / "run", ids[:25], ids[25:], settings=settings, per_coordinate=per_coordinate)
    rows = pd.read_csv(tsv, sep="\t", dtype=str)
    shards = [_arrays(part, per_coordinate=per_coordinate, norm=norm) for part in (ids[:25], ids[25:])]
    whole = {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}
    assert (whole["predictions"] < 0).any() and (whole["predictions"] == whole["labels"]).any()
    theta = np.broadcast_to(whole["theta"].reshape(40, -1).astype(np.float64), (40, 6))
    gap = whole["gap"]
    with np.errstate(divide="ignore"):
        log_volume = 6 * np.log(gap) + np.log(theta).sum(axis=1)
    log_volume += np.log(np.pi**3 / 6) if norm == "l2" else np.log(2**6 / 720)
    expected = {
        "radius": theta.min(axis=1) * gap,
        "radius_proxy": np.exp(np.log(theta).mean(axis=1)) * gap,
        "min_sigma": theta.min(axis=1),
        "gap": gap,
        "p_lower": whole["p_lower"],
        "log_volume": log_volume,
        "at_theta_max": (theta == 1.5).mean(axis=1),
    }
    assert (expected["at_theta_max"] > 0).any()
    for name in _NUMBERS:
        # The volume is not computed as in the package: sums in another order.
        slack = fractions.Fraction(1, 10**9) if name == "log_volume" else 0
        for text, value in zip(rows[name], expected[name], strict=True):
            if np.isinf(value):
                assert text == "-inf"
                continue
            difference = fractions.Fraction(float(value)) - fractions.Fraction(text)
            unit = fractions.Fraction(1, 10 ** len(text.partition(".")[2]))
            up = unit if name == "at_theta_max" else 0  # that is rounded away from zero
            assert -slack - up < difference < unit - up + slack or difference == 0, name
    for name, column in (("idx", "ids"), ("label", "labels"), ("predict", "predictions"), ("count", "counts")):
        np.testing.assert_array_equal(rows[name].astype(int), whole[column])
    np.testing.assert_array_equal(rows["correct"].astype(int), whole["predictions"] == whole["labels"])
    np.testing.assert_allclose(pd.to_timedelta(rows["time"]).dt.total_seconds(), whole["seconds"], atol=1e-6)
    assert set(rows["n"]) == {"1000"} and set(rows["method"]) == {"ancer"}


def test_an_isotropic_run_has_its_own_bound(tmp_path):
    settings = {name: value for name, value in _SETTINGS.items() if name != "anisotropic"}
    settings |= {"method": "isotropic", "isotropic": {"theta_max": 1.5}}
    results = read_results(_write(tmp_path / "run", range(20), settings=settings, per_coordinate=False))
    np.testing.assert_array_equal(results["at_theta_max"], _arrays(range(20), per_coordinate=False)["theta"] == 1.5)
    fixed = {name: value for name, value in settings.items() if name != "isotropic"} | {"method": "fixed"}
    results = read_results(_write(tmp_path / "other", range(20), settings=fixed, per_coordinate=False))
    assert not results["at_theta_max"].any()


def test_cohens_analysis_of_the_file_gives_our_figures(tmp_path):
    tsv = _write(tmp_path / "run", range(30), range(30, 50))
    table, results = pd.read_csv(tsv, delimiter="\t"), read_results(tsv)
    correct = results["correct"] == 1
    for name in ("radius", "radius_proxy"):
        radii = np.unique([0.0, 0.1, *results[name]])
        # code/analyze.py of locuslab/smoothing: ApproximateAccuracy.at_radius.
        cohen = [(table["correct"] & (table[name] >= r)).mean() for r in radii]
        np.testing.assert_array_equal(certified_accuracy(results[name], correct, radii), cohen)
        naive = (table[name] * table["correct"]).mean()
        assert average_certified_radius(results[name], correct) == pytest.approx(naive, rel=1e-12)


def test_cohens_file_is_read(tmp_path):
    path = tmp_path / "sigma_0.25"
    path.write_text(
        "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
        "0\t3\t3\t0.622\t1\t0:00:15.012345\n20\t7\t-1\t0.0\t0\t0:00:14.9\n40\t0\t1\t0.04\t0\t0:01:00\n"
    )
    results = read_results(path)
    assert results["predict"].tolist() == [3, -1, 1]
    assert results["radius"].tolist() == results["radius_proxy"].tolist() == [0.622, 0.0, 0.04]
    assert results["time"].tolist() == ["0:00:15.012345", "0:00:14.9", "0:01:00"]


def test_ancers_file_is_read(tmp_path):
    path = tmp_path / "ancer.tsv"
    path.write_text(
        "idx\tlabel\tpredict\tradius\tradius_proxy\tcorrect\tmin_sigma\ttime\n"
        "0\t3\t3\t0.5\t0.75\t1\t0.25\t0:00:15.012345\n"
    )
    results = read_results(path)
    assert (results["radius"], results["radius_proxy"], results["min_sigma"]) == (0.5, 0.75, 0.25)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a results table, no column 'idx'"),
        ("hello\n", "not a results table, no column 'idx'"),
        ("idx\tlabel\tpredict\tcorrect\n0\t1\t1\t1\n", "no column 'radius'"),
        ("idx\tlabel\tpredict\tradius\tcorrect\n", "there are no results yet"),
        ("idx\tlabel\tpredict\tradius\tcorrect\n0\t1\t1\t0.5\t1\n3\t1\t1\n", "line 3 has 3 columns instead of 5"),
        ("idx\tlabel\tpredict\tradius\tcorrect\n0\t1\t1\tfar\t1\n", "column 'radius': .*'far'"),
    ],
)
def test_other_files_are_no_results(tmp_path, text, message):
    path = tmp_path / "table.tsv"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"table\.tsv: .*{message}") as error:
        read_results(path)
    assert "\n" not in str(error.value)


def test_unreadable_results_are_refused(tmp_path):
    (tmp_path / "picture.tsv").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name in ("picture.tsv", "missing.tsv", "."):
        with pytest.raises(ValueError, match="cannot be read"):
            read_results(tmp_path / name)


def test_a_finished_run_computes_nothing_again(tmp_path, finished):
    calls = []
    _certify(tmp_path / "run", progress=calls.append)
    assert calls == [0, 2, 2, 2, 1]
    _assert_same(tmp_path / "run", finished)
    before, tsv = _written(tmp_path / "run"), (tmp_path / "run" / "results.tsv").read_bytes()
    calls.clear()
    _certify(tmp_path / "run", progress=calls.append)
    assert calls == [7]
    assert _written(tmp_path / "run") == before
    assert (tmp_path / "run" / "results.tsv").read_bytes() == tsv


def test_only_what_is_missing_is_computed(tmp_path, finished):
    out = tmp_path / "run"
    _certify(out)
    before = _written(out)
    (out / "shards" / "6.npz").unlink()
    calls = []
    _certify(out, progress=calls.append)
    assert calls == [5, 2]
    after = _written(out)
    assert {name for name in after if after[name] != before[name]} == {"6.npz"}
    _assert_same(out, finished)


def test_more_images_are_added_to_a_finished_run(tmp_path, finished):
    out, calls = tmp_path / "run", []
    _certify(out, select(_images(), skip=3))
    before = _written(out)
    assert len(read_results(out / "results.tsv")["idx"]) == 3
    _certify(out, progress=calls.append)
    assert calls == [3, 2, 2]
    assert {name: _written(out)[name] for name in before} == before
    assert _without_time(out / "results.tsv") == _without_time(finished / "results.tsv")
    # Fewer images again: nothing is lost.
    calls.clear()
    _certify(out, select(_images(), max_images=2), progress=calls.append)
    assert calls == [2]
    assert _without_time(out / "results.tsv") == _without_time(finished / "results.tsv")


def test_execution_settings_may_change_between_the_parts_of_a_run(tmp_path, finished):
    out = tmp_path / "run"
    _certify(out, select(_images(), max_images=3), batch_size=1)
    _certify(out, batch_size=4, devices=2)
    assert _without_time(out / "results.tsv") == _without_time(finished / "results.tsv")


def test_an_unbounded_search_can_be_continued(tmp_path):
    # Infinity is no JSON number.
    settings = _SETTINGS | {"isotropic": {"theta_max": float("inf")}}
    for ids in ([0], [1]):
        _write(tmp_path / "run", ids, settings=settings)
    assert read_run(tmp_path / "run").done() == {0, 1}


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (RunConfig(theta=0.25, certify=_CONFIG.certify), "theta is 0.5 there, 0.25 here"),
        (RunConfig(theta=0.5, certify=CertifyConfig(10, 100, 0.01)), "certify.n is 200 there, 100 here"),
        (RunConfig(theta=0.5, certify=_CONFIG.certify, seed=1), "seed is 0 there, 1 here"),
        (RunConfig(norm="l1", theta=0.5, certify=_CONFIG.certify), "norm is l2 there, l1 here"),
        (RunConfig(theta=0.5, certify=_CONFIG.certify, method="isotropic"), "isotropic.steps is None there"),
    ],
    ids=["theta", "n", "seed", "norm", "method"],
)
def test_other_settings_are_refused_by_name(finished, config, field):
    before = _contents(finished)
    with pytest.raises(ValueError, match=rf"was made with other settings \((.*; )?{field}"):
        _certify(finished, config=config)
    assert _contents(finished) == before


def test_other_data_and_other_classifiers_are_refused(finished):
    images = _images()
    images.images[3, 0, 0, 0] = 0.123
    with pytest.raises(ValueError, match=r"other settings \(data\.fingerprint is"):
        _certify(finished, Dataset("toy", images.ids, images.images, images.labels, 3))
    other = from_function(_brightness, jnp.ones((4, 3)), num_classes=3)
    with pytest.raises(ValueError, match=r"other settings \(classifier is"):
        certify_dataset(other, _images(), _CONFIG, out=finished)


def test_a_refused_run_is_not_held(tmp_path):
    _write(tmp_path / "run", [0])
    try:
        _write(tmp_path / "run", [1], settings=_SETTINGS | {"norm": "l1"})
    except ValueError as error:
        # A debugger or a notebook keeps the traceback, and with it every frame.
        kept = error
        _write(tmp_path / "run", [1])
    assert "norm" in str(kept)
    assert read_run(tmp_path / "run").done() == {0, 1}


@pytest.mark.parametrize("keep", [0, 10, 200, -1])
def test_a_truncated_shard_is_named_and_the_rest_is_kept(tmp_path, finished, keep):
    out = tmp_path / "run"
    _certify(out)
    shard = out / "shards" / "6.npz"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"6\.npz: truncated or not a shard .*; delete it to compute it again"):
        _certify(out)
    shard.unlink()
    _certify(out)
    _assert_same(out, finished)


def _npy(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("hello"),
        lambda path: np.savez(path, ids=np.arange(2)),
        lambda path: np.savez(path, ids=np.array([{}], object)),
        _npy,
    ],
    ids=["text", "other arrays", "pickle", "npy"],
)
def test_a_file_that_is_no_shard_is_named(tmp_path, write):
    _write(tmp_path / "run", [0])
    write(tmp_path / "run" / "shards" / "5.npz")
    with pytest.raises(ValueError, match=r"5\.npz: truncated or not a shard"):
        read_run(tmp_path / "run").done()


def test_shards_of_others_are_named(tmp_path):
    _write(tmp_path / "run", [0])
    _write(tmp_path / "other", [5], settings=_SETTINGS | {"norm": "l1"})
    foreign = (tmp_path / "other" / "shards" / "5.npz").read_bytes()
    (tmp_path / "run" / "shards" / "5.npz").write_bytes(foreign)
    with pytest.raises(ValueError, match=r"5\.npz: this shard belongs to a run with other settings"):
        _write(tmp_path / "run", [6])
    (tmp_path / "run" / "shards" / "5.npz").rename(tmp_path / "run" / "shards" / "copy of 5.npz")
    with pytest.raises(ValueError, match=r"copy of 5\.npz: not a shard of this run"):
        _write(tmp_path / "run", [6])


def test_a_foreign_directory_or_file_is_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(ValueError, match=r"thesis is not a run directory: it holds chapter\.tex and no config\.json"):
        _write(tmp_path / "thesis", [0])
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]
    with pytest.raises(ValueError, match=r"chapter\.tex is a file, not a run directory"):
        _write(tmp_path / "thesis" / "chapter.tex", [0])
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "x"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"settings": 3}', '{"settings": [1]}', "null", "\x00"])
def test_a_damaged_config_is_named(tmp_path, text):
    _write(tmp_path / "run", [0])
    (tmp_path / "run" / "config.json").write_text(text)
    for use in (lambda: _write(tmp_path / "run", [1]), lambda: read_run(tmp_path / "run")):
        with pytest.raises(ValueError, match=r"config\.json: not the settings of a run") as error:
            use()
        assert "\n" not in str(error.value)


def test_a_run_is_open_once_in_a_process(tmp_path):
    with open_run(tmp_path / "run", _SETTINGS, {}):
        with pytest.raises(ValueError, match="another process is writing to"):
            _write(tmp_path / "run", [0])
        assert read_run(tmp_path / "run").done() == set()
    _write(tmp_path / "run", [0])


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    _write(tmp_path / "run", [0])
    hold = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True)"
    hold += "; input()"
    command = [sys.executable, "-c", hold, str(tmp_path / "run" / "lock-0-of-1")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"held\n"
            with pytest.raises(ValueError, match=r"another process is writing to .*run"):
                _write(tmp_path / "run", [1])
        finally:
            process.kill()
    _write(tmp_path / "run", [1])
    assert read_run(tmp_path / "run").done() == {0, 1}


def test_an_interruption_between_batches_changes_nothing(tmp_path, finished):
    class Interruption(Exception):
        pass

    for _ in range(3):
        with pytest.raises(Interruption):
            # The first call reports what was finished before.
            _certify(tmp_path / "run", progress=_after(1, Interruption))
    assert sorted(_written(tmp_path / "run")) == ["0.npz", "12.npz", "6.npz"]
    assert not (tmp_path / "run" / "results.tsv").exists()
    _certify(tmp_path / "run")
    _assert_same(tmp_path / "run", finished)


def _after(calls, error):
    left = [calls]

    def progress(images):
        left[0] -= 1
        if left[0] < 0:
            raise error

    return progress


class _Killed(BaseException):
    pass


def test_dying_in_any_file_operation_changes_nothing(tmp_path, finished, monkeypatch):
    kind = type(epath.Path(tmp_path))
    real = {name: getattr(kind, name) for name in ("mkdir", "write_bytes", "replace")}
    left = [0]

    def dying(name):
        def operation(path, *arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                if name == "write_bytes":
                    real[name](path, arguments[0][: len(arguments[0]) // 2])
                raise _Killed
            return real[name](path, *arguments, **options)

        return operation

    for name in real:
        monkeypatch.setattr(kind, name, dying(name))
    deaths = 0
    for moment in range(1, 100):
        out = tmp_path / str(moment)
        left[0] = moment
        try:
            _certify(out)
        except _Killed:
            deaths += 1
        else:
            break
        left[0] = 10**9
        before = _written(out)
        _certify(out)
        assert {name: _written(out)[name] for name in before} == before
        _assert_same(out, finished)
    # A directory, then settings, four shards and the table: each written and renamed.
    assert deaths >= 1 + 2 * 6


@contextlib.contextmanager
def _files_of_at_most(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_loses_no_finished_batch(tmp_path, finished):
    out = tmp_path / "run"

    def fill(images):
        if (out / "shards" / "0.npz").exists():
            (out / "shards" / "6.npz.0.tmp").symlink_to("/dev/full")

    with pytest.raises(OSError, match=r"cannot write .*6\.npz: No space left on device; what was finished"):
        _certify(out, progress=fill)
    before = _written(out)
    assert list(before) == ["0.npz"]
    _certify(out)
    assert _written(out)["0.npz"] == before["0.npz"]
    _assert_same(out, finished)


@pytest.mark.parametrize(("size", "file"), [(0, "config.json"), (1500, r"0\.npz")])
def test_a_write_that_stops_half_way_leaves_no_shard(tmp_path, finished, size, file):
    out = tmp_path / "run"
    with _files_of_at_most(size), pytest.raises(OSError, match=f"cannot write .*{file}: File too large"):
        _certify(out)
    assert not _written(out)
    _certify(out)
    _assert_same(out, finished)


def test_a_table_that_cannot_be_written_keeps_the_old_one(tmp_path):
    tsv = _write(tmp_path / "run", [0])
    old = tsv.read_bytes()
    with open_run(tmp_path / "run", _SETTINGS, {}) as run:
        run.write_shard(_arrays([1, 2, 3]))
        with (
            _files_of_at_most(len(old) + 5),
            pytest.raises(OSError, match=r"cannot write .*results_before_memory\.tsv"),
        ):
            run.export()
        assert tsv.read_bytes() == old
        run.export()
    assert read_results(tsv)["idx"].tolist() == [0, 1, 2, 3]


@pytest.mark.slow
def test_random_faults_change_nothing(tmp_path):
    """Killed, stopped, disk full, shards torn, in a failing bucket, one of several processes dead: a small campaign."""
    script = pathlib.Path(__file__).parent.parent / "benchmarks" / "faults.py"
    command = [sys.executable, str(script), "--faults", "20", "--no-record"]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'lost': 0, 'twice': 0, 'different': 0" in done.stdout


@pytest.mark.parametrize("damage", ["copied", "renamed", "shortened"])
def test_shards_that_were_moved_about_are_refused(tmp_path, damage):
    _write(tmp_path / "run", [0, 1], [2, 3])
    shards = tmp_path / "run" / "shards"
    if damage == "copied":
        (shards / "77.npz").write_bytes((shards / "0.npz").read_bytes())
    elif damage == "renamed":
        (shards / "0.npz").rename(shards / "77.npz")
    else:
        with np.load(shards / "0.npz") as arrays:
            changed = {name: arrays[name] for name in arrays.files}
        np.savez(shards / "0.npz", **changed | {"labels": changed["labels"][:1]})
    with pytest.raises(ValueError, match=r"(77|0)\.npz: renamed, copied or damaged"):
        read_run(tmp_path / "run").export()
