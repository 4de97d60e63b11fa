"""The printed tables and their notes."""

import dataclasses

import numpy as np
import pytest

from ancer_jax import RunConfig, report
from ancer_jax.report.notes import notes
from ancer_jax.report.tables import percent
from ancer_jax.smoothing import CertifyConfig, SequentialConfig, Splitting
from ancer_jax.smoothing.registry import NOISES
from tests.report.examples import ANCER, FIXED, MEMORY, cells, from_text, write_run


@dataclasses.dataclass
class Known:
    """Stands in for a run directory of which only the settings matter."""

    config: RunConfig
    carried: None = None


def test_summary_of_an_isotropic_run_is_what_the_hand_finds(tmp_path):
    table = report.summary_table([from_text(tmp_path, "cohen.tsv", FIXED)], [0.0, 0.25, 0.5, 1.3])
    figures = dict(zip(cells(table, 0), cells(table, 2), strict=True))
    assert figures == {
        "run": "cohen?",
        "norm": "?",
        "images": "6",
        "accuracy": "0.666",  # 4 of 6, rounded down
        "abstained": "0.166",
        "ACR": "0.366",  # (0.5 + 1.25 + 0.25 + 0.2) / 6
        "median radius": "0.225",  # of 0, 0, 0.2, 0.25, 0.5, 1.25
        "ACR-tilde": "0.366",
        "median proxy": "0.225",
        "theta at its limit": "-",
        "s/image": "2.00",
    }
    assert cells(table, 6) == ["run", "by", "0", "0.25", "0.5", "1.3"]
    assert cells(table, 8) == ["cohen?", "radius", "0.666", "0.500", "0.333", "0.000"]
    # Without proxy radii of its own there is no second line.
    errors = "Standard errors of accuracy and ACR, over the choice of images: cohen? 0.211, 0.193."
    rounded = (
        "Tables of other tools (cohen) have radii as these rounded them, to the nearest as a rule: figures may be "
    )
    assert table.splitlines()[9:] == ["", f"{rounded}too large.", "", errors, "", f"? {report.UNKNOWN}"]


def test_summary_of_a_data_dependent_run_is_what_the_hand_finds(tmp_path):
    table = report.summary_table([from_text(tmp_path, "a.tsv", ANCER)], [0.5, 0.75, 1.25])
    assert cells(table, 2) == [
        *("a*", "?", "3", "0.666", "0.000", "0.500", "0.500", "0.750", "0.750"),
        "2 of 3 (50% of coordinates)",
        "1223.33",
    ]
    assert cells(table, 8) == ["a*", "radius", "0.666", "0.333", "0.000"]
    assert cells(table, 9) == ["a*", "proxy radius", "0.666", "0.666", "0.333"]


def test_one_theta_for_all_coordinates_has_no_lines_by_proxy_radius(tmp_path):
    """Though exp(log(theta)) is not theta to the last bit, nor are two numbers that were rounded down."""
    thetas = np.array([0.3, 0.7, 0.9], np.float32)
    run = report.load_results(write_run(tmp_path / "run", "isotropic", thetas))
    rounded = (
        ANCER.replace("\t0.75\t", "\t0.499999\t").replace("\t1.5\t", "\t1.0\t").replace("\t3\tancer", "\t2\tancer")
    )
    for results in (run, from_text(tmp_path, "a.tsv", rounded)):
        ((_, accuracies),) = [table for table in report.summary([results], [0.0]) if "accuracy at" in table[0]]
        assert [row["by"] for row in accuracies] == ["radius"]


def test_certified_accuracy_is_counted_at_exact_radii(tmp_path):
    """Not at radii that were rounded down to six decimals."""
    results = report.load_results(write_run(tmp_path / "run", "isotropic", np.ones(3, np.float32)))
    results.columns["correct"][:] = results["predict"] == results["predict"].max()
    radius = float(results["radius"].max())
    ((_, (row,)),) = [
        table for table in report.summary([results], [radius, np.nextafter(radius, 2)]) if len(table[1][0]) == 4
    ]
    assert [*row.values()][2:] == ["0.333", "0.000"]


