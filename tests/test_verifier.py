"""Verdicts are those of the certificates: a ball is verified only where it lies inside the certified region."""

import itertools
import types

import jax
import numpy as np
import pytest

import ancer_jax as aj
from ancer_jax.regions import Region
from ancer_jax.verifier import Verifier, contains_ball
from tests import reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def context(x, label, name="7"):
    return types.SimpleNamespace(data_point=types.SimpleNamespace(id=name, label=label, data=x))


class Tensor:
    """Looks like a PyTorch tensor of floats."""

    def __init__(self, values):
        self.values = values

    def detach(self):
        return self

    cpu = double = is_floating_point = detach

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)


@pytest.mark.parametrize("ball", ["linf", "l2", "l1"])
@pytest.mark.parametrize("noise", [aj.Gaussian(), aj.Uniform()])
def test_verdicts_about_a_linear_classifier(noise, ball):
    weights, x = np.array([1.0, -2.0, 0.5, 0.3]), np.array([0.3, -0.2, 0.5, 0.1], np.float32)
    smoothed = aj.Smoothed(reference.linear(weights), noise, 0.5)
    distance = abs(weights @ x) / np.linalg.norm(weights, ord={"linf": 1, "l2": 2, "l1": np.inf}[ball])
    right = int(np.asarray(smoothed.classifier(x[None])).argmax())
    verifier = Verifier(KEY, smoothed, ball=ball, config=aj.CertifyConfig(n=2000))
    epsilons = np.linspace(0, 1.2 * distance, 40)
    found = [verifier.verify(context(x, right), epsilon).result for epsilon in epsilons]
    assert found == sorted(found, reverse=True)  # UNSAT, then TIMEOUT
    assert found[0] == "UNSAT" and found[-1] == "TIMEOUT"
    assert all(result == "TIMEOUT" for result, epsilon in zip(found, epsilons, strict=True) if epsilon > distance)
    wrong = verifier.verify(context(Tensor(x), 1 - right), 0.1)
    assert (wrong.result, wrong.obtained_labels) == ("SAT", [right])
    near = np.zeros(4, np.float32)
    assert verifier.verify(context(near, right, "8"), 0.0).result == "TIMEOUT"


def test_numbers_that_float32_cannot_hold_are_certified_as_they_are():
    smoothed, config = aj.Smoothed(reference.linear([1.0]), aj.Gaussian(), 0.25), aj.CertifyConfig(n=1000)
    verifier, x = Verifier(KEY, smoothed, ball="l2", config=config), np.array([0.2 + 1e-9])
    rounded = verifier.verify(context(x.astype(np.float32), 1), 0.1)
    exact = verifier.verify(context(x, 1), 0.1)
    assert rounded.result == exact.result == "UNSAT"
    centers = [certificate.region.center.item() for certificate in verifier._certificates.values()]
    assert centers == [np.float32(x).item(), x.item()]


def test_an_input_is_certified_once(monkeypatch):
    calls = []
    monkeypatch.setattr("ancer_jax.verifier.certify", lambda *of, **how: calls.append(1) or aj.certify(*of, **how))
    smoothed = aj.Smoothed(reference.linear([1.0, -2.0]), aj.Gaussian(), 0.5)
    verifier = Verifier(KEY, smoothed, config=aj.CertifyConfig(n=100))
    for epsilon, (x, name) in itertools.product((0.1, 0.2), (([1, 0], "a"), ([0, 1], "b"), ([0, 1], "a"))):
        verifier.verify(context(np.float32(x), 0, name), epsilon)
    assert len(calls) == 2  # whatever the ids are
    for x in (np.float64([1, 0]), np.float16([1, -0.0]), np.array([1, -0.0])):  # equal numbers
        verifier.verify(context(x, 0), 0.1)
    assert len(calls) == 2


