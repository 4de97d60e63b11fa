"""A run as a whole: what is stored of an image is its certificate, however the run was carried out."""

import contextlib
import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancer_jax import (
    CertifyConfig,
    Execution,
    Gaussian,
    LeakageConfig,
    Memory,
    Region,
    RunConfig,
    SequentialConfig,
    Smoothed,
    certify,
    certify_dataset,
    certify_sequentially,
    from_function,
    load_memory,
    report,
    save_memory,
)
from ancer_jax.basis import Cosine
from ancer_jax.data import Dataset, take
from ancer_jax.metrics import round_down
from ancer_jax.runs import votes
from ancer_jax.runs.directory import read_run
from ancer_jax.runs.table import parse_table
from ancer_jax.search import ThetaMap
from ancer_jax.search.leakage import LeakageCounts, leakage, make_probes, soft_leakage
from ancer_jax.smoothing import ABSTAIN
from ancer_jax.smoothing.certify import Certificate, count_votes
from ancer_jax.smoothing.registry import NOISES
from tests import reference
from tests.toy import (
    BUMPS,
    CLASSIFIER,
    CONFIG,
    CROWD,
    DATASET,
    SEARCH,
    WILD,
    Coins,
    D,
    coin,
    product,
    run,
    tables,
    untimed,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The usual run."""
    return run(tmp_path_factory.mktemp("usual") / "run")


def test_a_line_is_what_certify_gives_for_that_image(rows):
    for i, x, count, gap in zip(DATASET.ids, DATASET.images, rows["counts"], rows["gap"], strict=True):
        key = jax.random.fold_in(jax.random.key(0), int(i))
        one = certify(key, Smoothed(CLASSIFIER, Gaussian(), np.float32(0.3)), x, config=CONFIG.certify)
        assert (one.count, one.gap) == (count, gap)


@pytest.mark.parametrize(
    "execution",
    [
        {"batch_size": 4, "chunk": 100, "devices": 4},
        {"batch_size": 1},
        {"batch_size": 7, "chunk": 64},
        {"chunk": 501, "devices": 1},
        {"shard": "draws", "batch_size": 2, "devices": 3},
        {"devices": 2},
        {"devices": 8},
        {"shard": "draws", "devices": 1},
        {"shard": "draws", "devices": 8},
        {"chunk": 7, "devices": 3},  # the draws of the selection take several work items, too
    ],
    ids=str,
)
def test_execution_changes_no_count(tmp_path, rows, execution):
    found = run(tmp_path / "run", **execution)
    for name in rows:
        np.testing.assert_array_equal(found[name], rows[name])


def test_other_images_beside_it_change_no_count(tmp_path, rows):
    found = run(tmp_path / "run", dataset=take(DATASET, [1, 4]))
    np.testing.assert_array_equal(found["counts"], rows["counts"][[1, 4]])


@pytest.mark.usefixtures("as_on_accelerators")
@pytest.mark.parametrize("method", [pytest.param("isotropic", marks=pytest.mark.slow), "ancer"])
def test_searched_thetas_agree_between_execution_plans(tmp_path, method):
    settings = {"certify": CertifyConfig(n0=20, n=500), "guard": "off", "leakage": None, **SEARCH}
    config = RunConfig(method=method, theta=0.3, **settings)
    plans = [{"batch_size": 2, "devices": 1}, {"devices": 8}]
    plans += [{"devices": 2, "shard": "draws"}] if method == "ancer" else [{"batch_size": 4, "devices": 4}]
    first, *others = (run(tmp_path / str(i), config, **plan) for i, plan in enumerate(plans))
    for other in others:
        np.testing.assert_allclose(other["theta"], first["theta"], rtol=1e-5)
    assert first["theta"].shape == ((5,) if method == "isotropic" else (5, 3, 3, 1))
    assert (first["theta"] != np.float32(0.3)).any()


def test_another_seed_draws_other_noise(tmp_path, rows):
    other = RunConfig(theta=0.3, certify=CONFIG.certify, seed=1)
    assert (rows["counts"] != run(tmp_path / "run", other)["counts"]).any()


def test_the_universal_theta_is_that_of_every_image(tmp_path):
    universal, theta_map = dataclasses.replace(CONFIG, method="universal"), np.linspace(0.1, 0.5, D).reshape(3, 3, 1)
    smoothed = Smoothed(CLASSIFIER, Gaussian(), np.float32(theta_map))
    certify_dataset(
        CLASSIFIER, DATASET, universal, out=tmp_path, theta_map=theta_map, execution=Execution(batch_size=2)
    )
    columns = read_run(tmp_path).columns("gap", "theta", "counts")
    np.testing.assert_array_equal(columns["theta"], np.float32(np.repeat(theta_map[None], 5, axis=0)))
    for i, x, gap in zip(DATASET.ids, DATASET.images, columns["gap"], strict=True):
        key = jax.random.fold_in(jax.random.key(0), int(i))
        assert certify(key, smoothed, x, config=CONFIG.certify).gap == gap
    assert not (tmp_path / "memory.npz").exists()  # there is one smoothed classifier: nothing to reconcile
    lines = parse_table((tmp_path / "results.tsv").read_text(), tmp_path)
    assert (lines["method"] == "universal").all() and np.isnan(lines["leakage"].astype(float)).all()
    assert (lines["radius_proxy"] > lines["radius"]).any()
    with pytest.raises(ValueError, match=r"other settings \(theta_map is "):
        certify_dataset(CLASSIFIER, DATASET, universal, out=tmp_path, theta_map=theta_map / 2)


def test_a_theta_map_must_be_in_the_basis_of_the_noise(tmp_path):
    universal, theta_map = dataclasses.replace(CONFIG, method="universal"), ThetaMap(np.full((3, 3, 1), 0.3), Cosine())
    with pytest.raises(ValueError, match=r"theta_map is in the basis Cosine\(\), the noise of the config in Pixels"):
        certify_dataset(CLASSIFIER, DATASET, universal, out=tmp_path, theta_map=theta_map)
    unequal = np.linspace(0.01, 0.4, D).reshape(3, 3, 1)
    with pytest.raises(ValueError, match="thetas may differ by a factor of 32 at most"):
        in_cosine = dataclasses.replace(universal, basis=Cosine())
        certify_dataset(CLASSIFIER, DATASET, in_cosine, out=tmp_path, theta_map=unequal)
    certify_dataset(
        CLASSIFIER, DATASET, dataclasses.replace(universal, basis=Cosine()), out=tmp_path, theta_map=theta_map
    )
    assert read_run(tmp_path).config.basis == Cosine()


@pytest.mark.parametrize(
    ("method", "theta_map", "text"),
    [
        ("universal", None, "method universal needs theta_map, one theta for each coefficient"),
        ("fixed", np.ones((3, 3, 1)), "is for method universal, got method fixed"),
        ("universal", np.ones((3, 3)), r"theta_map must be \[3, 3, 1\] as the images are, got \[3, 3\]"),
        ("universal", np.zeros((3, 3, 1)), "theta of a map must be positive and finite, got 0.0 to 0.0"),
        ("universal", np.full((3, 3, 1), np.inf), "theta of a map must be positive and finite, got inf to inf"),
    ],
)
def test_a_theta_map_that_does_not_fit_is_refused(tmp_path, method, theta_map, text):
    with pytest.raises(ValueError, match=text):
        certify_dataset(
            CLASSIFIER, DATASET, dataclasses.replace(CONFIG, method=method), out=tmp_path / "a", theta_map=theta_map
        )
    assert not (tmp_path / "a").exists()


def test_images_that_the_basis_is_not_of_are_refused_before_there_is_a_run(tmp_path):
    two_channels = dataclasses.replace(DATASET, images=np.repeat(DATASET.images, 2, axis=-1))
    config = dataclasses.replace(CONFIG, method="fixed", basis=Cosine())
    with pytest.raises(ValueError, match="the cosine basis is of images"):
        certify_dataset(CLASSIFIER, two_channels, config, out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("execution", "text"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"chunk": 0}, "chunk"),
        ({"devices": 9}, r"devices must be in 1\.\.8"),
        ({"devices": 0}, "devices"),
    ],
)
def test_execution_out_of_range_is_refused(tmp_path, execution, text):
    with pytest.raises(ValueError, match=text):
        run(tmp_path / "run", **execution)


def test_a_classifier_with_too_few_classes_is_refused(tmp_path):
    three = Dataset("three", DATASET.ids, DATASET.images, np.array([0, 1, 2, 0, 1]), 3)
    with pytest.raises(ValueError, match="three has 3 classes, the classifier only 2"):
        run(tmp_path / "run", dataset=three)


ONE_EACH = Execution(batch_size=jax.device_count())  # one program for any number of images: thetas to the last digit


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    path = tmp_path_factory.mktemp("crowd") / "run"
    certify_dataset(BUMPS, CROWD, WILD, out=path, execution=ONE_EACH)
    return path


def test_the_table_after_memory_is_what_inserting_one_by_one_gives(crowd):
    before, after = (parse_table(text, crowd) for text in tables(crowd))
    columns = read_run(crowd).columns("theta", "gap", "predictions")
    memory = Memory.empty(2)
    for row, x in enumerate(CROWD.images):
        region = Region(x, columns["theta"][row], columns["gap"][row], 2)
        memory, answer = memory.insert(Certificate(columns["predictions"][row], region, 1.0, 0, 0, 0.001))
        assert after["predict"][row] == answer.prediction
        assert after["gap"][row] == float(round_down(answer.gap, 6))
        assert after["radius"][row] == float(round_down(answer.radius, 6))
        assert after["radius_proxy"][row] == float(round_down(answer.proxy_radius, 6))
        assert after["changed"][row] == answer.changed
        assert after["answered_by"][row] == answer.inside
    assert 0 < after["changed"].sum() < len(CROWD)
    assert (after["gap"] <= before["gap"]).all()
    assert (after["correct"] == (after["predict"] == CROWD.labels)).all()
    assert (after["p_lower"] == before["p_lower"]).all()


def test_a_changed_class_has_the_leakage_of_the_theta_that_answered(crowd):
    before, after = (parse_table(text, crowd) for text in tables(crowd))
    overruled = after["predict"] != before["predict"]
    assert overruled.any()
    for row in np.flatnonzero(overruled):
        assert after["leakage"][row] == after["leakage"][int(after["answered_by"][row])]
    np.testing.assert_array_equal(after["leakage"][~overruled], before["leakage"][~overruled])


def test_the_memory_of_a_run_serves(crowd):
    memory = load_memory(crowd)
    after = parse_table(tables(crowd)[1], crowd)
    assert [memory.classify(x, lambda x: 99) for x in CROWD.images] == after["predict"].tolist()
    assert memory.classify(np.full((3, 3, 1), 1e6), lambda x: 99) == 99


@pytest.mark.parametrize("first", [[0, 1, 2, 3, 4], [1, 4, 8, 11]])
def test_images_may_come_later(crowd, tmp_path, first):
    """In id order the memory continues; where ids come in between, it starts again, and says so: either way the same
    tables.
    """
    certify_dataset(BUMPS, take(CROWD, first), WILD, out=tmp_path / "run", execution=ONE_EACH)
    assert len(tables(tmp_path / "run")[1].splitlines()) == 1 + len(first)
    renamed = pytest.warns(UserWarning, match=r"renamed to memory_replaced_1\.npz")
    with contextlib.nullcontext() if first[:2] == [0, 1] else renamed:
        certify_dataset(BUMPS, CROWD, WILD, out=tmp_path / "run", execution=ONE_EACH)
    for text, expected in zip(tables(tmp_path / "run"), tables(crowd), strict=True):
        assert untimed(text) == untimed(expected)


@pytest.mark.parametrize("damage", ["truncate", "foreign", "delete"])
def test_a_lost_memory_is_made_again(crowd, tmp_path, damage):
    run = shutil.copytree(crowd, tmp_path / "run")
    file = run / "memory.npz"
    content = file.read_bytes()
    if damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "foreign":
        save_memory(Memory.empty(2), file)
    else:
        file.unlink()
    assert read_run(run).results()[1] is None
    with contextlib.nullcontext() if damage == "delete" else pytest.warns(UserWarning, match="was renamed"):
        certify_dataset(BUMPS, CROWD, WILD, out=run)
    assert tables(run) == tables(crowd)
    assert load_memory(run).regions.gap.tolist() == load_memory(crowd).regions.gap.tolist()


def test_answers_that_were_added_by_hand_are_kept(crowd, tmp_path):
    run = shutil.copytree(crowd, tmp_path / "run")
    far = Certificate(1, Region(np.full((3, 3, 1), 9.0), 1.0, 0.0, 2), 0.5, 0, 0, 0.001)
    more, _ = load_memory(run).insert(far)
    for name in ("memory_replaced_1.npz", "memory_replaced_2.npz"):
        save_memory(more, run / "memory.npz")
        with pytest.warns(UserWarning, match=f"renamed to {name}"):
            certify_dataset(BUMPS, CROWD, WILD, out=run)
        assert len(load_memory(run / name)) == 13
    assert tables(run) == tables(crowd)


def test_a_memory_of_certificates_that_were_made_again_is_not_used(crowd, tmp_path):
    """A shard that was deleted and computed again (elsewhere, say) may hold another theta."""
    run = shutil.copytree(crowd, tmp_path / "run")
    shard = next((run / "shards").iterdir())
    with np.load(shard) as arrays:
        changed = dict(arrays)
    changed["theta"] = changed["theta"] * np.float32(3)
    np.savez(shard, **changed)
    assert read_run(run).results()[1] is None and read_run(run).read_memory() is None


def test_a_memory_is_not_taken_for_that_of_inputs_that_came_while_it_was_made(crowd, tmp_path):
    """By another process that certifies other images of the run, say."""
    first, run = (shutil.copytree(crowd, tmp_path / name) for name in ("first", "run"))
    for path in (first, run):
        (path / "memory.npz").unlink()
    lowest = min((run / "shards").iterdir(), key=lambda file: int(file.stem))
    lowest.unlink()
    ids = np.concatenate([np.load(file)["ids"] for file in (run / "shards").iterdir()])
    rest = take(CROWD, np.flatnonzero(np.isin(CROWD.ids, ids)))

    def come(stage, images):
        if stage == "remembered":
            shutil.copy(first / "shards" / lowest.name, lowest)

    certify_dataset(BUMPS, rest, WILD, out=run, execution=Execution(progress=come))
    assert lowest.exists() and (run / "memory.npz").exists() and read_run(run).read_memory() is None


@pytest.mark.parametrize(
    "change",
    [
        {"gap": lambda a: a["gap"] * 10},
        {"gap": lambda a: a["gap"] * -1},
        {"prediction": lambda a: a["prediction"] + 5},
        {"prediction": lambda a: np.full_like(a["prediction"], ABSTAIN)},
        {"inside": lambda a: a["ids"]},
        {"inside": lambda a: a["ids"] + 1},
    ],
    ids=["larger", "negative", "another class", "abstentions with a gap", "inside itself", "inside a later one"],
)
def test_a_memory_that_says_more_than_the_certificates_is_not_believed(crowd, tmp_path, change):
    run = shutil.copytree(crowd, tmp_path / "run")
    with np.load(run / "memory.npz") as arrays:
        stored = dict(arrays)
    np.savez(run / "memory.npz", **stored | {name: value(stored) for name, value in change.items()})
    with pytest.raises(ValueError, match=r"memory\.npz: not a memory of this run's certificates; delete it"):
        read_run(run).results()


def test_a_memory_with_a_flipped_bit_is_made_again(crowd, tmp_path):
    run = shutil.copytree(crowd, tmp_path / "run")
    content = bytearray((run / "memory.npz").read_bytes())
    content[content.find(CROWD.images[0].tobytes()[:16]) + 5] ^= 1
    (run / "memory.npz").write_bytes(bytes(content))
    with pytest.raises(ValueError, match="not a memory that can be read"):
        load_memory(run)
    with pytest.warns(UserWarning, match="was renamed"):
        certify_dataset(BUMPS, CROWD, WILD, out=run)
    assert load_memory(run).regions.center.tolist() == CROWD.images.tolist()


def test_a_stale_table_after_memory_does_not_stay(crowd, tmp_path):
    config = dataclasses.replace(WILD, leakage=None)
    certify_dataset(BUMPS, take(CROWD, [0, 1]), config, out=tmp_path / "run")
    certify_dataset(BUMPS, CROWD, dataclasses.replace(config, memory=False), out=tmp_path / "run")
    assert not (tmp_path / "run" / "results.tsv").exists()
    assert len((tmp_path / "run" / "results_before_memory.tsv").read_text().splitlines()) == 13


def test_of_fixed_noise_there_is_no_memory_and_no_leakage(tmp_path):
    certify_dataset(CLASSIFIER, DATASET, CONFIG, out=tmp_path / "run")
    assert not (tmp_path / "run" / "results_before_memory.tsv").exists()
    leakage = parse_table((tmp_path / "run" / "results.tsv").read_text(), "run")["leakage"]
    assert np.isnan(leakage.astype(float)).all()


def test_leakage_in_the_table_is_what_the_measure_gives(crowd):
    """The run's seed chooses the images from the whole data set; their draws come from their own keys."""
    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice(12, 8, replace=False))
    others = np.sort(rng.choice(np.setdiff1d(np.arange(12), rows), 4, replace=False))
    names = [f"leakage_{name}" for name in LeakageCounts._fields]
    columns = read_run(crowd).columns("theta", "predictions", *names)
    of = CROWD.images, columns["theta"], columns["predictions"].astype(np.int32)
    smoothed = Smoothed(BUMPS, Gaussian(), np.float32(0.1))

    def probes(rows):
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(CROWD.ids[rows].astype(np.uint32))
        return make_probes(keys, smoothed, CROWD.images[rows], num_samples=8, chunk=8)

    def hard(probes, x, theta, prediction):
        return leakage(probes, smoothed.with_theta(theta), x, prediction, chunk=8)

    def soft(probes, x, theta, prediction):
        return soft_leakage(probes, smoothed.with_theta(theta), x, prediction, num_samples=1, chunk=8)

    answered = columns["predictions"] >= 0
    for measure, of_rows, counted in ((hard, rows, names[:2]), (soft, others, names[2:])):
        measured = jax.jit(jax.vmap(functools.partial(measure, probes(of_rows))))(*of)
        for values, name in zip(measured, counted, strict=True):
            np.testing.assert_array_equal(columns[name][answered], np.asarray(values)[answered])
    assert columns["leakage_num_leaked"].any() and columns["leakage_votes"].any()


