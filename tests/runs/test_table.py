"""Tables of results: exact columns, rounded towards zero; ours, older ones, Cohen's and ANCER's are read."""

import dataclasses
import fractions
import math

import numpy as np
import pandas as pd
import pytest

from ancer_jax.metrics import average_certified_radius, certified_accuracy
from ancer_jax.regions import Region
from ancer_jax.report import load_results
from ancer_jax.runs.table import COLUMNS, MEMORY_COLUMNS, after_memory, columns_of, parse_table, read_table, write_table
from ancer_jax.search import IsotropicConfig
from tests.runs.shards import CONFIG, IMAGE_SHAPE, arrays, write

HEADER = (
    "idx label predict radius correct time radius_proxy min_sigma gap p_lower count n log_volume method at_theta_max "
    "leakage soft_leakage"
)
ISOTROPIC = dataclasses.replace(CONFIG, method="isotropic", isotropic=IsotropicConfig(theta_max=1.5))
FIXED = dataclasses.replace(CONFIG, method="fixed")


def test_columns_begin_with_cohens(tmp_path):
    header = write(tmp_path / "run", [0]).read_text().splitlines()[0]
    assert header.split("\t") == HEADER.split() == [*COLUMNS]
    assert header.startswith("idx\tlabel\tpredict\tradius\tcorrect\ttime\t")
    assert (*COLUMNS, "changed", "answered_by") == MEMORY_COLUMNS


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("config", [CONFIG, ISOTROPIC], ids=["per coordinate", "scalar"])
def test_lines_hold_the_shard_and_never_more(tmp_path, norm, config):
    ids, config = list(range(40)), dataclasses.replace(config, norm=norm)
    rows = pd.read_csv(write(tmp_path / "run", ids[:25], ids[25:], config=config), sep="\t", dtype=str)
    shards = [arrays(part, config) for part in (ids[:25], ids[25:])]
    whole = {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0] if name != "passes"}
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
    for name, values in expected.items():
        # The package computes the volume by sums in another order.
        slack = fractions.Fraction(1, 10**9) if name == "log_volume" else 0
        for text, value in zip(rows[name], values, strict=True):
            if np.isinf(value):
                assert text == "-inf"
                continue
            difference = fractions.Fraction(float(value)) - fractions.Fraction(text)
            unit = fractions.Fraction(1, 10 ** len(text.partition(".")[2]))
            up = unit if name == "at_theta_max" else 0  # the one column here that is rounded away from zero
            assert -slack - up < difference < unit - up + slack or difference == 0, name
    for name, column in (("idx", "ids"), ("label", "labels"), ("predict", "predictions"), ("count", "counts")):
        np.testing.assert_array_equal(rows[name].astype(int), whole[column])
    np.testing.assert_array_equal(rows["correct"].astype(int), whole["predictions"] == whole["labels"])
    np.testing.assert_allclose(pd.to_timedelta(rows["time"]).dt.total_seconds(), whole["seconds"], atol=1e-6)
    assert set(rows["n"]) == {"1000"} and set(rows["method"]) == {config.method}


@pytest.mark.parametrize("config", [CONFIG, ISOTROPIC], ids=["per coordinate", "scalar"])
def test_columns_are_exact_and_a_table_that_is_read_has_them_rounded(config):
    """In order of idx, whatever the order of the shards."""
    batches = ([20, 21], [3, 30, 31], [4])
    shards = [arrays(ids, config) for ids in batches]
    columns, unit = columns_of(shards, config, IMAGE_SHAPE)
    assert columns["idx"].tolist() == [3, 4, 20, 21, 30, 31]
    names, order = shards[0].keys() - {"passes"}, [2, 5, 0, 1, 3, 4]
    whole = {name: np.concatenate([shard[name] for shard in shards])[order] for name in names}
    for name, column in (("gap", "gap"), ("p_lower", "p_lower"), ("count", "counts"), ("draws", "draws")):
        np.testing.assert_array_equal(columns[name], whole[column])
    for row, theta in enumerate(whole["theta"]):
        region = Region(np.zeros(IMAGE_SHAPE), theta, whole["gap"][row], 2)
        assert columns["radius"][row] == pytest.approx(region.radius, rel=1e-14)
        assert columns["radius_proxy"][row] == pytest.approx(region.proxy_radius, rel=1e-14)
        assert columns["log_volume"][row] == pytest.approx(region.log_volume, rel=1e-12)
        assert columns["min_sigma"][row] == theta.min()
    assert len(set(unit["digest"])) == 6
    table = parse_table(write_table(columns), "table.tsv")
    assert {*table} == {*COLUMNS} - {"time"} | {"seconds"}
    for name, digits in (("radius", 6), ("radius_proxy", 6), ("gap", 6), ("min_sigma", 6), ("p_lower", 8)):
        assert ((table[name] <= columns[name]) & (columns[name] < table[name] + 1.0001 * 10.0**-digits)).all()
    for exact, read in zip(columns["leakage"], table["leakage"], strict=True):
        assert isinstance(exact, fractions.Fraction) and exact <= read < exact + fractions.Fraction(1, 10**4)


