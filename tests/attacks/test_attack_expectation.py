"""Expectation over transformations: mean gradients in closed form, draws of a model's own, float32 twins, bad input."""

from __future__ import annotations

import closed_forms
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import attacks, classifier, errors, losses
from robust_vit.attacks import evaluation

SHAPE = (3, 3, 2)


def _images(count, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=(count, *SHAPE)), jnp.float32)


def _keys(count):
    return attacks.example_keys(3, np.arange(count))


def gains(keys, images):
    """Every image times a number of its own."""
    return images * jax.vmap(lambda key: jax.random.uniform(key, (), images.dtype, 0.5, 1.5))(keys)[:, None, None, None]


def noisy(variables, images, keys):
    """An affine model with noise on its logits."""
    logits = closed_forms.affine(variables, images)
    return logits + jax.vmap(lambda key: jax.random.normal(key, logits.shape[1:]))(keys)


def bent(variables, images, keys):
    """A model of one hidden layer, with noise on its pixels."""
    noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(keys)
    return jnp.tanh((images + 0.25 * noise).reshape(len(images), -1) @ variables["u"]) @ variables["w"]


def _first_logit(logits, labels):
    del labels
    return logits[:, 0]


def test_the_gradient_of_a_linear_model_is_the_mean_over_the_draws():
    model, images, keys = closed_forms.model(0, SHAPE, 3), _images(5), _keys(5)
    asked = attacks.expectation(model, transform=gains, samples=7)
    labels = jnp.zeros(5, jnp.int32)
    found = evaluation.ascent(_first_logit, asked, images, keys, labels)
    draws = jax.vmap(
        lambda key: jax.vmap(lambda one: jax.random.uniform(one, (), jnp.float32, 0.5, 1.5))(jax.random.split(key, 7))
    )(jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, 0x6D6F6465), 0))(keys))
    weights = np.asarray(model.variables["w"])[:, 0].reshape(SHAPE)
    np.testing.assert_allclose(
        found.gradients, np.asarray(draws).mean(1)[:, None, None, None] * weights[None], rtol=1e-5
    )
    assert evaluation.passes(asked) == 7


def test_called_directly_it_is_the_logarithm_of_the_mean_probability_and_the_same_each_time():
    model, images = closed_forms.model(1, SHAPE, 4), _images(6)
    asked = attacks.expectation(model, transform=gains, samples=5)
    responses = asked.sample(images, classifier.same_draws(images))
    assert responses.shape == (5, 6, 4)
    expected = jnp.log(jnp.mean(jax.nn.softmax(responses), axis=0))
    np.testing.assert_allclose(asked(images), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jnp.exp(asked(images)).sum(1), 1.0, rtol=1e-5)
    # The draws do not depend on the place in the batch.
    np.testing.assert_allclose(asked(images)[2:3], asked(images[2:3]), rtol=1e-5)


def test_a_model_that_draws_is_averaged_over_its_own_draws():
    affine = closed_forms.model(2, SHAPE, 3)
    model = classifier.wrap(noisy, affine.variables, stochastic=True)
    images, keys = _images(4), _keys(4)
    assert model.sample(images, keys).shape == (1, 4, 3)
    np.testing.assert_array_equal(model(images), model(images))
    assert not np.array_equal(model(images, keys=keys), model(images))
    asked = attacks.expectation(model, samples=4000)
    residuals = asked.sample(images, keys) - affine(images)[None]
    # Standard normal noise: the mean of 4,000 draws is within 5 / sqrt(4000) of zero, their deviation near one.
    assert np.abs(np.asarray(residuals.mean(0))).max() < 0.08
    np.testing.assert_allclose(residuals.std(0), 1.0, atol=0.06)
    both = attacks.expectation(attacks.expectation(model, samples=2), transform=gains, samples=3)
    assert both.samples == 6
    assert both.sample(images, keys).shape == (6, 4, 3)