def test_a_leakage_limit_holds(tmp_path):
    limited = dataclasses.replace(WILD, leakage_limit=0.1)
    certify_dataset(BUMPS, CROWD, limited, out=tmp_path / "run")
    leaks = parse_table((tmp_path / "run" / "results.tsv").read_text(), "run")["leakage"].astype(float)
    assert np.nanmax(leaks) <= 0.1


OFFSET = [0.0]


def asks_the_host(variables, x):
    """A base classifier that is computed, in part, by a Python function."""
    shift = jax.pure_callback(
        lambda: np.float32(OFFSET[0]), jax.ShapeDtypeStruct((), jnp.float32), vmap_method="sequential"
    )
    return reference.linear_logits(variables, x) + shift


def test_a_classifier_that_calls_back_to_the_host_is_not_resumed(tmp_path):
    """Its program is the same whatever the function computes."""
    called = from_function(asks_the_host, CLASSIFIER.variables, num_classes=2)
    two = take(DATASET, [0, 1])
    with pytest.warns(match=r"calls code on the host .* so this run cannot be continued once it is stopped"):
        certify_dataset(called, two, CONFIG, out=tmp_path / "run", execution=Execution(devices=1))
    for more in (DATASET, take(DATASET, [2, 3])):  # the rest, or others alone
        with pytest.raises(ValueError, match=r"calls code on the host .*run cannot be continued"):
            certify_dataset(called, more, CONFIG, out=tmp_path / "run", execution=Execution(devices=1))
    certify_dataset(called, two, CONFIG, out=tmp_path / "run", execution=Execution(devices=1))  # nothing is left to do
    assert read_run(tmp_path / "run").done() == {3, 5}
    assert read_run(tmp_path / "run").settings["calls_the_host"] is True