def test_a_memory_changes_sizes_and_gives_the_leakage_of_the_class_that_is_answered():
    """Input 1 lies in the region of input 0 and gets its class; input 2 lies in what input 1 then stored."""
    shard = arrays([0, 1, 2, 3])
    shard["predictions"], shard["labels"] = np.array([0, 1, 2, 2]), np.array([0, 0, 2, 2])
    before, unit = columns_of([shard], CONFIG, IMAGE_SHAPE)
    assert len({*before["leakage"]}) == 4 and (before["gap"] > 0).all()
    gap = before["gap"] * np.array([1, 1, 0.5, 0.25])
    answers = {"prediction": np.array([0, 0, 0, 2]), "gap": gap, "inside": np.array([-1, 0, 1, -1])}
    after = after_memory(before, unit, answers, IMAGE_SHAPE)
    assert {*MEMORY_COLUMNS} - {"time"} <= {*after}
    assert after["predict"].tolist() == [0, 0, 0, 2] and after["correct"].tolist() == [1, 1, 0, 1]
    assert after["changed"].tolist() == [0, 1, 1, 1] and after["answered_by"].tolist() == [-1, 0, 1, -1]
    for name in ("leakage", "soft_leakage"):
        assert after[name].tolist() == before[name][[0, 0, 0, 3]].tolist()
    for row, theta in enumerate(shard["theta"]):
        region = Region(np.zeros(IMAGE_SHAPE), theta, gap[row], 2)
        assert after["gap"][row] == gap[row] and after["radius"][row] == pytest.approx(region.radius, rel=1e-14)
        assert after["log_volume"][row] == pytest.approx(region.log_volume, rel=1e-12)
    for name in ("idx", "label", "p_lower", "count", "n", "min_sigma", "at_theta_max"):
        np.testing.assert_array_equal(after[name], before[name])
    assert write_table(after).splitlines()[0].split("\t") == [*MEMORY_COLUMNS]


def test_leakage_is_rounded_up_and_that_of_an_abstention_is_zero(tmp_path):
    rows = pd.read_csv(write(tmp_path / "run", range(40)), sep="\t", dtype=str)
    shard = arrays(range(40))
    answered = shard["predictions"] >= 0
    assert answered.any() and not answered.all()
    for column, part, whole in (
        ("leakage", "leakage_num_leaked", "leakage_num_eligible"),
        ("soft_leakage", "leakage_votes", "leakage_draws"),
    ):
        for text, numerator, denominator, has in zip(rows[column], shard[part], shard[whole], answered, strict=True):
            exact = fractions.Fraction(int(numerator), int(denominator)) if has else fractions.Fraction(0)
            assert fractions.Fraction(text) == fractions.Fraction(math.ceil(exact * 10**4), 10**4)
    assert (rows["soft_leakage"].str.len() == 6).all()


@pytest.mark.parametrize(
    "config",
    [FIXED, dataclasses.replace(CONFIG, method="universal"), dataclasses.replace(CONFIG, leakage=None)],
    ids=["fixed", "universal", "not measured"],
)
def test_leakage_that_was_not_measured_is_nan(tmp_path, config):
    results = read_table(write(tmp_path / "run", range(20), config=config))
    answered = results["predict"] >= 0
    assert answered.any() and np.isnan(results["leakage"][answered].astype(float)).all()
    assert np.isnan(results["soft_leakage"][answered].astype(float)).all()


def test_an_isotropic_run_has_its_own_bound(tmp_path):
    results = read_table(write(tmp_path / "run", range(20), config=ISOTROPIC))
    at_bound = arrays(range(20), ISOTROPIC)["theta"] == 1.5
    assert at_bound.any()
    np.testing.assert_array_equal(results["at_theta_max"], at_bound)
    assert not read_table(write(tmp_path / "other", range(20), config=FIXED))["at_theta_max"].any()


def test_cohens_analysis_of_the_file_gives_our_figures(tmp_path):
    tsv = write(tmp_path / "run", range(30), range(30, 50))
    table, results = pd.read_csv(tsv, delimiter="\t"), read_table(tsv)
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
    results = read_table(path)
    assert results["predict"].tolist() == [3, -1, 1]
    assert results["radius"].tolist() == results["radius_proxy"].tolist() == [0.622, 0.0, 0.04]
    assert results["seconds"].tolist() == [15.012345, 14.9, 60.0]


def test_ancers_file_is_read(tmp_path):
    path = tmp_path / "ancer.tsv"
    path.write_text(
        "idx\tlabel\tpredict\tradius\tradius_proxy\tcorrect\tmin_sigma\ttime\n"
        "0\t3\t3\t0.5\t0.75\t1\t0.25\t0:00:15.012345\n"
    )
    results = read_table(path)
    assert (results["radius"], results["radius_proxy"], results["min_sigma"]) == (0.5, 0.75, 0.25)


def test_a_column_of_an_unknown_name_is_read_too(tmp_path):
    path = tmp_path / "new.tsv"
    path.write_text("idx\tlabel\tpredict\tradius\tcorrect\tmethod\tnew\n0\t1\t1\t0.5\t1\tuniversal\t7\n")
    results = load_results(path)
    assert results["new"].tolist() == [7.0] and results.data_dependent is False and results.reconciled


def test_a_time_that_cannot_be_read_is_left_out():
    text = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t0.5\t1\t{}\n"
    assert "seconds" not in parse_table(text.format("12.5"), "other.tsv")
    assert parse_table(text.format("1:02:03.5"), "ours.tsv")["seconds"].tolist() == [3723.5]


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
        read_table(path)
    assert "\n" not in str(error.value)


def test_unreadable_results_are_refused(tmp_path):
    (tmp_path / "picture.tsv").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name in ("picture.tsv", "missing.tsv", "."):
        with pytest.raises(ValueError, match="cannot be read"):
            read_table(tmp_path / name)
