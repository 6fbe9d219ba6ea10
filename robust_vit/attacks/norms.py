"""Norms as data: what an attack needs to know of a ball, in pixel units [0, 1], one value or direction an example.

Every function takes arrays `[batch, height, width, channels]` and, where it needs one, a radius that broadcasts against
`[batch]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from robust_vit import errors

_RELATIVE, _ABSOLUTE = 1e-5, 1e-6  # What rounding may add to a distance: of the radius, and in pixel units.


@dataclasses.dataclass(frozen=True)
class Norm:
    """The geometry of a threat. Hashable: a part of the compiled program's key.

    Attributes:
      name: as in `linf-8`.
      measure: `(differences) -> [batch]`: the norm of each.
      project: `(images, clean, radius) -> images`: the nearest point, in Euclidean distance, that is both in the ball around
        `clean` (itself in [0, 1]) and in [0, 1].
      ascend: `(gradients) -> directions` of norm one along which a linear function grows fastest; zero for a zero gradient.
      climb: `(gradients, images) -> directions` of norm one that an attack steps along from images in [0, 1]; `ascend`, except
        in L1, where the steepest direction is a single value, which may be at its bound.
      draw: `(keys, like, radius) -> differences` uniform in the ball, one key an example.
    """

    name: str
    measure: Callable
    project: Callable
    ascend: Callable
    climb: Callable
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
    # Squares of what is below 1e-23 underflow in float32.
    largest = jnp.max(jnp.abs(differences), axis=_features(differences), keepdims=True)
    scaled = differences / jnp.where(largest > 0, largest, 1.0)
    return (largest * jnp.sqrt(_total(scaled * scaled))).reshape(differences.shape[0])


def _l2_project(images: jax.Array, clean: jax.Array, radius: jax.Array) -> jax.Array:
    """Differences shrink by one factor and end at the box: its square is where a concave, piecewise linear sum is radius²."""
    difference, room = _room(images, clean)
    # In units of the largest difference, whose squares do not underflow.
    unit = jnp.max(difference, axis=_features(images), keepdims=True)
    unit = jnp.where(unit > 0, unit, 1.0)
    squares, ends = (difference / unit) ** 2, (room / unit) ** 2
    goal = (_broadcast(radius, clean) / unit) ** 2

    def solve(square):
        at_end = square * squares >= ends
        return (goal - _total(jnp.where(at_end, ends, 0.0))) / _total(jnp.where(at_end, 0.0, squares))

    outside = _l2_measure(jnp.minimum(difference, room)) > radius
    factor = jnp.sqrt(_root(solve, outside, 0.0, jnp.ones_like(goal)))
    factor = jnp.where(_broadcast(outside, clean), factor, 1.0)
    return _land(jnp.minimum(factor * difference, room), images, clean)


def _l2_ascend(gradients: jax.Array) -> jax.Array:
    return normalize(L2, gradients)


def _l2_draw(keys: jax.Array, like: jax.Array, radius: jax.Array) -> jax.Array:
    dimension = like[0].size

    def draw(key):
        direction_key, length_key = jax.random.split(key)
        direction = jax.random.normal(direction_key, like.shape[1:], like.dtype)
        # The volume within r of the centre grows as r^dimension.
        length = jax.random.uniform(length_key, (), like.dtype) ** (1.0 / dimension)
        return length * direction / jnp.sqrt(jnp.sum(direction * direction))

    return _broadcast(radius, like) * jax.vmap(draw)(keys)


def _l1_measure(differences: Float[Array, "batch height width channels"]) -> Float[Array, " batch"]:
    return jnp.sum(jnp.abs(differences), axis=_features(differences))


def _l1_project(images: jax.Array, clean: jax.Array, radius: jax.Array) -> jax.Array:
    """Differences lose one amount, or end at zero or at the box: the amount is where a piecewise linear sum is the radius."""
    difference, room = _room(images, clean)
    goal = _broadcast(radius, clean)

    def solve(amount):
        left = difference - amount
        at_end = left >= room
        moving = (left > 0) & ~at_end
        return (_total(jnp.where(at_end, room, jnp.where(moving, difference, 0.0))) - goal) / _total(moving * 1.0)

    outside = _l1_measure(jnp.minimum(difference, room)) > radius
    amount = _root(solve, outside, 0.0, jnp.max(difference, axis=_features(images), keepdims=True))
    amount = jnp.where(_broadcast(outside, clean), amount, 0.0)
    moved = jnp.clip(difference - amount, 0.0, room)
    # Rounding in the sum over many pixels would leave the ball.
    length = _total(moved)
    moved = jnp.where(length > goal, moved * (goal / jnp.where(length > 0, length, 1.0)), moved)
    return _land(moved, images, clean)


def _l1_ascend(gradients: jax.Array) -> jax.Array:
    largest = jnp.abs(gradients) >= jnp.max(jnp.abs(gradients), axis=_features(gradients), keepdims=True)
    return normalize(L1, jnp.where(largest, gradients, 0.0))


def _l1_climb(gradients: jax.Array, images: jax.Array) -> jax.Array:
    """The gradient on the hundredth of the values where it is largest, of those that the box lets move.

    After Tramer & Boneh 2019 (arXiv 1904.13000), whose steps are all equal: where a few values make up the difference, the
    projection takes those back.
    """
    blocked = ((images <= 0) & (gradients < 0)) | ((images >= 1) & (gradients > 0))
    gradients = jnp.where(blocked, 0.0, gradients)
    return normalize(L1, jnp.where(largest(gradients, jnp.full(len(images), 0.01, gradients.dtype)), gradients, 0.0))


def largest(
    gradients: Float[Array, "batch height width channels"], share: Float[Array, " batch"]
) -> Bool[Array, "batch height width channels"]:
    """Which values have the largest gradients: a share of all, in (0, 1], rounded up, and those that tie with the least."""
    sizes = jnp.sort(jnp.abs(gradients).reshape(gradients.shape[0], -1), axis=-1)
    count = sizes.shape[1]
    index = jnp.clip(((1.0 - share) * count).astype(jnp.int32), 0, count - 1)
    return jnp.abs(gradients) >= _broadcast(jnp.take_along_axis(sizes, index[:, None], axis=-1)[:, 0], gradients)


def _l1_draw(keys: jax.Array, like: jax.Array, radius: jax.Array) -> jax.Array:
    def draw(key):
        inside_key, rest_key = jax.random.split(key)
        # The shares of n + 1 exponentials are uniform on the simplex; without the last, in the solid one.
        inside = jax.random.laplace(inside_key, like.shape[1:], like.dtype)
        return inside / (jnp.sum(jnp.abs(inside)) + jax.random.exponential(rest_key, (), like.dtype))

    return _broadcast(radius, like) * jax.vmap(draw)(keys)


def _room(images: jax.Array, clean: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How far each value is from the clean one, and how far the box lets it be on that side."""
    difference = images - clean
    return jnp.abs(difference), jnp.where(difference > 0, 1.0 - clean, clean)