def test_the_label_is_there_exactly_when_a_data_dependent_run_is(tmp_path):
    label = "per-input classifiers, not reconciled by memory"
    assert label == report.NOT_RECONCILED
    fixed = from_text(tmp_path, "fixed.tsv", ANCER.replace("\tancer", "\tfixed"))
    universal = from_text(tmp_path, "universal.tsv", ANCER.replace("\tancer", "\tuniversal"))
    assert label not in report.summary_table([fixed, universal], [0.0])
    for method in ("ancer", "isotropic"):
        dependent = from_text(tmp_path, f"{method}.tsv", ANCER.replace("\tancer", f"\t{method}"))
        table = report.summary_table([fixed, dependent, universal], [0.0])
        assert table.splitlines()[-1] == f"* {label}"
        names = [cells(table, line)[0] for line in (2, 3, 4)]
        assert names == ["fixed", f"{method}*", "universal"]


def test_what_a_table_does_not_say_is_unknown(tmp_path):
    """Cohen's six columns may be of data-dependent noise: ANCER's l2 scripts write them, too."""
    cohen = from_text(tmp_path, "cohen.tsv", FIXED)
    assert cohen.data_dependent is None and not cohen.reconciled
    table = report.summary_table([cohen], [0.0])
    assert "| cohen? " in table and table.splitlines()[-1] == f"? {report.UNKNOWN}"
    assert report.TWO_CLAIMS not in table


def test_fixed_noise_beside_a_memory_is_another_threat_model(tmp_path):
    fixed = from_text(tmp_path, "fixed.tsv", ANCER.replace("\tancer", "\tfixed"))
    ancer, cohen = from_text(tmp_path, "ancer.tsv", ANCER), from_text(tmp_path, "cohen.tsv", FIXED)
    for other in (fixed, cohen):
        assert report.TWO_CLAIMS in report.summary_table([other, ancer], [0.0])
        assert "Two threat models" in report.compare_proxy_radius([other, ancer], other)
    for alone in (fixed, ancer):
        assert report.TWO_CLAIMS not in report.summary_table([alone], [0.0])


@pytest.mark.parametrize(
    ("alpha", "text"),
    [
        *((0.001, "p >= 0.9970"), (0.0166666, "p >= 0.9500"), (1 / 3 + 1e-9, "nothing is known")),
        (1e-5, "p >= 0.9999"),  # rounded down, not to the nearest
    ],
)
def test_the_table_says_how_surely_all_its_lines_hold(tmp_path, alpha, text):
    run = write_run(tmp_path / "run", "isotropic", np.ones(3, np.float32), alpha=alpha)
    results = report.load_results(run)
    table = report.summary_table([results, from_text(tmp_path, "cohen.tsv", FIXED)], [0.0])
    place = cells(table, 0).index("all lines hold")
    assert [cells(table, line)[place] for line in (2, 3)] == [text, "-"]


def test_leakage_that_was_not_measured_is_not_none(tmp_path):
    header, *lines = ANCER.splitlines()
    text = "\n".join([f"{header}\tleakage\tsoft_leakage", f"{lines[0]}\t0.05\t0.2", f"{lines[1]}\tnan\tnan"])
    some = from_text(tmp_path, "some.tsv", text)
    none = from_text(tmp_path, "none.tsv", ANCER)
    title, rows = report.summary([some, none], [0.0])[-1]
    assert "known to leak at most 0.1" in title
    assert rows[0] | {"ACR without leaky": "0.250", "mean": "0.050", "above 0.1": "0 of 1"} == rows[0]  # 0.5 / 2
    assert rows[0]["mean soft, held out"] == "0.200" and rows[0]["accuracy without leaky"] == "0.500"
    assert {*rows[1].values()} == {"none*", "not measured"}
    lines = report.compare_proxy_radius([some, none], none).splitlines()
    assert "without leaky thetas not measured" in lines[0] and "without leaky thetas 0.375" in lines[1]


