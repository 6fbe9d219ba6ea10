"""NES and SPSA: unbiased estimates, Adam as it is elsewhere, closed forms within a measured factor, draws of their own."""

from __future__ import annotations

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robust_vit import attacks, classifier, errors
from robust_vit.attacks import evaluation, skeleton

SHAPE = (3, 3, 2)
NAMES = ("nes", "spsa")


def _problem(count=6, seed=3):
    model = closed_forms.model(seed, SHAPE, 2)
    images = np.random.default_rng(1).uniform(0.3, 0.7, size=(count, *SHAPE)).astype(np.float32)
    labels = np.array(model(jnp.asarray(images)).argmax(-1), np.int32)
    return model, images, labels, attacks.example_keys(0, np.arange(count))


def _step(attack, model, state):
    return jax.jit(lambda model, state: skeleton.advance(state, 0, attack, model))(model, state)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("goal", ["untargeted", "targeted"])
def test_the_estimate_is_the_gradient_of_the_mean(name, goal):
    """Of a linear loss with gradient g, n pairs estimate it with a variance of about |g|^2 / n in each pixel."""
    model, images, labels, keys = _problem()
    weights = np.asarray(model.variables["w"])
    attack = attacks.build(name, epsilon=1e-6, samples=2000, loss="margin", goal=goal)
    state = _step(attack, model, attack.init(keys, images, labels if goal == "untargeted" else 1 - labels))
    estimate = np.asarray(state.moments.mean).reshape(6, -1) / (1 - 0.9)
    given = labels if goal == "untargeted" else 1 - labels
    exact = weights[:, 1 - given].T - weights[:, given].T
    z = (estimate - exact) / (np.linalg.norm(exact, axis=1, keepdims=True) / np.sqrt(2000))
    # Rounding over differences of 0.002 adds less than a tenth.
    assert np.abs(z).max() < 5
    assert 0.7 < z.std() < 1.3


def test_spsa_moves_as_adam_does():
    model, images, labels, keys = _problem()
    attack = attacks.build("spsa", epsilon=0.25, step_size=0.04, samples=8, steps=4)
    # A model that is sure of the labels: the attack goes on, and no pixel reaches the ball or the box.
    sure = model.replace(variables={**model.variables, "b": model.variables["b"] + 100.0 * jnp.asarray([1.0, -1.0])})
    labels = np.zeros_like(labels)
    optimizer = optax.adam(0.01)
    state = attack.init(keys, images, labels)
    plain, memory = jnp.asarray(images), optimizer.init(jnp.asarray(images))
    for _ in range(4):
        before = state
        state = _step(attack, sure, state)
        estimate = (state.moments.mean - 0.9 * before.moments.mean) / (1 - 0.9)
        update, memory = optimizer.update(-estimate, memory)
        plain = plain + update
        np.testing.assert_allclose(state.images, plain, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_affine_model_breaks_a_little_beyond_the_exact_distance(name, norm):
    """Measured with 30 steps of 20 pairs: all break at 1.15 times the exact distance, and none may below it."""
    model, images, labels, keys = _problem()
    exact = closed_forms.distances(norm, model, images, labels)
    attack = attacks.build(name, epsilon=0.1, norm=norm, steps=30, samples=20)

    @jax.jit
    @jax.vmap
    def broken(size, key, image, label):
        return attack.replace(epsilon=size)(model, key[None], image[None], label[None]).success[0]

    for factor, expected in ((1.15, True), (0.99, False)):
        found = broken(jnp.asarray(factor * exact, jnp.float32), keys, images, labels)
        np.testing.assert_array_equal(found, expected)


def _flat(variables, images):
    return jnp.broadcast_to(variables["b"][None], (images.shape[0], 2))


@pytest.mark.parametrize("name", NAMES)
def test_a_plateau_is_counted_and_nothing_moves(name):
    _, images, _, keys = _problem()
    model = classifier.wrap(_flat, {"b": jnp.asarray([2.0, 0.0])})
    result = attacks.build(name, epsilon=0.1, steps=5, samples=2)(model, keys, images, np.zeros(6, np.int32))
    np.testing.assert_array_equal(result.vanished, 5)
    np.testing.assert_array_equal(result.images, images)
    np.testing.assert_array_equal(result.forward_passes, 5 * 5 + 1)


class _Recorder:
    """A stochastic model that keeps the keys that it is given."""

    stochastic = True

    def __init__(self):
        self.keys = []

    def sample(self, images, keys):
        self.keys.append(np.asarray(jax.random.key_data(keys)))
        return jnp.zeros((1, len(images), 2))


def test_every_answer_of_a_stochastic_model_is_a_draw_of_its_own():
    keys, images, model = attacks.example_keys(0, np.arange(3)), jnp.zeros((5, 3, *SHAPE)), _Recorder()
    found = evaluation.widened(model, images, keys, jnp.asarray([0, 1, 7]))
    assert found.shape == (5, 3, 2)
    assert len(np.unique(model.keys[0], axis=0)) == 15
    evaluation.widened(model, images[:, 2:], keys[2:], jnp.asarray([7]))
    np.testing.assert_array_equal(model.keys[1], model.keys[0].reshape(3, 5, -1)[2])


def test_mistakes_are_told():
    with pytest.raises(errors.UserError, match="radius is 0"):
        attacks.build("nes", epsilon=0.1, radius=0.0)
    with pytest.raises(errors.UserError, match="samples is 0"):
        attacks.build("spsa", epsilon=0.1, samples=0)
