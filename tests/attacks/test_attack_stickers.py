"""Stickers: the mask, penalties in closed form, printable colours, success over a sequence of views, bad input."""

from __future__ import annotations

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_vit import attacks, classifier, errors, losses
from robust_vit.attacks import stickers

SHAPE = (6, 6, 3)


def _given(count=6):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(0.3, 0.7, (count, *SHAPE)), jnp.float32)
    model = closed_forms.model(1, SHAPE, 3)
    return model, attacks.example_keys(0, np.arange(count)), images, jnp.argmax(model(images), 1).astype(jnp.int32)


def _mask():
    mask = np.zeros(SHAPE[:2], bool)
    mask[1:3, 2:5] = True
    return mask


def test_only_what_is_under_the_mask_changes_and_there_the_best_is_found():
    model, keys, images, labels = _given()
    attack = attacks.build("stickers", mask=_mask(), steps=60, loss="margin")
    result = attack(model, keys, images, labels)
    changed = np.abs(np.asarray(result.images - images)).max(-1) > 0
    assert not changed[:, ~_mask()].any()
    # Of an affine model every pixel under the mask ends at the side of the box that its weight says.
    weights = np.asarray(model.variables["w"]).reshape(*SHAPE, 3)
    logits = np.asarray(model(result.images))
    for row, label in enumerate(np.asarray(labels)):
        best = []
        for other in set(range(3)) - {int(label)}:
            direction = (weights[..., other] - weights[..., label]) * _mask()[..., None]
            room = np.where(direction > 0, 1 - images[row], images[row])
            start = np.asarray(model(images[row : row + 1]))[0]
            best.append(start[other] - start[label] + np.sum(np.abs(direction) * room))
        reached = np.max(np.delete(logits[row], label)) - logits[row, label]
        # The margin follows the best other class of the moment, which need not be the best in the end.
        assert min(best) - 1e-3 <= reached <= max(best) + 1e-3


