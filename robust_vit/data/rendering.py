"""Composes textured shapes: which labels an example has, where its shape stands, and its pixels. Vectorised over examples."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from robust_vit import errors
from robust_vit.data import draws, shapes, textures

VARIANTS = (
    "aligned",
    "random",
    "conflict",
    "silhouette",
    "edges",
    "grey",
    "texture_only",
    "background",
    "label_noise",
)
_PARAMETERS = {"background": "rho", "label_noise": "p"}
SIZES = (32, 64)
NUM_CLASSES = len(shapes.NAMES)

# Geometry, in units of half the image width.
SCALE = (0.7, 0.95)
ASPECT = 1.15  # Largest ratio of the axes.
TILT = 10.0  # Largest rotation, degrees: shapes stay upright.
WARP = 0.06  # Largest displacement of the contour by a wave of one cycle per image.
# Luminance and colour, in [0, 1].
LUMINANCE = (0.42, 0.58)  # Mean of the background.
STEP = (0.08, 0.16)  # The object's mean is lighter or darker by this.
# Standard deviation of texture and background; less than 1 % of all values are clipped to [0, 1].
TEXTURE_CONTRAST = 0.15
BACKGROUND_CONTRAST = 0.07
CHROMA = 0.1  # Length of the colour offset, orthogonal to grey.
EDGE_WIDTH = 1.5 / 32  # Of the image's width.


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What decides the bytes of a generated data set.

    Attributes:
      variant: one of `VARIANTS`.
      parameter: rho of "background", p of "label_noise", else None.
      size: 32 or 64 pixels.
      train_examples: images in "train".
      test_examples: images in "test".
      seed: of all draws. Example i has the same geometry, textures and colours in every variant of equal seed.
    """

    variant: str = "aligned"
    parameter: float | None = None
    size: int = 32
    train_examples: int = 10_000
    test_examples: int = 2_000
    seed: int = 0

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise errors.unknown("config of textured_shapes", self.variant, VARIANTS)
        symbol = _PARAMETERS.get(self.variant)
        if symbol and not (isinstance(self.parameter, int | float) and 0 <= self.parameter <= 1):
            raise errors.UserError(
                f"textured_shapes/{self.variant} has {symbol} = {self.parameter}: give a share in [0, 1], for example "
                f"textured_shapes/{self.variant}(0.9)."
            )
        if not symbol and self.parameter is not None:
            raise errors.UserError(
                f"textured_shapes/{self.variant} takes no number, but was given {self.parameter}: leave it out."
            )
        if self.size not in SIZES:
            raise errors.UserError(f"size of textured_shapes is {self.size}: expected one of {SIZES}.")
        for key in ("train_examples", "test_examples", "seed"):
            number = getattr(self, key)
            if not isinstance(number, int) or number < (0 if key == "seed" else 1):
                raise errors.UserError(f"{key} of textured_shapes is {number!r}: expected a positive integer.")

    @property
    def name(self) -> str:
        """The folder's name: every field is in it."""
        parameter = "" if self.parameter is None else f"_{_PARAMETERS[self.variant]}{self.parameter:g}"
        counts = f"{self.train_examples}_{self.test_examples}"
        return f"{self.variant}{parameter}_{self.size}px_{counts}_seed{self.seed}"


