"""Resizing: PIL's filters exactly, and the same filters with SIMD instructions for training crops."""

from __future__ import annotations

import threading

import cykooz_resizer
import numpy as np
from PIL import Image

from robust_vit import errors

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# PIL's nearest is not a convolution, and at the edge of a box the two libraries choose other pixels: these stay PIL's.
_KERNELS = {
    "bilinear": cykooz_resizer.FilterType.bilinear,
    "bicubic": cykooz_resizer.FilterType.catmull_rom,  # PIL's bicubic is the one with a = -1/2.
    "lanczos": cykooz_resizer.FilterType.lanczos3,
}
_PIXELS = {1: cykooz_resizer.PixelType.U8, 3: cykooz_resizer.PixelType.U8x3}
_state = threading.local()  # A resizer keeps buffers: one a thread.


def check_filter(name: str) -> str:
    """The name, where it is a filter.

    Raises:
      errors.UserError: an unknown name.
    """
    if name not in FILTERS:
        raise errors.unknown("resize filter", name, FILTERS)
    return name


def exact(image: np.ndarray, size: tuple[int, int], filter: str) -> np.ndarray:
    """The image `[height, width, channels]` at `size` (height, width) as PIL makes it, antialiased: canonical pixels."""
    picture = to_picture(image)
    return from_picture(picture.resize((size[1], size[0]), FILTERS[filter]))


def fast(
    image: np.ndarray,
    size: tuple[int, int],
    filter: str,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """As `exact`, 3.5 times faster, each value within two of 255 levels of PIL's; read-only.

    On random crops of 314 real images to 224 px, bilinear, 12 % of the values differ by one level and a few by two. The
    convolution is that of the Rust crate fast_image_resize, in integers.

    Args:
      image: uint8 `[height, width, channels]`, 1 or 3 channels.
      size: (height, width).
      filter: a key of `FILTERS`.
      box: (top, left, height, width) of the part to resize, fractions allowed; None is the whole.
    """
    if filter not in _KERNELS:
        if box is not None:
            top, left, height, width = (round(side) for side in box)
            image = image[top : top + height, left : left + width]
        return exact(image, size, filter)
    if not hasattr(_state, "resizer"):
        _state.resizer = cykooz_resizer.Resizer()
        _state.algorithms = {name: cykooz_resizer.ResizeAlg.convolution(kernel) for name, kernel in _KERNELS.items()}
    height, width, channels = image.shape
    source = cykooz_resizer.ImageData(width, height, _PIXELS[channels], image.tobytes())
    target = cykooz_resizer.ImageData(size[1], size[0], _PIXELS[channels])
    crop = None if box is None else cykooz_resizer.CropBox(box[1], box[0], box[3], box[2])
    options = cykooz_resizer.ResizeOptions(_state.algorithms[filter], crop_box=crop)
    _state.resizer.resize(source, target, options)
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(*size, channels)


def to_picture(image: np.ndarray) -> Image.Image:
    """A PIL image of pixels uint8 `[height, width, 1 or 3]`."""
    return Image.fromarray(np.ascontiguousarray(image[:, :, 0] if image.shape[2] == 1 else image))


def from_picture(picture: Image.Image) -> np.ndarray:
    """Pixels uint8 `[height, width, 1 or 3]` of a PIL image of mode L or RGB."""
    pixels = np.asarray(picture)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
