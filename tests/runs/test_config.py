"""Settings of a run: what is refused, what is hashed into the run, and what a run's settings read back as."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from ancer_jax import CertifyConfig, Execution, LeakageConfig, RunConfig, SequentialConfig
from ancer_jax.devices import device_mesh
from ancer_jax.runs.settings import describe_run
from ancer_jax.search import AnisotropicConfig, GuardConfig, IsotropicConfig
from ancer_jax.smoothing import Gaussian, Splitting, Uniform
from ancer_jax.smoothing.registry import NOISES
from tests.toy import BUMPS, CROWD, Coins

METHODS = ("fixed", "universal", "isotropic", "ancer")
NOISE = (
    {"norm": "l2"},
    {"norm": "l2", "noise": "gaussian"},
    {"norm": "l1"},
    {"norm": "l1", "noise": "uniform"},
    {"norm": "l1", "noise": "splitting"},
    {"norm": "l1", "noise": "splitting", "exact": True},
    {"norm": "l1", "noise": "splitting", "exact": True, "period": 720},
)
SAMPLING = (None, SequentialConfig(radii=(0.0, 0.25)), SequentialConfig(tolerance=0.02))


def test_only_settings_that_the_method_uses_name_the_run():
    assert {"isotropic", "anisotropic", "guard"}.isdisjoint(RunConfig(method="fixed").settings())
    isotropic = RunConfig(method="isotropic")
    assert {"anisotropic", "guard", "guard_samples"}.isdisjoint(isotropic.settings())
    assert "guard_samples" in dataclasses.replace(isotropic, leakage_limit=0.1).settings()  # they find the class
    assert {"theta", "isotropic"}.isdisjoint(RunConfig(method="universal").settings())
    settings = RunConfig(method="ancer", theta=0.5).settings()
    assert settings["isotropic"]["theta_max"] == settings["anisotropic"]["theta_max"] == 2.0


def test_the_two_class_bound_names_no_run():
    """Runs whose settings do not name the bound have this one."""
    assert RunConfig().settings()["certify"] == {"n0": 100, "n": 100_000, "alpha": 0.001}
    separate = RunConfig(certify=CertifyConfig(bound="separate"))
    assert separate.settings()["certify"] == {"n0": 100, "n": 100_000, "alpha": 0.001, "bound": "separate"}
    assert RunConfig.from_settings(separate.settings()) == separate
    assert separate.alpha == 0.001


@pytest.mark.parametrize("method", METHODS)
def test_the_memory_names_no_run(method):
    """It can be added to a run later."""
    config = RunConfig(method=method)
    assert dataclasses.replace(config, memory=False).settings() == config.settings()
    assert "memory" not in config.settings()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"norm": "linf"}, "norm must be one of l2, l1, got 'linf'"),
        ({"method": "best"}, "method must be one of fixed, universal, isotropic, ancer"),
        ({"method": "shared"}, "method must be one of fixed, universal, isotropic, ancer"),
        ({"theta": 0.0}, "theta must be positive and finite as float32, got 0.0"),
        ({"theta": 1e-39}, "theta must be positive and finite as float32, got 1e-39"),
        ({"theta": "0.5"}, "theta must be a number, got '0.5'"),
        ({"theta": float("inf")}, "theta must be positive and finite"),
        ({"theta": float("nan")}, r"theta must be in \[-inf, inf\], got nan"),
        ({"seed": -1}, r"seed must be in 0\.\.2147483647, got -1"),
        ({"seed": 2**31}, r"seed must be in 0\.\.2147483647, got 2147483648"),
        ({"seed": 0.5}, r"seed must be an integer, got 0\.5"),
        ({"guard": "on"}, "guard must be one of off, volume, superset, got 'on'"),
        ({"guard_samples": 0}, r"guard_samples must be in 1\.\.16777215, got 0"),
        ({"guard_samples": 2**24}, r"guard_samples must be in 1\.\.16777215, got 16777216"),
        ({"precision": "low"}, "precision must be one of default, high, highest, got 'low'"),
        ({"isotropic": IsotropicConfig(theta_max=0.1)}, "theta_max must be at least theta = 0.25, got 0.1"),
        ({"anisotropic": AnisotropicConfig(theta_max=0.1)}, "theta_max must be at least theta = 0.25, got 0.1"),
        ({"noise": "uniform"}, "noise for l2 must be one of gaussian, got 'uniform'"),
        ({"norm": "l1", "noise": "gaussian"}, "noise for l1 must be one of uniform, splitting, got 'gaussian'"),
        ({"noise": "nois"}, "noise for l2 must be one of gaussian, got 'nois'"),
        ({"exact": True}, "exact certificates are for splitting noise"),
        ({"norm": "l1", "exact": True}, "exact certificates are for splitting noise"),
        (
            {"norm": "l1", "noise": "splitting", "exact": True, "sampling": SequentialConfig(tolerance=0.1)},
            "no sequential sampling",
        ),
        (
            {"norm": "l1", "noise": "splitting", "exact": True, "certify": CertifyConfig(bound="separate")},
            "exact certificates count the second class in any case: no separate bounds",
        ),
        ({"norm": "l1", "noise": "splitting", "exact": True, "period": 0}, r"period must be in 1\.\.16384, got 0"),
        ({"norm": "l1", "noise": "splitting", "exact": True, "period": 2**15}, r"period must be in 1\.\.16384"),
        (
            {"sampling": SequentialConfig(tolerance=0.1), "certify": CertifyConfig(alpha=1e-199)},
            r"alpha must be in \[.*, 1\), got 1e-199",
        ),
        ({"leakage_limit": 0.5}, "leakage_limit is for methods that search for theta, isotropic and ancer"),
        ({"method": "universal", "leakage_limit": 0.5}, "for methods that search for theta"),
        ({"method": "ancer", "leakage_limit": 2.0}, r"leakage_limit must be in \[0, 1\], got 2"),
        ({"method": "isotropic", "leakage": None, "leakage_limit": 0.1}, "needs leakage to be measured, got leakage"),
        (
            {"method": "isotropic", "leakage": None, "isotropic": IsotropicConfig(leakage_weight=1.0, theta_max=1.0)},
            "needs leakage to be measured, got leakage = None",
        ),
        (
            {"method": "ancer", "leakage": None, "anisotropic": AnisotropicConfig(leakage_weight=1.0, theta_max=1.0)},
            "needs leakage to be measured, got leakage = None",
        ),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(change, text):
    """The check itself: with types that are checked in tests alone, some would be refused before."""
    with pytest.raises(ValueError, match=text) as error:
        config = RunConfig()
        for name, value in change.items():
            object.__setattr__(config, name, value)
        config.__post_init__()
    assert "\n" not in str(error.value)


def configs():
    """A config of each combination that is allowed; every setting that its method uses has an unusual value."""
    search = {"steps": 3, "num_samples": 7, "learning_rate": 0.5, "objective": "log_volume", "theta_max": 3.0}
    used = {
        "fixed": {"theta": 0.3},
        "universal": {},
        "isotropic": {"theta": 0.3, "isotropic": IsotropicConfig(**search, leakage_weight=0.5)},
        "ancer": {
            "theta": 0.3,
            "isotropic": IsotropicConfig.published(**search),
            "anisotropic": AnisotropicConfig(**search, kappa=0.1, leakage_batch=3),
            "guard": "superset",
            "guard_samples": 11,
        },
    }
    for method, noise, sampling, limit in itertools.product(METHODS, NOISE, SAMPLING, (None, 0.25)):
        if (noise.get("exact") and sampling is not None) or (limit is not None and method in ("fixed", "universal")):
            continue  # refused
        if "period" in noise and method in ("fixed", "isotropic"):
            continue  # not used
        leakage = {} if limit is None else {"leakage": LeakageConfig(5, 6), "guard_samples": 12}
        common = {"certify": CertifyConfig(11, 222, 0.02), "sampling": sampling, "seed": 5, "leakage_limit": limit}
        yield RunConfig(**{"method": method, **noise, **used[method], **common, **leakage})
    yield RunConfig(certify=CertifyConfig(bound="separate"))
    yield RunConfig(method="ancer", leakage=None)
    yield RunConfig(method="isotropic", isotropic=IsotropicConfig(theta_max=float("inf")))


def test_settings_are_read_back_as_the_config():
    """Also from the text in which they are stored, among what else is stored there. The usual noise needs no name."""
    for config in configs():
        expected = dataclasses.replace(config, noise=None) if config.noise in ("gaussian", "uniform") else config
        assert RunConfig.from_settings(config.settings()) == expected
        text = json.dumps(config.settings())
        again = RunConfig.from_settings(json.loads(text) | {"results_version": 4, "data": {"name": "points"}})
        assert again == expected and json.loads(json.dumps(again.settings())) == json.loads(text)


@pytest.mark.parametrize(
    "settings", [{"certify": 3}, {"certify": {"num": 3}}, {"theta": 0.0}, {"period": 0}, {"noise": "own"}], ids=str
)
def test_other_settings_are_refused_in_one_line(settings):
    with pytest.raises(ValueError) as error:
        RunConfig.from_settings(RunConfig().settings() | settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "noise", "enumerable"),
    [
        (RunConfig(), Gaussian(), False),
        (RunConfig(norm="l1"), Uniform(), False),
        (RunConfig(norm="l1", noise="splitting"), Splitting(), False),
        (RunConfig(norm="l1", noise="splitting", exact=True), Splitting(exact=True), True),
        (RunConfig(norm="l1", noise="splitting", exact=True, period=720), Splitting(exact=True, period=720), True),
    ],
)
def test_the_noise_says_whether_its_draws_are_all_there_are(config, noise, enumerable):
    assert config.certified_noise == noise
    assert noise.for_search == (Splitting() if isinstance(noise, Splitting) else noise)
    assert config.enumerable is enumerable
    assert config.alpha == (0.0 if enumerable else 0.001)


def test_a_noise_of_ones_own_is_known_by_its_name(monkeypatch):
    monkeypatch.setitem(NOISES, "coins", Coins(32))
    config = RunConfig(norm="l1", noise="coins", method="ancer", theta=0.3)
    assert config.certified_noise == Coins(32) and config.certified_noise.for_search == Uniform()
    assert config.enumerable and config.alpha == 0
    assert RunConfig.from_settings(config.settings()) == config
    assert config.theta_bound == Coins(32).admissible(1.2)


@pytest.mark.parametrize(("method", "searches"), [(method, method in ("isotropic", "ancer")) for method in METHODS])
def test_only_searches_depend_on_the_data_and_have_a_bound_of_theta(method, searches):
    config = RunConfig(method=method, isotropic=IsotropicConfig(theta_max=0.75))
    assert config.data_dependent is searches
    assert config.theta_bound == {"isotropic": np.float32(0.75), "ancer": 1.0}.get(method, np.inf)


def test_searches_come_in_their_order_and_each_has_its_guard():
    config = RunConfig(
        method="ancer", guard="superset", guard_samples=7, leakage_limit=0.2, certify=CertifyConfig(9, 9)
    )
    assert [*config.searches.items()] == [("isotropic", config.isotropic), ("anisotropic", config.anisotropic)]
    assert [*dataclasses.replace(config, method="isotropic").searches] == ["isotropic"]
    assert not RunConfig(method="universal").searches and not RunConfig(method="fixed").searches
    assert config.guard_config(anisotropic=True, chunk=3) == GuardConfig("superset", 7, 0.001, 0.2, 3)
    assert config.guard_config(anisotropic=False, chunk=3) == GuardConfig("off", 7, 0.001, 0.2, 3)
    # What is computed in float32 needs an alpha that is not too small.
    tiny = dataclasses.replace(config, certify=CertifyConfig(alpha=1e-12))
    assert tiny.guard_config(anisotropic=True, chunk=3).alpha == 1e-9


def test_the_bound_of_theta_is_one_that_its_noise_can_certify_with():
    """A pixel's theta divides the period; that of a whole image need not."""
    search = {"isotropic": IsotropicConfig(theta_max=0.7), "anisotropic": AnisotropicConfig(theta_max=0.7)}
    exact = {"norm": "l1", "noise": "splitting", "exact": True, "period": 720, **search}
    assert RunConfig(method="isotropic", **exact).theta_bound == np.float32(357 / 510)
    assert RunConfig(method="ancer", **exact).theta_bound == np.float32(240 / 510)  # 360 > 0.7 * 510
    assert RunConfig(method="ancer", norm="l1", noise="splitting", **search).theta_bound == np.float32(0.7)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"devices": 0}, "devices must be at least 1, got 0"),
        ({"chunk": 1.5}, r"chunk must be an integer, got 1\.5"),
        ({"shard": "rows"}, "shard must be one of images, draws, got 'rows'"),
    ],
    ids=str,
)
def test_execution_out_of_range_is_refused(change, text):
    execution = Execution()
    ((name, value),) = change.items()
    object.__setattr__(execution, name, value)
    with pytest.raises(ValueError, match=text):
        execution.__post_init__()


