"""What is refused before the first step: each wrong input and each broken model, with the remedy in one line."""

from __future__ import annotations

import broken_models
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import attacks, classifier, errors
from robust_vit.attacks import gradient, inputs

EPSILON = broken_models.EPSILON


def _given(**defects):
    model, images = broken_models.build(**defects), broken_models.images()
    return model, images, broken_models.labels(broken_models.build(), images)


class Declared(flax.struct.PyTreeNode):
    """A random model that says so."""

    inner: object
    size: float
    samples: int = flax.struct.field(pytree_node=False, default=3)
    stochastic: bool = flax.struct.field(pytree_node=False, default=True)

    def sample(self, images, keys):
        def one(key):
            return self.size * jax.random.normal(key, (self.samples, broken_models.CLASSES))

        return self.inner(images)[None] + jnp.moveaxis(jax.vmap(one)(keys), 1, 0)


def test_what_is_right_passes_and_says_how_many_classes():
    model, images, labels = _given()
    assert attacks.check_inputs(model, images, labels) == broken_models.CLASSES
    assert attacks.check_inputs(model, images, labels, (labels + 1) % broken_models.CLASSES) == broken_models.CLASSES
    assert attacks.check_inputs(model, images[:1], labels[:1]) == broken_models.CLASSES
    assert attacks.check_inputs(Declared(model, 0.5), images, labels) == broken_models.CLASSES


