"""Transforms that move or cut out pixels: sizes, crops, mirrors, erased rectangles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from robust_vit import errors
from robust_vit.data import resampling, transforms
from robust_vit.data.transforms import Batched, Pixels, Transform, Window

# Source of the two numbers: Szegedy et al. 2015 (arXiv:1409.4842), section 6; ten tries as in torchvision.
_RATIO = (3 / 4, 4 / 3)
_TRIES = 10
_PAD_MODES = {"zeros": "constant", "reflect": "reflect"}
_FILLS = ("noise", "zeros")


def resize(size: int | tuple[int, int], filter: str = "bilinear") -> Transform:
    """Resizes with PIL's antialiased filter: an int is the new shorter side (aspect kept), a pair is (height, width)."""
    resampling.check_filter(filter)

    def apply(image: Pixels) -> Pixels:
        height, width = image.shape[:2]
        if isinstance(size, int):
            shorter = min(height, width)
            new = (int(size * height / shorter), int(size * width / shorter))
        else:
            new = tuple(size)
        return image if new == (height, width) else resampling.exact(image, new, filter)

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
    if mode not in _PAD_MODES:
        raise errors.unknown("padding mode of pad_crop", mode, _PAD_MODES)
    transforms.check_number("pad_crop", "padding", padding, 0, 4096)
    margins = ((0, 0), (padding, padding), (padding, padding), (0, 0))

    def decide(uniforms: np.ndarray) -> np.ndarray:
        return (uniforms * (2 * padding + 1)).astype(np.int32)  # Top and left corner in the padded image.

    def host(images: np.ndarray, corners: np.ndarray) -> np.ndarray:
        count, height, width, channels = images.shape
        padded = np.pad(images, margins, mode=_PAD_MODES[mode])
        # All windows as a view; the gather then copies whole rows of a window, not single pixels.
        image, row, pixel = padded.strides[:3]
        places = 2 * padding + 1
        windows = np.lib.stride_tricks.as_strided(
            padded, (count, places, places, height, width * channels), (image, row, pixel, row, 1), writeable=False
        )
        return windows[np.arange(count), corners[:, 0], corners[:, 1]].reshape(images.shape)

    def device(images: jax.Array, corners: jax.Array) -> jax.Array:
        padded = jnp.pad(images, margins, mode=_PAD_MODES[mode])
        cut = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:]))
        return cut(padded, corners)

    def apply(image: Pixels, uniforms: Float[np.ndarray, 2]) -> Pixels:
        return host(image[None], decide(np.asarray(uniforms)[None]))[0]

    return Transform("pad_crop", apply, draws=2, batched=Batched(decide, host, device))


