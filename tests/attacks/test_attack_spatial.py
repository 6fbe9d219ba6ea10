"""Roto-translation: break-even limits of models that read a place, which transform is returned, and the landscape."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import attacks, classifier, errors
from robust_vit.attacks import spatial

SIZE = 12


def _halves(variables, images):
    """Whether there is more light in the left half (0) or the right (1); or above (0) and below (1)."""
    mass = images.sum(axis=3)
    lateral = mass[:, :, SIZE // 2 :].sum(axis=(1, 2)) - mass[:, :, : SIZE // 2].sum(axis=(1, 2))
    vertical = mass[:, SIZE // 2 :].sum(axis=(1, 2)) - mass[:, : SIZE // 2].sum(axis=(1, 2))
    score = variables["lateral"] * lateral + (1 - variables["lateral"]) * vertical
    return jnp.stack([-score, score], axis=1)


def _model(lateral: float):
    return classifier.wrap(_halves, {"lateral": jnp.float32(lateral)})


def _dot(row: float, column: float) -> np.ndarray:
    """A spot of light of one pixel's mass at a place relative to the centre, in pixels."""
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    weight = np.maximum(1 - np.abs(y - row), 0) * np.maximum(1 - np.abs(x - column), 0)
    return weight[None, :, :, None].astype(np.float32)


@pytest.mark.parametrize(("limit", "broken"), [(2.3, False), (2.7, True)])
@pytest.mark.parametrize("options", [{"grid": (5, 1, 1)}, {"tries": 200}])
def test_a_shift_breaks_where_it_carries_the_light_over_the_middle(limit, broken, options):
    attack = attacks.build("roto_translation", shift=limit / SIZE, degrees=0.0, **options)
    keys = attacks.example_keys(0, np.arange(1))
    result = attack(_model(1.0), keys, _dot(0.5, 2.5), np.ones(1, np.int32))
    assert bool(result.success[0]) == broken


@pytest.mark.parametrize(("limit", "broken"), [(28.0, False), (33.0, True)])
def test_a_turn_breaks_where_it_carries_the_light_below_the_horizon(limit, broken):
    """The light stands 30 degrees above the horizon to the right: a clockwise turn of more brings it down."""
    image = _dot(-4 * np.sin(np.deg2rad(30)), 4 * np.cos(np.deg2rad(30)))
    attack = attacks.build("roto_translation", shift=0.0, degrees=limit, grid=(1, 1, 3), together=2)
    result = attack(_model(0.0), attacks.example_keys(0, np.arange(1)), image, np.zeros(1, np.int32))
    assert bool(result.success[0]) == broken


def _problem(count=20):
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(SIZE * SIZE, 3))
    images = rng.uniform(size=(count, SIZE, SIZE, 1)).astype(np.float32)
    model = classifier.wrap(_linear, {"w": jnp.asarray(weights, jnp.float32)})
    labels = np.array(model(jnp.asarray(images)).argmax(-1), np.int32)
    labels[:2] = (labels[:2] + 1) % 3
    return model, attacks.example_keys(0, np.arange(count)), images, labels


def _linear(variables, images):
    return images.reshape(images.shape[0], -1) @ variables["w"]


