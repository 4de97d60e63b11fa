"""What is loaded of a run directory or a table: exact arrays, read once, and what they say of a run."""

import fractions
import math

import numpy as np
import pytest

from ancer_jax import report
from ancer_jax.metrics import round_down
from ancer_jax.report import LEAKY_ABOVE
from ancer_jax.runs import directory
from tests.report.examples import ANCER, FIXED, HEADER, MEMORY, cells, from_text, write_run


def test_the_columns_of_a_run_directory_are_exact(tmp_path):
    path = write_run(tmp_path / "my run", "isotropic", np.array([0.25, 0.5, 1.0], np.float32))
    results = report.load_results(path)
    assert results.name == "my run" and results.norm == "l2"
    assert results["idx"].tolist() == [0, 20, 40]
    gap = results.run.columns("gap")["gap"]
    np.testing.assert_array_equal(results["gap"], gap)
    assert gap[0] == 0 and results["radius"].tolist() == [g * t for g, t in zip(gap, (0.25, 0.5, 1.0), strict=True)]
    assert results["radius"][1] != float(round_down(results["radius"][1], 6))
    assert results["leakage"].tolist() == [0, fractions.Fraction(1, 20), fractions.Fraction(2, 20)]
    assert results["soft_leakage"].tolist() == [0, fractions.Fraction(10, 80), fractions.Fraction(20, 80)]
    assert results.seconds == 1 and results.data_dependent and not results.correct.any()
    assert results.alpha == fractions.Fraction(1, 1000) and results.passes.forward > 110
    assert cells(report.summary_table([results], [0.0]), 2)[10] == "1 of 3 (100% of coordinates)"


def test_a_report_reads_each_shard_once(tmp_path, monkeypatch):
    path, read = write_run(tmp_path / "run", "isotropic", np.ones(3, np.float32)), []
    whole = directory.read_arrays
    monkeypatch.setattr(directory, "read_arrays", lambda file, names: read.append(file.name) or whole(file, names))
    results = report.load_results(path)
    report.summary_table([results], [0.0])
    assert results.passes and read.count("0.npz") == 1


def test_thetas_are_read_for_the_images_that_are_asked_for(tmp_path):
    theta = np.random.default_rng(0).uniform(0.1, 1, (3, 4, 5, 1)).astype(np.float32)
    results = report.load_results(write_run(tmp_path / "run", "ancer", theta))
    found = results.thetas([40, 0])
    assert [*found] == [0, 40]
    np.testing.assert_array_equal(list(found.values()), theta[[0, 2]])
    assert results.thetas([]) == {} and from_text(tmp_path, "a.tsv", ANCER).thetas([0]) == {}


def test_results_of_an_unfinished_run_come_from_its_shards(tmp_path):
    path = write_run(tmp_path / "run", "isotropic", np.ones(3, np.float32))
    assert report.load_results(path).finished
    (path / "results_before_memory.tsv").unlink()
    results = report.load_results(path)
    assert results["idx"].tolist() == [0, 20, 40] and not results.finished
    (path / "shards" / "0.npz").unlink()
    with pytest.raises(ValueError, match="there are no results yet"):
        report.load_results(path)


