"""The nearest point of a hyperplane inside [0, 1], exact in L1, L2 and L-infinity."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_vit.attacks import norms


def reach(
    norm: norms.Norm,
    points: Float[Array, "batch height width channels"],
    normals: Float[Array, "batch height width channels"],
    gaps: Float[Array, " batch"],
) -> Float[Array, "batch height width channels"]:
    """The moves `d` of least norm with `sum(normals * d) == gaps` and `points + d` in [0, 1].

    In L2 and L-infinity all pixels set off together and stop at the box; in L1 those with the largest normals go first, each
    as far as the box lets it (Croce & Hein 2020, arXiv 1907.02044, section 3.1). No passes.

    Args:
      norm: linf, l2 or l1.
      points: in [0, 1].
      normals: of the hyperplanes, of any length; zero makes no move.
      gaps: of any sign.

    Returns:
      The moves; where no point of the box is on the hyperplane, those to the corner of the box that is nearest to it.
    """
    signs = jnp.where(gaps < 0, -1.0, 1.0).astype(normals.dtype)
    normals = signs[:, None, None, None] * normals
    room = jnp.where(normals > 0, 1.0 - points, jnp.where(normals < 0, points, 0.0))
    # In units of the largest entry: squares of small gradients underflow.
    largest = _over_pixels(jnp.max, jnp.abs(normals))
    unit = jnp.where(largest > 0, largest, 1.0)
    sizes = jnp.abs(normals) / unit
    gaps = jnp.abs(gaps).astype(normals.dtype)[:, None, None, None] / unit
    return jnp.sign(normals) * _SOLVERS[norm.name](sizes, room, gaps)


def _level(sizes: jax.Array, room: jax.Array, gaps: jax.Array) -> jax.Array:
    return _set_off(sizes, jnp.sign(sizes), room, gaps)


def _proportional(sizes: jax.Array, room: jax.Array, gaps: jax.Array) -> jax.Array:
    return _set_off(sizes, sizes, room, gaps)


def _set_off(sizes: jax.Array, rates: jax.Array, room: jax.Array, gaps: jax.Array) -> jax.Array:
    """Moves `min(rates * t, room)` at the time `t` when their gain, a concave, piecewise linear function, is the gap.

    Newton's method from zero never passes the root of a concave function, and ends on the root's own piece, so the root is
    exact. An example that has ended stays as it is, whatever its neighbours need.
    """

    def meets(time):
        stopped = rates * time >= room
        speed = _over_pixels(jnp.sum, jnp.where(stopped, 0.0, sizes * rates))
        left = gaps - _over_pixels(jnp.sum, jnp.where(stopped, sizes * room, 0.0))
        return jnp.where(speed > 0, left / jnp.where(speed > 0, speed, 1.0), jnp.inf)

    def unfinished(carry):
        return jnp.any(carry[1])

    def advance(carry):
        time, _ = carry
        met = meets(time)
        later = met > time
        return jnp.where(later, met, time), later

    start = jnp.zeros_like(gaps)
    time, _ = jax.lax.while_loop(unfinished, advance, (start, jnp.ones_like(start, bool)))
    return jnp.where(rates > 0, jnp.minimum(rates * time, room), 0.0)


def _largest_first(sizes: jax.Array, room: jax.Array, gaps: jax.Array) -> jax.Array:
    """Whole room above a threshold of the sizes, a share of it at the threshold, none below: a fractional knapsack.

    The threshold, the largest size that suffices together with all larger ones, is found by halving in the order of
    floating-point numbers from 0 to 1, which is that of their bits. (64 images of 3,072 values on a CPU: 1.6 ms; sorted, 44 ms.)
    """
    integer = jnp.int32 if sizes.dtype.itemsize == 4 else jnp.int64
    gains = sizes * room
    order = jax.lax.bitcast_convert_type(sizes, integer)
    low = jnp.zeros(gaps.shape, integer)
    high = jax.lax.bitcast_convert_type(jnp.ones_like(gaps), integer) + 1

    def unfinished(carry):
        return jnp.any(carry[1] - carry[0] > 1)

    def halve(carry):
        low, high = carry
        middle = low + (high - low) // 2
        suffices = _over_pixels(jnp.sum, jnp.where(order >= middle, gains, 0.0)) >= gaps
        return jnp.where(suffices, middle, low), jnp.where(suffices, high, middle)

    threshold, _ = jax.lax.while_loop(unfinished, halve, (low, high))
    left = gaps - _over_pixels(jnp.sum, jnp.where(order > threshold, gains, 0.0))
    ready = _over_pixels(jnp.sum, jnp.where(order == threshold, gains, 0.0))
    share = jnp.clip(left / jnp.where(ready > 0, ready, 1.0), 0.0, 1.0)
    return jnp.where(order > threshold, room, jnp.where(order == threshold, share * room, 0.0))


def _over_pixels(reduce, values: jax.Array) -> jax.Array:
    return reduce(values, axis=tuple(range(1, values.ndim)), keepdims=True)


_SOLVERS = {"linf": _level, "l2": _proportional, "l1": _largest_first}