@pytest.mark.parametrize("basis", [aj.basis.Pixels(), aj.basis.Cosine()])
@pytest.mark.parametrize(("norm", "ball"), [*itertools.product((2, 1), ("linf", "l2", "l1"))])
def test_a_ball_in_a_region_is_never_larger_than_the_region(basis, norm, ball):
    """Its points, among them corners and axes, are inside; a pixel region of one theta is filled where norms agree."""
    if norm == 1 and basis != aj.basis.Pixels():
        pytest.skip("regions in l1 are in pixels")
    order = {"linf": np.inf, "l2": 2, "l1": 1}[ball]
    directions = np.concatenate(
        [RNG.normal(size=(200, 16)), np.sign(RNG.normal(size=(200, 16))), np.eye(16), np.ones((1, 16))]
    )
    directions /= np.linalg.norm(directions, ord=order, axis=1, keepdims=True)
    for theta in (np.full((4, 4, 1), 0.5), RNG.uniform(0.3, 0.6, (4, 4, 1))):
        region = Region(norm=norm, center=np.zeros((4, 4, 1)), theta=theta, gap=np.float64(0.8), basis=basis)
        epsilons = np.geomspace(1e-3, 2, 300)
        inside = [contains_ball(region, float(epsilon), ball) for epsilon in epsilons]
        largest = epsilons[np.sum(inside) - 1]
        assert inside == sorted(inside, reverse=True) and 0 < np.sum(inside) < 300
        steps = np.asarray(basis.coefficients((largest * directions).reshape(-1, 4, 4, 1))) / theta
        lengths = np.linalg.norm(steps.reshape(-1, 16), ord=norm, axis=1)
        assert lengths.max() <= 0.8
        if basis == aj.basis.Pixels() and (ball in ("linf", f"l{norm}")):  # the largest ball, up to the grid
            assert lengths.max() > 0.95 * 0.8


def test_images_of_a_tool_have_channels_first():
    model, x = aj.load_bundled("fashion-mnist-cnn-l2-0.25"), aj.load_dataset("fashion-mnist-subset").images[0]
    smoothed, config = aj.Smoothed(model.classifier, aj.Gaussian(), 0.25), aj.CertifyConfig(n=200)
    first, last = (Verifier(KEY, smoothed, ball="l2", config=config, channels=c) for c in ("first", "last"))
    expected = last.verify(context(x, 9), 0.1)
    for data in (np.moveaxis(x, -1, 0), np.moveaxis(x, -1, 0)[None]):
        found = first.verify(context(data, 9), 0.1)
        assert (found.result, found.obtained_labels) == (expected.result, expected.obtained_labels)


def test_what_is_refused():
    smoothed = aj.Smoothed(reference.linear([1.0, -2.0]), aj.Gaussian(), 0.5)
    verifier = Verifier(KEY, smoothed)
    for epsilon in (-0.1, np.nan, np.inf):
        with pytest.raises(ValueError, match="epsilon"):
            verifier.verify(context(np.float32([1, 0]), 0), epsilon)
    with pytest.raises(ValueError, match="label must be an integer"):
        verifier.verify(context(np.float32([1, 0]), 0.9), 0.1)
    with pytest.raises(ValueError, match="data must be floating point, in the units of theta, got uint8"):
        verifier.verify(context(np.uint8([255, 0]), 0), 0.1)
    one_to_one = context(np.float32([1, 0]), 0)
    one_to_one.property_generator = types.SimpleNamespace(target_class=1)
    with pytest.raises(ValueError, match="one target class"):
        verifier.verify(one_to_one, 0.1)
    with pytest.raises(ValueError, match="enumerable"):
        Verifier(KEY, aj.Smoothed(smoothed.classifier, aj.Splitting(exact=True), 0.5))
    region = Region(norm=2, center=np.zeros(2), theta=np.full(2, -1.0), gap=np.float64(1.0))
    assert not contains_ball(region, 0.1, "l2")
    with pytest.raises((ValueError, TypeError), match="ball"):
        Verifier(KEY, smoothed, ball="l3")