@pytest.mark.parametrize(
    ("setting", "value"),
    [("platform", "gpu, NVIDIA H100"), ("precision", "highest"), ("platform", None)],
)
def test_another_arithmetic_is_another_base_classifier(tmp_path, setting, value):
    """A run begun on a CPU is not finished on a GPU, nor in another precision: the program's text is the same."""
    certify_dataset(CLASSIFIER, take(DATASET, [0]), CONFIG, out=tmp_path / "run")
    assert (
        read_run(tmp_path / "run").settings | {"platform": "cpu", "precision": "default"}
        == read_run(tmp_path / "run").settings
    )
    config = tmp_path / "run" / "config.json"
    document = json.loads(config.read_text())
    document["settings"][setting] = value
    config.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=rf"other settings \({setting} is {value} there, "):
        certify_dataset(CLASSIFIER, DATASET, CONFIG, out=tmp_path / "run")


def test_the_class_is_selected_by_draws_that_do_not_estimate_it(tmp_path):
    """Where votes are even, the class that most of the estimating draws vote for is often another one."""
    classifier = from_function(coin, np.float32(0.5), num_classes=2)
    certify_dataset(classifier, CROWD, CONFIG, out=tmp_path / "run", execution=Execution(batch_size=5, devices=2))
    counts = read_run(tmp_path / "run").columns("counts")["counts"]
    smoothed = Smoothed(classifier, Gaussian(), np.float32(0.3))
    alone = jax.jit(lambda key, x: count_votes(key, smoothed, x, config=CONFIG.certify, chunk=100)[1])
    for i, x, count in zip(CROWD.ids, CROWD.images, counts, strict=True):
        assert alone(jax.random.fold_in(jax.random.key(0), int(i)), x) == count
    assert 2 <= (counts < CONFIG.certify.n / 2).sum() <= 10


