"""Adam's ascent against an implementation in NumPy, and its invariance to the scale of the loss."""

from __future__ import annotations

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import attacks, classifier, errors

SHAPE = (3, 3, 2)


def _bent(variables, images):
    return jnp.tanh(images.reshape(len(images), -1) @ variables["u"]) @ variables["w"]


def _model(scale=1.0):
    rng = np.random.default_rng(0)
    variables = {"u": rng.normal(size=(18, 12)) / 3, "w": scale * rng.normal(size=(12, 3))}
    return classifier.wrap(_bent, jax.tree.map(jnp.asarray, variables))


def _gradient(model, images, labels):
    """Of the cross-entropy, by hand."""
    u, w = (np.asarray(model.variables[name]) for name in "uw")
    hidden = np.tanh(images.reshape(len(images), -1) @ u)
    logits = hidden @ w
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    slope = ((probabilities - np.eye(3)[labels]) @ w.T) * (1 - hidden**2)
    return (slope @ u.T).reshape(images.shape)


def test_each_step_is_that_of_adam():
    with jax.enable_x64(True):
        model, epsilon, size = _model(), 0.1, 0.03
        images = np.random.default_rng(1).uniform(0.05, 0.95, (6, *SHAPE))
        labels = np.arange(6) % 3
        first = second = np.zeros_like(images)
        expected = images
        for step in range(1, 8):
            gradient = _gradient(model, expected, labels)
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            change = size * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-7)
            expected = np.clip(np.clip(expected + change, images - epsilon, images + epsilon), 0, 1)
        attack = attacks.build("adam", epsilon=epsilon, relative_step=size / epsilon, steps=7, stop_on_success=False)
        keys = attacks.example_keys(0, np.arange(6))
        state = attack.init(keys, jnp.asarray(images), jnp.asarray(labels, jnp.int32))
        for _ in range(7):
            state = attack.step(model, state).replace(count=state.count + 1)
        np.testing.assert_allclose(state.images, expected, atol=1e-12)


def test_the_scale_of_a_gradient_does_not_matter():
    images = np.random.default_rng(2).uniform(size=(4, *SHAPE)).astype(np.float32)
    model = closed_forms.model(1, SHAPE, 2)
    keys = attacks.example_keys(0, np.arange(4))
    labels = np.zeros(4, np.int32)
    found = []
    for factor in (1.0, 50.0):
        scaled = classifier.wrap(closed_forms.affine, {name: factor * v for name, v in model.variables.items()})
        attack = attacks.build("adam", epsilon=0.1, steps=4, loss="margin", stop_on_success=False)
        state = attack.init(keys, jnp.asarray(images), jnp.asarray(labels))
        for _ in range(4):
            state = attack.step(scaled, state).replace(count=state.count + 1)
        found.append(np.asarray(state.images))
    np.testing.assert_allclose(*found, atol=1e-5)


@pytest.mark.parametrize("options", [{"steps": 0}, {"relative_step": 0.0}, {"epsilon": -1.0}])
def test_wrong_numbers_are_refused(options):
    with pytest.raises(errors.UserError):
        attacks.build("adam", **{"epsilon": 0.1, **options})