@pytest.mark.parametrize(
    ("options", "goal"),
    [({"grid": (3, 1, 3)}, "untargeted"), ({"grid": (3, 5, 1)}, "targeted"), ({"tries": 7}, "untargeted")],
)
def test_what_is_returned_is_read_off_the_landscape(options, goal):
    model, keys, images, labels = _problem()
    given = labels if goal == "untargeted" else (labels + 1) % 3
    for early in (True, False):
        attack = attacks.build(
            "roto_translation", shift=0.06, degrees=3.0, together=4, stop_on_success=early, goal=goal, **options
        )
        result = attack(model, keys, images, given)
        found = spatial.landscape(attack, model, keys, images, given)
        assert found.loss.shape == (attack.transforms, 20)
        assert 2 / 20 < np.asarray(result.success).mean() < 1
        np.testing.assert_array_equal(result.success, found.reached.any(axis=0))
        value = found.loss if goal == "untargeted" else -found.loss
        allowed = np.where(found.reached | ~found.reached.any(axis=0), value, -np.inf)
        first = np.where(found.reached.any(axis=0), found.reached.argmax(axis=0), value.argmax(axis=0))
        index = first if early else allowed.argmax(axis=0)
        chosen = found.parameters[index, np.arange(20)]
        expected = attack.transform(jnp.asarray(images), jnp.asarray(chosen))
        np.testing.assert_allclose(result.images, expected, atol=1e-6)
        np.testing.assert_allclose(result.loss, found.loss[index, np.arange(20)], rtol=1e-4, atol=1e-5)
        steps = np.where(found.reached.any(axis=0) & early, first // 4 + 1, attack.evaluations)
        np.testing.assert_array_equal(result.forward_passes, 4 * steps + 1)


def _parameters(attack, numbers):
    keys = attacks.example_keys(0, np.arange(len(numbers)))
    return np.asarray(jax.jit(attack.parameters)(keys, numbers))


def test_the_grid_is_the_paper_s_with_the_farthest_first():
    attack = attacks.build("roto_translation")
    assert attack.transforms == 775
    found = _parameters(attack, np.arange(775))
    assert len(np.unique(found.round(6), axis=0)) == 775
    np.testing.assert_array_equal(found[0], 0.0)
    axes = [np.linspace(-3 / 32, 3 / 32, 5)] * 2 + [np.linspace(-30, 30, 31)]
    for column, axis in enumerate(axes):
        np.testing.assert_allclose(np.unique(found[:, column].round(5)), axis, atol=1e-5)
    distance = ((found / [3 / 32, 3 / 32, 30]) ** 2).sum(axis=1)
    assert (np.diff(distance[1:]) < 1e-5).all()
    np.testing.assert_allclose(distance[1:9], 3.0, rtol=1e-5)
    assert attacks.build("roto_translation", grid=(2, 2, 2)).transforms == 9  # No centre: it is one more.
    turns = _parameters(attacks.build("roto_translation", grid=(1, 1, 3)), np.arange(3))
    np.testing.assert_allclose(turns, [[0, 0, 0], [0, 0, -30], [0, 0, 30]])


def test_draws_are_uniform_within_the_limits_and_more_of_them_are_no_weaker():
    attack = attacks.build("roto_translation", shift=0.2, degrees=50.0, tries=300)
    found = _parameters(attack, np.full(301, 5)) / [0.2, 0.2, 50.0]
    assert np.abs(found).max() <= 1
    # A uniform number in [-1, 1] has a variance of 1/3.
    assert np.abs(found.mean(axis=0)).max() < 5 * np.sqrt(1 / 3 / 301)
    assert np.abs(found.var(axis=0) - 1 / 3).max() < 5 * np.sqrt(4 / 45 / 301)
    model, keys, images, labels = _problem()
    success = []
    for tries in (3, 9):
        attack = attacks.build("roto_translation", shift=0.1, degrees=10.0, tries=tries)
        success.append(np.asarray(attack(model, keys, images, labels).success))
    assert (success[0] <= success[1]).all()
    assert success[0].sum() < success[1].sum()


def test_a_new_limit_compiles_nothing():
    model, keys, images, labels = _problem()
    traces = []

    def counted(pixels):
        traces.append(None)
        return model(pixels)

    wrapped = classifier.wrap(counted)
    attack = attacks.build("roto_translation", grid=(3, 3, 3))
    attack(wrapped, keys, images, labels)
    count = len(traces)
    attack.replace(degrees=np.float32(5.0), shift=np.float32(0.01))(wrapped, keys, images, labels)
    assert len(traces) == count > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shift": 3}, "3/32, not 3"),
        ({"degrees": -1.0}, "expected a number from 0"),
        ({"padding": "mirror"}, "unknown padding"),
        ({"grid": (5, 5)}, "three numbers"),
        ({"grid": (5, 5, 0)}, "turns is 0"),
        ({"tries": 0}, "tries is 0"),
    ],
)
def test_mistakes_are_told(options, words):
    with pytest.raises(errors.UserError, match=words):
        attacks.build("roto_translation", **options)