def test_what_is_left_without_leaky_thetas_is_said_below_the_first_table(tmp_path):
    header, *lines = ANCER.splitlines()
    text = "\n".join([f"{header}\tleakage", f"{lines[0]}\t0.05", f"{lines[1]}\t0.4", f"{lines[2]}\t0.3"])
    results, fixed = from_text(tmp_path, "a.tsv", text), from_text(tmp_path, "fixed.tsv", FIXED)
    table = report.summary_table([fixed, results], [0.0])
    # 0.5 / 3 and 1.5 / 3, 0.75 / 3 and 2.25 / 3
    left = "Without leaky thetas, ACR is 0.166 instead of 0.500, ACR-tilde is 0.250 instead of 0.750."
    assert table.splitlines()[4:7] == ["", f"a*: 2 of 3 thetas leak more than 0.1. {left}", ""]
    assert "a*: 1 of 3 thetas leak more than 0.3. " in report.summary_table([results], [0.0], 0.3)
    assert "thetas leak" not in report.summary_table([results], [0.0], 0.4)


def test_leakage_is_rounded_up_from_exact_shares(tmp_path):
    results = report.load_results(write_run(tmp_path / "run", "isotropic", np.ones(3, np.float32)))
    _, (row,) = report.summary([results], [0.0])[-1]
    # The first image is an abstention. 1/20 and 2/20 have mean 0.075, 10/80 and 20/80 have mean 0.1875.
    figures = {"median": "0.075", "mean": "0.075", "largest": "0.100", "mean soft, held out": "0.188"}
    assert row | figures | {"above 0.1": "0 of 2"} == row


@pytest.mark.parametrize(("at", "text"), [(2.0, "2"), (1.999996, "1.999996"), (0.1, "0.1"), (1e-7, "1e-07")])
def test_a_radius_is_never_printed_as_another_one(tmp_path, at, text):
    assert cells(report.summary_table([from_text(tmp_path, "a.tsv", FIXED)], [at]), 6)[-1] == text


def test_a_share_that_is_not_0_is_never_printed_as_0():
    assert [percent(share) for share in (0.0, 1e-6, 1 / 784, 0.5, 1.0)] == ["0%", "0.0001%", "0.128%", "50%", "100%"]


def test_runs_of_different_norms_are_not_compared_silently(tmp_path):
    both = [write_run(tmp_path / norm, "isotropic", np.ones(3, np.float32), norm=norm) for norm in ("l2", "l1")]
    table = report.summary_table([report.load_results(run) for run in both], [0.0])
    assert [cells(table, line)[1] for line in (2, 3)] == ["l2", "l1"]
    assert "different norms" in table


def test_runs_of_other_images_are_not_compared_silently(tmp_path):
    fixed, fewer = from_text(tmp_path, "a.tsv", FIXED), from_text(tmp_path, "b.tsv", FIXED.rsplit("7\t8", 1)[0])
    assert "not of the same images" in report.summary_table([fixed, fewer], [0.0])
    assert "not of the same images" not in report.summary_table([fixed, fixed], [0.0])


def test_proxy_radii_are_compared_with_the_best_fixed_run(tmp_path):
    fixed, dependent = from_text(tmp_path, "fixed.tsv", FIXED), from_text(tmp_path, "ancer.tsv", ANCER)
    lines = report.compare_proxy_radius([fixed, dependent], fixed).splitlines()
    assert lines[0].split()[:3] == ["fixed?", "0.700", "1.00"]
    assert lines[1].split()[:3] == ["ancer*", "1.750", "2.49"]
    assert lines[-2:] == [f"* {report.NOT_RECONCILED}", f"? {report.UNKNOWN}"]


