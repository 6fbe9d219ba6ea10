"""Ten shapes of equal area as signed distance fields: eight upright ones without rotational symmetry, two controls with it."""

from __future__ import annotations

import functools

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float

UPRIGHT = ("arrow", "house", "heart", "mushroom", "flag", "crescent", "boot", "fish")
SYMMETRIC = ("disc", "plus")
NAMES = UPRIGHT + SYMMETRIC

EXTENT = 2.0  # A template covers [-2, 2] in shape units, in which every shape has area AREA and its centroid at 0.
AREA = 1.3
_RESOLUTION = 384

Plane = Float[np.ndarray, "height width"]


def _arrow(x: Plane, y: Plane) -> np.ndarray:
    return ((y >= 0) & (np.abs(x) < 0.9 * (1 - y))) | ((np.abs(x) < 0.28) & (y > -1) & (y < 0))


def _house(x: Plane, y: Plane) -> np.ndarray:
    body = (np.abs(x) < 0.65) & (y > -0.9) & (y < 0.1)
    roof = (y >= 0.1) & (np.abs(x) < 0.95 * (1 - (y - 0.1) / 0.8))
    return body | roof | ((x > 0.35) & (x < 0.62) & (y > 0) & (y < 0.85))


def _heart(x: Plane, y: Plane) -> np.ndarray:
    x, y = 1.2 * x, 1.2 * y + 0.1
    return (x**2 + y**2 - 1) ** 3 < x**2 * y**3


def _mushroom(x: Plane, y: Plane) -> np.ndarray:
    return ((x**2 + y**2 < 0.81) & (y >= 0)) | ((np.abs(x) < 0.26) & (y > -0.9) & (y < 0))


def _flag(x: Plane, y: Plane) -> np.ndarray:
    return ((np.abs(x + 0.62) < 0.13) & (np.abs(y) < 1)) | ((x > -0.62) & (x < 0.85) & (y > 0.05) & (y < 1))


def _crescent(x: Plane, y: Plane) -> np.ndarray:
    return (x**2 + y**2 < 0.81) & ((x - 0.5) ** 2 + y**2 > 0.49)


def _boot(x: Plane, y: Plane) -> np.ndarray:
    return ((np.abs(x + 0.35) < 0.3) & (np.abs(y) < 0.9)) | ((x > -0.65) & (x < 0.85) & (y > -0.9) & (y < -0.35))


def _fish(x: Plane, y: Plane) -> np.ndarray:
    body = ((x - 0.2) / 0.75) ** 2 + (y / 0.45) ** 2 < 1
    return body | ((x < -0.3) & (x > -0.95) & (np.abs(y) < -0.9 * (x + 0.3) + 0.1))


def _disc(x: Plane, y: Plane) -> np.ndarray:
    return x**2 + y**2 < 0.64


def _plus(x: Plane, y: Plane) -> np.ndarray:
    return ((np.abs(x) < 0.32) & (np.abs(y) < 0.9)) | ((np.abs(y) < 0.32) & (np.abs(x) < 0.9))


_INSIDE = {
    "arrow": _arrow,
    "house": _house,
    "heart": _heart,
    "mushroom": _mushroom,
    "flag": _flag,
    "crescent": _crescent,
    "boot": _boot,
    "fish": _fish,
    "disc": _disc,
    "plus": _plus,
}


def silhouettes() -> Bool[np.ndarray, "shape height width"]:
    """Every shape on the template grid: rows from the top (y = EXTENT) down, equal area, centroid in the middle."""
    axis = (np.arange(_RESOLUTION) + 0.5) / _RESOLUTION * 2 * EXTENT - EXTENT
    x, y = np.meshgrid(axis, -axis)
    result = []
    for name in NAMES:
        inside = _INSIDE[name](x, y)
        scale = np.sqrt(inside.mean() * (2 * EXTENT) ** 2 / AREA)
        result.append(_INSIDE[name](x * scale + x[inside].mean(), y * scale + y[inside].mean()))
    return np.stack(result)


@functools.cache
def distances() -> Float[np.ndarray, "shape height width"]:
    """Signed distance to the contour in shape units, negative inside; read-only."""
    pixel = 2 * EXTENT / _RESOLUTION
    fields = [
        (scipy.ndimage.distance_transform_edt(~inside) - scipy.ndimage.distance_transform_edt(inside)) * pixel
        for inside in silhouettes()
    ]
    stacked = np.stack(fields).astype(np.float32)
    stacked.flags.writeable = False
    return stacked


def sample(labels: np.ndarray, x: np.ndarray, y: np.ndarray) -> Float[np.ndarray, "batch height width"]:
    """Signed distances of shapes `labels` `[batch]` at points `[batch, height, width]` in shape units (y up), bilinear."""
    scale = _RESOLUTION / (2 * EXTENT)
    column = np.clip((x + EXTENT) * scale - 0.5, 0, _RESOLUTION - 1.001).astype(np.float32)
    row = np.clip((EXTENT - y) * scale - 0.5, 0, _RESOLUTION - 1.001).astype(np.float32)
    column0, row0 = column.astype(np.int32), row.astype(np.int32)
    column -= column0
    row -= row0
    flat = distances().reshape(-1)
    base = (labels.astype(np.int32)[:, None, None] * _RESOLUTION + row0) * _RESOLUTION + column0
    top = flat[base] * (1 - column) + flat[base + 1] * column
    bottom = flat[base + _RESOLUTION] * (1 - column) + flat[base + _RESOLUTION + 1] * column
    return top * (1 - row) + bottom * row
