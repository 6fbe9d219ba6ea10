"""HopSkipJump: decisions are all it sees, affine models within a measured factor, its schedule, starts, and what it returns."""

from __future__ import annotations

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import attacks, classifier, errors
from robust_vit.attacks import skeleton

SHAPE = (3, 3, 2)
COUNT = 8


def _problem(classes=2, seed=3):
    model = closed_forms.model(seed, SHAPE, classes)
    images = np.random.default_rng(1).uniform(0.2, 0.8, size=(COUNT, *SHAPE)).astype(np.float32)
    labels = np.array(model(jnp.asarray(images)).argmax(-1), np.int32)
    return model, images, labels, attacks.example_keys(0, np.arange(COUNT))


@pytest.mark.parametrize(("norm", "most"), [("l2", 1.02), ("linf", 1.1)])
def test_an_affine_model_is_met_close_to_the_exact_distance(norm, most):
    """With 15 rounds from 40 directions all eight end within 2 % of the exact distance in L2, 10 % in the maximum norm."""
    model, images, labels, keys = _problem()
    exact = closed_forms.distances(norm, model, images, labels)
    attack = attacks.build("hop_skip_jump", norm=norm, rounds=15, probes=40)
    result = attack(model, keys, images, labels)
    assert np.asarray(result.success).all()
    ratio = np.asarray(result.distance) / exact
    assert ratio.min() > 1 - 1e-4
    assert ratio.max() < most, ratio


def _decision(variables, images):
    """One class's logit is 3, the others are 0: the argmax of the affine model and nothing else of it."""
    chosen = jnp.argmax(closed_forms.affine(variables, images), axis=-1)
    return 3.0 * jax.nn.one_hot(chosen, variables["b"].shape[0])


@pytest.mark.parametrize("goal", ["untargeted", "targeted"])
def test_decisions_are_all_that_it_sees(goal):
    model, images, labels, keys = _problem(classes=3)
    attack = attacks.build("hop_skip_jump", rounds=3, probes=20, goal=goal, references=images[:3])
    given = labels if goal == "untargeted" else (labels + 1) % 3
    found = [attack(each, keys, images, given) for each in (model, classifier.wrap(_decision, model.variables))]
    for field in ("images", "success", "distance", "prediction", "forward_passes"):
        np.testing.assert_array_equal(getattr(found[0], field), getattr(found[1], field))


def test_every_query_is_planned():
    attack = attacks.build("hop_skip_jump", rounds=3, probes=25, narrowings=4, together=10, starts=2)
    # Starts and a line; then each round its directions (25, 36 and 44, in steps of 10), a step and a line.
    assert attack.evaluations == 2 + 4 + (3 + 1 + 4) + (4 + 1 + 4) + (5 + 1 + 4)
    assert attack.step_passes == (10, 0)
    schedule = attack.schedule
    np.testing.assert_array_equal(schedule.probes[schedule.probes > 0], [30, 40, 50])
    np.testing.assert_array_equal(schedule.round[schedule.last & (schedule.kind == 1)], [0, 1, 2, 3])
    assert 19_000 < 10 * attacks.build("hop_skip_jump").evaluations < 20_000


def test_the_nearest_of_all_images_asked_about_is_returned():
    model, images, labels, keys = _problem()
    asked = []

    def recorded(pixels):
        jax.debug.callback(lambda given: asked.append(np.array(given)), pixels, ordered=True)
        return model(pixels)

    attack = attacks.build("hop_skip_jump", rounds=2, probes=10, together=4, starts=2)
    state = attack.init(keys, images, labels)
    advance = jax.jit(lambda state: skeleton.advance(state, 0, attack, recorded))
    for _ in range(attack.evaluations):
        state = advance(state)
    jax.effects_barrier()
    asked = np.concatenate([pixels.reshape(COUNT, 4, *SHAPE) for pixels in asked], axis=1)
    assert asked.min() >= 0
    assert asked.max() <= 1
    wrong = np.asarray(model(asked.reshape(-1, *SHAPE)).argmax(-1)).reshape(COUNT, -1) != labels[:, None]
    distances = np.where(wrong, np.linalg.norm((asked - images[:, None]).reshape(COUNT, -1, 18), axis=-1), np.inf)
    np.testing.assert_allclose(state.nearest, distances.min(axis=1), rtol=1e-6)
    for row, index in enumerate(distances.argmin(axis=1)):
        np.testing.assert_array_equal(state.best[row], asked[row, index])


def _corner(variables, images):
    """Class 1 in a small corner that noise does not hit: all pixels above 0.9."""
    inside = (images.reshape(images.shape[0], -1) - variables["edge"]).min(axis=1)
    return jnp.stack([-inside, inside], axis=1)


def test_a_class_that_noise_does_not_hit_is_reached_from_a_reference():
    _, images, _, keys = _problem()
    model = classifier.wrap(_corner, {"edge": jnp.float32(0.9)})
    targets = np.ones(COUNT, np.int32)
    options = {"rounds": 10, "probes": 40, "goal": "targeted"}
    lost = attacks.build("hop_skip_jump", **options, starts=3)(model, keys, images, targets)
    assert not np.asarray(lost.success).any()
    np.testing.assert_array_equal(lost.images, images)
    np.testing.assert_array_equal(lost.forward_passes, 3 * 10 + 1)  # Without a start nothing more is asked.
    references = np.stack([images[0], np.full(SHAPE, 0.97, np.float32)])
    for goal, given in (("targeted", targets), ("untargeted", 1 - targets)):
        attack = attacks.build("hop_skip_jump", **{**options, "goal": goal}, references=references)
        result = attack(model, keys, images, given)
        assert np.asarray(result.success).all()
        exact = np.linalg.norm(0.9 - images.reshape(COUNT, -1), axis=1)
        ratio = np.asarray(result.distance) / exact
        assert ratio.min() > 1 - 1e-4
        assert ratio.max() < 1.1, ratio


def test_mistakes_are_told():
    with pytest.raises(errors.UserError, match="defined for l2 and linf"):
        attacks.build("hop_skip_jump", norm="l1")
    with pytest.raises(errors.UserError, match="together is 1"):
        attacks.build("hop_skip_jump", together=1)
    with pytest.raises(errors.UserError, match="one image a class"):
        attacks.build("hop_skip_jump", references=np.zeros((4, 4, 3)))
