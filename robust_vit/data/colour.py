"""Transforms of colour, by PIL: jitter and three-augment. Of a grey image, saturation and hue leave every pixel as it is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from robust_vit.data import resampling, transforms
from robust_vit.data.transforms import Pixels, Transform

_ORDERS = tuple(itertools.permutations(range(4)))
_JITTER_DRAWS = 5  # The order, and one for each of the four.
# Of three-augment; the two numbers are those of its authors' code.
_SOLARIZE_THRESHOLD = 128
_BLUR = (0.1, 2.0)


def color_jitter(
    brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0, hue: float = 0.0
) -> Transform:
    """Changes brightness, contrast, saturation and hue, in random order.

    Each of the first three is a factor uniform in [max(0, 1 - x), 1 + x] of PIL's enhancer; the hue turns by a share of the
    circle uniform in [-hue, hue]. Zero leaves a quantity alone. Ranges and order are those of torchvision's ColorJitter;
    source: Howard 2013 (arXiv:1312.5402), section 2.

    Args:
      brightness: not negative.
      contrast: not negative.
      saturation: not negative.
      hue: in [0, 1/2].
    """
    strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
    for argument, value in strengths.items():
        transforms.check_number("color_jitter", argument, value, 0, 100)
    transforms.check_number("color_jitter", "hue", hue, 0, 0.5)

    def apply(image: Pixels, uniforms: Float[np.ndarray, 5]) -> Pixels:
        picture = _jittered(resampling.to_picture(image), uniforms, (brightness, contrast, saturation, hue))
        return resampling.from_picture(picture)

    return Transform("color_jitter", apply, draws=_JITTER_DRAWS)


def three_augment(jitter: float = 0.3) -> Transform:
    """Turns grey, or solarizes, or blurs, one of the three at random; then jitters brightness, contrast and saturation.

    Solarizing inverts values from 128; the blur's standard deviation is uniform in [0.1, 2] pixels (PIL's, by box filters).
    Source: Touvron et al. 2022 (arXiv:2204.07118), section 4 and the authors' code, whose recipe is random_resized_crop or
    simple_random_crop, flip, three_augment.

    Args:
      jitter: strength of each of the three as in `color_jitter`; the paper has 0.3.
    """
    transforms.check_number("three_augment", "jitter", jitter, 0, 100)

    def apply(image: Pixels, uniforms: Float[np.ndarray, 7]) -> Pixels:
        picture = resampling.to_picture(image)
        choice = int(uniforms[0] * 3)
        if choice == 0:
            picture = ImageOps.grayscale(picture).convert(picture.mode)
        elif choice == 1:
            picture = ImageOps.solarize(picture, _SOLARIZE_THRESHOLD)
        else:
            radius = _BLUR[0] + (_BLUR[1] - _BLUR[0]) * float(uniforms[1])
            picture = picture.filter(ImageFilter.GaussianBlur(radius))
        return resampling.from_picture(_jittered(picture, uniforms[2:], (jitter, jitter, jitter, 0.0)))

    return Transform("three_augment", apply, draws=2 + _JITTER_DRAWS)


def _jittered(picture: Image.Image, uniforms: Sequence[float], strengths: Sequence[float]) -> Image.Image:
    for index in _ORDERS[int(uniforms[0] * len(_ORDERS))]:
        strength, drawn = strengths[index], float(uniforms[1 + index])
        if not strength:
            continue
        if index == 3:
            picture = _turned(picture, strength * (2 * drawn - 1))
            continue
        low = max(0.0, 1.0 - strength)
        enhancer = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[index]
        picture = enhancer(picture).enhance(low + (1.0 + strength - low) * drawn)
    return picture


def _turned(picture: Image.Image, share: float) -> Image.Image:
    """The hue moved by a share of the circle, in 256 steps."""
    if picture.mode == "L":
        return picture
    hue, saturation, value = picture.convert("HSV").split()
    moved = (np.asarray(hue).astype(np.int32) + round(share * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(moved.astype(np.uint8)), saturation, value)).convert("RGB")