VALUES = {
    "bytes": (lambda x, y, t: (255 * x, y, t), "divide by 255"),
    "whole numbers": (lambda x, y, t: ((255 * x).astype(np.uint8), y, t), "divide uint8 by 255"),
    "normalised": (lambda x, y, t: ((x - x.mean()) / x.std(), y, t), "normalised already.*inside the model"),
    "NaN": (lambda x, y, t: (np.where(x > 0.6, np.nan, x), y, t), "hold NaN"),
    "flat": (lambda x, y, t: (x.reshape(len(x), -1), y, t), "batch, height, width, channels"),
    "one-hot": (lambda x, y, t: (x, np.eye(5, dtype=np.int32)[y], t), "argmax of one-hot"),
    "floats": (lambda x, y, t: (x, y.astype(np.float32), t), "class index"),
    "too few": (lambda x, y, t: (x, y[:-1], t), "class index"),
    "from one": (lambda x, y, t: (x, y + 1, t), "0 to 4"),
    "negative": (lambda x, y, t: (x, y - 1, t), "0 to 4"),
    "targets are labels": (lambda x, y, t: (x, y, y), "equal the label"),
    "one target is a label": (lambda x, y, t: (x, y, np.where(np.arange(len(y)) == 7, y, t)), "position 7"),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_wrong_value_is_told_with_its_remedy(name):
    change, message = VALUES[name]
    model, images, labels = _given()
    images, labels, targets = change(images, labels, (labels + 1) % broken_models.CLASSES)
    with pytest.raises(errors.UserError, match=message) as caught:
        attacks.check_inputs(model, images, labels, targets)
    assert "\n" not in str(caught.value)


MODELS = {
    "probabilities": (1.0, "before the softmax"),
    "stochastic": (1e-2, "second pass.*train=False.*stochastic=True"),
    "batch_normed": (1.0, "training mode"),
    "not_finite": (1.0, "NaN or infinite"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_no_attack_could_be_right_about_is_refused(name):
    size, message = MODELS[name]
    model, images, labels = _given(**{name: size})
    with pytest.raises(errors.UserError, match=message):
        attacks.check_inputs(model, images, labels)


@pytest.mark.parametrize("name", sorted(set(broken_models.DEFECTS) - set(MODELS)))
def test_what_is_for_the_guards_is_not_refused(name):
    model, images, labels = _given(**{name: 1.0})
    attacks.check_inputs(model, images, labels)


def test_logits_of_another_shape_are_refused():
    _, images, _ = _given()
    with pytest.raises(errors.UserError, match="two classes at least"):
        inputs.check_model(_single, images)


@jax.tree_util.Partial
def _single(images):
    return jnp.sum(images, axis=(1, 2, 3))[:, None]


def _attack(**options):
    return gradient.pgd(epsilon=EPSILON, steps=2, **options)


@pytest.mark.parametrize("name", MODELS)
def test_the_runner_refuses_such_a_model_before_any_step(name):
    size, message = MODELS[name]
    model, images, labels = _given(**{name: size})
    with pytest.raises(errors.UserError, match=message):
        attacks.run(_attack(), model, {"image": images, "label": labels}, slots=16)


def test_the_runner_sees_labels_given_as_targets():
    model, images, labels = _given()
    targeted = _attack(goal="targeted")
    with pytest.raises(errors.UserError, match="targets look like the labels"):
        attacks.run(targeted, model, {"image": images, "label": labels}, slots=16)
    assert len(
        attacks.run(targeted, model, {"image": images, "label": (labels + 1) % broken_models.CLASSES}, slots=16).row
    ) == len(images)


@pytest.mark.parametrize("library", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("name", ["bytes", "normalised", "NaN", "from one", "negative"])
def test_a_call_of_an_attack_looks_at_values_too(name, library):
    change, message = VALUES[name]
    model, images, labels = _given()
    images, labels, _ = change(images, labels, labels)
    keys = attacks.example_keys(0, np.arange(len(images)))
    with pytest.raises(errors.UserError, match=message):
        _attack()(model, keys, library(images), library(labels))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("library", [np.asarray, jnp.asarray])
def test_a_call_of_an_attack_looks_at_the_model_too(name, library):
    size, message = MODELS[name]
    model, images, labels = _given(**{name: size})
    keys = attacks.example_keys(0, np.arange(len(images)))
    with pytest.raises(errors.UserError, match=message):
        _attack()(model, keys, library(images), library(labels))


def test_a_model_is_looked_at_once_and_costs_one_pass(monkeypatch):
    looked = []
    monkeypatch.setattr(inputs, "check_model", lambda model, images, mesh: looked.append(len(images)))
    model, images, _ = _given()
    inputs.check_once(model, images)
    inputs.check_once(model, jnp.asarray(images[:5]))
    assert looked == [16]  # Three passes of a third of 48.
    # Other weights of the same structure are another model; the same weights in a new container are not.
    inputs.check_once(model.replace(variables=dict(model.variables)), images)
    assert looked == [16]
    inputs.check_once(broken_models.build(), images[:4])
    assert looked == [16, 2]
    jax.jit(lambda given: inputs.check_once(broken_models.build(), given))(images)
    assert looked == [16, 2]


def test_a_model_that_is_gone_lends_its_name_to_none(monkeypatch):
    """An array may get the number of one that is gone."""
    looked = []
    monkeypatch.setattr(inputs, "check_model", lambda model, images, mesh: looked.append(1))
    images = broken_models.images()
    kernel = np.ones(3)
    inputs.check_once([kernel], images)
    name, holds = next((name, holds) for name, holds in inputs._passed.items() if holds[0]() is kernel)
    other = np.ones(3)
    inputs._passed[name[0], (id(other),)] = holds
    inputs.check_once([other], images)
    assert len(looked) == 2
    for _ in range(2 * inputs.REMEMBERED):
        inputs.check_once([np.ones(3)], images)
    assert len(inputs._passed) <= inputs.REMEMBERED


def test_a_loss_that_is_not_finite_on_attacked_images_is_no_success():
    """The model passes on the images that are looked at, and not on the last one."""
    model, images = classifier.wrap(_dark), np.full((9, 2, 2, 2), 0.6, np.float32)
    images[-1] = 0.38
    keys, labels = attacks.example_keys(0, np.arange(9)), np.zeros(9, np.int32)
    with pytest.raises(errors.UserError, match="not finite on 1 of 9 attacked images"):
        _attack(random_start=False)(model, keys, images, labels)


def _dark(images):
    return images[:, 0, 0] * jnp.log(images[:, 0, 0, :1] - 0.4)


@pytest.mark.parametrize("build", [attacks.build, lambda *_, **options: attacks.build("apgd_ce", epsilon=0.1)])
def test_a_sweep_refuses_what_is_no_radius(build):
    attack = build("pgd", epsilon=0.1)
    assert attack.sweep([0.0, 8 / 255]).epsilon.shape == (2,)
    with pytest.raises(errors.UserError, match="from 0"):
        attack.sweep([8 / 255, -1.0])
    with pytest.raises(errors.UserError, match="8/255, not 8"):
        attack.sweep(jnp.asarray([2.0, 8.0]))


def test_inside_a_compiled_function_values_are_not_looked_at():
    model, images, labels = _given()
    keys = attacks.example_keys(0, np.arange(len(images)))
    found = jax.jit(lambda *arrays: _attack()(model, *arrays).success)(keys, images, labels)
    np.testing.assert_array_equal(found, _attack()(model, keys, images, labels).success)
