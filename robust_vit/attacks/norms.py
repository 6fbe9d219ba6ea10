"""Norms as data: what an attack needs to know of a ball, in pixel units [0, 1], one value or direction an example.

Every function takes arrays `[batch, height, width, channels]` and, where it needs one, a radius that broadcasts against
`[batch]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_vit import errors


@dataclasses.dataclass(frozen=True)
class Norm:
    """The geometry of a threat. Hashable: a part of the compiled program's key.

    Attributes:
      name: as in `linf-8`.
      measure: `(differences) -> [batch]`: the norm of each.
      project: `(images, clean, radius) -> images`: into the ball around `clean` and into [0, 1]; exact where the ball is a
        box, else the ball first and the box second, which leaves the point inside both, though not always the nearest one.
      ascend: `(gradients) -> directions` of norm one along which a linear function grows fastest; zero for a zero gradient.
      draw: `(keys, like, radius) -> differences` uniform in the ball, one key an example.
    """

    name: str
    measure: Callable
    project: Callable
    ascend: Callable
    draw: Callable


def _linf_measure(differences: Float[Array, "batch height width channels"]) -> Float[Array, " batch"]:
    return jnp.max(jnp.abs(differences), axis=_features(differences))


def _linf_project(images: jax.Array, clean: jax.Array, radius: jax.Array) -> jax.Array:
    radius = _broadcast(radius, clean)
    return jnp.clip(images, jnp.maximum(clean - radius, 0.0), jnp.minimum(clean + radius, 1.0))


def _linf_ascend(gradients: jax.Array) -> jax.Array:
    return jnp.sign(gradients)


def _linf_draw(keys: jax.Array, like: jax.Array, radius: jax.Array) -> jax.Array:
    draw = jax.vmap(lambda key: jax.random.uniform(key, like.shape[1:], like.dtype, -1.0, 1.0))
    return _broadcast(radius, like) * draw(keys)


def _l2_measure(differences: Float[Array, "batch height width channels"]) -> Float[Array, " batch"]:
    return _l2_parts(differences)[1]


def _l2_project(images: jax.Array, clean: jax.Array, radius: jax.Array) -> jax.Array:
    difference = images - clean
    length = _l2_measure(difference)
    factor = jnp.where(length > radius, radius / jnp.where(length > 0, length, 1.0), 1.0)
    return jnp.clip(clean + _broadcast(factor, clean) * difference, 0.0, 1.0)


def _l2_ascend(gradients: jax.Array) -> jax.Array:
    scaled, _ = _l2_parts(gradients)
    length = jnp.sqrt(jnp.sum(scaled * scaled, axis=_features(scaled), keepdims=True))
    return jnp.where(length > 0, scaled / jnp.where(length > 0, length, 1.0), 0.0)


def _l2_draw(keys: jax.Array, like: jax.Array, radius: jax.Array) -> jax.Array:
    dimension = like[0].size

    def draw(key):
        direction_key, length_key = jax.random.split(key)
        direction = jax.random.normal(direction_key, like.shape[1:], like.dtype)
        # The volume within r of the centre grows as r^dimension.
        length = jax.random.uniform(length_key, (), like.dtype) ** (1.0 / dimension)
        return length * direction / jnp.sqrt(jnp.sum(direction * direction))

    return _broadcast(radius, like) * jax.vmap(draw)(keys)


def _l2_parts(differences: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Differences over their largest entry, and their length: squares of gradients below 1e-23 underflow in float32."""
    largest = jnp.max(jnp.abs(differences), axis=_features(differences), keepdims=True)
    scaled = jnp.where(largest > 0, differences / jnp.where(largest > 0, largest, 1.0), 0.0)
    squares = jnp.sum(scaled * scaled, axis=_features(differences))
    return scaled, largest.reshape(squares.shape) * jnp.sqrt(squares)


def _features(images: jax.Array) -> tuple[int, ...]:
    return tuple(range(1, images.ndim))


def _broadcast(value: jax.Array, like: jax.Array) -> jax.Array:
    value = jnp.asarray(value, like.dtype)
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim)) if value.ndim else value


LINF = Norm("linf", _linf_measure, _linf_project, _linf_ascend, _linf_draw)
L2 = Norm("l2", _l2_measure, _l2_project, _l2_ascend, _l2_draw)
NORMS = {norm.name: norm for norm in (LINF, L2)}


def find(norm: str | Norm) -> Norm:
    """The norm of that name; a `Norm` passes through."""
    if isinstance(norm, Norm):
        return norm
    if norm not in NORMS:
        raise errors.unknown("norm", norm, NORMS)
    return NORMS[norm]