def _land(distances: jax.Array, images: jax.Array, clean: jax.Array) -> jax.Array:
    return jnp.clip(clean + jnp.sign(images - clean) * distances, 0.0, 1.0)


def _root(solve: Callable, wanted: jax.Array, low: float, high: jax.Array) -> jax.Array:
    """Where a monotone, piecewise linear function meets its goal, one point an example, `[batch, 1, 1, 1]`.

    `solve(point)` is where the piece at `point` would meet the goal, which also tells on which side of `point` the root is; a
    meeting outside of the interval that is left halves it. The interval shrinks in every round and the last one is on the
    root's own piece, so the root is exact. An example that has ended, or is not `wanted`, stays as it is, whatever its
    neighbours need.
    """
    low = jnp.full_like(high, low)

    def unfinished(carry):
        return jnp.any(carry[-1])

    def narrow(carry):
        point, low, high, moving = carry
        met = solve(point)
        low, high = jnp.where(met > point, point, low), jnp.where(met < point, point, high)
        # Strictly inside, or rounding at the border of two pieces could go back and forth for ever.
        following = jnp.where((met > low) & (met < high), met, 0.5 * (low + high))
        following = jnp.where(moving & (met != point), following, point)
        return following, low, high, moving & (following != point)

    return jax.lax.while_loop(unfinished, narrow, (low, low, high, _broadcast(wanted, high)))[0]


def _features(images: jax.Array) -> tuple[int, ...]:
    return tuple(range(1, images.ndim))


def _total(values: jax.Array) -> jax.Array:
    return jnp.sum(values, axis=_features(values), keepdims=True)


def _broadcast(value: jax.Array, like: jax.Array) -> jax.Array:
    value = jnp.asarray(value)
    value = value if value.dtype == bool else value.astype(like.dtype)
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim)) if value.ndim else value


def _ascend_anywhere(ascend: Callable) -> Callable:
    def climb(gradients: jax.Array, images: jax.Array) -> jax.Array:
        del images
        return ascend(gradients)

    return climb


LINF = Norm("linf", _linf_measure, _linf_project, _linf_ascend, _ascend_anywhere(_linf_ascend), _linf_draw)
L2 = Norm("l2", _l2_measure, _l2_project, _l2_ascend, _ascend_anywhere(_l2_ascend), _l2_draw)
L1 = Norm("l1", _l1_measure, _l1_project, _l1_ascend, _l1_climb, _l1_draw)
NORMS = {norm.name: norm for norm in (LINF, L2, L1)}


def normalize(norm: Norm, differences: jax.Array) -> jax.Array:
    """Differences scaled to norm one; zero stays zero, and none is too small."""
    largest = jnp.max(jnp.abs(differences), axis=_features(differences), keepdims=True)
    scaled = differences / jnp.where(largest > 0, largest, 1.0)
    length = _broadcast(norm.measure(scaled), scaled)
    return scaled / jnp.where(length > 0, length, 1.0)


def edge(radius: float | jax.Array) -> float | jax.Array:
    """The largest distance, measured on float32 images, that counts as within the radius.

    A pixel near 1 is rounded by up to 6e-8 whatever the radius, which is more than a hundred-thousandth of a small one.
    """
    return radius * (1 + _RELATIVE) + _ABSOLUTE


def within(distance: Float[np.ndarray, " ..."], radius: float | np.ndarray) -> Bool[np.ndarray, " ..."]:
    """Whether distances that were measured on float32 images are at most the radius, rounding aside."""
    return np.asarray(distance) <= edge(radius)


def find(norm: str | Norm) -> Norm:
    """The norm of that name; a `Norm` passes through."""
    if isinstance(norm, Norm):
        return norm
    if norm not in NORMS:
        raise errors.unknown("norm", norm, NORMS)
    return NORMS[norm]