def test_precision_is_that_of_the_programs_and_of_the_run(tmp_path, monkeypatch):
    classifier = from_function(product, np.ones((D, 2), np.float32), num_classes=2)
    hashes, seen = set(), []
    count = votes._count_items

    def recording(*arguments, **options):
        seen.append(getattr(jax.config, "jax_default_matmul_precision"))  # noqa: B009
        return count(*arguments, **options)

    monkeypatch.setattr(votes, "_count_items", recording)
    for precision in ("default", "high", "highest"):
        config = dataclasses.replace(CONFIG, precision=precision)
        seen.clear()
        how = Execution(batch_size=8, chunk=100)  # asked for: programs are compiled as they run, not when planned
        certify_dataset(classifier, DATASET, config, out=tmp_path / precision, execution=how)
        assert set(seen) == {None if precision == "default" else precision}
        settings = read_run(tmp_path / precision).settings
        assert settings["precision"] == precision
        hashes.add(settings["classifier"])
    assert len(hashes) == 3  # the fingerprint is of the program that runs
    with jax.default_matmul_precision("highest"):  # however it was set
        certify_dataset(classifier, DATASET, CONFIG, out=tmp_path / "highest")
    with pytest.raises(ValueError, match="precision is highest there, default here"):
        certify_dataset(classifier, DATASET, CONFIG, out=tmp_path / "highest")


