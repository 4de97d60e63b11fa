import jax
import numpy as np
import pytest

from ancer_jax import CertifyConfig, Execution, GaussianL2, RunConfig, certify, certify_dataset
from ancer_jax.data import Dataset, take
from ancer_jax.optimize import AnisotropicConfig, IsotropicConfig
from ancer_jax.runs import read_run
from tests import reference

D = 9
DATASET = Dataset(
    "points",
    np.array([3, 5, 8, 13, 21]),
    np.random.default_rng(0).uniform(0, 1, (5, 3, 3, 1)).astype(np.float32),
    np.array([0, 1, 1, 0, 1]),
    2,
)
CLASSIFIER = reference.linear(np.linspace(-1, 1.5, D), b=-1.0)
SEARCH = {
    "isotropic": IsotropicConfig(steps=5, num_samples=10),
    "anisotropic": AnisotropicConfig(steps=5, num_samples=10),
}
CONFIG = RunConfig(method="fixed", theta=0.3, certify=CertifyConfig(n0=20, n=500), **SEARCH)


def run(path, config=CONFIG, dataset=DATASET, **execution):
    certify_dataset(CLASSIFIER, dataset, config, out=path, execution=Execution(**execution))
    shards = list(read_run(path).shards())
    rows = {name: np.concatenate([s[name] for s in shards]) for name in ("ids", "counts", "gap", "theta")}
    order = np.argsort(rows["ids"])
    return {name: column[order] for name, column in rows.items()}


def test_a_line_is_what_certify_gives_for_that_image(tmp_path):
    rows = run(tmp_path / "run")
    for i, x, count, gap in zip(DATASET.ids, DATASET.images, rows["counts"], rows["gap"], strict=True):
        key = jax.random.fold_in(jax.random.key(0), int(i))
        one = certify(key, CLASSIFIER, GaussianL2(), x, np.float32(0.3), config=CONFIG.certify)
        assert (one.count, one.gap) == (count, gap)


@pytest.mark.parametrize("execution", [{"batch_size": 1}, {"batch_size": 7, "chunk": 64}, {"chunk": 501, "devices": 1}])
def test_execution_changes_no_count(tmp_path, execution):
    expected, rows = run(tmp_path / "a", batch_size=4, chunk=100, devices=4), run(tmp_path / "b", **execution)
    for name in expected:
        np.testing.assert_array_equal(rows[name], expected[name])


def test_other_images_beside_it_change_no_count(tmp_path):
    expected, rows = run(tmp_path / "a"), run(tmp_path / "b", dataset=take(DATASET, [1, 4]))
    np.testing.assert_array_equal(rows["counts"], expected["counts"][[1, 4]])


@pytest.mark.parametrize("method", ["isotropic", "ancer"])
def test_searched_thetas_agree_between_execution_plans(tmp_path, method):
    config = RunConfig(method=method, theta=0.3, certify=CertifyConfig(n0=20, n=500), guard="off", **SEARCH)
    a, b = run(tmp_path / "a", config, batch_size=4, devices=4), run(tmp_path / "b", config, batch_size=2, devices=1)
    np.testing.assert_allclose(a["theta"], b["theta"], rtol=1e-6)
    assert a["theta"].shape == ((5,) if method == "isotropic" else (5, 3, 3, 1))
    assert (a["theta"] != np.float32(0.3)).any()


def test_another_seed_draws_other_noise(tmp_path):
    other = RunConfig(theta=0.3, certify=CONFIG.certify, seed=1)
    assert (run(tmp_path / "a")["counts"] != run(tmp_path / "b", other)["counts"]).any()


def test_only_settings_that_the_method_uses_name_the_run():
    assert {"isotropic", "anisotropic", "guard"}.isdisjoint(RunConfig(method="fixed").settings())
    assert "anisotropic" not in RunConfig(method="isotropic").settings()
    settings = RunConfig(method="ancer", theta=0.5).settings()
    assert settings["isotropic"]["theta_max"] == settings["anisotropic"]["theta_max"] == 2.0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"norm": "linf"}, "norm must be one of l2, l1, got 'linf'"),
        ({"method": "best"}, "method must be one of fixed, isotropic, ancer"),
        ({"theta": 0.0}, "theta must be positive and finite as float32, got 0.0"),
        ({"theta": float("inf")}, "theta must be positive and finite"),
        ({"seed": -1}, "seed must be in"),
        ({"guard": "on"}, "guard must be one of"),
        ({"guard_samples": 0}, "guard_samples must be at least 1"),
        ({"isotropic": IsotropicConfig(theta_max=0.1)}, "theta_max must be at least theta = 0.25, got 0.1"),
    ],
)
def test_settings_out_of_range_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        config = RunConfig()
        for name, value in change.items():
            object.__setattr__(config, name, value)
        config.__post_init__()


@pytest.mark.parametrize(
    ("execution", "text"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"chunk": 0}, "chunk"),
        ({"devices": 5}, r"devices must be in 1\.\.4"),
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
