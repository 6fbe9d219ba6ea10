"""Mixup and cutmix on the device: one draw for a batch, from the step's key.

Cross-entropy is linear in the target, so a mixed target needs no soft labels: the loss is the weighted mean of the losses of the
two labels, and label smoothing applies to each.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Mixed(NamedTuple):
    """A batch of mixtures.

    Attributes:
      images: `[batch, height, width, channels]`.
      partners: int32 `[batch]`, the second label of each image.
      weight: float32 scalar in [0, 1], the share of the first label; the second has the rest.
    """

    images: jax.Array
    partners: jax.Array
    weight: jax.Array


def mix(
    key: jax.Array,
    images: Float[Array, "batch height width channels"],
    labels: Int[Array, " batch"],
    *,
    mixup: float,
    cutmix: float,
    switch: float = 0.5,
) -> Mixed:
    """Mixes each image with its neighbour in the batch, whose order is random already; a neighbour is mostly on the same device.

    Mixup (Zhang et al. 2018, arXiv:1710.09412): weight x first + (1 - weight) x second, weight ~ Beta(mixup, mixup). Cutmix
    (Yun et al. 2019, arXiv:1905.04899): a rectangle of the second, of the image's shape, expected area 1 - Beta(cutmix, cutmix)
    and uniform centre, cut at the border; the weight is the share of pixels that the first keeps. One draw for a batch, as in
    timm.

    Args:
      key: of the draw.
      images: canonical pixels, computed in their own dtype.
      labels: classes.
      mixup: parameter of the beta distribution; 0 is off.
      cutmix: the same.
      switch: probability of cutmix where both are on.
    """
    height, width = images.shape[1:3]
    key_which, key_mixup, key_cutmix, key_centre = jax.random.split(key, 4)
    share = jnp.ones((), jnp.float32)
    kept = jnp.full((height, width), share)
    if mixup:
        share = jax.random.beta(key_mixup, mixup, mixup, dtype=jnp.float32)
        kept = jnp.full((height, width), share)
    if cutmix:
        drawn = jax.random.beta(key_cutmix, cutmix, cutmix, dtype=jnp.float32)
        outside = ~rectangle(key_centre, drawn, height, width)
        area = jnp.sum(outside, dtype=jnp.float32) / (height * width)
        chosen = jax.random.uniform(key_which) < (switch if mixup else 1.0)
        share = jnp.where(chosen, area, share)
        kept = jnp.where(chosen, outside.astype(jnp.float32), kept)
    kept = kept[None, :, :, None].astype(images.dtype)
    mixed = kept * images + (1 - kept) * jnp.roll(images, 1, axis=0)
    return Mixed(mixed, jnp.roll(labels, 1), share)


def rectangle(key: jax.Array, share: Float[Array, ""], height: int, width: int) -> jax.Array:
    """A random rectangle as bool `[height, width]`, of area 1 - `share` before it is cut at the border."""
    sides = jnp.asarray((height, width))
    centre = jax.random.randint(key, (2,), 0, sides)
    half = (jnp.sqrt(1.0 - share) * sides).astype(jnp.int32) // 2
    rows, columns = (
        (jnp.arange(side) >= centre[axis] - half[axis]) & (jnp.arange(side) < centre[axis] + half[axis])
        for axis, side in enumerate((height, width))
    )
    return rows[:, None] & columns[None, :]