def test_the_draws_of_every_example_and_evaluation_differ():
    model = classifier.wrap(noisy, closed_forms.model(2, SHAPE, 3).variables, stochastic=True)
    images = jnp.broadcast_to(_images(1), (5, *SHAPE))
    one, two = (np.asarray(evaluation.logits(model, images, _keys(5), draw)) for draw in (0, 1))
    assert len({row.tobytes() for row in np.concatenate([one, two])}) == 10


def test_attacks_climb_the_mean_and_count_all_passes():
    """Gains leave the direction of an affine model's gradient as it is: the attack breaks what lies within the radius."""
    model, images, keys = closed_forms.model(3, SHAPE, 2), _images(8, 2), _keys(8)
    labels = jnp.argmax(model(images), axis=-1).astype(jnp.int32)
    attack = attacks.build("pgd", epsilon=0.25, steps=5)
    result = attack(attacks.expectation(model, transform=gains, samples=4), keys, images, labels)
    assert np.asarray(result.distance).max() <= 0.25 * (1 + 1e-5)
    assert (np.asarray(result.backward_passes) % 4 == 0).all()
    clean = losses.margin(attacks.expectation(model, transform=gains, samples=4)(images), labels)
    assert (np.asarray(result.loss) > 0).all()
    assert np.asarray(result.success).sum() >= np.asarray(clean > 0).sum()
    examples = {"image": np.asarray(images), "label": np.asarray(labels)}
    run = attacks.run(attack, attacks.expectation(model, transform=gains, samples=4), examples, slots=4, seed=3)
    np.testing.assert_array_equal(run.success, result.success)


@pytest.mark.parametrize("name", ["pgd", "adam", "apgd_ce", "square"])
def test_a_first_lucky_draw_is_not_what_is_returned(name):
    """Measured on 64 images, broken with and without an end at the first success: PGD 14 and 38 %, APGD-CE 30 and 41 %."""
    rng = np.random.default_rng(0)
    variables = {"u": 2 * rng.normal(size=(18, 32)) / np.sqrt(18), "w": rng.normal(size=(32, 4))}
    variables = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), variables)
    model = attacks.expectation(classifier.wrap(bent, variables, stochastic=True), samples=20)
    images, keys = _images(64, 5), _keys(64)
    labels = jnp.argmax(attacks.expectation(model.model, samples=400)(images), axis=-1).astype(jnp.int32)
    attack = attacks.build(name, epsilon=0.05, **({"queries": 200} if name == "square" else {"steps": 30}))
    ending = type("Ending", (type(attack),), {"against": lambda self, model: self})(**vars(attack))
    early, late = (np.mean(one(model, keys, images, labels).success) for one in (ending, attack))
    assert late > early


class _Dense(nn.Module):
    dtype: str = "float32"

    @nn.compact
    def __call__(self, images, *, gates=None):
        return nn.Dense(4, dtype=self.dtype)(images.reshape(images.shape[0], -1)), {}


def test_the_float32_twin_is_that_of_the_model_inside():
    spec = classifier.ImageSpec(SHAPE[:2], 2, mean=(0.5,), std=(0.5,))
    model = classifier.Classifier(_Dense().init(jax.random.key(0), _images(1)), _Dense("bfloat16"), spec)
    asked = attacks.expectation(attacks.expectation(model, transform=gains, samples=2), transform=gains, samples=2)
    assert classifier.in_float32(asked).model.model.module.dtype == "float32"


def test_equal_wrappers_are_one_program():
    model = closed_forms.model(0, SHAPE, 3)
    first, second = (attacks.expectation(model, transform=gains, samples=2) for _ in range(2))
    assert jax.tree.structure(first) == jax.tree.structure(second)


def test_nothing_to_average_is_an_error():
    model = closed_forms.model(0, SHAPE, 3)
    with pytest.raises(errors.UserError, match="stochastic=True"):
        attacks.expectation(model)
    with pytest.raises(errors.UserError, match="samples is 0"):
        attacks.expectation(model, transform=gains, samples=0)