def test_times_that_cannot_be_read_are_left_out(tmp_path):
    results = from_text(tmp_path, "a.tsv", FIXED.replace("0:00:04", "1 day, 0:00:04"))
    assert cells(report.summary_table([results], [0.0]), 2)[-1] == "-"
    untimed = "\n".join(line.rpartition("\t")[0] for line in FIXED.splitlines())
    assert cells(report.summary_table([from_text(tmp_path, "b.tsv", untimed)], [0.0]), 2)[-1] == "-"


def test_the_memory_table_is_what_the_hand_finds(tmp_path):
    columns = {"gap": np.array([2.0, 4.0, 1.0]), "changed": np.array([0, 1, 1]), "answered_by": np.array([-1, -1, 0])}
    after = from_text(tmp_path, "a.tsv", ANCER)
    before = after.columns | {"gap": np.array([2.0, 5.0, 4.0]), "predict": np.array([3, 4, 5]), "correct": np.ones(3)}
    results = dataclasses.replace(after, columns=after.columns | columns, before=before)
    title, (row,) = report.summary([results], [0.0])[2]
    assert title == "Memory (before -> after)"
    assert row == {
        "run": "a",
        "regions changed": "2 of 3",
        "gap after / before, median (smallest)": "0.525 (0.250)",  # 4/5 and 1/4
        "inside an earlier region": "1",
        "answered with its class": "1",
        "accuracy": "1.000 -> 0.666",
        "ACR": "1.166 -> 0.500",  # 3.5 / 3 and 1.5 / 3
        "ACR-tilde": "1.750 -> 0.750",
    }
    (_, (row,)) = report.summary([from_text(tmp_path, "b.tsv", MEMORY)], [0.0])[2]
    assert row == {"run": "b", "regions changed": "1 of 2", "inside an earlier region": "1"}


SPLITTING = RunConfig(norm="l1", noise="splitting")


@pytest.mark.parametrize(
    ("config", "note"),
    [
        (
            RunConfig(certify=CertifyConfig(bound="separate")),
            "the class and of the second class, at half of alpha each: a.",
        ),
        (dataclasses.replace(SPLITTING, exact=True), "Exact certificates, without alpha, for images of 8 bits: a."),
        (SPLITTING, "Splitting noise: a."),
        (RunConfig(sampling=SequentialConfig(radii=(0.25, 0.5))), "these radii were decided (a: 0.25, 0.5)."),
        (RunConfig(method="isotropic"), "the i-th line with probability at least 1 - i alpha."),
        (RunConfig(method="isotropic"), "count an image as 0 if its theta is leaky"),
    ],
)
def test_a_note_is_there_exactly_when_it_applies(tmp_path, config, note):
    results = from_text(tmp_path, "a.tsv", MEMORY.replace("\tancer", f"\t{config.method}"))
    run = dataclasses.replace(results, norm=config.norm)
    object.__setattr__(run, "run", Known(config))
    other = from_text(tmp_path, "b.tsv", MEMORY.replace("\tancer", "\tfixed"))
    assert note in "\n".join(notes([run]))
    assert note not in "\n".join(notes([other]))


def test_images_with_equal_ids_and_other_labels_are_other_images(tmp_path):
    runs = [
        from_text(tmp_path, f"{i}.tsv", text) for i, text in enumerate((FIXED, FIXED.replace("0\t3\t3", "0\t2\t2")))
    ]
    assert "not of the same images" in "\n".join(notes(runs))
    assert "not of the same images" not in "\n".join(notes([runs[0], runs[0]]))


def test_exact_certificates_say_of_which_inputs_they_are(tmp_path, monkeypatch):
    monkeypatch.setitem(NOISES, "coarse", Splitting(exact=True, levels=15))
    run = from_text(tmp_path, "a.tsv", FIXED)
    object.__setattr__(run, "run", Known(RunConfig(norm="l1", noise="coarse")))
    assert "without alpha, for inputs in whole multiples of 1/15: a." in "\n".join(notes([run]))
