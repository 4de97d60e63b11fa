import struct
import zlib

import numpy as np
import pytest

from ancer_jax import CertifyConfig, report, results
from ancer_jax.certificates import noise_law
from ancer_jax.certification import all_draws, certification_from
from ancer_jax.data import Dataset
from ancer_jax.metrics import round_down
from ancer_jax.report import plots
from ancer_jax.runs import open_run, read_run

_HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime"
_FIXED = f"""{_HEADER}
0\t3\t3\t0.5\t1\t0:00:01.500000
1\t4\t4\t1.25\t1\t0:00:02.500000
2\t5\t1\t2\t0\t0:00:00
5\t6\t-1\t0.0\t0\t0:00:04
6\t7\t7\t0.25\t1\t0:00:02
7\t8\t8\t0.2\t1\t0:00:02
"""
_ANCER = f"""{_HEADER}\tradius_proxy\tmethod\tat_theta_max
0\t3\t3\t0.5\t1\t0:00:10\t0.75\tancer\t0.0
1\t4\t4\t1.0\t1\t1:00:00\t1.5\tancer\t0.25
2\t5\t1\t2\t0\t0:01:00\t3\tancer\t0.75
"""


def _results(folder, name, text):
    (folder / name).write_text(text)
    return report.load_results(folder / name)


def _run(path, method, theta, ids=(0, 20, 40), channels=1, norm="l2"):
    settings = {
        "norm": norm,
        "method": method,
        "certify": {"n0": 10, "n": 100, "alpha": 0.001},
        "leakage": {"num_references": 20, "num_samples": 8},
        "data": {"image_shape": [4, 5, channels]},
        "isotropic": {"theta_max": 1.0},
        "anisotropic": {"theta_max": 1.0},
    }
    n = len(ids)
    evidence = all_draws(np.array([50, 80, 99]), CertifyConfig(10, 100, 0.001))
    result = certification_from(np.arange(n) - 1, evidence, noise_law(norm))
    with open_run(path, settings, {}) as run:
        run.write_shard(
            {
                "ids": np.array(ids),
                "labels": np.arange(n),
                "pixels": np.arange(n, dtype=np.uint64),
                "predictions": result.prediction,
                "counts": result.count,
                "n": np.full(n, 100),
                "draws": np.full(n, 110),
                "p_lower": result.p_lower,
                "gap": result.gap,
                "theta": theta,
                **{f"bound_{name}": column for name, column in evidence._asdict().items()},
                "leaked_leaked": np.arange(n),
                "leaked_references": np.full(n, 20),
                "leaked_votes": 10 * np.arange(n),
                "leaked_draws": np.full(n, 80),
                "seconds": np.ones(n),
            }
        )
        run.export()
    return path


def _dataset(run, ids, channels=1):
    """Grey images of these ids, which the run is of."""
    pixels = np.full((len(ids), 4, 5, channels), 0.5, np.float32)
    dataset = Dataset("grey", np.array(ids), pixels, np.zeros(len(ids), np.int64), 10)
    run.settings["data"]["fingerprint"] = dataset.fingerprint
    return dataset


def _cells(table, line):
    return [cell.strip() for cell in table.splitlines()[line].strip("|").split("|")]


