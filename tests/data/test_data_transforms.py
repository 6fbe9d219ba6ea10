"""Transforms against closed forms: exact crops, exact shares, what stays as it was."""

from __future__ import annotations

import numpy as np
import pytest

from robust_vit import errors
from robust_vit.data import draws, transforms

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
HALF = 0.5

# One row for each registered transform: (string, expected shape of IMAGE after it).
TABLE = {
    "resize": ("resize(10)", (10, 15, 3)),
    "center_crop": ("center_crop(12)", (12, 12, 3)),
    "pad_crop": ("pad_crop(4)", (20, 30, 3)),
    "flip": ("flip()", (20, 30, 3)),
    "random_resized_crop": ("random_resized_crop(16, 0.08, 1.0)", (16, 16, 3)),
}


def _apply(text: str, image: np.ndarray, uniforms: np.ndarray | None = None) -> np.ndarray:
    transform = transforms.parse(text)
    if not transform.draws:
        return transform.apply(image)
    return transform.apply(image, np.full(transform.draws, HALF) if uniforms is None else uniforms)


def test_the_table_is_the_registry():
    assert set(TABLE) == set(transforms.TRANSFORMS)


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("channels", [1, 3])
def test_shape_and_dtype(name, channels):
    text, shape = TABLE[name]
    out = _apply(text, IMAGE[..., :channels])
    assert out.shape == (*shape[:2], channels)
    assert out.dtype == np.uint8


def test_pad_crop_takes_every_place_of_the_padded_image_equally():
    padded = np.pad(IMAGE, ((2, 2), (2, 2), (0, 0)))
    places = {}
    for u in draws.uniforms(np.arange(2500), seed=0, purpose="test", count=2):
        out = _apply("pad_crop(2)", IMAGE, u)
        top, left = int(u[0] * 5), int(u[1] * 5)
        np.testing.assert_array_equal(out, padded[top : top + 20, left : left + 30])
        places[top, left] = places.get((top, left), 0) + 1
    assert len(places) == 25
    assert min(places.values()) > 60  # 100 expected, standard deviation 10.
    assert max(places.values()) < 140


def test_pad_crop_reflects():
    padded = np.pad(IMAGE, ((3, 3), (3, 3), (0, 0)), mode="reflect")
    np.testing.assert_array_equal(_apply("pad_crop(3, 'reflect')", IMAGE, np.asarray([0.0, 0.99])), padded[:20, 6:])


def test_flip_mirrors_with_its_probability():
    np.testing.assert_array_equal(_apply("flip(0.3)", IMAGE, np.asarray([0.29])), IMAGE[:, ::-1])
    np.testing.assert_array_equal(_apply("flip(0.3)", IMAGE, np.asarray([0.3])), IMAGE)


def test_random_resized_crop_keeps_share_and_ratio():
    rows, columns = np.mgrid[:200, :200].astype(np.uint8)
    image = np.stack([rows, columns, rows], -1)
    shares, ratios = [], []
    for u in draws.uniforms(np.arange(400), seed=0, purpose="test", count=22):
        out = _apply("random_resized_crop(400, 0.1, 0.4, 'nearest')", image, u).astype(int)
        height, width = np.ptp(out[..., 0]) + 1, np.ptp(out[..., 1]) + 1
        shares.append(height * width / 200**2)
        ratios.append(width / height)
    shares, ratios = np.asarray(shares), np.asarray(ratios)
    assert shares.min() > 0.095  # Sides are rounded to pixels.
    assert shares.max() < 0.405
    np.testing.assert_allclose(shares.mean(), 0.25, atol=0.02)  # Standard error .004.
    assert ratios.min() > 0.74
    assert ratios.max() < 1.35
    np.testing.assert_allclose(np.log(ratios).mean(), 0, atol=0.04)


def test_random_resized_crop_of_an_extreme_image_falls_back_to_the_centre():
    image = np.zeros((10, 1000, 1), np.uint8)
    image[:, 493:506] = 200
    out = _apply("random_resized_crop(8, 0.9, 1.0)", image)
    assert out.min() == 200  # 13 x 10: as wide as the ratio 4/3 allows, in the middle.


def test_resize_of_a_constant_and_to_the_same_size():
    assert (_apply("resize(7)", np.full((20, 30, 3), 77, np.uint8)) == 77).all()
    assert _apply("resize(20)", IMAGE) is IMAGE
    assert _apply("resize((5, 9), 'bicubic')", IMAGE).shape == (5, 9, 3)


def test_center_crop_is_the_middle():
    np.testing.assert_array_equal(_apply("center_crop(10)", IMAGE), IMAGE[5:15, 10:20])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pad_crp(4)", "did you mean 'pad_crop'"),
        ("pad_crop(4, 5, 6)", "too many positional"),
        ("resize(size=3, filtr='box')", "filtr"),
        ("resize(3, 'bicubik')", "did you mean 'bicubic'"),
        ("resize(__import__('os'))", "not understood"),
        ("resize(", "not understood"),
        ("pad_crop(1, 'wrap')", "padding mode"),
    ],
)
def test_mistakes_are_one_line(text, message):
    with pytest.raises(errors.UserError, match=message) as caught:
        transforms.parse(text)
    assert "\n" not in str(caught.value)


def test_a_string_in_place_of_a_tuple():
    with pytest.raises(errors.UserError, match="give a tuple"):
        transforms.parse_all("flip()")


def test_center_crop_of_a_small_image_says_what_to_do():
    with pytest.raises(errors.UserError, match=r"put resize\(25\) before"):
        _apply("center_crop(25)", IMAGE)