def test_a_run_in_which_every_image_must_abstain_says_so(tmp_path):
    few = dataclasses.replace(CONFIG, certify=CertifyConfig(n0=5, n=9))
    with pytest.warns(match="with n = 9 draws every input abstains at alpha = 0.001"):
        certify_dataset(CLASSIFIER, DATASET, few, out=tmp_path / "run")


@pytest.fixture
def coins(monkeypatch):
    """A config of the toy enumerable noise, which is known by a name while the test runs."""
    monkeypatch.setitem(NOISES, "coins", Coins())
    return RunConfig(norm="l1", noise="coins", theta=1.0, leakage=LeakageConfig(2, 8), **SEARCH)


def votes_by_hand(x, theta):
    """Votes of all draws of `Coins` for the classes of `CLASSIFIER`, one draw after another, in float64."""
    w, b = (np.asarray(CLASSIFIER.variables[name], np.float64) for name in ("w", "b"))
    theta = np.broadcast_to(theta, x.shape).astype(np.float64)
    draws, u, found = round(64 * theta.max()), (x / theta).sum(), [0, 0]
    for draw in range(draws):
        cut = (draw + 0.5) / draws
        gray = 2 * (np.floor(u / 2 - cut) + cut + 0.5) / (1 / theta).sum()
        found[int(gray * w.sum() + b > 0)] += 1
    return found


