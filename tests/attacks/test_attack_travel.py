"""The length of travel to the boundary: exact for affine models, the first crossing, censored where there is none."""

from __future__ import annotations

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from robust_vit import attacks, classifier, errors
from robust_vit.attacks import travel

SHAPE = (3, 3, 2)


def _images(count: int, dtype=np.float64, low=0.3, high=0.7):
    return np.random.default_rng(5).uniform(low, high, (count, *SHAPE)).astype(dtype)


def _search(model, images, labels, **options):
    keys = attacks.example_keys(0, np.arange(len(images)))
    images, labels = jnp.asarray(images), jnp.asarray(labels, jnp.int32)
    directions, vanished = travel.gradient_directions(model, keys, images, labels)
    assert not np.asarray(vanished).any()
    return travel.search(model, keys, images, directions, labels, **options), np.asarray(directions)


def _logits(model, images):
    weights, bias = (np.asarray(model.variables[name], np.float64) for name in ("w", "b"))
    return images.reshape(len(images), -1) @ weights + bias


@pytest.mark.parametrize("classes", [2, 4])
def test_an_affine_model_without_a_box_is_left_at_the_exact_length(classes):
    with jax.enable_x64(True):
        model, images = closed_forms.model(3, SHAPE, classes, np.float64), _images(9)
        logits = _logits(model, images)
        labels = logits.argmax(axis=1)
        found, directions = _search(model, images, labels, clip=False)
        slopes = directions.reshape(9, -1) @ np.asarray(model.variables["w"])
        rows = np.arange(9)
        gaps = logits[rows, labels][:, None] - logits
        with np.errstate(divide="ignore", invalid="ignore"):
            lengths = gaps / (slopes - slopes[rows, labels][:, None])
        exact = np.where((lengths > 0) & (gaps > 0), lengths, np.inf).min(axis=1)
        assert found.crossed.all()
        np.testing.assert_allclose(found.epsilon, exact, rtol=0, atol=1e-3 * 2.0**-24 + 1e-13)
        np.testing.assert_allclose(np.sqrt((directions**2).mean(axis=(1, 2, 3))), 1.0, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_box_is_part_of_the_way(dtype):
    with jax.enable_x64(dtype == np.float64):
        model, images = closed_forms.model(3, SHAPE, 2, dtype), _images(11, dtype, 0.02, 0.98)
        labels = _logits(model, images).argmax(axis=1)
        found, directions = _search(model, images, labels)
        wide, directions = images.astype(np.float64), directions.astype(np.float64)
        for row in range(11):

            def gap(size, row=row):
                logits = _logits(model, np.clip(wide[row] + size * directions[row], 0, 1)[None])[0]
                return logits[labels[row]] - logits[1 - labels[row]]

            exact = scipy.optimize.brentq(gap, 0.0, 1.0, xtol=1e-14)
            assert abs(found.epsilon[row] - exact) < (2e-6 if dtype == np.float32 else 7e-11)
        without, _ = _search(model, images, labels, clip=False)
        assert (without.epsilon <= found.epsilon + 1e-7).all()
        assert (without.epsilon < found.epsilon - 1e-4).any()


def test_psnr_is_the_length_where_nothing_is_clipped():
    keys = attacks.example_keys(3, np.arange(5))
    images = jnp.full((5, *SHAPE), 0.5)
    directions = travel.random_directions(keys, images)
    moved = travel.move(images, directions, jnp.full(5, 0.02))
    error = np.mean((np.asarray(moved) - 0.5) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(-10 * np.log10(error), -20 * np.log10(0.02), rtol=1e-5)
    again = travel.random_directions(keys[3:], images[3:])
    np.testing.assert_array_equal(again, directions[3:])
    assert np.unique(np.asarray(directions).round(4), axis=0).shape[0] == 5


def _bent(variables, images):
    return jnp.tanh(images.reshape(len(images), -1) @ variables["u"]) @ variables["w"]


@jax.jit
def _class(model, images):
    return jnp.argmax(model(images), axis=-1)


def _walk(model, image, direction, label, stride):
    """One image's search as Kim et al.'s first author writes it: a step on while right, back and half as far where not."""
    size = 0.0
    for _ in range(2000):
        right = _class(model, jnp.clip(image + size * direction, 0.0, 1.0)[None])[0] == label
        if right:
            size += stride
        elif stride < 1e-10:
            return size
        else:
            size, stride = size - stride, stride / 2
    return None


def test_the_search_ends_where_the_walk_of_the_original_ends():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        variables = {"u": jnp.asarray(2 * rng.normal(size=(18, 16)) / 4), "w": jnp.asarray(rng.normal(size=(16, 4)))}
        model, images = classifier.wrap(_bent, variables), _images(5, low=0.0, high=1.0)
        labels = np.asarray(_class(model, jnp.asarray(images)))
        found, directions = _search(model, images, labels, stride=0.01, halvings=27)
        for row in np.flatnonzero(found.crossed):
            walked = _walk(model, images[row], directions[row], labels[row], 0.01)
            assert abs(walked - found.epsilon[row]) < 3e-10
        assert found.crossed.sum() >= 3


def _wave(variables, images):
    """Class 0 while the mean change of the pixels is in an even cell, class 1 in an odd one."""
    score = jnp.cos(jnp.pi * (images.mean(axis=(1, 2, 3)) - 0.1) / variables)
    return jnp.stack([score, -score], axis=1)


def test_the_first_crossing_counts_and_the_others_share_the_rows():
    # Cells of 0.01, 0.02, ...: each image leaves its first cell after half of one, comes back and leaves again.
    images, cell = jnp.full((6, *SHAPE), 0.1), 0.02
    model = classifier.wrap(_wave, jnp.float32(cell))
    keys, labels = attacks.example_keys(0, np.arange(6)), jnp.zeros(6, jnp.int32)
    speeds = jnp.asarray([1.0, 0.5, 0.25, 0.125, 1.0, 1.0])
    directions = speeds[:, None, None, None] * jnp.ones_like(images)
    found = travel.search(model, keys, images, directions, labels, limit=0.5)
    np.testing.assert_allclose(found.epsilon, 0.5 * cell / np.asarray(speeds), atol=2e-6)
    scanned = np.ceil(np.round(found.epsilon / 1e-3, 3)) + 1
    np.testing.assert_allclose(found.forward_passes, scanned + 24, atol=1)
    # Alone the slowest would have taken 80 calls of six rows; with the rows of those that are done, far fewer.
    assert found.executed < 6 * (24 + 45)


def test_what_never_crosses_is_censored_and_what_is_wrong_has_no_way_to_go():
    model = closed_forms.model(3, SHAPE, 2)
    images = _images(6, np.float32)
    labels = _logits(model, images).argmax(axis=1)
    labels[4] = 1 - labels[4]
    keys = attacks.example_keys(0, np.arange(6))
    still = jnp.zeros_like(images)
    found = travel.search(
        model, keys, jnp.asarray(images), still, jnp.asarray(labels, jnp.int32), stride=0.1, limit=0.8
    )
    np.testing.assert_array_equal(found.crossed, np.arange(6) == 4)
    np.testing.assert_allclose(found.epsilon, np.where(np.arange(6) == 4, 0.0, 0.8))
    np.testing.assert_array_equal(found.forward_passes, np.where(np.arange(6) == 4, 1, 9))


def test_neighbours_do_not_matter():
    model, images = closed_forms.model(3, SHAPE, 3), _images(8, np.float32)
    labels = _logits(model, images).argmax(axis=1)
    labels[2] = (labels[2] + 1) % 3
    whole, _ = _search(model, images, labels, stride=0.01)
    order = np.random.default_rng(0).permutation(8)
    shuffled, _ = _search(model, images[order], labels[order], stride=0.01)
    np.testing.assert_array_equal(shuffled.epsilon, whole.epsilon[order])
    for rows in (slice(0, 1), slice(1, 8)):
        part, _ = _search(model, images[rows], labels[rows], stride=0.01)
        np.testing.assert_allclose(part.epsilon, whole.epsilon[rows], atol=2e-6)


def _drawn(weights, images, keys):
    """A linear model with a bias that is drawn anew for every key: along one ray, with one key, one function."""
    draws = jax.vmap(lambda key: jax.random.normal(key, ()))(keys)
    return images.reshape(len(images), -1) @ weights + jnp.stack([draws, -draws], axis=1)


def test_a_stochastic_model_is_one_function_along_a_ray():
    images = _images(4, np.float32)
    weights = np.random.default_rng(1).normal(size=(18, 2))
    model = classifier.wrap(_drawn, jnp.asarray(weights, jnp.float32), stochastic=True)
    labels = np.zeros(4, int)
    first, _ = _search(model, images, labels, stride=0.01)
    second, _ = _search(model, images, labels, stride=0.01)
    np.testing.assert_array_equal(first.epsilon, second.epsilon)


@pytest.mark.parametrize("options", [{"stride": 0.0}, {"stride": 2.0}, {"halvings": -1}])
def test_a_scan_that_is_none_is_refused(options):
    model, images = closed_forms.model(3, SHAPE, 2), _images(2, np.float32)
    with pytest.raises(errors.UserError, match="expected 0 < stride <= limit"):
        _search(model, images, np.zeros(2, int), **options)
