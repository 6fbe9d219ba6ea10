"""Transforms against closed forms: exact crops, exact shares, what stays as it was."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from PIL import Image

from robust_vit import errors
from robust_vit.data import draws, rand_augment, resampling, transforms

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
HALF = 0.5

# One row for each registered transform: (string, expected shape of IMAGE after it).
TABLE = {
    "resize": ("resize(10)", (10, 15, 3)),
    "center_crop": ("center_crop(12)", (12, 12, 3)),
    "pad_crop": ("pad_crop(4)", (20, 30, 3)),
    "flip": ("flip()", (20, 30, 3)),
    "random_resized_crop": ("random_resized_crop(16, 0.08, 1.0)", (16, 16, 3)),
    "simple_random_crop": ("simple_random_crop(16)", (16, 16, 3)),
    "random_erasing": ("random_erasing(1.0)", (20, 30, 3)),
    "color_jitter": ("color_jitter(0.4, 0.4, 0.4, 0.1)", (20, 30, 3)),
    "three_augment": ("three_augment()", (20, 30, 3)),
    "rand_augment": ("rand_augment(2, 9)", (20, 30, 3)),
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
        ("pad_crop('4')", "padding is '4': expected a number from 0"),
        ("flip(1.5)", "probability is 1.5: expected a number from 0 to 1"),
        ("random_resized_crop(0)", "size is 0"),
        ("simple_random_crop(8, 8)", "padding is 8: expected a number from 0 to 7"),
        ("random_erasing(2)", "probability is 2"),
        ("random_erasing(0.5, 0.4, 0.2)", "area_min=0.4 is above"),
        ("random_erasing(fill='mean')", "fill of random_erasing"),
        ("color_jitter(hue=0.7)", "hue is 0.7: expected a number from 0 to 0.5"),
        ("color_jitter(-1)", "brightness is -1"),
        ("three_augment('a')", "jitter is 'a'"),
        ("rand_augment(0)", "layers is 0"),
        ("rand_augment(2, 31)", r"magnitude \(torchvision\) is 31: expected a number from 0 to 30"),
        ("rand_augment(2, 11, 0.5, 'timm')", r"magnitude \(timm\) is 11"),
        ("rand_augment(2, 9, 0, 'tim')", "did you mean 'timm'"),
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


@pytest.mark.parametrize("name", [name for name in TABLE if name not in ("resize", "center_crop")])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_transform_is_a_pure_function_that_leaves_its_image_alone(name, channels):
    transform = transforms.parse(TABLE[name][0])
    image = IMAGE[..., :channels].copy()
    image.setflags(write=False)
    drawn = draws.uniforms(np.arange(20), seed=1, purpose="test", count=transform.draws)
    first, second = ([transform(image, row) for row in drawn] for _ in range(2))
    for one, two in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, two)
    assert len({one.tobytes() for one in first}) > 1


@pytest.mark.parametrize("text", ["pad_crop(4)", "pad_crop(3, 'reflect')", "flip()", "flip(0.2)"])
@pytest.mark.parametrize("channels", [1, 3])
def test_one_image_a_batch_and_a_batch_on_the_device_agree_to_the_byte(text, channels):
    transform = transforms.parse(text)
    images = np.random.default_rng(1).integers(0, 256, (40, 9, 13, channels), np.uint8)
    drawn = draws.uniforms(np.arange(40), seed=0, purpose="test", count=transform.draws)
    expected = np.stack([transform(image, row) for image, row in zip(images, drawn, strict=True)])
    decisions = transform.batched.decide(drawn)
    assert decisions.dtype == np.int32
    device = jax.jit(transform.batched.device)(images, decisions)
    assert device.dtype == np.uint8
    np.testing.assert_array_equal(device, expected)
    np.testing.assert_array_equal(transforms.apply_to_batch(transform, images.copy(), drawn), expected)
    assert not np.array_equal(expected, images)


def test_fast_resizing_is_pils_within_two_levels():
    yy, xx = np.mgrid[:61, :83]
    smooth = np.stack([128 + 90 * np.sin(xx / 7 + yy / 9), 255 * xx / 83, 255 * yy / 61], -1).astype(np.uint8)
    for filter in resampling.FILTERS:
        for size in ((40, 50), (90, 70)):
            for image in (smooth, smooth[..., :1]):
                exact, fast = resampling.exact(image, size, filter), resampling.fast(image, size, filter)
                assert fast.shape == exact.shape
                assert np.abs(fast.astype(int) - exact).max() <= (0 if filter in ("nearest", "box") else 2)
    ramp = np.broadcast_to(np.arange(0, 200, 2, dtype=np.uint8)[:, None, None], (100, 100, 3))
    half = resampling.fast(
        ramp, (20, 20), "bilinear", (10.5, 3.0, 40.0, 60.0)
    )  # A row of the result is two of the ramp's.
    np.testing.assert_allclose(half[3:-3, :, 0].astype(float), 22 + 4 * np.arange(3, 17)[:, None].repeat(20, 1), atol=1)


def test_simple_random_crop_of_the_whole_is_a_place_in_the_mirrored_image():
    square = IMAGE[:20, :20]
    padded = np.pad(square, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    np.testing.assert_array_equal(_apply("simple_random_crop(20)", square, np.asarray([0.0, 0.99])), padded[:20, 8:])


def test_random_erasing_covers_one_rectangle_of_its_share():
    image = np.full((50, 50, 3), 200, np.uint8)
    transform = transforms.parse("random_erasing(0.4, 0.1, 0.2, 0.5, 'zeros')")
    shares, ratios = [], []
    for row in draws.uniforms(np.arange(1500), seed=0, purpose="test", count=transform.draws):
        erased = transform(image, row)[..., 0] == 0
        if not erased.any():
            continue
        rows, columns = np.flatnonzero(erased.any(1)), np.flatnonzero(erased.any(0))
        assert erased[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        shares.append(erased.mean())
        ratios.append((rows[-1] - rows[0] + 1) / (columns[-1] - columns[0] + 1))
    assert abs(len(shares) / 1500 - 0.4) < 0.05  # Standard error .013.
    assert 0.09 < min(shares) < 0.11
    assert 0.19 < max(shares) < 0.21
    np.testing.assert_allclose(np.mean(shares), 0.15, atol=0.004)  # Standard error .0012.
    np.testing.assert_allclose(np.mean(np.log(ratios)), 0, atol=0.07)  # Standard error .016.
    assert max(ratios) < 2.2


def test_random_erasing_noise_is_uniform_and_the_draws_own():
    transform = transforms.parse("random_erasing(1.0, 0.9, 0.95, 1.0)")
    drawn = draws.uniforms(np.arange(2), seed=0, purpose="test", count=transform.draws)
    first, second = (transform(np.zeros((100, 100, 3), np.uint8), row) for row in drawn)
    noise = first[first.any(-1)]
    np.testing.assert_allclose(noise.mean(), 127.5, atol=2)  # Standard error .45.
    np.testing.assert_allclose(noise.std(), 73.9, atol=2)
    assert not np.array_equal(first, second)


def test_color_jitter_of_nothing_is_the_image_and_brightness_is_a_factor():
    np.testing.assert_array_equal(_apply("color_jitter()", IMAGE), IMAGE)
    grey = np.full((4, 4, 3), 100, np.uint8)
    for drawn, factor in ((0.0, 0.5), (0.5, 1.0), (0.75, 1.25)):
        out = _apply("color_jitter(brightness=0.5)", grey, np.asarray([0, drawn, 0, 0, 0]))
        np.testing.assert_array_equal(out, np.uint8(100 * factor))
    drained = _apply("color_jitter(saturation=1.0)", IMAGE, np.asarray([0, 0, 0, 0.0, 0]))
    assert (drained == drained[..., :1]).all()  # A factor of 0.
    flat = _apply("color_jitter(contrast=1.0)", IMAGE, np.asarray([0, 0, 0.0, 0, 0]))
    assert len(np.unique(flat)) == 1


def test_hue_turns_red_to_its_neighbours_and_leaves_grey():
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 255
    out = _apply("color_jitter(hue=0.5)", red, np.asarray([0, 0, 0, 0, 1 / 2 + 1 / 3]))  # A third of the circle: green.
    assert out[0, 0, 1] == 255
    assert out[0, 0, [0, 2]].max() <= 6  # In 256 steps.
    np.testing.assert_array_equal(_apply("color_jitter(hue=0.5)", IMAGE[..., :1]), IMAGE[..., :1])


def test_three_augment_takes_one_of_three_equally():
    counts = np.zeros(3)
    for drawn in draws.uniforms(np.arange(600), seed=0, purpose="test", count=7):
        out = _apply("three_augment(0)", IMAGE, drawn)
        is_grey = (out == out[..., :1]).all()
        is_solarized = np.array_equal(out, np.where(IMAGE < 128, IMAGE, 255 - IMAGE))
        assert is_grey + is_solarized < 2
        counts[0 if is_grey else 1 if is_solarized else 2] += 1
        if not (is_grey or is_solarized):
            assert out.std() < IMAGE.std()  # Blurred.
    assert counts.min() > 155  # 200 expected, standard deviation 11.5.


# Operation -> what it does to one pixel value or to the image, at half of the largest magnitude, sign +1.
CLOSED_FORMS = {
    ("torchvision", "identity"): lambda x: x,
    ("torchvision", "brightness"): lambda x: np.minimum(x * 1.45, 255).astype(np.uint8),
    ("timm", "brightness"): lambda x: np.minimum(x * 1.45, 255).astype(np.uint8),
    ("torchvision", "posterize"): lambda x: x & 0b11111100,
    ("timm", "posterize"): lambda x: x & 0b11000000,
    ("torchvision", "solarize"): lambda x: np.where(x < 127.5, x, 255 - x),
    ("timm", "solarize"): lambda x: np.where(x < 128, x, 255 - x),
    ("timm", "invert"): lambda x: 255 - x,
    ("timm", "solarize_add"): lambda x: np.where(x < 128, x + 55, x),
    ("torchvision", "translate_x"): lambda x: np.pad(x[:, 6:], ((0, 0), (0, 6), (0, 0))),  # int(30 * 75 / 331).
    ("torchvision", "translate_y"): lambda x: np.pad(x[4:], ((0, 4), (0, 0), (0, 0))),  # int(20 * 75 / 331).
}


@pytest.mark.parametrize(("variant", "name"), CLOSED_FORMS)
def test_operations_of_rand_augment_have_their_closed_forms(variant, name):
    out = np.asarray(rand_augment.operate(Image.fromarray(IMAGE), name, 0.5, 1, variant))
    np.testing.assert_array_equal(out, CLOSED_FORMS[variant, name](IMAGE))


@pytest.mark.parametrize("variant", rand_augment.OPERATIONS)
def test_every_operation_runs_at_every_magnitude_and_only_the_zero_of_most_is_nothing(variant):
    unchanged = set()
    for name in rand_augment.OPERATIONS[variant]:
        for mode in ("RGB", "L"):
            for level in (0.0, 0.3, 1.0):
                for sign in (-1, 1):
                    out = rand_augment.operate(Image.fromarray(IMAGE).convert(mode), name, level, sign, variant)
                    assert out.size == (30, 20)
                    assert out.mode == mode
                    if level == 0 and mode == "RGB" and np.array_equal(out, IMAGE):
                        unchanged.add(name)
    # torchvision's zero of solarize still inverts 255, timm's of posterize leaves 4 bits; random pixels span the range, so
    # autocontrast may do nothing.
    always = {"equalize", "invert", "autocontrast", "solarize" if variant == "torchvision" else "posterize"}
    assert unchanged - {"autocontrast"} == set(rand_augment.OPERATIONS[variant]) - always


def test_rand_augment_draws_operations_equally_and_timm_applies_half(monkeypatch):
    seen = []
    monkeypatch.setattr(
        rand_augment, "operate", lambda picture, name, level, sign, variant: seen.append((name, level, sign)) or picture
    )
    for text, share in (("rand_augment(2, 9)", 1.0), ("rand_augment(2, 9, 0.5, 'timm')", 0.5)):
        seen.clear()
        transform = transforms.parse(text)
        for row in draws.uniforms(np.arange(3000), seed=0, purpose="test", count=transform.draws):
            transform(IMAGE, row)
        names, levels, signs = zip(*seen, strict=True)
        assert abs(len(seen) / 6000 - share) < 0.03
        known = rand_augment.OPERATIONS["timm" if "timm" in text else "torchvision"]
        counts = [names.count(name) / len(names) * len(known) for name in known]
        np.testing.assert_allclose(counts, 1, atol=0.3)  # Standard error at most .07.
        np.testing.assert_allclose(np.mean(signs), 0, atol=0.08)
        if "timm" in text:
            np.testing.assert_allclose((np.mean(levels), np.std(levels)), (0.895, 0.045), atol=0.01)
        else:
            assert set(levels) == {0.3}
