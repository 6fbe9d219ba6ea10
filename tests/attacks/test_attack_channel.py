"""Cameras and the print-photo channel: identities, geometry in closed form, finite differences, draws, destruction."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from robust_vit import attacks, errors
from robust_vit.attacks import cameras, channel, jpeg, warps

PARTS = ("gain", "bias", "gamma", "tilt", "roll", "scale", "shift", "blur", "noise", "quality")


def _images(count=3, height=10, width=12, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=(count, height, width, 3)), dtype)


def _keys(count=3):
    return attacks.example_keys(1, np.arange(count))


def only(name, **options):
    """The channel with one part alone."""
    return attacks.print_photo(**{part: None for part in PARTS if part != name}, **options)


@jax.jit
def _pass(transform, keys, images):
    return transform(keys, images)


def test_without_strength_and_with_ranges_that_do_nothing_it_is_the_identity():
    images = jnp.broadcast_to(jnp.round(255 * _images()[..., :1]) / 255, (3, 10, 12, 3))
    np.testing.assert_array_equal(_pass(attacks.print_photo(strength=0.0), _keys(), images), images)
    still = attacks.print_photo(
        gain=(1, 1),
        bias=(0, 0),
        gamma=(1, 1),
        tilt=0,
        roll=0,
        scale=(1, 1),
        shift=0,
        blur=(0, 1),
        noise=(0, 0),
        quality=(100, 100),
    )
    still = still.replace(blur=(np.float32(0), np.float32(0)))
    # Of a grey image of 8 bits JPEG of quality 100 keeps all but its rounding.
    np.testing.assert_allclose(_pass(still, _keys(), images), images, atol=2.1 / 255)
    np.testing.assert_array_equal(attacks.print_photo(**dict.fromkeys(PARTS))(_keys(), images), images)


@pytest.mark.parametrize("part", PARTS)
def test_each_part_changes_the_image_more_with_strength_and_stays_in_the_box(part):
    images, keys = _images(), _keys()
    sizes = []
    for strength in (0.0, 0.3, 1.0):
        found = np.asarray(_pass(only(part, strength=strength), keys, images))
        assert found.min() >= 0
        assert found.max() <= 1
        sizes.append(np.abs(found - images).mean())
    # JPEG at any strength above zero rounds to 8 bits.
    assert sizes[0] == 0 < sizes[1] < sizes[2]


def test_draws_belong_to_the_key_and_a_part_left_out_changes_no_other():
    images, keys, transform = _images(), _keys(), attacks.print_photo()
    whole = np.asarray(_pass(transform, keys, images))
    order = np.asarray([2, 0, 1])
    np.testing.assert_allclose(_pass(transform, keys[order], images[order]), whole[order], atol=1e-5)
    same = jnp.broadcast_to(images[:1], images.shape)
    assert len({image.tobytes() for image in np.asarray(_pass(transform, keys, same))}) == 3
    noise = np.asarray(_pass(only("noise"), keys, same))
    with_gain = attacks.print_photo(**{part: None for part in PARTS if part not in ("noise", "gain")}, gain=(1.0, 1.0))
    np.testing.assert_allclose(_pass(with_gain, keys, same), noise, atol=1e-6)


def test_another_strength_compiles_nothing():
    images, keys = _images(), _keys()
    _pass(attacks.print_photo(strength=0.5), keys, images)
    before = _pass._cache_size()
    _pass(attacks.print_photo(strength=0.7, gain=(0.5, 1.5), quality=(30, 40)), keys, images)
    assert _pass._cache_size() == before


def test_gradients_are_those_of_finite_differences_and_finite_at_black_and_white():
    with jax.enable_x64(True):
        rng = np.random.default_rng(4)
        images = jnp.asarray(rng.uniform(0.3, 0.7, (3, 9, 8, 3)))
        direction, weights = (jnp.asarray(rng.normal(size=images.shape)) for _ in range(2))
        sequence, channel = attacks.views(angles=(20.0,), distances=(1.3,)), attacks.print_photo(quality=None)

        @jax.jit
        @jax.value_and_grad
        def value(images):
            return jnp.sum(weights * sequence(_keys(), channel(_keys(), images)))

        numeric = (value(images + 1e-7 * direction)[0] - value(images - 1e-7 * direction)[0]) / 2e-7
        assert abs(numeric) > 1e-3
        np.testing.assert_allclose(jnp.sum(direction * value(images)[1]), numeric, rtol=1e-5)
        extremes = jnp.stack([jnp.zeros((9, 8, 3)), jnp.ones((9, 8, 3)), images[0]])
        assert np.isfinite(value(extremes)[1]).all()


def test_the_blur_is_that_of_scipy():
    images = _images(2, 20, 17)
    found = jax.jit(cameras.blur, static_argnames="radius")(images, jnp.asarray([0.0, 1.5]), radius=6)
    np.testing.assert_array_equal(found[0], images[0])
    expected = ndimage.gaussian_filter(np.asarray(images[1], float), (1.5, 1.5, 0), mode="nearest", radius=6)
    np.testing.assert_allclose(found[1], expected, atol=1e-6)


def test_a_camera_sees_a_turned_plane_in_perspective():
    """By the pinhole: the edge that is turned away is seen nearer to the centre than the one turned towards."""
    angle, focal = 35.0, 1 / np.tan(np.deg2rad(cameras.FIELD_OF_VIEW) / 2)
    one = jnp.ones(1)
    maps = np.asarray(cameras.camera(jnp.asarray([[angle, 0.0]]), 0 * one, one, jnp.zeros((1, 2))))[0]
    cosine, sine = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    for x in (-1.0, 1.0):
        depth = focal + x * sine
        seen = np.asarray([focal * x * cosine / depth, focal * 0.5 / depth, 1.0])
        back = maps @ seen
        np.testing.assert_allclose(back[:2] / back[2], (x, 0.5), atol=1e-5)
    still = cameras.camera(jnp.zeros((1, 2)), 0 * one, one, jnp.zeros((1, 2)), aspect=1.7)
    np.testing.assert_array_equal(still[0], np.eye(3))
    flat = cameras.camera(jnp.zeros((1, 2)), 25 * one, 0.8 * one, jnp.asarray([[0.1, -0.2]]), aspect=1.7)
    expected = warps.similarity(25 * one, jnp.asarray([[0.1, -0.2]]), 0.8 * one, aspect=1.7)
    np.testing.assert_allclose(flat[0, :2], expected[0], atol=1e-6)


def test_views_are_every_distance_at_every_angle():
    sequence = attacks.views(distances=(1.0, 2.0), angles=(0.0, 40.0))
    images = jnp.ones((64, 32, 32, 1))
    seen = jax.jit(cameras.Views.at)(sequence, jnp.arange(64) % 4, images)
    share = np.asarray(seen[:4] > 0.75).mean(axis=(1, 2, 3))
    # From the front and near it fills the picture; at twice the distance a quarter of it; turned, less by about the cosine.
    assert share[0] == 1.0
    np.testing.assert_allclose(share[2], 0.25, atol=0.04)
    np.testing.assert_allclose(share[1], np.cos(np.deg2rad(40)), atol=0.08)
    drawn = np.asarray(_pass(sequence, _keys(64), images)).mean(axis=(1, 2, 3))
    assert len(np.unique(np.round(drawn, 4))) == 4


def test_the_destruction_rate_counts_attacks_that_worked():
    right = np.asarray([1, 1, 1, 1, 1, 0, 0], bool)
    fooled = np.asarray([1, 1, 1, 1, 0, 1, 1], bool)
    again = np.asarray([1, 0, 0, 0, 1, 1, 0], bool)
    assert attacks.destruction_rate(right, fooled, again).value == 0.25
    assert attacks.destruction_rate(right, ~right, again) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gain": (1.2, 0.8)}, "gain is"),
        ({"quality": (0, 50)}, "within \\[1, 100\\]"),
        ({"tilt": 90}, "tilt is 90"),
        ({"strength": -1}, "the identity"),
        ({"padding": "wrap"}, "padding"),
        ({"rounding": "hard"}, "rounding"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(options, message):
    with pytest.raises(errors.UserError, match=message):
        attacks.print_photo(**options)
    with pytest.raises(errors.UserError, match="views got"):
        attacks.views(distances=(0.5,))


def test_the_roundings_are_named():
    assert attacks.print_photo(rounding="soft").rounding is jpeg.soft
    assert isinstance(attacks.print_photo(), channel.Channel)