def labels(recipe: Recipe, split: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Labels of examples, int64 `[rows]` each: `label`, `clean_label`, `shape_label`, `texture_label`, `background_label`.

    Classes are balanced: the clean label is the row modulo ten. -1 stands for a cue that the image does not have.
    """
    uniform = draws.uniforms(rows, seed=recipe.seed, purpose=f"{split}/labels", count=5)
    clean = np.asarray(rows, np.int64) % NUM_CLASSES

    def other(column: int) -> np.ndarray:
        return (clean + 1 + (uniform[:, column] * (NUM_CLASSES - 1)).astype(np.int64)) % NUM_CLASSES

    anything = (uniform[:, 0] * NUM_CLASSES).astype(np.int64)
    texture = {"random": anything, "conflict": other(0)}.get(recipe.variant, clean)
    background = (uniform[:, 1] * NUM_CLASSES).astype(np.int64)
    label, shape = clean, clean
    if recipe.variant == "background":
        background = np.where(uniform[:, 2] < recipe.parameter, clean, other(1))
    if recipe.variant == "label_noise" and split == "train":
        label = np.where(uniform[:, 3] < recipe.parameter, other(4), clean)
    absent = np.full_like(clean, -1)
    if recipe.variant in ("silhouette", "edges"):
        texture, background = absent, absent
    if recipe.variant == "texture_only":
        shape, background = absent, absent
    return {
        "label": label,
        "clean_label": clean,
        "shape_label": shape,
        "texture_label": texture,
        "background_label": background,
    }


def render(recipe: Recipe, split: str, rows: np.ndarray) -> dict[str, Any]:
    """Examples of a split: the labels of `labels`, and three arrays.

    Returns:
      `image` uint8 `[rows, size, size, 3]`; `object_mask` uint8 `[rows, size, size]`, 255 inside; `box` float32 `[rows, 4]`:
      top, left, bottom, right, in [0, 1].
    """
    rows = np.asarray(rows, np.int64)
    found = labels(recipe, split, rows)
    distance = _distances(recipe, split, rows, found["clean_label"])
    inside = np.clip(0.5 - distance, 0, 1)
    if recipe.variant == "texture_only":
        inside = np.ones_like(inside)
    if recipe.variant == "silhouette":
        pixels = np.repeat(1 - inside[..., None], 3, axis=-1)
    elif recipe.variant == "edges":
        line = np.clip(EDGE_WIDTH * recipe.size / 2 + 0.5 - np.abs(distance), 0, 1)
        pixels = np.repeat(1 - line[..., None], 3, axis=-1)
    else:
        pixels = _painted(recipe, split, rows, found, inside)
    solid = inside > 0.5
    image = np.clip(pixels * 255 + 0.5, 0, 255).astype(np.uint8)
    return {**found, "image": image, "object_mask": solid.astype(np.uint8) * 255, "box": _boxes(solid)}


def _distances(recipe: Recipe, split: str, rows: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Signed distance to the contour in pixels, float32 `[rows, size, size]`."""
    u = draws.uniforms(rows, seed=recipe.seed, purpose=f"{split}/geometry", count=9).astype(np.float32)[..., None, None]
    axis = ((np.arange(recipe.size, dtype=np.float32) + 0.5) / recipe.size * 2 - 1).astype(np.float32)
    x, y = axis[None, None, :], -axis[None, :, None]
    scale = SCALE[0] + (SCALE[1] - SCALE[0]) * u[:, 0]
    stretch = np.float32(ASPECT) ** (u[:, 1] - 0.5)
    tilt = np.deg2rad(TILT) * (2 * u[:, 2] - 1)
    room = np.maximum(1 - 1.15 * scale, 0)
    x = x - room * (2 * u[:, 3] - 1)
    y = y - room * (2 * u[:, 4] - 1)
    wave_x = np.float32(WARP) * np.sin(np.pi * y + 2 * np.pi * u[:, 5]) * (2 * u[:, 6] - 1)
    wave_y = np.float32(WARP) * np.sin(np.pi * x + 2 * np.pi * u[:, 7]) * (2 * u[:, 8] - 1)
    x, y = x + wave_x, y + wave_y
    turned_x = (np.cos(tilt) * x + np.sin(tilt) * y) / (scale * stretch)
    turned_y = (np.cos(tilt) * y - np.sin(tilt) * x) / (scale / stretch)
    return shapes.sample(label, turned_x, turned_y) * scale * (recipe.size / 2)


def _painted(recipe: Recipe, split: str, rows: np.ndarray, found: dict, inside: np.ndarray) -> np.ndarray:
    u = draws.uniforms(rows, seed=recipe.seed, purpose=f"{split}/paint", count=5).astype(np.float32)
    half = recipe.size // 2 + 1
    count = recipe.size * half
    bits = np.stack(
        [draws.bits(seed=recipe.seed, purpose=f"{split}/noise", row=int(row), count=2 * count) for row in rows]
    )
    bits = bits.reshape(len(rows), 2, recipe.size, half)
    low, high = LUMINANCE
    chroma = 0.0 if recipe.variant == "grey" else CHROMA
    texture = textures.fields(found["texture_label"], bits[:, 0], kind="texture")
    ground_mean = low + (high - low) * u[:, 2]
    step = STEP[0] + (STEP[1] - STEP[0]) * u[:, 0]
    object_mean = ground_mean + np.where(u[:, 4] < 0.5, step, -step)
    luminance = object_mean[:, None, None] + np.float32(TEXTURE_CONTRAST) * texture
    painted = luminance[..., None] + _tint(u[:, 1], chroma)
    if recipe.variant == "texture_only":
        return painted
    field = textures.fields(found["background_label"], bits[:, 1], kind="background")
    luminance = ground_mean[:, None, None] + np.float32(BACKGROUND_CONTRAST) * field
    # A background's hue goes with its label, within a third of the distance to the next.
    hue = (found["background_label"] + (u[:, 3] - 0.5) / 3).astype(np.float32) / NUM_CLASSES
    ground = luminance[..., None] + _tint(hue, chroma)
    return ground + (painted - ground) * inside[..., None]


def _tint(hue: np.ndarray, chroma: float) -> np.ndarray:
    """Colour offsets `[rows, 1, 1, 3]` of zero sum and length `chroma`, at hues in turns."""
    angles = 2 * np.pi * (hue[:, None] - np.arange(3, dtype=np.float32) / 3)
    return (np.float32(chroma * np.sqrt(2 / 3)) * np.cos(angles))[:, None, None, :]


def _boxes(solid: np.ndarray) -> np.ndarray:
    size = solid.shape[1]
    sides = []
    for axis in (2, 1):
        some = solid.any(axis)
        sides.append((some.argmax(1), size - some[:, ::-1].argmax(1)))
    (top, bottom), (left, right) = sides
    return np.stack([top, left, bottom, right], axis=1).astype(np.float32) / size
