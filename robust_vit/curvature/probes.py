"""Random vectors on pytrees that cost little to compile: one threefry call for the whole tree, then integer mixing."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from robust_vit import trees

PyTree = Any


def draw(key: Key[Array, ""], like: PyTree) -> PyTree:
    """Independent entries, uniform with mean zero and variance one, so that `E[v'Av]` is the trace of A.

    A leaf's entries depend on the key, its path and its shape alone, not on its neighbours or its sharding. `jax.random` for
    every leaf would compile for half a minute on a ViT's 56 leaves; here each entry's number is mixed with a 64-bit seed of
    its leaf (the finaliser `lowbias32` of Wellons 2018, twice).

    Args:
      key: of the draw.
      like: gives structure, shapes and dtypes, which are float32 or float64.
    """
    return _of_seeds(seeds(key, like), like)


def draw_again(key: Key[Array, ""], number: jax.Array, like: PyTree) -> PyTree:
    """A draw of the same kind for each number, with no threefry at all: for the body of a loop, where that is most to compile."""
    words = jax.random.key_data(key).astype(jnp.uint32)
    first = _mix(_mix(_names(like) + words[0]) + number.astype(jnp.uint32))
    return _of_seeds(jnp.stack([first, _mix(first + words[-1])], axis=1), like)


def signs(key: Key[Array, ""], like: PyTree) -> PyTree:
    """Independent entries of -1 and 1: of all with variance one, those whose `v'Av` varies least (Hutchinson 1990).

    Arguments as of `draw`; it costs no more to compile.
    """
    return jax.tree.map(lambda leaf: jnp.where(leaf > 0, 1, -1).astype(leaf.dtype), draw(key, like))


def normal(seed: jax.Array, like: jax.Array) -> jax.Array:
    """Independent standard normal entries of one leaf, by the inverse of the distribution function; none is beyond 5.3.

    Args:
      seed: of the leaf, a row of `seeds`.
      like: gives shape and dtype, which is float32 or float64.
    """
    two, three = (np.sqrt(number).astype(like.dtype) for number in (2.0, 3.0))
    return two * jax.lax.erf_inv(_leaf(seed, like) / three)


def seeds(key: Key[Array, ""], like: PyTree) -> jax.Array:
    """Two words of each leaf, `[leaves, 2]`, from the key and the leaf's path."""
    return jax.vmap(lambda name: jax.random.bits(jax.random.fold_in(key, name), (2,), jnp.uint32))(_names(like))


def _names(like: PyTree) -> np.ndarray:
    return np.asarray([zlib.crc32(path.encode()) for path in trees.paths(like)], np.uint32)


def _of_seeds(seeds: jax.Array, like: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(like)
    return jax.tree.unflatten(structure, [_leaf(seed, leaf) for seed, leaf in zip(seeds, leaves, strict=True)])


def _leaf(seed: jax.Array, like: jax.Array) -> jax.Array:
    number = jnp.zeros(like.shape, jnp.uint32)
    for axis in range(like.ndim):
        stride = int(np.prod(like.shape[axis + 1 :], dtype=np.uint64) % 2**32)
        number = number + jax.lax.broadcasted_iota(jnp.uint32, like.shape, axis) * np.uint32(stride)
    bits = _mix(_mix(number + seed[0]) ^ seed[1])
    # The centre of one of 2^23 equal cells: exact in float32, symmetric about zero, and never zero.
    cells = (bits >> 9).astype(like.dtype)
    return ((cells + 0.5) * 2.0**-22 - 1.0) * np.sqrt(3.0).astype(like.dtype)


def _mix(bits: jax.Array) -> jax.Array:
    bits = (bits ^ (bits >> 16)) * np.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * np.uint32(0x846CA68B)
    return bits ^ (bits >> 16)