def test_the_attributes_of_a_noise_of_ones_own_are_among_the_settings(monkeypatch):
    monkeypatch.setitem(NOISES, "coins", Coins(per_unit=32))
    one = RunConfig(norm="l1", noise="coins").settings()
    monkeypatch.setitem(NOISES, "coins", Coins(per_unit=64))
    other = RunConfig(norm="l1", noise="coins").settings()
    assert one != other and one["noise_law"] == "Coins(per_unit=32)"
    assert "noise_law" not in RunConfig(norm="l1", noise="splitting").settings()


def test_edited_code_of_a_noise_of_ones_own_is_another_setting(monkeypatch):
    """Even if its `repr` stays the same."""

    def described():
        config = RunConfig(norm="l1", noise="toy", theta=0.5)
        return describe_run(BUMPS, CROWD, config, np.array(0.5), device_mesh(1))

    def law(factor):
        class Toy(Uniform):
            """Uniform noise, wrong by a factor."""

            def sample(self, key, theta):
                """One draw."""
                return factor * super().sample(key, theta)

        return Toy()

    monkeypatch.setitem(NOISES, "toy", law(1))
    one, same = described(), described()
    monkeypatch.setitem(NOISES, "toy", law(0.5))
    other = described()
    assert one == same and "noise_law" in one
    assert {name for name in one if one[name] != other[name]} == {"noise_program"}


@pytest.mark.parametrize("name", ["splitting", "s"])
def test_another_law_under_a_built_in_name_or_class_is_another_setting(monkeypatch, name):
    monkeypatch.setitem(NOISES, name, Splitting())
    config = RunConfig(norm="l1", noise=name)
    usual = config.settings()
    assert "noise_law" not in usual
    for law in (Splitting(levels=15), Splitting(seed=1)):
        monkeypatch.setitem(NOISES, name, law)
        assert config.settings() == usual | {"noise_law": repr(law)}


def test_coordinates_of_theta_are_at_the_bound_of_the_last_search():
    wide, narrow = IsotropicConfig(theta_max=2.0), AnisotropicConfig(theta_max=0.5)
    assert RunConfig(method="ancer", isotropic=wide, anisotropic=narrow).theta_bound == 0.5
    assert RunConfig(method="isotropic", isotropic=wide, anisotropic=narrow).theta_bound == 2.0