def test_penalties_in_closed_form():
    mask = jnp.ones((2, 4, 4, 1), bool)
    palette = jnp.asarray([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    images = jnp.stack([jnp.zeros((4, 4, 3)), jnp.full((4, 4, 3), 0.5)])
    expected = [0.0, 16 * 0.75]
    np.testing.assert_allclose(stickers.non_printability(images, mask, palette), expected, atol=0.05)
    np.testing.assert_array_equal(stickers.total_variation(images, mask), 0.0)
    steps = jnp.broadcast_to((jnp.arange(4) >= 2)[None, None, :, None], (2, 4, 4, 3)).astype(jnp.float32)
    np.testing.assert_allclose(stickers.total_variation(steps, mask), 4 * np.sqrt(3), rtol=1e-2)
    np.testing.assert_allclose(
        stickers.total_variation(steps, mask & (jnp.arange(4) < 1)[None, :, None, None]), 3**0.5, rtol=1e-2
    )


def test_penalties_make_stickers_printable_and_smooth():
    model, keys, images, labels = _given()
    palette = np.asarray([[0.1, 0.1, 0.1], [0.9, 0.2, 0.2], [0.95, 0.95, 0.9]])
    # A goal that is never reached, so that the last images come back; weights are numbers, so all are one program.
    labels = jnp.asarray(np.asarray(model(images)).argmin(1), jnp.int32)
    weights = {"printability": 1e-9, "smoothness": 0.0, "size": 0.0}
    common = {"mask": _mask(), "steps": 60, "loss": _flat, "goal": "targeted", "colours": palette}
    plain, printable, smooth, small = (
        attacks.build("stickers", **common, **{**weights, **given})(model, keys, images, labels).images
        for given in ({}, {"printability": 1.0}, {"smoothness": 1.0}, {"size": 1.0})
    )
    mask = jnp.broadcast_to(jnp.asarray(_mask())[None, :, :, None], (6, 6, 6, 1))
    colours = jnp.asarray(palette, jnp.float32)
    score = [np.asarray(stickers.non_printability(x, mask, colours)) for x in (plain, printable)]
    assert (score[1] < 0.1 * score[0]).all()
    assert (stickers.total_variation(smooth, mask) < 0.5 * stickers.total_variation(plain, mask)).all()
    assert np.abs(small - images).max() < 0.5 * np.abs(plain - images).max()


def _flat(logits, labels):
    del labels
    return 0.0 * logits[:, 0]


def test_over_a_sequence_of_views_it_holds_where_one_for_the_front_does_not():
    model, images = closed_forms.model(4, (12, 12, 1), 2), np.random.default_rng(2).uniform(size=(16, 12, 12, 1))
    images, keys = jnp.asarray(images, jnp.float32), attacks.example_keys(0, np.arange(16))
    sequence = attacks.views(distances=(1.0, 1.5), angles=(-30.0, 0.0, 30.0))

    @jax.jit
    def ask(images):
        return jnp.stack([model(sequence.at(index, images)) for index in range(6)])

    # The view from the front and near: the second of the six.
    labels = (1 - jnp.argmax(ask(images)[1], axis=-1)).astype(jnp.int32)
    mask = np.zeros((12, 12))
    mask[3:9, 3:9] = 1
    attack = attacks.build("stickers", mask=mask, steps=25, goal="targeted")
    margins = {}
    for name, asked in (("front", model), ("views", attacks.expectation(model, transform=sequence, samples=6))):
        logits = ask(attack(asked, keys, images, labels).images)
        margins[name] = np.asarray(jax.vmap(lambda one: losses.margin(one, labels))(logits))
    # A margin below zero reaches the target. Each is best at what it was made for.
    assert (margins["front"][1] < 0).all()
    assert margins["front"][1].mean() < margins["views"][1].mean()
    assert margins["views"].mean() < margins["front"].mean()
    assert (margins["views"] < 0).mean() >= (margins["front"] < 0).mean()


def _bright(images):
    mean = images.mean(axis=(1, 2, 3))
    return jnp.stack([0.46 - mean, mean - 0.46, mean - 10.0], axis=-1)


def test_the_table_by_view_counts_images_that_are_recognised_from_there():
    """A picture of one shade, mid-grey beside it: from four times the distance a dark one is too small to be told."""
    shades = jnp.asarray([0.2, 0.2, 0.2])
    clean, stuck = (
        jnp.broadcast_to(s[:, None, None, None], (3, 16, 16, 1)) for s in (shades, jnp.asarray([0.8, 0.2, 0.35]))
    )
    model, keys, labels = classifier.wrap(_bright), attacks.example_keys(0, np.arange(3)), jnp.zeros(3, jnp.int32)
    sequence = attacks.views(distances=(1.0, 2.0, 4.0), angles=(0.0,))
    found = stickers.by_view(model, sequence, keys, clean, stuck, labels)
    np.testing.assert_array_equal(found.right, [[True] * 3, [True] * 3, [False] * 3])
    np.testing.assert_array_equal(found.success[:2], [[True, False, False], [True, False, True]])
    rows = found.table().rows
    assert [row[:2] for row in rows] == [(1.0, 0.0), (2.0, 0.0), (4.0, 0.0), ("all", "all")]
    assert [row[2] and row[2].value for row in rows] == [1 / 3, 2 / 3, None, 1 / 2]
    aimed = stickers.by_view(model, sequence, keys, clean, stuck, labels, targets=labels + 2)
    assert not aimed.success.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": np.full((4, 4), 0.5)}, "of 0 and 1"),
        ({"mask": np.zeros((4, 4))}, "with a 1 in it"),
        ({"mask": np.ones((4, 4, 1))}, "height, width"),
        ({"colours": np.full((2, 3), 255.0)}, "in \\[0, 1\\]"),
        ({"smoothness": -1.0}, "smoothness is -1"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_mistakes_say_what_to_do(options, message):
    with pytest.raises(errors.UserError, match=message):
        attacks.build("stickers", **options)


def test_a_mask_of_another_size_is_told():
    model, keys, images, labels = _given()
    with pytest.raises(errors.UserError, match="the mask is"):
        attacks.build("stickers", mask=np.ones((4, 4)), steps=1)(model, keys, images, labels)