def _size(path):
    """Width and height of a PNG file, all of its checksums verified."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds, size = 8, [], None
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body, (check,) = data[at + 4 : at + 8 + length], struct.unpack(">I", data[at + 8 + length : at + 12 + length])
        assert zlib.crc32(body) == check
        size = struct.unpack(">II", body[4:12]) if kind == b"IHDR" else size
        kinds.append(kind)
        at += 12 + length
    assert kinds[0] == b"IHDR" and kinds[-1] == b"IEND"
    return size


def test_summary_of_an_isotropic_run_is_what_the_hand_finds(tmp_path):
    table = report.summary_table([_results(tmp_path, "cohen.tsv", _FIXED)], [0.0, 0.25, 0.5, 1.3])
    figures = dict(zip(_cells(table, 0), _cells(table, 2), strict=True))
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
        "theta at its bound": "-",
        "s/image": "2.00",
    }
    assert _cells(table, 6) == ["run", "by", "0", "0.25", "0.5", "1.3"]
    assert _cells(table, 8) == ["cohen?", "radius", "0.666", "0.500", "0.333", "0.000"]
    # Without proxy radii of its own there is no second line.
    assert table.splitlines()[9:] == ["", f"? {report.UNKNOWN}"]


def test_summary_of_a_data_dependent_run_is_what_the_hand_finds(tmp_path):
    table = report.summary_table([_results(tmp_path, "a.tsv", _ANCER)], [0.5, 0.75, 1.25])
    assert _cells(table, 2) == [
        *("a*", "?", "3", "0.666", "0.000", "0.500", "0.500", "0.750", "0.750"),
        "2 of 3 (50% of coordinates)",
        "1223.33",
    ]
    assert _cells(table, 8) == ["a*", "radius", "0.666", "0.333", "0.000"]
    assert _cells(table, 9) == ["a*", "proxy radius", "0.666", "0.666", "0.333"]


def test_the_label_is_there_exactly_when_a_data_dependent_run_is(tmp_path):
    label = "per-input classifiers, not reconciled by memory"
    assert label == report.NOT_RECONCILED
    fixed = _results(tmp_path, "fixed.tsv", _ANCER.replace("\tancer", "\tfixed"))
    shared = _results(tmp_path, "shared.tsv", _ANCER.replace("\tancer", "\tshared"))
    assert label not in report.summary_table([fixed, shared], [0.0])
    for method in ("ancer", "isotropic"):
        dependent = _results(tmp_path, f"{method}.tsv", _ANCER.replace("\tancer", f"\t{method}"))
        table = report.summary_table([fixed, dependent, shared], [0.0])
        assert table.splitlines()[-1] == f"* {label}"
        names = [_cells(table, line)[0] for line in (2, 3, 4)]
        assert names == ["fixed", f"{method}*", "shared"]


def test_tables_of_others_without_a_method_are_labelled_by_what_they_hold(tmp_path):
    anisotropic = (
        "idx\tlabel\tpredict\tradius\tradius_proxy\tcorrect\tmin_sigma\ttime\n0\t3\t3\t0.5\t{}\t1\t{}\t0:00:01\n"
    )
    two = anisotropic + "1\t3\t3\t0.5\t0.5\t1\t0.25\t0:00:01\n"
    for proxy, sigma, dependent in ((0.5, 0.25, None), (0.9, 0.25, True), (0.5, 0.3, True)):
        results = _results(tmp_path, "a.tsv", two.format(proxy, sigma))
        assert results.data_dependent is dependent
        mark = "* " + report.NOT_RECONCILED if dependent else "? " + report.UNKNOWN
        assert report.summary_table([results], [0.0]).splitlines()[-1] == mark


def test_what_a_table_does_not_say_is_unknown(tmp_path):
    """Cohen's six columns may be of data-dependent noise: ANCER's l2 scripts write them, too."""
    cohen = _results(tmp_path, "cohen.tsv", _FIXED)
    assert cohen.data_dependent is None and not cohen.reconciled
    table = report.summary_table([cohen], [0.0])
    assert "| cohen? " in table and table.splitlines()[-1] == f"? {report.UNKNOWN}"
    assert report.TWO_CLAIMS not in table


def test_fixed_noise_beside_a_memory_is_another_threat_model(tmp_path):
    fixed = _results(tmp_path, "fixed.tsv", _ANCER.replace("\tancer", "\tfixed"))
    ancer, cohen = _results(tmp_path, "ancer.tsv", _ANCER), _results(tmp_path, "cohen.tsv", _FIXED)
    for other in (fixed, cohen):
        assert report.TWO_CLAIMS in report.summary_table([other, ancer], [0.0])
        assert report.TWO_CLAIMS in report.compare_proxy_radius([other, ancer], other)
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
    run = _run(tmp_path / "run", "isotropic", np.ones(3, np.float32))
    results = report.load_results(run)
    results.run.settings["certify"]["alpha"] = alpha
    table = report.summary_table([results, _results(tmp_path, "cohen.tsv", _FIXED)], [0.0])
    place = _cells(table, 0).index("all lines hold")
    assert [_cells(table, line)[place] for line in (2, 3)] == [text, "-"]


def test_leakage_that_was_not_measured_is_not_none(tmp_path):
    header, *lines = _ANCER.splitlines()
    text = "\n".join([f"{header}\tleakage\tsoft_leakage", f"{lines[0]}\t0.05\t0.2", f"{lines[1]}\tnan\tnan"])
    some = _results(tmp_path, "some.tsv", text)
    none = _results(tmp_path, "none.tsv", _ANCER)
    title, rows = report.summary([some, none], [0.0])[-1]
    assert "known to leak at most 0.1" in title
    assert rows[0] | {"ACR without leaky": "0.250", "mean": "0.050", "above 0.1": "0 of 1"} == rows[0]  # 0.5 / 2
    assert rows[0]["mean soft, held out"] == "0.200" and rows[0]["accuracy without leaky"] == "0.500"
    assert {*rows[1].values()} == {"none*", "not measured"}
    lines = report.compare_proxy_radius([some, none], none).splitlines()
    assert "without leaky thetas not measured" in lines[0] and "without leaky thetas 0.375" in lines[1]


@pytest.mark.parametrize(("at", "text"), [(2.0, "2"), (1.999996, "1.999996"), (0.1, "0.1"), (1e-7, "1e-07")])
def test_a_radius_is_never_printed_as_another_one(tmp_path, at, text):
    assert _cells(report.summary_table([_results(tmp_path, "a.tsv", _FIXED)], [at]), 6)[-1] == text


def test_runs_of_different_norms_are_not_compared_silently(tmp_path):
    both = [_run(tmp_path / norm, "isotropic", np.ones(3, np.float32), norm=norm) for norm in ("l2", "l1")]
    table = report.summary_table([report.load_results(run) for run in both], [0.0])
    assert [_cells(table, line)[1] for line in (2, 3)] == ["l2", "l1"]
    assert "different norms" in table


def test_an_unfinished_run_is_reported_from_its_shards(tmp_path):
    path = _run(tmp_path / "run", "isotropic", np.ones(3, np.float32))
    (path / "results_before_memory.tsv").unlink()
    assert report.load_results(path)["idx"].tolist() == [0, 20, 40]
    (path / "shards" / "0.npz").unlink()
    with pytest.raises(ValueError, match="there are no results yet"):
        report.load_results(path)


def test_runs_of_other_images_are_not_compared_silently(tmp_path):
    fixed, fewer = _results(tmp_path, "a.tsv", _FIXED), _results(tmp_path, "b.tsv", _FIXED.rsplit("7\t8", 1)[0])
    assert "not of the same images" in report.summary_table([fixed, fewer], [0.0])
    assert "not of the same images" not in report.summary_table([fixed, fixed], [0.0])


def test_proxy_radii_are_compared_with_the_best_fixed_run(tmp_path):
    fixed, dependent = _results(tmp_path, "fixed.tsv", _FIXED), _results(tmp_path, "ancer.tsv", _ANCER)
    lines = report.compare_proxy_radius([fixed, dependent], fixed).splitlines()
    assert lines[0].split()[:3] == ["fixed?", "0.700", "1.00"]
    assert lines[1].split()[:3] == ["ancer*", "1.750", "2.49"]
    assert lines[-2:] == [f"* {report.NOT_RECONCILED}", f"? {report.UNKNOWN}"]


def test_times_that_cannot_be_read_are_left_out(tmp_path):
    results = _results(tmp_path, "a.tsv", _FIXED.replace("0:00:04", "1 day, 0:00:04"))
    assert _cells(report.summary_table([results], [0.0]), 2)[-1] == "-"
    untimed = "\n".join(line.rpartition("\t")[0] for line in _FIXED.splitlines())
    assert _cells(report.summary_table([_results(tmp_path, "b.tsv", untimed)], [0.0]), 2)[-1] == "-"


def test_mean_proxy_radius_is_over_all_inputs(tmp_path):
    assert _results(tmp_path, "a.tsv", _ANCER).mean_proxy_radius == 1.75


def test_load_results_of_a_run_directory(tmp_path):
    path = _run(tmp_path / "my run", "isotropic", np.array([0.25, 0.5, 1.0], np.float32))
    results = report.load_results(path)
    assert results.name == "my run"
    assert results["idx"].tolist() == [0, 20, 40]
    gap = results.run.columns("gap")["gap"]
    assert gap[0] == 0 and results["radius"].tolist() == [
        float(round_down(g * t, 6)) for g, t in zip(gap, (0.25, 0.5, 1.0), strict=True)
    ]
    assert results.data_dependent
    assert not results.correct.any()
    assert _cells(report.summary_table([results], [0.0]), 2)[10] == "1 of 3 (100% of coordinates)"


def test_load_results_names_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="nowhere: there is no such run or file"):
        report.load_results(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a run directory"):
        report.load_results(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"picture\.png: cannot be read"):
        report.load_results(tmp_path / "picture.png")


@pytest.mark.parametrize("texts", [[_FIXED], [_FIXED, _ANCER], [_FIXED] * 9])
def test_plot_certified_accuracy_writes_a_png(tmp_path, texts):
    results = [_results(tmp_path, f"{i}.tsv", text) for i, text in enumerate(texts)]
    report.plot_certified_accuracy(results, tmp_path / "a.png")
    assert _size(tmp_path / "a.png") == (1500, 630)
    assert (tmp_path / "a.png").stat().st_size > 20_000


def test_plot_certified_accuracy_where_nothing_is_certified(tmp_path):
    nothing = f"{_HEADER}\n0\t3\t-1\t0.0\t0\t0:00:01\n"
    report.plot_certified_accuracy([_results(tmp_path, "a.tsv", nothing)], tmp_path / "a.png")
    assert _size(tmp_path / "a.png") == (1500, 630)


@pytest.mark.parametrize("channels", [1, 3])
def test_plot_theta_draws_the_images_that_are_found(tmp_path, channels):
    theta = np.random.default_rng(0).random((3, 4, 5, channels), np.float32)
    run = read_run(_run(tmp_path / "run", "ancer", theta, channels=channels))
    images = _dataset(run, [0, 40, 99], channels)
    assert report.plot_theta(run, images, tmp_path / "two.png")
    assert report.plot_theta(run, images, tmp_path / "one.png", columns=1)
    (wide, height), (narrow, _) = _size(tmp_path / "two.png"), _size(tmp_path / "one.png")
    assert (wide, narrow, height) == (630, 390, 570)


@pytest.mark.parametrize(("largest", "far", "middle"), [(1.0, False, 0.6), (20.0, True, 2.0)])
def test_colours_of_thetas_that_are_far_apart_go_by_logarithms(largest, far, middle):
    scale, logarithmic = plots.color_scale([np.array([[0.2]]), np.array([[largest]])])
    assert logarithmic is far
    np.testing.assert_allclose(scale([0.2, middle, largest]), [0, 0.5, 1])
    assert plots.heat_map(np.full((2, 3), middle), scale).shape == (2, 3, 3)


def test_plot_theta_draws_nothing_without_maps_or_images(tmp_path):
    isotropic = read_run(_run(tmp_path / "isotropic", "isotropic", np.ones(3, np.float32)))
    assert report.plot_theta(isotropic, _dataset(isotropic, [0, 20, 40]), tmp_path / "a.png") is False
    ancer = read_run(_run(tmp_path / "ancer", "ancer", np.ones((3, 4, 5, 1), np.float32)))
    assert report.plot_theta(ancer, _dataset(ancer, [7]), tmp_path / "a.png") is False
    first = _dataset(ancer, [0, 20, 40])
    _dataset(ancer, [0, 20])
    assert report.plot_theta(ancer, first, tmp_path / "a.png") is False
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({}, np.inf),
        ({"isotropic": {"theta_max": 1.2}}, np.float32(1.2)),
        ({"isotropic": {"theta_max": 9.0}, "anisotropic": {"theta_max": 1.5}}, 1.5),
        ({"isotropic": {"theta_max": 1.2001}, "exact": True}, np.float32(612 / 510)),
        ({"anisotropic": {"theta_max": 1.2}, "exact": True, "period": 5040}, np.float32(560 / 510)),
    ],
)
def test_the_bound_of_theta_is_one_in_table_and_picture(settings, bound):
    """Exact runs round it down, as they do their thetas."""
    assert results.theta_bound(settings) == bound
    assert plots.theta_bound is results.theta_bound
