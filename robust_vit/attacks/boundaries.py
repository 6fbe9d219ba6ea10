"""A model's decision boundaries near an image, made linear: how far the logits are from crossing, and along what."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from robust_vit.attacks import evaluation, minimal, norms


class Boundaries(NamedTuple):
    """Boundaries between an image's label and some other classes.

    Attributes:
      gaps: logit of the label minus that of the other class: zero on the boundary, positive on the label's side.
      normals: gradient in the pixels of the other class's logit minus the label's; zero where it is not finite.
      logits: of the images.
      vanished: all normals are zero or one is not finite.
    """

    gaps: Float[Array, "batch rivals"]
    normals: Float[Array, "batch rivals height width channels"]
    logits: Float[Array, "batch classes"]
    vanished: Bool[Array, " batch"]


def linearise(
    model: evaluation.Model,
    images: Float[Array, "batch height width channels"],
    keys: Key[Array, " batch"],
    labels: Int[Array, " batch"],
    choose: Callable,
    draw: jax.Array | int = 0,
) -> Boundaries:
    """Boundaries between the labels and the classes that `choose(logits) -> [batch, rivals]` names.

    Cost: one forward pass and `rivals` backward passes, which run as one over a batch `rivals` times as large.
    """
    logits, pull_back = jax.vjp(lambda images: evaluation.logits(model, images, keys, draw), images)
    classes = logits.shape[-1]
    rivals = choose(logits)
    label = jax.nn.one_hot(labels, classes, dtype=logits.dtype)[:, None]
    differences = jax.nn.one_hot(rivals, classes, dtype=logits.dtype) - label
    normals = jax.vmap(lambda difference: pull_back(difference)[0], in_axes=1, out_axes=1)(differences)
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    gaps = jnp.take_along_axis(wide, labels[:, None], axis=-1) - jnp.take_along_axis(wide, rivals, axis=-1)
    finite = jnp.all(jnp.isfinite(normals), axis=(1, 2, 3, 4))
    normals = jnp.where(finite[:, None, None, None, None], normals, 0.0)
    return Boundaries(gaps, normals, logits, jnp.all(normals == 0.0, axis=(1, 2, 3, 4)))


def most_likely_rivals(logits: jax.Array, labels: jax.Array, count: int) -> Int[Array, "batch rivals"]:
    """The classes with the largest logits, the label left out: `count` of them, or all others where there are fewer."""
    others = jnp.where(jax.nn.one_hot(labels, logits.shape[-1], dtype=bool), -jnp.inf, logits)
    return jax.lax.top_k(others, min(count, logits.shape[-1] - 1))[1]


def nearest(
    norm: norms.Norm, boundaries: Boundaries
) -> tuple[Float[Array, " batch"], Float[Array, "batch height width channels"], Float[Array, " batch"]]:
    """Gap, normal and distance of the linear boundary that is nearest where there is no box."""
    shape = boundaries.normals.shape
    slopes = minimal.slope(norm, boundaries.normals.reshape(-1, *shape[2:])).reshape(shape[:2])
    distances = jnp.abs(boundaries.gaps) / (slopes + 1e-12)
    index = jnp.argmin(distances, axis=1)[:, None]
    gap, distance = (jnp.take_along_axis(array, index, axis=1)[:, 0] for array in (boundaries.gaps, distances))
    return gap, jnp.take_along_axis(boundaries.normals, index[..., None, None, None], axis=1)[:, 0], distance