def flip(probability: float = 0.5) -> Transform:
    """Mirrors left and right with the given probability."""
    transforms.check_number("flip", "probability", probability, 0, 1)

    def apply(image: Pixels, uniforms: Float[np.ndarray, 1]) -> Pixels:
        return image[:, ::-1] if uniforms[0] < probability else image

    def decide(uniforms: np.ndarray) -> np.ndarray:
        return (uniforms < probability).astype(np.int32)

    def host(images: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        chosen = np.flatnonzero(mirrored[:, 0])
        before = images[chosen]
        for channel in range(images.shape[-1]):  # One at a time: five times faster than pixels of three bytes.
            images[chosen, :, :, channel] = before[:, :, ::-1, channel]
        return images

    def device(images: jax.Array, mirrored: jax.Array) -> jax.Array:
        return jnp.where(mirrored[:, :, None, None] == 1, images[:, :, ::-1], images)

    return Transform("flip", apply, draws=1, batched=Batched(decide, host, device))


def random_resized_crop(
    size: int, scale_min: float = 0.08, scale_max: float = 1.0, filter: str = "bilinear"
) -> Transform:
    """Cuts a rectangle of a random share of the area and aspect ratio 3/4 to 4/3, and resizes it to `size` x `size`.

    The share is uniform in [scale_min, scale_max], the logarithm of the ratio is uniform; after ten rectangles that do not fit,
    the largest central one within the ratios. Source: Szegedy et al. 2015 (arXiv:1409.4842), section 6; torchvision's rule.

    Pixels are those of `resampling.fast`, within two levels of PIL's; where a JPEG's rectangle is at least twice `size`, those
    of `decoding.decode_window`.
    """
    resampling.check_filter(filter)
    transforms.check_number("random_resized_crop", "size", size, 1, 2**16)
    low, high = math.log(_RATIO[0]), math.log(_RATIO[1])

    def box(height: int, width: int, uniforms: Sequence[float]) -> tuple[int, int, int, int]:
        for trial in range(_TRIES):
            area = height * width * (scale_min + (scale_max - scale_min) * uniforms[2 * trial])
            ratio = math.exp(low + (high - low) * uniforms[2 * trial + 1])
            crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top = int(uniforms[-2] * (height - crop_height + 1))
                left = int(uniforms[-1] * (width - crop_width + 1))
                return top, left, crop_height, crop_width
        crop_width = min(width, round(height * _RATIO[1]))
        crop_height = min(height, round(width / _RATIO[0]))
        return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width

    def apply(image: Pixels, uniforms: Float[np.ndarray, 22]) -> Pixels:
        top, left, height, width = box(*image.shape[:2], np.asarray(uniforms).tolist())
        return resampling.fast(image[top : top + height, left : left + width], (size, size), filter)

    return Transform(
        "random_resized_crop",
        apply,
        draws=2 * _TRIES + 2,
        takes_any_size=True,
        window=Window(box, size, filter),
    )


def simple_random_crop(size: int, padding: int = 4, filter: str = "bicubic") -> Transform:
    """Resizes the shorter side to `size`, pads by `padding` mirrored pixels, and cuts `size` x `size` at a uniform place.

    The gentle crop of Touvron et al. 2022 (arXiv:2204.07118), section 4, "simple random crop". Pixels are those of
    `resampling.fast`.
    """
    resampling.check_filter(filter)
    transforms.check_number("simple_random_crop", "size", size, 1, 2**16)
    transforms.check_number("simple_random_crop", "padding", padding, 0, size - 1)

    def apply(image: Pixels, uniforms: Float[np.ndarray, 2]) -> Pixels:
        height, width = image.shape[:2]
        shorter = min(height, width)
        new = (int(size * height / shorter), int(size * width / shorter))
        pixels = resampling.fast(image, new, filter)
        padded = np.pad(pixels, ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
        top, left = (int(drawn * (side + 2 * padding - size + 1)) for drawn, side in zip(uniforms, new, strict=True))
        return padded[top : top + size, left : left + size]

    return Transform("simple_random_crop", apply, draws=2, takes_any_size=True)


def random_erasing(
    probability: float = 0.25,
    area_min: float = 0.02,
    area_max: float = 1 / 3,
    ratio_min: float = 0.3,
    fill: str = "noise",
) -> Transform:
    """Covers a random rectangle with noise (each value uniform in 0 .. 255) or with black.

    The rectangle's share of the area is uniform in [area_min, area_max] and the logarithm of its ratio of sides uniform in
    +-log(1 / ratio_min); of ten rectangles the first that fits is taken, and none where none does. The noise is a pure
    function of the image's draws. Source: Zhong et al. 2017 (arXiv:1708.04896), algorithm 1, where the ratio itself is
    uniform and the tries do not end; here as in torchvision and timm. The paper has probability 0.5 and areas 0.02 to 0.4,
    after crop and flip.
    """
    for argument, value in (("probability", probability), ("area_min", area_min), ("area_max", area_max)):
        transforms.check_number("random_erasing", argument, value, 0, 1)
    transforms.check_number("random_erasing", "ratio_min", ratio_min, 1e-3, 1)
    if area_min > area_max:
        raise errors.UserError(f"random_erasing: area_min={area_min} is above area_max={area_max}: swap them.")
    if fill not in _FILLS:
        raise errors.unknown("fill of random_erasing", fill, _FILLS)
    log_ratio = -math.log(ratio_min)

    def apply(image: Pixels, uniforms: Float[np.ndarray, 24]) -> Pixels:
        drawn = np.asarray(uniforms).tolist()
        if drawn[0] >= probability:
            return image
        height, width, channels = image.shape
        for trial in range(_TRIES):
            area = height * width * (area_min + (area_max - area_min) * drawn[4 + 2 * trial])
            ratio = math.exp(log_ratio * (2 * drawn[5 + 2 * trial] - 1))
            tall, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < tall < height and 0 < wide < width:
                break
        else:
            return image
        top, left = int(drawn[1] * (height - tall + 1)), int(drawn[2] * (width - wide + 1))
        out = np.array(image)
        part = out[top : top + tall, left : left + wide]
        if fill == "noise":
            generator = np.random.Philox(key=[int(drawn[3] * 2**53), 0])
            noise = generator.random_raw(-(-part.size // 8)).astype("<u8").view(np.uint8)
            part[:] = noise[: part.size].reshape(tall, wide, channels)
        else:
            part[:] = 0
        return out

    return Transform("random_erasing", apply, draws=4 + 2 * _TRIES)
