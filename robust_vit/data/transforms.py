"""Transforms of one uint8 image, written as strings: "resize(256)", "random_resized_crop(224, 0.08, 1.0)".

A random transform is given its uniform draws; it draws nothing itself. So an image depends on (seed, epoch, row) and on
nothing else, and reading from memory or from disk gives the same bytes.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from robust_vit import errors

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Source of the two numbers: Szegedy et al. 2015 (arXiv:1409.4842), section 6; ten tries as in torchvision.
_RATIO = (3 / 4, 4 / 3)
_TRIES = 10

Pixels = UInt8[np.ndarray, "height width channels"]


@dataclasses.dataclass(frozen=True)
class Transform:
    """A configured transform.

    Attributes:
      name: as registered.
      apply: `apply(image)`, or `apply(image, uniforms)` where `draws` is not zero.
      draws: how many uniform numbers in [0, 1) one image takes.
      takes_any_size: whether the output's size does not depend on the input's.
    """

    name: str
    apply: Callable[..., np.ndarray]
    draws: int = 0
    takes_any_size: bool = False


def resize(size: int | tuple[int, int], filter: str = "bilinear") -> Transform:
    """Resizes with PIL's antialiased filter: an int is the new shorter side (aspect kept), a pair is (height, width)."""
    resample = _filter(filter)

    def apply(image: Pixels) -> Pixels:
        height, width = image.shape[:2]
        if isinstance(size, int):
            shorter = min(height, width)
            new = (int(size * height / shorter), int(size * width / shorter))
        else:
            new = tuple(size)
        return image if new == (height, width) else _resized(image, new, resample)

    return Transform("resize", apply, takes_any_size=not isinstance(size, int))


def center_crop(size: int) -> Transform:
    """Cuts the central `size` x `size` pixels."""

    def apply(image: Pixels) -> Pixels:
        height, width = image.shape[:2]
        if min(height, width) < size:
            raise errors.UserError(
                f"center_crop({size}) of an image of {height} x {width}: put resize({size}) before it."
            )
        top, left = round((height - size) / 2), round((width - size) / 2)
        return image[top : top + size, left : left + size]

    return Transform("center_crop", apply, takes_any_size=True)


def pad_crop(padding: int, mode: str = "zeros") -> Transform:
    """Pads each side by `padding` black ("zeros") or mirrored ("reflect") pixels and cuts the old size at a uniform place.

    Source: Lee et al. 2015 (arXiv:1409.5185), section 4; He et al. 2016 (arXiv:1512.03385), section 4.2.
    """
    if mode not in ("zeros", "reflect"):
        raise errors.unknown("padding mode of pad_crop", mode, ["zeros", "reflect"])

    def apply(image: Pixels, uniforms: Float[np.ndarray, 2]) -> Pixels:
        height, width, channels = image.shape
        top, left = (int(u * (2 * padding + 1)) - padding for u in uniforms)
        if mode == "reflect":
            padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
            return padded[top + padding : top + padding + height, left + padding : left + padding + width]
        out = np.zeros((height, width, channels), np.uint8)
        out[max(-top, 0) : height - max(top, 0), max(-left, 0) : width - max(left, 0)] = image[
            max(top, 0) : height + min(top, 0), max(left, 0) : width + min(left, 0)
        ]
        return out

    return Transform("pad_crop", apply, draws=2)


def flip(probability: float = 0.5) -> Transform:
    """Mirrors left and right with the given probability."""

    def apply(image: Pixels, uniforms: Float[np.ndarray, 1]) -> Pixels:
        return image[:, ::-1] if uniforms[0] < probability else image

    return Transform("flip", apply, draws=1)


def random_resized_crop(
    size: int, scale_min: float = 0.08, scale_max: float = 1.0, filter: str = "bilinear"
) -> Transform:
    """Cuts a rectangle of a random share of the area and aspect ratio 3/4 to 4/3, and resizes it to `size` x `size`.

    The share is uniform in [scale_min, scale_max], the logarithm of the ratio is uniform; after ten rectangles that do not fit,
    the largest central one within the ratios. Source: Szegedy et al. 2015 (arXiv:1409.4842), section 6; torchvision's rule.
    """
    resample = _filter(filter)
    low, high = math.log(_RATIO[0]), math.log(_RATIO[1])

    def apply(image: Pixels, uniforms: Float[np.ndarray, 22]) -> Pixels:
        height, width = image.shape[:2]
        for u_area, u_ratio in uniforms[: 2 * _TRIES].reshape(_TRIES, 2):
            area = height * width * (scale_min + (scale_max - scale_min) * u_area)
            ratio = math.exp(low + (high - low) * u_ratio)
            crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top = int(uniforms[-2] * (height - crop_height + 1))
                left = int(uniforms[-1] * (width - crop_width + 1))
                break
        else:
            crop_width = min(width, round(height * _RATIO[1]))
            crop_height = min(height, round(width / _RATIO[0]))
            top, left = (height - crop_height) // 2, (width - crop_width) // 2
        return _resized(image[top : top + crop_height, left : left + crop_width], (size, size), resample)

    return Transform("random_resized_crop", apply, draws=2 * _TRIES + 2, takes_any_size=True)


TRANSFORMS = {
    "resize": resize,
    "center_crop": center_crop,
    "pad_crop": pad_crop,
    "flip": flip,
    "random_resized_crop": random_resized_crop,
}


def parse(text: str) -> Transform:
    """A transform from its string; arguments are Python literals.

    Raises:
      errors.UserError: not a call of a known transform, or arguments that it does not take.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if isinstance(call, ast.Name):
            call = ast.Call(func=call, args=[], keywords=[])
        name = call.func.id
        positional = [ast.literal_eval(argument) for argument in call.args]
        named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AttributeError) as error:
        raise errors.UserError(
            f"transform {text!r} is not understood: write for example 'pad_crop(4)' or 'flip()'."
        ) from error
    if name not in TRANSFORMS:
        raise errors.unknown("transform", name, TRANSFORMS)
    factory = TRANSFORMS[name]
    try:
        inspect.signature(factory).bind(*positional, **named)
    except TypeError as error:
        raise errors.UserError(f"transform {text!r}: {error}; it takes {name}{inspect.signature(factory)}.") from error
    return factory(*positional, **named)


def parse_all(texts: Sequence[str]) -> tuple[Transform, ...]:
    """`parse` of each string."""
    if isinstance(texts, str):
        raise errors.UserError(f"transforms are given as the string {texts!r}: give a tuple, ({texts!r},).")
    return tuple(parse(text) for text in texts)


def _filter(name: str) -> Image.Resampling:
    if name not in FILTERS:
        raise errors.unknown("resize filter", name, FILTERS)
    return FILTERS[name]


def _resized(image: Pixels, size: tuple[int, int], resample: Image.Resampling) -> Pixels:
    grey = image.shape[2] == 1
    picture = Image.fromarray(np.ascontiguousarray(image[:, :, 0] if grey else image))
    pixels = np.asarray(picture.resize((size[1], size[0]), resample))
    return pixels[:, :, None] if grey else pixels
