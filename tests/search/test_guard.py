import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from ancer_jax import CertifyConfig, Gaussian, GuardConfig, Smoothed, guarded_choice
from ancer_jax.search import guard
from ancer_jax.smoothing.smoothed import Stage, stage_key
from tests import reference
from tests.search.classifiers import KEY, PAINTABLE, PAINTED, interval, leakage_to_class_1, paintable_probes

pytestmark = pytest.mark.usefixtures("quick_compilation")


def choose(classifier, narrow, wide, criterion):
    smoothed = Smoothed(classifier, Gaussian(), narrow)
    config = GuardConfig(criterion=criterion, num_samples=2000, chunk=500)
    theta, taken = guarded_choice(KEY, smoothed, np.zeros(2, np.float32), np.float32(wide), config=config)
    assert (theta == (jnp.float32(wide) if taken else jnp.full(2, narrow))).all()
    return bool(taken)


def test_the_wide_theta_is_taken_if_its_region_is_better():
    one_sided = reference.linear([1.0, 0.0], b=1.0)
    assert choose(one_sided, 0.5, [0.5, 2.0], "volume")
    assert choose(one_sided, 0.5, [0.5, 2.0], "superset")
    # Under a small first theta, 2,000 draws prove less extent in the first coordinate: more volume, no superset.
    assert choose(one_sided, 0.5, [0.2, 2.0], "volume")
    assert not choose(one_sided, 0.5, [0.2, 2.0], "superset")
    assert not choose(interval(1.0, 1.0), 0.4, [0.4, 1.5], "volume")
    assert choose(interval(1.0, 1.0), 0.4, [0.4, 1.5], "off")


def test_a_choice_between_other_thetas_compiles_nothing_again(compilations):
    choose(interval(1.0, 1.0), 0.4, [0.4, 1.5], "volume")
    before = compilations()
    choose(interval(0.9, 1.1), 0.3, [0.5, 1.2], "volume")
    assert compilations() == before


def test_another_config_is_refused():
    smoothed = Smoothed(interval(1.0, 1.0), Gaussian(), 0.4)
    unchecked = inspect.unwrap(guarded_choice)
    with pytest.raises(ValueError, match="config must be of type GuardConfig, got CertifyConfig"):
        unchecked(KEY, smoothed, np.zeros(2, np.float32), np.float32(1), config=CertifyConfig())  # pyright: ignore


def test_the_wide_theta_must_keep_the_class():
    # Far out the class is 0: wide noise is classified confidently, but as another class.
    assert not choose(interval(1.0, 1.0), 0.3, [50.0, 50.0], "volume")
    assert choose(interval(1.0, 1.0), 0.3, [50.0, 50.0], "off")


def choose_within(limit, wide, criterion="off", x=PAINTED):
    config = GuardConfig(criterion=criterion, num_samples=1000, leakage_limit=limit, chunk=500)
    _, taken = guarded_choice(KEY, PAINTABLE, x, np.float32(wide), config=config, probes=paintable_probes())
    return bool(taken)


def test_a_theta_that_leaks_more_than_the_limit_is_not_taken():
    honest, painted, small = [0.25, 0.25, 2], [0.25, 1.7, 0.25], [0.1, 0.1, 0.1]
    num_leaked, num_eligible = leakage_to_class_1(np.float32(painted))
    assert 0 < num_leaked < num_eligible
    assert leakage_to_class_1(np.float32(honest))[0] == leakage_to_class_1(np.float32(small))[0] == 0
    assert choose_within(None, painted, "volume")
    for criterion in ("off", "volume"):
        assert choose_within(0.0, honest, criterion)
        assert not choose_within(0.0, painted, criterion)
    assert choose_within(num_leaked / num_eligible, painted)
    # The limit alone does not ask for a larger region, and it does not replace the criterion.
    assert choose_within(0.0, small)
    assert not choose_within(0.0, small, "volume")


def test_the_limit_is_on_leakage_to_the_class_that_the_wide_theta_votes_for():
    x, loud = np.float32([-0.5, 0, 0]), [0.25, 50, 0.25]
    assert leakage_to_class_1(np.float32(loud))[0] > 0
    # Under the loud theta x is of class 1, too. Without it x is of class 0, and nothing leaks to that class.
    assert not choose_within(0.0, loud, x=x)
    assert choose_within(0.0, [0.25, 0.25, 2], x=x)


def test_a_limit_without_probes_is_refused():
    config = GuardConfig(criterion="off", num_samples=10, chunk=10, leakage_limit=0.1)
    with pytest.raises(ValueError, match=r"leakage_limit = 0.1 needs leakage probes, got None"):
        guarded_choice(KEY, PAINTABLE, PAINTED, PAINTED + 1, config=config)


def test_the_guard_draws_by_a_stage_key_of_its_own(monkeypatch):
    """So that none of its draws is one of those that search or certify."""
    stages = []
    monkeypatch.setattr(guard, "stage_key", lambda key, stage: stages.append(stage) or stage_key(key, stage))
    smoothed = Smoothed(reference.linear([1.0, -1.0]), Gaussian(), np.float32(0.5))
    config = GuardConfig(criterion="volume", num_samples=5, chunk=5)
    guarded_choice(KEY, smoothed, np.float32([0.5, 0.1]), np.float32(0.6), config=config)
    assert set(stages) == {Stage.GUARD}
