"""The convolutions of the networks are XLA's: values, gradients and forward-mode derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancer_jax.models import _convolution
from ancer_jax.models._convolution import convolution

pytestmark = pytest.mark.usefixtures("quick_compilation")
LAYOUT = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize(
    ("size", "kernel"),
    [((1, 1), (3, 3)), ((2, 1), (3, 3)), ((2, 2), (1, 1)), ((5, 4), (1, 1)), ((5, 4), (3, 3)), ((5, 4), (2, 3))],
)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("features", [3, 6])
def test_convolution_is_that_of_xla(size, kernel, stride, features):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x, w = draw(2, *size, features), draw(*kernel, features, 5)
    half = [(k // 2, k // 2) for k in kernel]
    plans = [half, "SAME", [(k - 1, k - 1) for k in kernel]]
    for padding in plans if kernel == (2, 3) else plans[:1]:
        ours = lambda x, w, padding=padding: convolution(x, w, (stride, stride), padding, dimension_numbers=LAYOUT)
        theirs = lambda x, w, padding=padding: jax.lax.conv_general_dilated(
            x, w, (stride, stride), padding, dimension_numbers=LAYOUT
        )
        dx, dw, pull = draw(*x.shape), draw(*w.shape), draw(*theirs(x, w).shape)

        @jax.jit
        def all_of(x, w, dx, dw, pull):
            found = []
            for one in (ours, theirs):  # noqa: B023
                value, back = jax.vjp(one, x, w)
                found.append((value, back(pull), jax.jvp(one, (x, w), (dx, dw))[1]))
            return found

        for found, expected in zip(*map(jax.tree.leaves, all_of(x, w, dx, dw, pull)), strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * (1 + np.abs(expected).max()))


@pytest.mark.parametrize(
    ("images", "kernel", "strides"),
    [
        *((3, kernel, strides) for kernel in ((1, 1), (3, 3), (2, 5)) for strides in ((1, 1), (2, 2), (1, 2), (2, 1))),
        *((images, (2, 5), strides) for images in (1, 70) for strides in ((1, 1), (2, 1))),
    ],
)
def test_gradients_in_training_are_those_of_xla(images, kernel, strides, monkeypatch):
    """In one to 35 parts of the batch; one image is larger than a part should be."""
    monkeypatch.setattr(_convolution, "_PIXELS", 200)
    monkeypatch.setattr(_convolution, "_NUMBERS", 4000)
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x, w = draw(images, 16, 15, 6), draw(*kernel, 6, 5)
    plans = [[(k // 2, k // 2) for k in kernel], [(k - 1, 0) for k in kernel], "SAME", "VALID"]
    for padding in plans if images == 3 else plans[:1]:
        options = {"dimension_numbers": LAYOUT}
        ours = lambda x, w, padding=padding: convolution(x, w, strides, padding, in_loop=False, **options)  # noqa: B023
        theirs = lambda x, w, padding=padding: jax.lax.conv_general_dilated(x, w, strides, padding, **options)  # noqa: B023
        pull = draw(*jax.eval_shape(theirs, x, w).shape)
        both = jax.jit(lambda x, w, pull: [jax.vjp(one, x, w)[1](pull) for one in (ours, theirs)])  # noqa: B023
        for found, expected in zip(*both(x, w, pull), strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * (1 + np.abs(expected).max()))


def test_the_gradient_of_a_narrow_type_is_summed_in_float32():
    rng = np.random.default_rng(0)
    shapes = (256, 16, 16, 4), (3, 3, 4, 8), (256, 16, 16, 8)
    narrow = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]

    def gradient(x, w, pull):
        return jax.vjp(lambda w: convolution(x, w, (1, 1), "SAME", in_loop=False), w)[1](pull)[0]

    found, exact = gradient(*narrow), gradient(*(value.astype("float32") for value in narrow))
    assert found.dtype == "bfloat16"
    assert (found == exact.astype("bfloat16")).mean() > 0.95  # sums in bfloat16 would agree in half


def test_unusual_convolutions_are_those_of_xla():
    x, w = jnp.ones((1, 5, 5, 4)), jnp.ones((3, 3, 1, 4))
    grouped = convolution(x, w, (1, 1), "SAME", dimension_numbers=LAYOUT, feature_group_count=4)
    assert grouped.shape == (1, 5, 5, 4) and grouped[0, 2, 2, 0] == 9
    for padding, size in (("VALID", 1), ("SAME", 5)):
        dilated = convolution(x[..., :1], w, (1, 1), padding, dimension_numbers=LAYOUT, rhs_dilation=(2, 2))
        assert dilated.shape == (1, size, size, 4)
    cut = lambda x: convolution(x, jnp.ones((1, 1, 4, 2)), (2, 2), [(-1, 0), (0, 0)], dimension_numbers=LAYOUT).sum()
    assert jax.grad(cut)(x).shape == x.shape
    tiny, far = jnp.ones((1, 2, 2, 3)), jnp.ones((1, 1, 3, 2))
    assert convolution(tiny, far, (3, 3), [(1, 1), (1, 1)], dimension_numbers=LAYOUT).shape == (1, 2, 2, 2)
    assert convolution(tiny, jnp.ones((3, 3, 3, 2)), (1, 1), "VALID", dimension_numbers=LAYOUT).shape == (1, 0, 0, 2)
    grouped = convolution(
        jnp.ones((2, 4, 4, 3)), jnp.ones((1, 1, 3, 4)), (1, 1), "SAME", dimension_numbers=LAYOUT, batch_group_count=2
    )
    assert grouped.shape == (1, 4, 4, 4)
