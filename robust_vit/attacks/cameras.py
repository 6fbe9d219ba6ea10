"""Images as a camera sees them: a printed plane turned, moved away and out of focus, one view an example."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from robust_vit import errors
from robust_vit.attacks import arguments, warps

FIELD_OF_VIEW = 40.0  # Degrees over the width of an image seen from the front: an ordinary lens.


def camera(
    tilts: Float[Array, "batch 2"],
    rolls: Float[Array, " batch"],
    scales: Float[Array, " batch"],
    shifts: Float[Array, "batch 2"],
    *,
    aspect: float = 1.0,
) -> Float[Array, "batch 3 3"]:
    """The maps of `warps.affine` of a plane seen through a pinhole; exactly the identity for zeros and a scale of one.

    Args:
      tilts: degrees by which the plane is turned about its vertical and its horizontal axis, each between -90 and 90.
      rolls: degrees counterclockwise in the plane.
      scales: size of what is seen, one over the distance.
      shifts: to the right and down, in fractions of the image's width and height.
      aspect: width over height of the image.
    """
    across, up = jnp.deg2rad(tilts[:, 0]), jnp.deg2rad(tilts[:, 1])
    in_plane = warps.similarity(rolls, jnp.zeros_like(shifts), jnp.ones_like(rolls), aspect=aspect)
    focal = 1.0 / np.tan(np.deg2rad(FIELD_OF_VIEW) / 2)
    zero, one = jnp.zeros_like(across), jnp.ones_like(across)
    # A point (x, y) of the plane lies at (x cos, y cos + x sin sin, depth): where it is seen is that over its depth.
    seen = _matrix(
        (scales * jnp.cos(across), zero, zero),
        (scales * jnp.sin(across) * jnp.sin(up) * aspect, scales * jnp.cos(up), zero),
        (jnp.sin(across) * jnp.cos(up) / focal, -jnp.sin(up) / (aspect * focal), one),
    )
    x, y = 2.0 * shifts[:, 0], 2.0 * shifts[:, 1]
    unshifted = _matrix((one, zero, -x), (zero, one, -y), (zero, zero, one))
    turned = jnp.concatenate([in_plane, jnp.broadcast_to(jnp.asarray([0.0, 0.0, 1.0]), (len(rolls), 1, 3))], axis=1)
    exact = {"precision": jax.lax.Precision.HIGHEST}
    return jnp.matmul(turned, jnp.matmul(_inverse(seen), unshifted, **exact), **exact)


def blur(
    images: Float[Array, "batch height width channels"], deviations: Float[Array, " batch"], *, radius: int
) -> Float[Array, "batch height width channels"]:
    """Gaussian blur with a deviation of its own for each image, in pixels; zero is exactly the identity; edges are repeated.

    Shifted copies rather than a convolution, whose gradient is slow in a loop on a CPU. No passes of a model.

    Args:
      images: any range.
      deviations: in pixels.
      radius: how far the kernel reaches, in pixels; static. Three times the largest deviation loses 0.3 %.
    """
    offsets = np.arange(-radius, radius + 1)
    sharp = jnp.maximum(deviations, 1e-3)[:, None]
    weights = jnp.exp(-0.5 * jnp.square(jnp.asarray(offsets, images.dtype)[None] / sharp))
    weights = (weights / jnp.sum(weights, axis=1, keepdims=True)).astype(images.dtype)
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (radius, radius)
        padded = jnp.pad(images, pad, mode="edge")
        size = images.shape[axis]
        shifted = (jax.lax.slice_in_dim(padded, start, start + size, axis=axis) for start in range(2 * radius + 1))
        images = sum(weights[:, index, None, None, None] * part for index, part in enumerate(shifted))
    return images


class Views(flax.struct.PyTreeNode, kw_only=True):
    """A sequence of views of one plane, as a transform `(keys, images) -> images` that draws one of them for each image.

    `views` makes one. With `robust_vit.attacks.expectation` any attack is climbed over the whole sequence.

    Attributes:
      distances: of each view, in units of the distance at which the image fills the picture.
      angles: degrees by which each view is turned about the vertical axis.
      radius: of the blur that keeps far views from aliasing, in pixels; static.
    """

    distances: Float[Array, " views"]
    angles: Float[Array, " views"]
    radius: int = flax.struct.field(pytree_node=False, default=1)

    @jax.jit
    def __call__(self, keys: Key[Array, " batch"], images: Float[Array, "batch height width channels"]) -> jax.Array:
        """Each image from one of the views, drawn by its key with equal chances."""
        drawn = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(self.distances)))(keys)
        return self.at(drawn, images)

    @jax.jit
    def at(self, index: Any, images: Float[Array, "batch height width channels"]) -> jax.Array:
        """Each image from view `index`, one or `[batch]`; what lies beside the plane is mid-grey."""
        index = jnp.broadcast_to(jnp.asarray(index), images.shape[:1])
        distances, angles = (jnp.asarray(values, images.dtype)[index] for values in (self.distances, self.angles))
        # The deviation of a picture taken at the smaller size, of which half a pixel is that of the larger one.
        blurred = blur(images, 0.5 * jnp.sqrt(jnp.maximum(jnp.square(distances) - 1.0, 0.0)), radius=self.radius)
        zeros = jnp.zeros_like(distances)
        maps = camera(
            jnp.stack([angles, zeros], axis=1),
            zeros,
            1.0 / distances,
            jnp.stack([zeros, zeros], axis=1),
            aspect=images.shape[2] / images.shape[1],
        )
        return 0.5 + warps.affine(blurred - 0.5, maps)


def views(*, distances: tuple[float, ...] = (1.0, 1.5, 2.0), angles: tuple[float, ...] = (-30.0, 0.0, 30.0)) -> Views:
    """Every distance with every angle, as Eykholt et al. 2018 (arXiv 1707.08945, table 1) photographed their signs.

    Departure: their 5 to 40 feet are distances relative to that at which the object fills the image, which this cannot know.

    Args:
      distances: at least 1, where the image fills the picture.
      angles: degrees about the vertical axis, between -90 and 90.
    """
    if not distances or not angles or min(distances) < 1 or max(map(abs, angles)) >= 90:
        raise errors.UserError(
            f"views got distances {distances} and angles {angles}: expected distances from 1 and angles between -90 and 90."
        )
    arguments.positive(distances=np.asarray(distances))
    pairs = np.asarray([(distance, angle) for distance in distances for angle in angles], np.result_type(float))
    radius = max(1, int(np.ceil(1.5 * np.sqrt(max(distances) ** 2 - 1))))
    return Views(distances=jnp.asarray(pairs[:, 0]), angles=jnp.asarray(pairs[:, 1]), radius=radius)


def _matrix(*rows: tuple[jax.Array, ...]) -> Float[Array, "batch 3 3"]:
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def _inverse(matrices: Float[Array, "batch 3 3"]) -> Float[Array, "batch 3 3"]:
    """Up to a factor, chosen so that the last entry is one: the columns of the adjugate are cross products of the rows."""
    first, second, third = matrices[:, 0], matrices[:, 1], matrices[:, 2]
    columns = [jnp.cross(second, third), jnp.cross(third, first), jnp.cross(first, second)]
    adjugate = jnp.stack(columns, axis=-1)
    return adjugate / adjugate[:, 2:, 2:]
