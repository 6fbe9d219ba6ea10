"""Encoded bytes to uint8 pixels, with the mistakes of an image file told in one line."""

from __future__ import annotations

import dataclasses
import io
import logging
import threading
from collections.abc import Sequence

import numpy as np
import simplejpeg
from PIL import Image

from robust_vit import errors
from robust_vit.data import resampling, transforms

_logger = logging.getLogger(__name__)

ON_MODE = ("error", "convert")
ON_BAD_IMAGE = ("raise", "skip")
BAD_FRACTION = 0.01
_state = threading.local()
_SCRATCH_LIMIT = 2**25  # Bytes: images of 11 megapixels.
_JPEG = b"\xff\xd8"
_FACTORS = (2, 4, 8)  # Scales at which libjpeg-turbo's inverse cosine transform has vector code.


class BadImage(errors.UserError):
    """An image that cannot be decoded; `on_bad_image="skip"` leaves it out."""


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """An image file in memory with its label.

    Attributes:
      content: the encoded bytes.
      label: class.
      row: identity of the example.
      name: what to call the image in an error.
      channels: see `decode`.
      on_mode: see `decode`.
    """

    content: bytes
    label: int
    row: int
    name: str
    channels: int | None
    on_mode: str

    def decode(self) -> np.ndarray:
        """All pixels; see `decode`."""
        return decode(self.content, channels=self.channels, name=self.name, on_mode=self.on_mode)


def decode(content: bytes, *, channels: int | None, name: str, on_mode: str = "error") -> np.ndarray:
    """Pixels uint8 `[height, width, channels]` of a JPEG, PNG or WebP. EXIF orientation is not applied.

    The pixels are PIL's. A plain colour JPEG is decoded by libjpeg-turbo without PIL's copies, to the same bytes.

    Args:
      content: the encoded file.
      channels: 1 or 3; None takes what the file has (1 or 3).
      name: what to call the image in an error, usually its path.
      on_mode: "error" rejects grey or transparent files where colour is expected, and colour where grey is; "convert"
        repeats grey to three channels, lays transparent images on white, and takes the luma (ITU-R 601) of colour.

    Raises:
      BadImage: truncated or not an image.
      errors.UserError: another number of channels, with `on_mode="error"`.
    """
    header = _plain_header(content, channels)
    if header is not None and (pixels := _colour_jpeg(content, header)) is not None:
        return pixels
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and its own, by format.
        raise BadImage(
            f"{name} cannot be decoded ({_one_line(error)}): replace the file, or set data.on_bad_image='skip' "
            "to go on without it."
        ) from error
    return to_channels(image, channels=channels, name=name, on_mode=on_mode)


