"""Encoded bytes to uint8 pixels, with the mistakes of an image file told in one line."""

from __future__ import annotations

import io
import logging
import threading

import numpy as np
from PIL import Image

from robust_vit import errors

_logger = logging.getLogger(__name__)

ON_MODE = ("error", "convert")
ON_BAD_IMAGE = ("raise", "skip")
BAD_FRACTION = 0.01


class BadImage(errors.UserError):
    """An image that cannot be decoded; `on_bad_image="skip"` leaves it out."""


def decode(content: bytes, *, channels: int | None, name: str, on_mode: str = "error") -> np.ndarray:
    """Pixels uint8 `[height, width, channels]` of a JPEG, PNG or WebP. EXIF orientation is not applied.

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
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and its own, by format.
        raise BadImage(
            f"{name} cannot be decoded ({_one_line(error)}): replace the file, or set data.on_bad_image='skip' "
            "to go on without it."
        ) from error
    return to_channels(image, channels=channels, name=name, on_mode=on_mode)


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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
