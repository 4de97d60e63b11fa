"""Carried runs: the certificates that `carry` gives, in directories that check themselves like any other."""

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ancer_jax as aj
from ancer_jax import report
from ancer_jax.basis import Cosine
from ancer_jax.data import Dataset, take
from ancer_jax.runs import read_run
from ancer_jax.runs.carry import _AtPrecision
from ancer_jax.smoothing.classifier import fingerprint
from tests import reference
from tests.toy import BUMPS, CLASSIFIER, CONFIG, CROWD, DATASET, WILD, D, bumps, product, untimed

pytestmark = pytest.mark.usefixtures("quick_compilation")

CHANGED = reference.linear(np.linspace(-1, 1.5, D), b=-1.05)
BOTH = (CLASSIFIER, CHANGED)
CARRY = aj.CarryRunConfig(n=400, alpha=0.002, seed=7)
ONE = aj.Execution(devices=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run, and the one that was carried from it."""
    folder = tmp_path_factory.mktemp("runs")
    aj.certify_dataset(CLASSIFIER, DATASET, CONFIG, out=folder / "before", execution=ONE)
    aj.carry_run(folder / "before", BOTH, DATASET, CARRY, out=folder / "carried", execution=ONE)
    return folder


def carried(folder, classifiers=BOTH, dataset=DATASET, config=CARRY, out="new", **execution):
    """Carry the run `before` in a folder to another directory: the new run."""
    aj.carry_run(folder / "before", classifiers, dataset, config, out=folder / out, execution=aj.Execution(**execution))
    return read_run(folder / out)


def assert_carried_one_by_one(folder, run, smoothed, dataset=DATASET, changed=CHANGED, certificates=None):
    """That each line is what `carry` makes of the certificate of the run before."""
    columns = run.columns("predictions", "gap", "p_lower", "counts", "n", "theta")
    old = read_run(folder / "before").columns("predictions", "gap", "p_lower", "counts", "n", "theta")
    np.testing.assert_array_equal(columns["theta"], old["theta"])
    assert (columns["predictions"] != aj.ABSTAIN).any()
    for row, (i, x) in enumerate(zip(dataset.ids, dataset.images, strict=True)):
        one = {name: column[row] for name, column in old.items()}
        region = smoothed.noise.region(x, one["theta"], one["gap"])
        certificate = aj.Certificate(one["predictions"], region, one["p_lower"], one["counts"], one["n"], 0.001)
        key = jax.random.fold_in(jax.random.key(CARRY.seed, impl="threefry2x32"), int(i))
        config = aj.CarryConfig(CARRY.n, CARRY.alpha)
        expected = aj.carry(key, certificate, smoothed.with_theta(one["theta"]), changed, config=config)
        found = [columns[name][row] for name in ("predictions", "p_lower", "gap", "counts", "n")]
        assert found == [expected.prediction, expected.p_lower, expected.gap, expected.count, expected.n]


def test_a_line_is_what_carry_gives_for_that_image(finished):
    run = read_run(finished / "carried")
    assert_carried_one_by_one(finished, run, aj.Smoothed(CLASSIFIER, aj.Gaussian(), 0.3))
    columns = run.columns("lost_votes", "lost_draws", "draws", "labels")
    assert columns["lost_votes"].sum() > 0
    assert set(columns["lost_draws"]) == {0, 400}  # one of the images abstains
    assert columns["draws"].tolist() == (2 * columns["lost_draws"]).tolist()
    assert columns["labels"].tolist() == DATASET.labels.tolist()


def test_settings_name_both_networks_the_run_and_the_draws(finished):
    before, run = read_run(finished / "before"), read_run(finished / "carried")
    x = DATASET.images[0]
    how = {"n": 400, "alpha": 0.002, "seed": 7, "precision": "default", "run": before.settings_hash}
    of_changed = {"classifier": fingerprint(CHANGED, x), "carried": how | {"classifier": fingerprint(CLASSIFIER, x)}}
    assert run.settings == {**before.settings, **of_changed}
    assert run.config == before.config and run.carried == aj.CarryConfig(400, 0.002)
    assert before.carried is None


def test_by_default_alpha_is_a_tenth_of_that_of_the_run(finished):
    run = carried(finished, config=aj.CarryRunConfig(n=100), out="tenth", devices=1)
    assert run.carried == aj.CarryConfig(100, 0.0001)


def test_other_runs_are_written_as_before(finished):
    with np.load(next((finished / "before" / "shards").iterdir())) as shard:
        assert not [name for name in shard.files if "lost" in name]


@pytest.mark.parametrize("execution", [{"batch_size": 1, "devices": 1}, {"chunk": 70}, {"batch_size": 2, "devices": 2}])
def test_a_stopped_run_continues_to_the_same_table(finished, tmp_path, execution):
    shutil.copytree(finished / "before", tmp_path / "before")
    run = carried(tmp_path, dataset=take(DATASET, [1, 2]), **execution)
    first = {file.name: file.read_bytes() for file in run.files()}
    run = carried(tmp_path, **execution)
    tables = [untimed((path / "results.tsv").read_text()) for path in (run.path, finished / "carried")]
    assert tables[0] == tables[1]
    assert first.items() <= {file.name: file.read_bytes() for file in run.files()}.items()
    done = []
    carried(tmp_path, progress=lambda stage, images: done.append((stage, images)))
    assert done == [("certified", 5)]


@pytest.mark.parametrize(
    ("noise", "settings"),
    [
        (aj.Uniform(), {"norm": "l1"}),
        (aj.Splitting(), {"norm": "l1", "noise": "splitting"}),
        (aj.Gaussian(), {"sampling": aj.SequentialConfig(radii=(0.1, 0.2))}),
        (aj.Gaussian(Cosine()), {"method": "universal", "basis": Cosine()}),
    ],
)
def test_runs_of_every_kind_are_carried(tmp_path, noise, settings):
    config = aj.RunConfig(**{"method": "fixed", "theta": 0.4, "certify": aj.CertifyConfig(n0=20, n=500)} | settings)
    theta_map = np.linspace(0.2, 0.5, D, dtype=np.float32).reshape(3, 3, 1) if "basis" in settings else None
    aj.certify_dataset(CLASSIFIER, DATASET, config, out=tmp_path / "before", theta_map=theta_map, execution=ONE)
    run = carried(tmp_path, devices=1)
    assert_carried_one_by_one(tmp_path, run, aj.Smoothed(CLASSIFIER, noise, 0.4))


CHANGED_BUMPS = aj.from_function(lambda variables, x: bumps(variables, x + 0.004), BUMPS.variables, num_classes=2)


@pytest.fixture(scope="module")
def with_memory(tmp_path_factory):
    """A data-dependent run, and the one that was carried from it."""
    folder = tmp_path_factory.mktemp("memory")
    aj.certify_dataset(BUMPS, CROWD, WILD, out=folder / "before", execution=ONE)
    carried(folder, (BUMPS, CHANGED_BUMPS), CROWD, out="carried", devices=1)
    return folder


def test_data_dependent_runs_get_a_memory_of_their_own(with_memory):
    run = read_run(with_memory / "carried")
    smoothed = aj.Smoothed(BUMPS, aj.Gaussian(), 0.1)
    assert_carried_one_by_one(with_memory, run, smoothed, CROWD, CHANGED_BUMPS)
    columns = run.columns("predictions", "gap", "theta", "p_lower", "counts", "n")
    region = aj.Region(CROWD.images, columns["theta"], columns["gap"], 2)
    rest = (columns[name] for name in ("p_lower", "counts", "n", "n"))
    memory, answers = aj.Memory.empty(2).insert_batch(aj.Certificate(columns["predictions"], region, *rest))
    stored, before = (aj.load_memory(with_memory / name) for name in ("carried", "before"))
    jax.tree.map(np.testing.assert_array_equal, stored.regions, memory.regions)
    assert not np.array_equal(stored.regions.gap, before.regions.gap)
    results = report.load_results(with_memory / "carried")
    assert results["predict"].tolist() == answers.prediction.tolist()
    assert results["gap"].tolist() == answers.gap.tolist()


def test_an_image_that_has_changed_since_it_was_certified_is_refused(with_memory):
    """As pictures in a folder may: they are known by their names and sizes."""
    changed = dataclasses.replace(
        CROWD, images=np.where(CROWD.ids[:, None, None, None] == CROWD.ids[3], 0.5, CROWD.images)
    )
    object.__setattr__(changed, "fingerprint", CROWD.fingerprint)
    with pytest.raises(ValueError, match=f"image {CROWD.ids[3]} is no longer the one that was certified"):
        carried(with_memory, (BUMPS, CHANGED_BUMPS), changed, out="changed")


def test_leakage_under_the_changed_network_is_not_known(with_memory):
    before, after = (report.load_results(with_memory / name) for name in ("before", "carried"))
    assert before.leakages() and before.leaks_at_most(0.1) is not None
    assert not after.leakages() and not after.leakages("soft_leakage") and after.leaks_at_most(0.1) is None
    assert "not measured" in report.summary_table([after], [0.1])


def test_memory_can_be_left_out(with_memory):
    run = carried(with_memory, (BUMPS, CHANGED_BUMPS), CROWD, dataclasses.replace(CARRY, memory=False), "without")
    assert not (run.path / "results.tsv").exists() and (run.path / "results_before_memory.tsv").exists()


def test_reports_say_that_a_run_was_carried_and_with_which_alpha(finished):
    results = report.load_results(finished / "carried")
    assert results.alpha == report.results.decimal(0.001) + report.results.decimal(0.002)
    assert tuple(results.passes) == (4 / 5 * 800, 0, 0)
    text = report.summary_table([results], [0.1])
    assert "Carried from certificates of another network: carried (400 common draws, alpha = 0.001 + 0.002)." in text
    assert "p >= 0.9850" in text  # 1 - 5 * 0.003
    report.write_page([results], finished / "page.html", radii=[0.1])
    page = (finished / "page.html").read_text()
    assert "alpha = 0.001 + 0.002" in page and "carried.classifier" in page
    assert "Carried from" not in report.summary_table([report.load_results(finished / "before")], [0.1])


def rewritten(file, **changes):
    """Change arrays of a shard."""
    with np.load(file) as shard:
        np.savez(file, **({name: shard[name] for name in shard.files} | changes))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lost_votes", lambda lost: np.maximum(lost - 1, 0)),
        ("lost_votes", lambda lost: lost - 1),
        ("lost_draws", lambda draws: 2 * draws),
        ("lost_draws", lambda draws: 0 * draws),
        ("gap", lambda gap: 1.001 * gap),
        ("p_lower", lambda p_lower: p_lower + 1e-5),
        ("bound_votes", lambda votes: votes + 1),
    ],
)
def test_a_shard_whose_gaps_do_not_follow_is_refused(finished, tmp_path, name, change):
    shutil.copytree(finished / "carried", tmp_path / "run")
    file = read_run(tmp_path / "run").files()[0]
    with np.load(file) as shard:
        changed = change(shard[name])
    rewritten(file, **{name: changed})
    with pytest.raises(ValueError, match="its gaps do not follow from its counts"):
        read_run(tmp_path / "run").results()


def test_a_shard_of_the_run_before_that_was_changed_is_not_carried(finished, tmp_path):
    shutil.copytree(finished / "before", tmp_path / "before")
    file = read_run(tmp_path / "before").files()[0]
    with np.load(file) as shard:
        gap = shard["gap"]
    rewritten(file, gap=gap * 1.001)
    with pytest.raises(ValueError, match="its gaps do not follow from its counts"):
        carried(tmp_path)


def other_images():
    images = DATASET.images.copy()
    images[0, 0, 0] = 1 - images[0, 0, 0]
    return Dataset(DATASET.name, DATASET.ids, images, DATASET.labels, 2)


HOSTED = aj.from_host(lambda x: np.asarray(x).reshape(len(x), -1)[:, :2], num_classes=2)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("not a run of this classifier.*classifier is", {"classifiers": (CHANGED, CLASSIFIER)}),
        ("is a run of other data than points", {"dataset": other_images()}),
        ("3 classes instead of 2", {"classifiers": (CLASSIFIER, reference.constant([0.0, 1.0, 2.0]))}),
        ("does not work on inputs", {"classifiers": (CLASSIFIER, reference.linear(np.ones(D + 1)))}),
    ],
)
def test_what_is_not_of_the_run_is_refused(finished, message, change):
    with pytest.raises(ValueError, match=message):
        carried(finished, out="refused", **change)
    assert not (finished / "refused").exists()


def test_other_settings_need_another_directory(finished):
    for change in ({"n": 300}, {"seed": 8}, {"alpha": 0.001}, {"precision": "highest"}):
        with pytest.raises(ValueError, match=rf"other settings .*{next(iter(change))} is"):
            carried(finished, config=dataclasses.replace(CARRY, **change), out="carried")
    with pytest.raises(ValueError, match="other settings"):
        carried(finished, out="before")
    with pytest.raises(ValueError, match="other settings"):
        aj.certify_dataset(CHANGED, DATASET, CONFIG, out=finished / "carried", execution=ONE)


def test_another_platform_is_refused(finished, monkeypatch):
    described = {"platform": "gpu, H100"}
    real = aj.runs.carry.describe_run
    monkeypatch.setattr("ancer_jax.runs.carry.describe_run", lambda *arguments: real(*arguments) | described)
    with pytest.raises(ValueError, match="platform is cpu there, gpu, H100 here"):
        carried(finished, out="refused")


def test_a_carried_run_is_not_carried_on(finished):
    with pytest.raises(ValueError, match="was itself carried"):
        aj.carry_run(finished / "carried", BOTH, DATASET, CARRY, out=finished / "refused")


def test_an_unfinished_run_is_carried_as_far_as_it_goes(tmp_path):
    aj.certify_dataset(CLASSIFIER, take(DATASET, [0, 1]), CONFIG, out=tmp_path / "before", execution=ONE)
    with pytest.raises(ValueError, match="no certificates of 3 of 5 images, like 8"):
        carried(tmp_path)
    assert carried(tmp_path, dataset=take(DATASET, [1]), devices=1).done() == {5}


def test_exact_certificates_are_refused(tmp_path):
    config = aj.RunConfig(norm="l1", noise="splitting", exact=True, theta=0.2)
    images = aj.dataset_from_arrays((255 * DATASET.images[:2]).astype(np.uint8), DATASET.labels[:2])
    aj.certify_dataset(CLASSIFIER, images, config, out=tmp_path / "before", execution=ONE)
    with pytest.raises(ValueError, match="exact certificates, which need all draws"):
        carried(tmp_path, dataset=images)


@pytest.mark.filterwarnings("ignore:the classifier calls code on the host")
def test_classifiers_outside_of_jax(tmp_path):
    hosted = dataclasses.replace(HOSTED, apply=dataclasses.replace(HOSTED.apply, digest="a"))
    jax_twin = aj.from_function(lambda variables, x: x.reshape(len(x), -1)[:, :2], (), num_classes=2)
    aj.certify_dataset(hosted, DATASET, CONFIG, out=tmp_path / "before", execution=ONE)
    runs = [carried(tmp_path, (hosted, one), out=name) for one, name in ((CHANGED, "jax"), (jax_twin, "same"))]
    assert runs[0].columns("lost_votes")["lost_votes"].sum() > runs[1].columns("lost_votes")["lost_votes"].sum() == 0
    other = dataclasses.replace(HOSTED, apply=dataclasses.replace(HOSTED.apply, digest="b"))
    with pytest.raises(ValueError, match="classifier is"):
        carried(tmp_path, (other, CHANGED))
    carried(tmp_path, (hosted, HOSTED), dataset=take(DATASET, [0]), out="unknown")
    with pytest.raises(ValueError, match="cannot be continued"):
        carried(tmp_path, (hosted, HOSTED), out="unknown")
    aj.certify_dataset(HOSTED, DATASET, CONFIG, out=tmp_path / "unknown-before", execution=ONE)
    with pytest.raises(ValueError, match="no hash"):
        aj.carry_run(tmp_path / "unknown-before", (HOSTED, CHANGED), DATASET, out=tmp_path / "new")


def test_each_network_is_computed_with_its_own_precision(tmp_path):
    weights = np.random.default_rng(0).normal(size=(D, 2)).astype(np.float32)
    network = aj.from_function(product, weights, num_classes=2)
    config = dataclasses.replace(CONFIG, precision="highest")
    aj.certify_dataset(network, DATASET, config, out=tmp_path / "before", execution=ONE)
    run = carried(tmp_path, (network, network), devices=1)
    assert run.settings["carried"]["precision"] == "highest" and run.settings["precision"] == "default"
    assert run.settings["carried"]["classifier"] != run.settings["classifier"]
    assert run.columns("lost_votes")["lost_votes"].sum() == 0  # CPUs know one precision
    again = carried(tmp_path, (network, network), config=dataclasses.replace(CARRY, precision="high"), out="high")
    assert again.settings["precision"] == "high"


@pytest.mark.parametrize("outer", [None, "high"])
def test_a_network_keeps_its_precision_whatever_that_around_it_is(outer):
    def both(x):
        usual, own = (_AtPrecision(product, precision) for precision in (None, "highest"))
        return usual(jnp.ones((D, 2)), x), own(jnp.ones((D, 2)), x), product(jnp.ones((D, 2)), x)

    with jax.default_matmul_precision(outer):
        program = str(jax.make_jaxpr(both)(jnp.ones((4, D))))
    found = re.findall(r"precision=(\w+|\(.*?\))", program)
    highest = "(Precision.HIGHEST, Precision.HIGHEST)"  # the usual one is not printed
    assert found == [highest, *([highest.replace("HIGHEST", "HIGH")] if outer else [])]


@pytest.mark.parametrize("settings", [{"n": 0}, {"alpha": 0.0}, {"seed": -1}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        aj.CarryRunConfig(**settings)