@pytest.mark.parametrize("method", ["fixed", "ancer"])
def test_an_enumerable_noise_of_ones_own_runs_without_a_change_of_the_package(tmp_path, coins, method):
    """Gaps are those of all its draws, theta is what it can certify with, and nothing is left to chance."""
    out, config = tmp_path / "coins", dataclasses.replace(coins, method=method)
    certify_dataset(CLASSIFIER, DATASET, config, out=out, execution=Execution(batch_size=2, devices=2))
    names = ("predictions", "counts", "n", "draws", "p_lower", "gap", "theta", "bound_alpha")
    columns = read_run(out).columns(*names)
    memory = Memory.empty(1)
    for row, x in enumerate(DATASET.images):
        theta = columns["theta"][row]
        assert (theta == Coins().admissible(theta)).all()
        found = votes_by_hand(x, theta)
        assert sum(found) == columns["n"][row] == columns["draws"][row] == Coins().num_draws(theta)
        gap = max(max(found) - min(found) - 3, 0) / sum(found)
        assert columns["gap"][row] == gap
        assert columns["predictions"][row] == (np.argmax(found) if gap > 0 else -1)
        assert columns["counts"][row] == max(found) and columns["p_lower"][row] == max(found) / sum(found)
        region = Region(x, theta, gap, 1)
        memory, answer = memory.insert(Certificate(columns["predictions"][row], region, 1.0, 0, 0, 0.001))
        after = parse_table((out / "results.tsv").read_text(), out)
        assert after["gap"][row] == float(round_down(gap if method == "fixed" else answer.gap, 6))
    assert not columns["bound_alpha"].any() and (columns["gap"] > 0).any()
    assert (columns["counts"] < columns["n"]).any()  # not all copies of an image say the same
    results = report.load_results(out)
    assert results.alpha == 0 and results.data_dependent == (method == "ancer") and results.reconciled
    printed = report.summary_table([results], radii=[0.1])
    assert "| always " in printed and "i alpha" not in printed


