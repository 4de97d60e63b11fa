"""Denoised smoothing: the denoiser is a part of the base classifier."""

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ancer_jax as aj
from ancer_jax.models import DnCNN, denoised, one_step_diffusion, wiener_front, with_front
from ancer_jax.smoothing.classifier import fingerprint
from ancer_jax.training import DenoiserConfig, denoiser, denoiser_state, train_denoiser

pytestmark = pytest.mark.usefixtures("quick_compilation")

NETWORK = DnCNN(3, 8)
RNG = np.random.default_rng(0)
# Smooth images: a denoiser has something to learn.
IMAGES = np.clip(0.5 + 0.3 * np.cumsum(RNG.normal(size=(96, 8, 8, 1)), axis=1) / 3, 0, 1).astype(np.float32)
CONFIG = DenoiserConfig(theta=0.3, epochs=3, batch_size=32, learning_rate=1e-2)


def denoise(variables, x, theta):
    return NETWORK.apply(variables, x)


def light(variables, x):
    """Two classes: is the upper half lighter than the lower one?"""
    value = 10 * (x[:, :4].mean(axis=(1, 2, 3)) - x[:, 4:].mean(axis=(1, 2, 3)))
    return jnp.stack([value, -value], axis=1)


CLASSIFIER = aj.from_function(light, (), num_classes=2)


def trained(config=CONFIG, **settings):
    return list(train_denoiser(NETWORK, IMAGES, config, **settings))


def test_a_denoiser_learns_and_begins_as_the_identity():
    variables = NETWORK.init(jax.random.key(0), jnp.asarray(IMAGES[:1]))
    np.testing.assert_array_equal(NETWORK.apply(variables, jnp.asarray(IMAGES)), IMAGES)
    (state, last) = trained()[-1]
    noisy = IMAGES + 0.3 * RNG.normal(size=IMAGES.shape).astype(np.float32)
    before, after = (
        ((x - IMAGES) ** 2).mean() for x in (noisy, np.asarray(NETWORK.apply(state.variables, jnp.asarray(noisy))))
    )
    assert after < 0.6 * before
    assert last == pytest.approx(after / 0.3**2, rel=0.2)


def test_a_training_is_continued_as_if_it_had_not_stopped():
    whole = trained()
    (state, _) = next(iter(train_denoiser(NETWORK, IMAGES, CONFIG)))
    template = denoiser_state(NETWORK, IMAGES, CONFIG)
    stored = flax.serialization.from_bytes(template, flax.serialization.to_bytes(state))
    rest = trained(state=stored)
    assert [s.epoch for s, _ in rest] == [2, 3]
    assert [loss for _, loss in rest] == [loss for _, loss in whole[1:]]
    jax.tree.map(np.testing.assert_array_equal, rest[-1][0].variables, whole[-1][0].variables)


def test_no_step_draws_by_the_key_of_an_image(monkeypatch):
    """So certificates of the same seed share no draw with the training."""
    keys, step = [], denoiser._step
    monkeypatch.setattr(
        denoiser, "_step", lambda v, m, key, *of, **how: keys.append(key) or step(v, m, key, *of, **how)
    )
    trained()
    of_images = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(CONFIG.seed), i))(
        jnp.arange(1000, dtype=np.uint32)
    )
    numbers = lambda keys: {tuple(map(int, row)) for row in np.asarray(jax.random.key_data(keys))}
    assert len(keys) == 9 and numbers(jnp.stack(keys)).isdisjoint(numbers(of_images))


def test_the_loss_of_the_classifier_is_trained_too():
    start = trained()[-1][0].variables
    settings = {"theta": 0.3, "epochs": 2, "batch_size": 32, "learning_rate": 1e-3}
    both, one = DenoiserConfig(classifier_weight=1.0, **settings), DenoiserConfig(**settings)
    state = lambda config: denoiser_state(NETWORK, IMAGES, config, variables=start)
    with_it = trained(both, classifier=CLASSIFIER, state=state(both))
    without = trained(one, state=state(one))
    assert with_it[-1][1] > without[-1][1]
    noisy = IMAGES + 0.3 * RNG.normal(size=IMAGES.shape).astype(np.float32)

    def loss(variables):
        logits = light((), NETWORK.apply(variables, jnp.asarray(noisy)))
        labels = light((), IMAGES).argmax(axis=-1)
        return -jax.nn.log_softmax(logits)[np.arange(len(IMAGES)), labels].mean()

    assert loss(with_it[-1][0].variables) < loss(without[-1][0].variables)


