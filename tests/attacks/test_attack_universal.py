"""Universal perturbations: the best one of an affine model in closed form, a small ViT, fooling rates, bad input."""

from __future__ import annotations

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_vit

from robust_vit import attacks, classifier, errors
from robust_vit.attacks import universal

SHAPE = (3, 3, 2)
KEY = jax.random.key(0)


def _one_class():
    """Images that a two-class affine model puts in class 0, far from the sides of the box."""
    model = closed_forms.model(0, SHAPE, 2)
    images = np.random.default_rng(1).uniform(0.35, 0.65, (64, *SHAPE)).astype(np.float32)
    kept = np.asarray(model(images)).argmax(1) == 0
    return model, images[kept][:16]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_of_one_class_of_an_affine_model_the_best_perturbation_is_known(norm):
    model, images = _one_class()
    epsilon = 0.02
    found = attacks.fit_universal(
        model, [{"image": images, "label": np.zeros(16, np.int32)}], KEY, epsilon=epsilon, norm=norm, steps=40
    )
    weights = np.asarray(model.variables["w"])
    direction = (weights[:, 1] - weights[:, 0]).reshape(SHAPE)
    expected = epsilon * (np.sign(direction) if norm == "linf" else direction / np.linalg.norm(direction))
    np.testing.assert_allclose(found.perturbation, expected, atol=1e-6)
    applied = np.asarray(found.apply(images))
    np.testing.assert_allclose(applied, images + expected[None], atol=1e-6)


def test_targets_and_images_that_are_fooled_already():
    model, images = _one_class()
    batch = {"image": images, "label": np.zeros(16, np.int32)}
    to_one = attacks.fit_universal(model, batch, KEY, epsilon=0.05, target=1, steps=10)
    away = attacks.fit_universal(model, batch, KEY, epsilon=0.05, steps=10)
    np.testing.assert_allclose(to_one.perturbation, away.perturbation, atol=1e-6)
    # A loss above the most that counts has no gradient: everything is fooled already, and nothing moves.
    still = attacks.fit_universal(
        model, {**batch, "label": np.ones(16, np.int32)}, KEY, epsilon=0.05, most=1e-6, steps=3
    )
    np.testing.assert_array_equal(still.perturbation, 0.0)


def test_a_learned_perturbation_fools_a_small_vit_and_a_random_one_does_not():
    model = small_vit.model()
    images, labels = small_vit.images(5, 256)
    batches = [{"image": images[i : i + 64], "label": labels[i : i + 64]} for i in range(0, 256, 64)]
    held_out = dict(zip(("image", "label"), small_vit.images(99, 256), strict=True))
    found = attacks.fit_universal(model, batches, KEY, epsilon=0.08, steps=60)
    assert np.abs(found.perturbation).max() <= 0.08 * (1 + 1e-5)
    rate = universal.fooled(model, found, held_out, KEY)
    assert rate.shape == (256,)
    noise = found.replace(perturbation=0.08 * jnp.sign(jax.random.normal(KEY, found.perturbation.shape)))
    # Measured: 0.72 and 0.035.
    assert rate.mean() > 0.5
    assert universal.fooled(model, noise, held_out, KEY).mean() < 0.12


def test_image_by_image_the_sum_of_least_changes_fools_an_affine_model():
    model, images = _one_class()
    batches = [{"image": images, "label": np.zeros(16, np.int32), "mask": np.arange(16) < 12}]
    attack = attacks.build("deep_fool", norm="l2", candidates=2)
    found = universal.fit_greedy(model, batches, KEY, attack=attack, epsilon=2.0, norm="l2", rate=1.0)
    assert universal.fooled(model, found, batches, KEY).all()
    assert len(universal.fooled(model, found, batches, KEY)) == 12
    # No longer than the farthest image asks for: each change goes along the one direction that there is.
    distances = closed_forms.distances("l2", model, images[:12], np.zeros(12, np.int32))
    np.testing.assert_allclose(np.linalg.norm(found.perturbation), distances.max(), rtol=0.03)
    small = universal.fit_greedy(model, batches, KEY, attack=attack, epsilon=0.01, norm="l2", passes=1)
    assert np.linalg.norm(small.perturbation) <= 0.01 * (1 + 1e-5)


def test_the_fooling_rate_asks_for_a_change_and_not_for_the_truth():
    model, images = _one_class()
    nothing = universal.Universal(perturbation=jnp.zeros(SHAPE))
    batch = {"image": images, "label": np.ones(16, np.int32), "mask": np.arange(16) % 2 == 0}
    assert not universal.fooled(model, nothing, batch, KEY).any()
    assert len(universal.fooled(model, nothing, [batch, batch], KEY)) == 16


def _noisy(variables, images, keys):
    noise = jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys)
    return closed_forms.affine(variables, images) + 0.01 * noise


def test_a_model_that_draws_can_be_learned_from():
    model, images = _one_class()
    stochastic = classifier.wrap(_noisy, model.variables, stochastic=True)
    batch = {"image": images, "label": np.zeros(16, np.int32)}
    found = attacks.fit_universal(stochastic, batch, KEY, epsilon=0.02, steps=20)
    expected = attacks.fit_universal(model, batch, KEY, epsilon=0.02, steps=20)
    np.testing.assert_allclose(found.perturbation, expected.perturbation, atol=1e-6)


def test_mistakes_say_what_to_do():
    model, images = _one_class()
    batch = {"image": images, "label": np.zeros(16, np.int32)}
    for options, message in (
        ({}, "threat="),
        ({"epsilon": 8}, "8/255"),
        ({"epsilon": 0.1, "target": 2}, "0 to 1"),
        ({"epsilon": 0.1, "steps": 0}, "steps is 0"),
        ({"epsilon": 0.1, "relative_step": 0.0}, "positive"),
    ):
        with pytest.raises(errors.UserError, match=message):
            attacks.fit_universal(model, batch, KEY, **options)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, model)
    with pytest.raises(errors.UserError, match="NaN or infinite"):
        attacks.fit_universal(broken, batch, KEY, epsilon=0.1)
    with pytest.raises(errors.UserError, match="no minimal attack"):
        universal.fit_greedy(model, batch, KEY, attack=attacks.build("pgd", epsilon=0.1), epsilon=0.1)
