"""The loss along an attack: what the attack itself evaluates, at no further cost, to the last iterate."""

from __future__ import annotations

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import attacks, losses, programs
from robust_vit.attacks import progression, skeleton

SHAPE = (3, 3, 2)


def _given(count=9):
    model = closed_forms.model(2, SHAPE, 2)
    images = jnp.asarray(np.random.default_rng(0).uniform(0.3, 0.7, (count, *SHAPE)), jnp.float32)
    labels = jnp.argmax(model(images), axis=-1).astype(jnp.int32)
    return model, attacks.example_keys(0, np.arange(count)), images, labels


def test_the_loss_of_an_affine_model_after_each_step_is_known():
    model, keys, images, labels = _given()
    attack = attacks.build("bim", epsilon=0.2, steps=5, relative_step=0.1, stop_on_success=False)
    found = progression.follow(attack, model, keys, images, labels)
    assert found.losses.shape == found.achieved.shape == (9, 6)
    weights = np.asarray(model.variables["w"])
    signs = np.sign(weights[:, 1 - labels] - weights[:, labels]).T.reshape(images.shape)
    for step in range(6):
        logits = model(images + 0.02 * step * signs)
        np.testing.assert_allclose(found.losses[:, step], losses.cross_entropy(logits, labels), rtol=2e-5, atol=1e-6)
        margins = losses.margin(logits, labels)
        clear = np.abs(margins) > 1e-4
        np.testing.assert_array_equal(np.asarray(found.achieved[:, step])[clear], np.asarray(margins > 0)[clear])
    assert (np.diff(found.losses, axis=1) > 0).all()


def test_a_random_start_is_one_more_look():
    model, keys, images, labels = _given()
    attack = attacks.build("pgd", epsilon=0.2, steps=3, stop_on_success=False)
    found = progression.follow(attack, model, keys, images, labels)
    assert found.losses.shape == (9, 5)
    np.testing.assert_allclose(found.losses[:, 0], losses.cross_entropy(model(images), labels), rtol=1e-6)
    result = attack(model, keys, images, labels)
    np.testing.assert_allclose(found.losses[:, -1], result.loss, rtol=1e-5)


def test_what_stops_stands_still():
    model, keys, images, labels = _given()
    attack = attacks.build("adam", epsilon=0.3, steps=6)
    found = progression.follow(attack, model, keys, images, labels)
    achieved, values = np.asarray(found.achieved), np.asarray(found.losses)
    assert achieved[:, -1].any()
    assert (achieved[:, 1:] >= achieved[:, :-1]).all()
    np.testing.assert_array_equal(values[:, 1:][achieved[:, :-1]], values[:, :-1][achieved[:, :-1]])


@pytest.mark.parametrize("name", ["bim", "adam"])
def test_looking_shares_the_forward_pass_of_the_step(name):
    model, _, images, _ = _given()
    attack = attacks.build(name, epsilon=0.1, steps=4, stop_on_success=False)
    shapes = jax.ShapeDtypeStruct(images.shape, images.dtype)
    alone = programs.inspect(skeleton.programs(attack, model, shapes)[1])
    followed = programs.inspect(progression.programs(attack, model, shapes)[1])
    dots = [text.compiled.as_text().count(" dot(") for text in (alone, followed)]
    assert dots[1] == dots[0] > 0