def _brighter_side(variables, x):
    """Which half of an image is brighter: another class for its mirror image."""
    difference = 1000 * (x[:, :, : x.shape[2] // 2].mean((1, 2, 3)) - x[:, :, x.shape[2] // 2 :].mean((1, 2, 3)))
    return jnp.stack([difference, -difference], axis=-1)


class Identity(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return x + 0 * self.param("zero", nn.initializers.zeros, ())


def test_the_class_that_is_learned_is_that_of_the_mirrored_image():
    images = np.clip(0.2 + 0.6 * (np.arange(8) >= 4)[None, None, :, None] + 0.01 * RNG.random((64, 8, 8, 1)), 0, 1)
    images = np.where(RNG.random((64, 1, 1, 1)) < 0.5, images, images[:, :, ::-1]).astype(np.float32)
    side = aj.from_function(_brighter_side, (), num_classes=2)
    settings = {"theta": 1e-3, "epochs": 1, "batch_size": 32, "learning_rate": 1e-9}
    losses = []
    for weight, classifier in ((1.0, side), (0.0, None)):
        config = DenoiserConfig(classifier_weight=weight, **settings)
        ((_, loss),) = train_denoiser(Identity(), images, config, classifier=classifier)
        losses.append(loss)
    assert abs(losses[0] - losses[1]) < 1e-3


def test_certificates_are_those_of_the_composition():
    variables = trained()[-1][0].variables
    composed = aj.from_function(lambda v, x: light((), NETWORK.apply(v, x)), variables, num_classes=2)
    in_front = denoised(denoise, variables, CLASSIFIER, 0.3)
    aj.check_classifier(in_front, IMAGES[0])
    config = aj.CertifyConfig(n0=50, n=500)
    found = [
        aj.certify(jax.random.key(1), aj.Smoothed(one, aj.Gaussian(), 0.3), IMAGES[0], config=config)
        for one in (composed, in_front)
    ]
    assert found[0].count == found[1].count
    assert found[0].prediction == found[1].prediction
    other = jax.tree.map(lambda leaf: leaf + 1e-6, variables)
    assert fingerprint(in_front, IMAGES[0]) != fingerprint(denoised(denoise, other, CLASSIFIER, 0.3), IMAGES[0])


def test_one_step_of_a_diffusion_is_the_best_denoiser_of_gaussian_images():
    """Pixels are independent and normal: the best prediction of the noise is known, and so is the denoised image."""
    mean, deviation = 0.1, 0.05  # in units of [-1, 1]
    kept = np.cumprod(1 - np.linspace(1e-4, 0.05, 300))

    def predict_noise(variables, x, step):
        share = jnp.asarray(kept, jnp.float32)[step]
        variance = share * deviation**2 + 1 - share
        return jnp.sqrt(1 - share) * (x - jnp.sqrt(share) * mean) / variance

    theta = float(np.sqrt(1 / kept[100] - 1)) / 2
    x = 0.55 + theta * RNG.normal(size=(500, 4, 4, 1)).astype(np.float32)
    found = one_step_diffusion(predict_noise, kept)((), jnp.asarray(x), jnp.float32(theta))
    weight = deviation**2 / (deviation**2 + (2 * theta) ** 2)
    expected = (mean + weight * (2 * x - 1 - mean) + 1) / 2
    np.testing.assert_allclose(found, expected, atol=1e-3)
    made, same = (denoised(one_step_diffusion(predict_noise, kept), (), CLASSIFIER, theta) for _ in range(2))
    assert made.apply == same.apply  # so that a second one compiles nothing again
    aj.check_classifier(made, IMAGES[0])


def test_what_is_refused():
    on_host = aj.from_host(lambda x: np.zeros((len(x), 2)), num_classes=2)
    with pytest.raises(ValueError, match="outside of it"):
        denoised(denoise, (), on_host, 0.3)
    with pytest.raises(ValueError, match="outside of it"):
        with_front(on_host, wiener_front(IMAGES, 0.3, aj.basis.Cosine()))
    smaller = denoised(lambda variables, x, theta: x[:, 1:], (), CLASSIFIER, 0.3)
    with pytest.raises(ValueError, match=r"denoiser returned shape \[1, 7, 8, 1\] for inputs \[1, 8, 8, 1\]"):
        smaller(IMAGES[:1])
    for kept in ([], [1.5], [0.0], [0.5, 0.6]):
        with pytest.raises(ValueError, match="kept"):
            one_step_diffusion(lambda *of: of[1], kept)
    diffusion = denoised(one_step_diffusion(lambda *of: of[1], [0.5]), (), CLASSIFIER, np.full((8, 8, 1), 0.3))
    with pytest.raises(ValueError, match="same noise from each pixel"):
        diffusion(IMAGES[:1])
    for images in (255 * IMAGES, np.nan * IMAGES):
        with pytest.raises(ValueError, match=r"pixels must be in \[0, 1\]"):
            train_denoiser(NETWORK, images, CONFIG)
    with pytest.raises(ValueError, match="by gradients of the classifier"):
        train_denoiser(NETWORK, IMAGES, DenoiserConfig(batch_size=32, classifier_weight=1.0), classifier=on_host)
    with pytest.raises(ValueError, match="do not fill a batch"):
        train_denoiser(NETWORK, IMAGES[:20], CONFIG)
    with pytest.raises(ValueError, match="only then"):
        train_denoiser(NETWORK, IMAGES, CONFIG, classifier=CLASSIFIER)
    with pytest.raises(ValueError, match="only then"):
        train_denoiser(NETWORK, IMAGES, DenoiserConfig(batch_size=32, classifier_weight=1.0))
    for name, value in {"theta": 0.0, "epochs": 0, "batch_size": 0, "learning_rate": 0.0}.items():
        with pytest.raises(ValueError, match=name):
            DenoiserConfig(**{name: value})
    with pytest.raises(ValueError, match="depth"):
        DnCNN(1).init(jax.random.key(0), jnp.asarray(IMAGES[:1]))