def test_load_results_names_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="nowhere: there is no such run or file"):
        report.load_results(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a run directory"):
        report.load_results(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"picture\.png: cannot be read"):
        report.load_results(tmp_path / "picture.png")


def test_what_only_settings_say_is_not_known_of_a_table(tmp_path):
    results = from_text(tmp_path, "a.tsv", ANCER)
    assert (results.config, results.alpha, results.passes, results.norm) == (None, None, None, "")
    assert results.own is results.columns


@pytest.mark.parametrize(("method", "dependent"), [("fixed", False), ("universal", False), ("isotropic", True)])
def test_the_method_says_whether_theta_was_chosen_per_input(tmp_path, method, dependent):
    results = from_text(tmp_path, "a.tsv", ANCER.replace("\tancer", f"\t{method}"))
    assert results.data_dependent is dependent and results.reconciled is not dependent


def test_tables_of_others_are_judged_by_what_they_hold(tmp_path):
    columns = "idx\tlabel\tpredict\tradius\tradius_proxy\tcorrect\tmin_sigma\ttime\n"
    two = columns + "0\t3\t3\t0.5\t{}\t1\t{}\t0:00:01\n1\t3\t3\t0.5\t0.5\t1\t0.25\t0:00:01\n"
    for proxy, sigma, dependent in ((0.5, 0.25, None), (0.9, 0.25, True), (0.5, 0.3, True)):
        results = from_text(tmp_path, "a.tsv", two.format(proxy, sigma))
        assert results.data_dependent is dependent
        mark = "* " + report.NOT_RECONCILED if dependent else "? " + report.UNKNOWN
        assert report.summary_table([results], [0.0]).splitlines()[-1] == mark


def test_a_column_that_is_not_there_is_named_beside_those_that_are(tmp_path):
    with pytest.raises(KeyError, match=r"a has no column 'proxy_radius', only radius_proxy, idx, label, .*, method"):
        from_text(tmp_path, "a.tsv", ANCER)["proxy_radius"]


def test_mean_proxy_radius_is_over_all_inputs(tmp_path):
    assert from_text(tmp_path, "a.tsv", ANCER).mean_proxy_radius == 1.75


def test_acr_counts_wrong_answers_and_what_is_not_kept_as_0(tmp_path):
    results = from_text(tmp_path, "a.tsv", ANCER)
    assert (results.acr("radius"), results.acr("radius_proxy")) == (1.5 / 3, 2.25 / 3)
    assert results.acr("radius", np.array([False, True, True])) == 1 / 3


@pytest.mark.parametrize("limit", [0.05, 0.1, 0.3, 0.7])
def test_a_leakage_equal_to_the_limit_is_not_above_it(tmp_path, limit):
    """Of the decimal number, not of the float beside it: that of 0.3 is smaller than 3/10."""
    for leakage, within in ((limit, True), (limit + 1e-4, False), (limit - 1e-4, True), (math.nan, False)):
        line = f"0\t3\t3\t0.5\t1\t0:00:01\t{leakage:.4f}\n1\t3\t3\t0.5\t1\t0:00:01\t0.0\n"
        results = from_text(tmp_path, "a.tsv", f"{HEADER}\tleakage\n{line}")
        assert results.leaks_at_most(limit).tolist() == [within, True]
        assert len(results.leakages()) == 2 - math.isnan(leakage)


def test_leakage_that_was_not_measured_is_not_known(tmp_path):
    for text in (FIXED, f"{HEADER}\tleakage\n0\t3\t3\t0.5\t1\t0:00:01\tnan\n"):
        results = from_text(tmp_path, "a.tsv", text)
        assert results.leaks_at_most(LEAKY_ABOVE) is None
        assert results.leakages() == results.leakages("soft_leakage") == []


def test_an_abstention_has_no_leakage_to_speak_of(tmp_path):
    text = f"{HEADER}\tleakage\n0\t3\t-1\t0.0\t0\t0:00:01\t0.0\n1\t3\t3\t0.5\t1\t0:00:01\t0.25\n"
    assert from_text(tmp_path, "a.tsv", text).leakages() == [fractions.Fraction(1, 4)]


def test_a_memory_makes_one_classifier(tmp_path):
    assert from_text(tmp_path, "a.tsv", MEMORY).reconciled
    assert not from_text(tmp_path, "b.tsv", ANCER).reconciled


def test_a_file_keeps_its_name_and_loses_only_the_ending_of_a_table(tmp_path):
    table = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t0.5\t1\t0:00:01\n"
    for name, expected in {"sigma_0.25": "sigma_0.25", "sigma_0.5.tsv": "sigma_0.5", "cohen.txt": "cohen"}.items():
        (tmp_path / name).write_text("\ufeff" + table)
        results = report.load_results(tmp_path / name)
        assert results.name == expected and results["radius"].tolist() == [0.5]


def test_standard_errors_are_those_of_the_mean(tmp_path):
    rows = ["0\t1\t1\t0.5\t1", "1\t1\t0\t0.9\t0", "2\t1\t1\t1.0\t1", "3\t1\t-1\t0.0\t0"]
    (tmp_path / "four.tsv").write_text("\n".join(["idx\tlabel\tpredict\tradius\tcorrect", *rows, ""]))
    results = report.load_results(tmp_path / "four.tsv")
    assert results.standard_errors() == pytest.approx(
        (np.std([1, 0, 1, 0], ddof=1) / 2, np.std([0.5, 0, 1, 0], ddof=1) / 2)
    )
    assert "over the choice of images: four? 0.289, 0.240" in report.summary_table([results], [0.0])
    (tmp_path / "one.tsv").write_text("\n".join(["idx\tlabel\tpredict\tradius\tcorrect", rows[0], ""]))
    assert np.isnan(report.load_results(tmp_path / "one.tsv").standard_errors()).all()
