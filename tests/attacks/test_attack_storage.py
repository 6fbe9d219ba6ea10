"""Stored adversarial images: what is read back, what 8 bits undo, and that it is said."""

from __future__ import annotations

import dataclasses

import closed_forms
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import attacks, errors, files
from robust_vit.attacks import storage

SHAPE = (5, 4, 3)
COUNT = 7


def _given(epsilon, shape=SHAPE):
    """Images of 8 bits, and the result of an attack on an affine model."""
    model = closed_forms.model(0, shape, 2)
    images = (np.random.default_rng(1).integers(0, 256, (COUNT, *shape)) / 255).astype(np.float32)
    labels = np.asarray(model(jnp.asarray(images))).argmax(1).astype(np.int32)
    examples = {"image": images, "label": labels, "row": np.arange(20, 20 + COUNT, dtype=np.int32)}
    attack = attacks.build("fgsm", epsilon=epsilon, stop_on_success=False)
    return model, images, attacks.run(attack, model, examples, slots=4, keep_images=True)


@pytest.mark.parametrize("form", storage.FORMS)
def test_what_is_read_back_is_what_was_judged(form, tmp_path):
    model, images, found = _given(20.4 / 255)
    stored = attacks.save(tmp_path / "out", found, images, model, form=form, batch=4)
    again = attacks.load(tmp_path / "out")
    np.testing.assert_array_equal(again["images"], stored.images)
    for name in ("row", "label", "success", "prediction", "distance"):
        np.testing.assert_array_equal(again[name], getattr(stored, name))
    if form == "float":
        np.testing.assert_array_equal(stored.images, found.images)
        np.testing.assert_array_equal(stored.success, found.success)
    else:
        np.testing.assert_allclose(stored.images, found.images, atol=0.5001 / 255)
        np.testing.assert_allclose(255 * stored.images, np.round(255 * stored.images), atol=1e-4)
        # 20.4 levels are 20 as they are stored, unless the box is nearer.
        assert np.abs(stored.distance * 255 - 20).max() < 0.01
    logits = np.asarray(model(jnp.asarray(stored.images)))
    np.testing.assert_array_equal(stored.prediction, logits.argmax(1))
    np.testing.assert_array_equal(stored.success, stored.prediction != found.label)
    assert stored.warnings == ()
    assert len(list((tmp_path / "out").glob("*.png"))) == (COUNT if form == "png" else 0)


@pytest.mark.parametrize("form", ["uint8", "png"])
def test_less_than_half_a_level_vanishes_and_it_says_so(form, tmp_path):
    model, images, found = _given(0.45 / 255)
    # As if the attack had worked, to see the success go.
    found = dataclasses.replace(found, success=np.ones(COUNT, bool))
    stored = attacks.save(tmp_path, found, images, model, form=form)
    np.testing.assert_array_equal(stored.images, images)
    assert not stored.success.any()
    assert f"{COUNT} of {COUNT} perturbations vanish" in stored.warnings[0]
    assert "0.45/255" in stored.warnings[0]
    assert f"{COUNT} of {COUNT} successes are none" in stored.warnings[1]
    assert files.read_json(tmp_path / "summary.json")["warnings"] == list(stored.warnings)
    kept = _given(0.55 / 255)[2]
    assert np.abs(attacks.save(tmp_path / "more", kept, images, model, form=form).distance * 255 - 1).max() < 0.01


def test_one_channel_and_other_norms(tmp_path):
    model, images, found = _given(30 / 255, (6, 5, 1))
    stored = attacks.save(tmp_path, found, images, model, form="png", norm="l2")
    assert stored.images.shape == images.shape
    np.testing.assert_allclose(stored.distance, np.sqrt(np.square(stored.images - images).sum((1, 2, 3))), rtol=1e-5)


def test_mistakes_say_what_to_do(tmp_path):
    model, images, found = _given(0.1)
    with pytest.raises(errors.UserError, match="uint8"):
        attacks.save(tmp_path, found, images, model, form="jpeg")
    with pytest.raises(errors.UserError, match="same order"):
        attacks.save(tmp_path, found, images[:3], model)
    with pytest.raises(errors.UserError, match="keep_images=True"):
        attacks.save(tmp_path, dataclasses.replace(found, images=None), images, model)
    with pytest.raises(errors.UserError, match="holds no adversarial images"):
        attacks.load(tmp_path / "nothing")
