import contextlib
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ancer_jax.runs.settings import noise_program
from ancer_jax.smoothing import (
    CertifyConfig,
    Classifier,
    Gaussian,
    SequentialConfig,
    Smoothed,
    certify,
    certify_batch,
    certify_sequentially,
    check_classifier,
    from_function,
    from_linen,
    from_nnx,
    predict,
)
from ancer_jax.smoothing.classifier import _bfloat16_works, fingerprint
from tests import reference
from tests.toy import Coins

KEY = jax.random.key(0)
X = np.linspace(0, 1, 6, dtype=np.float32)


class Linen(nn.Module):
    """A network that behaves differently in training."""

    argument: str = "train"

    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


class Nnx(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(6, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.dropout, self.last = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(self.norm(self.first(x))))


class FlatLinen(nn.Module):
    """A network of inputs of any number of axes, but of one size."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x.reshape(len(x), -1))


def linen_variables():
    return Linen().init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X[None], train=True)


def test_linen_is_put_into_evaluation_mode():
    variables = linen_variables()
    classifier = from_linen(Linen(), variables, num_classes=3)
    check_classifier(classifier, X)
    np.testing.assert_array_equal(classifier(X[None]), Linen().apply(variables, X[None], train=False))
    with pytest.raises(ValueError, match="train=True is training mode"):
        from_linen(Linen(), variables, num_classes=3, train=True)


def test_nnx_is_put_into_evaluation_mode_and_left_alone():
    model = Nnx(nnx.Rngs(0))
    classifier = from_nnx(model, num_classes=3)
    check_classifier(classifier, X)
    assert not model.norm.use_running_average
    assert not model.dropout.deterministic
    model.eval()
    np.testing.assert_allclose(classifier(X[None]), model(X[None]), rtol=1e-6)


def batch_norm_in_training(variables, x):
    return jnp.stack([x[:, 0] - x[:, 0].mean(), x[:, 1]], axis=-1)


def dropout_by_place(variables, x):
    return x[:, :2] * jax.random.bernoulli(jax.random.key(0), 0.5, (x.shape[0], 2))


def not_finite(variables, x):
    return x[:, :2] / 0.0


def needs_images(variables, x):
    return x[:, 0, 0, :2]


def one_column_too_many(variables, x):
    return x[:, :3]


def nan_in_other_company(_, x):
    """Logits that are no numbers where the mean of the batch is small."""
    return x[:, :2] / jnp.sqrt(x.mean() - 0.4)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (batch_norm_in_training, "rest of the batch"),
        (nan_in_other_company, "rest of the batch"),
        (dropout_by_place, "place in the batch"),
        (not_finite, "not finite"),
        (needs_images, r"does not work on inputs of shape \[6\]"),
        (one_column_too_many, r"must return logits of shape \[4, 2\].*got \[4, 3\]"),
    ],
)
def test_what_voids_a_certificate_is_refused(function, text):
    with pytest.raises(ValueError, match=text):
        check_classifier(from_function(function, (), num_classes=2), X)


def relus_in_bfloat16(variables, x):
    narrow = x.astype(jnp.bfloat16)[:, :2]
    return jax.nn.relu(2 * jax.nn.relu(narrow) - 1).astype(x.dtype)


def one_relu_in_float32(variables, x):
    return jax.nn.relu(x[:, :2]).astype(jnp.bfloat16)


def test_maxima_of_bfloat16_are_refused_where_jaxlib_gets_them_wrong(monkeypatch):
    wide, narrow = (from_function(f, (), num_classes=2) for f in (one_relu_in_float32, relus_in_bfloat16))
    for works in (True, False):
        monkeypatch.setattr("ancer_jax.smoothing.classifier._bfloat16_works", lambda works=works: works)
        check_classifier(wide, X)
        with contextlib.nullcontext() if works else pytest.raises(ValueError, match=r"bfloat16.*jaxlib \d.*float32"):
            check_classifier(narrow, X)


def test_jaxlib_is_found_wrong_where_it_is():
    numbers = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.bfloat16)
    function = lambda x: jnp.minimum(2 * jnp.maximum(x, 0.25) - 1, 0.25).sum(axis=0)
    right = (jax.jit(function)(numbers) == function(numbers)).all()
    assert _bfloat16_works.__wrapped__() == right


WRONG_SHAPE = {
    "another shape": (
        X[:3],
        r"does not work on inputs of shape \[3\]: ScopeParamShapeError: For parameter .kernel. in ",
    ),
    "a batch": (
        np.stack([X, X]),
        r"of shape \[2, 6\]: .* \(if this is a batch of 2: use certify_batch, predict_batch or jax.vmap\)",
    ),
}


@pytest.mark.parametrize(("x", "text"), WRONG_SHAPE.values(), ids=WRONG_SHAPE)
@pytest.mark.parametrize(
    "function",
    [
        lambda smoothed, x: check_classifier(smoothed.classifier, x),
        lambda smoothed, x: certify(KEY, smoothed, x, config=CertifyConfig(n=10, alpha=0.5)),
        lambda smoothed, x: certify_batch(KEY, smoothed, x[None], config=CertifyConfig(n=10, alpha=0.5)),
        lambda smoothed, x: certify_sequentially(KEY, smoothed, x, sequential=SequentialConfig(radii=(0.0,))),
        lambda smoothed, x: predict(KEY, smoothed, x),
    ],
    ids=["check_classifier", "certify", "certify_batch", "certify_sequentially", "predict"],
)
def test_inputs_of_a_wrong_shape_are_refused_in_one_line(function, x, text):
    image_network = from_linen(FlatLinen(), FlatLinen().init(jax.random.key(0), X[None]), num_classes=3)
    with pytest.raises(ValueError, match=text) as refused:
        function(Smoothed(image_network, Gaussian(), 0.5), x)
    assert len(str(refused.value).splitlines()) == 1


def fails_at_run_time(variables, x):
    def refuse(x):
        raise RuntimeError("no license")

    return jax.pure_callback(refuse, jax.ShapeDtypeStruct((len(x), 2), x.dtype), x)


def test_an_error_of_the_program_is_one_line_too():
    with pytest.raises(ValueError, match=r"does not work on inputs of shape \[6\]: ") as refused:
        check_classifier(from_function(fails_at_run_time, (), num_classes=2), X)
    assert len(str(refused.value).splitlines()) == 1


def returns_a_pair(variables, x):
    return x, x


def test_a_classifier_that_returns_no_array_is_refused():
    with pytest.raises(
        ValueError, match=r"inputs of shape \[6\]: AttributeError: 'tuple' object has no attribute 'shape'"
    ):
        check_classifier(from_function(returns_a_pair, (), num_classes=2), X)


def test_fewer_than_two_classes_are_refused():
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        from_function(not_finite, (), num_classes=1)


@pytest.mark.parametrize("kind", ["linen", "nnx", "function"])
def test_rebuilding_a_wrapper_or_loading_other_weights_compiles_nothing(kind):
    def build(scale):
        if kind == "nnx":
            model = Nnx(nnx.Rngs(0))
            model.last.bias[...] = jnp.full(3, scale)
            return from_nnx(model, num_classes=3)
        if kind == "linen":
            variables = jax.tree.map(lambda leaf: leaf * scale, linen_variables())
            return from_linen(Linen(), variables, num_classes=3)
        return reference.linear(np.full(6, scale))

    traces = []

    @jax.jit
    def run(classifier, x):
        traces.append(1)
        return classifier(x)

    first, second = (run(build(scale), X[None]) for scale in (1.0, 2.0))
    assert len(traces) == 1
    assert not np.allclose(first, second)


def test_weights_that_are_overwritten_later_change_nothing():
    """JAX may share the memory of large NumPy arrays."""
    weights = {"w": np.ones((10**6, 2), np.float32), "on device": jnp.ones(3)}
    classifier = from_function(lambda variables, x: x @ variables["w"], weights, num_classes=2)
    weights["w"][:] = 0
    assert (np.asarray(classifier.variables["w"]) == 1).all()
    assert classifier.variables["on device"] is weights["on device"]


def test_fingerprint_names_the_weights():
    a, b = reference.linear(np.ones(4)), reference.linear(np.ones(4))
    other = reference.linear(np.array([1, 1, 1, 1 + 1e-6]))
    assert fingerprint(a, X[:4]) == fingerprint(b, X[:4])
    assert fingerprint(a, X[:4]) != fingerprint(other, X[:4])


@pytest.mark.parametrize("values", [(1.0, -1.0), (np.arange(6.0), np.arange(6.0) + np.eye(6)[0])])
def test_fingerprint_names_the_program_and_what_it_closes_over(values):
    def build(value):
        constant = jnp.asarray(value, jnp.float32)
        return from_function(lambda _, x: (x * constant)[:, :2], (), num_classes=2)

    first, again, second = (fingerprint(build(value), X) for value in (values[0], values[0], values[1]))
    assert first == again
    assert first != second


FACTOR = {"value": 1.0}


class LinenWithGlobal(nn.Module):
    """A network that reads a global value."""

    @nn.compact
    def __call__(self, x):
        return FACTOR["value"] * nn.Dense(2)(x)


class NnxWithGlobal(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.last = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        return FACTOR["value"] * self.last(x)


def times_global(_, x):
    return (x * FACTOR["value"])[:, :2]


@pytest.mark.parametrize(
    "build",
    [
        lambda: from_function(times_global, (), num_classes=2),
        lambda: from_linen(LinenWithGlobal(), LinenWithGlobal().init(KEY, X[None]), num_classes=2),
        lambda: from_nnx(NnxWithGlobal(nnx.Rngs(0)), num_classes=2),
    ],
    ids=["function", "linen", "nnx"],
)
def test_a_function_whose_values_have_changed_is_refused(build, monkeypatch):
    """Compiled programs go on with the values of the first time, even if the same classifier is built anew."""
    classifier = build()
    check_classifier(classifier, X)
    before = fingerprint(classifier, X)
    with monkeypatch.context() as patch:
        patch.setitem(FACTOR, "value", -1.0)
        for look in (fingerprint, check_classifier):
            with pytest.raises(ValueError, match="reads values that have changed"):
                look(build(), X)
    assert fingerprint(classifier, X) == before


def test_values_that_jax_hides_have_no_fingerprint():
    code = (
        "import tests.smoothing.test_classifier as t; a = t.jnp.arange(60.0); "
        "t.fingerprint(t.from_function(lambda _, x: (x * a)[:, :2], (), num_classes=2), a)"
    )
    hidden = {**os.environ, "JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS": "1"}
    refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=hidden)
    assert refused.returncode == 1 and "make them variables" in refused.stderr


def test_fingerprints_of_networks_and_noise_are_those_of_other_processes():
    code = (
        "import tests.smoothing.test_classifier as t; "
        "print(t.fingerprint(t.from_nnx(t.Nnx(t.nnx.Rngs(0)), num_classes=3), t.X)); "
        "print(t.noise_program(t.Coins(), (2, 2, 1)))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert there == [fingerprint(from_nnx(Nnx(nnx.Rngs(0)), num_classes=3), X), noise_program(Coins(), (2, 2, 1))]


class ByArgument(nnx.Module):
    """Told training from evaluation in the call."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, x, train: bool = True):
        return self.norm(x, use_running_average=not train)


def test_nnx_modules_that_are_told_in_the_call_are_put_into_evaluation_mode():
    check_classifier(from_nnx(ByArgument(nnx.Rngs(0)), num_classes=6), X)


def hidden_batch_effect(variables, x):
    return jnp.stack([1e3 + x[:, 0] + x.mean(), 1e3 + x[:, 1]], axis=-1)


def test_a_batch_effect_is_found_beneath_a_large_constant():
    with pytest.raises(ValueError, match="batch"):
        check_classifier(from_function(hidden_batch_effect, (), num_classes=2), X)


def test_a_classifier_is_a_pytree():
    classifier = reference.linear(np.ones(4))
    leaves, structure = jax.tree.flatten(classifier)
    assert len(leaves) == 2
    assert isinstance(jax.tree.unflatten(structure, leaves), Classifier)
