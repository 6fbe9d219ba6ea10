"""JPEG as a differentiable function of pixels: what libjpeg encodes and decodes, with a gradient through its rounding."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from robust_vit.attacks import arguments

# ITU-T T.81 (1992), tables K.1 and K.2.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)
# JFIF 1.02: rows Y, Cb, Cr of red, green, blue; the last two are shifted by 128.
_FORWARD = np.asarray(((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312)))
_BACKWARD = np.asarray(((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0)))
_FREQUENCIES = np.arange(8)[:, None]
_DCT = np.cos((2 * np.arange(8)[None] + 1) * _FREQUENCIES * np.pi / 16) * np.where(_FREQUENCIES == 0, 0.5**0.5, 1.0) / 2


def straight_through(values: jax.Array) -> jax.Array:
    """Rounded values, with the gradient of the values themselves (Bengio et al. 2013, arXiv 1308.3432)."""
    return values + jax.lax.stop_gradient(jnp.round(values) - values)


def soft(values: jax.Array) -> jax.Array:
    """Values drawn towards whole numbers by the cube of the rest (Shin & Song 2017): a true gradient, not JPEG's exact pixels."""
    rest = values - jax.lax.stop_gradient(jnp.round(values))
    return jax.lax.stop_gradient(jnp.round(values)) + rest**3


ROUNDINGS = {"straight_through": straight_through, "soft": soft}


def jpeg(
    images: Float[Array, "batch height width channels"],
    quality: float | Float[Array, " batch"],
    *,
    rounding: str | Callable = "straight_through",
) -> Float[Array, "batch height width channels"]:
    """Images after encoding and decoding as baseline JPEG. No passes of a model.

    As libjpeg does by default, and so PIL: 8-bit pixels, YCbCr with chroma halved in both directions, tables scaled by the
    quality, chroma enlarged by a triangle filter. With `straight_through` the pixels are PIL's but for its integer arithmetic
    (tests/attacks/test_attack_jpeg.py: by less than half a 255th in the mean).

    Args:
      images: canonical pixels in [0, 1]; of one channel a grey JPEG.
      quality: 1 to 100, one or `[batch]`; may be traced; no gradient.
      rounding: `straight_through`, `soft`, or a named function of an array.
    """
    rounded = arguments.find("rounding", rounding, ROUNDINGS)
    quality = jnp.broadcast_to(jnp.asarray(quality, images.dtype), images.shape[:1])
    pixels = rounded(255.0 * images)
    if images.shape[-1] == 1:
        return _coded(pixels[..., 0] - 128.0, _LUMINANCE, quality, rounded)[..., None] / 255.0 + 128.0 / 255.0
    height, width = images.shape[1:3]
    planes = rounded(jnp.einsum("pc,bhwc->pbhw", jnp.asarray(_FORWARD, images.dtype), pixels))
    luminance = _coded(planes[0] - 128.0, _LUMINANCE, quality, rounded) + 128.0
    chroma = [
        _enlarged(_coded(_halved(plane, rounded), _CHROMINANCE, quality, rounded)[:, : -(-height // 2)], height, width)
        for plane in planes[1:]
    ]
    decoded = jnp.stack([luminance, *(rounded(plane - _tie_break(1 / 64, plane)) for plane in chroma)], axis=-1)
    colours = jnp.einsum("cp,bhwp->bhwc", jnp.asarray(_BACKWARD, images.dtype), decoded)
    return jnp.clip(rounded(colours), 0.0, 255.0) / 255.0


def tables(base: tuple, quality: Float[Array, " batch"]) -> Float[Array, "batch 8 8"]:
    """Quantisation steps at a quality, as libjpeg scales them (`jpeg_set_quality`, baseline)."""
    quality = jnp.clip(quality, 1.0, 100.0)
    scale = jnp.floor(jnp.where(quality < 50.0, 5000.0 / quality, 200.0 - 2.0 * quality))
    steps = jnp.asarray(base, quality.dtype)[None] * scale[:, None, None]
    return jnp.clip(jnp.floor((steps + 50.0) / 100.0), 1.0, 255.0)


def _coded(plane: jax.Array, base: tuple, quality: jax.Array, rounded: Callable) -> jax.Array:
    """A plane around zero `[batch, height, width]` after the transform of its blocks was quantised; edges are repeated."""
    batch, height, width = plane.shape
    padded = jnp.pad(plane, ((0, 0), (0, -height % 8), (0, -width % 8)), mode="edge")
    blocks = padded.reshape(batch, padded.shape[1] // 8, 8, padded.shape[2] // 8, 8)
    basis = jnp.asarray(_DCT, plane.dtype)
    steps = jax.lax.stop_gradient(tables(base, quality))[:, None, :, None, :]
    exact = {"precision": jax.lax.Precision.HIGHEST}
    quantised = rounded(jnp.einsum("ui,bminj,vj->bmunv", basis, blocks, basis, **exact) / steps) * steps
    blocks = jnp.einsum("ui,bmunv,vj->bminj", basis, quantised, basis, **exact)
    decoded = jnp.clip(rounded(blocks), -128.0, 127.0)
    return decoded.reshape(padded.shape)[:, :height, :width]


def _halved(plane: jax.Array, rounded: Callable) -> jax.Array:
    """Means of two by two pixels; libjpeg repeats the last pixel to whole blocks before, the last row of means after."""
    batch, height, width = plane.shape
    padded = jnp.pad(plane, ((0, 0), (0, height % 2), (0, -width % 16)), mode="edge")
    means = padded.reshape(batch, padded.shape[1] // 2, 2, padded.shape[2] // 2, 2).mean(axis=(2, 4))
    return rounded(means + _tie_break(0.125, means))


def _tie_break(size: float, plane: jax.Array) -> jax.Array:
    """What libjpeg adds before it rounds: ties fall in columns of even position, and rise in those of odd one."""
    return jnp.where(jnp.arange(plane.shape[2]) % 2 == 0, -size, size).astype(plane.dtype)[None, None]


def _enlarged(plane: jax.Array, height: int, width: int) -> jax.Array:
    """Twice the size in both directions: each pixel three quarters of the nearest and a quarter of the next nearest."""
    plane = plane[:, :, : -(-width // 2)]
    for axis, size in ((1, height), (2, width)):
        before = jnp.concatenate([jax.lax.slice_in_dim(plane, 0, 1, axis=axis), plane], axis=axis)
        before = jax.lax.slice_in_dim(before, 0, plane.shape[axis], axis=axis)
        after = jnp.concatenate(
            [jax.lax.slice_in_dim(plane, 1, None, axis=axis), jax.lax.slice_in_dim(plane, -1, None, axis=axis)],
            axis=axis,
        )
        pair = jnp.stack([0.75 * plane + 0.25 * before, 0.75 * plane + 0.25 * after], axis=axis + 1)
        shape = list(plane.shape)
        shape[axis] *= 2
        plane = jax.lax.slice_in_dim(pair.reshape(shape), 0, size, axis=axis)
    return plane