def decode_window(encoded: Encoded, window: transforms.Window, uniforms: Sequence[float]) -> np.ndarray:
    """A random rectangle of an image at `window.size`, uint8 `[size, size, channels]`.

    As `decode`, a crop and `resampling.fast`; but a JPEG whose rectangle has at least twice `window.size` on both sides is
    decoded at 1/2, 1/4 or 1/8 of its size, inside the inverse cosine transform, and resized from there. On 314 real images such
    pixels are 1.8 of 255 levels from the others on average at 112 px, 1.1 at 64 px, and at most 44.

    Args:
      encoded: the image.
      window: which rectangle, and the size.
      uniforms: the draws of the rectangle.

    Raises:
      BadImage, errors.UserError: as `decode`.
    """
    size = (window.size, window.size)
    header = _plain_header(encoded.content, encoded.channels)
    if header is not None:
        top, left, height, width = window.box(*header, uniforms)
        factor = max((factor for factor in _FACTORS if min(height, width) >= factor * window.size), default=1)
        pixels = _colour_jpeg(encoded.content, header, factor, _scratch(3 * header[0] * header[1] // factor))
        if pixels is not None:
            first, second = top // factor, left // factor
            last = -(-(top + height) // factor), -(-(left + width) // factor)
            box = (
                (top / factor - first, left / factor - second, height / factor, width / factor) if factor > 1 else None
            )
            return resampling.fast(pixels[first : last[0], second : last[1]], size, window.filter, box)
    pixels = encoded.decode()
    top, left, height, width = window.box(*pixels.shape[:2], uniforms)
    return resampling.fast(pixels[top : top + height, left : left + width], size, window.filter)


def to_channels(image: Image.Image, *, channels: int | None, name: str, on_mode: str) -> np.ndarray:
    """Pixels uint8 `[height, width, channels]` of a decoded image; see `decode`."""
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if image.mode == "P" and not transparent:
        image = image.convert("RGB")  # A palette is an encoding of colour: nothing is lost.
    elif image.mode == "1":
        image = image.convert("L")
    found = {"L": 1, "RGB": 3}.get(image.mode)
    if found is not None and not transparent and channels in (None, found):
        pixels = np.asarray(image)
        return pixels[:, :, None] if found == 1 else pixels
    wanted = 3 if channels is None else channels
    if on_mode != "convert":
        kind = "transparent" if transparent else {1: "grey", 3: "colour"}.get(found, "neither grey nor RGB")
        expected = {1: "grey (1 channel)", 3: "colour (3 channels)"}[wanted]
        raise errors.UserError(
            f"{name} is {kind} (mode {image.mode}) where {expected} is expected: set data.on_mode='convert' to convert "
            f"such files, or data.channels={found if found and not transparent else 3} if all are so."
        )
    if image.mode.startswith(("I", "F")):
        raise errors.UserError(f"{name} has more than 8 bits a channel (mode {image.mode}): store it with 8.")
    if transparent:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    pixels = np.asarray(image.convert("RGB" if wanted == 3 else "L"))
    return pixels[:, :, None] if wanted == 1 else pixels


class Tally:
    """Counts the distinct bad rows of a source; a warning for each, a stop above 1 %. Shared by reading threads."""

    def __init__(self, *, total: int, name: str):
        self._total = total
        self._name = name
        self._rows: set[int] = set()
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Distinct bad rows met so far."""
        return len(self._rows)

    def add(self, row: int, error: BadImage) -> None:
        """Counts a bad row once.

        Raises:
          errors.UserError: more than 1 % of all rows are bad.
        """
        with self._lock:
            if row in self._rows:
                return
            self._rows.add(row)
            count = len(self._rows)
        _logger.warning("skipped image %d of %d in %s: %s", count, self._total, self._name, error)
        if count > BAD_FRACTION * self._total:
            raise errors.UserError(
                f"{count} of the {self._total} images of {self._name} cannot be decoded, more than "
                f"{BAD_FRACTION:.0%}, the last of them {str(error).split(' cannot be decoded')[0]}: mend the data set."
            )


def _plain_header(content: bytes, channels: int | None) -> tuple[int, int] | None:
    """Height and width of a colour JPEG; None for anything else or odd, which PIL judges."""
    if content[:2] != _JPEG or channels == 1:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    # Other colour spaces (grey, CMYK, RGB by an Adobe marker) are PIL's to read.
    return (height, width) if colours == "YCbCr" else None


def _colour_jpeg(
    content: bytes, header: tuple[int, int], factor: int = 1, scratch: np.ndarray | None = None
) -> np.ndarray | None:
    """Pixels of a sound colour JPEG at 1/factor of its size, laid into `scratch` where given; None where PIL must judge."""
    least = [-(-side // factor) for side in header] if factor > 1 else (0, 0)
    try:
        pixels = simplejpeg.decode_jpeg(
            content, min_height=least[0], min_width=least[1], min_factor=factor, buffer=scratch
        )
    except ValueError:  # Warnings too: PIL decides whether such a file is good.
        return None
    return pixels if pixels.shape[:2] == tuple(-(-side // factor) for side in header) else None


def _scratch(size: int) -> np.ndarray | None:
    """Memory of this thread, at least so many bytes; None for very large images. Fresh memory for each image would cost half as
    much again as decoding (.54 against .36 ms at 256 px, in page faults).
    """
    if size > _SCRATCH_LIMIT:
        return None
    if getattr(_state, "scratch", np.empty(0)).size < size:
        _state.scratch = np.empty(size, np.uint8)
    return _state.scratch


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