def test_an_enumerable_noise_refuses_inputs_of_which_it_says_nothing(tmp_path, coins):
    large = Dataset("large", np.arange(2), np.zeros((2, 9, 9, 1), np.float32), np.array([0, 1]), 2)
    classifier = reference.linear(np.ones(81))
    with pytest.raises(ValueError, match=r"this toy noise is for at most 64 pixels in .*, not for image 0"):
        certify_dataset(classifier, large, coins, out=tmp_path / "large")


@pytest.mark.usefixtures("without_type_checker")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            (lambda x: x, DATASET, CONFIG),
            "classifier must be of type Classifier, got function: wrap it with from_linen",
        ),
        (
            (CLASSIFIER, DATASET.images, CONFIG),
            "dataset must be of type Dataset, got ndarray: make it by dataset_from_arrays",
        ),
        ((CLASSIFIER, DATASET, {"theta": 0.25}), "config must be of type RunConfig, got dict"),
        ((Smoothed(CLASSIFIER, Gaussian(), 0.25), DATASET, CONFIG), "certify_dataset takes smoothed.classifier"),
    ],
)
def test_arguments_of_a_wrong_type_are_refused_in_one_line(arguments, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        certify_dataset(*arguments, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def thirds(threshold, x):
    """Three classes by the mean of an image."""
    mean = x.mean(axis=(1, 2, 3))[:, None] - 0.5
    return jnp.concatenate([jnp.abs(mean) < threshold, mean <= -threshold, mean >= threshold], axis=1) * 1.0


@pytest.mark.parametrize(
    "sampling", [None, SequentialConfig(radii=(0.005, 0.02)), SequentialConfig(tolerance=0.1)], ids=str
)
def test_a_run_with_separate_bounds_is_what_certify_gives_alone(tmp_path, sampling):
    classifier = from_function(thirds, np.float32(0.06), num_classes=3)
    certify_config = CertifyConfig(n0=20, n=3_000, bound="separate")
    config = dataclasses.replace(CONFIG, certify=certify_config, sampling=sampling)
    certify_dataset(classifier, CROWD, config, out=tmp_path / "run", execution=Execution(batch_size=5, devices=2))
    columns = read_run(tmp_path / "run").columns("predictions", "counts", "n", "gap", "p_lower", "bound_runner_up")
    smoothed = Smoothed(classifier, Gaussian(), np.float32(0.3))
    for row, (i, x) in enumerate(zip(CROWD.ids, CROWD.images, strict=True)):
        key = jax.random.fold_in(jax.random.key(0), int(i))
        if sampling is None:
            one = certify(key, smoothed, x, config=certify_config)
        else:
            one = certify_sequentially(key, smoothed, x, config=certify_config, sequential=sampling)
        found = (one.prediction, one.count, one.n, one.gap, one.p_lower)
        assert found == tuple(columns[name][row] for name in ("predictions", "counts", "n", "gap", "p_lower"))
    certified = columns["gap"] > 0
    assert (certified & (columns["counts"] < columns["n"] / 2)).any()
    assert (columns["bound_runner_up"] < columns["n"] - columns["counts"]).any()
