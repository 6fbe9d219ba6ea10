"""RandAugment (Cubuk et al. 2020, arXiv:1909.13719): a few operations of one magnitude, chosen anew for each image.

Two published variants, by PIL:

| operation | "torchvision", magnitude m of 0 .. 30 | "timm" (increasing), magnitude m of 0 .. 10 |
|---|---|---|
| identity | nothing | - |
| autocontrast, equalize | no magnitude | no magnitude |
| invert | - | no magnitude |
| rotate | +-30 m/30 degrees | +-30 m/10 degrees |
| posterize | 8 - round(4 m/30) bits stay | 4 - int(4 m/10) bits stay |
| solarize | from 255 - 255 m/30 | from 256 - int(256 m/10) |
| solarize_add | - | int(110 m/10) is added below 128 |
| color, contrast, brightness, sharpness | factor 1 +- .9 m/30 | factor max(.1, 1 +- .9 m/10) |
| shear_x, shear_y | +-.3 m/30 | +-.3 m/10 |
| translate_x, translate_y | int(+-150/331 of the side, m/30) pixels | +-.45 of the side, m/10 |
| an operation is applied | always | with probability 1/2 |
| around the image | black, nearest pixel | grey 128, bilinear (timm: bilinear or bicubic at random, fill is an option) |

Signs are drawn, operations are drawn with replacement. DeiT and its successors train with timm's "rand-m9-mstd0.5-inc1":
`rand_augment(2, 9, 0.5, 'timm')`; torchvision's reference recipes with `rand_augment(2, 9)`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageEnhance, ImageOps

from robust_vit import errors
from robust_vit.data import resampling, transforms
from robust_vit.data.transforms import Pixels, Transform

_MAXIMUM = {"torchvision": 30.0, "timm": 10.0}
_COMMON = (
    "autocontrast",
    "equalize",
    "rotate",
    "posterize",
    "solarize",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
OPERATIONS = {"torchvision": ("identity", *_COMMON), "timm": (*_COMMON, "invert", "solarize_add")}
_PROBABILITY = {"torchvision": 1.0, "timm": 0.5}
_TRANSLATE = {"torchvision": 150 / 331, "timm": 0.45}
_DRAWS = 4  # Of each layer: which, whether, the sign, the magnitude.
_ENHANCERS = {
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "brightness": ImageEnhance.Brightness,
    "sharpness": ImageEnhance.Sharpness,
}


def rand_augment(
    layers: int = 2, magnitude: float = 9, magnitude_std: float = 0.0, variant: str = "torchvision"
) -> Transform:
    """Applies `layers` random operations in turn; the table is at the top of this file.

    Of a grey image, "color" leaves every pixel as it is.

    Args:
      layers: how many.
      magnitude: of 30 for "torchvision", of 10 for "timm".
      magnitude_std: standard deviation of a normal draw around it, for each operation, cut to the range.
      variant: "torchvision" or "timm".
    """
    if variant not in OPERATIONS:
        raise errors.unknown("variant of rand_augment", variant, OPERATIONS)
    if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= 16:
        raise errors.UserError(f"rand_augment: layers is {layers!r}: expected an integer from 1 to 16.")
    maximum = _MAXIMUM[variant]
    transforms.check_number("rand_augment", f"magnitude ({variant})", magnitude, 0, maximum)
    transforms.check_number("rand_augment", "magnitude_std", magnitude_std, 0, 100)
    names = OPERATIONS[variant]

    def apply(image: Pixels, uniforms: Float[np.ndarray, " draws"]) -> Pixels:
        picture = resampling.to_picture(image)
        for which, whether, sign, size in np.asarray(uniforms).reshape(layers, _DRAWS).tolist():
            if whether >= _PROBABILITY[variant]:
                continue
            level = magnitude
            if magnitude_std:
                level += magnitude_std * statistics.NormalDist().inv_cdf(max(size, 2.0**-53))
            level = min(max(level, 0.0), maximum) / maximum
            picture = operate(picture, names[int(which * len(names))], level, -1 if sign < 0.5 else 1, variant)
        return resampling.from_picture(picture)

    return Transform("rand_augment", apply, draws=layers * _DRAWS)


def operate(picture: Image.Image, name: str, level: float, sign: int, variant: str) -> Image.Image:
    """One operation on a PIL image of mode RGB or L.

    Args:
      picture: the image.
      name: a name of `OPERATIONS`.
      level: the magnitude as a share of the largest.
      sign: -1 or 1, where the operation has a direction.
      variant: whose ranges.
    """
    timm = variant == "timm"
    if name in _ENHANCERS:
        factor = 1.0 + sign * 0.9 * level
        return _ENHANCERS[name](picture).enhance(max(0.1, factor) if timm else factor)
    if name in _GEOMETRIC:
        width, height = picture.size
        return picture.transform(
            picture.size,
            Image.Transform.AFFINE,
            _GEOMETRIC[name](sign * level, width, height, _TRANSLATE[variant], not timm),
            resample=Image.Resampling.BILINEAR if timm else Image.Resampling.NEAREST,
            fillcolor=_fill(picture, timm),
        )
    match name:
        case "identity":
            return picture
        case "autocontrast":
            return ImageOps.autocontrast(picture)
        case "equalize":
            return ImageOps.equalize(picture)
        case "invert":
            return ImageOps.invert(picture)
        case "rotate":
            resample = Image.Resampling.BILINEAR if timm else Image.Resampling.NEAREST
            return picture.rotate(sign * 30.0 * level, resample=resample, fillcolor=_fill(picture, timm))
        case "posterize":
            bits = 4 - int(4 * level) if timm else 8 - round(4 * level)
            return ImageOps.posterize(picture, bits) if bits else picture.point(lambda _: 0)
        case "solarize":
            return ImageOps.solarize(picture, 256 - int(256 * level) if timm else 255.0 - 255.0 * level)
        case "solarize_add":
            added = int(110 * level)
            table = [min(255, value + added) if value < 128 else value for value in range(256)]
            return picture.point(table * len(picture.getbands()))
    raise errors.unknown("operation of rand_augment", name, OPERATIONS[variant])


def _fill(picture: Image.Image, grey: bool) -> int | tuple[int, ...]:
    value = 128 if grey else 0
    return value if picture.mode == "L" else (value,) * 3


# PIL takes the map from output to input pixels: (x, y) -> (ax + by + c, dx + ey + f).
_GEOMETRIC: dict[str, Callable[[float, int, int, float, bool], tuple[float, ...]]] = {
    "shear_x": lambda level, width, height, share, whole: (1, 0.3 * level, 0, 0, 1, 0),
    "shear_y": lambda level, width, height, share, whole: (1, 0, 0, 0.3 * level, 1, 0),
    "translate_x": lambda level, width, height, share, whole: (1, 0, _pixels(level * share * width, whole), 0, 1, 0),
    "translate_y": lambda level, width, height, share, whole: (1, 0, 0, 0, 1, _pixels(level * share * height, whole)),
}


def _pixels(distance: float, whole: bool) -> float:
    return int(distance) if whole else distance
