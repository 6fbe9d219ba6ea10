"""Images seen through affine and perspective maps: bilinear, differentiable in pixels and maps, one map an example.

Coordinates are normalised: x runs over [-1, 1] from the left edge of the first pixel to the right edge of the last one, y from
top to bottom, (0, 0) is the centre of the image; so the centre of pixel `i` of `n` is at `(2 i + 1) / n - 1`, and a map means the
same at every resolution. A map takes a point of the output to the point of the input that is seen there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_vit import errors


def _inside(position: jax.Array, size: int) -> jax.Array:
    return jnp.clip(position, 0, size - 1)


def _mirrored(position: jax.Array, size: int) -> jax.Array:
    if size == 1:
        return jnp.zeros_like(position)
    return size - 1 - jnp.abs(size - 1 - jnp.abs(position) % (2 * (size - 1)))


# Where a pixel position beyond the image is read. Zeros are a frame of one pixel, which `affine` puts around the image.
PADDINGS = {"zeros": _inside, "edge": _inside, "reflect": _mirrored}


def affine(
    images: Float[Array, "batch height width channels"],
    matrices: Float[Array, "batch rows 3"],
    *,
    padding: str = "zeros",
    out_shape: tuple[int, int] | None = None,
) -> Float[Array, "batch new_height new_width channels"]:
    """Each image through its own map, bilinear; the identity returns the very same bytes. No passes of a model.

    A map that shrinks the image reads too few pixels of it and aliases: blur before.

    Args:
      images: any range.
      matrices: `[batch, 2, 3]`, affine, or `[batch, 3, 3]`, perspective (the third row divides; the scale of the matrix is of no
        account). `matrix @ (x, y, 1)` is where in the input the output's point (x, y) is, in normalised coordinates.
      padding: what lies beyond the input: `zeros`, `edge` (the nearest pixel), or `reflect` (mirrored about the centres of the
        border's pixels).
      out_shape: height and width of the output; those of the input where it is None.

    Raises:
      errors.UserError: an unknown padding, or matrices that do not fit the images.
    """
    if padding not in PADDINGS:
        raise errors.unknown("padding", padding, PADDINGS)
    if images.ndim != 4 or matrices.shape[0] != images.shape[0] or matrices.shape[1:] not in ((2, 3), (3, 3)):
        raise errors.UserError(
            f"images {tuple(images.shape)} with matrices {tuple(matrices.shape)}: expected [batch, height, width, channels] and "
            "one matrix an image, [batch, 2, 3] or [batch, 3, 3]."
        )
    height, width = images.shape[1:3]
    rows, columns = _positions(matrices, (height, width), out_shape or (height, width))
    if padding == "zeros":
        images = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
        rows, columns = rows + 1, columns + 1
    return _bilinear(images, PADDINGS[padding](rows, images.shape[1]), PADDINGS[padding](columns, images.shape[2]))


def similarity(
    degrees: Float[Array, " batch"],
    shifts: Float[Array, "batch 2"],
    scales: Float[Array, " batch"] | float = 1.0,
    *,
    aspect: float = 1.0,
) -> Float[Array, "batch 2 3"]:
    """The maps of `affine` that scale what is in the image about its centre, then turn it, then shift it.

    Args:
      degrees: counterclockwise.
      shifts: to the right and down, in fractions of the image's width and height.
      scales: above 1 enlarges.
      aspect: width over height of the image: a rotation is one of pixels.
    """
    radians = jnp.deg2rad(degrees)
    cosine, sine = jnp.cos(radians) / scales, jnp.sin(radians) / scales
    # What is seen at a point was there before shift and turn: the inverse of both. One width is 2 in coordinates.
    linear = jnp.stack([jnp.stack([cosine, -sine / aspect], -1), jnp.stack([sine * aspect, cosine], -1)], -2)
    offset = -jnp.sum(linear * (2.0 * shifts)[:, None, :], axis=-1)
    return jnp.concatenate([linear, offset[:, :, None]], axis=-1)


def _positions(
    matrices: jax.Array, shape: tuple[int, int], out_shape: tuple[int, int]
) -> tuple[Float[Array, "batch new_height new_width"], Float[Array, "batch new_height new_width"]]:
    """Row and column of the input, in pixels, that each pixel of the output shows; written out so that no product is rounded."""
    matrices = matrices.astype(jnp.promote_types(matrices.dtype, jnp.float32))

    def from_centre(size: int) -> jax.Array:
        return jnp.arange(size, dtype=matrices.dtype) - (size - 1) / 2

    y, x = from_centre(out_shape[0])[None, :, None], from_centre(out_shape[1])[None, None, :]

    def row(index: int, extent: float) -> jax.Array:
        # Factors of pixels rather than of coordinates: they are 1 for the identity, so that it is exact.
        entry = matrices[:, index, :, None, None]
        return (
            entry[:, 0] * (extent / out_shape[1]) * x
            + entry[:, 1] * (extent / out_shape[0]) * y
            + entry[:, 2] * (extent / 2)
        )

    columns, rows = row(0, shape[1]), row(1, shape[0])
    if matrices.shape[1] == 3:
        depth = row(2, 2.0)
        # What is on the horizon or behind the eye is infinitely far away, and so beyond the image.
        ahead = depth > 0
        depth = jnp.where(ahead, depth, 1.0)
        columns = jnp.where(ahead, columns / depth, 4.0 * shape[1])
        rows = jnp.where(ahead, rows / depth, 4.0 * shape[0])
    return rows + (shape[0] - 1) / 2, columns + (shape[1] - 1) / 2


def _bilinear(images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Pixels at positions inside the image."""
    batch, height, width, channels = images.shape
    top, left = jnp.floor(rows), jnp.floor(columns)
    down, right = (rows - top)[..., None], (columns - left)[..., None]
    top, left = top.astype(jnp.int32), left.astype(jnp.int32)
    bottom, end = jnp.minimum(top + 1, height - 1), jnp.minimum(left + 1, width - 1)
    corners = jnp.stack([top * width + left, top * width + end, bottom * width + left, bottom * width + end], axis=1)
    flat = images.reshape(batch, height * width, channels)
    pixels = jax.vmap(lambda image, index: image.at[index].get(mode="promise_in_bounds"))(flat, corners)
    down, right = down.astype(images.dtype), right.astype(images.dtype)
    upper = pixels[:, 0] + right * (pixels[:, 1] - pixels[:, 0])
    lower = pixels[:, 2] + right * (pixels[:, 3] - pixels[:, 2])
    return upper + down * (lower - upper)
