"""Carlini and Wagner's attack: Adam against optax in float64, the search over the weight, confidence, early ends."""

from __future__ import annotations

import bent_models
import jax
import jax.numpy as jnp
import numpy as np
import optax

from robust_vit import attacks, losses

KEYS = bent_models.KEYS


def test_a_round_of_carlini_and_wagner_is_adam_behind_the_change_of_variables():
    with jax.enable_x64(True):
        model, images = bent_models.model(dtype=np.float64), bent_models.images(dtype=np.float64)
        labels = bent_models.predict(model, images)
        attack = attacks.build(
            "carlini_wagner", steps=12, rounds=2, start_weight=0.4, confidence=0.1, abort_early=False
        )
        states = bent_models.walk(attack, model, KEYS, images, labels, 12)
        shift = jnp.arctanh((2 * jnp.asarray(images) - 1) * (1 - 1e-6))

        def objective(modifier):
            moved = 0.5 * (jnp.tanh(shift + modifier) + 1)
            hinge = jnp.maximum(0.1 - losses.margin(model(moved), labels), 0.0)
            return jnp.sum((moved - images) ** 2) + 0.4 * jnp.sum(hinge)

        optimiser = optax.adam(0.01)
        modifier = jnp.zeros_like(shift)
        memory = optimiser.init(modifier)
        for state in states[1:12]:
            update, memory = optimiser.update(jax.grad(objective)(modifier), memory)
            modifier = optax.apply_updates(modifier, update)
            # The clean image itself is evaluated first, where the change of variables would be 1e-6 off.
            np.testing.assert_allclose(state.modifier, modifier, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(state.images, 0.5 * (jnp.tanh(shift + state.modifier) + 1), rtol=1e-12)
        np.testing.assert_array_equal(states[12].images, images)
        np.testing.assert_array_equal(states[12].round, 1)


def test_the_weight_is_searched_for_each_example_by_itself():
    """Ten times as large until a round reaches the goal, between the bounds from then on."""
    attack = attacks.build("carlini_wagner", steps=10, rounds=5, start_weight=0.01)
    state = attack.init(KEYS[:2], jnp.asarray(bent_models.images(0, 2)), jnp.zeros(2, jnp.int32))
    weights = []
    for reached in ((False, False), (True, False), (False, False), (True, True)):
        state = attack._next_round(state.replace(reached=jnp.array(reached)))
        weights.append(np.asarray(state.weight))
    np.testing.assert_allclose(weights, [[0.1, 0.1], [0.055, 1.0], [0.0775, 10.0], [0.06625, 5.5]], rtol=1e-6)


def test_confidence_is_kept_and_early_ends_save_passes():
    model, images = bent_models.model(1), bent_models.images(3)
    labels = bent_models.predict(model, images)
    options = {"steps": 60, "rounds": 4, "start_weight": 0.1, "learning_rate": 0.05}
    found = {}
    for abort in (True, False):
        attack = attacks.build("carlini_wagner", **options, confidence=0.3, abort_early=abort)
        result = found[abort] = attack(model, KEYS, images, labels)
        margins = losses.margin(model(result.images), jnp.asarray(labels))
        assert np.asarray(result.success).all()
        assert margins.min() >= 0.3 * (1 - 1e-3)
    assert (found[True].forward_passes <= found[False].forward_passes).all()
    assert found[True].forward_passes.sum() < found[False].forward_passes.sum()
    np.testing.assert_allclose(found[True].distance, found[False].distance, rtol=0.01)
